"""Nothing lost and nobody let in: what a run does when its folder, its disk, its reader or its launcher fail it."""

import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distributed import processes
from tests import soak
from tests.test_checkpoint import CONFIG, Toy, adamw, names, small_run
from tests.test_reliability import last_step
from tests.test_train import KNOBS, altered, fail, finish, finished, start, train, until, write_data, wrote
from tests.tiny import ROOT
from training import atomic, checkpoint, disk, metrics, pictures, run_folder, saving, signals

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(disk, "already_said", set())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data, and with a variant that is as slow as a test wants."""
    return altered(tmp_path_factory.mktemp("work"), "slow", (
        ("    eot_id: int", "    sleep: float = 0.0\n    eot_id: int"),
        ("        return F.cross_entropy(self.logits(x).flatten(0, 1)", """        import time
        time.sleep(self.config.sleep if self.training and type(x) is torch.Tensor else 0)
        return F.cross_entropy(self.logits(x).flatten(0, 1)"""),
    ))  # fmt: skip


def state(folder):
    return json.loads((folder / "state.json").read_text())


# ---- stops -----------------------------------------------------------------------------------------------------------
def test_scripts_read_how_a_run_stands(work):
    run = train(work, "scripted")
    assert state(run.folder) | {"command": ""} == {"state": "finished", "step": 6, "max_steps": 6, "command": ""}
    process, log = start(work, out_dir="asked", max_steps=10**6)
    until(lambda: wrote(work / "asked", 1000))
    assert state(work / "asked")["state"] == "running"
    process.terminate()
    result = finish(process, log)
    stopped = state(work / "asked")
    assert result.code == 0 and stopped["state"] == "stopped" and stopped["step"] == last_step(work / "asked")
    assert stopped["command"].endswith("--resume") and stopped["command"] in result.out


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_ranks_of_a_torchrun_that_was_killed_save_and_end(work):
    folder = work / "orphans"
    knobs = {"data": "data"} | KNOBS | dict(out_dir=folder.name, max_steps=10**6)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train.py", *(f"--{key}={value}" for key, value in knobs.items())]  # fmt: skip
    launcher = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: wrote(folder, 1000))
    ranks = soak.children(launcher.pid)
    launcher.kill()
    launcher.wait()
    until(lambda: not any(is_running(rank) for rank in ranks))
    assert len(ranks) == 2 and state(folder)["state"] == "stopped"
    assert checkpoint.newest(folder).name == f"step-{last_step(folder):08d}"


def test_a_run_whose_folder_was_deleted_writes_nothing_into_the_next_one_s(work):
    process, log = start(work, out_dir="taken", max_steps=10**6, save_every=10**6, model="slow", sleep=0.01)
    until(lambda: wrote(work / "taken", 1000))
    shutil.rmtree(work / "taken")
    train(work, "taken")
    process.terminate()
    result = finish(process, log)
    assert result.code == 2
    assert "taken was deleted or replaced while this run was at work: it writes nothing more there" in result.err
    assert [path.name for path in checkpoint.folders(work / "taken")] == ["step-00000006"]


# ---- links -----------------------------------------------------------------------------------------------------------
def test_a_checkpoint_that_was_being_replaced_and_is_the_only_whole_one_stays(work):
    run = train(work, "replaced", eval_every=3, save_every=3, keep_last=1)
    step = run.folder / "step-00000006"
    shutil.copytree(step, run.folder / "step-00000006.old")
    (step / "model.safetensors").write_bytes(b"damaged")
    again = train(work, "replaced", "--resume", max_steps=7, eval_every=3, save_every=3, keep_last=0)
    assert "resuming from replaced/step-00000006.old" in again.out
    assert "step      6 | validation loss" in run.out and "step      6 | validation loss" not in again.out
    assert [path.name for path in checkpoint.folders(run.folder)] == ["step-00000007", "step-00000006"]
    assert checkpoint.verify(step) == "" and not (run.folder / "step-00000006.old").exists()


LONGER = dict(eval_every=2, save_every=2, keep_last=1)


def test_a_resume_repairs_the_links_and_finishes_the_deletion_that_a_crash_left(work):
    run = train(work, "torn", **LONGER | dict(keep_last=0))
    best = atomic.best(run.folder)
    for name in ("latest", "best"):
        (run.folder / name).unlink()
        (run.folder / name).symlink_to("step-00000002")
    train(work, "torn", "--resume", **LONGER)
    assert os.readlink(run.folder / "latest") == "step-00000006" and os.readlink(run.folder / "best") == best.name
    assert checkpoint.folders(run.folder) == sorted({best, run.folder / "step-00000006"}, reverse=True)


def test_a_run_copied_with_its_links_followed_saves_knows_its_best_and_loses_nothing(work):
    run = train(work, "original", **LONGER | dict(keep_last=0))
    note = run.folder / "step-00000002" / "evaluation.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"loss": 0.5}))
    shutil.copytree(run.folder, work / "copied")  # links become folders
    copied = train(work, "copied", "--resume", **LONGER | dict(max_steps=8))
    assert copied.err.count("WARNING") == 2 and copied.err.count("cannot be made a link") == 2
    assert [path.name for path in checkpoint.folders(copied.folder)] == ["step-00000008", "step-00000002"]
    assert checkpoint.resolve(copied.folder / "best").name == "step-00000002"
    assert checkpoint.resolve(copied.folder / "latest").name == "step-00000008"


def test_what_has_the_name_of_a_checkpoint_and_is_none_blocks_no_save(tmp_path):
    (tmp_path / "step-00000010").write_text("a file")
    (tmp_path / "step-00000010.tmp").write_text("a file")
    (tmp_path / "step-00000020").symlink_to("nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "step-00000030.tmp").symlink_to("mine")
    small_run(tmp_path, steps=[10, 20, 30])
    assert names(tmp_path) == ["latest", "mine", "step-00000010", "step-00000020", "step-00000030"]
    assert [checkpoint.verify(path) for path in checkpoint.folders(tmp_path)] == ["", "", ""]


def test_a_step_of_nine_digits_is_the_newest(tmp_path):
    small_run(tmp_path, steps=[99_999_999, 100_000_000])
    assert checkpoint.newest(tmp_path).name == "step-100000000"
    model = Toy()
    checkpoint.save(tmp_path, 100_000_001, model, adamw(model), CONFIG, {}, keep_last=1)
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["step-100000001"]


def test_a_folder_renamed_to_a_later_step_is_not_taken_for_it(tmp_path):
    small_run(tmp_path, steps=[10, 20])
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000090")
    said = []
    assert checkpoint.newest(tmp_path, said.append).name == "step-00000020"
    assert said == ["skipping step-00000090: manifest.json: of step 10, so the folder was renamed"]


def test_a_disk_that_flushes_no_folders_costs_a_warning(tmp_path, monkeypatch, capsys):
    real = os.fsync

    def fsync(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    small_run(tmp_path, steps=[10])
    assert checkpoint.newest(tmp_path).name == "step-00000010"
    assert capsys.readouterr().err.count("flushes no folders") >= 1


@pytest.mark.parametrize("damage", ["nested", "loop"])
def test_a_manifest_that_python_cannot_read_is_damage_like_another(tmp_path, damage):
    small_run(tmp_path, steps=[10, 20])
    path = tmp_path / "step-00000020" / "manifest.json"
    path.unlink()
    if damage == "nested":
        path.write_text('{"a":' + 99_999 * "[")
    else:
        path.symlink_to("manifest.json")
    assert checkpoint.newest(tmp_path).name == "step-00000010"


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.json", "state.json", "loss.png", "source", "wandb"])
def test_a_run_writes_through_no_link(work, name):
    run = train(work, f"linked {name}")
    (work / f"mine {name}").write_text("mine")
    target = run.folder / name
    atomic.remove(target) if target.exists() else None
    target.symlink_to(work / f"mine {name}")
    message = fail(work, run.folder.name, "--resume", max_steps=8)
    assert f"{name} is a link, and a run writes through none" in message
    assert (work / f"mine {name}").read_text() == "mine"


def test_a_link_within_source_is_replaced_and_not_followed(work):
    run = train(work, "source linked")
    (work / "profile").write_text("mine")
    (run.folder / "source" / "train.py").unlink()
    (run.folder / "source" / "train.py").symlink_to(work / "profile")
    train(work, "source linked", "--resume", max_steps=8)
    assert (work / "profile").read_text() == "mine"
    assert (run.folder / "source" / "train.py").read_bytes() == (ROOT / "train.py").read_bytes()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_text_takes_the_place_of_a_link_and_leaves_nothing_where_it_fails(tmp_path, monkeypatch, error):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "config.json").symlink_to("mine")
    disk.write_text(tmp_path / "config.json", "new")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "config.json").read_text() == "new"
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(error(errno.ENOSPC, "No space")))
    with pytest.raises(error):
        disk.write_text(tmp_path / "config.json", "newer")
    assert names(tmp_path) == ["config.json", "mine"]


def test_a_text_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").resolve()))
    disk.write_text(tmp_path / "evaluation.json", "new")
    assert [re.fullmatch(disk.TEMPORARY, path.name) is not None for path in flushed] == [True]


# ---- a disk that fails for a while -----------------------------------------------------------------------------------
@pytest.fixture
def saver(tmp_path):
    """A Saver of a small run that has saved step 1."""
    model = Toy()
    saver = saving.Saver(tmp_path, run_folder.lock(tmp_path), model, adamw(model), CONFIG, 1, 0, say=print)
    saver.save(1, {}, wait=True, must=False)
    return saver


def full_disk(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_step_whose_save_failed_is_not_taken_for_saved(saver, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        saver.save(2, {}, wait=True, must=False)
    assert saver.saved_at is None and saver.in_place.name == "step-00000001"
    assert "WARNING: checkpoint at step 2 failed: No space left" in capsys.readouterr().err
    saver.save(2, {}, wait=True, must=True)
    assert saver.saved_at == 2 and saver.in_place.name == "step-00000002"


@pytest.mark.parametrize("wait", [True, False])
def test_a_save_is_tried_though_the_one_before_it_failed_in_its_thread(saver, monkeypatch, wait):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        saver.save(2, {}, wait=False, must=False)
        checkpoint.in_flight[0][0].exception()  # waits for the thread
    assert saver.saved_at == 2  # on its way, as far as anybody knows
    saver.save(3, {}, wait=wait, must=True)
    saver.finish(must=True)
    assert saver.saved_at == 3 and saver.in_place.name == "step-00000003"


def test_an_evaluation_and_a_state_that_find_no_room_cost_a_warning(saver, monkeypatch, capsys):
    monkeypatch.setattr(atomic, "write_text", full_disk)
    saver.note_evaluation(1, 2.0, tokens=5)
    assert "step-00000001 is not noted: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(run_folder, "write_text", full_disk)
    run_folder.write_state(saver.out, "diverged", 1, 2, "python train.py --resume")
    assert "state.json does not say that the run is diverged: No space left" in capsys.readouterr().err


def test_an_old_checkpoint_that_cannot_be_deleted_costs_a_warning_and_the_new_one_is_there(saver, monkeypatch, capsys):
    monkeypatch.setattr(atomic, "remove", full_disk)
    saver.save(2, {}, wait=True, must=True)
    saver.note_evaluation(2, 2.0, tokens=5)
    assert saver.in_place.name == "step-00000002" and atomic.best(saver.out) == saver.in_place
    assert "step-00000001.old, which is not needed, cannot be deleted: No space left" in capsys.readouterr().err


def test_a_disk_that_does_not_answer_whose_the_folder_is_fails_a_save_and_no_run(saver, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "check_ours", full_disk)
    saver.save(2, {}, wait=True, must=False)
    assert saver.saved_at == 1 and "WARNING: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        saver.save(2, {}, wait=True, must=True)


def test_an_evaluation_is_not_written_through_a_link(saver, tmp_path, capsys):
    shutil.move(saver.in_place, tmp_path / "elsewhere")
    saver.in_place.symlink_to("elsewhere")
    saver.note_evaluation(1, 2.0, tokens=5)
    assert not (tmp_path / "elsewhere" / "evaluation.json").exists()
    assert "step-00000001 is a link, and a run writes through none" in capsys.readouterr().err


def test_a_failed_save_names_the_checkpoint_that_is_left_also_where_that_was_being_replaced(saver, monkeypatch, capsys):
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: full_disk() if path.suffix == ".tmp" else rename(path, to))
    saver.save(1, {}, wait=True, must=False)
    assert "; checkpoint step-00000001.old is still there" in capsys.readouterr().err


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_that_stops_after_a_failed_save_saves_its_step_again(work, async_save):
    code = """
import os
import signal
import time
import training.checkpoint
save_file = training.checkpoint.save_file
def fail_once(*args):
    training.checkpoint.save_file = save_file
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)  # in which the run goes on, if it does not wait
    raise OSError(28, "No space left on device")
