"""What keeps a run safe: from knobs that cannot be meant, another run in its folder, ranks that differ, and leaks."""

import errno
import fcntl
import hashlib
import os
import resource
import shlex
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import record
import sharding

DIVERGED = 3  # the exit code of a run that gave up after too many steps without a finite gradient
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what a disk says that has none


CHOICES = {"parallel": "auto none ddp fsdp", "dtype": "auto bfloat16 float16 float32", "compile": "auto True False",
           "resume": "auto True False", "schedule": "cosine wsd constant", "decay_shape": "linear cosine sqrt",
           "optimizer": "muon adamw", "muon_dtype": "auto bfloat16 float32",
           "muon_polynomial": "polar_express quintic", "wandb": " online offline"}  # fmt: skip
AT_LEAST = {1: "max_steps batch_tokens micro_batch block_size muon_steps max_skipped eval_every save_every log_every "
               "timeout",
            0: "seed vocab_size warmup_steps lr_batch_tokens grad_clip eval_tokens keep_last keep_every"}  # fmt: skip


def check_knobs(config: dict, world_size: int) -> None:
    """ValueError where a knob of train.py has a value that cannot be meant, alone or with so many processes."""
    for key, allowed in CHOICES.items():
        if str(config[key]) not in allowed.split(" "):
            raise ValueError(f"{key}={config[key]}: try one of {', '.join(allowed.split())}")
    for least, keys in AT_LEAST.items():
        for key in keys.split():
            if config[key] < least:
                raise ValueError(f"{key}={config[key]}: try {least} or more")
    for package in ("wandb", "tensorboard"):
        if config[package] and not find_spec(package):
            raise ValueError(f"{package}={config[package]}, but this package is not here:  pip install {package}")
    parallel = config["parallel"]
    if world_size > 1 and parallel == "none":
        raise ValueError(f"parallel=none, but torchrun started {world_size} processes: try parallel=ddp")
    if parallel in ("ddp", "fsdp") and "RANK" not in os.environ:
        launch = f"torchrun --standalone --nproc_per_node=2 {shlex.join(sys.argv)}"
        raise ValueError(f"parallel={parallel} is for processes that torchrun starts:  {launch}")
    if parallel != "fsdp" and (config["cpu_offload"] or not config["reshard"]):
        raise ValueError(f"cpu_offload=True and reshard=False are for parallel=fsdp, and this is parallel={parallel}")
    if config["overwrite"] and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ValueError("--overwrite would delete the run at each restart of --max-restarts: try --resume=auto")


def lock(out: Path):
    """Takes a run's folder until rank 0's process ends, in whatever way: the kernel gives a lock back, none is stale.

    ValueError, on every rank, where another run has it or nothing can be written. All ranks call it, and keep what it
    returns. Over hosts it holds where the disk passes flock on: NFS does, Lustre where it is mounted with -o flock.
    """
    file, refusal = None, ""
    try:
        if sharding.rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            file = open(out / ".lock", "a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(f"WARNING: this disk has no locks: nothing keeps a second run out of {out}", file=sys.stderr)
            os.register_at_fork(after_in_child=file.close)  # or a child would hold it longer than this process lives
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
    except BlockingIOError:
        file.seek(0)
        refusal = f"{out} is in use by {file.read()}: wait for that run, stop it, or choose another out_dir"
    except OSError as error:
        refusal = f"{out} cannot be written to ({error.strerror}): choose another out_dir"
    if refusal := sharding.gather(refusal)[0]:
        raise ValueError(refusal)
    return file


def check_ranks(**facts: dict) -> None:
    """ValueError, on every rank, where a rank's facts, {what: {key: value}}, are not those of rank 0."""
    first, *others = sharding.gather(facts)
    for rank, theirs in enumerate(others, 1):
        for what in first:
            a, b = first[what], theirs[what]
            if odd := [f"{key}={b.get(key)!r}, not {a.get(key)!r}" for key in {**a, **b} if a.get(key) != b.get(key)]:
                raise ValueError(f"rank {rank} has a different {what} than rank 0: {'; '.join(odd[:3])}")


def code_of(model: str) -> dict[str, str]:
    """What decides how a run computes: the version of torch, and a hash of each file of ours."""
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in record.source(model).items()}
    return {"torch": torch.__version__, **files}


def peak_gb(device_type: str) -> float:
    """The most that was in use so far: of the GPU's memory, or of this process's."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def resident_gb() -> float | None:
    """Memory that this process has at present: what grows over a run is a leak. None where the system has no /proc."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9 if status.exists() else None
