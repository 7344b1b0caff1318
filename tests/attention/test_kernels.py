"""Packed rows through a kernel for rows of any length give what each row gives alone, and only where a kernel works."""

import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from lit_ppo.activations import checkpoint_activations
from lit_ppo.attention import choice, kernels
from lit_ppo.attention.choice import Heads, kernel_for
from lit_ppo.models.actor_critic import Actor
from lit_ppo.models.load import load_causal_lm, load_critic
from lit_ppo.models.packing import NAME, read_tokens, stock_attention, use_packing
from lit_ppo.parallel.sharding import blocks
from tests.helpers.kernels import flash_attn_varlen_func, kernel_on_cpu
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_module

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18], [19]]
CPU = torch.device("cpu")
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "llama with groups": ("llama", {}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "phi": ("phi", {}),
}
GEMMA = {"sliding_window": 3, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 20, "head_dim": 8}


@pytest.fixture(autouse=True)
def _no_choice_before() -> Iterator[None]:
    kernel_for.cache_clear()
    choice._say.cache_clear()
    yield
    kernel_for.cache_clear()


def batch() -> tuple[Tensor, Tensor]:
    """ROWS padded on both sides."""
    ids, mask = torch.zeros(4, 8, dtype=torch.long), torch.zeros(4, 8, dtype=torch.bool)
    for i, row in enumerate(ROWS):
        start = (8 - len(row)) // 2
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = torch.tensor(row), True
    return ids, mask


def alone(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Each row by itself through the stock model: states, and gradients of a sum."""
    states = torch.cat([model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ROWS])
    states.pow(3).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return states.detach(), gradients


def check(model: Any, expected: tuple[Tensor, dict[str, Tensor]], calls: list[Any]) -> None:
    with torch.no_grad():  # the first use also tries the kernel
        read_tokens(model.base_model, *batch())
    calls.clear()
    states, _ = read_tokens(model.base_model, *batch())
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(states, expected[0], rtol=1e-5, atol=1e-5)
    states.pow(3).sum().backward()
    for name, gradient in expected[1].items():
        found: Any = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["flash_attention_2", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_states_and_gradients_are_those_of_each_row_alone(tmp_path: Path, shape: str, name: str) -> None:
    family, overrides = SHAPES[shape]
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, family, scale=4.0, **overrides)).eval()
    expected = alone(model)
    use_packing(model)
    with kernel_on_cpu(name) as calls:
        check(model, expected, calls)


def test_a_kernel_that_the_user_names_caps_logits_as_the_model_does(tmp_path: Path) -> None:
    """SDPA does not: without the kernel rows are read padded by eager attention."""
    path = make_causal_lm(tmp_path, "gemma2", scale=4.0, **GEMMA)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    expected = alone(model)
    model.config._attn_implementation = "flash_attention_2"
    use_packing(model)
    states, _ = read_tokens(model.base_model, *batch())
    torch.testing.assert_close(states, expected[0], rtol=1e-5, atol=1e-5)
    with kernel_on_cpu() as calls:
        check(model, expected, calls)
        assert {kwargs["softcap"] for _, kwargs in calls} == {0.5}
        assert {kwargs.get("window_size") for _, kwargs in calls} == {None, (2, 0)}
        with stock_attention(model):
            assert model.config._attn_implementation == "flash_attention_2"
    with stock_attention(model):
        assert model.config._attn_implementation == "eager"
    kernel = kernels.Kernel("one without", kernels.plain)
    with pytest.raises(ValueError, match=r"'one without': does not take this model's softcap"):
        choice.attend(kernel, None, *torch.ones(3, 1, 2, 4, 8), (None, 4), None, {"softcap": 0.5})


def test_logprobs_values_and_gradients_are_those_of_the_stock_model(tmp_path: Path) -> None:
    path = str(make_causal_lm(tmp_path, "llama", scale=4.0))
    actor, critic = Actor(load_causal_lm("actor", path, {})), load_critic("critic", path, {})
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([[0] * (6 - len(row)) + row for row in ROWS[:3]])
    mask = torch.tensor([[False] * (6 - len(row)) + [True] * len(row) for row in ROWS[:3]])
    with kernel_on_cpu() as calls:
        logprobs, _ = actor(ids, mask, target_mask=mask[:, -2:])
        values = critic(ids, mask, target_mask=mask[:, -2:])
        logprobs.sum().backward()
    assert len(calls) >= 4
    expected, states = [], []
    for row in ROWS[:3]:
        output = stock(input_ids=torch.tensor([row]), output_hidden_states=True)
        expected.append(output.logits[0].log_softmax(-1)[[-3, -2], row[-2:]])
        states.append(output.hidden_states[-1][0, -3:-1])
    torch.testing.assert_close(logprobs, torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, torch.stack(states) @ critic.value_head.weight[0], rtol=1e-5, atol=1e-5)
    torch.stack(expected).sum().backward()
    for ours, theirs in zip(actor.model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_a_kernel_gets_16_bit_numbers_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, "llama")).eval()
    use_packing(model)
    exact, _ = read_tokens(model.base_model, *batch())
    with kernel_on_cpu(dtypes=kernels.DTYPES) as calls:
        states, _ = read_tokens(model.base_model, *batch())
        assert states.equal(exact)
        assert not calls
        assert caplog.messages == [
            "LitPPO: attention over rows side by side, padded: kernels for packed rows take 16-bit numbers only; use "
            "precision='bf16-mixed'"
        ]
        with torch.autocast("cpu", torch.bfloat16):
            states, _ = read_tokens(model.base_model, *batch())
        assert {x.dtype for args, _ in calls for x in args[:3]} == {torch.bfloat16}
    torch.testing.assert_close(states, exact, rtol=0, atol=2e-2)  # bf16 has 8 bits; 0.007 off where seen
    assert caplog.messages[1:] == ["LitPPO: attention over packed rows by flash_attention_2"]


def test_a_kernel_that_fails_or_is_wrong_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One raises, one has no gradient for grouped keys, one counts the window without the token itself."""
    caplog.set_level("INFO")

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    def without_gradients(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        return flash_attn_varlen_func(q, k.detach(), v, **kwargs)

    def narrow(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        left, right = kwargs.get("window_size", (-1, -1))
        return flash_attn_varlen_func(q, k, v, **{**kwargs, "window_size": (max(left - 1, -1), right)})

    def kernel(function: Any) -> kernels.Kernel:
        function.__signature__ = inspect.signature(flash_attn_varlen_func)
        return kernels.of_flash(function.__name__, function)

    named = [(function.__name__, partial(kernel, function)) for function in (broken, without_gradients, narrow)]
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "installed", lambda: iter(named))
    assert kernel_for(None, CPU, torch.bfloat16, Heads(4, 2, 8)) is None
    (message,) = caplog.messages
    assert "side by side, padded, by SDPA (broken: " in message
    assert "no kernel image is available" in message
    assert "without_gradients: " in message
    assert "narrow: RuntimeError: its output with a window of 16 is off by" in message
    kernel_for.cache_clear()
    named.append(("plain", lambda: kernels.PLAIN))
    found = kernel_for(None, CPU, torch.bfloat16, Heads(4, 2, 8))
    assert found is not None
    assert found.extras is None  # SDPA would ignore them
    monkeypatch.setattr(kernels, "flash", lambda asked: kernel(broken))
    with pytest.raises(
        ValueError, match=r"attn_implementation='flash_attention_3': does not work on this device \(.*no"
    ):
        kernel_for("flash_attention_3", CPU, torch.bfloat16, Heads(4, 2, 8))


def test_the_trial_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    with kernel_on_cpu(), torch.inference_mode():
        assert kernel_for(None, CPU, torch.float32, Heads(4, 2, 8)) is not None
    assert torch.get_rng_state().equal(before)


def test_recomputed_blocks_go_by_the_kernel_too(tmp_path: Path) -> None:
    path, gradients = str(make_causal_lm(tmp_path, "llama", scale=4.0)), []
    ids, mask = batch()
    for recompute in (False, True):
        actor = Actor(load_causal_lm("actor", path, {}))
        if recompute:
            checkpoint_activations(actor)
        with kernel_on_cpu() as calls:
            kernel_for(None, CPU, torch.float32, Heads(2, 1, 8))
            calls.clear()
            logprobs, entropy = actor(ids[:3], mask[:3], target_mask=mask[:3] & (mask[:3].cumsum(1) > 1))
            (logprobs.sum() + entropy.sum()).backward()
        assert len(calls) == (4 if recompute else 2)
        gradients.append([p.grad for p in actor.parameters()])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch itself
def test_a_block_with_a_kernel_is_one_compiled_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, "llama", scale=4.0)).eval()
    use_packing(model)
    expected, _ = read_tokens(model.base_model, *batch())
    torch._dynamo.reset()
    for block in blocks(model):
        block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "DTYPES", (torch.float32,))
    monkeypatch.setattr(kernels, "installed", lambda: iter([("plain", lambda: kernels.PLAIN)]))
    states, _ = read_tokens(model.base_model, *batch())
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    states.sum().backward()


