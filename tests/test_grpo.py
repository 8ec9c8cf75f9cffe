"""The loss of grpo.py: against TRL 1.16 on the same tensors, by hand, and by what each part is for."""

import math

import pytest
import torch

from grpo import advantages, kl_to_reference, policy_loss, token_weights

# Four answers of 6, 3, 5 and 1 tokens, and log-probabilities that are different enough for both clips.
LENGTHS = torch.tensor([6, 3, 5, 1])
IS_TARGET = torch.arange(6) < LENGTHS[:, None]
T = torch.arange(24, dtype=torch.float64).view(4, 6)
LOGP = -1.5 + torch.sin(1.7 * T)
OLD_LOGP = LOGP + 0.3 * torch.cos(0.9 * T)
REFERENCE_LOGP = LOGP + 0.4 * torch.sin(2.3 * T + 1)
ADVANTAGE = torch.tensor([[1.2], [-0.7], [0.4], [-1.1]], dtype=torch.float64)


def total(logp, loss_type, beta=0.0, old_logp=OLD_LOGP, advantage=ADVANTAGE, is_target=IS_TARGET, n_max=10):
    """The loss of a whole step, as add_gradients has it."""
    losses, _, _ = policy_loss(logp, old_logp, advantage, is_target, loss_type, clip_low=0.2, clip_high=0.28)
    losses = losses + beta * kl_to_reference(logp, REFERENCE_LOGP[: len(logp), : logp.size(1)]) * is_target
    answers = len(logp)
    tokens = is_target.sum().item()
    return (losses * token_weights(is_target, loss_type, n_max, answers, tokens)).sum()


def loss_and_norm(*args, **options):
    logp = LOGP.clone().requires_grad_()
    loss = total(logp, *args, **options)
    loss.backward()
    return loss.item(), logp.grad.norm().item()


@pytest.mark.parametrize(
    "loss_type, beta, expected",
    [  # loss, norm of the gradient: GRPOTrainer._compute_loss; its gspo is loss_type grpo by sequence, and its cispo
        ("grpo", 0.0, (0.0975554872, 0.3788160562)),  # has the bound 1.28 where ours has clip_high=0.28
        ("dapo", 0.0, (-0.4121215562, 0.1940194023)),
        ("dr_grpo", 0.0, (-0.1545455836, 0.0727572758)),
        ("gspo", 0.0, (0.0990016404, 0.3819679470)),
        ("cispo", 0.0, (0.4336571391, 0.2439171030)),
        ("dapo", 0.04, (-0.4105174917, 0.1940922303)),
    ],
)
def test_the_loss_and_its_gradient_are_those_of_trl(loss_type, beta, expected):
    assert loss_and_norm(loss_type, beta) == pytest.approx(expected, abs=1e-7)


def test_two_answers_of_three_tokens_by_hand():
    ratio = torch.tensor([[1.5, 1.0, 0.5], [1.5, 0.5, 9.0]], dtype=torch.float64)  # the last is no target
    advantage = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    is_target = torch.tensor([[True, True, True], [True, True, False]])
    old_logp = torch.full((2, 3), -1.0, dtype=torch.float64)
    losses, is_low, is_high = policy_loss(old_logp + ratio.log(), old_logp, advantage, is_target, "dapo", 0.2, 0.28)
    # A = 2: min(1.5 * 2, 1.28 * 2), 1 * 2 and min(0.5 * 2, 0.8 * 2); A = -1: min(-1.5, -1.28) and min(-0.5, -0.8)
    torch.testing.assert_close(losses, torch.tensor([[-2.56, -2.0, -1.0], [1.5, 0.8, 0.0]], dtype=torch.float64))
    assert is_high.tolist() == [[True, False, False], [False, False, False]]
    assert is_low.tolist() == [[False, False, False], [False, True, False]]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_the_first_update_is_reinforce(loss_type):
    logp = LOGP.clone().requires_grad_()
    losses, is_low, is_high = policy_loss(logp, LOGP, ADVANTAGE, IS_TARGET, loss_type, 0.2, 0.28)
    weights = token_weights(IS_TARGET, loss_type, 10, 4, 15)
    (losses * weights).sum().backward()
    assert not is_low.any() and not is_high.any()
    torch.testing.assert_close(logp.grad, -ADVANTAGE * weights)


def test_what_was_clipped_has_no_gradient_and_the_rest_has():
    ratio = torch.tensor([[1.3, 1.2, 0.7], [0.7, 0.9, 1.3]], dtype=torch.float64)
    old_logp = torch.full((2, 3), -1.0, dtype=torch.float64)
    logp = (old_logp + ratio.log()).requires_grad_()
    advantage = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    losses, _, _ = policy_loss(logp, old_logp, advantage, torch.ones(2, 3, dtype=torch.bool), "dapo", 0.2, 0.28)
    losses.sum().backward()
    assert (logp.grad == 0).tolist() == [[True, False, False], [True, False, False]]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_rows_that_are_learned_one_by_one_add_up_to_those_learned_at_once_whatever_fills_them_up(loss_type):
    whole, _ = loss_and_norm(loss_type)
    parts = 0.0
    for i, length in enumerate(LENGTHS.tolist()):
        row = (slice(i, i + 1), slice(0, length))
        losses, _, _ = policy_loss(LOGP[row], OLD_LOGP[row], ADVANTAGE[i : i + 1], IS_TARGET[row], loss_type, 0.2, 0.28)
        parts += (losses * token_weights(IS_TARGET[row], loss_type, 10, 4, 15)).sum().item()
    assert parts == pytest.approx(whole, abs=1e-12)


def test_kl_is_zero_at_the_reference_and_nowhere_negative():
    assert (kl_to_reference(LOGP, LOGP) == 0).all()
    kl = kl_to_reference(LOGP, REFERENCE_LOGP)
    assert (kl > 0).all()
    assert kl_to_reference(torch.tensor(-1.0), torch.tensor(-1.5)).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_kl_is_right_in_the_mean_over_what_the_policy_samples():
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl_to_reference(policy, reference)).sum(), exact)


def test_advantages_are_of_each_group_alone():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 9.0], [2.0, 2.0, 2.0, 2.0]])
    plain = advantages(rewards, "none")
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [-1.0, -1.0, -1.0, 3.0], [0.0, 0.0, 0.0, 0.0]]
    scaled = advantages(rewards, "group")
    spread = math.sqrt(1 / 3)  # with n - 1
    assert scaled[0].tolist() == pytest.approx([x / (spread + 1e-4) for x in plain[0].tolist()])
    assert scaled[2].tolist() == [0.0] * 4


def test_a_token_of_a_long_answer_counts_as_its_loss_type_says():
    long, short = [token_weights(IS_TARGET, "grpo", 10, 4, 15)[i, 0].item() for i in (0, 3)]
    assert (long, short) == pytest.approx((1 / 24, 1 / 4))
    for loss_type, expected in (("dapo", 1 / 15), ("dr_grpo", 1 / 40)):
        weights = token_weights(IS_TARGET, loss_type, 10, 4, 15)
        assert weights[IS_TARGET].unique().tolist() == pytest.approx([expected])
        assert (weights[~IS_TARGET] == 0).all()
