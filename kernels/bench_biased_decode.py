"""Knows how to time `biased_decode` against torch and against the copy bandwidth of the GPU. Knows no model.

Run `python -m compactor_kernels.bench_biased_decode [--json] [--batch N ...] [--q-len N ...]`. Times are
medians over replays of a CUDA graph of `CALLS_PER_GRAPH` calls, divided by their number. "Cold" calls visit
different caches in turn, so that none is found in the L2 cache, as when a model visits its layers; "warm"
calls all read one cache. Torch is timed cold. "Of copy" is the bytes of keys, values and biases, read once,
over the cold time, as a fraction of the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import triton

from compactor_kernels.biased_decode import biased_decode
from compactor_kernels.reference import biased_attention_reference

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16
CALLS_PER_GRAPH = 32
REPLAYS = 30
COLD_L2_MULTIPLE = 4  # the caches visited in turn hold this many times the L2 cache

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """The kept keys of one layer, ragged for the kernel and padded for torch."""

    keys: torch.Tensor  # (num_kept, head_dim)
    values: torch.Tensor  # (num_kept, head_dim)
    biases: torch.Tensor  # (num_kept,) float32
    offsets: torch.Tensor  # (num_kv_heads + 1,) int32
    padded_keys: torch.Tensor  # (1, num_kv_heads, padded, head_dim)
    padded_values: torch.Tensor  # (1, num_kv_heads, padded, head_dim)
    mask: torch.Tensor  # (1, num_kv_heads, 1, padded), the biases, -inf where padded

    @property
    def nbytes(self) -> int:
        """Bytes that one call must read at least."""
        return self.keys.nbytes + self.values.nbytes + self.biases.nbytes


@dataclass(frozen=True)
class Result:
    """One row of the table; times in microseconds, fractions of the measured copy bandwidth."""

    case: str
    batch: int
    q_len: int
    num_kept: int
    longest_head: int
    cold_us: float
    cold_spread_us: float
    warm_us: float
    copy_fraction: float
    sdpa_grouped_us: float | None  # None where torch cannot run or capture it
    sdpa_repeated_us: float | None
    max_error: float  # against float64
    sdpa_max_error: float | None


def ragged_lengths(average: int, spread: float) -> list[int]:
    """Return lengths of the KV heads in geometric steps, the longest ``spread`` times the shortest."""
    weights = [spread ** (head / (NUM_KV_HEADS - 1)) for head in range(NUM_KV_HEADS)]
    return [round(average * NUM_KV_HEADS * weight / sum(weights)) for weight in weights]


def make_layer(lengths: Sequence[int], generator: torch.Generator) -> Layer:
    """Return a layer of random normal keys and values and biases within [-1, 3]."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(DTYPE)

    num_kept, padded = sum(lengths), 16 * math.ceil(max(lengths) / 16)
    keys, values = normal(num_kept, HEAD_DIM), normal(num_kept, HEAD_DIM)
    biases = torch.rand(num_kept, generator=generator, device="cuda") * 4 - 1
    bounds = [sum(lengths[:head]) for head in range(len(lengths) + 1)]
    padded_keys, padded_values = (
        torch.zeros(1, len(lengths), padded, HEAD_DIM, dtype=DTYPE, device="cuda") for _ in range(2)
    )
    mask = torch.full((1, len(lengths), 1, padded), -math.inf, dtype=DTYPE, device="cuda")
    for head, length in enumerate(lengths):
        kept = slice(bounds[head], bounds[head + 1])
        padded_keys[0, head, :length], padded_values[0, head, :length] = keys[kept], values[kept]
        mask[0, head, 0, :length] = biases[kept].to(DTYPE)
    offsets = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    return Layer(keys, values, biases, offsets, padded_keys, padded_values, mask)


