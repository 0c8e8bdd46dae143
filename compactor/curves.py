"""Knows the bytes of ``doc.kv.curves``, the sidecar of a compacted cache (docs/file-format.md). Knows no mathematics.

It is a safetensors file, written whole or not at all and readable by its owner only, like the cache. It names the cache
by the SHA-256 of its header, in which the checksums of all tensors are: another cache, or a later one of the same name,
is refused. The cache is written first: whatever stops a run between the two, no sidecar is taken for that of another.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as write_safetensors

from compactor.cache_file import TensorTable, read_metadata
from compactor.errors import CacheFileError, OutputError
from compactor.output import AnyPath, check_output, write_atomically
from compactor.solve.shrink import HeadCurve
from compactor.types import CacheMetadata

SUFFIX = ".curves"
FORMAT_VERSION = 1
METADATA_KEY = "compactor_curves"
SIGNATURE = f'{{"__metadata__":{{"{METADATA_KEY}":'.encode()  # how the header of every sidecar begins
DTYPES = {
    "gains": torch.float32,
    "diagonals": torch.float32,
    "chunk_lengths": torch.int32,
    "blocks": torch.float16,
}

LayerCurves = list[HeadCurve] | None  # per KV head; None is a sliding layer


@dataclass(frozen=True)
class Curves:
    """What a smaller size of a whole cache needs, without any pass."""

    layers: list[LayerCurves]
    chunk: int  # document tokens of a chunk


class _Damaged(ValueError):
    """The text follows "is damaged:"."""


_UNREADABLE = (OSError, struct.error, OverflowError, MemoryError)  # what a file without a sound length raises


def curves_path(cache_path: AnyPath) -> Path:
    """Return where the sidecar of a cache lies: beside it, with ``.curves`` after its name."""
    return Path(f"{os.fspath(cache_path)}{SUFFIX}")


# ------------------------------------------------------------------------------------------------------ writing


def save_curves(cache_path: AnyPath, curves: list[LayerCurves], *, chunk: int, force: bool = False) -> int:
    """Write the sidecar of the cache at ``cache_path``, which is there already; return its bytes.

    ``curves`` has an entry per layer of the model: one `HeadCurve` per KV head, or None for a sliding layer. Raises
    OutputError when the file cannot be written or ``curves`` does not describe that cache, CacheFileError when there is
    no cache.
    """
    path = curves_path(cache_path)
    check_output(path, force)
    metadata, table = read_metadata(cache_path)
    tensors: dict[str, torch.Tensor] = {}
    try:
        _check_curves(curves, metadata, table)
        for index, layer in enumerate(curves):
            if layer is not None:
                tensors |= {f"layers.{index}.{name}": part for name, part in _layer_tensors(layer).items()}
    except _Damaged as error:
        raise OutputError(f"{path} was not written: {error}.") from error
    document = {
        "format_version": FORMAT_VERSION,
        "cache_header_sha256": header_sha256(cache_path),
        "chunk": chunk,
        "num_layers": len(curves),
        "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
    }
    # One key only: safetensors writes several in an order that changes from run to run.
    raw = write_safetensors(tensors, {METADATA_KEY: _to_json({"document": document, "xxh3_128": _digest(document)})})
    write_atomically(path, [memoryview(raw)], force=force)
    return len(raw)


def remove_stale_curves(cache_path: AnyPath) -> None:
    """Remove the sidecar of a cache that was replaced by one without; a file that is no sidecar stays."""
    path = curves_path(cache_path)
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            beginning = file.read(min(length, len(SIGNATURE)))
        if beginning == SIGNATURE:
            path.unlink()
    except (OSError, struct.error):  # no such file, or nothing that this program wrote
        return


def has_curves(cache_path: AnyPath) -> bool:
    """Whether a sidecar of this very cache lies beside it; only headers are read."""
    try:
        document = _read_document(_length_and_header(curves_path(cache_path)))
        return bool(document["cache_header_sha256"] == header_sha256(cache_path))
    except (CacheFileError, ValueError, KeyError, TypeError, AttributeError, *_UNREADABLE):
        return False


def header_sha256(cache_path: AnyPath) -> str:
    """Return the SHA-256 of length and header of a cache, which tells it from every other. Raises CacheFileError."""
    try:
        return hashlib.sha256(_length_and_header(cache_path)).hexdigest()
    except _UNREADABLE as error:
        raise CacheFileError(f"{os.fspath(cache_path)} cannot be read; pass a file that `compact` wrote.") from error


def _length_and_header(path: AnyPath) -> bytes:
    """Return the first 8 + N bytes of a safetensors file. Raises one of `_UNREADABLE`."""
    with open(path, "rb") as file:
        first = file.read(8)
        (length,) = struct.unpack("<Q", first)
        return first + file.read(length)


def _layer_tensors(layer: list[HeadCurve]) -> dict[str, torch.Tensor]:
    """Return the tensors of one layer; of each block only what lies below its diagonal of ones."""
    num_chunks = max(len(head.blocks) for head in layer)
    lengths = [head.chunk_lengths + [0] * (num_chunks - len(head.blocks)) for head in layer]
    triangles = [block[tuple(_below_diagonal(len(block)))] for head in layer for block in head.blocks]
    return {
        "gains": torch.cat([head.gains for head in layer]),
        "diagonals": torch.cat([head.diagonals for head in layer]),
        "chunk_lengths": torch.tensor(lengths, dtype=torch.int32).view(len(layer), num_chunks),
        "blocks": torch.cat([torch.zeros(0, dtype=torch.float16), *triangles]),
    }


def _below_diagonal(size: int) -> torch.Tensor:
    """Return rows and columns of the strict lower triangle, row by row, (2, size * (size - 1) / 2) int64."""
    return torch.tril_indices(size, size, -1)


def _check_curves(curves: list[LayerCurves], metadata: CacheMetadata, table: TensorTable) -> None:
    if len(curves) != metadata.model.num_layers:
        raise _Damaged(f"it has curves of {len(curves)} layers and the cache {metadata.model.num_layers}")
    for index, (layer, lengths) in enumerate(zip(curves, table.head_lengths, strict=True)):
        if (layer is None) != (metadata.sliding_windows[index] is not None):
            raise _Damaged(f"layer {index} must have curves if and only if it has no sliding window")
        if layer is None:
            continue
        expected = [length - metadata.prefix_length for length in lengths]
        counts = [(len(head.gains), len(head.diagonals), sum(head.chunk_lengths)) for head in layer]
        if counts != [(count, count, count) for count in expected]:
            raise _Damaged(f"the curves of layer {index} are not those of the keys that the cache keeps")
        for head in layer:
            _check_numbers(index, head)


def _check_numbers(index: int, head: HeadCurve) -> None:
    finite = all(bool(torch.isfinite(part).all()) for part in (head.gains, head.diagonals, *head.blocks))
    if not finite or bool((head.diagonals < 0).any()):
        raise _Damaged(f"the curves of layer {index} hold numbers that are not finite or must not be negative")


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(document: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_to_json(document).encode())


def _checksum(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ------------------------------------------------------------------------------------------------------ reading


def load_curves(cache_path: AnyPath) -> Curves:
    """Read the sidecar of a cache, every checksum verified.

    Raises CacheFileError when there is none, when it is damaged, and when it belongs to another cache.
    """
    path = curves_path(cache_path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CacheFileError(
            f"{os.fspath(cache_path)} has no curves beside it ({path.name}); compact the document again with "
            "--keep-curves, then sizes below that one need no model."
        ) from None
    except OSError as error:
        raise CacheFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    metadata, table = read_metadata(cache_path)
    try:
        document = _read_document(raw)
        if document["cache_header_sha256"] != header_sha256(cache_path):
            raise CacheFileError(
                f"{path} does not belong to this {Path(cache_path).name}: one of them was replaced or renamed. Put the "
                "two files of one run side by side again, or compact the document again with --keep-curves."
            )
        tensors = read_safetensors(raw)
        layers = _read_layers(document, tensors)
        _check_curves(layers, metadata, table)
    except _Damaged as error:
        raise CacheFileError(f"{path} is damaged: {error}; fetch it again or make it again.") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CacheFileError(f"{path} is damaged ({type(error).__name__}); fetch it again or make it again.") from error
    return Curves(layers, document["chunk"])


def _read_document(raw: bytes) -> dict[str, Any]:
    """Return the JSON document after its own checksum is verified; the tensors are not touched."""
    if len(raw) < 8 or struct.unpack("<Q", raw[:8])[0] > len(raw) - 8:
        raise _Damaged("it is cut off")
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    if text is None:
        raise _Damaged("it is a file of another kind")
    outer = json.loads(text)
    document = outer["document"]
    if _digest(document) != outer["xxh3_128"]:
        raise _Damaged("its header differs from its checksum")
    if document["format_version"] != FORMAT_VERSION:
        raise _Damaged(f"it has format version {document['format_version']} and this release reads {FORMAT_VERSION}")
    result: dict[str, Any] = document
    return result


def _read_layers(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[LayerCurves]:
    checksums = document["checksums"]
    if checksums.keys() != tensors.keys():
        raise _Damaged("its checksums do not belong to its tensors")
    for name, tensor in tensors.items():
        if tensor.dtype != DTYPES[name.rpartition(".")[2]]:
            raise _Damaged(f"{name} is {tensor.dtype}")
        if _checksum(tensor) != checksums[name]:
            raise _Damaged(f"the checksum of {name} differs")
    return [
        _read_layer(*(tensors[f"layers.{index}.{name}"] for name in DTYPES))
        if f"layers.{index}.gains" in tensors
        else None
        for index in range(document["num_layers"])
    ]


def _read_layer(
    gains: torch.Tensor, diagonals: torch.Tensor, chunk_lengths: torch.Tensor, triangles: torch.Tensor
) -> list[HeadCurve]:
    """Cut the tensors of a layer at heads and chunks."""
    lengths = chunk_lengths.long()
    if bool((lengths < 0).any()) or int(lengths.sum()) != len(gains):
        raise _Damaged("its chunks do not hold its keys")
    parts = iter(triangles.split((lengths * (lengths - 1) // 2).flatten().tolist()))
    ends = [0, *lengths.sum(1).cumsum(0).tolist()]
    heads = []
    for (start, stop), sizes in zip(pairwise(ends), lengths.tolist(), strict=True):
        blocks = [_square(next(parts), size) for size in sizes]
        heads.append(HeadCurve(gains[start:stop], diagonals[start:stop], blocks))
    return heads


def _square(triangle: torch.Tensor, size: int) -> torch.Tensor:
    """Return the symmetric block with a diagonal of ones."""
    block = torch.eye(size, dtype=torch.float16)
    rows, columns = _below_diagonal(size)
    block[rows, columns] = triangle
    block[columns, rows] = triangle
    return block
