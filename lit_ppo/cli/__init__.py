"""The ``lit-ppo`` command."""
