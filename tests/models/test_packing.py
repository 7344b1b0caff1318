"""Packed rows give what each row gives alone, padding is never worked on, and families that cannot pack still fit."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from lit_ppo.attention import autocast
from lit_ppo.attention.choice import Heads
from lit_ppo.generation.config import neutral
from lit_ppo.models import packing
from lit_ppo.models.actor_critic import Actor
from lit_ppo.models.load import load_causal_lm, load_critic
from lit_ppo.models.packing import NAME, RealTokens, read_others, read_tokens, use_packing
from tests.helpers.tiny import make_causal_lm

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
OF_ONE_LENGTH = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
SHAPES = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "qwen2 with a sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "phi": ("phi", {}),
    "mistral with a window": ("mistral", {"sliding_window": 3}),
}
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 30,
}  # fmt: skip


def batch(side: str, extra: int = 0, rows: list[list[int]] = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on one side, or half on each, with ``extra`` more columns of padding."""
    width = max(map(len, rows)) + extra
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = {"left": width - len(row), "right": 0, "both": (width - len(row)) // 2}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = True
    return ids, mask


@pytest.fixture(params=SHAPES)
def model(request, tmp_path):
    family, overrides = SHAPES[request.param]
    path = make_causal_lm(tmp_path, family, scale=4.0, **overrides)
    loaded = AutoModelForCausalLM.from_pretrained(path).eval()
    loaded.requires_grad_(True)
    return loaded


@pytest.mark.parametrize(
    ("side", "extra", "rows", "filled"),
    [
        ("left", 3, ROWS, 0),
        ("right", 0, ROWS, 0),
        ("both", 3, ROWS, 0),
        ("left", 1, OF_ONE_LENGTH, 0),
        ("both", 3, ROWS, 2),
        ("left", 3, ROWS, 9),
        ("left", 1, OF_ONE_LENGTH, 9),
    ],
)
def test_states_and_gradients_are_those_of_each_row_alone(model, side, extra, rows, filled, monkeypatch):
    """``filled``: tokens to add to the 14 or 15 real ones; the rows of ``ROWS`` have padding for four."""
    alone = [model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows]
    torch.cat(alone).pow(3).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    use_packing(model)
    assert model.config._attn_implementation == NAME  # else the test would compare the stock path with itself
    monkeypatch.setattr(packing, "product_rows", lambda n, device: n + filled)
    ids, mask = batch(side, extra, rows)
    states, number = read_tokens(model.base_model, ids, mask)
    assert len(states) == mask.sum() + (min(filled, 4) if rows is ROWS else 0)
    states = states[number[mask]]
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-5, atol=1e-5)
    states.pow(3).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_tokens_are_numbered_row_by_row(side):
    ids, mask = batch(side)
    real = RealTokens.of(ids, mask)
    assert real.ids.tolist() == [token for row in ROWS for token in row]
    assert real.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 4]
    assert real.number[mask].tolist() == list(range(14))
    assert real.side_by_side()["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3, [1] * 5 + [0]]


def test_no_layer_sees_padding(tmp_path, monkeypatch):
    """14 real tokens in rows of 9: every linear layer works on 14."""
    actor = Actor(load_causal_lm("actor", str(make_causal_lm(tmp_path, "llama")), {}))
    seen = set()
    for module in actor.model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.add(inputs[0].shape[:-1].numel()))
    ids, mask = batch("left", extra=3)
    actor(ids, mask, target_mask=mask[:, -2:])
    assert seen == {14}


def test_under_autocast_padding_makes_up_a_number_of_tokens_that_products_share(tmp_path):
    """69 and 75 real tokens among 96 places: 96 tokens; 30 are 32. The code of their products is compiled once."""
    actor = Actor(load_causal_lm("actor", str(make_causal_lm(tmp_path, "llama")), {}))
    seen = []
    actor.model.base_model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[:-1].numel())
    )
    for lengths in ([32, 30, 7], [32, 11, 32], [16, 10, 4]):
        mask = torch.arange(32) >= 32 - torch.tensor(lengths).unsqueeze(1)
        with torch.autocast("cpu", torch.bfloat16):
            actor(torch.ones_like(mask, dtype=torch.long), mask, target_mask=mask[:, -2:])
    assert seen == [96, 96, 32]


def test_without_packing_rows_lie_side_by_side_cut_to_the_longest(tmp_path):
    """OPT counts positions from the mask, eager attention takes no packing: both are read padded, on the right."""
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, "gpt2"), attn_implementation="eager").eval()
    use_packing(model)
    assert model.config._attn_implementation == "eager"
    seen = []
    model.base_model.h[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:2]))
    states, _ = read_tokens(model.base_model, *batch("both", extra=4))
    alone = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ROWS]
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert seen[0] == (3, 6)


