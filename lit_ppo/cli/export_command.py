"""``lit-ppo export``: the model of a checkpoint, in Hugging Face format."""

import argparse
from pathlib import Path
from typing import Any, NoReturn, get_args

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lit_ppo.models.export import checked_repository, push
from lit_ppo.models.lora import check_has_adapter
from lit_ppo.models.stored import Dtype
from lit_ppo.parallel.checkpoint_io import AtomicCheckpointIO, read_summary
from lit_ppo.run.checkpoint import RUN
from lit_ppo.run.errors import CommandError
from lit_ppo.run.export import CARD, card_of, check_target, write_model


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"export: {message}; see lit-ppo export --help", exit_code=2)


def export(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Arguments after ``export``.

    Raises:
        CommandError: An argument is missing or wrong, or the checkpoint cannot be exported.
    """
    parser = _Parser("lit-ppo export", description="Writes the model of a checkpoint.", allow_abbrev=False)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="The checkpoint.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for the model; a model in it is replaced.")
    parser.add_argument("--adapter", action="store_true", help="Write only the adapter, for peft; else it is merged.")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="Of the weights; else that of the run's start.")
    parser.add_argument("--push_to_hub", metavar="NAME", help="Then push the folder to this repository on the hub.")
    parser.add_argument("--private", action="store_true", default=None, help="A new repository is private.")
    given = parser.parse_args(arguments)
    if not given.ckpt_path.exists():
        raise CommandError(f"--ckpt_path {given.ckpt_path}: no such checkpoint")
    check_target(f"--output {given.output}", given.output)
    module = build(config_of(given.ckpt_path))
    try:
        checked_repository("export", given.push_to_hub)
        check_has_adapter("export --adapter", module, given.adapter)
    except ValueError as error:
        raise CommandError(str(error), exit_code=2) from error
    checkpoint = load(given.ckpt_path)
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    card = card_of(checkpoint.get(CARD))
    write_model(module, given.output, adapter=given.adapter, dtype=given.dtype, card=card)
    print(f"Model: {given.output}  (load it with from_pretrained)", flush=True)
    if given.push_to_hub is not None:
        push(f"export --push_to_hub {given.push_to_hub}", given.output, given.push_to_hub, given.private)


def config_of(checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run that wrote the checkpoint: in it, or in the run folder.

    Raises:
        CommandError: There is none.
    """
    config = (read_summary(checkpoint).get(RUN) or {}).get("config")
    if config is None:
        beside = checkpoint.absolute().parent.parent / "config.yaml"
        if not beside.is_file():
            raise CommandError(
                f"--ckpt_path {checkpoint}: no configuration of its model in it, nor in {beside}; put the run's "
                "config.yaml there"
            )
        config = yaml.safe_load(beside.read_text(encoding="utf-8"))
    return dict(config)


def build(config: dict[str, Any]) -> Any:
    """Build the module of a configuration; of its models, only the actor is loaded.

    Raises:
        CommandError: It cannot be exported.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    module = parser.instantiate(parser.parse_object({"model": config["model"]})).model
    if not hasattr(module, "save_pretrained"):
        raise CommandError(f"{type(module).__name__} has no save_pretrained(dirpath): nothing to export")
    if hasattr(module, "only_actor"):
        module.only_actor()
    return module


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint with full weights; shards are merged."""
    if not path.is_dir():
        return AtomicCheckpointIO().load_checkpoint(path)
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    weights: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})
    with torch.no_grad():
        _load_state_dict(weights, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
    return {**read_summary(path), **weights}
