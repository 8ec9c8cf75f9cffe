"""What is special to model_moe.py: routing, dispatch, capacity, balance, metrics, and training on several ranks."""

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
}


def layer(seed=0, bias=0.3, **options):
    """An MoE alone, with large weights and a selection bias."""
    moe = build("moe", seed, **options).blocks[1].mlp
    with torch.no_grad():
        moe.router.weight.mul_(3.0)
        moe.router.bias.copy_(bias * torch.randn_like(moe.router.bias))
    return moe


def plain(moe, x):
    """The layer as its equations say, token by token and expert by expert."""
    c, y = moe.config, []
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
        got, want = moe(x)[0], plain(moe, x)
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
        torch.testing.assert_close(moe(x)[0], plain(moe, x), atol=2e-5, rtol=2e-5)


def test_no_expert_computes_a_block_of_another():
    """The number of blocks is a bound that every load must respect: tried on all loads of few choices."""
    moe = layer(n_expert=3, n_expert_per_token=1).double()
    for N in range(1, 9):
        for a in range(N + 1):
            for b in range(N + 1 - a):
                want = torch.tensor([0] * a + [1] * b + [2] * (N - a - b))[torch.randperm(N)]
                routed = [F.one_hot(want, 3).double()[None]] * 2 + [want[None, :, None], torch.ones(1, N, 1).double()]
                moe.router.forward = lambda x, routed=routed: routed
                x = inputs(1, N, 32)
                gate, up, down = (w.weight[want] for w in (moe.w_gate, moe.w_up, moe.w_down))
                h = F.silu(x[0, :, None] @ gate) * (x[0, :, None] @ up)
                torch.testing.assert_close(moe(x)[0][0], (h @ down)[:, 0])


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
    torch.testing.assert_close(ours(x)[0], theirs(x), atol=1e-5, rtol=1e-5)
    got, want = (torch.autograd.grad(f.square().sum(), w)[0] for f, w in (
        (ours(x)[0], ours.router.weight), (theirs(x), theirs.gate.weight)))  # fmt: skip
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_the_bias_decides_who_is_chosen_and_never_how_much_it_counts():
    router, x = layer(bias=0.0, normalize_gates=False).router, inputs(2, 9, 32, dtype=torch.float32)
    router.bias[3] = 10.0
    _, scores, experts, gates = router(x)
    assert (experts == 3).any(dim=-1).all()
    assert torch.equal(gates, scores.gather(-1, experts))


