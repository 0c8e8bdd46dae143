"""Knows the benchmark of answering: over the compacted cache, the full one, and by ``generate``. Knows no solver.

The caches hold random numbers, for what a step costs depends on sizes alone; heads of the compacted one keep unequal
counts. A row's time is that of one step: a token of every sequence, steady, after the first few. It needs at least the
weights that a token passes, and the document's keys, values and biases, each read once; with ``generate`` every
sequence has a copy of the document.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer

from compactor import attention
from compactor.attach import attach_layers, dense_heads
from compactor.bench.counting import ModelCounts, precision_of
from compactor.bench.machine import describe_machine, measure_ceilings
from compactor.bench.random_model import make_random_model, random_tokens
from compactor.bench.report import Ceilings, Report, Row, Work
from compactor.bench.shapes import SHAPES
from compactor.bench.synthetic_cache import CacheMaker, read_bytes
from compactor.bench.timing import Timing, synchronize
from compactor.bench.workloads import DecodeBenchSettings, ragged_lengths
from compactor.fused import fuse
from compactor.stepping import AHEAD, WARM_STEPS, document_layers, greedy, stream
from compactor.types import LayerCache, Reporter

if TYPE_CHECKING:
    from compactor.model import LoadedModel

COMPACTED, FULL, GENERATE = WAYS = "compacted cache", "full cache", "generate, full cache"
SETTLED = WARM_STEPS + 2 + AHEAD  # tokens until steps have fixed shapes, and are replayed where that can be

Answer = Callable[[Sequence[list[int]]], list[float]]  # questions -> seconds until each token of the answers


@dataclass(frozen=True)
class Answered:
    """What was seen of one way to answer a batch."""

    way: str
    batch: int
    runs: list[list[float]]  # seconds from the question to each token
    cache_bytes: int  # that a step reads at least
    keys: float  # of a head, on average

    @property
    def step(self) -> Timing:
        """Seconds of a step, the first tokens aside."""
        return Timing.of([(run[-1] - run[SETTLED]) / (len(run) - 1 - SETTLED) for run in self.runs])


@torch.no_grad()
def bench_decode(settings: DecodeBenchSettings, device: torch.device, reporter: Reporter) -> Report:
    """Time one question, and a batch of them about one document, in three ways."""
    settings = settings.on(device.type)
    assert settings.shape is not None and settings.tokens is not None
    num_kv_heads = SHAPES[settings.shape].num_kv_heads
    lengths = ragged_lengths(settings.mean_kept, settings.spread, num_kv_heads, settings.tokens)
    ceilings = measure_ceilings(device)
    total = settings.tokens + settings.question + settings.new_tokens
    with reporter.phase(f"make {settings.shape}"):
        loaded = make_random_model(settings.shape, device, seed=settings.seed, tokens=total, fused=False)
    maker = CacheMaker(settings.tokens, 0, loaded.head_dim, loaded.dtype, device, settings.seed)
    bench = _Bench(settings, loaded, reporter)
    full = [maker.full(num_kv_heads) for _ in range(loaded.num_layers)]
    answered = bench.generated(full)  # by the model as transformers has it
    fuse(loaded.model)
    answered += bench.ours(FULL, full, read_bytes(full, with_biases=False))
    kept = [maker.kept(lengths) for _ in range(loaded.num_layers)]
    answered += bench.ours(COMPACTED, kept, read_bytes(kept))
    dtype = str(loaded.dtype).removeprefix("torch.")
    rows = rows_of(answered, ModelCounts.of(loaded), settings, precision_of(loaded.dtype), ceilings)
    return Report("decode", describe_machine(device), ceilings, {**settings.to_json(), "dtype": dtype}, rows)


class _Bench:
    """Runs every way to answer, at every batch size."""

    def __init__(self, settings: DecodeBenchSettings, loaded: LoadedModel, reporter: Reporter) -> None:
        self.settings, self.loaded, self.reporter = settings, loaded, reporter
        drawn = random_tokens(loaded, settings.batch * settings.question, settings.seed)
        self.questions = [drawn[i * settings.question :][: settings.question] for i in range(settings.batch)]

    def ours(self, way: str, layers: list[LayerCache], cache_bytes: int) -> list[Answered]:
        """Answer by the program's own loop over any cache that sequences share."""
        loaded, settings = self.loaded, self.settings
        cache = attach_layers(loaded.model, layers, settings.tokens or 0)
        make = document_layers(cache)

        def answer(questions: Sequence[list[int]]) -> list[float]:
            clock = _Clock(loaded.device)
            for _ in stream(loaded, make, cache.logical_length, questions, settings.new_tokens, greedy):
                clock.tick()
            return clock.times_s

        keys = sum(sum(layer.head_lengths) for layer in layers) / (loaded.num_layers * loaded.num_kv_heads)
        return [self._run(way, answer, batch, cache_bytes, keys) for batch in settings.batches]

    def generated(self, full: list[LayerCache]) -> list[Answered]:
        """Answer by transformers alone, with its own growing cache and PyTorch's attention."""
        loaded, settings = self.loaded, self.settings
        cache_bytes = read_bytes(full, with_biases=False)
        answered = []
        loaded.model.set_attn_implementation("sdpa")
        try:
            for batch in settings.batches:
                needed, free = batch * cache_bytes, free_bytes(loaded.device)
                if free is not None and needed > free:
                    self.reporter.note(
                        f"{GENERATE} at batch {batch} is left out: it copies the document for every sequence, "
                        f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free."
                    )
                    continue
                answered.append(self._run(GENERATE, self._generate(full), batch, needed, float(settings.tokens or 0)))
        finally:
            attention.register(loaded.model)
        return answered

    def _generate(self, full: list[LayerCache]) -> Answer:
        loaded, settings = self.loaded, self.settings
        count = settings.new_tokens
        config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=[],
                                  pad_token_id=0)  # fmt: skip

        def answer(questions: Sequence[list[int]]) -> list[float]:
            cache = Cache(layers=[grown_layer(layer, len(questions)) for layer in full])
            ids = torch.tensor(questions, device=loaded.device)
            clock = _Clock(loaded.device)
            generate: Any = loaded.model.generate
            generate(
                ids,
                attention_mask=ids.new_ones(len(ids), (settings.tokens or 0) + ids.shape[1]),
                past_key_values=cache,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_Ticking(clock)]),
            )
            return clock.times_s

        return answer

    def _run(self, way: str, answer: Answer, batch: int, cache_bytes: int, keys: float) -> Answered:
        """Answer a few times, after a run that is not timed."""
        runs = []
        with self.reporter.phase(f"{way}, {batch}", self.settings.repeats + 1, "runs") as advance:
            for _ in range(self.settings.repeats + 1):
                runs.append(answer(self.questions[:batch]))
                advance(1)
        return Answered(way, batch, runs[1:], cache_bytes, keys)


