"""What is special to model_mla.py: two equal forms of one attention, and a small cache."""

import pytest
import torch

import flops
from tests.tiny import EOT, build, cache_tensors, tokens

YARN = dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16)
SIZES = [{}, dict(q_rank=0), dict(n_head=3, kv_rank=7, nope_dim=5, rope_dim=6, v_dim=9), YARN]


def expand_only(model):
    for block in model.blocks:
        block.attn.absorbed = block.attn.expanded
    return model


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_the_absorbed_form_decodes_what_the_expanded_form_does(options, eot_id):
    x = tokens(3, 16)
    x[1, [4, 13]] = EOT
    absorbed = build("mla", eot_id=eot_id, **options).double()
    expanded = expand_only(build("mla", eot_id=eot_id, **options).double())
    some = torch.tensor([0, 2, 5])
    for pad, static in ((None, False), (some, False), (some, True)):
        a = absorbed.new_cache(3, 16, pad, static)
        b = expanded.new_cache(3, 16, pad, static)
        absorbed(x[:, :9], cache=a)
        expanded(x[:, :9], cache=b)
        for t in range(9, 16):
            got = absorbed(x[:, t : t + 1], cache=a)
            want = expanded(x[:, t : t + 1], cache=b)
            torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_both_forms_have_the_same_gradients():
    model = build("mla", **YARN).double()
    config = model.config
    attn = model.blocks[0].attn
    torch.manual_seed(0)
    shapes = ((1, 4, config.nope_dim), (1, 4, config.rope_dim), (11, config.kv_rank + config.rope_dim))
    given = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    into = given + [attn.wk.weight, attn.wv.weight]
    grads = []
    for form in (attn.absorbed, attn.expanded):
        y = form(*given, None)
        assert y.shape == (2, 1, 4, config.v_dim)
        grads.append(torch.autograd.grad(y.sin().sum(), into))
    for a, b in zip(*grads):
        assert a.abs().max() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_decoding_makes_no_keys_or_values_of_the_past():
    model, made = build("mla"), []
    for block in model.blocks:
        for w in (block.attn.wk, block.attn.wv):
            w.register_forward_hook(lambda *_: made.append(1))
    cache = model.new_cache(1, 9)
    model(tokens(1, 8), cache=cache)
    assert len(made) == 4  # wk and wv of two layers: the prefill is expanded
    model(tokens(1, 1), cache=cache)
    assert len(made) == 4


@pytest.mark.parametrize("options", SIZES)
def test_a_full_pass_costs_the_expanded_form_and_a_decoded_token_the_absorbed_one(options):
    c, T = build("mla", **options).config, 24
    H, R, N, D, M = c.n_head, c.kv_rank, c.nope_dim, c.rope_dim, c.v_dim
    expanded = 2 * T * H * (N + D) + 2 * T * H * M  # scores, and the weighted sum of values
    absorbed = 2 * H * N * R + 2 * H * R * M + 4 * T * H * (R + D)  # Wk^T n, Wv (sum p c), and attention to the cache
    row = "attn between tokens"
    assert flops.forward_flops("mla", c, T)[row] == c.n_layer * expanded
    assert flops.decode_flops("mla", c, T)[row] == c.n_layer * absorbed


@pytest.mark.parametrize("options", SIZES)
def test_a_token_leaves_its_normed_latent_and_one_turned_key_in_the_cache_and_nothing_else(options):
    model, x = build("mla", **options), tokens(2, 10)
    c = model.config
    cache = model.new_cache(2, 10)
    numbers = c.n_layer * (c.kv_rank + c.rope_dim)
    assert sum(held.numel() for held in cache_tensors(cache)) == 2 * 10 * numbers
    assert cache.bytes_per_token() == 4 * numbers == flops.cache_bytes_per_token("mla", c, 4)
    model(x, cache=cache)
    attn = model.blocks[0].attn
    latent, k_rope = cache_tensors(cache)[0].split((c.kv_rank, c.rope_dim), dim=-1)
    rms = (latent / attn.kv_norm.weight).square().mean(dim=-1)
    torch.testing.assert_close(rms, torch.ones(2, 10), atol=1e-3, rtol=0)
    still = attn.wk_rope(model.blocks[0].attn_norm(model.embed(x)))
    torch.testing.assert_close(k_rope.norm(dim=-1), still.norm(dim=-1))  # turned, not stretched: with YaRN too
    assert torch.equal(k_rope[:, 0], still[:, 0])
    assert not torch.allclose(k_rope[:, 1:], still[:, 1:], atol=1e-2)


def test_the_softmax_scale_is_that_of_deepseek_v3():
    assert build("mla", nope_dim=128, rope_dim=64).blocks[0].attn.scale == pytest.approx(192**-0.5)
    yarn = dict(rope_scaling="yarn", rope_factor=40.0, rope_original=4096)
    attn = build("mla", nope_dim=128, rope_dim=64, **yarn).blocks[0].attn
    assert attn.scale == pytest.approx(192**-0.5 * 1.3688879**2)  # 0.1 ln 40 + 1 = 1.3688879
    linear = build("mla", nope_dim=128, rope_dim=64, rope_scaling="linear", rope_factor=40.0).blocks[0].attn
    assert linear.scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(kv_rank=0), "kv_rank=0 is below 1: try 128"),
        (dict(q_rank=-1), "q_rank=-1 is below 0: try 0"),
        (dict(rope_dim=0), "rope_dim=0 is below 2: try 32"),
        (dict(rope_dim=7), "rope_dim=7 is odd.*try 8"),
        (dict(nope_dim=0), "nope_dim=0"),
        (dict(v_dim=0), "v_dim=0"),
        (dict(n_head=0), "n_head=0"),
    ],
)
def test_sizes_that_make_no_attention_are_refused_with_the_numbers(options, says):
    with pytest.raises(ValueError, match=says):
        build("mla", **options)
