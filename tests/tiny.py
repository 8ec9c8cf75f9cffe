"""Every model file at a size for tests, and what the tests over all of them share."""

import importlib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(path.stem.removeprefix("model_") for path in ROOT.glob("model_*.py"))
VOCAB, BLOCK, EOT = 97, 64, 96


def module(name):
    return importlib.import_module(f"model_{name}")


def sizes(name):
    """The sizes of a model's own demo, but for its vocabulary and its longest sequence."""
    return {key: value for key, value in module(name).TINY.items() if key not in ("vocab_size", "block_size")}


TINY = {name: sizes(name) for name in MODELS}


def build(name, seed=0, bold=True, **options):
    """A tiny model in eval mode. bold: weights so large that logits differ clearly between inputs."""
    torch.manual_seed(seed)
    fields = TINY[name] | dict(vocab_size=VOCAB, block_size=BLOCK)
    config = module(name).GPTConfig(**fields | options)
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
