"""`python bench.py posttrain`: its stages follow each other, and its table says how the models answer."""

import importlib
import json
import re
from dataclasses import fields

import pytest
import torch

import bench
from benchmarks import posttrain
from configurator import resolve
from data import arithmetic, chat
from data.tokenizers import Tokenizer
from tests.tiny import ROOT
from tests.tree import copy_of_the_project, run

TOKENIZER = Tokenizer(**arithmetic.tokenizer_fields())
RIGHT = {"direct": "<think>\n\n</think>\n\n{}", "thinks": "<think>\n1+1=2\n</think>\n\n{}"}


# ---- the stages ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", posttrain.STAGES)
def test_a_config_is_one_of_its_script_and_goes_on_from_the_stage_before(name):
    stage = posttrain.STAGES[name]
    config = resolve(ROOT / stage.script, [str(ROOT / f"config/arithmetic/{name}.py")])
    assert config["out_dir"] == f"out/posttrain/{name}"
    assert config["init_from"] == (f"out/posttrain/{stage.before}" if stage.before else "")
    first = (ROOT / f"config/arithmetic/{name}.py").read_text().split("\n\n")[0]
    assert first.startswith("# ")
    if name == "pretrain":
        variant = importlib.import_module(f"model_{config['model']}")
        sizes = {field.name: config[field.name] for field in fields(variant.GPTConfig)}
        with torch.device("meta"):
            model = variant.GPT(variant.GPTConfig(**sizes | {"vocab_size": 64}))
        assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in first


