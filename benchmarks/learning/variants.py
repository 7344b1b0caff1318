"""What the ablation runs: each trick of ``configs/tricks`` alone on vanilla PPO, and PPO-max less each of its tricks.

Vanilla is ``--config sentiment --config sentiment/trained_critic`` without callbacks. Numbers that depend on the scale
of the task are fitted to it: a run has 16 updates of 128 responses of 24 tokens, scores deviate by 0.54, within a
prompt by 0.36, and vanilla ends at about 0.7 nats per response.
"""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.learning.forks import config
from benchmarks.learning.task import ROOT

VANILLA, FULL = "vanilla", "ppo_max"
TEXT = "imdb_unsup_part0.jsonl.gz"  # that of SFT
LIKE_KL = {"vanilla, kl_coef 0.2": 0.2, "vanilla, kl_coef 0.03": 0.03}  # vanilla at other KLs

FITTED: dict[str, tuple[dict[str, Any], str]] = {
    "adaptive_kl": ({"target": 1.0, "horizon": 500}, "6 nats and 10,000 episodes suit longer responses and runs"),
    "critic_warmup": ({"updates": 2}, "10 of 16 updates would leave too few for the actor"),
    "entropy_bonus": ({"coef": 0.01}, "the entropy is 5 nats per token, so the bonus would be off above 2.5"),
    "kl_loss": ({"coef": 0.1, "kind": "k2"}, "the task's own `kl_coef`, beside which 0.02 is nothing"),
    "learning_rate_adaptation": (
        {"target": 0.002, "minimum": 1e-5, "maximum": 1e-3},
        "the task's rate is 1e-4, and its updates move the policy by about 0.002 nats per token",
    ),
    "length_penalty": ({"budget": 18, "coef": 0.03, "max_penalty": 0.18}, "the last 6 of 24 tokens, half a deviation"),
    "reference_update": ({"every": 8}, "once in the middle of 16 updates"),
    "reward_clipping": ({"limit": 1.0}, "scores are between -3 and 2; 8% are beyond 1"),
}
"""Arguments instead of the shipped ones, with the reason."""

UNFIT = {
    "curriculum_sampling": "the prompts have no column that says how hard they are",
    "dynamic_sampling": "scores are continuous, so no prompt has responses of equal scores",
    "prioritized_sampling": "2,048 of 12,000 prompts are drawn, hardly one twice",
}
"""Tricks that cannot run on this task, with the reason."""


class Variant(NamedTuple):
    """One kind of run.

    Args:
        config: On top of ``sentiment/trained_critic``.
        base: The variant it is compared with.
        note: What was fitted, and why.
    """

    config: dict[str, Any]
    base: str = VANILLA
    note: str = ""


def text_loss(coef: float, data_root: Path) -> dict[str, Any]:
    """``PTXLoss`` on the text of SFT."""
    text = {"path": str(data_root / TEXT), "lower_case": True, "max_length": 97, "batch_size": 8}
    return {
        "class_path": "PTXLoss",
        "init_args": {"coef": coef, "data": {"class_path": "TextDataModule", "init_args": text}},
    }


def tricks(data_root: Path) -> dict[str, Variant]:
    """Each trick alone on vanilla PPO, from its file."""
    found = {}
    for file in sorted((ROOT / "configs" / "tricks").glob("*.yaml")):
        settings = yaml.safe_load(file.read_text())
        (callback,) = settings["trainer"]["callbacks+"]
        arguments, note = FITTED.get(file.stem, (callback.get("init_args", {}), ""))
        if file.stem == "ptx_loss":
            callback, note = text_loss(arguments["coef"], data_root), "the text of SFT"
        elif file.stem not in UNFIT:
            callback = {"class_path": callback["class_path"], "init_args": arguments}
        else:
            continue
        shown = ", ".join(f"{name} {value}" for name, value in arguments.items())
        own = config([callback], **settings.get("model", {}).get("init_args", {}))
        found[file.stem] = Variant(own, note=f"{shown}: {note}" if file.stem in FITTED else note)
    return found


def max_callbacks(data_root: Path) -> dict[str, dict[str, Any]]:
    """The callbacks of ``configs/ppo_max.yaml`` by class, with the fitted warm-up."""
    found = {}
    for callback in yaml.safe_load((ROOT / "configs" / "ppo_max.yaml").read_text())["trainer"]["callbacks"]:
        name, arguments = callback["class_path"], callback.get("init_args", {})
        if name == "CriticWarmup":
            arguments = FITTED["critic_warmup"][0]
        own = {"class_path": name, "init_args": arguments}
        found[name] = text_loss(arguments["coef"], data_root) if name == "PTXLoss" else own
    return found


def ppo_max(data_root: Path) -> dict[str, Variant]:
    """PPO-max on this task, and less each of its tricks.

    Its settings (a critic that starts as the reward model, one pass over two minibatches, clipped gradients) are also
    those of vanilla. The KL penalty is the task's.
    """
    callbacks = max_callbacks(data_root)
    found = {FULL: Variant(config(list(callbacks.values())))}
    for name in callbacks:
        rest = [callback for other, callback in callbacks.items() if other != name]
        found[f"{FULL} less {name}"] = Variant(config(rest), FULL)
    settings: dict[str, dict[str, Any]] = {
        "the critic from the reward model": {"critic": "actor"},
        "clipped gradients": {"max_grad_norm": None},
        "the KL penalty": {"kl_coef": 0.0},
    }
    for name, setting in settings.items():
        found[f"{FULL} less {name}"] = Variant(config(list(callbacks.values()), **setting), FULL)
    return found


def variants(data_root: Path) -> dict[str, Variant]:
    """All kinds of runs, in the order in which they run."""
    like_kl = {name: Variant(config([], kl_coef=coef)) for name, coef in LIKE_KL.items()}
    return {VANILLA: Variant(config([]))} | like_kl | ppo_max(data_root) | tricks(data_root)
