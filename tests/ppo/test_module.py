"""LitPPO against a slow oracle, and the invariances that make its numbers trustworthy."""

import itertools
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_ppo import LitPPO
from lit_ppo.advantages import GAE
from lit_ppo.callbacks.base import HOOKS
from lit_ppo.optim.schedules import WarmupCosine
from lit_ppo.ppo.metrics import peak_memory
from lit_ppo.rewards import RewardModel
from tests.helpers.oracle import Oracle
from tests.helpers.recorder import record, rows_of
from tests.helpers.tiny import make_causal_lm, make_reward_model
from tests.helpers.toys import count_good, logged, make_module, run


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request, tmp_path_factory):
    return make_causal_lm(tmp_path_factory.mktemp(request.param), request.param, scale=4.0)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return make_causal_lm(tmp_path_factory.mktemp("gpt2"), scale=4.0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "loss_reduction": "sequence_mean",
            "temperature": 0.7,
            "clip_range": 0.01,
            "kl_coef": 1.0,
            "advantages": GAE(gamma=0.9, lam=0.5),
            "generation": {"max_new_tokens": 6, "eos_token_id": [0, 1, 5, 9, 30, 33]},  # 0 pads
        },
        {"loss_reduction": 11, "clip_range": [0.004, 0.03], "kl_coef": 1.0},
    ],
    ids=["defaults", "sequence mean, tempered, tightly clipped, discounted, several stop ids", "constant, two clips"],
)
def test_two_updates_are_those_of_the_oracle(tmp_path, lm, settings):
    """Weights and metrics; two updates of two epochs, so that ratios, KL and values have left where they start."""
    module, recorder, _ = record(tmp_path, lm, **settings)
    estimator = settings.get("advantages", GAE())
    oracle = Oracle(
        lm, kl_coef=module.kl_coef, clip_range=module.clip_range, temperature=module.temperature, lr=0.1,
        reduction=module.loss_reduction, gamma=estimator.gamma, lam=estimator.lam,
    )  # fmt: skip
    steps = iter(zip(recorder.minibatches, recorder.metrics, strict=True))
    for experience in recorder.experiences:
        rows, scores = rows_of(experience), count_good([], experience.responses)
        seen = oracle.look(rows, scores)
        for i, row in enumerate(seen):
            mask = experience.response_mask[i]
            for name in ("kl", "rewards", "advantages", "returns"):
                expected = torch.as_tensor(row[name]).float()
                torch.testing.assert_close(getattr(experience, name)[i][mask], expected, rtol=1e-4, atol=1e-5)
        for _ in range(-(-len(rows) // module.minibatch_size) * module.ppo_epochs):
            chosen, metrics = next(steps)
            expected = oracle.step([rows[i] for i in chosen], [seen[i] for i in chosen])
            for name, value in expected.items():
                assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    ours, theirs = module.actor.model.state_dict(), oracle.actor.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name].float(), rtol=1e-4, atol=1e-5)
    ours, theirs = module.critic.backbone.state_dict(), oracle.backbone.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name].float(), rtol=1e-4, atol=1e-5)


def test_weights_and_samples_do_not_depend_on_the_micro_batches(tmp_path, gpt2):
    one, recorder, _ = record(tmp_path, gpt2, micro_batch_size=None)
    for split in ({"micro_batch_size": 1}, {"micro_batch_size": None, "micro_batch_tokens": 25}):
        parts, other, _ = record(tmp_path, gpt2, **split)
        assert [e.responses for e in recorder.experiences] == [e.responses for e in other.experiences]
        for name, value in one.state_dict().items():
            torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_the_number_of_steps_and_the_size_of_micro_batches(tmp_path, gpt2):
    """7, then 5 rows in minibatches of 5: two a pass, the smaller one kept, then one; 3 passes, 2 rows at a time."""
    sizes: list[int] = []

    class Count(L.Callback):
        def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
            sizes.append(len(minibatch))

    _, recorder, trainer = record(tmp_path, gpt2, Count(), micro_batch_size=2, ppo_epochs=3)
    assert [len(rows) for rows in recorder.minibatches] == [5, 2] * 3 + [5] * 3
    assert sizes == [2, 2, 1, 2] * 3 + [2, 2, 1] * 3
    assert trainer.global_step == 2


