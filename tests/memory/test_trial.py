"""Before the first update, the largest shapes are tried as if optimizers had their states."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from lit_ppo.memory import resident
from lit_ppo.models.actor_critic import Actor, Critic
from lit_ppo.ppo import preflight
from tests.helpers.toys import make_data, make_module, make_trainer

LORA = {"r": 2, "target_modules": "all-linear"}


class Allocator:
    """In place of ``torch`` in the module that reserves memory: notes each buffer, and whether it is still there."""

    uint8, cuda, Tensor = torch.uint8, torch.cuda, torch.Tensor

    def __init__(self) -> None:
        self.buffers: list[tuple[int, Any]] = []

    def empty(self, size: int, **options: Any) -> torch.Tensor:
        made = torch.empty(size, **options)
        self.buffers.append((made.nbytes, weakref.ref(made)))
        return made

    @property
    def taken(self) -> int:
        """Bytes at this moment."""
        return sum(size for size, buffer in self.buffers if buffer() is not None)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_states_are_reserved_while_the_largest_shapes_are_tried(
    tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    """7 prompts of up to 4 tokens, 3 samples, 10 new tokens: 70 tokens hold 5 of 21 rows; 2 of 5 rows in a forward."""
    allocator, seen = Allocator(), []
    monkeypatch.setattr(resident, "torch", allocator)
    monkeypatch.setattr(resident, "LIMITED", ("cpu",))
    monkeypatch.setattr(preflight, "LIMITED", ("cpu",))

    def noting(model: Any, name: str) -> None:
        function = getattr(model, name)

        def noted(self: Any, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
            if allocator.buffers and allocator.taken:  # not the first prompt, and not later
                seen.append((f"{model.__name__}.{name}", *ids.shape, allocator.taken))
            return function(self, ids, *args, **options)

        monkeypatch.setattr(model, name, noted)

    noting(Actor, "generate")
    noting(Actor, "forward")
    noting(Critic, "forward")
    adam = {f"{name}_optimizer": lambda p: AdamW(p, lr=1e-5) for name in ("actor", "critic")}
    module = make_module(
        lm, samples_per_prompt=3, rollout_batch_tokens=70, micro_batch_size=2, actor_lora=lora, critic_lora=lora, **adam
    )
    make_trainer(tmp_path, max_steps=0).fit(module, make_data(tmp_path))
    trained = [p for p in module.parameters() if p.requires_grad]
    states = 8 * sum(p.numel() for p in trained) + 4 * len(trained)
    assert seen == [
        ("Actor.generate", 5, 4, states), ("Actor.generate", 5, 1, states),
        ("Actor.forward", 2, 14, states), ("Actor.forward", 2, 14, states),
        ("Critic.forward", 2, 14, states), ("Critic.forward", 2, 14, states),
    ]  # fmt: skip
    assert allocator.taken == 0
    assert all(p.grad is None for p in module.parameters())


def test_nothing_is_reserved_on_a_cpu(tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator()
    monkeypatch.setattr(resident, "torch", allocator)
    make_trainer(tmp_path, max_steps=0).fit(make_module(lm), make_data(tmp_path))
    assert [size for size, _ in allocator.buffers] == [0]


@pytest.mark.parametrize(("where", "phase"), [("generate", "rollout"), ("forward", "update")])
def test_a_shape_that_does_not_fit_ends_the_run_before_it_starts(
    tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch, where: str, phase: str
) -> None:
    monkeypatch.setattr(resident, "LIMITED", ("cpu",))
    monkeypatch.setattr(preflight, "LIMITED", ("cpu",))
    function = getattr(Actor, where)

    def full(self: Any, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
        return function(self, ids, *args, **options)

    monkeypatch.setattr(Actor, where, full)
    module = make_module(lm)
    with pytest.raises(torch.OutOfMemoryError, match=rf"out of memory in the {phase}; set it to \d or less"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path, batch_size=6))
    assert module.rollouts == 0