def test_seeds_share_the_pretraining_and_nothing_else(monkeypatch):
    monkeypatch.setattr(posttrain, "DATA", "data/nowhere")
    monkeypatch.setattr(posttrain, "resolve", lambda script, words: {})
    for name in posttrain.STAGES:
        folders = [posttrain.folder_of(name, seed) for seed in (1, 2)]
        keys = [posttrain.key_of(name, seed, "cpu") for seed in (1, 2)]
        assert (folders[0] == folders[1]) == (keys[0] == keys[1]) == (name == "pretrain")
        assert ("--seed=2" in posttrain.command_of(name, 2, "cpu")) == (name != "pretrain")


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A folder for the stages, commands that are only noted, [(config, how it was begun)], and which of them stop."""
    calls = []

    def note(words, log):
        calls.append((words[1].split("/")[-1], words[-1]))
        state = tmp_path / words[2].removeprefix("--out_dir=") / "state.json"
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps({"state": "stopped" if len(calls) in stopped else "finished"}))

    stopped = []
    monkeypatch.setattr(posttrain, "ROOT", tmp_path)
    monkeypatch.setattr(posttrain, "run", note)
    monkeypatch.setattr(posttrain, "resolve", lambda script, words: {"max_steps": 1})
    monkeypatch.setattr(posttrain, "examine", lambda name, folder, device: {"answers": name})
    monkeypatch.setattr(posttrain.run_folder, "read_metrics", lambda folder: [{"step": 1, "reward": 0.5, "ms": 3}])
    return tmp_path, calls, stopped


def test_a_stage_that_is_finished_is_not_done_again_until_what_decides_it_changes(stages, monkeypatch):
    folder, calls, _ = stages
    first = posttrain.run_stage("sft", 1, "cpu")
    assert posttrain.run_stage("sft", 1, "cpu") == first and calls == [("sft.py", "--overwrite")]
    posttrain.run_stage("sft", 2, "cpu")
    (folder / "data/arithmetic").mkdir(parents=True)
    (folder / "data/arithmetic/sft.jsonl").write_text("{}")
    posttrain.run_stage("sft", 1, "cpu")
    assert len(calls) == 3
    monkeypatch.setattr(posttrain, "resolve", lambda script, words: {"max_steps": 1 + ("pretrain" in words[0])})
    posttrain.run_stage("sft", 1, "cpu")
    assert len(calls) == 4 and {how for _, how in calls} == {"--overwrite"}


def test_a_stage_that_was_stopped_goes_on_and_counts_all_its_seconds(stages, monkeypatch):
    _, calls, stopped = stages
    stopped.append(1)
    seconds = iter([0.0, 5.0, 0.0, 7.0])
    monkeypatch.setattr(posttrain, "cpu_seconds", lambda: next(seconds))
    with pytest.raises(SystemExit, match="is stopped: the same command goes on"):
        posttrain.run_stage("grpo", 1, "cpu")
    record = posttrain.run_stage("grpo", 1, "cpu")
    assert calls == [("grpo.py", "--overwrite"), ("grpo.py", "--resume=auto")]
    assert (
        record["cpu_seconds"] == 12.0
        and record["answers"] == "grpo"
        and record["curve"] == [{"step": 1, "reward": 0.5}]
    )


def test_a_command_that_fails_is_an_error_with_the_last_line_that_it_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(posttrain, "ROOT", tmp_path)
    (tmp_path / "fails.py").write_text("import sys\nprint('one')\nsys.exit('no such data')")
    with pytest.raises(SystemExit, match="fails.py x ended with code 1; in .*: no such data"):
        posttrain.run(["fails.py", "x"], "out/fails.log")


# ---- how a model answers ---------------------------------------------------------------------------------------------
def asked(monkeypatch, completions, how):
    """Returns the scores of a model that writes these completions, and the prompts that it was given."""
    given = []

    def write(model, tokenizer, prompts, temperature):
        given.extend(tokenizer.decode(prompt) for prompt in prompts)
        return completions, [13, 7]

    monkeypatch.setattr(posttrain, "write", write)
    rows = [{"question": "10+20+30", "answer": "60"}, {"question": "11+20+30", "answer": "61"}]
    return posttrain.ask(None, TOKENIZER, rows, *posttrain.ASKED[how]), given


def test_answers_are_right_think_and_obey_or_not(monkeypatch):
    texts = [RIGHT["thinks"].format(60), RIGHT["direct"].format(60)]
    scores, given = asked(monkeypatch, texts, "greedy")
    assert (scores["accuracy"], scores["thinks"], scores["obeys"]) == (0.5, 0.5, 0.5)
    assert scores["tokens"] == (13 + 7) / 2
    assert given[0] == "<|endoftext|><|im_start|>user\n10+20+30<|im_end|>\n<|im_start|>assistant\n"

    scores, given = asked(monkeypatch, texts, "/no_think")
    assert scores["obeys"] == 0.5 and "11+20+30 /no_think<|im_end|>" in given[1]
    scores, _ = asked(monkeypatch, [RIGHT["thinks"].format(60)] * 2, "/think")
    assert (scores["accuracy"], scores["obeys"]) == (0.5, 1.0)


def test_a_forced_beginning_is_in_the_prompt_and_counts_as_thinking(monkeypatch):
    never_ends = "61"  # a thought that is cut off is no answer
    scores, given = asked(monkeypatch, ["1+1=2\n</think>\n\n60", never_ends], "forced to think")
    assert (scores["accuracy"], scores["thinks"]) == (0.5, 1.0) and given[0].endswith("assistant\n<think>\n")
    scores, given = asked(monkeypatch, ["60", "60"], "forced not to think")
    assert (scores["accuracy"], scores["thinks"]) == (0.5, 0.0)
    assert given[0].endswith("assistant\n<think>\n\n</think>\n\n")


def test_the_prompts_of_training_are_those_that_are_asked():
    row = next(arithmetic.fusion_rows(posttrain_rng(), 1))
    ids, _ = chat.encode(TOKENIZER, row["messages"])
    plain = [{"role": "user", "content": row["messages"][0]["content"].removesuffix(" /think")}]
    begin = chat.prompt(TOKENIZER, chat.switched(plain, True))
    assert ids[: len(begin)] == begin and "/think" in row["messages"][0]["content"]


def posttrain_rng():
    return arithmetic.np.random.default_rng(0)


# ---- the tables ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def committed():
    return json.loads((ROOT / "results/posttrain_cpu.json").read_text())


def test_the_table_is_drawn_from_its_json_and_so_is_the_picture(committed, tmp_path):
    assert posttrain.markdown(committed) == (ROOT / "results/posttrain_cpu.md").read_text()
    posttrain.plot(committed, tmp_path / "picture.png")
    assert (
        (tmp_path / "picture.png").read_bytes()[:4]
        == b"\x89PNG"
        == (ROOT / "results/posttrain_cpu.png").read_bytes()[:4]
    )


def test_the_committed_pipeline_reaches_its_goals(committed):
    def mean(*words):
        return posttrain.mean_of(committed, *words)

    error = (mean("sft", "forced to think") * (1 - mean("sft", "forced to think")) / 400) ** 0.5
    assert mean("sft", "greedy") < 0.2
    assert mean("grpo", "greedy") >= max(0.9, mean("sft", "forced to think") - 2 * error)
    for name in ("fusion", posttrain.LAST):
        assert mean(name, "/think") >= 0.9 and mean(name, "switch", "obeys") >= 0.99
    assert mean("fusion", "/no_think") >= mean("sft", "greedy")
    assert mean("dpo_offline", "greedy") < mean("grpo", "greedy") - 0.05
    assert all(record["cpu_seconds"] <= 200 for record in committed["stages"]["grpo"])
    steps = [row["step"] for row in committed["stages"]["grpo"][0]["curve"]]
    assert max(steps) <= 60


def test_a_table_of_several_seeds_has_errors(committed):
    one = {**committed, "seeds": [1], "stages": {name: found[:1] for name, found in committed["stages"].items()}}
    three = {**committed, "seeds": [1, 2, 3], "stages": {name: found[:1] * 3 for name, found in one["stages"].items()}}
    assert "±" not in posttrain.markdown(one).replace("± standard", "")
    rows = [line for line in posttrain.markdown(three).splitlines() if line.startswith("| `")]
    assert len(rows) == len(posttrain.STAGES) and all("± 0.0" in row for row in rows[1:])
    assert "which they share" in posttrain.markdown(three)


def test_a_table_is_drawn_of_models_that_learned_nothing(committed, tmp_path):
    result = json.loads(json.dumps(committed))
    for records in result["stages"].values():
        for record in records:
            for scores in record.get("answers", {}).values():
                scores.update(accuracy=0.0, thinks=0.0, obeys=0.0)
    assert "from 0.0 % to 0.0 %" in posttrain.markdown(result)
    posttrain.plot(result, tmp_path / "picture.png")


# ---- the command, small ----------------------------------------------------------------------------------------------
TINY = {
    "train.py": "--max_steps=2 --eval_tokens=256 --batch_tokens=256 --micro_batch=2",
    "grpo.py": "--max_steps=2 --problems_per_step=2 --group_size=2 --eval_problems=2",
    "dpo.py": "--max_steps=2 --problems_per_round=2 --group_size=2 --eval_problems=2 --pairs_per_step=2",
}


@pytest.mark.slow
def test_the_pipeline_runs_from_nothing_to_its_picture(tmp_path):
    """At a tiny size, where nothing is learned, in a copy of the repository."""
    copy = tmp_path / "nanollm"
    copy_of_the_project(copy)
    for name, stage in posttrain.STAGES.items():
        file = copy / f"config/arithmetic/{name}.py"
        knobs = [word.removeprefix("--") for word in TINY[stage.script].split()]
        known = [knob for knob in knobs if not (name == "grpo_mixed" and "eval" in knob)]
        file.write_text(file.read_text() + "\n".join(known) + "\n")
    task = copy / "data/arithmetic.py"
    smaller = task.read_text().replace("HELD_OUT = 400", "HELD_OUT = 4").replace("0_000,", "_000,")
    task.write_text(smaller.replace("=4_000", "=100"))
    said = run("python bench.py --out out posttrain --seeds 1", copy)
    assert re.search(r"\| `dpo_online`", said)
    assert (copy / "out/posttrain_cpu.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((copy / "out/posttrain_cpu.json").read_text())
    assert all(len(records) == 1 for records in result["stages"].values()) and result["questions"] == 4


def test_make_posttrain_gives_as_many_seeds_as_it_is_told(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(posttrain, "measure", lambda args: given.append(args.seeds) or [])
    copy_of_the_project(tmp_path / "nanollm")
    for words, seeds in (("", [1]), (" SEEDS=3", [1, 2, 3])):
        (command,) = [
            line for line in run(f"make -n posttrain{words}", tmp_path / "nanollm").splitlines() if "bench.py" in line
        ]
        bench.main(run(f"echo {command.split('bench.py ')[1]}", tmp_path).split())
        assert given[-1] == seeds
