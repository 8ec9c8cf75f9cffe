"""`python bench.py kernels`: every kernel of kernels.py against PyTorch, torch.compile and what else is installed."""

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
import kernels_delta
from benchmarks.timing import (
    begin,
    copy_bandwidth,
    describe,
    device_and_dtype,
    in_turn,
    middle,
    peak_memory,
    ratios,
    seconds,
)

# Sizes of Qwen3-0.6B (MoE: Qwen3-30B-A3B; delta rule: Qwen3-Next), so large that no cache holds them.
SIZES = {
    "rows": (131072, 1024, 3072),  # N, C, n_inner
    "heads": (4, 16384, 16, 128),  # B, T, H, D
    "attention": [(4, 16, 8, 4096, 128, 0), (4, 16, 8, 8192, 128, 0), (4, 16, 8, 16384, 128, 0),
                  (4, 16, 8, 16384, 128, 1024), (4, 16, 16, 8192, 64, 0)],  # B, H, G, T, D, window
    "loss": (8192, 1024, 151936),  # N, C, V
    "moe": (32768, 2048, 768, 128, 8),  # N, C, n_expert_inner, E, K
    "delta": [(1, 16, 8192, 128), (1, 64, 32768, 128)],  # B, H, T, D
    "matmul": 8192,  # rows and columns of the one that sets the ceiling
    "times": 10,  # calls in a row
    "checked": 8,  # errors are measured on so many times fewer tokens: the truth in fp64 is dear
}  # fmt: skip


@dataclass
class Case:
    """The kernel NAME and its twin NAME_ref on the same arguments, and others that compute the same from them."""

    name: str
    size: str
    arguments: Callable  # of how many times fewer tokens -> arguments
    unit: str  # what bounds it: "B" or "FLOP"
    work: tuple[float, float]  # bytes or FLOPs of forward, and of forward and backward
    others: dict[str, Callable] = field(default_factory=dict)
    compiled: bool = True  # measure torch.compile of the twin
    fixed: int = 0  # so many of the last arguments get no gradient


