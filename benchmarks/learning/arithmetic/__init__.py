"""A second task, whose reward is a rule: sums of two numbers, for PPO, GRPO, RLOO and REINFORCE++."""
