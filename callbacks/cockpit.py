"""Arrange TensorBoard by questions, and add histograms and figures."""

from collections.abc import Callable
from math import isfinite
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_ppo.callbacks.alignment_tax import AlignmentTax
from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, reward_names
from lit_ppo.callbacks.collapse_monitor import CollapseMonitor
from lit_ppo.callbacks.figures import score_against_kl, score_distributions
from lit_ppo.callbacks.reward_hacking_monitor import RewardHackingMonitor
from lit_ppo.callbacks.trainer import as_in_a_step, writers
from lit_ppo.constructor import constructor
from lit_ppo.functional import best_of_n_score
from lit_ppo.validate import integer, samples

# Question -> chart -> tags, as regular expressions.
LAYOUT: dict[str, dict[str, list[str]]] = {
    "Is it learning?": {
        "score": ["^objective/score$", "^val/score$"],
        "score minus KL penalty": ["^objective/rlhf_reward$"],
        "each reward": ["^(objective|val)/score/"],
        "win rate against the reference": ["^val/win_rate"],
    },
    "Is it drifting?": {
        "KL to the reference, nats per response": ["^(objective|val)/kl$"],
        "KL coefficient": ["^objective/kl_coef$"],
        "loss on general text": ["^tax/loss$"],
        "perplexity under the reference": ["^collapse/perplexity$"],
    },
    "Is the reward gamed?": {
        "smoothed: training, held-out and gold score": ["^hacking/(train|held_out|gold)$"],
        "0 no, 1 overfitting, 2 reward hacking": ["^hacking/verdict$"],
        "5% quantile of the scores": ["^collapse/score_tail$"],
    },
    "Is it collapsing?": {
        "standard deviation of the scores": ["^objective/score_std$"],
        "entropy, nats per token": ["^policy/entropy$"],
        "tokens per response": ["^(response|val)/length$"],
        "fraction of responses that end": ["^(response|val)/ended_fraction$"],
        "distinct n-grams": ["^collapse/distinct$"],
        "repeated responses and openings": ["^collapse/(duplicates|opening)$"],
        "0 healthy, 1 warning, 2 alarm": ["^collapse/level$"],
    },
    "Is the critic right?": {
        "explained variance": ["^value/explained_variance$"],
        "value loss": ["^value/loss$"],
        "values and returns": ["^value/(mean|return_mean)$"],
        "fraction of tokens with a clipped value": ["^value/clip_fraction$"],
    },
    "Are the steps sound?": {
        "fraction of tokens with a clipped ratio": ["^policy/clip_fraction$"],
        "KL to the policy that sampled": ["^policy/approx_kl$"],
        "probability ratio, mean": ["^policy/ratio$"],
        "largest ratio of a token": ["^policy/ratio_max$"],
        "smallest ratio of a token": ["^policy/ratio_min$"],
        "gradient norms": ["^(policy|value)/grad_norm$"],
        "learning rates": ["^(policy|value)/lr$"],
        "fraction of skipped steps": ["^optimizer/skipped_fraction$"],
    },
    "What does it cost?": {
        "tokens per second": ["^throughput/tokens_per_second$"],
        "seconds per update": ["^time/[a-z]+$"],
        "fraction of an update's time": ["^time/share/"],
        "peak memory, GiB": ["^memory/peak_gib$"],
    },
}
FINAL = ("objective/score", "objective/kl", "response/length", "val/score", "val/kl", "val/win_rate")


