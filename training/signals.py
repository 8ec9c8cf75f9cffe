"""How a run ends before its last step: a signal asks it to finish the step at work, save and stop."""

import os
import signal
import sys
import time

DIVERGED = 3  # the exit code of a run that gave up after too many steps without a finite gradient
ASK_TO_STOP = ("SIGTERM", "SIGINT", "SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2")  # USR1: SLURM's before the time is up
COPIES = 1.0  # seconds in which a launcher's copy of the same signal may follow


class StopSignals:
    """Notes the signals that ask to stop, from the moment that it is made.

    A launcher such as torchrun passes on what its processes got themselves, so a second signal is no second wish, but
    for a Ctrl-C some time after the first: that ends the process at once. What a parent had ignored (nohup) stays so.
    A launcher that is gone asks to stop as well: nobody would pass on a signal any more.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.received = []
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.interrupted = None  # when the first Ctrl-C came
        for name in ASK_TO_STOP:
            number = getattr(signal, name, None)  # Windows has few of them
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        name = signal.Signals(number).name
        if name == "SIGINT":
            now = time.monotonic()
            if self.interrupted is None:
                self.interrupted = now
                self.say("\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n")
            elif now - self.interrupted > COPIES:
                os._exit(128 + number)
        self.received.append(name)

    def count(self) -> int:
        """Returns how often this process was asked to stop."""
        if self.launcher not in (None, os.getppid()):
            self.launcher = None
            self.received.append("torchrun is gone")
        return len(self.received)

    def say(self, text):
        if not self.quiet:
            os.write(sys.stderr.fileno(), text.encode())  # print may be at work already
