"""What is special to model_sliding.py: windows, rings, global tokens, sinks, softcap and layers without positions."""

from dataclasses import replace

import pytest
import torch

import flops
import hf
import model_sliding
from tests import test_models
from tests.test_models import run_in_pieces
from tests.tiny import EOT, build, cache_tensors, tokens

ALL = dict(layer_pattern="lnam", n_layer=4, n_global_token=2, attention_sink=True, attention_softcap=4.0)


# ---- what a query sees -----------------------------------------------------------------------------------------------


def influences(model, x):
    """Returns (T, T), True where the logits of a token depend on the embedding of another."""
    embedded = model.embed(x).detach().requires_grad_()
    model.embed.forward = lambda idx: embedded
    logits = model(x)[0]
    model.embed.forward = type(model.embed).forward.__get__(model.embed)
    rows = [torch.autograd.grad(row.square().sum(), embedded, retain_graph=True)[0][0] for row in logits]
    return torch.stack(rows).abs().sum(dim=-1) > 1e-12


def slow_loop(x, window, n_global, eot_id):
    """Returns (T, T), True where a local layer's query sees a key, by the definition and one pair at a time."""
    T = len(x)
    start = [max([s for s in range(t + 1) if x[s] == eot_id], default=0) for t in range(T)]
    seen = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        for s in range(start[t], t + 1):
            seen[t, s] = t - s < window or s - start[t] < n_global
    return seen


@pytest.mark.parametrize("letter", "lm")
@pytest.mark.parametrize("window", [1, 4, 30])
@pytest.mark.parametrize("n_global", [0, 1])
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_one_local_layer_sees_its_window_its_documents_first_tokens_and_nothing_else(letter, window, n_global, eot_id):
    options = dict(n_layer=1, layer_pattern=letter, window=window, n_global_token=n_global, eot_id=eot_id)
    x = tokens(1, 20)
    x[0, [0, 11]] = EOT
    got = influences(build("sliding", **options).double(), x)
    assert torch.equal(got, slow_loop(x[0].tolist(), window, n_global, eot_id))


def test_local_layers_on_each_other_see_a_window_further_each():
    seen = influences(build("sliding", n_layer=3, layer_pattern="l", window=4).double(), tokens(1, 20))
    first = seen.float().argmax(dim=1)
    assert first.tolist() == [max(0, t - 3 * (4 - 1)) for t in range(20)]


def test_a_window_as_long_as_the_text_is_full_attention():
    local = build("sliding", layer_pattern="l", window=20)
    full = build("sliding", layer_pattern="a")
    torch.testing.assert_close(local(tokens(2, 20)), full(tokens(2, 20)), atol=1e-5, rtol=0)
    assert (local(tokens(2, 21)) - full(tokens(2, 21)))[:, 20].abs().max() > 1e-3


@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_a_built_model_takes_another_window_and_equals_one_built_with_it(eot_id):
    model = build("sliding", window=3, eot_id=eot_id).double()
    other = build("sliding", window=7, eot_id=eot_id).double()
    x = tokens(2, 20)
    x[0, 8] = EOT
    assert (model(x) - other(x)).abs().max() > 1e-3
    narrow = model(x)
    cache = model.new_cache(2, 20)
    model(x[:, :9], cache=cache)
    model.config.window = 7
    torch.testing.assert_close(model(x[:, 9:], cache=cache), narrow[:, 9:], atol=1e-9, rtol=0)  # it has no wider ring
    assert torch.equal(model(x), other(x))
    assert torch.equal(run_in_pieces(model, x, [9, 1, 10]), run_in_pieces(other, x, [9, 1, 10]))
    assert model.blocks[0].attn.keys_seen(20) == other.blocks[0].attn.keys_seen(20)


def test_layers_without_positions_do_not_know_the_order_of_what_they_see():
    x = tokens(1, 8)
    y = x[:, [3, 1, 5, 0, 6, 2, 4, 7]]
    for letter, knows in (("n", False), ("m", False), ("a", True), ("l", True)):
        model = build("sliding", layer_pattern=letter, n_layer=1, window=8).double()
        assert ((model(x) - model(y))[:, -1].abs().max() > 1e-6) == knows


# ---- the cache -------------------------------------------------------------------------------------------------------


