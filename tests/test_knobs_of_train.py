"""Knobs of train.py that count, ask or average instead of training: dry_run, eval_only, ema, sample_every."""

import functools
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

import flops
from configurator import resolve
from tests.test_train import (
    KNOBS,
    close,
    copy_until,
    fail,
    finish,
    finished,
    same,
    start,
    together,
    train,
    weights,
    write_data,
)
from tests.tiny import ROOT, build
from training import checkpoint, dry_run, metrics
from training.knobs import IDLE, refuse_idle
from training.load import load

LONG = dict(max_steps=12, eval_every=4, save_every=4, keep_last=0, dropout=0.1)
DECAY = 0.75  # the mean of up to 4 steps, exponential from then on


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_data(folder / "data", 0)
    (folder / "bare").mkdir()
    for file in (folder / "data").glob("*.bin"):
        (folder / "bare" / file.name).write_bytes(file.read_bytes())
    (folder / "bare" / "meta.json").write_text('{"tokenizer": null, "vocab_size": 257, "eot_id": 256}')
    return folder


@pytest.fixture(scope="module")
def plain(work):
    return train(work, "plain", **LONG)


@pytest.fixture(scope="module")
def averaged(work):
    return train(work, "averaged", **LONG | dict(save_every=1), ema=DECAY)


# ---- dry_run ---------------------------------------------------------------------------------------------------------
def test_a_dry_run_counts_what_the_run_has_and_makes_no_folder(work, plain):
    result = finish(*start(work, "--dry_run", out_dir="dry", **LONG))
    assert result.code == 0 and not (work / "dry").exists(), result.err
    manifest = json.loads((plain.folder / "manifest.json").read_text())
    assert f"baseline: {manifest['parameters']:,} parameters" in result.out
    work_of_run = manifest["flops_per_token"] * manifest["tokens"]
    assert f"12 steps: {manifest['tokens']:,} tokens, {work_of_run:.4g} FLOPs" in result.out
    assert "together 0.0" in result.out and "checkpoints at most 3 of 0.000 GB" in result.out
    assert "step " not in result.out.replace("a step is", "")  # nothing was trained


def test_a_dry_run_goes_by_the_stages(work):
    knobs = LONG | dict(stages={6: dict(block_size=64, batch_tokens=512)})
    result = finish(*start(work, "--dry_run", out_dir="dry", **knobs))
    run = train(work, "staged", **knobs)
    stages = json.loads((run.folder / "manifest.json").read_text())["stages"]
    expected = 6 * 256 * stages[0]["flops_per_token"] + 6 * 512 * stages[1]["flops_per_token"]
    assert f"12 steps: 4,608 tokens, {expected:.4g} FLOPs" in result.out


def test_a_dry_run_counts_the_checkpoints_that_stay(work):
    knobs = dict(max_steps=100, save_every=10, eval_every=25, keep_last=0, keep_every=0)
    assert dry_run.checkpoints(knobs) == 12  # 10, 20, ... 100, and 25 and 75
    assert dry_run.checkpoints(knobs | dict(keep_last=3)) == 4
    assert dry_run.checkpoints(knobs | dict(keep_last=3, keep_every=50)) == 6
    assert dry_run.checkpoints(knobs | dict(max_steps=15)) == 2


def test_a_checkpoint_has_the_size_that_a_dry_run_says(work, averaged):
    result = finish(*start(work, "--dry_run", out_dir="dry", **LONG, ema=DECAY, n_embd=64, n_inner=256))
    run = train(work, "sizes", **LONG | dict(max_steps=1), ema=DECAY, n_embd=64, n_inner=256)
    size = sum(path.stat().st_size for path in (run.folder / "step-00000001").glob("*.safetensors"))
    said = re.search(r"at most \d+ of (\S+) GB", result.out)[1]
    assert float(said) == pytest.approx(size / 1e9, abs=6e-4) and float(said) > 0


