"""What `python bench.py train` and `decode` measure other than their own sizes: a config, and transformers' model."""

import dataclasses
import importlib
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

import configurator
import hf

ROOT = Path(__file__).resolve().parent.parent


def label_of(argv: list[str]) -> str:
    """Returns what results of these config files and options are called: as the files, or else as the model.

    It is empty without any, and then results are those of the sizes that a benchmark has of its own.
    """
    if not argv:
        return ""
    names = [Path(word).stem for word in argv if word.endswith(".py")]
    if names:
        return "_".join(names)
    return configurator.resolve(ROOT / "train.py", argv)["model"]


def read_config(argv: list[str]) -> tuple[dict, dict]:
    """Returns the knobs of train.py and the fields of GPTConfig that config files and --key=value options give."""
    knobs = configurator.resolve(ROOT / "train.py", argv)
    config_class = importlib.import_module(f"model_{knobs['model']}").GPTConfig
    fields = {field.name: knobs[field.name] for field in dataclasses.fields(config_class)}
    if not fields["vocab_size"]:  # train.py would take that of the data
        fields["vocab_size"] = config_class.vocab_size
    try:
        config_class(**fields)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return knobs, fields


def as_transformers(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module | None:
    """Returns transformers' model with the same weights, on the same device; None where there is no such model."""
    if not find_spec("transformers"):
        return None
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        try:
            hf.save(model, folder)
        except ValueError as error:
            print(f"without transformers: {error}", file=sys.stderr)
            return None
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return theirs.to(model.embed.weight.device)
