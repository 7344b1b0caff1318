"""TensorBoard as a cockpit: the curves by the questions that a person asks, and the spread behind the means."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule, writers
from lit_ppo.callbacks.checks import at_least, refuse_beside

# Question -> chart -> tags, as regular expressions; a chart is empty where nobody logs its tags.
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
        "loss on general text": ["^tax/loss"],
        "perplexity under the reference": ["^collapse/perplexity$"],
    },
    "Is it collapsing?": {
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
    },
    "Are the steps sound?": {
        "tokens whose ratio is clipped": ["^(policy|value)/clip_fraction$"],
        "KL to the policy that sampled": ["^policy/approx_kl$"],
        "probability ratio: mean, least, greatest": ["^policy/ratio(_min|_max)?$"],
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
    """Lays out TensorBoard's custom scalars by question, and adds histograms and the outcome of the run.

    Use it always, with TensorBoard: is it learning, is it drifting, is it collapsing, is the critic right, are the
    steps sound, what does it cost. The mean of a score hides its tail; histograms show it every so many updates. At
    the end the hyperparameters tab gets the run's last numbers, by which runs are compared. Costs nothing between the
    histograms, and next to nothing for one. Other loggers are left alone.

    Args:
        every: Updates from one set of histograms to the next, the first update's included.

    Reads ``experience.raw_scores``, ``advantages``, ``response_mask``, and the ratios of the optimizer steps, on
    several processes those of the first one's rows. Logs ``histogram/scores``, ``histogram/advantages``,
    ``histogram/ratios``, ``histogram/lengths``, at the end ``final/...``; step n is the policy after n updates.
    Source: ours; the curves that Zheng et al. 2023, arXiv:2307.04964, section 5.2, find telling are among them.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = at_least(self, "every", every, 1)
        self._updates = 0
        self._ratios: list[Tensor] = []  # of this update's steps

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a second one."""
        refuse_beside(self, trainer, Cockpit, why="both would lay out the same charts")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the layout."""
        charts = {
            question: {title: ["Multiline", tags] for title, tags in chart.items()}
            for question, chart in LAYOUT.items()
        }
        for add_custom_scalars in writers(trainer, "add_custom_scalars"):
            add_custom_scalars(charts)

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Forget the last update's ratios."""
        self._ratios = []

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        """Keep the ratios, if it is time."""
        if self._updates % self.every == 0:
            ratios = (minibatch.new_logprobs.detach() - minibatch.logprobs).exp()
            self._ratios.append(ratios[minibatch.response_mask])

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Write the histograms, if it is time."""
        if self._updates % self.every == 0:
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
        self._updates += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the hyperparameters with the run's last numbers."""
        logged = trainer.callback_metrics
        outcome = {f"final/{name}": float(logged[name]) for name in FINAL if name in logged}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and outcome:
                logger.log_hyperparams(dict(pl_module.hparams), outcome, step=self._updates)

    def state_dict(self) -> dict[str, Any]:
        """How far the run is."""
        return {"updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._updates = state_dict["updates"]
