"""Knows the benchmark of selection and fit: ours against the published selectors, on equal layers and equal counts.

The error of a compacted layer is that of its attention output on rows that no fit saw,

    sqrt(sum over layers, heads and rows of ||o'_i - o_i||^2 / sum of ||o_i||^2)

in float64, with keys and values as a file would hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compactor.bench.contestants import (
    Solved,
    chunk_size,
    picks_per_chunk,
    solve_ours,
    solve_published,
)
from compactor.bench.machine import describe_machine, measure_ceilings
from compactor.bench.report import Report, Row, Work
from compactor.bench.settings import SolverSettings
from compactor.bench.synthetic import LayerShape, SyntheticLayer, make_layers
from compactor.bench.timing import Timing, timed
from compactor.solve.fit import solve_device
from compactor.solve.refine import CPU_ROWS, ROWS
from compactor.types import LayerCache, Reporter
from compactor_kernels.reference import biased_attention_reference

OURS = {"best": False, "best, uniform": True}  # row: every head keeps equally many
UNREFINED = "best, not refined"


@dataclass(frozen=True)
class Truth:
    """What the full layer answers."""

    fit: torch.Tensor  # (heads, rows, head_dim) float64
    held_out: torch.Tensor  # (heads, held_out_rows, head_dim) float64


@torch.no_grad()
def bench_solver(settings: SolverSettings, device: torch.device, reporter: Reporter) -> Report:
    """Time the methods and measure their errors; one row a method, and one for each stage of ours.

    Ours solves all layers as one batch, `repeats` times; the published selectors take layer after layer, each at least
    once. Every time is per layer, after a run that is not timed.
    """
    ceilings = measure_ceilings(device)
    shape = LayerShape(settings.heads, settings.keys, settings.rows, settings.held_out_rows, settings.head_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = make_layers(shape, settings.layers, seed=settings.seed, device=device, dtype=dtype)
    truths = [Truth(*(output(layer.full, queries, layer) for queries in (layer.queries, layer.held_out)))
              for layer in layers]  # fmt: skip
    rows: list[Row] = []
    for method in settings.methods:
        if method == "best":
            for name, uniform in OURS.items():
                rows += our_rows(name, uniform, settings.refine_steps, settings, layers, truths, reporter)
            if settings.refine_steps:
                rows += our_rows(UNREFINED, False, 0, settings, layers, truths, reporter)
        else:
            rows.append(published_row(method, settings, layers, truths, reporter))
    return Report("solver", describe_machine(device), ceilings, {**settings.to_json(), "dtype": str(dtype)[6:]}, rows)


def our_rows(
    name: str,
    uniform: bool,
    refine_steps: int,
    settings: SolverSettings,
    layers: Sequence[SyntheticLayer],
    truths: Sequence[Truth],
    reporter: Reporter,
) -> list[Row]:
    """Solve all layers together several times."""
    num_picks = settings.picks or picks_per_chunk(settings.keys, settings.keep)
    with Peak(layers[0].queries.device) as peak, reporter.phase(name, settings.repeats + 1, "runs") as advance:
        runs: list[Solved] = []
        for _ in range(settings.repeats + 1):
            runs.append(
                solve_ours(layers, settings.keep, num_picks=num_picks, uniform=uniform, refine_steps=refine_steps)
            )
            advance(1)
    solved, timed_runs = runs[-1], runs[1:]
    work = stage_work(settings, num_picks, solved.counts, layers[0].queries.dtype, refine_steps)
    sizes = sizes_of(settings)
    whole = Row(
        name,
        Timing.of([run.elapsed_s / settings.layers for run in timed_runs]),
        sizes,
        list(work.values()),
        errors(layers, truths, solved.layers) | peak.figures,
    )
    stages = [
        Row(
            stage,
            Timing.of([run.seconds[stage] / settings.layers for run in timed_runs]),
            sizes,
            [work[stage]] if stage in work else [],
            part_of=name,
        )
        for stage in solved.seconds
    ]
    return [whole, *stages]


def published_row(
    name: str,
    settings: SolverSettings,
    layers: Sequence[SyntheticLayer],
    truths: Sequence[Truth],
    reporter: Reporter,
) -> Row:
    """Solve layer after layer, round and round until there are enough runs."""
    device, num_runs = layers[0].queries.device, max(settings.repeats, len(layers))
    fitted: list[LayerCache] = []
    times_s: list[float] = []

    def solve(layer: SyntheticLayer) -> Callable[[], LayerCache]:
        return lambda: solve_published(layer, settings.keep, name)

    with Peak(device) as peak, reporter.phase(name, num_runs + 1, "layers") as advance:
        solve(layers[0])()
        advance(1)
        for run in range(num_runs):
            made, elapsed_s = timed(solve(layers[run % len(layers)]), device)
            times_s.append(elapsed_s)
            fitted += [made] if run < len(layers) else []
            advance(1)
    figures = errors(layers, truths, fitted) | peak.figures
    return Row(name, Timing.of(times_s), sizes_of(settings), figures=figures)


class Peak:
    """The most GPU memory that was held inside; ``figures`` is empty elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.figures: dict[str, float] = {}

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.figures["peak_bytes"] = float(torch.cuda.max_memory_allocated(self.device))


