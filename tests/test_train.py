"""The training script, end to end: every test runs train.py as a process of its own and reads what it leaves behind."""

import hashlib
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hf
import model_baseline
from configurator import resolve
from data.loader import Loader
from data.shards import Shards, write_shard
from data.tokenizers import load_tokenizer
from tests.tiny import ROOT, TINY
from training import checkpoint, pictures, signals
from training.signals import DIVERGED
from training.stages import Plan
from training.stored import Stored

FORK = get_context("forkserver")  # forks of a process that has imported all this: a run starts in a tenth of the time
FORK.set_forkserver_preload([
    "tests.test_train", "tests.test_parallel", "matplotlib.pyplot", "torch._dynamo", "torch.nn.parallel",
    "torch.utils.checkpoint", "distributed.fsdp", "flops", "kernels", "muon",
])  # fmt: skip
PICTURES = {"PICTURES": "yes"}  # for a run that draws its loss at each save, which takes longer than its steps
EOT = 256
SIZES = dict(n_layer=1, n_head=2, n_kv_head=1, head_dim=8, n_embd=16, n_inner=32, block_size=32)
KNOBS = SIZES | dict(batch_tokens=256, micro_batch=4, max_steps=6, warmup_steps=3, eval_every=100, eval_tokens=1000,
                     save_every=100, log_every=5, learning_rate=5e-3)  # fmt: skip


