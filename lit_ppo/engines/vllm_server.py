"""vLLM servers over HTTP: requests for responses, and weights."""

import http.client
import json
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor
from transformers import GenerationConfig

from lit_ppo.engines.vllm_lora import ADAPTER, Adapter, is_gone
from lit_ppo.engines.vllm_transfer import Transfer, chosen_transfer
from lit_ppo.parallel.ranks import rank
from lit_ppo.shown import first_line, shortened

OLDEST = (0, 32)  # the version that the tests ran with
START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    "--worker-extension-cls lit_ppo.engines.vllm_worker.WeightReceiver"
)
log = logging.getLogger("lightning.pytorch.engines")  # printed as Lightning's own messages
Answer = tuple[list[int], list[float]]


class ServerLost(ConnectionError):
    """A server does not answer, or has been started again and lost its weights."""


class Server:
    """One server.

    Args:
        address: Such as ``http://localhost:8000``.
        timeout: Seconds that an answer may take.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self.address, self.timeout = address, timeout
        self.model = ""
        self.dtype = "float32"
        self._idle: list[http.client.HTTPConnection] = []  # open ones, for any thread

    def call(self, path: str, body: Any = None, *, method: str | None = None) -> Any:
        """The server's answer.

        Args:
            path: Of the address.
            body: Sent as JSON.
            method: By default POST with a body and GET without.

        Raises:
            ServerLost: There is no answer.
            RuntimeError: It refuses; with its message.
        """
        status, text = self._exchange(method or ("GET" if body is None else "POST"), path, body)
        if status >= 500 and not self.is_up():
            raise ServerLost(f"VLLMEngine(address={self.address!r}): the server has failed ({status}: {_reason(text)})")
        if self.model == ADAPTER and is_gone(status, text):
            raise ServerLost(f"VLLMEngine(address={self.address!r}): the server was started again meanwhile")
        if status >= 400:
            raise RuntimeError(f"VLLMEngine(address={self.address!r}): {path} was refused ({status}): {_reason(text)}")
        return json.loads(text) if text[:1] in ("{", "[") else text

    def is_up(self) -> bool:
        """Whether the server is ready."""
        try:
            return self._exchange("GET", "/health", None, timeout=5.0)[0] == 200
        except ServerLost:
            return False

    def rpc(self, method: str, *args: Any) -> Any:
        """Call a method of the server's workers; returns the first worker's result."""
        results = self.call("/collective_rpc", {"method": method, "args": list(args), "timeout": self.timeout})
        return results["results"][0] if results else None

    def complete(self, prompt: list[int], fields: dict[str, Any]) -> Answer:
        """One response."""
        body = {
            "model": self.model, "prompt": prompt, "logprobs": 0, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "skip_special_tokens": False, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, **fields,
        }  # fmt: skip
        choice = self.call("/v1/completions", body)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerLost(f"VLLMEngine(address={self.address!r}): a response ended with {choice['finish_reason']!r}")
        if choice["finish_reason"] == "length" and len(choice["token_ids"]) < fields["max_tokens"]:
            raise RuntimeError(
                f"VLLMEngine(address={self.address!r}): the server ended a response after "
                f"{len(choice['token_ids'])} tokens, since prompt and response are longer than its --max-model-len; "
                "start it with a larger one, or lower max_new_tokens"
            )
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _exchange(self, method: str, path: str, body: Any, timeout: float | None = None) -> tuple[int, str]:
        place = urlsplit(self.address)
        data = None if body is None else json.dumps(body).encode()
        while True:
            try:
                connection, is_new = self._idle.pop(), False
            except IndexError:
                connection = http.client.HTTPConnection(
                    place.hostname or "", place.port or 80, timeout=timeout or self.timeout
                )
                is_new = True
            try:
                connection.request(method, place.path + path, data, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read().decode("utf-8", "replace")
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if is_new or isinstance(error, TimeoutError):
                    raise ServerLost(
                        f"VLLMEngine(address={self.address!r}): no answer from the server ({first_line(error)})"
                    ) from error
                continue  # an idle connection that the server has closed
            if timeout is None:
                self._idle.append(connection)
            else:
                connection.close()
            return answer.status, text


class Servers:
    """Servers that each get a part of the requests, and all weights.

    Args:
        addresses: Of the servers.
        weights: How weights are sent.
        timeout: Seconds that an answer may take.
        patience: Seconds to wait for a server that does not answer.
        concurrency: Requests at a time, per server.
    """

    def __init__(
        self, addresses: list[str], weights: str, *, timeout: float, patience: float, concurrency: int
    ) -> None:
        self.servers = [Server(address, timeout) for address in addresses]
        self.weights, self.patience, self.concurrency = weights, patience, concurrency
        self._version: str | None = None  # of the weights that the servers have; the first rank's
        self._transfers: dict[str, Transfer] = {}

    def check(self, model: Any, config: GenerationConfig) -> None:
        """Check version, settings and model of each server.

        Raises:
            ValueError: It cannot sample for this model.
        """
        if self.weights == "lora":
            self._transfers[""] = Adapter(model)
        for server in self.servers:
            self._wait(server)
            try:
                found = described(server)
            finally:
                server.close()
            where = f"VLLMEngine(address={server.address!r})"
            text = model.config.get_text_config()
            wrong = {k: (v, getattr(text, k)) for k, v in found["shape"].items() if v != getattr(text, k, None)}
            if wrong:
                name, (theirs, ours) = next(iter(wrong.items()))
                raise ValueError(f"{where}: serves a model with {name}={theirs}, the actor has {ours}; serve the actor")
            if isinstance(adapter := self._transfers.get(""), Adapter):
                adapter.check(where, found)
                server.model = ADAPTER
            if found["logprobs_mode"] != "processed_logprobs":
                raise ValueError(
                    f"{where}: its log-probs are {found['logprobs_mode']}, not those of the distribution that is "
                    "sampled from; start it with --logprobs-mode processed_logprobs"
                )
            if found["max_model_len"] <= config.max_new_tokens:
                raise ValueError(
                    f"{where}: takes {found['max_model_len']} tokens, prompt and response together, and max_new_tokens "
                    f"is {config.max_new_tokens}; start it with a larger --max-model-len"
                )

    def generate(self, rows: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Answer]:
        """One response to each row, many at a time.

        Args:
            rows: Prompt and sampling fields of each.

        Raises:
            ServerLost: A server does not answer, or has been started again since it got its weights.
        """
        n = len(self.servers)
        owners = [self.servers[i * n // len(rows)] for i in range(len(rows))]
        pool = ThreadPoolExecutor(min(len(rows), self.concurrency * n), thread_name_prefix="vllm")
        try:
            answers = list(pool.map(lambda pair: pair[0].complete(*pair[1]), zip(owners, rows, strict=True)))
            for server in self.servers if self._version is not None else ():
                if described(server)["version"] != self._version:
                    raise ServerLost(f"VLLMEngine(address={server.address!r}): the server was started again meanwhile")
        finally:
            pool.shutdown(cancel_futures=True)
            self._close()
        return answers

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Wait for the servers, send them the weights, and drop what they have cached of the old ones.

        Raises:
            ServerLost: A server was lost meanwhile.
            RuntimeError: A server did not come back, or refuses the weights; with its message.
        """
        for server in self.servers:
            self._wait(server)
            if not server.model:
                server.model = server.call("/v1/models")["data"][0]["id"]
                server.dtype = described(server)["dtype"]
        version, self._version = uuid.uuid4().hex, None
        try:
            self._transfer().send(self.servers, weights, version)
            for server in self.servers:
                _reset_cache(server)
        finally:
            self._close()
        self._version = version

    def _close(self) -> None:
        for server in self.servers:
            server.close()

    def _transfer(self) -> Transfer:
        if "" not in self._transfers:
            self._transfers[""] = chosen_transfer(self.weights, self.servers)
        return self._transfers[""]

    def _wait(self, server: Server) -> None:
        deadline, told = time.monotonic() + self.patience, False
        while not server.is_up():
            if not told and self.patience > 0 and rank() == 0:
                log.info(
                    f"VLLMEngine(address={server.address!r}): waiting for the server, up to {self.patience:g} s "
                    "(restart_timeout)"
                )
            told = True
            if time.monotonic() >= deadline:
                raise RuntimeError(
                    f"VLLMEngine(address={server.address!r}): no server answered for {self.patience:g} s "
                    f"(restart_timeout); start one with: {START}"
                )
            time.sleep(min(0.5, max(deadline - time.monotonic(), 0.0)))


