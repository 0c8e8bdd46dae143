"""Knows what the model is asked about a document so that its queries cover it: self-study. Knows no solver.

Attention Matching (arXiv 2602.16284) and Cartridges (arXiv 2506.06266) let the model talk about the document and keep
the queries that it makes on the way. Here it writes a question about every passage, a sentence or so, and answers it as
a user would be answered; and it writes about the whole. A fact that nobody asked for is a fact whose queries nobody has
seen. Every answer is replayed after the whole document when queries are collected, whatever its sampling saw.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from compactor.prompt import encode_plain
from compactor.sampling import sample_answers
from compactor.shared_layers import Sections
from compactor.types import Reporter, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
PASSAGE_PROMPT = "Write one short question that this passage of the context answers. Write the question only. Passage: "
PLAIN_PROMPT = "How does the context go on after these words: "  # where it asks none
QUOTED_TOKENS = 12  # of the passage, that say which one is meant
SECTION_TOKENS = 512  # document tokens that a question about a passage sees around it, and its answer too
QUESTION_TOKENS, ANSWER_TOKENS = 32, 32  # of a question about a passage and of its answer, at most
WHOLE_TOKENS = 96  # of an answer to a prompt about the whole
WHOLE_SHARE = 0.25  # of all answer tokens that these may take
LEAST_PASSAGE, MOST_PASSAGE = 8, 48  # tokens: shorter sentences are joined, longer ones cut
UNEVEN = 1.5  # passages of a section over the average, at most; neighbours are joined until then
REPEATED_TOKENS = 16  # an answer ends where so many tokens come again: small models go round in circles
SENTENCE_ENDS = ".!?;\u3002\uff01\uff1f\uff1b"  # the last four are Chinese and Japanese
QUESTION = re.compile("[^?\uff1f\u061f\u037e]*[?\uff1f\u061f\u037e]")  # the others are Chinese, Arabic and Greek marks
CLOSING = "\"')]}\u00bb\u201d\u2019\u300d\u300f"


@dataclass(frozen=True)
class Plan:
    """How many questions there are at most."""

    num_passages: int  # each is asked about once a round
    num_whole: int  # prompts about the whole
    answer_tokens: int  # of an answer about a passage, at most
    rounds: int = 1  # questions about every passage


def make_plan(num_document: int, total_tokens: int, rounds: int = 1) -> Plan:
    """Share ``total_tokens`` answer tokens: a quarter at most for prompts about the whole, the rest for passages."""
    num_whole = min(len(WHOLE_PROMPTS), int(WHOLE_SHARE * total_tokens) // WHOLE_TOKENS)
    answer_tokens = min(ANSWER_TOKENS, total_tokens)
    left = (total_tokens - num_whole * WHOLE_TOKENS) // (rounds * answer_tokens)
    return Plan(max(1, min(left, num_document)), num_whole, answer_tokens, rounds)


def self_study_segments(
    loaded: LoadedModel,
    prefilled: Prefilled,
    prompt: Prompt,
    *,
    plan: Plan,
    room: int,
    seed: int,
    reporter: Reporter,
) -> list[Segment]:
    """Let the model question itself about every passage and write about the whole, with the full cache; return
    questions with their answers.

    room: tokens of the window that question and answer may take. The first question about a passage and all answers to
    questions are greedy, further questions and what is written about the whole are sampled. Answers that go round in
    circles are cut, repeated questions left out. Equal seeds give equal segments on one machine.
    """
    by_section = passages_by_section(prompt.tokenizer, prefilled.document_ids, plan.num_passages)
    step = Sections.of(len(prefilled.document_ids), len(by_section)).step
    asking = [[passage_prompt(prompt, passage) for passage in section] for section in by_section]
    whole = [prompt.question_ids(text) for text in WHOLE_PROMPTS[: plan.num_whole]]
    most_asked = min(QUESTION_TOKENS, room - max(len(ids) for section in asking for ids in section))
    most_whole = min(WHOLE_TOKENS, room - max(map(len, whole), default=room))
    segments: dict[tuple[int, ...], Segment] = {}

    def take(questions: list[list[int]], answers: list[list[int]], about: int | None = None) -> None:
        for question, answer in zip(questions, answers, strict=True):
            unique = tuple(until_repetition(answer))
            segments.setdefault(tuple(question), Segment((*question, *unique), "self-study", len(question), about))

    rounds = plan.rounds if most_asked > 0 else 0
    steps = rounds * (most_asked + plan.answer_tokens) + max(0, most_whole)
    if not steps:
        return []
    with reporter.phase("self-study", steps, "steps") as advance:
        answer = partial(sample_answers, loaded, prefilled, on_step=advance)
        for turn in range(rounds):
            texts = answer(padded(asking), [], max_new_tokens=most_asked, seed=seed + turn if turn else None)
            questions = question_prompts(prompt, by_section, texts)
            most = min(plan.answer_tokens, room - max((len(ids) for one in questions for ids in one), default=0))
            if most < 1:
                continue
            answers = answer(padded(questions), [], max_new_tokens=most, seed=None)
            rows = max(map(len, questions))
            for index, asked in enumerate(questions):
                take(asked, answers[index * rows : index * rows + len(asked)], index * step)
        if most_whole > 0:
            take(whole, answer([], whole, max_new_tokens=most_whole, seed=seed))
    return list(segments.values())


def passage_prompt(prompt: Prompt, passage: Sequence[int]) -> list[int]:
    """Return the ids that ask for a question about a passage, or about the beginning of a long one."""
    quoted = passage[:MOST_PASSAGE]
    return [*encode_plain(prompt.tokenizer, "\n\n" + PASSAGE_PROMPT), *quoted, *prompt.suffix_ids]


def question_prompts(
    prompt: Prompt, by_section: Sequence[Sequence[Sequence[int]]], texts: Sequence[Sequence[int]]
) -> list[list[list[int]]]:
    """Return what is asked about each section, ready to be answered: the question that begins each text, once.

    texts: tokens, one a row of `padded`. Where the model wrote no question, what follows the passage's first words is
    asked.
    """
    rows, result = max(map(len, by_section)), []
    for index, section in enumerate(by_section):
        asked: dict[tuple[int, ...], None] = {}
        for passage, text in zip(section, texts[index * rows :], strict=False):
            written = first_question(str(prompt.tokenizer.decode(list(text), skip_special_tokens=True)))
            if written:
                question = prompt.question_ids(written)
            else:
                words = passage[: min(QUOTED_TOKENS, (len(passage) + 1) // 2)]
                question = [*encode_plain(prompt.tokenizer, "\n\n" + PLAIN_PROMPT), *words, *prompt.suffix_ids]
            asked[tuple(question)] = None
        result.append([list(question) for question in asked])
    return result


def first_question(text: str) -> str:
    """Return the first line up to its first question mark; "" where it has none."""
    lines = text.strip().splitlines()
    found = QUESTION.match(lines[0]) if lines else None
    return found[0].strip() if found else ""


def padded(sections: Sequence[Sequence[list[int]]]) -> list[list[list[int]]]:
    """Return as many prompts for every section as the fullest has; a prompt of the batch fills up."""
    rows = max(map(len, sections))
    filling = next(prompt for section in sections for prompt in section)
    return [[*section, *[filling] * (rows - len(section))] for section in sections]


def passages_by_section(
    tokenizer: PreTrainedTokenizerBase, document_ids: Sequence[int], most: int
) -> list[list[list[int]]]:
    """Cut a document into at most ``most`` passages and return those that begin in each section of
    `SECTION_TOKENS` or so; the sections are those of `Sections.of`. Where passages are long some have none."""
    passages = cut_passages(tokenizer, document_ids, most)
    count = max(1, min(len(passages), round(len(document_ids) / SECTION_TOKENS)))
    step = Sections.of(len(document_ids), count).step
    result: list[list[list[int]]] = [[] for _ in range(count)]
    start = 0
    for passage in passages:
        result[min(start // step, count - 1)].append(passage)
        start += len(passage)
    return [joined(section, math.ceil(UNEVEN * len(passages) / count)) for section in result]


def joined(passages: list[list[int]], most: int) -> list[list[int]]:
    """Join the shortest pair of neighbours until there are at most ``most``."""
    while len(passages) > most:
        at = min(range(len(passages) - 1), key=lambda i: len(passages[i]) + len(passages[i + 1]))
        passages = [*passages[:at], passages[at] + passages[at + 1], *passages[at + 2 :]]
    return passages


def cut_passages(tokenizer: PreTrainedTokenizerBase, document_ids: Sequence[int], most: int) -> list[list[int]]:
    """Cut a document at ends of sentences and lines into at most ``most`` passages that cover it."""
    if not document_ids:
        return []
    ends = sentence_ends(tokenizer, document_ids)
    least, longest = LEAST_PASSAGE, MOST_PASSAGE
    while True:
        passages: list[list[int]] = [[]]
        closed = False
        for token, is_end in zip(document_ids, ends, strict=True):
            if passages[-1] and (len(passages[-1]) >= longest or (len(passages[-1]) >= least and closed)):
                passages.append([])
            passages[-1].append(token)
            closed = is_end
        if len(passages) <= most:
            return passages
        scale = max(1.125, len(passages) / most)
        least, longest = math.ceil(scale * least), math.ceil(scale * longest)


def sentence_ends(tokenizer: PreTrainedTokenizerBase, document_ids: Sequence[int]) -> list[bool]:
    """Return for each token whether a sentence or a line ends with it; closing quotes and brackets belong to it."""
    texts = {token: str(tokenizer.decode([token])) for token in set(document_ids)}
    ends, over = [], False  # over: since the last letter or digit there was an end
    for token, following in zip(document_ids, [*document_ids[1:], None], strict=True):
        text, after = texts[token], "" if following is None else texts[following]
        word = text.rstrip().rstrip(CLOSING)
        over = word.endswith(tuple(SENTENCE_ENDS)) if word else over
        goes_on = after[:1].isdigit() or (bool(after) and not after.rstrip().rstrip(CLOSING) and not after.isspace())
        ends.append("\n" in text or (over and not goes_on))
    return ends


def until_repetition(tokens: list[int]) -> list[int]:
    """Return the tokens up to where `REPEATED_TOKENS` of them in a row come a second time."""
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - REPEATED_TOKENS + 1):
        window = tuple(tokens[start : start + REPEATED_TOKENS])
        if window in seen:
            return tokens[:start]
        seen.add(window)
    return tokens
