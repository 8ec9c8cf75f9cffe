"""Model files against transformers with the same random weights, drawn so that a mistake shows.

A fresh model attends almost uniformly and its norms are all 1, which hides most mistakes: weights are drawn large, and
every norm and bias is moved away from its default.
"""

import json

import pytest
import torch

from tests.tiny import build, module, tokens

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}


def qwen3(rope="plain", tie=True):
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, rope_parameters=ROPES[rope],
        tie_word_embeddings=tie, attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def qwen3_next(rope="plain", tie=False, layer_types=None):
    config = transformers.Qwen3NextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, rope_parameters=dict(ROPES[rope]),
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
        mlp_only_layers=[0, 1, 2, 3], rms_norm_eps=1e-3, layer_types=layer_types, partial_rotary_factor=0.25,
        tie_word_embeddings=tie, attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    model = transformers.Qwen3NextForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("dt_bias"):
            p.data -= 5.0  # from 1, at which a layer forgets everything at every step, and shows no mistake in the rest
    return model


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def deepseek_v3(rope="plain", tie=False, q_rank=28):
    rope = ROPES[rope] | (dict(mscale=1.0, mscale_all_dim=1.0) if rope == "yarn" else {})
    config = transformers.DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, first_k_dense_replace=2,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=20, q_lora_rank=q_rank, qk_nope_head_dim=16,
        qk_rope_head_dim=32, v_head_dim=24, max_position_embeddings=256, rope_parameters=rope, rms_norm_eps=1e-2,
        tie_word_embeddings=tie, attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def qwen3_moe(normalize=True, **options):
    config = transformers.Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3,
        norm_topk_prob=normalize, max_position_embeddings=256, rope_parameters=ROPES["plain"],
        attn_implementation="eager", experts_implementation="eager", initializer_range=0.2, **options,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


ORACLES = {
    "qwen3 plain tied": ("baseline", qwen3, {}),
    "qwen3 plain untied": ("baseline", qwen3, dict(tie=False)),
    "qwen3 linear": ("baseline", qwen3, dict(rope="linear")),
    "qwen3 yarn": ("baseline", qwen3, dict(rope="yarn", tie=False)),
    "gpt2": ("gpt2", gpt2, {}),
    "deepseek_v3 plain": ("mla", deepseek_v3, {}),
    "deepseek_v3 linear tied": ("mla", deepseek_v3, dict(rope="linear", tie=True)),
    "deepseek_v3 yarn": ("mla", deepseek_v3, dict(rope="yarn")),
    "deepseek_v3 without a query rank": ("mla", deepseek_v3, dict(rope="yarn", q_rank=None)),
    "qwen3-next": ("hybrid", qwen3_next, {}),
    "qwen3-next yarn tied, two of four attend": (
        "hybrid",
        qwen3_next,
        dict(rope="yarn", tie=True, layer_types=["full_attention", "linear_attention"] * 2),
    ),
    "qwen3 moe": ("moe", qwen3_moe, {}),
    "qwen3 moe, weights as they are, tied": ("moe", qwen3_moe, dict(normalize=False, tie_word_embeddings=True)),
    "qwen3 moe, every second layer": ("moe", qwen3_moe, dict(decoder_sparse_step=2)),
    "qwen3 moe, a list of layers": ("moe", qwen3_moe, dict(mlp_only_layers=[1])),
}


def lift(patch):
    """transformers computes norms and the delta rule in fp32 even in an fp64 model: in fp64 too while this lasts."""
    to, to_float = torch.Tensor.to, torch.Tensor.float
    patch.setattr(
        torch.Tensor, "to", lambda x, *a, **k: to(x, *(torch.float64 if y is torch.float32 else y for y in a), **k)
    )
    patch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))


def oracle(make, options):
    torch.manual_seed(0)
    model = make(**options).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("case", ORACLES)
