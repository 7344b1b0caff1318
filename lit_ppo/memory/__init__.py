"""What a run will need, before it starts: from configurations of models, on tensors without storage."""
