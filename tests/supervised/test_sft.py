"""LitSFT: losses against a loop over single texts, and what is loaded, trained and saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_ppo.data.text import TextDataModule
from lit_ppo.optim.schedules import WarmupCosine
from lit_ppo.supervised.reward_model import LitRewardModel
from lit_ppo.supervised.sft import LitSFT
from tests.helpers.ranks import on_ranks
from tests.helpers.supervised import HOW_TESTS_USE_LIGHTNING, fit, loader, make_trainer, pad, text_batch, weights
from tests.helpers.tiny import FAMILIES, WORDS, make_causal_lm, make_tokenizer

pytestmark = HOW_TESTS_USE_LIGHTNING

ROWS = [[3, 4, 5, 6, 7, 8, 9, 1], [10, 4, 11], [12, 5, 9, 9, 1]]


@pytest.fixture
def sharp_lm(tmp_path: Path) -> Path:
    """Weights ten times the usual ones, so that losses differ much between tokens."""
    return make_causal_lm(tmp_path / "sharp", scale=10.0)


def losses_one_by_one(path: Path, rows: list[list[int]]) -> list[float]:
    """Next-token losses of every row alone, by the stock model's logits in float64."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    losses = []
    for row in rows:
        logits = model(torch.tensor([row])).logits[0].double()
        for position in range(len(row) - 1):
            scores = logits[position]
            losses.append((scores.exp().sum().log() - scores[row[position + 1]]).item())
    return losses


def built(model: Any, **kwargs: Any) -> LitSFT:
    module = LitSFT(str(model), **kwargs)
    module.configure_model()
    return module


