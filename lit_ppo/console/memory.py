"""``lit-ppo memory``: print what a run will need before it starts."""

import copy
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from lit_ppo.memory.estimate import estimate
from lit_ppo.memory.job import job_of
from lit_ppo.memory.sampling import notes as of_sampling
from lit_ppo.memory.shapes import config_of
from lit_ppo.memory.text import table
from lit_ppo.ppo.module import LitPPO
from lit_ppo.run.errors import CommandError


def say_memory(module: Any, config: dict[str, Any], stages: dict[str, dict[str, Any]]) -> None:
    """Print the estimate of a configuration.

    Args:
        module: The model of the configuration, which has built nothing yet.
        config: The full configuration, as plain values.
        stages: Those of its stages by name, in their order.

    Raises:
        CommandError: It is not a job of PPO.
    """
    if not isinstance(module, LitPPO):
        raise CommandError(
            f"memory: model {type(module).__name__}: only jobs of LitPPO are counted; give one, such as --config ppo",
            exit_code=2,
        )
    stand_ins = written_by(stages)
    settings = module.model_settings
    actor = config_of(f"{settings.owner}(actor", settings.actor, settings.model_kwargs, stand_ins)
    job, notes = job_of(config, getattr(actor.get_text_config(), "max_position_embeddings", None))
    notes += [f"{path} does not exist yet: counted as its stage will write it" for path in stand_ins]
    notes += of_sampling(module, job)
    if getattr(actor, "quantization_config", None) is not None:
        notes.append("the actor is quantised: counted as if it was not")
    print(table(estimate(module, job, stand_ins), module, job, notes), flush=True)


def written_by(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Configurations of the models that stages will write, by folder; of folders that do not exist yet.

    Args:
        stages: Full configurations by name, in their order.
    """
    found: dict[str, Any] = {}
    for stage in stages.values():
        arguments, folder = stage["model"]["init_args"], stage["export"].get("dirpath")
        source = arguments.get("model")
        if folder is None or source is None or Path(folder, "config.json").exists():
            continue
        if isinstance(source, dict):
            settings = source if "vocab_size" in source else {**source, "vocab_size": _vocabulary(stage)}
            config: Any = AutoConfig.for_model(**settings)
        else:
            config = copy.deepcopy(config_of("stage(model", source, arguments.get("model_kwargs") or {}, found))
        if stage["model"]["class_path"].endswith("RewardModel"):
            config.num_labels = 1
        found[folder] = config
    return found


def _vocabulary(stage: dict[str, Any]) -> int:
    """Tokens of the tokenizer of a model from scratch, which the stage's data may write."""
    path = str(stage["model"]["init_args"].get("tokenizer"))
    planned = ((stage.get("data") or {}).get("init_args") or {}).get("tokenizer_vocab_size")
    if planned is not None and not Path(path).exists():
        return int(planned)
    return len(AutoTokenizer.from_pretrained(path))
