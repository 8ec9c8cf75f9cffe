"""The stages of a run: from which step on which knobs hold, and what is read by them. A run without stages has one.

    stages = {
        1000: dict(block_size=512, window=256),                  from step 1000 on
        0.75: dict(block_size=1024, data="data/long"),           from three quarters of max_steps on
    }

Everything at a step is a function of the step: which stage it is in, and where in each text its windows begin. So a run
that is resumed is in the right stage by itself.
"""

import dataclasses
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from configurator import check_values
from data.loader import Loader, check_evaluation, eval_batches, read_mixture
from data.shards import Shards
from flops import without_contents
from training.knobs import refuse_idle, windows_of_a_step

# What a stage may change, besides the fields of GPTConfig that leave the weights their shapes.
KNOBS = (
    "data block_size batch_tokens micro_batch document_mask document_start_probability mask_document_crossing pack "
    "long_documents"
).split()


class Stage:
    """What holds from a step on: the knobs of KNOBS as attributes, and the texts that they name."""

    def __init__(self, when: int | float, given: dict, values: dict, texts: list, val_texts: list):
        self.when = when  # as the config says it
        self.given = given  # what this stage changes
        self.texts = texts  # [(Shards, weight)] to train on
        self.val_texts = val_texts  # [Shards] to evaluate on
        self.first = 0  # the step from which it holds
        self.loader = None
        self.fields = {}  # of GPTConfig, as they were given to it
        self.model_config = None
        self.flops_per_token = math.nan
        for key in KNOBS:
            setattr(self, key, values[key])
        self.values = values
        # Stages of one order go on where the one before stopped; packed windows of each size have their own.
        self.order = "stream" if self.pack == "stream" else self.block_size
        learns_all = all(shards.learns_all for shards, _ in texts)
        ignores_targets = self.mask_document_crossing or self.pack == "documents" or not learns_all
        self.is_uneven = ignores_targets  # windows have unequal numbers of what the losses are means over

    @property
    def val_names(self) -> list[str]:
        return names_of(self.val_texts)

    def describe(self) -> str:
        """Returns a line that says what this stage changes, and how a step is computed."""
        loader = self.loader
        windows = loader.last - loader.first
        passes = math.ceil(windows / self.micro_batch)
        line = f"a step is {loader.batch_windows} windows of {self.block_size} = "
        line += f"{passes} x {min(self.micro_batch, windows)} on each process"
        given = ", ".join(f"{key}={value!r}" for key, value in self.given.items())
        if given:
            line = f"{given}: {line}"
        if self.pack == "documents":
            fate = {"cut": "cut", "skip": "left out"}[self.long_documents]
            for name, text in zip(self.val_names, loader.mixture.texts):
                line += f"; {name}: {100 * text.utilisation:.1f} % of its windows is text, "
                line += f"{text.n_long} documents longer than {self.block_size} are {fate}"
                if text.n_without_target:
                    line += f", {text.n_without_target} windows have nothing to learn"
        return line

    def evaluations(self, eval_tokens: int, rank: int, world_size: int, device: str) -> Iterator[tuple]:
        """Yields each text to evaluate on with its batches; all of them together have about eval_tokens targets."""
        whole = sum(weight for _, weight in self.texts)
        for shards, (_, weight) in zip(self.val_texts, self.texts):
            share = math.ceil(eval_tokens * weight / whole)
            yield shards, eval_batches(shards, self.block_size, share, self.micro_batch, rank, world_size, device)


