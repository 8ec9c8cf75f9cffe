"""Checkpoints: exact resume, every kind of damage, crashes at every system call, full disks."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from training import checkpoint
from training.checkpoint import (
    CheckpointError,
    changed_keys,
    load_config,
    load_model,
    newest,
    resolve,
    restore,
    verify,
)
from training.disk import temporary_beside

ROOT = Path(__file__).parent.parent
CONFIG = {"model": "toy", "model_config": {"vocab_size": 11, "n_embd": 8}, "knobs": {"learning_rate": 0.1, "seed": 1}}


def save(out, step, *args, best=False, keep_last=5, keep_every=0, **options):
    """Saves; with best there is an evaluation then that finds it better than all before."""
    folder = checkpoint.save(out, step, *args, keep_last=keep_last, keep_every=keep_every, **options)
    if best:
        checkpoint.finish()
        checkpoint.note_evaluation(Path(out) / f"step-{step:08d}", -step, {}, keep_last, keep_every)
    return folder


class Toy(nn.Module):
    """Tied weights, a persistent and a non-persistent buffer, a matrix in another memory layout, a 0-d parameter."""

    def __init__(self, vocab_size=11, n_embd=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab_size, n_embd)
        self.wq = nn.Linear(n_embd, n_embd, bias=False)
        self.wq.weight.data = self.wq.weight.data.t()
        self.scale = nn.Parameter(torch.tensor(1.0 + seed))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("bias", torch.arange(3.0) + seed)
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, idx):
        return self.lm_head(self.wq(self.embed(idx)).tanh() * self.scale)


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        idx = torch.randint(11, (4, 6))
        loss = nn.functional.cross_entropy(model(idx).flatten(0, 1), idx.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model_of(model).bias += 1


def model_of(model):
    return getattr(model, "_orig_mod", getattr(model, "module", model))


class Hybrid(torch.optim.Optimizer):
    """Momentum for matrices with a plain-number step, AdamW-like state elsewhere, in groups of their own."""

    def __init__(self, matrices, others, lr=0.1):
        super().__init__([dict(params=matrices, muon=True), dict(params=others, muon=False)], dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                if group["muon"]:
                    s.setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    s["step"], s["note"] = s.get("step", 0) + 1, None
                    s["decay"] = s.get("decay", 1.0) * 0.9 + 1e-17
                    p.sub_(s["momentum_buffer"] * s["decay"] + s["step"] * 1e-3, alpha=group["lr"])
                else:
                    s.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    s.setdefault("step", torch.tensor(0.0)).add_(1)
                    p.sub_(s["exp_avg"] / s["step"], alpha=group["lr"])


def adamw(model, **kwargs):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=others)], lr=0.05, **kwargs)


OPTIMIZERS = {
    "adamw": adamw,
    "adamw fused": lambda m: adamw(m, fused=True),
    "adamw foreach amsgrad": lambda m: adamw(m, foreach=True, amsgrad=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "sgd without momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.01),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "hybrid": lambda m: Hybrid([m.wq.weight], [m.embed.weight, m.scale]),
}


def digest(model, optimizer):
    """All bits of a model and of its optimizer's state."""
    state = {n: {k: v for k, v in optimizer.state.get(p, {}).items()} for n, p in model_of(model).named_parameters()}
    flat = {f"{n}.{k}": v for n, s in state.items() for k, v in s.items()} | dict(model_of(model).state_dict())
    # doubles hold every float32 and bfloat16 exactly
    return {k: v.detach().double().numpy().tobytes() if torch.is_tensor(v) else repr(v) for k, v in flat.items()}


def small_run(out, steps=(10, 20, 30), **kwargs):
    model = Toy()
    optimizer = adamw(model)
    for step in steps:
        train(model, optimizer, [step])
        save(out, step, model, optimizer, CONFIG, {"tokens": step * 24}, **kwargs)
    return model, optimizer


