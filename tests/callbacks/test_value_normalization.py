"""ValueNormalization: what the critic means in score units is what a plain critic means, at any scale."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo.callbacks import ValueClipping, ValueNormalization
from tests.helpers.forwards import values_of
from tests.helpers.toy import Rows, Spy, Toy, run_updates
from tests.helpers.toys import count_good, logged, make_data, make_module, make_trainer
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


class TwoUpdates(Toy):
    """Makes two updates of each rollout."""

    def learn(self, experience: Rows) -> None:
        super().learn(experience)
        super().learn(experience)


@pytest.mark.parametrize("toy", [Toy, TwoUpdates])
@pytest.mark.parametrize("decay", [None, 0.5])
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
    assert std * ours.critic.bias.item() + mean == pytest.approx(plain.critic.bias.item(), rel=1e-4)
    assert std > 2.0


def test_statistics_of_zero_and_one_change_nothing():
    """Returns to go are each row's score at all of its 1 to 4 tokens: sum 1 + 2 + 3 - 6 = 0, squares 15 over 10."""
    scores = [score / math.sqrt(1.5) for score in (1.0, 1.0, 1.0, -1.5)]
    runs = [
        run_updates(tricks, 3, episodes=4, minibatch_size=2, kl_coef=0.0, scores=lambda update: scores)
        for tricks in (ValueNormalization(), [])
    ]
    for ours, plain in zip(runs[0].critics, runs[1].critics, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


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


def test_clipped_values_are_clipped_in_deviations():
    """A range of 0.01 deviations clips as one of 0.01 s does a plain critic."""
    ours = run_updates([ValueNormalization(), ValueClipping(0.01)])
    _, std = weighted_moments([returns_of(ours.experiences[0])])
    plain = run_updates(ValueClipping(0.01 * std))
    torch.testing.assert_close(std * ours.critics[0], plain.critics[0], rtol=1e-4, atol=1e-5)
    fractions = [[step["value/clip_fraction"] for step in module.steps] for module in (ours, plain)]
    assert fractions[0] == fractions[1]
    assert fractions[0][0] == 0.0  # at the first step the values are the rollout's, head and all
    assert fractions[0][1] > 0.1


def test_returns_that_are_all_alike_do_not_explode():
    """The deviation is taken to be a hundredth of the mean: 0.05; a first error of 5 is 100 deviations."""
    module = run_updates(ValueNormalization(), 4, episodes=4, kl_coef=0.0, scores=lambda update: [5.0] * 4)
    plain = run_updates([], 4, episodes=4, kl_coef=0.0, scores=lambda update: [5.0] * 4)
    torch.testing.assert_close(0.05 * module.critics[-1], plain.critics[-1], rtol=1e-3, atol=1e-4)
    zeros = run_updates(ValueNormalization(), 4, episodes=4, kl_coef=0.0, scores=lambda update: [0.0] * 4)
    plain = run_updates([], 4, episodes=4, kl_coef=0.0, scores=lambda update: [0.0] * 4)
    torch.testing.assert_close(1e-4 * zeros.critics[-1], plain.critics[-1], rtol=1e-3, atol=1e-4)


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


def test_resumed_statistics_go_on(tmp_path: Path):
    whole = run_updates(ValueNormalization(), 4)
    run_updates(ValueNormalization(), 2, save=tmp_path / "last.ckpt")
    trick = ValueNormalization()
    rest = run_updates(trick, 4, resume=tmp_path / "last.ckpt")
    torch.testing.assert_close(rest.critics, whole.critics[2:], rtol=0, atol=0)
    weight, mean, m2 = trick.state_dict()["moments"]
    expected = weighted_moments([returns_of(experience) for experience in whole.experiences])
    assert (weight, mean, math.sqrt(m2 / weight)) == pytest.approx((4 * 20, *expected), rel=1e-6)


def test_a_critic_whose_head_is_out_of_reach_is_refused_before_the_first_rollout():
    module = Toy()
    module.critic = torch.nn.Linear(3, 1)
    with pytest.raises(TypeError, match=r"ValueNormalization needs rescale_head .*, which Linear lacks"):
        run_updates(ValueNormalization(), module=module)
    assert module.experiences == []


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


class Experiences(L.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_update_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        self.seen.append(experience)


def train(folder: Path, lm: Path, *callbacks: L.Callback, **overrides: Any) -> tuple[Any, list[dict[str, float]]]:
    settings = {"rewards": large, "minibatch_size": 7, "ppo_epochs": 1, "max_grad_norm": 1.0, **overrides}
    module, experiences = make_module(lm, **settings), Experiences()
    trainer = make_trainer(folder, callbacks=[*callbacks, experiences], max_steps=3)
    trainer.fit(module, make_data(folder))
    return experiences.seen, logged(trainer)


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


def test_the_same_rate_learns_returns_of_any_scale(tmp_path, lm):
    """With clipped gradients a step is bounded in deviations, so a hundred times the scores, a hundred times the step.

    The plain critic's step, of norm 0.1, stays where it was.
    """

    def moved(*callbacks: L.Callback, scale: float) -> float:
        def rewards(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
            return [scale * (1.0 + score) for score in count_good(prompts, responses)]

        folder = tmp_path / f"{len(callbacks)}-{scale}"
        folder.mkdir()
        (_, second, _), _ = train(folder, lm, *callbacks, rewards=rewards, kl_coef=0.0)
        return second.values[second.response_mask].mean().item()

    assert moved(ValueNormalization(), scale=100.0) == pytest.approx(
        100.0 * moved(ValueNormalization(), scale=1.0), rel=1e-3
    )
    assert moved(scale=100.0) < 1.1 * moved(scale=1.0)


def test_scores_that_are_all_alike_on_the_real_module(tmp_path, lm):
    """The critic's values go up towards the 5 that every response gets."""
    _, rows = train(tmp_path, lm, ValueNormalization(), rewards=lambda responses: [5.0 for _ in responses])
    assert 0.0 == rows[0]["value/mean"] < rows[1]["value/mean"] < rows[2]["value/mean"] < 5.0
