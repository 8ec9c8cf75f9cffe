"""Checkpoints that are atomic to write, verified when read, and exact to resume from; nothing is ever unpickled.

    out_dir/step-00000100/  config.json          {"model": variant, "model_config": {GPTConfig's fields}, "knobs": {}}
                            model.safetensors    weights by plain name, tied ones once
                            trainer.safetensors  tensors of the optimizer's state as <parameter>.<key>
                            trainer.json         step, what else the caller gives, numbers of the optimizer's state
                            manifest.json        size and sha256 of each file: written last
    out_dir/{latest,best}   relative links to such folders

One is written as step-N.tmp, flushed, then renamed; one to be deleted is first renamed to step-N.old. So what is called
step-N was whole once, and the manifest tells whether it still is (it finds damage, not a forger).
"""

import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

FORMAT = 1
FILES = ("config.json", "model.safetensors", "trainer.safetensors", "trainer.json")
STEP = "step-" + 8 * "[0-9]"  # padded, so that names sort like numbers
SIZE = re.compile(r"n_\w+|\w+_dim|(?!block_)\w+_size")  # fields that make another model; block_size may be extended


class CheckpointError(RuntimeError):
    """What was wrong with which checkpoint, for the user to read."""


def plain(name):
    return name.replace("_orig_mod.", "").removeprefix("module.")  # torch.compile, DistributedDataParallel


def weights(model):
    """{plain name: tensor} of parameters and persistent buffers; a tied tensor by its first name alone."""
    unique = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (plain(name), tensor))
    return dict(unique.values())


def folders(out_dir, suffix=""):
    return sorted(Path(out_dir).glob(STEP + suffix), reverse=True)  # newest first


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def write(folder, step, tensors, texts):
    """Makes `folder`, on the disk when this returns: {file name: {name: tensor}} and {file name: JSON-able}."""
    folder.mkdir()
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    for name, value in tensors.items():
        save_file({key: tensor.detach().contiguous() for key, tensor in value.items()}, folder / name)
        shutil.copymode(folder / "config.json", folder / name)  # safetensors lets nobody else read its files
    files = {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in FILES}
    manifest = {"format": FORMAT, "step": step, "torch": torch.__version__, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*folder.iterdir(), folder):
        fsync(path)


def save(out_dir, step: int, model, optimizer, config: dict, trainer: dict, keep_last: int = 5, best=False) -> Path:
    """Saves a step, points `latest` (and `best`) at it, then deletes all but the best and the last keep_last (0: none).
    config and trainer (tokens seen, best loss...) go to JSON. On a full disk CheckpointError, and nothing is lost."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # 1. what to write
    moments, numbers = {}, {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            (moments if torch.is_tensor(value) else numbers)[f"{plain(name)}.{key}"] = value
    tensors = {"model.safetensors": weights(model), "trainer.safetensors": moments}
    tensors = {file: {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in part.items()}
               for file, part in tensors.items()}  # fmt: skip
    if dist.is_initialized() and dist.get_rank() > 0:
        return None
    trainer = {"step": step, **trainer, "optimizer": {"class": type(optimizer).__name__, "state": numbers}}
    need = sum(tensor.nbytes for part in tensors.values() for tensor in part.values()) + 2**16  # of JSON
    # 2. write it beside, then put it in place
    for leftover in folders(out_dir, ".tmp"):
        shutil.rmtree(leftover)
    folder = out_dir / f"step-{step:08d}"
    tmp = out_dir / f"{folder.name}.tmp"
    try:
        if need > shutil.disk_usage(out_dir).free:
            raise OSError("No space left on device")
        write(tmp, step, tensors, {"config.json": config, "trainer.json": trainer})
        if folder.exists():
            shutil.rmtree(f"{folder}.old", ignore_errors=True)  # of a crash between these renames
            folder.rename(f"{folder}.old")
        tmp.rename(folder)
        fsync(out_dir)
        for name in ("latest", "best") if best else ("latest",):
            link = out_dir / f"{name}.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
            link.rename(out_dir / name)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(tmp, ignore_errors=True)
        reason = "No space left on device" if "No space left on device" in str(e) else e
        room = f"need ~{need / 1e6:.1f} MB, free {shutil.disk_usage(out_dir).free / 1e6:.1f} MB"
        before = [f"previous checkpoint {path.name} is intact" for path in folders(out_dir)] + ["there is none before"]
        raise CheckpointError(f"checkpoint at step {step} failed: {reason} ({room}); {before[0]}") from e
    # 3. only with its successor in place: what was replaced, or left by a crash while deleting, and then the oldest
    for path in folders(out_dir, ".old"):
        shutil.rmtree(path)
    kept = [path for path in folders(out_dir) if path.name <= folder.name]
    for path in kept[keep_last or len(kept) :]:
        if path.name != (out_dir / "best").resolve().name:
            shutil.rmtree(path.rename(f"{path}.old"))
    return folder


def verify(path: Path) -> str:
    """Why the checkpoint in folder `path` is not what its manifest says; "" where it is whole."""
    for name in ("manifest.json", *FILES):
        if (path / name).is_symlink():
            return f"{name} is a symbolic link: refused"
        if not (path / name).is_file():
            return f"incomplete: {name} missing"
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            return f"manifest.json: format {manifest['format']}, and this program reads format {FORMAT}"
        if odd := sorted(manifest["files"].keys() ^ set(FILES)):  # so no name leads out of the folder
            return f"manifest.json: {odd[0]!r} refused: it must list {', '.join(FILES)}"
        for name, (size, digest) in manifest["files"].items():
            if (path / name).stat().st_size != size:
                return f"{name}: {(path / name).stat().st_size} bytes, manifest says {size} (truncated)"
            if sha256(path / name) != digest:
                return f"{name}: sha256 mismatch (corrupted)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json: not a manifest (corrupted)"
    return ""


def newest(out_dir: str | Path, log: Callable = print) -> Path | None:
    """A run's newest whole checkpoint, None where it has none at all; CheckpointError if all are damaged."""
    for path in folders(out_dir, ".tmp"):
        log(f"skipping {path.name}: incomplete: saving was interrupted")
    found = folders(out_dir) + folders(out_dir, ".old")  # a crash while a step is saved again may leave only its .old
    for path in sorted(found, key=lambda path: path.stem, reverse=True):
        if not (reason := verify(path)):
            return path
        log(f"skipping {path.name}: {reason}")
    if found:
        count = f"{len(found)} found, {len(found)} rejected"
        raise CheckpointError(f"no valid checkpoint in {out_dir} ({count}); pass --overwrite to discard them")


