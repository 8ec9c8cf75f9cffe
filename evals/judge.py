"""Judges programs that a model wrote, by tests that they can neither see nor answer for.

Whatever runs in one interpreter can read and change all of it: a test beside the program, its expected values, a secret
word for "passed". So each case has two processes, which evals/sandbox.py confines, and a third that ends them:

    judge()  --fork server-->  keeper       ends the other two when one is done, or the time is over
       |                       |    |
       +----- case, verdict -- test |       runs the test; a call of the program's function is a question to the other
                               |    |
                               program      runs the program, and answers questions: (name, arguments) -> result

Only literals cross between them, as text for `ast.literal_eval`. The program's process began before the case was read
and has no way to the test's: it learns the arguments of each call, and no value that is expected of it. It can answer
what it likes, and only the right results pass.

A test cannot be carried so where arguments or results are no literals, or where it looks at what a call did to its
arguments, which cross as copies. It could run beside the program, but then the program could forge it. That is done
only where it is asked for (`forgeable=True`: in an evaluation, not for a reward), and the verdict says so.
"""

import ast
import builtins
import contextlib
import gc
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from evals import sandbox

LONGEST = 1 << 22  # characters of a message that is read from a program
SPARE = 30  # seconds in which the processes of a case begin and end, where there is much to do


class Case(NamedTuple):
    program: str
    test: str  # code that raises where the program is wrong
    calls: tuple[str, ...]  # names of the program's functions that the test calls


class Verdict(NamedTuple):
    passed: bool
    reason: str = ""  # why it did not pass
    forgeable: bool = False  # the test ran beside the program, which could have made itself pass


# ---- what is asked of it ---------------------------------------------------------------------------------------------
def judge(
    cases: list[Case], seconds: int = 5, workers: int = 0, forgeable: bool = False, weak: bool = False
) -> list[Verdict]:
    """Returns a verdict on each case, of which `workers` (0: as many as there are cores) run at a time.

    A case passes where its program runs to the end and then its test does, within so many seconds.
    forgeable: run a test that cannot be carried beside the program. Without it such a case does not pass.
    weak: go on with what this system has of the sandbox. Without it a part that is missing is a ValueError.
    """
    from concurrent.futures import ThreadPoolExecutor

    lacking = sandbox.missing()
    if lacking and not weak:
        names = ", and no ".join(lacking)
        raise ValueError(f"no sandbox for programs: this system has no {names}. --sandbox=weak goes on without")
    if not workers:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    with started_server(seconds, lacking) as server, ThreadPoolExecutor(workers) as pool:
        working = decide(server, Case("def same(x): return x", "assert same(1) == 1", ("same",)), seconds, forgeable)
        if not working.passed:
            raise ValueError(f"no program can run in the sandbox here: {working.reason}")
        return list(pool.map(lambda case: decide(server, case, seconds, forgeable), cases))


def decide(server: socket.socket, case: Case, seconds: int, forgeable: bool) -> Verdict:
    """Returns the verdict on a case, where that is allowed by a second try beside its test."""
    said, _, reason = ask(server, case, seconds).partition(" ")
    if said != "uncarried":
        return Verdict(said == "passed", reason)
    if not forgeable:
        return Verdict(False, f"refused, since only a forgeable test would do: {reason}")
    beside = Case("", f"{case.program}\n{case.test}", ())
    said, _, reason = ask(server, beside, seconds).partition(" ")
    return Verdict(said == "passed", reason, forgeable=True)


@contextlib.contextmanager
def started_server(seconds: int, lacking: list[str]) -> Iterator[socket.socket]:
    """Yields a socket to a new process that forks keepers: a small interpreter without torch or secrets."""
    start = "import sys; sys.path.insert(0, sys.argv[1]); from evals import judge; judge.serve(*sys.argv[2:])"
    root = Path(__file__).resolve().parent.parent
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ours:
        folder = os.path.realpath(folder)
        command = [sys.executable, "-I", "-B", "-c", start, str(root), folder, str(seconds), *lacking]
        process = subprocess.Popen(command, env={}, stdin=theirs, start_new_session=True)
        theirs.close()
        try:
            yield ours
        finally:
            ours.close()  # at which it ends
            process.wait()


