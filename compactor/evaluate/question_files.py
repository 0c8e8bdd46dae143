"""Knows files of questions as JSON lines, not models or caches.

One object a line: ``context``, ``question`` and ``answer`` (a string, a number or a list of strings) or ``answers``;
optionally ``choices``, ``task``, ``answer_prefix``, ``max_new_tokens`` and ``metric``. Exports of the hub data sets
that kvpress evaluates have these columns. Other keys are passed over.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compactor.document import STDIN
from compactor.errors import DocumentError
from compactor.evaluate.examples import METRICS, Example, Metric, TaskDocument
from compactor.evaluate.metrics import LETTERS, choice_prompt, normalise

SHORT_ANSWER_WORDS = 4  # longer answers are judged by F1, not by occurrence
ALL_ANSWER_TASKS = ("niah", "vt", "cwe", "fwe")  # RULER (arXiv 2404.06654): a list means all of them, not any


@dataclass(frozen=True)
class _Line:
    """One line of the file."""

    context: str
    task: str
    examples: tuple[Example, ...]
    number: int  # counted from 1


def read_question_file(path: str) -> list[TaskDocument]:
    """Read questions from a file, or from standard input for ``-``; equal contexts become one document.

    The metric is the line's ``metric``, or: with choices, one example by likelihood and one by generation; a list in
    ``answer`` of a RULER retrieval, tracking or counting task, "all"; answers of up to SHORT_ANSWER_WORDS words,
    "exact"; longer ones, "f1". A right choice is given by its text, its letter or its index from 0.

    Raises DocumentError, with file and line number where there is one, when the file cannot be read, has no
    questions, or a line is not such an object.
    """
    if path == STDIN:
        return _group(_lines(sys.stdin.buffer, "stdin"), "stdin", "stdin")
    file = Path(path)
    try:
        with file.open("rb") as stream:
            return _group(_lines(stream, path), path, file.stem)
    except FileNotFoundError:
        raise DocumentError(f"{path} does not exist; check the path.") from None
    except IsADirectoryError:
        raise DocumentError(f"{path} is a folder; give a file of JSON lines.") from None
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the path
        reason = getattr(failure, "strerror", None) or failure
        raise DocumentError(f"{path!r} cannot be read: {reason}.") from failure


def _group(lines: Iterator[_Line], path: str, stem: str) -> list[TaskDocument]:
    groups: dict[str, list[_Line]] = {}
    for line in lines:
        groups.setdefault(line.context, []).append(line)
    if not groups:
        raise DocumentError(f"{path} has no questions; give JSON lines with context, question and answer.")
    documents = []
    for context, members in groups.items():
        tasks = {member.task for member in members}
        task = tasks.pop() if len(tasks) == 1 else ""
        examples = tuple(example for member in members for example in member.examples)
        documents.append(TaskDocument(task or stem, f"{stem}-{members[0].number}", context, examples, seed=0))
    return documents


def _lines(stream: IO[bytes], path: str) -> Iterator[_Line]:
    for number, data in enumerate(stream, start=1):
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data.strip():
            yield _Fields(data, f"{path}, line {number}").line(number)


class _Fields:
    """The checked fields of one line."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        try:
            value: Any = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise DocumentError(f"{where}: the text is not UTF-8; convert the file.") from None
        except (ValueError, RecursionError) as failure:
            raise DocumentError(f"{where}: this is not JSON ({failure}); write one object a line.") from None
        if not isinstance(value, dict):
            raise self.wrong("this is not an object; write one object with context, question and answer a line")
        self.value: dict[str, Any] = value

    def wrong(self, what: str) -> DocumentError:
        return DocumentError(f"{self.where}: {what}.")

    def line(self, number: int) -> _Line:
        context = self.text("context").replace("\r\n", "\n").replace("\r", "\n")
        return _Line(context, self.text("task", optional=True), tuple(self.examples()), number)

    def text(self, name: str, *, optional: bool = False) -> str:
        """Return a string field; a required one must have something in it."""
        value = self.value.get(name)
        if value is None and optional:
            return ""
        if value is None:
            raise self.wrong(f'"{name}" is missing; add it')
        text = self.string(name, value)
        if not optional and not text.strip():
            raise self.wrong(f'"{name}" is empty; give at least one word')
        return text

    def string(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.wrong(f'"{name}" must be text, not {type(value).__name__}')
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self.wrong(f'"{name}" has half of a character pair; repair the text') from None
        return value

    def strings(self, name: str, value: object) -> tuple[str, ...]:
        """Return a field that is a string, a number, or a list of these."""
        entries = value if isinstance(value, list) else [value]
        numbers = [isinstance(entry, int | float) and not isinstance(entry, bool) for entry in entries]
        texts = tuple(
            str(entry) if is_number else self.string(name, entry)
            for entry, is_number in zip(entries, numbers, strict=True)
        )
        if not texts or not all(text.strip() for text in texts):
            raise self.wrong(f'"{name}" is empty; give at least one answer')
        return tuple(dict.fromkeys(texts))

    def examples(self) -> Iterator[Example]:
        question, task = self.text("question"), self.text("task", optional=True)
        name = "answer" if self.value.get("answer") is not None else "answers"
        given = self.value.get(name)
        if given is None:
            raise self.wrong('"answer" is missing; add it')
        choices = () if self.value.get("choices") is None else self.choices()
        answers = self.right_choice(name, given, choices) if choices else self.strings(name, given)
        prefix, limit = self.text("answer_prefix", optional=True), self.max_new_tokens()
        for metric in self.metrics(task, answers, choices, several=name == "answer" and isinstance(given, list)):
            asked = choice_prompt(question, choices) if metric == "choice" else question
            yield Example(asked, answers, metric, choices, task, answer_prefix=prefix, max_new_tokens=limit)

    def choices(self) -> tuple[str, ...]:
        value = self.value["choices"]
        choices = self.strings("choices", value)
        if not isinstance(value, list) or len(choices) < len(value) or not 2 <= len(choices) <= len(LETTERS):
            raise self.wrong(f'"choices" must be a list of 2 to {len(LETTERS)} different texts')
        return choices

    def right_choice(self, name: str, given: object, choices: Sequence[str]) -> tuple[str, ...]:
        """Return the texts of the right choices, each given by its text, its letter or its index."""
        right = []
        for entry in given if isinstance(given, list) else [given]:
            if str(entry) in choices:
                index = choices.index(str(entry))
            elif isinstance(entry, int) and not isinstance(entry, bool):
                index = entry
            else:
                letter = self.string(name, entry).strip().upper()
                index = LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS else -1
            if not 0 <= index < len(choices):
                raise self.wrong(f'"{name}" is none of the choices; give the text, letter or index of one')
            right.append(choices[index])
        if not right:
            raise self.wrong(f'"{name}" is empty; give at least one answer')
        return tuple(dict.fromkeys(right))

    def max_new_tokens(self) -> int | None:
        value = self.value.get("max_new_tokens")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong('"max_new_tokens" must be a whole number of at least 1')
        return value

    def metrics(
        self, task: str, answers: Sequence[str], choices: Sequence[str], *, several: bool
    ) -> tuple[Metric, ...]:
        named = self.value.get("metric")
        if named is not None:
            found = next((metric for metric in METRICS if metric == named), None)
            if found is None or (found.startswith("choice") and not choices):
                known = ", ".join(METRICS)
                raise self.wrong(f'"metric" is {named!r}; it must be one of {known}, and choice needs "choices"')
            return (found,)
        if choices:
            return ("choice-likelihood", "choice")
        if several and task.startswith(ALL_ANSWER_TASKS):
            return ("all",)
        shortest = min(len(normalise(answer).split()) for answer in answers)
        return ("exact",) if shortest <= SHORT_ANSWER_WORDS else ("f1",)
