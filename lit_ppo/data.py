"""The data modules, and what they hand over. Each lies in a file of its own."""

from lit_ppo.encoding import encode_prompts
from lit_ppo.preference_data import PreferenceDataModule
from lit_ppo.prompt_data import PromptDataModule
from lit_ppo.prompts import PromptBatch
from lit_ppo.text_data import TextDataModule

__all__ = ["PreferenceDataModule", "PromptBatch", "PromptDataModule", "TextDataModule", "encode_prompts"]
