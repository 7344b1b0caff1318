"""CollapseMonitor: each rule's distance and levels by hand, and what is said and when."""

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_ppo.callbacks import CollapseMonitor
from tests.helpers.recorder import record
from tests.helpers.toys import logged
from tests.helpers.trick import Trick

RULES = ("kl", "length", "perplexity", "entropy", "distinct", "duplicates", "opening", "score_tail")
FACTORS = ("length", "perplexity", "entropy", "distinct")  # whose distance is 1 at the start
NO_RULES: dict[str, None] = dict.fromkeys(RULES)
LOOSE, TIGHT = (1e6, 1e7), (1e-9, 1e-8)  # of distances; a factor's are over 1
KNOBS = {
    **{rule: ({rule: LOOSE}, {rule: TIGHT}) for rule in ("kl", "duplicates", "opening", "score_tail")},
    **{rule: ({rule: LOOSE}, {rule: (1.0 + 1e-7, 1.0 + 2e-7)}) for rule in FACTORS},
}


def falling(update: int) -> list[float]:
    """Scores whose tail falls."""
    return [float(row - update * 10 * (row == 0)) for row in range(8)]


TRICK = {
    "CollapseMonitor": Trick(
        acts={**NO_RULES, "opening_tokens": 1, "score_tail": (0.5, 1e6)},
        refuses={
            "kl": (0.6, 0.3),
            "length": (1.0, 2.0),
            "perplexity": (2.0,),
            "entropy": (0.5, 0.25),
            "distinct": (2.0, float("inf")),
            "duplicates": (0.0, 0.1),
            "opening": (True, 2.0),
            "score_tail": "ab",
            "ngram": 0,
            "opening_tokens": 0,
            "lookahead": -1,
        },
        knobs={
            **KNOBS,
            "ngram": ({"ngram": 1}, {"ngram": 2}),
            "opening_tokens": ({"opening_tokens": 1}, {"opening_tokens": 2}),
            "lookahead": (
                {"score_tail": None, "entropy": (1.25, 9.0), "lookahead": 0},
                {"score_tail": None, "entropy": (1.25, 9.0), "lookahead": 100},
            ),
            "stop": ({"kl": TIGHT}, {"kl": TIGHT, "stop": True}),
        },
        toy={"scores": falling, "longest": lambda update: min(update + 2, 4)},
        monitor=True,
    )
}


START: dict[str, Any] = {
    "ids": torch.arange(40).view(10, 4),  # all different
    "lengths": [4] * 10,
    "logprobs": -1.0,
    "ref_logprobs": -1.0,
    "scores": torch.arange(10.0),
}


def rows(**changes: Any) -> Any:
    """An experience with the same number at every token."""
    x = {**START, **changes}
    mask = torch.arange(x["ids"].shape[1]) < torch.tensor(x["lengths"])[:, None]
    logprobs = torch.where(mask, x["logprobs"], math.nan)
    ref = None if x["ref_logprobs"] is None else torch.where(mask, x["ref_logprobs"], math.nan)
    kl = torch.zeros_like(logprobs) if ref is None else logprobs - ref
    return SimpleNamespace(
        response_ids=x["ids"], response_mask=mask, logprobs=logprobs, ref_logprobs=ref, kl=kl, raw_scores=x["scores"]
    )


def at_kl(*kls: float) -> list[Any]:
    """Experiences whose tokens all have such a KL."""
    return [rows(ref_logprobs=-1.0 - kl) for kl in kls]


def one_rule(rule: str, *levels: float, **options: Any) -> CollapseMonitor:
    return CollapseMonitor(**{**NO_RULES, rule: levels, **options})


def levels_of(monitor: CollapseMonitor, *experiences: Any) -> list[float]:
    return [log["collapse/level"] for log in watch(monitor, *experiences)[0]]


def watch(monitor: CollapseMonitor, *experiences: Any) -> tuple[list[dict[str, float]], list[str], bool]:
    """What is logged update by update, what is said, and whether the run is to stop."""
    trainer: Any = SimpleNamespace(should_stop=False)
    logs: list[dict[str, float]] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for experience in experiences:
            logs.append({})
            monitor.on_update_end(trainer, SimpleNamespace(log=logs[-1].__setitem__), experience)  # type: ignore
    return logs, [str(warning.message) for warning in said], trainer.should_stop


def repeated(n: int) -> Tensor:
    """Ten different responses, of which n begin as the first does."""
    ids = START["ids"].clone()
    ids[:n, :2] = ids[0, :2]
    return ids


