"""Programs that a model wrote: what they may not do to the machine, and how they may not pass a test."""

import ast
import contextlib
import errno
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from pathlib import Path

import pytest

import eval as evaluation
from evals import sandbox
from evals.judge import Case, NotLiteral, judge, literal
from tests.tiny import ROOT

LACKING = sandbox.missing()
complete = pytest.mark.skipif(bool(LACKING), reason=f"this system has no {LACKING}")
NOBODY = 65534
KEY = {"API_KEY": "secret"}

# Prints the verdicts on the cases that are read; "alone" takes the right to new namespaces away first.
JUDGE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from evals import sandbox
from evals.judge import Case, judge
if sys.argv[2] == "alone":
    unshare = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    refuse = sandbox.if_equal(unshare, sandbox.answer(sandbox.ERROR | 1))
    sandbox.syscall_filter = lambda machine: sandbox.load(0) + refuse + sandbox.answer(sandbox.ALLOW)
    sandbox.kernel_call("prctl", sandbox.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    sandbox.restrict_calls()
    assert not sandbox.enter_namespaces("/tmp")
print(json.dumps(judge([Case(*case) for case in json.load(sys.stdin)], seconds=int(sys.argv[3]), workers=4)))
"""


# ---- isolation -------------------------------------------------------------------------------------------------------
# Each raises an OSError or a MemoryError, or else it has done what it tries.
FILES = """
open(victim, 'w')
open(victim, 'a')
open(victim).read()
open(os.path.relpath(victim), 'w')
os.open(victim, os.O_RDONLY | os.O_TRUNC)
os.truncate(victim, 0)
os.chmod(victim, 0o777)
os.utime(victim)
os.listdir(os.path.dirname(victim))
os.mkdir(new)
os.mkfifo(new)
os.mknod(new)
os.symlink(victim, new)
os.symlink(victim, 'here')
os.link(victim, new)
os.rename(victim, new)
os.remove(victim)
posixpath.abspath = lambda path: os.getcwd() + '/here'; open(victim, 'w')
vars(__main__).update(here='/', families=set(), harmless={'open'}); open(victim, 'w')
import readline; readline.write_history_file(new)
check(libc.open(victim.encode(), os.O_WRONLY))
check(libc.rename(victim.encode(), new.encode()))
open('/etc/passwd').read()
"""
OTHER_PROCESSES = """
check(('API_KEY' in os.environ) - 1)
open(f'/proc/{pid}/environ', 'rb').read()
open(f'/proc/{os.getppid()}/environ', 'rb').read()
open(f'/proc/{pid}/mem', 'rb')
os.kill(pid, signal.SIGCONT)
os.kill(os.getppid(), signal.SIGCONT)
signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGCONT)
fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, pid)
fcntl.fcntl(os.pipe()[0], 10, signal.SIGCONT)
resource.prlimit(pid, resource.RLIMIT_CORE)
os.sched_setaffinity(pid, os.sched_getaffinity(0))
os.setpriority(os.PRIO_PROCESS, pid, 19)
check(libc.ptrace(0, 0, 0, 0))
"""
NEW_PROCESSES = """
os.fork() or os._exit(0)
check(-os.system('true'))
import subprocess; subprocess.run(['true'])
os.posix_spawn('/bin/true', ['true'], {})
check(libc.syscall(clone, ctypes.c_long(signal.SIGCHLD), 0, 0, 0, 0)) or os._exit(0)
check(libc.fork()) or os._exit(0)
"""
NETWORK = """
socket.socket()
socket.socketpair()
socket.socket(socket.AF_UNIX).bind('here')
socket.create_connection(('127.0.0.1', port), 1)
import asyncio; asyncio.run(asyncio.sleep(0))
"""
AMOUNTS = """
import mmap; mmap.mmap(-1, 2 << 30)
open('big', 'wb').write(bytes(3 << 20))
[open('/dev/null') for _ in range(100)]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
"""
# These end or change the process, or not every system has them.
KERNEL = """
os.execv('/bin/true', ['true'])
os.setxattr(victim, 'user.a', b'b')
check(libc.unshare(0))
check(libc.mount(b'none', b'/', None, 1 << 14, None))
check(libc.syscall(425, 1, ctypes.create_string_buffer(200)))
check(libc.personality(0))
check(libc.prctl(15, b'name'))
"""
ATTACKS = [line for line in (FILES + OTHER_PROCESSES + NEW_PROCESSES + NETWORK + AMOUNTS).split("\n") if line]
KERNEL = [line for line in KERNEL.split("\n") if line]
PROGRAM = """
import __main__, ctypes, fcntl, os, posixpath, resource, signal, socket
libc = ctypes.CDLL(None, use_errno=True)
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def attack(victim, new, pid, port):
    try:
        ATTACK
    except (OSError, MemoryError) as error:
        return "refused"
    return "possible"
