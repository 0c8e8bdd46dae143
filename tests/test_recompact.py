"""Claims about recompacting: what leaves is taken over, nothing else changes, and a foreign sidecar is refused."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import Command
from scipy.linalg import lstsq
from scipy.optimize import lsq_linear
from small_caches import DTYPES, assert_bit_equal, make_layer, make_metadata
from tiny_models import TRAINING_TEXT, make_tiny
from typer.testing import CliRunner

from compactor import pipeline
from compactor.attach import load
from compactor.cache_file import load_cache, save_cache
from compactor.cli.recompact import recompact_command
from compactor.config import BASELINES, CompactSettings, DecodeSettings
from compactor.curves import Curves, LayerCurves, curves_path, load_curves, remove_stale_curves, save_curves
from compactor.document import make_document
from compactor.errors import CacheFileError, CompactorError, OutputError, SettingsError
from compactor.evaluate.compare import compare_answers
from compactor.job import prepare
from compactor.model import load_model
from compactor.pipeline import compact_prefilled
from compactor.recompact import recompact, shrink_cache
from compactor.solve.budget import allocate
from compactor.solve.shrink import HeadCurve, chunk_blocks, chunk_grams, shrink_head, smaller_counts
from compactor.study import prefill_document
from compactor.types import CacheMetadata, LayerCache

APP = typer.Typer()
APP.command("recompact")(recompact_command)
BOX = {"lower": math.exp(-3.0), "upper": math.exp(7.0)}
EXACT = {**BOX, "prior": 0.0, "ridge": 1e-12}


def attention(num_rows: int, num_keys: int, seed: int = 0) -> torch.Tensor:
    """Rows of attention to some keys, float64: peaked, none sums to more than 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2.0 * torch.randn(num_rows, num_keys + 1, generator=generator, dtype=torch.float64)
    return scores.softmax(-1)[:, :-1]


def curve_of(rows: torch.Tensor, positions: Sequence[int] | None = None, chunk: int = 1024) -> HeadCurve:
    """The curve of keys whose columns are ``rows``; the gains fall with the squared norm of a column."""
    gram = rows.T @ rows
    where = torch.arange(rows.shape[1]) if positions is None else torch.tensor(positions)
    return chunk_blocks(gram, where, chunk, gains=gram.diagonal())


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------- one head


def test_blocks_are_the_gram_matrix_of_each_chunk_to_float16() -> None:
    rows, positions = attention(300, 9), torch.tensor([0, 1, 7, 8, 9, 16, 30, 31, 40])
    curve = chunk_blocks(rows.T @ rows, positions, 8, gains=torch.arange(9.0), currency=0.25)
    assert curve.chunk_lengths == [3, 2, 1, 2, 0, 1]
    start = 0
    for block, length in zip(chunk_grams(curve), curve.chunk_lengths, strict=True):
        own = rows[:, start : start + length]
        torch.testing.assert_close(block, 0.25 * own.T @ own, rtol=2**-10, atol=0)
        start += length


def test_a_key_whose_column_is_anothers_double_is_absorbed_exactly() -> None:
    rows = attention(200, 5)
    rows = torch.cat([rows, 0.5 * rows[:, 2:3]], dim=1)  # key 5 has half the gain of key 2 and goes first
    biases, values = numbers(6) * 0.3, numbers(6, 4, seed=2)
    curve = replace(curve_of(rows), gains=torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 1.0]))
    head = shrink_head(curve, biases, values, 5, **EXACT)
    before = rows * biases.double().exp()
    after = rows[:, head.kept] * head.biases.double().exp()
    assert head.kept.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(after.sum(1), before.sum(1), rtol=1e-3, atol=0)
    torch.testing.assert_close(after @ head.values.double(), before @ values.double(), rtol=1e-3, atol=1e-4)
    weight, double = biases.double().exp()[2], 0.5 * biases.double().exp()[5]
    assert float(head.biases[2].exp()) == pytest.approx(float(weight + double), rel=1e-3)
    expected = (weight * values[2] + double * values[5]) / (weight + double)
    torch.testing.assert_close(head.values[2].double(), expected.double(), rtol=1e-3, atol=1e-3)
    for other in (0, 1, 3, 4):
        torch.testing.assert_close(head.biases[other], biases[other], rtol=0, atol=3e-3)
        torch.testing.assert_close(head.values[other], values[other], rtol=0, atol=3e-3)


