"""Claims about the file: what is saved comes back, damage is refused, a failure leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_caches import (
    FILE_ORDER,
    assert_bit_equal,
    example_blocks,
    example_cache,
    make_layer,
    make_metadata,
    mend_checksums,
    put_together,
    small_cache,
    take_apart,
)

from compactor import cache_file, output
from compactor.cache_file import (
    check_output,
    count_full_cache_bytes,
    load_cache,
    read_metadata,
    save_cache,
    verify_cache,
)
from compactor.errors import CacheFileError, CompactorError, OutputError

DOCS = Path(__file__).parents[1] / "docs" / "file-format.md"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="uses paths or limits of Linux")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a good file, alone in its folder."""
    path = tmp_path / "doc.kv"
    save_cache(path, *small_cache())
    return path


def refusal(act: Callable[..., object], *arguments: Any, kind: type[CompactorError] = CacheFileError) -> str:
    """Return the one sentence with which ``act`` refuses."""
    with pytest.raises(kind) as caught:
        act(*arguments)
    sentence = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return sentence


# ----------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    layers, metadata = small_cache(dtype)
    save_cache(tmp_path / "doc.kv", layers, metadata)
    loaded, loaded_metadata = load_cache(tmp_path / "doc.kv")
    assert loaded_metadata == metadata
    assert len(loaded) == len(layers)
    for layer, other in zip(layers, loaded, strict=True):
        assert_bit_equal(layer, other)


