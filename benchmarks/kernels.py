"""`python bench.py kernels`: every kernel of kernels.py against PyTorch, torch.compile and what else is installed."""

import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch

import kernels
import kernels_delta
from benchmarks.kernel_cases import cases
from benchmarks.timing import (
    copy_bandwidth,
    describe,
    device_and_dtype,
    in_turn,
    median_and_range,
    new_result,
    peak_memory,
    seconds,
    table_row,
    times_as_fast,
)

RESULT = "kernels"
CALLS = 10  # in a row, of which a round holds the mean
FEWER_TOKENS = 8  # errors are measured on so many times fewer tokens: the truth in fp64 is dear
MATMUL_SIZE = 8192  # rows and columns of the matmul that sets the ceiling of FLOPs


def measure(args: Namespace) -> Iterator[dict]:
    """Yields one result: what a copy and a large matmul reach, and of each kernel its errors and times."""
    device, dtype_name = device_and_dtype(args.device)
    dtype = getattr(torch, dtype_name)
    if not device.startswith("cuda") and not kernels.INTERPRETED:
        print("error: kernels are measured on a CUDA device, and there is none", file=sys.stderr)
        sys.exit(2)
    result = new_result(["kernels"], args.rounds, device)
    result |= {"dtype": dtype_name, "times": CALLS, "cases": []}
    result["copy"] = copy_bandwidth(device)
    result["matmul"] = matmul_flops(device, dtype)
    for case in cases(device, dtype):
        print(f"{case.name} {case.size}...", file=sys.stderr)
        try:
            result["cases"].append(measure_case(case, args.rounds, device))
        except Exception as reason:  # the kernel itself: what the others measured is not lost
            print(f"{case.name} {case.size} failed: {reason}", file=sys.stderr)
    yield result


def matmul_flops(device, dtype):
    """Returns the FLOP/s of a large matmul, the best of 5 times 10 in a row."""
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    fastest = min(seconds(torch.matmul, (a, a), 10, device) for _ in range(5))
    return 2 * MATMUL_SIZE**3 / fastest


# ---- one kernel -----------------------------------------------------------------------------------------------------
def measure_case(case, rounds, device):
    """Returns a row for each that can do it. Forward alone keeps nothing for a backward."""
    torch._dynamo.reset()
    kernel, twin = kernel_and_twin(case)
    runs = {"kernel": kernel, "eager": twin}
    if case.compiled:
        runs["compiled"] = torch.compile(twin, dynamic=False)
    runs |= case.others
    arguments, leaves = with_leaves(case, case.arguments(1))
    dy = [torch.randn_like(y) for y in outputs_of(kernel, arguments)]

    # 1. errors and memory, and who can do it at all
    rows = {}
    forward = {}
    both = {}
    for name, function in runs.items():
        once = partial(forward_backward, function, arguments, leaves, dy)
        try:
            worst = error(case, function)
            once()  # compiles
            rows[name] = {"error": worst, "peak_bytes": peak_memory(once, device)}
        except Exception as reason:  # no room for it, or a library that does not take this: the others go on
            text = str(reason) or repr(reason)
            rows[name] = {"failed": text.splitlines()[0]}
            continue
        forward[name] = partial(without_gradients, function, arguments)
        both[name] = once

    # 2. times, of those in turn
    for key, functions in {"forward": forward, "both": both}.items():
        took = in_turn(list(functions.values()), (), rounds, CALLS, device)
        for name, measured in zip(functions, took):
            rows[name][key] = [round(s, 8) for s in measured]
    return {"name": case.name, "size": case.size, "unit": case.unit, "work": case.work, "rows": rows}


def kernel_and_twin(case):
    module = kernels if hasattr(kernels, case.name) else kernels_delta
    return getattr(module, case.name), getattr(module, f"{case.name}_ref")


