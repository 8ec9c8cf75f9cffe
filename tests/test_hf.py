"""Hugging Face folders: what hf.save writes is what hf.load reads, and what either of them refuses, and how it says so.

That both agree with transformers is in tests/test_parity.py.
"""

import ast
import importlib
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf
import kernels
import sample
from data import tokenizer_json
from data.bpe import CHAT_TOKENS
from data.tokenizers import PATTERNS, load_tokenizer, tokenizer_from_dict, train_bpe
from tests import proved
from tests.payloads import payloads
from tests.tiny import EOT, MODELS, ROOT, build, tokens

OPTIONS = {
    "llama": dict(qk_norm=False),
    "qwen2_moe": dict(qk_norm=False, n_shared_expert=2, shared_gate=True),
    "smollm3": dict(qk_norm=False),
}
each_architecture = pytest.mark.parametrize("model_type", hf.ARCHITECTURES)


def tiny(model_type, **options):
    return build(hf.ARCHITECTURES[model_type].variant, **OPTIONS.get(model_type, {}) | options)


def refused(call, *arguments):
    """Returns what a call says that must not succeed."""
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        call(*arguments)
    return str(error.value)


def saved(model, folder):
    """Returns the folder, with config.json as a dictionary, and the tensors of model.safetensors."""
    hf.save(model, folder)
    return folder, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


# ---- there and back --------------------------------------------------------------------------------------------------


@each_architecture
def test_what_save_writes_is_what_load_reads(model_type, tmp_path):
    model, x = tiny(model_type), tokens(2, 12)
    folder, config, _ = saved(model, tmp_path / "a")
    assert config["model_type"] == model_type
    again = hf.load(folder)
    assert not again.training and type(again) is type(model)
    for field in hf.ARCHITECTURES[model_type].fields:
        assert getattr(again.config, field) == getattr(model.config, field), field
    assert torch.equal(again(x), model(x))
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    half = hf.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(FileExistsError, match="is not empty: give a new folder"):
        hf.save(model, folder)


def test_a_folder_that_holds_anything_is_not_written_to(tmp_path):
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is not empty: give a new folder"):
        hf.save(build("baseline"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["data.json"]


def test_all_files_have_the_mode_that_the_umask_says(tmp_path):
    tokenizer = load_tokenizer("byte").to_hf()
    before = os.umask(0o027)
    try:
        hf.save(build("baseline", vocab_size=257), tmp_path / "a", tokenizer)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "a").iterdir()}
    assert len(modes) == 5 and set(modes.values()) == {0o640}


def test_a_folder_of_many_files_and_the_rope_keys_of_transformers_5_load_alike(tmp_path):
    model = build("baseline", rope_scaling="yarn", rope_factor=4.0, rope_original=16)
    folder, config, weights = saved(model, tmp_path / "one")
    many = tmp_path / "many"
    many.mkdir()
    places = {name: f"model-{i + 1:05d}-of-{len(weights):05d}.safetensors" for i, name in enumerate(weights)}
    for name, place in places.items():
        save_file({name: weights[name]}, many / place)
    (many / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file({name: torch.zeros_like(weights[name])}, many / "consolidated.safetensors")  # no part of it
    rope = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    (many / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}), "utf-8-sig")  # as of an editor
    assert hf.load(many).config == hf.load(folder).config == model.config
    assert torch.equal(hf.load(many)(tokens(1, 50)), model(tokens(1, 50)))


def test_gpt2_weights_without_prefix_and_with_stored_masks_load_as_the_hub_has_them(tmp_path):
    model = build("gpt2")
    folder, _, weights = saved(model, tmp_path / "a")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    masks["h.1.attn.bias"] = torch.ones(1, 1, 64, 64).tril().to(torch.uint8)
    save_file(weights | masks, folder / "model.safetensors")
    assert torch.equal(hf.load(folder)(tokens(1, 50)), model(tokens(1, 50)))


# What older versions of transformers did not write, or a person may leave out, and the sizes at which a tiny model has
# the values that transformers takes then.
LEFT_OUT = """
max_position_embeddings n_positions num_key_value_heads head_dim rope_theta rms_norm_eps layer_norm_epsilon n_inner
tie_word_embeddings hidden_act activation_function attention_bias mlp_bias use_sliding_window sliding_window
num_experts_per_tok norm_topk_prob decoder_sparse_step first_k_dense_replace q_lora_rank rope_interleave
partial_rotary_factor bos_token_id eos_token_id scale_attn_weights scale_attn_by_inverse_layer_idx architectures
"""
AT_DEFAULTS = {
    "qwen3": dict(head_dim=128, n_head=64, n_kv_head=32, tie_embeddings=False, block_size=32768),
    "llama": dict(tie_embeddings=False, block_size=2048, n_kv_head=4),
    "gpt2": dict(block_size=1024),
    "deepseek_v3": dict(n_layer=3, q_rank=1536, tie_embeddings=False, block_size=4096),
    "qwen3_moe": dict(
        normalize_gates=False, n_head=4, n_kv_head=4, tie_embeddings=False, block_size=32768, n_expert=9,
        n_expert_per_token=8,
    ),
    "qwen2_moe": dict(
        normalize_gates=False, n_head=16, n_kv_head=16, head_dim=4, tie_embeddings=False, block_size=32768, n_expert=9,
        n_expert_per_token=4,
    ),
    "qwen3_next": dict(head_dim=256, tie_embeddings=False, block_size=32768),
    "smollm3": dict(layer_pattern="an", rope_theta=2e6, n_kv_head=4, block_size=32768),
}  # fmt: skip