def test_tensors_come_back_from_another_process(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.kv"
    program = "from compactor.cache_file import *; import sys; save_cache(sys.argv[2], *load_cache(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(saved), str(again)], check=True)
    assert again.read_bytes() == saved.read_bytes()


def test_heads_and_layers_may_keep_nothing(tmp_path: Path) -> None:
    metadata = make_metadata(prefix_length=0)
    layers = [make_layer(metadata, [[], []]), make_layer(metadata, [[], [5]])]
    save_cache(tmp_path / "doc.kv", layers, metadata)
    loaded, _ = load_cache(tmp_path / "doc.kv")
    verify_cache(tmp_path / "doc.kv")
    assert loaded[0].keys.shape == (0, 4)
    assert loaded[1].head_lengths == [0, 1]
    for layer, other in zip(layers, loaded, strict=True):
        assert_bit_equal(layer, other)


def test_more_than_ten_layers_keep_their_order(tmp_path: Path) -> None:
    metadata = make_metadata(sliding_windows=[None] * 12)
    layers = [make_layer(metadata, [[0, 1, 4], [0, 1]], seed=index) for index in range(12)]
    save_cache(tmp_path / "doc.kv", layers, metadata)
    _, table = read_metadata(tmp_path / "doc.kv")
    for layer, other in zip(layers, load_cache(tmp_path / "doc.kv")[0], strict=True):
        assert_bit_equal(layer, other)
    assert list(table.entries)[-4:] == [f"layers.{i}.{name}" for i in (10, 11) for name in ("keys", "values")]


def test_tensors_that_are_views_or_need_gradients_are_saved(tmp_path: Path) -> None:
    layers, metadata = small_cache("float32")
    keys = torch.randn(4, 6, requires_grad=True)
    layers[0] = replace(layers[0], keys=keys.T, biases=layers[0].biases.repeat(2)[::2])
    save_cache(tmp_path / "doc.kv", layers, metadata)
    loaded, _ = load_cache(tmp_path / "doc.kv")
    assert torch.equal(loaded[0].keys, keys.detach().T)
    assert torch.equal(loaded[0].biases, layers[0].biases)


def test_tensors_are_loaded_to_the_device(saved: Path) -> None:
    layers, _ = load_cache(saved, device="meta")
    assert {tensor.device.type for layer in layers for tensor in layer.tensors().values()} == {"meta"}


def test_writing_to_loaded_tensors_does_not_change_the_file(saved: Path) -> None:
    before = saved.read_bytes()
    layers, _ = load_cache(saved)
    for layer in layers:
        layer.keys.zero_()
        layer.biases.add_(1)
    assert saved.read_bytes() == before
    load_cache(saved)


def test_loaded_tensors_outlive_the_file(saved: Path) -> None:
    layers, _ = load_cache(saved)
    save_cache(saved, *small_cache("float16"), force=True)
    saved.unlink()
    for layer, other in zip(layers, small_cache()[0], strict=True):
        assert_bit_equal(layer, other)


# ---------------------------------------------------------------------------------------------- the format


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_safetensors_reads_the_file(tmp_path: Path, dtype: str) -> None:
    layers, metadata = small_cache(dtype)
    save_cache(tmp_path / "doc.kv", layers, metadata)
    with safe_open(tmp_path / "doc.kv", "pt") as file:
        assert len(file.keys()) == 5 * len(layers)
        for index, layer in enumerate(layers):
            for name, tensor in layer.tensors().items():
                assert torch.equal(file.get_tensor(f"layers.{index}.{name}"), tensor)
        assert json.loads(file.metadata()["compactor"])["format_version"] == 1


def test_equal_caches_give_equal_bytes(tmp_path: Path) -> None:
    layers, metadata = small_cache()
    reversed_report = dict(reversed(metadata.report.items()))
    reversed_settings = dict(reversed(metadata.settings.items()))
    assert list(reversed_report) != list(metadata.report)
    shuffled = replace(metadata, report=reversed_report, settings=reversed_settings)
    save_cache(tmp_path / "a.kv", layers, metadata)
    save_cache(tmp_path / "b.kv", layers, shuffled)
    assert (tmp_path / "a.kv").read_bytes() == (tmp_path / "b.kv").read_bytes()


@pytest.mark.parametrize(("dtype", "item_bytes"), [("bfloat16", 2), ("float32", 4)])
def test_bytes_are_what_the_formula_says(tmp_path: Path, dtype: str, item_bytes: int) -> None:
    layers, metadata = small_cache(dtype)
    sizes = save_cache(tmp_path / "doc.kv", layers, metadata)
    rows, head_dim, num_kv_heads = 6 + 6 + 11, 4, 2
    expected = rows * (2 * head_dim * item_bytes + 4 + 4) + 3 * 4 * (num_kv_heads + 1)
    assert sizes.tensor_bytes == expected == sum(layer.nbytes for layer in layers)
    assert sum(sizes) == (tmp_path / "doc.kv").stat().st_size
    assert read_metadata(tmp_path / "doc.kv")[1].sizes == sizes


def test_full_cache_counts_the_window_of_sliding_layers() -> None:
    metadata = make_metadata(sliding_windows=(None, 4, 100))
    assert count_full_cache_bytes(metadata) == (8 + 3 + 8) * 2 * 2 * 4 * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tensor_is_aligned_and_there_are_no_holes(tmp_path: Path, dtype: str) -> None:
    save_cache(tmp_path / "doc.kv", *small_cache(dtype))
    _, table = read_metadata(tmp_path / "doc.kv")
    assert table.sizes.header_bytes % 8 == 0
    end = 0
    for entry in table.entries.values():
        assert entry.begin == end
        assert entry.begin % (2 if entry.dtype == "BF16" else 4) == 0
        end = entry.end
    assert end == table.sizes.tensor_bytes


def test_head_lengths_are_in_the_header(saved: Path) -> None:
    assert read_metadata(saved)[1].head_lengths == [[4, 2], [3, 3], [8, 3]]


def test_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        (tmp_path / "doc.kv").write_text("open to all")
        save_cache(tmp_path / "doc.kv", *small_cache(), force=True)
    finally:
        os.umask(old)
    assert (tmp_path / "doc.kv").stat().st_mode & 0o777 == 0o600


def test_names_that_are_no_text_are_saved_with_question_marks(tmp_path: Path) -> None:
    layers, metadata = small_cache()
    save_cache(tmp_path / "doc.kv", layers, replace(metadata, document_name="caf\udce9 größer 文.txt"))
    assert load_cache(tmp_path / "doc.kv")[1].document_name == "caf? größer 文.txt"


def test_text_that_looks_like_the_hash_field_does_no_harm(tmp_path: Path) -> None:
    layers, metadata = small_cache()
    field = '"header_xxh3_128":"' + "0" * 32 + '"'
    metadata = replace(metadata, document_name=field, system='\\"' + field, report={field: field})
    save_cache(tmp_path / "doc.kv", layers, metadata)
    assert load_cache(tmp_path / "doc.kv")[1] == metadata


def test_reading_and_verifying_import_no_torch(saved: Path) -> None:
    program = (
        "import sys; from compactor.cache_file import read_metadata, verify_cache, check_output;"
        "read_metadata(sys.argv[1]); verify_cache(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(saved)], check=True)


# --------------------------------------------------------------------------------------------------- damage


def flipped_bits(path: Path, begin: int, end: int) -> list[int]:
    """Return the bits whose flip ``load_cache`` does not notice."""
    raw, unnoticed = path.read_bytes(), []
    descriptor = os.open(path, os.O_RDWR)
    try:
        for bit in range(8 * begin, 8 * end):
            place, changed = bit // 8, raw[bit // 8] ^ (1 << bit % 8)
            os.pwrite(descriptor, bytes([changed]), place)
            try:
                load_cache(path)
                unnoticed.append(bit)
            except CacheFileError:
                pass
            os.pwrite(descriptor, raw[place : place + 1], place)
    finally:
        os.close(descriptor)
    return unnoticed


def test_every_flipped_bit_of_the_header_is_noticed(tmp_path: Path) -> None:
    sizes = save_cache(tmp_path / "doc.kv", *example_cache())
    assert flipped_bits(tmp_path / "doc.kv", 0, sizes.header_bytes) == []


def test_every_flipped_bit_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    sizes = save_cache(tmp_path / "doc.kv", *example_cache())
    assert flipped_bits(tmp_path / "doc.kv", sizes.header_bytes, sum(sizes)) == []


def test_every_flipped_bit_of_a_checksum_is_noticed_by_the_header_alone(saved: Path) -> None:
    raw = saved.read_bytes()
    _, table = read_metadata(saved)
    for entry in table.entries.values():
        for digits in (entry.xxh3_64, entry.sha256):
            begin = raw.index(digits.encode())
            saved.write_bytes(raw[:begin] + bytes([raw[begin] ^ 1]) + raw[begin + 1 :])
            assert "header differs from the hash" in refusal(read_metadata, saved)


def test_every_length_of_a_cut_off_file_is_refused(saved: Path) -> None:
    raw = saved.read_bytes()
    for length in reversed(range(len(raw))):
        os.truncate(saved, length)
        refusal(load_cache, saved)
        refusal(read_metadata, saved)


@pytest.mark.parametrize(("length", "words"), [
    (0, "is empty"),
    (4, "does not begin like a safetensors file"),
    (8, "does not begin like a safetensors file"),
    (9, "cut off"),
    (1000, "cut off"),
    (-1, "cut off, 1 bytes are missing"),
    (-100, "cut off, 100 bytes are missing"),
])  # fmt: skip
def test_a_cut_off_file_is_called_so(saved: Path, length: int, words: str) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    assert words in refusal(load_cache, saved)


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 4096, b"more text\n"])
def test_appended_bytes_are_refused(saved: Path, extra: bytes) -> None:
    saved.write_bytes(saved.read_bytes() + extra)
    assert f"{len(extra):,} bytes follow its last tensor" in refusal(read_metadata, saved)