# ---- data, and how train.py is run -----------------------------------------------------------------------------------
def write_data(folder, seed, tokenizer="byte", add_tokens=()):
    """Documents of 1 to 30 made-up words."""
    rng, tokenizer = random.Random(seed), load_tokenizer(tokenizer, add_tokens)
    folder.mkdir()
    for split, count in (("train", 200), ("val", 30)):
        texts = [" ".join(rng.choices("the cat sat on a mat while é rain fell".split(), k=rng.randint(1, 30)))
                 for _ in range(count)]  # fmt: skip
        ids = [i for text in texts for i in [tokenizer.eot_id, *tokenizer.encode(text)]]
        write_shard(folder / f"{split}_000000.bin", np.array(ids), tokenizer.vocab_size)
    meta = {"tokenizer": tokenizer.to_dict(), "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id}
    (folder / "meta.json").write_text(json.dumps({**meta, "fingerprint": f"data {seed}"}))


def altered(folder, name, changes):
    """The folder, with data and with model_<name>.py: the baseline with each (old, new) of its text exchanged."""
    write_data(folder / "data", 0)
    source = (ROOT / "model_baseline.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / f"model_{name}.py").write_text(source)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data and with a variant whose loss a test can spoil, or slow down, from one step to another."""
    return altered(tmp_path_factory.mktemp("work"), "odd", (
        ("from typing import Literal", "from typing import Annotated, Literal"),
        ("    eot_id: int", """    bad_from: int = 0
    bad_to: int = 0
    factor: Annotated[float, "(-inf, inf)"] = 1.0  # of the loss of those training steps
    bad_rank: int = -1  # on this process alone; -1: on all
    sleep: float = 0.0
    bias: float = 0.0  # an auxiliary loss
    eot_id: int"""),
        ("        return F.cross_entropy(self.logits(x).flatten(0, 1)", """        real = type(x) is torch.Tensor
        if self.config.sleep and real:  # a fake one is counted by flops.py
            import time
            print("sleeping", flush=True)
            time.sleep(self.config.sleep)
        self.calls, c = getattr(self, "calls", 0) + self.training, self.config
        import os
        bad = self.training and c.bad_from <= self.calls <= c.bad_to
        factor = c.factor if bad and c.bad_rank in (-1, int(os.environ.get("RANK", -1))) else 1.0
        return c.bias * self.training + factor * F.cross_entropy(self.logits(x).flatten(0, 1)"""),
        ("        cap = self.config.logit_softcap", """        c, calls = self.config, getattr(self, "calls", 0)
        if not self.training and c.factor > 1e30 and c.bad_from <= calls <= c.bad_to:
            logits = logits * c.factor * c.factor
        cap = self.config.logit_softcap"""),
        ("        x = x + self.dropout(self.mlp(", """        Block.forwards = getattr(Block, "forwards", 0) + 1
        x = x + self.dropout(self.mlp("""),
        ("    def new_cache(self", """    def metrics(self):
        return {"calls": float(self.calls), "block_forwards": float(Block.forwards)}

    def new_cache(self"""),
    ))  # fmt: skip


def in_fork(script, argv, folder, out, err, environment):
    """What `python script argv >> out 2>> err` does in the folder, with modules from there as well."""
    for fd, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.argv, sys.dont_write_bytecode = [script, *argv], True
    sys.path[:0] = [str(ROOT), str(folder)]
    os.chdir(folder)
    os.environ.update(environment)
    if "PICTURES" not in environment:
        pictures.plot = lambda *_: None
    if "BACKEND" in environment:
        torch.compile = partial(torch.compile, backend=environment["BACKEND"])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Exception:  # multiprocessing would print it in its own way
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def launch(work, argv, environment=None, script="train.py"):
    """Begins a run in the folder `work`: its process, and where it prints."""
    launch.count += 1
    log = work / f"log{launch.count}"
    for fd in (1, 2):
        Path(f"{log}.{fd}").touch()
    arguments = (script, argv, work, f"{log}.1", f"{log}.2", environment or {})
    process = FORK.Process(target=in_fork, args=arguments, daemon=True)
    process.start()
    return process, log


launch.count = 0


def start(work, *argv, environment=None, **knobs):
    """launch with KNOBS and those given; None leaves one of KNOBS out."""
    knobs = {"data": "data"} | KNOBS | knobs
    flags = [f"--{key}={value}" for key, value in knobs.items() if value is not None]
    return launch(work, [*map(str, argv), *flags], environment)


def finish(process, log, timeout=180):
    process.join(timeout)
    assert process.exitcode is not None, f"still runs after {timeout} s"
    out, err = (Path(f"{log}.{fd}").read_text() for fd in (1, 2))
    return SimpleNamespace(code=process.exitcode, out=out, err=err)


def train(work, out_dir, *argv, **knobs):
    """A run that must end well, into a folder of `work`: its folder, what it printed, its metrics."""
    result = finish(*start(work, *argv, out_dir=out_dir, **knobs))
    assert result.code == 0, result.out + result.err
    return finished(work / out_dir, result.out, result.err)


def finished(folder, out="", err=""):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = ([row for row in rows if key in row] for key in ("loss", "val_loss"))
    return SimpleNamespace(folder=folder, out=out, err=err, rows=rows, steps=steps, evaluations=evaluations,
                           losses=[row["loss"] for row in steps])  # fmt: skip


def fail(work, out_dir, *argv, code=2, **knobs):
    """The one line on stderr of a run that must be refused."""
    result = finish(*start(work, *argv, out_dir=out_dir, **knobs))
    assert result.code == code, result.out + result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    return result.err


def together(work, processes, *argv, **knobs):
    """The same run in several processes, as torchrun would start them: what `start` returns, for each. A knob that is
    a function is called with the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [start(work, *argv, environment={"RANK": str(rank), "LOCAL_RANK": str(rank), **common},
                  **{key: value(rank) if callable(value) else value for key, value in knobs.items()})
            for rank in range(processes)]  # fmt: skip


def wrote(folder, size):
    """Whether metrics.jsonl has more than so many bytes."""
    path = folder / "metrics.jsonl"
    return path.exists() and path.stat().st_size > size


def weights(folder, step, kind="model"):
    """{name: tensor} of a checkpoint, whichever and how many processes wrote it."""
    stored, found = Stored(folder / f"step-{step:08d}", kind), {}
    for name in stored.parts:
        found[name] = torch.empty_like(stored.like(name), device="cpu")
        stored.copy_to(found[name], name)
    return found


def same(run, other, step):
    """Whether weights, optimizer state, and the losses of all steps and evaluations are equal, bit for bit."""
    a, b = (r.folder / f"step-{step:08d}" for r in (run, other))
    timeless = [[{k: row[k] for k in row if k in ("step", "loss", "val_loss", "lr", "grad_norm", "tokens", "skipped")}
                 for row in r.rows] for r in (run, other)]  # fmt: skip
    files = ("model.safetensors", "trainer.safetensors", "trainer.json")
    return timeless[0] == timeless[1] and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


def close(a, b, tolerance=1e-5):
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) <= tolerance


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.01)


LONG = dict(max_steps=30, eval_every=10, save_every=5, keep_last=0, dropout=0.1)


@pytest.fixture(scope="module")
def base(work):
    """30 steps of Muon with dropout, everything on."""
    return train(work, "base", **LONG, tensorboard=True, environment=PICTURES)


def test_saving_beside_the_steps_leaves_the_same_checkpoints(work, base):
    run = train(work, "beside", "--async_save", **LONG)
    assert run.out.count("| saved beside/step-") == 6 and run.out.count("the best so far") > 0
    assert all(same(run, base, step) for step in range(5, 31, 5))


def test_every_nth_checkpoint_is_kept_beside_the_last_and_the_best(work):
    run = train(work, "every", **LONG | dict(keep_last=1, keep_every=10, eval_every=100, save_every=2, max_steps=24))
    assert [path.name for path in checkpoint.folders(run.folder)] == ["step-00000024", "step-00000020", "step-00000010"]


def copy_until(run, folder, step):
    """A run's folder as a kill some steps after `step` would leave it: later rows are there, later checkpoints not."""
    shutil.copytree(run.folder, folder, symlinks=True)
    for path in checkpoint.folders(folder):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


# ---- stop and go on --------------------------------------------------------------------------------------------------
def test_ten_steps_and_a_resume_equal_a_run_that_never_stopped_bit_for_bit(work, base):
    copy_until(base, work / "again", 10)
    with open(work / "again" / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')  # a line cut short
    again = train(work, "again", "--resume", **LONG, tensorboard=True)
    assert "resuming from again/step-00000010" in again.out and again.losses == base.losses
    assert same(again, base, 30)


def test_adamw_without_dropout_resumes_bit_for_bit_too(work):
    knobs = dict(optimizer="adamw", max_steps=8, save_every=3, keep_last=0, eval_every=4)
    whole = train(work, "adamw", **knobs)
    copy_until(whole, work / "adamw2", 3)
    assert same(train(work, "adamw2", "--resume", **knobs), whole, 8)


def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(work, base):
    rng, folder, knobs = random.Random(1), work / "killed", LONG | dict(save_every=2, keep_last=2)
    for kill in range(6):
        resume = ["--resume"] if (folder / "manifest.json").exists() else []
        process, log = start(work, *resume, out_dir="killed", **knobs)
        if kill == 0:  # before there is a checkpoint
            until((folder / "metrics.jsonl").exists)
        elif kill == 1:  # within a save
            while process.is_alive() and not list(folder.glob("*.tmp")):
                pass
        else:  # some steps later
            size = (folder / "metrics.jsonl").stat().st_size + rng.randint(0, 1500)
            until(lambda size=size, process=process: wrote(folder, size) or not process.is_alive())
            time.sleep(rng.uniform(0, 0.03))
        process.kill()
        assert finish(process, log).code in (-signal.SIGKILL, 0)
        assert kill or not checkpoint.folders(folder)
    run = train(work, "killed", "--resume", **knobs)
    assert same(run, base, 30)
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000028", "step-00000030"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_names_the_command_that_resumes(work, number):
    out = f"signal {number.name}"
    process, log = start(work, "--overwrite", out_dir=out, max_steps=10**6, schedule="constant")
    until(lambda: wrote(work / out, 2000))
    os.kill(process.pid, number)
    result = finish(process, log)
    stopped, command = re.search(rf"{number.name}: stopped after step (\d+); go on with  (.*)", result.out).groups()
    assert result.code == 0
    assert ("stopping after this step" in result.err) == (number == signal.SIGINT)  # a person reads it at once
    assert checkpoint.newest(work / out).name == f"step-{int(stopped):08d}"
    python, script, *argv = shlex.split(command)
    assert (python, Path(script).name) == ("python", "train.py") and "--overwrite" not in argv
    more = finish(*start(work, *argv, out_dir=out, max_steps=int(stopped) + 1))
    assert more.code == 0 and f"step-{int(stopped):08d}" in more.out, more.err


def test_a_copy_of_a_signal_is_no_second_wish_and_a_later_ctrl_c_is(work):
    process, log = start(work, out_dir="twice", model="odd", sleep=20.0)
    until(lambda: "sleeping" in Path(f"{log}.1").read_text())
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):  # as a launcher passes them on
        os.kill(process.pid, number)
        process.join(0.2)
    assert process.exitcode is None
    process.join(signals.COPIES)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process, log, 5).code == 128 + signal.SIGINT


def test_a_hangup_saves_and_one_that_nohup_ignores_is_ignored(work):
    for ignored in (False, True):
        out = f"hangup {ignored}"
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN) if ignored else None
        command = [sys.executable, ROOT / "train.py", f"--out_dir={out}", "--data=data"]
        command += [f"--{key}={value}" for key, value in (KNOBS | dict(max_steps=10**6, schedule="constant")).items()]
        process = subprocess.Popen(command, cwd=work, stdout=-1, stderr=-1, text=True)
        if ignored:
            signal.signal(signal.SIGHUP, handler)
        until(lambda out=out: wrote(work / out, 2000))
        process.send_signal(signal.SIGHUP)
        if ignored:
            size = (work / out / "metrics.jsonl").stat().st_size
            until(lambda out=out, size=size: wrote(work / out, size + 2000))
            process.terminate()
        assert f"{'SIGTERM' if ignored else 'SIGHUP'}: stopped after step" in process.communicate(timeout=30)[0]
        assert process.returncode == 0 and checkpoint.newest(work / out)


