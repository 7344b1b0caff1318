"""Many processes: collectives, the plan that deals rows, sharded models, strategies."""
