"""grpo.py, dpo.py and reward.py end to end: what a run leaves behind, alone and resumed, on one process and on two.

Most runs are in the process of the tests: what they share, they share with none that is at work at the same time.
"""

import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import sys
from contextlib import chdir, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from data.shards import write_shard
from data.tokenizers import load_tokenizer, tokenizer_from_dict
from tests import tiny
from tests.test_train import copy_until, finish, finished, launch, until, weights, wrote
from tests.tiny import MODELS, ROOT
from training import checkpoint, pictures, policy
from training.reward_model import load_reward_model, scores_of
from training.signals import ASK_TO_STOP

pytestmark = pytest.mark.xdist_group("processes")

WORDS = ("user", "assistant", "\n\n")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHARACTERS = "\n +0123456789="
N = len(CHARACTERS)
TOKENIZER = tokenizer_from_dict({
    "kind": "char", "name": "digits", "chars": CHARACTERS,
    "added": {word: N + i for i, word in enumerate(WORDS)},
    "special_tokens": {token: N + len(WORDS) + i for i, token in enumerate(SPECIAL)},
})  # fmt: skip
META = {"tokenizer": TOKENIZER.to_dict(), "vocab_size": TOKENIZER.vocab_size, "eot_id": TOKENIZER.eot_id}
VOCAB = 64  # more than the tokenizer has: ids without a text behind them are never sampled
SIZES = dict(n_layer=2, n_head=2, n_kv_head=1, head_dim=8, n_embd=16, n_inner=32, block_size=32)

COMMON = dict(max_steps=4, learning_rate=1e-2, eval_every=2, save_every=1, keep_last=0, init_from="start")
GRPO = COMMON | dict(data="problems.jsonl", rewards="my_rewards:sevens", group_size=4, problems_per_step=4,
                     max_new_tokens=6, micro_batch=8, eval_data="held_out.jsonl", eval_samples=2)  # fmt: skip
DPO = COMMON | dict(data="pairs.jsonl", eval_pairs="pairs.jsonl", pairs_per_step=6, micro_batch=4, warmup_steps=2)
ONLINE = COMMON | dict(data="problems.jsonl", rewards="my_rewards:sevens", group_size=4, problems_per_round=4, online=3,
                       max_new_tokens=6, eval_data="held_out.jsonl", pairs_per_step=6, micro_batch=4,
                       nll_coef=1)  # fmt: skip
REWARD = COMMON | dict(data="pairs.jsonl", eval_pairs="pairs.jsonl", pairs_per_step=6, micro_batch=4, warmup_steps=2)

MY_REWARDS = '''
def sevens(completions, rows):
    """The share of 7 among the characters."""
    return [text.count("7") / max(len(text), 1) for text in completions]


def slow(completions, rows):
    import time
    time.sleep(0.05)
    return sevens(completions, rows)


def fussy(completions, rows):
    if any("7" in text for text in completions):
        raise RuntimeError("a seven")
    return [float(len(text)) for text in completions]


calls = []


def breaks(completions, rows):
    """Sevens, and after three steps nothing any more."""
    calls.append(len(completions))
    if len(calls) > 3:
        raise RuntimeError("no connection")
    return sevens(completions, rows)


def lengths_of_some(completions, rows):
    return [float(len(text)) * (int(row["answer"]) % 8 > 0) for text, row in zip(completions, rows)]
'''


