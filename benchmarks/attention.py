"""`python bench.py attention`: what a token costs as texts get longer, and what choosing keys saves."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch

import flops
import muon
from benchmarks.timing import (
    build,
    describe,
    device_and_dtype,
    in_turn,
    make_step,
    new_result,
    random_batch,
    table_head,
    table_row,
    times_as_fast,
)
from benchmarks.variants import milliseconds, prefilled_cache, rounded

RESULT = "attention"
SHARED = dict(n_layer=4, n_head=6, n_embd=384, n_inner=1024, vocab_size=1024)
GROUPED = SHARED | dict(n_kv_head=2, head_dim=64)
SIZES = {
    "longer": dict(
        contexts=(512, 2048, 8192, 16384),
        lengths=(256, 16 * 256),
        models={
            "baseline": ("baseline", GROUPED),
            "sliding": ("sliding", GROUPED | dict(layer_pattern="l", window=256)),
            "linear, decay none": ("linear", GROUPED | dict(layer_pattern="k", decay="none")),
            "linear, decay head": ("linear", GROUPED | dict(layer_pattern="k", decay="head")),
            "linear, decay channel": ("linear", GROUPED | dict(layer_pattern="k", decay="channel")),
            "linformer": ("linformer", GROUPED | dict(window=256, n_slot=4)),
        },
    ),
    "chosen": dict(
        context=8192,
        models={
            "sparse": ("sparse", "top_k_block", (2, 4, 8, 16, 32, 128), GROUPED | dict(n_layer=1, key_block=64)),
            "indexer": ("indexer", "index_topk", (256, 512, 1024, 2048, 8192), SHARED | dict(n_layer=1)),
        },
    ),
}


def measure(args: Namespace) -> Iterator[dict]:
    """Yields one result: decoding and training over longer texts, and attention to chosen keys."""
    device, dtype = device_and_dtype(args.device)
    result = new_result(["attention"], args.rounds, device)
    result["dtype"] = dtype
    print("decoding...", file=sys.stderr)
    longer = SIZES["longer"]
    result["decoding"] = decoding_rows(args.rounds, device, dtype, longer["contexts"], longer["models"])
    print("training...", file=sys.stderr)
    result["training"] = training_rows(args.rounds, device, dtype, longer["lengths"], longer["models"])
    print("chosen keys...", file=sys.stderr)
    result["chosen"] = chosen_rows(args.rounds, device, dtype, **SIZES["chosen"])
    yield result


def markdown(result: dict) -> str:
    """Returns the tables of a result."""
    lines = [
        "# Longer texts\n",
        describe(result),
        f"{result['rounds']} rounds in which all of a table take turns; medians and ranges, ratios round by round.\n",
    ]
    lines += decoding_markdown(result["decoding"], result["dtype"])
    lines += training_markdown(result["training"])
    lines += chosen_markdown(result["chosen"], SIZES["chosen"]["context"], result["dtype"])
    return "\n".join(lines) + "\n"


@torch.no_grad()
def decoding_rows(rounds, device, dtype, contexts, models):
    """Measures one token after so many, and the bytes of the cache that holds them.

    A cache cannot always go back, so each call of a model meets one token more, and all of them `context` on average.
    """
    calls = 2 + 10 * rounds  # two warm up
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    rows = []
    functions = []
    for label, (name, fields) in models.items():
        model = build(name, fields | {"block_size": max(contexts) + calls}, device)
        model.to(getattr(torch, dtype)).eval()
        for context in contexts:
            cache = prefilled_cache(model, max(context - calls // 2, 1), calls)
            functions.append(partial(model, token, cache=cache))
            held = flops.cache_bytes(name, model.config, context, model.embed.weight.element_size())
            rows.append({"model": label, "context": context, "cache_bytes": held})
    for row, seconds in zip(rows, rounded(in_turn(functions, (), rounds, 10, device))):
        row["seconds"] = seconds
    return rows


def training_rows(rounds, device, dtype, lengths, models):
    """Measures a training step of one window, by AdamW."""
    rows = []
    steps = []
    for label, (name, fields) in models.items():
        model = build(name, fields | {"block_size": max(lengths)}, device)
        step = make_step(model, muon.make_optimizer(model, "adamw"), dtype)
        for length in lengths:
            x, y = random_batch(1, length, fields["vocab_size"], device)
            steps.append(partial(step, x, y))
            rows.append({"model": label, "length": length})
    for row, seconds in zip(rows, rounded(in_turn(steps, (), rounds, device=device))):
        row["seconds"] = seconds
    return rows


@torch.no_grad()
def chosen_rows(rounds, device, dtype, context, models):
    """Measures reading `context` tokens, and one more token, with more and more keys to attend to; the last is all."""
    calls = 2 + 10 * rounds
    room = -(-calls // 64) * 64  # whole blocks of keys
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    rows = []
    readings = []
    functions = []
    for name, knob, values, fields in models.values():
        for value in values:
            model = build(name, fields | {"block_size": context + room, knob: value}, device)
            model.to(getattr(torch, dtype)).eval()
            idx, _ = random_batch(1, context, fields["vocab_size"], device)
            readings.append(partial(read, model, idx))
            functions.append(partial(model, token, cache=prefilled_cache(model, context - calls // 2, calls)))
            seen = model.blocks[0].attn.keys_seen(context) / ((context + 1) / 2)
            rows.append({"model": name, "knob": knob, "value": value, "seen": seen})
    for row, seconds in zip(rows, rounded(in_turn(readings, (), rounds, device=device))):
        row["reading"] = seconds
    for row, seconds in zip(rows, rounded(in_turn(functions, (), rounds, 10, device))):
        row["token"] = seconds
    return rows


def read(model, idx):
    model(idx, cache=model.new_cache(1, idx.size(1)), last_only=True)


def chosen_markdown(rows, context, dtype):
    """Returns the table of chosen keys. Rows of a model stand together, all keys last."""
    lines = [
        "\n## Chosen keys\n",
        f"A model of one layer reads {context:,} tokens, and then one more, in {dtype}. keys: of those that attention "
        "to all would see. x time: over that of the same model with all keys.\n",
        *table_head(["model", "", "keys", "ms reading", "x time", "ms a token", "x time"]),
    ]
    whole = {row["model"]: row for row in rows}  # the last one of each
    for row in rows:
        last = whole[row["model"]]
        cells = [
            row["model"],
            f"{row['knob']}={row['value']}",
            f"{row['seen']:.0%}",
            milliseconds(row["reading"]),
            times_as_fast(row["reading"], last["reading"]),
            milliseconds(row["token"]),
            times_as_fast(row["token"], last["token"]),
        ]
        lines.append(table_row(cells))
    return lines


def decoding_markdown(rows, dtype):
    first = rows[0]
    lines = [
        "## One more token\n",
        f"After so many tokens of random contents, in {dtype}: bytes of the cache that holds them, and the time of one "
        f"token. x time: over that of the same model after {first['context']:,} tokens.\n",
        *table_head(["model", "tokens", "KB of cache", "ms a token", "x time"]),
    ]
    for row in rows:
        if row["model"] != first["model"]:
            first = row
        cells = [
            row["model"],
            f"{row['context']:,}",
            f"{row['cache_bytes'] / 1000:,.0f}",
            milliseconds(row["seconds"]),
            times_as_fast(row["seconds"], first["seconds"]),
        ]
        lines.append(table_row(cells))
    return lines


def training_markdown(rows):
    """Returns the table of training steps. Rows of a model stand together, the shortest window first."""
    first = rows[0]
    lines = [
        "\n## Training\n",
        "A step of one window, with AdamW; x tokens and x time: over those of the same model's shorter window.\n",
        *table_head(["model", "tokens", "ms step", "x tokens", "x time"]),
    ]
    for row in rows:
        if row["model"] != first["model"]:
            first = row
        cells = [
            row["model"],
            f"{row['length']:,}",
            milliseconds(row["seconds"]),
            f"{row['length'] / first['length']:g}",
            times_as_fast(row["seconds"], first["seconds"]),
        ]
        lines.append(table_row(cells))
    return lines
