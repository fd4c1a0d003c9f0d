"""Samplers whose row order is a pure function of seed and epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Shuffles rows as a pure function of (seed, epoch), so that a resumed run gets the same order.

    With `group` > 1, shuffled rows are cut into chunks of 50 groups and sorted by length inside each chunk, so that the
    `group` rows of an optimizer step have similar lengths; then the order of the groups is shuffled.
    """

    def __init__(self, lengths: list[int], seed: int, group: int = 1) -> None:
        self.lengths, self.seed, self.group, self.epoch = lengths, seed, group, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        return iter(self._grouped(order, generator) if self.group > 1 else order)

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        run = 50 * self.group
        runs = [sorted(order[i : i + run], key=self.lengths.__getitem__) for i in range(0, len(order), run)]
        groups = [part[i : i + self.group] for part in runs for i in range(0, len(part), self.group)]
        short = [group for group in groups if len(group) < self.group]
        whole = [group for group in groups if len(group) == self.group]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        return [index for group in shuffled + short for index in group]  # a short group last keeps the others aligned


class BucketSampler(EpochSampler):
    """`EpochSampler` whose micro-batches hold rows of one bucket each, such as images of one size.

    If the rows of a bucket do not fill its last micro-batch, its first rows of the epoch are repeated. The k-th
    repetition has the index row + k · (number of rows), for which the dataset draws new random samples.
    """

    def __init__(self, buckets: Sequence[Hashable], seed: int, micro_batch: int) -> None:
        super().__init__([1] * len(buckets), seed)
        self.buckets, self.micro_batch = buckets, micro_batch

    def __len__(self) -> int:
        return sum(self._filled(count) for count in Counter(self.buckets).values())

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        by_bucket: dict[Hashable, list[int]] = {}
        for row in order:
            by_bucket.setdefault(self.buckets[row], []).append(row)
        batches = []
        for rows in by_bucket.values():
            turns = [divmod(place, len(rows)) for place in range(self._filled(len(rows)))]
            filled = [rows[place] + turn * len(self.buckets) for turn, place in turns]
            batches += [filled[i : i + self.micro_batch] for i in range(0, len(filled), self.micro_batch)]
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[place]

    def _filled(self, rows: int) -> int:
        return -(-rows // self.micro_batch) * self.micro_batch
