"""Files of ratings: what counts, and what is wrong with what does not."""

from pathlib import Path

import pytest

from lit_ppo.callbacks.ratings import read_ratings


def ratings(path: Path, text: str) -> dict[int, list[float]]:
    path.write_text(text)
    return read_ratings("Monitor(gold=...)", str(path))


def test_rows_with_a_rating_by_update(tmp_path: Path) -> None:
    """Whatever else a row has; one that has none yet is left out."""
    lines = (
        '{"update": 0, "response": "a", "rating": 0.5}\n{"update": 10, "rating": null}\n\n'
        '{"update": 10, "rating": "3"}\n{"update": 10, "response": "c"}\n{"update": 0, "rating": 1}\n'
    )
    assert ratings(tmp_path / "a.jsonl", lines) == {0: [0.5, 1.0], 10: [3.0]}
    assert ratings(tmp_path / "a.csv", "update,rating,who\n20,-1,me\n20,,me\n") == {20: [-1.0]}
    assert ratings(tmp_path / "a.tsv", "update\trating\n20\t2\n") == {20: [2.0]}


def test_nothing_yet_is_no_rating(tmp_path: Path) -> None:
    assert read_ratings("Monitor(gold=...)", str(tmp_path / "none.jsonl")) == {}
    assert ratings(tmp_path / "a.jsonl", "\n") == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"update": 1.5, "rating": 1}', "update is 1.5; give the number of updates"),
        ('{"update": -1, "rating": 1}', "update is -1; give"),
        ('{"update": true, "rating": 1}', "update is True; give"),
        ('{"rating": 1}', "update is None; give"),
        ('{"update": 1, "rating": "good"}', "rating is 'good'; give a finite number"),
        ('{"update": 1, "rating": NaN}', "rating is nan; give a finite number"),
        ("1", "'1' is not an object"),
        ("{", "not JSON"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"Monitor\(gold=\.\.\.\): .*a\.jsonl, line 2: {message}"):
        ratings(tmp_path / "a.jsonl", f'{{"update": 0, "rating": 1}}\n{row}\n')
