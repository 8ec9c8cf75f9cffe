"""Many processes: the same numbers as one, with a share of the memory. They are forked here, and talk through gloo."""

import ctypes
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import muon
from distributed import fsdp, processes
from tests import test_train, tiny
from tests.test_train import FORK, KNOBS, close, fail, finish, finished, together, train, weights
from tests.tiny import BLOCK, EOT, MODELS, ROOT, TINY, VOCAB, module, tokens

pytestmark = pytest.mark.xdist_group("processes")
work = test_train.work  # the fixture: a folder with data
PROVED = ("baseline", "moe", "mla", "hybrid")
OPTIONS = {"moe": dict(balance_loss=0.1, bias_rate=0.01)}


# ---- in many processes, and in one ----------------------------------------------------------------------------------
def in_process(function, rank, world_size, folder, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
        if function is not given_up:
            dist.barrier()  # nobody goes while another needs it
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def everywhere(world_size, function, *args):
    """What function(*args) returns on each of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [FORK.Process(target=in_process, args=(function, rank, world_size, folder, *args), daemon=True)
                     for rank in range(world_size)]  # fmt: skip
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * world_size
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world_size)]


@contextmanager
def weights_in(dtype):
    """Makes floating tensors of this dtype meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(name, how, dtype=torch.float32, reshard=True, cpu_offload=False, compile=False, **options):
    sizes = dict(vocab_size=VOCAB, block_size=BLOCK, **TINY[name]) | OPTIONS.get(name, {}) | options
    GPT, config = module(name).GPT, module(name).GPTConfig(**sizes)
    torch.manual_seed(3)
    if how != "fsdp":
        return GPT(config)
    model = fsdp.empty(GPT, config)
    fsdp.shard(model, GPT, "cpu", dtype, reshard, cpu_offload, compile)
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def curve(name, how, optimizer="muon", steps=20, micro=2, dtype=torch.float64, **options):
    """Training of a tiny model, 8 windows a step, which each process takes in `micro` parts. rows: steps x (loss,
    gradient norm); weights: in the end; held: bytes of parameters and optimizer state on this process.

    In fp64 what is computed in another order has the same gradients to 1e-9 after 20 steps. In fp32 that depends on the
    model: hybrid's norms differ by 1e-4 between two sizes of the micro-batch, although its losses do by 1e-6 alone.
    """
    with weights_in(torch.float32 if dtype == torch.bfloat16 else dtype):
        return curve_in(dtype, name, how, optimizer, steps, micro, options)


def curve_in(dtype, name, how, optimizer, steps, micro, options):
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = build(name, how, dtype, **options)
    net = model
    if how == "ddp":
        net = processes.averaging_gradients(model, "cpu", options.get("indexer_stage") == "dense")
    # eps: a gradient that is zero but for rounding, like that of a key's bias, moves no weight.
    opt = muon.make_optimizer(model, optimizer, 5e-3, eps=1e-4)
    generator, rows, positions = torch.Generator().manual_seed(7), [], torch.arange(33)
    half = dtype == torch.bfloat16
    for _ in range(steps):
        windows = (torch.randint(EOT, (8, 1), generator=generator) + positions * (1 + positions % 3)) % EOT
        batches = windows[rank * 8 // world_size : (rank + 1) * 8 // world_size].chunk(micro)
        total = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(batches):
            last = i == micro - 1
            with processes.backward_of(net, last, options.get("reshard", True)):
                with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                    loss = net(batch[:, :-1], batch[:, 1:]) * len(batch) * world_size / 8
                loss.backward()
            total += loss.item() / world_size
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)).item()
        opt.step()
        opt.zero_grad()
        if hasattr(model, "after_step"):
            model.after_step()
        if world_size > 1:
            dist.all_reduce(total)
        rows.append([total.item(), norm])
    tensors = [*model.parameters(), *(value for state in opt.state.values() for value in state.values())]
    assert {t.dtype for t in tensors if t.ndim} == {torch.get_default_dtype()}  # a count of steps is fp32
    final = {key: whole(t).clone() for key, t in model.state_dict().items()}
    return {"rows": rows, "weights": final, "held": sum(muon.to_local(t).nbytes for t in tensors)}


def curves(*cases):
    return [curve(*case) for case in cases]


