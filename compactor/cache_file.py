"""Knows the bytes of a compacted cache file (docs/file-format.md). Knows no model, no terminal.

The file is a safetensors file. Its header holds one JSON document about the cache, a hash of itself, and two
checksums of every tensor. Reading the header needs no torch. Loading maps the file: 671 MB of tensors took
1 ms to map (safetensors' own ``safe_open`` 4 ms, reading 90 to 660 ms) and 47 ms to check.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from io import BufferedReader
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

import xxhash

from compactor.errors import CacheFileError, OutputError
from compactor.output import AnyPath, check_output, write_atomically
from compactor.types import CacheMetadata, LayerCache

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMAT_VERSION",
    "FileSizes",
    "TensorEntry",
    "TensorTable",
    "check_output",
    "count_full_cache_bytes",
    "load_cache",
    "read_metadata",
    "save_cache",
    "verify_cache",
]

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 100_000_000  # the limit of every safetensors reader
DOCUMENT_KEY = "compactor"
HASH_KEY = "header_xxh3_128"
STORAGE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}
_TENSOR_NAMES = ("keys", "values", "biases", "positions", "offsets")
_NO_HASH = "0" * 32

Record = TypeVar("Record")


class FileSizes(NamedTuple):
    """Sizes of a written file; their sum is the size of the file."""

    header_bytes: int
    tensor_bytes: int


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of one tensor; ``begin`` and ``end`` count bytes from the end of the header."""

    dtype: str  # as safetensors writes it: BF16, F16, F32 or I32
    shape: tuple[int, ...]
    begin: int
    end: int
    xxh3_64: str
    sha256: str


@dataclass(frozen=True)
class TensorTable:
    """The header's list of tensors, and what follows from it without reading any of them."""

    entries: dict[str, TensorEntry]  # in the order of the file
    head_lengths: list[list[int]]  # per layer and KV head: kept keys, prefix included
    sizes: FileSizes


class _Invalid(ValueError):
    """A rule of docs/file-format.md is broken; the text follows "is damaged:"."""


class _Foreign(ValueError):
    """The file is of another kind; the text follows "is not a compacted cache:"."""


class _OtherVersion(_Invalid):
    """The file asks for what this release does not know; the text follows the file's name."""


# ---------------------------------------------------------------------------------------------------- sizes


def count_full_cache_bytes(metadata: CacheMetadata) -> int:
    """Return the bytes of the keys and values of the uncompacted cache, stored in the same type.

    A layer with a sliding window of w tokens needs the last w - 1 of them.
    """
    model = metadata.model
    length = metadata.prefix_length + metadata.document_tokens
    rows = sum(length if window is None else min(length, window - 1) for window in metadata.sliding_windows)
    return rows * model.num_kv_heads * 2 * model.head_dim * _ITEM_BYTES[STORAGE_DTYPES[metadata.dtype]]


# -------------------------------------------------------------------------------------------------- writing


def save_cache(
    path: AnyPath, layers: Sequence[LayerCache], metadata: CacheMetadata, *, force: bool = False
) -> FileSizes:
    """Write a compacted cache atomically, readable by its owner only, and return its sizes.

    Equal layers and metadata give equal bytes. The tensors may lie on any device. An existing file is
    replaced only with ``force``, and only when the new one is complete. Raises OutputError when the file
    cannot be written, or when the cache breaks a rule for which ``load_cache`` would refuse it.
    """
    check_output(path, force)
    buffers = {
        f"layers.{index}.{name}": tensor.detach().cpu().contiguous()
        for index, layer in enumerate(layers)
        for name, tensor in layer.tensors().items()
    }
    try:
        _check_layers(layers, metadata)
        pieces = {name: _tensor_bytes(tensor) for name, tensor in buffers.items()}
        # Widest items first, so that each tensor begins at a multiple of its items without a gap.
        names = sorted(pieces, key=lambda name: (-buffers[name].element_size(), _file_order(name)))
        entries = _lay_out(names, buffers, pieces)
        head_lengths = [layer.head_lengths for layer in layers]
        header = _header_bytes(metadata, head_lengths, entries)
        tensor_bytes = sum(piece.nbytes for piece in pieces.values())
        _check_structure(metadata, head_lengths, entries, tensor_bytes)
        for index, lengths in enumerate(head_lengths):
            _check_rows(index, lengths, metadata, lambda name: pieces[name])
    except _Invalid as error:
        raise OutputError(f"{path} was not written, for the compacted cache is faulty: {error}.") from error
    write_atomically(path, [memoryview(header), *(pieces[name] for name in names)], force=force)
    return FileSizes(len(header), tensor_bytes)


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without copying them."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _file_order(name: str) -> tuple[int, int]:
    """Sort ``layers.10.keys`` after ``layers.9.values``."""
    _, index, kind = name.split(".")
    return int(index), _TENSOR_NAMES.index(kind)


