"""Leaving at the end of a step when asked to: by SIGTERM of a queue that pre-empts, by Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

from contrastive_core.gather import world

ASKS = (signal.SIGTERM, signal.SIGINT)

PATIENCE = 2.0
"""Seconds within which another Ctrl-C is the same one: `accelerate launch` hands on what its processes have had too."""


class Stopped(SystemExit):
    """A run that was asked to stop has saved its state and ends, with the exit code of a process that the signal ended.

    Example: after SIGTERM the code is 143, after Ctrl-C 130.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopRequest:
    """Listens for SIGTERM and SIGINT within a `with`. A later second Ctrl-C ends the process at once.

    Any process of a run may get the signal, at any moment, and all have to leave after the same step: they tell each
    other once a step, and look at the answer a step later, when it has come without anyone having waited for it.

    Only Python's main thread may listen; in another one nothing is ever asked.
    """

    def __init__(self) -> None:
        self._number, self._since = 0, 0.0
        self._before: dict[int, Any] = {}
        self._answer: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in ASKS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._answer is not None and exception[0] is None:  # after an error elsewhere nobody answers
            self._answer[1].wait()

    def asked_by_now(self, device: torch.device) -> int:
        """As `asked`, after the last step: waits for what all others say now."""
        self.asked(device)
        return self.asked(device)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number and number == signal.SIGINT and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt
        self._since = self._since if self._number else time.monotonic()
        self._number = self._number or number

    def asked(self, device: torch.device) -> int:
        """The signal on which all processes leave after this step, 0 = none. All must ask, once a step.

        On one process it is whatever has come; on several the largest of any process's, as it was a step ago.
        """
        if world()[1] == 1:
            return self._number
        known = 0
        if self._answer is not None:
            numbers, work = self._answer
            work.wait()
            known = int(numbers)
        numbers = torch.tensor(self._number, device=device)
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._answer = numbers, work
        return known
