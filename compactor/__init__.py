"""Turns a long document into a small, portable KV cache that the same model answers from.

    cache = compactor.compact(Path("lease.txt"), "HuggingFaceTB/SmolLM2-135M-Instruct", keep_ratio=0.1)
    cache.save("lease.kv")
    past_key_values = compactor.load("lease.kv").attach(model)

Importing this package imports neither torch nor transformers; the first call does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compactor.attach import CompactedCache
    from compactor.config import CompactSettings
    from compactor.document import Document
    from compactor.model import LoadedModel
    from compactor.types import Reporter

__all__ = ["__version__", "compact", "load"]
__version__ = "0.1.0"


def compact(
    document: Document | Path | str,
    model: LoadedModel | PreTrainedModel | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    settings: CompactSettings | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> CompactedCache:
    """Compact a document for a model; the result attaches to that model, or saves to a file.

    ``document`` is a path (``pathlib.Path``), the text itself (``str``), or a ``Document``. ``model`` is what
    ``--model`` takes (None is the embedded default), a ``LoadedModel``, or a transformers model together with
    its ``tokenizer``. ``options`` are the fields of ``CompactSettings`` (``keep_ratio=0.05``, ``seed=1``),
    where ``settings`` is not given.

    Raises SettingsError, DocumentError, ModelError, MemoryShortError, or FidelityError where the certificate shows more
    than ``require_kl``.
    """
    from compactor import pipeline
    from compactor.config import CompactSettings
    from compactor.document import make_document, read_document
    from compactor.errors import SettingsError
    from compactor.types import SilentReporter

    if settings is not None and options:
        raise SettingsError(f"Give either settings or {', '.join(options)}, not both.")
    try:
        settings = settings or CompactSettings(**options)
    except TypeError as error:
        raise SettingsError(f"compact() does not take {', '.join(options)}: {error}.") from error
    if isinstance(document, Path):
        document = read_document(str(document))
    elif isinstance(document, str):
        document = make_document("text", document)
    reporter = reporter or SilentReporter()
    return pipeline.compact(document, _loaded(model, tokenizer, reporter), settings, reporter)


def load(path: Path | str) -> CompactedCache:
    """Read a compacted cache, every checksum verified. Raises CacheFileError on a damaged or foreign file."""
    from compactor import attach

    return attach.load(path)


def _loaded(
    model: LoadedModel | PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reporter: Reporter,
) -> LoadedModel:
    from compactor.errors import SettingsError
    from compactor.model import LoadedModel, load_model, wrap_model

    if isinstance(model, LoadedModel):
        return model
    if model is None or isinstance(model, str):
        return load_model(model, reporter=reporter)
    if tokenizer is None:
        raise SettingsError("A model in memory needs its tokenizer: compact(document, model, tokenizer).")
    return wrap_model(model, tokenizer, name=model.name_or_path or "a model in memory")