def test_sha256_finds_what_the_fast_checksum_misses(saved: Path) -> None:
    header, document, data = take_apart(saved)
    document["checksums"]["layers.1.values"]["sha256"] = "0123456789abcdef" * 4
    put_together(saved, header, document, data)
    load_cache(saved)
    assert "SHA-256 of layers.1.values differs" in refusal(verify_cache, saved)


def test_verify_finds_a_flipped_bit(saved: Path) -> None:
    verify_cache(saved)
    raw = bytearray(saved.read_bytes())
    raw[-1] ^= 1
    saved.write_bytes(raw)
    assert "layers.2.values" in refusal(verify_cache, saved)


# -------------------------------------------------------------------------------------------- foreign files


def write_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"layers.0.keys": torch.zeros(3, 4)}, path, metadata={"format": "pt"})


def write_torch(path: Path) -> None:
    torch.save({"layers.0.keys": torch.zeros(3, 4)}, path)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "text": (lambda path: path.write_text("The tenant shall pay rent.\n" * 50), "does not begin like"),
    "short text": (lambda path: path.write_text("Hi"), "does not begin like"),
    "json": (lambda path: path.write_text('{"a": 1, "b": [2, 3], "c": {"d": 4}}'), "does not begin like"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "does not begin like"),
    "zip": (write_torch, "does not begin like"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(500)), "does not begin like"),
    "safetensors": (write_safetensors, "a safetensors file of another program"),
    "bare safetensors": (lambda path: path.write_bytes(b"\10" + bytes(7) + b"{}      "), "another program"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused_by_kind(tmp_path: Path, kind: str) -> None:
    write, words = FOREIGN[kind]
    write(tmp_path / "doc.kv")
    for act in (load_cache, read_metadata, verify_cache):
        sentence = refusal(act, tmp_path / "doc.kv")
        assert "is not a compacted cache" in sentence and words in sentence
        assert str(tmp_path / "doc.kv") in sentence


@pytest.mark.parametrize("header", [b"{", b"{]", b'{"a":\xff}', b'{"a":NaN}', b'{"a":' + b"[" * 100_000])
def test_a_header_that_is_no_json_is_refused(tmp_path: Path, header: bytes) -> None:
    header += b" " * (-len(header) % 8)
    (tmp_path / "doc.kv").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "not a JSON object" in refusal(load_cache, tmp_path / "doc.kv")


@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**63, 2**64 - 1])
def test_an_enormous_header_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    (tmp_path / "doc.kv").write_bytes(length.to_bytes(8, "little") + b"{" * 100)
    assert "claims" in refusal(load_cache, tmp_path / "doc.kv")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(load_cache, tmp_path / "none.kv")
    assert "is a folder" in refusal(load_cache, tmp_path)
    assert "is a device or a pipe" in refusal(load_cache, os.devnull)
    (tmp_path / "file").write_text("")
    assert "cannot be read" in refusal(load_cache, tmp_path / "file" / "doc.kv")


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or a pipe" in refusal(load_cache, tmp_path / "pipe")


