"""Knows the held-out questions about a document and the fidelity report made with them. Knows no method and no fitting.

The model asks the questions itself: one about each of several sections spread over the document, beside a few fixed
ones, with prompts and a seed that no fit ever uses. Every cache is measured on the full cache's greedy answers.
Questions, answers, and what the full cache and no document at all make of them are computed once per study.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from compactor.attach import AttachedCache, attach_layers
from compactor.fidelity import Exchange, Fidelity, answer_states, compare_layers, compare_states
from compactor.prefill import dense_layer, prefill
from compactor.prompt import build_prompt, chunk_borders
from compactor.sampling import Nucleus
from compactor.stepping import Pick, answer_after, greedy
from compactor.types import LayerCache, SilentReporter

if TYPE_CHECKING:
    from compactor.job import Job
    from compactor.methods import Compacted
    from compactor.study import Study

HELD_OUT_SEED = 0x5EED0FF  # added to the seed of the run
LEAST_SECTIONS, MOST_SECTIONS, SECTION_TOKENS = 4, 12, 1024  # one question per so many tokens, within limits
OPENING_TOKENS = 12  # of a section, that say which one is meant
QUESTION_TOKENS, ANSWER_TOKENS = 32, 32  # at most
LEAST_ANSWER = 4  # tokens; a question that leaves less room is left out

SECTION_PROMPT = (
    "Ask one specific question about the part of the context above that begins with the words '{opening}'. "
    "Reply with the question only."
)
PLAIN_QUESTION = "In the part that begins with '{opening}', what is the main point?"  # where the model asks nothing
FIXED_QUESTIONS = (
    "Explain to a newcomer what the context above is for.",
    "Compare two things that occur in the context above: what do they share, and what sets them apart?",
    "Who or what is at the centre of the context above, and when does it take place?",
    "In your own words and without quoting: how does the context above end?",
)


@dataclass(frozen=True)
class HeldOut:
    """Questions that no fit has seen, and the full cache's greedy answers."""

    questions: list[str]
    exchanges: list[Exchange]


def fidelity_report(study: Study, compacted: Compacted) -> dict[str, Any] | None:
    """Return the fidelity report of a compacted cache, plain JSON; None where the window has no room for a question.

    - ``kl_mean``, ``kl_p95``, ``kl_worst``: KL(full || compacted) in nats per token of the full cache's greedy answers;
      mean and 95th percentile over all tokens, and the mean of the worst answer, whose question is ``worst_question``;
    - ``agreement``: fraction of tokens at which the most likely one is the same;
    - ``no_document``: the same five of a cache without the document, the other end of the scale;
    - ``attention_error_per_layer``: sqrt(sum w |o' - o|^2 / sum w |o|^2) by index of each compacted layer, over all
      question and answer tokens and query heads, with the queries of the full cache (`fidelity.ComparedLayer`);
    - ``measured_damage``: sum over the compacted layers of (sum w |o' - o|^2 / number of tokens) / r^2, w = g_h^2,
      r the median norm of the residual stream after the layer: the damage of an average token, in common currency;
    - ``expected_damage``: what the method predicted in the same currency (``predicted_damage``), None if it does not;
    - ``tokens``, ``questions``: how many were compared; ``seconds``: what it took, the held-out answers included where
      they were made for this report.

    The two of attention are None for a method that moves the positions after the document (truncation, summary):
    its keys never meet the full cache's queries.
    """
    started = time.perf_counter()
    job = study.job
    held_out = study.once("held-out", lambda: make_held_out(study))
    if held_out is None:
        job.reporter.note("The model's window leaves no room for held-out questions: there is no certificate.")
        return None
    with job.reporter.phase("certify", 3, "passes") as advance:
        cache = attach_layers(job.loaded.model, compacted.layers, compacted.logical_length)
        errors = attention_errors(study, cache, held_out)
        full_states = full_answer_states(study, held_out)
        advance(1)
        states = answer_states(job.loaded, cache, held_out.exchanges)
        advance(1)
        no_document = study.once("no document", lambda: distances_without_document(study, held_out))
        advance(1)
        report = distances(compare_states(job.loaded, full_states, states), held_out)
    return {
        **report,
        "no_document": no_document,
        **errors,
        "expected_damage": compacted.report.get("predicted_damage"),
        "tokens": len(full_states),
        "questions": len(held_out.questions),
        "seconds": round(time.perf_counter() - started, 3),
    }


