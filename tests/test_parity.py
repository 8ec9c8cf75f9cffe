"""Model files against transformers with the same random weights, drawn so that a mistake shows, by way of hf.py.

A fresh model attends almost uniformly and its norms are all 1, which hides most mistakes: weights are drawn large, and
every norm and bias is moved away from its default.
"""

import json

import pytest
import torch

import hf
import model_baseline
from tests.tiny import tokens

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip


def qwen3(rope="plain", tie=True):
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, rope_parameters=ROPES[rope], rms_norm_eps=1e-3,
        tie_word_embeddings=tie, attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def llama(rope="plain", tie=False, kv=2):
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv, max_position_embeddings=256, rope_parameters=ROPES[rope], rms_norm_eps=1e-3,
        tie_word_embeddings=tie, attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mistral(window=None):
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rope_parameters=ROPES["plain"],
        sliding_window=window, attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config)


def qwen3_window(**options):
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rope_parameters=ROPES["plain"],
        use_sliding_window=True, sliding_window=9, attn_implementation="eager", initializer_range=0.2, **options,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def smollm3(window=9, **options):
    config = transformers.SmolLM3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rope_parameters=ROPES["plain"], pad_token_id=None,
        use_sliding_window=window is not None, sliding_window=window, attn_implementation="eager",
        initializer_range=0.2, **options,
    )  # fmt: skip
    return transformers.SmolLM3ForCausalLM(config)


def qwen3_next(rope="plain", tie=False, layer_types=None, rotary=0.25):
    config = transformers.Qwen3NextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, rope_parameters=dict(ROPES[rope]),
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
        mlp_only_layers=[0, 1, 2, 3], rms_norm_eps=1e-3, layer_types=layer_types, partial_rotary_factor=rotary,
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


def qwen2_moe(**options):
    config = transformers.Qwen2MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=24, num_hidden_layers=3,
        shared_expert_intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_experts=8,
        num_experts_per_tok=3, qkv_bias=False, max_position_embeddings=256, rope_parameters=ROPES["plain"],
        attn_implementation="eager", experts_implementation="eager", initializer_range=0.2, **options,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


ORACLES = {
    "qwen3 plain tied": (qwen3, {}),
    "qwen3 plain untied": (qwen3, dict(tie=False)),
    "qwen3 linear": (qwen3, dict(rope="linear")),
    "qwen3 yarn": (qwen3, dict(rope="yarn", tie=False)),
    "gpt2": (gpt2, {}),
    "deepseek_v3 plain": (deepseek_v3, {}),
    "deepseek_v3 linear tied": (deepseek_v3, dict(rope="linear", tie=True)),
    "deepseek_v3 yarn": (deepseek_v3, dict(rope="yarn")),
    "deepseek_v3 without a query rank": (deepseek_v3, dict(rope="yarn", q_rank=None)),
    "qwen3-next": (qwen3_next, {}),
    "qwen3-next yarn tied, two of four attend": (
        qwen3_next,
        dict(rope="yarn", tie=True, layer_types=["full_attention", "linear_attention"] * 2, rotary=0.5),
    ),
    "deepseek_v3 llama3": (deepseek_v3, dict(rope="llama3")),
    "qwen3 with a window, by layers": (
        qwen3_window,
        dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "qwen3 with a window, from the second layer on": (
        qwen3_window,
        dict(max_window_layers=1, tie_word_embeddings=True),
    ),
    "smollm3": (smollm3, dict(window=None)),
    "smollm3 with a window where there are no positions": (smollm3, dict(no_rope_layers=[0, 1, 0, 1])),
    "smollm3 with windows anywhere": (
        smollm3,
        dict(no_rope_layers=[1, 1, 0, 0], layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    "llama": (llama, {}),
    "llama3": (llama, dict(rope="llama3")),
    "llama yarn tied, without groups": (llama, dict(rope="yarn", tie=True, kv=4)),
    "qwen3 moe": (qwen3_moe, {}),
    "qwen3 moe, weights as they are, tied": (qwen3_moe, dict(normalize=False, tie_word_embeddings=True)),
    "qwen3 moe, every second layer": (qwen3_moe, dict(decoder_sparse_step=2)),
    "qwen3 moe, a list of layers": (qwen3_moe, dict(mlp_only_layers=[1])),
    "qwen2 moe": (qwen2_moe, {}),
    "qwen2 moe, wide heads, a list of layers, gates of sum 1": (
        qwen2_moe,
        dict(head_dim=16, mlp_only_layers=[1], norm_topk_prob=True, tie_word_embeddings=True),
    ),
}


def lift(patch):
    """transformers computes norms and the delta rule in fp32 even in an fp64 model: in fp64 too while this lasts."""
    to, to_float = torch.Tensor.to, torch.Tensor.float
    patch.setattr(
        torch.Tensor, "to", lambda x, *a, **k: to(x, *(torch.float64 if y is torch.float32 else y for y in a), **k)
    )
    patch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))


@pytest.fixture(params=ORACLES)
def pair(request, tmp_path):
    """Returns transformers' model and the folder in which it was saved."""
    make, options = ORACLES[request.param]
    torch.manual_seed(0)
    theirs = make(**options).eval()
    for p in theirs.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, tmp_path / "theirs"


def test_logits_and_embedding_gradient_equal_those_of_transformers(pair):
    theirs, folder = pair
    x = tokens(2, 200)
    y = tokens(2, 200, seed=2)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-5)):
        ours = hf.load(folder, dtype=dtype)
        theirs = theirs.to(dtype)
        got = ours(x)
        with pytest.MonkeyPatch.context() as patch:
            if dtype == torch.float64:
                lift(patch)
            want = theirs(x).logits
        assert want.std() > 0.5  # the oracle says something
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
        loss = torch.nn.functional.cross_entropy(want.flatten(0, 1), y.flatten())
        want = torch.autograd.grad(loss, theirs.get_input_embeddings().weight)[0]
        got = torch.autograd.grad(ours(x, y), ours.embed.weight)[0]
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("make", [qwen3, qwen3_moe, qwen3_next])
def test_a_bf16_model_is_as_close_to_fp64_as_that_of_transformers(make, tmp_path):
    """By the middle token, since those whose experts are near a tie are far off in both."""
    ours = theirs = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        model = make().eval().bfloat16()
        for p in model.parameters():
            if p.ndim == 1:
                p.data += 0.3 * torch.randn_like(p)
        model.save_pretrained(tmp_path)
        x = tokens(4, 100, seed=seed)
        with torch.no_grad():
            exact = hf.load(tmp_path, dtype=torch.float64)(x)
            ours += (hf.load(tmp_path, dtype=torch.bfloat16)(x) - exact).norm(dim=-1).median()
            theirs += (model(x).logits - exact).norm(dim=-1).median()
    assert ours <= 1.05 * theirs, ours / theirs


