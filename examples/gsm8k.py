"""Data and rewards for GSM8K, grade-school mathematics (Cobbe et al. 2021, arXiv:2110.14168).

python gsm8k.py  # once: downloads openai/gsm8k and writes gsm8k_train.jsonl and gsm8k_test.jsonl
lit-ppo fit --config grpo --config gsm8k.yaml
"""

import json
import re
from collections.abc import Iterable
from typing import Any

INSTRUCTION = "Think step by step. Then write the final answer as a number after ####."
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def row(example: dict[str, str]) -> dict[str, Any]:
    """A chat prompt, and the number that the published answer ends with."""
    prompt = [{"role": "user", "content": f"{example['question']}\n{INSTRUCTION}"}]
    return {"prompt": prompt, "answer": number(example["answer"])}


def number(text: str) -> float | None:
    """The number after the last ``####``; None if there is none."""
    found = NUMBER.match(text.rpartition("####")[2].strip().lstrip("$")) if "####" in text else None
    return float(found[0].replace(",", "")) if found else None


def correct(responses: list[str], answer: list[float]) -> list[float]:
    """1 for the right number, else 0; ``answer`` is a column of the data."""
    return [float(number(response) == right) for response, right in zip(responses, answer, strict=True)]


def answered(responses: list[str]) -> list[float]:
    """1 if there is a number after ####, right or wrong: it shows whether the format is learnt."""
    return [float(number(response) is not None) for response in responses]


def write(split: str, examples: Iterable[dict[str, str]]) -> None:
    """Write the rows of a split as JSON lines."""
    with open(f"gsm8k_{split}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(example)) + "\n" for example in examples)


if __name__ == "__main__":
    from datasets import load_dataset

    for split, examples in load_dataset("openai/gsm8k", "main").items():
        write(split, examples)
