"""What data may cost: long rows, bombs, files without an end, templates that do not end. Each error names its place."""

import gzip
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_ppo.data import prompts
from lit_ppo.data.encoding import encode_prompts
from lit_ppo.data.files import read_table
from lit_ppo.data.preferences import PreferenceDataModule
from lit_ppo.data.prompts import PromptDataModule
from lit_ppo.data.text import TextDataModule
from lit_ppo.parallel import isolated
from lit_ppo.rewards.inputs import conversations
from tests.helpers.tiny import make_tokenizer

ROW_MB = 0.01
KIB = ROW_MB * 1024  # of the longest row; a file may have 256 times as much
ROW = b'{"p": "%s"}\n' % (b"a" * 9000)
LONG = "a row of more than 0.01 MiB; shorten it, or"
MUCH = "the rows up to here take more than 2.56 MiB"


@pytest.mark.parametrize(
    ("name", "start", "piece", "message"),
    [
        ("a.jsonl", b'{"p": 1}\n', b"\0", f"line 2: {LONG} raise max_row_mb"),
        ("a.jsonl", b"", b"\n", f"line 5233: {MUCH}"),
        ("a.jsonl", b"", b"{}\n", "line 5212: "),
        ("a.jsonl", b"", ROW, f"line 282: {MUCH}"),
        ("a.json", b"[{},\n", b"[", "item 2: more than 100 nested lists"),
        ("a.json", b'[{},\n{"p": "', b"a", f"item 2: {LONG}"),
        ("a.json", b"[", b" ", f"line 1: {MUCH}"),
        ("a.json", b"[", b"{},", "item 52"),
        ("a.csv", b"p\nq\n", b"\n", MUCH),
        (
            "a.csv",
            b'p\nq\n"open\n',
            b"x\n",
            "line 3: a row of more than 0.01 MiB; shorten it, or close its quotation marks",
        ),
        ("a.csv", b"p\n", b",", f"line 2: {LONG}"),
        ("a.tsv", b"p\n", b"\t\n" * 9 + b"x\n", "line 2: 2 fields"),
    ],
)
def test_bombs_stop_at_the_limit(tmp_path: Path, name: str, start: bytes, piece: bytes, message: str) -> None:
    """16 MB each: the memory in use stays a small multiple of what all rows may take."""
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(start + piece * (2**24 // len(piece)), 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(f"{path}, ") + ".*" + re.escape(message)):
            read_table("w", str(path), max_row_mb=ROW_MB)
        assert tracemalloc.get_traced_memory()[1] < 4 * 256 * KIB * 1024
    finally:
        tracemalloc.stop()


def test_the_argument_raises_the_limit(tmp_path: Path) -> None:
    """A row of 17 MiB is refused by default."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 17 * 2**20}))
    data = PromptDataModule(str(path))
    with pytest.raises(ValueError, match=r"^PromptDataModule\(path=.*a.jsonl, line 1: a row of more than 16 MiB"):
        data.read("path")
    assert len(PromptDataModule(str(path), max_row_mb=18).read("path")) == 1
    with pytest.raises(ValueError, match=r"TextDataModule\(max_row_mb=0\): must be"):
        TextDataModule(str(path), max_row_mb=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"p": ["ok", {"q": "é" * 6000}]}, LONG),
        ({"p": [0.5] * 2000}, LONG),
        ({"p": "\ud800"}, "lone surrogate"),
        ({"p": 10**5000}, "'p' holds an integer of more than 4300 digits"),
        ({"p": json.loads("[" * 150 + "]" * 150)}, "'p' holds more than 100 nested lists"),
    ],
)
def test_rows_in_memory_have_the_same_limits(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^w: .*row 2: .*{message}"):
        read_table("w", [{"p": "a"}, row], max_row_mb=ROW_MB)


def test_data_sets_have_the_same_limits() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"p": [0.5]}, {"p": [0.5] * 2000}])
    with pytest.raises(ValueError, match=rf"^w: .*row 2: {LONG}"):
        read_table("w", rows, max_row_mb=ROW_MB)


def test_prompts_of_rollout_are_named() -> None:
    with pytest.raises(ValueError, match=r"encode_prompts: prompt 1 holds a lone surrogate .* at character 2; replace"):
        encode_prompts(make_tokenizer(), ["a film", "a\ud800"])


def test_columns_that_differ_from_row_to_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MOST_VALUES", 100)
    rows = [{"prompt": "a film", f"id{i}": i} for i in range(10)]
    with pytest.raises(ValueError, match="has 11 different columns in 10 rows; write what differs"):
        PromptDataModule(rows, tokenizer=make_tokenizer()).setup("fit")


def test_parquet_bombs(tmp_path: Path) -> None:
    """A dictionary makes many long rows of one, and compression a large column of a small file."""
    datasets = pytest.importorskip("datasets")
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"p": ["a" * 9000] * 2000}).to_parquet(path)
    with pytest.raises(ValueError, match=r"a.parquet, row 283: the rows up to here take more than 2.56 MiB"):
        read_table("w", path, max_row_mb=ROW_MB)
    datasets.Dataset.from_dict({"p": ["a" * 20_000 + str(i) for i in range(200)]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"a.parquet: 3 MiB when unpacked, more than 2; give a smaller file, or raise"):
        read_table("w", path, max_row_mb=ROW_MB)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.jsonl", link("a.jsonl"), r"a.jsonl cannot be read \(Too many levels of symbolic links\); check"),
        ("a.csv.gz", link("/dev/zero"), "a.csv.gz is a pipe, socket or device; write the rows to a file"),
        ("a.parquet", os.mkfifo, "a.parquet is a pipe, socket or device"),
        ("a" * 300 + ".jsonl", Path, r"cannot be read \(File name too long\)"),
        ("a\0.jsonl", Path, r"a.*jsonl cannot be read \(embedded null"),
    ],
)
def test_what_is_no_file(tmp_path: Path, name: str, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"^w: .*{message}"):
        read_table("w", str(tmp_path / name))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}")

    def refuse(*_: Any) -> Any:  # tests may run as root, who may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a.jsonl cannot be read \(Permission denied\); check path and permissions"):
        read_table("w", str(path))


USER, ANSWER = {"role": "user", "content": "a film"}, {"role": "assistant", "content": "good"}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": (LOOP, "has not ended after 0.2 s"),
    "recursion": ("{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "has not ended"),
    "power": ("{{ 10 ** (messages | length * 10 ** 9) }}", "has not ended"),
    "text": ("{{ messages[0].content * 10 ** 10 }}", "needs more than 1024 MiB"),
    "filter": ("{{ messages[0].content | center(10 ** 10) }}", "needs more than 1024 MiB"),
    "output": ("{{ messages[0].content * 10 ** 7 }}", "writes 60000000 characters for messages of 6"),
    "range": ("{{ range(10 ** 10) }}", "refuses message 1 of 1 .*Range too big"),
}


def chat_tokenizer(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_do_not_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "SECONDS", 0.2)
    template, message = ENDLESS[name]
    data = PromptDataModule([{"prompt": [USER]}], tokenizer=chat_tokenizer(template))
    with pytest.raises(ValueError, match=rf"row 1: the chat template {message}.*give another template"):
        data.setup("fit")


LOUD = {"role": "user", "content": "loud"}
CHOICE = {"chosen": "a", "rejected": "b"}


def render_for_a_reward(used: Any) -> None:
    chats = SimpleNamespace(columns={"messages": [[USER], [LOUD]]}, responses=["good", "bad"])
    conversations(used, "RewardModel", chats, [True, True], {})


@pytest.mark.parametrize(
    "render",
    [
        lambda used: TextDataModule([{"messages": [turn, ANSWER]} for turn in (USER, LOUD)], tokenizer=used).setup(
            "fit"
        ),
        lambda used: PreferenceDataModule(
            [{"prompt": [turn], **CHOICE} for turn in (USER, LOUD)], prompt_column="prompt", tokenizer=used
        ).setup("fit"),
        render_for_a_reward,
    ],
    ids=["sft", "preferences", "reward"],
)
def test_templates_end_everywhere(render: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The template loops for the second row only."""
    monkeypatch.setattr(isolated, "SECONDS", 0.2)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if 'loud' in m.content %}" + LOOP
    used = chat_tokenizer(template + "{% endif %}{% endfor %}{{ '[assistant]' if add_generation_prompt }}")
    with pytest.raises(ValueError, match=r"(row 2|chat 1): the chat template has not ended after 0.2 s"):
        render(used)
