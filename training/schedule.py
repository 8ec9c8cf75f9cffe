"""The learning rate over a run: a linear warm-up, then constant, cosine, or constant and down at the end (wsd)."""

import math


def learning_rate(
    step: int,
    peak: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    schedule: str,
    decay_fraction: float,
    decay_shape: str,
) -> float:
    """Returns the learning rate of a step, counted from 0: min_lr is what the step after the last one would have.

    schedule: cosine goes down from the end of the warm-up on, wsd over the last decay_fraction of max_steps in
    decay_shape (linear, cosine, or sqrt: 1 - sqrt of the time), constant never.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)

    steps_down = 0
    shape = decay_shape
    if schedule == "cosine":
        steps_down = max_steps
        shape = "cosine"
    elif schedule == "wsd":
        steps_down = round(decay_fraction * max_steps)
    first = max(max_steps - steps_down, warmup_steps)
    if step < first:
        return peak

    t = (step - first) / max(max_steps - first, 1)  # 0 to 1
    if shape == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * t))
    elif shape == "linear":
        left = 1 - t
    else:
        left = 1 - math.sqrt(t)
    return min_lr + (peak - min_lr) * left
