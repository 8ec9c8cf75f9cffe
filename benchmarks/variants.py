"""`python bench.py variants`: what a mixture of experts, latent attention and delta layers cost and what they save."""

import copy
import importlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch

import flops
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
    random_batch,
    table_head,
    table_row,
    times_as_fast,
)

RESULT = "variants"
SIZES = {
    "moe": dict(
        batch=(8, 512),  # 4,096 tokens a step
        experts=(8, 16, 32, 64),
        versus=32,  # of so many experts the speed is compared with the dense model's
        sizes=dict(n_layer=2, n_head=6, n_kv_head=2, head_dim=64, n_embd=384, vocab_size=1024),
        per_token=4,
        width=256,
    ),
    "mla": dict(context=8192, sizes=dict(n_head=12, head_dim=64, n_embd=768, kv_rank=128, rope_dim=32)),
    "hybrid": dict(
        contexts=(512, 2048, 8192, 16384),
        lengths=(256, 16 * 256),
        sizes=dict(n_layer=4, n_head=6, n_kv_head=2, head_dim=64, n_embd=384, n_inner=1024, vocab_size=1024,
                   layer_pattern="ddda", n_key_head=3, n_value_head=6, key_dim=64, value_dim=64),
    ),
}  # fmt: skip


def measure(args: Namespace) -> Iterator[dict]:
    """Yields one result, with a section for each idea."""
    device, dtype = device_and_dtype(args.device)
    result = new_result(["variants"], args.rounds, device)
    result["dtype"] = dtype
    sections = {"moe": moe_rows, "mla": mla_rows, "hybrid": hybrid_rows}
    for name, measure_section in sections.items():
        print(f"{name}...", file=sys.stderr)
        sizes = SIZES[name]
        result[name] = sizes | measure_section(args.rounds, device, dtype, **sizes)
    yield result


def markdown(result: dict) -> str:
    """Returns the tables of a result."""
    lines = [
        "# What an idea costs and what it saves\n",
        describe(result),
        f"{result['rounds']} rounds in which all of a section take turns; medians and ranges, ratios round by round.\n",
    ]
    lines += moe_markdown(result["moe"])
    lines += mla_markdown(result["mla"], result["dtype"])
    lines += decoding_markdown(result["hybrid"], result["dtype"])
    lines += training_markdown(result["hybrid"]["training"])
    return "\n".join(lines) + "\n"


def rounded(took):
    return [[round(seconds, 7) for seconds in measured] for measured in took]


def milliseconds(measured):
    return median_and_range([1000 * seconds for seconds in measured])


@torch.no_grad()
def prefilled_cache(model, context, room=0):
    """Returns a cache of `context` random tokens, with room for so many more."""
    cache = model.new_cache(1, context + room)
    idx, _ = random_batch(1, context, model.config.vocab_size, model.embed.weight.device)
    model(idx, cache=cache, last_only=True)
    return cache


# ---- a mixture of experts -------------------------------------------------------------------------------------------
def moe_rows(rounds, device, dtype, batch, experts, versus, sizes, per_token, width):
    """Measures a dense model and mixtures of so many experts, in all of which a token meets `per_token` times `width`.

    gradient: seconds of forward and backward alone; step: with AdamW.
    """
    windows, length = batch
    dense = sizes | {"n_inner": per_token * width, "block_size": length}
    entrants = [("baseline", dense)]
    for n_expert in experts:
        own = dict(n_expert=n_expert, n_expert_per_token=per_token, n_expert_inner=width, block_size=length)
        entrants.append(("moe", sizes | own))
    rows = []
    steps = []
    for variant, fields in entrants:
        model = build(variant, fields, device)
        rows.append({
            "model": variant,
            "n_expert": fields.get("n_expert", 0),
            "parameters": count_parameters(model),
            "flops_per_token": flops.training_flops_per_token(variant, model.config, length),
        })  # fmt: skip
        steps.append(make_step(model, None, dtype))
        steps.append(make_step(model, muon.make_optimizer(model, "adamw"), dtype))

    x, y = random_batch(windows, length, sizes["vocab_size"], device)
    took = rounded(in_turn(steps, (x, y), rounds, device=device))
    for i, row in enumerate(rows):
        row["gradient"] = took[2 * i]
        row["step"] = took[2 * i + 1]
    return {"rows": rows}


