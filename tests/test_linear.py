"""What is special to model_linear.py: three forms of one recurrence, their states, and what surrounds them."""

import pytest
import torch
import torch.nn.functional as F

import flops
import model_linear
from model_linear import linear_attention, recurrent_linear_attention
from tests import test_models
from tests.test_models import run_in_pieces
from tests.tiny import EOT, build, cache_tensors, tokens

DECAYS = ("none", "head", "channel")
SHAPES = {"none": (1, 1, 1, 1), "head": (1, 3, 1, 1), "token": (2, 3, 150, 1), "channel": (2, 3, 150, 5)}
each_shape = pytest.mark.parametrize("shape", SHAPES)


# ---- the recurrence ----------------------------------------------------------------------------------------------


def inputs(shape, T, dtype=torch.float64, speed=1.0):
    """Returns q, k, v, log_decay, first and the state before, random, of 2 rows and 3 heads."""
    torch.manual_seed(T)
    q, k = torch.randn(2, 2, 3, T, 5, dtype=dtype)
    v = torch.randn(2, 3, T, 4, dtype=dtype)
    log_decay = torch.zeros(1, 1, 1, 1, dtype=dtype)
    if shape != "none":
        log_decay = -speed * torch.rand(SHAPES[shape], dtype=dtype)[:, :, :T]
    first = torch.rand(2, 1, T) < 0.03
    state = torch.randn(2, 3, 5, 4, dtype=dtype)
    return q, k, v, log_decay, first, state


def quadratic_form(q, k, v, log_decay, first):
    """Returns the outputs by the definition, one pair of tokens at a time: the state before is zero."""
    B, H, T, D = q.shape
    log_decay = log_decay.expand(B, H, T, D)
    first = first.expand(B, 1, T)
    y = torch.zeros(B, H, T, v.size(-1), dtype=q.dtype)
    for b in range(B):
        for t in range(T):
            start = max([s for s in range(t + 1) if first[b, 0, s]], default=0)
            for s in range(start, t + 1):
                kept = log_decay[b, :, s + 1 : t + 1].sum(dim=1).exp()  # (H, D); a token's own is whole
                weight = (q[b, :, t] * k[b, :, s] * kept).sum(dim=-1, keepdim=True)
                y[b, :, t] += weight * v[b, :, s]
    return y


def token_by_token(q, k, v, log_decay, first, state):
    T = q.size(2)
    log_decay = log_decay.expand(-1, -1, T, -1)
    y = []
    for t in range(T):
        one = [x[:, :, t : t + 1] for x in (q, k, v, log_decay, first)]
        out, state = recurrent_linear_attention(*one, state)
        y.append(out)
    return torch.cat(y, dim=2), state


@each_shape
@pytest.mark.parametrize("T", [1, 2, 64, 130])
def test_chunks_and_tokens_equal_the_slow_loop_over_all_pairs(shape, T):
    *given, state = inputs(shape, T)
    want = quadratic_form(*given)
    for form in (linear_attention, token_by_token):
        y, _ = form(*given, torch.zeros_like(state))
        torch.testing.assert_close(y, want, atol=1e-11, rtol=0)


@each_shape
@pytest.mark.parametrize("chunk", [1, 2, 16, 64, 256])
def test_the_size_of_a_chunk_changes_neither_outputs_nor_the_state_that_is_left(shape, chunk):
    given = inputs(shape, 150)
    want, want_state = token_by_token(*given)
    y, state = linear_attention(*given, chunk=chunk)
    torch.testing.assert_close(y, want, atol=1e-11, rtol=0)
    torch.testing.assert_close(state, want_state, atol=1e-11, rtol=0)
    assert (state - given[-1]).abs().max() > 0.1


@each_shape
def test_gradients_of_chunks_are_those_of_tokens(shape):
    given = inputs(shape, 150)
    leaves = [x for x in given if x.is_floating_point()]
    for x in leaves:
        x.requires_grad_()
    grads = []
    for form in (linear_attention, token_by_token):
        y, state = form(*given)
        grads.append(torch.autograd.grad(y.sin().sum() + state.sin().sum(), leaves))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@each_shape
@pytest.mark.parametrize("speed", [20.0, 1e4])
def test_decays_of_10_a_step_and_far_more_are_right_in_fp32(shape, speed):
    *given, state = inputs(shape, 80, torch.float32, speed)
    if given[3].size(-1) > 1:
        given[3][..., ::2] *= 1e-4  # other channels of the same heads forget slowly
    want = quadratic_form(*[x.double() if x.is_floating_point() else x for x in given])
    given[3].requires_grad_()
    y, _ = linear_attention(*given, torch.zeros_like(state))
    error = (y - want).abs().max() / want.abs().max()
    assert error < 1e-6
    assert torch.autograd.grad(y.sum(), given[3])[0].isfinite().all()


