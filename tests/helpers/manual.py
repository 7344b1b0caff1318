"""The pages of the manual, and the commands in them."""

import re
import shlex

from tests.helpers.command import REPOSITORY

DOCS, CONFIGS, EXAMPLES = REPOSITORY / "docs", REPOSITORY / "configs", REPOSITORY / "examples"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
RUNS = {  # what the configuration of a run folder was made of
    "runs/quickstart/ppo/version_0/config.yaml": ["quickstart"],
    "runs/ppo/version_0/config.yaml": ["ppo"],
    "runs/gsm8k/version_0/config.yaml": ["grpo", "gsm8k.yaml"],
    "my.yaml": ["grpo"],
}


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```(?:{language})\b[^\n]*\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page, without the variables before it."""
    lines = [line for block in blocks("bash|sh", page) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(lit-ppo [^`]*--config [^`]*)`", PAGES[page])
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [[w for i, w in enumerate(command) if i or "=" not in w] for command in words if command]


def shipped(name: str) -> list[str]:
    """``--config`` with the file that a name stands for."""
    path = CONFIGS / (name.removeprefix("configs/").removesuffix(".yaml") + ".yaml")
    return ["--config", str(path if path.is_file() else name)]


def lit_ppo_arguments(command: list[str]) -> list[str]:
    """Arguments of ``lit-ppo``, with names of configurations as paths."""
    start = command.index("lit-ppo") if "lit-ppo" in command else command.index("lit_ppo")
    words = iter(command[start + 1 :])
    arguments: list[str] = []
    for word in words:
        if word == "--config":
            name = next(words)
            arguments += [part for each in RUNS.get(name, [name]) for part in shipped(each)]
        else:
            arguments.append(word)
    return arguments
