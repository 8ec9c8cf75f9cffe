"""`python bench.py train`: training tokens per second, against gpt2 and transformers."""

import copy
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import flops
import kernels_delta
import muon
from benchmarks.timing import (
    build,
    count_parameters,
    describe,
    device_and_dtype,
    in_turn,
    make_step,
    median_and_range,
    new_result,
    peak_memory,
    random_batch,
    resident_bytes,
    table_head,
    table_row,
    times_as_fast,
)
from benchmarks.workload import as_transformers, label_of, read_config

RESULT = "training_speed"
BATCHES = {  # windows, and tokens in one
    "n_embd 128": (12, 64),
    "n_embd 384": (4, 256),
}
MODELS = {
    "n_embd 128": {
        "gpt2": dict(n_layer=4, n_head=4, n_embd=128, bias=False),
        "baseline": dict(n_layer=4, n_head=4, n_kv_head=4, head_dim=32, n_embd=128, n_inner=344),
    },
    "n_embd 384": {
        "gpt2": dict(n_layer=6, n_head=6, n_embd=384, bias=False),
        "baseline": dict(n_layer=6, n_head=6, n_kv_head=6, head_dim=64, n_embd=384, n_inner=1024),
    },
}
SETTINGS = {  # dtype, and whether it is compiled
    "cpu": (("float32", False), ("float32", True), ("bfloat16", True)),
    "cuda": (("bfloat16", False), ("bfloat16", True)),
}


def measure(args: Namespace) -> Iterator[dict]:
    """Yields the result so far after each size, so that a stop loses no finished one."""
    device, _ = device_and_dtype(args.device)
    batches = BATCHES
    models = MODELS
    if args.config:
        knobs, fields = read_config(args.config)
        label = label_of(args.config)
        batches = {label: (knobs["micro_batch"], knobs["block_size"])}
        models = {label: {knobs["model"]: fields}}
    result = new_result(["train", *args.config, f"--tokens {args.tokens}"], args.rounds, device)
    result["sizes"] = {}
    for size, batch in batches.items():
        given = {"block_size": batch[1], "vocab_size": 66}
        of_size = {variant: given | fields for variant, fields in models[size].items()}
        rows = training_rows(of_size, batch, args.rounds, args.tokens, device)
        result["sizes"][size] = {"batch": batch, "rows": rows}
        yield result


# ---- what is measured -----------------------------------------------------------------------------------------------
@dataclass
class Entrant:
    """A model that takes part, with a row of the table for each of its settings."""

    name: str
    model: torch.nn.Module
    loss: Callable  # of tokens and targets
    settings: tuple
    flops_per_token: float


def entrants_of(models, x, y, device):
    """Returns those that take part: models {variant: fields}, and two others with the weights of the last one.

    They are the same model with our kernels, on a GPU, and transformers' where it has such a model.
    """
    settings = SETTINGS[torch.device(device).type]
    entrants = []
    for variant, fields in models.items():
        model = build(variant, fields, device)
        per_token = flops.training_flops_per_token(variant, model.config, x.size(1))
        entrants.append(Entrant(variant, model, model, settings[:1], per_token))
    last = entrants[-1]
    last.settings = settings

    if device.startswith("cuda"):
        fused = copy.deepcopy(last.model)
        kernels_delta.install(fused)
        entrants.append(Entrant(f"{last.name} with kernels", fused, fused, settings, last.flops_per_token))

    theirs = as_transformers(last.model)
    if theirs is not None:
        loss = loss_of_transformers(theirs)
        check_equal_loss(last.model, loss, x, y)
        entrants.append(Entrant("transformers", theirs.train(), loss, settings[:2], last.flops_per_token))
    return entrants


def loss_of_transformers(theirs):
    def loss(x, y):
        logits = theirs(x, use_cache=False).logits  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1)

    return loss


@torch.no_grad()
def check_equal_loss(model, their_loss, x, y):
    """Raises AssertionError where transformers' loss is not ours: then another model would be measured."""
    model.eval()
    torch.testing.assert_close(their_loss(x, y), model(x, y), rtol=1e-3, atol=1e-3)
    model.train()


def training_rows(models, batch, rounds, tokens, device="cpu"):
    """Returns a row for each model and setting; their steps of AdamW take turns.

    models: {variant: fields}; batch: windows, and tokens in one; tokens: at least so many in each turn.
    """
    windows, length = batch
    vocab_size = min(fields["vocab_size"] for fields in models.values())
    x, y = random_batch(windows, length, vocab_size, device)
    rows = []
    steps = []
    owners = []  # of the memory that is in use between a row's steps
    for entrant in entrants_of(models, x, y, device):
        optimizer = muon.make_optimizer(entrant.model, "adamw")
        for dtype, compiled in entrant.settings:
            loss = torch.compile(entrant.loss) if compiled else entrant.loss
            steps.append(make_step(entrant.model, optimizer, dtype, loss))
            owners.append((entrant.model, optimizer))
            rows.append({
                "model": entrant.name,
                "dtype": dtype,
                "compile": compiled,
                "flops_per_token": entrant.flops_per_token,
                "parameters": count_parameters(entrant.model),
                "peak_flops": flops.peak_flops(flops.device_name(device), dtype),
            })  # fmt: skip

    times = max(1, tokens // (windows * length))
    took = in_turn(steps, (x, y), rounds, times, device)
    for row, seconds, step, owner in zip(rows, took, steps, owners):
        row["seconds"] = [round(s, 5) for s in seconds]
        row["peak_bytes"] = resident_bytes(*owner) + peak_memory(partial(step, x, y), device)
    return rows


# ---- the table ------------------------------------------------------------------------------------------------------
HEAD = ["size", "model", "parameters", "dtype", "compiled", "tokens/s", "GFLOP/s", "MFU", "peak MB"]


def markdown(result: dict) -> str:
    """Returns the table of a result."""
    measured = {row["model"] for size in result["sizes"].values() for row in size["rows"]}
    others = [name for name in ("gpt2", "transformers") if name in measured]
    lines = [
        "# Training tokens per second\n",
        describe(result),
        f"One step of AdamW with clipping; {result['rounds']} rounds in which all settings take turns; medians, and of "
        "tokens/s the range. x gpt2, x transformers: how many times as fast as the first row of that name. FLOPs by "
        "the formulas of flops.py; memory is that of weights, gradients, optimizer and activations together.\n",
        *table_head(HEAD + [f"x {name}" for name in others]),
    ]
    for size, found in result["sizes"].items():
        windows, length = found["batch"]
        label = f"{size}, {windows} x {length}"
        for row in found["rows"]:
            cells = [label, *cells_of(row, windows * length)]
            for name in others:
                cells.append(times_as_fast(first_seconds(found["rows"], name), row["seconds"]))
            lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def cells_of(row, tokens):
    """Returns the cells of a row whose step is of so many tokens."""
    speeds = [tokens / s for s in row["seconds"]]
    flops_per_second = statistics.median(speeds) * row["flops_per_token"]
    utilization = "n/a"
    if row["peak_flops"]:
        utilization = f"{flops_per_second / row['peak_flops']:.1%}"
    return [
        row["model"],
        f"{row['parameters']:,}",
        row["dtype"],
        "yes" if row["compile"] else "no",
        median_and_range(speeds, "{:,.0f}".format),
        f"{flops_per_second / 1e9:,.1f}",
        utilization,
        f"{row['peak_bytes'] / 1e6:,.1f}",
    ]


def first_seconds(rows, name):
    """Returns the seconds of the first row of this model, or None."""
    for row in rows:
        if row["model"] == name:
            return row["seconds"]
    return None
