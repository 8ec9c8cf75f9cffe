"""Checkpoints that are atomic to write, verified when read, and exact to resume from; nothing is ever unpickled.

    out_dir/step-00000100/  config.json          {"model": variant, "model_config": {GPTConfig's fields}, "knobs": {}}
                            model.safetensors    weights by plain name, tied ones once
                            ema.safetensors      the average of the weights, where the run has one (average.py)
                            trainer.safetensors  tensors of the optimizer's state as <parameter>.<key>
                            trainer.json         step, what else the caller gives, numbers of the optimizer's state
                            manifest.json        size and sha256 of each file: written last
                            evaluation.json      loss, step and tokens, once it was evaluated; not in the manifest
    out_dir/{latest,best}   relative links to such folders

Of sharded parameters each process writes its rows, to model-00001-of-00004.safetensors and so on (stored.py); any
layout restores what any other saved. How folders come and go: atomic.py.
Where there are many processes, all of them call save, finish, note_evaluation, newest, resolve and restore. What goes
wrong on one is raised on all, but for restore: there each process reads for itself, and raises what it met itself.
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

from distributed.processes import all_done, gather, on_first, results, start, start_on_first
from training import atomic
from training.atomic import entries, folders, verify  # noqa: F401  the last two are for our callers
from training.disk import CheckpointError, fsync, read_json
from training.stored import Stored, own_files

SIZE = re.compile(r"n_\w+|\w+_dim|(?!block_)\w+_size")  # fields that make another model; block_size may be extended


def plain(name):
    """Returns a parameter's name without what torch.compile and DistributedDataParallel put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def weights(model):
    """Returns {plain name: tensor} of parameters and persistent buffers; a tied tensor by its first name alone."""
    found = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[plain(name)] = tensor
    return found


# ---- saving ---------------------------------------------------------------------------------------------------------
def write(tmp, files):
    """Writes {file name: (tensors, metadata)}; returns their entries when they are on the disk.

    A file is hashed and flushed in threads while the next one is written. So the larger one comes first.
    """
    hashing = []
    flushing = []
    for name, (tensors, metadata) in reversed(files.items()):
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, tmp / name, metadata or None)
        shutil.copymode(tmp / "config.json", tmp / name)  # safetensors lets nobody else read its files
        hashing.append(start(entries, tmp, [name]))
        flushing.append(start(fsync, tmp / name))
    for future in flushing:
        future.result()
    return merged(future.result() for future in hashing)


def merged(dictionaries):
    """Returns one dictionary with the keys of all."""
    result = {}
    for dictionary in dictionaries:
        result.update(dictionary)
    return result


in_flight = []  # (the future of its thread, its further stages) of the save that is not finished: one at most


def save(
    out_dir, step: int, model, optimizer, config: dict, trainer: dict, keep_last=5, keep_every=0, wait=True,
    average: dict | None = None,
) -> Path | None:  # fmt: skip
    """Saves a step, points `latest` at it, then deletes old ones; returns its folder.

    What stays: the best, the last keep_last (0: all) and each keep_every-th step's (0: none's). config and trainer
    (tokens seen and so on) go to JSON. wait=False: returns None when the state is copied to host memory; a thread
    writes it, and a later finish ends it. On a full disk CheckpointError, and nothing is lost. A save in flight is
    finished first; if it fails, this is not begun. average: {plain name: tensor}, an average of the weights.
    """
    finish()
    folder = Path(out_dir) / f"step-{step:08d}"
    on_first(lambda: folder.parent.mkdir(parents=True, exist_ok=True))

    # 1. what to write; weights first: to ask for a model's state takes FSDP's parameters back into their shards
    tensors = weights(model)
    moments = {}
    numbers = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            kind = moments if torch.is_tensor(value) else numbers
            kind[f"{plain(name)}.{key}"] = value
    trainer = {"step": step, **trainer, "optimizer": {"class": type(optimizer).__name__, "state": numbers}}
    texts = {"config.json": json.dumps(config, indent=1), "trainer.json": json.dumps(trainer, indent=1)}
    kinds = {"model": tensors, "trainer": moments}
    if average:
        kinds["ema"] = average
    files = own_files(kinds, copy=not wait)
    own_bytes = 0
    for rows, _ in files.values():
        own_bytes += sum(tensor.nbytes for tensor in rows.values())
    need = sum(gather(own_bytes)) + 2**16  # 64 KiB for the JSON files

    # 2. write it beside, then put it in place
    def attempt(job):
        """Returns every process's result. A disk that fails one ends the save on all, with nothing left of it."""
        try:
            return results(job)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(on_first(atomic.give_up, folder, step, need, error)) from error

    def stages():
        """Yields the future of each stage: all write, process 0 puts it in place, process 0 deletes old ones.

        A stage has to be done on all processes before the next one is asked for. Returns the folder.
        """
        writing = start(write, Path(f"{folder}.tmp"), files)
        yield writing
        listed = merged(attempt(writing))
        placing = start_on_first(atomic.commit, folder, step, listed)
        yield placing
        attempt(placing)
        pruning = start_on_first(atomic.prune, folder, keep_last, keep_every)
        yield pruning
        results(pruning)
        return folder

    attempt(start_on_first(atomic.prepare, folder, need, texts))
    saving = stages()
    in_flight.append((next(saving), saving))
    return finish() if wait else None


