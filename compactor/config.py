"""Knows the settings of a run, their defaults and their limits. Knows no torch, no files, no steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compactor.errors import SettingsError

DEFAULT_KEEP_RATIO = 0.1
QUERY_SOURCES = ("context", "repeat", "self-study")
OUR_METHODS = ("fast", "balanced", "best")
BASELINES = (
    "attention-matching-rms",
    "attention-matching-omp",
    "kvzip",
    "snapkv",
    "h2o",
    "streaming",
    "truncation",
    "summary",
    "summary-compacted",
    "random",
)
METHODS = (*OUR_METHODS, *BASELINES)
SUMMARISING = ("summary", "summary-compacted")  # of a summary that is shorter than its size everything is kept
CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32")

# Of what not every method uses, what each does use: sources of reference queries, and settings. Methods that are not in
# a table use none of it: they ask nothing, or ask in a way of their own.
METHOD_QUERIES = {
    "fast": ("context",),
    "balanced": QUERY_SOURCES,
    "best": QUERY_SOURCES,
    "summary-compacted": QUERY_SOURCES,  # asked about the summary
    "attention-matching-rms": ("repeat", "self-study"),
    "attention-matching-omp": ("repeat", "self-study"),
}
_ASKING = ("chunk", "self_study_tokens")
_SOLVING = ("refine_steps", "ridge", "min_log_bias", "max_log_bias")
_SIZING = ("max_error", "budget", "keep_curves")
_FITTING = (*_SIZING, *_SOLVING)
METHOD_SETTINGS = {
    "fast": _SIZING,
    "balanced": (*_ASKING, *_FITTING),
    "best": (*_ASKING, *_FITTING),
    "summary-compacted": (*_ASKING, *_SOLVING),
    "attention-matching-rms": _ASKING,
    "attention-matching-omp": _ASKING,
}


@dataclass(frozen=True)
class CompactSettings:
    """Settings of one compaction. Exactly one of ``keep_ratio``, ``target_tokens``, ``max_bytes``, ``max_error`` holds.

    Raises SettingsError on construction when a value is out of range, when two size targets are given, or when one that
    the method does not use differs from its default.
    """

    keep_ratio: float | None = None  # fraction of document keys kept, over all compacted heads
    target_tokens: int | None = None  # average number of document keys kept per head
    max_bytes: int | None = None  # bytes of all tensors in the file: prefix and sliding layers included
    max_error: float | None = None  # relative reconstruction error of the fit, at most (docs/algorithm.md)
    method: str = "balanced"
    queries: tuple[str, ...] = ()  # empty: those of the method
    self_study_tokens: int | None = (
        None  # answer tokens over all self-study prompts; None follows the document's length
    )
    chunk: int = 1024  # document tokens per piece of the repeat pass
    prefill_chunk: int = 2048  # tokens per forward call of the prefill
    reserve: int = 512  # tokens of the model's window left free for a question and its answer
    refine_steps: int | None = None  # of kept keys, biases and values together; None: what the method takes
    ridge: float | None = None  # weight of the pull towards the original values; None chooses on held-out rows
    min_log_bias: float = -3.0
    max_log_bias: float = 7.0
    cache_dtype: str = "auto"  # storage type of keys and values; auto is the model's, bfloat16 for a float32 model
    system: str | None = None
    thinking: bool = False
    seed: int = 0
    budget: str | None = None  # file with a profile of `compactor budget`; None ranks this document's own keys
    keep_curves: bool = False  # keep what `compactor recompact` needs beside the cache
    certify: bool = True  # measure the distance to the full cache on held-out self-study
    require_kl: float | None = None  # nats per token that the certificate may show at most
    grow: bool = False  # raise the budget until ``require_kl`` holds

    def __post_init__(self) -> None:
        targets = [t for t in (self.keep_ratio, self.target_tokens, self.max_bytes, self.max_error) if t is not None]
        if len(targets) > 1:
            raise SettingsError("Give only one of --keep-ratio, --target-tokens, --max-bytes and --max-error.")
        if not targets:
            object.__setattr__(self, "keep_ratio", DEFAULT_KEEP_RATIO)
        if self.keep_ratio is not None and not 0.0 < self.keep_ratio <= 1.0:
            raise SettingsError(f"--keep-ratio is {self.keep_ratio:g}; give a fraction above 0 and at most 1.")
        if self.max_error is not None and not 0.0 < self.max_error < float("inf"):
            raise SettingsError(f"--max-error is {self.max_error:g}; give a positive number.")
        if self.method not in METHODS:
            raise SettingsError(f"--method is {self.method!r}; choose from {', '.join(METHODS)}.")
        chosen = [name for name in (*_ASKING, *_FITTING) if getattr(self, name) != getattr(CompactSettings, name)]
        check_used([self.method], _query_sources(self.queries), chosen)
        if self.keep_curves and self.keep_ratio == 1.0:
            raise SettingsError("--keep-curves with --keep-ratio 1 has nothing to learn; give a smaller ratio.")
        if self.require_kl is not None and not 0.0 < self.require_kl < float("inf"):
            raise SettingsError(f"--require-kl is {self.require_kl:g}; give a positive number of nats per token.")
        if self.require_kl is not None and not self.certify:
            raise SettingsError("--require-kl needs the certificate; leave out --no-certify.")
        if self.grow and self.require_kl is None:
            raise SettingsError("--grow raises the budget until --require-kl holds; give --require-kl too.")
        if self.grow and self.max_bytes is not None:
            raise SettingsError("--max-bytes bounds the size; leave out --grow, or give --keep-ratio instead.")
        if self.grow and self.max_error is not None:
            raise SettingsError("--max-error finds the size itself; leave out --grow, or give --keep-ratio instead.")
        object.__setattr__(self, "queries", _query_sources(self.queries) or METHOD_QUERIES.get(self.method, ()))
        for name, low in (("target_tokens", 1), ("max_bytes", 1), ("self_study_tokens", 1), ("refine_steps", 0),
                          ("chunk", 16), ("prefill_chunk", 16), ("reserve", 64)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < low:
                raise SettingsError(f"--{name.replace('_', '-')} is {value}; the least is {low}.")
        if self.ridge is not None and not 0.0 <= self.ridge < float("inf"):
            raise SettingsError(f"--ridge is {self.ridge:g}; give a finite number that is not negative.")
        if not self.min_log_bias < 0.0 < self.max_log_bias <= 20.0:
            raise SettingsError("The bias box must contain 0 and its upper end must be at most 20.")
        if not is_text(self.system or ""):
            raise SettingsError("--system is not UTF-8; convert it, or check the locale of the terminal.")
        if self.cache_dtype not in CACHE_DTYPES:
            raise SettingsError(f"--cache-dtype is {self.cache_dtype!r}; choose from {', '.join(CACHE_DTYPES)}.")
        if not 0 <= self.seed < 2**63:
            raise SettingsError(f"--seed is {self.seed}; give a whole number from 0 to 2**63 - 1.")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, for the file header and the batch manifest."""
        budget = None if self.budget is None else self.budget.replace("\\", "/").rpartition("/")[2]  # no folders
        return {**asdict(self), "queries": list(self.queries), "budget": budget}


