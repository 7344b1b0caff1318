"""Tokens per second of the default engine and of a vLLM server, for several numbers of rows.

Start a server first, see docs/how_to/engines.md. The first call of each size warms up and is not counted. With
``--updates`` it trains instead, with and without ``rollout_ahead`` in turn, and prints the seconds of an update.

    python -m benchmarks.engines --model runs/quickstart/sft/model --address http://localhost:8000
    python -m benchmarks.engines --model runs/quickstart/sft/model --address http://localhost:8000 --updates 6
"""

import argparse
import logging
import os
import time
import warnings
from statistics import median
from typing import Any

import lightning as L
import torch

from lit_ppo import LitPPO, PromptDataModule, VLLMEngine
from lit_ppo.callbacks import ImportanceCorrection

WORDS = 12  # token ids of each prompt


def tokens_per_second(module: LitPPO, prompts: Any, repeats: int) -> list[float]:
    """Response tokens a second of each repetition; log-probs of the training forward are not counted."""
    rates = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        experience = module.rollout(prompts, logprobs=False, stream=f"benchmark {repeat}")
        rates.append(int(experience.response_mask.sum()) / (time.perf_counter() - start))
    return rates[1:]


class Seconds(L.Callback):
    """Notes when each update ends, and how long its rollout made the actor wait."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.rollouts: list[float] = []

    def on_update_end(self, trainer: L.Trainer, pl_module: Any, experience: Any) -> None:
        self.ends.append(time.perf_counter())
        self.rollouts.append(pl_module.progress.seconds.get("rollout", 0.0))

    def update(self) -> float:
        """Of one update; the first, which always samples before it trains, is left out."""
        return median(after - before for before, after in zip(self.ends, self.ends[1:], strict=False))


def seconds_of_updates(options: Any, rows: int, ahead: int) -> Seconds:
    """Train for some updates."""
    module = LitPPO(
        options.model, generation={"max_new_tokens": options.max_new_tokens}, minibatch_size=max(rows // 4, 1),
        ppo_epochs=2, engine=VLLMEngine(mode="server", address=options.address), rollout_ahead=ahead, seed=0,
        rewards=lambda responses: [float(len(text)) for text in responses],
    )  # fmt: skip
    prompts = random_prompts(module, rows * (options.updates + 1))
    data = PromptDataModule([{"prompt": prompt} for prompt in prompts], batch_size=rows, seed=0)
    seconds = Seconds()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=options.updates + 1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ImportanceCorrection(), seconds],
    )  # fmt: skip
    trainer.fit(module, data)
    return seconds


def compare_ahead(options: Any) -> list[dict[str, Any]]:
    """Print the seconds of an update without and with ``rollout_ahead``, measured in turn, and their ratio."""
    table = []
    for rows in options.rows:
        runs = [[seconds_of_updates(options, rows, ahead) for ahead in (0, 1)] for _ in range(options.repeats)]
        without, ahead = (min(run[i].update() for run in runs) for i in (0, 1))
        waits = [median(run[i].rollouts[-1] for run in runs) for i in (0, 1)]
        ratios = [run[0].update() / run[1].update() for run in runs]
        table.append({"rows": rows, "without": without, "ahead": ahead, "ratio": median(ratios), "waits": waits})
        print(
            f"{rows:5} rows  {without:6.2f} s an update, {ahead:6.2f} s ahead; {median(ratios):.2f} times as fast "
            f"(of {', '.join(f'{ratio:.2f}' for ratio in ratios)}); rollout {waits[0]:.2f} s, {waits[1]:.2f} s"
        )
    return table


def random_prompts(module: LitPPO, count: int) -> list[str]:
    """Texts of random tokens."""
    size = module.models.actor.model.config.vocab_size
    ids = torch.randint(3, size, (count, WORDS), generator=torch.Generator().manual_seed(0)).tolist()
    return [module.tokenizer.decode(row) for row in ids]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print a table; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, help="train for so many updates, with and without rollout_ahead")
    options = parser.parse_args(arguments)
    print(f"{torch.get_num_threads()} threads here; load average {os.getloadavg()[0]:.1f}")
    if options.updates is not None:
        return compare_ahead(options)
    engines: dict[str, Any] = {"default": None, "vllm": VLLMEngine(mode="server", address=options.address)}
    table = []
    for rows in options.rows:
        for name, engine in engines.items():
            settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
            module = LitPPO(
                options.model, critic=None, reference=None, generation=settings, engine=engine, seed=0,
                advantages=NoValues(), rewards=lambda responses: [0.0] * len(responses),
            )  # fmt: skip
            rates = tokens_per_second(module, random_prompts(module, rows), options.repeats)
            table.append({"engine": name, "rows": rows, "best": max(rates), "all": rates})
            print(f"{rows:5} rows  {name:8} {max(rates):8.0f} tokens/s  of {', '.join(f'{x:.0f}' for x in rates)}")
    return table


class NoValues:
    """Stands in for an estimator, since nothing is trained."""

    needs_values = False

    def __call__(self, experience: Any) -> Any:
        return experience.rewards, None


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    main()
