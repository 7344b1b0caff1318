"""TensorBoard as a cockpit: the curves by the questions that a person asks, and what is behind the means."""

from collections.abc import Callable
from math import isfinite
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_ppo.callbacks.alignment_tax import AlignmentTax
from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule, as_in_a_step, writers
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.callbacks.collapse_monitor import CollapseMonitor
from lit_ppo.callbacks.figures import score_against_kl, score_distributions
from lit_ppo.callbacks.reward_hacking_monitor import RewardHackingMonitor
from lit_ppo.functional import best_of_n_score
from lit_ppo.validate import integer

# Question -> chart -> tags, as regular expressions.
LAYOUT: dict[str, dict[str, list[str]]] = {
    "Is it learning?": {
        "score": ["^objective/score$", "^val/score$"],
        "score less the KL's price": ["^objective/rlhf_reward$"],
        "each reward and judge": ["^(objective|val)/score/"],
        "wins over the reference": ["^val/win_rate"],
    },
    "Is it drifting?": {
        "KL to the reference, nats a response": ["^(objective|val)/kl$"],
        "KL coefficient": ["^objective/kl_coef$"],
        "loss on general text": ["^tax/loss$"],
        "perplexity under the reference": ["^collapse/perplexity$"],
    },
    "Is the reward gamed?": {
        "smoothed: training, held-out and gold score": ["^hacking/(train|held_out|gold)$"],
        "0 no, 1 overfitting, 2 reward hacking": ["^hacking/verdict$"],
        "lowest twentieth of the scores": ["^collapse/score_tail$"],
    },
    "Is it collapsing?": {
        "spread of the scores": ["^objective/score_std$"],
        "entropy, nats a token": ["^policy/entropy$"],
        "tokens a response": ["^(response|val)/length$"],
        "responses that end": ["^(response|val)/ended_fraction$"],
        "distinct n-grams": ["^collapse/distinct$"],
        "repeated responses and openings": ["^collapse/(duplicates|opening)$"],
        "0 healthy, 1 warning, 2 alarm": ["^collapse/level$"],
    },
    "Is the critic right?": {
        "explained variance": ["^value/explained_variance$"],
        "value loss": ["^value/loss$"],
        "values and returns": ["^value/(mean|return_mean)$"],
        "tokens whose value is clipped": ["^value/clip_fraction$"],
    },
    "Are the steps sound?": {
        "tokens whose ratio is out of range": ["^policy/clip_fraction$"],
        "KL to the policy that sampled": ["^policy/approx_kl$"],
        "probability ratio, mean": ["^policy/ratio$"],
        "greatest ratio of a token": ["^policy/ratio_max$"],
        "least ratio of a token": ["^policy/ratio_min$"],
        "gradient norms": ["^(policy|value)/grad_norm$"],
        "learning rates": ["^(policy|value)/lr$"],
        "steps left out": ["^optimizer/skipped_fraction$"],
    },
    "What does it cost?": {
        "tokens a second": ["^throughput/tokens_per_second$"],
        "seconds an update": ["^time/[a-z]+$"],
        "share of an update's time": ["^time/share/"],
        "most memory so far, GiB": ["^memory/peak_gib$"],
    },
}
FINAL = ("objective/score", "objective/kl", "response/length", "val/score", "val/kl", "val/win_rate")


