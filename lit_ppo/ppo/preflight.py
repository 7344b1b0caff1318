"""Before the first update: try what would fail later."""

import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_ppo.activations import SHARE, checkpoint_activations, free_bytes, kept_bytes
from lit_ppo.device import is_out_of_memory
from lit_ppo.engines.next_rollout import try_engine
from lit_ppo.experience import Minibatch
from lit_ppo.generation.distribution import reshaping_fields
from lit_ppo.memory.advice import explain_memory
from lit_ppo.memory.resident import LIMITED, Resident, reserved
from lit_ppo.memory.trial import longest_micro_batch, try_rollout
from lit_ppo.models.actor_critic import actor_forward, critic_forward
from lit_ppo.models.positions import check_length
from lit_ppo.optim.precision import apply_matmul_precision, use_bfloat16_weights
from lit_ppo.optim.settings import restore_settings
from lit_ppo.parallel.checkpoint_io import use_atomic_checkpoints
from lit_ppo.parallel.loops import use_exact_loops
from lit_ppo.parallel.ranks import greatest, n_ranks
from lit_ppo.parallel.sharding import shards
from lit_ppo.parallel.trainer import check_disk, check_trainer
from lit_ppo.ppo.collect import score
from lit_ppo.ppo.evaluate import validate_before_training
from lit_ppo.ppo.metrics import forget_last_update
from lit_ppo.ppo.optimize import accumulate, add_logprobs
from lit_ppo.ppo.prompts import check_batch, check_end_of_turn
from lit_ppo.ppo.settings import check_moving_reference
from lit_ppo.rewards import source_names
from lit_ppo.shown import message_of
from lit_ppo.validate import refuse

RECOMPUTE_ON = LIMITED  # devices on which activations are recomputed where they do not fit


def setup(module: Any, stage: str) -> None:
    """Check the Trainer; Lightning's hook. Callbacks have checked theirs before."""
    if module.loop and module.loop.waiting:
        module.loop.end_here()
    if stage == "fit" and module.rewards is None and not module.loop:
        refuse(module, "rewards", None, "fit has nothing to score with; give rewards, or score in a loop of your own")
    # all models are always in eval mode: dropout is off in rollouts and updates
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    # a loop of the user's own needs that hook
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
    # this one appears when every step of the first update was skipped
    warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
    use_atomic_checkpoints(module.trainer)
    strategy, precision = module.trainer.strategy, module.trainer.precision
    check_trainer(module.trainer)
    use_exact_loops(module.trainer)
    dtype = module.model_settings.reference_dtype
    if precision not in ("32-true", "64-true", "bf16-mixed", "bf16-true"):
        refuse("Trainer", "precision", precision, "weights are kept in float32; use 'bf16-mixed'")
    trained = [name for name in module.factories if name == "actor" or module.model_settings.critic is not None]
    factories = {f"{name}_optimizer": module.factories[name][0] for name in trained}
    module.model_settings.bfloat16_weights = use_bfloat16_weights(module, module.trainer, factories)
    if precision == "64-true" and dtype == "bfloat16":
        problem = "Trainer(precision='64-true') makes every model float64; use 'float32' or another precision"
        refuse(module, "reference_dtype", dtype, problem)
    if precision == "64-true" and shards(strategy):
        refuse("Trainer", "precision", precision, "models are sharded in float32; use '32-true'")
    apply_precision(module, strategy.root_device.type, precision, sharded=shards(strategy))
    if isinstance(strategy, DDPStrategy):
        # the actor's backward leaves the critic's parameters without gradients, and the other way round
        strategy._ddp_kwargs["find_unused_parameters"] = True


def apply_precision(module: Any, kind: str, precision: str, *, sharded: bool) -> None:
    """Apply what depends on the kind of device and say so; nothing by default on a CPU.

    Args:
        module: The LitPPO.
        kind: Of device, such as ``cuda``.
        precision: The Trainer's.
        sharded: Models are sharded, and the weights of a shard need one dtype.
    """
    apply_matmul_precision(module, module.matmul_precision, kind)
    settings = module.model_settings
    by_default = settings.reference_dtype is None and not module.checkpoint_reference
    bf16 = precision in ("bf16-mixed", "bf16-true")
    settings.halve_frozen = kind == "cuda" and bf16 and by_default and not sharded
    settings.halve_reference = settings.bfloat16_weights and by_default
    if settings.bfloat16_weights:
        kept = "actor, critic and reference" if settings.halve_reference else "actor and critic"
        rank_zero_info(f"Trainer(precision='bf16-true'): {kept} are kept in bfloat16, the value head in float32")
    if settings.halve_frozen:
        rank_zero_info(
            "LitPPO(reference_dtype=None): linear layers of frozen models (reference, reward models, LoRA bases) are "
            f"kept in bfloat16, as {precision} computes; 'float32' keeps them in float32"
        )


