"""What every trick keeps to, run over all public callbacks on a module that is not ours.

The test file of a trick says in ``TRICK`` how it is tried, and the trick gets all of these.
"""

import ast
import contextlib
import importlib
import inspect
import pickle
import random
import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import Logger

import lit_ppo.callbacks
from tests.helpers.spies import Recorder, Spy
from tests.helpers.toy import Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import MemoryLogger
from tests.helpers.trick import made, make_trick, tricks

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Monitor", "ignore:DynamicSampling"
)  # what monitors have to say is tested elsewhere

TRICKS = tricks()
MONITORS = [name for name, trick in TRICKS.items() if trick.monitor]
EVERY_TRICK = pytest.mark.parametrize("name", TRICKS)


@pytest.fixture(autouse=True)
def _a_folder_for_what_they_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_trick(trick: Any, name: str, updates: int, **kwargs: Any) -> Any:
    """Run callbacks on the toy that suits a trick."""
    logger = Recorder(Path()) if TRICKS[name].monitor else None
    return run_updates(trick, updates, **{"logger": logger, **TRICKS[name].toy, **kwargs})


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def history(module: Toy) -> list[Any]:
    weights = [*module.actors, *module.critics, *module.references]
    return [*weights, *module.kl_coefs, *module.losses, *module.steps]


def trace(name: str, module: Toy) -> str:
    """What a trick changes: the run; or, of one that only watches, what is logged."""
    return repr(module.trainer.logger.calls if TRICKS[name].monitor else history(module))


def test_table_has_every_public_callback():
    public = {name for name in lit_ppo.callbacks.__all__ if inspect.isclass(getattr(lit_ppo.callbacks, name))}
    assert public - {"Experience", "PPOCallback"} == TRICKS.keys()


@pytest.mark.parametrize(("name", "argument"), [(n, argument) for n in TRICKS for argument in TRICKS[n].refuses])
def test_constructor_names_class_argument_and_value(name: str, argument: str):
    value = TRICKS[name].refuses[argument]
    with pytest.raises(ValueError, match=re.escape(f"{argument}={value!r}")) as error:
        make_trick(name, **{argument: value})
    assert str(error.value).startswith(f"{name}(")


@cache
def usual_trace(name: str, acts: bool = True) -> str:
    """Of four updates with the trick as it is, or without it."""
    return trace(name, run_trick(make_trick(name) if acts else [], name, 4))


@EVERY_TRICK
def test_acts_on_a_module_that_is_not_ours(name: str):
    trick = TRICKS[name]
    like = next(n for n, other in TRICKS.items() if (other.toy, other.monitor) == (trick.toy, trick.monitor))
    assert usual_trace(name) != usual_trace(like, acts=False)


@pytest.mark.parametrize("name", MONITORS)
def test_a_monitor_leaves_the_run_as_it_is(name: str):
    """To the bit: weights, losses, and the random numbers that come next."""
    runs = []
    for callbacks in ([], make_trick(name)):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        run = history(run_trick(callbacks, name, 4))
        runs.append([*run, random.random(), np.random.rand(), torch.rand(3)])  # noqa: NPY002
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.parametrize("logger", [None, Recorder(Path(), kinds=()), MemoryLogger()], ids=["none", "numbers", "bare"])
def test_a_monitor_does_with_whatever_logger_there_is(name: str, logger: Logger | None):
    assert len(run_trick(make_trick(name), name, 2, logger=logger).actors) == 2


@pytest.mark.parametrize(("name", "argument"), [(n, argument) for n in TRICKS for argument in TRICKS[n].knobs])
def test_every_argument_changes_a_run(name: str, argument: str):
    traces = [
        trace(name, run_trick(make_trick(name, **arguments), name, 4)) if arguments else usual_trace(name)
        for arguments in TRICKS[name].knobs[argument]
    ]
    assert traces[0] != traces[1]


