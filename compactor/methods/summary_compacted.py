"""Knows compaction in words and then in keys: a summary longer than its bytes, compacted as a document is. Knows no
prompts and no fit.

A summary of one word in a hundred leaves most facts out, and so few keys cannot stand for all of a document either. A
summary of four words in a hundred keeps more facts, and a quarter of its keys is what `balanced` keeps well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

from compactor.job import Job
from compactor.methods import Compacted, balanced
from compactor.methods.keeping import num_heads, plain_tokens
from compactor.methods.summary import plain_cache, write_summary
from compactor.study import Statistic, Study, prefill_document
from compactor.types import Segment

SUMMARY = "the model's own summary, four times as long as the bytes allow, compacted to them as balanced does"
FACTOR = 4


def compact(study: Study, num_kept: int) -> Compacted:
    """Summarise at most `FACTOR` times as many tokens as `summary` would, and compact the summary to ``num_kept`` keys.

    A summary that fits these bytes as it is stays a plain cache: it is `summary`. The report's errors are those of the
    summary's cache; there is no ``predicted_damage``, as nothing foretells what the summary left out. Raises
    DocumentError when the window has no room for the request.
    """
    token_ids = write_summary(study, plain_tokens(study, FACTOR * num_kept))
    if len(token_ids) <= plain_tokens(study, num_kept):
        return plain_cache(study, token_ids)
    made = balanced.compact(study_summary(study, token_ids, num_kept), num_kept)
    errors = {name: value for name, value in made.report.items() if name != "predicted_damage"}
    return replace(made, report={"summary_tokens": len(token_ids), **errors})


def study_summary(study: Study, token_ids: list[int], num_kept: int) -> SummaryStudy:
    """Return the study of the summary in place of the document; equal summaries share what is computed."""
    job, key = summary_job(study.job, token_ids, num_kept / (num_heads(study) * len(token_ids))), tuple(token_ids)
    with study.job.timed("summarise"):  # and not "prefill", which is the document's
        full = study.once((key, "prefill"), lambda: prefill_document(replace(job, seconds={})))
    return SummaryStudy(job, full, asked=study.asked, of=study, key=key)


def summary_job(job: Job, token_ids: list[int], keep_ratio: float) -> Job:
    """Return the job of compacting ``token_ids`` by `balanced` where ``job`` has the document; seconds go to ``job``.

    ``keep_ratio``: fraction of the summary's keys, below 1.
    """
    settings = replace(
        job.settings,
        method="balanced",
        keep_ratio=keep_ratio,
        target_tokens=None,
        max_bytes=None,
        max_error=None,
        budget=None,
        keep_curves=False,
        grow=False,
    )
    return replace(job, settings=settings, document_ids=token_ids)


@dataclass
class SummaryStudy(Study):
    """The study of a summary, whose statistics lie in the study of its document."""

    of: Study = field(kw_only=True)
    key: tuple[int, ...] = field(kw_only=True)  # the tokens of the summary

    @property
    def segments(self) -> list[Segment]:
        """The reference segments that follow the summary."""
        return self.once("segments", lambda: super(SummaryStudy, self).segments)

    def once(self, key: Hashable, make: Callable[[], Statistic]) -> Statistic:
        """Return the statistic ``key`` of this summary, made by ``make`` the first time."""
        return self.of.once((self.key, key), make)
