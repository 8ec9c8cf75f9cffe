r"""What a text states as its answer, and whether two answers are the same: as numbers, or as text without typography.

answer = stated_answer("16 - 3 - 4 = 9, so 9 * 2 = 18 dollars.")  # "18"
is_same(answer, "18.00"), is_same(r"\frac{1}{2}", "0.5"), is_same("50%", "0.5")  # all of them are
"""

import re
from fractions import Fraction
from typing import NamedTuple

from data.text import boxed


def stated_answer(text: str) -> str:
    r"""Returns what follows the last ####, else what is in the last \boxed{...}, else the last number, else all of it.

    Of what follows #### it is the line.
    """
    if "####" in text:
        answer = text.rpartition("####")[2].strip()
        return answer.partition("\n")[0]
    answer = boxed(text)
    if answer is not None:
        return answer
    numbers = [match[0] for match in NUMBER.finditer(plain(text))]
    return numbers[-1] if numbers else text.strip()


def is_same(answer: str, gold: str) -> bool:
    """Whether two answers are the same number or, where one of them is none, the same text but for its typography.

    A percent sign is a unit, which may be left out: 50% is 50. Or it is a hundredth: 50% is 0.5.
    """
    number = number_of(answer)
    gold_number = number_of(gold)
    if number is None or gold_number is None:
        return answer != "" and plain_math(plain(answer)) == plain_math(plain(gold))
    return number.value == gold_number.value or number.in_units() == gold_number.in_units()


class Number(NamedTuple):
    value: Fraction
    is_percent: bool

    def in_units(self):
        return self.value / 100 if self.is_percent else self.value


PLAIN = [  # how TeX and typography write what a number is made of, and how it is read here
    ("\u2212", "-"),
    (r"\{,\}", ","),
    (r"\\%", "%"),
    (r"\\[!,;: ]|\\?[$€£]|\\left\b|\\right\b|\*\*", ""),
    (r"\^\{?\\circ\}?", " degrees"),
    (r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1"),
    (r"\b(m|[a-z]{2,})\^\{?[23]\}?", r"\1"),  # cm^2
    (r"(\d)\s*\\[dt]?frac", r"\1 \\frac"),  # 1\frac12 is 1 1/2
    (r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}", r"\1/\2"),
    (r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2"),
]
NUMBER = re.compile(
    r"""
    (?: (?<![\w.)]) [-+] )?                 # a sign, but no subtraction: 5-3 are 5 and 3
    (?: (?: \d{1,3}(?:,\d{3})+ | \d+ )      # 1,234 or 1234
        (?: \s+\d+/\d+ | /\d+ | \.\d+ )?    # 1 1/2, 1/2, 1.5
      | \.\d+ )                             # .5
    (?: \s?% )?
    """,
    re.VERBOSE,
)
# What a number with its unit has not around it: other signs, variables, functions, and words that are factors.
NO_UNIT = re.compile(r"[^\w\s.,:;'\"=/]|_|(?<![a-z])/|/(?![a-z])|\b(or|and|sqrt|pi|log|ln|hundred|thousand|million)\b")
LONGEST_NUMBER = 100  # characters: the time to read a number grows with the square of its digits


def number_of(text: str) -> Number | None:
    """Returns the number that a text is, which may have a unit or words about it; None where it is 2x or (1, 2)."""
    text = plain(text)
    found = list(NUMBER.finditer(text))
    if len(found) != 1 or len(found[0][0]) > LONGEST_NUMBER:
        return None
    begin, end = found[0].span()
    before = text[:begin]
    after = text[end:]
    is_variable = re.search(r"\w$", before) or re.match(r"[a-zA-Z]\b", after) and after[0] not in "mglhsC"
    if is_variable or NO_UNIT.search(f"{before} {after}".lower()):
        return None
    digits = found[0][0].replace(",", "").rstrip("% ")
    sign = -1 if digits.startswith("-") else 1
    try:
        value = sign * sum(Fraction(part) for part in digits.lstrip("+-").split())
    except ZeroDivisionError:
        return None
    return Number(value, found[0][0].endswith("%"))


def plain(text):
    for pattern, replacement in PLAIN:
        text = re.sub(pattern, replacement, text)
    return text


def plain_math(text):
    r"""An answer in TeX without what is only typography: spaces, \left, \dfrac, units in \text{}, $, 1,000's comma."""
    text = re.sub(r"\\text\{\s.*?\}", "", text)
    text = re.sub(r"\\(left|right)(?![a-zA-Z])|\\[!,;: $%]|\^\{?\\circ\}?|[\s$%]", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac([0-9a-z])([0-9a-z])", r"\\frac{\1}{\2}", text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    return re.sub(r"^[a-z]=", "", text).removesuffix(".")
