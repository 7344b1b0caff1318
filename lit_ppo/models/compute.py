"""How the parts of a model compute: in which precision, in fused or compiled code."""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache

from lit_ppo.parallel.sharding import blocks, exact_parts, linear_layers

GRAPHS = 32  # that a kind of block may have


def score_in_float32(model: Any) -> Any:
    """Let the modules of a sequence classifier that follow its backbone compute in float32, also under autocast.

    A score is one number a text, and bf16 would make many of them equal.

    Args:
        model: Hugging Face sequence classifier, not sharded yet; returned.
    """
    backbone = model.base_model
    heads = {name: child for name, child in model.named_children() if child is not backbone}
    if backbone is model:  # its class does not say which part is the backbone
        heads = {name: heads[name] for name in ("score", "classifier") if name in heads}
    for head in heads.values():
        head.float()
        head.forward = partial(_float32, head.forward)
    model.exact = tuple(name for name, head in heads.items() if list(head.parameters()))  # for `shard`
    return model


def _float32(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def cast(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
        return forward(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})


def token_scores(model: Any, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    """Scores of texts, and of each of their tokens where the head is applied to every token.

    A hook reads the latter, so that the model's own forward runs, which sharding relies on.

    Args:
        model: Hugging Face sequence classifier.
        **inputs: Of its forward.

    Shapes:
        input_ids (B, L) -> (B, labels), (B, L, labels).
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        return model(**inputs).logits, None
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return logits, outputs[0] if outputs[0].shape[:-1] == inputs["input_ids"].shape else None


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


def use_fused_gelu(model: nn.Module) -> None:
    """Replace the tanh form of GELU written in Python by torch's own: one pass over memory instead of six."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