"""


@pytest.fixture
def world_readable():
    """A folder that every user may read and search, unlike tmp_path, with a copy of what judges programs."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "evals").mkdir()
        for name in ("__init__", "sandbox", "judge"):
            shutil.copy(ROOT / "evals" / f"{name}.py", Path(folder) / "evals")
        yield Path(folder)


@pytest.fixture(params=["root", "an ordinary user"])
def started_as(request):
    """What starts a process as root, or as another: (the Python to start, arguments for subprocess)."""
    if request.param == "root" and os.getuid() != 0:
        pytest.skip("needs tests that are run as root")
    if request.param == "root" or os.getuid() != 0:
        return sys.executable, {}
    other = dict(user=NOBODY, group=NOBODY, extra_groups=[])
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):  # where root's Python lies in a folder of root's own
            command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
            if subprocess.run(command, cwd="/", **other).returncode == 0:
                return python, other
    pytest.skip("there is no Python from 3.11 on that an ordinary user may start")


def output_of(started_as, code, *arguments, text, cwd):
    """Returns what code prints that a user runs, in an environment with a key."""
    python, options = started_as
    command = [python, "-B", "-c", code, *arguments]
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, cwd=cwd, env=KEY, **options)
    assert done.returncode == 0
    return done.stdout


@contextlib.contextmanager
def others(started_as):
    """Yields a process of the user, with a key in its environment, and a port that listens."""
    _, options = started_as
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = subprocess.Popen(["sleep", "600"], env=KEY, **options)
        try:
            yield [process.pid, server.getsockname()[1]]
        finally:
            process.kill()
            process.wait()


def state_of(folder):
    return {path.name: (path.read_text(), path.stat().st_mode) for path in folder.iterdir()}


# Prints those of the attacks that are refused where nothing is confined, each in a folder and a process of its own.
WITHOUT_A_SANDBOX = """
import json, os, sys, tempfile
attacks, others = json.load(sys.stdin)
program = open("program.py").read()
exec(program.replace("ATTACK", "pass"))
for line in attacks:
    child = os.fork()
    if child == 0:
        exec(program.replace("ATTACK", line))
        os.chdir(tempfile.mkdtemp(dir="."))
        open("victim", "w").write("mine")
        said = attack(os.path.abspath("victim"), os.path.abspath("new"), *others)
        os._exit(said != "possible")
    if os.waitpid(child, 0)[1]:
        print(line)
"""


@complete
def test_every_attack_is_possible_without_a_sandbox(started_as, world_readable):
    os.chmod(world_readable, 0o777)
    (world_readable / "program.py").write_text(PROGRAM)
    with others(started_as) as arguments:
        text = json.dumps([ATTACKS, arguments])
        assert output_of(started_as, WITHOUT_A_SANDBOX, text=text, cwd=world_readable) == ""


@complete
@pytest.mark.parametrize("namespaces", ["permitted", "alone"])
def test_no_attack_is_possible_in_the_sandbox(started_as, world_readable, namespaces):
    _, options = started_as
    home = world_readable / "home"
    home.mkdir()
    victim = home / "victim"
    victim.write_text("mine")
    for path in (home, victim):
        os.chown(path, options.get("user", -1), options.get("group", -1))
    before = state_of(home)

    attacks = ATTACKS + KERNEL
    with others(started_as) as arguments:
        arguments = [str(victim), str(home / "new"), *arguments]
        test = f"said = attack(*{arguments!r})\nassert said == 'refused', said"
        cases = [Case(PROGRAM.replace("ATTACK", attack), test, ("attack",)) for attack in attacks]
        folder = str(world_readable)
        said = output_of(started_as, JUDGE, folder, namespaces, "20", text=json.dumps(cases), cwd="/")
    verdicts = json.loads(said)
    assert len(verdicts) == len(attacks)
    assert not {attack: reason for attack, (passed, reason, _) in zip(attacks, verdicts) if not passed}
    assert state_of(home) == before