class Plan:
    """The stages of a run, in order. Each changes what the one before it left.

    config: the knobs of train.py and the fields of its model, as configure returns them. A ValueError says which stage
    is impossible.
    """

    def __init__(self, config: dict, script: str, GPTConfig: type):
        self.stages = []
        self.opened = {}  # {folder: (Shards to train on, Shards to validate on)}
        fields = [field.name for field in dataclasses.fields(GPTConfig)]
        values = config
        for when, given in [(0, {}), *config["stages"].items()]:
            with naming(when):
                check_entry(when, given, {*KNOBS, *fields})
                values = values | check_values(script, config, given, f"in the stage of {when}")
                refuse_idle(values)
                self.stages.append(self.open_stage(when, given, values))
        self.check_one_tokenizer()

    def open_stage(self, when, given, values):
        """Returns a stage; a text is opened once for all stages."""
        texts = []
        val_texts = []
        for folder, weight in read_mixture(values["data"]):
            place = folder.resolve()
            if place not in self.opened:
                self.opened[place] = Shards(folder, "train"), Shards(folder, "val")
            train, val = self.opened[place]
            check_evaluation(val, values["block_size"])
            texts.append((train, weight))
            val_texts.append(val)
        return Stage(when, given, values, texts, val_texts)

    def check_one_tokenizer(self):
        first, *others = self.texts
        for shards in others:
            for key in ("tokenizer", "vocab_size", "eot_id"):
                if shards.meta[key] != first.meta[key]:
                    why = f"{shards.folder} and {first.folder} differ in their {key}"
                    raise ValueError(f"{why}: prepare one with the tokenizer of the other")

    @property
    def texts(self) -> list[Shards]:
        """The splits to train on of all stages, in the order of their first use."""
        return [train for train, _ in self.opened.values()]

    @property
    def splits(self) -> list[Shards]:
        """All splits that the run reads."""
        return [shards for pair in self.opened.values() for shards in pair]

    def identity(self) -> dict:
        """Returns what of the data a resumed run must find again; of one text, and not of a mixture, without lists."""
        prints = [shards.fingerprint for shards in self.texts]
        return {
            "data_fingerprint": prints if len(prints) > 1 else prints[0],
            "shards": [shards.contents for shards in self.splits],
        }

    def lay_out(self, max_steps: int, rank: int, world_size: int, device: str) -> None:
        """Says from which steps on the stages hold, and makes their loaders."""
        cells = {}  # {folder: the longest of the windows that any stage reads of a text}
        before = -1
        for stage in self.stages:
            stage.first = stage.when
            if isinstance(stage.when, float):
                stage.first = round(stage.when * max_steps)
            if stage.first <= before:
                raise ValueError(f"stages: {stage.when} is step {stage.first}, and step {before} has a stage before it")
            before = stage.first
            for shards, _ in stage.texts:
                if stage.pack == "stream":
                    cells[shards.folder] = max(cells.get(shards.folder, 0), stage.block_size)

        positions = {}  # {order: {folder: Position}}
        for i, stage in enumerate(self.stages):
            with naming(stage.when):
                windows = windows_of_a_step(stage.batch_tokens, stage.block_size, world_size)
                stage.loader = Loader(
                    stage.texts, stage.block_size, windows, stage.values["seed"], rank, world_size, stage.micro_batch,
                    device, stage.document_start_probability, stage.mask_document_crossing, stage.pack,
                    stage.long_documents, positions.get(stage.order, {}), cells,
                )  # fmt: skip
            stage.loader.go_on(stage.first, 0)
            if i + 1 < len(self.stages):
                after = stage.loader.positions_before(self.stages[i + 1].first)
                positions[stage.order] = positions.get(stage.order, {}) | after

    def try_first_batches(self, eval_tokens: int, rank: int, world_size: int, device: str) -> None:
        """Reads what the run will read first. ValueError where that is damaged."""
        first = self.stages[0]
        next(first.loader.batches(0))
        for _, batches in first.evaluations(eval_tokens, rank, world_size, device):
            next(batches, None)

    def settle(self, GPTConfig: type, GPT: type, vocab_size: int, eot_id: int) -> None:
        """Gives each stage its fields and model_config. ValueError where a stage's weights would have other shapes."""
        names = [field.name for field in dataclasses.fields(GPTConfig)]
        for stage in self.stages:
            stage.fields = {name: stage.values[name] for name in names}
            stage.fields["vocab_size"] = vocab_size
            with naming(stage.when):
                if stage.fields["eot_id"] >= vocab_size:
                    why = f"no token of a vocabulary of {vocab_size}: try 0 to {vocab_size - 1}"
                    raise ValueError(f"eot_id={stage.fields['eot_id']} is {why}")
                if stage.document_mask and stage.fields["eot_id"] not in (-1, eot_id):
                    why = f"document_mask sets it to {eot_id}: give one of them"
                    raise ValueError(f"eot_id={stage.fields['eot_id']}, and {why}")
                if stage.document_mask:
                    stage.fields["eot_id"] = eot_id
                stage.model_config = GPTConfig(**stage.fields)
            if hasattr(GPT, "padding") and stage.model_config.eot_id >= 0:  # an empty document is padding to it
                stage.is_uneven = True
        if len(self.stages) == 1:
            return
        shapes = shapes_of(GPT, self.stages[0].model_config)
        for stage in self.stages[1:]:
            others = shapes_of(GPT, stage.model_config)
            for name in others | shapes:
                if shapes.get(name) != others.get(name):
                    change = f"{name} would be {others.get(name, 'gone')}, and is {shapes.get(name, 'not there')}"
                    raise ValueError(f"stages: {stage.when}: {change}: not a stage's matter")

    def parts(self, GPT: type) -> list[tuple]:
        """Returns for each stage (its share of the steps, what puts a model into it, the batches of its n-th step)."""
        found = []
        shares = [stage.when for stage in self.stages] + [1.0]
        for stage, share, following in zip(self.stages, shares, shares[1:]):
            if share and not isinstance(share, float):
                raise ValueError(f"minutes chooses max_steps, and a stage begins at step {share}: give a share, as 0.5")
            put = partial(change, GPT=GPT, config=stage.model_config)
            found.append((following - share, put, lambda n, stage=stage: stage.loader.batches(stage.first + n)))
        return found

    def described(self) -> list[dict]:
        """Returns the stages for a manifest."""
        of_each = []
        for stage in self.stages:
            of_each.append({"first": stage.first, "given": stage.given, "flops_per_token": stage.flops_per_token})
        return of_each

    def spans(self, until: int) -> Iterator[tuple[Stage, int]]:
        """Yields each stage that begins before a step, and the step before which it ends, or else this one."""
        ends = [stage.first for stage in self.stages[1:]] + [until]
        for stage, end in zip(self.stages, ends):
            if stage.first < until:
                yield stage, min(end, until)

    def epochs(self, max_steps: int) -> dict:
        """Returns {name: how often the run goes through a text} in so many steps."""
        found = {}
        names = dict(zip(self.texts, names_of(self.texts)))
        for stage, end in self.spans(max_steps):
            counts = stage.loader.epochs_before(end).values()
            found |= {names[shards]: n for (shards, _), n in zip(stage.texts, counts)}
        return found

    def go_on(self, step: int, tokens: int) -> None:
        """Says that so many tokens came before a step, because the run had another batch until now."""
        if len(self.stages) > 1:
            planned = self.tokens_before(step)
            raise ValueError(
                f"step {step} of these stages has {planned:,} tokens before it, and the run had {tokens:,}: "
                "go on with its stages and its batch_tokens"
            )
        stage = self.stages[0]
        stage.loader.go_on(step, tokens // stage.block_size)

    def at(self, step: int) -> Stage:
        """Returns the stage that a step is in."""
        return [stage for stage in self.stages if stage.first <= step][-1]

    def tokens_before(self, step: int) -> int:
        """Returns the tokens that the steps before this one have."""
        return sum((end - stage.first) * stage.batch_tokens for stage, end in self.spans(step))


def names_of(texts: list[Shards]) -> list[str]:
    """Returns short names: those of the folders, or their paths where two folders have the same name."""
    names = [shards.folder.name for shards in texts]
    if len(set(names)) < len(names):
        names = [str(shards.folder) for shards in texts]
    return names


@contextmanager
def naming(when):
    """Puts a stage's step before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stages: {when}: {error}" if when else str(error)) from None


def check_entry(when, given, known):
    """Raises ValueError where an entry of the knob `stages` is none."""
    is_step = isinstance(when, int) and not isinstance(when, bool) and when >= 0
    is_share = isinstance(when, float) and 0 < when < 1
    if not (is_step or is_share):
        raise ValueError("give a step from 1, or a share of max_steps between 0 and 1")
    if not isinstance(given, dict):
        raise ValueError(f"{given!r} is no dict of knobs: write dict(block_size=512)")
    for key in given:
        if key not in known:
            raise ValueError(f"{key} is nothing that a stage can change: try one of {', '.join(sorted(known))}")


def shapes_of(GPT, config):
    return {name: tuple(p.shape) for name, p in without_contents(GPT, config).named_parameters()}


def change(model: torch.nn.Module, GPT: type, config) -> None:
    """Gives a built model another config that leaves its weights their shapes: it then computes what GPT(config) would.

    Of each module those attributes are replaced that come of the config: numbers, texts, functions, and the config.
    """
    fresh = without_contents(GPT, config)
    settings = (bool, int, float, str, types.FunctionType, types.BuiltinFunctionType, type(config))
    for old, new in zip(model.modules(), fresh.modules(), strict=True):
        for key, value in vars(new).items():
            if isinstance(value, settings) and key != "training":
                setattr(old, key, value)
