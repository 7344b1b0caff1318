"""Cockpit's figures: the points, the line and the outlines that are drawn, by hand and by brute force."""

import ast
import math
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo.callbacks import Cockpit, figures
from tests.helpers.spies import Recorder, Spy, drawn
from tests.helpers.toy import Toy
from tests.helpers.toy_data import Prompts, ToyData
from tests.helpers.toy_runs import run_updates


def watch(folder: Path, updates: int, *others: Any, every: int = 2, **options: Any) -> tuple[Toy, Recorder]:
    logger = Recorder(folder)
    return run_updates([Cockpit(every=every, figures_every=every), *others], updates, logger=logger, **options), logger


def shown(logger: Recorder, name: str) -> dict[int, dict[str, list[list[float]]]]:
    return {step: value for tag, value, step in logger.of("add_figure") if tag == f"figure/{name}"}


def dots_of(figure: dict[str, list[list[float]]]) -> list[list[float]]:
    return figure["this run"]


@pytest.mark.parametrize(("updates", "steps"), [(1, [0]), (2, [1]), (3, [2]), (4, [2, 3]), (5, [2, 4])])
def test_figures_after_every_second_update_and_at_the_end(tmp_path: Path, updates: int, steps: list[int]):
    _, logger = watch(tmp_path, updates)
    assert list(shown(logger, "score_against_kl")) == list(shown(logger, "scores")) == steps


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


