"""Knows what many results say together: means, intervals, medians, rank correlations. Knows no files and no screens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from compactor.config import METHODS
from compactor.evaluate.metrics import bootstrap_interval, spearman
from compactor.evaluate.records import FULL, Record

LEAST_DOCUMENTS = 5  # for a rank correlation
INTERVAL_SEED = 0


@dataclass(frozen=True)
class Mean:
    """A mean over all questions with its 95% interval; documents are what the bootstrap draws."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """One method at one size on one task and length: a field of the table.

    Scores, KL and agreement are means over all questions (KL: of the mean over an answer's tokens), bytes are means
    over documents, seconds and rates medians. None: nothing was measured, or not all of it is finite. Documents that
    failed are counted, and take no part in anything else.
    """

    model: str
    task: str
    length: int | None
    method: str
    keep_ratio: float | None
    documents: int
    failed: int  # documents
    questions: int
    score: Mean | None
    kl: Mean | None
    agreement: float | None
    same: float | None  # share of questions answered as by the full cache, token by token
    file_bytes: float | None
    tensor_bytes: float | None
    prefill_seconds: float | None
    seconds: float | None
    shared_seconds: float | None
    first_token_seconds: float | None
    tokens_per_second: float | None
    damage_correlation: float | None  # Spearman: predicted damage and measured KL, from LEAST_DOCUMENTS on

    @property
    def bytes(self) -> float | None:
        """Bytes on the disk; of the tensors where nothing is saved."""
        return self.tensor_bytes if self.file_bytes is None else self.file_bytes


@dataclass(frozen=True)
class Correlation:
    """How well a method's predicted damage ranks documents by measured KL, over all tasks and lengths."""

    model: str
    method: str
    keep_ratio: float
    documents: int
    spearman: float | None


def table(records: Sequence[Record]) -> list[Cell]:
    """Return a cell for every model, task, length, method and size of the records, in the order of a table."""
    return [cell(group) for group in grouped(records, lambda r: (r.model, r.task, r.length, r.method, r.keep_ratio))]


def correlations(records: Sequence[Record]) -> list[Correlation]:
    """Return a correlation for every model, method and size with at least LEAST_DOCUMENTS predictions."""
    found = []
    done = [record for record in records if record.status == "done"]
    for group in grouped(done, lambda r: (r.model, r.method, r.keep_ratio)):
        pairs = damage_pairs(group)
        ratio = group[0].keep_ratio
        if ratio is not None and len(pairs) >= LEAST_DOCUMENTS:
            found.append(Correlation(group[0].model, group[0].method, ratio, len(pairs), rank_correlation(pairs)))
    return found


def failures(records: Sequence[Record]) -> list[Record]:
    """Return the results that failed."""
    return [record for record in records if record.status == "failed"]


def num_settings(records: Sequence[Record]) -> int:
    """Return how many different settings and releases the results were made with; one is what a table needs."""
    return len({json.dumps([r.settings, r.dtype, r.tool_version], sort_keys=True) for r in records})


def grouped(records: Sequence[Record], key: Callable[[Record], tuple[object, ...]]) -> list[list[Record]]:
    """Group results; in order of model, task, length, method and falling size."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    peers = sorted({record.method for record in records} - {FULL, *METHODS})
    order = {method: place for place, method in enumerate((FULL, *METHODS, *peers))}
    tasks = list(dict.fromkeys(record.task for record in records))

    def place(record: Record) -> tuple[object, ...]:
        ratio = 2.0 if record.keep_ratio is None else record.keep_ratio
        return (record.model, tasks.index(record.task), record.length or 0, order[record.method], -ratio)

    for record in sorted(records, key=place):
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def cell(records: Sequence[Record]) -> Cell:
    """Return what the results of several documents say together."""
    first, group = records[0], [record for record in records if record.status == "done"]
    pairs = damage_pairs(group)
    return Cell(
        model=first.model,
        task=first.task,
        length=first.length,
        method=first.method,
        keep_ratio=first.keep_ratio,
        documents=len(group),
        failed=len(records) - len(group),
        questions=sum(len(record.scores) for record in group),
        score=mean_of([record.scores for record in group]),
        kl=mean_of([record.kl for record in group]),
        agreement=average([value for record in group for value in record.agreement]),
        same=average([float(value) for record in group for value in record.same]),
        file_bytes=average([record.file_bytes for record in group]),
        tensor_bytes=average([record.tensor_bytes for record in group]),
        prefill_seconds=middle([record.prefill_seconds for record in group]),
        seconds=middle([record.seconds for record in group]),
        shared_seconds=middle([record.shared_seconds for record in group]),
        first_token_seconds=middle([record.first_token_seconds for record in group]),
        tokens_per_second=middle([record.tokens_per_second for record in group]),
        damage_correlation=rank_correlation(pairs) if len(pairs) >= LEAST_DOCUMENTS else None,
    )


def mean_of(lists: Sequence[Sequence[float | None]]) -> Mean | None:
    """Return the mean of all values and its interval, None when there are none or one of them is not finite."""
    values = [[value for value in one if value is not None] for one in lists]
    if not any(values) or any(value is None for one in lists for value in one):
        return None
    low, high = bootstrap_interval(values, seed=INTERVAL_SEED)
    return Mean(fmean([value for one in values for value in one]), low, high)


def average(values: Sequence[float | None]) -> float | None:
    """Return the mean, None when a value is missing or there is none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def middle(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that there are, None when there are none."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def damage_pairs(group: Sequence[Record]) -> list[tuple[float, float]]:
    """Return predicted damage and mean KL of every document that has both."""
    pairs = []
    for record in group:
        kl = average(record.kl)
        if record.predicted_damage is not None and kl is not None:
            pairs.append((record.predicted_damage, kl))
    return pairs


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation, None where one side is constant."""
    value = spearman([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return None if math.isnan(value) else value
