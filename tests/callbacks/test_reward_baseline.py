"""RewardBaseline against greedy responses found one prompt at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_ppo import LitPPO
from lit_ppo.callbacks import RewardBaseline, RewardClipping, RewardNormalization, RewardScaling
from tests.helpers.first_update import ENDS, first_update, return_mean
from tests.helpers.recorder import record
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toy import Rows, Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.trick import Trick

TRICK = {
    "RewardBaseline": Trick(
        acts={},
        refuses={"policy": "critic"},
        knobs={"policy": ({}, {"policy": "reference"})},
    )
}

GENERATION = {"max_new_tokens": 8, "eos_token_id": ENDS}
KEPT = [9, 2, 8, 3, 0]  # of 7 prompts, two samples each: prompts 4, 1, 4, 1, 0


class Keep(L.Callback):
    """Cuts the rollout to some rows, in another order."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def on_rollout_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        experience.keep(self.rows)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharp enough that a greedy response hangs on its prompt."""
    return make_causal_lm(tmp_path_factory.mktemp("lm"), scale=4.0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp("other"), seed=5, scale=4.0)


def letters(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """Letters, without the spaces between words."""
    return [float(len(response.replace(" ", ""))) for response in responses]


def words(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(len(response.split())) for response in responses]


def greedy_response(path: Path, prompt: str) -> str:
    """By the stock model, this prompt alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, pad_token_id=0, **GENERATION)[0, inputs.input_ids.shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def baselines(path: Path, experience: Any, reward: Callable[..., list[float]] = letters) -> list[float]:
    found = [reward([], [greedy_response(path, prompt)])[0] for prompt in experience.prompts]
    assert len(set(found)) > 1
    return found


def greedy_sum(model: torch.nn.Linear, rows: Rows, row: int) -> float:
    """The toy's greedy score of a row: the sum of its most likely actions."""
    length = int(rows.response_mask[row].sum())
    logits = [(model.weight @ rows.features[row, t] + model.bias).tolist() for t in range(length)]
    return float(sum(values.index(max(values)) for values in logits))


@pytest.mark.parametrize("policy", ["actor", "reference"])
def test_the_greedy_score_is_subtracted_on_a_module_that_is_not_ours(policy: str):
    module = run_updates(RewardBaseline(policy), kl_coef=0.0)
    (experience,) = module.experiences
    baseline = [greedy_sum(getattr(Toy(), policy), experience, row) for row in range(8)]
    assert len(set(baseline)) > 2
    expected = [score - off for score, off in zip(experience.raw_scores.tolist(), baseline, strict=True)]
    assert experience.scores.tolist() == pytest.approx(expected, rel=1e-6)
    assert experience.rewards.sum(1).tolist() == pytest.approx(expected, rel=1e-6)
    assert module.trainer.logged_metrics["reward/baseline"].item() == pytest.approx(sum(baseline) / 8)


def test_rows_of_a_group_share_the_baseline_of_its_first_row():
    """Rows kept of four prompts with two samples each: groups 3, 1, 3, 0; the second 3 has the first one's."""
    module = Toy(episodes=4)
    module.samples_per_prompt = 2
    run_updates([Keep([7, 2, 6, 1]), RewardBaseline()], module=module)
    (experience,) = module.experiences
    assert experience.group.tolist() == [3, 1, 3, 0]
    seven, two, six, one = (greedy_sum(Toy().actor, experience, row) for row in range(4))
    assert seven != six
    expected = experience.raw_scores - torch.tensor([seven, two, seven, one])
    torch.testing.assert_close(experience.scores, expected)
    assert 2 * seven + two + one != 4 / 3 * (seven + two + one)
    assert module.trainer.logged_metrics["reward/baseline"].item() == pytest.approx((2 * seven + two + one) / 4)


def test_returns_of_litppo_are_those_of_the_differences(tmp_path: Path, lm: Path):
    """By the stock model's greedy responses to each prompt alone; scores of two rewards stay those of the samples."""
    rewards = {"letters": letters, "words": {"source": words, "weight": 0.5}}
    experience, row = first_update(tmp_path, lm, RewardBaseline(), rewards=rewards, samples_per_prompt=2)
    assert len(experience) == 14
    for name, reward in (("letters", letters), ("words", words)):
        own = reward([], experience.responses)
        assert experience.extras[name].tolist() == own
        assert row[f"objective/score/{name}"] == pytest.approx(sum(own) / 14)
    both = zip(baselines(lm, experience), baselines(lm, experience, words), strict=True)
    baseline = [a + 0.5 * b for a, b in both]
    raw = experience.raw_scores.tolist()
    assert experience.scores.tolist() == pytest.approx([a - b for a, b in zip(raw, baseline, strict=True)])
    assert row["reward/baseline"] == pytest.approx(sum(baseline) / 14)
    assert row["objective/score"] == pytest.approx(sum(raw) / 14)
    assert row["value/return_mean"] == pytest.approx(return_mean(experience, experience.scores.tolist()), rel=1e-5)
    assert abs(row["value/return_mean"] - return_mean(experience, raw)) > 0.1


@pytest.mark.parametrize("policy", ["actor", "reference"])
def test_rows_that_were_kept_find_their_prompts_baseline(tmp_path: Path, lm: Path, other: Path, policy: str):
    _, recorder, _ = record(
        tmp_path, lm, Keep(KEPT), RewardBaseline(policy), max_steps=1, rewards=letters, generation=GENERATION,
        samples_per_prompt=2, reference=str(other),
    )  # fmt: skip
    (experience,) = recorder.experiences
    assert experience.group.tolist() == [4, 1, 4, 1, 0]
    baseline = baselines(lm if policy == "actor" else other, experience)
    expected = [a - b for a, b in zip(experience.raw_scores.tolist(), baseline, strict=True)]
    assert experience.scores.tolist() == pytest.approx(expected)


def test_the_actor_is_the_one_of_this_update(tmp_path: Path, lm: Path):
    """It starts as the stock model; a large step then parts them."""
    _, recorder, _ = record(
        tmp_path, lm, RewardBaseline(), rewards=letters, generation=GENERATION, ppo_epochs=1,
        actor_optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
    )  # fmt: skip
    taken = [(experience.raw_scores - experience.scores).tolist() for experience in recorder.experiences]
    first, second = (baselines(lm, experience) for experience in recorder.experiences)
    assert taken[0] == pytest.approx(first)
    assert taken[1] != pytest.approx(second)


def test_main_rollouts_are_the_same_with_and_without_it(tmp_path: Path, lm: Path):
    """At a rate of 0 every update samples from the same policy, so that only random numbers could tell them apart."""
    frozen = {"actor_optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    runs = [record(tmp_path, lm, *tricks, **frozen) for tricks in ([], [RewardBaseline()])]
    assert [module.rollouts for module, _, _ in runs] == [2, 2]
    for plain, based in zip(*(recorder.experiences for _, recorder, _ in runs), strict=True):
        assert torch.equal(plain.response_ids, based.response_ids)
        assert torch.equal(plain.raw_scores, based.raw_scores)
    assert runs[0][1].minibatches == runs[1][1].minibatches


def test_each_prompt_is_asked_once_and_all_in_one_batch(tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch):
    asked, rollout = [], LitPPO.rollout

    def counted(self: LitPPO, prompts: Any, **kwargs: Any) -> Any:
        result = rollout(self, prompts, **kwargs)
        asked.append((len(result), kwargs))
        return result

    monkeypatch.setattr(LitPPO, "rollout", counted)
    record(tmp_path, lm, RewardBaseline("reference"), max_steps=1, samples_per_prompt=3)
    arguments = {"samples_per_prompt": 1, "do_sample": False, "policy": "reference", "logprobs": False}
    assert asked[1:] == [(21, {}), (7, {**arguments, "stream": "baseline"})]  # after the module's trial before the run


def test_the_reference_is_needed_where_it_responds():
    module = Toy(reference=False)
    with pytest.raises(ValueError, match=r"RewardBaseline needs a reference, but Toy\(reference=None\)"):
        run_updates(RewardBaseline("reference"), module=module)
    assert module.experiences == []


@pytest.mark.parametrize("rescaling", [RewardNormalization(), RewardScaling(), RewardClipping(3.0)])
def test_it_stands_ahead_of_what_changes_the_unit(rescaling: L.Callback):
    name = type(rescaling).__name__
    with pytest.raises(ValueError, match=f"RewardBaseline comes after {name} in the list.*; put RewardBaseline first"):
        run_updates([rescaling, RewardBaseline()])
    assert len(run_updates([RewardBaseline(), rescaling]).experiences) == 1
