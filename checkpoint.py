"""Checkpoints that are atomic to write, verified when read, and exact to resume from; nothing is ever unpickled.

    out_dir/step-00000100/  config.json          {"model": variant, "model_config": {GPTConfig's fields}, "knobs": {}}
                            model.safetensors    weights by plain name, tied ones once
                            trainer.safetensors  tensors of the optimizer's state as <parameter>.<key>
                            trainer.json         step, what else the caller gives, numbers of the optimizer's state
                            manifest.json        size and sha256 of each file: written last
    out_dir/{latest,best}   relative links to such folders

Of sharded parameters each process writes its rows, to model-00001-of-00004.safetensors and so on (sharding.py); any
layout restores what any other saved. How folders come and go: atomic.py.
With many processes all of them call save, finish, newest, resolve and restore, and an error on one is raised on all.
"""

import dataclasses
import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import atomic
from atomic import STEP, TEXTS, CheckpointError, entries, folders, fsync, verify  # noqa: F401 (some for others)
from sharding import Stored, all_done, gather, on_first, own_files, results, start, start_on_first

SIZE = re.compile(r"n_\w+|\w+_dim|(?!block_)\w+_size")  # fields that make another model; block_size may be extended


def plain(name):
    return name.replace("_orig_mod.", "").removeprefix("module.")  # torch.compile, DistributedDataParallel


def weights(model):
    """{plain name: tensor} of parameters and persistent buffers; a tied tensor by its first name alone."""
    unique = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (plain(name), tensor))
    return dict(unique.values())


def write(tmp, files):
    """Writes {file name: (tensors, metadata)}; returns their entries when they are on the disk."""
    hashing, flushing = [], []  # beside writing the next one: the larger comes first
    for name, (tensors, metadata) in reversed(files.items()):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp / name, metadata or None)
        shutil.copymode(tmp / "config.json", tmp / name)  # safetensors lets nobody else read its files
        hashing.append(start(entries, tmp, [name]))
        flushing.append(start(fsync, tmp / name))
    for future in flushing:
        future.result()
    return {name: entry for future in hashing for name, entry in future.result().items()}


in_flight = []  # (the future of its thread, its further stages) of the save that is not finished: one at most


