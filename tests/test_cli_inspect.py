"""Claims about ``compactor inspect``: it tells what the header says, and reads no tensor unless asked."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from small_caches import make_layer, make_metadata, mend_checksums, put_together, small_cache, take_apart
from typer.testing import CliRunner

from compactor import cache_file
from compactor.cache_file import save_cache
from compactor.cli import inspect
from compactor.cli.inspect import inspect_command
from compactor.errors import CacheFileError, CompactorError, OutputError, SettingsError

APP = typer.Typer()
APP.command("inspect")(inspect_command)
PROGRAM = "import sys; from compactor.cli.app import main; sys.argv[0] = 'compactor'; main()"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a good file, alone in its folder."""
    path = tmp_path / "doc.kv"
    save_cache(path, *small_cache())
    return path


def run(*arguments: object) -> str:
    """Return what the command writes to stdout; what it raises is raised."""
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: object, kind: type[CompactorError] = CacheFileError) -> str:
    """Return the sentence with which the command refuses."""
    with pytest.raises(kind) as caught:
        run(*arguments)
    return str(caught.value)


def flip_last_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


# ----------------------------------------------------------------------------------------------------- text


def test_it_tells_model_document_kept_keys_and_sizes(saved: Path) -> None:
    header, _, data = take_apart(saved)
    text = run(saved)
    header_bytes = saved.stat().st_size - len(data)
    full_bytes = (8 + 3 + 8) * 2 * 2 * 4 * 2
    assert text.startswith(f"{saved}\n")
    for words in (
        "example/model",
        "llama, 3 layers, 4 heads, 2 KV heads of 4",
        "example.txt",
        "6 of the document, after 2 of the prompt",
        "9 of 24 document keys (37.5%)",
        f"{len(data)} B, 15 of them, keys and values in bfloat16",
        f"{full_bytes} B, {full_bytes / len(data):.1f} times as much",
        f"{header_bytes / 1000:.1f} kB",
        "kv-compactor 0.1.0, seed 0",
    ):
        assert words in text, words
    assert len(header) == 16


def test_it_shows_settings_and_a_nested_report(tmp_path: Path) -> None:
    layers, metadata = small_cache()
    report: dict[str, Any] = {
        "reconstruction_error": 0.0123456,
        "seconds": {"prefill": 1.5, "fit": 20.25},
        "elapsed_seconds": 75.0,
        "peak_bytes": 12_500_000,
        "deeper": {"still": {"deeper": "yes"}},
        "per_layer": {str(index): index / 100 for index in range(30)},
        "kinds": ["repeat", "self-study"],
        "nothing": [],
        "ok": True,
    }
    save_cache(tmp_path / "doc.kv", layers, replace(metadata, report=report))
    lines = [" ".join(line.split()) for line in run(tmp_path / "doc.kv").splitlines()]
    for line in (
        "keep ratio 0.2",
        "queries context, repeat",
        "reconstruction error 0.01235",
        "seconds",
        "prefill 1.50 s",
        "fit 20.2 s",
        "elapsed 75.0 s",
        "peak bytes 12.5 MB",
        "deeper yes",
        "per layer 30 values, 0 to 0.29",
        "kinds repeat, self-study",
        "nothing none",
        "ok yes",
    ):
        assert line in lines, line


def test_nothing_in_a_file_steers_the_terminal(tmp_path: Path) -> None:
    layers, metadata = small_cache()
    evil = "a\x1b[2J\x07b\nc\u202ed[red]x[/red]"
    metadata = replace(
        metadata,
        document_name=evil,
        system=evil * 100,
        report={evil: evil, "list": [evil], "dict": {evil: {evil: evil}}},
    )
    save_cache(tmp_path / "doc.kv", layers, metadata)
    text = run(tmp_path / "doc.kv")
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(text)
    assert r"a\x1b[2J\x07b\nc\u202ed[red]x[/red]" in text
    assert "characters)" in text
    assert json.loads(run(tmp_path / "doc.kv", "--json"))["metadata"]["document_name"] == evil


# ------------------------------------------------------------------------------------------------- heat map


