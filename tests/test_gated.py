"""What is special to model_gated.py: its gates, against three models of transformers and against the baseline."""

import math
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from model_gated import GPT, GPTConfig, apply_rope, rope_cos_sin
from tests.tiny import build, tokens

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=None,
    bos_token_id=1, eos_token_id=2, attn_implementation="eager", initializer_range=0.2,
)  # fmt: skip
OURS = dict(vocab_size=97, block_size=128, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, n_embd=32, n_inner=48)
FULL = ["full_attention"] * 2
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn.wq": "self_attn.q_proj", "attn.wk": "self_attn.k_proj", "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.w_gate": "mlp.gate_proj", "mlp.w_up": "mlp.up_proj", "mlp.w_down": "mlp.down_proj",
}  # fmt: skip


@contextmanager
def exact():
    """transformers computes norms and softmax in float32 by name: while this lasts, that name means float64.

    A module that is imported meanwhile would keep the wrong meaning for all tests that follow.
    """
    imported = set(sys.modules)
    float32 = torch.float32
    to_float = torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32 = torch.float = float32
        torch.Tensor.float = to_float
        torch.set_default_dtype(float32)
        new = [name for name in set(sys.modules) - imported if name.startswith("transformers")]
        assert not new, f"to be imported before: {new}"


def oracle(cls, config):
    """A model with weights drawn so that mistakes show: large matrices, and no norm at its default."""
    torch.manual_seed(0)
    model = cls(config).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model


def renamed(theirs, top, layer):
    """Returns {our name: their weight}, given {our name: their name} of the model and of a layer."""
    weights = theirs.state_dict()
    names = dict(top)
    for i in range(theirs.config.num_hidden_layers):
        for ours, name in layer.items():
            names[f"blocks.{i}.{ours}"] = f"model.layers.{i}.{name}"
    return {f"{ours}.weight": weights[f"{name}.weight"].clone() for ours, name in names.items()}


def lfm3():
    rope = {"full_attention": PLAIN}
    config = transformers.Lfm3Config(
        **SIZES, layer_types=FULL, use_sandwich_norm=False, rope_parameters=rope, norm_eps=1e-3
    )
    theirs = oracle(transformers.Lfm3ForCausalLM, config)
    top = TOP | {"norm": "model.embedding_norm"}
    layer = LAYER | {"attn_norm": "operator_norm", "mlp_norm": "ffn_norm", "attn.wo_gate": "self_attn.g_proj"}
    layer |= {"mlp.w_gate": "feed_forward.w1", "mlp.w_up": "feed_forward.w3", "mlp.w_down": "feed_forward.w2"}
    return theirs, renamed(theirs, top, layer), dict(output_gate="head")


def laguna(gating, output_gate):
    rope = {"full_attention": PLAIN | {"partial_rotary_factor": 1.0}}
    config = transformers.LagunaConfig(
        **SIZES, gating=gating, mlp_layer_types=["dense"] * 2, rope_parameters=rope, rms_norm_eps=1e-3
    )
    theirs = oracle(transformers.LagunaForCausalLM, config)
    layer = LAYER | {"attn.wo_gate": "self_attn.g_proj"}
    return theirs, renamed(theirs, TOP, layer), dict(output_gate=output_gate, gate_activation="softplus")


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        **SIZES, layer_types=FULL, mlp_only_layers=[0, 1], rope_parameters=dict(PLAIN), partial_rotary_factor=1.0,
        rms_norm_eps=1e-3,
    )  # fmt: skip
    theirs = oracle(transformers.Qwen3NextForCausalLM, config)
    weights = renamed(theirs, TOP, LAYER)
    for name in list(weights):
        if name.endswith("norm.weight"):
            weights[name] += 1  # they multiply by 1 + weight
        elif name.endswith("wq.weight"):  # a head's rows are its query, then its gate
            query, gate = weights[name].view(4, 2, 16, 32).unbind(dim=1)
            weights[name] = query.reshape(64, 32)
            weights[name.replace("wq", "wo_gate")] = gate.reshape(64, 32)
    return theirs, weights, dict(output_gate="element")


ORACLES = {
    "lfm3": lfm3,
    "laguna per head": lambda: laguna("per-head", "head"),
    "laguna per element": lambda: laguna("per-element", "element"),
    "qwen3-next": qwen3_next,
}


@pytest.mark.parametrize("case", ORACLES)
def test_logits_and_gradients_of_the_embedding_equal_those_of_transformers(case):
    x = tokens(2, 50)
    y = tokens(2, 50, seed=2)
    ORACLES[case]()  # imports what it needs
    with exact():
        theirs, weights, options = ORACLES[case]()
        ours = GPT(GPTConfig(**OURS, **options, norm_eps=1e-3, tie_embeddings=False)).eval()
        ours.load_state_dict(weights)
        got = ours(x)
        want = theirs(x).logits
        assert got.dtype == torch.float64 and want.std() > 0.5  # the oracle says something
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
        loss = F.cross_entropy(want.flatten(0, 1), y.flatten())
        want = torch.autograd.grad(loss, theirs.get_input_embeddings().weight)[0]
        got = torch.autograd.grad(ours(x, y), ours.embed.weight)[0]
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


