"""How a run ends before its last step: a signal, the time limit, memory that runs out.

A stopped run has finished its step and saves as at its end; only a killed one falls back to its last checkpoint. Read
``loop.py`` next.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

from samed3d.config import TrainConfig
from samed3d.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Listens for SIGTERM and Ctrl-C while a run goes on; a second Ctrl-C interrupts at once.

    Args:
        max_minutes: Wall-clock limit, counted from now; 0 sets none.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        self.reason = ""
        self.until = time.monotonic() + 60 * max_minutes if max_minutes else None
        self.max_minutes = max_minutes
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Start listening; a thread that is not the main one cannot, and does not."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = f"by {signal.Signals(number).name}"

    @property
    def asked(self) -> bool:
        """Whether this process should stop."""
        if not self.reason and self.over:
            self.reason = f"{self.max_minutes:g} minutes are over"
        return bool(self.reason)

    @property
    def over(self) -> bool:
        """Whether the time limit has passed."""
        return self.until is not None and time.monotonic() > self.until

    def passed(self, accelerator: Accelerator) -> float:
        """The share of the time limit that is over, the same on every process; 0 without a limit."""
        share = 0.0 if self.until is None else 1 - (self.until - time.monotonic()) / (60 * self.max_minutes)
        if accelerator.num_processes > 1:
            share = float(accelerator.reduce(torch.tensor(share, device=accelerator.device), "mean"))
        return share

    def on_any(self, accelerator: Accelerator) -> bool:
        """Whether any process should stop: all must do so at the same step, or the others wait for ever."""
        if accelerator.num_processes == 1:
            return self.asked
        if self.asked:
            accelerator.set_trigger()
        stop = bool(accelerator.check_trigger())
        self.reason = self.reason or ("with another process" if stop else "")
        return stop


def outlive_signals(ending: Any) -> None:
    """For loader processes: a signal to the group or to every process must not kill them before the run has finished
    its step.

    Args:
        ending: A ``multiprocessing.Event`` that the run sets when it needs them no more; from then on SIGTERM ends
            them.
    """

    def leave(_number: int, _frame: FrameType | None) -> None:
        if ending.is_set():
            os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def memory_error(error: BaseException, config: TrainConfig) -> InputError | None:
    """What to lower when memory ran out, as an error of one line; None for any other error."""
    text = str(error)
    if (
        not isinstance(error, MemoryError | torch.OutOfMemoryError)
        and "allocate memory" not in text
        and "out of memory" not in text
    ):
        return None
    optim, crop = config.optim, "x".join(map(str, config.data.crop))
    return InputError(
        f"out of memory with optim.batch={optim.batch}, data.crop={crop}, clicks.interactions={config.clicks.interactions}; lower one of "
        f"them (optim.batch with a higher optim.accumulate learns the same), or set clicks.detach=true, run.precision=bf16 or "
        f"run.activation_checkpointing=true"
    )