CONTRACT = {
    "cached": (test_models.test_cached_logits_equal_full_ones_for_every_split_of_prefill_and_decode, EOT),
    "static": (test_models.test_a_static_cache_gives_the_same_logits_from_shapes_that_never_change, EOT),
    "rewind": (test_models.test_a_rewound_cache_goes_on_as_if_the_forgotten_had_never_been_or_refuses, False),
    "branch": (test_models.test_a_branch_is_a_copy_that_shares_nothing, False),
    "trained": (test_models.test_every_parameter_is_trained_and_in_exactly_one_optimizer_group, EOT),
}


@pytest.mark.parametrize("contract", CONTRACT)
@pytest.mark.parametrize("options", [dict(window=1), ALL], ids=["window 1", "all"])
def test_all_options_at_once_and_the_shortest_window_keep_the_contract(contract, options, monkeypatch):
    monkeypatch.setattr(test_models, "build", lambda *a, **more: build(*a, **options | more))
    test, argument = CONTRACT[contract]
    test("sliding", argument)


def test_many_documents_in_long_chunks_leave_the_right_first_tokens_in_the_cache():
    model = build("sliding", eot_id=EOT, window=4, n_global_token=3, layer_pattern="l").double()
    x = tokens(3, 60)
    x[0, [0, 2, 3, 9, 30]] = x[1, [5, 6, 7, 25, 26, 27, 28]] = EOT  # documents that are shorter than 3 tokens too
    full = model(x)
    for chunks in ([60], [1, 2, 4, 8, 45], [30, 1, 29], [26, 2, 1, 31], [1] * 60, [29, 1, 1, 29]):
        torch.testing.assert_close(run_in_pieces(model, x, chunks), full, atol=1e-9, rtol=0)


def test_rows_with_padding_see_the_first_tokens_behind_it():
    model = build("sliding", window=4, n_global_token=2).double()
    x, pad = tokens(3, 24), torch.tensor([0, 3, 7])
    for lengths in ([24], [8, 9, 7], [10] + [1] * 14):
        got = run_in_pieces(model, x, lengths, pad)
        for row, n in enumerate(pad.tolist()):
            torch.testing.assert_close(got[row, n:], model(x[row : row + 1, n:])[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("n_global", [0, 2])
def test_the_cache_of_local_layers_is_as_large_at_any_length(n_global):
    model = build("sliding", layer_pattern="lma", n_layer=3, window=5, n_global_token=n_global, block_size=4096)
    c = model.config
    token = 2 * 4 * c.n_kv_head * c.head_dim  # a layer's key and value in fp32
    for max_len in (16, 64, 4096):
        held = sum(x.nbytes for x in cache_tensors(model.new_cache(1, max_len)))
        assert held == token * (max_len + 2 * (5 + n_global)) == flops.cache_bytes("sliding", c, max_len, 4)
    assert model.new_cache(1, 64).bytes_per_token() == token == flops.cache_bytes_per_token("sliding", c, 4)
    assert model.new_cache(1, 4).bytes_per_token() == token  # local layers do not grow where they hold all tokens, too
    short = sum(x.nbytes for x in cache_tensors(model.new_cache(1, 3)))
    assert short == token * 3 * 3  # no longer than the text


def test_a_ring_is_rewound_while_nothing_is_overwritten_and_refuses_with_the_numbers():
    model, x = build("sliding", window=6).double(), tokens(1, 12)
    cache = model.new_cache(1, 12)
    model(x[:, :6], cache=cache)
    cache.rewind(2)
    torch.testing.assert_close(model(x[:, 2:8], cache=cache), model(x[:, :8])[:, 2:], atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="the last 6 tokens in a ring cannot be rewound from 8 to 7: only to 0"):
        cache.rewind(7)
    cache.rewind(8)
    assert cache.length == 8
    full = build("sliding", layer_pattern="an", window=6).new_cache(1, 12)  # has no ring
    full.advance(x)
    full.rewind(7)


# ---- sinks and softcap -----------------------------------------------------------------------------------------------


def test_a_sink_takes_its_part_of_the_softmax_and_carries_no_value():
    torch.manual_seed(0)
    attn = build("sliding", attention_sink=True).blocks[1].attn.double()
    plain = build("sliding").blocks[1].attn
    q, k, v = torch.randn(3, 2, 4, 9, 16, dtype=torch.float64)
    k, v = k[:, :2], v[:, :2]
    got = attn.attend(q, k, v, None)
    lse = (q @ k.repeat_interleave(2, 1).transpose(2, 3) / 4).masked_fill(~torch.ones(9, 9).bool().tril(), -torch.inf)
    share = torch.sigmoid(lse.logsumexp(dim=-1) - attn.sink[:, None])  # what the sink leaves
    torch.testing.assert_close(got, plain.attend(q, k, v, None) * share[..., None])
    with torch.no_grad():
        attn.sink.fill_(1000.0)  # no overflow: everything goes to the sink
    assert attn.attend(q, k, v, None).abs().max() == 0
    with torch.no_grad():
        attn.sink.fill_(-1000.0)
    torch.testing.assert_close(attn.attend(q, k, v, None), plain.attend(q, k, v, None))


def test_by_hand_attention_is_the_fused_one_and_a_high_softcap_changes_nothing():
    x = tokens(2, 20)
    x[0, 7] = EOT
    for eot_id in (-1, EOT):
        capped = build("sliding", attention_softcap=1e6, eot_id=eot_id).double()
        torch.testing.assert_close(capped(x), build("sliding", eot_id=eot_id).double()(x), atol=1e-7, rtol=0)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "n_global"), [(3, 0), (7, 0), (6, 2), (20, 2)])
