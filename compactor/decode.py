"""Knows how a question becomes a streamed answer over an attached cache. Knows no compaction."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compactor.config import DecodeSettings
from compactor.errors import DocumentError
from compactor.reference_queries import stop_token_ids
from compactor.sampling import Nucleus
from compactor.stepping import Pick, document_layers, greedy, stream

if TYPE_CHECKING:
    from transformers import TextStreamer

    from compactor.attach import AttachedCache
    from compactor.model import LoadedModel
    from compactor.prompt import Prompt


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost."""

    text: str
    token_ids: list[int]  # stop token excluded
    prompt_tokens: int  # tokens of the question and the template around it
    seconds_to_first_token: float
    tokens_per_second: float  # after the first token; 0 when there is only one


@torch.no_grad()
def answer_question(
    loaded: LoadedModel,
    cache: AttachedCache,
    prompt: Prompt,
    question: str,
    settings: DecodeSettings,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer one question, right after the document: the cache's own tail is neither seen nor changed.

    ``on_text`` receives pieces of text as they are decoded. Raises DocumentError when question and answer do not fit
    what the document leaves of the model's window.
    """
    question_ids = prompt.question_ids(question)
    room = loaded.window - cache.logical_length - len(question_ids)
    if room < 1:
        raise DocumentError(
            f"The question has {len(question_ids)} tokens and the document leaves "
            f"{loaded.window - cache.logical_length} of the model's window of {loaded.window}; ask a shorter question."
        )
    limit = min(settings.max_new_tokens, room)
    stops, token_ids, clock = stop_token_ids(loaded), list[int](), _Clock()
    text = _text_stream(loaded, on_text)
    pick = picker(settings, limit, loaded.device)
    for (token,) in stream(loaded, document_layers(cache), cache.logical_length, [question_ids], limit, pick):
        clock.tick()
        if token in stops:
            break
        token_ids.append(token)
        text.put(torch.tensor([token]))
    text.end()
    return Answer(
        text=str(loaded.tokenizer.decode(token_ids, skip_special_tokens=True)),
        token_ids=token_ids,
        prompt_tokens=len(question_ids),
        seconds_to_first_token=clock.first,
        tokens_per_second=(clock.ticks - 1) / clock.rest if clock.ticks > 1 and clock.rest > 0 else 0.0,
    )


def picker(settings: DecodeSettings, max_new_tokens: int, device: torch.device) -> Pick:
    """Return what picks the tokens of one sequence: the most likely one, or draws by temperature and nucleus."""
    if settings.temperature == 0.0:
        return greedy
    return Nucleus(
        1, max_new_tokens, top_p=settings.top_p, temperature=settings.temperature, seed=settings.seed, device=device
    )


class _Clock:
    """Seconds from the call to the first token, and from the first token to the last."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first = self.rest = 0.0
        self.ticks = 0

    def tick(self) -> None:
        """Take note that a token has come."""
        self.ticks += 1
        elapsed = time.perf_counter() - self.started
        if self.ticks == 1:
            self.first = elapsed
        self.rest = elapsed - self.first


def _text_stream(loaded: LoadedModel, on_text: Callable[[str], None] | None) -> TextStreamer:
    """Return what turns tokens into text as soon as a word is complete."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None and text:
                on_text(text)

    return Stream(loaded.tokenizer, skip_special_tokens=True)