# ---- what a run begins with, and how it is begun ---------------------------------------------------------------------
def save_start(folder, model, tokenizer=TOKENIZER):
    """Writes a model as the folder of a run that has trained it."""
    config = {"model": type(model.config).__module__.removeprefix("model_"), "model_config": asdict(model.config),
              "knobs": {}}  # fmt: skip
    checkpoint.save(folder, 1, model, torch.optim.AdamW(model.parameters()), config, {"tokens": 0})
    (folder / "config.json").write_text(json.dumps(config))
    meta = {"tokenizer": tokenizer.to_dict(), "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id}
    (folder / "data.json").write_text(json.dumps(meta))


def write_data(folder):
    """Writes token shards of a few sums."""
    folder.mkdir()
    ids = [i for n in range(50) for i in [TOKENIZER.eot_id, *TOKENIZER.encode(f"{n}+{n}={2 * n}")]]
    for split in ("train", "val"):
        write_shard(folder / f"{split}_000000.bin", np.array(ids), TOKENIZER.vocab_size)
    (folder / "meta.json").write_text(json.dumps(META | {"fingerprint": "sums"}))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model that knows nothing, problems, pairs, and rewards."""
    folder = tmp_path_factory.mktemp("posttraining")
    model = tiny.build("baseline", bold=False, **SIZES | dict(vocab_size=VOCAB, eot_id=TOKENIZER.eot_id))
    save_start(folder / "start", model)
    fields = SIZES | dict(n_expert=4, n_expert_inner=16, vocab_size=VOCAB, eot_id=TOKENIZER.eot_id)
    moe = tiny.build("moe", bold=False, **fields, balance_loss=0.1, z_loss=0.1, bias_rate=0.01)
    with torch.no_grad():
        for layer in moe.config.moe_layers:
            moe.blocks[layer].mlp.router.weight.mul_(50)  # tokens differ in what they are to the auxiliary losses
    save_start(folder / "start_moe", moe)
    (folder / "my_rewards.py").write_text(MY_REWARDS)
    write_rows(folder / "problems.jsonl", [{"question": f"{i}+{3 * i}", "answer": str(4 * i)} for i in range(10)])
    write_rows(folder / "held_out.jsonl", [{"question": f"1{i}+{i}", "answer": str(10 + 2 * i)} for i in range(3)])
    write_rows(folder / "pairs.jsonl", [{"prompt": f"{i}+{i}", "chosen": "7" * (i % 4 + 1), "rejected": f"{i}1"}
                                        for i in range(15)])  # fmt: skip
    return folder


def words(out_dir, flags, knobs):
    return [*flags, f"--out_dir={out_dir}", *(f"--{key}={value}" for key, value in knobs.items() if value is not None)]


def execute(work, script, argv):
    """What `python script argv` in the folder prints, and its exit code; in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in ASK_TO_STOP}
    code = 0
    with (
        chdir(work), redirect_stdout(streams[0]), redirect_stderr(streams[1]), patch.object(pictures, "plot"),
        patch.object(sys, "argv", [script, *argv]), patch.object(sys, "path", [str(ROOT), str(work), *sys.path]),
    ):  # fmt: skip
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        finally:
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return SimpleNamespace(code=code, out=out, err=err)


def run(work, script, out_dir, *flags, **knobs):
    """A run that must end well: its folder, what it printed, its metrics."""
    result = execute(work, script, words(out_dir, flags, knobs))
    assert result.code == 0, result.out + result.err
    return finished(work / out_dir, result.out, result.err)


def refusal(work, script, out_dir, *flags, **knobs):
    """The one line on stderr of a run that must be refused."""
    result = execute(work, script, words(out_dir, flags, knobs))
    assert result.code == 2, result.out + result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    return result.err


def start(work, script, out_dir, *flags, environment=None, **knobs):
    """Begins a run as a process of its own: the process, and where it prints."""
    return launch(work, words(out_dir, flags, knobs), environment, script)