@each_architecture
@pytest.mark.filterwarnings("error")
def test_keys_that_a_config_leaves_out_have_the_values_that_transformers_takes(model_type, tmp_path):
    model = tiny(model_type, **AT_DEFAULTS[model_type])
    folder, config, _ = saved(model, tmp_path / "a")
    for key in LEFT_OUT.split():
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    again = hf.load(folder)
    assert again.config.block_size == model.config.block_size
    assert torch.equal(again(tokens(2, 12)), model(tokens(2, 12)))


def test_the_width_of_gpt2s_mlp_may_be_said(tmp_path):
    folder, config, _ = saved(build("gpt2"), tmp_path / "a")
    (folder / "config.json").write_text(json.dumps(config | {"n_inner": 4 * config["n_embd"]}))
    hf.load(folder)


def test_a_saved_folder_names_no_end_token_that_the_model_does_not_have(tmp_path):
    for name in ("baseline", "gpt2", "mla"):
        for eot_id, want in ((-1, None), (EOT, EOT)):
            folder, config, _ = saved(build(name, eot_id=eot_id), tmp_path / f"{name} {want}")
            assert config["eos_token_id"] == config["bos_token_id"] == want  # 50,256 for GPT-2 where they are left out
            generation = json.loads((folder / "generation_config.json").read_text())
            assert generation == dict(bos_token_id=want, eos_token_id=want)


# ---- how rows stand in the file --------------------------------------------------------------------------------------


def test_gpt2s_file_holds_query_key_and_value_as_one_matrix_of_inputs_times_outputs(tmp_path):
    model = build("gpt2")
    _, _, file = saved(model, tmp_path / "a")
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    qkv = [attn.wq, attn.wk, attn.wv]
    assert torch.equal(file["transformer.h.1.attn.c_attn.weight"], torch.cat([w.weight.T for w in qkv], dim=1))
    assert torch.equal(file["transformer.h.1.attn.c_attn.bias"], torch.cat([w.bias for w in qkv]))
    assert torch.equal(file["transformer.h.1.mlp.c_fc.weight"], mlp.w_up.weight.T)
    assert torch.equal(file["transformer.wte.weight"], model.embed.weight)


def test_deepseeks_file_holds_rope_pairs_as_neighbours_and_keys_and_values_by_head(tmp_path):
    model = build("mla")
    c, attn = model.config, model.blocks[1].attn
    _, _, weights = saved(model, tmp_path / "a")
    file = {name.removeprefix("model.layers.1.self_attn."): weight for name, weight in weights.items()}
    H, N, P, D, R = c.n_head, c.nope_dim, c.rope_dim, c.v_dim, c.kv_rank
    for head in range(H):
        theirs = file["q_b_proj.weight"].view(H, N + P, -1)[head]
        ours = attn.wq.weight.view(H, N + P, -1)[head]
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


def test_qwen3_nexts_file_holds_projections_by_key_head_and_gates_by_head(tmp_path):
    model = build("hybrid")
    c = model.config
    _, _, weights = saved(model, tmp_path / "a")
    delta, attn = model.blocks[0].delta, model.blocks[-1].attn
    qkvz = weights["model.layers.0.linear_attn.in_proj_qkvz.weight"].chunk(c.n_key_head)
    ba = weights["model.layers.0.linear_attn.in_proj_ba.weight"].chunk(c.n_key_head)
    for head in range(c.n_key_head):
        ours = [w.weight.chunk(c.n_key_head)[head] for w in (delta.wq, delta.wk, delta.wv, delta.wz)]
        assert torch.equal(qkvz[head], torch.cat(ours))
        ours = [w.weight.chunk(c.n_key_head)[head] for w in (delta.wb, delta.wa)]
        assert torch.equal(ba[head], torch.cat(ours))
    q = weights[f"model.layers.{c.n_layer - 1}.self_attn.q_proj.weight"].chunk(c.n_head)
    for head in range(c.n_head):
        ours = [w.weight.chunk(c.n_head)[head] for w in (attn.wq, attn.wo_gate)]
        assert torch.equal(q[head], torch.cat(ours))


def test_the_file_of_a_mixture_holds_each_expert_by_itself(tmp_path):
    model = build("moe")
    layer = model.config.moe_layers[0]
    _, _, weights = saved(model, tmp_path / "a")
    for expert in range(model.config.n_expert):
        got = weights[f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"]
        assert torch.equal(got, model.blocks[layer].mlp.w_gate.weight[expert].T)


# ---- weights that do not fit -----------------------------------------------------------------------------------------


def load_with(folder, change):
    """Loads a baseline's folder whose weights were changed."""
    _, _, weights = saved(build("baseline"), folder)
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return hf.load(folder)


def test_a_missing_extra_or_misshapen_weight_is_named(tmp_path):
    with pytest.raises(ValueError, match="lack 1 weights: model.layers.1.mlp.up_proj.weight"):
        load_with(tmp_path / "a", lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match="safetensors: model.layers.2.mlp.up_proj.weight is .*not in this model"):
        load_with(tmp_path / "b", lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3, 4)}))
    with pytest.raises(ValueError, match=r"model.norm.weight is \[65\], not \[64\]"):
        load_with(tmp_path / "c", lambda w: w.update({"model.norm.weight": torch.ones(65)}))
    load_with(tmp_path / "d", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))


