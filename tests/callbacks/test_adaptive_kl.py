"""AdaptiveKL against coefficients worked by hand."""

from pathlib import Path
from typing import Any

import pytest

from lit_ppo.callbacks import AdaptiveKL, CriticWarmup
from tests.helpers.toy import Spy, Toy, run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "AdaptiveKL": Trick(
        acts={"target": 0.9, "horizon": 10, "final_target": 1.2, "decay_updates": 4},
        refuses={"target": 0.0, "horizon": -1, "per": "episode", "final_target": 0.0, "decay_updates": 0},
        knobs={
            "target": ({}, {"target": 1.0}),
            "horizon": ({}, {"horizon": 20}),
            "per": ({}, {"per": "token"}),
            "final_target": ({}, {"final_target": 1.0}),
            "decay_updates": ({}, {"decay_updates": 2}),
        },
        needs="reference",
    )
}


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (12.0, 1.00512),  # an error of 1, clipped to 0.2; 0.2 * 256 / 10000 = 0.00512
        (0.0, 0.99488),  # -1, clipped to -0.2
        (6.6, 1.00256),  # 0.1, inside the clip
        (5.4, 0.99744),
        (6.0, 1.0),
    ],
)
def test_coefficient_follows_the_published_controller(kl: float, factor: float):
    trick = AdaptiveKL(target=6.0, horizon=10_000)
    module = run_updates(trick, 2, kl_per_response=kl, episodes=256, minibatch_size=256, kl_coef=0.15)
    assert module.kl_coefs == pytest.approx([0.15 * factor, 0.15 * factor**2], rel=1e-6)


def test_kl_is_summed_over_each_response_not_averaged_over_tokens():
    """Lengths 1 to 4 at 3 nats each: a response has 3 nats, a token of them 12 / 10."""
    module = run_updates(AdaptiveKL(target=3.0, horizon=8), episodes=8, kl_per_response=3.0, kl_coef=0.1)
    assert module.kl_coefs == pytest.approx([0.1], rel=1e-6)


def test_kl_per_token_is_the_mean_over_all_response_tokens():
    """Lengths 1 to 4 twice, at 3 nats each: 24 nats over 20 tokens are 1.2, 0.2 over a target of 1; times 8 / 8."""
    module = run_updates(AdaptiveKL(1.0, horizon=8, per="token"), episodes=8, kl_per_response=3.0, kl_coef=0.1)
    assert module.kl_coefs == pytest.approx([0.1 * 1.2], rel=1e-6)
    module = run_updates(AdaptiveKL(1.25, horizon=8, per="token"), episodes=8, kl_per_response=3.0, kl_coef=0.1)
    assert module.kl_coefs == pytest.approx([0.1 * 0.96], rel=1e-6)


def test_a_moving_target_is_a_straight_line_and_then_its_end():
    """KL 1, targets 1, 0.95, 0.9, 0.9: errors 0, 1/19, 1/9, 1/9 in proportion; 8 episodes of a horizon of 8."""
    trick = AdaptiveKL(target=1.0, horizon=8, final_target=0.9, decay_updates=2)
    module = run_updates(trick, 4, episodes=8, kl_per_response=1.0, kl_coef=0.1)
    factors = [1.0, 20 / 19, 20 / 19 * 10 / 9, 20 / 19 * (10 / 9) ** 2]
    assert module.kl_coefs == pytest.approx([0.1 * factor for factor in factors], rel=1e-6)


def test_a_moving_target_waits_while_the_actor_is_frozen():
    """The first update after the warm-up still aims at 1, the second at 0.9."""
    tricks = [CriticWarmup(2), AdaptiveKL(target=1.0, horizon=8, final_target=0.9, decay_updates=1)]
    module = run_updates(tricks, 4, episodes=8, kl_per_response=1.0, kl_coef=0.1)
    assert module.kl_coefs == pytest.approx([0.1, 0.1, 0.1, 0.1 * 10 / 9], rel=1e-6)


@pytest.mark.parametrize("arguments", [{"final_target": 3.0}, {"decay_updates": 5}])
def test_a_final_target_needs_its_updates_and_the_other_way_round(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match=r"AdaptiveKL\(final_target=.*, decay_updates=.*\): give all or none of"):
        AdaptiveKL(**arguments)


