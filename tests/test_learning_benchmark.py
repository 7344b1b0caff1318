"""The frontier of score against KL: curves against distributions whose limit is known, and a tiny run measured."""

import gzip
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.learning import report, run
from benchmarks.learning.curves import BETAS, best_of_n, tilted
from benchmarks.learning.frontier import Frontier
from benchmarks.learning.gradients import measure, quality
from benchmarks.learning.limit import summary
from benchmarks.learning.reading import reading
from benchmarks.learning.task import MODELS, PROMPTS
from benchmarks.learning.token_advantages import agreement, correlation, scores_behind
from benchmarks.learning.token_advantages import measure as measure_tokens
from lit_ppo.callbacks import CollapseMonitor, ReferenceUpdate
from tests.helpers.tiny import WORDS, make_reward_model
from tests.helpers.toys import make_data, make_module, make_trainer


def test_limit_of_a_normal_score_is_the_textbook_one():
    r"""A normal score of deviation s, tilted by 1 / beta: gain s^2 / beta at KL s^2 / (2 beta^2), so s sqrt(2 KL)."""
    scores = 2.0 * np.random.default_rng(0).normal(size=(64, 2048)) + 5.0
    curve = tilted(scores, BETAS)
    for kl in (0.25, 1.0, 2.0):
        assert curve.at(kl) == pytest.approx(2.0 * math.sqrt(2 * kl), rel=0.02)
    assert curve.at(100.0) == pytest.approx((scores.max(1) - scores.mean(1)).mean(), rel=0.01)  # one sample has it all


def test_what_the_limit_does_to_another_score():
    """A score that is the opposite of the one that tilts loses what that gains."""
    scores = np.random.default_rng(0).normal(size=(8, 64))
    np.testing.assert_allclose(tilted(scores, BETAS, -scores).gain, -tilted(scores, BETAS).gain)