@complete
@pytest.mark.parametrize("attack", ["open(victim, 'w')", "os.fork() or os._exit(0)", "socket.socket()"])
def test_a_test_is_confined_like_a_program(tmp_path, attack):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    call = f"assert attack({str(victim)!r}, 0, 0, 0) == 'refused'"
    assert judge([Case("", PROGRAM.replace("ATTACK", attack) + call, ())])[0].passed
    assert victim.read_text() == "mine"


@complete
def test_a_program_computes_with_threads_and_files_of_its_own():
    program = """
import threading, collections, decimal, random, re
def double(n):
    done = []
    thread = threading.Thread(target=lambda: done.append(2 * n))
    thread.start()
    thread.join()
    with open("mine.txt", "w") as file:
        file.write("é")
    return done[0], open("mine.txt").read(), input() if n < 0 else ""
"""
    assert judge([Case(program, "assert double(2) == (4, 'é', '')", ("double",))])[0].passed
    assert "EOFError" in judge([Case(program, "double(-1)", ("double",))])[0].reason


@complete
def test_time_is_limited_for_programs_and_for_tests():
    never = "while True: pass"
    sleeps = "import time; time.sleep(60)"
    cases = [Case(never, "", ()), Case(sleeps, "", ()), Case("", never, ()), Case("", sleeps, ())]
    start = time.monotonic()
    verdicts = judge(cases, seconds=3, workers=4)
    assert not any(verdict.passed for verdict in verdicts)
    assert "no end within 3 seconds" in verdicts[1].reason
    assert time.monotonic() - start < 20


@complete
def test_a_process_ends_after_its_seconds_even_where_nobody_is_left_to_watch(tmp_path):
    code = f"from evals import sandbox; sandbox.confine({str(tmp_path)!r}, [], 1, []); exec('while True: pass')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == -9


def processes_that_name(text):
    names = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            names.append(path.read_bytes().decode(errors="replace"))
    return [name for name in names if text in name]


@complete
@pytest.mark.parametrize("namespaces", ["permitted", "alone"])
def test_no_process_is_left_of_a_judge_that_is_killed(tmp_path, namespaces):
    command = [sys.executable, "-c", JUDGE, str(ROOT), namespaces, "500"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)
    try:
        json.dump([Case("import time; time.sleep(600)", "", ())] * 2, process.stdin)
        process.stdin.close()
        wait_until(lambda: len(processes_that_name(str(tmp_path))) >= 8)  # 2 of the server, 3 of each case
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not processes_that_name(str(tmp_path)))


