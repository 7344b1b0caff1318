"""Actor, critic and frozen reference around Hugging Face models: one training forward each."""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache

from lit_ppo.device import exact_products
from lit_ppo.experience import ModelInputs
from lit_ppo.functional import random_projection, to_device
from lit_ppo.generation.engine import Responses
from lit_ppo.generation.transformers import generate
from lit_ppo.models.family import check_causal, check_head, check_sampling
from lit_ppo.models.head import HeadInputs, sample_tokens, token_statistics
from lit_ppo.models.packing import read_tokens, states_after, stock_attention, use_packing
from lit_ppo.parallel.sharding import blocks, exact_parts, linear_layers

GRAPHS = 32  # that a kind of block may have


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
            actions: Other tokens in place of each target token: return their log-probs, (B, T, n).
            draws: Random numbers with which to sample such tokens: return these and their log-probs, (B, T, n) each.

        Shapes:
            input_ids, attention_mask (B, L), target_mask (B, T) -> (B, T), (B, T), 0 where masked.
        """
        head = self._head_inputs(input_ids, attention_mask, target_mask)
        if draws is not None:
            found = sample_tokens(head, draws[to_device(target_mask, draws.device)], temperature)
            return tuple(spread(x, places(target_mask, x.device), target_mask.shape) for x in found)
        if actions is not None:
            own = actions.flatten(0, 1).index_select(0, places(target_mask, actions.device))
            logprobs = token_statistics(head, own, temperature)[0]
            return spread(logprobs, places(target_mask, logprobs.device), target_mask.shape)
        if head_inputs:
            # a sharded model frees its full weights when its forward ends
            keep = torch.clone if self.sharded else torch.detach
            return HeadInputs(head.states, keep(head.weight), None if head.bias is None else keep(head.bias))
        where = places(target_mask, input_ids.device)
        ids = input_ids[:, -target_mask.shape[1] :].flatten().index_select(0, where)
        logprobs, second = token_statistics(head, ids, temperature, kl_to, compiled=self.compiled)
        return spread(logprobs, where, target_mask.shape), spread(second, where, target_mask.shape)

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
        n_states: int | None = None,
        actions: Tensor | None = None,
    ) -> Tensor:
        """Values in float32.

        Args:
            input_ids: The actor's.
            attention_mask: The actor's.
            target_mask: The actor's.
            n_states: Return D numbers of the hidden states instead: all, or random projections of wider states.
            actions: Other tokens in place of each target token: return the value and the D numbers after each.

        Shapes:
            input_ids, attention_mask (B, L), target_mask (B, T) -> (B, T), 0 where masked; with ``n_states``
            (B, T, D); with ``actions`` (B, T, n) too, (B, T, n, 1 + D), not masked.
        """
        if actions is not None and n_states is not None:
            states = states_after(self.backbone, input_ids, attention_mask, actions)
            return torch.cat([self._values(states)[..., None], random_projection(states.float(), n_states)], dim=-1)
        states = states_before(self.backbone, input_ids, attention_mask, target_mask)
        where = places(target_mask, states.device)
        if n_states is None:
            return spread(self._values(states), where, target_mask.shape)
        return spread(random_projection(states.float(), n_states), where, target_mask.shape)

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


def _widen(x: Tensor, n_columns: int) -> Tensor:
    return pad(x, (0, n_columns - x.shape[1]))


def states_before(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor) -> Tensor:
    """Hidden states that predict the N target tokens: the states of the tokens before them.

    Shapes:
        (B, L), (B, L), (B, T) -> (N, H).
    """
    states, number = read_tokens(backbone, input_ids, attention_mask)
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


def compile_blocks(model: nn.Module) -> None:
    """Compile a model's blocks for all uses but sampling; one graph serves all blocks and lengths."""
    for block in blocks(model):
        block.forward = partial(_forward, block.forward, torch.compile(block.forward, dynamic=True))
    model.compiled = True  # type: ignore[assignment]


def _forward(eager: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Eager beside a cache: shapes change with every token, and each layer would get compiled code of its own."""
    if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
        return eager(*args, **kwargs)
    # models with and without gradients, in several dtypes, each have a graph; beyond the limit nothing is compiled
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):
        return compiled(*args, **kwargs)


def halve_frozen(model: nn.Module) -> None:
    """Keep frozen linear layers in bfloat16, the dtype to which ``bf16-mixed`` casts them in every forward.

    No number changes, and no weight is cast. Embeddings and norms stay as they are, and so does a head that shares the
    embeddings' weight. Without autocast these layers compute in bfloat16 too.
    """
    for part in linear_layers(model):
        if not any(p.requires_grad or p.dtype != torch.float32 for p in part.parameters()):
            part.to(torch.bfloat16)
            vars(part)["forward"] = MethodType(_in_bfloat16, part)  # which layers share, in compiled code too


def in_bfloat16(model: nn.Module) -> None:
    """Keep all weights in bfloat16 but those of parts that always compute in float32; buffers stay as they are."""
    exact = exact_parts(model)
    for part in model.modules():
        for parameter in () if part in exact else part.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.bfloat16)


def _in_bfloat16(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = type(layer).forward(layer, x.to(torch.bfloat16))
    return output if torch.is_autocast_enabled(x.device.type) else output.to(x.dtype)


def use_fused_gelu(model: nn.Module) -> None:
    """Replace the tanh form of GELU written in Python by torch's own: one pass over memory instead of six."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
