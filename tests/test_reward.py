"""The loss of reward.py, and the scores of its model (training/reward_model.py)."""

import math

import pytest
import torch

from reward import bradley_terry
from tests.tiny import build
from training.reward_model import RewardModel, side_by_side

CHOSEN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
REJECTED = torch.tensor([-0.5, 0.3, 1.9], dtype=torch.float64)


def test_the_formula_by_hand():
    found = bradley_terry(CHOSEN, REJECTED, margin=0.2, centering=0.01)
    for chosen, rejected, loss in zip(CHOSEN.tolist(), REJECTED.tolist(), found.tolist()):
        expected = math.log(1 + math.exp(-(chosen - rejected - 0.2))) + 0.01 * (chosen + rejected) ** 2
        assert loss == pytest.approx(expected)


def test_the_loss_and_its_gradient_are_those_of_trl():
    """The mean over three pairs and the norm of its gradient: RewardTrainer's with a margin, of TRL 1.16."""
    scores = (1.3 * torch.sin(1.7 * torch.arange(6, dtype=torch.float64))).requires_grad_()
    loss = bradley_terry(scores[:3], scores[3:], margin=0.2, centering=0.01).mean()
    loss.backward()
    assert (loss.item(), scores.grad.norm().item()) == pytest.approx((0.8742565233, 0.4501106983), abs=1e-9)


def test_it_begins_at_ln_2_and_only_differences_count_but_for_the_centering():
    assert bradley_terry(torch.zeros(2), torch.zeros(2), 0.0, 0.01).tolist() == pytest.approx([math.log(2)] * 2)
    torch.testing.assert_close(
        bradley_terry(CHOSEN + 7, REJECTED + 7, 0.0, 0.0), bradley_terry(CHOSEN, REJECTED, 0.0, 0.0)
    )


@pytest.fixture
def scorer():
    torch.manual_seed(1)
    model = RewardModel(build("baseline", eot_id=0)).double().eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def test_a_score_is_that_of_the_last_token_whatever_stands_behind_it(scorer):
    texts = [[0, 5, 6, 7], [0, 8], [0, 9, 10, 11, 12, 13]]
    together = scorer(*side_by_side(texts, eot_id=0, device="cpu"))
    for text, score in zip(texts, together):
        alone = scorer.head(last_hidden(scorer, text))
        torch.testing.assert_close(score[None], alone)


def last_hidden(scorer, text):
    """What the backbone makes of the last token of a text alone."""
    seen = []
    hook = scorer.backbone.norm.register_forward_hook(lambda module, x, y: seen.append(y))
    scorer(*side_by_side([text], eot_id=0, device="cpu"))
    hook.remove()
    return seen[0][0, -1]


def test_a_new_one_scores_all_texts_0_and_has_no_other_head():
    model = RewardModel(build("baseline", eot_id=0, tie_embeddings=False))
    scores = model(*side_by_side([[0, 5, 6], [0, 8]], eot_id=0, device="cpu"))
    assert scores.tolist() == [0.0, 0.0]
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def test_every_parameter_of_it_learns():
    model = RewardModel(build("baseline", eot_id=0))
    torch.nn.init.normal_(model.head.weight)
    scores = model(*side_by_side([[0, 5, 6], [0, 8, 9]], eot_id=0, device="cpu"))
    bradley_terry(scores[:1], scores[1:], 0.0, 0.01).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
