"""Knows what the benchmarks of kernels and of whole models are given: sizes, defaults, limits. Knows no torch.

Sizes that are left out follow the device: those of Qwen3-4B on a GPU, small ones elsewhere (``on``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from compactor.bench.shapes import SHAPES
from compactor.config import OUR_METHODS
from compactor.errors import SettingsError

GPU_SHAPE, SMALL_SHAPE = "qwen3-4b", "tiny"
SMALL_TOKENS = 1024
GPU_KEYS, SMALL_KEYS = 61_440, 2048
GPU_ROWS, SMALL_ROWS = 8192, 128
GPU_HIDDEN, SMALL_HIDDEN = 2560, 256
KEPT_AT_50X = 0.02
LEAST_NEW_TOKENS = 16  # the first few take part in no rate: shapes are fixed and a step is captured

# The rows of a kernel come from ``rows(settings, device, reporter)`` of its module: another kernel is a module and a
# line here.
KERNELS = {
    name: f"compactor.bench.{name}_rows"
    for name in (
        "biased_decode",
        "tail_decode",
        "rotary",
        "attention_stats",
        "merge_rows",
        "kept_shares",
        "gram",
        "value_targets",
        "greedy",
        "cholesky",
        "nnls",
        "refine_steps",
        "step_decode",
        "gemv",
        "rms_norm",
    )
}


def check_least(settings: object, limits: dict[str, int | float]) -> None:
    """Raise SettingsError where a field is below its limit; None is not looked at."""
    for name, low in limits.items():
        value = getattr(settings, name)
        if value is not None and not value >= low:
            raise SettingsError(f"--{name.replace('_', '-')} is {value:g}; the least is {low:g}.")


def check_seed(seed: int) -> None:
    """Raise SettingsError unless the seed is one that every generator takes."""
    if not 0 <= seed < 2**31:
        raise SettingsError(f"--seed is {seed}; give a whole number from 0 to 2**31 - 1.")


def ragged_lengths(average: int, spread: float, num_heads: int, most: int) -> list[int]:
    """Return how many keys each head keeps: geometric steps, the longest ``spread`` times the shortest.

    Raises SettingsError when the longest head would keep more than ``most``.
    """
    weights = [spread ** (head / max(1, num_heads - 1)) for head in range(num_heads)]
    lengths = [max(1, round(average * num_heads * weight / sum(weights))) for weight in weights]
    if max(lengths) > most:
        raise SettingsError(
            f"With --spread {spread:g} the longest head would keep {max(lengths):,} of {most:,} keys; lower --spread "
            "or --keep."
        )
    return lengths


@dataclass(frozen=True)
class KernelSettings:
    """Settings of ``compactor bench kernels``. Raises SettingsError when a value is out of range."""

    kernels: tuple[str, ...] = tuple(KERNELS)
    keys: int | None = None  # of a head in the full cache
    keep: int | None = None  # of a head in the compacted one, on average; None is a fiftieth
    rows: int | None = None  # of a query head, where there are many
    hidden: int | None = None  # numbers that a layer hands to the next for each token
    spread: float = 20.0  # the longest head's keys over the shortest one's
    heads: int = 32  # query heads
    kv_heads: int = 8
    head_dim: int = 128
    batches: tuple[int, ...] = (1, 8)
    q_len: int = 1  # new tokens of each sequence
    repeats: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, {"keys": 1, "keep": 1, "rows": 1, "hidden": 1, "spread": 1, "heads": 1, "kv_heads": 1,
                           "head_dim": 8, "q_len": 1, "repeats": 1})  # fmt: skip
        check_seed(self.seed)
        unknown = [name for name in self.kernels if name not in KERNELS]
        if unknown or not self.kernels:
            what = f"does not know {', '.join(map(repr, unknown))}" if unknown else "is empty"
            raise SettingsError(f"--kernels {what}; give a comma-separated subset of {','.join(KERNELS)}.")
        if not self.batches or min(self.batches) < 1:
            raise SettingsError("--batch is a comma-separated list of whole numbers, at least 1; give such as 1,8.")
        if self.heads % self.kv_heads:
            raise SettingsError(f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}; change one.")
        if self.keys is not None and self.keep is not None and self.keep > self.keys:
            raise SettingsError(f"--keep {self.keep} is more than --keys {self.keys}; keep fewer.")

    def on(self, device_type: str) -> Self:
        """Return the settings with the sizes of a device in place of those left out."""
        keys = self.keys or max(GPU_KEYS if device_type == "cuda" else SMALL_KEYS, self.keep or 0)
        rows = self.rows or (GPU_ROWS if device_type == "cuda" else SMALL_ROWS)
        hidden = self.hidden or (GPU_HIDDEN if device_type == "cuda" else SMALL_HIDDEN)
        return replace(self, keys=keys, keep=self.keep or max(1, round(KEPT_AT_50X * keys)), rows=rows, hidden=hidden)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {**asdict(self), "kernels": list(self.kernels), "batches": list(self.batches)}


def parse_batches(words: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of a list; what is no number becomes 0, which `KernelSettings` refuses."""
    return tuple(int(word) if word.isascii() and word.isdigit() else 0 for word in words)


