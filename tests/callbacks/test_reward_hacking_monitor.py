"""RewardHackingMonitor: the rule on series made by hand, what is measured, and a proxy that rises while gold falls."""

import json
import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo.callbacks import RewardHackingMonitor
from lit_ppo.callbacks.hooks import Fired
from lit_ppo.callbacks.ratings import read_ratings
from tests.helpers.toy_data import Prompts
from tests.helpers.toy_runs import run_updates
from tests.helpers.trick import Trick

LETTERS = "abcde"


def against(responses: list[str]) -> list[float]:
    """Minus what the toy's held-out score is: it falls as that rises."""
    return [-float(sum(map(LETTERS.index, response))) for response in responses]


def of_experience(experience: Any) -> torch.Tensor:
    """A score source."""
    return torch.tensor(against(experience.responses)) - 100.0


TRICK = {
    "RewardHackingMonitor": Trick(
        acts={"gold": against, "prompts": 5, "every": 1, "fall": 1e-6},
        refuses={"prompts": 1, "every": 0, "decay": 1.0, "fall": 0.0, "then": "restore"},
        knobs={
            "gold": ({}, {"gold": None}),
            "prompts": ({"prompts": 4}, {"prompts": 5}),
            "every": ({"every": 1}, {"every": 2}),
            "decay": ({"decay": 0.1}, {"decay": 0.9}),
            "fall": ({"fall": 1e-6}, {"fall": 1e6}),
            "then": ({"prompts": 4, "then": "warn"}, {"prompts": 4, "then": "stop"}),
        },
        toy={"scores": lambda update: [float(row + update) for row in range(8)]},
        monitor=True,
        live={"gold": lambda responses: [float(len(response)) for response in responses]},
    )
}


class Given:
    """A module whose held-out and gold scores are given: two responses, the mean plus and minus 1."""

    rewards = SimpleNamespace(sources=("judge",))
    _fired = Fired()

    def __init__(self, held_out: list[float], gold: list[float]) -> None:
        self.held_out, self.gold, self.log = list(held_out), list(gold), None
        self.asked: list[Any] = []

    def rollout(self, prompts: Any, **kwargs: Any) -> Any:
        assert not torch.is_grad_enabled()
        self.asked.append((prompts, kwargs))
        gold = self.gold.pop(0)
        return SimpleNamespace(extras={"judge": torch.tensor([gold - 1, gold + 1])})

    def score(self, experience: Any) -> torch.Tensor:
        mean = self.held_out.pop(0)
        return torch.tensor([mean - 1, mean + 1])


def watch(
    monitor: RewardHackingMonitor,
    train: list[float],
    held_out: list[float],
    gold: list[float],
    splits: tuple[str, ...] = ("val",),
    before: Callable[[int], None] = lambda update: None,
) -> tuple[list[dict[str, float]], list[str], bool, Any]:
    """Logs of each update, what was said, whether it stops, and the module.

    ``held_out`` and ``gold`` have an entry for each time that it measures; what is measured behind the last update, and
    is of no interest, may be left out. ``before`` each update something may happen.
    """
    peek = lambda split, n: f"{n} of {split}" if split in splits else None  # noqa: E731
    trainer: Any = SimpleNamespace(
        should_stop=False,
        datamodule=SimpleNamespace(peek=peek),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        strategy=SimpleNamespace(broadcast=lambda found: found),
        is_global_zero=True,
        fast_dev_run=True,  # nothing is written
    )
    module: Any = Given([*held_out, 0.0], [*gold, 0.0])
    logs: list[dict[str, float]] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        monitor.on_fit_start(trainer, module)
        monitor.on_train_start(trainer, module)
        for update, score in enumerate(train):
            before(update)
            logs.append({})
            module.log = logs[-1].__setitem__
            experience: Any = SimpleNamespace(raw_scores=torch.tensor([score - 2, score + 2]))
            monitor.on_scores(trainer, module, experience)
            monitor.on_update_end(trainer, module, experience)
            monitor.on_train_batch_end(trainer, module, None, None, update)
        monitor.on_train_end(trainer, module)
    return logs, [str(warning.message) for warning in said], trainer.should_stop, module


def by_hand(**arguments: Any) -> RewardHackingMonitor:
    """Smoothing by halves."""
    return RewardHackingMonitor(**{"gold": "judge", "every": 1, "decay": 0.5, "fall": 0.25, **arguments})


UP, DOWN = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.4, 0.0, 0.0]


