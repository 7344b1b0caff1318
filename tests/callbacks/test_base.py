"""The hook contract itself."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, IterableDataset

from lit_ppo.advantages import GAE
from lit_ppo.callbacks import PPOCallback, fire
from lit_ppo.callbacks.base import HOOKS
from lit_ppo.callbacks.checks import (
    refuse_same_loss,
    require,
    require_model,
    require_token_rewards,
)
from lit_ppo.callbacks.trainer import of_first_process
from tests.helpers.spies import Spy
from tests.helpers.toy import Toy
from tests.helpers.toy_data import ToyTexts
from tests.helpers.toy_runs import run_updates
from tests.helpers.trick import make_trick


def test_hooks_reach_plain_callbacks_in_list_order_with_their_arguments():
    calls = []
    first = Spy("on_scores", lambda module, experience: calls.append(("first", module, experience)))
    second = Spy("on_scores", lambda module, experience: calls.append(("second", module, experience)))
    module = run_updates([first, PPOCallback(), second])
    experience = module.experiences[0]
    assert calls == [("first", module, experience), ("second", module, experience)]


def test_hooks_run_inside_the_profiler():
    profiled = []
    profiler = SimpleNamespace(profile=lambda name: nullcontext(profiled.append(name)))
    callback = Spy("on_scores", lambda module: None)
    module = SimpleNamespace(trainer=SimpleNamespace(callbacks=[callback], profiler=profiler))
    fire(module, "on_scores")
    fire(module, "on_rewards")
    assert profiled == ["[Callback]Spy.on_scores"]


def test_every_hook_is_a_no_op_of_the_base():
    for hook in HOOKS:
        arguments = HOOKS[hook].split(", ")
        assert getattr(PPOCallback(), hook)(None, None, *arguments) is None


def test_toy_fires_every_hook():
    spies = {hook: Spy(hook, lambda *args: None) for hook in HOOKS}
    run_updates(list(spies.values()))
    assert [hook for hook, spy in spies.items() if not spy.seen] == []


def test_misspelt_hook_is_refused():
    with pytest.raises(TypeError, match=r"Mine\.on_score: nothing fires this hook; ours are .*on_scores"):
        type("Mine", (PPOCallback,), {"on_score": lambda self, trainer, pl_module, experience: None})


def test_misspelt_hook_of_a_plain_callback_is_warned_of():
    class Plain(L.Callback):
        def on_score(self, *_: Any) -> None: ...

        def on_rollouts_end(self, *_: Any) -> None: ...

        def on_tuesdays(self) -> None: ...  # of its own use

    with pytest.warns(UserWarning, match="nothing calls it") as warned:
        run_updates(Plain(), 2)
    assert sorted(message for message in (str(w.message) for w in warned) if "Plain" in message) == [
        "Plain.on_rollouts_end: nothing calls it; did you mean on_rollout_end?",
        "Plain.on_score: nothing calls it; did you mean on_scores?",
    ]


def test_module_that_never_fires_is_refused():
    with pytest.raises(TypeError, match=r"PPOCallback waits for hooks that BoringModel never fires; call .*fire"):
        run_updates(PPOCallback(), module=BoringModel())


def test_require_names_both_and_what_is_missing():
    module = SimpleNamespace(kl_coef=0.1)
    require(PPOCallback(), module, "kl_coef")
    with pytest.raises(TypeError, match="PPOCallback needs critic, actor on the module, which SimpleNamespace lacks"):
        require(PPOCallback(), module, "kl_coef", "critic", "actor")


def test_require_model_tells_unknown_from_none():
    require_model(PPOCallback(), SimpleNamespace(critic=object()), "critic")
    with pytest.raises(TypeError, match="PPOCallback needs critic on the module"):
        require_model(PPOCallback(), SimpleNamespace(), "critic")
    with pytest.raises(ValueError, match=r"PPOCallback needs a critic, but SimpleNamespace\(critic=None\) has none"):
        require_model(PPOCallback(), SimpleNamespace(critic=None), "critic")


def test_same_loss_is_refused_with_both_named():
    class Other(L.Callback): ...

    mine, other = PPOCallback(), Other()
    refuse_same_loss(mine, SimpleNamespace(callbacks=[mine, other]), PPOCallback)
    with pytest.raises(ValueError, match="PPOCallback and Other: both replace the same loss term; keep one of them"):
        refuse_same_loss(mine, SimpleNamespace(callbacks=[mine, other]), PPOCallback, Other)


def test_token_rewards_are_required_where_an_estimator_says_that_it_reads_none():
    scores_alone = type("ScoresAlone", (), {"needs_rewards": False})()
    for module in (BoringModel(), SimpleNamespace(advantages=object()), SimpleNamespace(advantages=GAE())):
        require_token_rewards(PPOCallback(), module)
    with pytest.raises(
        ValueError, match=r"PPOCallback changes token rewards, .*\(advantages=ScoresAlone\) .*with KLLoss"
    ):
        require_token_rewards(PPOCallback(), SimpleNamespace(advantages=scores_alone))


class Texts(ToyTexts):
    """Says when it is let go."""

    def teardown(self, stage: str) -> None:
        assert stage == "fit"
        self.calls.append("teardown" + (" with a trainer" if self.trainer is not None else ""))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([1, 2])


READERS = {"PTXLoss": "backward_on_text", "AlignmentTax": "loss_on_text"}  # and what they call


@pytest.mark.parametrize("name", READERS)
def test_a_tricks_data_is_prepared_set_up_to_train_and_let_go(name: str):
    data = Texts()
    make_trick(name, data=data).setup(L.Trainer(logger=False, barebones=True), Toy(), "validate")
    assert data.calls == []
    run_updates(make_trick(name, data=data), 2)
    assert data.calls == ["prepare_data", "setup fit with a trainer", "teardown with a trainer"]
    assert data.trainer is None


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "loader",
    [
        [1, 2],
        DataLoader(Stream()),
        DataLoader(torch.arange(0)),  # type: ignore[arg-type]
        DataLoader([1, 2], batch_sampler=[[0], [1]]),  # type: ignore[arg-type]
    ],
    ids=["no loader", "no length", "no rows", "batches of its own"],
)
def test_other_loaders_are_refused_before_the_first_rollout(name: str, loader: Any):
    data, module = ToyTexts(), Toy()
    data.train_dataloader = lambda: loader
    with pytest.raises(ValueError, match=rf"{name}\(data=ToyTexts\): train_dataloader\(\) must return a DataLoader"):
        run_updates(make_trick(name, data=data), module=module)
    assert module.experiences == []


@pytest.mark.parametrize(("name", "method"), READERS.items())
def test_module_that_cannot_read_text_is_refused_before_the_first_rollout(name: str, method: str):
    module = type("Mute", (Toy,), {method: property()})()
    with pytest.raises(TypeError, match=f"{name} needs {method} on the module, which Mute lacks"):
        run_updates(make_trick(name), module=module)
    assert module.experiences == []


def test_what_the_first_process_finds_or_fails_at_all_are_told() -> None:
    """The other one does not look for itself."""
    told: list[Any] = []

    def trainer(first: bool) -> Any:
        broadcast = (lambda found: told.append(found) or found) if first else (lambda found: told[-1])
        return SimpleNamespace(is_global_zero=first, strategy=SimpleNamespace(broadcast=broadcast))

    def fail() -> None:
        raise OSError("the disk is gone")

    assert of_first_process(trainer(True), lambda: 7) == of_first_process(trainer(False), lambda: 8) == 7
    for first in (True, False):
        with pytest.raises(ValueError, match=r"^the disk is gone$"):
            of_first_process(trainer(first), fail if first else lambda: 8)
    with pytest.raises(ZeroDivisionError):
        of_first_process(trainer(True), lambda: 1 / 0)
    with pytest.raises(ValueError, match=r"^ZeroDivisionError: division by zero$"):
        of_first_process(trainer(False), lambda: 8)
