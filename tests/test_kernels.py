"""kernels.py as a whole: what the compiler makes of it, and models with the kernels installed."""

import copy
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
from tests import hopper, test_models
from tests.kernel_checks import kernels_run  # noqa: F401
from tests.tiny import EOT, MODELS, ROOT, build, tokens

# As small as the kernels go: heads of 16, where others are left to their twins.
SIZES = {name: {"n_embd": 64} if name == "gpt2" else {} if name == "mla" else {"head_dim": 16} for name in MODELS}
LINES = 900
MATRIX = {"flash_attention", "moe", "gated_delta_rule"}  # with matmuls of their own
SWAPPED = {
    "baseline": dict(rms_norm=5, norm_rope=4, flash_attention=2, swiglu=2, linear_cross_entropy=1),
    "gpt2": dict(flash_attention=2, linear_cross_entropy=1),
    "hybrid": dict(rms_norm=7, gated_delta_rule=1, flash_attention=1, swiglu=2, linear_cross_entropy=1),
    "mla": dict(rms_norm=9, rope=4, swiglu=2, linear_cross_entropy=1),
    "moe": dict(rms_norm=5, norm_rope=4, flash_attention=2, swiglu=1, moe=1, linear_cross_entropy=1),
}


def test_the_file_is_within_its_line_budget():
    assert len((ROOT / "kernels.py").read_text().splitlines()) <= LINES


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


# ---- installed in models ---------------------------------------------------------------------------------------------
def losses_and_gradients(model, net=None):
    x, y = tokens(2, 24), tokens(2, 24, seed=2)
    x[0, [5, 6]] = x[1, 20] = EOT
    y[0, :3] = -1
    loss = (model if net is None else net)(x, y)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def agree(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * max(1.0, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize("eot_id", [-1, EOT])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_with_kernels_are_those_without_eager_compiled_and_uninstalled(name, eot_id):
    model = build(name, eot_id=eot_id, **SIZES[name]).train()
    before = losses_and_gradients(model)
    names = list(model.state_dict())
    assert kernels.install(model) == SWAPPED[name] and list(model.state_dict()) == names
    with_kernels = losses_and_gradients(model)
    agree(with_kernels, before)
    assert not all(torch.equal(a, b) for a, b in zip(with_kernels, before))  # something else did compute them
    torch._dynamo.reset()
    agree(losses_and_gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True)), before)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    agree(losses_and_gradients(other), before)  # a copy has its own weights
    kernels.uninstall(other)
    assert all(torch.equal(a, b) for a, b in zip(losses_and_gradients(other), before))


def test_a_second_installation_is_refused_until_the_first_is_undone():
    model = build("baseline")
    kernels.install(model)
    with pytest.raises(ValueError, match="installed already"):
        kernels.install(model)
    kernels.uninstall(model)
    kernels.install(model)


@pytest.mark.parametrize(
    "name, options, without",
    [
        ("baseline", dict(logit_softcap=5.0), "linear_cross_entropy"),
        ("baseline", dict(qk_norm=False), "norm_rope"),
        ("hybrid", dict(qkv_gates="q", rotary_fraction=1.0), "norm_rope"),
    ],
)
def test_what_a_config_does_otherwise_is_left_alone(name, options, without):
    model = build(name, **SIZES[name] | options).train()
    before = losses_and_gradients(model)
    swapped = kernels.install(model)
    assert without not in swapped and swapped["flash_attention"]
    agree(losses_and_gradients(model), before)


def test_hybrid_norms_are_fused_with_a_full_rotation():
    model = build("hybrid", **SIZES["hybrid"], rotary_fraction=1.0).train()
    before = losses_and_gradients(model)
    assert kernels.install(model)["norm_rope"] == 2
    agree(losses_and_gradients(model), before)


SUITE = [
    test_models.test_a_decoded_token_depends_on_the_cached_past,
    test_models.test_the_loss_is_the_mean_cross_entropy_without_ignored_targets,
    test_models.test_every_parameter_is_trained_and_in_exactly_one_optimizer_group,
    test_models.test_decoding_allocates_no_new_cache_memory,
]
BIT_EQUAL = [
    test_models.test_changing_a_token_leaves_earlier_logits_unchanged,
    test_models.test_changing_one_document_leaves_the_next_bit_equal_only_if_documents_are_on,
]
# A mixture sorts its rows by expert. In the interpreter a product is BLAS's, where the order of summation, and so the
# bits of a row, depend on the row's place in a tile: one token more for an expert moves all rows behind it.
SORTED = {"moe"}


def build_with_kernels(name, **options):
    model = build(name, **SIZES[name] | options)
    kernels.install(model)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("test", SUITE + BIT_EQUAL, ids=lambda test: test.__name__)
def test_the_suite_of_models_passes_with_kernels_installed(test, name, monkeypatch):
    if test in BIT_EQUAL and name in SORTED:
        pytest.skip("to rounding, in a test of its own")
    monkeypatch.setattr(test_models, "build", build_with_kernels)
    for eot_id in [{}] if "eot_id" not in test.__code__.co_varnames[: test.__code__.co_argcount] else (-1, EOT):
        test(name) if eot_id == {} else test(name, eot_id)


def influences(model, x, rows):
    """Returns the logits (T, V) of x (1, T), and how far each token's embedding moves those of these rows (T,)."""
    embeddings = []
    hook = model.embed.register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    logits = model(x)[0]
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[rows].square().sum(), embeddings)
    return logits.detach(), gradient[0].abs().amax(dim=-1)


@pytest.mark.parametrize("name", sorted(SORTED))
@pytest.mark.parametrize("eot_id", [-1, EOT])
def test_sorted_rows_depend_on_no_later_token_and_on_no_other_document(name, eot_id):
    model, x = build_with_kernels(name, eot_id=eot_id), tokens(1, 24)
    x[0, [0, 7]] = EOT
    later, other = x.clone(), x.clone()
    later[0, 15] = (x[0, 15] + 1) % EOT
    other[0, 3] = (x[0, 3] + 1) % EOT
    want, influence = influences(model, x, slice(7, 15))
    with torch.no_grad():
        without_later = model(later)[0]
        without_other = model(other)[0]
    # A product with zeros is 0 in every order of summation: what has no influence has none to the bit.
    torch.testing.assert_close(without_later[:15], want[:15])
    assert (influence[15:] == 0).all() and (influence[7:15] > 0).all()
    assert (without_later - want)[15:].abs().amax(dim=-1).min() > 1e-4
    if eot_id == EOT:
        torch.testing.assert_close(without_other[7:], want[7:])
        assert (influence[:7] == 0).all()
    else:
        assert (without_other - want)[7:].abs().amax(dim=-1).min() > 1e-4
        assert (influence[:7] > 0).all()
