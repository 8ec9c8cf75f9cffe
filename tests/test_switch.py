"""What is special to model_switch.py: capacity and dropping, jitter, and what the load is balanced over."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.test_moe import assert_no_waits, auxiliary, compare_compiled_steps, inputs, layer, none, routed
from tests.tiny import build, tokens

OVER = ["global", "batch", "sequence"]


def test_jitter_acts_in_training_only_and_on_the_router_alone():
    model, x = build("switch", router_jitter=0.3), tokens(2, 16)
    plain_model = build("switch")
    assert torch.equal(model(x), plain_model(x))
    torch.manual_seed(0)
    a, b = model.train()(x), model(x)
    assert not torch.equal(a, b)
    assert torch.equal(plain_model.train()(x), plain_model(x))
    moe = layer("switch", router_jitter=0.3, n_expert_per_token=6, normalize_gates=False, capacity_factor=0.0)
    moe.router.weight.data.zero_()  # noise times zero: what the experts get is not noisy
    x = inputs(2, 16, 32, dtype=torch.float32)
    torch.testing.assert_close(moe.train()(x.clone(), none(x))[0], moe.eval()(x, none(x))[0])


def test_jitter_multiplies_by_factors_of_the_whole_range_and_of_no_more():
    router = layer("switch", router_jitter=0.3).router.train()
    router.weight.data = torch.eye(6, 32)  # the logits are what the router was given
    logits, _ = router.score(torch.ones(50, 32))
    assert 0.7 <= logits.min() < 0.75 and 1.25 < logits.max() <= 1.3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(drop_by="luck"), "drop_by='luck' is unknown: try position or score"),
        (dict(balance_over="layer"), "balance_over='layer' is unknown: try global, batch or sequence"),
    ],
)
def test_what_cannot_be_is_refused_with_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        build("switch", **options)


# ---- capacity --------------------------------------------------------------------------------------------------------


def kept_by_force(n_expert, chosen, gates, capacity, by_score):
    """(sequence, token, slot) of the choices that a queue for each expert and sequence keeps."""
    kept = set()
    for b, (experts, weights) in enumerate(zip(chosen.tolist(), gates.tolist())):
        for e in range(n_expert):
            queue = [(t, k, weights[t][k]) for t, row in enumerate(experts) for k, x in enumerate(row) if x == e]
            queue = sorted(queue, key=lambda item: -item[2]) if by_score else queue
            kept |= {(b, t, k) for t, k, _ in queue[:capacity]}
    return kept


@pytest.mark.parametrize("drop_by", ["position", "score"])
@pytest.mark.parametrize("factor", [0.3, 0.8, 1.25])
def test_choices_beyond_capacity_are_dropped_by_the_policy_and_counted_exactly(drop_by, factor):
    moe, x = layer("switch", capacity_factor=factor, drop_by=drop_by).double(), inputs(3, 20, 32)
    chosen, gates, _ = moe.eval().router(x, none(x))
    capacity = math.ceil(factor * 2 * 20 / 6)
    kept = kept_by_force(6, chosen, gates, capacity, drop_by == "score")
    want = torch.zeros_like(x)
    for b, t, k in kept:
        e = chosen[b, t, k]
        h = F.silu(x[b, t] @ moe.w_gate.weight[e]) * (x[b, t] @ moe.w_up.weight[e])
        want[b, t] += gates[b, t, k] * (h @ moe.w_down.weight[e])
    y, (load, _, _, dropped) = moe.train()(x, none(x))
    assert 0 < dropped
    assert dropped * chosen.numel() == pytest.approx(chosen.numel() - len(kept))
    assert load.sum() == chosen.numel()  # all that were chosen
    torch.testing.assert_close(y, want)
    alone = {(b, t) for b in range(3) for t in range(20)} - {(b, t) for b, t, _ in kept}
    assert factor > 0.3 or alone
    for b, t in alone:
        assert torch.equal(y[b, t], torch.zeros(32).double())  # the residual stream goes on alone


@pytest.mark.parametrize("drop_by", ["position", "score"])
def test_the_dropped_fraction_is_that_of_the_whole_step(drop_by):
    model = build("switch", capacity_factor=0.5, drop_by=drop_by).train()
    total = dropped = 0
    for x in (tokens(3, 20), tokens(1, 20, seed=2)):  # micro-batches of different sizes
        seen = []
        hook = model.blocks[1].mlp.router.register_forward_hook(lambda m, i, out: seen.append(out))  # noqa: B023
        model(x, x)
        hook.remove()
        _, gates, _ = seen[0]
        total += gates.numel()
        dropped += (gates == 0).sum().item()
    model.after_step()
    assert 0 < dropped < total
    assert model.metrics()["dropped_fraction"] == pytest.approx(dropped / total)


@pytest.mark.parametrize("drop_by", ["position", "score"])
def test_padding_takes_no_place_of_a_text_and_is_not_counted_as_dropped(drop_by):
    router = layer("switch", capacity_factor=0.5, drop_by=drop_by).router.train()
    chosen = torch.zeros(1, 8, 2, dtype=torch.long) + torch.tensor([0, 1])  # two have room for ceil(0.5 2 8 / 6) = 2
    gates = torch.linspace(0.1, 0.8, 8)[None, :, None].expand(1, 8, 2)  # the last ones have the best
    padding = torch.tensor([[False] * 3 + [True] * 5])
    dropped = router.beyond_capacity(chosen, gates, padding)
    kept = [0, 1] if drop_by == "position" else [1, 2]
    assert [t for t in range(3) if not dropped[0, t].any()] == kept
    scores = torch.full((1, 8, 6), 0.5)
    assert router.statistics(scores, scores, chosen, dropped, padding)[3].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("drop_by", ["position", "score"])
def test_padding_keeps_its_choices_where_no_text_takes_the_room(drop_by):
    router = layer("switch", capacity_factor=1.0, n_expert_per_token=3, drop_by=drop_by).router.train()
    chosen = torch.tensor([[[1, 2, 3], [1, 2, 3], [1, 2, 4], [0, 2, 4]]])  # room for ceil(3 * 4 / 6) = 2
    gates = torch.full((1, 4, 3), 0.3)
    padding = torch.tensor([[False, False, False, True]])
    dropped = router.beyond_capacity(chosen, gates, padding)
    assert dropped[0, 3].tolist() == [False, True, False]  # only expert 2 is full of text


def test_ample_capacity_is_dropless_and_evaluation_never_drops():
    x, y = tokens(2, 20), tokens(2, 20, seed=2)
    free, ample, tight = (build("switch", capacity_factor=f) for f in (0.0, 6.0, 0.3))
    assert torch.equal(free(x), tight(x))
    assert torch.equal(free.train()(x, y), ample.train()(x, y))
    ample.after_step()
    assert ample.metrics()["dropped_fraction"] == 0
    assert not torch.equal(tight.train()(x), free(x))


def test_dropping_by_position_depends_on_no_later_token_and_on_no_other_sequence():
    model, x = build("switch", capacity_factor=0.5).double().train(), tokens(2, 24)
    y = x.clone()
    y[0, 10:] = tokens(14, seed=5)
    torch.testing.assert_close(model(x)[0, :10], model(y)[0, :10], atol=1e-12, rtol=0)
    torch.testing.assert_close(model(x)[1], model(y)[1], atol=1e-12, rtol=0)


# ---- balance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", OVER)
def test_the_balance_loss_equals_that_of_transformers_for_each_layer_by_itself(over):
    pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    # Without dropping, evaluation and training differ by the auxiliary loss alone.
    options = dict(n_layer=3, balance_over=over, balance_loss=0.7, z_loss=0.0, capacity_factor=0.0)
    model, x = build("switch", **options).double(), tokens(3, 16)
    auxiliary(model, x)
    model.after_step()
    got, (_, seen), want = auxiliary(model, x), routed(model, x), 0.0
    for logits, _, _ in seen:  # theirs pools layers, and is K in balance
        parts = logits.unbind() if over == "sequence" else [logits.flatten(0, 1)]
        want += sum(load_balancing_loss_func((part,), 6, 2) for part in parts) / len(parts) / 2
    torch.testing.assert_close(got, 0.7 * want.double(), atol=1e-6, rtol=0)
    assert want > 1.05 * len(seen)  # this model is not in balance


@pytest.mark.parametrize("over", OVER)
def test_only_balance_over_the_step_takes_the_load_of_the_last_one(over):
    model, x = build("switch", balance_over=over, balance_loss=1.0, capacity_factor=0.0).double(), tokens(2, 16)
    first = auxiliary(model, x)
    model.blocks[1].mlp.router.load.copy_(torch.tensor([9, 1, 1, 1, 1, 1]))
    assert (auxiliary(model, x) == first) == (over != "global")


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("over", OVER)
def test_the_balance_loss_is_one_in_perfect_balance_and_e_over_k_at_worst(over, score):
    router = build("switch", balance_over=over, router_score=score).blocks[1].mlp.router
    all_experts = torch.arange(6).view(1, 3, 2)
    even = torch.full((1, 3, 6), 0.3), all_experts, [1] * 6
    worst = torch.tensor([0.5, 0.5, 0, 0, 0, 0]).expand(1, 3, 6), all_experts % 2, [3, 3, 0, 0, 0, 0]
    for (scores, chosen, load), want in ((even, 1.0), (worst, 3.0)):
        router.load.copy_(torch.tensor(load))
        assert router.statistics(scores, scores, chosen, none(chosen), none(scores))[1].item() == pytest.approx(want)


def test_the_gradient_of_the_balance_loss_over_a_batch_flows_through_the_shares_alone():
    options = dict(balance_over="batch", balance_loss=1.0, z_loss=0.0, capacity_factor=0.0)
    model, x = build("switch", **options).double(), tokens(2, 16)
    weight = model.blocks[1].mlp.router.weight
    (got,) = torch.autograd.grad(auxiliary(model, x), weight)
    _, ((_, scores, chosen),) = routed(model, x)
    fraction = F.one_hot(chosen.flatten(), 6).double().mean(0)
    (want,) = torch.autograd.grad(6 * (fraction * scores.mean((0, 1))).sum(), weight)
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 1e-3


def test_metrics_are_those_of_a_mixture_and_the_dropped_fraction():
    model, x = build("switch", capacity_factor=0.5, balance_over="batch").train(), tokens(2, 16)
    _, ((logits, scores, chosen),) = routed(model, x)
    model.after_step()
    got = model.metrics()
    fraction = F.one_hot(chosen.flatten(), 6).double().mean(0)
    assert got["balance_loss"] == pytest.approx(6 * (fraction * scores.mean((0, 1))).sum().item(), rel=1e-5)
    assert got["z_loss"] == pytest.approx(logits.logsumexp(-1).square().mean().item(), rel=1e-5)
    assert len(got) == 6 and 0 < got["dropped_fraction"] < 1 and got["load_entropy_1"] < math.log(6)


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_compiled_training_step_is_one_graph_and_equals_the_eager_one():
    compare_compiled_steps("switch", n_shared_expert=1, shared_gate=True, capacity_factor=0.7, drop_by="score")


def test_a_training_step_never_waits_for_the_device():
    assert_no_waits("switch", capacity_factor=0.5, router_jitter=0.1)
