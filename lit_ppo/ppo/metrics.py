"""What an update reports, under stable names.

- ``objective/score``, ``objective/score_std``: mean and standard deviation of the scores as the reward gave them,
  before any trick.
- ``objective/score/<name>``: mean score of each of several rewards.
- ``objective/kl``, ``objective/kl_coef``: KL to the reference in nats per response, and its coefficient.
- ``objective/rlhf_reward``: mean of the score minus ``kl_coef`` times the KL.
- ``objective/entropy``: mean negative log-probability of a response, in nats.
- ``policy/loss``: mean of the policy loss over the actor's optimizer steps, as for all tags of ``policy/`` below.
- ``policy/kl_loss``, ``policy/entropy_loss``, ``policy/sft_loss``: loss terms that callbacks add, with their
  coefficients.
- ``policy/approx_kl``: KL to the policy that sampled, nats per token.
- ``policy/clip_fraction``: fraction of response tokens whose probability ratio is outside ``clip_range``.
- ``policy/ratio``: probability ratio to the policy that sampled.
- ``policy/ratio_min``, ``policy/ratio_max``: smallest and largest ratio of any response token in any step of the
  update.
- ``policy/entropy``: entropy of the policy, nats per token.
- ``policy/grad_norm``, ``policy/lr``: norm of the actor's gradient before clipping; learning rate at the start.
- ``value/loss``: mean of the value loss over the critic's optimizer steps.
- ``value/explained_variance``: 1 minus the variance of the critic's errors over that of the returns.
- ``value/mean``, ``value/return_mean``: mean value at the rollout, and mean return.
- ``value/clip_fraction``: fraction of response tokens whose value is clipped; 0 without ``ValueClipping``.
- ``value/grad_norm``, ``value/lr``: norm of the critic's gradient before clipping; learning rate at the start.
- ``response/length``, ``response/ended_fraction``: tokens per response; fraction of responses that end with a stop
  token.
- ``optimizer/skipped_fraction``: fraction of optimizer steps skipped because loss or gradient was not finite.
- ``rollout/sampling_logprob_difference``: largest difference between log-probs of sampling and of training, with
  ``sampling_logprobs_tolerance`` or an engine.
- ``rollout/sampling_logprob_difference_mean``, ``rollout/sampling_kl``: mean of this difference; KL from the engine's
  distribution to the policy, nats per token. With an engine only, as the next one.
- ``rollout/sampling_ess``: effective fraction of the tokens after weighting by policy over engine; 1 where they agree.
- ``time/rollout``, ``time/score``, ``time/update``: seconds of each phase.
- ``time/share/rollout``, ``time/share/score``, ``time/share/update``: fraction of the update's time.
- ``throughput/tokens_per_second``: response tokens of the update over its seconds.
- ``memory/peak_gib``: peak memory of the first process: GPU memory, or resident memory on a CPU (not on Windows).
"""

import math
import sys
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lit_ppo.experience import Experience, Minibatch
from lit_ppo.functional import (
    ClipRange,
    clip_bounds,
    effective_sample_fraction,
    explained_variance,
    importance_weights,
    kl_estimate,
    masked_mean,
)
from lit_ppo.parallel.ranks import sum_over_ranks

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

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


ON_THE_BAR = ("objective/score", "objective/kl", "response/length", "throughput/tokens_per_second")


@dataclass
class Progress:
    """The phase at work, for progress bars, and the seconds of each phase."""

    phase: str = ""  # rollout, score or update; empty between them
    detail: str = ""  # such as "token 12/64"
    since: float | None = None  # start of the phase, by time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)
    engine: str = ""  # that samples in place of the actor

    def start(self, phase: str) -> None:
        """Stop the phase at work and start another."""
        now = monotonic()
        if self.since is not None:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since, self.detail, self.engine = phase, now, "", ""

    def stop(self) -> dict[str, float]:
        """Stop the phase at work.

        Returns:
            The seconds of each phase since the last stop.
        """
        self.start("")
        seconds, self.seconds, self.since = self.seconds, {}, None
        return seconds


def log_policy(micro: Minibatch, clip_range: ClipRange | None) -> None:
    """Log how far the policy is from the one that sampled: KL(old || new) by k3, ratio, share of clipped tokens."""
    ratio = torch.exp(micro.new_logprobs - micro.logprobs)
    low, high = clip_bounds(clip_range)
    means = {
        "approx_kl": kl_estimate(micro.logprobs, micro.new_logprobs, "k3"),
        "ratio": ratio,
        "clip_fraction": ((ratio < low) | (ratio > high)).float(),
        "entropy": micro.new_entropy,
    }
    micro.log_all(means, extremes={"ratio": ratio})


def current_coefficients(kl_coef: float, optimizers: list[Optimizer]) -> dict[str, float]:
    """KL coefficient and learning rates at the start of an update.

    Args:
        kl_coef: Coefficient of the KL to the reference.
        optimizers: The actor's and, if there is one, the critic's.
    """
    rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
    return {"objective/kl_coef": kl_coef, **dict(zip(("policy/lr", "value/lr"), rates, strict=False))}


