"""Knows what to ask the model so that its queries cover a document. Knows prompts and generation, no solver.

Two sources make segments (tokens after the document); the third, `context`, is observed during prefill. Repeating the
context and self-study prompts follow Attention Matching (arXiv 2602.16284) and KVzip (arXiv 2505.23416).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from compactor import attach
from compactor.types import Reporter, Segment

if TYPE_CHECKING:
    from transformers import StoppingCriteriaList

    from compactor.model import LoadedModel
    from compactor.prefill import Prefilled
    from compactor.prompt import Prompt

REPEAT_FIRST = "Repeat the previous context verbatim."
REPEAT_LATER = "Repeat the previous context verbatim, going on after these words: "
REPEAT_OVERLAP = 12  # tokens of the previous chunk that say where to go on

SELF_STUDY_PROMPTS = (
    "Aggregate all key facts of the context above, one per line.",
    "Structure the information in the context above as JSON; include all dates, times, names and numbers.",
    "Write three questions about different parts of the context above and answer each of them.",
    "List every name, number, date, place and defined term in the context above with what is said about it.",
    "Write ten short question and answer pairs that test detailed knowledge of the context above.",
    "Summarise the context above, section by section.",
)


def repeat_segments(
    prompt: Prompt, document_ids: list[int], borders: list[tuple[int, int]], room: int
) -> list[Segment]:
    """Return one segment per piece of document: the instruction, then the piece as a forced answer.

    borders: the document's chunks; a chunk is cut further where instruction and piece exceed ``room`` tokens.
    """
    longest = max(len(prompt.question_ids(REPEAT_FIRST)), len(prompt.question_ids(REPEAT_LATER)) + REPEAT_OVERLAP)
    piece = max(1, room - longest)
    segments = []
    for chunk_start, chunk_stop in borders:
        for start in range(chunk_start, chunk_stop, piece):
            stop = min(start + piece, chunk_stop)
            if start == 0:
                question = prompt.question_ids(REPEAT_FIRST)
            else:
                question = prompt.question_ids(REPEAT_LATER)
                seam = len(question) - len(prompt.suffix_ids)
                question[seam:seam] = document_ids[max(0, start - REPEAT_OVERLAP) : start]
            segments.append(Segment((*question, *document_ids[start:stop]), "repeat"))
    return segments


@torch.no_grad()
def self_study_segments(
    loaded: LoadedModel,
    prefilled: Prefilled,
    prompt: Prompt,
    *,
    total_tokens: int,
    room: int,
    seed: int,
    reporter: Reporter,
) -> list[Segment]:
    """Let the model answer the self-study prompts with the full cache, as one sampled batch.

    total_tokens: answer tokens over all prompts together (fewer prompts when there are fewer tokens than 32 each);
    room: tokens of the window that a question and its answer may take. Equal seeds give equal segments on one machine.
    """
    num_prompts = max(1, min(len(SELF_STUDY_PROMPTS), total_tokens // 32))
    questions = [prompt.question_ids(text) for text in SELF_STUDY_PROMPTS[:num_prompts]]
    longest = max(len(question) for question in questions)
    max_new_tokens = min(total_tokens // num_prompts, room - longest)
    if max_new_tokens < 1:
        return []
    cache = attach.attach_layers(loaded.model, prefilled.layers, prefilled.logical_length)
    input_ids, mask = left_pad(questions, pad_id=pad_token_id(loaded))
    with reporter.phase("self-study", max_new_tokens, "steps") as advance, seeded(seed, loaded.device):
        generated = generate(
            loaded,
            input_ids=input_ids.to(loaded.device),
            attention_mask=cache.attention_mask(mask).to(loaded.device),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            top_k=0,
            stopping_criteria=_each_step(lambda: advance(1)),
        )
    stops = stop_token_ids(loaded)
    segments = []
    for question, row in zip(questions, generated[:, longest:].tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        segments.append(Segment((*question, *row[:end]), "self-study"))
    return segments


def left_pad(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, both (len(sequences), longest) int64, padded on the left."""
    longest = max(len(sequence) for sequence in sequences)
    ids = [[pad_id] * (longest - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids), torch.tensor(mask)


def stop_token_ids(loaded: LoadedModel) -> set[int]:
    """Return the ids that end an answer."""
    configured = loaded.model.generation_config.eos_token_id
    if configured is None:
        configured = loaded.tokenizer.eos_token_id
    if configured is None:
        return set()
    return {configured} if isinstance(configured, int) else set(configured)


def pad_token_id(loaded: LoadedModel) -> int:
    """Return an id to pad with: the tokenizer's, else a stop token, else 0; padding is always masked."""
    if loaded.tokenizer.pad_token_id is not None:
        return int(loaded.tokenizer.pad_token_id)
    return min(stop_token_ids(loaded), default=0)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Start torch's global generators from ``seed``; their state is restored afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generate(loaded: LoadedModel, **arguments: Any) -> torch.Tensor:
    """Call transformers' ``generate``; returns token ids (batch, num_tokens), the prompt's included.

    Of the model's own generation config only the stop tokens play a part: its beams, penalties, static cache and
    lengths would change answers, fail with our cache, or warn.
    """
    from transformers import GenerationConfig

    model = loaded.model
    run: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    stops = sorted(stop_token_ids(loaded)) or None
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=pad_token_id(loaded))
    try:
        return run(**arguments)
    finally:
        model.generation_config = own


def _each_step(call: Callable[[], None]) -> StoppingCriteriaList:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class EachStep(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
            call()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([EachStep()])
