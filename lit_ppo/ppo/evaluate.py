"""Validation, test and prediction: sample on prompts that are not trained on, and score.

Each prompt gets one response. Validation also runs before the first update. ``test/`` has the same tags as ``val/``.

- ``val/score``, ``val/kl``: mean score, and KL to the reference in nats per response.
- ``val/score/<name>``: mean score of each of several rewards and of each of ``eval_rewards``.
- ``val/win_rate``, ``val/win_rate/<name>``: fraction of responses with a higher score than the reference's response to
  the same prompt; a tie counts half.
- ``val/length``, ``val/ended_fraction``: tokens per response; fraction of responses that end with a stop token.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric

from lit_ppo.experience import Experience
from lit_ppo.functional import wins
from lit_ppo.parallel.files import atomic_path
from lit_ppo.parallel.ranks import rank
from lit_ppo.ppo.collect import score
from lit_ppo.shown import escaped

PREDICTIONS = "predictions.jsonl"
Scores = dict[str, Tensor]  # by reward; the training reward as a whole is under ""


class Evaluator:
    """Means of held-out scores, KL, lengths and win rates.

    Every batch is sampled from a fixed random stream, so numbers are comparable during the whole run. The reference
    samples from the same stream, once: the actor wins exactly half of the comparisons until it differs.
    """

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}
        self._reference: dict[str, tuple[list[str], Scores]] = {}  # stream -> prompts, scores
        self.predictions: list[dict[str, Any]] = []

    def evaluate(
        self,
        name: str,
        batch_idx: int,
        rollout: Callable[..., Experience],
        score: Callable[[Experience], Scores],
        *,
        has_reference: bool,
        reference_moves: bool,
    ) -> dict[str, MeanMetric]:
        """Add one batch to the means.

        Args:
            name: ``val`` or ``test``.
            batch_idx: Number of the batch.
            rollout: Samples one response per prompt of the batch, from the given ``stream`` and ``policy``.
            score: Scores responses by every reward.
            has_reference: Whether the actor is compared with a reference.
            reference_moves: Whether the reference changes during the run.

        Returns:
            The means so far, by their logged names.
        """
        stream = f"{name}/{batch_idx}"
        experience = rollout(stream=stream)
        scores = score(experience)
        values: dict[str, Tensor] = {
            **{_key("score", reward): x for reward, x in scores.items()},
            "kl": experience.kl.sum(1),
            "length": experience.response_mask.sum(1),
            "ended_fraction": experience.ended,
        }
        if has_reference:
            known = None if reference_moves else self._reference.get(stream)
            if known is None or known[0] != experience.prompts:
                theirs = score(rollout(stream=stream, policy="reference", logprobs=False))
                known = self._reference[stream] = experience.prompts, theirs
            values |= {_key("win_rate", reward): wins(x, known[1][reward]) for reward, x in scores.items()}
        return {f"{name}/{key}": self._update(f"{name}/{key}", x) for key, x in values.items()}

    def _update(self, name: str, values: Tensor) -> MeanMetric:
        # every rank holds the same values, so there is nothing to exchange
        mean = self._means.setdefault(name, MeanMetric(sync_on_compute=False)).to(values.device)
        mean.update(values.float())
        return mean


def _key(metric: str, reward: str) -> str:
    return f"{metric}/{reward}" if reward else metric


def validate_before_training(trainer: Any) -> None:
    """Run validation before the first update, if the trainer validates at all; a resumed run has done so."""
    if trainer.global_step == 0 and trainer.enable_validation:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


def validation_step(module: Any, prompts: Any, batch_idx: int) -> None:
    """Log score, KL and length of one response per prompt, and how often it beats the reference's."""
    _evaluate(module, "val", prompts, batch_idx)


def test_step(module: Any, prompts: Any, batch_idx: int) -> None:
    """As :func:`validation_step`, under ``test/``."""
    _evaluate(module, "test", prompts, batch_idx)


def _evaluate(module: Any, name: str, prompts: Any, batch_idx: int) -> None:
    def rollout(**kwargs: Any) -> Experience:
        module.progress.start("rollout")
        experience: Experience = module.rollout(prompts, samples_per_prompt=1, **kwargs)
        return experience

    def score_all(experience: Experience) -> Scores:
        module.progress.start("score")
        scores = {} if module.rewards is None else score(module.rewards, experience, timeout=module.reward_timeout)
        if module.eval_rewards is not None:
            by_eval = score(module.eval_rewards, experience, timeout=module.reward_timeout)
            scores |= {reward: x for reward, x in by_eval.items() if reward}
        return scores

    means = module.evaluator.evaluate(
        name, batch_idx, rollout, score_all,
        has_reference=module.reference is not None, reference_moves=module.checkpoint_reference,
    )  # fmt: skip
    module.progress.stop()
    for key, mean in means.items():
        module.log(key, mean, metric_attribute=key)


def predict_step(module: Any, prompts: Any, batch_idx: int) -> list[dict[str, Any]]:
    """Prompts, responses and scores of ``samples_per_prompt`` responses per prompt; several rewards by name."""
    experience = module.rollout(prompts, logprobs=False, stream=f"predict/{batch_idx}")
    scores = {} if module.rewards is None else score(module.rewards, experience, timeout=module.reward_timeout)
    columns: dict[str, list[Any]] = {"prompt": experience.prompts, "response": experience.responses}
    columns |= {_key("score", reward): x.tolist() for reward, x in scores.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    module.evaluator.predictions += rows
    return rows


def on_predict_start(module: Any) -> None:
    """Start an empty list of predictions; check that the file may be written.

    Raises:
        ValueError: There is a file of that name with other content.
    """
    module.evaluator.predictions.clear()
    file = _file(module.trainer)
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    if text and not text.startswith('{"prompt": '):
        raise ValueError(
            f"{type(module).__name__}: {file} is in the way, and lit-ppo did not write it; move it away, or set the "
            "Trainer's default_root_dir to another folder"
        )


def on_predict_end(module: Any) -> None:
    """Write all predictions as JSON lines into the run folder."""
    path, rows = _file(module.trainer), module.evaluator.predictions
    if rank() == 0:
        with atomic_path(path) as new:
            new.write_text("".join(_line(row) for row in rows), encoding="utf-8")
    rank_zero_info(f"{len(rows)} predictions: {path}")


def _file(trainer: Any) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir) / PREDICTIONS  # collective


def _line(row: dict[str, Any]) -> str:
    """JSON on one line, with escapes for all characters that a terminal or an editor might interpret."""
    text = json.dumps(row, ensure_ascii=False)
    return escaped(text, line_ends=False, escape=lambda c: json.dumps(c)[1:-1]) + "\n"
