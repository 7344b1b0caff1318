"""Predict returns from a frozen critic by least squares instead of training the critic."""

from array import array
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_behind, refuse_beside, require, require_model
from lit_ppo.callbacks.critic_warmup import CriticWarmup
from lit_ppo.callbacks.fields import extra, present
from lit_ppo.callbacks.rejection_sampling import RejectionSampling
from lit_ppo.callbacks.reward_whitening import RewardWhitening
from lit_ppo.callbacks.value_clipping import ValueClipping
from lit_ppo.callbacks.value_normalization import ValueNormalization
from lit_ppo.constructor import constructor
from lit_ppo.functional import (
    gae,
    longer_prefix_features,
    means_so_far,
    position_bins,
    prefix_features,
    ridge_weights,
)
from lit_ppo.validate import fraction, integer, positive

FOLDS = 4  # a response's values come from the weights of earlier updates and of the other folds
TOKENS = 16_384  # of which features exist at a time
NAMES = ("gram", "moments")  # X^T X and X^T y of the regression
LEAST_DEVIATION = 1e-6  # below it, a state does not change


class LeastSquaresCritic(PPOCallback):
    """Solves for values by ridge regression on what a frozen critic reads, and never trains the critic.

    Use it with ``LitPPO(critic="reward")``. A reward model knows from the first update what the score depends on; a
    regression with one solution needs fewer responses than gradient steps to turn that into predicted returns. Better
    values allow a small ``lam``, as ``GAE(lam=0.3)``: less noise in the advantages, for hardly any bias. Put it after
    callbacks that change rewards.

    Costs little: the rollout's forward of the critic gives its hidden states, too. Saves the critic's training: its
    forward, backward, gradients and optimizer state.

    The features of a prefix are the critic's value, the mean of its values since the prompt and the value of the
    prompt, each with a coefficient for each position, and its hidden states. The regression weighs all updates so far,
    recent ones most. No response helps to predict its own return, so advantages stay unbiased.

    Args:
        n_states: Numbers of each hidden state that are used: all, or random projections of wider states.
        ridge: Penalty of their weights, as so many tokens that say 0. Larger is safer with few responses.
        decay: Weight of the earlier updates at each update; 0.98 remembers about 50.

    Reads ``experience.rewards``, ``values``, ``group`` and ``extras["critic_states"]``; writes ``experience.values``.
    Sets ``pl_module.critic_frozen`` and ``n_critic_states``. ``value/explained_variance`` is that of the solved values.
    Source: this project, measured in ``docs/explanation/learning.md``; Hoerl and Kennard 1970,
    https://doi.org/10.1080/00401706.1970.10488634 (ridge regression); Chernozhukov et al. 2018, arXiv:1608.00060
    (predictions of a part from fits to the other parts).
    """

    reads = ("values", "rewards", "response_mask", "group")

    @constructor
    def __init__(self, n_states: int = 256, ridge: float = 300.0, decay: float = 0.98) -> None:
        self.n_states = integer(self, "n_states", n_states)
        self.ridge = positive(self, "ridge", ridge)
        self.decay = fraction(self, "decay", decay)
        self._sums: dict[str, Tensor] = {}  # of all updates; empty before the first
        self._longest = 1  # response, tokens
        self._raw: Tensor = torch.empty(0)  # the critic's values of this update, its folds, and their weights
        self._folds: list[Tensor] = []
        self._weights: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "critic_frozen", "n_critic_states")
        others = (LeastSquaresCritic, CriticWarmup, ValueClipping, ValueNormalization)
        refuse_beside(self, trainer, *others, why="the critic is not trained, and its values are solved for")
        refuse_beside(self, trainer, RejectionSampling, why="values solved from the returns of winners are too high")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RewardWhitening):
                refuse_behind(callback, trainer, LeastSquaresCritic, why="values are solved from the rewards so far")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        require_model(self, pl_module, "critic")
        pl_module.critic_frozen, pl_module.n_critic_states = True, self.n_states

    def restore(self, pl_module: Any) -> None:
        pl_module.critic_frozen, pl_module.n_critic_states = False, 0

    @torch.no_grad()
    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        values, mask = present(experience, "values"), experience.response_mask
        states = extra(self, experience, "critic_states")
        if states is None:
            return  # a second update of the same responses keeps the values of the first
        experience.extras["critic_states"] = None  # of no more use, and large
        gamma = getattr(getattr(pl_module, "advantages", None), "gamma", 1.0)
        returns = gae(experience.rewards, torch.zeros_like(values), mask, gamma, lam=1.0)[1]
        self._raw, self._folds, self._weights = values, [], []
        if not (returns.isfinite().all() and values.isfinite().all()):
            return  # the steps of this update will be skipped; the sums must not keep such numbers
        folds = [(experience.group % FOLDS == fold).nonzero().squeeze(1) for fold in range(FOLDS)]
        with torch.autocast(values.device.type, enabled=False):  # sums of bfloat16 products would not do
            solved = self._solve(values, states, returns, mask, folds)
        experience.values = solved.masked_fill(~mask, 0.0)

    def _solve(self, values: Tensor, states: Tensor, returns: Tensor, mask: Tensor, folds: list[Tensor]) -> Tensor:
        """Values of all rows, each fold's from all others; remembers the sums."""
        self._begin(states[mask], mask.shape[1])
        self._folds = folds
        positions = torch.arange(mask.shape[1], device=values.device).expand_as(mask)
        means = means_so_far(values)

        def features(rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            for some in rows.split(max(1, TOKENS // mask.shape[1])):
                yield some, self._features(some, values[some], means[some], states[some], positions[some])

        sums = [self._sums_of(features(rows), returns, mask) for rows in folds]
        gram, moments = (sum((parts[i] for parts in sums), self._sums[name]) for i, name in enumerate(NAMES))
        solved = torch.zeros_like(values)
        for rows, (own_gram, own_moments) in zip(folds, sums, strict=True):
            weights = ridge_weights(gram - own_gram, moments - own_moments, self._penalties(len(moments)))
            self._weights.append(weights)
            for some, x in features(rows):
                solved[some] = (x @ weights.to(x)).to(solved)
        self._sums |= {"gram": self.decay * gram, "moments": self.decay * moments}
        return solved

    @torch.no_grad()
    def values_after(self, values: Tensor, states: Tensor) -> Tensor:
        """Values of prefixes that end with other tokens than this update's responses have there.

        Args:
            values: The frozen critic's after the other tokens.
            states: Its states there.

        Shapes:
            (B, T, n), (B, T, n, D) -> (B, T, n); as at the place before where there is no place behind the token.
        """
        t = torch.arange(values.shape[1], device=values.device)
        sums = (self._raw.cumsum(1) - self._raw[:, :1]).unsqueeze(-1)
        means = (sums + values) / (t + 1).unsqueeze(-1)
        positions = (t + 1).clamp(max=self._longest - 1).unsqueeze(-1).expand_as(values)
        found = torch.zeros_like(values)
        with torch.autocast(values.device.type, enabled=False):
            for rows, weights in zip(self._folds, self._weights, strict=True):
                for some in rows.split(max(1, TOKENS // values[0].numel())):
                    x = self._features(some, values[some], means[some], states[some], positions[some])
                    found[some] = (x @ weights.to(x)).to(found)
        return found

    def _features(self, rows: Tensor, values: Tensor, means: Tensor, states: Tensor, positions: Tensor) -> Tensor:
        """Features of prefixes of some rows; (b, T, ...) each."""
        mean, deviation = (self._sums[name].to(states) for name in ("mean", "deviation"))
        prompt = self._raw[rows, :1].view(-1, *[1] * (values.dim() - 1)).expand_as(values)
        return prefix_features(values, means, prompt, (states - mean) / deviation, positions, self._longest)

    def _begin(self, states: Tensor, n: int) -> None:
        """Standardise states by the first update's, from then on; make room for longer responses."""
        before, self._longest = self._longest, max(self._longest, n)
        if not self._sums:
            deviation = states.std(0, correction=0)
            deviation = torch.where(deviation > LEAST_DEVIATION, deviation, 1.0)
            self._sums = {"mean": states.mean(0).cpu().double(), "deviation": deviation.cpu().double()}
            self._sums |= {"gram": torch.zeros(0, 0).double(), "moments": torch.zeros(0).double()}
        n_features = 2 * states.shape[1] + 4 * (int(position_bins(self._longest)[-1]) + 1)
        more = n_features - len(self._sums["moments"])
        gram, moments = pad(self._sums["gram"], (0, more, 0, more)), pad(self._sums["moments"], (0, more))
        if self._longest > before:  # features count from the end of the longest response
            change = longer_prefix_features(n_features, states.shape[1], before, self._longest).double()
            gram, moments = change @ gram @ change.T, change @ moments
        self._sums |= {"gram": gram, "moments": moments}

    def _sums_of(
        self, features: Iterator[tuple[Tensor, Tensor]], returns: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of some rows."""
        gram, moments = (torch.zeros_like(self._sums[name]) for name in NAMES)
        for rows, x in features:
            x, y = x[mask[rows]], returns[rows][mask[rows]].to(x)
            gram += (x.T @ x).cpu()
            moments += (x.T @ y).cpu()
        return gram, moments

    def _penalties(self, n_features: int) -> Tensor:
        """``ridge`` for states; one token for what depends on the position, of which there are few numbers."""
        penalties = torch.ones(n_features, dtype=torch.float64)
        penalties[: 2 * len(self._sums["mean"])] = self.ridge
        return penalties

    @property
    def longest(self) -> int:
        """Tokens of the longest response so far."""
        return self._longest

    def state_dict(self) -> dict[str, Any]:
        """Sums as bytes: lists of a million numbers would be slow to save."""
        sums = {name: x.double().numpy().tobytes() for name, x in self._sums.items()}
        return {"sums": sums, "longest": self._longest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        sums = {name: torch.tensor(array("d", x), dtype=torch.float64) for name, x in state_dict["sums"].items()}
        self._sums, self._longest = sums, state_dict["longest"]
        if sums:
            self._sums["gram"] = sums["gram"].view(len(sums["moments"]), -1)
