"""LeastSquaresCritic against least squares by the definition, in NumPy."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lit_ppo.callbacks import LeastSquaresCritic
from tests.helpers.recorder import record
from tests.helpers.spies import Spy
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toy import Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "LeastSquaresCritic": Trick(
        acts={"ridge": 1.0},
        refuses={"n_states": 0, "ridge": 0.0, "decay": 1.0},
        knobs={
            "n_states": ({}, {"n_states": 1}),
            "ridge": ({}, {"ridge": 100.0}),
            "decay": ({}, {"decay": 0.5}),
        },
        needs="critic",
    )
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp("gpt2"), scale=4.0, n_layer=1)


def by_definition(experiences: list[Any], raw: list[np.ndarray], ridge: float, decay: float) -> np.ndarray:
    """Values of the last update: for each fold of groups a problem of its own, with a column for each coefficient.

    The toy's responses are shorter than 16 tokens, so each position is a bin.
    """
    first = experiences[0]
    seen = first.features.numpy()[first.response_mask.numpy()].astype(np.float64)
    mean, deviation = seen.mean(0), seen.std(0)
    widths = [experience.response_mask.shape[1] for experience in experiences]
    n_bins = max(widths)
    rows, targets, weights, owners = [], [], [], []
    for age, (experience, values) in enumerate(zip(reversed(experiences), reversed(raw), strict=True)):
        lengths = experience.response_mask.sum(1).tolist()
        for i, length in enumerate(lengths):
            for t in range(length):
                x = np.zeros((n_bins, 4))
                so_far = values[i, 1 : t + 1]
                x[t] = [1.0, values[i, t], so_far.mean() if t else 0.0, values[i, 0]]
                h = (experience.features[i, t].numpy() - mean) / deviation
                rows.append(np.concatenate([x.ravel(), (1 - t / n_bins) * h, h]))
                targets.append(experience.rewards[i, t:length].sum().item())
                weights.append(decay**age)
                owners.append((age, i, t, int(experience.group[i]) % 4))
    x, y, w = np.array(rows), np.array(targets), np.sqrt(weights)
    penalty = np.diag(np.sqrt([1.0] * (4 * n_bins) + [ridge] * (x.shape[1] - 4 * n_bins)))
    solved = np.zeros(experiences[-1].response_mask.shape)
    for fold in range(4):
        others = np.array([age > 0 or of != fold for age, _, _, of in owners])
        left = np.concatenate([x[others] * w[others, None], penalty])
        right = np.concatenate([y[others] * w[others], np.zeros(len(penalty))])
        found = np.linalg.lstsq(left, right, rcond=None)[0]
        for row, (age, i, t, of) in zip(x, owners, strict=True):
            if age == 0 and of == fold:
                solved[i, t] = row @ found
    return solved


@pytest.mark.parametrize("updates", [1, 3])
def test_values_are_the_least_squares_solution_of_the_other_folds_and_earlier_updates(updates: int):
    raw: list[np.ndarray] = []
    keep = Spy("on_rollout_end", lambda module, experience: raw.append(experience.values.detach().numpy()))
    module = run_updates([keep, LeastSquaresCritic(ridge=3.0, decay=0.7)], updates, episodes=12)
    expected = by_definition(module.experiences, raw, ridge=3.0, decay=0.7)
    np.testing.assert_allclose(module.experiences[-1].values.numpy(), expected, rtol=1e-3, atol=1e-4)  # float32 sums


def test_responses_may_become_longer_and_a_resumed_run_knows_the_shorter_ones():
    random, experiences = torch.Generator().manual_seed(0), []
    for n in (3, 5, 4):
        lengths = torch.arange(12) % n + 1
        numbers = {name: torch.randn(12, n, generator=random) for name in ("values", "rewards")}
        states = torch.randn(12, n, 2, generator=random)
        mask = torch.arange(n) < lengths[:, None]
        experience = SimpleNamespace(response_mask=mask, features=states, group=torch.arange(12), **numbers)
        experience.extras = {"critic_states": states}
        experiences.append(experience)
    raw = [experience.values.numpy() for experience in experiences]
    critic = LeastSquaresCritic(ridge=3.0, decay=0.7)
    module: Any = SimpleNamespace()
    for number, experience in enumerate(experiences):
        if number:  # as after a resume
            saved, critic = critic.state_dict(), LeastSquaresCritic(ridge=3.0, decay=0.7)
            critic.load_state_dict(saved)
        critic.on_rewards(None, module, experience)  # type: ignore[arg-type]
        solved = by_definition(experiences[: number + 1], raw[: number + 1], ridge=3.0, decay=0.7)
        np.testing.assert_allclose(experience.values.numpy(), solved, rtol=1e-3, atol=1e-4)


def test_an_update_that_is_not_finite_leaves_no_trace():
    """Its optimizer steps are skipped; the values of the next update are as if it had not been."""
    random, solved = torch.Generator().manual_seed(0), []
    fields = {"response_mask": torch.ones(8, 3, dtype=torch.bool), "group": torch.arange(8)}
    numbers = [torch.randn(8, 3, generator=random) for _ in range(4)]
    for broken in (False, True):
        critic = LeastSquaresCritic(ridge=1.0)
        module: Any = SimpleNamespace()
        for i in range(3 if broken else 2):
            values, rewards = numbers[:2] if i == 0 else numbers[2:]
            rewards = rewards.where(rewards < 0, torch.nan) if broken and i == 1 else rewards
            extras = {"critic_states": values[..., None]}
            experience = SimpleNamespace(values=values, rewards=rewards, extras=extras, **fields)
            critic.on_rewards(None, module, experience)  # type: ignore[arg-type]
        solved.append(experience.values)
    assert torch.equal(*solved)


def test_a_second_update_of_the_same_responses_keeps_the_values():
    critic, module = LeastSquaresCritic(ridge=1.0), SimpleNamespace()
    experience = SimpleNamespace(
        values=torch.randn(8, 3), rewards=torch.randn(8, 3), response_mask=torch.ones(8, 3, dtype=torch.bool),
        group=torch.arange(8), extras={"critic_states": torch.randn(8, 3, 2)},
    )  # fmt: skip
    raw = experience.values
    critic.on_rewards(None, module, experience)  # type: ignore[arg-type]
    solved, sums = experience.values, critic.state_dict()
    assert not torch.equal(solved, raw)
    critic.on_rewards(None, module, experience)  # type: ignore[arg-type]
    assert torch.equal(experience.values, solved)
    assert critic.state_dict() == sums


def test_responses_of_another_rollout_are_refused():
    experience = SimpleNamespace(values=torch.ones(2, 3), response_mask=torch.ones(2, 3, dtype=torch.bool), extras={})
    with pytest.raises(TypeError, match=r"LeastSquaresCritic needs experience.extras\['critic_states'\]"):
        LeastSquaresCritic().on_rewards(None, SimpleNamespace(), experience)  # type: ignore[arg-type]


def test_the_critic_is_not_trained():
    module = run_updates(LeastSquaresCritic(), 3)
    assert all(torch.equal(weight, module.critics[0]) for weight in module.critics)
    assert not torch.equal(module.actors[0], module.actors[-1])
    assert not any("value" in losses for losses in module.losses)


def test_no_response_predicts_its_own_return():
    """One score changes by 1000: the values of its own response, and of others in its fold, do not."""
    plain = run_updates(LeastSquaresCritic(ridge=1.0), episodes=8, scores=lambda update: [0.0] * 8)
    moved = run_updates(LeastSquaresCritic(ridge=1.0), episodes=8, scores=lambda update: [1000.0] + [0.0] * 7)
    before, after = (module.experiences[0].values for module in (plain, moved))
    torch.testing.assert_close(after[[0, 4]], before[[0, 4]])
    assert (after[[1, 2, 3]] - before[[1, 2, 3]]).abs().max() > 1.0


def test_a_module_that_trains_its_critic_all_the_same_is_refused():
    class Deaf(Toy):
        def backward_of(self, micro: Any) -> None:
            super().backward_of(micro)
            self.fire("on_critic_loss", micro, {"value": micro.mean(micro.values)})

    with pytest.raises(TypeError, match=r"^a callback has set critic_frozen, but Deaf trains its critic"):
        run_updates(LeastSquaresCritic(), module=Deaf())


def test_on_lit_ppo_the_critic_and_its_schedule_rest(tmp_path: Path, gpt2: Path):
    def halve(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    module, recorder, trainer = record(
        tmp_path, gpt2, LeastSquaresCritic(), actor_scheduler=halve, critic_scheduler=halve
    )
    start = make_module(gpt2)
    start.configure_model()
    assert all(v.equal(start.critic.state_dict()[k]) for k, v in module.critic.state_dict().items())
    rates = [optimizer.param_groups[0]["lr"] / optimizer.defaults["lr"] for optimizer in trainer.optimizers]
    assert rates == [0.25, 1.0]
    assert "value_loss" not in recorder.metrics[0]
    assert "value/explained_variance" in logged(trainer)[-1]


def test_it_runs_in_float64(tmp_path: Path):
    module = make_module(make_causal_lm(tmp_path / "a", scale=4.0))
    trainer = make_trainer(tmp_path, precision="64-true", callbacks=[LeastSquaresCritic()], max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    assert module.actor.model.dtype == torch.float64
