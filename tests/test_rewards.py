r"""evals/rewards.py: what counts as right, and what a reward that fails does to the others."""

import sys
import time

import pytest

from evals import sandbox
from evals.answers import number_of
from evals.rewards import is_equation, load, score

ANSWERS = [  # (what the model wrote, the row's answer, whether it is right)
    # what is the answer
    ("#### 18", "18", True),
    ("Some 3 steps, then 5.\n#### 18", "18", True),
    ("#### 18\nI am done, 7.", "18", True),
    ("#### 17 no, #### 18", "18", True),
    ("#### 17, although 18", "18", False),
    (r"So \boxed{18}. That was 1 question.", "18", True),
    (r"\boxed{17}, or \boxed{18}", "18", True),
    (r"\boxed{18} or \boxed{17}", "18", False),
    (r"\boxed{\frac{3}{4}}", "3/4", True),
    (r"\boxed{\text{18 \text{eggs}}}", "18", False),
    (r"\boxed{18", "18", True),
    ("16 - 3 - 4 = 9, so 9 * 2 = 18 dollars.", "18", True),
    ("18 is the answer to question 2", "18", False),
    ("It is 5-3", "3", True),
    ("It is 5-3", "-3", False),
    ("no number at all", "18", False),
    ("", "18", False),
    ("####", "18", False),
    # thinking is no answer
    ("<think>\n16\n</think>\n\n18", "18", True),
    ("16 it is\n</think>\n\n#### 18", "18", True),
    ("<think>\n18\n</think>\n\n16", "18", False),
    ("<think>\n18\n</think>\n\n", "18", False),
    ("<think>\nIt must be 18", "18", False),
    ("<think>\n#### 18\n</think>\n\nIt is <think> 18", "18", False),
    ("18<|im_end|>\n<|im_start|>user\n17", "18", True),
    # numbers, not strings
    ("#### 1,234", "1234", True),
    ("#### 1234", "1,234", True),
    ("1,234,567.50", "1234567.5", True),
    ("#### 12,34", "1234", False),
    ("#### 18.0", "18", True),
    ("#### 18.", "18", True),
    ("The answer is 18.00", "18", True),
    ("#### 018", "18", True),
    ("#### +18", "18", True),
    ("#### -18", "18", False),
    ("#### -18", "-18", True),
    ("#### \u221218", "-18", True),
    ("it is -0", "0", True),
    ("#### .5", "0.5", True),
    ("#### 1/2", "0.5", True),
    ("#### 2/4", "1/2", True),
    ("#### 0.333", "1/3", False),
    ("#### 1/0", "1", False),
    (r"\boxed{\frac12}", "0.5", True),
    (r"\boxed{-\dfrac{1}{2}}", "-0.5", True),
    (r"\boxed{1\frac{1}{2}}", "3/2", True),
    ("#### 1 1/2", "1.5", True),
    ("#### -1 1/2", "-1.5", True),
    (r"\boxed{10{,}000}", "10000", True),
    (r"\boxed{10,\!000}", "10000", True),
    ("9" * 5000, "1", False),
    ("#### " + "9" * 5000, "1", False),
    # units
    ("#### $18", "18", True),
    ("#### -$18", "-18", True),
    (r"\boxed{\$18}", "18", True),
    ("#### 18 eggs", "18", True),
    ("#### 18cm", "18", True),
    ("#### 18 km/h", "18", True),
    (r"\boxed{18\text{ cm}^2}", "18", True),
    (r"\boxed{18^\circ}", "18", True),
    (r"\boxed{x = 18}", "18", True),
    ("#### 18 eggs", "18 dollars", True),
    ("#### 18 and 19", "18", False),
    ("#### 18 million", "18", False),
    # percent
    ("#### 50%", "50", True),
    ("#### 50", "50%", True),
    (r"\boxed{50\%}", "0.5", True),
    ("#### 0.5", "50%", True),
    ("#### 0.5%", "50%", False),
    ("#### 0.5", "50", False),
    # what is no number
    (r"\boxed{2x}", "2", False),
    (r"\boxed{2x + 1}", "2x+1", True),
    (r"\boxed{\sqrt{2}}", "2", False),
    (r"\boxed{\left(3, \frac{1}{2}\right)}", "(3,1/2)", True),
    (r"\boxed{(3, 4)}", "(3, 5)", False),
    (r"\boxed{x^2}", "2", False),
    (r"\boxed{\text{Tuesday}}", "Tuesday", True),
    ("Tuesday", "Tuesday", True),
    ("It is Tuesday", "Tuesday", False),
]


