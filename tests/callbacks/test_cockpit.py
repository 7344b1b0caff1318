"""Cockpit: its event files read back, histograms by hand."""

import math
import re
import warnings
from copy import deepcopy
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_ppo.advantages import GroupRelative
from lit_ppo.callbacks import (
    AdaptiveKL,
    AlignmentTax,
    Cockpit,
    CollapseMonitor,
    CriticWarmup,
    RewardHackingMonitor,
    SampleLogger,
    ValueClipping,
)
from lit_ppo.callbacks.cockpit import LAYOUT
from lit_ppo.experience import Minibatch
from tests.helpers.command import REPOSITORY
from tests.helpers.experiences import make_experience
from tests.helpers.spies import Attach, Recorder, Spy
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toy import Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import count_good, make_data, make_module, make_trainer, texts, write_prompts
from tests.helpers.trick import Trick
from tests.helpers.two_ranks import train_on_two

TRICK = {
    "Cockpit": Trick(
        acts={"every": 1, "figures_every": 1, "best_of_prompts": 3, "best_of": 4},
        refuses={"every": 0, "figures_every": 0, "best_of_prompts": 0, "best_of": -1},
        knobs={
            "every": ({}, {"every": 2}),
            "figures_every": ({}, {"figures_every": 2}),
            "best_of_prompts": ({}, {"best_of_prompts": 2}),
            "best_of": ({}, {"best_of": 0}),
        },
        monitor=True,
    )
}


def watch(folder: Path, updates: int, *others: L.Callback, every: int = 2, **options: Any) -> tuple[Toy, Recorder]:
    logger = Recorder(folder)
    return run_updates([Cockpit(every=every, figures_every=every), *others], updates, logger=logger, **options), logger


# ---- histograms, on the toy


def test_histograms_of_the_first_and_every_second_update(tmp_path: Path):
    """An actor at rest has no ratios."""
    _, logger = watch(tmp_path, 5, CriticWarmup(1))
    names = ["scores", "advantages", "ratios", "lengths"]
    drawn = [(f"histogram/{name}", step) for step in (0, 2, 4) for name in names if (name, step) != ("ratios", 0)]
    assert [(tag, step) for tag, _, step in logger.of("add_histogram")] == drawn
    sizes = {"scores": 8, "advantages": 20, "ratios": 20, "lengths": 8}  # of that update alone
    assert all(len(value) == sizes[tag.removeprefix("histogram/")] for tag, value, _ in logger.of("add_histogram"))


def test_numbers_that_are_not_finite_have_no_histogram(tmp_path: Path):
    """TensorBoard raises on them, and a monitor must not end a run. Here it is one token's advantage."""

    def lose(module: Any, experience: Any) -> None:
        first = torch.arange(experience.advantages.numel()).view_as(experience.advantages) == 0
        experience.advantages = experience.advantages.masked_fill(first, math.inf)

    _, logger = watch(tmp_path, 1, Spy("on_advantages", lose))
    tags = [tag.removeprefix("histogram/") for tag, _, _ in logger.of("add_histogram")]
    assert tags == ["scores", "lengths"]  # the loss and, after a step, the ratios are not finite either


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
    expected = (
        module.logprobs(experience.features, experience.response_ids, actors.seen[1]) - experience.logprobs
    ).exp()[4:]
    assert found["ratios"][10:] == pytest.approx(expected[experience.response_mask[4:]].tolist(), rel=1e-4)
    assert max(abs(ratio - 1) for ratio in found["ratios"]) > 1e-3


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


# ---- on LitPPO


def two_rank_callbacks(folder: Path) -> list[L.Callback]:
    cockpit = Cockpit(every=1, figures_every=1, best_of_prompts=3, best_of=4)
    return [cockpit, AlignmentTax(texts(folder), every=1), Attach(folder)]


def test_two_ranks_show_what_one_shows(tmp_path: Path):
    """But for the ratios, which are those of the first rank's rows: a part of one process's, and not all of them."""
    actor = make_causal_lm(tmp_path / "lm", scale=4.0)
    make_trainer(tmp_path, callbacks=two_rank_callbacks(tmp_path)).fit(make_module(actor), make_data(tmp_path))
    one = torch.load(tmp_path / "recorded.pt")
    train_on_two(tmp_path, actor, callbacks=two_rank_callbacks)
    two = torch.load(tmp_path / "recorded.pt")
    assert [call[:2] for call in two] == [call[:2] for call in one]
    for (kind, tag, ours, _), (_, _, theirs, _) in zip(one, two, strict=True):
        if tag == "histogram/ratios":
            assert 0 < len(theirs) < len(ours)
            assert all(min(abs(ratio - other) for other in ours) < 1e-4 for ratio in theirs)
        elif kind in ("add_histogram", "add_figure") or (kind == "scalar" and tag.startswith("tax/")):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert {tag for kind, tag, *_ in one if kind == "add_figure"} == {"figure/score_against_kl", "figure/scores"}


