"""Knows the built-in tasks: documents made from a seed at any length, with questions. Knows neither models nor scores.

Sentences that stand out follow the needles of RULER (arXiv 2404.06654); facts that do not are sentences of the
survey's own prose. Question words never give the answer away, except the choices of a multiple choice.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from compactor.errors import SettingsError
from compactor.evaluate.examples import Example, TaskDocument
from compactor.evaluate.filling import CountTokens, Draft, Located, TooShortError, compose
from compactor.evaluate.grammar import WORDS
from compactor.evaluate.metrics import choice_prompt
from compactor.evaluate.prose import NAME_KINDS, Names, Sentence

NUM_NEEDLES = 8
NUM_FACTS = 10  # at equal spacing, so that the first and the last tenth have one each
NUM_CHOICES = 4
VALUES_PER_KEY = 4
STATEMENTS_PER_CHAIN = 4
MAX_KEYS = 100
PLANTED_SHARE = 0.2  # of the length, where a task may plant as much as it likes
TALLY_TOKENS = 120  # one tally for so many tokens
WARES_PER_TALLY = 5
LIST_TOKENS = 96  # room for an answer that lists several things
MAX_ATTEMPTS = 40

WARES = (
    "mandolin anvil gramophone thimble compass saddle kettle barometer trumpet hammock violin telescope candlestick "
    "wheelbarrow accordion hourglass teapot bellows corkscrew parasol rocking-chair sextant spindle tambourine "
    "pincushion wardrobe xylophone cradle gauntlet hatbox inkwell jewel-box looking-glass mattress nutcracker oboe "
    "perambulator quilt rolling-pin saucepan"
)
NUMBER_WORDS = ("zero", "one", "two", "three", "four")

Build = Callable[[str, int, CountTokens], tuple[Draft, tuple[Example, ...]]]


@dataclass(frozen=True)
class Task:
    """One built-in task."""

    name: str
    summary: str
    build: Build  # (name of the random state, length, count_tokens); raises TooShortError

    def make(self, length_tokens: int, seed: int, count_tokens: CountTokens) -> TaskDocument:
        """Return a document of 0.97 to 1.0 of ``length_tokens`` by ``count_tokens``; equal seeds give equal documents.

        Raises SettingsError when the task does not fit in that length.
        """
        for attempt in range(MAX_ATTEMPTS):
            state = f"{self.name}/{length_tokens}/{seed}/{attempt}"
            try:
                draft, examples = self.build(state, length_tokens, count_tokens)
            except TooShortError:
                continue
            return TaskDocument(self.name, f"{self.name}-{length_tokens}-{seed}", draft.text, examples, seed)
        raise SettingsError(f"The task {self.name} does not fit in {length_tokens} tokens; give more tokens.")


def make_document(task: str, length: int, seed: int, count_tokens: CountTokens) -> TaskDocument:
    """Return one document of a built-in task; see ``Task.make``. Raises SettingsError for an unknown task."""
    if task not in TASKS:
        raise SettingsError(f"There is no task {task!r}; choose among {', '.join(TASKS)}.")
    return TASKS[task].make(length, seed, count_tokens)


# ---------------------------------------------------------------------------------- sentences that stand out


def _needle(state: str, length: int, count_tokens: CountTokens) -> tuple[Draft, tuple[Example, ...]]:
    codes = _codes(state, NUM_NEEDLES)
    draft = compose(state, length, count_tokens, [_code_sentence(key, code) for key, code in codes])
    return draft, tuple(_code_example(key, code, "single-needle") for key, code in codes)


def _multi_key(state: str, length: int, count_tokens: CountTokens) -> tuple[Draft, tuple[Example, ...]]:
    codes = _codes(state, MAX_KEYS)
    codes = codes[: _affordable(2 * NUM_NEEDLES, MAX_KEYS, length, count_tokens(_code_sentence(*codes[0])))]
    draft = compose(state, length, count_tokens, [_code_sentence(key, code) for key, code in codes])
    asked = [codes[(2 * i + 1) * len(codes) // (2 * NUM_NEEDLES)] for i in range(NUM_NEEDLES)]
    return draft, tuple(_code_example(key, code, "multi-key") for key, code in asked)


def _multi_value(state: str, length: int, count_tokens: CountTokens) -> tuple[Draft, tuple[Example, ...]]:
    codes = _codes(state, VALUES_PER_KEY * VALUES_PER_KEY)
    cost = VALUES_PER_KEY * count_tokens(_value_sentence(*codes[0]))
    keys = [key for key, _ in codes[: _affordable(1, VALUES_PER_KEY, length, cost)]]
    pairs = [(key, code) for key, (_, code) in zip(keys * VALUES_PER_KEY, codes, strict=False)]
    random.Random(f"{state}/order").shuffle(pairs)
    draft = compose(state, length, count_tokens, [_value_sentence(key, code) for key, code in pairs])
    examples = []
    for key in keys:
        values = tuple(code for owner, code in pairs if owner == key)
        question = f"What are all the special access codes for {key}? List all {NUMBER_WORDS[VALUES_PER_KEY]}."
        evidence = tuple(_value_sentence(key, code) for code in values)
        examples.append(
            Example(question, values, "all", kind="multi-value", evidence=evidence, max_new_tokens=LIST_TOKENS)
        )
    return draft, tuple(examples)


def _codes(state: str, count: int) -> list[tuple[str, str]]:
    """Return different keys, which are vaults with names of places, and different 7-digit codes."""
    rng = random.Random(f"{state}/codes")
    names = Names(rng)
    codes = rng.sample(range(1_000_000, 10_000_000), count)
    return [(f"vault {names.place()}", str(code)) for code in codes]


def _code_sentence(key: str, code: str) -> str:
    return f"The special access code for {key} is {code}."


def _value_sentence(key: str, code: str) -> str:
    return f"One of the special access codes for {key} is {code}."


def _code_example(key: str, code: str, kind: str) -> Example:
    question = f"What is the special access code for {key}?"
    return Example(question, (code,), "exact", kind=kind, evidence=(_code_sentence(key, code),))


def _affordable(least: int, most: int, length: int, cost: int) -> int:
    return max(least, min(most, int(PLANTED_SHARE * length) // max(1, cost)))


# ----------------------------------------------------------------------------------------------------- chains


def _variables(state: str, length: int, count_tokens: CountTokens) -> tuple[Draft, tuple[Example, ...]]:
    rng = random.Random(f"{state}/chains")
    cost = STATEMENTS_PER_CHAIN * count_tokens(_assignment("KQZ", "KQZ", copied=True))
    num_chains = _affordable(2, 4, length, cost)
    names = _variable_names(rng, num_chains * STATEMENTS_PER_CHAIN)
    values = [str(value) for value in rng.sample(range(10_000, 100_000), num_chains)]
    chains = [names[i::num_chains] for i in range(num_chains)]
    statements = [
        [_assignment(chain[0], value, copied=False)]
        + [_assignment(one, before, copied=True) for before, one in pairwise(chain)]
        for chain, value in zip(chains, values, strict=True)
    ]
    order = [i for i in range(num_chains) for _ in range(STATEMENTS_PER_CHAIN)]
    rng.shuffle(order)
    left = [list(reversed(chain)) for chain in statements]
    draft = compose(state, length, count_tokens, [left[i].pop() for i in order])
    examples = []
    for chain, value, evidence in zip(chains, values, map(tuple, statements), strict=True):
        for hops in (0, 1, len(chain) - 1):
            question = f"What is the value of the account {chain[hops]}?"
            kind = f"value-{hops}-hops"
            examples.append(Example(question, (value,), "exact", kind=kind, evidence=evidence[: hops + 1]))
        question = f"Which accounts have the value {value}? List all {NUMBER_WORDS[len(chain)]} names."
        examples.append(
            Example(question, tuple(chain), "all", kind="chain", evidence=evidence, max_new_tokens=LIST_TOKENS)
        )
    return draft, tuple(examples)


def _assignment(name: str, source: str, *, copied: bool) -> str:
    if copied:
        return f"The ledger sets the account {name} to the value of the account {source}."
    return f"The ledger sets the account {name} to the value {source}."


def _variable_names(rng: random.Random, count: int) -> list[str]:
    """Return different names of three consonants."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.sample("BCDFGHJKLMNPQRSTVWXZ", 3))] = None
    return list(names)


