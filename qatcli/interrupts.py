"""SIGINT and SIGTERM end a command between two writes, never inside one, and neither is lost.

A signal becomes a KeyboardInterrupt wherever Python happens to be. In a finalizer, in a callback of the garbage
collector or in an import that a library guards, the interpreter drops that exception. So the signal is remembered, too,
and `raise_if_interrupted` raises it at the next point where a stage can stop.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_arrived: list[int] = []
_raising = False


def install() -> None:
    """Remember both signals from now on. One that the process was started to ignore stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _remember)
    sys.unraisablehook = _unless_remembered


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal that `install` remembers raises KeyboardInterrupt, as does one from before.

    Afterwards signals are remembered only: what was done is not undone by one that comes while the process ends.
    """
    global _raising
    _raising = True
    try:
        raise_if_interrupted()
        yield
    finally:
        _raising = False


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal has come: where a stage can stop, for one that was dropped on its way."""
    if _raising and _arrived:
        raise KeyboardInterrupt


def arrived() -> bool:
    """Whether a signal has come that was remembered."""
    return bool(_arrived)


@contextmanager
def write_in_hand() -> Iterator[None]:
    """Finish what is being written before an interrupt is acted upon. Outside the main thread nothing is to be done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _unless_remembered(dropped: sys.UnraisableHookArgs) -> None:
    """Show a traceback for an exception that Python had to drop, but not for one that `raise_if_interrupted` raises."""
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)


def _remember(number: int, _frame: FrameType | None) -> None:
    _arrived.append(number)
    if _raising:
        raise KeyboardInterrupt
