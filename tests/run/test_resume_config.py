"""Resuming with another configuration: a change takes effect and is reported as old -> new, or it is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo.callbacks import AdaptiveKL, CriticWarmup, EntropyBonus
from lit_ppo.optim.schedules import WarmupCosine
from lit_ppo.ppo.optimize import optimizers_of
from lit_ppo.run.checkpoint import StepCheckpoint
from lit_ppo.run.errors import CommandError
from lit_ppo.run.resume import ABSENT, changes, check_changes, describe_changes
from tests.helpers.command import run_command
from tests.helpers.ppo_command import ppo
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import logged, make_data, make_module, make_trainer

REMOVED = "ignore:Be aware that when using `ckpt_path`, callbacks used to create"


def adam(lr: float = 1e-2, **options: Any) -> Any:
    return lambda params: torch.optim.AdamW(params, lr=lr, **options)


def exponential(gamma: float) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=gamma)


def halved_by_number(optimizer: Any) -> Any:
    """Its rates depend on its count of steps alone."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp("lm"), scale=4.0)


def fit(folder: Path, actor: Path, *callbacks: Any, updates: int, start: int = 0, **module: Any) -> tuple[Any, Any]:
    """Fit up to some update, from a checkpoint of an earlier one where ``start`` says so."""
    arguments = {"actor_optimizer": adam(), "critic_optimizer": adam()} | module
    model = make_module(actor, **arguments)
    saved = folder / "checkpoints"
    checkpoint = StepCheckpoint(every_n_train_steps=1, keep=9, dirpath=str(saved))
    trainer = make_trainer(folder, callbacks=[*callbacks, checkpoint], max_steps=updates, enable_checkpointing=True)
    trainer.fit(model, make_data(folder), ckpt_path=str(saved / f"step-{start:06d}.ckpt") if start else None)
    return model, logged(trainer)


HALVED, SMALL = exponential(0.5), adam(8e-3)
# before, after, and what is logged by updates 3 and 4 (numbers 2 and 3, counted from 0)
CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, list[float]]]] = {
    "rates and the coefficient": (  # under the schedule 0.008 x 0.5^2, 0.008 x 0.5^3
        {"actor_scheduler": HALVED},
        {"actor_scheduler": HALVED, "actor_optimizer": SMALL, "critic_optimizer": adam(3e-3), "kl_coef": 0.7},
        {"policy/lr": [2e-3, 1e-3], "value/lr": [3e-3, 3e-3], "objective/kl_coef": [0.7, 0.7]},
    ),
    "rate under a schedule that multiplies the first one, and a schedule": (  # 0.01 x 0.1^2, 0.01 x 0.1^3
        {"actor_scheduler": halved_by_number, "critic_scheduler": HALVED},
        {"actor_scheduler": halved_by_number, "actor_optimizer": SMALL, "critic_scheduler": exponential(0.1)},
        {"policy/lr": [2e-3, 1e-3], "value/lr": [1e-4, 1e-5]},
    ),
    "schedule added for one, and the other one keeps its own": (
        {"critic_scheduler": halved_by_number},
        {"critic_scheduler": halved_by_number, "actor_scheduler": exponential(0.1)},
        {"policy/lr": [1e-4, 1e-5], "value/lr": [2.5e-3, 1.25e-3]},
    ),
    "schedule removed": ({"actor_scheduler": HALVED}, {}, {"policy/lr": [1e-2, 1e-2]}),
}


@pytest.mark.parametrize(("before", "after", "expected"), CHANGED.values(), ids=CHANGED.keys())
def test_a_changed_value_takes_effect(tmp_path: Path, actor: Path, before: Any, after: Any, expected: Any) -> None:
    fit(tmp_path, actor, updates=2, **before)
    _, rows = fit(tmp_path, actor, updates=4, start=2, **after)
    for tag, values in expected.items():
        assert [row[tag] for row in rows] == pytest.approx(values, rel=1e-6), tag


def test_updates_that_skipped_the_actor_are_no_steps_of_its_schedule(tmp_path: Path, actor: Path) -> None:
    """One of the two updates before: the new schedule has done one step, 0.008 x 0.5."""
    schedule = {"actor_scheduler": exponential(0.5)}
    fit(tmp_path, actor, CriticWarmup(updates=1), updates=2, **schedule)
    later = {"start": 2, "actor_optimizer": adam(8e-3), **schedule}
    _, rows = fit(tmp_path, actor, CriticWarmup(updates=1), updates=4, **later)
    assert [row["policy/lr"] for row in rows] == pytest.approx([4e-3, 2e-3], rel=1e-6)


