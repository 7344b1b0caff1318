"""Families whose state is more than keys and values: sampled as trained, or refused."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_ppo.generation.config import neutral
from lit_ppo.models.actor_critic import Actor

SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")} | {
    f"linear_{kind}_head_dim": 8 for kind in ("key", "value")
}
LINEAR = {**HEADS, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], **DELTA}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
STATEFUL: dict[str, dict[str, Any]] = {
    "mamba": {**SIZES, "state_size": 8},
    "mamba2": {**SIZES, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "jamba": {
        **HEADS, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {**HEADS, **SSM, "attn_layer_indices": [1]},
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**LINEAR, **EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "falcon_h1": {**HEADS, **SSM, "mamba_d_ssm": 64, "head_dim": 8},
}  # fmt: skip
OFF = {"rwkv": {**SIZES, "attention_hidden_size": 32, "context_length": 64}, "minimax": LINEAR}


def make(family: str, sizes: dict[str, Any]) -> Any:
    special = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **special, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return model


@pytest.mark.parametrize("family", STATEFUL)
def test_rows_that_end_one_by_one_are_sampled_as_each_row_alone(family: str) -> None:
    """Log-probs of sampling are those of the stock model's forward on each row alone."""
    model = make(family, STATEFUL[family])
    rows = [[5, 6], [7, 8, 9, 10], [4, 5, 6], [11]] * 2
    ids = torch.tensor([[0] * (4 - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (4 - len(row)) + [True] * len(row) for row in rows])
    config = neutral(
        max_new_tokens=8, eos_token_id=list(range(20, 40)), pad_token_id=0, do_sample=True, temperature=1.0
    )
    with torch.no_grad():
        responses = Actor(model).generate(ids, mask, config, [(0, i) for i in range(8)], logprobs=True)
        assert len({len(row) for row in responses.ids}) > 2
        for row, response, logprobs in zip(rows, responses.ids, responses.logprobs, strict=True):
            stock = model(input_ids=torch.tensor([row + response])).logits[0, len(row) - 1 : -1].log_softmax(-1)
            expected = stock.gather(1, torch.tensor(response)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", OFF)
def test_a_family_that_samples_from_another_distribution_is_refused(family: str) -> None:
    """RWKV reads the padding before a prompt; MiniMax loses count of it when it decodes."""
    with pytest.raises(ValueError, match=r"ForCausalLM: not supported, on rows of unequal length the log-probs"):
        Actor(make(family, OFF[family]))
