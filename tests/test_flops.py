"""What flops.py counts, against torch's counter on real tensors, closed forms, and what a real step allocates."""

import itertools
import json
import os
import random
import re
import shlex
import subprocess
from dataclasses import asdict
from functools import partial
from math import prod

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flops
import muon
from configurator import resolve
from tests.tiny import BLOCK, EOT, MODELS, ROOT, build, cache_tensors, module, tokens

T = 24
each_model = pytest.mark.parametrize("name", MODELS)


# ---- closed forms: {row: (FLOPs of a token, parameters)} -------------------------------------------------------------
def baseline(c):
    C, H, G, D, L, V = c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.n_layer, c.vocab_size
    projections = 2 * C * H * D + 2 * C * G * D
    mlp = 3 * C * c.n_inner
    return {
        "embed": (0, V * C),
        "attn": (2 * L * projections, L * projections),
        "attn between tokens": (4 * L * T * H * D, 0),
        "mlp": (2 * L * mlp, L * mlp),
        "norms": (0, L * (2 * C + 2 * D * c.qk_norm) + C),
        "head": (2 * C * V, 0 if c.tie_embeddings else C * V),
    }


def gpt2(c):
    C, L, V = c.n_embd, c.n_layer, c.vocab_size
    return {
        "embed": (0, V * C),
        "pos_embed": (0, c.block_size * C),
        "attn": (8 * L * C * C, L * (4 * C * C + 4 * C * c.bias)),
        "attn between tokens": (4 * L * T * C, 0),
        "mlp": (16 * L * C * C, L * (8 * C * C + 5 * C * c.bias)),
        "norms": (0, (2 * L + 1) * (C + C * c.bias)),
        "head": (2 * C * V, 0),
    }


def moe(c):
    C, E, I, L = c.n_embd, c.n_expert, c.n_expert_inner, len(c.moe_layers)
    dense = 3 * C * c.n_inner * (c.n_layer - L)
    shared = 3 * C * c.n_shared_expert * I * L
    form = baseline(c) | {
        "mlp": (2 * dense + 6 * L * c.n_expert_per_token * C * I, dense + 3 * L * E * C * I),
        "mlp.router": (2 * C * L * E, C * L * E),
    }
    if c.n_shared_expert:
        form["mlp.shared"] = (2 * shared, shared)
    if c.n_shared_expert and c.shared_gate:
        form["mlp.shared_router"] = (2 * C * L, C * L)
    return form


def mla(c):
    C, H, L, V = c.n_embd, c.n_head, c.n_layer, c.vocab_size
    N, P, D, R, Q = c.nope_dim, c.rope_dim, c.v_dim, c.kv_rank, c.q_rank
    projections = C * Q + (Q or C) * H * (N + P) + C * (R + P) + R * H * (N + D) + H * D * C
    mlp = 3 * C * c.n_inner
    return {
        "embed": (0, V * C),
        "attn": (2 * L * projections, L * projections),
        "attn between tokens": (2 * L * T * H * (N + P + D), 0),
        "mlp": (2 * L * mlp, L * mlp),
        "norms": (0, L * (2 * C + Q + R) + C),
        "head": (2 * C * V, 0 if c.tie_embeddings else C * V),
    }


def gated(c):
    C, D, L = c.n_embd, c.head_dim, c.n_layer
    gates = c.n_head * {"none": 0, "head": 1, "element": D}[c.output_gate]
    gates += D * sum({"q": c.n_head, "k": c.n_kv_head, "v": c.n_kv_head}[part] for part in set(c.qkv_gates))
    form = baseline(c)
    flops_of_attn, parameters_of_attn = form["attn"]
    return form | {"attn": (flops_of_attn + 2 * L * C * gates, parameters_of_attn + L * C * gates)}


def sliding(c):
    form = baseline(c)
    flops_of_attn, parameters_of_attn = form["attn"]
    return form | {"attn": (flops_of_attn, parameters_of_attn + c.n_layer * c.n_head * c.attention_sink)}


