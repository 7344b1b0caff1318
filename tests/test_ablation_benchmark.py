"""Ablation, stability and over-optimisation: verdicts by hand, and tiny runs of each command."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.learning import ablation, forks, gold, quickstart, stability, variants
from benchmarks.learning.limit import summary
from benchmarks.learning.task import MODELS, PROMPTS, ROOT, TRAINING_PROMPTS
from benchmarks.learning.verdicts import HELPED, HURT, SAME, UNKNOWN, verdicts
from tests.helpers.command import run_command
from tests.helpers.tiny import WORDS, make_causal_lm, make_reward_model

in_process = pytest.mark.filterwarnings("default")  # the command shows warnings of libraries where it is a process


def point(name: str, efficiency: float, kl: float = 1.0) -> dict[str, Any]:
    """What the verdicts read of a run."""
    return {"name": name, "efficiency": efficiency, "kl": kl, "limit": 2.0, "error": 0.01}


def test_verdicts_by_hand():
    """Pairs of seeds have a deviation of 2 points, so of 0.04 at a limit of 2: a margin of 2 * 0.04 for two pairs.

    Vanilla has 40% at 1 nat and 60% at 4, so 50% at 2.25 nats: 45.5% there are 4.5 points less, and a gain of 0.09.
    """
    near = {"vanilla": 0.4, "up": 0.45, "down": 0.35, "level": 0.43}
    points = [point(name, mean + sign * 0.02 / 2**0.5) for name, mean in near.items() for sign in (-1, 1)]
    points += [point("vanilla, kl_coef 0.03", 0.6, 4.0), point("far", 0.455, 2.25), point("unknown", float("nan"), 9.0)]
    bases = dict.fromkeys([*near, "far", "unknown"], "vanilla") | {"far less a trick": "far"}
    points += [point("far less a trick", 0.35, 1.0)]
    found = verdicts(points, bases, ["vanilla", "vanilla, kl_coef 0.03"])
    assert found["up"].difference == pytest.approx(0.1)
    assert found["up"].margin == pytest.approx(0.08)
    assert found["far"].difference == pytest.approx(-0.09)
    assert found["far"].margin == pytest.approx(0.08 * 1.5**0.5)  # 1 and 2 seeds
    assert found["far less a trick"].difference == pytest.approx(-0.1 + 0.09)
    words = {name: verdict.word for name, verdict in found.items()}
    others = {"level": SAME, "far": SAME, "far less a trick": SAME, "unknown": UNKNOWN}
    assert words == {"up": HELPED, "down": HURT} | others  # vanilla has none


def test_noise_of_samples_counts_where_it_is_larger_than_that_of_seeds():
    """Two seeds alike, sampled with a standard error of 0.01: a margin of 2 * 0.01."""
    points = [point(name, value) for name, value in (("vanilla", 0.4), ("up", 0.409)) for _ in range(2)]
    found = verdicts(points, {"up": "vanilla"}, ["vanilla"])["up"]
    assert (found.difference, found.margin, found.word) == (pytest.approx(0.018), pytest.approx(0.02), SAME)


def test_one_seed_gives_no_verdict():
    found = verdicts([point("vanilla", 0.4), point("up", 0.9)], {"up": "vanilla"}, ["vanilla"])
    assert found["up"].difference == pytest.approx(1.0)
    assert found["up"].word == UNKNOWN


def test_every_trick_of_the_configurations_runs_or_has_a_reason():
    names = {file.stem for file in (ROOT / "configs" / "tricks").glob("*.yaml")}
    kinds = variants.tricks(Path("data"))
    assert kinds.keys() | variants.UNFIT.keys() == names
    assert not kinds.keys() & variants.UNFIT.keys()
    assert all(kinds[name].note for name in variants.FITTED)


def test_a_trick_brings_the_settings_of_its_file():
    model = variants.tricks(Path("data"))["least_squares_critic"].config["model"]["init_args"]
    assert model == {"advantages": {"class_path": "GAE", "init_args": {"lam": 0.3}}}


def test_vanilla_trains_its_critic(tmp_path: Path):
    """And has the settings that the stored results were measured with."""
    (tmp_path / "vanilla.yaml").write_text(yaml.safe_dump(forks.config([])))
    arguments = ["--config", "sentiment", *forks.SETTING, "--config", "vanilla.yaml", "--print_config"]
    printed = yaml.safe_load(run_command("fit", *arguments, cwd=tmp_path).ok().out)
    model, callbacks = printed["model"]["init_args"], printed["trainer"]["callbacks"]
    assert [callback["class_path"].split(".")[-1] for callback in callbacks] == ["CollapseMonitor"]
    assert (model["kl_coef"], model["advantages"]["init_args"]["lam"], model["actor_scheduler"]) == (0.1, 0.95, None)
    rates = [model[f"{name}_optimizer"]["init_args"]["lr"] for name in ("actor", "critic")]
    assert rates == [1e-4, 5e-4]


def test_ppo_max_loses_one_callback_at_a_time():
    kinds = variants.ppo_max(Path("data"))
    own = {name: [c["class_path"] for c in kind.config["trainer"]["callbacks"]] for name, kind in kinds.items()}
    everything = ["RewardNormalization", "CriticWarmup", "ValueClipping", "PTXLoss", "CollapseMonitor"]
    assert own["ppo_max"] == everything
    assert own["ppo_max less PTXLoss"] == [*everything[:3], everything[4]]
    assert own["ppo_max less the KL penalty"] == everything


def test_vanilla_runs_first_and_then_seed_by_seed():
    kinds = {name: variants.Variant({}) for name in ("vanilla", "a", "b")}
    order = [(job.name, job.seed) for job in ablation.jobs(kinds, [0, 1])]
    assert order == [("vanilla", 0), ("vanilla", 1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: Any) -> list[str]:
    """Arguments of the commands for a tiny task."""
    make_causal_lm(tmp_path / MODELS / "sft" / "model", "llama")
    for stage in ("reward", "judge", f"proxy-{gold.REVIEWS}"):
        make_reward_model(tmp_path / MODELS / stage / "model", "llama")
    for name, column in ((PROMPTS, "prompt"), (TRAINING_PROMPTS, "prompt"), (variants.TEXT, "text")):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps({column: " ".join(WORDS[i : i + 4])}) + "\n" for i in range(30))
    scores = np.random.default_rng(0).normal(size=(8, 32))
    (tmp_path / "limit.json").write_text(json.dumps(summary(scores, scores)))
    sizes = "--updates 2 --samples 2 --prompts 3 --data.batch_size 4 --model.minibatch_size 2"
    places = f"--data_root {tmp_path} --results {tmp_path} --limit {tmp_path}/limit.json --figure {tmp_path}/a.png"
    own = "--model.micro_batch_size 2 --trainer.precision 32-true --model.actor_optimizer.lr 0.05"
    return [str(tmp_path), *sizes.split(), *places.split(), *own.split()]


def run(command: Any, words: list[str], monkeypatch: Any) -> None:
    """One of the commands."""
    monkeypatch.setattr("sys.argv", ["command", *words])
    command.main()


@in_process
def test_tiny_ablation(task: list[str], tmp_path: Path, monkeypatch: Any):
    """A second call runs only what is missing."""
    names = ["vanilla", "reference_update", "ppo_max less PTXLoss"]
    monkeypatch.setitem(variants.FITTED, "reference_update", ({"every": 1}, "after each update"))
    run(ablation, [*task, "--seeds", "0", "--only", *names[:2]], monkeypatch)
    first = json.loads((tmp_path / "ablation.json").read_text())["runs"]
    assert [(stored["name"], stored["error"]) for stored in first] == [("vanilla", None), ("reference_update", None)]
    assert first[1]["points"][-1]["kl"] != first[0]["points"][-1]["kl"] > 0.0
    run(ablation, [*task, "--seeds", "0", "--only", *names], monkeypatch)
    stored = json.loads((tmp_path / "ablation.json").read_text())["runs"]
    assert stored[:2] == first
    assert stored[2]["name"] == names[2]
    assert "CollapseMonitor" in stored[2]["points"][-1]["told"]
    table = (tmp_path / "ablation.md").read_text()
    assert "| reference_update | 1 |" in table
    assert "| dynamic_sampling | - |" in table
    assert str(tmp_path) not in (tmp_path / "ablation.json").read_text()
    assert (tmp_path / "a.png").stat().st_size > 10_000


@in_process
def test_tiny_stability(task: list[str], tmp_path: Path, monkeypatch: Any):
    name = next(iter(stability.SETTINGS))
    run(stability, [*task, "--seeds", "0", "--only", f"{name}: {stability.NONE}"], monkeypatch)
    (stored,) = json.loads((tmp_path / "stability.json").read_text())["runs"]
    assert stored["config"]["model"]["init_args"]["kl_coef"] == 0.0
    assert stored["points"][-1]["update"] == 2
    assert (tmp_path / "stability.md").read_text().count("\n") == 3


@in_process
def test_tiny_gold(task: list[str], tmp_path: Path, monkeypatch: Any):
    run(gold, [*task, "--seeds", "0", "--measure", "0", "2", "--only", gold.FREE], monkeypatch)
    (stored,) = json.loads((tmp_path / "gold.json").read_text())["runs"]
    assert [p["update"] for p in stored["points"]] == [0, 2]
    assert stored["points"][0]["kl"] == 0.0
    assert set(stored["points"][1]["told"]) == {"CollapseMonitor", "RewardHackingMonitor"}


@in_process
def test_quickstart_with_one_setting_changed(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    runs = tmp_path / "runs" / "quickstart"
    make_causal_lm(runs / "sft" / "model", "gpt2")
    make_reward_model(runs / "reward" / "model", "gpt2")
    (runs / "data").mkdir()
    for name, n in (("prompts", 128), ("prompts_eval", 4)):
        lines = [json.dumps({"prompt": " ".join(WORDS[i % 7 : i % 7 + 3])}) for i in range(n)]
        (runs / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    words = [str(tmp_path), "--seeds", "0", "--results", str(tmp_path)]
    run(quickstart, [*words, "--only", "lam 0.5", "ppo_epochs 1"], monkeypatch)
    lam, epochs = json.loads((tmp_path / "quickstart.json").read_text())["runs"]
    assert lam["arguments"] == {"advantages": {"init_args": {"lam": 0.5}}}
    assert epochs["points"][0] | {"cpu_seconds": 0} == lam["points"][0] | {"cpu_seconds": 0}  # before the first update
    assert epochs["points"][-1]["score"] != lam["points"][-1]["score"]
    assert "| lam 0.5 | 1 |" in capsys.readouterr().out


def test_rows_of_the_quickstart_by_hand():
    """Scores 2 and 4 at 1 and 2 nats: 2 - 0.6 and 4 - 1.2, in mean 2.1, 1.4 apart."""
    ends = [{"score": 2.0, "kl": 1.0, "cpu_seconds": 10.0}, {"score": 4.0, "kl": 2.0, "cpu_seconds": 20.0}]
    runs = [{"name": "lam 0.8", "points": [{"score": 0.0, "kl": 0.0}, end]} for end in ends]
    assert quickstart.rows(runs) == [["lam 0.8", "2", "3.00", "1.50", "2.10 ± 0.99", "15"]]


def test_when_gold_has_fallen_by_hand():
    """Gains of the judge 0, 1, 0.6, 0.2: half of its deviation of 1 below the best at the last."""
    told = {"CollapseMonitor": ["warning at update 4 (kl)", "alarm at update 6 (kl)"], "RewardHackingMonitor": []}
    judged = [-1.0, 0.0, -0.4, -0.8]
    points = [{"update": 3 * i, "judge": j, "score": float(i), "kl": i**2, "told": told} for i, j in enumerate(judged)]
    (row,) = gold.rows([{"name": "none", "seed": 0, "points": points}], deviation=0.75 / gold.FALL)
    assert row[2:9] == ["+1.00", "3", "1.0", "9.0", "+3.00", "+0.20", "update 9"]
    assert row[9] == "warning at update 4 (kl); alarm at update 6 (kl)"


def test_a_failed_run_keeps_its_error_and_is_run_again(tmp_path: Path, monkeypatch: Any):
    def fails(*_: Any) -> None:
        raise ValueError("no such thing")

    asked = forks.parser("", "x", updates=1).parse_args([str(tmp_path), "--data_root", str(tmp_path)])
    asked.results = tmp_path
    monkeypatch.setattr(forks, "run", fails)
    for _ in range(2):
        (stored,) = forks.run_all(asked, [], [forks.Job("a", 0, {})], tmp_path / "runs.json")
        assert stored["error"] == "ValueError: no such thing"
