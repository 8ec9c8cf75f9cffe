r"""Rewards of what a model wrote that can be verified: right numbers, a right format, right arithmetic or programs.

    rewards = load("math:1,format:0.2,my_module:my_function:0.5")
    totals, parts, failures = score(rewards, completions, rows)

math         1 where the answer is the row's number: behind ####, in \boxed{...}, or the last number
format       1 where there is one block of thinking, and an answer behind it
arithmetic   the share of the worked lines, such as 12+3=15, that are right; 0 where there are none
code         1 where the program passes the row's "tests", in the sandbox of evals/judge.py
module:name  your own function: of the completions and their rows, two lists, it returns a list of numbers

A reward reads the completion alone, never the prompt, in which an answer may stand. A completion is text as the model
wrote it, thinking included; where the prompt began the thinking, so does the completion, with <think>. A row is what a
data set has of the problem: its result under "gold", or "answer", "solution" and so on, see data/problems.py.
"""

import ast
import builtins
import importlib
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from data.chat import END, END_THINK, THINK, split_thinking
from data.problems import gold_of
from evals.answers import is_same, stated_answer
from evals.judge import Case, judge


class Reward(NamedTuple):
    name: str
    weight: float
    function: Callable[[list[str], list[dict]], list[float]]


# ---- all of them -----------------------------------------------------------------------------------------------------


def load(spec: str, allow_code_execution: bool = False, learned: Callable | None = None) -> list[Reward]:
    """Returns the rewards that a text names, each as NAME or NAME:WEIGHT, with commas between them.

    learned: the function that "learned" stands for, which is called as one of your own: the score of a reward model.
    ValueError says what is unknown, or may not run.
    """
    rewards = []
    for item in spec.split(","):
        name, weight = name_and_weight(item.strip())
        if name in [reward.name for reward in rewards]:
            raise ValueError(f"the reward {name} is named twice in {spec!r}")
        if name == "learned" and learned is not None:
            function = learned
        elif name == "learned":
            raise ValueError("the reward learned is the score of a reward model: give a run of reward.py, reward_model")
        elif name == "code":
            function = right_programs
            if not allow_code_execution:
                raise ValueError("the reward code runs what the model writes: allow it with --allow_code_execution")
            judge([])  # raises where no program can run
        elif name in EACH:
            function = on_lists(EACH[name])
        elif ":" in name:
            function = imported(name)
        else:
            known = ", ".join([*EACH, "code", "learned (of a reward model)"])
            raise ValueError(f"the reward {name!r} is unknown: there are {known}, and your own as module:function")
        rewards.append(Reward(name, weight, function))
    if learned is not None and "learned" not in [reward.name for reward in rewards]:
        raise ValueError(f"reward_model does nothing without the reward learned: try {spec},learned:1")
    return rewards


def name_and_weight(item):
    """Returns ("module:function", 0.5) of module:function:0.5; the weight is 1 where none is given."""
    name, colon, last = item.rpartition(":")
    try:
        weight = float(last)
    except ValueError:
        return item, 1.0
    if not colon or not math.isfinite(weight):
        raise ValueError(f"the reward {item!r} has no name or no finite weight: try math:1,format:0.2")
    return name, weight


def imported(name):
    """Returns the function of module:function."""
    module, _, function = name.rpartition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the reward {name}: {error}") from error
    if not callable(found):
        raise ValueError(f"the reward {name} is no function, but {found!r:.60}")
    return found


def on_lists(function):
    """Returns a function of one completion and its row as one of lists of them."""
    return lambda completions, rows: [function(text, row) for text, row in zip(completions, rows)]


def score(
    rewards: list[Reward], completions: list[str], rows: list[dict]
) -> tuple[list[float], dict[str, list[float]], dict[str, list[str]]]:
    """Returns the weighted sum of each completion, {name: values} without weights, and {name: messages} of failures.

    Where a reward raises, or returns what is no number, it counts as 0, and a message names the completion.
    """
    totals = [0.0] * len(completions)
    parts = {}
    failures = {}
    for reward in rewards:
        values, failures[reward.name] = values_of(reward, completions, rows)
        parts[reward.name] = values
        totals = [total + reward.weight * value for total, value in zip(totals, values)]
    return totals, parts, failures


def values_of(reward, completions, rows):
    """Returns a reward's values, and a message for each completion of which it has none."""
    try:
        return checked(reward.function(completions, rows), len(completions)), []
    except Exception:  # whatever a function of a user's raises: which completion did it?
        pass
    values = []
    failed = []
    for i, (text, row) in enumerate(zip(completions, rows)):
        try:
            values += checked(reward.function([text], [row]), 1)
        except Exception as error:
            values.append(0.0)
            failed.append(f"completion {i} ({text[:60]!r}): {type(error).__name__}: {error}")
    return values, failed


