"""Claims about ``compactor bench compact``: stages and parts are a real run's, counted work is what torch does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import Command
from torch.utils.flop_counter import FlopCounterMode

from compactor import job, pipeline, self_study
from compactor import prompt as prompts
from compactor.bench import compacting
from compactor.bench.compacting import MeasuredJob, Run
from compactor.bench.counting import ModelCounts
from compactor.bench.random_model import make_random_model, random_tokens
from compactor.bench.report import Ceilings, Row, Work
from compactor.bench.timing import Stages, Timing
from compactor.bench.workloads import CompactBenchSettings
from compactor.methods import balanced, best, sampled
from compactor.model import LoadedModel
from compactor.prefill import prefill
from compactor.solve import refine
from compactor.types import SilentReporter

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, {"float32": 1e12})
TOKENS = 300
STAGES = {
    "fast": ["prefill", "select", "budget", "fit", "other"],
    "balanced": ["prefill", "ask", "select", "budget", "fit", "other"],
    "best": ["prefill", "ask", "select", "budget", "fit", "other"],
}
SELECT = {
    "balanced": ["exact attention", "single scores"],
    "best": ["exact attention", "Gram matrices", "greedy search"],
}
FIT = {
    "balanced": ["exact attention", "single scores", "biases", "values", "refinement", "outputs"],
    "best": ["exact attention", "biases", "values", "refinement", "outputs"],
}


@contextmanager
def short_steps() -> Iterator[None]:
    """Less self-study and refinement: what is claimed does not depend on how much there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SELF_STUDY_BASE", 24)
        patch.setattr(job, "SELF_STUDY_RATE", 0.02)
        patch.setattr(self_study, "ANSWER_TOKENS", 8)
        patch.setattr(sampled, "SECTION_TOKENS", 24)  # enough sections for a sample
        patch.setattr(balanced, "REFINE_STEPS", 6)
        patch.setattr(best, "REFINE_STEPS", 4)
        patch.setattr(refine, "CPU_ROWS", 512)  # many, in small steps: no head gets worse and is measured twice
        patch.setattr(refine, "FASTEST", 0.01)
        yield


@dataclass
class Measured:
    """A run, what is counted of it, and the operations that torch saw in each stage and part."""

    settings: CompactBenchSettings
    loaded: LoadedModel
    ids: list[int]
    run: Run
    work: dict[str, list[Work]]
    seen: dict[str, float]


@pytest.fixture(scope="module", params=["balanced", "best"])
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    seen: dict[str, float] = {}

    def counting(method: Any) -> Any:
        @contextmanager
        def stage(self: Any, name: str) -> Iterator[None]:
            with FlopCounterMode(display=False) as counter, method(self, name):
                yield
            seen[name] = seen.get(name, 0.0) + counter.get_total_flops()

        return stage

    with short_steps(), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Stages, "stage", counting(Stages.stage))
        patch.setattr(MeasuredJob, "timed", counting(MeasuredJob.timed))
        settings = CompactBenchSettings(shape="tiny", tokens=TOKENS, keep=0.1, method=request.param)
        loaded = make_random_model("tiny", CPU, seed=0, tokens=TOKENS)
        ids = random_tokens(loaded, TOKENS, 0)
        run = compacting.compact_once(settings, loaded, ids, SilentReporter())
        work = compacting.stage_work(settings, loaded, ModelCounts.of(loaded), ids, run)
        yield Measured(settings, loaded, ids, run, work, seen)


def operations(work: list[Work]) -> float:
    return sum(one.operations for one in work)


# ----------------------------------------------------------------------------------------------------- counted work


def test_products_that_are_counted_exactly_are_those_that_torch_does(measured: Measured) -> None:
    names = {"balanced": ["select/single scores", "fit/single scores"], "best": ["select/Gram matrices"]}
    for name in (*names[measured.settings.method], "fit/refinement", "fit/outputs"):
        assert measured.seen[name] == operations(measured.work[name]), name
    for stage in compacting.PASSES:  # what no part does is the model's
        parts = sum(count for name, count in measured.seen.items() if name.startswith(f"{stage}/"))
        rest = operations(measured.work[f"{stage}/{compacting.MODEL}"])
        assert measured.seen[stage] - parts == pytest.approx(rest, rel=0.01), stage