def test_what_hf_saves_opens_in_transformers_with_equal_weights_and_logits(pair, tmp_path):
    theirs, folder = pair
    hf.save(hf.load(folder), tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(back) is type(theirs)
    before = theirs.state_dict()
    after = back.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    x = tokens(2, 100)
    torch.testing.assert_close(back(x).logits, theirs(x).logits, atol=1e-4, rtol=0)  # its config says the same


def test_greedy_generation_equals_that_of_transformers(pair):
    theirs, folder = pair
    x = tokens(1, 40)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = theirs.double().generate(x, attention_mask=torch.ones_like(x), **options)
    assert torch.equal(hf.load(folder, dtype=torch.float64).generate(x, 20, temperature=0), want)


def test_yarns_magnitude_is_that_of_transformers_also_where_nothing_is_stretched():
    config = transformers.Qwen3Config(head_dim=64, max_position_embeddings=64)
    for factor in (0.5, 1.0, 4.0):
        config.rope_parameters = ROPES["yarn"] | {"factor": factor}
        want = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1]
        ours = model_baseline.GPTConfig(rope_scaling="yarn", rope_factor=factor, rope_original=64)
        assert model_baseline.yarn(torch.ones(32), ours)[1] == pytest.approx(want)


def test_a_mistral_without_a_window_is_read_as_the_llama_that_it_is(tmp_path):
    torch.manual_seed(0)
    theirs = mistral().eval()
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(hf.load(tmp_path)(tokens(1, 50)), theirs(tokens(1, 50)).logits, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]  # left out, it is 4096
    for change, window in ((dict(sliding_window=255), 255), (dict(max_position_embeddings=4097), 4096)):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        variant, fields = hf.config_of(tmp_path)
        assert (variant, fields["layer_pattern"], fields["window"]) == ("sliding", "ll", window)


