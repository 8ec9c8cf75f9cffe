"""Which variant learns better: the learning rates to try, and what differences chance does not explain.

Each rate is tried with a few seeds (the sweep), the best is repeated with other seeds, and only those are compared.
Where all variants are equal, at most one of 20 tables calls any of them better or worse: tests/test_verdicts.py
simulates it, with three rates, 5 variants and 3 to 30 seeds.

A row is what compare.py writes of a variant: "name", "loss" (of each seed, None where it diverged), "sweep" {rate: mean
loss, None where one diverged}, "sweep_seeds".
"""

import math
import statistics
from functools import lru_cache

import numpy as np
import torch

FALSE_WINS = 0.05  # of the tables in which all variants are equal
# A rate is chosen by noisy losses, which adds to the variance of a variant's mean: by this part of a run's, over the
# seeds of the sweep. With 3 seeds, and 1 for the sweep, a mean has 1/3 + 0.16 of a run's variance. The number is found
# by the simulation in tests/test_verdicts.py, of three rates.
VARIANCE_OF_A_CHOICE = 0.16


# ---- the learning rate -----------------------------------------------------------------------------------------------
def sweep_seeds(rates: int, seeds: int) -> int:
    """Returns how many seeds try each rate: a third of those that are compared; 0 where there is one rate to try."""
    if rates == 1:
        return 0
    return math.ceil(seeds / 3)


def best_rate(sweep: dict[float, float]) -> float:
    """Returns the rate with the lowest loss of {rate: mean loss}."""
    return min(sweep, key=sweep.get)


def is_at_the_edge(sweep: dict[float, float]) -> bool:
    """Returns whether the best rate has a neighbour on one side only, so that a better one may lie beyond it."""
    return len(sweep) > 1 and best_rate(sweep) in (min(sweep), max(sweep))


def rate_beyond(sweep: dict[float, float]) -> float:
    """Returns the next rate beyond a best one at an edge, by the same factor: best 2 of 0.5, 1 and 2 gives 4."""
    rates = sorted(sweep)
    neighbour = rates[-2]
    if best_rate(sweep) == rates[0]:
        neighbour = rates[1]
    return best_rate(sweep) ** 2 / neighbour


def gain_between_rates(sweep: dict[float, float]) -> float:
    """Returns how much lower the loss is at the best rate of all than at the best that was tried.

    It is read off the parabola through the best one and its two neighbours, over the logarithm of the rate; 0 where
    the best has fewer than two neighbours, or a neighbour diverged.
    """
    if len(sweep) < 3 or is_at_the_edge(sweep):
        return 0.0
    rates = sorted(sweep)
    i = rates.index(best_rate(sweep))
    three = rates[i - 1 : i + 2]
    losses = np.array([sweep[rate] for rate in three])
    if not np.isfinite(losses).all():
        return 0.0
    # The best one is at (0, 0): a x^2 + b x has its minimum, -b^2 / (4 a), at x = -b / (2 a).
    a, b, _ = np.polyfit(np.log(three) - np.log(three[1]), losses - losses[1], 2)
    if a <= 0:  # all three are equal
        return 0.0
    return b * b / (4 * a)


# ---- the difference --------------------------------------------------------------------------------------------------
def residual_deviation(losses: np.ndarray) -> float:
    """Returns the standard deviation of a run beside its variant's mean and its seed's; losses: (variants, seeds).

    Equal seeds have equal data in equal order: what a seed does to all variants alike says nothing about any of them.
    """
    variants, seeds = losses.shape
    residual = losses - losses.mean(1, keepdims=True) - losses.mean(0) + losses.mean()
    return math.sqrt((residual**2).sum() / ((variants - 1) * (seeds - 1)))


@lru_cache
def critical_value(comparisons: int, freedom: int) -> float:
    """Returns t: in FALSE_WINS of the tables of equal variants any of them is over t standard errors from the baseline.

    Dunnett's test (1955), two-sided, with equal numbers of runs. freedom: degrees of freedom of the estimated
    deviation. Of one comparison it is Student's t: 4.303 for freedom 2; of 4 comparisons with freedom 8 it is 3.02.
    """
    # Given the baseline's mean z and the estimated deviation s, the comparisons are independent: their chances are
    # multiplied, and averaged over a grid of z and s. freedom s^2 is chi-square distributed.
    z = torch.linspace(-6, 6, 121, dtype=torch.float64)[:, None]  # the baseline's mean, in its standard errors
    s = torch.logspace(-4, 1, 500, dtype=torch.float64)  # the deviation that is estimated, over the true one
    log_density = -(z**2) / 2 + freedom * s.log() - freedom * s**2 / 2  # over the logarithm of s
    weight = torch.softmax(log_density.flatten(), 0).view_as(log_density)

    def exceeded(t):
        inside = torch.special.ndtr(z + math.sqrt(2) * t * s) - torch.special.ndtr(z - math.sqrt(2) * t * s)
        return 1 - (weight * inside**comparisons).sum()

    low = 0.0
    high = 100.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if exceeded(middle) > FALSE_WINS:
            low = middle
        else:
            high = middle
    return high


def error_and_limit(rows: list[dict]) -> tuple[float, float]:
    """Returns the standard error of each variant's difference from the first one, and the most that chance explains."""
    seeds = len(rows[0]["loss"])
    variance = 2 / seeds  # of a difference of means, where a run's is 1
    if rows[0]["sweep_seeds"]:
        variance += 2 * VARIANCE_OF_A_CHOICE / rows[0]["sweep_seeds"]
    error = residual_deviation(np.array([row["loss"] for row in rows])) * math.sqrt(variance)
    comparisons = len(rows) - 1
    return error, error * critical_value(comparisons, comparisons * (seeds - 1))


def verdicts(rows: list[dict]) -> list[str]:
    """Says how each variant's loss differs from the first one's, ± standard error; rows are those of compare.py.

    The losses compared are those at each one's best rate of all. The error is pooled over the variants. A loss of None
    is that of a run that diverged.
    """
    first, *others = rows
    if None in first["loss"]:
        return ["diverged", *["not compared, as the first one diverged"] * len(others)]
    finite = [row for row in rows if None not in row["loss"]]
    several = len(first["loss"]) > 1 and len(finite) > 1
    if several:
        error, limit = error_and_limit(finite)
    words = ["-"]
    for row in others:
        if None in row["loss"]:
            words.append("diverged")
            continue
        difference = best_loss(row) - best_loss(first)
        if several:
            words.append(f"{difference:+.4f} ± {error:.4f}: {in_words(difference, limit, row, first)}")
        else:
            words.append(f"{difference:+.4f} (one seed)")
    return words


def in_words(difference, limit, row, first):
    """Says which variant is better. One that may be better at a rate beyond its sweep is not called the worse one."""
    if abs(difference) <= limit:
        return "no difference seen"
    word = "better"
    loser = first
    if difference > 0:
        word = "worse"
        loser = row
    if is_at_the_edge(rates_of(loser)):
        return f"not said, as {loser['name']} may be better at a rate beyond its sweep"
    return word


def rates_of(row: dict) -> dict[float, float]:
    """Returns {rate: mean loss} of a row's sweep, infinity where a run diverged."""
    rates = {}
    for rate, loss in row["sweep"].items():
        rates[float(rate)] = math.inf if loss is None else loss
    return rates


def best_loss(row: dict) -> float:
    """Returns the mean over seeds, less what the best rate of all is estimated to gain."""
    return statistics.mean(row["loss"]) - gain_between_rates(rates_of(row))