def rewards_of(spec, completions, rows, **options):
    return score(load(spec, **options), completions, rows)


@pytest.mark.parametrize("text, gold, is_right", ANSWERS, ids=lambda value: str(value)[:30])
def test_an_answer_is_right_if_it_is_the_number(text, gold, is_right):
    assert rewards_of("math", [text], [{"gold": gold}])[0] == [float(is_right)]


def test_the_gold_is_found_in_every_form_of_row():
    rows = [
        {"answer": "9 * 2 = <<9*2=18>>18\n#### 18"},
        {"solution": r"Of course \boxed{18}.", "problem": "17?"},
        {"answer": 18},
        {"answer": "18 eggs"},
        {"expected_answer": "18", "solution": r"\boxed{17}"},
    ]
    assert rewards_of("math", ["#### 18"] * 5, rows)[0] == [1.0] * 5
    _, _, failures = rewards_of("math", ["18"], [{"question": "18?"}])
    assert "the row has no result, but the fields question" in failures["math"][0]


def test_a_number_is_read_however_long_the_text_about_it():
    begin = time.perf_counter()
    for text in ("1," * 50000, "1.1" * 50000, "-" * 50000 + "1", "1 " * 50000, "\\frac" * 20000, "{" * 50000):
        number_of(text)
        rewards_of("math,format,arithmetic", [text, text + "=" + text], [{"gold": "7"}] * 2)
    assert time.perf_counter() - begin < 5


def test_the_format_is_one_block_of_thinking_and_an_answer():
    good = ["<think>\na\n</think>\n\nb", "a\n</think>\n\nb<|im_end|>", "\n<think>a</think>b"]
    bad = ["b", "<think>a", "<think>a</think>", "<think>\n\n</think>\n\nb", "a</think>\n\n<|im_end|>", ""]
    bad += ["a<think>b</think>c", "<think>a</think>b</think>c", "<think>a</think>b<think>c"]
    assert rewards_of("format", good + bad, [{}] * 12)[0] == [1.0] * 3 + [0.0] * 9


def test_arithmetic_is_the_share_of_the_worked_lines_that_are_right():
    for text, want in [
        ("94+55=149\n149+35=184", 1.0),
        ("94+55=149\n149+35=185", 0.5),
        ("so 16 - 3 - 4 = <<16-3-4=9>>9 eggs", 1.0),
        ("$9 * $2 = $18 a day, 1,000 + 1 = 1,001.", 1.0),
        ("(1 + 2) * 3 = 9 and 0.1 + 0.2 = 0.3", 1.0),
        ("12+3=15+1=16", 0.5),
        ("1. 4+5=9\n2. Again. 4+5=9", 1.0),
        ("2**10=1024", 1.0),
        ("1/3=0.33", 0.0),
        ("1/0=0", 0.0),
        ("<think>\n1+1=3\n</think>\n\n2+2=4", 0.5),
        ("x = 5, and 5 = 5", 0.0),
        ("nothing", 0.0),
    ]:
        assert rewards_of("arithmetic", [text], [{}])[0] == [want], text


def test_arithmetic_that_would_take_forever_is_refused():
    begin = time.perf_counter()
    for expression in ("98**97**96", "9**9**9", "((9**99)**99)**99", "(9**999)*(9**999)", "2**-99999", "2**0.5"):
        assert not is_equation(expression, "1")
    assert not is_equation("1+" * 500 + "1", "501")
    assert not is_equation("(" * 199, "1")
    assert time.perf_counter() - begin < 1


def test_only_arithmetic_is_computed():
    for expression in (
        "__import__('os')",
        "5 if 1 else 2",
        "[5][0]",
        "5 and 5",
        "'5'",
        "True",
        "5 // 1",
        "len",
        "5.real",
    ):
        assert not is_equation(expression, "5") and not is_equation(expression, "1")


