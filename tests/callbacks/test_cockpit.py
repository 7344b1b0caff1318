"""Cockpit: its event files read back, histograms by hand."""

import ast
import json
import math
import re
import subprocess
import sys
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_ppo.callbacks import AlignmentTax, Cockpit, CriticWarmup, figures
from lit_ppo.callbacks.cockpit import LAYOUT
from lit_ppo.experience import Minibatch
from tests.callbacks.test_alignment_tax import texts
from tests.callbacks.toy import Prompts, Recorder, Spy, Toy, run_updates
from tests.callbacks.trick import Trick
from tests.test_experience import make as make_experience
from tests.tiny import make_causal_lm
from tests.toys import count_good, logged, make_data, make_module, make_trainer, write_prompts

ROOT = Path(__file__).parents[2]

TRICK = {
    "Cockpit": Trick(
        acts={"every": 1, "best_of_prompts": 3, "best_of": 4},
        refuses={"every": 0, "best_of_prompts": 0, "best_of": -1},
        knobs={
            "every": ({}, {"every": 2}),
            "best_of_prompts": ({}, {"best_of_prompts": 2}),
            "best_of": ({}, {"best_of": 0}),
        },
        monitor=True,
    )
}
OTHERS = {tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags if tag.startswith("^collapse/")}


def watch(folder: Path, updates: int, *others: L.Callback, every: int = 2, **options: Any) -> tuple[Toy, Recorder]:
    logger = Recorder(folder)
    return run_updates([Cockpit(every=every), *others], updates, logger=logger, **options), logger


# ---- histograms, on the toy


def test_histograms_of_the_first_and_every_second_update(tmp_path: Path):
    _, logger = watch(tmp_path, 5)
    names = ["scores", "advantages", "ratios", "lengths"]
    assert [(tag, step) for tag, _, step in logger.of("add_histogram")] == [
        (f"histogram/{name}", step) for step in (0, 2, 4) for name in names
    ]
    assert [len(value) for _, value, _ in logger.of("add_histogram")] == [8, 20, 20, 8] * 3  # of that update alone


def test_they_hold_the_response_tokens_and_rows_of_the_update(tmp_path: Path):
    """Eight responses of 1, 2, 3, 4, ... tokens, 20 in all; ratios from the weights before and after the first step."""
    halve = Spy("on_scores", lambda module, experience: setattr(experience, "scores", experience.scores / 2))
    actors = Spy("on_minibatch_start", lambda module, minibatch: deepcopy(module.actor))
    module, logger = watch(tmp_path, 1, halve, actors)
    (experience,) = module.experiences
    found = {tag.removeprefix("histogram/"): value for tag, value, _ in logger.of("add_histogram")}
    assert found["lengths"] == [1, 2, 3, 4] * 2
    assert found["scores"] == pytest.approx(experience.raw_scores.tolist())  # the reward's own
    rows = [experience.advantages[row, token].item() for row in range(8) for token in range(int(found["lengths"][row]))]
    assert found["advantages"] == pytest.approx(rows)
    assert len(found["ratios"]) == 20
    assert found["ratios"][:10] == pytest.approx([1.0] * 10)  # nothing has been learnt in the first step
    expected = (module.logprobs(experience.features, experience.actions, actors.seen[1]) - experience.logprobs).exp()[
        4:
    ]
    assert found["ratios"][10:] == pytest.approx(expected[experience.response_mask[4:]].tolist(), rel=1e-4)
    assert max(abs(ratio - 1) for ratio in found["ratios"]) > 1e-3


def test_an_actor_at_rest_has_no_ratios(tmp_path: Path):
    _, logger = watch(tmp_path, 3, CriticWarmup(1), every=1)
    steps = [step for tag, _, step in logger.of("add_histogram") if tag == "histogram/ratios"]
    assert steps == [1, 2]


