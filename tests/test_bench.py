import importlib
import json
import statistics
import subprocess
from functools import partial

import numpy as np
import pytest
import torch

import bench
import flops
import kernels
import kernels_delta
import model_mla
from benchmarks import (
    attention,
    decoding,
    kernel_cases,
    parallel,
    rollout,
    shakespeare,
    timing,
    training,
    variants,
    workload,
)
from benchmarks import kernels as bench_kernels
from benchmarks import loader as bench_loader
from data.shards import write_shard
from tests.tiny import MODELS, build, cache_tensors, module, tokens

TINY = ["--model=baseline", "--n_layer=2", "--n_head=4", "--n_kv_head=2", "--head_dim=8", "--n_embd=32", "--n_inner=48",
        "--vocab_size=97", "--block_size=32", "--micro_batch=2"]  # fmt: skip

SMALL = dict(n_layer=2, n_head=2, n_kv_head=1, head_dim=8, n_embd=16, vocab_size=64)
DELTA = dict(n_inner=16, layer_pattern="da", n_key_head=1, n_value_head=2, key_dim=8, value_dim=8)
SMALL_VARIANTS = {
    "moe": dict(batch=(2, 32), experts=(4, 8), versus=8, sizes=SMALL, per_token=2, width=8),
    "mla": dict(context=64, sizes=dict(n_head=4, head_dim=16, n_embd=32, kv_rank=24, rope_dim=8)),
    "hybrid": dict(contexts=(16, 64), lengths=(8, 128), sizes=SMALL | DELTA),
}


@pytest.mark.parametrize("command", bench.BENCHMARKS)
def test_the_committed_table_is_the_one_drawn_from_the_committed_numbers(command):
    benchmark = bench.BENCHMARKS[command]
    files = sorted((bench.ROOT / "results").glob(f"{benchmark.RESULT}*.json"))
    assert files or command == "kernels"  # which wait for a GPU
    for file in files:
        assert file.with_suffix(".md").read_text() == benchmark.markdown(json.loads(file.read_text()))


def test_a_run_is_judged_where_the_line_between_two_evaluations_falls_to_the_target():
    rows = [{"step": 0, "val_loss": 4.0}, *({"step": i, "ms": 10.0} for i in range(1, 101))]
    rows += [{"step": 100, "val_loss": shakespeare.TARGET + 0.3}, *({"step": i, "ms": 20.0} for i in range(101, 201))]
    missed = shakespeare.summary(rows)
    assert (missed["reached"], missed["steps"], missed["seconds"]) == (False, 200, 3.0)
    found = shakespeare.summary([*rows, {"step": 200, "val_loss": shakespeare.TARGET - 0.1}])
    assert (found["reached"], found["steps"]) == (True, 175)  # 3 / 4 of the way
    assert found["seconds"] == pytest.approx(2.5)  # 100 steps of 10 ms and 75 of 20


# ---- what it measures with ------------------------------------------------------------------------------------------
def test_functions_take_turns_and_a_round_holds_the_mean_of_its_calls(monkeypatch):
    now, calls = [0.0], []

    def call(name, cost):
        calls.append(name)
        now[0] += cost

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    took = timing.in_turn([partial(call, "a"), lambda cost: call("b", cost + 4)], (1.0,), rounds=2, times=3)
    assert "".join(calls) == "aabb" + "aaabbb" * 2
    assert took == [[1.0, 1.0], [5.0, 5.0]]


def test_peak_memory_is_what_is_in_use_at_once_and_not_what_was_there_before():
    kept = torch.ones(1_000_000)

    def work():
        a = kept + 1  # 4 MB
        b = a + 1  # 8
        del a
        c = b + 1  # 8
        return float((c + 1).sum())  # 12

    assert timing.peak_memory(work) == pytest.approx(12e6, rel=0.01)


def test_resident_bytes_are_those_of_weights_buffers_and_the_optimizers_state():
    model = torch.nn.BatchNorm1d(1000)  # weight, bias, mean and variance, and a count of 8 bytes
    assert timing.resident_bytes(model) == 4 * 4000 + 8
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1000)).sum().backward()
    optimizer.step()
    assert timing.resident_bytes(model, optimizer) == 4 * 4000 + 8 + 2 * (2 * 4000 + 4)  # two averages, and a step


