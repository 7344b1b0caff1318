"""Choose the port of a run on one machine, and keep it open until the ranks use it."""

import os

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lit_ppo.parallel.lost_ranks import WatchingLauncher


class ReservedPort(LightningEnvironment):
    """Lightning's environment, with a port that no other run on the machine can take.

    Lightning chooses a free port, closes it, and opens it again after the launch: a second run can take it in
    between. This environment lets PyTorch's store listen on a port that the operating system chooses, and rank 0 then
    uses the same store. Rank 0 must be the launching process, as under ``ddp`` and ``fsdp2``, but not ``ddp_spawn``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._store: TCPStore | None = None

    @property
    def main_port(self) -> int:
        if self._store is None and "MASTER_PORT" not in os.environ:
            # multi_tenant: init_process_group of this process looks the store up by its port
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
            self._main_port = self._store.port
        return super().main_port


def reserve_port(strategy: Strategy) -> None:
    """Give a strategy a :class:`ReservedPort` and a watching launcher if it starts the other ranks as subprocesses.

    Args:
        strategy: Set up by a Trainer. It stays as it is if something else starts its processes, such as torchrun.
    """
    launcher = strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    given = launcher.cluster_environment
    if type(given) is LightningEnvironment and not given.creates_processes_externally:
        reserved = ReservedPort()
        reserved.set_world_size(given.world_size())
        strategy.cluster_environment = reserved  # type: ignore[attr-defined]
        strategy._launcher = WatchingLauncher(reserved, launcher.num_processes, launcher.num_nodes)