def keys_computed(c):
    """How many keys and slots a query of linformer is multiplied with, masked ones and filled-up blocks among them."""
    blocks = -(-T // c.window)
    return blocks * c.window * (2 * c.window + c.n_slot * blocks) / T


def linformer(c):
    L, W, R = c.n_layer, c.window, c.n_slot
    form = baseline(c)
    flops_of_attn, parameters_of_attn = form["attn"]
    pooled = -(-T // W) * W / T  # windows that are pooled, the last one too, which has not ended
    pool = 4 * L * R * c.n_kv_head * c.head_dim * pooled
    return form | {
        "attn": (flops_of_attn + pool, parameters_of_attn + 2 * L * R * W),
        "attn between tokens": (4 * L * c.n_head * c.head_dim * keys_computed(c), 0),
    }


CLOSED = {"sliding": sliding, "baseline": baseline, "gpt2": gpt2, "moe": moe, "switch": moe, "mla": mla, "gated": gated}
CLOSED |= {"linformer": linformer}
CASES = [(name, {}) for name in MODELS] + [
    ("baseline", dict(tie_embeddings=False)),
    ("baseline", dict(qk_norm=False, n_layer=3)),
    ("baseline", dict(n_kv_head=1, head_dim=8)),
    ("gpt2", dict(bias=False)),
    ("moe", dict(n_shared_expert=2, shared_gate=True)),
    ("moe", dict(n_dense_layer=0, n_layer=3, moe_every=2)),
    ("mla", dict(q_rank=0)),
    ("gated", dict(qkv_gates="qkv", output_gate="head")),
    ("indexer", dict(index_topk=5)),
    ("indexer", dict(indexer_stage="dense", q_rank=0)),
    ("sliding", dict(layer_pattern="lmn", n_layer=3, n_global_token=2, attention_sink=True)),
    ("linformer", dict(window=16, n_slot=1, n_kv_head=4)),
    ("sparse", dict(key_block=2, block_stride=0, n_global_block=0, top_k_block=2)),  # gathers 2 of 12 blocks
    ("hybrid", dict(layer_pattern="dd")),
    ("hybrid", dict(layer_pattern="da", qkv_gates="v", n_layer=4)),
]


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in CLOSED])
def test_flops_and_parameters_of_each_component_are_those_of_the_closed_form(name, options):
    c = build(name, **options).config
    form = CLOSED[name](c)
    forward = {row: cost for row, (cost, _) in form.items() if cost}
    assert flops.forward_flops(name, c, T) == forward
    assert flops.training_flops(name, c, T) == {row: 3 * cost for row, cost in forward.items()}
    assert flops.parameters(name, c) == {row: count for row, (_, count) in form.items() if count}


def counted(model, backward):
    """FLOPs of a batch of 2 by torch's counter, which sees attention only where it is made of matmuls."""
    idx = tokens(2, T)
    model = model.train().double()  # no grouped product, which the counter does not know
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(idx, idx)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in ("moe", "switch", "hybrid")])
def test_forward_and_training_flops_equal_torchs_count_exactly(name, options):
    model = build(name, **options)
    assert flops.forward_flops_per_token(name, model.config, T) * 2 * T == counted(model, False)
    assert flops.training_flops_per_token(name, model.config, T) * 2 * T == counted(model, True)


@each_model
def test_blocks_of_a_kind_count_as_often_as_they_stand_there(name, monkeypatch):
    c = build(name, n_layer=5).config
    want = flops.run(name, c, T)
    monkeypatch.setattr(flops, "REMEMBERED", {})
    monkeypatch.setattr(flops, "kind", id)  # each its own
    got = flops.run(name, c, T)
    assert got.forward == want.forward and got.backward == want.backward
    assert got.peak_bytes == pytest.approx(want.peak_bytes, rel=0.02)


@each_model
def test_long_windows_cost_what_shorter_ones_say(name, monkeypatch):
    c = build(name, block_size=2048).config
    long = flops.run(name, c, 1600)
    monkeypatch.setattr(flops, "REMEMBERED", {})
    monkeypatch.setattr(flops, "LONGEST_RUN", 1024)
    guessed = flops.run(name, c, 1600)
    for row, cost in long.forward.items():
        assert guessed.forward[row] == pytest.approx(cost, rel=1e-12), row
    assert guessed.peak_bytes == pytest.approx(long.peak_bytes, rel=1e-3)


@pytest.mark.parametrize("window", [96, 768])
def test_shorter_runs_are_of_lengths_that_pooled_windows_divide(window, monkeypatch):
    c = build("linformer", block_size=4096, window=window).config
    long = flops.run("linformer", c, 3072)
    monkeypatch.setattr(flops, "REMEMBERED", {})
    monkeypatch.setattr(flops, "LONGEST_RUN", 1024)
    assert flops.run("linformer", c, 3072).forward == pytest.approx(long.forward, rel=1e-12)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in ("moe", "switch", "hybrid")])
