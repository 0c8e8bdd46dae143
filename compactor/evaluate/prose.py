"""Knows how to write an invented county survey, sentence by sentence, without end. Knows neither lengths nor tasks.

Every place has people with trades, who recur in its section only. Many sentences know a question that they alone
answer: a place uses each template at most once, and names of places and people are never used twice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from compactor.evaluate.grammar import (
    COUNTIES,
    FIRST_NAMES,
    FOLLOW_UP_TEMPLATES,
    INTRODUCTION_TEMPLATES,
    LINK_TEMPLATES,
    MIDDLES,
    OPENER_TEMPLATES,
    PLACE_ENDS,
    PLACE_STARTS,
    REMARK_TEMPLATES,
    RIVERS,
    SURNAME_ENDS,
    SURNAME_STARTS,
    TEMPLATES,
    TRADES,
    WORDS,
    Template,
)

NAME_KINDS = ("person", "other", "saint", "inn", "hill")  # answers with a capital letter; "other" is a place
PRONOUNS = {"he": ("he", "his", "him"), "she": ("she", "her", "her")}

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_PRESENT_TENSE = re.compile(r" (?:is|are|has|grow|lies|leads|rises|marks|reaches|strikes|bears|falls) ")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeio])")
_SPACE_BEFORE_MARK = re.compile(r" +(?=[,.])")


@dataclass(frozen=True)
class Sentence:
    """A sentence and, where it states a fact, the question that only it answers."""

    text: str
    question: str = ""
    answer: str = ""
    answer_kind: str = ""  # the slot of the answer: a name of WORDS, "person" or "other"
    subject: str = ""  # what it is about: "the great bell of Marden"
    template: Template | None = None  # None: not of the survey's own prose


@dataclass
class Block:
    """Headings, if any, and the paragraph below them."""

    headings: tuple[str, ...]
    sentences: list[Sentence] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Headings and paragraph, with a blank line between them."""
        return "\n\n".join([*self.headings, " ".join(sentence.text for sentence in self.sentences)])


@dataclass(frozen=True)
class Person:
    """Somebody who belongs to a place."""

    name: str
    pronoun: str  # "he" or "she"
    trade: str


