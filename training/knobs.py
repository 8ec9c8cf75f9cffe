"""What configurator.py cannot know of train.py's knobs: how they go together, and with the machine."""

import math
import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from operator import not_

import torch

from distributed import processes


def one_of(*words):
    return lambda value: value in words


def lacks(letters):
    return lambda pattern: not set(pattern) & set(letters)


# A knob, the value with which it is off, and another knob, with those values of that for which the first does nothing.
# Not here: the size of a part that another knob leaves out, and what belongs to a choice of optimizer or schedule that
# is not taken. A config file has these for the choice that it makes, and a comparison changes that choice alone. Nor
# moe_every beside moe_layers: a model that was built has both.
IDLE = (
    # fields of models
    ("rope_factor", 1.0, "rope_scaling", one_of("none")),
    ("rope_original", 0, "rope_scaling", one_of("none", "linear")),
    ("rope_scaling", "none", "rope_factor", one_of(1.0)),
    ("rope_scaling", "none", "layer_pattern", lacks("a")),
    ("qkv_gates", "", "layer_pattern", lacks("a")),
    ("output_gate", "element", "layer_pattern", lacks("a")),
    ("gate_activation", "sigmoid", "layer_pattern", lacks("a")),
    ("gate_activation", "sigmoid", "output_gate", one_of("none")),
    ("rotary_fraction", 0.25, "layer_pattern", lacks("a")),
    ("decay", "channel", "layer_pattern", lacks("k")),
    ("n_global_token", 0, "layer_pattern", lacks("lm")),
    ("shared_gate", False, "n_shared_expert", not_),
    ("drop_by", "position", "capacity_factor", not_),
    ("balance_over", "sequence", "balance_loss", not_),
    # knobs of train.py
    ("document_start_probability", 0.0, "pack", one_of("documents")),
    ("decay_with_lr", True, "weight_decay", not_),
    ("cautious_decay", False, "weight_decay", not_),
    ("keep_every", 0, "keep_last", not_),
    # of post-training
    ("scale_rewards", "group", "teacher", bool),
    ("clip_low", 0.2, "loss_type", one_of("cispo")),
    ("think_budget", 0, "think", one_of("never")),
    ("label_smoothing", 0.0, "loss_type", one_of("ipo")),
    ("temperature", 1.0, "online", not_),
    ("reward_model", "", "rewards", not_),
    ("eval_samples", 0, "rewards", not_),
    ("eval_samples", 0, "eval_data", not_),
    ("eval_data", "", "best_of", not_),
)


def refuse_idle(config: dict) -> None:
    """Raises ValueError for a knob that does nothing while another one is as it is."""
    for knob, off, other, is_idle in IDLE:
        if knob in config and other in config and config[knob] != off and is_idle(config[other]):
            raise ValueError(
                f"{knob}={config[knob]} does nothing while {other}={config[other]}: change that, or give {knob}={off}"
            )


def check_run(config: dict) -> None:
    """Raises ValueError where the knobs of a run do not go together: what all commands that train have in common."""
    if not config["out_dir"]:
        raise ValueError("out_dir is empty, and a run needs a folder of its own: try out_dir=out/run")
    refuse_idle(config)
    if config["resume"] and config["overwrite"]:
        raise ValueError(f"resume goes on with what is in {config['out_dir']}, and overwrite deletes it: give one")
    for package in ("wandb", "tensorboard"):
        if config[package] and not find_spec(package):
            raise ValueError(f"{package}={config[package]}, but this package is not here:  pip install {package}")
    if config["wandb"] == "online" and processes.launched()[0] == 0:
        log_in_to_wandb()
    if config.get("online", 1) and config.get("group_size", 2) < 2:
        raise ValueError("group_size=1: an answer is compared with others to the same problem, so give 2 or more")
    for knob in ("problems_per_step", "problems_per_round", "pairs_per_step"):
        if config.get(knob, math.inf) < processes.launched()[1]:
            raise ValueError(f"{knob}={config[knob]} gives some processes nothing to do: raise it")
    if config.get("teacher") and (config["beta"] or config["loss_type"] == "gspo"):
        raise ValueError("with teacher each token has an A of its own, and no reference: no beta, no gspo")
    if config.get("rewards") == "" and not config.get("teacher"):
        raise ValueError("rewards is empty: give some, such as math:1, or a teacher")
    if config["overwrite"] and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ValueError("--overwrite would delete the run at each restart of --max-restarts: try --resume=auto")


