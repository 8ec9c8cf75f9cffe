"""What is special to model_hybrid.py: the delta rule in both forms, its state and decay; one matrix, one job."""

import math

import pytest
import torch
import torch.nn.functional as F

import flops
import model_hybrid
import muon
from model_hybrid import GPT, GatedDelta, GPTConfig, RMSNorm, chunked_delta_rule, recurrent_delta_rule
from tests.test_gated import LAYER, SIZES, TOP, exact, oracle, renamed
from tests.test_models import run_in_pieces
from tests.tiny import EOT, build, cache_tensors, tokens
from training import checkpoint
from training.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers")


# ---- the delta rule --------------------------------------------------------------------------------------------------


def inputs(B=2, H=3, T=130, Dk=8, Dv=6, decay=0.5, dtype=torch.float64):
    torch.manual_seed(0)
    q = F.normalize(torch.randn(B, H, T, Dk, dtype=dtype), dim=-1)
    k = F.normalize(torch.randn(B, H, T, Dk, dtype=dtype), dim=-1)
    v = torch.randn(B, H, T, Dv, dtype=dtype)
    log_decay = -decay * torch.rand(B, H, T, dtype=dtype)
    beta = torch.rand(B, H, T, dtype=dtype)
    first = torch.zeros(B, 1, T, dtype=torch.bool)
    first[0, 0, [t for t in (0, 5, 6, 63, 64, 100) if t < T]] = True
    first[1, 0, [t for t in (127,) if t < T]] = True
    state = torch.randn(B, H, Dk, Dv, dtype=dtype)
    return q, k, v, log_decay, beta, first, state


def slowly(q, k, v, log_decay, beta, first, state):
    """One row, one head, one token at a time, as the paper writes it."""
    y = torch.empty_like(v)
    last = torch.empty_like(state)
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


def test_a_chunk_of_two_tokens_is_the_one_in_the_docstring():
    q, k, v, log_decay, beta, first, M = inputs(B=2, H=1, T=2)
    y, state = chunked_delta_rule(q, k, v, log_decay, beta, torch.zeros_like(first), M)
    q1, q2 = q[0, 0]
    k1, k2 = k[0, 0]
    v1, v2 = v[0, 0]
    d1, d2 = log_decay[0, 0].exp()
    beta1, beta2 = beta[0, 0]
    M = M[0, 0]
    u1 = beta1 * (v1 - d1 * M.T @ k1)
    u2 = beta2 * (v2 - d2 * d1 * M.T @ k2 - d2 * (k2 @ k1) * u1)
    y1 = d1 * M.T @ q1 + (q1 @ k1) * u1
    y2 = d2 * d1 * M.T @ q2 + d2 * (q2 @ k1) * u1 + (q2 @ k2) * u2
    torch.testing.assert_close(y[0, 0], torch.stack((y1, y2)), atol=1e-12, rtol=0)
    left = d2 * d1 * M + d2 * torch.outer(k1, u1) + torch.outer(k2, u2)
    torch.testing.assert_close(state[0, 0], left, atol=1e-12, rtol=0)


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


@pytest.mark.parametrize("T", [1, 130])
def test_a_decay_of_nothing_to_zero_forgets_and_gives_no_nan(T):
    q, k, v, log_decay, beta, first, state = inputs(T=T)
    log_decay[:, :, [t for t in (0, 3, 64, 65, 129) if t < T]] = -math.inf
    given = [q, k, v, log_decay, beta, first, state]
    want, want_state = slowly(*given)
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in given]
    rule = GatedDelta(build("hybrid").config, 0).delta_rule
    y, last = rule(*given)
    torch.testing.assert_close(y, want, atol=1e-10, rtol=0)
    torch.testing.assert_close(last, want_state, atol=1e-10, rtol=0)
    for gradient in torch.autograd.grad(y.square().sum(), [x for x in given if x.requires_grad]):
        assert gradient.isfinite().all()


def test_one_token_takes_the_recurrent_form_and_more_the_chunked_one(monkeypatch):
    seen = []
    for name in ("recurrent_delta_rule", "chunked_delta_rule"):
        real = getattr(model_hybrid, name)
        monkeypatch.setattr(model_hybrid, name, lambda *a, name=name, real=real: seen.append(name) or real(*a))
    run_in_pieces(build("hybrid", layer_pattern="d", n_layer=1), tokens(1, 5), [1, 2, 1, 1])
    assert seen == [f"{form}_delta_rule" for form in ("recurrent", "chunked", "recurrent", "recurrent")]


