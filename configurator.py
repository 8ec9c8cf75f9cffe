"""Config files and --key=value over a script's plain globals: `config = configure(globals())` below the knobs.

    python train.py config/x.py config/y.py --learning_rate=3e-4 --compile        (a bare --flag is --flag=True)

A knob is a plain value that the script assigns above that call, one a line with a comment; a name in capitals is none.
Where one is called `model`, every field of model_<model>.GPTConfig is a knob too. The later wins: GPTConfig, script,
config files in order, command line.
A config file is Python and is run, with every knob's value so far as a global: run only files you trust.
`where_present = dict(n_inner=512, kv_rank=64)` in it sets what the chosen model has, and names what it skips: the one
way in which a knob may be unknown.
"""

import __future__

import ast
import dataclasses
import difflib
import functools
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType

SIMPLE = (bool, int, float, str, list, dict, tuple, type(None))
MOST = 2**31 - 1  # of an integer
# Where the numbers lie that can be meant, by knob; [ and ] belong to it, ( and ) do not. What stands neither here nor
# in the knob's own annotation, as Annotated[float, "[-1, 1]"], is 0 or more, or not below a default that is negative.
RANGES = {
    f"[1, {MOST}]": "block_size n_head n_kv_head head_dim n_embd n_inner n_expert n_expert_per_token n_expert_inner "
    "moe_every n_group n_group_per_token window n_slot key_block n_local_block top_k_block n_index_head index_dim "
    "index_topk decay_rank kv_rank nope_dim rope_dim v_dim n_key_head n_value_head key_dim value_dim conv_kernel "
    "max_steps batch_tokens micro_batch max_skipped eval_every save_every log_every timeout group_size "
    "problems_per_step problems_per_round pairs_per_step max_new_tokens rollout_rows updates_per_batch",
    "[1, 1000]": "n_layer muon_steps",  # each takes its time
    "[0, 4294967295]": "seed",  # 32 bits, which every generator takes
    "(0, 10]": "learning_rate init_std",
    "(0, 100]": "gate_scale",
    "(1, inf)": "rope_theta local_rope_theta",  # at 1 all pairs turn alike
    "[0.01, 100]": "temperature",
    "[0.01, inf)": "rope_factor",
    "[0, 1)": "ema beta1 beta2 muon_momentum dropout router_jitter",
    "[0, 1]": "decay_fraction document_start_probability clip_low",
    "(0, 1]": "rotary_fraction norm_eps",
    "[0, 0.5)": "label_smoothing",
}
FLOAT32 = (1.2e-38, 3.4e38)  # the sizes of its numbers, beside 0: a smaller one would become 0, a larger one infinite
BOOLS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


@dataclasses.dataclass
class Knob:
    """What is known of a knob before anybody turns it."""

    default: object
    kinds: set  # names of the types that it takes, "None" among them; empty: any type
    choices: tuple  # the values of its Literal; empty: any value of these types
    interval: str  # where its numbers lie, as RANGES has it
    comment: str
    group: str  # the comment line above the knobs that it stands with


def fail(message):
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def type_name(value):
    """Returns the name of a value's type as an annotation has it, where None stands for its own type."""
    if value is None:
        return "None"
    return type(value).__name__


@contextmanager
def mistakes_named(path):
    """Turns what the user's Python in a file raises into one line with the file and the line."""
    try:
        yield
    except SyntaxError as error:
        fail(f"{error.filename} line {error.lineno}: {error.msg}")
    except Exception as error:
        place = path
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == path:
                place = f"{path} line {frame.lineno}"
        fail(f"{place}: {type(error).__name__}: {error}")


# ---- what knobs there are -------------------------------------------------------------------------------------------
def mentions_configure(statement):
    return any(isinstance(node, ast.Name) and node.id == "configure" for node in ast.walk(statement))


