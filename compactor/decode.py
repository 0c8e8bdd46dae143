"""Knows how a question becomes a streamed answer over an attached cache. Knows no compaction."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compactor.config import DecodeSettings
from compactor.errors import DocumentError
from compactor.reference_queries import generate, seeded, stop_token_ids

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
    """Answer one question; the cache's tail is dropped before and after, so questions do not see each other.

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
    input_ids = torch.tensor([question_ids], device=loaded.device)
    clock = _Clock()
    cache.forget_tail()
    try:
        with seeded(settings.seed, loaded.device):
            generated = generate(
                loaded,
                input_ids=input_ids,
                attention_mask=cache.attention_mask(torch.ones_like(input_ids)),
                past_key_values=cache,
                max_new_tokens=min(settings.max_new_tokens, room),
                streamer=_streamer(loaded, clock, on_text),
                **sampling(settings),
            )
    finally:
        cache.forget_tail()
    token_ids = generated[0, len(question_ids) :].tolist()
    num_generated = len(token_ids)
    if token_ids and token_ids[-1] in stop_token_ids(loaded):
        token_ids = token_ids[:-1]
    return Answer(
        text=str(loaded.tokenizer.decode(token_ids, skip_special_tokens=True)),
        token_ids=token_ids,
        prompt_tokens=len(question_ids),
        seconds_to_first_token=clock.first,
        tokens_per_second=(num_generated - 1) / clock.rest if num_generated > 1 and clock.rest > 0 else 0.0,
    )


def sampling(settings: DecodeSettings) -> dict[str, Any]:
    """Return ``generate``'s arguments for greedy or sampled decoding."""
    if settings.temperature == 0.0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}


class _Clock:
    """Seconds from the call to the first token, and from the first token to the last."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first = self.rest = 0.0
        self.puts = 0

    def put(self) -> None:
        self.puts += 1
        elapsed = time.perf_counter() - self.started
        if self.puts == 2:  # the first put is the prompt
            self.first = elapsed
        self.rest = elapsed - self.first


def _streamer(loaded: LoadedModel, clock: _Clock, on_text: Callable[[str], None] | None) -> TextStreamer:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            clock.put()
            super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None and text:
                on_text(text)

    return Streamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
