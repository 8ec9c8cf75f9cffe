"""What each model file changes against model_baseline.py: `python -m tests.differences` prints the table."""

import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "model_baseline.py"


def definitions(path: Path) -> dict[str, str]:
    """{name: source} of the top-level classes and functions; GPT is taken apart into GPT.method."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "GPT":
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"GPT.{method.name}"] = segment(source, method)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = segment(source, node)
    return found


def segment(source, node):
    first = min([node.lineno] + [d.lineno for d in node.decorator_list])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def changed(path: Path) -> list[str]:
    """Names that are new, changed or gone against the baseline, in the order of the baseline, the new ones last."""
    old, new = definitions(BASELINE), definitions(path)
    order = list(old) + [name for name in new if name not in old]
    return [name for name in order if old.get(name) != new.get(name)]


def claimed(path: Path) -> list[str]:
    """What the docstring's last line says."""
    line = ast.get_docstring(ast.parse(path.read_text())).split("Differs from model_baseline.py in:")[1]
    return [] if line.strip() == "nothing" else re.split(r",\s*", " ".join(line.split()))


def table() -> str:
    rows = ["| file | idea | lines | changed lines | changed definitions |", "|---|---|---|---|---|"]
    for path in [BASELINE] + sorted(p for p in ROOT.glob("model_*.py") if p != BASELINE):
        old, new = (p.read_text().splitlines() for p in (BASELINE, path))
        diff = [
            line for line in difflib.unified_diff(old, new, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")
        ]
        idea = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0].split(": ")[-1]
        idea = re.sub(r" \(http\S+\)", "", idea).rstrip(".")
        names = ", ".join(f"`{name}`" for name in changed(path)) or "-"
        rows.append(f"| [{path.name}]({path.name}) | {idea} | {len(new)} | {len(diff)} | {names} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
