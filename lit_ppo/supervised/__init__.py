"""Supervised fine-tuning, reward modelling and value pretraining."""