training.checkpoint.save_file = fail_once
"""
    (work / "model_unlucky.py").write_text((ROOT / "model_baseline.py").read_text() + code)
    out = work / f"unlucky {async_save}"
    result = finish(*start(work, out_dir=out.name, model="unlucky", save_every=2, async_save=async_save))
    assert result.code == 0 and "WARNING: checkpoint at step 2 failed" in result.err
    assert state(out)["state"] == "stopped" and checkpoint.newest(out).name == f"step-{last_step(out):08d}"


# ---- what is beside training -----------------------------------------------------------------------------------------
def test_the_history_that_is_drawn_is_bounded_and_evenly_thinned():
    thinned = pictures.Thinned(most=100)
    for i in range(100_001):
        thinned.add(i)
    items = thinned.items()
    assert len(items) <= 101 and items[0] == 0 and items[-1] == 100_000
    gaps = {b - a for a, b in zip(items, items[1:-1])}
    assert len(gaps) == 1


def test_a_picture_that_fails_costs_a_warning(tmp_path, monkeypatch, capsys):
    rows = [dict(step=1, loss=None), *(dict(step=step, loss=1.0) for step in range(2, 40)), dict(step=39, val_loss=1.0)]
    album = pictures.Album(tmp_path, r"dollar $\b$ y: baseline")
    for row in rows:
        album.add(row)
    album.finish()
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(pictures, "plot_curve", lambda *_: 1 / 0)
    album.draw()
    album.finish()
    assert capsys.readouterr().err.count("no pictures of") == 1


class FullDisk(io.RawIOBase):
    """A file on a disk that is full till `room` says otherwise, and then takes some bytes of each write."""

    def __init__(self):
        self.room = False
        self.bytes = b""

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.bytes += bytes(data[:50])
        return min(len(data), 50)


def test_rows_that_found_no_room_are_written_when_there_is_some(tmp_path, capsys):
    log = metrics.Log(tmp_path, 0, {})
    log.rows.file = FullDisk()
    for step in range(1, 101):
        log.write({"step": step, "loss": float(step), "filler": 200 * "x"})
    log.rows.file.room = True
    log.write({"step": 101})
    assert [json.loads(line)["step"] for line in log.rows.file.bytes.splitlines()] == list(range(1, 102))
    assert capsys.readouterr().err.count("rows wait in memory for room") == 1


def test_rows_that_wait_are_tried_once_more_at_the_end(tmp_path, capsys):
    rows = metrics.Rows(tmp_path / "metrics.jsonl", 0)
    rows.file.close()
    rows.file = FullDisk()
    rows.write({"step": 1})
    rows.file.room = True
    rows.close()
    assert rows.file.bytes == b'{"step": 1}\n' and "lacks its last" not in capsys.readouterr().err


def test_what_is_not_finite_is_null_also_within_a_table(tmp_path):
    log = metrics.Log(tmp_path, 0, {})
    log.write({"step": 1, "loss": math.nan, "load": [[math.inf, 1.0]]})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "load": [[None, 1.0]]}


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_row_of_an_evaluation_that_will_be_done_again_is_dropped(tmp_path, evaluated):
    rows = [{"step": 1, "val_loss": 2.0}, {"step": 2, "ms": 9.0}, {"step": 2, "val_loss": 1.0}, {"step": 3, "ms": 9.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics.Log(tmp_path, 2, {}, evaluated=evaluated).close()
    assert run_folder.read_metrics(tmp_path) == rows[: 3 if evaluated else 2]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_memory_of_a_process_is_counted_in_units_of_1024_bytes():
    peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    assert metrics.peak_gb("cpu") == pytest.approx(peak / 1e9, rel=0.01)


def test_a_service_that_fails_costs_a_warning(tmp_path, capsys):
    log = metrics.Log(tmp_path, 0, {})
    log.services.append(lambda step, numbers: 1 / 0)
    log.write({"step": 1, "loss": 1.0})
    log.write({"step": 2, "loss": 1.0})
    log.close()
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().err.count("a service for metrics failed: ZeroDivisionError") == 1


def test_a_service_that_cannot_be_opened_is_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: open("a\nfile that is nowhere")))
    with pytest.raises(ValueError, match=r"^wandb cannot be opened: FileNotFoundError: .*$"):
        metrics.Log(tmp_path, 0, {}, wandb="offline")


def test_memory_that_runs_out_is_one_line_and_what_is_a_mistake_of_ours_is_not(capsys):
    for make, begins in (
        (lambda: torch.empty(2**60, dtype=torch.uint8), "error: out of memory: "),
        (lambda: torch.empty(2, 3) @ torch.empty(2, 3), "Traceback"),
    ):
        with pytest.raises(RuntimeError) as raised:
            make()
        processes.say_in_one_line(raised.type, raised.value, raised.tb)
        said = capsys.readouterr().err
        assert said.startswith(begins) and (begins == "Traceback") == (said.count("\n") > 1)


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_program_outlasts_the_reader_of_what_it_prints(reader, tmp_path):
    code = "import sys; from training.output import outlast_readers; outlast_readers()\n"
    code += "for i in range(99999): print(i)\nopen(sys.argv[1], 'w').write('came to its end')"
    if reader == "gone":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-c", code, tmp_path / "end"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert done.returncode == 0 and done.stderr == b"" and (tmp_path / "end").read_text() == "came to its end"


def test_spikes_are_known_after_a_resume_by_what_was_before_it(work):
    train(work, "history")
    trainer = json.loads((work / "history" / "step-00000006" / "trainer.json").read_text())
    assert trainer["recent_losses"] == finished(work / "history").losses and len(trainer["recent_norms"]) == 6
    train(work, "history", "--resume", max_steps=8)
    later = json.loads((work / "history" / "step-00000008" / "trainer.json").read_text())
    assert later["recent_losses"] == finished(work / "history").losses


# ---- the same data ---------------------------------------------------------------------------------------------------
def test_data_are_known_by_what_they_hold_and_not_by_how_their_path_is_written(work):
    train(work, "path")
    write_data(work / "data5", 5)
    for spelled in ("./data5", "data5/", str(work / "data5")):
        assert "changed since path/step-00000006 was written" in fail(
            work, "path", "--resume", max_steps=8, data=spelled
        )
    shutil.copytree(work / "data", work / "moved data")
    assert len(train(work, "path", "--resume", max_steps=8, data=work / "moved data").steps) == 8


def test_a_checkpoint_that_knows_more_of_its_machine_goes_on_and_says_so(tmp_path, monkeypatch):
    config = {"model": "baseline", "model_config": {}, "knobs": {"optimizer": "muon"}}
    identity = {"data": "data", "tokenizer": None}
    state = dict(step=1, tokens=2, skipped=0, identity=identity, scaler={}, machine={"device": "cpu", "driver": "5"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "trainer.json").write_text(json.dumps(state))
    monkeypatch.setattr(checkpoint, "restore", lambda *_: None)
    said = []
    assert saving.go_on_from(tmp_path, None, None, None, config, identity, {"device": "cpu"}, said.append) == state
    assert said[0].startswith("changed since the checkpoint: driver: 5 -> None")


# ---- the launcher ----------------------------------------------------------------------------------------------------
def test_a_launcher_that_is_gone_asks_once_to_stop(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        asked = signals.StopSignals()
        assert asked.count() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert asked.count() == 1 and asked.count() == 1 and asked.received == ["torchrun is gone"]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "parallel, environment, command",
    [
        ("none", {}, "python train.py 'a b.py' --resume"),
        ("ddp", {"WORLD_SIZE": "4"}, "torchrun --standalone --nproc_per_node=4 train.py 'a b.py' --resume"),
        ("fsdp", {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "torchrun, with the options that each node was started "
         "with, train.py 'a b.py' --resume"),
    ],
)  # fmt: skip
def test_the_command_that_goes_on_is_that_of_as_many_processes(monkeypatch, parallel, environment, command):
    monkeypatch.setattr(sys, "argv", ["train.py", "a b.py", "--resume=auto", "--overwrite"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_folder.resume_command(parallel) == command


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"model": 3}', "config.json: model is 3, and must be a str"),
        ("[]", "config.json holds a list, and not an object"),
        ('{"a":' + 99_999 * "[", "config.json is damaged, or no JSON"),
        ('{"model": "baseline", "model_config": [], "knobs": {}}', "model_config is [], and must be a dict"),
    ],
)
def test_a_config_of_other_kinds_is_named_with_the_field(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.load_config(tmp_path)
