"""Checks that a model family can be used as actor, critic or reward model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lit_ppo.device import exact_products
from lit_ppo.generation.config import neutral
from lit_ppo.generation.transformers import sample
from lit_ppo.models.head import HeadInputs
from lit_ppo.models.packing import stock_attention
from lit_ppo.shown import reason as reason_of

Forward = Callable[[Tensor, Tensor, Tensor], HeadInputs]
"""From ids, mask and target mask to the states and the head."""


def check_head(model: PreTrainedModel, head_inputs: Forward) -> None:
    """Compare states and head applied by hand with the stock model's logits on a few tokens.

    A hook makes the head's output 100 times larger for the comparison, so that soft-capping or scaling after the head
    shows even where the logits are small.

    Args:
        model: Causal LM.
        head_inputs: The training forward.

    Raises:
        ValueError: They differ, or the model has no linear head.
    """
    linear_head = model.get_output_embeddings()
    if not isinstance(linear_head, nn.Linear):
        raise ValueError(f"{type(model).__name__}: not supported, it has no linear language-model head")
    ids = torch.arange(6, device=model.device).reshape(2, 3) % linear_head.out_features
    mask = torch.tensor([[False, True, True], [True, True, True]], device=model.device)  # the first row is padded
    target_mask = torch.tensor([[False, True], [True, True]], device=model.device)
    handle = linear_head.register_forward_hook(lambda module, inputs, output: output * 100.0)
    try:
        with torch.no_grad():
            states, weight, bias = head_inputs(ids, mask, target_mask)
            ours = linear(states, weight, bias) * 100.0
            alone = [
                model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0] for row in (ids[:1, 1:], ids[1:])
            ]
            stock = torch.cat([alone[0][:1], alone[1][:2]])
    except Exception as error:
        raise _cannot(model, "run a padded row", error) from error
    finally:
        handle.remove()
    difference = float((ours.float() - stock.float()).abs().max() / stock.float().abs().max().clamp(min=1e-6))
    if not difference < (1e-4 if weight.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{type(model).__name__}: not supported, its logits are not its head's output "
            f"(relative difference {difference:.1e}); use a family like GPT-2, Llama or Qwen2"
        )


def check_sampling(model: PreTrainedModel, head_inputs: Forward) -> None:
    """Compare the logits that tokens are sampled from with those of the training forward.

    Two prompts of unequal length get the vocabulary's last token, until the longer one gets the first token and ends:
    a state that reads padding, or that cannot lose a row, shows.

    Args:
        model: Causal LM.
        head_inputs: The training forward.

    Raises:
        ValueError: They differ, or the model cannot sample.
    """
    head = model.get_output_embeddings()
    prompts = torch.arange(8, device=model.device).reshape(2, 4) % head.out_features
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]], device=model.device)
    last = 1.0 - 1e-9
    draws = torch.tensor([[last, last, last], [last, 0.0, last]], dtype=torch.float64)
    config = neutral(max_new_tokens=3, eos_token_id=0, pad_token_id=0, cache_implementation="dynamic")
    sampled: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, output: sampled.append(output[:, -1]))
    try:
        with torch.no_grad(), stock_attention(model):
            responses = sample(model, prompts, mask, config, draws).ids
    except Exception as error:
        raise _cannot(model, "sample prompts of unequal length", error) from error
    finally:
        handle.remove()
    real = torch.tensor([[step < len(row) for step in range(3)] for row in responses], device=model.device)
    ids = torch.tensor([row + [0] * (3 - len(row)) for row in responses], device=model.device)
    with torch.no_grad():
        trained = linear(*head_inputs(torch.cat([prompts, ids], 1), torch.cat([mask, real], 1), real)).float()
    # the first row is the first of a step's batch, the second one the last, and it leaves first
    theirs = torch.stack([sampled[step][-row] for row in range(2) for step in range(len(responses[row]))]).float()
    spread = (trained - trained.mean(-1, keepdim=True)).abs().max().clamp(min=1e-6)
    difference = float((trained - theirs).abs().max() / spread)
    if not difference < (1e-4 if model.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{type(model).__name__}: not supported, on rows of unequal length the log-probs of sampling are not those "
            f"of training (relative difference {difference:.1e}); use a family like GPT-2, Llama or Qwen2"
        )


def _cannot(model: PreTrainedModel, what: str, error: Exception) -> ValueError:
    reason = reason_of(error, 200)
    return ValueError(
        f"{type(model).__name__}: not supported, it cannot {what} ({reason}); use a family like GPT-2, Llama or Qwen2"
    )


def check_causal(backbone: PreTrainedModel) -> int:
    """Check that changing the last token does not change earlier states.

    Returns:
        Width of the states, which is not ``hidden_size`` everywhere (OPT-350m projects them).

    Raises:
        ValueError: They change: values would depend on tokens that come later.
    """
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=backbone.device)
    with torch.no_grad():
        states = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, :3].float()
    if not torch.allclose(states[0], states[1], rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"{type(backbone).__name__} reads later tokens (its attention is not causal): it cannot be a critic; "
            "give a causal model, such as the actor's"
        )
    return int(states.shape[-1])


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