def read_knobs(path, defaults, class_name=None):
    """Returns {name: Knob} of those `defaults` that a script, or a class in it, assigns above its configure call."""
    source = Path(path).read_text(encoding="utf-8")
    lines = source.splitlines()
    statements = ast.parse(source).body
    if class_name:
        statements = next(node.body for node in statements if getattr(node, "name", None) == class_name)

    knobs = {}
    group = ""
    last_line = statements[0].lineno - 1
    for statement in statements:
        if mentions_configure(statement):
            break
        for line in lines[last_line : statement.lineno - 1]:
            if line.strip().startswith("#"):
                group = line.strip(" #-")
        last_line = statement.end_lineno
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        text = lines[statement.end_lineno - 1].encode()
        comment = text[statement.end_col_offset :].decode().strip(" #")  # the offset counts bytes
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in defaults:
                default = defaults[node.id]
                kinds, choices, interval = kinds_choices_and_interval(statement, default)
                interval = interval or interval_of(node.id, default)
                knobs[node.id] = Knob(default, kinds, choices, interval, comment, group)
    return knobs


def kinds_choices_and_interval(assignment, default):
    """Returns what a knob's annotation and default say: names of the types that it takes, the values of its Literal,
    and the interval of its Annotated.

    bool | Literal["auto"] takes bools, and of the strings "auto" alone.
    """
    kinds = set()
    choices = ()
    interval = ""
    if isinstance(assignment, ast.AnnAssign):
        parts = [assignment.annotation]
        while isinstance(parts[-1], ast.BinOp):  # a | b | c is (a | b) | c
            union = parts.pop()
            parts += [union.right, union.left]
        for part in parts:
            name = ast.unparse(part).split("[")[0]  # list[int] is a list
            if name == "Annotated":
                kind, text = part.slice.elts
                kinds.add(kind.id)
                interval = text.value
                if not re.fullmatch(r"[\[(][^,]+, [^,]+[\])]", str(interval)):
                    fail(f"{ast.unparse(assignment)}: {interval!r} is no interval: write one such as '[0, 1)'")
            elif name == "Literal":
                choices = ast.literal_eval(part.slice)
                choices = choices if isinstance(choices, tuple) else (choices,)
                kinds.update(type_name(choice) for choice in choices)
            else:
                kinds.add(name)
    if kinds or default is not None:  # a bare None says nothing about what else the knob takes
        kinds.add(type_name(default))
    return kinds, choices, interval


def interval_of(key, default):
    """Returns where the numbers of a knob lie, by its name, or else by its default."""
    for interval, names in RANGES.items():
        if key in names.split():
            return interval
    if not isinstance(default, int | float):
        return "(-inf, inf)"
    high = f"{MOST}]" if isinstance(default, int) else "inf)"
    return f"[{min(0, default)}, {high}"


def model_files():
    """Returns {name: path} of all model_<name>.py on sys.path, of which the first of a name counts."""
    variants = {}
    for folder in sys.path:
        for path in Path(folder).glob("model_*.py"):
            variants.setdefault(path.stem.removeprefix("model_"), path)
    return variants


def config_class(name):
    """Returns GPTConfig of model_<name>.py, and that file's path."""
    variants = model_files()
    if name not in variants:
        known = ", ".join(sorted(variants)) or "none"
        fail(f"unknown model {name!r}; the model_*.py files here give: {known}")

    path = variants[name]
    return run_config_class(path, path.stat().st_mtime_ns), path


@functools.cache  # a comparison asks for all files, once for each of its runs
def run_config_class(path, changed):
    """Returns GPTConfig of a file, as it is since it was changed last.

    The file is run as far as there, and not what it imports of torch, which takes seconds, nor what needs that: a
    GPTConfig is plain numbers and text.
    """
    found = {"__name__": __name__}
    statements = []
    of_torch = set()  # names that are not there
    with mistakes_named(str(path)):
        for statement in ast.parse(path.read_bytes(), str(path)).body:
            used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            is_config = getattr(statement, "name", None) == "GPTConfig"
            if re.match(r"(import|from) torch\b", ast.unparse(statement)):
                of_torch.update(alias.asname or alias.name.split(".")[0] for alias in statement.names)
            elif is_config or not used & of_torch:
                statements.append(statement)
            if is_config:
                break
        exec(compile(ast.Module(statements, []), str(path), "exec"), found)
    if not dataclasses.is_dataclass(found.get("GPTConfig")):
        fail(f"{path} has no dataclass GPTConfig, whose fields are a model's knobs")
    return found["GPTConfig"]


def is_field_of_some_model(key):
    return any(key in config_class(name)[0].__dataclass_fields__ for name in model_files())


