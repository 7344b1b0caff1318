"""An export replaces what an export wrote, and nothing else, whatever happens to it on the way."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_ppo import ExportModel
from lit_ppo.run.export import ExportError, write_model
from tests.helpers.cli_toys import Toy
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_module, make_trainer


class Saved:
    """Saves two files, of which one lies deeper."""

    def __init__(self, content: str, on_the_way: Callable[[], Any] = lambda: None) -> None:
        self.content, self.on_the_way = content, on_the_way

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(self.content)
        self.on_the_way()
        (folder / "encoder").mkdir()
        (folder / "encoder/weights").write_text(self.content)


def export(target: Path, content: str = "new", **options: Any) -> None:
    write_model("Export(dirpath)", Saved(content, **options), target)


def content(folder: Path) -> dict[str, str]:
    """Every file and link below a folder."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {str(path.relative_to(folder)): path.read_text(errors="replace") if path.exists() else "" for path in found}


def is_exported(folder: Path, text: str = "new") -> bool:
    found = content(folder)
    found.pop("lit_ppo_files.json")
    return found == {"config.json": text, "encoder/weights": text}


def repository(folder: Path) -> None:
    for name in (".git/config", "thesis.tex", "config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def exported_with(name: str) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        export(folder, "old")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")

    return prepare


def linked(folder: Path) -> None:
    export(folder, "old")
    (folder.parent / "precious").write_text("mine")
    (folder / "link").symlink_to("../precious")


IN_THE_WAY: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a repository with a config.json": (repository, r"\.git, thesis\.tex, config\.json"),
    "only a config.json": (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "config.json"),
    "a model of somebody else": (make_causal_lm, r"config\.json, generation_config\.json, model\.safetensors"),
    "a thesis beside a model": (exported_with("thesis.tex"), "has written: thesis.tex;"),
    "notes deep in a model": (exported_with("encoder/notes.txt"), "has written: encoder/notes.txt;"),
    "a model card that was edited": (exported_with("config.json"), r"has written: config\.json \(edited\);"),
    "an empty folder in a model": (lambda folder: (export(folder, "old"), (folder / ".git").mkdir()), ".git"),
    "a model without its config": (
        lambda f: (export(f, "old"), (f / "config.json").unlink()),
        "encoder, lit_ppo_files",
    ),
    "a link in a model": (linked, "has written: link;"),
    "checkpoints": (lambda folder: (folder.mkdir(), (folder / "step-000001.ckpt").write_text("x")), "step-000001.ckpt"),
    "a sharded checkpoint": (lambda folder: (folder.mkdir(), (folder / ".metadata").write_text("x")), ".metadata"),
    "a file": (lambda folder: folder.write_text("mine"), "is a file"),
    "a link to a file": (lambda f: (f.with_name("x").write_text("mine"), f.symlink_to("x")), "is a file"),
    "a dangling link": (lambda folder: folder.symlink_to("unmounted/disk"), "a link to unmounted/disk, which does not"),
    "below a file": (
        lambda f: (f.parent.rmdir(), f.parent.write_text("mine")),
        "cannot be written to .Not a directory",
    ),
}


@pytest.mark.parametrize(("prepare", "words"), IN_THE_WAY.values(), ids=IN_THE_WAY.keys())
def test_what_is_in_the_way_stays_and_is_named(tmp_path: Path, prepare: Callable[[Path], Any], words: str) -> None:
    """Before training, and once more before it is replaced."""
    target = tmp_path / "parent" / "m"
    target.parent.mkdir()
    prepare(target)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=rf"ExportModel\(dirpath='{target}'\): .*{words}.*name a"):
        ExportModel(str(target)).setup(make_trainer(tmp_path), Toy(), "fit")
    if target.parent.is_dir():
        with pytest.raises(ValueError, match=words):
            export(target)
    assert content(tmp_path) == before


