"""The parts of README.md that are made from the code and from results/: `python -m tests.readme` writes them."""

import re

from tests import differences
from tests.tiny import ROOT

PARTS = {
    "models": differences.table,
    "shakespeare": lambda: (ROOT / "results" / "shakespeare_char_cpu.md").read_text().strip(),
}


def fresh() -> str:
    text = (ROOT / "README.md").read_text()
    for name, make in PARTS.items():
        pattern = rf"(<!-- begin {name}: python -m tests.readme -->\n).*?(<!-- end {name} -->)"
        assert len(re.findall(pattern, text, flags=re.S)) == 1, name
        text = re.sub(pattern, lambda m, make=make: m[1] + make() + "\n" + m[2], text, flags=re.S)
    return text


if __name__ == "__main__":
    new = fresh()
    (ROOT / "README.md").write_text(new)
