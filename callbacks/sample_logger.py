"""Show responses to the same prompts before and after training."""

import json
from math import inf
from pathlib import Path
from shutil import copymode
from tempfile import NamedTemporaryFile
from typing import Any

import lightning as L

from lit_ppo.callbacks.base import PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require, require_prompts
from lit_ppo.callbacks.showing import html, html_table, pieces, readable_prompts
from lit_ppo.callbacks.trainer import as_in_a_step, writers
from lit_ppo.constructor import constructor
from lit_ppo.validate import integer, samples

FILE = "samples.jsonl"
NUMBERS = ("score", "KL")  # columns
LEGEND = "KL of a token, nats: *italic* from 0.1, **bold** from 0.5, ***both*** from 2, `code` from -0.1 down"


class SampleLogger(PPOCallback):
    """Logs the policy's responses to the same prompts before the first update and every few updates afterwards.

    Use it always: a collapse, or a gamed reward, shows in the text long before it shows in a curve. It uses held-out
    prompts if the data module has some, else the first training prompts. The random numbers are the same every time,
    so only the policy differs. Costs a rollout of ``prompts`` responses each time. Needs a data module with ``peek``,
    such as a ``PromptDataModule``.

    TensorBoard, and any logger whose experiment has ``add_text``, gets a table: before and after with scores and KL.
    Special tokens are shown. The style of a token shows its KL: italic from 0.1 nats, bold from 0.5, both from 2, and
    code from -0.1 down, where the reference prefers the token more than the policy does. With any logger, and without
    one, JSON lines in the run folder. Text is escaped: a tag, a table row or a control sequence in a response shows as
    text.

    Args:
        every: Updates between samples; the last ones are at the end of the run.
        prompts: Number of prompts.

    Reads ``pl_module.rollout(..., stream="samples")`` and ``score``; writes ``samples.jsonl``. Logs ``samples`` as
    text; step n is the policy after n updates.
    Source: ours, as recommended by Zheng et al. 2023, arXiv:2307.04964, section 5.2 (reward and loss alone hide it).
    """

    @constructor
    def __init__(self, every: int = 50, prompts: int = 8) -> None:
        self.every = integer(self, "every", every)
        self.prompts = samples(self, "prompts", prompts)
        self._updates = 0
        self._before: list[dict[str, Any]] | None = None  # None until sampled or restored
        self._shown = 0  # updates done at the last sample

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "rollout", "score", "tokenizer")
        refuse_beside(self, trainer, SampleLogger, why="both would write the same samples")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        require_prompts(self, trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Sample before the first update; when resuming, remove lines of updates after the checkpoint."""
        file = _file(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _check_is_ours(file)
        _cut(file, trainer, self._shown if self._updates else -1)
        if not self._updates:
            self._show(trainer, pl_module)

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: Any) -> None:
        self._updates += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sample here, since the timing of the update has ended."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._updates % self.every == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._shown != self._updates:
            self._show(trainer, pl_module)

    def _show(self, trainer: Any, pl_module: Any) -> None:
        samples = self._samples(trainer, pl_module)
        if self._before is None:
            self._before = [{name: sample[name] for name in ("prompt", "tokens", "score")} for sample in samples]
        self._shown = self._updates
        file = _file(trainer)
        for add_text in writers(trainer, "add_text"):
            add_text("samples", self._table(samples), self._updates)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                # ASCII, so that control sequences have no effect in a terminal
                lines.writelines(json.dumps({"update": self._updates, **sample}) + "\n" for sample in samples)

    def _samples(self, trainer: Any, pl_module: Any) -> list[dict[str, Any]]:
        peek, tokenizer = trainer.datamodule.peek, pl_module.tokenizer
        with as_in_a_step(trainer):
            batch = peek("val", self.prompts) or peek("train", self.prompts)
            experience = pl_module.rollout(batch, samples_per_prompt=1, stream="samples")
            scores = pl_module.score(experience).tolist()
        lengths = experience.response_mask.sum(1).tolist()
        ids, kl = experience.response_ids.tolist(), experience.kl.tolist()
        samples = []
        for row, (n, prompt) in enumerate(zip(lengths, readable_prompts(experience), strict=True)):
            tokens = pieces(tokenizer.decode, ids[row][:n], kl[row][:n])
            sample = {"prompt": prompt, "response": experience.responses[row], "score": scores[row]}
            samples.append({**sample, "kl": sum(kl[row][:n]), "tokens": [list(token) for token in tokens]})
        return samples

    def _table(self, samples: list[dict[str, Any]]) -> str:
        if not self._updates:
            header = ["prompt", "before the first update", "score"]
            return html_table(header, [[html(s["prompt"]), *_said(s)] for s in samples], NUMBERS)
        after = "after one update" if self._updates == 1 else f"after {self._updates} updates"
        rows = []
        for i, sample in enumerate(samples):
            known = self._before is not None and i < len(self._before)
            before = self._before[i] if known else {}  # type: ignore[index]
            if before.get("prompt") != sample["prompt"]:  # resumed with other prompts
                before = {"tokens": [["(not sampled)", 0.0]], "score": float("nan")}
            styled = "".join(token_html(text, kl) for text, kl in sample["tokens"])
            numbers = [f"{sample['score']:+.2f}", f"{sample['kl']:+.2f}"]
            rows.append([html(sample["prompt"]), *_said(before), styled, *numbers])
        table = html_table(["prompt", "before the first update", "score", after, "score", "KL"], rows, NUMBERS)
        return f"{LEGEND}\n\n{table}"  # above the table, of which TensorBoard shows only a part

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "before": self._before, "shown": self._shown}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._before = state_dict["updates"], state_dict["before"]
        self._shown = state_dict.get("shown", self._updates)


def token_html(text: str, kl: float) -> str:
    """A token in the style of its KL, in tags that TensorBoard lets through.

    >>> [token_html("a", kl) for kl in (0.0, 0.1, 0.5, 2.0, -0.1)]
    ['a', '<em>a</em>', '<strong>a</strong>', '<strong><em>a</em></strong>', '<code>a</code>']
    """
    shown = html(text)
    if kl <= -0.1:
        return f"<code>{shown}</code>"
    if 0.1 <= kl < 0.5 or kl >= 2.0:
        shown = f"<em>{shown}</em>"
    return f"<strong>{shown}</strong>" if kl >= 0.5 else shown


def _said(sample: dict[str, Any]) -> list[str]:
    """The cells of a response and its score."""
    return [html("".join(text for text, _ in sample["tokens"])), f"{sample['score']:+.2f}"]


def _file(trainer: L.Trainer) -> Path:
    folder = trainer.log_dir  # collective: Lightning broadcasts it
    logger: Any = trainer.logger
    if folder is not None and folder == getattr(logger, "save_dir", None) and isinstance(logger.version, str):
        # a folder of several runs: W&B and MLflow name each run, and Lightning's checkpoints use the same names
        return Path(folder, str(logger.name), logger.version, FILE)
    return Path(folder or trainer.default_root_dir, FILE)


def _check_is_ours(file: Path) -> None:
    """Refuse to replace or continue a file that is no samples."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    if text and not text.startswith('{"update": '):
        raise ValueError(
            f"SampleLogger: {file} is in the way, and lit-ppo did not write it; move it away, or set the Trainer's "
            "default_root_dir to another folder"
        )


def _cut(file: Path, trainer: L.Trainer, updates: int) -> None:
    """Remove the lines of updates after ``updates``, which are written again; -1, in a new run: all lines."""
    if trainer.is_global_zero and not trainer.fast_dev_run and file.exists():  # type: ignore[attr-defined]
        lines = [f"{line}\n" for line in file.read_text(encoding="utf-8").splitlines()]
        with NamedTemporaryFile("w", dir=file.parent, encoding="utf-8", delete=False) as partial:
            partial.writelines(line for line in lines if _written_after(line) <= updates)
        copymode(file, partial.name)
        Path(partial.name).replace(file)  # a killed run loses no line


def _written_after(line: str) -> float:
    """The update of a line; infinity for an incomplete line of a killed run."""
    try:
        after: float = json.loads(line)["update"]
    except (ValueError, TypeError, KeyError):
        return inf
    return after
