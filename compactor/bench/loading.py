"""Knows the benchmark of loading: a file of random numbers, read, loaded, and asked one question. Knows no solver.

"Plain read" reads the file into memory that is there already: what the disk, or the page cache, gives at best. "Load"
is the program's own, which checks every checksum whatever is asked of it, and moves the tensors to the device. Cold
rows drop the file from the page cache first, where the system lets one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from compactor import __version__, attach, decode
from compactor import prompt as prompts
from compactor.bench.machine import describe_machine, measure_ceilings
from compactor.bench.random_model import make_random_model
from compactor.bench.report import Report, Row
from compactor.bench.synthetic_cache import CacheMaker
from compactor.bench.timing import Stages, Timing, timed
from compactor.bench.workloads import LoadSettings, ragged_lengths
from compactor.cache_file import load_cache, save_cache
from compactor.config import DecodeSettings
from compactor.errors import ModelError, OutputError
from compactor.model import LoadedModel, load_model
from compactor.types import CacheMetadata, LayerCache, Reporter

QUESTION = "What does the document say?"
PIECE = 16 << 20  # bytes of one call of a plain read
FIRST_TOKEN, WHOLE_PROCESS = "load to first token", "query, the whole process"
COLD, WARM = "cold", "warm"


@torch.no_grad()
def bench_load(settings: LoadSettings, device: torch.device, reporter: Reporter) -> Report:
    """Write a file, and time what stands between it and an answer.

    Raises OutputError where the folder cannot be written, and what loading a model raises.
    """
    settings = settings.on(device.type)
    assert settings.tokens is not None
    ceilings = measure_ceilings(device)
    loaded = get_model(settings, device, reporter)
    layers, metadata = make_cache(settings, loaded)
    with temporary_folder(settings.folder) as folder:
        path = folder / "bench.kv"
        with reporter.phase("write the file"):
            save_cache(path, layers, metadata)
        del layers
        bench = _Bench(settings, loaded, path, reporter)
        rows = [*bench.read_rows(), *bench.answer_rows(), *bench.process_rows()]
    dtype = str(loaded.dtype).removeprefix("torch.")
    return Report("load", describe_machine(device), ceilings, {**settings.to_json(), "dtype": dtype}, rows)


def get_model(settings: LoadSettings, device: torch.device, reporter: Reporter) -> LoadedModel:
    """Load the model of the settings, or make one of their shape."""
    if settings.model is not None:
        return load_model(settings.model, device=str(device), reporter=reporter)
    assert settings.shape is not None and settings.tokens is not None
    with reporter.phase(f"make {settings.shape}"):
        return make_random_model(settings.shape, device, seed=settings.seed, tokens=settings.tokens)


def make_cache(settings: LoadSettings, loaded: LoadedModel) -> tuple[list[LayerCache], CacheMetadata]:
    """Return a compacted cache of random numbers that the model accepts, and what its file says of itself."""
    assert settings.tokens is not None
    prefix_length = len(prompts.build_prompt(loaded.tokenizer).prefix_ids)
    dtype = torch.bfloat16 if loaded.dtype == torch.float32 else loaded.dtype  # as `compact` stores it
    maker = CacheMaker(settings.tokens, prefix_length, loaded.head_dim, dtype, loaded.device, settings.seed)
    lengths = ragged_lengths(settings.mean_kept, settings.spread, loaded.num_kv_heads, settings.tokens)
    layers = [
        maker.kept(lengths) if window is None else maker.last(loaded.num_kv_heads, window)
        for window in loaded.sliding_windows
    ]
    return layers, CacheMetadata(
        model=loaded.identity(),
        dtype=str(dtype).removeprefix("torch."),
        logical_length=maker.logical_length,
        prefix_length=prefix_length,
        position_scheme="contiguous",
        sliding_windows=list(loaded.sliding_windows),
        system=None,
        thinking=False,
        document_name="random numbers",
        document_sha256="0" * 64,
        document_tokens=settings.tokens,
        settings=settings.to_json(),
        seed=settings.seed,
        tool_version=__version__,
        report={},
    )


@contextmanager
def temporary_folder(parent: str | None) -> Iterator[Path]:
    """Make a folder that is gone afterwards. Raises OutputError where ``parent`` does not let one."""
    try:
        made = tempfile.TemporaryDirectory(prefix="compactor-bench-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        where, why = parent or tempfile.gettempdir(), error.strerror or error
        raise OutputError(f"No folder can be made in {where}: {why}; give another --folder.") from error
    with made as name:
        yield Path(name)


class _Bench:
    """A file and the rows about it."""

    def __init__(self, settings: LoadSettings, loaded: LoadedModel, path: Path, reporter: Reporter) -> None:
        self.settings, self.loaded, self.path, self.reporter = settings, loaded, path, reporter
        self.file_bytes = path.stat().st_size
        self.sizes = {"tokens": settings.tokens or 0, "kept": settings.mean_kept}
        self.states = [COLD, WARM] if drop_from_page_cache(path) else [WARM]
        if self.states == [WARM]:
            reporter.note("This system does not let a file be dropped from the page cache: there are no cold rows.")

    def read_rows(self) -> list[Row]:
        """Return rows of reading the file plainly, and of loading it."""
        buffer, found, device = memoryview(bytearray(self.file_bytes)), [], self.loaded.device
        for state in self.states:
            before = blocks_read() if state == COLD else -1
            plain = self._time("plain read", state, lambda: read_plainly(self.path, buffer))
            if state == COLD and blocks_read() == before:
                self.reporter.note(
                    "The system counts no block read from a disk (a folder in memory, or another's page cache): cold "
                    "rows may be warm ones; try another --folder."
                )
            load = self._time("load", state, lambda: load_cache(self.path, device=device))
            found.append(self._row(f"plain read, {state}", plain, plain))
            found.append(self._row(f"load, {state}", load, plain))
        return found

    def answer_rows(self) -> list[Row]:
        """Return rows of the way from the file to the first token, the model being there; and of its parts."""
        found = []
        for state in self.states:
            runs: list[dict[str, float]] = []
            self._time(FIRST_TOKEN, state, lambda: runs.append(self._answer()))  # noqa: B023
            first, *timed_runs = runs
            name = f"{FIRST_TOKEN}, {state}"
            figures = {"untimed_first_run_s": sum(first.values())}
            whole = Timing.of([sum(run.values()) for run in timed_runs])
            found.append(Row(name, whole, self.sizes, figures=figures))
            for part in first:
                found.append(Row(part, Timing.of([run[part] for run in timed_runs]), self.sizes, part_of=name))
        return found

    def _answer(self) -> dict[str, float]:
        """Do as ``query`` does with a model that is loaded; return the seconds of each part."""
        clock = Stages(self.loaded.device)
        prompt = prompts.build_prompt(self.loaded.tokenizer)
        with clock.stage("map and check"):
            cache = attach.load(self.path)
        with clock.stage("attach"):
            attached = cache.attach(self.loaded.model, check=False)
        with clock.stage("first token"):
            decode.answer_question(self.loaded, attached, prompt, QUESTION, DecodeSettings(max_new_tokens=1))
        return clock.seconds

    def process_rows(self) -> list[Row]:
        """Return the row of ``query`` in a process of its own, where the model is one that it can load."""
        if self.settings.model is None:
            return []
        timing = self._time(WHOLE_PROCESS, WARM, lambda: run_query(self.path, self.loaded.device))
        return [Row(WHOLE_PROCESS, timing, self.sizes)]

    def _time(self, name: str, state: str, run: Callable[[], object]) -> Timing:
        """Time a few runs after one that is not timed, the file dropped before each where it is to be cold."""
        times_s = []
        with self.reporter.phase(f"{name}, {state}", self.settings.repeats + 1, "runs") as advance:
            for _ in range(self.settings.repeats + 1):
                if state == COLD:
                    drop_from_page_cache(self.path)
                times_s.append(timed(run, self.loaded.device)[1])
                advance(1)
        return Timing.of(times_s[1:])

    def _row(self, name: str, timing: Timing, plain: Timing) -> Row:
        figures = {
            "file_bytes": float(self.file_bytes),
            "bytes_per_s": self.file_bytes / timing.median_s,
            "of_plain_read": plain.median_s / timing.median_s,
        }
        return Row(name, timing, self.sizes, figures=figures)


def drop_from_page_cache(path: Path) -> bool:
    """Let the system forget a file that is on the disk and that nobody has mapped; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return True


def blocks_read() -> int:
    """Return how many blocks this process has read from disks."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def read_plainly(path: Path, buffer: memoryview) -> None:
    """Read a file of the buffer's size into it."""
    done = 0
    with open(path, "rb", buffering=0) as file:
        while done < len(buffer):
            done += file.readinto(buffer[done : done + PIECE])


def run_query(path: Path, device: torch.device) -> None:
    """Ask one question for one token by the command itself. Raises ModelError where it fails."""
    words = [sys.executable, "-m", "compactor", "query", str(path), QUESTION, "--max-new-tokens", "1", "--quiet"]
    done = subprocess.run([*words, "--offline", "--device", str(device)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"`query` failed: {done.stderr.strip().removeprefix('error: ')}")
