"""Knows how kept keys, biases and values of a head move together until they reproduce attention. Knows no selection.

Least squares gives the best values for kept keys that are members of the document. Better keys need not be members: a
few kept keys have to speak for all that were left out. With the rows of the fit (fit.py), per head,

    minimise sum_i w_i ||out'_i - out_i||^2 over K', b', V'
    out'_i = exp(near_lse - lse') near_i + sum over j of p_ij v'_j,   p_ij = exp(s q_i.k'_j + b'_j - lse'_i)

by Adam (Kingma and Ba 2015) over random rows, from the least squares solution. With g_i = 2 w_i (out'_i - out_i) the
gradients are those of softmax attention in which prefix and local keys are one more, fixed, key:

    dS_ij = p_ij (g_i.v'_j - g_i.out'_i),   dK' = s dS^T Q,   db' = sum_i dS_i,   dV' = P^T g

On an NVIDIA GPU Triton kernels that keep no scores take the steps on rows that see all kept keys; torch takes the
others, on `Problem.gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compactor import attention
from compactor.solve.gram import sum_dtype

if TYPE_CHECKING:
    from compactor.solve.rows import Rows
    from compactor_kernels.refine_gradients import GradientPlan

DISTANCE, FASTEST = 9.0, 0.1  # sum of all rates, and the highest; in root-mean-square units of a head's keys and values
FULL_PACE = 0.1  # relative error from which a head moves at these rates; below it, in proportion
BETAS = (0.9, 0.95)
EAGER_STEPS = 3  # before a step is captured
WARM_UP = 5  # steps until the rate is full; it then falls as a cosine to 0
ROWS = 8192  # query rows of one step, over the group of a KV head
CPU_ROWS = 1024  # the same on a CPU
MOST_DRAWN = 4  # samples of batches of unlike sizes that are held
SMALL = 1 << 22  # scores of a head in a step; below it heads of all lengths share a launch
LEAST_FILLED = 0.5  # of a padded head in larger ones
PADDED = 1 << 25  # elements of padded keys up to which fused steps take heads of all lengths together: 128 MiB
ABSENT = -1e4  # bias of padding


@dataclass(frozen=True)
class HeadKeyValues:
    """Kept document keys of one KV head, float32."""

    keys: torch.Tensor  # (num_kept, head_dim)
    biases: torch.Tensor  # (num_kept,)
    values: torch.Tensor  # (num_kept, head_dim)
    positions: torch.Tensor  # (num_kept,) int64, document-relative: a row sees those before its `document_stop`
    error: float = 1.0  # relative, of the attention output: a head that is nearly right moves in small steps


class Refiner:
    """Refines the layers of one model one after another; on an NVIDIA GPU a step is captured once a layer and replayed,
    in memory that all layers share."""

    def __init__(self, steps: int, seed: int = 0) -> None:
        self.steps, self.seed = steps, seed
        self.drawn: dict[tuple[tuple[int, int], ...], list[torch.Tensor]] = {}  # layers share them
        self.graph: torch.cuda.CUDAGraph | None = None  # the last one: while it lives, so does its memory
        self.stream: torch.cuda.Stream | None = None

    def refine(self, parts: Sequence[Rows], heads: Sequence[HeadKeyValues]) -> list[HeadKeyValues]:
        """Return the heads after ``steps`` steps; a head that does not stay finite is returned as it came.

        ``parts``: rows of all KV heads, (num_kv_heads, group, num_rows, ...). The same seed gives the same rows.
        """
        result = list(heads)
        if self.steps and sum(part.lse.shape[2] for part in parts):
            for members in batches(heads, parts[0].lse.device, fused=is_fused(parts)):
                refined, finite = self._refine_batch(parts, heads, members)
                for index, head, good in zip(members, refined, finite, strict=True):
                    result[index] = head if good else heads[index]
        return result

    def _refine_batch(
        self, parts: Sequence[Rows], heads: Sequence[HeadKeyValues], members: list[int]
    ) -> tuple[list[HeadKeyValues], list[bool]]:
        """Return the refined heads of a batch, and which of them are finite; the host waits for them once."""
        problem = Problem(parts, [heads[i] for i in members], members)
        drawn, rates = self._draw(problem), [rate(step, self.steps) for step in range(self.steps)]
        make = _Descent if problem.plan is None else _FusedDescent
        descent = make(problem, drawn, rates)
        if can_capture(problem.keys.device):
            self._replay(descent.take_next, problem.keys.device)
        else:
            for _ in range(self.steps):
                descent.take_next()
        keys, biases, values = descent.moved()
        finite = (keys.isfinite() & values.isfinite()).flatten(1).all(1) & biases.isfinite().all(1)  # padding is
        return [
            HeadKeyValues(keys[i, :n], biases[i, :n], values[i, :n], heads[index].positions)
            for i, (index, n) in enumerate((index, len(heads[index].biases)) for index in members)
        ], finite.tolist()

    def _draw(self, problem: Problem) -> list[torch.Tensor]:
        """Return the row numbers of all steps, of each part (steps, count) int64 on the device."""
        sizes = problem.sample_sizes()
        if sizes not in self.drawn:
            if len(self.drawn) == MOST_DRAWN:
                self.drawn.clear()
            self.drawn[sizes] = [part.to(problem.keys.device) for part in draw_rows(sizes, self.steps, self.seed)]
        return self.drawn[sizes]

    def _replay(self, take_next: Callable[[], None], device: torch.device) -> None:
        """Take the first steps one by one, capture one, and replay it for the others: what a step needs is found on the
        device by its number, so that the host only says that there is another."""
        self.stream = self.stream or torch.cuda.Stream(device)
        here, aside = torch.cuda.current_stream(device), self.stream
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(min(EAGER_STEPS, self.steps)):
                take_next()
            if self.steps > EAGER_STEPS:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=None if self.graph is None else self.graph.pool())
                take_next()
                graph.capture_end()
                for _ in range(EAGER_STEPS, self.steps):
                    graph.replay()
                self.graph = graph
        here.wait_stream(aside)


class _Descent:
    """Adam on the changes of a batch of heads, by torch."""

    def __init__(self, problem: Problem, drawn: list[torch.Tensor], rates: list[float]) -> None:
        self.problem, self.drawn = problem, drawn
        self.changes = [
            torch.zeros_like(part, requires_grad=True) for part in (problem.keys, problem.biases, problem.values)
        ]
        self.on_gpu = problem.keys.is_cuda
        device = problem.keys.device if self.on_gpu else "cpu"
        self.rate = torch.tensor(FASTEST, device=device)
        self.rates = torch.tensor(rates, dtype=torch.float64, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.optimizer = torch.optim.Adam(
            self.changes,
            lr=self.rate if self.on_gpu else FASTEST,
            betas=BETAS,
            fused=self.on_gpu,
            capturable=self.on_gpu,
        )

    def take_next(self) -> None:
        """Take the next step; on a GPU its rows and rate are found there."""
        if self.on_gpu:
            self.rate.copy_(self.rates.index_select(0, self.number).squeeze(0))
            index = [rows.index_select(0, self.number).squeeze(0) for rows in self.drawn]
        else:
            step = int(self.number)
            self.optimizer.param_groups[0]["lr"] = float(self.rates[step])
            index = [rows[step] for rows in self.drawn]
        self.number.add_(1)
        with torch.no_grad():
            gradients = self.problem.gradients(self.problem.take(index), *self.problem.moved(*self.changes))
        for change, gradient in zip(self.changes, gradients, strict=True):
            change.grad = gradient
        self.optimizer.step()

    def moved(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, biases and values after the steps so far."""
        return self.problem.moved(*(change.detach() for change in self.changes))


