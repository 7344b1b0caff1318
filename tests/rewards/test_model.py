"""Reward models against the stock model on single texts."""

import math
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_ppo.rewards import RewardModel, scores_of
from lit_ppo.rewards.inputs import conversations
from tests.helpers.rewards import experience as rows_of
from tests.helpers.tiny import WORDS, make_reward_model, make_tokenizer

PROMPTS = ["the film was", "a", "we saw the very long and slow movie that they loved but", "it felt"]
RESPONSES = [
    " really good",
    " great bright happy story [EOS]",
    " bad [EOS] [EOS]",
    " not dull and not really awful",
]
TEXTS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
SHARP = {"initializer_range": 0.5}  # scores that differ


def experience(prompts: list[str] = PROMPTS, responses: list[str] = RESPONSES, **columns: list[Any]) -> SimpleNamespace:
    return rows_of(prompts, responses, **columns)


def stock(path: Path, texts: list[str], tokenizer: Any = None, label: int = 0, **options: Any) -> list[float]:
    """What transformers gives for each text alone."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", **options)).logits[0, label].item() for text in texts]


def token_scores(path: Path, ids: list[int]) -> list[float]:
    """The head applied by hand to every token of one text."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    return (hidden @ model.score.weight[0]).tolist()


def built(path: Path, **options: Any) -> RewardModel:
    source = RewardModel(str(path), **options)
    source.build()
    return source


def shapes_of_forwards(source: RewardModel) -> list[tuple[int, ...]]:
    """Of the ids: is filled while texts are scored."""
    shapes: list[tuple[int, ...]] = []
    hook: Any = lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
    source.model.register_forward_pre_hook(hook, with_kwargs=True)
    return shapes


def pad_is_eos() -> Any:
    tokenizer = make_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


TOKENIZERS = [make_tokenizer, partial(make_tokenizer, pad=False), pad_is_eos]

# score at the last token


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS, partial(make_tokenizer, bos=True)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "distilbert"])
def test_last_is_what_the_stock_model_gives_for_each_text(family: str, tokenizer: Any, tmp_path: Path):
    """In batches of three texts and of one."""
    path = make_reward_model(tmp_path, family, tokenizer=tokenizer(), **SHARP)
    scores = RewardModel(str(path), batch_size=3)(experience())
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(stock(path, TEXTS), rel=1e-5, abs=1e-5)
    assert len({round(score, 3) for score in scores.tolist()}) == len(TEXTS)  # else the comparison says little


MIXED = [" ".join(WORDS[:length]) for length in (3, 20, 1, 7, 2, 6, 5, 1)]


@pytest.mark.parametrize("aggregation", ["last", "mean"])
def test_forwards_hold_what_the_budget_allows_padding_included(aggregation: Any, tmp_path: Path):
    """Lengths 20 7 6 5 3 2 1 1, cut by hand; scores are those of one text at a time."""
    path = make_reward_model(tmp_path, **SHARP)
    alone = RewardModel(str(path), aggregation=aggregation, batch_size=1).score_texts(MIXED)
    if aggregation == "last":
        assert alone.tolist() == pytest.approx(stock(path, MIXED), rel=1e-5, abs=1e-5)
    for budget, shapes in (  # texts, longest length: their product keeps to the tokens, but for the text of 20
        ({"batch_size": 5}, [(5, 20), (3, 2)]),
        ({"batch_tokens": 14}, [(1, 20), (2, 7), (2, 5), (3, 2)]),
        ({"batch_tokens": 1}, [(1, 20), (1, 7), (1, 6), (1, 5), (1, 3), (1, 2), (1, 1), (1, 1)]),
        ({"batch_tokens": 160}, [(8, 20)]),
        ({"batch_tokens": 159}, [(7, 20), (1, 1)]),
    ):
        source = built(path, aggregation=aggregation, **budget)
        seen = shapes_of_forwards(source)
        assert source.score_texts(MIXED).tolist() == pytest.approx(alone.tolist(), rel=1e-5, abs=1e-5)
        assert seen == shapes


def test_a_forward_holds_32_texts_by_default(tiny_reward: Path):
    source = built(tiny_reward)
    shapes = shapes_of_forwards(source)
    source.score_texts(["a film"] * 33)
    assert shapes == [(32, 2), (1, 2)]


