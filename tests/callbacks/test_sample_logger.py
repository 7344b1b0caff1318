"""SampleLogger: when it samples, what it shows beside what, and that nothing in a response is obeyed."""

import json
import re
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning as L
import numpy as np
import pytest

from lit_ppo.callbacks import SampleLogger
from lit_ppo.callbacks.sample_logger import LEGEND
from lit_ppo.callbacks.showing import pieces
from lit_ppo.shown import escaped
from tests.helpers.spies import Recorder, Spy
from tests.helpers.toy import Toy
from tests.helpers.toy_data import ToyData
from tests.helpers.toy_runs import run_updates, trainer_of
from tests.helpers.toys import make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "SampleLogger": Trick(
        acts={"every": 2, "prompts": 5},
        refuses={"every": 0, "prompts": 0},
        knobs={"every": ({}, {"every": 3}), "prompts": ({}, {"prompts": 4})},
        monitor=True,
    )
}


def shown(text: str) -> tuple[list[list[str]], str, ElementTree.Element]:
    """Rows and what stands above them as a browser shows what TensorBoard makes of a text, and all elements."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own parts say about each other
        from tensorboard.plugins.text.text_plugin import text_array_to_html
    html = text_array_to_html(np.array(text), enable_markdown=True).replace("<br>", "\n")
    page = ElementTree.fromstring(f"<page>{html}</page>")
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]
    return rows, "".join(text for paragraph in page.findall("p") for text in paragraph.itertext()), page


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def watch(folder: Path, updates: int, **options: Any) -> tuple[Toy, Recorder]:
    logger = Recorder(folder)
    monitor = SampleLogger(**{"every": 2, "prompts": 3, **options.pop("monitor", {})})
    return run_updates(monitor, updates, logger=logger, **options), logger


# ---- when, and of what


def test_before_the_first_every_second_and_at_the_end(tmp_path: Path):
    """Nothing is sampled when it is not due; the folder is made."""
    asked: list[tuple[int, str]] = []

    class Counting(Toy):
        def sampled(self, prompts: list[str], samples_per_prompt: int, stream: str) -> Any:
            asked.append((int(self.updates), stream))
            return super().sampled(prompts, samples_per_prompt, stream)

    _, logger = watch(tmp_path / "runs/one", 5, module=Counting())
    assert asked == [(step, "samples") for step in (0, 2, 4, 5)]
    assert [(tag, step) for tag, _, step in logger.of("add_text")] == [("samples", step) for step in (0, 2, 4, 5)]
    assert [line["update"] for line in lines(tmp_path / "runs/one")] == [0] * 3 + [2] * 3 + [4] * 3 + [5] * 3


def test_lines_hold_what_the_policy_says_now(tmp_path: Path):
    """The toy's held-out score is the sum of its actions, its letters are their numbers; KL is log pi - log ref."""
    module, _ = watch(tmp_path, 2, monitor={"prompts": 5})
    final = module.sampled([f"prompt {i}" for i in range(5)], 1, "samples")
    last = lines(tmp_path)[-5:]
    assert [line["prompt"] for line in last] == [f"prompt {i}" for i in range(5)]
    assert [len(line["response"]) for line in last] == [1, 2, 3, 4, 1]
    for i, line in enumerate(last):
        assert line["response"] == final.responses[i]
        assert line["score"] == sum("abcde".index(letter) for letter in line["response"])
        n = len(line["response"])
        kl = (final.logprobs - final.ref_logprobs)[i, :n].tolist()
        assert line["tokens"] == [[letter, pytest.approx(k)] for letter, k in zip(line["response"], kl, strict=True)]
        assert line["kl"] == pytest.approx(sum(kl))
    first = lines(tmp_path)[:5]
    assert [line["response"] for line in first] == Toy().sampled([""] * 5, 1, "samples").responses
    assert [line["response"] for line in first] != [line["response"] for line in last]


