"""Knows what a compaction will cost before it runs: arithmetic counted, rates measured on this machine.

An estimate, not a promise: it counts matrix products and the reads of generation, and assumes `EFFICIENCY` of the
measured matrix rate. Its phases have the names that the report of the run gives to its seconds. What nobody can know
is left out: the sizes that --grow will try, and the size that --max-error will find. For the latter the bytes are those
of keeping every key, and the search is counted as fits of the default size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from compactor import certificate, workspace
from compactor.attention import block_elements
from compactor.config import DEFAULT_KEEP_RATIO, OUR_METHODS, SUMMARISING
from compactor.errors import MemoryShortError
from compactor.job import fixed_bytes, full_bytes, keeps_everything, num_compacted, prepare, target_total
from compactor.methods import best, fast, kvzip, method_module, summary_compacted
from compactor.methods.ours import ERROR_ROUNDS
from compactor.methods.sampled import sampled_sections
from compactor.prefill import CONTEXT_SPAN
from compactor.sampling import rows_at_once
from compactor.self_study import QUESTION_TOKENS, WHOLE_TOKENS, make_plan
from compactor.solve.budget import key_bytes
from compactor.solve.refine import rows_of_step
from compactor.study import GRAM_ROWS, GREEDY_CHUNK, held_bytes, row_bytes

if TYPE_CHECKING:
    from compactor.config import CompactSettings
    from compactor.document import Document
    from compactor.job import Job
    from compactor.model import LoadedModel

EFFICIENCY = 0.5  # of the rate of one large matrix product, over whole phases
STEP_SECONDS_PER_LAYER = 4e-3  # of generation, beside the reads: 2.7 ms measured on an H100, 6 ms on two CPU cores
SPREAD = 1.6  # mean of the squared count per head over the squared mean: budgets differ between heads
GREEDY_COPIES = 4  # of a layer's Gram matrices while their keys are ordered: two of them, the factor, what is copied
QUESTION_LENGTH = 24  # tokens of a held-out question
PASSAGE_LENGTH = 72  # tokens of a passage with what is asked about it
SORT_RATE = 5e6  # keys that the budget ranks in a second
PROBE_SIZE = {"cpu": 1024, "mps": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Estimate:
    """What to expect."""

    document_tokens: int
    full_bytes: int  # the uncompacted cache, in the storage type
    tensor_bytes: int  # the file without its header
    workspace_bytes: int  # what the largest step holds beside weights and full cache
    peak_bytes: int  # weights, full cache and workspace
    total_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)


def estimate(document: Document, loaded: LoadedModel, settings: CompactSettings) -> Estimate:
    """Return expected bytes and seconds. Raises what `job.prepare` raises; runs no layer of the model."""
    job = prepare(document, loaded, settings)
    kept_bytes = target_total(job) * key_bytes(loaded.head_dim, job.storage_dtype.itemsize)
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    cache = full_bytes(job) * loaded.dtype.itemsize // job.storage_dtype.itemsize
    seconds = phase_seconds(job, weights)
    return Estimate(
        document_tokens=len(job.document_ids),
        full_bytes=full_bytes(job),
        tensor_bytes=fixed_bytes(job) + kept_bytes,
        workspace_bytes=workspace_bytes(job),
        peak_bytes=weights + cache + workspace_bytes(job),
        total_seconds=round(sum(seconds.values()), 1),
        seconds={phase: round(value, 1) for phase, value in seconds.items()},
    )


def phase_seconds(job: Job, weights: int) -> dict[str, float]:
    """Return expected seconds of each phase, in the order of the run; ``weights``: bytes of the model's parameters."""
    work = Work(job, weights)
    seconds = {"prefill": work.prefill()}
    if not keeps_everything(job):
        seconds |= work.method()
    if job.settings.certify:
        seconds["certify"] = work.certify()
    return seconds


def workspace_bytes(job: Job) -> int:
    """Return the bytes that the largest step holds beside weights and full cache."""
    loaded, num_document = job.loaded, len(job.document_ids)
    blocks = 3 * 4 * block_elements(loaded.device) + 2 * 4 * num_document * loaded.num_kv_heads * loaded.head_dim
    if keeps_everything(job) or job.settings.method not in OUR_METHODS:
        return blocks
    per_row, rows = row_bytes(job), reference_rows(job)
    longest = min(num_document, round(4 * kept_per_head(job)))
    fit = rows * per_row + 3 * 8 * longest**2
    if job.settings.method == "fast":
        return blocks + fit
    gram = 4 * loaded.num_kv_heads * num_document * min(GREEDY_CHUNK, num_document)
    held = max(GREEDY_COPIES * gram, min(held_bytes(), GREEDY_COPIES * num_compacted(loaded) * gram))
    return blocks + max(fit, min(rows, GRAM_ROWS) * per_row + held)