def test_token_times_begin_at_the_prompt_and_leave_prefill_out_of_the_time_a_token(monkeypatch):
    times, arrivals = timing.TokenTimes(), iter([10.0, 12.0, 12.5, 13.0, 14.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(arrivals))
    for _ in range(5):
        times.put(torch.zeros(1))
    assert times.seconds() == (2.0, pytest.approx(2 / 3))


def test_bandwidth_is_the_data_sheets_where_the_gpu_is_known_and_else_that_of_a_copy(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda *_, **__: 0.5)
    assert timing.copy_bandwidth("cpu", megabytes=1) == 2 * 2**20 / 0.5
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 7e9)
    assert timing.bandwidth("cpu") == (7e9, "measured copy")
    monkeypatch.setattr(timing.flops, "device_name", lambda device: "NVIDIA H200")
    assert timing.bandwidth("cuda") == (4.8e12, "data sheet")


def test_a_step_without_an_optimizer_leaves_the_weights_and_with_one_is_a_clipped_step_of_it():
    model, (x, y) = build("baseline"), timing.random_batch(2, 16, 97)
    before = {name: p.clone() for name, p in model.named_parameters()}
    timing.make_step(model)(x, y)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    timing.make_step(model, torch.optim.SGD(model.parameters(), lr=1.0))(x, y)
    moved = sum((p - before[name]).square().sum() for name, p in model.named_parameters()).sqrt()
    assert moved.item() == pytest.approx(1.0, rel=1e-3)  # a gradient longer than 1 is cut to 1


def test_the_step_of_a_run_is_that_of_its_saved_config(tmp_path):
    knobs = dict(optimizer="muon", learning_rate=0.5, weight_decay=0.0, beta1=0.8, beta2=0.9, muon_momentum=0.7,
                 muon_steps=3, muon_dtype="auto", seed=1, dtype="bfloat16", compile="auto", micro_batch=1)  # fmt: skip
    fields = module("baseline").TINY | dict(vocab_size=66, block_size=64)
    (tmp_path / "config.json").write_text(json.dumps({"model": "baseline", "model_config": fields, "knobs": knobs}))
    step = shakespeare.step_of_run(tmp_path)
    names = step.__code__.co_freevars
    inside = dict(zip(names, (cell.cell_contents for cell in step.__closure__)))
    groups = {group["method"]: group for group in inside["optimizer"].param_groups}
    assert (groups["muon"]["lr"], groups["muon"]["momentum"], groups["muon"]["steps"]) == (0.5, 0.7, 3)
    assert groups["adamw"]["betas"] == (0.8, 0.9) and inside["dtype"] == "bfloat16"
    assert inside["loss"] is inside["model"]  # a CPU compiles only what is told to
    before = inside["model"].blocks[0].mlp.w_up.weight.clone()
    step(*timing.random_batch(2, 64))
    assert not torch.equal(before, inside["model"].blocks[0].mlp.w_up.weight)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_decoding_step_reads_the_weights_but_for_idle_experts_and_rows_and_the_cache(name, batch):
    """Against the real tensors: a table gives a row a sequence; the embedding is read whole where it is the head."""
    model = build(name, tie_embeddings=False) if name != "gpt2" else build(name)
    read = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes + batch * 4 * model.config.n_embd
    if name == "gpt2":  # its head is the embedding, and it has a table of positions
        read += model.embed.weight.nbytes - model.pos_embed.weight.nbytes + batch * 4 * model.config.n_embd
    if hasattr(model.config, "n_expert"):  # an expert is idle where no sequence chooses it
        experts = [p for key, p in model.named_parameters() if p.ndim == 3]
        read -= sum(p.nbytes for p in experts) * (1 - model.config.n_expert_per_token / model.config.n_expert) ** batch
    cache = model.new_cache(1, 24)
    state = cache.state_bytes() if name in ("hybrid", "linear") else 0
    if name == "sliding":  # the rings of local layers
        state = sum(x.nbytes for x in cache.k + cache.v if x.size(2) < 24)
    if name == "linformer":  # the window, and a place for slots that are not whole
        state = sum(x.nbytes for x in cache.k + cache.v) + model.config.window * cache.bytes_per_token()
    read += batch * (24 * cache.bytes_per_token() + state)
    assert decoding.bytes_per_step(name, model, batch, 24) == round(read)


