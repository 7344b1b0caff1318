"""Watch for a reward that is gamed, or learnt by heart."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import at_least, fraction, positive, refuse_beside, require, require_prompts
from lit_ppo.functional import diverging
from lit_ppo.reward_functions import RewardFunction, check_scores, takes_experience

STREAM = "reward_hacking"
NONE, OVERFITTING, HACKING = 0, 1, 2


class RewardHackingMonitor(PPOCallback):
    """Tells apart the two ways in which a rising score deceives: reward hacking and overfitting.

    Use it where the reward stands for something that it is not, as any reward model does. Every so many updates it
    takes the mean of three measures of the policy as it then is: the training score, the score of responses to
    held-out prompts (always the same, drawn alike), and a gold measure of these responses, which training does not
    see. All are smoothed. Since the update at which the held-out score was best: training score up and held-out
    score down by ``fall`` is overfitting. Otherwise, since the update at which gold was best: training and held-out
    score up and gold down by ``fall`` is reward hacking. It warns in words with the numbers, once of each.

    It changes nothing in training, and costs a rollout of ``prompts`` responses every so many updates. Without
    held-out data it takes the first training prompts, on which overfitting hides. To go back, keep checkpoints with
    ``ModelCheckpoint(every_n_train_steps=..., save_top_k=-1)``: that of step ``hacking/best_update`` is the best one.

    Args:
        gold: A function ``(prompts, responses, **columns)``, or where to import it from, ``package.function``; a score
            source; or the name of one of several ``rewards``, such as a reward model of weight 0.
            Every rank calls it on all responses. None: only overfitting is looked for.
        prompts: Held-out prompts, one response each.
        every: Updates from one time to the next; the first is before the first update.
        decay: What is left of the old in a smoothed measure each time.
        fall: How far a measure must fall from its best, in standard deviations of single responses.
        stop: Whether either verdict ends the run, after its update.

    Reads ``experience.raw_scores``, ``pl_module.rollout(..., stream="reward_hacking")`` and ``score``;
    writes ``trainer.should_stop`` if asked to. Logs ``hacking/train``, ``hacking/held_out``, ``hacking/gold``, all
    smoothed, ``hacking/verdict`` (0 none, 1 overfitting, 2 reward hacking) and ``hacking/best_update``, by gold where
    there is one, else by the held-out score.
    Source: Gao et al. 2022, arXiv:2210.10760 (gold and proxy part ways); the rule is ours.
    """

    def __init__(
        self,
        gold: str | Callable[..., Any] | None = None,
        prompts: int = 64,
        every: int = 10,
        decay: float = 0.5,
        fall: float = 0.25,
        stop: bool = False,
    ) -> None:
        self.gold = gold
        self.prompts = at_least(self, "prompts", prompts, 2)
        self.every = at_least(self, "every", every, 1)
        self.decay = fraction(self, "decay", decay)
        self.fall = positive(self, "fall", fall)
        self.stop = stop
        self._source = _source(gold)
        self._updates = 0
        self._series: dict[str, list[float]] = {}  # smoothed, one entry a time
        self._spread: dict[str, float] = {}  # the largest deviation between single responses so far
        self._said: list[int] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module that cannot be asked, and a second monitor."""
        require(self, pl_module, "rollout", "score")
        refuse_beside(self, trainer, RewardHackingMonitor, why="both would log hacking/verdict")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse data without prompts to look at, and a name that no reward has."""
        require_prompts(self, trainer, pl_module)
        names = getattr(pl_module, "source_names", None)
        if isinstance(self._source, str) and names is not None and self._source not in names:
            raise ValueError(
                f"RewardHackingMonitor(gold={self.gold!r}): {type(pl_module).__name__} has no reward of this name "
                f"among several; it has {', '.join(names) or 'one, without a name'}"
            )

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Measure the policy that has just sampled."""
        if self._updates % self.every == 0:
            self._measure(trainer, pl_module, experience.raw_scores)
            verdict = self._judge()
            for name, series in self._series.items():
                pl_module.log(f"hacking/{name}", series[-1])
            pl_module.log("hacking/verdict", float(verdict))
            pl_module.log("hacking/best_update", float(self.every * self._best()))
            if self.stop and verdict != NONE:
                trainer.should_stop = True
        self._updates += 1

    def _measure(self, trainer: Any, pl_module: PPOModule, train: Tensor) -> None:
        """Add a smoothed entry to each series."""
        peek = trainer.datamodule.peek
        batch = peek("val", self.prompts) or peek("train", self.prompts)
        held_out = pl_module.rollout(batch, samples_per_prompt=1, logprobs=False, stream=STREAM)
        measured = {"train": train, "held_out": pl_module.score(held_out)}
        if isinstance(self._source, str):
            measured["gold"] = held_out.extras[self._source]
        elif self._source is not None:
            measured["gold"] = check_scores(self._source(held_out), len(held_out), "RewardHackingMonitor(gold)")
        for name, values in measured.items():
            series, mean = self._series.setdefault(name, []), float(values.mean())
            series.append(self.decay * series[-1] + (1.0 - self.decay) * mean if series else mean)
            self._spread[name] = max(float(values.std(correction=0)), self._spread.get(name, 0.0))

    def _judge(self) -> int:
        """The verdict; said if it is new."""
        train, held_out = self._series["train"], self._series["held_out"]
        if diverging(held_out, [train], self.fall * self._spread["held_out"]):
            verdict, down = OVERFITTING, "held_out"
        elif "gold" in self._series and diverging(
            self._series["gold"], [train, held_out], self.fall * self._spread["gold"]
        ):
            verdict, down = HACKING, "gold"
        else:
            return NONE
        if verdict not in self._said:
            self._said.append(verdict)
            rank_zero_warn(self._message(verdict, down))
        return verdict

    def _best(self) -> int:
        series = self._series.get("gold", self._series["held_out"])
        return series.index(max(series))

    def _message(self, verdict: int, down: str) -> str:
        best = self._series[down].index(max(self._series[down]))
        moved = {name: f"from {series[best]:.3g} to {series[-1]:.3g}" for name, series in self._series.items()}
        fallen = f"over {self.fall:g} times their standard deviation of {self._spread[down]:.3g}"
        since = f"since update {self.every * best}"
        if verdict == HACKING:
            return (
                f"RewardHackingMonitor: reward hacking at update {self._updates}: {since}, where gold was best, the "
                f"training score rose {moved['train']} and the held-out score {moved['held_out']}, while gold scores "
                f"fell {moved['gold']}, {fallen}; go back there, raise kl_coef, or mend the reward"
            )
        return (
            f"RewardHackingMonitor: overfitting at update {self._updates}: {since}, where the held-out score was best, "
            f"the training score rose {moved['train']}, while held-out scores fell {moved['held_out']}, {fallen}; go "
            "back there, bring more prompts, or take fewer passes"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything measured, and what was said."""
        series = {name: list(values) for name, values in self._series.items()}
        return {"updates": self._updates, "series": series, "spread": dict(self._spread), "said": list(self._said)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self._updates, self._spread = state_dict["updates"], dict(state_dict["spread"])
        self._series = {name: list(values) for name, values in state_dict["series"].items()}
        self._said = list(state_dict["said"])


def _source(gold: str | Callable[..., Any] | None) -> str | Callable[[Any], Any] | None:
    """A score source, the name of one, or None."""
    if isinstance(gold, str):
        return RewardFunction(gold) if "." in gold else gold  # no reward has a dot in its name
    return gold if gold is None or takes_experience(gold) else RewardFunction(gold)