def test_before_and_after_stand_side_by_side(tmp_path: Path):
    _, logger = watch(tmp_path, 2)
    (start, _, _), (later, above, _) = (shown(text) for _, text, _ in logger.of("add_text"))
    before, after = lines(tmp_path)[:3], lines(tmp_path)[3:]
    assert start[0] == ["prompt", "before the first update", "score"]
    assert start[1:] == [[s["prompt"], s["response"], f"{s['score']:+.2f}"] for s in before]
    assert later[0] == ["prompt", "before the first update", "score", "after 2 updates", "score", "KL"]
    for row, one, other in zip(later[1:], before, after, strict=True):
        assert row[:3] == [one["prompt"], one["response"], f"{one['score']:+.2f}"]
        assert row[3] == other["response"]
        assert row[4:] == [f"{other['score']:+.2f}", f"{other['kl']:+.2f}"]
    assert above == "KL of a token, nats: italic from 0.1, bold from 0.5, both from 2, code from -0.1 down"


def test_the_style_of_a_token_shows_its_kl():
    """From 0.1, 0.5 and 2 nats on, and from -0.1 down; what was not asked before is not compared with."""
    sampler = SampleLogger()
    sampler._updates, sampler._before = 1, []
    tokens = [["a", 0.05], ["b", 0.1], ["c", 0.5], ["d", 2.0], ["e", -0.09], ["f", -0.1]]
    table = sampler._table([{"prompt": "p", "response": "abcdef", "score": 0.0, "kl": 2.46, "tokens": tokens}])
    rows, _, page = shown(table)
    assert rows[1] == ["p", "(not sampled)", "+nan", "abcdef", "+0.00", "+2.46"]
    styled = {
        tag: ["".join(part.itertext()) for part in page.findall(f".//td//{tag}")] for tag in ("em", "strong", "code")
    }
    assert styled == {"em": ["b", "d"], "strong": ["c", "d"], "code": ["f"]}


def test_held_out_prompts_come_first_then_the_training_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    peek = ToyData.peek
    monkeypatch.setattr(ToyData, "peek", lambda data, split, n: asked.append(split) or peek(data, split, n))
    for peeks, splits in ((("train", "val"), ["val", "val"]), (("train",), ["val", "train"] * 2)):
        monkeypatch.setattr(ToyData, "peeks", peeks)
        asked.clear()
        watch(tmp_path, 1)
        assert asked == splits


def test_data_without_prompts_to_look_at_is_refused_before_the_first_rollout():
    module = Toy()
    with pytest.raises(TypeError, match="SampleLogger reads held-out prompts, but Toy is trained without a data"):
        trainer_of([SampleLogger()], 1).fit(module, ToyData(8).train_dataloader())
    assert module.experiences == []

    class Closed(ToyData):
        peek = property()

    with pytest.raises(TypeError, match="but Toy is trained on Closed, which lacks peek"):
        trainer_of([SampleLogger()], 1).fit(module, datamodule=Closed(8))


# ---- going on


def test_a_resumed_run_that_is_stopped_at_once_writes_nothing_twice(tmp_path: Path):
    watch(tmp_path, 2, save=tmp_path / "two.ckpt")
    before = lines(tmp_path)
    stop = Spy("on_train_start", lambda module: setattr(module.trainer, "should_stop", True))
    logger = Recorder(tmp_path)
    module = run_updates([SampleLogger(), stop], 4, logger=logger, resume=tmp_path / "two.ckpt")
    assert int(module.updates) == 2
    assert lines(tmp_path) == before
    assert logger.of("add_text") == []


def test_a_run_from_the_start_starts_the_file_again(tmp_path: Path):
    """Also from a checkpoint of before the first update: the first answers are in the file once, not left out."""
    early = Spy("on_rollout_start", lambda module, prompts: module.trainer.save_checkpoint(tmp_path / "none.ckpt"))
    run_updates([SampleLogger(every=2, prompts=3), early], 3, logger=Recorder(tmp_path), resume=None)
    for resume in (None, tmp_path / "none.ckpt"):
        watch(tmp_path, 2, resume=resume)
        assert [line["update"] for line in lines(tmp_path)] == [0] * 3 + [2] * 3