def test_a_mistral_with_a_window_is_read_and_saved_as_a_smollm3_of_local_layers(tmp_path):
    torch.manual_seed(0)
    theirs = mistral(window=9).eval().double()
    theirs.config.use_sliding_window = False  # of Qwen3, and nothing to a Mistral
    theirs.save_pretrained(tmp_path / "theirs")
    ours = hf.load(tmp_path / "theirs", dtype=torch.float64)
    want = theirs(tokens(2, 50)).logits
    torch.testing.assert_close(ours(tokens(2, 50)), want, atol=1e-5, rtol=0)
    hf.save(ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(back).__name__ == "SmolLM3ForCausalLM"
    torch.testing.assert_close(back.double()(tokens(2, 50)).logits, want, atol=1e-5, rtol=0)


def test_a_window_as_long_as_the_longest_text_hides_nothing(tmp_path):
    torch.manual_seed(0)
    mistral(window=256).save_pretrained(tmp_path)
    assert hf.config_of(tmp_path)[0] == "baseline"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(hf.load(tmp_path)(tokens(1, 256)), theirs(tokens(1, 256)).logits, atol=1e-4, rtol=0)


def test_a_config_without_key_heads_has_as_many_as_query_heads(tmp_path):
    torch.manual_seed(0)
    theirs = llama(kv=4).eval()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(hf.load(tmp_path)(tokens(1, 50)), theirs(tokens(1, 50)).logits, atol=1e-4, rtol=0)


SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=256, initializer_range=0.2, hidden_act="silu", rms_norm_eps=1e-05, use_cache=True,
    torch_dtype="bfloat16",
)  # fmt: skip
QWEN = SIZES | dict(
    rope_theta=1000000, max_window_layers=28, sliding_window=None, use_sliding_window=False, attention_dropout=0.0,
    num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
EXPERTS = dict(
    moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, decoder_sparse_step=1, router_aux_loss_coef=0.001,
    output_router_logits=False,
)  # fmt: skip
PUBLISHED = {  # the keys that config.json has on the Hub, with small sizes
    "gpt2": dict(
        model_type="gpt2", activation_function="gelu_new", attn_pdrop=0.1, bos_token_id=50256, embd_pdrop=0.1,
        eos_token_id=50256, initializer_range=0.2, layer_norm_epsilon=1e-05, n_ctx=64, n_embd=32, n_head=4, n_layer=2,
        n_positions=64, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, vocab_size=97,
        summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    ),
    "Llama-2-7b": SIZES | dict(
        model_type="llama", pad_token_id=0, pretraining_tp=1, rope_scaling=None, tie_word_embeddings=False,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=2,
    ),
    "llama-7b": SIZES | dict(model_type="llama", bos_token_id=1, eos_token_id=2, pad_token_id=-1),
    "SmolLM2-135M": SIZES | dict(
        model_type="llama", attention_bias=False, is_llama_config=True, mlp_bias=False, num_key_value_heads=2,
        pretraining_tp=1, rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    ),
    "Mistral-7B-v0.3": SIZES | dict(
        model_type="mistral", num_key_value_heads=2, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    ),
    "Mistral-7B-v0.1": SIZES | dict(
        model_type="mistral", num_key_value_heads=2, rope_theta=10000.0, sliding_window=64, tie_word_embeddings=False,
    ),
    "Qwen3-0.6B": QWEN | dict(
        model_type="qwen3", attention_bias=False, head_dim=16, rope_scaling=None, tie_word_embeddings=True,
    ),
    "Qwen3-30B-A3B": QWEN | EXPERTS | dict(
        model_type="qwen3_moe", attention_bias=False, head_dim=16, rope_scaling=None, tie_word_embeddings=False,
        norm_topk_prob=True, mlp_only_layers=[],
    ),
    "Qwen2-57B-A14B without biases": QWEN | EXPERTS | dict(
        model_type="qwen2_moe", shared_expert_intermediate_size=48, sliding_window=128, qkv_bias=False,
        norm_topk_prob=False, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_as_the_hub_has_it_has_the_logits_of_transformers(name, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(PUBLISHED[name]))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), dtype=torch.float32, attn_implementation="eager"
    )
    theirs.eval().save_pretrained(tmp_path, max_shard_size="40KB")
    config.write_text(json.dumps(PUBLISHED[name]))
    for beside in ("adapter_model.safetensors", "consolidated.safetensors", "model-00009-of-00009.safetensors"):
        (tmp_path / beside).write_bytes(b"none of the weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"none that is read")
    x = tokens(2, 64)
    want = theirs(x).logits
    assert (tmp_path / "model.safetensors.index.json").exists() and want.std() > 0.5
    torch.testing.assert_close(hf.load(tmp_path)(x), want, atol=1e-4, rtol=0)


def test_the_weights_of_many_files_are_those_that_transformers_reads(tmp_path):
    torch.manual_seed(0)
    theirs = qwen3(rope="yarn")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(hf.load(tmp_path)(tokens(1, 50)), theirs(tokens(1, 50)).logits, atol=1e-4, rtol=0)

    qwen3(rope="yarn").save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "model.safetensors")  # beside an index without it
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(hf.load(tmp_path)(tokens(1, 50)), theirs(tokens(1, 50)).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", hf.READABLE.values(), ids=hf.READABLE)
def test_the_tables_keys_and_defaults_are_those_of_transformers(architecture):
    config = transformers.CONFIG_MAPPING[architecture.model_type]()
    theirs = config.to_dict() | (getattr(config, "rope_parameters", None) or {})
    assert getattr(transformers, architecture.class_name).config_class is type(config)
    assert theirs.keys() >= architecture.fixed.keys()
    for key, value in architecture.defaults.items():
        assert theirs[key] == value, key
