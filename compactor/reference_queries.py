"""Knows the repeat pass, and how the model is made to generate. Knows no self-study prompts and no solver.

Repeating the context follows KVzip (arXiv 2505.23416) and Attention Matching (arXiv 2602.16284).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compactor.types import Segment

if TYPE_CHECKING:
    from compactor.model import LoadedModel
    from compactor.prompt import Prompt

REPEAT_FIRST = "Repeat the previous context verbatim."
REPEAT_LATER = "Repeat the previous context verbatim, going on after these words: "
REPEAT_OVERLAP = 12  # tokens of the previous chunk that say where to go on


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
            segments.append(Segment((*question, *document_ids[start:stop]), "repeat", len(question), start))
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