def test_the_first_process_alone_writes_and_not_in_a_fast_dev_run(
    tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, callbacks=[SampleLogger()], fast_dev_run=True, max_steps=-1)
    trainer.fit(make_module(tiny_lm), make_data(tmp_path))
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda trainer: False))
    _, logger = watch(tmp_path, 1)
    assert logger.of("add_text") == []
    assert not list(tmp_path.rglob("samples.jsonl"))


def test_half_a_line_of_a_run_that_was_killed_is_no_obstacle(tmp_path: Path):
    """Nor a last line without its end, as editors write it when ratings are added, nor one after the checkpoint."""
    watch(tmp_path, 2, save=tmp_path / "two.ckpt")
    file = tmp_path / "samples.jsonl"
    whole = file.read_text()
    for rest in ('{"update": 4, "promp', '{"update": 4}\n', "3\n", "{}\n", "\n", ""):
        file.write_text(whole.removesuffix("\n") + ("\n" + rest if rest else ""))
        watch(tmp_path, 4, resume=tmp_path / "two.ckpt")
        assert [line["update"] for line in lines(tmp_path)] == [0] * 3 + [2] * 3 + [4] * 3


# ---- nothing is obeyed

WICKED = [
    "<script>alert('now')</script>",
    "a | b |\n|---|---|\n| c | d |",
    "line\n\n# heading\n\n- item **bold** `code` [link](javascript:alert(1))",
    "</td></tr></table><h1>out</h1>",
    "\x1b[2J\x1b]0;title\x07\x9b31m\x00 \x7f",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "\u202egnp.exe \u2028 \ud800",
    "\x02wzxhzdk:0\x03 <!-- comment --> <![CDATA[ x ]]> <?php ?>",
]


@pytest.mark.parametrize("wicked", WICKED)
def test_a_response_is_shown_as_text_whatever_it_is(wicked: str):
    """In TensorBoard's own rendering: as many cells as there should be, and in each the text, escapes written out."""
    sampler = SampleLogger()
    sampler._updates, sampler._before = 3, [{"prompt": wicked, "tokens": [[wicked, 0.0]], "score": 1.0}]
    tokens = [[wicked, 0.0]]
    table = sampler._table([{"prompt": wicked, "response": wicked, "score": 2.0, "kl": 0.0, "tokens": tokens}])
    rows, above, page = shown(table)
    assert {element.tag for element in page.iter()} == {
        *["page", "table", "thead", "tbody", "tr", "th", "td", "pre", "p", "em", "strong", "code"]
    }
    assert above == re.sub("[*`]", "", LEGEND)
    whole = ["".join(element.itertext()) for element in page.iter("pre")]
    assert whole == ["score", "score", "KL", "+1.00", "+2.00", "+0.00"]  # TensorBoard breaks numbers in two
    written_out = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in wicked)
    assert rows[1] == [written_out, written_out, "+1.00", written_out, "+2.00", "+0.00"]
    assert written_out.replace("\n", "").isprintable()


def test_the_file_can_be_printed_on_a_terminal_and_read_back(tmp_path: Path):
    """Persian joins letters with U+200C, families are joined with U+200D: they stay readable in the table."""
    response = WICKED[4] + "\n\u202e می\u200cروم \U0001f468\u200d\U0001f469 映画\u3000最高"

    class Says(Toy):
        def sampled(self, *args: Any, **kwargs: Any) -> Any:
            rows = super().sampled(*args, **kwargs)
            rows.responses = [response] * len(rows)
            return rows

    watch(tmp_path, 1, module=Says())
    assert set((tmp_path / "samples.jsonl").read_bytes()) <= {*range(32, 128), 10}
    assert lines(tmp_path)[0]["response"] == response
    assert escaped(response, line_ends=False).endswith(response[-13:])


def test_tokens_of_one_character_come_as_one():
    """Bytes as tokens: an umlaut is two of them, a half one at the end stays."""

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    ids = [*"für".encode(), 0xC3]
    assert pieces(decode, ids, [1.0, 2.0, 4.0, 8.0, 16.0]) == [("f", 1.0), ("ü", 6.0), ("r", 8.0), ("\ufffd", 16.0)]
    assert pieces(decode, [], []) == []
