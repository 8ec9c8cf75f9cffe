"""Writes into hf.py what it was tested with: `python -m tests.proved`, to be run when tests/test_parity.py is green."""

import re
import textwrap
from pathlib import Path

import hf

ROOT = Path(__file__).resolve().parent.parent


def table() -> str:
    """Returns the source of hf.PROVED: the digests of the definitions behind the logits of each variant it knows."""
    lines = ["PROVED = {"]
    for variant in dict.fromkeys(architecture.variant for architecture in hf.ARCHITECTURES.values()):
        source = (ROOT / f"model_{variant}.py").read_text(encoding="utf-8")
        entries = [f'"{name}": "{digest}",' for name, digest in hf.digests(source).items()]
        # A colon and its digest stay together: an entry has one space, which the wrapping must not break.
        text = " ".join(entry.replace(" ", "\0") for entry in entries)
        wrapped = textwrap.fill(text, 120, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines += [f'    "{variant}": {{', wrapped.replace("\0", " "), "    },"]
    return "\n".join([*lines, "}"])


def main():
    file = ROOT / "hf.py"
    source = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r"^PROVED = \{.*?^\}", lambda _: table(), source, flags=re.S | re.M), encoding="utf-8")


if __name__ == "__main__":
    main()
