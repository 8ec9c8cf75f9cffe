"""The family of the model files and what each changes against its parent: `python -m tests.differences` prints it."""

import ast
import difflib
import io
import re
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("model_*.py"))


def definitions(path: Path) -> dict[str, str]:
    """Returns {name: source} of the top-level classes and functions; GPT is taken apart into GPT.method."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "GPT":
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    found[f"GPT.{item.name}"] = segment(source, item)
                elif isinstance(item, ast.Assign):
                    found[f"GPT.{item.targets[0].id}"] = segment(source, item)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = segment(source, node)
    return found


def segment(source, node):
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno] + [d.lineno for d in decorators])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text()))


def names(text: str) -> list[str]:
    return re.split(r",\s*", " ".join(text.split()))


def claim(path: Path) -> tuple[str | None, list[str]]:
    """Returns the parent's file name and the names after `Differs from ... in:`; None for the first file."""
    found = re.search(r"^Differs from (model_\w+\.py) in: (.*?)(?=^As in |\Z)", docstring(path), flags=re.S | re.M)
    if found is None:
        return None, []
    return found[1], names(found[2])


def taken(path: Path) -> dict[str, list[str]]:
    """Returns {file name: names} of the lines `As in model_x.py: ...`: definitions that stand there unchanged."""
    lines = re.findall(r"^As in (model_\w+\.py): (.*?)(?=^As in |\Z)", docstring(path), flags=re.S | re.M)
    return {file: names(text) for file, text in lines}


def changed(path: Path, parent: Path) -> list[str]:
    """Returns the names that are new, changed or gone against the parent, in the parent's order, the new ones last."""
    old = definitions(parent)
    new = definitions(path)
    order = list(old) + [name for name in new if name not in old]
    return [name for name in order if old.get(name) != new.get(name)]


def code_lines(path: Path) -> list[str]:
    """Returns the lines without comments, docstrings and blank lines."""
    source = path.read_text()
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return [line for line in lines if line]


def added_and_removed(old: list[str], new: list[str]) -> tuple[int, int]:
    diff = list(difflib.unified_diff(old, new, n=0))[2:]
    added = sum(line.startswith("+") for line in diff)
    removed = sum(line.startswith("-") for line in diff)
    return added, removed


def family() -> list[tuple[Path, Path | None, int]]:
    """Returns (file, parent, depth) with children behind their parent."""
    parents = {path: claim(path)[0] for path in FILES}
    rows = []

    def visit(path, depth):
        parent = parents[path]
        rows.append((path, ROOT / parent if parent else None, depth))
        for child in FILES:
            if parents[child] == path.name:
                visit(child, depth + 1)

    for path in FILES:
        if parents[path] is None:
            visit(path, 0)
    return rows


def tracked() -> set[str]:
    """Returns the names of the files in version control: a README lists no file of one's own."""
    listed = subprocess.run(["git", "ls-files", "model_*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:  # a copy without history
        return {path.name for path in FILES}
    return set(listed.stdout.split())


def table() -> str:
    """Returns the README's table: what each file changes, lines of code added and removed without comments."""
    rows = ["| file | idea | parent | lines | added | removed | changed definitions |", "|---|---|---|---|---|---|---|"]
    for path, parent, _ in family():
        if path.name not in tracked():
            continue
        idea = docstring(path).splitlines()[0]
        idea = re.sub(r" \(http\S+\)", "", idea).rstrip(".")
        lines = len(path.read_text().splitlines())
        cells = ["-", "-", "-", "-"]
        if parent is not None:
            added, removed = added_and_removed(code_lines(parent), code_lines(path))
            listed = ", ".join(f"`{name}`" for name in changed(path, parent))
            cells = [parent.name, str(added), str(removed), listed]
        rows.append(f"| [{path.name}]({path.name}) | {idea} | {cells[0]} | {lines} | {' | '.join(cells[1:])} |")
    return "\n".join(rows)


def tree() -> str:
    """Returns the family as an indented tree, with the lines of code that each file adds and removes."""
    rows = []
    for path, parent, depth in family():
        row = "    " * depth + path.name
        if parent is not None:
            added, removed = added_and_removed(code_lines(parent), code_lines(path))
            row = f"{row:36} +{added} -{removed}   {', '.join(changed(path, parent))}"
        rows.append(row)
    return "\n".join(rows)


if __name__ == "__main__":
    print(tree())