def ask(server: socket.socket, case: Case, seconds: int) -> str:
    """Returns "passed", "failed why" or "uncarried why", as the processes of a case say it."""
    ours, theirs = socket.socketpair()
    with ours:
        socket.send_fds(server, [b"c"], [theirs.fileno()])
        theirs.close()
        ours.settimeout(seconds + SPARE)
        try:
            ours.sendall(literal(tuple(case)).encode() + b"\n")
            line = ours.makefile("rb").readline(1000).decode("ascii", "replace").strip()
        except OSError as error:
            line = f"failed {error}"
    return line or "failed the test's process ended before its test"


# ---- literals --------------------------------------------------------------------------------------------------------
class NotLiteral(Exception):
    """A value that has no literal."""


def literal(value: Any) -> str:
    """Returns a value as text, on one line of ASCII, of which `ast.literal_eval` makes it again; else NotLiteral.

    An instance of a class that is made from one of these (a Counter, a named tuple) crosses as the plain value.
    """
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return hex(value)  # Python converts any number of hexadecimal digits, but not of decimal ones
    if isinstance(value, float) and not math.isnan(value):
        return repr(float(value)).replace("inf", "1e999")  # a number too large to be finite
    if isinstance(value, str):
        return ascii(str.__str__(value))
    if isinstance(value, bytes):
        return ascii(bytes(value))
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(literal(item) + ", " for item in value) + ")"
    if isinstance(value, set) and value:
        return "{" + ", ".join(map(literal, value)) + "}"
    if isinstance(value, set):
        return "set()"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    raise NotLiteral(f"a {type(value).__name__} is no literal")


# ---- the fork server and the keeper ----------------------------------------------------------------------------------
def serve(folder: str, seconds: str, *lacking: str) -> None:
    """Forks a keeper for each file that comes through file 0: the end of a socket for one case and its verdict.

    Nothing else is read here, cases least of all: a program finds nothing in the memory that it has from this process.
    """
    # 1. what many programs import, once
    for name in ("bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "json", "operator",
                 "random", "re", "string", "typing"):  # fmt: skip
        __import__(name)
    gc.freeze()  # the collector leaves these objects alone, so that their pages stay shared

    # 2. When the first process in a namespace ends, the kernel ends all that are in it.
    sandbox.enter_namespaces(folder)
    os.chdir(folder)
    if os.fork():
        os.close(0)
        os.wait()
        os._exit(0)

    # 3. a keeper for each case
    connection = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    server = os.getpid()
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1, 1)
        if not message:  # whoever asked is done, or is gone
            os._exit(0)
        if os.fork() == 0:
            sandbox.end_with(server)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(files[0], int(seconds), list(lacking))
            os._exit(0)
        os.close(files[0])


def keep(judge_file: int, seconds: int, lacking: list[str]) -> None:
    """Starts the two processes of a case, and ends both when the test's has ended or the time is over."""
    test_end, program_end = socket.socketpair()
    program = start(run_program, [program_end.fileno()], seconds, lacking)
    program_end.close()
    test = start(run_test, [judge_file, test_end.fileno()], seconds, lacking)
    test_end.close()

    def end(*_):
        with contextlib.suppress(OSError):  # it has ended just now, or nobody is left to read this
            os.kill(test, signal.SIGKILL)
            os.write(judge_file, b"failed no end within %d seconds\n" % seconds)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    os.waitpid(test, 0)
    signal.alarm(0)
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    for process in (program, test):
        shutil.rmtree(str(process), ignore_errors=True)


