"""Bad input to the command: one line, the last one, with place, value and remedy; no traceback."""

import signal
import warnings
from asyncio import CancelledError
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader, Dataset

from lit_ppo.cli import session
from lit_ppo.cli.errors import nearest, parsing_error
from lit_ppo.cli.main import main
from lit_ppo.cli.session import Session, restored_process
from lit_ppo.run.errors import CommandError, running_error
from lit_ppo.run.stop import STOP_SIGNALS
from tests.helpers.cli_toys import Toy
from tests.helpers.command import run_command
from tests.helpers.ppo_command import ppo_arguments

OVERLAYS = {
    "mistyped key": ("trainer:\n  max_stepz: 3\n", ["over.yaml:2", "trainer.max_stepz", "'trainer.max_steps'"]),
    "broken yaml": ("trainer: {max_steps: 3\nmodel: [\n", ["over.yaml:2", "not valid YAML"]),
    "unknown key": (
        "foo: 3\n",
        ["over.yaml:1: foo: no such key; known: checkpoint, ckpt_path, data, data_root, export"],
    ),
    "callback": ("trainer:\n  callbacks:\n  - class_path: AdaptivKL\n", ["over.yaml:3", "AdaptivKL", "'AdaptiveKL'"]),
    "callback's argument": (
        "trainer:\n  callbacks+:\n  - class_path: AdaptiveKL\n    init_args: {targt: 3}\n",
        ["over.yaml:4", "AdaptiveKL", "'targt'", "'target'"],
    ),
    "model class": ("model:\n  class_path: LitPPPO\n", ["over.yaml:2", "LitPPPO", "'LitPPO'"]),
    "no init_args": ("model:\n  class_path: LitPPO\n  actor: x\n", ["over.yaml:2", "model", "init_args"]),
    "value for section": ("trainer: 3\n", ["over.yaml:1: trainer: ", "3", "mapping"]),
    "key that is a number": ("trainer: {5: 6}\n", ["over.yaml:1: ", "'5'"]),
    "empty callback": ("trainer: {callbacks: {}}\n", ["trainer.callbacks", "class_path"]),
    "unknown tag": ("trainer:\n  max_steps: !x 1\n", ["over.yaml:2: not valid YAML", "'!x'"]),
    "control character": ("trainer: {max_steps: \x1b[2J}\n", ["over.yaml:1: not valid YAML", "x001b"]),
    "escaped control character": ('trainer: {max_steps: "\\e[2J\\u202e"}\n', ["\\x1b[2J\\u202e"]),
    "stage's key": ("stages: [{nme: x}]\n", ["over.yaml:1", "stages", "'nme'", "'name'"]),
    "stage's file": ("stages: [{name: x, config: [nope.yaml]}]\n", ["stages", "nope.yaml", "does not exist"]),
}

VALUES = ["5", "[1]", "true", "text", "1.5"]
FLAGS = {  # a valid one below each section
    "trainer": "--trainer.max_steps=1",
    "checkpoint": "--checkpoint.keep=3",
    "export": "--export.dtype=float32",
    "report": "--report.prompts=0",
    "model": "--model.width=4",
    "data": "--data.rows=8",
}

ARGUMENTS = {
    "flag": ("--trainer.max_stepz=3", ["--trainer.max_stepz", "'--trainer.max_steps'"]),
    "abbreviated flag": ("--trainer.max_step=3", ["--trainer.max_step", "no such option"]),
    "model's type": ("--model.width=wide", ["model (Toy).width", "'wide'", "int"]),
    "model's argument": ("--model.widht=3", ["model (Toy)", "'widht'", "'width'"]),
    "raised in the run": ("--model.fail_at=2", ["Toy(fail_at=2): failed as told", "tests.helpers.cli_toys, line"]),
    "data without its path": ("--data=PromptDataModule", ["PromptDataModule", "path is missing", "--data.path"]),
    "checkpoint": ("--ckpt_path=nope.ckpt", ["--ckpt_path nope.ckpt", "'last'"]),
    "callback's value": ("--checkpoint.keep=0", ["StepCheckpoint(keep=0)", "at least 1"]),
    "config": ("--config=nope.yaml", ["nope.yaml", "does not exist"]),
    "callback's module": ("--trainer.callbacks+=broken.Trick", ["trainer.callbacks", "broken.py", "invalid syntax"]),
    "trainer's value": ("--trainer.log_every_n_steps=-1", ["Trainer(log_every_n_steps=-1)", "at least 0"]),
    "lightning's own check": ("--trainer.accelerator=gpuu", ["Trainer(accelerator): ", "'gpuu'", "correct it"]),
    "lightning's check of data": ("--trainer.val_check_interval=99", ["Trainer(val_check_interval): ", "99"]),
    "job without an option": ("over.yaml", ["over.yaml: belongs to no option; write --config over.yaml for a job"]),
    "seed": ("--seed_everything=-1", ["--seed_everything -1", "from 0 to 4294967295"]),
    "no data root": ("--data_root=", ["--data_root ''", "leave it out"]),
    "data root": ("--data=tests.helpers.cli_toys.RootlessData --data_root=here", ["--data_root here", "leave it out"]),
}


