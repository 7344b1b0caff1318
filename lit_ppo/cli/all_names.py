"""Imports every public class: a configuration may name by its short name only what is imported."""

import lit_ppo
import lit_ppo.callbacks

for _name in lit_ppo.__all__:
    getattr(lit_ppo, _name)
