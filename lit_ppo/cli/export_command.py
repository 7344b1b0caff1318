"""``lit-ppo export``: the model of a checkpoint, in Hugging Face format."""

import argparse
import os
from pathlib import Path
from typing import Any, get_args

import yaml

from lit_ppo.cli.quick import Parser
from lit_ppo.cli.rebuild import build
from lit_ppo.models.export import checked_repository, push
from lit_ppo.models.lora import check_has_adapter
from lit_ppo.models.stored import Dtype
from lit_ppo.parallel.checkpoint_io import load_merged, read_summary
from lit_ppo.parallel.files import VERIFY
from lit_ppo.rewards.folders import folders_in
from lit_ppo.run.checkpoint import RUN
from lit_ppo.run.continuation import check_given
from lit_ppo.run.errors import CommandError
from lit_ppo.run.export import CARD, card_of, write_model
from lit_ppo.run.target import check_target


def export(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Arguments after ``export``.

    Raises:
        CommandError: An argument is missing or wrong, or the checkpoint cannot be exported.
    """
    parser = Parser(
        "lit-ppo export",
        description="Writes the model of a checkpoint. Runs no code that the checkpoint names, unless told to here.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", type=_path, required=True, help="The checkpoint.")
    parser.add_argument(
        "--output", type=_path, required=True, help="Folder for the model; a model that lit-ppo exported is replaced."
    )
    parser.add_argument("--adapter", action="store_true", help="Write only the adapter, for peft; else it is merged.")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="Of the weights; else that of the run's start.")
    parser.add_argument("--push_to_hub", metavar="NAME", help="Then push the folder to this repository on the hub.")
    parser.add_argument("--private", action="store_true", default=None, help="A new repository is private.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the code in the model's folder.")
    parser.add_argument(
        "--trust_class", action="append", default=[], metavar="NAME",
        help="Import and build this class of the checkpoint, such as my_module.MyModel; may be repeated.",
    )  # fmt: skip
    parser.add_argument("--verify", choices=("true", "false"), default="true", help="Compare it with its checksums.")
    given = parser.parse_args(arguments)
    if given.verify == "false":
        os.environ[VERIFY] = "0"
    where = f"--ckpt_path {given.ckpt_path}"
    if str(given.ckpt_path) in ("last", "auto") and not given.ckpt_path.exists():
        raise CommandError(
            f"{where}: export looks for no run; give a checkpoint's path, such as "
            "runs/version_0/checkpoints/step-000050.ckpt",
            exit_code=2,
        )
    check_given(str(given.ckpt_path), words="")
    config = config_of(given.ckpt_path)
    check_target(f"--output {given.output}", given.output, used=folders_in(config.get("model")))
    try:
        module = build(config, where=where, trust_remote_code=given.trust_remote_code, trusted=given.trust_class)
        _export(module, given)
    except ValueError as error:
        if "its own code" not in str(error):
            raise
        raise CommandError(
            f"{where}: its model comes with code of its own, and the checkpoint cannot allow to run it; if you trust "
            f"that code, add --trust_remote_code"
        ) from error


def _export(module: Any, given: argparse.Namespace) -> None:
    try:
        checked_repository("export", given.push_to_hub)
        check_has_adapter("export --adapter", module, given.adapter)
    except ValueError as error:
        raise CommandError(str(error), exit_code=2) from error
    checkpoint = load_merged(given.ckpt_path)
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    card = card_of(checkpoint.get(CARD))
    write_model(f"--output {given.output}", module, given.output, adapter=given.adapter, dtype=given.dtype, card=card)
    print(f"Model: {given.output}  (load it with from_pretrained)", flush=True)
    if given.push_to_hub is not None:
        push(f"export --push_to_hub {given.push_to_hub}", given.output, given.push_to_hub, given.private)


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a path")
    return Path(text)


def config_of(checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run that wrote the checkpoint: in it, or in the run folder.

    Raises:
        CommandError: There is none.
    """
    run = read_summary(checkpoint).get(RUN)
    config = run.get("config") if isinstance(run, dict) else None
    if config is None:
        beside = checkpoint.absolute().parent.parent / "config.yaml"
        if not beside.is_file():
            raise CommandError(
                f"--ckpt_path {checkpoint}: no configuration of its model in it, nor in {beside}; put the run's "
                "config.yaml there"
            )
        config = yaml.safe_load(beside.read_text(encoding="utf-8"))
    return config if isinstance(config, dict) else {}
