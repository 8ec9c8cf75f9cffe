"""A run of post-training: what grpo.py, dpo.py and reward.py have besides their algorithm.

Its folder is that of a run of train.py (run_folder.py): checkpoints and exact resume, metrics, a picture, signals.
"""

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import muon
from data.tokenizers import Tokenizer
from distributed import processes
from training import checkpoint, metrics, pictures, run_folder, saving
from training.machine import Machine
from training.schedule import learning_rate as learning_rate_at
from training.signals import DIVERGED, StopSignals
from training.update import update

MAX_SKIPPED = 10  # a run ends after so many updates in a row with a gradient that is not finite


class Run:
    """A run, which it begins or resumes as the knobs say. ValueError, OSError and CheckpointError say why it cannot be.

    step: how many are done. state: what a script wants to find again where the run goes on, as JSON has it.
    config: the knobs and the model's fields, as configure returns them.
    identity: what a resumed run must find again, "data" and "tokenizer" among them. curve: what the picture shows.
    evaluates: whether there is anything to evaluate.
    """

    def __init__(
        self, config: dict, here: Machine, model: torch.nn.Module, tokenizer: Tokenizer, identity: dict,
        curve: pictures.Curve, evaluates: bool,
    ):  # fmt: skip
        self.knobs = config
        self.here = here
        self.model = model
        self.identity = identity
        self.evaluates = evaluates
        self.out = Path(config["out_dir"])
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.state = {}
        names = ("optimizer", "learning_rate", "weight_decay", "beta1", "beta2")
        self.optimizer = muon.make_optimizer(model, **{name: config[name] for name in names})
        self.scaler = torch.amp.GradScaler(here.device_type, enabled=False)  # as train.py's checkpoints have one
        processes.check_same(config=config, data=identity, code=run_folder.code_of(config["model"]))

        # 1. the folder, and what is in it
        resume = config["resume"]
        lock, already_there = run_folder.claim(self.out, resume, config["overwrite"])
        script = Path(sys.argv[0]).name
        saved_config = run_folder.to_save(config["model"], asdict(model.config), config) | {"script": script}
        path = checkpoint.newest(self.out, here.say) if resume else None
        if path:
            before = checkpoint.load_config(path).get("script", "train.py")
            if before != script:
                raise ValueError(f"{self.out} holds a run of {before}: go on with that, or choose another --out_dir")
            state = saving.go_on_from(
                path, model, self.optimizer, self.scaler, saved_config, identity, here.facts(), here.say
            )
            self.step = state["step"]
            self.skipped = state["skipped"]
            self.skipped_in_a_row = state["skipped_in_a_row"]
            self.state = state["state"]
        elif resume and already_there:
            here.say(f"no checkpoint in {self.out} yet: beginning again")
        self.evaluated_at = self.step if path and saving.was_evaluated(path) else -1

        # 2. what it writes
        self.saver = saving.Saver(
            self.out, lock, model, self.optimizer, saved_config, config["keep_last"], keep_every=0, say=here.say
        )
        self.command = run_folder.resume_command(here.parallel)
        processes.barrier()  # nobody writes before all have read
        if here.rank == 0:
            if already_there and not resume:
                run_folder.delete(self.out)
            meta = {"tokenizer": tokenizer.to_dict(), "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id}
            facts = {"seed": config["seed"], **identity, "hardware": here.described()}
            run_folder.describe(self.out, saved_config, meta, facts)
            self.album = pictures.Album(self.out, f"{self.out}: {config['model']}", curve=curve)
            self.log = metrics.Log(
                self.out, self.step, config, config["wandb"], config["tensorboard"], self.album,
                evaluated=self.evaluated_at == self.step,
            )  # fmt: skip
            self.samples = metrics.Rows(self.out / "samples.jsonl", self.step)
            self.write_state("running")
        if path:
            self.saver.repair(path)
        self.curve = curve
        self.stop = 0
        self.signals = StopSignals(quiet=here.rank > 0)
        self.clock = metrics.Clock()
        self.begin = time.perf_counter()
        self.step_began = self.begin

    def write_state(self, word):
        run_folder.write_state(self.out, word, self.step, self.knobs["max_steps"], self.command)

    # ---- what is due -------------------------------------------------------------------------------------------------
    @property
    def is_done(self) -> bool:
        return self.step >= self.knobs["max_steps"]

    @property
    def evaluation_is_due(self) -> bool:
        every = self.knobs["eval_every"]
        is_time = self.step % every == 0 or self.is_done
        return self.evaluates and is_time and self.step != self.evaluated_at

    def asked_to_stop(self) -> bool:
        """Returns whether a signal asked any process to stop. All processes call it."""
        (self.stop,) = processes.all_sum([self.signals.count()], self.here.device)
        return self.stop > 0

    # ---- what is written ---------------------------------------------------------------------------------------------
    def save_if_due(self, now: bool = False) -> None:
        """Saves the step where that is due, or now: before each evaluation, every save_every steps and at the end."""
        every = self.knobs["save_every"]
        is_due = now or self.evaluation_is_due or self.step % every == 0 or self.is_done
        if self.step == self.saver.saved_at or not is_due:
            return
        trainer = {"tokens": 0, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "state": self.state,
                   "scaler": {}, "identity": self.identity, "machine": self.here.facts()}  # fmt: skip
        self.saver.save(self.step, trainer, wait=True, must=self.is_done or self.stop > 0)

    def note_evaluation(self, row: dict, error: float) -> None:
        """Notes what an evaluation found. error: by which the best checkpoint is chosen, the one with the least."""
        self.evaluated_at = self.step
        if self.here.rank == 0:
            self.log.write({"step": self.step, **row})
            numbers = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in row.items())
            self.here.say(f"step {self.step:>6} | evaluated: {numbers}")
        if self.step > 0:
            self.saver.note_evaluation(self.step, error, tokens=0)
        if self.here.rank == 0 and self.step > 0:
            self.album.draw()

    def note_samples(self, rows: list[dict]) -> None:
        """Writes what the model wrote in this step to samples.jsonl, before it ends. Process 0 alone does."""
        if self.here.rank == 0:
            for row in rows:
                self.samples.write({"step": self.step + 1, **row})

    # ---- a step ------------------------------------------------------------------------------------------------------
    def begin_step(self) -> None:
        """Starts the clock of a step."""
        self.step_began = time.perf_counter()

    def update(self) -> tuple[float, float]:
        """Updates the weights by the gradients that are there; returns the learning rate and the gradient's norm."""
        knobs = self.knobs
        lr = learning_rate_at(
            self.step, knobs["learning_rate"], knobs["min_lr"], knobs["warmup_steps"], knobs["max_steps"],
            knobs["schedule"], decay_fraction=0.2, decay_shape="linear",
        )  # fmt: skip
        norm = update(self.model, self.optimizer, self.scaler, lr, knobs["grad_clip"])
        is_finite = math.isfinite(norm)
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if not is_finite:
            self.here.say(f"step {self.step:>6} | gradient norm {norm}: not updated, {self.skipped} times in all")
        return lr, norm

    def end_step(self, row: dict, line: str) -> None:
        """Counts the step, and notes its numbers. line: what is printed of it every log_every steps."""
        self.step += 1
        self.clock.tick()
        seconds = time.perf_counter() - self.step_began
        row = {"step": self.step, **row, "ms": 1000 * seconds, "skipped": self.skipped}
        row["memory_gb"] = metrics.peak_gb(self.here.device_type)
        if self.step % self.knobs["log_every"] == 0 or self.is_done:
            left = self.clock.seconds_left(self.knobs["max_steps"] - self.step)
            eta = f"eta {left // 60:.0f}:{left % 60:02.0f}"
            self.here.say(f"step {self.step:>6}/{self.knobs['max_steps']} | {line} | {1000 * seconds:.0f} ms | {eta}")
        if self.here.rank == 0:
            self.log.write(row | metrics.of_model(self.model, with_tables=self.step % self.knobs["log_every"] == 0))
        if self.clock.steps == 1:
            processes.set_timeout(self.knobs["timeout"])
        if self.skipped_in_a_row >= MAX_SKIPPED:
            if self.here.rank == 0:
                self.write_state("diverged")
            processes.fail(
                f"{MAX_SKIPPED} updates in a row without a finite gradient: stopped. Last good checkpoint is "
                f"{self.saver.in_place}: try a lower learning_rate",
                DIVERGED,
            )

    def fail(self, message: str) -> None:
        """Ends the run and the process with an error, with what was learned saved. All processes call it."""
        self.save_if_due(now=True)
        if self.here.rank == 0:
            self.log.close()
            self.samples.close()
            self.write_state("stopped")
        lost = "" if self.saver.saved_at == self.step else ", which could not be saved"
        processes.fail(f"{message}; stopped after step {self.step}{lost}: mend it, and go on with  {self.command}")

    def finish(self, next_command: str = "") -> None:
        """Ends the run and the process, with what there is to say, such as what to do with the weights."""
        self.saver.finish(must=True)
        if self.here.rank == 0:
            self.log.close()
            self.samples.close()
            self.album.finish()
            self.write_state("stopped" if self.stop else "finished")
        if self.stop:
            reason = self.signals.received[0] if self.signals.received else "signal"
            self.here.say(f"{reason}: stopped after step {self.step}; go on with  {self.command}")
        picture = self.out / f"{self.curve.step}.png"
        seconds = time.perf_counter() - self.begin
        hint = f", and try  {next_command}" if next_command else ""
        self.here.say(f"{seconds:.0f} s; see {picture}{hint}")
        processes.finish()