@EVERY_TRICK
def test_every_argument_is_a_knob_that_is_tried(name: str):
    arguments = inspect.signature(getattr(lit_ppo.callbacks, name)).parameters
    assert TRICKS[name].knobs.keys() == arguments.keys()
    for argument, (one, other) in TRICKS[name].knobs.items():
        acts, default = made(TRICKS[name].acts), arguments[argument].default
        values = [laid.get(argument, acts.get(argument, default)) for laid in (one, other)]
        assert repr(values[0]) != repr(values[1]), f"{argument} is the same in both runs"


@EVERY_TRICK
def test_resumed_run_continues_identically(name: str, tmp_path: Path):
    """From a checkpoint of each of three updates, one of them the end of a run, it makes the rest of a run of four."""
    save = Spy("on_train_batch_end", lambda module, *_: module.trainer.save_checkpoint(tmp_path / f"{module.updates}"))
    full = run_trick([make_trick(name), save], name, 4)
    run_trick(make_trick(name), name, 2, save=tmp_path / "2")
    for stop in (1, 2, 3):
        rest = run_trick(make_trick(name), name, 4, resume=tmp_path / f"{stop}")
        assert len(rest.actors) == 4 - stop
        # at the end of a run its critic is turned into score units, and back when the run goes on
        rounding = 1e-6 if name == "ValueNormalization" and stop == 2 else 0
        torch.testing.assert_close(rest.actors, full.actors[stop:], rtol=rounding, atol=rounding)
        torch.testing.assert_close(rest.critics, full.critics[stop:], rtol=rounding, atol=rounding)
        torch.testing.assert_close(rest.references, full.references[stop:], rtol=0, atol=0)
        assert rest.kl_coefs == full.kl_coefs[stop:]
        for ours, theirs in zip(rest.losses, full.losses[2 * stop :], strict=True):
            assert ours == pytest.approx(theirs, rel=rounding, abs=rounding)
        if TRICKS[name].monitor:  # of the policy at the stop either part may tell
            logs = [[call for call in run.trainer.logger.calls if (call[-1] or 0) > stop] for run in (full, rest)]
            assert logs[0] == logs[1]
            assert logs[0] or stop == 3, "nothing to compare"
            assert {repr(call) for call in rest.trainer.logger.calls} <= {*map(repr, full.trainer.logger.calls)}


@pytest.mark.parametrize("name", [name for name in TRICKS if make_trick(name).state_dict()])
def test_a_resumed_trick_uses_its_new_arguments(name: str):
    """Not those that it was saved with; or it refuses the checkpoint."""
    used = make_trick(name)
    run_trick(used, name, 1)
    for one, other in TRICKS[name].knobs.values():
        for arguments in (one, other):
            resumed = make_trick(name, **arguments)
            given = public(resumed)
            with contextlib.suppress(ValueError):
                resumed.load_state_dict(used.state_dict())
                assert resumed.state_dict() == used.state_dict()
            assert public(resumed) == given


def public(trick: Any) -> dict[str, str]:
    return {key: repr(value) for key, value in vars(trick).items() if not key.startswith("_")}


@EVERY_TRICK
def test_two_copies_work_or_are_refused_with_both_named(name: str):
    if TRICKS[name].twice:
        assert len(run_trick([make_trick(name), make_trick(name)], name, 2).actors) == 2
        return
    with pytest.raises((ValueError, RuntimeError), match=name):  # Lightning refuses two with state by itself
        run_trick([make_trick(name), make_trick(name)], name, 2)
    subclass = type(f"My{name}", (getattr(lit_ppo.callbacks, name),), {})(**made(TRICKS[name].acts))
    with pytest.raises(ValueError, match=rf"^(My{name} and {name}|{name} and My{name}): [a-z].+; keep one of them$"):
        run_trick([make_trick(name), subclass], name, 2)


