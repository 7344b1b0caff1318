"""Check a finished quickstart folder with the grammar's parser.

Run it as ``python -m benchmarks.quickstart_check runs/quickstart``.

Independent of lit_ppo's own rollout: stock ``generate`` and stock logits of the two exported models.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_ppo.quickstart import Report, report

MAX_NEW_TOKENS = 32


@dataclass
class Judged:
    """What the run's two models say, before and after PPO."""

    before: Report
    after: Report
    kl: float  # nats a response, summed over its tokens and over the vocabulary at each
    examples: list[tuple[str, str]]

    def failures(self) -> list[str]:
        """Which of the quickstart's promises the run breaks."""
        promises = {
            f"15-55% positive before: {self.before.positive:.1%}": 0.15 <= self.before.positive <= 0.55,
            f"at least 85% positive after: {self.after.positive:.1%}": self.after.positive >= 0.85,
            f"90% parse before: {self.before.parsed:.1%}": self.before.parsed >= 0.9,
            f"90% parse after: {self.after.parsed:.1%}": self.after.parsed >= 0.9,
            f"bigrams stay at 70%: {self.bigrams_kept:.1%}": self.bigrams_kept >= 0.7,
            f"no pattern over half: {self.after.largest_pattern:.1%}": self.after.largest_pattern <= 0.5,
            f"at most 4 nats: {self.kl:.2f}": self.kl <= 4.0,
        }
        return [promise for promise, kept in promises.items() if not kept]

    @property
    def bigrams_kept(self) -> float:
        """Share of different bigrams that is left."""
        return self.after.distinct_bigrams / self.before.distinct_bigrams

    def __str__(self) -> str:
        return (
            f"before: {self.before}\nafter:  {self.after}\nbigrams kept {self.bigrams_kept:.1%}, KL {self.kl:.2f} nats"
        )


def judge(folder: Path, seed: int = 0, number: int = 256, result: Path | None = None) -> Judged:
    """Sample at temperature 1 on held-out prompts from the SFT model and from the newest PPO result."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft/model", padding_side="left")
    result = result or max(folder.glob("ppo/version_*/model"), key=lambda path: path.stat().st_mtime)
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder / "sft/model", result))
    rows = (folder / "data/prompts_eval.jsonl").read_text(encoding="utf-8").splitlines()[:number]
    prompts = [json.loads(row)["prompt"] for row in rows]
    encoded = tokenizer(prompts, padding=True, return_tensors="pt")
    texts, kl = [], 0.0
    for model in (before, after):
        torch.manual_seed(seed)
        ids = sample(model, encoded, tokenizer)
        texts.append(tokenizer.batch_decode(ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
        if model is after:
            kl = exact_kl(after, before, ids, encoded["attention_mask"], tokenizer.eos_token_id)
    examples = list(zip([p + t for p, t in zip(prompts, texts[0], strict=True)], texts[1], strict=True))
    return Judged(report(prompts, texts[0]), report(prompts, texts[1]), kl, examples)


@torch.no_grad()
def sample(model: PreTrainedModel, encoded: dict, tokenizer) -> torch.Tensor:
    """Prompts with sampled responses."""
    return model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@torch.no_grad()
def exact_kl(model, reference, ids, prompt_mask, eos: int) -> float:
    """Mean over responses of the sum over tokens of KL(model || reference), over the whole vocabulary."""
    start = prompt_mask.shape[1]
    stops = (ids[:, start:] == eos).long().cumsum(1)
    mask = (stops - (ids[:, start:] == eos).long()) == 0  # up to the first stop token, included
    attention = torch.cat([prompt_mask, mask.long()], dim=1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    logp, ref = (m(**inputs).logits[:, start - 1 : -1].log_softmax(-1) for m in (model, reference))
    return float(((logp.exp() * (logp - ref)).sum(-1) * mask).sum(1).mean())


if __name__ == "__main__":
    root = Path(sys.argv[1])
    judged = judge(root, seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for was, now in judged.examples[:6]:
        print(f"  {was}\n    -> {now}")
    print(judged)
    print("\n".join(judged.failures()) or "every promise kept")