def _lay_out(
    names: Sequence[str], tensors: dict[str, torch.Tensor], pieces: dict[str, memoryview]
) -> dict[str, TensorEntry]:
    """Place the tensors, in the order of ``names``, one after another, and take their checksums."""
    import torch

    safetensors_names = {
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float32: "F32",
        torch.int32: "I32",
    }
    entries, begin = {}, 0
    for name in names:
        tensor, piece = tensors[name], pieces[name]
        entries[name] = TensorEntry(
            dtype=safetensors_names.get(tensor.dtype, str(tensor.dtype)),
            shape=tuple(tensor.shape),
            begin=begin,
            end=begin + piece.nbytes,
            xxh3_64=xxhash.xxh3_64_hexdigest(piece),
            sha256=hashlib.sha256(piece).hexdigest(),
        )
        begin += piece.nbytes
    return entries


def _header_bytes(metadata: CacheMetadata, head_lengths: list[list[int]], entries: dict[str, TensorEntry]) -> bytes:
    """Return length and JSON of the header, padded to a multiple of 8 bytes, its own hash filled in."""
    document = {
        "format_version": FORMAT_VERSION,
        **asdict(metadata),
        "head_lengths": head_lengths,
        "checksums": {name: {"xxh3_64": entry.xxh3_64, "sha256": entry.sha256} for name, entry in entries.items()},
    }
    header: dict[str, Any] = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
        for name, entry in entries.items()
    }
    header["__metadata__"] = {DOCUMENT_KEY: _to_json(document), HASH_KEY: _NO_HASH}
    text = _to_json(header).encode("utf-8", errors="replace")  # half a UTF-16 pair becomes a question mark
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise _Invalid(f"its header has {len(text):,} bytes and the format allows {MAX_HEADER_BYTES:,}")
    blank = struct.pack("<Q", len(text)) + text
    return blank.replace(_hash_field(_NO_HASH), _hash_field(xxhash.xxh3_128_hexdigest(blank)))


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise _Invalid(f"its metadata is not JSON ({error})") from error


def _hash_field(digits: str) -> bytes:
    """Return the bytes of the hash in the header; inside a JSON string the quotes would be escaped."""
    return f'"{HASH_KEY}":"{digits}"'.encode()


def _check_layers(layers: Sequence[LayerCache], metadata: CacheMetadata) -> None:
    """Refuse what the file cannot say, or must not: a window that differs, numbers that are not finite."""
    import torch

    windows = [layer.sliding_window for layer in layers]
    if windows != metadata.sliding_windows:
        raise _Invalid(f"its layers have sliding windows {windows}, its metadata {metadata.sliding_windows}")
    for index, layer in enumerate(layers):
        for name in ("keys", "values"):
            if not torch.isfinite(getattr(layer, name)).all():
                raise _Invalid(
                    f"the {name} of layer {index} hold numbers that are not finite in {metadata.dtype}"
                    " (a wider --cache-dtype may help)"
                )


# -------------------------------------------------------------------------------------------------- reading


def read_metadata(path: AnyPath) -> tuple[CacheMetadata, TensorTable]:
    """Read and check the header alone, without torch. Raises CacheFileError."""
    with _CacheReader(path) as reader:
        return reader.metadata, reader.table


