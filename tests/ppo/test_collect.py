"""rollout and score: what they take, what they hand out, with and without a Trainer."""

import pytest
import torch

from lit_ppo import PromptDataModule
from lit_ppo.data.batch import PromptBatch
from lit_ppo.functional import token_logprobs
from lit_ppo.rewards import RewardFunction
from tests.helpers.forwards import sizes_of_forwards
from tests.helpers.tiny import make_causal_lm, make_tokenizer
from tests.helpers.toys import count_good, make_module, make_trainer, write_prompts

PROMPTS = ["the film", "a movie was very", "plot"]


@pytest.fixture
def module(tiny_lm):
    return make_module(tiny_lm)


def test_fields_of_a_rollout(module):
    experience = module.rollout(PROMPTS, samples_per_prompt=2)
    assert experience.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert experience.prompt_index.tolist() == [0, 0, 1, 1, 2, 2]
    tokenizer = module.tokenizer
    for i, prompt in enumerate(experience.prompts):
        assert experience.prompt_ids[i][experience.prompt_mask[i]].tolist() == tokenizer(prompt).input_ids
        ids = experience.response_ids[i][experience.response_mask[i]]
        words = tokenizer.decode(ids, skip_special_tokens=True)
        assert experience.responses[i] == (f" {words}" if words else "")  # as it continues the prompt
    for name in ("logprobs", "ref_logprobs", "values", "kl"):
        assert getattr(experience, name)[~experience.response_mask].eq(0).all()
        assert getattr(experience, name).dtype == torch.float32


def test_a_prompts_first_sample_is_the_same_however_many_follow(module):
    other = make_module(module.model_settings.actor)
    assert module.rollout(PROMPTS).responses == other.rollout(PROMPTS, samples_per_prompt=3).responses[::3]


def test_the_training_stream_moves_on_and_named_streams_stay(module):
    named = module.rollout(PROMPTS, stream="a")
    first, second = module.rollout(PROMPTS), module.rollout(PROMPTS)
    assert first.responses != second.responses
    assert module.rollouts == 2
    assert module.rollout(PROMPTS, stream="a").responses == named.responses
    assert module.rollout(PROMPTS, stream="a").responses != module.rollout(PROMPTS, stream="b").responses
    assert module.rollouts == 2


def test_greedy_is_the_same_from_every_stream(module):
    greedy = [module.rollout(PROMPTS, do_sample=False, stream=s).responses for s in "ab"]
    assert greedy[0] == greedy[1]


def test_the_reference_writes_what_the_untouched_actor_would(module):
    expected = module.rollout(PROMPTS, stream="a").responses
    with torch.no_grad():
        for p in module.actor.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert module.rollout(PROMPTS, stream="a", policy="reference").responses == expected
    assert module.rollout(PROMPTS, stream="a").responses != expected


def test_without_logprobs_nothing_is_computed(module):
    with pytest.raises(AttributeError, match="logprobs is not set yet"):
        _ = module.rollout(PROMPTS, logprobs=False).logprobs


def test_an_experience_gives_its_prompts_and_columns_again(module):
    experience = module.rollout(PROMPTS, samples_per_prompt=2, stream="a")
    experience.columns["level"] = [0, 0, 1, 1, 2, 2]
    again = module.rollout(experience, samples_per_prompt=1, stream="a")
    assert again.prompts == PROMPTS
    assert again.columns == {"level": [0, 1, 2]}
    assert again.responses == experience.responses[::2]


def test_a_data_modules_batch_keeps_rows_and_columns(module, tmp_path, tiny_lm):
    data = PromptDataModule(str(write_prompts(tmp_path / "p.jsonl")), batch_size=4, seed=0, tokenizer=str(tiny_lm))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    experience = module.rollout(batch)
    assert experience.columns["level"] == experience.prompt_index.tolist() == batch.prompt_index.tolist()


