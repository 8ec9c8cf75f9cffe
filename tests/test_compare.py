"""compare.py: what it plans, what it runs and runs no second time, and what it says of the results."""

import dataclasses
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import compare
import flops
from benchmarks import comparison
from tests.test_reliability import holder
from tests.test_train import FORK, finish, in_fork, launch, until, write_data, wrote
from tests.tiny import MODELS, ROOT, module

BUDGET = 4e9


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Arguments for tiny runs: a config with the sizes of every variant, and data."""
    folder = tmp_path_factory.mktemp("compare")
    write_data(folder / "data", 0)
    lines = []
    for name in MODELS:
        sizes = {k: v for k, v in module(name).TINY.items() if k not in ("vocab_size", "block_size")}
        lines.append(f"if model == {name!r}:\n    " + "; ".join(f"{k} = {v!r}" for k, v in sizes.items()))
    knobs = "block_size = 32\nbatch_tokens = 256\nwarmup_steps = 1\neval_tokens = 500\nlearning_rate = 0.01\n"
    (folder / "config.py").write_text(knobs + "\n".join(lines) + "\n")
    return [str(folder / "config.py"), f"--data={folder / 'data'}", f"--budget={BUDGET:g}", "--rounds=0"]


@pytest.fixture
def fake(monkeypatch):
    """Runs that only write what train.py would leave behind. ran: what was run; loss: of what; fails_at: which run."""
    self = SimpleNamespace(ran=[], loss=lambda name, lr, seed: 3.0 + math.log(lr) ** 2 + 0.01 * seed, fails_at=0)

    def train(run, slots, jobs, processes):
        self.ran.append((run.variant.name, run.lr, run.seed))
        if self.fails_at == len(self.ran):
            raise ChildProcessError("no luck")
        knobs = json.loads(json.dumps(run.variant.config | compare.options(run)))
        fields = dataclasses.asdict(compare.gpt_config(knobs))
        config = {"model": knobs.pop("model"), "model_config": {k: knobs[k] for k in fields}, "knobs": knobs}
        rows = [{"step": step, "tokens": step * 256, "val_bits_per_byte": None, "memory_gb": 1.0, "ms": 1.0,
                 "val_loss": self.loss(*self.ran[-1])} for step in (1, run.variant.steps)]  # fmt: skip
        run.folder.mkdir(parents=True)
        (run.folder / "manifest.json").write_text(json.dumps({"data_fingerprint": run.variant.data_fingerprint}))
        (run.folder / "config.json").write_text(json.dumps(config))
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    monkeypatch.setattr(compare, "train", train)
    return self


class Fork:
    """In the place of subprocess.Popen: runs train.py in a fork of a process that has imported torch."""

    def __init__(self, command, stdout, stderr, env):
        python, script, *argv = command
        self.process = FORK.Process(target=in_fork, args=(script, argv, Path.cwd(), stdout.name, stderr.name, env))
        self.process.start()

    def wait(self):
        self.process.join()
        return self.process.exitcode


@pytest.fixture
def forks(monkeypatch):
    """Real runs that start in a tenth of the time."""
    monkeypatch.setattr(compare.subprocess, "Popen", Fork)


def run(setting, out, *more):
    """The result that a comparison writes."""
    compare.main([*setting, f"--out_dir={out}", *more])
    return json.loads((out / "comparison.json").read_text())


def planned(setting, *more):
    return compare.plan_all(compare.parse_arguments([*setting, *more]))


# ---- the plan --------------------------------------------------------------------------------------------------------
def test_all_variants_get_the_same_training_flops_to_half_a_step(setting):
    for name, variant in zip(MODELS, planned(setting, "--models", ",".join(MODELS)), strict=True):
        config = compare.gpt_config(variant.config)
        of_optimizer, _ = flops.optimizer_cost(name, config, "muon")
        step = flops.training_flops_per_token(name, config, 32) * 256 + of_optimizer
        assert variant.steps >= 5 and abs(variant.steps * step - BUDGET) <= step / 2
        assert variant.config["max_steps"] == variant.steps and variant.tokens == variant.steps * 256


@pytest.mark.parametrize("match", ["flops_per_token", "parameters"])
def test_a_matched_variant_has_the_tokens_and_the_cost_of_the_first(setting, match):
    first, *others = planned(setting, "--models", "baseline,mla,hybrid", "--match", match)
    for other in others:
        cost = [compare.parameters(v) if match == "parameters" else v.step_flops() for v in (first, other)]
        assert other.tokens == first.tokens and abs(cost[1] / cost[0] - 1) <= 0.005
    small, large = planned(setting, "--vary", "batch_tokens=256,512", "--match", match)
    assert 0 <= small.tokens - large.tokens < 512 and large.steps == small.steps // 2


def test_the_values_of_a_knob_become_variants_of_each_model_or_of_the_one_named(setting):
    names = [v.name for v in planned(setting, "--models", "baseline,mla", "--vary", "optimizer=adamw,muon")]
    assert names == [f"{m}:optimizer={o}" for m in ("baseline", "mla") for o in ("adamw", "muon")]
    varied = planned(setting, "--vary", "switch.balance_over=batch,global")
    assert [(v.config["model"], v.config["balance_over"]) for v in varied] == [
        ("switch", "batch"),
        ("switch", "global"),
    ]


def test_the_optimizer_s_flops_count_unless_they_are_left_out(setting):
    muon, adamw = planned(setting, "--vary", "optimizer=muon,adamw")
    assert (
        adamw.optimizer_flops == 0
        and muon.optimizer_flops == flops.optimizer_cost("baseline", compare.gpt_config(muon.config), "muon")[0]
    )
    assert muon.steps < adamw.steps
    without = planned(setting, "--vary", "optimizer=muon,adamw", "--match_optimizer=False")
    assert [variant.steps for variant in without] == [adamw.steps] * 2


@pytest.fixture
def broken(monkeypatch):
    """A model that fails in its forward, as one's own may."""
    variant = module("baseline")
    monkeypatch.setattr(variant.MLP, "forward", lambda self, x: self.w_gate(x, 1))


