"""Train on text and scores at the same time."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import loader_over_rows, refuse_beside, require, require_data_module
from lit_ppo.callbacks.trainer import batch_of, make_ready
from lit_ppo.constructor import constructor
from lit_ppo.validate import positive


class PTXLoss(PPOCallback):
    """Adds ``coef`` times the next-token loss on a batch of text to the actor's loss in every optimizer step.

    Use it when PPO unlearns abilities of the model: pretraining text keeps its general abilities, the text of
    supervised fine-tuning (SFT) keeps its style. It pauses while the actor is frozen and then uses no text. Costs a
    forward and backward of the actor on a text batch per optimizer step; it needs no more memory than PPO's own
    micro-batches if texts are as long. Log-probs are at temperature 1.

    The callback chooses the order of the texts, since every rank needs the same batch. ``train_dataloader()`` must
    return a ``DataLoader`` over a map-style dataset; its data set, batch size and collation are used.
    If the loader shuffles, each epoch is a permutation that depends on ``data.seed`` (or the module's seed) and the
    number of the epoch; if not, rows keep their order. A resumed run continues with the next batch.

    Args:
        data: The text, a ``TextDataModule`` or another LightningDataModule whose batches the module's
            ``backward_on_text`` accepts. Without its own tokenizer it uses the module's. Its ``batch_size`` is that
            of an optimizer step, over all ranks.
        coef: Weight of the loss, which is a mean over the tokens of the batch. InstructGPT used 27.8; others report
            useful values below 1. See ``ptx/grad_norm_share``: near 1, the text dominates the actor's gradient.

    Calls ``pl_module.backward_on_text``, which adds ``coef`` times the gradient on text to the actor's. Logs
    ``ptx/loss`` (without ``coef``), ``ptx/grad_norm`` (with ``coef``) and ``ptx/grad_norm_share``: its ratio to
    ``metrics["actor_grad_norm"]``, the norm of the actor's total gradient; above 1 if the two point in opposite
    directions.
    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5 (PPO-ptx).
    """

    @constructor
    def __init__(self, data: L.LightningDataModule, coef: float) -> None:
        self.data = require_data_module(self, data)
        self.coef = positive(self, "coef", coef)
        self._drawn = 0  # batches over all epochs
        self._loader: DataLoader[Any] | None = None
        self._seed = 0
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0))  # epoch and its order
        self._step: tuple[float, float] | None = None  # loss and gradient norm; None while the actor is frozen

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "backward_on_text")
        refuse_beside(self, trainer, PTXLoss, why="both add text to the actor's loss")
        if stage != "fit":
            return
        make_ready(self.data, trainer)
        self._loader = loader_over_rows(self, self.data, "train_dataloader")
        seeds = [getattr(owner, "seed", None) for owner in (self.data, pl_module)]
        self._seed = next((seed for seed in seeds if isinstance(seed, int)), 0)
        self._permutation = (-1, torch.empty(0))  # drop that of another run

    def on_minibatch_start(self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike) -> None:
        self._step = None
        if not getattr(pl_module, "actor_frozen", False):
            self._step = pl_module.backward_on_text(self._next_batch(), self.coef)

    def _next_batch(self) -> Any:
        loader = self._loader
        assert loader is not None
        dataset: Any = loader.dataset
        size = loader.batch_size or 1  # None: the rows of the data set are batches
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
        if self._step is None:
            return
        metrics["ptx/loss"], metrics["ptx/grad_norm"] = self._step
        total = metrics.get("actor_grad_norm")
        if total:
            metrics["ptx/grad_norm_share"] = metrics["ptx/grad_norm"] / total

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.data.teardown(stage)
            self.data.trainer = self._loader = None

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "data": self.data.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn = state_dict["drawn"]
        if state_dict["data"]:
            self.data.load_state_dict(state_dict["data"])
