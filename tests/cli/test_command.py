"""The command: configuration, run folders, resuming, results."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.cli_toys import CONFIG
from tests.helpers.command import Result, run_command
from tests.helpers.event_files import scalars


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A complete run and its folder."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return run_command("fit", "--config", "toy.yaml", cwd=folder).ok(), folder / "runs/version_0"


def test_fit_leaves_a_run_folder_and_says_where(run: tuple[Result, Path]) -> None:
    result, folder = run
    assert {"config.yaml", "checkpoints", "model"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-000006.ckpt",
        "step-000008.ckpt",
    ]
    assert sorted(scalars(folder)) == list(range(8))
    for word in ("runs/version_0/model", "tensorboard --logdir runs", "step-000008.ckpt"):
        assert word in result.out
    first = result.out.splitlines()[0]
    assert first.startswith("lit-ppo: loading")
    assert re.search(r"step 8/8  loss \S+  \(update", result.out)


def test_twice_gives_two_folders_with_the_same_numbers_and_another_seed_others(
    config: Path, tmp_path: Path, run: tuple[Result, Path]
) -> None:
    """Twice in one process, which leaves nothing behind for the second run."""
    run_command("fit", "--config", config, "--seed_everything=7", cwd=tmp_path, calls=2).ok()
    first, second = (scalars(tmp_path / f"runs/version_{i}") for i in range(2))
    assert first == second
    assert first != scalars(run[1])
    assert yaml.safe_load((run[1] / "config.yaml").read_text())["seed_everything"] == 42


def test_resume_goes_on_in_the_same_folder(config: Path, tmp_path: Path, run: tuple[Result, Path]) -> None:
    run_command("fit", "--config", config, "--trainer.max_steps=5", cwd=tmp_path).ok()
    (tmp_path / "runs/version_0/checkpoints/step-000005.ckpt").unlink()  # as if it had been killed after the fifth
    run_command("fit", "--config", config, "--ckpt_path=last", cwd=tmp_path).ok()
    assert not (tmp_path / "runs/version_1").exists()
    assert scalars(tmp_path / "runs/version_0") == scalars(run[1])
    names = [path.name for path in sorted((tmp_path / "runs/version_0/checkpoints").iterdir())]
    assert names == ["step-000006.ckpt", "step-000008.ckpt"]


def test_a_run_that_was_killed_before_its_end_ends_and_a_complete_one_stays_as_it_is(
    config: Path, tmp_path: Path
) -> None:
    command, folder = ["fit", "--config", config, "--ckpt_path=auto"], tmp_path / "runs/version_0"

    def files() -> dict[Path, tuple[bytes, int]]:
        return {x: (x.read_bytes(), x.stat().st_mtime_ns) for x in (tmp_path / "runs").rglob("*") if x.is_file()}

    run_command(*command, cwd=tmp_path).ok()
    exported = (folder / "model/weights.pt").read_bytes()
    (folder / "lit_ppo_completed.json").unlink()
    shutil.rmtree(folder / "model")
    ended = run_command(*command, cwd=tmp_path).ok()
    assert "8 steps (8 of them before it was resumed)" in ended.out
    assert (folder / "model/weights.pt").read_bytes() == exported
    before = files()
    assert "is complete, nothing is left to do" in run_command(*command, cwd=tmp_path).ok().out
    assert files() == before
    run_command(*command, "--trainer.max_epochs=2", cwd=tmp_path).ok()
    assert sorted(scalars(folder)) == [*range(16)]


def test_last_without_a_checkpoint_is_an_error(config: Path, tmp_path: Path) -> None:
    result = run_command("fit", "--config", config, "--ckpt_path", "last", cwd=tmp_path)
    result.refused("--ckpt_path last", "runs/version_*/checkpoints", "start a new run")
    assert not (tmp_path / "runs").exists()


def test_the_command_line_rules_over_the_checkpoint(config: Path, tmp_path: Path) -> None:
    """Lightning's own command takes the model's arguments from the checkpoint."""
    run_command("fit", "--config", config, "--trainer.max_steps=3", cwd=tmp_path).ok()
    out = run_command("fit", "--config", config, "--model.start=here", "--ckpt_path=last", cwd=tmp_path).ok().out
    assert "model.init_args.start: None -> here" in out
    assert "tests.helpers.cli_toys.Toy: Lightning restores optimizers and schedules as they were saved" in out
    saved = yaml.safe_load((tmp_path / "runs/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["start"] == "here"


def test_overlays_append_callbacks_by_short_name(config: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from tests.helpers.cli_toys import Shout\nclass Whisper(Shout):\n    pass\n")
    for name, entry in {"one": {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}},
                        "two": {"class_path": "mine.Whisper", "init_args": {"word": "psst"}}}.items():  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [entry]}}))
    args = ["fit", "--config", config, "--config", "one.yaml", "--config", "two.yaml"]
    assert "psst!" in run_command(*args, cwd=tmp_path).ok().out
    saved = yaml.safe_load((tmp_path / "runs/version_0/config.yaml").read_text())
    names = [callback["class_path"].rsplit(".")[-1] for callback in saved["trainer"]["callbacks"]]
    assert names == ["EarlyStopping", "Whisper"]


STOPS = """
import warnings

import lightning as L

from lit_ppo.callbacks.checks import warn_of_gaps


