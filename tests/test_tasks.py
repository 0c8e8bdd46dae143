"""Built-in tasks ask what their text says, exactly once; question files are read or refused by line."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tiny_models import make_tokenizer

from compactor.errors import DocumentError, SettingsError
from compactor.evaluate import grammar
from compactor.evaluate.examples import Example, TaskDocument
from compactor.evaluate.metrics import choice_prompt, contains, normalise, score
from compactor.evaluate.prose import NAME_KINDS, Names, Survey
from compactor.evaluate.question_files import read_question_file
from compactor.evaluate.tasks import NUM_FACTS, TASKS, WARES, make_document

LENGTH = 1500  # words
SEEDS = (1, 2, 3)


def words(text: str) -> int:
    return len(text.split())


@cache
def document(task: str, seed: int = 1) -> TaskDocument:
    return make_document(task, LENGTH, seed, words)


def sentences(text: str) -> list[str]:
    paragraphs = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=\.) ", paragraph)]


every_task = pytest.mark.parametrize("task", TASKS)
every_seed = pytest.mark.parametrize("seed", SEEDS)


# ----------------------------------------------------------------------------------------------- every task


@every_task
@pytest.mark.parametrize("length", [600, 5000])
def test_text_has_the_wanted_length_in_words(task: str, length: int) -> None:
    made = make_document(task, length, 7, words)
    assert 0.97 * length <= words(made.text) <= length


@every_task
def test_text_has_the_wanted_length_in_tokens_of_a_tokenizer(task: str) -> None:
    tokenizer = make_tokenizer()

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for length in (2500, 6000):
        made = make_document(task, length, 1, tokens)
        assert 0.97 * length <= tokens(made.text) <= length


@every_task
def test_text_has_the_wanted_length_in_characters(task: str) -> None:
    made = make_document(task, 9000, 1, len)
    assert 0.97 * 9000 <= len(made.text) <= 9000


@every_task
def test_equal_seeds_give_equal_documents_and_other_seeds_others(task: str) -> None:
    first = document(task, 1)
    assert first == make_document(task, LENGTH, 1, words)
    assert first.text != document(task, 2).text
    assert {e.question for e in first.examples} != {e.question for e in document(task, 2).examples}
    assert first.task == task and first.seed == 1


def test_documents_do_not_depend_on_the_hash_seed_and_need_no_torch() -> None:
    program = (
        "import sys, hashlib; from compactor.evaluate import metrics, question_files, tasks\n"
        "made = [tasks.make_document(name, 900, 3, lambda t: len(t.split())) for name in tasks.TASKS]\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "print(hashlib.sha256(repr(made).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, check=True, timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    }  # fmt: skip
    made = [make_document(name, 900, 3, words) for name in TASKS]
    assert digests == {hashlib.sha256(repr(made).encode()).hexdigest().encode() + b"\n"}


@every_task
@every_seed
def test_evidence_stands_in_the_text_once_and_holds_the_answer(task: str, seed: int) -> None:
    made = document(task, seed)
    assert made.examples
    for example in made.examples:
        assert example.evidence
        places = [made.text.index(sentence) for sentence in example.evidence]
        assert places == sorted(places)
        assert all(made.text.count(sentence) == 1 for sentence in example.evidence)
        if example.kind == "count":
            continue
        stated = [any(contains(sentence, answer) for sentence in example.evidence) for answer in example.answers]
        assert all(stated) if example.metric == "all" else any(stated)


@every_task
@every_seed
def test_questions_are_different_and_do_not_give_the_answer_away(task: str, seed: int) -> None:
    examples = document(task, seed).examples
    assert len({(example.question, example.metric) for example in examples}) == len(examples)
    for example in examples:
        if example.metric != "choice":
            assert not any(contains(example.question, answer) for answer in example.answers), example


@every_task
def test_the_right_answer_scores_one_and_silence_zero(task: str) -> None:
    for example in document(task).examples:
        right = ", ".join(example.answers) if example.metric == "all" else example.answers[0]
        assert score(example, right) == 1
        assert score(example, "") == 0


def test_a_length_without_room_is_refused() -> None:
    for task in ("needle", "facts", "aggregation"):
        with pytest.raises(SettingsError, match=f"{task} does not fit in 60 tokens; give more"):
            make_document(task, 60, 1, words)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="'needles'; choose among needle, multi-key"):
        make_document("needles", 1000, 1, words)


# ------------------------------------------------------------------------------------- sentences that stand out


@every_seed
def test_needles_are_the_only_codes_of_the_text(seed: int) -> None:
    made = document("needle", seed)
    stated = dict(re.findall(r"The special access code for (vault \S+) is (\d{7})\.", made.text))
    assert sorted(re.findall(r"\d{7}", made.text)) == sorted(stated.values())
    assert len(stated) == len(set(stated.values())) == len(made.examples) == 8
    assert {e.question: e.answers for e in made.examples} == {
        f"What is the special access code for {key}?": (code,) for key, code in stated.items()
    }


def test_needles_are_spread_over_the_text() -> None:
    text = document("needle").text
    depths = [found.start() / len(text) for found in re.finditer(r"\d{7}", text)]
    assert depths[0] < 1 / 6 and depths[-1] > 5 / 6
    assert max(after - before for before, after in itertools.pairwise(depths)) < 2 / 8


@every_seed
def test_multi_key_asks_some_of_many_keys(seed: int) -> None:
    made = document("multi-key", seed)
    stated = re.findall(r"The special access code for (vault \S+) is (\d{7})\.", made.text)
    assert len(stated) == len(dict(stated)) > 16
    asked = {re.findall(r"vault \w+(?:-\w+)*", e.question)[0]: e.answers[0] for e in made.examples}
    assert len(asked) == 8
    assert asked.items() <= dict(stated).items()


@every_seed
def test_multi_value_wants_all_codes_of_a_key(seed: int) -> None:
    made = document("multi-value", seed)
    stated: dict[str, set[str]] = {}
    for key, code in re.findall(r"One of the special access codes for (vault \S+) is (\d{7})\.", made.text):
        stated.setdefault(key, set()).add(code)
    assert len(stated) == len(made.examples) == 4
    for example in made.examples:
        (key,) = [key for key in stated if f" {key}? " in example.question]
        assert set(example.answers) == stated[key] and len(example.answers) == 4
        assert score(example, ", ".join(example.answers[:3])) == 0


@every_seed
def test_variables_have_the_values_that_an_interpreter_finds(seed: int) -> None:
    made = document("variables", seed)
    values: dict[str, str] = {}
    for name, source in re.findall(r"sets the account (\w+) to the value (?:of the account )?(\w+)\.", made.text):
        assert name not in values
        values[name] = values.get(source, source)
    assert len(values) == 16 and all(value.isdigit() for value in values.values())
    for example in made.examples:
        if example.kind == "chain":
            (value,) = re.findall(r"\d{5}", example.question)
            assert set(example.answers) == {name for name in values if values[name] == value}
        else:
            (name,) = re.findall(r"account (\w+)\?", example.question)
            assert example.answers == (values[name],)
            assert len(example.evidence) == int(example.kind.split("-")[1]) + 1


@every_seed
def test_aggregation_answers_are_those_of_counting(seed: int) -> None:
    made = document("aggregation", seed)
    tallies = re.findall(r"The carrier's tally: (.*?)\.", made.text)
    counts = Counter(ware for tally in tallies for ware in tally.split(", "))
    ranked = counts.most_common()
    assert ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]
    by_kind = {example.kind: example for example in made.examples}
    assert by_kind["most-common"].answers == (ranked[0][0],)
    assert set(by_kind["three-most-common"].answers) == {ware for ware, _ in ranked[:3]}
    assert [ware for ware, count in ranked if count == 1] == list(by_kind["rarest"].answers)
    for example in (example for example in made.examples if example.kind == "count"):
        (ware,) = re.findall(r"name the (\S+)\?", example.question)
        assert example.answers[0] == str(counts[ware])


def test_no_ware_of_the_tallies_is_a_word_of_the_prose() -> None:
    vocabulary = Path(grammar.__file__).read_text().casefold()
    assert not [ware for ware in WARES.split() if re.search(rf"\b{ware}\b", vocabulary)]


# ----------------------------------------------------------------------------- facts of the document's own style


def content_words(text: str) -> set[str]:
    small = "who what which where whose whom did does was were is of in at on to from for with as the and"
    return set(normalise(text).split()) - set(small.split())


@every_seed
def test_one_sentence_only_answers_a_fact_question(seed: int) -> None:
    """By word overlap, a retrieval that knows nothing of the templates."""
    made = document("facts", seed)
    for example in made.examples:
        wanted = content_words(example.question)
        ranked = sorted(sentences(made.text), key=lambda sentence: -len(wanted & content_words(sentence)))
        overlaps = [len(wanted & content_words(sentence)) for sentence in ranked]
        assert ranked[0] in example.evidence[0] or example.evidence[0] in ranked[0], (example, ranked[0])
        assert overlaps[0] > overlaps[1], (example, ranked[1])


@every_seed
def test_facts_are_ordinary_sentences_at_equal_spacing(seed: int) -> None:
    made = document("facts", seed)
    depths = [words(made.text[: made.text.index(e.evidence[0])]) / words(made.text) for e in made.examples]
    assert len(depths) == NUM_FACTS >= 8
    assert depths[0] < 0.1 and depths[-1] >= 0.9
    assert all(0 < after - before < 0.25 for before, after in itertools.pairwise(depths))
    for example in made.examples:
        assert not re.search(r"\d|[A-Z]{2}", example.evidence[0])
        assert all(1 <= words(answer) <= 4 for answer in example.answers)
    assert sum(example.answers[0][0].isupper() for example in made.examples) <= 5


def test_facts_work_in_a_short_text() -> None:
    for seed in range(4):
        assert len(make_document("facts", 450, seed, words).examples) == NUM_FACTS


@every_seed
def test_open_questions_are_answered_by_a_sentence_about_their_subject(seed: int) -> None:
    for example in document("questions", seed).examples:
        assert example.metric == "f1" and words(example.answers[0]) >= 5
        assert example.answers == example.evidence
        assert score(example, " ".join(example.answers[0].split()[:3])) < 1


@every_seed
def test_choices_have_one_right_answer_and_come_both_ways(seed: int) -> None:
    made = document("choice", seed)
    facts = [example for example in made.examples if example.metric == "choice-likelihood"]
    generated = [example for example in made.examples if example.metric == "choice"]
    assert len(facts) == len(generated) == NUM_FACTS
    for fact, asked in zip(facts, generated, strict=True):
        assert len(set(fact.choices)) == 4
        assert [choice for choice in fact.choices if contains(fact.evidence[0], choice)] == list(fact.answers)
        assert asked.question == choice_prompt(fact.question, fact.choices)
        assert score(asked, "ABCD"[asked.choices.index(asked.answers[0])]) == 1
        assert sum(score(asked, letter) for letter in "ABCD") == 1
    assert len({fact.choices.index(fact.answers[0]) for fact in facts}) > 1


# -------------------------------------------------------------------------------------------------------- prose


def all_templates() -> list[grammar.Template]:
    return [template for templates in grammar.TEMPLATES.values() for template in templates]


def slots(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def test_the_grammar_has_many_templates_on_many_topics() -> None:
    assert len(all_templates()) == len(set(all_templates())) >= 120
    assert sum(bool(template.question) for template in all_templates()) >= 80
    assert len(grammar.TEMPLATES) >= 12
    assert all(len(words) == len(set(words)) >= 4 for words in grammar.WORDS.values())


def test_every_question_of_the_grammar_can_be_answered_from_its_sentence() -> None:
    questions = [template.question for template in all_templates() if template.question]
    assert len(questions) == len(set(questions))
    for template in all_templates():
        assert slots(template.question + template.answer) <= slots(template.text), template
        assert bool(template.question) == bool(template.answer)
        if template.question:
            assert slots(template.question) & {"place", "person"}, template
            assert not slots(template.text) & {"number", "year"}, template
            assert not slots(template.answer) & slots(template.question), template
            outside = re.sub(r"\[[^\[\]]*\]", "", template.text)
            assert slots(template.answer) <= slots(outside), template  # said whatever alternative is chosen


def test_prose_fills_every_slot_and_seldom_repeats_a_sentence() -> None:
    text = make_document("facts", 20_000, 1, words).text
    assert not re.search(r"[{}\[\]|]|  | [,.;]|\.\.|,,|\ba [aeio]", text)
    long = [sentence for sentence in sentences(text) if words(sentence) > 8]
    assert len(set(long)) > 0.97 * len(long)
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences(text))


def test_names_are_never_used_twice() -> None:
    names = Names(Random(0))
    places = [names.place() for _ in range(9000)]  # beyond the simple ones
    surnames = [names.person().name.split()[-1] for _ in range(9000)]
    assert len({*places, *surnames}) == 18_000


def test_people_belong_to_one_place_and_keep_their_trade() -> None:
    survey = Survey(Random(5))
    section = list(itertools.islice(survey.blocks(), 12))
    text = "\n".join(block.text for block in section)
    for person in survey.people[: survey.NUM_PEOPLE]:
        assert person.name in section[1].text and person.trade in section[1].text
    mentions = [text.count(person.name) for person in survey.people[: survey.NUM_PEOPLE]]
    assert sum(mentions) > 2 * survey.NUM_PEOPLE
    assert set(NAME_KINDS) <= {"person", "other", *grammar.WORDS}


# ----------------------------------------------------------------------------------------------- question files

LINE = {"context": "The oak is old.", "question": "What is old?", "answer": "the oak"}

WriteLines = Callable[..., str]


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    def write(*lines: Any) -> str:
        path = tmp_path / "asked.jsonl"
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return str(path)

    return write


def test_equal_contexts_become_one_document(write_lines: WriteLines) -> None:
    second = {**LINE, "question": "How is the oak?", "answer": ["old", "aged"], "task": "trees"}
    other = {**LINE, "context": "The elm is young.", "task": "trees", "answer_prefix": "It is", "max_new_tokens": 8}
    documents = read_question_file(write_lines(LINE, "", other, second))
    assert [(one.task, one.name, one.text, one.seed) for one in documents] == [
        ("asked", "asked-1", "The oak is old.", 0),
        ("trees", "asked-3", "The elm is young.", 0),
    ]
    assert documents[0].examples == (
        Example("What is old?", ("the oak",), "exact"),
        Example("How is the oak?", ("old", "aged"), "exact", kind="trees"),
    )
    assert documents[1].examples == (
        Example("What is old?", ("the oak",), "exact", (), "trees", (), "It is", 8),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "metric", "answers"),
    [
        ({"answer": "by the light of a single candle"}, "f1", ("by the light of a single candle",)),
        ({"answer": ["1", "2"], "task": "niah_multivalue"}, "all", ("1", "2")),
        ({"answer": ["1", "2"], "task": "qa_1"}, "exact", ("1", "2")),
        ({"answers": ["1", "2"], "task": "niah_single_1", "answer": None}, "exact", ("1", "2")),
        ({"answer": 4829137}, "exact", ("4829137",)),
        ({"answer": "the oak", "metric": "f1"}, "f1", ("the oak",)),
        ({"answer": ["old", "old"]}, "exact", ("old",)),
    ],
)
def test_the_metric_follows_from_the_line(
    write_lines: WriteLines, fields: dict[str, Any], metric: str, answers: tuple[str, ...]
) -> None:
    (made,) = read_question_file(write_lines({**LINE, **fields}))
    assert [(example.metric, example.answers) for example in made.examples] == [(metric, answers)]


@pytest.mark.parametrize("answer", ["the elm", "B", "b", 1, ["B"]])
def test_choices_are_asked_by_likelihood_and_by_generation(write_lines: WriteLines, answer: Any) -> None:
    choices = ["the oak", "the elm", "the ash"]
    (made,) = read_question_file(write_lines({**LINE, "choices": choices, "answer": answer}))
    by_likelihood, generated = made.examples
    assert by_likelihood == Example("What is old?", ("the elm",), "choice-likelihood", tuple(choices))
    assert generated.question == choice_prompt("What is old?", choices)
    assert (generated.metric, generated.answers) == ("choice", ("the elm",))


def test_a_choice_that_is_a_number_is_meant_by_its_text(write_lines: WriteLines) -> None:
    (made,) = read_question_file(write_lines({**LINE, "choices": [3, 2, 1], "answer": 2}))
    assert made.examples[0].answers == ("2",)


def test_standard_input_and_a_byte_order_mark_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\xef\xbb\xbf" + json.dumps(LINE).encode() + b"\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    (made,) = read_question_file("-")
    assert (made.task, made.name) == ("stdin", "stdin-1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not an object"),
        ({"question": "?", "answer": "x"}, '"context" is missing'),
        ({**LINE, "context": " \n"}, '"context" is empty'),
        ({**LINE, "question": 3}, '"question" must be text, not int'),
        ({**LINE, "answer": None}, '"answer" is missing'),
        ({**LINE, "answer": []}, '"answer" is empty'),
        ({**LINE, "answer": ["x", " "]}, '"answer" is empty'),
        ({**LINE, "answer": True}, '"answer" must be text, not bool'),
        ({**LINE, "answer": {"text": "x"}}, '"answer" must be text, not dict'),
        ({**LINE, "choices": ["x"]}, "list of 2 to 26 different texts"),
        ({**LINE, "choices": ["x", "x", "y"]}, "list of 2 to 26 different texts"),
        ({**LINE, "choices": "xy"}, "list of 2 to 26 different texts"),
        ({**LINE, "choices": ["x", "y"]}, '"answer" is none of the choices'),
        ({**LINE, "choices": ["x", "y"], "answer": "C"}, '"answer" is none of the choices'),
        ({**LINE, "choices": ["x", "y"], "answer": -1}, '"answer" is none of the choices'),
        ({**LINE, "choices": ["x", "y"], "answer": []}, '"answer" is empty'),
        ({**LINE, "metric": "bleu"}, "\"metric\" is 'bleu'"),
        ({**LINE, "metric": "choice"}, 'choice needs "choices"'),
        ({**LINE, "task": 3}, '"task" must be text'),
        ({**LINE, "max_new_tokens": 0}, '"max_new_tokens" must be a whole number'),
        ({**LINE, "max_new_tokens": True}, '"max_new_tokens" must be a whole number'),
        ('{"context": "\\ud800", "question": "?", "answer": "x"}', "half of a character pair"),
        ('{"context": "\ud800"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(write_lines: WriteLines, line: Any, message: str) -> None:
    path = write_lines(LINE, "", line)
    with pytest.raises(DocumentError) as failure:
        read_question_file(path)
    text = str(failure.value)
    assert text.startswith(f"{path}, line 3: ") and message in text and text.endswith(".")
    assert "\n" not in text


def test_a_file_without_questions_is_refused(write_lines: WriteLines, tmp_path: Path) -> None:
    for path, message in (
        (write_lines("", " "), "has no questions"),
        (str(tmp_path / "none.jsonl"), "does not exist"),
        (str(tmp_path), "is a folder"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(DocumentError, match=message):
            read_question_file(path)
