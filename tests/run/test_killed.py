"""SIGKILL at any moment loses at most the current update, and nothing that a checkpoint covers."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from lit_ppo.run.checkpoint import step_of
from tests.helpers import killed_runs
from tests.helpers.command import PRELOAD
from tests.helpers.equal import same
from tests.helpers.event_files import metrics, shown
from tests.helpers.tiny import make_causal_lm

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

SAMPLES = "version_0/samples.jsonl"
UPDATES = 8  # two batches an epoch: into the fourth epoch
# Each in a process of its own, which resumes what the one before it left. Within an update a few moments stand for all:
# what is in memory is lost at each of them, and what is on the disk is the same.
MOMENTS = [
    "scoring x 1",
    "gathering the checkpoint x 1",
    "half written x 2",
    "batch end x 1",
    "after os.replace x 1",  # the checkpoint is there, and its step not logged yet
    "before os.replace x 1",
    "optimizer step x 3",
    "validating x 1",
    "before os.remove x 1",
    "train end x 1",
]
IN_EPOCHS = ["update 3 x 1", "update 5 x 1", "half written x 1", "train end x 1"]
WATCHED = [
    "gathering the checkpoint x 1",  # the monitors have measured, and nothing is saved of it
    "half written x 2",
    "validating x 1",
    "after os.replace x 1",  # histograms are with the writer's thread
    "batch end x 1",
    "train end x 1",
]


def run(folder: Path, actor: Path, tricks: str, kill_at: str | None = None) -> list[str]:
    """One process; its events."""
    folder.mkdir(exist_ok=True)
    path = folder / "events.txt"
    path.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "tests.helpers.killed_runs"])
    process = context.Process(target=killed_runs.child, args=(folder, actor, UPDATES, tricks, kill_at))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
    seen = path.read_text().splitlines()
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert process.exitcode == expected, (kill_at, seen[-3:], (folder / "output.txt").read_text()[-3000:])
    assert kill_at is None or seen[-1] == kill_at.partition(" x ")[0]
    return seen


def updates_of(seen: list[str]) -> list[int]:
    return [int(name.removeprefix("update ")) for name in seen if name.startswith("update ") and name[-1].isdigit()]


def check_that_all_act(scalars: dict[str, list[tuple[int, float]]]) -> None:
    """A trick that does nothing in the run has nothing to resume."""
    for tag in ("policy/early_stop", "policy/lr", "objective/kl_coef", "data/success_rate", "ptx/loss"):
        assert len({value for _, value in scalars[tag]}) > 1, tag
    assert [step for step, _ in scalars["rejection/score_gain"]] == [3, 7]
    learnt = [step for step, _ in scalars["policy/grad_norm"]]
    assert learnt == [*range(2, UPDATES)]  # the critic's warm-up is over
    assert 0 < len(scalars["policy/entropy_loss"]) < len(learnt)  # the bonus is off at times
    kls = dict(scalars["objective/kl"])
    assert kls[3] == kls[6] == 0 != kls[5]  # the reference has caught up with the actor


@pytest.mark.parametrize(("tricks", "moments"), [("most", MOMENTS), ("others", IN_EPOCHS), ("monitors", WATCHED)])
def test_killed_at_every_kind_of_moment(tmp_path: Path, tricks: str, moments: list[str]) -> None:
    actor = make_causal_lm(tmp_path / "lm", scale=4.0)
    assert updates_of(run(tmp_path / "uninterrupted", actor, tricks)) == [*range(UPDATES)]
    cut = tmp_path / "cut"
    covered = 0
    for moment in [*moments, None]:
        done = updates_of(run(cut, actor, tricks, moment))
        assert done == [*range(covered, covered + len(done))], moment  # nothing covered runs again, nothing is left out
        newest = killed_runs.last_checkpoint(cut)
        covered = 0 if newest is None else step_of(newest)
        if done:
            at_most = 2 if tricks == "others" else 1  # updates since the last checkpoint
            assert 0 <= done[-1] + 1 - covered <= at_most, moment
    assert covered == UPDATES
    uninterrupted, cut_logs = (metrics(folder / "version_0") for folder in (tmp_path / "uninterrupted", cut))
    assert cut_logs == uninterrupted
    if tricks == "most":
        check_that_all_act(uninterrupted)
    steps = shown(cut / "version_0")
    assert steps == shown(tmp_path / "uninterrupted/version_0")
    if tricks == "monitors":
        assert {"histogram/scores", "figure/scores", "samples/text_summary", "tax/loss", "collapse/level"} <= {*steps}
        assert (cut / SAMPLES).read_text() == (tmp_path / "uninterrupted" / SAMPLES).read_text()
    assert [step for step, _ in uninterrupted["objective/score"]] == [*range(UPDATES)]
    assert [step for step, _ in uninterrupted["val/score"]] == [0, 2, 5]
    one, other = (
        torch.load(killed_runs.last_checkpoint(folder) or "", weights_only=True)
        for folder in (tmp_path / "uninterrupted", cut)
    )
    keys = ["loops", "state_dict", "optimizer_states", "lr_schedulers", "callbacks", "lit_ppo", "PromptDataModule"]
    for key in [*keys, "epoch", "global_step"]:
        assert same(one[key], other[key]), key
    assert len(list((cut / "version_0/checkpoints").iterdir())) == 2
