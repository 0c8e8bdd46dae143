"""Knows the benchmark of compaction: its stages, their parts, and what each must do at least. Knows no tables.

A document of random tokens goes through the program's own pipeline, on a model with random weights. Stages are timed by
the program; the parts of the two passes over the reference rows by a clock around the functions of `PARTS`, which waits
for the device at both ends. "Model" is what remains of a pass: the layers' matrices, norms, activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch

from compactor import prompt as prompts
from compactor import sampling, study
from compactor.bench.counting import ModelCounts, precision_of
from compactor.bench.machine import describe_machine, measure_ceilings
from compactor.bench.random_model import make_random_model, random_tokens
from compactor.bench.report import Report, Row, Work
from compactor.bench.timing import Stages, Timing, timed
from compactor.bench.workloads import CompactBenchSettings
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.job import Job, target_total
from compactor.methods import method_module
from compactor.model import LoadedModel
from compactor.pipeline import compact_study
from compactor.prefill import prefill
from compactor.shared_layers import SharedLayer
from compactor.solve import chunk_grams, fit, key_scores
from compactor.solve.refine import rows_of_step
from compactor.stepping import Pick
from compactor.study import Study, picks_per_chunk, prefill_document
from compactor.types import Advance, LayerCache, Reporter, Segment
from compactor.workspace import bounded

PLAIN, OTHER, MODEL = "plain prefill", "other", "model"
STAGES = {"prefill": "prefill, context scores", "ask": "self-study"}  # what a step of a job is called here
PASSES = ("select", "fit")  # stages that are a pass of reference rows through the model
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {  # of a pass: owners and functions
    "exact attention": (
        (key_scores, "exact_rows"),
        (key_scores, "exact_parts"),
        (chunk_grams, "exact_rows"),
        (fit, "exact_rows"),
        (fit, "exact_parts"),
        (fit, "merged_rows"),
    ),
    "single scores": ((key_scores.KeySums, "add"), (key_scores.KeySums, "add_parts")),
    "Gram matrices": ((chunk_grams, "add_rows"),),
    "greedy search": ((study, "greedy_curves"),),
    "biases": ((fit, "choose_heads"),),
    "values": ((fit, "refit_heads"),),
    "refinement": ((fit, "refine_heads"),),
    "outputs": ((fit, "measured_outputs"),),
}


@dataclass
class MeasuredJob(Job):
    """A job that also notes the memory of its steps."""

    peaks: dict[str, int] = field(default_factory=dict)  # bytes, on a GPU

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds[step]``, and note the most memory that was held."""
        with peak_memory(self.loaded.device, self.peaks, step), super().timed(step):
            yield


@dataclass
class MeasuredStudy(Study):
    """A study that notes which segments went through the model for what."""

    passes: dict[str, list[int]] = field(default_factory=dict)  # by phase: lengths of all segments

    def run_layers(self, segments: Sequence[Segment], phase: str, make: study.MakeLayer) -> None:
        """Send segments through the model side by side; the last phase of `passes` is the one that runs."""
        self.passes[phase] = [*self.passes.pop(phase, []), *(len(segment.token_ids) for segment in segments)]
        super().run_layers(segments, phase, make)


@dataclass
class Asked:
    """A batch of self-study prompts and the steps that were taken after them."""

    of_sections: list[int]  # lengths of the prompts that see a section
    of_whole: list[int]
    section: int  # document tokens of a section
    steps: int = 0


@contextmanager
def noting_questions(asked: list[Asked]) -> Iterator[None]:
    """Note every batch of self-study inside."""
    original = sampling.answer  # type: ignore[attr-defined]

    def noted(
        loaded: LoadedModel,
        make_layers: partial[list[SharedLayer]],
        logical_length: int,
        questions: Sequence[list[int]],
        max_new_tokens: int,
        pick: Pick,
        stops: set[int],
        on_step: Advance,
    ) -> list[list[int]]:
        sections, lengths = make_layers.keywords["sections"], [len(one) for one in questions]
        split = sections.count * make_layers.keywords["rows_per_section"]
        batch = Asked(lengths[:split], lengths[split:], sections.size)
        asked.append(batch)

        def count(steps: int) -> None:
            batch.steps += steps
            on_step(steps)

        answers: list[list[int]] = original(
            loaded, make_layers, logical_length, questions, max_new_tokens, pick, stops, on_step=count
        )
        return answers

    setattr(sampling, "answer", noted)  # noqa: B010 - for the type checker it is another function
    try:
        yield
    finally:
        setattr(sampling, "answer", original)  # noqa: B010


