"""PPO for language models as a PyTorch Lightning module in which every trick is a drop-in callback."""

from lit_ppo.data import PreferenceDataModule, PromptDataModule, TextDataModule
from lit_ppo.experience import Experience
from lit_ppo.module import LitPPO
from lit_ppo.reward_modeling import LitRewardModel
from lit_ppo.sft import LitSFT

__all__ = [
    "Experience",
    "LitPPO",
    "LitRewardModel",
    "LitSFT",
    "PreferenceDataModule",
    "PromptDataModule",
    "TextDataModule",
]