def test_a_longer_run_stretches_its_schedule(tmp_path: Path, actor: Path) -> None:
    """A cosine over 2 updates and one over 4 are at 0.5 of the peak after 1 and 2: the longer run is there at 2."""
    schedule = {"actor_scheduler": lambda optimizer: WarmupCosine(optimizer)}
    _, rows = fit(tmp_path, actor, updates=2, **schedule)
    assert [row["policy/lr"] for row in rows] == pytest.approx([1e-2, 5e-3])
    _, rows = fit(tmp_path, actor, updates=4, start=2, **schedule)
    assert rows[0]["policy/lr"] == pytest.approx(5e-3)


def test_other_options_of_the_optimizer_take_effect_but_another_one_is_refused(tmp_path: Path, actor: Path) -> None:
    """With a weight decay of 50 at a rate of 0.01 a step halves every weight, and moves it by about the rate."""
    before, _ = fit(tmp_path, actor, updates=1)
    norm = float(before.actor.model.transformer.wte.weight.detach().norm())
    steps = {"ppo_epochs": 1, "minibatch_size": 7}
    after, _ = fit(tmp_path, actor, updates=2, start=1, actor_optimizer=adam(weight_decay=50.0), **steps)
    assert float(after.actor.model.transformer.wte.weight.detach().norm()) == pytest.approx(norm / 2, rel=0.1)
    with pytest.raises(ValueError, match=r"LitPPO\(actor_optimizer=SGD\): the checkpoint holds the states of AdamW"):
        fit(tmp_path, actor, updates=2, start=1, actor_optimizer=lambda params: torch.optim.SGD(params, lr=0.1))


@pytest.mark.filterwarnings(REMOVED)
def test_callbacks_may_come_and_go_and_the_controller_starts_from_a_changed_kl_coef(
    tmp_path: Path, actor: Path
) -> None:
    """The KL is far below its target: the error is clipped to -0.2, and 7 of 70 episodes make it a factor of 0.98."""
    controller = {"target": 1e6, "horizon": 70}
    fit(tmp_path, actor, AdaptiveKL(**controller), updates=1, kl_coef=0.1)
    _, gone = fit(tmp_path, actor, CriticWarmup(updates=1), EntropyBonus(), updates=3, start=1, kl_coef=0.1)
    assert [row["objective/kl_coef"] for row in gone] == pytest.approx([0.1, 0.1])
    assert ["policy/loss" in row for row in gone] == [False, True]  # the warm-up is counted from here
    assert "policy/entropy_loss" in gone[1]
    _, same = fit(tmp_path, actor, AdaptiveKL(**controller), updates=2, start=1, kl_coef=0.1)
    assert same[0]["objective/kl_coef"] == pytest.approx(0.1 * 0.98)
    _, changed = fit(tmp_path, actor, AdaptiveKL(**controller), updates=3, start=1, kl_coef=0.5)
    assert [row["objective/kl_coef"] for row in changed] == pytest.approx([0.5, 0.5 * (1 - 0.2 * 5 / 70)])


def test_minibatches_and_samples_take_effect(tmp_path: Path, actor: Path) -> None:
    fit(tmp_path, actor, updates=1)
    model, rows = fit(tmp_path, actor, updates=2, start=1, samples_per_prompt=2, minibatch_size=10, ppo_epochs=3)
    # 5 prompts are left in the epoch: 10 responses, one minibatch a pass, three steps of each optimizer
    assert rows[0]["optimizer/skipped_fraction"] == 0.0
    optimizers = optimizers_of(model)
    assert optimizers.keys() == {"actor", "critic"}
    for optimizer in optimizers.values():  # before: 7 responses in minibatches of 5, twice
        assert {int(state["step"]) for state in optimizer.state.values()} == {2 * 2 + 3}


# The comparison of configurations

CALLBACK = {"class_path": "lit_ppo.callbacks.AdaptiveKL", "init_args": {"target": 6.0}}
OTHER = {"class_path": "lit_ppo.callbacks.EntropyBonus", "init_args": {"coef": 0.1}}


