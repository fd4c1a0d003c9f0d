"""metrics.jsonl: the rows of a run, which its trackers receive too."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flatlora.runs.run_folder import logger
from flatlora.runs.trackers import Tracker
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import fsync_folder, no_link, write_atomic
from flatlora.utils.plain_files import read_plain

_MOST_BYTES = 1 << 30


class MetricsLog:
    """metrics.jsonl: append-only, one object per logged step, flushed immediately; also sent to trackers.

    Each checkpoint contains the rows up to its step, see `flatlora.train.recorder.rows_of`.
    """

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()) -> None:
        self.path, self.trackers = path, trackers

    def rewind(self, step: int, kept: Sequence[str] | None = None) -> None:
        """Removes rows after `step`, which a resumed run writes again, and an incomplete last line.

        Args:
            kept: the checkpoint's lines up to `step`, which replace those of the file; None if it has none.
        """
        lines, text = [], ""
        try:
            text = self._text()
        except OSError:
            if kept is None:
                raise
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # incomplete row
                if json.loads(line)["step"] <= step:
                    lines.append(line)
        wanted = lines if kept is None else list(kept)
        if wanted != lines:
            logger.warning(
                "%s had %d of the %d rows up to step %d, or others: put back from the checkpoint.",
                *(self.path, len(set(lines) & set(wanted)), len(wanted), step),
            )
        if wanted or os.path.lexists(self.path):
            write_atomic(self.path, "".join(line + "\n" for line in wanted))
        for tracker in self.trackers:
            tracker.put_back(map(json.loads, wanted))

    def _text(self) -> str:
        try:
            return read_plain(self.path, _MOST_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise OSError(f"cannot read {self.path}: {reason_of(error)}") from error

    def flush(self) -> None:
        """Flushes all rows to disk."""
        with contextlib.suppress(FileNotFoundError):  # no row yet
            fsync_folder(self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row with the key "step"."""
        with open(self.path, "a", encoding="utf-8", opener=no_link) as file:
            file.write(json.dumps(row) + "\n")
        for tracker in self.trackers:
            tracker.log(row)

    def rows(self) -> list[dict[str, Any]]:
        """Returns all rows, without an incomplete last one, which a killed or a still running process may leave.

        Raises:
            ConfigError: another row is broken.
            OSError: the file cannot be read.
        """
        lines, rows = self._text().splitlines(), []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("an object is needed")
                rows.append(row)
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise ConfigError(
                        [f"Broken row in {self.path}, line {number}: {error}; resume=true puts a run's rows back."]
                    ) from error
        return rows
