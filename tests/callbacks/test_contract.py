"""What every trick keeps to, run over all public callbacks on a module that is not ours.

A new trick adds its row to ``TRICKS`` and gets all of these.
"""

import ast
import importlib
import inspect
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml

import lit_ppo.callbacks
from lit_ppo.callbacks import PPOCallback
from tests.callbacks.toy import Foreign, Toy, run_updates

ROOT = Path(__file__).parents[2]


class Trick(NamedTuple):
    """How a trick is tried.

    Args:
        acts: Arguments with which it changes four updates of the toy, and with which a forgotten state shows.
        refuses: Arguments that the constructor refuses, by name.
        needs: The model without which it refuses to start.
        twice: Whether two copies may stand side by side.
    """

    acts: dict[str, Any]
    refuses: dict[str, Any]
    needs: str | None = None
    twice: bool = False


TRICKS = {
    "AdaptiveKL": Trick({"target": 0.5, "horizon": 10}, {"target": 0.0, "horizon": -1}, needs="reference"),
    "AdvantageNormalization": Trick({"clip": 0.5}, {"scope": "epoch", "clip": 0.0}, twice=True),
    "CriticWarmup": Trick({"updates": 3}, {"updates": 0}, needs="critic"),
    # the toy's entropy is over 1 nat, so the bonus acts in the very first step alone
    "EntropyBonus": Trick({"coef": 0.5, "target": 1.0}, {"coef": float("nan"), "target": -1.0}),
    "RewardNormalization": Trick({"clip": 1.0}, {"clip": -1.0, "statistics": "epoch", "std": 2.0, "mean": 1.0}),
    "ValueClipping": Trick({"clip_range": 0.1}, {"clip_range": float("inf")}, needs="critic"),
}
EVERY_TRICK = pytest.mark.parametrize("name", TRICKS)


def make(name: str, **arguments: Any) -> PPOCallback:
    return getattr(lit_ppo.callbacks, name)(**{**TRICKS[name].acts, **arguments})


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def history(module: Toy) -> list[Any]:
    return [*module.actors, *module.critics, *module.kl_coefs, *module.losses, *module.steps]


def test_table_has_every_public_callback():
    public = {name for name in lit_ppo.callbacks.__all__ if inspect.isclass(getattr(lit_ppo.callbacks, name))}
    assert public - {"PPOCallback"} == TRICKS.keys()


@pytest.mark.parametrize(("name", "argument"), [(n, argument) for n in TRICKS for argument in TRICKS[n].refuses])
def test_constructor_names_class_argument_and_value(name: str, argument: str):
    value = TRICKS[name].refuses[argument]
    with pytest.raises(ValueError, match=re.escape(f"{argument}={value!r}")) as error:
        make(name, **{argument: value})
    assert str(error.value).startswith(f"{name}(")


@EVERY_TRICK
def test_acts_on_a_module_that_is_not_ours(name: str):
    assert repr(history(run_updates(make(name), 4))) != repr(history(run_updates([], 4)))


@EVERY_TRICK
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_run_goes_on_identically(name: str, stop: int, tmp_path: Path):
    whole = run_updates(make(name), 4)
    run_updates(make(name), stop, save=tmp_path / "last.ckpt")
    rest = run_updates(make(name), 4, resume=tmp_path / "last.ckpt")
    assert len(rest.actors) == 4 - stop
    torch.testing.assert_close(rest.actors, whole.actors[stop:], rtol=0, atol=0)
    torch.testing.assert_close(rest.critics, whole.critics[stop:], rtol=0, atol=0)
    assert rest.kl_coefs == whole.kl_coefs[stop:]
    assert rest.losses == whole.losses[2 * stop :]


@EVERY_TRICK
def test_two_copies_work_or_are_refused_with_both_named(name: str):
    if TRICKS[name].twice:
        assert len(run_updates([make(name), make(name)], 2).actors) == 2
        return
    with pytest.raises((ValueError, RuntimeError), match=name):  # Lightning refuses two with state by itself
        run_updates([make(name), make(name)], 2)
    subclass = type(f"My{name}", (getattr(lit_ppo.callbacks, name),), {})(**TRICKS[name].acts)
    with pytest.raises(ValueError, match=f"My{name} and {name}|{name} and My{name}"):
        run_updates([make(name), subclass], 2)