@pytest.mark.parametrize("decay", DECAYS)
def test_the_recurrence_is_in_fp32_under_autocast_and_in_a_bf16_model(decay, monkeypatch):
    seen = []

    def spy(*given):
        y, state = linear_attention(*given)
        seen.append({x.dtype for x in (*given, y, state)} - {torch.bool})
        seen.append(torch.is_autocast_enabled("cpu"))
        return y, state

    monkeypatch.setattr(model_linear, "linear_attention", spy)
    model = build("linear", decay=decay, layer_pattern="k", n_layer=1)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(1, 9))
    run_in_pieces(model.bfloat16(), tokens(1, 9), [8, 1])
    assert seen == [{torch.float32}, False] * 3


# ---- what surrounds it ---------------------------------------------------------------------------------------------


def layer_of(decay, depth=0, n_layer=3, **options):
    model = build("linear", decay=decay, layer_pattern="k", n_layer=n_layer, **options).double()
    return model.blocks[depth].linear


def heads(x, w, H=4):
    """Returns x (B, T, C) by the matrix w in heads (B, H, T, D)."""
    return F.linear(x, w.weight, w.bias).unflatten(-1, (H, -1)).transpose(1, 2)


def hidden_states(T=75):
    torch.manual_seed(3)
    return torch.randn(2, T, 64, dtype=torch.float64)


def test_without_decay_weights_are_positive_and_sum_to_1():
    layer, x = layer_of("none"), hidden_states()
    q, k, v = heads(x, layer.wq), heads(x, layer.wk), heads(x, layer.wv)
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()  # (B, H, T, T)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    want = F.linear((weights @ v).transpose(1, 2).flatten(2), layer.wo.weight)
    torch.testing.assert_close(layer(x, torch.arange(75)), want, atol=1e-9, rtol=0)
    assert want.std() > 0.1 and not hasattr(layer, "o_norm")


def test_where_all_features_are_zero_nothing_is_divided_by_zero():
    layer, x = layer_of("none"), hidden_states(9).abs()
    with torch.no_grad():
        layer.wq.weight.fill_(-100.0)  # elu + 1 is exactly 0
        layer.wk.weight.fill_(-100.0)
    y = layer(x, torch.arange(9))
    y.sum().backward()
    assert y.abs().max() == 0
    for p in layer.parameters():
        assert p.grad.isfinite().all()


