"""What is special to model_hybrid.py: the delta rule in both forms, its documents, state and first decay; the gates."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flops
from model_hybrid import GPT, GPTConfig, chunked_delta_rule, recurrent_delta_rule
from muon import make_optimizer
from tests.test_models import run_in_pieces
from tests.tiny import EOT, build, cache_tensors, module, tokens


def inputs(B=2, H=3, T=130, Dk=8, Dv=6, decay=0.5, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, dtype=dtype) for D in (Dk, Dk, Dv))
    log_decay, beta = -decay * torch.rand(B, H, T, dtype=dtype), torch.rand(B, H, T, dtype=dtype)
    first = torch.zeros(B, 1, T, dtype=torch.bool)
    first[0, 0, [0, 5, 6, 63, 64, 100]] = first[1, 0, 127] = True
    return (
        F.normalize(q, dim=-1),
        F.normalize(k, dim=-1),
        v,
        log_decay,
        beta,
        first,
        torch.randn(B, H, Dk, Dv).to(dtype),
    )


def slowly(q, k, v, log_decay, beta, first, state):
    """One row, one head, one token at a time, as the paper writes it."""
    y, last = torch.empty_like(v), torch.empty_like(state)
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            S = state[b, h]
            for t in range(q.size(2)):
                S = torch.zeros_like(S) if first[b, 0, t] else S * math.exp(log_decay[b, h, t])
                erased = S - beta[b, h, t] * torch.outer(k[b, h, t], k[b, h, t] @ S)
                S = erased + beta[b, h, t] * torch.outer(k[b, h, t], v[b, h, t])
                y[b, h, t] = q[b, h, t] @ S
            last[b, h] = S
    return y, last


def test_the_chunked_and_the_recurrent_delta_rule_equal_a_slow_loop():
    given = inputs()
    want_y, want_state = slowly(*given)
    for chunk in (1, 7, 16, 64, 256):
        y, state = chunked_delta_rule(*given, chunk=chunk)
        torch.testing.assert_close(y, want_y, atol=1e-10, rtol=0)
        torch.testing.assert_close(state, want_state, atol=1e-10, rtol=0)
    *series, state = given
    for t in range(130):
        y, state = recurrent_delta_rule(*(x[:, :, t : t + 1] for x in series), state)
        torch.testing.assert_close(y, want_y[:, :, t : t + 1], atol=1e-10, rtol=0)
    torch.testing.assert_close(state, want_state, atol=1e-10, rtol=0)


def test_the_chunked_delta_rule_stays_finite_and_exact_whatever_the_decay():
    for decay in (0.0, 1e-4, 20.0, 500.0):
        given = [x.float() if x.is_floating_point() else x for x in inputs(decay=decay)]
        given = [x.requires_grad_() if x.is_floating_point() else x for x in given]
        y, state = chunked_delta_rule(*given)
        want, want_state = slowly(*(x.detach().double() if x.is_floating_point() else x for x in given))
        torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(state.double(), want_state, atol=1e-5, rtol=0)
        for gradient in torch.autograd.grad(y.square().sum(), [x for x in given if x.requires_grad]):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("pattern", ["d", "da"])
def test_documents_stay_apart_across_chunks_and_left_padding_leaves_no_trace(pattern):
    model = build("hybrid", eot_id=EOT, block_size=256, layer_pattern=pattern).double()
    documents = [torch.cat((torch.tensor([EOT]), tokens(n, seed=n))) for n in (63, 2, 1, 90, 40)]  # 64 ends a chunk
    packed, alone = torch.cat(documents)[None], torch.cat([model(d[None])[0] for d in documents])
    torch.testing.assert_close(model(packed)[0], alone, atol=1e-9, rtol=0)
    torch.testing.assert_close(run_in_pieces(model, packed, [65, 1, 1, 70, 64])[0], alone, atol=1e-9, rtol=0)
    model = build("hybrid", block_size=256, layer_pattern=pattern).double()
    x, padding = tokens(1, 80), tokens(1, 70, seed=3)
    got = run_in_pieces(model, torch.cat((padding, x), dim=1), [66, 80, 1, 3], pad=torch.tensor([70]))
    torch.testing.assert_close(got[:, 70:], model(x), atol=1e-9, rtol=0)


def test_prefill_in_chunks_of_64_and_decoding_equal_the_full_forward():
    model, x = build("hybrid", block_size=256, layer_pattern="d").double(), tokens(2, 200)
    got = run_in_pieces(model, x, [130, 1, 1, 66, 1, 1])
    torch.testing.assert_close(got, model(x), atol=1e-9, rtol=0)


def test_a_fresh_layer_remembers_and_its_decay_is_not_shrunk_by_weight_decay():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, n_layer=4, n_embd=64, n_inner=64, n_key_head=64, n_value_head=64, key_dim=2))
    decay = torch.cat([torch.exp(-b.delta.A_log.exp() * F.softplus(b.delta.dt_bias)) for b in model.blocks if b.delta])
    assert 0.85 < decay.median() < 0.97
    assert decay.max() > 0.99 and decay.min() < 0.6  # heads that remember long, and heads that do not
    dt = torch.cat([F.softplus(b.delta.dt_bias) for b in model.blocks if b.delta])
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() < 0.1001 and abs(dt.log().mean() - math.log(0.01)) < 0.3
    for group in make_optimizer(model, weight_decay=0.1).param_groups:
        ids = {id(p) for p in group["params"]}
        for name, p in model.named_parameters():
            if id(p) in ids and name.endswith(("A_log", "dt_bias", "o_norm", "conv.weight")):
                assert group["method"] == "adamw" and (group["weight_decay"] == 0 or "conv" in name)


def test_the_cache_grows_by_the_attention_layers_alone_and_the_state_does_not_grow():
    model = build("hybrid", n_layer=6, layer_pattern="dda")
    short, long = model.new_cache(3, 16), model.new_cache(3, 64)
    per_token = 2 * 2 * 2 * 8 * 4  # k and v, 2 layers, 2 heads of 8, 4 bytes
    state = 4 * (4 * 8 * 6 + 3 * (2 * 2 * 8 + 4 * 6)) * 4  # 4 layers: 4 heads of 8 x 6, 3 inputs of 56 channels
    for cache, max_len in ((short, 16), (long, 64)):
        assert cache.bytes_per_token() == per_token == flops.cache_bytes_per_token("hybrid", model.config, 4)
        assert cache.state_bytes() == state
        assert sum(x.nbytes for x in cache_tensors(cache)) == 3 * (max_len * per_token + state)
    half = model.bfloat16().new_cache(1, 8)
    assert half.state[0].dtype == torch.float32 and half.tail[0].dtype == half.k[0].dtype == torch.bfloat16


def test_autocast_leaves_the_delta_rule_in_fp32(monkeypatch):
    model, seen = build("hybrid"), []

    def spy(*args):
        seen.extend([x.dtype for x in args if x.is_floating_point()] + [(args[0] @ args[1].mT).dtype])
        return chunked_delta_rule(*args)

    monkeypatch.setattr(module("hybrid"), "chunked_delta_rule", spy)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(1, 20))
    assert set(seen) == {torch.float32} and len(seen) == 7 and logits.isfinite().all()


def test_each_gate_is_the_identity_where_it_is_open():
    plain = build("hybrid", layer_pattern="a", output_gate="none").double()
    x, D = tokens(2, 20), plain.config.head_dim
    for output_gate, qkv_gates in (("head", ""), ("element", ""), ("none", "q"), ("none", "k"), ("none", "vqk")):
        gated = build("hybrid", layer_pattern="a", output_gate=output_gate, qkv_gates=qkv_gates).double()
        weights = plain.state_dict()
        for name, p in gated.named_parameters():
            if name in weights and name.endswith("wq.weight"):
                p.data.view(4, -1, 32)[:, :D] = weights[name].view(4, D, 32)
            elif name in weights:
                p.data.copy_(weights[name])
        assert (gated(x) - plain(x)).abs().max() > 1e-3
        for block in gated.blocks:
            for w in (block.attn.gates[i] for i, part in enumerate("qkv") if part in qkv_gates):
                w.register_forward_hook(lambda module, args, y: torch.full_like(y, 50.0))
            block.attn.wq.register_forward_hook(
                lambda module, args, y: torch.cat(
                    (y.unflatten(-1, (4, -1))[..., :D], torch.full_like(y.unflatten(-1, (4, -1))[..., D:], 50.0)),
                    dim=-1,
                ).flatten(2)
            )
        torch.testing.assert_close(gated(x), plain(x), atol=1e-12, rtol=0)


def test_a_gate_per_head_is_a_gate_per_element_with_equal_rows():
    head, element = (build("hybrid", layer_pattern="a", output_gate=gate).double() for gate in ("head", "element"))
    weights = head.state_dict()
    for name, p in element.named_parameters():
        w = weights[name]
        if name.endswith("wq.weight"):
            w = w.view(4, 9, 32)
            w = torch.cat((w[:, :8], w[:, 8:].expand(-1, 8, -1)), dim=1).flatten(0, 1)
        p.data.copy_(w)
    x = tokens(2, 20)
    torch.testing.assert_close(element(x), head(x), atol=1e-12, rtol=0)


def test_attention_in_every_layer_without_gates_and_with_full_rotation_is_the_baseline():
    ours = build("hybrid", layer_pattern="a", output_gate="none", rotary_fraction=1.0)
    baseline = build("baseline")
    weights = {k: v + 1 if k.endswith("norm.weight") else v for k, v in ours.state_dict().items()}
    baseline.load_state_dict(weights)
    x = tokens(2, 30)
    torch.testing.assert_close(ours(x), baseline(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("T", [64, 192, 33, 100])
@pytest.mark.parametrize(
    "more", [{}, dict(output_gate="head", qkv_gates="qv", tie_embeddings=False, layer_pattern="aad")]
)
def test_flops_and_parameters_equal_their_formulas(T, more):
    model = build("hybrid", n_layer=4, block_size=256, **dict(layer_pattern="ddda") | more)
    assert sum(flops.parameters("hybrid", model.config).values()) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens(1, T))
    want = flops.FORMULAS["hybrid"](model.config, T)
    assert abs(counter.get_total_flops() - T * sum(cost for cost, _ in want.values())) < T  # rounded down per token


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(layer_pattern="dxa"), "layer_pattern='dxa'.*n_layer=3.*d or a"),
        (dict(layer_pattern="ddda"), "layer_pattern='ddda'.*1 to n_layer=3"),
        (dict(layer_pattern=""), "layer_pattern=''"),
        (dict(n_value_head=5), "n_value_head=5 is not a multiple of n_key_head=2"),
        (dict(rotary_fraction=0.375), "3 of head_dim=8"),
        (dict(rotary_fraction=1.5), "12 of head_dim=8"),
        (dict(rotary_fraction=0.0), "0 of head_dim=8"),
        (dict(output_gate="heads"), "output_gate='heads'.*none, head or element"),
        (dict(qkv_gates="qz"), "qkv_gates='qz'.*letters of qkv"),
    ],
)
def test_bad_options_are_refused_with_the_numbers(options, words):
    with pytest.raises(ValueError, match=words):
        build("hybrid", n_layer=3, **options)


def test_folders_with_experts_and_gates_that_qwen3_next_lacks_are_refused(tmp_path):
    import json

    build("hybrid").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["layer_types"] == ["linear_attention", "full_attention"]
    for change, words in (
        (dict(mlp_only_layers=[1]), r"mlp_only_layers=\[1\].*only \[0, 1\]"),
        (dict(model_type="qwen3"), "model_type"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=words):
            GPT.from_pretrained(tmp_path)
    without = {k: v for k, v in config.items() if k != "layer_types"}
    path.write_text(json.dumps(without | dict(full_attention_interval=2)))
    assert GPT.from_pretrained(tmp_path).config.layer_pattern == "da"
    for options in (dict(output_gate="head"), dict(qkv_gates="v"), dict(qk_norm=False)):
        with pytest.raises(ValueError, match=next(iter(options))):
            build("hybrid", **options).save_pretrained(tmp_path / "x")
