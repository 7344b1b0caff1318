"""What the command answers without its libraries, and how short its help is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lit_ppo
from lit_ppo.cli.command import Command
from lit_ppo.cli.completion import completion
from lit_ppo.cli.quick import SUBCOMMANDS
from lit_ppo.cli.session import Session
from tests.helpers.command import REPOSITORY, run_command

ANSWERS = "import sys\nfrom lit_ppo.cli.main import main\ncode = main(sys.argv[1:])\n"
ANSWERS += (
    "print([name for name in ('torch', 'transformers', 'lightning', 'jsonargparse') if name in sys.modules], code)"
)


@pytest.mark.parametrize("argument", ["", "--help", "--version", "ls", "cp", "fitt"])
def test_these_answers_import_no_library(tmp_path: Path, argument: str) -> None:
    command = [sys.executable, "-c", ANSWERS, *([argument] if argument else [])]
    env = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert last == f"[] {2 if argument in ('cp', 'fitt') else 0}"
    if argument in ("", "--help"):
        assert [word for word in SUBCOMMANDS if f"\n  {word} " not in done.stdout] == []
        assert lines.index("First steps:") < lines.index("Subcommands:") < 20
    elif argument == "--version":
        assert lines == [f"lit-ppo {lit_ppo.__version__}"]
    elif argument == "fitt":
        assert done.stderr == "lit-ppo: error: fitt: no such subcommand; did you mean 'fit'?\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As ``lit-ppo ls | head -1``: silence, and exit code 0."""
    command = f"{sys.executable} -m lit_ppo ls | (sleep 1; head -c 1 > /dev/null); exit ${{PIPESTATUS[0]}}"
    closed = command.replace("sleep 1; head -c 1 > /dev/null", "exec 0<&-; sleep 1")
    for each in (command, closed):
        done = subprocess.run(["bash", "-c", each], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_overview_names_the_subcommands_that_there_are() -> None:
    assert {*Command.subcommands(), "memory", "export", "ls", "cp", "completion"} == set(SUBCOMMANDS)


def test_the_help_of_a_class_is_short_and_names_every_argument(tmp_path: Path) -> None:
    lines = run_command("fit", "--model.help", "LitPPO", cwd=tmp_path, env={"COLUMNS": "80"}).ok().out.splitlines()
    assert len(lines) <= 150
    shown = {match[1] for line in lines if (match := re.match(r"  --model\.(\w+)", line))}
    assert shown == {name for name in lit_ppo.LitPPO.__init__.__annotations__ if name != "return"}
    assert any("--model.actor_optimizer.help" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lit-ppo c", {"cp", "completion"}),
        ("lit-ppo fit --config tricks/adv", {"tricks/advantage_normalization", "tricks/advantage_regression"}),
        ("lit-ppo fit --config min", {"mine.yaml"}),
        ("lit-ppo fit --trainer.max_s", {"--trainer.max_steps"}),
        ("lit-ppo cp rl", {"rloo"}),
    ],
)
def test_bash_completes(script: Path, tmp_path: Path, words: str, expected: set[str]) -> None:
    (tmp_path / "mine.yaml").touch()
    line = words.split(" ")
    asked = f"""
        source {script}
        COMP_WORDS=({" ".join(line)}); COMP_CWORD={len(line) - 1}; COMP_LINE="{words}"; COMP_POINT={len(words)}
        $(complete -p lit-ppo | sed 's/.* -F \\([^ ]*\\).*/\\1/') lit-ppo "{line[-1]}" "{line[-2]}"
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The completion script of bash."""
    pytest.importorskip("shtab")
    folder = tmp_path_factory.mktemp("completion")
    (folder / "lit-ppo").write_text(run_command("completion", "bash", cwd=folder).ok().out)
    return folder / "lit-ppo"


def test_zsh_completes_configurations_wherever_one_may_stand(capsys: pytest.CaptureFixture[str]) -> None:
    """Also before the subcommand's own options are asked, and after another ``--config``."""
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit):
        completion(["zsh"], Session(["completion", "zsh"], debug=False))
    script = capsys.readouterr().out
    lines = [line for line in script.splitlines() if "{-c,--config}" in line]
    assert len(lines) == 6  # the command, and those of its subcommands that read configurations
    assert [line for line in lines if not line.startswith('  "*"{') or not line.endswith(':_lit_ppo_configs"')] == []
    assert "memory:'say what a run of PPO will need, before it starts'" in script
