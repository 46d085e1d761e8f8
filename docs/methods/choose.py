"""Draw the decision chart of docs/methods/index.md: ``python docs/methods/choose.py`` writes ``choose.svg`` beside it.

The background is transparent, for light and dark pages alike: every text stands in a box of its own, and the arrows are
a grey that both show. Questions and methods differ in shape and weight as well as in colour.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, INK = "#808080", "#1a1a1a"
QUESTION = {"boxstyle": "round,pad=0.6,rounding_size=0.9", "facecolor": "#d9ebf7", "edgecolor": "#0072b2"}
METHOD = {"boxstyle": "square,pad=0.6", "facecolor": "#fdebc8", "edgecolor": "#d55e00", "linewidth": 1.8}
ANSWER = {"boxstyle": "round,pad=0.3", "facecolor": "#ececec", "edgecolor": "none"}

ASKED, CHOSEN = 2.3, 7.1  # the two columns
REPRODUCE, SMALL, WELLS, SOLVED, FEW, TWICE, MANY, EXACT = 12.5, 11.0, 9.5, 8.0, 6.5, 5.0, 2.2, 0.6  # the rows
QUESTIONS = [
    (ASKED, REPRODUCE, "Are you reproducing a paper?"),
    (ASKED, SMALL, "Up to some hundred variables,\nand losses without batches?"),
    (ASKED, WELLS, "May $G$ have several minima\nthat differ for $F$?"),
    (ASKED, SOLVED, "Is the lower problem solved, or nearly,\nwhenever $\\alpha$ moves?"),
    (ASKED, FEW, "Do one or a few lower steps\nshow what $\\alpha$ does?"),
    (ASKED, TWICE, "Can $G$ be differentiated twice,\nin the memory you have?"),
    (CHOSEN, TWICE, "Should $\\alpha$ be judged after\nseveral real lower steps?"),
    (ASKED, MANY, "Several real lower steps for each upper one,\nand no time for a mixed product in each?"),
]
METHODS = [
    (CHOSEN, REPRODUCE, "its class", "MW-Net, L2RW, MAML: Unrolled\nDARTS: FiniteDifference"),
    (CHOSEN, SMALL, "bilevel.minimize", "bounds, restarts, no step sizes to choose"),
    (CHOSEN, WELLS, "PDBO", "with several starts; train $w$ again"),
    (CHOSEN, SOLVED, "Implicit", "whatever solved it"),
    (CHOSEN, FEW, "BOME", "first order; label correction: EBOMLC"),
    (CHOSEN - 1.25, TWICE - 1.5, "FiniteDifference", "one virtual step"),
    (CHOSEN + 1.35, TWICE - 1.5, "SAMA", "identity for $G_{ww}$"),
    (CHOSEN, MANY, "EMLC", "exact for one step, then discounted"),
    (ASKED, EXACT, "Unrolled", "exact, for any number of steps"),
]
# From, to, the answer, and how far along the arrow it stands.
ARROWS = [
    (ASKED, REPRODUCE, CHOSEN, REPRODUCE, "yes", 0.5),
    (ASKED, REPRODUCE, ASKED, SMALL, "no", 0.47),
    (ASKED, SMALL, CHOSEN, SMALL, "yes", 0.5),
    (ASKED, SMALL, ASKED, WELLS, "no", 0.5),
    (ASKED, WELLS, CHOSEN, WELLS, "yes", 0.5),
    (ASKED, WELLS, ASKED, SOLVED, "no", 0.5),
    (ASKED, SOLVED, CHOSEN, SOLVED, "yes", 0.6),
    (ASKED, SOLVED, ASKED, FEW, "no", 0.5),
    (ASKED, FEW, CHOSEN, FEW, "no", 0.5),
    (ASKED, FEW, ASKED, TWICE, "yes", 0.5),
    (ASKED, TWICE, CHOSEN, TWICE, "no", 0.51),
    (CHOSEN, TWICE, CHOSEN - 1.25, TWICE - 1.5, "no", 0.48),
    (CHOSEN, TWICE, CHOSEN + 1.35, TWICE - 1.5, "yes", 0.48),
    (ASKED, TWICE, ASKED, MANY, "yes", 0.5),
    (ASKED, MANY, CHOSEN, MANY, "yes", 0.57),
    (ASKED, MANY, ASKED, EXACT, "no", 0.5),
]


def draw(axes: Axes) -> None:
    """Draw the boxes, then arrows from centre to centre, cut off where the boxes end.

    The order counts: a box has no outline before it is drawn.
    """
    text = {"ha": "center", "va": "center", "color": INK, "fontsize": 10.5, "linespacing": 1.45}
    boxes = [axes.text(x, y, words, bbox=QUESTION, zorder=3, **text) for x, y, words in QUESTIONS]
    for x, y, name, line in METHODS:
        boxes.append(axes.text(x, y, f"$\\bf{{{name.replace(' ', '~')}}}$\n{line}", bbox=METHOD, zorder=3, **text))
    at = {box.get_position(): box.get_bbox_patch() for box in boxes}
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.6, "mutation_scale": 16, "shrinkA": 0, "shrinkB": 1}
    for x, y, to_x, to_y, answer, share in ARROWS:
        ends = {"patchA": at[x, y], "patchB": at[to_x, to_y]}
        axes.annotate("", (to_x, to_y), (x, y), arrowprops={**style, **ends}, zorder=4)
        middle = (x + share * (to_x - x), y + share * (to_y - y))
        axes.text(*middle, answer, bbox=ANSWER, zorder=5, style="italic", **text)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "choose"  # the same file each time
    figure = Figure(figsize=(9.4, 11.1))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0.0, 9.8), ylim=(-0.1, 13.1))
    axes.axis("off")
    draw(axes)
    figure.savefig(Path(__file__).with_suffix(".svg"), transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