def described(server: Server) -> dict[str, Any]:
    """What a server says about itself.

    Raises:
        ValueError: It was started without what weights need, or is too old.
    """
    try:
        found: dict[str, Any] = server.rpc("lit_ppo_describe")
    except RuntimeError as error:
        problem = f"cannot take weights ({first_line(error)}); start it with: {START}"
        raise ValueError(f"VLLMEngine(address={server.address!r}): {problem}") from error
    release = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found["vllm"].split(".")[:2])
    if release < OLDEST:
        raise ValueError(
            f"VLLMEngine(address={server.address!r}): runs vLLM {found['vllm']}; use "
            f"{'.'.join(map(str, OLDEST))} or newer"
        )
    return found


def _reset_cache(server: Server) -> None:
    """Drop what was computed with the old weights."""
    for _ in range(20):
        if server.call("/reset_prefix_cache", method="POST")["success"]:
            return
        time.sleep(0.25)  # requests of a lost rollout are still being dropped
    raise RuntimeError(f"VLLMEngine(address={server.address!r}): its cache of the old weights could not be reset")


def _reason(text: str) -> str:
    """The message in a server's answer."""
    try:
        found = json.loads(text)
        error = found.get("error", found.get("detail", text))
        text = error.get("message", text) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return shortened(text, 1000) or "without a message"
