"""Knows how a model is loaded, from the cheap step to the dear one. Knows no documents and no compaction.

The name is resolved, then config and tokenizer are read and checked, and only then the weights: a model that
cannot be compacted, or is not the one a cache was made with, is refused before they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactor.errors import MemoryShortError, ModelError, SettingsError
from compactor.families import (
    SUPPORTED_FAMILIES,
    check_config,
    field_of,
    head_dim,
    num_kv_heads,
    read_config,
    sliding_windows,
)
from compactor.fetch import fetch_small_files, fetch_weights, one_line, quiet_libraries
from compactor.identity import check_identity, identify, identify_config
from compactor.registry import ModelSource, resolve
from compactor.types import ModelIdentity, Reporter, SilentReporter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "SUPPORTED_FAMILIES",
    "LoadedModel",
    "check_identity",
    "identify",
    "load_model",
    "pull_model",
    "read_identity_early",
    "wrap_model",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TEXT_PART_KEYS = {r"^language_model\.model\.": "model.", r"^language_model\.lm_head\.": "lm_head."}
DTYPES = {
    "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16",
    "float32": "float32", "fp32": "float32",
}  # fmt: skip
OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class LoadedModel:
    """A model and its tokenizer, ready to compact and to answer."""

    model: PreTrainedModel  # in eval mode, on ``device``
    tokenizer: PreTrainedTokenizerBase
    name: str  # what the user would pass again: hub id, absolute folder, known name, GGUF path
    revision: str | None  # commit of a hub model
    family: str  # transformers' model_type, one of SUPPORTED_FAMILIES
    device: torch.device
    dtype: torch.dtype  # of activations
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int  # tokens the model can read at once
    sliding_windows: tuple[int | None, ...]  # per layer; None sees everything

    def identity(self) -> ModelIdentity:
        """Return what tells this model from others; computed once."""
        return self._identity

    @cached_property
    def _identity(self) -> ModelIdentity:
        return identify(self.model, self.tokenizer, self.name, self.revision)


def load_model(
    name: str | None = None,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    reporter: Reporter | None = None,
    expected: ModelIdentity | None = None,
) -> LoadedModel:
    """Find, fetch where needed, check and load a model.

    ``name`` is a known name, a folder, a GGUF file or a hub id; None is ``$COMPACTOR_MODEL``, or else the
    embedded default. ``device`` auto is CUDA, then MPS, then the CPU. ``dtype`` auto is float32 on the CPU
    and the checkpoint's own type elsewhere. ``offline`` uses only what is on this machine. ``expected`` is
    the identity that a cache was made with: any other model is refused, before its weights are read where
    config or tokenizer tell.

    Raises ModelError, SettingsError, MismatchError, or MemoryShortError when the weights do not fit.
    """
    from compactor.fused import fuse

    reporter = reporter or SilentReporter()
    source = resolve(name, revision)
    check_dtype_name(dtype)
    place = pick_device(device)
    folder, commit, config, tokenizer = _read_small_files(source, offline, reporter)
    if expected is not None:
        check_identity(expected, identify_config(config, tokenizer, source.name, commit))
    fetch_weights(source, folder, offline=offline, reporter=reporter)
    with reporter.phase("load model"):
        model = _load_weights(folder, config, place, dtype, source)
        fuse(model)
    loaded = wrap_model(model, tokenizer, name=source.name, revision=commit)
    if expected is not None:
        check_identity(expected, loaded.identity())
    return loaded


def wrap_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    revision: str | None = None,
) -> LoadedModel:
    """Check a model that is in memory already; return it with what the other steps need to know of it.

    The model is put in eval mode. Raises ModelError when it is of a kind that cannot be compacted.
    """
    config = check_config(model.config, name)
    if config is not model.config:
        raise ModelError(
            f"{name} is a model of pictures and text ({model.config.model_type}); compactor.model.load_model "
            "loads the text part of it."
        )
    model.eval()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        family=config.model_type,
        device=model.device,
        dtype=model.dtype,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=head_dim(config),
        window=config.max_position_embeddings,
        sliding_windows=sliding_windows(config),
    )


def pull_model(
    name: str | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Fetch all files of a model and return their folder; config and tokenizer are checked.

    Raises ModelError, or SettingsError for a revision of something that is not on the hub.
    """
    reporter = reporter or SilentReporter()
    source = resolve(name, revision)
    folder, *_ = _read_small_files(source, offline, reporter)
    fetch_weights(source, folder, offline=offline, reporter=reporter)
    return folder