# ---- the commands, small --------------------------------------------------------------------------------------------
def result_of(folder, name):
    return json.loads((folder / f"{name}_cpu.json").read_text()), (folder / f"{name}_cpu.md").read_text()


def test_shakespeare_runs_both_configs_at_every_seed_and_sets_ours_beside_nanogpts(tmp_path, monkeypatch):
    runs = []

    def run_training(config, out, data, **knobs):
        runs.append((config, knobs))
        last = {shakespeare.OURS: 1.5, shakespeare.NANOGPT: 2.0}[config]
        steps = {shakespeare.OURS: 50, shakespeare.NANOGPT: 100}[config]
        return [{"step": 0, "val_loss": 4.0}, *({"ms": 10.0} for _ in range(steps)), {"step": steps, "val_loss": last}]

    def in_turn(steps, batch, rounds, times):
        assert steps == ["step of out/bench/ours_7", "step of out/bench/nanogpt_7"]
        return [[0.003] * rounds, [0.002] * rounds]

    monkeypatch.setattr(shakespeare, "run_training", run_training)
    monkeypatch.setattr(shakespeare, "step_of_run", lambda folder: f"step of {folder}")
    monkeypatch.setattr(shakespeare, "in_turn", in_turn)
    bench.main(["--out", str(tmp_path), "shakespeare", "--seeds", "7", "8"])
    result, table = result_of(tmp_path, "shakespeare_char")
    assert result["command"] == "python bench.py shakespeare --seeds 7 8"
    assert runs[:3] == [
        (shakespeare.OURS, {"seed": 7, "eval_every": 20}),
        (shakespeare.NANOGPT, {"seed": 7, "eval_every": 100}),
        (shakespeare.OURS, {"seed": 7, "eval_every": 500, "max_steps": 2000}),
    ]
    assert [knobs["seed"] for _, knobs in runs[3:]] == [8, 8, 8]
    # 50 * (4 - 1.88) / (4 - 1.5) = 42.4: 43 steps of 100, each of which takes 1.5 times as long
    assert "| steps | 100 (100 to 100, 2 seeds) | 43 (43 to 43, 2 seeds) | 0.430 |" in table
    assert "| 2.0 | 3.0 | 1.500 |" in table and "**0.645**" in table
    assert "2 of 2 runs of nanoGPT's setting ended above 1.88" in table and "runs of ours" not in table


