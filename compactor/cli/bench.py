"""The command ``compactor bench``: what each part does of what the hardware can. Knows no measuring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compactor import console
from compactor.bench.settings import SOLVER_METHODS, SolverSettings
from compactor.bench.shapes import SHAPES
from compactor.bench.workloads import (
    GPU_SHAPE,
    KERNELS,
    SMALL_SHAPE,
    CompactBenchSettings,
    DecodeBenchSettings,
    KernelSettings,
    LoadSettings,
    parse_batches,
)
from compactor.cli.failures import memory_remedy
from compactor.cli.options import Json, Quiet, Workspace, split_list, workspace_bytes
from compactor.cli.units import show_bytes
from compactor.config import OUR_METHODS

if TYPE_CHECKING:
    from compactor.bench.report import Report, Row

SOLVER_DEFAULTS = SolverSettings()
KERNEL_DEFAULTS, COMPACT_DEFAULTS = KernelSettings(), CompactBenchSettings()
DECODE_DEFAULTS, LOAD_DEFAULTS = DecodeBenchSettings(), LoadSettings()
MOST_SIZES = 4  # columns of sizes; more of them share one
FILE_WIDTH = 160  # of a table that goes to a file or to another program

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="What is measured: auto, cpu, cuda, cuda:1.")]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", help="Timed runs, after one that is not timed.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all random numbers.")]
Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="NAME",
        help=f"Configuration of a model with random weights: {', '.join(SHAPES)}; "
        f"without it {GPU_SHAPE} on an NVIDIA GPU, {SMALL_SHAPE} elsewhere.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", help="Tokens of the document; without it as the shape and the device allow."),
]
Keep = Annotated[float, typer.Option("--keep", metavar="FRACTION", help="Part of the document's keys that is kept.")]
Spread = Annotated[
    float, typer.Option("--spread", metavar="X", help="Kept keys of the longest head over those of the shortest.")
]


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


@app.command("kernels")
def kernels(
    names: Annotated[
        str, typer.Option("--kernels", metavar="LIST", help=f"Kernels, of {','.join(KERNELS)}.")
    ] = ",".join(KERNELS),
    keys: Annotated[
        int | None,
        typer.Option("--keys", metavar="N", help="Keys of a head in the full cache; without it as the device allows."),
    ] = KERNEL_DEFAULTS.keys,
    keep: Annotated[
        int | None, typer.Option("--keep", metavar="N", help="Keys kept per head, on average; without it a fiftieth.")
    ] = KERNEL_DEFAULTS.keep,
    rows: Annotated[
        int | None,
        typer.Option("--rows", metavar="N", help="Rows of a query head, of many; without it as the device allows."),
    ] = KERNEL_DEFAULTS.rows,
    hidden: Annotated[
        int | None, typer.Option("--hidden", metavar="N", help="Width of a layer; without it as the device allows.")
    ] = KERNEL_DEFAULTS.hidden,
    spread: Spread = KERNEL_DEFAULTS.spread,
    heads: Annotated[int, typer.Option("--heads", metavar="N", help="Query heads.")] = KERNEL_DEFAULTS.heads,
    kv_heads: Annotated[int, typer.Option("--kv-heads", metavar="N", help="KV heads.")] = KERNEL_DEFAULTS.kv_heads,
    head_dim: Annotated[int, typer.Option("--head-dim", metavar="N", help="Size of a key.")] = KERNEL_DEFAULTS.head_dim,
    batch: Annotated[str, typer.Option("--batch", metavar="LIST", help="Batch sizes.")] = ",".join(
        map(str, KERNEL_DEFAULTS.batches)
    ),
    q_len: Annotated[
        int, typer.Option("--q-len", metavar="N", help="New tokens of each sequence.")
    ] = KERNEL_DEFAULTS.q_len,
    repeats: Repeats = KERNEL_DEFAULTS.repeats,
    seed: Seed = KERNEL_DEFAULTS.seed,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Time the kernels beside what torch offers for the same work.

    `biased_decode`, over kept keys (ragged, with biases) and over all keys, with one document for the whole batch and
    with one for each sequence, and with keys and values of 8 bits. Beside it torch's scaled_dot_product_attention: over
    the full cache; over heads padded to the longest, biases in a mask; and with keys repeated for every query head. On
    an NVIDIA GPU calls are replayed as one CUDA graph and visit different documents in turn, so that none is found in
    the L2 cache; rows "warm" read one again and again. Without a GPU the kernel's twin in torch takes its place.

    The others have their twins beside them, and stand alone for them without a GPU: `tail_decode` and `rotary` for new
    tokens; `attention_stats`, with and without limits, and `merge_rows` for the passes over reference rows;
    `kept_shares`, `gram`, `value_targets` and `greedy` for selection and least squares; `nnls` and `cholesky`, also
    beside what torch does without them, for biases and values of a layer's heads; `refine_steps`, a step;
    `step_decode`, `gemv` and `rms_norm` for a step of decoding, `gemv` of one and two rows beside torch's own products.
    Errors are relative to float64, of a part of the result.
    """
    settings = KernelSettings(
        kernels=split_list(names),
        keys=keys,
        keep=keep,
        rows=rows,
        hidden=hidden,
        spread=spread,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        batches=parse_batches(split_list(batch)),
        q_len=q_len,
        repeats=repeats,
        seed=seed,
    )
    from compactor.bench.kernels import bench_kernels
    from compactor.model import pick_device

    with memory_remedy("lower --keys, --rows or --batch"):
        report = bench_kernels(settings, pick_device(device), console.ConsoleReporter(quiet=quiet))
    show_report(report, json=json)