def test_a_family_whose_packed_states_differ_goes_without(tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, "gpt2", scale=4.0)).eval()
    monkeypatch.setattr(packing, "end_to_end", lambda x, taken, **_: x.flatten(0, 1)[taken.flip(0)].unsqueeze(0))
    use_packing(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_saved_says_nothing_of_packing(tmp_path, family):
    actor = Actor(load_causal_lm("actor", str(make_causal_lm(tmp_path / "a", family)), {}))
    actor.model.save_pretrained(tmp_path / "b")
    assert NAME not in (tmp_path / "b" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").config._attn_implementation == "sdpa"


def test_pythons_gelu_is_replaced_by_torchs_and_gives_the_same(tmp_path):
    path = make_causal_lm(tmp_path, "gpt2", scale=4.0)
    stock = AutoModelForCausalLM.from_pretrained(path).eval()
    critic = load_critic("critic", str(path), {})
    assert not any("NewGELU" in type(module).__name__ for module in critic.modules())
    assert any("NewGELU" in type(module).__name__ for module in stock.modules())
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(
        critic.backbone(input_ids=ids).last_hidden_state,
        stock.base_model(input_ids=ids).last_hidden_state,
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_family_whose_window_only_its_mask_knows_goes_without():
    """Qwen2-MoE's layers have the window, but do not tell their attention: longer rows are those of each row alone."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = _of_config(Qwen2MoeConfig(**SMALL, **sizes, use_sliding_window=True, sliding_window=3, max_window_layers=1))
    assert any(getattr(module, "sliding_window", None) == 3 for module in model.modules())
    alone = _alone(model)
    use_packing(model)
    assert model.config._attn_implementation == "sdpa"
    states, _ = read_tokens(model.base_model, *batch("left", extra=2))
    torch.testing.assert_close(states, alone, rtol=1e-5, atol=1e-5)
    ids, mask = batch("left")
    actions, wanted = torch.ones(3, 1, 1, dtype=torch.long), torch.ones(3, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"AdvantageRegression: Qwen2MoeModel .* \(only its mask knows its sliding wi"):
        read_others(model.base_model, ids[:, -2:], mask[:, -2:], actions, wanted)  # rows shorter than the window


def test_a_family_whose_layers_differ_in_size_packs():
    """Gemma 4 has wider heads in its layers of full attention; a configuration then names no size of all."""
    gemma = pytest.importorskip("transformers.models.gemma4")
    inputs = {"vocab_size_per_layer_input": 30, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0}
    kinds = ["sliding_attention", "full_attention"]
    config = gemma.Gemma4TextConfig(
        **SMALL, **inputs, head_dim=8, global_head_dim=16, sliding_window=3, layer_types=kinds
    )
    model = _of_config(config)
    alone = _alone(model)
    use_packing(model)
    assert model.config._attn_implementation == NAME
    assert model.base_model.lit_ppo_attention.heads == Heads(2, 1, 16)
    states, _ = read_tokens(model.base_model, *batch("left", extra=2))
    torch.testing.assert_close(states, alone, rtol=1e-5, atol=1e-5)


def _of_config(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def _alone(model):
    return torch.cat(
        [model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in ROWS]
    )


def test_a_family_with_layers_of_another_kind_goes_without(tmp_path):
    """Chunks are as long as no row that is tried: in a few tokens they look like full attention."""
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, "llama")).eval()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    use_packing(model)
    assert model.config._attn_implementation == "sdpa"
    model.config.layer_types = ["full_attention", "full_attention"]
    use_packing(model)
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize(("short", "dtype"), [(6, torch.float32), (5, torch.bfloat16)])
def test_a_cpu_attends_to_short_rows_in_float32_under_autocast(monkeypatch, short, dtype):
    """Short rows: softmax attention of the bf16 numbers in float64. Longer ones: the stock kernel, rounded to bf16."""
    monkeypatch.setattr(autocast, "SHORT", short)
    n, size = sum(map(len, ROWS)), 8
    draws = torch.randn(3, 1, 2, n, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packing.packed_attention(
            torch.nn.Module(), *draws, None, packing=RealTokens.of(*batch("right")).packing, is_causal=True
        )
    assert found.dtype == dtype
    expected, start = [], 0
    for row in ROWS:
        query, key, value = draws[:, 0, :, start : start + len(row)].double()
        later = torch.ones(len(row), len(row), dtype=torch.bool).triu(1)
        weights = (query @ key.mT / size**0.5).masked_fill(later, -torch.inf).softmax(-1)
        expected.append((weights @ value).transpose(0, 1))
        start += len(row)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # bf16 keeps 8 bits
    torch.testing.assert_close(found[0].double(), torch.cat(expected), rtol=tolerance, atol=tolerance)


def test_a_cpu_samples_from_a_cache_in_float32_under_autocast(monkeypatch, tmp_path):
    """Keys and values are converted once, after the prompt, and not for every token."""
    actor, dtypes = Actor(load_causal_lm("actor", str(make_causal_lm(tmp_path, "gpt2")), {})), []
    stock = autocast.sdpa_attention_forward

    def noted(module, query, key, value, *args, **kwargs):
        dtypes.append(value.dtype)
        return stock(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(autocast, "SHORT", 0)
    monkeypatch.setattr(autocast, "sdpa_attention_forward", noted)
    config = neutral(max_new_tokens=4, pad_token_id=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actor.generate(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool), config, [(0,)])
    layers = actor.model.config.num_hidden_layers
    assert dtypes == [torch.bfloat16] * layers + [torch.float32] * 3 * layers