def names(out):
    return sorted(p.name for p in Path(out).iterdir())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_20_steps_equal_10_then_save_and_resume_then_10_bit_for_bit(tmp_path, name):
    straight = Toy()
    straight_optimizer = OPTIMIZERS[name](straight)
    train(straight, straight_optimizer, range(20))

    first = Toy()
    optimizer = OPTIMIZERS[name](first)
    train(first, optimizer, range(10))
    path = save(tmp_path, 10, first, optimizer, CONFIG, {"tokens": 240})

    second = Toy(seed=1)
    optimizer = OPTIMIZERS[name](second)
    train(second, optimizer, range(3))  # restoring replaces all of this
    assert restore(path, second, optimizer) == {"step": 10, "tokens": 240}
    train(second, optimizer, range(10, 20))
    assert digest(second, optimizer) == digest(straight, straight_optimizer)


@pytest.mark.parametrize("name", ["adamw", "adamw fused", "hybrid"])
def test_saving_alters_no_training_not_even_before_the_first_step(tmp_path, name):
    runs = []
    for saves in (False, True):
        model = Toy()
        optimizer = OPTIMIZERS[name](model)
        for step in range(4):
            if saves:
                path = save(tmp_path, step, model, optimizer, CONFIG, {})
                assert step or load_file(path / "trainer.safetensors") == {}
            train(model, optimizer, [step])
        runs.append(digest(model, optimizer))
    assert runs[0] == runs[1]
    model = Toy(seed=3)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(2))  # restoring forgets all of this
    restore(tmp_path / "step-00000000", model, optimizer)
    train(model, optimizer, range(4))
    assert digest(model, optimizer) == runs[0]


def test_hyper_parameters_come_from_the_present_optimizer(tmp_path):
    small_run(tmp_path)
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=7.0, betas=(0.5, 0.6), weight_decay=0.3)
    restore(newest(tmp_path), model, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], len(optimizer.param_groups)) == (
        7.0,
        (0.5, 0.6),
        0.3,
        1,
    )
    assert optimizer.state[model.scale]["step"] == 3


def test_a_checkpoint_is_json_and_safetensors_with_plain_names_and_tied_weights_once(tmp_path):
    model = Toy()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        optimizer = adamw(wrapped)
        train(model, optimizer, range(2))
        path = save(tmp_path, 10, wrapped, optimizer, CONFIG, {"tokens": 5, "best_loss": 1.5, "scaler": {"scale": 2.0}})
        stored = load_file(path / "model.safetensors")
        assert set(stored) == {"embed.weight", "wq.weight", "scale", "bias"}
        assert torch.equal(stored["wq.weight"], model.wq.weight) and torch.equal(stored["bias"], model.bias)
        parameters = ["embed.weight", "wq.weight", "scale"]
        state = {f"{name}.{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
        assert set(load_file(path / "trainer.safetensors")) == state
        assert load_config(path) == CONFIG
        again = Toy(seed=1)
        trainer = restore(path, torch.compile(again, backend="eager"), other := adamw(again))
        assert trainer == {"step": 10, "tokens": 5, "best_loss": 1.5, "scaler": {"scale": 2.0}}
        assert digest(again, other) == digest(model, optimizer)
    files = ["config.json", "manifest.json", "model.safetensors", "trainer.json", "trainer.safetensors"]
    assert names(path) == files
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["torch"]) == (1, 10, torch.__version__)
    assert manifest["files"]["config.json"][0] == (path / "config.json").stat().st_size
    assert len({(path / name).stat().st_mode for name in files}) == 1  # who may read one may read all


