"""Files with names that lit-ppo also writes, but which somebody else wrote, are named and stay as they are."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lit_ppo import TextDataModule
from lit_ppo.callbacks import SampleLogger
from lit_ppo.callbacks.best_checkpoint import BestCheckpoint
from lit_ppo.cli.main import main
from lit_ppo.cli.stages import run_stages
from lit_ppo.quickstart import ReviewText
from tests.helpers.cli_toys import CONFIG
from tests.helpers.toys import make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
)
SMALL = {"n_reviews": 20, "n_labelled": 21, "n_prompts": 4, "n_eval_prompts": 2}
MINE = "mine, and not to be lost"


def stage(folder: Path) -> None:
    session: Any = SimpleNamespace(heartbeat=SimpleNamespace(say=lambda *_, **__: None))
    run_stages(session, {"sft": ([], {"trainer": {"default_root_dir": str(folder)}})})


def fit_into(folder: Path) -> None:
    place = {"save_dir": str(folder.parent), "name": "", "version": folder.name}
    logger = {"class_path": "TensorBoardLogger", "init_args": place}
    trainer = {**CONFIG["trainer"], "logger": logger, "default_root_dir": str(folder), "max_steps": 1}
    (folder / "toy.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": trainer}))
    assert main(["fit", "--config", str(folder / "toy.yaml")]) == 0


def tokenizer(folder: Path) -> None:
    (folder / "text.jsonl").write_text('{"text": "a fine film"}\n' * 9)
    TextDataModule(
        str(folder / "text.jsonl"), tokenizer_path=str(folder), tokenizer_vocab_size=260, batch_size=2
    ).prepare_data()


def samples(folder: Path) -> None:
    make_trainer(folder, logger=False, callbacks=[SampleLogger()], max_steps=1).fit(
        make_module(folder / "lm"), make_data(folder)
    )


def predict(folder: Path) -> None:
    data = make_data(folder, predict_path=str(folder / "prompts.jsonl"))
    make_trainer(folder, logger=False).predict(make_module(folder / "lm"), data)


def reviews(folder: Path) -> None:
    ReviewText(data_root=str(folder), **SMALL).prepare_data()


WRITERS: dict[str, Callable[[Path], None]] = {
    "sft.stage.json": stage,
    "config.yaml": fit_into,
    "tokenizer.json": tokenizer,
    "tokenizer_config.json": tokenizer,
    "trained_on.json": tokenizer,
    "samples.jsonl": samples,
    "predictions.jsonl": predict,
    "reviews.jsonl": reviews,
    "labelled.jsonl": reviews,
    "prompts.jsonl": reviews,
    "prompts_eval.jsonl": reviews,
    "written.json": reviews,
}


@pytest.mark.parametrize("name", WRITERS)
def test_they_are_named_and_stay(tmp_path: Path, tiny_lm: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "lm").symlink_to(tiny_lm)
    for content in (MINE, '{"a": 1}', "[]"):
        (tmp_path / name).write_text(content)
        for _ in range(2):
            with pytest.raises((Exception, SystemExit)) as stopped:
                WRITERS[name](tmp_path)
            words = capsys.readouterr().err if name == "config.yaml" else str(stopped.value)
            assert (name if "token" not in name and "trained" not in name else "another origin") in words
        assert (tmp_path / name).read_text() == content


def test_checkpoints_of_the_best_update_keep_to_their_own(tmp_path: Path) -> None:
    """Also where the state that a checkpoint brings names another file to remove."""
    removed: list[str] = []
    trainer: Any = SimpleNamespace(
        log_dir=None, default_root_dir=str(tmp_path), checkpoint_callback=None, is_global_zero=True,
        save_checkpoint=lambda file, weights_only: Path(file).write_text("ours"),
        strategy=SimpleNamespace(remove_checkpoint=lambda path: removed.append(Path(path).name), broadcast=lambda x: x),
    )  # fmt: skip
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "best-step-000001.ckpt").write_text(MINE)
    best = BestCheckpoint("RewardHackingMonitor")
    best.path = str(folder / "thesis.tex")
    for update in (1, 2):
        best.save(trainer, update)
    assert (folder / "best-step-000001.ckpt").read_text() == MINE
    assert removed == ["best-step-000001-v1.ckpt"]
    assert best.path == str(folder / "best-step-000002.ckpt")