@EVERY_TRICK
def test_pickled_copy_continues_identically_and_state_is_plain_data(name: str):
    used = make_trick(name)
    run_trick(used, name, 1)
    copy, state = pickle.loads(pickle.dumps(used)), used.state_dict()
    assert type(copy) is type(used)
    assert copy.state_dict() == state
    assert yaml.safe_load(yaml.safe_dump(_lists(state))) == _lists(state)
    before = deepcopy(state)
    assert trace(name, run_trick(copy, name, 2)) == trace(name, run_trick(used, name, 2))
    assert state == before, "the run that goes on changes a state that was taken"


def _lists(state: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in state.items()}


@EVERY_TRICK
def test_wrong_module_is_refused(name: str):
    with pytest.raises(TypeError, match=rf"{name} .*BoringModel"):
        run_updates(make_trick(name), module=BoringModel())


@pytest.mark.parametrize("name", MONITORS)
def test_a_monitor_refuses_a_module_that_fires_no_hooks(name: str):
    """Which can be asked for everything that is needed, but would never be asked again."""
    with pytest.raises(TypeError, match=f"{name} waits for hooks that Toy never fires"):
        run_trick(make_trick(name), name, 1, fires=lambda hook: False)


@pytest.mark.parametrize(("name", "model"), [(name, model) for name in TRICKS for model in TRICKS[name].needed_models])
def test_missing_model_is_refused_before_the_first_rollout(name: str, model: str):
    module = Toy(**{**TRICKS[name].toy, model: False})
    with pytest.raises(ValueError, match=rf"{name} needs a {model}, but Toy\({model}=None\)"):
        run_updates(make_trick(name), module=module)
    assert module.experiences == []


@pytest.mark.parametrize("model", ["critic", "reference"])
@EVERY_TRICK
def test_works_without_the_models_it_does_not_need(name: str, model: str):
    if model not in TRICKS[name].needed_models:
        assert len(run_trick(make_trick(name), name, 2, **{model: False}).actors) == 2


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AdaptiveKL", {"target": 6.0, "horizon": 10_000}),
        ("DualClip", {"c": 3.0}),
        ("KLEarlyStop", {"target": 0.015}),  # 1.5 x 0.01
        ("LearningRateAdaptation", {"target": 0.01, "minimum": 1e-7, "maximum": 1e-4}),
        ("LengthPenalty", {"budget": 128 - 32, "coef": 1 / 32, "max_penalty": 1.0}),
        ("MissingEndPenalty", {"score": -1.0}),
        ("ValueClipping", {"clip_range": 0.2}),
    ],
)
def test_yaml_has_the_numbers_of_its_source(name: str, arguments: dict[str, Any]):
    config = yaml.safe_load((ROOT / f"configs/tricks/{snake_case(name)}.yaml").read_text())
    assert config["trainer"]["callbacks+"][0]["init_args"] == arguments


@EVERY_TRICK
def test_page_says_when_what_and_where_from(name: str):
    trick = getattr(lit_ppo.callbacks, name)
    page = inspect.getdoc(trick)
    does = "Logs ``" if TRICKS[name].monitor else "rites ``" if "rites ``" in page else "adds ``"
    for part in ["Use it ", "Source: ", does]:
        assert part in page, f"{name}'s docstring lacks {part!r}"
    for argument in inspect.signature(trick).parameters:
        assert f"\n    {argument}: " in page, f"{name}'s docstring does not explain {argument}"


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_knows_nothing_of_processes(path: Path):
    """Nor of distributed training; what a trick may import of lit_ppo, import-linter checks."""
    tree = ast.parse(path.read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    known = {"os", "sys", "distributed", "torch.distributed", "global_rank", "local_rank", "world_size", "all_gather"}
    assert not names & known


def test_second_import_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"import lit_ppo\.callbacks instead"):
        importlib.import_module("callbacks")


def test_setup_refuses_before_anything_is_built():
    """Also where nobody but the callbacks looks: no Lightning trainer in sight."""
    for name, trick in TRICKS.items():
        if not trick.twice:
            copies = [make_trick(name), make_trick(name)]
            with pytest.raises(ValueError, match=f"{name} and {name}: .*; keep one of them"):
                copies[0].setup(SimpleNamespace(callbacks=copies), Toy(), "fit")
