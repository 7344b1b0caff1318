"""Rows of JSON, CSV and TSV files, of which one at a time is in memory."""

import codecs
import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeAlias

from lit_ppo.data.table import DEPTH, ROW_COSTS, Intake, Row, listed, short
from lit_ppo.shown import message_of

LONGEST_FIELD = 2**31 - 1  # csv's own limit is 128 KiB; a C long holds no more than this on Windows
# how other kinds of files begin
KINDS = {
    b"\x1f\x8b": "a gzip file; its name must end in .gz",
    b"PAR1\x15": "a Parquet file; its name must end in .parquet",
    b"PK\x03\x04": "a zip file; unpack it",
    b"\xff\xfe": "UTF-16 or UTF-32; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}
NOT_UTF8 = "not UTF-8 ({}); save it as UTF-8"
BLOCK = 2**16
Content: TypeAlias = "gzip.GzipFile | io.BufferedReader[Any]"
LONE = re.compile(r"\\u[dD][89a-fA-F]")  # perhaps half of a character
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")


def _decoded_lines(content: Content, intake: Intake, costs: int = ROW_COSTS) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, one of them in memory; each counts ``costs`` bytes beside its text."""
    number, limit = 0, intake.row_limit
    while line := content.readline(limit + 1):
        number += 1
        if len(line) > limit:
            intake.refuse_long(number)
        intake.spend(number, len(line) + costs)
        if number == 1:
            if kind := next((kind for start, kind in KINDS.items() if line.startswith(start)), None):
                intake.refuse(number, kind)
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            intake.refuse(number, NOT_UTF8.format(error.reason))
        yield number, text


def json_lines(content: Content, intake: Intake) -> Iterator[tuple[int, Any]]:
    """What each line holds, with its number."""
    for number, line in _decoded_lines(content, intake):
        text = line.lstrip("\ufeff").rstrip("\r\n")  # where files of Windows were joined
        if text and not text.isspace():
            try:
                row = json.loads(text)
            except (RecursionError, ValueError) as error:
                intake.refuse(number, _not_json(error, short(text[:1000])))
            yield number, _checked(row, number, text, intake)


def _not_json(error: Exception, broken: str, column: int = 0) -> str:
    if isinstance(error, RecursionError):
        return f"more than {DEPTH} nested lists or objects; flatten them"
    if not isinstance(error, json.JSONDecodeError):  # Python reads and writes no longer integers
        return "an integer of more than 4300 digits; write it as text"
    return (
        f"not JSON ({error.msg} at column {column or error.colno}){broken and f': {broken}'}; repair or delete the line"
    )


def _checked(row: Any, number: int, text: str, intake: Intake) -> Any:
    """A row from JSON; its values are looked at where the text has what may be wrong."""
    if isinstance(row, dict) and (text.count("[") + text.count("{") > DEPTH or LONE.search(text)):
        intake.values(number, row)
    return row


class JSONList:
    """A list of objects in a file, of which one at a time is in memory."""

    def __init__(self, content: Content, intake: Intake) -> None:
        self._content, self._intake = content, intake
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at = "", 0  # what was read and is still needed, and the place in it
        self._line, self._column, self._newlines = 1, 0, 0  # of the start of the text; line breaks read

    def items(self) -> Iterator[tuple[int, Any]]:
        """The items with their numbers, counted from 1."""
        self._next()
        self._at += 1  # the bracket
        number, char = 0, self._next()
        while char != "]" or number:
            number += 1
            row, end = self._item(number)
            yield number, _checked(row, number, self._text[self._at : end], self._intake)
            self._at = end
            char = self._next()
            if char == "]":
                break
            if not char:
                self._intake.refuse(self._line, "not JSON: the list does not end; add ']', or write it again", "line")
            if char != ",":
                self._refuse(json.JSONDecodeError("Expecting ',' delimiter", self._text, self._at))
            self._at += 1
            self._next()
        self._at += 1
        if self._next():
            self._refuse(json.JSONDecodeError("Extra data", self._text, self._at))

    def _item(self, number: int) -> tuple[Any, int]:
        """The item that begins here, and its end."""
        limit, complete = self._intake.row_limit, False
        while True:
            row, end = self._decoded(number, complete)
            if end and (end < len(self._text) or complete):  # else it may go on
                break
            if len(self._text) - self._at > limit:
                self._intake.refuse_long(number)
            complete = not self._read_on()
        if end - self._at > limit:
            self._intake.refuse_long(number)
        self._intake.spend(number, ROW_COSTS)
        return row, end

    def _decoded(self, number: int, complete: bool) -> tuple[Any, int]:
        """As :meth:`_item`; an end of 0 where the text that was read breaks off."""
        try:
            return DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            cut_off = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
            if complete or not cut_off:
                self._refuse(error)
        except (RecursionError, ValueError) as error:
            self._intake.refuse(number, _not_json(error, ""))
        return None, 0

    def _next(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while (found := SPACE.match(self._text, self._at)) and found.end() == len(self._text):
            self._at = found.end()
            if not self._read_on():
                return ""
        assert found is not None
        self._at = found.end()
        return self._text[self._at]

    def _read_on(self) -> bool:
        """Read as much again as is needed still, and forget the rest; False at the end of the file."""
        gone, self._text = self._text[: self._at], self._text[self._at :]
        lines = gone.count("\n")
        self._column = len(gone) - gone.rfind("\n") - 1 if lines else self._column + len(gone)
        self._line, self._at = self._line + lines, 0
        held = len(self._text)
        block = self._content.read(min(max(BLOCK, held), self._intake.row_limit - held + 1))
        try:
            self._text += self._decode(block, not block)
        except UnicodeDecodeError as error:
            line = self._newlines + error.object.count(b"\n", 0, error.start) + 1
            self._intake.refuse(line, NOT_UTF8.format(error.reason), "line")
        self._newlines += block.count(b"\n")
        self._intake.spend(self._newlines + 1, len(block), "line")
        return bool(block)

    def _refuse(self, error: json.JSONDecodeError) -> NoReturn:
        """Raise an error in the text that was read, with its place in the file."""
        text = self._text
        start = text.rfind("\n", 0, error.pos) + 1
        broken = text[start : start + 1000].partition("\n")[0]
        column = error.colno + (self._column if error.lineno == 1 else 0)
        self._intake.refuse(self._line + error.lineno - 1, _not_json(error, short(broken), column), "line")


def delimited_rows(
    content: Content, delimiter: str, column_names: Sequence[str] | None, intake: Intake
) -> Iterator[tuple[int, Row]]:
    """The rows of a CSV or TSV file, with the number of their first line."""
    names = list(column_names) if column_names is not None else None
    for line, fields in _tsv_fields(content, intake) if delimiter == "\t" else _csv_fields(content, intake):
        if names is None:
            names = fields
            if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
                intake.refuse(line, f"the header repeats {listed(repeated)}; rename columns")
        elif len(fields) != len(names):
            problem = f"{len(fields)} fields, but the columns are {listed(names)}; repair the line, or give "
            intake.refuse(line, problem + "column_names if the file has no header")
        else:
            yield line, dict(zip(names, fields, strict=True))


def _table_lines(content: Content, intake: Intake, costs: int = ROW_COSTS) -> Iterator[tuple[int, str]]:
    for number, line in _decoded_lines(content, intake, costs):
        if "\0" in line:
            intake.refuse(number, "a NUL byte, as in UTF-16 and in files that are no text; save it as UTF-8")
        yield number, line


def _tsv_fields(content: Content, intake: Intake) -> Iterator[tuple[int, list[str]]]:
    for number, line in _table_lines(content, intake):
        text = line.removesuffix("\n")
        if text.strip("\r"):
            yield number, text.removesuffix("\r").split("\t")


def _csv_fields(content: Content, intake: Intake) -> Iterator[tuple[int, list[str]]]:
    start, size = 1, 0  # a quoted field may span lines: the row's own line is the first of them

    def texts() -> Iterator[str]:
        nonlocal size
        for _, line in _table_lines(content, intake, costs=0):
            size += len(line)
            if size > intake.row_limit:
                intake.refuse_long(start, "shorten it, or close its quotation marks")
            if "\r" in line[:-2]:
                yield from io.StringIO(line, newline="")  # ends lines there, too
            else:
                yield line

    reader = csv.reader(texts(), strict=True)
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        for fields in reader:
            intake.spend(start, ROW_COSTS)
            if fields:
                yield start, fields
            start, size = reader.line_num + 1, 0
    except csv.Error as error:
        intake.refuse(start, f"{message_of(error)}; repair the quoting")
    finally:
        csv.field_size_limit(limit)