def test_an_unreadable_file_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert "cannot be read: Permission denied" in refusal(read_metadata, saved)


@pytest.mark.parametrize("version", [0, 2, 17])
def test_another_format_version_is_refused_naming_both(
    saved: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(cache_file, "FORMAT_VERSION", version)
    save_cache(saved, *small_cache(), force=True)
    monkeypatch.undo()
    sentence = refusal(load_cache, saved)
    assert f"format version {version} " in sentence and "reads version 1;" in sentence


def test_another_format_version_is_named_even_without_a_known_hash(saved: Path) -> None:
    header, document, data = take_apart(saved)
    for version, words in ((2, "has format version 2"), (1, "its header has no hash")):
        header["__metadata__"] = {"compactor": json.dumps(document | {"format_version": version})}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        saved.write_bytes(len(text).to_bytes(8, "little") + text + data)
        assert words in refusal(load_cache, saved)


def test_a_header_without_padding_is_refused(saved: Path) -> None:
    raw = saved.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length] + b" "
    saved.write_bytes(mend((length + 1).to_bytes(8, "little") + text + raw[8 + length :]))
    assert "multiple of 8" in refusal(load_cache, saved)


# ---------------------------------------------------------------------- rules, with all checksums in order

Change = Callable[[dict[str, Any], dict[str, Any]], object]


