"""ValueNormalization: what the critic means in score units is what a plain critic means, at any scale."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo.callbacks import ValueNormalization
from tests.helpers.forwards import values_of
from tests.helpers.recorder import record
from tests.helpers.spies import Spy
from tests.helpers.toy import Toy, TwoUpdates
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import count_good, logged
from tests.helpers.trick import Trick

TRICK = {
    "ValueNormalization": Trick(acts={}, refuses={"decay": 1.0}, knobs={"decay": ({}, {"decay": 0.5})}, needs="critic")
}


def weighted_moments(batches: list[list[float]], decay: float = 1.0) -> tuple[float, float]:
    """Mean and deviation by the definition; each update's returns weigh ``decay`` of what they did at the next."""
    weights = [decay ** (len(batches) - 1 - i) for i in range(len(batches))]
    total = sum(w * len(batch) for w, batch in zip(weights, batches, strict=True))
    mean = sum(w * x for w, batch in zip(weights, batches, strict=True) for x in batch) / total
    return mean, math.sqrt(
        sum(w * (x - mean) ** 2 for w, batch in zip(weights, batches, strict=True) for x in batch) / total
    )


def returns_of(experience: Any) -> list[float]:
    return experience.returns.double()[experience.response_mask].tolist()


@pytest.mark.parametrize(("toy", "decay"), [(Toy, 0.5), (TwoUpdates, None)])
def test_a_linear_critic_means_what_a_plain_one_means(toy: Any, decay: float | None):
    """Plain gradient descent on (w x + b - (R - m) / s)^2 / 2 moves s w as it moves w on (w x + b - R)^2 / 2.

    The factor s of the score units cancels that of the error: so long as the head is rescaled with the statistics,
    s w is the plain critic's weight after every update; s b + m is its bias; and the loss is the plain one over s^2.
    """
    ours, plain = (run_updates(tricks, 4, module=toy()) for tricks in (ValueNormalization(decay), []))
    batches: list[list[float]] = []
    for update in range(len(plain.critics)):
        batches.append(returns_of(ours.experiences[update]))
        mean, std = weighted_moments(batches, decay or 1.0)
        torch.testing.assert_close(std * ours.critics[update], plain.critics[update], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.actors[update], plain.actors[update], rtol=1e-4, atol=1e-5)
        values = [module.experiences[update].values for module in (ours, plain)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)  # in score units, also of a rollout used twice
        losses = [module.losses[2 * update]["value"] for module in (ours, plain)]
        assert losses[0] == pytest.approx(losses[1] / std**2, rel=1e-4)
    for name in ("weight", "bias"):  # after the fit in score units
        torch.testing.assert_close(getattr(ours.critic, name), getattr(plain.critic, name), rtol=1e-4, atol=1e-4)
    assert mean > 2.0
    assert std > 2.0


@pytest.mark.parametrize("second", ["the same", "a new one", "none"])
def test_a_second_fit_starts_with_a_critic_in_score_units(second: str):
    """Its values at the rollout are what a plain critic has, whether the callback is there again or not."""
    trick = ValueNormalization()
    ours, plain = run_updates(trick, 3), run_updates([], 3)
    tricks = {"the same": [trick], "a new one": [ValueNormalization()], "none": []}[second]
    for module, callbacks in ((ours, tricks), (plain, [])):
        module.updates.zero_()
        run_updates(callbacks, 1, module=module)
    torch.testing.assert_close(ours.experiences[3].values, plain.experiences[3].values, rtol=1e-4, atol=1e-4)
    assert plain.experiences[3].values.abs().max() > 1.0


def test_a_fit_that_fails_leaves_a_critic_in_score_units():
    def fail(module: Toy, experience: Any) -> None:
        if len(module.experiences) == 3:
            raise RuntimeError("no more")

    ours, plain = Toy(), run_updates([], 4)
    with pytest.raises(RuntimeError, match="no more"):
        run_updates([ValueNormalization(), Spy("on_update_end", fail)], 4, module=ours)
    torch.testing.assert_close(ours.critic.weight, plain.critic.weight, rtol=1e-4, atol=1e-4)


def test_values_behind_other_tokens_are_in_score_units():
    """Four returns of mean 10 and deviation 2: a prediction of 3 means 16."""
    trick = ValueNormalization()
    trick.load_state_dict({"moments": (4.0, 10.0, 16.0), "is_restored": False})
    mask = torch.tensor([[True, True]])
    experience = SimpleNamespace(values=torch.tensor([[1.0, -1.0]]), response_mask=mask)
    counts = torch.tensor([[[True, False], [True, True]]])
    experience.extras = {"action_values": torch.full((1, 2, 2), 3.0), "action_mask": counts}
    trick.on_rollout_end(None, None, experience)  # type: ignore[arg-type]
    assert experience.values.tolist() == [[12.0, 8.0]]
    assert experience.extras["action_values"].tolist() == [[[16.0, 0.0], [16.0, 16.0]]]


