"""What is special to model_mla.py: two equal forms of one attention, a small cache, and DeepSeek-V3's folders."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flops
from tests.tiny import EOT, build, cache_tensors, module, tokens

YARN = dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16)
SIZES = [{}, dict(q_rank=0), dict(n_head=3, kv_rank=7, nope_dim=5, rope_dim=6, v_dim=9), YARN]


def expand_only(model):
    for block in model.blocks:
        block.attn.absorbed = block.attn.expanded
    return model


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_the_absorbed_form_decodes_what_the_expanded_form_does(options, eot_id):
    x = tokens(3, 20)
    x[1, [4, 13]] = EOT
    pad = torch.tensor([0, 2, 5])
    absorbed, expanded = (build("mla", eot_id=eot_id, **options).double() for _ in range(2))
    expand_only(expanded)
    for given in (None, pad):
        a, b = absorbed.new_cache(3, 20, given), expanded.new_cache(3, 20, given)
        absorbed(x[:, :9], cache=a), expanded(x[:, :9], cache=b)
        for t in range(9, 20):
            got, want = (m(x[:, t : t + 1], cache=c) for m, c in ((absorbed, a), (expanded, b)))
            torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_both_forms_have_the_same_gradients():
    attn = build("mla", **YARN).double().blocks[0].attn
    config, grads = build("mla").config, []
    torch.manual_seed(0)
    shapes = ((1, 4, config.nope_dim), (1, 4, config.rope_dim), (11, config.kv_rank + config.rope_dim))
    given = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    into = given + [attn.wk.weight, attn.wv.weight]
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
def test_a_token_leaves_its_normed_latent_and_one_rotated_key_in_the_cache_and_nothing_else(options):
    model = build("mla", **options)
    c, cache = model.config, model.new_cache(2, 10)
    numbers = c.n_layer * (c.kv_rank + c.rope_dim)
    assert sum(x.numel() for x in cache_tensors(cache)) == 2 * 10 * numbers
    assert cache.bytes_per_token() == 4 * numbers == flops.cache_bytes_per_token("mla", c, 4)
    model(tokens(2, 10), cache=cache)
    rms = (cache.kv[0][..., : c.kv_rank] / model.blocks[0].attn.kv_norm.weight).square().mean(dim=-1)
    torch.testing.assert_close(rms, torch.ones(2, 10), atol=1e-3, rtol=0)
    keys = cache.kv[0][..., c.kv_rank :]
    x = model.blocks[0].attn_norm(model.embed(tokens(2, 10)))
    still = model.blocks[0].attn.wk_rope(x)
    torch.testing.assert_close(keys.norm(dim=-1), still.norm(dim=-1))  # turned, not stretched: with YARN too
    assert torch.equal(keys[:, 0], still[:, 0]) and not torch.allclose(keys[:, 1:], still[:, 1:], atol=1e-2)


def test_the_softmax_scale_is_that_of_deepseek_v3():
    assert build("mla", nope_dim=128, rope_dim=64).blocks[0].attn.scale == pytest.approx(192**-0.5)
    yarn = dict(rope_scaling="yarn", rope_factor=40.0, rope_original=4096)
    attn = build("mla", nope_dim=128, rope_dim=64, **yarn).blocks[0].attn
    assert attn.scale == pytest.approx(192**-0.5 * 1.3688879**2)  # 0.1 ln 40 + 1 = 1.3688879
    linear = build("mla", nope_dim=128, rope_dim=64, rope_scaling="linear", rope_factor=40.0).blocks[0].attn
    assert linear.scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize("options", SIZES + [dict(tie_embeddings=False)])
def test_flops_and_parameters_equal_the_formulas(options):
    model, T = build("mla", **options), 24
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens(2, T))
    assert counter.get_total_flops() == 2 * T * flops.forward_flops_per_token("mla", model.config, T)
    assert sum(p.numel() for p in model.parameters()) == sum(flops.parameters("mla", model.config).values())


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


# ---- DeepSeek-V3's folders -------------------------------------------------------------------------------------------


def test_the_file_holds_rope_pairs_as_neighbours_and_keys_and_values_by_head(tmp_path):
    from safetensors.torch import load_file

    model = build("mla")
    c, attn = model.config, model.blocks[1].attn
    model.save_pretrained(tmp_path)
    file = {
        k.removeprefix("model.layers.1.self_attn."): v for k, v in load_file(tmp_path / "model.safetensors").items()
    }
    H, N, P, D, R = c.n_head, c.nope_dim, c.rope_dim, c.v_dim, c.kv_rank
    for head in range(H):
        theirs, ours = (w.view(H, N + P, -1)[head] for w in (file["q_b_proj.weight"], attn.wq.weight))
        assert torch.equal(theirs[:N], ours[:N])
        for i in range(P // 2):  # the pair that turns by the i-th angle
            assert torch.equal(theirs[N + 2 * i], ours[N + i])
            assert torch.equal(theirs[N + 2 * i + 1], ours[N + P // 2 + i])
        both = file["kv_b_proj.weight"].view(H, N + D, R)[head]
        assert torch.equal(both[:N], attn.wk.weight.view(H, N, R)[head])
        assert torch.equal(both[N:], attn.wv.weight.view(H, D, R)[head])
    down = file["kv_a_proj_with_mqa.weight"]
    assert torch.equal(down[:R], attn.wkv_down.weight)
    assert torch.equal(down[R:].view(P // 2, 2, -1).transpose(0, 1).flatten(0, 1), attn.wk_rope.weight)


def test_the_released_config_of_deepseek_v3_is_read_but_for_its_experts():
    from_hf = module("mla").config_from_hf
    rope = dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0, type="yarn")
    hf = dict(
        model_type="deepseek_v3", hidden_act="silu", attention_bias=False, hidden_size=7168, intermediate_size=18432,
        kv_lora_rank=512, max_position_embeddings=163840, num_attention_heads=128, num_hidden_layers=61,
        num_key_value_heads=128, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-06,
        rope_theta=10000, tie_word_embeddings=False, v_head_dim=128, vocab_size=129280,
        rope_scaling=rope | dict(original_max_position_embeddings=4096), first_k_dense_replace=61,
    )  # fmt: skip
    c = from_hf(hf)
    assert (c.kv_rank, c.q_rank, c.nope_dim, c.rope_dim, c.v_dim) == (512, 1536, 128, 64, 128)
    assert (c.rope_scaling, c.rope_factor, c.rope_original) == ("yarn", 40, 4096)
    assert from_hf(hf | dict(q_lora_rank=None)).q_rank == 0
    with pytest.raises(ValueError, match="first_k_dense_replace=3 of 61 layers.*dense layers only"):
        from_hf(hf | dict(first_k_dense_replace=3))
    for key, value in dict(mscale=0.707, mscale_all_dim=0.0, beta_fast=16).items():
        with pytest.raises(ValueError, match=f"{key}={value} is not supported"):
            from_hf(hf | dict(rope_scaling=hf["rope_scaling"] | {key: value}))
    del rope["mscale_all_dim"]
    with pytest.raises(ValueError, match="mscale_all_dim=None is not supported"):
        from_hf(hf | dict(rope_scaling=rope))


def test_what_this_file_cannot_compute_or_deepseek_v3_cannot_store_is_refused_by_name(tmp_path):
    build("mla").save_pretrained(tmp_path)
    path, GPT = tmp_path / "config.json", module("mla").GPT
    config = json.loads(path.read_text())
    for key, value in dict(model_type="qwen3", attention_bias=True, rope_interleave=False, hidden_act="gelu").items():
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=key):
            GPT.from_pretrained(tmp_path)
    for options in (dict(logit_softcap=5.0), dict(scale_embeddings=True)):
        with pytest.raises(ValueError, match=next(iter(options))):
            build("mla", **options).save_pretrained(tmp_path / "x")


def test_a_saved_folder_names_no_end_token_that_the_model_does_not_have_and_no_layers_that_are_not_there(tmp_path):
    for eot_id, want in ((-1, None), (EOT, EOT)):
        build("mla", eot_id=eot_id).save_pretrained(tmp_path / str(want))
        config = json.loads((tmp_path / str(want) / "config.json").read_text())
        assert config["eos_token_id"] == config["bos_token_id"] == want  # transformers' defaults are 1 and 0
        assert config["num_nextn_predict_layers"] == 0  # and 1
        assert config["first_k_dense_replace"] == config["num_hidden_layers"] == 2


def test_a_misshapen_or_missing_joined_weight_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.self_attn.kv_b_proj.weight"
    build("mla").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {name: torch.ones(3, 16)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"kv_b_proj.weight is .*\[3, 16\].*not .*\[80, 16\]"):
        module("mla").GPT.from_pretrained(tmp_path)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"lack 1 weights: {name}"):
        module("mla").GPT.from_pretrained(tmp_path)
