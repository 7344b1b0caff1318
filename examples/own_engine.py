"""An engine of your own: a server that takes weights as safetensors and answers with tokens and log-probs."""

import json
from urllib.error import URLError
from urllib.request import Request, urlopen

from safetensors.torch import save

from lit_ppo import Engine


class MyEngine(Engine):
    """Samples with the server at ``address``."""

    name = "mine"  # on the progress line

    def __init__(self, address: str) -> None:
        self.address = address

    def sync(self, weights):
        """One weight after another, so that no second copy of the model exists here."""
        for name, tensor in weights:
            self._post("weights", save({name: tensor.cpu().contiguous()}))

    def generate(self, prompt_ids, n, config, seeds):
        """All prompts in one request; the server batches them as it likes."""
        asked = {"prompt_ids": prompt_ids, "n": n, "seeds": seeds}  # seeds are None for greedy responses
        settings = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
        stops = {"stop_ids": config.eos_token_id}  # one id, or a list of them
        answer = json.loads(self._post("generate", json.dumps(asked | settings | stops).encode()))
        return answer["ids"], answer["logprobs"]

    def _post(self, route: str, data: bytes) -> bytes:
        try:
            with urlopen(Request(f"{self.address}/{route}", data)) as answer:
                return answer.read()
        except URLError as error:  # LitPPO then calls sync and generate again
            raise ConnectionError(f"{self.address}: {error}") from error
