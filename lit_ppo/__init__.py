"""PPO for language models as a PyTorch Lightning module in which every trick is a drop-in callback."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_ppo.data import PreferenceDataModule, PromptDataModule, TextDataModule
    from lit_ppo.experience import Experience
    from lit_ppo.module import LitPPO
    from lit_ppo.reward_modeling import LitRewardModel
    from lit_ppo.sft import LitSFT
    from lit_ppo.strategies import FSDP2Strategy

__all__ = [
    "Experience",
    "FSDP2Strategy",
    "LitPPO",
    "LitRewardModel",
    "LitSFT",
    "PreferenceDataModule",
    "PromptDataModule",
    "TextDataModule",
]

# Imported when first asked for: torch and transformers take seconds, and the command speaks before that.
_HOMES = {
    "Experience": "experience",
    "FSDP2Strategy": "strategies",
    "LitPPO": "module",
    "LitRewardModel": "reward_modeling",
    "LitSFT": "sft",
    "PreferenceDataModule": "data",
    "PromptDataModule": "data",
    "TextDataModule": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