def save(
    out_dir, step: int, model, optimizer, config: dict, trainer: dict, keep_last=5, best=False, keep_every=0, wait=True
) -> Path | None:
    """Saves a step, points `latest` (and `best`) at it, then deletes all but the best, the last keep_last (0: none is
    deleted) and each keep_every-th step's (0: none's). config and trainer (tokens seen, best loss...) go to JSON.
    wait=False: returns None when the state is copied to host memory; a thread writes it, and a later finish ends it.
    On a full disk CheckpointError, and nothing is lost. A save in flight is finished first; if it fails, this is not
    begun."""
    finish()
    folder = Path(out_dir) / f"step-{step:08d}"
    on_first(lambda: folder.parent.mkdir(parents=True, exist_ok=True))
    # 1. what to write; weights first: to ask for a model's state takes FSDP's parameters back into their shards
    tensors, moments, numbers = weights(model), {}, {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            (moments if torch.is_tensor(value) else numbers)[f"{plain(name)}.{key}"] = value
    trainer = {"step": step, **trainer, "optimizer": {"class": type(optimizer).__name__, "state": numbers}}
    texts = {name: json.dumps(value, indent=1) for name, value in zip(TEXTS, (config, trainer))}
    files = own_files({"model": tensors, "trainer": moments}, copy=not wait)
    need = sum(gather(sum(t.nbytes for part, _ in files.values() for t in part.values()))) + 2**16  # of JSON

    # 2. write it beside, then put it in place
    def attempt(job):
        try:
            return results(job)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(on_first(atomic.give_up, folder, step, need, e)) from e

    def stages():  # yields what has to be done on all processes before it goes on
        yield (job := start(write, Path(f"{folder}.tmp"), files))
        listed = {name: entry for part in attempt(job) for name, entry in part.items()}
        yield (job := start_on_first(atomic.commit, folder, step, listed, best))
        attempt(job)
        yield (job := start_on_first(atomic.prune, folder, keep_last, keep_every))
        results(job)
        return folder

    attempt(start_on_first(atomic.prepare, folder, need, texts))
    saving = stages()
    in_flight.append((next(saving), saving))
    return finish() if wait else None


def finish(wait: bool = True) -> Path | None:
    """Takes the save in flight as far as it gets, with wait to its end: its folder when it is in place; None before,
    and where none is in flight. CheckpointError if it failed. For the time between steps, and the end of a run."""
    while in_flight and (wait or all_done(in_flight[0][0])):
        _, saving = in_flight.pop()
        try:
            in_flight.append((next(saving), saving))
        except StopIteration as end:
            return end.value


def newest(out_dir: str | Path, log: Callable = print) -> Path | None:
    """A run's newest whole checkpoint, None where it has none at all; CheckpointError if all are damaged.
    Process 0 verifies, and tells the others what it found."""
    return on_first(atomic.find, out_dir, log)


def resolve(path: str | Path, log: Callable = print) -> Path:
    """The folder, verified, of a checkpoint's folder or link; of a run's folder its newest whole checkpoint."""
    if found := newest(path, log):
        return found
    if reason := on_first(verify, Path(path)):
        raise CheckpointError(f"no checkpoint in {path}: {reason}")
    return Path(path).resolve()


def load_config(path: str | Path) -> dict:
    """The `config` that was given to save, from the checkpoint's folder."""
    return json.loads((Path(path) / "config.json").read_text())


def fitting_weights(path, model):
    """The stored weights; CheckpointError, first from the configs' sizes, then from tensors, where they do not fit."""
    saved, config = load_config(path), getattr(model, "config", None)
    if dataclasses.is_dataclass(config):
        new = {"model": type(config).__module__.partition("model_")[2] or saved["model"], **vars(config)}
        old = {**new, "model": saved["model"], **saved["model_config"]}
        if keys := [key for key in new if (key == "model" or SIZE.fullmatch(key)) and old[key] != new[key]]:
            text = "; ".join(f"checkpoint {key}={old[key]}, config {key}={new[key]}" for key in keys)
            raise CheckpointError(f"{path} is of another model: {text}")
    stored = Stored(path, "model")
    parts = ({name: stored.like(name) for name in stored.parts}, weights(model))
    old, new = ({k: f"{str(t.dtype)[6:]} {[*t.shape]}" for k, t in part.items()} for part in parts)
    if odd := [key for key in {**new, **old} if old.get(key) != new.get(key)]:
        text = [f"{k} is {old.get(k, 'missing')} in the checkpoint, {new.get(k, 'missing')} in the model" for k in odd]
        raise CheckpointError(f"{path} does not fit the model in {len(odd)} tensors: {'; '.join(text[:8])}")
    return stored


def restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Copies a checkpoint's folder into the model and the optimizer's state; returns the `trainer` given to save.
    What does not fit is a CheckpointError, and nothing is copied. The optimizer's hyper-parameters stay as they are."""
    stored = fitting_weights(path, model)
    trainer = json.loads((path / "trainer.json").read_text())
    saved = trainer.pop("optimizer")
    if optimizer is not None:
        if saved["class"] != type(optimizer).__name__:
            raise CheckpointError(f"{path} has the state of {saved['class']}, config says {type(optimizer).__name__}")
        moments = Stored(path, "trainer")
        parameters = {plain(name): p for name, p in model.named_parameters()}
        step_on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        optimizer.state.clear()
        for whole, value in {**{name: moments.like(name) for name in moments.parts}, **saved["state"]}.items():
            name, _, key = whole.rpartition(".")
            p = parameters[name]
            if torch.is_tensor(value):
                like = p if value.shape == p.shape else value  # as p is in strides (the same kernels run) and shards
                device = "cpu" if key == "step" and not step_on_device else p.device
                value = torch.empty_like(like, dtype=value.dtype, device=device, requires_grad=False)
                moments.copy_to(value, whole)
            optimizer.state[p][key] = value
    for name, tensor in weights(model).items():
        stored.copy_to(tensor, name)
    return trainer


def load_model(path: str | Path, device: str = "cpu") -> tuple[torch.nn.Module, dict]:
    """(model in eval mode, config) of a checkpoint's folder or link, or of a run's newest whole checkpoint."""
    path = resolve(path)
    config = load_config(path)
    name, saved = f"model_{config['model']}", config["model_config"]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise CheckpointError(f"{path} needs {name}.py: {e}") from None
    if odd := sorted({field.name for field in dataclasses.fields(module.GPTConfig)} ^ saved.keys()):
        raise CheckpointError(f"{path} is of another version of {name}.py: only one of them knows {', '.join(odd)}")
    model = module.GPT(module.GPTConfig(**saved)).to(device)
    restore(path, model)
    return model.eval(), config


def changed_keys(old: dict, new: dict) -> list[str]:
    """A line "key: old -> new" for each key that differs between two configs in the form that save takes."""
    old, new = ({"model": c["model"], **c["knobs"], **c["model_config"]} for c in (old, json.loads(json.dumps(new))))
    pairs = {key: (old.get(key, "(none)"), new.get(key, "(none)")) for key in {**old, **new}}
    return [f"{key}: {a} -> {b}" for key, (a, b) in pairs.items() if a != b]