def test_one_chunk_agrees_with_scipy() -> None:
    """Biases with lsq_linear on the rows themselves, values with lstsq on the rows and a row per pull."""
    rows = attention(400, 24, seed=3)
    biases, values, prior, ridge = 0.5 * numbers(24), numbers(24, 5, seed=4), 1e-3, 1e-2
    lower, upper = math.exp(-0.5), math.exp(0.8)  # narrow: several biases end at a bound
    biases = biases.clamp(-0.5, 0.8)
    curve = curve_of(rows)
    head = shrink_head(curve, biases, values, 10, lower=lower, upper=upper, prior=prior, ridge=ridge)
    weights = biases.double().exp()
    before, norms = rows * weights, rows.norm(dim=0)
    own = rows[:, head.kept]
    pull = prior**0.5 * torch.diag(norms[head.kept])
    system = torch.cat([own, pull])
    target = torch.cat([before.sum(1), pull @ weights[head.kept]])
    oracle = torch.from_numpy(lsq_linear(system.numpy(), target.numpy(), (lower, upper), tol=1e-14).x)
    bounded = ((oracle - lower).abs() < 1e-6) | ((oracle - upper).abs() < 1e-6)
    assert 0 < int(bounded.sum()) < 10
    torch.testing.assert_close(head.biases.double().exp(), oracle, rtol=0, atol=5e-3)
    mass = before.sum(1)
    mean = (mass.unsqueeze(1) * (before @ values.double())).sum(0) / (mass.square()).sum()
    b = head.biases.double().exp()
    wanted = before @ (values.double() - mean) - (own * b) @ (values[head.kept].double() - mean)
    strength = ridge * (norms.square() * weights.square()).mean()
    system = torch.cat([own * b, strength**0.5 * torch.eye(10, dtype=torch.float64)])
    change = torch.from_numpy(lstsq(system.numpy(), torch.cat([wanted, torch.zeros(10, 5)]).numpy())[0])
    torch.testing.assert_close(head.values.double() - values[head.kept].double(), change, rtol=0, atol=0.02)
    error = (own * b) @ (head.values.double() - mean) - before @ (values.double() - mean)
    assert head.squared_error == pytest.approx(float(error.square().sum()), rel=0.02)


def test_all_keys_stay_bit_for_bit_and_err_by_nothing() -> None:
    rows, biases, values = attention(100, 12), numbers(12), numbers(12, 4, seed=2).bfloat16()
    head = shrink_head(curve_of(rows, chunk=5), biases, values, 12, **BOX)
    assert head.kept.tolist() == list(range(12))
    assert torch.equal(head.biases, biases)
    assert torch.equal(head.values, values.float())
    assert head.squared_error == 0.0


def test_a_chunk_that_loses_no_key_stays_bit_for_bit() -> None:
    rows, biases, values = attention(100, 12), numbers(12), numbers(12, 4, seed=2)
    curve = replace(curve_of(rows, chunk=6), gains=torch.tensor([*range(12, 6, -1), 9.0, 8.5, 8.2, 1.0, 2.0, 3.0]))
    head = shrink_head(curve, biases, values, 9, **BOX)
    assert head.kept.tolist() == list(range(9))
    assert torch.equal(head.biases[:6], biases[:6]) and not torch.equal(head.biases[6:], biases[6:9])
    assert torch.equal(head.values[:6], values[:6]) and not torch.equal(head.values[6:], values[6:9])