@EVERY_TRICK
def test_pickled_copy_goes_on_identically(name: str):
    used = make(name)
    run_updates(used, 2)
    copy = pickle.loads(pickle.dumps(used))
    assert type(copy) is type(used)
    assert copy.state_dict() == used.state_dict()
    assert repr(history(run_updates(copy, 2))) == repr(history(run_updates(used, 2)))


@EVERY_TRICK
def test_state_is_plain_data(name: str):
    used = make(name)
    run_updates(used, 2)
    assert yaml.safe_load(yaml.safe_dump(_lists(used.state_dict()))) == _lists(used.state_dict())


def _lists(state: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in state.items()}


@EVERY_TRICK
def test_wrong_module_is_refused(name: str):
    with pytest.raises(TypeError, match=rf"{name} .*Foreign"):
        run_updates(make(name), module=Foreign())


@pytest.mark.parametrize(("name", "model"), [(name, trick.needs) for name, trick in TRICKS.items() if trick.needs])
def test_missing_model_is_refused_before_the_first_rollout(name: str, model: str):
    module = Toy(**{model: False})
    with pytest.raises(ValueError, match=rf"{name} needs a {model}, but Toy\({model}=None\)"):
        run_updates(make(name), module=module)
    assert module.experiences == []


@pytest.mark.parametrize("model", ["critic", "reference"])
@EVERY_TRICK
def test_works_without_the_models_it_does_not_need(name: str, model: str):
    if TRICKS[name].needs != model:
        assert len(run_updates(make(name), 2, **{model: False}).actors) == 2


@EVERY_TRICK
def test_yaml_builds_it(name: str):
    config = yaml.safe_load((ROOT / f"configs/tricks/{snake_case(name)}.yaml").read_text())
    (entry,) = config["trainer"]["callbacks+"]
    assert entry["class_path"] == name
    getattr(lit_ppo.callbacks, name)(**entry["init_args"])


@EVERY_TRICK
def test_has_a_test_file_of_its_own(name: str):
    text = (ROOT / f"tests/callbacks/test_{snake_case(name)}.py").read_text()
    assert f"{name}(" in text


@EVERY_TRICK
def test_has_a_row_in_the_readme(name: str):
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert any(re.search(rf"\b{name}\b", row) for row in rows), f"README.md's table has no row for {name}"


@EVERY_TRICK
def test_page_says_when_what_and_where_from(name: str):
    trick = getattr(lit_ppo.callbacks, name)
    page = inspect.getdoc(trick)
    for part in ["Use it ", "Source: ", "rites ``" if "rites ``" in page else "adds ``"]:
        assert part in page, f"{name}'s docstring lacks {part!r}"
    for argument in inspect.signature(trick).parameters:
        assert f"\n    {argument}: " in page, f"{name}'s docstring does not explain {argument}"


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=lambda path: path.stem)
def test_imports_only_what_a_trick_may(path: Path):
    """A trick knows tensors, Lightning, its base and the mathematics: nothing of processes, files or our module."""
    allowed = {"torch", "lightning", "typing", "collections", "lit_ppo.functional", "lit_ppo.callbacks"}
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for module in imported:
        assert any(module == name or module.startswith(f"{name}.") for name in allowed), f"{path.name}: {module}"
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | imported
    assert not names & {"distributed", "torch.distributed", "global_rank", "local_rank", "world_size", "all_gather"}


def test_second_import_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"import lit_ppo\.callbacks instead"):
        importlib.import_module("callbacks")


def test_setup_refuses_before_anything_is_built():
    """Also where nobody but the callbacks looks: no Lightning trainer in sight."""
    for name, trick in TRICKS.items():
        if not trick.twice:
            copies = [make(name), make(name)]
            with pytest.raises(ValueError, match=f"{name} and {name}: .*; keep one of them"):
                copies[0].setup(SimpleNamespace(callbacks=copies), Toy(), "fit")
