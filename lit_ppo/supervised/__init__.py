"""Supervised fine-tuning and reward modelling."""
