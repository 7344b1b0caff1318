"""Several score sources as one, and what counts as a source."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lit_ppo.rewards import RewardFunction, RewardModel, Rewards, WeightedRewards, as_source, eval_sources, scores_of
from tests.helpers.rewards import TWO, experience, lengths
from tests.helpers.tiny import make_reward_model

BY_CLASS = {"class_path": "lit_ppo.rewards.RewardFunction", "init_args": {"function": f"{__name__}.ones"}}


def ones(responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


def test_weighted_sum_and_each_ones_own_scores():
    rows = experience(**TWO)
    source = as_source({"length": {"source": lengths, "weight": 0.5}, "flat": ones, "watched": {"source": ones}})
    assert source(rows).tolist() == [31 / 2 + 2, 2 / 2 + 2]
    assert {name: scores.tolist() for name, scores in rows.extras.items()} == {
        "length": [31.0, 2.0],
        "flat": [1.0, 1.0],
        "watched": [1.0, 1.0],
    }


def test_weight_of_zero_only_reports_and_negative_ones_penalise():
    rows = experience(**TWO)
    assert WeightedRewards({"a": lengths, "b": ones}, {"a": 0, "b": -2})(rows).tolist() == [-2.0, -2.0]
    assert rows.extras["a"].tolist() == [31.0, 2.0]


def test_reward_models_among_several_are_built_and_found(tmp_path: Path):
    path = make_reward_model(tmp_path)
    source = as_source({"model": RewardModel(str(path)), "ones": ones})
    source.build()
    assert len(list(source.parameters())) == len(list(source.sources["model"].parameters())) > 0
    alone = RewardModel(str(path))(experience(["a film"], [" good"])).item()
    assert source(experience(["a film"], [" good"])).item() == pytest.approx(alone + 1, rel=1e-5)
    source.train()
    assert not source.sources["model"].training


def test_wrong_scores_of_one_of_several_name_it():
    class Wrong(nn.Module):
        def forward(self, experience):
            return torch.ones(2, 1)

    with pytest.raises(ValueError, match=r"rewards\['mine'\]: returned values of shape \(2, 1\) for 2 responses"):
        as_source({"mine": Wrong()})(experience(**TWO))


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        ({}, r"^LitPPO\(rewards=\{\}\): is empty"),
        ({"a.b": ones}, "names must be non-empty, without dots"),
        ({"": ones}, "names must be non-empty, without dots"),
        ({"a": {"source": ones, "weight": math.nan}}, r"^LitPPO\(rewards\['a'\].weight=nan\): must be a finite number"),
        ({"a": {"sauce": ones}}, r"^LitPPO\(rewards\['a'\]=.*\): has the keys sauce; give source and weight"),
    ],
)
def test_bad_combinations(rewards: Any, says: str):
    with pytest.raises(ValueError, match=says):
        as_source(rewards)
    with pytest.raises(ValueError, match="there is no source named b; there are a"):
        WeightedRewards({"a": ones}, {"b": 1.0})


def test_rewards_for_evaluation_take_the_same_forms_without_weights():
    rows, source = experience(**TWO), eval_sources("LitPPO", None, {"plain": ones, "named": {"source": lengths}})
    source(rows)
    assert {name: scores.tolist() for name, scores in rows.extras.items()} == {"plain": [1, 1], "named": [31, 2]}
    with pytest.raises(ValueError, match=r"^LitPPO\(eval_rewards\['a'\].weight=2.0\): .* leave its weight out"):
        eval_sources("LitPPO", None, {"a": {"source": ones, "weight": 2.0}})
    with pytest.raises(ValueError, match=r"^LitPPO\(eval_rewards\['a'\]=.*\): has the keys sauce; give source"):
        eval_sources("LitPPO", None, {"a": {"sauce": ones}})


def test_as_source_tells_sources_from_functions():
    model, function = RewardModel("m"), RewardFunction(ones)
    assert as_source(model) is model
    assert as_source(function) is function
    source = lambda experience: torch.zeros(2)  # noqa: E731
    assert as_source(source) is source
    assert isinstance(as_source(ones), RewardFunction)
    assert scores_of(as_source("tests.rewards.test_weighted.ones"), experience(**TWO)).tolist() == [1.0, 1.0]

    async def awaited(experience):
        return [0.0]

    with pytest.raises(TypeError, match=r"^LitPPO\(rewards=.*\): is async, .* returns asyncio.run"):
        as_source(awaited)
    for nonsense in (None, 3, [ones]):
        with pytest.raises(TypeError, match="is neither a score source nor a function"):
            as_source(nonsense)


@pytest.mark.parametrize(
    "config",
    [
        BY_CLASS,
        {"plain": BY_CLASS, "weighted": {"source": BY_CLASS, "weight": 0.0}},
        {"unweighted": {"source": BY_CLASS}},
        {"unweighted": {"source": f"{__name__}.ones"}, "off": {"source": BY_CLASS, "weight": 0}},
        f"{__name__}.ones",
    ],
)
def test_configurations_give_sources(config: Any):
    def module(rewards: Rewards) -> Any:
        return as_source(rewards)

    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(module)
    chosen = parser.instantiate(parser.parse_object({"rewards": config}))
    assert scores_of(module(chosen.rewards), experience(**TWO)).tolist() == [1.0, 1.0]
