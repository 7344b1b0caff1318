"""Other loggers than TensorBoard's: CSV, and services in the shape of W&B and MLflow."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from lit_ppo.callbacks import AlignmentTax, Cockpit, CollapseMonitor, RewardHackingMonitor, SampleLogger
from lit_ppo.ppo.preflight import check_loggers
from lit_ppo.run.folder import RunTrainer
from tests.helpers.cli_toys import CONFIG
from tests.helpers.command import run_command
from tests.helpers.loggers import MlflowLike, WandbLike
from tests.helpers.toys import count_good, make_data, make_module, make_trainer, texts, write_prompts

TAGS = {
    "objective/score", "objective/kl", "policy/loss", "value/loss", "response/length", "throughput/tokens_per_second",
    "val/score", "val/kl", "val/win_rate", "collapse/level", "collapse/kl_per_token", "hacking/verdict", "hacking/gold",
    "tax/loss", "tax/loss_increase",
}  # fmt: skip


def short(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [-len(response) / 100 for response in responses]


def watched(folder: Path, lm: Path, logger: Logger | bool, **options: Any) -> None:
    """Two updates with every monitor, arguments that are functions, and validation before, between and after."""
    data = make_data(folder, val_path=str(write_prompts(folder / "held_out.jsonl", 5)))
    monitors = [
        SampleLogger(every=1, prompts=3), Cockpit(every=1), CollapseMonitor(),
        RewardHackingMonitor(gold=short, every=1, prompts=4), AlignmentTax(texts(folder), every=1),
    ]  # fmt: skip
    trainer = make_trainer(folder, callbacks=monitors, logger=logger, val_check_interval=1)
    trainer.fit(make_module(lm, **options), data)


def samples(path: Path) -> list[int]:
    return [json.loads(line)["update"] for line in path.read_text().splitlines()]


def test_csv_has_every_number_and_the_samples_lie_beside(tmp_path: Path, tiny_lm: Path) -> None:
    watched(tmp_path, tiny_lm, CSVLogger(tmp_path, name="csv", version=0))
    folder = tmp_path / "csv/version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {name for row in rows for name, value in row.items() if value} >= TAGS
    assert sum(bool(row["objective/score"]) for row in rows) == 2
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["generation"] == {"max_new_tokens": 10}
    assert samples(folder / "samples.jsonl") == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("service", [WandbLike, MlflowLike])
def test_services_get_every_number_under_names_that_they_take(tmp_path: Path, tiny_lm: Path, service: Any) -> None:
    """Several rewards, each also under its own name, and a judge."""
    logger = service()
    watched(tmp_path, tiny_lm, logger, rewards={"good": count_good, "short": short}, eval_rewards={"judge": short})
    names = {name for row in logger.rows for name in row}
    assert names >= TAGS | {"objective/score/good", "val/score/short", "val/score/judge", "val/win_rate/judge"}
    assert sum("objective/score" in row for row in logger.rows) == 2
    assert str(logger.params["kl_coef"]) == "0.1"
    assert str(logger.params.get("generation/max_new_tokens", logger.params.get("generation"))) in (
        "10", "{'max_new_tokens': 10}",
    )  # fmt: skip
    assert samples(tmp_path / "samples.jsonl") == [0] * 3 + [1] * 3 + [2] * 3  # the service has no folder here


def test_runs_in_one_folder_keep_their_samples_apart(tmp_path: Path, tiny_lm: Path) -> None:
    """As Lightning's own checkpoints: by project and run."""
    for run in ("first", "second"):
        watched(tmp_path, tiny_lm, WandbLike(str(tmp_path / "all"), run))
    for run in ("first", "second"):
        assert len(samples(tmp_path / f"all/project/{run}/samples.jsonl")) == 9


def test_a_store_of_files_takes_one_reward(tmp_path: Path, tiny_lm: Path) -> None:
    """No tag is the folder of another then; with several, where it would be, the store is refused before the run."""
    logger = MlflowLike()
    logger._tracking_uri = "file:/tmp/mlruns"  # type: ignore[attr-defined]
    watched(tmp_path, tiny_lm, logger)
    names = {name for row in logger.rows for name in row}
    assert not {f"{name}/" for name in names} & {name[: name.rindex("/") + 1] for name in names if "/" in name}
    for options in ({"rewards": {"good": count_good, "short": short}}, {"eval_rewards": {"good": short}}):
        with pytest.raises(ValueError, match=r"MlflowLike\(tracking_uri='file:/tmp/mlruns'\).*val/score/good"):
            watched(tmp_path, tiny_lm, logger, **options)


