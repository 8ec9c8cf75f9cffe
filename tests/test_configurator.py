"""Configuration: precedence, types, errors, help and the round trip of config files over plain globals."""

import functools
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import RANGES, config_class, config_source, configure, lies_in, model_knobs, read_knobs, resolve
from tests.tiny import ROOT

SCRIPT = '''"""Trains a toy.

More words.
"""
import math
from configurator import configure
_private = 1
model = "toyone"  # the variant
out_dir = "out"  # where it goes
batch_size = 12  # windows, try 32
learning_rate = 3e-4  # try 1e-3
compile: bool | str = "auto"  # True, False or auto
wandb = False  # log there
grad_clip: float | None = 1.0  # None: off
tag = None  # anything
betas = [0.9, 0.95]  # of AdamW
sizes = (1, 2)
extra = {}  # more
block_size = 64  # the script's own
config = configure(globals())
below = 5
tag = tag  # resolved
def result():
    return 0
'''
MODEL = """from dataclasses import dataclass, field
@dataclass
class GPTConfig:
    block_size: int = 1024  # the model's own
    n_layer: int = 2  # blocks
    n_embd: int = 16
    window: int | None = None  # tokens seen
    pattern: list = field(default_factory=lambda: ["a"])  # of layers
    {more}
    def __post_init__(self):
        self.window = self.window or self.block_size  # what is derived is no default
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> (config, globals of the script after it, what it printed), in tmp_path."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "model_toyone.py").write_text(MODEL.format(more=""))
    (tmp_path / "model_toytwo.py").write_text(MODEL.format(more="n_expert: int = 8  # experts"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("model_toyone", "model_toytwo"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        found = runpy.run_path("script.py")
        return found["config"], found, capsys.readouterr().out

    return run


@pytest.fixture
def error(run, capsys):
    """error(*arguments) -> the one line on stderr with which the script ends."""

    def error(*arguments):
        with pytest.raises(SystemExit) as e:
            run(*arguments)
        assert e.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    return error


def file(name, text):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)
    return name


def test_without_arguments_everything_has_its_default_and_nothing_is_printed(run):
    config, found, out = run()
    assert config == dict(
        model="toyone", out_dir="out", batch_size=12, learning_rate=3e-4, compile="auto", wandb=False,
        grad_clip=1.0, tag=None, betas=[0.9, 0.95], sizes=(1, 2), extra={}, block_size=64, n_layer=2, n_embd=16,
        window=None, pattern=["a"],
    )  # fmt: skip
    assert out == ""
    assert "n_layer" not in found  # a model's field is no global of the script


def test_command_line_beats_later_file_beats_earlier_file_beats_script_beats_model(run):
    one = file("one.py", "n_layer = 5\nbatch_size = 5\nlearning_rate = 5.0")
    two = file("two.py", "batch_size = 6\nlearning_rate = 6.0")
    assert run()[0]["block_size"] == 64  # the script's, not the model's 1024
    config, found, _ = run("--learning_rate=7", one, two)
    assert (config["n_layer"], config["batch_size"], config["learning_rate"]) == (5, 6, 7.0)
    assert (found["batch_size"], found["learning_rate"], found["block_size"]) == (6, 7.0, 64)  # set in the script too


def test_the_model_may_come_from_a_file_and_the_command_line_overrides_it(run):
    config, _, _ = run(file("a.py", "n_embd = 32\nmodel = 'toytwo'\nbatch_size = n_expert + 1"))
    assert (config["model"], config["n_expert"], config["n_embd"], config["batch_size"]) == ("toytwo", 8, 32, 9)
    config, _, _ = run(file("c.py", "model = 'toyone'"), "--model=toytwo", "--n_expert=2")
    assert (config["model"], config["n_expert"]) == ("toytwo", 2)


def test_a_name_that_a_config_file_deletes_again_is_its_own_affair(run):
    config, _, _ = run(file("a.py", "for i in range(3):\n    batch_size += i\ndel i"))
    assert config["batch_size"] == 15


def test_a_value_equal_to_the_default_is_still_kept_when_a_later_line_chooses_a_model(run):
    config, _, _ = run(file("a.py", "n_layer = 2\nmodel = 'toytwo'\nbatch_size = n_layer"))
    assert config["n_layer"] == 2 and config["batch_size"] == 2


def test_a_config_file_is_python_that_sees_the_knobs(run):
    text = """import math
