"""Write with a trained model.

python use_model.py [FOLDER]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write(folder: str, prompts: list[str]) -> list[str]:
    """One sampled continuation of each prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=True, max_new_tokens=32)[0]
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return texts


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/ppo/version_0/model"
    print("\n".join(write(folder, ["the plot was", "the sauce was", "we loved the"])))
