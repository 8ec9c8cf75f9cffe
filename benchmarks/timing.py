"""What bench.py measures with: clocks, memory, training steps.

What is compared runs in turn, in one process, after warming up; on a GPU, time ends when all that was queued is done.
"""

import importlib
import os
import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

import flops
import muon


def device_and_dtype(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """What train.py would take: the GPU if there is one, and bfloat16 on it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, dtype if dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"


def machine(device: str = "cpu") -> dict:
    """What it was measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x] if (
        cpuinfo.exists()
    ) else []  # fmt: skip
    cpu = names[0] if names else platform.processor() or platform.machine()
    found = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return found | ({"gpu": flops.device_name(device)} if device != "cpu" else {})


def begin(args: Namespace, device: str, words: list[str]) -> dict:
    """What every result begins with: the command, given as the words after bench.py, and the machine."""
    command = " ".join(["python bench.py", *words, f"--rounds {args.rounds}"])
    return {"command": command, "machine": machine(device), "rounds": args.rounds}


def describe(result: dict) -> str:
    m = result["machine"]
    gpu = f"{m['gpu']}; " if "gpu" in m else ""
    return f"{gpu}{m['cores']} x {m['cpu']}, {m['threads']} thread(s), torch {m['torch']}. `{result['command']}`\n"


def seconds(function: Callable, batch: tuple = (), times: int = 1, device: str = "cpu") -> float:
    """Seconds of one of so many calls in a row."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        function(*batch)
    wait()
    return (time.perf_counter() - begin) / times


def in_turn(functions: list[Callable], batch: tuple, rounds: int, times: int = 1, device: str = "cpu") -> list[list]:
    """Seconds of a call of each function, [rounds] for each: all of them are measured in every round.

    times: calls in a row, of which a round holds the mean.
    """
    for function in functions:
        for _ in range(2):  # compiles, and makes the optimizer's state
            function(*batch)
    took = [[] for _ in functions]
    for _ in range(rounds):
        for function, measured in zip(functions, took):
            measured.append(seconds(function, batch, times, device))
    return took


class TokenTimes:
    """Notes when tokens come: what transformers' generate calls a streamer. The first thing put is the prompt."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        tokens.cpu()  # on a GPU: waits for them
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def seconds(self) -> tuple[float, float]:
        """From the prompt to the first token, and from each token to the next one."""
        begin, first, *_, last = self.times
        return first - begin, (last - first) / (len(self.times) - 2)


def peak_memory(function: Callable, device: str = "cpu") -> int:
    """Bytes of tensors that a call has in use at most, beyond what was in use before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints a line at every start otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of a model's weights and buffers, and of an optimizer's state: what is in use between steps."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values() if optimizer else ():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors)


def bandwidth(device: str = "cpu") -> tuple[float, str]:
    """Bytes/s of memory and where the number is from: the data sheet, or a copy."""
    gpu = flops.known_gpu(flops.device_name(device))
    return (gpu[3], "data sheet") if gpu else (copy_bandwidth(device), "measured copy")


def copy_bandwidth(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes/s, read and written, of copies that fit no cache: the best of 10 times 10 in a row."""
    source = torch.randint(256, (megabytes * 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(target.copy_, (source,), 10, device) for _ in range(10))


def build(variant: str, fields: dict, device: str = "cpu") -> torch.nn.Module:
    torch.manual_seed(0)
    module = importlib.import_module(f"model_{variant}")
    return module.GPT(module.GPTConfig(**fields)).to(device)


def make_step(
    model: torch.nn.Module, optimizer=None, dtype: str = "float32", loss: Callable | None = None, micro_batch: int = 0
) -> Callable:
    """A function that does one training step of train.py on tokens x, y. loss(x, y): the model's, unless given.

    micro_batch: windows at once; 0: all.

    Without an optimizer it is forward and backward alone.
    """
    device, loss = next(model.parameters()).device.type, model if loss is None else loss

    def step(x, y):
        for part in zip(x.split(micro_batch or len(x)), y.split(micro_batch or len(y))):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                value = loss(*part)
            value.backward()
        if optimizer:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if hasattr(model, "after_step"):
            model.after_step()

    return step


def training_step(model: str, fields: dict, knobs: dict, device: str = "cpu") -> Callable:
    """Returns the training step of a run with these knobs of train.py: in its dtype, and compiled where the run is."""
    names = ("optimizer", "learning_rate", "weight_decay", "beta1", "beta2", "muon_momentum", "muon_steps")
    options = {key: knobs[key] for key in names}
    options["muon_dtype"] = None
    if knobs["muon_dtype"] != "auto":
        options["muon_dtype"] = getattr(torch, knobs["muon_dtype"])
    gpt = build(model, fields, device)
    optimizer = muon.make_optimizer(gpt, **options)
    compiled = knobs["compile"]
    if compiled == "auto":
        compiled = device.startswith("cuda")
    loss = torch.compile(gpt) if compiled else gpt
    _, dtype = device_and_dtype(device, knobs["dtype"])
    return make_step(gpt, optimizer, dtype, loss, knobs["micro_batch"])


def random_batch(windows: int, length: int, vocab_size: int = 66, device: str = "cpu") -> tuple:
    """Tokens and targets, (windows, length) each, the same ones every time."""
    tokens = torch.randint(vocab_size, (windows, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def middle(values: list[float], form: Callable = "{:.2f}".format) -> str:
    """Their median, and their range: 3.10 (2.95 to 3.40)."""
    return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"


def ratios(first: list[float], second: list[float]) -> list[float]:
    """first / second, round by round: how many times as fast the second is."""
    return [a / b for a, b in zip(first, second)]
