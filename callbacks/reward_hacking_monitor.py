"""Watch for a reward that is gamed, or learnt by heart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule, as_in_a_step, of_first_process
from lit_ppo.callbacks.checks import refuse_beside, require, require_prompts, warn_of_gaps
from lit_ppo.callbacks.ratings import Ratings, is_ratings, read_ratings
from lit_ppo.functional import diverging
from lit_ppo.rewards.function import RewardFunction, check_scores, takes_experience
from lit_ppo.validate import fraction, integer, one_of, positive

STREAM = "reward_hacking"
NONE, OVERFITTING, HACKING = 0, 1, 2
VERDICTS = ("none", "overfitting", "reward hacking")
Course = dict[int, float]  # a smoothed measure, by the number of updates done


class RewardHackingMonitor(PPOCallback):
    """Tells apart the two ways in which a rising score deceives: reward hacking and overfitting.

    Use it where the reward stands for something that it is not, as any reward model does. Every so many updates it
    takes the mean of three measures of the policy as it then is: the training score, the score of responses to
    held-out prompts (always the same, drawn alike), and a gold measure of these responses, which training does not
    see. All are smoothed. Since the update at which the held-out score was best: training score up and held-out
    score down by ``fall`` is overfitting. Otherwise, since the update at which gold was best: training and held-out
    score up and gold down by ``fall`` is reward hacking. It warns in words with the numbers, once of each.

    It changes nothing in training, and costs a rollout of ``prompts`` responses every so many updates. Without
    held-out data it takes the first training prompts, on which overfitting hides.

    With ``then: go_back`` it keeps a checkpoint of the best update, beside the others as ``best-step-....ckpt``; that
    costs its room on the disk, and its time whenever there is a new best. After a verdict the run ends with the
    weights of that update: they are what is exported, and what callbacks behind this one see at the end. The
    checkpoint is then the newest, so that ``--ckpt_path last`` goes on from there, say with a larger ``kl_coef``.

    Args:
        gold: A function ``(prompts, responses, **columns)``, or where to import it from, ``package.function``; a score
            source; the name of one of several ``rewards``, such as a reward model of weight 0; or a file of human
            ratings, ``ratings.jsonl``, ``.json``, ``.csv`` or ``.tsv``, that grows as the run does: rows with an
            ``update`` and a ``rating``, as lines that ``SampleLogger`` wrote with a rating added to each. An update
            counts once it has ratings, by their mean; rows still without one are left out.
            The first process calls a function, on all responses. None: only overfitting is looked for.
        prompts: Held-out prompts, one response each.
        every: Updates from one time to the next; the first is before the first update. Ratings are of these updates.
        decay: What is left of the old in a smoothed measure each time.
        fall: How far a measure must fall from its best, in standard deviations of single responses.
        then: What follows either verdict: ``"warn"`` alone; ``"stop"`` ends the run, after its update; ``"go_back"``
            also goes back to the best update.

    Reads ``experience.raw_scores``, ``pl_module.rollout(..., stream="reward_hacking")`` and ``score``;
    writes ``trainer.should_stop`` and, at the end, weights, if asked to. Logs ``hacking/train``, ``hacking/held_out``,
    ``hacking/gold``, all smoothed, ``hacking/verdict`` (0 none, 1 overfitting, 2 reward hacking) and
    ``hacking/best_update``, by gold where there is one, else by the held-out score.
    Source: Gao et al. 2022, arXiv:2210.10760 (gold and proxy part ways); the rule is ours.
    """

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
        self.prompts = integer(self, "prompts", prompts, at_least=2)
        self.every = integer(self, "every", every)
        self.decay = fraction(self, "decay", decay)
        self.fall = positive(self, "fall", fall)
        self.then = one_of(self, "then", then, ("warn", "stop", "go_back"))
        self._rated = is_ratings(gold)
        if self._rated and then == "go_back":
            raise ValueError(
                f"RewardHackingMonitor(gold={gold!r}, then={then!r}): ratings come when their update has gone by; use "
                "then='stop', and go on from a checkpoint of hacking/best_update"
            )
        self._source = None if self._rated else _source(gold)
        self._updates = 0
        self._courses: dict[str, Course] = {}
        self._spread: dict[str, float] = {}  # the largest deviation between single responses so far
        self._said: dict[int, int] = {}  # verdict, and after which update
        self._ratings: Ratings = {}  # as last read
        self._kept: str | None = None  # checkpoint of the best update
        self._goes_back = False
        self._back_at: int | None = None  # update whose weights the run has ended with

    @property
    def told(self) -> list[str]:
        """Every warning of the run in few words, for its summary."""
        said = [f"{VERDICTS[verdict]} at update {update}" for verdict, update in self._said.items()]
        return said if self._back_at is None else [*said, f"back to the weights of update {self._back_at}"]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module that cannot be asked, and a second monitor."""
        require(self, pl_module, "rollout", "score")
        refuse_beside(self, trainer, RewardHackingMonitor, why="both would log hacking/verdict")
        if stage == "fit":
            warn_of_gaps(self, trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse data without prompts to look at, a name that no reward has, and another run's ratings."""
        require_prompts(self, trainer, pl_module)
        names = getattr(pl_module, "source_names", None)
        if isinstance(self._source, str) and names is not None and self._source not in names:
            raise ValueError(
                f"RewardHackingMonitor(gold={self.gold!r}): {type(pl_module).__name__} has no reward of this name "
                f"among several; it has {', '.join(names) or 'one, without a name'}"
            )
        if self._rated:
            self._ratings = self._read(trainer)
            if self._ratings and not self._courses:
                raise ValueError(
                    f"RewardHackingMonitor(gold={self.gold!r}): there are ratings already, of another run, as this one "
                    "has not begun; name a new file"
                )
            rank_zero_info(f"RewardHackingMonitor: reads ratings from {Path(str(self.gold)).expanduser().absolute()}")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure what the run starts from."""
        self._goes_back, self._back_at = False, None
        if not self._courses:
            self._measure(trainer, pl_module)

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Judge, if the policy that has just sampled was measured."""
        if self._updates not in self._courses["held_out"]:
            return
        self._add("train", experience.raw_scores)
        if self._rated:
            self._take_ratings(trainer)
        verdict = self._judge()
        for name, course in self._courses.items():
            if course:
                pl_module.log(f"hacking/{name}", list(course.values())[-1])
        pl_module.log("hacking/verdict", float(verdict))
        pl_module.log("hacking/best_update", float(self._best()))
        if self.then != "warn" and verdict != NONE:
            trainer.should_stop = True
            self._goes_back = self.then == "go_back"

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: Any) -> None:
        """Count."""
        self._updates += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure, if it is time; here a checkpoint is of this policy, and a run goes on from it to the bit."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._updates % self.every == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Go back, after a verdict."""
        if not self._goes_back:
            return
        best, kept = self._best(), self._kept
        is_there = of_first_process(trainer, lambda: kept is not None and Path(kept).is_file())
        if kept is None or not is_there or Path(kept).name != _name(best):
            rank_zero_warn(
                f"RewardHackingMonitor: no checkpoint of update {best} ({kept}); the weights stay as they are"
            )
            return
        checkpoint = trainer.strategy.load_checkpoint(kept)
        trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        self._back_at = best
        if trainer.is_global_zero:
            Path(kept).touch()
        rank_zero_info(f"RewardHackingMonitor: back to the weights of update {best}; {kept} goes on from there")

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        """All but the training score, which comes when this policy next samples; keep the best."""
        peek = trainer.datamodule.peek
        with as_in_a_step(trainer):
            batch = peek("val", self.prompts) or peek("train", self.prompts)
            held_out = pl_module.rollout(batch, samples_per_prompt=1, logprobs=False, stream=STREAM)
            self._add("held_out", pl_module.score(held_out))
            if isinstance(self._source, str):
                self._add("gold", held_out.extras[self._source])
            elif self._source is not None:
                self._add("gold", torch.tensor(of_first_process(trainer, lambda: self._asked(held_out))))
        if self.then == "go_back" and self._best() == self._updates and not trainer.fast_dev_run:
            self._keep(trainer)

    def _asked(self, held_out: Any) -> list[float]:
        """What the function finds; a judge may not say the same twice, which would part the ranks."""
        source: Any = self._source
        scores: list[float] = check_scores(source(held_out), len(held_out), "RewardHackingMonitor(gold)").tolist()
        return scores

    def _keep(self, trainer: Any) -> None:
        """Save this update in place of the best one before."""
        log_dir = trainer.log_dir  # asked on every rank: Lightning has them agree
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        file = Path(folder or Path(log_dir or trainer.default_root_dir) / "checkpoints") / _name(self._updates)
        before, self._kept = self._kept, str(file)
        trainer.save_checkpoint(file, weights_only=False)
        if before is not None and before != self._kept and Path(before).parent == file.parent:  # not another run's
            trainer.strategy.remove_checkpoint(before)

    def _add(self, name: str, values: Tensor) -> None:
        """The next entry of a course, smoothed."""
        course, mean = self._courses.setdefault(name, {}), float(values.mean())
        before = [value for update, value in course.items() if update < self._updates]
        course[self._updates] = self.decay * before[-1] + (1.0 - self.decay) * mean if before else mean
        self._spread[name] = max(float(values.std(correction=0)), self._spread.get(name, 0.0))

    def _read(self, trainer: Any) -> Ratings:
        where = f"RewardHackingMonitor(gold={self.gold!r})"
        found: Ratings = of_first_process(trainer, lambda: read_ratings(where, str(self.gold)))
        return found

    def _take_ratings(self, trainer: Any) -> None:
        """The course of gold, as far as updates that were measured have ratings."""
        try:
            self._ratings = self._read(trainer)
        except ValueError as error:  # somebody may be writing in it
            rank_zero_warn(f"{error}; until then the ratings of before count")
        course: Course = {}
        known = sorted(self._courses["train"].keys() & self._ratings.keys())
        for update in known:
            mean = sum(self._ratings[update]) / len(self._ratings[update])
            course[update] = self.decay * list(course.values())[-1] + (1.0 - self.decay) * mean if course else mean
        self._courses["gold"] = course
        self._spread["gold"] = _deviation([rating for update in known for rating in self._ratings[update]])

    def _judge(self) -> int:
        """The verdict; said if it is new."""
        for verdict, down, up in ((OVERFITTING, "held_out", ["train"]), (HACKING, "gold", ["train", "held_out"])):
            falling = self._courses.get(down)
            if not falling:
                continue
            at = list(falling)  # of ratings, not all that the others have
            courses = {name: [self._courses[name][update] for update in at] for name in (*up, down)}
            if diverging(courses[down], [courses[name] for name in up], self.fall * self._spread[down]):
                if verdict not in self._said:
                    self._said[verdict] = self._updates
                    rank_zero_warn(self._message(verdict, down, at, courses))
                return verdict
        return NONE

    def _best(self) -> int:
        """The update at which gold was best, or without it the held-out score."""
        course = self._courses.get("gold") or self._courses["held_out"]
        return max(course, key=course.__getitem__)

    def _message(self, verdict: int, down: str, at: list[int], courses: dict[str, list[float]]) -> str:
        best = courses[down].index(max(courses[down]))
        moved = {name: f"from {course[best]:.3g} to {course[-1]:.3g}" for name, course in courses.items()}
        fallen = f"over {self.fall:g} times their standard deviation of {self._spread[down]:.3g}"
        since = f"since update {at[best]}"
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
        """Everything measured, what was said, and where the best update lies."""
        courses = {name: dict(course) for name, course in self._courses.items()}
        kept = {"spread": dict(self._spread), "said": dict(self._said), "kept": self._kept}
        return {"updates": self._updates, "courses": courses, **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self._updates, self._spread = state_dict["updates"], dict(state_dict["spread"])
        self._courses = {name: dict(course) for name, course in state_dict["courses"].items()}
        self._said, self._kept = dict(state_dict["said"]), state_dict["kept"]


def _source(gold: str | Callable[..., Any] | None) -> str | Callable[[Any], Any] | None:
    """A score source, the name of one, or None."""
    if isinstance(gold, str):
        return RewardFunction(gold) if "." in gold else gold  # no reward has a dot in its name
    return gold if gold is None or takes_experience(gold) else RewardFunction(gold)


def _name(update: int) -> str:
    return f"best-step-{update:06d}.ckpt"


def _deviation(values: list[float]) -> float:
    mean = sum(values) / max(len(values), 1)
    return float((sum((value - mean) ** 2 for value in values) / max(len(values), 1)) ** 0.5)
