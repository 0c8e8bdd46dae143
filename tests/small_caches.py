"""Builds small compacted caches without a model, and takes files apart as docs/file-format.md says.

``python tests/small_caches.py`` prints the worked example of that page.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from compactor.types import CacheMetadata, LayerCache, ModelIdentity

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FILE_ORDER = ("biases", "positions", "offsets", "keys", "values")


def make_metadata(
    *,
    sliding_windows: Sequence[int | None] = (None, None),
    dtype: str = "bfloat16",
    prefix_length: int = 2,
    document_tokens: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 4,
) -> CacheMetadata:
    """Return metadata of an imaginary model with one layer per window and two query heads per KV head."""
    model = ModelIdentity(
        name="example/model",
        revision=None,
        family="llama",
        config_fingerprint="c" * 64,
        weights_fingerprint="w" * 64,
        tokenizer_hash="t" * 64,
        chat_template_hash="h" * 64,
        num_layers=len(sliding_windows),
        num_heads=2 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope={"rope_type": "default", "rope_theta": 10000.0},
    )
    text = "Ein Beispiel: größer als ASCII.\n"
    return CacheMetadata(
        model=model,
        dtype=dtype,
        logical_length=prefix_length + document_tokens,
        prefix_length=prefix_length,
        position_scheme="contiguous",
        sliding_windows=list(sliding_windows),
        system=None,
        thinking=False,
        document_name="example.txt",
        document_sha256=hashlib.sha256(text.encode()).hexdigest(),
        document_tokens=document_tokens,
        settings={"keep_ratio": 0.2, "queries": ["context", "repeat"]},
        seed=0,
        tool_version="0.1.0",
        report={"reconstruction_error": 0.125, "seconds": {"prefill": 0.5, "fit": 1.25}},
    )


def make_layer(
    metadata: CacheMetadata,
    positions_per_head: Sequence[Sequence[int]],
    *,
    sliding_window: int | None = None,
    seed: int = 0,
) -> LayerCache:
    """Return a layer of random numbers whose heads keep the given positions; biases are 0 where they must."""
    generator = torch.Generator().manual_seed(seed)
    rows = [position for head in positions_per_head for position in head]
    shape = (len(rows), metadata.model.head_dim)
    biases = torch.randn(len(rows), generator=generator)
    exact = torch.tensor([position < metadata.prefix_length for position in rows], dtype=torch.bool)
    biases[exact | (sliding_window is not None)] = 0.0
    ends = torch.tensor([0, *(len(head) for head in positions_per_head)]).cumsum(0)
    return LayerCache(
        keys=torch.randn(shape, generator=generator).to(DTYPES[metadata.dtype]),
        values=torch.randn(shape, generator=generator).to(DTYPES[metadata.dtype]),
        biases=biases,
        positions=torch.tensor(rows, dtype=torch.int32),
        offsets=ends.to(torch.int32),
        sliding_window=sliding_window,
    )


def small_cache(dtype: str = "bfloat16") -> tuple[list[LayerCache], CacheMetadata]:
    """Return three layers: ragged with a head that keeps no document key, sliding, and ragged again."""
    metadata = make_metadata(sliding_windows=(None, 4, None), dtype=dtype)
    layers = [
        make_layer(metadata, [[0, 1, 3, 6], [0, 1]], seed=1),
        make_layer(metadata, [[5, 6, 7], [5, 6, 7]], sliding_window=4, seed=2),
        make_layer(metadata, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 7]], seed=3),
    ]
    return layers, metadata


def example_cache() -> tuple[list[LayerCache], CacheMetadata]:
    """Return the cache of the worked example: one layer, two KV heads of dimension 4, whole numbers."""
    metadata = make_metadata(sliding_windows=(None,))
    layer = make_layer(metadata, [[0, 1, 3, 6], [0, 1]])
    numbers = torch.arange(24.0).reshape(6, 4)
    biases = torch.tensor([0.0, 0.0, 1.0, -0.5, 0.0, 0.0])
    layer = replace(layer, keys=numbers.bfloat16(), values=(-numbers).bfloat16(), biases=biases)
    return [layer], metadata


def assert_bit_equal(left: LayerCache, right: LayerCache) -> None:
    """Fail unless two layers have the same types, shapes and bits."""
    assert left.sliding_window == right.sliding_window
    for name, tensor in left.tensors().items():
        other = right.tensors()[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


# ------------------------------------------------------------------ the file, apart from compactor's own code


def take_apart(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return the header, the document in it, and the bytes after the header; nothing is checked."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["compactor"]), raw[8 + length :]


def put_together(path: Path, header: dict[str, Any], document: dict[str, Any], data: bytes) -> None:
    """Write a file whose header has the right hash, whatever nonsense it says otherwise."""
    header["__metadata__"] = {"compactor": json.dumps(document), "header_xxh3_128": "0" * 32}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = struct.pack("<Q", len(text)) + text
    path.write_bytes(raw.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(raw).encode()) + data)


def mend_checksums(header: dict[str, Any], document: dict[str, Any], data: bytes) -> None:
    """Make the checksums those of ``data``."""
    for name, checksums in document["checksums"].items():
        begin, end = header[name]["data_offsets"]
        checksums["xxh3_64"] = xxhash.xxh3_64_hexdigest(data[begin:end])
        checksums["sha256"] = hashlib.sha256(data[begin:end]).hexdigest()


# --------------------------------------------------------------------------------------- the worked example


def example_blocks(path: Path) -> list[str]:
    """Return the blocks of docs/file-format.md that show the file: JSON of header and document, hex dumps."""
    header, document, data = take_apart(path)
    header_bytes = path.stat().st_size - len(data)
    header["__metadata__"]["compactor"] = "..."
    raw = path.read_bytes()
    return [
        show_json(header),
        show_json(document),
        hex_dump(raw, 0, 48),
        hex_dump(raw, header_bytes, len(raw)),
    ]


def show_json(value: Any, indent: str = "") -> str:
    """Return JSON with whatever fits into a line on one line."""
    line = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if not isinstance(value, dict) or len(indent + line) <= 96:
        return line
    deeper = indent + "  "
    items = [f"{deeper}{json.dumps(name)}: {show_json(value[name], deeper)}" for name in sorted(value)]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def hex_dump(raw: bytes, begin: int, end: int) -> str:
    """Return 16 bytes a line: offset, hexadecimal digits, ASCII."""
    lines = []
    for start in range(begin, end, 16):
        row = raw[start : min(start + 16, end)]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:08x}  {row.hex(' '):<47}  |{letters}|")
    return "\n".join(lines)


if __name__ == "__main__":
    import tempfile

    from compactor.cache_file import save_cache

    with tempfile.TemporaryDirectory() as folder:
        save_cache(Path(folder) / "example.kv", *example_cache())
        print("\n\n".join(example_blocks(Path(folder) / "example.kv")))
