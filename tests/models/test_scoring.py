"""Scores are not rounded to bf16: equal scores make ties in groups, and rewards of 0."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_ppo import LitRewardModel, RewardModel
from tests.helpers.tiny import WORDS, make_reward_model

TEXTS = [f"{a} {b} {c}" for a in WORDS[:8] for b in WORDS[8:16] for c in WORDS[16:20]]


@pytest.mark.parametrize("family", ["gpt2", "llama", "roberta"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_scores_stay_distinct_under_bf16(tmp_path: Path, family: str, weights: str) -> None:
    """The head's product is computed again in float64 from the states that it got."""
    path = str(make_reward_model(tmp_path, family, initializer_range=0.3))
    rewards = RewardModel(path, model_kwargs={"dtype": weights})
    rewards.build()
    head = rewards.model.score if family != "roberta" else rewards.model.classifier.out_proj
    states = []
    head.register_forward_hook(lambda module, inputs, output: states.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "float32"):
        scores = rewards.score_texts(TEXTS)
    assert scores.dtype == torch.float32
    assert len(set(scores.tolist())) > 0.99 * len(TEXTS)
    assert len(set(scores.bfloat16().tolist())) < 0.9 * len(TEXTS)
    ids = torch.tensor(rewards.tokenizer(TEXTS[:1])["input_ids"])
    states.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=weights == "float32"):
        score = rewards.model(input_ids=ids).logits
    last = states[0].reshape(-1, states[0].shape[-1])[-1].double()
    exact = head.weight.double() @ last + (0 if head.bias is None else head.bias.double())
    assert score.item() == pytest.approx(exact.item(), rel=1e-5)


def test_margins_of_a_trained_reward_model_too(tmp_path: Path) -> None:
    model = LitRewardModel(str(make_reward_model(tmp_path, initializer_range=0.3)))
    model.configure_model()
    ids = torch.tensor(model.tokenizer(TEXTS)["input_ids"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = model.rewards(ids, torch.ones_like(ids))
    assert len(set(scores.tolist())) > 0.99 * len(TEXTS)
    model.save_pretrained(tmp_path / "saved")
    saved = RewardModel(str(tmp_path / "saved"))(SimpleNamespace(prompts=TEXTS, responses=[""] * 256, columns={}))
    assert saved.shape == (256,)


def test_a_score_that_depends_on_the_texts_beside_it_is_refused(tmp_path: Path) -> None:
    """FNet mixes all positions of a forward, padding included."""
    path = str(make_reward_model(tmp_path, "fnet", initializer_range=0.5))
    with pytest.raises(ValueError, match=r"RewardModel\(model=.*depends on the texts beside it.*use batch_size=1"):
        RewardModel(path).build()
    one_by_one = RewardModel(path, batch_size=1)
    assert one_by_one.score_texts(TEXTS[:2])[0] == one_by_one.score_texts(TEXTS[:1])[0]
