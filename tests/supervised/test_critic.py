"""LitCritic: its loss by hand, its values equal to those of LitPPO's critic, what the reward reads, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lit_ppo import LitCritic, LitPPO, RewardFunction, RewardModel, TextDataModule
from lit_ppo.cli.rebuild import build
from lit_ppo.models.actor_critic import critic_forward
from lit_ppo.parallel.ranks import n_ranks
from lit_ppo.rewards.folders import folders_of
from tests.helpers.ranks import on_ranks
from tests.helpers.rewards import lengths
from tests.helpers.supervised import HOW_TESTS_USE_LIGHTNING, fit, loader, make_trainer, pad, weights
from tests.helpers.tiny import WORDS, make_causal_lm, make_reward_model, make_tokenizer, write_rows
from tests.helpers.toys import count_good

pytestmark = HOW_TESTS_USE_LIGHTNING

ROWS = [[3, 4, 5, 6, 7, 8, 9], [10, 4, 11, 12], [12, 5, 9, 9, 3]]  # responses of 3 tokens after 4, 1 and 2
SHORT = [3, 4, 5]


def by_first_word(responses: list[str]) -> list[float]:
    """Scores of responses that begin with tokens 7, 4 and 9, then of one that begins with token 3."""
    scores = dict(zip((WORDS[token - 3] for token in (7, 4, 9, 3)), (1.0, -2.0, 4.0, 0.5), strict=True))
    return [scores[response.split()[0]] for response in responses]


class Scripted(LitCritic):
    """Each row's values are given, by its first token."""

    def __init__(self, model: str, table: dict[int, list[float]], **kwargs: Any) -> None:
        super().__init__(model, by_first_word, 3, **kwargs)
        self.table = table

    def values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        values = torch.tensor([self.table[int(row[0])] for row in input_ids])
        return values + 0.0 * super().values(input_ids, attention_mask)


# errors against 1, -2 and 4: (0, 1, 2), (1, 1, 1), (-4, 0, 1); their squares sum to 5, 3 and 17
TABLE = {3: [1.0, 2.0, 3.0], 10: [-1.0, -1.0, -1.0], 12: [0.0, 4.0, 5.0]}


def critic(model: Any, rewards: Any = count_good, n: int = 3, **kwargs: Any) -> LitCritic:
    return LitCritic(model if isinstance(model, dict) else str(model), rewards, n, **kwargs)


def built(model: Any, **kwargs: Any) -> LitCritic:
    module = critic(model, **kwargs)
    module.configure_model()
    module.eval()
    return module


def test_loss_and_explained_variance_by_hand(tiny_reward: Path, tmp_path: Path) -> None:
    """Squared errors sum to 25 over 9 places; scores 1, -2, 4 have mean 1 and variance 6: 1 - (25 / 9) / 6."""
    trainer = fit(Scripted(str(tiny_reward), TABLE), [pad(ROWS, 0)], tmp_path)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(25 / 9, rel=1e-6)
    assert trainer.callback_metrics["train/explained_variance"].item() == pytest.approx(1 - 25 / 54, rel=1e-6)
    trainer = fit(Scripted(str(tiny_reward), TABLE), [pad(ROWS[:1], 0)], tmp_path)
    assert trainer.callback_metrics["train/explained_variance"] == 0.0  # one score has no variance


