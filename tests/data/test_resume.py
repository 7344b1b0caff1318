"""A stopped run goes on with the next batch, under a real Trainer; the batches depend on seed and number alone."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lit_ppo.data.batch import PromptBatch
from lit_ppo.data.preferences import PreferenceDataModule
from lit_ppo.data.prompts import PromptDataModule
from lit_ppo.data.text import TextDataModule
from tests.helpers import toys
from tests.helpers.draws import draws
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import WORDS, make_tokenizer, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

N_ROWS, BATCH, EPOCHS, SEED = 7, 3, 4, 5  # three batches an epoch, the last of one row
READ = {"batch_size": BATCH, "seed": SEED}
ROWS_OF_TEXT = [TextDataModule, PreferenceDataModule]
Seen = tuple[int, int, list[int]]  # epoch, batch_idx, rows


class Recorder(L.LightningModule):
    """Trains one number by hand and writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(()))
        self.tokenizer = make_tokenizer()
        self.seen: list[Seen] = []
        self.evaluated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.trainer.current_epoch, batch_idx, rows_of(batch)))
        optimizer: Any = self.optimizers()
        self.manual_backward((self.weight - 1.0) ** 2)
        optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> int:
        self.evaluated.append(batch)
        return batch_idx

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows_of(batch: Any) -> list[int]:
    """Which rows a batch holds: prompts know; texts are told apart by the length of their row."""
    if isinstance(batch, PromptBatch):
        return batch.prompt_index.tolist()
    mask: Tensor = batch["chosen"]["attention_mask"] if "chosen" in batch else batch["attention_mask"]
    return (mask.sum(1) - 2).tolist()


def write(path: Path, n_rows: int = N_ROWS) -> Path:
    """Row i has i + 1 words, and differs from the others in each of its columns."""
    texts = [" ".join(WORDS[: i + 1]) for i in range(n_rows)]
    rows = [{"prompt": t, "text": t, "chosen": f"{t} the", "rejected": t, "id": i} for i, t in enumerate(texts)]
    return Path(write_rows(path, rows))


