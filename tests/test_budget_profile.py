"""Claims about budget profiles: shares of caches of one model, counts that sum exactly, other models refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from small_caches import make_layer, make_metadata
from typer.testing import CliRunner

from compactor.budget_profile import allocate_by_shares, load_profile, make_profile, read_profile
from compactor.cache_file import save_cache
from compactor.cli.budget import budget_command
from compactor.errors import CompactorError, MismatchError, OutputError, SettingsError

APP = typer.Typer()
APP.command("budget")(budget_command)
WINDOWS = (None, 4, None)


def save(path: Path, counts: Sequence[Sequence[int]], **model: Any) -> Path:
    """Write a cache with a sliding layer in the middle whose other heads keep so many of 20 document keys."""
    metadata = make_metadata(sliding_windows=WINDOWS, document_tokens=20)
    metadata = replace(metadata, model=replace(metadata.model, **model))
    heads = iter(counts)
    layers = [
        make_layer(metadata, [range(2 + count) for count in next(heads)])
        if window is None
        else make_layer(metadata, [range(19, 22)] * 2, sliding_window=window)
        for window in WINDOWS
    ]
    save_cache(path, layers, metadata)
    return path


def run(*arguments: object) -> str:
    """Return what the command writes to stdout; what it raises is raised."""
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(kind: type[CompactorError], *arguments: object) -> str:
    with pytest.raises(kind) as caught:
        run(*arguments)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- the file


def test_shares_are_the_mean_over_caches_and_leave_out_sliding_layers(tmp_path: Path) -> None:
    first = save(tmp_path / "a.kv", [[10, 2], [4, 4]])
    second = save(tmp_path / "b.kv", [[4, 2], [3, 1]])
    text = run(first, second, "-o", tmp_path / "profile.json")
    profile = load_profile(tmp_path / "profile.json")
    assert profile.layers == [0, 2] and profile.num_caches == 2
    assert profile.mean_keep_ratio == pytest.approx((20 / 80 + 10 / 80) / 2)
    expected = [[(0.5 + 0.4) / 2, (0.1 + 0.2) / 2], [(0.2 + 0.3) / 2, (0.2 + 0.1) / 2]]
    for mine, theirs in zip(profile.shares, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-12)
    assert sum(map(sum, profile.shares)) == pytest.approx(1.0, abs=1e-12)
    assert "4 heads, 15.000% to 45.000%" in text and "2, keeping 18.8%" in text
    identity = make_metadata(sliding_windows=WINDOWS).model
    shares = read_profile(tmp_path / "profile.json", identity)
    assert (shares.shape, shares.dtype) == ((2, 2), torch.float64)
    assert shares.flatten().tolist() == [share for layer in profile.shares for share in layer]


def test_json_on_stdout_is_what_the_file_says(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    told = json.loads(run(save(tmp_path / "a.kv", [[10, 2], [4, 4]]), "-o", out, "--json"))
    assert told.pop("output") == str(out)
    assert told == json.loads(out.read_text())


def test_an_existing_profile_is_replaced_by_force_only(tmp_path: Path) -> None:
    cache, out = save(tmp_path / "a.kv", [[10, 2], [4, 4]]), tmp_path / "profile.json"
    run(cache, "-o", out)
    assert "--force" in refusal(OutputError, cache, "-o", out)
    run(cache, "-o", out, "--force")


def test_caches_of_two_models_are_refused_by_name(tmp_path: Path) -> None:
    first = save(tmp_path / "a.kv", [[10, 2], [4, 4]], name="one/model")
    other = save(tmp_path / "b.kv", [[10, 2], [4, 4]], name="other/model", weights_fingerprint="x" * 64)
    message = refusal(MismatchError, first, other, "-o", tmp_path / "profile.json")
    assert all(words in message for words in ("one/model", "other/model", "a.kv", "b.kv", "weights"))
    assert not (tmp_path / "profile.json").exists()
    moved = save(tmp_path / "c.kv", [[10, 2], [4, 4]], name="another/name/of/one")
    assert make_profile([first, moved]).num_caches == 2


def test_a_cache_that_keeps_everything_teaches_nothing(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.kv", [[20, 20], [20, 20]])
    assert "keeps every key" in refusal(SettingsError, whole, "-o", tmp_path / "profile.json")


def test_a_profile_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    run(save(tmp_path / "a.kv", [[10, 2], [4, 4]]), "-o", out)
    here = make_metadata(sliding_windows=WINDOWS).model
    for changed in (
        replace(here, name="other/model", weights_fingerprint="x" * 64),
        replace(here, name="other/model", family="qwen3"),
        replace(here, name="other/model", num_layers=4),
    ):
        with pytest.raises(MismatchError) as caught:
            read_profile(out, changed)
        assert "example/model" in str(caught.value) and "other/model" in str(caught.value)
    read_profile(out, replace(here, name="moved", weights_fingerprint=""))  # not computed: not compared


def test_a_damaged_profile_is_refused_with_a_remedy(tmp_path: Path) -> None:
    out, here = tmp_path / "profile.json", make_metadata(sliding_windows=WINDOWS).model
    run(save(tmp_path / "a.kv", [[10, 2], [4, 4]]), "-o", out)
    good = json.loads(out.read_text())
    damages: list[dict[str, Any]] = [
        {"format_version": 2},
        {"format_version": None},
        {"shares": [[0.5, 0.5]]},
        {"shares": [[0.5, 0.2], [0.2, 0.2]]},
        {"shares": [[1.5, -0.5], [0.0, 0.0]]},
        {"shares": [["a", 0.5], [0.2, 0.2]]},
        {"shares": 3},
        {"layers": [0, 7]},
        {"layers": [2, 0]},
        {"layers": []},
        {"model": {}},
        {"num_caches": 0},
        {"mean_keep_ratio": "x"},
    ]
    for damage in damages:
        out.write_text(json.dumps({**good, **damage}))
        with pytest.raises(SettingsError, match="compactor budget"):
            read_profile(out, here)
    for text in ("", "[]", "{", "\0"):
        out.write_text(text)
        with pytest.raises(SettingsError, match="compactor budget"):
            read_profile(out, here)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_profile(tmp_path / "none.json", here)


# -------------------------------------------------------------------------------------------------- the counts


def test_counts_sum_to_the_total_within_their_bounds_and_follow_the_shares() -> None:
    for seed, total in product(range(8), (12, 13, 200, 1150, 1199, 1200)):
        shares = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)).double() ** 6
        counts = allocate_by_shares(shares, total, 100)
        assert (counts.dtype, counts.shape, int(counts.sum())) == (torch.int64, shares.shape, total)
        assert int(counts.min()) >= 1 and int(counts.max()) <= 100
        free = (counts > 1) & (counts < 100)
        if bool(free.any()):  # what is at no bound is in proportion, to a key
            scale = counts[free].sum() / shares[free].sum()
            assert float((counts[free] - scale * shares[free]).abs().max()) <= 1.0


def test_without_bounds_it_is_the_largest_remainder() -> None:
    shares = torch.tensor([[0.415, 0.285, 0.3]])
    assert allocate_by_shares(shares, 10, 100).tolist() == [[4, 3, 3]]
    assert allocate_by_shares(torch.tensor([[0.45, 0.26, 0.29]]), 10, 100).tolist() == [[4, 3, 3]]
    assert allocate_by_shares(torch.full((1, 3), 1 / 3), 11, 100).tolist() == [[4, 4, 3]]


def test_what_a_full_head_cannot_take_goes_to_the_others_in_proportion() -> None:
    assert allocate_by_shares(torch.tensor([[0.7, 0.2, 0.1]]), 90, 50).tolist() == [[50, 27, 13]]
    assert allocate_by_shares(torch.tensor([[1.0, 0.0, 0.0]]), 51, 50).tolist() == [[49, 1, 1]]
    assert allocate_by_shares(torch.tensor([[1.0, 0.0, 0.0]]), 60, 50).tolist() == [[50, 5, 5]]
    assert allocate_by_shares(torch.zeros(1, 2), 7, 50).tolist() == [[4, 3]]


def test_each_head_may_have_its_own_bound() -> None:
    most = torch.tensor([[3, 0, 90]])
    assert allocate_by_shares(torch.tensor([[0.5, 0.0, 0.5]]), 20, most).tolist() == [[3, 0, 17]]


def test_too_few_and_too_many_keys_are_refused() -> None:
    for total in (2, 151):
        with pytest.raises(SettingsError, match=r"3 \(one a head\) to 150"):
            allocate_by_shares(torch.ones(1, 3), total, 50)
