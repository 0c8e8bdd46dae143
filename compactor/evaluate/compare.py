"""Compares caches of one document on questions: answers, and KL to the full cache on the full cache's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compactor.attach import AttachedCache, CompactedCache, attach_layers
from compactor.config import DecodeSettings
from compactor.decode import Answer, answer_question
from compactor.fidelity import answer_log_probs, compare
from compactor.job import Job
from compactor.methods import Compacted, random, truncation
from compactor.prefill import Prefilled
from compactor.study import Study


@dataclass(frozen=True)
class Comparison:
    """One question: both answers, and how far every cache is from the full one."""

    question: str
    full: Answer
    compacted: Answer
    kl: dict[str, float]  # cache name -> nats per token of the full cache's answer
    agreement: dict[str, float]  # cache name -> fraction of answer tokens with the same most likely token


def baseline_caches(job: Job, full: Prefilled, cache: CompactedCache) -> dict[str, AttachedCache]:
    """Return the two baselines at the bytes of ``cache``: the truncated document and random keys without a fit.

    Truncation needs no biases and positions, so it keeps somewhat more tokens than the compacted cache has keys a head.
    """
    heads = len(full.full_layers) * job.loaded.num_kv_heads
    plain_key = 2 * job.loaded.head_dim * job.storage_dtype.itemsize
    ragged_bytes = sum(cache.layers[i].nbytes for i in full.full_layers)
    truncated_length = ragged_bytes // (heads * plain_key) - full.prefix_length
    study = Study(job, full)

    def attached(compacted: Compacted) -> AttachedCache:
        return attach_layers(job.loaded.model, compacted.layers, compacted.logical_length)

    return {
        "truncated document": attached(truncation.first_tokens(study, truncated_length)),
        "random keys": attached(random.compact(study, cache.metadata.report["kept_keys"])),
    }


def compare_answers(
    job: Job, full: Prefilled, cache: CompactedCache, questions: Sequence[str], settings: DecodeSettings
) -> list[Comparison]:
    """Ask every question of the full and of the compacted cache, and measure all caches on the full cache's answers."""
    loaded = job.loaded
    reference = attach_layers(loaded.model, full.layers, full.logical_length)
    others = {"compacted": cache.attach(loaded.model, check=False), **baseline_caches(job, full, cache)}
    results = []
    with job.reporter.phase("answer", len(questions), "questions") as advance:
        for question in questions:
            ours = answer_question(loaded, others["compacted"], job.prompt, question, settings)
            truth = answer_question(loaded, reference, job.prompt, question, settings)
            question_ids = job.prompt.question_ids(question)
            expected = answer_log_probs(loaded, reference, question_ids, truth.token_ids)
            fidelities = {
                name: compare(expected, answer_log_probs(loaded, other, question_ids, truth.token_ids))
                for name, other in others.items()
            }
            results.append(
                Comparison(
                    question,
                    truth,
                    ours,
                    {name: fidelity.mean_kl for name, fidelity in fidelities.items()},
                    {name: float(fidelity.agreement.double().mean()) for name, fidelity in fidelities.items()},
                )
            )
            advance(1)
    return results