def test_the_last_n_and_the_best_are_kept_and_links_are_relative(tmp_path):
    model = Toy()
    optimizer = adamw(model)
    for step in range(1, 8):
        save(tmp_path, step, model, optimizer, CONFIG, {}, keep_last=2, best=step in (1, 3))
    steps = [f"step-{n:08d}" for n in (3, 6, 7)]
    assert names(tmp_path) == ["best", "latest", *steps]
    assert os.readlink(tmp_path / "latest") == steps[2] and os.readlink(tmp_path / "best") == steps[0]
    assert resolve(tmp_path / "best").name == steps[0] and resolve(tmp_path).name == steps[2]
    save(tmp_path, 8, model, optimizer, CONFIG, {}, keep_last=1, best=True)
    assert names(tmp_path) == ["best", "latest", "step-00000008"]
    small_run(tmp_path / "all", keep_last=0)
    assert len(names(tmp_path / "all")) == 4


def test_every_nth_step_is_kept_besides_the_last_and_the_best(tmp_path):
    model = Toy()
    for step in range(1, 11):
        save(tmp_path, step, model, adamw(model), CONFIG, {}, keep_last=2, best=step == 2, keep_every=4)
    assert names(tmp_path) == ["best", "latest", *(f"step-{n:08d}" for n in (2, 4, 8, 9, 10))]
    save(tmp_path, 11, model, adamw(model), CONFIG, {}, keep_last=1)  # 0: none is kept for its number
    assert names(tmp_path) == ["best", "latest", "step-00000002", "step-00000011"]


def test_a_relative_run_folder_keeps_its_best_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Toy()
    for step in (1, 2, 3):
        save("run", step, model, adamw(model), CONFIG, {}, keep_last=1, best=step == 1)
    assert names("run") == ["best", "latest", "step-00000001", "step-00000003"]


