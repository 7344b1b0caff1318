"""The monitors on whole runs of tiny models: they speak early where a run goes wrong, and not where it goes well.

``python -m benchmarks.monitors`` does the same with the quickstart's models.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.monitors import Watch, first
from lit_ppo import PromptDataModule
from lit_ppo.callbacks import AdvantageNormalization, CollapseMonitor, RewardHackingMonitor
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import GOOD, count_good, make_module, make_trainer, write_prompts

NEVER = 1000


def kinds(prompts: list[str], responses: list[str]) -> list[float]:
    """How many different good words a response has: what counting them should have been about."""
    return [float(len(set(response.split()) & set(GOOD))) for response in responses]


def first_letter(responses: list[str]) -> list[float]:
    """3 for a response that begins with one of five words; which one does not matter."""
    return [3.0 * response.strip().startswith(("f", "g")) for response in responses]


def turns(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a response that begins otherwise than the one read before it."""
    words = [(response.split() or [""])[0] for response in responses]
    return [float(word != before) for word, before in zip(words, [words[-1], *words[:-1]], strict=True)]


class Course(NamedTuple):
    """What came of a run."""

    watch: Watch
    collapse: list[str]  # said
    hacking: list[str]
    scores: list[float]

    def reached(self, level: int) -> int:
        """The first update at which the collapse is that far."""
        return first(now >= level for now in self.watch.level) or NEVER

    def fallen(self) -> int:
        """The first update at which gold has fallen."""
        return self.watch.fallen() or NEVER


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp("lm") / "lm", scale=4.0)


def run(
    folder: Path, actor: Path, gold: Callable[..., list[float]], rate: float, updates: int, **options: Any
) -> Course:
    """32 responses an update, by Adam of a rate."""
    adam = partial(torch.optim.Adam, lr=rate)
    critic = partial(torch.optim.Adam, lr=0.01)
    watch = Watch(gold)
    monitors = [CollapseMonitor(), RewardHackingMonitor(gold, prompts=32, every=4), watch]
    module = make_module(
        actor, actor_optimizer=adam, critic_optimizer=critic, minibatch_size=16, micro_batch_size=32, **options
    )
    trainer = make_trainer(folder, callbacks=[AdvantageNormalization(), *monitors], max_steps=updates)
    files = [str(write_prompts(folder / f"{name}.jsonl", 32)) for name in ("prompts", "held_out")]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, PromptDataModule(files[0], val_path=files[1], batch_size=32, seed=0))
    words = [str(warning.message) for warning in said]
    spoken = [[line for line in words if line.startswith(name)] for name in ("CollapseMonitor", "RewardHackingMonitor")]
    scores = [row["objective/score"] for row in trainer.logger.rows if "objective/score" in row]  # type: ignore
    return Course(watch, *spoken, scores)


def update_of(line: str) -> int:
    """The update that a warning names."""
    return int(line.partition("at update ")[2].partition(":")[0])


def test_without_kl_and_with_a_high_rate_it_warns_before_gold_falls(tmp_path: Path, actor: Path) -> None:
    """The score climbs on to its end, 10 good words of 10; different ones became fewer long before."""
    course = run(tmp_path, actor, kinds, 1e-2, 28, rewards=count_good, kl_coef=0.0)
    assert course.scores[-1] > 9.5
    assert course.reached(1) < course.reached(2) < course.fallen() < 28
    assert course.reached(1) < 7
    assert any("CollapseMonitor: alarm at update" in line and "(kl is at" in line for line in course.collapse)
    behind, hacking = course.hacking
    assert "RewardHackingMonitor: gold falls behind at update" in behind
    assert "RewardHackingMonitor: reward hacking at update" in hacking
    assert update_of(behind) < update_of(hacking)


def test_one_opening_takes_over_and_it_warns_before_a_reader_tires(tmp_path: Path, actor: Path) -> None:
    """A reward that pays for the first word alone, and hardly any KL: the rest stays as it was."""
    course = run(tmp_path, actor, turns, 3e-3, 40, rewards=first_letter, kl_coef=0.05, seed=5)
    assert course.reached(1) < course.fallen() < 40
    assert any("one opening dominates" in line for line in course.collapse)
    assert course.watch.gold[0] > 0.9
    assert course.watch.gold[-1] < 0.5


@pytest.mark.parametrize(("seed", "rate", "kl_coef"), [(4, 5e-4, 1.0), (5, 2e-3, 2.0)])
def test_a_healthy_run_is_left_in_peace(tmp_path: Path, actor: Path, seed: int, rate: float, kl_coef: float) -> None:
    """It learns all the same."""
    course = run(tmp_path, actor, kinds, rate, 25, rewards=count_good, kl_coef=kl_coef, seed=seed)
    assert course.collapse == course.hacking == []
    assert sum(course.scores[-5:]) > 1.3 * sum(course.scores[:5])
