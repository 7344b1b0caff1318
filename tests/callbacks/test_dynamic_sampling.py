"""DynamicSampling against groups by hand, and what is left of an update without any."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo.advantages import GroupRelative
from lit_ppo.callbacks import DynamicSampling
from tests.helpers.spies import Recorder, Spy
from tests.helpers.toy import Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick

pytestmark = pytest.mark.filterwarnings("ignore:DynamicSampling")
PAIRS = [(1.0, 1.0), (0.0, 1.0), (0.5, 0.7), (0.0, 0.0)]  # responses to each of four prompts


def scores(update: int) -> list[float]:
    """All alike in every third update."""
    return [score if update % 3 else 2.0 for pair in PAIRS for score in pair]


TOY: dict[str, Any] = {"episodes": 4, "samples_per_prompt": 2, "scores": scores}
TRICK = {
    "DynamicSampling": Trick(
        acts={"tolerance": 0.1},
        refuses={"min_groups": 0, "tolerance": -0.1},
        knobs={"min_groups": ({}, {"min_groups": 5}), "tolerance": ({}, {"tolerance": 0.25})},
        toy={"episodes": 8, "samples_per_prompt": 2, "scores": lambda update: 2 * scores(1)},  # 8 rows are left
    )
}


@pytest.mark.parametrize(("tolerance", "left"), [(0.0, [1, 1, 2, 2]), (0.25, [1, 1]), (0.15, [1, 1, 2, 2])])
def test_only_groups_with_different_scores_are_left(tolerance: float, left: list[int]):
    rows = Spy("on_rewards", lambda module, experience: experience.group.tolist())
    run_updates([DynamicSampling(tolerance=tolerance), rows], 2, **TOY)
    assert rows.seen == [[0, 0, 1, 1, 2, 2, 3, 3], left]


def test_an_update_with_too_few_groups_makes_no_step_and_says_so(tmp_path: Path):
    start, module = Toy().actor.weight, Toy(**TOY)
    logger = Recorder(tmp_path)
    with pytest.warns(
        UserWarning, match=r"^DynamicSampling\(min_groups=2\): 0 of 4 prompts .* no optimizer step"
    ) as told:
        run_updates(DynamicSampling(min_groups=2), 5, module=module, logger=logger)
    assert sum("no optimizer step" in str(warning.message) for warning in told) == 1
    moved = [not a.equal(b) for a, b in zip([start, *module.actors], module.actors, strict=False)]
    assert moved == [False, True, True, False, True]
    assert [len(rows) for rows in module.experiences] == [8, 4, 4, 8, 4]


def test_litppo_logs_what_was_left_out_and_counts_every_update(tmp_path: Path, lm: Path):
    """Of 7, 5 and 7 prompts with three responses each; every fourth response is right, in the second update none."""

    def grade(module: Any, experience: Any) -> None:
        right = torch.arange(len(experience)) % 4 == 0  # of rows 9, 10 and 11, one prompt's, none is
        experience.scores = experience.raw_scores = right * float(module.trainer.global_step != 1)

    kept = Spy("on_rewards", lambda module, experience: len(experience))
    module = make_module(lm, critic=None, advantages=GroupRelative(), kl_coef=0.0, samples_per_prompt=3)
    trainer = make_trainer(tmp_path, callbacks=[Spy("on_scores", grade), DynamicSampling(), kept], max_steps=3)
    trainer.fit(module, make_data(tmp_path))
    rows = logged(trainer)
    assert [row["data/kept_fraction"] for row in rows] == pytest.approx([6 / 7, 0.0, 6 / 7])
    assert [row["data/score_of_all"] for row in rows] == pytest.approx([6 / 21, 0.0, 6 / 21])
    assert [row["data/skipped_update"] for row in rows] == [0.0, 1.0, 0.0]
    assert ["policy/loss" in row for row in rows] == [True, False, True]
    assert (kept.seen, trainer.global_step) == ([18, 15, 18], 3)
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_single_responses_are_refused():
    words = re.escape(
        "DynamicSampling compares the responses to a prompt, but Toy(samples_per_prompt=1) has one of each"
    )
    with pytest.raises(ValueError, match=words):
        run_updates(DynamicSampling())
    alone = Spy("on_rollout_end", lambda module, rows: setattr(rows, "group", torch.arange(len(rows))))
    with pytest.raises(ValueError, match="each of the 8 responses is alone in its group"):
        run_updates([alone, DynamicSampling()], **TOY)
