"""What a model costs: FLOPs by component, from formulas; a multiply and an add are 2 FLOPs, and only matmuls count.

Attention is counted over all T keys, as PaLM and torchtitan do (its causal half is what a kernel may skip). A training
step is 3 forwards: the backward pass multiplies each matrix twice, once for its input and once for its weight.
"""

import torch


def baseline(c, T: int) -> dict[str, int]:
    """Forward FLOPs of one token within a sequence of T, by component. c: GPTConfig."""
    C, H, G, D = c.n_embd, c.n_head, c.n_kv_head, c.head_dim
    return {
        "attention projections": c.n_layer * (2 * C * H * D + 4 * C * G * D + 2 * H * D * C),
        "attention": c.n_layer * 4 * T * H * D,
        "mlp": c.n_layer * 6 * C * c.n_inner,
        "head": 2 * C * c.vocab_size,
    }


def gpt2(c, T: int) -> dict[str, int]:
    C = c.n_embd
    return {
        "attention projections": c.n_layer * 8 * C * C,
        "attention": c.n_layer * 4 * T * C,
        "mlp": c.n_layer * 16 * C * C,
        "head": 2 * C * c.vocab_size,
    }


FORMULAS = {"baseline": baseline, "gpt2": gpt2}


def forward_flops_per_token(model: str, config, T: int) -> int:
    return sum(FORMULAS[model](config, T).values())


def training_flops_per_token(model: str, config, T: int) -> int:
    return 3 * forward_flops_per_token(model, config, T)


# Dense peak in FLOP/s without sparsity, from the makers' data sheets: a part of the device's name, bf16 or fp16, fp32.
# The longest name that fits counts, so that "A100" does not claim an "A10".
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
    known = [row for row in PEAKS if row[0].lower() in device_name.lower()]
    if not known:
        return None
    _, half, full = max(known, key=lambda row: len(row[0]))
    return full if dtype == "float32" else half


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
