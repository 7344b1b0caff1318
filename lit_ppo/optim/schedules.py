"""Learning-rate schedules that torch lacks."""

import math
import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_ppo.constructor import constructor
from lit_ppo.validate import integer, integer_or_none, number, refuse


class WarmupCosine(LRScheduler):
    """Linear warm-up, then a cosine decay that ends at a fraction of the peak and stays there.

    Use it to train from scratch. Unlike torch's ``OneCycleLR`` it does not change the momentum, does not raise after
    its last step, and gets the number of steps from the run.

    Args:
        optimizer: Its learning rate is the peak.
        warmup_steps: Steps to reach the peak. The first step has ``1 / warmup_steps`` of the peak.
        final_fraction: The final learning rate as a fraction of the peak.
        total_steps: Step at which the decay ends; None: the end of the run (the modules of lit_ppo set it).
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

    @constructor
    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        final_fraction: float = 0.0,
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        self.warmup_steps = integer(self, "warmup_steps", warmup_steps, at_least=0)
        self.final_fraction = number(self, "final_fraction", final_fraction, at_least=0, at_most=1)
        self.total_steps = integer_or_none(self, "total_steps", total_steps)
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            refuse(self, "total_steps", total_steps, f"must be above warmup_steps={warmup_steps}")
        if not isinstance(optimizer, Optimizer):
            refuse(self, "optimizer", optimizer, "must be a torch optimizer, such as torch.optim.SGD(parameters)")
        integer(self, "last_epoch", last_epoch, at_least=-1)
        if last_epoch >= 0 and any("initial_lr" not in group for group in optimizer.param_groups):
            problem = "continues a schedule, but the optimizer has not had one; give -1"
            refuse(self, "last_epoch", last_epoch, problem)
        super().__init__(optimizer, last_epoch)

    def set_total_steps(self, total_steps: int) -> None:
        """Set the step at which the decay ends. Warns if the warm-up is not shorter than that."""
        if total_steps <= self.warmup_steps:
            warnings.warn(
                f"WarmupCosine(warmup_steps={self.warmup_steps}): the run has only {total_steps} steps, so the "
                "learning rate never reaches its peak; lower warmup_steps or train longer",
                stacklevel=2,
            )
        self.total_steps = total_steps

    def get_lr(self) -> list[float | Tensor]:
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            if step == 0:  # called by the constructor, before any step
                return 1.0
            refuse(self, "total_steps", None, "nothing has set the length of the run; give a number")
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def per_step(where: str, scheduler: Any, module: Any) -> Any:
    """Prepare a schedule to step once per step of the run: a :class:`WarmupCosine` gets the length of the run.

    Args:
        where: Class and argument of the schedule, such as ``LitSFT(scheduler``, for messages.
        scheduler: The schedule.
        module: The module that it trains.

    Raises:
        ValueError: The schedule steps on validation results, or needs the length of a run that has no end.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            f"{where}=ReduceLROnPlateau): it steps on a validation result; use a schedule that depends on the step only"
        )
    if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
        steps = module.trainer.estimated_stepping_batches
        if steps == math.inf:
            refuse(scheduler, "total_steps", None, "the run has no end; set trainer.max_steps or trainer.max_epochs")
        scheduler.set_total_steps(int(steps))
    return scheduler
