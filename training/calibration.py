"""How many steps fit into some minutes on this machine: what train.py's knob `minutes` makes of max_steps."""

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.loss import loss_sums

WARM_UP = 2  # steps: the first ones allocate, and compile
TIMED = 10  # steps
FEW = 8  # batches, from which the time of a whole evaluation follows


def count_steps(
    minutes: float,
    model: torch.nn.Module,
    make_optimizer: Callable,
    stages: list[tuple[float, Callable, Callable[[int], Iterable[tuple]]]],
    evaluation_batches: Iterable[tuple],
    eval_every: int,
    autocast=None,
    compile: bool = False,
) -> int:
    """Returns the max_steps with which training, evaluating and saving take about so many minutes.

    Everything is done with a copy of the model, and torch's random numbers go on as if nothing had been: a run that is
    given the returned max_steps has the same weights in the end. What passes between processes is not timed.
    stages: of each its share of the steps, what puts a model into it, and what gives the batches of its n-th step.
    evaluation_batches: those that this process has in each evaluation.
    """
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        trial = copy.deepcopy(model)
        optimizer = make_optimizer(trial)
        net = torch.compile(trial) if compile else trial
        autocast = autocast or nullcontext()

        # 1. steps
        a_step = 0.0
        for share, put_into_stage, batches_of_step in stages:
            put_into_stage(trial)
            seconds = []
            for step in range(WARM_UP + TIMED):
                started = now(trial)
                for x, y in batches_of_step(step):
                    with autocast:
                        loss = net(x, y)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(trial.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                seconds.append(now(trial) - started)
            a_step += share * statistics.median(seconds[WARM_UP:])

        # 2. an evaluation
        trial.eval()
        batches = iter(evaluation_batches)
        few = list(islice(batches, FEW))
        started = now(trial)
        loss_sums(trial, few, torch.zeros(trial.config.vocab_size, dtype=torch.long), autocast)
        a_batch = (now(trial) - started) / max(len(few), 1)
        an_evaluation = a_batch * (len(few) + sum(1 for _ in batches))

        # 3. a checkpoint, which has about as many moments as weights
        started = now(trial)
        weights = {name: p.detach().contiguous() for name, p in trial.named_parameters()}
        save_file(weights, Path(folder) / "weights.safetensors")
        a_save = 3 * (now(trial) - started)

    # There is an evaluation, and a save before it, every eval_every steps, at the beginning and at the end.
    left = 60 * minutes - 2 * (an_evaluation + a_save)
    steps = max(left, 0) / (a_step + (an_evaluation + a_save) / eval_every)
    if steps >= 100:
        return round(steps, -1)
    return max(math.floor(steps), 1)


def now(model):
    """Returns the seconds on the clock, once the model's device has done all that was queued."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
