"""Validation, test and prediction: held-out prompts, fixed draws, numbers by hand."""

import json
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForSequenceClassification

from lit_ppo.callbacks import ReferenceUpdate
from lit_ppo.ppo.metrics import Progress
from lit_ppo.rewards import RewardModel
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import MemoryLogger, count_good, make_data, make_module, make_trainer, write_prompts


@pytest.fixture
def data(tmp_path):
    held_out = str(write_prompts(tmp_path / "held_out.jsonl", 5))
    return make_data(tmp_path, val_path=held_out, test_path=held_out, predict_path=held_out, batch_size=3)


def test_validation_reports_its_phases_and_counts_for_no_update(tmp_path, tiny_lm, data):
    """Two batches, and each once more by the reference."""
    seen = []

    def scored(prompts, responses):
        seen.append((module.progress.phase, module.progress.detail))
        return count_good(prompts, responses)

    module = make_module(tiny_lm, rewards=scored)
    sampled = module.rollout
    module.rollout = lambda *args, **options: seen.append(module.progress.phase) or sampled(*args, **options)
    make_trainer(tmp_path).validate(module, data, verbose=False)
    assert seen == ["rollout", ("score", "")] * 4
    assert module.progress == Progress(phase="", detail="", since=None, seconds={})


def long(prompts, responses):
    return [float(len(response.split())) for response in responses]


def short(prompts, responses):
    return [-float(len(response.split())) for response in responses]