def test_products_on_blocks_are_counted_without_what_nobody_sees(measured: Measured) -> None:
    """Torch multiplies whole blocks of scores, in which rows see their own segment, and candidates beyond the count."""
    for name in ("prefill", "ask", "select/exact attention", "fit/exact attention", "fit/biases", "fit/values"):
        assert 1.0 <= measured.seen[name] / operations(measured.work[name]) < 3.0, name


def test_a_stage_is_the_sum_of_its_parts(measured: Measured) -> None:
    for stage in compacting.PASSES:
        parts = [works for name, works in measured.work.items() if name.startswith(f"{stage}/")]
        assert operations(measured.work[stage]) == pytest.approx(sum(map(operations, parts)))
    assert all(one.precision == "float32" for works in measured.work.values() for one in works)


def test_self_study_reads_all_weights_and_the_document_once_a_step(measured: Measured) -> None:
    run, model = measured.run, measured.loaded.model
    total = TOKENS + len(prompts.build_prompt(measured.loaded.tokenizer).prefix_ids)
    weights = sum(weight.nbytes for weight in model.parameters())
    rounds = {"balanced": 1, "best": 2}[measured.settings.method]
    steps = rounds * (32 + 8)  # of questions and of answers
    assert len(run.asked) == 2 * rounds
    assert all(one.of_sections and not one.of_whole for one in run.asked)
    assert sum(one.bytes for one in measured.work["ask"]) == steps * (weights + total * 2 * 2 * 2 * 16 * 4)


def test_as_many_keys_are_kept_as_compact_would_keep(measured: Measured) -> None:
    assert len(measured.run.kept) == 2 * 2 and sum(measured.run.kept) == round(0.1 * TOKENS * 4)
    selected, fitted = measured.run.passes["select"], measured.run.passes["fit"]
    if measured.settings.method == "best":
        assert selected == fitted
    else:
        assert 0 < sum(selected) < sum(fitted) / 2


# ------------------------------------------------------------------------------------------------ stages and parts


def test_stages_and_parts_add_up_to_the_whole(measured: Measured) -> None:
    run, times = measured.run, measured.run.times()
    stages = STAGES[measured.settings.method]
    assert [name for name in times if "/" not in name] == stages
    assert sum(times[stage] for stage in stages) == pytest.approx(run.elapsed_s)
    for stage, parts in (("select", SELECT[measured.settings.method]), ("fit", FIT[measured.settings.method])):
        own = [name for name in times if name.startswith(f"{stage}/")]
        assert own == [f"{stage}/{part}" for part in [*parts, compacting.MODEL]]
        assert sum(times[name] for name in own) == pytest.approx(times[stage])


def test_functions_are_put_back() -> None:
    found = [
        (owner, function, getattr(owner, function)) for parts in compacting.PARTS.values() for owner, function in parts
    ]
    with pytest.raises(KeyError), compacting.clocked(Stages(CPU), []):
        assert all(getattr(owner, function) is not before for owner, function, before in found)
        raise KeyError
    assert all(getattr(owner, function) is before for owner, function, before in found)


def test_rows_are_compared_with_the_plain_prefill(measured: Measured) -> None:
    plain = Timing(0.5, 0.4, 0.6, 2)
    run = replace(measured.run, elapsed_s=2.0, seconds={"prefill": 0.75, "fit": 1.0}, parts={"fit/values": 0.25})
    rows = compacting.rows_of(measured.settings, measured.loaded, measured.ids, plain, [run, run], {})
    names = [(row.part_of, row.name) for row in rows]
    method = measured.settings.method
    assert names == [
        (None, "plain prefill"), (None, method), (method, "prefill, context scores"), (method, "fit"),
        ("fit", "values"), ("fit", "model"), (method, "other"),
    ]  # fmt: skip
    by_name = {row.name: row for row in rows}
    assert [by_name[name].timing.median_s for name in ("values", "model", "other")] == [0.25, 0.75, 0.25]
    assert by_name[method].figures == {"times_prefill": 4.0, "beyond_prefill": 3.0}
    assert by_name["fit"].figures == {"times_prefill": 2.0} and by_name["values"].figures == {}
    assert by_name["fit"].sizes == {"tokens": TOKENS, "kept": 30, "rows": sum(run.passes["fit"])}
    assert by_name["other"].work == [] and by_name[method].work


