"""Detect reward hacking and overfitting."""

from collections.abc import Callable
from pathlib import Path
from statistics import pstdev
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.best_checkpoint import BestCheckpoint
from lit_ppo.callbacks.checks import refuse_beside, require, require_prompts, reward_names, warn_of_gaps
from lit_ppo.callbacks.ratings import Ratings, is_ratings, read_ratings
from lit_ppo.callbacks.trainer import as_in_a_step, of_first_process
from lit_ppo.constructor import constructor
from lit_ppo.functional import diverging, stalled_since
from lit_ppo.rewards.function import RewardFunction, call_foreign, check_scores, with_copies
from lit_ppo.rewards.signature import takes_experience
from lit_ppo.validate import fraction, integer, one_of, positive, refuse, samples, text

STREAM = "reward_hacking"
NONE, OVERFITTING, HACKING, BEHIND = 0, 1, 2, 3
VERDICTS = ("none", "overfitting", "reward hacking", "gold falls behind")
Course = dict[int, float]  # a smoothed measure by number of updates done


class RewardHackingMonitor(PPOCallback):
    """Tells apart two reasons for a misleading rise of the score: reward hacking and overfitting.

    Use it when the reward is a proxy, as any reward model is. Every few updates it takes the mean of three measures of
    the current policy: the training score, the score of responses to held-out prompts (always the same prompts and
    random numbers), and a gold measure of these responses, which training does not use. All are smoothed. Since the
    update with the best held-out score: training score up and held-out score down by ``fall`` is overfitting.
    Otherwise, since the update with the best gold: training and held-out score up and gold down by ``fall`` is reward
    hacking. It warns with numbers, once for each. An earlier warning, without a verdict, says that gold falls behind:
    it has not risen while both scores rose by twice ``fall``.

    It does not change training, and costs a rollout of ``prompts`` responses every ``every`` updates. Without held-out
    data it uses the first training prompts, on which overfitting does not show.

    With ``then: go_back`` it keeps a checkpoint of the best update, next to the others as ``best-step-....ckpt``. This
    costs disk space, and time whenever there is a new best. After a verdict the run ends with the weights of that
    update: they are exported, and later callbacks see them at the end. The checkpoint is then the newest one, so
    ``--ckpt_path last`` resumes from it, for example with a larger ``kl_coef``.

    Args:
        gold: A function ``(prompts, responses, **columns)`` or its import path, ``package.function``; a score source;
            the name of one of several ``rewards``, such as a reward model of weight 0; or a file of human ratings,
            ``ratings.jsonl``, ``.json``, ``.csv`` or ``.tsv``, that grows during the run: rows with an ``update`` and
            a ``rating``, such as the lines of ``SampleLogger`` with a rating added to each. An update counts by the
            mean of its ratings; rows without a rating are skipped. Rank 0 calls a function, on all responses. None:
            only overfitting is detected.
        prompts: Number of held-out prompts, one response each.
        every: Updates between measurements; the first is before the first update. Ratings are of these updates.
        decay: Weight of the previous value in the smoothing of each measure.
        fall: Fall of a measure from its best value that gives a verdict, in standard deviations of single responses.
        then: After a verdict: ``"warn"`` only warns; ``"stop"`` ends the run, after its update; ``"go_back"`` also
            restores the best update.

    Reads ``experience.raw_scores``, ``pl_module.rollout(..., stream="reward_hacking")`` and ``score``;
    writes ``trainer.should_stop`` and, at the end, weights, depending on ``then``. Logs ``hacking/train``,
    ``hacking/held_out``, ``hacking/gold``, all smoothed, ``hacking/verdict`` (0 none, 1 overfitting, 2 reward hacking)
    and ``hacking/best_update``, by gold if there is one, else by the held-out score.
    Source: Gao et al. 2022, arXiv:2210.10760 (gold and proxy diverge); the rule is ours.
    """

    reads = ("raw_scores",)

    @constructor
    def __init__(
        self,
        gold: str | Callable[..., Any] | None = None,
        prompts: int = 64,
        every: int = 10,
        decay: float = 0.5,
        fall: float = 0.25,
        then: str = "warn",
    ) -> None:
        self.gold = gold
        if isinstance(gold, str):
            text(self, "gold", gold)
        elif gold is not None and (isinstance(gold, type) or not callable(gold)):
            refuse(self, "gold", gold, "must be a function, its import path, a reward's name, or a file of ratings")
        self.prompts = samples(self, "prompts", prompts, at_least=2)
        self.every = integer(self, "every", every)
        self.decay = fraction(self, "decay", decay)
        self.fall = positive(self, "fall", fall)
        self.then = one_of(self, "then", then, ("warn", "stop", "go_back"))
        self._rated = is_ratings(gold)
        if self._rated and then == "go_back":
            problem = "does not work with ratings, which come after their update; use then='stop', and resume from a "
            refuse(self, "then", then, problem + "checkpoint of hacking/best_update")
        self._source = None if self._rated else _source(gold)
        self._updates = 0
        self._courses: dict[str, Course] = {}
        self._spread: dict[str, float] = {}  # largest standard deviation of single responses so far
        self._said: dict[int, int] = {}  # update of each verdict
        self._ratings: Ratings = {}  # when last read
        self._checkpoint = BestCheckpoint("RewardHackingMonitor")
        self._goes_back = False
        self._back_at: int | None = None  # update whose weights were restored

    @property
    def told(self) -> list[str]:
        """Every warning so far in a few words, for the summary of the run."""
        said = [f"{VERDICTS[verdict]} at update {update}" for verdict, update in self._said.items()]
        return said if self._back_at is None else [*said, f"back to the weights of update {self._back_at}"]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "rollout", "score")
        refuse_beside(self, trainer, RewardHackingMonitor, why="both would log hacking/verdict")
        if stage == "fit":
            warn_of_gaps(self, trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        require_prompts(self, trainer, pl_module)
        names = reward_names(pl_module)
        if isinstance(self._source, str) and names is not None and self._source not in names:
            problem = f"{type(pl_module).__name__} has no reward of this name among several; it has "
            refuse(self, "gold", self.gold, problem + (", ".join(names) or "one, without a name"))
        if self._rated:
            self._ratings = self._read(trainer)
            if self._ratings and not self._courses:
                refuse(self, "gold", self.gold, "has ratings before this run has started; name a new file")
            rank_zero_info(f"RewardHackingMonitor: reads ratings from {Path(str(self.gold)).expanduser().absolute()}")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._goes_back &= trainer.should_stop  # resumed after the stop, before the end of the run
        self._back_at = None
        if not self._courses:
            self._measure(trainer, pl_module)

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        if self._updates not in self._courses["held_out"]:
            return
        self._add("train", experience.raw_scores)
        if self._rated:
            self._take_ratings(trainer)
        verdict = self._verdict()
        for name, course in self._courses.items():
            if course:
                pl_module.log(f"hacking/{name}", list(course.values())[-1])
        pl_module.log("hacking/verdict", float(verdict))
        pl_module.log("hacking/best_update", float(self._best()))
        if self.then != "warn" and verdict != NONE:
            trainer.should_stop = True
            self._goes_back = self.then == "go_back"

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: Any) -> None:
        self._updates += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure here, where a checkpoint has this policy and a run resumes from it exactly."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._updates % self.every == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._goes_back:
            return
        best = self._best()
        if self._checkpoint.restore(trainer, pl_module, best):
            self._back_at = best

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        """Measure all but the training score, which is known when this policy samples next."""
        peek = trainer.datamodule.peek
        with as_in_a_step(trainer):
            batch = peek("val", self.prompts) or peek("train", self.prompts)
            held_out = pl_module.rollout(batch, samples_per_prompt=1, logprobs=False, stream=STREAM)
            self._add("held_out", pl_module.score(held_out))
            if isinstance(self._source, str):
                self._add("gold", held_out.extras[self._source])
            elif self._source is not None:
                self._add("gold", torch.tensor(of_first_process(trainer, lambda: self._gold_scores(held_out))))
        if self.then == "go_back" and self._best() == self._updates and not trainer.fast_dev_run:
            self._checkpoint.save(trainer, self._updates)

    def _gold_scores(self, held_out: Any) -> list[float]:
        """Scores of the gold function; only rank 0 calls it, since it may give other results on each rank."""
        source: Any = self._source
        who = "RewardHackingMonitor(gold)"
        given = call_foreign(who, lambda: source(with_copies(held_out)), only_exits=True)
        scores: list[float] = check_scores(given, len(held_out), who).tolist()
        return scores

    def _add(self, name: str, values: Tensor) -> None:
        """Add a smoothed value."""
        course, mean = self._courses.setdefault(name, {}), float(values.mean())
        before = [value for update, value in course.items() if update < self._updates]
        course[self._updates] = self.decay * before[-1] + (1.0 - self.decay) * mean if before else mean
        self._spread[name] = max(float(values.std(correction=0)), self._spread.get(name, 0.0))

    def _read(self, trainer: Any) -> Ratings:
        where = f"RewardHackingMonitor(gold={self.gold!r})"
        ratings: Ratings = of_first_process(trainer, lambda: read_ratings(where, str(self.gold)))
        return ratings

    def _take_ratings(self, trainer: Any) -> None:
        """Set gold to the ratings of the measured updates."""
        try:
            self._ratings = self._read(trainer)
        except ValueError as error:  # the file may be half written
            rank_zero_warn(f"{error}; until then the previous ratings count")
        course: Course = {}
        known = sorted(self._courses["train"].keys() & self._ratings.keys())
        for update in known:
            mean = sum(self._ratings[update]) / len(self._ratings[update])
            course[update] = self.decay * list(course.values())[-1] + (1.0 - self.decay) * mean if course else mean
        self._courses["gold"] = course
        self._spread["gold"] = pstdev([rating for update in known for rating in self._ratings[update]] or [0.0])

    def _verdict(self) -> int:
        """The verdict; warns if it is new."""
        for verdict, down, up in ((OVERFITTING, "held_out", ["train"]), (HACKING, "gold", ["train", "held_out"])):
            courses = self._together(down, up)
            fallen = courses and diverging(courses[down], [courses[n] for n in up], self.fall * self._spread[down])
            if fallen:
                self._say(verdict, self._message(verdict, down, courses))
                return verdict
        self._warn_if_behind()
        return NONE

    def _together(self, down: str, up: list[str]) -> dict[str, list[float]]:
        """Measures at the updates that have the first; not every measured update has ratings."""
        at = list(self._courses.get(down, {}))
        return {name: [self._courses[name][update] for update in at] for name in (*up, down)} if at else {}

    def _warn_if_behind(self) -> None:
        """Gold that does not rise with the scores is about to fall."""
        up = ["train", "held_out"]
        courses = self._together("gold", up)
        if not courses or BEHIND in self._said:
            return
        rises = [2.0 * self.fall * self._spread[name] for name in up]
        since = stalled_since(courses["gold"], [courses[name] for name in up], rises)
        if since is not None:
            moved, update = _moved(courses, since), list(self._courses["gold"])[since]
            self._say(
                BEHIND,
                f"since update {update}, the training score rose {moved['train']} and the held-out score "
                f"{moved['held_out']}, each by more than {2.0 * self.fall:g} times its standard deviation, while gold "
                f"scores did not rise, {moved['gold']}; reward hacking may follow: raise kl_coef, or stop here",
            )

    def _say(self, verdict: int, words: str) -> None:
        """Warn once."""
        if verdict not in self._said:
            self._said[verdict] = self._updates
            rank_zero_warn(f"RewardHackingMonitor: {VERDICTS[verdict]} at update {self._updates}: {words}")

    def _best(self) -> int:
        """The update with the best gold, or without gold the best held-out score."""
        course = self._courses.get("gold") or self._courses["held_out"]
        return max(course, key=course.__getitem__)

    def _message(self, verdict: int, down: str, courses: dict[str, list[float]]) -> str:
        best = courses[down].index(max(courses[down]))
        moved, update = _moved(courses, best), list(self._courses[down])[best]
        fallen = f"more than {self.fall:g} times their standard deviation of {self._spread[down]:.3g}"
        if verdict == HACKING:
            return (
                f"since update {update}, where gold was best, the training score rose {moved['train']} and the "
                f"held-out score {moved['held_out']}, while gold scores fell {moved['gold']}, {fallen}; resume from "
                "there, raise kl_coef, or correct the reward"
            )
        return (
            f"since update {update}, where the held-out score was best, the training score rose {moved['train']}, "
            f"while held-out scores fell {moved['held_out']}, {fallen}; resume from there, use more prompts, or fewer "
            "epochs"
        )

    def state_dict(self) -> dict[str, Any]:
        courses = {name: dict(course) for name, course in self._courses.items()}
        kept = {"spread": dict(self._spread), "said": dict(self._said), "kept": self._checkpoint.path}
        return {"updates": self._updates, "courses": courses, "goes_back": self._goes_back, **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._spread = state_dict["updates"], dict(state_dict["spread"])
        self._courses = {name: dict(course) for name, course in state_dict["courses"].items()}
        self._said, self._checkpoint.path = dict(state_dict["said"]), state_dict["kept"]
        self._goes_back = state_dict.get("goes_back", False)


def _source(gold: str | Callable[..., Any] | None) -> str | Callable[[Any], Any] | None:
    """A score source, the name of a reward, or None."""
    if isinstance(gold, str):
        return RewardFunction(gold) if "." in gold else gold  # names of rewards have no dots
    return gold if gold is None or takes_experience(gold) else RewardFunction(gold)


def _moved(courses: dict[str, list[float]], since: int) -> dict[str, str]:
    """Each measure's way from a place to now."""
    return {name: f"from {course[since]:.3g} to {course[-1]:.3g}" for name, course in courses.items()}
