"""Runs of several stages, on mixtures of texts, and in windows of whole documents."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

import eval as evaluation
from configurator import resolve
from data.shards import Shards, write_shard
from tests.test_train import (
    KNOBS,
    close,
    copy_until,
    fail,
    finish,
    finished,
    same,
    together,
    train,
    weights,
    write_data,
)
from tests.tiny import BLOCK, MODELS, ROOT, build, module, tokens
from training import checkpoint, stages
from training.load import load

FIRST = dict(block_size=16, batch_tokens=256, max_steps=24, save_every=4, keep_last=0, eval_every=8, dropout=0.1)
STAGES = {8: dict(block_size=32, rope_theta=1e5), 0.75: dict(block_size=64, batch_tokens=512, data="more")}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two texts of one tokenizer, and one of another."""
    folder = tmp_path_factory.mktemp("work")
    write_data(folder / "data", 0)
    write_data(folder / "more", 1)
    write_data(folder / "other", 2, add_tokens=["<|x|>"])
    return folder


@pytest.fixture(scope="module")
def staged(work):
    return train(work, "staged", **FIRST, stages=STAGES)


# ---- stages ----------------------------------------------------------------------------------------------------------
def test_each_step_has_the_batch_of_its_stage_and_the_log_the_manifest_and_the_checkpoints_say_so(staged):
    seen = np.diff([0, *(row["tokens"] for row in staged.steps)]).tolist()
    assert seen == [256] * 18 + [512] * 6
    assert "from step 8 on block_size=32, rope_theta=100000.0: a step is 8 windows of 32 = 2 x 4" in staged.out
    assert "step     18 | block_size=64, batch_tokens=512, data='more'" in staged.out
    assert "epochs of data" in staged.out and "epochs of more" in staged.out
    manifest = json.loads((staged.folder / "manifest.json").read_text())
    assert [stage["first"] for stage in manifest["stages"]] == [0, 8, 18]
    assert manifest["tokens"] == staged.steps[-1]["tokens"]
    sizes = {}
    for path in checkpoint.folders(staged.folder):
        sizes[int(path.name[5:])] = checkpoint.load_config(path)["model_config"]["block_size"]
    assert sizes == {4: 16, 8: 32, 12: 32, 16: 32, 20: 64, 24: 64}
    model, _, _ = load(staged.folder)
    assert model.config.block_size == 64 and model.config.rope_theta == 1e5


@pytest.mark.parametrize("step", [4, 8, 16, 20])
def test_a_run_that_is_resumed_before_at_and_after_a_boundary_equals_one_that_never_stopped(work, staged, step):
    copy_until(staged, work / f"again{step}", step)
    again = train(work, f"again{step}", "--resume", **FIRST, stages=STAGES)
    assert again.out.count("changed since") == again.out.count("changed since the checkpoint: out_dir") == 1
    assert same(again, staged, 24)


def test_no_stage_sees_what_another_one_saw_in_the_same_epoch(work):
    knobs = FIRST | dict(stages={8: dict(block_size=64), 0.5: dict(block_size=32), 20: dict(block_size=64)})
    config = resolve(ROOT / "train.py", [f"--{key}={value}" for key, value in knobs.items()])
    config["data"] = str(work / "data")
    plan = stages.Plan(config, ROOT / "train.py", module("baseline").GPTConfig)
    plan.lay_out(24, rank=0, world_size=1, device="cpu")
    assert [plan.at(step).first for step in (0, 7, 8, 11, 12, 19, 20, 23)] == [0, 0, 8, 8, 12, 12, 20, 20]
    seen = []
    for step in range(24):
        for window in plan.at(step).loader.windows(step):
            ((start, n, _),) = window.pieces
            seen += range(start, start + n)
    assert len(seen) == len(set(seen)) == 24 * 256


@pytest.mark.xdist_group("processes")
def test_two_processes_go_through_stages_like_one(work):
    knobs = FIRST | dict(dropout=0.0, stages=STAGES, data=["data:0.6", "more:0.4"], pack="documents")
    one = train(work, "one", **knobs)
    results = [finish(*run) for run in together(work, 2, out_dir="two", **knobs)]
    assert [result.code for result in results] == [0, 0], results
    two = finished(work / "two")
    for key in ("loss", "grad_norm", "val_loss"):
        assert close(*([row[key] for row in run.rows if key in row] for run in (one, two))), key
    for name, tensor in weights(one.folder, 24).items():
        torch.testing.assert_close(weights(two.folder, 24)[name], tensor, atol=1e-5, rtol=0)


