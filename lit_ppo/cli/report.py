"""What a run has changed, in plain sight: the same prompts before and after, with their scores and KL."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.showing import printable

STREAM = "report"  # the same draws before and after


class RunReport(L.Callback):
    """Samples a few prompts before and after ``fit`` and prints both side by side; does nothing for other modules.

    Held-out prompts where the data module has some, else the first training prompts. A resumed run compares with
    where the whole run started.

    Args:
        prompts: Prompts that the scores are a mean over; 0 turns the report off.
        samples: Of these, how many to print.
    """

    def __init__(self, prompts: int = 32, samples: int = 3) -> None:
        if prompts < 0:
            raise ValueError(f"RunReport(prompts={prompts}): must be 0 or more")
        if prompts and not 0 <= samples <= prompts:
            raise ValueError(f"RunReport(samples={samples}): must lie between 0 and prompts={prompts}")
        self.prompts, self.samples = prompts, samples
        self._before: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample before the first update."""
        if self._before is None:
            self._before = self._sample(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample again, and print."""
        before, after = self._before, self._sample(trainer, pl_module)
        if before is None or after is None or not trainer.is_global_zero:
            return
        print(f"\nThe same {len(after['prompts'])} prompts before and after:")
        for i in range(self.samples):
            print(f"  {printable(after['prompts'][i])!r}")
            for name, seen in (("before", before), ("after", after)):
                print(f"    {name:6} {seen['scores'][i]:+7.2f}  {printable(seen['responses'][i])}")
        for what, unit in (("score", ""), ("kl", " nats a response to the reference")):
            print(f"  mean {what:5} {before[what]:+.3f} -> {after[what]:+.3f}{unit}", flush=True)

    def _sample(self, trainer: Any, pl_module: Any) -> dict[str, Any] | None:
        peek = getattr(trainer.datamodule, "peek", None)
        if peek is None or not self.prompts or trainer.fast_dev_run or not hasattr(pl_module, "rollout"):
            return None
        batch = peek("val", self.prompts) or peek("train", self.prompts)
        experience = pl_module.rollout(batch, samples_per_prompt=1, stream=STREAM)
        scores = pl_module.score(experience)
        return {
            "prompts": experience.prompts,
            "responses": experience.responses,
            "scores": scores.tolist(),
            "score": float(scores.mean()),
            "kl": float(experience.kl.sum(1).mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """What the run started from."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the whole run's start."""
        self._before = state_dict["before"]
