"""Claims about the trial of kernels: good ones pass, and whatever is wrong with one is told once and not used."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from compactor import attention, kernel_trial
from compactor.kernel_trial import TRIALS, failure, passes, usable

CPU = torch.device("cpu")
INTERPRETED = """
import torch
from compactor.kernel_trial import TRIALS, failure
for name in TRIALS:
    for dtype in (torch.float32, torch.float16):
        reason = failure(name, torch.device("cpu"), dtype, 32)
        assert reason is None, (name, dtype, reason)
print(len(TRIALS))
"""


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    passes.cache_clear()
    yield
    passes.cache_clear()


def test_every_kernel_passes_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(len(TRIALS)) == "16"


@pytest.mark.parametrize("wrong", ["raises", "differs", "nan"])
def test_a_kernel_that_fails_is_told_once_and_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(device: torch.device, dtype: torch.dtype, head_dim: int) -> kernel_trial.Pairs:
        one = torch.ones(3)
        if wrong == "raises":
            raise RuntimeError("out of shared memory\nand more lines")
        return [(one, one), (one * (1.5 if wrong == "differs" else torch.nan), one)]

    monkeypatch.setitem(TRIALS, "biased_decode", trial)
    with pytest.warns(RuntimeWarning, match="biased_decode is not used on cpu: .*PyTorch takes its place") as told:
        assert not passes("biased_decode", CPU, torch.float32, 64)
    assert len(told) == 1 and "and more lines" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not passes("biased_decode", CPU, torch.float32, 64)


def test_rounding_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(3)
    monkeypatch.setitem(TRIALS, "biased_decode", lambda *_: [(one * 1.01, one)])
    assert failure("biased_decode", CPU, torch.float16, 64) is None


def test_no_kernel_is_tried_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRIALS, "biased_decode", lambda *_: pytest.fail("tried"))
    assert not attention.kernel_usable("biased_decode", torch.zeros(1, 2, 3, 64))
    assert not usable("biased_decode", CPU, torch.bfloat16, 64)
    monkeypatch.setattr(kernel_trial, "kernel_available", lambda device: False)
    assert not usable("biased_decode", torch.device("cuda"), torch.bfloat16, 64)


@pytest.mark.parametrize("agrees", [True, False])
def test_a_kernel_is_usable_where_it_runs_and_passes(agrees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trial, "kernel_available", lambda device: True)
    monkeypatch.setattr(kernel_trial, "passes", lambda *given: agrees and given == ("gram", gpu, torch.half, 64))
    gpu = torch.device("cuda")
    assert usable("gram", gpu, torch.half, 64) == agrees


@pytest.mark.parametrize(
    ("hip", "capability", "answer", "told"),
    [
        ("6.0", (9, 0), 1.0, attention.BEFORE_HOPPER),
        (None, (8, 0), 1.0, attention.BEFORE_HOPPER),
        (None, (9, 0), 1.0, None),
        (None, (9, 0), 1.5, "it disagrees with FlashAttention-2"),
        (None, (9, 0), torch.nan, "it disagrees with FlashAttention-2"),
        (None, (9, 0), RuntimeError("no  plan\nfor this"), "no plan for this"),
        (None, (9, 0), TypeError(), "TypeError"),
    ],
)
def test_cudnns_attention_is_not_used_for_a_reason(
    hip: str | None,
    capability: tuple[int, int],
    answer: float | Exception,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_cudnn(*_: object) -> tuple[torch.Tensor, ...]:
        if isinstance(answer, Exception):
            raise answer
        return torch.full((3,), answer), torch.ones(3)

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_by_cudnn", by_cudnn)
    monkeypatch.setattr(attention, "_by_flash", lambda *_, **__: (torch.ones(3), torch.ones(3)))
    assert attention.cudnn_failure(CPU, torch.bfloat16, 64) == told
