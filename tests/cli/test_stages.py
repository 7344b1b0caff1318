"""Stages: run in order in processes of their own, skipped only when nothing of theirs has changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_ppo.cli.heartbeat import Heartbeat
from lit_ppo.cli.stages import Marker, Stage, StageRunner
from lit_ppo.run.errors import CommandError
from lit_ppo.run.stop import Interrupts
from tests.helpers.cli_toys import CONFIG
from tests.helpers.command import run_command


def stage_config(name: str, **data: Any) -> dict[str, Any]:
    """Configuration of a stage that exports to ``runs/<name>/model``."""
    return {
        **CONFIG,
        "data": {"class_path": "tests.helpers.cli_toys.ToyData", "init_args": data},
        "trainer": {**CONFIG["trainer"], "default_root_dir": f"runs/{name}", "max_steps": 2},
        "export": {"dirpath": f"runs/{name}/model"},
    }


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Two stages, then a run whose model starts from the second; all configurations lie in a folder of their own."""
    write(tmp_path / "configs/parts/first.yaml", stage_config("first", path="text.txt"))
    write(tmp_path / "configs/parts/second.yaml", stage_config("second"))
    stages = [
        {"name": "first", "config": ["parts/first.yaml"], "args": ["--model.lr", 0.2]},
        {"name": "second", "config": ["parts/second.yaml"]},
    ]
    main = {**CONFIG, "stages": stages, "trainer": {**CONFIG["trainer"], "default_root_dir": "runs/main"}}
    (tmp_path / "text.txt").write_text("some text")
    return write(tmp_path / "configs/job.yaml", main)


def test_the_job_end_to_end(job: Path, tmp_path: Path) -> None:
    """All in one, since every stage is a process that imports everything."""
    result = run_command("fit", "--config", "configs/job.yaml", "--data_root=.", cwd=tmp_path).ok()
    lines = result.out.splitlines()
    told = [line for line in lines if line.startswith("[stage")]
    assert told[0].startswith("[stage 1/2: first] not done yet; running: lit-ppo fit --config configs/parts/first.yaml")
    assert "--model.lr 0.2 --seed_everything 42 --data_root ." in told[0]
    assert "ToyData reads text.txt under ." in lines  # the stage's own words come through
    assert lines.index("fit: building model, data and trainer", lines.index(told[-1])) > lines.index(told[-1])
    for name in ("first", "second"):
        assert (tmp_path / "runs" / name / "model" / "weights.pt").is_file()
        assert "step 2/2" in (tmp_path / "runs" / name / f"{name}.stage.log").read_text()
    saved = yaml.safe_load((tmp_path / "runs/first/version_0/config.yaml").read_text())
    assert (saved["model"]["init_args"]["lr"], saved["seed_everything"], saved["data_root"]) == (0.2, 42, ".")

    again = run_command("fit", "--config", job, "--data_root=.", cwd=tmp_path).ok().out
    assert [line.split("] ")[1].split(",")[0] for line in again.splitlines() if line.startswith("[stage")] == [
        "already done",
        "already done",
    ]

    # In a launched process a complete stage is no matter; an incomplete one is an error, and is not run.
    ranked = {"LOCAL_RANK": "0"}
    checked = ["--trainer.max_steps=1", "--data_root=."]
    run_command("fit", "--config", job, *checked, cwd=tmp_path, env=ranked).ok()
    (tmp_path / "text.txt").write_text("other text")
    refused = run_command("fit", "--config", job, *checked, cwd=tmp_path, env=ranked)
    refused.refused("stage 'first'", "text.txt has changed", "LOCAL_RANK=0", "once in one process")
    assert "running:" not in refused.out

    # In one process it runs again, and so does the stage after it.
    reasons = run_command("fit", "--config", job, *checked, cwd=tmp_path).ok().out
    assert "[stage 1/2: first] text.txt has changed; running" in reasons
    assert "[stage 2/2: second] an earlier stage has run again; running" in reasons


