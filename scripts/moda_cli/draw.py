"""Draw what one query of a MoDA layer sees, or what each layer of a configuration's model reads of earlier layers.

Examples:
  %(prog)s docs/mechanism.png
  %(prog)s reads.png --config configs/moda_demo.yaml model.n_layers=12 "model.depth.read={recent: 6}"
  %(prog)s reads.png --config configs/moda_demo.yaml model.n_layers=12 --reads all "{recent: 6}" "{blocks: 4}"
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from moda.errors import UserError
from moda.files import PLOTS, check_writable

from ._options import new_parser

TOKENS, LAYERS = 7, 4
TOKEN, LAYER = 4, 3  # of the query
GREY, BLUE, ORANGE, GREEN, INK = "#e9ecef", "#4c78a8", "#f58518", "#54a24b", "#333333"


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("output", nargs="?", default="docs/mechanism.png", help="the picture: png, svg or pdf")
    p.add_argument(
        "--config",
        nargs="+",
        metavar=("FILE", "key=value"),
        help="draw what the layers of this configuration's model read",
    )
    p.add_argument("--reads", nargs="+", metavar="POLICY", help="with --config: a panel for each slot policy")
    return p


def _draw_reads(config: list[str], policies: list[str]) -> Any:
    """A figure of what layers read, by the configuration or by each of several policies in it."""
    import matplotlib.pyplot as plt

    from moda.config import load_config

    panels = [[f"model.depth.read={policy}"] for policy in policies] or [[]]
    models = [load_config(config[0], [*config[1:], *change]).model for change in panels]
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 4.4 * rows), squeeze=False, layout="constrained")
    for ax, model in itertools.zip_longest(axes.flat, models):
        if model is None:
            ax.axis("off")
        elif model.depth is None:
            raise UserError("--config", "a configuration with model.depth", config[0])
        else:
            model.depth.draw(ax, model)
    return fig


def run(args: argparse.Namespace) -> int:
    check_writable("output", Path(args.output), PLOTS)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    if args.config is not None:
        _draw_reads(args.config, args.reads or []).savefig(args.output, dpi=110)
        return 0
    if args.reads is not None:
        raise UserError("--reads", "--config FILE beside it")
    fig, ax = plt.subplots(figsize=(8.4, 4.4))
    style = "round,pad=0.02,rounding_size=0.06"

    def box(x: float, y: float, colour: str, text: str = "", height: float = 0.34) -> None:
        """One K/V pair, or the query."""
        ax.add_patch(
            FancyBboxPatch((x - 0.36, y - height / 2), 0.72, height, boxstyle=style, fc=colour, ec="white", lw=1.5)
        )
        ax.text(x, y, text, ha="center", va="center", color="white" if colour != GREY else "#adb5bd", fontsize=8.5)

    for m in range(LAYERS):
        ax.text(-0.65, m + 0.2, f"layer {m}", ha="right", va="center", fontsize=9, color=INK)
        for t in range(TOKENS):
            depth = m < LAYER and t == TOKEN
            box(t, m, BLUE if m == LAYER and t <= TOKEN else ORANGE if depth else GREY, "K V")
            box(t, m + 0.42, GREEN if depth else GREY, "K V" if depth else "", height=0.28)
    for t in range(TOKENS):
        ax.text(t, -0.42, f"token {t}", ha="center", fontsize=9, color=INK)
    top = LAYERS + 0.15
    box(TOKEN, top, INK, "query", height=0.4)
    for x, y, bend in ((1.6, LAYER, 0.15), (TOKEN + 0.02, LAYER - 1 + 0.42, -0.55)):
        ax.add_patch(
            FancyArrowPatch((TOKEN, top - 0.22), (x, y + 0.2), connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
                            mutation_scale=13, color=INK, lw=1.4, zorder=5)
        )  # fmt: skip
    for y, text, colour, weight in (
        (top, f"query of token {TOKEN} in layer {LAYER}:\none softmax over both", INK, "bold"),
        (LAYER, "sequence K/V of its layer", BLUE, "bold"),
        (LAYER - 1, "depth K/V of its token:", INK, "bold"),
        (LAYER - 1.35, "written by earlier attentions", ORANGE, "normal"),
        (LAYER - 1.7, "and by earlier FFNs", GREEN, "normal"),
    ):
        ax.text(TOKENS - 0.4, y, text, color=colour, va="center", fontsize=10, weight=weight)
    ax.set_xlim(-1.6, TOKENS + 2.7)
    ax.set_ylim(-0.7, LAYERS + 0.6)
    ax.axis("off")
    fig.savefig(args.output, dpi=160, bbox_inches="tight")
    return 0