def test_a_run_with_stages_does_not_go_on_with_another_batch(work, staged):
    copy_until(staged, work / "rebatched", 12)
    message = fail(work, "rebatched", "--resume", **FIRST | dict(batch_tokens=512), stages=STAGES)
    assert "step 12 of these stages has 6,144 tokens before it, and the run had 3,072: go on with its stages" in message


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_given_another_config_equals_one_that_is_built_so(name):
    """Every number, bool and choice that changes no weight's shape."""
    GPT = module(name).GPT
    model = build(name)
    config = model.config
    fields = [field.name for field in dataclasses.fields(config)]
    others = dict(rope_theta=50.0, norm_eps=0.1, logit_softcap=2.0, scale_embeddings=True, dropout=0.5, window=5,
                  gate_scale=0.7, rope_scaling="linear", rope_factor=2.0, n_expert_per_token=1)  # fmt: skip
    given = {key: value for key, value in others.items() if key in fields}
    if hasattr(config, "rope_theta"):  # learned positions are weights
        given["block_size"] = 2 * BLOCK
    if hasattr(config, "n_slot"):  # so is what pools a window
        del given["window"]
    built = build(name, **given)
    built.load_state_dict(model.state_dict())
    idx = tokens(2, 24)
    before = model(idx)
    stages.change(model, GPT, built.config)
    assert not torch.equal(model(idx), before)
    assert torch.equal(model(idx), built(idx))
    model.train(), built.train()
    torch.manual_seed(0)
    dropped = model(idx, idx)
    torch.manual_seed(0)
    assert torch.equal(dropped, built(idx, idx))


@pytest.mark.parametrize("given, message", [
    ({8: dict(n_embd=32)}, "stages: 8: embed.weight would be (320, 32), and is (320, 16)"),
    ({8: dict(block_size=48)}, "stages: 8: batch_tokens=256 is not a multiple of block_size=48 times 1 processes"),
    ({8: dict(block_size=24, batch_tokens=240)}, "block_size=16 does not divide the longest of the stages, 24"),
    ({8: dict(learning_rate=0.1)}, "stages: 8: learning_rate is nothing that a stage can change: try one of"),
    ({8: dict(rope_factor=2.0)}, "stages: 8: rope_factor=2.0 does nothing while rope_scaling=none"),
    ({8: dict(eot_id=4000)}, "stages: 8: eot_id=4000 is no token of a vocabulary of"),
    ({8: dict(block_size="long")}, "block_size='long' in the stage of 8: expected int"),
    ({8: dict(block_size=0)}, "block_size=0 in the stage of 8: try 1 or more"),
    ({8: 5}, "stages: 8: 5 is no dict of knobs"),
    ({1.5: dict(block_size=32)}, "stages: 1.5: give a step from 1, or a share of max_steps between 0 and 1"),
    ({8: dict(block_size=32), 0.25: dict(block_size=64)}, "stages: 0.25 is step 6, and step 8 has a stage before it"),
    ({8: dict(data="nowhere")}, "nowhere not found"),
    ({8: dict(data="other")}, "other and data differ in their tokenizer"),
])  # fmt: skip
def test_a_stage_that_is_impossible_is_refused_before_anything_trains(work, given, message):
    assert message in fail(work, "impossible", **FIRST, stages=given)
    assert not (work / "impossible").exists()


def test_learned_positions_have_no_longer_stage(work):
    knobs = FIRST | dict(model="gpt2", n_kv_head=None, head_dim=None, n_inner=None)
    message = fail(work, "positions", **knobs, stages={8: dict(block_size=32)})
    assert "stages: 8: pos_embed.weight would be (32, 16), and is (16, 16)" in message


def test_a_stage_that_has_fewer_weights_is_refused(work):
    knobs = FIRST | dict(n_layer=2, stages={8: dict(n_layer=1)})
    assert "stages: 8: blocks.1.attn_norm.weight would be gone, and is (16,)" in fail(work, "fewer", **knobs)


def test_minutes_measure_every_stage_and_ask_for_shares(work):
    knobs = FIRST | dict(max_steps=None, minutes=0.02)
    run = train(work, "minutes", **knobs, stages={0.5: dict(block_size=32)})
    steps = len(run.steps)
    assert f"max_steps={steps} on this machine" in run.out
    message = fail(work, "minutes8", **knobs, stages={8: dict(block_size=32)})
    assert "minutes chooses max_steps, and a stage begins at step 8: give a share, as 0.5" in message


def test_long_positions_are_better_after_a_stage_of_long_windows(work):
    """Documents [0, k, 42 times 17, 18, k] of 46 tokens: windows of 23 never show both of a document's k."""
    rng = np.random.default_rng(1)
    for folder, lengths in (("halves", {}), ("wholes", {"document_tokens": 46})):
        (work / folder).mkdir()
        for split, count in (("train", 600), ("val", 50)):
            documents = np.full((count, 46), 17)
            documents[:, [1, 45]] = rng.integers(1, 17, (count, 1))
            documents[:, 0] = 0
            documents[:, 44] = 18
            write_shard(work / folder / f"{split}_000000.bin", documents.flatten(), 64)
        meta = {"tokenizer": None, "vocab_size": 64, "eot_id": 0} | lengths
        (work / folder / "meta.json").write_text(json.dumps(meta))
    short = dict(data="halves", block_size=23, batch_tokens=736, micro_batch=32, max_steps=100, n_embd=32, n_inner=64,
                 head_dim=16, learning_rate=0.01)  # fmt: skip
    long = dict(data="wholes", block_size=46, micro_batch=16)
    losses = []
    for first in (99, 50):
        run = train(work, f"long{first}", **short, stages={first: long})
        losses.append(run.evaluations[-1]["val_loss"])
    assert losses[1] < 0.75 * losses[0]  # about ln 16 / 45, and twice that, which nobody can know in halves