@dataclass(frozen=True)
class Run:
    """One compaction."""

    elapsed_s: float
    seconds: dict[str, float]  # of every step of the job
    parts: dict[str, float]  # seconds of "pass/part"
    peaks: dict[str, int]  # of every step
    passes: dict[str, list[int]]
    asked: list[Asked]  # batches of self-study
    kept: list[int]  # document keys of every KV head of every layer
    num_picks: int  # of a chunk, where the search is greedy

    def times(self) -> dict[str, float]:
        """Return the seconds of every stage and of its parts, in order; ``other`` is what no step took."""
        found: dict[str, float] = {}
        for stage, elapsed_s in self.seconds.items():
            found[stage] = elapsed_s
            parts = {name: part_s for name, part_s in self.parts.items() if name.startswith(f"{stage}/")}
            if parts:
                found |= parts | {f"{stage}/{MODEL}": max(0.0, elapsed_s - sum(parts.values()))}
        return found | {OTHER: max(0.0, self.elapsed_s - sum(self.seconds.values()))}


@torch.no_grad()
def bench_compact(settings: CompactBenchSettings, device: torch.device, reporter: Reporter) -> Report:
    """Time the plain prefill and whole compactions, stage by stage; a run that is not timed comes before each."""
    settings = settings.on(device.type)
    assert settings.shape is not None and settings.tokens is not None
    ceilings = measure_ceilings(device)
    with reporter.phase(f"make {settings.shape}"):
        loaded = make_random_model(settings.shape, device, seed=settings.seed, tokens=settings.tokens)
    ids = random_tokens(loaded, settings.tokens, settings.seed)
    peaks: dict[str, int] = {}
    with peak_memory(device, peaks, PLAIN):
        plain = [plain_prefill(loaded, ids, reporter) for _ in range(settings.repeats + 1)][1:]
    runs = [compact_once(settings, loaded, ids, reporter) for _ in range(settings.repeats + 1)][1:]
    rows = rows_of(settings, loaded, ids, Timing.of(plain), runs, peaks)
    dtype = str(loaded.dtype).removeprefix("torch.")
    return Report("compact", describe_machine(device), ceilings, {**settings.to_json(), "dtype": dtype}, rows)


def plain_prefill(loaded: LoadedModel, ids: list[int], reporter: Reporter) -> float:
    """Return the seconds of a prefill that observes nothing."""
    prefix, chunk = list(prompts.build_prompt(loaded.tokenizer).prefix_ids), CompactSettings().prefill_chunk
    return timed(
        lambda: prefill(loaded, prefix, ids, prefill_chunk=chunk, head_gains=None, reporter=reporter), loaded.device
    )[1]


def compact_once(settings: CompactBenchSettings, loaded: LoadedModel, ids: list[int], reporter: Reporter) -> Run:
    """Compact a document of token ids as ``compact`` does, without reading and writing files."""
    chosen = CompactSettings(
        method=settings.method, keep_ratio=settings.keep, certify=settings.certify, seed=settings.seed
    )
    prompt, asked = prompts.build_prompt(loaded.tokenizer), list[Asked]()
    job = MeasuredJob(make_document("random tokens", "x"), loaded, chosen, prompt, ids, reporter)
    clock = Stages(loaded.device)

    passes: dict[str, list[int]] = {}

    def compact() -> tuple[MeasuredStudy, list[LayerCache]]:
        done = MeasuredStudy(job, prefill_document(job), passes=passes)
        return done, compact_study(done, target_total(job)).layers

    with clocked(clock, passes), noting_questions(asked), bounded(settings.workspace):
        (done, layers), elapsed_s = timed(compact, loaded.device)
    return Run(
        elapsed_s,
        dict(job.seconds),
        dict(clock.seconds),
        dict(job.peaks),
        dict(done.passes),
        asked,
        [length - len(prompt.prefix_ids) for layer in layers for length in layer.head_lengths],
        picks_per_chunk(done, target_total(job)),
    )


@contextmanager
def clocked(clock: Stages, passes: Collection[str]) -> Iterator[None]:
    """Time every function of `PARTS` inside, as the stage "pass/part" of the clock; ``passes``: those that began, in
    order."""
    with ExitStack() as undo:
        for name, functions in PARTS.items():
            for owner, function in functions:
                original = getattr(owner, function)
                setattr(owner, function, _timed_by(clock, name, passes, original))
                undo.callback(setattr, owner, function, original)
        yield