def test_a_chunk_that_loses_every_key_is_an_error_of_all_that_it_delivered() -> None:
    rows, biases, values = attention(100, 8), numbers(8), numbers(8, 4, seed=2)
    curve = replace(curve_of(rows, chunk=4), gains=torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    head = shrink_head(curve, biases, values, 4, **BOX)
    assert torch.equal(head.biases, biases[:4]) and head.curve.chunk_lengths == [4, 0]
    before = rows * biases.double().exp()
    masses = torch.cat([before[:, part].sum(1, keepdim=True).expand(-1, 4) for part in (slice(4), slice(4, 8))], dim=1)
    counts = (masses * before).sum(0)
    delivered = before[:, 4:] @ (values.double() - counts @ values.double() / counts.sum())[4:]
    assert head.squared_error == pytest.approx(float(delivered.square().sum()), rel=1e-2)


def test_a_key_that_nobody_sees_keeps_bias_and_value() -> None:
    rows = attention(100, 6)
    rows[:, 3] = 0.0
    biases, values = numbers(6), numbers(6, 4, seed=2)
    curve = replace(curve_of(rows), gains=torch.tensor([1.0, 2.0, 3.0, 9.0, 8.0, 7.0]))
    head = shrink_head(curve, biases, values, 3, **BOX)
    assert head.kept.tolist() == [3, 4, 5]
    assert float(head.biases[0]) == pytest.approx(float(biases[3]), abs=1e-6)
    torch.testing.assert_close(head.values[0], values[3])
    nothing = shrink_head(curve_of(torch.zeros(10, 6)), biases, values, 2, **BOX)
    assert torch.isfinite(nothing.values).all() and torch.isfinite(nothing.biases).all()


def test_shrinking_errs_less_than_dropping_and_no_less_than_a_fit_to_the_rows() -> None:
    """Output errors of a head under its own normaliser, on the rows: fit < shrink < drop."""
    generator = torch.Generator().manual_seed(7)
    keys, values = numbers(60, 8, seed=5).double(), numbers(60, 4, seed=6).double()
    scores = 0.8 * torch.randn(500, 8, generator=generator, dtype=torch.float64) @ keys.T
    outside = scores.logsumexp(1, keepdim=True) - 0.3  # prefix and local keys, with an output of 0
    rows = (scores - torch.logaddexp(scores.logsumexp(1, keepdim=True), outside)).exp()
    curve = curve_of(rows, chunk=20)
    head = shrink_head(curve, torch.zeros(60), values.float(), 15, **BOX)

    def output(kept: torch.Tensor, biases: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        biased = scores[:, kept] + biases
        return (biased - torch.logaddexp(biased.logsumexp(1, keepdim=True), outside)).exp() @ own

    truth = output(torch.arange(60), torch.zeros(60), values)
    dropped = (output(head.kept, torch.zeros(15), values[head.kept]) - truth).square().sum()
    shrunk = (output(head.kept, head.biases.double(), head.values.double()) - truth).square().sum()
    b = torch.from_numpy(lsq_linear(rows[:, head.kept].numpy(), rows.sum(1).numpy(), tuple(BOX.values())).x)
    biased = scores[:, head.kept] + b.log()
    shares = (biased - torch.logaddexp(biased.logsumexp(1, keepdim=True), outside)).exp()
    fitted = (shares @ torch.linalg.lstsq(shares, truth).solution - truth).square().sum()
    assert float(fitted) < float(shrunk) < 0.8 * float(dropped)


def test_two_steps_down_keep_the_same_keys_as_one() -> None:
    rows, biases, values = attention(300, 40), 0.3 * numbers(40), numbers(40, 4, seed=2)
    curve = curve_of(rows, chunk=16)
    once = shrink_head(curve, biases, values, 10, **BOX)
    half = shrink_head(curve, biases, values, 20, **BOX)
    twice = shrink_head(half.curve, half.biases, half.values, 10, **BOX)
    assert torch.equal(half.kept[twice.kept], once.kept)
    assert twice.curve.chunk_lengths == once.curve.chunk_lengths
    for mine, theirs in zip(twice.curve.blocks, once.curve.blocks, strict=True):
        assert torch.equal(mine, theirs)


# ----------------------------------------------------------------------------------------------------- counts


def heads_with(gains: Sequence[Sequence[float]]) -> list[HeadCurve]:
    return [HeadCurve(torch.tensor(own), torch.ones(len(own)), [torch.eye(len(own)).half()]) for own in gains]


def test_counts_are_those_of_the_first_ranking() -> None:
    gains = numbers(2, 3, 50).exp().sort(dim=-1, descending=True).values
    expected = allocate(gains, 60)
    wide = allocate(gains, 150)  # what a larger cache kept
    curves = [
        heads_with([g[:n].flip(0).tolist() for g, n in zip(*pair, strict=True)])
        for pair in zip(gains, wide, strict=True)
    ]
    assert smaller_counts(curves, 60) == expected.tolist()
    assert smaller_counts(curves, 150) == wide.tolist()


def test_a_head_with_fewer_keys_than_the_floor_keeps_them_all() -> None:
    curves = [heads_with([[1e-3], [], [float(i) for i in range(1, 100)]])]
    assert smaller_counts(curves, 60) == [[1, 0, 59]]
    with pytest.raises(SettingsError, match="1 document keys over 2 heads"):
        smaller_counts(curves, 1)


# ------------------------------------------------------------------------------------------------ whole caches


def make_cache(
    *,
    keep: float = 0.5,
    windows: Sequence[int | None] = (None, 6, None),
    document_tokens: int = 60,
    chunk: int = 20,
    **settings: Any,
) -> tuple[list[LayerCache], CacheMetadata, list[LayerCurves]]:
    """A cache of random numbers with curves of random attention; heads keep different numbers of keys."""
    metadata = make_metadata(sliding_windows=windows, document_tokens=document_tokens)
    fidelity = {"mean_kl": 0.01}
    report = {
        "document_keys": 240,
        "kept_keys": 120,
        "reference_rows": {"repeat": 9},
        "fidelity": fidelity,
        "seconds": {"fit": 1.0},
    }
    metadata = replace(metadata, report=report, settings={"keep_ratio": keep, "require_kl": 0.1, **settings})
    layers, curves = [], []
    for index, window in enumerate(windows):
        length, prefix = metadata.logical_length, metadata.prefix_length
        if window is not None:
            last = range(length - window + 1, length)
            layers.append(make_layer(metadata, [last] * 2, sliding_window=window, seed=index))
            curves.append(None)
            continue
        positions = []
        heads: list[HeadCurve] = []
        for head, share in enumerate((keep + 0.2, keep - 0.2)):
            count = round(share * document_tokens)
            chosen = (
                torch.randperm(document_tokens, generator=torch.Generator().manual_seed(head))[:count].sort().values
            )
            positions.append([*range(prefix), *(chosen + prefix).tolist()])
            heads.append(curve_of(attention(200, count, seed=3 * index + head), chosen.tolist(), chunk))
        layers.append(make_layer(metadata, positions, seed=index))
        curves.append(heads)
    return layers, metadata, curves


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a cache with its sidecar, alone in a folder."""
    layers, metadata, curves = make_cache()
    path = tmp_path / "doc.kv"
    save_cache(path, layers, metadata)
    save_curves(path, curves, chunk=20)
    return path


def run(*arguments: object) -> str:
    """Return what the command writes to stdout; what it raises is raised."""
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(kind: type[CompactorError], *arguments: object) -> str:
    """Return the sentence with which the command refuses."""
    with pytest.raises(kind) as caught:
        run(*arguments)
    return str(caught.value)


def test_the_sidecar_comes_back_as_it_was_and_is_its_owners_only(saved: Path) -> None:
    _, _, curves = make_cache()
    read = load_curves(saved)
    assert read.chunk == 20 and read.layers[1] is None
    for mine, theirs in zip(read.layers, curves, strict=True):
        for own, other in zip(mine or [], theirs or [], strict=True):
            assert torch.equal(own.gains, other.gains) and torch.equal(own.diagonals, other.diagonals)
            assert own.chunk_lengths == other.chunk_lengths
            for left, right in zip(own.blocks, other.blocks, strict=True):
                torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert stat.S_IMODE(curves_path(saved).stat().st_mode) == 0o600


def test_equal_curves_give_equal_bytes(saved: Path) -> None:
    first = curves_path(saved).read_bytes()
    save_curves(saved, make_cache()[2], chunk=20, force=True)
    assert curves_path(saved).read_bytes() == first


def test_a_recompacted_file_is_an_ordinary_cache_that_tells_where_it_came_from(saved: Path) -> None:
    before, _ = load_cache(saved)
    small = saved.parent / "small.kv"
    text = run(saved, "-o", small, "--keep-ratio", 0.2)
    assert "120 -> 48 of 240 document keys (50.0% -> 20.0%)" in text and "not measured" in text
    layers, metadata = load_cache(small)
    assert sum(sum(layer.head_lengths) for layer in (layers[0], layers[2])) == 48 + 4 * 2
    assert_bit_equal(layers[1], before[1])
    for old, new in ((before[0], layers[0]), (before[2], layers[2])):
        for (a, b), (c, d) in zip(pairwise(old.offsets.tolist()), pairwise(new.offsets.tolist()), strict=True):
            member = torch.isin(old.positions[a:b], new.positions[c:d])
            assert int(member.sum()) == d - c
            assert torch.equal(old.keys[a:b][member], new.keys[c:d])
            assert torch.equal(old.values[a : a + 2], new.values[c : c + 2])
            assert not new.biases[c : c + 2].any()
    report = metadata.report
    assert report["fidelity"] is None and report["recompacted_from"]["fidelity"] == {"mean_kl": 0.01}
    assert report["kept_keys"] == 48 and report["kept_ratio"] == pytest.approx(0.2)
    assert report["recompacted_from"]["kept_ratio"] == pytest.approx(0.5)
    assert report["tensor_bytes"] == sum(layer.nbytes for layer in layers)
    assert report["reference_rows"] == {"repeat": 9} and "seconds" not in report
    assert 0 < report["recompaction_error"] < 1
    assert metadata.settings["keep_ratio"] == 0.2 and metadata.settings["require_kl"] is None


def test_recompacting_can_be_done_again_and_to_the_same_size_changes_nothing(saved: Path) -> None:
    half, same, small = (saved.parent / name for name in ("half.kv", "same.kv", "small.kv"))
    run(saved, "-o", half, "--target-tokens", 20)
    run(half, "-o", same, "--target-tokens", 20)
    for mine, theirs in zip(load_cache(half)[0], load_cache(same)[0], strict=True):
        assert_bit_equal(mine, theirs)
    run(half, "-o", small, "-r", 0.1)
    report = load_cache(small)[1].report
    assert report["kept_keys"] == 24
    assert report["recompacted_from"]["recompacted_from"]["kept_keys"] == 120


def test_max_bytes_is_met_and_nearly_used(saved: Path) -> None:
    small = saved.parent / "small.kv"
    answer = json.loads(run(saved, "-o", small, "--max-bytes", 2000, "--json"))
    used = sum(layer.nbytes for layer in load_cache(small)[0])
    assert 2000 - 24 < used <= 2000 and answer["report"]["tensor_bytes"] == used
    assert answer["file_bytes"] == small.stat().st_size
    assert answer["curves_bytes"] == curves_path(small).stat().st_size
    assert "the least is" in refusal(SettingsError, saved, "-o", saved.parent / "none.kv", "--max-bytes", 100)


def test_a_cache_of_a_budget_profile_keeps_its_proportions() -> None:
    layers, metadata, curves = make_cache(budget="profile.json")
    smaller = shrink_cache(layers, metadata, Curves(curves, 20), CompactSettings(keep_ratio=0.25))
    lengths = [[length - 2 for length in smaller.layers[index].head_lengths] for index in (0, 2)]
    assert lengths == [[21, 9], [21, 9]]


@pytest.mark.parametrize("target", [("--keep-ratio", 0.51), ("--target-tokens", 31), ("--max-bytes", 10**6)])
def test_a_larger_size_is_refused_and_points_to_compact(saved: Path, target: tuple[str, object]) -> None:
    message = refusal(SettingsError, saved, "-o", saved.parent / "large.kv", *target)
    assert "keeps 120 document keys" in message and "run compact on the document again" in message
    assert not (saved.parent / "large.kv").exists()


def test_sizes_must_be_one_and_in_range(saved: Path) -> None:
    out = saved.parent / "small.kv"
    assert "Give the new size" in refusal(SettingsError, saved, "-o", out)
    assert "only one" in refusal(SettingsError, saved, "-o", out, "-r", 0.1, "--max-bytes", 900)
    assert "--keep-ratio is 2" in refusal(SettingsError, saved, "-o", out, "-r", 2)


def test_without_a_sidecar_it_says_which_option_makes_one(saved: Path) -> None:
    curves_path(saved).unlink()
    message = refusal(CacheFileError, saved, "-o", saved.parent / "small.kv", "-r", 0.1)
    assert "has no curves beside it" in message and "--keep-curves" in message


def test_the_sidecar_of_another_cache_is_refused(saved: Path) -> None:
    layers, metadata, _ = make_cache()
    save_cache(saved, layers, replace(metadata, seed=5), force=True)  # the same keys, a later file
    message = refusal(CacheFileError, saved, "-o", saved.parent / "small.kv", "-r", 0.1)
    assert "does not belong to this doc.kv" in message and "--keep-curves" in message


def test_every_flipped_byte_of_the_sidecar_is_noticed(saved: Path) -> None:
    path = curves_path(saved)
    raw = path.read_bytes()
    for place in [*range(16), *range(16, len(raw), 211), len(raw) - 1]:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(CacheFileError):
            load_curves(saved)
    for cut in (b"", raw[:4], raw[:100], raw[:-1], raw + b"x"):
        path.write_bytes(cut)
        with pytest.raises(CacheFileError):
            load_curves(saved)
    path.write_bytes(raw)
    load_curves(saved)


def test_existing_files_are_replaced_by_force_only_and_in_place_works(saved: Path) -> None:
    out = saved.parent / "small.kv"
    out.write_text("mine")
    assert "--force" in refusal(OutputError, saved, "-o", out, "-r", 0.1)
    out.unlink()
    curves_path(out).write_text("mine")
    assert "--force" in refusal(OutputError, saved, "-o", out, "-r", 0.1)
    assert not out.exists()
    run(saved, "-o", saved, "-r", 0.1, "--force")
    assert load_cache(saved)[1].report["kept_keys"] == 24
    load_curves(saved)


def test_curves_of_other_keys_are_not_written(saved: Path) -> None:
    curves = make_cache(keep=0.6)[2]
    with pytest.raises(OutputError, match="not those of the keys"):
        save_curves(saved, curves, chunk=20, force=True)
    with pytest.raises(OutputError, match="sliding window"):
        save_curves(saved, [None, None, None], chunk=20, force=True)
    bad = make_cache()[2]
    assert bad[0] is not None
    bad[0][0] = replace(bad[0][0], diagonals=bad[0][0].diagonals * math.nan)
    with pytest.raises(OutputError, match="not finite"):
        save_curves(saved, bad, chunk=20, force=True)


def test_a_library_call_does_the_same(saved: Path) -> None:
    first, second = saved.parent / "a.kv", saved.parent / "b.kv"
    run(saved, "-o", first, "-r", 0.2)
    smaller = recompact(saved, second, CompactSettings(keep_ratio=0.2))
    assert second.read_bytes() == first.read_bytes()
    assert DTYPES[smaller.metadata.dtype] == smaller.layers[0].keys.dtype


# ------------------------------------------------------------------------------------------------- end to end

KEEPING = ("--device", "cpu", "--no-certify", "--quiet", "--keep-curves")
STUDYING = ("--self-study-tokens", "32", "--chunk", "64")
QUESTION = "What does clause 7 say?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models, one with sliding layers, and a document."""
    folder = tmp_path_factory.mktemp("recompact")
    for family in ("llama", "gemma3_text"):
        make_tiny(family, folder / family)
    (folder / "doc.txt").write_text(TRAINING_TEXT * 2)
    return folder


@pytest.mark.parametrize(("family", "method"), [("llama", "balanced"), ("llama", "fast"), ("gemma3_text", "balanced")])
def test_compact_keeps_curves_and_a_smaller_file_made_of_them_answers(
    family: str, method: str, invoke: Command, folder: Path, tmp_path: Path
) -> None:
    words = ("compact", folder / "doc.txt", "-m", folder / family, *KEEPING, "--method", method)
    done = invoke(*words, "--keep-ratio", "0.5", *(STUDYING if method == "balanced" else ()))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doc.kv", "doc.kv.curves"]
    large, _ = load_cache(tmp_path / "doc.kv")
    for layer, curves in zip(large, load_curves(tmp_path / "doc.kv").layers, strict=True):
        assert (curves is None) == (layer.sliding_window is not None)

    made = invoke("recompact", "doc.kv", "-o", "small.kv", "--keep-ratio", "0.2", "--json")
    assert (made.returncode, made.stderr) == (0, ""), made.stderr
    report = json.loads(made.stdout)["report"]
    assert report["kept_keys"] == round(0.2 * report["document_keys"])
    assert report["recompacted_from"]["kept_keys"] == round(0.5 * report["document_keys"])
    assert 0 < report["recompaction_error"] < 1
    if method == "fast":  # whose keys only go
        small, _ = load_cache(tmp_path / "small.kv")
        for one, other in zip(small, large, strict=True):
            rows = [tuple(row) for row in torch.cat([other.keys, other.values], dim=1).tolist()]
            assert {tuple(row) for row in torch.cat([one.keys, one.values], dim=1).tolist()} <= set(rows)
            assert not one.biases.any()
    assert (tmp_path / "small.kv").stat().st_size < (tmp_path / "doc.kv").stat().st_size
    asked = invoke("query", "small.kv", "--device", "cpu", "-n", "4", "--json", QUESTION)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["usage"]["answer_tokens"] > 0
    again = invoke("recompact", "small.kv", "-o", "smaller.kv", "--target-tokens", "5")
    assert again.returncode == 0, again.stderr


def test_a_recompacted_cache_is_far_nearer_to_the_full_one_than_chance(folder: Path, tmp_path: Path) -> None:
    job = prepare(
        make_document("doc", TRAINING_TEXT * 2),
        load_model(str(folder / "llama"), device="cpu"),
        CompactSettings(keep_ratio=0.6, self_study_tokens=32, chunk=64, certify=False, keep_curves=True),
    )
    full = prefill_document(job)
    compact_prefilled(job, full).save(tmp_path / "doc.kv")
    recompact(tmp_path / "doc.kv", tmp_path / "small.kv", CompactSettings(keep_ratio=0.3))
    results = compare_answers(job, full, load(tmp_path / "small.kv"), [QUESTION], DecodeSettings(max_new_tokens=16))
    kl = results[0].kl
    assert 0 < kl["compacted"] < 0.5 * min(kl["random keys"], kl["truncated document"])


def test_a_cache_without_its_sidecar_cannot_be_recompacted(invoke: Command, folder: Path, tmp_path: Path) -> None:
    """One that was made without --keep-curves, also in place of one that had curves: theirs go with it."""
    words = ("compact", folder / "doc.txt", "-m", folder / "llama", "--method", "fast", *KEEPING[:-1], "-o", "doc.kv")
    assert invoke(*words).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["doc.kv"]
    done = invoke("recompact", "doc.kv", "-o", "small.kv", "-r", "0.05")
    assert (done.returncode, done.stdout) == (5, "")
    [error] = done.stderr.splitlines()
    assert error.startswith("error: doc.kv has no curves beside it") and "--keep-curves" in error
    assert invoke(*words, "--keep-curves", "--force").returncode == 0
    assert invoke(*words, "--seed", "1", "--keep-ratio", "0.2", "--force").returncode == 0
    done = invoke("recompact", "doc.kv", "-o", "small.kv", "-r", "0.05")
    assert done.returncode == 5 and "has no curves beside it" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["doc.kv"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep-ratio", "1"), "--keep-curves with --keep-ratio 1 has nothing to learn"),
        (("--target-tokens", "100000"), "--keep-curves has nothing to learn where every key is kept"),
        *((("--method", method), "--keep-curves; leave") for method in BASELINES),
    ],
)
def test_curves_that_cannot_be_learnt_are_refused(
    options: tuple[str, ...], words: str, invoke: Command, folder: Path, tmp_path: Path
) -> None:
    done = invoke("compact", folder / "doc.txt", "-m", folder / "llama", *KEEPING, *options)
    assert (done.returncode, done.stdout) == (2, "")
    [error] = done.stderr.splitlines()
    assert error.startswith("error: ") and words in error
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_between_the_two_files_says_which_is_there(
    invoke: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "save_curves", interrupt)
    done = invoke("compact", folder / "doc.txt", "-m", folder / "llama", "--method", "fast", *KEEPING, "-o", "doc.kv")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "error: interrupted; doc.kv is written, its curves are not\n"
    load_cache(tmp_path / "doc.kv")
    assert [path.name for path in tmp_path.iterdir()] == ["doc.kv"]


def test_a_sidecar_in_the_way_is_refused_before_the_work(invoke: Command, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "doc.kv.curves").write_text("mine")
    done = invoke("compact", "missing.txt", "-o", "doc.kv", *KEEPING)
    assert done.returncode == 7
    assert done.stderr == "error: doc.kv.curves exists already; pass --force to replace it.\n"
    assert (tmp_path / "doc.kv.curves").read_text() == "mine"


def test_a_batch_keeps_curves_beside_every_cache(invoke: Command, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "docs" / name).write_text(f"{name}: {TRAINING_TEXT}")
    words = ("batch", "docs", "-o", "out", "-m", folder / "llama", *KEEPING, "--method", "fast", "--keep-ratio", "0.5")
    assert invoke(*words).returncode == 0
    for name in ("a", "b"):
        small = invoke("recompact", f"out/{name}.txt.kv", "-o", f"{name}.kv", "-r", "0.2")
        assert small.returncode == 0, small.stderr
    assert "2 unchanged" in invoke(*words).stdout


@pytest.mark.parametrize("damage", ["missing", "of another cache", "cut off", "of another kind"])
def test_a_batch_makes_a_sidecar_again_that_is_not_there(
    damage: str, invoke: Command, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "docs" / name).write_text(f"{name}: {TRAINING_TEXT}")
    words = ("batch", "docs", "-o", "out", "-m", folder / "llama", *KEEPING, "--method", "fast", "--keep-ratio", "0.5")
    assert invoke(*words).returncode == 0
    curves = tmp_path / "out" / "a.txt.kv.curves"
    sound = curves.read_bytes()
    if damage == "missing":
        curves.unlink()
    else:
        other = (tmp_path / "out" / "b.txt.kv.curves").read_bytes()
        curves.write_bytes({"of another cache": other, "cut off": sound[:100], "of another kind": b"[]"}[damage])
    assert "1 to compact, 1 unchanged" in invoke(*words, "--dry-run").stdout
    assert "1 done, 1 unchanged" in invoke(*words).stdout
    assert curves.read_bytes() == sound


def test_only_our_own_sidecar_goes_with_the_cache_that_it_belonged_to(tmp_path: Path) -> None:
    """A file of the user's at the sidecar's name is never removed, whatever it holds."""
    cache = tmp_path / "doc.kv"
    for theirs in (b"", b"my notes on curves", b"\x10\0\0\0\0\0\0\0" + b'{"a":1}'):
        curves_path(cache).write_bytes(theirs)
        remove_stale_curves(cache)
        assert curves_path(cache).read_bytes() == theirs
    curves_path(cache).unlink()
    remove_stale_curves(cache)
    assert not curves_path(cache).exists()