def wait_until(happens, seconds=60):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_namespaces_hide_the_network_and_other_processes_where_they_are_permitted(tmp_path):
    code = f"""
import os, sys
from evals import sandbox
if not sandbox.enter_namespaces({str(tmp_path)!r}):
    sys.exit("not permitted")
open({str(tmp_path / "in_memory")!r}, "w").close()
if os.fork() == 0:
    assert os.getpid() == 1
    assert len(open("/proc/net/dev").readlines()) == 3  # two of headings, and the loopback
    print("hidden", flush=True)
    os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if "not permitted" in done.stderr:
        pytest.skip("new namespaces are not permitted here")
    assert done.stdout == "hidden\n", done.stderr
    assert not list(tmp_path.iterdir())


# ---- the filter of each machine --------------------------------------------------------------------------------------
def run_filter(program, call, arguments=(0,) * 6, machine=None):
    """Returns what the kernel would do at a call: the filter's machine in a few lines of Python."""
    data = struct.pack("<IIQ6Q", call, machine, 0, *arguments)
    place = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("HBBI", program, 8 * place)
        place += 1
        if code == 0x20:  # load a word
            (loaded,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:  # and
            loaded &= value
        elif code == 0x15:  # jump
            place += if_true if loaded == value else if_false
        else:
            assert code == 0x06  # return
            return value


@pytest.mark.parametrize("machine", sandbox.MACHINES)
def test_the_filter_lets_threads_start_and_no_processes_on_each_machine(machine):
    column, known_as = sandbox.MACHINES[machine]
    program = sandbox.syscall_filter(machine)
    refused = sandbox.ERROR | errno.EACCES
    clone, fcntl, openat = (numbers[column] for _, numbers, *_ in sandbox.SOMETIMES)

    def at(call, *arguments, machine=known_as):
        return run_filter(program, call, [*arguments, *[0] * (6 - len(arguments))], machine)

    for numbers in sandbox.ALLOWED.values():
        assert numbers[column] is None or at(numbers[column]) == sandbox.ALLOW
    assert at(clone, 0x3D0F00) == sandbox.ALLOW  # pthread_create
    assert at(clone, 0x1200011) == refused  # fork
    assert at(clone, 0x4111) == refused  # vfork
    assert at(clone, 0x7D0F00 | 0x10000000) == refused  # a thread in a namespace of users of its own
    assert at(435) == sandbox.ERROR | errno.ENOSYS  # clone3
    assert at(fcntl, 5, 6) == refused  # F_SETLK
    assert at(fcntl, 5, 3) == sandbox.ALLOW  # F_GETFL
    assert at(fcntl, 5, 8) == refused  # F_SETOWN
    assert at(openat, 0, 0, os.O_CREAT | os.O_WRONLY | os.O_TRUNC) == sandbox.ALLOW
    assert at(openat, 0, 0, os.O_TRUNC) == refused
    assert at(0x40000000) == refused  # x86-64's second set of numbers
    assert at(numbers[column], machine=0x40000003) == sandbox.KILL  # 32 bits


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_calls_are_those_of_the_kernels_headers(machine):
    path = Path(HEADERS[machine])
    if not path.exists():
        pytest.skip(f"there is no {path}")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", path.read_text()))
    numbers.setdefault("newfstatat", numbers.get("fstatat"))
    column, _ = sandbox.MACHINES[machine]
    ours = {name: columns[column] for name, columns in sandbox.ALLOWED.items()}
    ours |= {name: columns[column] for name, columns, *_ in sandbox.SOMETIMES}
    ours["clone3"] = sandbox.CLONE3
    assert {name: number for name, number in ours.items() if str(number) != str(numbers.get(name))} == {}


# ---- what a system lacks ---------------------------------------------------------------------------------------------
def test_a_system_without_a_part_of_the_sandbox_is_refused_by_the_parts_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sandbox, "missing", lambda: [sandbox.LANDLOCK])
    with pytest.raises(ValueError, match="this system has no Landlock .*--sandbox=weak"):
        judge([])
    row = {"prompt": "def one():\n", "test": "def check(f): assert f() == 1", "entry_point": "one"}
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(row))
    with pytest.raises(SystemExit):
        arguments = ["--task_dir", str(tmp_path), "--tasks", "humaneval", "--allow_code_execution"]
        evaluation.main([str(tmp_path), *arguments])
    assert "no Landlock" in capsys.readouterr().err


@pytest.mark.parametrize("lacking", [[sandbox.LANDLOCK], [sandbox.SECCOMP], [sandbox.LANDLOCK, sandbox.SECCOMP]])
def test_a_weak_sandbox_judges_and_stops_accidents(monkeypatch, tmp_path, lacking):
    lacking = [part for part in (sandbox.LANDLOCK, sandbox.SECCOMP) if part in lacking or part in LACKING]
    monkeypatch.setattr(sandbox, "missing", lambda: lacking)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    accidents = [
        f"open({str(victim)!r}, 'w')",
        f"os.remove({str(victim)!r})",
        f"import pathlib; pathlib.Path({str(victim)!r}).rename('x')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        "open('../outside', 'w')",
        "os.fork() or os._exit(0)",
        "os.system('true') and 1 / 0",
        "import subprocess; subprocess.run(['true'])",
        "socket.create_connection(('127.0.0.1', 9), 1)",
        "os.kill(1, 0)",
    ]
    program = """
import os, socket
def accident():
    try:
        ACCIDENT
    except OSError:
        return "refused"
"""
    test = "assert accident() == 'refused'"
    cases = [Case(program.replace("ACCIDENT", line), test, ("accident",)) for line in accidents]
    cases.append(Case("def f(): open('mine', 'w').write('a'); return open('mine').read()", "assert f() == 'a'", ("f",)))
    cases.append(Case("def f(): return 1", "assert f() == 2", ("f",)))
    *verdicts, wrong = judge(cases, weak=True)
    assert not [
        (accident, verdict) for accident, verdict in zip([*accidents, "a file"], verdicts) if not verdict.passed
    ]
    assert not wrong.passed
    assert victim.read_text() == "mine"