def _timed_by(clock: Stages, name: str, passes: Collection[str], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        *_, last = passes
        with clock.stage(f"{last}/{name}"):
            return function(*given, **named)

    return run


@contextmanager
def peak_memory(device: torch.device, peaks: dict[str, int], name: str) -> Iterator[None]:
    """Note the most GPU memory that was held inside; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device))


def rows_of(
    settings: CompactBenchSettings,
    loaded: LoadedModel,
    ids: list[int],
    plain: Timing,
    runs: Sequence[Run],
    peaks: dict[str, int],
) -> list[Row]:
    """Return a row for the plain prefill, one for the whole compaction, and one for each stage and part of it."""
    counts, last, precision = ModelCounts.of(loaded), runs[-1], precision_of(loaded.dtype)
    total = len(prompts.build_prompt(loaded.tokenizer).prefix_ids) + len(ids)
    work = stage_work(settings, loaded, counts, ids, last)
    sizes = {"tokens": len(ids), "kept": round(sum(last.kept) / len(last.kept))}
    memory = {"weights_bytes": float(counts.all_bytes), "full_kv_bytes": float(counts.kv_bytes * total)}

    def figures(timing: Timing, peak: int | None) -> dict[str, float]:
        found = {"times_prefill": timing.median_s / plain.median_s}
        if peak is not None:
            beyond_weights = peak - counts.all_bytes
            found |= {"peak_bytes": float(peak), "workspace_bytes": beyond_weights - memory["full_kv_bytes"]}
            found["peak_in_full_kv"] = beyond_weights / memory["full_kv_bytes"]  # the weights aside
        return found

    whole = Timing.of([run.elapsed_s for run in runs])
    top = [work[stage] for stage in work if "/" not in stage]
    peak = max((bytes_ for run in runs for bytes_ in run.peaks.values()), default=None)
    beyond = {"beyond_prefill": whole.median_s / plain.median_s - 1.0}
    rows = [
        Row(PLAIN, plain, sizes, [Work(counts.prefill(total), precision)], figures(plain, peaks.get(PLAIN)) | memory),
        Row(settings.method, whole, sizes, [one for works in top for one in works], figures(whole, peak) | beyond),
    ]
    for name in last.times():
        stage, _, part = name.partition("/")
        timing = Timing.of([run.times()[name] for run in runs])
        peak = max((run.peaks[name] for run in runs if name in run.peaks), default=None)
        shown = STAGES.get(stage, stage)
        rows.append(
            Row(
                part or shown,
                timing,
                sizes | ({"rows": sum(last.passes[stage])} if stage in last.passes else {}),
                work.get(name, []),
                {} if part else figures(timing, peak),
                part_of=shown if part else settings.method,
            )
        )
    return rows


def stage_work(
    settings: CompactBenchSettings, loaded: LoadedModel, counts: ModelCounts, ids: list[int], run: Run
) -> dict[str, list[Work]]:
    """Return what the counted stages of a run must do, and their parts as "pass/part"; see `counting`."""
    prefix_length, num_document = len(prompts.build_prompt(loaded.tokenizer).prefix_ids), len(ids)
    precision = precision_of(loaded.dtype)
    total = prefix_length + num_document
    found = {"prefill": [Work(counts.prefill(total) + counts.observed(prefix_length, num_document), precision)]}
    if run.asked:
        found["ask"] = [work for one in run.asked for work in self_study_work(counts, one, total, precision)]
    parts: dict[str, dict[str, float]] = {}
    for stage, segments in run.passes.items():
        parts[stage] = {"exact attention": counts.exact(segments, total), MODEL: counts.matrices(sum(segments))}
        if f"{stage}/single scores" in run.parts:
            parts[stage]["single scores"] = counts.attention(sum(segments) * num_document, products=1)
    fitted = sum(run.passes["fit"])
    if "select/Gram matrices" in run.parts:
        chunk = -(-num_document // -(-num_document // study.GREEDY_CHUNK))
        parts["select"]["Gram matrices"] = counts.gram(fitted, num_document, chunk)
        parts["select"]["greedy search"] = counts.greedy(num_document, chunk, run.num_picks)
    steps = getattr(method_module(settings.method), "REFINE_STEPS", 0)
    parts["fit"] |= counts.fit(fitted, run.kept, steps, rows_of_step(loaded.device))
    for stage, own in parts.items():
        works = {
            name: Work(operations, "float32" if name == "greedy search" else precision)
            for name, operations in own.items()
            if operations and (name == MODEL or f"{stage}/{name}" in run.parts)
        }
        found |= {f"{stage}/{name}": [one] for name, one in works.items()} | {stage: list(works.values())}
    return found


def self_study_work(counts: ModelCounts, asked: Asked, total: int, precision: str) -> list[Work]:
    """Return what a batch of self-study must do: the prompts at once, then steps of one token each, which read all
    weights and the document once. Rows see their section or the whole, ``total`` tokens; prefix and own tokens are not
    counted where there is a section."""
    num_rows = len(asked.of_sections) + len(asked.of_whole)
    num_prompt = sum(asked.of_sections) + sum(asked.of_whole)
    prompt_pairs = sum(asked.of_sections) * asked.section + sum(asked.of_whole) * total
    step_pairs = len(asked.of_sections) * asked.section + len(asked.of_whole) * total
    step_bytes = float(counts.step_bytes + counts.kv_bytes * total)
    steps = max(0, asked.steps - 1)
    return [
        Work(counts.matrices(num_prompt, num_rows) + counts.attention(prompt_pairs), precision, step_bytes),
        Work(
            steps * (counts.matrices(num_rows, num_rows) + counts.attention(step_pairs)), precision, steps * step_bytes
        ),
    ]
