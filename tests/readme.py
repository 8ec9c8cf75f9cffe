"""The parts of README.md that are made from the code and from results/: `python -m tests.readme` writes them."""

import re

from tests import differences
from tests.tiny import ROOT


def result(name: str) -> str:
    """A table of results/ without its title, its sections a level deeper."""
    return (ROOT / "results" / f"{name}.md").read_text().partition("\n")[2].strip().replace("\n## ", "\n### ")


PARTS = {
    "models": differences.table,
    "variants": lambda: result("compare_variants_cpu"),
    "optimizers": lambda: result("compare_optimizers_cpu"),
    "recall": lambda: result("compare_recall_cpu"),
    "shakespeare": lambda: result("shakespeare_char_cpu"),
    "speed": lambda: result("variants_cpu"),
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
