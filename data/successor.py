"""A folder that is written beside another, and takes its place when it is whole."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.progress import NOTE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def lock(out):
    """Keeps other processes from writing `out` until the block ends."""
    path = out.with_name(f".{out.name}.lock")
    busy = f"another prepare.py is writing {out}: wait for it or choose another --out"
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl:
        descriptor = locked(path, busy)
    else:  # The file itself is the lock. It stays where this process is killed, and the user then deletes it.
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            raise ValueError(f"{busy}; if none is running, delete {path}") from None
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if fcntl:
            os.close(descriptor)


def locked(path, busy):
    """Returns the descriptor of a locked file. The system gives the lock back even if this process is killed."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(busy) from None
        # Who had the lock may have deleted the file meanwhile: then another process can lock a new one of its name.
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
        os.close(descriptor)


def sync_folder(folder):
    """Waits until what a folder lists is on the disk. Windows and some network disks have no way to ask for that."""
    if fcntl:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


@contextmanager
def successor(out: Path) -> Iterator[Path]:
    """Makes a folder beside `out`, which takes its place when the block ends without an error.

    If the folder has a NOTE of how far it came, it stays where the block ends with one, and the next block gets it.
    """
    partial = out.with_name(f".{out.name}.partial")
    old = out.with_name(f".{out.name}.old")
    with lock(out):
        try:
            partial.mkdir(exist_ok=True)
            if old.exists() and out.exists():  # a run was killed after the renames below
                shutil.rmtree(old)
            elif old.exists():  # or between them
                os.rename(old, out)
            yield partial
            (partial / NOTE).unlink(missing_ok=True)
            sync_folder(partial)
            if out.exists():
                os.rename(out, old)
            os.rename(partial, out)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if (partial / NOTE).exists():
                print(f"whole shards stay in {partial}: the same command goes on there", file=sys.stderr)
            else:
                shutil.rmtree(partial, ignore_errors=True)
