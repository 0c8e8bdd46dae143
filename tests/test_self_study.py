"""Claims about self-study: what each row of the batch attends to, what is asked, and how answers become segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny
from transformers import GenerationConfig

from compactor import sampling, self_study
from compactor.attach import attach_layers, dense_heads
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.job import Job, prepare
from compactor.model import LoadedModel, load_model
from compactor.prefill import Prefilled
from compactor.prompt import encode_plain
from compactor.sampling import Nucleus, sample_answers
from compactor.self_study import cut_passages, make_plan, passages_by_section, self_study_segments, until_repetition
from compactor.shared_layers import OVERLAP, Sections
from compactor.study import prefill_document
from compactor.types import LayerCache, SilentReporter

TEXT = "The tenant shall pay rent on the first day of each month. Clause 7 says that repairs are paid by the tenant. "
SECTION_PROMPTS = [
    [[30, 31, 32, 33], [50]],
    [list(range(41, 61)), [60, 61]],
    [[33, 34], [70, 71, 72, 73, 74]],
]  # longer than a window
WHOLE_PROMPTS = [list(range(80, 105)), [90], [30, 31, 32, 33]]
FAMILIES = ("llama", "gemma3_text")


@dataclass(frozen=True)
class Place:
    """A model and a prefilled document."""

    loaded: LoadedModel
    job: Job
    full: Prefilled


@cache
def place_of(folder: Path, family: str, template: bool) -> Place:
    fields = {} if template else {"chat_template": None}
    loaded = load_model(str(make_tiny(family, folder / f"{family}{template}", **fields)), device="cpu")
    settings = CompactSettings(keep_ratio=0.2, reserve=64, certify=False)
    job = prepare(make_document("lease", TEXT * 2), loaded, settings)
    return Place(loaded, job, prefill_document(job))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Place]:
    folder = tmp_path_factory.mktemp("models")
    return lambda family, template=True: place_of(folder, family, template)


def part_of(layer: LayerCache, prefix: int, start: int, stop: int) -> LayerCache:
    """The layer with the prefix and the document tokens start .. stop only; a sliding layer stays as it is."""
    if layer.sliding_window is not None:
        return layer
    rows = torch.tensor([*range(prefix), *range(prefix + start, prefix + stop)])
    keys, values = (heads[0][:, rows] for heads in dense_heads(layer))
    count = layer.num_kv_heads
    return replace(
        layer,
        keys=keys.flatten(0, 1),
        values=values.flatten(0, 1),
        biases=torch.zeros(count * len(rows)),
        positions=rows.int().repeat(count),
        offsets=torch.arange(count + 1, dtype=torch.int32) * len(rows),
    )


def expected_logits(place: Place, layers: list[LayerCache], prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits of every step of an answer after these layers, the prompt and the answer in one call and alone."""
    cache_ = attach_layers(place.loaded.model, layers, place.full.logical_length)
    with torch.no_grad():
        logits = place.loaded.model(torch.tensor([prompt + answer[:-1]]), past_key_values=cache_).logits[0]
    return logits[len(prompt) - 1 :]


