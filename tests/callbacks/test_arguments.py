"""Arguments of tricks that depend on each other, defaults from papers, and modules that lack what a trick needs."""

import inspect
from typing import Any

import pytest

from lit_ppo import callbacks
from tests.helpers.toy import Critic, Toy
from tests.helpers.toy_runs import run_updates


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("AdaptiveKL", {"final_target": 3.0}, r"final_target=3.0, decay_updates=None\): give all or none of"),
        ("AdaptiveKL", {"decay_updates": 5}, r"final_target=None, decay_updates=5\): give all or none of"),
        ("CriticWarmup", {"ppo_epochs": 2}, r"updates=None\): give updates, value_loss or explained_variance to end"),
        ("KLLoss", {"coef": 0.1, "kind": "k1"}, r"kind='k1'\): its expected gradient is zero"),
        ("KLLoss", {"coef": 0.1, "kind": "exact", "to": "old"}, r"kind='exact'\): .* use 'k2' or 'k3'"),
        (
            "LearningRateAdaptation",
            {"target": 1, "minimum": 0.1, "maximum": 0.1},
            r"minimum=0.1\): must be below maximum=0.1",
        ),
        ("MissingEndPenalty", {}, r"penalty=None, score=None\): give exactly one of"),
        ("MissingEndPenalty", {"penalty": 1.0, "score": -1.0}, r"penalty=1.0, score=-1.0\): give exactly one of"),
        ("MissingEndPenalty", {"penalty": 0.0}, r"penalty=0.0\): must be a finite number, above 0"),
        ("PrioritizedSampling", {}, r"threshold=None, scale=None\): give exactly one of"),
        ("PrioritizedSampling", {"threshold": 1.0, "scale": (0, 1)}, r"threshold=1.0, scale=.*: give exactly one of"),
        ("PrioritizedSampling", {"scale": (2.0, 1.0)}, r"scale=.*: must be two finite numbers in ascending order"),
        ("ReferenceUpdate", {}, r"every=None, decay=None\): give exactly one of"),
        ("ReferenceUpdate", {"every": 2, "decay": 0.9}, r"every=2, decay=0.9\): give exactly one of"),
        ("ReferenceUpdate", {"decay": 1.0}, r"decay=1.0\): must be a finite number, above 0 and below 1"),
        (
            "RewardNormalization",
            {"statistics": "given", "mean": 1.0},
            r"std=None\): statistics='given'; give",
        ),
        (
            "RewardNormalization",
            {"statistics": "given", "std": 1.0},
            r"mean=None\): statistics='given'; give",
        ),
        (
            "RewardNormalization",
            {"statistics": "batch", "mean": 1.0},
            r"mean=1.0\): statistics='batch'; give",
        ),
        ("RewardNormalization", {"statistics": "given", "mean": 1.0, "std": 0.0}, r"std=0.0\): must be"),
        ("RewardScaling", {"statistics": "batch", "decay": 0.9}, r"decay=0.9\): has no effect with"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(name: str, arguments: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=rf"^{name}\(.*{problem}"):
        getattr(callbacks, name)(**arguments)


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("AdaptiveKL", {"target": 6.0, "horizon": 10_000}),
        ("CurriculumSampling", {"start": 0.2}),
        ("DualClip", {"c": 3.0}),
        ("LearningRateAdaptation", {"factor": 1.5, "minimum": 1e-7, "maximum": 1e-4}),
        ("LengthPenalty", {"max_penalty": None}),
        ("RejectionSampling", {"every": 2}),
        ("RewardNormalization", {"statistics": "running"}),
        ("RewardScaling", {"statistics": "running", "decay": None}),
        ("RewardWhitening", {"rows": None, "unbiased": True}),
        ("ValueClipping", {"clip_range": 0.2}),
    ],
)
def test_defaults_are_those_of_the_source_or_the_page(name: str, defaults: dict[str, Any]):
    parameters = inspect.signature(getattr(callbacks, name)).parameters
    assert {argument: parameters[argument].default for argument in defaults} == defaults


@pytest.mark.parametrize(
    ("trick", "owner", "attribute"),
    [
        (callbacks.AdaptiveKL(), None, "kl_coef"),
        (callbacks.CounterfactualActions(), None, "n_actions"),
        (callbacks.CriticWarmup(1), None, "actor_frozen"),
        (callbacks.CriticWarmup(1, ppo_epochs=2), None, "ppo_epochs"),
        (callbacks.DualClip(), None, "clip_range"),
        (callbacks.KLLoss(0.5, "exact"), Toy, "exact_kl"),
        (callbacks.LeastSquaresCritic(), None, "critic_frozen"),
        (callbacks.LeastSquaresCritic(), None, "n_critic_states"),
        (callbacks.RejectionSampling(2), None, "samples_per_prompt"),
        (callbacks.ValueNormalization(), Critic, "rescale_head"),
    ],
)
def test_a_module_without_what_a_trick_needs_is_refused_before_the_first_rollout(
    trick: Any, owner: Any, attribute: str, monkeypatch: pytest.MonkeyPatch
):
    module = Toy()
    monkeypatch.delattr(owner or module, attribute)
    with pytest.raises(TypeError, match=f"{type(trick).__name__} needs {attribute} .* which (Toy|Critic) lacks"):
        run_updates(trick, module=module)
    assert module.experiences == []
