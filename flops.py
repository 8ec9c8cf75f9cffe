"""What a model costs: FLOPs, parameters, memory and cache by component, from formulas of its config.

    python flops.py config/train_moe.py --n_expert=64 --device H200 --json moe.json
    python flops.py config/train_moe.py --match config/train_baseline.py --knob n_expert_inner

A multiply and an add are 2 FLOPs, and only matmuls count. Attention is counted over all T keys, as PaLM and torchtitan
do; the causal count has the (T + 1) / 2 keys that a query sees on average, the least that a kernel can compute, and is
otherwise the same. A training step is 3 forwards: the backward pass multiplies each matrix twice, once for its input
and once for its weight.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

from configurator import config_class, fail, resolve

ROOT = Path(__file__).resolve().parent


# ---- formulas: one function per model file --------------------------------------------------------------------------
def baseline(c, T):
    """{component: (forward FLOPs of one token within a sequence of T, parameters)}. c: GPTConfig."""
    C, H, G, D, L, V = c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.n_layer, c.vocab_size
    projections, mlp = 2 * C * H * D + 2 * C * G * D, 3 * C * c.n_inner
    return {
        "embedding": (0, V * C),
        "attention projections": (2 * L * projections, L * projections),
        "attention": (4 * L * T * H * D, 0),
        "mlp": (2 * L * mlp, L * mlp),
        "norms": (0, L * (2 * C + 2 * D * c.qk_norm) + C),
        "head": (2 * C * V, 0 if c.tie_embeddings else C * V),
    }


def gpt2(c, T):
    C, L, V = c.n_embd, c.n_layer, c.vocab_size
    return {
        "embedding": (0, (V + c.block_size) * C),
        "attention projections": (8 * L * C * C, 4 * L * C * C),
        "attention": (4 * L * T * C, 0),
        "mlp": (16 * L * C * C, 8 * L * C * C),
        "biases": (0, 9 * L * C * c.bias),
        "norms": (0, (2 * L + 1) * (C + C * c.bias)),
        "head": (2 * C * V, 0),
    }


def moe(c, T):
    """FLOPs of the experts that a token passes through, parameters of all. Padding to blocks is not counted."""
    C, E, I, L = c.n_embd, c.n_expert, c.n_expert_inner, len(c.moe_layers)
    mlp = 3 * C * (c.n_inner * (c.n_layer - L) + c.n_shared_expert * I * L)
    router = C * L * (E + (c.n_shared_expert > 0 and c.shared_gate))
    own = {
        "mlp": (2 * mlp, mlp),
        "router": (2 * router, router),
        "experts": (6 * L * c.n_expert_per_token * C * I, 3 * L * E * C * I),
    }
    return baseline(c, T) | own


def mla(c, T):
    """Of the expanded form, which training takes."""
    C, H, L, V = c.n_embd, c.n_head, c.n_layer, c.vocab_size
    N, P, D, R, Q = c.nope_dim, c.rope_dim, c.v_dim, c.kv_rank, c.q_rank
    queries = C * Q + (Q or C) * H * (N + P)
    projections, mlp = queries + C * (R + P) + R * H * (N + D) + H * D * C, 3 * C * c.n_inner
    return {
        "embedding": (0, V * C),
        "attention projections": (2 * L * projections, L * projections),
        "attention": (2 * L * T * H * (N + P + D), 0),
        "mlp": (2 * L * mlp, L * mlp),
        "norms": (0, L * (2 * C + Q + R) + C),
        "head": (2 * C * V, 0 if c.tie_embeddings else C * V),
    }


def hybrid(c, T):
    """The delta rule in chunks of 64, as for training; its convolution and its triangular solve are no matmuls."""
    C, H, G, D = c.n_embd, c.n_head, c.n_kv_head, c.head_dim
    Hk, Hv, Dk, Dv = c.n_key_head, c.n_value_head, c.key_dim, c.value_dim
    L, attention, delta, chunk = c.n_layer, c.layer_pattern.count("a"), c.layer_pattern.count("d"), min(64, max(T, 1))
    gates = H * {"none": 0, "head": 1, "element": D}[c.output_gate]
    gates += D * sum({"q": H, "k": G, "v": G}[part] for part in set(c.qkv_gates))
    projections, mlp = attention * C * (2 * H * D + 2 * G * D + gates), 3 * C * c.n_inner
    delta_projections = delta * C * (2 * Hk * Dk + 3 * Hv * Dv + 2 * Hv)
    rule = delta * Hv * (4 * chunk * Dk + 2 * chunk * Dv + 6 * Dk * Dv)
    return {
        "embedding": (0, c.vocab_size * C),
        "attention projections": (2 * projections, projections),
        "attention": (4 * attention * T * H * D, 0),
        "delta projections": (2 * delta_projections, delta_projections),
        "delta rule": (rule * -(-T // chunk) * chunk // max(T, 1), delta * (2 * Hv + Dv)),
        "convolution": (0, delta * c.conv_kernel * (2 * Hk * Dk + Hv * Dv)),
        "mlp": (2 * L * mlp, L * mlp),
        "norms": (0, (2 * L + 1) * C + 2 * D * c.qk_norm * attention),
        "head": (2 * C * c.vocab_size, 0 if c.tie_embeddings else C * c.vocab_size),
    }


# ---- what the blocks keep of a token for the backward pass: numbers (always in fp32, in dtype) ----------------------
# Eager mode with fused attention; torch.compile keeps less. half: in 16 bits each matmul casts its input for itself, so
# that one that three of them share is kept three times. Left out, 2 % in all: single numbers per norm, head or expert,
# indices, and what does not grow with the batch; and the masks of dropout, where there is any.
def kept_baseline(c, T, half):
    C, L, heads = c.n_embd, c.n_layer, (c.n_head + c.n_kv_head) * c.head_dim
    wide = L * (4 * C + c.qk_norm * heads)  # the residual stream and its norm, twice; normalized queries and keys
    return wide, L * ((5 if half else 2) * C + (2 + c.qk_norm) * heads + 4 * c.n_inner)


def kept_gpt2(c, T, half):
    return 2 * c.n_layer * c.n_embd, 14 * c.n_layer * c.n_embd


def kept_moe(c, T, half):
    """For experts whose rows are not padded."""
    wide, narrow = kept_baseline(c, T, half)
    C, L, K, shared = c.n_embd, len(c.moe_layers), c.n_expert_per_token, c.n_shared_expert * c.n_expert_inner
    gate = shared > 0 and c.shared_gate
    more = 2 * K * C + 4 * K * c.n_expert_inner + 4 * shared + gate * C + half * ((shared > 0) * 2 + gate) * C
    less = 4 * c.n_inner + (2 if half else 1) * C
    return wide + L * (C + 2 * c.n_expert), narrow + L * (more - less)


def kept_mla(c, T, half):
    C, L, R, Q = c.n_embd, c.n_layer, c.kv_rank, c.q_rank
    attention = 2 * c.n_head * (c.nope_dim + c.rope_dim + c.v_dim) + 2 * (R + Q) + c.rope_dim
    return L * (4 * C + R + Q), L * ((5 if half else 2) * C + attention + 4 * c.n_inner)


def kept_hybrid(c, T, half):
    C, H, G, D, L, chunk = c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.n_layer, min(64, T)
    Hv, Dk, Dv, attention, delta = c.n_value_head, c.key_dim, c.value_dim, *map(c.layer_pattern.count, "ad")
    channels = 2 * c.n_key_head * Dk + Hv * Dv
    gate = H * {"none": 0, "head": 1, "element": D}[c.output_gate]
    gated = D * sum({"q": H, "k": G, "v": G}[part] for part in set(c.qkv_gates))
    heads = (2 + c.qk_norm) * (H + G) * D + (1 + (c.qk_norm and not half)) * gate + H * D * (gate > 0) + 2 * gated
    narrow = attention * heads + delta * (channels + Hv * Dv) + 4 * L * c.n_inner
    matmuls = 2 * L + attention * (3 + len(set(c.qkv_gates))) + 2 * delta if half else 2 * L  # that cast their input
    rule = Hv * (10 * Dk + 8 * Dv + 7 * chunk + 4 + Dk * Dv // chunk) + 2 * channels
    return 4 * L * C + attention * c.qk_norm * (H + G) * D + delta * rule, narrow + matmuls * C


FORMULAS = {"baseline": baseline, "gpt2": gpt2, "moe": moe, "mla": mla, "hybrid": hybrid}
KEPT = {"baseline": kept_baseline, "gpt2": kept_gpt2, "moe": kept_moe, "mla": kept_mla, "hybrid": kept_hybrid}
CACHED = {  # numbers that a token leaves in the cache
    "baseline": lambda c: 2 * c.n_layer * c.n_kv_head * c.head_dim,
    "gpt2": lambda c: 2 * c.n_layer * c.n_embd,
    "moe": lambda c: 2 * c.n_layer * c.n_kv_head * c.head_dim,
    "mla": lambda c: c.n_layer * (c.kv_rank + c.rope_dim),
    "hybrid": lambda c: 2 * c.layer_pattern.count("a") * c.n_kv_head * c.head_dim,
}
STATE = {  # of a cache of any length: numbers per delta layer (always in fp32, in the dtype of the weights)
    "hybrid": lambda c: (c.n_value_head * c.key_dim * c.value_dim,
                         (c.conv_kernel - 1) * (2 * c.n_key_head * c.key_dim + c.n_value_head * c.value_dim)),
}  # fmt: skip
DECODED = {  # FLOPs of what is computed in another way for one token with S in the cache, itself among them
    "mla": lambda c, S: {"attention": 4 * c.n_layer * S * c.n_head * (c.kv_rank + c.rope_dim)},  # absorbed
    "hybrid": lambda c, S: {"delta rule": 6 * c.layer_pattern.count("d") * c.n_value_head * c.key_dim * c.value_dim},
}
MATRICES = ("attention projections", "delta projections", "mlp", "experts")  # what muon.py gives to Muon


# ---- what they add up to --------------------------------------------------------------------------------------------
def forward_flops(model: str, config, T: int, causal: bool = False) -> dict[str, int]:
    """FLOPs of one token in a forward pass over T, by component. causal: attention over the keys before it alone."""
    costs = {component: cost for component, (cost, _) in FORMULAS[model](config, T).items()}
    return costs | {"attention": costs["attention"] * (T + 1) // (2 * T)} if causal else costs


def forward_flops_per_token(model: str, config, T: int) -> int | None:
    """None for a variant without a formula."""
    return sum(forward_flops(model, config, T).values()) if model in FORMULAS else None


def training_flops_per_token(model: str, config, T: int) -> int | None:
    forward = forward_flops_per_token(model, config, T)
    return forward and 3 * forward


def decode_flops(model: str, config, context: int) -> dict[str, int]:
    """FLOPs of one token that is decoded with `context` tokens in the cache, itself among them, by component."""
    return forward_flops(model, config, context) | (DECODED[model](config, context) if model in DECODED else {})


def parameters(model: str, config) -> dict[str, int]:
    """Parameters by component; a tied head has none of its own."""
    return {component: count for component, (_, count) in FORMULAS[model](config, 0).items()}


def active_parameters(model: str, config) -> dict[str, int]:
    """Those at work on a token: all, but of the experts only the chosen ones."""
    counts = parameters(model, config)
    idle = {"experts": counts["experts"] * config.n_expert_per_token // config.n_expert} if model == "moe" else {}
    return counts | idle


def cache_bytes_per_token(model: str, config, bytes_per_number: int) -> int:
    return CACHED[model](config) * bytes_per_number


def state_bytes(model: str, config, bytes_per_number: int) -> int:
    """What a sequence has in the cache besides, at any length."""
    wide, narrow = STATE[model](config) if model in STATE else (0, 0)
    return (4 * wide + bytes_per_number * narrow) * getattr(config, "layer_pattern", "").count("d")


def weights_read(model: str, config, batch: int) -> float:
    """Numbers that one decoding step over `batch` sequences reads. Experts: as many as a uniform choice would meet."""
    read = parameters(model, config)
    read["embedding"] = config.n_embd * (batch + (model == "gpt2"))  # a row per sequence, and that of the position
    read["head"] = config.n_embd * config.vocab_size  # tied or not
    if model == "moe":
        read["experts"] *= 1 - (1 - config.n_expert_per_token / config.n_expert) ** batch
    return sum(read.values())


def activation_bytes(model: str, config, T: int, windows: int, width: int, recompute: bool = False) -> int:
    """What a forward pass over windows of T keeps for the backward pass, in a dtype of `width` bytes, to about 3 %.

    recompute: of all blocks their inputs, and one block at a time. The logits and their gradient come on top of it.
    """
    wide, narrow = KEPT[model](config, T, width < 4)
    blocks, C, V = 4 * wide + width * narrow, config.n_embd, config.vocab_size
    if recompute:
        blocks = blocks // config.n_layer + 4 * C * (config.n_layer - 1)
    norm = 4 * C * (1 if model == "gpt2" else 2) + width * C  # LayerNorm keeps its input, RMSNorm x / rms(x) as well
    loss = 4 * V + width * V * (getattr(config, "logit_softcap", 0) > 0)  # log-softmax, tanh
    return windows * T * (blocks + norm + loss)


def memory(model, config, T, width, micro_batch, optimizer="muon", gradient_checkpointing=False) -> dict[str, int]:
    """Bytes that train.py needs on one device, with autocast to `width` bytes; weights are fp32 all the same."""
    counts = parameters(model, config)
    total, matrices = sum(counts.values()), sum(counts.get(component, 0) for component in MATRICES)
    return {
        "weight_bytes": 4 * total,
        "gradient_bytes": 4 * total,
        "optimizer_bytes": 4 * (2 * total - matrices * (optimizer == "muon")),  # two averages a weight; Muon has one
        "cast_weight_bytes": width * (matrices + config.n_embd * config.vocab_size) if width < 4 else 0,
        "activation_bytes": activation_bytes(model, config, T, micro_batch, width, gradient_checkpointing),
    }


# ---- devices --------------------------------------------------------------------------------------------------------
# Dense peak in FLOP/s without sparsity and bytes/s of memory, from the makers' data sheets: words of the device's name,
# bf16 or fp16, fp32, memory. The longest that fits counts: "H100 PCIe" before "H100".
GPUS = [
    ("B200", 2250e12, 1100e12, 8.0e12),
    ("H200", 989e12, 494e12, 4.8e12),
    ("H100", 989e12, 494e12, 3.35e12),
    ("H100 PCIe", 756e12, 378e12, 2.0e12),
    ("A100.*80GB", 312e12, 156e12, 2.0e12),
    ("A100", 312e12, 156e12, 1.555e12),
    ("L40S", 362e12, 183e12, 0.864e12),
    ("L4", 121e12, 60e12, 0.3e12),
    ("A10G", 70e12, 35e12, 0.6e12),
    ("RTX 4090", 165e12, 82.6e12, 1.008e12),
    ("RTX 3090", 71e12, 35.6e12, 0.936e12),
    ("V100", 125e12, 15.7e12, 0.9e12),
    ("T4", 65e12, 8.1e12, 0.3e12),
]


def known_gpu(device_name):
    rows = [row for row in GPUS if re.search(rf"\b{row[0]}\b", device_name)]
    return max(rows, key=lambda row: len(row[0]), default=None)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The device's peak in FLOP/s, fp32 as TF32 where it has that; None where it is not known, CPUs among them."""
    gpu = known_gpu(device_name)
    return gpu and gpu[2 if dtype == "float32" else 1]


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