def test_chat_prompts_keep_their_messages_and_reach_the_reward_as_messages(tmp_path):
    path = make_causal_lm(tmp_path, tokenizer=make_tokenizer(bos=True, chat=True))
    seen = []

    def reward(prompts, responses):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    chats = [[{"role": "user", "content": "the film"}], [{"role": "user", "content": "a good movie"}]]
    module = make_module(path, rewards=reward)
    experience = module.rollout(chats)
    module.score(experience)
    assert seen == chats
    assert experience.columns["messages"] == chats
    assert experience.prompts[0] == "[BOS]user the film [EOS]assistant"
    for i, chat in enumerate(chats):
        ids = module.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert experience.prompt_ids[i][experience.prompt_mask[i]].tolist() == ids


def test_several_rewards_are_weighted_and_kept_by_name(tiny_lm):
    def length(prompts, responses):
        return [float(len(r.split())) for r in responses]

    module = make_module(
        tiny_lm, rewards={"good": count_good, "long": {"source": RewardFunction(length), "weight": 0.5}}
    )
    experience = module.rollout(PROMPTS)
    experience.extras["note"] = "kept"
    scores = module.score(experience)
    assert experience.extras.keys() == {"note", "good", "long"}
    good, long = count_good(PROMPTS, experience.responses), length(PROMPTS, experience.responses)
    assert experience.extras["good"].tolist() == good
    assert experience.extras["long"].tolist() == long
    assert scores.tolist() == pytest.approx([g + 0.5 * n for g, n in zip(good, long, strict=True)])


def test_prompts_beyond_the_models_positions_are_refused(module):
    with pytest.raises(ValueError, match="60 tokens plus 10 new tokens exceeds the token limit of the actor, 64"):
        module.rollout(["the " * 60])


@pytest.mark.parametrize("none", [[], PromptBatch([], [], torch.arange(0), {})], ids=["list", "batch"])
def test_no_prompts_are_refused(module, none):
    with pytest.raises(ValueError, match=r"rollout\(prompts=\[\]\): is empty"):
        module.rollout(none)


def test_rolling_out_without_a_reference_from_the_reference_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="there is no reference"):
        make_module(tiny_lm, reference=None).rollout(PROMPTS, policy="reference")


def test_scoring_again_renews_each_sources_scores(tiny_lm):
    calls = []

    def count(prompts, responses):
        calls.append(1)
        return [float(len(calls))] * len(responses)

    module = make_module(tiny_lm, rewards={"a": count})
    experience = module.rollout(PROMPTS)
    for expected in (1.0, 2.0):
        assert module.score(experience).tolist() == experience.extras["a"].tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("scores", "message"), [(torch.ones(1), "1 values for 3 responses"), (torch.tensor([1.0, torch.nan, 0.0]), "nan")]
)
def test_what_a_score_source_returns_is_checked(tiny_lm, scores, message):
    module = make_module(tiny_lm, rewards=lambda experience: scores)
    with pytest.raises(ValueError, match=message):
        module.score(module.rollout(PROMPTS))


def test_a_score_source_of_ones_own_is_frozen_and_in_eval_mode(tiny_lm):
    class Source(torch.nn.Linear):
        def forward(self, experience):
            return torch.zeros(len(experience))

    module = make_module(tiny_lm, rewards=Source(2, 2))
    module.configure_model()
    module.train()
    assert not any(m.training for m in module.rewards.modules())
    assert not any(p.requires_grad for p in module.rewards.parameters())


def test_model_kwargs_reach_every_model(tiny_lm):
    module = make_module(tiny_lm, model_kwargs={"attn_implementation": "eager"})
    module.configure_model()
    for model in (module.actor.model, module.reference.model, module.critic.backbone):
        assert model.config._attn_implementation == "eager"


