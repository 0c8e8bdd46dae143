"""Knows one document on its way through the steps, and how large its cache may become. Knows no step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from compactor import prompt as prompts
from compactor.budget_profile import read_profile
from compactor.config import CompactSettings
from compactor.document import Document
from compactor.errors import SettingsError
from compactor.solve.budget import BYTES_PER_OFFSET, key_bytes, total_from_bytes
from compactor.solve.currency import output_gains
from compactor.types import Reporter, SilentReporter

if TYPE_CHECKING:
    from compactor.model import LoadedModel


# Answer tokens of self-study: about the whole, per document token, and of questions about passages at most.
SELF_STUDY_BASE, SELF_STUDY_RATE, SELF_STUDY_MOST = 576, 2.0, 32_768


@dataclass
class Job:
    """One document on its way through the steps."""

    document: Document
    loaded: LoadedModel
    settings: CompactSettings
    prompt: prompts.Prompt
    document_ids: list[int]
    reporter: Reporter
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds[step]``."""
        started = time.perf_counter()
        yield
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started

    @cached_property
    def head_gains(self) -> torch.Tensor:
        """Gain of each head's errors, (num_layers, num_heads) float32."""
        return output_gains(self.loaded.model, self.loaded.num_heads, self.loaded.head_dim)

    @property
    def room(self) -> int:
        """Tokens of the model's window that follow the document."""
        return self.loaded.window - len(self.prompt.prefix_ids) - len(self.document_ids)

    @property
    def self_study_tokens(self) -> int:
        """Answer tokens of self-study, all prompts together and at most; of one question about every passage."""
        if self.settings.self_study_tokens is not None:
            return self.settings.self_study_tokens
        return SELF_STUDY_BASE + min(SELF_STUDY_MOST, round(SELF_STUDY_RATE * len(self.document_ids)))

    @property
    def storage_dtype(self) -> torch.dtype:
        """Type of keys and values in the file."""
        if self.settings.cache_dtype != "auto":
            return getattr(torch, self.settings.cache_dtype)  # type: ignore[no-any-return]
        return torch.bfloat16 if self.loaded.dtype == torch.float32 else self.loaded.dtype


def prepare(
    document: Document, loaded: LoadedModel, settings: CompactSettings, reporter: Reporter | None = None
) -> Job:
    """Tokenize the document and check everything that can be checked before the model runs."""
    prompt = prompts.build_prompt(loaded.tokenizer, system=settings.system, thinking=settings.thinking)
    document_ids = prompts.encode_plain(loaded.tokenizer, document.text)
    prompts.check_window(
        len(prompt.prefix_ids),
        len(document_ids),
        window=loaded.window,
        reserve=settings.reserve,
        name=document.name,
    )
    job = Job(document, loaded, settings, prompt, document_ids, reporter or SilentReporter())
    target_total(job)  # raises when the size target is too small
    if settings.budget is not None:
        read_profile(settings.budget, loaded.identity())  # raises when it is damaged or for another model
    if settings.keep_curves and keeps_everything(job):
        raise SettingsError("--keep-curves has nothing to learn where every key is kept; give a smaller size.")
    return job


def num_compacted(loaded: LoadedModel) -> int:
    """Number of layers that see the whole document."""
    return sum(window is None for window in loaded.sliding_windows)


def target_total(job: Job) -> int:
    """Return how many document keys to keep over all heads, from whichever size target was given; all for --max-error,
    whose size is found by the fit."""
    settings, loaded, num_document = job.settings, job.loaded, len(job.document_ids)
    num_heads = num_compacted(loaded) * loaded.num_kv_heads
    if settings.max_bytes is not None:
        return total_from_bytes(
            settings.max_bytes,
            fixed_bytes=fixed_bytes(job),
            num_layers=num_compacted(loaded),
            num_kv_heads=loaded.num_kv_heads,
            num_document=num_document,
            bytes_per_key=key_bytes(loaded.head_dim, job.storage_dtype.itemsize),
        )
    if settings.target_tokens is not None:
        return min(settings.target_tokens, num_document) * num_heads
    if settings.keep_ratio is None:
        return num_heads * num_document
    return max(num_heads, round(settings.keep_ratio * num_document * num_heads))


def keeps_everything(job: Job) -> bool:
    """Whether the size target leaves nothing to choose: then no reference query is needed."""
    if job.settings.max_error is not None:
        return False
    return target_total(job) >= num_compacted(job.loaded) * job.loaded.num_kv_heads * len(job.document_ids)


def fixed_bytes(job: Job) -> int:
    """Bytes that do not depend on the size target: prefix, sliding layers, offsets."""
    loaded, prefix_length = job.loaded, len(job.prompt.prefix_ids)
    per_key = key_bytes(loaded.head_dim, job.storage_dtype.itemsize)
    total = prefix_length + len(job.document_ids)
    kept = [prefix_length if window is None else min(total, window - 1) for window in loaded.sliding_windows]
    return sum(loaded.num_kv_heads * keys * per_key + (loaded.num_kv_heads + 1) * BYTES_PER_OFFSET for keys in kept)


def full_bytes(job: Job) -> int:
    """Bytes of keys and values of the uncompacted cache in the storage type."""
    loaded, total = job.loaded, len(job.prompt.prefix_ids) + len(job.document_ids)
    kept = [total if window is None else min(total, window - 1) for window in loaded.sliding_windows]
    return sum(kept) * loaded.num_kv_heads * 2 * loaded.head_dim * job.storage_dtype.itemsize
