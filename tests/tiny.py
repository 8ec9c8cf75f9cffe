"""Every model file at a size for tests, and what the tests over all of them share."""

import importlib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "baseline": dict(n_layer=2, n_head=4, n_kv_head=2, head_dim=8, n_embd=32, n_inner=48),
    "gpt2": dict(n_layer=2, n_head=4, n_embd=32),
    "moe": dict(n_layer=2, n_head=4, n_kv_head=2, head_dim=8, n_embd=32, n_inner=48, n_dense_layer=1, n_expert=6,
                n_expert_per_token=2, n_expert_inner=16),
    "mla": dict(n_layer=2, n_head=4, kv_rank=16, q_rank=24, nope_dim=8, rope_dim=8, v_dim=12, n_embd=32, n_inner=48),
    "hybrid": dict(n_layer=2, n_head=4, n_kv_head=2, head_dim=8, n_embd=32, n_inner=48, layer_pattern="da",
                   n_key_head=2, n_value_head=4, key_dim=8, value_dim=6, rotary_fraction=0.5),
}  # fmt: skip
MODELS = sorted(path.stem.removeprefix("model_") for path in ROOT.glob("model_*.py"))
VOCAB, BLOCK, EOT = 97, 64, 96


def module(name):
    return importlib.import_module(f"model_{name}")


def build(name, seed=0, bold=True, **options):
    """A tiny model in eval mode. bold: weights so large that logits differ clearly between inputs."""
    torch.manual_seed(seed)
    config = module(name).GPTConfig(**dict(vocab_size=VOCAB, block_size=BLOCK, **TINY[name]) | options)
    model = module(name).GPT(config).eval()
    if bold:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model


def cache_tensors(cache):
    """What a cache holds of the tokens: all its float tensors, which stand in lists, a layer each."""
    assert not [x for x in vars(cache).values() if torch.is_tensor(x) and x.is_floating_point()]
    return [x for held in vars(cache).values() if isinstance(held, list) for x in held]


def tokens(*shape, seed=1):
    """Random ids below EOT, so that documents begin only where a test puts EOT."""
    return torch.randint(EOT, shape, generator=torch.Generator().manual_seed(seed))