def make_trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer that writes a checkpoint after every batch."""
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    quiet = {"max_steps": -1, "logger": False, "enable_checkpointing": True}
    return toys.make_trainer(folder, callbacks=[checkpoint, *callbacks], **settings | quiet | options)


def fit(
    folder: Path, data: L.LightningDataModule, *callbacks: L.Callback, ckpt_path: Path | None = None, **options: Any
) -> Recorder:
    """Trains a module from the start or from a checkpoint, and returns it with what it saw."""
    module = Recorder()
    make_trainer(folder, *callbacks, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


def expected_batches(n_epochs: int = EPOCHS, seed: int = SEED) -> list[Seen]:
    """The documented order, written out: a permutation of each epoch from [seed, epoch]."""
    seen: list[Seen] = []
    for epoch in range(n_epochs):
        order = np.random.default_rng([seed, epoch]).permutation(N_ROWS).tolist()
        seen += [(epoch, i, order[start : start + BATCH]) for i, start in enumerate(range(0, N_ROWS, BATCH))]
    return seen


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl")


def prompts(file: Path, **options: Any) -> PromptDataModule:
    return PromptDataModule(str(file), **READ | options)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        (PromptDataModule, {"max_steps": 12, "max_epochs": -1}),
        *((kind, {}) for kind in (PromptDataModule, *ROWS_OF_TEXT)),
    ],
)
def test_resume_continues_with_the_next_batch(tmp_path: Path, file: Path, kind: Any, limit: dict[str, int]) -> None:
    """After each of the batches of the first two epochs: mid-epoch, at an epoch's end, in the second epoch."""
    whole = fit(tmp_path / "whole", kind(str(file), **READ), **limit).seen
    if kind is PromptDataModule:
        assert whole == expected_batches()
    epochs = [[row for _, _, rows in whole[start : start + 3] for row in rows] for start in range(0, 12, 3)]
    assert all(sorted(epoch) == list(range(N_ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS  # every epoch in another order
    for done in range(1, 7):
        checkpoint = tmp_path / "whole" / f"step={done}.ckpt"
        resumed = fit(tmp_path / f"from{done}", kind(str(file), **READ), ckpt_path=checkpoint, **limit)
        assert resumed.seen == whole[done:], done
        assert (resumed.trainer.current_epoch, resumed.trainer.global_step) == (EPOCHS, 12)


class PowerCut(L.Callback):
    """Fails in the middle of a batch."""

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("the power went out")

    def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir, "cut.ckpt"))


@pytest.mark.parametrize("kind", [PromptDataModule, *ROWS_OF_TEXT])
def test_a_batch_cut_off_in_its_middle_is_drawn_again(tmp_path: Path, file: Path, kind: Any) -> None:
    """The loader has handed it out, but nothing was learnt from it."""
    whole, folder = fit(tmp_path / "whole", kind(str(file), **READ)).seen, tmp_path / "run"
    with pytest.raises(RuntimeError, match="power"):
        fit(folder, kind(str(file), **READ), PowerCut())
    resumed = fit(folder, kind(str(file), **READ), ckpt_path=folder / "cut.ckpt")
    assert resumed.seen == whole[4:]


def test_the_same_data_module_serves_several_runs(tmp_path: Path, file: Path) -> None:
    """A notebook's cell run twice gives the same twice; a trainer that goes on goes on."""
    data = prompts(file)
    assert fit(tmp_path / "a", data).seen == fit(tmp_path / "b", data).seen == expected_batches()
    trainer, module = make_trainer(tmp_path / "c", max_epochs=2), Recorder()
    trainer.fit(module, data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data)
    assert module.seen == expected_batches(3)


@pytest.mark.filterwarnings("ignore:You requested to overfit")  # Lightning announces it
@pytest.mark.parametrize(
    ("limit", "n_batches", "rows"),
    [
        ({"limit_train_batches": 2}, 2, expected_batches()[:8]),  # all rows in the end
        ({"overfit_batches": 2}, 2, expected_batches()[:2] * EPOCHS),  # the same batches again
        ({"overfit_batches": 0.34}, 1, expected_batches()[:1] * EPOCHS),
        ({"overfit_batches": 99}, 3, expected_batches()[:3] * EPOCHS),
    ],
)
def test_shortened_epochs(tmp_path: Path, file: Path, limit: Any, n_batches: int, rows: list[Seen]) -> None:
    seen = fit(tmp_path / "run", prompts(file), **limit).seen
    assert [batch for _, _, batch in seen] == [batch for _, _, batch in rows]
    assert [epoch for epoch, _, _ in seen] == [epoch for epoch in range(EPOCHS) for _ in range(n_batches)]


@pytest.mark.parametrize("kind", [PromptDataModule, *ROWS_OF_TEXT])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch_size": 2}, r"\(batch_size=2\): .* batch_size was 3"),
        ({"seed": 6}, r"\(seed=6\): .* seed was 5"),
        ({"lower_case": True}, r"\(path=.*the training (prompts|rows) differ"),
        ({"val_fraction": 0.4}, r"\(path=.*rows was 7"),
    ],
)
def test_resume_on_other_data_is_refused(
    tmp_path: Path, file: Path, kind: Any, change: dict[str, Any], reason: str
) -> None:
    file.write_text(file.read_text().replace('"the a film', '"the A film'))
    fit(tmp_path / "run", kind(str(file), **READ), max_steps=1)
    with pytest.raises(ValueError, match=kind.__name__ + reason):
        fit(tmp_path / "other", kind(str(file), **READ | change), ckpt_path=tmp_path / "run" / "step=1.ckpt")


@pytest.mark.parametrize("kind", [PromptDataModule, *ROWS_OF_TEXT])
def test_resume_on_other_held_out_rows_is_refused(tmp_path: Path, file: Path, kind: Any) -> None:
    """Their scores would go on in one curve."""
    held_out = write(tmp_path / "held_out.jsonl", 3)
    fit(tmp_path / "run", kind(str(file), val_path=str(held_out), **READ), max_steps=1)
    checkpoint = tmp_path / "run" / "step=1.ckpt"
    copied = write(tmp_path / "copied.jsonl", 3)
    resumed = fit(tmp_path / "same", kind(str(file), val_path=str(copied), **READ), ckpt_path=checkpoint, max_steps=2)
    assert len(resumed.seen) == 1
    write(held_out, 2)
    message = r"\(val_path=.*\): cannot resume from the checkpoint: the validation (prompts|rows) differ from those"
    for val_path in (str(held_out), None):
        data = kind(str(file), val_path=val_path, **READ)
        with pytest.raises(ValueError, match=kind.__name__ + message):
            fit(tmp_path / "other", data, ckpt_path=checkpoint, max_steps=2)