def test_best_of_two_of_four_by_hand():
    """Pairs of 0, 1, 3, 8: the best are 1, 3, 8, 3, 8, 8, in mean 31 / 6; less the mean, 3. Judge: -31 / 6 + 3."""
    scores = np.array([[3.0, 0.0, 8.0, 1.0]])
    kl, gain = best_of_n(scores, 2)
    assert (kl, gain) == pytest.approx((math.log(2) - 0.5, 31 / 6 - 3))
    assert best_of_n(scores, 2, -scores)[1] == pytest.approx(3 - 31 / 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A judge and held-out prompts, where the task keeps them."""
    make_reward_model(tmp_path / MODELS / "judge" / "model")
    with gzip.open(tmp_path / PROMPTS, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"prompt": f"{word} was"}) + "\n" for word in WORDS[:9])
    return tmp_path


def measured(folder: Path, actor: Path, rate: float, *callbacks: Any, **arguments: Any) -> list[dict[str, Any]]:
    """The points of a run of two updates."""
    output = folder / "points.json"
    arguments = {"updates": [1, 2], "samples": 4, "prompts": 6, **arguments}
    frontier = Frontier(str(output), str(folder), str(folder), **arguments)
    module = make_module(actor, actor_optimizer=lambda params: torch.optim.SGD(params, lr=rate))
    make_trainer(folder, callbacks=[*callbacks, frontier]).fit(module, make_data(folder))
    points: list[dict[str, Any]] = json.loads(output.read_text())
    return points


def test_a_policy_that_does_not_move_has_no_kl_and_the_reference_s_score(folder: Path, lm: Path):
    first, second = measured(folder, lm, 0.0)
    assert first["kl"] == second["kl"] == 0.0
    assert (first["score"], first["judge"]) == (second["score"], second["judge"])
    assert (first["episodes"], second["episodes"]) == (7, 12)  # of 12 prompts, in batches of 7


def test_averages_are_measured_and_training_goes_on_with_its_own_weights(folder: Path, lm: Path):
    plain = measured(folder, lm, 2.0)
    points = measured(folder, lm, 2.0, averages=[0.0, 1.0 - 1e-9])
    timeless = [{k: v for k, v in p.items() if "seconds" not in k and k != "average"} for p in points]
    assert [p["kl"] for p in plain] == [points[0]["kl"], points[3]["kl"]]
    assert timeless[0] == timeless[1]  # decay 0: the weights themselves
    assert points[0]["kl"] > 0.01
    assert points[2]["kl"] == points[5]["kl"] == 0.0  # they stay where they started


@pytest.mark.filterwarnings("ignore:CollapseMonitor")
def test_the_kl_is_that_to_the_reference_of_the_start(folder: Path, lm: Path):
    """Also where a callback moves the reference to the actor after each update."""
    plain = measured(folder, lm, 2.0)
    moved = measured(folder, lm, 2.0, ReferenceUpdate(every=1), CollapseMonitor(), updates=[0, 1, 2])
    assert [point["update"] for point in moved] == [0, 1, 2]
    assert moved[0]["kl"] == 0.0
    assert moved[1]["kl"] == plain[0]["kl"] > 0.01
    assert moved[2]["kl"] > 0.01
    assert plain[1]["told"] == {}
    assert list(moved[2]["told"]) == ["CollapseMonitor"]


def test_quality_of_gradients_whose_noise_is_known():
    """Truth (1, 0) with noise of variance 1/4 in each of 2 dimensions; the estimate has half, turned by 60 degrees.

    Signal: 1 / (1 + 1/2) and 1 / (1 + 1/4). Cosines with the truth: 1 and 1/2, times the root of the signal.
    """
    random = torch.Generator().manual_seed(0)
    truths = torch.tensor([1.0, 0.0]) + 0.5 * torch.randn(4000, 2, generator=random)
    turned = torch.tensor([0.5, 0.75**0.5]) + 0.125**0.5 * torch.randn(4000, 2, generator=random)
    own, biased = quality(truths, truths), quality(turned, truths)
    assert (own["signal"], biased["signal"]) == pytest.approx((2 / 3, 0.8), rel=0.03)
    assert (own["bias_cosine"], biased["bias_cosine"]) == pytest.approx((1.0, 0.5), abs=0.02)
    assert (own["cosine"], biased["cosine"]) == pytest.approx(((2 / 3) ** 0.5, 0.5 * 0.8**0.5), rel=0.04)


def test_gradients_of_a_tiny_job(lm: Path):
    """With the true return twice there is no bias. The critic's head starts at 0, and then learns."""
    module = make_module(lm, reference=None, kl_coef=0.0)
    prompts = [" ".join(WORDS[i : i + 3]) for i in range(24)]
    found = measure(module, prompts, 4, [1.0 - 1e-9, 1.0], {"episodes": 12, "rate": 0.05, "passes": 3})
    assert found["batches"] == 3
    assert found["r_squared"]["start"] < 0  # worse than the mean, which is not 0
    assert len({*found["r_squared"].values()}) == 3
    for rows in found["lam"].values():
        assert rows["1.0"]["cosine"] == pytest.approx(rows[str(1.0 - 1e-9)]["cosine"], rel=1e-3)


def test_agreement_with_a_truth_that_is_known_by_noisy_samples():
    """Truth of variance 1, estimates of twice the truth plus noise of variance 4: correlation 2 / sqrt(8), slope 1/4.

    Eight samples of deviation 2 behind each token have a mean of variance 1/2. A shift of a place changes nothing.
    """
    random = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, 6, generator=random)
    samples = truth.unsqueeze(-1) + 2.0 * torch.randn(4000, 6, 8, generator=random)
    shift = 9.0 * torch.rand(4000, 1, generator=random)
    estimates = 2.0 * truth + 2.0 * torch.randn(4000, 6, generator=random) + shift
    found = agreement(estimates, samples)
    assert found["correlation"] == pytest.approx(0.5**0.5, rel=0.02)
    assert found["slope"] == pytest.approx(0.25, rel=0.03)
    assert found["deviation"] == pytest.approx((5 / 6) ** 0.5, rel=0.02)  # less the mean of six
    assert correlation(estimates, truth) == pytest.approx(0.5**0.5, rel=0.02)


def letters_of_third(responses: list[str]) -> list[float]:
    """Letters of each response's third word; 0 without one."""
    return [float(len([*response.split(), "", "", ""][2])) for response in responses]


def test_true_advantages_of_tokens(lm: Path):
    """A score that the third token decides: behind it all continuations score the same."""
    module = make_module(lm, rewards=letters_of_third)
    prompts = [" ".join(WORDS[i : i + 3]) for i in range(12)]
    module.n_actions = 3
    experience = module.rollout(prompts)
    shown = torch.cat([experience.response_ids[:, :2], experience.extras["action_ids"][:, 2, 1:]], dim=1)
    is_word = ~torch.isin(shown, torch.tensor(module.tokenizer.all_special_ids)).any(1)
    rows = (experience.extras["action_mask"][:, 2].all(1) & is_word).nonzero().squeeze(1).tolist()
    assert len(rows) > 3
    tokens = experience.extras["action_ids"][rows, 2, 1:]
    letters = torch.tensor([[float(len(module.tokenizer.decode([token]))) for token in row] for row in tokens.tolist()])
    scores = scores_behind(module, experience.select(rows), place=2, samples=4)
    torch.testing.assert_close(scores, letters.unsqueeze(-1).expand(-1, -1, 4))
    assert module.generation.max_new_tokens == 10
    found = measure_tokens(module, prompts, prompts, n=3, samples=4)
    assert found["critic_episodes"] == 12
    assert 0 < found["places"] <= 12
    assert found["actor"]["correlation"] == 0.0  # it is the reference


