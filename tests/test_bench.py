"""Claims about the base of the benchmarks: timings, ceilings, fractions, what is said of the machine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import compactor
from compactor.bench import machine, timing
from compactor.bench.report import Ceilings, Report, Row, Work
from compactor.bench.timing import Stages, Timing, measure, measure_small, timed
from compactor.cli import bench as cli

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_bytes_per_s=2e12, operations_per_s={"bfloat16": 8e14, "float32": 5e13})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still; the function that is returned moves it on."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def wait(elapsed_s: float) -> None:
        now[0] += elapsed_s

    return wait


# ------------------------------------------------------------------------------------------------------ timings


@pytest.mark.parametrize("count", [1, 2, 3, 10, 31])
def test_median_and_spread_are_those_of_numpy(count: int) -> None:
    times_s = np.random.default_rng(count).exponential(size=count)
    made = Timing.of(times_s.tolist())
    np.testing.assert_allclose(
        (made.median_s, made.p10_s, made.p90_s), (np.median(times_s), *np.percentile(times_s, [10, 90]))
    )
    assert made.runs == count


def test_warm_up_is_not_timed(clock: Callable[[float], None]) -> None:
    lengths = iter([50.0, 20.0, 1.0, 2.0, 3.0])
    made = measure(lambda: clock(next(lengths)), CPU, repeats=3, warmup=2)
    assert (made.median_s, made.runs) == (pytest.approx(2.0), 3)


def test_long_work_is_repeated_less_often_but_twice(clock: Callable[[float], None]) -> None:
    for seconds, runs in ((0.25, 4), (0.9, 2), (5.0, 2), (0.01, 10)):
        assert measure(lambda: clock(seconds), CPU, repeats=10, longest_s=1.0).runs == runs  # noqa: B023


def test_small_calls_are_timed_together_and_divided(clock: Callable[[float], None]) -> None:
    made = measure_small([lambda: clock(1.0), lambda: clock(3.0)], CPU, repeats=4)
    assert made == Timing(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0), 4)


def test_timed_returns_the_result_and_its_seconds(clock: Callable[[float], None]) -> None:
    def work() -> str:
        clock(7.0)
        return "done"

    assert timed(work, CPU) == ("done", pytest.approx(7.0))


def test_stages_add_up_by_name_and_leave_out_what_is_between(clock: Callable[[float], None]) -> None:
    stages = Stages(CPU)
    for elapsed_s in (1.0, 2.0):
        with stages.stage("gram"):
            clock(elapsed_s)
        clock(1000.0)
        with stages.stage("greedy"):
            clock(10 * elapsed_s)
    assert stages.seconds == {"gram": pytest.approx(3.0), "greedy": pytest.approx(30.0)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_graph_replay_and_events_agree_on_work_that_is_longer_than_its_launch() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    by_events = measure(lambda: target.copy_(source), device)
    by_replay = measure_small([lambda: target.copy_(source)] * 3, device)
    assert by_replay.median_s == pytest.approx(by_events.median_s, rel=0.3)


# --------------------------------------------------------------------------------------------- ceilings, fractions


def test_the_ceiling_that_binds_is_the_slower_one() -> None:
    assert Work(operations=8e14, precision="bfloat16", bytes=1e12).least_s(CEILINGS) == pytest.approx(1.0)
    assert Work(operations=1e14, precision="bfloat16", bytes=1e12).least_s(CEILINGS) == pytest.approx(0.5)
    assert Work(operations=1e14).least_s(CEILINGS) == pytest.approx(2.0)


def test_the_fraction_of_several_works_is_that_of_their_sum() -> None:
    work = [Work(operations=8e14, precision="bfloat16"), Work(bytes=6e12)]
    assert Row("both", Timing(8.0, 7.0, 9.0, 5), work=work).fraction(CEILINGS) == pytest.approx(0.5)
    assert Row("not counted", Timing(8.0, 7.0, 9.0, 5)).fraction(CEILINGS) is None


def test_ceilings_are_bytes_read_and_written_and_two_operations_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def half_a_second(run: Callable[[], object], device: torch.device) -> Timing:
        calls.append(run())
        return Timing(0.5, 0.5, 0.5, 1)

    monkeypatch.setattr(machine, "measure", half_a_second)
    assert machine.copy_bandwidth(CPU, 1000) == pytest.approx(4000.0)
    assert machine.matrix_rate(CPU, torch.float32, 30) == pytest.approx(2 * 30**3 / 0.5)
    copied, product = calls
    assert isinstance(copied, torch.Tensor) and copied.nbytes == 1000
    assert isinstance(product, torch.Tensor) and product.shape == (30, 30)


def test_float32_products_are_as_exact_after_the_measurement_as_before() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), machine.float32_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


# ---------------------------------------------------------------------------------------------------- the machine


def test_the_machine_names_device_versions_and_commit() -> None:
    found = machine.describe_machine(CPU)
    assert list(found) == ["device", "threads", "python", "torch", "triton", "transformers", "compactor", "commit"]
    assert found["compactor"] == compactor.__version__
    assert str(found["torch"]) == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"]


def test_what_is_not_installed_has_no_version() -> None:
    assert machine.installed_version("no-such-package-at-all") is None


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True)
    yield tmp_path


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(checkout: Path) -> None:
    words = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
    commit = machine.git_commit(checkout)
    assert commit is not None and len(commit) >= 12 and head.startswith(commit)
    (checkout / "new").write_text("untracked files are no change")
    assert machine.git_commit(checkout) == commit
    (checkout / "file").write_text("two")
    assert machine.git_commit(checkout) == f"{commit}+"


def test_a_package_outside_a_checkout_has_no_commit(checkout: Path) -> None:
    """Also where a folder above it is somebody's checkout."""
    (checkout / "site-packages").mkdir()
    assert machine.git_commit(checkout / "site-packages") is None


