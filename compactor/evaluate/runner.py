"""Knows the order of an evaluation: a document, its full cache, every method and size of it. Knows no single method.

A document is prefilled once; one study serves all methods and sizes. Every result is on the disk before the next is
begun, and what is there already is not run again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compactor import __version__
from compactor.attach import CompactedCache, attach_layers
from compactor.batch.runner import settings_digest
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.evaluate import peer
from compactor.evaluate.asking import CacheRespondent, Respondent, distances, mean_log_probs, speed
from compactor.evaluate.examples import Example, TaskDocument
from compactor.evaluate.metering import MeteredStudy
from compactor.evaluate.metrics import most_likely_choice, score
from compactor.evaluate.records import FULL, LONG_ANSWER, SHORT_ANSWER, Key, Record, ResultsFile
from compactor.fidelity import Exchange
from compactor.job import full_bytes, prepare, target_total
from compactor.methods import get_method
from compactor.pipeline import metadata
from compactor.prompt import check_window, encode_plain
from compactor.study import prefill_document, to_host
from compactor.types import Reporter, SilentReporter

if TYPE_CHECKING:
    from compactor.model import LoadedModel

NOT_OF_THE_RESULT = {  # settings that a key tells, or that no result depends on
    "method", "keep_ratio", "target_tokens", "max_bytes", "max_error", "budget", "reserve", "keep_curves", "certify",
    "require_kl", "grow",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is run on every document."""

    methods: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    settings: CompactSettings  # of all methods; its method and size are not used
    max_new_tokens: int | None  # of an answer, where its example names no limit; None: by the kind of answer
    peers: tuple[str, ...] = ()  # presses of kvpress, by class name

    @property
    def combinations(self) -> list[tuple[str, float | None]]:
        """Method and size of every result of a document, the full cache first."""
        methods = [*self.methods, *(peer.PREFIX + name for name in self.peers)]
        return [(FULL, None), *((method, ratio) for method in methods for ratio in self.keep_ratios)]


@dataclass(frozen=True)
class Source:
    """A document that can be made when its turn comes."""

    task: str
    name: str
    seed: int
    length: int | None  # tokens asked for; None: as it comes
    make: Callable[[], TaskDocument]


class Evaluation:
    """A run over documents; counts what became of every result."""

    def __init__(
        self,
        loaded: LoadedModel,
        plan: Plan,
        results: ResultsFile,
        reporter: Reporter,
        describe: Callable[[Exception], str] = str,
    ) -> None:
        """``describe`` makes the sentence of a failure."""
        self.loaded, self.plan, self.results = loaded, plan, results
        self.reporter, self.describe = reporter, describe
        self.num_present = self.num_done = self.num_failed = 0
        self.was_stopped = False

    def run(self, sources: Sequence[Source], out_of_time: Callable[[], bool] = lambda: False) -> Iterator[Record]:
        """Yield every new result once it is in the file.

        Before each document and each method ``out_of_time`` is asked, and the run stops when it says so. A failure
        becomes a record, the others go on. Raises OutputError when the results file cannot be written.
        """
        for source in sources:
            yield from self._source(source, out_of_time)
            if self.was_stopped:
                return

    def _source(self, source: Source, out_of_time: Callable[[], bool]) -> Iterator[Record]:
        plan, combinations = self.plan, self.plan.combinations
        blank, missing = self._blank(source), combinations
        try:
            document = source.make()
            blank = replace(blank, document=document.name, settings_sha256=self._digest(document))
            missing = [one for one in combinations if not self._is_there(blank, *one)]
            self.num_present += len(combinations) - len(missing)
            if not missing:
                return
            self.was_stopped = out_of_time()
            if self.was_stopped:
                return
            bench = Bench(self.loaded, document, plan, self.reporter)
        except Exception as failure:  # whatever it is, the other documents must not suffer from it
            for method, keep_ratio in missing:
                yield self._failed(blank, method, keep_ratio, failure)
            self._release()
            return
        for method, keep_ratio in missing:
            self.was_stopped = out_of_time()
            if self.was_stopped:
                break
            try:
                fields = bench.full_cache() if keep_ratio is None else bench.compacted(method, keep_ratio)
                self.num_done += 1
                yield self._append(replace(blank, method=method, keep_ratio=keep_ratio, status="done", **fields))
            except Exception as failure:
                yield self._failed(blank, method, keep_ratio, failure)
                self._release()
        del bench
        self._release()

    def _blank(self, source: Source) -> Record:
        """Return what every result of a document says."""
        settings = self.plan.settings.to_json() | {"max_new_tokens": self.plan.max_new_tokens}
        return Record(
            status="failed",
            model=model_name(self.loaded),
            task=source.task,
            document=source.name,
            seed=source.seed,
            length=source.length,
            method=FULL,
            keep_ratio=None,
            settings_sha256="",
            settings={name: value for name, value in settings.items() if name not in NOT_OF_THE_RESULT},
            device=device_name(self.loaded.device),
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            tool_version=__version__,
            torch_version=torch.__version__,
        )

    def _digest(self, document: TaskDocument) -> str:
        """Return the SHA-256 of all that decides a result besides method and size."""
        identity = asdict(self.loaded.identity())
        for where_it_lies in ("name", "revision"):
            del identity[where_it_lies]
        settings = self.plan.settings.to_json()
        return settings_digest(
            {name: value for name, value in settings.items() if name not in NOT_OF_THE_RESULT},
            max_new_tokens=self.plan.max_new_tokens,
            model=identity,
            dtype=str(self.loaded.dtype),
            document=hashlib.sha256(json.dumps(asdict(document)).encode()).hexdigest(),
            tool_version=__version__,
        )

    def _is_there(self, blank: Record, method: str, keep_ratio: float | None) -> bool:
        key = Key(blank.model, blank.task, blank.document, blank.seed, blank.length, method, keep_ratio)
        return self.results.has(key, blank.settings_sha256)

    def _failed(self, blank: Record, method: str, keep_ratio: float | None, failure: Exception) -> Record:
        self.num_failed += 1
        error, message = type(failure).__name__, self.describe(failure)
        return self._append(replace(blank, method=method, keep_ratio=keep_ratio, error=error, message=message))

    def _append(self, record: Record) -> Record:
        return self.results.append(replace(record, finished=datetime.now(UTC).isoformat(timespec="seconds")))

    def _release(self) -> None:
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()


