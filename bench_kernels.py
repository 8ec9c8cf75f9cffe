"""`python bench.py kernels`: every kernel of kernels.py against PyTorch, torch.compile and what else is installed."""

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
import kernels_delta
from timing import begin, copy_bandwidth, describe, device_and_dtype, in_turn, middle, peak_memory, ratios, seconds

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


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    b, eps = dtype.itemsize, 1e-6
    liger = import_module("liger_kernel.transformers.functional") if find_spec("liger_kernel") else None
    fla = import_module("fla.ops.gated_delta_rule") if find_spec("fla") else None

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
        (2 * numbers * b, 5 * numbers * b),
    )  # fmt: skip
    rows = N // 2
    yield Case(
        "swiglu", f"{rows:,} x {width:,}", lambda s: (new(rows // s, width), new(rows // s, width)), "B",
        (3 * rows * width * b, 8 * rows * width * b), {"Liger": liger.liger_swiglu} if liger else {},
    )  # fmt: skip
    for B, H, G, T, D, window in SIZES["attention"]:
        yield attention(new, B, H, G, T, D, window)
    N, C, V = SIZES["loss"]
    chunked = getattr(F, "linear_cross_entropy", None)
    yield Case(
        "linear_cross_entropy", f"{N:,} x {C:,} x {V:,}",
        lambda s, N=N, C=C: (new(N // s, C), new(V, C, scale=C**-0.5), torch.randint(V, (N // s,), device=device)),
        "FLOP", (6 * N * C * V, 6 * N * C * V),  # its forward computes the gradients too
        ({"F.linear_cross_entropy": chunked} if chunked else {})
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
        q, k = (F.normalize(new(B, T // s, H, D).float(), dim=-1).to(new(1).dtype) for _ in range(2))
        q, k, v = (x.transpose(1, 2) for x in (q * D**-0.5, k, new(B, T // s, H, D)))  # (B, H, T, D)
        decay, beta = (F.logsigmoid(new(B, H, T // s).float() + 3), torch.rand(B, H, T // s, device=device))
        first = torch.zeros(1, 1, T // s, dtype=torch.bool, device=device)
        return q, k, v, decay, beta, first, torch.zeros(B, H, D, D, device=device)

    def theirs(q, k, v, decay, beta, first, state):
        q, k, v, decay, beta = (x.transpose(1, 2) for x in (q, k, v, decay, beta))  # theirs are (B, T, H, D)
        y, state = fla.chunk_gated_delta_rule(q, k, v, decay, beta, 1.0, state, True)
        return y.transpose(1, 2), state

    others = {"flash-linear-attention": theirs} if fla else {}
    size, compiled = f"{B} x {T:,}, {H} heads of {D}", T <= 8192  # its loop over chunks is unrolled: minutes
    return Case("gated_delta_rule", size, arguments, "FLOP", (flops, 3.5 * flops), others, compiled)


def pair(case):
    module = kernels if hasattr(kernels, case.name) else kernels_delta
    return getattr(module, case.name), getattr(module, case.name + "_ref")


def leaves_of(arguments, dtype=None):
    """The arguments, with floating tensors as leaves (in dtype), and these leaves alone."""
    moved = [
        x.detach().to(dtype or x.dtype).requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for x in arguments
    ]
    return moved, [x for x in moved if torch.is_tensor(x) and x.requires_grad]


def outputs_of(function, arguments):
    outputs = function(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def forward_backward(function, arguments, leaves, dy):
    """Outputs, and the gradients of leaves; None of those that the function does not differentiate."""
    outputs = outputs_of(function, arguments)
    return *outputs, *torch.autograd.grad(
        outputs, leaves, [d.to(y.dtype) for d, y in zip(dy, outputs)], allow_unused=True
    )


def errors(case):
    """Of kernel and twin, against the twin in fp64: the largest ||x - truth|| / ||truth|| of outputs and gradients."""
    arguments, leaves = leaves_of(case.arguments(SIZES["checked"]))
    kernel, twin = pair(case)
    dy = [torch.randn_like(y) for y in outputs_of(kernel, arguments)]
    truth = forward_backward(twin, *leaves_of(arguments, torch.float64), dy)
    found = []
    for function in (kernel, twin):
        got = forward_backward(function, arguments, leaves, dy)
        pairs = [(x, y) for x, y in zip(got, truth) if x is not None]
        found.append(max(((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in pairs))
    return found


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
        result["cases"].append(measure(case, args.rounds, device))
    return result


def measure(case, rounds, device):
    kernel, twin = pair(case)
    runs = (
        {"kernel": kernel, "eager": twin} | ({"compiled": torch.compile(twin)} if case.compiled else {}) | case.others
    )
    found = {"name": case.name, "size": case.size, "unit": case.unit, "work": case.work, "errors": errors(case)}
    arguments, leaves = leaves_of(case.arguments(1))
    dy, found["rows"], forward, both = [torch.randn_like(y) for y in outputs_of(kernel, arguments)], {}, {}, {}
    for name, function in runs.items():
        forward[name] = partial(function, *arguments)
        both[name] = partial(forward_backward, function, arguments, leaves, dy)
        try:
            both[name]()  # compiles
            found["rows"][name] = {"peak_bytes": peak_memory(both[name], device)}
        except RuntimeError as error:  # no room for it, or a backend that does not take this
            found["rows"][name] = {"error": str(error).splitlines()[0]}
            del forward[name], both[name]
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
        "reached in this run. x: how many times as fast the kernel is. Errors: the largest relative one of outputs and "
        "gradients, against fp64.\n",
    ]  # fmt: skip
    for case in result["cases"]:
        ours, theirs = (f"{x:.1e}" for x in case["errors"])
        lines += [
            f"## {case['name']}, {case['size']}\n",
            f"Error {ours}; PyTorch's {theirs}.\n",
            "| | forward ms | speed | share | x | forward and backward ms | speed | share | x | peak MB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        ceiling, scale, unit = (copy, 1e9, "GB/s") if case["unit"] == "B" else (matmul, 1e12, "TFLOP/s")
        for name, row in case["rows"].items():
            if "error" in row:
                lines.append(f"| {name} | {row['error']}" + " |" * 9)
                continue
            cells = [name]
            for key, work in zip(("forward", "both"), case["work"]):
                speed = work / statistics.median(row[key])
                times = statistics.median(ratios(row[key], case["rows"]["kernel"][key]))
                cells += [middle([1e3 * x for x in row[key]], "{:.3f}".format), f"{speed / scale:,.1f} {unit}",
                          f"{speed / ceiling:.0%}", f"{times:.2f}"]  # fmt: skip
            cells.append(f"{row['peak_bytes'] / 1e6:,.1f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
