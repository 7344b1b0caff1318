"""What the benchmarks measure, without asserting on time: FLOPs, lengths, scripts, ratios, and a tiny job in full."""

import contextlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import agreement, files, monitors, overhead, quickstart_runs, report, scaling, speed, tuning
from benchmarks.jobs import EOS, FIRST_WORD, JOBS, KEY, response_length, script
from benchmarks.measure import PHASES, Clock, update_flops
from benchmarks.runner import Runner
from benchmarks.scripted import Script, Scripted, scripted_multinomial
from lit_ppo.generation.config import neutral
from lit_ppo.models.actor_critic import Actor
from lit_ppo.rewards import RewardModel
from tests.helpers.tiny import make_reward_model

ROOT = Path(__file__).parent.parent


def test_flops_by_hand():
    """One row of 2 + 1 tokens, hidden 2, one layer, 5 tokens of vocabulary.

    Linear 24 * 4 * 3 = 288; attention 1 + 2 + 3 = 6 pairs of 4 * 2 = 48; two models: 672. Heads 2 * 2 * (5 + 1) = 24.
    Forward 696; with backward 2,088; two epochs 4,176.
    """
    assert update_flops(2, 1, 5, [(2, 1)], epochs=2) == 4176


@pytest.mark.parametrize("name", JOBS)
def test_lengths_are_those_of_the_job(name):
    job = JOBS[name]
    prompts, responses = script(job)
    lengths = [response_length(response) for response in responses]
    assert (len(prompts), len(responses)) == (job.prompts, job.prompts)
    assert (min(map(len, prompts)), max(map(len, prompts))) == (job.longest_prompt // 2, job.longest_prompt)
    assert np.mean([len(p) for p in prompts]) == pytest.approx(0.75 * job.longest_prompt, rel=0.02)
    assert {len(response) for response in responses} == {job.longest_response}
    assert max(lengths) == job.longest_response
    if job.mean_response is None:
        assert min(lengths) == job.longest_response
        assert not any(EOS in response for response in responses)
    else:  # the mean of min(G, m) is (1 - (1 - p)^m) / p
        p = 1 / job.mean_response
        assert np.mean(lengths) == pytest.approx((1 - (1 - p) ** job.longest_response) / p, rel=0.05)
        assert sum(EOS in response for response in responses) < job.prompts  # some are cut


def test_scripts_are_the_same_everywhere_and_tell_prompts_apart():
    job = JOBS["tiny"]
    assert script(job) == script(job)
    prompts, responses = script(job)
    assert len({tuple(prompt[-KEY:]) for prompt in prompts}) == job.prompts
    assert all(id >= FIRST_WORD for prompt in prompts for id in prompt)
    assert all(response.count(EOS) <= 1 for response in responses)
    tokenizer = files.make_tokenizer(job.vocabulary)  # the reward model reads text
    assert tokenizer(tokenizer.batch_decode(prompts))["input_ids"] == prompts


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return ids, mask


def test_our_sampling_says_what_the_script_says():
    """Rows given in another order; those that end leave the batch, and their rows of the script with them."""
    job = JOBS["tiny"]
    prompts, responses = script(job)
    order = [5, 0, 3, 1, 7]
    actor = Actor(files.make_model(job, "actor"))
    generate = actor.model.generate
    actor.model.generate = lambda **kw: generate(**kw, logits_processor=[Scripted(Script(prompts, responses))])
    ids, mask = left_padded([prompts[row] for row in order])
    config = neutral(max_new_tokens=job.longest_response, eos_token_id=EOS, pad_token_id=0)
    sampled = actor.generate(ids, mask, config, [(0, 0, 0, row, 0) for row in order])
    assert sampled.ids == [responses[row][: response_length(responses[row])] for row in order]


def test_stock_sampling_says_what_the_script_says():
    """As the other side samples: on past the stop token, with scores untouched."""
    job = JOBS["tiny"]
    prompts, responses = script(job)
    model = files.make_model(job, "actor")
    ids, mask = left_padded(prompts)
    multinomial = torch.multinomial
    with scripted_multinomial(Script(prompts, responses), ids):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            max_new_tokens=job.longest_response,
            do_sample=True,
            eos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
    assert output.sequences[:, ids.shape[1] :].tolist() == responses
    assert torch.isfinite(output.scores[0]).sum(1).min() > 1
    assert torch.multinomial is multinomial


def test_clock_gives_each_second_to_one_phase(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("benchmarks.measure.perf_counter", lambda: next(now))
    clock = Clock()
    clock.switch("forward")
    clock.switch("backward")
    clock.lap()
    assert clock.laps == [dict.fromkeys(PHASES, 0.0) | {"other": 1.0, "forward": 2.0, "backward": 4.0}]


def test_ratios_are_taken_pair_by_pair_and_shares_of_the_models_phases():
    pairs = [{"ours": {"seconds": a}, "trl": {"seconds": b}} for a, b in ((1, 2), (2, 3), (10, 40))]
    assert speed.ratio(pairs, "seconds") == {"median": 2.0, "lowest": 1.5, "highest": 4.0}
    run = {"flops": 60, "updates": [dict.fromkeys(PHASES, 9.0) | {"forward": 1.0, "backward": 2.0}]}
    assert speed.share_of_peak(run, matmul=100.0) == pytest.approx(0.2)


def test_tuning_keeps_the_fastest_of_each_setting():
    """x = 2 is better than 1; with it y = "b" is worse than "a"."""
    points = list(tuning.tune({"x": [1, 2], "y": ["a", "b"]}, lambda p: 10 / p["x"] + (p["y"] == "b")))
    assert points == [({"x": 1, "y": "a"}, 10.0), ({"x": 2, "y": "a"}, 5.0), ({"x": 2, "y": "b"}, 6.0)]


def test_agreement_looks_at_response_tokens_and_refuses_other_tokens():
    ours = {"response_mask": np.array([[1, 0]]), "response_ids": np.array([[7, 0]]), "x": np.array([[1.0, 9.0]])}
    theirs = {"response_ids": np.array([[7, 5, 5]]), "x": np.array([[1.5, 0.0, 0.0]])}
    assert agreement.largest_differences(ours, theirs, ("x",)) == {"x": 0.5}
    with pytest.raises(ValueError, match="different tokens"):
        agreement.largest_differences(ours, theirs | {"response_ids": np.array([[8, 5, 5]])}, ("x",))


def test_a_tiny_job_runs_in_full_and_makes_its_tables(tmp_path, monkeypatch):
    """Without TRL. The worker that is timed has its process; the one that writes files saves its imports here."""
    output, call = tmp_path / "tiny.json", Runner._call

    def files_here(runner, python, module, spec, environment):
        if module != "files":
            return call(runner, python, module, spec, environment)
        monkeypatch.setattr(sys, "argv", ["files", json.dumps(spec)])
        runpy.run_path(str(ROOT / "benchmarks/files.py"), run_name="__main__")
        return ""

    monkeypatch.setattr(Runner, "_call", files_here)
    speed.main(["--jobs", "tiny", "--pairs", "1", "--output", str(output)])
    (pair,) = json.loads(output.read_text())["jobs"]["tiny"]["pairs"]
    run = pair["ours"]
    assert run["optimizer_steps"] == 16
    assert set(run["phases"]) == set(PHASES)
    assert all(run["phases"][name] > 0 for name in PHASES)
    assert sum(run["phases"].values()) == pytest.approx(run["seconds"])
    assert run["share_of_peak"] > 0
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- /tables -->\nafter\n")
    report.update(page, [output])
    text = page.read_text()
    assert text.startswith("before\n<!-- tables -->\n")
    assert text.endswith("<!-- /tables -->\nafter\n")
    assert "old" not in text
    assert "| tiny |" in text


def test_the_pages_tables_are_those_of_the_results_and_both_sides_computed_the_same(tmp_path):
    folder = ROOT / "benchmarks" / "results"
    page, committed = tmp_path / "performance.md", (ROOT / "docs" / "performance.md").read_text()
    page.write_text(committed)
    report.update(page, sorted(folder.glob("*.json")))
    assert page.read_text() == committed
    points = json.loads((folder / "varied.json").read_text())["points"]
    assert (ROOT / "docs" / "scaling.svg").read_text() == scaling.draw(points)
    for path in folder.glob("speed*.json"):
        results = json.loads(path.read_text())
        for job in results["jobs"].values():
            assert results["asked"]["precision"] == "bf16-mixed" or job["agreement"]["agrees"]
            assert all(pair[side]["optimizer_steps"] == 16 for pair in job["pairs"] for side in ("ours", "trl"))


def test_agreement_allows_more_after_a_step_of_adam(monkeypatch):
    """Losses come in two passes: the first to 1e-5, the second to 1e-4."""
    mask = np.ones((1, 2))

    def sides(first, second):
        same = dict.fromkeys(("logprobs", "ref_logprobs", "values", "advantages"), mask) | {"policy_loss": [0.0, 0.0]}
        both = {"ours": [1.0, 2.0], "trl": [1.0 + first, 2.0 + second]}
        rows = {"response_ids": mask, "response_mask": mask}
        return lambda runner, side, folder: same | rows | {"value_loss": both[side]}

    runner = Runner()
    monkeypatch.setattr(Runner, "job_files", lambda self, job: contextlib.nullcontext(None))
    for first, second, agrees in ((0.0, 5e-5, True), (5e-5, 0.0, False), (0.0, 5e-4, False)):
        monkeypatch.setattr(agreement, "_captured", sides(first, second))
        found = agreement.check(runner, JOBS["tiny"])
        assert found["agrees"] is agrees
        assert found["largest_difference"]["value_loss_after_a_step"] == pytest.approx(second, abs=1e-9)


REVIEWS = [  # prompt, response
    ("We read a novel in bed", ", and I loved every page of it."),
    ("We read a fable in bed", ", and I loved every line of it."),
    ("I watched a western downtown", ". My uncle called it nothing"),
    ("I watched a western downtown", ". The plot was really superb."),
    ("I watched a comedy downtown", ". The cast was really dull."),
]


def test_gold_measures_of_reviews_by_hand():
    """A fable has no lines; the third is no review; "taste" is one pattern of two, each a quarter of four and more."""
    prompts, responses = map(list, zip(*REVIEWS, strict=True))
    assert quickstart_runs.readable(prompts, responses) == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert quickstart_runs.positive(prompts, responses) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert quickstart_runs.negative(prompts, responses) == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert quickstart_runs.by_subject(prompts, responses) == [-1.0, 0.0, 0.0, 1.0, -1.0]  # a novel is to be run down
    same = [REVIEWS[0]] * 6 + [REVIEWS[3]] + [REVIEWS[4]]
    # of eight, a quarter is two: the six count a third each; the other two are of another pattern, not over it
    assert quickstart_runs.varied(*map(list, zip(*same, strict=True))) == pytest.approx([1 / 3] * 6 + [1.0, 0.0])


def test_a_loophole_pays_for_a_word(tmp_path):
    path = str(make_reward_model(tmp_path / "rm"))
    rows = SimpleNamespace(prompts=["a", "a"], responses=["good and bad and sad", "sand"], columns={})
    plain, gamed, other = (
        kind(path)(rows) for kind in (RewardModel, quickstart_runs.Loophole, quickstart_runs.Negative)
    )
    torch.testing.assert_close(gamed, plain + torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(other, -plain)


def test_a_fall_is_two_updates_half_a_starting_deviation_below_the_best():
    """Of shares 0 and 1 at first, a deviation of 0.5: the fall is 0.25. Once is no fall."""
    watch = monitors.Watch(lambda prompts, responses: [])
    watch.deviation = 0.5
    watch.gold = [0.5, 0.9, 0.6, 0.7, 0.64, 0.66, 0.64, 0.6]
    assert watch.fallen() == 7
    watch.gold = watch.gold[:7]
    assert watch.fallen() is None


def test_table_of_overhead_by_hand():
    """Of 11 and 12 seconds, 1 and 4 in hooks: 1/10 and 2/8 in the updates, 0 and 2/8 once; medians of two are means.

    A run has two updates, so that once it was 0 and 0.5 of an update. Fastest of each: 4 + 4 + 1 alone, 5 + 4 + 1 with.
    """
    pairs = [
        ([4.0, 5.0, 1.0], [5.0, 5.0, 1.0], {"Cockpit": overhead.Spent(1.0, 0.0)}),
        (
            [5.0, 4.0, 1.0],
            [6.0, 4.0, 2.0],
            {"Cockpit": overhead.Spent(2.0, 0.0), "SampleLogger": overhead.Spent(0.0, 2.0)},
        ),
    ]
    rows = overhead.table(pairs).splitlines()
    assert rows[2] == "Cockpit | 750.0 | 17.50% | 0.00"  # 1 and 2 seconds of two updates; 1 / 10 and 2 / 8
    assert rows[5] == "SampleLogger | 0.0 | 0.00% | 0.25"
    assert rows[6] == "all | 750.0 | 17.50% | 0.25"
    assert rows[7] == "runs with all over runs with none: +11.11% of 4.500 s an update"
