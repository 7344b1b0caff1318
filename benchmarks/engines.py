"""Tokens per second of the default engine and of a vLLM server, for several numbers of rows.

Start a server first, see docs/how_to/engines.md. The first call of each size warms up and is not counted.

    python -m benchmarks.engines --model runs/quickstart/sft/model --address http://localhost:8000
"""

import argparse
import os
import time
from typing import Any

import torch

from lit_ppo import LitPPO, VLLMEngine

WORDS = 12  # token ids of each prompt


def tokens_per_second(module: LitPPO, prompts: Any, repeats: int) -> list[float]:
    """Response tokens a second of each repetition; log-probs of the training forward are not counted."""
    rates = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        experience = module.rollout(prompts, logprobs=False, stream=f"benchmark {repeat}")
        rates.append(int(experience.response_mask.sum()) / (time.perf_counter() - start))
    return rates[1:]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print a table; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    engines: dict[str, Any] = {"default": None, "vllm": VLLMEngine(mode="server", address=options.address)}
    table = []
    print(f"{torch.get_num_threads()} threads here; load average {os.getloadavg()[0]:.1f}")
    for rows in options.rows:
        for name, engine in engines.items():
            settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
            module = LitPPO(
                options.model, critic=None, reference=None, generation=settings, engine=engine, seed=0,
                advantages=NoValues(), rewards=lambda responses: [0.0] * len(responses),
            )  # fmt: skip
            size = module.models.actor.model.config.vocab_size
            ids = torch.randint(3, size, (rows, WORDS), generator=torch.Generator().manual_seed(0)).tolist()
            prompts = [module.tokenizer.decode(row) for row in ids]
            rates = tokens_per_second(module, prompts, options.repeats)
            table.append({"engine": name, "rows": rows, "best": max(rates), "all": rates})
            print(f"{rows:5} rows  {name:8} {max(rates):8.0f} tokens/s  of {', '.join(f'{x:.0f}' for x in rates)}")
    return table


class NoValues:
    """Stands in for an estimator, since nothing is trained."""

    needs_values = False

    def __call__(self, experience: Any) -> Any:
        return experience.rewards, None


if __name__ == "__main__":
    main()
