"""Run in vLLM's environment: a colocated engine samples for a model, before and after its weights have changed."""

import sys

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lit_ppo.engines.vllm import VLLMEngine
from lit_ppo.engines.weights import checkpoint_weights

PROMPTS = [[3, 4], [5, 6, 7]]


@torch.no_grad()
def difference(model, prompt, ids, logprobs):
    """Between log-probs of a response and those of the model."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    own = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    return float((own - torch.tensor(logprobs)).abs().max())


def main(path: str) -> None:
    """Print the largest difference; fails if samples are not as asked."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine = VLLMEngine(mode="colocate", dtype="float32", max_model_len=48, gpu_memory_utilization=0.1)
    config = GenerationConfig(max_new_tokens=8, temperature=1.0, eos_token_id=[1, 9])
    engine.check(model, config)
    found = []
    for factor in (1.0, 1.3):
        with torch.no_grad():
            next(model.parameters()).mul_(factor)
        engine.wake()
        engine.sync(checkpoint_weights(model))
        ids, logprobs = engine.generate(PROMPTS, 2, config, [11, 12, 13, 14])
        again, _ = engine.generate(PROMPTS, 2, config, [11, 12, 13, 14])
        assert ids == again
        assert len({tuple(row) for row in ids}) > 2
        for i, (row, values) in enumerate(zip(ids, logprobs, strict=True)):
            found.append(difference(model, PROMPTS[i // 2], row, values))
        engine.sleep()
    print("largest difference", max(found))
    assert max(found) < 2e-3


if __name__ == "__main__":
    main(sys.argv[1])
