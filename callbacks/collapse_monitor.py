"""Detect a collapsing policy early."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.constructor import constructor
from lit_ppo.functional import distinct_ngrams, duplicate_fraction, largest_opening, masked_mean
from lit_ppo.validate import ascending, boolean, integer

Levels = tuple[float, float] | None
LEVELS = ("warning", "alarm")
FACTORS = ("length", "perplexity", "entropy", "distinct")  # rules whose distance is a factor, 1 at the start
TAGS = {name: f"{name}_per_token" for name in ("kl", "entropy")}  # ``objective/kl`` is per response
TRENDS = ("kl", "perplexity", "entropy")  # means over all tokens; statistics of responses are too noisy to extrapolate
# Message of each rule: statistic now and at the start, and the two token counts.
WORDS = {
    "kl": "the policy is far from the reference: {now:.3g} nats per token",
    "length": "length runs away: {now:.3g} tokens per response, {start:.3g} at the start",
    "perplexity": "responses are unlikely under the reference: perplexity {now:.3g}, {start:.3g} at the start",
    "entropy": "the policy is nearly deterministic: {now:.3g} nats per token, {start:.3g} at the start",
    "distinct": "the same {ngram} tokens occur again and again: {now:.1%} are distinct, {start:.1%} at the start",
    "duplicates": "many responses are equal: {now:.1%}, {start:.1%} at the start",
    "opening": "one opening dominates: the same {opening} tokens begin {now:.1%} of the responses, "
    "the most frequent ones began {start:.1%} at the start",
    "score_tail": "some responses get much worse: the 5% quantile of the scores is {now:.3g}, {start:.3g} at the start",
}


class CollapseMonitor(PPOCallback):
    """Warns when the policy collapses, before the score shows it: eight rules with two levels each.

    Use it in every run: the score of a collapsing policy does not fall, or even rises, while KL, diversity or length
    already change. The start is the first update, whose responses the untrained policy wrote. Each rule measures a
    distance from the start; at the first level it warns, at the second it raises an alarm, once each, with numbers.
    KL, perplexity and entropy also warn halfway to the first level if at the rate of the last two updates they would
    reach it within ``lookahead`` updates. It does not change training, and costs a few milliseconds per update. Its
    fractions need a few dozen responses per update.

    Args:
        kl: Levels of the KL to the reference, nats per response token, from 0. None switches a rule off.
        length: Levels of the factor by which the mean length has grown or shrunk.
        perplexity: Levels of the factor by which the perplexity of the responses under the reference has grown.
        entropy: Levels of the factor by which the entropy has fallen: minus the mean log-prob of sampled tokens.
        distinct: Levels of the factor by which the fraction of distinct n-grams in the responses has fallen.
        duplicates: Levels of the fraction of repeated responses, relative to those not repeated at the start.
        opening: Levels of the fraction of responses with the most frequent opening, relative to those without at the
            start.
        score_tail: Levels of the fall of the 5% quantile of the scores, in standard deviations of scores at the start.
        ngram: Tokens per n-gram.
        opening_tokens: Tokens per opening.
        lookahead: Updates for which a trend is extrapolated; 0 for none.
        stop: Whether an alarm ends the run, after its update.

    Reads ``experience.response_ids``, ``response_mask``, ``logprobs``, ``ref_logprobs``, ``kl``, ``raw_scores``;
    writes ``trainer.should_stop`` with ``stop``. Without a reference two rules are off. Logs ``collapse/level``: 0
    healthy, 1 warning, 2 alarm, the maximum over all rules; and each statistic, as ``collapse/length``,
    ``collapse/kl_per_token``, ...
    Source: Zheng et al. 2023, arXiv:2307.04964, section 5.2 (KL, length, perplexity, tail of the rewards); Li et al.
    2016, arXiv:1510.03055 (distinct n-grams).
    """

    reads = ("response_ids", "response_mask", "logprobs", "ref_logprobs", "kl", "raw_scores")

    @constructor
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
            name: None if value is None else ascending(self, name, value, above=float(name in FACTORS), equal=True)
            for name, value in given.items()
        }
        self.ngram = integer(self, "ngram", ngram)
        self.opening_tokens = integer(self, "opening_tokens", opening_tokens)
        self.lookahead = integer(self, "lookahead", lookahead, at_least=0)
        self.stop = boolean(self, "stop", stop)
        self._updates = 0
        self._start: dict[str, float] = {}  # the first update's statistics
        self._before: list[dict[str, float]] = []  # distances of the last two updates
        self._said: dict[str, int] = {}  # highest level of each rule so far
        self._told: list[str] = []

    @property
    def told(self) -> list[str]:
        """Every warning so far in a few words, for the summary of the run."""
        return self._told

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, CollapseMonitor, why="both would log collapse/level")

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        self._updates += 1
        now = self._statistics(experience)
        if not self._start:
            self._start = {**now, "score_std": float(experience.raw_scores.std(correction=0))}
        distances = {name: self._distance(name, now[name]) for name in WORDS if name in now and name in self._start}
        found = {name: self._level(name, distance) for name, distance in distances.items()}
        self._before = [*self._before[-1:], distances]
        for name, value in now.items():
            pl_module.log(f"collapse/{TAGS.get(name, name)}", value)
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
        """Distance from the start; larger is worse."""
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
        """0, 1 or 2: the level that is reached, or 1 if it will be soon."""
        bounds = self.levels[name]
        if bounds is None:
            return 0
        level = sum(distance >= bound for bound in bounds)
        if name not in TRENDS:
            return level
        halfway = 0.5 * (bounds[0] + (1.0 if name in FACTORS else 0.0))
        growth = (distance - self._before[0].get(name, distance)) / len(self._before) if self._before else 0.0
        return max(level, int(distance >= halfway and distance + self.lookahead * growth >= bounds[0]))

    def _message(self, name: str, level: int, now: float, distance: float) -> str:
        warns, alarms = self.levels[name] or (0.0, 0.0)
        words = WORDS[name].format(now=now, start=self._start[name], opening=self.opening_tokens, ngram=self.ngram)
        trend = "" if distance >= warns else f", which it would reach within {self.lookahead} updates"
        return (
            f"CollapseMonitor: {LEVELS[level - 1]} at update {self._updates}: {words} ({name} is at "
            f"{distance:.3g}; warning from {warns:g}{trend}, alarm from {alarms:g})"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self._updates,
            "start": dict(self._start),
            "before": [dict(distances) for distances in self._before],
            "said": dict(self._said),
            "told": list(self._told),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._before = state_dict["updates"], [dict(distances) for distances in state_dict["before"]]
        self._start, self._said = dict(state_dict["start"]), dict(state_dict["said"])
        self._told = list(state_dict["told"])