def on_fit_start(module: Any) -> None:
    """Try what would fail later, before the first rollout; Lightning's hook."""
    with module.trainer.precision_plugin.forward_context():  # steps run in it, Lightning's hooks do not
        _preflight(module, module.trainer)


def _preflight(module: Any, trainer: L.Trainer) -> None:
    data: Any = getattr(trainer, "datamodule", None)
    check_batch(module, module.minibatch_size, module.samples_per_prompt, getattr(data, "batch_size", None))
    check_disk(trainer, module)
    if module.checkpoint_reference:
        check_moving_reference(module.model_settings, module.reference)
    check_loggers(trainer.loggers, [*module.source_names, *source_names(module.eval_rewards)])
    filters = reshaping_fields(module.actor.model, module.generation, module.model_settings.generation)
    if filters:
        rank_zero_warn(
            f"LitPPO(generation): {', '.join(filters)} sample from another distribution than the one whose log-probs "
            "PPO compares; leave them out unless you mean it"
        )
    lengths = getattr(data, "prompt_lengths", None) or {1}
    check_length(module.models, sorted(lengths))
    if module.sampler is not None:
        try_engine(module, trainer)
    for split in ("train", "val"):
        first = data.peek(split) if hasattr(data, "peek") else None
        if first is not None:
            check_end_of_turn(module, first)
            try_prompts(module, split, first)
    try_largest(module, max(lengths), getattr(data, "batch_size", None))


def on_train_start(module: Any) -> None:
    """Apply the learning rates of the configuration to a resumed run, then measure where training starts."""
    optimization, trainer = module.optimization, module.trainer
    if isinstance(trainer.train_dataloader, list | tuple | dict):
        kind, problem = (
            type(trainer.train_dataloader).__name__,
            "give one loader, such as DataLoader(batches, batch_size=None)",
        )
        refuse("Trainer.fit", "train_dataloaders", kind, f"Lightning reads it as several loaders; {problem}")
    if optimization.resumed is not None:
        settings, states = optimization.resumed
        restore_settings(trainer, optimization.built, settings, states, optimization.updates)
        optimization.resumed = None
    validate_before_training(trainer)


def on_train_batch_start(module: Any, batch: Any, batch_idx: int) -> None:
    """Drop what the last update logged. A loop of the user's own has done so before its rollout."""
    if not module.loop:
        forget_last_update(module.trainer)


def check_loggers(loggers: list[Any], names: list[str]) -> None:
    """Refuse a logger that would fail at the first update, or the first validation.

    Args:
        loggers: The Trainer's.
        names: Names of several rewards. Each is logged as ``.../score/<name>``, beside ``.../score``.

    Raises:
        ValueError: Names the logger.
    """
    for logger in loggers:
        uri = str(getattr(logger, "_tracking_uri", "sqlite:"))  # only MLFlowLogger has one
        if names and (uri.startswith("file:") or ":" not in uri):
            refuse(
                logger, "tracking_uri", uri,
                f"a file store, in which val/score cannot be both a metric and the folder of val/score/{names[0]}; "
                "use a database, such as sqlite:///mlflow.db",
            )  # fmt: skip


def try_prompts(module: Any, split: str, prompts: Any) -> None:
    """Sample and score one response per prompt.

    Raises:
        ValueError: This failed; says in which data.
    """
    try:
        experience = module.rollout(prompts, samples_per_prompt=1, logprobs=False, stream="preflight")
        if module.rewards is not None:
            module.score(experience)
        if split == "val" and module.eval_rewards is not None:
            score(module.eval_rewards, experience, timeout=module.reward_timeout)
    except Exception as error:
        if isinstance(error, RuntimeError):
            explain_memory(module, error, "rollout", "")
        raise ValueError(f"first {split} prompt: {message_of(error, 2000)}") from error


def rows_of_a_step(module: Any) -> int:
    """Responses in an optimizer step, with earlier ones that a callback adds."""
    return int(module.minibatch_size * (1 + module.replay))