def test_a_local_layer_costs_the_keys_that_its_queries_see(T, n_global):
    c = build("sliding", layer_pattern="la", n_global_token=n_global).config
    key = 4 * c.n_head * c.head_dim  # FLOPs of one query and one key: score and sum
    local = slow_loop([0] * T, c.window, n_global, EOT).sum().item() / T
    found = flops.forward_flops("sliding", c, T, causal=True)["attn between tokens"]
    assert found == pytest.approx(key * (local + (T + 1) / 2))
    assert flops.forward_flops("sliding", c, T)["attn between tokens"] == key * 2 * T
    decoded = flops.decode_flops("sliding", c, T)["attn between tokens"]
    assert decoded == key * (T + min(T, c.window + n_global))


def test_decoding_far_beyond_a_long_window_costs_the_window():
    c = build("sliding", window=1500, n_global_token=3, block_size=20000).config
    key = 4 * c.n_head * c.head_dim
    assert flops.decode_flops("sliding", c, 20000)["attn between tokens"] == key * (20000 + 1500 + 3)


# ---- transformers ----------------------------------------------------------------------------------------------------


def with_weights_of(theirs, config, extra):
    """Returns our model in fp64 with the weights of a model of the Llama family; extra: names beside the usual ones."""
    model = model_sliding.GPT(config).double().eval()
    names = hf.QWEN3.names if config.qk_norm else hf.LLAMA.names
    stored = hf.stored_weights(model, replace(hf.SMOLLM3, names=names | extra))
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, place in stored.items():
            place.to_ours(weights[name])
    return model