# ---- the judge -------------------------------------------------------------------------------------------------------
RIGHT = "def count(text):\n    return {letter: text.count(letter) for letter in set(text)}\n"
TEST = """
expected = {"a": 3, "b": 1, "n": 40 + 2}
def check(candidate):
    assert candidate("aaab" + "n" * 42) == expected
    assert abs(len(candidate("xyz")) - 3) < 1e-6
check(count)
"""
# Each passes where its test runs beside it.
FORGERIES = """
class Yes:
    __eq__ = lambda self, other: True
    __len__ = lambda self: 3
def count(text): return Yes()
---
import sys
def count(text):
    frame = sys._getframe()
    while frame:
        if "expected" in frame.f_globals:
            return frame.f_globals["expected"] if len(text) > 3 else "abc"
        frame = frame.f_back
    return {}
---
import gc
def count(text):
    for thing in gc.get_objects():
        if isinstance(thing, dict) and "expected" in thing:
            return thing["expected"] if len(text) > 3 else "abc"
    return {}
---
import builtins, sys
sys.settrace(None)
class Dictionary(dict):
    __eq__ = lambda self, other: True
    __len__ = lambda self: 3
def count(text): return Dictionary()
---
import os
def count(text):
    for file in range(3, 64):
        try:
            os.write(file, b"passed\\n")
        except OSError:
            pass
    os._exit(0)
---
import sys
def count(text):
    frame = sys._getframe(1)
    while frame:
        for name, value in frame.f_locals.items():
            if name == "verdicts":
                value.write("passed\\n")
                value.flush()
        frame = frame.f_back
""".split("---\n")
# These pass nowhere.
FAILURES = """
import os; os._exit(43)
import os; os._exit(0)
import sys; sys.exit(0)
exit(0)
quit()
raise SystemExit(0)
raise SystemExit
print("passed")
raise KeyboardInterrupt
raise GeneratorExit
import os; os.abort()
import ctypes; ctypes.string_at(0)
import atexit, os; atexit.register(os._exit, 43); raise SystemExit
import threading, os; threading.Thread(target=os._exit, args=(0,)).start()
import sys; print("passed", file=sys.stderr); sys.exit(43)
import builtins; builtins.AssertionError = Exception
import builtins, sys; builtins.exec = builtins.compile = sys.exit
"""
FAILURES = [line for line in FAILURES.split("\n") if line]


@complete
def test_no_program_makes_itself_pass():
    cases = [Case(program, TEST, ("count",)) for program in [RIGHT, *FORGERIES]]
    cases += [Case(line, TEST, ("count",)) for line in FAILURES]
    cases += [Case(f"def count(text):\n    {line}", TEST, ("count",)) for line in FAILURES]
    right, *others = judge(cases)
    assert right.passed and not right.forgeable
    assert not [case.program for case, verdict in zip(cases[1:], others) if verdict.passed]


@complete
def test_beside_a_test_the_forgeries_pass_and_leaving_does_not():
    beside = [Case("", f"{program}\n{TEST}", ()) for program in [*FORGERIES, *FAILURES]]
    passed = [verdict.passed for verdict in judge(beside)]
    assert passed == [True] * len(FORGERIES) + [False] * len(FAILURES)


@complete
def test_the_example_of_the_documentation_says_what_happens():
    (example,) = re.findall(r"```python\n(.*?)\n```", (ROOT / "docs" / "evaluation.md").read_text(), flags=re.S)
    before, _, last = example.rpartition("\n")
    call, _, result = last.partition("  # ")
    names = {}
    exec(before, names)
    assert repr(eval(call, names)) == result