def model_knobs(name):
    """Returns the fields of model_<name>.GPTConfig as knobs of a group of their own."""
    config, path = config_class(name)
    defaults = {}
    for field in dataclasses.fields(config):
        if field.default is field.default_factory is dataclasses.MISSING:
            fail(f"{path}: GPTConfig.{field.name} has no default")
        if field.default_factory is dataclasses.MISSING:
            defaults[field.name] = field.default
        else:
            defaults[field.name] = field.default_factory()
    knobs = read_knobs(path, defaults, "GPTConfig")
    group = f"fields of {path.name}"
    return {key: dataclasses.replace(knob, group=group) for key, knob in knobs.items()}


# ---- what config files and the command line say ---------------------------------------------------------------------
class Namespace(dict):
    """The globals of config files: all knobs by value so far; once `model` is set, those of that choice."""

    def __init__(self, script_knobs, options, starting_from):
        self.script_knobs = script_knobs
        self.options = options  # {knob: text}, of the command line; True for a bare flag
        self.starting_from = starting_from
        self.given = {}  # {name: value}, as config files have set them
        self.file_of = {}  # {name: the config file that set it last}
        self.where_present = set()  # names set for those models alone that have such a knob
        self.seen = {}  # {name: value}, what a file finds as its globals
        self.choose_model()

    def choose_model(self):
        """Adds the knobs of the chosen model: the command line's choice, or the files' so far, or the script's."""
        start = {}
        init_from = self.said("init_from") if self.starting_from else ""
        if init_from:
            start = self.starting_from(init_from)
        self.knobs = dict(self.script_knobs)
        choice = {}
        if "model" in self.script_knobs:
            choice["model"] = self.said("model", start.get("model"))
            for key, knob in model_knobs(choice["model"]).items():
                self.knobs.setdefault(key, knob)  # the script's own knob of that name counts
        if start and choice["model"] == start["model"]:
            for key in self.knobs.keys() & start.keys():
                value = as_knob_takes(start[key], self.knobs[key])
                check(key, value, self.knobs[key], f"{key}={shown(value)} of init_from={init_from}")
                self.knobs[key] = dataclasses.replace(self.knobs[key], default=value)
        defaults = {key: knob.default for key, knob in self.knobs.items()}
        before = self.seen
        self.seen = defaults | self.given | choice
        for name in before.keys() - self.seen.keys():
            self.pop(name, None)  # a field of the model that was chosen before
        self.update(self.seen)  # update does not come by __setitem__, so none of this counts as set by a file

    def said(self, name, default=None):
        """Returns what the command line, or else the files so far, or else `default`, or the script say of a knob."""
        knob = self.script_knobs[name]
        if default is None:
            default = knob.default
        value = as_knob_takes((self.given | self.options).get(name, default), knob)
        check(name, value, knob, f"{name}={shown(value)}")
        return value

    def __setitem__(self, name, value):
        if name == "where_present":
            if not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
                fail(f"where_present in {self.path} is no dict of knobs: write dict(n_inner=512)")
            for key, of_some_models in value.items():
                self[key] = of_some_models
            self.where_present.update(value)
            super().__setitem__(name, MappingProxyType(value))  # a later where_present["n_inner"] = 3 is an error
            return
        super().__setitem__(name, value)
        if name in self.knobs and not is_plain(value):
            fail(f"{name} in {self.path} is {type_with_article(value)}, which no knob takes: give its value")
        if name.startswith("_") or not is_plain(value):
            return  # a file's helpers
        self.given[name] = value
        self.seen[name] = value
        self.file_of[name] = self.path
        self.where_present.discard(name)
        if name in ("model", "init_from"):
            self.choose_model()

    def run(self, path):
        """Runs a config file; its mistakes end the program with the file's name and line."""
        self.path = path
        self["__file__"] = path
        with mistakes_named(path):
            exec(compile(Path(path).read_bytes(), path, "exec"), self)
        self.check_that_nothing_is_lost()

    def check_that_nothing_is_lost(self):
        """Ends the program where a global is not what was assigned to it at the file's top level.

        Python tells nobody of what `global` in a function, := in a comprehension, globals() and del do to it.
        """
        for name in self.knobs:
            if name not in self:
                fail(f"{name} is deleted in {self.path}: give it a value")
        for name in [*self.given]:
            if name not in self:  # a loop's variable, say, that the file needs no more
                del self.given[name]
        for name, value in self.items():
            is_helper = name.startswith("_") or not is_plain(value) or name == "where_present"
            if is_helper and name not in self.knobs:
                continue
            there = self.seen.get(name)
            if value is not there and value != there:
                fail(f"{name}={shown(value)} in {self.path} is not assigned at the file's top level: do that")


