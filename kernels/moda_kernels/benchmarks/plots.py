"""Plots of a table's sweeps, drawn from its CSV alone."""

import csv
from pathlib import Path
from typing import Any

AXES = {"T": "sequence length T", "G": "query heads to a key/value head, G", "S": "depth slots S"}
COLOURS = {
    "cudnn": "tab:blue",
    "flash_attn_4": "tab:cyan",
    "flash": "tab:orange",
    "triton": "tab:green",
    "reference": "tab:gray",
    "fused": "tab:red",
    "split": "tab:purple",
}
_NO_DEPTH = ("cudnn", "flash_attn_4", "flash", "triton")  # attention to the sequence alone
#: The row of the T sweep that is also a point of the other two.
SHARED = {"T": "16384", "G": "8", "S": "64"}


def draw_sweeps(path: Path) -> list[Path]:
    """One PNG for each sweep: milliseconds of forward + backward (median, bars from the 20th to the 80th percentile), and
    their ratio to cuDNN attention without depth. Dashed, and so named in the legend: attention without depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with path.open(newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["status"] == "ok" and r["pass"] == "both"]
    written = []
    for axis, label in AXES.items():
        chosen = [r for r in rows if r["sweep"] == axis or all(r[a] == v for a, v in SHARED.items())]
        if len({r[axis] for r in chosen}) < 2:
            continue
        lines: dict[str, list[dict[str, str]]] = {}
        for r in sorted(chosen, key=lambda r: int(r[axis])):
            lines.setdefault(r["variant"], []).append(r)
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for name, points in lines.items():
            x = [int(r[axis]) for r in points]
            y = [float(r["median_ms"]) for r in points]
            spread = [
                [m - float(r["p20_ms"]) for m, r in zip(y, points)],
                [float(r["p80_ms"]) - m for m, r in zip(y, points)],
            ]
            style, depth = ("--", "no depth") if name in _NO_DEPTH else ("-", "with depth")
            look: dict[str, Any] = {"ms": 4, "label": f"{name}, {depth}", "color": COLOURS[name]}
            left.errorbar(x, y, yerr=spread, fmt="o" + style, capsize=2, **look)
            ratios = [(a, float(r["over_cudnn"])) for a, r in zip(x, points) if r["over_cudnn"]]
            if name not in ("cudnn", "reference"):
                right.plot(*zip(*ratios), "o" + style, **look)
        floor = [r for r in lines.get("fused", []) if r["floor_ms"]]
        left.plot([int(r[axis]) for r in floor], [float(r["floor_ms"]) for r in floor], ":k", label="floor of fused")
        ticks = sorted({int(r[axis]) for r in chosen})
        for ax in (left, right):
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [str(t) for t in ticks])
            ax.set_xlabel(label)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        left.set_yscale("log")
        left.set_ylabel("forward + backward, ms")
        right.set_ylabel("over cuDNN attention without depth")
        first = chosen[0]
        figure.suptitle(
            f"{first['gpu']}, bf16, D = {first['D']}, Hk = {first['Hk']}, commit {first['commit']}", fontsize=10
        )
        target = path.with_name(f"{path.stem}_{axis}.png")
        figure.savefig(target, dpi=130)
        plt.close(figure)
        written.append(target)
    return written
