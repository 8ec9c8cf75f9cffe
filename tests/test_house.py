"""The arrows between files run one way: commands, then folders, then what one copies along."""

import ast
import re
import sys
from functools import cache

from tests.tiny import ROOT

FOLDERS = ("training", "distributed", "data", "evals", "benchmarks")
COPYABLE = {"kernels", "kernels_delta", "muon", "generate", "hf", "flops", "configurator"}


def name_of(path):
    return str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")


PATHS = [path for folder in ("", *FOLDERS) for path in sorted((ROOT / folder).glob("*.py"))]
FILES = {name_of(path): path for path in PATHS}
MODELS = {name for name in FILES if name.startswith("model_")}
COMMANDS = {name for name in FILES if "." not in name} - COPYABLE - MODELS


@cache
def imports(name):
    """Returns our files that a file imports by a statement, wherever that stands."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & FILES.keys()


@cache
def longest_chain(name, above=()):
    """Returns the longest list of files, this one first, of which each imports the next."""
    assert name not in above, f"a circle: {' -> '.join([*above, name])}"
    chains = [longest_chain(other, (*above, name)) for other in imports(name)]
    return [name, *max(chains, key=len, default=[])]


def test_there_are_the_commands_that_the_readme_knows():
    assert {"train", "sample", "eval", "compare", "bench"} <= COMMANDS


def test_a_model_file_imports_nothing_of_ours_and_nothing_imports_it_by_name():
    for name in FILES:
        assert not (imports(name) if name in MODELS else imports(name) & MODELS), name


def test_no_command_imports_another_nor_does_anything_else():
    for name in FILES:
        assert not imports(name) & COMMANDS, name


def test_what_one_copies_along_imports_nothing_of_ours():
    for name in COPYABLE - {"kernels_delta"}:  # which is the second half of kernels.py
        assert not imports(name), name
    assert imports("kernels_delta") == {"kernels"}


def test_no_folder_imports_a_folder_that_imports_it():
    arrows = {(a.split(".")[0], b.split(".")[0]) for a in FILES for b in imports(a) if "." in a and "." in b}
    assert not [(a, b) for a, b in arrows if a != b and (b, a) in arrows]


def test_there_is_no_circle_and_the_longest_chain_of_imports_is_eight_files():
    chain = max((longest_chain(name) for name in FILES), key=len)
    assert len(chain) <= 8, " -> ".join(chain)


def test_every_command_prints_what_its_output_has_no_letters_for_as_escapes():
    for name in FILES.keys() - MODELS:
        text = FILES[name].read_text()
        if name in COMMANDS or '__name__ == "__main__"' in text:
            assert re.search(r'^ *print_any_text\(\)|reconfigure\(errors="backslashreplace"\)', text, re.M), name


def test_our_folders_hide_no_module_that_python_has():
    assert not {name.split(".")[0] for name in FILES} & set(sys.stdlib_module_names)
