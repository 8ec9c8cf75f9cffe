"""The formulas of flops.py against what torch counts, and against the models themselves; its command line."""

import json
import random
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from math import prod

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flops
import muon
from configurator import resolve
from tests.tiny import BLOCK, MODELS, ROOT, TINY, build, cache_tensors, module, tokens

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


def test_every_model_file_has_its_formulas():
    assert flops.FORMULAS.keys() == flops.KEPT.keys() == flops.CACHED.keys() == TINY.keys() == set(MODELS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_flops_of_a_decoded_token_equal_torchs_count_exactly(name, options):
    model = build(name, **options)
    for context in (2, 20):
        cache = model.new_cache(2, context)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(tokens(2, context - 1), cache=cache)
            with FlopCounterMode(display=False) as counter:
                model(tokens(2, 1, seed=2), cache=cache)
        want = 2 * sum(flops.decode_flops(name, model.config, context).values()) + padding(name, model.config, 2)
        assert counter.get_total_flops() == want


@pytest.mark.parametrize("name", ["baseline", "gpt2"])
def test_causal_flops_are_those_of_decoding_one_token_after_the_other(name):
    """There each query meets only the keys that it may see, and the rest costs the same as in a full pass."""
    model = build(name)
    cache, idx = model.new_cache(1, 7), tokens(1, 7)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for t in range(7):
            model(idx[:, t : t + 1], cache=cache)
    assert counter.get_total_flops() == 7 * sum(flops.forward_flops(name, model.config, 7, causal=True).values())


@pytest.mark.parametrize("name", MODELS)
def test_causal_attention_is_the_mean_over_queries_and_the_rest_is_the_same(name):
    config = build(name).config
    full, causal = flops.forward_flops(name, config, T), flops.forward_flops(name, config, T, causal=True)
    keys = [flops.forward_flops(name, config, t)["attention"] for t in range(1, T + 1)]
    assert causal["attention"] * T == sum(keys) and 0 < causal["attention"] < full["attention"]
    assert {k: v for k, v in full.items() if k != "attention"} == {k: v for k, v in causal.items() if k != "attention"}


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


@pytest.mark.parametrize(("name", "options"), CASES)
def test_cache_and_state_bytes_are_all_that_a_cache_holds(name, options):
    model, c = build(name, **options), build(name, **options).config
    for width, kind in ((4, torch.float32), (2, torch.bfloat16)):
        held = sum(x.nbytes for x in cache_tensors(model.to(kind).new_cache(3, 16)))
        assert held == 3 * (16 * flops.cache_bytes_per_token(name, c, width) + flops.state_bytes(name, c, width))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_weights_read_and_active_are_those_that_move_a_decoded_tokens_logits(name, options):
    # Not so bold that GELU's gradient would be 0; and of gates that sum to 1 only the chosen ones have a gradient.
    model = build(name, bold=False, **options, **(dict(normalize_gates=False) if name == "moe" else {}))
    cache = model.new_cache(1, 8)
    with torch.no_grad():
        model(tokens(1, 7), cache=cache)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        model(torch.tensor([[5]]), cache=cache).square().sum().backward()
    moved = {name: p.grad.count_nonzero().item() for name, p in model.named_parameters()}
    want, tied = flops.weights_read(name, model.config, 1), getattr(model, "lm_head", None) is None
    # A tied embedding is one matrix, of which the head reads all and the embedding a row: the gradient counts it once.
    assert sum(moved.values()) == pytest.approx(want - tied * model.config.n_embd)
    experts = sum(count for key, count in moved.items() if "mlp.w_" in key and model.get_parameter(key).ndim == 3)
    count, active = flops.parameters(name, model.config), flops.active_parameters(name, model.config)
    assert experts == active.get("experts", 0) and count | {"experts": 0} == active | {"experts": 0}


def test_a_batch_reads_as_many_experts_as_a_uniform_choice_meets():
    config, rng = build("moe", n_expert=32, n_expert_per_token=4).config, random.Random(0)
    per_expert = flops.parameters("moe", config)["experts"] / 32
    rest = flops.weights_read("moe", config, 1) - 4 * per_expert - config.n_embd
    for batch in (1, 6, 100):
        draws = [{e for _ in range(batch) for e in rng.sample(range(32), 4)} for _ in range(1000)]
        met = sum(map(len, draws)) / len(draws)
        assert flops.weights_read("moe", config, batch) == pytest.approx(
            rest + met * per_expert + batch * config.n_embd, rel=5e-3
        )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_of_weights_gradients_and_optimizer_equals_that_of_a_real_step(name, optimizer):
    options = {"moe": dict(n_shared_expert=1, shared_gate=True), "hybrid": dict(qkv_gates="q")}.get(name, {})
    model = build(name, **options, **(dict(tie_embeddings=False) if name != "gpt2" else {}))
    opt = muon.make_optimizer(model, optimizer)
    model(tokens(2, 8), tokens(2, 8)).backward()
    for p in model.parameters():  # of experts that nobody chose
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    opt.step()
    state = sum(x.nbytes for held in opt.state.values() for key, x in held.items() if key != "step")
    found = flops.memory(name, model.config, 8, 4, 2, optimizer)
    assert found["optimizer_bytes"] == state
    assert found["weight_bytes"] == found["gradient_bytes"] == sum(p.nbytes for p in model.parameters())


LARGER = {  # wide enough for what the formulas leave out to be small, at widths that fused attention and experts take
    "baseline": dict(n_head=6, n_kv_head=2, head_dim=16, n_embd=80, n_inner=208),
    "gpt2": dict(n_head=5, n_embd=80),
    "moe": dict(n_head=6, n_kv_head=2, head_dim=16, n_embd=80, n_inner=208, n_expert=8, n_expert_inner=48),
    "mla": dict(n_head=6, kv_rank=24, q_rank=0, nope_dim=16, rope_dim=8, v_dim=24, n_embd=80, n_inner=208),
    "hybrid": dict(n_head=6, n_kv_head=2, head_dim=16, n_embd=80, n_inner=208, key_dim=24, value_dim=28),
}
KEPT_CASES = [(name, {}) for name in LARGER] + [
    ("baseline", dict(qk_norm=False, tie_embeddings=False, logit_softcap=15.0)),
    ("moe", dict(n_dense_layer=0, n_shared_expert=2, shared_gate=True, n_expert_per_token=3)),
    ("moe", dict(n_shared_expert=1, n_expert_inner=80)),
    ("mla", dict(q_rank=48, kv_rank=64)),
    ("hybrid", dict(layer_pattern="a", output_gate="head", qkv_gates="qkv")),
    ("hybrid", dict(layer_pattern="a", output_gate="none", qk_norm=False, qkv_gates="v")),
    ("hybrid", dict(layer_pattern="d", n_key_head=4, n_value_head=8, key_dim=16)),
]


def measured(model, width, B=8):
    """(bytes of the casts of weights, of all else) that autograd holds after a forward pass, each storage once."""
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    shapes = {p.shape for p in model.parameters()} | {p.mT.shape for p in model.parameters() if p.ndim == 2}
    held, idx = {}, tokens(B, model.config.block_size)

    def pack(x):
        if x.untyped_storage().data_ptr() not in known:
            held[x.untyped_storage().data_ptr()] = x  # kept, or its address would be taken again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=width == 2):
            model(idx, idx)
    casts = sum(x.untyped_storage().nbytes() for x in held.values() if x.dtype == torch.bfloat16 and x.shape in shapes)
    return casts, sum(x.untyped_storage().nbytes() for x in held.values()) - casts


@pytest.mark.parametrize("width", [4, 2])
@pytest.mark.parametrize(("name", "options"), KEPT_CASES)
def test_activation_bytes_are_within_3_percent_of_what_autograd_saves(name, options, width):
    model = build(name, bold=False, block_size=128, vocab_size=512, **LARGER[name] | options).train()
    casts, rest = measured(model, width)
    assert flops.activation_bytes(name, model.config, 128, 8, width) == pytest.approx(rest, rel=0.03)
    assert flops.memory(name, model.config, 128, width, 8)["cast_weight_bytes"] == pytest.approx(casts, rel=0.001)


def test_recomputed_blocks_leave_their_inputs_and_one_block():
    options = dict(block_size=128, vocab_size=512, bold=False, **LARGER["baseline"])
    _, one = measured(build("baseline", n_layer=1, **options), 4)
    config = build("baseline", n_layer=6, **options).config
    want = one + 5 * 8 * 128 * 80 * 4  # inputs (8, 128, 80) of the other five blocks
    assert flops.activation_bytes("baseline", config, 128, 8, 4, recompute=True) == pytest.approx(want, rel=0.04)


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


def test_the_released_mixture_of_30b_has_3b_at_work():
    """Qwen3-30B-A3B: 30.5B parameters in total, 3.3B activated, as its model card says."""
    sizes = dict(n_layer=48, n_embd=2048, n_head=32, n_kv_head=4, head_dim=128, vocab_size=151936, block_size=4096)
    experts = dict(n_expert=128, n_expert_per_token=8, n_expert_inner=768, tie_embeddings=False)
    config = module("moe").GPTConfig(**sizes, **experts)
    assert round(sum(flops.parameters("moe", config).values()) / 1e9, 1) == 30.5
    assert sum(flops.active_parameters("moe", config).values()) / 1e9 == pytest.approx(3.3, abs=0.06)


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


def test_memory_bandwidth_is_that_of_the_same_device():
    known = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H100 PCIe": 2.0e12, "NVIDIA L4": 0.3e12,
             "NVIDIA A100-SXM4-40GB": 1.555e12, "NVIDIA A100-SXM4-80GB": 2.0e12, "A100 80GB": 2.0e12}  # fmt: skip
    assert {name: flops.known_gpu(name)[3] for name in known} == known


