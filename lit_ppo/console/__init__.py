"""What a run shows on the console: progress, signs of life, samples before and after, summary."""
