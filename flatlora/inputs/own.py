"""Rows of the user's own files or of any data set on the hub: where they are, and which columns are prompt and answer.

Columns follow TRL: `prompt` and `completion`, joined without a blank, or `text`, which is learned whole. Any others are
put into templates, "{question}\\n" for example. As chats, prompt and answer are the turns of a user and the assistant.
Conversations are the column `messages`, or `prompt` and `completion` that are lists of turns.
docs/own-data.md describes them.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flatlora.inputs import conversations
from flatlora.inputs.rows import READERS, OwnFiles, Source, gather, shards_in, typed_columns
from flatlora.utils.errors import ConfigError, nearest

logger = logging.getLogger(__name__)
_COLUMN = re.compile(r"\{([^{}]+)\}")
_PAIR = ("prompt", "completion")


def is_local(path: str) -> bool:
    """Whether a name is a file or folder (that may be missing), not an id of the hub."""
    expanded = os.path.expanduser(path)
    return os.path.exists(expanded) or path.startswith((".", "/", "~")) or path.count("/") != 1 or _is_readable(path)


def _is_readable(name: str) -> bool:
    return name.endswith(tuple(READERS))


def own_files(key: str, path: str, split: str, remedy: str = "") -> OwnFiles | None:
    """The files of a split in a folder; a file is the split "train". None if there is none of this split.

    Args:
        key: name of the setting in error messages.
        remedy: what the path may be besides, for error messages.

    Raises:
        ConfigError: the path does not exist, is a file of another format, or has several files of this split.
    """
    place, formats = Path(os.path.expanduser(path)), ", ".join(READERS)
    if place.is_file():
        if not _is_readable(place.name):
            raise ConfigError([f"Invalid {key}={path}: its format is not read; convert it to one of {formats}."])
        return OwnFiles((place,)) if split == "train" else None
    if not place.is_dir():
        raise ConfigError([f"Invalid {key}={path}: no such path; name one of {formats}, or a folder{remedy}."])
    folders = (place, place / "data")
    files = [folder / f"{split}{suffix}" for folder in folders for suffix in READERS]
    found = [[file] for file in files if file.is_file()] + list(
        filter(None, (shards_in(each, split) for each in folders))
    )
    if len(found) > 1:
        names = " and ".join(str(paths[0].relative_to(place)) for paths in found)
        raise ConfigError([f"Invalid {key}={path}: {names} are both its split {split}; move one away."])
    return OwnFiles(tuple(found[0])) if found else None


class Columns(NamedTuple):
    """Which columns are prompt and answer.

    Args:
        key: beginning of the settings' names in error messages, such as "dataset".
        prompt, answer: templates with {column}; None: columns named as TRL has them.
        label: column of a class, instead of `answer`.
        labels: words of the classes; None takes those of the column.
        chat: whether rows are chats, in the tokenizer's own template.
        system: the system prompt of chats without one, also in a column `system`.
    """

    key: str
    prompt: str | None = None
    answer: str | None = None
    label: str | None = None
    labels: Sequence[str] | None = None
    chat: bool = False
    system: str | None = None

    @property
    def templates(self) -> dict[str, str]:
        """{setting: template} of prompt and answer; a label is the template {label}."""
        answer = {"answer": self.answer} if self.label is None else {"label": f"{{{self.label}}}"}
        return {f"{self.key}.{name}": text for name, text in {"prompt": self.prompt, **answer}.items()}


_MOST_CLASSES = 1000  # each row is scored once for every class


def prompts_and_answers(splits: Mapping[str, Source | OwnFiles], columns: Columns, data_root: str | None) -> dict:
    """{split: rows {"x", "y", "joined"}} of the named splits, those of classes with "choices", chats with "messages".

    Rows without an answer are left out, with a warning.

    Raises:
        ConfigError: it lists the errors of all splits.
    """

    def answered(source: Source | OwnFiles) -> tuple[list[dict[str, Any]], str]:
        rows, name = source.rows(data_root)
        rows = _converted(rows, name, columns)
        kept = {number: row for number, row in enumerate(rows, start=1) if row["y"].strip()}
        if not kept:
            raise ConfigError([f"Empty data set: no row of {name} has an answer; name the column that has them."])
        if len(kept) < len(rows):
            logger.warning("%s: %d of %d rows have no answer and are left out.", name, len(rows) - len(kept), len(rows))
        return kept, name

    read = dict(zip(splits, gather(*(lambda each=each: answered(each) for each in splits.values())), strict=True))
    if columns.label is not None:
        _add_classes(read, columns)
    return {split: list(rows.values()) for split, (rows, _) in read.items()}


def _add_classes(read: Mapping[str, tuple[dict[int, dict[str, Any]], str]], columns: Columns) -> None:
    """Adds "choices" to {split: ({number: row}, source)}; the answer becomes one of them.

    Raises:
        ConfigError: there are fewer than two classes or too many, or an answer is none of them.
    """
    train, source = read["train"]
    words = columns.labels or sorted({row["y"].strip() for row in train.values()})
    if not 2 <= len(words) <= _MOST_CLASSES:
        few = "only the class " + words[0] if len(words) == 1 else f"{len(words)} different values"
        raise ConfigError(
            [
                f"Invalid {columns.key}.label={columns.label}: {source} has {few}, and classes are 2 to "
                f"{_MOST_CLASSES}; name another column, or generate answers with {columns.key}.answer."
            ]
        )
    errors = []
    for rows, name in read.values():
        for number, row in rows.items():
            if (word := _label_word(row["y"], words, numbered=columns.labels is not None)) is None:
                known = ", ".join(words[:20]) + (", …" if len(words) > 20 else "")
                errors.append(
                    f"Invalid {columns.label} in {name}, row {number}: {row['y'][:40]!r} is none of the classes "
                    f"{known}; correct it, or name all classes with {columns.key}.labels=[…]."
                )
                break
            row |= {"y": word, "choices": list(words)}
    if errors:
        raise ConfigError(errors)


def _label_word(value: str, words: Sequence[str], *, numbered: bool) -> str | None:
    """The word of a label, which is the word or, with given words, its number from 0."""
    text = value.strip()
    if word := next((word for word in words if word.strip() == text), None):  # a word may begin with a blank
        return word
    return words[int(text)] if numbered and text.isdecimal() and int(text) < len(words) else None


def _converted(rows: list[dict[str, Any]], source: str, columns: Columns) -> list[dict[str, Any]]:
    if not rows:
        raise ConfigError([f"Empty data set: {source} has no rows; it needs at least one."])
    known = list(dict.fromkeys(key for row in rows for key in row))
    if columns.prompt is not None:
        return _from_templates(rows, known, source, columns)
    if "messages" in known:
        return _from_turns(rows, known, source, columns, ("messages",))
    if any(isinstance(row.get(name), list) for row in rows for name in _PAIR):
        return _from_turns(rows, known, source, columns, _PAIR)
    pairs = (_PAIR,) if columns.chat else (_PAIR, ("text",))
    needed = next((names for names in pairs if set(names) <= set(known)), None)
    if needed is None:
        first, last = (f"{{{name}}}" for name in (known[0], known[-1])) if known else ("{…}", "{…}")
        wanted = "messages, or prompt and completion" if columns.chat else "prompt and completion, or text"
        raise ConfigError(
            [
                f"Missing columns in {source}: it has {_listed(known)}, and needs {wanted}; rename them, or name "
                f"""others in templates: '{columns.key}.prompt="{first}"' '{columns.key}.answer="{last}"' with both """
                "kinds of quotes."
            ]
        )
    if len(needed) > 1:
        pair = columns._replace(prompt="{prompt}", answer="{completion}")
        typed_columns(rows, needed, source, remedy="fill the column, or leave the row out")
        return _from_templates(rows, known, source, pair)
    rows = typed_columns(rows, needed, source, remedy="fill the column, or leave the row out")
    return [{"x": "", "y": row["text"], "joined": True} for row in rows]


def _from_turns(
    rows: Sequence[dict[str, Any]], known: Sequence[str], source: str, columns: Columns, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Conversations in TRL's columns `messages`, or `prompt` and `completion`, and `tools`.

    Args:
        names: the columns whose turns are a conversation together. Answers in the last one are learned.

    Raises:
        ConfigError: it lists every kind of error, with the first row that has it.
    """
    together, others = " and ".join(names), [name for name in (*_PAIR, "text") if name in known]
    errors = []
    if not columns.chat:
        errors.append(
            f"Invalid {columns.key}.template=null with {_noun(names)} {together} in {source}: conversations are read "
            f"in the tokenizer's chat template alone; set {columns.key}.template=chat, or name columns with "
            f"{columns.key}.prompt and {columns.key}.answer."
        )
    if others and names != _PAIR:
        errors.append(
            f"Mixed columns in {source}: it has messages, and {' and '.join(others)} too; remove one form, or name "
            f"columns with {columns.key}.prompt and {columns.key}.answer."
        )
    errors += _system_errors(rows, source)
    systems = [row.get("system") or columns.system for row in rows]
    rows = [conversations.without_nulls({key: row.get(key) for key in (*names, "tools")}) for row in rows]
    places: dict[str, list[int]] = {}
    for number, row in enumerate(rows, start=1):
        if problem := _turns_problem(row, names):
            places.setdefault(problem, []).append(number)
    for problem, numbers in itertools.islice(places.items(), _MOST_PROBLEMS):
        more = f" (and {len(numbers) - 1} more)" if len(numbers) > 1 else ""
        errors.append(
            f"Invalid {together} in {source}, row {numbers[0]}{more}: {problem}; fix the row, or leave it out."
        )
    if errors:
        raise ConfigError(errors)
    return [_conversation(row, names, system) for row, system in zip(rows, systems, strict=True)]