@pytest.mark.parametrize(
    ("gold", "held_out", "verdict", "words"),
    [
        ("judge", UP, 2, "reward hacking at update 3: since update 1, where gold was best"),
        ("judge", DOWN, 1, "overfitting at update 3: since update 1, where the held-out score was best"),
        (None, DOWN, 1, "overfitting at update 3"),
    ],
)
def test_what_falls_while_training_scores_rise(gold: Any, held_out: list[float], verdict: int, words: str) -> None:
    """Gold alone is reward hacking, held-out scores are overfitting, whatever gold does. It is said once."""
    logs, (message,), stop, _ = watch(by_hand(gold=gold), UP, held_out, DOWN)
    assert [log["hacking/verdict"] for log in logs] == [0, 0, 0, verdict, verdict]
    assert [log["hacking/train"] for log in logs] == pytest.approx([0, 0.5, 1.25, 2.125, 3.0625])
    falls = [log["hacking/gold" if gold else "hacking/held_out"] for log in logs]
    assert falls == pytest.approx([0, 0.5, 0.45, 0.225, 0.1125])  # 0.05, 0.275, 0.3875 below the best
    assert [log["hacking/best_update"] for log in logs] == [0, 1, 1, 1, 1]
    for part in (
        words,
        "score rose from 0.5 to 2.12",
        "from 0.5 to 0.225, more than 0.25 times",
        "deviation of 1; resume",
    ):
        assert part in message
    assert not stop


@pytest.mark.parametrize(
    ("train", "held_out", "gold"),
    [
        (UP, UP, UP),
        (UP[::-1], UP[::-1], UP[::-1]),  # all fall: training goes wrong, but nothing is gamed
        ([0.0, 0.2, 0.4, 0.6, 0.8], UP, [1.0, 1.0, 0.9, 0.9, 0.8]),  # 0.15 below, smoothed 0.12
        (UP, [1.0, 0.9, 0.9, 0.8, 0.8], [1.0, 0.5, 0.0, 0.0, 0.0]),  # held-out neither up nor down by a quarter
    ],
)
def test_other_courses_are_neither(train: list[float], held_out: list[float], gold: list[float]) -> None:
    logs, said, _, _ = watch(by_hand(), train, held_out, gold)
    assert {log["hacking/verdict"] for log in logs} == {0}
    assert said == []


def test_gold_falls_behind_before_it_is_reward_hacking() -> None:
    """Smoothed 0, 0.5, 0.35, 0.275, 0.1375: 0.225 and 0.3625 below the best at the last two, of a deviation of 1.

    Scores rise 0, 0.5, 1.25, 2.125, 3.0625. By more than half a deviation, 0.5 held out and 1 in training, they rise
    from update 1, where gold was 0.5, to update 3. From 0 to 2 they do, too, but gold rises.
    """
    monitor = by_hand()
    logs, said, _, _ = watch(monitor, UP, UP, [0.0, 1.0, 0.2, 0.2, 0.0])
    assert [log["hacking/verdict"] for log in logs] == [0, 0, 0, 0, 2]
    assert monitor.told == ["gold falls behind at update 3", "reward hacking at update 4"]
    assert "gold falls behind at update 3: since update 1, the training score rose from 0.5 to 2.12 and" in said[0]
    assert "more than 0.5 times its standard deviation, while gold scores did not rise, from 0.5 to 0.275;" in said[0]
    assert len(said) == 2


@pytest.mark.parametrize("which", ["train", "held_out"])
def test_gold_does_not_fall_behind_where_a_score_hardly_rises(which: str) -> None:
    """By less than half of its deviation of 1 or 2: smoothed from 0 to 0.2 at most."""
    courses = {"train": UP, "held_out": UP, which: [0.0, 0.1, 0.2, 0.2, 0.2]}
    _, said, _, _ = watch(by_hand(), courses["train"], courses["held_out"], [1.0, 0.7, 0.8, 0.8, 0.8])
    assert said == []


def test_measures_every_so_many_updates_on_the_same_draws() -> None:
    """Without held-out prompts of the first training prompts. Of several best updates the first is marked."""
    monitor = by_hand(every=3, prompts=7, decay=0.25)
    logs, _, _, module = watch(monitor, [0.0, 9.0, 9.0, 1.0, 9.0, 9.0, 2.0], [5.0, 6.0, 7.0], [1.0, 2.0, 2.0])
    assert [update for update, log in enumerate(logs) if log] == [0, 3, 6]
    # 0.25 x 0 + 0.75 x 1, then 0.25 x 0.75 + 0.75 x 2
    assert [log["hacking/train"] for log in logs if log] == pytest.approx([0.0, 0.75, 1.6875])
    assert [log["hacking/best_update"] for log in logs if log] == [0, 3, 6]  # 1, 1.75, 1.9375
    asked = {"samples_per_prompt": 1, "logprobs": False, "stream": "reward_hacking"}
    assert module.asked == [("7 of val", asked)] * 3  # before the first update, after three, after six
    logs, _, _, module = watch(by_hand(), UP[:3], UP[:3], [2.0] * 3, splits=("train",))
    assert [log["hacking/best_update"] for log in logs] == [0, 0, 0]
    assert module.asked[0][0] == "64 of train"