def test_flops_of_a_decoded_token_equal_torchs_count_exactly(name, options):
    model = build(name, **options)
    for context in (1, 2, 20):
        want = sum(flops.decode_flops(name, model.config, context).values())
        cache = model.new_cache(2, context)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            if context > 1:
                model(tokens(2, context - 1), cache=cache)
            with FlopCounterMode(display=False) as counter:
                model(tokens(2, 1, seed=2), cache=cache)
        assert counter.get_total_flops() == 2 * want


@pytest.mark.parametrize("name", ["baseline", "gpt2"])
def test_causal_flops_are_those_of_decoding_one_token_after_the_other(name):
    """There each query meets only the keys that it may see, and the rest costs the same as in a full pass."""
    model = build(name)
    cache, idx = model.new_cache(1, 7), tokens(1, 7)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for t in range(7):
            model(idx[:, t : t + 1], cache=cache)
    assert counter.get_total_flops() == 7 * sum(flops.forward_flops(name, model.config, 7, causal=True).values())


@each_model
def test_causal_attention_is_the_mean_over_queries_and_the_rest_is_the_same(name):
    c = build(name).config
    full = flops.forward_flops(name, c, T)
    causal = flops.forward_flops(name, c, T, causal=True)
    changed = {row for row in full if full[row] != causal[row]}
    assert changed == {"attn between tokens"}
    mixers = [part for part in build(name).modules() if hasattr(part, "attend")]
    seen = [part.keys_seen(T) if hasattr(part, "keys_seen") else (T + 1) / 2 for part in mixers]
    computed = keys_computed(c) if name == "linformer" else T
    share = sum(seen) / len(seen) / computed
    attending = sum(flops.run(name, c, T).scores.values()) / T
    assert name == "sparse" or attending == full["attn between tokens"]  # there blocks are chosen, besides
    assert full["attn between tokens"] - causal["attn between tokens"] == pytest.approx(attending * (1 - share))
    trained = flops.training_flops(name, c, T, causal=True)
    spared = flops.training_flops(name, c, T)["attn between tokens"] - trained["attn between tokens"]
    assert spared == pytest.approx(3 * (full["attn between tokens"] - causal["attn between tokens"]), rel=1e-12)


def test_a_mixer_that_sees_fewer_keys_says_so(monkeypatch):
    c = build("baseline").config
    monkeypatch.setattr(module("baseline").Attention, "keys_seen", lambda self, T: 3.0, raising=False)
    full = flops.forward_flops("baseline", c, T)["attn between tokens"]
    assert flops.forward_flops("baseline", c, T, causal=True)["attn between tokens"] == full * 3 / T


