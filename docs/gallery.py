"""Draws docs/gallery.png: one block diagram for each model file, with what it changes of its parent in colour.

    python docs/gallery.py

Data flows upwards. A diagram is a dictionary from rows to the boxes that stand side by side in them; what a file does
not name is as in its parent, which is the file that its docstring names. A box is coloured where the same row of the
parent has no box of that text.
"""

import ast
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, without a window

import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent

EXPERTS = "experts"  # stands for a row of small boxes, of which the router has chosen some
DIAGRAMS = {
    "gpt2": {
        "idea": "where it all started",
        "embed": ["token embedding", "+ position"],
        "attention norm": ["LayerNorm"],
        "project": ["q: H heads", "k: H heads", "v: H heads"],
        "position": [],
        "mix": ["softmax(q kᵀ) v"],
        "gate": [],
        "mlp norm": ["LayerNorm"],
        "mlp in": ["up"],
        "mlp middle": ["GELU"],
        "mlp out": ["down"],
        "final norm": ["LayerNorm"],
        "head": ["embedding transposed"],
        "cache": ["k, v of H heads"],
        "other layers": [],
    },
    "baseline": {
        "idea": "what modern dense models share",
        "embed": ["token embedding"],
        "attention norm": ["RMSNorm"],
        "project": ["q: H heads", "k: G heads", "v: G heads"],
        "position": ["RMSNorm and RoPE on q, k"],
        "mlp norm": ["RMSNorm"],
        "mlp in": ["gate", "up"],
        "mlp middle": ["SiLU(gate) × up"],
        "final norm": ["RMSNorm"],
        "cache": ["k, v of G heads"],
    },
    "gated": {
        "idea": "a head may write nothing",
        "gate": ["× sigmoid gate"],
    },
    "sliding": {
        "idea": "most layers see the last W tokens alone",
        "mix": ["softmax over the last W"],
        "cache": ["k, v of W tokens in most layers"],
    },
    "linformer": {
        "idea": "windows that have ended become few slots",
        "mix": ["softmax over window and slots"],
        "cache": ["k, v of W tokens and of slots"],
    },
    "sparse": {
        "idea": "a query attends to a few blocks",
        "mix": ["softmax over chosen blocks"],
        "cache": ["k, v of G heads, a mean per block"],
    },
    "linear": {
        "idea": "a memory of one size, without softmax",
        "project": ["q, k, v: H heads"],
        "position": ["φ(q), φ(k), decay"],
        "mix": ["M = decay M + k vᵀ"],
        "gate": ["RMSNorm × gate"],
        "cache": ["M; k, v in every 4th layer"],
        "other layers": ["every\n4th layer:\nbaseline\nattention"],
    },
    "hybrid": {
        "idea": "a memory of one size at any length",
        "project": ["q, k, v, convolved"],
        "position": ["q, k of length 1"],
        "mix": ["gated delta rule on M"],
        "gate": ["RMSNorm × gate"],
        "cache": ["M; k, v in every 4th layer"],
        "other layers": ["every\n4th layer:\ngated\nattention"],
    },
    "mla": {
        "idea": "a small cache for many heads",
        "project": ["q: H heads", "latent c", "RoPE key"],
        "position": ["k, v of H heads, made from c"],
        "cache": ["c and the RoPE key, for all heads"],
    },
    "indexer": {
        "idea": "a small indexer chooses K keys",
        "mix": ["indexer: K keys", "softmax over these"],
        "cache": ["c, the RoPE key, the indexer's key"],
    },
    "moe": {
        "idea": "many weights, few of them at work",
        "mlp in": ["router: K of E"],
        "mlp middle": [EXPERTS],
        "mlp out": ["sum, weighted by the router"],
    },
    "switch": {
        "idea": "equal work for every expert",
        "mlp in": ["router: K of E", "no room: dropped"],
    },
}

# From the bottom to the top: the middle of each row, in pixels above the bottom of its diagram.
HEIGHTS = {
    "embed": 46,
    "attention norm": 104,
    "project": 156,
    "position": 195,
    "mix": 234,
    "gate": 273,
    "mlp norm": 353,
    "mlp in": 405,
    "mlp middle": 444,
    "mlp out": 483,
    "final norm": 563,
    "head": 602,
}
ATTENTION = ("project", "position", "mix", "gate")
MLP = ("mlp in", "mlp middle", "mlp out")
SUMS = (312, 522)  # where a branch is added to the residual stream
CACHE = 6
TITLE = 652