def test_tokenizer_of_another_vocabulary(tmp_path: Path):
    """The reward model reads text: its ids are its own, those of another tokenizer if that is named."""
    path = make_reward_model(tmp_path / "model", **SHARP)
    other = make_tokenizer(tmp_path / "other", words=WORDS[::-1])
    scores = RewardModel(str(path), tokenizer=str(tmp_path / "other"))(experience())
    assert scores.tolist() == pytest.approx(stock(path, TEXTS, other), rel=1e-5, abs=1e-5)
    assert scores.tolist() != pytest.approx(stock(path, TEXTS), rel=1e-2)


# mean over the response


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_mean_is_over_the_responses_tokens(family: str, tokenizer: Any, tmp_path: Path):
    path = make_reward_model(tmp_path, family, tokenizer=tokenizer(), **SHARP)
    scores = RewardModel(str(path), aggregation="mean", batch_size=3)(experience())
    for score, text, response in zip(scores.tolist(), TEXTS, RESPONSES, strict=True):
        of_tokens = token_scores(path, AutoTokenizer.from_pretrained(path)(text).input_ids)
        words = len(response.split())  # one token each, at the end
        assert score == pytest.approx(math.fsum(of_tokens[-words:]) / words, rel=1e-5, abs=1e-5)


def test_mean_leaves_out_tokens_that_the_tokenizer_adds(tmp_path: Path):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", tokenizer.bos_token_id), ("[EOS]", tokenizer.eos_token_id)]
    )
    path = make_reward_model(tmp_path, tokenizer=tokenizer, **SHARP)
    of_tokens = token_scores(path, tokenizer("the film was really good").input_ids)
    score = RewardModel(str(path), aggregation="mean")(experience(["the film was"], [" really good"]))
    assert score.item() == pytest.approx((of_tokens[-3] + of_tokens[-2]) / 2, rel=1e-5)


def test_mean_over_an_empty_response_is_the_score_at_the_last_token(tmp_path: Path):
    path = make_reward_model(tmp_path, **SHARP)
    rows = experience(PROMPTS, ["", " good", "", " bad"])
    means, lasts = RewardModel(str(path), aggregation="mean")(rows), RewardModel(str(path))(rows)
    assert means.tolist() == pytest.approx(lasts.tolist(), rel=1e-5)  # one-token responses too


def test_mean_is_refused_where_there_is_no_score_per_token(tmp_path: Path):
    path = make_reward_model(tmp_path, "distilbert")
    with pytest.raises(ValueError, match=r"RewardModel\(aggregation='mean'\): DistilBert.* gives no score per token"):
        RewardModel(str(path), aggregation="mean").build()


# chat

MESSAGES = [
    [{"role": "user", "content": "was the film good"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "good"}, {"role": "user", "content": "and"}],
]
ANSWERS = ["really good", "not bad and not good"]


def chat_ids(tokenizer: Any) -> list[list[int]]:
    turns = zip(MESSAGES, ANSWERS, strict=True)
    conversations = [[*messages, {"role": "assistant", "content": answer}] for messages, answer in turns]
    return [tokenizer.apply_chat_template(turns, return_dict=False) for turns in conversations]