def test_the_layer_is_its_equations_head_by_head():
    attn = build("gated", qkv_gates="qkv", gate_activation="softplus").double().blocks[0].attn
    u = torch.randn(1, 9, 64, dtype=torch.float64)
    rope = rope_cos_sin(torch.arange(9), build("gated").config)
    wanted = []
    for h in range(4):
        rows = slice(16 * h, 16 * h + 16)
        shared = slice(16 * (h // 2), 16 * (h // 2) + 16)  # two query heads to a key head
        q = attn.q_norm(u @ attn.wq.weight[rows].T) * (u @ attn.wq_gate.weight[rows].T).sigmoid()
        k = attn.k_norm(u @ attn.wk.weight[shared].T) * (u @ attn.wk_gate.weight[shared].T).sigmoid()
        v = (u @ attn.wv.weight[shared].T) * (u @ attn.wv_gate.weight[shared].T).sigmoid()
        q = apply_rope(q[:, :, None], *rope)[:, :, 0]
        k = apply_rope(k[:, :, None], *rope)[:, :, 0]
        scores = (q @ k.mT / 4).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
        y = scores.softmax(dim=-1) @ v
        wanted.append(y * (1 + (u @ attn.wo_gate.weight[rows].T).exp()).log())
    want = torch.cat(wanted, dim=-1) @ attn.wo.weight.T
    torch.testing.assert_close(attn(u, rope), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "softplus"])
def test_a_gate_per_head_is_a_gate_per_element_with_equal_rows(activation):
    head = build("gated", output_gate="head", gate_activation=activation).double()
    element = build("gated", output_gate="element", gate_activation=activation).double()
    weights = head.state_dict()
    for name in list(weights):
        if "wo_gate" in name:
            weights[name] = weights[name].repeat_interleave(16, dim=0)
    element.load_state_dict(weights)
    x = tokens(2, 20)
    torch.testing.assert_close(element(x), head(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        dict(output_gate="head"),
        dict(output_gate="element"),
        dict(output_gate="head", gate_activation="softplus"),
        dict(output_gate="element", gate_activation="softplus"),
        dict(output_gate="none", qkv_gates="q"),
        dict(output_gate="none", qkv_gates="k"),
        dict(output_gate="none", qkv_gates="v"),
        dict(qkv_gates="vqk"),
    ],
)
def test_open_gates_leave_the_baseline_and_others_do_not(options):
    baseline = build("baseline").double()
    gated = build("gated", **options).double()
    new = gated.load_state_dict(baseline.state_dict(), strict=False)
    n_gates = len(options.get("qkv_gates", "")) + (options.get("output_gate") != "none")
    assert len(new.missing_keys) == 2 * n_gates and all(name.endswith("_gate.weight") for name in new.missing_keys)
    assert not new.unexpected_keys
    x = tokens(2, 20)
    assert (gated(x) - baseline(x)).abs().max() > 1e-3
    neutral = 50.0  # sigmoid(50) = 1 in float64
    if options.get("gate_activation") == "softplus":
        neutral = math.log(math.e - 1)  # softplus of it is 1
    for name, module in gated.named_modules():
        if name.endswith("_gate") and ".attn." in name:
            module.register_forward_hook(lambda module, args, y: torch.full_like(y, neutral))
    torch.testing.assert_close(gated(x), baseline(x), atol=1e-12, rtol=0)


def test_without_any_gate_the_weights_are_those_of_the_baseline():
    gated = build("gated", output_gate="none")
    baseline = build("baseline")
    baseline.load_state_dict(gated.state_dict())
    x = tokens(2, 20)
    assert torch.equal(gated(x), baseline(x))


def test_a_closed_gate_silences_its_part_and_a_softplus_gate_amplifies():
    model = build("gated", output_gate="element").double()
    for block in model.blocks:
        block.attn.wo_gate.register_forward_hook(lambda module, args, y: torch.full_like(y, -800.0))
        block.attn.register_forward_hook(lambda module, args, y: seen.append(y))
    seen = []
    model(tokens(2, 20))
    assert len(seen) == 2 and not any(y.any() for y in seen)
    loud = build("gated", output_gate="element", gate_activation="softplus").double()
    plain = build("gated", output_gate="none").double()
    plain.load_state_dict(loud.state_dict(), strict=False)
    outputs = []
    for attn in (loud.blocks[0].attn, plain.blocks[0].attn):
        attn.register_forward_hook(lambda module, args, y: outputs.append(y))
    loud.blocks[0].attn.wo_gate.register_forward_hook(lambda module, args, y: torch.full_like(y, 3.0))
    loud(tokens(2, 20))
    plain(tokens(2, 20))
    torch.testing.assert_close(outputs[0], math.log1p(math.exp(3.0)) * outputs[1], atol=1e-12, rtol=0)


def test_gates_are_computed_from_what_attention_reads_and_not_from_what_it_writes():
    model = build("gated", output_gate="element", qkv_gates="qkv").double()
    attn = model.blocks[1].attn
    read = []
    attn.register_forward_hook(lambda module, args, y: read.append(args[0]))
    gates = (attn.wq_gate, attn.wk_gate, attn.wv_gate, attn.wo_gate)
    for gate in gates:
        gate.register_forward_hook(lambda module, args, y: read.append(args[0]))
    model(tokens(2, 20))
    assert len(read) == 5 and all(torch.equal(x, read[-1]) for x in read)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(output_gate="heads"), "output_gate='heads' is unknown: try none, head or element"),
        (dict(gate_activation="relu"), "gate_activation='relu' is unknown: try sigmoid or softplus"),
        (dict(qkv_gates="qz"), "qkv_gates='qz' is unknown: try letters of qkv"),
    ],
)
def test_bad_options_are_refused_with_what_to_try(options, words):
    with pytest.raises(ValueError, match=words):
        build("gated", **options)
