"""Every file in config/ builds the model that its first line says, without memory for it: on the meta device."""

import dataclasses
import importlib
import json
import re
from functools import partial

import pytest
import torch

from configurator import check_values, resolve
from tests.differences import tracked
from tests.tiny import MODELS, ROOT
from tests.tree import run
from training.stages import read_mixture, shapes_of

CONFIGS = sorted(path.name for path in (ROOT / "config").glob("*.py"))


def resolved(name):
    """The config that the command of config/<name> would have with it."""
    first_word = re.match("[a-z0-9]+", name)[0]
    command = first_word if first_word in ("grpo", "dpo", "reward") else "train"
    return resolve(ROOT / f"{command}.py", [str(ROOT / "config" / name)])


def config_fields(model):
    return [field.name for field in dataclasses.fields(importlib.import_module(f"model_{model}").GPTConfig)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_and_its_first_lines_say_what_it_trains(name):
    config = resolved(name)
    variant = importlib.import_module(f"model_{config['model']}")
    fields = {field.name: config[field.name] for field in dataclasses.fields(variant.GPTConfig)}
    fields["vocab_size"] = fields["vocab_size"] or 4096  # 0: the data's
    with torch.device("meta"):
        model = variant.GPT(variant.GPTConfig(**fields))
    first = (ROOT / "config" / name).read_text().split("\n\n")[0]
    assert first.startswith("# ")
    for stated in re.findall(r"([\d,]{9,}) parameters", first):
        assert sum(p.numel() for p in model.parameters()) == int(stated.replace(",", ""))
    if "batch_tokens" in config:
        assert config["batch_tokens"] % config["block_size"] == 0


@pytest.mark.parametrize("name", ["pretrain_3stage.py", "quick_stages.py"])
def test_the_stages_of_a_config_are_of_one_model_and_share_out_evenly(name):
    config = resolved(name)
    variant = importlib.import_module(f"model_{config['model']}")
    sizes = []
    shapes = []
    for given in [{}, *config["stages"].values()]:
        config = config | check_values(ROOT / "train.py", config, given, "in a stage")
        fields = {field.name: config[field.name] for field in dataclasses.fields(variant.GPTConfig)}
        fields["vocab_size"] = fields["vocab_size"] or 4096
        shapes.append(shapes_of(variant.GPT, variant.GPTConfig(**fields)))
        sizes.append(config["block_size"])
        assert config["batch_tokens"] % config["block_size"] == 0 and read_mixture(config["data"])
    assert all(shape == shapes[0] for shape in shapes) and all(max(sizes) % size == 0 for size in sizes)


@pytest.mark.parametrize(
    "name, known",
    [
        ("qwen3_0.6b.py", 596_049_920),
        ("qwen3_1.7b.py", 1_720_574_976),
        ("qwen3_8b.py", 8_190_735_360),
        ("gpt2.py", 124_439_808),
        ("gpt2_medium.py", 354_823_168),
        ("gpt2_large.py", 774_030_080),
        ("gpt2_xl.py", 1_557_611_200),
    ],
)
def test_the_released_sizes_have_exactly_the_known_parameter_counts(name, known):
    config = resolved(name)
    variant = importlib.import_module(f"model_{config['model']}")
    with torch.device("meta"):
        model = variant.GPT(
            variant.GPTConfig(**{f.name: config[f.name] for f in dataclasses.fields(variant.GPTConfig)})
        )
    assert sum(p.numel() for p in model.parameters()) == known


@pytest.mark.parametrize("name", [name for name in MODELS if f"model_{name}.py" in tracked()])
def test_the_comparison_s_config_has_sizes_for_every_model_file(name):
    """Their parameters are as many as its first lines say, and what sees a part of a text sees a quarter at most."""
    config = resolve(ROOT / "train.py", [str(ROOT / "config/compare_cpu.py"), f"--model={name}"])
    variant = importlib.import_module(f"model_{name}")
    fields = {key: config[key] for key in config_fields(name)}
    with torch.device("meta"):
        model = variant.GPT(variant.GPTConfig(**fields | {"vocab_size": 4096}))
    assert 2.4e6 <= sum(p.numel() for p in model.parameters()) <= 6.1e6
    lengths = {key: value for key, value in fields.items() if key in ("window", "key_block", "index_topk")}
    assert all(length <= config["block_size"] // 4 for length in lengths.values())
    assert "a" in fields.get("layer_pattern", "a")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A run of Qwen3-0.6B's shape without its weights, and chats beside it."""
    folder = tmp_path_factory.mktemp("chats")
    config = resolved("qwen3_0.6b.py")
    fields = {key: config[key] for key in config_fields("baseline")}
    (folder / "qwen3").mkdir()
    (folder / "qwen3" / "config.json").write_text(
        json.dumps({"model": "baseline", "model_config": fields, "knobs": {}})
    )
    rows = [{"question": f"{i}+1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(f"python {ROOT}/data/prepare.py chats.jsonl --chat --tokenizer byte --add_tokens chat --out chats", folder)
    return folder


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["sft.py", slow("sft_thinking.py"), slow("sft_fusion.py")])
def test_what_fine_tuning_costs_is_counted_before_it_runs(qwen3, name):
    said = run(f"python {ROOT}/train.py {ROOT}/config/{name} --init_from=qwen3 --data=chats --dry_run", qwen3)
    assert "596,049,920 parameters" in said and not (qwen3 / "out").exists()
