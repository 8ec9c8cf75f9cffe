"""The formulas of flops.py against what torch counts, and against the models themselves."""

from math import prod

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flops
from tests.tiny import MODELS, TINY, build, tokens

T = 24
SHAPES = [dict(), dict(n_layer=3), dict(n_embd=64), dict(vocab_size=200), dict(n_head=2)]
UNTIED = {"baseline": [dict(tie_embeddings=False), dict(qk_norm=False), dict(n_kv_head=1), dict(head_dim=16)],
          "gpt2": [dict(bias=False)],
          "moe": [dict(n_shared_expert=2, shared_gate=True), dict(n_dense_layer=0), dict(n_expert=8)],
          "mla": [dict(q_rank=0), dict(kv_rank=24)],
          "hybrid": [dict(layer_pattern="dd"), dict(qkv_gates="qkv"), dict(output_gate="head")]}  # fmt: skip
# Where the backward pass is not twice the forward, in FLOPs of a sequence within one chunk. hybrid: the gradient of a
# triangular solve is a matmul, and there is none to the state before the first chunk, nor from that after the last.
UNEVEN = {"hybrid": lambda c: c.layer_pattern.count("d") * c.n_value_head * 2 * T
          * (T * (c.key_dim + c.value_dim) - 4 * c.key_dim * c.value_dim)}  # fmt: skip


# What the counter sees besides in a forward pass over N tokens. moe: experts' rows are padded to whole blocks.
def padding(name, c, N):
    if name != "moe":
        return 0
    rows, b = N * c.n_expert_per_token, -(-N * c.n_expert_per_token // c.n_expert)
    blocks = c.n_expert + (rows - c.n_expert) // b
    return len(c.moe_layers) * (blocks * b - rows) * 6 * c.n_embd * c.n_expert_inner


CASES = [(name, options) for name in MODELS for options in SHAPES + UNTIED.get(name, [])]


def counted(model, backward):
    """FLOPs of a batch of 2 by torch's counter, which sees attention only where it is made of matmuls."""
    idx = tokens(2, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(idx, idx)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_forward_and_training_flops_equal_torchs_count_exactly(name, options):
    model = build(name, **options)
    padded = padding(name, model.config, 2 * T)
    assert flops.forward_flops_per_token(name, model.config, T) * 2 * T + padded == counted(model, False)
    uneven = 2 * UNEVEN[name](model.config) if name in UNEVEN else 0
    assert flops.training_flops_per_token(name, model.config, T) * 2 * T + 3 * padded + uneven == counted(model, True)


def test_every_model_file_has_a_formula():
    assert flops.FORMULAS.keys() == TINY.keys() == set(MODELS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_parameters_equal_those_of_the_model_and_are_counted_once(name, options):
    model = build(name, **options)
    assert sum(flops.parameters(name, model.config).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_cache_bytes_equal_those_of_a_real_cache(name, options):
    model = build(name, **options)
    assert flops.cache_bytes_per_token(name, model.config, 4) == model.new_cache(3, 16).bytes_per_token()
    half = model.bfloat16().new_cache(1, 16)
    assert flops.cache_bytes_per_token(name, model.config, 2) == half.bytes_per_token()


def test_training_costs_about_six_flops_a_parameter_and_a_token():
    """Kaplan et al.'s rule, for a model so wide that attention hardly counts."""
    config = build("gpt2").config
    config.n_embd, config.n_layer, config.n_head = 4096, 32, 32
    n = 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size
    assert abs(flops.training_flops_per_token("gpt2", config, T) / (6 * n) - 1) < 0.01


def test_the_known_sizes_come_out():
    config = build("gpt2").config
    config.n_embd, config.n_layer, config.n_head, config.vocab_size, config.block_size = 768, 12, 12, 50257, 1024
    assert sum(flops.parameters("gpt2", config).values()) == 124_439_808
    assert flops.cache_bytes_per_token("gpt2", config, 2) == prod((2, 12, 768, 2))


def test_a_variant_without_a_formula_has_no_flops():
    assert flops.training_flops_per_token("mine", build("gpt2").config, T) is None


@pytest.mark.parametrize(
    ("device", "half"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA A10G", 70e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("Tesla T4", 65e12),
     ("NVIDIA H200", 989e12), ("cpu", None), ("NVIDIA GeForce RTX 4090", 165e12)],
)  # fmt: skip
def test_peaks_are_found_by_the_devices_name(device, half):
    assert flops.peak_flops(device, "bfloat16") == flops.peak_flops(device, "float16") == half
    assert half is None or flops.peak_flops(device, "float32") < half


def test_a_peak_belongs_to_no_device_of_another_name():
    for device in ("NVIDIA T400", "NVIDIA A1000", "NVIDIA L400", "Quadro T4000", "NVIDIA GB200", "NVIDIA GH200 480GB"):
        assert flops.peak_flops(device, "bfloat16") is None, device


def test_the_name_of_the_cpu_is_cpu():
    assert flops.device_name("cpu") == "cpu" and not torch.device("cpu").index