def resolve(path: str | Path, log: Callable = print) -> Path:
    """The folder, verified, of a checkpoint's folder or link; of a run's folder its newest whole checkpoint."""
    if found := newest(path, log):
        return found
    if reason := verify(Path(path)):
        raise CheckpointError(f"no checkpoint in {path}: {reason}")
    return Path(path).resolve()


def load_config(path: str | Path) -> dict:
    """The `config` that was given to save, from the checkpoint's folder."""
    return json.loads((Path(path) / "config.json").read_text())


def read_tensors(path):
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path}: {e} (truncated or damaged)") from None


def fitting_weights(path, model):
    """The stored weights; CheckpointError, first from the configs' sizes, then from tensors, where they do not fit."""
    saved, config = load_config(path), getattr(model, "config", None)
    if dataclasses.is_dataclass(config):
        new = {"model": type(config).__module__.partition("model_")[2] or saved["model"], **vars(config)}
        old = {**new, "model": saved["model"], **saved["model_config"]}
        if keys := [key for key in new if (key == "model" or SIZE.fullmatch(key)) and old[key] != new[key]]:
            text = "; ".join(f"checkpoint {key}={old[key]}, config {key}={new[key]}" for key in keys)
            raise CheckpointError(f"{path} is of another model: {text}")
    stored = read_tensors(path / "model.safetensors")
    old, new = ({k: f"{str(t.dtype)[6:]} {[*t.shape]}" for k, t in part.items()} for part in (stored, weights(model)))
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
        state = {**read_tensors(path / "trainer.safetensors"), **saved["state"]}
        parameters = {plain(name): p for name, p in model.named_parameters()}
        step_on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        optimizer.state.clear()
        for name, value in state.items():
            name, _, key = name.rpartition(".")
            p = parameters[name]
            if torch.is_tensor(value):
                if isinstance(p, DTensor) and value.shape == p.shape:
                    value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
                like = p if value.shape == p.shape else value  # the strides of the parameter: the same kernels run
                device = "cpu" if key == "step" and not step_on_device else p.device
                value = torch.empty_like(like, dtype=value.dtype, device=device, requires_grad=False).copy_(value)
            optimizer.state[p][key] = value
    with torch.no_grad():
        for name, tensor in weights(model).items():
            value = stored[name]
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(value)
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
