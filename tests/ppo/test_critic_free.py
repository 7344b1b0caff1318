"""Whole runs without a critic: the estimators against a brute force, and what a run no longer has."""

import statistics
from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo.advantages import GroupRelative, LeaveOneOut, Reinforce
from lit_ppo.ppo import build
from tests.helpers.oracle import Oracle
from tests.helpers.recorder import record, rows_of
from tests.helpers.toys import logged, make_data, make_module, make_trainer

KL_COEF = 0.3


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Letters modulo 5: hardly two responses to a prompt alike."""
    return [float(len(response) % 5) for response in responses]


def settings(estimator: Any, **overrides: Any) -> dict[str, Any]:
    """Three responses a prompt, and a KL in the token rewards where they are read."""
    kl_coef = KL_COEF if estimator.needs_rewards else 0.0
    return {
        "advantages": estimator, "critic": None, "samples_per_prompt": 3, "kl_coef": kl_coef, "rewards": score,
        **overrides,
    }  # fmt: skip


class Numbered(L.Callback):
    """Numbers the rows, puts them into another order, and notes which ones each optimizer step sees."""

    def __init__(self, order: list[int] | None = None) -> None:
        self.order = order
        self.steps: list[list[int]] = []

    def on_rollout_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        experience.extras["row"] = torch.arange(len(experience))
        if self.order is not None:
            experience.keep(self.order)

    def on_minibatch_start(self, trainer: Any, pl_module: Any, minibatch: Any) -> None:
        self.steps.append(minibatch.extras["row"].tolist())


def brute_force(estimator: Any, scores: list[float], rewards: list[list[float]], groups: list[int]) -> Any:
    """Advantages by the papers' formulas, in plain numbers: a list for each row."""
    others = [[j for j, other in enumerate(groups) if other == group and j != i] for i, group in enumerate(groups)]
    advantages: list[list[float]] = []
    flat = [sum(row[t:]) for row in rewards for t in range(len(row))]
    for i, row in enumerate(rewards):
        if isinstance(estimator, GroupRelative):
            group = [scores[i], *(scores[j] for j in others[i])]
            one = scores[i] - statistics.fmean(group)
            advantages.append([one / (statistics.variance(group) + 1e-8) ** 0.5] * len(row))
        elif isinstance(estimator, LeaveOneOut):
            advantages.append([sum(row) - statistics.fmean(sum(rewards[j]) for j in others[i])] * len(row))
        else:
            mean, root = statistics.fmean(flat), (statistics.variance(flat) + 1e-8) ** 0.5
            advantages.append([(sum(row[t:]) - mean) / root for t in range(len(row))])
    return advantages


@pytest.mark.parametrize("estimator", [GroupRelative(), LeaveOneOut(), Reinforce()], ids=repr)
def test_two_updates_are_those_of_the_oracle(tmp_path, lm, estimator):
    """Advantages, what is logged of each optimizer step, and weights; the oracle's critic learns beside, unused."""
    numbered = Numbered()
    module, recorder, _ = record(tmp_path, lm, numbered, **settings(estimator, clip_range=0.05))
    oracle = Oracle(
        lm, kl_coef=module.kl_coef, clip_range=0.05, temperature=1.0, lr=0.1, reduction="token_mean", gamma=1.0, lam=1.0
    )
    steps = iter(zip(numbered.steps, recorder.metrics, strict=True))
    assert [len(experience) for experience in recorder.experiences] == [21, 15]
    for experience in recorder.experiences:
        rows, scores = rows_of(experience), score([], experience.responses)
        seen = oracle.look(rows, scores)
        expected = brute_force(estimator, scores, [row["rewards"] for row in seen], experience.group.tolist())
        for i, (row, advantages) in enumerate(zip(seen, expected, strict=True)):
            row["advantages"] = advantages
            ours = experience.advantages[i]
            padded = [*advantages, *[0.0] * (len(ours) - len(advantages))]
            assert ours.tolist() == pytest.approx(padded, rel=1e-4, abs=1e-5)
        for _ in range(-(-len(rows) // module.minibatch_size) * module.ppo_epochs):
            chosen, metrics = next(steps)
            step = oracle.step([rows[i] for i in chosen], [seen[i] for i in chosen])
            for name in step.keys() - {"value_loss", "critic_grad_norm"}:
                assert metrics[name] == pytest.approx(step[name], rel=1e-4, abs=1e-6), name
    ours, theirs = module.actor.model.state_dict(), oracle.actor.state_dict()
    start = make_module(lm)
    start.configure_model()
    assert any(not value.equal(start.actor.model.state_dict()[name]) for name, value in ours.items())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", [GroupRelative(), Reinforce()], ids=repr)
def test_the_cut_into_micro_batches_and_the_order_of_rows_change_nothing(tmp_path, lm, estimator):
    """One optimizer step, so that all rows are in it; the groups are taken apart by the order."""
    one_step = {"minibatch_size": 21, "ppo_epochs": 1, "max_steps": 1}
    one, first, _ = record(tmp_path, lm, Numbered(), **settings(estimator, micro_batch_size=None), **one_step)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0)).tolist()
    other, second, _ = record(tmp_path, lm, Numbered(order), **settings(estimator, micro_batch_size=3), **one_step)
    found, expected = (recorder.experiences[0].advantages for recorder in (second, first))
    torch.testing.assert_close(found, expected[order], rtol=1e-5, atol=1e-6)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_no_critic_is_built_stepped_logged_saved_or_resumed(tmp_path, lm, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a critic was asked for")

    monkeypatch.setattr(build, "load_critic", refuse)
    given = settings(LeaveOneOut(), critic_optimizer=refuse, critic_scheduler=refuse)
    module, recorder, trainer = record(tmp_path, lm, **given)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.validate(module, make_data(tmp_path, val_fraction=0.3))
    assert module.critic is None
    assert len(trainer.optimizers) == 1
    assert all(e.values is None and e.returns is None for e in recorder.experiences)
    assert not any("value" in name or "critic" in name for row in logged(trainer) for name in row)
    assert not any("value" in name or "critic" in name for metrics in recorder.metrics for name in metrics)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"actor"}
    assert len(checkpoint["optimizer_states"]) == 1
    module.save_pretrained(tmp_path / "model")
    assert make_module(tmp_path / "model", **given).rollout(["the film"]).values is None
    resumed = make_module(lm, **given)
    again = make_trainer(tmp_path, max_steps=3)
    again.fit(resumed, make_data(tmp_path), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    through, _, _ = record(tmp_path, lm, max_steps=3, **given)
    assert all(value.equal(through.state_dict()[name]) for name, value in resumed.state_dict().items())


# what cannot work is refused before the first rollout


@pytest.mark.parametrize(
    ("estimator", "name", "value", "message"),
    [
        (GroupRelative(), "samples_per_prompt", 1, r"LitPPO\(samples_per_prompt=1\): GroupRelative compares"),
        (GroupRelative(), "kl_coef", 0.1, r"LitPPO\(kl_coef=0.1\): GroupRelative reads only scores"),
    ],
)
def test_what_a_callback_sets_is_checked_before_its_rollout(tmp_path, lm, estimator, name, value, message):
    class Set(L.Callback):
        def on_rollout_start(self, trainer: Any, pl_module: Any, prompts: Any) -> None:
            setattr(pl_module, name, value)

    module = make_module(lm, **settings(estimator))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, callbacks=[Set()]).fit(module, make_data(tmp_path))
    assert module.rollouts == 0