def test_shares_and_an_average_are_in_the_memory_of_a_dry_run(work):
    """Of FSDP's four processes each has a quarter of all but activations."""
    config = SimpleNamespace(vocab_size=320)
    stage = SimpleNamespace(loader=SimpleNamespace(first=0, last=8), micro_batch=4, block_size=32, model_config=config)
    plan = SimpleNamespace(stages=[stage])
    knobs = dict(model="baseline", optimizer="muon", gradient_checkpointing=False, ema=0.9)
    counted = dict(weight_bytes=400, gradient_bytes=400, optimizer_bytes=800, activation_bytes=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "memory", lambda *_: dict(counted))
        alone = dry_run.memory(knobs, plan, "none", "float32", 1)
        shared = dry_run.memory(knobs, plan, "fsdp", "float32", 4)
        copied = dry_run.memory(knobs | dict(ema=0.0), plan, "ddp", "float32", 4)
    assert alone == dict(weight=400, gradient=400, optimizer=800, activation=1000, average=400)
    assert shared == dict(weight=100, gradient=100, optimizer=200, activation=1000, average=100)
    assert copied == dict(weight=400, gradient=800, optimizer=800, activation=1000)


def test_a_dry_run_that_takes_time_does_three_steps_and_makes_no_folder(work):
    result = finish(*start(work, "--dry_run=time", out_dir="dry", **LONG))
    assert result.code == 0 and not (work / "dry").exists(), result.err
    assert re.search(r"3 steps took (\d+\.\d\d, ){2}\d+\.\d\d s: 12 take about 0\.\d minutes", result.out)


def test_a_dry_run_that_takes_time_refuses_what_has_no_room(work):
    knobs = LONG | dict(vocab_size=10**8, n_embd=1024)
    message = fail(work, "dry", "--dry_run=time", **knobs)
    assert re.search(r"the run needs about \S+ GB, and a process has \S+ GB here: try a smaller micro_batch", message)
    assert not (work / "dry").exists()
    assert finish(*start(work, "--dry_run", out_dir="dry", **knobs)).code == 0  # which only says so


def test_steps_that_take_too_long_are_refused():
    net = torch.nn.Linear(4, 4)
    stage = SimpleNamespace(loader=SimpleNamespace(batches=lambda step: [(torch.ones(1, 4), None)]),
                            is_uneven=False)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "loss_of", lambda net, x, y, stage: net(x).sum())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        assert len(dry_run.time_steps(net, optimizer, stage, True, torch.enable_grad()))
        with pytest.raises(ValueError, match="0 steps and a part of one took .* s, and 3 may take 0 s"):
            dry_run.time_steps(net, optimizer, stage, True, torch.enable_grad(), most_seconds=0)


# ---- eval_only -------------------------------------------------------------------------------------------------------
def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_eval_only_prints_the_loss_of_the_newest_checkpoint_and_leaves_the_run_as_it_is(work, plain):
    before = contents(plain.folder)
    result = finish(*start(work, "--eval_only", out_dir="plain", **LONG))
    assert result.code == 0, result.err
    assert contents(plain.folder) == before
    loss = plain.evaluations[-1]["val_loss"]
    assert f"step     12 | validation loss {loss:.4f}" in result.out


def test_eval_only_takes_the_weights_of_init_from_where_there_is_no_run(work, plain):
    result = finish(*start(work, "--eval_only", "--init_from=plain", out_dir="never", **LONG))
    assert f"step      0 | validation loss {plain.evaluations[-1]['val_loss']:.4f}" in result.out
    assert not (work / "never").exists()
    message = fail(work, "never", "--eval_only", **LONG)
    assert "eval_only needs weights: there is no checkpoint in never, and no init_from is given" in message


def test_eval_only_evaluates_the_average_in_the_stage_of_its_step(work, averaged):
    result = finish(*start(work, "--eval_only", out_dir="averaged", **LONG))
    assert f"step     12 | validation loss {averaged.evaluations[-1]['val_loss']:.4f}" in result.out


# ---- ema -------------------------------------------------------------------------------------------------------------
def average_of(run, steps):
    """The average of what the steps' checkpoints hold, by the definition: a mean first, exponential later."""
    found = None
    for n in range(1, steps + 1):
        now = {name: tensor.double() for name, tensor in weights(run.folder, n).items()}
        share = max(1 - DECAY, 1 / n)
        found = now if n == 1 else {name: (1 - share) * found[name] + share * now[name] for name in now}
    return found


def test_the_average_is_a_mean_at_first_and_exponential_later_and_weights_learn_as_without(work, plain, averaged):
    assert averaged.losses == plain.losses
    for step in (3, 12):
        stored = weights(averaged.folder, step, "ema")
        expected = average_of(averaged, step)
        assert stored.keys() == expected.keys()
        for name in stored:
            torch.testing.assert_close(stored[name].double(), expected[name], atol=1e-6, rtol=1e-5)


