"""The command ``compactor bench``: what each part does of what the hardware can. Knows no measuring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compactor import console
from compactor.bench.settings import SOLVER_METHODS, SolverSettings
from compactor.cli.failures import memory_remedy
from compactor.cli.options import Json, Quiet, split_list
from compactor.cli.units import show_bytes

if TYPE_CHECKING:
    from compactor.bench.report import Report, Row

SOLVER_DEFAULTS = SolverSettings()

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="What is measured: auto, cpu, cuda, cuda:1.")]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", help="Timed runs, after one that is not timed.")]


@app.callback(invoke_without_command=True)
def bench(ctx: typer.Context) -> None:
    """Measure how fast each part is, as a fraction of what the device can do.

    Every benchmark first measures two ceilings: the bandwidth of a large copy, and the rate of large matrix products.
    """
    if ctx.invoked_subcommand is None:
        console.answer(ctx.get_help())


@app.command("solver")
def solver(
    heads: Annotated[int, typer.Option("--heads", metavar="N", help="KV heads of a layer.")] = SOLVER_DEFAULTS.heads,
    keys: Annotated[int, typer.Option("--keys", metavar="N", help="Document keys of a head.")] = SOLVER_DEFAULTS.keys,
    rows: Annotated[
        int,
        typer.Option(
            "--rows", metavar="N", help="Query rows of a head that the fit sees; a quarter more are held out."
        ),
    ] = SOLVER_DEFAULTS.rows,
    head_dim: Annotated[int, typer.Option("--head-dim", metavar="N", help="Size of a key.")] = SOLVER_DEFAULTS.head_dim,
    keep: Annotated[
        int, typer.Option("--keep", metavar="N", help="Keys kept per head, on average.")
    ] = SOLVER_DEFAULTS.keep,
    layers: Annotated[
        int, typer.Option("--layers", metavar="N", help="Layers that ours solves together; times are per layer.")
    ] = SOLVER_DEFAULTS.layers,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="LIST",
            help=f"Methods, of {','.join(SOLVER_METHODS)}; `attention-matching-` may be left out.",
        ),
    ] = ",".join(SOLVER_METHODS),
    refine_steps: Annotated[
        int, typer.Option("--refine-steps", metavar="N", help="Steps that refine kept keys, biases and values.")
    ] = SOLVER_DEFAULTS.refine_steps,
    picks: Annotated[
        int | None,
        typer.Option("--picks", metavar="N", help="Keys of a chunk that are picked greedily; without it as compact."),
    ] = None,
    repeats: Repeats = SOLVER_DEFAULTS.repeats,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the synthetic layers.")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare our solver with the published selectors.

    For each: seconds per layer, stage by stage for ours (choice of keys, budget, biases, values), and the error of the
    attention output on rows that no fit saw. The layers are synthetic, with attention as real heads have it. The
    published selectors keep equally many keys in every head; ours shares them out by one ranking, and is shown with
    equal counts too.
    """
    settings = SolverSettings(
        heads=heads,
        keys=keys,
        rows=rows,
        head_dim=head_dim,
        keep=keep,
        layers=layers,
        methods=split_list(methods),
        repeats=repeats,
        picks=picks,
        refine_steps=refine_steps,
        seed=seed,
    )
    from compactor.bench.solver import bench_solver
    from compactor.model import pick_device

    with memory_remedy("lower --layers, --keys or --rows"):
        report = bench_solver(settings, pick_device(device), console.ConsoleReporter(quiet=quiet))
    show_report(report, json=json)


def show_report(report: Report, *, json: bool) -> None:
    """Print a report on standard output: one JSON object, or machine, ceilings and a table."""
    if json:
        console.answer_json(report.to_json())
        return
    console.answer(", ".join(f"{name} {value}" for name, value in report.machine.items() if value is not None))
    rates = [f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in report.ceilings.operations_per_s.items()]
    console.answer(", ".join([f"copy {report.ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s", *rates]))
    shared = shared_sizes(report.rows)
    if shared:
        console.answer(show_sizes(shared))
    for table in (_times(report, shared), _figures(report)):
        if table is not None:
            console.answer("")
            console.rich_console().print(table)


def shared_sizes(rows: Sequence[Row]) -> dict[str, int]:
    """Return the sizes that all rows have in common."""
    first, *others = (dict(row.sizes) for row in rows)
    return {name: size for name, size in first.items() if all(other.get(name) == size for other in others)}


def show_sizes(sizes: dict[str, int]) -> str:
    """Return sizes as text: heads 8, keys 8,192."""
    return ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in sizes.items())


def _times(report: Report, shared: dict[str, int]) -> Any:
    own_sizes = [{name: size for name, size in row.sizes.items() if name not in shared} for row in report.rows]
    sizes = ["sizes"] if any(own_sizes) else []
    table = _table("", *sizes, "median", "10% .. 90%", "operations", "bytes", "of ceiling")
    for row, own in zip(report.rows, own_sizes, strict=True):
        counted = row.to_json(report.ceilings)
        table.add_row(
            f"  {row.name}" if row.part_of else row.name,
            *(show_sizes(own) for _ in sizes),
            show_time(row.timing.median_s),
            f"{show_time(row.timing.p10_s)} .. {show_time(row.timing.p90_s)}",
            "-" if counted["operations"] is None else show_operations(counted["operations"]),
            "-" if counted["bytes"] is None else show_bytes(counted["bytes"]),
            "-" if counted["fraction"] is None else f"{counted['fraction']:.1%}",
        )
    return table


def _figures(report: Report) -> Any:
    """Return what else was measured of some rows, None where there is nothing."""
    rows = [row for row in report.rows if row.figures]
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    if not rows:
        return None
    table = _table("", *(name.removesuffix("_bytes").replace("_", " ") for name in names))
    for row in rows:
        table.add_row(row.name, *(_figure(name, row.figures[name]) if name in row.figures else "-" for name in names))
    return table


def _table(*titles: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column, title in enumerate(titles):
        table.add_column(title, justify="right" if column else "left", no_wrap=title != "sizes")
    return table


def _figure(name: str, value: float) -> str:
    return show_bytes(value) if name.endswith("_bytes") else f"{value:.4g}"


def show_time(elapsed_s: float) -> str:
    """Return a measured time with three digits: 8.04 us, 12.3 ms, 2.51 s."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if elapsed_s < 999.5 * scale:
            return f"{_three_digits(elapsed_s / scale)} {unit}"
    return f"{_three_digits(elapsed_s)} s"


def show_operations(count: float) -> str:
    """Return a number of operations in decimal units: 970 G, 1.20 T."""
    for unit, scale in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if count < 999.5 * scale:
            return f"{_three_digits(count / scale)} {unit}".rstrip()
    return f"{_three_digits(count / 1e12)} T"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
