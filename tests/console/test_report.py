"""Samples before and after a run: the same held-out prompts, with numbers by hand."""

import json

import pytest

from lit_ppo.console.report import RunReport
from tests.helpers.toys import count_good, make_data, make_module, make_trainer, write_prompts


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path, val_path=str(write_prompts(tmp_path / "held_out.jsonl", 5)), batch_size=3)


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
    assert "before" not in report(capsys, tmp_path, tiny_lm, data, prompts=0)[0]


def test_a_resumed_report_compares_with_the_whole_runs_start():
    first, second = RunReport(), RunReport()
    first._before = {"score": 1.0}
    second.load_state_dict(first.state_dict())
    assert second._before == {"score": 1.0}


@pytest.mark.parametrize(("prompts", "printed"), [(1, 1), (2, 2), (32, 3)])
def test_fewer_prompts_than_samples_by_default_print_all(prompts, printed):
    assert min(RunReport(prompts=prompts).samples, prompts) == printed


@pytest.mark.parametrize(
    ("arguments", "message"), [({"prompts": -1}, r"prompts=-1"), ({"prompts": 2, "samples": 3}, r"samples=3")]
)
def test_bad_report_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=rf"RunReport\({message}\)"):
        RunReport(**arguments)