def log_update(
    module: Any, experience: Experience, coefficients: dict[str, float], steps: list[dict[str, float]]
) -> None:
    """Log the metrics of one update.

    Args:
        module: The LitPPO.
        experience: The update's.
        coefficients: From :func:`current_coefficients`.
        steps: Metrics of each optimizer step; they are averaged.
    """
    if module.rollouts == 1 and not experience.ended.any():
        rank_zero_info(
            f"LitPPO(generation={{'max_new_tokens': {module.generation.max_new_tokens}}}): none of the "
            f"{len(experience)} responses of the first update ended by itself; raise max_new_tokens, or check the stop "
            "tokens that the start of the run names and the chat template"
        )
    seconds: dict[str, float] = module.progress.stop()
    total = sum(seconds.values())
    metrics = {
        **coefficients,
        **of_experience(experience, coefficients["objective/kl_coef"]),
        **of_steps(steps),
        **{f"time/{phase}": value for phase, value in seconds.items()},
    }
    if "rollout" in seconds:  # not timed before a Trainer is attached
        metrics |= {f"time/share/{phase}": value / total for phase, value in seconds.items()}
        metrics["throughput/tokens_per_second"] = int(experience.response_mask.sum()) / total
    peak = peak_memory(module.device)
    if peak is not None:
        metrics["memory/peak_gib"] = peak / 2**30
    if module.sampling_difference is not None:
        metrics["rollout/sampling_logprob_difference"] = module.sampling_difference
    metrics |= of_sampling(experience)
    for name in (name for name in module.source_names if name in experience.extras):
        metrics[f"objective/score/{name}"] = float(experience.extras[name].mean())
    for name, value in metrics.items():
        module.log(name, value, prog_bar=name in ON_THE_BAR, batch_size=1)


def of_experience(experience: Experience, kl_coef: float) -> dict[str, float]:
    """Scores, KL and lengths. Scores are those of the reward, before any callback changed them.

    Args:
        experience: Of a finished update.
        kl_coef: The coefficient that the update used.
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
    return sum_over_ranks({}, alike=metrics)  # the same on all ranks; one transfer for all


def of_sampling(experience: Experience) -> dict[str, float]:
    """How far the engine that sampled was from the policy; empty where the policy itself sampled."""
    sampled, old, mask = experience.sampling_logprobs, experience.logprobs, experience.response_mask
    if sampled is None:
        return {}
    difference = (old - sampled).abs() * mask
    weights = importance_weights(old, sampled, mask, cap=math.inf)
    return {
        "rollout/sampling_logprob_difference": float(difference.max()),
        "rollout/sampling_logprob_difference_mean": float(masked_mean(difference, mask)),
        "rollout/sampling_kl": float(masked_mean(kl_estimate(sampled, old, "k3"), mask)),
        "rollout/sampling_ess": float(effective_sample_fraction(weights, mask)),
    }


def of_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """Means and extremes over the optimizer steps of an update; skipped steps are only counted."""
    taken = [step for step in steps if not step.get(SKIPPED)]
    means: dict[str, float] = {}
    for name in sorted({name for step in taken for name in step} | ({SKIPPED} if steps else set())):
        values = [step[name] for step in (steps if name == SKIPPED else taken) if name in step]
        if name in EXTREMES:
            means[TAGS[name]] = EXTREMES[name](values)
        else:
            means[TAGS.get(name, name)] = sum(values) / len(values) if values else 0.0
    if "value/loss" in means:
        means.setdefault("value/clip_fraction", 0.0)  # values are clipped only by ValueClipping
    return means


def peak_memory(device: torch.device) -> int | None:
    """Peak memory of this process in bytes: of the GPU, or of the host where there is none.

    Returns:
        None where the system does not report it, as on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_last_update(trainer: Any) -> None:
    """Drop what ``training_step`` has logged; Lightning would log it again in every later update of the epoch."""
    for logged in trainer._results.result_metrics:
        if logged.meta.fx == "training_step" and not logged.meta.on_epoch:
            logged.reset()


def describe_failure(metrics: dict[str, float], experience: Experience) -> str:
    """What a person needs to know about a batch whose loss or gradient is not finite.

    Args:
        metrics: Losses and gradient norms of the step.
        experience: The update's.
    """
    numbers: dict[str, Tensor] = {
        "scores": experience.scores, "KL": experience.kl, "advantages": experience.advantages
    }  # fmt: skip
    ranges = ", ".join(f"{name} {float(x.min()):.3g} to {float(x.max()):.3g}" for name, x in numbers.items())
    values = ", ".join(f"{name}={value:.3g}" for name, value in metrics.items())
    longest = int(experience.response_mask.sum(1).max())
    return f"{values} is not finite; {len(experience)} responses of up to {longest} tokens, {ranges}"
