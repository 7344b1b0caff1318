"""A row gets its own rotary frequencies, whichever rows are computed beside it, and no more tokens than fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_ppo import LitRewardModel, LitSFT, RewardModel
from lit_ppo.models.actor_critic import Actor, actor_forward, critic_forward
from lit_ppo.models.load import load_causal_lm, load_critic
from lit_ppo.models.positions import rope_bound, token_limit
from tests.helpers.supervised import text_batch
from tests.helpers.tiny import make_causal_lm, make_reward_model
from tests.helpers.toys import make_module

LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 5.0, 9.0, 17.0],
}  # fmt: skip
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20, 21, 22], [6, 5, 4, 9]]


@pytest.fixture
def phi(tmp_path: Path) -> Path:
    """Phi-3 in small: rows of up to eight tokens have other frequencies than longer ones."""
    return make_causal_lm(tmp_path / "phi", "llama", scale=6.0, rope_parameters=LONG)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([[0] * (11 - len(row)) + row for row in ROWS])
    mask = torch.tensor([[False] * (11 - len(row)) + [True] * len(row) for row in ROWS])
    return ids, mask, mask[:, -2:]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logprobs_and_values_are_those_of_each_row_alone(phi: Path, attention: str) -> None:
    stock = AutoModelForCausalLM.from_pretrained(phi).eval()
    actor = Actor(load_causal_lm("actor", str(phi), {"attn_implementation": attention}))
    critic = load_critic("critic", str(phi), {"attn_implementation": attention})
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    logprobs, values = actor_forward(actor, rows(), 2, 1.0)[0], critic_forward(critic, rows(), 2)
    for i, row in enumerate(ROWS):
        output = stock(input_ids=torch.tensor([row]), output_hidden_states=True)
        expected = output.logits[0].log_softmax(-1)[[-3, -2], row[-2:]]
        torch.testing.assert_close(logprobs[i], expected, rtol=1e-5, atol=1e-5)
        states = output.hidden_states[-1][0, -3:-1]
        torch.testing.assert_close(values[i], states @ critic.value_head.weight[0], rtol=1e-5, atol=1e-5)


def test_a_response_that_would_cross_the_bound_is_refused_before_it_is_sampled(phi: Path, tmp_path: Path) -> None:
    """Eight tokens: prompts of 4 with 4 new ones stay below, prompts of 9 are above from the start."""
    module = make_module(phi, generation={"max_new_tokens": 4}, sampling_logprobs_tolerance=1.0)
    short, long = "the a film movie", "the a film movie story plot actor was is"
    together = module.rollout([short, long], stream="test")
    stock = AutoModelForCausalLM.from_pretrained(phi)
    for row in range(2):
        prompt, response = together.prompt_ids[row][together.prompt_mask[row]], together.response_ids[row]
        response = response[together.response_mask[row]]
        logits = stock(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, response.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(together.logprobs[row, : len(response)], expected, rtol=1e-5, atol=1e-5)
    assert module.sampling_difference == pytest.approx(0, abs=1e-5)  # these log-probs are those of sampling
    for prompt in ("the a film movie story", "the a film movie story plot actor was"):
        with pytest.raises(ValueError, match=r"crosses 8, where the longrope RoPE of the actor changes"):
            module.rollout([short, prompt])


def test_scores_and_losses_are_those_of_each_row_alone(tmp_path: Path) -> None:
    lm = make_causal_lm(tmp_path / "lm", "llama", scale=6.0, rope_parameters=LONG)
    scorer = make_reward_model(tmp_path / "rm", "llama", rope_parameters=LONG, initializer_range=0.5)
    stock = AutoModelForSequenceClassification.from_pretrained(scorer)
    expected = [stock(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    trained, rewards = LitRewardModel(str(scorer)), RewardModel(str(scorer))
    trained.configure_model()
    batch = text_batch(ROWS)
    scores = trained.rewards(batch["input_ids"], batch["attention_mask"])
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    rewards.build()
    texts = [rewards.tokenizer.decode(row) for row in ROWS]
    assert rewards.score_texts(texts).tolist() == pytest.approx(expected, rel=1e-5)
    sft, plain = LitSFT(str(lm)), AutoModelForCausalLM.from_pretrained(lm)
    sft.configure_model()
    alone = [plain(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in ROWS]
    torch.testing.assert_close(sft.token_losses(batch)[0], torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "bound"),
    [
        (LONG, (8, "longrope")),
        ({**LONG, "short_factor": LONG["long_factor"]}, None),
        ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, (64, "dynamic")),
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, None),
    ],
)
def test_bounds_of_rotary_embeddings(tmp_path: Path, parameters: dict[str, Any], bound: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, "llama", rope_parameters=parameters))
    found = rope_bound(model)
    assert (found and (found.tokens, found.kind)) == bound


@pytest.mark.parametrize("family", ["roberta", "bert", "distilbert", "opt", "gpt2"])
def test_the_limit_is_the_longest_row_that_a_model_can_read(tmp_path: Path, family: str) -> None:
    """All have 64 positions; RoBERTa's begin behind the padding token's."""
    model = AutoModelForSequenceClassification.from_pretrained(make_reward_model(tmp_path, family))
    limit = token_limit(model)
    assert limit is not None
    assert limit == (63 if family == "roberta" else 64) or family == "distilbert"
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_longer_texts_lose_their_beginning_or_are_refused(tmp_path: Path) -> None:
    path = str(make_reward_model(tmp_path, "roberta", initializer_range=0.5))
    rewards, trained = RewardModel(path), LitRewardModel(path)
    words = " ".join(["film", "good", "bad"] * 30)
    with pytest.warns(UserWarning, match="exceed its 63 positions"):
        score = rewards.score_texts([words])
    assert score.item() == pytest.approx(rewards.score_texts([" ".join(words.split()[-63:])]).item(), rel=1e-5)
    trained.configure_model()
    with pytest.raises(ValueError, match=r"LitRewardModel\(model=.*a text of 64 tokens exceeds its 63 positions"):
        trained.rewards(torch.full((1, 64), 5), torch.ones(1, 64, dtype=torch.long))