def test_stores_that_are_not_of_files_take_several_rewards() -> None:
    for uri in ("sqlite:///m.db", "http://localhost:5000"):
        check_loggers([SimpleNamespace(_tracking_uri=uri), SimpleNamespace()], ["judge"])
    with pytest.raises(ValueError, match="use a database"):
        check_loggers([SimpleNamespace(), SimpleNamespace(_tracking_uri="./mlruns")], ["judge"])


def test_which_loggers_leave_the_run_without_a_folder(tmp_path: Path) -> None:
    """The first one's counts, as it does for Lightning."""
    ours, other = CSVLogger(tmp_path), WandbLike()
    for loggers, needed in (
        (False, True),
        (ours, False),
        (other, True),
        ([ours, other], False),
        ([other, ours], True),
    ):
        trainer = RunTrainer(logger=loggers, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
        assert trainer.needs_folder is needed


def test_the_commands_run_folder_is_its_own_with_any_logger(tmp_path: Path) -> None:
    """``last`` finds it, and the resumed run stays in it."""
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "logger": {"class_path": "tests.helpers.loggers.WandbLike"}}}
    config["trainer"]["logger"]["init_args"] = {"save_dir": "elsewhere"}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    for _ in range(2):
        out = run_command("fit", "--config", "toy.yaml", "--trainer.max_steps=4", cwd=tmp_path).ok().out
    assert "tensorboard" not in out
    assert "Run folder:  runs/version_1" in out
    out = run_command("fit", "--config", "toy.yaml", "--ckpt_path=last", cwd=tmp_path).ok().out
    assert "Run folder:  runs/version_1" in out
    names = {path.name for path in (tmp_path / "runs/version_1").iterdir()}
    assert names == {"config.yaml", "checkpoints", "model", "lit_ppo_completed.json"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"version_0", "version_1"}
    assert {path.name for path in tmp_path.iterdir()} <= {"toy.yaml", "runs", ".stdout", ".stderr"}
    assert [path.name for path in sorted((tmp_path / "runs/version_1/checkpoints").iterdir())] == [
        "step-000006.ckpt", "step-000008.ckpt",
    ]  # fmt: skip


def test_a_run_without_a_logger_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """A second run leaves the first as it is, and so does an evaluation, which takes its checkpoint."""

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}

    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "logger": False}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    out = run_command("fit", "--config=toy.yaml", "--trainer.max_steps=4", cwd=tmp_path).ok().out
    assert "Run folder:  runs/version_0" in out
    assert "ensor" not in out.partition("Run folder")[2]
    first = tmp_path / "runs/version_0"
    before = content()
    assert {path.name for path in first.iterdir()} == {"config.yaml", "checkpoints", "model", "lit_ppo_completed.json"}
    run_command("fit", "--config=toy.yaml", "--seed_everything=5", cwd=tmp_path).ok()
    for command in ("validate", "predict"):
        out = run_command(command, "--config=runs/version_0/config.yaml", cwd=tmp_path).ok().out
        assert f"{command}: weights of {first}/checkpoints/step-000004.ckpt" in out
    assert content() == before
    resumed = ["fit", "--config=runs/version_0/config.yaml", "--ckpt_path=last", "--trainer.max_steps=6"]
    assert "Run folder:  " in run_command(*resumed, cwd=tmp_path).ok().out
    assert (first / "checkpoints/step-000006.ckpt").exists()


def test_only_a_training_run_writes_a_configuration(tmp_path: Path) -> None:
    """With a logger's folder that evaluations share, too."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": "mine"}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], "logger": logger}}))
    run_command("fit", "--config=toy.yaml", cwd=tmp_path).ok()
    saved = (tmp_path / "runs/mine/config.yaml").read_bytes()
    out = run_command("test", "--config=runs/mine/config.yaml", cwd=tmp_path).ok().out
    assert "runs/mine/checkpoints/step-000008.ckpt" in out
    assert (tmp_path / "runs/mine/config.yaml").read_bytes() == saved