@pytest.mark.slow  # the contract traces a forward pass for any length, of one chunk
def test_the_chunked_delta_rule_compiled_for_any_length_has_the_gradients_of_the_eager_one():
    torch._dynamo.reset()
    compiled = torch.compile(chunked_delta_rule, backend="aot_eager", dynamic=True, fullgraph=True)
    for T in (100, 120):  # 2 chunks
        given = [x.requires_grad_() if x.is_floating_point() else x for x in inputs(B=2, H=1, T=T)]
        wanted = [x for x in given if x.requires_grad]
        got = torch.autograd.grad(compiled(*given)[0].square().sum(), wanted)
        want = torch.autograd.grad(chunked_delta_rule(*given)[0].square().sum(), wanted)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


# ---- the layer -------------------------------------------------------------------------------------------------------


def test_norms_of_a_bf16_model_are_exact_until_they_are_rounded():
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-6).bfloat16()
    norm.weight.data = (0.1 * torch.randn(64)).bfloat16()
    x = torch.randn(50, 64).bfloat16()
    want = F.rms_norm(x.double(), (64,), eps=1e-6) * (1 + norm.weight.double())
    least_error = (want.bfloat16() - want).abs() + 1e-6
    assert norm(x).dtype == torch.bfloat16
    assert ((norm(x) - want).abs() <= least_error).all()
    in_bf16 = F.rms_norm(x, (64,), eps=1e-6) * (1 + norm.weight)
    assert ((in_bf16 - want).abs() > least_error).float().mean() > 0.3


def test_taps_of_a_bf16_model_are_summed_in_fp32():
    delta = GatedDelta(build("hybrid").config, 0).bfloat16()
    delta.conv.weight.data = torch.randn_like(delta.conv.weight)
    x = torch.randn(2, 3 + 20, delta.conv.weight.size(0)).bfloat16()
    want = F.conv1d(x.double().mT, delta.conv.weight.double(), groups=x.size(-1)).mT
    got = delta.convolve(x, torch.arange(3, 23))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)  # sums in bf16 would be off by 0.03


def test_autocast_leaves_the_delta_rule_in_fp32():
    model = build("hybrid")
    delta = model.blocks[0].delta
    rule = delta.delta_rule
    seen = []

    def spy(*given):
        seen.extend(x.dtype for x in given if x.is_floating_point())
        seen.append((given[0] @ given[1].mT).dtype)
        return rule(*given)

    delta.delta_rule = spy
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(1, 20))
    assert set(seen) == {torch.float32} and len(seen) == 7 and logits.isfinite().all()


def test_a_fresh_layer_remembers_and_its_decay_is_not_shrunk_by_weight_decay():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, n_layer=4, n_embd=64, n_inner=64, n_key_head=64, n_value_head=64, key_dim=2))
    layers = [block.delta for block in model.blocks if block.delta is not None]
    assert len(layers) == 3
    decay = torch.cat([torch.exp(-layer.A_log.exp() * F.softplus(layer.dt_bias)) for layer in layers])
    assert 0.85 < decay.median() < 0.97
    assert decay.max() > 0.99 and decay.min() < 0.6  # heads that remember long, and heads that do not
    dt = torch.cat([F.softplus(layer.dt_bias) for layer in layers])
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() < 0.1001 and abs(dt.log().mean() - math.log(0.01)) < 0.3
    checked = 0
    for group in muon.make_optimizer(model, weight_decay=0.1).param_groups:
        ids = {id(p) for p in group["params"]}
        for name, p in model.named_parameters():
            if id(p) in ids and name.endswith(("A_log", "dt_bias", "o_norm", "conv.weight")):
                assert group["method"] == "adamw" and (group["weight_decay"] == 0 or "conv" in name)
                checked += 1
    assert checked == 4 * 3