# ---- programs --------------------------------------------------------------------------------------------------------


def test_programs_run_only_where_that_is_allowed():
    with pytest.raises(ValueError, match="--allow_code_execution"):
        load("math,code:0.5")


@pytest.mark.skipif(bool(sandbox.missing()), reason="this system has no sandbox")
def test_a_program_is_right_that_passes_its_tests_and_cannot_forge_that():
    row = {"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}
    programs = [
        "I add:\n```python\ndef add(a, b):\n    return a + b\n```\nThat is it.",
        "<think>\n```python\nx\n```\n</think>\n\ndef add(a, b): return a + b",
        "def add(a, b): return 3",
        "import os\nos._exit(0)",
        "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
        "no program",
    ]
    totals, _, failures = rewards_of("code", programs, [row] * 6, allow_code_execution=True)
    assert totals == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0] and not any(failures.values())


# ---- several, and one's own ------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own with rewards that fail."""
    text = """
def length(completions, rows):
    return [len(text) for text in completions]

def fails_on_b(completions, rows):
    return [1 / (text != "b") for text in completions]

def nan_of_c(completions, rows):
    return [float("nan") if text == "c" else 1 for text in completions]

def too_few(completions, rows):
    return [1.0]

number = 5
"""
    (tmp_path / "own_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rewards", None)


def test_several_are_added_with_their_weights_and_reported_apart(own):
    spec = "math:2, own_rewards:length:0.5,learned:-1"
    learned = lambda completions, rows: [row["liked"] for row in rows]  # noqa: E731
    rows = [{"gold": "18", "liked": 3}, {"gold": "18", "liked": 0.25}]
    totals, parts, failures = rewards_of(spec, ["18", "7"], rows, learned=learned)
    assert totals == [2 * 1 + 0.5 * 2 - 3, 0.5 * 1 - 0.25] and not any(failures.values())
    assert parts == {"math": [1.0, 0.0], "own_rewards:length": [2.0, 1.0], "learned": [3.0, 0.25]}


def test_a_reward_that_fails_is_0_and_names_the_completion_and_the_others_count(own):
    spec = "own_rewards:length,own_rewards:fails_on_b,own_rewards:nan_of_c"
    totals, parts, failures = rewards_of(spec, ["a", "b", "c"], [{}] * 3)
    assert parts["own_rewards:fails_on_b"] == [1.0, 0.0, 1.0] and parts["own_rewards:nan_of_c"] == [1.0, 1.0, 0.0]
    assert totals == [3.0, 2.0, 2.0] and failures["own_rewards:length"] == []
    (of_b,) = failures["own_rewards:fails_on_b"]
    (of_c,) = failures["own_rewards:nan_of_c"]
    assert of_b.startswith("completion 1 ('b'): ZeroDivisionError")
    assert of_c.startswith("completion 2 ('c'): ValueError: it returned nan")


def test_a_reward_that_fails_for_all_says_why_of_each(own):
    _, _, failures = rewards_of("math,own_rewards:fails_on_b", ["b", "b"], [{"gold": "1"}] * 2)
    assert len(failures["own_rewards:fails_on_b"]) == 2 and failures["math"] == []


def test_a_reward_of_another_number_of_completions_is_no_reward(own, capsys):
    totals, _, failures = rewards_of("own_rewards:too_few", ["a", "b"], [{}] * 2)  # one at a time it has the number
    assert totals == [1.0, 1.0] and not any(failures.values())


@pytest.mark.parametrize(
    "spec, message",
    [
        ("maths", "'maths' is unknown: there are math, format, arithmetic, code, learned"),
        ("learned", "the score of a reward model: give a run of reward.py"),
        ("", "'' is unknown"),
        ("math:nan", "no finite weight"),
        ("0.5", "no name"),
        ("math,math:2", "math is named twice"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("own_rewards:absent", "no attribute 'absent'"),
        ("own_rewards:number", "is no function, but 5"),
    ],
)
def test_a_reward_that_is_none_is_refused(own, spec, message):
    with pytest.raises(ValueError, match=message):
        load(spec)
