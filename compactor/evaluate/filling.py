"""Knows how to fill a survey to a length in tokens, with given sentences spread over it. Knows no questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compactor.errors import SettingsError
from compactor.evaluate.prose import Block, Sentence, Survey

CountTokens = Callable[[str], int]

MIN_FILL = 0.97  # of the wanted length
MAX_PLANTED_SHARE = 0.6  # of the wanted length
_MAX_ROUNDS = 60
_MAX_DRAWS = 40


class TooShortError(SettingsError):
    """The wanted length has no room for what the task needs."""


@dataclass(frozen=True)
class Located:
    """A sentence of a finished text."""

    sentence: Sentence
    depth: float  # share of the text's tokens before its middle, about


class Draft:
    """A survey that is being brought to a length, with sentences planted in it."""

    def __init__(self, survey: Survey, length: int, count_tokens: CountTokens) -> None:
        self.survey = survey
        self.length = length
        self._count_tokens = count_tokens
        self._costs: dict[str, int] = {}
        self.blocks: list[Block] = []

    @property
    def text(self) -> str:
        """The whole text, ending with a line end."""
        return "\n\n".join(block.text for block in self.blocks) + "\n"

    def cost(self, text: str) -> int:
        """Tokens of a piece of the text; a sum over pieces is near the count of the whole."""
        if text not in self._costs:
            self._costs[text] = self._count_tokens(text)
        return self._costs[text]

    def sentences(self) -> Iterator[Located]:
        """Yield the sentences in the order of the text."""
        pieces: list[tuple[Sentence | None, int]] = []
        for block in self.blocks:
            pieces += [(None, self.cost(f"{heading}\n\n")) for heading in block.headings]
            pieces += [(sentence, self._sentence_cost(sentence)) for sentence in block.sentences]
        total = sum(cost for _, cost in pieces)
        before = 0
        for sentence, cost in pieces:
            if sentence is not None:
                yield Located(sentence, (before + cost / 2) / total)
            before += cost

    def fill(self, planted: Sequence[str]) -> None:
        """Write the text: planted sentences at equal spacing, in their order, and prose to the wanted length.

        Raises TooShortError when there is no room.
        """
        extra = [Sentence(text) for text in planted]
        room = self.length - sum(map(self._sentence_cost, extra))
        if room < (1 - MAX_PLANTED_SHARE) * self.length:
            raise TooShortError(f"{len(extra)} sentences do not fit in {self.length} tokens; give more tokens.")
        used = 0
        for block in self.survey.blocks():
            self.blocks.append(block)
            used += sum(self.cost(f"{heading}\n\n") for heading in block.headings)
            used += sum(map(self._sentence_cost, block.sentences))
            if used >= room:
                break
        while used > room:
            used -= self._drop()
        self._plant(extra)
        self._settle()

    def _sentence_cost(self, sentence: Sentence) -> int:
        return self.cost(f" {sentence.text}")

    def _plant(self, planted: Sequence[Sentence]) -> None:
        """Put the sentences after those of the prose that are nearest to equal spacing."""
        slots = [(block, i + 1) for block in self.blocks for i in range(len(block.sentences))]
        depths = [located.depth for located in self.sentences()]
        jitter = self.survey.rng.uniform
        for i in reversed(range(len(planted))):  # from the end, so that places stay valid
            wanted = (i + 0.5 + jitter(-0.2, 0.2)) / len(planted)
            block, at = slots[min(range(len(slots)), key=lambda j: abs(depths[j] - wanted))]
            block.sentences.insert(at, planted[i])

    def _settle(self) -> None:
        """Drop and add sentences at the end until the whole text, counted as one, has the wanted length."""
        for _ in range(_MAX_ROUNDS):
            excess = self._count_tokens(self.text) - self.length
            if excess > 0:
                while excess > 0:
                    excess -= self._drop()
            elif excess < -(1 - MIN_FILL) * self.length:
                self._add(-excess)
            else:
                return
        raise TooShortError(f"No text of {self.length} tokens came about; give more tokens.")

    def _add(self, gap: int) -> None:
        """Add the longest of a few sentences that fit; drop one if none fits."""
        best: Sentence | None = None
        for _ in range(_MAX_DRAWS):
            drawn = self.survey.extra_sentence()
            if self._sentence_cost(drawn) <= gap and (
                best is None or self._sentence_cost(drawn) > self._sentence_cost(best)
            ):
                best = drawn
            if best is not None and gap - self._sentence_cost(best) < (1 - MIN_FILL) * self.length / 2:
                break
        if best is None:
            self._drop()
        else:
            self.blocks[-1].sentences.append(best)

    def _drop(self) -> int:
        """Take away the last sentence of the prose; return its tokens, and those of a heading that goes with it."""
        for at in reversed(range(len(self.blocks))):
            block = self.blocks[at]
            for i in reversed(range(len(block.sentences))):
                if block.sentences[i].template is None:
                    continue
                cost = self._sentence_cost(block.sentences.pop(i))
                if not block.sentences:
                    cost += sum(self.cost(f"{heading}\n\n") for heading in block.headings)
                    del self.blocks[at]
                return cost
        raise TooShortError(f"No prose is left in {self.length} tokens; give more tokens.")


def compose(name: str, length: int, count_tokens: CountTokens, planted: Sequence[str] = ()) -> Draft:
    """Return a filled draft; equal names give equal texts. Raises TooShortError when there is no room."""
    draft = Draft(Survey(random.Random(name)), length, count_tokens)
    draft.fill(planted)
    return draft
