"""A GPU that computes on the CPU and notes where the host waits for it: ``python -m tests.helpers.simulated_gpu``.

Its tensors are wrappers with a device of their own, registered as PyTorch lets other vendors register theirs. That
holds for the whole process, so it runs in one of its own and prints the waits of each optimizer step as JSON.
"""

import json
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from lit_ppo import callbacks
from lit_ppo.attention import kernels
from lit_ppo.experience import set_fields
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import count_good, make_module, make_trainer, texts
from tests.helpers.wrapped import OnDevice, asks_for, computed

NAME = "simulated"
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount", "is_nonzero"}
waits: list[str] = []  # since they were last read


class OnGPU(OnDevice):
    """A tensor of that device."""

    kind = NAME

    def tolist(self) -> Any:
        note("tolist")
        return super().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Simulated(TorchDispatchMode):
    """Tensors that are made on the device or copied to it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Backend(_DummyBackendModule):
    """What else PyTorch asks for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any) -> Tensor:
        return torch.zeros(0)

    def set_rng_state(self, state: Tensor, device: Any) -> None: ...


def note(what: str) -> None:
    """Keep an operation that waits, and the line of ours that runs it."""
    stack = [f for f in traceback.extract_stack() if "/lit_ppo/" in f.filename]
    ours = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in stack]
    waits.append(f"{what} in {ours[-1] if ours else 'a backward'}")


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, name = tree_leaves((args, kwargs)), function.__name__.partition(".")[0]
    mine = [x for x in leaves if isinstance(x, OnDevice)]
    asked = asks_for(kwargs, NAME)
    on_device = bool(mine) if asked is None else asked
    if asked is not None:
        if name == "_to_copy" and on_device != bool(mine) and not (on_device and kwargs.get("non_blocking")):
            note("a copy to the device" if on_device else "a copy from the device")
    elif name == "copy_" and len({isinstance(x, OnDevice) for x in args[:2]}) == 2:
        note("copy_")
    elif mine and any(isinstance(x, Tensor) and x.ndim and not isinstance(x, OnDevice) for x in leaves):
        raise RuntimeError(f"{name}: some tensors are on the device, some on the host")
    masks = name in ("index", "index_put", "index_put_") and any(
        x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )
    if mine and (name in WAITS or masks):
        note(f"{name} by a mask" if masks else name)
    return computed(function, args, kwargs, on_device=on_device, wrap=OnGPU)


def tensor(data: Any, *, device: Any = None, make: Any = torch.tensor, **kwargs: Any) -> Tensor:
    """``torch.tensor``, which copies in a way that nobody can answer for."""
    made: Tensor = make(data, **kwargs)
    if device is None or torch.device(device).type != NAME:
        return made
    note("torch.tensor")
    return OnGPU(made)


def move(ppo: Any, rows: Any) -> None:
    """Put models and experience on the device; optimizers keep their parameters."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    device = torch.device(NAME, 0)
    ppo.to(device)
    ppo.cpu = lambda: ppo  # where Lightning would take it when training ends
    for name in set_fields(rows):
        value = getattr(rows, name)
        if isinstance(value, Tensor):
            setattr(rows, name, value.to(device))
    rows.extras = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in rows.extras.items()}


def waits_of_steps(folder: Path, tricks: list[Any], **arguments: Any) -> list[list[str]]:
    """Where the host waits in each optimizer step of an update of several micro-batches."""
    steps: list[list[str]] = []
    adam = partial(torch.optim.AdamW, lr=1e-4)
    ppo = make_module(
        folder, generation={"max_new_tokens": 6}, samples_per_prompt=3, rewards=None, max_grad_norm=1.0,
        actor_optimizer=lambda p: adam(p), critic_optimizer=lambda p: adam(p), **arguments,
    )  # fmt: skip
    step = ppo.step_optimizers

    def noted(*args: Any) -> None:
        step(*args)
        steps.append([wait for wait in waits if "choice.py" not in wait])  # a kernel is tried once

    class Start(L.Callback):
        def on_minibatch_start(self, *_: Any) -> None:
            waits.clear()

    ppo.step_optimizers = noted  # type: ignore[method-assign]
    ppo.attach(make_trainer(folder, callbacks=[Start(), *tricks], max_steps=1))
    rows = ppo.rollout(["the film was", "a", "we saw it"])
    rows.scores = torch.tensor(count_good(rows.prompts, rows.responses))
    with Simulated(), patch.object(torch, "tensor", tensor):
        move(ppo, rows)
        ppo.step(rows)
    return steps


class Again(callbacks.AdvantageRegression):
    """Its earlier responses are those of the update itself, kept in host memory."""

    def on_advantages(self, trainer: L.Trainer, pl_module: Any, experience: Any) -> None:
        super().on_advantages(trainer, pl_module, experience)
        self._buffer.add(experience)
        assert not any(isinstance(x, OnDevice) for x in tree_leaves(list(self._buffer._kept)))


def main() -> None:
    """Steps with many tricks and SDPA, and with a kernel for packed rows and recomputed activations."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    with tempfile.TemporaryDirectory() as name:
        lms = [make_causal_lm(Path(name) / family, family, scale=4.0) for family in ("gpt2", "llama")]
        tricks: list[Any] = [
            callbacks.AdvantageNormalization(scope="minibatch"), callbacks.DualClip(), callbacks.ValueClipping(),
            callbacks.EntropyBonus(coef=0.01, target=1.0), callbacks.KLLoss(coef=0.1, kind="exact"),
            callbacks.ValueNormalization(), callbacks.KLEarlyStop(target=1e9), callbacks.Cockpit(every=1, best_of=0),
            callbacks.LearningRateAdaptation(target=0.1, minimum=1e-9),
        ]  # fmt: skip
        found = {"tricks": waits_of_steps(lms[0], tricks)}
        others: list[Any] = [callbacks.CounterfactualActions(n=2), callbacks.LeastSquaresCritic()]
        found["other tokens"] = waits_of_steps(lms[0], others)
        others = [callbacks.LeastSquaresCritic(), Again(n=2)]
        found["earlier responses"] = waits_of_steps(lms[0], others)
        found["text"] = waits_of_steps(lms[0], [callbacks.PTXLoss(texts(Path(name)), coef=0.1)])
        with (
            patch.object(kernels, "DEVICES", (NAME,)),
            patch.object(kernels, "DTYPES", (torch.float32,)),
            patch.object(kernels, "installed", lambda: iter([("plain", lambda: kernels.PLAIN)])),
        ):
            found["kernel"] = waits_of_steps(lms[1], [], activation_checkpointing=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
