"""Validation, test, prediction and the report: held-out prompts, fixed draws, numbers by hand."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_ppo.report import RunReport
from tests.toys import MemoryLogger, count_good, make_data, make_module, make_trainer, write_prompts


@pytest.fixture
def data(tmp_path):
    held_out = str(write_prompts(tmp_path / "held_out.jsonl", 5))
    return make_data(tmp_path, val_path=held_out, test_path=held_out, predict_path=held_out, batch_size=3)


@pytest.mark.parametrize("name", ["val", "test"])
def test_score_kl_and_length_are_means_over_the_held_out_prompts(tmp_path, tiny_lm, data, name):
    """Batches of 3 and 2: a mean over prompts, not over batches."""
    module = make_module(tiny_lm, samples_per_prompt=2, reference=None)
    trainer = make_trainer(tmp_path)
    (trainer.validate if name == "val" else trainer.test)(module, data, verbose=False)
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    batches = [module.rollout(prompts[i : i + 3], samples_per_prompt=1, stream=f"{name}/{i // 3}") for i in (0, 3)]
    responses = [response for batch in batches for response in batch.responses]
    lengths = [int(n) for batch in batches for n in batch.response_mask.sum(1)]
    ended = [float(e) for batch in batches for e in batch.ended]
    metrics = trainer.callback_metrics
    assert metrics[f"{name}/score"].item() == pytest.approx(sum(count_good([], responses)) / 5)
    assert metrics[f"{name}/length"].item() == pytest.approx(sum(lengths) / 5)
    assert metrics[f"{name}/ended_fraction"].item() == pytest.approx(sum(ended) / 5)
    assert metrics[f"{name}/kl"].item() == 0.0


def test_validation_during_training_moves_nothing(tmp_path, tiny_lm, data):
    """Neither the training stream nor the weights: with and without validation the run is the same."""
    with_validation, without = (make_module(tiny_lm, minibatch_size=3) for _ in range(2))
    logger = MemoryLogger()
    make_trainer(tmp_path, max_steps=3, val_check_interval=1, logger=logger).fit(with_validation, data)
    assert len([row for row in logger.rows if "val/score" in row]) == 3
    make_trainer(tmp_path, max_steps=3).fit(without, make_data(tmp_path, batch_size=3))
    for name, value in without.state_dict().items():
        assert value.equal(with_validation.state_dict()[name])


def test_predictions_are_written_as_json_lines(tmp_path, tiny_lm, data):
    module = make_module(tiny_lm, samples_per_prompt=2)
    trainer = make_trainer(tmp_path, logger=False)
    returned = trainer.predict(module, data)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert rows == [row for batch in returned for row in batch]
    assert [row["score"] for row in rows] == count_good([], [row["response"] for row in rows])
    assert rows[0]["prompt"] == rows[1]["prompt"]
    assert rows[0]["response"] != rows[1]["response"]


def test_each_of_several_rewards_is_logged_under_its_name(tmp_path, tiny_lm, data):
    def length(prompts, responses):
        return [len(r.split()) / 7 for r in responses]

    rewards = {"good": count_good, "long": {"source": length, "weight": 0.0}}
    module = make_module(tiny_lm, rewards=rewards, minibatch_size=3)
    logger = MemoryLogger()
    trainer = make_trainer(tmp_path, max_steps=1, val_check_interval=1, logger=logger)
    trainer.fit(module, data)
    row = next(row for row in logger.rows if "objective/score" in row)
    assert row["objective/score/good"] == row["objective/score"] != row["objective/score/long"]
    row = next(row for row in logger.rows if "val/score" in row)
    assert row["val/score/good"] == row["val/score"] != row["val/score/long"]
    first = make_trainer(tmp_path, logger=False).predict(module, data)[0][0]
    assert first["score/good"] == first["score"] == count_good([], [first["response"]])[0]
    assert first["score/long"] == pytest.approx(length([], [first["response"]])[0])


def test_the_result_is_a_hugging_face_folder(tmp_path, tiny_lm):
    module = make_module(tiny_lm, generation={"max_new_tokens": 10, "eos_token_id": [1, 7]})
    make_trainer(tmp_path).fit(module, make_data(tmp_path))
    module.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in loaded.state_dict().items():
        assert value.equal(module.actor.model.state_dict()[name])
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == module.tokenizer.get_vocab()
    generation = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (generation.max_new_tokens, generation.eos_token_id, generation.temperature) == (10, [1, 7], 1.0)


def report(capsys, tmp_path, tiny_lm, data, **arguments):
    module = make_module(tiny_lm, minibatch_size=3)
    trainer = make_trainer(tmp_path, callbacks=[RunReport(**arguments)])
    trainer.fit(module, data)
    return capsys.readouterr().out, module


def test_the_report_compares_the_same_prompts_before_and_after(capsys, tmp_path, tiny_lm, data):
    out, trained = report(capsys, tmp_path, tiny_lm, data, prompts=4, samples=2)
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()][:4]
    assert "The same 4 prompts" in out
    means = []
    for name, module in (("before", make_module(tiny_lm)), ("after", trained)):
        responses = module.rollout(prompts, stream="report").responses
        for response, score in list(zip(responses, count_good([], responses), strict=True))[:2]:
            assert f"{name:6} {score:+7.2f}  {response}" in out
        means.append(sum(count_good([], responses)) / 4)
    assert f"mean score {means[0]:+.3f} -> {means[1]:+.3f}" in out
    assert "mean kl    +0.000 ->" in out


def test_the_report_can_be_shorter_or_off(capsys, tmp_path, tiny_lm, data):
    assert report(capsys, tmp_path, tiny_lm, data, prompts=4, samples=1)[0].count("before ") == 2  # title and one pair
    assert "before" not in report(capsys, tmp_path, tiny_lm, data, prompts=0, samples=0)[0]


def test_a_resumed_report_compares_with_the_whole_runs_start():
    first, second = RunReport(), RunReport()
    first._before = {"score": 1.0}
    second.load_state_dict(first.state_dict())
    assert second._before == {"score": 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"), [({"prompts": -1}, r"prompts=-1"), ({"prompts": 2, "samples": 3}, r"samples=3")]
)
def test_bad_report_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=rf"RunReport\({message}\)"):
        RunReport(**arguments)
