"""`python bench.py variants`: what a mixture of experts, latent attention and delta layers cost and what they save."""

import copy
import importlib
import statistics
import sys
from functools import partial

import torch

import flops
import muon
from benchmarks.timing import begin, build, describe, device_and_dtype, in_turn, make_step, middle, random_batch, ratios

VARIANTS = {
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


def variants(args):
    """Everything that `variants_markdown` draws."""
    device, dtype = device_and_dtype(args.device)
    result = begin(args, device, ["variants"]) | {"dtype": dtype}
    for name, measure in (("moe", moe_rows), ("mla", mla_rows), ("hybrid", hybrid_rows)):
        print(f"{name}...", file=sys.stderr)
        sizes = VARIANTS[name]
        result[name] = sizes | measure(args.rounds, device, dtype, **sizes)
    return result


def rounded(took):
    return [[round(x, 7) for x in measured] for measured in took]


def moe_rows(rounds, device, dtype, batch, experts, versus, sizes, per_token, width):
    """A dense model and mixtures of so many experts, in all of which a token meets `per_token` times `width`."""
    own = dict(n_expert_per_token=per_token, n_expert_inner=width)
    entrants = [("baseline", sizes | {"n_inner": per_token * width})]
    entrants += [("moe", sizes | own | {"n_expert": n}) for n in experts]
    x, y = random_batch(*batch, sizes["vocab_size"], device)
    rows, functions = [], []
    for variant, fields in entrants:
        model = build(variant, fields | {"block_size": batch[1]}, device)
        facts = {"model": variant, "n_expert": fields.get("n_expert", 0)}
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        facts["flops_per_token"] = flops.training_flops_per_token(variant, model.config, batch[1])
        rows.append(facts)
        for optimizer in (None, muon.make_optimizer(model, "adamw")):
            functions.append(make_step(model, optimizer, dtype))
    took = rounded(in_turn(functions, (x, y), rounds, device=device))
    for row, gradient, step in zip(rows, took[::2], took[1::2]):
        row |= {"gradient": gradient, "step": step}
    return {"rows": rows}


@torch.no_grad()
def prefilled_cache(model, context, room=0):
    """Returns a cache of `context` random tokens, with room for so many more."""
    cache = model.new_cache(1, context + room)
    idx, _ = random_batch(1, context, model.config.vocab_size, model.embed.weight.device)
    model(idx, cache=cache, last_only=True)
    return cache


@torch.no_grad()
def mla_rows(rounds, device, dtype, context, sizes):
    """One attention layer, one token: from latents as they are, from keys and values made of them, and from MHA's."""
    H, D = sizes["n_head"], sizes["head_dim"]
    shared = dict(n_layer=1, n_head=H, n_embd=sizes["n_embd"], block_size=context, vocab_size=64)
    latent = dict(nope_dim=D, v_dim=D, kv_rank=sizes["kv_rank"], rope_dim=sizes["rope_dim"])
    mla = build("mla", shared | latent, device).to(getattr(torch, dtype))
    mha = build("baseline", shared | dict(n_kv_head=H, head_dim=D), device).to(getattr(torch, dtype))
    expanded = copy.copy(mla.blocks[0].attn)
    expanded.absorbed = expanded.expanded  # what one token would take otherwise
    rows, functions, outputs = [], [], []
    for who, model, attention in (("absorbed", mla, mla.blocks[0].attn), ("expanded", mla, expanded),
                                  ("MHA", mha, mha.blocks[0].attn)):  # fmt: skip
        cache = prefilled_cache(model, context)
        rope_cos_sin = importlib.import_module(type(model).__module__).rope_cos_sin
        rope = rope_cos_sin(torch.tensor([context - 1], device=device), model.config)
        torch.manual_seed(0)
        x = torch.randn(1, 1, sizes["n_embd"], device=device, dtype=model.embed.weight.dtype)
        functions.append(partial(attention, x, rope, None, cache))
        outputs.append(functions[-1]())
        rows.append({"who": who, "cache_bytes_per_token": cache.bytes_per_token()})
    assert (outputs[0] - outputs[1]).norm() < 0.05 * outputs[1].norm()  # two forms of one function
    for row, measured in zip(rows, rounded(in_turn(functions, (), rounds, 10, device))):
        row |= {"bytes_read": row["cache_bytes_per_token"] * context, "seconds": measured}
    return {"rows": rows}


def hybrid_rows(rounds, device, dtype, contexts, lengths, sizes):
    """One token after contexts of several lengths; a training step of one window, short and long."""
    decoding, training, functions, steps = [], [], [], []
    # 1. decode; a state cannot go back, so each call meets one token more, and all of them `context` on average
    calls = 2 + 10 * rounds  # two warm up
    model = build("hybrid", sizes | {"block_size": max(contexts) + calls}, device).to(getattr(torch, dtype)).eval()
    rope_cos_sin = importlib.import_module("model_hybrid").rope_cos_sin
    x = torch.randn(1, 1, sizes["n_embd"], device=device, dtype=model.embed.weight.dtype)
    for context in contexts:
        cache = prefilled_cache(model, max(context - calls // 2, 1), calls)
        position = torch.tensor([context - 1], device=device)
        rope = rope_cos_sin(position, model.config)
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        functions += [
            partial(each_layer, model, "delta", x, position, cache),
            partial(each_layer, model, "attn", x, rope, None, cache),
            partial(model, token, cache=cache),
        ]
        decoding.append({"context": context})
    with torch.no_grad():
        took = rounded(in_turn(functions, (), rounds, 10, device))
    for i, row in enumerate(decoding):
        row |= dict(zip(("delta", "attention", "model"), took[3 * i : 3 * i + 3]))
    # 2. train: delta layers alone, and with attention among them
    for pattern in ("d", sizes["layer_pattern"]):
        model = build("hybrid", sizes | {"block_size": max(lengths), "layer_pattern": pattern}, device)
        optimizer = muon.make_optimizer(model, "adamw")
        for length in lengths:
            steps.append(partial(make_step(model, optimizer, dtype), *random_batch(1, length, 64, device)))
            training.append({"layers": model.config.layer_pattern, "length": length})
    for row, measured in zip(training, rounded(in_turn(steps, (), rounds, device=device))):
        row["seconds"] = measured
    return {"decoding": decoding, "training": training}


def each_layer(model, kind, *inputs):
    """Runs all layers of a kind, delta or attn, on the same inputs. The newest token is written again, at its place."""
    for block in model.blocks:
        if getattr(block, kind):
            getattr(block, kind)(*inputs)


def variants_markdown(result):
    ms = lambda values: middle([1000 * x for x in values])  # noqa: E731
    times = lambda first, second: f"{statistics.median(ratios(first, second)):.2f}"  # noqa: E731
    # 1. a mixture of experts
    moe = result["moe"]
    (windows, length), rows = moe["batch"], moe["rows"]
    fewest = next(row for row in rows if row["n_expert"])
    lines = [
        "# What an idea costs and what it saves\n",
        describe(result),
        f"{result['rounds']} rounds in which all of a section take turns; medians and ranges, ratios round by round.\n",
        "## A mixture of experts\n",
        f"Training on {windows} x {length} tokens a step, {moe['per_token']} experts of width {moe['width']} a token, "
        f"none dropped; the dense model's MLPs are {moe['per_token'] * moe['width']:,} wide, so that a token costs as "
        "much but for the router. x dense: tokens/s of the whole step. The time of AdamW grows with the parameters, "
        "whatever a token meets of them.\n",
        "| model | parameters | MFLOP a token | ms forward and backward | ms step | x dense | "
        f"forward and backward / {fewest['n_expert']} experts' | step / {fewest['n_expert']} experts' |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        label = f"{row['n_expert']} experts" if row["n_expert"] else "dense"
        label = f"**{label}**" if row["n_expert"] == moe["versus"] else label
        grown = [times(row[key], fewest[key]) if row["n_expert"] else "" for key in ("gradient", "step")]
        lines.append(f"| {label} | {row['parameters']:,} | {row['flops_per_token'] / 1e6:.1f} | "
                     f"{ms(row['gradient'])} | {ms(row['step'])} | {times(rows[0]['step'], row['step'])} | "
                     f"{' | '.join(grown)} |")  # fmt: skip
    # 2. latent attention
    mla, rows = result["mla"], result["mla"]["rows"]
    sizes, mha = mla["sizes"], result["mla"]["rows"][-1]
    lines += [
        "\n## Latent attention\n",
        f"One layer of {sizes['n_head']} heads, one token after {mla['context'] - 1:,} of random contents, in "
        f"{result['dtype']}. Latents of {sizes['kv_rank']} numbers and keys of {sizes['rope_dim']} for all heads "
        f"together, where MHA has keys and values of {sizes['head_dim']} for each head. x MHA, x expanded: how many "
        "times as fast.\n",
        "| attention | cache bytes a token | MB of cache read | cache / MHA's | ms a token | x MHA | x expanded |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        fewer = mha["bytes_read"] / row["bytes_read"]
        lines.append(f"| {row['who']} | {row['cache_bytes_per_token']:,} | {row['bytes_read'] / 1e6:.1f} | "
                     f"1 / {fewer:.1f} | {ms(row['seconds'])} | {times(mha['seconds'], row['seconds'])} | "
                     f"{times(rows[1]['seconds'], row['seconds'])} |")  # fmt: skip
    # 3. delta layers
    decoding, training = result["hybrid"]["decoding"], result["hybrid"]["training"]
    pattern = result["hybrid"]["sizes"]["layer_pattern"]
    first = decoding[0]
    lines += [
        "\n## Delta layers\n",
        f"One token by the model with layers `{pattern}`, after so many of random contents, in {result['dtype']}: all "
        "its delta layers, all its attention layers, and the whole model.\n",
        f"| context | ms delta layers | / {first['context']:,}'s | ms attention layers | ms model | "
        f"/ {first['context']:,}'s |",
        "|---|---|---|---|---|---|",
    ]
    for row in decoding:
        lines.append(f"| {row['context']:,} | {ms(row['delta'])} | {times(row['delta'], first['delta'])} | "
                     f"{ms(row['attention'])} | {ms(row['model'])} | "
                     f"{times(row['model'], first['model'])} |")  # fmt: skip
    lines += [
        "\nA training step of one window:\n",
        "| layers | tokens | ms step | x tokens | x time |",
        "|---|---|---|---|---|",
    ]
    for i, row in enumerate(training):
        short = training[i // 2 * 2]
        lines.append(f"| `{row['layers']}` | {row['length']:,} | {ms(row['seconds'])} | "
                     f"{row['length'] / short['length']:g} | {times(row['seconds'], short['seconds'])} |")  # fmt: skip
    return "\n".join(lines) + "\n"