class Names:
    """Endless invented names of places and people, none of them twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._used: set[str] = set()
        self._places = self._invent(PLACE_STARTS.split(), PLACE_ENDS.split(), "-by-")
        self._surnames = self._invent(SURNAME_STARTS.split(), SURNAME_ENDS.split(), "-")

    def place(self) -> str:
        """Return a place that was not returned before."""
        return next(self._places)

    def person(self) -> Person:
        """Return a person whose surname nobody else has."""
        pronoun = self.rng.choice(("she", "he"))
        first = self.rng.choice(FIRST_NAMES[pronoun].split())
        trade = self.rng.choice(TRADES.split(", "))
        return Person(f"{first} {next(self._surnames)}", pronoun, trade)

    def _invent(self, starts: Sequence[str], ends: Sequence[str], joint: str) -> Iterator[str]:
        simple: list[str] = []
        for middle in MIDDLES:
            names = [f"{start}{middle}{end}" for start in starts for end in ends]
            self.rng.shuffle(names)
            for name in names:
                if name not in self._used:
                    self._used.add(name)
                    simple.append(name)
                    yield name
        while True:
            name = joint.join(self.rng.sample(simple, 2))
            if name not in self._used:
                self._used.add(name)
                yield name


@dataclass
class Place:
    """What stays the same within the section of one place, and which templates it has used."""

    name: str
    people: list[Person]
    words: dict[str, str]  # slots that the whole section shares
    neighbours: list[str]
    used: set[Template] = field(default_factory=set)


class Survey:
    """An endless report on the places of a county. Equal random states give equal reports."""

    SHARED_WORDS = ("works", "landmark", "ground")
    NUM_PEOPLE = 5
    NUM_NEIGHBOURS = 5
    OPENER_SHARE, FOLLOW_UP_SHARE, LINK_SHARE, REMARK_SHARE = 0.2, 0.35, 0.1, 0.2

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names = Names(rng)
        self.county = rng.choice(COUNTIES.split())
        self.rivers = rng.sample(RIVERS.split(), 3)
        self.places: list[str] = []  # those that have a section now or later
        self.people: list[Person] = []
        self.num_sections = 0
        self.here = self._next_place()

    def blocks(self) -> Iterator[Block]:
        """Yield the report from its title on, paragraph by paragraph, without end."""
        title: tuple[str, ...] = (f"# The parishes of {self.county}: a survey",)
        while True:
            number = self.num_sections
            opening = Block((*title, f"## {number}. {self.here.name}"), self._paragraph("Situation", 3))
            title = ()
            yield opening
            yield Block((), self._introductions())
            topics = [topic for topic in TEMPLATES if topic != "Situation"]
            for part, topic in enumerate(self.rng.sample(topics, self.rng.randint(4, 6)), start=1):
                yield Block((f"### {number}.{part} {topic}",), self._paragraph(topic, self.rng.randint(4, 6)))
            self.here = self._next_place()

    def extra_sentence(self) -> Sentence:
        """Return one more sentence about the place at hand: a new fact, or a linking remark."""
        unused = [one for topic in TEMPLATES.values() for one in topic if one not in self.here.used]
        if unused and self.rng.random() < 0.5:
            return self._say(self.rng.choice(unused))
        return self._say(self.rng.choice((*LINK_TEMPLATES, *REMARK_TEMPLATES)))

    # ------------------------------------------------------------------------------------------------ sections

    def _next_place(self) -> Place:
        self.num_sections += 1
        while len(self.places) < self.num_sections + self.NUM_NEIGHBOURS:
            self.places.append(self.names.place())
        at = self.num_sections - 1
        nearby = [place for place in self.places[max(0, at - self.NUM_NEIGHBOURS) :] if place != self.places[at]]
        people = [self.names.person() for _ in range(self.NUM_PEOPLE)]
        for i, person in enumerate(people):  # no two of one trade in a place
            taken = {other.trade for other in people[:i]}
            free = [trade for trade in TRADES.split(", ") if trade not in taken]
            people[i] = replace(person, trade=person.trade if person.trade in free else self.rng.choice(free))
        self.people += people
        words = {name: self.rng.choice(WORDS[name]) for name in self.SHARED_WORDS}
        words |= {"river": self.rng.choice(self.rivers), "county": self.county, "place": self.places[at]}
        return Place(self.places[at], people, words, self.rng.sample(nearby, self.NUM_NEIGHBOURS))

    def _introductions(self) -> list[Sentence]:
        templates = self.rng.sample(INTRODUCTION_TEMPLATES, self.NUM_PEOPLE)
        return [self._say(one, person) for one, person in zip(templates, self.here.people, strict=True)]

    def _paragraph(self, topic: str, num_sentences: int) -> list[Sentence]:
        unused = [template for template in TEMPLATES[topic] if template not in self.here.used]
        sentences = []
        for template in self.rng.sample(unused, min(num_sentences, len(unused))):
            person = self.rng.choice(self.here.people)
            sentences.append(self._open(self._say(template, person)))
            of_one_person = "{person}" in template.text and "{person2}" not in template.text
            if of_one_person and self.rng.random() < self.FOLLOW_UP_SHARE:
                sentences += self._say_new(FOLLOW_UP_TEMPLATES, person)
            elif self.rng.random() < self.LINK_SHARE:
                sentences += self._say_new(LINK_TEMPLATES)
            elif self.rng.random() < self.REMARK_SHARE:
                sentences.append(self._say(self.rng.choice(REMARK_TEMPLATES)))
        return sentences

    def _say_new(self, templates: Sequence[Template], person: Person | None = None) -> list[Sentence]:
        """Return a sentence from a template that this place has not used, if there is one."""
        unused = [template for template in templates if template not in self.here.used]
        return [self._say(self.rng.choice(unused), person)] if unused else []

    # ----------------------------------------------------------------------------------------------- sentences

    def _open(self, sentence: Sentence) -> Sentence:
        """Put an adverbial before some sentences."""
        if not re.match(r"(The|A|An|Most|Nearly|Nothing|Little) ", sentence.text):
            return sentence
        if _PRESENT_TENSE.search(sentence.text):
            return sentence
        if self.rng.random() >= self.OPENER_SHARE:
            return sentence
        opener = self._say(self.rng.choice(OPENER_TEMPLATES)).text
        return replace(sentence, text=f"{opener}, {sentence.text[0].lower()}{sentence.text[1:]}")

    def _say(self, template: Template, person: Person | None = None) -> Sentence:
        self.here.used.add(template)
        slots = self._slots(template, person or self.rng.choice(self.here.people))
        chosen = _ALTERNATIVES.sub(lambda found: self.rng.choice(found[1].split("|")), template.text)
        text = _fill(chosen, slots)
        kind = _SLOT.fullmatch(template.answer)
        return Sentence(
            text[0].upper() + text[1:],
            _fill(template.question, slots),
            _fill(template.answer, slots),
            kind[1] if kind else "",
            _fill(template.subject, slots),
            template,
        )

    def _slots(self, template: Template, person: Person) -> dict[str, str]:
        """Choose the words of every slot of a template."""
        he, his, him = PRONOUNS[person.pronoun]
        others = [other for other in self.here.people if other != person]
        slots = {
            **self.here.words,
            "person": person.name,
            "trade": person.trade,
            "he": he,
            "his": his,
            "him": him,
            "He": he.capitalize(),
            "His": his.capitalize(),
        }
        for name in _SLOT.findall(" ".join((template.text, template.question, template.subject))):
            if name in slots:
                continue
            match name:
                case "person2":
                    slots[name] = self.rng.choice(others).name
                case "other":
                    slots[name] = self.rng.choice(self.here.neighbours)
                case "clause" | "clause2":
                    subject, verb = self.rng.choice((("who", "did"), ("thing", "fared")))
                    slots[name] = f"{self.rng.choice(WORDS[subject])} {self.rng.choice(WORDS[verb])}"
                case "number":
                    slots[name] = str(self.rng.randint(12, 480))
                case "year":
                    slots[name] = str(self.rng.randint(1741, 1909))
                case _:
                    slots[name] = self.rng.choice(WORDS[name])
        return slots


def _fill(text: str, slots: dict[str, str]) -> str:
    filled = _SLOT.sub(lambda found: slots[found[1]], text)
    return _SPACE_BEFORE_MARK.sub("", _ARTICLE.sub(r"\1n ", filled))
