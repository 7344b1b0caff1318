"""What is refused before the first rollout, each with class, argument, value and remedy."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lit_ppo import LitPPO
from lit_ppo.advantages import GroupRelative, LeaveOneOut, Reinforce
from lit_ppo.callbacks import AdvantageNormalization, CounterfactualActions, LeastSquaresCritic
from lit_ppo.models import packing
from lit_ppo.models.actor_critic import Actor, Critic
from lit_ppo.parallel.trainer import check_disk
from lit_ppo.ppo import preflight
from lit_ppo.ppo.prompts import check_batch, check_end_of_turn
from lit_ppo.rewards import RewardModel
from lit_ppo.run.checkpoint import StepCheckpoint
from tests.helpers.tiny import CHAT_TEMPLATE, WORDS, make_causal_lm, make_reward_model, make_tokenizer
from tests.helpers.toys import make_data, make_module, make_trainer


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("ppo_epochs", 0, "must be an integer, at least 1"),
        ("minibatch_size", -1, "must be an integer, at least 1"),
        ("samples_per_prompt", 0, "must be an integer, at least 1"),
        ("micro_batch_size", 0, "must be an integer, at least 1"),
        ("micro_batch_tokens", 64, "give it or micro_batch_size, not both"),
        ("rollout_batch_tokens", 2.5, "must be an integer, at least 1"),
        ("temperature", 0.0, "must be a finite number, at least 0.001"),
        ("temperature", float("inf"), "must be a finite number, at least 0.001"),
        ("clip_range", -0.2, "must be a finite number, above 0"),
        ("max_grad_norm", 0.0, "must be a finite number, above 0"),
        ("kl_coef", -0.1, "must be a finite number, at least 0"),
        ("kl_coef", float("nan"), "must be a finite number, at least 0"),
        ("kl_coef", None, "must be a finite number, at least 0"),
        ("ppo_epochs", True, "must be an integer, at least 1"),
        ("max_skipped_steps", -1, "must be an integer, at least 0"),
        ("max_skipped_steps", 1.5, "must be an integer, at least 0"),
        ("seed", -1, "must be an integer, at least 0"),
        ("advantages", len, "not an estimator: it lacks needs_values"),
        ("kl_estimator", "k4", "must be one of 'k1', 'k2', 'k3'"),
        ("loss_reduction", "mean", "must be one of 'token_mean', 'sequence_mean'"),
        ("loss_reduction", True, "or a number of tokens, at least 1"),
        ("clip_range", [0.2], "give one number, or two"),
        ("model_kwargs", {"dtype": "bfloat16"}, "give the Trainer a precision"),
        ("critic", None, "GAE needs values"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(tiny_lm, argument, value, message):
    with pytest.raises(ValueError, match=message) as info:
        make_module(tiny_lm, **{argument: value})
    assert str(info.value).startswith(f"LitPPO({argument}={value!r}): ")


@pytest.mark.parametrize("estimator", [GroupRelative(), LeaveOneOut(), Reinforce()], ids=repr)
def test_a_critic_beside_an_estimator_without_values_is_refused(tiny_lm, estimator):
    name = type(estimator).__name__
    with pytest.raises(ValueError, match=rf"LitPPO\(critic='actor'\): {name} uses no values; set critic to null"):
        make_module(tiny_lm, advantages=estimator, samples_per_prompt=2, kl_coef=0.0)


@pytest.mark.parametrize("estimator", [GroupRelative(), LeaveOneOut()], ids=repr)
def test_one_response_has_no_group(tiny_lm, estimator):
    name = type(estimator).__name__
    with pytest.raises(ValueError, match=rf"LitPPO\(samples_per_prompt=1\): {name} compares .* sample at least 2"):
        make_module(tiny_lm, advantages=estimator, critic=None, kl_coef=0.0)
    make_module(tiny_lm, advantages=Reinforce(), critic=None)


def test_a_kl_that_the_estimator_does_not_read_is_refused(tiny_lm):
    critic_free = {"critic": None, "samples_per_prompt": 2, "kl_coef": 0.1}
    with pytest.raises(ValueError, match=r"LitPPO\(kl_coef=0.1\): GroupRelative reads only scores.*KLLoss"):
        make_module(tiny_lm, advantages=GroupRelative(), **critic_free)
    make_module(tiny_lm, advantages=LeaveOneOut(), **critic_free)


def test_actor_and_reference_of_different_vocabularies_are_refused(tmp_path, tiny_lm):
    other = make_causal_lm(tmp_path, tokenizer=make_tokenizer(words=WORDS[:20]))
    with pytest.raises(ValueError, match=r"LitPPO\(reference=.*its vocabulary has 23 tokens.*has 43.*must share one"):
        make_module(tiny_lm, reference=str(other)).configure_model()


def test_a_tokenizer_larger_than_the_actor_is_refused(tmp_path, tiny_lm):
    make_tokenizer(tmp_path, words=[*WORDS, *"abcdefgh"])
    with pytest.raises(ValueError, match=r"LitPPO\(tokenizer=.*tokens, the actor in .* only 43"):
        make_module(tiny_lm, tokenizer=str(tmp_path)).configure_model()


def test_a_critic_from_a_reward_model_that_reads_other_tokens_is_refused(tmp_path, tiny_lm):
    words = list(reversed([*WORDS, "user", "assistant"]))
    reward = make_reward_model(tmp_path, tokenizer=make_tokenizer(words=words))
    message = r"LitPPO\(critic='reward'\): the reward model and the actor have different tokenizers"
    with pytest.raises(ValueError, match=message):
        make_module(tiny_lm, rewards=RewardModel(str(reward)), critic="reward").configure_model()


def test_a_critic_from_rewards_that_are_no_model_is_refused(tiny_lm):
    with pytest.raises(ValueError, match=r"LitPPO\(critic='reward'\): the rewards are not a RewardModel"):
        make_module(tiny_lm, critic="reward").configure_model()


def test_a_minibatch_that_no_update_can_fill_is_refused(tmp_path, tiny_lm):
    with pytest.raises(ValueError, match=r"LitPPO\(minibatch_size=15\): more than the 14 responses .*7 prompts x 2"):
        make_trainer(tmp_path).fit(make_module(tiny_lm, minibatch_size=15, samples_per_prompt=2), make_data(tmp_path))
    check_batch("LitPPO", 14, 2, 7)


def test_a_minibatch_larger_than_a_plain_loaders_batch_is_refused(tmp_path, tiny_lm):
    loader = torch.utils.data.DataLoader(["the film", "a movie"], batch_size=2, num_workers=0)
    with pytest.raises(ValueError, match=r"LitPPO\(minibatch_size=5\): more than the 2 responses"):
        make_trainer(tmp_path).fit(make_module(tiny_lm), loader, loader)


@pytest.mark.parametrize("model", ["reference", "critic"])
def test_every_models_positions_count(tmp_path, tiny_lm, model):
    short = make_causal_lm(tmp_path / "short", n_positions=12)
    with pytest.raises(ValueError, match=rf"exceeds the token limit of the {model}, 12"):
        make_trainer(tmp_path).fit(make_module(tiny_lm, **{model: str(short)}), make_data(tmp_path))


def test_prompts_that_would_outgrow_the_model_are_refused_before_the_first_rollout(tmp_path, tiny_lm):
    module = make_module(tiny_lm, generation={"max_new_tokens": 61})
    with pytest.raises(ValueError, match=r"max_new_tokens': 61.*a prompt of 4 tokens.*limit of the actor, 64"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
    assert module.rollouts == 0


def test_a_failing_reward_is_found_before_the_first_rollout(tmp_path, tiny_lm):
    def broken(prompts, responses, level):
        raise KeyError("no such thing")

    module = make_module(tiny_lm, rewards=broken)
    with pytest.raises(ValueError, match=r"first train prompt: .*no such thing"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
    assert module.rollouts == 0


def test_validation_prompts_that_the_reward_cannot_score_are_found_before_the_first_rollout(tmp_path, tiny_lm):
    def by_level(prompts, responses, level):
        return [float(x) for x in level]

    val = tmp_path / "val.jsonl"
    val.write_text(json.dumps({"prompt": "the film", "level": "high"}) + "\n")
    module = make_module(tiny_lm, rewards=by_level)
    with pytest.raises(ValueError, match=r"first val prompt: .*high"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path, val_path=str(val)))
    assert module.rollouts == 0


def test_a_full_disk_is_found_before_the_first_rollout(tmp_path, tiny_lm, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "total used free")(1, 1, 1000))
    make_trainer(tmp_path, max_steps=0).fit(make_module(tiny_lm), make_data(tmp_path))  # none are written
    trainer = make_trainer(tmp_path, enable_checkpointing=True, callbacks=[StepCheckpoint()])
    with pytest.raises(ValueError, match=r"dirpath=.*1000 bytes free, 1 checkpoints need .* KiB; free some space"):
        trainer.fit(make_module(tiny_lm), make_data(tmp_path))


@pytest.mark.parametrize(
    ("keep", "steps", "there", "needed"), [(2, 500, 0, 3), (5, 500, 0, 6), (5, 100, 0, 2), (2, 500, 2, 1)]
)
def test_room_for_the_checkpoints_that_are_kept_is_enough(tmp_path, tiny_lm, monkeypatch, keep, steps, there, needed):
    """The next is written before the oldest goes, and a run of 100 steps writes two: after 50 and 100.

    Each number trained takes 12 bytes with its moments; the frozen reference is in no checkpoint. The disk is that of
    the checkpoints' folder. A resumed run has some already.
    """
    module = make_module(tiny_lm)
    module.configure_model()
    saving = StepCheckpoint(keep=keep, dirpath=str(tmp_path / "saved"))
    module._trainer = make_trainer(tmp_path / "run", enable_checkpointing=True, callbacks=[saving], max_steps=steps)
    trained = [*module.actor.parameters(), *module.critic.parameters()]
    one = 12 * sum(p.numel() for p in trained)
    (tmp_path / "saved").mkdir()
    for step in range(there):
        (tmp_path / "saved" / f"step-{step:06d}.ckpt").write_bytes(bytes(one))
    for free in (needed * one, needed * one - 1):
        disks = {tmp_path / "saved": SimpleNamespace(free=free)}
        monkeypatch.setattr("shutil.disk_usage", disks.__getitem__)
        refused = pytest.raises(ValueError, match=r"StepCheckpoint\(dirpath=.*free some space, keep fewer or choose")
        with nullcontext() if free == needed * one else refused:
            check_disk(module.trainer, module)


def test_sampling_filters_are_warned_about(tmp_path, tiny_lm):
    module = make_module(tiny_lm, generation={"max_new_tokens": 4, "top_k": 5})
    with pytest.warns(UserWarning, match="top_k sample from another distribution"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data(tmp_path))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused(tmp_path, tiny_lm, precision):
    trainer = make_trainer(tmp_path)
    trainer.strategy.precision_plugin.precision = precision
    with pytest.raises(ValueError, match=rf"{precision}.*use 'bf16-mixed'"):
        trainer.fit(make_module(tiny_lm), make_data(tmp_path))


@pytest.mark.parametrize(
    ("split", "n_rows"),
    [
        ({"micro_batch_size": 3}, 3),
        ({"micro_batch_size": 9}, 5),  # no more than a minibatch
        ({"micro_batch_size": None}, 5),
        ({"micro_batch_size": None, "micro_batch_tokens": 41}, 2),  # rows of 14 tokens
        ({"micro_batch_size": None, "micro_batch_tokens": 13}, 1),  # a longer row stands alone
    ],
)
def test_the_longest_micro_batch_is_tried_and_leaves_no_trace(tmp_path, tiny_lm, monkeypatch, split, n_rows):
    """Longest prompt 4, 10 new tokens, minibatches of 5 rows: seen forward and backward before any rollout."""
    seen, backward = [], []

    def seeing(model):
        forward = model.forward

        def sees(self, ids, mask, *, target_mask, **options):
            n_prompt, n_new = ids.shape[1] - target_mask.shape[1], int(target_mask.sum())
            seen.append((model, len(ids), n_new, int(mask[:, :n_prompt].sum())))
            return forward(self, ids, mask, target_mask=target_mask, **options)

        monkeypatch.setattr(model, "forward", sees)

    def gradients(self, loss):
        loss.backward()
        models = {"actor": self.actor, "critic": self.critic}
        backward.append([name for name, model in models.items() if any(p.grad is not None for p in model.parameters())])

    seeing(Actor)
    seeing(Critic)
    monkeypatch.setattr(LitPPO, "manual_backward", gradients)
    module = make_module(tiny_lm, **split)
    trainer = make_trainer(tmp_path, max_steps=0)
    trainer.fit(module, make_data(tmp_path))
    assert seen == [(model, n_rows, 10 * n_rows, 4 * n_rows) for model in (Actor, Critic)]
    assert backward == [["actor"], ["actor", "critic"]]
    start = make_module(tiny_lm)
    start.configure_model()
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(v, start.state_dict()[k]) for k, v in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
def test_a_list_of_batches_is_refused(tmp_path, tiny_lm):
    """Lightning would make its first update from the first prompt of every batch."""
    with pytest.raises(ValueError, match=r"train_dataloaders='list'\): .*several loaders; give one"):
        make_trainer(tmp_path).fit(make_module(tiny_lm), [["the film", "a story"], ["we saw", "it felt"]])


def test_a_chat_whose_turns_end_in_no_stop_token_is_warned_about(tmp_path):
    """A template that closes turns with <end>, where tokenizer and checkpoint name [EOS] alone."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("eos_token", "'<end>'")
    actor, end = make_causal_lm(tmp_path, tokenizer=tokenizer), tokenizer.convert_tokens_to_ids("<end>")
    chats = SimpleNamespace(columns={"messages": []})
    module = make_module(actor)
    module.configure_model()
    with pytest.warns(UserWarning, match=rf"'<end>' \(id {end}\), which ends no response; give .*: \[1, {end}\]"):
        check_end_of_turn(module, chats)
    check_end_of_turn(module, SimpleNamespace(columns={}))  # plain prompts
    module.generation.eos_token_id = [1, end]
    check_end_of_turn(module, chats)


def test_what_callbacks_ask_of_rollouts_is_tried_and_a_frozen_critic_is_not(tmp_path, monkeypatch):
    """A critic that reads no other tokens is refused before the first rollout."""
    module = make_module(make_causal_lm(tmp_path / "lm", scale=4.0), critic="actor")
    monkeypatch.setattr(preflight, "critic_forward", None)  # calling it would raise
    tricks = [LeastSquaresCritic(), AdvantageNormalization(), CounterfactualActions(2)]
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=tricks)
    monkeypatch.setattr(packing.tree, "TOLERANCE", -1.0)
    with pytest.raises(
        ValueError, match=r"^CounterfactualActions or AdvantageRegression: GPT2Model does not read other tokens"
    ):
        trainer.fit(module, make_data(tmp_path))
    assert module.rollouts == 0
    monkeypatch.undo()
    make_trainer(tmp_path, max_steps=1, callbacks=tricks).fit(module, make_data(tmp_path))
