"""Go on learning from text while PPO learns from scores."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule, batch_of, make_ready
from lit_ppo.callbacks.checks import loader_over_rows, refuse_beside, require
from lit_ppo.validate import positive


class PTXLoss(PPOCallback):
    """Adds ``coef`` times the next-token loss on a batch of text to the actor's loss in every optimizer step.

    Use it when PPO unlearns what the model could do before: with pretraining text it keeps its general abilities,
    with the text of the cold start its form. It rests while the actor is frozen, and no text is used up then. Costs
    a forward and backward of the actor on a text batch for each optimizer step; memory is that of PPO's own
    micro-batches where texts are as long. Log-probs are of temperature 1.

    The order of the texts is the callback's own, since every rank needs the same batch: ``train_dataloader()`` must
    be a ``DataLoader`` over a data set with a length, and its data set, batch size and collation are used, by epochs
    without end. Where the loader shuffles, each epoch is a new permutation from ``data.seed`` (else the module's) and
    the epoch's number; where it does not, rows come as they are. A resumed run goes on with the next batch.

    Args:
        data: The text, a ``TextDataModule`` or another LightningDataModule with batches that the module's
            ``backward_on_text`` takes. Without a tokenizer of its own it uses the module's. Its ``batch_size`` is that
            of an optimizer step, over all ranks.
        coef: Weight of the loss, which is a mean over the batch's tokens. 27.8 in InstructGPT; in others' experience
            useful ones are below 1. ``ptx/grad_norm_share`` tells: near 1 the text alone steers the actor.

    Calls ``pl_module.backward_on_text``, which adds ``coef`` times the text's gradient to the actor's. Logs
    ``ptx/loss`` (without ``coef``), ``ptx/grad_norm`` (with it) and ``ptx/grad_norm_share``: the latter over
    ``metrics["actor_grad_norm"]``, the norm of the actor's whole gradient; above 1 where the two pull apart.
    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5 (PPO-ptx).
    """

    def __init__(self, data: L.LightningDataModule, coef: float) -> None:
        if not isinstance(data, L.LightningDataModule):
            raise ValueError(f"PTXLoss(data={data!r}): must be a LightningDataModule, such as a TextDataModule")
        self.data = data
        self.coef = positive(self, "coef", coef)
        self._drawn = 0  # batches, in all epochs
        self._loader: DataLoader[Any] | None = None
        self._seed = 0
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0))  # of which epoch
        self._step: tuple[float, float] | None = None  # loss and gradient norm, None where the actor rests

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module that cannot learn from text and a second one of these, and read the text."""
        require(self, pl_module, "backward_on_text")
        refuse_beside(self, trainer, PTXLoss, why="both add text to the actor's loss")
        if stage != "fit":
            return
        make_ready(self.data, trainer)
        self._loader = loader_over_rows(self, self.data, "train_dataloader")
        seeds = [getattr(owner, "seed", None) for owner in (self.data, pl_module)]
        self._seed = next((seed for seed in seeds if isinstance(seed, int)), 0)
        self._permutation = (-1, torch.empty(0))  # of another run

    def on_minibatch_start(self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike) -> None:
        """Back-propagate the next text batch, once an optimizer step."""
        self._step = None
        if not getattr(pl_module, "actor_frozen", False):
            self._step = pl_module.backward_on_text(self._next_batch(), self.coef)

    def _next_batch(self) -> Any:
        loader = self._loader
        assert loader is not None
        dataset: Any = loader.dataset
        size = loader.batch_size or 1  # None: the data set's rows are batches
        epoch, batch = divmod(self._drawn, -(-len(dataset) // size))
        self._drawn += 1
        return batch_of(loader, self._order(epoch)[batch * size : (batch + 1) * size].tolist())

    def _order(self, epoch: int) -> Tensor:
        assert self._loader is not None
        if self._permutation[0] != epoch:
            n, generator = len(self._loader.dataset), torch.Generator().manual_seed(self._seed + epoch)  # type: ignore[arg-type]
            shuffles = not isinstance(self._loader.sampler, SequentialSampler)
            self._permutation = epoch, torch.randperm(n, generator=generator) if shuffles else torch.arange(n)
        return self._permutation[1]

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        """Report the text's loss and its part of the gradient."""
        if self._step is None:
            return
        metrics["ptx/loss"], metrics["ptx/grad_norm"] = self._step
        whole = metrics.get("actor_grad_norm")
        if whole:
            metrics["ptx/grad_norm_share"] = metrics["ptx/grad_norm"] / whole

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Let go of the trainer."""
        if stage == "fit":
            self.data.teardown(stage)
            self.data.trainer = self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Batches drawn, and what the data module itself keeps."""
        return {"drawn": self._drawn, "data": self.data.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind them."""
        self._drawn = state_dict["drawn"]
        if state_dict["data"]:
            self.data.load_state_dict(state_dict["data"])
