"""Time and memory of an update, compared with TRL's PPOTrainer on the same tokens."""