@pytest.mark.parametrize(("name", "options"), CASES)
def test_parameters_equal_those_of_the_model_and_are_counted_once(name, options):
    model = build(name, **options)
    assert sum(flops.parameters(name, model.config).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_cache_and_state_bytes_are_all_that_a_cache_holds(name, options):
    model = build(name, **options)
    c = model.config
    for width, kind in ((4, torch.float32), (2, torch.bfloat16)):
        held = sum(x.nbytes for x in cache_tensors(model.to(kind).new_cache(3, 16)))
        per_token = flops.cache_bytes_per_token(name, c, width)
        assert per_token == model.new_cache(3, 16).bytes_per_token()
        assert (
            held
            == 3 * (16 * per_token + flops.state_bytes(name, c, width))
            == 3 * flops.cache_bytes(name, c, 16, width)
        )


@pytest.mark.parametrize(("name", "options"), CASES)
def test_weights_read_and_active_are_those_that_move_a_decoded_tokens_logits(name, options):
    # Not so bold that GELU's gradient would be 0; and of gates that sum to 1 only the chosen ones have a gradient.
    more = dict(normalize_gates=False) if hasattr(module(name), "MoE") else {}
    moved = {}
    for seed in range(1 if more else 12):  # a ReLU passes no gradient on for half of its inputs: for others elsewhere
        model = build(name, seed, bold=False, **options, **more)
        cache = model.new_cache(1, 8)
        with torch.no_grad():
            model(tokens(1, 7), cache=cache)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            model(torch.tensor([[5]]), cache=cache).square().sum().backward()
        for key, p in model.named_parameters():
            if p.grad is not None:
                moved[key] = moved.get(key, 0) + (p.grad != 0)
    moved = {key: count.count_nonzero().item() for key, count in moved.items()}
    want = flops.weights_read(name, model.config, 1)
    want -= sum(p.numel() for key, p in model.named_parameters() if "indexer" in key)  # a choice has no gradient
    if name == "linformer":  # what pools a window is read too, and moves those after it
        want -= sum(p.numel() for key, p in model.named_parameters() if "w_pool" in key)
    tied = getattr(model, "lm_head", None) is None
    # A tied embedding is one matrix, of which the head reads all and the embedding a row: the gradient counts it once.
    assert sum(moved.values()) == pytest.approx(want - tied * model.config.n_embd)
    stacks = [key for key, p in model.named_parameters() if p.ndim == 3 and p.size(1) > 1]
    experts = sum(moved[key] for key in stacks)
    idle = sum(model.get_parameter(key).numel() for key in stacks) - experts
    count = flops.parameters(name, model.config)
    active = flops.active_parameters(name, model.config)
    assert sum(count.values()) - sum(active.values()) == idle


def test_a_batch_reads_as_many_experts_as_a_uniform_choice_meets():
    config, rng = build("moe", n_expert=32, n_expert_per_token=4).config, random.Random(0)
    per_expert = 3 * config.n_embd * config.n_expert_inner * len(config.moe_layers)
    rest = flops.weights_read("moe", config, 1) - 4 * per_expert - config.n_embd
    for batch in (1, 6, 100):
        draws = [{e for _ in range(batch) for e in rng.sample(range(32), 4)} for _ in range(1000)]
        met = sum(map(len, draws)) / len(draws)
        assert flops.weights_read("moe", config, batch) == pytest.approx(
            rest + met * per_expert + batch * config.n_embd, rel=5e-3
        )


# ---- the optimizer and memory ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@each_model
def test_the_optimizers_flops_and_state_are_those_of_a_real_step(name, optimizer):
    model = build(name)
    opt = muon.make_optimizer(model, optimizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        opt.step()
    state = sum(x.nbytes for held in opt.state.values() for key, x in held.items() if key != "step")
    assert flops.optimizer_cost(name, model.config, optimizer) == (counter.get_total_flops(), state)
    assert (optimizer == "muon") == (counter.get_total_flops() > 0)


def peak_of_a_real_step(model, dtype, recompute, windows, T):
    """Bytes that PyTorch's allocator held at once beside weights and gradients, by its own profiler."""
    if recompute:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    idx = tokens(windows, T)

    def step():
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(idx, idx)
        loss.backward()

    step()  # from now on gradients are there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


@pytest.mark.parametrize(
    ("name", "dtype", "recompute", "options"),
    [(name, "float32", False, {}) for name in MODELS]
    + [(name, "bfloat16", False, {}) for name in MODELS]
    + [
        ("baseline", "float32", False, dict(vocab_size=4096)),  # logits are most of it
        ("baseline", "bfloat16", False, dict(vocab_size=4096)),
        ("baseline", "float32", False, dict(eot_id=EOT)),  # documents: a mask for each layer
        ("baseline", "float32", True, dict(n_layer=6)),
        ("mla", "float32", False, dict(nope_dim=24, v_dim=16)),  # values of another width: attention is not fused
    ],
)
def test_activations_are_within_a_twentieth_of_what_a_real_step_allocates(name, dtype, recompute, options):
    options = dict(vocab_size=256, block_size=256, bold=False) | options
    model = build(name, **options).train()
    found = flops.memory(name, model.config, 256, dtype, 4, gradient_checkpointing=recompute)
    want = peak_of_a_real_step(model, dtype, recompute, 4, 256)
    assert found["activation_bytes"] == pytest.approx(want, rel=0.05)
    assert found["weight_bytes"] == found["gradient_bytes"] == 4 * sum(p.numel() for p in model.parameters())


def test_training_costs_about_six_flops_a_parameter_and_a_token():
    """Kaplan et al.'s rule, for a model so wide that attention hardly counts."""
    config = module("gpt2").GPTConfig(n_embd=4096, n_layer=32, n_head=32, vocab_size=100, block_size=64)
    n = 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size
    assert abs(flops.training_flops_per_token("gpt2", config, T) / (6 * n) - 1) < 0.01


def test_the_known_sizes_come_out():
    config = module("gpt2").GPTConfig(vocab_size=50257)
    assert sum(flops.parameters("gpt2", config).values()) == 124_439_808
    assert flops.cache_bytes_per_token("gpt2", config, 2) == prod((2, 12, 768, 2))
    assert flops.table_parameters("gpt2", config) == (50257 + 1024) * 768


def test_the_released_mixture_of_30b_has_3b_at_work():
    """Qwen3-30B-A3B: 30.5B parameters in total, 3.3B activated, as its model card says."""
    sizes = dict(n_layer=48, n_embd=2048, n_head=32, n_kv_head=4, head_dim=128, vocab_size=151936, block_size=4096)
    experts = dict(n_expert=128, n_expert_per_token=8, n_expert_inner=768, tie_embeddings=False)
    config = module("moe").GPTConfig(**sizes, **experts)
    assert round(sum(flops.parameters("moe", config).values()) / 1e9, 1) == 30.5
    assert sum(flops.active_parameters("moe", config).values()) / 1e9 == pytest.approx(3.3, abs=0.06)


# ---- devices --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "half"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA A10G", 70e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("Tesla T4", 65e12),
     ("NVIDIA H200", 989e12), ("cpu", None), ("NVIDIA GeForce RTX 4090", 165e12), ("H100", 989e12),
     ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200 NVL", 835e12), ("Tesla V100-PCIE-16GB", 112e12),
     ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12)],
)  # fmt: skip
def test_peaks_are_found_by_the_devices_name(device, half):
    assert flops.peak_flops(device, "bfloat16") == flops.peak_flops(device, "float16") == half
    assert half is None or flops.peak_flops(device, "float32") < half


