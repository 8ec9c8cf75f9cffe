"""Text to token shards, and token shards to batches: `from data import prepare, Shards, Loader`.

prepare is the module data/prepare.py, and prepare.prepare does what its command does.
"""

import importlib

HOME = {"Shards": "data.shards", "Loader": "data.loader", "load_tokenizer": "data.tokenizers"}


def __getattr__(name: str):
    """Imports what is asked for when it is asked for: prepare.py and its workers need neither torch nor the loader."""
    if name not in HOME:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(importlib.import_module(HOME[name]), name)
