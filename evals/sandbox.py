"""Confines a process before it runs code that nobody has read: what it may open, ask of the kernel, and use up.

These are Linux's own means. They need neither root nor a package, and a process cannot take them off again:

    Landlock     which files: Python's library to read, one empty folder to write in
    seccomp      which calls of the kernel: those that computing needs, so no sockets, processes, signals or devices
    limits       how much time and memory, how many open files and how large ones (man setrlimit)
    namespaces   no network at all, no other process in sight, no disk: on top, where they are permitted

The first two are required, and `missing` names what a system lacks. What is left then is an audit hook of Python, which
stops what a program does by accident; a program that means harm gets around it. Nothing hides which files exist, how
large they are, what time it is, and what the machine is called.
https://docs.kernel.org/userspace-api/landlock.html, https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from functools import cache

LANDLOCK = "Landlock (Linux 5.13 or newer, and not turned off when it started)"
SECCOMP = "seccomp filters (Linux on x86-64 or arm64)"
MEMORY = 1 << 30  # bytes that a process can have
FILE_SIZE = 1 << 20  # bytes of each file that it writes
OPEN_FILES = 64

# ---- calls of the kernel ---------------------------------------------------------------------------------------------
# prctl's requests
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2

# Landlock's own calls have the same numbers on every machine.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446

# Calls that a program may make with any arguments, with their numbers on (x86-64, arm64). Some are of x86-64 alone.
ALLOWED = {
    # memory
    "brk": (12, 214), "madvise": (28, 233), "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216),
    "munmap": (11, 215),
    # files: Landlock says which
    "access": (21, None), "close": (3, 57), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "faccessat": (269, 48), "faccessat2": (439, 439), "fdatasync": (75, 83), "fstat": (5, 80), "fsync": (74, 82),
    "ftruncate": (77, 46), "getcwd": (79, 17), "getdents64": (217, 61), "lseek": (8, 62), "newfstatat": (262, 79),
    "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "pread64": (17, 67), "pselect6": (270, 72),
    "pwrite64": (18, 68), "read": (0, 63), "readlink": (89, None), "readlinkat": (267, 78), "readv": (19, 65),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "select": (23, None), "statx": (332, 291),
    "unlink": (87, None), "unlinkat": (263, 35), "write": (1, 64), "writev": (20, 66),
    # its own threads, and the handling of signals that it gets
    "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98), "membarrier": (324, 283),
    "restart_syscall": (219, 128), "rseq": (334, 293), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sched_getaffinity": (204, 123), "sched_yield": (24, 124),
    "set_robust_list": (273, 99), "set_tid_address": (218, 96), "sigaltstack": (131, 132),
    # time and chance
    "clock_getres": (229, 114), "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "getrandom": (318, 278),
    "getrusage": (98, 165), "gettimeofday": (96, 169), "nanosleep": (35, 101), "time": (201, None), "times": (100, 153),
    # who and where it is
    "getcpu": (309, 168), "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176), "getpid": (39, 172),
    "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "sysinfo": (99, 179), "uname": (63, 160),
}  # fmt: skip

# Calls of which some are allowed: name, its numbers, the argument that decides, its bits that count, and their values.
ALL_BITS = 0xFFFFFFFF
OPEN_MODES = os.O_TRUNC | os.O_RDONLY | os.O_WRONLY | os.O_RDWR
SOMETIMES = [
    # The exact flags of pthread_create in glibc and in musl: a thread, never a process.
    ("clone", (56, 220), 0, ALL_BITS, [0x3D0F00, 0x7D0F00]),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. Others (F_SETOWN, F_SETSIG) send signals to any process.
    ("fcntl", (72, 25), 1, ALL_BITS, [0, 1, 2, 3, 1030]),
    # All but truncating a file that is opened for reading, which Landlock does not see before Linux 6.2.
    ("openat", (257, 56), 2, OPEN_MODES,
     [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC]),
]  # fmt: skip
CLONE3 = 435  # "no such call" makes the C library use clone, whose flags a filter can read

# Where each kind of machine stands in the tables, and what the kernel calls it (linux/audit.h).
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


@cache
def c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def kernel_call(name: str, *arguments) -> int:
    """Calls a function of the C library; an OSError where it fails."""
    function = getattr(c_library(), name)
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = function(*words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


# ---- what there is ---------------------------------------------------------------------------------------------------
@cache
def landlock_version() -> int:
    """Returns the version of Landlock that the kernel has, 0 for none."""
    try:
        return kernel_call("syscall", LANDLOCK_CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def has_seccomp() -> bool:
    """Whether the kernel takes filters, and ALLOWED has the numbers of this machine's calls."""
    if platform.machine() not in MACHINES or struct.calcsize("P") != 8:
        return False
    try:
        kernel_call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)
    except OSError as error:
        return error.errno == errno.EFAULT  # it would take a filter, but finds none at address 0
    return False


