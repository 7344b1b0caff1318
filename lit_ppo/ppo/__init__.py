"""One PPO update, in the order of the arrow."""
