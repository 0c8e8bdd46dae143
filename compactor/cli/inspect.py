"""The command ``compactor inspect``: shows what a compacted cache says of itself. Knows no torch."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from io import BytesIO
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from compactor import console
from compactor.cli.options import Json
from compactor.cli.units import show_bytes, show_fields, show_number
from compactor.errors import SettingsError

if TYPE_CHECKING:
    from rich.text import Text

    from compactor.cache_file import TensorTable
    from compactor.types import CacheMetadata

SHADES = " .:-=+*#%@"  # from no document key to the head that keeps most
COLOURS = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b",
           "#fde725")  # fmt: skip
SLIDING = "~"
MOST_VALUES = 12  # a longer list of numbers is shown by its range
MOST_CHARACTERS = 200  # of one text
WIDE = 40  # with more KV heads a cell is one character wide
PICTURES = (".png", ".pdf", ".svg")

Heads = list[float] | None  # fraction of document keys kept per KV head; None is a sliding layer


def inspect_command(
    file: Annotated[str, typer.Argument(metavar="FILE.kv", help="A compacted cache.")],
    json: Json = False,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="OUT.png", help="Draw the heat map to a picture; needs matplotlib."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the tensors too, and check the SHA-256 of each.")
    ] = False,
) -> None:
    """Show what a compacted cache holds: model, document, sizes, settings, report, kept keys per head.

    Reads the header only, unless --verify is given.
    """
    from compactor.cache_file import read_metadata, verify_cache

    if plot is not None:
        check_plot(plot, file)
    metadata, table = verify_cache(file) if verify else read_metadata(file)
    if json:
        console.answer_json(description(file, metadata, table, verified=verify))
    else:
        console.answer(show_cache(file, metadata, table, verified=verify))
        show_heat_map(kept_fractions(metadata, table.head_lengths))
    if plot is not None:
        draw_heat_map(plot, metadata, kept_fractions(metadata, table.head_lengths))
        console.note(f"wrote {printable(plot)}")


# --------------------------------------------------------------------------------------------------- numbers


def kept_per_head(metadata: CacheMetadata, head_lengths: list[list[int]]) -> list[list[int] | None]:
    """Return per layer and KV head the number of document keys kept, None for a sliding layer."""
    return [
        None if window is not None else [max(length - metadata.prefix_length, 0) for length in lengths]
        for window, lengths in zip(metadata.sliding_windows, head_lengths, strict=True)
    ]


def kept_fractions(metadata: CacheMetadata, head_lengths: list[list[int]]) -> list[Heads]:
    """Return per layer and KV head the fraction of document keys kept, None for a sliding layer."""
    tokens = max(metadata.document_tokens, 1)
    counts = kept_per_head(metadata, head_lengths)
    return [None if layer is None else [count / tokens for count in layer] for layer in counts]


def count_kept(metadata: CacheMetadata, head_lengths: list[list[int]]) -> tuple[int, int]:
    """Return how many document keys the compacted layers keep, and how many there were."""
    counts = [count for layer in kept_per_head(metadata, head_lengths) for count in layer or []]
    return sum(counts), len(counts) * metadata.document_tokens


def description(file: str, metadata: CacheMetadata, table: TensorTable, *, verified: bool) -> dict[str, Any]:
    """Return everything the header says, as plain JSON values; ``verified`` is false where nobody looked."""
    from compactor.cache_file import FORMAT_VERSION, count_full_cache_bytes

    kept, total = count_kept(metadata, table.head_lengths)
    return {
        "file": printable(file),
        "format_version": FORMAT_VERSION,
        "verified": verified,
        "header_bytes": table.sizes.header_bytes,
        "tensor_bytes": table.sizes.tensor_bytes,
        "full_cache_bytes": count_full_cache_bytes(metadata),
        "kept_document_keys": kept,
        "document_keys": total,
        "metadata": asdict(metadata),
        "head_lengths": table.head_lengths,
        "tensors": {name: asdict(entry) for name, entry in table.entries.items()},
    }


# ------------------------------------------------------------------------------------------------------ text


def show_cache(file: str, metadata: CacheMetadata, table: TensorTable, *, verified: bool) -> str:
    """Return everything but the heat map, for people."""
    from compactor.cache_file import count_full_cache_bytes

    model, sizes = metadata.model, table.sizes
    kept, total = count_kept(metadata, table.head_lengths)
    full_bytes = count_full_cache_bytes(metadata)
    fields: dict[str, object] = {
        "model": model.name + (f", revision {model.revision}" if model.revision else ""),
        "architecture": f"{model.family}, {model.num_layers} layers, {model.num_heads} heads, "
        f"{model.num_kv_heads} KV heads of {model.head_dim}",
        "document": metadata.document_name,
        "document SHA-256": metadata.document_sha256,
        "tokens": f"{metadata.document_tokens:,} of the document, after {metadata.prefix_length:,} of the prompt",
        "system message": "none" if metadata.system is None else metadata.system,
        "thinking": "on" if metadata.thinking else "off",
        "kept": f"{kept:,} of {total:,} document keys" + (f" ({kept / total:.1%})" if total else ""),
        "tensors": f"{show_bytes(sizes.tensor_bytes)}, {len(table.entries)} of them, "
        f"keys and values in {metadata.dtype}",
        "full cache": f"{show_bytes(full_bytes)}, {full_bytes / sizes.tensor_bytes:.1f} times as much",
        "header": show_bytes(sizes.header_bytes),
        "written by": f"kv-compactor {metadata.tool_version}, seed {metadata.seed}",
    }
    if fidelity := show_fidelity(metadata.report.get("fidelity", {})):
        fields["fidelity"] = fidelity
    if verified:
        fields["verified"] = f"the SHA-256 of all {len(table.entries)} tensors is right"
    lines = [printable(file), *show_tree(fields)]
    for title, tree in (("settings", metadata.settings), ("report", metadata.report)):
        lines += ["", title, *(show_tree(tree) or ["  none"])]
    return "\n".join(lines)


def show_fidelity(fidelity: object) -> str:
    """Return a report's certificate on one line, "" where there is none or another program wrote something else.

    ``fidelity``: what the report holds under this name; None says that it was not measured.
    """
    if fidelity is None:
        return "not measured"
    match fidelity:
        case {
            "kl_mean": int() | float() as mean,
            "kl_p95": int() | float() as p95,
            "kl_worst": int() | float() as worst,
            "agreement": int() | float() as agreement,
            "no_document": {"kl_mean": int() | float() as bare},
        }:
            return (
                f"KL {show_kl(mean)} nats per token (95%: {show_kl(p95)}, worst answer {show_kl(worst)}; "
                f"no document {show_kl(bare)}), same token {agreement:.0%}"
            )
    return ""


def show_kl(nats: float) -> str:
    """Return nats with two significant digits, or two decimals above one: 0.012, 0.26, 1.92; 0 below a millionth."""
    if nats >= 1:
        return f"{nats:.2f}"
    return f"{nats:.2g}" if nats >= 1e-6 else "0"


def show_tree(tree: dict[str, Any], indent: str = "  ", unit: str = "") -> list[str]:
    """Return a line per value of a nested dict: plain values first, then each dict below its name."""
    plain = {printable(name) + unit: show_value(value) for name, value in tree.items() if not is_long(value)}
    lines = show_fields(plain, indent=indent).splitlines()
    for name, value in tree.items():
        if is_long(value):
            inner_unit = "_seconds" if name == "seconds" else ""
            label = printable(name).replace("_", " ")
            lines += [f"{indent}{label}", *show_tree(value, indent + "  ", inner_unit)]
    return lines


def is_long(value: object) -> bool:
    """Say whether a value is a dict that gets lines of its own."""
    return isinstance(value, dict) and bool(value) and show_range(list(value.values())) is None


def show_value(value: object) -> object:
    """Return a number as it is, anything else as one short line."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, list | dict):
        items = list(value.values()) if isinstance(value, dict) else value
        value = show_range(items) or ", ".join(str(show_number(show_value(item))) for item in items) or "none"
    text = printable(str(value))
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}... ({len(text):,} characters)"


