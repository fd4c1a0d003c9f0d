"""Shows a data set, to look at before training.

    python -m data NAME [--show 3] [key=value ...]

NAME is an option of `dataset`, keys are those of run_exp.py: model=llama, data_root=DIR, dataset.max_length=512.
Prints sizes, rows as the model reads them (with the tokens that have no loss marked), the lengths in tokens or the
classes, and the hashes of files and rows. The prepared rows are cached for the training.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

import data
from data import cache, images, text_to_image
from data.tokens import Prepared, TokenRows
from flatlora.config.families import trains_on
from flatlora.config.sections import DatasetConfig, ModelConfig, own_weights
from flatlora.config.settings import NoSection, build_section
from flatlora.experiment.commandline import compose_config
from flatlora.inputs.rows import fingerprint, warn_of_unread_root
from flatlora.models.family import FAMILIES
from flatlora.models.processors import load_image_processor, load_tokenizer
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError

CONF_DIR = Path(__file__).parents[1] / "conf"
_BARS, _WIDTH = 12, 40  # number and width of a histogram's bars
console = Console(highlight=False)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, or 2 for an error in the arguments or the data set."""
    quiet_libraries()
    try:
        name, count, settings = _parse(arguments)
        _show(settings=[f"dataset={name}", *settings], count=count)
    except ConfigError as error:
        report_errors(error)
        return 2
    return 0


def _parse(arguments: Sequence[str]) -> tuple[str, int, list[str]]:
    arguments, count = list(arguments), "3"
    if not arguments or {"-h", "--help"} & set(arguments):
        raise ConfigError([(__doc__ or "").strip()])
    for index, argument in enumerate(arguments):
        if argument.startswith("--show"):
            count = argument.partition("=")[2] or (arguments.pop(index + 1) if index + 1 < len(arguments) else "")
            del arguments[index]
            break
    errors = (
        []
        if count.isascii() and count.isdigit()
        else [f"Invalid --show {count}: it must be a whole number of rows, such as --show 3."]
    )
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) != 1 or names[0].startswith("-"):
        errors.append(f"Invalid names {' '.join(names) or '(none)'}: name one data set, such as python -m data gsm8k.")
    if errors:
        raise ConfigError(errors)
    return names[0], int(count), [argument for argument in arguments if "=" in argument]


def _show(settings: list[str], count: int) -> None:
    raw = compose_config(CONF_DIR, settings)
    missing = [
        message for key in ("model", "dataset") if isinstance(raw[key], NoSection) for message in raw[key].errors
    ]
    if missing:
        raise ConfigError(missing)
    try:
        loader = data.DATASETS[str(raw["dataset"].get("loader"))]
    except KeyError as error:
        raise ConfigError([error.args[0]]) from error
    config = build_section("dataset", loader.Config, raw["dataset"])
    _SHOWN[config.kind](config, raw, settings, count)
    warn_of_unread_root(raw["data_root"], loader.sources(config), config.name)
    for source in loader.sources(config):
        console.print(f"source       {source}: {fingerprint(source, raw['data_root'])}", soft_wrap=True)


def _show_text(config: DatasetConfig, raw: dict[str, Any], settings: list[str], count: int) -> None:
    model = build_section("model", ModelConfig, own_weights(raw["model"]))
    tokenizer = load_tokenizer(model)
    limit = getattr(config, "limit_tokenizer", None)
    counting = load_tokenizer(model.counting_with(limit)) if limit else None
    reader = {"encoder_decoder": FAMILIES[model.family].encoder_decoder, "classifier": model.traits.classifies}
    _show_tokens(config, cache.prepared(config, raw["data_root"], tokenizer, counting, **reader), tokenizer, count)
    loader = data.DATASETS[config.loader]
    key = cache.cache_key(loader, config, raw["data_root"], tokenizer, counting, **reader)
    console.print(f"cache        {cache.find(config, key) or 'not kept'}", soft_wrap=True)


