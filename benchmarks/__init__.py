"""How fast an update is, and how much memory it takes, beside TRL's PPOTrainer on the same tokens."""