def show_range(values: list[Any]) -> str | None:
    """Return "30 values, 0.1 to 0.2" for many numbers, None for anything else."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(values) <= MOST_VALUES or len(numbers) < len(values):
        return None
    return f"{len(values)} values, {show_number(min(numbers))} to {show_number(max(numbers))}"


def printable(text: str) -> str:
    """Return text with everything that could steer a terminal spelled out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# -------------------------------------------------------------------------------------------------- heat map


class Row(NamedTuple):
    """A line of the heat map: a shade per KV head (None in a sliding layer) between two texts."""

    label: str
    shades: list[int] | None
    remark: str


def show_heat_map(layers: list[Heads]) -> None:
    """Print a row per layer and a cell per KV head: in colour on a terminal, in shades of ASCII elsewhere."""
    num_heads = max((len(layer) for layer in layers if layer is not None), default=1)
    cell = 2 if num_heads <= WIDE else 1
    screen = console.rich_console()
    colour = screen.is_terminal and not screen.no_color and screen.color_system is not None
    console.answer("\ndocument keys kept: a row per layer, a cell per KV head")
    for row in [*heat_rows(layers), *legend(layers)]:
        if colour:
            screen.print(colour_row(row, num_heads, cell), soft_wrap=True)
        else:
            console.answer(plain_row(row, num_heads, cell))


