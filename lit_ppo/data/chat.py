"""Chat messages as text, by the tokenizer's template, and which part of the text the assistant writes."""

import re
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any, Literal, NoReturn, TypeVar

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lit_ppo.data.table import Message, Table
from lit_ppo.parallel.isolated import MEMORY, isolated
from lit_ppo.shown import message_of
from lit_ppo.validate import mapping, refuse

T = TypeVar("T")

Span = tuple[int, int]
"""First and one past the last character of a part of a text."""

Options = Mapping[str, Any]
"""Variables of the chat template, and ``tools``, ``documents`` or a ``chat_template``."""

End = Literal["closed", "ask", "open"]
"""The last turn is closed, a turn of the assistant begins after it, or the last turn goes on."""

OURS = ("add_generation_prompt", "continue_final_message", "conversation", "padding", "tokenize", "truncation")
ANOTHER = "change the data, or give another template (chat_template_kwargs={'chat_template': ...})"
LONGEST = 2**24  # characters that a template may write around those of the messages, which it may repeat
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that says itself what the assistant writes


def checked_options(owner: object, options: Any) -> dict[str, Any]:
    """The argument ``chat_template_kwargs``.

    Raises:
        ValueError: It is not a mapping, or sets what is not the user's to set.
    """
    variables = mapping(owner, "chat_template_kwargs", options)
    if taken := [name for name in variables if name in OURS or name.startswith("return_")]:
        refuse(owner, "chat_template_kwargs", options, f"{taken[0]} is set by the use of the text; leave it out")
    return variables


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[list[Message]],
    where: str,
    *,
    options: Options | None = None,
    place: Callable[[int], str] = "chat {}".format,
    end: End | None = None,
) -> list[str]:
    """Chat messages as text, by the template of the tokenizer.

    Args:
        tokenizer: With the template.
        chats: Lists of messages.
        where: The caller, for messages.
        options: Variables of the template.
        place: Where a chat comes from, by its number, for messages.
        end: How the text ends; None: for sampling, ``"open"`` after the assistant's turn, else ``"ask"``.

    Raises:
        ValueError: The tokenizer has no chat template, or the template refuses a chat; names its row and role.
    """
    options = options or {}
    check_template(tokenizer, where, options)
    ends: list[End] = [end or ("open" if chat and chat[-1]["role"] == "assistant" else "ask") for chat in chats]

    def one(i: int) -> str:
        return render(tokenizer, chats[i], f"{where}: {place(i)}", options, ends[i])

    return each_chat(one, chats, lambda i: f"{where}: {place(i)}")


def each_chat(task: Callable[[int], T], chats: Sequence[list[Message]], where: Callable[[int], str]) -> list[T]:
    """What ``task`` makes of each chat by its template, which may come from strangers: its time and memory are limited.

    Args:
        task: From the number of a chat; it calls the template.
        chats: Lists of messages.
        where: The argument and the place of a chat, for messages.

    Raises:
        ValueError: Of ``task``, or a limit was reached.
    """

    def refuse_chat(i: int, problem: str) -> NoReturn:
        raise ValueError(f"{where(i)}: the chat template {problem}; {ANOTHER}")

    longest = max(map(_length, chats), default=0)
    return isolated(task, len(chats), refuse_chat, MEMORY + 64 * longest)


def check_template(tokenizer: PreTrainedTokenizerBase, where: str, options: Options) -> None:
    """Check that there is a chat template, and that it reads these variables.

    Raises:
        ValueError: There is none.
    """
    if not (options.get("chat_template") or getattr(tokenizer, "chat_template", None)):
        raise ValueError(
            f"{where}: the data are chat messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template; "
            "use the tokenizer of a chat model, or set tokenizer.chat_template"
        )
    template = str(options.get("chat_template") or tokenizer.chat_template)
    for name in options:
        if not re.search(rf"\b{re.escape(name)}\b", template) and name != "chat_template":
            rank_zero_warn(f"{where}: the chat template does not read {name!r} (chat_template_kwargs); is it misspelt?")


def render(tokenizer: PreTrainedTokenizerBase, chat: list[Message], where: str, options: Options, end: End) -> str:
    """One chat as text; see :func:`render_chats`."""
    kwargs = {**options, "add_generation_prompt": end == "ask", "continue_final_message": end == "open"}
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, **kwargs))
    except MemoryError:
        raise
    except Exception as error:  # of the template's code
        n = _longest_accepted(tokenizer, chat, options)
        culprit = f"message {n + 1} of {len(chat)} (role {chat[n]['role']!r})" if n < len(chat) else "the chat"
        raise ValueError(f"{where}: the chat template refuses {culprit}: {message_of(error)}; {ANOTHER}") from error
    if len(text) > LONGEST + 16 * _length(chat):
        problem = f"writes {len(text)} characters for messages of {_length(chat)}"
        raise ValueError(f"{where}: the chat template {problem}; {ANOTHER}")
    return text


def _length(chat: list[Message]) -> int:
    return sum(len(str(turn.get("content"))) for turn in chat)


def _longest_accepted(tokenizer: PreTrainedTokenizerBase, chat: list[Message], options: Options) -> int:
    """The number of messages at the start of a chat that its template takes."""
    for n in range(len(chat), 0, -1):
        try:
            tokenizer.apply_chat_template(chat[:n], tokenize=False, **options)
        except Exception:  # of the template's code, too
            continue
        return n
    return 0


