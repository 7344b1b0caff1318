"""The contract on LitPPO itself: what callbacks set is in force, whatever they keep, and without a critic."""

from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo import LitPPO
from tests.helpers.oracle import Oracle
from tests.helpers.recorder import record, rows_of
from tests.helpers.spies import Spy
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import count_good, logged, make_data, make_module, make_trainer


def test_attributes_that_a_callback_sets_are_in_force(tmp_path, lm):
    """One update of 7 prompts x 2 samples, one pass of 3 minibatches, all by attributes set at its start."""

    class Set(L.Callback):
        def on_rollout_start(self, trainer: Any, pl_module: Any, prompts: Any) -> None:
            pl_module.samples_per_prompt, pl_module.ppo_epochs = 2, 1
            pl_module.kl_coef, pl_module.kl_estimator, pl_module.clip_range = 0.7, "k3", [1e-6, 2e-6]

    _, recorder, trainer = record(tmp_path, lm, Set())
    first, second = recorder.experiences
    assert (len(first), len(second)) == (14, 10)
    assert [len(rows) for rows in recorder.minibatches] == [5, 5, 4, 5, 5]
    log_ratio = second.logprobs - second.ref_logprobs
    expected = (torch.exp(-log_ratio) - 1 + log_ratio) * second.response_mask
    torch.testing.assert_close(second.kl, expected, rtol=1e-4, atol=1e-6)
    last = second.response_mask.sum(1) - 1
    rewards = -0.7 * second.kl
    rewards[torch.arange(10), last] += second.scores
    torch.testing.assert_close(second.rewards, rewards, rtol=1e-4, atol=1e-6)
    assert recorder.metrics[1]["clip_fraction"] > 0.9
    assert logged(trainer)[1]["objective/kl_coef"] == pytest.approx(0.7)


def test_rows_that_a_callback_keeps_are_all_that_is_trained_on(tmp_path, lm):
    keep = Spy("on_rollout_end", lambda module, experience: experience.keep([4, 1, 1]))
    _, recorder, _ = record(tmp_path, lm, keep, max_steps=1)
    assert len(recorder.experiences[0]) == 3
    assert [len(rows) for rows in recorder.minibatches] == [3, 3]  # fewer than minibatch_size make one
    drop = Spy("on_rollout_end", lambda module, experience: experience.keep([]))
    with pytest.raises(ValueError, match=r"^Spy.on_rollout_end keeps no response"):
        record(tmp_path, lm, drop)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_a_response_masked_out_as_a_whole_trains_nothing(tmp_path, lm, reduction):
    def mask_out(module: Any, experience: Any) -> None:
        experience.response_mask = experience.response_mask & (torch.arange(len(experience)) > 0)[:, None]

    hook = Spy("on_rollout_end", mask_out)
    module, _, trainer = record(tmp_path, lm, hook, loss_reduction=reduction, micro_batch_size=1, max_steps=1)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert trainer.global_step == 1


def halve(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


@pytest.mark.parametrize("lifted", ["on_rollout_start", "on_update_end"])
def test_the_critic_learns_on_schedule_while_the_actor_rests(tmp_path, lm, lifted):
    """Two frozen updates, whichever hook lifts it: the actor's schedule waits, the critic's goes on."""

    def lift(module: Any, *arguments: Any) -> None:
        module.actor_frozen = module.trainer.global_step + (lifted == "on_update_end") < 2

    hooks = Spy(lifted, lift), Spy("on_train_start", lambda module: setattr(module, "actor_frozen", True))
    _, _, trainer = record(tmp_path, lm, *hooks, actor_scheduler=halve, critic_scheduler=halve, max_steps=4)
    rows = logged(trainer)
    assert [row["policy/lr"] for row in rows] == pytest.approx([0.1, 0.1, 0.1, 0.05])
    assert [row["value/lr"] for row in rows] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert ["policy/loss" in row for row in rows] == [False, False, True, True]


def test_an_actor_that_is_frozen_within_an_update_rests_from_the_next_one_on(tmp_path, lm):
    """Read at each update: its other steps, and its schedule's, are taken."""
    freeze = Spy("on_minibatch_start", lambda module, minibatch: setattr(module, "actor_frozen", True))
    _, recorder, trainer = record(tmp_path, lm, freeze, actor_scheduler=halve, ppo_epochs=1, max_steps=2)
    assert ["policy_loss" in step for step in recorder.metrics] == [True, True, False]  # 7 rows, then 5, by fives
    assert [row["policy/lr"] for row in logged(trainer)] == pytest.approx([0.1, 0.05])


def test_returns_are_needed_where_there_is_a_critic(tmp_path, lm):
    class NoReturns:
        needs_values = True

        def __call__(self, experience: Any) -> tuple[torch.Tensor, None]:
            return experience.rewards, None

    with pytest.raises(ValueError, match="gives no returns for the critic to learn"):
        record(tmp_path, lm, advantages=NoReturns())


def test_kl_is_to_the_reference_that_was_given(tmp_path, lm):
    """By the oracle, with a reference that is not the actor."""
    other = make_causal_lm(tmp_path / "other", seed=5, scale=4.0)
    _, recorder, _ = record(tmp_path, lm, reference=str(other), max_steps=1)
    oracle, reference = (Oracle(path, temperature=1.0) for path in (lm, other))
    experience = recorder.experiences[0]
    for i, (prompt, response) in enumerate(rows_of(experience)):
        kl = oracle.logprobs(oracle.actor, prompt, response) - reference.logprobs(reference.actor, prompt, response)
        torch.testing.assert_close(experience.kl[i, : len(response)].double(), kl, rtol=1e-4, atol=1e-5)


def test_an_overridden_training_step_keeps_the_clock(tmp_path, lm, monkeypatch):
    """Seconds are of one update, not of all so far."""

    class Own(LitPPO):
        def training_step(self, prompts: Any, batch_idx: int) -> None:
            self.update(self.collect(prompts))
            assert self.progress.seconds == {}

    module = make_module(lm)
    module.__class__ = Own
    make_trainer(tmp_path).fit(module, make_data(tmp_path))


def test_steps_skipped_in_a_row_are_counted_over_a_resume(tmp_path, lm):
    module = make_module(lm, max_skipped_steps=5)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    module.optimization.skipped_steps = 3
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = make_module(lm, max_skipped_steps=5)
    again.on_load_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=True))
    assert (again.optimization.skipped_steps, again.rollouts) == (3, 1)


def test_hyperparameters_with_lists_load_from_a_checkpoint(tmp_path, lm):
    module = make_module(lm, generation={"max_new_tokens": 6, "eos_token_id": [1, 2]})
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitPPO.load_from_checkpoint(tmp_path / "a.ckpt", rewards=count_good, weights_only=False)
    assert loaded.hparams["generation"] == {"max_new_tokens": 6, "eos_token_id": [1, 2]}
    assert all(v.equal(loaded.state_dict()[k]) for k, v in module.state_dict().items())