def moe_markdown(section):
    windows, length = section["batch"]
    per_token = section["per_token"]
    width = section["width"]
    dense, *mixtures = section["rows"]
    fewest = mixtures[0]
    against = f"{fewest['n_expert']} experts'"
    head = ["model", "parameters", "MFLOP a token", "ms forward and backward", "ms step", "x dense"]
    head += [f"forward and backward / {against}", f"step / {against}"]
    lines = [
        "## A mixture of experts\n",
        f"Training on {windows} x {length} tokens a step, {per_token} experts of width {width} a token, none dropped; "
        f"the dense model's MLPs are {per_token * width:,} wide, so that a token costs as much but for the router. "
        "x dense: tokens/s of the whole step. The time of AdamW grows with the parameters, whatever a token meets of "
        "them.\n",
        *table_head(head),
        table_row(["dense", *moe_cells(dense, dense), "", ""]),
    ]
    for row in mixtures:
        label = f"{row['n_expert']} experts"
        if row["n_expert"] == section["versus"]:
            label = f"**{label}**"
        gradient_grown = times_as_fast(row["gradient"], fewest["gradient"])
        step_grown = times_as_fast(row["step"], fewest["step"])
        lines.append(table_row([label, *moe_cells(row, dense), gradient_grown, step_grown]))
    return lines


def moe_cells(row, dense):
    return [
        f"{row['parameters']:,}",
        f"{row['flops_per_token'] / 1e6:.1f}",
        milliseconds(row["gradient"]),
        milliseconds(row["step"]),
        times_as_fast(dense["step"], row["step"]),
    ]


# ---- latent attention -----------------------------------------------------------------------------------------------
@torch.no_grad()
def mla_rows(rounds, device, dtype, context, sizes):
    """Measures one attention layer, one token: from latents, from keys and values made of them, and from MHA's."""
    n_head = sizes["n_head"]
    head_dim = sizes["head_dim"]
    shared = dict(n_layer=1, n_head=n_head, n_embd=sizes["n_embd"], block_size=context, vocab_size=64)
    latent = dict(nope_dim=head_dim, v_dim=head_dim, kv_rank=sizes["kv_rank"], rope_dim=sizes["rope_dim"])
    own = dict(n_kv_head=n_head, head_dim=head_dim)
    mla = build("mla", shared | latent, device).to(getattr(torch, dtype))
    mha = build("baseline", shared | own, device).to(getattr(torch, dtype))
    absorbed = mla.blocks[0].attn
    expanded = copy.copy(absorbed)
    expanded.absorbed = expanded.expanded  # what one token would take otherwise

    rows = []
    functions = []
    outputs = []
    for who, model, attention in (
        ("absorbed", mla, absorbed),
        ("expanded", mla, expanded),
        ("MHA", mha, mha.blocks[0].attn),
    ):
        cache = prefilled_cache(model, context)
        x, rope = newest_token(model, context)
        function = partial(attention, x, rope, None, cache)
        functions.append(function)
        outputs.append(function())
        bytes_per_token = cache.bytes_per_token()
        rows.append({"who": who, "cache_bytes_per_token": bytes_per_token, "bytes_read": bytes_per_token * context})
    difference = (outputs[0] - outputs[1]).norm()
    assert difference < 0.05 * outputs[1].norm()  # absorbed and expanded are two forms of one function

    took = rounded(in_turn(functions, (), rounds, 10, device))
    for row, seconds in zip(rows, took):
        row["seconds"] = seconds
    return {"rows": rows}


def newest_token(model, context):
    """Returns an input (1, 1, C) of the last of `context` tokens, and the rope of its position."""
    weight = model.embed.weight
    module = importlib.import_module(type(model).__module__)
    position = torch.tensor([context - 1], device=weight.device)
    torch.manual_seed(0)
    x = torch.randn(1, 1, model.config.n_embd, device=weight.device, dtype=weight.dtype)
    return x, module.rope_cos_sin(position, model.config)


def mla_markdown(section, dtype):
    sizes = section["sizes"]
    rows = section["rows"]
    _, expanded, mha = rows
    head = [
        "attention",
        "cache bytes a token",
        "MB of cache read",
        "cache / MHA's",
        "ms a token",
        "x MHA",
        "x expanded",
    ]
    lines = [
        "\n## Latent attention\n",
        f"One layer of {sizes['n_head']} heads, one token after {section['context'] - 1:,} of random contents, in "
        f"{dtype}. Latents of {sizes['kv_rank']} numbers and keys of {sizes['rope_dim']} for all heads "
        f"together, where MHA has keys and values of {sizes['head_dim']} for each head. x MHA, x expanded: how many "
        "times as fast.\n",
        *table_head(head),
    ]
    for row in rows:
        smaller = mha["bytes_read"] / row["bytes_read"]
        cells = [
            row["who"],
            f"{row['cache_bytes_per_token']:,}",
            f"{row['bytes_read'] / 1e6:.1f}",
            f"1 / {smaller:.1f}",
            milliseconds(row["seconds"]),
            times_as_fast(mha["seconds"], row["seconds"]),
            times_as_fast(expanded["seconds"], row["seconds"]),
        ]
        lines.append(table_row(cells))
    return lines