def greedy(
    place: Place,
    sections: list[list[list[int]]],
    whole: list[list[int]],
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[list[int]], torch.Tensor]:
    """Answers when each step takes the best token and none stops, and all logits, (rows, steps, vocabulary)."""
    seen: list[torch.Tensor] = []

    def best(self: Nucleus, logits: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return logits.argmax(-1)

    with monkeypatch.context() as patch:
        patch.setattr(Nucleus, "__call__", best)
        patch.setattr(sampling, "stop_token_ids", lambda _loaded: set())
        answers = sample_answers(place.loaded, place.full, sections, whole, max_new_tokens=steps, seed=0)
    return answers, torch.stack(seen, dim=1)


# ------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("template", [True, False], ids=["template", "no prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_section_rows_see_prefix_section_and_their_own_tail_and_whole_rows_everything(
    family: str, template: bool, places: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places(family, template)
    assert bool(place.full.prefix_length) == template
    answers, logits = greedy(place, SECTION_PROMPTS, WHOLE_PROMPTS, 6, monkeypatch)
    prompts = [prompt for section in SECTION_PROMPTS for prompt in section] + WHOLE_PROMPTS
    cut = Sections.of(len(place.full.document_ids), 3)
    assert [len(answer) for answer in answers] == [6] * 9
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        layers = place.full.layers
        if row < 6:
            start = row // 2 * cut.step
            layers = [part_of(layer, place.full.prefix_length, start, start + cut.size) for layer in layers]
        expected = expected_logits(place, layers, prompt, answer)
        torch.testing.assert_close(logits[row], expected, atol=2e-3, rtol=1e-3)
    assert float((logits[0] - logits[8]).abs().max()) > 0.1  # equal prompts: the section and the whole differ


@pytest.mark.parametrize("family", FAMILIES)
def test_the_surest_token_of_whole_rows_is_what_transformers_generates(
    family: str, places: Callable[..., Place]
) -> None:
    place = places(family)
    answers = sample_answers(place.loaded, place.full, [], WHOLE_PROMPTS, max_new_tokens=12, seed=3, top_p=1e-9)
    for prompt, answer in zip(WHOLE_PROMPTS, answers, strict=True):
        attached = attach_layers(place.loaded.model, place.full.layers, place.full.logical_length)
        ids = torch.tensor([prompt])
        config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0)
        mask = attached.attention_mask(torch.ones_like(ids))
        made = place.loaded.model.generate(ids, attention_mask=mask, past_key_values=attached, generation_config=config)
        made = made[0, len(prompt) :].tolist()
        stop = place.loaded.tokenizer.eos_token_id
        assert answer == (made[: made.index(stop)] if stop in made else made)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_longer_neighbour_and_its_padding_change_no_row(
    family: str, places: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places(family)
    _, alone = greedy(place, [], [[80, 81, 82]], 4, monkeypatch)
    _, beside = greedy(place, [], [[80, 81, 82], list(range(30, 70))], 4, monkeypatch)
    torch.testing.assert_close(beside[0], alone[0], atol=1e-3, rtol=1e-3)
    _, one = greedy(place, [[[80, 81, 82]]], [], 4, monkeypatch)  # one section is the whole document
    torch.testing.assert_close(one[0], alone[0], atol=1e-3, rtol=1e-3)


def test_an_answer_ends_before_its_stop_token_and_the_others_go_on(
    places: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places("llama")
    answers, _ = greedy(place, SECTION_PROMPTS, WHOLE_PROMPTS, 12, monkeypatch)
    stop = answers[0][3]
    monkeypatch.setattr(sampling, "stop_token_ids", lambda _loaded: {stop})
    steps: list[int] = []
    ended = sample_answers(
        place.loaded, place.full, SECTION_PROMPTS, WHOLE_PROMPTS, max_new_tokens=12, seed=0, top_p=1e-9,
        on_step=steps.append,
    )  # fmt: skip
    assert ended == [answer[: answer.index(stop)] if stop in answer else answer for answer in answers]
    assert sum(steps) <= 12


def test_several_batches_tell_of_their_steps_as_if_they_were_one(
    places: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places("llama")
    monkeypatch.setattr(sampling, "stop_token_ids", lambda _loaded: set())
    answer = partial(
        sample_answers, place.loaded, place.full, SECTION_PROMPTS, WHOLE_PROMPTS, max_new_tokens=7, seed=None
    )
    steps: list[list[int]] = [[], []]
    together = answer(on_step=steps[0].append)
    monkeypatch.setattr(sampling, "rows_at_once", lambda *_: 1)  # a section a batch
    assert len(SECTION_PROMPTS) > 1 and answer(on_step=steps[1].append) == together
    assert [sum(told) for told in steps] == [7, 7] and set(steps[1]) == {1}


def test_equal_seeds_give_equal_answers_and_others_do_not(places: Callable[..., Place]) -> None:
    place = places("llama")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (
        sample_answers(place.loaded, place.full, SECTION_PROMPTS, WHOLE_PROMPTS, max_new_tokens=16, seed=seed)
        for seed in (5, 5, 6)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own random numbers go on undisturbed


def test_no_prompt_and_no_token_are_no_error(places: Callable[..., Place]) -> None:
    place = places("llama")
    assert sample_answers(place.loaded, place.full, [], [], max_new_tokens=4, seed=0) == []
    assert sample_answers(place.loaded, place.full, [], WHOLE_PROMPTS, max_new_tokens=0, seed=0) == [[], [], []]


def test_tokens_are_drawn_from_the_nucleus_by_their_probability() -> None:
    probs = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    logits = probs.log().expand(4000, -1) + 3.0
    for top_p, inside in ((1.0, [0, 1, 2, 3, 4]), (0.72, [1, 3, 2]), (0.69, [1, 3]), (0.3, [1])):
        drawn = Nucleus(4000, 1, top_p=top_p, seed=0, device=logits.device)(logits, torch.zeros(1, dtype=torch.int64))
        counts = torch.bincount(drawn, minlength=5) / 4000
        expected = torch.zeros(5)
        expected[inside] = probs[inside] / probs[inside].sum()
        torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)
        assert counts.nonzero().flatten().tolist() == sorted(inside)


def test_no_token_beyond_the_most_likely_is_ever_drawn() -> None:
    logits = torch.linspace(0, 1, 10).expand(500, -1)
    pick = Nucleus(500, 1, top_p=1.0, top_k=3, seed=0, device=logits.device)
    drawn = pick(logits, torch.zeros(1, dtype=torch.int64))
    assert sorted(set(drawn.tolist())) == [7, 8, 9]


def test_temperature_divides_the_logits_and_every_step_draws_anew() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(6000, -1)
    pick = Nucleus(6000, 2, top_p=1.0, temperature=2.0, seed=0, device=logits.device)
    first, second = (pick(logits, torch.tensor([step])) for step in (0, 1))
    assert not torch.equal(first, second)
    expected = (torch.tensor([0.0, 1.0, 2.0]) / 2.0).softmax(-1)
    torch.testing.assert_close(torch.bincount(first, minlength=3) / 6000, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-24])
def test_the_largest_random_number_still_draws_from_the_nucleus(uniform: float) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 3
    pick = Nucleus(50, 1, top_p=0.9, seed=0, device=logits.device)
    pick.uniform.fill_(uniform)
    drawn = pick(logits, torch.zeros(1, dtype=torch.int64))
    more_likely = (logits.softmax(-1) * (logits > logits.gather(1, drawn.unsqueeze(1)))).sum(-1)
    assert (more_likely < 0.9).all()


@pytest.mark.parametrize("num_document", [1, 2, 7, 511, 512, 1300])
def test_sections_cover_the_document(num_document: int) -> None:
    for count in range(1, min(num_document, 40) + 1):
        cut = Sections.of(num_document, count)
        spans = [(i * cut.step, i * cut.step + cut.size) for i in range(cut.count)]
        assert spans[0][0] == 0 and spans[-1][1] == num_document and len(spans) == count
        for (start, stop), (following, _) in pairwise(spans):
            assert start < following <= stop
            assert stop - following < count + OVERLAP + 1  # they overlap by a passage and a few tokens at most
            assert stop - following >= min(OVERLAP, num_document // (2 * count))


# ------------------------------------------------------------------------------------------- prompts and answers


def test_plans_stay_within_the_tokens_they_are_given() -> None:
    documents = (1, 7, 100, 511, 770, 2048, 5000, 33_333, 100_000)
    totals = (1, 2, 31, 95, 96, 97, 200, 512, 1024, 1500, 4096, 25_000, 1_000_000)
    for num_document, total, rounds in product(documents, totals, (1, 2)):
        plan = make_plan(num_document, rounds * total, rounds)
        assert 1 <= plan.num_passages <= num_document and plan.rounds == rounds
        assert 0 <= plan.num_whole <= len(self_study.WHOLE_PROMPTS)
        answers = rounds * plan.num_passages * plan.answer_tokens + plan.num_whole * self_study.WHOLE_TOKENS
        assert plan.answer_tokens >= 1 and answers <= max(rounds * total, rounds * plan.answer_tokens)
        assert plan.num_whole * self_study.WHOLE_TOKENS <= rounds * total / 4
        assert make_plan(num_document, 2 * rounds * total, rounds).num_passages >= plan.num_passages


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_passages_cover_the_document_and_end_with_sentences(tmp_path: Path, family: str) -> None:
    loaded = load_model(str(make_tiny(family, tmp_path / "m")), device="cpu")
    text = 'Rent is 4.5 euros. Who pays it?\nThe tenant (he said "yes!") pays. ' * 3 + "word " * 400 + "End. Short."
    ids = encode_plain(loaded.tokenizer, text)
    passages = cut_passages(loaded.tokenizer, ids, 10_000)
    assert [token for passage in passages for token in passage] == ids
    assert all(len(passage) <= self_study.MOST_PASSAGE for passage in passages)
    texts = [loaded.tokenizer.decode(passage).strip() for passage in passages]
    whole = [one for one in texts if "word" not in one]
    assert "Rent is 4.5 euros." in texts[0] and texts[0].endswith(("euros.", "it?"))
    assert len(whole) > 6 and all(one.endswith((".", "?", '!")')) for one in whole)
    for most in (1, 2, 7, 12):
        fewer = cut_passages(loaded.tokenizer, ids, most)
        assert [token for passage in fewer for token in passage] == ids and 1 <= len(fewer) <= most
    assert cut_passages(loaded.tokenizer, [], 3) == []


def test_every_section_has_the_passages_that_begin_in_it(places: Callable[..., Place]) -> None:
    tokenizer = places("llama").loaded.tokenizer
    ids = encode_plain(tokenizer, "".join(f"Clause {i} says who pays {i} euros. " for i in range(300)))
    by_section = passages_by_section(tokenizer, ids, 10_000)
    cut = Sections.of(len(ids), len(by_section))
    assert cut.count == round(len(ids) / self_study.SECTION_TOKENS) > 3
    assert [token for section in by_section for passage in section for token in passage] == ids
    start = 0
    for index, section in enumerate(by_section):
        for passage in section:
            assert min(start // cut.step, cut.count - 1) == index
            start += len(passage)
    few = passages_by_section(tokenizer, ids, 3)  # a passage of several sections
    assert [token for section in few for passage in section for token in passage] == ids
    assert len(few) == 3


def test_a_long_passage_is_quoted_by_its_beginning_and_leaves_sections_without_one(
    places: Callable[..., Place],
) -> None:
    place = places("llama")
    passage = list(range(20, 20 + 3 * self_study.MOST_PASSAGE))
    asked, suffix = self_study.passage_prompt(place.job.prompt, passage), list(place.job.prompt.suffix_ids)
    assert asked[-len(suffix) - self_study.MOST_PASSAGE :] == [*passage[: self_study.MOST_PASSAGE], *suffix]
    texts = [encode_plain(place.loaded.tokenizer, "Who pays?")] * 3
    assert self_study.question_prompts(place.job.prompt, [[passage], [], [passage]], texts) == [
        [place.job.prompt.question_ids("Who pays?")], [], [place.job.prompt.question_ids("Who pays?")],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Who pays?", "Who pays?"),
        ("Who pays? The tenant.\nOr not?", "Who pays?"),
        ("  \u8ab0\u304c\uff1f", "\u8ab0\u304c\uff1f"),
        ("The tenant pays.\nWho?", ""),
        ("int x = 1;", ""),
        (" \n ", ""),
    ],
)
def test_a_question_is_the_first_line_up_to_its_mark(text: str, question: str) -> None:
    assert self_study.first_question(text) == question


def test_neighbours_are_joined_until_they_are_few_enough() -> None:
    passages = [[1, 1], [2], [3], [4, 4, 4], [5]]
    assert self_study.joined(passages, 5) == passages
    assert self_study.joined(passages, 4) == [[1, 1], [2, 3], [4, 4, 4], [5]]
    assert self_study.joined(passages, 1) == [[1, 1, 2, 3, 4, 4, 4, 5]]


def segments_of(
    place: Place, room: int, total_tokens: int = 256, seed: int = 0, rounds: int = 1
) -> list[self_study.Segment]:
    plan = make_plan(len(place.full.document_ids), rounds * total_tokens, rounds)
    return self_study_segments(
        place.loaded, place.full, place.job.prompt, plan=plan, room=room, seed=seed, reporter=SilentReporter()
    )


def test_segments_never_exceed_the_room(places: Callable[..., Place]) -> None:
    place = places("llama")
    longest = max(
        len(self_study.passage_prompt(place.job.prompt, passage))
        for section in passages_by_section(place.loaded.tokenizer, place.full.document_ids, 6)
        for passage in section
    )
    assert segments_of(place, 10) == []
    whole = segments_of(place, longest, total_tokens=2000)  # no room to ask about passages: what is left is the whole
    assert whole and all(
        one.token_ids[: one.answer_start] == tuple(place.job.prompt.question_ids(text))
        for one, text in zip(whole, self_study.WHOLE_PROMPTS, strict=False)
    )
    for room in (longest + 1, longest + 9, longest + 40, 4096):
        made = segments_of(place, room)
        assert all(len(segment.token_ids) <= room for segment in made)
    assert made and all(segment.source == "self-study" for segment in made)


def test_every_passage_is_asked_about_once_a_round_and_then_the_whole(
    places: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places("llama")
    calls: list[tuple[list[list[list[int]]], list[list[int]], int | None]] = []
    tokenizer = place.loaded.tokenizer

    def answer(_loaded: object, _full: object, sections: list[list[list[int]]], whole: list[list[int]], **how: Any):  # type: ignore[no-untyped-def]
        calls.append((sections, whole, how["seed"]))
        prompts = [prompt for section in sections for prompt in section] + list(whole)
        if len(calls) == 2:
            return [[7, 8, 9]] * len(prompts)
        texts = [
            "Who pays?",
            "Who pays?",
            "",
            *(f"What is {len(calls)}.{i}?\nIt is rent." for i in range(len(prompts))),
        ]
        return [encode_plain(tokenizer, text) for text in texts][: len(prompts)]

    monkeypatch.setattr(self_study, "sample_answers", answer)
    made = segments_of(place, 4096, total_tokens=700, seed=5, rounds=2)
    passages = [p for section in passages_by_section(tokenizer, place.full.document_ids, 32) for p in section]
    assert [seed for *_, seed in calls] == [None, None, 6, None, 5]
    assert len(passages) > 4
    asking = [prompt for section in calls[0][0] for prompt in section]
    assert asking == [self_study.passage_prompt(place.job.prompt, passage) for passage in passages]
    asked = [prompt for section in calls[1][0] for prompt in section]
    question = place.job.prompt.question_ids
    assert asked[0] == question("Who pays?") and asked[2] == question("What is 1.0?")
    words = passages[2][: min(self_study.QUOTED_TOKENS, (len(passages[2]) + 1) // 2)]
    assert asked[1][-len(words) - len(place.job.prompt.suffix_ids) :] == [*words, *place.job.prompt.suffix_ids]
    assert [list(one.token_ids) for one in made[: len(asked)]] == [[*one, 7, 8, 9] for one in asked]
    assert all(one.token_ids[: one.answer_start] in {tuple(p) for p in asked} for one in made[: len(asked)])
    whole = [question(text) for text in self_study.WHOLE_PROMPTS[:3]]
    assert calls[4][1] == whole and [list(one.token_ids[: one.answer_start]) for one in made[-3:]] == whole
    assert len({one.token_ids[: one.answer_start] for one in made}) == len(made)


def test_sections_of_unlike_number_are_filled_up() -> None:
    assert self_study.padded([[[1], [2]], [[3]], []]) == [[[1], [2]], [[3], [1]], [[1], [1]]]


def test_what_takes_several_batches_is_what_one_batch_gives(
    places: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places("llama")
    one = segments_of(place, 4096, total_tokens=800)
    sections = [[[30, 31, 32, 33]], [[41, 42, 43]], [[33, 34]]]
    expected = sample_answers(place.loaded, place.full, sections, [[90]], max_new_tokens=6, seed=None)
    monkeypatch.setattr(sampling, "rows_at_once", lambda _loaded, _length: 1)
    assert sample_answers(place.loaded, place.full, sections, [[90]], max_new_tokens=6, seed=None) == expected
    again = segments_of(place, 4096, total_tokens=800)
    assert [s.token_ids for s in again[:-1]] == [s.token_ids for s in one[:-1]]  # the last is sampled


def test_equal_seeds_give_equal_segments(places: Callable[..., Place]) -> None:
    place = places("llama")
    first = segments_of(place, 4096, total_tokens=800, rounds=2)
    assert first == segments_of(place, 4096, total_tokens=800, rounds=2)
    assert first != segments_of(place, 4096, total_tokens=800, rounds=2, seed=1)


def test_an_answer_is_cut_where_a_long_run_of_tokens_comes_again() -> None:
    length = self_study.REPEATED_TOKENS
    cycle = list(range(100, 100 + length + 4))
    assert until_repetition([1, 2, 3, *cycle, *cycle, *cycle]) == [1, 2, 3, *cycle]
    assert until_repetition([5] * 100) == [5]  # the window that begins one token later is the same
    short = [*cycle[: length - 1], 1, *cycle[: length - 1], 2]
    assert until_repetition(short) == short  # a shorter run may come again
    assert until_repetition([]) == [] and until_repetition([4]) == [4]