def test_a_peak_belongs_to_no_device_of_another_name():
    others = ["NVIDIA T400", "NVIDIA A1000", "NVIDIA L400", "Quadro T4000", "NVIDIA GB200", "NVIDIA GH200 480GB"]
    others += ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 3090 Ti"]
    others += ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 96GB HBM3"]
    for device in others:
        assert flops.peak_flops(device, "bfloat16") is None, device


@pytest.mark.parametrize(
    ("printed", "found"),
    [("NVIDIA H200, Disabled", "NVIDIA H200"), ("NVIDIA GeForce RTX 4090, [N/A]", "NVIDIA GeForce RTX 4090"),
     ("NVIDIA H200, Enabled", ""), ("NVIDIA GeForce RTX 4090 Laptop GPU, [N/A]", ""), ("", "")],
)  # fmt: skip
def test_the_gpu_here_counts_where_it_is_known_and_not_cut_into_slices(printed, found, tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{printed}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert flops.gpu_here() == found


def test_the_name_of_the_cpu_is_cpu():
    assert flops.device_name("cpu") == "cpu" and not torch.device("cpu").index


def test_memory_bandwidth_is_that_of_the_same_device():
    known = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H100 PCIe": 2.0e12, "NVIDIA L4": 0.3e12,
             "NVIDIA A100-SXM4-40GB": 1.555e12, "NVIDIA A100-SXM4-80GB": 2.0e12, "A100 80GB": 2.0e12}  # fmt: skip
    assert {name: flops.known_gpu(name)[3] for name in known} == known


# ---- equal cost -----------------------------------------------------------------------------------------------------
KEEP = ("n_layer", "n_dense_layer", "n_expert_per_token")


def fields_of(name, **options):
    sizes = module(name).TINY
    wide = {key: 2 * value if type(value) is int and key not in KEEP else value for key, value in sizes.items()}
    return asdict(module(name).GPTConfig(**wide | dict(vocab_size=512, block_size=BLOCK) | options))


@pytest.mark.parametrize(
    ("name", "knob", "aim"),
    [("baseline", "n_inner", 300), ("moe", "n_expert_inner", 100), ("mla", "kv_rank", 100), ("hybrid", "value_dim", 40),
     ("gpt2", "n_embd", 256)],
)  # fmt: skip
def test_a_matched_size_brings_the_real_models_flops_within_half_a_percent(name, knob, aim):
    T, fields, config = 24, fields_of(name), module(name).GPTConfig
    target = 1.002 * flops.training_flops_per_token(name, config(**fields | {knob: aim}), T)
    value, reached = flops.match(name, fields, T, target, knob)
    model = module(name).GPT(config(**fields | {knob: value})).eval()
    if name not in ("moe", "hybrid"):
        assert counted(model, True) / (2 * T) == reached
    assert abs(reached / target - 1) <= 0.005 and value != fields[knob]


@pytest.mark.parametrize("name", MODELS)
def test_a_match_by_parameters_is_one_of_the_real_model(name):
    knob = flops.width_knob(module(name).GPTConfig(**fields_of(name)))
    target = sum(flops.parameters(name, module(name).GPTConfig(**fields_of(name, **{knob: 640}))).values()) * 1.003
    everything = {"model": name, "learning_rate": 1.0, "max_steps": 3} | fields_of(name)  # as `resolve` returns it
    value, reached = flops.match(name, everything, T, target, knob, by="parameters")
    with torch.device("meta"):
        model = module(name).GPT(module(name).GPTConfig(**fields_of(name, **{knob: value})))
    assert sum(p.numel() for p in model.parameters()) == reached and abs(reached / target - 1) <= 0.005


