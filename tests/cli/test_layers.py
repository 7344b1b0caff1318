"""Configuration files with a ``base``."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_ppo.cli.layers import RefusedText, check_additions, layers, load
from lit_ppo.run.errors import CommandError
from tests.helpers.command import REPOSITORY, run_command

PPO = REPOSITORY / "configs/ppo.yaml"
MIDDLE = f"""
base: {PPO}
model:
  init_args:
    advantages:
      class_path: GroupRelative
      init_args: {{scale: false}}
    kl_coef: 0.5
trainer:
  callbacks+:
    - class_path: RewardClipping
"""
TOP = """
base: ../middle.yaml
model:
  init_args: {kl_coef: 0.25, clip_range: 0.1}
"""


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A file on top of another one, in the folder above, on top of ``ppo.yaml``."""
    (tmp_path / "top").mkdir()
    (tmp_path / "middle.yaml").write_text(MIDDLE)
    (tmp_path / "top/top.yaml").write_text(TOP)
    return tmp_path / "top/top.yaml"


def printed(*arguments: Any, cwd: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(run_command("fit", *arguments, "--print_config", cwd=cwd).ok().out))


def test_each_file_overrides_what_it_is_based_on(top: Path, tmp_path: Path) -> None:
    """From another folder; another class in a higher file drops the arguments of the lower one's."""
    config = printed("--config", top, "--model.clip_range=0.3", cwd=tmp_path / "elsewhere")
    model = config["model"]["init_args"]
    assert (model["kl_coef"], model["clip_range"], model["minibatch_size"]) == (0.25, 0.3, 32)
    assert model["advantages"]["init_args"] == {"scale": False}
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["AdvantageNormalization", "ValueClipping", "RewardClipping"]
    assert "base" not in config


@pytest.mark.parametrize("file", ["top/top.yaml", "middle.yaml"])
def test_an_error_names_the_file_of_the_chain_and_the_line(top: Path, tmp_path: Path, file: str) -> None:
    text = (tmp_path / file).read_text().replace("kl_coef", "kl_coeff")
    (tmp_path / file).write_text(text)
    (number,) = (i for i, line in enumerate(text.splitlines(), 1) if "kl_coeff" in line)
    run_command("fit", "--config", top, cwd=tmp_path).refused(f"{tmp_path / file}:{number}: ", "'kl_coef'")


def test_a_base_that_is_missing_or_based_on_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed_everything: 1\nbase: b.yaml\n")
    arguments = ("fit", "--config", "a.yaml", "--print_config")
    run_command(*arguments, cwd=tmp_path).refused("a.yaml:2: base: file b.yaml does not exist", "relative to")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
    run_command(*arguments, cwd=tmp_path).refused("b.yaml:1: base: a.yaml is based on this file")


ADDS = "trainer: {callbacks+: [{class_path: RewardClipping}]}\n"
LIST = "trainer: {callbacks: [{class_path: EntropyBonus}]}\n"
FILES = {
    "adds": ADDS,
    "dotted": "trainer.callbacks+: [{class_path: RewardClipping}]\n",
    "list": LIST,
    "none": "trainer: {callbacks: null}\n",
    "job": f"base: list.yaml\n{ADDS}",
    "other": "trainer: {max_steps: 3}\n",
    "upside_down": f"base: adds.yaml\n{LIST}",
}
DROPPED = {  # arguments, the file whose callbacks are dropped, and what drops them
    "shipped": (["tricks/length_penalty", "ppo"], "tricks/length_penalty", "ppo"),
    "base of the job": (["monitors/cockpit", "sft", "gpu"], None, None),
    "later job": (["adds.yaml", "other.yaml", "list.yaml"], "adds.yaml", "list.yaml"),
    "null": (["adds.yaml", "none.yaml"], "adds.yaml", "none.yaml"),
    "dotted": (["dotted.yaml", "job.yaml"], "dotted.yaml", "job.yaml"),
    "between": (["list.yaml", "adds.yaml", "list.yaml"], "adds.yaml", "list.yaml"),
    "own base": (["upside_down.yaml"], "adds.yaml", "upside_down.yaml"),
    "option": (["list.yaml", "adds.yaml", "--trainer.callbacks=EntropyBonus"], "adds.yaml", "--trainer.callbacks"),
    "list after list": (["job.yaml", "list.yaml"], None, None),
    "right order": (["list.yaml", "adds.yaml", "--trainer.callbacks+=EntropyBonus"], None, None),
    "none asked for": (["job.yaml", "adds.yaml", "--trainer.callbacks=null"], None, None),
    "text": (["adds.yaml", LIST], "adds.yaml", "trainer: {"),
}


@pytest.mark.parametrize(("given", "trick", "job"), DROPPED.values(), ids=DROPPED.keys())
def test_callbacks_that_a_later_file_would_drop_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], trick: str | None, job: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    words = [word for value in given for word in ([value] if value[:2] == "--" else ["--config", value])]
    if trick is None:
        check_additions(words)
        return
    with pytest.raises(CommandError) as refused:
        check_additions(words)
    message = str(refused.value)
    assert message.startswith(f"--config {trick}: the callbacks that it adds would have no effect, since {job}")
    assert refused.value.exit_code == 2