def sdpa_grouped(queries: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Torch SDPA over padded heads, the query heads of a group as rows of one KV head: no key is repeated."""
    batch, _, q_len, _ = queries.shape
    rows = queries.reshape(batch, NUM_KV_HEADS, -1, HEAD_DIM)
    out = torch.nn.functional.scaled_dot_product_attention(
        rows,
        layer.padded_keys.expand(batch, -1, -1, -1),
        layer.padded_values.expand(batch, -1, -1, -1),
        attn_mask=layer.mask.expand(batch, -1, rows.shape[2], -1),
    )
    return out.view(batch, NUM_HEADS, q_len, HEAD_DIM)


def sdpa_repeated(queries: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Torch SDPA over padded heads, each call repeating keys and values for each query head."""
    batch, group = queries.shape[0], NUM_HEADS // NUM_KV_HEADS
    return torch.nn.functional.scaled_dot_product_attention(
        queries,
        layer.padded_keys.repeat_interleave(group, 1).expand(batch, -1, -1, -1),
        layer.padded_values.repeat_interleave(group, 1).expand(batch, -1, -1, -1),
        attn_mask=layer.mask.repeat_interleave(group, 1).expand(batch, -1, queries.shape[2], -1),
    )


def replay_times_us(calls: Sequence[Call]) -> list[float]:
    """Return microseconds per call of each replay of one CUDA graph that makes all ``calls`` in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and warm up before the capture
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times_us = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_us.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return times_us


def median_us(calls: Sequence[Call]) -> float | None:
    """Return the median microseconds per call, or None where torch cannot run or capture it."""
    try:
        return statistics.median(replay_times_us(calls))
    except RuntimeError:
        return None


def largest_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest absolute difference."""
    return float((out - exact).abs().max())


def copy_bandwidth() -> float:
    """Return bytes per second, read plus written, of a device copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    elapsed_us = statistics.median(replay_times_us([lambda: target.copy_(source)] * 4))
    return 2 * source.nbytes / (elapsed_us * 1e-6)


def run_case(name: str, lengths: Sequence[int], batch: int, q_len: int, copy_bytes_per_s: float) -> Result:
    """Time and check one size."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    layer_bytes = 2 * sum(lengths) * HEAD_DIM * DTYPE.itemsize
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    num_layers = min(CALLS_PER_GRAPH, max(2, math.ceil(COLD_L2_MULTIPLE * l2_bytes / layer_bytes)))
    layers = [make_layer(lengths, generator) for _ in range(num_layers)]
    queries = torch.randn(batch, NUM_HEADS, q_len, HEAD_DIM, generator=generator, device="cuda").to(DTYPE)
    scaling, longest = HEAD_DIM**-0.5, max(lengths)

    def ours(layer: Layer) -> torch.Tensor:
        kept = (layer.keys, layer.values, layer.biases, layer.offsets)
        return biased_decode(queries, *kept, scaling=scaling, max_head_length=longest).out

    def in_turn(attend: Callable[[Layer], torch.Tensor]) -> list[Call]:
        return [partial(attend, layers[call % num_layers]) for call in range(CALLS_PER_GRAPH)]

    first = layers[0]
    kept = (first.keys.double(), first.values.double(), first.biases, first.offsets)
    exact = biased_attention_reference(queries.double(), *kept, scaling=scaling).out
    cold_us = replay_times_us(in_turn(ours))
    cold = statistics.median(cold_us)
    grouped_us = median_us(in_turn(partial(sdpa_grouped, queries)))
    repeated_us = median_us(in_turn(partial(sdpa_repeated, queries)))
    return Result(
        case=name,
        batch=batch,
        q_len=q_len,
        num_kept=sum(lengths),
        longest_head=longest,
        cold_us=cold,
        cold_spread_us=max(cold_us) - min(cold_us),
        warm_us=statistics.median(replay_times_us([partial(ours, first)] * CALLS_PER_GRAPH)),
        copy_fraction=first.nbytes / (cold * 1e-6) / copy_bytes_per_s,
        sdpa_grouped_us=grouped_us,
        sdpa_repeated_us=repeated_us,
        max_error=largest_error(ours(first), exact),
        sdpa_max_error=None if grouped_us is None else largest_error(sdpa_grouped(queries, first), exact),
    )


def table(results: Sequence[Result]) -> str:
    """Return the results as text, one line a size."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    times = ("cold us", "+-", "warm us", "of copy", "SDPA us", "SDPA repeated us")
    lines = [("keys kept", "batch", "q_len", *times, "error", "SDPA error")]
    for row in results:
        lines.append(
            (
                row.case,
                str(row.batch),
                str(row.q_len),
                number(row.cold_us, 1),
                number(row.cold_spread_us / 2, 1),
                number(row.warm_us, 1),
                f"{row.copy_fraction:.0%}",
                number(row.sdpa_grouped_us, 1),
                number(row.sdpa_repeated_us, 1),
                f"{row.max_error:.1e}",
                "-" if row.sdpa_max_error is None else f"{row.sdpa_max_error:.1e}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Time biased_decode: 32/8 heads, head_dim 128, bf16.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences of one document")
    parser.add_argument("--q-len", type=int, nargs="+", default=[1], help="new tokens of each sequence")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("This benchmark needs a GPU that torch can use; none was found.\n")
        return 1
    copy_bytes_per_s = copy_bandwidth()
    cases = {"1229 ragged 20:1": ragged_lengths(1229, 20.0), "61440 equal": [61_440] * NUM_KV_HEADS}
    results = [
        run_case(name, lengths, batch, q_len, copy_bytes_per_s)
        for name, lengths in cases.items()
        for q_len in options.q_len
        for batch in options.batch
    ]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    machine = {"device": torch.cuda.get_device_name(), **versions}
    if options.json:
        rows = [asdict(row) for row in results]
        report = {**machine, "copy_bytes_per_s": copy_bytes_per_s, "results": rows}
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        sys.stdout.write(", ".join(f"{name} {value}" for name, value in machine.items()))
        sys.stdout.write(f", copy {copy_bytes_per_s / 1e12:.2f} TB/s\n{table(results)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
