"""Cockpit: its event files read back, histograms by hand."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_ppo.callbacks import AlignmentTax, Cockpit, CriticWarmup
from lit_ppo.callbacks.cockpit import LAYOUT
from tests.callbacks.test_alignment_tax import texts
from tests.callbacks.toy import Recorder, Spy, Toy, run_updates
from tests.callbacks.trick import Trick
from tests.tiny import make_causal_lm
from tests.toys import count_good, make_data, make_module, make_trainer, write_prompts

TRICK = {"Cockpit": Trick(acts={"every": 1}, refuses={"every": 0}, knobs={"every": ({}, {"every": 2})}, monitor=True)}
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


# ---- on LitPPO


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
