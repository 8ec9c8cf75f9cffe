"""What a command prints: where nobody reads it (`| head`) or the disk is full, and what it says of a mistake."""

import atexit
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import processes
from training.disk import CheckpointError


class LastingStream:
    """A text stream that loses what cannot be written, instead of raising."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.lost(error)

    def lost(self, error) -> None:
        """With nobody left to read, all that is still printed goes nowhere; on a full disk there may be room later."""
        if error.errno == errno.EPIPE:
            self.leads_nowhere()

    def leads_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def at_exit(self) -> None:
        try:
            self.stream.flush()
        except OSError:  # Python would end with code 120 for what is still in the buffer
            self.leads_nowhere()


def outlast_readers() -> None:
    """Makes sys.stdout and sys.stderr lasting ones."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LastingStream):
            lasting = LastingStream(stream)
            setattr(sys, name, lasting)
            atexit.register(lasting.at_exit)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the process with one line and code 2 where something that a user gave is wrong.

    That is what these four say: a file that is not there, a value, a package to install, a checkpoint. All others are
    mistakes of ours, and keep the traceback that says where. A Ctrl-C ends it with the code that shells have for that.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, ImportError, CheckpointError) as error:
        processes.fail(error)