def two(work, script, out_dir, *flags, **knobs):
    """A run of two processes, as torchrun would start them, that must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    both = [start(work, script, out_dir, *flags, environment={"RANK": str(rank), "LOCAL_RANK": str(rank), **common},
                  **knobs) for rank in range(2)]  # fmt: skip
    results = [finish(*each, timeout=60) for each in both]
    assert [result.code for result in results] == [0, 0], results
    return finished(work / out_dir, results[0].out, results[0].err)


# ---- resume ----------------------------------------------------------------------------------------------------------
TIMES = ("ms", "memory_gb", "sampled_per_second", "trained_per_second")
SCRIPTS = {
    "grpo": ("grpo.py", GRPO | dict(updates_per_batch=2, beta=0.05)),
    "dpo": ("dpo.py", DPO),
    "online": ("dpo.py", ONLINE),
    "reward": ("reward.py", REWARD),
}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def left_by(folder):
    """All that a run left which is to be the same in another: numbers of each step, samples, checkpoints."""
    found = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = rows_of(folder / name)
        found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    for step in checkpoint.folders(folder):
        for name in ("model.safetensors", "trainer.safetensors", "trainer.json", "evaluation.json"):
            file = step / name
            found[f"{step.name}/{name}"] = file.read_bytes() if file.exists() else None
    for link in ("latest", "best"):
        found[link] = os.readlink(folder / link)
    return found


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name


@pytest.fixture(scope="module")
def whole(work):
    """A run of each script that nothing happened to, by its name in SCRIPTS."""
    return {name: run(work, script, name, **knobs) for name, (script, knobs) in SCRIPTS.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_that_was_killed_after_any_step_goes_on_to_the_same_bits(work, whole, name):
    script, knobs = SCRIPTS[name]
    expected = left_by(whole[name].folder)
    assert len(whole[name].rows) == 4 + 3
    for step in (1, 2, 3):
        again = f"{name}_{step}"
        copy_until(whole[name], work / again, step)
        assert f"resuming from {again}/step-0000000{step}" in run(work, script, again, "--resume", **knobs).out
        check_same(left_by(work / again), expected)


def test_a_run_that_was_killed_before_an_evaluation_makes_up_for_it(work, whole):
    expected = left_by(whole["grpo"].folder)
    folder = work / "unevaluated"
    copy_until(whole["grpo"], folder, 2)
    (folder / "step-00000002" / "evaluation.json").unlink()
    (folder / "best").unlink()
    rows = [row for row in rows_of(folder / "metrics.jsonl") if row["step"] < 2 or "loss" in row]
    write_rows(folder / "metrics.jsonl", rows)
    run(work, "grpo.py", "unevaluated", "--resume", **SCRIPTS["grpo"][1])
    check_same(left_by(folder), expected)


def test_a_run_that_a_signal_stopped_goes_on_to_the_same_bits(work):
    knobs = GRPO | dict(rewards="my_rewards:slow", max_steps=10, save_every=100, eval_every=100)
    process, log = start(work, "grpo.py", "stopped", **knobs)
    until(lambda: wrote(work / "stopped", 1500))
    os.kill(process.pid, signal.SIGTERM)
    result = finish(process, log)
    assert result.code == 0, result.out + result.err
    step = len(rows_of(work / "stopped" / "metrics.jsonl")) - 1
    assert step < 10
    assert f"SIGTERM: stopped after step {step}; go on with  python {ROOT}/grpo.py --out_dir=stopped" in result.out
    assert json.loads((work / "stopped" / "state.json").read_text())["state"] == "stopped"
    run(work, "grpo.py", "stopped", "--resume", **knobs)
    shutil.rmtree(work / "stopped" / f"step-{step:08d}")
    check_same(left_by(work / "stopped"), left_by(run(work, "grpo.py", "unstopped", **knobs).folder))
    assert json.loads((work / "stopped" / "state.json").read_text())["state"] == "finished"


def test_the_reference_is_the_model_that_the_run_began_with(work):
    knobs = GRPO | dict(beta=0.05, max_steps=3, eval_data=None, eval_samples=0, save_every=100)
    kl = [row["kl"] for row in run(work, "grpo.py", "near", **knobs).steps]
    assert kl[0] == 0 < kl[1] < kl[2]


# ---- processes -------------------------------------------------------------------------------------------------------
def check_close(both, one, step=4):
    """Two processes' run against that of one: the same answers, losses and weights to rounding."""
    samples = [rows_of(each.folder / "samples.jsonl") for each in (both, one)]
    assert samples[0] == samples[1]
    assert [row.keys() for row in both.rows] == [row.keys() for row in one.rows]
    for row, expected in zip(both.rows, one.rows):
        for name in expected.keys() - {*TIMES, "logprob_difference"}:
            if isinstance(expected[name], list):
                assert row[name] == expected[name], name  # choices of experts
            else:
                assert row[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-6), name
    found, expected = weights(both.folder, step), weights(one.folder, step)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0, msg=name)


