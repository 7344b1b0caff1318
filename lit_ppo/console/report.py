"""Samples before and after a run: responses to the same prompts, with their scores and KL."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.showing import readable_prompts
from lit_ppo.shown import escaped
from lit_ppo.validate import integer, refuse


class RunReport(L.Callback):
    """Samples a few prompts before and after ``fit`` and prints both side by side.

    Prompts are held-out ones if there are any, else the first of training. A resumed run compares with the start of
    the full run. Modules without a rollout get no report.

    Args:
        prompts: Prompts to sample; the mean score and KL are over these. 0 turns the report off.
        samples: How many of them to print; by default 3, or all if they are fewer.
    """

    def __init__(self, prompts: int = 32, samples: int | None = None) -> None:
        self.prompts = integer(self, "prompts", prompts, at_least=0)
        self.samples = 3 if samples is None else integer(self, "samples", samples, at_least=0)
        if prompts and samples is not None and samples > prompts:
            refuse(self, "samples", samples, f"must be at most prompts={prompts}")
        self._before: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._before is None:
            self._before = self._sample(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before, after = self._before, self._sample(trainer, pl_module)
        if before is None or after is None or not trainer.is_global_zero:
            return
        print(f"\nThe same {len(after['prompts'])} prompts before and after:")
        for i in range(min(self.samples, len(after["prompts"]))):
            print(_lines("  ", after["prompts"][i]))
            for name, sampled in (("before", before), ("after", after)):
                print(_lines(f"    {name:6} {sampled['scores'][i]:+7.2f}  ", sampled["responses"][i]))
        for name, unit in (("score", ""), ("kl", " nats per response to the reference")):
            print(f"  mean {name:5} {before[name]:+.3f} -> {after[name]:+.3f}{unit}", flush=True)

    def _sample(self, trainer: Any, pl_module: Any) -> dict[str, Any] | None:
        peek = getattr(trainer.datamodule, "peek", None)
        if peek is None or not self.prompts or trainer.fast_dev_run or not hasattr(pl_module, "rollout"):
            return None
        batch = peek("val", self.prompts) or peek("train", self.prompts)
        experience = pl_module.rollout(batch, samples_per_prompt=1, stream="report")  # the same draws both times
        scores = pl_module.score(experience)
        return {
            "prompts": readable_prompts(experience),
            "responses": experience.responses,
            "scores": scores.tolist(),
            "score": float(scores.mean()),
            "kl": float(experience.kl.sum(1).mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["before"]


def _lines(start: str, text: str) -> str:
    r"""Text after its start; further lines begin below its first.

    >>> print(_lines("after  +1.00  ", "one\ntwo"))
    after  +1.00  one
                  two
    """
    return start + f"\n{' ' * len(start)}".join(escaped(line, line_ends=False) for line in text.split("\n"))
