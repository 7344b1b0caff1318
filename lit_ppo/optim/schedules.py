"""Learning-rate schedules that torch lacks."""

import math
import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


class WarmupCosine(LRScheduler):
    """Linear warm-up, then a cosine decay that ends at a fraction of the peak and stays there.

    Use it to train from scratch. Unlike torch's ``OneCycleLR`` it leaves momentum alone, does not raise after its
    last step, and takes the number of steps from the run.

    Args:
        optimizer: Its learning rate is the peak.
        warmup_steps: Steps to reach the peak; the first is taken at ``1 / warmup_steps`` of it.
        final_fraction: What is left of the peak at the end.
        total_steps: Step at which the decay ends; None takes the run's length (the modules of lit_ppo fill it
            in).
        last_epoch: As in every torch scheduler.

    Raises:
        ValueError: An argument is out of range, or the decay would end before the warm-up does.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> scheduler = WarmupCosine(optimizer, warmup_steps=2, total_steps=4)
    >>> rates = []
    >>> for _ in range(6):
    ...     rates.append(round(scheduler.get_last_lr()[0], 2))
    ...     optimizer.step()
    ...     scheduler.step()
    >>> rates
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        final_fraction: float = 0.0,
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"WarmupCosine(warmup_steps={warmup_steps}): must be 0 or more")
        if not 0.0 <= final_fraction <= 1.0:
            raise ValueError(f"WarmupCosine(final_fraction={final_fraction}): must lie between 0 and 1")
        self.warmup_steps = warmup_steps
        self.final_fraction = final_fraction
        self.total_steps = total_steps
        if total_steps is not None and total_steps <= warmup_steps:
            raise ValueError(f"WarmupCosine(total_steps={total_steps}): must be above warmup_steps={warmup_steps}")
        super().__init__(optimizer, last_epoch)

    def set_total_steps(self, total_steps: int) -> None:
        """Let the decay end at this step; a run as short as its warm-up is told so, and goes on."""
        if total_steps <= self.warmup_steps:
            warnings.warn(
                f"WarmupCosine(warmup_steps={self.warmup_steps}): the run has only {total_steps} steps and ends before "
                "the learning rate reaches its peak; warm up for fewer, or train longer",
                stacklevel=2,
            )
        self.total_steps = total_steps

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the step that comes next."""
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            if step == 0:  # the constructor's own call: no step has been taken
                return 1.0
            raise ValueError("WarmupCosine(total_steps=None): nothing has set the run's length; give a number")
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def per_step(where: str, scheduler: Any, module: Any) -> Any:
    """A schedule ready to be stepped once per step of the run, with the run's length where it asks for that.

    Args:
        where: Class and argument that it was given as, such as ``LitSFT(scheduler``, for messages.
        scheduler: What the factory made.
        module: Whose run it is.

    Raises:
        ValueError: It steps on results, or asks for the length of a run that has no end.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(f"{where}=ReduceLROnPlateau): it steps on a validation result; use one that steps on a count")
    if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
        steps = module.trainer.estimated_stepping_batches
        if steps == math.inf:
            raise ValueError("WarmupCosine(total_steps=None): the run has no end; set trainer.max_steps or max_epochs")
        scheduler.set_total_steps(int(steps))
    return scheduler