# ---- equal cost -----------------------------------------------------------------------------------------------------
TOLERANCE = 0.005
WIDTH_KNOB = {"gpt2": "n_embd", "moe": "n_expert_inner"}  # n_inner in the others


def match(model: str, fields: dict, T: int, target: float, knob: str, by: str = "flops") -> tuple[int, float]:
    """(value, reached): the value of a size in the model's config with which it costs `target`, to 0.5 %.

    fields: of GPTConfig, and others, which are left alone; by: training "flops" per token in windows of T, or
    "parameters". The roundest value that will do is taken: a multiple of 64, else of 8, else any; what GPTConfig
    refuses is passed over. ValueError with the nearest one if none does.
    """
    if model not in FORMULAS:
        raise ValueError(f"flops.py has no formula for {model!r}, only for {', '.join(FORMULAS)}")
    config, best, low, high = config_class(model)[0], (None, float("inf")), 0, 2**17
    fields = {key: fields[key] for key in config.__dataclass_fields__ if key in fields}
    sizes = [key for key, value in fields.items() if type(value) is int]
    if knob not in sizes:
        raise ValueError(f"{knob!r} is no size of {model}: try one of {', '.join(sizes)}")
    for step in (64, 8, 1):
        for value in range((low // step + 1) * step, high + 1, step):
            try:
                c = config(**fields | {knob: value})
            except ValueError:
                continue
            reached = training_flops_per_token(model, c, T) if by == "flops" else sum(parameters(model, c).values())
            best = min(best, (value, reached), key=lambda pair: abs(pair[1] - target))
            if reached >= target:
                high = value
                break
            low = value
        if abs(best[1] - target) <= TOLERANCE * target:
            return best
    what = "training FLOPs a token" if by == "flops" else "parameters"
    if best[0] is None:
        raise ValueError(f"{model} accepts no {knob} from 1 to {2**17} beside its other sizes: try another knob")
    near = f"the nearest is {knob}={best[0]} with {best[1]:.4g} ({best[1] / target - 1:+.2%})"
    raise ValueError(f"{knob} brings {model} not to {target:.4g} {what}, to {TOLERANCE:.1%}: {near}; try another knob")


# ---- command line ---------------------------------------------------------------------------------------------------
@cache
def vocab_size(data, default):
    meta = Path(data) / "meta.json"
    if meta.exists():
        return -(-json.loads(meta.read_text(encoding="utf-8"))["vocab_size"] // 64) * 64
    print(f"{data}/meta.json is not here: vocab_size is taken to be {default:,}")
    return default


def built(argv):
    """A run's knobs as train.py would resolve them, and its model's config. vocab_size=0 is that of the data."""
    knobs = resolve(ROOT / "train.py", argv)
    config = config_class(knobs["model"])[0]
    if knobs["model"] not in FORMULAS:
        fail(f"flops.py has no formula for model_{knobs['model']}.py, only for {', '.join(FORMULAS)}")
    knobs["vocab_size"] = knobs["vocab_size"] or vocab_size(knobs["data"], config.vocab_size)
    sizes = {field.name: knobs[field.name] for field in fields(config)}
    try:
        return knobs, sizes, config(**sizes)
    except ValueError as error:
        fail(error)


def matched(args, argv):
    """The command line with one knob set so that the run costs what that of --match does."""
    (knobs, sizes, c), (other, _, other_c) = built(argv), built([args.match])
    knob, T, by = args.knob or WIDTH_KNOB.get(knobs["model"], "n_inner"), knobs["block_size"], args.match_by
    target, what = sum(parameters(other["model"], other_c).values()), by
    if by == "flops":
        target = training_flops_per_token(other["model"], other_c, other["block_size"])
        what = "training FLOPs" if knob == "max_steps" else "training FLOPs a token"
    if knob == "max_steps":
        if by == "parameters":
            fail("--match_by parameters: max_steps changes none")
        target *= other["max_steps"] * other["batch_tokens"]
        step = training_flops_per_token(knobs["model"], c, T) * knobs["batch_tokens"]
        value = max(round(target / step), 1)
        reached = value * step
        if abs(reached / target - 1) > TOLERANCE:
            near = f"the nearest is max_steps={value} with {reached:.4g} ({reached / target - 1:+.2%})"
            fail(f"max_steps brings {knobs['model']} not to {target:.4g} FLOPs: {near}; lower batch_tokens")
    else:
        try:
            value, reached = match(knobs["model"], sizes, T, target, knob, by)
        except ValueError as error:
            fail(error)
    print(f"{knob}={value}: {reached:.5g} {what}; {args.match}: {target:.5g} ({reached / target - 1:+.2%})\n")
    return [a for a in argv if not a.startswith(f"--{knob}=")] + [f"--{knob}={value}"]


def costs(knobs, c, gpu, args):
    """All that is printed, as a dict of plain numbers: of one token, one micro-batch, one decoded token, one run."""
    model, T, B, context = knobs["model"], knobs["block_size"], args.batch, args.context or knobs["block_size"]
    dtype = knobs["dtype"] if knobs["dtype"] != "auto" else "bfloat16" if gpu else "float32"
    width, tokens = 4 if dtype == "float32" else 2, knobs["max_steps"] * knobs["batch_tokens"]
    count, forward, causal = parameters(model, c), forward_flops(model, c, T), forward_flops(model, c, T, causal=True)
    columns = {"parameters": count, "active_parameters": active_parameters(model, c),
               "forward_flops": forward, "forward_flops_causal": causal,
               "training_flops": {part: 3 * cost for part, cost in forward.items()},
               "training_flops_causal": {part: 3 * cost for part, cost in causal.items()}}  # fmt: skip
    total = {name: sum(column.values()) for name, column in columns.items()}
    per_token, state = cache_bytes_per_token(model, c, width), state_bytes(model, c, width)
    decoded = sum(decode_flops(model, c, context).values())
    read = width * weights_read(model, c, B) / B + per_token * context + state  # weights: once for all sequences
    how = {key: knobs[key] for key in ("micro_batch", "optimizer", "gradient_checkpointing")}
    needs = memory(model, c, T, width, **how)
    found = {
        "model": model,
        "config": asdict(c),
        "components": {part: {name: column[part] for name, column in columns.items()} for part in count},
        "total": total,
        "training": {"tokens": tokens, "flops": tokens * total["training_flops"],
                     "flops_causal": tokens * total["training_flops_causal"]},
        "memory": {"dtype": dtype} | how | needs | {"total_bytes": sum(needs.values())},
        "cache": {"bytes_per_token": per_token, "bytes_at_any_length": state},
        "decoding": {"context": context, "batch": B, "flops_per_token": decoded, "bytes_read_per_token": round(read)},
    }  # fmt: skip
    if gpu:
        peak, bandwidth = peak_flops(gpu, dtype), known_gpu(gpu)[3]
        speed = args.mfu * peak / total["training_flops"]
        found["device"] = {"name": gpu, "peak_flops": peak, "bytes_per_second": bandwidth, "mfu": args.mfu,
                           "training_tokens_per_second": speed, "training_hours": tokens / speed / 3600,
                           "decoding_tokens_per_second_at_most": min(peak / decoded, bandwidth / read)}  # fmt: skip
    return found


def show(found, T):
    def text(n):
        if isinstance(n, str | bool):
            return n
        return f"{n:,}" if isinstance(n, int) and n < 1e13 else f"{n:,.0f}" if 1e3 <= n < 1e9 else f"{n:.4g}"

    print(f"{found['model']} in windows of {T:,} tokens. FLOPs of one token: attention over all {T:,} keys or, causal, "
          f"over the\n{(T + 1) / 2:,} that a query sees on average. Active: at work on a token.\n")  # fmt: skip
    heads = ("parameters", "active", "forward", "causal", "training", "causal")
    print(" " * 22 + "".join(f"{head:>15}" for head in heads))
    for component, numbers in (found["components"] | {"total": found["total"]}).items():
        print(f"{component:<22}" + "".join(f"{n:>15,}" for n in numbers.values()))
    for section in ("training", "memory", "cache", "decoding", "device"):
        for name, value in found.get(section, {}).items():
            print(f"{section:<10}{name.replace('_', ' '):<36}{text(value)}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="What a run of train.py costs; its config files and --key=value too.",
                                     usage="python flops.py [config/x.py ...] [--key=value ...] [options]",
                                     allow_abbrev=False)  # fmt: skip
    parser.error = fail
    parser.add_argument("--json", metavar="FILE", help="write all of it there too")
    parser.add_argument("--device", default="", help='a GPU, for example "H200"; without it the one here, if any')
    parser.add_argument("--mfu", type=float, default=0.4, help="share of its peak that training reaches (%(default)s)")
    parser.add_argument("--context", type=int, default=0, help="tokens in the cache when one is decoded (block_size)")
    parser.add_argument("--batch", type=int, default=1, help="sequences that are decoded at once (%(default)s)")
    parser.add_argument("--match", metavar="CONFIG", help="set one knob so that this run costs as much as that one")
    parser.add_argument("--knob", help="which: a size of the model, or max_steps (the width of the MLP)")
    parser.add_argument("--match_by", choices=("flops", "parameters"), default="flops", help="what (%(default)s)")
    args, argv = parser.parse_known_args(argv)
    if not 0 < args.mfu <= 1:
        fail(f"--mfu {args.mfu}: a share of the peak is above 0 and at most 1: 0.3 to 0.5 is usual")
    gpu = args.device
    if not gpu and shutil.which("nvidia-smi"):  # torch would take seconds to tell
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
        gpu = gpu if known_gpu(gpu) else ""
    if gpu and not known_gpu(gpu):
        fail(f"--device {gpu} is not known here: try one of {', '.join(row[0].replace('.*', ' ') for row in GPUS)}")
    argv = matched(args, argv) if args.match else argv
    knobs, _, c = built(argv)
    if args.batch < 1 or not 0 <= args.context <= c.block_size:
        fail(f"--batch {args.batch} --context {args.context}: try 1 or more, and up to block_size={c.block_size}")
    found = costs(knobs, c, gpu, args)
    show(found, knobs["block_size"])
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
        except OSError as error:
            fail(f"--json {args.json}: {error.strerror}")
    if args.match:
        print(f"\npython train.py {shlex.join(argv)}")


if __name__ == "__main__":
    main()
