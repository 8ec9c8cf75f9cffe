"""Config files and --key=value over a script's plain globals: `config = configure(globals())` below the knobs.

    python train.py config/x.py config/y.py --learning_rate=3e-4 --compile        (a bare --flag is --flag=True)

A knob is a plain value that the script assigns above that call, one a line with a comment. Where one is called `model`,
every field of model_<model>.GPTConfig is a knob too. The later wins: GPTConfig, script, config files in order, command
line.
A config file is Python and is run, with every knob's value so far as a global: run only files you trust.
"""

import ast
import dataclasses
import difflib
import os
import re
import sys
import traceback
from collections import namedtuple
from pathlib import Path
from types import ModuleType

SIMPLE = (bool, int, float, str, list, dict, tuple, type(None))
BOOLS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
Knob = namedtuple("Knob", "default kinds comment")  # kinds: names of the types that it takes; empty: any


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def type_name(value):
    return "None" if value is None else type(value).__name__


def read_knobs(path, defaults, class_name=None):
    """{name: Knob} of the `defaults` that a script (above its configure call) or a class in it assigns."""
    source, knobs = Path(path).read_text(encoding="utf-8"), {}
    lines, body = source.splitlines(), ast.parse(source).body
    if class_name:
        body = next(node.body for node in body if getattr(node, "name", None) == class_name)
    for node in body:
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        if any(n.id == "configure" for n in names):
            break
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip(" #")
            for name in {n.id for n in names if isinstance(n.ctx, ast.Store)} & defaults.keys():
                kinds = {kind.split("[")[0].strip() for kind in annotation.split("|") if kind}
                if kinds or defaults[name] is not None:  # a bare None says nothing about what else it takes
                    kinds.add(type_name(defaults[name]))
                knobs[name] = Knob(defaults[name], kinds, comment)
    return knobs


def config_class(name):
    """GPTConfig of model_<name>.py and that file's path. The file is run as far as there, and not what it imports of
    torch, which takes seconds: a GPTConfig is plain numbers and text."""
    files = [p for folder in sys.path for p in Path(folder).glob("model_*.py")]
    variants = {p.stem.removeprefix("model_"): p for p in reversed(files)}  # the first on sys.path counts
    if name not in variants:
        fail(f"unknown model {name!r}; the model_*.py files here give: {', '.join(sorted(variants)) or 'none'}")
    body, space = ast.parse(variants[name].read_bytes()).body, {"__name__": __name__}
    end = next(i for i, node in enumerate(body) if getattr(node, "name", None) == "GPTConfig")
    heads = [node for node in body[: end + 1] if not re.match(r"(import|from) torch\b", ast.unparse(node))]
    exec(compile(ast.Module(heads, []), str(variants[name]), "exec"), space)
    return space["GPTConfig"], variants[name]


def model_knobs(name):
    """The fields of model_<name>.GPTConfig as knobs."""
    (config, path), unset = config_class(name), dataclasses.MISSING
    fields = dataclasses.fields(config)
    defaults = {f.name: f.default if f.default_factory is unset else f.default_factory() for f in fields}
    return read_knobs(path, defaults, "GPTConfig")


