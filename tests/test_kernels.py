"""kernels.py as a whole: what the compiler makes of it, and where kernels do not run."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton

import kernels
from tests import hopper
from tests.kernel_checks import kernels_run  # noqa: F401
from tests.tiny import ROOT

MATRIX = {"flash_attention", "moe", "gated_delta_rule"}  # with matmuls of their own


def run(*arguments, cwd=ROOT, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def compiled_for_hopper():
    """What the compiler makes of every kernel: a minute's work."""
    printed = run("-m", "tests.hopper", "--json")
    assert printed.returncode == 0, printed.stderr[-2000:]
    return json.loads(printed.stdout)


for_this_compiler = pytest.mark.skipif(triton.__version__ != "3.7.1", reason="the committed table is of triton 3.7.1")


@for_this_compiler
def test_every_kernel_compiles_for_hopper_without_spills_and_the_matrix_kernels_use_its_tensor_cores():
    """By the committed table where it is of these sources; else they are compiled, and the table has to be new."""
    written = hopper.RESULT.read_text()
    rows = hopper.rows_of(written) if hopper.digest() in written else compiled_for_hopper()
    assert {row["operation"] for row in rows} == {operation.__name__ for operation, *_ in hopper.operations()}
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= hopper.SHARED, row
    for name in MATRIX:
        assert all(row["wgmma"] + row["mma"] for row in rows if row["operation"] == name and "_kernel" in row["name"])
    assert written == hopper.table(rows), "python -m tests.hopper writes it"


@for_this_compiler
@pytest.mark.slow
def test_the_committed_table_for_hopper_is_what_the_compiler_makes():
    assert hopper.RESULT.read_text() == hopper.table(compiled_for_hopper())


def test_a_copy_in_an_empty_folder_runs_without_triton_and_says_so_once(tmp_path):
    shutil.copy(ROOT / "kernels.py", tmp_path)
    (tmp_path / "triton.py").write_text("raise ImportError")
    code = "import torch, kernels; x = torch.ones(2, 8); [kernels.swiglu(x, x) for _ in range(3)]; print('ran')"
    ran = run("-c", code, cwd=tmp_path)
    assert ran.stdout == "ran\n" and ran.stderr == "kernels.swiglu: Triton is not installed: PyTorch instead\n"


def test_a_gpu_with_less_shared_memory_than_hoppers_runs_the_twin(monkeypatch, capsys):
    properties = SimpleNamespace(shared_memory_per_block_optin=163 * 1024)
    monkeypatch.undo()  # of what forbids it
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    assert not kernels.runs("moe", on_gpu) and "less shared memory than an H100" in capsys.readouterr().err
    properties.shared_memory_per_block_optin = 227 * 1024
    assert kernels.runs("moe", on_gpu)


def test_on_a_cpu_the_twin_runs_also_when_compiled():
    code = (
        "import torch, kernels; x = torch.ones(2, 8)\n"
        "compiled = torch.compile(kernels.swiglu, fullgraph=True, backend='eager')\n"
        "print(torch.equal(compiled(x, x), kernels.swiglu_ref(x, x)))"
    )
    ran = run("-c", code)
    assert ran.stdout == "True\n" and ran.stderr.count("no kernel for device cpu: PyTorch instead") == 1
