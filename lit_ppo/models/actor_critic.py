"""Actor, critic and frozen reference around Hugging Face models: one training forward each."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel

from lit_ppo.device import exact_products
from lit_ppo.experience import ModelInputs
from lit_ppo.functional import random_projection, to_device
from lit_ppo.generation.config import stop_ids
from lit_ppo.generation.engine import Responses
from lit_ppo.generation.transformers import generate
from lit_ppo.models.compute import use_fused_gelu
from lit_ppo.models.family import check_causal, check_head, check_sampling
from lit_ppo.models.head import HeadInputs, read_logprobs, token_statistics
from lit_ppo.models.packing import read_others, read_tokens, stock_attention, use_packing


class _AlwaysEval(nn.Module):
    """Dropout stays off in rollouts and updates: PPO's ratio must be 1 before the first step."""

    sharded = False  # its full weights exist only while its forward runs
    compiled = False  # blocks and head run compiled code
    exact: tuple[str, ...] = ()  # parts that always compute in float32

    def train(self, mode: bool = True) -> "_AlwaysEval":
        return super().train(False)


class Actor(_AlwaysEval):
    """A causal language model whose one forward gives log-probs and entropy of target tokens.

    Args:
        model: Hugging Face causal LM.
        checked: Another model of the same checkpoint was checked.

    Raises:
        ValueError: The model changes its logits after the head, which the head applied by hand would not do; or it
            samples from another distribution than the one that is trained.
    """

    def __init__(self, model: PreTrainedModel, *, checked: bool = False) -> None:
        super().__init__()
        self.model = model
        self.eval()
        use_fused_gelu(model)
        if not checked:
            with exact_products():
                check_head(model, self._head_inputs)
                check_sampling(model, self._head_inputs)
        use_packing(model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        target_mask: Tensor,
        temperature: float = 1.0,
        kl_to: HeadInputs | None = None,
        head_inputs: bool = False,
        entropy: bool = True,
        actions: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Any:
        """Log-probs and entropy of the target tokens; with ``kl_to``, log-probs and exact KL.

        Args:
            input_ids: Token ids.
            attention_mask: True at real tokens; positions are counted over these, wherever the padding is.
            target_mask: Mask of the last T tokens, True where a value is wanted. A row's first token has no
                prediction. Masks on the host spare a GPU a synchronisation.
            temperature: Divides the logits.
            kl_to: States and head of another model for the same target tokens, without gradients.
            head_inputs: Return the states and head of this model instead, as ``kl_to`` of another. This is done
                inside the forward because a sharded model gathers its weights only there.
            entropy: False, without gradients: return tokens, see ``draws``, and their log-probs instead.
            actions: Other tokens in place of each target token, (B, T, n): log-probs are (B, T, 1 + n), the target
                token's first.
            draws: Random numbers, (B, T, n), with which to sample ``actions``; needs ``entropy=False``.

        Shapes:
            input_ids, attention_mask (B, L), target_mask (B, T) -> (B, T), (B, T), 0 where masked.
        """
        head = self._head_inputs(input_ids, attention_mask, target_mask)
        if head_inputs:
            # a sharded model frees its full weights when its forward ends
            keep = torch.clone if self.sharded else torch.detach
            return HeadInputs(head.states, keep(head.weight), None if head.bias is None else keep(head.bias))
        where, shape = places(target_mask, input_ids.device), target_mask.shape
        ids = input_ids[:, -shape[1] :].flatten().index_select(0, where)
        if actions is not None:
            ids = torch.cat([ids[:, None], actions.flatten(0, 1).index_select(0, where)], dim=1)
        if not entropy and not (self.compiled and ids.dim() == 1 and draws is None):
            own = None if draws is None else draws[to_device(target_mask, draws.device)]
            found = read_logprobs(head, ids if ids.dim() == 2 else ids[:, None], temperature, own)
            return tuple(spread(x, where, shape) for x in found)
        logprobs, second = token_statistics(head, ids, temperature, kl_to, compiled=self.compiled)
        if not entropy:  # compiled code reads the logits once, entropies included
            logprobs, second = ids.unsqueeze(1), logprobs.unsqueeze(1)
        return spread(logprobs, where, shape), spread(second, where, shape)

    def generate(self, *args: Any, **kwargs: Any) -> Responses:
        """Sample responses; see :class:`lit_ppo.generation.engine.Decoder`."""
        with stock_attention(self.model):
            return generate(self.model, *args, **kwargs)

    def _head_inputs(self, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor) -> HeadInputs:
        head = self.model.get_output_embeddings()
        return HeadInputs(
            states_before(self.model.base_model, input_ids, attention_mask, target_mask), head.weight, head.bias
        )


class Reference(Actor):
    """A frozen actor."""

    def __init__(self, model: PreTrainedModel, *, checked: bool = False) -> None:
        super().__init__(model, checked=checked)
        self.requires_grad_(False)


class Critic(_AlwaysEval):
    """A causal backbone with a value head: the value of the state before each target token.

    Args:
        backbone: Hugging Face model that returns ``last_hidden_state``.
        head: Weight (1, H) of a trained scoring head to start from; zeros by default.

    Raises:
        ValueError: The backbone looks at later tokens.
    """

    exact = ("value_head",)

    def __init__(self, backbone: PreTrainedModel, head: Tensor | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.eval()
        use_fused_gelu(backbone)
        with exact_products():
            width = check_causal(backbone)
        use_packing(backbone)
        self.value_head = nn.Linear(width, 1)
        with torch.no_grad():
            self.value_head.weight.copy_(torch.zeros_like(self.value_head.weight) if head is None else head)
            self.value_head.bias.zero_()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        target_mask: Tensor,
        n_states: int = 0,
        actions: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Any:
        """Values in float32; with other tokens or numbers of the hidden states, a tuple of all that is asked for.

        Args:
            input_ids: The actor's.
            attention_mask: The actor's.
            target_mask: The actor's.
            n_states: D, numbers of each hidden state: all of them, or random projections of wider states.
            actions: Other tokens in place of each target token, (B, T, n).
            wanted: Behind which of them to read.

        Shapes:
            input_ids, attention_mask (B, L), target_mask (B, T) -> (B, T), 0 where masked; or a tuple of these
            values, states (B, T, D), values (B, T, n) and states (B, T, n, D) behind the other tokens.
        """
        if actions is None or wanted is None:
            states, others = states_before(self.backbone, input_ids, attention_mask, target_mask), None
        else:
            states, number, others = read_others(self.backbone, input_ids, attention_mask, actions, wanted)
            states = _before(states, number, target_mask)
        where, shape = places(target_mask, states.device), target_mask.shape
        values = spread(self._values(states), where, shape)
        if others is None and not n_states:
            return values
        found = [values, spread(random_projection(states.float(), n_states), where, shape)]
        if others is not None and wanted is not None:
            where, shape = places(wanted, states.device), wanted.shape
            found += [
                spread(x, where, shape) for x in (self._values(others), random_projection(others.float(), n_states))
            ]
        return tuple(found)

    def _values(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):  # one number per token: exactness is cheap
            return self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def rescale_head(self, factor: float, shift: float) -> None:
        """Turn every value V into ``factor * V + shift``. The change is elementwise, so it also works on shards."""
        self.value_head.weight.mul_(factor)
        self.value_head.bias.mul_(factor).add_(shift)


def actor_forward(
    model: Any, inputs: ModelInputs, n_columns: int, temperature: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (or exact KL) of the response tokens.

    Args:
        model: The actor, or the reference.
        inputs: Of some rows.
        n_columns: T, the columns of the result.
        temperature: Divides the logits.
        **kwargs: Further arguments of :meth:`Actor.forward`.

    Shapes:
        -> (b, T), (b, T), 0 where masked.
    """
    ids, mask, target_mask = inputs
    first, second = model(ids, mask, target_mask=target_mask, temperature=temperature, **kwargs)
    return _widen(first, n_columns), _widen(second, n_columns)


def critic_forward(critic: Critic, inputs: ModelInputs, n_columns: int) -> Tensor:
    """Values of the response tokens, (b, T); the arguments are those of :func:`actor_forward`."""
    ids, mask, target_mask = inputs
    return _widen(critic(ids, mask, target_mask=target_mask), n_columns)


def read_values(
    critic: Critic, inputs: ModelInputs, n_states: int, actions: Tensor | None, generation: GenerationConfig
) -> dict[str, Tensor]:
    """Values of the response tokens; what callbacks ask for besides.

    Args:
        critic: The critic.
        inputs: Of some rows.
        n_states: Numbers D of each hidden state.
        actions: Other tokens at each place. Nothing can follow a stop token, nor the last token of a response.
        generation: Says which these are.

    Shapes:
        actions (b, t, n) -> ``values`` (b, t); with ``n_states``, ``critic_states`` (b, t, D); with actions,
        ``action_mask`` and ``action_values`` (b, t, n) and ``action_states`` (b, t, n, D).
    """
    (ids, mask, target_mask), wanted = inputs, None
    if actions is not None:
        room = torch.arange(target_mask.shape[1]) < int(generation.max_new_tokens or 0) - 1
        stops = torch.tensor(stop_ids(generation), device=actions.device)
        wanted = to_device((target_mask & room).unsqueeze(-1), actions.device) & ~torch.isin(actions, stops)
    found = critic(ids, mask, target_mask=target_mask, n_states=n_states, actions=actions, wanted=wanted)
    names = ("values", "critic_states", "action_values", "action_states")
    named = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=False))
    if not n_states:
        named = {name: x for name, x in named.items() if "states" not in name}
    return named if wanted is None else named | {"action_mask": wanted}


def _widen(x: Tensor, n_columns: int) -> Tensor:
    return pad(x, (0, 0) * (x.dim() - 2) + (0, n_columns - x.shape[1]))


def states_before(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor) -> Tensor:
    """Hidden states that predict the N target tokens: the states of the tokens before them.

    Shapes:
        (B, L), (B, L), (B, T) -> (N, H).
    """
    return _before(*read_tokens(backbone, input_ids, attention_mask), target_mask)


def _before(states: Tensor, number: Tensor, target_mask: Tensor) -> Tensor:
    """Of the states of all tokens, those before the target tokens."""
    targets = number[:, -target_mask.shape[1] :].to(target_mask.device)[target_mask]
    return states.index_select(0, to_device(targets - 1, states.device))


def places(mask: Tensor, device: torch.device) -> Tensor:
    """Where the N True entries of a mask are in it, flattened: (N,) on a device."""
    return to_device(mask.flatten().nonzero().squeeze(1), device)


def spread(flat: Tensor, where: Tensor, shape: torch.Size) -> Tensor:
    """Put values in their places, 0 elsewhere.

    Args:
        flat: (N, ...).
        where: From :func:`places`.
        shape: Of the mask.
    """
    empty = flat.new_zeros(shape.numel(), *flat.shape[1:])
    return empty.index_copy(0, where, flat).view(*shape, *flat.shape[1:])