def load_cache(path: AnyPath, *, device: str | torch.device = "cpu") -> tuple[list[LayerCache], CacheMetadata]:
    """Load a compacted cache after checking its header, every checksum, and every offset and position.

    On the CPU the tensors are views of the mapped file: writing to them does not change it, and while they
    live nobody may rewrite it in place (``save_cache`` renames a new file over it, which is safe). Raises
    CacheFileError for a file that is no compacted cache, is damaged or cut off, or has another version.
    """
    import torch

    with _CacheReader(path) as reader:
        reader.map_and_check()
        target = torch.device(device)
        data = reader.data().to(target)  # one copy is faster than one for each tensor
        return [reader.layer(index, data) for index in range(reader.metadata.model.num_layers)], reader.metadata


def verify_cache(path: AnyPath) -> tuple[CacheMetadata, TensorTable]:
    """Check everything that ``load_cache`` checks and the SHA-256 of every tensor, without torch.

    Returns what ``read_metadata`` returns. Raises CacheFileError that names the first tensor that is damaged.
    """
    with _CacheReader(path) as reader:
        reader.map_and_check()
        for name, entry in reader.table.entries.items():
            if hashlib.sha256(reader.bytes_of(name)).hexdigest() != entry.sha256:
                raise reader.damaged(f"the SHA-256 of {name} differs from the one in its header")
        return reader.metadata, reader.table


class _CacheReader:
    """An open file whose header has passed every check that needs no tensor."""

    def __init__(self, path: AnyPath) -> None:
        self.path = os.fspath(path)
        self.file = _open_regular_file(self.path)
        try:
            self._read_header()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> _CacheReader:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.file.close()  # the map stays for as long as a tensor uses it

    def damaged(self, what: object) -> CacheFileError:
        """Return the error that says what is wrong with the file."""
        return CacheFileError(f"{self.path} is damaged: {what}; make it again or fetch it again.")

    def _read_header(self) -> None:
        file_bytes = os.fstat(self.file.fileno()).st_size
        try:
            raw = _read_raw_header(self.file, file_bytes)
            document, header = _read_document(raw)
            metadata = _record(CacheMetadata, document, "its metadata")
            head_lengths = _head_lengths(document)
            entries = _entries(header, document)
            _check_structure(metadata, head_lengths, entries, file_bytes - len(raw))
        except _Foreign as error:
            raise CacheFileError(
                f"{self.path} is not a compacted cache: {error}; pass a file that `compact` wrote."
            ) from error
        except _OtherVersion as error:
            raise CacheFileError(f"{self.path} {error}.") from error
        except _Invalid as error:
            raise self.damaged(error) from error
        except OSError as error:
            raise CacheFileError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        self.data_begin = len(raw)
        self.metadata = metadata
        self.table = TensorTable(entries, head_lengths, FileSizes(len(raw), file_bytes - len(raw)))

    def map_and_check(self) -> None:
        """Map the file, then check all checksums, then all offsets, positions and biases."""
        try:
            self.map = mmap.mmap(self.file.fileno(), sum(self.table.sizes), access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CacheFileError(f"{self.path} cannot be mapped into memory: {error}.") from error
        self.mapped = memoryview(self.map)
        for name, entry in self.table.entries.items():
            if xxhash.xxh3_64_hexdigest(self.bytes_of(name)) != entry.xxh3_64:
                raise self.damaged(f"the checksum of {name} differs")
        try:
            for index, lengths in enumerate(self.table.head_lengths):
                _check_rows(index, lengths, self.metadata, self.bytes_of)
        except _Invalid as error:
            raise self.damaged(error) from error

    def bytes_of(self, name: str) -> memoryview:
        """Return the bytes of one tensor, which are not copied."""
        entry = self.table.entries[name]
        return self.mapped[self.data_begin + entry.begin : self.data_begin + entry.end]

    def data(self) -> torch.Tensor:
        """Return the bytes of all tensors, (num_bytes,) uint8, a view of the map."""
        import torch

        most = max((entry.end for entry in self.table.entries.values()), default=0)
        if not most:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self.map, dtype=torch.uint8, count=most, offset=self.data_begin)

    def layer(self, index: int, data: torch.Tensor) -> LayerCache:
        """Return one layer; its tensors are views of `data`, wherever that is."""
        tensors = {name: self._tensor(f"layers.{index}.{name}", data) for name in _TENSOR_NAMES}
        return LayerCache(**tensors, sliding_window=self.metadata.sliding_windows[index])

    def _tensor(self, name: str, data: torch.Tensor) -> torch.Tensor:
        import torch

        dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32}
        entry = self.table.entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtypes[entry.dtype], device=data.device)
        return data[entry.begin : entry.end].view(dtypes[entry.dtype]).view(entry.shape)


