"""Knows predictions, right answers and lists of numbers. Knows neither models nor caches.

Normalisation and token F1 follow SQuAD (arXiv 1606.05250): lower case, no punctuation, no articles. Different from
it, a decimal point stays (3.5 is not 35), and other punctuation separates words instead of joining them.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from compactor.errors import SettingsError
from compactor.evaluate.examples import Example

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_APOSTROPHES = re.compile(r"['’`]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SEPARATORS = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w.]|_")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_LEADING_LETTER = re.compile(r"\W*(?:(?:final |correct )?answer\s*(?:is|:)?\s*)?\W*([A-Za-z])\W*")
_LABELLED_LETTER = re.compile(r"\W*([A-Za-z])\s*[.):\]*]")
_LETTER = r"([B-HJ-Z]|[AI](?!\s+(?!or\b|and\b)[a-z]))"  # "A tree" and "I think" begin with words
_ANNOUNCED_LETTER = re.compile(rf"\b(?:answer|option|choice)\b(?:\s+is)?\W*\b{_LETTER}\b")
_LONE_LETTER = re.compile(rf"(?<![\w']){_LETTER}(?![\w'])")


# -------------------------------------------------------------------------------------------------- one answer


def normalise(text: str) -> str:
    """Return lower-case words separated by single spaces, without articles and punctuation; ``4,829`` is ``4829``."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _THOUSANDS.sub("", _APOSTROPHES.sub("", text))
    return " ".join(_ARTICLES.sub(" ", _SEPARATORS.sub(" ", text)).split())


def first_line(text: str) -> str:
    """Return the first line that is not blank; the empty string if there is none."""
    return next((line for line in text.splitlines() if line.strip()), "")


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Tell whether the normalised prediction equals one of the normalised answers."""
    return normalise(prediction) in {normalise(answer) for answer in answers}


def contains(prediction: str, answer: str) -> bool:
    """Tell whether the normalised answer occurs in the normalised prediction as whole words; an empty one never."""
    words = normalise(answer)
    return bool(words) and f" {words} " in f" {normalise(prediction)} "


def all_of(prediction: str, answers: Sequence[str]) -> bool:
    """Tell whether every answer occurs in the prediction as whole words."""
    return all(contains(prediction, answer) for answer in answers)


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the normalised words, counted with multiplicity, 0 to 1."""
    ours, theirs = normalise(prediction).split(), normalise(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """Return the question with its lettered choices and the request to answer with one.

    Raises SettingsError for more choices than letters.
    """
    if len(choices) > len(LETTERS):
        raise SettingsError(f"A question has {len(choices)} choices; give at most {len(LETTERS)}.")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, "Answer with the letter of the right choice."])


def parse_choice(prediction: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that a generated answer names by letter or by its text; None if unclear.

    Only the first line counts. The letter of ``A walnut tree`` is an article, of ``A. A walnut tree`` a letter.
    """
    line = first_line(prediction)
    for pattern, matches in ((_LEADING_LETTER, re.Pattern.fullmatch), (_LABELLED_LETTER, re.Pattern.match)):
        found = matches(pattern, line)
        if found and (index := _index_of(found[1], choices)) is not None:
            return index
    announced = {_index_of(letter, choices) for letter in _ANNOUNCED_LETTER.findall(line)}
    if len(announced) == 1 and None not in announced:
        return announced.pop()
    named = [i for i, choice in enumerate(choices) if contains(line, choice)]
    named = [i for i in named if not any(i != j and contains(choices[j], choices[i]) for j in named)]
    if len(named) == 1:
        return named[0]
    letters = {_index_of(letter, choices) for letter in _LONE_LETTER.findall(line)} - {None}
    return letters.pop() if len(letters) == 1 and not named else None


def most_likely_choice(log_probs: Sequence[float], num_tokens: Sequence[int] | None = None) -> int:
    """Return the index of the largest sum of log-probabilities, or of the largest mean when token counts are given.

    The first of equals wins. Raises SettingsError for no choices or counts that do not fit.
    """
    counts = [1] * len(log_probs) if num_tokens is None else list(num_tokens)
    if not log_probs or len(counts) != len(log_probs) or min(counts) < 1:
        raise SettingsError("Choices need one log-probability and one token count of at least 1 each.")
    means = [total / count for total, count in zip(log_probs, counts, strict=True)]
    return means.index(max(means))


def score(example: Example, prediction: str) -> float:
    """Return 0 to 1: how right a prediction is, by the example's own metric.

    For "choice-likelihood" the prediction is the text of the most likely choice. Text before the answer that the
    prompt supplied (``answer_prefix``) is not part of the prediction.
    """
    match example.metric:
        case "exact":
            line = first_line(prediction)
            return float(exact_match(line, example.answers) or any(contains(line, one) for one in example.answers))
        case "f1":
            return max(token_f1(prediction, answer) for answer in example.answers)
        case "all":
            return float(all_of(prediction, example.answers))
        case "choice":
            index = parse_choice(prediction, example.choices)
            return float(index is not None and example.choices[index] in example.answers)
        case "choice-likelihood":
            return float(prediction in example.answers)


def _index_of(letter: str, choices: Sequence[str]) -> int | None:
    index = LETTERS.find(letter.upper())
    return index if 0 <= index < len(choices) else None


# ------------------------------------------------------------------------------------------------ many answers


def bootstrap_interval(
    values: Sequence[float] | Sequence[Sequence[float]], *, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean.

    A list of lists is clustered: whole documents are drawn with replacement, because questions about one document are
    not independent, and the mean is over all their values. With a single document its values are drawn instead.
    Raises SettingsError for no values, a level outside (0, 1) or fewer than 1 resample.
    """
    clusters = [[float(one)] if isinstance(one, int | float) else [float(v) for v in one] for one in values]
    clusters = [cluster for cluster in clusters if cluster]
    if len(clusters) == 1:
        clusters = [[value] for value in clusters[0]]
    if not clusters or not 0 < level < 1 or resamples < 1:
        raise SettingsError("A bootstrap needs at least one value, one resample and a level between 0 and 1.")
    sums = [(math.fsum(cluster), len(cluster)) for cluster in clusters]
    rng = random.Random(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    return _quantile(means, (1 - level) / 2), _quantile(means, (1 + level) / 2)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the neighbours of rank ``share * (n - 1)``."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, -1 to 1: Pearson's r of average ranks. NaN for fewer than two points or a constant side.

    Raises SettingsError when the sides differ in length.
    """
    if len(x) != len(y):
        raise SettingsError(f"A rank correlation needs pairs, not {len(x)} against {len(y)} values.")
    if any(math.isnan(value) for value in (*x, *y)):
        return math.nan
    a, b = _centred_ranks(x), _centred_ranks(y)
    energy = math.fsum(u * u for u in a) * math.fsum(v * v for v in b)
    return math.fsum(u * v for u, v in zip(a, b, strict=True)) / math.sqrt(energy) if energy else math.nan


def _centred_ranks(values: Sequence[float]) -> list[float]:
    """Return average ranks less their mean."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    centre = (len(values) - 1) / 2
    return [sum(places[value]) / len(places[value]) - centre for value in values]