def _noun(names: Sequence[str]) -> str:
    return "the columns" if len(names) > 1 else "the column"


def _turns_problem(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Returns why the turns of a row are no conversation; None if they are one."""
    if names == _PAIR and (single := [name for name in names if not (isinstance(row.get(name), list) and row[name])]):
        return f'{" and ".join(single)} must be a list of turns {{"role": …, "content": …}}, as in other rows'
    return conversations.problem(_all_turns(row, names), row.get("tools"))


def _all_turns(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return row.get(names[0]) if len(names) == 1 else [turn for name in names for turn in row[name]]


def _conversation(row: Mapping[str, Any], names: Sequence[str], system: str | None) -> dict[str, Any]:
    messages = conversations.with_system(_all_turns(row, names), system)
    return conversations.row_of(messages, row.get("tools"), context_turns=len(messages) - len(row[names[-1]]))


_MOST_PROBLEMS = 20  # kinds of them, in one message


def _system_errors(rows: Sequence[dict[str, Any]], source: str) -> list[str]:
    """Returns an error for the first system prompt that is no text."""
    given = [{"system": "" if row.get("system") is None else row["system"]} for row in rows]
    try:
        typed_columns(given, ("system",), source)
    except ConfigError as error:
        return error.errors
    return []


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def _from_templates(
    rows: Sequence[dict[str, Any]], known: Sequence[str], source: str, columns: Columns
) -> list[dict[str, Any]]:
    templates = columns.templates
    users = {name: key for key, template in templates.items() for name in _COLUMN.findall(template)}
    errors = []
    for name, key in users.items():
        if name not in known:
            near = nearest(name, known)
            errors.append(
                f"Missing column {name} in {source}: {key} names it, and there are {_listed(known)}; "
                + (f"did you mean {near}?" if near else "name one of these.")
            )
    for key, template in templates.items():
        if template.strip() in known or (key.endswith(".answer") and not _COLUMN.search(template)):
            example = template.strip() if template.strip() in known else known[-1]
            errors.append(
                f"Invalid {key}={template}: it names no column, so it is the same text in every row; put a column into "
                f"""braces, as in '{key}="{{{example}}}"' with both kinds of quotes."""
            )
    for name in users:
        wrong = (number for number, row in enumerate(rows, start=1) if isinstance(row.get(name), list | dict | bytes))
        if (number := next(wrong, None)) is not None:
            value = str(rows[number - 1][name])
            errors.append(
                f"Invalid {name} in {source}, row {number}: it must be text or a number, not "
                f"{value if len(value) <= 40 else value[:40] + '…'}; put its parts into columns."
            )
    errors += _system_errors(rows, source) if columns.chat else []
    if errors:
        raise ConfigError(errors)
    texts = [{name: "" if row.get(name) is None else str(row[name]) for name in users} for row in rows]
    texts = typed_columns(texts, list(users), source)  # checks for lone surrogates
    prompt, answer = map(written, templates.values())
    pairs = [(_filled(prompt, row), _filled(answer, row)) for row in texts]
    answered = [row for row, pair in zip(rows, pairs, strict=True) if pair[1].strip()]  # others are left out
    empty = Counter(name for row in answered for name in users if row.get(name) in (None, ""))
    for name, count in empty.items():
        logger.warning("%s: %d of %d rows have no %s; it is empty there.", source, count, len(rows), name)
    if columns.label is not None:  # an encoder reads the parts of the prompt, whatever is in the columns
        parts = prompt.split("\t")
        return [
            {"x": x, "y": y, "joined": True, "texts": [_filled(part, row) for part in parts]}
            for (x, y), row in zip(pairs, texts, strict=True)
        ]
    if not columns.chat:
        return [{"x": x, "y": y, "joined": True} for x, y in pairs]
    systems = (row.get("system") or columns.system for row in rows)
    return [
        conversations.row_of(conversations.turns(system, *pair)) for system, pair in zip(systems, pairs, strict=True)
    ]


def written(template: str) -> str:
    """Returns a template of the command line with its line breaks and tabs, which are written \\n and \\t there."""
    return template.replace("\\n", "\n").replace("\\t", "\t")


def _filled(template: str, row: Mapping[str, str]) -> str:
    return _COLUMN.sub(lambda match: row[match[1]], template)
