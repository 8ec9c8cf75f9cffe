"""What all benchmarks measure with: clocks, memory, training steps, and the words and cells of their tables.

What is compared runs in turn, in one process, after warming up; on a GPU, time ends when all that was queued is done.
"""

import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import flops
import muon
from training.knobs import find_device, find_dtype


# ---- where and on what ----------------------------------------------------------------------------------------------
def device_and_dtype(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """Returns what train.py would take."""
    device = find_device(device)
    return device, find_dtype(dtype, device)


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if "model name" in line:
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict:
    """Returns what a result was measured on."""
    found = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device != "cpu":
        found["gpu"] = flops.device_name(device)
    return found


def new_result(words: list[str], rounds: int, device: str) -> dict:
    """Returns what a result begins with: the command, given as the words after bench.py, the machine, the rounds."""
    command = " ".join(["python bench.py", *words, f"--rounds {rounds}"])
    return {"command": command, "machine": machine(device), "rounds": rounds}


def describe(result: dict) -> str:
    """Returns the line under a table's title: the machine and the command."""
    where = result["machine"]
    gpu = f"{where['gpu']}; " if "gpu" in where else ""
    cpu = f"{where['cores']} x {where['cpu']}, {where['threads']} thread(s)"
    return f"{gpu}{cpu}, torch {where['torch']}. `{result['command']}`\n"


# ---- clocks ---------------------------------------------------------------------------------------------------------
def wait_for(device):
    """Waits for all that was queued on a GPU; a CPU queues nothing."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(function: Callable, batch: tuple = (), times: int = 1, device: str = "cpu") -> float:
    """Returns the seconds of a call, as the mean of `times` calls in a row."""
    wait_for(device)
    started = time.perf_counter()
    for _ in range(times):
        function(*batch)
    wait_for(device)
    return (time.perf_counter() - started) / times


def in_turn(functions: list[Callable], batch: tuple, rounds: int, times: int = 1, device: str = "cpu") -> list[list]:
    """Returns the seconds of a call of each function, [rounds] for each: all of them are measured in every round.

    times: calls in a row, of which a round holds the mean.
    """
    for function in functions:
        for _ in range(2):  # the first call compiles and makes the optimizer's state; the second meets them made
            function(*batch)
    took = [[] for _ in functions]
    for _ in range(rounds):
        for function, measured in zip(functions, took):
            measured.append(seconds(function, batch, times, device))
    return took


class TokenTimes:
    """The times at which tokens come: what transformers' generate calls a streamer. The prompt is put first."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        tokens.cpu()  # on a GPU: waits for them
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def seconds(self) -> tuple[float, float]:
        """Returns the seconds from the prompt to the first token, and from each token to the next one."""
        prompt = self.times[0]
        first = self.times[1]
        last = self.times[-1]
        return first - prompt, (last - first) / (len(self.times) - 2)


# ---- memory ---------------------------------------------------------------------------------------------------------
def peak_memory(function: Callable, device: str = "cpu") -> int:
    """Returns the bytes of tensors that a call has in use at most, beyond what was in use before it."""
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
    events = profile.profiler.kineto_results.events()
    in_use = 0
    peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak


def resident_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Returns the bytes in use between steps: a model's weights and buffers, and an optimizer's state."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors)


def bandwidth(device: str = "cpu") -> tuple[float, str]:
    """Returns the bytes/s of memory, and where the number is from: the data sheet, or a copy."""
    gpu = flops.known_gpu(flops.device_name(device))
    if gpu:
        return gpu[3], "data sheet"
    return copy_bandwidth(device), "measured copy"


def copy_bandwidth(device: str = "cpu", megabytes: int = 256) -> float:
    """Returns the bytes/s, read and written, of copies that fit no cache: the best of 10 times 10 in a row."""
    source = torch.randint(256, (megabytes * 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = min(seconds(target.copy_, (source,), 10, device) for _ in range(10))
    return 2 * source.nbytes / fastest


# ---- models and their steps -----------------------------------------------------------------------------------------
def build(variant: str, fields: dict, device: str = "cpu") -> torch.nn.Module:
    """Returns model_<variant>.py's model with these fields of GPTConfig; its weights are the same ones every time."""
    torch.manual_seed(0)
    module = importlib.import_module(f"model_{variant}")
    config = module.GPTConfig(**fields)
    return module.GPT(config).to(device)


def count_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make_step(
    model: torch.nn.Module, optimizer=None, dtype: str = "float32", loss: Callable | None = None, micro_batch: int = 0
) -> Callable:
    """Returns a function that does one training step of train.py on tokens and targets x, y (windows, length).

    Without an optimizer it is forward and backward alone. loss(x, y): the model itself, unless given.
    micro_batch: windows at once; 0: all.
    """
    device = next(model.parameters()).device.type
    if loss is None:
        loss = model

    def step(x, y):
        windows = micro_batch or len(x)
        for some_x, some_y in zip(x.split(windows), y.split(windows)):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                value = loss(some_x, some_y)
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
    """Returns tokens and targets, (windows, length) each, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (windows, length + 1), generator=generator).to(device)
    x = tokens[:, :-1].contiguous()  # (windows, length)
    y = tokens[:, 1:].contiguous()  # (windows, length)
    return x, y


# ---- the cells of a table -------------------------------------------------------------------------------------------
def table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_head(cells: Sequence[str]) -> list[str]:
    """Returns the two lines that begin a table."""
    return [table_row(cells), "|" + "---|" * len(cells)]


def median_and_range(values: list[float], form: Callable = "{:.2f}".format) -> str:
    """Returns the median of values with their range: 3.10 (2.95 to 3.40)."""
    middle = form(statistics.median(values))
    return f"{middle} ({form(min(values))} to {form(max(values))})"


def ratios(first: list[float], second: list[float]) -> list[float]:
    """Returns first / second, round by round: how many times as fast the second is."""
    return [a / b for a, b in zip(first, second)]


def times_as_fast(first: list[float] | None, second: list[float] | None) -> str:
    """Returns how many times as fast the second is, by the median of the rounds; n/a where one was not measured."""
    if first is None or second is None:
        return "n/a"
    return f"{statistics.median(ratios(first, second)):.2f}"
