"""Rows of the user's own files or of any data set on the hub: where they are, and which columns are prompt and answer.

Columns follow TRL: `prompt` and `completion`, joined without a blank, or `text`, which is learned whole. Any others are
put into templates, "{question}\\n" for example. docs/own-data.md describes them.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flatlora.inputs.rows import READERS, OwnFiles, Source, shards_in, typed_columns
from flatlora.utils.errors import ConfigError, nearest

logger = logging.getLogger(__name__)
_COLUMN = re.compile(r"\{([^{}]+)\}")


def is_local(path: str) -> bool:
    """Whether a name is a file or folder (that may be missing), not an id of the hub."""
    expanded = os.path.expanduser(path)
    return os.path.exists(expanded) or path.startswith((".", "/", "~")) or path.count("/") != 1 or _is_readable(path)


def _is_readable(name: str) -> bool:
    return name.endswith(tuple(READERS))


def own_files(key: str, path: str, split: str) -> OwnFiles | None:
    """The files of a split in a folder; a file is the split "train". None if there is none of this split.

    Args:
        key: name of the setting in error messages.

    Raises:
        ConfigError: the path does not exist, or is a file of another format.
    """
    place, formats = Path(os.path.expanduser(path)), ", ".join(READERS)
    if place.is_file():
        if not _is_readable(place.name):
            raise ConfigError([f"Invalid {key}={path}: its format is not read; convert it to one of {formats}."])
        return OwnFiles((place,)) if split == "train" else None
    if not place.is_dir():
        raise ConfigError(
            [f"Invalid {key}={path}: no such path; name one of {formats}, a folder, or OWNER/NAME of the hub."]
        )
    for folder in (place, place / "data"):
        found = [folder / f"{split}{suffix}" for suffix in READERS if (folder / f"{split}{suffix}").is_file()]
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise ConfigError([f"Invalid {key}={path}: {names} are both its split {split}; move one away."])
        if files := found or shards_in(folder, split):
            return OwnFiles(tuple(files))
    return None


class Columns(NamedTuple):
    """Which columns are prompt and answer.

    Args:
        key: beginning of the settings' names in error messages, such as "dataset".
        prompt, answer: templates with {column}; None: columns named as TRL has them.
        label: column of a class, instead of `answer`.
        labels: words of the classes; None takes those of the column.
    """

    key: str
    prompt: str | None = None
    answer: str | None = None
    label: str | None = None
    labels: Sequence[str] | None = None


def prompts_and_answers(splits: Mapping[str, Source | OwnFiles], columns: Columns, data_root: str | None) -> dict:
    """{split: rows {"x", "y", "joined"}} of the named splits, those of classes with "choices".

    Raises:
        ConfigError: it lists the errors of all splits.
    """
    errors, read, results = [], {}, {}
    for name, source in splits.items():
        try:
            read[name] = source.rows(data_root)
            results[name] = _converted(*read[name], columns)
        except ConfigError as error:
            errors += error.errors
    if errors:
        raise ConfigError(errors)
    if columns.label is None:
        return results
    words = columns.labels or sorted({str(row["y"]).strip() for row in results["train"]})
    if len(words) < 2:
        errors.append(
            f"Invalid {columns.key}.label={columns.label}: {read['train'][1]} has only the class {', '.join(words)}; a "
            "classifier needs two or more."
        )
    for name, rows in results.items():
        for number, row in enumerate(rows, start=1):
            if (word := _label_word(row["y"], words, numbered=columns.labels is not None)) is None:
                errors.append(
                    f"Invalid {columns.label} in {read[name][1]}, row {number}: {row['y']!r} is none of the classes "
                    f"{', '.join(words)}; correct it, or name all classes with {columns.key}.labels=[…]."
                )
                break
            row |= {"y": word, "choices": list(words)}
    if errors:
        raise ConfigError(errors)
    return results


def _label_word(value: Any, words: Sequence[str], *, numbered: bool) -> str | None:
    """The word of a label, which is the word or, with given words, its number from 0."""
    text = str(value).strip()
    if word := next((word for word in words if word.strip() == text), None):  # a word may begin with a blank
        return word
    return words[int(text)] if numbered and text.isdecimal() and int(text) < len(words) else None


def _converted(rows: list[dict[str, Any]], source: str, columns: Columns) -> list[dict[str, Any]]:
    if not rows:
        raise ConfigError([f"Empty data set: {source} has no rows; it needs at least one."])
    known = list(dict.fromkeys(key for row in rows for key in row))
    if columns.prompt is None and not {"prompt", "completion"} & set(known) and "text" not in known:
        conversations = " (conversations, messages, are not read: write them as prompt and completion)"
        raise ConfigError(
            [
                f"Missing columns in {source}: it has {', '.join(known)}, and needs prompt and completion, or text"
                f"{conversations if 'messages' in known else ''}; name others with "
                f'{columns.key}.prompt="… {{{known[0]}}} …" {columns.key}.answer="{{{known[-1]}}}".'
            ]
        )
    if columns.prompt is not None:
        return _from_templates(rows, known, source, columns)
    if {"prompt", "completion"} & set(known):
        rows = typed_columns(rows, ("prompt", "completion"), source)
        return [{"x": row["prompt"], "y": row["completion"], "joined": True} for row in rows]
    return [{"x": "", "y": row["text"], "joined": True} for row in typed_columns(rows, ("text",), source)]


def _from_templates(
    rows: Sequence[dict[str, Any]], known: Sequence[str], source: str, columns: Columns
) -> list[dict[str, Any]]:
    answer = columns.answer if columns.label is None else f"{{{columns.label}}}"
    used = dict.fromkeys(_COLUMN.findall(columns.prompt) + _COLUMN.findall(answer))
    errors = []
    for name in used:
        if name not in known:
            near = nearest(name, known)
            errors.append(
                f"Missing column {name} in {source}: {columns.key}.prompt and {columns.key}.answer name it, and there "
                f"are {', '.join(known)}; " + (f"did you mean {near}?" if near else "name one of these.")
            )
    for number, row in enumerate(rows, start=1):
        wrong = [name for name in used if isinstance(row.get(name), list | dict | bytes)]
        errors += [
            f"Invalid {name} in {source}, row {number}: it must be text or a number, not {str(row[name])[:40]!r}; put "
            "its parts into columns."
            for name in wrong
        ]
        if wrong:
            break
    if errors:
        raise ConfigError(errors)
    empty = Counter(name for row in rows for name in used if row.get(name) is None)
    for name, count in empty.items():
        logger.warning("%s: %d of %d rows have no %s; it is empty there.", source, count, len(rows), name)
    prompt, answer = (template.replace("\\n", "\n") for template in (columns.prompt, answer))
    filled = [{"x": _filled(prompt, row), "y": _filled(answer, row)} for row in rows]
    return [row | {"joined": True} for row in typed_columns(filled, ("x", "y"), source)]  # checks for lone surrogates


def _filled(template: str, row: Mapping[str, Any]) -> str:
    return _COLUMN.sub(lambda match: "" if (value := row.get(match[1])) is None else str(value), template)
