"""PrioritizedSampling against weights worked by hand, and draws by the documented formula."""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lit_ppo import PromptDataModule
from lit_ppo.callbacks import CurriculumSampling, PrioritizedSampling, RewardNormalization
from lit_ppo.run.checkpoint import StepCheckpoint
from tests.helpers.tiny import WORDS
from tests.helpers.toy import Spy, Toy, ToyData, run_updates
from tests.helpers.toys import logged, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "PrioritizedSampling": Trick(
        acts={"threshold": 5.0},
        refuses={"threshold": float("nan"), "scale": (0.0, 1.0), "floor": 0.0},
        knobs={
            "threshold": ({}, {"threshold": 7.0}),
            "scale": tuple({"threshold": None, "scale": (0.0, high)} for high in (5.0, 10.0)),
            "floor": ({}, {"floor": 0.9}),
        },
    )
}


def weights_after(updates: list[tuple[list[int], list[float]]], n_rows: int = 4, **arguments: Any) -> list[list[float]]:
    """The weights at the start and after each update with these rows and scores."""
    trick = PrioritizedSampling(**arguments)
    trainer = SimpleNamespace(callbacks=[trick], datamodule=ToyData(n_rows))
    module = SimpleNamespace(log=lambda *_: None)
    trick.setup(trainer, module, "fit")
    trick.on_train_start(trainer, module)
    weights = [trainer.datamodule.weights.tolist()]
    for rows, scores in updates:
        experience: Any = SimpleNamespace(prompt_index=torch.tensor(rows), raw_scores=torch.tensor(scores))
        trick.on_scores(trainer, module, experience)
        trick.on_update_end(trainer, module, experience)
        weights.append(trainer.datamodule.weights.tolist())
    return weights


def test_weights_are_shares_of_failures_over_all_responses():
    """Row 0: 1 of 2, then 3 of 4; row 2: 1 of 1, then 1 of 2; row 1 fails; row 3 is never seen."""
    weights = weights_after([([0, 0, 2], [1.0, 0.9, 1.0]), ([2, 0, 1, 0], [-5.0, 7.0, 0.0, 1.0])], threshold=1.0)
    assert weights == [[1.0, 1.0, 1.0, 1.0], [0.5, 1.0, 0.05, 1.0], [0.25, 1.0, 0.5, 1.0]]


def test_on_a_scale_responses_are_parts_of_a_success():
    """From 2 to 6: a score of 3 is a quarter, 0 is nothing and 9 is all; row 0 has (1/4 + 1) / 2 of two."""
    (_, weights) = weights_after([([0, 0, 1, 2], [3.0, 9.0, 0.0, 5.0])], scale=(2, 6), floor=0.3)
    assert weights == [0.375, 1.0, 0.3, 1.0]


def test_what_is_always_solved_keeps_a_weight():
    (_, weights) = weights_after([([0, 1, 2, 3], [1.0] * 4)], threshold=0.0, floor=0.2)
    assert weights == [0.2] * 4


def brute_force(experiences: list[Any], n_rows: int, threshold: float, floor: float = 0.05) -> list[float]:
    """Weights from everything seen, with plain numbers."""
    outcomes = defaultdict(list)
    for experience in experiences:
        for row, score in zip(experience.prompt_index.tolist(), experience.raw_scores.tolist(), strict=True):
            outcomes[row].append(score >= threshold)
    rates = [sum(outcomes[row]) / len(outcomes[row]) if outcomes[row] else 0.0 for row in range(n_rows)]
    return [max(1 - rate, floor) for rate in rates]


def test_raw_scores_are_judged_whatever_other_tricks_make_of_them():
    """Around 5 with deviation 3: normalised scores would never reach 5."""
    at_start = Spy("on_rollout_start", lambda module, prompts: module.trainer.datamodule.weights.tolist())
    module = run_updates([RewardNormalization(clip=1.0), PrioritizedSampling(threshold=5.0), at_start], 4)
    assert module.experiences[0].scores.max() <= 1.0
    for update, weights in enumerate(at_start.seen):
        assert weights == pytest.approx(brute_force(module.experiences[:update], 8, threshold=5.0))
    assert len({round(weight, 3) for weight in at_start.seen[3]}) > 2


@pytest.mark.parametrize("arguments", [{}, {"threshold": 1.0, "scale": (0.0, 1.0)}])
def test_exactly_one_of_threshold_and_scale(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match=r"PrioritizedSampling\(threshold=.*, scale=.*\): give exactly one of"):
        PrioritizedSampling(**arguments)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0), (0.0,)])