def is_plain(value):
    """Returns whether a value is none of a file's helpers."""
    return not (callable(value) or isinstance(value, ModuleType))


def type_with_article(value):
    name = "module" if isinstance(value, ModuleType) else type(value).__name__
    return "a class" if isinstance(value, type) else f"a {name}"


def sort_arguments(argv):
    """Returns the config files among the arguments, and {key: text} of what is written --key=text; --key is True."""
    files = []
    options = {}
    for argument in argv:
        key, equals, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            options[key] = text if equals else True
        elif argument == "-h":
            options["help"] = True
        elif argument.endswith(".py"):
            files.append(argument)
        else:
            fail(f"cannot read {argument!r}: give a config file as PATH.py and a knob as --key=value")
    return files, options


def parse(text, kinds):
    """Returns what `text` from the command line stands for in a knob of these kinds; `text` itself where none fits."""
    if "bool" in kinds and text in BOOLS:
        return BOOLS[text]
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    if isinstance(value, str):
        return text  # with its quotes
    if type(value) is int and "float" in kinds:
        return value
    if kinds and type_name(value) not in kinds:
        return text
    return value


def check(key, value, knob, given_as):
    """Ends the program where a knob's value is of no type that it takes, none of its choices, or cannot be meant."""
    if knob.kinds and type_name(value) not in knob.kinds:
        fail(f"{given_as}: expected {' or '.join(sorted(knob.kinds))}")
    if isinstance(value, str) and knob.choices and value not in knob.choices:
        choices = [repr(choice) if choice == "" else str(choice) for choice in knob.choices]
        if "bool" in knob.kinds:
            choices += ["True", "False"]
        fail(f"{given_as}: try one of {', '.join(choices)}")
    if isinstance(value, str) and value.startswith("~"):
        fail(f"{given_as}: there is no such home folder")
    if type(value) not in (int, float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        fail(f"{given_as}: give a finite number")
    if not lies_in(value, knob.interval):
        low = knob.interval[1:].split(",")[0]
        hint = f"it lies in {knob.interval}"
        if knob.interval[0] == "[" and value < float(low):
            hint = f"try {low} or more"
        fail(f"{given_as}: {hint}")
    if isinstance(value, float) and value and not FLOAT32[0] <= abs(value) <= FLOAT32[1]:
        fail(f"{given_as}: give 0, or a number of a size from {FLOAT32[0]} to {FLOAT32[1]}, as float32 has it")


def as_knob_takes(value, knob):
    """Returns an int as a float where the knob takes floats alone, and ~ as the home folder."""
    if type(value) is int and "float" in knob.kinds and "int" not in knob.kinds:
        return float(value) if abs(value) < sys.float_info.max else math.inf
    if isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)  # a shell does so in front of an argument alone
    return value


def shortened(text):
    """Returns a text that fits into a line of an error."""
    return text if len(text) <= 60 else f"{text[:60]}..."


def shown(value):
    """Returns a value as an error shows it."""
    try:
        return shortened(repr(value))
    except ValueError:
        return "a number of thousands of digits"  # which Python does not spell


def lies_in(number, interval):
    """Returns whether a number lies in an interval such as "[0, 1)"."""
    low, high = (float(bound) for bound in interval[1:-1].split(", "))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below


def print_help(script_globals, knobs):
    """Prints the first line of the script's docstring, its usage, and its knobs by group, with their defaults."""
    docstring = script_globals.get("__doc__") or ""
    print(docstring.strip().partition("\n")[0])
    print(f"usage: python {Path(script_globals['__file__']).name} [config/x.py ...] [--key=value ...] [--flag]")
    print("A config file is Python and is run: run only files you trust.")
    group = ""
    for key, knob in knobs.items():
        if knob.group != group:
            group = knob.group
            print(f"\n{group}")
        print(f"  --{key}={knob.default!r}".ljust(36) + " " + knob.comment)


