"""Claims about ``compactor bench decode``: three ways with the same answers, bytes of real tensors, right ratios."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Command
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from compactor.attach import attach_layers
from compactor.bench import decoding
from compactor.bench.counting import ModelCounts
from compactor.bench.random_model import make_random_model, random_tokens
from compactor.bench.report import Ceilings
from compactor.bench.synthetic_cache import CacheMaker
from compactor.bench.timing import Timing
from compactor.bench.workloads import DecodeBenchSettings
from compactor.stepping import answer_after, greedy
from compactor.types import SilentReporter

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, {"float32": 1e12})
SETTINGS = DecodeBenchSettings(
    tokens=96, keep=0.125, spread=3.0, batch=2, question=5, new_tokens=16, repeats=2, shape="tiny"
)


@pytest.fixture(scope="module")
def whole() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "measure_ceilings", lambda _: CEILINGS)
        yield json.loads(json.dumps(decoding.bench_decode(SETTINGS, CPU, SilentReporter()).to_json()))


def test_there_is_a_row_for_every_way_and_batch_size(whole: dict[str, Any]) -> None:
    ways = (decoding.COMPACTED, decoding.FULL, decoding.GENERATE)
    assert [(row["sizes"]["batch"], row["name"]) for row in whole["rows"]] == [
        (batch, way) for batch in (1, 2) for way in ways
    ]
    for row in whole["rows"]:
        assert row["sizes"] == {"tokens": 96, "new_tokens": 16, "batch": row["sizes"]["batch"]}
        assert 0.0 < row["p10_s"] <= row["median_s"] <= row["p90_s"] and row["runs"] == 2
    assert whole["settings"]["dtype"] == "float32" and whole["settings"]["shape"] == "tiny"


def test_bytes_and_operations_are_those_of_the_tensors_that_a_step_reads(whole: dict[str, Any]) -> None:
    model = make_random_model("tiny", CPU, seed=0, tokens=96).model
    weights = sum(weight.nbytes for weight in model.parameters())  # the embedding makes the logits too
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2 and "layers" in name)
    kept = 6 + 18  # of a layer: 12 of 96 on average, the second head three times the first
    for row in whole["rows"]:
        batch, way, figures = row["sizes"]["batch"], row["name"], row["figures"]
        cache = 2 * kept * (2 * 16 * 4 + 4) if way == decoding.COMPACTED else 2 * 2 * 96 * 2 * 16 * 4
        copies = batch if way == decoding.GENERATE else 1
        assert (figures["weights_bytes"], figures["cache_bytes"]) == (weights, copies * cache)
        assert row["bytes"] == weights + copies * cache
        keys = kept / 2 if way == decoding.COMPACTED else 96
        assert row["operations"] == batch * (2 * (matrices + 1024 * 64) + 4 * 2 * 4 * 16 * keys)
        assert row["fraction"] == pytest.approx(row["bytes"] / 1e9 / row["median_s"])


def test_rates_follow_from_times_and_are_compared_at_one_batch_size(whole: dict[str, Any]) -> None:
    rates = {(row["name"], row["sizes"]["batch"]): row["figures"]["tokens_per_s"] for row in whole["rows"]}
    for row in whole["rows"]:
        batch, way, figures = row["sizes"]["batch"], row["name"], row["figures"]
        rate = batch / row["median_s"]
        assert figures["tokens_per_s"] == pytest.approx(rate)
        assert figures["times_full"] == pytest.approx(rate / rates[decoding.FULL, batch])
        assert figures["times_generate"] == pytest.approx(rate / rates[decoding.GENERATE, batch])
        assert figures["times_alone"] == pytest.approx(rate / rates[way, 1])
        assert figures["weight_bound_per_s"] == pytest.approx(batch * 1e9 / figures["weights_bytes"])
        assert figures["of_weight_bound"] == pytest.approx(rate / figures["weight_bound_per_s"])
        assert figures["first_token_s"] > 0.0 and figures["whole_tokens_per_s"] > 0.0


def test_the_first_tokens_take_no_part_in_the_rate() -> None:
    slow = [10.0 + step for step in range(decoding.SETTLED)]
    steady = [100.0 + 0.25 * step for step in range(10)]
    seen = decoding.Answered("way", 3, [[*slow, *steady]], 0, 0.0)
    assert seen.step == Timing(pytest.approx(0.25), pytest.approx(0.25), pytest.approx(0.25), 1)
    counts = ModelCounts(1, 1, 1, 1, 0, 500, 0, int(1e8), int(1e8))
    (row,) = decoding.rows_of([seen], counts, SETTINGS, "float32", CEILINGS)
    assert row.figures["first_token_s"] == 10.0
    assert row.figures["whole_tokens_per_s"] == pytest.approx(3 * 16 / 102.25)
    assert "times_full" not in row.figures and "times_alone" not in row.figures


@torch.no_grad()
def test_generate_over_the_synthetic_cache_gives_the_tokens_of_our_loop() -> None:
    loaded = make_random_model("tiny", CPU, seed=3, tokens=80)
    maker = CacheMaker(40, 0, 16, torch.float32, CPU, seed=1)
    full = [maker.full(2) for _ in range(2)]
    prompts = [random_tokens(loaded, 6, 0), random_tokens(loaded, 6, 1)]
    ours = answer_after(loaded, attach_layers(loaded.model, full, 40), prompts, 12, greedy, stop=False)
    loaded.model.set_attn_implementation("sdpa")
    ids = torch.tensor(prompts)
    before = [layer.keys.clone() for layer in full]
    made = loaded.model.generate(
        ids,
        attention_mask=ids.new_ones(2, 46),
        past_key_values=Cache(layers=[decoding.grown_layer(layer, 2) for layer in full]),
        generation_config=GenerationConfig(
            max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0
        ),
    )
    assert made[:, 6:].tolist() == ours
    assert all(torch.equal(layer.keys, kept) for layer, kept in zip(full, before, strict=True))


class Notes(SilentReporter):
    """Remembers what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, message: str) -> None:
        self.told.append(message)


def test_generate_is_left_out_where_its_copies_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "measure_ceilings", lambda _: CEILINGS)
    monkeypatch.setattr(decoding, "free_bytes", lambda _: 2 * 2 * 96 * 2 * 16 * 4)  # one copy
    notes = Notes()
    rows = decoding.bench_decode(SETTINGS, CPU, notes).rows
    assert [row.sizes["batch"] for row in rows if row.name == decoding.GENERATE] == [1]
    (told,) = notes.told
    assert told.startswith("generate, full cache at batch 2 is left out: it copies the document for every sequence")
    assert [row.figures.get("times_generate") is None for row in rows if row.sizes["batch"] == 2] == [True, True]


def test_a_spread_that_cannot_be_is_refused_before_a_model_is_made(invoke: Command) -> None:
    done = invoke("bench", "decode", "--shape", "tiny", "--tokens", "96", "--keep", "0.9", "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: With --spread 20 the longest head would keep") and done.stderr.count("\n") == 1
    )


def test_the_table_is_the_answer_and_progress_is_not(invoke: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "measure_ceilings", lambda _: CEILINGS)
    sizes = ("--tokens", "96", "--keep", "0.1", "--batch", "1", "--new-tokens", "16", "--repeats", "1")
    done = invoke("bench", "decode", *sizes, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "tokens 96, new tokens 16, batch 1" in done.stdout
    for way in (decoding.COMPACTED, decoding.FULL, decoding.GENERATE):
        assert sum(line.startswith(f"{way}  ") for line in done.stdout.splitlines()) == 2
    assert "compacted cache, 1 (2 runs) ..." in done.stderr and "..." not in done.stdout