def test_an_update_that_is_begun_again_counts_once() -> None:
    """As after an error in its reward: by quarters 0.25 x 0 + 0.75 x 8 = 6, and what was first there, 4, is gone."""
    monitor = by_hand(gold=None, decay=0.25)
    watch(monitor, [0.0], [0.0], [0.0])
    for score, smoothed in ((4.0, 3.0), (8.0, 6.0)):
        experience: Any = SimpleNamespace(raw_scores=torch.tensor([score, score]))
        module: Any = SimpleNamespace(log=lambda name, value: None)
        monitor.on_scores(SimpleNamespace(), module, experience)  # type: ignore[arg-type]
        assert monitor.state_dict()["courses"]["train"] == {0: 0.0, 1: smoothed}


def test_falls_are_in_deviations_the_largest_so_far() -> None:
    """Responses 4 apart at first, then alike: a deviation of 4, and of 0.25 falls are needed that are over 1.

    The measure falls by 2, smoothed by 1 and 1.5: a verdict at the third time, and not at the second.
    """
    for gold in ("judge", None):
        monitor = by_hand(gold=gold)
        up, down = [1.0, 2.0, 3.0], [0.0, -2.0]
        watch(monitor, [0.0], up if gold else down, down)
        state = monitor.state_dict()
        assert state["spread"] == {"train": 2.0, "held_out": 1.0, **({"gold": 1.0} if gold else {})}
        monitor.load_state_dict({**state, "spread": dict.fromkeys(state["spread"], 4.0)})
        logs, said, _, _ = watch(monitor, [1.0, 2.0], up[2:] if gold else down[1:], down[1:])
        assert [log["hacking/verdict"] for log in logs] == [0, 2 if gold else 1]
        assert "more than 0.25 times their standard deviation of 4;" in said[0]


@pytest.mark.parametrize("then", ["warn", "stop", "go_back"])
def test_a_verdict_stops_the_run_if_it_may(then: str) -> None:
    """Without a checkpoint there is no going back, and another fit has nothing to go back from."""
    assert not watch(by_hand(then=then), [0.0, 1.0], [0.0, 1.0], gold=[0.0, 1.0])[2]
    monitor = by_hand(then=then)
    _, said, stop, _ = watch(monitor, [0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0])
    assert stop == (then != "warn")
    no_checkpoint = "RewardHackingMonitor: no checkpoint of update 0 (None); the weights do not change"
    assert said[1:] == [no_checkpoint] * (then == "go_back")
    assert watch(monitor, [], [], [])[1] == []


def test_a_resumed_monitor_does_not_repeat_itself() -> None:
    gold = [0.0, 1.0, 0.4, 0.0, 0.0]
    first, second = by_hand(), by_hand()
    assert len(watch(first, UP[:4], UP, gold)[1]) == 1
    second.load_state_dict(first.state_dict())
    assert second.told == ["reward hacking at update 3"]  # in the run's summary
    logs, said, _, _ = watch(second, UP[4:], [], [])
    assert logs[0]["hacking/verdict"] == 2
    assert said == []


RATED = [(0, "1"), (1, 4), (1, 2), (2, None), (3, 0.0), (7, 9.0)]  # update, rating


def write(path: Path, ratings: list[tuple[int, Any]], text: str = "") -> None:
    rows = [{"update": update, "prompt": "a", "response": "b", "rating": rating} for update, rating in ratings]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + text)