class Cockpit(PPOCallback):
    """Arranges TensorBoard's custom scalars by questions; adds histograms, figures and the final numbers of the run.

    Use it always, with TensorBoard: is it learning, is it drifting, is the reward gamed, is it collapsing, is the
    critic right, are the steps sound, what does it cost. Charts of other monitors appear if these are in the list.
    A mean score hides its tail: histograms show it every few updates, and a figure shows the scores now and at the
    first update. A second figure shows the mean score of every update against its KL to the reference, if there is
    one: the gain against its price. For comparison it has the best of several samples of the starting policy, which
    also costs KL, but no training. At the end, the hyperparameters tab gets the last numbers of the run, to compare
    runs.

    Costs a rollout of ``best_of_prompts`` x ``best_of`` responses before the first update, then about 0.1 s for each
    figure. Other loggers get the figures if they have ``add_figure``, and nothing otherwise.

    Args:
        every: Updates between histograms, starting with the first update.
        figures_every: Updates between figures, which show the run so far; the last ones are at the end.
        best_of_prompts: Training prompts for the starting policy.
        best_of: Samples per prompt; 0 for no best-of-n line. There is none either if the module has no ``rollout``
            and ``score``, or the data no ``peek``.

    Reads ``experience.raw_scores``, ``kl``, ``ref_logprobs``, ``advantages``, ``response_mask``, and the ratios of the
    optimizer steps, with several ranks those of rank 0; ``pl_module.rollout(..., stream="cockpit")``
    and ``score``. Logs ``histogram/scores``, ``histogram/advantages``, ``histogram/ratios``, ``histogram/lengths``,
    ``figure/score_against_kl``, ``figure/scores``, at the end ``final/...``; step n is the policy after n updates.
    Source: ours; it includes the curves that Zheng et al. 2023, arXiv:2307.04964, section 5.2, recommend; Gao et
    al. 2022, arXiv:2210.10760 (score against KL, best of n).
    """

    reads = ("raw_scores", "kl", "ref_logprobs", "advantages", "response_mask", "logprobs", "new_logprobs")

    @constructor
    def __init__(self, every: int = 10, figures_every: int = 50, best_of_prompts: int = 16, best_of: int = 16) -> None:
        self.every = integer(self, "every", every)
        self.figures_every = integer(self, "figures_every", figures_every)
        self.best_of_prompts = samples(self, "best_of_prompts", best_of_prompts)
        self.best_of = samples(self, "best_of", best_of, at_least=0)
        self._updates = 0
        self._kl: list[float] = []  # per update; empty without a reference
        self._score: list[float] = []
        self._start: list[float] = []  # the first update's scores
        self._best: list[float] = []  # of 1, 2, 3, ... samples of the starting policy
        self._ratios: list[tuple[Tensor, Tensor]] = []  # of each micro-batch of this update, and which of them count
        self._now: list[float] = []  # this update's scores
        self._final: dict[str, float] = {}  # the last values of FINAL

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, Cockpit, why="both would write the same charts")

    def waits_for(self, pl_module: Any) -> set[str]:
        return {"on_update_end"}  # without on_actor_loss there is no histogram of ratios

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        absent = _absent(trainer, pl_module)
        layout = {
            question: {title: ["Multiline", tags] for title, tags in charts.items() if not tags[0].startswith(absent)}
            for question, charts in LAYOUT.items()
        }
        for add_custom_scalars in writers(trainer, "add_custom_scalars"):
            add_custom_scalars({question: charts for question, charts in layout.items() if charts})
        if self.best_of and not self._updates:
            self._best = self._best_of_the_start(trainer, pl_module)

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        if self._updates % self.every == 0:
            ratios = (minibatch.new_logprobs.detach() - minibatch.logprobs).exp()
            # a micro-batch can consist of padding rows without weight; which ones is read after the last step
            counts = minibatch.response_mask & (minibatch.mean(torch.ones_like(ratios)) > 0)
            self._ratios.append((ratios, counts))

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        self._now = experience.raw_scores.tolist()
        self._start = self._start or self._now
        self._score.append(float(experience.raw_scores.mean()))
        if experience.ref_logprobs is not None:
            self._kl.append(float(experience.kl.sum(1).mean()))
        if self._updates % self.every == 0:
            self._write_histograms(trainer, experience)
        if self._updates and self._updates % self.figures_every == 0:
            self._draw(trainer)
        self._updates += 1
        self._ratios = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._take_metrics(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._take_metrics(trainer)

    def _take_metrics(self, trainer: L.Trainer) -> None:
        logged = {} if trainer.sanity_checking else trainer.callback_metrics
        self._final |= {name: float(logged[name]) for name in FINAL if name in logged}

    def _write_histograms(self, trainer: L.Trainer, experience: ExperienceLike) -> None:
        mask = experience.response_mask
        histograms = {
            "scores": experience.raw_scores,
            "advantages": experience.advantages[mask],
            "ratios": torch.cat([ratios[counts] for ratios, counts in self._ratios] or [torch.zeros(0)]),
            "lengths": mask.sum(1),
        }
        for add_histogram in writers(trainer, "add_histogram"):
            for name, values in histograms.items():
                if len(values) and values.isfinite().all():  # empty while the actor is frozen
                    add_histogram(f"histogram/{name}", values.float().cpu(), self._updates)

    def _draw(self, trainer: L.Trainer) -> None:
        """Draw the run so far."""
        last = len(self._score) - 1
        for add_figure in writers(trainer, "add_figure"):
            if len(self._kl) == len(self._score):
                add_figure("figure/score_against_kl", score_against_kl(self._kl, self._score, self._best), last)
            if all(map(isfinite, self._now + self._start)):
                add_figure("figure/scores", score_distributions(self._now, self._start, last), last)

    def _best_of_the_start(self, trainer: Any, pl_module: Any) -> list[float]:
        """Mean score of the best of 1, 2, 3, ... samples; empty if module or data cannot sample."""
        peek = _peek(trainer)
        if peek is None or not (hasattr(pl_module, "rollout") and hasattr(pl_module, "score")):
            return []
        with as_in_a_step(trainer):
            batch = peek("train", self.best_of_prompts)
            samples = pl_module.rollout(batch, samples_per_prompt=self.best_of, logprobs=False, stream="cockpit")
            scores = pl_module.score(samples).cpu()
        scores = scores[samples.group.cpu().argsort()].view(-1, self.best_of)
        return [float(best_of_n_score(scores, n)) for n in range(1, self.best_of + 1)]

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        last = self._updates - 1
        if self._now and (not last or last % self.figures_every):
            self._draw(trainer)
        outcome = {f"final/{name}": self._final[name] for name in FINAL if name in self._final}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and outcome:
                logger.log_hyperparams(_hyperparameters(trainer, pl_module), outcome, step=self._updates)

    def state_dict(self) -> dict[str, Any]:
        history = {"kl": self._kl, "score": self._score, "start": self._start, "best": self._best, "now": self._now}
        lists = {name: list(values) for name, values in history.items()}
        return {"updates": self._updates, "final": dict(self._final), **lists}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates = state_dict["updates"]
        self._kl, self._score = list(state_dict["kl"]), list(state_dict["score"])
        self._start, self._best = list(state_dict["start"]), list(state_dict["best"])
        self._now, self._final = list(state_dict.get("now", [])), dict(state_dict.get("final", {}))


def _peek(trainer: Any) -> Callable[..., Any] | None:
    return getattr(getattr(trainer, "datamodule", None), "peek", None)


def _absent(trainer: Any, pl_module: Any) -> tuple[str, ...]:
    """Prefixes of tags that will not be logged, as far as one can tell: their charts would stay empty."""
    monitors = {"^collapse/": CollapseMonitor, "^hacking/": RewardHackingMonitor, "^tax/": AlignmentTax}
    present = {tags: any(isinstance(c, monitor) for c in trainer.callbacks) for tags, monitor in monitors.items()}
    peek, reference = _peek(trainer), getattr(pl_module, "reference", pl_module) is not None
    present |= {
        "^value/": getattr(pl_module, "critic", pl_module) is not None,
        "^collapse/perplexity": reference,
        "^val/win_rate": reference and (peek is None or peek("val", 1) is not None),
        "^(objective|val)/score/": reward_names(pl_module) != [] or bool(getattr(pl_module, "eval_rewards", None)),
    }
    return tuple(tags for tags, is_present in present.items() if not is_present)


def _hyperparameters(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """The module's hyperparameters that are set, with learning rates and names of callbacks."""
    hyperparameters = {name: x for name, x in pl_module.hparams.items() if not name.startswith("_")}
    given = {name: x for name, x in hyperparameters.items() if x is not None and x is not False}
    for name, optimizer in zip(("actor_lr", "critic_lr"), trainer.optimizers, strict=False):
        given[name] = optimizer.defaults.get("lr")
    tricks = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, PPOCallback)]
    return {**given, "callbacks": " ".join(tricks)}