def start(work: Callable, files: list[int], seconds: int, lacking: list[str]) -> int:
    """Returns the number of a new, confined process, which reads and writes some files and has a folder to itself."""
    keeper = os.getpid()
    process = os.fork()
    if process:
        return process
    try:
        sandbox.end_with(keeper)
        readers = [open(file, encoding="ascii", closefd=False) for file in files]
        writers = [open(file, "w", encoding="ascii", closefd=False) for file in files]
        folder = os.path.abspath(str(os.getpid()))
        os.mkdir(folder)
        os.chdir(folder)
        sandbox.confine(folder, files, seconds, lacking)
        work(*readers, *writers)
    except BaseException as error:
        print(f"sandbox: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


def names_of_a_module(name: str) -> dict[str, Any]:
    """Returns the names of a new module, which Python knows: a dataclass looks for the module that it is in."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return vars(module)


# ---- the program's process -------------------------------------------------------------------------------------------
def run_program(questions, answers) -> None:
    """Runs the program that the first line holds, then answers each line (name, arguments, named arguments)."""
    program = ast.literal_eval(questions.readline())
    namespace = names_of_a_module("program")

    def define():
        exec(compile(program, "program", "exec"), namespace)

    answers.write(attempt(define, (), {}) + "\n")
    answers.flush()
    for line in questions:
        name, arguments, named = ast.literal_eval(line)
        answers.write(attempt(namespace.get(name), arguments, named) + "\n")
        answers.flush()


def attempt(function: Callable, arguments: tuple, named: dict) -> str:
    """Calls a function, and returns one of three answers as a literal.

    ("value", the result, whether it changed its arguments)
    ("error", the name of the exception, its message)
    ("not literal", what is none, None)
    """
    before = literal((arguments, named))
    try:
        value = function(*arguments, **named)
    except BaseException as error:
        return literal(("error", type(error).__name__, str(error)))
    try:
        return literal(("value", value, literal((arguments, named)) != before))
    except NotLiteral as error:
        return literal(("not literal", str(error), None))


# ---- the test's process ----------------------------------------------------------------------------------------------
class Lost(BaseException):
    """Nothing more can be asked of the program: no Exception, so that a test does not take it for the program's."""


class Program:
    """The program in the other process, as a test calls it."""

    def __init__(self, answers, questions):
        self.answers = answers
        self.questions = questions
        self.lost = ""  # why nothing more can be asked of it
        self.uncarried = ""  # what could not be carried
        self.changes_arguments = False

    def lose(self, reason: str) -> None:
        """Ends the test, whose verdict this is even where it catches everything."""
        self.lost = self.lost or reason
        raise Lost(self.lost)

    def send(self, question: str) -> Any:
        """Returns the result that answers a question, or raises the exception that does."""
        kind, first, second = self.exchange(question)
        if kind == "value":
            if second is True:
                self.changes_arguments = True
            return first
        if kind == "not literal":
            self.uncarried = f"the result, {first}"
            self.lose(self.uncarried)
        error = getattr(builtins, first, None)
        if isinstance(error, type) and issubclass(error, Exception):
            raise error(second)
        self.lose(f"{first}: {second}")

    def exchange(self, question: str) -> tuple:
        """Sends a question and returns its answer, which has three parts: a program can write what it likes there."""
        if self.lost:
            raise Lost(self.lost)
        try:
            self.questions.write(question + "\n")
            self.questions.flush()
            line = self.answers.readline(LONGEST)
            if not line.endswith("\n"):
                raise EOFError("it ended, or its answer is too long")
            kind, first, second = ast.literal_eval(line)
            if kind != "value" and not isinstance(first, str):
                raise TypeError("its answer is none")
        except (OSError, EOFError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            self.lose(f"the program's process gives no answer: {error}")
        return kind, first, second

    def function(self, name: str) -> Callable:
        """Returns what a test calls in place of the program's function of that name."""

        def call(*arguments, **named):
            try:
                question = literal((name, arguments, named))
            except NotLiteral as error:
                self.uncarried = f"an argument, {error}"
                self.lose(self.uncarried)
            return self.send(question)

        return call


def run_test(cases, answers, verdicts, questions) -> None:
    """Runs the test of the case that is read, against the program in the other process, and writes the verdict."""
    case = Case(*ast.literal_eval(cases.readline()))
    program = Program(answers, questions)
    namespace = names_of_a_module("test")
    namespace.update({name: program.function(name) for name in case.calls})
    verdict = "passed"
    try:
        program.send(literal(case.program))
        exec(compile(case.test, "test", "exec"), namespace)
    except BaseException as error:
        verdict = f"failed {type(error).__name__}: {error}"
        if program.changes_arguments and not program.uncarried:
            program.uncarried = "arguments that the program changes"
    if program.lost:
        verdict = f"failed {program.lost}"
    if program.uncarried:
        verdict = f"uncarried {program.uncarried}"
    printable = "".join(char if char.isprintable() and char.isascii() else "?" for char in verdict)
    verdicts.write(printable[:300] + "\n")
    verdicts.flush()