def test_a_misshapen_or_missing_weight_that_is_made_of_several_is_named(tmp_path):
    name = "transformer.h.1.attn.c_attn.weight"
    folder, _, weights = saved(build("gpt2"), tmp_path / "a")
    save_file(weights | {name: torch.ones(192, 64)}, folder / "model.safetensors")  # as nn.Linear would have it
    with pytest.raises(ValueError, match=r"h.1.attn.c_attn.weight is \[192, 64\], not \[64, 192\]"):
        hf.load(folder)
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"lack 1 weights: {name}"):
        hf.load(folder)


def test_a_parameter_of_ours_without_a_place_in_the_file_is_named(tmp_path):
    model = build("baseline")
    model.blocks[1].attn.sink = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"qwen3 has no weight for our blocks.\{\}.attn.sink"):
        hf.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_truncated_file_and_a_folder_without_safetensors_are_clear_errors(tmp_path):
    hf.save(build("baseline"), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        hf.load(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin alone, which is a pickle"):
        hf.load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="has neither model.safetensors nor an index of its parts"):
        hf.load(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config[:-10])
    with pytest.raises(ValueError, match="config.json is damaged"):
        hf.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        hf.load(tmp_path / "nowhere")


# ---- what one side cannot compute ------------------------------------------------------------------------------------


def test_a_model_type_that_no_file_reads_is_refused_with_those_that_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba9"}')
    with pytest.raises(ValueError, match="model_type='mamba9'; these can be read: qwen3, llama, gpt2, deepseek_v3"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type=None; these can be read: qwen3"):
        hf.load(tmp_path)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ALTERED = {  # what a config.json says, and the words of the refusal
    "qwen3": [
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(quantization_config=dict(quant_method="gptq", bits=4)), "quantization_config=.*gptq.*not supported"),
        (dict(use_sliding_window=True), "use_sliding_window=True"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'.*only 'silu'"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "rope_type='longrope'.*only default, linear, yarn"),
        (dict(rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3])), "rope_type='mrope'"),
        (dict(rope_scaling=dict(type="default", mrope_section=[2, 3, 3])), "mrope_section of RoPE is not supported"),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "full_attention of RoPE"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=16)), "beta_fast=16"),
        (dict(rope_scaling=dict(rope_type="linear")), "no factor"),
        (
            dict(rope_scaling=dict(type="yarn", factor=4.0), rope_parameters=dict(rope_type="default", rope_theta=1e4)),
            "rope_scaling, and rope_parameters that differ from it",
        ),
        (dict(rope_scaling=dict(type="yarn", factor="x")), "config.json: factor=x must be a number"),
        (dict(rope_theta=1), "rope_theta=1 must be a number above 1"),
        (dict(num_key_value_heads=3), "config.json: n_head=4 is not divisible by n_kv_head=3"),
    ],
    "llama": [
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(mlp_bias=True), "mlp_bias=True"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor=None"),
        (dict(rope_scaling=LLAMA3 | dict(high_freq_factor=8.0)), "high_freq_factor=8.0 is not supported, only 4"),
    ],
    "gpt2": [
        (dict(n_inner=100), "n_inner=100"),
        (dict(activation_function="gelu"), "activation_function"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ],
    "deepseek_v3": [
        (dict(attention_bias=True), "attention_bias"),
        (dict(rope_interleave=False), "rope_interleave"),
        (dict(rope_scaling=dict(rope_type="linear", factor=3.0, mscale_all_dim=1.0)), "mscale_all_dim=1.0 is not"),
        (dict(hidden_act="gelu"), "hidden_act"),
    ],
    "qwen3_moe": [
        (dict(attention_bias=True), "attention_bias"),
        (dict(use_sliding_window=True, sliding_window=63), "use_sliding_window"),
        (dict(mlp_only_layers=[0, 1]), "leave no layer with experts"),
        (dict(decoder_sparse_step=9), "no layer with experts"),
    ],
    "qwen2_moe": [
        (dict(qkv_bias=True), "qkv_bias=True is not supported, only False"),
        (dict(shared_expert_intermediate_size=33), "shared_expert_intermediate_size=33, and moe_intermediate_size"),
    ],
    "qwen3_next": [
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_only_layers=[1]), r"mlp_only_layers=\[1\].*only \[0, 1\]"),
        (dict(mlp_only_layers=None), r"mlp_only_layers=None.*only \[0, 1\]"),
        (dict(layer_types=["linear_attention", "chunked_attention"]), "layer_types=.*chunked_attention"),
        (dict(layer_types=["full_attention"]), "layer_types=.*of each of 2 layers"),
    ],
    "smollm3": [
        (dict(no_rope_layers=[1]), r"no_rope_layers=\[1\] does not say 1 or 0 of each of 2 layers"),
        (dict(no_rope_layers=[1, 2]), r"no_rope_layers=\[1, 2\] does not say 1 or 0"),
        (dict(layer_types=["full_attention"]), "layer_types=.*of each of 2 layers"),
        (dict(use_sliding_window=False), "layer_types=.*does not say full_attention of each"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type='yarn' is not supported, only default"),
        (dict(attention_bias=True), "attention_bias=True"),
    ],
}


@each_architecture
def test_a_config_that_asks_for_what_our_file_cannot_compute_is_refused_by_name(model_type, tmp_path):
    folder, config, _ = saved(tiny(model_type), tmp_path / "a")
    hf.load(folder)
    for change, words in ALTERED[model_type]:
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=words):
            hf.load(folder)
    for ours in ("n_layer", "n_embd"):
        key = hf.ARCHITECTURES[model_type].fields[ours]
        (folder / "config.json").write_text(json.dumps(config | {key: None}))
        with pytest.raises(ValueError, match=f"config.json has no {key}"):
            hf.load(folder)


