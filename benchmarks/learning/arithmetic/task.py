"""Sums of numbers of one to three digits, as text: problems, tokenizer, rewards, and the callback that measures."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.learning.frontier import Frontier

LETTERS = "0123456789+="
SFT, PROMPTS, HELD_OUT = "sft.jsonl", "prompts.jsonl", "held_out.jsonl"


def write_problems(folder: Path, n_sft: int, n_prompts: int, n_held_out: int, wrong: float, seed: int = 0) -> None:
    """Problems for SFT, for PPO and held out; no held-out problem is in another file.

    Args:
        folder: Where to.
        n_sft: Solved problems.
        n_prompts: Problems without an answer.
        n_held_out: Held out.
        wrong: Share of the solved problems in which one digit is another.
        seed: Of the numbers.
    """
    rng = random.Random(seed)
    held_out: list[str] = []
    while len(held_out) < n_held_out:
        problem = _problem(rng)
        if problem not in held_out:
            held_out.append(problem)

    def other() -> str:
        while (problem := _problem(rng)) in held_out:
            pass
        return problem

    solved = [{"prompt": (p := other()), "completion": _answer(rng, p, wrong)} for _ in range(n_sft)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        (SFT, solved),
        (PROMPTS, [{"prompt": other()} for _ in range(n_prompts)]),
        (HELD_OUT, [{"prompt": problem} for problem in held_out]),
    ):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _problem(rng: random.Random) -> str:
    a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    return f"{a}+{b}="


def _answer(rng: random.Random, problem: str, wrong: float) -> str:
    digits = list(solution(problem))
    if rng.random() < wrong:
        place = rng.randrange(len(digits))
        digits[place] = rng.choice([digit for digit in "0123456789" if digit != digits[place]])
    return "".join(digits)


def solution(problem: str) -> str:
    """The sum.

    >>> solution("95+17=")
    '112'
    """
    return str(sum(map(int, problem.rstrip("=").split("+"))))


def right(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward: 1 if the response is the sum, else 0.

    >>> right(["95+17=", "1+1="], ["112", "12"])
    [1.0, 0.0]
    """
    return [float(response == solution(problem)) for problem, response in zip(prompts, responses, strict=True)]


def digits(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of right digits, counted from the last one, of the longer of sum and response. No run trains on it.

    >>> digits(["95+17=", "1+1="], ["12", "2"])
    [0.6666666666666666, 1.0]
    """
    return [_share(solution(problem), response) for problem, response in zip(prompts, responses, strict=True)]


def _share(wanted: str, given: str) -> float:
    pairs = zip(reversed(wanted), reversed(given), strict=False)
    return sum(a == b for a, b in pairs) / max(len(wanted), len(given))


def make_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are digits and signs."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[EOS]", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="="))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")
    tokenizer.save_pretrained(folder)


def held_out_problems(folder: Path) -> list[str]:
    """The problems that no run trains on."""
    return [json.loads(line)["prompt"] for line in (folder / HELD_OUT).read_text().splitlines()]


def judge(experience: Any) -> torch.Tensor:
    """Share of right digits, in the judge's place."""
    return torch.tensor(digits(experience.prompts, experience.responses))


class Accuracy(Frontier):
    """Measures the share of right answers to held-out problems, that of right digits, and the KL to the reference."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.judge: Any = judge
        self.prompts = held_out_problems(self.folder)
