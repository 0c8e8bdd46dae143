"""Knows compaction in words: the model summarises the document, and the summary takes the document's place. Knows no
keys."""

from __future__ import annotations

import torch

from compactor import attach
from compactor.errors import DocumentError
from compactor.job import Job
from compactor.methods import Compacted
from compactor.methods.keeping import plain_tokens
from compactor.prefill import prefill
from compactor.prompt import control_tokens
from compactor.reference_queries import stop_token_ids
from compactor.stepping import answer_after, greedy
from compactor.study import Study, stored

SUMMARY = "the model's own summary of the document, as a plain cache of the same bytes"
INSTRUCTION = (
    "Summarise the text above in about {words} words. Keep all names, numbers, dates and facts that a question about "
    "the text may ask for. Write the summary only."
)
WORDS_PER_TOKEN = 0.7  # of English prose, so that the summary ends before it is cut off


def compact(study: Study, num_kept: int) -> Compacted:
    """Summarise greedily with the full cache, at most as many tokens as the bytes of ``num_kept`` keys allow, and
    prefill the summary in place of the document. Raises DocumentError when the window has no room for the request."""
    return plain_cache(study, write_summary(study, plain_tokens(study, num_kept)))


def write_summary(study: Study, max_tokens: int) -> list[int]:
    """Return the tokens of the model's summary, at most ``max_tokens`` and what the window has room for; all methods
    and sizes that allow equally many share it. Raises DocumentError when the window has no room for the request."""
    most = longest_summary(study.job, max_tokens)
    with study.job.timed("summarise"):
        return study.once(("summary", most), lambda: summarise(study, most))


def plain_cache(study: Study, token_ids: list[int]) -> Compacted:
    """Return prefix and summary as a plain cache; positions end with the summary."""
    job = study.job
    with job.timed("summarise"):
        summary = prefill(
            job.loaded,
            list(job.prompt.prefix_ids),
            token_ids,
            prefill_chunk=job.settings.prefill_chunk,
            head_gains=None,
            reporter=job.reporter,
        )
    layers = [stored(layer, job.storage_dtype) for layer in summary.layers]
    return Compacted(layers, summary.logical_length, {"summary_tokens": len(token_ids)})


def request(job: Job, max_tokens: int) -> list[int]:
    """Return the ids that ask for a summary of at most ``max_tokens``."""
    return job.prompt.question_ids(INSTRUCTION.format(words=max(1, round(WORDS_PER_TOKEN * max_tokens))))


def longest_summary(job: Job, max_tokens: int) -> int:
    """Return ``max_tokens``, or fewer where the window has no room for them beside the request."""
    most = max_tokens
    while (over := most + len(request(job, most)) - job.room) > 0:
        most -= over
        if most < 1:
            raise DocumentError(
                f"{job.document.name} leaves {job.room} tokens of the model's window, too few to ask for a summary "
                f"({len(request(job, max_tokens))} tokens); shorten it, or take a model with a larger window."
            )
    return most


@torch.no_grad()
def summarise(study: Study, max_tokens: int) -> list[int]:
    """Return the tokens of the model's summary: at least one, at most ``max_tokens``, no control token among them."""
    job, full = study.job, study.full
    cache = attach.attach_layers(job.loaded.model, full.layers, full.logical_length)
    stops = torch.tensor(sorted(stop_token_ids(job.loaded)), dtype=torch.int64, device=job.loaded.device)

    def pick(logits: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Take the most likely token, at first none that would end the summary before it begins."""
        return greedy(torch.where(step > 0, logits, logits.index_fill(-1, stops, -torch.inf)), step)

    with job.reporter.phase("summarise"):
        (token_ids,) = answer_after(job.loaded, cache, [request(job, max_tokens)], max_tokens, pick)
    forbidden = stop_token_ids(job.loaded) | set(control_tokens(job.loaded.tokenizer).values())
    plain = [token for token in token_ids if token not in forbidden]
    return plain or token_ids[:1]
