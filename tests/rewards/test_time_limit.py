"""The limit is kept, nothing swallows it, and nothing of it is left."""

import signal
import time

import pytest

from lit_ppo.rewards.time_limit import time_limit

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="alarms of POSIX")


def keeps_trying() -> None:
    for _ in range(2):
        try:
            time.sleep(1)
        except Exception:
            continue


def test_retries_do_not_swallow_it() -> None:
    with pytest.raises(TimeoutError, match=r"^the reward: no result within 0.05 s$"), time_limit(0.05, "the reward"):
        keeps_trying()


@pytest.mark.parametrize("fails", [False, True])
def test_the_alarm_that_was_there_is_put_back(fails: bool) -> None:
    def alarm(*_: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        try:
            with time_limit(60, "the reward"):
                assert signal.getsignal(signal.SIGALRM) is not alarm
                assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert signal.getsignal(signal.SIGALRM) is alarm
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_no_limit_sets_no_alarm() -> None:
    with time_limit(None, "the reward"):
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