def test_what_is_evaluated_and_loaded_is_the_average(work, plain, averaged):
    expected = finish(*start(work, "--eval_only", out_dir="plain", **LONG)).out
    assert f"validation loss {averaged.evaluations[-1]['val_loss']:.4f}" not in expected
    model, _, _ = load(averaged.folder)
    assert torch.equal(model.embed.weight, weights(averaged.folder, 12, "ema")["embed.weight"])
    model, _, _ = load(averaged.folder, average=False)
    assert torch.equal(model.embed.weight, weights(averaged.folder, 12)["embed.weight"])
    run = train(work, "on", "--init_from=averaged", max_steps=1)
    assert run.evaluations[0]["val_loss"] == averaged.evaluations[-1]["val_loss"]


def test_an_average_is_resumed_bit_for_bit(work, averaged):
    copy_until(averaged, work / "averaged again", 6)
    again = train(work, "averaged again", "--resume", **LONG | dict(save_every=1), ema=DECAY)
    assert same(again, averaged, 12)
    ends = [run.folder / "step-00000012" / "ema.safetensors" for run in (again, averaged)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_an_average_that_begins_later_begins_with_the_weights_that_are_there(work, plain):
    copy_until(plain, work / "later", 8)
    run = train(work, "later", "--resume", **LONG | dict(save_every=1), ema=0.9)
    both = weights(run.folder, 9, "ema")["embed.weight"], weights(run.folder, 9)["embed.weight"]
    assert torch.equal(*both)  # the mean of one step


def test_a_damaged_average_is_a_damaged_checkpoint(work, averaged):
    copy_until(averaged, work / "damaged", 12)
    path = work / "damaged" / "step-00000012" / "ema.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    assert checkpoint.newest(work / "damaged", lambda _: None).name == "step-00000011"


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_processes_have_the_average_that_one_has(work, how):
    knobs = dict(ema=DECAY, eval_every=3, micro_batch=2)
    one = train(work, f"one {how}", **knobs)
    results = [finish(*run) for run in together(work, 2, out_dir=how, parallel=how, sample_every=2, **knobs)]
    assert [result.code for result in results] == [0, 0], results
    two = finished(work / how)
    for key in ("loss", "val_loss"):
        assert close(*([row[key] for row in run.rows if key in row] for run in (one, two))), key
    torch.testing.assert_close(weights(two.folder, 6, "ema"), weights(one.folder, 6, "ema"), atol=1e-5, rtol=0)
    assert results[0].out.count("| sample ") == 3 and not results[1].out


# ---- what is printed -------------------------------------------------------------------------------------------------
def test_a_sample_is_printed_every_so_many_steps_and_disturbs_nothing(work, plain):
    run = train(work, "sampled", **LONG, sample_every=3)
    assert same(run, plain, 12)
    lines = re.findall(r"step +(\d+) \| sample (.*)", run.out)
    assert [int(step) for step, _ in lines] == [3, 6, 9, 12]
    texts = [json.loads(text) for _, text in lines]
    begin = texts[0][:10]
    assert all(text.startswith(begin) and len(text.encode()) >= 40 for text in texts)
    assert len(set(texts)) > 1  # the same random numbers, and other weights


def test_a_sample_needs_text(work):
    assert "sample_every needs text, and bare has no tokenizer" in fail(work, "no text", sample_every=2, data="bare")


def test_the_smoothed_loss_weighs_the_last_steps_most(plain):
    for n, row in enumerate(plain.steps, 1):
        weights_of = [0.95 ** (n - 1 - i) for i in range(n)]
        expected = sum(w * loss for w, loss in zip(weights_of, plain.losses)) / sum(weights_of)
        assert row["smoothed_loss"] == pytest.approx(expected)
    assert f"loss {plain.losses[9]:.4f} (smoothed {plain.steps[9]['smoothed_loss']:.4f})" in plain.out
    assert math.isnan(metrics.smoothed([]))


# ---- refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("knobs, message", [
    (dict(ema=1.0), "ema=1.0: it lies in [0, 1)"),
    (dict(sample_every=-1), "sample_every=-1: try 0 or more"),
    (dict(dry_run="space"), "dry_run=space: try one of time, True, False"),
    (dict(resume=True, overwrite=True), "resume goes on with what is in refused, and overwrite deletes it: give one"),
    (dict(dry_run=True, eval_only=True), "dry_run counts what training would cost, and eval_only trains nothing"),
    (dict(dry_run=True, overwrite=True), "dry_run writes nothing, and overwrite deletes the run in refused"),
    (dict(eval_only=True, overwrite=True), "eval_only writes nothing, and overwrite deletes the run in refused"),
    (dict(model="moe", n_expert_per_token=1), "n_expert_per_token=1: a single gate that is normalized"),
    (dict(eval_only=True, sample_every=2), "eval_only takes no step after which sample_every could print"),
])  # fmt: skip
def test_knobs_that_mean_nothing_together_are_refused(work, knobs, message):
    assert message in fail(work, "refused", **knobs)
    assert not (work / "refused").exists()


