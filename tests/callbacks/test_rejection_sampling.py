"""RejectionSampling: which rows win, what is learnt of them, and what is left alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_ppo.callbacks import CriticWarmup, EntropyBonus, RejectionSampling, ValueClipping
from tests.helpers.recorder import record, rows_of
from tests.helpers.spies import Spy
from tests.helpers.toy import Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged
from tests.helpers.trick import Trick

TRICK = {
    "RejectionSampling": Trick(
        acts={"k": 2, "every": 2},
        refuses={"k": 1, "every": 0},
        knobs={"k": ({}, {"k": 3}), "every": ({}, {"every": 1})},
    )
}


def rows_a_rollout(*callbacks: L.Callback, updates: int, **toy: Any) -> list[int]:
    """Responses sampled in each update of the toy, to eight prompts."""
    sampled = Spy("on_rollout_end", lambda module, experience: len(experience))
    run_updates([sampled, *callbacks], updates, **toy)
    return sampled.seen


# ---- on the toy


def test_the_best_of_each_prompt_is_imitated():
    """Scores (1, 3) and (2, 2) in responses of 1 to 4 tokens: the second and third row win, 2 + 3 tokens.

    The winners' mean is 2.5, that of all four 2.
    """
    module = run_updates(RejectionSampling(2, every=1), episodes=2, scores=lambda update: [1.0, 3.0, 2.0, 2.0])
    (experience,) = module.experiences
    assert experience.response_mask.sum(1).tolist() == [2, 3]
    assert experience.scores.tolist() == [3.0, 2.0]
    start = Toy()
    logits = torch.cat([start.actor(experience.features[0, :2]), start.actor(experience.features[1, :3])])
    actions = torch.cat([experience.response_ids[0, :2], experience.response_ids[1, :3]])
    loss = torch.nn.functional.cross_entropy(logits, actions)  # the mean over 5 tokens
    (gradient,) = torch.autograd.grad(loss, start.actor.weight)
    assert module.losses == [{"sft": pytest.approx(loss.item(), rel=1e-5)}]
    torch.testing.assert_close(module.actors[0], start.actor.weight - 0.05 * gradient, rtol=1e-5, atol=1e-6)
    assert module.trainer.callback_metrics["rejection/score_gain"].item() == pytest.approx(0.5)


def test_scores_are_those_that_callbacks_before_it_have_left():
    def turn(module: Toy, experience: Any) -> None:
        experience.scores = -experience.scores

    for callbacks, winners in (
        ([Spy("on_scores", turn), RejectionSampling(2, every=1)], [-1.0, -2.0]),
        ([RejectionSampling(2, every=1), Spy("on_scores", turn)], [-3.0, -2.0]),
    ):
        module = run_updates(callbacks, episodes=2, scores=lambda update: [1.0, 3.0, 2.0, 2.0])
        assert module.experiences[0].scores.tolist() == winners


@pytest.mark.parametrize(("every", "rows"), [(1, [24] * 3), (2, [8, 24] * 2), (3, [8, 8, 24, 8, 8])])
def test_every_so_many_updates(every: int, rows: list[int]):
    assert rows_a_rollout(RejectionSampling(3, every), updates=len(rows)) == rows


def test_the_other_updates_are_plain_ppo():
    """Also the one after: the module's own number of samples is back."""
    module = Toy()
    module.samples_per_prompt = 3
    own = Spy("on_scores", lambda module, experience: module.samples_per_prompt)
    assert rows_a_rollout(RejectionSampling(2), own, updates=3, module=module) == [24, 16, 24]
    assert own.seen == [3, 3, 3]
    plain, mixed = run_updates([], 1), run_updates(RejectionSampling(2), 3)
    assert mixed.actors[0].equal(plain.actors[0])
    assert ["policy" in losses for losses in mixed.losses[::2]] == [True, False, True]


def test_the_critic_does_not_step_even_if_a_value_loss_is_put_back_behind_it():
    module = run_updates([RejectionSampling(2), ValueClipping(0.2)], 3)
    assert not module.critics[0].equal(Toy().critic.weight)
    assert module.critics[1].equal(module.critics[0])
    assert not module.critics[2].equal(module.critics[1])


def test_a_policy_loss_made_anew_behind_it_has_no_gradient():
    def remake(module: Toy, minibatch: Any, losses: dict[str, Tensor]) -> None:
        ratio = torch.exp(minibatch.new_logprobs - minibatch.logprobs)
        losses["policy"] = minibatch.mean(-ratio * minibatch.advantages)

    alone = run_updates(RejectionSampling(2, every=1), 2)
    beside = run_updates([RejectionSampling(2, every=1), Spy("on_actor_loss", remake)], 2)
    torch.testing.assert_close(beside.actors, alone.actors, rtol=1e-6, atol=1e-7)
    assert all(losses["policy"] == 0.0 for losses in beside.losses)


def test_other_terms_count_behind_it_and_not_before():
    alone, before, behind = (
        run_updates(callbacks)
        for callbacks in (
            [RejectionSampling(2, every=1)],
            [EntropyBonus(0.5), RejectionSampling(2, every=1)],
            [RejectionSampling(2, every=1), EntropyBonus(0.5)],
        )
    )
    assert before.actors[0].equal(alone.actors[0])
    assert [losses.keys() for losses in behind.losses] == [{"sft", "entropy"}] * 2
    assert not behind.actors[0].equal(alone.actors[0])