class _Clock:
    """Seconds since it was made, at every tick."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times_s: list[float] = []
        synchronize(device)
        self.started = time.perf_counter()

    def tick(self) -> None:
        """Take note that a token has come."""
        self.times_s.append(time.perf_counter() - self.started)


class _Ticking(StoppingCriteria):
    """Stops nothing, and takes the time of every token; ``generate`` waits for each anyway."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        synchronize(self.clock.device)
        self.clock.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def grown_layer(layer: LayerCache, batch: int) -> DynamicLayer:
    """Return transformers' own layer over a full one; nothing is copied until it grows."""
    keys, values = (part.expand(batch, -1, -1, -1) for part in dense_heads(layer))
    grown = DynamicLayer()
    grown.lazy_initialization(keys, values)
    grown.keys, grown.values = keys, values
    return grown


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes of GPU memory that a tensor may take; None elsewhere."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def rows_of(
    answered: Sequence[Answered],
    counts: ModelCounts,
    settings: DecodeBenchSettings,
    precision: str,
    ceilings: Ceilings,
) -> list[Row]:
    """Return a row for every way and batch size, by batch size; ratios are of tokens per second."""
    rates = {(one.way, one.batch): one.batch / one.step.median_s for one in answered}
    weights_s = counts.step_bytes / ceilings.copy_bytes_per_s
    rows = []
    order = {way: number for number, way in enumerate(WAYS)}
    for one in sorted(answered, key=lambda one: (one.batch, order.get(one.way, len(order)))):
        rate, step, whole = rates[one.way, one.batch], one.step, statistics.median(run[-1] for run in one.runs)
        others = {"times_full": (FULL, one.batch), "times_generate": (GENERATE, one.batch), "times_alone": (one.way, 1)}
        figures = {
            "first_token_s": statistics.median(run[0] for run in one.runs),
            "tokens_per_s": rate,
            "whole_tokens_per_s": one.batch * settings.new_tokens / whole,
            "weight_bound_per_s": one.batch / weights_s,
            "of_weight_bound": weights_s / step.median_s,
            "weights_bytes": float(counts.step_bytes),
            "cache_bytes": float(one.cache_bytes),
            **{name: rate / rates[other] for name, other in others.items() if other in rates},
        }
        work = Work(
            counts.matrices(one.batch, one.batch) + counts.attention(one.batch * one.keys),
            precision,
            counts.step_bytes + one.cache_bytes,
        )
        sizes = {"tokens": settings.tokens or 0, "new_tokens": settings.new_tokens, "batch": one.batch}
        rows.append(Row(one.way, step, sizes, [work], figures))
    return rows