def _open_regular_file(path: str) -> BufferedReader:
    try:
        mode = os.stat(path).st_mode  # before it is opened: opening a pipe waits for its writer
        if stat.S_ISDIR(mode):
            raise CacheFileError(f"{path} is a folder; give the name of a compacted cache in it.")
        if not stat.S_ISREG(mode):
            raise CacheFileError(f"{path} is a device or a pipe; a compacted cache is an ordinary file.")
        return open(path, "rb")
    except FileNotFoundError:
        raise CacheFileError(f"{path} does not exist; make it with `compact`.") from None
    except OSError as error:
        raise CacheFileError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_raw_header(file: BufferedReader, file_bytes: int) -> bytes:
    """Return the header as it lies in the file, its 8 length bytes included."""
    start = file.read(9)
    if not start:
        raise _Foreign("it is empty")
    if start[8:] != b"{":
        raise _Foreign("it does not begin like a safetensors file")
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES:
        raise _Invalid(f"its header claims {length:,} bytes and the format allows {MAX_HEADER_BYTES:,}")
    if 8 + length > file_bytes:
        raise _Invalid(f"it is cut off, or its header is not {length:,} bytes long")
    if length % 8:
        raise _Invalid("the length of its header is not a multiple of 8 bytes")
    return start + file.read(length - 1)


def _from_json(raw: bytes) -> Any:
    """Return the JSON value, or None when it is not JSON, or holds NaN, infinity or half a UTF-16 pair."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return value
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_document(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the header's hash, then the format version; return the document on the cache, and the header."""
    header = _from_json(raw[8:])
    if not isinstance(header, dict):
        raise _Invalid("its header is not a JSON object")
    extra = header.get("__metadata__")
    if not isinstance(extra, dict) or not ({DOCUMENT_KEY, HASH_KEY} & extra.keys()):
        raise _Foreign("it is a safetensors file of another program")
    stored = extra.get(HASH_KEY)
    if stored is not None:
        _check_header_hash(raw, stored)
    text = extra.get(DOCUMENT_KEY)
    document = _from_json(text.encode()) if isinstance(text, str) else None
    if not isinstance(document, dict) or type(version := document.get("format_version")) is not int:
        raise _Invalid("its metadata is not a JSON object with a format version")
    if version != FORMAT_VERSION:
        raise _OtherVersion(
            f"has format version {version} and this release reads version {FORMAT_VERSION};"
            " use the release of kv-compactor that wrote it, or a newer one"
        )
    if stored is None:
        raise _Invalid("its header has no hash")
    return document, header


def _check_header_hash(raw: bytes, stored: object) -> None:
    field = _hash_field(stored) if isinstance(stored, str) and len(stored) == len(_NO_HASH) else b""
    if not field or raw.count(field) != 1:
        raise _Invalid("the hash of its header is not where it belongs")
    if xxhash.xxh3_128_hexdigest(raw.replace(field, _hash_field(_NO_HASH))) != stored:
        raise _Invalid("its header differs from the hash of it")