def configure(
    script_globals: dict,
    argv: list[str] | None = None,
    quiet: bool = False,
    starting_from: Callable[[str], dict] | None = None,
) -> dict:
    """Applies config files and --key=value to the script's globals; returns {knob: value}, the chosen model's included.

    Process 0 prints what differs from the defaults, unless quiet. A user's mistake is one line on stderr, and code 2.
    starting_from: gives {"model": name, field: value} of a trained model, the defaults where `init_from` names one.
    """
    # 1. sort the arguments
    if argv is None:
        argv = sys.argv[1:]
    files, options = sort_arguments(argv)
    wants_help = options.pop("help", None)
    is_loud = not quiet and os.environ.get("RANK", "0") == "0"

    # 2. find the knobs, and what the config files make of them
    simple = {}
    for key, value in script_globals.items():
        if type(value) in SIMPLE and not key.startswith("_") and not key.isupper():
            simple[key] = value
    script_knobs = read_knobs(script_globals["__file__"], simple)
    namespace = Namespace(script_knobs, options, starting_from)
    for file in files:
        namespace.run(file)
    knobs = namespace.knobs
    if wants_help:
        if is_loud:
            print_help(script_globals, knobs)
        raise SystemExit(0)

    # 3. check what is given, where the command line beats the files
    values = {key: knob.default for key, knob in knobs.items()}
    skipped = []
    for key, value in (namespace.given | options).items():
        place = " on the command line" if key in options else f" in {namespace.file_of[key]}"
        if key in namespace.where_present and key not in knobs | options and is_field_of_some_model(key):
            skipped.append(key)
            continue
        if key not in knobs:
            close = difflib.get_close_matches(key, knobs, 1)
            hint = f"did you mean {close[0]!r}?" if close else "--help lists them"
            fail(f"unknown config key {key!r}{place}; {hint}")
        knob = knobs[key]
        if key in options:
            given_as = f"{key}={shortened(str(value))}"
            value = value if value is True else parse(value, knob.kinds)
        else:
            given_as = f"{key}={shown(value)}{place}"
        value = as_knob_takes(value, knob)
        check(key, value, knob, given_as)
        values[key] = value
        if is_loud and value != knob.default:
            print(f"{key} = {value!r}  (default {knob.default!r})")

    if is_loud and skipped:
        print(f"skipped, since model={values['model']} has no such knob: {', '.join(skipped)}")

    # 4. set the script's globals; the model's fields are in the returned values alone
    for key in script_knobs:
        script_globals[key] = values[key]
    return values


def check_values(script: str | Path, config: dict, given: dict, place: str) -> dict:
    """Returns values for some knobs, checked as configure does it. config: what configure returned for the script.

    A value that the knob does not take ends the program; `place` says where it stands.
    """
    knobs = read_knobs(script, config) | model_knobs(config["model"])
    found = {}
    for key, value in given.items():
        found[key] = as_knob_takes(value, knobs[key])
        check(key, found[key], knobs[key], f"{key}={shown(value)} {place}")
    return found


def resolve(script: str | Path, argv: list[str]) -> dict:
    """Returns what the script's `configure` would for these arguments, without running the script or printing anything.

    Of its knobs those are known that it writes as literals: `x = 3`, not `x = 3 * y`. Errors are those of `configure`.
    """
    found = {"__file__": str(script)}
    for statement in ast.parse(Path(script).read_bytes()).body:
        if mentions_configure(statement):
            break
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value:
            try:
                ast.literal_eval(statement.value)
            except ValueError:
                continue
            # Annotations are left as text: nothing that the script imports is here.
            flags = __future__.annotations.compiler_flag
            exec(compile(ast.Module([statement], []), str(script), "exec", flags), found)
    return configure(found, argv, quiet=True)


def config_source(config: dict) -> str:
    """Returns the text of a config file that sets exactly `config`."""
    lines = []
    for key, value in config.items():
        text = repr(value)
        if text in ("inf", "-inf", "nan"):  # no Python
            text = f"float('{text}')"
        lines.append(f"{key} = {text}\n")
    return "".join(lines)
