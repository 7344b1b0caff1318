"""RewardHackingMonitor(then="go_back"): the run ends with the best update's weights, and goes on from its checkpoint.

A count of good words is gamed by repeating them, and the variety of words falls: see the monitor's own tests.
"""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_ppo import PromptDataModule
from lit_ppo.callbacks import RewardHackingMonitor
from lit_ppo.parallel.full_state import full_weights
from lit_ppo.parallel.ranks import n_ranks, rank
from lit_ppo.run.checkpoint import RUN, StepCheckpoint, find_last
from lit_ppo.run.export import ExportModel
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import count_good, logged, make_module, make_trainer, variety, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*Monitor. reward hacking")

UPDATES = 40
LORA = {"r": 4, "target_modules": ["c_attn", "c_proj"]}


class Weights(L.Callback):
    """The actor's weights after each number of updates; behind the monitor."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}
        self.end: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.after[trainer.global_step] = self.now(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.after[trainer.global_step] = self.now(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.end = self.now(pl_module)

    @staticmethod
    def now(pl_module: Any) -> dict[str, Tensor]:
        whole = {}
        for name in ("actor", "critic"):
            weights = full_weights(getattr(pl_module, name))
            weights = getattr(pl_module, name).state_dict() if weights is None else weights
            whole |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in weights.items()}
        return whole


def fit(folder: Path, actor: Path, start: Path | None = None, **options: Any) -> tuple[Any, Any, Any, L.Trainer]:
    """Monitor, weights, module and trainer of a run in a folder, from a checkpoint if there is a ``start``.

    Options are those of the monitor and the trainer that are named below, and of the module.
    """
    folder.mkdir(exist_ok=True)
    adam = partial(torch.optim.Adam, lr=0.01)
    then, gold = options.pop("then", "go_back"), options.pop("gold", variety)
    for_trainer = {name: options.pop(name) for name in ("strategy", "max_steps") if name in options}
    arguments = {"rewards": count_good, "kl_coef": 0.0, "actor_optimizer": adam, "critic_optimizer": adam}
    module = make_module(actor, **{**arguments, **options})
    monitor = RewardHackingMonitor(gold, prompts=9, every=2, then=then)
    weights = Weights()
    saves = StepCheckpoint(every_n_train_steps=100, dirpath=str(folder / "saved"))
    callbacks = [monitor, weights, saves, ExportModel(str(folder / "model"))]
    defaults = {"max_steps": UPDATES, "devices": n_ranks(), "enable_checkpointing": True}
    trainer = make_trainer(folder, callbacks=callbacks, **{**defaults, **for_trainer})
    if rank() == 0:
        write_prompts(folder / "held_out.jsonl", 9)
        write_prompts(folder / "prompts.jsonl")
    trainer.strategy.barrier()
    files = [str(folder / f"{name}.jsonl") for name in ("prompts", "held_out")]
    data = PromptDataModule(files[0], val_path=files[1], batch_size=7, seed=0)
    trainer.fit(module, data, ckpt_path=None if start is None else str(start), weights_only=True)
    return monitor, weights, module, trainer


def best_of(monitor: Any) -> int:
    gold = monitor.state_dict()["courses"]["gold"]
    return max(gold, key=gold.__getitem__)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp("lm") / "lm", scale=4.0)


@pytest.fixture(scope="module")
def gamed(tmp_path_factory: pytest.TempPathFactory, actor: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("gamed")
        return folder, *fit(folder, actor)


def test_the_run_ends_with_the_weights_of_the_best_update(gamed: Any) -> None:
    folder, monitor, weights, module, trainer = gamed
    best = best_of(monitor)
    assert 0 < best < trainer.global_step < UPDATES
    assert_same(weights.end, weights.after[best])
    assert monitor.told[1:] == [f"back to the weights of update {best}"]  # in the run's summary
    last = weights.after[trainer.global_step]
    for name in ("actor.model.transformer.wte.weight", "critic.value_head.weight"):
        assert not torch.equal(weights.end[name], last[name]), name
    exported = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    for name, value in module.actor.model.state_dict().items():
        assert torch.equal(exported[name], value), name


def test_only_the_best_is_kept_and_the_run_goes_on_from_there(gamed: Any) -> None:
    """It is the newest, so that ``last`` means it; the run as it stood at the verdict lies there too."""
    folder, monitor, _, _, trainer = gamed
    name = f"best-step-{best_of(monitor):06d}.ckpt"
    files = sorted(path.name for path in (folder / "saved").iterdir())
    assert files == [name, f"step-{trainer.global_step:06d}.ckpt"]
    assert find_last(folder, str(folder / "saved")).name == name
    best = torch.load(folder / "saved" / name, weights_only=True)
    assert best["global_step"] == best_of(monitor)
    # a run that goes on with it logs again what this step's logger was told only afterwards
    assert best[RUN]["steps_logged"] == best_of(monitor) - 1
    assert best[RUN]["logged"]["objective/score"] == logged(trainer)[best_of(monitor) - 1]["objective/score"]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_going_on_from_there_is_the_same_run_to_the_bit(tmp_path: Path, gamed: Any, actor: Path) -> None:
    """It comes to the same verdict, by the same weights and logs, and goes back to where it came from."""
    folder, monitor, weights, _, trainer = gamed
    best = best_of(monitor)
    start = folder / "saved" / f"best-step-{best:06d}.ckpt"
    _, again, module, other = fit(tmp_path, actor, start)
    assert other.global_step == trainer.global_step
    assert_same(again.end, weights.after[best])
    for update in range(best, trainer.global_step + 1):
        assert_same(again.after[update], weights.after[update])
    whole, rest = logged(trainer), logged(other)
    assert len(rest) == len(whole) - best
    for expected, row in zip(whole[best:], rest, strict=True):
        for name, value in expected.items():
            if not name.startswith(("time/", "throughput/", "memory/")):
                assert row[name] == value, name
    assert module.rollouts == trainer.global_step


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, gamed: Any, actor: Path) -> Path:
    """Folder of a run that was stopped after one update, and of its rest, stopped between best update and verdict."""
    folder, best = tmp_path_factory.mktemp("stopped"), best_of(gamed[1])
    assert 1 < best < gamed[-1].global_step - 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(folder / "first", actor, max_steps=1)
        fit(folder / "second", actor, folder / "first/saved/step-000001.ckpt", max_steps=best + 1)
    return folder


def test_another_runs_best_is_left_alone(gamed: Any, stopped: Path) -> None:
    """A new best of a run that goes on elsewhere replaces its own, not that of the run before."""
    assert len(list((stopped / "first/saved").glob("best*"))) == 1
    names = [path.name for path in (stopped / "second/saved").glob("best*")]
    assert names == [f"best-step-{best_of(gamed[1]):06d}.ckpt"]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_resumed_run_knows_where_its_best_lies(tmp_path: Path, gamed: Any, stopped: Path, actor: Path) -> None:
    """It goes back to the checkpoint in the folder of before; where that is gone, the weights stay."""
    _, monitor, weights, _, trainer = gamed
    best = best_of(monitor)
    start, kept = (
        stopped / f"second/saved/{name}-{n:06d}.ckpt" for name, n in (("step", best + 1), ("best-step", best))
    )
    _, again, _, other = fit(tmp_path / "third", actor, start)
    assert other.global_step == trainer.global_step
    assert_same(again.end, weights.after[best])
    assert kept.exists()
    assert not list((tmp_path / "third/saved").glob("best*"))
    kept.rename(tmp_path / "gone")
    with pytest.warns(UserWarning, match=rf"Monitor: no checkpoint of update {best} .*the weights do not change"):
        _, again, _, _ = fit(tmp_path / "fourth", actor, start)
    assert_same(again.end, weights.after[trainer.global_step])


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_an_older_best_is_not_taken_for_the_best(tmp_path: Path, gamed: Any, stopped: Path, actor: Path) -> None:
    """The best update was passed while nobody kept it."""
    best = best_of(gamed[1])
    fit(tmp_path / "second", actor, stopped / "first/saved/step-000001.ckpt", then="warn", max_steps=best + 1)
    start = tmp_path / f"second/saved/step-{best + 1:06d}.ckpt"
    with pytest.warns(UserWarning, match=rf"no checkpoint of update {best} \(.*first.saved.best-step-00000\d.ckpt"):
        _, again, _, other = fit(tmp_path / "third", actor, start)
    assert_same(again.end, gamed[2].after[other.global_step])


def test_without_a_verdict_the_last_weights_stay(tmp_path: Path, actor: Path) -> None:
    """Gold is the score itself; its best is kept all the same, for whoever wants it."""
    monitor, weights, _, _ = fit(tmp_path, actor, gold=count_good, max_steps=4)
    assert_same(weights.end, weights.after[4])
    (kept,) = (tmp_path / "saved").glob("best*")
    assert kept.name == f"best-step-{best_of(monitor):06d}.ckpt"


@pytest.mark.parametrize("then", ["warn", "stop"])
def test_nothing_is_kept_unless_asked_for(tmp_path: Path, actor: Path, then: str) -> None:
    fit(tmp_path, actor, then=then, max_steps=2)
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step-000002.ckpt"]


def unlike_the_start(responses: list[str]) -> list[float]:
    """Minus the score."""
    return [-value for value in count_good([], responses)]


def test_the_best_may_be_what_the_run_started_from(tmp_path: Path, actor: Path) -> None:
    """A checkpoint from before the first update, which a run can start from."""
    monitor, weights, _, trainer = fit(tmp_path / "first", actor, gold=unlike_the_start)
    assert best_of(monitor) == 0 < trainer.global_step < UPDATES
    assert_same(weights.end, weights.after[0])
    start = tmp_path / "first/saved/best-step-000000.ckpt"
    _, again, _, other = fit(tmp_path / "second", actor, start, gold=unlike_the_start, then="stop")
    assert other.global_step == trainer.global_step
    assert_same(again.end, weights.after[trainer.global_step])


def test_an_adapter_goes_back(tmp_path: Path, actor: Path) -> None:
    monitor, weights, _, trainer = fit(tmp_path, actor, actor_lora=LORA)
    best = best_of(monitor)
    assert best < trainer.global_step < UPDATES
    assert_same(weights.end, weights.after[best])


def on_two(folder: Path, actor: Path) -> None:
    monitor, weights, _, trainer = fit(folder / "run", actor, strategy="fsdp2")
    if rank() == 0:
        assert_same(weights.end, weights.after[best_of(monitor)])
        torch.save((best_of(monitor), trainer.global_step, weights.end), folder / "two.pt")


def test_two_ranks_go_back_as_one(tmp_path: Path, gamed: Any, actor: Path) -> None:
    """With weights that are dealt out."""
    _, monitor, _, _, trainer = gamed
    on_ranks(2, on_two, tmp_path, actor, folder=tmp_path / "ranks")
    best, end, whole = torch.load(tmp_path / "two.pt", weights_only=True)
    assert (best, end) == (best_of(monitor), trainer.global_step)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    for key, value in exported.items():
        assert torch.equal(value, whole[f"actor.model.{key}"]), key
