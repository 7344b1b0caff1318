"""LitRewardModel: losses by hand, scores equal to the stock model's on single texts, what is loaded and saved."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lit_ppo.rewards import RewardModel
from lit_ppo.supervised.reward_model import LitRewardModel
from tests.helpers.supervised import HOW_TESTS_USE_LIGHTNING, fit, loader, make_trainer, pad
from tests.helpers.tiny import FAMILIES, make_reward_model, make_tokenizer

pytestmark = HOW_TESTS_USE_LIGHTNING

CHOSEN = [[3, 4, 5, 6, 7, 8, 9], [10, 4, 11]]
REJECTED = [[3, 4], [12, 5, 9, 9]]


class Scripted(LitRewardModel):
    """Scores are given: a row's score is looked up by its first token."""

    def __init__(self, model: str, scores: dict[int, float]) -> None:
        super().__init__(model)
        self.scores = scores

    def rewards(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        scores = torch.tensor([self.scores[row[0].item()] for row in input_ids])  # type: ignore[index]
        return scores + 0.0 * super().rewards(input_ids, attention_mask)


def pairs(chosen: list[list[int]], rejected: list[list[int]], pad_id: int = 0) -> dict[str, dict[str, Tensor]]:
    return {"chosen": pad(chosen, pad_id), "rejected": pad(rejected, pad_id)}


def labelled(rows: list[list[int]], labels: list[float], width: int | None = None) -> dict[str, Tensor]:
    return pad(rows, 0, width) | {"labels": torch.tensor(labels)}


def built(model: Any, **kwargs: Any) -> LitRewardModel:
    module = LitRewardModel(model if isinstance(model, dict) else str(model), **kwargs)
    module.configure_model()
    return module


def validated(module: LitRewardModel, batches: list[Any], tmp_path: Path) -> dict[str, float]:
    (metrics,) = make_trainer(tmp_path).validate(module, loader(batches), verbose=False)
    return dict(metrics)


def test_bradley_terry_loss_and_accuracy_by_hand(tiny_reward: Path, tmp_path: Path) -> None:
    """Margins 2, -1 and 0.5: losses log(1 + e^-2), log(1 + e), log(1 + e^-0.5); two of three are right."""
    module = Scripted(str(tiny_reward), {3: 2.5, 4: 0.5, 5: -1.0, 6: 0.0, 7: 1.0, 8: 0.5})
    trainer = fit(module, [pairs([[3], [5], [7]], [[4], [6], [8]])], tmp_path)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.e) + math.log1p(math.exp(-0.5))) / 3
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)
    assert trainer.callback_metrics["train/accuracy"].item() == pytest.approx(2 / 3)


def test_cross_entropy_and_accuracy_by_hand(tiny_reward: Path, tmp_path: Path) -> None:
    """Scores 2, 0.25, -1 with labels 1, 0, 0: losses log(1 + e^-2), log(1 + e^0.25), log(1 + e^-1); two are right.

    All scores of the second batch lie between 0 and 1, where a score could be taken for a probability.
    """
    module = Scripted(str(tiny_reward), {3: 2.0, 4: 0.25, 5: -1.0})
    trainer = fit(module, [labelled([[3], [4], [5]], [1, 0, 0])], tmp_path)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(0.25)) + math.log1p(math.exp(-1))) / 3
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)
    assert trainer.callback_metrics["train/accuracy"].item() == pytest.approx(2 / 3)
    trainer = fit(module, [labelled([[4], [4], [4], [4]], [1, 1, 1, 0])], tmp_path)
    assert trainer.callback_metrics["train/accuracy"].item() == pytest.approx(0.75)


def test_validation_weights_every_example_alike(tiny_reward: Path, tmp_path: Path) -> None:
    """Batches of three and one: the mean of the batches' means would be another number."""
    module = Scripted(str(tiny_reward), {3: 2.0, 4: 0.5, 5: -1.0})
    losses = [math.log1p(math.exp(-2)), math.log1p(math.exp(0.5)), math.log1p(math.exp(-1)), math.log1p(math.exp(-2))]
    batches = [labelled([[3], [4], [5]], [1, 0, 0]), labelled([[3]], [1])]
    for _ in range(2):  # the second time nothing is left of the first
        metrics = validated(module, batches, tmp_path)
        assert metrics["val/loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
        assert metrics["val/accuracy"] == pytest.approx(3 / 4)


def test_a_label_may_be_a_probability(tiny_reward: Path, tmp_path: Path) -> None:
    """Score 2 against 0.9: 0.9 log(1 + e^-2) + 0.1 log(1 + e^2); the score's sign agrees with 0.9."""
    metrics = validated(Scripted(str(tiny_reward), {3: 2.0}), [labelled([[3]], [0.9])], tmp_path)
    expected = 0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2))
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["val/accuracy"] == 1.0