def test_numbers_that_are_not_finite_have_no_histogram(tmp_path: Path):
    """TensorBoard raises on them, and a monitor must not end a run."""
    lost = Spy("on_advantages", lambda module, experience: setattr(experience, "advantages", experience.advantages / 0))
    run_updates([lost, Cockpit(every=1)], 2, logger=TensorBoardLogger(tmp_path, name="run", version=0))
    events = EventAccumulator(str(tmp_path / "run/version_0")).Reload()
    assert "histogram/advantages" not in events.Tags()["histograms"]
    assert "histogram/lengths" in events.Tags()["histograms"]


def test_a_micro_batch_without_weight_adds_no_ratios(tmp_path: Path):
    """As a rank gets one that has nothing left to do: rows 1 and 3 have 1 and 2 tokens."""
    cockpit, logger = Cockpit(), Recorder(tmp_path)
    experience: Any = make_experience()
    experience.kl = experience.advantages = experience.ref_logprobs = experience.logprobs
    experience.raw_scores = torch.zeros(5)
    trainer: Any = SimpleNamespace(loggers=[logger], is_global_zero=True)
    module: Any = None
    for micro in Minibatch.of(experience, range(5), "token_mean").micro_batches([[1, 3], []], 2):
        micro.new_logprobs = micro.logprobs + math.log(2)
        cockpit.on_actor_loss(trainer, module, micro, {})
    cockpit.on_update_end(trainer, module, experience)
    assert [value for tag, value, _ in logger.of("add_histogram") if tag == "histogram/ratios"] == [
        pytest.approx([2.0, 2.0, 2.0])
    ]


# ---- figures


def shown(logger: Recorder, name: str) -> dict[int, dict[str, list[list[float]]]]:
    return {step: value for tag, value, step in logger.of("add_figure") if tag == f"figure/{name}"}


def dots_of(figure: dict[str, list[list[float]]]) -> list[list[float]]:
    return figure["this run, one point an update"]


def test_figures_of_the_first_and_every_second_update_and_of_the_last(tmp_path: Path):
    _, logger = watch(tmp_path, 4)
    assert list(shown(logger, "score_against_kl")) == list(shown(logger, "scores")) == [0, 2, 3]
    _, logger = watch(tmp_path, 3)
    assert list(shown(logger, "scores")) == [0, 2]


def test_every_update_is_a_point_at_its_kl_and_score(tmp_path: Path):
    """The toy's KL is that of its reference, 1.5 nats a response; its scores are given: means of 2 and 2 + update."""
    given = lambda update: [2.0 - update, 2.0 + 3 * update] * 4  # noqa: E731
    _, logger = watch(tmp_path, 4, every=1, kl_per_response=1.5, scores=given)
    for step, figure in shown(logger, "score_against_kl").items():
        assert dots_of(figure) == [pytest.approx([1.5, 2.0 + update]) for update in range(step + 1)]


def test_the_tricks_scores_are_not_in_the_figures(tmp_path: Path):
    double = Spy("on_scores", lambda module, experience: setattr(experience, "scores", 2 * experience.scores))
    _, logger = watch(tmp_path, 1, double, scores=lambda update: [1.0] * 8)
    assert [point[1] for point in dots_of(shown(logger, "score_against_kl")[0])] == [1.0]
    assert max(x for x, _ in shown(logger, "scores")[0]["at the start"]) < 2.1


def test_the_line_is_the_best_of_the_starting_policys_samples(tmp_path: Path):
    """Every choice of n of the 4 samples of each of 3 prompts, drawn again from a toy that has learnt nothing."""
    logger = Recorder(tmp_path)
    run_updates([Cockpit(every=1, best_of_prompts=3, best_of=4)], 2, logger=logger)
    start = Toy()
    drawn = start.rollout(Prompts(["a", "b", "c"]), samples_per_prompt=4, stream="cockpit")
    scores = start.score(drawn).view(3, 4).tolist()
    expected = []
    for n in range(1, 5):
        best = [max(chosen) for row in scores for chosen in combinations(row, n)]
        expected.append([math.log(n) - (n - 1) / n, sum(best) / len(best)])
    for figure in shown(logger, "score_against_kl").values():
        assert figure["starting policy, best of 1 to 4 samples"] == [pytest.approx(point) for point in expected]