def test_attention_biases_of_qwen2_moe_are_refused_also_where_they_are_the_default(tmp_path):
    folder, config, _ = saved(tiny("qwen2_moe"), tmp_path / "a")
    del config["qkv_bias"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="qkv_bias=True is not supported, only False"):
        hf.load(folder)


@pytest.mark.parametrize("rope_type", ["yarn", "llama3"])
def test_a_trained_length_that_is_left_out_is_the_longest_text_and_one_beside_rope_counts(rope_type):
    model = build("baseline", rope_scaling=rope_type, rope_factor=8.0, rope_original=20)
    config = hf.config_to_hf(model.config, hf.QWEN3)
    del config["rope_scaling"]["original_max_position_embeddings"]
    assert hf.config_from_hf(config, hf.QWEN3)["rope_original"] == 64
    config["rope_scaling"]["original_max_position_embeddings"] = 25
    assert hf.config_from_hf(config, hf.QWEN3)["rope_original"] == 25
    config["original_max_position_embeddings"] = 30
    assert hf.config_from_hf(config, hf.QWEN3)["rope_original"] == 30


@pytest.mark.parametrize(
    "name, options",
    [
        ("baseline", dict(logit_softcap=5.0)),
        ("baseline", dict(scale_embeddings=True)),
        ("gpt2", dict(bias=False)),
        ("mla", dict(logit_softcap=5.0)),
        ("mla", dict(scale_embeddings=True)),
        ("moe", dict(n_shared_expert=1)),
        ("moe", dict(router_score="sigmoid")),
        ("moe", dict(gate_scale=2.0)),
        ("moe", dict(n_group=2)),
        ("hybrid", dict(output_gate="head")),
        ("hybrid", dict(qkv_gates="v")),
        ("hybrid", dict(qk_norm=False)),
        ("sliding", dict(n_global_token=1)),
        ("sliding", dict(attention_softcap=5.0)),
        ("sliding", dict(local_rope_theta=500.0)),
        ("sliding", dict(layer_pattern="lm")),
    ],
)
def test_a_model_that_transformers_cannot_compute_is_refused_by_name(name, options, tmp_path):
    key, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"cannot be saved: .*{key}={value}"):
        hf.save(build(name, **options), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_mixture_between_two_architectures_is_refused_with_what_each_of_them_lacks(tmp_path):
    model = build("moe", n_shared_expert=1, shared_gate=True)
    with pytest.raises(ValueError, match="qwen3_moe has no n_shared_expert=1; qwen2_moe has no qk_norm=True"):
        hf.save(model, tmp_path / "a")
    for options in (dict(shared_gate=False), dict(router_score="sigmoid"), dict(gate_scale=2.0), dict(n_group=2)):
        key, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"qwen3_moe has no qk_norm=False; qwen2_moe has no {key}={value}"):
            hf.save(tiny("qwen2_moe", **options), tmp_path / "a")
    model = build("moe", qk_norm=False, shared_gate=True)
    with pytest.raises(ValueError, match="qwen2_moe has no n_shared_expert=0"):
        hf.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_router_bias_that_is_not_zero_cannot_be_lost(tmp_path):
    model = build("moe")
    model.blocks[1].mlp.router.bias[0] = 0.1
    with pytest.raises(ValueError, match="no blocks.1.mlp.router.bias, and it is not 0"):
        hf.save(model, tmp_path / "a")


def test_the_released_config_of_deepseek_v3_is_read_but_for_its_experts():
    rope = dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0, type="yarn")
    config = dict(
        model_type="deepseek_v3", hidden_act="silu", attention_bias=False, hidden_size=7168, intermediate_size=18432,
        kv_lora_rank=512, max_position_embeddings=163840, num_attention_heads=128, num_hidden_layers=61,
        num_key_value_heads=128, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-06,
        rope_theta=10000, tie_word_embeddings=False, v_head_dim=128, vocab_size=129280,
        rope_scaling=rope | dict(original_max_position_embeddings=4096), first_k_dense_replace=61,
    )  # fmt: skip

    def read(**changes):
        return hf.config_from_hf(config | changes, hf.DEEPSEEK_V3)

    fields = read()
    sizes = [fields[name] for name in ("kv_rank", "q_rank", "nope_dim", "rope_dim", "v_dim")]
    assert sizes == [512, 1536, 128, 64, 128]
    assert [fields[name] for name in ("rope_scaling", "rope_factor", "rope_original")] == ["yarn", 40, 4096]
    assert read(q_lora_rank=None)["q_rank"] == 0
    with pytest.raises(ValueError, match="first_k_dense_replace=3 of 61 layers.*dense layers only"):
        read(first_k_dense_replace=3)
    for key, value in dict(mscale=0.707, mscale_all_dim=0.0, beta_fast=16).items():
        with pytest.raises(ValueError, match=f"{key}={value} is not supported"):
            read(rope_scaling=config["rope_scaling"] | {key: value})
    del rope["mscale_all_dim"]
    with pytest.raises(ValueError, match="mscale_all_dim=None is not supported"):
        read(rope_scaling=rope)


def test_layers_that_deepseek_v3_would_add_by_default_are_written_as_not_there(tmp_path):
    _, config, _ = saved(build("mla"), tmp_path / "a")
    assert config["num_nextn_predict_layers"] == 0
    assert config["first_k_dense_replace"] == config["num_hidden_layers"] == 2