def heat_map(text: str) -> dict[int, str]:
    """Return the cells of each layer of the plain heat map."""
    rows = [line for line in text.splitlines() if line.startswith("  layer ")]
    return {int(row.split()[1]): row[row.index("|") + 1 : row.rindex("|")] for row in rows}


def test_heat_map_has_a_row_per_layer_and_a_cell_per_head(saved: Path) -> None:
    text = run(saved)
    assert heat_map(text) == {0: "**  ", 1: "~~~~", 2: "@@=="}  # 2 and 0, sliding, 6 and 1 of 6 keys
    assert "16.7%, from 0.0% to 33.3%" in text
    assert "sliding window, not compacted" in text
    assert "\x1b" not in text


def test_more_keys_never_give_a_lighter_shade() -> None:
    shades = [inspect.shade_of(count / 1000, 0.5) for count in range(501)]
    assert shades[0] == 0 and shades[1] == 1 and shades[-1] == len(inspect.SHADES) - 1
    assert shades == sorted(shades)
    assert set(shades) == set(range(len(inspect.SHADES)))
    assert len(inspect.COLOURS) == len(inspect.SHADES)


def test_legend_says_where_each_shade_begins() -> None:
    for row in inspect.legend([[0.0, 0.01, 0.2, 0.5]]):
        if row.shades and row.shades[0]:
            begin = float(row.remark.split()[1].rstrip("%")) / 100
            assert inspect.shade_of(begin + 0.002, 0.5) == row.shades[0]
            assert begin == 0 or inspect.shade_of(begin - 0.002, 0.5) == row.shades[0] - 1


@pytest.mark.parametrize("num_kv_heads", [1, 40, 41, 128])
def test_heat_map_of_any_number_of_heads_fits_its_rows(tmp_path: Path, num_kv_heads: int) -> None:
    metadata = make_metadata(num_kv_heads=num_kv_heads)
    heads = [[0, 1, 5] if head % 2 else [0, 1] for head in range(num_kv_heads)]
    save_cache(tmp_path / "doc.kv", [make_layer(metadata, heads)] * 2, metadata)
    width = num_kv_heads * (2 if num_kv_heads <= 40 else 1)
    assert [len(cells) for cells in heat_map(run(tmp_path / "doc.kv")).values()] == [width, width]


@pytest.mark.parametrize("windows", [(4, 4), (None, None)])
def test_a_file_with_nothing_kept_or_nothing_to_compact_is_shown(
    tmp_path: Path, windows: tuple[int | None, ...]
) -> None:
    metadata = make_metadata(sliding_windows=windows)
    heads = [[0, 1]] * 2 if windows[0] is None else [[5, 6, 7]] * 2
    layers = [make_layer(metadata, heads, sliding_window=window) for window in windows]
    save_cache(tmp_path / "doc.kv", layers, metadata)
    text = run(tmp_path / "doc.kv", "--plot", tmp_path / "out.png")
    assert "0 of " in text
    assert len(heat_map(text)) == 2


