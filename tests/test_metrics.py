"""Scores agree with their definitions, and statistics with scipy."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
import scipy.stats

from compactor.errors import SettingsError
from compactor.evaluate.examples import METRICS, Example, Metric
from compactor.evaluate.metrics import (
    all_of,
    bootstrap_interval,
    choice_prompt,
    contains,
    exact_match,
    first_line,
    most_likely_choice,
    normalise,
    parse_choice,
    score,
    spearman,
    token_f1,
)

CHOICES = ("a walnut tree", "the sheepfold", "an oak", "an old oak")


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Walnut\nTree.", "walnut tree"),
        ("4,829,137", "4829137"),
        ("3.5 per cent", "3.5 per cent"),
        ("1, 2, 3", "1 2 3"),
        ("one,two", "one two"),
        ("1,23", "1 23"),
        ("the weavers' guild", "weavers guild"),
        ("rocking-chair", "rocking chair"),
        ("A theatre, an ant", "theatre ant"),
        ("Ｅｌｌｅｎ VOSS", "ellen voss"),
        ("snake_case", "snake case"),
        ("...", ""),
    ],
)
def test_normalisation_keeps_words_and_numbers_only(text: str, normalised: str) -> None:
    assert normalise(text) == normalised
    assert normalise(normalised) == normalised


def test_answers_are_found_as_whole_words_only() -> None:
    assert contains("It was Ellen Voss, I think.", "Ellen Voss")
    assert contains("**Ellen\nVoss**", "ellen voss")
    assert contains("The code is 4,829,137.", "4829137")
    assert not contains("It was Ellen Vossing.", "Ellen Voss")
    assert not contains("14829137", "4829137")
    assert not contains("Voss, Ellen", "Ellen Voss")
    assert not contains("anything", "the")


def test_exact_match_means_equal() -> None:
    assert exact_match("The oak.", ["elm", "Oak"])
    assert not exact_match("The old oak.", ["oak"])


def brute_f1(prediction: str, answer: str) -> float:
    """Precision and recall by striking words off a list."""
    ours, theirs = normalise(prediction).split(), normalise(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    left, hits = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            hits += 1
    if not hits:
        return 0.0
    precision, recall = hits / len(ours), hits / len(theirs)
    return 2 * precision * recall / (precision + recall)


def test_token_f1_agrees_with_precision_and_recall_counted_by_hand() -> None:
    rng = random.Random(0)
    for _ in range(300):
        one, two = (" ".join(rng.choices(["oak", "elm", "ash", "yew", "the"], k=rng.randint(0, 6))) for _ in "ab")
        assert token_f1(one, two) == pytest.approx(brute_f1(one, two))
    assert token_f1("the red hat", "a red coat") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("prediction", "index"),
    [
        ("B", 1),
        ("b", 1),
        ("(C)", 2),
        (" **D**\nbecause", 3),
        ("B. the sheepfold", 1),
        ("A: a walnut tree", 0),
        ("Answer: C", 2),
        ("The answer is D.", 3),
        ("The correct answer is (B), the sheepfold.", 1),
        ("I would choose option C here", 2),
        ("A walnut tree", 0),
        ("It is the sheepfold.", 1),
        ("an old oak", 3),
        ("It rises under an oak.", 2),
        ("Of these, C", 2),
        ("\n\nB", 1),
        ("E", None),
        ("", None),
        ("I do not know", None),
        ("A good question", None),
        ("either B or C", None),
        ("A or B", None),
        ("I think A", 0),
        ("the sheepfold or a walnut tree", None),
    ],
)
def test_a_generated_choice_is_read_from_its_letter_or_its_text(prediction: str, index: int | None) -> None:
    assert parse_choice(prediction, CHOICES) == index


def test_a_choice_prompt_letters_its_choices() -> None:
    assert choice_prompt("Where?", ["x", "y"]).splitlines() == [
        "Where?", "A. x", "B. y", "Answer with the letter of the right choice.",
    ]  # fmt: skip
    with pytest.raises(SettingsError, match="27 choices"):
        choice_prompt("Where?", ["x"] * 27)


def test_the_most_likely_choice_may_be_per_token() -> None:
    assert most_likely_choice([-4.0, -3.0, -3.0]) == 1
    assert most_likely_choice([-4.0, -3.0], [4, 1]) == 0
    for log_probs, counts in (([], None), ([-1.0], [1, 2]), ([-1.0], [0])):
        with pytest.raises(SettingsError):
            most_likely_choice(log_probs, counts)


@pytest.mark.parametrize(
    ("metric", "answers", "prediction", "expected"),
    [
        ("exact", ("Ellen Voss", "Voss"), "It was Voss.\nNot Harrow.", 1.0),
        ("exact", ("Ellen Voss",), "I am not sure.\nEllen Voss", 0.0),
        ("exact", ("Ellen Voss",), "\n \nEllen Voss", 1.0),
        ("exact", ("???",), "???", 1.0),
        ("exact", ("oak",), "", 0.0),
        ("f1", ("a red coat", "green hat"), "the red hat", 0.5),
        ("all", ("11", "22"), "- 22\n- 11", 1.0),
        ("all", ("11", "22"), "11, 33", 0.0),
        ("choice", ("an oak",), "C", 1.0),
        ("choice", ("an oak",), "an old oak", 0.0),
        ("choice", ("an oak",), "no idea", 0.0),
        ("choice-likelihood", ("an oak",), "an oak", 1.0),
        ("choice-likelihood", ("an oak",), "an old oak", 0.0),
    ],
)
def test_every_metric_scores_as_it_says(
    metric: Metric, answers: tuple[str, ...], prediction: str, expected: float
) -> None:
    example = Example("?", answers, metric, CHOICES)
    assert score(example, prediction) == expected


def test_every_metric_has_a_score() -> None:
    for metric in METRICS:
        assert score(Example("?", CHOICES, metric, CHOICES), CHOICES[0]) in (0.0, 1.0)


def test_only_all_needs_every_answer() -> None:
    assert all_of("one two three", ["three", "one"])
    assert not all_of("one two three", ["three", "four"])
    assert first_line(" \n\n x \ny") == " x "


# ------------------------------------------------------------------------------------------------ many answers


def test_spearman_agrees_with_scipy_with_and_without_ties() -> None:
    rng = random.Random(1)
    for size, kinds in itertools.product((2, 3, 10, 57), (2, 5, 10_000)):
        x = [float(rng.randrange(kinds)) for _ in range(size)]
        y = [float(rng.randrange(kinds)) + 0.3 * value for value in x]
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert spearman(x, y) == pytest.approx(float(scipy.stats.spearmanr(x, y).statistic), abs=1e-12)


def test_spearman_of_a_monotone_pair_is_one_and_of_a_constant_is_unknown() -> None:
    assert spearman([1, 2, 3], [1, 10, 11]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    for x, y in (([], []), ([1], [2]), ([1, 1, 1], [1, 2, 3]), ([1, math.nan], [1, 2])):
        assert math.isnan(spearman(x, y))
    with pytest.raises(SettingsError, match="3 against 2"):
        spearman([1, 2, 3], [1, 2])


def test_bootstrap_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).exponential(size=40)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, confidence_level=0.9, rng=np.random.default_rng(0)
    ).confidence_interval
    low, high = bootstrap_interval(values.tolist(), seed=0, level=0.9, resamples=20_000)
    tolerance = 0.03 * (theirs.high - theirs.low)
    assert low == pytest.approx(theirs.low, abs=tolerance)
    assert high == pytest.approx(theirs.high, abs=tolerance)


def test_clustered_bootstrap_agrees_with_drawing_whole_documents_in_numpy() -> None:
    rng = np.random.default_rng(5)
    documents = [(rng.normal() + 0.1 * rng.normal(size=rng.integers(2, 9))).tolist() for _ in range(12)]
    means = [
        statistics.fmean(itertools.chain.from_iterable(documents[i] for i in rng.integers(12, size=12)))
        for _ in range(10_000)
    ]
    theirs = np.quantile(means, [0.025, 0.975])
    ours = bootstrap_interval(documents, seed=1, resamples=10_000)
    assert ours == pytest.approx(theirs, abs=0.04 * (theirs[1] - theirs[0]))
    flat = bootstrap_interval([value for document in documents for value in document], seed=1)
    assert flat[1] - flat[0] < 0.8 * (ours[1] - ours[0])  # questions about one document are alike


def test_one_document_is_resampled_by_its_values() -> None:
    assert bootstrap_interval([[0.0, 1.0, 1.0]], seed=0) == bootstrap_interval([0.0, 1.0, 1.0], seed=0)
    assert bootstrap_interval([[1.0, 1.0], []], seed=0) == (1.0, 1.0)


def test_equal_seeds_give_equal_intervals_that_hold_the_mean() -> None:
    values = [i * i / 900 for i in range(30)]
    low, high = bootstrap_interval(values, seed=4)
    assert (low, high) == bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
    assert low < statistics.fmean(values) < high


@pytest.mark.parametrize(
    "options", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}, {"values": []}, {"values": [[]]}]
)
def test_a_bootstrap_of_nothing_is_refused(options: dict[str, object]) -> None:
    arguments = {"values": [1.0, 2.0], "seed": 0, **options}
    with pytest.raises(SettingsError, match="bootstrap"):
        bootstrap_interval(**arguments)  # type: ignore[arg-type]
