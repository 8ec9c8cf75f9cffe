"""What is special to model_moe.py: routing, dispatch, balance, metrics, and training by several processes."""

import math
import os
import socket
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flops
import model_moe
from muon import MuonAdamW, make_optimizer, param_groups
from tests.tiny import ROOT, build, tokens

V3 = dict(
    router_score="sigmoid", n_group=4, n_group_per_token=2, n_expert=8, n_expert_per_token=3, gate_scale=2.5,
    n_shared_expert=2,
)  # fmt: skip
ROUTERS = {
    "Qwen3-MoE": {},
    "not normalised": dict(normalize_gates=False),
    "one expert": dict(n_expert_per_token=1, normalize_gates=False),
    "DeepSeek-V3": V3,
    "gated shared expert": dict(n_shared_expert=1, shared_gate=True, router_score="sigmoid", normalize_gates=False),
    "all experts": dict(n_expert_per_token=6),
    "groups of one expert": dict(router_score="sigmoid", n_group=6, n_group_per_token=3),
}


SMALL = dict(n_embd=32, head_dim=8, n_inner=48, n_expert_inner=16)


def layer(name="moe", seed=0, bias=0.3, **options):
    """An MoE alone, with large weights and a selection bias."""
    moe = build(name, seed, **SMALL | options).blocks[1].mlp
    with torch.no_grad():
        moe.router.weight.mul_(3.0)
        moe.router.bias.copy_(bias * torch.randn_like(moe.router.bias))
    return moe


def plain(moe, x):
    """The layer as its equations say, token by token and expert by expert."""
    c, y = moe.router.config, []
    for u in x.flatten(0, 1):
        logits = moe.router.weight @ u
        s = logits.softmax(0) if c.router_score == "softmax" else logits.sigmoid()
        groups = (s + moe.router.bias).detach().view(c.n_group, -1).tolist()
        best = sorted(range(c.n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))[: c.n_group_per_token]
        size = c.n_expert // c.n_group
        open_to_it = [(groups[g][i], g * size + i) for g in best for i in range(size)]
        chosen = [e for _, e in sorted(open_to_it)[-c.n_expert_per_token :]]
        total = sum(s[e] for e in chosen) if c.normalize_gates else 1.0
        out = torch.zeros_like(u)
        for e in chosen:
            h = F.silu(u @ moe.w_gate.weight[e]) * (u @ moe.w_up.weight[e])
            out = out + c.gate_scale * s[e] / total * (h @ moe.w_down.weight[e])
        if c.n_shared_expert:
            scale = torch.sigmoid(moe.shared_router(u)) if c.shared_gate else 1.0
            out = out + scale * moe.shared(u)
        y.append(out)
    return torch.stack(y).view_as(x)


def none(x):
    """No token of x (B, T, C) is padding."""
    return torch.zeros(x.shape[:2], dtype=torch.bool)