def distances(fidelity: Fidelity, held_out: HeldOut) -> dict[str, Any]:
    """Summarise the KL of the tokens of all answers, one answer after another; see `fidelity_report`."""
    lengths = [len(exchange.answer_ids) for exchange in held_out.exchanges]
    per_answer = [float(kl.mean()) for kl in fidelity.kl.split(lengths)]
    worst = max(range(len(per_answer)), key=per_answer.__getitem__)
    return {
        "kl_mean": fidelity.mean_kl,
        "kl_p95": float(fidelity.kl.quantile(0.95)),
        "kl_worst": per_answer[worst],
        "worst_question": held_out.questions[worst],
        "agreement": float(fidelity.agreement.double().mean()),
    }


def attention_errors(study: Study, compacted: AttachedCache, held_out: HeldOut) -> dict[str, Any]:
    """Return attention errors and measured damage on the held-out exchanges; see `fidelity_report`.

    The pass goes through the full cache, and leaves its hidden states for `full_answer_states`.
    """
    job, full = study.job, study.full
    if compacted.logical_length != full.logical_length:
        return {"attention_error_per_layer": None, "measured_damage": None}
    layers = compare_layers(attached(study), compacted, job.head_gains, held_out.exchanges)
    states = answer_states(job.loaded, Cache(layers=list(layers)), held_out.exchanges)
    study.once("held-out states", lambda: states)
    num_tokens = sum(len(one.input_ids) for one in held_out.exchanges)
    damage = [layers[i].squared_error / num_tokens / float(full.residual_norms[i]) ** 2 for i in full.full_layers]
    return {
        "attention_error_per_layer": {str(i): layers[i].relative_error for i in full.full_layers},
        "measured_damage": sum(damage),
    }


def full_answer_states(study: Study, held_out: HeldOut) -> torch.Tensor:
    """Return the full cache's hidden states at all answer tokens, (num_tokens, hidden_size), made once per study."""
    return study.once("held-out states", lambda: answer_states(study.job.loaded, attached(study), held_out.exchanges))


def distances_without_document(study: Study, held_out: HeldOut) -> dict[str, Any]:
    """Return the distances of a cache that holds the prefix alone."""
    states = answer_states(study.job.loaded, without_document(study.job), held_out.exchanges)
    return distances(compare_states(study.job.loaded, full_answer_states(study, held_out), states), held_out)


def attached(study: Study) -> AttachedCache:
    """Return a fresh cache over the full document."""
    return attach_layers(study.job.loaded.model, study.full.layers, study.full.logical_length)


# ------------------------------------------------------------------------------------------- questions and answers


def make_held_out(study: Study) -> HeldOut | None:
    """Let the full cache ask and answer; None where the window has no room."""
    job = study.job
    with job.reporter.phase("held-out", 2, "passes") as advance:
        questions = ask_sections(study) + list(FIXED_QUESTIONS)
        advance(1)
        asked = {text: tuple(job.prompt.question_ids(text)) for text in questions}
        questions = [text for text, ids in asked.items() if has_room(job, ids) and ids not in study.asked]
        exchanges = answer_all(study, questions) if questions else []
        advance(1)
    return HeldOut(questions, exchanges) if exchanges else None