class Cockpit(PPOCallback):
    """Lays out TensorBoard's custom scalars by question, and adds histograms, figures and the outcome of the run.

    Use it always, with TensorBoard: is it learning, is it drifting, is the reward gamed, is it collapsing, is the
    critic right, are the steps sound, what does it cost. Some charts are of other monitors, and there if these are.
    The mean of a score hides its tail: histograms show it every so many updates, and
    a figure of the scores now against those of the first update. Another one has the mean score of every update
    against its KL to the reference, where there is one: what the run has paid for what it gained. For scale it has the
    best of several samples of the policy that the run started from: choosing among them costs KL, too, and no training.
    At the end the hyperparameters tab gets the run's last numbers, by which runs are compared.

    Costs a rollout of ``best_of_prompts`` x ``best_of`` responses before the first update, then a tenth of a second
    each time that it draws. Other loggers get the figures if they have ``add_figure``, and are left alone otherwise.

    Args:
        every: Updates from one set of histograms to the next, the first update's included.
        figures_every: Updates from one set of figures to the next, which shows the run up to there; they are drawn
            once more at the end.
        best_of_prompts: Training prompts that the starting policy answers.
        best_of: Its samples of each of them; 0: no such line. There is none either where the module has no
            ``rollout`` and ``score``, or the data no ``peek``.

    Reads ``experience.raw_scores``, ``kl``, ``ref_logprobs``, ``advantages``, ``response_mask``, and the ratios of the
    optimizer steps, on several processes those of the first one's rows; ``pl_module.rollout(..., stream="cockpit")``
    and ``score``. Logs ``histogram/scores``, ``histogram/advantages``, ``histogram/ratios``, ``histogram/lengths``,
    ``figure/score_against_kl``, ``figure/scores``, at the end ``final/...``; step n is the policy after n updates.
    Source: ours; the curves that Zheng et al. 2023, arXiv:2307.04964, section 5.2, find telling are among them; Gao et
    al. 2022, arXiv:2210.10760 (score against KL, best of n).
    """

    def __init__(self, every: int = 10, figures_every: int = 50, best_of_prompts: int = 16, best_of: int = 16) -> None:
        self.every = integer(self, "every", every)
        self.figures_every = integer(self, "figures_every", figures_every)
        self.best_of_prompts = integer(self, "best_of_prompts", best_of_prompts)
        self.best_of = integer(self, "best_of", best_of, at_least=0)
        self._updates = 0
        self._kl: list[float] = []  # of each update; stays empty without a reference
        self._score: list[float] = []
        self._start: list[float] = []  # the first update's scores
        self._best: list[float] = []  # of 1, 2, 3, ... samples of the starting policy
        self._ratios: list[Tensor] = []  # of this update's steps
        self._now: list[float] = []  # this update's scores

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a second one."""
        refuse_beside(self, trainer, Cockpit, why="both would lay out the same charts")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the layout; ask the starting policy."""
        absent = _absent(trainer, pl_module)
        layout = {
            question: {title: ["Multiline", tags] for title, tags in charts.items() if not tags[0].startswith(absent)}
            for question, charts in LAYOUT.items()
        }
        for add_custom_scalars in writers(trainer, "add_custom_scalars"):
            add_custom_scalars({question: charts for question, charts in layout.items() if charts})
        if self.best_of and not self._updates:
            self._best = self._best_of_the_start(trainer, pl_module)

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Forget the last update's ratios."""
        self._ratios = []

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        """Keep the ratios, if it is time."""
        if self._updates % self.every == 0:
            ratios = (minibatch.new_logprobs.detach() - minibatch.logprobs).exp()
            if minibatch.mean(torch.ones_like(ratios)) > 0:  # an empty micro-batch may have rows, of no weight
                self._ratios.append(ratios[minibatch.response_mask])

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Note score and KL; write histograms and figures, if it is time."""
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

    def _write_histograms(self, trainer: L.Trainer, experience: ExperienceLike) -> None:
        mask = experience.response_mask
        histograms = {
            "scores": experience.raw_scores,
            "advantages": experience.advantages[mask],
            "ratios": torch.cat(self._ratios) if self._ratios else torch.zeros(0),
            "lengths": mask.sum(1),
        }
        for add_histogram in writers(trainer, "add_histogram"):
            for name, values in histograms.items():
                if len(values) and values.isfinite().all():  # nothing to show of an actor at rest, or of one lost
                    add_histogram(f"histogram/{name}", values.float().cpu(), self._updates)

    def _draw(self, trainer: L.Trainer) -> None:
        """The run up to its last update."""
        last = len(self._score) - 1
        for add_figure in writers(trainer, "add_figure"):
            if len(self._kl) == len(self._score):
                add_figure("figure/score_against_kl", score_against_kl(self._kl, self._score, self._best), last)
            if all(map(isfinite, self._now + self._start)):
                add_figure("figure/scores", score_distributions(self._now, self._start, last), last)

    def _best_of_the_start(self, trainer: Any, pl_module: Any) -> list[float]:
        """The mean score of the best of 1, 2, 3, ... samples, where that can be asked."""
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
        """Draw the whole run; write the hyperparameters with its last numbers."""
        last = self._updates - 1
        if self._now and (not last or last % self.figures_every):
            self._draw(trainer)
        logged = trainer.callback_metrics
        outcome = {f"final/{name}": float(logged[name]) for name in FINAL if name in logged}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and outcome:
                logger.log_hyperparams(_hyperparameters(trainer, pl_module), outcome, step=self._updates)

    def state_dict(self) -> dict[str, Any]:
        """How far the run is, what it started from, and which way it went."""
        history = {"kl": self._kl, "score": self._score, "start": self._start, "best": self._best}
        return {"updates": self._updates, **{name: list(values) for name, values in history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._updates = state_dict["updates"]
        self._kl, self._score = list(state_dict["kl"]), list(state_dict["score"])
        self._start, self._best = list(state_dict["start"]), list(state_dict["best"])


def _peek(trainer: Any) -> Callable[..., Any] | None:
    return getattr(getattr(trainer, "datamodule", None), "peek", None)


def _absent(trainer: Any, pl_module: Any) -> tuple[str, ...]:
    """How the tags begin that nobody will log, as far as one can tell: their charts would stay empty."""
    monitors = {"^collapse/": CollapseMonitor, "^hacking/": RewardHackingMonitor, "^tax/": AlignmentTax}
    there = {tags: any(isinstance(c, monitor) for c in trainer.callbacks) for tags, monitor in monitors.items()}
    peek, reference = _peek(trainer), getattr(pl_module, "reference", pl_module) is not None
    there |= {
        "^value/": getattr(pl_module, "critic", pl_module) is not None,
        "^collapse/perplexity": reference,
        "^val/win_rate": reference and (peek is None or peek("val", 1) is not None),
        "^(objective|val)/score/": bool(
            getattr(pl_module, "source_names", True) or getattr(pl_module, "eval_rewards", None)
        ),
    }
    return tuple(tags for tags, is_there in there.items() if not is_there)


def _hyperparameters(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """The module's, less what is off, and those that it does not count among them: rates and callbacks."""
    hyperparameters = {name: x for name, x in pl_module.hparams.items() if not name.startswith("_")}
    given = {name: x for name, x in hyperparameters.items() if x is not None and x is not False}
    for name, optimizer in zip(("actor_lr", "critic_lr"), trainer.optimizers, strict=False):
        given[name] = optimizer.defaults.get("lr")
    tricks = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, PPOCallback)]
    return {**given, "callbacks": " ".join(tricks)}