class TestSamplingLogprobs:
    """They are kept where the training pass agrees, and the difference is logged."""

    PROMPTS = ["the film was", "a story", "it felt very"]

    def rollout(self, tiny_lm, tolerance, **overrides):
        """An experience, and how many rows the actor's training forward saw for it."""
        module = make_module(tiny_lm, sampling_logprobs_tolerance=tolerance, micro_batch_size=1, **overrides)
        module.configure_model()
        sizes = sizes_of_forwards(module.actor)
        experience = module.rollout(self.PROMPTS)
        return module, experience, sum(sizes)

    def test_within_the_tolerance_one_micro_batch_is_computed_and_all_are_kept(self, tiny_lm):
        module, kept, n_kept = self.rollout(tiny_lm, 1e-4, temperature=0.7)
        assert n_kept == 1
        assert 0 <= module.sampling_difference < 1e-5
        _, computed, n_computed = self.rollout(tiny_lm, None, temperature=0.7)
        assert n_computed == 3
        torch.testing.assert_close(kept.logprobs, computed.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept.kl, computed.kl, rtol=1e-5, atol=1e-5)

    def test_beyond_it_all_are_computed_again(self, tiny_lm, monkeypatch):
        """Off by 0.5 each, as a sampler of another make might be."""
        from lit_ppo.generation import transformers as rollout

        monkeypatch.setattr(rollout, "token_logprobs", lambda *args: token_logprobs(*args) + 0.5)
        module = make_module(tiny_lm, sampling_logprobs_tolerance=0.4, micro_batch_size=1)
        experience = module.rollout(self.PROMPTS)
        monkeypatch.undo()
        assert module.sampling_difference == pytest.approx(0.5, abs=1e-4)
        plain = make_module(tiny_lm, micro_batch_size=1).rollout(self.PROMPTS)
        torch.testing.assert_close(experience.logprobs, plain.logprobs, rtol=0, atol=0)

    def test_log_probs_are_those_of_the_distribution_before_filters(self, tiny_lm):
        generation = {"max_new_tokens": 5, "suppress_tokens": [5, 6]}
        module, _, _ = self.rollout(tiny_lm, 1e-4, generation=generation)
        assert module.sampling_difference < 1e-5

    def test_greedy_and_the_references_responses(self, tiny_lm):
        """The reference's own sampling log-probs are not the actor's."""
        module = make_module(tiny_lm, sampling_logprobs_tolerance=1e-4, temperature=0.7)
        greedy = module.rollout(self.PROMPTS, do_sample=False)
        plain = make_module(tiny_lm, temperature=0.7)
        torch.testing.assert_close(
            greedy.logprobs, plain.rollout(self.PROMPTS, do_sample=False).logprobs, rtol=1e-5, atol=1e-5
        )
        with torch.no_grad():
            for parameter in module.actor.parameters():
                parameter.mul_(1.5)
        module.tolerance = 1e9  # whatever the difference
        theirs = module.rollout(self.PROMPTS, policy="reference")
        assert (theirs.logprobs - theirs.ref_logprobs).abs().max() > 1e-3


def test_special_tokens_are_kept_for_rewards_that_read_them(tmp_path):
    """All but the token that ended the response: here a word and ``[UNK]`` are special, too."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["good", "bad"]})
    path = make_causal_lm(tmp_path, tokenizer=tokenizer, seed=3)
    bare, full = (
        make_module(path, skip_special_tokens=skip).rollout(PROMPTS * 8, samples_per_prompt=2) for skip in (True, False)
    )
    special = {"[PAD]", "[EOS]", "[UNK]", "good", "bad"}
    assert full.ended.any()
    for row, (text, ended) in enumerate(zip(full.responses, full.ended.tolist(), strict=True)):
        words = tokenizer.convert_ids_to_tokens(full.response_ids[row][full.response_mask[row]].tolist())
        assert text.split() == words[: len(words) - ended]
        assert bare.responses[row].split() == [word for word in words if word not in special]
    assert special & {*" ".join(full.responses).split()} >= {"good", "bad", "[UNK]"}


def test_options_of_the_chat_template(tmp_path):
    """Of chats that are given to the module, and of a data module that has none of its own."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template += "{{ ' not' if not_good }}"
    path = make_causal_lm(tmp_path, tokenizer=tokenizer)
    module = make_module(path, chat_template_kwargs={"not_good": True})
    chat = [{"role": "user", "content": "the film"}]
    expected = "user the film [EOS]assistant not"
    assert module.rollout([chat]).prompts == module.rollout({"prompt": [chat]}).prompts == [expected]
    data = PromptDataModule([chat] * 5, batch_size=5)
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    assert data.peek("train").prompts == [expected]
    assert make_module(path).rollout([chat]).prompts == [expected.removesuffix(" not")]