# ------------------------------------------------------------------------------------------------ aggregation


def _aggregation(state: str, length: int, count_tokens: CountTokens) -> tuple[Draft, tuple[Example, ...]]:
    rng = random.Random(f"{state}/tallies")
    sample_cost = count_tokens(_tally(WARES.split()[:WARES_PER_TALLY]))
    num_tallies = max(8, length // max(TALLY_TOKENS, 4 * sample_cost))
    counts = _ware_counts(rng, num_tallies * WARES_PER_TALLY)
    drawn = [ware for ware, count in counts.items() for _ in range(count)]
    rng.shuffle(drawn)
    tallies = [_tally(drawn[i : i + WARES_PER_TALLY]) for i in range(0, len(drawn), WARES_PER_TALLY)]
    draft = compose(state, length, count_tokens, tallies)

    def evidence(*wares: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(tally for tally in tallies if any(ware in _wares_of(tally) for ware in wares)))

    top = sorted(counts, key=lambda ware: -counts[ware])[:3]
    once = next(ware for ware, count in counts.items() if count == 1)
    examples = [
        Example(
            "Which ware do the carrier's tallies name most often?",
            (top[0],), "exact", kind="most-common", evidence=evidence(top[0]),
        ),
        Example(
            "Which three wares do the carrier's tallies name most often?",
            tuple(top), "all", kind="three-most-common", evidence=evidence(*top),
            max_new_tokens=LIST_TOKENS,
        ),
        Example(
            "Which ware do the carrier's tallies name only a single time?",
            (once,), "exact", kind="rarest", evidence=evidence(once),
        ),
    ]  # fmt: skip
    for ware, count in counts.items():
        if 1 < count <= 3 and ware not in top:
            question = f"How many times do the carrier's tallies name the {ware}? Answer with a number."
            answers = (str(count), NUMBER_WORDS[count])
            examples.append(Example(question, answers, "exact", kind="count", evidence=evidence(ware)))
            if len(examples) == 5:
                break
    return draft, tuple(examples)


def _ware_counts(rng: random.Random, total: int) -> dict[str, int]:
    """Share ``total`` mentions: three wares clearly lead, one has 1, one 2, one 3, the rest are even in between."""
    top = [round(share * total) for share in (0.32, 0.24, 0.17)]
    rest = total - sum(top) - 6
    most = max(2, (top[2] * 2) // 3)
    num_fillers = -(-rest // most)
    fillers = [rest // num_fillers + (i < rest % num_fillers) for i in range(num_fillers)]
    wares = rng.sample(WARES.split(), 6 + num_fillers)
    return dict(zip(wares, [*top, 1, 2, 3, *fillers], strict=True))


def _tally(wares: Sequence[str]) -> str:
    return f"The carrier's tally: {', '.join(wares)}."


def _wares_of(tally: str) -> list[str]:
    return tally.removeprefix("The carrier's tally: ").removesuffix(".").split(", ")


# ----------------------------------------------------------------------------------- facts of the document's style


def _facts(state: str, length: int, count_tokens: CountTokens) -> tuple[Draft, tuple[Example, ...]]:
    draft = compose(state, length, count_tokens)
    asked = _spread(draft, _is_plain_fact, NUM_FACTS)
    return draft, tuple(
        Example(one.question, (one.answer,), "exact", kind="plain-fact", evidence=(one.text,)) for one in asked
    )


def _questions(state: str, length: int, count_tokens: CountTokens) -> tuple[Draft, tuple[Example, ...]]:
    rng = random.Random(f"{state}/questions")
    draft = compose(state, length, count_tokens)
    examples = []
    for one in _spread(draft, lambda sentence: bool(sentence.subject), NUM_FACTS):
        form = rng.choice(("What does the survey say about {}?", "What is known about {}?", "What is told about {}?"))
        question = form.format(one.subject)
        examples.append(Example(question, (one.text,), "f1", kind="open", evidence=(one.text,)))
    return draft, tuple(examples)


def _choice(state: str, length: int, count_tokens: CountTokens) -> tuple[Draft, tuple[Example, ...]]:
    rng = random.Random(f"{state}/choices")
    draft = compose(state, length, count_tokens)
    examples = []
    for one in _spread(draft, _is_plain_fact, NUM_FACTS):
        choices = _choices(rng, draft, one)
        shared = Example(
            one.question, (one.answer,), "choice-likelihood", choices, kind="plain-fact", evidence=(one.text,)
        )
        examples += [shared, replace(shared, question=choice_prompt(one.question, choices), metric="choice")]
    return draft, tuple(examples)


def _choices(rng: random.Random, draft: Draft, fact: Sentence) -> tuple[str, ...]:
    """Return the answer among others of its kind, in any order; persons and places are ones of the text."""
    match fact.answer_kind:
        case "person":
            others = [person.name for person in draft.survey.people if person.name in draft.text]
        case "other":
            others = [place for place in draft.survey.places if place in draft.text]
        case kind:
            others = list(WORDS[kind])
    others = [other for other in others if other not in fact.text and other not in fact.question]
    if len(others) < NUM_CHOICES - 1:
        raise TooShortError("The text has too few names for a multiple choice; give more tokens.")
    choices = [fact.answer, *rng.sample(others, NUM_CHOICES - 1)]
    rng.shuffle(choices)
    return tuple(choices)


def _is_plain_fact(sentence: Sentence) -> bool:
    return bool(sentence.question) and not re.search(r"\d", sentence.text)


def _spread(draft: Draft, wanted: Callable[[Sentence], bool], count: int) -> list[Sentence]:
    """Choose ``count`` wanted sentences at about equal spacing, near the middles of equal parts, and various.

    The first lies in the first part, the last in the last.

    Raises TooShortError when a part has none.
    """
    located = list(draft.sentences())
    asked = Counter(one.sentence.question or one.sentence.subject for one in located)
    texts = Counter(one.sentence.text for one in located)
    candidates = [
        one
        for one in located
        if wanted(one.sentence)
        and asked[one.sentence.question or one.sentence.subject] == 1
        and texts[one.sentence.text] == 1
    ]
    chosen: list[Located] = []
    for part in range(count):
        centre = (part + 0.5) / count
        reach = (0.45 if part in (0, count - 1) else 0.8) / count

        def drawback(one: Located, centre: float = centre) -> float:
            """Distance in half parts; a template or a proper name too many weighs like one."""
            kinds = [before.sentence.answer_kind in NAME_KINDS for before in chosen]
            too_many_names = one.sentence.answer_kind in NAME_KINDS and sum(kinds) >= 0.4 * (len(chosen) + 1)
            repeated = one.sentence.template in [before.sentence.template for before in chosen]
            return abs(one.depth - centre) * 2 * count + repeated + too_many_names

        last = chosen[-1].depth if chosen else 0.0
        near = [one for one in candidates if abs(one.depth - centre) < reach and one.depth > last]
        if not near:
            raise TooShortError(f"Part {part + 1} of {count} of the text has no question; give more tokens.")
        chosen.append(min(near, key=drawback))
    return [one.sentence for one in chosen]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("needle", "single facts that stand out: 7-digit codes", _needle),
        Task("multi-key", "7-digit codes among many of the same form", _multi_key),
        Task("multi-value", "all codes of one key", _multi_value),
        Task("facts", "ordinary sentences, asked for a few words", _facts),
        Task("questions", "open questions, answered in a sentence", _questions),
        Task("variables", "chains of assignments to follow", _variables),
        Task("aggregation", "most common words and counts over the whole text", _aggregation),
        Task("choice", "four choices, by likelihood and by generation", _choice),
    )
}
