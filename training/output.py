"""What a run prints, where the reader may go (`| head`) and the disk may fill up: that ends no run."""

import atexit
import errno
import os
import sys


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
