"""When a run's state goes to the disk, what a full disk costs, and how a run goes on from what is there."""

import sys
from pathlib import Path

from distributed.processes import fail, on_first, rank
from training import atomic, checkpoint, run_folder
from training.disk import CheckpointError, read_json

# The knobs by which the order of the text goes.
ORDER = ("seed", "block_size", "pack", "long_documents", "document_start_probability")


class Saver:
    """Saves steps of a run. On a full disk a run that has steps left goes on: what was saved before stays."""

    def __init__(
        self, out: Path, lock, model, optimizer, config: dict, keep_last: int, keep_every: int, say,
        average=None,
    ):  # fmt: skip
        self.out = out
        self.lock = lock  # what run_folder.lock returned
        self.model = model
        self.optimizer = optimizer
        self.config = config  # as checkpoint.save takes it
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.say = say
        self.average = average  # an Average of the weights, to be saved beside them
        self.in_place = None  # the folder of the newest step that is on the disk

    def save(self, step: int, trainer: dict, wait: bool, must: bool) -> None:
        """Saves a step. wait=False: to host memory, from where a thread writes it.

        must: it is the run's last save, so that one which fails is an error; before, the run warns and goes on.
        """
        try:
            on_first(run_folder.check_ours, self.out, self.lock)
        except ValueError as error:
            fail(error)
        if self.finish(must=must):  # of the one before
            options = dict(keep_last=self.keep_last, keep_every=self.keep_every, wait=wait)
            if self.average:
                options["average"] = self.average.tensors
                trainer["averaged_steps"] = self.average.steps
            self.attempt(
                must, checkpoint.save, self.out, step, self.model, self.optimizer, self.config, trainer, **options
            )

    def repair(self, newest: Path) -> None:
        """Does what a crash, or a copy without links, left undone around the checkpoint that a run goes on from."""
        self.attempt(False, on_first, atomic.repair, newest, self.keep_last, self.keep_every)
        self.in_place = newest.with_suffix("")  # whose evaluation may be to come

    def finish(self, wait: bool = True, must: bool = False) -> bool:
        """Takes a save in flight as far as it gets, or with wait to its end; returns False where it failed."""
        return self.attempt(must, checkpoint.finish, wait)

    def attempt(self, must, call, *args, **options):
        try:
            folder = call(*args, **options)
        except (OSError, CheckpointError) as error:
            if must:
                fail(error)
            if rank() == 0:
                print(f"WARNING: {error}", file=sys.stderr)
            return False
        if folder:
            self.in_place = folder
            self.say(f"step {atomic.step_of(folder):>6} | saved {folder}")
        return True

    def note_evaluation(self, step: int, loss: float, tokens: int) -> None:
        """Writes a saved step's validation loss beside it, from which the best one follows."""
        self.finish()
        folder = self.out / f"step-{step:08d}"
        if self.in_place is not None and self.in_place.name == folder.name:
            facts = {"step": step, "tokens": tokens}
            if checkpoint.note_evaluation(folder, loss, facts, self.keep_last, self.keep_every):
                self.say(f"step {step:>6} | {folder} is the best so far")


def was_evaluated(path: Path) -> bool:
    """Returns whether a checkpoint's validation loss is known, on all processes."""
    return on_first(atomic.evaluation, path) is not None


def load_newest(out: Path, model, tokenizer, say) -> int | None:
    """Puts the weights of a run's newest checkpoint into the model, to be evaluated; returns its step.

    None where there is no checkpoint. tokenizer: the fingerprint of the data's, which has to be that of the run's.
    """
    path = checkpoint.newest(out, say)
    if path is None:
        return None
    state = read_json(path / "trainer.json", identity=dict)
    if state["identity"]["tokenizer"] != tokenizer:
        raise ValueError(f"the data has another tokenizer than that of {path}: give data that was made with it")
    checkpoint.restore(path, model, kind=checkpoint.weights_to_use(path))
    say(f"evaluating {path}")
    return atomic.step_of(path)


def go_on_from(path: Path, model, optimizer, scaler, config: dict, identity: dict, machine: dict, say) -> dict:
    """Puts a checkpoint's state into the model, the optimizer and the scaler; returns what else train.py had saved.

    Says what changed since. ValueError and CheckpointError where it is of another model, optimizer or data.
    """
    before = checkpoint.load_config(path)
    for line in checkpoint.changed_keys(before, config):
        say(f"changed since the checkpoint: {line}")
    if any(before["knobs"].get(key) != config["knobs"].get(key) for key in ORDER):
        say("so the text comes in another order: within this epoch some of it comes twice, and some not at all")
    optimizer_then = before["knobs"]["optimizer"]
    if optimizer_then != config["knobs"]["optimizer"]:
        raise ValueError(f"{path} has the state of optimizer={optimizer_then}: resume with that")

    state = read_json(path / "trainer.json", step=int, tokens=int, skipped=int, identity=dict, scaler=dict)
    data = identity["data"]
    then = state["identity"] | {"data": data}  # what is in a folder counts, not how the path to it is written
    if then["tokenizer"] != identity["tokenizer"]:
        raise ValueError(f"{data} has another tokenizer than the data of {path}: give that data, or another out_dir")
    if then.get("reference") not in (None, identity.get("reference")):
        raise ValueError(
            f"the reference changed since {path} was written: give the init_from, teacher and beta of then"
        )
    if not then.items() <= identity.items():
        raise ValueError(
            f"{data} changed since {path} was written: restore it, or begin another run in another out_dir, with "
            "init_from"
        )
    checkpoint.restore(path, model, optimizer)
    for key, value in state.get("machine", {}).items():
        if value != machine[key]:
            say(f"changed since the checkpoint: {key}: {value} -> {machine[key]}: equal to rounding, not to the bit")
    if state["scaler"]:  # it is empty where dtype was not float16
        scaler.load_state_dict(state["scaler"])
    say(f"resuming from {path}")
    return state
