"""Draw docs/mechanism.png: what one query of a MoDA layer sees."""

from __future__ import annotations

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TOKENS, LAYERS = 7, 4
QUERY = (4, 3)  # token, layer
GREY, BLUE, ORANGE, GREEN, INK = "#e9ecef", "#4c78a8", "#f58518", "#54a24b", "#333333"


def box(ax: plt.Axes, x: float, y: float, colour: str, text: str = "", height: float = 0.34) -> None:
    """One K/V pair, or the query."""
    style = "round,pad=0.02,rounding_size=0.06"
    ax.add_patch(
        FancyBboxPatch((x - 0.36, y - height / 2), 0.72, height, boxstyle=style, fc=colour, ec="white", lw=1.5)
    )
    ax.text(x, y, text, ha="center", va="center", color="white" if colour != GREY else "#adb5bd", fontsize=8.5)


def draw(path: str) -> None:
    """Draw the figure and save it."""
    fig, ax = plt.subplots(figsize=(8.4, 4.4))
    token, layer = QUERY
    for m in range(LAYERS):
        for t in range(TOKENS):
            base = m * 1.0
            if m == layer and t <= token:
                box(ax, t, base, BLUE, "K V")
            elif m < layer and t == token:
                box(ax, t, base, ORANGE, "K V")
            else:
                box(ax, t, base, GREY, "K V")
            ffn = m < layer and t == token
            box(ax, t, base + 0.42, GREEN if ffn else GREY, "K V" if ffn else "", height=0.28)
    y = LAYERS + 0.15
    box(ax, token, y, INK, "query", height=0.4)
    for x, h, bend in ((1.6, layer, 0.15), (token + 0.02, layer - 1 + 0.42, -0.55)):
        ax.add_patch(
            FancyArrowPatch((token, y - 0.22), (x, h + 0.2), connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
                            mutation_scale=13, color=INK, lw=1.4, zorder=5)
        )  # fmt: skip
    for t in range(TOKENS):
        ax.text(t, -0.42, f"token {t}", ha="center", fontsize=9, color=INK)
    for m in range(LAYERS):
        ax.text(-0.65, m + 0.2, f"layer {m}", ha="right", va="center", fontsize=9, color=INK)
    ax.text(TOKENS - 0.4, layer, "sequence K/V of its layer", color=BLUE, va="center", fontsize=10, weight="bold")
    ax.text(TOKENS - 0.4, layer - 1, "depth K/V of its token:", color=INK, va="center", fontsize=10, weight="bold")
    ax.text(TOKENS - 0.4, layer - 1.35, "written by earlier attentions", color=ORANGE, va="center", fontsize=10)
    ax.text(TOKENS - 0.4, layer - 1.7, "and by earlier FFNs", color=GREEN, va="center", fontsize=10)
    words = f"query of token {token} in layer {layer}:\none softmax over both"
    ax.text(TOKENS - 0.4, y, words, color=INK, va="center", fontsize=10, weight="bold")
    ax.set_xlim(-1.6, TOKENS + 2.7)
    ax.set_ylim(-0.7, LAYERS + 0.6)
    ax.axis("off")
    fig.savefig(path, dpi=160, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", default="docs/mechanism.png")
    draw(parser.parse_args().output)