def in_terminal(*arguments: object, **environment: str) -> str:
    """Return what the real command writes to a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "inspect", *map(str, arguments)],
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm-256color", **environment},
    )
    os.close(follower)
    pieces = []
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(leader)
    assert process.wait() == 0
    return b"".join(pieces).decode()


def test_heat_map_is_coloured_in_a_terminal_only_and_never_against_its_wish(saved: Path) -> None:
    assert "\x1b[48;5;" in in_terminal(saved, COLORTERM="")
    assert "\x1b" not in in_terminal(saved, NO_COLOR="1")


# ----------------------------------------------------------------------------------------------------- json


def test_json_says_everything_on_one_line(saved: Path) -> None:
    header, document, data = take_apart(saved)
    output = run(saved, "--json")
    assert output.count("\n") == 1
    value = json.loads(output)
    for name in value["metadata"]:
        assert value["metadata"][name] == document[name], name
    assert value["head_lengths"] == document["head_lengths"]
    assert value["format_version"] == 1
    assert (value["tensor_bytes"], value["full_cache_bytes"]) == (len(data), 304 * 2)
    assert value["header_bytes"] + value["tensor_bytes"] == saved.stat().st_size
    assert (value["kept_document_keys"], value["document_keys"]) == (9, 24)
    assert value["verified"] is False
    tensor = value["tensors"]["layers.2.keys"]
    assert [tensor["begin"], tensor["end"]] == header["layers.2.keys"]["data_offsets"]
    assert tensor["sha256"] == document["checksums"]["layers.2.keys"]["sha256"]


# --------------------------------------------------------------------------------------------------- verify


def test_without_verify_no_tensor_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_file.mmap, "mmap", lambda *_a, **_k: pytest.fail("tensors were touched"))
    flip_last_bit(saved)
    assert "SHA-256 of all" not in run(saved)


def test_verify_says_that_every_tensor_is_right(saved: Path) -> None:
    assert "the SHA-256 of all 15 tensors is right" in run(saved, "--verify")
    assert json.loads(run(saved, "--verify", "--json"))["verified"] is True


def test_verify_names_the_damaged_tensor(saved: Path) -> None:
    flip_last_bit(saved)
    assert "layers.2.values" in refusal(saved, "--verify")


def test_verify_compares_sha256_and_not_only_the_fast_checksum(saved: Path) -> None:
    header, document, data = take_apart(saved)
    sha256 = {name: sums["sha256"] for name, sums in document["checksums"].items()}
    data = data[:-1] + bytes([data[-1] ^ 1])
    mend_checksums(header, document, data)
    for name, digits in sha256.items():
        document["checksums"][name]["sha256"] = digits
    put_together(saved, header, document, data)
    assert "SHA-256 of layers.2.values differs" in refusal(saved, "--verify")


# --------------------------------------------------------------------------------------------------- errors


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "doc.kv").write_text("no cache at all")
    assert "is not a compacted cache" in refusal(tmp_path / "doc.kv")
    assert "does not exist" in refusal(tmp_path / "none.kv")


@pytest.mark.parametrize("arguments", [[], ["--verify"], ["--json"]])
def test_the_command_imports_no_torch(saved: Path, arguments: list[str]) -> None:
    program = (
        "import sys, typer; from compactor.cli.inspect import inspect_command\n"
        "app = typer.Typer(); app.command()(inspect_command)\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(saved), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_the_real_command_refuses_with_a_sentence_and_a_code(saved: Path) -> None:
    flip_last_bit(saved)
    command = [sys.executable, "-c", PROGRAM, "inspect", str(saved), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == CacheFileError.exit_code
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- plot


def test_plot_draws_a_picture_without_leaving_anything_else(saved: Path, tmp_path: Path) -> None:
    run(saved, "--plot", tmp_path / "out.png")
    run(saved, "--plot", tmp_path / "out.png")  # replaces the picture
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["doc.kv", "out.png"]


def test_plot_takes_any_name_for_text(tmp_path: Path) -> None:
    layers, metadata = small_cache()
    save_cache(tmp_path / "doc.kv", layers, replace(metadata, document_name="$x^{$ 文\n\x1b[1m"))
    run(tmp_path / "doc.kv", "--plot", tmp_path / "out.svg")
    assert b"<svg" in (tmp_path / "out.svg").read_bytes()


def test_plot_without_matplotlib_names_the_extra(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    sentence = refusal(saved, "--plot", saved.parent / "out.png", kind=SettingsError)
    assert "pip install 'kv-compactor[plots]'" in sentence
    assert run(saved)


def test_plots_that_cannot_be_are_refused_before_anything_is_shown(saved: Path, tmp_path: Path) -> None:
    before = saved.read_bytes()
    assert "ends in none of them" in refusal(saved, "--plot", saved, kind=SettingsError)
    assert "ends in none of them" in refusal(saved, "--plot", tmp_path / "out", kind=SettingsError)
    assert "does not exist" in refusal(saved, "--plot", tmp_path / "no" / "out.png", kind=OutputError)
    (tmp_path / "dir.png").mkdir()
    assert "is a folder" in refusal(saved, "--plot", tmp_path / "dir.png", kind=OutputError)
    (tmp_path / "same.png").hardlink_to(saved)
    assert "the compacted cache itself" in refusal(saved, "--plot", tmp_path / "same.png", kind=SettingsError)
    assert saved.read_bytes() == before