def _show_tokens(config: DatasetConfig, rows: Prepared, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    console.print(_sizes(config, rows))
    for number in range(min(count, len(rows.train))):
        row = rows.train[number]
        console.print(Panel(_marked(row, tokenizer, rows.classes), title=f"train row {number + 1}", title_align="left"))
    if count and len(rows.train):
        console.print("Dim text between ⟦ and ⟧ has no loss. │ separates tokens, ⏎ is the end of a line.")
    lengths = rows.train.prompt_lengths.tolist() if rows.classes else rows.train.lengths
    console.print(_histogram(lengths, config.max_length))
    console.print(f"rows         sha256 {rows.sha256}", soft_wrap=True)


def _sizes(config: DatasetConfig, rows: Prepared | images.PreparedImages) -> Table:
    table = Table(title=f"{config.name}: {data.DATASETS[config.loader].describe(config)}", title_justify="left")
    for column in ("split", "rows", "cut", "left out", "tokens"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, part in (("train", rows.train), ("validation", rows.validation)):
        if isinstance(part, TokenRows):
            table.add_row(name, f"{len(part):,}", f"{part.cut:,}", f"{part.dropped:,}", f"{sum(part.lengths):,}")
        else:
            table.add_row(name, f"{len(part):,}", "—", "—", "—")
    scored = "test" if config.evaluate == "test" else "scored (of train)"
    table.add_row(scored, f"{len(rows.test):,}", "—", "—", "—")
    return table


def _marked(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, classes: list[str] | None) -> Text:
    """The tokens of a row, and its class; those without a loss are dim and between brackets."""

    def text(ids: list[int]) -> str:
        return "│".join(tokenizer.decode([token]).replace("\n", "⏎\n") for token in ids)

    marked, done = Text(f"⟦{text(row['prompt'])}⟧", "dim"), 0
    if classes:
        return marked.append(f" {classes[row['answer'][0]]}", "bold")
    for start, stop in [*row.get("gaps", ()), (len(row["answer"]),) * 2]:
        marked.append(text(row["answer"][done:start]), "bold")
        marked.append(f"⟦{text(row['answer'][start:stop])}⟧" if start < stop else "", "dim")
        done = stop
    return marked


def _histogram(lengths: list[int], limit: int) -> Table:
    """Numbers of rows by length in tokens."""
    width = max(1, -(-max(lengths) // _BARS))
    counts = Counter((length - 1) // width for length in lengths)
    title = f"tokens per train row: median {median(lengths):.0f}, longest {max(lengths)}, dataset.max_length {limit}"
    return _bars(title, {f"{k * width + 1}–{(k + 1) * width}": counts[k] for k in range(max(counts) + 1)})


def _bars(title: str, counts: dict[str, int]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max(counts.values())
    for label, count in counts.items():
        table.add_row(label, f"{count:,}", "█" * round(_WIDTH * count / most))
    return table


def _show_images(config: DatasetConfig, raw: dict[str, Any], settings: list[str], count: int) -> None:
    """As the model reads them, or the tiny CLIP where the model reads none."""
    model = raw["model"]
    if not trains_on(model["family"], config.kind):
        model = compose_config(CONF_DIR, [*settings, "model=clip_tiny"])["model"]
    processor = load_image_processor(build_section("model", ModelConfig, own_weights(model)))
    rows = images.prepared(config, raw["data_root"], processor)
    console.print(_sizes(config, rows))
    shown = Table(title="train rows", title_justify="left")
    own = rows.train.images.names
    for column in ("row", "class", "prompt", "input shape", *(["name in the data set"] if own else [])):
        shown.add_column(column)
    for number in range(min(count, len(rows.train))):
        row: dict[str, Any] = rows.train[number]
        label, shape = row["labels"], " × ".join(map(str, row["pixel_values"].shape))
        cells = [str(number + 1), f"{label} {rows.classes.names[label]}", rows.classes.prompts[label][0], shape]
        shown.add_row(*cells, *([own[label]] if own else []))
    console.print(shown)
    labels = Counter(rows.train.labels)
    most = labels.most_common(_BARS)
    title = f"{len(rows.classes.names)} classes" + (f", the {_BARS} largest" if len(labels) > _BARS else "")
    console.print(_bars(title, {rows.classes.names[label]: number for label, number in most}))
    console.print(f"rows         sha256 {rows.sha256}", soft_wrap=True)


def _show_text_to_image(config: DatasetConfig, raw: dict[str, Any], settings: list[str], count: int) -> None:
    rows = text_to_image.prepared(config, raw["data_root"])
    console.print(_sizes(config, rows))
    shown = Table(title="train rows", title_justify="left")
    for column in ("row", "image", "cropped to", "prompt"):
        shown.add_column(column)
    for number in range(min(count, len(rows.train))):
        height, width, *_ = rows.train.view(number).time_ids.int().tolist()
        cut = rows.train.sizes[number]
        cells = (str(number + 1), f"{width} × {height}", f"{cut[1]} × {cut[0]}", rows.train.prompt(number))
        shown.add_row(*map(Text, cells))
    console.print(shown)
    if len(sizes := Counter(rows.train.sizes)) > 1:
        console.print(_bars("images by size", {f"{w} × {h}": number for (h, w), number in sorted(sizes.items())}))
    console.print(f"rows         sha256 {rows.sha256}", soft_wrap=True)


_SHOWN = {"text": _show_text, "image": _show_images, "text_to_image": _show_text_to_image}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
