"""PPO on one GPU in one command: ``python -m benchmarks.gpu``; seconds, tokens/s, utilisation and memory as JSON.

The models have the shapes of Qwen2.5 as Llama models, whose tokenizer may be any, and random weights: there is no
download. Results are written after each part, so a run that is cut off loses one part only. ``--small`` runs the same
code on toy shapes, also on a CPU.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

import lit_ppo.ppo.module
from benchmarks import decode
from benchmarks.measure import matmul_peak, memory, synchronize
from lit_ppo import LitPPO, PromptDataModule, RewardModel
from lit_ppo.generation.config import neutral
from lit_ppo.memory.trial import longest_micro_batch
from lit_ppo.models import head
from lit_ppo.models.actor_critic import Actor, actor_forward
from lit_ppo.ppo.settings import Models

DENSE_BF16 = {"B200": 2.25e15, "H200": 9.89e14, "H100": 9.89e14, "A100": 3.12e14, "L40S": 3.62e14, "L4": 1.21e14}
BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12, "L40S": 8.64e11, "L4": 3.0e11}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LORA = {"r": 16, "target_modules": "all-linear"}
# seconds on an H100, of which much is compiling: a part does not start when fewer are left
NEEDS = {
    "tests": 110.0, "ppo": 45.0, "ppo_compiled": 90.0, "generate": 90.0, "sweep": 30.0, "compiled": 50.0, "lora": 120.0
}  # fmt: skip


class OutOfTime(BaseException):
    """The minutes are over; no handler of exceptions inside a part may keep this."""


@dataclass
class Job:
    """A model and what it samples."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 151_936
    prompts: int = 128
    prompt: int = 128  # tokens
    response: int = 512
    minibatch: int = 32
    micro_batch_tokens: int = 20_480


JOBS = {
    "0.5b": Job(896, 24, 14, 2, 4864),
    "1.5b": Job(1536, 28, 12, 2, 8960),
    "small": Job(32, 2, 4, 2, 64, vocabulary=300, prompts=8, prompt=6, response=8, minibatch=4, micro_batch_tokens=64),
}