def with_leaves(case, arguments, dtype=None):
    """Returns the arguments with their floating tensors as leaves (in dtype), and these leaves alone."""
    last = len(arguments) - case.fixed
    moved = []
    leaves = []
    for i, x in enumerate(arguments):
        if torch.is_tensor(x) and x.is_floating_point():
            x = x.detach().to(dtype or x.dtype)
            if i < last:
                leaves.append(x.requires_grad_())
        moved.append(x)
    return moved, leaves


def outputs_of(function, arguments):
    """Returns what a function returns as a tuple, also where that is a single tensor."""
    outputs = function(*arguments)
    if isinstance(outputs, tuple):
        return outputs
    return (outputs,)


@torch.no_grad()
def without_gradients(function, arguments):
    return function(*arguments)


def forward_backward(function, arguments, leaves, dy):
    """Returns outputs, and the gradients of leaves; None of those that the function does not differentiate."""
    outputs = outputs_of(function, arguments)
    dy = [d.to(y.dtype) for d, y in zip(dy, outputs)]
    gradients = torch.autograd.grad(outputs, leaves, dy, allow_unused=True)
    return *outputs, *gradients


def error(case, function):
    """Returns the largest ||x - truth|| / ||truth|| of outputs and gradients, where the truth is the twin in fp64."""
    _, twin = kernel_and_twin(case)
    torch.manual_seed(0)
    arguments, leaves = with_leaves(case, case.arguments(FEWER_TOKENS))
    dy = [torch.randn_like(y) for y in outputs_of(twin, arguments)]
    exact_arguments, exact_leaves = with_leaves(case, arguments, torch.float64)
    truth = forward_backward(twin, exact_arguments, exact_leaves, dy)
    found = forward_backward(function, arguments, leaves, dy)
    errors = []
    for x, exact in zip(found, truth):
        if x is not None:
            error_norm = (x.double() - exact).norm()
            errors.append((error_norm / exact.norm().clamp(min=1e-30)).item())
    return max(errors)


# ---- the tables -----------------------------------------------------------------------------------------------------
HEAD = [
    "| | forward ms | speed | share | x | forward and backward ms | speed | share | x | peak MB | error |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]


def markdown(result: dict) -> str:
    """Returns a table for each kernel and size."""
    lines = [
        "# Kernels\n",
        describe(result),
        f"In {result['dtype']}; {result['rounds']} rounds in which all take turns, {result['times']} calls each; "
        "medians and ranges of milliseconds. Speed: the bytes or FLOPs that the operation must move or do in that "
        f"time; share: of what a copy ({result['copy'] / 1e9:,.0f} GB/s) or a large matmul "
        f"({result['matmul'] / 1e12:,.1f} TFLOP/s) reached in this run. x: how many times as fast the kernel is. "
        "Error: the largest relative one of outputs and gradients, against fp64, on "
        f"{FEWER_TOKENS} times fewer tokens.\n",
    ]
    for case in result["cases"]:
        lines += [f"## {case['name']}, {case['size']}\n", *HEAD]
        for name, row in case["rows"].items():
            if "failed" in row:
                lines.append(f"| {name} | {row['failed']}" + " |" * 10)
            else:
                lines.append(table_row([name, *cells_of(row, case, result)]))
        lines.append("")
    return "\n".join(lines)


def cells_of(row, case, result):
    cells = []
    for key, work in zip(("forward", "both"), case["work"]):
        speed = work / statistics.median(row[key])
        cells.append(median_and_range([1e3 * s for s in row[key]], "{:.3f}".format))
        if case["unit"] == "B":
            cells += [f"{speed / 1e9:,.1f} GB/s", f"{speed / result['copy']:.0%}"]
        else:
            cells += [f"{speed / 1e12:,.1f} TFLOP/s", f"{speed / result['matmul']:.0%}"]
        cells.append(times_as_fast(row[key], case["rows"]["kernel"].get(key)))
    cells.append(f"{row['peak_bytes'] / 1e6:,.1f}")
    cells.append(f"{row['error']:.1e}")
    return cells
