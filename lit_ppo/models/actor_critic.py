"""Actor, critic and frozen reference around Hugging Face models: one training forward each."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation

from lit_ppo.generation.transformers import sample
from lit_ppo.models.head import HeadInputs, token_statistics
from lit_ppo.models.packing import read_tokens, use_packing
from lit_ppo.parallel.sharding import blocks


class _AlwaysEval(nn.Module):
    """Dropout stays off in rollouts and updates alike: PPO's ratio must be 1 before the first step."""

    sharded = False  # its weights are whole only while its forward runs
    compiled = False
    exact: tuple[str, ...] = ()  # parts that are to compute in float32 where the others need not

    def train(self, mode: bool = True) -> "_AlwaysEval":
        return super().train(False)


class Actor(_AlwaysEval):
    """A causal language model whose one forward gives log-probs and entropy of target tokens.

    Args:
        model: Hugging Face causal LM.

    Raises:
        ValueError: The family does something to its logits that the head applied by hand would drop.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.eval()
        use_fused_gelu(model)
        use_packing(model)
        check_head(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        target_mask: Tensor,
        temperature: float = 1.0,
        kl_to: HeadInputs | None = None,
        head_inputs: bool = False,
    ) -> Any:
        """Log-probs and entropy of the target tokens, or log-probs and exact KL where ``kl_to`` is given.

        Args:
            input_ids: Token ids.
            attention_mask: True at real tokens; positions are counted over these, wherever the padding is.
            target_mask: The last T tokens' mask: True where wanted. A row's first token has no prediction. Masks on
                the host spare a GPU a synchronisation.
            temperature: Divides the logits.
            kl_to: Another model's states and head for the same target tokens, without gradients.
            head_inputs: Instead: this model's, for another's ``kl_to``. Inside the forward, since a sharded model
                gathers its weights only there.

        Shapes:
            input_ids, attention_mask (B, L), target_mask (B, T) -> (B, T), (B, T), 0 where masked.
        """
        head = self._head_inputs(input_ids, attention_mask, target_mask)
        if head_inputs:
            # a sharded model takes its whole weights away again when its forward ends
            keep = torch.clone if self.sharded else torch.detach
            return HeadInputs(head.states, keep(head.weight), None if head.bias is None else keep(head.bias))
        rows, columns = (index.to(input_ids.device) for index in target_mask.nonzero(as_tuple=True))
        ids = input_ids[:, -target_mask.shape[1] :][rows, columns]
        logprobs, second = token_statistics(head, ids, temperature, kl_to)
        return spread(logprobs, target_mask), spread(second, target_mask)

    def generate(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """See :func:`lit_ppo.generation.transformers.sample`."""
        # sampled tokens change shapes and cache all the time: compiled code would be compiled again and again
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            return sample(self.model, *args, **kwargs)

    def _head_inputs(self, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor) -> HeadInputs:
        head = self.model.get_output_embeddings()
        return HeadInputs(
            states_before(self.model.base_model, input_ids, attention_mask, target_mask), head.weight, head.bias
        )


class Reference(Actor):
    """A frozen actor."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.requires_grad_(False)


class Critic(_AlwaysEval):
    """A causal backbone of its own with a value head: the value of the state before each target token.

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
        self.value_head = nn.Linear(_hidden_size(backbone), 1)
        with torch.no_grad():
            self.value_head.weight.copy_(torch.zeros_like(self.value_head.weight) if head is None else head)
            self.value_head.bias.zero_()
        self.eval()
        use_fused_gelu(backbone)
        use_packing(backbone)
        check_causal(backbone)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, target_mask: Tensor) -> Tensor:
        """Values in float32; the arguments are the actor's.

        Shapes:
            input_ids, attention_mask (B, L), target_mask (B, T) -> (B, T), 0 where masked.
        """
        states = states_before(self.backbone, input_ids, attention_mask, target_mask)
        with torch.autocast(states.device.type, enabled=False):  # one number a token: worth keeping exact
            values = self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1)
        return spread(values.float(), target_mask)

    @torch.no_grad()
    def rescale_head(self, factor: float, shift: float) -> None:
        """Turn every value V into ``factor * V + shift``; element by element, so that shards of the head do it alike.

        Args:
            factor: Of all values.
            shift: Added to all values.
        """
        self.value_head.weight.mul_(factor)
        self.value_head.bias.mul_(factor).add_(shift)


def states_before(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor) -> Tensor:
    """Hidden states that predict the N target tokens: each token's state is that of the token before it.

    Shapes:
        (B, L), (B, L), (B, T) -> (N, H).
    """
    states, number = read_tokens(backbone, input_ids, attention_mask)
    targets = number[:, -target_mask.shape[1] :].to(target_mask.device)[target_mask]
    return states[targets.to(states.device) - 1]


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """Put the values of the True tokens back in their places, 0 elsewhere.

    Shapes:
        (N,), (B, T) -> (B, T).
    """
    mask = mask.to(flat.device, non_blocking=True)
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def compile_blocks(model: nn.Module) -> None:
    """Compile a model's blocks, for all but sampling; one graph serves all blocks and lengths."""
    for block in blocks(model):
        block.forward = torch.compile(block.forward, dynamic=True)
    model.compiled = True  # type: ignore[assignment]


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the inputs of a model's blocks for the backward, which computes the rest again.

    transformers' own checkpointing is off in eval mode, in which our models always are.
    """
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def use_fused_gelu(model: nn.Module) -> None:
    """Replace the tanh form of GELU that is written in Python by torch's own: one pass for six."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def check_head(actor: Actor) -> None:
    """Compare states and head applied by hand with the stock model's logits on a few tokens.

    A hook makes the head's output 100 times larger for the comparison: what a family does after its head
    (soft-capping, scaling) then shows even where the logits are small.

    Raises:
        ValueError: They differ, or there is no linear head; names the class.
    """
    model = actor.model
    linear_head = model.get_output_embeddings()
    if not isinstance(linear_head, nn.Linear):
        raise ValueError(f"{type(model).__name__}: not supported, it has no linear language-model head")
    ids = torch.arange(6, device=model.device).reshape(2, 3) % linear_head.out_features
    mask = torch.tensor([[False, True, True], [True, True, True]], device=model.device)  # the first row is padded
    target_mask = torch.tensor([[False, True], [True, True]], device=model.device)
    handle = linear_head.register_forward_hook(lambda module, inputs, output: output * 100.0)
    try:
        with torch.no_grad():
            states, weight, bias = actor._head_inputs(ids, mask, target_mask)
            ours = linear(states, weight, bias) * 100.0
            alone = [
                model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0] for row in (ids[:1, 1:], ids[1:])
            ]
            stock = torch.cat([alone[0][:1], alone[1][:2]])
    finally:
        handle.remove()
    difference = float((ours.float() - stock.float()).abs().max() / stock.float().abs().max().clamp(min=1e-6))
    if not difference < (1e-4 if weight.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{type(model).__name__}: not supported, its logits are not its head's output "
            f"(relative difference {difference:.1e}); use a family like GPT-2, Llama or Qwen2"
        )