def ask_sections(study: Study) -> list[str]:
    """Let the model ask about sections spread over the whole document, sampled with the held-out seed; what the fit's
    self-study asked too is replaced."""
    job = study.job
    openings = section_openings(job)
    # a question needs no thoughts, so the template's way of answering at once is used
    asking = build_prompt(job.loaded.tokenizer, system=job.settings.system)
    prompts = [asking.question_ids(SECTION_PROMPT.format(opening=opening)) for opening in openings]
    questions = [PLAIN_QUESTION.format(opening=opening) for opening in openings]
    if not all(has_room(job, prompt) for prompt in prompts):
        return questions
    seed = (job.settings.seed + HELD_OUT_SEED) % 2**63
    pick = Nucleus(len(prompts), QUESTION_TOKENS, top_p=0.95, seed=seed, device=job.loaded.device)
    written = write(study, prompts, QUESTION_TOKENS, pick)
    texts = [first_question(decode(job, ids)) for ids in written]
    fresh = [text if tuple(job.prompt.question_ids(text)) not in study.asked else "" for text in texts]
    return [text or question for text, question in zip(fresh, questions, strict=True)]


def section_openings(job: Job) -> list[str]:
    """Return the first words of sections of equal length."""
    num_tokens = len(job.document_ids)
    num_sections = min(MOST_SECTIONS, max(LEAST_SECTIONS, num_tokens // SECTION_TOKENS))
    borders = chunk_borders(num_tokens, -(-num_tokens // num_sections))
    return [whole_words(decode(job, job.document_ids[start : start + OPENING_TOKENS])) for start, _ in borders]


def decode(job: Job, token_ids: list[int]) -> str:
    """Return the text of tokens, control tokens left out."""
    return str(job.loaded.tokenizer.decode(token_ids, skip_special_tokens=True))


def whole_words(text: str) -> str:
    """Return the words of a text on one line, without the first and the last, which may be cut."""
    words = text.split()
    return " ".join(words[1:-1] if len(words) > 3 else words)


def first_question(text: str) -> str:
    """Return the first line that is not empty, up to its first question mark; "" where there is none."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    question, mark, _ = line.partition("?")
    return question + mark


def answer_all(study: Study, questions: list[str]) -> list[Exchange]:
    """Answer every question greedily with the full cache."""
    asked = [study.job.prompt.question_ids(text) for text in questions]
    answers = write(study, asked, ANSWER_TOKENS, greedy)
    return [Exchange(tuple(question), tuple(answer)) for question, answer in zip(asked, answers, strict=True)]


def write(study: Study, prompts: list[list[int]], max_new_tokens: int, pick: Pick) -> list[list[int]]:
    """Continue every prompt after the full cache, as one batch; a continuation that ends has its stop token."""
    limit = min(max_new_tokens, study.job.room - max(map(len, prompts)))
    return answer_after(study.job.loaded, attached(study), prompts, limit, pick, keep_stop=True)


def has_room(job: Job, prompt: Sequence[int]) -> bool:
    """Whether the window has room for a prompt after the document and for a short answer."""
    return len(prompt) + LEAST_ANSWER <= job.room


def without_document(job: Job) -> AttachedCache:
    """Return a cache that holds the prefix alone: questions follow it directly."""
    prefix_ids = list(job.prompt.prefix_ids)
    if prefix_ids:
        bare = prefill(
            job.loaded,
            prefix_ids,
            [],
            prefill_chunk=len(prefix_ids),
            head_gains=None,
            reporter=SilentReporter(),
        )
        layers = bare.layers
    else:
        layers = [empty_layer(job, window) for window in job.loaded.sliding_windows]
    return attach_layers(job.loaded.model, layers, len(prefix_ids))


def empty_layer(job: Job, sliding_window: int | None) -> LayerCache:
    """Return a layer without a key."""
    nothing = torch.empty(job.loaded.num_kv_heads, 0, job.loaded.head_dim, device=job.loaded.device)
    return dense_layer(nothing, nothing, first_position=0, sliding_window=sliding_window)
