"""The tricks, one callback a file, imported as ``lit_ppo.callbacks``."""