@pytest.mark.parametrize(("knob", "span"), [("n_inner", 3000), ("n_embd", 600), ("n_layer", 60), ("n_kv_head", 16)])
def test_a_match_is_found_where_trying_every_value_finds_one_and_else_the_nearest_is_named(knob, span, monkeypatch):
    def by_closed_form(name, c, T):  # equal, and quick
        return 3 * sum(cost for cost, _ in baseline(c).values())

    monkeypatch.setattr(flops, "training_flops_per_token", by_closed_form)
    fields, found = fields_of("baseline"), {}
    for value in range(1, span):
        try:
            config = module("baseline").GPTConfig(**fields | {knob: value})
        except ValueError:
            continue
        found[value] = flops.training_flops_per_token("baseline", config, T)
    outcomes = set()
    for target in [max(found.values()) * (i + 0.3) / 12 for i in range(12)]:
        nearest = min(found, key=lambda value: abs(found[value] - target))
        within = {value for value in found if abs(found[value] / target - 1) <= 0.005}
        outcomes.add(bool(within))
        if not within:
            with pytest.raises(ValueError, match=re.escape(f"{knob}={nearest} with {found[nearest]:.4g} (")):
                flops.match("baseline", fields, T, target, knob)
            continue
        value, reached = flops.match("baseline", fields, T, target, knob)
        roundest = max((64, 8, 1), key=lambda step: step * any(v % step == 0 for v in within))
        assert value in within and reached == found[value] and value % roundest == 0
    assert False in outcomes


def test_a_match_is_refused_where_the_knob_is_none():
    with pytest.raises(ValueError, match="'dropout' is no size of baseline: try one of vocab_size.*n_inner"):
        flops.match("baseline", fields_of("baseline"), T, 1e6, "dropout")


# ---- command line ---------------------------------------------------------------------------------------------------
MOE = str(ROOT / "config" / "train_moe.py")  # its first line: 92,155,264 parameters


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """report(*arguments) -> (what --json wrote, the printed lines), where no GPU is found."""
    monkeypatch.setattr(flops.shutil, "which", lambda program: None)

    def report(*arguments):
        flops.main([*map(str, arguments), "--json", str(tmp_path / "costs.json")])
        return json.loads((tmp_path / "costs.json").read_text()), capsys.readouterr().out.splitlines()

    return report


def test_the_report_of_a_config_has_its_numbers_by_component_and_in_total(report):
    found, lines = report(MOE)
    config = module("moe").GPTConfig(**found["config"])
    T, total = 1024, found["total"]
    assert total["parameters"] == 92_155_264 and config.n_expert == 32
    assert total["active_parameters"] == sum(flops.active_parameters("moe", config).values())
    assert total["forward_flops"] == flops.forward_flops_per_token("moe", config, T)
    assert total["training_flops"] == 3 * total["forward_flops"] == flops.training_flops_per_token("moe", config, T)
    half = 4 * 8 * 6 * 64 * (T - 1) // 2  # 4 L H D for each key that a query does not see
    assert total["forward_flops"] - total["forward_flops_causal"] == half
    assert total["training_flops_causal"] == 3 * total["forward_flops_causal"]
    for name, value in total.items():
        assert sum(numbers[name] for numbers in found["components"].values()) == value
    tokens = 2500 * 262144
    per_step, state = flops.optimizer_cost("moe", config, "muon")
    assert found["training"] == {
        "tokens": tokens,
        "flops": tokens * total["training_flops"],
        "flops_causal": tokens * total["training_flops_causal"],
        "optimizer_flops_per_step": per_step,
        "optimizer_flops": 2500 * per_step,
    }
    needs = flops.memory("moe", config, T, "float32", 32, accumulation=8)  # 262,144 tokens are 8 x 32 windows
    assert found["memory"].items() >= needs.items() and found["memory"]["total_bytes"] == sum(needs.values())
    assert needs["optimizer_bytes"] == state
    assert found["cache"] == {"bytes_per_token": 4 * 2 * 8 * 2 * 64, "bytes_at_any_length": 0}
    assert "device" not in found and found["memory"]["dtype"] == "float32"
    table = {line.split("  ")[0]: line.split()[-6:] for line in lines if line}
    for name, numbers in (found["components"] | {"total": total}).items():
        assert table[name] == [f"{n:,}" for n in numbers.values()]


