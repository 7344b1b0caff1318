"""PPO for language models as a PyTorch Lightning module in which every trick is a drop-in callback."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lit_ppo.advantages import GAE, AdvantageEstimator, GroupRelative, LeaveOneOut, Reinforce
    from lit_ppo.data.preferences import PreferenceDataModule
    from lit_ppo.data.prompts import PromptDataModule
    from lit_ppo.data.text import TextDataModule
    from lit_ppo.engines.base import Engine
    from lit_ppo.engines.vllm import VLLMEngine
    from lit_ppo.experience import Experience
    from lit_ppo.optim.schedules import WarmupCosine
    from lit_ppo.parallel.strategies import FSDP2Strategy
    from lit_ppo.ppo.collect import TransformersEngine
    from lit_ppo.ppo.module import LitPPO
    from lit_ppo.rewards import RewardFunction, RewardModel
    from lit_ppo.run.checkpoint import StepCheckpoint
    from lit_ppo.run.export import ExportModel
    from lit_ppo.supervised.critic import LitCritic
    from lit_ppo.supervised.reward_model import LitRewardModel
    from lit_ppo.supervised.sft import LitSFT

# Configurations and checkpoints hold these names, so the modules behind them may move.
# Loaded on first use: torch and transformers take seconds to import, and the command prints before that.
_MODULES = {
    "AdvantageEstimator": "advantages",
    "Engine": "engines.base",
    "Experience": "experience",
    "ExportModel": "run.export",
    "FSDP2Strategy": "parallel.strategies",
    "GAE": "advantages",
    "GroupRelative": "advantages",
    "LeaveOneOut": "advantages",
    "LitCritic": "supervised.critic",
    "LitPPO": "ppo.module",
    "LitRewardModel": "supervised.reward_model",
    "LitSFT": "supervised.sft",
    "PreferenceDataModule": "data.preferences",
    "PromptDataModule": "data.prompts",
    "Reinforce": "advantages",
    "RewardFunction": "rewards",
    "RewardModel": "rewards",
    "StepCheckpoint": "run.checkpoint",
    "TextDataModule": "data.text",
    "TransformersEngine": "ppo.collect",
    "VLLMEngine": "engines.vllm",
    "WarmupCosine": "optim.schedules",
}

__all__ = [
    "GAE",
    "AdvantageEstimator",
    "Engine",
    "Experience",
    "ExportModel",
    "FSDP2Strategy",
    "GroupRelative",
    "LeaveOneOut",
    "LitCritic",
    "LitPPO",
    "LitRewardModel",
    "LitSFT",
    "PreferenceDataModule",
    "PromptDataModule",
    "Reinforce",
    "RewardFunction",
    "RewardModel",
    "StepCheckpoint",
    "TextDataModule",
    "TransformersEngine",
    "VLLMEngine",
    "WarmupCosine",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
