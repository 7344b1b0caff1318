"""Stages: run in order in processes of their own, skipped only when nothing of theirs has changed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_ppo.cli.session import Session
from lit_ppo.cli.stages import Stage, check_stages_stay, digests, files_of, outdated, run_stages
from lit_ppo.run.errors import CommandError
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
    """Two stages, of which the second fails, then a run; all configurations lie in a folder of their own."""
    write(tmp_path / "configs/parts/first.yaml", stage_config("first", path="text.txt"))
    write(tmp_path / "configs/parts/second.yaml", stage_config("second"))
    stages = [
        {"name": "first", "config": ["parts/first.yaml"], "args": ["--model.lr", 0.2]},
        {"name": "second", "config": ["parts/second.yaml"], "args": ["--model.fail_at=1"]},
    ]
    main = {**CONFIG, "stages": stages, "trainer": {**CONFIG["trainer"], "default_root_dir": "runs/main"}}
    (tmp_path / "text.txt").write_text("some text")
    return write(tmp_path / "configs/job.yaml", main)


def test_the_job_end_to_end(job: Path, tmp_path: Path) -> None:
    """All in one, since every stage is a process that imports everything."""
    result = run_command("fit", "--config", "configs/job.yaml", "--data_root=.", cwd=tmp_path)
    assert result.refused("Toy(fail_at=1): failed as told").code == 1
    lines = result.out.splitlines()
    told = [line for line in lines if line.startswith("[stage")]
    command = "lit-ppo fit --config=configs/parts/first.yaml --model.lr 0.2 --seed_everything 42 --data_root ."
    assert told[0] == f"[stage 1/2: first] not done yet; running: {command}"
    assert "ToyData reads text.txt under ." in lines  # the stage's own output is shown
    assert (tmp_path / "runs/first/model/weights.pt").is_file()
    saved = yaml.safe_load((tmp_path / "runs/first/version_0/config.yaml").read_text())
    assert (saved["model"]["init_args"]["lr"], saved["seed_everything"], saved["data_root"]) == (0.2, 42, ".")
    assert "stage 'second' ended with code 1" in result.out
    assert "building model" not in result.out.split("stage 'second' ended")[1]
    assert not (tmp_path / "runs/second/second.stage.json").exists()

    # Without the stage that fails; a launched process accepts a complete stage, and refuses an incomplete one.
    content = yaml.safe_load(job.read_text())
    write(job, {**content, "stages": content["stages"][:1]})
    again = ["fit", "--config", job, "--data_root=.", "--trainer.max_steps=1"]
    lines = run_command(*again, cwd=tmp_path, env={"LOCAL_RANK": "0"}).ok().out.splitlines()
    (skipped,) = (number for number, line in enumerate(lines) if line.startswith("[stage 1/1: first] already done"))
    assert skipped < lines.index("fit: building model, data and trainer")
    (tmp_path / "text.txt").write_text("other text")
    refused = run_command(*again, cwd=tmp_path, env={"LOCAL_RANK": "0"})
    refused.refused("stage 'first'", "text.txt has changed", "LOCAL_RANK=0", "once in one process")
    assert "running:" not in refused.out

    # Its model is what the run started from, so a resumed run may not replace it.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name not in (".stdout", ".stderr")}
    refused = run_command(*again, "--trainer.max_steps=2", "--ckpt_path=last", cwd=tmp_path)
    words = ["--ckpt_path runs/main/version_0/checkpoints/step-000001.ckpt", "stage 'first' would run again"]
    refused.refused(
        *words, "(text.txt has changed)", "restore what has changed, or start a new run without --ckpt_path"
    )
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name not in (".stdout", ".stderr")}
    assert after == before


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


def test_other_subcommands_run_no_stage_and_save_their_names_for_anywhere(job: Path, tmp_path: Path) -> None:
    printed = run_command("fit", "--config", job, "--print_config", cwd=tmp_path).ok().out
    assert "[stage" not in printed
    assert "[stage" not in run_command("validate", "--config", job, cwd=tmp_path).ok().out
    assert not (tmp_path / "runs/first").exists()
    saved = tmp_path / "saved.yaml"
    saved.write_text(printed)
    assert yaml.safe_load(saved.read_text())["stages"][0]["config"] == [str(tmp_path / "configs/parts/first.yaml")]
    run_command("validate", "--config", saved, cwd=tmp_path / "elsewhere").ok()


@pytest.mark.parametrize("names", [["a/b"], [""], ["a", "a"]])
def test_names_of_stages(config: Path, tmp_path: Path, names: list[str]) -> None:
    stages = [{"name": name, "config": [str(config)]} for name in names]
    job = write(tmp_path / "job.yaml", {**CONFIG, "stages": stages})
    run_command("fit", "--config", job, cwd=tmp_path).refused(f"stage {names[-1]!r}", "unique")


CHANGES: dict[str, tuple[str, str | None, str]] = {
    # file, its new content (None: removed), what is said
    "data": ("data.txt", "changed", "data.txt has changed"),
    "export is gone": ("run/model/weights", None, "weights has changed"),
    "export is cut": ("run/model/weights", "w", "weights has changed"),
    "a file outside the data root, of the same name": ("elsewhere/data.txt", "stale", ""),
    "record is cut": ("run/first.stage.json", "{", "not done yet"),
    "a later stage writes into the folder": ("tokenizer/later", "new", ""),
}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """Record and configuration of a complete stage, started from a folder with a file that it does not read."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/data.txt").write_text("not read")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("data.txt", "run/model/weights", "tokenizer/vocabulary"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    config: dict[str, Any] = {
        "seed_everything": 1,
        "config": ["here.yaml"],
        "data_root": str(tmp_path),
        "trainer": {"default_root_dir": str(tmp_path / "run"), "max_steps": 3},
        "data": {"init_args": {"path": "data.txt", "val_path": ["val.txt"], "data_root": str(tmp_path)}},
        "model": {"init_args": {"tokenizer": str(tmp_path / "tokenizer")}},
        "export": {"dirpath": str(tmp_path / "run/model")},
    }
    record = tmp_path / "run/first.stage.json"
    assert outdated(record, config, "") == "not done yet"
    record.write_text(json.dumps(digests(config, "", files_of(config))))
    assert outdated(record, config, "") == ""
    return record, config


@pytest.mark.parametrize(("file", "content", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_files_that_make_a_stage_run_again(
    tmp_path: Path, stage: tuple[Path, dict[str, Any]], file: str, content: str | None, reason: str
) -> None:
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    found = outdated(*stage, "")
    assert found.endswith(reason)
    assert bool(reason) == bool(found)


@pytest.mark.parametrize(("file", "content", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_what_a_resumed_run_refuses(
    tmp_path: Path, stage: tuple[Path, dict[str, Any]], file: str, content: str | None, reason: str
) -> None:
    """Also before a later stage; a stage that is not there any more may run."""
    _, config = stage
    stages = {"first": (["-a"], config), "second": (["-b"], {**config, "export": {"dirpath": None}})}
    check_stages_stay("last", stages)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    if not reason:
        check_stages_stay("last", stages)
        return
    with pytest.raises(CommandError, match=rf"^--ckpt_path last: stage 'first' would run again \(\S*{reason}\)"):
        check_stages_stay("last", stages)
    shutil.rmtree(tmp_path / "run")
    check_stages_stay("last", stages)


def test_large_weights_are_known_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy has another time, and is the same model."""
    monkeypatch.setattr("lit_ppo.cli.stages.LARGE", 8)
    for name, same in (("model.safetensors", True), ("text.jsonl", False)):
        file = tmp_path / name
        file.write_bytes(b"a hundred bytes" * 9)
        before = digests({}, "", [file])
        os.utime(file, (1, 1))
        assert (digests({}, "", [file]) == before) is same
        file.write_bytes(b"a hundred bits." * 9)
        assert digests({}, "", [file]) != before


def test_settings_that_make_a_stage_run_again(stage: tuple[Path, dict[str, Any]]) -> None:
    record, config = stage
    changed = "its configuration or seed has changed"
    assert outdated(record, {**config, "seed_everything": 2}, "") == changed
    assert outdated(record, {**config, "trainer": {**config["trainer"], "max_steps": 7}}, "") == changed
    assert outdated(record, {**config, "config": ["elsewhere.yaml"]}, "") == ""
    assert outdated(record, config, "other") == "an earlier stage has changed"


def test_a_stage_that_has_changed_runs_again_and_so_do_those_after_it(
    tmp_path: Path, stage: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lit_ppo.cli.stages._run", lambda session, name, arguments: None)
    other = {"trainer": {"default_root_dir": str(tmp_path / "run")}}
    for content in ("content of data.txt", "other"):
        (tmp_path / "data.txt").write_text(content)
        run_stages(Session(["fit"], debug=False), {"first": (["-a"], stage[1]), "second": (["-b"], other)})
    lines = [line for line in capsys.readouterr().out.splitlines() if " done in " not in line]
    assert lines == [
        f"[stage 1/2: first] already done, skipped ({stage[0]})",
        "[stage 2/2: second] not done yet; running: lit-ppo fit -b",
        f"[stage 1/2: first] {tmp_path}/data.txt has changed; running: lit-ppo fit -a",
        "[stage 2/2: second] an earlier stage has changed; running: lit-ppo fit -b",
    ]


def test_arguments_of_a_stage() -> None:
    arguments = Stage("a", [], ["--x", 1, True, 0.5]).arguments(7, "/data")
    assert arguments == ["--x", "1", "true", "0.5", "--seed_everything", "7", "--data_root", "/data"]
    assert Stage("a").arguments(False, None) == ["--seed_everything", "false"]