CASES = [(2, (name, "fsdp", "muon")) for name in MODELS]
CASES += [(2, (name, how, "adamw")) for name in PROVED for how in ("ddp", "fsdp")]
CASES += [(4, (name, how, "muon")) for name in ("baseline", "moe") for how in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def one():
    """{(name, optimizer): curve} of one process."""
    cases = dict.fromkeys((name, optimizer) for _, (name, _, optimizer) in CASES)
    return {(name, optimizer): curve(name, "none", optimizer) for name, optimizer in cases}


@pytest.fixture(scope="module")
def many():
    """{(world_size, case): the curves of each process}"""
    results = {}
    for world_size in (2, 4):
        cases = [case for size, case in CASES if size == world_size]
        each = everywhere(world_size, curves, *cases)
        results |= {(world_size, case): found for case, found in zip(cases, zip(*each))}
    return results


# ---- the same numbers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("world_size", "case"), CASES)
def test_losses_gradient_norms_and_weights_of_20_steps_equal_those_of_one_process(one, many, world_size, case):
    expected = one[case[0], case[2]]
    for result in many[world_size, case]:
        same_curve(result, expected)
        torch.testing.assert_close(result["weights"], expected["weights"], atol=1e-8, rtol=0)
    losses = [loss for loss, _ in expected["rows"]]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.03


@pytest.mark.parametrize(("world_size", "case"), [c for c in CASES if c[1][1] == "fsdp"])
def test_a_process_holds_its_share_of_weights_and_optimizer_state_and_little_more(one, many, world_size, case):
    whole = one[case[0], case[2]]["held"]
    held = [result["held"] for result in many[world_size, case]]
    assert max(held) < 1.2 * whole / world_size and sum(held) < 1.05 * whole  # 6 experts over 4 are 2 + 2 + 2 + 0


def same_curve(a, b, loss_tolerance=2e-6, norm_tolerance=1e-9):
    """Losses are fp32, whatever the model is; their gradients are as exact as it."""
    losses, norms = torch.tensor(a["rows"], dtype=torch.float64).T
    expected_losses, expected_norms = torch.tensor(b["rows"], dtype=torch.float64).T
    torch.testing.assert_close(losses, expected_losses, atol=loss_tolerance, rtol=0)
    torch.testing.assert_close(norms, expected_norms, atol=norm_tolerance, rtol=0)


def test_experts_balanced_over_all_processes_train_like_those_of_one():
    options = dict(balance_loss=1.0, steps=8)
    one = curve("moe", "none", micro=1, **options)
    for result in everywhere(2, partial(curve, "moe", "fsdp", micro=2, **options)):
        same_curve(result, one)
        for name in ("bias", "load"):
            name = f"blocks.1.mlp.router.{name}"
            assert torch.equal(result["weights"][name], one["weights"][name])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_stage_in_which_most_weights_have_no_gradient_trains_like_in_one_process(how):
    options = dict(indexer_stage="dense", steps=3)
    one = curve("indexer", "none", **options)
    for result in everywhere(2, partial(curve, "indexer", how, **options)):
        same_curve(result, one)
        torch.testing.assert_close(result["weights"], one["weights"], atol=1e-8, rtol=0)


def counted(**options):
    """A step, and how often weights were gathered and gradients reduced in it."""
    counts = {}
    with ExitStack() as stack:
        for name in ("foreach_all_gather", "foreach_reduce"):
            spy = patch.object(_fsdp_param_group, name, wraps=getattr(_fsdp_param_group, name))
            counts[name] = stack.enter_context(spy)
        return curve("baseline", "fsdp", steps=1, n_layer=3, micro=4, **options) | {
            "counts": [count.call_count for count in counts.values()]
        }


def test_accumulation_reduces_gradients_once_a_step_and_gathers_weights_once_with_reshard_off():
    one = curve("baseline", "none", steps=1, n_layer=3, micro=8)
    for options, gathers in (({}, 4 * (4 + 2)), ({"reshard": False}, 4)):  # 3 blocks and the rest; 2 for the backward
        for result in everywhere(2, partial(counted, **options)):
            same_curve(result, one)
            assert result["counts"] == [gathers, 4]


def gradients_of_three_steps():
    model = tiny.build("baseline")
    net = processes.averaging_gradients(model, "cpu")
    idx = tokens(2, 33, seed=dist.get_rank())
    found = []
    for _ in range(3):
        net(idx[:, :-1], idx[:, 1:]).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    return found


def test_three_processes_average_gradients_in_the_same_order_in_every_step():
    """DDP fills its buckets anew after a first step: a resumed run would add up in another order than its original."""
    for first, *later in everywhere(3, gradients_of_three_steps):
        for gradients in later:
            assert all(torch.equal(gradients[name], first[name]) for name in first)


def test_offloaded_to_the_cpu_it_trains_the_same():
    one = curve("baseline", "none", steps=5)
    for result in everywhere(2, partial(curve, "baseline", "fsdp", steps=5, cpu_offload=True)):
        same_curve(result, one)


def compiled():
    counter = torch._dynamo.testing.CompileCounter()
    with patch.object(torch, "compile", partial(torch.compile, backend=counter)):
        result = curve("baseline", "fsdp", steps=5, n_layer=12, compile=True)
    return {**result, "graphs": counter.frame_count}


def test_compiled_a_block_at_a_time_it_trains_the_same_and_equal_blocks_share_a_graph():
    one = curve("baseline", "none", steps=5, n_layer=12)
    for result in everywhere(2, compiled):
        same_curve(result, one)
        assert 1 <= result["graphs"] <= 4


def test_bfloat16_keeps_float32_shares_and_stays_close():
    one = curve("baseline", "none", dtype=torch.float32)
    for result in everywhere(2, partial(curve, "baseline", "fsdp", dtype=torch.bfloat16)):
        same_curve(result, one, 0.05, 0.05)
        assert result["rows"] != one["rows"]


def in_bfloat16(name, how):
    """Logits under autocast, and the dtype of each weight meanwhile."""
    model = build(name, how, torch.bfloat16, reshard=False)
    dtypes = {}
    model.norm.register_forward_hook(lambda *_: dtypes.update({n: str(p.dtype) for n, p in model.named_parameters()}))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(2, 24))
    return {"logits": logits.detach(), "dtypes": dtypes}