def try_largest(module: Any, n_prompt: int, n_prompts: int | None) -> None:
    """Try the largest rollout and the largest micro-batches, with the memory of optimizer states taken.

    Unless the user has decided, a GPU on which a micro-batch does not fit recomputes activations. One process tries;
    several, of which one alone could fail, compare what is kept with the free memory.

    Args:
        module: The LitPPO.
        n_prompt: Tokens of the longest prompt.
        n_prompts: Prompts of an update; None: no rollout is tried.
    """
    micro = longest_micro_batch(module.models, n_prompt, rows_of_a_step(module), **module.limits)
    undecided = module.model_settings.activation_checkpointing is None and module.device.type in RECOMPUTE_ON
    if undecided and n_ranks() > 1 and greatest(int(_keeps_too_much(module, micro))):
        _recompute(module, micro)
    phase, detail, taken = "update", "", 0
    try:
        with reserved(module) as taken:
            if n_prompts is not None and module.sampler is None and module.device.type in LIMITED:
                phase = "rollout"
                try_rollout(module, n_prompts, n_prompt)
            if module.n_actions or module.n_critic_states:
                phase, detail = "rollout", "log-probs"
                try_scoring(module, micro, n_prompts or 1)
            phase, detail = "update", ""
            try_update(module, micro)
    except RuntimeError as error:
        if not (phase == "update" and undecided and n_ranks() == 1 and is_out_of_memory(error)):
            explain_memory(module, error, phase, detail, taken)
            raise
    else:
        return
    module.optimization.zero_gradients(module)
    _recompute(module, micro)
    try_largest(module, n_prompt, None)


@torch.no_grad()
def try_scoring(module: Any, micro: Minibatch, n_prompts: int) -> None:
    """The forwards behind a rollout, with what callbacks ask for, on each rank.

    Args:
        module: The LitPPO.
        micro: Its largest micro-batch.
        n_prompts: Of an update.
    """
    share = -(-n_prompts * module.samples_per_prompt // n_ranks())
    n_rows = len(micro) if any(module.limits.values()) else max(len(micro), share)
    rows = micro.select([row % len(micro) for row in range(n_rows * n_ranks())])
    vocabulary = module.actor.model.config.get_text_config().vocab_size
    for name in ("prompt_ids", "response_ids"):  # different tokens: equal ones would hide what a critic reads wrongly
        ids = getattr(rows, name)
        setattr(rows, name, torch.arange(ids.numel(), device=ids.device).view(ids.shape) % vocabulary)
    add_logprobs(module, module.models, rows, trains=True)


def try_update(module: Any, micro: Minibatch) -> None:
    """Forward and backward of a micro-batch; where memory is short, also beside the gradients of one before."""
    module.optimization.zero_gradients(module)
    several = module.device.type in LIMITED and len(micro) * n_ranks() < rows_of_a_step(module)
    for name in _trained(module):
        for _ in accumulate(range(1 + several), module.trainer.strategy):
            module.manual_backward(micro.mean(_forward(module, name, micro, len(micro))))
    module.optimization.zero_gradients(module)


def _trained(module: Any) -> list[str]:
    """The models that learn."""
    return [name for name in module.optimization.built if not (name == "critic" and module.critic_frozen)]


def _forward(module: Any, name: str, micro: Minibatch, n_rows: int) -> Any:
    """What the actor or the critic gives for the first rows."""
    inputs, n_columns = micro.select(range(n_rows)).model_inputs(), micro.response_ids.shape[1]
    if name == "critic":
        return critic_forward(module.critic, inputs, n_columns)
    logprobs, entropy = actor_forward(module.actor, inputs, n_columns, module.temperature)
    return logprobs + entropy


def _keeps_too_much(module: Any, micro: Minibatch) -> bool:
    kept = max(kept_bytes(partial(_forward, module, name, micro), len(micro)) for name in _trained(module))
    return kept > SHARE * (free_bytes(module.device) - Resident.of(module).missing_states)


def _recompute(module: Any, micro: Minibatch) -> None:
    """Turn on the recomputation of activations and say so."""
    for name in _trained(module):
        checkpoint_activations(getattr(module, name))
    module.model_settings.activation_checkpointing = True
    shape = f"{len(micro)} x {micro.prompt_ids.shape[1] + micro.response_ids.shape[1]} tokens"
    rank_zero_info(
        f"LitPPO(activation_checkpointing=None): turned on, since a micro-batch of {shape} does not fit without; steps "
        "take about a third more time, which smaller micro-batches (micro_batch_tokens) may save"
    )
