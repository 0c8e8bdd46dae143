"""Claims about growing token by token: what transformers generates, with shapes that grow and with fixed ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny
from transformers import GenerationConfig

from compactor import stepping
from compactor.attach import AttachedCache, attach_layers
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.errors import CompactorError
from compactor.job import prepare
from compactor.methods import get_method
from compactor.model import LoadedModel, load_model
from compactor.stepping import answer_after, document_layers, greedy, stream
from compactor.study import Study, prefill_document

TEXT = "The tenant shall pay rent on the first day of each month. Clause 7 says that repairs are paid by the tenant. "
PROMPTS = [list(range(80, 105)), [90], [30, 31, 32, 33]]  # the first is longer than a window


@cache
def made(folder: Path, family: str) -> tuple[LoadedModel, AttachedCache]:
    """A model and a compacted document, ragged over heads."""
    loaded = load_model(str(make_tiny(family, folder / family)), device="cpu")
    settings = CompactSettings(keep_ratio=0.3, method="random", reserve=64, certify=False)
    job = prepare(make_document("lease", TEXT * 2), loaded, settings)
    study = Study(job, prefill_document(job))
    compacted = get_method("random")(study, 200)
    return loaded, attach_layers(loaded.model, compacted.layers, compacted.logical_length)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, AttachedCache]:
    return made(tmp_path_factory.getbasetemp(), request.param)


def generated(loaded: LoadedModel, attached: AttachedCache, prompt: list[int], count: int) -> list[int]:
    """What transformers makes of one prompt, alone."""
    attached.forget_tail()
    ids = torch.tensor([prompt])
    config = GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=[], pad_token_id=0
    )
    mask = attached.attention_mask(torch.ones_like(ids))
    out = loaded.model.generate(ids, attention_mask=mask, past_key_values=attached, generation_config=config)
    attached.forget_tail()
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture
def fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU without the capture: steps of fixed shapes, one by one."""
    monkeypatch.setattr(stepping, "can_capture", lambda _loaded: True)
    monkeypatch.setattr(stepping._Batch, "_capture", lambda _self: None)
    monkeypatch.setattr(stepping, "WORTH_CAPTURING", 1)


@pytest.mark.parametrize("path", ["growing", "fixed"])
def test_a_batch_gives_every_prompt_what_transformers_gives_it_alone(
    path: str, place: tuple[LoadedModel, AttachedCache], request: pytest.FixtureRequest
) -> None:
    loaded, attached = place
    if path == "fixed":
        request.getfixturevalue("fixed_shapes")
    answers = answer_after(loaded, attached, PROMPTS, 14, greedy, stop=False)
    assert answers == [generated(loaded, attached, prompt, 14) for prompt in PROMPTS]
    assert attached.document_layers[0].tail_length == 0


def test_fixed_shapes_never_change(
    place: tuple[LoadedModel, AttachedCache], fixed_shapes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, attached = place
    seen: list[tuple[int, ...]] = []
    make = document_layers(attached)

    def recording(padding: torch.Tensor, capacity: int) -> list[stepping.SharedLayer]:
        layers = make(padding, capacity)
        plain = layers[0].attend
        monkeypatch.setattr(
            layers[0], "attend", lambda q, k, v, **kw: seen.append(tuple(k.shape)) or plain(q, k, v, **kw)
        )
        return layers

    list(stream(loaded, recording, attached.logical_length, PROMPTS, 12, greedy))
    assert len(seen) == 12 and len(set(seen[1:])) == 1 and seen[1][2] == 25 + 12


def test_an_answer_ends_at_its_stop_token_and_the_others_go_on(place: tuple[LoadedModel, AttachedCache]) -> None:
    loaded, attached = place
    make: Callable[..., list[stepping.SharedLayer]] = document_layers(attached)
    free = answer_after(loaded, attached, PROMPTS, 10, greedy, stop=False)
    stop = free[0][3]
    for keep in (False, True):
        ended = stepping.answer(loaded, make, attached.logical_length, PROMPTS, 10, greedy, {stop}, keep_stop=keep)
        assert ended == [row[: row.index(stop) + keep] if stop in row else row for row in free]


def test_no_prompt_and_no_token_are_no_error(place: tuple[LoadedModel, AttachedCache]) -> None:
    loaded, attached = place
    assert answer_after(loaded, attached, [], 5, greedy) == []
    assert answer_after(loaded, attached, PROMPTS, 0, greedy) == [[], [], []]


def test_a_model_that_does_not_attend_through_the_layers_is_noticed(place: tuple[LoadedModel, AttachedCache]) -> None:
    loaded, attached = place
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(CompactorError, match="did not attend"):
            answer_after(loaded, attached, PROMPTS, 5, greedy)
    finally:
        loaded.model.set_attn_implementation(before)