class Letters:
    """A tokenizer whose tokens are code points."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(map(chr, row)) for row in rows]


def test_what_first_tokens_tell_of_a_score_that_counts_a_letter():
    """Numbers of b: 1, 1, 2, 0 in full; 0, 0, 1, 0 in one token, 1, 0, 1, 0 in two and 1, 0, 2, 0 in three.

    Their covariances with the full numbers, times 4, are 1, 1 and 2; their variances 3/4, 1 and 11/4; the full one's 2.
    """
    texts = ["abaa", "aaab", "bab", "aaaa"]
    ids = torch.tensor([[ord(letter) for letter in text.ljust(4, "b")] for text in texts])
    mask = torch.tensor([[place < len(text) for place in range(4)] for text in texts])
    experience = SimpleNamespace(response_ids=ids, response_mask=mask, responses=texts)

    def count(rows: Any) -> torch.Tensor:
        return torch.tensor([float(text.count("b")) for text in rows.responses])

    found = reading(experience, Letters(), count, lambda rows: -count(rows))
    assert found["told_by_first_tokens"] == pytest.approx({1: 2 / 3, 2: 1 / 2, 3: 8 / 11})
    assert found["correlation_with_judge"] == pytest.approx(-1.0)
    assert found["deviation"] == pytest.approx(math.sqrt(0.5))


def test_report_of_two_seeds_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    """Halfway between no gain and the limit's; with two seeds, 50% and 70%: a mean of 60%, a deviation of 14.1%."""
    scores = np.random.default_rng(0).normal(size=(16, 64))
    found = summary(scores, scores)
    (tmp_path / "limit.json").write_text(json.dumps(found))
    at_one = next(p["gain"] for p in found["limit"] if p["kl"] == 1.0)
    point = {"kl": 1.0, "judge": found["judge"], "episodes": 64, "average": None, "cpu_seconds": 2.0}
    runs = [
        {"seed": i, "arguments": "", "points": [point | {"score": found["score"] + share * at_one}]}
        for i, share in enumerate((0.5, 0.7))
    ]
    (tmp_path / "plain.json").write_text(json.dumps({"name": "plain", "runs": runs}))
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- {tmp_path.name} -->\nold\n<!-- /{tmp_path.name} -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--page", str(page), "--figure", str(tmp_path / "f.png")])
    report.main()
    assert "| plain | last | 2 | 64 | 1.00 |" in page.read_text()
    assert "| 60.0% ± 14.1% | +0.00 | 2 |" in capsys.readouterr().out
    far = [{"seed": 0, "arguments": "", "points": [point | {"score": found["score"], "kl": 7.0}]}]
    (tmp_path / "far.json").write_text(json.dumps({"name": "far", "runs": far}))
    report.main()
    assert "| far | last | 1 | 64 | 7.00 | +0.00 | - | - | +0.00 | 2 |" in capsys.readouterr().out  # no limit is known
    monkeypatch.setattr("sys.argv", [*sys.argv, "--rows", "plain"])
    report.main()
    assert "| far |" not in capsys.readouterr().out
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_arguments_of_the_command_pass_through(tmp_path: Path):
    words = [str(tmp_path), "--data_root", str(tmp_path), "--name", "x", "--model.kl_coef", "0.1", "--seeds", "1", "2"]
    asked, others = run.parse(words)
    assert (asked.seeds, asked.measure, others) == ([1, 2], [32], ["--model.kl_coef", "0.1"])


def test_configurations_of_one_s_own_are_found_and_shipped_ones_are_not(tmp_path: Path, monkeypatch: Any):
    (tmp_path / "own.yaml").write_text("model: {}")
    monkeypatch.chdir(tmp_path)
    words = ["--config", "tricks/kl_loss", "--config", "own.yaml", "--model.kl_coef", "own.yaml"]
    assert run.own_configs(words) == {"own.yaml": tmp_path / "own.yaml"}
