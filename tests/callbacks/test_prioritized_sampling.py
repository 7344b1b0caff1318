"""PrioritizedSampling against weights worked by hand, and draws by the documented formula."""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo import PromptDataModule
from lit_ppo.callbacks import PrioritizedSampling
from tests.helpers.draws import draws
from tests.helpers.spies import Spy
from tests.helpers.tiny import WORDS
from tests.helpers.toy import Toy
from tests.helpers.toy_data import ToyData
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


def brute_force(experiences: list[Any], n_rows: int, threshold: float, floor: float = 0.05) -> list[float]:
    """Weights from everything seen, with plain numbers."""
    outcomes = defaultdict(list)
    for experience in experiences:
        for row, score in zip(experience.prompt_index.tolist(), experience.raw_scores.tolist(), strict=True):
            outcomes[row].append(score >= threshold)
    rates = [sum(outcomes[row]) / len(outcomes[row]) if outcomes[row] else 0.0 for row in range(n_rows)]
    return [max(1 - rate, floor) for rate in rates]


def test_data_without_a_number_of_rows_is_refused():
    trick, data = PrioritizedSampling(threshold=1.0), ToyData(3)
    data.columns = {}
    with pytest.raises(
        TypeError,
        match="PrioritizedSampling needs the number of training rows, but ToyData has neither columns nor n_r",
    ):
        trick.setup(SimpleNamespace(callbacks=[trick], datamodule=data), Toy(), "fit")


def test_litppos_rows_follow_the_weights_after_the_update_before(tmp_path: Path, lm: Path):
    """A data set of nothing but 10 prompts, 4 an update and two responses each; validated after every update."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": word}) for word in WORDS[:10]))
    data = PromptDataModule(str(path), val_path=str(path), batch_size=4, seed=7)
    trick, spy = PrioritizedSampling(threshold=1.0), Spy("on_update_end", lambda module, experience: experience)
    trainer = make_trainer(tmp_path, callbacks=[trick, spy], max_steps=4, val_check_interval=1)
    trainer.fit(make_module(lm, samples_per_prompt=2), data)
    assert len(spy.seen) == 4
    for update, experience in enumerate(spy.seen):
        weights = brute_force(spy.seen[:update], 10, threshold=1.0)
        assert experience.prompt_index.tolist()[::2] == draws(7, update, weights, 4)
    assert len(set(weights)) > 2
    successes = [(experience.raw_scores >= 1.0).float().mean().item() for experience in spy.seen]
    assert 0 < min(successes) < max(successes) < 1
    assert [row["data/success_rate"] for row in logged(trainer)] == pytest.approx(successes)
    assert sum(trick.state_dict()["responses"]) == 4 * 4 * 2  # validation and the trial before the run count nothing
