"""bf16-mixed where bf16 is slower: said with the number, before the first update, and nowhere else."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lit_ppo import LitSFT
from lit_ppo.parallel.bf16 import time_product
from tests.helpers.supervised import HOW_TESTS_USE_LIGHTNING, fit, text_batch
from tests.helpers.toys import make_data, make_module, make_trainer

CPU = torch.device("cpu")


def seconds(monkeypatch: pytest.MonkeyPatch, bf16: float, float32: float) -> list[torch.dtype]:
    """Measurements of these lengths; returns what is measured."""
    asked: list[torch.dtype] = []

    def measure(dtype: torch.dtype, device: torch.device) -> float:
        assert device == CPU
        asked.append(dtype)
        return {torch.bfloat16: bf16, torch.float32: float32}[dtype]

    monkeypatch.setattr("lit_ppo.parallel.bf16.time_product", measure)
    return asked


def test_a_device_on_which_bf16_is_slower_is_warned_about(tmp_path, tiny_lm, monkeypatch):
    """0.528 s against 0.004 s."""
    seconds(monkeypatch, 0.528, 0.004)
    module = make_module(tiny_lm)
    message = r"precision='bf16-mixed'\): bf16 matrix products take 132 times as long as float32 here .*use precision"
    with pytest.warns(UserWarning, match=message):
        make_trainer(tmp_path, precision="bf16-mixed", max_steps=0).fit(module, make_data(tmp_path))


@pytest.mark.parametrize("bf16", [0.0005, 0.0044])  # the second is noise
def test_a_device_on_which_bf16_is_faster_is_not(tmp_path, tiny_lm, monkeypatch, bf16):
    """Warnings are errors in these tests."""
    asked = seconds(monkeypatch, bf16, 0.004)
    make_trainer(tmp_path, precision="bf16-mixed", max_steps=0).fit(make_module(tiny_lm), make_data(tmp_path))
    assert set(asked) == {torch.bfloat16, torch.float32}


def test_nothing_is_measured_in_float32(tmp_path, tiny_lm, monkeypatch):
    asked = seconds(monkeypatch, 0.528, 0.004)
    make_trainer(tmp_path, max_steps=0).fit(make_module(tiny_lm), make_data(tmp_path))
    assert not asked


@HOW_TESTS_USE_LIGHTNING
def test_the_supervised_modules_say_it_too(tmp_path, tiny_lm, monkeypatch):
    seconds(monkeypatch, 0.528, 0.004)
    with pytest.warns(UserWarning, match="132 times as long"):
        fit(LitSFT(str(tiny_lm)), [text_batch([[3, 4]])], tmp_path, precision="bf16-mixed")


class Products(TorchFunctionMode):
    """Notes the dtype of each product's result."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.__matmul__ or function is torch.Tensor.matmul:
            self.dtypes.append(result.dtype)
        return result


@pytest.mark.parametrize(
    ("times", "best", "products"),
    [
        ([9.0, 9.1, 10.0, 10.15, 11.0, 11.005, 12.0, 12.1], 0.005, 4),
        ([9.0, 9.3], 0.3, 1),  # already long enough: no second one
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_of_a_few_products_counts_and_a_slow_one_is_not_repeated(dtype, times, best, products):
    ticks = iter(times)
    with Products() as seen, torch.autocast("cpu", dtype=torch.bfloat16):  # a caller's autocast changes nothing
        assert time_product(dtype, CPU, timer=lambda: next(ticks)) == pytest.approx(best)
    assert seen.dtypes == [dtype] * products