def test_a_decay_per_channel_is_gla_by_its_formula():
    layer, x = layer_of("channel"), hidden_states()
    q, k, v = heads(x, layer.wq), heads(x, layer.wk), heads(x, layer.wv)
    alpha = torch.sigmoid(heads(F.linear(x, layer.wa_down.weight), layer.wa_up)) ** (1 / 16)  # (B, H, T, D)
    assert layer.wa_down.weight.shape == (8, 64) and alpha.min() < 0.8
    state = torch.zeros(2, 4, 16, 16, dtype=torch.float64)
    out = []
    for t in range(75):
        state = alpha[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    y = torch.stack(out, dim=1)  # (B, T, H, D)
    y = y / (y.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * layer.o_norm.weight
    want = F.linear(y.flatten(2) * F.silu(F.linear(x, layer.wz.weight)), layer.wo.weight)
    torch.testing.assert_close(layer(x, torch.arange(75)), want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_decay_per_head_is_the_lightning_attention_of_minimax(depth):
    transformers = pytest.importorskip("transformers")
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = transformers.MiniMaxConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16, num_hidden_layers=3, block_size=4,
        layer_types=["linear_attention"] * 3, hidden_act="silu",
    )  # fmt: skip
    theirs = MiniMaxLightningAttention(config, depth).double()
    layer, x = layer_of("head", depth), hidden_states()
    with torch.no_grad():
        qkv = torch.stack([w.weight.unflatten(0, (4, 16)) for w in (layer.wq, layer.wk, layer.wv)], dim=1)
        theirs.qkv_proj.weight.copy_(qkv.flatten(0, 2))  # of each head q, k and v
        theirs.out_proj.weight.copy_(layer.wo.weight)
        theirs.output_gate.weight.copy_(layer.wz.weight)
        theirs.norm.weight.copy_(layer.o_norm.weight)
    x.requires_grad_()
    want = theirs(x, position_embeddings=None, attention_mask=None)[0]
    got = layer(x, torch.arange(75))
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(got.square().sum(), x)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(want.square().sum(), x)[0], atol=1e-4, rtol=1e-4)


def test_only_a_decay_tells_a_linear_layer_the_order_of_what_came_before():
    x = tokens(1, 8)
    y = x[:, [3, 1, 5, 0, 6, 2, 4, 7]]
    for decay in DECAYS:
        model = build("linear", decay=decay, layer_pattern="k", n_layer=1).double()
        assert ((model(x) - model(y))[:, -1].abs().max() > 1e-6) == (decay != "none")


# ---- the contract with each decay ----------------------------------------------------------------------------------

CONTRACT = {
    "causal": (test_models.test_changing_a_token_leaves_earlier_logits_unchanged, EOT),
    "cached": (test_models.test_cached_logits_equal_full_ones_for_every_split_of_prefill_and_decode, EOT),
    "static": (test_models.test_a_static_cache_gives_the_same_logits_from_shapes_that_never_change, EOT),
    "rewind": (test_models.test_a_rewound_cache_goes_on_as_if_the_forgotten_had_never_been_or_refuses, False),
    "branch": (test_models.test_a_branch_is_a_copy_that_shares_nothing, False),
    "trained": (test_models.test_every_parameter_is_trained_and_in_exactly_one_optimizer_group, EOT),
}


@pytest.mark.parametrize("contract", CONTRACT)
@pytest.mark.parametrize("decay, pattern", [("none", "ka"), ("head", "ak"), ("channel", "k")])
def test_each_decay_keeps_the_contract_and_so_does_a_model_without_attention(contract, decay, pattern, monkeypatch):
    options = dict(decay=decay, layer_pattern=pattern)
    monkeypatch.setattr(test_models, "build", lambda *a, **more: build(*a, **options | more))
    test, argument = CONTRACT[contract]
    test("linear", argument)


@pytest.mark.parametrize("decay", DECAYS)
def test_many_documents_in_pieces_longer_than_a_chunk_are_each_as_alone(decay):
    model = build("linear", decay=decay, eot_id=EOT, block_size=256).double()
    documents = [torch.cat((torch.tensor([EOT]), tokens(n, seed=n + 1))) for n in (70, 0, 3, 64, 40, 61)]
    packed = torch.cat(documents)[None]
    want = torch.cat([model(each[None])[0] for each in documents])
    torch.testing.assert_close(model(packed)[0], want, atol=1e-9, rtol=0)
    for lengths in ([100, 1, 143], [3, 65, 1, 1, 174]):
        torch.testing.assert_close(run_in_pieces(model, packed, lengths)[0], want, atol=1e-9, rtol=0)


# ---- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", DECAYS)
def test_the_state_is_as_large_at_any_length_and_in_fp32(decay):
    model = build("linear", decay=decay, layer_pattern="kka", n_layer=3, block_size=4096).bfloat16()
    c = model.config
    state = 2 * 4 * c.n_head * c.head_dim * (c.head_dim + (decay == "none"))  # 2 layers in fp32
    token = 2 * 2 * c.n_kv_head * c.head_dim  # a key and a value in bf16
    for max_len in (1, 64, 4096):
        cache = model.new_cache(1, max_len)
        assert cache.state_bytes() == state == flops.state_bytes("linear", c, 2)
        assert cache.bytes_per_token() == token == flops.cache_bytes_per_token("linear", c, 2)
        assert sum(x.nbytes for x in cache_tensors(cache)) == state + max_len * token


@pytest.mark.parametrize("decay", DECAYS)
def test_flops_and_parameters_are_those_of_the_closed_form(decay):
    c = build("linear", decay=decay, layer_pattern="kka", n_layer=3, block_size=128).config
    C, H, D, T, L = c.n_embd, c.n_head, c.head_dim, 128, 64
    M = D + (decay == "none")  # columns of a state
    matrices = 4 * C * H * D
    vectors = 0
    if decay != "none":
        matrices += C * H * D  # the gate
        vectors = {"head": H * D, "channel": D}[decay]
    bias = 0
    if decay == "channel":
        matrices += c.decay_rank * (C + H * D)
        bias = H * D
    scores = {"none": 2 * L * D, "head": 2 * L * D, "channel": (L + 1) * D}[decay]  # halving leaves out what is masked
    found = flops.forward_flops("linear", c, T)
    assert found["linear"] == 2 * 2 * matrices
    assert found["linear between tokens"] == 2 * H * (scores + 2 * L * M + 4 * D * M)
    counts = flops.parameters("linear", c)
    assert counts["linear"] == 2 * (matrices + bias)
    assert counts["norms"] == (2 * 3 + 1) * C + 2 * D + 2 * vectors  # q_norm and k_norm of the one attention layer
    for context in (2, 60):
        assert flops.decode_flops("linear", c, context)["linear between tokens"] == 2 * H * 4 * D * M


def test_all_linear_layers_of_a_model_are_of_one_kind_for_the_counting():
    for decay in DECAYS:
        model = build("linear", decay=decay, layer_pattern="kkka", n_layer=8)
        assert sorted(flops.with_one_block_of_each_kind(model).values()) == [2, 6]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(layer_pattern="kax"), "layer_pattern='kax': x is no layer here: try letters a and k"),
        (dict(layer_pattern="d"), "layer_pattern='d': d is no layer here"),
        (dict(layer_pattern=""), "layer_pattern='' says nothing"),
        (dict(decay="token"), "decay='token' is unknown: try none, head or channel"),
        (dict(decay_rank=0), "decay_rank=0: decays are read from at least 1 number"),
    ],
)
def test_what_makes_no_model_is_refused_with_the_numbers(options, says):
    with pytest.raises(ValueError, match=says):
        build("linear", **options)


def test_a_pattern_is_repeated_and_cut_to_the_number_of_layers():
    for pattern, n_layer, want in (("kka", 5, "kkakk"), ("kkka", 2, "kk"), ("a", 1, "a")):
        model = build("linear", layer_pattern=pattern, n_layer=n_layer)
        assert "".join("k" if block.attn is None else "a" for block in model.blocks) == want
