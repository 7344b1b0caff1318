"""CurriculumSampling against rows counted by hand."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lit_ppo import PromptDataModule
from lit_ppo.callbacks import CurriculumSampling, PrioritizedSampling
from tests.helpers.draws import draws
from tests.helpers.spies import Spy
from tests.helpers.tiny import WORDS
from tests.helpers.toy import Toy
from tests.helpers.toy_data import ToyData
from tests.helpers.toy_runs import run_updates, trainer_of
from tests.helpers.toys import logged, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "CurriculumSampling": Trick(
        acts={"column": "level", "updates": 4, "start": 0.6},
        refuses={"updates": 0, "start": 1.5},
        knobs={
            "column": ({}, {"column": "size"}),
            "updates": ({}, {"updates": 2}),
            "start": ({}, {"start": 0.9}),
        },
    )
}


def set_up(levels: list[Any], **arguments: Any) -> tuple[CurriculumSampling, Any]:
    """The trick and a trainer with data of these levels, before the first batch."""
    trick = CurriculumSampling(**{"column": "level", "updates": 2, "start": 0.5, **arguments})
    data = ToyData(len(levels))
    data.columns = {"level": levels, "topic": ["a"] * len(levels)}
    trainer = SimpleNamespace(callbacks=[trick], datamodule=data)
    trick.setup(trainer, Toy(), "fit")
    trick.on_train_start(trainer, Toy())
    return trick, trainer


@pytest.mark.parametrize(("column", "easiest"), [("level", [0, 1, 2, 3, 4, 5, 6]), ("size", [7, 6, 5, 4, 3, 2, 1])])
def test_the_easiest_rows_are_drawn_and_each_update_from_more(column: str, easiest: list[int]):
    """8 rows, half of them at first; an eighth more each update: 4, 5, 6, 7 rows, then all in their usual order."""
    module = run_updates(CurriculumSampling(column, updates=4, start=0.5), 6)
    seen = [experience.prompt_index.tolist() for experience in module.experiences]
    assert [sorted(rows) for rows in seen[:4]] == [sorted(easiest[:n]) for n in (4, 5, 6, 7)]
    assert seen[4:] == [list(range(8))] * 2


@pytest.mark.parametrize(("start", "updates", "sizes"), [(0.15, 2, [2, 6]), (0.01, 1, [1]), (0.7, 3, [7, 8, 9])])
def test_a_share_is_rounded_up_to_rows(start: float, updates: int, sizes: list[int]):
    """10 rows; 0.15 is 2 rows, and (0.15 + 1) / 2 = 0.575 is 6."""
    trick, trainer = set_up([*range(10)], start=start, updates=updates)
    drawable = []
    for _ in sizes:
        drawable.append(int(trainer.datamodule.weights.sum()))
        trick.on_update_end(trainer, SimpleNamespace(log=lambda *_: None), None)
    assert drawable == sizes
    assert trainer.datamodule.weights is None


@pytest.mark.parametrize(
    ("levels", "weights"),
    [
        ([2.0, 1, 1, 2, 1, 1], [0, 1, 1, 0, 1, 0]),  # all alike, and of ties the earlier ones
        (["10", "9", "-1e3", "100"], [0, 1, 1, 0]),  # text, as in a CSV file, is ordered as numbers
    ],
)
def test_weights_of_the_easier_half(levels: list[Any], weights: list[float]):
    assert set_up(levels)[1].datamodule.weights.tolist() == weights


@pytest.mark.parametrize(
    "trick", [CurriculumSampling("level", updates=9, start=0.5), PrioritizedSampling(threshold=5.0)]
)
def test_a_later_fit_without_the_callback_draws_every_row(trick: Any):
    for fails in (False, True):
        data, spies = ToyData(8), [Spy("on_update_end", lambda module, experience: 1 / 0)] if fails else []
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            trainer_of([trick, *spies], 2).fit(Toy(), datamodule=data)
        assert trick._has_set_weights is False
        assert data.weights is None


def test_weights_that_are_set_after_the_curriculum_stay():
    trick, trainer = set_up([1, 2], updates=1)
    module = SimpleNamespace(log=lambda *_: None)
    trick.on_update_end(trainer, module, None)
    assert trainer.datamodule.weights is None
    trainer.datamodule.set_weights([0.0, 1.0])
    trick.on_update_end(trainer, module, None)
    trick.on_train_start(trainer, module)  # a second fit
    assert trainer.datamodule.weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("level", "hard", "row 1 has 'hard'"),
        ("level", None, "row 1 has None"),
        ("level", float("nan"), "row 1 has nan"),
        ("level", [1], r"row 1 has \[1\]"),
        ("difficulty", 2, "no such column"),
    ],
)
def test_what_is_no_difficulty_is_refused_with_its_row_and_the_columns(column: str, value: Any, problem: str):
    with pytest.raises(ValueError, match=rf"CurriculumSampling\(column='{column}'\): .*{problem}.* 'level', 'topic'"):
        set_up([1, value, 3], column=column)


def test_data_that_cannot_be_weighed_is_refused_by_name():
    trick = CurriculumSampling("level", 2)
    trainer = SimpleNamespace(callbacks=[trick], datamodule=SimpleNamespace(columns={}))
    message = "CurriculumSampling .* Toy is trained on SimpleNamespace, which lacks set_weights; train it on a Prompt"
    with pytest.raises(TypeError, match=message):
        trick.setup(trainer, Toy(), "fit")
    trick.setup(SimpleNamespace(callbacks=[trick]), Toy(), "validate")  # nothing is drawn there


def test_litppos_batches_are_those_of_the_documented_draw_from_the_first_on(tmp_path: Path, tiny_lm: Path):
    """Shares 0.4, 0.6, 0.8 of 12 rows: 5, 8 (7.2) and 10 (9.6) of them; the epoch's own order afterwards."""
    levels = [5 * i % 12 for i in range(12)]  # 0, 5, 10, 3, 8, 1, 6, 11, 4, 9, 2, 7
    rows = [json.dumps({"prompt": WORDS[i], "level": level}) for i, level in enumerate(levels)]
    (tmp_path / "levels.jsonl").write_text("\n".join(rows))
    seen = Spy("on_scores", lambda module, experience: experience.prompt_index.tolist())
    trainer = make_trainer(tmp_path, callbacks=[CurriculumSampling("level", updates=3, start=0.4), seen], max_steps=5)
    module = make_module(tiny_lm, generation={"max_new_tokens": 2})
    trainer.fit(module, PromptDataModule(str(tmp_path / "levels.jsonl"), batch_size=6, seed=4))
    easy_first = np.argsort(levels)
    for update, n in enumerate((5, 8, 10)):
        weights = np.isin(np.arange(12), easy_first[:n]).astype(float)
        assert seen.seen[update] == draws(4, update, weights, min(6, n))
        assert len(set(seen.seen[update])) == min(6, n)
    orders = [np.random.default_rng([4, epoch]).permutation(12).tolist() for epoch in (1, 2)]
    assert seen.seen[3:] == [orders[0][6:], orders[1][:6]]  # two batches an epoch
    fractions = [row["data/drawable_fraction"] for row in logged(trainer)]
    assert fractions == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])
