"""`python bench.py decode`: tokens per second of prefill and of one step after another, against transformers."""

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

import flops
from benchmarks.timing import (
    TokenTimes,
    bandwidth,
    build,
    count_parameters,
    describe,
    device_and_dtype,
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
from generate import CompiledStep, stream

RESULT = "decoding_speed"
SIZES = {  # the first spends its time on calls, the second on reading its weights
    "2.6M": dict(n_layer=4, n_head=4, n_kv_head=4, head_dim=48, n_embd=192, n_inner=512, vocab_size=4096),
    "82M": dict(n_layer=12, n_head=12, n_kv_head=4, head_dim=64, n_embd=768, n_inner=2048, vocab_size=8192),
}


def measure(args: Namespace) -> Iterator[dict]:
    """Yields the result so far after each size, so that a stop loses no finished one."""
    device, dtype = device_and_dtype(args.device, args.dtype)
    compiled = args.compile or device.startswith("cuda")
    variant = "baseline"
    sizes = SIZES
    if args.config:
        knobs, fields = read_config(args.config)
        variant = knobs["model"]
        sizes = {label_of(args.config): fields}

    words = ["decode", *args.config]
    words += [f"--batch {args.batch}", f"--prompt {args.prompt}", f"--new {args.new}", f"--dtype {dtype}"]
    if compiled:
        words.append("--compile")
    result = new_result(words, args.rounds, device)
    result |= {"batch": args.batch, "prompt": args.prompt, "new": args.new, "dtype": dtype}
    limit, source = bandwidth(device)
    result |= {"limit": limit, "limit_from": source, "sizes": {}}

    for size, fields in sizes.items():
        room = max(fields.get("block_size", 0), args.prompt + args.new)
        model = build(variant, fields | {"block_size": room}, device)
        model.to(getattr(torch, dtype)).eval()
        idx, _ = random_batch(args.batch, args.prompt, model.config.vocab_size, device)
        half_way = args.prompt + args.new // 2
        result["sizes"][size] = {
            "model": variant,
            "parameters": count_parameters(model),
            "bytes_per_step": bytes_per_step(variant, model, args.batch, half_way),
            "rows": decoding_rows(model, idx, args.new, args.rounds, compiled, device),
        }
        yield result


# ---- what is measured -----------------------------------------------------------------------------------------------
def bytes_per_step(variant, model, batch, context):
    """Returns what a decoding step must read: the weights once, and of each sequence the cache and the state."""
    width = model.embed.weight.element_size()
    weights = flops.weights_read(variant, model.config, batch) * width
    cache = flops.cache_bytes_per_token(variant, model.config, width) * context
    state = flops.state_bytes(variant, model.config, width)
    return round(weights + batch * (cache + state))


def our_tokens(model, idx, new, step=None):
    """Returns greedy ids (B, new), (seconds to the first token, seconds between tokens). step: as stream takes it."""
    times = TokenTimes()
    tokens = []
    times.put(idx)
    for token in stream(model, idx, new, temperature=0, step=step):
        times.put(token)
        tokens.append(token)
    return torch.stack(tokens, dim=1).tolist(), times.seconds()


def their_tokens(theirs, idx, new):
    """Returns the same from transformers' generate."""
    times = TokenTimes()
    mask = torch.ones_like(idx)
    ids = theirs.generate(idx, attention_mask=mask, max_new_tokens=new, do_sample=False, streamer=times)
    return ids[:, idx.size(1) :].tolist(), times.seconds()


@dataclass
class Entrant:
    """A row of the table: generate() returns ids (B, new) and their times, as our_tokens does."""

    name: str
    model: torch.nn.Module
    generate: Callable


def entrants_of(model, idx, new, compiled):
    """Returns the model, itself with a compiled step where asked for, and transformers' model of the same weights."""
    entrants = [Entrant("eager", model, partial(our_tokens, model, idx, new))]
    if compiled:
        step = CompiledStep(model)
        entrants.append(Entrant("compiled", model, partial(our_tokens, model, idx, new, step=step)))
    theirs = as_transformers(model, model.embed.weight.dtype)
    if theirs is not None:
        theirs.eval()
        theirs.generation_config.eos_token_id = None  # nothing ends before `new` tokens
        theirs.generation_config.pad_token_id = 0
        entrants.append(Entrant("transformers' generate", theirs, partial(their_tokens, theirs, idx, new)))
    return entrants


def equal_tokens(ids, others):
    """Returns how many tokens all sequences have in common with the others before the first that differs."""
    for i, (token, other) in enumerate(zip(zip(*ids), zip(*others))):  # the i-th of every sequence
        if token != other:
            return i
    return len(ids[0])


def decoding_rows(model, idx, new, rounds, compiled, device="cpu"):
    """Returns a row for each of those that generate, in turn; `same` counts the first tokens that are as eager's."""
    entrants = entrants_of(model, idx, new, compiled)
    rows = []
    all_ids = []
    for entrant in entrants:
        ids, _ = entrant.generate()  # compiles
        all_ids.append(ids)
        same = equal_tokens(all_ids[0], ids)
        rows.append({"who": entrant.name, "same": same, "prefill": [], "step": []})
    for _ in range(rounds):
        for row, entrant in zip(rows, entrants):
            _, (prefill, step) = entrant.generate()
            row["prefill"].append(round(prefill, 6))
            row["step"].append(round(step, 7))
    for row, entrant in zip(rows, entrants):
        row["peak_bytes"] = resident_bytes(entrant.model) + peak_memory(entrant.generate, device)
    return rows


# ---- the table ------------------------------------------------------------------------------------------------------
HEAD = ["size", "parameters", "who", "prefill tokens/s", "decoding tokens/s", "GB/s", "of the limit", "peak MB"]


def markdown(result: dict) -> str:
    """Returns the table of a result."""
    limit = f"{result['limit'] / 1e9:,.1f} GB/s ({result['limit_from']})"
    new = result["new"]
    lines = [
        "# Decoding tokens per second\n",
        describe(result),
        f"{result['batch']} sequence(s), prompts of {result['prompt']} tokens and {new} new ones, greedy, in "
        f"{result['dtype']}; {result['rounds']} rounds in which all take turns; medians, and of decoding the range. "
        f"GB/s: the bytes of weights and cache that a step must read; the limit is {limit}. "
        "Memory is that of weights, cache and activations together.\n",
        *table_head([*HEAD, "x transformers"]),
    ]
    notes = []
    for size, measured in result["sizes"].items():
        for row in measured["rows"]:
            cells = [f"{size} ({measured['model']})", f"{measured['parameters']:,}", row["who"]]
            cells += speed_cells(row, measured["bytes_per_step"], result)
            cells.append(times_as_fast(seconds_of_transformers(measured["rows"]), row["step"]))
            lines.append(table_row(cells))
            if row["same"] < new:
                notes.append(f"{size}, {row['who']}: only the first {row['same']} of {new} ids are those of eager.")
    if not notes:
        notes.append(f"All emit the same {new} ids.")
    return "\n".join([*lines, "", *notes]) + "\n"


def speed_cells(row, bytes_per_step, result):
    batch = result["batch"]
    prefill = batch * result["prompt"] / statistics.median(row["prefill"])
    decoding = [batch / s for s in row["step"]]
    bytes_per_second = bytes_per_step / statistics.median(row["step"])
    return [
        f"{prefill:,.0f}",
        median_and_range(decoding, "{:,.1f}".format),
        f"{bytes_per_second / 1e9:,.1f}",
        f"{bytes_per_second / result['limit']:.0%}",
        f"{row['peak_bytes'] / 1e6:,.1f}",
    ]


def seconds_of_transformers(rows):
    """Returns the seconds of transformers' steps, or None where they are not among the rows."""
    for row in rows:
        if row["who"].startswith("transformers"):
            return row["step"]
    return None
