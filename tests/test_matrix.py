"""Every trick beside every other, and on every kind of module: two updates, or refused before the first rollout.

One run has several tricks; every two that go together meet in some run. What is refused is tried on its own.
"""

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from lit_ppo import PromptDataModule
from lit_ppo.advantages import GroupRelative, LeaveOneOut, Reinforce
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_module, make_trainer, texts, write_prompts
from tests.helpers.trick import make_trick, tricks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Monitor", "ignore:DynamicSampling"
)  # what monitors have to say is tested elsewhere

TRICKS = tricks()
LORA = {"r": 2, "target_modules": "all-linear"}
MODULES: dict[str, dict[str, Any]] = {
    "lora": {"actor_lora": LORA, "critic_lora": LORA},
    "reference=None": {"reference": None},
    "Reinforce": {"critic": None, "advantages": Reinforce()},
    "GroupRelative": {"critic": None, "advantages": GroupRelative(), "samples_per_prompt": 2, "kl_coef": 0.0},
    "LeaveOneOut": {"critic": None, "advantages": LeaveOneOut(), "samples_per_prompt": 2},
}
CRITIC_FREE = [name for name, arguments in MODULES.items() if "critic" in arguments]
NEED_A_CRITIC = (
    "AdvantageRegression",
    "CounterfactualActions",
    "CriticWarmup",
    "LeastSquaresCritic",
    "ValueClipping",
    "ValueNormalization",
)
NEED_A_REFERENCE = ("AdaptiveKL", "AdvantageRegression", "KLLoss", "ReferenceUpdate")
# What is refused, and how the message names the other side; all else trains.
REFUSED: dict[tuple[str, str], str] = {
    **{(trick, "reference=None"): "LitPPO(reference=None)" for trick in NEED_A_REFERENCE},
    **{(trick, free): "LitPPO(critic=None)" for trick in NEED_A_CRITIC for free in CRITIC_FREE},
    ("ReferenceUpdate", "lora"): "LitPPO's reference to its actor: they share",
    ("AdvantageRegression", "GroupRelative"): "LitPPO(kl_coef=0.0)",
    ("AdaptiveKL", "GroupRelative"): "LitPPO(kl_coef=0.0)",  # the estimator itself refuses another
    ("RewardWhitening", "GroupRelative"): "LitPPO(advantages=GroupRelative)",
    ("DynamicSampling", "RejectionSampling"): "RejectionSampling",
    ("RejectionSampling", "GroupRelative"): "GroupRelative",
    ("RejectionSampling", "LeaveOneOut"): "LeaveOneOut",
    ("CurriculumSampling", "PrioritizedSampling"): "PrioritizedSampling",
    ("RewardNormalization", "RewardScaling"): "RewardScaling",
    ("CriticWarmup", "LeastSquaresCritic"): "LeastSquaresCritic",
    ("AdvantageNormalization", "AdvantageRegression"): "AdvantageNormalization",
    ("AdvantageRegression", "CounterfactualActions"): "CounterfactualActions",
    ("AdvantageRegression", "CriticWarmup"): "CriticWarmup",
    ("AdvantageRegression", "DualClip"): "DualClip",
    ("AdvantageRegression", "ImportanceCorrection"): "ImportanceCorrection",
    ("AdvantageRegression", "KLEarlyStop"): "KLEarlyStop",
    ("AdvantageRegression", "KLLoss"): "KLLoss(kind='k2')",
    ("AdvantageRegression", "LearningRateAdaptation"): "LearningRateAdaptation",
    ("AdvantageRegression", "ReferenceUpdate"): "ReferenceUpdate",
    ("AdvantageRegression", "RejectionSampling"): "RejectionSampling",
    ("AdvantageRegression", "RewardNormalization"): "RewardNormalization(statistics='running')",
    ("AdvantageRegression", "RewardScaling"): "RewardScaling(statistics='running')",
    ("AdvantageRegression", "RewardWhitening"): "RewardWhitening",
    ("AdvantageRegression", "ValueClipping"): "ValueClipping",
    ("AdvantageRegression", "ValueNormalization"): "ValueNormalization",
    ("CounterfactualActions", "DualClip"): "DualClip",
    ("CounterfactualActions", "RejectionSampling"): "RejectionSampling",
    ("CounterfactualActions", "RewardWhitening"): "RewardWhitening",
    ("LeastSquaresCritic", "RejectionSampling"): "RejectionSampling",
    ("LeastSquaresCritic", "RewardWhitening"): "RewardWhitening",
    ("LeastSquaresCritic", "ValueClipping"): "LeastSquaresCritic",
    ("LeastSquaresCritic", "ValueNormalization"): "LeastSquaresCritic",
}
EXCLUSIVE = [pair for pair in REFUSED if TRICKS.keys() >= {*pair}]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and the files that tricks read."""
    folder = tmp_path_factory.mktemp("matrix")
    make_causal_lm(folder / "lm", scale=4.0, n_layer=1)
    write_prompts(folder / "prompts.jsonl")
    texts(folder)
    return folder


def two_updates(names: tuple[str, ...], **module: Any) -> tuple[str | None, int]:
    """The refusal, if there was one, and the number of updates made."""
    samples = {"samples_per_prompt": 2} if "DynamicSampling" in names else {}
    given = {"generation": {"max_new_tokens": 4}, "minibatch_size": 4, **samples, **module}
    made_module = make_module(Path("lm"), **given)
    trainer = make_trainer(Path(), callbacks=[make_trick(name, live=True) for name in names])
    try:
        trainer.fit(made_module, PromptDataModule("prompts.jsonl", batch_size=6, seed=0))
    except (ValueError, TypeError) as error:
        assert made_module.rollouts == trainer.global_step == 0, "refused too late"
        return str(error), 0
    return None, trainer.global_step


def groups(size: int) -> list[tuple[str, ...]]:
    """Sets of tricks in which every two that go together meet at least once; greedy.

    A set starts with two that have not met, and takes the trick that has not yet met the most of the set.
    """
    names = sorted(TRICKS)
    unmet = {*combinations(names, 2)} - {*EXCLUSIVE}
    found = []
    while unmet:
        group = list(min(unmet))
        for _ in range(size - 2):
            fit = [n for n in names if n not in group and not any((*sorted((n, m)),) in EXCLUSIVE for m in group)]
            group.append(max(fit, key=lambda n: sum((*sorted((n, m)),) in unmet for m in group)))
        found.append((*sorted(group),))
        unmet -= {*combinations(sorted(group), 2)}
    return found


def compatible_sets() -> list[list[str]]:
    """As few sets as it takes for every trick to be in one, in each all that go with those before them."""
    found: list[list[str]] = []
    while left := [name for name in sorted(TRICKS) if not any(name in chosen for chosen in found)]:
        chosen: list[str] = []
        for name in [*left, *sorted(TRICKS.keys() - {*left})]:
            chosen += [name] if not any((*sorted((name, other)),) in EXCLUSIVE for other in chosen) else []
        found.append(chosen)
    return found


TOGETHER = groups(size=12)
ON_A_MODULE = [
    (module, tuple(trick for trick in sorted(names) if (trick, module) not in REFUSED))
    for module in MODULES
    for names in compatible_sets()
]


def test_every_pair_is_tried() -> None:
    assert {name for pair in REFUSED for name in pair} <= TRICKS.keys() | MODULES.keys()
    met = {pair for group in TOGETHER for pair in combinations(group, 2)}
    assert met | REFUSED.keys() >= {*combinations(sorted(TRICKS), 2)}
    met = {(trick, module) for module, group in ON_A_MODULE for trick in group}
    assert met | REFUSED.keys() >= {*product(TRICKS, MODULES)}


@pytest.mark.parametrize("tricks", TOGETHER, ids=lambda tricks: f"{tricks[0]} and {len(tricks) - 1} more")
def test_tricks_that_go_together_train(tricks: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert two_updates(tricks) == (None, 2)


@pytest.mark.parametrize(("module", "tricks"), ON_A_MODULE, ids=[f"{m}-{i}" for i, (m, _) in enumerate(ON_A_MODULE)])
def test_tricks_train_on_each_kind_of_module(
    module: str, tricks: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert two_updates(tricks, **MODULES[module]) == (None, 2)


@pytest.mark.parametrize(("trick", "other"), REFUSED)
def test_what_does_not_go_together_is_refused(
    trick: str, other: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first rollout, and both are named."""
    monkeypatch.chdir(folder)
    refusal, _ = two_updates((trick,), **MODULES[other]) if other in MODULES else two_updates((trick, other))
    assert refusal is not None
    assert trick in refusal
    assert REFUSED[trick, other] in refusal