def inputs(*shape, seed=3, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- routing and dispatch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["padded", "grouped"])
@pytest.mark.parametrize("router", ROUTERS)
def test_output_and_gradients_equal_those_of_a_loop_over_tokens_and_experts(router, form, monkeypatch):
    dtype, tolerance = (torch.float64, 1e-10) if form == "padded" else (torch.float32, 2e-5)
    monkeypatch.setattr(model_moe, "has_grouped_mm", lambda *_: form == "grouped")
    moe = layer(**ROUTERS[router]).to(dtype)
    moe.router.weight.data *= 0.3  # no near ties
    for shape in ((2, 23, 32), (1, 1, 32), (1, 2, 32)):
        x = inputs(*shape, dtype=dtype).requires_grad_()
        got, want = moe(x, none(x))[0], plain(moe, x)
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
        leaves, weight = [x, *moe.parameters()], inputs(*shape, seed=4, dtype=dtype)
        got = torch.autograd.grad((got * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
        want = torch.autograd.grad((want * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(got, want, atol=20 * tolerance, rtol=20 * tolerance)


@pytest.mark.parametrize("form", ["padded", "grouped"])
def test_any_load_fits_from_one_expert_for_all_to_an_even_one(form, monkeypatch):
    monkeypatch.setattr(model_moe, "has_grouped_mm", lambda *_: form == "grouped")
    moe, x = layer().float(), inputs(2, 23, 32, dtype=torch.float32)
    for favourites in ([0, 1], [4, 5], [2], [0, 5], []):
        moe.router.bias.zero_()[favourites] = 100.0
        torch.testing.assert_close(moe(x, none(x))[0], plain(moe, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("form", ["padded", "grouped"])
def test_each_row_is_multiplied_by_the_weight_of_its_expert_whatever_the_loads(form, monkeypatch):
    """The number of blocks is a bound that every load must respect: tried on all loads of few rows."""
    monkeypatch.setattr(model_moe, "has_grouped_mm", lambda *_: form == "grouped")
    dtype = torch.float64 if form == "padded" else torch.float32
    weight = inputs(3, 8, 12, dtype=dtype)
    for n_rows in range(1, 10):
        x = inputs(n_rows, 8, seed=4, dtype=dtype)
        for a in range(n_rows + 1):
            for b in range(n_rows + 1 - a):
                expert = torch.tensor([0] * a + [1] * b + [2] * (n_rows - a - b))
                want = (x[:, None] @ weight[expert])[:, 0]
                torch.testing.assert_close(model_moe.grouped_matmul(x, weight, expert), want)


def test_the_layer_passes_rows_choices_and_gates_to_the_method_experts():
    moe, x, seen = layer(n_shared_expert=1).double(), inputs(2, 5, 32), []
    whole = moe(x, none(x))[0]

    def experts(*given):
        seen.extend(given)
        return torch.zeros_like(given[0])

    plain_experts, moe.experts = moe.experts, experts
    shared = moe(x, none(x))[0]
    rows, chosen, gates = seen
    assert rows.shape == (10, 32) and chosen.shape == gates.shape == (10, 2) and chosen.dtype == torch.long
    torch.testing.assert_close(shared.flatten(0, 1) + plain_experts(rows, chosen, gates), whole.flatten(0, 1))


def test_the_model_runs_on_the_meta_device():
    model = build("moe", n_shared_expert=1, shared_gate=True, router_score="sigmoid", n_group=3).train().to("meta")
    x = torch.zeros(2, 16, dtype=torch.long, device="meta")
    loss = model(x, x)
    loss.backward()
    assert loss.is_meta and all(p.grad.shape == p.shape for p in model.parameters())


def test_the_gated_shared_expert_equals_that_of_qwen2_moe():
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = transformers.Qwen2MoeConfig(
        hidden_size=32, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False,
        shared_expert_intermediate_size=32, experts_implementation="eager",
    )  # fmt: skip
    theirs = Qwen2MoeSparseMoeBlock(config).double()
    ours = layer(bias=0.0, n_shared_expert=2, shared_gate=True, normalize_gates=False).double()
    gate_up = torch.cat((ours.w_gate.weight, ours.w_up.weight), dim=2).mT
    theirs.experts.gate_up_proj.data = gate_up.data.clone()
    theirs.experts.down_proj.data = ours.w_down.weight.mT.data.clone()
    theirs.gate.weight.data = ours.router.weight.data.clone()
    theirs.shared_expert_gate.weight.data = ours.shared_router.weight.data.clone()
    for name in ("gate", "up", "down"):
        getattr(theirs.shared_expert, f"{name}_proj").weight = getattr(ours.shared, f"w_{name}").weight
    x = inputs(2, 50, 32)
    torch.testing.assert_close(ours(x, none(x))[0], theirs(x), atol=1e-5, rtol=1e-5)


def test_the_router_with_groups_bias_and_shared_experts_equals_that_of_deepseek_v3():
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=32, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True, experts_implementation="eager",
    )  # fmt: skip
    theirs, ours, x = DeepseekV3MoE(config).double(), layer(bias=1.0, **V3).double(), inputs(2, 50, 32)
    ours.router.bias -= 1.0  # some choices are negative: a closed group must stay below them
    gate_up = torch.cat((ours.w_gate.weight, ours.w_up.weight), dim=2).mT
    theirs.experts.gate_up_proj.data, theirs.experts.down_proj.data = gate_up.clone(), ours.w_down.weight.mT.clone()
    theirs.gate.weight.data, theirs.gate.e_score_correction_bias = ours.router.weight.data, ours.router.bias.clone()
    for name in ("gate", "up", "down"):
        getattr(theirs.shared_experts, f"{name}_proj").weight = getattr(ours.shared, f"w_{name}").weight
    torch.testing.assert_close(ours(x, none(x))[0], theirs(x), atol=1e-5, rtol=1e-5)
    got, want = (torch.autograd.grad(f.square().sum(), w)[0] for f, w in (
        (ours(x, none(x))[0], ours.router.weight), (theirs(x), theirs.gate.weight)))  # fmt: skip
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_the_bias_decides_who_is_chosen_and_never_how_much_it_counts():
    router, x = layer(bias=0.0, normalize_gates=False).router, inputs(2, 9, 32, dtype=torch.float32)
    router.bias[3] = 10.0
    chosen, gates, _ = router(x, none(x))
    assert (chosen == 3).any(dim=-1).all()
    assert torch.equal(gates, router.score(x)[1].gather(-1, chosen))


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(n_dense_layer=0), [0, 1, 2, 3, 4]),
        (dict(n_dense_layer=2), [2, 3, 4]),
        (dict(n_dense_layer=0, moe_every=2), [1, 3]),
        (dict(n_dense_layer=2, moe_every=2), [3]),
        (dict(moe_layers=(0, 3)), [0, 3]),
        (dict(moe_layers=[3, 0, 3]), [0, 3]),
    ],
)
def test_exactly_the_named_layers_have_experts(options, want):
    blocks = build("moe", n_layer=5, **options).blocks
    assert [i for i, block in enumerate(blocks) if isinstance(block.mlp, model_moe.MoE)] == want
    assert build("moe", n_layer=5, **options).config.moe_layers == want  # which after_step and metrics go by


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_expert_per_token=7), "n_expert_per_token=7 is not from 1 to 6"),
        (dict(n_expert_per_token=0), "n_expert_per_token=0"),
        (dict(n_group=4), "n_expert=6 cannot be cut into n_group=4 groups"),
        (dict(n_group=2, n_group_per_token=3), "n_group_per_token=3 is not from 1 to n_group=2"),
        (dict(n_group=3, n_expert_per_token=3), "n_expert_per_token=3 is not from 1 to 2: try fewer groups"),
        (dict(n_group=0), "n_group=0"),
        (dict(moe_layers=[1, 2]), r"moe_layers=\[1, 2\] are not all from 0 to 1"),
        (dict(moe_layers=[-1]), r"moe_layers=\[-1\]"),
        (dict(moe_layers=[[1]]), r"moe_layers=\[\[1\]\] are not all numbers of layers"),
        (dict(n_dense_layer=2), "lower n_dense_layer=2"),
        (dict(moe_every=0), "moe_every=0"),
        (dict(router_score="tanh"), "router_score='tanh' is unknown: try softmax or sigmoid"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        build("moe", **options)


# ---- balance ---------------------------------------------------------------------------------------------------------


def routed(model, x):
    """The loss of x, and of each MoE layer logits, scores (B, T, E) and chosen experts (B, T, K)."""
    seen = []

    def note(router, inputs, outputs):
        seen.append((*router.score(inputs[0]), outputs[0]))

    hooks = [module.register_forward_hook(note) for module in model.modules() if type(module).__name__ == "Router"]
    loss = model(x, x)
    for hook in hooks:
        hook.remove()
    return loss, seen


def auxiliary(model, x):
    """The auxiliary loss of a training forward."""
    total = model.train()(x, x)
    return total - model.eval()(x, x)


def test_the_balance_loss_of_a_repeated_step_equals_that_of_transformers_for_each_layer():
    """Theirs takes the load of the batch at hand, which is here that of the step before."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    model, x = build("moe", n_layer=3, balance_loss=0.7, z_loss=0.0).double(), tokens(3, 16)
    auxiliary(model, x)
    model.after_step()
    got, (_, seen), want = auxiliary(model, x), routed(model, x), 0.0
    for logits, _, _ in seen:  # theirs pools layers, and is K in balance
        want += load_balancing_loss_func((logits.flatten(0, 1),), 6, 2) / 2
    torch.testing.assert_close(got, 0.7 * want.double(), atol=1e-6, rtol=0)
    assert want > 1.05 * len(seen)  # this model is not in balance


def test_the_z_loss_equals_that_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    model, x = build("moe", n_layer=3, balance_loss=0.0, z_loss=0.3).double(), tokens(3, 16)
    got, (_, seen) = auxiliary(model, x), routed(model, x)
    torch.testing.assert_close(got, 0.3 * sum(router_z_loss_func(logits) for logits, _, _ in seen), atol=1e-6, rtol=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balance_loss_is_one_in_perfect_balance_and_e_over_k_at_worst(score):
    router = build("moe", router_score=score).blocks[1].mlp.router
    chosen = torch.zeros(1, 12, 2, dtype=torch.long)
    even, worst = torch.full((1, 12, 6), 0.3), torch.tensor([0.5, 0.5, 0, 0, 0, 0]).expand(1, 12, 6)
    for load, scores, want in (([4] * 6, even, 1.0), ([12, 12, 0, 0, 0, 0], worst, 3.0)):
        router.load.copy_(torch.tensor(load))
        assert router.statistics(scores, scores, chosen, none(scores))[1].item() == pytest.approx(want)


def test_the_gradient_of_the_balance_loss_flows_through_the_shares_alone():
    model, x = build("moe", balance_loss=1.0, z_loss=0.0).double(), tokens(2, 16)
    weight = model.blocks[1].mlp.router.weight
    auxiliary(model, x)
    model.after_step()
    (got,) = torch.autograd.grad(auxiliary(model, x), weight)
    _, ((_, scores, chosen),) = routed(model, x)
    fraction = F.one_hot(chosen.flatten(), 6).double().mean(0)
    (want,) = torch.autograd.grad(6 * (fraction * scores.mean((0, 1))).sum(), weight)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert want.abs().max() > 1e-3


def test_evaluation_is_pure_cross_entropy_whatever_the_coefficients():
    x, y = tokens(2, 16), tokens(2, 16, seed=2)
    a, b = build("moe", balance_loss=0.0, z_loss=0.0), build("moe", balance_loss=5.0, z_loss=5.0)
    assert torch.equal(a(x, y), b(x, y))
    assert torch.equal(a.train()(x, y), a.eval()(x, y)) and b.train()(x, y) > b.eval()(x, y) + 1
    model = build("moe")
    model(x, y)
    assert model.blocks[1].mlp.router.step_load.sum() == 0  # and leaves no counts


def test_before_the_first_step_the_load_counts_as_even():
    model, x = build("moe", balance_loss=1.0, z_loss=0.0).double(), tokens(2, 16)
    got = auxiliary(model, x)
    torch.testing.assert_close(got, torch.ones_like(got), atol=1e-6, rtol=0)


def test_the_balance_loss_takes_the_load_of_the_last_step_whatever_was_counted_since():
    model = build("moe", balance_loss=1.0, z_loss=0.0).double()
    first, second, third = (tokens(2, 16, seed=seed) for seed in range(3))
    auxiliary(model, first)
    auxiliary(model, second)
    model.after_step()
    chosen = [routed(model, x)[1][0][2].flatten() for x in (first, second)]
    fraction = F.one_hot(torch.cat(chosen), 6).double().mean(0)
    for x in (third, first, third):
        _, ((_, scores, _),) = routed(model.eval(), x)
        want = 6 * (fraction * scores.mean((0, 1))).sum()
        torch.testing.assert_close(auxiliary(model, x), want, atol=1e-6, rtol=0)


def test_the_gradient_of_a_batch_is_the_mean_of_those_of_its_micro_batches():
    """After a real step, whose load the balance loss of the next one takes."""
    model = build("moe", balance_loss=1.0, z_loss=0.1, bias_rate=0.01, n_layer=3).double().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = tokens(4, 16), tokens(4, 16, seed=2)
    model(x, y).backward()
    optimizer.step()
    model.after_step()
    found = {}
    for micro_batches in (1, 2, 4):
        model.zero_grad()
        for part, wanted in zip(y.chunk(micro_batches), x.chunk(micro_batches)):
            (model(part, wanted) / micro_batches).backward()
        counted = [block.mlp.router.step_load.clone() for block in model.blocks[1:]]
        found[micro_batches] = [p.grad.clone() for p in model.parameters()] + counted
        for block in model.blocks[1:]:
            block.mlp.router.step_load.zero_()
    assert model.blocks[1].mlp.router.load.double().std() > 1
    for micro_batches in (2, 4):
        torch.testing.assert_close(found[micro_batches], found[1], atol=1e-9, rtol=1e-9)


OVER = [("moe", {}), *(("switch", dict(balance_over=over)) for over in ("global", "batch", "sequence"))]


def padded(rows, width):
    """Rows that begin with the eot_id 9 and have no other, filled up with it: (B, width)."""
    return torch.stack([F.pad(row, (0, width - len(row)), value=9) for row in rows])


def documents(*lengths):
    rows = [tokens(1, n, seed=n)[0].masked_fill_(tokens(1, n, seed=n)[0] == 9, 8) for n in lengths]
    for row in rows:
        row[0] = 9
    return rows


def with_padding_in_sight(name, options):
    """A model after a step whose load was far from even."""
    options = dict(eot_id=9, balance_loss=0.7, z_loss=0.3, n_layer=3) | options
    if name == "switch":
        options["capacity_factor"] = 0.0  # a capacity is a share of the window, whatever fills it
    model = build(name, **options).double().train()
    for block in model.blocks[1:]:
        block.mlp.router.load.copy_(torch.arange(1, 7))
    return model


def counts_and_gradients(model, parts):
    """The auxiliary loss of micro-batches (weight, x), its gradients, and what the routers counted."""
    parameters = list(model.parameters())
    loss = sum(weight * model(x, x, per_token=True)[1] for weight, x in parts)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    counted = []
    for block in model.blocks[1:]:
        counted += [block.mlp.router.step_load.clone(), block.mlp.router.step_losses.clone()]
        block.mlp.router.step_load.zero_()
        block.mlp.router.step_losses.zero_()
    return loss, gradients, counted


@pytest.mark.parametrize("name, options", OVER)
def test_padding_enters_no_load_no_balance_and_no_z_loss(name, options):
    model = with_padding_in_sight(name, options)
    rows = documents(11, 11, 11)
    want = counts_and_gradients(model, [(1.0, torch.stack(rows))])
    got = counts_and_gradients(model, [(1.0, padded(rows, 16))])
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-6)
    assert sum(g.abs().max() > 1e-4 for g in want[1]) > 10
    assert want[2][0].sum() == 3 * 11 * 2
    model.config.eot_id = -1  # without documents there is no padding
    assert counts_and_gradients(model, [(1.0, padded(rows, 16))])[2][0].sum() == 3 * 16 * 2


@pytest.mark.parametrize("name, options", [of for of in OVER if of[1] != dict(balance_over="batch")])
def test_micro_batches_weighed_by_their_text_add_up_whatever_padding_they_have(name, options):
    model = with_padding_in_sight(name, options)
    lengths = (3, 16, 8, 11)
    x = padded(documents(*lengths), 16)
    want = counts_and_gradients(model, [(1.0, x)])
    alone = [(n / sum(lengths), row[None]) for n, row in zip(lengths, x)]
    got = counts_and_gradients(model, alone)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-6)
    assert [(~model.padding(part)).sum() for _, part in alone] == [*lengths]


@pytest.mark.parametrize("name, options", OVER)
def test_a_batch_of_padding_alone_has_no_auxiliary_loss(name, options):
    model = with_padding_in_sight(name, options)
    loss, gradients, counted = counts_and_gradients(model, [(1.0, padded(documents(1, 1), 16))])
    assert loss == 0
    assert not any(x.any() for x in [*gradients, *counted])


def test_a_document_of_one_token_and_the_end_of_a_row_are_padding_and_a_beginning_is_not():
    model = build("moe", eot_id=9)
    idx = torch.tensor([[9, 5, 9, 7, 9, 9], [9, 9, 5, 6, 7, 9], [1, 2, 3, 4, 5, 6]])
    assert model.padding(idx).long().tolist() == [[0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1], [0] * 6]


def test_a_loaded_state_goes_on_like_the_one_that_was_saved():
    options = dict(balance_loss=1.0, bias_rate=0.01)
    model, x = build("moe", **options).train(), tokens(4, 16)
    model(x, x)
    model.after_step()
    other = build("moe", seed=5, **options).train()
    other.load_state_dict(model.state_dict())
    want = model(x, x)
    assert torch.equal(other(x, x), want)
    model.blocks[1].mlp.router.load.zero_()
    assert not torch.equal(model(x, x), want)  # the load matters


def test_counts_are_made_once_with_recomputed_blocks():
    model, x = build("moe", balance_loss=1.0).train(), tokens(2, 16)
    router = model.blocks[1].mlp.router
    model(x, x).backward()
    want, load = [p.grad.clone() for p in model.parameters()], router.step_load.clone()
    assert load.sum() == 2 * 16 * 2
    router.step_load.zero_()
    model.zero_grad()
    for block in model.blocks:
        block.forward = lambda *a, f=block.forward: checkpoint(f, *a, use_reentrant=False)
    model(x, x).backward()
    assert torch.equal(router.step_load, load)
    torch.testing.assert_close([p.grad for p in model.parameters()], want)


def test_the_bias_moves_once_a_step_against_the_load_of_all_its_micro_batches():
    model, x, y = build("moe", bias_rate=0.01).train(), tokens(2, 16), tokens(2, 16, seed=2)
    router, chosen = model.blocks[1].mlp.router, []
    for batch in (x, y):
        chosen.append(routed(model, batch)[1][0][2].flatten())
        assert not router.bias.any()
    count = torch.bincount(torch.cat(chosen), minlength=6)
    model.after_step()
    assert count.sum() == 128 and count.float().std() > 0
    torch.testing.assert_close(router.bias, 0.01 * (count.float().mean() - count).sign())
    assert torch.equal(model.expert_load[0], count) and torch.equal(router.load, count)
    kept = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    assert kept == {"blocks.1.mlp.router.bias", "blocks.1.mlp.router.load"}  # what checkpoints keep
    assert not any(name.endswith("router.bias") for name, _ in model.named_parameters())  # no optimizer touches it


def test_the_bias_alone_brings_a_crooked_router_into_balance():
    model = build("moe", bold=False, bias_rate=0.01, router_score="sigmoid", balance_loss=0.0, **SMALL).train()
    with torch.no_grad():
        model.embed.weight.add_(0.02)  # all tokens have something in common, and expert 0 likes it
        model.blocks[1].mlp.router.weight.mul_(10.0)[0] += 0.05
    violations = []
    for step in range(60):
        x = tokens(8, 64, seed=step)
        model(x, x)
        model.after_step()
        violations.append(model.metrics()["load_violation"])
    assert violations[0] > 0.4 and max(violations[-5:]) < 0.2


def test_buffers_keep_their_dtype_in_a_cast_and_begin_at_zero_off_the_meta_device():
    model = build("moe")
    router = model.blocks[1].mlp.router
    for i, buffer in enumerate(router.buffers()):
        buffer.add_(1001 + i)
    router.bias += 0.001
    want = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert {buffer.dtype for buffer in want.values()} == {torch.float32, torch.int64} and len(want) == 4
    model.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    for name, buffer in model.named_buffers():
        assert buffer.dtype == want[name].dtype and torch.equal(buffer, want[name])
    with torch.device("meta"):
        model = model_moe.GPT(model.config).to(torch.bfloat16)
    torch.use_deterministic_algorithms(True)  # fills what is empty with NaN
    try:
        router = model.to_empty(device="cpu").blocks[1].mlp.router
    finally:
        torch.use_deterministic_algorithms(False)
    assert router.bias.dtype == torch.float32 and router.weight.isnan().all()
    assert not any(buffer.any() for buffer in model.buffers())


def test_metrics_are_those_of_the_counts():
    model = build("moe", n_layer=3, balance_loss=0.5, z_loss=0.1).train()
    assert model.metrics() == {}
    x, y = tokens(3, 16), tokens(1, 16, seed=2)  # each counts by its size
    for _ in range(2):  # the second step's balance is that of the first one's load
        (_, a), (_, b) = routed(model, x), routed(model, y)
        model.after_step()
    got, violations, balance, z = model.metrics(), [], 0.0, 0.0
    for i, (p, q) in enumerate(zip(a, b)):
        load = torch.bincount(torch.cat((p[2].flatten(), q[2].flatten())), minlength=6).double()
        share = load / load.sum()
        assert got[f"load_entropy_{i + 1}"] == pytest.approx(-torch.xlogy(share, share).sum().item(), rel=1e-5)
        violations.append((load.max() / load.mean() - 1).item())
        for out, part in ((p, 3 / 4), (q, 1 / 4)):
            z += part * out[0].logsumexp(-1).square().mean().item() / 2
            balance += part * 6 * (share * out[1].mean((0, 1))).sum().item() / 2
    assert len(got) == 6 and got["expert_load"] == model.expert_load.tolist()
    assert got["load_violation"] == pytest.approx(max(violations), rel=1e-5)
    assert got["z_loss"] == pytest.approx(z, rel=1e-5) and got["balance_loss"] == pytest.approx(balance, rel=1e-5)
    assert got["balance_loss"] > 1.01 and model.expert_load.shape == (2, 6)
    model.expert_load.fill_(7)
    assert model.metrics()["load_entropy_1"] == pytest.approx(math.log(6)) and model.metrics()["load_violation"] == 0


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_compiled_training_step_is_one_graph_and_equals_the_eager_one():
    compare_compiled_steps("moe", n_shared_expert=1, shared_gate=True)


def compare_compiled_steps(name, **options):
    eager, compiled = build(name, **options).train(), build(name, **options).train()
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = tokens(2, 16, seed=seed)
        want, got = eager(x, x), step(x, x)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        want, got = (torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((want, eager), (got, compiled)))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        for a, b in zip(compiled.buffers(), eager.buffers()):
            torch.testing.assert_close(a, b)
        eager.after_step()
        compiled.after_step()


def test_autocast_keeps_the_router_in_fp32_and_the_experts_in_its_own_dtype():
    moe, x, seen = layer().float().train(), inputs(2, 16, 32, dtype=torch.float32), []
    moe.w_up.register_forward_hook(lambda m, i, out: seen.append((i[0].dtype, out.dtype)))
    want = moe(x, none(x))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert {output.dtype for output in moe.router.score(x)} == {torch.float32}
        got = moe(x, none(x))[0]
    assert seen == [(torch.float32,) * 2, (torch.bfloat16,) * 2]
    assert F.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.999


def test_the_router_of_a_bf16_model_scores_in_fp32():
    router, x = layer().bfloat16().router, inputs(2, 16, 32, dtype=torch.bfloat16)
    want = (x.float() @ router.weight.float().T).softmax(dim=-1)
    torch.testing.assert_close(router.score(x)[1], want)


def test_muon_takes_each_expert_by_itself_and_leaves_the_router_to_adamw():
    model = build("moe", n_shared_expert=1, shared_gate=True)
    names = {"muon": set(), "adamw": set()}
    for group in param_groups(model):
        names[group["method"]] |= {name for name, _ in group["params"]}
    routers = {n for n, _ in model.named_parameters() if "router" in n}
    assert routers == {"blocks.1.mlp.router.weight", "blocks.1.mlp.shared_router.weight"}
    assert routers <= names["adamw"] and not routers & names["muon"]
    assert {f"blocks.1.mlp.w_{k}.weight" for k in ("gate", "up", "down")} <= names["muon"]
    stack = model.blocks[1].mlp.w_down.weight  # (E, in, out)
    alone = [torch.nn.Parameter(w.detach().t().clone()) for w in stack]  # (out, in)
    stack.grad = torch.randn_like(stack)
    for e, w in enumerate(alone):
        w.grad = stack.grad[e].t().clone()
    for params in ([stack], alone):
        MuonAdamW(params, method="muon", lr=0.1).step()
    torch.testing.assert_close(stack.mT, torch.stack(list(alone)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, V3, dict(n_shared_expert=1, shared_gate=True, moe_layers=[0, 2], n_layer=3)])
def test_flops_and_parameters_equal_the_formula(options):
    # In fp64, since the counter does not know grouped_mm; so few choices are not padded.
    model, x = build("moe", **dict(n_expert=8) | options).double(), tokens(1, 2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * flops.forward_flops_per_token("moe", model.config, 2)
    assert sum(flops.parameters("moe", model.config).values()) == sum(p.numel() for p in model.parameters())
    assert flops.cache_bytes_per_token("moe", model.config, 4) == model.float().new_cache(1, 8).bytes_per_token()


def train(rank=0, world=1, compiled=False, micro_batches=1, **options):
    """Three steps on this process's share of the batch: (weights, load of the last step, its metrics)."""
    model = build("moe", bias_rate=0.01, balance_loss=1.0, **options).train()
    net = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    net = torch.compile(net, backend="aot_eager") if compiled else net
    optimizer = make_optimizer(model, learning_rate=1e-2)
    for step in range(3):
        x = tokens(4, 16, seed=step).chunk(world)[rank]
        for i, part in enumerate(x.chunk(micro_batches)):
            with net.no_sync() if world > 1 and i < micro_batches - 1 else nullcontext():
                (net(part, part) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
    return model.state_dict(), model.expert_load, model.metrics()


SCENARIOS = {"eager": {}, "compiled": dict(compiled=True), "micro-batches": dict(micro_batches=2)}


def rank_of_two(rank, port, path):
    """What one of two processes runs."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save({name: train(rank, 2, **options) for name, options in SCENARIOS.items()}, f"{path}/{rank}")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends otherwise


def test_two_processes_train_like_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from tests.test_moe import rank_of_two; rank_of_two(int(sys.argv[1]), *sys.argv[2:])"
    run = [sys.executable, "-c", code]
    ranks = [subprocess.Popen([*run, str(r), str(port), str(tmp_path)], cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}) for r in range(2)]  # fmt: skip
    assert [p.wait(timeout=200) for p in ranks] == [0, 0]
    want, want_load, want_metrics = train()
    assert want_metrics.pop("expert_load") == want_load.tolist()
    for rank in "01":
        for name, (weights, load, metrics) in torch.load(tmp_path / rank).items():
            assert torch.equal(load, want_load), name
            assert metrics.pop("expert_load") == load.tolist()
            assert metrics == pytest.approx(want_metrics, rel=1e-3), name
            torch.testing.assert_close(weights, want, atol=1e-4, rtol=0)


def test_a_training_step_never_waits_for_the_device():
    assert_no_waits("moe", n_group=3, bias_rate=0.01)


def assert_no_waits(name, **options):
    """What needs a number from the device is an item(), or an operation whose result has as many rows as data say."""
    aten = torch.ops.aten
    waiting = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.unique_consecutive}
    model, x, waits = build(name, **options).train(), tokens(2, 16), []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in waiting:
                waits.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        model(x, x).backward()
        model.after_step()
    assert not waits