@pytest.mark.parametrize("turn", [1, -1])
def test_rests_while_the_actor_is_frozen_also_after_a_resume(turn: int, tmp_path: Path):
    """The critic's warm-up goes on meanwhile, on all that is sampled; wherever the two stand in the list."""

    def tricks() -> list[L.Callback]:
        return [CriticWarmup(2), RejectionSampling(2, every=1)][::turn]

    assert rows_a_rollout(*tricks(), updates=4) == [8, 8, 16, 16]
    run_updates(tricks(), 1, save=tmp_path / "last.ckpt")
    assert rows_a_rollout(*tricks(), updates=3, resume=tmp_path / "last.ckpt") == [8, 16]


def test_a_module_that_never_freezes_its_actor_need_not_say_so():
    module: Any = SimpleNamespace(samples_per_prompt=1)
    RejectionSampling(2, every=1).on_rollout_start(None, module, [])
    assert module.samples_per_prompt == 2


def test_an_update_goes_by_its_own_rollout_whatever_was_sampled_since():
    """Two rollouts, then their updates: the first is plain, the second is of the winners."""
    trick, module = RejectionSampling(2, every=2), Toy(episodes=2, scores=lambda update: [1.0, 3.0, 2.0, 2.0])
    module.log = lambda *args: None
    rollouts = []
    for update, n in enumerate((2, 4)):
        trick.on_rollout_start(None, module, [])
        rollouts.append(module.rollout(update))
        assert len(rollouts[-1]) == n
        trick.on_rollout_end(None, module, rollouts[-1])
    for experience, losses in zip(rollouts, ({"policy"}, {"sft"}), strict=True):
        experience.scores = experience.raw_scores = torch.arange(float(len(experience)))
        trick.on_scores(None, module, experience)
        assert len(experience) == 2
        experience.tokens, experience.new_logprobs = 1, experience.logprobs
        experience.advantages = experience.logprobs
        found = {"policy": torch.tensor(1.0)}
        trick.on_actor_loss(None, module, experience, found)
        assert found.keys() == losses


def test_a_rollout_that_fails_leaves_the_modules_number_of_samples():
    def fail(module: Toy, prompts: Any) -> None:
        raise RuntimeError("no more")

    module = Toy()
    with pytest.raises(RuntimeError, match="no more"):
        run_updates([RejectionSampling(2, every=1), Spy("on_rollout_start", fail)], module=module)
    assert module.samples_per_prompt == 1


# ---- on LitPPO


class Before(L.Callback):
    """Keeps responses, groups and scores of all that was sampled."""

    def on_scores(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        self.groups, self.scores = experience.group.tolist(), experience.scores.tolist()
        self.rows = rows_of(experience)


def test_litppos_step_is_the_stock_models_on_the_winners(tmp_path, lm):
    """One optimizer step of plain SGD at 0.1, on log-probs of temperature 0.7."""
    before = Before()
    module, recorder, trainer = record(
        tmp_path, lm, before, RejectionSampling(3, every=1), ppo_epochs=1, minibatch_size=7, temperature=0.7,
        max_steps=1,
    )  # fmt: skip
    assert len(before.rows) == 21
    best: dict[int, int] = {}  # row of each group
    for row, (group, score) in enumerate(zip(before.groups, before.scores, strict=True)):
        if group not in best or score > before.scores[best[group]]:
            best[group] = row
    winners = [before.rows[row] for row in best.values()]
    assert rows_of(recorder.experiences[0]) == winners
    stock = AutoModelForCausalLM.from_pretrained(lm).eval()
    logprobs = []
    for prompt, response in winners:
        table = torch.log_softmax(stock(input_ids=torch.tensor([prompt + response])).logits[0] / 0.7, -1)
        logprobs += [table[len(prompt) + t - 1, token] for t, token in enumerate(response)]
    loss = -torch.stack(logprobs).mean()
    grads = torch.autograd.grad(loss, stock.parameters())
    ours = dict(module.actor.model.named_parameters())
    for (name, parameter), grad in zip(stock.named_parameters(), grads, strict=True):
        torch.testing.assert_close(ours[name], parameter - 0.1 * grad, rtol=1e-4, atol=1e-6)
    (row,) = logged(trainer)
    mean, gained = sum(before.scores) / 21, sum(before.scores[i] for i in best.values()) / 7
    assert gained > mean
    assert row["rejection/score_gain"] == pytest.approx(gained - mean, rel=1e-5)
    assert row["objective/score"] == pytest.approx(gained, rel=1e-5)
    assert row["policy/sft_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["policy/ratio"] == pytest.approx(1.0, abs=1e-5)


def test_metrics_are_of_what_ran_and_the_critic_waits(tmp_path, lm):
    """Seven prompts x 2 samples fill a minibatch of 14; the five winners of the second update make one of their own."""
    critics = Spy("on_update_end", lambda module, _: {k: v.clone() for k, v in module.critic.state_dict().items()})

    def halve(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    module, recorder, trainer = record(
        tmp_path, lm, RejectionSampling(3), critics, samples_per_prompt=2, minibatch_size=14, ppo_epochs=1,
        critic_scheduler=halve, critic_optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), max_steps=3,
    )  # fmt: skip
    assert [len(rows) for rows in recorder.minibatches] == [14, 5, 14]
    assert module.samples_per_prompt == 2
    first, second, third = logged(trainer)
    assert [row["value/lr"] for row in (first, second, third)] == pytest.approx([0.01, 0.005, 0.0025])
    assert all(value.equal(critics.seen[0][name]) for name, value in critics.seen[1].items())
    assert any(not value.equal(critics.seen[1][name]) for name, value in critics.seen[2].items())
    ppos, ours = {"policy/loss", "value/loss", "value/grad_norm"}, {"policy/sft_loss", "rejection/score_gain"}
    for row, present, absent in ((first, ppos, ours), (second, ours, ppos), (third, ppos, ours)):
        assert present <= row.keys()
        assert not absent & row.keys()
        assert {"policy/approx_kl", "policy/grad_norm", "policy/entropy"} <= row.keys()
