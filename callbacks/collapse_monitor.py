"""Watch for collapse, and say so early."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import levels, refuse_beside
from lit_ppo.functional import distinct_ngrams, duplicate_fraction, largest_opening, masked_mean
from lit_ppo.validate import integer

Levels = tuple[float, float] | None
LEVELS = ("warning", "alarm")
FACTORS = ("length", "perplexity", "entropy", "distinct")  # rules whose distance is a factor, 1 at the start
TRENDS = ("kl", "perplexity", "entropy")  # means over all tokens; what is of responses jumps too much to extrapolate
# What each rule says: statistic now, at the start, distance from the start, {opening}, {ngram}.
WORDS = {
    "kl": "the policy has left the reference: {now:.3g} nats a token",
    "length": "length runs away: {now:.3g} tokens a response, {start:.3g} at the start",
    "perplexity": "the reference finds the responses ever stranger: perplexity {now:.3g}, {start:.3g} at the start",
    "entropy": "the policy has made up its mind: {now:.3g} nats a token, {start:.3g} at the start",
    "distinct": "the same {ngram} tokens come again and again: {now:.1%} are distinct, {start:.1%} at the start",
    "duplicates": "whole responses repeat: {now:.1%}, {start:.1%} at the start",
    "opening": "one opening takes over: the same {opening} tokens begin {now:.1%} of the responses, "
    "the most frequent ones began {start:.1%} at the start",
    "score_tail": "some responses get much worse: the lowest twentieth of the scores lies under {now:.3g}, under "
    "{start:.3g} at the start",
}


class CollapseMonitor(PPOCallback):
    """Warns when the policy collapses, before the score shows it: by eight rules, each with two levels.

    Use it in every run: a collapsing policy keeps its score, or raises it, while KL, diversity or length already tell.
    The start is the first update's responses, which the untrained policy wrote. Each rule measures a distance from
    there; from the first level on it warns, from the second on it raises the alarm, each once, in words and with the
    numbers. KL, perplexity and entropy also warn half way to the first level where they would pass it within
    ``lookahead`` updates, growing on as in the last two. It changes nothing in training, and costs a few
    milliseconds an update. A few dozen responses an update make its shares meaningful.

    Args:
        kl: Levels of the KL to the reference, nats per response token, from 0. None switches a rule off.
        length: Levels of the factor by which the mean length has grown or shrunk.
        perplexity: Levels of the factor by which the perplexity of the responses under the reference has grown.
        entropy: Levels of the factor by which the entropy has fallen: minus the log-prob of the sampled tokens, mean.
        distinct: Levels of the factor by which the share of distinct n-grams in the update's responses has fallen.
        duplicates: Levels of the share of repeated responses, of those that were none at the start.
        opening: Levels of the share of responses that begin with the most frequent opening, of those that did not
            at the start.
        score_tail: Levels of the fall of the 5% quantile of the scores, in standard deviations of scores at the start.
        ngram: Tokens in an n-gram.
        opening_tokens: Tokens in an opening.
        lookahead: Updates that a trend is followed into the future; 0 follows none.
        stop: Whether an alarm ends the run, after its update.

    Reads ``experience.response_ids``, ``response_mask``, ``logprobs``, ``ref_logprobs``, ``kl``, ``raw_scores``;
    writes ``trainer.should_stop`` if asked to. Without a reference two rules rest. Logs ``collapse/level``: 0 healthy,
    1 warning, 2 alarm, of the rule that is worst off; and each statistic, as ``collapse/kl``, ``collapse/length``, ...
    Source: Zheng et al. 2023, arXiv:2307.04964, section 5.2 (KL, length, perplexity, tail of the rewards); Li et al.
    2016, arXiv:1510.03055 (distinct n-grams).
    """

    def __init__(
        self,
        kl: Levels = (0.3, 0.6),
        length: Levels = (1.5, 2.5),
        perplexity: Levels = (1.5, 3.0),
        entropy: Levels = (2.0, 4.0),
        distinct: Levels = (1.75, 3.0),
        duplicates: Levels = (0.1, 0.3),
        opening: Levels = (0.3, 0.6),
        score_tail: Levels = (1.0, 2.0),
        ngram: int = 2,
        opening_tokens: int = 2,
        lookahead: int = 3,
        stop: bool = False,
    ) -> None:
        given = {
            "kl": kl,
            "length": length,
            "perplexity": perplexity,
            "entropy": entropy,
            "distinct": distinct,
            "duplicates": duplicates,
            "opening": opening,
            "score_tail": score_tail,
        }
        self.levels = {
            name: value if value is None else levels(self, name, value, above=1.0 if name in FACTORS else 0.0)
            for name, value in given.items()
        }
        self.ngram = integer(self, "ngram", ngram)
        self.opening_tokens = integer(self, "opening_tokens", opening_tokens)
        self.lookahead = integer(self, "lookahead", lookahead, at_least=0)
        self.stop = stop
        self._updates = 0
        self._start: dict[str, float] = {}  # the first update's statistics
        self._before: list[dict[str, float]] = []  # distances of up to two updates, the last one last
        self._said: dict[str, int] = {}  # each rule's highest level so far
        self._told: list[str] = []

    @property
    def told(self) -> list[str]:
        """Every warning of the run in few words, for its summary."""
        return self._told

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a second one."""
        refuse_beside(self, trainer, CollapseMonitor, why="both would log collapse/level")

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Measure, log, judge."""
        self._updates += 1
        now = self._statistics(experience)
        if not self._start:
            self._start = {**now, "score_std": float(experience.raw_scores.std(correction=0))}
        distances = {name: self._distance(name, now[name]) for name in WORDS if name in now and name in self._start}
        found = {name: self._level(name, distance) for name, distance in distances.items()}
        self._before = [*self._before[-1:], distances]
        for name, value in now.items():
            pl_module.log(f"collapse/{name}", value)
        pl_module.log("collapse/level", float(max(found.values())))
        for name, level in found.items():
            if level > self._said.get(name, 0):
                self._said[name] = level
                self._told.append(f"{LEVELS[level - 1]} at update {self._updates} ({name})")
                rank_zero_warn(self._message(name, level, now[name], distances[name]))
        if self.stop and max(found.values()) == 2:
            trainer.should_stop = True

    def _statistics(self, experience: ExperienceLike) -> dict[str, float]:
        ids, mask = experience.response_ids, experience.response_mask
        statistics: dict[str, Tensor | float] = {
            "length": mask.sum(1).float().mean(),
            "entropy": -masked_mean(experience.logprobs, mask),
            "distinct": distinct_ngrams(ids, mask, self.ngram),
            "duplicates": duplicate_fraction(ids, mask),
            "opening": largest_opening(ids, mask, self.opening_tokens),
            "score_tail": experience.raw_scores.quantile(0.05),
        }
        if experience.ref_logprobs is not None:
            statistics["kl"] = masked_mean(experience.kl, mask)
            statistics["perplexity"] = torch.exp(-masked_mean(experience.ref_logprobs, mask))
        return {name: float(value) for name, value in statistics.items()}

    def _distance(self, name: str, now: float) -> float:
        """How far from the start; larger is worse."""
        start, small = self._start[name], 1e-8
        if name == "kl":
            return now
        if name in ("duplicates", "opening"):
            return (now - start) / max(1.0 - start, small)
        if name == "score_tail":
            return (start - now) / max(self._start["score_std"], small)
        growth = max(now, small) / max(start, small)
        return {"perplexity": growth, "length": max(growth, 1.0 / growth)}.get(name, 1.0 / growth)

    def _level(self, name: str, distance: float) -> int:
        """0, 1 or 2: passed now, or the first to be passed soon."""
        bounds = self.levels[name]
        if bounds is None:
            return 0
        level = sum(distance >= bound for bound in bounds)
        if name not in TRENDS:
            return level
        half_way = 0.5 * (bounds[0] + (1.0 if name in FACTORS else 0.0))
        growth = (distance - self._before[0].get(name, distance)) / len(self._before) if self._before else 0.0
        return max(level, int(distance >= half_way and distance + self.lookahead * growth >= bounds[0]))

    def _message(self, name: str, level: int, now: float, distance: float) -> str:
        warns, alarms = self.levels[name] or (0.0, 0.0)
        words = WORDS[name].format(now=now, start=self._start[name], opening=self.opening_tokens, ngram=self.ngram)
        pace = "" if distance >= warns else f" and would pass that within {self.lookahead} updates"
        return (
            f"CollapseMonitor: {LEVELS[level - 1]} at update {self._updates}: {words} ({name} is at "
            f"{distance:.3g}; it warns from {warns:g}{pace}, and alarms from {alarms:g})"
        )

    def state_dict(self) -> dict[str, Any]:
        """The start, where it stands, and what it has said."""
        return {
            "updates": self._updates,
            "start": dict(self._start),
            "before": [dict(distances) for distances in self._before],
            "said": dict(self._said),
            "told": list(self._told),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self._updates, self._before = state_dict["updates"], [dict(distances) for distances in state_dict["before"]]
        self._start, self._said = dict(state_dict["start"]), dict(state_dict["said"])
        self._told = list(state_dict["told"])