def test_a_model_that_fails_is_named_before_anything_trains(setting, tmp_path, fake, broken, monkeypatch, capsys):
    plan = planned(setting)  # counting its FLOPs runs the model as well
    monkeypatch.setattr(compare, "plan_all", lambda args: plan)
    with pytest.raises(SystemExit) as exit:
        run(setting, tmp_path, "--lrs", "1", "--seeds", "1")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and not fake.ran
    assert re.match(r"error: baseline cannot be trained: model_baseline.py line \d+: TypeError: ", error)


def test_the_plan_says_what_sets_variants_apart_and_how_long_it_takes(setting, tmp_path, fake, capsys):
    run(setting, tmp_path, "--models", "baseline,baseline:n_inner=64:dropout=0.1", "--lrs", "1", "--seeds", "2")
    said = capsys.readouterr().err
    assert "differs from baseline in n_inner=64 (160), dropout=0.1 (0.0)\n" in said
    assert re.search(r"about \d+\.\d minutes with --jobs 1", said)
    run(setting, tmp_path, "--models", "baseline,baseline:n_inner=64:dropout=0.1", "--lrs", "1", "--seeds", "2")
    assert "minutes" not in capsys.readouterr().err  # all is finished


@pytest.mark.parametrize("more, message", [
    (["--models", "baseline,nonsense"], "unknown model 'nonsense'; the model_*.py files here give: baseline, gated, "),
    (["--models", "moe:n_exprt=4"], "did you mean 'n_expert'"),
    (["--budget", "1e6"], "--budget=1e+06 pays for 0 steps of baseline ("),
    (["--models", "baseline,mla", "--match", "parameters", "--knob", "n_layer"], "the nearest is n_layer="),
    (["--data", "nowhere"], "nowhere"),
    (["--data=['a:1', 'b:2']"], "baseline has stages or a mixture of texts"),
    (["--stages={5: {'block_size': 64}}"], "baseline has stages or a mixture of texts"),
    (["--models", "baseline,baseline"], "planned twice"),
    (["--models", "baseline,baseline:n_layer=1", "--budgets", "1e9", "--sizes", "n_embd=32"], "name one once"),
    (["--seed=7"], "error: --seed=7: compare.py sets these itself"),
    (["--eval_every=7"], "error: --eval_every=7: compare.py sets these itself"),
    (["--models", "baseline,baseline:seed=7"], "error: seed=7: compare.py sets these itself"),
    (["--vary", "max_steps=5,9"], "error: max_steps=5: compare.py sets these itself"),
    (["--minutes=1"], "error: --minutes=1: each run of a comparison trains for its --budget"),
    (["--model=gpt2"], "error: --model is one run's: name the variants by --models"),
    (["--models", "baseline,baseline:model=gpt2"], "error: --model is one run's: name the variants by --models"),
    (["--models", "baseline,baseline:eval_tokens=64"], "baseline:eval_tokens=64 is evaluated on other tokens"),
    (["--models", "baseline:vocab_size=3"], "baseline:vocab_size=3: the data has "),
    (["--models", "baseline,gpt2", "--knob", "n_embd"], "error: --knob says what another --match solves"),
    (["--budgets", "1e9", "--sizes", "n_embd=32", "--match", "parameters"], "error: --match parameters is not for "),
    (["--seeds", "0"], "error: argument --seeds: 0: give a whole number in [1, 1000]"),
    (["--seeds", "9" * 400], "...: give a whole number in [1, 1000]"),
    (["--rounds", "-1"], "error: argument --rounds: -1: give a whole number in [0, 1e9]"),
    (["--out_dir="], "error: argument --out_dir: it is empty"),
    (["--device=mps:9"], "error: device=mps:9 is not here"),
    (["--match_optimizer=no"], "error: argument --match_optimizer: invalid yes_or_no value: 'no'"),
    (["--lrs", "high"], "error: argument --lrs: high: give a number in (0, 1e30]"),
    (["--lrs", "1,nan"], "error: argument --lrs: nan: give a number in (0, 1e30]"),
    (["--budget", "inf"], "error: argument --budget: inf: give a number in (0, 1e30]"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(setting, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as exit:
        compare.main([*setting, f"--out_dir={tmp_path}", *more])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and error.startswith("error: ") and message in error


# ---- the runs --------------------------------------------------------------------------------------------------------
def test_the_learning_rate_is_chosen_at_seeds_that_are_not_compared(setting, tmp_path, fake):
    row = run(setting, tmp_path, "--lrs", "0.5,1,2", "--seeds", "4")["variants"][0]
    assert sorted(fake.ran[:6]) == [("baseline", lr, seed) for lr in (0.5, 1, 2) for seed in (1, 2)]
    assert sorted(fake.ran[6:]) == [("baseline", 1, seed) for seed in (3, 4, 5, 6)]
    assert row["lr"] == 1 and row["loss"] == pytest.approx([3.03, 3.04, 3.05, 3.06])
    assert row["sweep"]["1"] == pytest.approx(3.015) and row["sweep_seeds"] == 2


def test_one_rate_needs_no_sweep(setting, tmp_path, fake):
    row = run(setting, tmp_path, "--lrs", "2", "--seeds", "2")["variants"][0]
    assert sorted(fake.ran) == [("baseline", 2, 1), ("baseline", 2, 2)]
    assert row["lr"] == 2 and row["sweep"] == {}


@pytest.mark.parametrize("best, rates, edge", [(2, "1 2 4", False), (8, "1 2 4 8", True), (0.4, "1 2 0.5 0.25", False)])
def test_a_sweep_that_is_best_at_an_end_is_widened_there(setting, tmp_path, fake, best, rates, edge):
    fake.loss = lambda name, lr, seed: abs(math.log2(lr / best))
    row = run(setting, tmp_path, "--lrs", "1,2", "--seeds", "1")["variants"][0]
    assert " ".join(row["sweep"]) == rates
    assert ("at the edge" in (tmp_path / "comparison.md").read_text()) == edge


def test_a_comparison_goes_on_where_a_failed_run_stopped_it_and_repeats_nothing(setting, tmp_path, fake, capsys):
    more = ["--models", "baseline,mla", "--lrs", "1", "--seeds", "2"]
    fake.fails_at = 4
    with pytest.raises(SystemExit):
        run(setting, tmp_path, *more)
    assert capsys.readouterr().err.strip().endswith("error: no luck") and len(fake.ran) == 4
    fake.fails_at = 0
    whole = run(setting, tmp_path, *more)
    assert len(fake.ran) == 5 and fake.ran[3] == fake.ran[4]
    assert run(setting, tmp_path, *more) == whole and len(fake.ran) == 5
    run(setting, tmp_path, "--models", "baseline,mla", "--lrs", "1", "--seeds", "3")
    assert sorted(fake.ran[5:]) == [("baseline", 1, 3), ("mla", 1, 3)]


def test_a_folder_of_another_comparison_is_refused_with_what_differs(setting, tmp_path, fake, capsys):
    run(setting, tmp_path, "--lrs", "1", "--seeds", "1")
    with pytest.raises(SystemExit):
        run(setting, tmp_path, "--lrs", "1", "--seeds", "1", "--weight_decay=0.5")
    error = capsys.readouterr().err
    assert "is of another comparison: weight_decay=0.1, not 0.5: try another --out_dir" in error and len(fake.ran) == 1


def test_a_run_that_died_before_its_first_step_stops_no_comparison(setting, tmp_path, fake):
    run(setting, tmp_path, "--lrs", "1", "--seeds", "1")
    folder = next(tmp_path.glob("*/*/manifest.json")).parent
    corrected = compare.Run(planned(setting, "--weight_decay=0.5")[0], 1.0, 1, folder)
    with pytest.raises(ValueError, match="is of another comparison"):
        compare.is_finished(corrected)
    (folder / "metrics.jsonl").write_text("")
    assert not compare.is_finished(corrected)


def test_a_run_on_other_data_is_no_part_of_this_comparison(setting, tmp_path, fake, capsys):
    run(setting, tmp_path, "--lrs", "1", "--seeds", "1")
    manifest = next(tmp_path.glob("*/*/manifest.json"))
    manifest.write_text('{"data_fingerprint": "another"}')
    with pytest.raises(SystemExit):
        run(setting, tmp_path, "--lrs", "1", "--seeds", "1")
    assert "of another comparison: its data was another" in capsys.readouterr().err


def test_a_learning_rate_that_diverges_is_a_result_and_not_the_end(setting, tmp_path, forks):
    """train.py gives up after steps without a finite gradient; the comparison goes on, and does not try again.

    At the larger rate the decay makes all weights 1,000 times as large in each step.
    """
    more = ["--lrs", "1,1000", "--seeds", "1", "--optimizer=adamw", "--weight_decay=100", "--max_skipped=2"]
    row = run(setting, tmp_path, *more, "--jobs=2")["variants"][0]
    assert row["lr"] < 1000 and row["loss"][0] < 6 and None in row["sweep"].values()
    logs = {path: path.read_bytes() for path in tmp_path.glob("*/*.log")}
    assert run(setting, tmp_path, *more)["variants"] == [row]
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*.log")} == logs


def test_jobs_take_turns_on_the_gpus_that_the_user_gave(setting, tmp_path, monkeypatch):
    """Two jobs, one GPU each, and the next run takes the one that became free."""
    seen, alive = [], []

    class Process:
        def __init__(self, command, env, **options):
            self.gpu, self.code = env["CUDA_VISIBLE_DEVICES"], 0
            seen.append(self.gpu)
            alive.append(self.gpu)
            assert len(set(alive)) == len(alive)  # never two on one

        def wait(self):
            time.sleep(0.05 if len(seen) % 2 else 0.01)
            alive.remove(self.gpu)
            return 0

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compare.subprocess, "Popen", Process)
    monkeypatch.setattr(compare, "is_finished", lambda run: run.seed < 0 or bool(seen))
    variant = planned(setting)[0]
    runs = [compare.Run(variant, 1.0, seed, tmp_path / "runs" / str(seed)) for seed in range(6)]
    slots, pool = compare.SimpleQueue(), compare.ThreadPoolExecutor(2)
    for slot in range(2):
        slots.put(slot)
    list(pool.map(lambda run: compare.train(run, slots, 2, []), runs))
    assert len(seen) == 6 and set(seen) == {"4", "5"}


@pytest.mark.xdist_group("processes")
def test_a_comparison_that_is_stopped_saves_its_runs_and_goes_on_with_them(setting, tmp_path, monkeypatch):
    more = ["--models=baseline,gpt2", "--lrs=1", "--seeds=1", "--jobs=2", "--budget=1.5e10", "--eval_tokens=64"]
    process, log = launch(tmp_path, [*setting, f"--out_dir={tmp_path}", *more], script="compare.py")
    paused = []

    def both_have_begun():
        """Pauses each run after its first steps, so that none ends before the other has begun."""
        for lock in set(tmp_path.glob("*/*/.lock")) - set(paused):
            if wrote(lock.parent, 500):
                os.kill(holder(lock.parent), signal.SIGSTOP)
                paused.append(lock)
        return len(paused) == 2

    try:
        until(both_have_begun)
    finally:
        process.terminate()
        for lock in paused:
            os.kill(holder(lock.parent), signal.SIGCONT)
    stopped = finish(process, log)
    assert stopped.code == 130 and "the same command goes on from here" in stopped.err
    logs = sorted(tmp_path.glob("*/*.log"))
    steps = [int(re.search(r"stopped after step (\d+)", log.read_text())[1]) for log in logs]
    monkeypatch.setattr(compare.subprocess, "Popen", Fork)
    rows = run(setting, tmp_path, *more)["variants"]
    for log, step, row in zip(logs, steps, rows, strict=True):
        assert f"resuming from {log.with_suffix('')}/step-{step:08d}" in log.read_text()
        assert 0 < step * 256 < row["tokens"] == row["curves"][0][-1][0]


@pytest.mark.xdist_group("processes")
def test_an_orphan_of_a_killed_comparison_is_named_by_the_next(setting, tmp_path, capsys, forks):
    more = ["--lrs=1", "--seeds=1", "--budget=1e12", "--eval_tokens=64"]
    process, log = launch(tmp_path, [*setting, f"--out_dir={tmp_path}", *more], script="compare.py")
    until(lambda: any(wrote(lock.parent, 500) for lock in tmp_path.glob("*/*/.lock")))
    process.kill()
    finish(process, log)
    (lock,) = tmp_path.glob("*/*/.lock")
    orphan = holder(lock.parent)
    os.kill(orphan, signal.SIGSTOP)  # it lives, and takes no time from the others
    try:
        with pytest.raises(SystemExit) as exit:
            run(setting, tmp_path, *more)
        assert exit.value.code == 2 and f"is in use by process {orphan} on " in capsys.readouterr().err.splitlines()[-1]
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_real_comparison_trains_both_variants_and_measures_their_speed(setting, tmp_path, forks):
    result = run(setting, tmp_path, "--models", "baseline,gpt2", "--lrs", "1", "--seeds", "1", "--rounds", "2")
    for row in result["variants"]:
        assert row["loss"][0] < 5 and row["bits_per_byte"][0] == pytest.approx(row["loss"][0] / math.log(2), rel=0.05)
        assert len(row["train_seconds"]) == 2 and list(row["decode_seconds"]) == ["8", "30"]
        tokens, losses = zip(*row["curves"][0], strict=True)
        assert tokens[-1] == row["tokens"] and losses[-1] == row["loss"][0]
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


# ---- what is said of them --------------------------------------------------------------------------------------------
def test_a_diverged_variant_stands_in_the_report_and_ends_nothing(setting, tmp_path, fake):
    fake.loss = lambda name, lr, seed: None if name == "mla" and seed == 2 else 3.0 + seed / 10
    result = run(setting, tmp_path, "--models", "baseline,mla,gpt2", "--lrs", "1", "--seeds", "3")
    assert result["variants"][1]["loss"] == [3.1, None, 3.3]
    table = (tmp_path / "comparison.md").read_text()
    assert "| mla | diverged | n/a | diverged |" in table and "| gpt2 | 3.2000 ± 0.0577 |" in table
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_the_table_has_ratios_of_rounds_and_the_bytes_of_state(setting, tmp_path, fake):
    result = run(setting, tmp_path, "--models", "baseline,hybrid", "--lrs", "1", "--seeds", "1")
    for row, seconds in zip(result["variants"], ([1.0, 2.0, 9.0], [2.0, 5.0, 9.0]), strict=True):
        row |= {"train_seconds": seconds, "decode_seconds": {"8": [x / 10 for x in seconds]}}
    result["peak_flops"] = 1e9
    row = next(
        line for line in comparison.markdown(result).splitlines() if line.startswith("| hybrid | ") and "GB" in line
    )
    per_token, cells = result["variants"][1]["flops_per_token"], row.split(" | ")
    assert cells[6:8] == ["51 (0.50x)", f"{256 / 5 * per_token / 1e9:.1%}"]
    # keys and values: 2 * 2 heads * 16 * 4 bytes; state: 4 * (4 heads * 16 * 12 + 3 inputs of 112 channels)
    assert cells[9:] == ["256 + 4,416", "2 (0.50x) |"]


def test_the_best_size_is_the_minimum_of_a_parabola_through_known_losses(setting, tmp_path, fake):
    sizes = dict(zip((16, 32, 64), (2.5, 2.1, 2.3), strict=True))
    fake.loss = lambda name, lr, seed: sizes[int(name.split("=")[1])]
    more = ["--budgets", "2e9,4e9", "--sizes", "n_embd=16,n_embd=32,n_embd=64", "--lrs", "1", "--seeds", "1"]
    result = run(setting, tmp_path, *more)
    assert len(fake.ran) == 6 and [row["budget"] for row in result["variants"]] == [2e9] * 3 + [4e9] * 3
    for own, fit, best in comparison.best_sizes(result["variants"]).values():
        for row in own:  # three points lie on the parabola
            assert np.polyval(fit, math.log(row["parameters"])) == pytest.approx(row["loss"][0])
        assert np.polyval(np.polyder(fit), math.log(best)) == pytest.approx(0, abs=1e-9)
        assert own[1]["parameters"] < best < own[2]["parameters"]
        assert f"{best:,.0f} parameters" in (tmp_path / "comparison.md").read_text()
    result["variants"][0]["loss"] = [1.0]
    assert comparison.best_sizes(result["variants"])["baseline", 2e9][2] is None


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("compare_*.json")), ids=lambda path: path.stem)
def test_a_committed_table_is_the_one_drawn_from_the_committed_numbers(path):
    assert path.with_suffix(".md").read_text() == comparison.markdown(json.loads(path.read_text()))