def set_field(*path: str, to: object) -> Change:
    """Return a change of one field of the document."""

    def change(_header: dict[str, Any], document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = to

    return change


def set_place(name: str, **fields: object) -> Change:
    """Return a change of what the header says of one tensor."""
    return lambda header, _document: header[name].update(fields)


BROKEN_HEADERS: dict[str, tuple[Change, str]] = {
    "document is a list": (lambda header, document: (document.clear(), document), "format version"),
    "version is text": (set_field("format_version", to="1"), "format version"),
    "version is true": (set_field("format_version", to=True), "format version"),
    "field missing": (lambda header, document: document.pop("seed"), "lacks seed"),
    "model field missing": (lambda header, document: document["model"].pop("family"), "lacks family"),
    "model is text": (set_field("model", to="llama"), "model is not a JSON object"),
    "number is text": (set_field("logical_length", to="8"), "logical_length of the wrong type"),
    "number is true": (set_field("seed", to=True), "seed of the wrong type"),
    "number is real": (set_field("document_tokens", to=6.0), "document_tokens of the wrong type"),
    "list item is text": (set_field("sliding_windows", to=[None, "4", None]), "sliding_windows of the wrong"),
    "infinity": (set_field("report", to={"error": float("inf")}), "not a JSON object"),
    "too large a number": (set_field("report", to={"error": "1e999"}), ""),
    "half a UTF-16 pair": (set_field("document_name", to="\ud800"), "not a JSON object"),
    "unknown dtype": (set_field("dtype", to="int8"), "'int8'"),
    "no layers": (set_field("model", "num_layers", to=0), "no layers"),
    "more layers": (set_field("model", "num_layers", to=4), "do not belong to its layers"),
    "enormous": (set_field("model", "num_layers", to=10**18), "do not belong to its layers"),
    "uneven heads": (set_field("model", "num_heads", to=3), "do not share"),
    "other head dimension": (set_field("model", "head_dim", to=8), "instead of"),
    "other length": (set_field("logical_length", to=9), "logical length 9"),
    "negative tokens": (set_field("prefix_length", to=-1), "out of range"),
    "window of zero": (set_field("sliding_windows", to=[None, 0, None]), "sliding windows"),
    "window dropped": (set_field("sliding_windows", to=[None, None]), "sliding windows"),
    "larger window": (set_field("sliding_windows", to=[None, 5, None]), "does not keep all"),
    "window on a ragged layer": (set_field("sliding_windows", to=[4, 4, None]), "does not keep all"),
    "lengths are no list": (set_field("head_lengths", to={}), "no list of head lengths"),
    "a layer without lengths": (set_field("head_lengths", to=[[4, 2], [3, 3]]), "for 2 layers"),
    "a head without length": (set_field("head_lengths", to=[[6], [3, 3], [8, 3]]), "1 KV heads"),
    "negative length": (set_field("head_lengths", to=[[7, -1], [3, 3], [8, 3]]), "less than no keys"),
    "longer than the text": (set_field("head_lengths", to=[[4, 2], [3, 3], [9, 2]]), "more than there are"),
    "lengths do not add up": (set_field("head_lengths", to=[[4, 3], [3, 3], [8, 3]]), "instead of"),
    "dtype of a tensor": (set_place("layers.0.keys", dtype="F16"), "layers.0.keys is F16"),
    "dtype nobody knows": (set_place("layers.0.keys", dtype=["X"]), "layers.0.keys is"),
    "shape": (set_place("layers.2.keys", shape=[4, 11]), "instead of BF16 [11, 4]"),
    "flat shape": (set_place("layers.2.keys", shape=[44]), "instead of BF16 [11, 4]"),
    "shape is text": (set_place("layers.2.keys", shape="ab"), "not a whole number"),
    "shape is a number": (set_place("layers.2.keys", shape=44), "does not describe"),
    "negative shape": (set_place("layers.2.keys", shape=[-11, -4]), "not a whole number"),
    "place has one end": (set_place("layers.2.keys", data_offsets=[5]), "does not describe"),
    "place is real": (set_place("layers.0.biases", data_offsets=[0.0, 24]), "not a whole number"),
    "overlap": (set_place("layers.0.positions", data_offsets=[0, 24]), "begins at byte 0"),
    "too short": (set_place("layers.0.biases", data_offsets=[0, 20]), "not its shape"),
    "far away": (set_place("layers.2.values", data_offsets=[10**15, 10**15 + 88]), "begins at byte"),
    "tensor missing": (lambda header, document: drop(header, document, "layers.1.keys"), "lacks the tensor"),
    "tensor unknown": (lambda header, document: rename(header, document), "the tensor"),
    "checksum missing": (lambda header, document: document["checksums"].popitem(), "checksums do not belong"),
    "no checksums": (set_field("checksums", to=None), "checksums do not belong"),
}  # fmt: skip


def drop(header: dict[str, Any], document: dict[str, Any], name: str) -> None:
    del header[name], document["checksums"][name]


def rename(header: dict[str, Any], document: dict[str, Any]) -> None:
    header["layers.0.scales"] = header.pop("layers.0.keys")
    document["checksums"]["layers.0.scales"] = document["checksums"].pop("layers.0.keys")


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_a_header_that_breaks_a_rule_is_refused_before_tensors_are_read(
    saved: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = BROKEN_HEADERS[case]
    header, document, data = take_apart(saved)
    change(header, document)
    put_together(saved, header, document, data)
    if case == "too large a number":
        saved.write_bytes(mend(saved.read_bytes().replace(b'\\"1e999\\"', b"1e999    ")))
        words = "not a JSON object"
    monkeypatch.setattr(cache_file.mmap, "mmap", lambda *_a, **_k: pytest.fail("tensors were touched"))
    for act in (read_metadata, load_cache):
        assert words in refusal(act, saved)


def mend(raw: bytes) -> bytes:
    """Put the right hash into a header."""
    import xxhash

    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    found = re.search(rb'"header_xxh3_128":"([0-9a-f]{32})"', header)
    assert found
    blank = header.replace(found[1], b"0" * 32)
    return raw.replace(found[1], xxhash.xxh3_128_hexdigest(blank).encode())


def test_another_position_scheme_is_refused_by_name(saved: Path) -> None:
    header, document, data = take_apart(saved)
    document["position_scheme"] = "dual-chunk"
    put_together(saved, header, document, data)
    assert "'dual-chunk' and this release knows 'contiguous'" in refusal(read_metadata, saved)


BROKEN_TENSORS: dict[str, tuple[str, list[float], str]] = {
    "first offset": ("layers.0.offsets", [1, 4, 6], "offsets of layer 0"),
    "falling offsets": ("layers.0.offsets", [0, 7, 6], "offsets of layer 0"),
    "last offset": ("layers.0.offsets", [0, 4, 5], "offsets of layer 0"),
    "other border": ("layers.0.offsets", [0, 3, 6], "offsets of layer 0"),
    "negative position": ("layers.0.positions", [-1, 1, 3, 6, 0, 1], "outside of the 8 tokens"),
    "position too large": ("layers.0.positions", [0, 1, 3, 8, 0, 1], "outside of the 8 tokens"),
    "equal positions": ("layers.0.positions", [0, 1, 3, 3, 0, 1], "layer 0, head 0 do not rise"),
    "falling positions": ("layers.0.positions", [0, 1, 3, 6, 1, 0], "layer 0, head 1 do not rise"),
    "bias is no number": ("layers.0.biases", [0, 0, float("nan"), 0, 0, 0], "not finite"),
    "bias is infinite": ("layers.0.biases", [0, 0, float("-inf"), 0, 0, 0], "not finite"),
    "bias in a sliding layer": ("layers.1.biases", [0, 0, 0, 0.5, 0, 0], "layer 1 has a sliding window"),
    "gap in a sliding layer": ("layers.1.positions", [4, 6, 7, 5, 6, 7], "layer 1 has a sliding window"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_tensors_that_break_a_rule_are_refused(saved: Path, case: str) -> None:
    name, numbers, words = BROKEN_TENSORS[case]
    header, document, data = take_apart(saved)
    begin, end = header[name]["data_offsets"]
    dtype = torch.float32 if name.endswith("biases") else torch.int32
    changed = torch.tensor(numbers).to(dtype).numpy().tobytes()
    assert end - begin == len(changed) and data[begin:end] != changed
    data = data[:begin] + changed + data[end:]
    mend_checksums(header, document, data)
    put_together(saved, header, document, data)
    for act in (load_cache, verify_cache):
        assert words in refusal(act, saved)
    read_metadata(saved)


def test_a_file_of_another_writer_is_read(saved: Path) -> None:
    """Order of keys and white space are free; unknown fields of the document are skipped."""
    layers, metadata = small_cache()
    header, document, data = take_apart(saved)
    document["remark"] = {"new": ["field"]}
    put_together(saved, dict(reversed(header.items())), document, data)
    other_layers, other_metadata = load_cache(saved)
    assert other_metadata == metadata
    for layer, other in zip(layers, other_layers, strict=True):
        assert_bit_equal(layer, other)


# ----------------------------------------------------------------------------------------- failing to write


def not_written(path: Path, *arguments: Any, words: str) -> None:
    """Check that saving is refused and the folder stays as it is."""
    before = {entry: entry.read_bytes() for entry in path.parent.iterdir()}
    assert words in refusal(save_cache, path, *arguments, kind=OutputError)
    assert {entry: entry.read_bytes() for entry in path.parent.iterdir()} == before


def test_a_cache_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    layers, metadata = small_cache()
    path = tmp_path / "doc.kv"
    first = layers[0]
    falling = replace(first, positions=first.positions.flip(0))
    wide = replace(first, positions=first.positions.long())
    cast = replace(first, keys=first.keys.half())
    infinite = replace(first, values=first.values / 0)
    not_written(path, layers[:2], metadata, words="sliding windows")
    not_written(path, [falling, *layers[1:]], metadata, words="do not rise")
    not_written(path, [wide, *layers[1:]], metadata, words="layers.0.positions is torch.int64 [6]")
    not_written(path, [cast, *layers[1:]], metadata, words="layers.0.keys is F16 [6, 4] instead of BF16")
    not_written(path, [infinite, *layers[1:]], metadata, words="values of layer 0 hold numbers")
    not_written(path, layers, replace(metadata, report={"loss": float("nan")}), words="not JSON")
    not_written(path, layers, replace(metadata, report={"loss": torch.ones(1)}), words="not JSON")
    not_written(path, layers, replace(metadata, logical_length=9), words="logical length 9")


def test_an_existing_file_is_replaced_only_with_force(saved: Path) -> None:
    layers, metadata = small_cache("float32")
    not_written(saved, layers, metadata, words="exists already; pass --force")
    save_cache(saved, layers, metadata, force=True)
    assert load_cache(saved)[1].dtype == "float32"


def test_a_file_that_appears_while_writing_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "doc.kv", os.fsync

    def fsync(descriptor: int) -> None:
        path.write_text("somebody else's")
        real(descriptor)

    monkeypatch.setattr(output.os, "fsync", fsync)
    assert "exists already" in refusal(save_cache, path, *small_cache(), kind=OutputError)
    assert path.read_text() == "somebody else's"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("force", [False, True])
def test_outputs_that_cannot_be_are_refused_before_the_work(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "-": "cannot go to stdout",
        "": "is a folder",
        str(tmp_path): "is a folder",
        f"{tmp_path}/new/": "names a folder",
        f"{tmp_path}/none/doc.kv": "does not exist; create it first",
        f"{tmp_path}/file/doc.kv": "is a file, not a folder",
        f"{tmp_path}/pipe": "is a device or a pipe",
        f"{tmp_path}/{'x' * 300}.kv": "name is too long",
        os.devnull: "is a device or a pipe",
    }
    for path, words in cases.items():
        assert words in refusal(check_output, path, force, kind=OutputError)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "pipe"]


@LINUX
@pytest.mark.parametrize("folder", ["/proc", "/proc/self", "/sys"])
def test_folders_that_take_no_files_even_from_root_are_refused(folder: str) -> None:
    for act in (check_output, lambda path, _force: save_cache(path, *small_cache())):
        assert "choose another folder" in refusal(act, f"{folder}/doc.kv", False, kind=OutputError)


@pytest.mark.parametrize(("number", "words"), [
    (errno.EROFS, "read-only file system"),
    (errno.EACCES, "does not let you write"),
    (errno.ENOSPC, "disk is full"),
    (errno.EDQUOT, "quota"),
    (errno.EIO, "Input/output error"),
])  # fmt: skip
def test_a_folder_in_which_no_file_can_be_made_is_refused_before_the_work(
    saved: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*_arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output.os, "open", refuse)
    assert words in refusal(check_output, saved, True, kind=OutputError)


def test_checking_the_output_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "doc.kv", False)
    assert list(tmp_path.iterdir()) == []


def failing_call(monkeypatch: pytest.MonkeyPatch, name: str, count: int, error: BaseException) -> None:
    """Let the ``count``-th call of an os function write or do its work in part, then fail."""
    real, calls = getattr(os, name), []

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) != count:
            return real(*arguments)
        if name == "write":
            real(arguments[0], arguments[1][:7])
        raise error

    monkeypatch.setattr(output.os, name, call)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), RuntimeError("bug")])