@pytest.mark.parametrize("name", ["hybrid", "moe"])
def test_in_bfloat16_matrices_alone_are_gathered_so_and_logits_are_those_of_autocast_to_the_bit(name):
    want = in_bfloat16(name, "none")["logits"]
    for result in everywhere(2, in_bfloat16, name, "fsdp"):
        assert torch.equal(result["logits"], want)
        for weight, dtype in result["dtypes"].items():
            is_exact = re.search(r"embed|norm|A_log|dt_bias|conv|\.router\.", weight)
            assert dtype == ("torch.float32" if is_exact else "torch.bfloat16"), weight


# ---- the start ------------------------------------------------------------------------------------------------------
def begun(how):
    result = {}
    for name in MODELS:
        model = build(name, how)
        result[name] = {key: whole(t).clone() for key, t in model.state_dict().items()}
        result[name] |= {f"{key} (buffer)": t.clone() for key, t in model.named_buffers()}
        result[name]["next random number"] = torch.rand(1)
    return result


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_start_in_shares_has_the_weights_of_one_process_bit_for_bit(world_size):
    one = begun("none")
    for result in everywhere(world_size, begun, "fsdp"):
        torch.testing.assert_close(result, one, atol=0, rtol=0, equal_nan=False)


def test_a_buffer_that_shares_would_leave_without_values_is_refused():
    class GPT(module("baseline").GPT):
        def __init__(self, config):
            super().__init__(config)
            self.blocks[0].register_buffer("scale", torch.ones(3))

    config = module("baseline").GPTConfig(vocab_size=VOCAB, block_size=BLOCK, **TINY["baseline"])
    with pytest.raises(ValueError, match="does not know what is in the buffer blocks.0.scale: set it in _apply"):
        fsdp.empty(GPT, config)


def memory_of_a_start():
    """Bytes in use whenever a whole weight is, beyond those before, and the bytes of all weights."""

    def used():
        ctypes.CDLL(None).malloc_trim(0)  # what is free, and only kept for later
        return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    def watched(model):
        for name, whole in weights_of(model):
            yield name, whole
            peaks.append(used())

    weights_of, peaks = fsdp.whole_weights, []
    build("baseline", "fsdp")  # what is imported or allocated once
    before = used()
    with patch.object(fsdp, "whole_weights", watched):
        model = build("baseline", "fsdp", n_layer=12, n_embd=512, n_inner=2048, n_head=8, n_kv_head=8, head_dim=64)
    return {"peak": max(peaks) - before, "whole": sum(p.numel() * 4 for p in model.parameters())}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc, and /proc")