# ---- documents and the cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["d", "da"])
def test_documents_stay_apart_across_chunks_and_left_padding_leaves_no_trace(pattern):
    model = build("hybrid", eot_id=EOT, block_size=256, layer_pattern=pattern).double()
    documents = [torch.cat((torch.tensor([EOT]), tokens(n, seed=n))) for n in (63, 2, 1, 90, 40)]  # 64 ends a chunk
    packed = torch.cat(documents)[None]
    alone = torch.cat([model(d[None])[0] for d in documents])
    torch.testing.assert_close(model(packed)[0], alone, atol=1e-9, rtol=0)
    torch.testing.assert_close(run_in_pieces(model, packed, [65, 1, 1, 70, 64])[0], alone, atol=1e-9, rtol=0)
    model = build("hybrid", block_size=256, layer_pattern=pattern).double()
    x = tokens(1, 80)
    padded = torch.cat((tokens(1, 70, seed=3), x), dim=1)
    for static in (False, True):
        got = run_in_pieces(model, padded, [66, 80, 1, 3], torch.tensor([70]), static)
        torch.testing.assert_close(got[:, 70:], model(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("static", [False, True])
def test_prefill_in_chunks_of_64_and_decoding_equal_the_full_forward(static):
    model = build("hybrid", block_size=256, layer_pattern="d").double()
    x = tokens(2, 200)
    got = run_in_pieces(model, x, [130, 1, 1, 66, 1, 1], static=static)
    torch.testing.assert_close(got, model(x), atol=1e-9, rtol=0)


def test_the_cache_grows_by_the_attention_layers_alone_and_the_state_does_not_grow():
    model = build("hybrid", n_layer=6, layer_pattern="dda")
    per_token = 2 * 2 * 2 * 16 * 4  # k and v, 2 layers, 2 heads of 16, 4 bytes
    state = 4 * (4 * 16 * 12 + 3 * (2 * 2 * 16 + 4 * 12)) * 4  # 4 layers: 4 heads of 16 x 12, 3 inputs of 112 channels
    for max_len in (16, 64):
        cache = model.new_cache(3, max_len)
        assert cache.bytes_per_token() == per_token == flops.cache_bytes_per_token("hybrid", model.config, 4)
        assert cache.state_bytes() == state == flops.state_bytes("hybrid", model.config, 4)
        assert sum(x.nbytes for x in cache_tensors(cache)) == 3 * (max_len * per_token + state)
    half = model.bfloat16().new_cache(1, 8)
    assert half.state[0].dtype == torch.float32 and half.tail[0].dtype == half.k[0].dtype == torch.bfloat16


@pytest.mark.parametrize("static", [False, True])
def test_a_state_is_rewound_to_nothing_or_not_at_all(static):
    model = build("hybrid").double()
    x = tokens(2, 12)
    cache = model.new_cache(2, 12, static=static)
    want = model(x, cache=cache)
    kept = cache.branch(1)
    with pytest.raises(ValueError, match="the state of 12 tokens cannot be rewound to 11"):
        cache.rewind(11)
    cache.rewind(12)  # forgets nothing
    for a, b in zip(cache_tensors(cache), cache_tensors(kept)):
        assert torch.equal(a, b)
    cache.rewind(0)
    assert not any(x.any() for x in cache.state + cache.tail) and all(x.any() for x in kept.state + kept.tail)
    torch.testing.assert_close(model(x, cache=cache), want, atol=1e-9, rtol=0)
    attention = build("hybrid", layer_pattern="a").double()  # which has no state
    cache = attention.new_cache(2, 12, static=static)
    attention(tokens(2, 12, seed=3), cache=cache)
    cache.rewind(0)
    want = attention(x, cache=cache)
    cache.rewind(5)
    torch.testing.assert_close(attention(x[:, 5:], cache=cache), want[:, 5:], atol=1e-9, rtol=0)


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [64, 192, 33, 100])
@pytest.mark.parametrize(
    "options", [{}, dict(output_gate="head", qkv_gates="qv", tie_embeddings=False, layer_pattern="aad")]
)
def test_flops_of_a_token_and_parameters_are_those_of_the_closed_form(T, options):
    c = build("hybrid", n_layer=4, block_size=256, **dict(layer_pattern="ddda") | options).config
    C, H, G, D, V = c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.vocab_size
    Hk, Hv, Dk, Dv = c.n_key_head, c.n_value_head, c.key_dim, c.value_dim
    n_delta = c.layer_pattern.count("d")
    n_attention = c.layer_pattern.count("a")
    L = min(64, T)
    padded = -(-T // L) * L / T  # tokens that are computed for each that is there
    gates = H * D
    if options:
        gates = H + H * D + G * D
    delta = n_delta * C * (2 * Hk * Dk + 3 * Hv * Dv + 2 * Hv)
    attention = n_attention * C * (2 * H * D + 2 * G * D + gates)
    rule = 4 * L * Dk + 2 * L * Dv + 6 * Dk * Dv  # of chunks, by matmuls
    solve = L * (Dk + Dv)
    assert flops.forward_flops("hybrid", c, T) == {
        "delta": 2 * delta,
        "delta between tokens": pytest.approx(n_delta * Hv * padded * (rule + solve), rel=1e-12),
        "attn": 2 * attention,
        "attn between tokens": 4 * n_attention * T * H * D,
        "mlp": 2 * 4 * 3 * C * c.n_inner,
        "head": 2 * C * V,
    }
    parameters = {
        "embed": V * C,
        "delta": delta + n_delta * (2 * Hv + Dv),
        "delta.conv": n_delta * 4 * (2 * Hk * Dk + Hv * Dv),
        "attn": attention,
        "mlp": 4 * 3 * C * c.n_inner,
        "norms": 9 * C + 2 * D * n_attention,
    }
    if options:
        parameters["head"] = V * C
    assert flops.parameters("hybrid", c) == parameters


# ---- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, layers",
    [("d", "ddd"), ("da", "dad"), ("dda", "dda"), ("ddda", "ddd"), ("addddda", "add")],
)
def test_a_pattern_is_repeated_and_cut_to_the_layers(pattern, layers):
    model = build("hybrid", n_layer=3, layer_pattern=pattern)
    assert model.config.layer_pattern == layers
    assert "".join("d" if block.attn is None else "a" for block in model.blocks) == layers
    assert all((block.attn is None) != (block.delta is None) for block in model.blocks)
    assert GPTConfig(**vars(model.config)) == model.config  # as a checkpoint restores it


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(layer_pattern="dla"), "layer_pattern='dla': l is local attention: try letters a and d"),
        (dict(layer_pattern="n"), "layer_pattern='n': n is full attention without positions"),
        (dict(layer_pattern="am"), "layer_pattern='am': m is local attention without positions"),
        (dict(layer_pattern="sssa"), "layer_pattern='sssa': s is a state space layer"),
        (dict(layer_pattern="ak"), "layer_pattern='ak': k is linear attention"),
        (dict(layer_pattern="dddx"), "layer_pattern='dddx': x is no kind of layer"),  # where it would be cut off too
        (dict(layer_pattern=""), "layer_pattern='' says nothing"),
        (dict(n_value_head=5), "n_value_head=5 is not a multiple of n_key_head=2"),
        (dict(rotary_fraction=0.3125), "rotary_fraction=0.3125 turns 5 of head_dim=16 numbers"),
        (dict(rotary_fraction=1.5), "24 of head_dim=16"),
        (dict(rotary_fraction=0.0), "0 of head_dim=16"),
        (dict(head_dim=15, rotary_fraction=1.0), "head_dim=15 is odd"),
        (dict(output_gate="heads"), "output_gate='heads'.*none, head or element"),
        (dict(qkv_gates="qz"), "qkv_gates='qz'.*letters of qkv"),
    ],
)
def test_bad_options_are_refused_with_the_numbers(options, words):
    with pytest.raises(ValueError, match=words):
        build("hybrid", n_layer=3, **options)


