"""Figures and CSV files of what was measured, and one HTML page that holds the figures."""

import base64
import csv
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from moda.files import write_text, writing

from .measure import Look

#: Small weights are visible: the colour is that of the square root.
_COLOURS: dict[str, Any] = {"cmap": "magma", "norm": PowerNorm(0.5, vmin=0, vmax=1)}


def spread(count: int, most: int) -> list[int]:
    """At most so many of 0 .. count - 1, evenly, the ends among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def attention_maps(seen: Look, layers: Sequence[int], heads: Sequence[int]) -> Any:
    """The paper's Figure 5: a column per layer, a row per head; left of the line the sequence, right of it depth."""
    size = (1.0 + 2.1 * len(layers), 0.6 + 1.9 * len(heads))
    figure, axes = plt.subplots(len(heads), len(layers), figsize=size, squeeze=False, layout="constrained")
    image: Any = None
    for column, layer in enumerate(layers):
        for row, head in enumerate(heads):
            ax = axes[row][column]
            image = ax.imshow(seen.weights[layer][head], aspect="auto", interpolation="nearest", **_COLOURS)
            if seen.sources[layer]:
                ax.axvline(seen.length - 0.5, color="white", lw=1)
            ax.set(xticks=[], yticks=[])
            if row == 0:
                depth = f" | {len(seen.sources[layer])} slots" if seen.sources[layer] else ""
                ax.set_title(f"layer {layer}\n{seen.length} tokens{depth}", fontsize=8)
            if column == 0:
                ax.set_ylabel(f"head {head}", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
    figure.suptitle(f"{seen.name}: rows are queries, columns keys: sequence | depth", fontsize=9)
    return figure


def depth_masses(seen: Look) -> Any:
    """Depth's share by layer and head, and by layer and slot."""
    mass, by_slot = seen.depth_mass(), seen.slot_mass()
    names = list(dict.fromkeys(name for slots in by_slot for name in slots))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1, 2))
    image = left.imshow(mass, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    left.set(xlabel="head", ylabel="reading layer", title="depth's share of the attention")
    figure.colorbar(image, ax=left)
    grid = [[slots.get(name, float("nan")) for name in names] for slots in by_slot]
    image = right.imshow(grid, aspect="auto", vmin=0, cmap="viridis")
    right.set(ylabel="reading layer", title="share by slot (mean over heads and tokens)")
    shown = spread(len(names), 12)
    right.set_xticks(shown, [names[i] for i in shown], rotation=45, ha="right", fontsize=7)
    figure.colorbar(image, ax=right)
    for ax in (left, right):
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(seen.name, fontsize=9)
    return figure


def by_layer(looks: Sequence[Look]) -> Any:
    """Attention sinks, and the logit lens: what the stream at each depth predicts already."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for seen in looks:
        axes[0].plot(seen.sink_mass().mean(-1), "o-", ms=3, label=seen.name)
        if seen.lens:
            losses, agreement = zip(*seen.lens)
            axes[1].plot(losses, "o-", ms=3, label=seen.name)
            axes[2].plot(agreement, "o-", ms=3, label=seen.name)
    titles = (
        "attention to the first token",
        "logit lens: loss of the next token, nats",
        "logit lens: same likeliest token",
    )
    for ax, title in zip(axes, titles):
        ax.set(xlabel="layer", title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    return figure


def cosines(seen: Look) -> Any:
    """How much the residual stream turns from layer to layer."""
    figure, ax = plt.subplots(figsize=(5, 4.2), layout="constrained")
    cosine = seen.cosine()
    assert cosine is not None
    image = ax.imshow(cosine, vmin=-1, vmax=1, cmap="coolwarm")
    ax.set(xlabel="layer", ylabel="layer", title=f"{seen.name}: cosine between residual streams")
    figure.colorbar(image, ax=ax)
    return figure


def _csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with writing(path) as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def write_tables(looks: Sequence[Look], out: Path) -> None:
    """``heads.csv``, ``slots.csv``, ``layers.csv`` and ``cosine.csv``."""
    _csv(out / "heads.csv", ("model", "layer", "head", "depth_mass", "first_token_mass"), (
        (x.name, layer, head, depth, sink)
        for x in looks
        for layer, (depths, sinks) in enumerate(zip(x.depth_mass().tolist(), x.sink_mass().tolist()))
        for head, (depth, sink) in enumerate(zip(depths, sinks))
    ))  # fmt: skip
    _csv(out / "slots.csv", ("model", "layer", "slot", "mass"), (
        (x.name, layer, slot, mass)
        for x in looks for layer, slots in enumerate(x.slot_mass()) for slot, mass in slots.items()
    ))  # fmt: skip
    _csv(out / "layers.csv", ("model", "layer", "lens_loss", "lens_agreement", "stream_rms"), (
        (x.name, layer, *lens, x.streams[layer].pow(2).mean().sqrt().item())
        for x in looks if x.streams is not None for layer, lens in enumerate(x.lens)
    ))  # fmt: skip
    _csv(out / "cosine.csv", ("model", "layer", "other", "cosine"), (
        (x.name, a, b, value)
        for x in looks if (cosine := x.cosine()) is not None
        for a, row in enumerate(cosine.tolist()) for b, value in enumerate(row)
    ))  # fmt: skip


def write_page(
    looks: Sequence[Look], out: Path, layers: Sequence[int] | None, heads: Sequence[int] | None
) -> list[Path]:
    """Draw everything and write ``index.html``, the PNG files and the tables; returns the figures' paths.

    :param layers: of the attention maps; at most six, spread evenly, if None. ``heads``: the same, at most four.
    """
    figures: dict[str, Any] = {"layers": by_layer(looks)}
    for number, seen in enumerate(looks):
        n_layers, n_heads = len(seen.weights), seen.weights[0].shape[0]
        shown = [i for i in (layers if layers is not None else spread(n_layers, 6)) if i < n_layers]
        rows = [i for i in (heads if heads is not None else spread(n_heads, 4)) if i < n_heads]
        if shown and rows:
            figures[f"attention_{number}"] = attention_maps(seen, shown, rows)
        if any(seen.sources):
            figures[f"depth_{number}"] = depth_masses(seen)
        if seen.streams is not None:
            figures[f"cosine_{number}"] = cosines(seen)
    parts, paths = [], []
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=130)
        plt.close(figure)
        paths.append(out / f"{name}.png")
        with writing(paths[-1], "wb") as f:
            f.write(picture.getvalue())
        encoded = base64.b64encode(picture.getvalue()).decode()
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{encoded}">')
    write_tables(looks, out)
    models = ", ".join(html.escape(seen.name) for seen in looks)
    text = html.escape("".join(looks[0].tokens))
    style = "body{font-family:sans-serif;max-width:1200px;margin:2em auto}img{max-width:100%}pre{white-space:pre-wrap}"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{models}</title><style>{style}</style>'
    write_text(out / "index.html", f"{head}<h1>{models}</h1>{''.join(parts)}<h2>text</h2><pre>{text}</pre></html>\n")
    return paths
