"""Claims about the statistics of the greedy search: exact attention of packed rows, chunk Gram matrices, and curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from compactor import attention, packed, study
from compactor.attach import dense_heads
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.job import prepare
from compactor.model import LoadedModel, load_model
from compactor.packed import ExactRows, Packed, PackedLayer, exact_rows, pack
from compactor.prefill import dense_layer
from compactor.solve import gram
from compactor.solve.chunk_grams import ChunkGrams, GramLayer, add_diagonal, add_rows
from compactor.solve.select import chunk_targets, greedy_curves
from compactor.study import GramPass, Study, greedy_selection, prefill_document
from compactor.types import LayerCache, Segment

TEXT = "The tenant shall pay rent on the first day of each month. Clause 7 says that repairs are paid by the tenant. "
WEIGHTS = {"context": 0.5, "repeat": 1.0, "self-study": 3.0}
CHUNK = 19
SEGMENTS = [
    Segment(tuple(range(40, 40 + length)), source)
    for length, source in ((11, "repeat"), (1, "self-study"), (26, "self-study"), (5, "repeat"), (14, "repeat"))
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_layers=2)), device="cpu")


@pytest.fixture(scope="module")
def lease(tiny: LoadedModel) -> Study:
    """A document whose length is no multiple of its number of chunks; queries of GQA groups of two heads."""
    settings = CompactSettings(keep_ratio=0.2, cache_dtype="float32", reserve=64, certify=False)
    job = prepare(make_document("lease", TEXT * 2), tiny, settings)
    made = Study(job, prefill_document(job))
    assert len(job.document_ids) % -(-len(job.document_ids) // CHUNK)
    return made


@dataclass
class Seen:
    """What one layer of a real pass was given."""

    queries: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    packs: list[Packed] = field(default_factory=list)
    scaling: float = 0.0


@dataclass(frozen=True)
class Oracle:
    """One layer's rows in float64, segment by segment."""

    shares: torch.Tensor  # (num_kv_heads, all rows of the group, num_document): attention with the true denominator
    weights: torch.Tensor  # (num_kv_heads, all rows of the group)
    document: torch.Tensor  # (num_kv_heads, rows, head_dim): output of the document alone
    out: torch.Tensor


def oracle(made: Study, layer_idx: int, seen: Seen) -> Oracle:
    """Softmax over prefix, document and own segment, row by row of blocks of one segment each."""
    full, prefix = made.full, made.full.prefix_length
    all_keys, all_values = (part[0].double() for part in dense_heads(full.layers[layer_idx]))
    num_kv_heads, total, _ = all_keys.shape
    gains = made.job.head_gains[layer_idx].double()
    shares, weights, document, out = ([[] for _ in range(num_kv_heads)] for _ in range(4))  # type: ignore[var-annotated]
    for batch, pack_ in enumerate(seen.packs):
        for (first, last), source in zip(pack_.bounds, pack_.sources, strict=True):
            for query_head, queries in enumerate(seen.queries[batch].double()):
                head = query_head // (len(seen.queries[batch]) // num_kv_heads)
                keys = torch.cat([all_keys[head], seen.keys[batch][head, first:last].double()])
                values = torch.cat([all_values[head], seen.values[batch][head, first:last].double()])
                scores = seen.scaling * queries[first:last] @ keys.T
                future = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
                scores[:, total:].masked_fill_(future, -torch.inf)
                probs = scores.softmax(-1)
                own = probs[:, prefix:total]
                shares[head].append(own)
                weights[head].append((WEIGHTS[source] * gains[query_head] ** 2).expand(last - first))
                document[head].append(own @ values[prefix:total] / own.sum(-1, keepdim=True))
                out[head].append(probs @ values)
    return Oracle(*(torch.stack([torch.cat(head) for head in part]) for part in (shares, weights, document, out)))