# ---- equal cost -----------------------------------------------------------------------------------------------------
KEEP = ("n_layer", "n_dense_layer", "n_expert_per_token")
WIDE = {name: {key: 4 * value if type(value) is int and key not in KEEP else value for key, value in options.items()}
        for name, options in TINY.items()}  # fmt: skip


def fields_of(name, **options):
    return asdict(module(name).GPTConfig(vocab_size=512, block_size=BLOCK, **WIDE[name] | options))


@pytest.mark.parametrize(
    ("name", "knob", "aim"),
    [("baseline", "n_inner", 300), ("baseline", "n_embd", 200), ("moe", "n_expert_inner", 100), ("mla", "n_inner", 333),
     ("mla", "kv_rank", 100), ("hybrid", "n_inner", 320), ("hybrid", "value_dim", 40), ("gpt2", "n_embd", 256),
     ("gpt2", "n_layer", 5)],
)  # fmt: skip
def test_a_matched_size_brings_the_real_models_flops_within_half_a_percent(name, knob, aim):
    T, fields, config = 24, fields_of(name), module(name).GPTConfig
    target = 1.002 * flops.training_flops_per_token(name, config(**fields | {knob: aim}), T)
    value, reached = flops.match(name, fields, T, target, knob)
    model = module(name).GPT(config(**fields | {knob: value})).eval()
    assert 3 * (counted(model, False) - padding(name, model.config, 2 * T)) / (2 * T) == reached
    assert abs(reached / target - 1) <= 0.005 and value != fields[knob]