def moved(model):
    """The model, with every norm and sink away from where it begins."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model.eval().double()


transformers = pytest.importorskip("transformers")
SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, attn_implementation="eager", initializer_range=0.3, pad_token_id=None,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
OURS = dict(vocab_size=97, block_size=256, n_embd=32, n_inner=64, n_head=4, n_kv_head=2, head_dim=8, qk_norm=False)


def test_sinks_windows_thetas_and_layers_without_positions_are_those_of_granite():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.GraniteSWAConfig(
        **SIZES, num_hidden_layers=4, layer_types=kinds, layer_rope_theta=[100.0, 1e4, 0, 0], sliding_window=7,
        attention_multiplier=8**-0.5, rms_norm_eps=1e-3,
    )  # fmt: skip
    theirs = moved(transformers.GraniteSWAForCausalLM(config))
    config = model_sliding.GPTConfig(
        **OURS, n_layer=4, layer_pattern="lamn", window=7, local_rope_theta=100.0, rope_theta=1e4, norm_eps=1e-3,
        attention_sink=True,
    )  # fmt: skip
    ours = with_weights_of(theirs, config, {"blocks.{}.attn.sink": "model.layers.{}.self_attn.sinks"})
    x = tokens(2, 50)
    want = theirs(x).logits
    assert want.std() > 0.5
    torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(run_in_pieces(ours, x, [20, 1, 1, 28]), want, atol=1e-5, rtol=0)
    y = tokens(2, 50, seed=2)
    ours(x, y).backward()
    torch.nn.functional.cross_entropy(want.flatten(0, 1), y.flatten()).backward()
    for a, b in zip(ours.blocks, theirs.model.layers):
        torch.testing.assert_close(a.attn.sink.grad, b.self_attn.sinks.grad, atol=1e-6, rtol=1e-4)


def attention_pair(theirs, sink=None, norms=False, **options):
    """Returns our layer of local attention with the weights of theirs."""
    config = model_sliding.GPTConfig(**OURS | dict(qk_norm=norms), n_layer=1, layer_pattern="l", window=5, **options)
    ours = model_sliding.GPT(config).double().blocks[0].attn
    with torch.no_grad():
        for w, proj in ((ours.wq, "q_proj"), (ours.wk, "k_proj"), (ours.wv, "v_proj"), (ours.wo, "o_proj")):
            w.weight.copy_(getattr(theirs, proj).weight)
        if sink is not None:
            ours.sink.copy_(sink)
        if norms:
            ours.q_norm.weight.copy_(1 + theirs.q_norm.weight)
            ours.k_norm.weight.copy_(1 + theirs.k_norm.weight)
    return config, ours


def compare_layers(theirs, config, ours, cos, sin):
    """Holds the outputs of two layers of a window of 5 against each other; theirs has cos and sin as wide as a head."""
    torch.manual_seed(2)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    seen = slow_loop([0] * 20, 5, 0, EOT)
    bias = torch.zeros(20, 20, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    want = theirs(x, position_embeddings=(cos, sin), attention_mask=bias[None, None])[0]
    rope = model_sliding.rope_cos_sin(torch.arange(20), config, "l")
    got = ours(x, {"l": rope}, {"l": seen})
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def their_angles(theta):
    angles = torch.outer(torch.arange(20.0), theta ** (-torch.arange(4) / 4)).repeat(1, 2)[None]
    return angles.cos(), angles.sin()


def test_the_attention_softcap_is_that_of_gemma_2():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SIZES, num_hidden_layers=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, attn_logit_softcapping=1.5
    )
    theirs = moved(transformers.Gemma2ForCausalLM(config)).model.layers[0].self_attn
    compare_layers(theirs, *attention_pair(theirs, attention_softcap=1.5), *their_angles(1e4))


def test_a_sink_is_that_of_gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SIZES, num_hidden_layers=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=5,
        attention_bias=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    theirs = moved(transformers.GptOssForCausalLM(config)).model.layers[0].self_attn
    half = [x[..., :4] for x in their_angles(1e4)]
    compare_layers(theirs, *attention_pair(theirs, theirs.sinks, attention_sink=True), *half)


def test_norms_thetas_and_stretched_positions_are_those_of_gemma_3():
    torch.manual_seed(0)
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    config = transformers.Gemma3TextConfig(
        **SIZES, num_hidden_layers=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, rope_parameters=rope,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    theirs = moved(transformers.Gemma3ForCausalLM(config)).model
    layer = theirs.layers[0].self_attn
    options = dict(local_rope_theta=500.0, rope_theta=1e6, rope_scaling="linear", rope_factor=8.0)
    ours, attn = attention_pair(layer, norms=True, **options)
    place = torch.arange(20)
    for letter, kind in (("l", "sliding_attention"), ("a", "full_attention")):
        cos, sin = theirs.rotary_emb(torch.zeros(1, dtype=torch.float64), place[None], kind)
        our_cos, our_sin = model_sliding.rope_cos_sin(place, ours, letter)
        torch.testing.assert_close(our_cos[:, 0].double(), cos[0, :, :4], atol=1e-6, rtol=0)
        torch.testing.assert_close(our_sin[:, 0].double(), sin[0, :, :4], atol=1e-6, rtol=0)
    cos, sin = theirs.rotary_emb(torch.zeros(1, dtype=torch.float64), place[None], "sliding_attention")
    compare_layers(layer, ours, attn, cos, sin)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(window=0), "window=0: a query sees at least its own key"),
        (dict(layer_pattern="lax"), "layer_pattern='lax': x is no kind of layer: try letters a, l, n, m"),
        (dict(layer_pattern="d"), "layer_pattern='d': d is a delta rule layer"),
        (dict(layer_pattern=""), "layer_pattern='' says nothing"),
        (dict(n_global_token=6), "n_global_token=6 is not between 0 and window=5"),
        (dict(n_global_token=-1), "n_global_token=-1 is not between 0 and window=5"),
    ],
)
def test_what_makes_no_model_is_refused_with_the_numbers(options, says):
    with pytest.raises(ValueError, match=says):
        build("sliding", **options)


def test_a_pattern_is_repeated_and_cut_to_the_number_of_layers():
    for pattern, n_layer, want in (("lla", 5, "llall"), ("llllla", 2, "ll"), ("a", 1, "a")):
        model = build("sliding", layer_pattern=pattern, n_layer=n_layer)
        assert "".join(block.attn.letter for block in model.blocks) == want