def test_torchs_kernel_takes_what_it_is_given() -> None:
    """Its own function on tensors without storage: shapes, groups, window and gradients; not its numbers."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="from torch 2.10")
    names = [name for name, _ in kernels.installed()]
    assert names[-1:] == ["torch.nn.attention.varlen"]
    with FakeTensorMode():
        query, key, value = (torch.empty(9, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2))
        starts = torch.empty(3, dtype=torch.int32)
        for window in (None, 4):
            output = kernels.of_torch(varlen.varlen_attn).attend(query, key, value, starts, 6, scale=0.1, window=window)
            assert output.shape == (9, 4, 8)
            output.sum().backward()
            assert key.grad is not None


def test_a_flash_kernel_that_is_not_installed_is_refused_with_the_argument(tiny_lm: Path) -> None:
    module = make_module(tiny_lm, model_kwargs={"attn_implementation": "flash_attention_2"})
    with pytest.raises(ValueError, match=r"LitPPO\(actor=.*attn_implementation.*flash_attention_2.*leave"):
        module.configure_model()


def test_samples_of_an_asked_kernel_use_it_only_where_it_runs(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, "llama")).eval()
    model.config._attn_implementation = "flash_attention_2"
    use_packing(model)
    assert model.config._attn_implementation == NAME
    with stock_attention(model):
        assert model.config._attn_implementation == "sdpa"
    with kernel_on_cpu(), stock_attention(model):
        assert model.config._attn_implementation == "flash_attention_2"
    assert model.config._attn_implementation == NAME
