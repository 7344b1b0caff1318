"""One of two ranks fails: all stop with its error, nobody hangs, and what is decided is decided by all."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import faulty_ranks
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import make_causal_lm


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fault -> what each of the two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(2, faulty_ranks.main, folder, make_causal_lm(folder / "lm", scale=4.0), folder=folder, connect=False)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {"folder": folder, **{fault: [rank[fault] for rank in ranks] for fault in ranks[0]}}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raises", ["raised KeyError", "no such film", "faulty_ranks.py"]),
        ("hangs", ["reward_timeout", "no result within 1 s"]),
    ],
)
def test_a_reward_that_fails_on_one_rank_stops_both_with_its_error(seen: Any, fault: str, words: list[str]) -> None:
    waiting, failing = seen[fault]
    assert waiting["error"].startswith("RuntimeError: rank 1 failed: ")
    for word in words:
        assert word in failing["error"]
        assert word in waiting["error"]
    assert len(waiting["rows"]) == 2  # updates 0 and 1 had been done


def test_a_broken_gradient_on_one_rank_is_skipped_by_both(seen: Any) -> None:
    """Update 1 has 5 responses: one minibatch, two passes, of which it skips the first."""
    one, other = seen["gradient"]
    assert one["error"] == other["error"] == ""
    assert [row["optimizer/skipped_fraction"] for row in one["rows"]] == [0.0, 0.5, 0.0]
    assert one["digest"] == other["digest"]
    assert all(map(math.isfinite, one["digest"]))


def test_sigterm_on_one_rank_saves_and_ends_both(seen: Any) -> None:
    for rank in seen["sigterm"]:
        assert rank["error"].startswith("SIGTERMException")
    (left,) = (seen["folder"] / "stopped").iterdir()
    assert left.name == "step-000002.ckpt"
    assert torch.load(left, weights_only=True)["lit_ppo"]["rollouts"] == 2


def test_a_rank_that_dies_in_a_backward_is_named_in_words_of_ours(seen: Any) -> None:
    """The error of the backward is the backend's."""
    waiting, _ = seen["dies"]
    assert "gloo" in waiting["error"]
    assert waiting["explained"].startswith("rank 0 gets no answer from the other ranks: one has ended, was killed")
    assert "gloo" not in waiting["explained"]
    assert all(other["explained"] is None for fault in ("raises", "disk", "gradient") for other in seen[fault])


def test_a_full_disk_stops_both_and_leaves_the_checkpoint_before(seen: Any) -> None:
    writing, waiting = seen["disk"]
    assert (
        "step-000002.ckpt: cannot be written (No space left on device); the previous checkpoint is kept"
        in writing["error"]
    )
    assert waiting["error"].startswith("RuntimeError: rank 0 failed: CheckpointError: ")
    (left,) = (seen["folder"] / "checkpoints").iterdir()
    assert left.name == "step-000001.ckpt"
    assert torch.load(left, weights_only=True)["global_step"] == 1


def test_a_rank_that_nothing_can_interrupt_is_given_up_on(tmp_path: Path) -> None:
    actor = make_causal_lm(tmp_path / "lm", scale=4.0)
    on_ranks(2, faulty_ranks.hang, tmp_path, actor, folder=tmp_path, connect=False)
    waiting = json.loads((tmp_path / "rank0.json").read_text())
    assert "rank 0 got no answer from the other ranks" in waiting["error"]