def test_two_processes_do_grpo_as_one_with_experts_and_where_one_has_nothing_to_learn(work):
    knobs = GRPO | dict(init_from="start_moe", rewards="my_rewards:lengths_of_some", problems_per_step=3, micro_batch=3,
                        updates_per_batch=2)  # fmt: skip
    one = run(work, "grpo.py", "moe_1", **knobs)
    rewards = {}  # of the answers to the first problem of each step, the only one of process 0
    for row in rows_of(one.folder / "samples.jsonl"):
        rewards.setdefault(row["step"], set()).add(row["reward"])
    assert min(map(len, rewards.values())) == 1 < max(map(len, rewards.values()))
    check_close(two(work, "grpo.py", "moe_2", **knobs), one)


BEST_OF = dict(best_of=2, eval_data="held_out.jsonl", eval_problems=1, max_new_tokens=4, rewards="my_rewards:sevens")


@pytest.mark.parametrize("script, knobs", [("dpo.py", DPO), ("dpo.py", ONLINE), ("reward.py", REWARD | BEST_OF)])
def test_two_processes_learn_from_pairs_as_one(work, script, knobs):
    knobs = knobs | dict(init_from="start_moe", pairs_per_step=5, micro_batch=2)
    name = f"{script}_{knobs.get('online', 0)}"
    check_close(two(work, script, f"{name}_2", **knobs), run(work, script, f"{name}_1", **knobs))


# ---- every model file ------------------------------------------------------------------------------------------------
BRIEF = GRPO | dict(max_steps=2, eval_data=None, eval_samples=0, save_every=100, problems_per_step=2, max_new_tokens=16)


@pytest.mark.parametrize("name", MODELS)
def test_the_sampler_and_the_trainer_of_every_model_agree(work, name):
    model = tiny.build(name, bold=False, vocab_size=VOCAB, eot_id=TOKENIZER.eot_id)
    save_start(work / f"start_{name}_brief", model)
    grpo = run(work, "grpo.py", f"brief_{name}", **BRIEF | dict(init_from=f"start_{name}_brief"))
    assert max(row["logprob_difference"] for row in grpo.steps) <= 1e-4
    before = weights(work / f"start_{name}_brief", 1)
    after = weights(grpo.folder, 2)
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith("weight"))


def test_experts_are_balanced_and_what_depends_on_chance_or_the_batch_is_off(work):
    knobs = BRIEF | dict(init_from="start_moe", bias_rate=0.01, save_every=1)
    plain, balanced = (run(work, "grpo.py", f"balance_{x}", **knobs, balance_loss=x, dropout=0.1) for x in (0, 1))
    assert "dropout=0.1 is turned off" in plain.out
    assert json.loads((plain.folder / "config.json").read_text())["model_config"]["dropout"] == 0
    found, expected = weights(plain.folder, 2), weights(balanced.folder, 2)
    router = next(name for name in found if name.endswith("router.weight"))
    assert (found[router] - expected[router]).abs().max() > 1e-3
    biases = weights(plain.folder, 1)[router.replace("weight", "bias")]
    assert biases.abs().max() == pytest.approx(0.01)
    assert sum(plain.steps[0]["expert_load"][0]) > 0

    model = tiny.build("switch", bold=False, vocab_size=VOCAB, eot_id=TOKENIZER.eot_id, router_jitter=0.2)
    save_start(work / "start_jitter", model)
    out = run(work, "dpo.py", "jitter", **DPO | dict(init_from="start_jitter")).out
    assert "router_jitter=0.2 is turned off" in out and "capacity_factor=1.25 is turned off" in out
    assert "loss 0.6931 | accuracy 0% | margin 0.000" in out  # the reference is without them as well


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def spoilt(work):
    """What is not as it should be: a model without chat tokens, rows that fit nothing, prompts that are too long."""
    byte = load_tokenizer("byte")
    save_start(work / "no_chat", tiny.build("baseline", **SIZES, vocab_size=320, eot_id=byte.eot_id), byte)
    small = tiny.build("baseline", **SIZES | dict(block_size=16, vocab_size=VOCAB, eot_id=TOKENIZER.eot_id))
    save_start(work / "small", small)
    write_rows(work / "odd.jsonl", [{"foo": 1}])
    write_rows(work / "empty.jsonl", [])
    write_rows(work / "long.jsonl", [{"question": "1+1" * 20, "answer": "2"}])
    write_rows(work / "long_pairs.jsonl", [{"prompt": "1+1" * 20, "chosen": "2", "rejected": "3"}])


