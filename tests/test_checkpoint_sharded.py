"""Checkpoints of many processes: sharded and not, in any layout from any other, asynchronous, and with faults on one.

Processes are forked and speak gloo. What is checked inside them is an assert there, which fails the test here.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401 (what fully_shard would import in every process, for seconds)
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

import hf
import sample
from tests.tiny import build, tokens
from training import atomic, checkpoint
from training.checkpoint import CheckpointError, newest, restore, verify

pytestmark = pytest.mark.xdist_group("processes")
MODELS = ["baseline", "moe"]


def in_processes(folder, size, run, timeout=60):
    """run(rank) in so many processes; their exit codes. timeout: of their collectives, in seconds."""
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                options = dict(rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
                dist.init_process_group("gloo", init_method=f"file://{store}", **options)
                run(rank)
                dist.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def tiny(name, seed=0):
    return build(name, seed, vocab_size=259)  # room for bytes, and not a multiple of 2 or 4


def make(name, layout="none", seed=0):
    """(model, the module to call, AdamW) of a tiny model, sharded, replicated or plain. One matrix has Muon's state."""
    model = tiny(name, seed).train()
    net = model
    if layout == "fsdp":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif layout == "ddp":
        net = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, net, optimizer


def train(net, optimizer, steps):
    """Steps on a batch that is the same on every process, and so the same in every layout but for rounding."""
    for step in steps:
        idx = tokens(4, 17, seed=step)
        loss = net(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(model_of(net), "after_step"):
            model_of(net).after_step()
    for p in net.parameters():
        optimizer.state[p]["momentum_buffer"], optimizer.state[p]["count"] = p.detach() * 0.5 + 1.0, 7 + steps[-1]
    return loss.item()


def model_of(net):
    return getattr(net, "module", net)


def full(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def digest(model, optimizer):
    """A hash of all bits of a model and of its optimizer's state, the same in every layout."""
    values = {name: full(t.detach()) for name, t in checkpoint.weights(model).items()}
    for name, p in model.named_parameters():
        values |= {f"{name}.{key}": full(value) for key, value in optimizer.state[p].items()}
    bits = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        bits.update(f"{name} ".encode())
        bits.update(value.double().numpy().tobytes() if torch.is_tensor(value) else f"{value}\n".encode())
    return bits.hexdigest()


def config(model, name):
    return {"model": name, "model_config": vars(model.config), "knobs": {}}


def save(out, step, model, optimizer, name="baseline", **options):
    return checkpoint.save(out, step, model, optimizer, config(model, name), {"tokens": 10 * step}, **options)


def evaluate(net):
    net.eval()
    with torch.no_grad():
        loss = net(tokens(2, 16, seed=9), tokens(2, 16, seed=8)).item()
    net.train()
    return loss


def names(out):
    return sorted(path.name for path in Path(out).iterdir())


def error_of(call):
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Runs that hand a state on: FSDP 4 -> FSDP 2 -> DDP 2 -> one process, each of which saves it again. In notes.json
    of each the digest, and the loss of the step that followed."""
    work = tmp_path_factory.mktemp("chain")

    def go_on(name, layout, out, source=None):
        """Restores, or trains two steps and evaluates; saves; one more step."""
        model, net, optimizer = make(name, layout, seed=0 if source is None else 1)
        if source is None:
            train(net, optimizer, [1])
            save(work / out / name, 1, model, optimizer, name)
            train(net, optimizer, [2])
        else:
            path = newest(work / source / name)
            assert restore(path, model, optimizer) == {"step": 2, "tokens": 20}
        evaluate(net)  # leaves what the root holds gathered in FSDP
        save(work / out / name, 2, model, optimizer, name)
        notes = {"digest": digest(model, optimizer), "loss": train(net, optimizer, [3])}
        notes["next"] = digest(model, optimizer)
        if not dist.is_initialized() or dist.get_rank() == 0:
            (work / out / name / "notes.json").write_text(json.dumps(notes))

    def four(rank):
        for name in MODELS:
            go_on(name, "fsdp", "fsdp4")

    def two(rank):
        for name in MODELS:
            go_on(name, "fsdp", "fsdp2", "fsdp4")
            go_on(name, "ddp", "ddp2", "fsdp2")

    def back(rank):
        for name in MODELS:
            go_on(name, "fsdp", "fsdp4 again", "one")
            go_on(name, "fsdp", "fsdp4 twice", "fsdp4")

    assert in_processes(work, 4, four) == [0] * 4
    assert in_processes(work, 2, two) == [0] * 2
    for name in MODELS:
        go_on(name, "none", "one", "ddp2")
    assert in_processes(work, 4, back) == [0] * 4
    return work


LAYOUTS = ["fsdp4", "fsdp2", "ddp2", "one", "fsdp4 again", "fsdp4 twice"]


def notes(chain, layout, name):
    return json.loads((chain / layout / name / "notes.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_a_state_goes_from_fsdp_4_to_fsdp_2_to_ddp_to_one_process_and_back_bit_for_bit(chain, name):
    digests = {layout: notes(chain, layout, name)["digest"] for layout in LAYOUTS}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("name", MODELS)
def test_the_next_loss_is_the_same_to_rounding_in_every_layout_and_bit_for_bit_in_the_same(chain, name):
    first, *others = [notes(chain, layout, name) for layout in LAYOUTS]
    assert all(abs(other["loss"] - first["loss"]) < 1e-5 for other in others)
    assert others[-1] == first and others[-2] == first


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_checkpoint_is_a_file_of_rows_of_each_process_and_else_one_file(chain, name):
    for layout, parts in (("fsdp4", 4), ("fsdp2", 2), ("ddp2", 1), ("one", 1)):
        path = newest(chain / layout / name)
        ends = [f"-{i + 1:05d}-of-{parts:05d}" for i in range(parts)] if parts > 1 else [""]
        files = [f"{kind}{end}.safetensors" for kind in ("model", "trainer") for end in ends]
        assert names(path) == sorted([*files, "config.json", "manifest.json", "trainer.json"])
        assert set(json.loads((path / "manifest.json").read_text())["files"]) == set(names(path)) - {"manifest.json"}
        rows = [load_file(path / f"model{end}.safetensors")["embed.weight"].shape[0] for end in ends]
        assert rows == {1: [259], 2: [130, 129], 4: [65, 65, 65, 64]}[parts]
        plain = [load_file(path / f"trainer{end}.safetensors").get("embed.weight.step") for end in ends]
        assert plain[0] == 2 and plain[1:] == [None] * (parts - 1)  # what is the same everywhere, once
    if name == "moe":  # 6 experts over 4 processes: one has none
        rows = [load_file(chain / "fsdp4" / name / "step-00000002" / f"model-0000{i}-of-00004.safetensors")
                for i in (1, 2, 3, 4)]  # fmt: skip
        assert [len(part["blocks.1.mlp.router.weight"]) for part in rows] == [2, 2, 2, 0]
        assert ["blocks.1.mlp.router.bias" in part for part in rows] == [True, False, False, False]


@pytest.mark.parametrize("name", MODELS)
def test_load_model_reads_a_sharded_checkpoint_in_one_process(chain, name):
    model, saved = checkpoint.load_model(chain / "fsdp4" / name)
    plain, _ = checkpoint.load_model(chain / "one" / name)
    assert saved["model"] == name and evaluate(model) == evaluate(plain)
    stored = load_file(newest(chain / "one" / name) / "model.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in checkpoint.weights(model).items())


def test_sample_writes_a_hugging_face_folder_from_a_sharded_checkpoint(chain, tmp_path, capsys):
    sample.main([str(chain / "fsdp4" / "baseline"), "--tokenizer", "byte", "--save_pretrained", str(tmp_path / "hf")])
    model, _ = checkpoint.load_model(chain / "fsdp4" / "baseline")
    again = hf.load(tmp_path / "hf")
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 16)), model(tokens(2, 16)))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


SHARD = "-00003-of-00004.safetensors"
DAMAGES = {
    "a flipped byte in weights": (lambda p: flip(p / f"model{SHARD}"), f"model{SHARD}: sha256 mismatch (corrupted)"),
    "a flipped byte in state": (lambda p: flip(p / f"trainer{SHARD}"), f"trainer{SHARD}: sha256 mismatch (corrupted)"),
    "a missing shard": (lambda p: (p / f"model{SHARD}").unlink(), f"incomplete: model{SHARD} missing"),
    "a shard of another step": (
        lambda p: shutil.copy(p.parent / "step-00000001" / f"model{SHARD}", p),
        f"model{SHARD}: sha256 mismatch (corrupted)",
    ),
    "a renamed shard": (
        lambda p: (p / f"model{SHARD}").rename(p / "model-00005-of-00005.safetensors"),
        f"incomplete: model{SHARD} missing",
    ),
    "two shards exchanged": (
        lambda p: [
            (p / f"model{SHARD}").rename(p / "x"),
            (p / "model-00001-of-00004.safetensors").rename(p / f"model{SHARD}"),
            (p / "x").rename(p / "model-00001-of-00004.safetensors"),
        ],
        "model-00001-of-00004.safetensors: ",
    ),
    "a shard not listed": (lambda p: relist(p, f"model{SHARD}", None), f"manifest.json: 'model{SHARD}' refused"),
    "a listed path": (lambda p: relist(p, f"model{SHARD}", "../x"), "manifest.json: '../x' refused"),
}


def relist(path, old, new):
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["files"].pop(old)
    if new:
        manifest["files"][new] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_the_checkpoint_before_it_taken(chain, tmp_path, damage):
    shutil.copytree(chain / "fsdp4" / "baseline" / "step-00000002", tmp_path / "step-00000002")
    shutil.copytree(chain / "fsdp4" / "baseline" / "step-00000001", tmp_path / "step-00000001")
    break_it, reason = DAMAGES[damage]
    assert verify(tmp_path / "step-00000002") == ""
    break_it(tmp_path / "step-00000002")
    log = []
    assert newest(tmp_path, log.append).name == "step-00000001"
    assert len(log) == 1 and log[0].startswith(f"skipping step-00000002: {reason}")


def test_a_file_that_is_not_listed_is_not_read(chain, tmp_path):
    path = tmp_path / "step-00000002"
    shutil.copytree(chain / "fsdp4" / "baseline" / "step-00000002", path)
    shutil.copy(path / f"model{SHARD}", path / "model-00005-of-00005.safetensors")
    model, _ = checkpoint.load_model(tmp_path)
    assert evaluate(model) == evaluate(checkpoint.load_model(chain / "one" / "baseline")[0])


def test_rows_that_are_missing_are_refused_even_where_nobody_verified(chain, tmp_path):
    path = tmp_path / "step-00000002"
    shutil.copytree(chain / "fsdp4" / "baseline" / "step-00000002", path)
    relist(path, "model-00004-of-00004.safetensors", None)
    message = error_of(lambda: restore(path, tiny("baseline")))
    assert "embed.weight is float32 [195, 64] in the checkpoint, float32 [259, 64] in the model" in message


def hold(patch, owner, name):
    """An event for which a function waits from now on, for 20 seconds at most."""
    go, real = threading.Event(), getattr(owner, name)
    patch.setattr(owner, name, lambda *args: (go.wait(20), real(*args))[1])
    return go


def check_asynchronous(out, layout, rank):
    """wait=False: the call returns before the write ends, and what is saved is that moment's."""
    with pytest.MonkeyPatch.context() as patch:
        model, net, optimizer = make("baseline", layout)
        train(net, optimizer, [1])
        save(out, 1, model, optimizer)
        for step in (2, 3):  # the second time in the first one's memory
            go = hold(patch, checkpoint, "save_file")
            trainer = {"tokens": step}
            optimizer.state[next(net.parameters())]["count"] = step
            before = digest(model, optimizer)
            assert checkpoint.save(out, step, model, optimizer, config(model, "baseline"), trainer, wait=False) is None
            trainer["tokens"] = -1
            train(net, optimizer, [step])
            assert digest(model, optimizer) != before
            assert checkpoint.finish(wait=False) is None
            assert newest(out, lambda line: None).name == f"step-{step - 1:08d}"
            placing = hold(patch, atomic, "commit")
            go.set()
            for _ in range(20):  # nor does anybody wait while it is put in place
                assert checkpoint.finish(wait=False) is None
                time.sleep(0.01)
            placing.set()
            assert checkpoint.finish().name == f"step-{step:08d}" == newest(out).name == os.readlink(out / "latest")
            assert checkpoint.finish() is checkpoint.finish(wait=False) is None
            again, _, other = make("baseline", layout, seed=1)
            assert restore(newest(out), again, other) == {"step": step, "tokens": step}
            assert digest(again, other) == before
            patch.undo()
        # a second save ends the first
        go = hold(patch, checkpoint, "save_file")
        save(out, 4, model, optimizer, wait=False)
        threading.Timer(0.2, go.set).start()
        before = digest(model, optimizer)
        save(out, 5, model, optimizer, wait=False)
        assert newest(out, lambda line: None).name == "step-00000004"
        checkpoint.finish()
        assert newest(out).name == "step-00000005" and verify(out / "step-00000004") == ""
        patch.undo()
        # an error is raised at the next call
        listing = names(out)
        if rank == 1 or layout == "none":
            patch.setattr(checkpoint, "save_file", full_disk)
        save(out, 6, model, optimizer, wait=False)
        message = error_of(lambda: save(out, 7, model, optimizer))
        assert message.startswith("checkpoint at step 6 failed: No space left on device (need")
        assert message.endswith("; checkpoint step-00000005 is still there") and names(out) == listing
        save(out, 6, model, optimizer, wait=False)
        error_of(checkpoint.finish)
        patch.undo()
        assert save(out, 7, model, optimizer).name == "step-00000007"


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_asynchronous_save_returns_before_it_is_written_and_holds_its_step_in_one_process(tmp_path):
    check_asynchronous(tmp_path / "out", "none", 0)


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Two processes go through what goes wrong; what of it both of them passed, up to the first that one did not."""
    work = tmp_path_factory.mktemp("faults")

    def run(rank):
        for name, check in (
            ("asynchronous", lambda out: check_asynchronous(out, "fsdp", rank)),
            ("asynchronous in ddp", lambda out: check_asynchronous(out, "ddp", 1 - rank)),  # process 0 is the writer
            ("disks", lambda out: check_disks(out, rank)),
            ("choice", lambda out: check_one_choice(out, rank)),
        ):
            check(work / name)
            dist.barrier()
            (work / f"{name} passed").touch()

    in_processes(work, 2, run)
    return [path.name.removesuffix(" passed") for path in work.glob("* passed")]


def test_an_asynchronous_save_returns_before_it_is_written_and_holds_its_step_in_many_processes(faults):
    assert {"asynchronous", "asynchronous in ddp"} <= set(faults)


def everywhere(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_disks(out, rank):
    model, net, optimizer = make("baseline", "fsdp")
    train(net, optimizer, [1])
    save(out, 1, model, optimizer)
    listing, before = names(out), digest(model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        # a process's disk fills up while it writes
        if rank == 1:
            patch.setattr(checkpoint, "save_file", full_disk)
        message = error_of(lambda: save(out, 2, model, optimizer, keep_last=1))
        assert everywhere(message) == [message] * 2 and "step 2 failed: No space left on device" in message
        assert names(out) == listing
        patch.undo()
        # there is room for what one process writes, but not for both
        state = sum(p.numel() * 4 * 4 for p in tiny("baseline").parameters())
        free = shutil._ntuple_diskusage(10**9, 10**9, state * 3 // 4 + 2**16)
        patch.setattr(shutil, "disk_usage", lambda path: free)
        patch.setattr(checkpoint, "write", lambda *args: pytest.fail("wrote"))
        message = error_of(lambda: save(out, 2, model, optimizer))
        assert f"need ~{(state + 2**16) / 1e6:.1f} MB, free {free.free / 1e6:.1f} MB" in message
        assert names(out) == listing
        patch.undo()
        # process 0 cannot put it in place
        if rank == 0:
            patch.setattr(Path, "rename", full_disk)
        message = error_of(lambda: save(out, 2, model, optimizer))
        assert everywhere(message) == [message] * 2 and names(out) == listing
        patch.undo()
    assert newest(out).name == "step-00000001"
    restore(newest(out), *(again := make("baseline", "fsdp", seed=1))[::2])
    assert digest(*again[::2]) == before
    assert save(out, 2, model, optimizer, keep_last=1).name == "step-00000002" and names(out) == [
        "latest",
        "step-00000002",
    ]


def test_a_full_disk_on_one_process_is_an_error_on_all_and_loses_nothing(faults):
    assert "disks" in faults


def check_one_choice(out, rank):
    model, net, optimizer = make("baseline", "fsdp")
    train(net, optimizer, [1])
    for step in (1, 2, 3):
        save(out, step, model, optimizer)
    log = []
    if rank == 0:
        flip(out / "step-00000003" / "model-00002-of-00002.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:  # it sees another disk, or none
            patch.setattr(atomic, "verify", lambda path: pytest.fail("looked"))
            patch.setattr(atomic, "folders", lambda *_: pytest.fail("looked"))
        assert everywhere(str(newest(out, log.append))) == [str(out / "step-00000002")] * 2
        assert (
            everywhere(str(checkpoint.resolve(out / "latest", lambda line: None))) == [str(out / "step-00000002")] * 2
        )
        reason = "step-00000003: model-00002-of-00002.safetensors: sha256 mismatch (corrupted)"
        assert log == ([f"skipping {reason}"] if rank == 0 else [])
        assert error_of(lambda: checkpoint.resolve(out / "step-00000003")).endswith(reason)
        assert everywhere(str(checkpoint.resolve(out))) == [str(out / "step-00000002")] * 2
        dist.barrier()
        if rank == 0:
            for path in checkpoint.folders(out):
                flip(path / "model-00001-of-00002.safetensors")
        assert "(3 found, all rejected)" in error_of(lambda: newest(out, log.append))


def test_process_0_verifies_and_all_take_its_choice_or_its_error(faults):
    assert "choice" in faults


def die_here(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("dying, where", [(1, "writing"), (1, "written"), (0, "renaming"), (0, "pruning")])
def test_kill_of_one_process_in_a_save_leaves_the_one_before_and_the_next_save_cleans_up(tmp_path, dying, where):
    out = tmp_path / "out"

    def crash(rank):
        model, net, optimizer = make("baseline", "fsdp")
        train(net, optimizer, [1])
        save(out, 1, model, optimizer)
        save(out, 2, model, optimizer, keep_last=2)
        (out / f"digest-{rank}").write_text(digest(model, optimizer))
        train(net, optimizer, [2])
        if rank == dying and where == "written":
            real = checkpoint.write
            checkpoint.write = lambda *args: die_here(real(*args))
        elif rank == dying:
            owner, name = {"writing": (checkpoint, "save_file"), "renaming": (Path, "rename"),
                           "pruning": (shutil, "rmtree")}[where]  # fmt: skip
            setattr(owner, name, die_here)
        save(out, 3, model, optimizer, keep_last=1)

    def go_on(rank):
        model, net, optimizer = make("baseline", "fsdp", seed=1)
        step = restore(newest(out, lambda line: None), model, optimizer)["step"]
        assert step == (3 if where == "pruning" else 2)
        assert step == 3 or digest(model, optimizer) == (out / "digest-0").read_text()
        save(out, 4, model, optimizer, keep_last=1)

    codes = in_processes(tmp_path, 2, crash)
    assert codes[dying] == -signal.SIGKILL and codes[1 - dying] == 1  # and it does not hang
    left = [name for name in names(out) if name.endswith((".tmp", ".old"))]
    assert left == ["step-00000002.old" if where == "pruning" else "step-00000003.tmp"]
    assert in_processes(tmp_path, 2, go_on) == [0, 0]
    assert [name for name in names(out) if name.startswith("step")] == ["step-00000004"]


def test_a_disk_slower_than_the_timeout_of_collectives_is_waited_for(tmp_path):
    def run(rank):
        model, net, optimizer = make("baseline", "fsdp")
        train(net, optimizer, [1])
        for slow, (owner, name) in enumerate([(atomic, "commit"), (checkpoint, "save_file")]):
            real = getattr(owner, name)
            if rank == slow:
                setattr(owner, name, lambda *args, real=real: time.sleep(1.5) or real(*args))
            assert save(tmp_path / "out", 1, model, optimizer).name == "step-00000001"
            setattr(owner, name, real)

    assert in_processes(tmp_path, 2, run, timeout=1) == [0, 0]
