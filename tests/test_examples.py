"""The examples run: the tricks on a module that somebody else wrote, and a loop of the user's own."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo.callbacks import AdaptiveKL, CriticWarmup, RewardNormalization
from tests.helpers.command import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:", "ignore:.*LeafSpec:")


class Watch(L.Callback):
    """Keeps each update's experience, coefficient and weights."""

    def __init__(self) -> None:
        self.experiences: list[Any] = []
        self.kl_coefs: list[float] = []
        self.actors: list[torch.Tensor] = []

    def on_update_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        self.experiences.append(experience)
        self.kl_coefs.append(pl_module.kl_coef)
        self.actors.append(torch.cat([p.detach().flatten().clone() for p in pl_module.actor.parameters()]))


@pytest.fixture(scope="module")
def example() -> Any:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "own_module.py")))


def test_each_trick_does_its_work_there(example: Any):
    """Scores are z-scores, five updates leave the actor alone, and the KL ends where it is told to."""
    plain, tricks = Watch(), Watch()
    example.train([plain], **QUIET)
    example.train([RewardNormalization(clip=5.0), CriticWarmup(5), AdaptiveKL(6.0, 2_000), tricks], **QUIET)
    assert all(float(e.scores.abs().max()) > 100 for e in plain.experiences)
    assert all(float(e.scores.abs().max()) <= 5 for e in tricks.experiences)
    assert [bool((a == b).all()) for a, b in zip(tricks.actors, tricks.actors[1:], strict=False)][:6] == (
        [True] * 4 + [False] * 2
    )
    kls = [[float(e.kl.sum(1).mean()) for e in watch.experiences[-10:]] for watch in (plain, tricks)]
    assert min(kls[0]) > 12  # with a coefficient that is left alone
    assert all(4.5 < kl < 7.5 for kl in kls[1])
    # an error of KL / 6 - 1, clipped to 0.2, times 256 responses in 2,000
    last = kls[1][-1]
    assert tricks.kl_coefs[-1] / tricks.kl_coefs[-2] == pytest.approx(
        1 + max(-0.2, min(0.2, last / 6 - 1)) * 256 / 2_000, rel=1e-6
    )
    start, end = (float(tricks.experiences[i].raw_scores.mean()) for i in (0, -1))
    assert end > start + 200  # of at most 700


def test_it_runs_as_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_TRAINER_LIMIT_TRAIN_BATCHES", "3")
    runpy.run_path(str(EXAMPLES / "own_module.py"), run_name="__main__")
    assert "kl_coef" in capfd.readouterr().out


def test_the_loop_of_its_own(tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    scores = runpy.run_path(str(EXAMPLES / "own_loop.py"))["train"](str(lm), updates=2)
    assert len(scores) == 2
    assert min(scores) > 0
    assert (tmp_path / "runs/own_loop/model/model.safetensors").exists()
