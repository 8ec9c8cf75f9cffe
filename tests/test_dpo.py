"""The loss of dpo.py: against TRL 1.16's numbers, and by what each part is for."""

import math

import pytest
import torch

import dpo
from data.bpe import CHAT_TOKENS
from data.tokenizers import load_tokenizer
from dpo import best_against_worst, preference_loss
from training import pairs
from training.answers import Answer, Problem

GAIN_CHOSEN = torch.tensor([0.3, -1.2, 2.5], dtype=torch.float64)
GAIN_REJECTED = torch.tensor([-0.4, 0.7, 2.1], dtype=torch.float64)


def loss(chosen=GAIN_CHOSEN, rejected=GAIN_REJECTED, beta=0.1, loss_type="sigmoid", label_smoothing=0.0):
    return preference_loss(chosen, rejected, beta, loss_type, label_smoothing)


def test_the_formula_by_hand():
    losses, margin = loss()
    for gain_w, gain_l, found, its_margin in zip(GAIN_CHOSEN, GAIN_REJECTED, losses, margin):
        delta = 0.1 * (gain_w - gain_l).item()
        assert its_margin.item() == pytest.approx(delta)
        assert found.item() == pytest.approx(math.log(1 + math.exp(-delta)))


@pytest.mark.parametrize(
    "loss_type, expected", [("sigmoid", (0.7313962252, 0.2840776822)), ("ipo", (3.4117771525, 2.8049145088))]
)
def test_the_loss_and_its_gradient_are_those_of_trl(loss_type, expected):
    """The mean over three pairs and the norm of its gradient: DPOTrainer._compute_loss with beta=0.3."""
    t = torch.arange(30, dtype=torch.float64).view(6, 5)
    lengths = torch.tensor([5, 3, 4, 2, 5, 1])
    is_target = torch.arange(5) < lengths[:, None]
    logp = ((-1.5 + torch.sin(1.7 * t)) * is_target).requires_grad_()
    reference_logp = (-1.4 + torch.cos(0.9 * t)) * is_target
    gains = (logp - reference_logp).sum(dim=1)
    if loss_type == "ipo":
        gains = gains / lengths
    mean = loss(gains[:3], gains[3:], 0.3, loss_type)[0].mean()
    mean.backward()
    assert (mean.item(), logp.grad.norm().item()) == pytest.approx(expected, abs=1e-9)


def test_it_begins_at_ln_2_with_no_pair_right():
    zero = torch.zeros(5, dtype=torch.float64)
    for smoothing in (0.0, 0.3):
        losses, margin = loss(zero, zero, label_smoothing=smoothing)
        assert losses.tolist() == pytest.approx([math.log(2)] * 5)
        assert (margin > 0).sum() == 0


def test_the_chosen_becomes_likelier_and_the_rejected_less():
    chosen = GAIN_CHOSEN.clone().requires_grad_()
    rejected = GAIN_REJECTED.clone().requires_grad_()
    loss(chosen, rejected)[0].sum().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


def test_swapped_answers_have_the_opposite_margin():
    torch.testing.assert_close(loss(GAIN_REJECTED, GAIN_CHOSEN)[1], -loss()[1])


def test_with_labels_half_of_which_are_wrong_neither_is_preferred():
    torch.testing.assert_close(loss(label_smoothing=0.5)[0], loss(GAIN_REJECTED, GAIN_CHOSEN, label_smoothing=0.5)[0])
    assert loss(label_smoothing=0.2)[0][2] > loss(label_smoothing=0.0)[0][2]  # a right pair costs more


def test_ipo_wants_a_difference_of_1_over_2_beta_and_no_more():
    beta = 0.25
    losses, _ = loss(torch.tensor([2.0, 1.0, 4.0]), torch.zeros(3), beta, "ipo")
    assert losses.tolist() == pytest.approx([0.0, 1.0, 4.0])


def answer(text):
    return Answer(Problem(0, [1, 2], "", {}), [3, len(text)], [0.0] * 2, [0.0] * 2, [True] * 2, False, text)


def test_pairs_are_the_best_and_the_worst_of_each_group_and_of_equals_there_is_none():
    answers = [answer("a" * n) for n in range(6)]
    pairs = best_against_worst(answers, [0.2, 1.0, 0.0, 0.5, 0.5, 0.5], group_size=3)
    assert len(pairs) == 1
    assert pairs[0].chosen == answers[1].ids and pairs[0].rejected == answers[2].ids and pairs[0].prompt == [1, 2]


def said_by_watch(rows):
    said = []
    watch = dpo.Watch(said.append)
    for row in rows:
        watch.look(row)
    return said


def test_a_loss_that_does_not_move_is_said_once():
    still = {"loss": math.log(2), "gain_chosen": 0.0}
    moved = {"loss": 0.6, "gain_chosen": 0.0}
    assert said_by_watch([still] * 49 + [moved] + [still] * 49) == []
    (warning,) = said_by_watch([still] * 200)
    assert "still ln 2 after 50 steps" in warning and "learning_rate=5e-07" in warning


def test_chosen_answers_that_become_unlikely_are_said_once_unless_a_gain_is_no_difference(monkeypatch):
    rows = [
        {"loss": 0.1, "gain_chosen": -9.0},
        {"loss": 0.1, "gain_chosen": -11.0},
        {"loss": 0.1, "gain_chosen": -12.0},
    ]
    assert said_by_watch(rows[:1]) == []
    (warning,) = said_by_watch(rows)
    assert "10 nats less likely" in warning and "nll_coef=1" in warning
    monkeypatch.setattr(dpo, "reference_free", True)
    assert said_by_watch(rows) == []


def test_a_file_of_equal_answers_has_no_pairs_and_says_so(tmp_path):
    file = tmp_path / "equal.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(ValueError, match="equal.jsonl has no pairs of which one is better"):
        pairs.read(str(file), load_tokenizer("byte", CHAT_TOKENS), 32, None)
