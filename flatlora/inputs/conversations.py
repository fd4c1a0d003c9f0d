"""Conversations: turns of a chat in the form of TRL and transformers, and rows that are made of them.

A row of a chat is {"x", "y", "messages"} and perhaps "tools" and "context_turns". `messages` ends with the answer; x
and y are its texts for people, tables and scorers. Only the chat template of a tokenizer decides how the turns are
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flatlora.inputs.templates import prompt

Messages = Sequence[Mapping[str, Any]]  # [{"role", "content"}, …], with "tool_calls", thinking and others as they are

_FIRST = ("system", "developer")
_BEFORE = {"user": (None, "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
"""{role: roles of the turn before it}; None is the beginning, after a system prompt or without one."""


class Chat(NamedTuple):
    """A prompt of several turns, and the tools that its template may offer.

    Args:
        context_turns: number of first turns whose answers are not learned.
    """

    messages: Messages
    tools: Sequence[Mapping[str, Any]] | None = None
    context_turns: int = 0


def chat_of(row: Mapping[str, Any]) -> Chat:
    """Returns the whole conversation of a row, with its answer."""
    return Chat(row["messages"], row.get("tools"), row.get("context_turns", 0))


def problem(messages: Any, tools: Any = None) -> str | None:
    """Returns why a row is no conversation to learn from; None if it is one."""
    if not isinstance(messages, list) or not messages:
        return 'messages must be a list of turns {"role": …, "content": …}, at least two'
    if not (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))):
        return "tools must be a list of JSON schemas, each an object"
    before = None
    for number, turn in enumerate(messages, start=1):
        if turn_problem := _turn_problem(turn, before, is_first=number == 1):
            return f"turn {number} {turn_problem}"
        before = None if turn["role"] in _FIRST else turn["role"]
    if before != "assistant":
        return (
            f"it ends with a turn of {messages[-1]['role']}, and the last answer is what is learned; end with assistant"
        )
    surrogate = next((text for text in texts([messages, tools]) if not _is_encodable(text)), None)
    return None if surrogate is None else f"{surrogate[:40]!r} contains half of a pair (a lone surrogate)"


def _turn_problem(turn: Any, before: str | None, *, is_first: bool) -> str | None:
    role = turn.get("role") if isinstance(turn, dict) else None
    if role not in (*_FIRST, *_BEFORE):
        return f'must be {{"role": …, "content": …}} with a role of {", ".join((*_FIRST, *_BEFORE))}'
    if role in _FIRST and not is_first:
        return f"is of {role}, which only the first may be"
    if role in _BEFORE and before not in _BEFORE[role]:
        allowed = " or ".join(other or "the beginning" for other in _BEFORE[role])
        return f"is of {role} after {before or 'the beginning'}, and may only follow {allowed}"
    content = turn.get("content")
    if isinstance(content, str) or (content is None and role == "assistant" and turn.get("tool_calls")):
        return None
    if isinstance(content, list) and content and all(isinstance(part, dict) and "text" in part for part in content):
        return None
    return 'has no content that is text; write "content": "…"'


def _is_encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def texts(value: Any) -> Iterable[str]:
    """Yields all texts inside of messages or tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from (key, *texts(part))
    elif isinstance(value, Sequence):
        for part in value:
            yield from texts(part)


def without_nulls(value: Any) -> Any:
    """Returns messages or tools without keys that are null, which a Parquet file adds to turns that lack them."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def turns(system: str | None, *contents: str) -> list[dict[str, Any]]:
    """Returns a conversation of user and assistant in turn, after a system prompt if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]


def with_system(messages: Messages, system: str | None) -> list[Mapping[str, Any]]:
    """Returns the turns with a system prompt before them, if they have none."""
    own = system is None or messages[0]["role"] in _FIRST
    return list(messages) if own else [*turns(system), *messages]


def row_of(
    messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None, context_turns: int = 0
) -> dict[str, Any]:
    """Returns the row of a conversation that ends with an answer."""
    *asked, answer = messages
    row = {"x": readable(asked), "y": _text(answer), "messages": list(messages)}
    if tools:
        row["tools"] = tools
    if any(turn["role"] == "assistant" for turn in messages[:context_turns]):
        row["context_turns"] = context_turns
    return row


def readable(messages: Messages) -> str:
    """Returns the texts of turns for people."""
    return "\n\n".join(filter(None, map(_text, messages)))


def _text(turn: Mapping[str, Any]) -> str:
    """Returns a turn's text; that of its calls if it has none."""
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return content or ("\n".join(texts(turn["tool_calls"])) if turn.get("tool_calls") else "")


def as_chat(row: Mapping[str, Any], system: str | None = None) -> dict[str, Any]:
    """Returns a row {"x", "y"} as a conversation of one question and its answer; one that is a chat is not changed."""
    if "messages" in row:
        return dict(row)
    others = {key: value for key, value in row.items() if key != "joined"}
    return {**others, **row_of(turns(system, row["x"], row["y"]))}


def question(
    template: str,
    system: str | None,
    instruction: str,
    answer: str = "",
    *,
    context: str = "",
    shots: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Returns the row of a benchmark's question, in a template of this suite or, for "chat", in the tokenizer's own.

    Args:
        shots: questions with answers to put before it; only for template="chat".
    """
    text = prompt(template, instruction, context)
    if template != "chat":
        return {"x": text, "y": answer}
    return row_of(turns(system, *(part for shot in shots for part in shot), text, answer))
