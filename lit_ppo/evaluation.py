"""Validation, test and prediction: sample on prompts that are not trained on, and score."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_ppo.distributed import rank
from lit_ppo.policy import Policy

PREDICTIONS = "predictions.jsonl"


class Evaluation(Policy):
    """Every draw comes from a fixed stream of its own: the same prompts give comparable numbers all run long."""

    def validation_step(self, prompts: Any, batch_idx: int) -> None:
        """Log score, KL and length of one response to each prompt."""
        self._evaluate("val", prompts, batch_idx)

    def test_step(self, prompts: Any, batch_idx: int) -> None:
        """As validation, under ``test/``."""
        self._evaluate("test", prompts, batch_idx)

    def _evaluate(self, name: str, prompts: Any, batch_idx: int) -> None:
        experience = self.rollout(prompts, samples_per_prompt=1, stream=f"{name}/{batch_idx}")
        metrics = {
            "score": self.score(experience).mean(),
            **{f"score/{source}": experience.extras[source].mean() for source in self.source_names},
            "kl": experience.kl.sum(1).mean(),
            "length": experience.response_mask.sum(1).float().mean(),
            "ended_fraction": experience.ended.float().mean(),
        }
        # the same on every rank; a mean over ranks changes nothing, and saves Lightning's advice to take one
        named = {f"{name}/{key}": value for key, value in metrics.items()}
        self.log_dict(named, batch_size=len(experience), sync_dist=True)

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
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._predictions]
            (folder / PREDICTIONS).write_text("".join(lines), encoding="utf-8")
        rank_zero_info(f"{len(self._predictions)} predictions: {folder / PREDICTIONS}")