def is_text(text: str) -> bool:
    """Return whether a text can be written as UTF-8; bytes of the command line that are no text cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_used(methods: Sequence[str], queries: Iterable[str], settings: Iterable[str]) -> None:
    """Raise SettingsError where none of the methods uses a source of ``queries`` or a field of ``settings``."""
    users = {f"--queries {source}": _who_uses(source, METHOD_QUERIES) for source in queries}
    users |= {f"--{name.replace('_', '-')}": _who_uses(name, METHOD_SETTINGS) for name in settings}
    unused = [option for option, own in users.items() if not own & set(methods)]
    if unused:
        who = f"--method {methods[0]} does not use" if len(methods) == 1 else f"None of {', '.join(methods)} uses"
        able = [method for method in METHODS if all(method in users[option] for option in unused)]
        what = f"{', '.join(unused)}; leave {'it' if len(unused) == 1 else 'them'} out"
        raise SettingsError(f"{who} {what}, or take one of {', '.join(able)}.")


def _who_uses(name: str, table: Mapping[str, Sequence[str]]) -> set[str]:
    return {method for method, used in table.items() if name in used}


def _query_sources(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in QUERY_SOURCES]
    if unknown:
        what = f"does not know {', '.join(map(repr, unknown))}"
        raise SettingsError(f"--queries {what}; give a comma-separated subset of {','.join(QUERY_SOURCES)}.")
    return tuple(name for name in QUERY_SOURCES if name in names)


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of answering. Temperature 0 is greedy. Raises SettingsError when a value is out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingsError(f"--max-new-tokens is {self.max_new_tokens}; the least is 1.")
        if not 0.0 <= self.temperature <= 100.0:
            raise SettingsError(f"--temperature is {self.temperature:g}; give 0 (greedy) to 100.")
        if not 0.0 < self.top_p <= 1.0:
            raise SettingsError(f"--top-p is {self.top_p:g}; give a fraction above 0 and at most 1.")
        if not 0 <= self.seed < 2**63:
            raise SettingsError(f"--seed is {self.seed}; give a whole number from 0 to 2**63 - 1.")