def test_weights_and_full_cache_are_those_in_memory(measured: Measured) -> None:
    loaded, prefix = measured.loaded, list(prompts.build_prompt(measured.loaded.tokenizer).prefix_ids)
    full = prefill(loaded, prefix, measured.ids, prefill_chunk=128, head_gains=None, reporter=SilentReporter())
    (plain, *_) = compacting.rows_of(
        measured.settings, loaded, measured.ids, Timing(1.0, 1.0, 1.0, 1), [measured.run], {}
    )
    assert plain.figures["full_kv_bytes"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    assert plain.figures["weights_bytes"] == sum(weight.nbytes for weight in loaded.model.parameters())


def test_the_peak_is_told_beside_weights_and_full_cache(measured: Measured) -> None:
    plain = Timing(1.0, 1.0, 1.0, 1)
    counts = ModelCounts.of(measured.loaded)
    full_kv = counts.kv_bytes * (TOKENS + len(prompts.build_prompt(measured.loaded.tokenizer).prefix_ids))
    peak = counts.all_bytes + 3 * full_kv
    runs = [replace(measured.run, peaks={"prefill": peak - 1, "fit": value}) for value in (peak, peak - 7)]
    rows = compacting.rows_of(
        measured.settings, measured.loaded, measured.ids, plain, runs, {"plain prefill": peak - 2}
    )
    found = {row.name: row.figures for row in rows if "peak_bytes" in row.figures}
    assert {name: figures["peak_bytes"] for name, figures in found.items()} == {
        "plain prefill": peak - 2, measured.settings.method: peak, "prefill, context scores": peak - 1, "fit": peak,
    }  # fmt: skip
    assert found["fit"]["workspace_bytes"] == 2 * full_kv and found["fit"]["peak_in_full_kv"] == 3.0


# ------------------------------------------------------------------------------------------------------ the command


def run_json(invoke: Command, *words: str) -> dict[str, Any]:
    with short_steps():
        done = invoke("bench", "compact", "--tokens", "300", "--keep", "0.1", "--device", "cpu", "--json", *words)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compacting, "measure_ceilings", lambda _: CEILINGS)


def test_json_says_stages_work_and_fractions(invoke: Command) -> None:
    made = run_json(invoke, "--method", "fast", "--repeats", "1", "--quiet")
    assert made["bench"] == "compact"
    assert made["settings"] == {
        "shape": "tiny", "tokens": 300, "keep": 0.1, "repeats": 1, "seed": 0, "method": "fast", "certify": False,
        "workspace": None, "dtype": "float32",
    }  # fmt: skip
    names = [row["name"] for row in made["rows"]]
    parts = ["exact attention", "outputs"]  # nothing is fitted
    stages = ["prefill, context scores", "select", "budget", "fit", *parts, "model", "other"]
    assert names == ["plain prefill", "fast", *stages]
    for row in made["rows"]:
        assert row["runs"] == 1 and row["p10_s"] == row["median_s"] == row["p90_s"]
        if row["operations"]:
            least_s = row["operations"] / 1e12
            assert row["fraction"] == pytest.approx(least_s / row["median_s"])
    whole = {row["name"]: row for row in made["rows"]}
    assert whole["fast"]["operations"] == whole["prefill, context scores"]["operations"] + whole["fit"]["operations"]


def test_the_certificate_is_a_stage_of_its_own(invoke: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "fidelity_report", lambda *_: {"kl_mean": 0.5})
    made = run_json(invoke, "--method", "fast", "--repeats", "1", "--certify", "--quiet")
    names = [row["name"] for row in made["rows"] if row["part_of"] == "fast"]
    assert names == ["prefill, context scores", "select", "budget", "fit", "certify", "other"]


def test_the_table_shows_parts_below_their_stage_and_progress_goes_elsewhere(
    capsys: pytest.CaptureFixture[str], measured: Measured
) -> None:
    from compactor.bench.report import Report
    from compactor.cli.bench import show_report

    plain = Timing(0.5, 0.4, 0.6, 2)
    rows: list[Row] = compacting.rows_of(measured.settings, measured.loaded, measured.ids, plain, [measured.run], {})
    show_report(Report("compact", {}, CEILINGS, {}, rows), json=False)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  fit  ") for line in lines) and any(line.startswith("    values  ") for line in lines)
    assert "tokens 300, kept 30" in lines