@pytest.mark.parametrize(
    ("name", "count"), [("write", 1), ("write", 2), ("write", 16), ("fsync", 1), ("close", 2), ("replace", 1)]
)
def test_a_failure_while_writing_leaves_everything_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
    error: BaseException,
    name: str,
    count: int,
) -> None:
    path = tmp_path / "doc.kv"
    if existing:
        save_cache(path, *small_cache("float32"))
    before = path.read_bytes() if existing else None
    failing_call(monkeypatch, name, count, error)
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        save_cache(path, *small_cache(), force=existing)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or path.read_bytes() == before


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_cache(tmp_path / "a.kv", *small_cache())
    real = os.write
    monkeypatch.setattr(output.os, "write", lambda descriptor, piece: real(descriptor, piece[:5]))
    save_cache(tmp_path / "b.kv", *small_cache())
    assert (tmp_path / "a.kv").read_bytes() == (tmp_path / "b.kv").read_bytes()


@LINUX
def test_a_file_over_the_limit_of_the_system_leaves_everything_as_it_was(saved: Path) -> None:
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv[2])\n"
        "from small_caches import small_cache\n"
        "from compactor.cache_file import save_cache\n"
        "from compactor.errors import OutputError\n"
        "cache = small_cache('float32')\n"
        "for limit in (0, 1000, 4000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))\n"
        "    try: save_cache(sys.argv[1], *cache, force=True)\n"
        "    except OutputError as error: print(error)\n"
    )
    before = saved.read_bytes()
    assert len(before) > 4000
    command = [sys.executable, "-c", program, str(saved), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sentence = f"{saved} cannot be written: the file would be larger than the system allows;"
    assert [line.startswith(sentence) for line in done.stdout.splitlines()] == [True] * 3
    assert list(saved.parent.iterdir()) == [saved]
    assert saved.read_bytes() == before


def test_file_and_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def record(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any) -> Any:
            is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}")
            events.append(f"{name} folder" if is_folder else name)
            return real(*arguments)

        monkeypatch.setattr(output.os, name, call)

    for name in ("fsync", "replace"):
        record(name)
    save_cache(tmp_path / "doc.kv", *small_cache())
    assert [event.split()[0] for event in events] == ["fsync", "replace", "fsync"]
    assert sys.platform != "linux" or events[2] == "fsync folder"


