"""Prompts, text and preferences: from files and datasets to batches."""
