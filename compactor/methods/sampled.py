"""Knows how many keys each layer keeps before all rows are seen: from a sample of the document's sections.

The rows that ask about a sampled section score its keys, and each such key stands for as many as the sections that one
sampled section stands for. Which keys a layer keeps, and how it shares them out among its heads, its own rows say when
the fit reaches it (solve/fit.py): exact attention is then computed once for both.
"""

from __future__ import annotations

import torch

from compactor.reference_queries import repeat_segments
from compactor.self_study import SECTION_TOKENS
from compactor.solve.fit import solve_device
from compactor.solve.select import Selection
from compactor.study import Study, by_score, key_scores
from compactor.types import Segment

EVERY = 4  # one section in so many is sampled; one in more where that leaves `ENOUGH_SECTIONS`
ENOUGH_SECTIONS = 8
LEAST_SECTIONS = 2  # of a sample: of short documents it is a larger share


def by_sample(study: Study, segments: list[Segment], weights: dict[str, float], num_kept: int) -> Selection:
    """Return gains without an order, from a sample; with an order, from all segments, where the document is too short
    for a sample or the sample has no segment."""
    sections = sampled_sections(len(study.job.document_ids))
    sample = sampled_segments(study, segments, sections)
    if not sample:
        return by_score(study, segments, weights, num_kept)
    scores = key_scores(study, sample, weights)
    scores = scores.to(solve_device(scores.device))
    return Selection(None, spread_out(torch.cat([scores[..., a:b] for a, b in sections], dim=-1), scores.shape[-1]))


def sampled_sections(num_document: int) -> list[tuple[int, int]]:
    """Return the sampled sections, equally far apart; none where a sample would be more than half of the document."""
    count = max(1, round(num_document / SECTION_TOKENS))
    every = max(min(EVERY, count // LEAST_SECTIONS), count // ENOUGH_SECTIONS)
    borders = [i * num_document // count for i in range(count + 1)]
    return [(borders[i], borders[i + 1]) for i in range(every // 2, count, every)] if every > 1 else []


def sampled_segments(study: Study, segments: list[Segment], sections: list[tuple[int, int]]) -> list[Segment]:
    """Return the segments about some sections, and of those about the whole as small a share; the sections are repeated
    anew, each by itself, where segments repeat the document."""
    if not sections:
        return []
    job, studied = study.job, [one for one in segments if one.source != "repeat"]
    share = len(job.document_ids) // sum(last - first for first, last in sections)
    sample = [
        one for one in studied if one.about is not None and any(first <= one.about < last for first, last in sections)
    ]
    sample += [one for one in studied if one.about is None][share // 2 :: share]
    if len(studied) < len(segments):
        sample += repeat_segments(job.prompt, job.document_ids, sections, job.room)
    return sample


def spread_out(gains: torch.Tensor, num_document: int) -> torch.Tensor:
    """Return gains (..., num_sampled) as if the whole document were like the sample, (..., num_document), not
    increasing: each comes as often as the sample fits into the document."""
    ranked = gains.sort(dim=-1, descending=True).values
    standing_for = torch.arange(num_document, device=gains.device) * ranked.shape[-1] // num_document
    return ranked[..., standing_for]