def test_hooks_fire_in_the_contracts_order(tmp_path, gpt2):
    seen: list[str] = []

    def note(name: str) -> Any:
        return lambda self, trainer, pl_module, *arguments: seen.append(name)

    spy = type("Spy", (L.Callback,), {name: note(name) for name in HOOKS})()
    record(tmp_path, gpt2, spy, ppo_epochs=1, minibatch_size=7, micro_batch_size=7, max_steps=1)
    assert seen == list(HOOKS)


def test_one_temperature_for_sampling_and_log_probs(tmp_path, gpt2):
    _, cold, _ = record(tmp_path, gpt2, temperature=0.1, max_steps=1)
    _, warm, _ = record(tmp_path, gpt2, temperature=1.0, max_steps=1)
    assert cold.experiences[0].responses != warm.experiences[0].responses
    assert cold.metrics[0]["entropy"] < 0.7 * warm.metrics[0]["entropy"]
    assert cold.metrics[0]["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_each_metric_is_logged_under_its_name(tmp_path, gpt2):
    """Means by hand, over rows and over optimizer steps; tests/ppo/test_metrics.py has the numbers of each."""
    _, recorder, trainer = record(tmp_path, gpt2, kl_coef=0.5, sampling_logprobs_tolerance=1e-4)
    experience, row = recorder.experiences[-1], logged(trainer)[-1]
    scores = count_good([], experience.responses)
    lengths = [len(response) for _, response in rows_of(experience)]
    kl = [float(k[:n].sum()) for k, n in zip(experience.kl, lengths, strict=True)]
    expected = {
        "objective/score": sum(scores) / len(scores),
        "objective/kl": sum(kl) / len(kl),
        "objective/kl_coef": 0.5,
        "objective/rlhf_reward": sum(s - 0.5 * k for s, k in zip(scores, kl, strict=True)) / len(kl),
        "response/length": sum(lengths) / len(lengths),
        "response/ended_fraction": sum(r[-1] == 1 for _, r in rows_of(experience)) / len(lengths),
        "value/clip_fraction": 0.0,
        "policy/lr": 0.1,
        "value/lr": 0.1,
        "optimizer/skipped_fraction": 0.0,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    last = recorder.metrics[-2:]  # 5 rows: one step in each of two passes
    names = {"policy_loss": "policy/loss", "approx_kl": "policy/approx_kl", "clip_fraction": "policy/clip_fraction",
             "ratio": "policy/ratio", "entropy": "policy/entropy", "actor_grad_norm": "policy/grad_norm",
             "value_loss": "value/loss", "critic_grad_norm": "value/grad_norm"}  # fmt: skip
    for name, tag in names.items():
        assert row[tag] == pytest.approx(sum(m[name] for m in last) / len(last), rel=1e-5), tag
    assert row["policy/ratio_min"] == min(m["ratio_min"] for m in last) < 0.99
    assert row["policy/ratio_max"] == max(m["ratio_max"] for m in last) > 1.01
    assert 0 <= row["rollout/sampling_logprob_difference"] < 1e-5
    assert 0.1 < row["memory/peak_gib"] < 100  # a process with torch in it has over 100 MiB


def test_each_updates_seconds_are_its_own(tmp_path, gpt2, monkeypatch):
    """By a clock that advances by one with each look: each of three phases takes 1 s, an update 3 s."""
    monkeypatch.setattr("lit_ppo.ppo.metrics.monotonic", itertools.count().__next__)
    monkeypatch.setattr("lit_ppo.ppo.metrics.resource", None)  # as where the system does not tell the memory
    _, recorder, trainer = record(tmp_path, gpt2)
    for experience, row in zip(recorder.experiences, logged(trainer), strict=True):
        assert [row[f"time/{phase}"] for phase in ("rollout", "score", "update")] == [1.0, 1.0, 1.0]
        assert [row[f"time/share/{phase}"] for phase in ("rollout", "score", "update")] == pytest.approx([1 / 3] * 3)
        assert not {"rollout/sampling_logprob_difference", "memory/peak_gib"} & row.keys()
        n_tokens = int(experience.response_mask.sum())
        assert row["throughput/tokens_per_second"] == pytest.approx(n_tokens / 3, rel=1e-6)


def test_the_peak_is_the_gpus_own_on_one_and_in_bytes_on_every_system(monkeypatch):
    """Linux counts in units of 1024 bytes, macOS in bytes."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 if device.index == 1 else 0)
    assert peak_memory(torch.device("cuda", 1)) == 5
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=3))
    monkeypatch.setattr("lit_ppo.ppo.metrics.resource", usage)
    for system, expected in (("linux", 3072), ("darwin", 3)):
        monkeypatch.setattr("lit_ppo.ppo.metrics.sys", SimpleNamespace(platform=system))
        assert peak_memory(torch.device("cpu")) == expected


def test_the_gradient_norm_is_clipped_and_logged_unclipped(tmp_path, gpt2):
    """Plain gradient descent moves by rate x norm: at most 0.1 x 0.01 a step, of each model by itself."""
    module, recorder, _ = record(tmp_path, gpt2, max_grad_norm=0.01, ppo_epochs=1, max_steps=1, minibatch_size=7)
    start = make_module(gpt2)
    start.configure_model()
    for name in ("actor", "critic"):
        before, after = (dict(getattr(m, name).named_parameters()) for m in (start, module))  # tied weights once
        moved = sum(((weight - before[key]) ** 2).sum() for key, weight in after.items())
        assert recorder.metrics[0][f"{name}_grad_norm"] > 0.02
        assert moved.sqrt().item() == pytest.approx(0.001, rel=1e-3)


def test_schedules_step_once_an_update_and_know_the_runs_length(tmp_path, gpt2):
    """A cosine from 0.1 over 2 updates is at its peak, then halfway; the critic's rate is quartered."""

    def quarter(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.25)

    _, rows = run(tmp_path, gpt2, actor_scheduler=WarmupCosine, critic_scheduler=quarter)
    assert [row["policy/lr"] for row in rows] == pytest.approx([0.1, 0.05])
    assert [row["value/lr"] for row in rows] == pytest.approx([0.1, 0.025])


def test_a_schedule_that_steps_on_results_is_refused(tmp_path, gpt2):
    with pytest.raises(
        ValueError, match=r"LitPPO\(critic_scheduler=ReduceLROnPlateau\): it steps on a validation result"
    ):
        run(tmp_path, gpt2, critic_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_a_model_that_comes_to_rest_has_no_gradient_any_more(tmp_path, gpt2):
    class Freeze(L.Callback):
        def on_rollout_start(self, trainer: Any, pl_module: Any, prompts: Any) -> None:
            pl_module.actor_frozen = trainer.global_step == 1

    _, _, trainer = record(tmp_path, gpt2, Freeze())
    assert ["policy/grad_norm" in row for row in logged(trainer)] == [True, False]


def test_emptied_losses_leave_the_model_alone(tmp_path, gpt2):
    class Empty(L.Callback):
        def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
            losses.clear()

    module, recorder, _ = record(
        tmp_path, gpt2, Empty(), actor_optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5)
    )
    assert "actor_grad_norm" not in recorder.metrics[0]
    start = make_module(gpt2)
    start.configure_model()
    assert all(v.equal(start.actor.state_dict()[k]) for k, v in module.actor.state_dict().items())


def test_a_critic_from_a_reward_model_of_several_labels_starts_at_the_rewards_own(tmp_path, gpt2):
    reward = make_reward_model(tmp_path / "reward", num_labels=3)
    module = make_module(gpt2, rewards=RewardModel(str(reward), label=2), critic="reward")
    module.configure_model()
    head = AutoModelForSequenceClassification.from_pretrained(reward).score
    assert module.critic.value_head.weight.tolist() == [head.weight[2].tolist()]


def test_a_run_without_reference_and_ratio_clipping(tmp_path, gpt2, monkeypatch):
    """Clipped gradients alone: the weights are those of a KL that weighs nothing, none of it loaded."""
    bare = {"clip_range": None, "max_grad_norm": 0.05}
    weighs_nothing, _, _ = record(tmp_path, gpt2, kl_coef=0.0, **bare)
    monkeypatch.setattr("lit_ppo.ppo.build.Reference", None)  # would not take a model
    module, recorder, trainer = record(tmp_path, gpt2, reference=None, kl_coef=0.5, **bare)
    assert module.reference is None
    assert all(value.equal(weighs_nothing.state_dict()[name]) for name, value in module.state_dict().items())
    assert recorder.experiences[-1].ref_logprobs is None
    assert recorder.experiences[-1].kl.eq(0).all()
    assert [row["objective/kl"] for row in logged(trainer)] == [0.0, 0.0]
    assert max(metrics["actor_grad_norm"] for metrics in recorder.metrics) > 0.05


def test_what_the_critic_starts_from_is_what_the_first_rollout_sees(tmp_path, gpt2):
    """A reward model's critic values a response so far by the stock model's score of it, a causal LM's by 0."""
    reward, other = make_reward_model(tmp_path / "reward"), make_causal_lm(tmp_path / "other", seed=7, scale=4.0)
    stock = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    stock.config.pad_token_id = None  # a sampled one is a token like any other
    rewards = RewardModel(str(reward))
    runs = {c: record(tmp_path, gpt2, critic=c, rewards=rewards) for c in ("actor", str(other), "reward", str(reward))}
    for critic in ("actor", str(other)):
        assert not runs[critic][1].experiences[0].values.any()
    for critic in ("reward", str(reward)):
        experience = runs[critic][1].experiences[0]
        for i, (prompt, response) in enumerate(rows_of(experience)):
            for t in range(len(response)):
                score = stock(input_ids=torch.tensor([prompt + response[:t]])).logits[0, 0].item()
                assert experience.values[i, t].item() == pytest.approx(score, rel=1e-4, abs=1e-6)
    first, second = (runs[critic][0].critic.state_dict() for critic in ("reward", str(reward)))
    assert all(value.equal(second[name]) for name, value in first.items())
    losses = [logged(trainer)[1]["value/loss"] for _, _, trainer in runs.values()]
    assert len({round(loss, 6) for loss in losses}) == 3


def test_frozen_weights_stay_out_of_the_state_dict(tmp_path, gpt2):
    module = make_module(gpt2, rewards=RewardModel(str(make_reward_model(tmp_path / "reward"))))
    module.configure_model()
    assert {name.split(".")[0] for name in module.state_dict()} == {"actor", "critic"}
    module.checkpoint_reference = True
    assert {name.split(".")[0] for name in module.state_dict()} == {"actor", "critic", "reference"}


def test_default_optimizers(gpt2):
    """Fused AdamW without weight decay, at a tenth of the rate of SFT, 5e-6, and at about twice that of SFT."""
    module = LitPPO(str(gpt2), rewards=count_good, generation={"max_new_tokens": 4})
    module.configure_model()
    optimizers, schedules = module.configure_optimizers()
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["AdamW", "AdamW"]
    assert [[optimizer.defaults[key] for key in ("lr", "weight_decay", "fused")] for optimizer in optimizers] == [
        [5e-7, 0.0, True],
        [9e-6, 0.0, True],
    ]
    assert schedules == []
