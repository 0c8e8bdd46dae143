"""Knows how many questions are asked of one document at once, and how far two caches are apart. Knows no task.

All questions share the document's keys, so they are one batch. Distances are KL(full || compacted) in nats per token,
teacher-forced on the full cache's own greedy answers (`fidelity`); from each pass only the last hidden states are held.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from compactor.errors import DocumentError
from compactor.fidelity import POSITIONS_AT_ONCE, Exchange, Fidelity, answer_states, compare_states, log_probs_of
from compactor.stepping import answer_after, greedy

if TYPE_CHECKING:
    from compactor.attach import AttachedCache
    from compactor.model import LoadedModel

QUESTIONS_AT_ONCE = 32
SPEED_TOKENS = 16  # generated to measure tokens per second

TokenIds = list[int]


class Respondent(Protocol):
    """Answers questions about one document, from whatever cache it has."""

    def generate(self, questions: Sequence[TokenIds], max_new_tokens: int, *, stop: bool = True) -> list[TokenIds]:
        """Return the greedy answer of each question, without its stop token; ``stop`` False goes on to the limit."""
        ...

    def states(self, exchanges: Sequence[Exchange]) -> torch.Tensor:
        """Return the last hidden states that predict the tokens of all answers, (number of tokens, hidden_size).

        An empty answer has one position: that of the stop token.
        """
        ...


class CacheRespondent:
    """Asks an attached cache, QUESTIONS_AT_ONCE in a batch."""

    def __init__(self, loaded: LoadedModel, cache: AttachedCache) -> None:
        self.loaded, self.cache = loaded, cache

    @torch.no_grad()
    def generate(self, questions: Sequence[TokenIds], max_new_tokens: int, *, stop: bool = True) -> list[TokenIds]:
        """See `Respondent.generate`. Raises DocumentError where the window has no room for an answer."""
        limit = room_for(self.loaded, self.cache.logical_length, questions, max_new_tokens)
        answers: list[TokenIds] = []
        for first in range(0, len(questions), QUESTIONS_AT_ONCE):
            batch = list(questions[first : first + QUESTIONS_AT_ONCE])
            answers += answer_after(self.loaded, self.cache, batch, limit, greedy, stop=stop)
        return answers

    def states(self, exchanges: Sequence[Exchange]) -> torch.Tensor:
        """See `Respondent.states`."""
        parts = []
        for first in range(0, len(exchanges), QUESTIONS_AT_ONCE):
            self.cache.forget_tail()
            try:
                parts.append(answer_states(self.loaded, self.cache, exchanges[first : first + QUESTIONS_AT_ONCE]))
            finally:
                self.cache.forget_tail()
        return torch.cat(parts)


def room_for(loaded: LoadedModel, logical_length: int, questions: Sequence[TokenIds], max_new_tokens: int) -> int:
    """Return how many tokens an answer may have: ``max_new_tokens``, or what the window leaves."""
    longest = max(len(question) for question in questions)
    room = loaded.window - logical_length - longest
    if room < 1:
        raise DocumentError(
            f"The longest question has {longest:,} tokens and the document leaves {loaded.window - logical_length:,} "
            f"of the model's window of {loaded.window:,}; give shorter documents."
        )
    return min(max_new_tokens, room)


def num_positions(exchanges: Sequence[Exchange]) -> list[int]:
    """Return how many rows of `Respondent.states` each exchange has."""
    return [max(1, len(one.answer_ids)) for one in exchanges]


def distances(
    loaded: LoadedModel, full_states: torch.Tensor, states: torch.Tensor, exchanges: Sequence[Exchange]
) -> list[Fidelity]:
    """Return how far a cache is from the full one, for each exchange."""
    counts = num_positions(exchanges)
    whole = compare_states(loaded, full_states, states)
    return [
        Fidelity(kl, agreement)
        for kl, agreement in zip(whole.kl.split(counts), whole.agreement.split(counts), strict=True)
    ]


@torch.no_grad()
def mean_log_probs(loaded: LoadedModel, respondent: Respondent, exchanges: Sequence[Exchange]) -> list[float]:
    """Return for each exchange the mean log-probability of its answer's tokens, nats. No answer may be empty."""
    states = respondent.states(exchanges)
    tokens = torch.tensor([token for one in exchanges for token in one.answer_ids])
    chosen = [
        log_probs_of(loaded, block).cpu().gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        for block, ids in zip(states.split(POSITIONS_AT_ONCE), tokens.split(POSITIONS_AT_ONCE), strict=True)
    ]
    return [float(part.mean()) for part in torch.cat(chosen).split(num_positions(exchanges))]


def speed(respondent: Respondent, question: TokenIds, device: torch.device) -> tuple[float, float | None]:
    """Ask one question alone; return seconds to its first token and tokens per second after it.

    The second is None where the window has no room for more than one token.
    """
    first_s, _ = _timed(respondent, question, 1, device)
    whole_s, count = _timed(respondent, question, SPEED_TOKENS, device)
    return first_s, (count - 1) / (whole_s - first_s) if count > 1 and whole_s > first_s else None


def _timed(respondent: Respondent, question: TokenIds, limit: int, device: torch.device) -> tuple[float, int]:
    started = time.perf_counter()
    (answer,) = respondent.generate([question], limit, stop=False)
    synchronize(device)
    return time.perf_counter() - started, len(answer)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a clock shows what was done and not what was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