# --------------------------------------------------------------------------------------------------- what is shown


def report() -> Report:
    rows = [
        Row(
            "first", Timing(2e-6, 1e-6, 3e-6, 9), {"batch": 1, "keys": 5}, [Work(4e8, "bfloat16", 1e6)], {"error": 0.5}
        ),
        Row("part", Timing(1e-3, 1e-3, 2e-3, 9), {"batch": 8, "keys": 5}, part_of="first"),
    ]
    return Report("kernels", {"device": "a GPU", "triton": None}, CEILINGS, {"seed": 3}, rows)


def test_json_says_everything_in_seconds_bytes_and_fractions() -> None:
    made = report().to_json()
    assert {**made, "rows": None} == {
        "bench": "kernels",
        "machine": {"device": "a GPU", "triton": None},
        "ceilings": {"copy_bytes_per_s": 2e12, "operations_per_s": {"bfloat16": 8e14, "float32": 5e13}},
        "settings": {"seed": 3},
        "rows": None,
    }
    first, part = made["rows"]
    assert first == {
        "name": "first",
        "part_of": None,
        "sizes": {"batch": 1, "keys": 5},
        "median_s": 2e-6,
        "p10_s": 1e-6,
        "p90_s": 3e-6,
        "runs": 9,
        "operations": 4e8,
        "bytes": 1e6,
        "fraction": pytest.approx(0.25),
        "figures": {"error": 0.5},
    }
    assert (part["part_of"], part["operations"], part["bytes"], part["fraction"]) == ("first", None, None, None)


def test_the_table_goes_to_standard_output_with_what_rows_share_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    cli.show_report(report(), json=False)
    out, err = capsys.readouterr()
    assert err == ""
    head, ceilings, sizes, *tables = out.splitlines()
    assert head == "device a GPU"
    assert ceilings == "copy 2,000 GB/s, bfloat16 800 TFLOP/s, float32 50 TFLOP/s"
    assert sizes == "keys 5"
    first, part = (" ".join(line.split()) for line in tables[2:4])
    assert first == "first batch 1 2.00 us 1.00 us .. 3.00 us 400 M 1.0 MB 25.0%"
    assert part == "part batch 8 1.00 ms 1.00 ms .. 2.00 ms - - -"
    assert [line.split() for line in tables[5:]] == [["error"], ["first", "0.5"]]


@pytest.mark.parametrize(
    ("elapsed_s", "shown"),
    [(8.04e-6, "8.04 us"), (0.00099949, "999 us"), (0.0123, "12.3 ms"), (0.9996, "1.00 s"), (2512.0, "2,512 s")],
)
def test_times_have_three_digits(elapsed_s: float, shown: str) -> None:
    assert cli.show_time(elapsed_s) == shown


@pytest.mark.parametrize(("count", "shown"), [(12.0, "12.0"), (9.7e11, "970 G"), (1.2e15, "1,200 T"), (1e6, "1.00 M")])
def test_operations_have_decimal_units(count: float, shown: str) -> None:
    assert cli.show_operations(count) == shown