def test_logits_and_embedding_gradient_equal_those_of_transformers(case, tmp_path):
    name, make, options = ORACLES[case]
    theirs, x, y = oracle(make, options), tokens(2, 200), tokens(2, 200, seed=2)
    theirs.save_pretrained(tmp_path)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-5)):
        ours, theirs = module(name).GPT.from_pretrained(tmp_path, dtype=dtype), theirs.to(dtype)
        got = ours(x)
        with pytest.MonkeyPatch.context() as patch:
            if dtype == torch.float64:
                lift(patch)
            want = theirs(x).logits
        assert want.std() > 0.5  # the oracle says something
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
        want = torch.autograd.grad(torch.nn.functional.cross_entropy(want.flatten(0, 1), y.flatten()),
                                   theirs.get_input_embeddings().weight)[0]  # fmt: skip
        got = torch.autograd.grad(ours(x, y), ours.embed.weight)[0]
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", ORACLES)
def test_what_save_pretrained_writes_opens_in_transformers_with_equal_logits(case, tmp_path):
    name, make, options = ORACLES[case]
    oracle(make, options).save_pretrained(tmp_path / "theirs")
    ours, x = module(name).GPT.from_pretrained(tmp_path / "theirs"), tokens(2, 100)
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(back(x).logits, ours(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ORACLES)
def test_greedy_generation_equals_that_of_transformers(case, tmp_path):
    name, make, options = ORACLES[case]
    theirs, x = oracle(make, options).double(), tokens(1, 40)
    theirs.save_pretrained(tmp_path)
    mask = torch.ones_like(x)
    want = theirs.generate(
        x, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    want = want[0, 40:].tolist()
    assert module(name).GPT.from_pretrained(tmp_path, dtype=torch.float64).generate(x, 20, temperature=0)[0] == want


def test_a_sharded_folder_and_the_rope_keys_of_transformers_4_load_alike(tmp_path):
    theirs, x = oracle(qwen3, dict(rope="yarn")), tokens(1, 50)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    config = json.loads((tmp_path / "many" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    (tmp_path / "many" / "config.json").write_text(json.dumps(config))
    GPT = module("baseline").GPT
    assert torch.equal(GPT.from_pretrained(tmp_path / "one")(x), GPT.from_pretrained(tmp_path / "many")(x))


def test_gpt2_weights_without_prefix_and_with_stored_masks_load_as_the_hub_has_them(tmp_path):
    from safetensors.torch import load_file, save_file

    oracle(gpt2, {}).save_pretrained(tmp_path)
    GPT, file, x = module("gpt2").GPT, tmp_path / "model.safetensors", tokens(1, 50)
    want = GPT.from_pretrained(tmp_path)(x)
    weights = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 256, 256).tril()}, file)
    assert torch.equal(GPT.from_pretrained(tmp_path)(x), want)


def damaged(tmp_path, change):
    from safetensors.torch import load_file, save_file

    build("baseline").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    return module("baseline").GPT.from_pretrained(tmp_path)


def test_a_missing_extra_or_misshapen_weight_is_named(tmp_path):
    with pytest.raises(ValueError, match="lack 1 weights: model.layers.1.mlp.up_proj.weight"):
        damaged(tmp_path / "a", lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match="model.layers.2.mlp.up_proj.weight is .*not in this model"):
        damaged(tmp_path / "b", lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3, 4)}))
    with pytest.raises(ValueError, match=r"model.norm.weight is .*\[33\].*not .*\[32\]"):
        damaged(tmp_path / "c", lambda w: w.update({"model.norm.weight": torch.ones(33)}))


def test_a_truncated_file_and_a_folder_without_safetensors_are_clear_errors(tmp_path):
    GPT = module("baseline").GPT
    build("baseline").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        GPT.from_pretrained(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"safetensors lack \d+ weights"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        GPT.from_pretrained(tmp_path / "nowhere")


def test_what_the_file_cannot_compute_is_refused_by_name(tmp_path):
    build("baseline").save_pretrained(tmp_path)
    path, GPT = tmp_path / "config.json", module("baseline").GPT
    config = json.loads(path.read_text())
    for key, value in dict(model_type="llama", attention_bias=True, use_sliding_window=True, hidden_act="gelu").items():
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=key):
            GPT.from_pretrained(tmp_path)
    for rope in (dict(rope_type="llama3", factor=2.0), dict(rope_type="yarn", factor=4.0, beta_fast=16)):
        path.write_text(json.dumps(config | {"rope_scaling": rope}))
        with pytest.raises(ValueError, match="llama3|beta_fast"):
            GPT.from_pretrained(tmp_path)
    for options in (dict(qk_norm=False), dict(logit_softcap=5.0), dict(scale_embeddings=True)):
        with pytest.raises(ValueError, match=next(iter(options))):
            build("baseline", **options).save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="bias"):
        build("gpt2", bias=False).save_pretrained(tmp_path / "x")