@pytest.mark.parametrize("lacks", ["data", "peek", "rollout", "score"])
def test_there_is_no_line_where_nobody_can_be_asked(lacks: str):
    """No error either: it is there for scale."""
    peek = SimpleNamespace() if lacks == "peek" else SimpleNamespace(peek=lambda split, n: pytest.fail("not needed"))
    trainer: Any = SimpleNamespace(loggers=[], is_global_zero=True, datamodule=None if lacks == "data" else peek)
    module: Any = SimpleNamespace(**{name: None for name in ("rollout", "score") if name != lacks})
    cockpit = Cockpit()
    cockpit.on_train_start(trainer, module)
    assert cockpit.state_dict()["best"] == []


def test_no_line_if_none_is_asked_for(tmp_path: Path):
    logger = Recorder(tmp_path)
    run_updates([Cockpit(every=1, best_of=0)], 1, logger=logger)
    assert list(shown(logger, "score_against_kl")[0]) == ["_child0", "this run, one point an update"]


def test_a_run_without_reference_has_no_kl_to_show(tmp_path: Path):
    _, logger = watch(tmp_path, 2, reference=False)
    assert shown(logger, "score_against_kl") == {}
    assert list(shown(logger, "scores")) == [0, 1]


def test_score_distributions_are_shares_of_now_and_the_start(tmp_path: Path):
    """24 bins from -1 to 11, half a point each: 0 is in the third, 10 in the 23rd; 3 of 8 are 0.375."""
    given = lambda update: [[0.0] * 5 + [10.0] * 3, [0.0] * 2 + [10.0] * 4 + [-1.0, 11.0]][update]  # noqa: E731
    _, logger = watch(tmp_path, 2, every=1, scores=given)
    figure = shown(logger, "scores")[1]
    heights = {label: dict(zip(*zip(*figure[label], strict=True), strict=True)) for label in figure if label[0] != "_"}
    steps = {label: sorted({(x, y) for x, y in figure[label] if y}) for label in heights}
    assert steps["at the start"] == [(0.0, 0.625), (0.5, 0.625), (10.0, 0.375), (10.5, 0.375)]
    assert steps["now, update 1"] == [
        *[(-1.0, 0.125), (-0.5, 0.125), (0.0, 0.25), (0.5, 0.25)],
        *[(10.0, 0.5), (10.5, 0.125), (10.5, 0.5), (11.0, 0.125)],
    ]
    means = [figure[label][0][0] for label in figure if label[0] == "_"]
    assert means == [3.75, 6.25]


def test_scores_that_are_all_alike_or_not_finite_end_no_run(tmp_path: Path):
    _, logger = watch(tmp_path, 1, scores=lambda update: [3.0] * 8)
    assert list(shown(logger, "scores")) == [0]
    _, logger = watch(tmp_path, 2, every=1, scores=lambda update: [float("nan" if update else 1)] * 8)
    assert list(shown(logger, "scores")) == [0]
    assert len(dots_of(shown(logger, "score_against_kl")[1])) == 1