def test_names_beside_the_target_belong_to_people(tmp_path: Path) -> None:
    names = ["m.old", "m.partial", "m.old.partial", ".m.tmp", "m.tmp", "m.bak", "m~", "m.abcdefgh.partial"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    for text in ("old", "new"):
        export(tmp_path / "m", text)
        assert is_exported(tmp_path / "m", text)
    assert {path.name for path in tmp_path.iterdir()} == {"m", *names}
    assert all((tmp_path / name / "thesis.tex").read_text() == "mine" for name in names)


def test_the_folder_itself_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its permissions, links to it, a working directory in it: it may be a disk that is mounted there."""
    real = tmp_path / "disk"
    real.mkdir()
    real.chmod(0o2770)
    before = real.stat()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.chdir(real)
    for target in (Path("."), tmp_path / "link", Path("../disk/"), real):
        export(target)
        assert is_exported(real)
    assert (real.stat().st_ino, real.stat().st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(target: Path, renames: int | None) -> None:
    """An export in a process that is killed while it writes, or before one of the renames."""
    child = os.fork()
    if child == 0:
        if renames is None:
            export(target, on_the_way=kill)
        rename = Path.rename

        def count(self: Path, to: Any) -> Path:
            nonlocal renames
            renames = (renames or 0) - 1
            return kill() if renames < 0 else rename(self, to)  # type: ignore[return-value]

        Path.rename = count  # type: ignore[method-assign]
        export(target)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize("renames", [None, *range(6)])
@pytest.mark.parametrize("start", ["nothing", "a model"])
def test_a_kill_loses_nothing_and_leaves_no_mixture(tmp_path: Path, start: str, renames: int | None) -> None:
    """Old or new, or a folder without config.json, which loads nowhere. The next export finishes and cleans up."""
    target = tmp_path / "m"
    if start == "a model":
        export(target, "old")
    killed(target, renames)
    everything = content(tmp_path)
    if start == "a model":
        assert sum(text in ("old", "new") for text in everything.values()) >= 3
        if (target / "config.json").exists():
            texts = {text for name, text in content(target).items() if name in ("config.json", "encoder/weights")}
            assert len(texts) == 1
    export(target, "third")
    assert is_exported(target, "third")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_two_exports_at_once_leave_one_of_the_two(tmp_path: Path) -> None:
    target, both = tmp_path / "m", threading.Barrier(2, timeout=60)
    threads = [threading.Thread(target=export, args=(target, t), kwargs={"on_the_way": both.wait}) for t in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_exported(target, "a") or is_exported(target, "b")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_comes_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has written: \.git, thesis\.tex, config\.json;"):
        export(tmp_path / "m", on_the_way=lambda: repository(tmp_path / "m"))
    assert {path.name for path in (tmp_path / "m").iterdir()} == {".git", "thesis.tex", "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failure_is_named_and_keeps_the_model(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    export(tmp_path / "m", "old")
    with pytest.raises(ExportError, match=r"^Export\(dirpath\): .*\(No space left on device\); what is there is kept"):
        export(tmp_path / "m", on_the_way=full)
    assert is_exported(tmp_path / "m", "old")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_models_of_the_run_are_not_replaced(tmp_path: Path) -> None:
    """Not even those that an earlier run exported."""
    start = make_causal_lm(tmp_path / "start")
    module = make_module(start)
    module.save_pretrained(tmp_path / "actor")
    module = make_module(tmp_path / "actor")
    with pytest.raises(ValueError, match=r"ExportModel\(dirpath='.*actor'\): the run reads this folder \(LitPPO.actor"):
        ExportModel(str(tmp_path / "actor")).setup(make_trainer(tmp_path), module, "fit")


def test_a_folder_of_save_pretrained_is_replaced_and_its_readers_words_are_not(tmp_path: Path) -> None:
    module: Any = make_module(make_causal_lm(tmp_path / "start"))
    module.save_pretrained(tmp_path / "m")
    write_model("Export(dirpath)", module, tmp_path / "m")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/README.md").write_text("# My thesis")
    with pytest.warns(UserWarning, match="README.md: stays as it is"):
        module.save_pretrained(tmp_path / "repository")
    assert (tmp_path / "repository/README.md").read_text() == "# My thesis"