def check_causal(backbone: PreTrainedModel) -> None:
    """Check that a change of the last token leaves earlier states alone.

    Raises:
        ValueError: Values would see the tokens that they are to predict the outcome of.
    """
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=backbone.device)
    with torch.no_grad():
        states = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, :3].float()
    if not torch.allclose(states[0], states[1], rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"{type(backbone).__name__} reads later tokens (its attention is not causal): it cannot be a critic; "
            "use critic='actor' or the path of a causal model"
        )


def load_tokenizer(argument: str, path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; one without a pad token pads with its stop token (masks tell them apart)."""
    tokenizer = _from_pretrained(AutoTokenizer, argument, path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{argument}={path!r}: its tokenizer has no eos_token, so no response could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def load_causal_lm(
    argument: str, path: str, model_kwargs: dict[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal LM, in float32 where it is trained: in bf16 an Adam step at 5e-7 would round away."""
    return _from_pretrained(AutoModelForCausalLM, argument, path, dtype=dtype, **model_kwargs)  # type: ignore[no-any-return]


def load_critic(argument: str, path: str, model_kwargs: dict[str, Any], label: int | None = None) -> Critic:
    """A critic on the backbone of a causal LM, or on a reward model's with its scoring head to start from.

    Args:
        argument: What the path was given as, for messages.
        path: Local folder or hub name.
        model_kwargs: For ``from_pretrained``.
        label: The reward model's output that is the reward, where it has several.
    """
    trust = bool(model_kwargs.get("trust_remote_code"))
    config = _from_pretrained(AutoConfig, argument, path, trust_remote_code=trust)
    if not (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        return Critic(_from_pretrained(AutoModel, argument, path, dtype=torch.float32, **model_kwargs))
    model = _from_pretrained(AutoModelForSequenceClassification, argument, path, dtype=torch.float32, **model_kwargs)
    score = getattr(model, "score", None)
    if score is None or (label is None and score.out_features != 1):
        return Critic(model.base_model)
    return Critic(model.base_model, head=score.weight[label or 0].unsqueeze(0))


def _from_pretrained(auto: Any, argument: str, path: str, **kwargs: Any) -> Any:
    """``auto.from_pretrained``, without code from the model's folder unless asked for; names the argument on failure.

    Raises:
        ValueError: Neither a folder with a model nor a hub name that can be reached.
    """
    try:
        loaded = auto.from_pretrained(path, **{"trust_remote_code": False, **kwargs})
    except (OSError, ValueError) as error:
        if "contains custom code" in str(error):
            raise ValueError(
                f"{argument}={path!r}: comes with code of its own; if you trust it, set model_kwargs: "
                "{trust_remote_code: true}"
            ) from error
        where = (
            "the folder holds no complete model" if Path(path).is_dir() else "no such folder, nor a hub model in reach"
        )
        reason = str(error).splitlines()[0]
        raise ValueError(f"{argument}={path!r}: {where}; give a local folder or a hub name ({reason})") from error
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ValueError(f"{argument}={path!r}: holds an adapter, not a whole model; export it merged")
    return loaded


def _hidden_size(backbone: PreTrainedModel) -> int:
    return int(backbone.config.get_text_config().hidden_size)