def held_out(tmp_path):
    return [json.loads(line)["prompt"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]


def win_rate(ours, theirs):
    """By counting, over all prompts."""
    return sum((a > b) + (a == b) / 2 for a, b in zip(ours, theirs, strict=True)) / len(ours)


def test_the_start_is_measured_first(tmp_path, sharp_lm, data):
    """Before the first update the actor is the reference: no KL, half of the wins, and scores by hand.

    Batches of 3 and 2: means over prompts, not over batches.
    """
    logger = MemoryLogger()
    module = make_module(sharp_lm, eval_rewards={"long": long, "short": short}, minibatch_size=3)
    make_trainer(tmp_path, max_steps=4, val_check_interval=2, logger=logger).fit(module, data)
    order = ["val" if "val/score" in row else "train" for row in logger.rows if {"val/score", "policy/loss"} & {*row}]
    assert order == ["val", "train", "train", "val", "train", "train", "val"]
    start, _, end = (row for row in logger.rows if "val/score" in row)
    fresh, prompts = make_module(sharp_lm), held_out(tmp_path)
    both = [m.rollout(p, stream=s) for m in (fresh, module) for p, s in halves(prompts)]
    before, after = both[0].responses + both[1].responses, both[2].responses + both[3].responses
    assert before != after
    assert end["val/length"] == pytest.approx(sum(int(e.response_mask.sum()) for e in both[2:]) / 5)
    assert end["val/ended_fraction"] == pytest.approx(sum(int(e.ended.sum()) for e in both[2:]) / 5)
    for row, responses in ((start, before), (end, after)):
        for name, reward in (("", count_good), ("/long", long), ("/short", short)):
            ours, theirs = reward([], responses), reward([], before)
            assert row[f"val/score{name}"] == pytest.approx(sum(ours) / 5)
            assert row[f"val/win_rate{name}"] == pytest.approx(win_rate(ours, theirs))
    assert start["val/kl"] == pytest.approx(0.0, abs=1e-5)
    kl = [module.rollout(p, stream=s).kl.sum() for p, s in halves(prompts)]
    assert end["val/kl"] == pytest.approx(float(sum(kl)) / 5, rel=1e-5)  # nats a response
    assert start["val/win_rate"] == start["val/win_rate/long"] == 0.5
    assert end["val/win_rate/long"] != 0.5
    assert end["val/win_rate/long"] == pytest.approx(1 - end["val/win_rate/short"])


def test_lightning_takes_the_first_validation_for_one_too(tmp_path, tiny_lm, data):
    """Its own progress bars and callbacks ask the trainer what it is doing."""
    seen = []

    class Watch(L.Callback):
        def on_validation_batch_start(self, trainer, *_):
            seen.append((trainer.global_step, trainer.validating, trainer.training))

        def on_train_batch_start(self, trainer, *_):
            seen.append((trainer.global_step, trainer.validating, trainer.training))

    once = {"val_check_interval": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = make_trainer(tmp_path, callbacks=[Watch()], max_steps=1, **once)
    trainer.fit(make_module(tiny_lm, minibatch_size=3), data)
    assert seen == [(0, True, False), (0, False, True), (1, True, False)]


def halves(prompts):
    """Batches of the data module, and the streams that they are sampled by."""
    return [(prompts[:3], "val/0"), (prompts[3:], "val/1")]


@pytest.fixture(scope="module")
def sharp_lm(tmp_path_factory):
    return make_causal_lm(tmp_path_factory.mktemp("sharp"), scale=4.0)


def test_the_reference_answers_once(tmp_path, sharp_lm, data):
    """Once a batch for a full run; again where the prompts are others."""
    module = make_module(sharp_lm, eval_rewards={"long": long}, minibatch_size=3)
    asked = []
    rollout = module.rollout

    def counting(prompts, **kwargs):
        asked.extend([kwargs["stream"]] if kwargs.get("policy") == "reference" else [])
        return rollout(prompts, **kwargs)

    module.rollout = counting
    make_trainer(tmp_path, max_steps=2, val_check_interval=1).fit(module, data)
    assert asked == ["val/0", "val/1"]
    other = make_data(tmp_path, val_path=str(write_prompts(tmp_path / "more.jsonl", 6)), batch_size=3)
    make_trainer(tmp_path).validate(module, other, verbose=False)
    assert asked == ["val/0", "val/1", "val/1"]  # the first three prompts are the same


def test_validation_and_eval_rewards_change_nothing(tmp_path, sharp_lm, data):
    """Neither the training stream, nor the weights, nor what is in a checkpoint."""
    logger = MemoryLogger()
    with_validation = make_module(sharp_lm, minibatch_size=3, eval_rewards={"long": long})
    make_trainer(tmp_path, max_steps=3, val_check_interval=1, logger=logger).fit(with_validation, data)
    assert len([row for row in logger.rows if "val/score" in row]) == 1 + 3
    without = make_module(sharp_lm, minibatch_size=3)
    make_trainer(tmp_path, max_steps=3).fit(without, make_data(tmp_path, batch_size=3))
    one, other = (module.state_dict() for module in (without, with_validation))
    assert one.keys() == other.keys()
    assert all(value.equal(other[name]) for name, value in one.items())


def test_a_reference_that_moves_answers_every_time(tmp_path, sharp_lm, data):
    """Moved to the actor after each update, it says what the actor says: half of the wins, whatever was learnt."""
    logger = MemoryLogger()
    trainer = make_trainer(
        tmp_path, max_steps=4, val_check_interval=2, callbacks=[ReferenceUpdate(every=1)], logger=logger
    )
    trainer.fit(make_module(sharp_lm, eval_rewards={"long": long}, minibatch_size=3), data)
    rows = [row for row in logger.rows if "val/score" in row]
    assert len({row["val/score/long"] for row in rows}) > 1
    assert all(row["val/win_rate"] == row["val/win_rate/long"] == 0.5 for row in rows)


def test_a_reward_model_may_be_an_eval_reward(tmp_path, sharp_lm, tiny_reward, data):
    """It is loaded, frozen, stays in eval mode and out of checkpoints; a resumed run does not measure its start."""

    def make() -> Any:
        return make_module(sharp_lm, eval_rewards={"other": RewardModel(str(tiny_reward))}, minibatch_size=3)

    module, trainer = make(), make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)
    assert not any("reward" in name for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in module.eval_rewards.parameters())
    assert not any(part.training for part in module.train().eval_rewards.modules())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again, logger = make(), MemoryLogger()
    resumed = make_trainer(tmp_path, max_steps=2, val_check_interval=1, logger=logger)
    resumed.fit(again, data, ckpt_path=tmp_path / "one.ckpt")
    (row,) = (row for row in logger.rows if "val/score" in row)
    stock, tokenizer = AutoModelForSequenceClassification.from_pretrained(tiny_reward), again.tokenizer
    scores = []
    for one in (again, make_module(sharp_lm)):
        experiences = [one.rollout(p, stream=s) for p, s in halves(held_out(tmp_path))]
        texts = [p + r for e in experiences for p, r in zip(e.prompts, e.responses, strict=True)]
        scores.append([stock(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts])
    assert row["val/score/other"] == pytest.approx(sum(scores[0]) / 5, rel=1e-4)
    assert row["val/win_rate/other"] == pytest.approx(win_rate(*scores))


def test_eval_rewards_are_checked_before_the_first_update(tmp_path, sharp_lm, data):
    """They need names, of their own, and are tried on a prompt."""
    for given in ({}, long, ["long"]):
        with pytest.raises(ValueError, match=r"LitPPO\(eval_rewards=.*: give a dict of score sources by name"):
            make_module("lm", eval_rewards=given)
    with pytest.raises(ValueError, match=r"LitPPO\(eval_rewards='long'\): a training reward has this name"):
        make_module("lm", rewards={"long": long, "good": count_good}, eval_rewards={"long": short})
    module = make_module(sharp_lm, eval_rewards={"broken": lambda prompts, responses: [1 / 0]}, minibatch_size=3)
    with pytest.raises(ValueError, match=r"first val prompt: .*division by zero"):
        make_trainer(tmp_path, num_sanity_val_steps=0).fit(module, data)
    assert module.rollouts == 0


def test_predictions_lie_with_the_logs_once_by_draws_of_each_batchs_own(tmp_path, tiny_lm, data, monkeypatch):
    """Batches of 3 and 2 prompts, two samples each; asked twice, a run writes its last answers; of ranks the first."""
    rewards = {"good": count_good, "short": {"source": short, "weight": 0.0}}
    module = make_module(tiny_lm, samples_per_prompt=2, rewards=rewards)
    logger = CSVLogger(tmp_path / "logs", name="run", version=4)
    for _ in range(2):
        returned = make_trainer(tmp_path, logger=logger).predict(module, data)
    rows = [json.loads(line) for line in (tmp_path / "logs/run/version_4/predictions.jsonl").read_text().splitlines()]
    prompts = held_out(tmp_path)
    batches = [module.rollout(some, stream=f"predict/{i}") for i, some in enumerate((prompts[:3], prompts[3:]))]
    responses = [response for batch in batches for response in batch.responses]
    assert rows == [row for batch in returned for row in batch]
    assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(2)]
    assert [row["response"] for row in rows] == responses
    assert responses[0] != responses[1]
    assert [row["score"] for row in rows] == [row["score/good"] for row in rows] == count_good([], responses)
    assert [row["score/short"] for row in rows] == short([], responses)
    monkeypatch.setattr("lit_ppo.ppo.evaluate.rank", lambda: 1)
    make_trainer(tmp_path / "second", logger=False).predict(module, data)
    assert not (tmp_path / "second/predictions.jsonl").exists()


def test_nothing_in_a_prediction_is_obeyed(tmp_path, tiny_lm, data, monkeypatch):
    """Not by a terminal, nor by what counts lines; letters of any language stay readable."""
    wicked = 'schön 好 \x1b[2J\x9b31m\x00\x7f\n\r\x85\u2028\u202e\u2066 \ud800 \U000e0041 "\\'
    module = make_module(tiny_lm)
    rollout = module.rollout

    def saying(*args, **kwargs):
        experience = rollout(*args, **kwargs)
        experience.responses = [wicked] * len(experience)
        return experience

    monkeypatch.setattr(module, "rollout", saying)
    make_trainer(tmp_path / "new", logger=False).predict(module, data)
    text = (tmp_path / "new/predictions.jsonl").read_bytes().decode()
    assert [json.loads(line)["response"] for line in text.splitlines()] == [wicked] * 5
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.count("schön 好") == 5


def test_each_of_several_rewards_is_logged_under_its_name(tmp_path, tiny_lm, data):
    """Without a reference there is no win rate."""
    rewards = {"good": count_good, "long": {"source": long, "weight": 0.0}}
    module = make_module(tiny_lm, rewards=rewards, eval_rewards={"short": short}, reference=None, minibatch_size=3)
    logger = MemoryLogger()
    make_trainer(tmp_path, max_steps=1, val_check_interval=1, logger=logger).fit(module, data)
    for split in ("objective", "val"):
        row = next(row for row in logger.rows if f"{split}/score" in row)
        assert row[f"{split}/score/good"] == row[f"{split}/score"] != row[f"{split}/score/long"]
    assert {name.removeprefix("val/") for name in row if name.startswith("val/")} == {
        "score", "score/good", "score/long", "score/short", "kl", "length", "ended_fraction"
    }  # fmt: skip
    assert row["val/score/short"] == -row["val/score/long"]