@pytest.mark.parametrize(("text", "words"), OVERLAYS.values(), ids=OVERLAYS.keys())
def test_a_bad_overlay_is_refused(config: Path, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "over.yaml").write_text(text)
    run_command("fit", "--config", config, "--config", "over.yaml", cwd=tmp_path).refused(*words)


@pytest.mark.parametrize(
    ("section", "value"),
    [*(("trainer", value) for value in VALUES), *((section, VALUES[i % 5]) for i, section in enumerate(sorted(FLAGS)))],
)
def test_a_value_does_not_replace_a_section_even_before_a_flag_below_it(
    config: Path, tmp_path: Path, section: str, value: str
) -> None:
    """Exit code 2 and the place: the value itself is refused, not what comes of it."""
    (tmp_path / "over.yaml").write_text(f"{section}: {value}\n")
    files = ("--config", config, "--config", "over.yaml")
    result = run_command("fit", *files, FLAGS[section], cwd=tmp_path).refused("over.yaml:1: ")
    assert result.code == 2
    assert f" {section}: " in result.last
    assert value.strip("[]").lower() in result.last.lower()


@pytest.mark.parametrize(("argument", "words"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_bad_argument_is_refused(config: Path, tmp_path: Path, argument: str, words: list[str]) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    run_command("fit", "--config", config, *argument.split(), cwd=tmp_path).refused(*words)


@pytest.mark.parametrize("args", [["fitt"], ["fit"]])
def test_an_incomplete_command_is_refused(tmp_path: Path, args: list[str]) -> None:
    assert run_command(*args, cwd=tmp_path).refused().code == 2


def test_debug_shows_the_traceback_and_ends_with_the_same_line(config: Path, tmp_path: Path) -> None:
    result = run_command("fit", "--config", config, "--model.width=0", "--debug", cwd=tmp_path)
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert "Toy(width=0): must be at least 1" in result.last


PPO = {
    "missing reward model": ("--model.rewards.model=nope", ["RewardModel(model='nope')"]),
    "choice": ("--model.kl_estimator=k4", ["model (LitPPO).kl_estimator", "'k4'", "'k3'"]),
    "argument of the optimizer": ("--model.actor_optimizer.lrr=1", ["model (LitPPO).actor_optimizer", "'lrr'", "'lr'"]),
    "closure": ("--model.critic_optimizer=torch.optim.LBFGS", ["LitPPO(critic_optimizer=LBFGS)", "closure", "AdamW"]),
    "sparse": ("--model.actor_optimizer=torch.optim.SparseAdam", ["LitPPO(actor_optimizer=SparseAdam)", "AdamW"]),
    "rate": ("--model.actor_optimizer.lr=.inf", ["LitPPO(actor_optimizer=AdamW)", "lr=inf", "finite"]),
    "loss that is not finite": ("--model.actor_optimizer.lr=1e30", ["not finite", "max_skipped_steps=0", "responses"]),
}


@pytest.mark.parametrize(("argument", "words"), PPO.values(), ids=PPO.keys())
def test_a_bad_argument_to_ppo_is_refused(
    tmp_path: Path, tiny_lm: Path, tiny_reward: Path, argument: str, words: list[str]
) -> None:
    run_command("fit", *ppo_arguments(tmp_path, tiny_lm, tiny_reward), argument, cwd=tmp_path).refused(*words)


def test_a_reward_that_raises_is_named_with_its_line_before_the_first_update(
    tmp_path: Path, tiny_lm: Path, tiny_reward: Path
) -> None:
    (tmp_path / "my_rewards.py").write_text("def raises(prompts, responses):\n    return [1 / 0]\n")
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    reward = ["--model.rewards=RewardFunction", "--model.rewards.function=my_rewards.raises"]
    result = run_command("fit", *arguments, *reward, cwd=tmp_path).refused(
        "ZeroDivisionError", "my_rewards.py", "line 2"
    )
    assert "update 1" not in result.out


def test_nearest() -> None:
    assert nearest("lrr", ["lr", "betas"]) == "did you mean 'lr'?"
    assert nearest("zzz", ["lr", "betas"]) == "known: betas, lr"
    assert nearest("--lr", ["--model.actor_optimizer.lr", "--seed"]) == "did you mean '--model.actor_optimizer.lr'?"


def test_nothing_in_an_error_is_obeyed_by_a_terminal() -> None:
    """Such as a response that a reward function cannot read, and says so."""
    assert "cannot read \\x1b[2J\\x07 <b>" in running_error(CommandError("cannot read \x1b[2J\x07\n<b>"))


class Unprintable(BaseException):
    """Its text cannot be made."""

    def __str__(self) -> str:
        raise LookupError


CIRCLE = ValueError("comes back to itself")
CIRCLE.__cause__ = CIRCLE
FOREIGN = {
    "exit": (SystemExit(0), "it called exit(0) before the run had ended; raise an error there instead"),
    "exit without code": (SystemExit(), "it called exit() before the run had ended"),
    "exit with a text": (SystemExit("bye"), "it called exit(bye)"),
    "closed generator": (GeneratorExit(), "no message"),
    "cancelled": (CancelledError("too slow"), "too slow"),
    "interrupt without a signal": (KeyboardInterrupt(), "no message"),
    "without text": (Unprintable(), "<Unprintable whose text cannot be made: LookupError>"),
    "long": (ValueError("x" * 5_000_000), "xxx..."),
    "circle": (CIRCLE, "comes back to itself"),
}


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("through_lightning", [False, True])
@pytest.mark.parametrize(("error", "words"), FOREIGN.values(), ids=FOREIGN.keys())
def test_no_exception_of_other_code_ends_a_run_in_silence(
    capsys: pytest.CaptureFixture[str], error: BaseException, words: str, through_lightning: bool
) -> None:
    """Of callbacks, data, tokenizers: whatever is neither a stop signal's nor the parser's is an error."""

    def work(session: Session) -> None:
        if not through_lightning:
            raise error
        trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
        trainer.fit(Toy(), DataLoader(Raises(error)))

    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert Session(["export"], debug=False).run(work) == 1
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    start = f"lit-ppo: error: {type(error).__name__} in tests.cli.test_errors, line "
    assert line.startswith(start)
    assert words in line
    assert len(line) < 3000


class Raises(Dataset[Any]):
    """Raises an exception instead of giving a row."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise self.error


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["fit", "--help"], 0), (["export", "--help"], 0)])
def test_exits_of_the_parser_are_no_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> None:
    assert main(arguments) == code
    assert "error" not in capsys.readouterr().err


def test_nothing_in_a_traceback_or_warning_is_obeyed_by_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Colours, the title, and characters that reverse the direction of writing; line ends are kept."""
    bad = "\x1b]0;title\x07 \x1b[2J \r \x9b1m \u202e \u2066 \u200f end\nnext"
    with restored_process():
        warnings.simplefilter("always")
        warnings.warn_explicit(bad, UserWarning, session.__file__, 1)
    Session([], debug=True).say_error(ValueError(bad))
    printed = capsys.readouterr().err
    assert "lit-ppo: warning: " in printed
    assert "ValueError: " in printed
    assert printed.count("end\nnext") == 2
    assert all(c == "\n" or c.isprintable() for c in printed)


def test_running_error_tells_ours_from_others() -> None:
    def caught(function: object) -> BaseException:
        try:
            function()  # type: ignore[operator]
        except Exception as error:
            return error
        raise AssertionError

    assert (
        running_error(CommandError("plain\nwords"))
        == "CommandError: plain words; run again with --debug for the traceback"
    )
    foreign = running_error(caught(lambda: {}["key"]))
    assert foreign.startswith("KeyError in tests.cli.test_errors, line ")
    ours = running_error(caught(lambda: parsing_error(None, [], [])))  # type: ignore[arg-type]
    assert "AttributeError in lit_ppo.run.errors, line " in ours


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--config=ppo", "--model.rewards=mine.polit"],
            ["model (LitPPO).rewards", "'mine' has no 'polit'", "'polite'"],
        ),
        (["--config=ppo", "--model.rewards=mine.py"], ["model (LitPPO).rewards: mine.py is a file", "mine.name"]),
        (["--config", "my.yaml"], ["my.yaml:2: model (LitPPO).rewards: mine.py is a file", "mine.name"]),
        (["--config=tricks/adaptive_kl"], ["model is missing", "--config quickstart", "lit-ppo ls"]),
    ],
)
def test_what_newcomers_give_for_a_reward_or_a_job(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "mine.py").write_text("def polite(responses):\n    return [0.0 for text in responses]\n")
    (tmp_path / "my.yaml").write_text("base: ppo\nmodel: {init_args: {rewards: mine.py}}\n")
    run_command("fit", *arguments, cwd=tmp_path).refused(*words)