def test_the_line_is_the_best_of_the_starting_policys_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every choice of n of the 4 samples of each of 3 training prompts, drawn again from a toy that learnt nothing."""
    monkeypatch.setattr(ToyData, "peeks", ("train",))
    logger = Recorder(tmp_path)
    run_updates([Cockpit(figures_every=1, best_of_prompts=3, best_of=4)], 2, logger=logger)
    start = Toy()
    samples = start.rollout(Prompts(["a", "b", "c"]), samples_per_prompt=4, stream="cockpit")
    scores = start.score(samples).view(3, 4).tolist()
    expected = []
    for n in range(1, 5):
        best = [max(chosen) for row in scores for chosen in combinations(row, n)]
        expected.append([math.log(n) - (n - 1) / n, sum(best) / len(best)])
    for figure in shown(logger, "score_against_kl").values():
        assert figure["starting policy, best of 1 to 4"] == [pytest.approx(point) for point in expected]


def test_samples_of_a_prompt_need_not_be_neighbours():
    """Two samples of each of three prompts: 1 and 6, 2 and 5, 3 and 4; a mean of 3.5 alone, of 5 for the best."""
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 4.0])
    rows = SimpleNamespace(group=torch.tensor([0, 1, 2, 0, 1, 2]))
    asked: list[dict[str, Any]] = []

    def rollout(prompts: Prompts, **kwargs: Any) -> Any:
        asked.append({"prompts": len(prompts.prompts), **kwargs})
        return rows

    module: Any = SimpleNamespace(rollout=rollout, score=lambda experience: scores)
    plain = SimpleNamespace(forward_context=nullcontext)
    trainer: Any = SimpleNamespace(
        callbacks=[], loggers=[], is_global_zero=True, datamodule=ToyData(3), precision_plugin=plain
    )
    cockpit = Cockpit(best_of_prompts=3, best_of=2)
    cockpit.on_train_start(trainer, module)
    assert cockpit.state_dict()["best"] == [3.5, 5.0]
    assert asked == [
        {"prompts": 3, "samples_per_prompt": 2, "logprobs": False, "stream": "cockpit"}
    ]  # texts are enough


@pytest.mark.parametrize("lacks", ["data", "peek", "rollout", "score"])
def test_there_is_no_line_where_nobody_can_be_asked(lacks: str):
    """No error either: it is there for scale."""
    asks = {} if lacks == "peek" else {"peek": lambda split, n: split == "val" or pytest.fail("not needed")}
    data = None if lacks == "data" else SimpleNamespace(**asks)
    trainer: Any = SimpleNamespace(callbacks=[], loggers=[], is_global_zero=True, datamodule=data)
    module: Any = SimpleNamespace(**{name: None for name in ("rollout", "score") if name != lacks})
    cockpit = Cockpit()
    cockpit.on_train_start(trainer, module)
    assert cockpit.state_dict()["best"] == []


def test_no_line_if_none_is_asked_for(tmp_path: Path):
    logger = Recorder(tmp_path)
    run_updates([Cockpit(best_of=0)], 1, logger=logger)
    assert list(shown(logger, "score_against_kl")[0]) == ["_child0", "this run"]


def test_a_run_without_reference_has_no_kl_to_show(tmp_path: Path):
    _, logger = watch(tmp_path, 2, reference=False)
    assert shown(logger, "score_against_kl") == {}
    assert list(shown(logger, "scores")) == [1]


def test_a_run_that_goes_on_without_its_reference_has_no_kl_to_show_either(tmp_path: Path):
    cockpit, logger = Cockpit(every=1, best_of=0), Recorder(tmp_path)
    cockpit.load_state_dict({"updates": 1, "kl": [2.0], "score": [1.0], "start": [1.0], "best": []})
    run_updates([cockpit], 1, logger=logger, reference=False)
    assert [(tag, step) for tag, _, step in logger.of("add_figure")] == [("figure/scores", 1)]


def test_a_resumed_run_that_is_stopped_at_once_draws_what_the_end_draws(tmp_path: Path):
    """Those of the update before the checkpoint, as the run that had it."""
    _, before = watch(tmp_path, 2, save=tmp_path / "two.ckpt")
    stop = Spy("on_train_start", lambda module: setattr(module.trainer, "should_stop", True))
    module, logger = watch(tmp_path, 4, stop, resume=tmp_path / "two.ckpt")
    assert int(module.updates) == 2
    assert logger.of("add_figure") == before.of("add_figure")[-2:]


def test_score_distributions_are_shares_of_now_and_the_start(tmp_path: Path):
    """24 bins from -1 to 11, half a point each: 0 is in the third, 10 in the 23rd; 3 of 8 are 0.375."""
    given = lambda update: [[0.0] * 5 + [10.0] * 3, [0.0] * 2 + [10.0] * 4 + [-1.0, 11.0]][update]  # noqa: E731
    _, logger = watch(tmp_path, 2, every=1, scores=given)
    figure = shown(logger, "scores")[1]
    steps = {label: sorted({(x, y) for x, y in figure[label] if y}) for label in ("at the start", "now, update 1")}
    assert steps["at the start"] == [(0.0, 0.625), (0.5, 0.625), (10.0, 0.375), (10.5, 0.375)]
    assert steps["now, update 1"] == [
        *[(-1.0, 0.125), (-0.5, 0.125), (0.0, 0.25), (0.5, 0.25)],
        *[(10.0, 0.5), (10.5, 0.125), (10.5, 0.5), (11.0, 0.125)],
    ]
    means = [figure[label][0][0] for label in figure if label[0] == "_"]
    assert means == [3.75, 6.25]


def test_scores_that_are_all_alike_or_not_finite_end_no_run(tmp_path: Path):
    _, logger = watch(tmp_path, 1, scores=lambda update: [3.0] * 8)
    outline = shown(logger, "scores")[0]["at the start"]
    assert max(outline) == [4.0, 0.0]  # bins that can be seen
    assert max(y for _, y in outline) == 1.0
    for lost in (0, 1):
        given = lambda update: [float("nan" if update == lost else 1), *[1.0] * 7]  # noqa: B023, E731
        _, logger = watch(tmp_path, 3, every=1, scores=given)
        assert list(shown(logger, "scores")) == [2] * lost
        assert len(dots_of(shown(logger, "score_against_kl")[2])) == 2


def test_dots_are_coloured_by_their_update_from_the_first_to_the_last():
    """An update without a number has no dot, and the ones behind it keep their colours."""
    dots: Any = figures.score_against_kl([5.0, math.nan, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], []).axes[0].collections[0]
    assert dots.get_array().tolist() == [0, 2, 3]
    assert dots.get_clim() == (0, 3)
    assert figures.score_against_kl([5.0], [1.0], []).axes[0].collections[0].get_clim() == (0, 1)


def test_a_start_that_reaches_further_than_now_is_seen_whole():
    """Bins of half a point again: -1 is in the first, 11 in the last, and none of the four is left out."""
    figure = drawn(figures.score_distributions([2.0, 3.0], [-1.0, 2.0, 3.0, 11.0], 7))
    steps = {label: sorted({(x, y) for x, y in figure[label] if y}) for label in ("at the start", "now, update 7")}
    assert steps["at the start"] == [
        *[(-1.0, 0.25), (-0.5, 0.25), (2.0, 0.25), (2.5, 0.25)],
        *[(3.0, 0.25), (3.5, 0.25), (10.5, 0.25), (11.0, 0.25)],
    ]
    assert steps["now, update 7"] == [(2.0, 0.5), (2.5, 0.5), (3.0, 0.5), (3.5, 0.5)]


def test_what_draws_is_loaded_with_the_first_figure():
    """It takes a second, which a run without TensorBoard, or the command's help, need not wait for."""
    tree = ast.parse(Path(figures.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in imports if "matplotlib" in ast.unparse(node)]