def test_a_failing_stage_ends_the_command_with_its_last_line(job: Path, tmp_path: Path) -> None:
    write(tmp_path / "configs/parts/second.yaml", stage_config("second", rows=0))
    (tmp_path / "runs/first").mkdir(parents=True)
    stages = [{"name": "second", "config": ["parts/second.yaml"], "args": ["--model.fail_at=1", "--data.rows=16"]}]
    write(job, {**CONFIG, "stages": stages})
    result = run_command("fit", "--config", job, cwd=tmp_path)
    result.refused("Toy(fail_at=1): failed as told")
    assert "stage 'second' ended with code 1" in result.out
    assert "building model" not in result.out.split("stage 'second' ended")[1]
    assert not (tmp_path / "runs/second/second.stage.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model": {"class_path": "tests.helpers.cli_toys.Toy", "init_args": {"widht": 1}}},
            ["stage 'second'", "'widht'", "'width'"],
        ),
        ({"stages": [{"name": "x"}]}, ["stage 'second'", "stages of its own"]),
    ],
)
def test_a_bad_stage_is_found_before_any_stage_runs(
    job: Path, tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    write(tmp_path / "configs/parts/second.yaml", {**stage_config("second"), **change})
    result = run_command("fit", "--config", job, cwd=tmp_path).refused(*words)
    assert "running:" not in result.out


def test_other_subcommands_and_print_config_run_no_stage(job: Path, tmp_path: Path) -> None:
    for args in (["validate"], ["fit", "--print_config"]):
        assert "[stage" not in run_command(args[0], "--config", job, *args[1:], cwd=tmp_path).ok().out
    assert not (tmp_path / "runs/first").exists()


def test_the_saved_configuration_names_the_stages_from_anywhere(job: Path, tmp_path: Path) -> None:
    write(job, {**yaml.safe_load(job.read_text()), "model": {"class_path": "tests.helpers.cli_toys.Toy"}})
    run_command("validate", "--config", job, cwd=tmp_path).ok()
    (saved,) = tmp_path.rglob("version_0/config.yaml")
    assert yaml.safe_load(saved.read_text())["stages"][0]["config"] == [str(tmp_path / "configs/parts/first.yaml")]
    elsewhere = tmp_path / "elsewhere"
    run_command("validate", "--config", saved, cwd=elsewhere).ok()


@pytest.mark.parametrize("name", ["a/b", "", "two words"])
def test_names_of_stages(name: str) -> None:
    with pytest.raises(CommandError, match="name"):
        runner([Stage(name)])


def test_names_of_stages_are_unique() -> None:
    with pytest.raises(CommandError, match="'a' must be unique"):
        runner([Stage("a"), Stage("a")])


def runner(stages: list[Stage]) -> StageRunner:
    return StageRunner(stages, lambda _: {}, Heartbeat(enabled=False), Interrupts(lambda: None))


def touch_data(config: dict[str, Any], folder: Path) -> None:
    (folder / "data.txt").write_text("changed")


def remove_output(config: dict[str, Any], folder: Path) -> None:
    (folder / "run/model/weights").unlink()


def cut_output(config: dict[str, Any], folder: Path) -> None:
    (folder / "run/model/weights").write_text("w")


def other_seed(config: dict[str, Any], folder: Path) -> None:
    config["seed_everything"] = 2


def other_argument(config: dict[str, Any], folder: Path) -> None:
    config["trainer"]["max_steps"] = 7


def more_data(config: dict[str, Any], folder: Path) -> None:
    (folder / "val.txt").write_text("validation")


def cut_marker(config: dict[str, Any], folder: Path) -> None:
    (folder / "run/first.stage.json").write_text("{")


def more_in_the_data_folder(config: dict[str, Any], folder: Path) -> None:
    (folder / "tokenizer/later").write_text("a later stage writes beside")


def other_config_file(config: dict[str, Any], folder: Path) -> None:
    config["config"] = ["elsewhere.yaml"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (touch_data, "data.txt has changed"),
        (remove_output, "weights is gone"),
        (cut_output, "weights has changed"),
        (other_seed, "configuration or seed has changed"),
        (other_argument, "configuration or seed has changed"),
        (more_data, "data files have changed"),
        (cut_marker, "cannot be read"),
        (more_in_the_data_folder, ""),
        (other_config_file, ""),
    ],
)
def test_what_makes_a_stage_run_again(
    tmp_path: Path, change: Callable[[dict[str, Any], Path], None], reason: str
) -> None:
    for name in ("data.txt", "run/model/weights", "tokenizer/vocabulary"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    config: dict[str, Any] = {
        "seed_everything": 1,
        "config": ["here.yaml"],
        "trainer": {"default_root_dir": str(tmp_path / "run"), "max_steps": 3},
        "data": {"init_args": {"path": "data.txt", "val_path": ["val.txt"], "data_root": str(tmp_path)}},
        "model": {"init_args": {"tokenizer": str(tmp_path / "tokenizer")}},
        "export": {"dirpath": str(tmp_path / "run/model")},
    }
    assert Marker("first", config, str(tmp_path), []).missing() == "not done yet"
    Marker("first", config, str(tmp_path), []).write()
    assert Marker("first", config, str(tmp_path), []).missing() == ""
    assert Marker("first", config, str(tmp_path), ["another"]).missing() == "an earlier stage has run again"
    change(config, tmp_path)
    found = Marker("first", config, str(tmp_path), []).missing()
    assert reason in found
    assert bool(reason) == bool(found)


def test_a_stage_that_ran_again_leaves_another_digest(tmp_path: Path) -> None:
    config = {"trainer": {"default_root_dir": str(tmp_path)}}
    digests = set()
    for _ in range(2):
        marker = Marker("first", config, None, [])
        marker.write()
        digests.add(marker.digest())
    assert len(digests) == 2
    assert json.loads(marker.path.read_text())["outputs"] == {}


def test_command_of_a_stage() -> None:
    command = Stage("a", [], ["--x", 1, True, 0.5]).command(7, "/data")
    assert command == ["fit", "--x", "1", "true", "0.5", "--seed_everything", "7", "--data_root", "/data"]
    assert Stage("a").command(False, None) == ["fit", "--seed_everything", "false"]