def test_a_trick_before_its_job_is_refused_by_the_command(tmp_path: Path) -> None:
    words = ["--config", "tricks/length_penalty", "--config", "ppo", "--print_config"]
    run_command("fit", *words, cwd=tmp_path).refused("--config tricks/length_penalty: ", "give ppo first")


LEVELS = range(1, 12)
BOMB = "a0: &a0 [1, 2, 3]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in LEVELS)
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}]}}\n" for i in LEVELS)
# by hand: a5 stands for 1 + 3 * 364 = 1093 values
REFUSED = {  # text, the line at fault, words of the message
    "section": ("trainer: {max_steps: 1}\nseed: 1\ntrainer: {devices: 1}\n", 3, ["'trainer'", "line 1 and"]),
    "nested": ("trainer:\n  max_steps: 1\n  'max_steps': 2\n", 3, ["'max_steps'", "line 2 and"]),
    "init_args": ("model:\n  class_path: X\n  init_args:\n    a: 1\n    b: {}\n    a: 1\n", 6, ["'a'", "line 4 and"]),
    "in a list": ("- {word: 1}\n- word: 1\n  other: 2\n  word: 1\n", 4, ["'word'", "line 2 and"]),
    "JSON": ('{"a": {"b": 1,\n  "c": 1,\n  "b": 2}}', 3, ["'b'", "line 1 and"]),
    "beside a merge key": ("a: {<<: {b: 1}, b: 2,\n  b: 3}\n", 2, ["'b'", "line 1 and"]),
    "dotted before": ("trainer.max_steps: 1\ntrainer: {devices: 1}\n", 1, ["'trainer.max_steps'", "line 2"]),
    "aliases": (BOMB, 6, ["aliases", "1,000"]),
    "merged aliases": (MERGED, 6, ["aliases", "1,000"]),
    "cycle": ("a:\n  b: &b {c: *b}\n", 2, ["part of"]),
    "brackets": ("a:\n" + " [" * 100_000 + "]" * 100_000, 2, ["100 levels"]),
    "indentation": ("".join(f"{' ' * i}a:\n" for i in range(120)), 101, ["100 levels"]),
    "number of 5,000 digits": (f"a: {'1' * 5000}", 1, ["number", "4300 digits"]),
    "list for arguments": ("a:\n  class_path: X\n  init_args: [1]\n", 3, ["init_args", "mapping"]),
    "no class": ("a:\n  class_path:\n", 2, ["class_path", "name of a class"]),
}
MEANT = {
    "a mapping's own keys override merged ones": ("a: {<<: {x: 1, y: 1}, <<: {z: 1}, x: 2}", {"x": 2, "y": 1, "z": 1}),
    "aliases": ("a: &a {x: [1, 2]}\nb: [*a, *a]\n", None),
    "same key elsewhere": ("a: {x: 1}\nb: {x: 1, 'y z': {x: 1}}\n", None),
}


@pytest.mark.parametrize(("text", "line", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_text_is_refused_with_its_lines(text: str, line: int, words: list[str]) -> None:
    with pytest.raises(RefusedText) as refused:
        load(text)
    assert all(word in str(refused.value.problem) for word in words)
    assert (refused.value.problem_mark is None and line == 1) or refused.value.problem_mark.line + 1 == line


@pytest.mark.parametrize(("text", "expected"), MEANT.values(), ids=MEANT.keys())
def test_merge_keys_and_aliases_keep_their_meaning(text: str, expected: Any) -> None:
    assert load(text) == ({"a": expected} if expected else yaml.safe_load(text))


@pytest.mark.parametrize("place", ["--config", "base", "model", "flag"])
def test_a_key_twice_is_refused_wherever_the_file_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "twice.yaml").write_text("init_args:\n  actor: x\n  actor: y\n")
    (tmp_path / "over.yaml").write_text(f"{place}: twice.yaml\n")
    arguments = {"--config": ["--config", "twice.yaml"], "flag": ["--model=twice.yaml"]}
    given = arguments.get(place, ["--config", "over.yaml"])
    run_command("fit", *given, "--print_config", cwd=tmp_path).refused("twice.yaml:3: ", "line 2 and again in line 3")


def test_a_key_twice_on_the_command_line_is_refused_except_in_a_text(tmp_path: Path) -> None:
    for option in ("--config", "--trainer", "--model.model_kwargs"):
        arguments = ("fit", "--model=LitPPO", option, '{"devices": 1, "devices": 2}', "--print_config")
        run_command(*arguments, cwd=tmp_path).refused("'devices'", "line 1 and again in line 1")
    text = "note: a\nnote: b"
    run_command("fit", "--data=PromptDataModule", "--data.path", text, "--print_config", cwd=tmp_path).ok()


@pytest.mark.parametrize(
    ("content", "words"),
    [("", ["no keys"]), ("# none\n", ["no keys"]), ("- a\n", ["no keys"]), ("r\xe9sum\xe9: 1\n", ["UTF-8", "byte 1"])],
)
def test_a_file_without_keys_is_refused(tmp_path: Path, content: str, words: list[str]) -> None:
    (tmp_path / "bad.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(CommandError) as refused:
        layers(str(tmp_path / "bad.yaml"))
    assert all(word in str(refused.value) for word in ["bad.yaml: ", *words])
