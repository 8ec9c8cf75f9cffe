"""The examples of docs/: what they tell a reader to write is what runs."""

import re
import subprocess
import sys

import pytest

from tests.differences import changed, claim
from tests.tiny import ROOT

GUIDE = (ROOT / "docs" / "your_own_variant.md").read_text()


@pytest.mark.parametrize("name", ["temperature", "relu2"])
def test_a_variant_of_the_guide_is_its_diff_of_the_baseline_and_learns(name, tmp_path):
    source = (ROOT / "model_baseline.py").read_text()
    (diff,) = re.findall(rf"```diff\n--- model_{name}.py\n(.*?)```", GUIDE, flags=re.S)
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        assert source.count(old) == 1
        source = source.replace(old, new)
    path = tmp_path / f"model_{name}.py"
    path.write_text(source)
    parent, names = claim(path)
    assert names == changed(path, ROOT / parent)
    run = subprocess.run([sys.executable, path.name], cwd=tmp_path, capture_output=True, text=True)
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", run.stdout).groups())
    assert after < before / 2
