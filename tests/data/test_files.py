"""Reading tables: the same rows from every kind of file, and errors that name file and line."""

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lit_ppo.data.files import read_table

ROWS = [{"prompt": 'say "hi", now', "id": "1"}, {"prompt": "zwei Stück\u2028Kuchen", "id": "2"}]
WHERE = "PromptDataModule(path='x')"


def write(path: Path, content: str | bytes) -> str:
    """Text is gzipped where the name says so; bytes are written as they are."""
    if isinstance(content, str):
        content = gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode()
    path.write_bytes(content)
    return str(path)


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    return "\n".join(delimiter.join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows)


def nested(depth: int) -> str:
    return '{"p": ' + "[" * depth + "]" * depth + "}"


TEXTS = {
    "rows.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "lines.json": "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\r\n",
    "list.json": json.dumps(ROWS, indent=2),
    "rows.csv": "prompt,id\n" + as_csv(ROWS),
    "rows.tsv": "prompt\tid\r\n" + "\r\n".join("\t".join(row.values()) for row in ROWS) + "\r\n",
    "bom.csv": "\ufeffprompt,id\n" + as_csv(ROWS) + "\n",
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, suffix: str) -> None:
    table = read_table(WHERE, write(tmp_path / (name + suffix), TEXTS[name]))
    assert table.rows == ROWS
    assert table.columns == ["prompt", "id"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_column_names_stand_in_for_a_header(tmp_path: Path, name: str) -> None:
    body = TEXTS[name].split("\n", 1)[1]
    assert read_table(WHERE, write(tmp_path / name, body), column_names=["prompt", "id"]).rows == ROWS
    with pytest.raises(ValueError, match="column_names is only for CSV and TSV"):
        read_table(WHERE, write(tmp_path / "rows.jsonl", TEXTS["rows.jsonl"]), column_names=["prompt", "id"])


def test_quotation_marks_in_tsv_are_characters(tmp_path: Path) -> None:
    """A quotation mark that opens a field would otherwise swallow lines until the next one."""
    path = write(tmp_path / "rows.tsv", 'text\n"unclosed\n\nne\rxt\n')
    table = read_table(WHERE, path)
    assert [row["text"] for row in table.rows] == ['"unclosed', "ne\rxt"]
    assert table.lines == [2, 4]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    """Blank lines and quoted line breaks count."""
    lines = read_table(WHERE, write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n'))
    assert [lines.place(i) for i in range(2)] == [f"{tmp_path / 'a.jsonl'}, line {n}" for n in (2, 4)]
    quoted = read_table(WHERE, write(tmp_path / "a.csv", 'text\n"two\nlines"\n\nlast\n'))
    assert quoted.rows == [{"text": "two\nlines"}, {"text": "last"}]
    assert quoted.lines == [2, 5]
    assert read_table(WHERE, write(tmp_path / "a.json", '[{"a": 1},\n\n{"a": 2}]')).place(1).endswith("item 2")


def test_a_field_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", "text\n" + "x" * (before + 1))
    assert len(read_table(WHERE, path).rows[0]["text"]) == before + 1
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"p": 1}\n\n{"p": 2\n', r"a.jsonl, line 3: not JSON \(.*at column 8\): '{\"p\": 2'; repair"),
        ("a.json", '[{"p": 1},\n{"p" 2}]', r"a.json, line 2: not JSON \(.*'{\"p\" 2}\]'"),
        ("a.jsonl", '{"p": 1}\n"text"\n', r"a.jsonl, line 2: 'text' is not an object"),
        ("a.json", '[{"p": 1}, 7]', r"a.json, item 2: '7' is not an object"),
        ("a.csv", "p,q\n1,2\n3\n", r"a.csv, line 3: 1 fields, but the columns are \['p', 'q'\]"),
        ("a.csv", "p,p,q\n1,2,3\n", r"a.csv, line 1: the header repeats \['p'\]"),
        ("a.csv", 'p\n1\n"open\nend\n', r"a.csv, line 3: unexpected end of data; repair the quoting"),
        ("a.csv", "p,q\n", "a.csv has no rows"),
        ("a.csv", b"p\nok\nb\xffd\n", r"a.csv, line 3: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"p": 1}\n' * 99, mtime=0)[:-9], r"a.jsonl.gz is not a complete gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"p": 1}\n', mtime=0) + b"junk",
            r"a.jsonl.gz is not .*breaks off after line 1\); compress",
        ),
        ("a.parq", "p\n", r"cannot read a .parq file .*use one of .jsonl, .json, .csv, .tsv"),
        ("a.jsonl", '{"p": 1}\n' + nested(10**5), "a.jsonl, line 2: more than 100 nested lists or objects; flatten"),
        ("a.json", f'[{{"p": 1}},\n{nested(150)}]', "a.json, item 2: 'p' holds more than 100 nested lists"),
        (
            "a.jsonl",
            '{"p": "a"}\n{"p": ["x\\ud800"]}',
            r"line 2: 'p' holds a lone surrogate \('\\ud800', .*character 2; repl",
        ),
        ("a.jsonl", r'{"\udfff": "a"}', "line 1: 'a name' holds a lone surrogate"),
        (
            "a.json",
            '[{"p": 1}, {"p": -%s}]' % ("9" * 5000),
            "item 2: an integer of more than 4300 digits; write it as text",
        ),
        ("a.json", '[{"p": 1},\n{"p": 2}\n', "line 3: not JSON: the list does not end; add"),
        ("a.json", '[{"p": 1}]\n]', r"line 2: not JSON \(Extra data at column 1\): '\]'"),
        ("a.csv", "p\na\0b\n", "line 2: a NUL byte"),
        ("a.tsv", "p\nab\n".encode("utf-16-le"), "line 1: a NUL byte, as in UTF-16"),
        ("a.tsv", "p\nab\n".encode("utf-16"), "line 1: UTF-16 or UTF-32; save it as UTF-8"),
        ("a.json", gzip.compress(b"[]", mtime=0), r"line 1: a gzip file; its name must end in .gz"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_table(WHERE, write(tmp_path / name, content))
    assert str(error.value).startswith(WHERE + ": ")
    assert "\n" not in str(error.value)


def test_missing_files_are_named_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^PromptDataModule\(path='x'\): ") as error:
        read_table(WHERE, "sub/../x.jsonl")
    assert f"{tmp_path.resolve() / 'x.jsonl'} does not exist" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"there/x.jsonl does not exist.*data_root='there'"):
        read_table(WHERE, "x.jsonl", data_root="there")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file; give a file"):
        read_table(WHERE, "folder.jsonl")


def test_data_root_is_where_relative_paths_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    write(Path("a.jsonl"), '{"p": "here"}')
    write(Path("there/a.jsonl"), '{"p": "there"}')
    assert read_table(WHERE, "a.jsonl").rows == [{"p": "here"}]
    assert read_table(WHERE, "a.jsonl", data_root="there").rows == [{"p": "there"}]
    assert read_table(WHERE, str(tmp_path / "a.jsonl"), data_root="there").rows == [{"p": "here"}]
    monkeypatch.setenv("HOME", str(tmp_path / "there"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "there"))
    assert read_table(WHERE, "~/a.jsonl", data_root="elsewhere").rows == [{"p": "there"}]


@pytest.fixture
def load_dataset(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands in for that of the datasets package."""
    datasets = Mock()
    datasets.load_dataset.return_value = [{"prompt": "from the hub"}]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    return datasets.load_dataset


@pytest.mark.parametrize(
    ("path", "args", "split"),
    [
        ("owner/name", ("owner/name", None), "train"),
        ("owner/name:test", ("owner/name", None), "test"),
        ("owner/name/main:train[:10%]", ("owner/name", "main"), "train[:10%]"),
    ],
)
def test_hub_data_sets(load_dataset: Mock, path: str, args: tuple[Any, ...], split: str) -> None:
    table = read_table(WHERE, path)
    load_dataset.assert_called_once_with(*args, split=split)
    assert table.rows == [{"prompt": "from the hub"}]
    assert table.place(0) == f"{path}, row 1"


def test_a_name_is_looked_up_after_it_was_said_that_there_is_no_such_file(
    load_dataset: Mock, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a network, the hub is asked for minutes."""
    load_dataset.side_effect = lambda *args, **kwargs: pytest.fail("not said") if not caplog.messages else [{"a": 1}]
    with caplog.at_level("INFO"):
        read_table(WHERE, "no/such")
    assert caplog.messages == [
        f"{WHERE}: there is no file or folder {Path('no/such').resolve()}, so it is looked up on the Hugging Face hub"
    ]


def test_hub_failures_say_what_was_looked_for(
    load_dataset: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    load_dataset.side_effect = RuntimeError("not found\non the hub")
    with pytest.raises(
        ValueError, match=r"there is no file or folder .*no/such, and datasets .*'not found on the hub'"
    ):
        read_table(WHERE, "no/such")
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"there is no file or folder .*owner/name\); pip install 'lit-ppo\[datasets\]'"
    ):
        read_table(WHERE, "owner/name")
    with pytest.raises(ValueError, match=r"not installed; pip install 'lit-ppo\[datasets\]'"):
        read_table(WHERE, write(tmp_path / "a.parquet", "PAR1"))


def test_a_real_parquet_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    table = read_table(WHERE, str(tmp_path / "a.parquet"))
    assert (table.rows, table.place(1)) == (ROWS, f"{tmp_path / 'a.parquet'}, row 2")
    assert read_table(WHERE, str(tmp_path / "a.parquet"), max_rows=1).rows == ROWS[:1]
    with pytest.raises(FileNotFoundError, match=r"b.parquet does not exist"):
        read_table(WHERE, str(tmp_path / "b.parquet"))


def test_columns_are_those_of_all_rows(tmp_path: Path) -> None:
    table = read_table(WHERE, write(tmp_path / "a.jsonl", '{"a": 1}\n{"b": 2, "a": 3}\n'))
    assert table.columns == table.select([0]).columns == ["a", "b"]
    assert (table.select([1]).rows, table.select([1]).lines) == ([{"b": 2, "a": 3}], [2])
