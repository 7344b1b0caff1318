"""What any policy could gain over the reference at a KL, from many samples of the reference: pure functions of arrays.

Dimension letters: P prompts, N samples of the reference per prompt.
"""

from math import comb, log
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Curve(NamedTuple):
    """Points of increasing KL.

    Args:
        kl: KL to the reference, nats per response.
        gain: Mean score less that of the reference.
        ess: Samples per prompt that carry the weight: of N with equal weights, of 1 if one sample has it all.
    """

    kl: Array
    gain: Array
    ess: Array

    def at(self, kl: float) -> float:
        """The gain at a KL, between points linear. Beyond the last point: that of the last."""
        return float(np.interp(kl, [0.0, *self.kl], [0.0, *self.gain]))


def best_of_n(scores: Array, n: int, values: Array | None = None) -> tuple[float, float]:
    r"""KL and gain of taking the best of ``n`` samples, averaged over all subsets of ``n`` of the N.

    .. math:: KL = \log n - (n - 1) / n

    The i-th smallest of N is the best of :math:`\binom{i - 1}{n - 1}` of the :math:`\binom{N}{n}` subsets.

    Args:
        scores: (P, N), which choose.
        n: Samples to choose from.
        values: (P, N), whose gain is asked for; by default the scores.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3 (the KL).

    >>> best_of_n(np.array([[0.0, 3.0, 6.0]]), 2)  # 3, 6 and 6 less the mean of 3
    (0.1931471805599453, 2.0)
    """
    total = scores.shape[1]
    order = np.argsort(scores, axis=1)
    ranked = np.take_along_axis(scores if values is None else values, order, axis=1)
    weights = np.array([comb(i, n - 1) / comb(total, n) for i in range(total)])
    return log(n) - (n - 1) / n, float((ranked @ weights - ranked.mean(1)).mean())


def tilted(scores: Array, betas: Array, values: Array | None = None) -> Curve:
    r"""The limit: no policy gains more at its KL than the reference tilted by :math:`e^{score / \beta}`.

    .. math:: w_i = \mathrm{softmax}_i(s_i / \beta), \quad gain = \sum_i w_i s_i - \bar s, \quad
        KL = \log N + \sum_i w_i \log w_i

    Both are averaged over prompts at one :math:`\beta`, which is how the best policy divides its KL among prompts.
    Where few samples carry the weight, the estimate is too low: N samples cannot show more than log N nats.

    Args:
        scores: (P, N), which tilt.
        betas: Decreasing, so that the KL increases.
        values: (P, N), whose gain is asked for; by default the scores.
    """
    values = scores if values is None else values
    points = []
    for beta in betas:
        logits = scores / beta
        logs = logits - logits.max(1, keepdims=True)
        logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
        weights = np.exp(logs)
        kl = np.log(scores.shape[1]) + (weights * logs).sum(1)
        gain = (weights * values).sum(1) - values.mean(1)
        points.append((kl.mean(), gain.mean(), (1 / (weights**2).sum(1)).mean()))
    return Curve(*np.array(points).T)


BETAS = np.geomspace(20.0, 0.05, 120)


def band(scores: Array, kls: Array, draws: int = 200, seed: int = 0) -> Array:
    """The gain of the limit at some KLs, 5% and 95% of bootstrap draws of prompts; (2, K)."""
    random = np.random.default_rng(seed)
    gains = []
    for _ in range(draws):
        curve = tilted(scores[random.integers(len(scores), size=len(scores))], BETAS[::3])
        gains.append([curve.at(kl) for kl in kls])
    return np.quantile(np.array(gains), [0.05, 0.95], axis=0)
