"""What tricks make of scores is what LitPPO learns: returns of its first update against scores changed by hand."""

from pathlib import Path
from typing import Any

import pytest

from lit_ppo.callbacks import LengthPenalty, MissingEndPenalty, RewardClipping
from tests.helpers.first_update import ENDS, first_update, return_mean


@pytest.mark.parametrize(
    ("trick", "changed"),
    [
        (LengthPenalty(4, 0.3, max_penalty=1.0), lambda score, length, ended: score - min(0.3 * max(length - 4, 0), 1)),
        (MissingEndPenalty(score=-1.0), lambda score, length, ended: score if ended else -1.0),
        (MissingEndPenalty(penalty=2.0), lambda score, length, ended: score if ended else score - 2.0),
        (RewardClipping(1.5), lambda score, length, ended: min(score, 1.5)),
    ],
)
def test_returns_are_those_of_the_changed_scores(tmp_path: Path, tiny_lm: Path, trick: Any, changed: Any):
    experience, row = first_update(tmp_path, tiny_lm, trick)
    raw = experience.raw_scores.tolist()
    responses = [
        ids[mask].tolist() for ids, mask in zip(experience.response_ids, experience.response_mask, strict=True)
    ]
    ended = [response[-1] in ENDS for response in responses]
    scores = [changed(score, len(ids), end) for score, ids, end in zip(raw, responses, ended, strict=True)]
    assert 0 < sum(ours == score for ours, score in zip(scores, raw, strict=True)) < 7
    assert row["response/ended_fraction"] == pytest.approx(sum(ended) / 7)
    assert row["value/return_mean"] == pytest.approx(return_mean(experience, scores), rel=1e-5)
    assert return_mean(experience, scores) < return_mean(experience, raw) - 0.05
