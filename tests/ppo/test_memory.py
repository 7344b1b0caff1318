"""Memory of an update with the tricks on that look at the vocabulary: it does not grow with T x V."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_ppo import PromptDataModule, TextDataModule
from lit_ppo.callbacks import EntropyBonus, KLLoss, PTXLoss
from lit_ppo.models import head
from tests.helpers.tiny import make_causal_lm, make_tokenizer
from tests.helpers.toys import make_module, make_trainer

VOCABULARY, ROWS = 4_000, 4


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and nothing has freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: Any) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address and address not in self.known:
            self.known.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


def peak_of_update(folder: Path, length: int) -> int:
    """Bytes at the highest point of an update's optimizer steps, with responses of so many tokens."""
    module = make_module(
        folder / "lm",
        generation={"max_new_tokens": length, "min_new_tokens": length},
        minibatch_size=ROWS,
        micro_batch_size=ROWS,
        ppo_epochs=1,
    )
    live = LiveBytes()
    backward_minibatch = module.backward_minibatch

    def measured(minibatch: Any) -> Any:
        with live:
            return backward_minibatch(minibatch)

    module.backward_minibatch = measured
    texts = TextDataModule(str(folder / "texts.jsonl"), batch_size=ROWS, max_length=length, packing=True)
    callbacks = [EntropyBonus(0.1), KLLoss(0.1, kind="exact"), PTXLoss(texts, coef=0.1)]
    trainer = make_trainer(folder, callbacks=callbacks, max_steps=1)
    trainer.fit(module, PromptDataModule(str(folder / "prompts.jsonl"), batch_size=ROWS))
    return live.peak


@pytest.mark.filterwarnings("ignore:.*min_new_tokens sample from another distribution")
def test_memory_grows_by_states_not_by_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 32 to 96 tokens a response; a row of logits alone has 16 kB, a token's states come to a few."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 8 * VOCABULARY)
    monkeypatch.setattr(head, "KEPT_ELEMENTS", 16 * VOCABULARY)
    words = [f"w{i}" for i in range(VOCABULARY - 3)]
    make_causal_lm(tmp_path / "lm", tokenizer=make_tokenizer(words=words), n_positions=128)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n' * ROWS)
    rows = [{"text": " ".join(words[i : i + 120])} for i in range(ROWS)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short, long = (peak_of_update(tmp_path, length) for length in (32, 96))
    assert (long - short) / (ROWS * (96 - 32)) < 4 * VOCABULARY / 2
