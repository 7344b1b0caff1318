"""Attention under autocast in models that are trained alone, and in those that score."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel

from lit_ppo.attention import autocast
from lit_ppo.attention.choice import asks_for_sdpa
from lit_ppo.generation.config import neutral
from lit_ppo.models.actor_critic import Actor
from lit_ppo.models.load import load_causal_lm
from lit_ppo.rewards import RewardModel
from lit_ppo.supervised.reward_model import LitRewardModel
from lit_ppo.supervised.sft import LitSFT
from tests.helpers.supervised import text_batch
from tests.helpers.tiny import LLAMA, make_causal_lm, make_reward_model


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Of the queries that PyTorch's attention gets."""
    found: list[torch.dtype] = []
    stock = functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        found.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype)
        return stock(query, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    return found


@pytest.mark.parametrize(("short", "dtype"), [(256, torch.float32), (4, torch.bfloat16)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sft_and_scores_attend_to_short_rows_in_float32(
    tmp_path: Path, dtypes: list, monkeypatch: pytest.MonkeyPatch, family: str, short: int, dtype: torch.dtype
) -> None:
    """Rows of six tokens and more."""
    monkeypatch.setattr(autocast, "SHORT", short)
    sft = LitSFT(str(make_causal_lm(tmp_path / "lm", family)))
    sft.configure_model()
    rewards = RewardModel(str(make_reward_model(tmp_path / "reward", family)))
    rewards.build()
    dtypes.clear()  # what checks of the models did
    with torch.autocast("cpu", torch.bfloat16):
        sft.token_losses(text_batch([[3, 4, 5, 6, 7, 8], [9, 10]]))
        rewards.score_texts(["the film was really good and not bad"])
    layers = sft.model.config.num_hidden_layers + rewards.model.config.num_hidden_layers
    assert dtypes == [dtype] * layers


def test_an_attention_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    path = str(make_reward_model(tmp_path / "reward"))
    module = LitRewardModel(path, model_kwargs={"attn_implementation": "eager"})
    module.configure_model()
    assert module.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", [torch.bfloat16, None])
def test_layers_that_need_the_name_sdpa_keep_it(tmp_path: Path, dtypes: list, kind: torch.dtype | None) -> None:
    """Falcon attends by other code where its attention has another name."""
    path = str(make_causal_lm(tmp_path / "lm", "falcon"))
    sft, actor = LitSFT(path), Actor(load_causal_lm("actor", path, {}))
    sft.configure_model()
    sft.eval()
    dtypes.clear()
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind is not None):
        sft.token_losses(text_batch([[3, 4, 5, 6]]))
        actor(ids, mask, target_mask=mask[:, 1:])
        actor.generate(ids, mask, neutral(max_new_tokens=2, pad_token_id=0), [(0,)])
        assert dtypes == [kind or torch.float32] * sft.model.config.num_hidden_layers * (1 + 1 + 2)


def test_sparse_attention_needs_the_name_sdpa() -> None:
    """Under another name DeepSeek-V3.2 drops its mask, which rows shorter than the mask do not show."""
    config = pytest.importorskip("transformers.models.deepseek_v32").DeepseekV32Config(**LLAMA)
    with torch.device("meta"):
        assert asks_for_sdpa(AutoModel.from_config(config))


def test_a_saved_model_does_not_name_our_attention(tmp_path: Path) -> None:
    module = LitSFT(str(make_causal_lm(tmp_path / "lm")))
    module.configure_model()
    module.save_pretrained(tmp_path / "saved")
    assert autocast.NAME not in (tmp_path / "saved" / "config.json").read_text()
