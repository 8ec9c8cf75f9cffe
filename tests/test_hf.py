"""Hugging Face folders: what hf.save writes is what hf.load reads, and what either of them refuses, and how it says so.

That both agree with transformers is in tests/test_parity.py.
"""

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf
import sample
from tests.payloads import payloads
from tests.tiny import EOT, MODELS, ROOT, build, tokens

OPTIONS = {"qwen2_moe": dict(qk_norm=False, n_shared_expert=2, shared_gate=True)}
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
    with pytest.raises(FileExistsError, match="holds a model already"):
        hf.save(model, folder)


def test_a_folder_with_only_a_config_of_its_own_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a model already"):
        hf.save(build("baseline"), tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_many_files_and_the_rope_keys_of_transformers_5_load_alike(tmp_path):
    model = build("baseline", rope_scaling="yarn", rope_factor=4.0, rope_original=16)
    folder, config, weights = saved(model, tmp_path / "one")
    many = tmp_path / "many"
    many.mkdir()
    for i, name in enumerate(weights):
        save_file({name: weights[name]}, many / f"model-{i + 1:05d}-of-{len(weights):05d}.safetensors")
    rope = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    (many / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    assert hf.load(many).config == hf.load(folder).config == model.config
    assert torch.equal(hf.load(many)(tokens(1, 50)), model(tokens(1, 50)))


def test_gpt2_weights_without_prefix_and_with_stored_masks_load_as_the_hub_has_them(tmp_path):
    model = build("gpt2")
    folder, _, weights = saved(model, tmp_path / "a")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(weights | masks, folder / "model.safetensors")
    assert torch.equal(hf.load(folder)(tokens(1, 50)), model(tokens(1, 50)))


# Sizes at which a tiny model has the values that transformers takes for absent keys.
AT_DEFAULTS = {
    "qwen3": dict(head_dim=128, tie_embeddings=False),
    "gpt2": {},
    "deepseek_v3": dict(n_layer=3, q_rank=1536, tie_embeddings=False),
    "qwen3_moe": dict(normalize_gates=False, tie_embeddings=False),
    "qwen2_moe": dict(normalize_gates=False, tie_embeddings=False),
    "qwen3_next": dict(head_dim=256, tie_embeddings=False),
}


@each_architecture
def test_keys_that_a_config_leaves_out_have_the_values_that_transformers_takes(model_type, tmp_path):
    model = tiny(model_type, **AT_DEFAULTS[model_type])
    folder, config, _ = saved(model, tmp_path / "a")
    defaults = hf.ARCHITECTURES[model_type].defaults
    for key in defaults.keys() - {"qkv_bias"}:  # whose default is refused
        assert config.pop(key) == defaults[key]
    for key in ("bos_token_id", "eos_token_id", "hidden_act", "use_sliding_window"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(hf.load(folder)(tokens(2, 12)), model(tokens(2, 12)))


def test_a_saved_folder_names_no_end_token_that_the_model_does_not_have(tmp_path):
    for name in ("baseline", "gpt2", "mla"):
        for eot_id, want in ((-1, None), (EOT, EOT)):
            _, config, _ = saved(build(name, eot_id=eot_id), tmp_path / f"{name} {want}")
            assert config["eos_token_id"] == config["bos_token_id"] == want  # 50,256 for GPT-2 where they are left out


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
    load_with(tmp_path / "d", lambda w: w.update({"lm_head.weight": torch.ones(97, 64)}))  # a copy where it is tied


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
    with pytest.raises(ValueError, match=r"safetensors lack \d+ weights"):
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
    with pytest.raises(ValueError, match="model_type='mamba9'; these can be read: qwen3, gpt2, deepseek_v3"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type=None; these can be read: qwen3"):
        hf.load(tmp_path)


ALTERED = {  # what a config.json says, and the words of the refusal
    "qwen3": [
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(use_sliding_window=True), "use_sliding_window=True"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'.*only 'silu'"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "llama3"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=16)), "beta_fast=16"),
        (dict(rope_scaling=dict(rope_type="linear")), "no factor"),
    ],
    "gpt2": [
        (dict(n_inner=100), "n_inner=100"),
        (dict(activation_function="gelu"), "activation_function"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ],
    "deepseek_v3": [
        (dict(attention_bias=True), "attention_bias"),
        (dict(rope_interleave=False), "rope_interleave"),
        (dict(hidden_act="gelu"), "hidden_act"),
    ],
    "qwen3_moe": [
        (dict(attention_bias=True), "attention_bias"),
        (dict(use_sliding_window=True), "use_sliding_window"),
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
    key = hf.ARCHITECTURES[model_type].fields["n_layer"]
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json has no {key}"):
        hf.load(folder)


def test_attention_biases_of_qwen2_moe_are_refused_also_where_they_are_the_default(tmp_path):
    folder, config, _ = saved(tiny("qwen2_moe"), tmp_path / "a")
    del config["qkv_bias"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="qkv_bias=True is not supported, only False"):
        hf.load(folder)


@pytest.mark.parametrize(
    "name, options",
    [
        ("baseline", dict(qk_norm=False)),
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


@pytest.mark.parametrize("name", sorted(set(MODELS) - {a.variant for a in hf.ARCHITECTURES.values()}))
def test_a_variant_that_transformers_does_not_have_is_refused_with_those_that_can_be_saved(name, tmp_path):
    with pytest.raises(ValueError, match=f"no model like model_{name}.py; these can be saved: baseline, gpt2, hybrid"):
        hf.save(build(name), tmp_path / "a")


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


# ---- what stands in a folder of someone else's -----------------------------------------------------------------------


@each_architecture
def test_pickled_weights_and_paths_that_lead_out_of_a_folder_are_not_read(model_type, tmp_path):
    folder, _, weights = saved(tiny(model_type), tmp_path / "hf")
    name = next(name for name in weights if "embed" in name or "wte" in name)
    save_file({name: weights.pop(name)}, tmp_path / "outside.safetensors")
    save_file(weights, folder / "model.safetensors")
    for payload in payloads(tmp_path / "mark"):
        for where in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "pytorch_model.bin"):
            index = {"metadata": {}, "weight_map": {name: where}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            (folder / "pytorch_model.bin").write_bytes(payload)
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
            assert f"lack 1 weights: {name}" in refused(hf.load, folder)
    for payload in payloads(tmp_path / "mark"):
        (folder / "extra.safetensors").write_bytes(payload)
        assert "extra.safetensors is damaged" in refused(hf.load, folder)
    (folder / "extra.safetensors").unlink()
    (folder / "extra.safetensors").symlink_to(tmp_path / "outside.safetensors")  # as Hugging Face's own cache has them
    hf.load(folder)
    assert not (tmp_path / "mark").exists()


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