def test_chat_goes_through_the_reward_models_own_template(tmp_path: Path):
    tokenizer = make_tokenizer(bos=True, chat=True)
    path = make_reward_model(tmp_path, tokenizer=tokenizer, **SHARP)
    ids = chat_ids(tokenizer)
    assert [row.count(tokenizer.bos_token_id) for row in ids] == [1, 1]
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    expected = [model(torch.tensor([row])).logits.item() for row in ids]
    rendered = ["of no matter", "of no matter"]  # by the actor's template
    scores = RewardModel(str(path))(experience(rendered, ANSWERS, messages=MESSAGES))
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("content", "responses", "with_end"),
    [
        ("m['content']", ANSWERS, False),
        ("(m['content'] | trim)", [f"  {answer}  " for answer in ANSWERS], False),  # some templates strip the turns
        ("m['content'].replace('very ', '')", ["really very good", "not very bad and not very good"], True),
    ],
)
def test_mean_over_a_chat_response(content: str, responses: list[str], with_end: bool, tmp_path: Path):
    """Its tokens stand right before the end of the turn, which is taken in only where the template rewrites it."""
    tokenizer = make_tokenizer(bos=True, chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content'] + ' ' +", f"{content} +")
    path = make_reward_model(tmp_path, tokenizer=tokenizer, **SHARP)
    scores = RewardModel(str(path), aggregation="mean")(experience(["", ""], responses, messages=MESSAGES))
    for score, ids, answer in zip(scores.tolist(), chat_ids(tokenizer), ANSWERS, strict=True):
        of_tokens = token_scores(path, ids)[-len(answer.split()) - 1 : None if with_end else -1]
        assert score == pytest.approx(math.fsum(of_tokens) / len(of_tokens), rel=1e-5)


def test_mean_over_a_chat_response_that_repeats_the_prompt(tmp_path: Path):
    tokenizer = make_tokenizer(bos=True, chat=True)
    path = make_reward_model(tmp_path, tokenizer=tokenizer, **SHARP)
    turns = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "good"}]
    score = RewardModel(str(path), aggregation="mean")(experience([""], ["good"], messages=[turns[:1]]))
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert score.item() == pytest.approx(token_scores(path, ids)[-2], rel=1e-5)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("response", ["end", "n", "t", "im_end", " end", "what? end"])
@pytest.mark.parametrize("prompt", [[], [{"role": "assistant", "content": "the"}]])
def test_a_chat_response_with_words_of_the_template(prompt: list[Any], response: str, ended: bool):
    """They also stand in what opens and closes a turn; this template knows no generation prompt."""
    tokenizer = make_tokenizer(chat=True)
    turn = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    messages = [{"role": "user", "content": "what? end"}, *prompt]
    rows = experience([""], [response], messages=[messages])
    (text,), (span,) = conversations(tokenizer, "", rows, [ended], {})
    opened = "<|im_start|>user\nwhat? end<|im_end|>\n<|im_start|>assistant\n" + ("the" if prompt else "")
    assert text == opened + response + ("<|im_end|>\n" if ended else "")
    assert text[slice(*span)] == response.strip()
    assert span[1] == len(opened + response)


def test_chat_without_a_template_is_refused(tiny_reward: Path):
    with pytest.raises(ValueError, match=r"the data are chat messages, but the tokenizer .* has no chat template"):
        RewardModel(str(tiny_reward))(experience(["", ""], ANSWERS, messages=MESSAGES))


def test_chat_options_and_a_last_message_that_goes_on(tmp_path: Path):
    """The answer is the end of the assistant's message; both are one turn."""
    tokenizer = make_tokenizer(bos=True, chat=True)
    tokenizer.chat_template += "{{ 'very' if loudly }}"
    path = make_reward_model(tmp_path, tokenizer=tokenizer, **SHARP)
    asked, begun = {"role": "user", "content": "the film"}, {"role": "assistant", "content": "it was"}
    source = RewardModel(str(path), chat_template_kwargs={"loudly": True})
    score = source(experience([""], [" really good"], messages=[[asked, begun]]))
    ids = tokenizer("user the film [EOS] assistant it was really good [EOS] very")["input_ids"]
    expected = AutoModelForSequenceClassification.from_pretrained(path).eval()(torch.tensor([ids])).logits.item()
    assert score.item() == pytest.approx(expected, rel=1e-5)
    tokenizer.chat_template = "{% for m in messages[1:2] if m.role == 'user' %}{{ raise_exception('no') }}{% endfor %}"
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"chat 0: the chat template refuses message 2 of 3 \(role 'user'\): no"):
        RewardModel(str(path))(experience([""], ["good"], messages=[[asked, asked]]))


# arguments and errors


def test_label_by_index_and_by_name(tmp_path: Path):
    names = {"id2label": {0: "bad", 1: "middling", 2: "good"}, "label2id": {"bad": 0, "middling": 1, "good": 2}}
    path = make_reward_model(tmp_path, "distilbert", num_labels=3, **SHARP, **names)
    for label, index in [("good", 2), (2, 2), ("bad", 0), (0, 0)]:
        scores = RewardModel(str(path), label=label)(experience())
        assert scores.tolist() == pytest.approx(stock(path, TEXTS, label=index), rel=1e-5)
    for label in (None, "great", 3):
        with pytest.raises(ValueError, match=rf"RewardModel\(label={label!r}\): .* bad, middling, good; .* 0 to 2"):
            RewardModel(str(path), label=label).build()