# ---- other models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(output_gate="none"), dict(qkv_gates="qkv", gate_activation="softplus")])
def test_attention_in_every_layer_and_with_full_rotation_is_the_gated_model(options):
    ours = build("hybrid", layer_pattern="a", rotary_fraction=1.0, **options).double()
    gated = build("gated", **options).double()
    weights = {name: w + 1 if name.endswith("norm.weight") else w for name, w in ours.state_dict().items()}
    gated.load_state_dict(weights)
    x = tokens(2, 30)
    torch.testing.assert_close(ours(x), gated(x), atol=1e-10, rtol=0)


HF = SIZES | dict(
    num_hidden_layers=4, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    partial_rotary_factor=0.25, linear_conv_kernel_dim=4, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=12,
)  # fmt: skip
OURS = dict(
    vocab_size=97, block_size=128, n_layer=4, n_head=4, n_kv_head=2, head_dim=16, n_embd=32, n_inner=48,
    layer_pattern="ddda", n_key_head=2, n_value_head=4, key_dim=8, value_dim=12, norm_eps=1e-3, tie_embeddings=False,
)  # fmt: skip
BOTH = {ours: name for ours, name in LAYER.items() if "attn." not in ours}
ATTENTION = {ours: name for ours, name in LAYER.items() if "attn." in ours}