class Namespace(dict):
    """What config files run in: all knobs by value so far; once `model` is set, those of that choice."""

    def __init__(self, own, options):
        self.own, self.options, self.given, self.where = own, options, {}, {}
        self.choose()

    def choose(self):
        self.knobs, choice = dict(self.own), {}
        if "model" in self.own:
            choice = {"model": (self.given | self.options).get("model", self.own["model"].default)}
            fields = model_knobs(choice["model"])
            self.knobs.update({key: knob for key, knob in fields.items() if key not in self.own})
        self.update({key: knob.default for key, knob in self.knobs.items()} | self.given | choice)

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        if not (name.startswith("_") or callable(value) or isinstance(value, ModuleType)):
            self.given[name], self.where[name] = value, f" in {self.path}"
            if name == "model":
                self.choose()

    def run(self, path):
        self["__file__"] = self.path = path
        try:
            exec(compile(Path(path).read_bytes(), path, "exec"), self)
        except SyntaxError as e:
            fail(f"{e.filename} line {e.lineno}: {e.msg}")
        except Exception as e:
            lines = [f" line {f.lineno}" for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
            fail(f"{path}{lines[-1] if lines else ''}: {type(e).__name__}: {e}")


def parse(text, kinds):
    """What `text` from the command line stands for in a knob of these kinds; `text` itself where that fits none."""
    if "bool" in kinds and text in BOOLS:
        return BOOLS[text]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    fits = not kinds or type_name(value) in kinds or (type(value) is int and "float" in kinds)
    return value if fits and not isinstance(value, str) else text


def configure(script_globals: dict, argv: list[str] | None = None, quiet: bool = False) -> dict:
    """Applies config files and --key=value to the script's globals; returns {knob: value}, the chosen model's included.

    Rank 0 prints what differs from the defaults, unless quiet. A user's mistake is one line on stderr and exit code 2.
    """
    # 1. sort the arguments
    loud = os.environ.get("RANK", "0") == "0" and not quiet
    options, files, show = {}, [], print if loud else lambda *text: None
    for argument in sys.argv[1:] if argv is None else argv:
        key, equals, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            options[key] = text if equals else "True"
        elif argument.endswith(".py"):
            files.append(argument)
        else:
            fail(f"cannot read {argument!r}: give a config file as PATH.py and a knob as --key=value")
    # 2. the knobs, and what the config files make of them
    simple = {k: v for k, v in script_globals.items() if type(v) in SIMPLE and not k.startswith("_")}
    own, wants_help = read_knobs(script_globals["__file__"], simple), options.pop("help", None)
    space = Namespace(own, options)
    for file in files:
        space.run(file)
    knobs = space.knobs
    if wants_help:
        show((script_globals.get("__doc__") or "").strip().partition("\n")[0])
        show(f"usage: python {Path(script_globals['__file__']).name} [config/x.py ...] [--key=value ...] [--flag]")
        show("A config file is Python and is run: run only files you trust.\n")
        for key, knob in knobs.items():
            show(f"--{key}={knob.default!r}".ljust(36) + " " + knob.comment)
        raise SystemExit(0)
    # 3. check, show, set
    values = {key: knob.default for key, knob in knobs.items()}
    for key, value in (space.given | options).items():
        where = "" if key in options else space.where[key]
        if key not in knobs:
            close = difflib.get_close_matches(key, knobs, 1)
            hint = f"did you mean {close[0]!r}?" if close else "--help lists them"
            fail(f"unknown config key {key!r}{where or ' on the command line'}; {hint}")
        kinds, shown = knobs[key].kinds, value if key in options else repr(value)
        value = parse(value, kinds) if key in options else value
        value = float(value) if type(value) is int and "float" in kinds and "int" not in kinds else value
        if kinds and type_name(value) not in kinds:
            fail(f"{key}={shown}{where}: expected {' or '.join(sorted(kinds))}")
        values[key] = value
        if value != knobs[key].default:
            show(f"{key} = {value!r}  (default {knobs[key].default!r})")
    script_globals.update({key: values[key] for key in own})
    return values


def resolve(script: str | Path, argv: list[str]) -> dict:
    """What the script's `configure` would return for these arguments. The script is not run, and nothing is printed.

    Of its knobs those are known that it writes as literals: `x = 3`, not `x = 3 * y`. Errors are those of `configure`.
    """
    found = {"__file__": str(script)}
    for node in ast.parse(Path(script).read_bytes()).body:
        if any(isinstance(n, ast.Name) and n.id == "configure" for n in ast.walk(node)):
            break
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            try:
                ast.literal_eval(node.value)
            except ValueError:
                continue
            exec(compile(ast.Module([node], []), str(script), "exec"), found)
    return configure(found, argv, quiet=True)


def config_source(config: dict) -> str:
    """The text of a config file that sets exactly `config`."""
    odd = ("inf", "-inf", "nan")  # their repr is no Python
    return "".join(f"{k} = " + (f"float('{v}')" if repr(v) in odd else repr(v)) + "\n" for k, v in config.items())
