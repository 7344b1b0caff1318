"""Ways of weights to vLLM servers."""

import base64
import os
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors.torch import save, save_file
from torch import Tensor

LARGEST = {"shared_memory": 2**29, "http": 2**26}  # bytes sent at once
MEMORY = Path("/dev/shm")


class Server(Protocol):
    """What a transfer needs of a server."""

    address: str
    dtype: str

    def rpc(self, method: str, *args: Any) -> Any:
        """Call a method of the server's workers."""
        ...

    def call(self, path: str, body: Any = None, *, method: str | None = None) -> Any:
        """The server's answer."""
        ...


class Transfer(Protocol):
    """Sends weights to servers."""

    def send(self, servers: list[Any], weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        """Send all weights; a server has the version once it uses them."""
        ...


class Parts:
    """Sends weights in parts: as files in memory that the servers read, or in the requests themselves.

    Args:
        kind: ``"shared_memory"`` or ``"http"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def send(self, servers: list[Any], weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        """Send all weights."""
        dtype = getattr(torch, servers[0].dtype)
        _everywhere(servers, "lit_ppo_start")
        for part in parts(weights, LARGEST[self.kind], dtype):
            if self.kind == "http":
                _everywhere(servers, "lit_ppo_load_bytes", base64.b64encode(save(part)).decode())
                continue
            with tempfile.TemporaryDirectory(prefix="lit_ppo_", dir=_memory()) as folder:
                os.chmod(folder, 0o755)  # the server may be another user's
                path = Path(folder, "weights.safetensors")
                save_file(part, path)
                path.chmod(0o644)
                _everywhere(servers, "lit_ppo_load_file", str(path))
        _everywhere(servers, "lit_ppo_finish", version)


class Nccl:
    """Broadcasts weights from this GPU to those of one server, by vLLM's own engine.

    Args:
        server: The server, started with ``--weight-transfer-config '{"backend": "nccl"}'``.
    """

    def __init__(self, server: Any) -> None:
        self.server = server
        self._engine: Any = None

    def send(self, servers: list[Any], weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        """Send all weights.

        vLLM wants names and shapes of all weights before the first one, so each part is an update of its own within
        one round of reloading.
        """
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        server, dtype = self.server, getattr(torch, self.server.dtype)
        group = self._group()
        server.call("/start_weight_update", {})
        with ThreadPoolExecutor(1) as pool:
            for part in parts(weights, LARGEST["shared_memory"], dtype, device="cuda"):
                about = {
                    "names": list(part),
                    "dtype_names": [str(x.dtype).removeprefix("torch.") for x in part.values()],
                    "shapes": [list(x.shape) for x in part.values()],
                }
                received = pool.submit(server.call, "/update_weights", {"update_info": about})
                packed_nccl_broadcast_producer(iter(part.items()), group, src=0, post_iter_func=lambda item: item[1])
                received.result()
        server.call("/finish_weight_update", {})
        server.rpc("lit_ppo_note", version)

    def _group(self) -> Any:
        """The communicator of this GPU, rank 0, and those of the server."""
        if self._engine is None:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init

            with socket.socket() as probe:
                probe.bind(("", 0))
                port = probe.getsockname()[1]
            size = 1 + int(self.server.call("/get_world_size")["world_size"])
            about = {"master_address": _own_address(self.server.address), "master_port": port, "world_size": size}
            with ThreadPoolExecutor(1) as pool:
                init = {"init_info": {**about, "rank_offset": 1, "packed": True}}
                joined = pool.submit(self.server.call, "/init_weight_transfer_engine", init)
                self._engine = trainer_init(about)
                joined.result()
        return self._engine


def chosen_transfer(kind: str, servers: list[Any]) -> Transfer:
    """The way that was asked for, or the first that works.

    Raises:
        ValueError: That way does not lead to these servers.
    """
    where = f"VLLMEngine(weights={kind!r})"
    if kind in ("auto", "nccl"):
        lacks = _lacks_nccl(servers)
        if lacks is None:
            return Nccl(servers[0])
        if kind == "nccl":
            raise ValueError(f"{where}: {lacks}; or use 'auto'")
    if kind == "http" or not all(map(_shares_memory, servers)):
        if kind == "shared_memory":
            problem = f"a server cannot read files in {_memory()} of this machine; use 'http' or 'auto'"
            raise ValueError(f"{where}: {problem}")
        return Parts("http")
    return Parts("shared_memory")


def _lacks_nccl(servers: list[Any]) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA here"
    if find_spec("vllm") is None:
        return "vLLM is not installed here: pip install 'lit-ppo[vllm]'"
    if len(servers) > 1:
        return "it leads to one server; start one with --data-parallel-size"
    if servers[0].rpc("lit_ppo_describe")["transfer"] != "nccl":
        return 'start the server with --weight-transfer-config \'{"backend": "nccl"}\''
    return None


def _shares_memory(server: Any) -> bool:
    with tempfile.NamedTemporaryFile(prefix="lit_ppo_", dir=_memory()) as probe:
        return str(server.rpc("lit_ppo_can_read", probe.name)) == "True"


def _memory() -> str:
    return str(MEMORY) if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else tempfile.gettempdir()


def _own_address(server: str) -> str:
    """The address of this machine on the way to a server."""
    place = urlsplit(server)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place.hostname or "", place.port or 80))
        return str(probe.getsockname()[0])


def _everywhere(servers: list[Any], method: str, *args: Any) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(lambda server: server.rpc(method, *args), servers))


def parts(
    weights: Iterator[tuple[str, Tensor]], largest: int, dtype: torch.dtype, device: str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Weights in the dtype of the server, in parts of at most ``largest`` bytes, or one larger weight."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        sent = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        if part and size + sent.nbytes > largest:
            yield part
            part, size = {}, 0
        part[name] = sent.contiguous()
        size += sent.nbytes
    if part:
        yield part
