"""Training on several ranks: who computes which rows, sharded models, and the strategy."""