def test_mean_takes_the_label_too(tmp_path: Path):
    path = make_reward_model(tmp_path, num_labels=2, **SHARP)
    score = RewardModel(str(path), aggregation="mean", label=1)(experience(["a"], [" film"]))
    assert score.item() == pytest.approx(stock(path, ["a film"], label=1)[0], rel=1e-5)


def test_weights_are_float32_unless_model_kwargs_say_otherwise(tmp_path: Path):
    path = make_reward_model(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(path).to(torch.bfloat16).save_pretrained(path)
    assert built(path).model.dtype == torch.float32
    half = RewardModel(str(path), model_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"})
    assert half(experience()).dtype == torch.float32
    assert half.model.dtype == torch.bfloat16
    assert half.model.config._attn_implementation == "eager"


def test_is_loaded_once_by_its_build_and_stays_frozen_in_eval_mode(tmp_path: Path):
    path = make_reward_model(tmp_path, resid_pdrop=0.5, embd_pdrop=0.5)
    source = RewardModel(str(path))
    assert not list(source.parameters())
    source.build()
    model = source.model
    nn.Sequential(source).train()
    assert not any(module.training for module in source.modules())
    assert not any(parameter.requires_grad for parameter in source.parameters())
    scores = source(experience())
    assert not scores.requires_grad
    assert torch.equal(scores, source(experience()))
    source.build()
    assert source.model is model


@pytest.mark.parametrize("bos", [False, True])
def test_long_text_loses_its_beginning_with_a_warning(bos: bool, tmp_path: Path):
    """64 positions; the token that the tokenizer puts in front stays in front."""
    tokenizer = make_tokenizer(bos=bos)
    path = make_reward_model(tmp_path, tokenizer=tokenizer, **SHARP)
    words = (WORDS * 3)[:90]
    kept = " ".join(words[-63 if bos else -64 :])
    source = RewardModel(str(path))
    rows = experience([" ".join(words[:50]), "a"], [" " + " ".join(words[50:]), " film"])
    with pytest.warns(UserWarning, match=r"RewardModel.*: 1 of 2 texts exceed its 64 positions and lose their begin"):
        scores = source(rows)
    assert scores.tolist() == pytest.approx(stock(path, [kept, "a film"]), rel=1e-5, abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source(rows)  # said once


def test_mean_of_a_long_text_is_over_what_is_left_of_the_response(tmp_path: Path):
    path = make_reward_model(tmp_path, **SHARP)
    words = (WORDS * 3)[:90]
    rows = experience([" ".join(words[:10])], [" " + " ".join(words[10:])])
    with pytest.warns(UserWarning, match="positions"):
        score = RewardModel(str(path), aggregation="mean")(rows)
    of_tokens = token_scores(path, AutoTokenizer.from_pretrained(path)(" ".join(words[-64:])).input_ids)
    assert score.item() == pytest.approx(math.fsum(of_tokens) / 64, rel=1e-5)


@pytest.mark.parametrize("argument", ["model", "tokenizer"])
def test_missing_folder(argument: str, tiny_reward: Path, tmp_path: Path):
    missing = str(tmp_path / "nowhere")
    arguments = {"model": str(tiny_reward), argument: missing}
    with pytest.raises(ValueError, match="there is no such folder") as error:
        RewardModel(**arguments).build()
    assert str(error.value).startswith(f"RewardModel({argument}={missing!r}): cannot be loaded")
    assert "\n" not in str(error.value)


def test_checkpoint_without_a_trained_head_is_refused(tiny_lm: Path):
    with pytest.raises(ValueError, match=r"lacks score\.weight .*random; train it as a reward model first"):
        built(tiny_lm)


def test_text_without_tokens_is_refused(tiny_reward: Path):
    with pytest.raises(ValueError, match=r"RewardModel.*: text 1 \(''\) has no tokens to score"):
        RewardModel(str(tiny_reward))(experience(["a", ""], [" film", ""]))


def test_model_that_gives_nan_is_refused(tiny_reward: Path):
    source = built(tiny_reward)
    source.model.score.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"RewardModel\(model=.*returned nan for response 0 of 4"):
        scores_of(source, experience())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"aggregation": "max"}, "(aggregation='max'): must be"),
        ({"batch_size": 0}, "(batch_size=0): must be"),
        ({"batch_tokens": 0}, "(batch_tokens=0): must be"),
        ({"batch_size": 32, "batch_tokens": 64}, "(batch_size=32, batch_tokens=64): give at most one of batch_size"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=re.escape(f"RewardModel{says}")):
        RewardModel("model", **arguments)


