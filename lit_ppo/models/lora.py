"""Low-rank adapters (LoRA): a few weights trained beside a frozen model, which without them is the reference."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_ppo.generation.engine import Responses
from lit_ppo.models.actor_critic import Actor
from lit_ppo.models.export import share_weights
from lit_ppo.models.pretrained import adapter_base
from lit_ppo.shown import message_of, written
from lit_ppo.validate import boolean, integer, mapping, positive, refuse

FIELDS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
    "use_rslora",
)  # fmt: skip
CHECKS: dict[str, Callable[..., Any]] = {"r": integer, "lora_alpha": positive, "use_rslora": boolean}
NEUTRAL = {"lora_dropout": 0, "bias": "none"}  # may be named, as other people's settings do


def check_lora(argument: str, fields: Any) -> None:
    """Check what an adapter is to be made of.

    Args:
        argument: Class and argument, such as ``LitPPO(actor_lora``, for messages.
        fields: Of ``peft.LoraConfig``.

    Raises:
        ValueError: A field that would train other weights than an adapter's, add dropout or move the frozen ones.
        ImportError: peft is not installed.
    """
    owner, _, given = argument.partition("(")
    if not isinstance(fields, dict):
        refuse(owner, given, fields, "must be fields of peft.LoraConfig, such as {r: 16}")
    for name, value in mapping(owner, given, fields).items():
        if name not in FIELDS and (name not in NEUTRAL or value != NEUTRAL[name]):
            problem = f"{name}={written(value)} is not supported: the reference must be the same model without its "
            problem += f"adapter, and dropout is off in rollouts and updates; give {', '.join(FIELDS)}"
            refuse(owner, given, fields, problem)
        if name in CHECKS and value is not None:
            CHECKS[name](owner, f"{given}.{name}", value)
    if find_spec("peft") is None:
        raise ImportError(f"{argument}={fields!r}): needs peft; pip install 'lit-ppo[peft]', or leave it out")


def add_adapter(argument: str, model: PreTrainedModel, fields: dict[str, Any], seed: int) -> None:
    """Freeze a model and put an adapter into it that changes nothing yet.

    Args:
        argument: See :func:`check_lora`.
        model: Causal LM, or the backbone of one.
        fields: See :func:`check_lora`.
        seed: Of the adapter's random half.

    Raises:
        ValueError: peft cannot make it, or it would lie on the embeddings or the head.
    """
    from peft import LoraConfig, inject_adapter_in_model

    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    try:
        config = LoraConfig(**fields, fan_in_fan_out=transposed, task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            # what single layers of another kind need is set for them
            warnings.filterwarnings("ignore", message=r"fan_in_fan_out is set to")
            # not by model.add_adapter: some releases of transformers ask for one of peft that is not out yet
            inject_adapter_in_model(config, model)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{argument}={written(fields)}): {message_of(error)}; correct it") from error
    layers = _adapted_layers(model)
    if model.get_input_embeddings() in layers or model.get_output_embeddings() in layers:
        raise ValueError(
            f"{argument}={fields!r}): target_modules hold the embeddings or the language-model head, which must stay "
            "as they are; name other layers"
        )
    config.base_model_name_or_path = model.name_or_path
    model._hf_peft_config_loaded = True
    model.eval()


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside this the model computes as if it had no adapter."""
    layers = _adapted_layers(model)
    for layer in layers:  # enable_adapters(False) would also freeze the adapter, in the midst of its training
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _adapted_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def save_adapter(
    model: PreTrainedModel, weights: dict[str, Tensor] | None, dirpath: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write an adapter as ``peft`` reads it. It names its base model by hub name or absolute path.

    Args:
        model: With an adapter.
        weights: Full weights of the adapter, where the model is sharded; None: those of the model.
        dirpath: Folder; made if it does not exist.
        dtype: Of the written weights; None: as they are, which is float32 as in ``peft``.
    """
    if weights is None:
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    named = {
        f"base_model.model.{name.replace('.default', '')}": x.contiguous().to(dtype or x.dtype)
        for name, x in weights.items()
    }
    config = copy(model.peft_config["default"])
    base = config.base_model_name_or_path
    if base and Path(base).is_dir():
        config.base_model_name_or_path = str(Path(base).absolute())
    for field, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, field, sorted(value))  # the same file from every process
    config.save_pretrained(str(dirpath))
    save_file(named, Path(dirpath) / "adapter_model.safetensors", metadata={"format": "pt"})
    share_weights(Path(dirpath))


def merged(
    model: PreTrainedModel, weights: dict[str, Tensor] | None, load: Callable[[], PreTrainedModel]
) -> PreTrainedModel:
    """A second model, with the adapter added to its weights.

    Args:
        model: With an adapter.
        weights: See :func:`save_adapter`.
        load: Loads the same model without adapter.
    """
    from peft import PeftModel

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")  # peft asks for it
        save_adapter(model, weights, folder)
        full: PreTrainedModel = PeftModel.from_pretrained(load(), folder).merge_and_unload()
    return full


class WithoutAdapter:
    """An actor without its adapter, as the reference. It is not a module, so its weights are counted and saved once.

    Args:
        actor: With an adapter.
    """

    def __init__(self, actor: Actor) -> None:
        self.actor = actor

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model with its adapter."""
        return self.actor.model

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with adapter_off(self.actor):
            return self.actor(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Responses:
        """Sample responses; see :class:`lit_ppo.generation.engine.Decoder`."""
        with adapter_off(self.actor):
            return self.actor.generate(*args, **kwargs)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the actor."""
        return self.actor.named_parameters()


def check_has_adapter(where: str, module: object, adapter: bool) -> None:
    """Check that a module which is to export an adapter trains one.

    Args:
        where: Class or method and argument, for messages.
        module: The module.
        adapter: Whether to export an adapter.

    Raises:
        ValueError: It trains none, or one on top of another.
    """
    settings = getattr(module, "model_settings", None)
    if adapter and getattr(settings, "actor_lora", None) is None:
        raise ValueError(
            f"{where}: {type(module).__name__} trains no adapter; leave it out, or give LitPPO an actor_lora"
        )
    if adapter and settings is not None and adapter_base(settings.actor, settings.model_kwargs) is not None:
        raise ValueError(
            f"{where}: the actor {settings.actor!r} is itself an adapter, merged into its base model, and no folder "
            "holds that model; leave it out, and the full model is written"
        )