def test_ratings_of_people_are_gold_as_they_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Smoothed by quarters 1, then 0.25 x 1 + 0.75 x 3 = 2.5, then 0.25 x 2.5 + 0 = 0.625: below its best at update 1.

    All four ratings that count, 1, 4, 2 and 0, have the mean 1.75 and the variance (0.5625 + 5.0625 + 0.0625 + 3.0625)
    / 4 = 2.1875: a deviation of 1.479, of which a quarter is 0.37.
    """
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    come = {1: RATED[:1], 3: RATED[:4], 4: RATED}  # there before the update
    monitor = by_hand(gold="ratings.jsonl", decay=0.25)
    arrive = lambda update: write(Path("ratings.jsonl"), come[update]) if update in come else None  # noqa: E731
    logs, said, _, _ = watch(monitor, UP, UP, [0.0] * 5, before=arrive)
    assert [log.get("hacking/gold") for log in logs] == pytest.approx([None, 1.0, 1.0, 2.5, 0.625])
    assert [log["hacking/best_update"] for log in logs] == [0, 0, 0, 1, 1]
    assert [log["hacking/verdict"] for log in logs] == [0, 0, 0, 0, 2]
    assert "at update 4: since update 1, where gold was best" in said[0]
    assert "fell from 2.5 to 0.625, more than 0.25 times their standard deviation of 1.48;" in said[0]
    assert caplog.messages.count(f"RewardHackingMonitor: reads ratings from {tmp_path / 'ratings.jsonl'}") == 1


def test_while_ratings_cannot_be_read_those_of_before_count(tmp_path: Path) -> None:
    """Somebody saves half a line; then the rest."""
    file = tmp_path / "ratings.jsonl"
    texts = {1: "", 2: '{"update": 1, "rat', 3: '{"update": 1, "rating": 3}'}
    save = lambda update: write(file, [(0, 1)], texts[update]) if update in texts else None  # noqa: E731
    logs, said, _, _ = watch(by_hand(gold=str(file)), UP[:4], UP[:4], [0.0] * 4, before=save)
    assert [log.get("hacking/gold") for log in logs] == [None, 1.0, 1.0, 2.0]
    (message,) = said
    assert f"RewardHackingMonitor(gold={str(file)!r}): {file}, line 2: not JSON" in message
    assert message.endswith("; until then the previous ratings count")


def test_what_ratings_cannot_be(tmp_path: Path) -> None:
    """Another run's; and there is no going back by them, as they come too late. A resumed run has its own."""
    file = tmp_path / "ratings.csv"
    file.write_text("update,rating\n0,1\n")
    with pytest.raises(ValueError, match=r"ratings.csv'\): has ratings before this run has started"):
        watch(by_hand(gold=str(file)), UP, UP, UP)
    with pytest.raises(ValueError, match=r"\(then='go_back'\): does not work with ratings, which come after"):
        by_hand(gold="a.jsonl", then="go_back")
    first, second = by_hand(gold=str(file)), by_hand(gold=str(file))
    file.unlink()
    watch(first, UP[:2], UP[:3], UP[:3])
    second.load_state_dict(first.state_dict())
    file.write_text("update,rating\n0,1\n")
    assert watch(second, UP[2:3], UP[3:4], UP[3:4])[0][0]["hacking/gold"] == 1.0
    file.write_text("update,rating\n0,good\n")
    with pytest.raises(ValueError, match=r"ratings.csv, line 2: rating is 'good'; give a finite number"):
        watch(second, UP[3:4], UP[4:], UP[4:])


def test_ratings_to_come_and_ratings_beyond_any_number(tmp_path: Path) -> None:
    file = tmp_path / "ratings.csv"
    file.write_text("update,rating\n")
    assert read_ratings("w", str(file)) == {}
    write(file.with_suffix(".jsonl"), [(0, 10**400)])
    with pytest.raises(ValueError, match=r"line 1: rating is 10{79}; give a finite number"):
        read_ratings("w", str(file.with_suffix(".jsonl")))


@pytest.mark.filterwarnings("ignore:.*Monitor")
@pytest.mark.parametrize(
    ("gold", "shift"),
    [(against, 0.0), (of_experience, -100.0), ("tests.callbacks.test_reward_hacking_monitor.against", 0.0)],
)
def test_gold_may_be_a_function_a_source_or_an_import_path(gold: Any, shift: float) -> None:
    """On the toy it is minus the held-out score."""
    values = run_updates(RewardHackingMonitor(gold, prompts=5, every=1), 1).trainer.callback_metrics
    assert values["hacking/gold"].item() == pytest.approx(shift - values["hacking/held_out"].item())


def test_the_first_process_asks_for_all() -> None:
    """A judge that answers otherwise each time it is asked would part the ranks."""
    monitor = by_hand(gold=lambda experience: pytest.fail("asked"))
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(peek=lambda split, n: ["p"]),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        strategy=SimpleNamespace(broadcast=lambda nothing: ([1.0, 3.0], None)),
        is_global_zero=False,
        should_stop=False,
    )
    monitor.on_train_start(trainer, SimpleNamespace(rollout=lambda *_, **__: [], score=lambda _: torch.zeros(2)))  # type: ignore[arg-type]
    assert monitor.state_dict()["courses"]["gold"] == {0: 2.0}


def test_unknown_names_and_data_without_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RewardHackingMonitor\(gold='nobody'\): Given has no reward .* it has judge"):
        by_hand(gold="nobody").on_fit_start(SimpleNamespace(datamodule=SimpleNamespace(peek=Prompts)), Given([], []))
    with pytest.raises(TypeError, match="RewardHackingMonitor reads held-out prompts, but Given is trained without"):
        by_hand().on_fit_start(SimpleNamespace(), Given([], []))
