"""PPO for language models as a PyTorch Lightning module in which every trick is a drop-in callback."""