# question-answer pairs, end tokens, turns that were cut off


def separating_tokenizer() -> Any:
    """As an encoder's: a separator between two texts and after the last."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", pair="$A [EOS] $B [EOS]", special_tokens=[("[EOS]", tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("pairs", [True, "auto"])
def test_pairs_are_two_segments(tmp_path: Path, pairs: Any):
    path = make_reward_model(tmp_path, "distilbert", tokenizer=separating_tokenizer(), **SHARP)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    answers = ["really good", "bad"]
    expected = [
        model(**tokenizer("the film was", answer, return_tensors="pt")).logits[0, 0].item() for answer in answers
    ]
    plain = experience(["the film was"] * 2, [f" {answer}" for answer in answers])
    chats = experience([""] * 2, answers, messages=[[{"role": "user", "content": "the film was"}]] * 2)
    for rows in (plain, chats):
        assert built(path, pairs=pairs)(rows).tolist() == pytest.approx(expected, rel=1e-5)


def test_pairs_are_refused_where_nothing_separates_them(tmp_path: Path):
    path = make_reward_model(tmp_path, **SHARP)
    with pytest.raises(ValueError, match=r"RewardModel\(pairs=True\): .* puts no token between; set it to False"):
        built(path, pairs=True)
    assert built(path, pairs="auto")(experience()).tolist() == built(path)(experience()).tolist()
    with pytest.raises(ValueError, match=r"RewardModel\(pairs=True\): pairs have one score each"):
        RewardModel(str(path), pairs=True, aggregation="mean")


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_responses_that_ended_are_scored_at_the_appended_end_token(tmp_path: Path, family: str, tokenizer: Any):
    path = make_reward_model(tmp_path, family, tokenizer=tokenizer(), **SHARP)
    source, eos = built(path, append_eos=True), AutoTokenizer.from_pretrained(path).eos_token_id
    words = [(" really good", True), (" really good", False), (" bad [EOS]", True)]
    rows = experience(["the film was"] * 3, [text for text, _ in words])
    rows.ended = torch.tensor([ended for _, ended in words])
    ids = [source.tokenizer("the film was" + text).input_ids for text, _ in words]
    ids[0].append(eos)  # the second was cut off, the third has one
    assert source(rows).tolist() == pytest.approx([token_scores(path, row)[-1] for row in ids], rel=1e-5)
    assert built(path)(rows)[0].item() == pytest.approx(token_scores(path, ids[0][:-1])[-1], rel=1e-5)


def test_the_turn_of_a_response_that_was_cut_off_stays_open(tmp_path: Path):
    tokenizer = make_tokenizer(chat=True, words=[*WORDS, "user", "assistant"])
    path = make_reward_model(tmp_path, "llama", tokenizer=tokenizer, **SHARP)
    chat = [{"role": "user", "content": "the film"}]
    rows = experience(["", "", ""], ["was good", "was good", ""], messages=[chat] * 3)
    rows.ended = torch.tensor([True, False, False])
    texts = ["user the film [EOS] assistant was good [EOS]", "user the film [EOS] assistant was good"]
    expected = stock(path, [*texts, "user the film [EOS] assistant"])
    assert built(path)(rows).tolist() == pytest.approx(expected, rel=1e-5)


def test_an_end_token_that_does_not_exist_is_refused(tmp_path: Path):
    path = make_reward_model(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"RewardModel\(append_eos=True\): the tokenizer .* has no end-of-sequence"):
        built(path, append_eos=True)