def with_callbacks(*callbacks: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": list(callbacks) or None}, "config": ["ignored.yaml", len(callbacks)]}


def test_callbacks_are_compared_by_class_not_by_place() -> None:
    target = {**CALLBACK, "init_args": {"target": 3.0}}
    assert changes(with_callbacks(CALLBACK, OTHER), with_callbacks(OTHER, target)) == {
        "trainer.callbacks.AdaptiveKL.target": (6.0, 3.0)
    }
    gone = changes(with_callbacks(CALLBACK), with_callbacks(OTHER))
    assert gone["trainer.callbacks.AdaptiveKL"] == ("lit_ppo.callbacks.AdaptiveKL", ABSENT)
    assert describe_changes(gone) == [
        "trainer.callbacks.AdaptiveKL: removed; its state is dropped",
        "trainer.callbacks.EntropyBonus: added; it starts anew",
    ]
    twice = changes(with_callbacks(CALLBACK), with_callbacks(CALLBACK, target))
    assert twice == {"trainer.callbacks.AdaptiveKL+": (ABSENT, "lit_ppo.callbacks.AdaptiveKL")}


def test_types_are_compared_and_names_ignored_at_the_top_level_only() -> None:
    assert changes({"a": 1, "b": 0}, {"a": 1.0, "b": False}) == {"a": (1, 1.0), "b": (0, False)}
    assert not changes({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]})
    assert not changes({"config": "a", "stages": ["a"], "ckpt_path": None}, {"config": "b", "weights_only": True})
    assert changes({"model": {"config": "a"}}, {"model": {"config": "b"}}) == {"model.config": ("a", "b")}


def test_a_mapping_in_place_of_a_value_is_one_change() -> None:
    """And so is the reverse; within two mappings, or where there was nothing, each value is one."""
    lora, more = {"r": 8, "lora_alpha": 16}, {"class_path": "x.Cosine", "init_args": {"warmup": 3}}
    none, given = ({"model": {"init_args": {"actor_lora": value}}} for value in (None, lora))
    assert changes(none, given) == {"model.init_args.actor_lora": (None, lora)}
    assert changes(given, none) == {"model.init_args.actor_lora": (lora, None)}
    assert changes({"s": None}, {"s": more}) == {"s": (None, more)}
    assert changes({}, {"s": more}) == {"s.class_path": (ABSENT, "x.Cosine"), "s.init_args.warmup": (ABSENT, 3)}
    for old, new, words in ((none, given, f"was None, now {lora}"), (given, none, f"was {lora}, now None")):
        with pytest.raises(CommandError, match=re.escape(f"model.init_args.actor_lora {words}, and cannot change")):
            check_changes("x.ckpt", changes(old, new))
    with pytest.raises(CommandError, match="data was None, now"):
        check_changes("x.ckpt", changes({"data": None}, {"data": more}))


MODELS = ["actor", "critic", "reference", "actor_lora", "critic_lora", "critic_lora.r", "model", "tokenizer"]
NOT_MODELS = ["seed_everything", "model.class_path", "data.class_path", "report.prompts"]


@pytest.mark.parametrize("name", [*NOT_MODELS, *(f"model.init_args.{name}" for name in MODELS)])
def test_what_cannot_change_is_refused(name: str) -> None:
    with pytest.raises(
        CommandError, match=rf"x.ckpt: {name} was 'a', now 'b', and cannot change within a run"
    ) as refused:
        check_changes("x.ckpt", {"trainer.max_steps": (1, 2), name: ("a", "b")})
    assert refused.value.exit_code == 2
    check_changes("x.ckpt", {"trainer.max_steps": (1, 2), "model.init_args.critic_optimizer.init_args.lr": (1, 2)})


# The command


def test_the_command_says_and_refuses(tmp_path: Path, actor: Path) -> None:
    command = ppo(tmp_path, actor)
    run_command(*command, cwd=tmp_path).ok()
    again = [*command, "--ckpt_path=auto", "--trainer.max_steps=2"]
    changed = ["--model.kl_coef=0.3", "--model.actor_optimizer.lr=1e-3", "--trainer.callbacks+=AdaptiveKL"]
    out = run_command(*again, *changed, cwd=tmp_path).ok().out
    for line in (
        "  trainer.max_steps: 1 -> 2\n",
        "  trainer.callbacks.AdaptiveKL: added; it starts anew\n",
        "  model.init_args.kl_coef: 0.05 -> 0.3\n",
        "  model.init_args.actor_optimizer.init_args.lr: 5e-07 -> 0.001\n",
    ):
        assert line in out, out
    assert "as they were saved" not in out  # which is said of modules that are not ours
    run_command(*again, "--seed_everything=7", cwd=tmp_path).refused("seed_everything was 42, now 7")
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('\n{"prompt": "one more"}')
    run_command(*again, *changed, cwd=tmp_path).refused("PromptDataModule(path='prompts.jsonl')", "rows was 16")
