"""A run you can trust: each test injects a fault and shows what is said and lost, or that nothing foreign was run."""

import ast
import errno
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import sample
from data.shards import Shards
from tests import soak
from tests.payloads import payloads
from tests.test_train import (
    KNOBS,
    PICTURES,
    SIZES,
    altered,
    copy_until,
    fail,
    finish,
    finished,
    launch,
    same,
    start,
    together,
    train,
    until,
    weights,
    write_data,
    wrote,
)  # fmt: skip
from tests.tiny import ROOT, TINY
from training import checkpoint, run_folder

pytestmark = pytest.mark.xdist_group("processes")
PROCESSES = 2
LONG = dict(max_steps=40, save_every=5, keep_last=0, eval_every=20, micro_batch=8)
SLOW = LONG | dict(model="fault", sleep=0.03)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data and a variant that is slow, leaks, or logs what torch was told."""
    return altered(tmp_path_factory.mktemp("work"), "fault", (
        ("    eot_id: int", """    leak: int = 0  # floats a step
    sleep: float = 0.0
    eot_id: int"""),
        ("        return F.cross_entropy(self.logits(x).flatten(0, 1)", """        import time
        time.sleep(self.config.sleep if self.training and type(x) is torch.Tensor else 0)
        self.leaked = [*getattr(self, "leaked", []), torch.ones(self.config.leak)]
        return F.cross_entropy(self.logits(x).flatten(0, 1)"""),
        ("    def new_cache(self", """    def metrics(self):
        import os
        told = torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        return {"deterministic": float(told and os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8")}

    def new_cache(self"""),
    ))  # fmt: skip


@pytest.fixture(scope="module")
def whole(work):
    """A run that nothing happened to."""
    return train(work, "whole", **LONG)


def holder(folder):
    """The process of rank 0 that has the folder, as its lock says."""
    text = (folder / ".lock").read_text() if (folder / ".lock").exists() else ""
    return int(re.fullmatch(r"process (\d+) on \S+", text)[1]) if text else 0


def last_step(folder):
    return max((row["step"] for row in run_folder.read_metrics(folder)), default=0)


# ---- two runs on one folder ------------------------------------------------------------------------------------------
def test_a_second_run_is_refused_with_process_and_host_and_not_after_a_crash_of_the_first(work, whole):
    first, log = start(work, out_dir="one", **SLOW | dict(model="baseline", sleep=None, max_steps=10**6))
    until(lambda: wrote(work / "one", 3000))
    for flags in ([], ["--resume"], ["--resume=auto"], ["--overwrite"]):
        expected = (
            f"error: one is in use by process {first.pid} on {socket.gethostname()}: wait for that run, stop it, "
        )
        assert fail(work, "one", *flags).startswith(expected)
    results = [finish(*run) for run in together(work, 2, "--resume", out_dir="one")]  # no rank waits for rank 0
    for result in results:
        assert result.code and f"one is in use by process {first.pid} on" in result.err, result.err
    assert first.is_alive()
    first.kill()
    finish(first, log)
    step = last_step(work / "one")
    assert last_step(train(work, "one", "--resume", max_steps=step + 1).folder) == step + 1


def test_a_child_of_a_killed_run_does_not_hold_its_lock(tmp_path):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        kept = run_folder.lock(tmp_path)
        child = os.fork()
        if child:
            os.write(write, b"%d\n" % child)
        time.sleep(60)
        os._exit(kept is None)
    child = int(os.read(read, 100))
    with pytest.raises(ValueError, match=f"in use by process {pid} on"):
        run_folder.lock(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.kill(child, 0)  # is alive
    file = run_folder.lock(tmp_path)
    assert holder(tmp_path) == os.getpid()
    file.close()
    os.kill(child, signal.SIGKILL)


def test_on_a_disk_without_locks_a_run_begins_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    run_folder.lock(tmp_path)
    assert "WARNING: nothing can keep a second run out of" in capsys.readouterr().err


# ---- the same bits ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["fault", "moe", "hybrid"])
def test_two_deterministic_runs_agree_bit_for_bit(work, model):
    sizes = dict.fromkeys(SIZES) | TINY[model] | dict(block_size=32) if model in TINY else {}
    runs = [train(work, f"{model} {n}", "--deterministic", model=model, dropout=0.1, **sizes) for n in (1, 2)]
    assert same(*runs, 6)
    assert all(row["deterministic"] for row in runs[0].steps if model == "fault")


# ---- signals, kills and restarts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("victims", [{8: 0}, pytest.param({8: 0, 23: -1}, marks=pytest.mark.slow)], ids=str)
def test_torchrun_goes_on_by_itself_after_kill_9_of_any_rank(work, victims):
    """victims: which rank is killed after which step."""
    folder = work / f"restarted {len(victims)}"
    knobs = {"data": "data"} | KNOBS | SLOW | dict(out_dir=folder.name)
    argv = ["--resume=auto", *(f"--{key}={value}" for key, value in knobs.items())]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}",
               "--max-restarts=3", ROOT / "train.py", *argv]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(work)}
    process = subprocess.Popen(command, cwd=work, env=environment, stdout=-1, stderr=-1, text=True)
    for step, victim in victims.items():
        until(lambda step=step: last_step(folder) >= step)
        ranks = soak.children(process.pid)
        assert len(ranks) == PROCESSES and holder(folder) in ranks
        os.kill(ranks[victim], signal.SIGKILL)
        until(lambda old=ranks: holder(folder) not in old)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.findall(r"resuming from .*/step-(\d+)", out) == [f"{step // 5 * 5:08d}" for step in victims]
    undisturbed = f"undisturbed {len(victims)}"
    results = [finish(*run) for run in together(work, PROCESSES, out_dir=undisturbed, **SLOW | dict(sleep=0.0))]
    assert not any(result.code for result in results)
    runs = [finished(work / name) for name in (folder.name, undisturbed)]
    assert runs[0].losses == runs[1].losses and len(runs[0].losses) == 40
    a, b = (weights(run.folder, 40) for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("fault, parallel", [(signal.SIGKILL, "ddp"), (signal.SIGSTOP, "fsdp")])
def test_a_rank_that_dies_or_hangs_ends_the_others_within_the_timeout_by_one_line(work, fault, parallel):
    folder = work / f"{fault.name} {parallel}"
    knobs = SLOW | dict(out_dir=folder.name, parallel=parallel, timeout=3, max_steps=4000)
    waiting, other = together(work, 2, **knobs)
    try:
        until(lambda: last_step(folder) >= 3)
        os.kill(other[0].pid, fault)
        begin = time.time()
        result = finish(*waiting, timeout=30)  # 3 s, on a machine that may be busy
        assert result.code == 1 and time.time() - begin < 20
        assert result.err.startswith("error: process 0 waited for another one that died, or is stuck:")
        assert result.err.count("\n") == 1 and result.err.endswith("go on with --resume\n")
    finally:
        for process, _ in (waiting, other):
            process.kill()
            process.join()


def test_overwrite_under_max_restarts_is_refused_since_each_restart_would_delete_the_run(work):
    result = finish(*start(work, "--overwrite", out_dir="over", environment={"TORCHELASTIC_MAX_RESTARTS": "3"}))
    assert result.code == 2 and "--overwrite would delete the run at each restart" in result.err


# ---- ranks that are not alike ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", ["config", "data", "code"])
def test_a_rank_with_another_config_data_or_code_is_named_on_every_rank(work, tmp_path, what):
    (tmp_path / "model_fault.py").write_text((work / "model_fault.py").read_text() + "# edited\n" * (what == "code"))
    shutil.copytree(work / "data", tmp_path / "data")
    if what == "data":
        path = tmp_path / "data" / "train_000000.bin"
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    environments = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
                    for rank in range(2)]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    knobs = {"data": "data"} | KNOBS | dict(model="fault", out_dir=tmp_path / "out")
    runs = []
    for folder, environment in zip((work, tmp_path), environments):
        if what == "config" and folder == tmp_path:
            knobs["n_layer"] = 2  # DistributedDataParallel would fail with a page of text
        argv = [f"--{key}={value}" for key, value in knobs.items()]
        runs.append(launch(folder, argv, environment | {"MASTER_PORT": port}))
    text = {"config": "config than rank 0: n_layer=2, not 1\n", "data": "data than rank 0: shards=['",
            "code": "code than rank 0: model_fault.py='"}[what]  # fmt: skip
    for result in [finish(*run, timeout=60) for run in runs]:
        assert result.code and f"error: rank 1 has a different {text}" in result.err, result.err
    assert not (tmp_path / "out").exists()


# ---- folders and files in a bad state --------------------------------------------------------------------------------
def test_a_folder_that_cannot_be_written_to_is_refused_by_name(work, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file/run cannot be written to (Not a directory): choose another out_dir" in fail(
        work, tmp_path / "file/run"
    )
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a read-only disk needs root")
    try:
        assert "cannot be written to (Read-only file system): choose another out_dir" in fail(work, tmp_path / "run")
        assert "cannot be written to (Read-only file system)" in fail(work, tmp_path)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_an_empty_folder_takes_a_run_and_has_none_to_resume(work, whole):
    (work / "empty").mkdir()
    assert "--resume given but no checkpoint in empty" in fail(work, "empty", "--resume")
    assert list((work / "empty").iterdir()) == []
    assert train(work, "empty", "--resume=auto", **LONG).losses == whole.losses


def test_a_run_folder_that_lost_all_but_its_checkpoints_goes_on(work, whole):
    copy_until(whole, work / "bare", 20)
    for path in (work / "bare").iterdir():
        if not path.name.startswith("step-"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    run = train(work, "bare", "--resume", **LONG)
    assert run.losses == whole.losses[20:]
    for name in ("manifest.json", "config.json", "data.json", "source/train.py", "latest/config.json"):
        assert (run.folder / name).exists()


def test_metrics_cut_short_or_damaged_anywhere_lose_only_those_lines(tmp_path, capsys):
    good = [json.dumps({"step": n}).encode() for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_bytes(
        b"\n".join(
            [good[0], b"\x80\xff\0\0", b"7", good[1], b'{"loss": 1}', 9999 * b"[", b'{"st', good[2], b'{"step": 4']
        )
    )
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().err.count("a line that was cut short or is none of a run's is left out") == 6


def test_a_shard_that_is_written_to_under_a_run_stops_it_before_the_next_save(work, whole):
    shutil.copytree(work / "data", work / "live")
    knobs = LONG | dict(data="live", model="fault", save_every=10)
    process, log = start(work, out_dir="live run", sleep=0.05, **knobs)
    until(lambda: last_step(work / "live run") >= 12)
    path = work / "live" / "train_000000.bin"
    with open(path, "r+b") as file:  # the bytes of another place
        file.seek(3000)
        file.write(bytes(16))
    result = finish(process, log)
    assert result.code == 2
    assert "error: live/train_000000.bin was written to while this run read it: restore it" in result.err
    assert [p.name for p in checkpoint.folders(work / "live run")] == ["step-00000010"]
    assert "live changed since live run/step-00000010" in fail(work, "live run", "--resume", **knobs)
    shutil.copy(work / "data" / path.name, path)
    assert train(work, "live run", "--resume", **knobs).losses == whole.losses


def test_a_shard_replaced_by_rename_spoils_no_run_and_is_refused_at_its_resume(work, whole):
    shutil.copytree(work / "data", work / "renamed")
    process, log = start(
        work, model="fault", sleep=0.05, out_dir="renamed run", **LONG | dict(data="renamed", save_every=20)
    )
    until(lambda: last_step(work / "renamed run") >= 8)
    write_data(work / "other", 5)
    shutil.copy(work / "other" / "train_000000.bin", work / "renamed" / "new")  # and meta.json stays what it was
    os.replace(work / "renamed" / "new", work / "renamed" / "train_000000.bin")
    assert finish(process, log).code == 0 and finished(work / "renamed run").losses == whole.losses
    message = fail(work, "renamed run", "--resume", model="fault", **LONG | dict(data="renamed", max_steps=50))
    assert "renamed changed since renamed run/step-00000040 was written: restore it" in message


def test_what_else_changed_since_the_checkpoint_is_said(work, whole):
    copy_until(whole, work / "moved", 20)
    path = work / "moved" / "step-00000020" / "trainer.json"
    rewrite(path, json.dumps(json.loads(path.read_text()) | {"machine": {"processes": 4, "torch": "1.0"}}).encode())
    run = train(work, "moved", "--resume", **LONG)
    for text in ("processes: 4 -> 1", f"torch: 1.0 -> {torch.__version__}"):
        assert f"changed since the checkpoint: {text}: equal to rounding, not to the bit" in run.out


# ---- files from someone else -----------------------------------------------------------------------------------------
def rewrite(path, content):
    """Replaces a checkpoint's file as someone would who knows of the manifest."""
    manifest = path.with_name("manifest.json")
    size, digest = checkpoint.entries(path.parent, [path.name])[path.name]
    path.write_bytes(content)
    if path != manifest:
        text = manifest.read_text().replace(digest, checkpoint.entries(path.parent, [path.name])[path.name][1])
        manifest.write_text(re.sub(rf"\b{size}\b", str(len(content)), text))


def refused(call, *arguments):
    """What a call says that must not succeed."""
    with pytest.raises((ValueError, OSError, checkpoint.CheckpointError, SystemExit)) as error:
        call(*arguments)
    return str(error.value)


def test_the_payload_of_these_tests_would_leave_a_mark(tmp_path):
    for n, payload in enumerate(payloads(tmp_path / "mark")):
        path = tmp_path / str(n)
        path.write_bytes(payload)
        torch.load(path, weights_only=False) if n == 2 else pickle.loads(payload)
        (tmp_path / "mark").rmdir()


def test_a_pickle_in_the_place_of_any_file_of_a_run_is_never_run(work, whole, tmp_path):
    mark = tmp_path / "mark"
    names = sorted(json.loads((whole.folder / "step-00000040" / "manifest.json").read_text())["files"])
    names.append("manifest.json")
    assert len(names) >= 5
    for n, payload in enumerate(payloads(mark)):
        for name in [*names, "../data.json", "../latest"]:
            folder = tmp_path / f"{n} {name.replace('/', '')}"
            copy_until(whole, folder, 40)
            if name == "../latest":  # a link to a folder of someone else's
                copy_until(whole, tmp_path / "theirs", 40)
                rewrite(tmp_path / "theirs" / "step-00000040" / "model.safetensors", payload)
                (folder / "latest").unlink()
                (folder / "latest").symlink_to(tmp_path / "theirs" / "step-00000040")
                sample.main([str(folder / "latest"), "--max_new_tokens=1"])  # finds the run's own without the link
                shutil.rmtree(tmp_path / "theirs")
            elif name == "../data.json":
                (folder / "data.json").write_bytes(payload)
                refused(sample.main, [str(folder)])
            else:
                for path in checkpoint.folders(folder):
                    rewrite(path / name, payload)
                if not name.startswith("trainer"):
                    refused(sample.main, [str(folder)])
                if n == 0:
                    result = finish(*start(work, "--resume", out_dir=folder, **LONG | dict(max_steps=45)))
                    assert result.code == 2 and "error: " in result.err and "Traceback" not in result.err, result.err
            assert not mark.exists(), (n, name)


def test_the_code_that_lies_beside_a_checkpoint_is_never_imported(work, whole, tmp_path, monkeypatch):
    copy_until(whole, tmp_path / "run", 40)
    for path in checkpoint.folders(tmp_path / "run"):
        config = json.loads((path / "config.json").read_text()) | {"model": "evil"}
        rewrite(path / "config.json", json.dumps(config).encode())
        for folder in (path, tmp_path / "run"):
            (folder / "model_evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    monkeypatch.chdir(tmp_path / "run")
    command = [sys.executable, ROOT / "sample.py", "."]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode and "needs model_evil.py" in done.stderr and not (tmp_path / "mark").exists()


def test_pickles_as_data_are_never_run(work, tmp_path):
    for n, payload in enumerate(payloads(tmp_path / "mark")):
        for name in ("meta.json", "train_000000.bin"):
            folder = tmp_path / f"{n} {name}"
            shutil.copytree(work / "data", folder)
            (folder / name).write_bytes(payload.ljust(2000))
            assert name in refused(Shards, folder, "train") and not (tmp_path / "mark").exists()


def test_no_code_of_the_project_unpickles():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("config/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Call):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                safe = "weights_only" in given if ast.unparse(node.func) == "torch.load" else True
                safe &= given.get("weights_only", "True") == "True" and given.get("allow_pickle", "False") == "False"
                assert safe, f"{path} line {node.lineno}"


# ---- memory ----------------------------------------------------------------------------------------------------------
def test_resident_memory_is_flat_over_a_run_and_shows_a_leak(work):
    knobs = dict(model="fault", max_steps=120, save_every=20, eval_every=20, keep_last=2, micro_batch=8)
    grown = []
    for leak in (0, 100_000):  # 400 kB a step
        run = train(work, f"leak {leak}", leak=leak, environment=PICTURES, **knobs)
        memory = [row["resident_gb"] for row in run.steps]
        grown.append(1e3 * (sum(memory[100:]) - sum(memory[30:50])) / 20)  # MB in 70 steps, with 3 saves
    assert grown[0] < 8 and 24 < grown[1] < 38, grown


def test_the_table_of_the_long_run_is_drawn_from_its_numbers_and_nothing_was_lost_in_it():
    result = json.loads((ROOT / "results/reliability.json").read_text())
    assert (ROOT / "results/reliability.md").read_text() == soak.markdown(result)
    assert result["losses_equal"] and result["weights_equal"] and result["steps"] == 2000