def test_kinds_of_layers_travel_as_a_list_or_as_an_interval(tmp_path):
    folder, config, _ = saved(build("hybrid"), tmp_path / "a")
    assert config.pop("layer_types") == ["linear_attention", "full_attention"]
    (folder / "config.json").write_text(json.dumps(config | dict(full_attention_interval=2)))
    assert hf.load(folder).config.layer_pattern == "da"


# ---- a model is known by what it computes ----------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Returns a function that builds a model from model_mine.py, a copy of a model file with some words replaced."""

    def build_edited(*changes, name="baseline"):
        source = (ROOT / f"model_{name}.py").read_text()
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        file = tmp_path / "model_mine.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("model_mine", file)
        mine = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "model_mine", mine)
        spec.loader.exec_module(mine)
        torch.manual_seed(0)
        return mine.GPT(mine.GPTConfig(**mine.TINY)).eval()

    return build_edited


def test_the_table_of_tested_definitions_is_that_of_the_model_files():
    advice = "a model file changed behind its logits: python -m tests.proved, if tests/test_parity.py is green"
    assert proved.table() in (ROOT / "hf.py").read_text(), advice


@pytest.mark.parametrize("name", hf.PROVED)
def test_an_equal_copy_of_a_model_file_is_saved_whatever_it_is_called(name, edited, tmp_path):
    model = edited(name=name)
    hf.save(model, tmp_path / "a")
    again = hf.load(tmp_path / "a")
    assert type(again).__module__ == f"model_{name}"
    assert torch.equal(again(tokens(2, 12)), model(tokens(2, 12)))


def test_what_shows_in_no_logits_may_be_another(edited, tmp_path):
    model = edited(
        ("RMSNorm(nn.Module):\n", "RMSNorm(nn.Module):  # a comment\n"),
        ('    """SwiGLU (https://arxiv.org/abs/2002.05202)."""\n', '    "Another docstring."\n'),
        ("self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))", "(self.w_down(F.silu(self.w_gate(x))*self.w_up(x)))"),
        ("    init_std: float = 0.02", "    z_loss: float = 0.0\n    init_std: float = 0.02"),
        ("p.normal_(0.0, std)", "p.normal_(0.0, 2 * std)"),
        ("ignore_index=-1)", "ignore_index=-1, label_smoothing=self.config.z_loss)"),
        ("self.k[layer].index_copy_(2, place,", "self.k[layer].index_add_(2, place,"),
        ("    @torch.no_grad()\n    def generate(", "    def draft(self):\n        pass\n\n    def generate("),
        ("TINY = dict(", "TINY = dict(tie_embeddings=False, "),
    )
    hf.save(model, tmp_path / "a")
    assert torch.equal(hf.load(tmp_path / "a")(tokens(2, 12)), model(tokens(2, 12)))


EDITS = {  # the definitions that an edit changes, and what it replaces by what
    "MLP": ("F.silu(self.w_gate(x))", "F.relu(self.w_gate(x)).square()"),
    "Attention": ("enable_gqa=", "scale=1.0, enable_gqa="),
    "apply_rope": ("x1 * cos - x2 * sin", "x1 * cos + x2 * sin"),
    "yarn": ("pair_that_turns(32)", "pair_that_turns(16)"),
    "RMSNorm": ("self.weight.to(wide)", "1 + self.weight.to(wide)"),
    "Block": ("x = x + self.dropout(self.mlp", "x = self.dropout(self.mlp"),
    "GPT.__init__": ("Block(config, layer) for", "Block(config, 0) for"),
    "GPT.forward": ("x = self.norm(x)", "x = 2 * self.norm(x)"),
    "GPT.logits": ("F.linear(x, self.embed.weight)", "-F.linear(x, self.embed.weight)"),
    "GPT.positions_and_mask": ("torch.arange(T, device", "1 + torch.arange(T, device"),
    "GPT, Doubled": ("class GPT(nn.Module):", "class Doubled(nn.Module):\n    pass\n\n\nclass GPT(Doubled):"),
    "GPT.__call__": ("    def logits(", "    def __call__(self, *a):\n        return 0\n\n    def logits("),
    "Block, bent": (
        "class Block(nn.Module):",
        "def bent(x):\n    return x\n\n\nclass Block(nn.Module):\n    bend = bent\n",
    ),
}


@pytest.mark.parametrize("names", EDITS)
def test_an_edited_model_file_is_refused_with_the_definitions_that_differ(names, edited, tmp_path):
    model = edited(EDITS[names])
    with pytest.raises(ValueError, match=rf"model_mine.py cannot be saved: {names} differ from .*\(model_baseline.py"):
        hf.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", sorted(set(MODELS) - hf.PROVED.keys()))
def test_a_variant_that_transformers_does_not_have_is_refused_with_the_nearest_that_it_has(name, tmp_path):
    with pytest.raises(ValueError, match=f"model_{name}.py cannot be saved: .*, the nearest of baseline, gpt2, mla, "):
        hf.save(build(name), tmp_path / "a")


def test_a_model_whose_parts_or_class_were_exchanged_is_refused_by_name(tmp_path):
    def loud(part):
        return type("Loud", (type(part),), {"forward": lambda self, x: 9 * x, "__module__": type(part).__module__})

    model = build("baseline")
    model.blocks[1].mlp.__class__ = loud(model.blocks[1].mlp)
    assert "blocks.1.mlp are not as GPT makes them" in refused(hf.save, model, tmp_path / "a")
    model = build("baseline")
    del model.blocks[1]
    assert "blocks.1, blocks.1.attn_norm, blocks.1.attn, " in refused(hf.save, model, tmp_path / "a")
    model = build("baseline")
    model.__class__ = loud(model)
    assert "its class Loud is not the GPT of a model file" in refused(hf.save, model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["baseline", "moe"])