def heat_rows(layers: list[Heads]) -> list[Row]:
    """Return a row per layer; shades follow the square root of the fraction: small ones differ too."""
    largest = max((fraction for layer in layers for fraction in layer or []), default=0.0)
    rows = []
    for index, layer in enumerate(layers):
        if layer is None:
            rows.append(Row(f"layer {index:>3}", None, "sliding window, not compacted"))
            continue
        mean = sum(layer) / len(layer)
        remark = f"{mean:6.1%}, from {min(layer):.1%} to {max(layer):.1%}"
        rows.append(Row(f"layer {index:>3}", [shade_of(fraction, largest) for fraction in layer], remark))
    return rows


def shade_of(fraction: float, largest: float) -> int:
    """Return 0 for no key at all, else 1 (few) to 9 (the head that keeps most)."""
    steps = len(SHADES) - 1
    return min(steps, 1 + int(steps * (fraction / largest) ** 0.5)) if fraction > 0 else 0


def legend(layers: list[Heads]) -> list[Row]:
    """Return a row per shade that occurs, most keys first, with the fraction at which it begins."""
    largest = max((fraction for layer in layers for fraction in layer or []), default=0.0)
    steps = len(SHADES) - 1
    used = {shade for row in heat_rows(layers) for shade in row.shades or []}
    return [
        Row("", None, ""),
        *(
            Row("", [shade], f"above {largest * ((shade - 1) / steps) ** 2:.1%}" if shade else "none")
            for shade in sorted(used, reverse=True)
        ),
    ]


def plain_row(row: Row, num_heads: int, cell: int) -> str:
    """Return a row in shades of ASCII."""
    if not row.remark:
        return ""
    shades = SLIDING * num_heads if row.shades is None else "".join(SHADES[shade] for shade in row.shades)
    body = "".join(shade * cell for shade in shades)
    width = num_heads * cell if row.label else cell
    return f"  {row.label:<9} |{body:<{width}}| {row.remark}"


def colour_row(row: Row, num_heads: int, cell: int) -> Text:
    """Return a row of coloured cells."""
    from rich.text import Text

    if row.shades is None:
        return Text(plain_row(row, num_heads, cell), style="dim")
    text = Text(f"  {row.label:<9}  ")
    for shade in row.shades:
        text.append(" " * cell, style=f"on {COLOURS[shade]}")
    return text.append(f"  {row.remark}")


def check_plot(plot: str, file: str) -> None:
    """Raise SettingsError or OutputError, before any work, when ``plot`` could not be drawn."""
    from compactor.output import check_output

    if not plot.lower().endswith(PICTURES):
        raise SettingsError(f"--plot draws {', '.join(PICTURES)}; {printable(plot)} ends in none of them.")
    if os.path.exists(plot) and os.path.exists(file) and os.path.samefile(plot, file):
        raise SettingsError("--plot would replace the compacted cache itself; give another name.")
    try:
        import matplotlib.figure  # noqa: F401 (only whether it is there)
    except ImportError:
        remedy = "install it with: pip install 'kv-compactor[plots]'"
        raise SettingsError(f"--plot needs matplotlib; {remedy}") from None
    check_output(plot, force=True)


def draw_heat_map(plot: str, metadata: CacheMetadata, layers: list[Heads]) -> None:
    """Draw the heat map to a picture; sliding layers stay grey. Raises OutputError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from compactor.output import write_atomically

    num_heads = metadata.model.num_kv_heads
    nothing = float("nan")
    percent = [[100 * f for f in layer] if layer is not None else [nothing] * num_heads for layer in layers]
    figure = Figure(figsize=(2.5 + max(3.0, 0.35 * num_heads), 1.5 + max(2.0, 0.2 * len(layers))))
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")
    image = axes.imshow(percent, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    figure.colorbar(image, label="document keys kept (%)")
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"{metadata.document_name}, {metadata.model.name}"
    axes.set_title(fill(printable(title)[:MOST_CHARACTERS], 60), parse_math=False, fontsize="medium")
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks
        figure.savefig(buffer, format=plot.lower().rpartition(".")[2], bbox_inches="tight", dpi=150)
    write_atomically(plot, [buffer.getbuffer()], force=True)
