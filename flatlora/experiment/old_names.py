"""Experiment names of earlier versions, one per row of a table, and the overrides that replace them."""

from __future__ import annotations

from collections.abc import Iterable

_METHODS = ("rslora", "dora", "pissa", "adalora", "lora_plus", "lora_ga", "lora_pro")
_LOWER_LR = {"lora_ga": ["optim.lr=1e-4"], "lora_pro": ["optim.lr=1e-4"]}


def _with_flat(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    return rows | {f"flat_{row}": [*overrides, "rho=flat"] for row, overrides in rows.items()}


def _of_table(table: str, rows: dict[str, list[str]]) -> dict[str, list[str]]:
    return {f"{table}/{row}": [f"experiment={table}", *overrides] for row, overrides in rows.items()}


_METHOD_ROWS = {name: [f"peft={name}"] for name in _METHODS}
_RANK_8 = {f"{name}_r8": [*overrides, "peft.lora_r=8"] for name, overrides in _METHOD_ROWS.items()}
_RANKS = {"lora_r8": ["peft.lora_r=8"], "lora_r16": ["peft.lora_r=16"]}
_FULL = {"full_ft": ["peft=full_ft"]}
_REGULARIZERS = {"lora_sam": ["rho=sam"], "bi_lora": ["rho=bi_lora"]}
_TABLE1 = {row: [*words, *_LOWER_LR.get(row.removesuffix("_r8"), [])] for row, words in _RANK_8.items()}
_LANGUAGE = _FULL | _REGULARIZERS | _with_flat({"lora": []} | _METHOD_ROWS)
_STUDY = {"base": [], **{name: [f"peft={name}", *lr] for name, lr in _LOWER_LR.items()}}

OLD_EXPERIMENTS: dict[str, list[str]] = {
    **_of_table("table1", _FULL | _with_flat(_RANKS | _TABLE1)),
    **_of_table("table2", _FULL | _with_flat(_RANKS | _RANK_8)),
    **_of_table("table3", _LANGUAGE),
    **_of_table("table4", _LANGUAGE),
    **_of_table("sdxl", _with_flat({"lora": []})),
    **_of_table("study", _STUDY | _with_flat({"lora": []})),
    **_of_table("ablation", {name: [] for name in ("every", "noise", "ramp", "rank", "sigma")} | {"sam": ["rho=sam"]}),
    "ablation/cost": ["experiment=cost"],
}
"""{old name: overrides that replace it}"""


def current_overrides(name: str, given: Iterable[str]) -> list[str]:
    """Returns the overrides that replace `experiment=NAME`, without those of keys in `given`, which take precedence."""
    given = set(given)
    return [override for override in OLD_EXPERIMENTS[name] if override.partition("=")[0] not in given - {"experiment"}]