def test_an_update_that_is_not_finite_leaves_no_trace():
    trick, module = ValueNormalization(), Toy()
    experience = module.rollout(0)
    experience.returns = torch.where(experience.response_mask, torch.nan, 0.0)
    before = module.critic.weight.clone()
    trick.on_advantages(None, module, experience)
    assert trick.state_dict() == ValueNormalization().state_dict()
    assert torch.equal(module.critic.weight, before)


def test_the_critics_losses_compare_in_deviations_and_masked_tokens_are_zero():
    seen = Spy("on_critic_loss", lambda module, micro, losses: micro)
    module = run_updates([ValueNormalization(), seen], episodes=4)
    mean, std = weighted_moments([returns_of(module.experiences[0])])
    experience, start = module.experiences[0], 0
    for micro in seen.seen:
        rows = slice(start, start := start + len(micro))
        mask = experience.response_mask[rows]
        for name in ("values", "returns"):
            expected = ((getattr(experience, name)[rows] - mean) / std).masked_fill(~mask, 0.0)
            torch.testing.assert_close(getattr(micro, name), expected, rtol=1e-5, atol=1e-5)
    assert start == 4
    assert not experience.values[~experience.response_mask].any()


@pytest.mark.parametrize(("score", "std"), [(5.0, 0.05), (0.0, 1e-4)])
def test_returns_that_are_all_alike_do_not_explode(score: float, std: float):
    """The deviation is taken to be a hundredth of the mean, 0.05, so that a first error of 5 is 100 deviations."""
    ours, plain = (
        run_updates(tricks, 4, episodes=4, kl_coef=0.0, scores=lambda update: [score] * 4)
        for tricks in (ValueNormalization(), [])
    )
    torch.testing.assert_close(std * ours.critics[-1], plain.critics[-1], rtol=1e-3, atol=1e-4)


def test_an_update_without_tokens_leaves_the_statistics():
    """As where every response ran into the limit and was masked out."""
    trick, module = ValueNormalization(), Toy()
    experience = module.rollout(0)
    experience.returns = torch.ones_like(experience.kl)
    experience.response_mask = torch.zeros_like(experience.response_mask)
    before = module.critic.weight.clone()
    trick.on_advantages(None, module, experience)
    assert trick.state_dict() == ValueNormalization().state_dict()
    assert torch.equal(module.critic.weight, before)


# On the real module


def large(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """Scores around 500."""
    return [500.0 + 100.0 * score for score in count_good(prompts, responses)]


class Predictions(L.Callback):
    """What the critic predicts for the rows of each update, in its own units."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_advantages(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        with torch.no_grad():
            self.seen.append(values_of(pl_module, experience)[experience.response_mask])


def train(folder: Path, lm: Path, *callbacks: L.Callback) -> tuple[list[Any], list[dict[str, float]]]:
    _, recorder, trainer = record(
        folder, lm, *callbacks, max_steps=3, rewards=large, minibatch_size=7, ppo_epochs=1, max_grad_norm=1.0
    )
    return recorder.experiences, logged(trainer)


def test_predictions_in_score_units_stay_put_when_the_statistics_move(tmp_path, lm):
    """Before and after the head is rescaled, in every update; the units are the test's own sums."""
    before, after = Predictions(), Predictions()
    experiences, _ = train(tmp_path, lm, before, ValueNormalization(), after)
    units = [(0.0, 1.0)]
    for update in range(3):
        units.append(weighted_moments([returns_of(experience) for experience in experiences[: update + 1]]))
        (mean, std), (new_mean, new_std) = units[-2:]
        scores = before.seen[update] * std + mean
        torch.testing.assert_close(after.seen[update] * new_std + new_mean, scores, rtol=1e-5, atol=1e-5 * new_std)
        values = experiences[update].values[experiences[update].response_mask]
        torch.testing.assert_close(values, scores, rtol=1e-5, atol=1e-5 * new_std)
    assert after.seen[2].std() > 1e-4  # the head has left 0


def test_logged_values_are_in_score_units_and_the_loss_in_deviations(tmp_path, lm):
    """A critic that starts at 0 has a first loss of mean(R^2) / 2, over the returns' variance with the trick."""
    (first, second, _), rows = train(tmp_path, lm, ValueNormalization())
    _, plain = train(tmp_path, lm)
    returns = returns_of(first)
    mean, std = weighted_moments([returns])
    squares = sum(x**2 for x in returns) / len(returns)
    assert plain[0]["value/loss"] == pytest.approx(squares / 2, rel=1e-4)
    assert rows[0]["value/loss"] == pytest.approx(squares / 2 / std**2, rel=1e-4)
    assert rows[0]["value/return_mean"] == pytest.approx(mean, rel=1e-5)
    assert rows[0]["value/mean"] == pytest.approx(0.0, abs=1e-4)
    assert rows[1]["value/mean"] == pytest.approx(second.values[second.response_mask].mean().item(), rel=1e-4)
    for row, experience in zip(rows, (first, second), strict=False):
        r, v = (x.double()[experience.response_mask] for x in (experience.returns, experience.values))
        assert row["value/explained_variance"] == pytest.approx(1 - ((r - v).var() / r.var()).item(), abs=1e-4)
