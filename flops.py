"""What a model costs: FLOPs, parameters and cache by component, from formulas of its config.

A multiply and an add are 2 FLOPs, and only matmuls count. Attention is counted over all T keys, as PaLM and torchtitan
do (its causal half is what a kernel may skip). A training step is 3 forwards: the backward pass multiplies each matrix
twice, once for its input and once for its weight.
"""

import re

import torch


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
        "attention projections": (8 * L * C * C, L * (4 * C * C + 4 * C * c.bias)),
        "attention": (4 * L * T * C, 0),
        "mlp": (16 * L * C * C, L * (8 * C * C + 5 * C * c.bias)),
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


FORMULAS = {"baseline": baseline, "gpt2": gpt2, "moe": moe, "mla": mla, "hybrid": hybrid}
CACHED = {  # numbers that a token leaves in the cache
    "baseline": lambda c: 2 * c.n_layer * c.n_kv_head * c.head_dim,
    "gpt2": lambda c: 2 * c.n_layer * c.n_embd,
    "moe": lambda c: 2 * c.n_layer * c.n_kv_head * c.head_dim,
    "mla": lambda c: c.n_layer * (c.kv_rank + c.rope_dim),
    "hybrid": lambda c: 2 * c.layer_pattern.count("a") * c.n_kv_head * c.head_dim,
}


def forward_flops_per_token(model: str, config, T: int) -> int | None:
    """None for a variant without a formula."""
    return sum(cost for cost, _ in FORMULAS[model](config, T).values()) if model in FORMULAS else None


def training_flops_per_token(model: str, config, T: int) -> int | None:
    forward = forward_flops_per_token(model, config, T)
    return forward and 3 * forward


def parameters(model: str, config) -> dict[str, int]:
    """Parameters by component; a tied head has none of its own."""
    return {component: count for component, (_, count) in FORMULAS[model](config, 0).items()}


def cache_bytes_per_token(model: str, config, bytes_per_number: int) -> int:
    return CACHED[model](config) * bytes_per_number


# Dense peak in FLOP/s without sparsity, from the makers' data sheets: words of the device's name, bf16 or fp16, fp32.
# The longest that fits counts: "H100 PCIe" before "H100".
PEAKS = [
    ("B200", 2250e12, 1100e12),
    ("H200", 989e12, 494e12),
    ("H100", 989e12, 494e12),
    ("H100 PCIe", 756e12, 378e12),
    ("A100", 312e12, 156e12),
    ("L40S", 362e12, 183e12),
    ("L4", 121e12, 60e12),
    ("A10G", 70e12, 35e12),
    ("RTX 4090", 165e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
    ("V100", 125e12, 15.7e12),
    ("T4", 65e12, 8.1e12),
]


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The device's peak in FLOP/s, fp32 as TF32 where it has that; None where it is not known, CPUs among them."""
    known = [row for row in PEAKS if re.search(rf"\b{row[0]}\b", device_name)]
    if not known:
        return None
    _, half, full = max(known, key=lambda row: len(row[0]))
    return full if dtype == "float32" else half


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
