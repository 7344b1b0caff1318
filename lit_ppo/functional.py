"""The mathematics of PPO for language models: pure functions of tensors, no state.

Dimension letters: B batch, P prompt, T response, V vocabulary, N tokens, H hidden. Log-probabilities,
entropies and KL are in nats. Masks are boolean, True where a response token is.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax, pad

from lit_ppo.device import UNIT_ROWS, bf16_products, exact_device, is_cpu, rounds_to_bf16, sums_in_float32

KLEstimator = Literal["k1", "k2", "k3"]
BLOCK = 128
"""Tokens of the vocabulary that are summed together; it divides the size of most large ones."""
FEW_ROWS = 4
"""Of fewer, a CPU multiplies rounded numbers faster without its bf16 units."""
POSITION_BINS = 96
"""Bins of :func:`position_bins`, enough for 16,384 tokens."""
ClipRange = float | Sequence[float]  # of both sides, or below and above 1


def for_products(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Prepare a weight for several calls of :func:`float32_linear`, which then copy none of it.

    Args:
        weight: Of a linear layer.
        dtype: To which products round it.

    Returns:
        It in this dtype if the device sums products of such numbers in float32, or else in float32, which holds the
        rounded numbers too. Float32 weights are returned as they are if the device rounds them to multiply them, as
        a CPU with AMX does.

    Shapes:
        (V, H) -> (V, H).

    >>> for_products(torch.ones(2, 3, dtype=torch.bfloat16), torch.float32).dtype
    torch.float32
    """
    if weight.dtype == torch.float32 and _rounded_by_device(weight, dtype):
        return weight
    return rounded(weight, dtype)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`for_products`, but always rounded: a copy where the device would do it, for products of few rows."""
    if dtype.itemsize >= 4 or sums_in_float32(weight.device.type):
        return weight.to(dtype)
    return weight.to(dtype).float()


def _rounded_by_device(weight: Tensor, dtype: torch.dtype) -> bool:
    kind = weight.device.type
    return dtype == torch.bfloat16 and not sums_in_float32(kind) and rounds_to_bf16(kind, *weight.shape)


def float32_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, is_rounded: bool = False
) -> Tensor:
    """A linear layer's output, summed in float32 also where products of 16-bit numbers would be in 16 bits.

    Without gradients.

    Args:
        x: Inputs.
        weight: As :func:`for_products` returns it.
        bias: Of any dtype.
        dtype: To which products round inputs, weight and bias.
        is_rounded: The weight is as :func:`rounded` returns it.

    Shapes:
        x (N, H), weight (V, H), bias (V,) -> (N, V), float32 (float64 stays).

    >>> ones = torch.ones(1, 257)  # bfloat16 has no 257
    >>> float32_linear(ones, ones, None, torch.bfloat16)
    tensor([[257.]])
    """
    kind, n = x.device.type, len(x)
    if bias is not None:
        bias = bias.to(dtype).to(torch.promote_types(dtype, torch.float32))
    with torch.autocast(kind, enabled=False):  # a backward runs in the autocast of its caller
        if dtype.itemsize >= 4:
            return linear(x.to(dtype), weight, bias)
        if weight.dtype == dtype:
            output: Tensor = torch.mm(x.to(dtype), weight.T, out_dtype=torch.float32)
            return output if bias is None else output.add_(bias)
        x = x.to(dtype).float()
        if not is_rounded and n < UNIT_ROWS and _rounded_by_device(weight, dtype):
            x = with_rows(x, UNIT_ROWS)
        with bf16_products(kind, on=dtype == torch.bfloat16 and len(x) >= FEW_ROWS):
            return linear(x, weight, bias)[:n]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, which is not waited for; one that is there already stays.

    >>> to_device(torch.tensor([1.0]), torch.device("cpu"))
    tensor([1.])
    """
    if x.device == device:
        return x
    return (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x).to(device, non_blocking=True)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``x`` where ``mask`` is True; what lies outside, NaN included, never leaks in.

    Args:
        x: Values.
        mask: Boolean, same shape as ``x``.
        dim: Dimension to reduce, all by default. A slice without a True gives 0.

    >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    kept = x.masked_fill(~mask, 0.0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of ``x`` where ``mask`` is True, over n - 1 (``unbiased``) or n values; a single value's is 0.

    >>> masked_var(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    deviation = (x - masked_mean(x, mask)).masked_fill(~mask, 0.0)
    return deviation.square().sum() / (mask.sum() - int(unbiased)).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    r"""Shift and scale to zero mean and unit variance over the mask; 0 outside it.

    .. math:: (x - \mu) / \sqrt{\sigma^2 + 10^{-8}}
    """
    whitened = (x - masked_mean(x, mask)) * torch.rsqrt(masked_var(x, mask, unbiased) + 1e-8)
    return whitened.masked_fill(~mask, 0.0)


def scale(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Scale to unit variance over the mask and keep the mean; 0 outside it.

    Source: Ziegler et al. 2019, arXiv:1909.08593 (reward whitening in its code keeps the mean).
    """
    return (whiten(x, mask, unbiased) + masked_mean(x, mask)).masked_fill(~mask, 0.0)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Log-probability of each token under the tempered distribution.

    .. math:: \log \pi(a_t | s_t) = z_{a_t} / \tau - \log \sum_v \exp(z_v / \tau)

    Args:
        logits: ``z``; entry t is the prediction *of* token t.
        ids: Token ids.
        temperature: ``tau``.

    Shapes:
        logits (B, T, V), ids (B, T) -> (B, T), float32 (float64 stays).
    """
    logprobs = log_softmax(_at_least_float32(logits) / temperature, dim=-1)
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def inverse_cdf(logits: Tensor, draws: Tensor) -> Tensor:
    r"""The token at which the cumulative probability exceeds the draw.

    .. math:: a = \min \{v : \sum_{w \le v} p_w > u \sum_w p_w\}

    Sums are in float64: float32 has too few numbers below 1, so that some tokens of a large vocabulary would never be
    drawn. A large vocabulary is summed by blocks first, which reads it once and writes little.

    Args:
        logits: Of the next token.
        draws: Uniform float64 in [0, 1), on a device that computes in float64; see :func:`exact_device`.

    Shapes:
        logits (B, V), draws (B,) -> (B,), or (B, K) -> (B, K), on the device of the logits.

    >>> logits = torch.tensor([[0.25, 0.0, 0.75]]).log().expand(3, 3)
    >>> inverse_cdf(logits, torch.tensor([0.0, 0.25, 0.99], dtype=torch.float64))
    tensor([0, 2, 2])
    """
    return choose(torch.softmax(logits, dim=-1), draws)


def choose(weights: Tensor, draws: Tensor) -> Tensor:
    r"""The token at which the cumulative weight exceeds the draw's share of the total, see :func:`inverse_cdf`.

    Args:
        weights: Of each token, not negative.
        draws: Uniform float64 in [0, 1), on a device that computes in float64; see :func:`exact_device`.

    Shapes:
        weights (B, V), draws (B,) -> (B,), or (B, K) -> (B, K), on the device of the weights.

    >>> choose(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[0.0, 0.25, 0.99]], dtype=torch.float64))
    tensor([[0, 2, 2]])
    """
    found, each = weights.to(draws.device), draws.reshape(len(weights), -1)
    if found.shape[1] <= BLOCK:
        sums = found.cumsum(-1, dtype=draws.dtype)
        return _exceeding(sums, each * sums[:, -1:])[0].view_as(draws).to(weights.device)
    if rest_of_block := -found.shape[1] % BLOCK:
        found = pad(found, (0, rest_of_block))
    blocks = found.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=draws.dtype).cumsum(-1)
    block, rest = _exceeding(sums, each * sums[:, -1:])
    rows = torch.arange(len(block), device=block.device).unsqueeze(1)
    inside = blocks[rows, block].cumsum(-1, dtype=draws.dtype)
    place = _exceeding(inside.flatten(0, 1), rest.reshape(-1, 1))[0].view_as(block)
    return (BLOCK * block + place).view_as(draws).to(weights.device)


def _exceeding(sums: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """The first sum above each part, and by how much the part exceeds the sum before it; (B, S), (B, K) -> (B, K)."""
    last = sums[:, -1:]
    parts = torch.minimum(parts, last.nextafter(torch.zeros_like(last)))  # rounding must not end behind all tokens
    position = torch.searchsorted(sums, parts, right=True)
    before = torch.where(position > 0, sums.gather(1, (position - 1).clamp(min=0)), 0.0)
    return position, parts - before


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the tempered distribution, nats.

    Shapes:
        logits (B, T, V) -> (B, T), float32 (float64 stays).

    >>> entropy(torch.zeros(1, 1, 8))  # log 8
    tensor([[2.0794]])
    """
    logprobs = log_softmax(_at_least_float32(logits) / temperature, dim=-1)
    # exp(-inf) * -inf is NaN: a token that cannot occur adds nothing
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)


def softmax_weights(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    r"""What softmax divides, in few passes over the logits, which are overwritten.

    .. math:: s_v = (z_v - \max z) / \tau, \quad w_v = e^{s_v}, \quad W = \sum_v w_v, \quad \log p_v = s_v - \log W

    Args:
        logits: ``z``, at least float32.
        temperature: ``tau``.

    Returns:
        ``s``, in place of the logits and finite, as -inf times 0 would be NaN; ``w``; and ``W``.

    Shapes:
        (N, V) -> (N, V), (N, V), (N,).

    >>> softmax_weights(torch.tensor([[5.0, 5.0, -torch.inf]]))[1:]
    (tensor([[1., 1., 0.]]), tensor([2.]))
    """
    logits -= logits.amax(-1, keepdim=True)
    if temperature != 1.0:
        logits /= temperature
    weights = logits.clamp_(min=torch.finfo(logits.dtype).min).exp()
    return logits, weights, weights.sum(-1)


def token_sums(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    r"""What a token's log-probability, the entropy and their gradients need of the logits, in two passes over them.

    .. math:: \log \pi(a), \quad \sum_v \pi_v \log \pi_v, \quad Z = \log \sum_v \exp(z_v / \tau)

    Written so that ``torch.compile`` makes one kernel of it, which stores no tensor of the logits' size.

    Args:
        logits: ``z``, at least float32.
        ids: Tokens ``a``.
        temperature: ``tau``.

    Shapes:
        logits (N, V), ids (N,) -> (N,), (N,), (N,).

    >>> token_sums(torch.zeros(1, 8), torch.tensor([0]))  # log 8
    (tensor([-2.0794]), tensor([-2.0794]), tensor([2.0794]))
    """
    scaled = logits / temperature
    greatest = scaled.amax(-1, keepdim=True)
    shifted = (scaled - greatest).clamp(min=torch.finfo(logits.dtype).min)  # -inf times 0 would be NaN
    weights = shifted.exp()
    total = weights.sum(-1)
    log_sum = greatest.squeeze(-1) + total.log()
    logprobs = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - log_sum
    return logprobs, (weights * shifted).sum(-1) / total - total.log(), log_sum


def token_sums_gradient(
    logits: Tensor,
    ids: Tensor,
    sums: tuple[Tensor, Tensor],
    d_logprobs: Tensor | None,
    d_negative_entropy: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    r"""Gradient of the logits, in one pass over them.

    With :math:`p = \exp(z / \tau - Z)` and :math:`D = \sum_v p_v \log p_v`:

    .. math::
        \partial \log p_a / \partial z_v = (1_{v = a} - p_v) / \tau, \quad
        \partial D / \partial z_v = p_v (\log p_v - D) / \tau

    Args:
        logits: See :func:`token_sums`.
        ids: See :func:`token_sums`.
        sums: ``D`` and ``Z``.
        d_logprobs: Gradient of the log-probabilities; None: 0.
        d_negative_entropy: Gradient of ``D``; None: 0.
        temperature: ``tau``.
        dtype: Of the result.

    Shapes:
        logits (N, V), all others (N,) -> (N, V).

    >>> one = torch.ones(1)
    >>> sums = token_sums(torch.zeros(1, 2), torch.tensor([0]))[1:]
    >>> token_sums_gradient(torch.zeros(1, 2), torch.tensor([0]), sums, one, None, 1.0, torch.float32)
    tensor([[ 0.5000, -0.5000]])
    """
    negative_entropy, log_sum = (x.unsqueeze(-1) for x in sums)
    log_p = (logits / temperature - log_sum).clamp(min=torch.finfo(logits.dtype).min)
    per_logit = torch.zeros_like(log_p)
    if d_negative_entropy is not None:
        per_logit = (log_p - negative_entropy) * d_negative_entropy.unsqueeze(-1)
    gradient = log_p.exp() * (per_logit if d_logprobs is None else per_logit - d_logprobs.unsqueeze(-1))
    if d_logprobs is not None:
        chosen = torch.arange(logits.shape[-1], device=ids.device) == ids.unsqueeze(-1)
        gradient = torch.where(chosen, gradient + d_logprobs.unsqueeze(-1), gradient)
    return (gradient / temperature).to(dtype)


def vocabulary_kl(logits: Tensor, ref_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Exact KL(pi || ref) of the tempered distributions, nats.

    .. math:: \sum_v \pi(v) (\log \pi(v) - \log \pi_{ref}(v))

    Shapes:
        (B, T, V), (B, T, V) -> (B, T), float32 (float64 stays).
    """
    logprobs = log_softmax(_at_least_float32(logits) / temperature, dim=-1)
    ref_logprobs = log_softmax(_at_least_float32(ref_logits) / temperature, dim=-1)
    difference = (logprobs - ref_logprobs).masked_fill(logprobs == -torch.inf, 0.0)
    return (logprobs.exp() * difference).sum(-1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLEstimator = "k1") -> Tensor:
    r"""Per-token estimate of KL(pi || ref) from samples of pi.

    .. math:: d = \log \pi - \log \pi_{ref}, \quad k_1 = d, \quad k_2 = d^2 / 2, \quad k_3 = e^{-d} - 1 + d

    k1 and k3 are unbiased, k3 has the lower variance and is never negative; k2 is biased and never negative.

    Source: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.

    Shapes:
        (B, T), (B, T) -> (B, T), nats.
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimate(kind={kind!r}): must be 'k1', 'k2' or 'k3'")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    r"""The KL penalty at every response token, the score on the last one.

    .. math:: r_t = -\beta\, KL_t + [t = \mathrm{last}]\, score

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.1; Stiennon et al. 2020, arXiv:2009.01325, section 3.4.

    Args:
        scores: One a response.
        kl: Per-token estimate, nats.
        mask: True at response tokens.
        kl_coef: ``beta``.

    Shapes:
        scores (B,), kl (B, T), mask (B, T) -> (B, T), 0 where masked.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    is_last = mask & (positions == (positions * mask).amax(1, keepdim=True))
    rewards = -kl_coef * kl + is_last * scores.unsqueeze(1)
    return rewards.masked_fill(~mask, 0.0)


def length_penalty(mask: Tensor, budget: int, coef: float, max_penalty: float | None = None) -> Tensor:
    r"""What a response's score loses for the tokens over a budget.

    .. math:: \min(c \cdot \max(|y| - L, 0), p_{max})

    DAPO's soft overlong punishment is ``-length_penalty(mask, L_max - L_cache, 1 / L_cache, 1.0)``.

    Source: Yu et al. 2025, arXiv:2503.14476, section 3.4, equation 13.

    Args:
        mask: True at response tokens; their number is the length, ``|y|``.
        budget: Tokens that are free, ``L``.
        coef: Score for each further token, ``c``.
        max_penalty: Bound, ``p_max``; None for no bound.

    Shapes:
        mask (B, T) -> (B,), float32, never negative.

    >>> mask = torch.arange(6) < torch.tensor([[2], [4], [6]])
    >>> length_penalty(mask, budget=3, coef=0.25, max_penalty=0.5)
    tensor([0.0000, 0.2500, 0.5000])
    """
    return (coef * (mask.sum(1) - budget).float()).clamp(0.0, max_penalty)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation over the tokens of each response.

    .. math::
        \delta_t = r_t + \gamma V_{t+1} - V_t, \quad
        \hat A_t = \sum_{l \ge 0} (\gamma \lambda)^l \delta_{t+l}, \quad R_t = \hat A_t + V_t

    The value after the last token is 0.

    Source: Schulman et al. 2015, arXiv:1506.02438, equation 16.

    Shapes:
        rewards, values, mask (B, T) -> advantages, returns (B, T), 0 where masked.

    >>> mask = torch.ones(1, 3, dtype=torch.bool)
    >>> gae(torch.tensor([[-0.1, -0.1, 4.9]]), torch.tensor([[2.0, 3.0, 4.0]]), mask)[0]
    tensor([[2.5673, 1.7550, 0.9000]])
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantage = next_value = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t], next_value = advantage, values[:, t]
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def group_relative_advantages(scores: Tensor, group: Tensor, mask: Tensor, scale: bool = True) -> Tensor:
    r"""GRPO's advantages: each score against those of its group, the same at every token of a response.

    .. math:: \hat A_{i,t} = (s_i - \mu_g) / \sqrt{\sigma_g^2 + 10^{-8}}

    The variance is the unbiased one. Scores that are all alike, or alone in their group, give 0. A response without
    tokens counts for nothing.

    Args:
        scores: One a response.
        group: Rows with the same number belong together, wherever they lie.
        mask: True at response tokens.
        scale: False leaves out the division.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; without ``scale`` Liu et al. 2025, arXiv:2503.20783.

    Shapes:
        scores, group (B,), mask (B, T) -> (B, T), 0 where masked.

    >>> scores, mask = torch.tensor([1.0, 3.0, 5.0, 2.0]), torch.ones(4, 1, dtype=torch.bool)
    >>> group_relative_advantages(scores, torch.tensor([0, 0, 0, 1]), mask)[:, 0]
    tensor([-1.,  0.,  1.,  0.])
    """
    mean, variance, _ = _group_moments(scores, group, mask)
    deviation = scores - mean
    advantages = deviation * torch.rsqrt(variance + 1e-8) if scale else deviation
    return mask * advantages.unsqueeze(1)


def leave_one_out_advantages(rewards: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    r"""RLOO's advantages: each response's return less the mean of the others', the same at each of its tokens.

    .. math:: R_i = \sum_t r_{i,t}, \quad \hat A_{i,t} = R_i - \frac{1}{n_g - 1} \sum_{j \in g,\, j \ne i} R_j

    A response that is alone in its group gets 0; one without tokens counts for nothing.

    Args:
        rewards: Per token.
        group: Rows with the same number belong together, wherever they lie.
        mask: True at response tokens.

    Source: Ahmadian et al. 2024, arXiv:2402.14740, section 2.3.

    Shapes:
        rewards, mask (B, T), group (B,) -> (B, T), 0 where masked.

    >>> rewards, mask = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 5.0]]), torch.ones(3, 2, dtype=torch.bool)
    >>> leave_one_out_advantages(rewards, torch.tensor([0, 0, 0]), mask)[:, 0]  # 1 - 4, 3 - 3, 5 - 2
    tensor([-3.,  0.,  3.])
    """
    returns = rewards.masked_fill(~mask, 0.0).sum(1)
    mean, _, size = _group_moments(returns, group, mask)
    advantages = (returns - mean) * size / (size - 1).clamp(min=1)
    return mask * advantages.unsqueeze(1)


def _group_moments(x: Tensor, group: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased variance and size of each row's group, (B,) each; rows without tokens are a group of their own."""
    apart = group.masked_fill(~mask.any(1), -1)
    numbers, place, size = apart.unique(return_inverse=True, return_counts=True)
    members = numbers.unsqueeze(1) == apart  # (groups, B)
    one = x[members.int().argmax(1)]  # of each group; by differences from it, rows that are alike vary by 0 exactly
    mean = one + masked_mean((x - one[place]).expand_as(members), members, dim=1)
    squares = (x - mean[place]).square()
    variance = masked_mean(squares.expand_as(members), members, dim=1) * size / (size - 1).clamp(min=1)
    return mean[place], variance[place], size[place]


def reinforce_advantages(rewards: Tensor, mask: Tensor, group: Tensor | None = None) -> Tensor:
    r"""REINFORCE++'s advantages: rewards to go, whitened over all response tokens of the batch.

    .. math:: G_{i,t} = \sum_{u \ge t} r_{i,u} = s_i - \beta \sum_{u \ge t} KL_{i,u}, \quad
        \hat A_{i,t} = (G_{i,t} - \mu_G) / \sqrt{\sigma_G^2 + 10^{-8}}

    With groups, the mean return of its group is first subtracted from each response's G: of :math:`G_{j,1}` over the
    responses j to its prompt. Without a KL in the rewards this is the mean score of the prompt.

    Args:
        rewards: Per token.
        mask: True at response tokens.
        group: (B,), rows with the same number belong together; None: no baseline but the batch's mean.

    Source: Hu et al. 2025, arXiv:2501.03262, section 3 (with groups: REINFORCE++-baseline).

    Shapes:
        rewards, mask (B, T) -> (B, T), 0 where masked.

    >>> rewards, mask = torch.tensor([[-1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> reinforce_advantages(rewards, mask)  # of 1, 2 and 3
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """
    to_go = rewards.masked_fill(~mask, 0.0).flip(1).cumsum(1).flip(1)
    if group is not None:
        mean, _, _ = _group_moments(to_go[:, 0], group, mask)
        to_go = to_go - mean.unsqueeze(1)
    return whiten(to_go, mask)


def clip_bounds(clip_range: ClipRange | None) -> tuple[float, float]:
    r"""The ratios between which a token gets a gradient whatever its advantage.

    .. math:: 1 - \epsilon_{low}, \quad 1 + \epsilon_{high}

    Args:
        clip_range: Epsilon; two numbers for below and above 1; None: no clipping.

    Source: Yu et al. 2025, arXiv:2503.14476, section 3.1 (two numbers, 0.2 and 0.28).

    >>> clip_bounds([0.25, 0.5])
    (0.75, 1.5)
    """
    if clip_range is None:
        return -math.inf, math.inf
    low, high = (clip_range, clip_range) if isinstance(clip_range, int | float) else clip_range
    return 1 - low, 1 + high


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: ClipRange | None = 0.2
) -> Tensor:
    r"""PPO's clipped surrogate, negated, per token; no reduction.

    .. math::
        -\min(\rho A, \mathrm{clip}(\rho, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A), \quad \rho = \pi / \pi_{old}

    Args:
        logprobs: Of the policy that learns.
        old_logprobs: Of the policy that sampled.
        advantages: A.
        clip_range: See :func:`clip_bounds`.

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7; without ``clip_range`` equation 6.

    Shapes:
        (B, T) each -> (B, T).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    if clip_range is None:
        return -ratio * advantages
    return -torch.minimum(ratio * advantages, ratio.clamp(*clip_bounds(clip_range)) * advantages)


def dual_clip_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: ClipRange | None = 0.2, c: float = 3.0
) -> Tensor:
    r"""PPO's clipped surrogate with a second bound where the advantage is negative; negated, per token.

    .. math::
        A < 0: \ -\max(\min(\rho A, \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A), c A), \quad
        \rho = \pi / \pi_{old}

    Elsewhere it is :func:`policy_loss`. A token whose ratio is over ``c`` gets no gradient: its loss is ``-c A``.

    Args:
        logprobs: Of the policy that learns.
        old_logprobs: Of the policy that sampled.
        advantages: A.
        clip_range: See :func:`clip_bounds`; None leaves only the second bound.
        c: Ratio at which the second bound begins, over 1.

    Source: Ye et al. 2020, arXiv:1912.09729, its section on dual-clip PPO.

    Shapes:
        (B, T) each -> (B, T).

    >>> dual_clip_policy_loss(torch.tensor([5.0, 5.0]).log(), torch.zeros(2), torch.tensor([-1.0, 1.0]))
    tensor([ 3.0000, -1.2000])
    """
    loss = policy_loss(logprobs, old_logprobs, advantages, clip_range)
    return torch.where(advantages < 0, torch.minimum(loss, -c * advantages), loss)


def importance_weights(
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    mask: Tensor,
    cap: float = 2.0,
    level: Literal["token", "sequence"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
) -> Tensor:
    r"""Weights that correct for samples which another program drew, per token; 1 where masked.

    .. math::
        w = \min(\pi_{old} / \pi_{sampler}, c) \ \text{(truncate)}, \quad
        w = \pi_{old} / \pi_{sampler} \text{ if at most } c, \text{ else } 0 \ \text{(mask)}

    Args:
        logprobs: Of the policy that is trained, before the update.
        sampling_logprobs: Of the program that sampled, for the same tokens.
        mask: True at response tokens.
        cap: c.
        level: ``"token"``: the ratio of each token; ``"sequence"``: of the full response, the same for all its tokens.
        mode: What happens to a ratio over the cap.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training",
    https://fengyao.notion.site/off-policy-rl (token, truncate); Liu et al. 2025, "When speed kills stability",
    https://richardli.xyz/rl-collapse (sequence, mask). TRL's ``vllm_importance_sampling_mode`` has the same four.

    Shapes:
        (B, T) each -> (B, T).

    >>> old, sampler = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0.25, 0.1]]).log()
    >>> importance_weights(old, sampler, torch.tensor([[True, True]]), cap=2.5)
    tensor([[2.0000, 2.5000]])
    """
    log_ratio = torch.where(mask, logprobs - sampling_logprobs, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.exp()
    weights = ratio.clamp(max=cap) if mode == "truncate" else torch.where(ratio <= cap, ratio, 0.0)
    return torch.where(mask, weights, 1.0)


def effective_sample_fraction(weights: Tensor, mask: Tensor) -> Tensor:
    r"""Fraction of the samples that count after weighting: 1 where all weights are equal.

    .. math:: \bar{w}^2 / \overline{w^2}

    Args:
        weights: Importance weights, not capped.
        mask: True at response tokens.

    Source: Kish 1965, "Survey sampling".

    Shapes:
        (B, T) each -> scalar.

    >>> effective_sample_fraction(torch.tensor([[2.0, 0.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor(0.5000)
    """
    return masked_mean(weights, mask) ** 2 / masked_mean(weights**2, mask)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Half the squared error, per token; no reduction.

    Shapes:
        (B, T), (B, T) -> (B, T).
    """
    return 0.5 * (values - returns).square()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    r"""The larger of the plain squared error and that of the value clipped to near its old self; halved, per token.

    .. math:: \tfrac12 \max((V - R)^2, (\mathrm{clip}(V, V_{old} \pm \epsilon) - R)^2)

    Source: Schulman et al. 2017's code (baselines ``ppo2``); Ziegler et al. 2019, arXiv:1909.08593, its code.

    Shapes:
        (B, T) each -> (B, T).
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum(value_loss(values, returns), value_loss(clipped, returns))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    r"""Share of the returns' variance that the values account for: 1 is perfect, 0 a constant's, below 0 worse.

    .. math:: 1 - \mathrm{Var}(R - V) / \mathrm{Var}(R)

    Shapes:
        (B, T) each -> scalar; not finite where the returns are all alike.
    """
    return 1.0 - masked_var(returns - values, mask, unbiased=False) / masked_var(returns, mask, unbiased=False)


@cache
def _directions(n_numbers: int, n_states: int) -> Tensor:
    """Random directions, always the same, (H, D)."""
    random = torch.Generator().manual_seed(0)
    directions: Tensor = torch.randn(n_numbers, n_states, generator=random) / n_numbers**0.5
    return directions


def random_projection(states: Tensor, n_states: int) -> Tensor:
    r"""Fewer numbers that keep what a linear function can read of states: :math:`h R`, with normal R / sqrt(H).

    Args:
        states: Numbers H of each state.
        n_states: D; where H is not larger, the states are returned as they are.

    Source: Johnson and Lindenstrauss 1984 (distances between projections are about those between states).

    Shapes:
        (N, H) -> (N, min(D, H)).

    >>> states = torch.randn(3, 8)
    >>> random_projection(states, 2).shape, random_projection(states, 8) is states
    (torch.Size([3, 2]), True)
    """
    if states.shape[-1] <= n_states:
        return states
    projected: Tensor = states @ _directions(states.shape[-1], n_states).to(states)
    return projected


def position_bins(n: int) -> Tensor:
    """Bins of the first n positions: one each up to 16, then eight for each doubling; at most ``POSITION_BINS``.

    Shapes:
        -> (n,), int.

    >>> position_bins(20).tolist()[14:]
    [14, 15, 16, 16, 17, 17]
    >>> position_bins(64)[[31, 32, 35, 36, 63]].tolist()
    [23, 24, 24, 25, 31]
    """
    positions = torch.arange(n)
    doublings = (positions.clamp(min=16).double().log2() - 4).floor().long()
    within = (positions - 16 * 2**doublings) // 2 ** (doublings + 1)
    return torch.where(positions < 16, positions, 16 + 8 * doublings + within).clamp(max=POSITION_BINS - 1)


def means_so_far(values: Tensor) -> Tensor:
    r"""The mean of a response's values since the prompt's, at each token.

    .. math:: \bar V_t = \frac{1}{t} \sum_{u=1}^t V_u, \quad \bar V_0 = 0

    Shapes:
        (B, T) -> (B, T).

    >>> means_so_far(torch.tensor([[2.0, 4.0, 8.0]]))
    tensor([[0., 4., 6.]])
    """
    return (values.cumsum(1) - values[:, :1]) / torch.arange(values.shape[1], device=values.device).clamp(min=1)


def prefix_features(
    values: Tensor, means: Tensor, prompt_values: Tensor, states: Tensor, positions: Tensor, longest: int
) -> Tensor:
    r"""What least squares predicts the return after a prefix of t response tokens from.

    .. math:: x = \big((1 - t / L)\, h, \; h, \; e_{b(t)} \otimes (1, V_t, \bar V_t, V_0)\big)

    with a one-hot vector e of the bin b(t) of the position. So a frozen critic's value, its mean since the prompt and
    the value of the prompt have coefficients for each bin. Its hidden states have coefficients that are linear in t.

    Args:
        values: A frozen critic's after the prefix.
        means: See :func:`means_so_far`.
        prompt_values: After the prompt alone.
        states: The critic's hidden states after the prefix, standardised, h.
        positions: Response tokens of the prefix, t, below L.
        longest: Tokens of the longest response, L.

    Shapes:
        (...) each, states (..., D) -> (..., 2 D + 4 bins), with the bins of L positions.

    >>> numbers = [torch.tensor(x) for x in (8.0, 6.0, 2.0, [1.0])]
    >>> prefix_features(*numbers, torch.tensor(2), longest=4)  # the third of four bins
    tensor([0.5000, 1.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000,
            0.0000, 1.0000, 8.0000, 6.0000, 2.0000, 0.0000, 0.0000, 0.0000, 0.0000])
    """
    bins = position_bins(longest).to(positions.device)
    numbers = torch.stack([torch.ones_like(values), values, means, prompt_values], dim=-1)
    own = bins[positions].unsqueeze(-1) == torch.arange(int(bins[-1]) + 1, device=positions.device)
    placed = own.unsqueeze(-1) * numbers.unsqueeze(-2)
    left = (1.0 - positions / longest).unsqueeze(-1)
    return torch.cat([states * left, states, placed.flatten(-2)], dim=-1)


def longer_prefix_features(n_features: int, n_states: int, longest: int, new_longest: int) -> Tensor:
    r"""The matrix that turns :func:`prefix_features` of responses of up to L tokens into those of up to L'.

    .. math:: \Big(1 - \frac{t}{L'}\Big) h = \frac{L}{L'} \Big(1 - \frac{t}{L}\Big) h + \Big(1 - \frac{L}{L'}\Big) h

    Args:
        n_features: For L', with its new bins.
        n_states: D, hidden states.
        longest: L.
        new_longest: L'.

    Shapes:
        -> (n_features, n_features).

    >>> change = longer_prefix_features(3, n_states=1, longest=4, new_longest=8)  # one state, and another feature
    >>> change @ torch.tensor([0.5 * 6.0, 6.0, 1.0])  # a state of 6 after 2 tokens of 4, which are 2 of 8
    tensor([4.5000, 6.0000, 1.0000])
    """
    change, states = torch.eye(n_features), torch.arange(n_states)
    change[states, states] = longest / new_longest
    change[states, n_states + states] = 1.0 - longest / new_longest
    return change


def counterfactual_advantages(
    values: Tensor,
    values_after: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    *,
    kl_coef: float,
    kind: KLEstimator = "k1",
    gamma: float = 1.0,
) -> Tensor:
    r"""Advantages of other tokens in place of those of a response, one step ahead.

    .. math:: A(s_t, a) = -\beta\, KL_a + \gamma V(s_t a) - V(s_t)

    Args:
        values: Of the prefixes, V(s).
        values_after: Of the prefixes with each other token behind them, V(s a).
        logprobs: Of the other tokens, by the policy.
        ref_logprobs: By the reference; None: no KL.
        kl_coef: Weight of the KL, beta.
        kind: Estimator of the KL.
        gamma: Discount per token.

    Shapes:
        values (B, T), the others (B, T, n) -> (B, T, n).

    >>> one = torch.ones(1, 1, 1)
    >>> counterfactual_advantages(torch.tensor([[2.0]]), 3.5 * one, -1.0 * one, -3.0 * one, kl_coef=0.25)  # KL 2
    tensor([[[1.]]])
    """
    advantages = gamma * values_after - values.unsqueeze(-1)
    return advantages if ref_logprobs is None else advantages - kl_coef * kl_estimate(logprobs, ref_logprobs, kind)


def advantage_regression_loss(log_ratios: Tensor, advantages: Tensor, counts: Tensor, kl_coef: float) -> Tensor:
    r"""How far log-ratios to the reference are from those of the policy that the advantages ask for, per place.

    The policy with the highest reward less ``kl_coef`` times its KL to the reference has log-ratios that are advantages
    over the coefficient, up to a constant at each place:

    .. math:: L = \frac{\beta}{2}\, \mathrm{mean}_a \Big(\delta_a - \bar\delta - \frac{A_a - \bar A}{\beta}\Big)^2,
        \quad \delta_a = \log \pi(a) - \log \pi_{ref}(a)

    With tokens that the policy has sampled, its gradient is that of the advantages less the KL.

    Args:
        log_ratios: Of n tokens at each place, nats.
        advantages: Of the same tokens, without their own KL.
        counts: True at tokens that count.
        kl_coef: Beta, above 0.

    Shapes:
        (..., n) each -> (...), in units of the advantages.

    Source: Gao et al. 2024, arXiv:2404.16767 (log-ratios regressed on relative rewards, there of full responses).

    >>> counts = torch.tensor([True, True])
    >>> loss = advantage_regression_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.0]), counts, kl_coef=0.1)
    >>> round(float(loss), 6)  # both errors are 0.05 after centring: 0.0025 / 0.2
    0.0125
    """
    n = counts.sum(-1, keepdim=True).clamp(min=1)
    errors = (kl_coef * log_ratios - advantages).masked_fill(~counts, 0.0)
    errors = (errors - errors.sum(-1, keepdim=True) / n).masked_fill(~counts, 0.0)
    return errors.square().sum(-1) / (2.0 * kl_coef * n.squeeze(-1))


def affine_map(x: Tensor, y: Tensor) -> tuple[float, float]:
    r"""Factor and shift with which :math:`y = a x + b`, where y was made from x in this way.

    .. math:: a = \mathrm{cov}(x, y) / \mathrm{var}(x), \quad b = \bar y - a \bar x; \quad a = 1 \text{ if all } x
        \text{ are equal}

    >>> affine_map(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 9.0]))
    (2.0, 3.0)
    """
    x, y = x.double().cpu(), y.double().cpu()
    variance = float((x - x.mean()).square().sum())
    factor = float((x - x.mean()) @ (y - y.mean())) / variance if variance else 1.0
    return factor, float(y.mean() - factor * x.mean())


def ridge_weights(gram: Tensor, moments: Tensor, ridge: Tensor) -> Tensor:
    r"""Weights of ridge regression.

    .. math:: w = (X^T X + \mathrm{diag}(\rho))^{-1} X^T y

    Args:
        gram: X^T X.
        moments: X^T y.
        ridge: Penalty of each squared weight, rho, above 0.

    Source: Hoerl and Kennard 1970, Technometrics 12 (with one penalty for all weights).

    Shapes:
        (F, F), (F,), (F,) -> (F,).

    >>> ridge_weights(torch.tensor([[4.0]]), torch.tensor([10.0]), torch.tensor([1.0]))
    tensor([2.])
    """
    factor = torch.linalg.cholesky(gram + torch.diag(ridge))
    return torch.cholesky_solve(moments.unsqueeze(1), factor).squeeze(1)


def adaptive_kl_coef(
    kl_coef: float, kl: float, target: float, horizon: float, n_steps: int, max_error: float = 0.2
) -> float:
    r"""The proportional controller's next KL coefficient.

    .. math:: e = \mathrm{clip}(KL / target - 1, \pm e_{max}), \quad \beta' = \beta (1 + e\, n / horizon)

    Args:
        kl_coef: Current coefficient, beta.
        kl: KL to the reference measured on the episodes just seen, nats.
        target: KL to hold, in the same unit as ``kl``.
        horizon: Episodes in which a clipped error of 1 would double the coefficient.
        n_steps: Episodes just seen.
        max_error: Bound on the relative error.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.

    >>> round(adaptive_kl_coef(0.15, kl=12.0, target=6.0, horizon=10_000, n_steps=256), 6)
    0.150768
    """
    error = min(max(kl / target - 1.0, -max_error), max_error)
    return kl_coef * (1.0 + error * n_steps / horizon)


def merge_moments(count: float, mean: float, m2: float, x: Tensor) -> tuple[float, float, float]:
    r"""Moments of all values seen, out of those so far and a batch of new ones; float64 inside.

    .. math::
        \delta = \bar x - \mu, \quad \mu' = \mu + \delta\, b / (n + b), \quad
        M_2' = M_2 + \sum (x - \bar x)^2 + \delta^2\, n b / (n + b)

    Args:
        count: Values so far, n; where older ones count less than one each, their weight (and ``m2`` weighted alike).
        mean: Their mean.
        m2: Sum of their squared deviations from it; ``m2 / (count - 1)`` is the unbiased variance.
        x: New values, b of them; none change nothing.

    Source: Chan, Golub and LeVeque 1979, the pairwise form of Welford's algorithm.

    >>> merge_moments(2, 2.0, 2.0, torch.tensor([5.0]))  # 1 and 3, then 5
    (3, 3.0, 8.0)
    """
    if not x.numel():
        return count, mean, m2
    x = x.to(exact_device(x.device), torch.float64)
    new, delta = x.numel(), float(x.mean()) - mean
    total = count + new
    spread = float((x - x.mean()).square().sum())
    return total, mean + delta * new / total, m2 + spread + delta**2 * count * new / total


def diverging(falling: Sequence[float], rising: Sequence[Sequence[float]], fall: float) -> bool:
    """Whether one series has fallen from its best while others have risen since then.

    Args:
        falling: The one; the last entry is now. Of several best ones the first counts.
        rising: The others, at the same times; each must be higher now than it was then.
        fall: How far below its best the one must be.

    >>> diverging([0.2, 0.6, 0.5, 0.3], rising=[[1.0, 2.0, 3.0, 4.0]], fall=0.25)
    True
    >>> diverging([0.2, 0.6, 0.5, 0.3], rising=[[1.0, 4.0, 3.0, 2.0]], fall=0.25)
    False
    """
    best = max(range(len(falling)), key=falling.__getitem__)
    return falling[best] - falling[-1] > fall and all(series[-1] > series[best] for series in rising)


def stalled_since(still: Sequence[float], rising: Sequence[Sequence[float]], rises: Sequence[float]) -> int | None:
    """The last place since which all others have risen, each by some amount, while one series has not; None: nowhere.

    Args:
        still: The one; the last entry is now.
        rising: The others, at the same times.
        rises: By more than how much each of the others must be higher now.

    >>> stalled_since([0.2, 0.6, 0.7, 0.6], rising=[[1.0, 2.0, 3.0, 4.0]], rises=[1.5])
    1
    >>> stalled_since([0.2, 0.6, 0.7, 0.6], rising=[[1.0, 2.0, 3.0, 4.0]], rises=[2.5]) is None
    True
    """

    def stalled(place: int) -> bool:
        risen = all(series[-1] - series[place] > rise for series, rise in zip(rising, rises, strict=True))
        return risen and still[-1] <= still[place]

    return next((place for place in reversed(range(len(still))) if stalled(place)), None)


def linear_schedule(start: float, end: float, step: int, steps: int) -> float:
    r"""A straight line from ``start`` at step 0 to ``end`` at step ``steps``, then ``end``.

    .. math:: s + (e - s) \min(t / T, 1)

    >>> [round(linear_schedule(0.2, 1.0, step, steps=4), 2) for step in range(6)]
    [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    """
    done = min(step / steps, 1.0)
    return start * (1.0 - done) + end * done


def sampling_priorities(successes: Tensor, responses: Tensor, floor: float) -> Tensor:
    r"""Weights by which prompts are drawn: each one's share of failures, at least ``floor``.

    .. math:: w_i = \max(1 - s_i / n_i, w_{min}), \quad w_i = 1 \text{ where } n_i = 0

    Source: Kimi Team 2025, arXiv:2501.12599, section 2.3 (prioritized sampling; without the floor).

    Args:
        successes: Of each prompt, s; a response may be a part of one.
        responses: To each prompt so far, n.
        floor: Weight of a prompt that is always solved.

    Shapes:
        (N,), (N,) -> (N,).

    >>> sampling_priorities(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 4.0, 4.0]), floor=0.1)
    tensor([1.0000, 0.7500, 0.1000])
    """
    return (1.0 - successes / responses.clamp(min=1)).clamp(min=floor)


def groups_alike(scores: Tensor, group: Tensor, tolerance: float = 0.0) -> Tensor:
    r"""True for the rows of each group whose scores are all alike.

    .. math:: \max_{j \in g} s_j - \min_{j \in g} s_j \le tolerance

    Args:
        scores: One a row.
        group: Rows of one group share a number.
        tolerance: Largest difference of scores that are alike.

    Source: Yu et al. 2025, arXiv:2503.14476, section 3.2 (dynamic sampling).

    Shapes:
        (B,), (B,) -> (B,), boolean.

    >>> groups_alike(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([7, 4, 7, 4]))
    tensor([ True, False,  True, False])
    """
    numbers, place = group.unique(return_inverse=True)
    low = scores.new_full((len(numbers),), torch.inf).scatter_reduce(0, place, scores, "amin")
    high = scores.new_full((len(numbers),), -torch.inf).scatter_reduce(0, place, scores, "amax")
    return (high - low <= tolerance)[place]


def best_of_groups(scores: Tensor, group: Tensor) -> Tensor:
    """The row with the highest score of each group, in the order of rows; of equal ones the first.

    Args:
        scores: One a row.
        group: Rows of one group share a number.

    Shapes:
        (B,), (B,) -> (G,), one a group.

    >>> best_of_groups(torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([7, 7, 4, 4]))
    tensor([1, 2])
    """
    best_first = scores.argsort(descending=True, stable=True)
    number = group.unique(return_inverse=True)[1][best_first]
    places = torch.arange(len(scores), device=scores.device)
    first = torch.full_like(places, len(scores)).scatter_reduce(0, number, places, "amin")
    return best_first[first[first < len(scores)]].sort().values


def best_of_n_kl(n: int) -> float:
    r"""KL from a policy to the best of ``n`` of its samples, by which optimization is compared with mere choice.

    .. math:: KL_n = \log n - \frac{n - 1}{n}

    An upper bound, which is reached where no two samples score alike.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; Gao et al. 2022, arXiv:2210.10760.

    Args:
        n: Samples to choose from.

    Returns:
        Nats a response.

    >>> [round(best_of_n_kl(n), 6) for n in (1, 2, 4)]
    [0.0, 0.193147, 0.636294]
    """
    return math.log(n) - (n - 1) / n


def best_of_n_score(scores: Tensor, n: int) -> Tensor:
    r"""The mean score of the best of ``n`` samples, without bias, from more samples of each prompt than ``n``.

    The mean over all ways to choose n of a prompt's m samples, in ascending order x_(1) to x_(m), then over prompts:

    .. math:: \sum_{i=n}^{m} \binom{i - 1}{n - 1} \Big/ \binom{m}{n}\; x_{(i)}

    Source: Nakano et al. 2021, arXiv:2112.09332, appendix I; Gao et al. 2022, arXiv:2210.10760.

    Args:
        scores: Of m samples of each prompt, in any order.
        n: Samples to choose from, 1 to m.

    Shapes:
        (B, m) -> scalar.

    >>> best_of_n_score(torch.tensor([[3.0, 1.0, 2.0]]), n=2)  # the best of {1, 2}, {1, 3} and {2, 3}
    tensor(2.6667)
    """
    m = scores.shape[1]
    shares = [math.comb(i - 1, n - 1) / math.comb(m, n) for i in range(1, m + 1)]
    weights = torch.tensor(shares, dtype=scores.dtype, device=scores.device)
    return (scores.sort(dim=1).values * weights).sum(1).mean()


def moving_average(average: Tensor, new: Tensor, decay: float) -> Tensor:
    r"""An exponential moving average, one step on.

    .. math:: \theta' = \theta + (1 - d) (\theta_{new} - \theta) = d\, \theta + (1 - d)\, \theta_{new}

    Args:
        average: So far; the first form keeps it as it is, to the last bit, where ``new`` is equal to it.
        new: The new value, in the same dtype.
        decay: What is left of the old after a step, d.

    >>> moving_average(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]), decay=0.75)
    tensor([1.2500, 2.0000])
    """
    return torch.add(average, new - average, alpha=1.0 - decay)


def adaptive_learning_rate(
    rate: float, kl: float, target: float, factor: float, minimum: float, maximum: float
) -> float:
    r"""The next learning rate: lower where an update has moved the policy far, higher where it has moved it little.

    .. math::
        \alpha' = \begin{cases}
            \max(\alpha / f, \alpha_{min}) & KL > 2\, target \\
            \min(\alpha f, \alpha_{max}) & 10^{-9} < KL < target / 2 \\
            \alpha & \text{else}
        \end{cases}

    A KL of 0, but for rounding, is one that nothing was measured of: there was no step before.

    Args:
        rate: In force, alpha.
        kl: Approximate KL of the update, from the policy that sampled to the one being trained.
        target: Where it should be, to within a factor of 2.
        factor: Of one change, f, over 1.
        minimum: Lowest rate.
        maximum: Highest rate.

    Source: Rudin et al. 2021, arXiv:2109.11978, its code (``rsl_rl``, schedule ``adaptive``); after the penalty of
    Schulman et al. 2017, arXiv:1707.06347, section 4.

    >>> [adaptive_learning_rate(0.06, kl, 0.01, factor=1.5, minimum=0.05, maximum=1.0) for kl in (0.002, 0.01, 0.03)]
    [0.09, 0.06, 0.05]
    """
    if kl > 2.0 * target:
        return max(rate / factor, minimum)
    if 1e-9 < kl < 0.5 * target:
        return min(rate * factor, maximum)
    return rate


def popart_rescaling(mean: float, std: float, new_mean: float, new_std: float) -> tuple[float, float]:
    r"""Factor and shift of a normalised prediction with which it means the same under new statistics.

    .. math:: \sigma' (a \tilde V + b) + \mu' = \sigma \tilde V + \mu, \quad
        a = \sigma / \sigma', \quad b = (\mu - \mu') / \sigma'

    Source: van Hasselt et al. 2016, arXiv:1602.07714, proposition 1.

    >>> popart_rescaling(mean=0.0, std=1.0, new_mean=6.0, new_std=2.0)  # a prediction of 8 becomes 1, 2 above 6
    (0.5, -3.0)
    """
    return std / new_std, (mean - new_mean) / new_std


def wins(scores: Tensor, others: Tensor) -> Tensor:
    """1 where a score beats the other one, 0 where it loses, one half where they are equal: their mean is a win rate.

    Shapes:
        scores, others (B,) -> (B,).

    >>> wins(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return 0.5 + 0.5 * (scores - others).sign()


def distinct_ngrams(ids: Tensor, mask: Tensor, n: int) -> float:
    r"""Number of distinct n-grams in all responses, over the number of all n-grams.

    .. math:: \mathrm{distinct}_n = |\{g_1, ..., g_N\}| \,/\, N

    Args:
        ids: Response tokens (B, T).
        mask: True at response tokens (B, T), from the first column on.
        n: Length of an n-gram, at least 1.

    Returns:
        1 where no n-gram occurs twice, and where no response has n tokens.

    Source: Li et al. 2016, arXiv:1510.03055, section 5 (distinct-1, distinct-2).

    >>> ids = torch.tensor([[4, 5, 4, 5], [4, 5, 9, 0]])  # 4 5, 5 4, 4 5; 4 5, 5 9
    >>> distinct_ngrams(ids, torch.tensor([[True] * 4, [True, True, True, False]]), n=2)
    0.6
    """
    if ids.shape[1] < n:
        return 1.0
    tokens, grams = ids.unfold(1, n, 1)[mask.unfold(1, n, 1).all(-1)].unique(return_inverse=True)
    if not len(grams):
        return 1.0
    kinds = grams[:, 0]  # renumbered token by token: unique(dim=0) compares rows and takes forty times as long
    for token in grams[:, 1:].unbind(1):
        kinds = (kinds * len(tokens) + token).unique(return_inverse=True)[1]
    return (int(kinds.max()) + 1) / len(kinds)


def duplicate_fraction(ids: Tensor, mask: Tensor) -> float:
    """Fraction of the responses that are exact copies of an earlier one.

    Args:
        ids: Response tokens (B, T).
        mask: True at response tokens (B, T), from the first column on.

    Returns:
        0 where all differ, (B - 1) / B where all are equal.

    >>> duplicate_fraction(torch.tensor([[4, 5], [4, 6], [4, 5], [4, 5]]), torch.ones(4, 2, dtype=torch.bool))
    0.5
    """
    return 1.0 - len(_marked(ids, mask).unique(dim=0)) / len(ids)


def largest_opening(ids: Tensor, mask: Tensor, n: int) -> float:
    """Fraction of the responses that begin with the most frequent first n tokens.

    Args:
        ids: Response tokens (B, T).
        mask: True at response tokens (B, T), from the first column on; a shorter response is compared in full.
        n: Length of an opening.

    >>> largest_opening(torch.tensor([[4, 5, 1], [4, 5, 2], [4, 6, 2], [7, 5, 2]]), torch.ones(4, 3).bool(), n=2)
    0.5
    """
    counts = _marked(ids[:, :n], mask[:, :n]).unique(dim=0, return_counts=True)[1]
    return float(counts.max()) / len(ids)


def _marked(ids: Tensor, mask: Tensor) -> Tensor:
    """The response tokens, -1 elsewhere."""
    return torch.where(mask.bool(), ids, -1)


def add_product(total: Tensor | None, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of products of matrices, in place; the first is not added to zeros, which takes as long as the product.

    Args:
        total: The sum so far; None before the first.
        x: Left factor.
        y: Right factor.
        dtype: Of the sum.

    Shapes:
        (M, N), (N, K) -> (M, K).

    >>> first = add_product(None, torch.ones(1, 2), torch.ones(2, 1), torch.float64)
    >>> add_product(first, torch.ones(1, 3), torch.ones(3, 1), torch.float64)
    tensor([[5.]], dtype=torch.float64)
    """
    if total is None:
        return (x @ y).to(dtype)
    return total.addmm_(x, y) if dtype == x.dtype else total.add_(x @ y)


def no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions, which transformers takes as it is; it would make one of all pairs of packed tokens.

    >>> no_mask(torch.device("cpu")).shape
    torch.Size([1, 1, 1, 1])
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def side_by_side(x: Tensor, taken: Tensor, rows: int, longest: int, *, ascending: bool = False) -> Tensor:
    """What each token has in attention, of packed rows: the rows side by side, padded.

    Args:
        x: Of the N tokens, one row after another.
        taken: The number of each token in the flattened (rows, longest).
        rows: Number of rows.
        longest: Tokens of the longest row.
        ascending: The numbers ascend, so that without padding there is nothing to copy.

    Shapes:
        (1, heads, N, d) -> (rows, heads, longest, d), 0 at padding.

    >>> x = torch.tensor([5.0, 6.0, 7.0]).view(1, 1, 3, 1)  # a row of one token, and one of two
    >>> side_by_side(x, torch.tensor([0, 2, 3]), rows=2, longest=2).flatten()
    tensor([5., 0., 6., 7.])
    """
    _, heads, n, d = x.shape
    if ascending and n == rows * longest:
        unpadded: Tensor = x[0].unflatten(1, (rows, longest))
        return unpadded.transpose(0, 1)
    tokens = x.transpose(1, 2).reshape(n, heads * d)
    padded = tokens.new_zeros(rows * longest, heads * d).index_copy(0, taken, tokens)
    return padded.view(rows, longest, heads, d).transpose(1, 2)


def end_to_end(x: Tensor, taken: Tensor, *, ascending: bool = False) -> Tensor:
    """Padded rows packed again, see :func:`side_by_side`.

    Shapes:
        (rows, longest, heads, d) -> (1, N, heads, d).

    >>> end_to_end(torch.tensor([5.0, 0.0, 6.0, 7.0]).view(2, 2, 1, 1), torch.tensor([0, 2, 3])).flatten()
    tensor([5., 6., 7.])
    """
    tokens = x.flatten(0, 1)
    return (tokens if ascending and len(tokens) == len(taken) else tokens.index_select(0, taken)).unsqueeze(0)


def product_rows(n: int, device: torch.device) -> int:
    """Rows that a product of ``n`` rows should have.

    For every new number of rows, a CPU under autocast first compiles the product, in a millisecond or two, and keeps
    the code. Here numbers that differ little become one.

    >>> product_rows(205, torch.device("cpu"))
    205
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     [product_rows(n, torch.device("cpu")) for n in (205, 224, 3000)]
    [224, 224, 3008]
    """
    if not (torch.is_autocast_enabled("cpu") and is_cpu(device)):
        return n
    step = max(32, 1 << max(0, n.bit_length() - 6))  # matrix units work on blocks of 32 rows
    return -(-n // step) * step


def with_rows(x: Tensor, n: int) -> Tensor:
    """As many rows: zeros behind those that there are.

    >>> with_rows(torch.tensor([[5], [6]]), 3).flatten()
    tensor([5, 6, 0])
    """
    return x if len(x) == n else pad(x, (0, 0) * (x.dim() - 1) + (0, n - len(x)))


def select_rows(value: Any, index: Tensor, listed: Sequence[int], n: int) -> Any:
    """The chosen rows of a value with ``n`` rows, or of a dict of values; any other value stays as it is.

    >>> select_rows({"ids": ["a", "b", "c"], "size": 2}, torch.tensor([2, 0]), [2, 0], n=3)
    {'ids': ['c', 'a'], 'size': 2}
    """
    if isinstance(value, Tensor):
        return value[index if value.device == index.device else listed] if value.ndim and len(value) == n else value
    if isinstance(value, dict):
        return {key: select_rows(entry, index, listed, n) for key, entry in value.items()}
    if isinstance(value, list | tuple) and len(value) == n:
        return type(value)(value[i] for i in listed)
    return value


def join_rows(value: Any, more: Any, *, left_padded: bool = False) -> Any:
    """The rows of two values, one after the other; tokens are padded with 0 to the longer of the two.

    Args:
        value: A tensor, a list, or a dict of values; anything else stays as it is.
        more: Of the same kind. What a dict lacks stays as it is in the first.
        left_padded: Pad the second dimension on the left.

    >>> join_rows({"ids": torch.tensor([[1, 2]]), "text": ["a"]}, {"ids": torch.tensor([[3]]), "text": ["b"]})
    {'ids': tensor([[1, 2],
            [3, 0]]), 'text': ['a', 'b']}
    """
    if isinstance(value, Tensor):
        more = to_device(more, value.device)
        if value.ndim > 1:
            width = max(value.shape[1], more.shape[1])
            value, more = (_widened(x, width - x.shape[1], left_padded) for x in (value, more))
        return torch.cat([value, more])
    if isinstance(value, dict):
        both = value.keys() & more.keys()
        return value | {key: join_rows(value[key], more[key], left_padded=left_padded) for key in both}
    return [*value, *more] if isinstance(value, list) else value


def _widened(x: Tensor, n: int, left_padded: bool) -> Tensor:
    sides = (n, 0) if left_padded else (0, n)
    return pad(x, (0, 0) * (x.ndim - 2) + sides)