@pytest.mark.parametrize("words, message", [
    (["--device", "foo", "attention"], "error: device=foo is none of cuda"),
    (["--device", "foo", "loader"], "error: device=foo is none of cuda"),
    (["--device", "mps:9", "rollout"], "error: device=mps:9 is not here"),
    (["--data", "nowhere", "loader"], "error: nowhere not found"),
    (["train", "--rounds", "0"], "error: argument --rounds: 0: give a whole number in [1, 1e9]"),
    (["decode", "--new", "1"], "error: argument --new: 1: give a whole number in [2, 1e9]"),
    (["decode", "--batch", "9" * 400], "...: give a whole number in [1, 1e9]"),
    (["shakespeare", "--seeds", "-1"], "error: argument --seeds: -1: give a whole number in [0, 4294967295]"),
    (["posttrain", "--seeds", str(2**64)], f"error: argument --seeds: {2**64}: give a whole number in"),
    (["nothing"], "error: argument command: invalid choice: 'nothing'"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_in_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--out", str(tmp_path), *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("error: ") and message in line and len(line) < 300


def test_bench_ends_with_the_code_of_a_run_of_train_which_has_said_why(tmp_path, capsys, monkeypatch):
    def run_training(*args, **knobs):
        raise subprocess.CalledProcessError(3, "train.py")

    monkeypatch.setattr(shakespeare, "run_training", run_training)
    with pytest.raises(SystemExit) as caught:
        bench.main(["--out", str(tmp_path), "shakespeare"])
    assert caught.value.code == 3 and "Error" not in capsys.readouterr().err


def test_loader_times_its_share_of_steps_and_reads_every_shard_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loader, "SHARD_TOKENS", (200_000,))
    write_shard(tmp_path / "train_000000.bin", np.arange(5000, dtype=np.uint16) % 66, 66)
    bench.main(["--out", str(tmp_path), "--data", str(tmp_path), "loader", "--steps", "2"])
    result, table = result_of(tmp_path, "loader")
    assert 0 < result["load_us"] < result["step_us"] and result["batch"] == [12, 64]
    (memory,) = result["memory"]
    assert memory["tokens"] == 200_000 and 50 < memory["peak_mb"] < 2000
    assert f"**{result['load_us'] / result['step_us']:.2%}** of a step" in table
    assert f"| 200,000 | 0 | {memory['peak_mb']:,.0f} |" in table


def test_train_measures_a_config_against_transformers_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(training, "peak_memory", lambda *_: 1000)
    monkeypatch.setitem(training.SETTINGS, "cpu", (("float32", False), ("bfloat16", True)))
    bench.main(["--out", str(tmp_path), "--device", "cpu", "train", *TINY, "--rounds", "2", "--tokens", "100"])
    result, table = result_of(tmp_path, "training_speed_baseline")
    assert result["command"].startswith(f"python bench.py train {' '.join(TINY)} --tokens 100 --rounds 2")
    measured = result["sizes"]["baseline"]
    assert measured["batch"] == [2, 32]
    names = ["baseline", "baseline", "transformers", "transformers"]
    assert [row["model"] for row in measured["rows"]] == names
    assert len({row["parameters"] for row in measured["rows"]}) == 1
    for row in measured["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
    tensors = len(list(build("baseline").parameters()))
    for row in measured["rows"][:2]:  # weights and two averages, and a step of each
        assert row["peak_bytes"] == 1000 + 12 * row["parameters"] + 4 * tensors
    speed = statistics.median(2 * 32 / s for s in measured["rows"][0]["seconds"])
    assert f"| {speed:,.0f} (" in table


def test_mfu_is_flops_done_over_the_peak_where_that_is_known():
    row = dict(model="baseline", dtype="bfloat16", compile=True, parameters=10, flops_per_token=2e9, peak_flops=1e12,
               seconds=[0.02, 0.025, 0.04], peak_bytes=5e6)  # fmt: skip
    result = dict(command="c", rounds=3, machine=dict(cpu="x", cores=1, threads=1, torch="2", gpu="NVIDIA H200"),
                  sizes={"s": dict(batch=[2, 2], rows=[row, row | {"model": "transformers", "peak_flops": None,
                                                                   "seconds": [0.04, 0.05, 0.04]}])})  # fmt: skip
    first, second = training.markdown(result).splitlines()[-2:]
    # 4 tokens in 25 ms: 160 tokens/s * 2 GFLOP = 320 GFLOP/s, of 1,000; rounds 2, 2 and 1 times as fast as the other
    assert "| 160 (100 to 200) | 320.0 | 32.0% | 5.0 | 2.00 |" in first
    assert "| n/a | 5.0 | 1.00 |" in second


def test_where_the_kernel_itself_fails_the_others_keep_their_times_and_nothing_is_compared():
    row = dict(error=0.5, peak_bytes=2e6, forward=[0.001, 0.003, 0.002], both=[0.004] * 3)
    case = dict(name="moe", size="2 x 2", unit="FLOP", work=(2e9, 8e9), rows={"kernel": {"failed": "no"}, "eager": row})
    result = dict(command="c", rounds=3, dtype="bfloat16", times=1, copy=1e12, matmul=2e12, cases=[case],
                  machine=dict(cpu="x", cores=1, threads=1, torch="2", gpu="NVIDIA H200"))  # fmt: skip
    kernel, eager = bench_kernels.markdown(result).splitlines()[-2:]
    assert kernel.startswith("| kernel | no | |") and kernel.count("|") == eager.count("|")
    forward = "2.000 (1.000 to 3.000) | 1.0 TFLOP/s | 50% | n/a"  # 2 GFLOP in 2 ms
    both = "4.000 (4.000 to 4.000) | 2.0 TFLOP/s | 100% | n/a"
    assert eager == f"| eager | {forward} | {both} | 2.0 | 5.0e-01 |"


@pytest.fixture
def quick_copy(monkeypatch):
    """Bandwidth is measured on copies of a megabyte, for which a cache is enough."""
    quick = partial(timing.copy_bandwidth, megabytes=1)
    monkeypatch.setattr(timing, "copy_bandwidth", quick)
    monkeypatch.setattr(bench_kernels, "copy_bandwidth", quick)


def test_decode_emits_the_ids_of_transformers_and_a_compiled_step_those_of_eager(tmp_path, monkeypatch, quick_copy):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    words = ["decode", *TINY, "--rounds", "2", "--prompt", "9", "--new", "6", "--batch", "2", "--compile"]
    bench.main(["--out", str(tmp_path), "--device", "cpu", *words])
    result, table = result_of(tmp_path, "decoding_speed_baseline")
    measured = result["sizes"]["baseline"]
    assert [row["who"] for row in measured["rows"]] == ["eager", "compiled", "transformers' generate"]
    assert [row["same"] for row in measured["rows"]] == [6, 6, 6] and "All emit the same 6 ids." in table
    for row in measured["rows"]:
        assert len(row["prefill"]) == len(row["step"]) == 2 and min(row["prefill"] + row["step"]) > 0
        assert row["peak_bytes"] > 4 * measured["parameters"]
    rate = measured["bytes_per_step"] / statistics.median(measured["rows"][0]["step"])
    assert f"| {rate / 1e9:,.1f} | {rate / result['limit']:.0%} |" in table


def test_the_first_id_that_differs_is_told(monkeypatch):
    ids = iter([[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]] * 3)
    monkeypatch.setattr(decoding, "our_tokens", lambda *_, **__: (next(ids), (1.0, 1.0)))
    monkeypatch.setattr(decoding, "as_transformers", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    rows = decoding.decoding_rows(build("baseline"), tokens(2, 4), new=3, rounds=1, compiled=True)
    assert [row["same"] for row in rows] == [3, 1]


SMALL_KERNELS = dict(
    rows=(16, 8, 24), heads=(1, 8, 2, 16), attention=[(1, 2, 1, 8, 16, 0), (1, 2, 1, 8, 16, 3)], loss=(6, 8, 97),
    moe=(8, 16, 8, 4, 2), delta=[(1, 2, 8, 16)],
)  # fmt: skip


def test_kernels_measures_each_of_them_in_turn_after_its_error(tmp_path, monkeypatch, quick_copy):
    def briefly(functions, batch, rounds, times, device):
        """timing.in_turn calls a function twice before it measures, which an interpreted kernel does not need."""
        return [[timing.seconds(function, batch, times, device)] * rounds for function in functions]

    monkeypatch.setattr(kernel_cases, "SIZES", SMALL_KERNELS)
    monkeypatch.setattr(bench_kernels, "MATMUL_SIZE", 32)
    monkeypatch.setattr(bench_kernels, "CALLS", 1)
    monkeypatch.setattr(bench_kernels, "FEWER_TOKENS", 2)
    monkeypatch.setattr(bench_kernels, "in_turn", briefly)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)

    def broken(q, k, v, causal, window):
        raise RuntimeError("no such kernel here\nand a long story")

    real = kernel_cases.attention_case

    def attention_with_a_broken_one(*sizes):
        case = real(*sizes)
        case.others |= {"broken": broken}
        return case

    monkeypatch.setattr(kernel_cases, "attention_case", attention_with_a_broken_one)
    bench.main(["--out", str(tmp_path), "--device", "cpu", "kernels", "--rounds", "2"])
    result, table = result_of(tmp_path, "kernels")
    names = [case["name"] for case in result["cases"]]
    public = [name[:-4] for module in (kernels, kernels_delta) for name in vars(module) if name.endswith("_ref")]
    assert set(names) == set(public) and names.count("flash_attention") == 2
    for case in result["cases"]:
        rows = case["rows"]
        assert all(0 <= rows[who]["error"] < 1e-5 for who in ("kernel", "eager", "compiled"))
        assert all(len(rows[who][key]) == 2 for who in ("kernel", "eager", "compiled") for key in ("forward", "both"))
        assert case["work"][0] > 0 and f"## {case['name']}, {case['size']}" in table
    attention = next(case for case in result["cases"] if case["name"] == "flash_attention")
    assert attention["rows"]["broken"] == {"failed": "no such kernel here"}
    assert "| broken | no such kernel here |" in table
    assert attention["work"] == [4 * 2 * 16 * 36, 3.5 * 4 * 2 * 16 * 36]  # 8 * 9 / 2 = 36 pairs
    ratio = statistics.median(a / b for a, b in zip(rows["eager"]["forward"], rows["kernel"]["forward"]))
    assert f"| {ratio:.2f} |" in next(line for line in table.splitlines()[::-1] if line.startswith("| eager"))


def test_kernels_are_not_measured_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(SystemExit) as caught:
        bench.main(["--device", "cpu", "kernels"])
    assert caught.value.code == 2 and "measured on a CUDA device" in capsys.readouterr().err


def test_parallel_saves_for_real_and_says_what_it_was_beside(tmp_path, monkeypatch):
    sizes = dict(n_layer=1, n_head=2, n_kv_head=1, head_dim=8, n_embd=16, n_inner=4096, vocab_size=64)
    monkeypatch.setattr(parallel, "SIZES", parallel.SIZES | {"saving": sizes})
    monkeypatch.setattr(parallel, "ROOT", tmp_path)
    monkeypatch.setattr(parallel, "step_seconds", lambda strategy, data: {"ddp": 2.0, "fsdp": 2.5}[strategy])
    monkeypatch.setattr(parallel, "resume_seconds", lambda data: {"resume": 5.0, "imports": 3.5})
    bench.main(["--out", str(tmp_path), "--device", "cpu", "parallel", "--rounds", "2"])
    result, table = result_of(tmp_path, "parallel")
    assert all(0 < stall and 0 < took for stall, took in zip(result["stall"], result["save"]))
    assert len(result["dd"]) == len(result["save"]) == 2 and not list((tmp_path / "out/bench").iterdir())
    assert "| 2.50 (2.50 to 2.50) | 2.00 (2.00 to 2.00) | 1.25 (1.25 to 1.25) |" in table
    assert "takes 1.50 (1.50 to 1.50) s beyond its imports" in table


def test_what_a_resumed_run_is_said_to_import_is_there():
    for name in parallel.IMPORTS:
        importlib.import_module(name)


def test_variants_measures_every_section_and_its_ratios_are_those_of_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "SIZES", SMALL_VARIANTS)
    forms = []
    for form in ("absorbed", "expanded"):
        real = getattr(model_mla.Attention, form)
        monkeypatch.setattr(model_mla.Attention, form, lambda *x, form=form, real=real: forms.append(form) or real(*x))
    bench.main(["--out", str(tmp_path), "--device", "cpu", "variants", "--rounds", "2"])
    result, table = result_of(tmp_path, "variants")
    # 1. a token costs the same in all of them, but for the router
    dense, *mixtures = result["moe"]["rows"]
    assert [row["n_expert"] for row in mixtures] == [4, 8]
    for row in mixtures:
        assert row["flops_per_token"] - dense["flops_per_token"] == 3 * 2 * (2 * 16 * row["n_expert"])  # 2 layers
        assert len(row["step"]) == len(row["gradient"]) == 2
    ratio = statistics.median(b / a for a, b in zip(mixtures[1]["step"], dense["step"]))
    assert f"| {ratio:.2f} | " in next(line for line in table.splitlines() if line.startswith("| **8 experts**"))
    # 2. 24 + 8 numbers against 2 * 4 * 16, in both forms; two prefills are expanded
    assert forms.count("absorbed") == forms.count("expanded") - 2 > 20
    assert [row["cache_bytes_per_token"] for row in result["mla"]["rows"]] == [4 * 32, 4 * 32, 4 * 128]
    assert table.count("| 1 / 4.0 |") == 2 and "| MHA | 512 | 0.0 | 1 / 1.0 |" in table
    # 3. contexts and lengths as asked
    hybrid = result["hybrid"]
    assert [row["context"] for row in hybrid["decoding"]] == [16, 64]
    assert [(row["layers"], row["length"]) for row in hybrid["training"]] == [
        ("dd", 8),
        ("dd", 128),
        ("da", 8),
        ("da", 128),
    ]


SMALL = dict(n_layer=1, n_head=2, head_dim=16, n_embd=32, n_inner=64, vocab_size=64)
SMALL_ATTENTION = {
    "longer": dict(
        contexts=(32, 128),
        lengths=(8, 32),
        models={
            "baseline": ("baseline", SMALL | dict(n_kv_head=1)),
            "sliding": ("sliding", SMALL | dict(n_kv_head=1, layer_pattern="l", window=16)),
        },
    ),
    "chosen": dict(
        context=64,
        models={"sparse": ("sparse", "top_k_block", (1, 8), SMALL | dict(n_kv_head=1, key_block=8))},
    ),
}


def test_attention_has_a_row_for_each_length_and_share_of_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "SIZES", SMALL_ATTENTION)
    bench.main(["--out", str(tmp_path), "--device", "cpu", "attention", "--rounds", "2"])
    result, table = result_of(tmp_path, "attention")
    rows = {(row["model"], row["context"]): row["cache_bytes"] for row in result["decoding"]}
    assert rows["baseline", 128] == 4 * rows["baseline", 32] == 4 * 2 * 16 * 128  # fp32 keys and values of one head
    assert rows["sliding", 128] == rows["sliding", 32] == 4 * 2 * 16 * 16
    assert [(row["model"], row["length"]) for row in result["training"]][::2] == [("baseline", 8), ("sliding", 8)]
    few, all_keys = result["chosen"]
    assert few["seen"] == 4.5 / 32.5 and all_keys["seen"] == 1  # 1 to 8 keys of the own block; 1 to 64 in all
    row = result["training"][1]
    ratio = statistics.median(b / a for a, b in zip(result["training"][0]["seconds"], row["seconds"]))
    assert (
        f"| baseline | 32 | {timing.median_and_range([1000 * s for s in row['seconds']])} | 4 | {ratio:.2f} |" in table
    )


def test_each_time_stands_where_it_was_measured(monkeypatch):
    monkeypatch.setattr(variants, "in_turn", lambda functions, *_, **__: [[float(i)] for i in range(len(functions))])
    moe = variants.moe_rows(1, "cpu", "float32", **SMALL_VARIANTS["moe"])["rows"]
    assert [(row["gradient"], row["step"]) for row in moe] == [([0.0], [1.0]), ([2.0], [3.0]), ([4.0], [5.0])]
    hybrid = variants.hybrid_rows(1, "cpu", "float32", **SMALL_VARIANTS["hybrid"])
    assert [[row[key] for key in ("delta", "attention", "model")] for row in hybrid["decoding"]] == [
        [[0.0], [1.0], [2.0]],
        [[3.0], [4.0], [5.0]],
    ]


def test_rollout_compares_the_same_tokens_from_one_prefill_and_without_a_cache(tmp_path, monkeypatch):
    calls = []
    real = rollout.rollout
    monkeypatch.setattr(rollout, "SIZES", {"small": dict(
        fields=SMALL | dict(n_kv_head=1, block_size=32, eot_id=0), rows=(8, 16), new=(3,))})  # fmt: skip
    monkeypatch.setattr(
        rollout, "rollout", lambda *args, **options: calls.append((args, options)) or real(*args, **options)
    )
    bench.main(["--out", str(tmp_path), "--device", "cpu", "rollout", "--rounds", "2"])
    result, table = result_of(tmp_path, "rollout")
    assert [(len(args[1]), args[3], options) for args, options in calls[-3:]] == [
        (2, 8, {}),
        (2, 8, {"use_cache": False}),
        (16, 1, {"use_cache": False}),
    ]
    assert [(row["n_rows"], row["new"], row["same"]) for row in result["rows"]] == [(8, 3, True), (16, 3, True)]
    for row in result["rows"]:
        assert len(row["over_no_cache"]) == len(row["over_repeated"]) == 2 and min(row["over_no_cache"]) > 0
        assert f"| {row['n_rows']} | 3 | {timing.median_and_range(row['over_no_cache'])} |" in table
    assert "the same tokens are sampled" in table
    result["rows"][1]["same"] = False
    assert "Not all tokens are the same with the cache and without: small, 16 rows, 3 tokens." in rollout.markdown(
        result
    )


def test_rollouts_ratios_say_how_many_times_as_fast_the_cache_is(monkeypatch):
    monkeypatch.setattr(rollout, "in_turn", lambda *_, **__: [[1.0, 2.0], [5.0, 8.0], [6.0, 14.0]])
    row = rollout.measured_row(build("baseline", eot_id=0), 8, 2, rounds=2, device="cpu")
    assert (row["over_no_cache"], row["over_repeated"]) == ([5.0, 4.0], [6.0, 7.0])


@pytest.mark.parametrize("name", MODELS)
def test_a_prefilled_cache_holds_as_many_tokens_as_asked_for_and_has_the_room(name):
    model = build(name)
    full = variants.prefilled_cache(model, 11)
    assert full.length == 11 and all((x != 0).any() for x in cache_tensors(full))
    cache = variants.prefilled_cache(model, 11, 2)
    for length in (12, 13):
        model(tokens(1, 1), cache=cache)
        assert cache.length == length
    with pytest.raises(ValueError, match="do not fit"):
        model(tokens(1, 1), cache=cache)


def test_each_layer_of_a_kind_runs_and_no_other(monkeypatch):
    model, seen = build("hybrid", n_layer=4, layer_pattern="ddda"), []
    for i, block in enumerate(model.blocks):
        for kind in ("delta", "attn"):
            if getattr(block, kind):
                getattr(block, kind).register_forward_hook(lambda *_, i=i, kind=kind: seen.append((kind, i)))
    cache = variants.prefilled_cache(model, 8)
    seen.clear()
    x = torch.randn(1, 1, model.config.n_embd)
    variants.each_layer(model, "delta", x, torch.tensor([7]), cache)
    assert seen == [("delta", 0), ("delta", 1), ("delta", 2)]


def test_flops_of_the_dense_model_that_experts_are_compared_with_are_those_of_the_chosen_experts():
    given = variants.SIZES["moe"]
    dense = timing.build("baseline", given["sizes"] | {"n_inner": given["per_token"] * given["width"]})
    assert flops.parameters("baseline", dense.config)["mlp"] == 3 * 384 * 1024 * 2


def test_a_config_without_a_vocabulary_gets_that_of_gpt2_and_its_name_is_in_the_files():
    words = ["config/train_mla.py", "--n_layer=3"]
    knobs, fields = workload.read_config(words)
    assert (knobs["model"], fields["vocab_size"], fields["n_layer"]) == ("mla", 50304, 3)
    assert workload.label_of(words) == "train_mla"
    assert workload.label_of(["--model=gpt2"]) == "gpt2"
    assert workload.label_of([]) == ""  # the files of a benchmark's own sizes


def test_a_wrong_config_or_option_is_one_clear_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, says in ((["train", "--n_hed=3"], "unknown config key 'n_hed'"),
                        (["decode", "--model=baseline", "--n_head=3", "--n_kv_head=2"], "n_head=3 is not divisible"),
                        (["variants", "--n_head=3"], "unknown arguments: --n_head=3"),
                        (["decode", "--new", "1"], "--new: 1: give a whole number in [2, 1e9]"),
                        (["variants", "--rounds", "0"], "--rounds: 0: give a whole number in [1, "),
                        (["--device", "cuda", "train"], "device=cuda is not here: try device=cpu")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            bench.main(words)
        assert stopped.value.code == 2 and says in capsys.readouterr().err
