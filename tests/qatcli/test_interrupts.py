"""Signals wait for the write in hand, arrive after it, and are not lost where Python drops an exception."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from qatcli import interrupts
from qatcli.interrupts import interruptible, raise_if_interrupted, write_in_hand


@pytest.fixture(autouse=True)
def _terminate_raises() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(interrupts, "_arrived", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the end of the test puts it back
    handlers = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.install()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


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


class _Struck:
    """An object whose finalizer a signal strikes: Python drops the exception that the handler raises there."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("installed")
def test_a_signal_that_a_finalizer_swallowed_is_raised_by_the_next_check(capfd: pytest.CaptureFixture[str]) -> None:
    passed = []

    def work() -> None:
        with interruptible():
            struck = _Struck()
            struck.itself = struck  # type: ignore[attr-defined]  # a cycle: the collector runs the finalizer
            del struck
            gc.collect()
            passed.append("swallowed")
            raise_if_interrupted()
            passed.append("checked")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert passed == ["swallowed"]
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("installed")
def test_a_signal_is_raised_inside_only_and_one_from_before_at_the_beginning() -> None:
    signal.raise_signal(signal.SIGINT)
    assert interrupts.arrived()
    with pytest.raises(KeyboardInterrupt), interruptible():
        pytest.fail("the signal came before")
    signal.raise_signal(signal.SIGTERM)  # after the command: remembered, and nothing else
    raise_if_interrupted()


@pytest.mark.usefixtures("installed")
def test_a_write_in_hand_remembers_its_signal() -> None:
    done = []

    def write() -> None:
        with interruptible(), write_in_hand():
            signal.raise_signal(signal.SIGTERM)
            assert not interrupts.arrived()
            done.append("written")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done == ["written"]
    assert interrupts.arrived()


def test_a_signal_that_the_process_shall_ignore_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        interrupts.install()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not terminate
    finally:
        signal.signal(signal.SIGINT, before)