class Bench:
    """One prefilled document and its questions, on which caches are tried."""

    def __init__(self, loaded: LoadedModel, document: TaskDocument, plan: Plan, reporter: Reporter) -> None:
        """Prefill, answer every question with the full cache. Raises DocumentError when the window is too small."""
        self.loaded, self.examples = loaded, document.examples
        settings = replace(plan.settings, keep_ratio=min(plan.keep_ratios))
        text = make_document(document.name, document.text)
        self.job = job = prepare(text, loaded, settings, _NotesOnly(reporter))
        self.questions = [
            [*job.prompt.question_ids(one.question), *encode_plain(loaded.tokenizer, one.answer_prefix)]
            for one in self.examples
        ]
        self.limits = [one.max_new_tokens or plan.max_new_tokens or answer_tokens(one) for one in self.examples]
        needed = max(len(asked) + limit for asked, limit in zip(self.questions, self.limits, strict=True))
        check_window(
            len(job.prompt.prefix_ids),
            len(job.document_ids),
            window=loaded.window,
            reserve=max(settings.reserve, needed),
            name=document.name,
        )
        full = prefill_document(job)
        self.study = MeteredStudy(job, full)
        self.full = CacheRespondent(loaded, attach_layers(loaded.model, full.layers, full.logical_length))
        self.answers = self._generate(self.full)
        self.exchanges = [Exchange(tuple(q), tuple(a)) for q, a in zip(self.questions, self.answers, strict=True)]
        self.full_states = self.full.states(self.exchanges)

    def full_cache(self) -> dict[str, Any]:
        """Return the fields of the full cache's record."""
        return self._common() | {
            "tensor_bytes": full_bytes(self.job),
            "seconds": 0.0,
            "shared_seconds": 0.0,
            **self._judged(self.full, self.answers),
        }

    def compacted(self, method: str, keep_ratio: float) -> dict[str, Any]:
        """Return the fields of a method's record at one size."""
        if method.startswith(peer.PREFIX):
            return self._common() | self._peer(method.removeprefix(peer.PREFIX), keep_ratio)
        job, study = self.job, self.study
        num_kept = target_total(replace(job, settings=replace(job.settings, keep_ratio=keep_ratio)))
        before = dict(job.seconds)
        made, cost = study.measure(lambda: get_method(method)(study, num_kept))
        phases = {step: seconds - before.get(step, 0.0) for step, seconds in job.seconds.items()}
        cache = CompactedCache([to_host(layer) for layer in made.layers], metadata(study, made, {}))
        respondent = CacheRespondent(self.loaded, cache.attach(self.loaded.model, check=False))
        return self._common() | {
            "kept_keys": cache.metadata.report["kept_keys"],
            "document_keys": cache.metadata.report["document_keys"],
            "file_bytes": bytes_on_disk(cache),
            "tensor_bytes": cache.nbytes,
            "seconds": cost.own_s,
            "shared_seconds": cost.shared_s,
            "phases": {step: seconds for step, seconds in phases.items() if seconds > 0},
            "predicted_damage": made.report.get("predicted_damage"),
            "report": {name: value for name, value in made.report.items() if type(value) in (int, float)},
            **self._compared(respondent),
        }

    def _peer(self, name: str, keep_ratio: float) -> dict[str, Any]:
        with peer.compressed(self.loaded, self.job, name, keep_ratio) as made:
            return {
                "tensor_bytes": made.tensor_bytes,
                "seconds": made.elapsed_s,
                "shared_seconds": 0.0,
                "phases": {"prefill with the press": made.elapsed_s},
                **self._compared(made.respondent),
            }

    def _common(self) -> dict[str, Any]:
        return {
            "document_tokens": len(self.job.document_ids),
            "full_bytes": full_bytes(self.job),
            "prefill_seconds": self.job.seconds["prefill"],
            "answer_tokens": [len(answer) for answer in self.answers],
            "expected": [" | ".join(one.answers) for one in self.examples],
            "kinds": [one.kind for one in self.examples],
        }

    def _generate(self, respondent: Respondent) -> list[list[int]]:
        answers = respondent.generate(self.questions, max(self.limits))
        return [answer[:limit] for answer, limit in zip(answers, self.limits, strict=True)]

    def _compared(self, respondent: Respondent) -> dict[str, Any]:
        """Return what a cache answers, and how far it is from the full one on the full one's answers."""
        answers = self._generate(respondent)
        fidelities = distances(self.loaded, self.full_states, respondent.states(self.exchanges), self.exchanges)
        return {
            "kl": [one.mean_kl for one in fidelities],
            "agreement": [float(one.agreement.double().mean()) for one in fidelities],
            "same": [ours == full for ours, full in zip(answers, self.answers, strict=True)],
            **self._judged(respondent, answers),
        }

    def _judged(self, respondent: Respondent, answers: list[list[int]]) -> dict[str, Any]:
        """Return scores of the answers, and the speed of the first question asked alone."""
        texts = [str(self.loaded.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        for index, choice in self._likely_choices(respondent).items():
            texts[index] = choice
        first_s, rate = speed(respondent, self.questions[0], self.loaded.device)
        return {
            "answers": texts,
            "scores": [score(one, text) for one, text in zip(self.examples, texts, strict=True)],
            "first_token_seconds": first_s,
            "tokens_per_second": rate,
        }

    def _likely_choices(self, respondent: Respondent) -> dict[int, str]:
        """Return the most likely choice, by mean log-probability, of each question that is judged by it."""
        asked = [i for i, one in enumerate(self.examples) if one.metric == "choice-likelihood"]
        exchanges = [
            Exchange(tuple(self.questions[i]), tuple(encode_plain(self.loaded.tokenizer, text)))
            for i in asked
            for text in choice_texts(self.examples[i])
        ]
        means = mean_log_probs(self.loaded, respondent, exchanges) if exchanges else []
        found = {}
        for i in asked:
            choices = self.examples[i].choices
            own, means = means[: len(choices)], means[len(choices) :]
            found[i] = choices[most_likely_choice(own)]
        return found


def answer_tokens(example: Example) -> int:
    """Return how many tokens an answer needs at most."""
    return LONG_ANSWER if example.metric in ("f1", "all") else SHORT_ANSWER


def choice_texts(example: Example) -> list[str]:
    """Return the choices as the model would go on to write them: after a prefix without a space comes one."""
    prefix = example.answer_prefix
    return [f" {choice}" if prefix and not prefix[-1].isspace() else choice for choice in example.choices]


def bytes_on_disk(cache: CompactedCache) -> int:
    """Save a cache, return the size of its file, and delete it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.kv"
        cache.save(path)
        return path.stat().st_size


def model_name(loaded: LoadedModel) -> str:
    """Return the model's name; of a folder or file its own name, which says nothing of this machine."""
    return Path(loaded.name).name if Path(loaded.name).is_absolute() else loaded.name


def device_name(device: torch.device) -> str:
    """Return what the model runs on, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


class _NotesOnly(SilentReporter):
    """Passes notes on; phases would be thousands."""

    def __init__(self, reporter: Reporter) -> None:
        self.note = reporter.note  # type: ignore[method-assign]