def checked(values, n):
    values = [float(value) for value in values]
    if len(values) != n:
        raise ValueError(f"it returned {len(values)} values for {n} completions")
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"it returned {value}, and a reward is a finite number")
    return values


# ---- the right number ------------------------------------------------------------------------------------------------


def right_number(completion: str, row: dict) -> float:
    gold = row.get("gold")
    if gold is None:
        gold = gold_of(row)
    if gold is None:
        raise ValueError(f"the row has no result, but the fields {', '.join(row)}: give it gold, answer or solution")
    return float(is_same(stated_answer(answer_part(completion)), str(gold)))


def answer_part(completion: str) -> str:
    """Returns what follows the thinking; nothing where thinking has begun and not ended."""
    _, answer = split_thinking(completion.partition(END)[0])
    return answer.partition(THINK)[0]


# ---- a right format --------------------------------------------------------------------------------------------------


def right_format(completion: str, row: dict) -> float:
    """A completion may begin inside its thinking, where the prompt had the <think>."""
    text = completion.partition(END)[0].strip().removeprefix(THINK)
    thinking, mark, answer = text.partition(END_THINK)
    is_one_block = mark and THINK not in text and END_THINK not in answer
    return float(bool(is_one_block and thinking.strip() and answer.strip()))


# ---- right arithmetic ------------------------------------------------------------------------------------------------

SIGNS = "0123456789 .,+-*/()"  # what arithmetic is written with
LONGEST_EXPRESSION = 200  # characters
MOST_BITS = 4096  # of a power, which is refused before it is computed: 98**97**96 would fill the memory
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def right_arithmetic(completion: str, row: dict) -> float:
    """The thinking counts: there the work is done. 12+3=15+1=16 is two lines, of which the first is wrong."""
    verdicts = []
    for line in completion.replace("$", "").splitlines():
        sides = line.split("=")
        for left, right in zip(sides, sides[1:]):
            left = left[len(left.rstrip(SIGNS)) :]  # the arithmetic at its end
            left = re.split(r"[.,]\s", left)[-1].strip()  # not the 1. of a list, nor the end of a sentence
            right = right[: len(right) - len(right.lstrip(SIGNS))].strip(" .,")  # and at its beginning
            if right and any(sign in left.lstrip("-") for sign in "+-*/"):
                verdicts.append(is_equation(left, right))
    return sum(verdicts) / max(len(verdicts), 1)


def is_equation(left: str, right: str) -> bool:
    try:
        return value_of(left) == value_of(right)
    except (SyntaxError, ValueError, ArithmeticError):
        return False


def value_of(expression: str) -> Fraction:
    """Returns the value of an arithmetic expression; ValueError where it is too long or large, or another thing."""
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"an expression of {len(expression)} characters")
    return walk(ast.parse(expression.replace(",", ""), mode="eval").body)


def walk(node):
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))  # of a text 0.1 is exactly a tenth
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -walk(node.operand)
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        raise ValueError(f"{type(node).__name__} is no arithmetic")
    left = walk(node.left)
    right = walk(node.right)
    if isinstance(node.op, ast.Pow):
        bits = max(left.numerator.bit_length(), left.denominator.bit_length())
        if right.denominator != 1 or abs(right) * bits > MOST_BITS:
            raise ValueError("a power that is too large, or a root")
    return OPERATORS[type(node.op)](left, right)


# ---- right programs --------------------------------------------------------------------------------------------------


def right_programs(completions: list[str], rows: list[dict]) -> list[float]:
    """A row has "tests": code that raises where the program is wrong, as one text or a list of them."""
    cases = [case_of(completion, row) for completion, row in zip(completions, rows)]
    return [float(verdict.passed) for verdict in judge(cases)]


def case_of(completion, row):
    tests = row.get("tests")
    if not tests:
        raise ValueError(f"the row has no tests, but the fields {', '.join(row)}")
    if not isinstance(tests, str):
        tests = "\n".join(tests)
    answer = answer_part(completion)
    blocks = re.findall(r"```(?:python)?\n(.*?)```", answer, re.DOTALL)
    return Case(blocks[-1] if blocks else answer, tests, called_names(tests))


def called_names(test: str) -> tuple[str, ...]:
    """Returns the names of the program's functions: those that a test calls, and does not define itself."""
    nodes = list(ast.walk(ast.parse(test)))
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return tuple(sorted(called - defined - set(dir(builtins))))


EACH = {"math": right_number, "format": right_format, "arithmetic": right_arithmetic}  # of one completion
