"""Compiles every Triton kernel of the library for several GPUs, on a machine without one, and prints what it needs.

    python -m scripts.kernels [--cards 80,86,89,90,100]

Each kernel is compiled with every set of constants that the library launches it with on such a card. A row of the table
has the most shared memory of a block, the most registers of a thread and the most bytes that a thread spills, each of
any of these variants. Exit code 1 if a card lacks what a variant needs, which is then printed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from flatlora.fused import quick_gelu
from flatlora.noise import triton_kernels

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of a block, by compute capability
BLOCK_REGISTERS = 65536  # of all threads of a block, on each of these cards
console = Console(highlight=False)


class Usage(NamedTuple):
    """What a compiled kernel needs of a card."""

    card: int
    kernel: str
    constants: str
    shared_bytes: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread
    threads: int

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= 1024 * SHARED_KIB[self.card] and self.registers * self.threads <= BLOCK_REGISTERS


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=cards, default=[80, 86, 89, 90, 100], help="compute capabilities times ten")
    options = parser.parse_args(words)
    if not triton_kernels.HAS_TRITON or triton_kernels.INTERPRETED:
        console.print("Kernels are compiled by Triton: pip install triton (Linux), and unset TRITON_INTERPRET.")
        return 2
    launches = [(card, *launch) for card in options.cards for launch in every_launch(card)]
    usages = [compile_for(*launch) for launch in track(launches, description="compile", console=console)]
    console.print(usage_table(usages))
    misfits = [usage for usage in usages if not usage.fits]
    for usage in misfits:
        console.print(f"sm_{usage.card} lacks what {usage.kernel} needs: {usage}")
    return int(bool(misfits))


def every_launch(card: int) -> Iterator[tuple[Any, dict[str, Any], dict[str, str]]]:
    """Each kernel, each set of constants, and the types of its other arguments, for a compute capability times ten."""
    for module in (triton_kernels, quick_gelu):
        yield from module.every_launch(divmod(card, 10))


def cards(text: str) -> list[int]:
    """Keys of SHARED_KIB, separated by commas."""
    chosen = text.split(",")
    if unknown := [word for word in chosen if word not in map(str, SHARED_KIB)]:
        known = ", ".join(map(str, SHARED_KIB))
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: it must be among {known}, separated by commas")
    return [int(word) for word in dict.fromkeys(chosen)]


def compile_for(card: int, kernel: Any, constants: dict[str, Any], arguments: dict[str, str]) -> Usage:
    """Compile a kernel for a compute capability times ten, with the constants and the types of a launch."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    # At a launch Triton sees that torch's allocations start at multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
    values = {name: value for name, value in constants.items() if name in types}
    options = {name: value for name, value in constants.items() if name not in types}
    source = ASTSource(kernel, types, values, aligned)
    compiled = compile(source, target=GPUTarget("cuda", card, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needs = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listed)}
    return Usage(
        card,
        kernel.__name__.strip("_").removesuffix("_kernel"),
        " ".join(f"{name}={value}" for name, value in constants.items() if name not in ("FIELDS", "FAST_MATH")),
        compiled.metadata.shared,
        needs["REG"],
        needs["STACK"] + needs["LOCAL"],
        32 * compiled.metadata.num_warps,
    )


def usage_table(usages: list[Usage]) -> Table:
    """One row per card and kernel."""
    table = Table(title="Triton kernels: the most of any variant", title_justify="left")
    for column in ("card", "kernel", "variants", "shared KiB", "registers", "spilled bytes"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    groups: dict[tuple[int, str], list[Usage]] = {}
    for each in usages:
        groups.setdefault((each.card, each.kernel), []).append(each)
    for (card, kernel), group in groups.items():
        table.add_row(
            f"sm_{card}",
            kernel,
            str(len(group)),
            f"{max(each.shared_bytes for each in group) / 1024:.1f} of {SHARED_KIB[card]}",
            str(max(each.registers for each in group)),
            str(max(each.spilled_bytes for each in group)),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