def missing() -> list[str]:
    """Returns the names of the required parts that this system lacks."""
    if sys.platform != "linux":
        return [LANDLOCK, SECCOMP]
    lacking = []
    if landlock_version() == 0:
        lacking.append(LANDLOCK)
    if not has_seccomp():
        lacking.append(SECCOMP)
    return lacking


# ---- Landlock --------------------------------------------------------------------------------------------------------
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_FILE = 1 << 5
MAKE_FILE = 1 << 8
TRUNCATE = 1 << 14
READ = READ_FILE | READ_DIR
READ_AND_WRITE = READ | WRITE_FILE | REMOVE_FILE | MAKE_FILE | TRUNCATE


def readable() -> list[str]:
    """Returns the folders of Python's library, of what is installed for it, and of shared libraries.

    A folder that an editable install added to sys.path is somebody's work, and is left out.
    """
    prefixes = (sys.prefix + os.sep, sys.base_prefix + os.sep)
    python = [path for path in sys.path if path.startswith(prefixes)]
    return [*python, f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]


def restrict_files(folder: str) -> None:
    """Leaves this process the folders of `readable` to read, `folder` to write files in, and /dev/null."""
    version = landlock_version()
    n_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # later versions know more that can be refused
    rights = (1 << n_rights) - 1
    network = 0b11 if version >= 4 else 0  # bind and connect of TCP
    scopes = 0b11 if version >= 6 else 0  # abstract sockets and signals to processes outside
    attributes = struct.pack("QQQ", rights, network, scopes)
    rules = kernel_call("syscall", LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)

    allowed = {path: READ for path in readable()}
    allowed["/dev/null"] = READ_FILE | WRITE_FILE
    allowed[folder] = READ_AND_WRITE
    for path, access in allowed.items():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            opened = os.open(path, os.O_PATH if path == "/dev/null" else os.O_PATH | os.O_DIRECTORY)
            rule = struct.pack("=Qi", access & rights, opened)
            kernel_call("syscall", LANDLOCK_ADD_RULE, rules, 1, rule, 0)
            os.close(opened)
    kernel_call("syscall", LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


# ---- seccomp ---------------------------------------------------------------------------------------------------------
ALLOW = 0x7FFF0000
KILL = 0x80000000
ERROR = 0x00050000  # with the number of an error


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Returns an instruction of the filter (struct sock_filter); the last two are numbers of instructions to skip."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def load(offset: int) -> bytes:
    return instruction(0x20, offset)


def keep_bits(mask: int) -> bytes:
    return instruction(0x54, mask)


def answer(value: int) -> bytes:
    return instruction(0x06, value)


def if_equal(value: int, then: bytes) -> bytes:
    """Returns `then`, behind a test that skips it unless what was loaded is the value."""
    return instruction(0x15, value, 0, len(then) // 8) + then


@cache
def syscall_filter(machine: str) -> bytes:
    """Returns the program that the kernel runs at each call: it sees struct seccomp_data, of which it loads words."""
    column, known_as = MACHINES[machine]
    refuse = answer(ERROR | errno.EACCES)

    # 1. The numbers below are those of this machine only: the kernel has a second set, of 32 bits.
    program = load(4) + instruction(0x15, known_as, 1, 0) + answer(KILL)

    # 2. the number of the call
    program += load(0)
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            program += if_equal(numbers[column], answer(ALLOW))

    # 3. an argument of the call: the lower half of eight bytes, which begin at 16
    for _, numbers, argument, mask, values in SOMETIMES:
        check = load(16 + 8 * argument) + keep_bits(mask)
        for value in values:
            check += if_equal(value, answer(ALLOW))
        program += if_equal(numbers[column], check + refuse)
    program += if_equal(CLONE3, answer(ERROR | errno.ENOSYS))
    return program + refuse


def restrict_calls() -> None:
    """Leaves this process the calls of ALLOWED, and some of SOMETIMES."""
    program = ctypes.create_string_buffer(syscall_filter(platform.machine()))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(program))
    kernel_call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


# ---- namespaces ------------------------------------------------------------------------------------------------------
NEW_USER = 0x10000000
NEW_OTHERS = 0x20000000 | 0x40000000 | 0x08000000 | 0x00020000  # processes, network, messages, mounts
MOUNT_PRIVATE = 1 << 14 | 1 << 18  # what is mounted here is seen here only
MOUNT_PLAIN = 1 << 1 | 1 << 2 | 1 << 3  # no rights of an owner, no devices, no programs


def enter(flags: int, folder: str) -> None:
    """Enters new namespaces, in which `folder` is in memory; an OSError where they are not permitted."""
    user = os.getuid()
    group = os.getgid()
    kernel_call("unshare", flags)
    if flags & NEW_USER:  # everyone keeps the own number, and nobody else has one
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    kernel_call("mount", b"none", b"/", None, MOUNT_PRIVATE, None)
    kernel_call("mount", b"tmpfs", folder.encode(), b"tmpfs", MOUNT_PLAIN, b"size=64m,nr_inodes=4k,mode=700")


def enter_namespaces(folder: str) -> bool:
    """Enters new namespaces with those of users, or as root without; False where neither is permitted.

    Processes that are started after this are in them. A child tries first, since half of it could not be undone.
    """
    for flags in (NEW_USER | NEW_OTHERS, NEW_OTHERS):
        child = os.fork()
        if child == 0:
            try:
                enter(flags, folder)
                os._exit(0)
            except (OSError, AttributeError):
                os._exit(1)
        if os.waitpid(child, 0)[1] == 0:
            enter(flags, folder)
            return True
    return False


def end_with(parent: int) -> None:
    """Lets the kernel end this process when the one that forked it ends, where namespaces do not."""
    if sys.platform == "linux":
        kernel_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it has ended already
            os._exit(0)


# ---- all together ----------------------------------------------------------------------------------------------------
def refuse_by_audit(folder: str) -> None:
    """Lets Python itself refuse what leaves the folder or the process, where the kernel cannot.

    Of a program that means harm this is no match: it can change the very functions that are called here.
    """
    families = {"os", "subprocess", "socket", "ctypes", "shutil", "resource", "pty", "signal", "fcntl", "syslog"}
    harmless = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
    inside = folder + os.sep

    def audit(event, arguments):
        refused = event.partition(".")[0] in families and event not in harmless
        if event == "open":
            path, mode, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                # os.open has no mode, and its path could be relative to any folder.
                refused = mode is None or not os.path.abspath(os.fsdecode(path)).startswith(inside)
        if refused:
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(audit)


def confine(folder: str, keep: list[int], seconds: int, lacking: list[str]) -> None:
    """Confines this process for good to the empty folder that it is in, to a number of seconds, and to open files.

    keep: the numbers of the files that stay open, beside three of /dev/null; lacking: as `missing` says.
    """
    import resource  # which Windows has not

    # 1. what it can use up
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))

    # 2. what it can do
    if sys.platform == "linux":
        kernel_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if LANDLOCK not in lacking:
        restrict_files(folder)
    if SECCOMP not in lacking:
        restrict_calls()

    # 3. what it holds; until here an error is seen
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    for number in set(range(3, OPEN_FILES)) - set(keep):
        with contextlib.suppress(OSError):
            os.close(number)
    if lacking:
        refuse_by_audit(folder)