# ---- delta layers ---------------------------------------------------------------------------------------------------
def hybrid_rows(rounds, device, dtype, contexts, lengths, sizes):
    """Measures one token after contexts of several lengths; a training step of one window, short and long."""
    return {
        "decoding": hybrid_decoding_rows(rounds, device, dtype, contexts, sizes),
        "training": hybrid_training_rows(rounds, device, dtype, lengths, sizes),
    }


@torch.no_grad()
def hybrid_decoding_rows(rounds, device, dtype, contexts, sizes):
    """Measures all delta layers, all attention layers, and the whole model.

    A state cannot go back, so each call of the model meets one token more, and all of them `context` on average.
    """
    calls = 2 + 10 * rounds  # two warm up
    model = build("hybrid", sizes | {"block_size": max(contexts) + calls}, device)
    model.to(getattr(torch, dtype)).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    functions = []
    for context in contexts:
        before = max(context - calls // 2, 1)
        cache = prefilled_cache(model, before, calls)
        x, rope = newest_token(model, context)
        position = torch.tensor([context - 1], device=device)
        functions.append(partial(each_layer, model, "delta", x, position, cache))
        functions.append(partial(each_layer, model, "attn", x, rope, None, cache))
        functions.append(partial(model, token, cache=cache))

    took = rounded(in_turn(functions, (), rounds, 10, device))
    rows = []
    for i, context in enumerate(contexts):
        delta, attention, whole = took[3 * i : 3 * i + 3]
        rows.append({"context": context, "delta": delta, "attention": attention, "model": whole})
    return rows


def each_layer(model, kind, *inputs):
    """Runs all layers of a kind, delta or attn, on the same inputs. The newest token is written again, at its place."""
    for block in model.blocks:
        layer = getattr(block, kind)
        if layer:
            layer(*inputs)


def hybrid_training_rows(rounds, device, dtype, lengths, sizes):
    """Measures delta layers alone, and with attention among them."""
    rows = []
    steps = []
    for pattern in ("d", sizes["layer_pattern"]):
        model = build("hybrid", sizes | {"block_size": max(lengths), "layer_pattern": pattern}, device)
        step = make_step(model, muon.make_optimizer(model, "adamw"), dtype)
        for length in lengths:
            x, y = random_batch(1, length, 64, device)
            steps.append(partial(step, x, y))
            rows.append({"layers": model.config.layer_pattern, "length": length})
    took = rounded(in_turn(steps, (), rounds, device=device))
    for row, seconds in zip(rows, took):
        row["seconds"] = seconds
    return rows


def decoding_markdown(section, dtype):
    rows = section["decoding"]
    first = rows[0]
    against = f"/ {first['context']:,}'s"
    lines = [
        "\n## Delta layers\n",
        f"One token by the model with layers `{section['sizes']['layer_pattern']}`, after so many of random contents, "
        f"in {dtype}: all its delta layers, all its attention layers, and the whole model.\n",
        *table_head(["context", "ms delta layers", against, "ms attention layers", "ms model", against]),
    ]
    for row in rows:
        cells = [
            f"{row['context']:,}",
            milliseconds(row["delta"]),
            times_as_fast(row["delta"], first["delta"]),
            milliseconds(row["attention"]),
            milliseconds(row["model"]),
            times_as_fast(row["model"], first["model"]),
        ]
        lines.append(table_row(cells))
    return lines


def training_markdown(rows):
    """Returns the table of training steps. Rows of the same layers stand together, the shortest window first."""
    lines = ["\nA training step of one window:\n", *table_head(["layers", "tokens", "ms step", "x tokens", "x time"])]
    shortest = rows[0]
    for row in rows:
        if row["layers"] != shortest["layers"]:
            shortest = row
        cells = [
            f"`{row['layers']}`",
            f"{row['length']:,}",
            milliseconds(row["seconds"]),
            f"{row['length'] / shortest['length']:g}",
            times_as_fast(row["seconds"], shortest["seconds"]),
        ]
        lines.append(table_row(cells))
    return lines
