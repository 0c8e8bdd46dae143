"""Claims about ``compactor bench solver``: its layers look as those of models do, its errors are errors, sizes are
equal."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import Command
from test_half_path import fused, product
from torch.utils.flop_counter import FlopCounterMode

from compactor import attention
from compactor.attach import dense_heads
from compactor.bench import contestants, solver, synthetic
from compactor.bench.settings import SOLVER_METHODS, SolverSettings
from compactor.bench.synthetic import LayerShape, SyntheticLayer, make_document, make_layers
from compactor.errors import SettingsError
from compactor.methods import attention_matching_omp as omp
from compactor.solve import gram
from compactor.types import LayerCache, SilentReporter

CPU = torch.device("cpu")
SMALL = LayerShape(heads=2, keys=256, rows=256, held_out_rows=64, head_dim=16)
STEPS = 7
KEEP = 20
SIZES = ("--heads", "2", "--keys", "256", "--rows", "256", "--head-dim", "16", "--keep", "20")


def layers_of(
    shape: LayerShape, count: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[SyntheticLayer]:
    return make_layers(shape, count, seed=seed, device=CPU, dtype=dtype)


def attention_of(layer: SyntheticLayer, queries: torch.Tensor | None = None) -> torch.Tensor:
    """Return attention of all heads in float64, (heads, rows, keys)."""
    rows = layer.queries if queries is None else queries
    return (rows.double() @ dense_heads(layer.full)[0][0].double().mT * layer.scaling).softmax(-1)


def heads_of(layer: LayerCache) -> list[slice]:
    bounds = layer.offsets.tolist()
    return [slice(first, last) for first, last in pairwise(bounds)]


@pytest.fixture(scope="module")
def small() -> list[SyntheticLayer]:
    return layers_of(SMALL, 3)


# ------------------------------------------------------------------------------------------------ synthetic layers


@pytest.fixture(scope="module")
def wide() -> tuple[LayerShape, SyntheticLayer, torch.Tensor]:
    """Heads that are large enough for statistics, and their attention."""
    shape = LayerShape(heads=6, keys=2048, rows=1024, held_out_rows=256, head_dim=64)
    (layer,) = layers_of(shape, seed=5)
    return shape, layer, attention_of(layer)


Wide = tuple[LayerShape, SyntheticLayer, torch.Tensor]


def test_equal_seeds_give_equal_layers_and_others_differ() -> None:
    first, again, other = (layers_of(SMALL, 2, seed)[1] for seed in (1, 1, 2))
    for name in ("queries", "held_out"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert torch.equal(first.full.keys, again.full.keys) and torch.equal(first.full.values, again.full.values)
    assert not torch.equal(first.full.keys, layers_of(SMALL, 2, 1)[0].full.keys)
    assert not torch.equal(first.held_out, first.queries[:, :64])


def test_the_first_layers_do_not_depend_on_how_many_there_are() -> None:
    assert torch.equal(layers_of(SMALL, 1)[0].queries, layers_of(SMALL, 3)[0].queries)


def test_the_sink_has_a_large_share_of_most_rows(wide: Wide) -> None:
    _, _, shares = wide
    medians = shares[:, :, 0].quantile(0.5, dim=1)
    low, high = synthetic.SINK_SHARE
    assert bool(((medians > 0.5 * low) & (medians < high + 0.1)).all())


def test_a_few_keys_are_seen_by_many_rows_but_not_by_far_all_attention_goes_there(wide: Wide) -> None:
    shape, _, shares = wide
    totals = shares[:, :, 1:].sum(1).sort(dim=1, descending=True).values
    of_the_top = totals[:, : shape.keys // 100].sum(1) / totals.sum(1)  # 1% of the keys
    assert bool(((of_the_top > 0.2) & (of_the_top < 0.95)).all())


def test_retrieved_keys_are_looked_up_by_one_or_two_rows_and_by_held_out_rows_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a head that is diffuse otherwise, what gets most of a row's attention is the sink or a retrieved key."""
    monkeypatch.setattr(synthetic, "SHARPNESS", (1.5, 1.5))
    monkeypatch.setattr(synthetic, "RETRIEVING", (0.04, 0.04))
    (layer,) = layers_of(LayerShape(heads=1, keys=2048, rows=1024, held_out_rows=512, head_dim=64))
    lookers, again = (
        (attention_of(layer, rows)[0, :, 1:] > 0.5).sum(0) for rows in (layer.queries, layer.held_out)
    )  # (keys,): without the sink
    seen = lookers > 0
    assert 0.01 * 1024 < int(lookers.sum()) <= 0.06 * 1024
    assert 1.0 <= float(lookers[seen].double().mean()) < 2.5
    assert (
        0.5 * int(again.sum()) < int(again[seen].sum()) < int(again.sum())
    )  # some of them no row of the fit looked up
    values = dense_heads(layer.full)[1][0, 0, 1:].double()
    lengths = (values - values.mean(0)).norm(dim=1)
    assert float(lengths[seen].mean()) > 1.3 * float(lengths.mean())