@pytest.mark.parametrize("family", ["gpt2", "llama", "distilbert"])
@pytest.mark.parametrize("pad_token", [True, False])
def test_scores_are_the_stock_models_on_single_texts(tmp_path: Path, family: str, pad_token: bool) -> None:
    """Whatever the padding; also where the pad token is the end-of-text token and a text ends with it."""
    path = make_reward_model(tmp_path, family, tokenizer=make_tokenizer(pad=pad_token))
    module = built(path)
    module.eval()
    pad_id = module.tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    rows = [*CHOSEN, *REJECTED, [13, 5, 1 if pad_token else 2]]
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    expected = [stock(torch.tensor([row])).logits.item() for row in rows]
    for width in (7, 12):
        batch = pad(rows, pad_id, width)
        assert module.rewards(**batch).tolist() == pytest.approx(expected, abs=1e-6)


def test_pairs_of_unequal_width_are_scored_as_single_texts(tmp_path: Path) -> None:
    path = make_reward_model(tmp_path, tokenizer=make_tokenizer(pad=False))  # padded with the end token, 0 here
    module = built(path)
    module.eval()
    margins, targets = module.margins(pairs(CHOSEN, REJECTED))
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    scores = [[stock(torch.tensor([row])).logits.item() for row in rows] for rows in (CHOSEN, REJECTED)]
    assert margins.tolist() == pytest.approx([c - r for c, r in zip(*scores, strict=True)], abs=1e-6)
    assert targets.tolist() == [1.0, 1.0]


def test_a_causal_lm_keeps_its_body_and_gets_a_new_head(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def head(seed: int) -> Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        module = built(tiny_lm)
        stock = AutoModelForSequenceClassification.from_pretrained(tiny_lm, num_labels=1)
        assert module.model is not None
        body = {name: value for name, value in module.model.state_dict().items() if not name.startswith("score")}
        for name, value in body.items():
            torch.testing.assert_close(value, stock.state_dict()[name])
        assert module.model.score.weight.shape == (1, 16)  # type: ignore[union-attr]
        return module.model.state_dict()["score.weight"]

    assert torch.equal(head(3), head(3))
    assert not torch.equal(head(3), head(4))


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    path = make_reward_model(tmp_path, num_labels=2)
    message = r"LitRewardModel\(model='.*'\): its head has 2 outputs, but a reward model has 1"
    with pytest.raises(ValueError, match=message):
        built(path)
    module = built(path, model_kwargs={"ignore_mismatched_sizes": True})  # the remedy that the message names
    assert module.rewards(**pad(CHOSEN, 0)).shape == (2,)


def test_a_new_model_has_one_output(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    module = built(dict(FAMILIES["llama"]), tokenizer=str(tmp_path))
    assert module.model is not None
    assert module.model.config.num_labels == 1


def test_saved_folder_gives_the_same_scores(tmp_path: Path) -> None:
    path = make_reward_model(tmp_path / "start", "llama", tokenizer=make_tokenizer(pad=False))
    module = LitRewardModel(str(path), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(module, [pairs(CHOSEN, REJECTED)] * 3, tmp_path)
    module.eval()
    module.save_pretrained(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.num_labels == 1
    assert loaded.config.pad_token_id == 0  # the end token's, so that batches work out of the box
    batch = pad([[3, 4, 5], [6, 7]], 0)
    torch.testing.assert_close(loaded(**batch).logits.squeeze(-1), module.rewards(**batch))


def test_a_batch_of_another_kind_is_refused(tiny_reward: Path) -> None:
    with pytest.raises(ValueError, match=r"batch with attention_mask, input_ids\): needs 'chosen' and"):
        built(tiny_reward).margins(pad(CHOSEN, 0))


@pytest.mark.parametrize("pad_id", [0, 9])
def test_texts_end_with_the_end_token_in_training_and_in_the_exported_model(pad_id: int, tmp_path: Path) -> None:
    """Rows 0 and 3 get the token 1, the others end with it; RewardModel reads in the folder that it has to do it."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    path = make_reward_model(tmp_path / "start", "llama", tokenizer=tokenizer, scale=4.0)
    module = built(path, append_eos=True)
    ids = torch.tensor([[3, 4, 5], [3, 1, pad_id], [3, 4, 1], [3, 4, pad_id]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    expected = [stock(torch.tensor([row])).logits.item() for row in ([3, 4, 5, 1], [3, 1], [3, 4, 1], [3, 4, 1])]
    assert stock.config.pad_token_id == pad_id
    module.model.eval()
    assert module.rewards(ids, mask).tolist() == pytest.approx(expected, rel=1e-5)
    module.save_pretrained(tmp_path / "model")
    source = RewardModel(str(tmp_path / "model"))
    text = module.tokenizer.decode([3, 4, 5])
    assert source.score_texts([text]).item() == pytest.approx(expected[0], rel=1e-5)


def test_an_end_token_that_is_the_padding_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(pad=False)
    with pytest.raises(ValueError, match=r"LitRewardModel\(append_eos=True\): .* does not also pad with"):
        built(make_reward_model(tmp_path, tokenizer=tokenizer), append_eos=True)
