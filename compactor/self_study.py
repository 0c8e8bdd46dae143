"""Knows what the model is asked about a document so that its queries cover it: self-study. Knows no solver.

Attention Matching (arXiv 2602.16284) and Cartridges (arXiv 2506.06266) let the model talk about the document and keep
the queries that it makes on the way. Here it does so section by section, so that no part is left out, and about the
whole; all prompts are one batch (sampling.py). Every answer is replayed after the whole document when queries are
collected, whatever its sampling saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compactor.prompt import encode_plain
from compactor.sampling import sample_answers
from compactor.shared_layers import Sections
from compactor.types import Reporter, Segment

if TYPE_CHECKING:
    from compactor.model import LoadedModel
    from compactor.prefill import Prefilled
    from compactor.prompt import Prompt

WHOLE_PROMPTS = (
    "Aggregate all key facts of the context above, one per line.",
    "Structure the information in the context above as JSON; include all dates, times, names and numbers.",
    "Write three questions about different parts of the context above and answer each of them.",
    "List every name, number, date, place and defined term in the context above with what is said about it.",
    "Write ten short question and answer pairs that test detailed knowledge of the context above.",
    "Summarise the context above, section by section.",
)
SECTION_PROMPTS = {
    "questions": "Write short question and answer pairs, one for every sentence of the passage that begins with these "
    "words: ",
    "facts": "List every fact, one per line with who, what, where and when, of the passage that begins with these "
    "words: ",
    "restate": "Say in other words, sentence by sentence, the passage that begins with these words: ",
    "structure": "Write as JSON every name, thing, place, date and number, and how they belong together, of the "
    "passage that begins with these words: ",
}
SECTION_TOKENS = 512  # document tokens of a section
ANSWER_TOKENS = 96  # of each prompt, unless there are too few for one prompt a section
QUOTED_TOKENS = 12  # of the section's beginning that name it
REPEATED_TOKENS = 16  # an answer ends where so many tokens come again: small models go round in circles


@dataclass(frozen=True)
class Plan:
    """How many prompts there are and how long the answers may be."""

    num_sections: int
    prompts_per_section: int
    num_whole: int
    answer_tokens: int


def make_plan(num_document: int, total_tokens: int) -> Plan:
    """Share ``total_tokens`` answer tokens: first a prompt a section, then those about the whole, then more a section.

    With fewer tokens than sections deserve, sections are fewer and longer.
    """
    answers = max(1, total_tokens // ANSWER_TOKENS)
    answer_tokens = min(ANSWER_TOKENS, total_tokens)
    num_sections = min(answers, max(1, round(num_document / SECTION_TOKENS)))
    num_whole = min(len(WHOLE_PROMPTS), max(0, answers - num_sections))
    prompts_per_section = max(1, (answers - num_whole) // num_sections)
    return Plan(num_sections, prompts_per_section, num_whole, answer_tokens)


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
    """Let the model answer the self-study prompts with the full cache, as one sampled batch; return prompt and answer.

    total_tokens: answer tokens over all prompts together; room: tokens of the window that prompt and answer may take.
    Answers that go round in circles are cut, repeated ones left out. Equal seeds give equal segments on one machine.
    """
    plan = make_plan(len(prefilled.document_ids), total_tokens)
    by_section = section_prompts(prompt, prefilled.document_ids, plan)
    whole = [prompt.question_ids(text) for text in WHOLE_PROMPTS[: plan.num_whole]]
    prompts = [ids for section in by_section for ids in section] + whole
    max_new_tokens = min(plan.answer_tokens, room - max(map(len, prompts)))
    if max_new_tokens < 1:
        return []
    with reporter.phase("self-study", max_new_tokens, "steps") as advance:
        answers = sample_answers(
            loaded, prefilled, by_section, whole, max_new_tokens=max_new_tokens, seed=seed, on_step=advance
        )
    segments: dict[tuple[int, ...], Segment] = {}
    for question, answer in zip(prompts, answers, strict=True):
        unique = tuple(until_repetition(answer))
        segments.setdefault(unique, Segment((*question, *unique), "self-study", len(question)))
    return list(segments.values())


def section_prompts(prompt: Prompt, document_ids: list[int], plan: Plan) -> list[list[list[int]]]:
    """Return for every section its prompts; the kinds take turns from section to section."""
    sections = Sections.of(len(document_ids), plan.num_sections)
    kinds = list(SECTION_PROMPTS.values())
    result = []
    for index in range(sections.count):
        start = index * sections.step
        quoted = document_ids[start : start + QUOTED_TOKENS]
        asked = []
        for turn in range(plan.prompts_per_section):
            text = kinds[(index + turn) % len(kinds)]
            asked.append([*encode_plain(prompt.tokenizer, "\n\n" + text), *quoted, *prompt.suffix_ids])
        result.append(asked)
    return result


def until_repetition(tokens: list[int]) -> list[int]:
    """Return the tokens up to where `REPEATED_TOKENS` of them in a row come a second time."""
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - REPEATED_TOKENS + 1):
        window = tuple(tokens[start : start + REPEATED_TOKENS])
        if window in seen:
            return tokens[:start]
        seen.add(window)
    return tokens
