"""Knows what a question and a document with questions are. Knows neither where they come from nor who answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Metric = Literal["exact", "f1", "all", "choice", "choice-likelihood"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class Example:
    """One question about a document."""

    question: str
    answers: tuple[str, ...]  # any of them is right; with the metric "all" every one must occur
    metric: Metric
    choices: tuple[str, ...] = ()  # the right one is in ``answers``
    kind: str = ""  # sub-kind, such as "single-needle" or "plain-fact"
    evidence: tuple[str, ...] = ()  # sentences of the text that state the answer, in its order; built-in tasks only
    answer_prefix: str = ""  # text with which the answer is to begin; not part of what the model writes
    max_new_tokens: int | None = None  # None: the runner's default


@dataclass(frozen=True)
class TaskDocument:
    """One document, compacted once and asked many questions."""

    task: str
    name: str
    text: str
    examples: tuple[Example, ...]
    seed: int