def sizes_of(settings: SolverSettings) -> dict[str, int]:
    """Return the sizes of one layer."""
    return {name: getattr(settings, name) for name in ("heads", "keys", "rows", "head_dim", "keep")}


def errors(layers: Sequence[SyntheticLayer], truths: Sequence[Truth], fitted: Sequence[LayerCache]) -> dict[str, float]:
    """Return relative errors of the attention output: of all rows that no fit saw, of the head that errs most on them,
    and of the rows of the fit; and how many keys a head keeps on average."""
    held_out, seen = [], []
    for layer, truth, compacted in zip(layers, truths, fitted, strict=True):
        held_out.append(squares(output(compacted, layer.held_out, layer), truth.held_out))
        seen.append(squares(output(compacted, layer.queries, layer), truth.fit))
    by_head = torch.cat(held_out, dim=1)  # (2, layers * heads)
    kept = [length for layer in fitted for length in layer.head_lengths]
    return {
        "held_out_error": relative(by_head.sum(1)),
        "worst_head_error": max(relative(head) for head in by_head.T),
        "fit_error": relative(torch.cat(seen, dim=1).sum(1)),
        "mean_kept": sum(kept) / len(kept),
    }


def output(kept: LayerCache, queries: torch.Tensor, layer: SyntheticLayer) -> torch.Tensor:
    """Return attention of queries (heads, n, head_dim) over a layer's keys, float64, same shape."""
    where = solve_device(queries.device)
    parts = (part.to(where) for part in (kept.keys, kept.values, kept.biases, kept.offsets))
    rows = queries[None].to(where).double()
    return biased_attention_reference(rows, *parts, scaling=layer.scaling).out[0]


def squares(out: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return squared error and energy of every head, (2, heads) float64."""
    return torch.stack([(out - truth).square().sum((1, 2)), truth.square().sum((1, 2))])


def relative(error_and_energy: torch.Tensor) -> float:
    """Return sqrt(error / energy)."""
    error, energy = error_and_energy.tolist()
    return float((error / energy) ** 0.5)


def stage_work(
    settings: SolverSettings, num_picks: int, counts: torch.Tensor, dtype: torch.dtype, refine_steps: int = 0
) -> dict[str, Work]:
    """Return what the stages of ours must do per layer; the budget's sort is not counted.

    Rows n, keys T in chunks of C, picks K per chunk, head size d, c keys kept in a head: scores and outputs of the full
    layer 4 n T d; scores once more and the Gram matrices 2 n T (d + C); in a chunk G T, the columns of the factor and
    what they take from targets and energies 2 C^2 (d + 1) + C K^2 + 4 C K (d + 1); biases 2 n c (d + c); values
    2 n c (3 d + c); a step of the refinement on r rows 12 r c d. The bytes are those of queries, keys, values and
    outputs, and of the Gram matrices.
    """
    heads, keys, rows, head_dim = settings.heads, settings.keys, settings.rows, settings.head_dim
    half, size = str(dtype)[6:], chunk_size(keys)
    inputs = dtype.itemsize * heads * head_dim * (rows + keys)
    problems, picks, targets = heads * -(-keys // size), min(num_picks, size), head_dim + 1
    gram_bytes = 4 * problems * size**2
    greedy = 2 * size**2 * targets + size * picks**2 + 4 * size * picks * targets
    per_layer = counts.double().sum(0) / len(counts), counts.double().square().sum(0) / len(counts)
    kept, kept_squared = (float(one.sum()) for one in per_layer)
    work = {
        "exact": Work(
            4.0 * heads * rows * keys * head_dim,
            half,
            inputs + dtype.itemsize * heads * keys * head_dim + 4 * heads * rows * (head_dim + 1),
        ),
        "gram": Work(2.0 * heads * rows * keys * (head_dim + size), half, inputs + gram_bytes),
        "greedy": Work(float(problems * greedy), "float32", gram_bytes + 4 * problems * picks * size),
        "biases": Work(2.0 * rows * (kept * head_dim + kept_squared), half),
        "values": Work(2.0 * rows * (3 * kept * head_dim + kept_squared), half),
    }
    seen = min(rows, ROWS if half != "float32" else CPU_ROWS)
    return work | {"refine": Work(12.0 * refine_steps * seen * kept * head_dim, half)} if refine_steps else work
