"""The life of a run: its folder, checkpoints, resuming, stopping, export."""
