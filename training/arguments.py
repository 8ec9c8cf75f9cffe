"""What the commands with argparse share: numbers that lie in a range, and one line for what is wrong."""

import argparse
import math
from collections.abc import Callable

from configurator import fail, lies_in, shortened


class Parser(argparse.ArgumentParser):
    """A parser that ends the program with one line, without a page of usage before it."""

    def error(self, message):
        fail(message)


def number(interval: str, kind: type = int) -> Callable[[str], int | float]:
    """Returns a `type` of an argument: a number of a kind that lies in an interval such as "[0, 1)"."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # lies in no interval
        if not lies_in(value, interval):
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shortened(text)}: give {whole} in {interval}")
        return value

    return read


SEED = number("[0, 4294967295]")  # 32 bits, which every generator takes


def not_empty(text: str) -> str:
    """Is the `type` of an argument that may not be empty, as one of a script is whose variable is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text