def _record(kind: type[Record], document: Any, where: str) -> Record:
    """Build a dataclass from a JSON object: an unknown key is skipped, a missing one is an error."""
    if not isinstance(document, dict):
        raise _Invalid(f"{where} is not a JSON object")
    hints, values = get_type_hints(kind), {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in document:
            if field.default is MISSING and field.default_factory is MISSING:
                raise _Invalid(f"{where} lacks {field.name}")
            continue
        value, hint = document[field.name], hints[field.name]
        if is_dataclass(hint):
            value = _record(cast(type, hint), value, f"{where}'s {field.name}")
        elif not _is_of(value, hint):
            raise _Invalid(f"{where} has a {field.name} of the wrong type")
        values[field.name] = value
    return kind(**values)


def _is_of(value: object, hint: Any) -> bool:
    """Say whether a JSON value fits a type hint; True is no int here."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is UnionType:
        return any(_is_of(value, part) for part in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, get_args(hint)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return type(value) in (int, float)
    return value is None if hint is NoneType else type(value) is hint


def _head_lengths(document: dict[str, Any]) -> list[list[int]]:
    lengths = document.get("head_lengths")
    if not _is_of(lengths, list[list[int]]):
        raise _Invalid("the metadata has no list of head lengths")
    return lengths  # type: ignore[return-value]


def _entries(header: dict[str, Any], document: dict[str, Any]) -> dict[str, TensorEntry]:
    """Join the header's places with the document's checksums, in the order of the file."""
    checksums = document.get("checksums")
    tensors = {name: place for name, place in header.items() if name != "__metadata__"}
    if not isinstance(checksums, dict) or checksums.keys() != tensors.keys():
        raise _Invalid("its checksums do not belong to its tensors")
    entries = [(name, _entry(name, place, checksums[name])) for name, place in tensors.items()]
    return dict(sorted(entries, key=lambda item: (item[1].begin, item[1].end, item[0])))


def _entry(name: str, place: Any, checksums: Any) -> TensorEntry:
    try:
        begin, end = place["data_offsets"]
        entry = TensorEntry(
            place["dtype"], tuple(place["shape"]), begin, end, checksums["xxh3_64"], checksums["sha256"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _Invalid(f"its header does not describe {name}") from error
    numbers = (*entry.shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _Invalid(f"the header of {name} has a size or place that is not a whole number")
    return entry


# --------------------------------------------------------------------------------------- rules of the format


def _check_structure(
    metadata: CacheMetadata,
    head_lengths: list[list[int]],
    entries: dict[str, TensorEntry],
    tensor_bytes: int,
) -> None:
    """Check all that needs no tensor: the metadata, then each tensor's type, shape and place."""
    _check_metadata(metadata, head_lengths)
    _check_shapes(metadata, head_lengths, entries)
    end = 0
    for name, entry in entries.items():
        if entry.begin != end:
            raise _Invalid(f"{name} begins at byte {entry.begin:,} of the data instead of {end:,}")
        if entry.end - entry.begin != math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]:
            raise _Invalid(f"{name} has {entry.end - entry.begin:,} bytes, which is not its shape")
        if entry.begin % _ITEM_BYTES[entry.dtype]:
            raise _Invalid(f"{name} is not aligned")
        end = entry.end
    if tensor_bytes < end:
        raise _Invalid(f"it is cut off, {end - tensor_bytes:,} bytes are missing at its end")
    if tensor_bytes > end:
        raise _Invalid(f"{tensor_bytes - end:,} bytes follow its last tensor")