# A command, a model, what makes a knob do nothing, and that knob: for each row of the table, in its order.
IDLE_KNOBS = (
    ("train.py", "baseline", dict(rope_scaling="none"), dict(rope_factor=4.0)),
    ("train.py", "baseline", dict(rope_scaling="linear", rope_factor=2), dict(rope_original=16)),
    ("train.py", "baseline", dict(rope_factor=1.0), dict(rope_scaling="linear")),
    ("train.py", "hybrid", dict(layer_pattern="d", rope_factor=2), dict(rope_scaling="linear")),
    ("train.py", "hybrid", dict(layer_pattern="d"), dict(qkv_gates="v")),
    ("train.py", "hybrid", dict(layer_pattern="d"), dict(output_gate="head")),
    ("train.py", "hybrid", dict(layer_pattern="d"), dict(gate_activation="softplus")),
    ("train.py", "gated", dict(output_gate="none"), dict(gate_activation="softplus")),
    ("train.py", "hybrid", dict(layer_pattern="d"), dict(rotary_fraction=0.5)),
    ("train.py", "linear", dict(layer_pattern="a"), dict(decay="none")),
    ("train.py", "sliding", dict(layer_pattern="a"), dict(n_global_token=2)),
    ("train.py", "moe", dict(n_shared_expert=0), dict(shared_gate=True)),
    ("train.py", "switch", dict(capacity_factor=0), dict(drop_by="score")),
    ("train.py", "switch", dict(balance_loss=0), dict(balance_over="batch")),
    ("train.py", "baseline", dict(pack="documents"), dict(document_start_probability=0.5)),
    ("train.py", "baseline", dict(weight_decay=0), dict(decay_with_lr=False)),
    ("train.py", "baseline", dict(weight_decay=0), dict(cautious_decay=True)),
    ("train.py", "baseline", dict(keep_last=0), dict(keep_every=5)),
    ("grpo.py", "baseline", dict(teacher="a run"), dict(scale_rewards="none")),
    ("grpo.py", "baseline", dict(loss_type="cispo"), dict(clip_low=0.1)),
    ("grpo.py", "baseline", dict(think="never"), dict(think_budget=5)),
    ("dpo.py", "baseline", dict(loss_type="ipo"), dict(label_smoothing=0.1)),
    ("dpo.py", "baseline", dict(online=0), dict(temperature=0.5)),
    ("grpo.py", "baseline", dict(rewards=""), dict(reward_model="a run")),
    ("grpo.py", "baseline", dict(rewards=""), dict(eval_samples=5)),
    ("grpo.py", "baseline", dict(eval_data=""), dict(eval_samples=5)),
    ("reward.py", "baseline", dict(best_of=0), dict(eval_data="problems")),
)
defaults_of = functools.cache(lambda script, model: resolve(ROOT / script, [f"--model={model}"]))


@pytest.mark.parametrize("row, case", zip(IDLE, IDLE_KNOBS, strict=True))
def test_a_knob_that_does_nothing_beside_another_one_is_refused_by_name(row, case):
    knob, off, other, _ = row
    script, model, beside, idle = case
    defaults = defaults_of(script, model)
    assert defaults[knob] == off and idle[knob] != off
    with pytest.raises(ValueError, match=f"^{knob}=.* does nothing while {other}=.*, or give {knob}={off}$"):
        refuse_idle(defaults | beside | idle)
    if script == "train.py" and knob in vars(build(model).config):  # the model computes the same with it and without
        torch.manual_seed(1)
        x = torch.randint(97, (2, 16))
        without = build(model, **beside, **{knob: off}).train()
        with_it = build(model, **beside, **idle).train()
        assert with_it(x, x).item() == without(x, x).item()


def test_help_explains_each_of_them(work):
    result = finish(*start(work, "--help", **dict.fromkeys(KNOBS)))
    for knob in ("ema", "sample_every", "eval_only", "dry_run"):
        assert re.search(rf"--{knob}=\S+ +\w+", result.out), knob