def test_topics_change_along_the_document_and_come_again() -> None:
    document = make_document(LayerShape(1, 8192, 1, 1, 128), 0)
    starts = (document.topic_of[1:] != document.topic_of[:-1]).nonzero().squeeze(-1)
    assert len(starts) > 2 * len(document.topics)
    assert int((starts[1:] - starts[:-1]).min()) >= synthetic.LEAST_SEGMENT
    assert len(document.topic_of.unique()) == len(document.topics)


def test_rows_look_at_keys_of_the_topic_of_their_place_and_at_keys_near_it(wide: Wide) -> None:
    shape, _, shares = wide
    topic_of = make_document(shape, 5).topic_of
    places = torch.arange(shape.rows) * shape.keys // shape.rows
    ordinary = shares[:, :, 1:] / shares[:, :, 1:].sum(-1, keepdim=True)
    same = topic_of[places].unsqueeze(-1) == topic_of[1:]
    near = (places.unsqueeze(-1) - torch.arange(1, shape.keys)).abs() <= 8
    on_topic = (ordinary * same).sum(-1).mean(1) / same.double().mean()
    assert bool((on_topic > 1.3).all())  # half of the rows are elsewhere, and there are but four topics
    close = (ordinary * (near & same)).sum(-1).mean(1) / (near & same).double().mean()
    assert float((close / on_topic).max()) > 2.0


def test_heads_differ_in_sharpness(wide: Wide) -> None:
    _, _, shares = wide
    ordinary = shares[:, :, 1:] / shares[:, :, 1:].sum(-1, keepdim=True)
    seen = (-(ordinary * ordinary.clamp_min(1e-300).log()).sum(-1)).exp().median(1).values
    assert float(seen.max() / seen.min()) > 3.0