from os.path import join
import json as data
def double(x):
    return times(x, 2)
def times(x, y):
    return x * y
class Helper:
    width = 8
_base = [n_layer * i for i in range(3)]
if batch_size == 12:
    widths_of = lambda: [_base[i] for i in range(3)]
    batch_size = double(batch_size) + widths_of()[2]
n_embd: int = int(math.sqrt(256)) * Helper.width
out_dir = join('runs', __file__)
"""
    config, _, _ = run(file("a.py", text))
    assert (config["batch_size"], config["n_embd"], config["out_dir"]) == (28, 128, "runs/a.py")
    config, _, _ = run("a.py", file("b.py", "batch_size = batch_size + n_embd"))
    assert config["batch_size"] == 28 + 128


@pytest.mark.parametrize(
    "argument, value",
    [
        ("tag=-3", -3),
        ("learning_rate=3e-4", 3e-4),
        ("learning_rate=1", 1.0),
        ("grad_clip=None", None),
        ("grad_clip=2", 2.0),
        ("window=128", 128),
        ("window=None", None),
        ("out_dir=a=b c", "a=b c"),
        ("out_dir=123", "123"),
        ("out_dir=", ""),
        ("out_dir='q'", "'q'"),
        ("wandb=True", True),
        ("wandb=true", True),
        ("wandb=1", True),
        ("wandb=0", False),
        ("wandb=false", False),
        ("wandb", True),
        ("compile", True),
        ("compile=False", False),
        ("compile=auto", "auto"),
        ("betas=[0.5, 1]", [0.5, 1]),
        ("sizes=(3,)", (3,)),
        ("extra={'a': [1]}", {"a": [1]}),
        ("pattern=['b', 'c']", ["b", "c"]),
        ("tag=text", "text"),
        ("tag=3", 3),
    ],
)
def test_a_value_on_the_command_line_takes_the_type_of_its_knob(run, argument, value):
    config, _, _ = run("--" + argument)
    got = config[argument.partition("=")[0]]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("batch_size=abc", "batch_size=abc: expected int"),
        ("batch_size=1.5", "batch_size=1.5: expected int"),
        ("batch_size", "batch_size=True: expected int"),
        ("batch_size=None", "batch_size=None: expected int"),
        ("learning_rate=fast", "learning_rate=fast: expected float"),
        ("learning_rate=True", "learning_rate=True: expected float"),
        ("wandb=yes", "wandb=yes: expected bool"),
        ("wandb=2", "wandb=2: expected bool"),
        ("grad_clip=x", "grad_clip=x: expected None or float"),
        ("window=1.5", "window=1.5: expected None or int"),
        ("betas=(1, 2)", "betas=(1, 2): expected list"),
        ("betas=[1", "betas=[1: expected list"),
        ("extra=[1]", "extra=[1]: expected dict"),
    ],
)
def test_a_mistyped_value_on_the_command_line_is_refused(error, argument, message):
    assert error("--" + argument) == "error: " + message


@pytest.mark.parametrize(
    "line, message",
    [
        ("batch_size = '8'", "batch_size='8' in config/x.py: expected int"),
        ("batch_size = True", "batch_size=True in config/x.py: expected int"),
        ("batch_size = 8.0", "batch_size=8.0 in config/x.py: expected int"),
        ("out_dir = 3", "out_dir=3 in config/x.py: expected str"),
        ("wandb = 1", "wandb=1 in config/x.py: expected bool"),
        ("betas = None", "betas=None in config/x.py: expected list"),
        ("learnign_rate = 1", "unknown config key 'learnign_rate' in config/x.py; did you mean 'learning_rate'?"),
        ("n_layers = 1", "unknown config key 'n_layers' in config/x.py; did you mean 'n_layer'?"),
        ("n_expert = 1", "unknown config key 'n_expert' in config/x.py; --help lists them"),
        ("below = 1", "unknown config key 'below' in config/x.py; --help lists them"),
        ("_a = 1\nfor i in range(3): pass", "unknown config key 'i' in config/x.py; --help lists them"),
        ("batch_size = 1\nn_layer = = 2", "config/x.py line 2: invalid syntax"),
        ("\nbatch_size = n_layr * 2", "config/x.py line 2: NameError: name 'n_layr' is not defined"),
        ("import no_such_module", "config/x.py line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("model = 'toythree'", "unknown model 'toythree'; the model_*.py files here give: "),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_that_names_it(error, line, message):
    assert error(file("config/x.py", line)).startswith("error: " + message)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate = lambda step: 1e-3", "learning_rate in config/x.py is a function, which no knob takes"),
        ("def learning_rate(step): return 1e-3", "learning_rate in config/x.py is a function, which no knob takes"),
        ("class model: pass", "model in config/x.py is a class, which no knob takes: give its value"),
        ("wandb = int", "wandb in config/x.py is a class, which no knob takes: give its value"),
        ("import math as out_dir", "out_dir in config/x.py is a module, which no knob takes: give its value"),
        ("def f():\n    global batch_size\n    batch_size = 5\nf()", "batch_size=5 in config/x.py is not assigned at"),
        ("[batch_size := i for i in (5, 6)]", "batch_size=6 in config/x.py is not assigned at the file's top level"),
        ("globals().update(n_layer=7)", "n_layer=7 in config/x.py is not assigned at the file's top level: do that"),
        ("del n_layer", "n_layer is deleted in config/x.py: give it a value"),
        ("globals().update(n_layers=7)", "n_layers=7 in config/x.py is not assigned at the file's top level: do that"),
        ("[n_layers := i for i in (5, 6)]", "n_layers=6 in config/x.py is not assigned at the file's top level"),
        ("def f(): pass\nglobals().update(n_layer=f)", "n_layer=<function f at"),
        ("where_present = {3: 4}", "where_present in config/x.py is no dict of knobs: write dict(n_inner=512)"),
        ("def where_present(): pass", "where_present in config/x.py is no dict of knobs: write dict(n_inner=512)"),
        ("where_present = {}\nwhere_present['n_layer'] = 3", "config/x.py line 2: TypeError: 'mappingproxy' object"),
        ("model = 'toytwo'\nmodel = 'toyone'\nn_layer = n_expert", "config/x.py line 3: NameError: name 'n_expert'"),
        ("learning_rate = float('nan')", "learning_rate=nan in config/x.py: give a finite number"),
        ("batch_size = 10**4400", "batch_size=a number of thousands of digits in config/x.py: it lies in"),
    ],
)
def test_what_a_config_file_says_of_a_knob_is_never_lost(error, text, message):
    assert error(file("config/x.py", text)).startswith("error: " + message)


def test_unknown_keys_and_arguments_on_the_command_line_are_refused(error):
    assert error("--batchsize=3") == (
        "error: unknown config key 'batchsize' on the command line; did you mean 'batch_size'?"
    )
    assert "unknown config key '_private'" in error("--_private=3")
    assert error("batch_size=3").startswith("error: cannot read 'batch_size=3': give")
    assert error("--batch_size", "3").startswith("error: cannot read '3': give")
    assert (
        error("config/none.py")
        == "error: config/none.py: FileNotFoundError: [Errno 2] No such file or directory: 'config/none.py'"
    )  # noqa: E501 fmt: skip


def test_an_unknown_model_lists_the_model_files(error):
    line = error("--model=../toyone")
    assert "unknown model '../toyone'" in line and "toyone, toytwo" in line


def test_only_what_differs_is_printed_and_only_by_rank_0(run, monkeypatch):
    arguments = ["--batch_size=12", "--learning_rate=1e-3", "--n_layer=4"]
    expected = "learning_rate = 0.001  (default 0.0003)\nn_layer = 4  (default 2)\n"
    assert sorted(run(*arguments)[2].splitlines()) == sorted(expected.splitlines())
    monkeypatch.setenv("RANK", "0")
    assert run(*arguments)[2] != ""
    monkeypatch.setenv("RANK", "1")
    assert run(*arguments)[2] == ""


def test_help_lists_every_knob_of_the_script_and_of_the_chosen_model(tmp_path, run):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "script.py", "--help", "--model=toytwo"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "Trains a toy."
    assert "A config file is Python and is run: run only files you trust." in lines
    knobs = {line.split("=")[0].strip(): " ".join(line.split()) for line in lines if line.startswith("  --")}
    assert list(knobs) == ["--" + key for key in run("--model=toytwo")[0]]
    assert knobs["--batch_size"] == "--batch_size=12 windows, try 32"
    assert knobs["--n_expert"] == "--n_expert=8 experts"
    assert knobs["--tag"] == "--tag=None anything"
    assert knobs["--block_size"] == "--block_size=64 the script's own"
    assert knobs["--pattern"] == "--pattern=['a'] of layers"
    assert "More words" not in done.stdout and "below" not in done.stdout


def test_a_wrong_key_ends_the_process_with_code_2_and_no_traceback(tmp_path, run):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "script.py", "--nlayer=3"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown config key 'nlayer' on the command line; did you mean 'n_layer'?\n"


def test_a_script_without_a_model_has_its_own_knobs_only(tmp_path, monkeypatch):
    path = tmp_path / "plain.py"
    knobs = "a = 1\na = 2  # twice\nb, c = 'x', 3.0\n"
    path.write_text(f"from configurator import configure\n{knobs}d = configure(globals(), ['--c=4'])\n")
    assert runpy.run_path(str(path))["d"] == {"a": 2, "b": "x", "c": 4.0}


def test_the_resolved_config_as_a_config_file_gives_exactly_the_same_config(run):
    quoted = "out_dir = 'it\\'s \"q\" \\\\ \\n é'"
    text = f"model = 'toytwo'\nn_expert = 3\nlearning_rate = 0.1 + 0.2\n{quoted}\ntag = None\n"
    config, _, _ = run(file("a.py", text), "--window=7", "--extra={'k': (1, None, 'x')}", "--sizes=(5,)", "--wandb")
    source = config_source(config)
    again, _, _ = run(file("b.py", source))
    assert again == config and config_source(again) == source
    assert config["learning_rate"] == 0.1 + 0.2 and "\n é" in config["out_dir"]
    assert config_source({"a": math.inf, "b": math.nan}) == "a = float('inf')\nb = float('nan')\n"


def test_configure_takes_its_arguments_as_a_list(tmp_path):
    path = tmp_path / "s.py"
    path.write_text("seed = 1\n")
    script = {"__file__": str(path), "seed": 1}
    assert configure(script, ["--seed=4"]) == {"seed": 4} and script["seed"] == 4


def test_resolve_gives_what_configure_would_without_running_or_printing_anything(run, tmp_path, capsys, monkeypatch):
    one = file("one.py", "model = 'toytwo'\nn_expert = n_layer + 3\nlearning_rate = 5.0")
    arguments = [one, "--batch_size=6", "--compile", "--sizes=(3,)"]
    want, _, _ = run(*arguments)
    monkeypatch.setattr(sys, "argv", ["another.py", "--unknown=1"])
    text = "raise SystemExit('was run')\n"
    (tmp_path / "dead.py").write_text(SCRIPT.replace("import math\n", "import math\n" + text))
    for script in ("script.py", tmp_path / "dead.py"):
        assert resolve(script, arguments) == want
    assert capsys.readouterr().out == ""
    assert resolve("script.py", []) == run()[0]
    assert want["n_expert"] == 5 and want["compile"] is True and want["sizes"] == (3,)


def test_resolve_knows_the_literals_above_the_call_of_configure_and_no_others(tmp_path):
    knobs = "a = 1\na = -2\nb, c = 'x', 3.0\nd: int | None = None\ne = a * 2\n_f = 1\nif a:\n    g = 1\n"
    (tmp_path / "s.py").write_text(f"{knobs}config = configure(globals())\na = 9\nh = 3\n")
    assert resolve(tmp_path / "s.py", ["--c=4"]) == {"a": -2, "b": "x", "c": 4.0, "d": None}


def test_resolve_has_all_knobs_of_train_py():
    root = Path(__file__).parent.parent
    source = (root / "train.py").read_text().split("with output.errors_in_one_line():\n    config = configure(")[0]
    found = {"__file__": str(root / "train.py"), "__name__": "knobs"}
    exec(compile(source, "train.py", "exec"), found)
    arguments = [str(root / "config" / "train_moe.py"), "--n_expert=64", "--tf32=False"]
    config = resolve(root / "train.py", arguments)
    assert config == configure(found, arguments, quiet=True)
    assert config["n_expert"] == 64 and config["tf32"] is False and config["max_steps"] == 2500


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batchsize=3", "unknown config key 'batchsize' on the command line; did you mean 'batch_size'?"),
        ("--batch_size=abc", "batch_size=abc: expected int"),
        ("--model=toythree", "unknown model 'toythree'; the model_*.py files here give: "),
        ("none.py", "none.py: FileNotFoundError"),
    ],
)
def test_resolve_has_the_errors_of_configure(run, capsys, argument, message):
    with pytest.raises(SystemExit) as error:
        resolve("script.py", [argument])
    assert error.value.code == 2 and capsys.readouterr().err.startswith("error: " + message)


def test_a_models_config_class_comes_without_torch_and_without_what_stands_below_it(tmp_path, monkeypatch):
    heads = (
        "from __future__ import annotations\nimport torch\nimport torch.nn as nn\nfrom torch import Tensor\nWIDTH = 7\n"
    )
    text = MODEL.format(more="more: int = WIDTH  # of the file\n    root: float = math.sqrt(4)")
    (tmp_path / "model_toy.py").write_text(heads + "import math\n" + text + "class GPT(nn.Module):\n    pass\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "model_toy.py").write_text("class GPTConfig: pass\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path, str(tmp_path / "later")])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    config, path = config_class("toy")
    assert path == tmp_path / "model_toy.py" and config().more == 7 and config(window=3).window == 3
    assert config(block_size=5).window == 5 and config().root == 2.0
    assert "torch" not in sys.modules


def test_where_present_sets_what_the_model_has_and_names_what_it_skips(tmp_path, capsys):
    (tmp_path / "a.py").write_text("where_present = dict(n_inner=77, kv_rank=12)\nmodel = 'mla'\n")
    (tmp_path / "b.py").write_text("n_inner = 78\n")
    knobs = resolve(ROOT / "train.py", [str(tmp_path / "a.py")])
    assert knobs["n_inner"] == 77 and knobs["kv_rank"] == 12
    knobs = resolve(ROOT / "train.py", [str(tmp_path / "a.py"), str(tmp_path / "b.py"), "--model=baseline"])
    assert knobs["n_inner"] == 78 and "kv_rank" not in knobs  # the later wins, and says so for this model, too
    script = {"__file__": str(ROOT / "train.py"), "model": "baseline"}
    assert configure(script, [str(tmp_path / "a.py"), "--model=gpt2"])["model"] == "gpt2"
    assert "skipped, since model=gpt2 has no such knob: n_inner, kv_rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["where_present = dict(n_inne=3)", "kv_rank = 3", "where_present = dict(kv_rank=3)\nkv_rank = 4"]
)
def test_elsewhere_and_where_no_model_has_it_an_unknown_knob_is_an_error(text, tmp_path, capsys):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(SystemExit):
        resolve(ROOT / "train.py", [str(tmp_path / "a.py")])
    assert "unknown config key" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    ("--schedule=linear", "schedule=linear: try one of cosine, wsd, constant"),
    ("--compile=maybe", "compile=maybe: try one of auto, True, False"),
    ("--wandb=on", "wandb=on: try one of '', online, offline"),
    ("--learning_rate=nan", "learning_rate=nan: expected float"),
    ("--learning_rate=1e999", "learning_rate=1e999: give a finite number"),
    ("--max_steps=0", "max_steps=0: try 1 or more"),
    ("--n_layer=-1", "n_layer=-1: try 1 or more"),
    ("--grad_clip=-1", "grad_clip=-1: try 0 or more"),
    ("--learning_rate=0", "learning_rate=0: it lies in (0, 10]"),
    ("--learning_rate=1e-400", "learning_rate=1e-400: it lies in (0, 10]"),
    ("--beta2=1", "beta2=1: it lies in [0, 1)"),
    ("--dropout=1.0", "dropout=1.0: it lies in [0, 1)"),
    ("--decay_fraction=1.5", "decay_fraction=1.5: it lies in [0, 1]"),
    ("--rope_theta=1", "rope_theta=1: it lies in (1, inf)"),
    ("--weight_decay=1e-300", "weight_decay=1e-300: give 0, or a number of a size from 1.2e-38 to 3.4e+38"),
    ("--eval_tokens=18446744073709551616", "eval_tokens=18446744073709551616: it lies in [0, 2147483647]"),
    ("--eot_id=-2", "eot_id=-2: try -1 or more"),
    ("--stages={[]: 1}", "stages={[]: 1}: expected dict"),
    ("--out_dir", "out_dir=True: expected str"),
    ("--init_from", "init_from=True: expected str"),
    ("--out_dir=~nobody_of_this_name/run", "there is no such home folder"),
    ("--seed=4294967296", "seed=4294967296: it lies in [0, 4294967295]"),
    ("--learning_rate=1" + 400 * "0", f"learning_rate=1{59 * '0'}...: give a finite number"),
    ("--max_steps=1" + 5000 * "0", f"max_steps=1{59 * '0'}...: expected int"),
])  # fmt: skip
def test_a_value_that_cannot_be_meant_is_refused_with_what_can(capsys, words, message):
    with pytest.raises(SystemExit):
        resolve(Path(__file__).parent.parent / "train.py", [words])
    assert message in capsys.readouterr().err


def test_a_path_that_begins_with_the_home_folder_leads_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve(Path(__file__).parent.parent / "train.py", ["--out_dir=~/runs/a"])["out_dir"] == "/home/me/runs/a"
    asked = []
    script = {"__file__": str(ROOT / "train.py"), "model": "baseline", "init_from": ""}
    configure(script, ["--init_from=~/runs/a"], quiet=True, starting_from=lambda path: asked.append(path) or {})
    assert set(asked) == {"/home/me/runs/a"}


# ---- the range of a number ------------------------------------------------------------------------------------------
COMMANDS = ("train.py", "grpo.py", "dpo.py", "reward.py")


@functools.cache
def known_knobs():
    """Returns (where, name, Knob) of each command, and of each model file of this repository."""
    found = []
    for command in COMMANDS:
        knobs = read_knobs(ROOT / command, resolve(ROOT / command, []))
        found += [(command, name, knob) for name, knob in knobs.items()]
    for path in sorted(ROOT.glob("model_*.py")):
        knobs = model_knobs(path.stem.removeprefix("model_"))
        found += [(path.name, name, knob) for name, knob in knobs.items()]
    return found


def test_no_number_of_any_command_or_model_is_without_a_least_and_no_integer_without_a_most():
    for where, name, knob in known_knobs():
        if knob.kinds & {"int", "float"}:
            low, high = knob.interval[1:-1].split(", ")
            assert float(low) >= -1, f"{where}: {name} lies in {knob.interval}"
            assert "int" not in knob.kinds or float(high) < 2**32, f"{where}: {name} lies in {knob.interval}"
            assert lies_in(knob.default, knob.interval), f"{where}: {name}={knob.default} is outside {knob.interval}"


def test_each_name_of_the_table_stands_there_once_and_is_a_knob():
    names = [name for names in RANGES.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert set(names) <= {name for _, name, _ in known_knobs()}


OWN = """from dataclasses import dataclass
from typing import Annotated
@dataclass
class GPTConfig:
    window: int = 4  # a name of the table
    slope: float = 0.5  # of no table
    shift: int = -2
    tilt: Annotated[float, "[-1, 1]"] = 0.0
