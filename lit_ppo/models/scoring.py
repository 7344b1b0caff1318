"""The scoring head of a sequence classifier, in float32: one number a text, and bf16 would make many of them equal."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_ppo.device import exact_products


def score_in_float32(model: Any) -> Any:
    """Let the modules of a sequence classifier that follow its backbone compute in float32, also under autocast.

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


@torch.no_grad()
def check_scores_alone(where: str, model: Any) -> None:
    """Check that the score of a text is the same beside a longer one, where that can be tried.

    Some encoders mix all positions of a forward, padding included (FNet, Nystromformer).

    Args:
        where: Class, argument and value, for messages.
        model: Sequence classifier.

    Raises:
        ValueError: It is not.
    """
    config = model.config.get_text_config()
    if model.dtype not in (torch.float32, torch.float64):
        return  # rounding would differ as well
    pad, config.pad_token_id = config.pad_token_id, config.pad_token_id or 0
    ids = torch.tensor([i for i in range(2, 12) if i != config.pad_token_id][:8], device=model.device)
    rows = torch.stack([ids, ids.flip(0)]) % config.vocab_size
    rows[1, 3:] = config.pad_token_id
    mask = torch.ones_like(rows)
    mask[1, 3:] = 0
    try:
        with exact_products():
            together = model(input_ids=rows, attention_mask=mask).logits[1]
            alone = model(input_ids=rows[1:, :3], attention_mask=mask[1:, :3]).logits[0]
    except Exception:  # some need tokens of their own in every text
        return
    finally:
        config.pad_token_id = pad
    difference = float((together - alone).abs().max() / alone.abs().max().clamp(min=1e-3))
    if not difference < 1e-2:
        raise ValueError(
            f"{where}: a text's score depends on the texts beside it (relative difference {difference:.1e}); use "
            "batch_size=1"
        )


def _float32(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def cast(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
        return forward(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})