def test_values_have_a_mean_and_follow_the_topic_in_a_low_rank(wide: Wide) -> None:
    shape, layer, _ = wide
    topic_of = make_document(shape, 5).topic_of[1:]
    for values in dense_heads(layer.full)[1][0, :, 1:].double():
        mean = values.mean(0)
        assert float(mean.norm()) > 0.5 * float(values.norm(dim=1).mean())
        centred = values - mean
        spectrum = torch.linalg.svdvals(centred).square()
        assert float(spectrum[: shape.head_dim // synthetic.TOPIC_FRACTION].sum() / spectrum.sum()) > 0.5
        by_topic = torch.stack([centred[topic_of == topic].mean(0) for topic in topic_of.unique().tolist()])
        explained = by_topic[torch.searchsorted(topic_of.unique(), topic_of)]
        assert float(explained.square().sum() / centred.square().sum()) > 0.3


# --------------------------------------------------------------------------------------------------- the contestants


def plain_errors(layers: list[SyntheticLayer], fitted: list[LayerCache]) -> dict[str, float]:
    """Recompute the errors head by head in float64, by softmax."""
    sums: dict[str, list[tuple[float, float]]] = {"held_out": [], "queries": []}
    for layer, kept in zip(layers, fitted, strict=True):
        keys, values = (part[0].double() for part in dense_heads(layer.full))
        for name, found in sums.items():
            for head, own in enumerate(heads_of(kept)):
                rows = getattr(layer, name)[head].double()
                out = (rows @ keys[head].T * layer.scaling).softmax(-1) @ values[head]
                scores = rows @ kept.keys[own].double().T * layer.scaling + kept.biases[own].double()
                wrong = scores.softmax(-1) @ kept.values[own].double() - out
                found.append((float(wrong.square().sum()), float(out.square().sum())))
    whole = {name: math.sqrt(sum(e for e, _ in found) / sum(o for _, o in found)) for name, found in sums.items()}
    worst = max(math.sqrt(e / o) for e, o in sums["held_out"])
    return {"held_out_error": whole["held_out"], "worst_head_error": worst, "fit_error": whole["queries"]}


def truths_of(layers: list[SyntheticLayer]) -> list[solver.Truth]:
    return [solver.Truth(*(solver.output(one.full, q, one) for q in (one.queries, one.held_out))) for one in layers]


def compacted(layers: list[SyntheticLayer], method: str) -> list[LayerCache]:
    if method in solver.OURS:
        return contestants.solve_ours(layers, KEEP, num_picks=128, uniform=solver.OURS[method], refine_steps=5).layers
    return [contestants.solve_published(layer, KEEP, method) for layer in layers]


@pytest.mark.parametrize("method", [*solver.OURS, *SOLVER_METHODS[1:]])
def test_errors_are_those_of_plain_softmax_on_rows_that_no_fit_saw(small: list[SyntheticLayer], method: str) -> None:
    fitted = compacted(small, method)
    found = solver.errors(small, truths_of(small), fitted)
    expected = plain_errors(small, fitted)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert found["mean_kept"] == KEEP
    assert 0.0 < found["fit_error"] < found["held_out_error"] < 1.0


def test_a_layer_that_keeps_everything_has_no_error(small: list[SyntheticLayer]) -> None:
    found = solver.errors(small, truths_of(small), [layer.full for layer in small])
    assert found == {"held_out_error": 0.0, "worst_head_error": 0.0, "fit_error": 0.0, "mean_kept": 256.0}


def test_ours_keeps_as_many_keys_over_all_heads_as_the_others_or_equally_many_in_each(
    small: list[SyntheticLayer],
) -> None:
    shared, uniform = (
        contestants.solve_ours(small, KEEP, num_picks=128, uniform=uniform, refine_steps=5) for uniform in (False, True)
    )
    assert uniform.counts.tolist() == [[KEEP, KEEP]] * 3
    assert int(shared.counts.sum()) == 6 * KEEP and len(shared.counts.unique()) > 1
    for solved in (shared, uniform):
        assert [layer.head_lengths for layer in solved.layers] == solved.counts.tolist()


def test_layers_solved_together_are_those_solved_alone(
    small: list[SyntheticLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = contestants.solve_ours(small, KEEP, num_picks=128, uniform=True, refine_steps=5)
    monkeypatch.setattr(contestants.study, "GRAM_BYTES", 1)  # a layer at a time
    in_turn = contestants.solve_ours(small, KEEP, num_picks=128, uniform=True, refine_steps=5)
    for one, other in zip(together.layers, in_turn.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-4)


def test_rms_keeps_the_keys_of_largest_attention(small: list[SyntheticLayer]) -> None:
    kept = contestants.solve_published(small[0], KEEP, "attention-matching-rms")
    scores = attention_of(small[0]).square().sum(1)
    for head, own in enumerate(heads_of(kept)):
        assert kept.positions[own].tolist() == scores[head].topk(KEEP).indices.sort().values.tolist()


@pytest.mark.parametrize(("method", "keys"), [("attention-matching-omp", 1), ("attention-matching-omp-fast", 8)])
def test_the_fast_pursuit_takes_several_keys_a_step(
    small: list[SyntheticLayer], method: str, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    add = omp.MassFit.add

    def counting(fit: omp.MassFit, chosen: torch.Tensor) -> None:
        taken.append(len(chosen))
        add(fit, chosen)

    monkeypatch.setattr(omp.MassFit, "add", counting)
    contestants.solve_published(small[0], KEEP, method)
    assert max(taken) == keys and sum(taken) >= 2 * KEEP
    assert omp.keys_per_refit(0) == 1  # the product's own schedule again


def test_picks_of_a_chunk_are_those_of_compact() -> None:
    assert contestants.chunk_size(8192) == 512 and contestants.chunk_size(600) == 300
    assert contestants.picks_per_chunk(8192, 164) == 512
    assert contestants.picks_per_chunk(32768, 655) == round(6 * 655 * 512 / 32768) + 32


def test_half_precision_takes_the_fast_path_and_loses_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of NVIDIA GPUs, its three primitives written out on the CPU."""
    exact = plain_errors(*(lambda made: (made, compacted(made, "best, uniform")))(layers_of(SMALL)))
    half = layers_of(SMALL, dtype=torch.bfloat16)
    monkeypatch.setattr(attention, "is_fast", lambda query: query.dtype in (torch.float16, torch.bfloat16))
    monkeypatch.setattr(attention, "half_product", product)
    monkeypatch.setattr(gram, "half_product", product)
    monkeypatch.setattr(attention, "fused_attention", fused)
    fitted = compacted(half, "best, uniform")
    assert fitted[0].keys.dtype == fitted[0].values.dtype == torch.bfloat16
    assert plain_errors(half, fitted)["held_out_error"] == pytest.approx(exact["held_out_error"], rel=0.2)


# ------------------------------------------------------------------------------------------------- counted work


def test_counted_operations_are_those_that_torch_counts(small: list[SyntheticLayer]) -> None:
    settings = SolverSettings(heads=2, keys=256, rows=256, head_dim=16, keep=KEEP)
    work = solver.stage_work(settings, 256, torch.full((1, 2), KEEP), torch.float32)
    with FlopCounterMode(display=False) as exact:
        rows = contestants._exact_rows(small[0])
    with FlopCounterMode(display=False) as grams:
        sums = contestants._chunk_grams(small[0], rows)
    with FlopCounterMode(display=False) as greedy:
        contestants.greedy_curves([sums], [small[0].full], 0, 256, 0.0)
    assert exact.get_total_flops() == work["exact"].operations
    assert grams.get_total_flops() == work["gram"].operations
    in_place = 2 * 4 * 256 * 256 * 17  # what each pick takes from targets and energies; torch does not count it
    assert greedy.get_total_flops() == pytest.approx(work["greedy"].operations - in_place, rel=0.01)


def test_work_of_the_fit_follows_the_keys_of_every_head() -> None:
    settings = SolverSettings(heads=2, keys=256, rows=100, head_dim=16, keep=KEEP)
    work = solver.stage_work(settings, 256, torch.tensor([[10, 30], [20, 20]]), torch.bfloat16)
    biases = sum(2 * 100 * count * (16 + count) for count in (10, 30, 20, 20)) / 2
    values = sum(2 * 100 * count * (3 * 16 + count) for count in (10, 30, 20, 20)) / 2
    assert (work["biases"].operations, work["values"].operations) == pytest.approx((biases, values))
    assert {one.precision for name, one in work.items() if name != "greedy"} == {"bfloat16"}


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The JSON of a run of all methods, in a process of its own."""
    words = [
        sys.executable,
        "-m",
        "compactor",
        "bench",
        "solver",
        *SIZES,
        "--refine-steps",
        str(STEPS),
        "--layers",
        "2",
        "--device",
        "cpu",
        "--json",
    ]
    done = subprocess.run([*words, "--quiet", "--repeats", "2"], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def test_json_has_a_row_for_every_method_and_every_stage_of_ours(whole: dict[str, Any]) -> None:
    names = [(row["part_of"], row["name"]) for row in whole["rows"]]
    ours = [pair for name in solver.OURS for pair in ((None, name), *((name, stage) for stage in contestants.STAGES))]
    ours += [
        (None, solver.UNREFINED),
        *((solver.UNREFINED, stage) for stage in contestants.STAGES if stage != "refine"),
    ]
    assert names == [*ours, *((None, name) for name in SOLVER_METHODS[1:])]
    assert whole["bench"] == "solver"
    assert whole["settings"]["dtype"] == "float32" and whole["settings"]["keep"] == KEEP
    assert set(whole["ceilings"]["operations_per_s"]) == {"float32"}


def test_json_rows_hold_times_sizes_work_and_errors(whole: dict[str, Any]) -> None:
    for row in whole["rows"]:
        assert set(row) == {
            "name", "part_of", "sizes", "median_s", "p10_s", "p90_s", "runs", "operations", "bytes", "fraction",
            "figures",
        }  # fmt: skip
        assert row["sizes"] == {"heads": 2, "keys": 256, "rows": 256, "head_dim": 16, "keep": KEEP}
        assert 0.0 <= row["p10_s"] <= row["median_s"] <= row["p90_s"] and row["runs"] == 2
        if row["part_of"] is None:
            assert set(row["figures"]) == {"held_out_error", "worst_head_error", "fit_error", "mean_kept"}
            assert row["figures"]["mean_kept"] == KEEP
        else:
            assert row["figures"] == {}
            assert (row["fraction"] is None) == (row["name"] == "allocate")


def test_json_errors_are_those_of_the_same_layers_solved_here(whole: dict[str, Any]) -> None:
    layers = layers_of(SMALL, 2)
    shown = {row["name"]: row["figures"] for row in whole["rows"] if row["part_of"] is None}
    fitted = [contestants.solve_published(layer, KEEP, "attention-matching-rms") for layer in layers]
    assert shown["attention-matching-rms"]["held_out_error"] == pytest.approx(
        plain_errors(layers, fitted)["held_out_error"], rel=1e-3
    )
    num_picks = contestants.picks_per_chunk(256, KEEP)
    solved = contestants.solve_ours(layers, KEEP, num_picks=num_picks, uniform=False, refine_steps=STEPS)
    assert shown["best"]["held_out_error"] == pytest.approx(
        plain_errors(layers, solved.layers)["held_out_error"], rel=0.02
    )


def test_the_table_is_the_answer_and_progress_is_not(invoke: Command) -> None:
    done = invoke("bench", "solver", *SIZES, "--methods", "rms,omp-fast", "--repeats", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "heads 2, keys 256, rows 256, head dim 16, keep 20" in done.stdout
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("attention-matching-")]
    assert rows == ["attention-matching-omp-fast", "attention-matching-rms"] * 2
    assert "attention-matching-rms (2 layers) ..." in done.stderr and "..." not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--keys", "8"], "--keys is 8; the least is 32."),
        (["--head-dim", "8"], "--head-dim is 8; the least is 16."),
        (["--layers", "0"], "--layers is 0; the least is 1."),
        (["--picks", "0"], "--picks is 0; the least is 1."),
        (["--keep", "8192"], "--keep 8192 of --keys 8192 leaves nothing to choose; keep fewer."),
        (["--seed", "-1"], "--seed is -1; give a whole number from 0 to 2**31 - 1."),
        (["--methods", ""], f"--methods is empty; give a comma-separated subset of {','.join(SOLVER_METHODS)}."),
        (["--methods", "rms,magic"], "--methods does not know 'magic'; give"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_code_2(invoke: Command, arguments: list[str], sentence: str) -> None:
    done = invoke("bench", "solver", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sentence}") and done.stderr.count("\n") == 1


def test_a_device_that_is_not_there_is_refused_by_name(invoke: Command) -> None:
    done = invoke("bench", "solver", *SIZES, "--device", "gpu7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --device is 'gpu7'") and done.stderr.count("\n") == 1


PROBE = """
import sys
from compactor.cli import app
sys.argv = ["compactor", *sys.argv[1:]]
try:
    app.main()
except SystemExit as stop:
    heavy = ("torch", "transformers", "numpy", "rich.table")
    print("PROBE", stop.code, [name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["bench"], 0),
        (["bench", "--help"], 0),
        (["bench", "solver", "--help"], 0),
        (["bench", "solver", "--keep", "0"], 2),
    ],
)
def test_help_and_bad_arguments_import_nothing_heavy(arguments: list[str], exit_code: int) -> None:
    words = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"PROBE {exit_code} []"
    assert exit_code or "solver" in done.stdout


def test_names_of_methods_may_be_short_and_come_in_one_order() -> None:
    assert SolverSettings(methods=("rms", "omp-fast", "best", "omp")).methods == SOLVER_METHODS
    with pytest.raises(SettingsError):
        SolverSettings(methods=())


def test_more_layers_than_repeats_are_all_measured(small: list[SyntheticLayer]) -> None:
    settings = SolverSettings(heads=2, keys=256, rows=256, head_dim=16, keep=KEEP, layers=3, repeats=1)
    row = solver.published_row("attention-matching-rms", settings, small, truths_of(small), SilentReporter())
    assert row.timing.runs == 3
    fitted = compacted(small, "attention-matching-rms")
    assert row.figures["held_out_error"] == pytest.approx(plain_errors(small, fitted)["held_out_error"], rel=1e-4)
