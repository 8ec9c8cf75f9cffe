"""Compiles kernels for compute capability 9.0 on a machine without a GPU, and reports what ptxas made of them.

    python -m tests.hopper        writes results/kernels_hopper.md: registers, spills, shared memory, tensor cores

Triton compiles what a launch asks for, with the launch's own types, alignments and constants; only the launch itself
is left out. What the functions called here return was therefore never written. Not to be run with TRITON_INTERPRET=1.
"""

import ast
import hashlib
import inspect
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import kernels
import kernels_delta

RESULT = Path(__file__).resolve().parent.parent / "results/kernels_hopper.md"
FIELDS = ("operation", "variant", "name", "registers", "spills", "shared", "wgmma", "mma")  # of a row
SHARED = 227 * 1024  # bytes of shared memory that one program can have


class Hopper:
    """As much of a driver as compiling needs."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiling():
    """Within it, launches compile for Hopper instead of running; yields the list of what was compiled."""
    compiled, run = [], JITFunction.run
    driver.set_active(Hopper())

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if all(kernel is not other for other in compiled):
            compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def usage(kernel):
    """{name, registers, spills (bytes of stack), shared (bytes), wgmma, mma (counts of instructions)} of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(field.split(":") for field in printed.split() if field.count(":") == 1 and field.split(":")[1])
    ptx = kernel.asm["ptx"]
    counts = {"wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync")}
    return {
        "name": kernel.metadata.name,
        "registers": int(fields["REG"]),
        "spills": int(fields["STACK"]) + int(fields.get("LOCAL", 0)),
        "shared": kernel.metadata.shared,
    } | counts


def operations():
    """(operation, variant, arguments) of every kernel, at real widths and few tokens."""
    bf16, fp32 = torch.bfloat16, torch.float32

    def new(*shape, dtype=bf16):
        return torch.zeros(shape, dtype=dtype)

    def heads(*counts, D=128, T=2048, dtype=bf16):  # (B, heads, T, D)
        return [new(1, T, n, D, dtype=dtype).transpose(1, 2) for n in counts]

    angles, start = new(256, 1, 64, dtype=fp32), torch.zeros(1, 2048, dtype=torch.int32)
    yield kernels.rms_norm, "", (new(64, 1024), new(1024), 1e-6)
    yield kernels.add_rms_norm, "", (new(64, 1024), new(64, 1024), new(1024), 1e-6)
    yield kernels.rope, "", (new(1, 256, 16, 128), angles, angles)
    yield kernels.norm_rope, "", (new(1, 256, 16, 128), new(128), 1e-6, angles, angles)
    yield kernels.swiglu, "", (new(64, 3072), new(64, 3072))
    for D in (128, 64):
        for variant, options in (("", ()), (", window", (True, 1024)), (", documents", (True, 0, start))):
            yield kernels.flash_attention, f"D {D}{variant}", (*heads(16, 8, 8, D=D), *options)
    yield kernels.linear_cross_entropy, "", (new(16, 64), new(151936, 64), torch.zeros(16, dtype=torch.long))
    experts, weights = torch.zeros(64, 8, dtype=torch.long), [new(2, 2048, 768), new(2, 2048, 768), new(2, 768, 2048)]
    yield kernels.moe, "", (new(64, 2048), *weights, experts, new(64, 8, dtype=fp32))
    gates, first = [new(1, 16, 256, dtype=fp32) for _ in range(2)], torch.zeros(1, 1, 256, dtype=torch.bool)
    for dtype, variant in ((bf16, ""), (fp32, "fp32 as TF32")):
        qkv = heads(16, 16, 16, T=256, dtype=dtype)
        yield kernels_delta.gated_delta_rule, variant, (*qkv, *gates, first, new(1, 16, 128, 128, dtype=fp32))


def report():
    """`usage` of what each operation compiles, forward and backward."""
    rows, runs = [], {"runs": lambda *_, **__: True}
    torch.set_float32_matmul_precision("high")  # as train.py on CUDA
    with mock.patch.multiple(kernels, **runs), mock.patch.multiple(kernels_delta, **runs), compiling() as compiled:
        for operation, variant, arguments in operations():
            before = len(compiled)
            moved = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
            outputs = operation(*moved)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = [x for x in moved if torch.is_tensor(x) and x.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.zeros_like(y) for y in outputs], allow_unused=True)
            names = {"operation": operation.__name__, "variant": variant}
            rows += [names | usage(kernel) for kernel in compiled[before:]]
    return rows


def digest() -> str:
    """Stands for all that decides what the compiler makes: code without its sentences, and Triton's version.

    The code is the kernels with their launches, and what is launched here.
    """
    sources = [Path(module.__file__).read_text() for module in (kernels, kernels_delta)]
    sources += [inspect.getsource(function) for function in (operations, report)]
    trees = [ast.parse(source) for source in sources]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            del node.body[0]
    code = "\n".join([triton.__version__, *map(ast.unparse, trees)])
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def rows_of(text: str) -> list[dict]:
    """The rows that `table` has drawn a text from."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == len(FIELDS) and cells[-1].isdigit():
            values = [int(cell) if cell.isdigit() else cell for cell in cells]
            rows.append(dict(zip(FIELDS, values)))
    return rows


def table(rows):
    lines = [
        "# What the compiler makes of the kernels for Hopper\n",
        f"`python -m tests.hopper`, triton {triton.__version__}, compute capability 9.0, bf16: registers of a thread, "
        f"bytes spilled, bytes of shared memory of a program (of {SHARED:,}), instructions for tensor cores. Compiled "
        "without a GPU and never run: how fast the kernels are is not measured yet. `python bench.py kernels` measures "
        "it on a CUDA device and writes results/kernels_cuda.md.\n",
        f"Digest of the sources: {digest()}\n",
        "| operation | variant | kernel | registers | spilled | shared | wgmma | mma |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [f"| {' | '.join(str(x) for x in row.values())} |" for row in rows]) + "\n"


if __name__ == "__main__":  # --json: what a test reads
    rows = report()
    if sys.argv[1:] != ["--json"]:
        RESULT.write_text(table(rows))
    print(json.dumps(rows) if sys.argv[1:] == ["--json"] else table(rows))