@app.command("compact")
def compact(
    shape: Shape = COMPACT_DEFAULTS.shape,
    tokens: Tokens = COMPACT_DEFAULTS.tokens,
    keep: Keep = COMPACT_DEFAULTS.keep,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help=f"Method: {', '.join(OUR_METHODS)}.")
    ] = COMPACT_DEFAULTS.method,
    certify: Annotated[
        bool, typer.Option("--certify/--no-certify", help="Make the certificate too.")
    ] = COMPACT_DEFAULTS.certify,
    workspace: Workspace = None,
    repeats: Repeats = COMPACT_DEFAULTS.repeats,
    seed: Seed = COMPACT_DEFAULTS.seed,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Time a compaction stage by stage, beside the plain prefill.

    A document of random tokens goes through the pipeline of `compact`, on a model with random weights. For each stage,
    and for the parts of the two passes over the reference rows: seconds, the operations of its matrix products where
    they can be counted, and the fraction of what the device can do; how many plain prefills it takes; the peak of GPU
    memory, what of it is neither weights nor full cache, and how many full caches it is beyond the weights.
    """
    settings = CompactBenchSettings(
        shape=shape,
        tokens=tokens,
        keep=keep,
        method=method,
        certify=certify,
        workspace=workspace_bytes(workspace),
        repeats=repeats,
        seed=seed,
    )
    from compactor.bench.compacting import bench_compact
    from compactor.model import pick_device

    with memory_remedy("lower --tokens or take a smaller --shape"):
        report = bench_compact(settings, pick_device(device), console.ConsoleReporter(quiet=quiet))
    show_report(report, json=json)


@app.command("decode")
def decode(
    shape: Shape = DECODE_DEFAULTS.shape,
    tokens: Tokens = DECODE_DEFAULTS.tokens,
    keep: Keep = DECODE_DEFAULTS.keep,
    spread: Spread = DECODE_DEFAULTS.spread,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", help="Questions about one document at once, beside one alone.")
    ] = DECODE_DEFAULTS.batch,
    question: Annotated[
        int, typer.Option("--question", metavar="N", help="Tokens of a question.")
    ] = DECODE_DEFAULTS.question,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", help="Tokens of an answer.")
    ] = DECODE_DEFAULTS.new_tokens,
    repeats: Repeats = DECODE_DEFAULTS.repeats,
    seed: Seed = DECODE_DEFAULTS.seed,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Time answers over the compacted cache, over the full one, and by plain `generate`.

    The caches hold random numbers: nothing is compacted. For one question and for a batch about one document: seconds
    of a step, which adds a token to every answer, once steps are steady; seconds to the first token; tokens per second,
    steady and over the whole answer; the bound that reading the weights sets; and how many times the full cache's rate,
    that of `generate`, and that of one question alone it is. The fraction of the ceiling counts weights and cache.
    """
    settings = DecodeBenchSettings(
        shape=shape,
        tokens=tokens,
        keep=keep,
        spread=spread,
        batch=batch,
        question=question,
        new_tokens=new_tokens,
        repeats=repeats,
        seed=seed,
    )
    from compactor.bench.decoding import bench_decode
    from compactor.model import pick_device

    with memory_remedy("lower --tokens, --batch or --new-tokens"):
        report = bench_decode(settings, pick_device(device), console.ConsoleReporter(quiet=quiet))
    show_report(report, json=json)