@complete
def test_a_program_that_changes_its_arguments_does_not_change_what_is_expected():
    case = Case("def order(x): x.clear(); return []", "x = [2, 1]\nassert order(x) == sorted(x)", ("order",))
    verdict = judge([case])[0]
    assert not verdict.passed and "arguments that the program changes" in verdict.reason
    right = Case("def order(x): x.sort(); return x", "assert order([2, 1]) == [1, 2]", ("order",))
    assert judge([right])[0].passed


# What is no literal: (a program with GOOD in it, what is right and what is wrong there, a test, what it calls)
NOT_CARRIED = {
    "a result": (
        "def evens(n): return iter(range(0, n, GOOD))",
        "2",
        "3",
        "assert list(evens(5)) == [0, 2, 4]",
        "evens",
    ),
    "an argument": (
        "def twice(f, x): return GOOD",
        "f(f(x))",
        "f(x)",
        "assert twice(lambda x: x * 3, 1) == 9",
        "twice",
    ),
    "what is changed": ("def order(x): x.GOOD", "sort()", "pop()", "x = [2, 1]\norder(x)\nassert x == [1, 2]", "order"),
    "a class": ("class Box:\n    def get(self): return GOOD", "5", "6", "assert Box().get() == 5", "Box"),
}


@complete
@pytest.mark.parametrize("what", NOT_CARRIED)
def test_a_test_that_cannot_be_carried_counts_only_where_that_is_asked_for_and_is_labelled(what):
    program, good, bad, test, name = NOT_CARRIED[what]
    right = Case(program.replace("GOOD", good), test, (name,))
    wrong = Case(program.replace("GOOD", bad), test, (name,))
    (refused,) = judge([right])
    assert not refused.passed and refused.reason.startswith("refused, since only a forgeable test would do")
    allowed, failed = judge([right, wrong], forgeable=True)
    assert allowed.passed and allowed.forgeable
    assert not failed.passed


@complete
def test_an_exception_of_the_program_is_the_same_exception_in_the_test():
    program = "def root(x):\n    if x < 0: raise ValueError('negative')\n    return x ** 0.5"
    test = """
try:
    root(-1)
except ValueError as error:
    assert str(error) == "negative"
else:
    raise AssertionError
assert root(4) == 2
"""
    assert judge([Case(program, test, ("root",))])[0].passed
    swallows = "try:\n    root(1)\nexcept:\n    pass"
    assert not judge([Case("def root(x): raise SystemExit", swallows, ("root",))])[0].passed


@complete
def test_a_batch_of_programs_keeps_its_order_and_runs_in_parallel():
    cases = [
        Case(f"import time; time.sleep(0.5)\ndef f(): return {i % 3}", "assert f() == 1", ("f",)) for i in range(24)
    ]
    start = time.monotonic()
    verdicts = judge(cases, seconds=30, workers=12)
    assert [verdict.passed for verdict in verdicts] == [i % 3 == 1 for i in range(24)]
    assert time.monotonic() - start < 24 * 0.5


LITERALS = [
    *[None, True, 0, -7, 10**5000, 0.1, -1e300, float("inf"), -float("inf")],
    *["", "a\n'\"é\ud800", b"", b"\x00\n"],
    *[[], [1, [2]], (), (1,), (1, (2, "3")), {}, {1: [2], (3,): None}, set(), {1, 2}],
]


def test_a_literal_is_one_line_of_ascii_that_is_read_back_as_the_same():
    for value in LITERALS:
        text = literal(value)
        assert text.isascii() and "\n" not in text
        again = ast.literal_eval(text)
        assert again == value and type(again) is type(value)


def test_what_is_made_from_a_literals_class_crosses_as_the_plain_value_and_others_do_not():
    class Name(str):
        __str__ = __repr__ = lambda self: "forged"

    assert literal(Counter("aab")) == literal({"a": 2, "b": 1})
    assert literal(OrderedDict(a=1)) == literal({"a": 1})
    assert literal(Name("true")) == literal("true")
    for other in (float("nan"), object(), len, range(3), frozenset(), 1j, iter([]), [object()], {"a": {1: len}}):
        with pytest.raises(NotLiteral):
            literal(other)
