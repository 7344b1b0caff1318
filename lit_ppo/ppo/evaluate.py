"""Validation, test and prediction: sample on prompts that are not trained on, and score."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric

from lit_ppo.experience import Experience
from lit_ppo.functional import wins
from lit_ppo.parallel.ranks import rank
from lit_ppo.ppo.collect import Policy
from lit_ppo.rewards import source_names

PREDICTIONS = "predictions.jsonl"


class Evaluation(Policy):
    """Every draw comes from a fixed stream of its own: the same prompts give comparable numbers all run long.

    The reference answers by the same draws, once: the actor wins exactly half of the time until it differs.
    """

    checkpoint_reference: bool  # a callback moves it
    _means: dict[str, MeanMetric]  # by what they are logged as
    _reference_judged: dict[str, tuple[list[str], dict[str, Tensor]]]  # stream -> prompts, scores by each judge

    def validate_start(self) -> None:
        """Run validation before the first update, where the trainer runs any; a resumed run has done so."""
        trainer = self.trainer
        if trainer.global_step == 0 and trainer.enable_validation:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def validation_step(self, prompts: Any, batch_idx: int) -> None:
        """Log score, KL and length of one response to each prompt, and how often it beats the reference's."""
        self._evaluate("val", prompts, batch_idx)

    def test_step(self, prompts: Any, batch_idx: int) -> None:
        """As validation, under ``test/``."""
        self._evaluate("test", prompts, batch_idx)

    def _evaluate(self, name: str, prompts: Any, batch_idx: int) -> None:
        stream = f"{name}/{batch_idx}"
        with self.at_work("rollout"):
            experience = self.rollout(prompts, samples_per_prompt=1, stream=stream)
        scores = self._judged(experience)
        metrics = {
            **{f"score{judge}": values for judge, values in scores.items()},
            "kl": experience.kl.sum(1),
            "length": experience.response_mask.sum(1),
            "ended_fraction": experience.ended,
        }
        if self.reference is not None:
            theirs = self._reference_scores(prompts, stream, experience.prompts)
            metrics |= {f"win_rate{judge}": wins(ours, theirs[judge]) for judge, ours in scores.items()}
        for key, values in metrics.items():
            mean = self._means.setdefault(f"{name}/{key}", MeanMetric(sync_on_compute=False)).to(self.device)
            mean.update(values.float())  # the same on every rank: nothing to exchange
            self.log(f"{name}/{key}", mean, metric_attribute=f"{name}/{key}")

    def _judged(self, experience: Experience) -> dict[str, Tensor]:
        """Scores by the training reward, under the empty name, and by whatever else has one."""
        with self.at_work("score"):
            named = self.scores_by(self.rewards, experience)
            if self.eval_rewards is not None:
                judged = self.scores_by(self.eval_rewards, experience)
                named |= {name: judged[name] for name in source_names(self.eval_rewards)}
        return {f"/{name}" if name else "": scores for name, scores in named.items()}

    def _reference_scores(self, prompts: Any, stream: str, texts: list[str]) -> dict[str, Tensor]:
        """The same of the reference's own responses to the same prompts; sampled once, unless the reference moves."""
        known = None if self.checkpoint_reference else self._reference_judged.get(stream)
        if known is None or known[0] != texts:
            with self.at_work("rollout"):
                theirs = self.rollout(prompts, samples_per_prompt=1, policy="reference", logprobs=False, stream=stream)
            known = self._reference_judged[stream] = texts, self._judged(theirs)
        return known[1]

    def on_predict_start(self) -> None:
        """Begin a list of rows."""
        self._predictions: list[dict[str, Any]] = []

    def predict_step(self, prompts: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Prompts, responses and scores of ``samples_per_prompt`` responses to each prompt; each source's by name."""
        experience = self.rollout(prompts, logprobs=False, stream=f"predict/{batch_idx}")
        columns = {"prompt": experience.prompts, "response": experience.responses}
        columns["score"] = self.score(experience).tolist()
        columns.update({f"score/{source}": experience.extras[source].tolist() for source in self.source_names})
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self._predictions += rows
        return rows

    def on_predict_end(self) -> None:
        """Write all rows as JSON lines into the run folder."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [_line(json.dumps(row, ensure_ascii=False)) for row in self._predictions]
            (folder / PREDICTIONS).write_text("".join(lines), encoding="utf-8")
        rank_zero_info(f"{len(self._predictions)} predictions: {folder / PREDICTIONS}")


def _line(text: str) -> str:
    """JSON as one line by anybody's count, in which neither a terminal nor an editor finds anything to obey."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text) + "\n"
