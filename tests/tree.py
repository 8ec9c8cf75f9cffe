"""A copy of the project in a folder of its own, to run its commands in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tiny import ROOT


def run(command: str, folder: Path, **options) -> str:
    """Returns what a shell command prints; it has to succeed."""
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def copy_of_the_project(folder: Path) -> None:
    """Fills an empty folder with the files that are, or would be, in version control."""
    for name in run("git ls-files --cached --others --exclude-standard", ROOT).splitlines():
        if (ROOT / name).is_file():  # neither deleted nor a link to a folder
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