def qwen3_next():
    """In a key head's rows: its query, its key, the values of its two value heads, their gates."""
    theirs = oracle(transformers.Qwen3NextForCausalLM, transformers.Qwen3NextConfig(**HF, mlp_only_layers=[0, 1, 2, 3]))
    stored = theirs.state_dict()
    weights = {}
    for i in range(3):
        qkvz = stored[f"model.layers.{i}.linear_attn.in_proj_qkvz.weight"].view(2, 8 + 8 + 2 * 12 + 2 * 12, 32)
        ba = stored[f"model.layers.{i}.linear_attn.in_proj_ba.weight"].view(2, 2 + 2, 32)
        parts = (*qkvz.split((8, 8, 24, 24), dim=1), *ba.split((2, 2), dim=1))
        for name, part in zip(("wq", "wk", "wv", "wz", "wb", "wa"), parts):
            weights[f"blocks.{i}.delta.{name}.weight"] = part.flatten(0, 1)
    return theirs, weights


def qwen3_5():
    theirs = oracle(transformers.Qwen3_5ForCausalLM, transformers.Qwen3_5TextConfig(**HF))
    stored = theirs.state_dict()
    weights = {}
    for i in range(3):
        layer = f"model.layers.{i}.linear_attn"
        q, k, v = stored[f"{layer}.in_proj_qkv.weight"].split((16, 16, 48))
        weights[f"blocks.{i}.delta.wq.weight"] = q
        weights[f"blocks.{i}.delta.wk.weight"] = k
        weights[f"blocks.{i}.delta.wv.weight"] = v
        for name in "zba":
            weights[f"blocks.{i}.delta.w{name}.weight"] = stored[f"{layer}.in_proj_{name}.weight"]
    return theirs, weights


@pytest.mark.parametrize("make", [qwen3_next, qwen3_5])
def test_logits_cached_or_not_and_gradients_equal_those_of_transformers(make):
    x = tokens(2, 100)
    y = tokens(2, 100, seed=2)
    make()  # imports what it needs
    with exact():
        theirs, weights = make()
        stored = theirs.state_dict()
        for name, p in theirs.named_parameters():
            if name.endswith("dt_bias"):
                p.data -= 5.0  # from 1, where a layer forgets everything at every step
        weights |= renamed(theirs, TOP, BOTH)
        query, gate = stored["model.layers.3.self_attn.q_proj.weight"].view(4, 2, 16, 32).unbind(dim=1)
        for ours, name in ATTENTION.items():
            weights[f"blocks.3.{ours}.weight"] = stored[f"model.layers.3.{name}.weight"]
        weights["blocks.3.attn.wq.weight"] = query.reshape(64, 32)
        weights["blocks.3.attn.wo_gate.weight"] = gate.reshape(64, 32)
        for i in range(3):
            layer = f"model.layers.{i}.linear_attn"
            weights[f"blocks.{i}.delta.conv.weight"] = stored[f"{layer}.conv1d.weight"]
            weights[f"blocks.{i}.delta.A_log"] = stored[f"{layer}.A_log"]
            weights[f"blocks.{i}.delta.dt_bias"] = stored[f"{layer}.dt_bias"]
            weights[f"blocks.{i}.delta.o_norm"] = stored[f"{layer}.norm.weight"]
            weights[f"blocks.{i}.delta.wo.weight"] = stored[f"{layer}.out_proj.weight"]
        ours = GPT(GPTConfig(**OURS)).eval()
        ours.load_state_dict(weights)

        got = ours(x)
        want = theirs(x).logits
        assert got.dtype == torch.float64 and want.std() > 0.5  # the oracle says something
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
        for static in (False, True):
            got = run_in_pieces(ours, x, [9, 1, 67, 1, 1, 21], static=static)
            torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
        loss = F.cross_entropy(want.flatten(0, 1), y.flatten())
        want = torch.autograd.grad(loss, theirs.get_input_embeddings().weight)[0]
        got = torch.autograd.grad(ours(x, y), ours.embed.weight)[0]
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