@pytest.mark.parametrize("name", MODELS)
def test_a_match_by_parameters_is_one_of_the_real_model(name):
    knob = flops.WIDTH_KNOB.get(name, "n_inner")
    target = sum(flops.parameters(name, module(name).GPTConfig(**fields_of(name, **{knob: 640}))).values()) * 1.003
    everything = {"model": name, "learning_rate": 1.0, "max_steps": 3} | fields_of(name)  # as `resolve` returns it
    value, reached = flops.match(name, everything, T, target, knob, by="parameters")
    with torch.device("meta"):
        model = module(name).GPT(module(name).GPTConfig(**fields_of(name, **{knob: value})))
    assert sum(p.numel() for p in model.parameters()) == reached and abs(reached / target - 1) <= 0.005


@pytest.mark.parametrize(("knob", "span"), [("n_inner", 3000), ("n_embd", 600), ("n_layer", 60), ("n_kv_head", 16)])
def test_a_match_is_found_where_trying_every_value_finds_one_and_else_the_nearest_is_named(knob, span):
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


def test_a_match_is_refused_where_the_knob_is_none_or_the_model_has_no_formula():
    with pytest.raises(ValueError, match="'dropout' is no size of baseline: try one of vocab_size.*n_inner"):
        flops.match("baseline", fields_of("baseline"), T, 1e6, "dropout")
    with pytest.raises(ValueError, match="no formula for 'mine', only for baseline, gpt2"):
        flops.match("mine", fields_of("baseline"), T, 1e6, "n_inner")


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
    assert found["training"] == {"tokens": tokens, "flops": tokens * total["training_flops"],
                                 "flops_causal": tokens * total["training_flops_causal"]}  # fmt: skip
    needs = flops.memory("moe", config, T, 4, 32)
    assert found["memory"].items() >= needs.items() and found["memory"]["total_bytes"] == sum(needs.values())
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
    assert found["memory"].items() >= flops.memory("moe", config, 1024, 2, 3, "adamw").items()
    again, _ = report(MOE, "--n_expert=64", "--gradient_checkpointing", "--micro_batch=3", "--optimizer=adamw")
    assert again["memory"]["activation_bytes"] == flops.activation_bytes("moe", config, 1024, 3, 4, recompute=True)


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
    found, lines = report(f"--data={tmp_path}/none")
    assert found["config"]["vocab_size"] == 50304
    assert lines[0] == f"{tmp_path}/none/meta.json is not here: vocab_size is taken to be 50,304"


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
        ("--model=mine", "unknown model 'mine'; the model_*.py files here give: baseline, gpt2"),
        ("--device B300X", "--device B300X is not known here: try one of B200, H200, H100"),
        ("--mfu 0", "--mfu 0.0: a share of the peak is above 0 and at most 1"),
        ("--mfu 1.5", "--mfu 1.5: a share of the peak"),
        ("--mfu fast", "argument --mfu: invalid float value"),
        ("--batch 0", "--batch 0 --context 0: try 1 or more"),
        ("--vocab_size=64 --context 2000", "--batch 1 --context 2000: try 1 or more, and up to block_size=1024"),
        ("--n_inne=3", "unknown config key 'n_inne' on the command line; did you mean 'n_inner'?"),
        ("--n_head=12 --n_kv_head=5", "n_head=12 is not divisible by n_kv_head=5"),
        (f"{MOE} --match {MOE} --knob dropout", "'dropout' is no size of moe: try one of vocab_size"),
        (f"{MOE} --match {ROOT}/config/qwen3_0.6b.py --knob n_expert", "n_expert brings moe not to 6.39"),
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


def test_a_model_file_without_formulas_is_refused(report, tmp_path, monkeypatch, capsys):
    (tmp_path / "model_mine.py").write_text((ROOT / "model_baseline.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        report("--model=mine")
    assert capsys.readouterr().err.startswith("error: flops.py has no formula for model_mine.py, only for baseline")


def test_the_answer_needs_no_torch_and_so_no_seconds():
    code = "import sys, flops; flops.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, MOE, "--device=H200", "--match", MOE], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0 and b"--n_expert_inner=256" in done.stdout