class _FusedDescent:
    """Adam on keys, biases and values of a batch of heads, by the kernels; ``drawn`` is of one part."""

    def __init__(self, problem: Problem, drawn: list[torch.Tensor], rates: list[float]) -> None:
        from compactor_kernels import refine_steps as kernels

        assert problem.plan is not None
        self.plan, start = problem.plan, (problem.keys, problem.biases, problem.values)
        on_device = torch.tensor(rates, device=problem.keys.device)
        self.steps = kernels.begin_steps(self.plan, *start, problem.units, drawn[0], on_device, BETAS)

    def take_next(self) -> None:
        """Take the next step."""
        from compactor_kernels import refine_steps as kernels

        kernels.take_step(self.plan, self.steps)

    def moved(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, biases and values after the steps so far."""
        keys, biases, values = self.steps.moving
        return keys, biases, values


def can_capture(device: torch.device) -> bool:
    """Whether the steps of a device can be captured as a CUDA graph."""
    return device.type == "cuda" and torch.version.hip is None


def is_fused(parts: Sequence[Rows]) -> bool:
    """Whether the kernels take the steps: half-precision rows of one part on an NVIDIA GPU that see all kept keys."""
    drawn = [part for part in parts if part.lse.shape[2]]
    if len(drawn) != 1 or drawn[0].document_stop is not None:
        return False
    queries = drawn[0].queries
    return attention.is_fast(queries) and attention.kernel_usable("refine_steps", queries)


def batches(heads: Sequence[HeadKeyValues], device: torch.device, *, fused: bool = False) -> Iterator[list[int]]:
    """Split heads into batches of similar length, longest first; heads without keys are left out.

    ``fused`` steps visit no padding and hold no scores: all heads are one batch, in their own order, so that their rows
    are not copied.
    """
    with_keys = [index for index, head in enumerate(heads) if len(head.biases)]
    if fused and with_keys:
        longest = max(heads[index].keys.numel() for index in with_keys)
        if len(with_keys) * longest <= PADDED:
            yield with_keys
            return
    rows = rows_of_step(device)
    members: list[int] = []
    for index in sorted(range(len(heads)), key=lambda i: -len(heads[i].biases)):
        count = len(heads[index].biases)
        if not count:
            break
        longest = len(heads[members[0]].biases) if members else count
        apart = device.type == "cpu" or (longest * rows > SMALL and count < LEAST_FILLED * longest)
        if members and apart:
            yield members
            members = []
        members.append(index)
    if members:
        yield members


def rows_of_step(device: torch.device) -> int:
    """Return how many query rows a step looks at."""
    return CPU_ROWS if device.type == "cpu" else ROWS


def rate(step: int, steps: int) -> float:
    """Return the rate of a step: a short warm-up, then half a cosine; lower the more steps there are."""
    peak = min(FASTEST, DISTANCE / steps)
    return peak * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Sample:
    """Some rows of the heads of a batch, the groups flattened: (num_heads, num_rows, ...)."""

    queries: torch.Tensor
    weights: torch.Tensor
    lse: torch.Tensor
    near_share: torch.Tensor
    near: torch.Tensor
    out: torch.Tensor
    stops: torch.Tensor | None


class Problem:
    """The padded heads of a batch and their rows."""

    def __init__(self, parts: Sequence[Rows], heads: list[HeadKeyValues], members: list[int]) -> None:
        longest, device = max(len(head.biases) for head in heads), heads[0].keys.device
        shape = (len(heads), longest, heads[0].keys.shape[-1])
        self.keys, self.values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.biases = torch.full(shape[:2], ABSENT, device=device)
        self.present = torch.zeros(shape[:2], device=device)
        self.positions = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        for i, head in enumerate(heads):
            n = len(head.biases)
            self.keys[i, :n], self.values[i, :n], self.biases[i, :n] = head.keys, head.values, head.biases
            self.present[i, :n], self.positions[i, :n] = 1.0, head.positions.to(device)
        lengths = self.present.sum(1).view(-1, 1, 1)
        key_size, value_size = spread(self.keys, self.present, lengths), size(self.values, lengths)
        pace = torch.tensor([min(1.0, head.error / FULL_PACE) for head in heads], device=device).view(-1, 1, 1)
        key_size, value_size = key_size * pace, value_size * pace
        self.key_unit = (key_size * self.present.unsqueeze(-1)).contiguous()
        self.value_unit = (value_size * self.present.unsqueeze(-1)).contiguous()
        self.bias_unit = self.present * pace.squeeze(-1)
        self.units = torch.stack([unit.flatten() for unit in (key_size, pace, value_size)])  # padding has them too
        everyone = members == list(range(parts[0].lse.shape[0]))
        chosen = slice(None) if everyone else torch.tensor(members, device=device)
        self.parts = [_flat(part, chosen) for part in parts if part.lse.shape[2]]
        self.scaling = parts[0].scaling
        self.num_rows = sum(part.lse.shape[1] for part in self.parts)
        norms = [torch.linalg.vector_norm(part.out, dim=-1).square() * part.weights for part in self.parts]
        energy = torch.stack([own.sum(1, dtype=sum_dtype(own)) for own in norms]).sum(0)
        self.energy = energy.float().clamp_min(1e-30)
        self.plan: GradientPlan | None = None
        if is_fused(parts):
            scale = 2.0 * self.num_rows / rows_of_step(device) / self.energy
            self.plan = _plan(self.parts[0], [len(head.biases) for head in heads], self.units * scale, self.scaling)

    def sample_sizes(self) -> tuple[tuple[int, int], ...]:
        """Return of each part how many rows it has and how many of them a step takes, its share of all."""
        device, total = self.keys.device, self.num_rows
        wanted = rows_of_step(device)
        if self.plan is None:  # the scores are held
            most = attention.block_elements(device) // (self.keys.shape[0] * self.keys.shape[1])
            wanted = max(1, min(wanted, most))
        return tuple((rows, -(-wanted * rows // total)) for rows in (part.lse.shape[1] for part in self.parts))

    def take(self, index: list[torch.Tensor]) -> Sample:
        """Return the rows of some row numbers of each part."""
        drawn = [_take(part, own) for part, own in zip(self.parts, index, strict=True)]
        return drawn[0] if len(drawn) == 1 else _join(drawn)

    def moved(
        self, keys: torch.Tensor, biases: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, biases and values after changes in the units of the head."""
        return (
            torch.addcmul(self.keys, keys, self.key_unit),
            torch.addcmul(self.biases, biases, self.bias_unit),
            torch.addcmul(self.values, values, self.value_unit),
        )

    def gradients(
        self, rows: Sample, keys: torch.Tensor, biases: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of the relative squared error with respect to the changes."""
        scores = attention.shifted_scores(rows.queries, keys, biases, self.scaling, -rows.lse)
        if rows.stops is not None:
            scores.masked_fill_(self.positions.unsqueeze(1) >= rows.stops.view(1, -1, 1), -math.inf)
        shift = torch.logaddexp(scores.logsumexp(-1), rows.near_share)
        shares = attention.exponential_of(scores.sub_(shift.unsqueeze(-1)), rows.queries)
        out = attention.multiply(shares, values) + (rows.near_share - shift).exp().unsqueeze(-1) * rows.near
        scale = 2.0 * self.num_rows / rows.lse.shape[1] / self.energy
        # in units in which half precision holds it: the error of a row, its weight against the mean
        mean_weight = rows.weights.mean(1, keepdim=True).clamp_min(1e-30)
        error = (out - rows.out) * (rows.weights / mean_weight).unsqueeze(-1)
        unit = error.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
        error = (error / unit).to(shares.dtype)
        by_share = attention.multiply(error, values.mT).sub_((error.float() * out).sum(-1, keepdim=True))
        by_score = by_share.mul_(shares)
        units = (unit * mean_weight.unsqueeze(-1) * scale.view(-1, 1, 1)).float()
        by_bias = by_score.sum(1) * units[..., 0]
        by_key = attention.multiply(by_score.to(shares.dtype).mT, rows.queries) * (units * self.scaling)
        by_value = attention.multiply(shares.mT, error) * units
        return by_key * self.key_unit, by_bias * self.bias_unit, by_value * self.value_unit


def spread(keys: torch.Tensor, present: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Root-mean-square distance of a head's keys from their mean, per component: (num_heads, 1, 1)."""
    mean = keys.sum(1, keepdim=True) / lengths
    centred = (keys - mean) * present.unsqueeze(-1)
    return size(centred, lengths)


def size(vectors: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Root mean square of a head's components, padding aside: (num_heads, 1, 1)."""
    return (vectors.square().sum((1, 2), keepdim=True) / (lengths * vectors.shape[-1])).sqrt()


def _plan(rows: Sample, lengths: list[int], scales: torch.Tensor, scaling: float) -> GradientPlan:
    """Return what the kernels need to know of all rows of a batch; ``scales`` as in `plan_gradients`."""
    from compactor_kernels import refine_gradients as kernels
    from compactor_kernels.reference import FitRows

    own = FitRows(*(getattr(rows, name).contiguous() for name in FitRows._fields))
    return kernels.plan_gradients(own, lengths, scales, scaling=scaling)


def _flat(rows: Rows, chosen: slice | torch.Tensor) -> Sample:
    """Flatten the group of some KV heads into their rows."""
    group = rows.lse.shape[1]
    stops = None if rows.document_stop is None else rows.document_stop.repeat(group)
    parts = (rows.queries, rows.root_weights.square(), rows.lse, rows.near_share, rows.near, rows.out)
    queries, weights, lse, near_share, near, out = (part[chosen].flatten(1, 2) for part in parts)
    return Sample(queries, weights, lse, near_share, near, out, stops)


def draw_rows(sizes: Sequence[tuple[int, int]], steps: int, seed: int) -> list[torch.Tensor]:
    """Return of each part the row numbers of all steps, (steps, count) int64: every row once before any comes again.

    sizes: number of rows and number that a step takes, of each part. Equal seeds draw equally on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for num_rows, count in sizes:
        shuffles = -(-steps * count // num_rows)
        rows = torch.cat([torch.randperm(num_rows, generator=generator) for _ in range(shuffles)])
        drawn.append(rows[: steps * count].view(steps, count))
    return drawn


def _take(rows: Sample, index: torch.Tensor) -> Sample:
    parts = (rows.queries, rows.weights, rows.lse, rows.near_share, rows.near, rows.out)
    queries, weights, lse, near_share, near, out = (part.index_select(1, index) for part in parts)
    return Sample(queries, weights, lse, near_share, near, out, None if rows.stops is None else rows.stops[index])


def _join(samples: list[Sample]) -> Sample:
    names = ("queries", "weights", "lse", "near_share", "near", "out")
    queries, weights, lse, near_share, near, out = (
        torch.cat([getattr(sample, name) for sample in samples], dim=1) for name in names
    )
    device, far = lse.device, torch.iinfo(torch.int64).max
    stops = [
        torch.full((sample.lse.shape[1],), far, device=device) if sample.stops is None else sample.stops
        for sample in samples
    ]
    return Sample(queries, weights, lse, near_share, near, out, torch.cat(stops))
