"""The quickstart's grammar, its parser, its report and the files it writes."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lit_ppo.quickstart import ReviewText, generate, generate_opening, parse, report
from lit_ppo.quickstart.grammar import PATTERNS, SHARES
from lit_ppo.quickstart.words import OPINIONS, PLAIN, POLARITIES, SUBJECTS

SMALL = {"n_reviews": 300, "n_labelled": 84, "n_prompts": 60, "n_eval_prompts": 40}
FILES = {"reviews.jsonl": 300, "labelled.jsonl": 84, "prompts.jsonl": 60, "prompts_eval.jsonl": 40}
NOVEL = "We read a novel in bed"
MIXED = ". We found the prose dull, the cover superb and the villain"


def corpus(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [generate(rng) for _ in range(number)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("polarity", POLARITIES)
def test_parser_finds_what_the_generator_was_asked_for(pattern: str, polarity: str) -> None:
    rng = random.Random(f"{pattern} {polarity}")
    for _ in range(120):
        review = generate(rng, polarity, pattern)
        found = parse(review)
        assert found is not None, review
        assert (found.pattern, found.polarity) == (pattern, polarity), review
        assert review.startswith(found.opening)
        assert re.fullmatch(r"[\w ]+", found.opening)
        assert found.subject in SUBJECTS


@pytest.mark.parametrize(
    ("opening", "rest", "pattern", "polarity"),
    [
        (NOVEL, ". The prose was truly superb.", "statement", "positive"),
        ("Yesterday I saw a comedy", ", and my family hated every scene of it.", "taste", "negative"),
        ("After work we rented a villa", ". Was the pool worth the wait? It depends.", "question", "neutral"),
        ("I heard a choir because it was raining", "; for couples the tempo was a joy.", "summary", "positive"),
        (NOVEL, f"{MIXED} lovely.", "list", "positive"),  # two against one
        (NOVEL, f"{MIXED} ugly.", "list", "negative"),
        (NOVEL, f"{MIXED} plain.", "list", "neutral"),  # a draw
    ],
)
def test_parser_reads_reviews_written_by_hand(opening: str, rest: str, pattern: str, polarity: str) -> None:
    for review in (opening + rest, f"  {opening}{rest}\n"):
        found = parse(review)
        assert found is not None
        assert (found.pattern, found.polarity, found.opening) == (pattern, polarity, opening)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        NOVEL,
        f"{NOVEL}. The prose was truly superb",
        f"{NOVEL}. The prose was truly superb. The cover was very dull.",
        f"{NOVEL}. The prose was superb.",
        f"{NOVEL}. The sauce was truly superb.",  # of another subject
        "We read a pizza in bed. The sauce was truly superb.",
        "we read a novel in bed. The prose was truly superb.",
        f"{NOVEL}. the prose was truly superb.",
        "We read a novel  in bed. The prose was truly superb.",
        f"{NOVEL} . The prose was truly superb .",
        f"{NOVEL} zebra. The prose was truly superb.",
        f"{NOVEL} in bed. The prose was truly superb.",
        "The prose was truly superb.",
    ],
)
def test_parser_rejects_what_the_grammar_cannot_have_written(text: str) -> None:
    assert parse(text) is None


def test_parser_takes_any_token_soup_quickly() -> None:
    rng = random.Random(3)
    words = sorted({word for review in corpus(500) for word in re.findall(r"\w+|[^\w\s]", review)})
    for length in (1, 10, 100, 3000):
        for _ in range(50):
            assert parse(" ".join(rng.choice(words) for _ in range(length))) is None
    assert parse("".join(chr(rng.randrange(32, 5000)) for _ in range(5000))) is None
    for review in corpus(300):
        assert parse(review * 2) is parse(review[:-1]) is parse(review + " zebra.") is None
        assert parse(" ".join(review.split(" ")[::-1])) is None


def test_grammar_is_rich() -> None:
    reviews = corpus(20_000)
    assert len({word for review in reviews for word in re.findall(r"[a-z]+", review.lower())}) >= 400
    assert len(PATTERNS) >= 8
    assert len(set(reviews)) > 19_900
    rng = random.Random(0)
    openings = [generate_opening(rng) for _ in range(5_000)]
    assert len(set(openings)) > 3_000
    assert min(len(opening.split()) for opening in openings) >= 4


def test_opinions_are_told_apart_by_words_alone() -> None:
    polarity_of: dict[str, str] = {}
    for slot in OPINIONS.values():
        assert set(slot) == set(POLARITIES)
        assert len({len(words) for words in slot.values()}) == 1  # no polarity is likelier by having more words
        for polarity, words in slot.items():
            for word in words:
                assert polarity_of.setdefault(word, polarity) == polarity
    plain = {word for lists in (PLAIN, *SUBJECTS.values()) for words in lists.values() for word in words}
    assert plain.isdisjoint(polarity_of)
    opinions = {word for word, polarity in polarity_of.items() if polarity != "neutral"}
    rng = random.Random(1)
    for _ in range(500):  # openings are neutral
        text = f" {generate_opening(rng).lower()} "
        assert not [word for word in opinions if f" {word} " in text]


def test_shares_are_those_of_the_grammar() -> None:
    found = [parse(review) for review in corpus(12_000, seed=5)]
    polarities = Counter(review.polarity for review in found if review)
    patterns = Counter(review.pattern for review in found if review)
    for polarity, share in SHARES.items():  # four standard errors of a share of 12,000 draws are 0.017
        assert polarities[polarity] / 12_000 == pytest.approx(share, abs=0.017)
    assert 0.2 <= SHARES["positive"] <= 0.35
    for pattern in PATTERNS:
        assert patterns[pattern] / 12_000 == pytest.approx(1 / len(PATTERNS), abs=0.01)
        positive = sum(r.polarity == "positive" for r in found if r and r.pattern == pattern) / patterns[pattern]
        assert positive == pytest.approx(SHARES["positive"], abs=0.065)  # in every pattern alike


def test_seed_gives_the_text() -> None:
    assert corpus(50, seed=1) == corpus(50, seed=1)
    assert corpus(50, seed=1) != corpus(50, seed=2)
    # the same on every machine and in every Python version
    assert corpus(2, seed=42) == [
        "Last winter we chose a lodge. What my family remembered most was the superb bathroom.",
        "Last summer my sister and I shared a curry. Was the sauce worth the trouble? Opinions differ.",
    ]


@pytest.mark.parametrize(("prompts", "responses"), [([], []), (["We read a novel"], [])])
def test_report_refuses_uneven_lists(prompts: list[str], responses: list[str]) -> None:
    with pytest.raises(ValueError, match="give one response per prompt"):
        report(prompts, responses)


def rows(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name).read_text(encoding="utf-8").splitlines()]


def written(root: Path, **kwargs: Any) -> dict[str, bytes]:
    ReviewText(data_root=str(root), **{**SMALL, **kwargs}).prepare_data()
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def test_files_hold_what_the_stages_need(tmp_path: Path) -> None:
    assert set(written(tmp_path)) == {*FILES, "written.json"}
    assert {name: len(rows(tmp_path, name)) for name in FILES} == FILES
    for row in rows(tmp_path, "labelled.jsonl"):
        found = parse(row["text"])
        assert found is not None
        assert row["label"] == {"positive": 0.95, "neutral": 0.3, "negative": 0.05}[found.polarity]
    balance = Counter(found.pattern for row in rows(tmp_path, "labelled.jsonl") if (found := parse(row["text"])))
    assert set(balance.values()) == {84 // len(PATTERNS)}


def test_held_out_openings_appear_nowhere_else(tmp_path: Path) -> None:
    written(tmp_path, n_reviews=4000, n_labelled=2000, n_prompts=2000, n_eval_prompts=256)
    held_out = {row["prompt"] for row in rows(tmp_path, "prompts_eval.jsonl")}
    prompts = {row["prompt"] for row in rows(tmp_path, "prompts.jsonl")}
    reviews = rows(tmp_path, "reviews.jsonl") + rows(tmp_path, "labelled.jsonl")
    openings = {found.opening for row in reviews if (found := parse(row["text"]))}
    assert (len(held_out), len(prompts)) == (256, 2000)  # all different
    assert held_out.isdisjoint(prompts | openings)


@pytest.mark.parametrize(
    ("number", "path", "file"),
    [
        ("n_reviews", "path", "reviews.jsonl"),
        ("n_labelled", "labelled_path", "labelled.jsonl"),
        ("n_prompts", "prompts_path", "prompts.jsonl"),
        ("n_eval_prompts", "eval_prompts_path", "prompts_eval.jsonl"),
    ],
)
def test_each_file_has_a_number_of_rows_and_a_name(tmp_path: Path, number: str, path: str, file: str) -> None:
    with pytest.raises(ValueError, match=rf"ReviewText\({number}=0\)"):
        ReviewText(**{number: 0})
    before, more = written(tmp_path / "old"), {number: SMALL[number] + 1}
    after = written(tmp_path / "old", **more)
    assert {name for name in after if after[name] != before[name]} == {file, "written.json"}
    assert after == written(tmp_path / "fresh", **more)
    assert written(tmp_path / "named", **more, **{path: "other.jsonl"})["other.jsonl"] == after[file]


def test_another_seed_is_another_text(tmp_path: Path) -> None:
    before, after = written(tmp_path / "0"), written(tmp_path / "1", text_seed=1)
    assert {name for name in after if after[name] != before[name]} == {*FILES, "written.json"}


def test_complete_files_are_left_alone_and_incomplete_or_outdated_ones_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert written(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    (tmp_path / "prompts.jsonl").unlink()
    assert written(tmp_path) == before
    (tmp_path / "written.json").unlink()  # as after an interrupt
    (tmp_path / "reviews.jsonl").write_text("", encoding="utf-8")
    assert written(tmp_path) == before
    monkeypatch.setattr("lit_ppo.quickstart.data.RATINGS", {"positive": 0.9, "neutral": 0.3, "negative": 0.05})
    after = written(tmp_path)  # by another grammar
    assert {name for name in after if after[name] != before[name]} == {"labelled.jsonl", "written.json"}


def test_batches_and_tokenizer_come_from_the_reviews(tmp_path: Path) -> None:
    data = ReviewText(
        data_root=str(tmp_path / "data"), tokenizer_path=str(tmp_path / "tokenizer"), tokenizer_vocab_size=600,
        batch_size=8, max_length=64, val_fraction=0.1, seed=0, **SMALL,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    tokenizer = data.load_tokenizer()
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert parse(tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)) is not None