@pytest.mark.xdist_group("processes")
def test_two_processes_stop_after_the_same_step_where_one_gets_the_signal(work):
    runs = together(work, 2, out_dir="two", max_steps=10**6, schedule="constant")
    until(lambda: wrote(work / "two", 2000))
    os.kill(runs[1][0].pid, signal.SIGTERM)
    main, other = (finish(*run) for run in runs)
    assert (main.code, other.code) == (0, 0), main.err + other.err
    step = int(
        re.search(
            r"signal: stopped after step (\d+); go on with  torchrun --standalone --nproc_per_node=2 /.*train.py ",
            main.out,
        )[1]
    )
    assert checkpoint.newest(work / "two").name == f"step-{step:08d}" and not other.out
    assert finished(work / "two").steps[-1]["step"] == step


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_torchrun_trains_and_stops_on_a_signal_and_one_process_goes_on(work, number):
    out_dir = f"torchrun {number.name}"
    knobs = dict(data="data", out_dir=out_dir, schedule="constant") | KNOBS
    argv = [f"--{key}={value}" for key, value in knobs.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", ROOT / "train.py"]  # fmt: skip
    process = subprocess.Popen([*command, *argv, "--max_steps=1000000"], cwd=work, stdout=-1, stderr=-1, text=True)
    until(lambda: wrote(work / out_dir, 2000))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    step = int(re.search(rf"{number.name}: stopped after step (\d+)", out)[1])
    assert checkpoint.newest(work / out_dir).name == f"step-{step:08d}"
    more = train(work, out_dir, "--resume", schedule="constant", max_steps=step + 2)
    assert [row["step"] for row in more.steps] == list(range(1, step + 3))


# ---- the same numbers, however they are computed ---------------------------------------------------------------------
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("masks", [False, True])
def test_losses_do_not_depend_on_micro_batch_or_the_number_of_processes(work, masks):
    knobs = dict(document_mask=masks, mask_document_crossing=masks, document_start_probability=0.4 * masks)
    one = train(work, f"one{masks}", micro_batch=8, **knobs)
    small = train(work, f"small{masks}", micro_batch=3, **knobs)
    results = [finish(*run) for run in together(work, 2, out_dir=f"both{masks}", micro_batch=3, **knobs)]
    assert [result.code for result in results] == [0, 0], results
    both = finished(work / f"both{masks}")
    if masks:
        loader = Loader(Shards(work / "data", "train"), 32, 8, 1, micro_batch=3, document_start_probability=0.4,
                        mask_document_crossing=True)  # fmt: skip
        assert len({(y >= 0).sum(dim=1).float().mean().item() for _, y in loader.batches(0)}) > 1
    for run in (small, both):
        for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
            assert close(*([row[key] for row in r.rows if key in row] for r in (run, one))), key
        for name, tensor in weights(one.folder, 6).items():
            torch.testing.assert_close(weights(run.folder, 6)[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.xdist_group("processes")
def test_two_processes_train_experts_like_one(work):
    """The loads that balance loss and biases go by are those of all processes, and so are targets and padding."""
    knobs = dict.fromkeys(SIZES) | TINY["moe"] | dict(block_size=32, vocab_size=0, bias_rate=0.01, micro_batch=8)
    knobs |= dict(document_mask=True, mask_document_crossing=True, z_loss=0.1)
    config = ROOT / "config" / "train_moe.py"
    one = train(work, "experts1", config, **knobs)
    results = [finish(*run) for run in together(work, 2, config, out_dir="experts2", **knobs)]
    assert [result.code for result in results] == [0, 0], results
    both = finished(work / "experts2")
    for key in ("loss", "grad_norm", "balance_loss", "z_loss", "load_entropy_1", "load_violation", "val_loss"):
        assert close(*([row[key] for row in r.rows if key in row] for r in (one, both))), key
    for name, tensor in weights(one.folder, 6).items():
        torch.testing.assert_close(weights(both.folder, 6)[name], tensor, atol=1e-5, rtol=0)


def test_losses_gradient_norms_and_weights_equal_those_of_a_plain_loop(work):
    knobs = dict(optimizer="adamw", grad_clip=0.3, weight_decay=0.2, micro_batch=3, schedule="constant")
    run = train(work, "plain", **knobs)
    torch.manual_seed(1)
    model = model_baseline.GPT(model_baseline.GPTConfig(vocab_size=320, **SIZES))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": [p for p in model.parameters() if p.ndim < 2]}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    loader = Loader(Shards(work / "data", "train"), 32, 8, seed=1)
    for step, row in enumerate(run.steps):
        ((x, y),) = loader.batches(step)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        assert abs(row["loss"] - loss.item()) < 1e-5 and abs(row["grad_norm"] - norm) < 1e-5
        for p, g in zip(model.parameters(), gradients):
            p.grad = g * min(1.0, 0.3 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 4)
        optimizer.step()
    assert min(row["grad_norm"] for row in run.steps) > 0.3
    saved = weights(run.folder, 6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(saved[name], p.detach(), atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_no_loss_and_recomputes(work):
    knobs = dict(dropout=0.2, model="odd")
    plain, recomputed = (train(work, f"recompute{on}", gradient_checkpointing=on, **knobs) for on in (False, True))
    assert recomputed.losses == plain.losses
    once, twice = ([row["block_forwards"] for row in run.steps] for run in (plain, recomputed))
    assert twice[5] - twice[0] == 2 * (once[5] - once[0]) == 20  # 5 steps of 2 micro-batches


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_to_float32_and_resumes_bit_for_bit(work, dtype):
    knobs = dict(max_steps=20, save_every=15, keep_last=0)
    single, half = train(work, f"single for {dtype}", **knobs), train(work, dtype, dtype=dtype, **knobs)
    assert half.losses != single.losses and close(half.losses, single.losses, 0.05)
    assert bool(json.loads((half.folder / "step-00000015/trainer.json").read_text())["scaler"]) == (dtype == "float16")
    copy_until(half, work / f"{dtype} again", 15)
    assert same(train(work, f"{dtype} again", "--resume", dtype=dtype, **knobs), half, 20)
    copy_until(single, work / f"{dtype} instead", 15)
    other = train(work, f"{dtype} instead", "--resume", dtype=dtype, **knobs)
    assert "changed since the checkpoint: dtype: auto -> " + dtype in other.out


def test_a_compiled_run_has_the_losses_of_an_eager_one(work):
    knobs = dict(max_steps=2, eval_every=2, save_every=2)
    eager = train(work, "eager", **knobs)
    compiled = train(work, "compiled", compile=True, environment={"BACKEND": "aot_eager"}, **knobs)
    assert "float32, compiled" in compiled.out and close(compiled.losses, eager.losses)
    assert weights(compiled.folder, 2).keys() == weights(eager.folder, 2).keys()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_a_run_compiled_to_machine_code_has_the_losses_of_an_eager_one(work):
    knobs = dict(max_steps=2, eval_every=2, save_every=2)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    eager = train(work, "eager too", **knobs)
    compiled = train(work, "machine code", compile=True, environment=cache, **knobs)
    assert any((work / "inductor").rglob("*.so")) and close(compiled.losses, eager.losses)


def test_a_run_with_kernels_has_the_losses_of_one_without(work):
    knobs = dict(max_steps=2, eval_every=2, save_every=2, eval_tokens=64, head_dim=16)
    plain = train(work, "without kernels", **knobs)
    fused = train(work, "with kernels", "--kernels", environment={"TRITON_INTERPRET": "1"}, **knobs)
    assert "1 x norm_rope" in fused.out and "PyTorch instead" not in fused.out + fused.err
    assert fused.losses != plain.losses and close(fused.losses, plain.losses)
    assert weights(fused.folder, 2).keys() == weights(plain.folder, 2).keys()


# ---- schedules -------------------------------------------------------------------------------------------------------
def test_the_learning_rate_warms_up_and_follows_a_cosine(base):
    rates = [row["lr"] for row in base.steps]
    expected = [5e-3 * n / 4 for n in (1, 2, 3)] + [2.5e-3 * (1 + math.cos(math.pi * n / 27)) for n in range(27)]
    assert close(rates, expected, 1e-12)


@pytest.mark.parametrize(
    ("shape", "end"),
    [("linear", [1.0, 0.75, 0.5, 0.25]), ("sqrt", [1.0, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5]),
     ("cosine", [1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]), (None, [1.0] * 4)],
)  # fmt: skip
def test_wsd_is_constant_then_falls_and_constant_does_not_and_both_scale_with_the_batch(work, shape, end):
    knobs = dict(schedule="wsd", decay_shape=shape) if shape else dict(schedule="constant")
    run = train(work, f"wsd {shape}", max_steps=10, decay_fraction=0.4, warmup_steps=1, min_lr=1e-3, lr_batch_tokens=64,
                learning_rate=0.01, **knobs)  # fmt: skip
    expected = [0.01] + [0.02] * 5 + [1e-3 + (0.02 - 1e-3) * left for left in end]  # 0.02 = 0.01 * sqrt(256 / 64)
    assert close([row["lr"] for row in run.steps], expected, 1e-12)


@pytest.mark.parametrize(("tied", "left"), [(True, 1 - 0.04 * 0.5 / 1000), (False, 1 - 0.04 * 0.5)])
def test_weight_decay_follows_the_schedule_or_does_not(work, tied, left):
    run = train(work, f"tied {tied}", max_steps=1, warmup_steps=999, learning_rate=0.04, weight_decay=0.5,
                decay_with_lr=tied)  # fmt: skip
    torch.manual_seed(1)
    first = model_baseline.GPT(model_baseline.GPTConfig(vocab_size=320, **SIZES)).blocks[0].mlp.w_up.weight.detach()
    last = weights(run.folder, 1)["blocks.0.mlp.w_up.weight"]
    assert abs((last * first).sum() / first.square().sum() - left) < 2e-3  # the update itself is 1000 times smaller


# ---- what goes wrong while it runs -----------------------------------------------------------------------------------
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(work):
    run = train(work, "nan", model="odd", micro_batch=8, bad_from=3, bad_to=5, factor=1e38, save_every=1,
                keep_last=0, eval_every=1)  # fmt: skip
    assert [row["skipped"] for row in run.steps] == [0, 0, 1, 2, 3, 3]
    assert [row["loss"] is None for row in run.steps] == [False, False, True, True, True, False]
    assert run.out.count("skipped, ") == 3
    assert [row["step"] for row in run.evaluations if row["val_loss"] is None] == [3, 4, 5]
    assert (run.folder / "best").resolve().name == "step-00000006"  # though nothing is less than NaN
    before, after, later = (weights(run.folder, n) for n in (2, 5, 6))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not all(torch.equal(before[k], later[k]) for k in before)


def test_a_skipped_step_leaves_nothing_in_the_counts_of_the_next(work):
    sizes = dict.fromkeys(SIZES) | TINY["moe"] | dict(block_size=32, vocab_size=0, log_every=1, max_steps=3)
    run = train(work, "skipped experts", model="moe", z_loss=1e38, **sizes)
    assert [row["skipped"] for row in run.steps] == [1, 2, 3]
    assert [sum(map(sum, row["expert_load"])) for row in run.steps] == [256 * 2] * 3  # tokens, choices of each


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(work):
    message = fail(work, "dead", model="odd", micro_batch=8, bad_from=4, bad_to=99, factor=1e38, max_skipped=3,
                   save_every=3, max_steps=50, code=DIVERGED)  # fmt: skip
    assert "3 steps in a row" in message and "dead/step-00000003" in message and "learning_rate" in message
    assert len(finished(work / "dead").steps) == 6


def test_a_loss_spike_is_flagged_and_a_clean_run_has_none(work, base):
    assert len(base.steps) == 30 and not any(row["spikes"] for row in base.steps) and "SPIKE" not in base.out
    run = train(
        work, "spike", model="odd", micro_batch=8, bad_from=25, bad_to=25, factor=5.0, max_steps=30, learning_rate=1e-9
    )  # fmt: skip  so that losses go up and down around their mean
    assert {row["step"]: row["spikes"] for row in run.steps if row["spikes"]} == {25: ["loss", "grad_norm"]}
    assert run.out.count("SPIKE in loss and grad_norm") == 1


@pytest.fixture
def small_disk(tmp_path):
    code = sum(path.stat().st_size + 4096 for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])  # a run keeps it
    size = f"size={code + 500_000}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path])


def test_a_full_disk_stops_no_run_before_its_end_and_loses_no_checkpoint(work, small_disk):
    knobs = dict(max_steps=12, save_every=1)
    result = finish(*start(work, out_dir=small_disk / "run", keep_last=0, **knobs))
    warnings, last = result.err.splitlines()[:-1], result.err.splitlines()[-1]
    assert result.code == 2 and "Traceback" not in result.err, result.err
    assert warnings and all(line.startswith("WARNING: ") for line in warnings)
    assert re.match(r"error: checkpoint at step 12 failed: No space left .* checkpoint step-\d+ is still there", last)
    assert [row["step"] for row in finished(small_disk / "run").steps] == list(range(1, 13))
    *old, newest = sorted(small_disk.glob("run/step-*"))
    assert not any(checkpoint.verify(path) for path in [*old, newest])
    for path in old:
        shutil.rmtree(path)
    train(work, small_disk / "run", "--resume", keep_last=1, **knobs)
    whole = train(work, "roomy", max_steps=12)
    assert same(finished(small_disk / "run"), whole, 12)


# ---- evaluation and the record ---------------------------------------------------------------------------------------
def test_validation_loss_and_bits_per_byte_equal_a_sum_over_single_tokens(work, base):
    torch.manual_seed(1)
    model = model_baseline.GPT(model_baseline.GPTConfig(vocab_size=320, **SIZES)).eval()
    tokens = Shards(work / "data", "val").read(0, 1001).tolist()
    for row in (base.evaluations[0], base.evaluations[-1]):
        if row["step"]:
            model.load_state_dict(weights(base.folder, row["step"]))
        nats = []
        for i in range(1000):  # the prediction of token i + 1 from what its window of 32 holds before it
            with torch.no_grad():
                logits = model(torch.tensor([tokens[i - i % 32 : i + 1]]))[0, -1]
            nats.append(-logits.double().log_softmax(0)[tokens[i + 1]].item())
        text = [n for n, token in zip(nats, tokens[1:]) if token != EOT]
        assert len(text) < 1000
        assert abs(row["val_loss"] - sum(nats) / 1000) < 1e-5
        assert abs(row["val_bits_per_byte"] - sum(text) / math.log(2) / len(text)) < 1e-5


def test_published_shards_without_a_tokenizer_train_and_have_no_bits_per_byte(work):
    shutil.copytree(work / "data", work / "published")
    (work / "published" / "meta.json").unlink()
    run = train(work, "no meta", data="published", max_steps=1)
    assert weights(run.folder, 1)["embed.weight"].shape == (50304, 16) and "n/a bits per byte" in run.out
    assert run.evaluations[-1]["val_loss"] > 0 and run.evaluations[-1]["val_bits_per_byte"] is None


def test_auxiliary_losses_are_in_the_training_loss_and_never_in_the_validation_loss(work):
    plain, aux = (train(work, f"aux {bias}", model="odd", bias=bias) for bias in (0.0, 3.0))
    assert close(aux.losses, [loss + 3 for loss in plain.losses])
    assert aux.evaluations[-1]["val_loss"] == plain.evaluations[-1]["val_loss"]


def test_best_is_the_checkpoint_with_the_lowest_validation_loss_and_keep_last_keeps_it(work):
    run = train(
        work,
        "best",
        max_steps=8,
        save_every=1,
        eval_every=1,
        keep_last=2,
        model="odd",
        micro_batch=8,
        bad_from=1,
        bad_to=8,
        factor=-1.0,
        learning_rate=0.05,
    )  # fmt: skip  uphill from the first step on
    first, *losses = [row["val_loss"] for row in run.evaluations]
    best = 1 + losses.index(min(losses))
    assert best < 7 and first < min(losses)
    assert (run.folder / "best").resolve().name == f"step-{best:08d}"
    assert (run.folder / "latest").resolve().name == "step-00000008"
    kept = [f"step-{step:08d}" for step in (best, 7, 8)]
    assert sorted(path.name for path in run.folder.glob("step-*")) == kept


def test_every_step_has_every_field(base):
    fields = "step loss smoothed_loss lr grad_norm ms tokens_per_second mfu memory_gb resident_gb tokens skipped spikes"
    assert [list(row) for row in base.steps] == [fields.split()] * 30
    for n, row in enumerate(base.steps, 1):
        assert (row["step"], row["tokens"], row["mfu"], row["spikes"]) == (n, 256 * n, None, [])
        assert abs(row["tokens_per_second"] - 256 / row["ms"] * 1000) < 1e-3 and 0.05 < row["memory_gb"] < 10
        assert 0.05 < row["resident_gb"] <= row["memory_gb"] * 1.05
    assert [row["step"] for row in base.evaluations] == [0, 10, 20, 30]
    assert base.losses[-1] < base.losses[0] - 1
    line = re.search(r"step     30/30 \| loss (.*)", base.out)[1]
    learned = r"\S+ \(smoothed \S+\) \| lr \S+ \| norm \S+"
    assert re.fullmatch(learned + r" \| \d+ ms \| [\d,]+ tokens/s \| mfu n/a \| \S+ GB \| eta 0:00", line)


def test_metrics_of_the_model_are_logged_with_each_step(work):
    assert [row["calls"] for row in train(work, "calls", model="odd", micro_batch=8).steps] == [1, 2, 3, 4, 5, 6]


def test_loss_png_is_a_picture_and_source_is_the_code(base):
    assert (base.folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    drawn, noted = ((base.folder / name).stat().st_mtime_ns for name in ("loss.png", "metrics.jsonl"))
    assert drawn > noted  # the last evaluation is in it
    for name in ("train.py", "model_baseline.py", "muon.py", "data/shards.py"):
        assert (base.folder / "source" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (base.folder / "source" / "model_gpt2.py").exists()


def test_the_manifest_says_what_a_repetition_needs(work, base):
    manifest = json.loads((base.folder / "manifest.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", manifest["git_commit"]) or not (ROOT / ".git").exists()
    assert manifest["command"][1].endswith("train.py") and "--max_steps=30" in manifest["command"]
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["host"]["cores"] == os.cpu_count()
    hardware = dict(device="cpu", processes=1, parallel="none", dtype="float32", compile=False, peak_flops=None)
    assert manifest["hardware"] == hardware
    assert manifest["seed"] == 1 and manifest["data_fingerprint"] == "data 0" and len(manifest["tokenizer"]) == 64
    assert manifest["parameters"] == sum(t.numel() for t in weights(base.folder, 30).values())
    assert manifest["flops_per_token"] > 6 * manifest["parameters"] and manifest["tokens"] == 30 * 256
    assert manifest["config"] == json.loads((base.folder / "config.json").read_text())
    assert manifest["config"]["knobs"]["max_steps"] == 30 and manifest["config"]["model_config"]["n_embd"] == 16


def test_a_runs_config_py_given_back_repeats_its_losses(work, base):
    result = finish(*launch(work, ["base/config.py", "--out_dir=repeat"]))
    assert result.code == 0, result.err
    assert same(finished(work / "repeat"), base, 30)


def test_tensorboard_scalars_read_back_each_step_once_also_after_a_resume(work, base):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    copy_until(base, work / "board", 10)
    train(work, "board", "--resume", **LONG, tensorboard=True)
    for folder in (base.folder, work / "board"):
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        points = [(event.step, event.value) for event in events.Scalars("loss")]
        assert points == [(row["step"], pytest.approx(row["loss"])) for row in base.steps]
        assert [event.step for event in events.Scalars("val_loss")] == [0, 10, 20, 30]


def test_wandb_offline_writes_a_run_without_network_or_key(work):
    pytest.importorskip("wandb")
    knobs = dict(data="data", out_dir="wandb_run", wandb="offline") | KNOBS
    argv = [f"--{key}={value}" for key, value in knobs.items()]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run([sys.executable, ROOT / "train.py", *argv], cwd=work, env=environment, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    if "wandb-core" in done.stderr and done.returncode:
        pytest.skip("wandb's core cannot start here")
    assert done.returncode == 0, done.stderr
    (record,) = (work / "wandb_run" / "wandb").glob("offline-run-*/*.wandb")
    assert record.stat().st_size > 1000 and b"val_bits_per_byte" in record.read_bytes()
    assert len(finished(work / "wandb_run").steps) == 6


def test_wandb_without_a_key_is_refused_in_one_line(work):
    pytest.importorskip("wandb")
    environment = {"HOME": str(work), "WANDB_API_KEY": "", "WANDB_SILENT": "true"}
    result = finish(*start(work, out_dir="keyless", wandb="online", environment=environment))
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("error: wandb=online")
    assert not (work / "keyless").exists()


# ---- bad input -------------------------------------------------------------------------------------------------------
NOT_GPT2 = dict(n_kv_head=None, head_dim=None, n_inner=None)
REFUSED = {
    "unknown key": (dict(learnign_rate=1), "did you mean 'learning_rate'"),
    "wrong choice": (dict(schedule="linear"), "schedule=linear: try one of cosine, wsd, constant"),
    "no size": (dict(micro_batch=0), "micro_batch=0: try 1 or more"),
    "negative": (dict(grad_clip=-1), "grad_clip=-1: try 0 or more"),
    "dead knob": (dict(rope_factor=4), "rope_factor=4.0 does nothing while rope_scaling=none: change that, or give"),
    "two ends": (dict(eot_id=5, document_mask=True), "eot_id=5, and document_mask sets it to 256: give one of them"),
    "end": (dict(eot_id=320), "eot_id=320 is no token of a vocabulary of 320: try 0 to 319"),
    "heads": (dict(n_kv_head=3, n_head=4), "n_head=4 is not divisible by n_kv_head=3"),
    "gpt2": (dict(model="gpt2", n_head=3) | NOT_GPT2, "n_embd=16 is not divisible by n_head=3: try 15 or 18"),
    "batch": (dict(batch_tokens=250), "250 is not a multiple of block_size=32 times 1 processes: try 224 or 256"),
    "vocabulary": (dict(vocab_size=100), "vocab_size=100 is smaller than that of data, 257"),
    "no data": (dict(data="nowhere"), "nowhere not found: make it with  python data/prepare.py"),
    "no device": (dict(device="cuda:99"), "device=cuda:99 is not here: try device=cpu or device=auto"),
    "odd device": (dict(device="meta"), "device=meta is none of cuda, cuda:1, mps and cpu: try device=auto"),
    "long window": (dict(block_size=65536, batch_tokens=65536), "use a smaller block_size or more text"),
    "alone": (dict(resume=True), "--resume given but no checkpoint in refused"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_that_says_what_to_do(work, case):
    knobs, message = REFUSED[case]
    assert message in fail(work, "refused", **knobs)
    assert not (work / "refused").exists()


def test_a_run_without_a_folder_is_refused(work):
    assert "out_dir is empty, and a run needs a folder of its own" in fail(work, "")


@pytest.mark.xdist_group("processes")
def test_a_batch_that_does_not_divide_by_the_processes_is_refused_with_numbers_to_try(work):
    results = [finish(*run) for run in together(work, 2, out_dir="odd batch", batch_tokens=32 * 7)]
    assert all(result.code and "32 times 2 processes: try 192 or 256" in result.err for result in results)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_above_the_vocabulary_in_what_is_read_first_is_refused_before_a_folder_is_touched(work, base, split):
    folder = work / f"foreign token in {split}"
    shutil.copytree(work / "data", folder)
    ids = Shards(folder, split).read(0, 2000).astype(np.int64)
    ids[::20] = 60000
    write_shard(folder / f"{split}_000000.bin", ids, 65536)
    copy_until(base, work / f"begun {split}", 10)
    for out, argv in ((f"new {split}", ()), (f"begun {split}", ("--overwrite",))):
        message = fail(work, out, *argv, data=folder.name)
        assert f"{split}_000000.bin: token 60000 >= vocab_size 257" in message
    assert not (work / f"new {split}").exists()
    assert checkpoint.newest(work / f"begun {split}").name == "step-00000010"


def test_a_token_above_the_vocabulary_that_comes_later_is_one_line_too(work):
    shutil.copytree(work / "data", work / "foreign token")
    for split in ("train", "val"):  # the second is met first, at step 0
        ids = Shards(work / "data", split).read(0, 2000).astype(np.int64)
        ids[500] = 60000
        write_shard(work / "foreign token" / f"{split}_000000.bin", ids, 65536)
        message = fail(work, "later", "--overwrite", data="foreign token", max_steps=12)
        assert f"{split}_000000.bin: token 60000 >= vocab_size 257" in message


def test_a_damaged_shard_is_refused_by_name(work):
    damages = {"empty": lambda b: b"", "short": lambda b: b[:-100], "magic": lambda b: b"x" * 8 + b[8:]}
    for name, damage in damages.items():
        shutil.copytree(work / "data", work / name)
        path = work / name / "train_000000.bin"
        path.write_bytes(damage(path.read_bytes()))
        expected = {"empty": "empty or truncated", "short": "truncated", "magic": "bad magic"}[name]
        message = fail(work, "damaged", data=name)
        assert f"{name}/train_000000.bin" in message and expected in message


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(work, base):
    def digest():
        files = sorted(path for path in base.folder.rglob("*") if path.is_file() and path.name != ".lock")
        return [(path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]

    before = digest()
    message = fail(work, "base")
    assert "base already holds a run" in message and "--resume" in message and "--overwrite" in message
    assert digest() == before


def test_overwrite_deletes_the_run_and_no_other_file(work, base):
    copy_until(base, work / "over", 30)
    mine = ["notes.txt", "step-by-step.md", "config.yaml", "step-1/x", "metrics.jsonl.bak", "latest.txt"]
    for name in mine:
        (work / "over" / name).parent.mkdir(exist_ok=True)
        (work / "over" / name).write_text("mine")
    (work / "over" / "loss.png").unlink()
    run = train(work, "over", "--overwrite")
    assert all((work / "over" / name).read_text() == "mine" for name in mine)
    assert [path.name for path in checkpoint.folders(run.folder)] == ["step-00000006"] and len(run.steps) == 6
    assert not (run.folder / "tensorboard").exists()


def test_a_folder_of_something_else_is_never_written_over(work):
    folder = work / "something"
    (folder / "source").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"name": "an extension for a browser"}')
    for argv in ((), ("--overwrite",), ("--resume",)):
        assert "something is no run, and holds source, manifest.json" in fail(work, "something", *argv)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "source"]


def test_a_checkpoint_of_another_model_shape_optimizer_or_data_is_refused(work, base):
    copy_until(base, work / "mix", 10)
    write_data(work / "data2", 2)
    write_data(work / "data3", 2, add_tokens=["<|x|>"])
    assert "checkpoint n_embd=16, config n_embd=32" in fail(work, "mix", "--resume", n_embd=32)
    assert "checkpoint model=baseline, config model=odd" in fail(work, "mix", "--resume", model="odd")
    assert "the state of optimizer=muon" in fail(work, "mix", "--resume", optimizer="adamw")
    assert "data3 has another tokenizer" in fail(work, "mix", "--resume", data="data3")
    shutil.move(work / "data", work / "kept")
    shutil.copytree(work / "data2", work / "data")
    try:
        assert "data changed since mix/step-00000010 was written" in fail(work, "mix", "--resume")
    finally:
        shutil.rmtree(work / "data")
        shutil.move(work / "kept", work / "data")
    assert same(train(work, "mix", "--resume", **LONG), base, 30)


def test_a_damaged_newest_checkpoint_is_passed_over_with_the_reason(work, base):
    copy_until(base, work / "damaged run", 15)
    path = work / "damaged run" / "step-00000015" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (work / "damaged run" / "step-00000020.tmp").mkdir()
    run = train(work, "damaged run", "--resume", **LONG)
    assert "skipping step-00000015: model.safetensors: sha256 mismatch" in run.out
    assert "skipping step-00000020.tmp: incomplete" in run.out and "resuming from damaged run/step-00000010" in run.out
    assert same(run, base, 30) and not checkpoint.verify(path.parent)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(work, base):
    copy_until(base, work / "lost", 10)
    for path in checkpoint.folders(work / "lost"):
        (path / "trainer.json").write_text("{")
    result = finish(*start(work, "--resume", out_dir="lost", **LONG))
    assert result.code == 2 and "error: no valid checkpoint in lost (2 found, all rejected)" in result.err


def test_a_finished_run_resumed_does_nothing_and_with_more_steps_goes_on(work, base):
    copy_until(base, work / "longer", 30)
    again = train(work, "longer", "--resume", **LONG)
    assert same(again, base, 30) and "another order" not in again.out
    longer = train(work, "longer", "--resume", **LONG | dict(max_steps=32, learning_rate=1e-3, seed=2))
    assert "so the text comes in another order" in longer.out
    assert [row["step"] for row in longer.steps] == list(range(1, 33))
    assert "changed since the checkpoint: learning_rate: 0.005 -> 0.001" in longer.out
    assert abs(longer.steps[-1]["lr"] - 5e-4 * (1 + math.cos(math.pi * 28 / 29))) < 1e-12


def test_the_load_of_experts_is_logged_and_drawn(work):
    sizes = dict(model="moe", n_layer=2, n_expert=4, n_expert_per_token=2, n_expert_inner=8)
    run = train(work, "moe", **sizes, log_every=2, environment=PICTURES)
    logged = [row for row in run.steps if "expert_load" in row]
    assert [row["step"] for row in logged] == [2, 4, 6]
    assert all(np.array(row["expert_load"]).sum(axis=1).tolist() == [2 * 256, 2 * 256] for row in logged)
    assert (run.folder / "metrics-expert_load.png").read_bytes()[:4] == b"\x89PNG"
    assert not (work / "base" / "metrics-expert_load.png").exists()


# Those that go on from a trained model: see test_configs.py, and tests of the commands that they are for.
CONFIGS = [path.name for path in sorted((ROOT / "config").glob("*.py")) if "\ninit_from" not in path.read_text()]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_at_a_tiny_size(work, name):
    path = ROOT / "config" / name
    model = re.search(r'^model = "(\w+)"', path.read_text(), flags=re.M)
    sizes = dict.fromkeys(SIZES) | TINY[model[1] if model else "baseline"]
    sizes |= dict(block_size=32, vocab_size=0, stages={})  # stages: see test_configs.py
    run = train(work, f"config {name}", path, **sizes, max_steps=2, warmup_steps=0)
    assert len(run.losses) == 2  # also where a config has minutes: the command line says more
    assert run.losses[1] < run.losses[0] + 0.5


# ---- a start from trained weights, and a length from the clock -------------------------------------------------------
def test_a_run_starts_from_the_weights_of_another_with_its_sizes_and_a_new_optimizer(work, base):
    run = train(work, "fine", "--init_from=base", max_steps=2, learning_rate=1e-30, weight_decay=0.0, save_every=1)
    assert run.steps[0]["step"] == 1 and run.evaluations[0]["val_loss"] == base.evaluations[-1]["val_loss"]
    start, end = weights(base.folder, 30), weights(run.folder, 2)
    assert all(torch.equal(start[name], end[name]) for name in start)
    saved = json.loads((run.folder / "config.json").read_text())
    assert saved["model_config"]["dropout"] == 0.1  # the base's, not GPTConfig's
    again = train(work, "fine", "--init_from=base", "--resume", max_steps=3, learning_rate=1e-30, weight_decay=0.0)
    assert "resuming from fine/step-00000002" in again.out and "starting with" not in again.out


def test_a_start_takes_a_longer_context_and_names_every_other_difference(work, base):
    bare = {key: None for key in SIZES}
    longer = train(work, "longer context", "--init_from=base", **bare | dict(block_size=64, max_steps=1, dropout=0.0))
    assert json.loads((longer.folder / "config.json").read_text())["model_config"]["n_embd"] == 16
    message = fail(work, "odd", "--init_from=base", **bare | dict(n_inner=48, qk_norm=False, max_steps=1))
    assert "n_inner=48, not 32; qk_norm=False, not True" in message
    message = fail(work, "odd", "--init_from=base", **bare | dict(block_size=16, max_steps=1))
    assert "block_size=16, which is less than 32" in message
    assert "model=gpt2" in fail(
        work, "odd", "--init_from=base", "--model=gpt2", **bare | dict(n_head=2, n_embd=16, block_size=32)
    )
    assert "has no config.json" in fail(work, "odd", "--init_from=nowhere")


def test_a_run_starts_from_a_hugging_face_folder(work, base):
    model, _ = checkpoint.load_model(base.folder)
    hf.save(model, work / "their folder")
    run = train(work, "from theirs", "--init_from=their folder", **{key: None for key in SIZES} | dict(max_steps=1))
    assert run.evaluations[0]["val_loss"] == pytest.approx(base.evaluations[-1]["val_loss"], abs=1e-5)


def test_minutes_set_max_steps_once_and_change_nothing_else(work):
    knobs = dict(eval_every=10**6, save_every=10, keep_last=0, max_steps=None, dropout=0.1)
    run = train(work, "minutes", minutes=0.02, **knobs)
    steps = run.steps[-1]["step"]
    assert json.loads((run.folder / "config.json").read_text())["knobs"]["max_steps"] == steps > 10
    assert f"max_steps={steps} on this machine" in run.out
    plain = train(work, "no minutes", **knobs | dict(max_steps=steps))
    assert same(run, plain, steps)
    copy_until(run, work / "minutes again", 10)
    again = train(work, "minutes again", "--resume", minutes=0.02, **knobs)
    assert "on this machine" not in again.out and same(again, plain, steps)
    assert "give one of them" in fail(work, "both", minutes=0.02, max_steps=5)


def test_micro_batches_without_a_target_count_nothing_and_an_evaluation_without_any_is_refused(work):
    folder = work / "empty documents"
    write_data(folder, 0)
    words = Shards(folder, "train").read(0, 2000)
    ids = np.concatenate([np.full(2000, EOT), words])
    vocab_size = json.loads((folder / "meta.json").read_text())["vocab_size"]
    write_shard(folder / "train_000000.bin", ids, vocab_size)
    knobs = dict(data="empty documents", mask_document_crossing=True, max_steps=12)
    one, eight = (train(work, f"empty {n}", micro_batch=n, **knobs) for n in (1, 8))
    assert None not in one.losses and close(one.losses, eight.losses)
    write_shard(folder / "val_000000.bin", np.full(500, EOT), vocab_size)
    (folder / "meta.json").write_text(
        json.dumps(json.loads((folder / "meta.json").read_text()) | {"targets": [0, 256]})
    )
    assert "no token of the validation split is a target" in fail(work, "no targets", **knobs)
    assert (work / "no targets" / "manifest.json").exists()
    train(work, "no targets", max_steps=1)  # a run that died before its first step blocks nothing
    assert "already holds a run" in fail(work, "no targets", max_steps=1)


def test_a_run_that_goes_on_with_another_batch_says_so_and_sees_the_windows_that_follow(work, base):
    copy_until(base, work / "rebatched", 10)
    run = train(work, "rebatched", "--resume", **LONG | dict(batch_tokens=512, max_steps=12))
    assert "10 steps had 2,560 tokens, and the batch is another now: 2 steps are left" in run.out
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert run.steps[-1]["tokens"] == 2560 + 2 * 512 == manifest["tokens"]
    begun, resumed = (plan_of(work, batch_tokens=n) for n in (256, 512))
    resumed.go_on(10, 2560)
    assert pieces_of(resumed, 10) == pieces_of(begun, 10) + pieces_of(begun, 11)


def plan_of(work, **knobs):
    knobs = KNOBS | dict(data=work / "data") | knobs
    config = resolve(ROOT / "train.py", [f"--{key}={value}" for key, value in knobs.items()])
    plan = Plan(config, ROOT / "train.py", model_baseline.GPTConfig)
    plan.lay_out(config["max_steps"], rank=0, world_size=1, device="cpu")
    return plan


def pieces_of(plan, step):
    return [window.pieces for window in plan.at(step).loader.windows(step)]


@pytest.mark.parametrize(
    ("model", "knobs"),
    [
        ("moe", {}),
        ("moe", dict(mask_document_crossing=True)),
        ("moe", dict(document_mask=True)),  # a document that begins with a window's last token is padding
        ("switch", dict(document_mask=True, pack="documents")),
    ],
)
def test_auxiliary_losses_do_not_depend_on_micro_batch(work, model, knobs):
    """Windows may have unequal numbers of targets, and of padding: balance and z-loss are means over all else."""
    sizes = dict.fromkeys(SIZES) | TINY[model] | dict(block_size=32, vocab_size=0, balance_loss=0.5, z_loss=0.1)
    knobs = sizes | dict(model=model, max_steps=4) | knobs
    whole, parts = (train(work, f"auxiliary {n}", "--overwrite", micro_batch=n, **knobs) for n in (8, 1))
    for key in ("loss", "grad_norm", "balance_loss", "z_loss"):
        assert close([row[key] for row in whole.steps], [row[key] for row in parts.steps]), key