def test_a_start_in_shares_never_holds_the_whole_model():
    for result in everywhere(2, memory_of_a_start):
        assert result["whole"] > 190e6 and result["peak"] < result["whole"] / 2 + 12e6


# ---- Muon -----------------------------------------------------------------------------------------------------------
SHAPES = [(5, 7), (7, 5), (6, 4), (5, 7), (1, 9), (3, 4, 5), (4, 6), (1, 5, 3), (8, 8), (5, 7), (2, 3)]


def optimized(shapes, sharded, **options):
    """Parameters and momentum after 3 steps, and how many matrices were orthogonalized here."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        cut = partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])
        weights, gradients = list(map(cut, weights)), [list(map(cut, step)) for step in gradients]
    params, count = [torch.nn.Parameter(weight) for weight in weights], 0
    opt = muon.MuonAdamW(params, lr=0.1, **options)

    def orthogonalize(x, *args):
        nonlocal count
        count += len(x)
        return exact(x, *args)

    exact = muon.orthogonalize
    with patch.object(muon, "orthogonalize", orthogonalize):
        for step in gradients:
            for p, g in zip(params, step):
                p.grad = g
            opt.step()
    states = [opt.state[p] for p in params]
    kept = [t for state in states for key, t in state.items() if key != "step"]
    if sharded:
        assert all(t.placements == (Shard(0),) for t in kept)
    return {"params": [whole(p).detach() for p in params], "state": [whole(t) for t in kept], "count": count}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("options", [{}, {"cautious_decay": True, "nesterov": False}])
def test_muon_on_shares_equals_muon_on_whole_matrices_and_divides_the_work(world_size, options):
    """Among them: rows that do not divide, fewer rows than processes, stacks with fewer matrices than processes."""
    for shapes in (SHAPES, [(5, 7)] * 5 + [(7, 2)], [(4, 4, 5)]):
        one = optimized(shapes, False, method="muon", **options)
        results = everywhere(world_size, partial(optimized, shapes, True, method="muon", **options))
        for result in results:
            torch.testing.assert_close(result["params"], one["params"], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(result["state"], one["state"], atol=1e-6, rtol=1e-6)
        counts = [result["count"] for result in results]
        assert sum(counts) == one["count"] and (shapes == SHAPES or max(counts) - min(counts) <= 3)  # steps


@pytest.mark.parametrize("options", [{}, {"cautious_decay": True}])
def test_adamw_on_shares_equals_adamw_on_whole_tensors(options):
    shapes = [(5, 7), (3,), (1,), (2, 3, 4), (9, 2, 2, 2)]
    one = optimized(shapes, False, **options)
    for result in everywhere(4, partial(optimized, shapes, True, **options)):
        torch.testing.assert_close(result["params"], one["params"], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(result["state"], one["state"], atol=1e-6, rtol=1e-6)


# ---- train.py -------------------------------------------------------------------------------------------------------
RUN = dict(
    micro_batch=2, eval_tokens=900, eval_every=3
)  # 29 windows to evaluate: 7 batches on a process, 8 on the other


@pytest.fixture(scope="module")
def alone(work):
    return train(work, "alone", **RUN)


def test_train_py_sharded_logs_evaluates_and_saves_what_one_process_does(work, alone):
    results = [finish(*run) for run in together(work, 2, out_dir="fsdp", parallel="fsdp", **RUN)]
    assert [result.code for result in results] == [0, 0], results
    assert "2 x cpu, float32, eager, parallel=fsdp" in results[0].out and not results[1].out
    run = finished(work / "fsdp")
    for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
        assert close(*([row[key] for row in r.rows if key in row] for r in (run, alone))), key
    for kind in ("model", "trainer"):
        a, b = (weights(r.folder, 6, kind) for r in (run, alone))
        assert a.keys() == b.keys()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_kernels_in_shares_have_the_losses_of_one_process_without_them(work):
    knobs = dict(head_dim=16, micro_batch=2, max_steps=2, eval_tokens=64)
    results = [finish(*run) for run in together(work, 2, out_dir="fused", parallel="fsdp", kernels=True, **knobs)]
    assert [result.code for result in results] == [0, 0], results
    assert "x norm_rope" in results[0].out and "PyTorch instead" not in results[0].err
    fused, plain = finished(work / "fused"), train(work, "without kernels", **knobs)
    assert close(fused.losses, plain.losses) and fused.losses != plain.losses


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_on_one_process_skips_the_step_on_all(work, how):
    knobs = dict(model="odd", micro_batch=8, bad_from=3, bad_to=3, save_every=1, keep_last=0, parallel=how)
    knobs |= dict(bad_rank=1, factor=1e38)
    results = [finish(*run) for run in together(work, 2, out_dir=f"nan {how}", **knobs)]
    assert [result.code for result in results] == [0, 0], results
    run = finished(work / f"nan {how}")
    assert [row["skipped"] for row in run.steps] == [0, 0, 1, 1, 1, 1]
    before, after, later = (weights(run.folder, n) for n in (2, 3, 4))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(torch.equal(before[k], later[k]) for k in before)


def test_torchrun_trains_in_shares_with_everything_on_and_ends_well(work, alone):
    knobs = {"data": "data", "out_dir": "shares"} | KNOBS | RUN
    argv = [f"--{key}={value}" for key, value in knobs.items()]
    argv += ["--parallel=fsdp", "--reshard=False", "--cpu_offload", "--gradient_checkpointing"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    run = subprocess.run([*command, *argv], cwd=work, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step      6/6") == 1
    assert close(finished(work / "shares").losses, alone.losses)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (dict(parallel="fsdp"), "torchrun --standalone --nproc_per_node=2 "),
        (dict(parallel="ddp"), "torchrun --standalone --nproc_per_node=2 "),
        (dict(cpu_offload=True), "cpu_offload=True and reshard=False are for parallel=fsdp, and this is parallel=auto"),
        (dict(reshard=False), "cpu_offload=True and reshard=False are for parallel=fsdp, and this is parallel=auto"),
        (dict(timeout=0), "timeout=0: try 1 or more"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(work, knobs, said):
    assert said in fail(work, "refused", **knobs)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (dict(dtype="float16"), "dtype=float16 needs a loss scaler, which parallel=fsdp has not: try bfloat16"),
        (
            dict(batch_tokens=288),
            "batch_tokens=288 is not a multiple of block_size=32 times 2 processes: try 256 or 320",
        ),
        (dict(parallel="none"), "parallel=none, but torchrun started 2 processes: try parallel=ddp"),
    ],
)
def test_many_processes_are_refused_with_one_line_each(work, knobs, said):
    for run in together(work, 2, out_dir="refused", **{"parallel": "fsdp"} | knobs):
        result = finish(*run)
        assert result.code == 2 and said in result.err and result.err.count("\n") == 1, result.err


def given_up():
    """How long this process waits for one that never comes."""
    processes.set_timeout(2)
    began = time.time()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="(?i)timed out"):
            dist.all_reduce(torch.zeros(()))
    else:
        time.sleep(5)
    return time.time() - began


def test_a_process_that_waits_longer_than_the_timeout_for_another_gives_up():
    first, _ = everywhere(2, given_up)
    assert 2 <= first < 4


def ended(how, rank, port, out):
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(address | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"))
    sys.stdout = open(out, "w")  # with a buffer, as a file has it
    processes.meet("cpu", 1)
    processes.barrier()
    processes.set_timeout(1)
    print("said")
    if how == "fail":
        processes.fail("enough", 3)
    if rank == 0:
        time.sleep(2)
    processes.finish()


@pytest.mark.parametrize("how, code", [("fail", 3), ("finish", 0)])
def test_an_end_waits_for_the_first_process_and_loses_nothing_that_was_printed_to_a_file(tmp_path, how, code):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outs = [tmp_path / "0", tmp_path / "1"]
    both = [FORK.Process(target=ended, args=(how, rank, port, out), daemon=True) for rank, out in enumerate(outs)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [code, code]
    assert [out.read_text() for out in outs] == ["said\n", "said\n"]


def summed():
    own = torch.ones(2, dtype=torch.float64)
    return [processes.all_sum(own), own.tolist()]


def test_a_sum_over_all_processes_leaves_the_callers_tensor_as_it_is():
    assert everywhere(2, summed) == [[[2.0, 2.0], [1.0, 1.0]]] * 2