@pytest.mark.parametrize(
    ("arguments", "factors", "targets"),
    [
        # KL 0 in the first update: an error of -1, clipped; 0.2 * 7 / 70 = 0.02; then far over the target
        ({"target": 1e-4, "horizon": 70}, [1.0, 0.98], None),
        ({"target": 1e-4, "horizon": 70, "final_target": 1e3, "decay_updates": 1}, [1.0, 0.98], [1e-4, 1e3, 1e3]),
    ],
)
def test_on_litppo_the_logged_coefficient_and_target_move(
    tmp_path: Path, tiny_lm: Path, arguments: dict[str, Any], factors: list[float], targets: list[float] | None
):
    """12 prompts in batches of 7 and 5: the third coefficient has moved by 0.2 * 5 / 70, up or down by the target."""
    trainer = make_trainer(tmp_path, callbacks=[AdaptiveKL(**arguments)], max_steps=3)
    trainer.fit(make_module(tiny_lm, kl_estimator="k3", kl_coef=0.5), make_data(tmp_path))
    rows = logged(trainer)
    factors = [*factors, 0.98 * (1 + 1 / 70 if targets is None else 1 - 1 / 70)]
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.5 * factor for factor in factors])
    assert [row.get("objective/kl_target") for row in rows] == (pytest.approx(targets) if targets else [None] * 3)


def test_target_and_horizon_default_to_the_papers():
    module = run_updates(AdaptiveKL(), kl_per_response=6.6, episodes=256, minibatch_size=256, kl_coef=0.15)
    assert module.kl_coefs == pytest.approx([0.15 * 1.00256], rel=1e-6)


def test_the_next_update_is_penalised_with_the_new_coefficient():
    """One-token responses with scores of 0: the reward is -kl_coef * KL."""
    module = run_updates(
        AdaptiveKL(target=1.0, horizon=10), 2, episodes=1, scores=lambda update: [0.0], kl_per_response=5.0, kl_coef=0.1
    )
    rewards = [experience.rewards[0, 0].item() for experience in module.experiences]
    assert rewards == pytest.approx([-0.5, -0.5 * 1.02], rel=1e-6)


def test_resumed_run_starts_with_the_adapted_coefficient(tmp_path: Path):
    """The module was built with 0.1 again; the first resumed update must not see it."""
    before = run_updates(AdaptiveKL(0.5, 10), 2, save=tmp_path / "last.ckpt")
    at_rollout = Spy("on_rollout_start", lambda module, prompts: module.kl_coef)
    run_updates([AdaptiveKL(0.5, 10), at_rollout], 3, resume=tmp_path / "last.ckpt")
    assert at_rollout.seen == [before.kl_coefs[-1]]
    assert at_rollout.seen != [0.1]


def test_resume_before_the_first_update_keeps_the_modules_coefficient():
    trick = AdaptiveKL()
    trick.load_state_dict(AdaptiveKL().state_dict())
    module = Toy(kl_coef=0.3)
    trick.on_train_start(None, module)
    assert module.kl_coef == 0.3


@pytest.mark.parametrize("warmup_first", [True, False])
def test_rests_while_the_actor_is_frozen(warmup_first: bool):
    """KL 0 through the warm-up would otherwise drive the coefficient down before the actor ever moves."""
    tricks = [CriticWarmup(2), AdaptiveKL(target=1.0, horizon=16)]
    module = run_updates(tricks if warmup_first else tricks[::-1], 3, episodes=8, kl_per_response=0.0, kl_coef=0.1)
    assert module.kl_coefs == pytest.approx([0.1, 0.1, 0.1 * 0.9])


def test_coefficient_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"AdaptiveKL multiplies kl_coef, which has no effect on Toy\(kl_coef=0.0\)"):
        run_updates(AdaptiveKL(), kl_coef=0.0)


def test_module_without_a_coefficient_is_refused_before_the_first_rollout():
    module = Toy()
    del module.kl_coef
    with pytest.raises(TypeError, match="AdaptiveKL needs kl_coef on the module, which Toy lacks"):
        run_updates(AdaptiveKL(), module=module)
    assert module.experiences == []
