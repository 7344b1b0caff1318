"""ImportanceCorrection: its weights by hand, what it combines with, and a bandit whose optimum is known."""

import math
from typing import Any

import pytest
import torch

from lit_ppo import AdvantageEstimator, Engine, PromptDataModule, TransformersEngine
from lit_ppo.callbacks import AdvantageNormalization, ImportanceCorrection
from lit_ppo.functional import effective_sample_fraction, importance_weights
from lit_ppo.models.load import load_causal_lm
from tests.helpers.experiences import make_micro_batch
from tests.helpers.tiny import write_rows
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "ImportanceCorrection": Trick(
        acts={},
        refuses={"cap": 0.0, "level": "batch", "mode": "clip"},
        knobs={
            "cap": ({}, {"cap": 1.5}),
            "level": ({}, {"level": "sequence"}),
            "mode": ({}, {"mode": "mask"}),
        },
    )
}

MASK = torch.tensor([[True, True, False], [True, True, True]])
OLD = torch.tensor([[0.4, 0.5, 0.9], [0.1, 0.6, 0.3]]).log()
SAMPLED = torch.tensor([[0.2, 0.1, 0.1], [0.2, 0.4, 0.1]]).log()
# ratios 2, 5 and 1/2, 3/2, 3; of the responses 10 and 9/4


@pytest.mark.parametrize(
    ("cap", "level", "mode", "weights"),
    [
        (2.5, "token", "truncate", [[2.0, 2.5, 1.0], [0.5, 1.5, 2.5]]),
        (2.5, "token", "mask", [[2.0, 0.0, 1.0], [0.5, 1.5, 0.0]]),
        (2.5, "sequence", "truncate", [[2.5, 2.5, 1.0], [2.25, 2.25, 2.25]]),
        (2.5, "sequence", "mask", [[0.0, 0.0, 1.0], [2.25, 2.25, 2.25]]),
    ],
)
def test_weights_by_hand(cap: float, level: Any, mode: Any, weights: list[list[float]]):
    nan = torch.where(MASK, 0.0, torch.nan)  # what is masked does not leak
    found = importance_weights(OLD + nan, SAMPLED + nan, MASK, cap, level, mode)
    torch.testing.assert_close(found, torch.tensor(weights))


def test_effective_fraction_by_hand():
    """Weights 2, 5, 0.5, 1.5, 3: mean 2.4, mean square (4 + 25 + 0.25 + 2.25 + 9) / 5 = 8.1."""
    weights = importance_weights(OLD, SAMPLED, MASK, math.inf)
    assert effective_sample_fraction(weights, MASK).item() == pytest.approx(2.4**2 / 8.1)


def test_advantages_are_weighed_and_what_was_capped_is_logged():
    rows = make_micro_batch(
        MASK, logprobs=OLD, sampling_logprobs=SAMPLED, response_mask=MASK, advantages=torch.full((2, 3), -3.0)
    )
    ImportanceCorrection(cap=2.5).on_minibatch_start(None, None, rows)
    expected = torch.tensor([[-6.0, -7.5, -3.0], [-1.5, -4.5, -7.5]])
    torch.testing.assert_close(rows.advantages, expected)
    assert rows.logged == {
        "policy/importance_weight": pytest.approx((2 + 2.5 + 0.5 + 1.5 + 2.5) / 5),
        "policy/importance_capped_fraction": pytest.approx(2 / 5),
    }
    rows.sampling_logprobs = None  # the policy itself sampled
    ImportanceCorrection(cap=2.5).on_minibatch_start(None, None, rows)
    assert rows.logged["policy/importance_weight"] == 1


def test_normalisation_after_the_weights_is_refused():
    normalize = AdvantageNormalization(scope="minibatch")
    with pytest.raises(ValueError, match="AdvantageNormalization comes after ImportanceCorrection"):
        run_updates([ImportanceCorrection(), normalize])
    run_updates([normalize, ImportanceCorrection()])
    run_updates([ImportanceCorrection(), AdvantageNormalization()])
    with pytest.raises(ValueError, match="both would weigh the policy loss"):
        run_updates([ImportanceCorrection(), ImportanceCorrection()])


def test_the_default_engine_has_nothing_to_bring():
    assert TransformersEngine().sync(iter([])) is None


PROMPT = "the film was"


class Biased(Engine):
    """Draws one token from the policy with the probability of one of them multiplied.

    Args:
        path: Of the model.
        token: Whose probability is multiplied.
        factor: By this.
    """

    def __init__(self, path: str, token: int, factor: float) -> None:
        self.model, self.token, self.factor = load_causal_lm("engine", path, {}).eval(), token, factor

    def sync(self, weights: Any) -> None:
        self.model.load_state_dict(dict(weights), strict=False)

    @torch.no_grad()
    def generate(self, prompt_ids: Any, n: int, config: Any, seeds: Any) -> Any:
        logits = self.model(torch.tensor(prompt_ids)).logits[:, -1]
        logits[:, self.token] += math.log(self.factor)
        random = torch.Generator().manual_seed(seeds[0])
        ids = torch.multinomial(logits.softmax(-1), n, replacement=True, generator=random).reshape(-1, 1)
        return ids.tolist(), logits.log_softmax(-1).repeat_interleave(n, 0).gather(1, ids).tolist()


class NoBaseline(AdvantageEstimator):
    """The score itself, from which the expected update of a bandit is known."""

    needs_values = False

    def __call__(self, experience: Any) -> Any:
        return experience.rewards, None


def probabilities(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokenizer(PROMPT)["input_ids"]])).logits[0, -1].softmax(-1)


@pytest.mark.parametrize("corrected", [True, False])
def test_bandit_with_a_perturbed_sampler(tmp_path: Any, lm: Any, corrected: bool):
    """Two arms pay 1 and 0.9; the sampler draws the second 1.9 times too often.

    By the policy gradient the log-odds of the second arm change in proportion to 0.9 - 1 < 0: the optimum is the first.
    With the sampler's draws, not corrected, they change in proportion to 0.9 * 1.9 - 1 > 0. No weight is over the cap
    of 2: the first arm's is at most 1.9.
    """
    start = make_module(lm)
    first, second = probabilities(start.models.actor.model, start.tokenizer).topk(2).indices.tolist()
    pay = {start.tokenizer.decode([first]): 1.0, start.tokenizer.decode([second]): 0.9}
    module = make_module(
        lm, engine=Biased(str(lm), second, 1.9), generation={"max_new_tokens": 1}, samples_per_prompt=512, critic=None,
        reference=None, advantages=NoBaseline(), rewards=lambda responses: [pay.get(r.strip(), 0.0) for r in responses],
        ppo_epochs=1, minibatch_size=512, micro_batch_size=None, clip_range=None, skip_special_tokens=False,
    )  # fmt: skip
    trainer = make_trainer(tmp_path, max_steps=60, callbacks=[ImportanceCorrection(cap=2.0)] if corrected else [])
    data = PromptDataModule(write_rows(tmp_path / "prompts.jsonl", [{"prompt": PROMPT}]), batch_size=1, seed=0)
    trainer.fit(module, data)
    odds = probabilities(module.actor.model, module.tokenizer)[[first, second]]
    assert (odds[0] > 0.9) == corrected
    assert (odds[1] > 0.9) == (not corrected)