def _check_metadata(metadata: CacheMetadata, head_lengths: list[list[int]]) -> None:
    model, windows = metadata.model, metadata.sliding_windows
    if metadata.dtype not in STORAGE_DTYPES:
        raise _Invalid(f"it stores keys as {metadata.dtype!r}, which is none of {', '.join(STORAGE_DTYPES)}")
    if metadata.position_scheme != "contiguous":
        raise _OtherVersion(f"has the position scheme {metadata.position_scheme!r} and this release knows 'contiguous'")
    if min(model.num_layers, model.num_kv_heads, model.head_dim) < 1:
        raise _Invalid("its model has no layers, no KV heads or no head dimension")
    if model.num_heads < 1 or model.num_heads % model.num_kv_heads:
        raise _Invalid(f"{model.num_heads} query heads do not share {model.num_kv_heads} KV heads evenly")
    if min(metadata.prefix_length, metadata.document_tokens) < 0 or metadata.logical_length >= 2**31:
        raise _Invalid("a token count is out of range")
    if not 0 <= metadata.logical_length - metadata.prefix_length <= metadata.document_tokens:
        raise _Invalid(
            f"its logical length {metadata.logical_length} is not {metadata.prefix_length} prefix"
            f" and at most {metadata.document_tokens} document tokens"
        )
    if len(windows) != model.num_layers or any(window is not None and window < 1 for window in windows):
        raise _Invalid("its sliding windows do not belong to its layers")
    if len(head_lengths) != model.num_layers:
        raise _Invalid(f"it has head lengths for {len(head_lengths)} layers and {model.num_layers} layers")
    for index, lengths in enumerate(head_lengths):
        if len(lengths) != model.num_kv_heads:
            raise _Invalid(f"layer {index} has {len(lengths)} KV heads instead of {model.num_kv_heads}")
        if not all(0 <= length <= metadata.logical_length for length in lengths):
            raise _Invalid(f"a head of layer {index} keeps less than no keys, or more than there are tokens")
        window = windows[index]
        if window is not None and set(lengths) != {min(metadata.logical_length, window - 1)}:
            raise _Invalid(f"layer {index} does not keep all that its sliding window of {window} tokens needs")


def _check_shapes(metadata: CacheMetadata, head_lengths: list[list[int]], entries: dict[str, TensorEntry]) -> None:
    storage, head_dim = STORAGE_DTYPES[metadata.dtype], metadata.model.head_dim
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for index, lengths in enumerate(head_lengths):
        rows = sum(lengths)
        expected[f"layers.{index}.keys"] = (storage, (rows, head_dim))
        expected[f"layers.{index}.values"] = (storage, (rows, head_dim))
        expected[f"layers.{index}.biases"] = ("F32", (rows,))
        expected[f"layers.{index}.positions"] = ("I32", (rows,))
        expected[f"layers.{index}.offsets"] = ("I32", (len(lengths) + 1,))
    if expected.keys() != entries.keys():
        odd = sorted(expected.keys() ^ entries.keys())[0]
        raise _Invalid(f"it lacks the tensor {odd}" if odd in expected else f"it has an unknown tensor {odd}")
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise _Invalid(f"{name} is {entry.dtype} {list(entry.shape)} instead of {dtype} {list(shape)}")


def _check_rows(index: int, lengths: list[int], metadata: CacheMetadata, bytes_of: Callable[[str], memoryview]) -> None:
    """Check the contents of one layer's offsets, positions and biases."""
    import numpy as np

    offsets = np.frombuffer(bytes_of(f"layers.{index}.offsets"), "<i4")
    positions = np.frombuffer(bytes_of(f"layers.{index}.positions"), "<i4")
    biases = np.frombuffer(bytes_of(f"layers.{index}.biases"), "<f4")
    borders = np.cumsum([0, *lengths])
    if not np.array_equal(offsets, borders):
        raise _Invalid(f"the offsets of layer {index} are not the sums of its head lengths")
    if not np.isfinite(biases).all():
        raise _Invalid(f"the biases of layer {index} hold numbers that are not finite")
    if not positions.size:
        return
    if positions.min() < 0 or positions.max() >= metadata.logical_length:
        raise _Invalid(f"a position of layer {index} is outside of the {metadata.logical_length} tokens")
    rises = np.diff(positions) > 0
    rises[borders[(borders > 0) & (borders < positions.size)] - 1] = True  # from one head to the next
    if not rises.all():
        head = int(np.searchsorted(borders, int(np.argmin(rises)) + 1, side="right")) - 1
        raise _Invalid(f"the positions of layer {index}, head {head} do not rise")
    if metadata.sliding_windows[index] is not None:
        last = np.arange(metadata.logical_length - lengths[0], metadata.logical_length)
        if biases.any() or not np.array_equal(positions, np.tile(last, len(lengths))):
            raise _Invalid(f"layer {index} has a sliding window and is not the end of the uncompacted cache")
