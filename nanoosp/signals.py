"""The signals that stop a run."""

import math
import signal
import time

from nanoosp.options import exit_at_once


class StopSignal:
    """Remembers Ctrl-C or SIGTERM, so that the step can be finished. A second Ctrl-C ends at once.

    Second means at least two seconds later: torchrun passes on what a terminal has already sent.
    """

    def __init__(self):
        self.received, self.when = 0, math.inf
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        if number == signal.SIGINT and time.monotonic() > self.when + 2:
            exit_at_once()
        self.received, self.when = number, min(self.when, time.monotonic())

    @staticmethod
    def forget():
        """From now on signals do what they usually do."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