def test_installed_kernels_do_not_disturb_it(name, tmp_path):
    model = build(name)
    weights = saved(model, tmp_path / "a")[2]
    assert kernels.install(model)
    again = saved(model, tmp_path / "b")[2]
    assert weights.keys() == again.keys() and all(torch.equal(weights[key], again[key]) for key in weights)


# ---- its tokenizer ---------------------------------------------------------------------------------------------------

TEXT = "It's  12345 naïve\r\n\n\tÉTÉ , don't .\n \n 漢字かな 👩‍👩‍👧 e\u0301\u3000\x85" + "the them then " * 9
SPECIAL = "<|endoftext|>a<|im_start|>user\n<think> <|endoftext|><|endoftext|> b<|im_end|>"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Returns {kind: a tokenizer with tokens of a chat}; those of BPE are trained on TEXT."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT + SPECIAL, newline="")
    bpe = train_bpe([file], 300, special_tokens=CHAT_TOKENS)
    gaps = dict(zip(bpe.special_tokens, (400, 333, 410, 411, 402)))  # as in cl100k_base
    return {
        "byte": load_tokenizer("byte", CHAT_TOKENS),
        "char": load_tokenizer("char", CHAT_TOKENS, chars=TEXT + SPECIAL),
        "bpe": bpe,
        "qwen's": tokenizer_from_dict(bpe.to_dict() | dict(pattern=PATTERNS["qwen"], nfc=True)),
        "with gaps": tokenizer_from_dict(bpe.to_dict() | dict(special_tokens=gaps)),
    }


