"""Sharded checkpoints, whose metadata and small values are pickles, run no code, whoever reads them."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from lit_ppo import LitSFT, StepCheckpoint
from lit_ppo.parallel.checkpoint_io import CheckpointError, guard_sharded, load_merged
from tests.helpers.cli_toys import Toy, ToyData
from tests.helpers.traps import Trap

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled",
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*has no checksums.json",
)
STATE = {"weight": torch.arange(3.0), "bf16": torch.ones(2, dtype=torch.bfloat16), "count": 3, "name": "x"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As sharding strategies write it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-000001.ckpt"
    dcp.save({"state_dict": STATE, "optimizer_0": {"groups": [{"lr": 0.1}]}}, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 1, "pytorch-lightning_version": "2.6.0"}, path / "meta.pt")
    return path


def resume(path: Path, **options: Any) -> Any:
    """As a trainer does, with a strategy that reads the folder."""
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(load_checkpoint=lambda path, weights_only: "loaded"))
    for _ in range(2):
        guard_sharded(trainer)
    return trainer.strategy.load_checkpoint(str(path), **options)


def test_it_is_read_as_torch_reads_it(folder: Path) -> None:
    assert resume(folder) == "loaded"
    found = load_merged(folder)
    assert found["global_step"] == 1
    assert found["state_dict"].keys() == STATE.keys()
    assert all(
        torch.equal(torch.as_tensor(found["state_dict"][k]), torch.as_tensor(STATE[k])) for k in STATE if k != "name"
    )
    assert (found["state_dict"]["name"], found["state_dict"]["bf16"].dtype) == ("x", torch.bfloat16)


def metadata(folder: Path) -> Metadata:
    found: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return found


def change(folder: Path, **values: Any) -> None:
    found = metadata(folder)
    vars(found).update(values)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def with_pickle(folder: Path, name: str) -> None:
    """Puts a trap in place of a value that is no tensor."""
    found, stored = metadata(folder), io.BytesIO()
    torch.save(Trap(), stored)
    place = next(place for index, place in found.storage_data.items() if index.fqn.startswith(name))
    place.relative_path, place.offset, place.length = "trap.distcp", 0, len(stored.getvalue())
    (folder / "trap.distcp").write_bytes(stored.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def moved_outside(folder: Path) -> None:
    found = metadata(folder)
    for place in found.storage_data.values():
        place.relative_path = "../" + place.relative_path
    (folder / ".metadata").write_bytes(pickle.dumps(found))


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "metadata": (lambda f: (f / ".metadata").write_bytes(pickle.dumps(Trap())), "would run code"),
    "in the metadata": (lambda f: change(f, planner_data={"a": [Trap()]}), "would run code"),
    "protocol 0": (lambda f: (f / ".metadata").write_bytes(b"cos\nsystem\n(S'touch sprung'\ntR."), "would run code"),
    "an attribute of an allowed class": (
        lambda f: (f / ".metadata").write_bytes(
            b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x1dMetadata.__init__.__globals__\x93."
        ),
        "would run code",
    ),
    "metadata of one rank": (lambda f: (f / "__0.metadata").write_bytes(pickle.dumps(Trap())), "would run code"),
    "a weight that is no tensor": (lambda f: with_pickle(f, "state_dict.count"), "would run code"),
    "a setting of the optimizer": (lambda f: with_pickle(f, "optimizer_0.groups"), "would run code"),
    "a shard elsewhere": (moved_outside, "a shard lies outside of the folder"),
    "another object": (lambda f: (f / ".metadata").write_bytes(pickle.dumps([1])), "of another kind"),
    "other values": (lambda f: change(f, storage_data={"a": 1}), "cannot be read, it is damaged"),
    "half of it": (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:99]), "cannot be read"),
}
ONLY_RESUMED = ("metadata of one rank", "a setting of the optimizer")  # an export does not read these


@pytest.mark.parametrize("name", HARM)
def test_code_in_it_does_not_run(folder: Path, name: str) -> None:
    harm, words = HARM[name]
    harm(folder)
    with pytest.raises(CheckpointError, match=rf"step-000001.ckpt: .*{words}"):
        resume(folder)
    if name not in ONLY_RESUMED:
        with pytest.raises(CheckpointError, match=rf"step-000001.ckpt: .*{words}"):
            load_merged(folder)
    assert not Path("sprung").exists()
    assert resume(folder, weights_only=False) == "loaded"  # by consent


OWN = [("Toy", entry) for entry in ("fit", "validate", "test", "predict")]


@pytest.mark.parametrize(("name", "entry"), [*OWN, ("LitSFT", "fit"), ("LitSFT", "validate")])
def test_every_way_to_load_one_checks_it_first(folder: Path, tiny_lm: Path, name: str, entry: str) -> None:
    """Before the strategy sees it; for a module of one's own the callback that saves takes care of that."""
    change(folder, planner_data=Trap())
    module = LitSFT(str(tiny_lm)) if name == "LitSFT" else Toy()
    callbacks = [] if name == "LitSFT" else [StepCheckpoint(dirpath="saved")]
    trainer = L.Trainer(logger=False, callbacks=callbacks, accelerator="cpu", enable_model_summary=False)
    with pytest.raises(CheckpointError, match="would run code"):
        getattr(trainer, entry)(module, datamodule=ToyData(), ckpt_path=str(folder))
    assert not Path("sprung").exists()