@dataclass(frozen=True)
class ModelSettings:
    """What the benchmarks of whole models share. Raises SettingsError when a value is out of range."""

    shape: str | None = None
    tokens: int | None = None  # of the document
    keep: float = KEPT_AT_50X  # fraction of the document's keys
    repeats: int = 3
    seed: int = 0

    gpu_tokens: ClassVar[int] = GPU_KEYS

    def __post_init__(self) -> None:
        if self.shape is not None and self.shape not in SHAPES:
            raise SettingsError(f"--shape is {self.shape!r}; choose from {', '.join(SHAPES)}.")
        check_least(self, {"tokens": 64, "repeats": 1})
        if not 0.0 < self.keep < 1.0:
            raise SettingsError(f"--keep is {self.keep:g}; give a fraction above 0 and below 1.")
        check_seed(self.seed)

    def on(self, device_type: str) -> Self:
        """Return the settings with shape and size of a device in place of those left out."""
        shape = self.shape or (GPU_SHAPE if device_type == "cuda" else SMALL_SHAPE)
        return replace(self, shape=shape, tokens=self.tokens or self.usual_tokens(shape))

    def usual_tokens(self, shape: str) -> int:
        """Return the length of a document when none is given."""
        return SMALL_TOKENS if shape == SMALL_SHAPE else self.gpu_tokens

    @property
    def mean_kept(self) -> int:
        """Document keys that a head keeps on average."""
        return max(1, round(self.keep * (self.tokens or 0)))

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class CompactBenchSettings(ModelSettings):
    """Settings of ``compactor bench compact``. Raises SettingsError when a value is out of range."""

    method: str = "balanced"
    certify: bool = False
    workspace: int | None = None  # bytes

    gpu_tokens: ClassVar[int] = 32_768

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in OUR_METHODS:
            raise SettingsError(f"--method is {self.method!r}; choose from {', '.join(OUR_METHODS)}.")


@dataclass(frozen=True)
class DecodeBenchSettings(ModelSettings):
    """Settings of ``compactor bench decode``. Raises SettingsError when a value is out of range."""

    spread: float = 20.0  # the longest head's keys over the shortest one's
    batch: int = 32  # questions about one document, beside one alone
    question: int = 32  # tokens of each question
    new_tokens: int = 128  # of each answer

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"spread": 1, "batch": 1, "question": 1, "new_tokens": LEAST_NEW_TOKENS})

    @property
    def batches(self) -> list[int]:
        """Batch sizes that are measured."""
        return sorted({1, self.batch})


@dataclass(frozen=True)
class LoadSettings(ModelSettings):
    """Settings of ``compactor bench load``. Raises SettingsError when a value is out of range."""

    model: str | None = None  # a real one instead of a shape
    spread: float = 20.0  # the longest head's keys over the shortest one's
    folder: str | None = None  # where the file lies while it is measured; None is the system's temporary folder

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"spread": 1})
        if self.model is not None and self.shape is not None:
            raise SettingsError("--shape makes a model with random weights, --model loads one; give only one of them.")

    def on(self, device_type: str) -> Self:
        """Return the settings with shape and size of a device in place of those left out; a real model is its shape."""
        if self.model is None:
            return super().on(device_type)
        return replace(self, tokens=self.tokens or SMALL_TOKENS)