"""


@pytest.mark.parametrize("words, message", [
    ("--window=0", "window=0: try 1 or more"),
    ("--slope=-0.5", "slope=-0.5: try 0 or more"),
    ("--shift=-3", "shift=-3: try -2 or more"),
    ("--tilt=2", "tilt=2: it lies in [-1, 1]"),
    ("--tilt=x", "tilt=x: expected float"),
    ("--window=3 --slope=0 --shift=-2 --tilt=-1", ""),
])  # fmt: skip
def test_a_field_of_ones_own_model_has_the_range_of_its_name_of_its_annotation_or_of_its_default(
    run, error, words, message
):
    file("model_own.py", OWN)
    if message:
        assert error("--model=own", *words.split()) == "error: " + message
    else:
        config, _, _ = run("--model=own", *words.split())
        assert (config["window"], config["slope"], config["shift"], config["tilt"]) == (3, 0.0, -2, -1.0)


@pytest.mark.parametrize("text, message", [
    ("from dataclasses import (\n", "model_own.py line 1: '(' was never closed"),
    ("x = 1\ny = z\n", "model_own.py line 2: NameError: name 'z' is not defined"),
    ("class GPTConfig: pass\n", "model_own.py has no dataclass GPTConfig, whose fields are a model's knobs"),
    (OWN.replace("int = 4", "int"), "model_own.py: GPTConfig.window has no default"),
    (OWN.replace("[-1, 1]", "[-1 1]"), "'[-1 1]' is no interval: write one such as '[0, 1)'"),
])  # fmt: skip
def test_a_mistake_in_ones_own_model_file_is_one_line_with_its_place(error, text, message):
    file("model_own.py", text)
    assert message in error("--model=own")


def test_what_needs_torch_above_the_config_of_ones_own_file_is_passed_over(run):
    above = "import torch.nn as nn\nfrom dataclasses import dataclass\nclass Temp(nn.Module):\n    pass\n@dataclass\n"
    file("model_own.py", above + "class GPTConfig:\n    n_own: int = 3\n")
    config, _, _ = run("--model=own")
    assert config["n_own"] == 3


def test_an_import_from_the_future_holds_for_the_config_of_ones_own_file(run):
    above = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
    file("model_own.py", above + "class GPTConfig:\n    n_own: NotDefinedHere = 3\n")
    config, _, _ = run("--model=own")
    assert config["n_own"] == 3


def test_a_name_in_capitals_is_a_constant_and_no_knob():
    for command in COMMANDS:
        assert not [name for name in resolve(ROOT / command, []) if name.isupper()]


def starting_from(fields):
    """Returns the config of a run from weights that say this of themselves."""
    script = {"__file__": str(ROOT / "train.py"), "model": "baseline", "init_from": ""}
    found = {"model": "baseline", **fields}
    return configure(script, ["--init_from=w"], quiet=True, starting_from=lambda path: found)


def test_what_the_weights_to_start_from_say_is_checked_like_what_a_user_says(capsys):
    assert starting_from({"n_layer": 5, "a_field_of_another_version": 3})["n_layer"] == 5
    for fields, message in (
        ({"n_layer": 0}, "n_layer=0 of init_from=w: try 1 or more"),
        ({"rope_theta": "x"}, "rope_theta='x' of init_from=w: expected float"),
    ):
        with pytest.raises(SystemExit):
            starting_from(fields)
        assert message in capsys.readouterr().err
