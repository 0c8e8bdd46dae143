"""Knows the plain values that the steps hand to each other. Knows no files, no models, no mathematics.

Tensors follow three conventions: ``num_kept`` counts kept keys, prefix included; a ragged tensor holds the heads of a
layer one after another and ``offsets`` says where each begins; positions are token positions in the logical sequence
``prefix | document``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Advance = Callable[[int], None]


class Reporter(Protocol):
    """What a long computation may tell its caller; ``console.py`` shows it, the library ignores it by default."""

    def phase(self, name: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Advance]:
        """Open a phase of ``total`` units; the value bound by ``with`` adds finished units."""
        ...

    def note(self, message: str) -> None:
        """Tell one sentence that matters but does not stop the work."""
        ...


class SilentReporter:
    """The reporter of library calls: says nothing."""

    def phase(self, name: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Advance]:
        """Return a phase that shows nothing."""
        return nullcontext(lambda _units: None)

    def note(self, message: str) -> None:
        """Drop the sentence."""


@dataclass(frozen=True)
class LayerCache:
    """The kept keys of one layer, ragged over KV heads: head ``h`` owns rows ``offsets[h]:offsets[h + 1]``.

    Within a head, rows are ordered by position; the prefix comes first with bias 0.
    """

    keys: torch.Tensor  # (num_kept, head_dim), storage dtype, after rope
    values: torch.Tensor  # (num_kept, head_dim), storage dtype
    biases: torch.Tensor  # (num_kept,), float32, natural logarithm, added to the scaled score
    positions: torch.Tensor  # (num_kept,), int32
    offsets: torch.Tensor  # (num_kv_heads + 1,), int32
    sliding_window: int | None = None  # tokens a query of this layer can look back; None is all of them

    @property
    def num_kv_heads(self) -> int:
        """Number of KV heads."""
        return int(self.offsets.numel()) - 1

    @property
    def head_lengths(self) -> list[int]:
        """Number of kept keys of each KV head, prefix included."""
        bounds = self.offsets.tolist()
        return [end - start for start, end in pairwise(bounds)]

    @property
    def nbytes(self) -> int:
        """Bytes of the five tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the five tensors by field name."""
        return {
            "keys": self.keys,
            "values": self.values,
            "biases": self.biases,
            "positions": self.positions,
            "offsets": self.offsets,
        }


@dataclass(frozen=True)
class ModelIdentity:
    """What makes two loaded models the same model, cheap to recompute."""

    name: str  # what the user passed: hub id, folder, or known name
    revision: str | None
    family: str  # transformers' model_type
    config_fingerprint: str  # SHA-256 of the settings that shape attention
    weights_fingerprint: str  # SHA-256 of a fixed sample of every weight, rounded to bfloat16
    tokenizer_hash: str  # SHA-256 of vocabulary, merges and added tokens
    chat_template_hash: str  # SHA-256 of the template's text; of "" without a template
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheMetadata:
    """Everything a compacted cache says of itself, except tensor checksums; JSON through ``cache_file.py``."""

    model: ModelIdentity
    dtype: str  # storage type of keys and values: "bfloat16", "float16" or "float32"
    logical_length: int  # tokens that prefix and document occupy; new tokens start at this position
    prefix_length: int  # tokens before the document, kept verbatim
    position_scheme: str  # "contiguous": rope positions 0 .. logical_length - 1
    sliding_windows: list[int | None]  # per layer
    system: str | None
    thinking: bool
    document_name: str
    document_sha256: str  # of the document's UTF-8 text
    document_tokens: int
    settings: dict[str, Any]
    seed: int
    tool_version: str
    report: dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """Tokens that follow the document in one reference pass: a question or instruction, and its answer."""

    token_ids: tuple[int, ...]
    source: str  # "repeat" or "self-study"
    answer_start: int = 0  # index of the first token of the answer
    about: int | None = None  # the document token from which on it asks; None where it is about the whole
