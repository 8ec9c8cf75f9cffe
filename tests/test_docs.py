"""The examples of docs/: what they tell a reader to write is what runs, in a copy where nothing else is edited."""

import re

import pytest

from tests.differences import changed, claim
from tests.test_readme import FEW, STDLIB, TINY
from tests.tiny import ROOT
from tests.tree import copy_of_the_project, run

GUIDE = (ROOT / "docs" / "your_own_variant.md").read_text()
VARIANTS = ("temperature", "relu2")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.S) for line in block.splitlines()]
COMMANDS = [line for line in COMMANDS if not line.startswith("cp ")]  # the fixture does that


def with_the_diff(name):
    """Returns the text of the guide's variant: the baseline with each hunk of the guide's diff applied."""
    source = (ROOT / "model_baseline.py").read_text()
    (diff,) = re.findall(rf"```diff\n--- model_{name}.py\n(.*?)```", GUIDE, flags=re.S)
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project with the guide's variants, some data, and nothing else edited."""
    folder = tmp_path_factory.mktemp("tree")
    copy_of_the_project(folder)
    author = "-c user.name=reader -c user.email=reader@localhost"
    run(f"git init -q && git add -A && git {author} commit -qm 'as it was cloned'", folder)
    for name in VARIANTS:
        (folder / f"model_{name}.py").write_text(with_the_diff(name))
    run(STDLIB, folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_guide_names_what_it_changes_and_learns(name, tree):
    parent, names = claim(tree / f"model_{name}.py")
    assert names == changed(tree / f"model_{name}.py", tree / parent)
    before, after = re.search(r"loss ([\d.]+) -> ([\d.]+)", run(f"python model_{name}.py", tree)).groups()
    assert float(after) < float(before) / 2


def small(command):
    """Returns a command of the guide with sizes for a test."""
    if "compare.py" in command:
        sizes = "--n_layer=1 --n_embd=32 --block_size=32 --batch_tokens=128 --micro_batch=2 --eval_tokens=256"
        return f"{command.replace('5e12', '3e9')} {FEW} {sizes} --results=out/verdict"
    if "train.py" in command:
        return f"{command} {TINY}"
    if "sample.py" in command:
        return f"{command} --max_new_tokens 8"
    return command


def test_a_variant_goes_through_every_command_of_the_guide(tree):
    """Costs, the width that matches, a comparison, training on one device and on two, text, evaluation, export."""
    commands = [command for command in COMMANDS if "pytest" not in command and " model_" not in command]
    assert {"flops.py", "compare.py", "train.py", "sample.py", "eval.py"} <= set(re.findall(r"\w+\.py", str(commands)))
    said = {command: run(small(command), tree) for command in commands}
    (matched,) = (text for command, text in said.items() if "--match" in command)
    assert re.search(r"n_inner=768: ", matched)  # 2 matrices of 768 are 3 of 512
    table = (tree / "out/verdict.md").read_text()
    assert re.search(r"\| relu2 \|.*\(one seed\)", table) and re.search(r"\| temperature \|.*\(one seed\)", table)
    refused = "python sample.py out/relu2 --save_pretrained out/hf 2>&1; test $? -eq 2"
    assert "MLP" in run(refused, tree) and not (tree / "out/hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_test_over_model_files_holds_a_variant_of_the_guide(name, tree):
    # A test of the README has --temperature in its name.
    passed = run(f"python -m pytest tests -k '{name} and not command' -m 'not slow'", tree)
    assert int(re.search(r"(\d+) passed", passed)[1]) > 60