def conversation(table: Table, index: int, prompt: Any, answer: Any) -> tuple[Any, Any]:
    """A prompt and its answer, each text or messages.

    An answer that begins with the prompt's turns is complete. One by the assistant continues the prompt's last turn,
    if that is the assistant's too.

    Args:
        table: For messages.
        index: Row, for messages.
        prompt: Text, or messages; with an answer of messages, text is the user's turn.
        answer: Text, or messages; after a prompt of messages, text is the assistant's turn.

    Returns:
        Both together, and the prompt alone.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt + answer, prompt
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str):
        start = int(answer[0]["role"] == "system")
        prompt = [*answer[:start], {"role": "user", "content": prompt}]
        answer = answer if _turns(answer[: start + 1]) == _turns(prompt) else answer[start:]
    if _turns(answer[: len(prompt)]) == _turns(prompt):
        return answer, prompt
    if prompt[-1]["role"] == answer[0]["role"] == "user":
        table.refuse(index, "the answer begins with a user turn that is not the prompt's; give the assistant's turn")
    return continued(prompt, answer), prompt


def continued(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The turns of both; an assistant's turn at the end of the prompt goes on in the answer.

    >>> continued([{"role": "assistant", "content": "It is"}], [{"role": "assistant", "content": " fine"}])
    [{'role': 'assistant', 'content': 'It is fine'}]
    """
    if not prompt or prompt[-1]["role"] != "assistant" or answer[0]["role"] != "assistant":
        return [*prompt, *answer]
    turn = {**prompt[-1], **answer[0], "content": prompt[-1]["content"] + answer[0]["content"]}
    return [*prompt[:-1], turn, *answer[1:]]


def _turns(messages: list[Message]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in messages]


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, chat: list[Message], prompt: list[Message], where: str, options: Options
) -> tuple[str, list[Span]]:
    """A chat as text, and which parts of it the assistant writes after the prompt.

    A template with ``{% generation %}`` says so itself. Otherwise a turn of the assistant is the difference between the
    chat up to it, ready for an answer, and the chat with it; see :func:`_turn` where a template rewrites earlier turns.

    Args:
        tokenizer: With the template.
        chat: Messages.
        prompt: Those at its start that are not trained on; the last one may go on in the chat.
        where: Argument and row, for messages.
        options: Variables of the template.

    Raises:
        ValueError: There is no turn of the assistant, or its place is not certain.
    """

    def shown(messages: list[Message], end: End) -> str:
        return render(tokenizer, messages, where, options, end) if messages else ""

    text, n_prompt = shown(chat, "closed"), len(prompt)
    continues = bool(prompt) and prompt[-1]["role"] == "assistant" and _turns(chat[:n_prompt]) != _turns(prompt)
    answers = n_prompt < len(chat) and chat[n_prompt]["role"] == "assistant"
    end: End = "open" if continues else "ask" if answers else "closed"
    before = shown(prompt if continues else chat[:n_prompt], end)
    template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    spans: list[Span] = []
    if MARKED.search(template):
        variables = {**tokenizer.special_tokens_map, **options, "chat_template": template}
        rendered: Any = render_jinja_template([chat], return_assistant_tokens_mask=True, **variables)
        [text], [marks] = rendered
        spans = [(max(first, len(before)), last) for first, last in marks if last > len(before)]
        if not text.startswith(before):
            raise ValueError(f"{where}: {_unclear('the prompt')}")
    else:
        for n in range(n_prompt - continues, len(chat)):
            if chat[n]["role"] == "assistant":
                goes_on = n < n_prompt
                closed, asked = (before, before) if goes_on else (shown(chat[:n], "closed"), shown(chat[:n], "ask"))
                content = chat[n]["content"][len(prompt[-1]["content"]) if goes_on else 0 :]
                span = _turn(text, closed, asked, shown(chat[: n + 1], "closed"), content)
                if span is None:
                    raise ValueError(f"{where}: {_unclear(f'message {n + 1} (by the assistant)')}")
                spans.append(span)
    if not any(stop > start for start, stop in spans):
        raise ValueError(f"{where}: there is no turn of the assistant to train on; give one, or delete the row")
    return text, spans


def _turn(text: str, closed: str, asked: str, after: str, content: str) -> Span | None:
    """Where a turn is in the text of the full chat; None if that is not certain.

    Some templates write a turn in another way when more turns follow, such as without an empty thought. Then its
    content must stand where the turn begins, and what closes the turn right behind it.

    Args:
        text: The full chat.
        closed: The chat before the turn.
        asked: The same, with the beginning of a turn.
        after: The chat up to the turn.
        content: What the assistant says.
    """
    if asked and text.startswith(asked) and text.startswith(after) and len(after) > len(asked):
        return len(asked), len(after)
    if not (closed and text.startswith(closed) and asked.startswith(closed)):
        return None
    start = len(commonprefix([text, asked]))  # noqa: RUF071  # they are no paths
    for said in (content, content.strip()):
        behind = after.rpartition(said)[2]
        if said and said in after and behind and text.startswith(said + behind, start):
            return start, start + len(said + behind)
    return None


def _unclear(what: str) -> str:
    return (
        f"where the chat template writes {what} cannot be told from the text before and after it, so the assistant's "
        "part is not certain; mark it in the template with {% generation %} (chat_template_kwargs={'chat_template': "
        "...}), or train on all tokens (train_on_prompts=True)"
    )
