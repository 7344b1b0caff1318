"""Bit rot: a flipped bit in any file of a checkpoint or of a model is refused by the name of the file, or harmless."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM

from lit_ppo.models.pretrained import Unusable, load_pretrained
from lit_ppo.parallel.checkpoint_io import (
    AtomicCheckpointIO,
    CheckpointError,
    is_complete,
    load_merged,
    read_summary,
)
from lit_ppo.parallel.files import CHECKSUMS, VERIFY, write_shared_checksums
from lit_ppo.run.continuation import Continuation
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded_runs import fit_sharded
from tests.helpers.toys import make_module

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WEIGHT = torch.arange(99.0)
CHECKPOINT: dict[str, Any] = {"state_dict": {"weight": WEIGHT}, "pytorch-lightning_version": "2.6.0", "global_step": 3}


def one_file(folder: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, folder / "step-000003.ckpt")
    return folder / "step-000003.ckpt"


def sharded(folder: Path) -> Path:
    """As the sharding strategies write it, of one rank."""
    path = folder / "step-000003.ckpt"
    dcp.save({"state_dict": CHECKPOINT["state_dict"]}, checkpoint_id=path, no_dist=True)
    torch.save({name: value for name, value in CHECKPOINT.items() if name != "state_dict"}, path / "meta.pt")
    write_shared_checksums(path)
    return path


SHARDS = [".metadata", "__0_0.distcp", "__1_0.distcp", CHECKSUMS, "meta.pt"]
KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "one file": (one_file, AtomicCheckpointIO().load_checkpoint),
    "sharded": (sharded, load_merged),
}


def flip(file: Path, place: float) -> bytes:
    """Flip a bit, by its place between 0 and 1; returns the content before."""
    before = file.read_bytes()
    bit = int(place * 8 * len(before))
    file.write_bytes(before[: bit // 8] + bytes([before[bit // 8] ^ (1 << bit % 8)]) + before[bit // 8 + 1 :])
    return before


@pytest.mark.parametrize(("write", "read"), KINDS.values(), ids=KINDS.keys())
def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path, write: Any, read: Any) -> None:
    """In every file, at 25 places that chance chooses: the weights are those that were saved, or there are none."""
    path, chance, refused = write(tmp_path), random.Random(0), 0
    files = sorted(file for file in [path, *path.glob("*")] if file.is_file())
    for file, place in [(file, chance.random()) for file in files for _ in range(25)]:
        before = flip(file, place)
        loaded: Any = CHECKPOINT
        try:
            loaded = read(path)
        except CheckpointError as error:
            refused += file.name in str(error)
            loaded = CHECKPOINT if file.name in str(error) else None
        assert (loaded["state_dict"]["weight"].tolist(), loaded["global_step"]) == (WEIGHT.tolist(), 3), (file, place)
        file.write_bytes(before)
    assert refused > 10 * len(files)  # the rest is padding
    assert read(path)["global_step"] == 3


@pytest.mark.parametrize("name", ["meta.pt", CHECKSUMS, ".metadata", "__0_0.distcp"])
def test_a_sharded_checkpoint_lacks_no_file(tmp_path: Path, name: str) -> None:
    """Without the metadata, which Lightning writes last, it is not complete; without checksums that is said."""
    path = sharded(tmp_path)
    (path / name).unlink()
    assert is_complete(path) == (name != "meta.pt")
    if name == CHECKSUMS:
        with pytest.warns(UserWarning, match=r"has no checksums.json, so its shards are not checked"):
            assert read_summary(path)["global_step"] == 3
    else:
        with pytest.raises(CheckpointError, match=f"{name} is missing" if name != "meta.pt" else "without meta.pt"):
            read_summary(path)


def test_exported_models_are_checked_when_they_are_loaded(
    tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed weights are refused. A changed configuration, which may be meant, is said. The model card may change."""
    module = make_module(tiny_lm)
    module.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("mine")

    def loaded() -> Any:
        return load_pretrained(AutoModelForCausalLM, str(tmp_path / "model"))[0].state_dict()

    expected = {name: x.clone() for name, x in loaded().items()}
    assert all(x.equal(module.actor.model.state_dict()[name]) for name, x in expected.items())
    for place in (0.3, 0.6, 0.99):
        before = flip(tmp_path / "model/model.safetensors", place)
        with pytest.raises(Unusable, match=r"^model.safetensors is damaged.*; export the model again"):
            loaded()
        with pytest.raises(ValueError, match=r"LitPPO\(actor=.*model.safetensors is damaged"):
            make_module(tmp_path / "model").configure_model()
        monkeypatch.setenv(VERIFY, "0")
        assert any(not x.equal(expected[name]) for name, x in loaded().items())
        monkeypatch.delenv(VERIFY)
        (tmp_path / "model/model.safetensors").write_bytes(before)
    config = tmp_path / "model/generation_config.json"
    config.write_text(config.read_text().replace("{", '{"top_k": 3,', 1))
    with pytest.warns(UserWarning, match=r"changed since it was exported: generation_config.json"):
        loaded()


def _damage_and_resume(folder: Path) -> None:
    last = folder / "saved/step-000003.ckpt"
    fit_sharded(folder, 3)
    if dist.get_rank() == 0:
        flip(last / "__1_0.distcp", 0.5)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"step-000003.ckpt: __1_0.distcp is damaged"):
        fit_sharded(folder, 4, str(last))
    dist.barrier()
    found = Continuation("auto", folder, str(folder / "saved"), keep_folder=True)
    assert Path(str(found.path)).name == "step-000002.ckpt"
    assert "step-000003.ckpt: __1_0.distcp is damaged" in found.notes[0]
    fit_sharded(folder, 4, found.path)


def test_two_ranks_resume_from_the_shards_before_damaged_ones(tmp_path: Path) -> None:
    on_ranks(2, _damage_and_resume, tmp_path, folder=tmp_path / "ranks")
    for step in (3, 4):  # the third was written again, with its checksums
        path = tmp_path / f"saved/step-{step:06d}.ckpt"
        assert sorted(file.name for file in path.iterdir()) == SHARDS
        assert read_summary(path)["global_step"] == step
