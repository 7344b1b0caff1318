"""After a resume, from wherever a checkpoint can be saved, a run does what it would have done without the stop."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lit_ppo.data.batch import EpochSampler, RowLoader
from lit_ppo.parallel.loops import use_exact_loops
from tests.helpers.toys import make_trainer

ROWS = torch.arange(1.0, 6.0)  # in batches of two: three an epoch
HOOKS = ("on_train_epoch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end")


class Line(L.LightningModule):
    """Fits one number; the order of the rows shows in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def setup(self, stage: str) -> None:
        use_exact_loops(self.trainer)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return ((self.weight - batch) ** 2).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/error", (self.weight - batch).abs().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]  # a step an epoch

    def train_dataloader(self) -> RowLoader:
        sampler = EpochSampler(ROWS, num_replicas=1, rank=0, seed=3)  # type: ignore[arg-type]
        return RowLoader(ROWS, self.trainer, batch_size=2, sampler=sampler)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(ROWS, batch_size=4)  # type: ignore[arg-type]


class Diary(L.Callback):
    """Its state is the list of all hooks so far; saves a checkpoint at each of them that ends something."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hooks = folder, []
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, *_, hook=hook: self.note(trainer, hook))

    def note(self, trainer: Any, hook: str) -> None:
        loop = trainer.fit_loop.epoch_loop
        if trainer.sanity_checking:
            return
        self.hooks.append([hook, trainer.current_epoch, trainer.global_step, loop._batches_that_stepped])
        cut_short = hook == "on_train_epoch_end" and not loop.batch_progress.is_last_batch
        if hook != "on_train_epoch_start" and not cut_short and not loop._should_accumulate():
            trainer.save_checkpoint(self.folder / f"{len(self.hooks):02}-{hook}.ckpt")

    def state_dict(self) -> dict[str, Any]:
        return {"hooks": list(self.hooks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.hooks = list(state_dict["hooks"])


def fit(folder: Path, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train; every checkpoint by name."""
    folder.mkdir()
    trainer = make_trainer(folder, callbacks=[Diary(folder)], logger=False, **options)
    trainer.fit(Line(), ckpt_path=ckpt_path)
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.ckpt"))}


EPOCHS = {"max_steps": -1, "max_epochs": 3}
STEPS = {"max_steps": 7, "max_epochs": -1}  # one batch into the third epoch
EACH_2 = {"val_check_interval": 2, "check_val_every_n_epoch": None}
RUNS = {
    "epochs": {**EPOCHS, "limit_val_batches": 0},
    "epochs that end with validation": EPOCHS,
    "steps, validation across epochs": {**STEPS, **EACH_2},
    "steps, validation within epochs": {**STEPS, "val_check_interval": 2},
    "steps that end an epoch": {**STEPS, "max_steps": 6, "limit_val_batches": 0},
    "both, epochs come first": {"max_steps": 8, "max_epochs": 2, "check_val_every_n_epoch": 2},
    "accumulation": {**STEPS, **EACH_2, "accumulate_grad_batches": 2, "max_steps": 5},
    "two batches an epoch": {**EPOCHS, "limit_train_batches": 2},
    "two thirds of an epoch, in steps": {**STEPS, "limit_train_batches": 0.7, "limit_val_batches": 0},
    "two batches an epoch, accumulation": {**EPOCHS, "limit_train_batches": 2, "accumulate_grad_batches": 2},
    "the same two batches": {**EPOCHS, "overfit_batches": 2},
}


@pytest.mark.filterwarnings("ignore:You requested to overfit")  # Lightning announces it
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_all_later_checkpoints_are_those_of_the_uninterrupted_run(tmp_path: Path, options: dict[str, Any]) -> None:
    """So a run that is killed and resumed any number of times ends as the uninterrupted one."""
    uninterrupted = fit(tmp_path / "uninterrupted", **options)
    *starts, end = uninterrupted
    assert end.endswith("on_train_end.ckpt")
    for start in starts:
        resumed = fit(tmp_path / start, tmp_path / "uninterrupted" / start, **options)
        assert resumed == {name: saved for name, saved in uninterrupted.items() if name > start}, start


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("limit", [2, 0.7])
def test_a_finished_run_goes_on_as_a_longer_one(tmp_path: Path, limit: float) -> None:
    """Its last epoch is over, however many batches it had."""
    short, long = ({**EPOCHS, "max_epochs": n, "limit_train_batches": limit} for n in (2, 4))
    start = max(name for name in fit(tmp_path / "short", **short) if name.endswith("on_train_batch_end.ckpt"))
    longer, resumed = fit(tmp_path / "long", **long), fit(tmp_path / "resumed", tmp_path / "short" / start, **long)
    ends = [saved[max(saved)] for saved in (longer, resumed)]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    assert torch.equal(*(end["state_dict"]["weight"] for end in ends))
