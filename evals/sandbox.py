"""Runs a program that a model wrote, in a process of its own with limits on time, memory, files and network."""

import shutil
import subprocess
import sys
import tempfile
from functools import cache

PASSED = 43  # how GUARD ends after the program has run to its end: exit() in the program is no success
GUARD = f"""
import os, resource, sys
text, seconds, here = sys.stdin.buffer.read(), int(sys.argv[1]), os.getcwd() + os.sep
code = compile(text, "program", "exec")
for what, most in (("CPU", seconds), ("AS", 1 << 30), ("FSIZE", 1 << 20), ("NOFILE", 64), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
families = {{"os", "socket", "ctypes", "shutil", "resource", "pty"}}
harmless = {{"os.listdir", "os.scandir", "os.walk", "os.fwalk"}}
def audit(event, args):
    bad = event.partition(".")[0] in families and event not in harmless
    if event == "open":  # mode is None for os.open, which could be relative to any folder
        path, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        bad = writes and (mode is None or not os.path.abspath(os.fsdecode(path)).startswith(here))
    if bad or event == "import" and args[0] == "_posixsubprocess":
        raise PermissionError(event + " is not allowed here")
sys.addaudithook(audit)
exec(code, {{"__name__": "program"}})
os._exit({PASSED})
"""


@cache
def without_network() -> list[str]:
    """The command before another that takes its network away; [] where the system has none that is permitted."""
    for flags in ("-n", "-rn") if shutil.which("unshare") else ():
        command = [shutil.which("unshare"), flags]
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


def passes(program: str, seconds: int = 5) -> bool:
    """Whether a program runs to its end, in a process of its own in an empty folder that is then deleted.

    Limits: seconds of time, 1 GB of memory, 1 MB a file, files only in that folder, no network, no other processes.
    They are made for what a model does by accident: against code that means harm, put all of it in a virtual machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [*without_network(), sys.executable, "-I", "-B", "-c", GUARD, str(seconds)]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            done = subprocess.run(command, input=program.encode(), cwd=folder, env={}, timeout=seconds, **quiet)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == PASSED