# ---- mixtures --------------------------------------------------------------------------------------------------------
def test_a_mixture_is_evaluated_as_a_whole_and_by_its_texts(work, monkeypatch):
    run = train(work, "mixed", data=["data:3", "more:1"], eval_tokens=800)
    row = run.evaluations[-1]
    assert abs(0.75 * row["val_loss_data"] + 0.25 * row["val_loss_more"] - row["val_loss"]) < 1e-6
    assert f"data {row['val_loss_data']:.4f} | more {row['val_loss_more']:.4f}" in run.out
    assert "epochs of data" in run.out and "epochs of more" in run.out
    monkeypatch.chdir(work)
    for name, share in (("data", 600), ("more", 200)):  # of eval_tokens
        evaluation.main([str(run.folder / "latest"), "--eval_tokens", str(share), "--json", "loss.json"])
        found = json.loads((work / "loss.json").read_text())["loss"]
        assert found.keys() == {"data train", "data val", "more train", "more val"}
        assert abs(found[f"{name} val"]["loss"] - row[f"val_loss_{name}"]) < 1e-6


def test_a_resumed_mixture_needs_every_text_as_it_was(work):
    write_data(work / "third", 3)
    knobs = dict(data=["data:1", "third:1"], save_every=3, keep_last=0)
    run = train(work, "needs", **knobs)
    copy_until(run, work / "needs2", 3)
    assert same(train(work, "needs2", "--resume", **knobs), run, 6)
    tokens = Shards(work / "third", "train").read(0, 500)
    write_shard(work / "third" / "train_000000.bin", tokens, 320)
    copy_until(run, work / "needs3", 3)
    assert "changed since needs3/step-00000003 was written" in fail(work, "needs3", "--resume", **knobs)


@pytest.mark.parametrize("data, expected", [
    ("a:0.5", [("a:0.5", 1.0)]),
    (["a:0.5", "b:2"], [("a", 0.5), ("b", 2.0)]),
    (["a", "c:/b"], [("a", 1.0), ("c:/b", 1.0)]),
    (["c:/b:1e-1"], [("c:/b", 0.1)]),
])  # fmt: skip
def test_a_weight_is_the_number_after_the_last_colon(data, expected):
    assert [(str(folder), weight) for folder, weight in stages.read_mixture(data)] == expected


@pytest.mark.parametrize("data", [[], ["a", "a:2"], ["a:0"], ["a:-1"], ["a:nan"], [3]])
def test_a_mixture_that_means_nothing_is_refused(data):
    with pytest.raises(ValueError, match="data"):
        stages.read_mixture(data)


def test_a_mixture_is_a_knob_of_the_command_line():
    assert resolve(ROOT / "train.py", ["--data=['a:0.7','b:0.3']"])["data"] == ["a:0.7", "b:0.3"]
    assert resolve(ROOT / "train.py", ["--data=a"])["data"] == "a"


# ---- whole documents and masks ---------------------------------------------------------------------------------------
def test_a_run_in_packed_windows_says_how_full_they_are(work):
    run = train(work, "packed", pack="documents", long_documents="skip")
    assert re.search(r"data: 9\d\.\d % of its windows is text, \d+ documents longer than 32 are left out", run.out)


def test_what_a_mask_leaves_out_is_not_learned(work):
    """The text says 1 2 1 2, and its mask that only 2 is a target."""
    folder = work / "masked"
    folder.mkdir()
    for split in ("train", "val"):
        ids = np.tile([1, 2], 400)
        write_shard(folder / f"{split}_000000.bin", ids, 64, mask=ids == 2)
    (folder / "meta.json").write_text('{"tokenizer": null, "vocab_size": 64, "eot_id": 0, "masks": true}')
    knobs = KNOBS | dict(data="masked", max_steps=40, warmup_steps=5, learning_rate=0.02)
    run = train(work, "learned", **knobs)
    model, _, _ = load(run.folder, for_text=False)
    p = model(torch.tensor([[1, 2, 1, 2]])).softmax(-1)[0]
    assert p[2, 2] > 0.9 and p[1, 1] < 0.1
    assert run.evaluations[-1]["val_loss"] < 0.1
