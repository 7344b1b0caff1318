"""Imports every public class: configurations call by their short names the classes that are imported."""

import lit_ppo.advantages
import lit_ppo.callbacks
import lit_ppo.data
import lit_ppo.module
import lit_ppo.reward_modeling
import lit_ppo.rewards
import lit_ppo.schedulers
import lit_ppo.sft
import lit_ppo.strategies  # noqa: F401
