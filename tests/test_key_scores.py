"""Claims about single scores: sums over real rows against float64, and the order that they give."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_tiny

from compactor import attention
from compactor.attach import dense_heads
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.job import prepare
from compactor.model import load_model
from compactor.packed import Packed, exact_rows
from compactor.solve.key_scores import KeySums, ScoreLayer
from compactor.study import Study, ask, prefill_document, scored_selection, source_weights
from compactor.types import Advance, LayerCache, Segment

TEXT = "The tenant shall pay rent on the first day of each month. Clause 7 says that repairs are paid by the tenant. "


@pytest.fixture(scope="module")
def lease(tmp_path_factory: pytest.TempPathFactory) -> Study:
    loaded = load_model(str(make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_layers=2)), device="cpu")
    settings = CompactSettings(
        keep_ratio=0.2, queries=("repeat",), cache_dtype="float32", reserve=64, certify=False, chunk=16
    )
    job = prepare(make_document("lease", TEXT * 2), loaded, settings)
    return Study(job, prefill_document(job))


class Oracle(ScoreLayer):
    """Beside its work, recomputes the score of every key in float64 from the whole attention matrix."""

    found: list[torch.Tensor]

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        num_kv_heads, group = keys.shape[0], queries.shape[0] // keys.shape[0]
        document, document_values = (part[0, :, self.prefix_length :].double() for part in dense_heads(self.full))
        exact = exact_rows(self, queries, keys, values, scaling, self.prefix_length)
        scores = scaling * torch.einsum(
            "hgrd,hkd->hgrk", queries.view(num_kv_heads, group, -1, queries.shape[-1]).double(), document
        )
        shares = (scores - exact.lse.double().unsqueeze(-1)).exp()
        gains = self.head_gains.view(num_kv_heads, -1, 1).double()
        weights = gains.square() * self.packed.row_weights(self.source_weights, queries.device).double()
        mass = shares.sum(-1)
        out = (shares / mass.unsqueeze(-1)) @ document_values.unsqueeze(1)
        by_mass = weights * mass.square()
        centre = torch.einsum("hgr,hgrd->hd", by_mass, out) / by_mass.sum((1, 2)).unsqueeze(-1)
        contrast = (weights * mass * (out - exact.out).square().sum(-1)).sum((1, 2)) / (weights * mass).sum((1, 2))
        distances = (document_values - centre.unsqueeze(1)).square().sum(-1)
        squares = torch.einsum("hgr,hgrk->hk", weights, shares.square())
        self.found.append(squares * (distances + contrast.unsqueeze(-1)))
        return super().attend_packed(queries, keys, values, scaling)


@pytest.mark.parametrize("block", [1 << 21, 4000])
def test_scores_equal_float64_over_all_rows(lease: Study, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(attention, "CPU_BLOCK_ELEMENTS", block)
    full, loaded = lease.full, lease.job.loaded
    sums = {i: KeySums.empty(loaded.num_kv_heads, len(lease.job.document_ids), full.layers[i].keys.shape[-1],
                             torch.device("cpu")) for i in full.full_layers}  # fmt: skip
    found: list[torch.Tensor] = []
    weights = {"repeat": 1.0, "self-study": 3.0}
    segments = [Segment(tuple(range(40, 40 + n)), s) for n, s in ((21, "repeat"), (9, "self-study"), (1, "repeat"))]

    def make(i: int, layer: LayerCache, packed: Packed, advance: Advance) -> Oracle:
        made = Oracle(
            layer,
            packed,
            full.logical_length,
            advance,
            prefix_length=full.prefix_length,
            head_gains=lease.job.head_gains[i],
            source_weights=weights,
            sums=lambda dim, device: sums[i],
        )
        made.found = found
        return made

    lease.run_layers(segments, "test", make)
    assert len(found) == len(full.full_layers)
    for i, oracle in zip(full.full_layers, found, strict=True):
        got = sums[i].scores(full.layers[i], full.prefix_length)
        torch.testing.assert_close(got.double(), oracle, rtol=2e-3, atol=1e-6 * float(oracle.max()))


def test_order_is_that_of_the_scores_and_one_batch_of_rows_is_as_good_as_many(
    lease: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = ask(lease.job, lease.full)
    weights = source_weights(lease.job, segments)
    whole = scored_selection(lease, segments, weights)
    assert (whole.gains.diff(dim=-1) <= 0).all()
    assert all(sorted(head) == list(range(len(lease.job.document_ids))) for head in whole.order.flatten(0, 1).tolist())
    monkeypatch.setattr("compactor.study.GRAM_ROWS", 20)
    pieces = scored_selection(lease, segments, weights)
    torch.testing.assert_close(pieces.gains, whole.gains, rtol=1e-4, atol=1e-9)


def test_context_scores_are_added_in_the_same_currency(lease: Study) -> None:
    full = lease.full
    sums = KeySums.empty(2, 5, 4, torch.device("cpu"))
    layer = full.layers[0]
    prefix, document = full.prefix_length, len(lease.job.document_ids)
    squares = torch.rand(lease.job.loaded.num_kv_heads, document)
    sums = KeySums.empty(lease.job.loaded.num_kv_heads, document, layer.keys.shape[-1], torch.device("cpu"))
    sums.squares += squares
    doubled = sums.scores(layer, prefix, more_squares=squares)
    torch.testing.assert_close(doubled, 2.0 * sums.scores(layer, prefix))
