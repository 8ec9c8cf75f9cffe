"""Draws docs/sees.png: what a token knows of each earlier one after a single layer, a panel for each kind of layer.

    python docs/sees.py

No mask is drawn here: models of one layer with random weights are asked. Row t, column s of a panel is the norm of
d logits_t / d embedding_s over the largest of the row's earlier tokens. White is exactly 0, what a query cannot see.
"""

import importlib
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, without a window

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where the model files are

T = 64
PANELS = [  # (title, model, what it has besides its TINY sizes)
    ("baseline: every earlier token", "baseline", {}),
    ("sliding: 12 tokens and the first 2", "sliding", dict(layer_pattern="l", window=12, n_global_token=2)),
    ("sparse: blocks by rule", "sparse", dict(key_block=4, block_stride=4, n_global_block=1, top_k_block=1)),
    (
        "sparse: 4 blocks by their mean",
        "sparse",
        dict(key_block=4, block_stride=0, n_global_block=0, top_k_block=4, n_head=1, n_kv_head=1),
    ),
    ("indexer: the 12 best tokens", "indexer", dict(index_topk=12)),
    ("linformer: a window, and slots of others", "linformer", dict(window=8, n_slot=2)),
    ("linear, decay none", "linear", dict(layer_pattern="k", decay="none")),
    ("linear, decay head", "linear", dict(layer_pattern="k", decay="head")),
    ("linear, decay channel", "linear", dict(layer_pattern="k", decay="channel")),
    ("hybrid: a state that is overwritten", "hybrid", dict(layer_pattern="d")),
]
COLUMNS = 5
FAINTEST = 1e-3  # what is less than this share of the largest is as pale


def influence(name: str, options: dict) -> torch.Tensor:
    """Returns norms (T, T): how much the logits at t, along a random direction, turn on the embedding of token s."""
    module = importlib.import_module(f"model_{name}")
    torch.manual_seed(0)
    sizes = dict(n_layer=1, block_size=T, vocab_size=T, tie_embeddings=False)
    model = module.GPT(module.GPTConfig(**module.TINY | sizes | options)).double().eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)  # with the small weights of a new model every token weighs the same
    logits = model(torch.arange(T)[None])[
        0
    ]  # (T, T): each token occurs once, so that row s of embed is that of place s
    along = logits @ torch.randn(T).double()  # (T,)
    rows = [torch.autograd.grad(x, model.embed.weight, retain_graph=True)[0].norm(dim=-1) for x in along]
    return torch.stack(rows)


def draw(path: Path) -> None:
    rows = -(-len(PANELS) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 4.3 * rows), dpi=100, layout="constrained")
    colours = plt.get_cmap("YlOrBr").with_extremes(bad="white")
    for axis in axes.flat[len(PANELS) :]:
        axis.axis("off")
    for axis, (title, name, options) in zip(axes.flat, PANELS):
        norms = influence(name, options)
        largest = norms.tril(-1).amax(dim=1, keepdim=True)
        share = norms / torch.where(largest > 0, largest, norms.diagonal()[:, None])
        share = share.clamp(FAINTEST, 1).masked_fill(norms == 0, torch.nan)
        axis.imshow(share, cmap=colours, norm=LogNorm(FAINTEST / 5, 1), interpolation="nearest")
        axis.set_title(title, fontsize=13)
        axis.set(xlabel="earlier token s", ylabel="token t", xticks=range(0, T, 16), yticks=range(0, T, 16))
    figure.savefig(path, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs" / "sees.png")