SAME = START["ids"][torch.tensor([0, 0, 0, 0, 0, 5, 6, 7, 8, 9])]  # four repeat the first
# A rule, an experience, its statistic by hand, and its distance from the start.
CASES: dict[str, tuple[dict[str, Any], float, float]] = {
    "kl": ({"logprobs": -0.5, "ref_logprobs": -0.75}, 0.25, 0.25),  # -0.5 + 0.75 at each token
    "length": ({"lengths": [4] * 5 + [1] * 5}, 2.5, 1.6),  # (20 + 5) / 10; 4 / 2.5
    "perplexity": ({"ref_logprobs": -1.5, "logprobs": -1.5}, math.exp(1.5), math.exp(0.5)),
    "entropy": ({"logprobs": -0.4, "ref_logprobs": -0.4}, 0.4, 2.5),
    "distinct": ({"ids": SAME}, 18 / 30, 30 / 18),  # of ten times three bigrams four times three are known
    "duplicates": ({"ids": SAME}, 0.4, 0.4),
    "opening": ({"ids": repeated(4)}, 0.4, 1 / 3),  # 0.1 at the start: (0.4 - 0.1) / 0.9
    # The 5% quantile lies 0.45 of the way from the lowest to the next: 0.45; (-10 + 0.45 x 11) = -5.05. The scores
    # 0 to 9 have the variance 99 / 12.
    "score_tail": ({"scores": torch.tensor([-10.0, *range(1, 10)])}, -5.05, 5.5 / math.sqrt(8.25)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("factors", "level"), [((1.001, 1.1), 0.0), ((0.999, 1.001), 1.0), ((0.5, 0.999), 2.0)])
def test_levels_of_each_rule(rule: str, factors: tuple[float, float], level: float) -> None:
    """Just over the level, just under it; the other rules are off."""
    changes, statistic, distance = CASES[rule]
    bounds = (max(factors[0] * distance, 1.001 if rule in FACTORS else 0.0), factors[1] * distance)
    (first, second), said, stop = watch(one_rule(rule, *bounds, lookahead=0), rows(), rows(**changes))
    assert first["collapse/level"] == 0.0
    assert second["collapse/level"] == level
    assert second[
        "collapse/" + {"kl": "kl_per_token", "entropy": "entropy_per_token"}.get(rule, rule)
    ] == pytest.approx(statistic, rel=1e-5)
    assert len(said) == (level > 0)
    assert not stop
    if said:
        assert f"CollapseMonitor: {('warning', 'alarm')[int(level) - 1]} at update 2: " in said[0]
        assert f"({rule} is at {distance:.3g}; warning from {bounds[0]:g}, alarm from {bounds[1]:g})" in said[0]


def test_levels_count_from_where_they_are() -> None:
    """In numbers that are exact: KL 0.25 is half way to 0.5, and would be there in one update; then 0.5, then 0.75."""
    assert levels_of(one_rule("kl", 0.5, 0.75, lookahead=1), *at_kl(0.0, 0.25, 0.5, 0.75)) == [0, 1, 1, 2]


def test_what_is_nought_ends_no_run() -> None:
    """A policy without a choice left, or from the start; scores that were all alike, and then one of them is not."""
    sure, open_ = rows(logprobs=0.0, ref_logprobs=0.0), rows()
    for experiences, levels in (((open_, sure), [0, 2]), ((sure, open_), [0, 0]), ((sure, sure), [0, 0])):
        assert levels_of(one_rule("entropy", 2.0, 4.0), *experiences) == levels
    alike, worse = rows(scores=torch.ones(10)), rows(scores=torch.tensor([0.0] + [1.0] * 9))
    assert levels_of(one_rule("score_tail", 1.0, 2.0), alike, alike, worse) == [0, 0, 2]


def test_a_length_that_grows_counts_as_one_that_shrinks() -> None:
    """2 to 4 tokens are a factor of 2."""
    logs, said, _ = watch(one_rule("length", 1.999, 2.001), rows(lengths=[2] * 10), rows())
    assert [log["collapse/level"] for log in logs] == [0, 1]
    assert "4 tokens per response, 2 at the start" in said[0]


def test_what_was_so_from_the_start_is_no_collapse() -> None:
    """All responses the same, all begin alike: the task may be so. KL is measured from 0."""
    always = rows(ids=torch.ones(10, 4, dtype=torch.long))
    logs, said, _ = watch(CollapseMonitor(), always, always, always)
    assert [log["collapse/level"] for log in logs] == [0] * 3
    assert said == []
    assert logs[0]["collapse/duplicates"] == pytest.approx(0.9)
    assert logs[0]["collapse/opening"] == 1.0


def test_it_says_once_a_level_what_is_wrong_with_the_numbers() -> None:
    monitor = one_rule("kl", 0.3, 0.6)
    logs, said, _ = watch(monitor, *at_kl(0.0, 0.4, 0.1, 0.4, 0.7, 0.9, 0.1, 0.4))
    assert [log["collapse/level"] for log in logs] == [0, 1, 0, 1, 2, 2, 0, 1]
    assert monitor.told == ["warning at update 2 (kl)", "alarm at update 5 (kl)"]  # in the run's summary
    for words, kl in zip(said, (0.4, 0.7), strict=True):
        assert f"far from the reference: {kl} nats per token (kl is at {kl}; warning from 0.3, alarm from 0.6)" in words


@pytest.mark.parametrize(
    ("kls", "lookahead", "levels"),
    [
        ((0.0, 0.1, 0.16), 3, [0, 0, 1]),  # grows by 0.08 an update: 0.16 + 3 x 0.08 = 0.4
        ((0.0, 0.1, 0.16), 1, [0, 0, 0]),  # 0.24
        ((0.0, 0.05, 0.14), 3, [0, 0, 0]),  # 0.35, but not half way yet
        ((0.0, 0.18, 0.17, 0.17), 3, [0, 1, 1, 0]),  # grows by 0.18, 0.085, -0.005
        ((0.0, 0.19, 0.20, 0.21), 3, [0, 1, 1, 0]),  # the last growth, of 0.01, is slow: 0.24
    ],
)
def test_a_trend_is_followed_into_the_future(kls: tuple[float, ...], lookahead: int, levels: list[int]) -> None:
    logs, said, _ = watch(one_rule("kl", 0.3, 0.6, lookahead=lookahead), *at_kl(*kls))
    assert [log["collapse/level"] for log in logs] == levels
    assert all(f"warning from 0.3, which it would reach within {lookahead} updates" in words for words in said)


def test_half_way_of_a_factor_is_between_it_and_one() -> None:
    """Entropy falls to 1 / 1.6 of itself; half way to 2 is 1.5, and 1.6 + 5 x 0.3 = 3.1. 1.4 is not half way."""
    for last, level in ((1.6, 1), (1.4, 0)):
        experiences = [rows(logprobs=-1.0 / f, ref_logprobs=-1.0 / f) for f in (1.0, 1.0, last)]
        assert levels_of(one_rule("entropy", 2.0, 4.0, lookahead=5), *experiences)[-1] == level


@pytest.mark.parametrize("rule", ["length", "distinct", "duplicates", "opening", "score_tail"])
def test_what_is_of_responses_has_no_trend(rule: str) -> None:
    """Over half way in one update, and over the level soon at that pace."""
    changes, _, distance = CASES[rule]
    assert levels_of(one_rule(rule, 1.1 * distance, 9.0), rows(), rows(**changes)) == [0, 0]


@pytest.mark.parametrize(("stop", "kl", "stopped"), [(True, 0.7, True), (True, 0.5, False), (False, 0.7, False)])
def test_an_alarm_stops_the_run_if_it_may(stop: bool, kl: float, stopped: bool) -> None:
    assert watch(CollapseMonitor(kl=(0.3, 0.6), stop=stop), *at_kl(0.0, kl))[2] == stopped


def test_without_a_reference_its_rules_rest() -> None:
    logs, said, _ = watch(CollapseMonitor(), rows(ref_logprobs=None), rows(ref_logprobs=None))
    assert not {"collapse/kl_per_token", "collapse/perplexity"} & logs[1].keys()
    assert logs[1]["collapse/entropy_per_token"] == pytest.approx(1.0)
    assert said == []


def test_a_resumed_monitor_keeps_its_trend_and_what_it_said() -> None:
    """KL 0, 0.1, then 0.16 after the resume: the trend reaches 0.34. A warning given is not given again."""
    first, second, third = (one_rule("kl", 0.3, 0.6) for _ in range(3))
    *experiences, last = at_kl(0.0, 0.1, 0.16, 0.4)
    watch(first, *experiences[:2])
    second.load_state_dict(first.state_dict())
    logs, said, _ = watch(second, experiences[2])
    assert logs[0]["collapse/level"] == 1
    assert "at update 3" in said[0]
    third.load_state_dict(second.state_dict())
    assert third.told == ["warning at update 3 (kl)"]
    assert watch(third, last)[1] == []


def test_on_litppo_the_numbers_are_those_it_logs(tmp_path: Any, lm: Any) -> None:
    row = logged(record(tmp_path, lm, CollapseMonitor(**NO_RULES))[2])[1]
    assert row["collapse/length"] == pytest.approx(row["response/length"])
    assert row["collapse/kl_per_token"] == pytest.approx(row["objective/kl"] / row["response/length"], rel=1e-5)
    assert row["collapse/entropy_per_token"] == pytest.approx(
        row["objective/entropy"] / row["response/length"], rel=1e-5
    )
    # log pi - log ref is the KL's estimate: the reference's perplexity is exp(entropy + KL)
    assert math.log(row["collapse/perplexity"]) == pytest.approx(
        row["collapse/entropy_per_token"] + row["collapse/kl_per_token"], rel=1e-4
    )
