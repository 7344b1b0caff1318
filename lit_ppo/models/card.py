"""The model card of an export: what a model was trained from, on what, for what, and how far."""

import re
from pathlib import Path
from typing import Any, TypedDict

import yaml
from lightning.pytorch.utilities import rank_zero_warn

HUB_NAME = re.compile(
    r"([\w-][\w.-]*(?:/[\w.-]+)?)(?:/[\w.-]+)?(?::\S+)?"
)  # of a data set, also configuration and split
SECRET = re.compile(r"""((?:\b|_)(?:token|api_key|password|secret)["']?[=:\s]\s*["']?)[^\s"',}]+|\bhf_\w{20,}""")


class Card(TypedDict, total=False):
    """What a card says, as plain values, which checkpoints also hold."""

    method: str  # such as PPO
    task: str  # as the hub names it, such as text-generation
    base: str | None  # folder or hub name; None: from scratch
    base_model: str | None  # hub name
    dataset: str | None  # hub name
    rows: dict[str, str]
    figures: list[list[Any]]  # name, first, last
    figures_of: str
    commands: list[str]


def write_card(folder: str | Path, card: Card, *, adapter: bool = False) -> None:
    """Write ``README.md``, which the hub shows; one that somebody else has written stays.

    Args:
        folder: Of the model.
        card: What to say.
        adapter: The folder holds only an adapter.
    """
    file = Path(folder, "README.md")
    if file.exists() and not is_card(file):
        rank_zero_warn(f"{file}: stays as it is, since lit-ppo did not write it; there is no model card")
        return
    base, method, dataset = card.get("base"), card["method"], card.get("dataset")
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": card["task"],
        "base_model": card.get("base_model"),
        "datasets": [dataset] if dataset else None,
        "tags": ["lit-ppo", method.lower().replace(" ", "-")],
    }
    kind = "An adapter" if adapter else "A model"
    start = f"trained from `{base}`" if base else "trained from scratch"
    parts = [
        f"---\n{yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False)}---",
        f"# {Path(base).name if base else 'Model'}: {method}",
        f"{kind} {start} with lit-ppo ({method}).",
        _table(["", ""], [[name, value] for name, value in card.get("rows", {}).items()]),
    ]
    if figures := card.get("figures"):
        parts += ["## Figures", _table(["", "start", "end"], figures), card.get("figures_of", "")]
    if commands := card.get("commands"):
        parts += ["## Command", "```sh\n" + "\n".join(SECRET.sub(r"\1***", command) for command in commands) + "\n```"]
    text = "\n\n".join(part for part in parts if part)
    file.write_text(text + "\n", encoding="utf-8")


def is_card(file: Path) -> bool:
    """Whether a file is a model card that :func:`write_card` wrote, as the tags at its head say."""
    try:
        _, head, _ = file.read_text(encoding="utf-8").split("---\n", 2)
        return "lit-ppo" in yaml.safe_load(head)["tags"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return False


def hub_name(path: str | None, folder: str | None = None) -> str | None:
    """The name on the hub of a model or a data set that was loaded by this path; None if it lies in a folder.

    >>> hub_name("Qwen/Qwen2.5-0.5B"), hub_name("openai/gsm8k/main:train"), hub_name("lit_ppo"), hub_name("/data/a")
    ('Qwen/Qwen2.5-0.5B', 'openai/gsm8k', None, None)
    """
    match = None if path is None else HUB_NAME.fullmatch(path)
    return match[1] if match and path is not None and not Path(folder or ".", path).exists() else None


def add_data(card: Card, trainer: Any) -> Card:
    """The card with a row about the Trainer's data."""
    module = getattr(trainer, "datamodule", None)
    path, text = getattr(module, "path", None), "given by the training script"
    if module is not None:
        text = f"`{path}` ({type(module).__name__})" if isinstance(path, str) else type(module).__name__
    dataset = hub_name(path, getattr(module, "data_root", None)) if isinstance(path, str) else None
    return {**card, "dataset": dataset, "rows": {**card["rows"], "data": text}}


def _table(names: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any]) -> str:
        shown = ["" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in shown) + " |"

    return "\n".join([line(names), "|" + "---|" * len(names), *map(line, rows)])