def test_leftovers_of_crashes_are_removed_at_the_next_save_and_not_before(tmp_path):
    small_run(tmp_path)
    for name in ("step-00000040.tmp", "step-00000005.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    mine = [".notes.0123456789abcdef.tmp", ".notes.tmp", "mine.tmp"]
    (tmp_path / mine[0]).mkdir()
    (tmp_path / mine[1]).touch()
    (tmp_path / mine[2]).touch()
    torn = [temporary_beside(tmp_path / "state.json"), temporary_beside(tmp_path / "step-00000020" / "evaluation.json")]
    for path in torn:
        path.touch()
    log = []
    assert newest(tmp_path, log.append).name == "step-00000030"
    assert log == ["skipping step-00000040.tmp: incomplete: saving was interrupted"]
    assert "step-00000040.tmp" in names(tmp_path) and "step-00000005.old" in names(tmp_path)
    small_run(tmp_path, steps=[40])
    assert [n for n in names(tmp_path) if n.endswith((".tmp", ".old"))] == mine
    assert not any(path.exists() for path in torn)


def test_a_checkpoint_just_written_is_never_pruned_for_damaged_ones_of_later_steps(tmp_path):
    small_run(tmp_path)
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    small_run(tmp_path, steps=[25], keep_last=1)
    assert newest(tmp_path, lambda line: None).name == "step-00000025"


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def relist(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def rename_listed(name):
    return lambda path: relist(path, lambda m: m["files"].update({name: m["files"].pop("config.json")}))


def make_link(path):
    (path / "config.json").rename(path / "other.json")
    (path / "config.json").symlink_to("other.json")


def truncate(path, name):
    os.truncate(path / name, (path / name).stat().st_size - 1)


DAMAGES = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "incomplete: manifest.json missing"),
    "manifest cut short": (
        lambda p: truncate(p, "manifest.json") or truncate(p, "manifest.json"),
        "manifest.json: not",
    ),
    "empty manifest": (lambda p: os.truncate(p / "manifest.json", 0), "manifest.json: not a manifest (corrupted)"),
    "a list as manifest": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json: not a manifest"),
    "bytes as manifest": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json: not a man"),
    "a later format": (lambda p: relist(p, lambda m: m.update(format=2)), "manifest.json: format 2, and this program"),
    "weights missing": (lambda p: (p / "model.safetensors").unlink(), "incomplete: model.safetensors missing"),
    "weights cut short": (
        lambda p: truncate(p, "model.safetensors"),
        "model.safetensors: 887 bytes, manifest says 888",
    ),
    "weights flipped": (lambda p: flip(p / "model.safetensors"), "model.safetensors: sha256 mismatch (corrupted)"),
    "state flipped": (lambda p: flip(p / "trainer.safetensors"), "trainer.safetensors: sha256 mismatch (corrupted)"),
    "trainer flipped": (lambda p: flip(p / "trainer.json", 5), "trainer.json: sha256 mismatch (corrupted)"),
    "config flipped": (lambda p: flip(p / "config.json", 5), "config.json: sha256 mismatch (corrupted)"),
    "weights of another step": (
        lambda p: shutil.copy(p.parent / "step-00000010" / "model.safetensors", p),
        "model.safetensors: sha256 mismatch (corrupted)",
    ),
    "name with ..": (rename_listed("../step-00000020/config.json"), "manifest.json: '../step-00000020/config.json'"),
    "absolute name": (rename_listed("/etc/hostname"), "manifest.json: '/etc/hostname' refused"),
    "file not listed": (lambda p: relist(p, lambda m: m["files"].pop("trainer.json")), "manifest.json: 'trainer.json'"),
    "symbolic link": (make_link, "config.json is a symbolic link: refused"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_the_reason_and_the_one_before_it_taken(tmp_path, damage):
    small_run(tmp_path)
    break_it, reason = DAMAGES[damage]
    path = tmp_path / "step-00000030"
    assert verify(path) == ""
    break_it(path)
    log = []
    assert newest(tmp_path, log.append).name == "step-00000020"
    assert len(log) == 1 and log[0].startswith(f"skipping step-00000030: {reason}")
    with pytest.raises(CheckpointError, match=re.escape(f"step-00000030: {reason}")):
        resolve(path)
    assert resolve(tmp_path / "latest", log.append).name == "step-00000020"


def test_a_flipped_byte_anywhere_is_found_or_harmless(tmp_path):
    model, optimizer = small_run(tmp_path, steps=[10])
    path = tmp_path / "step-00000010"
    expected = digest(model, optimizer)
    rng = random.Random(0)
    for name in names(path):
        original = (path / name).read_bytes()
        for position in [0, len(original) - 1, *(rng.randrange(len(original)) for _ in range(150))]:
            flip(path / name, position)
            if not verify(path):
                assert name == "manifest.json"  # its step, torch version or last newline, which decide nothing
                restore(path, other := Toy(seed=1), other_optimizer := adamw(other))
                assert digest(other, other_optimizer) == expected
            (path / name).write_bytes(original)
    assert verify(path) == ""


def test_where_all_checkpoints_are_bad_it_refuses_and_where_there_are_none_it_says_so(tmp_path):
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="no checkpoint in .*nowhere"):
        resolve(tmp_path / "nowhere")
    small_run(tmp_path)
    for path in tmp_path.glob("step-*"):
        flip(path / "model.safetensors")
    log = []
    with pytest.raises(CheckpointError, match=r"no valid checkpoint in .* \(3 found, all rejected\); pass --overwrite"):
        newest(tmp_path, log.append)
    assert len(log) == 3


def test_a_copied_checkpoint_folder_of_any_name_resolves(tmp_path):
    small_run(tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "step-00000020", tmp_path / "mine")
    assert resolve(tmp_path / "mine").name == "mine"


@dataclass
class Config:
    vocab_size: int = 11
    n_embd: int = 8
    head_dim: int = 4
    block_size: int = 16
    dropout: float = 0.0


def refused(path, model, optimizer=None):
    before = digest(model, optimizer or adamw(model))
    with pytest.raises(CheckpointError) as e:
        restore(path, model, optimizer)
    assert digest(model, optimizer or adamw(model)) == before  # nothing was copied
    return str(e.value)


def test_sizes_are_compared_from_the_config_before_any_tensor(tmp_path):
    model = Toy()
    config = {**CONFIG, "model_config": vars(Config())}
    path = save(tmp_path, 1, model, adamw(model), config, {})
    (path / "model.safetensors").write_bytes(b"")  # not read at all
    model = Toy(vocab_size=12)
    model.config = Config(vocab_size=12, head_dim=2, block_size=32, dropout=0.1)
    message = refused(path, model)
    assert message == f"{path} is of another model: checkpoint vocab_size=11, config vocab_size=12; " + (
        "checkpoint head_dim=4, config head_dim=2"
    )
    Other = type("Config", (Config,), {"__module__": "model_other"})
    model.config = dataclass(Other)()
    assert "checkpoint model=toy, config model=other" in refused(path, model)


def test_missing_extra_misshapen_and_mistyped_tensors_are_all_named(tmp_path):
    model = Toy()
    path = save(tmp_path, 1, model, adamw(model), CONFIG, {})
    model = Toy(vocab_size=12, seed=1)
    model.wq.bfloat16()
    model.extra = nn.Parameter(torch.zeros(3))
    del model.bias
    message = refused(path, model)
    assert message.startswith(f"{path} does not fit the model in 4 tensors: ")
    for text in (
        "embed.weight is float32 [11, 8] in the checkpoint, float32 [12, 8] in the model",
        "wq.weight is float32 [8, 8] in the checkpoint, bfloat16 [8, 8] in the model",
        "extra is missing in the checkpoint, float32 [3] in the model",
        "bias is float32 [3] in the checkpoint, missing in the model",
    ):
        assert text in message
    untied = Toy()
    untied.lm_head.weight = nn.Parameter(torch.zeros(11, 8))
    assert "lm_head.weight is missing in the checkpoint" in refused(path, untied)


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    small_run(tmp_path)
    model = Toy(seed=1)
    message = refused(tmp_path / "step-00000030", model, OPTIMIZERS["hybrid"](model))
    assert message.endswith("has the state of AdamW, config says Hybrid")


def test_a_moment_that_fits_no_parameter_is_refused(tmp_path):
    model, optimizer = small_run(tmp_path)
    path = tmp_path / "step-00000030"
    for odd in ({"wq.weight.exp_avg": torch.zeros(2, 2)}, {"other.exp_avg": torch.zeros(8, 8)}):
        save_file(odd, path / "trainer.safetensors")
        assert f"the optimizer's {next(iter(odd))}, float32" in refused(path, model, optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors"])
def test_a_safetensors_file_cut_short_is_named(tmp_path, name):
    model, optimizer = small_run(tmp_path)
    path = tmp_path / "step-00000030"
    for size in (0, 5, 100, (path / name).stat().st_size - 1):
        os.truncate(path / name, size)
        assert f"step-00000030/{name}: " in refused(path, model, optimizer)


def test_changed_keys_name_old_and_new(tmp_path):
    assert changed_keys(CONFIG, json.loads(json.dumps(CONFIG))) == []
    knobs = {"learning_rate": 0.2, "seed": 1, "betas": (1, 2)}
    new = {"model": "moe", "model_config": {"vocab_size": 12}, "knobs": knobs}
    assert changed_keys(CONFIG, new) == [
        "model: toy -> moe",
        "learning_rate: 0.1 -> 0.2",
        "vocab_size: 11 -> 12",
        "n_embd: 8 -> (none)",
        "betas: (none) -> [1, 2]",
    ]
    assert changed_keys({**CONFIG, "knobs": {"betas": [1, 2]}}, {**CONFIG, "knobs": {"betas": (1, 2)}}) == []


TOY_FILE = """from dataclasses import dataclass
import torch, torch.nn as nn
@dataclass
class GPTConfig:
    vocab_size: int = 5
    n_embd: int = 4
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
"""


def test_load_model_rebuilds_the_variant_from_the_checkpoint_alone(tmp_path, monkeypatch):
    (tmp_path / "model_toyload.py").write_text(TOY_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    import model_toyload

    model = model_toyload.GPT(model_toyload.GPTConfig(vocab_size=7))
    config = {"model": "toyload", "model_config": vars(model.config), "knobs": {}}
    for step in (1, 2):
        model.embed.weight.data += step
        save(tmp_path / "run", step, model, adamw(model), config, {}, best=step == 1)
    loaded, its_config = load_model(tmp_path / "run")
    assert torch.equal(loaded.embed.weight, model.embed.weight) and not loaded.training and its_config == config
    loaded, _ = load_model(tmp_path / "run" / "best")
    assert torch.equal(loaded.embed.weight + 2, model.embed.weight)

    config["model_config"] = {"vocab_size": 7, "n_embd": 4, "n_expert": 2}
    save(tmp_path / "odd", 1, model, adamw(model), config, {})
    with pytest.raises(CheckpointError, match="another version of model_toyload.py: only one of them knows n_expert"):
        load_model(tmp_path / "odd")
    older = model_toyload.GPT(model_toyload.GPTConfig(vocab_size=7))
    older.fused = torch.nn.Linear(4, 4)
    save(tmp_path / "older", 1, older, adamw(older), config, {})
    with pytest.raises(CheckpointError, match="n_expert, and 2 weights of the checkpoint, fused.bias, fused.weight"):
        load_model(tmp_path / "older")
    config["model_config"] = {"vocab_size": 7}
    save(tmp_path / "odd", 1, model, adamw(model), config, {})
    with pytest.raises(CheckpointError, match="only one of them knows n_embd"):
        load_model(tmp_path / "odd")
    config["model"] = "nowhere"
    save(tmp_path / "odd", 1, model, adamw(model), config, {})
    with pytest.raises(CheckpointError, match="needs model_nowhere.py: No module named 'model_nowhere'"):
        load_model(tmp_path / "odd")


def check_failed_save(out):
    model = Toy(seed=5)
    with pytest.raises(CheckpointError) as e:
        save(out, 40, model, adamw(model), CONFIG, {}, keep_last=1, best=True)
    pattern = r"checkpoint at step 40 failed: No space left on device \(need ~\d+\.\d MB, free \d+\.\d MB\); "
    assert re.fullmatch(pattern + "checkpoint step-00000030 is still there", str(e.value))
    assert names(out) == ["latest", "step-00000010", "step-00000020", "step-00000030"]
    assert newest(out).name == "step-00000030" == os.readlink(Path(out) / "latest")


def test_a_disk_known_to_be_too_full_fails_before_anything_is_written(tmp_path, monkeypatch):
    small_run(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 66_000))
    monkeypatch.setattr(checkpoint, "write", lambda *args: pytest.fail("wrote"))
    check_failed_save(tmp_path)


@pytest.mark.parametrize("where", ["save_file", "fsync"])
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoints_before_it(tmp_path, monkeypatch, where):
    small_run(tmp_path)
    real, calls = getattr(checkpoint, where), []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(checkpoint, where, full)
    check_failed_save(tmp_path)


def test_a_really_full_disk_leaves_the_checkpoints_before_it(tmp_path, monkeypatch):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        small_run(tmp_path)
        usage = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage("/"))  # the disk fills up after it was asked
        (tmp_path / "filler").write_bytes(bytes(usage(tmp_path).free - 12_000))
        with pytest.raises(
            CheckpointError, match="step 40 failed: No space left on device .*step-00000030 is still there"
        ):
            save(tmp_path, 40, Toy(vocab_size=1000), adamw(Toy()), CONFIG, {})
        assert newest(tmp_path).name == "step-00000030" and "step-00000040.tmp" not in names(tmp_path)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def crash_after(calls, out):
    """In a child process: saves step 20 twice, once in a thread, kill -9 before the given system call on
    files. True if it was killed."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def counted(real):
            def call(*args, **kwargs):
                nonlocal count
                if count == calls:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return real(*args, **kwargs)

            return call

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "symlink", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoint.save_file = counted(checkpoint.save_file)
        model = Toy()
        for wait in (True, False):
            save(out, 20, model, adamw(model), CONFIG, {"loss": 1.0}, keep_last=1, best=True, wait=wait)
        checkpoint.finish()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_kill_at_every_system_call_of_saving_replacing_and_pruning_leaves_a_whole_checkpoint(tmp_path):
    model = Toy()
    for calls in range(1000):
        out = tmp_path / str(calls)
        save(out, 10, model, adamw(model), CONFIG, {}, best=True)
        killed = crash_after(calls, out)
        assert all(verify(path) == "" for path in out.glob("step-????????"))  # only .tmp and .old may be half there
        found = newest(out, lambda line: None)
        assert restore(found, Toy(seed=1))["step"] in (10, 20)
        save(out, 20, model, adamw(model), CONFIG, {}, keep_last=1, best=True)  # and the next save cleans up
        assert names(out) == ["best", "latest", "step-00000020"] and verify(out / "best") == ""
        if not killed:
            break
    assert calls > 40  # there were that many calls to be killed at


def test_kill_at_a_random_moment_never_loses_what_save_had_confirmed(tmp_path):
    rng, last = random.Random(0), 0
    for _ in range(12):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            model = Toy(vocab_size=2000)
            for step in range(last + 1, 10**6):
                save(tmp_path, step, model, adamw(model), CONFIG, {}, keep_last=1 + step % 2, best=step % 3 == 0)
                os.write(write, b"%d\n" % step)
        os.close(write)
        with os.fdopen(read) as confirmations:
            first = confirmations.readline()
            time.sleep(rng.random() * 0.1)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            confirmed = int((first + confirmations.read()).split()[-1])
        last = restore(newest(tmp_path, lambda line: None), Toy(vocab_size=2000))["step"]
        assert last in (confirmed, confirmed + 1)


@pytest.mark.parametrize("name", ["checkpoint.py", "stored.py", "atomic.py"])
def test_nothing_is_unpickled(name):
    assert not re.search(r"torch\.(save|load)|import pickle|pickle\.", (ROOT / "training" / name).read_text())


def test_best_follows_from_the_evaluations_and_not_from_a_link(tmp_path):
    model = Toy()
    for step, loss in ((1, 3.0), (2, 2.0), (3, math.nan), (4, 2.0)):
        folder = save(tmp_path, step, model, adamw(model), CONFIG, {}, keep_last=0)
        assert checkpoint.note_evaluation(folder, loss, {"step": step}, 0) == (step < 3)  # of equal ones the first
    assert resolve(tmp_path / "best").name == "step-00000002"
    (tmp_path / "best").unlink()
    (tmp_path / "latest").unlink()
    assert resolve(tmp_path / "best").name == "step-00000002" and resolve(tmp_path / "latest").name == "step-00000004"
    for nonsense in (b"\x80\x04K\x07.", b"{}", b'{"loss": "low"}', b"[1]", b'{"loss": NaN}', b'{"loss": -Infinity}'):
        (tmp_path / "step-00000002" / "evaluation.json").write_bytes(nonsense)
        assert resolve(tmp_path / "best").name == "step-00000004"


def test_a_foreign_file_of_the_right_name_is_not_run(tmp_path):
    """What torch.load would unpickle is refused as what it is: no safetensors file."""
    small_run(tmp_path)
    path = tmp_path / "step-00000030"
    torch.save({"a": 1}, path / "model.safetensors")
    assert "model.safetensors: " in refused(path, Toy())
    save_file({}, path / "model.safetensors")
    assert "is missing in the checkpoint" in refused(path, Toy())