@pytest.mark.parametrize(
    "script, knobs, message",
    [
        ("grpo.py", GRPO | dict(init_from="no_chat"), "byte has no token <|im_start|>, .* and --add_tokens chat, and"),
        ("dpo.py", DPO | dict(init_from="no_chat"), "byte has no token <|im_start|>"),
        ("grpo.py", GRPO | dict(init_from=None), "init_from is empty: give the folder of"),
        ("reward.py", REWARD | dict(init_from="nowhere"), "init_from=nowhere has no config.json: give the folder of"),
        ("grpo.py", GRPO | dict(data=None), "data is empty: give problems"),
        ("dpo.py", DPO | dict(data=None), "data is empty: give pairs"),
        ("grpo.py", GRPO | dict(data="nowhere.jsonl"), "nowhere.jsonl: there is no such file"),
        ("grpo.py", GRPO | dict(data="odd.jsonl"), "odd.jsonl line 1: no problem"),
        ("reward.py", REWARD | dict(data="odd.jsonl"), "odd.jsonl line 1: no pair"),
        ("grpo.py", GRPO | dict(data="long.jsonl"), "long.jsonl: no problem leaves room for an answer, of 1: lower"),
        ("grpo.py", GRPO | dict(max_new_tokens=64), "tokens, and block_size less max_new_tokens is -32"),
        ("grpo.py", GRPO | dict(data="empty.jsonl"), "empty.jsonl has no problems"),
        (
            "grpo.py",
            GRPO | dict(max_new_tokens=64),
            "no problem leaves room for an answer, of 10: lower max_new_tokens",
        ),
        ("dpo.py", DPO | dict(data="long_pairs.jsonl"), "no pair is at most 32 tokens long, of 1: raise block_size"),
        ("grpo.py", GRPO | dict(teacher="no_chat"), "no_chat has the tokenizer byte, not digits, that of init_from"),
        ("grpo.py", GRPO | dict(teacher="small"), "small has block_size=16, less than 32, that of the policy"),
        ("grpo.py", GRPO | dict(teacher="start", beta=0.1), "no beta, no gspo"),
        ("grpo.py", GRPO | dict(group_size=1), "group_size=1: .* give 2 or more"),
        ("dpo.py", ONLINE | dict(group_size=1), "group_size=1: .* give 2 or more"),
        ("grpo.py", GRPO | dict(temperature=0), "temperature=0: try 0.01 or more"),
        ("grpo.py", GRPO | dict(updates_per_batch=0), "updates_per_batch=0: try 1 or more"),
        ("dpo.py", DPO | dict(beta=0), "beta=0 makes all answers alike"),
        ("dpo.py", DPO | dict(label_smoothing=0.7), "label_smoothing=0.7: it lies in"),
        ("grpo.py", GRPO | dict(rewards="learned"), "a reward model: give a run of reward.py"),
        ("grpo.py", GRPO | dict(reward_model="start", rewards="learned"), "start is no run of reward.py"),
        ("grpo.py", GRPO | dict(reward_model="reward"), "reward_model does nothing without the reward learned"),
        ("grpo.py", GRPO | dict(init_from="reward"), "is a reward model, which scores texts and writes none"),
        ("reward.py", REWARD | dict(best_of=4), "best_of=4 needs problems: give eval_data"),
        ("grpo.py", GRPO | dict(dtype="float16"), "dtype=float16: try one of auto, bfloat16, float32"),
        ("grpo.py", GRPO | dict(compile=True), "unknown config key 'compile' on the command line; --help lists them"),
        ("dpo.py", DPO | dict(batch_tokens=64), "unknown config key 'batch_tokens' on the command line; did you mean"),
        ("grpo.py", GRPO | dict(resume=True), "--resume given but no checkpoint in refused"),
        ("grpo.py", GRPO | dict(vocab_size=100), "vocab_size=100, and that of init_from=start is 64: leave it out"),
        ("dpo.py", DPO | dict(eot_id=3), "eot_id=3, and that of init_from=start is 17: leave it out"),
        ("grpo.py", GRPO | dict(rewards=":"), "the reward :: Empty module name"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(work, whole, spoilt, script, knobs, message):
    assert re.search(message, refusal(work, script, "refused", **knobs))
    assert not (work / "refused" / "metrics.jsonl").exists()


def test_a_gpu_that_is_fast_at_float16_alone_is_refused(work):
    here = SimpleNamespace(dtype="float16", name="an old GPU")
    with pytest.raises(ValueError, match="an old GPU is fast at no dtype but float16, .* --dtype=float32"):
        policy.build({"init_from": "start"}, here)


def test_another_run_is_neither_written_over_nor_gone_on_with(work, whole):
    def refused(folder, script, *flags, **knobs):
        taken = work / f"taken_{len(list(work.glob('taken_*')))}"  # this process holds the lock of each to its end
        shutil.copytree(folder, taken, symlinks=True)
        before = left_by(taken)
        message = refusal(work, script, taken.name, *flags, **knobs)
        check_same(left_by(taken), before)
        return message

    online = whole["online"].folder
    assert "already holds a run" in refused(online, "grpo.py", **GRPO)
    assert "holds a run of dpo.py: go on with that" in refused(online, "grpo.py", "--resume", **GRPO)
    write_rows(work / "more.jsonl", [*rows_of(work / "problems.jsonl"), {"question": "1+1", "answer": "2"}])
    message = refused(online, "dpo.py", "--resume", **ONLINE | dict(data="more.jsonl"))
    assert re.search("more.jsonl changed since taken_2/step-00000004 was written", message)

    write_data(work / "sums")
    knobs = SIZES | dict(batch_tokens=256, max_steps=1, eval_tokens=100, eval_every=1)
    trained = run(work, "train.py", "trained", "--document_mask", data="sums", **knobs).folder
    (trained / "samples.jsonl").touch()
    assert "already holds a run" in refused(trained, "grpo.py", **GRPO)
    assert "holds a run of train.py: go on with that" in refused(trained, "grpo.py", "--resume", **GRPO)


def test_a_reward_that_fails_now_and_then_is_counted_and_one_that_breaks_ends_the_run_with_all_that_was_learned(work):
    result = execute(work, "grpo.py", words("fussy", [], BRIEF | dict(rewards="my_rewards:fussy")))
    rows = rows_of(work / "fussy" / "metrics.jsonl")
    warnings = result.err.count("WARNING: the reward my_rewards:fussy counts as 0 of completion")
    assert result.code == 0 and sum(row["failures"] for row in rows) == warnings > 0

    knobs = GRPO | dict(
        rewards="my_rewards:breaks", eval_data=None, eval_samples=0, save_every=100
    )  # and so eval_every means nothing
    message = refusal(work, "grpo.py", "broken", **knobs)
    assert "the reward my_rewards:breaks failed for all 16 answers" in message and "no connection" in message
    assert "stopped after step 3: mend it, and go on with  python" in message
    assert [path.name for path in checkpoint.folders(work / "broken")] == ["step-00000003"]


def test_a_micro_batch_is_a_matter_of_memory(work, whole):
    knobs = SCRIPTS["grpo"][1] | dict(micro_batch=7, max_steps=1, eval_every=2)
    (odd,) = run(work, "grpo.py", "odd_micro_batch", **knobs).steps
    expected = whole["grpo"].steps[0]
    assert (odd["loss"], odd["kl"], odd["grad_norm"]) == pytest.approx(
        (expected["loss"], expected["kl"], expected["grad_norm"]), abs=1e-5
    )


# ---- what comes of a run ---------------------------------------------------------------------------------------------
def test_runs_are_read_by_sample_py_and_eval_py_and_a_reward_model_says_what_it_is(work, whole):
    write_data(work / "tokens")
    for name in ("grpo", "dpo"):
        sampled = execute(work, "sample.py", [name, "--prompt=1+1", "--max_new_tokens=4"])
        assert sampled.code == 0 and sampled.out.startswith("1+1"), sampled.err
        measured = execute(work, "eval.py", [name, "--data=tokens", "--split=val"])
        assert measured.code == 0 and re.search(r"val +\d+ ", measured.out), measured.err
    for script in ("sample.py", "eval.py"):
        result = execute(work, script, ["reward"])
        assert result.code == 2
        assert "is a reward model, which scores texts and writes none: give it to grpo.py" in result.err
    assert (
        "grpo is a run of grpo.py, which reads no token shards: give --data" in execute(work, "eval.py", ["grpo"]).err
    )


@pytest.mark.parametrize("script", ["grpo.py", "dpo.py", "reward.py"])
def test_help_lists_the_knobs_by_group(work, script):
    out = execute(work, script, ["--help"]).out
    groups = [line for line in out.splitlines()[3:] if line and not line.startswith("  --")]
    assert groups[0] == "model and data" and groups[-3:] == ["loop", "system", "fields of model_baseline.py"]
    assert len(set(groups)) == len(groups) >= 6
    knobs = [line for line in out.splitlines() if line.startswith("  --") and "fields of" not in line]
    assert len(knobs) > 40


# ---- a task that must be learned -------------------------------------------------------------------------------------
BANDIT = dict(init_from="start", data="problems.jsonl", rewards="my_rewards:sevens", learning_rate=2e-2,
              max_new_tokens=4, group_size=8, save_every=100, eval_every=100)  # fmt: skip


def test_thirty_steps_of_grpo_learn_to_write_sevens_and_a_student_learns_it_without_a_reward(work):
    knobs = BANDIT | dict(problems_per_step=8)
    learned = run(work, "grpo.py", "bandit", **knobs, max_steps=30).steps
    assert learned[0]["reward"] < 0.4 and learned[-1]["reward"] > 0.7

    student = run(work, "grpo.py", "student", **knobs | dict(teacher="bandit", rewards="format"), max_steps=20)
    answers = [row["answer"] for row in rows_of(student.folder / "samples.jsonl")]
    assert student.steps[-1]["reward"] == 0 and "".join(answers[:16]).count("7") < 16
    assert answers[-4:] == ["7777"] * 4


def test_online_dpo_learns_to_write_sevens(work):
    knobs = BANDIT | dict(max_steps=30, online=2, problems_per_round=16, pairs_per_step=16, warmup_steps=0,
                          eval_data="held_out.jsonl", eval_every=30)  # fmt: skip
    result = run(work, "dpo.py", "bandit_dpo", **knobs)
    assert result.rows[0]["eval_reward"] < 0.4 and result.rows[-1]["eval_reward"] > 0.7


def test_a_reward_model_tells_answers_apart_whatever_fills_up_their_rows(work):
    rng = np.random.default_rng(0)

    def text(digits):
        return "".join(rng.choice(list(digits), rng.integers(1, 9)))

    for name in ("separable", "unseen"):
        rows = []
        for _ in range(64):
            rows.append({"prompt": text("0123456789"), "chosen": text("67890"), "rejected": text("12345")})
        write_rows(work / f"{name}.jsonl", rows)
    knobs = REWARD | dict(data="separable.jsonl", eval_pairs="unseen.jsonl", max_steps=40, pairs_per_step=16)
    result = run(work, "reward.py", "separable", **knobs | dict(save_every=100, eval_every=40))
    assert result.rows[-1]["eval_accuracy"] > 0.95

    model = load_reward_model(str(work / "separable"), TOKENIZER, "cpu")
    here = SimpleNamespace(device="cpu", autocast=nullcontext)
    texts = [[TOKENIZER.eot_id, *TOKENIZER.encode(text)] for text in ("7", "1+2=34567", "99999")]
    alone = [scores_of(model, [text], here)[0] for text in texts]
    assert scores_of(model, texts, here) == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in alone}) == 3
