"""What chance may say of equal variants, and what a true difference must show: sweeps and verdicts, simulated."""

import math

import numpy as np
import pytest
import torch

from benchmarks import verdicts
from compare import MORE_RATES


def simulated_row(name, rng, seeds, blocks, curvature, better_by):
    """Returns what compare.py would write of a variant whose loss is a parabola over ln(rate), with noise of 1.

    Each variant has its best rate elsewhere; curvature: the second difference of losses at rates of a factor 2.
    """
    best = rng.uniform(-1, 1)
    swept = verdicts.sweep_seeds(3, seeds)

    def loss(rate, n):
        return curvature / 2 * (math.log2(rate) - best) ** 2 - better_by + rng.standard_normal(n)

    sweep = {rate: loss(rate, swept).mean() for rate in (0.5, 1.0, 2.0)}
    while verdicts.is_at_the_edge(sweep) and len(sweep) < 3 + MORE_RATES:
        rate = verdicts.rate_beyond(sweep)
        sweep[rate] = loss(rate, swept).mean()
    losses = blocks + loss(verdicts.best_rate(sweep), seeds)
    return {"name": name, "sweep": sweep, "sweep_seeds": swept, "loss": losses.tolist()}


def tables(trials, variants, seeds, curvature, better_by=0.0):
    """Yields the verdicts of simulated tables; better_by: how much lower the second variant's loss truly is."""
    rng = np.random.default_rng(seeds)
    for _ in range(trials):
        blocks = rng.standard_normal(seeds)  # what a seed does to all alike
        gains = [0.0, better_by, *[0.0] * (variants - 2)]
        yield verdicts.verdicts(
            [simulated_row(f"v{i}", rng, seeds, blocks, curvature, gain) for i, gain in enumerate(gains)]
        )


@pytest.mark.parametrize("seeds", [3, 5, 10, 30])
@pytest.mark.parametrize("curvature", [0.0, 1.0, 8.0])
def test_of_twenty_tables_of_equal_variants_one_at_most_has_a_winner_or_a_loser(seeds, curvature):
    trials = 600
    wrong = sum(
        any(word.endswith(("better", "worse")) for word in said) for said in tables(trials, 5, seeds, curvature)
    )
    deviation = math.sqrt(0.05 * 0.95 * trials)
    assert wrong <= 0.05 * trials + 2 * deviation


@pytest.mark.parametrize("curvature", [1.0, 8.0, 64.0])
def test_a_difference_of_four_deviations_is_found_with_three_seeds(curvature):
    trials = 600
    found = sum(said[1].endswith("better") for said in tables(trials, 5, 3, curvature, better_by=4.0))
    assert found >= 0.8 * trials


def test_critical_values_are_those_of_dunnett_s_table():
    """Two-sided 5 % (Dunnett, New tables for multiple comparisons with a control, Biometrics 20, 1964)."""
    table = {
        (1, 2): 4.30,
        (1, 4): 2.78,
        (1, 10): 2.23,
        (2, 5): 3.03,
        (3, 5): 3.29,
        (4, 5): 3.48,
        (3, 10): 2.76,
        (4, 20): 2.65,
    }
    for (comparisons, freedom), value in table.items():
        assert verdicts.critical_value(comparisons, freedom) == pytest.approx(value, abs=0.006)


def test_a_seed_that_is_hard_for_all_takes_nothing_from_the_evidence():
    losses = np.array([[1.0, 5.0, 9.0], [2.0, 6.0, 10.1]])
    assert verdicts.residual_deviation(losses) == pytest.approx(math.sqrt(2 * (0.1**2) / 6 / 2))
    rows = [{"name": n, "sweep": {}, "sweep_seeds": 0, "loss": loss} for n, loss in zip("ab", losses.tolist())]
    assert verdicts.verdicts(rows)[1] == "+1.0333 ± 0.0333: worse"


def test_the_error_is_that_of_two_way_analysis_of_variance():
    """The residual of a least-squares fit with one number for each variant and each seed."""
    torch.manual_seed(0)
    losses = torch.randn(4, 3, dtype=torch.float64)
    design = torch.zeros(12, 7, dtype=torch.float64)
    for i in range(12):
        design[i, i // 3] = 1
        design[i, 4 + i % 3] = 1
    fit = design @ torch.linalg.pinv(design) @ losses.flatten()
    variance = (losses.flatten() - fit).square().sum() / (12 - 6)
    assert verdicts.residual_deviation(losses.numpy()) == pytest.approx(variance.sqrt().item())


def row(name, losses, sweep=None):
    return {"name": name, "sweep": sweep or {}, "sweep_seeds": 1 if sweep else 0, "loss": losses}


def test_what_is_said_where_little_can_be():
    assert verdicts.verdicts([row("a", [3.0]), row("b", [2.0])]) == ["-", "-1.0000 (one seed)"]
    diverged = row("c", [2.0, None])
    assert verdicts.verdicts([row("a", [3.0, 3.1]), diverged, row("b", [3.0, 3.1])])[1] == "diverged"
    assert verdicts.verdicts([diverged, row("a", [3.0, 3.1])]) == [
        "diverged",
        "not compared, as the first one diverged",
    ]
    assert verdicts.verdicts([row("a", [1.0, 1.0]), row("b", [1.0, 1.0])])[1].endswith("no difference seen")


def test_who_may_be_better_at_a_rate_that_was_not_tried_is_not_called_worse():
    edge = {"1": 3.0, "2": 2.5, "4": 2.0}
    tuned = {"1": 3.0, "2": 2.0, "4": 3.0}
    good = [1.0, 1.1, 1.0]
    bad = [2.0, 2.0, 2.1]
    assert "not said, as b may be better" in verdicts.verdicts([row("a", good, tuned), row("b", bad, edge)])[1]
    assert verdicts.verdicts([row("a", bad, tuned), row("b", good, edge)])[1].endswith("better")


def test_the_gain_between_rates_is_the_parabola_s():
    sweep = {rate: 2 + 0.3 * (math.log(rate) - 0.2) ** 2 for rate in (0.5, 1.0, 2.0, 4.0)}
    assert verdicts.gain_between_rates(sweep) == pytest.approx(0.3 * 0.2**2)
    assert verdicts.gain_between_rates(sweep | {0.5: math.inf}) == 0
    assert verdicts.gain_between_rates({1.0: 2.0}) == 0


def test_the_limit_is_that_of_the_degrees_of_freedom_which_the_residual_has():
    """Of 2 variants and 3 seeds 2 are left, and of 5 variants and 3 seeds 8 (Student's t 4.303, Dunnett's 3.02)."""
    two = [row("a", [1.0, 2.0, 4.0]), row("b", [1.0, 3.0, 3.0])]
    error, limit = verdicts.error_and_limit(two)
    assert limit / error == pytest.approx(4.303, abs=2e-3)
    error, limit = verdicts.error_and_limit([*two, *two, two[0]])
    assert limit / error == pytest.approx(3.02, abs=6e-3)
