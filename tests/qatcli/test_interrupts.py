"""Signals wait for the write in hand, and arrive after it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from qatcli.interrupts import write_in_hand


@pytest.fixture(autouse=True)
def _terminate_raises() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_write_is_finished_before_a_signal_is_raised(number: signal.Signals) -> None:
    done = []

    def write() -> None:
        with write_in_hand():
            signal.raise_signal(number)
            done.append("written")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done == ["written"]
    with pytest.raises(KeyboardInterrupt):  # as before
        signal.raise_signal(number)


def test_a_write_within_a_write_does_not_let_it_through() -> None:
    done = []

    def write() -> None:
        with write_in_hand():
            with write_in_hand():
                signal.raise_signal(signal.SIGTERM)
            done.append("written")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done == ["written"]


def test_without_a_signal_nothing_happens_and_errors_pass() -> None:
    with pytest.raises(OSError, match="full"), write_in_hand():
        raise OSError("full")


def test_other_threads_have_no_signals_to_wait_for() -> None:
    done = []

    def write() -> None:
        with write_in_hand():
            done.append("written")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert done == ["written"]
