"""Before the first update: try what would fail later."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_ppo.experience import Experience, Minibatch
from lit_ppo.parallel.bf16 import warn_if_slower
from lit_ppo.ppo.checks import check_loggers, check_saved_reference, reshaping
from lit_ppo.rewards import source_names

if TYPE_CHECKING:
    from lit_ppo.ppo.module import LitPPO

BYTES_A_PARAMETER = 4 * 3  # float32 weights and AdamW's two moments
CHECKPOINTS_KEPT = 2


def preflight(module: "LitPPO") -> None:
    """Check the batch, the disk, the reward, the validation data and the memory of the longest forward and backward.

    Args:
        module: Built, on its device, with a trainer.

    Raises:
        ValueError: Something that would have failed in mid-run.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    check_batch(module, getattr(data, "batch_size", None))
    check_disk(module)
    check_saved_reference(module)
    check_loggers(module.trainer.loggers, [*module.source_names, *source_names(module.eval_rewards)])
    warn_if_slower(module.trainer.precision, module.device)
    filters = reshaping(module.generation_fields)
    if filters:
        rank_zero_warn(
            f"LitPPO(generation): {', '.join(filters)} sample from another distribution than the one whose "
            "log-probs PPO compares; leave them out unless you mean it"
        )
    for split in ("train", "val"):
        first = data.peek(split) if hasattr(data, "peek") else None
        if first is not None:
            try_prompts(module, split, first)
    try_longest(module, getattr(data, "longest_prompt", None))


def check_batch(module: "LitPPO", batch_size: int | None) -> None:
    """Refuse a minibatch that no update can fill."""
    rows = (batch_size or 0) * module.samples_per_prompt
    if batch_size is not None and module.minibatch_size > rows:
        raise ValueError(
            f"LitPPO(minibatch_size={module.minibatch_size}): more than the {rows} responses of an update "
            f"({batch_size} prompts x {module.samples_per_prompt}); lower it, or raise the data's batch_size"
        )


def check_disk(module: "LitPPO") -> None:
    """Say how large checkpoints are, and refuse a disk that cannot hold them; nothing where none are written."""
    if not module.trainer.checkpoint_callbacks:
        return
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    size = trained * BYTES_A_PARAMETER
    folder = Path(module.trainer.default_root_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    rank_zero_info(
        f"{trained:,} trained parameters; a checkpoint takes about {_gib(size)}, at most {CHECKPOINTS_KEPT} are kept, "
        f"{_gib(free)} are free"
    )
    if free < (CHECKPOINTS_KEPT + 1) * size:  # the next one is written before the oldest goes
        raise ValueError(
            f"Trainer(default_root_dir={module.trainer.default_root_dir!r}): {_gib(free)} free, checkpoints need "
            f"{_gib((CHECKPOINTS_KEPT + 1) * size)}; make room or choose another folder"
        )


def try_prompts(module: "LitPPO", split: str, prompts: Any) -> None:
    """Sample and score a response; says which data failed."""
    try:
        experience = module.rollout(prompts, samples_per_prompt=1, logprobs=False, stream="preflight")
        module.score(experience)
        if split == "val" and module.eval_rewards is not None:
            module.scores_by(module.eval_rewards, experience)
    except Exception as error:
        raise ValueError(f"first {split} prompt: {error}") from error


def try_longest(module: "LitPPO", longest_prompt: int | None) -> None:
    """Run forward and backward of one micro-batch as long as any can get."""
    n_new = int(module.generation.max_new_tokens)
    n_prompt = longest_prompt or 1
    module.check_length(n_prompt)
    n_rows = module.micro_batch_size or module.minibatch_size
    if module.micro_batch_tokens is not None:
        n_rows = max(1, module.micro_batch_tokens // (n_prompt + n_new))
    micro = _blank(min(n_rows, module.minibatch_size), n_prompt, n_new, module.device)
    module.zero_gradients()
    logprobs, entropy = module.actor_forward(module.actor, micro)
    module.manual_backward(micro.mean(logprobs + entropy))
    if module.critic is not None:
        module.manual_backward(micro.mean(module.critic_forward(module.critic, micro)))
    module.zero_gradients()


def _blank(n_rows: int, n_prompt: int, n_new: int, device: torch.device) -> Minibatch:
    prompt = torch.zeros(n_rows, n_prompt, dtype=torch.long, device=device)
    response = torch.zeros(n_rows, n_new, dtype=torch.long, device=device)
    numbers = torch.arange(n_rows, device=device)
    experience = Experience(
        prompts=[""] * n_rows, responses=[""] * n_rows, columns={}, prompt_index=numbers, group=numbers,
        prompt_ids=prompt, prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        response_ids=response, response_mask=torch.ones_like(response, dtype=torch.bool), ended=numbers < 0,
    )  # fmt: skip
    return Minibatch.of(experience, range(n_rows), "token_mean")


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
