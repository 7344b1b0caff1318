"""The limit is kept whatever the code does, and without one or within it the code runs as if there were none."""

import asyncio
import ctypes
import re
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_ppo.rewards import time_limit
from lit_ppo.rewards.time_limit import within

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of POSIX")


def swallows() -> None:
    while True:
        try:
            time.sleep(60)
        except:  # noqa: E722
            continue


def swallows_in_asyncio() -> None:
    async def waits() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except BaseException:
                continue

    asyncio.run(waits())


def waits_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def has_an_alarm_of_its_own() -> None:
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("reached the run"))
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    select.select([], [], [], 60)


HANGS = [
    swallows,
    swallows_in_asyncio,
    waits_for_a_lock,
    has_an_alarm_of_its_own,
    lambda: re.match(r"(a+)+$", "a" * 60 + "b"),  # keeps Python's lock
    lambda: ctypes.CDLL(None).pause(),  # C code
]


@pytest.mark.parametrize("hangs", HANGS)
def test_nothing_that_hangs_goes_on(hangs: Callable[[], Any]) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with pytest.raises(
        TimeoutError, match=r"^the reward: no result within 0\.2 s \(.*test_time_limit.py, line \d+\); "
    ):
        within(0.2, "the reward", hangs)
    time.sleep(0.4)  # as long as the alarm
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert torch.is_grad_enabled()


def test_outside_the_main_thread_too() -> None:
    """Such as in a server, or a notebook's thread."""
    seen: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            seen.append(within(60, "the reward", torch.is_grad_enabled))
        for call in (lambda: time.sleep(60), lambda: 1 / 0):
            try:
                within(0.2, "the reward", call)
            except Exception as error:
                seen.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False, TimeoutError, ZeroDivisionError]


def test_the_code_has_the_thread_its_signals_and_its_modes() -> None:
    """As rewards with alarms of their own need it, which run in the main thread only."""

    def reward() -> Any:
        rung: list[int] = []
        before = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while not rung:
            time.sleep(0.01)
        signal.signal(signal.SIGALRM, before)
        return threading.current_thread(), torch.is_grad_enabled(), asyncio.run(asyncio.sleep(0, "done"))

    with torch.no_grad():
        assert within(60, "the reward", reward) == within(None, "the reward", reward)
        assert within(60, "the reward", reward) == (threading.main_thread(), False, "done")


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_its_own_errors_arrive(error: type[BaseException]) -> None:
    def raises() -> None:
        raise error

    with pytest.raises(error):
        within(60, "the reward", raises)


def test_code_that_keeps_pythons_lock_ends_the_process_by_a_thread_outside_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as ``max(itertools.count())``: no other thread and no signal handler runs any more."""
    armed: list[Any] = []
    monkeypatch.setattr(
        time_limit.faulthandler, "dump_traceback_later", lambda *args, **kwargs: armed.append((args, kwargs))
    )
    monkeypatch.setattr(time_limit.faulthandler, "cancel_dump_traceback_later", armed.clear)
    ((seconds,), options) = within(5, "the reward", lambda: armed[0])
    assert seconds > 5
    assert options["exit"] is True
    assert not armed


def test_code_that_reacts_to_nothing_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, codes = threading.Event(), []
    monkeypatch.setattr(time_limit, "GRACE", 0.3)
    monkeypatch.setattr(time_limit.os, "_exit", lambda code: (codes.append(code), ended.set()))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])
    try:
        within(0.1, "the reward", lambda: ended.wait(60))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGURG])
    assert codes == [1]
    place = rf"\({re.escape(__file__)}, line \d+\)"
    words = rf"lit-ppo: error: the reward: no result within 0\.1 s {place}; .*; the process ends\n"
    assert re.fullmatch(words, capsys.readouterr().err)