def test_a_link_is_followed(saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.kv"
    link.symlink_to(saved)
    save_cache(link, *small_cache("float32"), force=True)
    assert link.is_symlink() and load_cache(saved)[1].dtype == "float32"


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_shows_a_real_file(tmp_path: Path) -> None:
    save_cache(tmp_path / "example.kv", *example_cache())
    page = DOCS.read_text(encoding="utf-8")
    for block in example_blocks(tmp_path / "example.kv"):
        assert block in page, "run `python tests/small_caches.py` and copy its blocks to docs/file-format.md"


def test_the_reader_on_the_page_reads_the_file_and_attends(tmp_path: Path) -> None:
    """The page's program, which uses nothing of compactor, gives the attention that its equation promises."""
    save_cache(tmp_path / "doc.kv", *small_cache())
    (program,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert "compactor." not in program.replace('"compactor"', "")
    names: dict[str, Any] = {}
    exec(program, names)
    document, tensors = names["read_cache"](tmp_path / "doc.kv")
    assert document["head_lengths"] == [[4, 2], [3, 3], [8, 3]]
    layer = small_cache()[0][0]
    for name, tensor in layer.tensors().items():
        assert tensors[f"layers.0.{name}"].tolist() == tensor.tolist()
    query = torch.randn(4)
    out, lse = names["attend"](query.numpy(), tensors, layer=0, kv_head=0, scaling=0.5)
    scores = 0.5 * layer.keys[:4].float() @ query + layer.biases[:4]
    torch.testing.assert_close(torch.tensor(out), scores.softmax(0) @ layer.values[:4].float())
    torch.testing.assert_close(torch.tensor(lse), scores.logsumexp(0))
    raw = (tmp_path / "doc.kv").read_bytes()
    for place in (raw.index(b"example.txt"), len(raw) - 1):
        (tmp_path / "doc.kv").write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            names["read_cache"](tmp_path / "doc.kv")


def test_the_page_names_every_field_and_tensor(saved: Path) -> None:
    page = DOCS.read_text(encoding="utf-8")
    _, document, _ = take_apart(saved)
    for name in (*document, *document["model"], *FILE_ORDER, "compactor", "header_xxh3_128"):
        assert f"`{name}`" in page or f".{name}`" in page, name
