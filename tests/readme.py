"""The parts of README.md and docs/ that are made from code and results/: `python -m tests.readme` writes them."""

import json
import re
import statistics

from benchmarks.timing import ratios
from benchmarks.verdicts import verdicts
from tests import differences
from tests.tiny import ROOT

LEAST = 0.05  # a smaller difference of speed or size is not worth a word


# ---- what a lesson buys, and what it costs ---------------------------------------------------------------------------
def comparison() -> dict:
    return json.loads((ROOT / "results" / "compare_variants_cpu.json").read_text())


def times_as_fast(seconds: list | None, first: list | None) -> float | None:
    """Returns how many times as fast as the first variant: the median over the rounds in which they took turns."""
    if not seconds or not first:
        return None
    return statistics.median(ratios(first, seconds))


def measures(row: dict, first: dict) -> list[tuple[str, float | None, bool]]:
    """Returns (what, this variant's / the first one's, whether more of it is good)."""
    found = [
        ("parameters", row["parameters"] / first["parameters"], False),
        ("cache per token", row["cache_bytes_per_token"] / first["cache_bytes_per_token"], False),
        ("training speed", times_as_fast(row.get("train_seconds"), first.get("train_seconds")), True),
    ]
    decoding = row.get("decode_seconds") or {}
    for context in list(decoding)[-1:]:
        speed = times_as_fast(decoding[context], first["decode_seconds"][context])
        found.append(("decoding speed", speed, True))
    return found


def buys_and_costs(row: dict, first: dict, loss: str) -> tuple[str, str]:
    """Returns the two cells of a variant: each measure that differs from the first one's stands on its side.

    loss: what is said of its loss.
    """
    buys = []
    costs = []
    if "worse" in loss or "diverged" in loss:
        costs.append(f"loss {loss.removesuffix(': worse')}")
    else:
        buys.append(f"loss {loss.removesuffix(': better')}")
    for what, factor, more_is_good in measures(row, first):
        if factor is None or abs(factor - 1) < LEAST:
            continue
        side = buys if (factor > 1) == more_is_good else costs
        side.append(f"{what} x {factor:.2f}")
    extra = row["state_bytes"] - first["state_bytes"]
    if extra > 0:
        costs.append(f"{extra:,} bytes of state")
    return ", ".join(buys) or "-", ", ".join(costs) or "-"


def cells_of(name: str, rows: list[dict]) -> tuple[str, str]:
    first = rows[0]
    if name == first["name"]:
        return "what the others are measured against", "-"
    for row, loss in zip(rows, verdicts(rows)):
        if row["name"] == name:
            return buys_and_costs(row, first, loss)
    return "not compared yet", "not compared yet"


def idea(path) -> str:
    """Returns the first line of a model's docstring, with its paper as a link."""
    line = differences.docstring(path).splitlines()[0].rstrip(".")
    paper = re.search(r"https?://[^\s)]+", line)
    text = re.sub(r" \([^)]*\)", "", line)
    return f"{text} ([paper]({paper[0]}))" if paper else text


def lessons() -> str:
    """Returns the table of lessons: ideas and changed lines from the files, the rest from the comparison."""
    result = comparison()
    rows = result["variants"]
    lines = ["| lesson | idea | parent | lines of code | what it buys | what it costs |", "|---|---|---|---|---|---|"]
    for path, parent, _ in differences.family():
        if path.name not in differences.tracked():
            continue
        parent_name = "-"
        code = differences.code_lines(path)
        size = f"{len(code)}"
        if parent is not None:
            parent_name = parent.stem.removeprefix("model_")
            added, removed = differences.added_and_removed(differences.code_lines(parent), code)
            size = f"+{added} −{removed}"
        buys, costs = cells_of(path.stem.removeprefix("model_"), rows)
        lines.append(f"| [{path.name}]({path.name}) | {idea(path)} | {parent_name} | {size} | {buys} | {costs} |")
    return "\n".join(lines) + "\n\n" + conditions(result)


def conditions(result: dict) -> str:
    """Returns the sentence that says under which conditions the table's last columns were measured."""
    first = result["variants"][0]
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cores']} x {machine['cpu']}"
    budget = f"{first['budget']:.3g}".replace("e+", "e")
    return (
        f"Measured on {device}: {budget} training FLOPs for each variant, which are {first['tokens']:,} tokens for "
        f"{first['name']}; {len(first['loss'])} seed(s). Losses are validation losses in nats per token, as "
        f"differences ± standard error; everything else is a multiple of what {first['name']} has."
    )


# ---- pages -----------------------------------------------------------------------------------------------------------
def changed_definitions() -> str:
    """Returns the table of what each file changes, with links from a page in docs/."""
    return differences.table().replace("](model_", "](../model_")


PARTS = {
    "README.md": {"lessons": lessons},
    "docs/files.md": {"models": changed_definitions},
}


def fresh(page: str) -> str:
    """Returns the text of a page with its generated parts made anew."""
    text = (ROOT / page).read_text()
    for name, make in PARTS[page].items():
        pattern = rf"(<!-- begin {name}: python -m tests.readme -->\n).*?(<!-- end {name} -->)"
        assert len(re.findall(pattern, text, flags=re.S)) == 1, name
        text = re.sub(pattern, lambda m, make=make: m[1] + make() + "\n" + m[2], text, flags=re.S)
    return text


if __name__ == "__main__":
    for page in PARTS:
        new = fresh(page)
        (ROOT / page).write_text(new)
