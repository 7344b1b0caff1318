"""Rows to score and a reward function, for the tests of rewards."""

from types import SimpleNamespace
from typing import Any

TWO = {"prompts": ["a", "bb"], "responses": ["ccc", ""]}


def experience(prompts: list[str], responses: list[str], **columns: list[Any]) -> SimpleNamespace:
    """The part of an experience that score sources read and write."""
    return SimpleNamespace(prompts=prompts, responses=responses, columns=columns, extras={})


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward: 31 and 2 for the rows of ``TWO``."""
    return [float(len(prompt) + 10 * len(response)) for prompt, response in zip(prompts, responses, strict=True)]
