"""The parser of the command: Lightning's, with configuration files in layers."""

from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser

from lit_ppo.cli.layers import layers


class LayeredParser(LightningArgumentParser):
    """A parser whose configuration files may have a ``base``.

    The parser's own nested ``config`` key merges plain values only: a class of the lower file keeps its arguments.
    """

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = _LayeredConfigFile
        return super().add_argument(*args, **kwargs)


class _LayeredConfigFile(ActionConfigFile):
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        files = layers(values)
        for file in files:
            self.apply_config(parser, cfg, self.dest, file)
            if len(files) > 1:
                cfg.pop("base", None)