COLUMNS = 5
CELL_WIDTH = 400
CELL_HEIGHT = 740
LEFT = 58  # of the boxes in a cell
RIGHT = 362
MIDDLE = (LEFT + RIGHT) / 2
RESIDUAL = 24  # where the residual stream goes past a branch
BOX_HEIGHT = 30

SAME = {"facecolor": "#eceff1", "edgecolor": "#90a4ae"}
CHANGED = {"facecolor": "#ffcf94", "edgecolor": "#d96c00"}
LINE = {"color": "#607d8b", "lw": 1.6, "zorder": 1}


def docstring(name: str) -> str:
    source = (ROOT / f"model_{name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source))


def parent_of(name: str) -> str | None:
    found = re.search(r"^Differs from model_(\w+)\.py in:", docstring(name), flags=re.M)
    return found[1] if found else None


def diagram_of(name: str) -> dict:
    """Returns all rows of a diagram: those of its ancestors, each replaced where a descendant names it."""
    parent = parent_of(name)
    if parent is None:
        return DIAGRAMS[name]
    return diagram_of(parent) | DIAGRAMS[name]


# ---- shapes ----------------------------------------------------------------------------------------------------------
def draw_box(axis, left, right, middle, text, changed, height=BOX_HEIGHT, size=11.5):
    """Draws a rounded box with a text, which has to fit in it."""
    style = CHANGED if changed else SAME
    corner = (left, middle - height / 2)
    axis.add_patch(FancyBboxPatch(corner, right - left, height, boxstyle="round,pad=0,rounding_size=6", **style))
    drawn = axis.text((left + right) / 2, middle, text, ha="center", va="center", fontsize=size, linespacing=1.15)
    extent = drawn.get_window_extent().transformed(axis.transData.inverted())
    if extent.width > right - left - 6 or extent.height > height:
        raise ValueError(f"{text!r} is {extent.width:.0f} x {extent.height:.0f} pixels: too large for its box")


def draw_panel(axis, x, y, rows, label):
    """Draws the frame around the rows of a branch, with its name beside it."""
    bottom = y + HEIGHTS[rows[0]] - BOX_HEIGHT / 2 - 7
    top = y + HEIGHTS[rows[-1]] + BOX_HEIGHT / 2 + 7
    frame = {"facecolor": "white", "edgecolor": "#b0bec5", "linestyle": (0, (4, 2)), "zorder": 0}
    shape = "round,pad=0,rounding_size=8"
    axis.add_patch(FancyBboxPatch((x + LEFT - 7, bottom), RIGHT - LEFT + 14, top - bottom, boxstyle=shape, **frame))
    axis.text(x + RIGHT + 20, (bottom + top) / 2, label, rotation=90, ha="center", va="center", color="#546e7a")


def draw_row(axis, x, y, texts, parent_texts, right=RIGHT):
    """Draws the boxes of a row side by side, wider where their texts are longer."""
    gap = 6
    free = right - LEFT - gap * (len(texts) - 1)
    lengths = [max(len(text), 8) for text in texts]
    left = x + LEFT
    for text, length in zip(texts, lengths):
        width = free * length / sum(lengths)
        draw_box(axis, left, left + width, y, text, text not in parent_texts)
        left += width + gap


def draw_experts(axis, x, y, changed):
    """Draws eight small MLPs, two of which the router has chosen."""
    count = 8
    pitch = (RIGHT - LEFT + 6) / count
    for i in range(count):
        left = x + LEFT + i * pitch
        draw_box(axis, left, left + pitch - 6, y, "MLP", changed, size=8)
        if i not in (2, 5):
            cover = {"facecolor": "white", "edgecolor": "none", "alpha": 0.65, "zorder": 4}
            axis.add_patch(FancyBboxPatch((left + 1, y - 15), pitch - 8, 30, boxstyle="square,pad=0", **cover))


def draw_stream(axis, x, y):
    """Draws the residual stream: straight up, and past each branch to the sum behind it."""
    axis.plot([x + MIDDLE] * 2, [y + HEIGHTS["embed"], y + HEIGHTS["head"] + 34], **LINE)
    axis.annotate("", (x + MIDDLE, y + HEIGHTS["head"] + 40), (x + MIDDLE, y + HEIGHTS["head"] + 14),
                  arrowprops={"arrowstyle": "-|>", "color": LINE["color"], "lw": 1.6})  # fmt: skip
    for start, end in zip(("attention norm", "mlp norm"), SUMS):
        below = y + HEIGHTS[start] - 26
        axis.plot([x + MIDDLE, x + RESIDUAL, x + RESIDUAL, x + MIDDLE], [below, below, y + end, y + end], **LINE)
        axis.add_patch(Circle((x + MIDDLE, y + end), 10, facecolor="white", edgecolor=LINE["color"], lw=1.6, zorder=3))
        axis.text(x + MIDDLE, y + end - 0.5, "+", ha="center", va="center", fontsize=12, zorder=4)


# ---- diagrams --------------------------------------------------------------------------------------------------------
def draw_diagram(axis, x, y, name):
    """Draws one model file in the cell whose lower left corner is (x, y)."""
    diagram = diagram_of(name)
    parent = parent_of(name)
    before = diagram_of(parent) if parent else diagram

    draw_stream(axis, x, y)
    draw_panel(axis, x, y, ATTENTION, "mixes tokens")
    draw_panel(axis, x, y, MLP, "each token alone")
    for row, height in HEIGHTS.items():
        texts = diagram[row]
        if texts == [EXPERTS]:
            draw_experts(axis, x, y + height, texts != before[row])
        elif row in ATTENTION and diagram["other layers"]:
            draw_row(axis, x, y + height, texts, before[row], right=RIGHT - 106)
        else:
            draw_row(axis, x, y + height, texts, before[row])

    for text in diagram["other layers"]:
        middle = y + (HEIGHTS["project"] + HEIGHTS["gate"]) / 2
        tall = HEIGHTS["gate"] - HEIGHTS["project"] + BOX_HEIGHT
        draw_box(axis, x + RIGHT - 100, x + RIGHT, middle, text, False, height=tall)

    axis.text(x + MIDDLE, y + TITLE + 42, f"model_{name}.py", ha="center", fontsize=16, weight="bold")
    axis.text(x + MIDDLE, y + TITLE + 20, diagram["idea"], ha="center", fontsize=11.5, color="#37474f")
    if parent:
        axis.text(x + MIDDLE, y + TITLE, f"parent: {parent}", ha="center", fontsize=10.5, color="#78909c")
    cache = diagram["cache"][0]
    color = "#d96c00" if diagram["cache"] != before["cache"] else "#546e7a"
    axis.text(x + MIDDLE, y + CACHE, f"cache: {cache}", ha="center", fontsize=11.5, color=color)


def draw_legend(axis, x, y):
    """Explains the colours and letters, in the cell that is left over."""
    top = y + HEIGHTS["head"]
    draw_box(axis, x + LEFT, x + RIGHT, top, "as in its parent", False)
    draw_box(axis, x + LEFT, x + RIGHT, top - 39, "changed against its parent", True)
    text = """
Data flows upwards. What lies between
embedding and last norm is repeated
n_layer times; + adds the output of a
branch to the residual stream.

cache: what a token leaves for later ones

q, k, v  queries, keys, values
H   query heads
G   key/value heads, at most H
E   experts in a layer
K   experts of a token, keys of a query
W   window, its own token included
c   latent: R numbers for all heads
M   state: a matrix for each head
φ   elu + 1, SiLU or nothing
"""
    axis.text(x + LEFT, top - 70, text.strip(), va="top", fontsize=11.5, linespacing=1.6, color="#37474f")


def draw(path: Path) -> None:
    """Draws all diagrams in a grid, and the legend in the cell behind the last one."""
    cells = len(DIAGRAMS) + 1
    rows = -(-cells // COLUMNS)
    width = COLUMNS * CELL_WIDTH
    height = rows * CELL_HEIGHT + 10
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    for i in range(cells):
        x = i % COLUMNS * CELL_WIDTH
        y = height - (i // COLUMNS + 1) * CELL_HEIGHT
        if i < len(DIAGRAMS):
            draw_diagram(axis, x, y, list(DIAGRAMS)[i])
        else:
            draw_legend(axis, x, y)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs" / "gallery.png")