def test_resume_notices_changed_columns_but_may_test_on_other_prompts(tmp_path: Path, file: Path) -> None:
    """The reward reads the columns."""
    fit(tmp_path / "run", prompts(file), max_steps=1)
    file.write_text(file.read_text().replace('"id": 3', '"id": 33'))
    with pytest.raises(ValueError, match="the training prompts differ"):
        fit(tmp_path / "other", prompts(file), ckpt_path=tmp_path / "run" / "step=1.ckpt")
    other, module = write(tmp_path / "other.jsonl", 5), Recorder()
    data = prompts(other, test_path=str(other), val_path=str(other), predict_path=str(other))
    trainer = make_trainer(tmp_path / "test", limit_val_batches=1.0)
    for run in (trainer.test, trainer.validate, trainer.predict):
        run(module, datamodule=data, ckpt_path=tmp_path / "run" / "step=1.ckpt")
        assert [rows_of(batch) for batch in module.evaluated] == [[0, 1, 2], [3, 4]]  # the order of the file
        module.evaluated.clear()


def test_a_loader_is_used_after_a_fit_with_a_data_module(tmp_path: Path, file: Path) -> None:
    """Lightning keeps the data module of the fit, which has no prompts of these stages."""
    trainer, module = make_trainer(tmp_path / "run", max_steps=1, limit_val_batches=1.0), Recorder()
    trainer.fit(module, prompts(file))
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(module, torch.utils.data.DataLoader(["the", "film"], batch_size=2))
        assert module.evaluated == [["the", "film"]]
        module.evaluated.clear()
        with pytest.raises(ValueError, match=r"PromptDataModule\((val|test|predict)_path=None\): there are no prompts"):
            run(module, datamodule=prompts(file))
        assert not module.evaluated


class WeightsAfter(L.Callback):
    """Sets sampling weights at the end of one batch."""

    def __init__(self, step: int, weights: list[float] | None) -> None:
        self.step, self.weights = step, weights

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.datamodule.set_weights(self.weights)  # type: ignore[attr-defined]


def test_weighted_batches_are_the_documented_draws_and_survive_a_resume(tmp_path: Path, file: Path) -> None:
    """From [seed, batch, 1]: with two keys it would be drawn from the numbers that shuffled the epochs.

    Nothing is read ahead: they hold from the next batch on, mid-epoch; after None the usual order comes back.
    """
    weights = np.array([0.0, 0.1, 0.2, 0.1, 1.0, 0.3, 0.4])
    given = WeightsAfter(2, weights.tolist()), WeightsAfter(9, None)
    whole = fit(tmp_path / "whole", prompts(file), *given).seen
    for batch in range(2, 9):
        assert whole[batch][2] == draws(SEED, batch, weights, BATCH)
    assert whole[:2] + whole[9:] == expected_batches()[:2] + expected_batches()[9:]
    resumed = fit(tmp_path / "from4", prompts(file), given[1], ckpt_path=tmp_path / "whole" / "step=4.ckpt").seen
    assert resumed == whole[4:]


def on_each_rank(folder: Path, rows: Path) -> None:
    report: dict[str, Any] = {}
    data = [prompts(rows, val_path=str(rows)), *(kind(str(rows), batch_size=2, seed=SEED) for kind in ROWS_OF_TEXT)]
    for module in data:
        name = type(module).__name__
        recorder = fit(folder / name, module, devices=2, strategy="ddp", max_epochs=2, limit_val_batches=1.0)
        report[name] = [seen for _, _, seen in recorder.seen]
        report[name + " held out"] = [rows_of(batch) for batch in recorder.evaluated]
    (folder / f"rank{recorder.global_rank}.json").write_text(json.dumps(report))


def test_two_ranks_see_the_same_prompts_and_share_the_texts(tmp_path: Path, file: Path) -> None:
    """Prompts: the global batch on both, as with one process. Texts: two batches of 2 are the batch of 4 of one."""
    on_ranks(2, on_each_rank, tmp_path, file, folder=tmp_path / "ranks")
    ranks = [json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2)]
    for rank in ranks:
        assert rank["PromptDataModule"] == [rows for _, _, rows in expected_batches(2)]
        assert rank["PromptDataModule held out"] == [[0, 1, 2], [3, 4, 5], [6]] * 2
    for kind in ROWS_OF_TEXT:
        one = fit(tmp_path / "one", kind(str(file), batch_size=4, seed=SEED), max_epochs=1).seen
        first, second = (rank[kind.__name__] for rank in ranks)
        assert sorted(first[0] + second[0]) == sorted(one[0][2])
        assert {row for batch in first[:2] + second[:2] for row in batch} == set(range(N_ROWS))