def check(config: dict, world_size: int) -> None:
    """Raises ValueError where knobs of train.py do not go together, or not with so many processes."""
    check_run(config)
    if config["dry_run"] and config["eval_only"]:
        raise ValueError("dry_run counts what training would cost, and eval_only trains nothing: give one of them")
    for knob in ("dry_run", "eval_only"):
        if config[knob] and config["overwrite"]:
            raise ValueError(f"{knob} writes nothing, and overwrite deletes the run in {config['out_dir']}: drop one")
    if config["eval_only"] and config["sample_every"]:
        raise ValueError("eval_only takes no step after which sample_every could print: try sample.py")
    if config.get("n_expert_per_token") == 1 and config["normalize_gates"]:
        constant = "a single gate that is normalized is always 1, and the router learns nothing from the loss"
        raise ValueError(f"n_expert_per_token=1: {constant}: give normalize_gates=False")
    parallel = config["parallel"]
    if world_size > 1 and parallel == "none":
        raise ValueError(f"parallel=none, but torchrun started {world_size} processes: try parallel=ddp")
    if parallel in ("ddp", "fsdp") and "RANK" not in os.environ:
        launch = f"torchrun --standalone --nproc_per_node=2 {shlex.join(sys.argv)}"
        raise ValueError(f"parallel={parallel} is for processes that torchrun starts:  {launch}")
    if parallel != "fsdp" and (config["cpu_offload"] or not config["reshard"]):
        raise ValueError(f"cpu_offload=True and reshard=False are for parallel=fsdp, and this is parallel={parallel}")


def log_in_to_wandb() -> None:
    """Raises ValueError where Weights & Biases lets nobody in: to be known before a folder is deleted or begun."""
    import wandb

    try:
        has_key = wandb.login()
    except Exception as error:  # theirs, of any kind
        reason = " ".join(str(error).split())
        raise ValueError(f"wandb=online: {reason}: try wandb=offline") from error
    if not has_key:
        raise ValueError("wandb=online, and there is no key: get one with  wandb login  or try wandb=offline")


def minutes_or_steps(minutes: float, argv: list[str]) -> float:
    """Returns minutes, or 0 where the command line gives max_steps: that beats the minutes of a config file."""
    given = {word.partition("=")[0] for word in argv}
    if "--max_steps" not in given:
        return minutes
    if "--minutes" in given and minutes:
        raise ValueError("--minutes measures max_steps: give one of them")
    return 0.0


def find_device(name: str) -> str:
    """Returns the device of this name; auto is the first of cuda, mps and cpu that is there. ValueError without it."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        if torch.backends.mps.is_available():
            return "mps"
        return "cpu"
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device={name} is none of cuda, cuda:1, mps and cpu: try device=auto")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"device={name} is not here: try device=cpu or device=auto ({reason})") from None
    return name


def find_dtype(name: str, device: str) -> str:
    """Returns the name of the dtype to compute in; auto is the best that the device is fast at."""
    if name != "auto":
        return name
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def why_not_compiled(device: str) -> str:
    """Says what torch.compile lacks here; "" where it can work."""
    if device.startswith("cuda") and not find_spec("triton"):
        return "triton is not installed"
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl", os.environ.get("CXX", ""))):
        return "there is no C++ compiler"
    return ""


def windows_of_a_step(batch_tokens: int, block_size: int, world_size: int) -> int:
    """Returns how many windows a step has. ValueError where they do not share out evenly, with sizes that do."""
    unit = block_size * world_size
    if batch_tokens % unit:
        below = max(batch_tokens // unit, 1) * unit
        above = -(-batch_tokens // unit) * unit
        near = " or ".join(str(size) for size in sorted({below, above}))
        raise ValueError(
            f"batch_tokens={batch_tokens} is not a multiple of block_size={block_size} times {world_size} processes: "
            f"try {near}"
        )
    return batch_tokens // block_size