def test_validation_weights_every_text_alike(tiny_reward: Path, tmp_path: Path) -> None:
    """Batches of two and one, and one without any that counts: means of the batches' numbers would be others."""
    module = Scripted(str(tiny_reward), TABLE)
    batches = [pad(ROWS[:2], 0), pad([SHORT], 0), pad(ROWS[2:], 0)]
    for _ in range(2):  # the second time nothing is left of the first
        (metrics,) = make_trainer(tmp_path).validate(module, loader(batches), verbose=False)
        assert metrics["val/loss"] == pytest.approx(25 / 9, rel=1e-6)
        assert metrics["val/explained_variance"] == pytest.approx(1 - 25 / 54, rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_values_are_those_of_ppos_critic_from_the_exported_folder(tmp_path: Path, family: str) -> None:
    """For the same prompts and responses; also after training, whatever the padding."""
    lm = make_causal_lm(tmp_path / "lm", family)
    start = make_reward_model(tmp_path / "start", family, initializer_range=0.3)
    module = critic(start, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(module, [pad(ROWS, 0)] * 3, tmp_path)
    module.eval()
    module.save_pretrained(tmp_path / "model")
    ppo = LitPPO(str(lm), critic=str(tmp_path / "model"), rewards=count_good, generation={"max_new_tokens": 3})
    rows = module.text_reward.rows(module.tokenizer, ROWS, torch.device("cpu"))
    assert [ids.tolist()[-n:] for ids, n in zip(rows.prompt_ids, (4, 1, 2), strict=True)] == [r[:-3] for r in ROWS]
    expected = critic_forward(ppo.models.critic, rows.model_inputs(), 3)  # type: ignore[arg-type]
    assert expected.std() > 0.01
    for width in (None, 12):
        found = module.values(**pad(ROWS, 0, width))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    before = AutoModelForSequenceClassification.from_pretrained(start).state_dict()
    after = load_file(tmp_path / "model/model.safetensors")
    assert all(not after[name].equal(before[name]) for name in after)  # head and body


def test_a_run_with_responses_of_another_length_is_warned_about(tiny_lm: Path, tiny_reward: Path, folder: Path) -> None:
    built(tiny_reward).save_pretrained(folder / "model")
    ppo = LitPPO(str(tiny_lm), critic=str(folder / "model"), rewards=count_good, generation={"max_new_tokens": 4})
    with pytest.warns(UserWarning, match=r"trained it for responses of 3 tokens, but max_new_tokens is 4"):
        ppo.configure_model()


def test_texts_that_are_too_short_do_not_count(tiny_reward: Path) -> None:
    module = built(tiny_reward, rewards=by_first_word)
    loss, scores = module.loss(pad(ROWS, 0))
    assert scores.tolist() == [1.0, -2.0, 4.0]
    among, same = module.loss(pad([ROWS[0], SHORT, ROWS[1], [3], ROWS[2]], 0, width=15))
    assert same.tolist() == scores.tolist()
    torch.testing.assert_close(among, loss)
    nothing, none = module.loss(pad([SHORT], 0))
    assert (nothing.item(), len(none)) == (0.0, 0)
    nothing.backward()
    assert module.model is not None
    assert all(p.grad is not None and not p.grad.any() for p in module.model.parameters())


def test_the_reward_reads_prompt_and_response(tiny_reward: Path) -> None:
    """Padding and special tokens (1: end of text) are left out."""
    seen: list[Any] = []

    def source(experience: Any) -> list[float]:
        seen.append((experience.prompts, experience.responses, experience.ended.tolist(), experience.columns))
        return [0.0] * len(experience.responses)

    built(tiny_reward, rewards=source).loss(pad([[3, 4, 1, 5, 6, 7], [8, 9, 10, 11]], 0))
    assert seen == [(["the a", "plot"], [" film movie story", " actor was is"], [False, False], {})]


def test_scores_are_the_reward_models(tiny_reward: Path, tmp_path: Path) -> None:
    path = make_reward_model(tmp_path, "llama", initializer_range=0.3)
    rewards = {"mean": {"source": RewardModel(str(path), aggregation="mean"), "weight": 2.0}, "good": count_good}
    _, scores = built(tiny_reward, rewards=rewards).loss(pad(ROWS, 0))
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    means = [stock.score(stock.model(torch.tensor([row])).last_hidden_state)[0, -3:].mean().item() for row in ROWS]
    good = [sum(WORDS[token - 3] in ("good", "great") for token in row[-3:]) for row in ROWS]
    assert scores.tolist() == pytest.approx([2 * m + g for m, g in zip(means, good, strict=True)], rel=1e-5)
    assert not scores.requires_grad


def test_training_learns_a_reward(tmp_path: Path) -> None:
    """Of texts that the words before tell: the loss falls below the variance, which no constant can."""
    lm = make_causal_lm(tmp_path / "lm", "llama")
    batch = pad([[word, word, word, word + 1] for word in range(3, 20)], 0)
    module = critic(lm, rewards=count_good, n=2, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    variance = built(lm, rewards=count_good, n=2).loss(batch)[1].var(correction=0).item()
    trainer = fit(module, [batch] * 60, tmp_path)
    assert trainer.callback_metrics["train/loss"].item() < 0.1 * variance
    assert trainer.callback_metrics["train/explained_variance"] > 0.9


def test_values_and_loss_are_in_float32_under_autocast(tiny_reward: Path, tmp_path: Path) -> None:
    module = built(tiny_reward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, (loss, _) = module.values(**pad(ROWS, 0)), module.loss(pad(ROWS, 0))
    assert values.dtype == loss.dtype == torch.float32
    assert not values.equal(values.bfloat16().float())


def with_answers(responses: list[str], answer: list[str]) -> list[float]:
    return [0.0] * len(responses)


def test_a_reward_that_needs_columns_is_refused(tiny_reward: Path) -> None:
    message = r"LitCritic\(rewards=.*\): RewardFunction\(with_answers\): needs answer; .*text has no columns"
    for rewards in (with_answers, RewardFunction(with_answers), {"a": with_answers}):
        with pytest.raises(ValueError, match=message):
            critic(tiny_reward, rewards=rewards)


def test_models_that_are_no_critic_are_refused(tmp_path: Path) -> None:
    two = make_reward_model(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match=r"LitCritic\(model='.*'\): its head has 2 outputs, but a critic has 1; to"):
        built(two)
    assert built(two, model_kwargs={"ignore_mismatched_sizes": True}).values(**pad(ROWS, 0)).shape == (3, 3)
    with pytest.raises(ValueError, match=r"LitCritic\(model='.*'\): DistilBertModel reads later tokens"):
        built(make_reward_model(tmp_path / "encoder", "distilbert"))
    make_tokenizer(tmp_path)
    new = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    assert built(new, tokenizer=str(tmp_path)).values(**pad(ROWS, 0)).shape == (3, 3)


@pytest.mark.parametrize("batches", [3, 40])
def test_responses_that_leave_no_prompt_are_refused(tiny_reward: Path, tmp_path: Path, batches: int) -> None:
    """At the end of the epoch, or after 16 batches."""
    message = r"LitCritic\(response_tokens=7\): no training text is longer, which leaves no prompt; lower it, or raise"
    module = critic(tiny_reward, n=7)
    with pytest.raises(ValueError, match=message):
        fit(module, [pad(ROWS, 0)] * batches, tmp_path)
    assert module.trainer.global_step == min(batches, 15)
    with pytest.raises(ValueError, match=r"LitCritic\(response_tokens=7\): no validation text is longer"):
        make_trainer(tmp_path).validate(module, loader([pad(ROWS, 0)]), verbose=False)
    for wrong in (0, 2.5, True, "3"):
        with pytest.raises(ValueError, match=r"LitCritic\(response_tokens=.*\): must be an integer, at least 1"):
            critic(tiny_reward, n=wrong)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with text and with a model to start from."""
    write_rows(tmp_path / "rows.jsonl", [{"text": " ".join(WORDS[i : i + 6])} for i in range(8)])
    make_reward_model(tmp_path / "start", "llama", initializer_range=0.3)
    return tmp_path


def job(folder: Path, reward: Path) -> tuple[LitCritic, TextDataModule]:
    """A critic, and three batches of text an epoch in one process."""
    rows = str(folder / "rows.jsonl")
    data = TextDataModule(rows, val_path=rows, max_length=8, batch_size=3, seed=0)
    rewards = RewardModel(str(reward), aggregation="mean")
    return critic(folder / "start", rewards, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)), data


def test_checkpoints_hold_the_critic_alone_and_resume(tiny_reward: Path, folder: Path) -> None:
    module, data = job(folder, tiny_reward)
    trainer = make_trainer(folder, max_epochs=2)
    trainer.fit(module, data)
    half, data = job(folder, tiny_reward)
    trainer = make_trainer(folder, max_epochs=1)
    trainer.fit(half, data)
    trainer.save_checkpoint(folder / "x.ckpt")
    saved = torch.load(folder / "x.ckpt", weights_only=True)
    names = {
        f"model.{name}" for name in AutoModelForSequenceClassification.from_pretrained(folder / "start").state_dict()
    }
    assert saved["state_dict"].keys() == names
    assert len(saved["optimizer_states"][0]["state"]) == len(names)
    rest, data = job(folder, tiny_reward)
    make_trainer(folder, max_epochs=2).fit(rest, data, ckpt_path=folder / "x.ckpt", weights_only=True)
    assert all(value.equal(rest.state_dict()[name]) for name, value in module.state_dict().items())
    assert any(not value.equal(half.state_dict()[name]) for name, value in module.state_dict().items())


def test_the_model_card_names_the_reward(tiny_reward: Path, tmp_path: Path) -> None:
    """A critic is of no use without it."""
    module = built(tiny_reward, rewards={"good": {"source": count_good, "weight": 2.0}, "length": lengths})
    module.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    good, length = "good: 2 x `RewardFunction(count_good)`", "length: 1 x `RewardFunction(lengths)`"
    assert f"| reward | {good}, {length}, of the last 3 tokens |" in card


def test_an_export_may_not_replace_the_reward_model(tiny_reward: Path, tmp_path: Path) -> None:
    module = critic(tmp_path, rewards={"good": count_good, "model": RewardModel(str(tiny_reward))})
    assert set(folders_of(module).values()) == {str(tmp_path), str(tiny_reward)}


def test_an_export_from_a_checkpoint_runs_no_reward(tiny_reward: Path) -> None:
    arguments = {"model": str(tiny_reward), "rewards": "evil.f", "response_tokens": 3}
    module = build({"model": {"class_path": "lit_ppo.LitCritic", "init_args": arguments}})
    assert isinstance(module, LitCritic)


def test_the_reward_follows_its_module(tiny_reward: Path) -> None:
    module = built(tiny_reward, rewards={"model": RewardModel(str(tiny_reward)), "length": lengths})
    (reward,) = (part for part in module.rewards.modules() if isinstance(part, RewardModel))  # type: ignore[union-attr]
    assert not any(p.requires_grad for p in reward.parameters())
    assert not set(reward.parameters()) & set(module.parameters())
    module.to("meta")
    assert {p.device.type for p in reward.parameters()} == {"meta"}


def train(folder: Path, reward: Path, strategy: str) -> None:
    module, data = job(folder, reward)
    trainer = make_trainer(folder, max_epochs=2, devices=n_ranks(), strategy=strategy, inference_mode=True)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / f"{strategy}.ckpt")
    module.save_pretrained(folder / strategy)
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(metrics, folder / f"{strategy}.pt")


def test_strategies_agree(tiny_reward: Path, folder: Path) -> None:
    """FSDP2 against DDP: weights and metrics after four steps on two ranks; checkpoints are full and alike."""
    for strategy in ("ddp", "fsdp2"):
        on_ranks(2, train, folder, tiny_reward, strategy, folder=folder / "ranks")
    one, two = (load_file(folder / strategy / "model.safetensors") for strategy in ("ddp", "fsdp2"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    ddp, fsdp2 = (torch.load(folder / f"{strategy}.pt") for strategy in ("ddp", "fsdp2"))
    assert {"val/loss", "val/explained_variance"} <= ddp.keys()
    assert fsdp2 == pytest.approx(ddp, rel=1e-2, abs=1e-3)
    keys = [torch.load(folder / f"{s}.ckpt", weights_only=True)["state_dict"].keys() for s in ("ddp", "fsdp2")]
    assert keys[0] == keys[1]


def train_on(n: int, folder: Path, lm: Path) -> None:
    data = TextDataModule(str(folder / "four.jsonl"), batch_size=4 // n)
    module = critic(lm, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer = make_trainer(folder, devices=n, strategy="ddp" if n > 1 else "auto")
    trainer.fit(module, data)
    found = {"loss": trainer.callback_metrics["train/loss"], "weights": weights(module)}
    torch.save(found, folder / f"{n}-{trainer.global_rank}.pt")


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """One step on four texts; one is too short to count, so one rank has two that do and the other one."""
    make_reward_model(tmp_path / "start", "llama", initializer_range=0.3)
    write_rows(tmp_path / "four.jsonl", [{"text": " ".join(WORDS[:n])} for n in (1, 5, 6, 9)])
    train_on(1, tmp_path, tmp_path / "start")
    on_ranks(2, train_on, 2, tmp_path, tmp_path / "start", folder=tmp_path / "ranks")
    one = torch.load(tmp_path / "1-0.pt")
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"2-{rank}.pt"), one, rtol=1e-5, atol=1e-6)
