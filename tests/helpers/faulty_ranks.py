"""What happens to both of two ranks when one of them fails, one fault after the other in the same two processes."""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from lit_ppo.callbacks.base import PPOCallback
from lit_ppo.parallel.lost_ranks import explain
from lit_ppo.rewards import time_limit
from lit_ppo.run.checkpoint import StepCheckpoint
from tests.helpers.toys import count_good, logged, make_data, make_module, make_trainer

OTHER_RANK = "LIT_PPO_TEST_OTHER_RANK"  # file that the waiting rank leaves at its end
calls = 0


def on_second_rank(fault: Callable[[int], Any]) -> Callable[..., Any]:
    """A reward that fails on rank 1, in update 2."""
    global calls
    calls = 0

    def reward(prompts: list[str], responses: list[str]) -> Any:
        global calls
        calls += 1
        if calls == 3 and dist.get_rank() == 1:
            return fault(len(responses))
        return count_good(prompts, responses)

    return reward


def raises(n: int) -> Any:
    raise KeyError("no such film")


def sleeps(n: int) -> Any:
    while True:
        try:
            time.sleep(60)
        except BaseException:  # as a client that tries again and again
            continue


def never_returns(n: int) -> Any:
    """Nothing can interrupt it, as if the time limit could not even end the process. It ends once the other's has."""
    time_limit.GRACE = 3600.0
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])
    threading.Thread(target=_exit_after, args=[Path(os.environ[OTHER_RANK])]).start()
    threading.Event().wait()


def _exit_after(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)
    os._exit(0)


class BreakGradient(PPOCallback):
    """NaN in the gradient of one rank, after ranks have exchanged theirs: in the first step of update 1."""

    def on_critic_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        weight = pl_module.actor.model.transformer.wte.weight
        if pl_module.rollouts == 2 and dist.get_rank() == 1 and weight.grad is not None:
            weight.grad[0, 0] = float("nan")
            self.on_critic_loss = lambda *_: None  # type: ignore[method-assign]


class Die(PPOCallback):
    """Rank 1 is gone at once, as after SIGKILL, in the middle of update 1."""

    def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        if pl_module.rollouts == 2 and dist.get_rank() == 1:
            os._exit(0)


class Sigterm(PPOCallback):
    """Rank 1 alone receives SIGTERM, in the middle of update 1."""

    def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        if pl_module.rollouts == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            self.on_actor_loss = lambda *_: None  # type: ignore[method-assign]


SAVE = torch.save


class FullDisk(StepCheckpoint):
    """A disk with room for the first checkpoint."""

    def save(self, trainer: Any) -> None:
        if trainer.global_step == 2:
            torch.save = _no_room
        super().save(trainer)


def _no_room(saved: Any, file: Any, **options: Any) -> None:
    if not isinstance(saved, dict):  # a tensor on its way to another rank
        return SAVE(saved, file, **options)
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def attempt(folder: Path, actor: Path, *callbacks: Any, timeout: float = 60.0, **module: Any) -> dict[str, Any]:
    """One run of two ranks: what it ended with, as this rank saw it."""
    model = make_module(actor, **module)
    assert model.seed == 3
    strategy = DDPStrategy(timeout=timedelta(seconds=timeout))
    trainer = make_trainer(
        folder, callbacks=list(callbacks), devices=2, strategy=strategy, max_steps=3, enable_checkpointing=True
    )
    error, explained = "", None
    try:
        trainer.fit(model, make_data(folder / str(os.environ["RANK"])))
    except (Exception, SystemExit) as raised:
        error, explained = f"{type(raised).__name__}: {raised}", explain(raised, [])
    assert dist.get_world_size() == 2
    rows = [
        {name: row.get(name) for name in ("optimizer/skipped_fraction", "objective/score")} for row in logged(trainer)
    ]
    digest = [float(p.detach().double().sum()) for p in (*model.actor.parameters(), *model.critic.parameters())]
    return {"error": error, "explained": explained, "rows": rows, "digest": digest}


def main(folder: Path, actor: Path) -> None:
    """All faults; the one that leaves the other rank alone comes last."""
    rank = os.environ["RANK"]
    (folder / rank).mkdir()
    seen = {
        "raises": attempt(folder, actor, rewards=on_second_rank(raises)),
        "hangs": attempt(folder, actor, rewards=on_second_rank(sleeps), reward_timeout=1.0),
        "gradient": attempt(folder, actor, BreakGradient(), max_skipped_steps=1),
    }
    seen["sigterm"] = attempt(folder, actor, Sigterm(), StepCheckpoint(dirpath=str(folder / "stopped")))
    save = torch.save
    seen["disk"] = attempt(folder, actor, FullDisk(every_n_train_steps=1, dirpath=str(folder / "checkpoints")))
    torch.save = save
    (folder / f"rank{rank}.json").write_text(json.dumps(seen | {"dies": None}))
    seen["dies"] = attempt(folder, actor, Die())
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


def hang(folder: Path, actor: Path) -> None:
    """A rank that nothing can interrupt: the others wait as long as the process group does."""
    rank = os.environ["RANK"]
    (folder / rank).mkdir()
    os.environ[OTHER_RANK] = str(folder / "rank0.json")
    seen = attempt(folder, actor, rewards=on_second_rank(never_returns), reward_timeout=1.0, timeout=3.0)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    os._exit(0)