def installed(name):
    try:
        return import_module(name)
    except ImportError:
        return None


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    b, eps = dtype.itemsize, 1e-6
    liger, fla = (installed(name) for name in ("liger_kernel.transformers.functional", "fla.ops.gated_delta_rule"))

    def new(*shape, scale=1.0):  # random: on zeros a GPU runs faster
        return (torch.randn(shape, device=device) * scale).to(dtype)

    N, C, width = SIZES["rows"]
    yield Case(
        "rms_norm", f"{N:,} x {C:,}", lambda s: (new(N // s, C), new(C), eps), "B", (2 * N * C * b, 5 * N * C * b),
        {"Liger": lambda x, w, eps: liger.liger_rms_norm(x, w, eps, in_place=False)} if liger else {},
    )  # fmt: skip
    yield Case(
        "add_rms_norm", f"{N:,} x {C:,}", lambda s: (new(N // s, C), new(N // s, C), new(C), eps), "B",
        (4 * N * C * b, 8 * N * C * b),
        {"Liger": lambda x, r, w, eps: liger.liger_fused_add_rms_norm(x, r, w, eps, in_place=False)} if liger else {},
    )  # fmt: skip
    B, T, H, D = SIZES["heads"]
    size, numbers = f"{B} x {T:,} x {H} x {D}", B * T * H * D

    def rotation(s):
        angle = torch.arange(T // s, device=device)[:, None, None] / 1e4 ** (torch.arange(0, D, 2, device=device) / D)
        return angle.cos(), angle.sin()  # (T, 1, D / 2)

    yield Case("rope", size, lambda s: (new(B, T // s, H, D), *rotation(s)), "B", (2 * numbers * b, 4 * numbers * b))
    yield Case(
        "norm_rope", size, lambda s: (new(B, T // s, H, D), new(D), eps, *rotation(s)), "B",
        (2 * numbers * b, 5 * numbers * b), fixed=2,
    )  # fmt: skip
    rows = N // 2

    def copied(gate, up):  # its backward writes over both
        return liger.liger_swiglu(gate.clone(), up.clone())

    yield Case(
        "swiglu", f"{rows:,} x {width:,}", lambda s: (new(rows // s, width), new(rows // s, width)), "B",
        (3 * rows * width * b, 8 * rows * width * b), {"Liger, with copies": copied} if liger else {},
    )  # fmt: skip
    for B, H, G, T, D, window in SIZES["attention"]:
        yield attention(new, B, H, G, T, D, window)
    N, C, V = SIZES["loss"]
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # without them it is not chunked
    yield Case(
        "linear_cross_entropy", f"{N:,} x {C:,} x {V:,}",
        lambda s, N=N, C=C: (new(N // s, C), new(V, C, scale=C**-0.5), torch.randint(V, (N // s,), device=device)),
        "FLOP", (2 * N * C * V, 6 * N * C * V),
        ({"F.linear_cross_entropy": partial(F.linear_cross_entropy, options=options())} if options else {})
        | ({"Liger": liger.liger_fused_linear_cross_entropy} if liger else {}),
    )  # fmt: skip
    N, C, width, E, K = SIZES["moe"]
    weights = [(E, C, width), (E, C, width), (E, width, C)]

    def routed(s):
        scores = torch.rand(N // s, E, device=device)
        gates, experts = scores.topk(K)
        made = [new(*shape, scale=shape[1] ** -0.5) for shape in weights]
        return new(N // s, C), *made, experts, (gates / gates.sum(dim=-1, keepdim=True)).to(dtype)

    yield Case("moe", f"{N:,} x {C:,}, {K} of {E} experts {width} wide", routed, "FLOP",
               (6 * N * K * C * width, 18 * N * K * C * width))  # fmt: skip
    for B, H, T, D in SIZES["delta"]:
        yield delta(new, device, fla, B, H, T, D)
    yield delta(lambda *shape: new(*shape).float(), device, fla, B, H, T, D)  # as model_hybrid.py calls it


def attention(new, B, H, G, T, D, window):
    pairs = T * (T + 1) // 2 if not window else window * T - window * (window - 1) // 2
    forward, others = 4 * B * H * D * pairs, {}
    if not window:
        backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}

        def by(backend, q, k, v, causal, window):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)

        others = {name: partial(by, backend) for name, backend in backends.items()}
    size = f"{B} x {T:,}, {H} / {G} heads of {D}" + (f", window {window:,}" if window else "")

    def arguments(s):
        return *(new(B, T // s, n, D).transpose(1, 2) for n in (H, G, G)), True, window

    return Case("flash_attention", size, arguments, "FLOP", (forward, 3.5 * forward), others)


def delta(new, device, fla, B, H, T, D):
    flops = B * H * T * (6 * D * D + 2 * 64 * 5 * D)  # in chunks of 64 tokens

    def arguments(s):
        q, k = (F.normalize(new(B, T // s, H, D), dim=-1) for _ in range(2))
        q, k, v = (x.transpose(1, 2) for x in (q * D**-0.5, k, new(B, T // s, H, D)))  # (B, H, T, D)
        decay, beta = (F.logsigmoid(new(B, H, T // s).float() + 3), torch.rand(B, H, T // s, device=device))
        first = torch.zeros(1, 1, T // s, dtype=torch.bool, device=device)
        return q, k, v, decay, beta, first, torch.zeros(B, H, D, D, device=device)

    def theirs(q, k, v, decay, beta, first, state):
        q, k, v, decay, beta = (x.transpose(1, 2) for x in (q, k, v, decay, beta))  # theirs are (B, T, H, D)
        y, state = fla.chunk_gated_delta_rule(q, k, v, decay, beta, 1.0, state, True)
        return y.transpose(1, 2), state

    others = {"flash-linear-attention": theirs} if fla else {}
    size = f"{B} x {T:,}, {H} heads of {D}" + (", fp32" if new(1).dtype == torch.float32 else "")
    compiled = T <= 8192  # the twin's loop over chunks is unrolled, which takes minutes
    return Case("gated_delta_rule", size, arguments, "FLOP", (flops, 3.5 * flops), others, compiled)


def pair(case):
    module = kernels if hasattr(kernels, case.name) else kernels_delta
    return getattr(module, case.name), getattr(module, case.name + "_ref")


def leaves_of(case, arguments, dtype=None):
    """The arguments, with floating tensors as leaves (in dtype), and these leaves alone."""
    last, moved = len(arguments) - case.fixed, []
    for i, x in enumerate(arguments):
        floating = torch.is_tensor(x) and x.is_floating_point()
        moved.append(x.detach().to(dtype or x.dtype).requires_grad_(i < last) if floating else x)
    return moved, [x for x in moved if torch.is_tensor(x) and x.requires_grad]


def outputs_of(function, arguments):
    outputs = function(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def forward_backward(function, arguments, leaves, dy):
    """Outputs, and the gradients of leaves; None of those that the function does not differentiate."""
    outputs = outputs_of(function, arguments)
    dy = [d.to(y.dtype) for d, y in zip(dy, outputs)]
    return *outputs, *torch.autograd.grad(outputs, leaves, dy, allow_unused=True)


def error(case, function):
    """The largest ||x - truth|| / ||truth|| of outputs and gradients, where the truth is the twin in fp64."""
    torch.manual_seed(0)
    arguments, leaves = leaves_of(case, case.arguments(SIZES["checked"]))
    dy = [torch.randn_like(y) for y in outputs_of(pair(case)[1], arguments)]
    truth = forward_backward(pair(case)[1], *leaves_of(case, arguments, torch.float64), dy)
    got = forward_backward(function, arguments, leaves, dy)
    pairs = [(x, y) for x, y in zip(got, truth) if x is not None]
    return max(((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in pairs)


def bench_kernels(args):
    """Everything that `kernels_markdown` draws."""
    device, dtype = device_and_dtype(args.device)
    if not device.startswith("cuda") and not kernels.INTERPRETED:
        print("error: kernels are measured on a CUDA device, and there is none", file=sys.stderr)
        sys.exit(2)
    result = begin(args, device, ["kernels"]) | {"dtype": dtype, "times": SIZES["times"], "cases": []}
    result["copy"] = copy_bandwidth(device)
    a = torch.randn(SIZES["matmul"], SIZES["matmul"], device=device).to(getattr(torch, dtype))
    result["matmul"] = 2 * len(a) ** 3 / min(seconds(torch.matmul, (a, a), 10, device) for _ in range(5))
    for case in cases(device, getattr(torch, dtype)):
        print(f"{case.name} {case.size}...", file=sys.stderr)
        try:
            result["cases"].append(measure(case, args.rounds, device))
        except Exception as reason:  # the kernel itself: what the others measured is not lost
            print(f"{case.name} {case.size} failed: {reason}", file=sys.stderr)
    return result


def measure(case, rounds, device):
    """A row for each that can do it. Forward alone keeps nothing for a backward."""
    torch._dynamo.reset()
    kernel, twin = pair(case)
    runs = {"kernel": kernel, "eager": twin}
    runs |= ({"compiled": torch.compile(twin, dynamic=False)} if case.compiled else {}) | case.others
    found = {"name": case.name, "size": case.size, "unit": case.unit, "work": case.work, "rows": {}}
    arguments, leaves = leaves_of(case, case.arguments(1))
    dy, forward, both = [torch.randn_like(y) for y in outputs_of(kernel, arguments)], {}, {}
    for name, function in runs.items():
        once = partial(forward_backward, function, arguments, leaves, dy)
        try:
            row = {"error": error(case, function)}
            once()  # compiles
            row["peak_bytes"] = peak_memory(once, device)
        except Exception as reason:  # no room for it, or a library that does not take this: the others go on
            found["rows"][name] = {"failed": (str(reason) or repr(reason)).splitlines()[0]}
            continue
        found["rows"][name], forward[name], both[name] = row, torch.no_grad()(partial(function, *arguments)), once
    for key, functions in (("forward", forward), ("both", both)):
        took = in_turn(list(functions.values()), (), rounds, SIZES["times"], device)
        for name, measured in zip(functions, took):
            found["rows"][name][key] = [round(x, 8) for x in measured]
    return found


def kernels_markdown(result):
    copy, matmul = result["copy"], result["matmul"]
    lines = [
        "# Kernels\n",
        describe(result),
        f"In {result['dtype']}; {result['rounds']} rounds in which all take turns, {result['times']} calls each; "
        "medians and ranges of milliseconds. Speed: the bytes or FLOPs that the operation must move or do in that "
        f"time; share: of what a copy ({copy / 1e9:,.0f} GB/s) or a large matmul ({matmul / 1e12:,.1f} TFLOP/s) "
        "reached in this run. x: how many times as fast the kernel is. Error: the largest relative one of outputs and "
        f"gradients, against fp64, on {SIZES['checked']} times fewer tokens.\n",
    ]  # fmt: skip
    for case in result["cases"]:
        lines += [
            f"## {case['name']}, {case['size']}\n",
            "| | forward ms | speed | share | x | forward and backward ms | speed | share | x | peak MB | error |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        ceiling, scale, unit = (copy, 1e9, "GB/s") if case["unit"] == "B" else (matmul, 1e12, "TFLOP/s")
        for name, row in case["rows"].items():
            if "failed" in row:
                lines.append(f"| {name} | {row['failed']}" + " |" * 10)
                continue
            cells = [name]
            for key, work in zip(("forward", "both"), case["work"]):
                speed = work / statistics.median(row[key])
                ours = case["rows"]["kernel"].get(key)
                times = f"{statistics.median(ratios(row[key], ours)):.2f}" if ours else "n/a"
                cells += [middle([1e3 * x for x in row[key]], "{:.3f}".format), f"{speed / scale:,.1f} {unit}",
                          f"{speed / ceiling:.0%}", times]  # fmt: skip
            cells += [f"{row['peak_bytes'] / 1e6:,.1f}", f"{row['error']:.1e}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