def watch(made: Study, monkeypatch: pytest.MonkeyPatch) -> dict[int, Seen]:
    """Record what every Gram layer is given, whichever pass it belongs to."""
    seen: dict[int, Seen] = {}
    plain = GramLayer.attend_packed

    def recorded(self: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> Any:
        index = next(i for i, layer in enumerate(made.full.layers) if layer is self.full)
        if self.begin is not None:
            mine = seen.setdefault(index, Seen())
            mine.queries.append(queries.clone())
            mine.keys.append(keys.clone())
            mine.values.append(values.clone())
            mine.packs.append(self.packed)
            mine.scaling = scaling
        return plain(self, queries, keys, values, scaling)

    monkeypatch.setattr(GramLayer, "attend_packed", recorded)
    return seen


def keep_sums(monkeypatch: pytest.MonkeyPatch) -> dict[int, ChunkGrams]:
    """Keep every layer's finished sums, with no diagonal added."""
    kept: dict[int, ChunkGrams] = {}
    plain = GramPass.done

    def done(self: GramPass, i: int) -> None:
        if self.last:
            sums = self.sums[i]
            kept[i] = ChunkGrams(sums.gram.clone(), sums.contrast.clone(), sums.mass.clone())
        plain(self, i)

    monkeypatch.setattr(GramPass, "done", done)
    return kept


def assert_equals_oracle(sums: ChunkGrams, expected: Oracle) -> None:
    num_document = expected.shares.shape[-1]
    num_kv_heads, num_chunks, size, _ = sums.gram.shape
    assert num_chunks == -(-num_document // CHUNK) and size <= CHUNK
    weighted = expected.shares * expected.weights.sqrt().unsqueeze(-1)
    for head in range(num_kv_heads):
        for chunk in range(num_chunks):
            columns = weighted[head][:, chunk * size : (chunk + 1) * size]
            own = columns.shape[1]
            made = sums.gram[head, chunk].double()
            whole = columns.T @ columns
            torch.testing.assert_close(made[:own, :own], whole, rtol=2e-4, atol=1e-6 * float(whole.max()))
            assert not made[own:].any() and not made[:, own:].any()
    mass = expected.weights * expected.shares.sum(-1)
    contrast = (mass * (expected.document - expected.out).square().sum(-1)).sum(-1)
    torch.testing.assert_close(sums.mass.double(), mass.sum(-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(sums.contrast.double(), contrast, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------- Gram matrices


@pytest.mark.parametrize("batches", ["one pass", "several batches", "several batches, a layer at a time", "cut rows"])
def test_gram_matrices_of_a_real_pass_are_those_of_the_true_attention(
    batches: str, lease: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "GREEDY_CHUNK", CHUNK)
    if "several" in batches:
        monkeypatch.setattr(study, "GRAM_ROWS", 20)
    if "layer" in batches:
        monkeypatch.setattr(study, "GRAM_BYTES", 1)
    if batches == "cut rows":
        monkeypatch.setattr(attention, "CPU_BLOCK_ELEMENTS", 700)
    seen, kept = watch(lease, monkeypatch), keep_sums(monkeypatch)
    selection = greedy_selection(lease, SEGMENTS, WEIGHTS, CHUNK)
    assert sorted(kept) == sorted(seen) == [0, 1]
    for index, sums in kept.items():
        assert len(seen[index].packs) == (3 if "several" in batches else 1)
        assert_equals_oracle(sums, oracle(lease, index, seen[index]))
    num_document = len(lease.job.document_ids)
    assert torch.equal(selection.order.sort(-1).values, torch.arange(num_document).expand_as(selection.order))


def test_batches_and_blocks_give_the_selection_of_one_pass(lease: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "GREEDY_CHUNK", CHUNK)
    one = greedy_selection(lease, SEGMENTS, WEIGHTS, CHUNK)
    monkeypatch.setattr(study, "GRAM_ROWS", 20)
    monkeypatch.setattr(study, "GRAM_BYTES", 1)
    several = greedy_selection(lease, SEGMENTS, WEIGHTS, CHUNK)
    torch.testing.assert_close(one.gains, several.gains, rtol=1e-3, atol=1e-6 * float(one.gains.max()))
    assert (one.order[..., :20] == several.order[..., :20]).float().mean() > 0.9  # but for near-ties
    assert (one.gains.diff(dim=-1) <= 0).all() and (one.gains >= 0).all()


def test_the_diagonal_gets_a_share_of_itself_and_the_scores() -> None:
    sums = ChunkGrams.empty(2, 7, 3, torch.device("cpu"))
    assert sums.gram.shape == (2, 3, 3, 3)
    sums.gram[:] = torch.rand(sums.gram.shape, generator=torch.Generator().manual_seed(0))
    before, scores = sums.gram.clone(), torch.rand(2, 7, generator=torch.Generator().manual_seed(1))
    add_diagonal(sums, 0.5, scores)
    for head in range(2):
        for key in range(9):
            chunk, place = divmod(key, 3)
            own = 1.5 * before[head, chunk, place, place] + (scores[head, key] if key < 7 else 0.0)
            assert float(sums.gram[head, chunk, place, place]) == pytest.approx(float(own))
    before.diagonal(dim1=2, dim2=3).zero_()
    sums.gram.diagonal(dim1=2, dim2=3).zero_()
    assert torch.equal(sums.gram, before)


@pytest.mark.parametrize("num_document", [1, 5, 512, 513, 1025, 4000])
def test_chunks_cover_the_document_and_none_is_all_padding(num_document: int) -> None:
    for chunk in (1, 2, 7, 512):
        _, num_chunks, size, _ = ChunkGrams.empty(1, num_document, chunk, torch.device("meta")).gram.shape
        assert size <= chunk and (num_chunks - 1) * size < num_document <= num_chunks * size


# ------------------------------------------------------------------------------------------- curves


def sums_of(shares: torch.Tensor, num_document: int, chunk: int) -> ChunkGrams:
    """Sums of rows of attention, (num_kv_heads, rows, num_document), with made-up contrast."""
    sums = ChunkGrams.empty(len(shares), num_document, chunk, torch.device("cpu"))
    _, num_chunks, size, _ = sums.gram.shape
    for c in range(num_chunks):
        part = shares[:, :, c * size : (c + 1) * size]
        sums.gram[:, c, : part.shape[2], : part.shape[2]] = part.mT @ part
    sums.mass += shares.sum((1, 2))
    sums.contrast += 2.5 * shares.sum((1, 2)) * torch.arange(1, len(shares) + 1)
    return sums


def random_sums(num_document: int, chunk: int, seed: int) -> tuple[torch.Tensor, ChunkGrams, LayerCache]:
    generator = torch.Generator().manual_seed(seed)
    shares = 0.7 * torch.randn(2, 90, num_document, generator=generator).mul(2).softmax(-1)
    keys, values = torch.randn(2, 2, 4 + num_document, 6, generator=generator)
    return shares, sums_of(shares, num_document, chunk), dense_layer(keys, values + 3.0, first_position=0)


def test_targets_are_the_mass_and_the_centred_values() -> None:
    shares, sums, layer = random_sums(23, 9, 0)
    targets = chunk_targets(sums, layer, 4).view(2, 3, 8, 7)
    values = dense_heads(layer)[1][0, :, 4:]
    for head in range(2):
        # the mean output, each row weighted by its own attention mass within the chunk
        total, mass = torch.zeros(6), torch.zeros(())
        for c in range(3):
            part = shares[head][:, c * 8 : (c + 1) * 8]
            own = part.sum(-1)
            total += (own.unsqueeze(-1) * (part @ values[head, c * 8 : (c + 1) * 8])).sum(0)
            mass += own.square().sum()
        mean = total / mass
        weight = (float(sums.contrast[head]) / float(sums.mass[head])) ** 0.5
        assert weight == pytest.approx((2.5 * (head + 1)) ** 0.5)
        torch.testing.assert_close(targets[head, ..., 0], torch.full((3, 8), weight))
        flat = targets[head, ..., 1:].flatten(0, 1)
        torch.testing.assert_close(flat[:23], values[head] - mean, atol=1e-5, rtol=1e-4)


def test_the_mass_never_loses_all_its_weight_and_a_blind_head_is_no_error() -> None:
    _, sums, layer = random_sums(23, 9, 0)
    sums.contrast.zero_()
    targets = chunk_targets(sums, layer, 4)
    values = dense_heads(layer)[1][0, :, 4:]
    for head in range(2):
        centred = targets.view(2, 24, 7)[head, :23, 1:]
        floor = (1e-2 * centred.square().sum(-1).mean()).sqrt()
        torch.testing.assert_close(targets.view(2, 24, 7)[head, :, 0], floor.expand(24))
    blind = ChunkGrams.empty(2, 23, 9, torch.device("cpu"))
    (curve,) = greedy_curves([blind], [layer], 4, 9, 1e-4)
    assert torch.equal(curve.order.sort(-1).values, torch.arange(23).expand(2, -1)) and not curve.gains.any()
    assert values.isfinite().all()


def test_curves_are_permutations_whose_gains_fall_and_stay_within_the_energy() -> None:
    made = [random_sums(50, 13, seed) for seed in range(2)]
    curves = greedy_curves([sums for _, sums, _ in made], [layer for *_, layer in made], 4, 13, 0.0)
    for (shares, sums, layer), curve in zip(made, curves, strict=True):
        assert torch.equal(curve.order.sort(-1).values, torch.arange(50).expand(2, -1))
        assert (curve.gains.diff(dim=-1) <= 0).all() and (curve.gains >= 0).all()
        targets = chunk_targets(sums, layer, 4).view(2, 4, 13, 7)
        for head in range(2):
            energy = sum(
                float(
                    (shares[head][:, c * 13 : (c + 1) * 13] @ targets[head, c, : min(13, 50 - c * 13)]).square().sum()
                )
                for c in range(4)
            )
            assert float(curve.gains[head].sum()) == pytest.approx(energy, rel=1e-3)  # all keys explain everything


def test_one_batch_of_layers_gives_the_curves_of_each_alone() -> None:
    made = [random_sums(50, 13, seed) for seed in range(3)]
    together = greedy_curves([sums for _, sums, _ in made], [layer for *_, layer in made], 4, 13, 1e-3)
    for (_, sums, layer), curve in zip(made, together, strict=True):
        (alone,) = greedy_curves([sums], [layer], 4, 13, 1e-3)
        assert torch.equal(alone.order, curve.order)
        torch.testing.assert_close(alone.gains, curve.gains)


@pytest.mark.parametrize("num_picks", [1, 5])
def test_fewer_picks_a_chunk_order_the_rest_by_what_each_would_add_alone(num_picks: int) -> None:
    _, sums, layer = random_sums(50, 13, 0)
    (whole,) = greedy_curves([sums], [layer], 4, 13, 0.0)
    (short,) = greedy_curves([sums], [layer], 4, num_picks, 0.0)
    assert torch.equal(short.order.sort(-1).values, torch.arange(50).expand(2, -1))
    assert (short.gains.diff(dim=-1) <= 0).all() and (short.gains >= 0).all()
    for head in range(2):
        for c in range(4):
            first, second = (
                [j for j in curve.order[head].tolist() if c * 13 <= j < (c + 1) * 13] for curve in (whole, short)
            )
            assert first[:num_picks] == second[:num_picks]


def test_an_isolated_chunk_is_ordered_as_least_squares_would() -> None:
    """The best first key of each chunk leaves least of mass and output when it alone is fitted."""
    shares, sums, layer = random_sums(26, 13, 3)
    (curve,) = greedy_curves([sums], [layer], 4, 13, 0.0)
    targets = chunk_targets(sums, layer, 4).view(2, 2, 13, 7)
    for head in range(2):
        for c in range(2):
            part = shares[head][:, c * 13 : (c + 1) * 13].double()
            goal = part @ targets[head, c].double()
            left = [
                float((goal - torch.outer(part[:, j], part[:, j] @ goal / part[:, j].square().sum())).square().sum())
                for j in range(13)
            ]
            best = int(torch.tensor(left).argmin()) + c * 13
            order = curve.order[head].tolist()
            # pooling may put a later key beside the first, never before it
            assert next(j for j in order if c * 13 <= j < (c + 1) * 13) == best


# ------------------------------------------------------------------------------------------- packed rows


def plain_layer(num_document: int, prefix: int, segments: list[Segment], seed: int = 0) -> PackedLayer:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, prefix + num_document, 8, generator=generator)
    total = prefix + num_document
    return PackedLayer(dense_layer(keys, values, first_position=0), pack(segments, total), total, lambda _n: None)


def random_rows(num_rows: int, heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    keys, values = torch.randn(2, 2, num_rows, 8, generator=generator)
    return 1.5 * torch.randn(heads, num_rows, 8, generator=generator), keys, values


@pytest.mark.parametrize(("prefix", "heads"), [(3, 4), (0, 4), (3, 2), (3, 6)])
@pytest.mark.parametrize("local_rows", [1024, 8, 1])
def test_rows_see_prefix_document_and_their_own_segment_only(
    prefix: int, heads: int, local_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few rows a block, long segments are cut and short ones share a block."""
    monkeypatch.setattr(packed, "LOCAL_ROWS", local_rows)
    layer = plain_layer(17, prefix, SEGMENTS)
    queries, keys, values = random_rows(layer.packed.num_rows, heads)
    blocks = list(layer.packed.blocks(heads, torch.device("cpu"), prefix))
    assert [block.first for block in blocks] == [0, *(block.last for block in blocks)][:-1]
    assert blocks[-1].last == layer.packed.num_rows
    assert len(blocks) == -(-57 // local_rows)
    exact = exact_rows(layer, queries, keys, values, 0.4, prefix)
    all_keys, all_values = (part[0].double() for part in dense_heads(layer.full))
    group = heads // 2
    for query_head in range(heads):
        head, member = divmod(query_head, group)
        for first, last in layer.packed.bounds:
            for row in range(first, last):
                own_keys = torch.cat([all_keys[head], keys[head, first : row + 1].double()])
                own_values = torch.cat([all_values[head], values[head, first : row + 1].double()])
                scores = 0.4 * own_keys @ queries[query_head, row].double()
                probs = scores.softmax(0)
                got = [part[head, member, row].double() for part in vars(exact).values()]
                inside = scores[prefix : prefix + 17]
                near = torch.cat([scores[:prefix], scores[prefix + 17 :]])
                near_values = torch.cat([own_values[:prefix], own_values[prefix + 17 :]])
                expected = (
                    scores.logsumexp(0), inside.softmax(0) @ all_values[head, prefix:], inside.logsumexp(0),
                    near.softmax(0) @ near_values, near.logsumexp(0), probs @ own_values,
                )  # fmt: skip
                for mine, theirs in zip(got, expected, strict=True):
                    torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)
    assert list(vars(exact)) == ["lse", "document", "document_lse", "near", "near_lse", "out"]


def test_row_weights_follow_their_sources() -> None:
    made = pack(SEGMENTS, 5)
    weights = made.row_weights(WEIGHTS, torch.device("cpu"))
    assert weights.tolist() == [1.0] * 11 + [3.0] * 27 + [1.0] * 19
    assert made.position_ids[0, 11:14].tolist() == [5, 5, 6]  # every segment begins right after the document


# ------------------------------------------------------------------------------------------- arithmetic of attention


@pytest.mark.parametrize("block", [1 << 21, 60])
def test_dense_attention_equals_double_precision(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "block_elements", lambda _device: block)
    generator = torch.Generator().manual_seed(0)
    query = 2.0 * torch.randn(2, 13, 8, generator=generator)
    keys, values = torch.randn(2, 2, 29, 8, generator=generator)
    out, lse = attention.dense_attention(query, keys, values, 0.7)
    scores = 0.7 * query.double() @ keys.double().mT
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ values.double(), atol=1e-5, rtol=1e-5)


def test_exponentials_and_products_equal_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 13, 8, generator=generator), torch.randn(2, 29, 8, generator=generator)
    row_shift, key_shift = torch.randn(2, 13, generator=generator), torch.randn(2, 29, generator=generator)
    scores = 0.7 * query.double() @ keys.double().mT + row_shift.double().unsqueeze(-1)
    plain = attention.exponentials(query, keys, 0.7, row_shift)
    torch.testing.assert_close(plain.double(), scores.exp(), rtol=1e-5, atol=0)
    both = attention.exponential_of(attention.shifted_scores(query, keys, key_shift, 0.7, row_shift), query)
    torch.testing.assert_close(both.double(), (scores + key_shift.double().unsqueeze(1)).exp(), rtol=1e-5, atol=0)
    product = attention.multiply(plain.mT, query)
    torch.testing.assert_close(product.double(), plain.double().mT @ query.double(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path on a CPU: products of half-precision inputs are exact and summed in float32, as matrix units do."""

    def half_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        assert left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16)
        return torch.bmm(left.float(), right.float())

    for module in (attention, gram):
        monkeypatch.setattr(module, "half_product", half_product)
    monkeypatch.setattr(attention, "is_fast", lambda query: query.dtype in (torch.float16, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_half_precision_exponentials_err_by_one_in_a_thousand_at_most(
    head_dim: int, dtype: torch.dtype, matrix_units: None
) -> None:
    """Scores of deviation 2.5, shifts up to 40 either way."""
    generator = torch.Generator().manual_seed(0)
    scaling = head_dim**-0.5
    query = (2.5 * torch.randn(1, 200, head_dim, generator=generator)).to(dtype)
    keys = torch.randn(1, 300, head_dim, generator=generator).to(dtype)
    scores = scaling * query.double() @ keys.double().mT
    for sizes in ((40.0, 0.0), (6.0, 34.0)):
        row_shift = sizes[0] * (2 * torch.rand(1, 200, generator=generator) - 1)
        key_shift = sizes[1] * (2 * torch.rand(1, 300, generator=generator) - 1)
        found = attention.shifted_scores(query, keys, key_shift if sizes[1] else None, scaling, row_shift)
        shares = attention.exponential_of(found, query)
        assert shares.dtype == torch.float16 and torch.isfinite(shares).all()
        exact = scores + row_shift.double().unsqueeze(-1) + key_shift.double().unsqueeze(1)
        normal = (exact > -9.0) & (exact < 10.0)  # below, float16 has fewer digits; above, it ends
        assert normal.sum() > 1000
        error = (shares.double() - exact.exp()).abs()
        assert float((error / exact.exp())[normal].max()) < 1e-3
        assert float(error[exact <= -9.0].max()) < 1e-6


def test_half_precision_attention_survives_scores_in_the_thousands(matrix_units: None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = (1000.0 * torch.randn(1, 200, 128, generator=generator)).bfloat16()
    keys = torch.randn(1, 300, 128, generator=generator).bfloat16()
    scores = 128**-0.5 * query.double() @ keys.double().mT
    assert float(scores.max()) > 3000
    shares = attention.exponentials(query, keys, 128**-0.5, -scores.logsumexp(-1).float())
    torch.testing.assert_close(shares.double(), scores.softmax(-1), rtol=0, atol=4e-3)


def test_half_precision_gram_sums_equal_those_of_the_rounded_rows(matrix_units: None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, targets = torch.rand(2, 90, 31, generator=generator).half(), torch.randn(2, 90, 3, generator=generator)
    sums = gram.GramSum(2, 31, 3, torch.device("cpu"))
    for part, target in zip(rows.split(40, dim=1), targets.split(40, dim=1), strict=True):
        sums.add(part, target)
    torch.testing.assert_close(sums.gram, rows.double().mT @ rows.double(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums.rhs, rows.double().mT @ targets.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.energy, targets.double().square().sum((1, 2)), rtol=1e-6, atol=0)


def test_half_precision_gram_matrices_are_those_of_the_rounded_attention(matrix_units: None) -> None:
    """Root weights far from 1 neither overflow float16 nor vanish in it."""
    generator = torch.Generator().manual_seed(3)
    query = (2.5 * torch.randn(2, 50, 64, generator=generator)).bfloat16()
    keys = torch.randn(2, 21, 64, generator=generator).bfloat16()
    scores = query.double() @ keys.double().mT / 8
    lse = scores.logsumexp(-1) + 0.5
    for size in (1e-6, 1.0, 1e6):
        roots = size * (0.1 + torch.rand(2, 2, 25, generator=generator))
        sums = ChunkGrams.empty(2, 21, 8, torch.device("cpu"))
        none = torch.zeros(2, 2, 25, 64)
        shape = (2, 2, 25)
        exact = ExactRows(
            lse.float().view(shape), none, (lse - 0.5).float().view(shape), none, torch.zeros(shape), none
        )
        add_rows(sums, query, keys, 1 / 8, exact, roots)
        attended = (scores - lse.unsqueeze(-1)).exp() * roots.double().flatten(1).unsqueeze(-1)
        for head in range(2):
            for chunk in range(3):
                part = attended[head, :, chunk * 7 : (chunk + 1) * 7]
                whole = part.T @ part
                torch.testing.assert_close(
                    sums.gram[head, chunk].double(), whole, rtol=4e-3, atol=1e-4 * float(whole.max())
                )
        torch.testing.assert_close(
            sums.mass.double(), (roots.double().square() * torch.e**-0.5).sum((1, 2)), rtol=1e-5, atol=0
        )
