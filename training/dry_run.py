"""What a run would cost and write, counted before anything is made of it: train.py's knob dry_run."""

import math
import os
import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch

import flops
from distributed import processes

STEPS = 3
MOST_SECONDS = 120  # for these steps
GB = 1e9


def report(knobs: dict, plan, parallel: str, dtype: str, device: str, world_size: int, say) -> str:
    """Says what a run costs and writes; returns why this machine has not the memory for it, "" where it has.

    knobs: those of train.py; plan: the run's Plan, laid out and settled.
    """
    # 1. work
    model = knobs["model"]
    max_steps = knobs["max_steps"]
    parameters = sum(flops.parameters(model, plan.stages[0].model_config).values())
    work = 0
    for stage, end in plan.spans(max_steps):
        of_a_token = flops.training_flops_per_token(model, stage.model_config, stage.block_size)
        work += (end - stage.first) * stage.batch_tokens * of_a_token
    say("dry run: nothing is trained, and nothing is written")
    say(f"{model}: {parameters:,} parameters")
    if knobs["minutes"]:
        say(f"minutes would choose max_steps when the run begins: here it is {max_steps}")
    say(f"{max_steps} steps: {plan.tokens_before(max_steps):,} tokens, {work:.4g} FLOPs")

    # 2. memory
    needs = memory(knobs, plan, parallel, dtype, world_size)
    total = sum(needs.values())
    there = memory_of(device)
    items = ", ".join(f"{name} {size / GB:.3f}" for name, size in needs.items())
    say(f"memory of a process, estimated: {items}, together {total / GB:.3f} GB of {there / GB:.3f} GB")

    # 3. disk
    out = Path(knobs["out_dir"])
    a_checkpoint = 4 * parameters + flops.optimizer_cost(model, plan.stages[0].model_config, knobs["optimizer"])[1]
    if knobs["ema"]:
        a_checkpoint += 4 * parameters
    count = checkpoints(knobs)
    size = f"{count} of {a_checkpoint / GB:.3f} GB = {count * a_checkpoint / GB:.3f} GB"
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    say(
        f"would write {out}: checkpoints at most {size}, and {shutil.disk_usage(place).free / GB:.3f} GB are free there"
    )

    if total <= there:
        return ""
    advice = "try a smaller micro_batch, gradient_checkpointing, or parallel=fsdp"
    return f"the run needs about {total / GB:.3f} GB, and a process has {there / GB:.3f} GB here: {advice}"


def memory(knobs: dict, plan, parallel: str, dtype: str, world_size: int) -> dict[str, int]:
    """Returns {what: bytes} that one process needs, in the stage that needs most."""
    of_each = []
    for stage in plan.stages:
        windows = stage.loader.last - stage.loader.first
        found = flops.memory(
            knobs["model"], stage.model_config, stage.block_size, dtype, min(stage.micro_batch, windows),
            knobs["optimizer"], knobs["gradient_checkpointing"], math.ceil(windows / stage.micro_batch),
        )  # fmt: skip
        found = {name.removesuffix("_bytes"): size for name, size in found.items()}
        if knobs["ema"]:
            found["average"] = found["weight"]
        if parallel == "ddp":
            found["gradient"] += found["weight"]  # the buffers in which gradients go between processes
        if parallel == "fsdp":
            shared = [name for name in found if name != "activation"]
            found |= {name: math.ceil(found[name] / world_size) for name in shared}
        of_each.append(found)
    return max(of_each, key=lambda found: sum(found.values()))


def memory_of(device: str) -> int:
    """Returns the bytes of memory that a process may have: of its GPU, or its share of this machine's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    if device == "mps":
        return torch.mps.recommended_max_memory()
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and limit.read_text().strip().isdigit():
        there = min(there, int(limit.read_text()))
    return there // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def checkpoints(knobs: dict) -> int:
    """Returns how many checkpoints a run leaves, at most."""
    end = knobs["max_steps"] + 1
    saved = {knobs["max_steps"], *range(0, end, knobs["save_every"]), *range(0, end, knobs["eval_every"])} - {0}
    if not knobs["keep_last"]:
        return len(saved)
    kept = knobs["keep_last"] + 1  # and the best
    if knobs["keep_every"]:
        kept += knobs["max_steps"] // knobs["keep_every"]
    return min(kept, len(saved))


def time_steps(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    stage,
    reshard: bool,
    autocast: AbstractContextManager,
    most_seconds: float = MOST_SECONDS,
) -> list[float]:
    """Returns the seconds of the first steps, the first of which compiles. ValueError as soon as they take too long."""
    begin = time.perf_counter()
    seconds = []
    for step in range(STEPS):
        started = time.perf_counter()
        batches = list(stage.loader.batches(step))
        for i, (x, y) in enumerate(batches):
            with processes.backward_of(net, i == len(batches) - 1, reshard):
                with autocast:
                    loss = loss_of(net, x, y, stage)
                loss.backward()
            took = max(processes.gather(time.perf_counter() - begin))  # that all give up together
            if took > most_seconds:
                raise ValueError(
                    f"{len(seconds)} steps and a part of one took {took:.0f} s, and {STEPS} may take "
                    f"{most_seconds:.0f} s: try a smaller model, batch_tokens or block_size"
                )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def line(seconds: list[float], max_steps: int) -> str:
    """Returns what the steps took, and how long a run of max_steps would take at the pace of the last one."""
    each = ", ".join(f"{taken:.2f}" for taken in seconds)
    minutes = max_steps * seconds[-1] / 60
    return (
        f"{len(seconds)} steps took {each} s: {max_steps} take about {minutes:.1f} minutes, and evaluations and saves"
    )


def loss_of(net, x, y, stage):
    if stage.is_uneven:
        losses, auxiliary = net(x, y, per_token=True)
        return losses.sum() + auxiliary
    return net(x, y)