# ---- one matrix, one job ---------------------------------------------------------------------------------------------

PILES = {"delta q|k|v|z": "delta.wq delta.wk delta.wv delta.wz", "delta b|a": "delta.wb delta.wa",
         "attention query|gate": "attn.wq attn.wo_gate"}  # fmt: skip


def rms(x):
    return x.square().mean().sqrt().item()


def scaled(update):
    """Returns the update (out, in) orthogonalized, with the scale that Muon gives it at a learning rate of 1."""
    return 0.2 * max(update.shape) ** 0.5 * muon.orthogonalize(update[None])[0]


def updates_of_a_hybrid():
    """Returns {projection: its step by Muon at lr = 1} and {projection: its momentum}, after a few steps of training.

    Of the momentum what Muon orthogonalizes: the average of the gradients, looked ahead as Nesterov does.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**model_hybrid.TINY | dict(n_layer=4, layer_pattern="ddda")))
    optimizer = muon.make_optimizer(model, "muon", learning_rate=1e-2, weight_decay=0.0, muon_momentum=0.9)
    projections = {}
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and name.split(".")[-2].startswith("w"):
            projections[name.removesuffix(".weight")] = p
    averages = {name: torch.zeros_like(p) for name, p in projections.items()}
    x = torch.randint(256, (8, 49))
    for _ in range(5):
        model(x[:, :-1], x[:, 1:]).backward()
        for name, p in projections.items():
            averages[name].lerp_(p.grad, 0.1)
        momenta = {name: p.grad.lerp(averages[name], 0.9) for name, p in projections.items()}
        before = {name: p.detach().clone() for name, p in projections.items()}
        optimizer.step()
        optimizer.zero_grad()
    steps = {name: (before[name] - p.detach()) / 1e-2 for name, p in projections.items()}
    return steps, momenta


def test_muon_moves_each_projection_as_if_it_were_alone_and_a_pile_of_them_it_would_not():
    steps, momenta = updates_of_a_hybrid()
    kinds = {name.split(".", 2)[2] for name in steps}
    assert kinds >= {name for pile in PILES.values() for name in pile.split()}
    for name, step in steps.items():
        assert abs(rms(step) / rms(scaled(momenta[name])) - 1) < 0.1, name
    worst = {}
    for label, pile in PILES.items():
        kind, first = pile.split()[0].split(".")
        for i in range(4):
            names = [f"blocks.{i}.{name}" for name in pile.split()]
            if f"blocks.{i}.{kind}.{first}" in steps:
                fused = scaled(torch.cat([momenta[name] for name in names]))
                parts = fused.split([len(momenta[name]) for name in names])
                ratios = [rms(part) / rms(scaled(momenta[name])) for name, part in zip(names, parts)]
                worst[label] = max(worst.get(label, 0.0), *(abs(ratio - 1) for ratio in ratios))
    assert len(worst) == 3 and max(worst.values()) > 0.3, worst  # query and gate: x 1.3 and x 0.57


# ---- old run folders -------------------------------------------------------------------------------------------------


def test_a_run_folder_with_fused_projections_is_refused_in_one_line_that_names_them(tmp_path):
    old = build("hybrid")
    delta = old.blocks[0].delta
    delta.wqkvz = torch.nn.Linear(64, 2 * 2 * 16 + 2 * 4 * 12, bias=False)
    delta.wba = torch.nn.Linear(64, 2 * 4, bias=False)
    del delta.wq, delta.wk, delta.wv, delta.wz, delta.wb, delta.wa
    config = {"model": "hybrid", "model_config": vars(old.config), "knobs": {}}
    checkpoint.save(tmp_path, 1, old, muon.make_optimizer(old), config, {})
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load_model(tmp_path)
    message = str(refused.value)
    assert "\n" not in message and "does not fit the model in 8 tensors" in message
    for name in ("wqkvz", "wba", "wq", "wk", "wv", "wz", "wb", "wa"):
        assert f"blocks.0.delta.{name}.weight is " in message
