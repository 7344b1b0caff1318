"""Imports every public class, so that configurations can call them by their short names."""

import importlib
import importlib.util

for _name in ("module", "data", "sft", "reward_modeling", "rewards", "advantages", "callbacks"):
    if importlib.util.find_spec(f"lit_ppo.{_name}") is not None:
        importlib.import_module(f"lit_ppo.{_name}")
