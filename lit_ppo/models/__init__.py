"""Actor, critic and reference around Hugging Face models."""