def read_identity_early(
    name: str | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
    reporter: Reporter | None = None,
) -> ModelIdentity:
    """Return the identity of a model without its weights: their fingerprint is "" and compares as equal.

    Reads config and tokenizer only (a GGUF file that is new to this machine is converted). Raises ModelError.
    """
    source = resolve(name, revision)
    _, commit, config, tokenizer = _read_small_files(source, offline, reporter or SilentReporter())
    return identify_config(config, tokenizer, source.name, commit)


def _read_small_files(
    source: ModelSource, offline: bool, reporter: Reporter
) -> tuple[Path, str | None, PreTrainedConfig, PreTrainedTokenizerBase]:
    approve = partial(check_config, name=source.name)
    folder, commit = fetch_small_files(source, offline=offline, reporter=reporter, approve=approve)
    return folder, commit, read_config(folder, source.name), load_tokenizer(folder, source.name)


def pick_device(device: str) -> torch.device:
    """Return the device that a name means; auto is CUDA, then MPS, then the CPU. Raises SettingsError."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps: bool = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if gpus else "mps" if has_mps else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda", "mps"):
        raise SettingsError(f"--device is {device!r}; give auto, cpu, cuda, cuda:1 or mps.")
    if place.type == "cuda" and (place.index or 0) >= gpus:
        raise SettingsError(f"--device is {device!r}, but PyTorch sees {gpus} CUDA GPUs; try --device auto.")
    if place.type == "mps" and not has_mps:
        raise SettingsError("--device is 'mps', but PyTorch sees no Apple GPU; try --device auto.")
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else place


def check_dtype_name(dtype: str) -> None:
    """Raise SettingsError unless ``dtype`` is auto or the name of a type that models run in."""
    if dtype != "auto" and dtype not in DTYPES:
        raise SettingsError(f"--dtype is {dtype!r}; give auto, bfloat16, float16 or float32.")


def load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder. Raises ModelError when there is none or it is damaged."""
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(f"{name} has no tokenizer ({TOKENIZER_FILES[0]}); copy it into the model's folder.")
    try:
        with quiet_libraries():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each tokenizer class fails in its own way
        raise ModelError(f"The tokenizer of {name} cannot be loaded: {one_line(error)}.") from error
    return tokenizer


def _load_weights(
    folder: Path, config: PreTrainedConfig, device: torch.device, dtype: str, source: ModelSource
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    quantised = field_of(config, "quantization_config") is not None
    if quantised and dtype != "auto":
        raise SettingsError(f"{source.name} holds quantised weights, which keep their own type; omit --dtype.")
    options: dict[str, Any] = {
        "config": config,
        "dtype": "auto" if quantised else _dtype_to_load(config, device, dtype),
        "key_mapping": TEXT_PART_KEYS if config.model_type == "gemma3_text" else None,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if device.type != "cpu" and find_spec("accelerate") is not None:
        options["device_map"] = {"": device}
    with _loading_failures(source, device), quiet_libraries():
        answer: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        model: PreTrainedModel = answer[0]
        if not quantised and model.device != device:
            model.to(device)  # type: ignore[arg-type]
    missing = sorted(answer[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"The weights of {source.name} are not complete: {len(missing)} tensors are missing, such as "
            f"{missing[0]}; fetch them again."
        )
    return model


def _dtype_to_load(config: PreTrainedConfig, device: torch.device, dtype: str) -> torch.dtype:
    import torch

    if dtype != "auto":
        named: torch.dtype = getattr(torch, DTYPES[dtype])
        return named
    if device.type == "cpu":
        return torch.float32
    stored = field_of(config, "dtype")
    return stored if isinstance(stored, torch.dtype) and stored.is_floating_point else torch.bfloat16


@contextmanager
def _loading_failures(source: ModelSource, device: torch.device) -> Iterator[None]:
    """Turn what loading weights raises into one sentence."""
    try:
        yield
    except Exception as error:  # each loader of weights fails in its own way
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY_WORDS):
            raise MemoryShortError(_does_not_fit(source, device)) from error
        if isinstance(error, ImportError):
            raise ModelError(
                f"{source.name} needs a package that is missing ({one_line(error)}); install it, or choose "
                "another model."
            ) from error
        raise ModelError(
            f"The weights of {source.name} cannot be loaded: they are damaged, or do not fit its config "
            f"({one_line(error)}); fetch them again."
        ) from error


def _does_not_fit(source: ModelSource, device: torch.device) -> str:
    where = "this machine's memory" if device.type == "cpu" else f"the memory of {device}"
    instead = "" if device.type == "cpu" else ", or --device cpu"
    return f"{source.name} does not fit into {where}; choose a smaller model, --dtype bfloat16{instead}."