def test_every_knob_of_train_py_and_of_the_model_counts(report):
    found, _ = report(MOE, "--n_expert=64", "--max_steps=10", "--dtype=float16", "--micro_batch=3", "--optimizer=adamw")
    config = module("moe").GPTConfig(**found["config"])
    assert config.n_expert == 64 and found["training"]["tokens"] == 10 * 262144
    assert found["total"]["parameters"] == 92_155_264 + 7 * (32 * 3 * 384 * 256 + 32 * 384)
    assert found["memory"].items() >= flops.memory("moe", config, 1024, "float16", 3, "adamw").items()
    again, _ = report(MOE, "--n_expert=64", "--gradient_checkpointing", "--micro_batch=3", "--optimizer=adamw")
    assert again["memory"]["activation_bytes"] == flops.run("moe", config, 1024, 3, "float32", True).peak_bytes


def test_decoding_and_time_follow_from_the_device_the_batch_and_the_context(report):
    found, _ = report(MOE, "--device", "H200", "--mfu", "0.5", "--batch", "8", "--context", "512")
    config, device, decoding = module("moe").GPTConfig(**found["config"]), found["device"], found["decoding"]
    assert found["memory"]["dtype"] == "bfloat16" and device["peak_flops"] == 989e12
    assert decoding["flops_per_token"] == sum(flops.decode_flops("moe", config, 512).values())
    read = 2 * flops.weights_read("moe", config, 8) / 8 + 512 * 2 * 2 * 8 * 2 * 64
    assert decoding["bytes_read_per_token"] == round(read)
    assert device["training_tokens_per_second"] == pytest.approx(0.5 * 989e12 / found["total"]["training_flops"])
    assert device["training_hours"] == pytest.approx(found["training"]["flops"] / (0.5 * 989e12) / 3600)
    bound = min(4.8e12 / read, 989e12 / decoding["flops_per_token"])
    assert device["decoding_tokens_per_second_at_most"] == pytest.approx(bound)
    hybrid, _ = report(ROOT / "config/train_hybrid.py", "--vocab_size=512", "--context=1")
    config = module("hybrid").GPTConfig(**hybrid["config"])
    state = 4 * 6 * (6 * 64 * 64 + 3 * (2 * 3 * 64 + 6 * 64))  # 6 delta layers
    assert hybrid["cache"]["bytes_at_any_length"] == state
    read = 4 * flops.weights_read("hybrid", config, 1) + hybrid["cache"]["bytes_per_token"] + state
    assert hybrid["decoding"]["bytes_read_per_token"] == read


def test_a_gpu_that_is_there_is_found_without_being_named(report, monkeypatch):
    monkeypatch.setattr(flops.shutil, "which", lambda program: f"/usr/bin/{program}")
    for name, known in (("NVIDIA L4", True), ("NVIDIA Unheard 3", False)):
        done = subprocess.CompletedProcess([], 0, stdout=f"{name}\n{name}\n")
        monkeypatch.setattr(flops.subprocess, "run", lambda *_, done=done, **__: done)
        found, _ = report(MOE)
        assert found.get("device", {}).get("name") == (name if known else None)


def test_vocab_size_0_is_that_of_the_data_or_said_to_be_guessed(report, tmp_path):
    (tmp_path / "meta.json").write_text('{"vocab_size": 1000}')
    assert report(f"--data={tmp_path}")[0]["config"]["vocab_size"] == 1024
    assert report(f"--data=['{tmp_path}:0.7', 'more:0.3']")[0]["config"]["vocab_size"] == 1024
    found, lines = report(f"--data={tmp_path}/none")
    assert found["config"]["vocab_size"] == 50304
    assert lines[0] == f"{tmp_path}/none/meta.json is not here: vocab_size is taken to be 50,304"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"vocab_size": "many"}'])