def test_what_draws_is_loaded_with_the_first_figure():
    """It takes a second, which a run without TensorBoard, or the command's help, need not wait for."""
    tree = ast.parse(Path(figures.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in imports if "matplotlib" in ast.unparse(node)]


# ---- on LitPPO


class Attach(L.Callback):
    """Gives the trainer a logger that takes everything, and writes on the first process what it was given."""

    def __init__(self, folder: Path) -> None:
        self.logger, self.file = Recorder(folder), folder / "recorded.pt"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.loggers = [*trainer.loggers, self.logger]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save(self.logger.calls, self.file)


def two_rank_callbacks(folder: Path) -> list[L.Callback]:
    """What ``tests.scripts.two_ranks`` trains with."""
    return [Cockpit(every=1, best_of_prompts=3, best_of=4), Attach(folder)]


def test_two_ranks_show_what_one_shows(tmp_path: Path):
    """But for the ratios, which are those of the first rank's rows: a part of one process's, and not all of them."""
    actor = make_causal_lm(tmp_path / "lm", scale=4.0)
    make_trainer(tmp_path, callbacks=two_rank_callbacks(tmp_path)).fit(make_module(actor), make_data(tmp_path))
    one = torch.load(tmp_path / "recorded.pt")
    command = [sys.executable, "-m", "tests.scripts.two_ranks", str(tmp_path), str(actor), "critic"]
    done = subprocess.run(
        [*command, f"{__name__}.two_rank_callbacks"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "recorded.pt")
    assert [call[:2] for call in two] == [call[:2] for call in one]
    for (kind, tag, ours, _), (_, _, theirs, _) in zip(one, two, strict=True):
        if tag == "histogram/ratios":
            assert 0 < len(theirs) < len(ours)
            assert all(min(abs(ratio - other) for other in ours) < 1e-4 for ratio in theirs)
        elif kind == "add_histogram":
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5), tag
        elif kind == "add_figure":
            assert theirs.keys() == ours.keys()
            for label, points in ours.items():
                assert torch.allclose(torch.tensor(theirs[label]), torch.tensor(points), rtol=1e-4, atol=1e-5), label
    tags = [call[1] for call in one]
    assert [tags.count(tag) for tag in ("figure/score_against_kl", "figure/scores", "histogram/ratios")] == [2, 2, 2]


def test_points_are_what_is_logged_and_the_line_is_of_the_first_training_prompts(tmp_path: Path):
    """The line by every choice of n among samples drawn again, from a module that has learnt nothing."""
    actor = make_causal_lm(tmp_path / "lm", scale=4.0)
    recorder = Attach(tmp_path)
    held_out = str(write_prompts(tmp_path / "held_out.jsonl", 5))
    trainer = make_trainer(tmp_path, callbacks=[Cockpit(every=1, best_of_prompts=3, best_of=4), recorder])
    trainer.fit(make_module(actor), make_data(tmp_path, val_path=held_out))
    figure = shown(recorder.logger, "score_against_kl")[1]
    rows = logged(trainer)
    assert dots_of(figure) == [pytest.approx([row["objective/kl"], row["objective/score"]]) for row in rows]
    start = make_module(actor)
    start.configure_model()
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()[:3]]
    drawn = start.rollout(prompts, samples_per_prompt=4, stream="cockpit")
    pairs = [*zip(drawn.prompts, count_good([], drawn.responses), strict=True)]
    scores = [[score for prompt, score in pairs if prompt == asked] for asked in prompts]
    assert [len(row) for row in scores] == [4, 4, 4]
    best = [[max(chosen) for row in scores for chosen in combinations(row, n)] for n in range(1, 5)]
    line = figure["starting policy, best of 1 to 4 samples"]
    assert [y for _, y in line] == pytest.approx([sum(values) / len(values) for values in best])
    assert line[3][1] > line[0][1]