def check_workspace(job: Job) -> None:
    """Raise MemoryShortError where a bound of the workspace is less than the job needs whatever its parts."""
    bound = workspace.bound()
    if bound is not None and (needed := workspace_bytes(job)) > bound:
        raise MemoryShortError(
            f"{job.document.name} needs about {needed / 1e9:.2g} GB beside weights and full cache, more than "
            f"--workspace, {bound / 1e9:.2g} GB; raise it, lower --self-study-tokens, or take --method fast."
        )


def reference_rows(job: Job) -> int:
    """Return how many tokens the reference segments of one of our methods have, instructions left out."""
    settings, num_document = job.settings, len(job.document_ids)
    if settings.method == "fast":
        pieces = -(-num_document // fast.PIECE)
        step = max(1, min(fast.EVERY, pieces // fast.LEAST_PIECES))
        return min(num_document, -(-(pieces - step // 2) // step) * fast.PIECE)
    rows = num_document if "repeat" in settings.queries else 0
    return rows + (self_study_tokens(job) if "self-study" in settings.queries else 0)


def self_study_tokens(job: Job) -> int:
    """Return the answer tokens of self-study that the method asks for."""
    return job.self_study_tokens * self_study_rounds(job)


def self_study_rounds(job: Job) -> int:
    """Return how many questions the method asks about every passage."""
    return best.SELF_STUDY_ROUNDS if job.settings.method == "best" else 1


def kept_per_head(job: Job) -> float:
    """Return the average number of document keys of a head; for --max-error, which finds it, the default size's."""
    if job.settings.max_error is not None:
        return DEFAULT_KEEP_RATIO * len(job.document_ids)
    return target_total(job) / (num_compacted(job.loaded) * job.loaded.num_kv_heads)


@dataclass
class Work:
    """Counts the arithmetic of each phase of a job and divides it by measured rates; all results in seconds."""

    job: Job
    weights: int  # bytes of the model's parameters

    @cached_property
    def rate(self) -> float:
        """Floating-point operations per second over whole phases."""
        return EFFICIENCY * matrix_rate(self.job.loaded.device, self.job.loaded.dtype)

    @cached_property
    def step_seconds(self) -> float:
        """Seconds of one step of generation: weights and full cache are read, every layer is started."""
        reads = (self.weights + full_bytes(self.job)) / copy_rate(self.job.loaded.device)
        return reads + STEP_SECONDS_PER_LAYER * self.job.loaded.num_layers

    @cached_property
    def per_token(self) -> int:
        """Operations of a token in all products with weights but the last."""
        return 2 * sum(p.numel() for name, p in self.job.loaded.model.named_parameters() if "embed" not in name)

    @cached_property
    def attend(self) -> int:
        """Operations of one token's attention to the whole document, all layers that compact it."""
        loaded = self.job.loaded
        length = len(self.job.prompt.prefix_ids) + len(self.job.document_ids)
        return 4 * num_compacted(loaded) * loaded.num_heads * loaded.head_dim * length

    def prefill(self) -> float:
        """Causal: half the attention; the document's own queries score the keys once more where they are wanted."""
        settings, num_document = self.job.settings, len(self.job.document_ids)
        scored = settings.method in OUR_METHODS and "context" in settings.queries and not keeps_everything(self.job)
        length = len(self.job.prompt.prefix_ids) + num_document
        return length * (self.per_token + self.attend * (2 if scored else 1) / 2) / self.rate

    def method(self) -> dict[str, float]:
        """Return the phases of the method of the settings."""
        method, num_document = self.job.settings.method, len(self.job.document_ids)
        if method == "fast":
            return {"select": 0.0, **self.solve(reference_rows(self.job), 0)}
        if method in OUR_METHODS:
            rows, context = reference_rows(self.job), self.context_rows()
            return {"ask": self.ask(), "select": self.select(rows), **self.solve(rows, context)}
        if method.startswith("attention-matching"):
            return {"ask": self.ask(), "fit": self.fit(reference_rows(self.job) or num_document, 0)}
        if method == "kvzip":
            return {
                "repeat": num_document * (self.per_token + self.attend * (1 + kvzip.PIECE / num_document)) / self.rate
            }
        if method in ("snapkv", "h2o"):
            return {"observe": num_document * (self.per_token + self.attend) / self.rate}
        if method in SUMMARISING:
            kept, factor = kept_per_head(self.job), summary_compacted.FACTOR if method == "summary-compacted" else 1
            tokens = min(num_document, round(factor * kept))
            seconds = {"summarise": tokens * (self.step_seconds + 2 * self.per_token / self.rate)}
            if method == "summary":
                return seconds
            own = summary_compacted.summary_job(self.job, self.job.document_ids[:tokens], kept / tokens)
            return seconds | Work(own, self.weights).method()
        return {}

    def context_rows(self) -> int:
        """Return how many of the document's own rows are fitted: none beside the repeat pass."""
        queries, num_document = self.job.settings.queries, len(self.job.document_ids)
        return max(0, num_document - CONTEXT_SPAN) if "context" in queries and "repeat" not in queries else 0

    def ask(self) -> float:
        """Self-study: steps of each batch, and what every answer token costs in arithmetic."""
        if "self-study" not in self.job.settings.queries:
            return 0.0
        tokens, rounds = self_study_tokens(self.job), self_study_rounds(self.job)
        plan = make_plan(len(self.job.document_ids), tokens, rounds)
        at_once = rows_at_once(self.job.loaded, PASSAGE_LENGTH + QUESTION_TOKENS)
        batches = -(-plan.num_passages // at_once)
        steps = batches * rounds * (QUESTION_TOKENS + plan.answer_tokens) + (WHOLE_TOKENS if plan.num_whole else 0)
        return steps * self.step_seconds + 2 * tokens * self.per_token / self.rate

    def select(self, rows: int) -> float:
        """One pass of exact attention and the scores once more, of a sample; for `best` of all rows, with a Gram matrix
        of every chunk, and the greedy search."""
        loaded, num_document = self.job.loaded, len(self.job.document_ids)
        if self.job.settings.method != "best":
            return self.sampled * rows * (self.per_token + 1.5 * self.attend) / self.rate
        chunk = min(GREEDY_CHUNK, num_document)
        grams = 2 * num_compacted(loaded) * loaded.num_heads * num_document * chunk * rows
        search = num_compacted(loaded) * loaded.num_kv_heads * num_document * chunk * (chunk + 2 * loaded.head_dim)
        return (rows * (self.per_token + 1.5 * self.attend) + grams + search) / self.rate

    @property
    def sampled(self) -> float:
        """Share of the rows from which `balanced` learns how many keys each layer keeps."""
        num_document = len(self.job.document_ids)
        return sum(last - first for first, last in sampled_sections(num_document)) / num_document or 1.0

    def solve(self, rows: int, context_rows: int) -> dict[str, float]:
        """Return budget and fit; with --max-error as often as its search may repeat them."""
        loaded = self.job.loaded
        keys = num_compacted(loaded) * loaded.num_kv_heads * len(self.job.document_ids)
        times = 1 if self.job.settings.max_error is None else ERROR_ROUNDS
        return {"budget": times * keys / SORT_RATE, "fit": times * self.fit(rows, context_rows)}

    def fit(self, rows: int, context_rows: int) -> float:
        """One pass; per row exact attention, attention to the kept keys, and two Gram matrices of them, for which every
        other row is enough in long documents; then the refinement, five products a step. Nothing of it is fitted by
        `fast`, which looks at the rows alone."""
        loaded, kept = self.job.loaded, kept_per_head(self.job)
        every_row = rows + context_rows
        steps = self.job.settings.refine_steps
        if steps is None:
            steps = getattr(method_module(self.job.settings.method), "REFINE_STEPS", 0)
        looked_at = 0.0 if self.job.settings.method == "fast" else 0.5 if steps and not context_rows else 1.0
        gram = 4 * looked_at * num_compacted(loaded) * loaded.num_heads * SPREAD * kept**2
        to_kept = 3 * self.attend * kept / len(self.job.document_ids)
        heads = num_compacted(loaded) * loaded.num_kv_heads
        refinement = 10 * steps * rows_of_step(loaded.device) * heads * kept * loaded.head_dim
        scores = 0.5 * rows * self.attend if self.job.settings.method == "balanced" and self.sampled < 1.0 else 0.0
        exact = every_row * (self.attend + to_kept + gram)
        return (rows * self.per_token + exact + scores + refinement) / self.rate

    def certify(self) -> float:
        """Two batches of generation, and the passes over the answers: full and compacted together, compacted, none."""
        loaded, num_document = self.job.loaded, len(self.job.document_ids)
        asked = min(
            certificate.MOST_SECTIONS, max(certificate.LEAST_SECTIONS, num_document // certificate.SECTION_TOKENS)
        )
        questions = asked + len(certificate.FIXED_QUESTIONS)
        steps = certificate.QUESTION_TOKENS + certificate.ANSWER_TOKENS
        answer_tokens = questions * certificate.ANSWER_TOKENS
        tokens = questions * (QUESTION_LENGTH + certificate.ANSWER_TOKENS)
        head = loaded.model.get_output_embeddings()
        predictions = 4 * answer_tokens * 2 * head.weight.numel()
        generated = (asked * certificate.QUESTION_TOKENS + answer_tokens) * (self.per_token + self.attend)
        passes = tokens * (3 * self.per_token + 2 * self.attend)
        return float(steps * self.step_seconds + (generated + passes + predictions) / self.rate)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured floating-point operations per second of one large square product."""
    size = PROBE_SIZE.get(device.type, 1024)
    matrix = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _seconds(lambda: matrix @ matrix, device)


def copy_rate(device: torch.device) -> float:
    """Measured bytes per second of reading a buffer larger than caches."""
    buffer = torch.ones(1 << (26 if device.type == "cpu" else 28), device=device)
    return buffer.nbytes / _seconds(lambda: buffer.sum(), device)


def _seconds(run: object, device: torch.device) -> float:
    best_s = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        result = run()  # type: ignore[operator]
        float(result.flatten()[0])  # waits for the device
        best_s = min(best_s, time.perf_counter() - started)
    return best_s
