"""Other programs that sample responses in place of the actor's own decode loop."""