def test_a_resumed_run_draws_the_whole_run(tmp_path: Path):
    """And asks the policy that it started from, not the one it goes on with."""
    actor = make_causal_lm(tmp_path / "lm", scale=4.0)

    def last_figures(folder: Path, resume: Path | None = None, max_steps: int = 3) -> list[Any]:
        folder.mkdir(exist_ok=True)
        recorder, cockpit = Attach(folder), Cockpit(every=2, best_of_prompts=3, best_of=4)
        trainer = make_trainer(folder, callbacks=[cockpit, recorder], max_steps=max_steps)
        trainer.fit(make_module(actor), make_data(folder), ckpt_path=resume)
        trainer.save_checkpoint(folder / "last.ckpt")
        return [call for call in recorder.logger.calls if call[0] == "add_figure" and call[3] == 2]

    whole = last_figures(tmp_path / "whole")
    last_figures(tmp_path / "parts", max_steps=2)
    assert last_figures(tmp_path / "parts", resume=tmp_path / "parts/last.ckpt") == whole
    assert [call[1] for call in whole] == ["figure/score_against_kl", "figure/scores"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three updates, with everything that can be looked at."""
    folder = tmp_path_factory.mktemp("cockpit")
    actor = make_causal_lm(folder / "lm", scale=4.0)
    logger = TensorBoardLogger(folder, name="run", version=0, default_hp_metric=False)
    callbacks: list[L.Callback] = [Cockpit(every=2), AlignmentTax(texts(folder), every=1)]
    trainer = make_trainer(folder, callbacks=callbacks, logger=logger, max_steps=3, val_check_interval=1)
    data = make_data(folder, val_path=str(write_prompts(folder / "held_out.jsonl", 5)))
    module = make_module(actor, rewards={"good": count_good, "more": count_good}, max_skipped_steps=1)
    trainer.fit(module, data)
    torch.save({name: float(value) for name, value in trainer.callback_metrics.items()}, folder / "metrics.pt")
    return folder


@pytest.fixture(scope="module")
def events(run_folder: Path) -> EventAccumulator:
    return EventAccumulator(str(run_folder / "run/version_0"), size_guidance={"histograms": 0}).Reload()


def test_every_chart_finds_its_curves(events: EventAccumulator):
    (told,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(told.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [*LAYOUT]
    logged = events.Tags()["scalars"]
    tags = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert tags == {tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags}
    for tag in tags - OTHERS:  # the others are those of another monitor
        assert any(re.match(tag, name) for name in logged), tag


def test_histograms_are_in_the_event_file(events: EventAccumulator):
    names = ["scores", "advantages", "ratios", "lengths"]
    assert set(events.Tags()["histograms"]) == {f"histogram/{name}" for name in names}
    for name in names:
        assert [event.step for event in events.Histograms(f"histogram/{name}")] == [0, 2]
    lengths = events.Histograms("histogram/lengths")[0].histogram_value
    assert lengths.num == 7
    assert lengths.sum == pytest.approx(7 * events.Scalars("response/length")[0].value)
    ratios = events.Histograms("histogram/ratios")[0].histogram_value
    assert ratios.num == 2 * lengths.sum  # two passes
    assert ratios.min < 1 < ratios.max


def test_hyperparameters_come_with_the_outcome(run_folder: Path, events: EventAccumulator):
    metrics = torch.load(run_folder / "metrics.pt")
    for name in ("objective/score", "objective/kl", "response/length", "val/score", "val/kl", "val/win_rate"):
        (final,) = events.Scalars(f"final/{name}")
        assert final.value == pytest.approx(metrics[name])
    plugin = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert plugin.session_start_info.hparams["kl_coef"].number_value == pytest.approx(0.1)


def test_the_run_is_the_same_and_other_loggers_are_left_alone(run_folder: Path, tmp_path: Path):
    modules = []
    for callbacks in ([], [Cockpit(every=1)]):
        logger = CSVLogger(tmp_path, name=str(len(callbacks)), version=0)
        modules.append(make_module(run_folder / "lm"))
        make_trainer(tmp_path, callbacks=callbacks, logger=logger).fit(modules[-1], make_data(tmp_path))
    one, other = (module.state_dict() for module in modules)
    assert all(value.equal(other[name]) for name, value in one.items())
    read = [(tmp_path / f"{n}/version_0/metrics.csv").read_text().splitlines()[0] for n in (0, 1)]
    assert read[0] == read[1]