@app.command("load")
def load(
    shape: Shape = LOAD_DEFAULTS.shape,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", metavar="MODEL", help="A real model instead: hub id, local folder, GGUF file."),
    ] = LOAD_DEFAULTS.model,
    tokens: Tokens = LOAD_DEFAULTS.tokens,
    keep: Keep = LOAD_DEFAULTS.keep,
    spread: Spread = LOAD_DEFAULTS.spread,
    folder: Annotated[
        str | None,
        typer.Option(
            "--folder",
            metavar="FOLDER",
            help="Where the file lies while it is measured; without it the system's temporary folder.",
        ),
    ] = LOAD_DEFAULTS.folder,
    repeats: Repeats = LOAD_DEFAULTS.repeats,
    seed: Seed = LOAD_DEFAULTS.seed,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Time loading a compacted cache, beside a plain read of the same file.

    A file of random numbers is written, and removed at the end. It is read plainly, loaded to the device with every
    checksum verified (which cannot be left out), and asked one question for one token: from the disk, where the system
    lets the file be dropped from its page cache, and from the page cache. With --model, `query` is also timed as a
    process of its own, from its start to its end after one token.
    """
    settings = LoadSettings(
        shape=shape,
        model=model,
        tokens=tokens,
        keep=keep,
        spread=spread,
        folder=folder,
        repeats=repeats,
        seed=seed,
    )
    from compactor.bench.loading import bench_load
    from compactor.model import pick_device

    with memory_remedy("lower --tokens or --keep"):
        report = bench_load(settings, pick_device(device), console.ConsoleReporter(quiet=quiet))
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
    screen = console.rich_console()
    if not screen.is_terminal:
        screen.width = FILE_WIDTH
    for table in (_times(report, shared), _figures(report, shared)):
        if table is not None:
            console.answer("")
            screen.print(table)


def shared_sizes(rows: Sequence[Row]) -> dict[str, int]:
    """Return the sizes that all rows have in common."""
    first, *others = (dict(row.sizes) for row in rows)
    return {name: size for name, size in first.items() if all(other.get(name) == size for other in others)}


def show_sizes(sizes: dict[str, int]) -> str:
    """Return sizes as text: heads 8, keys 8,192."""
    return ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in sizes.items())


def _times(report: Report, shared: dict[str, int]) -> Any:
    sizes = _own_sizes(report.rows, shared)
    table = _table("", *_size_titles(sizes), "median", "10% .. 90%", "operations", "bytes", "of ceiling")
    depths: dict[str | None, int] = {None: -1}
    for row in report.rows:
        counted = row.to_json(report.ceilings)
        depths[row.name] = depth = depths[row.part_of] + 1
        table.add_row(
            "  " * depth + row.name,
            *_size_cells(row, sizes),
            show_time(row.timing.median_s),
            f"{show_time(row.timing.p10_s)} .. {show_time(row.timing.p90_s)}",
            "-" if counted["operations"] is None else show_operations(counted["operations"]),
            "-" if counted["bytes"] is None else show_bytes(counted["bytes"]),
            "-" if counted["fraction"] is None else f"{counted['fraction']:.1%}",
        )
    return table


def _figures(report: Report, shared: dict[str, int]) -> Any:
    """Return what else was measured of some rows, None where there is nothing."""
    rows = [row for row in report.rows if row.figures]
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    if not rows:
        return None
    unique = len({row.name for row in rows}) == len(rows)
    sizes = [] if unique else _own_sizes(rows, shared)  # they tell rows of one name apart
    table = _table("", *_size_titles(sizes), *map(_figure_title, names))
    for row in rows:
        figures = (_figure(name, row.figures[name]) if name in row.figures else "-" for name in names)
        table.add_row(row.name, *_size_cells(row, sizes), *figures)
    return table


def _own_sizes(rows: Sequence[Row], shared: dict[str, int]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.sizes if name not in shared))


def _size_titles(sizes: list[str]) -> list[str]:
    return [""] * len(sizes) if len(sizes) <= MOST_SIZES else [""]


def _size_cells(row: Row, sizes: list[str]) -> list[str]:
    if len(sizes) > MOST_SIZES:
        return [show_sizes({name: row.sizes[name] for name in sizes if name in row.sizes})]
    return [show_sizes({name: row.sizes[name]}) if name in row.sizes else "" for name in sizes]


def _table(*titles: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column, title in enumerate(titles):
        table.add_column(title, justify="right" if column else "left", no_wrap=bool(title) or not column)
    return table


def _figure_title(name: str) -> str:
    for unit, shown in (("_bytes", ""), ("_per_s", "/s"), ("_s", "")):
        if name.endswith(unit):
            return name.removesuffix(unit).replace("_", " ") + shown
    return name.replace("_", " ")


def _figure(name: str, value: float) -> str:
    if name.endswith(("_bytes", "bytes_per_s")):
        return show_bytes(value)
    if name.endswith("_s") and not name.endswith("_per_s"):
        return show_time(value)
    return f"{value:.1%}" if name.startswith("of_") else f"{value:.4g}"


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