MINE = """
def polite(responses):
    return [0.0 for text in responses]

class Strict:
    def __init__(self, words: list[str]) -> None:
        if not words:
            raise ValueError("words must not be empty")

    def __call__(self, responses):
        return [0.0 for text in responses]
"""
NOWHERE = "modules are looked for in the working directory and among the installed packages"
REWARDS = {  # what stands below rewards, and the whole message
    "module of a function": (
        "{class_path: RewardFunction, init_args: {function: nowhere.polite}}",
        f"RewardFunction(function='nowhere.polite'): no module named 'nowhere'; {NOWHERE}",
    ),
    "module of a named one's": (
        "{a: {source: {class_path: RewardFunction, init_args: {function: nowhere.polite}}, weight: 1.0}}",
        f"RewardFunction(function='nowhere.polite'): no module named 'nowhere'; {NOWHERE}",
    ),
    "module of a class": ("nowhere.Strict", f"model (LitPPO).rewards (Strict): no module named 'nowhere'; {NOWHERE}"),
    "name of a function": (
        "{class_path: RewardFunction, init_args: {function: mine.polit}}",
        "RewardFunction(function='mine.polit'): module 'mine' has no 'polit'; did you mean 'polite'?",
    ),
    "name of a named one's": (
        "{a: mine.polit}",
        "model (LitPPO).rewards.a (polit): module 'mine' has no 'polit'; did you mean 'polite'?",
    ),
    "kwargs": (
        "{class_path: RewardFunction, init_args: {function: mine.polite, kwargs: {k: 1}}}",
        "RewardFunction(kwargs={'k': 1}): mine.polite takes no argument k; its arguments are responses",
    ),
    "own class that raises": (
        "{class_path: mine.Strict, init_args: {words: []}}",
        "ValueError in mine, line 8: words must not be empty; run again with --debug for the traceback",
    ),
    "own named class that raises": (
        "{a: {class_path: mine.Strict, init_args: {words: []}}}",
        "ValueError in mine, line 8: words must not be empty; run again with --debug for the traceback",
    ),
    "own module that raises": (
        "broken.polite",
        "model (LitPPO).rewards: NameError in broken, line 1: name 'undefined' is not defined; run again with --debug "
        "for the traceback",
    ),
    "own module that needs another": (
        "lacking.polite",
        "model (LitPPO).rewards (polite): ModuleNotFoundError in lacking, line 1: No module named 'nowhere'; run again "
        "with --debug for the traceback",
    ),
    "key of a named one's": (
        "{a: {source: {class_path: RewardFunction, init_args: {funtion: mine.polite}}, weight: 1.0}}",
        "model (LitPPO).rewards.a.source (RewardFunction): no argument 'funtion'; did you mean 'function'?",
    ),
    "class of a named one": (
        "{a: {source: {class_path: RewardFunctin}, weight: 1.0}}",
        "model (LitPPO).rewards.a.source: no class named 'RewardFunctin'; did you mean 'RewardFunction'?",
    ),
    "value of a weight": (
        "{a: {source: mine.polite, weight: much}}",
        "model (LitPPO).rewards.a.weight: expected float, got 'much'",
    ),
    "key beside the source": (
        "{a: {source: {class_path: RewardFunction, init_args: {function: mine.polite}}, weigth: 2}}",
        "model (LitPPO).rewards.a: no key 'weigth'; did you mean 'weight'?",
    ),
    "key of the source": (
        "{a: {sauce: mine.polite}}",
        "model (LitPPO).rewards.a: source is missing; known keys: source, weight",
    ),
    "missing argument of a named one": (
        "{a: {source: mine.Strict, weight: 1.0}}",
        "model (LitPPO).rewards.a.source (Strict): words is missing; give it under init_args in a configuration",
    ),
    "file that is no YAML": (
        "script.py",
        "model (LitPPO).rewards: script.py is a file; give the import path of a class or function in it, such as "
        "script.name",
    ),
}


@pytest.mark.parametrize(("value", "message"), REWARDS.values(), ids=REWARDS.keys())
@pytest.mark.parametrize("argument", ["rewards", "eval_rewards"])
def test_of_the_types_of_an_argument_only_the_error_of_the_meant_one_is_shown(
    tmp_path: Path, tiny_lm: Path, tiny_reward: Path, value: str, message: str, argument: str
) -> None:
    if argument == "eval_rewards" and not value.startswith("{a:"):
        value, message = f"{{a: {value}}}", message.replace("rewards", "rewards.a")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "script.py").write_text("def polite(responses: list[str]) -> list[float]:\n    return []\n")
    (tmp_path / "broken.py").write_text("polite = undefined\n")
    (tmp_path / "lacking.py").write_text("import nowhere\n")
    (tmp_path / "my.yaml").write_text(f"model: {{init_args: {{{argument}: {value}}}}}\n")
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    result = run_command("fit", *arguments, "--config", tmp_path / "my.yaml", cwd=tmp_path).refused()
    shown = result.last.removeprefix("lit-ppo: error: ").removeprefix(f"{tmp_path / 'my.yaml'}:1: ")
    assert shown == message.replace("(LitPPO).rewards", f"(LitPPO).{argument}")