def test_a_meta_json_without_a_vocabulary_is_an_error_of_one_line(report, tmp_path, capsys, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(SystemExit):
        report(f"--data={tmp_path}")
    assert "meta.json does not say how large the vocabulary is" in capsys.readouterr().err


@pytest.mark.parametrize("knob", ["n_expert_inner", "max_steps"])
def test_a_matched_run_is_printed_as_a_command_that_costs_the_same(report, knob):
    other = ROOT / "config" / "train_mla.py"
    want, _ = report(other, "--vocab_size=50304")
    own = ["--n_expert=16", "--vocab_size=50304"]
    options = [] if knob == "n_expert_inner" else ["--knob", knob, f"--{knob}=7"]
    found, lines = report(MOE, *own, *options, "--match", other)
    python, script, *argv = shlex.split(lines[-1])
    assert (python, script, argv[:3]) == ("python", "train.py", [MOE, *own]) and len(argv) == 4
    knobs = resolve(ROOT / "train.py", argv)
    assert report(*argv)[0] == found and knobs[knob] != resolve(ROOT / "train.py", [MOE])[knob]
    number = "flops" if knob == "max_steps" else "training_flops"
    section = "training" if knob == "max_steps" else "total"
    assert abs(found[section][number] / want[section][number] - 1) <= 0.005


def test_parameters_can_be_matched_instead(report):
    found, _ = report(ROOT / "config/train_mla.py", "--vocab_size=50304", "--match", MOE, "--match_by=parameters")
    assert found["config"]["n_inner"] > 1408 and abs(found["total"]["parameters"] / 92_155_264 - 1) <= 0.005


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model=mine", "unknown model 'mine'; the model_*.py files here give: baseline, gated, gpt2"),
        ("--device B300X", "--device B300X is not known here: try one of B200, H200, H200 NVL, H100,"),
        ("--mfu 0", "--mfu 0.0: a share of the peak is above 0 and at most 1"),
        ("--mfu 1.5", "--mfu 1.5: a share of the peak"),
        ("--mfu fast", "argument --mfu: invalid float value"),
        ("--batch 0", "--batch 0 --context 0: try 1 or more"),
        (f"--batch {10**400}", "--batch 1000"),
        ("--vocab_size=64 --context 2000", "--batch 1 --context 2000: try 1 or more, and up to block_size=1024"),
        ("--knob n_embd", "--knob, --match_by and --match_optimizer say how to match: give --match CONFIG, too"),
        ("--n_inne=3", "unknown config key 'n_inne' on the command line; did you mean 'n_inner'?"),
        ("--n_head=12 --n_kv_head=5", "n_head=12 is not divisible by n_kv_head=5"),
        (f"{MOE} --match {MOE} --knob dropout", "'dropout' is no size of moe: try one of vocab_size"),
        (f"{MOE} --match {ROOT}/config/qwen3_0.6b.py --knob n_expert", "no n_expert brings moe within 0.5% of 6.39"),
        (
            f"{MOE} --match {MOE} --batch_tokens=1638400000 --knob max_steps",
            "max_steps brings moe not to 1.598e+17 FLOPs: the nearest is max_steps=1",
        ),
        (
            f"{MOE} --match {MOE} --match_by parameters --knob max_steps",
            "--match_by parameters: max_steps changes none",
        ),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(report, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        report(*shlex.split(arguments))
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: " + message) and said.count("\n") == 1


def test_a_report_that_cannot_be_written_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        flops.main([MOE, "--json", f"{tmp_path}/none/costs.json"])
    assert error.value.code == 2
    assert capsys.readouterr().err == f"error: --json {tmp_path}/none/costs.json: No such file or directory\n"


def test_a_model_file_of_ones_own_is_counted_as_any(report, tmp_path, monkeypatch):
    text = (ROOT / "model_baseline.py").read_text()
    text = text.replace("F.silu(self.w_gate(x)) * self.w_up(x)", "F.relu(self.w_up(x)).square()")
    text = text.replace("        self.w_gate = nn.Linear(config.n_embd, config.n_inner, bias=False)\n", "")
    (tmp_path / "model_mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    mine, _ = report("--model=mine", "--vocab_size=512")
    base, _ = report("--model=baseline", "--vocab_size=512")
    for name, value in mine["components"]["mlp"].items():
        assert value * 3 == base["components"]["mlp"][name] * 2, name


def test_products_by_einsum_and_in_the_block_itself_are_counted_where_they_belong(tmp_path, monkeypatch):
    """Of a stack of 4 matrices each token passes through all."""
    text = (ROOT / "model_baseline.py").read_text()
    stack = """class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w_down = nn.Parameter(torch.empty(4, config.n_embd, config.n_embd))

    def forward(self, x):
        return torch.einsum("btd,edf->btef", x, self.w_down).sum(2)


"""
    text = text.replace(text[text.index("class MLP") : text.index("class Block")], stack)
    made = "        self.mlp = MLP(config)\n"
    text = text.replace(made, made + "        self.wq = nn.Parameter(torch.empty(config.n_embd, config.n_embd))\n")
    text = text.replace("self.mlp(self.mlp_norm(x))", "self.mlp(self.mlp_norm(x @ self.wq))")
    (tmp_path / "model_stacked.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    c = build("baseline").config
    squares = c.n_layer * c.n_embd**2
    assert flops.active_parameters("stacked", c)["mlp"] == flops.parameters("stacked", c)["mlp"] == 4 * squares
    assert flops.parameters("stacked", c)["block"] == squares
    assert flops.forward_flops("stacked", c, 64)["block"] == 2 * squares
