"""Configurations that come with the package: by name from anywhere, listed, copied; a file of that name wins."""

import os
from pathlib import Path

import pytest
import yaml

from lit_ppo.cli import shipped
from lit_ppo.cli.layers import layers
from lit_ppo.cli.main import main
from lit_ppo.cli.stages import ConfigFile
from lit_ppo.run.errors import CommandError
from tests.helpers.command import REPOSITORY

CONFIGS = REPOSITORY / "configs"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_has_a_name_and_stands_in_the_list_with_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert sorted(listed) == sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml"))
    assert listed["tricks/adaptive_kl"] == "Keep the KL to the reference near 6 nats per response (Ziegler et al. 2019)"
    assert listed["quickstart"] == "All stages of RLHF on a CPU in minutes, without downloads"
    assert main(["ls", "kl_"]) == 0
    words = capsys.readouterr().out.split()
    assert ("tricks/kl_loss" in words, "ppo" in words) == (True, False)


@pytest.mark.parametrize("text", ["grpo", "grpo.yaml", "./grpo", "configs/grpo.yaml"])
def test_a_name_stands_for_the_file_and_its_bases(here: Path, text: str) -> None:
    assert layers(text) == [str(CONFIGS / "ppo.yaml"), str(CONFIGS / "grpo.yaml")]


@pytest.mark.parametrize("file", ["grpo", "grpo.yaml"])
def test_a_file_in_the_working_directory_wins_and_may_have_a_name_as_its_base(here: Path, file: str) -> None:
    (here / file).write_text("base: tricks/kl_loss\n")
    assert layers("grpo") == [str(CONFIGS / "tricks/kl_loss.yaml"), file]
    (here / "tricks").mkdir()  # a folder is no file
    (here / "ppo").mkdir()
    assert layers("ppo") == [str(CONFIGS / "ppo.yaml")]


def test_other_ways_to_give_a_file_still_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    (here / "mine.yaml").write_text("trainer: {max_steps: 1}\n")
    assert layers("~/mine.yaml") == [str(here / "mine.yaml")]
    assert [layers(text) for text in ("-", "https://host/x.yaml")] == [["-"], ["https://host/x.yaml"]]
    if hasattr(os, "mkfifo"):  # as <(command) in a shell
        os.mkfifo(here / "pipe")
        assert layers("pipe") == ["pipe"]


def test_files_of_stages_are_found_beside_their_file_or_by_name(here: Path) -> None:
    file = ConfigFile("quickstart/sft")
    assert (file, file.shown) == (str(CONFIGS / "quickstart/sft.yaml"), "quickstart/sft")
    (here / "quickstart").mkdir()
    (here / "quickstart/sft.yaml").write_text("trainer: {max_steps: 1}\n")
    assert ConfigFile("quickstart/sft.yaml") == str(here / "quickstart/sft.yaml")
    assert file.shown == str(CONFIGS / "quickstart/sft.yaml")  # the name means another file here


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quickstrt", ["'quickstart'"]),
        ("adaptive_kl", ["'tricks/adaptive_kl'"]),
        ("tricks/dualclip", ["'tricks/dual_clip'"]),
        ("no/such.yaml", ["no/such.yaml", "does not exist"]),
    ],
)
def test_what_is_neither_is_refused_with_the_nearest_names(here: Path, text: str, words: list[str]) -> None:
    with pytest.raises(CommandError) as caught:
        layers(text)
    assert [word for word in [*words, "lit-ppo ls"] if word not in str(caught.value)] == []
    assert layers("trainer: {max_steps: 1}") == ["trainer: {max_steps: 1}"]  # text in YAML


def test_a_copy_is_the_file_and_replaces_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cp", "grpo", "mine"]) == 0
    assert (here / "mine.yaml").read_bytes() == (CONFIGS / "grpo.yaml").read_bytes()
    assert layers("mine.yaml") == [str(CONFIGS / "ppo.yaml"), "mine.yaml"]  # its base is still found
    assert "lit-ppo fit --config mine.yaml" in capsys.readouterr().out
    (here / "mine.yaml").write_text("mine")
    assert main(["cp", "ppo", "mine.yaml"]) == 2
    assert "mine.yaml exists" in capsys.readouterr().err
    assert (here / "mine.yaml").read_text() == "mine"
    assert main(["cp", "ppo", "mine.yaml", "--force"]) == 0
    assert (here / "mine.yaml").read_bytes() == (CONFIGS / "ppo.yaml").read_bytes()
    assert main(["cp", "tricks/dual_clip", "new/folder/clip.yaml"]) == 0
    assert "--config ppo --config new/folder/clip.yaml" in capsys.readouterr().out
    assert main(["cp", "pppo"]) == 2
    assert "'ppo'" in capsys.readouterr().err


def test_jobs_are_the_files_that_name_a_model_class_themselves_or_in_a_base() -> None:
    for name in shipped.names():
        models = [yaml.safe_load(Path(file).read_text()).get("model") or {} for file in layers(name)]
        assert shipped.is_job(name) == any("class_path" in model for model in models), name