def test_a_scale_is_two_numbers_in_order(scale: Any):
    with pytest.raises(ValueError, match=r"PrioritizedSampling\(scale=.*\): must be two finite numbers"):
        PrioritizedSampling(scale=scale)


def test_data_without_a_number_of_rows_is_refused():
    trick, data = PrioritizedSampling(threshold=1.0), ToyData(3)
    data.columns = {}
    with pytest.raises(
        TypeError,
        match="PrioritizedSampling needs the number of training rows, but ToyData has neither columns nor n_r",
    ):
        trick.setup(SimpleNamespace(callbacks=[trick], datamodule=data), Toy(), "fit")


@pytest.mark.parametrize("order", [1, -1])
def test_two_that_set_the_weights_are_refused(order: int):
    tricks = [CurriculumSampling("level", 2), PrioritizedSampling(threshold=1.0)][::order]
    with pytest.raises(
        ValueError, match="PrioritizedSampling and CurriculumSampling: both would set the sampling weig"
    ):
        run_updates(tricks)


# On LitPPO

THRESHOLD = 1.0


def fit(folder: Path, actor: Path, updates: int, ckpt_path: Path | None = None) -> tuple[Any, list[Any], Any]:
    """A data set of nothing but 10 prompts, 4 an update and two responses each; validated after every update."""
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": word}) for word in WORDS[:10]))
    data = PromptDataModule(str(folder / "prompts.jsonl"), val_path=str(folder / "prompts.jsonl"), batch_size=4, seed=6)
    trick, seen = PrioritizedSampling(threshold=THRESHOLD), Spy("on_update_end", lambda module, experience: experience)
    callbacks = [trick, seen, StepCheckpoint(1, 9, str(folder / "saved"))]
    module = make_module(actor, samples_per_prompt=2)
    trainer = make_trainer(
        folder, callbacks=callbacks, max_steps=updates, enable_checkpointing=True, val_check_interval=1
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return trick, seen.seen, trainer


def rows_of(experience: Any) -> list[int]:
    return experience.prompt_index.tolist()[::2]


def test_the_rows_of_an_update_follow_the_weights_after_the_one_before(tmp_path: Path, lm: Path):
    trick, experiences, trainer = fit(tmp_path, lm, 5)
    for update, experience in enumerate(experiences):
        weights = np.array(brute_force(experiences[:update], 10, THRESHOLD))
        rng = np.random.default_rng([6, update, 1])
        assert rows_of(experience) == rng.choice(10, size=4, replace=False, p=weights / weights.sum()).tolist()
    assert len(set(brute_force(experiences[:4], 10, THRESHOLD))) > 2
    successes = [(experience.raw_scores >= THRESHOLD).float().mean().item() for experience in experiences]
    assert 0 < min(successes) < max(successes) < 1
    assert [row["data/success_rate"] for row in logged(trainer)] == pytest.approx(successes)
    assert sum(trick.state_dict()["responses"]) == 5 * 4 * 2  # validation and the trial before the run count nothing


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_draws_the_same_rows(tmp_path: Path, lm: Path, stop: int):
    trick, whole, _ = fit(tmp_path, lm, 4)
    again, rest, _ = fit(tmp_path, lm, 4, tmp_path / f"saved/step-{stop:06d}.ckpt")
    assert [rows_of(experience) for experience in rest] == [rows_of(experience) for experience in whole[stop:]]
    assert again.state_dict() == trick.state_dict()


def test_failed_prompts_come_more_often_by_their_weight(tmp_path: Path, tiny_lm: Path):
    """One prompt a batch, rows 0 to 4 solved: floor 0.25 against 1, so they are a fifth of 600 draws."""
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": word}) for word in WORDS[:10]))
    data = PromptDataModule(str(tmp_path / "prompts.jsonl"), batch_size=1, tokenizer=str(tiny_lm), seed=0)
    data.setup("fit")
    assert data.n_rows == 10
    trick = PrioritizedSampling(threshold=1.0, floor=0.25)
    trainer: Any = SimpleNamespace(callbacks=[trick], datamodule=data)
    module: Any = SimpleNamespace(log=lambda *_: None)
    trick.setup(trainer, module, "fit")
    experience: Any = SimpleNamespace(prompt_index=torch.arange(10), raw_scores=torch.tensor([1.0] * 5 + [0.0] * 5))
    trick.on_scores(trainer, module, experience)
    trick.on_update_end(trainer, module, experience)
    drawn = [int(batch.prompt_index) for _ in range(60) for batch in data.train_dataloader()]
    assert len(drawn) == 600
    assert sum(row < 5 for row in drawn) / 600 == pytest.approx(0.2, abs=0.05)  # 3 standard deviations