def test_jitter_acts_in_training_only():
    model, x = build("moe", router_jitter=0.3), tokens(2, 16)
    plain_model = build("moe")
    assert torch.equal(model(x), plain_model(x))
    torch.manual_seed(0)
    a, b = model.train()(x), model(x)
    assert not torch.equal(a, b)
    assert torch.equal(plain_model.train()(x), plain_model(x))


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(n_dense_layer=0), [0, 1, 2, 3, 4]),
        (dict(n_dense_layer=2), [2, 3, 4]),
        (dict(n_dense_layer=0, moe_every=2), [1, 3]),
        (dict(n_dense_layer=2, moe_every=2), [3]),
        (dict(moe_layers=(0, 3)), [0, 3]),
    ],
)
def test_exactly_the_named_layers_have_experts(options, want):
    blocks = build("moe", n_layer=5, **options).blocks
    assert [i for i, block in enumerate(blocks) if isinstance(block.mlp, model_moe.MoE)] == want


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_expert_per_token=7), "n_expert_per_token=7 .*n_expert=6"),
        (dict(n_expert_per_token=0), "n_expert_per_token=0"),
        (dict(n_group=4), "n_group=4 .*n_expert=6"),
        (dict(n_group=2, n_group_per_token=3), "n_group_per_token=3 of n_group=2"),
        (dict(n_group=3, n_expert_per_token=3), "n_expert_per_token=3 .*n_group_per_token=1 of n_group=3"),
        (dict(n_group=0), "n_group=0"),
        (dict(moe_layers=[1, 2]), r"moe_layers=\[1, 2\]: try one or more of 0 to 1"),
        (dict(n_dense_layer=2), "lower n_dense_layer=2"),
        (dict(moe_every=0), "moe_every=0"),
        (dict(router_score="tanh"), "router_score='tanh' is unknown: try one of softmax sigmoid"),
        (dict(drop_by="luck"), "drop_by='luck'"),
        (dict(balance_over="layer"), "balance_over='layer'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        build("moe", **options)


# ---- capacity --------------------------------------------------------------------------------------------------------


def kept_by_force(scores, experts, gates, capacity, by_score):
    """(token, slot) pairs that a queue per expert and sequence keeps."""
    kept = set()
    for b, (chosen, weights) in enumerate(zip(experts.tolist(), gates.tolist())):
        for e in range(scores.size(-1)):
            queue = [(t, k, weights[t][k]) for t, row in enumerate(chosen) for k, x in enumerate(row) if x == e]
            queue = sorted(queue, key=lambda item: -item[2]) if by_score else queue
            kept |= {(b, t, k) for t, k, _ in queue[:capacity]}
    return kept


@pytest.mark.parametrize("drop_by", ["position", "score"])
@pytest.mark.parametrize("factor", [0.3, 0.8, 1.25])
def test_choices_beyond_capacity_are_dropped_by_the_policy_and_counted_exactly(drop_by, factor):
    moe, x = layer(capacity_factor=factor, drop_by=drop_by).double().train(), inputs(3, 20, 32)
    _, scores, experts, gates = moe.router(x)
    capacity = math.ceil(factor * 2 * 20 / 6)
    kept = kept_by_force(scores, experts, gates, capacity, drop_by == "score")
    want = torch.zeros_like(x)
    for b, t, k in kept:
        e = experts[b, t, k]
        h = F.silu(x[b, t] @ moe.w_gate.weight[e]) * (x[b, t] @ moe.w_up.weight[e])
        want[b, t] += gates[b, t, k] * (h @ moe.w_down.weight[e])
    y, (load, _, _, dropped) = moe(x)
    assert 0 < dropped == experts.numel() - len(kept)
    assert load.sum() == experts.numel()  # all that were chosen
    torch.testing.assert_close(y, want)
    alone = {(b, t) for b in range(3) for t in range(20)} - {(b, t) for b, t, _ in kept}
    assert factor > 0.3 or alone
    for b, t in alone:
        assert torch.equal(y[b, t], torch.zeros(32).double())  # the residual stream goes on alone
    model = build("moe", capacity_factor=factor, drop_by=drop_by).train()
    model(tokens(3, 20), tokens(3, 20))
    model.after_step()
    assert model.metrics()["dropped_fraction"] == pytest.approx(model.dropped.sum().item() / (3 * 20 * 2))


def test_ample_capacity_is_dropless_and_evaluation_never_drops():
    x, y = tokens(2, 20), tokens(2, 20, seed=2)
    free, ample, tight = (build("moe", capacity_factor=f) for f in (0.0, 6.0, 0.3))
    assert torch.equal(free(x), tight(x))
    assert torch.equal(free.train()(x, y), ample.train()(x, y)) and ample.load[:, -1].sum() == 0
    assert not torch.equal(tight.train()(x), free(x))


def test_dropping_by_position_depends_on_no_later_token_and_on_no_other_sequence():
    model, x = build("moe", capacity_factor=0.5).train(), tokens(2, 24)
    y = x.clone()
    y[0, 10:] = tokens(14, seed=5)
    assert torch.equal(model(x)[0, :10], model(y)[0, :10])
    assert torch.equal(model(x)[1], model(y)[1])


# ---- balance ---------------------------------------------------------------------------------------------------------


def statistics(model, x):
    """Of each MoE layer: router logits (B, T, E), scores, chosen experts (B, T, K)."""
    seen = []
    hooks = [b.mlp.router.register_forward_hook(lambda m, i, out: seen.append(out[:3]))
             for b in model.blocks if isinstance(b.mlp, model_moe.MoE)]  # fmt: skip
    loss = model(x, x)
    [hook.remove() for hook in hooks]
    return loss, seen


def auxiliary(model, x):
    """The auxiliary loss of a training forward."""
    total = model.train()(x, x)
    return total - model.eval()(x, x)


@pytest.mark.parametrize("over", ["batch", "sequence", "global"])
def test_the_balance_loss_equals_that_of_transformers_for_each_layer_by_itself(over):
    pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    model, x = build("moe", n_layer=3, balance_over=over, balance_loss=0.7, z_loss=0.0).double(), tokens(3, 16)
    got, (_, seen), want = auxiliary(model, x), statistics(model, x), 0.0
    for logits, _, _ in seen:  # theirs pools layers, and is K in balance
        parts = logits.unbind() if over == "sequence" else [logits.flatten(0, 1)]
        want += sum(load_balancing_loss_func((part,), 6, 2) for part in parts) / len(parts) / 2
    torch.testing.assert_close(got, 0.7 * want.double(), atol=1e-6, rtol=0)
    assert want > 1.05 * len(seen)  # this model is not in balance


def test_the_z_loss_equals_that_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    model, x = build("moe", n_layer=3, balance_loss=0.0, z_loss=0.3).double(), tokens(3, 16)
    got, (_, seen) = auxiliary(model, x), statistics(model, x)
    torch.testing.assert_close(got, 0.3 * sum(router_z_loss_func(logits) for logits, _, _ in seen), atol=1e-6, rtol=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("over", ["batch", "sequence", "global"])
def test_the_balance_loss_is_one_in_perfect_balance_and_e_over_k_at_worst(over, score):
    model = build("moe", balance_over=over, router_score=score, balance_loss=1.0, z_loss=0.0).train()
    balanced = torch.ones(1, 2, 6) * 4, torch.full((1, 2, 6), 1 / 6), torch.zeros(1), torch.zeros(1).long()
    worst = torch.tensor([12, 12, 0, 0, 0, 0]).expand(1, 2, 6), torch.tensor([0.5, 0.5, 0, 0, 0, 0]).expand(1, 2, 6)
    for (load, share), want in ((balanced[:2], 1.0), (worst, 3.0)):
        model.load.zero_()
        loss = model.auxiliary_loss([(load[0].long(), share[0], torch.zeros(()), torch.zeros((), dtype=torch.long))])
        assert loss.item() == pytest.approx(want)


def test_the_gradient_of_the_balance_loss_flows_through_the_shares_alone():
    model, x = build("moe", balance_over="batch", balance_loss=1.0, z_loss=0.0).double(), tokens(2, 16)
    weight = model.blocks[1].mlp.router.weight
    (got,) = torch.autograd.grad(auxiliary(model, x), weight)
    _, ((_, scores, experts),) = statistics(model, x)
    fraction = F.one_hot(experts.flatten(), 6).double().mean(0)
    (want,) = torch.autograd.grad(6 * (fraction * scores.mean((0, 1))).sum(), weight)
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 1e-3


def test_evaluation_is_pure_cross_entropy_whatever_the_coefficients():
    x, y = tokens(2, 16), tokens(2, 16, seed=2)
    a, b = build("moe", balance_loss=0.0, z_loss=0.0), build("moe", balance_loss=5.0, z_loss=5.0)
    assert torch.equal(a(x, y), b(x, y))
    assert torch.equal(a.train()(x, y), a.eval()(x, y)) and b.train()(x, y) > b.eval()(x, y) + 1
    model = build("moe")
    model(x, y)
    assert model.load.sum() == 0  # and leaves no counts


def test_the_global_loss_counts_the_micro_batches_of_the_step_so_far():
    model = build("moe", balance_loss=1.0, z_loss=0.0).double()
    first, second = tokens(2, 16), tokens(2, 16, seed=2)
    seen = [statistics(model, x)[1][0] for x in (first, second)]
    one_hot = [F.one_hot(experts.flatten(), 6).double().sum(0) for *_, experts in seen]
    want = [6 * (f / f.sum() * scores.mean((0, 1))).sum()
            for f, (_, scores, _) in zip((one_hot[0], one_hot[0] + one_hot[1]), seen)]  # fmt: skip
    for _ in range(2):  # and after_step begins anew
        for x, expected in zip((first, second), want):
            torch.testing.assert_close(auxiliary(model, x), expected)
        model.after_step()


def test_counts_are_made_once_with_recomputed_blocks():
    model, x = build("moe", balance_loss=1.0).train(), tokens(2, 16)
    model(x, x).backward()
    want, load = [p.grad.clone() for p in model.parameters()], model.load.clone()
    assert load[:, :-1].sum() == 2 * 16 * 2
    model.load.zero_()
    model.zero_grad()
    for block in model.blocks:
        block.forward = lambda *a, f=block.forward: checkpoint(f, *a, use_reentrant=False)
    model(x, x).backward()
    assert torch.equal(model.load, load)
    torch.testing.assert_close([p.grad for p in model.parameters()], want)


def test_the_bias_moves_once_a_step_against_the_load_of_all_its_micro_batches():
    model, x, y = build("moe", bias_rate=0.01).train(), tokens(2, 16), tokens(2, 16, seed=2)
    router = model.blocks[1].mlp.router
    _, experts = statistics(model, x)[1][0][1:], []
    model.load.zero_()
    for batch in (x, y):
        experts.append(statistics(model, batch)[1][0][2].flatten())
        assert not router.bias.any()
    count = torch.bincount(torch.cat(experts), minlength=6)
    model.after_step()
    assert count.sum() == 128 and count.float().std() > 0
    torch.testing.assert_close(router.bias, 0.01 * (count.float().mean() - count).sign())
    assert torch.equal(model.expert_load[0], count)
    assert "blocks.1.mlp.router.bias" in model.state_dict()  # checkpoints keep it
    assert not any(name.endswith("router.bias") for name, _ in model.named_parameters())  # no optimizer touches it
    assert not any(name in model.state_dict() for name in ("load", "terms"))


def test_the_bias_alone_brings_a_crooked_router_into_balance():
    model = build("moe", bold=False, bias_rate=0.01, router_score="sigmoid", balance_loss=0.0).train()
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


def test_the_bias_stays_fp32_in_a_cast_and_begins_at_zero_off_the_meta_device():
    model = build("moe")
    router = model.blocks[1].mlp.router
    router.bias += 1.001
    want = router.bias.clone()
    model.load.fill_(1001)
    model.bfloat16()
    assert router.weight.dtype == torch.bfloat16 and torch.equal(router.bias, want) and router.bias.dtype == want.dtype
    assert set(model.load.flatten().tolist()) == {1001}
    with torch.device("meta"):
        model = model_moe.GPT(model.config).to(torch.bfloat16)
    torch.use_deterministic_algorithms(True)  # fills what is empty with NaN
    try:
        router = model.to_empty(device="cpu").blocks[1].mlp.router
    finally:
        torch.use_deterministic_algorithms(False)
    assert router.bias.dtype == torch.float32 and router.weight.isnan().all()
    assert not router.bias.any() and not model.load.any() and not model.terms.any()


def test_a_bias_that_is_not_zero_cannot_be_lost_in_a_hugging_face_folder(tmp_path):
    model = build("moe")
    model.blocks[1].mlp.router.bias[0] = 0.1
    with pytest.raises(ValueError, match="router bias"):
        model.save_pretrained(tmp_path / "a")
    for options in (dict(n_shared_expert=1), dict(router_score="sigmoid"), dict(gate_scale=2.0), dict(n_group=2)):
        with pytest.raises(ValueError, match=next(iter(options))):
            build("moe", **options).save_pretrained(tmp_path / "b")


def test_metrics_are_those_of_the_counts():
    model = build("moe", n_layer=3, balance_loss=0.5, z_loss=0.1, capacity_factor=0.5).train()
    assert model.metrics() == {}
    x, y = tokens(2, 16), tokens(2, 16, seed=2)
    (_, a), (_, b) = statistics(model, x), statistics(model, y)
    model.after_step()
    got, violations, z = model.metrics(), [], 0.0
    for i, (p, q) in enumerate(zip(a, b)):
        load = torch.bincount(torch.cat((p[2].flatten(), q[2].flatten())), minlength=6).double()
        share = load / load.sum()
        assert got[f"load_entropy_{i + 1}"] == pytest.approx(-torch.xlogy(share, share).sum().item(), rel=1e-5)
        violations.append((load.max() / load.mean() - 1).item())
        z += sum(out[0].logsumexp(-1).square().mean().item() for out in (p, q)) / 4
    assert got["load_violation"] == pytest.approx(max(violations), rel=1e-5)
    assert got["z_loss"] == pytest.approx(z, rel=1e-5) and got["balance_loss"] > 1 and 0 < got["dropped_fraction"] < 1
    assert model.expert_load.shape == (2, 6)
    model.expert_load.fill_(7)
    assert model.metrics()["load_entropy_1"] == pytest.approx(math.log(6)) and model.metrics()["load_violation"] == 0


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_compiled_training_step_is_one_graph_and_equals_the_eager_one():
    options = dict(n_shared_expert=1, shared_gate=True, capacity_factor=0.7, drop_by="score")
    eager, compiled = build("moe", **options).train(), build("moe", **options).train()
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = tokens(2, 16, seed=seed)
        want, got = eager(x, x), step(x, x)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        want, got = (torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((want, eager), (got, compiled)))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert torch.equal(compiled.load, eager.load)


def test_autocast_keeps_the_router_in_fp32_and_the_experts_in_its_own_dtype():
    moe, x, seen = layer().float().train(), inputs(2, 16, 32, dtype=torch.float32), []
    moe.w_up.register_forward_hook(lambda m, i, out: seen.append((i[0].dtype, out.dtype)))
    want = moe(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert moe.router(x)[0].dtype == torch.float32
        got = moe(x)[0]
    assert seen == [(torch.float32,) * 2, (torch.bfloat16,) * 2]
    assert F.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.999


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
    model, x = build("moe", **dict(n_expert=8) | options), tokens(1, 2)  # so few choices are not padded
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * flops.forward_flops_per_token("moe", model.config, 2)
    assert sum(flops.parameters("moe", model.config).values()) == sum(p.numel() for p in model.parameters())
    assert flops.cache_bytes_per_token("moe", model.config, 4) == model.new_cache(1, 8).bytes_per_token()


def train(rank=0, world=1, compiled=False, micro_batches=1, **options):
    """Three steps on this rank's share of the batch: (weights, load of the last step, its metrics)."""
    model = build("moe", bias_rate=0.01, capacity_factor=0.7, **options).train()
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


SCENARIOS = {
    "global balance": dict(balance_loss=1.0),
    "compiled": dict(balance_loss=1.0, compiled=True),
    "micro-batches": dict(balance_loss=0.0, micro_batches=2),  # with a global loss they would know less of the step
}


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
    for rank in "01":
        for name, (weights, load, metrics) in torch.load(tmp_path / rank).items():
            want, want_load, want_metrics = train(balance_loss=SCENARIOS[name]["balance_loss"])
            assert torch.equal(load, want_load), name
            if name == "micro-batches":
                del metrics["balance_loss"], want_metrics["balance_loss"]
            assert metrics == pytest.approx(want_metrics, rel=1e-3), name
            torch.testing.assert_close(weights, want, atol=1e-4, rtol=0)


def test_one_training_step_waits_for_the_device_at_most_once():
    """What reads a number off the device is an item() or a tolist(): metrics alone has one."""
    model, x, waits = build("moe", capacity_factor=0.5).train(), tokens(2, 16), []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    optimizer = make_optimizer(model)
    with Count():
        model(x, x).backward()
        model.after_step()
        assert not waits
    optimizer.step()
    assert len(model.metrics()) == 5