class Stops(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            warn_of_gaps(self, trainer)
            warnings.warn("the writer of the callback looks for this", stacklevel=1)
            trainer.should_stop = True
"""


def test_warnings_are_words_and_an_epoch_that_a_callback_ends_is_not_called_the_last(
    config: Path, tmp_path: Path, run: tuple[Result, Path]
) -> None:
    """The place in the source is told of what is not ours."""
    (tmp_path / "mine.py").write_text(STOPS)
    limit = "`Trainer.fit` stopped: `max_epochs=1` reached."
    assert limit in run[0].out + run[0].err
    ended = run_command(
        "fit", "--config", config, "--trainer.callbacks+=mine.Stops", "--trainer.log_every_n_steps=2", cwd=tmp_path
    ).ok()
    assert limit not in ended.out + ended.err
    assert "Stopped early: 3 of 8 steps" in ended.out
    said = (ended.out + ended.err).splitlines()
    assert any(line.startswith("lit-ppo: warning: Stops: Trainer(log_every_n_steps=2) can skip") for line in said)
    assert any(re.search(r"mine.py:\d+: UserWarning: the writer of the callback", line) for line in said)


def test_export_replaces_a_model_but_nothing_else(config: Path, tmp_path: Path) -> None:
    """Without logger and checkpoints the model is all that is written."""
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--export.dirpath=out"]
    for _ in range(2):
        run_command("fit", "--config", config, *off, cwd=tmp_path).ok()
    assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("events*")]
    (tmp_path / "out" / "config.json").unlink()
    run_command("fit", "--config", config, "--export.dirpath=out", cwd=tmp_path).refused("ExportModel(dirpath='out')")
    assert (tmp_path / "out" / "weights.pt").is_file()


def test_checkpoint_settings(config: Path, tmp_path: Path) -> None:
    settings = ["--checkpoint.keep=3", "--checkpoint.every_n_train_steps=2", "--checkpoint.dirpath=saved"]
    run_command("fit", "--config", config, *settings, cwd=tmp_path).ok()
    names = [path.name for path in sorted((tmp_path / "saved").iterdir())]
    assert names == ["step-000004.ckpt", "step-000006.ckpt", "step-000008.ckpt"]
    result = run_command(
        "fit", "--config", config, *settings, "--ckpt_path=last", "--trainer.max_epochs=2", cwd=tmp_path
    )
    assert "saved/step-000008.ckpt" in result.ok().err


def test_the_configuration_of_a_run_folder_means_that_run(config: Path, tmp_path: Path) -> None:
    """Also where a newer run lies beside it, and from another folder."""
    for lr in (0.1, 0.2):
        run_command("fit", "--config", config, "--trainer.max_steps=4", f"--model.lr={lr}", cwd=tmp_path).ok()
    runs, checkpoint = tmp_path / "runs", "version_0/checkpoints/step-000004.ckpt"
    newer = {path: path.stat().st_mtime_ns for path in (runs / "version_1").rglob("*")}
    given = ["--config", "../runs/version_0/config.yaml", "--ckpt_path=last"]
    for command in ("validate", "test", "predict"):
        out = run_command(command, *given, cwd=tmp_path / "elsewhere").ok().out
        assert re.search(rf"^{command}: weights of \S*runs/{checkpoint}$", out, re.MULTILINE)
    more = [*given, "--trainer.max_steps=6"]
    run_command("fit", *more, "--trainer.default_root_dir=new", cwd=tmp_path / "elsewhere").refused(
        "--trainer.default_root_dir new", "goes on in its own folder", "runs/version_0", "leave the option out"
    )
    others = {path.name for path in (tmp_path / "elsewhere/runs").iterdir()}
    out = run_command("fit", *more, cwd=tmp_path / "elsewhere").ok().out
    assert "trainer.max_steps: 4 -> 6" in out
    assert "model" not in out.partition("with another configuration:")[2].partition("fit: building")[0]
    assert (runs / "version_0/checkpoints/step-000006.ckpt").exists()
    assert sorted(scalars(runs / "version_0")) == list(range(6))
    assert {path: path.stat().st_mtime_ns for path in (runs / "version_1").rglob("*")} == newer
    assert {path.name for path in (tmp_path / "elsewhere/runs").iterdir()} == others


def test_the_weights_that_are_tested_are_those_of_the_run(run: tuple[Result, Path]) -> None:
    """A run folder's configuration means its last checkpoint; any other means the untrained model, which is said."""
    folder = run[1]

    def tested(*arguments: Any) -> tuple[str, float]:
        out = run_command("test", "--config", *arguments, cwd=folder.parents[1]).ok().out
        [line] = [line for line in out.splitlines() if line.startswith("test: weights of")]
        return line.removeprefix("test: weights of "), float(re.findall(r"test/\S+ +\S? *([\d.e-]+)", out)[0])

    last = folder / "checkpoints/step-000008.ckpt"
    path, value = tested(folder / "config.yaml")
    assert (path, value) == tested("toy.yaml", "--ckpt_path", last)
    assert path == str(last)
    first = folder / "checkpoints/step-000006.ckpt"
    assert tested(folder / "config.yaml", "--ckpt_path", first)[0] == str(first)
    untrained, other = tested("toy.yaml")
    assert untrained.startswith("no checkpoint: ")
    assert other != value
