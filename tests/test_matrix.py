"""Every trick beside every other, and on every kind of module: two updates, or refused before the first rollout."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from lit_ppo import PromptDataModule
from lit_ppo.advantages import GroupRelative, LeaveOneOut, Reinforce
from tests.helpers.tiny import WORDS, make_causal_lm
from tests.helpers.toys import make_module, make_trainer
from tests.helpers.trick import make_trick, tricks

pytestmark = pytest.mark.filterwarnings("ignore:.*Monitor")  # what monitors have to say is tested elsewhere

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
NEED_A_CRITIC = ("CriticWarmup", "ValueClipping", "ValueNormalization")
NEED_A_REFERENCE = ("AdaptiveKL", "KLLoss", "ReferenceUpdate")
# What is refused, and how the message names the other side; all else trains.
REFUSED: dict[tuple[str, str], str] = {
    **{(trick, "reference=None"): "LitPPO(reference=None)" for trick in NEED_A_REFERENCE},
    **{(trick, free): "LitPPO(critic=None)" for trick in NEED_A_CRITIC for free in CRITIC_FREE},
    ("ReferenceUpdate", "lora"): "the reference of LitPPO to its actor: they share",
    ("AdaptiveKL", "GroupRelative"): "LitPPO(kl_coef=0.0)",  # the estimator itself refuses another
    ("RewardWhitening", "GroupRelative"): "LitPPO(advantages=GroupRelative)",
    ("RejectionSampling", "GroupRelative"): "GroupRelative",
    ("RejectionSampling", "LeaveOneOut"): "LeaveOneOut",
    ("CurriculumSampling", "PrioritizedSampling"): "PrioritizedSampling",
    ("RewardNormalization", "RewardScaling"): "RewardScaling",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and the files that tricks read."""
    folder = tmp_path_factory.mktemp("matrix")
    make_causal_lm(folder / "lm", scale=4.0)
    rows = [{"prompt": " ".join(WORDS[i : i + 1 + i % 4]), "level": i} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": " ".join(WORDS[i : i + 6])} for i in range(12)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def two_updates(names: tuple[str, ...], **module: Any) -> tuple[str | None, int]:
    """The refusal, if there was one, and the number of updates made."""
    made_module = make_module(Path("lm"), **{"generation": {"max_new_tokens": 4}, "minibatch_size": 4, **module})
    trainer = make_trainer(Path(), callbacks=[make_trick(name, live=True) for name in names])
    try:
        trainer.fit(made_module, PromptDataModule("prompts.jsonl", batch_size=6, seed=0))
    except (ValueError, TypeError) as error:
        assert made_module.rollouts == trainer.global_step == 0, "refused too late"
        return str(error), 0
    return None, trainer.global_step


def check(one: str, other: str, names: tuple[str, ...], **module: Any) -> None:
    """Two updates, or a refusal that names both."""
    refusal, updates = two_updates(names, **module)
    if (one, other) in REFUSED:
        assert refusal is not None
        assert one in refusal
        assert REFUSED[one, other] in refusal
    else:
        assert (refusal, updates) == (None, 2)


def test_the_table_of_refusals_names_what_is_there() -> None:
    assert {name for pair in REFUSED for name in pair} <= TRICKS.keys() | MODULES.keys()


@pytest.mark.parametrize(("one", "other"), [*combinations(TRICKS, 2)])
def test_each_pair(one: str, other: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    check(one, other, (one, other))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("trick", TRICKS)
def test_each_on_each_kind_of_module(trick: str, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    check(trick, module, (trick,), **MODULES[module])