@pytest.fixture(scope="module")
def auto():
    """Returns a function that opens a folder's tokenizer in transformers."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "qwen's", "with gaps"])
def test_the_saved_tokenizer_gives_the_same_ids_in_transformers_and_here(kind, tokenizers, auto, tmp_path):
    tokenizer = tokenizers[kind]
    hf.save(build("baseline", vocab_size=420), tmp_path / "a", tokenizer.to_hf())
    theirs = auto(tmp_path / "a")
    again = load_tokenizer(str(tmp_path / "a" / "tokenizer.json"))
    for text in ("", " ", "a", TEXT, SPECIAL, TEXT + SPECIAL + TEXT):
        ids = tokenizer.encode(text, special=True)
        assert theirs(text).input_ids == again.encode(text, special=True) == ids
        assert theirs.decode(ids) == again.decode(ids) == tokenizer.decode(ids)
        plain = tokenizer.encode(text)
        assert theirs(text, split_special_tokens=True).input_ids == again.encode(text) == plain
    assert again.special_tokens == tokenizer.special_tokens and again.vocab_size == tokenizer.vocab_size
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.eot_id
    assert theirs.decode(tokenizer.encode(SPECIAL, special=True), skip_special_tokens=True) == "auser\n  b"


def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused(tmp_path):
    files = load_tokenizer("byte").to_hf()  # its largest id is 256
    with pytest.raises(ValueError, match="ids up to 256, and the model 256 tokens: they do not belong together"):
        hf.save(build("baseline", vocab_size=256), tmp_path / "a", files)
    assert not (tmp_path / "a").exists()
    hf.save(build("baseline", vocab_size=257), tmp_path / "a", files)


@each_architecture
def test_every_saved_folder_opens_with_its_tokenizer_and_its_end_tokens(model_type, tokenizers, auto, tmp_path):
    tokenizer = tokenizers["bpe"]
    hf.save(tiny(model_type, vocab_size=320), tmp_path / "a", tokenizer.to_hf([tokenizer.eot_id]))
    ids = tokenizer.encode(TEXT + SPECIAL, special=True)
    assert auto(tmp_path / "a")(TEXT + SPECIAL).input_ids == [tokenizer.eot_id, *ids]
    assert auto(tmp_path / "a")(TEXT + SPECIAL, add_special_tokens=False).input_ids == ids
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    end = [tokenizer.eot_id, tokenizer.special_tokens["<|im_end|>"]]
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.eot_id and config.eos_token_id == end


def test_a_character_that_the_tokenizer_lacks_is_an_error_in_transformers_too(tokenizers, auto, tmp_path):
    hf.save(build("baseline", vocab_size=320), tmp_path / "a", tokenizers["char"].to_hf())
    with pytest.raises(Exception, match="UNK"):
        auto(tmp_path / "a")("ß")


def test_a_tokenizer_that_transformers_could_not_have_is_refused_by_name(tokenizers):
    tokenizer = tokenizer_from_dict(tokenizers["bpe"].to_dict() | dict(pattern=r"\p{N}{1,3}+\w|\s+|."))
    with pytest.raises(ValueError, match="the pattern .* has no tokenizer.json with the same ids"):
        tokenizer.to_hf()
    with pytest.raises(ValueError, match="byte has no .*: the special token 'a' is spelled like the token 97 there"):
        load_tokenizer("byte", ["a"]).to_hf()
    with pytest.raises(ValueError, match="x.model: a sentencepiece tokenizer has no tokenizer.json with the same ids"):
        tokenizer_json.files(dict(kind="sentencepiece", name="x.model", special_tokens={}, model=""))


# ---- what stands in a folder of someone else's -----------------------------------------------------------------------


@each_architecture
def test_pickled_weights_and_paths_that_lead_out_of_a_folder_are_not_read(model_type, tmp_path):
    folder, _, weights = saved(tiny(model_type), tmp_path / "hf")
    name = next(name for name in weights if "embed" in name or "wte" in name)
    save_file({name: weights.pop(name)}, tmp_path / "outside.safetensors")
    save_file(weights, folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    for payload in payloads(tmp_path / "mark"):
        (folder / "pytorch_model.bin").write_bytes(payload)
        (folder / "adapter_model.safetensors").write_bytes(payload)  # beside the weights, and none of them
        assert f"lack 1 weights: {name}" in refused(hf.load, folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert "pytorch_model.bin alone, which is a pickle and never read" in refused(hf.load, folder)
    rest = dict.fromkeys(weights, "a.safetensors")
    for where in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index.write_text(json.dumps({"weight_map": rest | {name: where}}))
        assert "leads out of its folder: refused" in refused(hf.load, folder)
    index.write_text(json.dumps({"weight_map": rest | {name: "pytorch_model.bin"}}))
    assert "pytorch_model.bin is damaged" in refused(hf.load, folder)
    index.write_text(json.dumps({"weight_map": rest | {name: "b.safetensors"}}))
    assert "lacks b.safetensors, which its index lists" in refused(hf.load, folder)
    (folder / "b.safetensors").symlink_to(tmp_path / "outside.safetensors")  # as Hugging Face's own cache has them
    hf.load(folder)
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a pointer of git LFS" in refused(hf.load, folder)
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_become_safetensors_by_the_command_that_the_refusal_names(tmp_path):
    pytest.importorskip("transformers")
    model = build("gpt2")
    folder, _, weights = saved(model, tmp_path / "a")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    command = refused(hf.load, folder).split("convert it:  python -c ")[1]
    exec(command.strip('"'))
    assert torch.equal(hf.load(folder)(tokens(2, 12)), model(tokens(2, 12)))


WRONG = ("64", -1, 0.5, True, [[]], {"a": 1}, 10**400)  # what no key of KINDS may be, but for those in MAY_BE
MAY_BE = {
    "a number above 0 and up to 10^12": [0.5],
    "true or false": [True],
    "a text": ["64"],
    "an object": [{"a": 1}],
}


@pytest.mark.parametrize("kind", hf.KINDS)
def test_a_value_of_another_kind_is_refused_with_its_file_and_its_key(kind, tmp_path):
    folder, config, _ = saved(build("baseline"), tmp_path / "a")
    for key in hf.KINDS[kind][1].split():
        for value in WRONG:
            if value not in MAY_BE.get(kind, ()):
                (folder / "config.json").write_text(json.dumps(config | {key: value}))
                assert f"a/config.json: {key}=" in refused(hf.load, folder)


def test_every_key_of_the_tables_has_a_kind():
    keys = " ".join(keys for _, keys in hf.KINDS.values()).split()
    assert len(keys) == len(set(keys))
    for architecture in hf.READABLE.values():
        assert set(keys) >= set(architecture.fields.values()) | architecture.defaults.keys() - {"qkv_bias"}


@pytest.mark.parametrize("text", ["[1]", "5", "null", '"config"', "[" * 100_000, '{"a": 1', "\xff"])
def test_a_file_that_holds_no_object_is_refused_by_its_name(text, tmp_path):
    folder, _, _ = saved(build("baseline"), tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    for name in ("model.safetensors.index.json", "config.json"):
        (folder / name).write_text(text, encoding="latin-1" if text == "\xff" else "utf-8")
        assert f"{name} is damaged" in refused(hf.load, folder)


def test_an_index_without_a_map_of_files_is_refused(tmp_path):
    folder, _, _ = saved(build("baseline"), tmp_path / "a")
    (folder / "model.safetensors").unlink()
    for weight_map in (None, [], {"model.norm.weight": 5}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert "index.json has no weight_map" in refused(hf.load, folder)


@pytest.mark.parametrize(
    "model_type, sizes, words",
    [
        ("qwen3", dict(num_hidden_layers=2**18), "says n_layer=262144, and its weights have no model.layers.262143."),
        ("qwen3", dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000 must be a whole number from 1 to 2^18"),
        (
            "qwen3",
            dict(vocab_size=2**31),
            r"embed_tokens.weight is [97, 64], not [2147483648, 64], as config.json says",
        ),
        ("qwen3", dict(head_dim=2**18), "self_attn.k_norm.weight is [16], not [262144]"),
        (
            "qwen3_moe",
            dict(num_hidden_layers=2**18, mlp_only_layers=[*range(2**17)]),
            "its weights have no model.layers",
        ),
        (
            "qwen3_moe",
            dict(num_experts=2**18),
            "n_expert=262144, and its weights have no model.layers.1.mlp.experts.262143",
        ),
        (
            "qwen3_next",
            dict(full_attention_interval=2**18, layer_types=None),
            "self_attn.k_norm.weight is [16], and not",
        ),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_built_of_them(
    model_type, sizes, words, tmp_path, monkeypatch
):
    folder, config, _ = saved(tiny(model_type), tmp_path / "a")
    (folder / "config.json").write_text(json.dumps(config | sizes))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    start = time.perf_counter()
    assert words in refused(hf.load, folder)
    assert time.perf_counter() - start < 10


def test_weights_that_are_no_plain_numbers_are_refused_by_name(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"{name} is I8: quantized weights are not read"):
        load_with(tmp_path / "a", lambda weights: weights.update({name: weights[name].to(torch.int8)}))


def test_a_weight_that_stands_in_two_files_is_refused(tmp_path):
    folder, _, weights = saved(build("baseline"), tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": weights.pop("model.norm.weight")}, folder / "b.safetensors")
    index = dict.fromkeys(weights, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "b.safetensors: model.norm.weight stands in a.safetensors too" in refused(hf.load, folder)


def test_a_head_of_its_own_is_read_whatever_config_json_says_and_one_of_gpt2_is_refused(tmp_path):
    model = build("baseline", tie_embeddings=False)
    folder, config, _ = saved(model, tmp_path / "a")
    (folder / "config.json").write_text(json.dumps(config | dict(tie_word_embeddings=True)))
    with pytest.warns(UserWarning, match="ties head and embedding, but two different ones are stored"):
        assert torch.equal(hf.load(folder)(tokens(2, 12)), model(tokens(2, 12)))
    with pytest.warns(UserWarning):
        assert hf.config_of(folder)[1]["tie_embeddings"] is False
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(theirs(tokens(2, 12)).logits, model(tokens(2, 12)), atol=1e-4, rtol=0)

    folder, _, weights = saved(build("gpt2"), tmp_path / "b")
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    hf.load(folder)
    save_file(weights | {"lm_head.weight": torch.ones(97, 64)}, folder / "model.safetensors")
    assert "lm_head.weight is not the embedding" in refused(hf.load, folder)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
def test_an_embedding_that_is_stored_as_the_head_alone_is_read_as_both(model_type, tmp_path):
    model = tiny(model_type)
    folder, _, weights = saved(model, tmp_path / "a")
    embed = hf.ARCHITECTURES[model_type].names["embed"] + ".weight"
    weights["lm_head.weight"] = weights.pop(embed)  # as safetensors.torch.save_model leaves it
    save_file(weights, folder / "model.safetensors")
    assert torch.equal(hf.load(folder)(tokens(2, 12)), model(tokens(2, 12)))
    assert torch.equal(dict(hf.weights_of(folder))["embed.weight"], model.embed.weight)

    if model_type == "qwen3":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict(tie_word_embeddings=False)))
        assert f"lack 1 weights: {embed}" in refused(hf.load, folder)


def test_end_tokens_are_those_of_generation_config_or_else_of_config_or_else_of_the_model_type(tmp_path):
    folder, config, _ = saved(tiny("llama"), tmp_path / "a")

    def ends(generation, **keys):
        del config["eos_token_id"]
        (folder / "config.json").write_text(json.dumps(config | keys))
        config["eos_token_id"] = None
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return hf.end_ids(folder)

    assert ends(dict(eos_token_id=[7, 8]), eos_token_id=9) == [7, 8]
    assert ends(dict(temperature=0.6), eos_token_id=9) == [9]
    assert ends({}) == [2]
    assert ends({}, eos_token_id=None) == []
    assert "generation_config.json: eos_token_id=x must be a token's id" in refused(ends, dict(eos_token_id="x"))
    (folder / "generation_config.json").unlink()
    assert hf.end_ids(folder) == [2]


def test_a_saved_folder_keeps_the_tokenizer_and_the_end_tokens_of_the_one_that_it_came_from(tmp_path):
    folder, config, _ = saved(build("baseline"), tmp_path / "a")
    files = {
        "tokenizer.json": '{"model":  {}}',
        "tokenizer_config.json": '{"chat_template": "x"}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6], "bos_token_id": 4, "top_k": 20}')
    (folder / "adapter_model.safetensors").write_text("of another model")
    hf.save(hf.load(folder), tmp_path / "b", folder)
    for name, text in files.items():
        assert (tmp_path / "b" / name).read_text() == text
    assert json.loads((tmp_path / "b/generation_config.json").read_text())["top_k"] == 20
    again = json.loads((tmp_path / "b/config.json").read_text())
    assert again == config | dict(bos_token_id=4, eos_token_id=[5, 6])
    assert not (tmp_path / "b/adapter_model.safetensors").exists()
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | dict(eos_token_id=6)))
    hf.save(hf.load(folder), tmp_path / "c", folder)
    assert hf.end_ids(tmp_path / "c") == [6]


def test_pickles_as_config_or_tokenizer_are_not_run(tmp_path):
    folder = tmp_path / "hf"
    hf.save(build("baseline"), folder)
    for name in ("config.json", "tokenizer.json"):
        for payload in payloads(tmp_path / "mark"):
            before = (folder / name).read_bytes() if (folder / name).exists() else b""
            (folder / name).write_bytes(payload)
            if name == "config.json":
                assert "config.json is damaged" in refused(hf.load, folder)
            refused(sample.main, [str(folder)])
            (folder / name).write_bytes(before)
    assert not (tmp_path / "mark").exists()


# ---- by itself -------------------------------------------------------------------------------------------------------


def test_hf_imports_nothing_but_the_standard_library_torch_and_safetensors():
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "hf.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "safetensors"}


def test_copied_with_one_model_file_it_works(tmp_path, monkeypatch):
    for name in ("hf.py", "model_gpt2.py"):
        shutil.copy(ROOT / name, tmp_path)
    elsewhere = [path for path in sys.path if Path(path).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for name in [name for name in sys.modules if name == "hf" or name.startswith("model_")]:
        monkeypatch.delitem(sys.modules, name)
    copied = importlib.import_module("hf")
    model = build("gpt2")
    assert Path(sys.modules["model_gpt2"].__file__).parent == tmp_path == Path(copied.__file__).parent
    copied.save(model, tmp_path / "saved")
    assert torch.equal(copied.load(tmp_path / "saved")(tokens(2, 12)), model(tokens(2, 12)))
    with pytest.raises(ModuleNotFoundError, match="model_baseline"):
        build("baseline")