class Rows(L.Callback):
    """Keeps what is logged after each update; of the last one it times all optimizer steps but one, and profiles that.

    Starting and reading a profiler takes longer than a step.
    """

    def __init__(self, last: int, steps: int) -> None:
        self.rows: list[dict[str, float]] = []
        self.last, self.steps, self.profile, self.seconds = last, steps, None, 0.0
        self.starts: list[float] = []

    def on_minibatch_start(self, trainer: Any, pl_module: Any, minibatch: Any) -> None:
        if pl_module.rollouts < self.last:
            return
        synchronize()
        self.starts.append(time.perf_counter())
        if len(self.starts) == self.steps:
            self.profile = _profiler()
            self.profile.start()
            self.seconds = -time.perf_counter()

    def update_seconds(self) -> float:
        """Of the last update, as if its last step took as long as the others."""
        return (self.starts[-1] - self.starts[0]) / (self.steps - 1) * self.steps

    def on_minibatch_end(self, trainer: Any, pl_module: Any, experience: Any, metrics: dict[str, float]) -> None:
        if self.profile is not None and self.seconds < 0:
            synchronize()
            self.seconds += time.perf_counter()
            self.profile.stop()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def make_models(job: Job, folder: Path) -> None:
    """A causal LM, a reward model and prompts; words are ``t2``, ``t3`` and so on, one for each token."""
    words = {"[END]": 0, "[UNK]": 1} | {f"t{i}": i for i in range(2, job.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "[END]", "pad_token": "[END]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    config = LlamaConfig(
        hidden_size=job.hidden, num_hidden_layers=job.layers, num_attention_heads=job.heads, pad_token_id=0,
        num_key_value_heads=job.kv_heads, intermediate_size=job.intermediate, vocab_size=job.vocabulary,
        max_position_embeddings=2 * (job.prompt + job.response), tie_word_embeddings=True, num_labels=1,
        eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, kind in (("actor", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        with torch.device(DEVICE):
            model = kind.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    ids = torch.randint(2, job.vocabulary, (job.prompts, job.prompt)).tolist()
    lines = [json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) for row in ids]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


def update_flops(job: Job) -> float:
    """Floating-point operations of one pass of actor and critic; recomputation and embeddings do not count."""
    tokens = job.prompt + job.response
    head_size = job.hidden // job.heads
    attention = job.hidden * head_size * (2 * job.heads + 2 * job.kv_heads)
    linear = 2 * job.layers * (attention + 3 * job.hidden * job.intermediate) * tokens
    pairs = 4 * job.layers * job.hidden * tokens * (tokens + 1) // 2
    logits = 2 * job.hidden * (job.vocabulary + 1) * job.response
    return 3.0 * job.prompts * (2 * (linear + pairs) + logits)


def run_ppo(
    job: Job, folder: Path, lora: dict[str, Any] | None = None, updates: int = 2, *, compiled: bool = False
) -> dict[str, Any]:
    """Updates of PPO, of which the last is measured."""
    compiled = compiled and DEVICE == "cuda"  # for a CPU it takes minutes
    seconds: dict[str, float] = {}
    timed(lit_ppo.ppo.module, "sample_responses", seconds)
    timed(lit_ppo.ppo.module, "add_logprobs", seconds)
    module = LitPPO(
        str(folder / "actor"), rewards=RewardModel(str(folder / "reward"), batch_tokens=4 * job.micro_batch_tokens),
        generation={"max_new_tokens": job.response, "suppress_tokens": [0], "compile_config": {} if compiled else None},
        ppo_epochs=1, seed=0, minibatch_size=job.minibatch, micro_batch_tokens=job.micro_batch_tokens,
        actor_lora=lora, critic_lora=lora, compile_blocks=compiled,
    )  # fmt: skip
    rows = Rows(updates, -(-job.prompts // job.minibatch))
    trainer = L.Trainer(
        accelerator="auto", devices=1, precision="bf16-mixed", max_steps=updates, max_epochs=-1, callbacks=[rows],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        inference_mode=False, default_root_dir=folder, log_every_n_steps=1,
    )  # fmt: skip
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, PromptDataModule(str(folder / "prompts.jsonl"), batch_size=job.prompts, seed=0))
    last, tokens = rows.rows[-1], job.prompts * job.response
    phases = {"rollout": seconds["sample_responses"], "log-probs": seconds["add_logprobs"]}
    phases |= {"score": last["time/score"], "update": rows.update_seconds()}
    every = job.prompts * (job.prompt + job.response)
    flops = update_flops(job) * (2 / 3 if lora else 1)  # no gradients of frozen weights
    bound = decode.bandwidth_bound(job, module.actor.model, of_card(BANDWIDTH))
    peak = matmul_peak(4096 if DEVICE == "cuda" else 256, "bfloat16", device=DEVICE)
    return {
        "seconds": phases,
        "tokens_per_second": {name: (tokens if name == "rollout" else every) / s for name, s in phases.items()},
        "update_flops_per_second": flops / phases["update"],
        "update_mfu": flops / phases["update"] / of_card(DENSE_BF16),
        "update_of_measured_peak": flops / phases["update"] / peak,
        "rollout_of_bandwidth_bound": tokens / phases["rollout"] / bound,
        "peak_bytes": memory()[1],
        "update_idle": idle(rows.profile, rows.seconds),
        "attention": attention_of(module),
        "activation_checkpointing": bool(module.model_settings.activation_checkpointing),
        "logged": last,
    }


def attention_of(module: LitPPO) -> str:
    """The kernel that packed rows go through in the update; SDPA, where they are padded."""
    backbone: Any = module.actor.model.base_model
    if DEVICE == "cpu":
        return "SDPA"
    with torch.autocast(DEVICE, torch.bfloat16):
        kernel = backbone.lit_ppo_attention.kernel(backbone, torch.device(DEVICE, torch.cuda.current_device()))
    return "SDPA" if kernel is None else kernel.name


def timed(owner: Any, name: str, seconds: dict[str, float]) -> None:
    """Keep the seconds of the last call of a function."""
    function = getattr(getattr(owner, name), "__wrapped__", getattr(owner, name))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize()
        seconds[name] = time.perf_counter() - start
        return result

    wrapped.__wrapped__ = function  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def of_card(table: dict[str, float]) -> float:
    """This card's entry; NaN for a card that is not in the table."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    return next((peak for card, peak in table.items() if card in name), math.nan)


def _profiler() -> Any:
    kinds = [ProfilerActivity.CUDA] if DEVICE == "cuda" else [ProfilerActivity.CPU]
    return profile(activities=kinds)


def idle(profiler: Any, seconds: float) -> float | None:
    """Share of the time in which no kernel ran; None without a GPU."""
    if profiler is None or DEVICE != "cuda":
        return None
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy = end = 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1.0 - busy / 1e6 / seconds


def sweep(job: Job, folder: Path) -> list[dict[str, Any]]:
    """Forward and backward of the actor by tokens of a micro-batch and logits of a chunk."""
    actor = Actor(AutoModelForCausalLM.from_pretrained(folder / "actor", dtype=torch.float32)).to(DEVICE)
    found = []
    for tokens in (job.micro_batch_tokens // 4, job.micro_batch_tokens, 4 * job.micro_batch_tokens):
        for power in (23, 25, 27):
            head.CHUNK_ELEMENTS, head.CUDA_CHUNK_ELEMENTS = (2**power,) * 2
            row: dict[str, Any] = {"micro_batch_tokens": tokens, "chunk": f"2^{power}"}
            found.append(row)
            try:
                row["seconds"] = min(_pass(job, actor, tokens) for _ in range(3))
            except torch.OutOfMemoryError:
                row["seconds"] = None
                torch.cuda.empty_cache()
    head.CHUNK_ELEMENTS, head.CUDA_CHUNK_ELEMENTS = 2**23, 2**27
    return found


def _pass(job: Job, actor: Actor, tokens: int) -> float:
    generation = neutral(max_new_tokens=job.response, eos_token_id=0, pad_token_id=0)
    parts = Models(actor, None, None, None, generation)  # type: ignore[arg-type]
    micro = longest_micro_batch(parts, job.prompt, job.prompts, None, tokens)
    synchronize()
    start = time.perf_counter()
    with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
        logprobs, entropy = actor_forward(actor, micro.model_inputs(), job.response, 1.0)
        (logprobs + entropy).mean().backward()
    actor.zero_grad(set_to_none=True)
    synchronize()
    return time.perf_counter() - start


def sampling(job: Job, folder: Path, compiled: bool = False) -> dict[str, Any]:
    """``generate`` of transformers, then both loops of ours; or the static one with a compiled step."""
    static: dict[str, Any] = {"cache_implementation": "static"}
    parts = {"stock": None, "dynamic": {"cache_implementation": "dynamic"}, "static": static}
    parts["static_without_graphs"] = {**static, "disable_compile": True}
    if compiled:
        parts = {"compiled": {**static, "compile_config": {} if DEVICE == "cuda" else {"backend": "eager"}}}
    return decode.measure(job, folder, DEVICE, of_card(BANDWIDTH), parts)


def gpu_tests() -> dict[str, Any]:
    """Run ``tests/gpu`` in a process of its own."""
    if find_spec("pytest") is None:
        return {"skipped": "pytest is not installed; pip install pytest, or unpack it, pluggy and iniconfig"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    return {"returncode": done.returncode, "output": done.stdout[-4000:]}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End what runs inside this after so many seconds."""

    def end(*_: Any) -> None:
        raise OutOfTime(f"ended after {seconds:.0f} s: no time left")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(part: str, run: Callable[[], Any], needs: float, left: float) -> Any:
    """What a part gives, or why there is nothing.

    Args:
        part: Its name.
        run: Measures it.
        needs: Seconds that it needs at least.
        left: Seconds until the end.
    """
    if left < needs:
        return {"skipped": f"{part} needs about {needs:.0f} s, {max(left, 0.0):.0f} s are left"}
    try:
        with at_most(left):
            return run()
    except OutOfTime as error:
        return {"skipped": str(error)}
    except Exception as error:  # the other parts still count
        return {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-4000:]}


def main(arguments: list[str] | None = None) -> None:
    """Run the parts one after the other, within the minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="toy shapes")
    parser.add_argument("--minutes", type=float, default=8.0, help="what would last longer is left out")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--parts", default="tests,ppo,ppo_compiled,generate,sweep,compiled,lora")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    jobs = [JOBS["small"]] * 2 if given.small else [JOBS["0.5b"], JOBS["1.5b"]]
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    report: dict[str, Any] = {"device": card, "torch": torch.__version__, "jobs": list(map(asdict, jobs))}
    with tempfile.TemporaryDirectory() as name:
        for job, sub in zip(jobs, ("first", "second"), strict=True):
            folder = Path(name) / sub
            folder.mkdir()
            parts: dict[str, Any] = {
                "tests": gpu_tests,
                "ppo": lambda job=job, folder=folder: run_ppo(job, folder),
                "ppo_compiled": lambda job=job, folder=folder: run_ppo(job, folder, compiled=True),
                "generate": lambda job=job, folder=folder: sampling(job, folder),
                "sweep": lambda job=job, folder=folder: sweep(job, folder),
                "compiled": lambda job=job, folder=folder: sampling(job, folder, compiled=True),
            }
            lora = {"lora": lambda job=job, folder=folder: run_ppo(job, folder, LORA, compiled=True)}
            parts = parts if sub == "first" else lora
            wanted = {part: run for part, run in parts.items() if part in given.parts.split(",")}
            if wanted.keys() - {"tests"} and time.perf_counter() - start < 60 * given.minutes:
                make_models(job, folder)
            for part, run in wanted.items():
                began = time.perf_counter()
                needs = 0.0 if given.small else NEEDS[part]
                report[part] = measured(part, run, needs, 60 * given.minutes - (began - start))
                report.setdefault("part_seconds", {})[part] = time.perf_counter() - began
                report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # NaN is not JSON
                given.out.write_text(json.dumps(report, indent=1))
                print(json.dumps({part: report[part]}), flush=True)


if __name__ == "__main__":
    main()