def letters(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """How long a response is written out."""
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three updates, with everything that can be looked at."""
    folder = tmp_path_factory.mktemp("cockpit")
    actor = make_causal_lm(folder / "lm", scale=4.0)
    logger = TensorBoardLogger(folder, name="run", version=0, default_hp_metric=False)
    monitors = [
        AlignmentTax(texts(folder), every=1),
        SampleLogger(every=2, prompts=3),
        CollapseMonitor(),
        RewardHackingMonitor(gold=letters, prompts=4, every=1),
        Cockpit(every=2, figures_every=1, best_of_prompts=3, best_of=4),
    ]
    callbacks: list[L.Callback] = [AdaptiveKL(target=1.0, horizon=100), ValueClipping(0.2), L.Callback(), *monitors]
    trainer = make_trainer(folder, callbacks=callbacks, logger=logger, max_steps=3, val_check_interval=1)
    data = make_data(folder, val_path=str(write_prompts(folder / "held_out.jsonl", 5)))
    rewards = {"good": count_good, "more": count_good}
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    arguments: dict[str, Any] = {"eval_rewards": {"letters": letters}, "max_skipped_steps": 1}
    module = make_module(actor, rewards=rewards, critic_scheduler=schedule, **arguments)
    module.hparams["_class_path"] = "lit_ppo.LitPPO"  # as Lightning's command does
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Monitor")  # what they have to say is tested elsewhere
        trainer.fit(module, data)
    torch.save({name: float(value) for name, value in trainer.callback_metrics.items()}, folder / "metrics.pt")
    return folder


@pytest.fixture(scope="module")
def events(run_folder: Path) -> EventAccumulator:
    size_guidance = {"histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(run_folder / "run/version_0"), size_guidance=size_guidance).Reload()


def test_every_chart_finds_its_curves_and_no_curve_is_in_two(events: EventAccumulator):
    (told,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(told.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [*LAYOUT]
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts == {title: tags for charts in LAYOUT.values() for title, tags in charts.items()}
    logged = events.Tags()["scalars"]
    found = {title: [name for name in logged for tag in tags if re.match(tag, name)] for title, tags in charts.items()}
    assert [title for title, names in found.items() if not names] == []
    shown = [name for names in found.values() for name in names]
    assert sorted(shown) == sorted(set(shown))
    assert found["score"] == ["val/score", "objective/score"]
    assert sorted(found["fraction of an update's time"]) == [f"time/share/{n}" for n in ("rollout", "score", "update")]
    assert sorted(found["seconds per update"]) == ["time/rollout", "time/score", "time/update"]
    wins = ["", "/good", "/letters", "/more"]
    assert sorted(found["win rate against the reference"]) == [f"val/win_rate{name}" for name in wins]
    left = {"epoch", "hp_metric", "objective/entropy", "policy/loss", "hacking/best_update",
            "tax/loss_increase", "collapse/entropy_per_token", "collapse/kl_per_token", "collapse/length"}  # fmt: skip
    assert {name for name in logged if not name.startswith("final/")} - {*shown} <= left


def test_charts_that_would_stay_empty_are_left_out(run_folder: Path, tmp_path: Path):
    """Neither critic nor reference, one reward, nothing held out, one other monitor: what is left has a curve."""
    logger, attach = TensorBoardLogger(tmp_path, name="run", version=0), Attach(tmp_path)
    arguments = {"critic": None, "reference": None, "kl_coef": 0.0, "samples_per_prompt": 2}
    module = make_module(run_folder / "lm", advantages=GroupRelative(), **arguments)
    trainer = make_trainer(tmp_path, callbacks=[attach, CollapseMonitor(), Cockpit()], logger=logger, max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    ((layout, _, _),) = attach.logger.of("add_custom_scalars")
    assert LAYOUT.keys() - layout.keys() == {"Is the critic right?"}
    logged = EventAccumulator(str(tmp_path / "run/version_0")).Reload().Tags()["scalars"]
    for charts in layout.values():
        for kind, tags in charts.values():
            assert kind == "Multiline"
            assert any(re.match(tag, name) for tag in tags for name in logged), tags
    titles = {title for charts in layout.values() for title in charts}
    curves = {title: tags for charts in LAYOUT.values() for title, tags in charts.items()}
    filled = {title for title, tags in curves.items() if any(re.match(tag, name) for tag in tags for name in logged)}
    assert titles == filled


def layout_of(folder: Path, *callbacks: L.Callback, **module: Any) -> set[str]:
    """The charts of a module that has what is given, trained by a trainer without a data module."""
    logger = Recorder(folder)
    trainer: Any = SimpleNamespace(callbacks=callbacks, loggers=[logger], is_global_zero=True, datamodule=None)
    Cockpit().on_train_start(trainer, SimpleNamespace(**module))  # type: ignore[arg-type]
    ((layout, _, _),) = logger.of("add_custom_scalars")
    return {title for charts in layout.values() for title in charts}


def test_charts_that_nobody_can_tell_of_are_there(tmp_path: Path):
    """A module that says nothing of itself; of other monitors one knows. One reward needs no chart of each."""
    titles = {title: tags for charts in LAYOUT.values() for title, tags in charts.items()}
    others = {title for title, (tag, *_) in titles.items() if re.match(r"\^(tax|collapse|hacking)", tag)}
    assert len(others) == 8
    assert layout_of(tmp_path) == titles.keys() - others
    for rewards, judges, absent in (([], None, {"each reward"}), (["good"], None, set()), ([], "judges", set())):
        shown = layout_of(tmp_path, rewards=SimpleNamespace(sources=rewards), eval_rewards=judges)
        assert titles.keys() - others - shown == absent


def test_the_page_names_what_is_logged(events: EventAccumulator):
    """docs/monitoring.md goes by the same questions, and has a row for nearly every chart."""
    page = (REPOSITORY / "docs/monitoring.md").read_text()
    headings = re.findall(r"^## (.*\?)$", page, re.MULTILINE)
    assert headings == [*LAYOUT]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    logged = {*events.Tags()["scalars"]}
    assert named <= logged
    charts = {title: tags for question in LAYOUT.values() for title, tags in question.items()}
    silent = {title for title, tags in charts.items() if not any(re.match(tag, name) for tag in tags for name in named)}
    assert silent == {
        "each reward", "fraction of tokens with a clipped value", "probability ratio, mean", "learning rates"
    }  # fmt: skip
    figures = {*re.findall(r"`(figure/\w+)`", page)}
    assert figures == {*events.Tags()["images"]}


def test_figures_are_in_the_event_file(events: EventAccumulator):
    """As pictures that are not blank."""
    assert set(events.Tags()["images"]) == {"figure/score_against_kl", "figure/scores"}
    for name in events.Tags()["images"]:
        drawn = events.Images(name)
        assert [event.step for event in drawn] == [1, 2]
        for event in drawn:
            picture = Image.open(BytesIO(event.encoded_image_string)).convert("L")
            assert picture.size == (event.width, event.height)
            low, high = picture.getextrema()
            assert (low < 50, high) == (True, 255)


def test_samples_and_histograms_are_in_the_event_file(events: EventAccumulator):
    told = events.Tensors("samples/text_summary")
    assert [event.step for event in told] == [0, 2, 3]
    assert all(b"<table>" in event.tensor_proto.string_val[0] for event in told)
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
        assert final.step == 3  # of the policy after three updates
        assert final.value == pytest.approx(metrics[name])
    plugin = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    hyperparameters = plugin.session_start_info.hparams
    assert hyperparameters["kl_coef"].number_value == pytest.approx(0.1)
    assert hyperparameters["actor_lr"].number_value == pytest.approx(0.1)
    assert hyperparameters["critic_lr"].number_value == pytest.approx(0.1)  # as given, not what the schedule left
    tricks = "AdaptiveKL ValueClipping AlignmentTax SampleLogger CollapseMonitor RewardHackingMonitor Cockpit"
    assert hyperparameters["callbacks"].string_value == tricks
    assert not [name for name in hyperparameters if name.startswith("_")]
    assert "actor_scheduler" not in hyperparameters  # None
    assert "activation_checkpointing" not in hyperparameters  # False


def test_monitors_leave_the_run_and_what_other_loggers_get_as_they_are(run_folder: Path, tmp_path: Path):
    """But for the numbers of their own."""
    tax, hacking = AlignmentTax(texts(tmp_path), every=1), RewardHackingMonitor(letters, prompts=4, every=1)
    modules, read = [], []
    for monitors in ([], [Cockpit(every=1), SampleLogger(every=1, prompts=3), tax, hacking]):
        logger = CSVLogger(tmp_path, name=str(len(monitors)), version=0)
        modules.append(make_module(run_folder / "lm"))
        make_trainer(tmp_path, callbacks=monitors, logger=logger).fit(modules[-1], make_data(tmp_path))
        read.append(Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(","))
    one, other = (module.state_dict() for module in modules)
    assert all(value.equal(other[name]) for name, value in one.items())
    assert [name for name in read[1] if not name.startswith(("tax/", "hacking/"))] == read[0] != read[1]