@pytest.mark.parametrize(("algorithm", "size"), [("norm", 2.0), ("value", float("inf"))])
def test_fused_optimizers_have_their_gradients_clipped_in_bf16_mixed(
    sharp_lm: Path, tmp_path: Path, algorithm: str, size: float
) -> None:
    """SGD with a rate of 1 moves the weights by the clipped gradient."""
    module = built(sharp_lm, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0, fused=True))
    before = weights(module).clone()
    options = {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": algorithm, "precision": "bf16-mixed"}
    fit(module, [text_batch(ROWS)], tmp_path, **options)
    moved = weights(module) - before
    assert float(torch.linalg.vector_norm(moved, size)) == pytest.approx(1e-2, rel=1e-3)  # float32 weights of about 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_loss_is_the_mean_over_tokens_whatever_the_padding(tmp_path: Path, family: str) -> None:
    path = make_causal_lm(tmp_path, family, scale=10.0, **({"resid_pdrop": 0.0} if family == "gpt2" else {}))
    module = built(path)
    module.eval()  # GPT-2's dropout
    expected = losses_one_by_one(path, ROWS)
    assert max(expected) - min(expected) > 1.0
    for width in (None, 20):
        total, tokens = module.token_losses(text_batch(ROWS, width=width))
        assert tokens == len(expected) == 13
        assert total.item() == pytest.approx(sum(expected), rel=1e-5)


def test_positions_without_a_label_carry_no_loss(sharp_lm: Path) -> None:
    """A prompt of three tokens without labels: only the tokens after it count, the first of them included."""
    module = built(sharp_lm)
    module.eval()
    batch = text_batch(ROWS[:1])
    batch["labels"][0, :3] = -100
    total, tokens = module.token_losses(batch)
    assert tokens == 5
    assert total.item() == pytest.approx(sum(losses_one_by_one(sharp_lm, ROWS[:1])[2:]), rel=1e-5)


def test_validation_weights_every_token_alike(sharp_lm: Path, tmp_path: Path) -> None:
    """Batches of 7 + 2 and 4 targets: the mean of the batches' means would be another number."""
    expected = losses_one_by_one(sharp_lm, ROWS)
    mean = sum(expected) / len(expected)
    assert abs((sum(expected[:9]) / 9 + sum(expected[9:]) / 4) / 2 - mean) > 0.01
    module = LitSFT(str(sharp_lm))
    trainer = make_trainer(tmp_path)
    for _ in range(2):  # the second time nothing is left of the first
        (metrics,) = trainer.validate(module, loader([text_batch(ROWS[:2]), text_batch(ROWS[2:])]), verbose=False)
        assert metrics["val/loss"] == pytest.approx(mean, rel=1e-5)
        assert metrics["val/perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-5)


def validate_on(n_ranks: int, model: Path, rows: Path) -> None:
    data = TextDataModule(str(rows), val_path=str(rows), batch_size=1)
    trainer = make_trainer(rows.parent, devices=n_ranks, strategy="ddp" if n_ranks > 1 else "auto")
    (metrics,) = trainer.validate(LitSFT(str(model)), data, verbose=False)
    if trainer.is_global_zero:
        rows.with_name(f"{n_ranks}.json").write_text(json.dumps(metrics))


def test_two_ranks_validate_as_one(sharp_lm: Path, tmp_path: Path) -> None:
    """Rows of unequal length, an even number of them: a mean of the ranks' means would be another number."""
    texts = [" ".join(WORDS[i : i + 2 + i % 2 * 9]) for i in range(10)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    validate_on(1, sharp_lm, rows)
    on_ranks(2, validate_on, 2, sharp_lm, rows, folder=tmp_path / "ranks")
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert one.keys() == {"val/loss", "val/perplexity"}
    assert two == pytest.approx(one, rel=1e-5)


def train_on(n_ranks: int, model: Path, rows: Path) -> None:
    data = TextDataModule(str(rows), batch_size=2 // n_ranks)
    trainer = make_trainer(rows.parent, devices=n_ranks, strategy="ddp" if n_ranks > 1 else "auto")
    module = LitSFT(str(model), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer.fit(module, data)
    found = {"loss": trainer.callback_metrics["train/loss"], "weights": weights(module)}
    torch.save(found, rows.with_name(f"{n_ranks}-{trainer.global_rank}.pt"))


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """One step on two texts, of 2 and 9 tokens: the mean of the ranks' means would be another loss."""
    model = make_causal_lm(tmp_path / "lm", "llama", scale=10.0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": " ".join(WORDS[:n])}) for n in (2, 9)))
    train_on(1, model, rows)
    on_ranks(2, train_on, 2, model, rows, folder=tmp_path / "ranks")
    one = torch.load(tmp_path / "1-0.pt")
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"2-{rank}.pt"), one, rtol=1e-5, atol=1e-6)


def test_a_batch_without_targets_costs_nothing(sharp_lm: Path, tmp_path: Path) -> None:
    module = LitSFT(str(sharp_lm))
    trainer = fit(module, [text_batch([[3], [4]])], tmp_path)
    assert trainer.callback_metrics["train/loss"] == 0.0
    assert weights(module).isfinite().all()
    batches = [text_batch([[3]]), text_batch(ROWS)]
    (metrics,) = make_trainer(tmp_path).validate(built(sharp_lm), loader(batches), verbose=False)
    assert metrics["val/loss"] == pytest.approx(sum(losses_one_by_one(sharp_lm, ROWS)) / 13, rel=1e-5)


def test_one_step_of_plain_gradient_descent(tmp_path: Path) -> None:
    """Weights move by the learning rate times the stock model's gradient, clipped to a norm of 0.1."""
    path = make_causal_lm(tmp_path, "llama")
    module = LitSFT(str(path), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    trainer = fit(module, [text_batch(ROWS)], tmp_path, gradient_clip_val=0.1)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batch = text_batch(ROWS)
    loss = stock(**batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.1)
    assert norm > 0.1
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter -= 0.5 * parameter.grad
    torch.testing.assert_close(weights(module), torch.cat([p.detach().flatten() for p in stock.parameters()]))


@pytest.mark.parametrize(("kind", "rate"), [(LitSFT, 5e-6), (LitRewardModel, 1e-5)])
def test_the_default_optimizer_is_adamw(tiny_llama: Path, kind: Any, rate: float) -> None:
    module = kind(str(tiny_llama))
    module.configure_model()
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == rate


def test_scheduler_steps_with_every_optimizer_step(tiny_llama: Path, tmp_path: Path) -> None:
    """Six batches, two to a step: rates 1, 0.5, 0.25, then 0.125 for a fourth step that does not come."""
    module = LitSFT(
        str(tiny_llama),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5),
    )
    trainer = fit(module, [text_batch(ROWS)] * 6, tmp_path, accumulate_grad_batches=2)
    assert trainer.global_step == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_steps": 6, "max_epochs": -1}])
def test_warmup_cosine_takes_its_length_from_the_run(tiny_llama: Path, tmp_path: Path, length: dict[str, int]) -> None:
    module = LitSFT(str(tiny_llama), scheduler=lambda o: WarmupCosine(o, warmup_steps=2))
    trainer = fit(module, [text_batch(ROWS)] * 3, tmp_path, **length)
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == 6  # type: ignore[union-attr]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_warmup_cosine_needs_a_run_with_an_end(tiny_llama: Path, tmp_path: Path) -> None:
    module = LitSFT(str(tiny_llama), scheduler=lambda o: WarmupCosine(o))
    with pytest.raises(ValueError, match=r"the run has no end; set trainer\.max_steps or trainer\.max_epochs"):
        fit(module, [text_batch(ROWS)], tmp_path, max_epochs=-1)


def test_a_plateau_scheduler_is_refused(tiny_llama: Path) -> None:
    module = built(tiny_llama, scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"LitSFT\(scheduler=ReduceLROnPlateau\)"):
        module.configure_optimizers()


def test_saved_folder_loads_with_weights_tokenizer_and_generation_config(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    module = LitSFT(dict(FAMILIES["llama"]), tokenizer=str(tmp_path / "tokenizer"))
    fit(module, [text_batch(ROWS)], tmp_path)
    module.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert module.model is not None
    ids = torch.tensor(ROWS[:1])
    torch.testing.assert_close(loaded(ids).logits, module.model.eval()(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("the film was good")["input_ids"] == module.tokenizer("the film was good")["input_ids"]
    generation = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_stop_token_that_was_trained_is_exported(tmp_path: Path) -> None:
    """A chat's end of turn, which neither tokenizer nor checkpoint name; cut texts end anywhere."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "<end>"]}, replace_extra_special_tokens=False
    )
    think, end = tokenizer.convert_tokens_to_ids(["<think>", "<end>"])
    path = make_causal_lm(tmp_path / "lm", tokenizer=tokenizer)
    for folder, rows, stops in (
        ("chats", [[5, 6, end], [7, end, 8], [think, 9, end], [5, think]], [end, 1]),
        ("pieces", [[5, 6, end], [7, 8], [think, 9, 9, 9], [5, think]], 1),
        ("packed chats", [[-5, 6, end, -7, -8, 9, end, -9], [5, end, -6, 7, end, -8, 9, 9], [-5, -5, 6, 6]], [end, 1]),
        ("packed texts", [[5, 6, 7, 8], [9, 9, 9, 9], [8, 5, end, 6], [5, 6, 7, 8], [5, 6, 7, 5]], 1),
    ):
        batch = text_batch([[abs(token) for token in row] for row in rows])  # without a loss where negative
        signs = pad([[int(token < 0) for token in row] for row in rows], 0)["input_ids"]
        batch["labels"] = batch["labels"].masked_fill(signs == 1, -100)
        module = LitSFT(str(path))
        fit(module, [batch], tmp_path, max_steps=1)
        module.save_pretrained(tmp_path / folder)
        assert GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id == stops
        checkpoint: dict[str, Any] = {}
        module.on_save_checkpoint(checkpoint)
        again = LitSFT(str(path))  # as `lit-ppo export` and a resumed run do
        again.on_load_checkpoint(checkpoint)
        assert again.trained_stop() == module.trained_stop()
