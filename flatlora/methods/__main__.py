"""`python -m flatlora.methods` prints which peft × rho pairs are compatible: the table in docs/methods.md."""

from __future__ import annotations

from pathlib import Path

from flatlora.methods import ADAPTERS, REGULARIZERS, refusal

_PRINTED = ("lora", "full_ft")  # first and last row; the others are sorted between them


def matrix() -> str:
    """Markdown: one row per peft method, one column per rho method, then the reasons."""
    columns = ["off", "flat", *(name for name in list(REGULARIZERS) if name not in ("off", "flat"))]
    rows = [_PRINTED[0], *(name for name in list(ADAPTERS) if name not in _PRINTED), _PRINTED[1]]
    reasons: dict[str, int] = {}
    lines = ["| peft | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for column in columns:
            reason = refusal(row, column)
            cells.append("✓" if reason is None else f"[{reasons.setdefault(reason, len(reasons) + 1)}]")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    notes = [f"[{number}] {reason}." for reason, number in reasons.items()]
    return "\n".join([*lines, "", "  \n".join(notes)])


if __name__ == "__main__":
    print(matrix())
    print(f"\nOptions of one method differ only in their settings; see {Path('conf')}/peft and {Path('conf')}/rho.")