def finish(wait: bool = True) -> Path | None:
    """Advances the save in flight as far as it has got, or with wait to its end; returns its folder when it is done.

    None where it is not done, or none is in flight. CheckpointError if it failed. It is to be called between steps.
    """
    while in_flight and (wait or all_done(in_flight[0][0])):
        _, saving = in_flight.pop()
        try:
            in_flight.append((next(saving), saving))
        except StopIteration as end:
            return end.value


def note_evaluation(folder: Path, loss: float, facts: dict, keep_last=5, keep_every=0) -> bool:
    """Writes what an evaluation found beside a saved step; returns whether it is the best so far.

    The one that was the best goes, where it is not among those to keep.
    """

    def on_process_0():
        is_best = atomic.write_evaluation(folder, loss, facts)
        if is_best:
            atomic.prune(folder, keep_last, keep_every)
        return is_best

    return on_first(on_process_0)


# ---- finding --------------------------------------------------------------------------------------------------------
def newest(out_dir: str | Path, log: Callable = print) -> Path | None:
    """Returns a run's newest whole checkpoint, None where it has none at all; CheckpointError if all are damaged.

    Process 0 verifies, and tells the others what it found.
    """
    return on_first(atomic.find, out_dir, log)


def resolve(path: str | Path, log: Callable = print) -> Path:
    """Returns the folder, verified, of a checkpoint; of a run's folder, and of out/run/latest, its newest whole one.

    Process 0 looks, and tells the others: a run that is at work may save meanwhile.
    """
    return on_first(atomic.resolve, Path(path), log)


# ---- restoring ------------------------------------------------------------------------------------------------------
def load_config(path: str | Path) -> dict:
    """Returns the `config` that was given to save, from the checkpoint's folder."""
    return read_json(Path(path) / "config.json", model=str, model_config=dict, knobs=dict)


def check_sizes(path, config):
    """Raises CheckpointError where the sizes in a model's config are not those of the checkpoint's."""
    saved = load_config(path)
    new = {"model": type(config).__module__.partition("model_")[2] or saved["model"], **vars(config)}
    old = {**new, "model": saved["model"], **saved["model_config"]}
    odd = []
    for key in new:
        makes_another_model = key == "model" or SIZE.fullmatch(key)
        if makes_another_model and old[key] != new[key]:
            odd.append(f"checkpoint {key}={old[key]}, config {key}={new[key]}")
    if odd:
        raise CheckpointError(f"{path} is of another model: {'; '.join(odd)}")


def dtype_and_shape(tensor):
    return f"{str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}"


def fitting_weights(path, model, kind="model"):
    """Returns the stored weights; CheckpointError where sizes in the configs, or else tensors, do not fit.

    kind: ema for their average.
    """
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config):
        check_sizes(path, config)
    stored = Stored(path, kind)
    old = {name: dtype_and_shape(stored.like(name)) for name in stored.parts}
    new = {name: dtype_and_shape(tensor) for name, tensor in weights(model).items()}
    odd = []
    for key in {**new, **old}:
        if old.get(key) != new.get(key):
            odd.append(f"{key} is {old.get(key, 'missing')} in the checkpoint, {new.get(key, 'missing')} in the model")
    if odd:
        raise CheckpointError(f"{path} does not fit the model in {len(odd)} tensors: {'; '.join(odd[:8])}")
    return stored


def weights_to_use(path: Path) -> str:
    """Returns under which name a checkpoint has the weights that were evaluated: ema where it has an average."""
    return "ema" if Stored(path, "ema").parts else "model"


def restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, kind="model") -> dict:
    """Copies a checkpoint's folder into the model and the optimizer's state; returns the `trainer` given to save.

    What does not fit is a CheckpointError, and nothing is copied. The optimizer's hyper-parameters stay as they are.
    """
    stored = fitting_weights(path, model, kind)
    trainer = read_json(path / "trainer.json", step=int, optimizer=dict)
    saved = trainer.pop("optimizer")
    if optimizer is not None:
        if saved["class"] != type(optimizer).__name__:
            raise CheckpointError(f"{path} has the state of {saved['class']}, config says {type(optimizer).__name__}")
        restore_optimizer(path, model, optimizer, saved["state"])
    for name, tensor in weights(model).items():
        stored.copy_to(tensor, name)
    return trainer


def restore_optimizer(path, model, optimizer, numbers):
    """Replaces the optimizer's state by the stored tensors and the `numbers` {parameter's name.key: number}."""
    moments = Stored(path, "trainer")
    parameters = {plain(name): p for name, p in model.named_parameters()}
    step_on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for stored_name in moments.parts:
        name = stored_name.rpartition(".")[0]
        empty = moments.like(stored_name)
        if name not in parameters or not broadcasts(empty.shape, parameters[name].shape):
            raise CheckpointError(f"{path}: the optimizer's {stored_name}, {dtype_and_shape(empty)}, fits no parameter")

    optimizer.state.clear()
    for stored_name in moments.parts:
        name, _, key = stored_name.rpartition(".")
        p = parameters[name]
        empty = moments.like(stored_name)
        like = p if empty.shape == p.shape else empty  # as p is in strides (the same kernels run) and shards
        device = "cpu" if key == "step" and not step_on_device else p.device
        tensor = torch.empty_like(like, dtype=empty.dtype, device=device, requires_grad=False)
        moments.copy_to(tensor, stored_name)
        optimizer.state[p][key] = tensor
    for stored_name, number in numbers.items():
        name, _, key = stored_name.rpartition(".")
        optimizer.state[parameters[name]][key] = number


def broadcasts(shape, to):
    """Returns whether a tensor of one shape may be a moment of a parameter of the other: whole, by row or by column."""
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False


def load_model(path: str | Path, device: str = "cpu", average: bool = True) -> tuple[torch.nn.Module, dict]:
    """Returns (model in eval mode, config) of a checkpoint's folder or link, or of a run's newest whole checkpoint.

    average: take the average of the weights, where the checkpoint has one.
    """
    path = resolve(path)
    refuse_reward_model(path)
    config = load_config(path)
    name = f"model_{config['model']}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} needs {name}.py: {error}") from None
    saved = config["model_config"]
    known = {field.name for field in dataclasses.fields(module.GPTConfig)}
    odd = sorted(known ^ saved.keys())
    if odd:
        common = {key: value for key, value in saved.items() if key in known}
        weights_too = unknown_weights(path, module, common)
        raise CheckpointError(
            f"{path} is of another version of {name}.py: only one of them knows {', '.join(odd)}{weights_too}"
        )
    model = module.GPT(module.GPTConfig(**saved)).to(device)
    restore(path, model, kind=weights_to_use(path) if average else "model")
    return model.eval(), config


def refuse_reward_model(path):
    """Raises CheckpointError where a checkpoint's folder is of reward.py: it has a score in place of logits."""
    if "head.weight" in Stored(path, "model").parts:
        raise CheckpointError(
            f"{path} is a reward model, which scores texts and writes none: give it to grpo.py or dpo.py as "
            f"--reward_model, with --rewards=learned"
        )


def unknown_weights(path, module, fields):
    """Returns the end of a message that names a checkpoint's weights which a model of these fields has not."""
    flops = importlib.import_module("flops")  # takes its time to import
    try:
        names = weights(flops.without_contents(module.GPT, module.GPTConfig(**fields))).keys()
    except ValueError:  # these fields alone make no model
        return ""
    unknown = [name for name in Stored(path, "model").parts if name not in names]
    if not unknown:
        return ""
    return f", and {len(unknown)} weights of the checkpoint, {', '.join(unknown[:3])}..."


def changed_keys(old: dict, new: dict) -> list[str]:
    """Returns a line "key: old -> new" for each key that differs between two configs in the form that save takes."""
    old = flat(old)
    new = flat(json.loads(json.dumps(new)))  # as it would be read back: tuples are lists
    lines = []
    for key in {**old, **new}:
        before = old.get(key, "(none)")
        after = new.get(key, "(none)")
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def flat(config: dict) -> dict:
    """Returns a config in the form that save takes as one dictionary of knobs."""
    return {"model": config["model"], **config["knobs"], **config["model_config"]}
