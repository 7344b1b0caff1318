"""What an update reports, under stable names."""

import sys
from typing import TYPE_CHECKING, Any

import torch

from lit_ppo.experience import Experience, Minibatch
from lit_ppo.functional import explained_variance, kl_estimate, masked_mean

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from lit_ppo.ppo.optimize import OptimizerSteps

LOSS_NAMES = {"policy": "policy_loss", "value": "value_loss"}
SKIPPED = "optimizer/skipped_fraction"
EXTREMES = {"ratio_min": min, "ratio_max": max}
TAGS = {
    "policy_loss": "policy/loss",
    "approx_kl": "policy/approx_kl",
    "clip_fraction": "policy/clip_fraction",
    "ratio": "policy/ratio",
    "ratio_min": "policy/ratio_min",
    "ratio_max": "policy/ratio_max",
    "entropy": "policy/entropy",
    "actor_grad_norm": "policy/grad_norm",
    "value_loss": "value/loss",
    "critic_grad_norm": "value/grad_norm",
}


def log_policy(micro: Minibatch, clip_range: float | None) -> None:
    """How far the policy has moved from the one that sampled: KL(old || new) by k3, ratio, share of clipped tokens."""
    ratio = torch.exp(micro.new_logprobs - micro.logprobs)
    micro.log("approx_kl", kl_estimate(micro.logprobs, micro.new_logprobs, "k3"))
    micro.log("ratio", ratio)
    micro.log_extremes("ratio", ratio)
    micro.log("clip_fraction", ((ratio - 1).abs() > (clip_range or float("inf"))).float())
    micro.log("entropy", micro.new_entropy)


def in_force(module: "OptimizerSteps") -> dict[str, float]:
    """Coefficients and rates that an update works with."""
    rates = {"policy/lr": module.actor_optimizer.param_groups[0]["lr"]}
    if module.critic is not None:
        rates["value/lr"] = module.critic_optimizer.param_groups[0]["lr"]
    return {"objective/kl_coef": module.kl_coef, **rates}


def of_experience(experience: Experience, kl_coef: float) -> dict[str, float]:
    """Scores, KL and lengths; scores are the source's own, whatever tricks have made of them since.

    Args:
        experience: A finished update's.
        kl_coef: The coefficient that was in force.
    """
    mask, kl = experience.response_mask, experience.kl.sum(1)
    metrics = {
        "objective/score": experience.raw_scores.mean(),
        "objective/score_std": experience.raw_scores.std(correction=0),
        "objective/kl": kl.mean(),
        "objective/rlhf_reward": (experience.raw_scores - kl_coef * kl).mean(),
        "objective/entropy": -experience.logprobs.sum(1).mean(),
        "response/length": mask.sum(1).float().mean(),
        "response/ended_fraction": experience.ended.float().mean(),
    }
    if experience.values is not None and experience.returns is not None:
        metrics["value/explained_variance"] = explained_variance(experience.values, experience.returns, mask)
        metrics["value/mean"] = masked_mean(experience.values, mask)
        metrics["value/return_mean"] = masked_mean(experience.returns, mask)
    return {name: float(value) for name, value in metrics.items()}


def of_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """Means over an update's optimizer steps, and extremes; skipped ones, not finite, are counted apart."""
    taken = [step for step in steps if not step.get(SKIPPED)]
    means: dict[str, float] = {}
    for name in sorted({name for step in taken for name in step} | ({SKIPPED} if steps else set())):
        values = [step[name] for step in (steps if name == SKIPPED else taken) if name in step]
        if name in EXTREMES:
            means[TAGS[name]] = EXTREMES[name](values)
        else:
            means[TAGS.get(name, name)] = sum(values) / len(values) if values else 0.0
    if "value/loss" in means:
        means.setdefault("value/clip_fraction", 0.0)  # nobody clips values
    return means


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has needed at most so far: on a GPU of the GPU's memory, else of the machine's.

    Args:
        device: The process's.

    Returns:
        None where the system does not say, as Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_last_update(trainer: Any) -> None:
    """Drop what ``training_step`` has logged: Lightning would log it again with every later update of the epoch.

    Args:
        trainer: Between two updates.
    """
    for logged in trainer._results.result_metrics:
        if logged.meta.fx == "training_step" and not logged.meta.on_epoch:
            logged.reset()


def failure_facts(module: "OptimizerSteps", losses: dict[str, float], experience: Experience) -> str:
    """What a person needs to know about a batch whose loss or gradient is not finite."""
    numbers: dict[str, Any] = {"scores": experience.scores, "KL": experience.kl, "advantages": experience.advantages}
    ranges = ", ".join(f"{name} {float(x.min()):.3g} to {float(x.max()):.3g}" for name, x in numbers.items())
    values = ", ".join(f"{name}={value:.3g}" for name, value in losses.items())
    return (
        f"update {module.rollouts}: {values} is not finite, {module.skipped_steps} optimizer steps in a row "
        f"(max_skipped_steps={module.max_skipped_steps}); {len(experience)} responses of up to "
        f"{int(experience.response_mask.sum(1).max())} tokens, {ranges}; the last checkpoint is unharmed: lower the "
        "learning rate or max_grad_norm, or check the reward"
    )
