"""Knows how tokens are drawn, and how a batch of self-study prompts is answered. Knows no prompts and no solver.

Rope positions are those of a question after the whole document, whether a row sees all of it or a section.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from compactor import workspace
from compactor.reference_queries import stop_token_ids
from compactor.shared_layers import Sections, SharedLayer
from compactor.stepping import Pick, answer, greedy

if TYPE_CHECKING:
    from compactor.model import LoadedModel
    from compactor.prefill import Prefilled

TOP_K = 64  # tokens that self-study chooses from at most; a partial sort of the vocabulary is enough
GPU_TAIL_FRACTION = 0.125  # of a GPU's memory that the new tokens of a batch take
CPU_TAIL_BYTES = 1 << 30


class Nucleus:
    """Draws tokens from the nucleus (Holtzman et al. 2020): the fewest most likely ones that hold ``top_p``.

    The random numbers of all steps are drawn at once, on the CPU: equal seeds draw equally on every device.
    """

    def __init__(
        self,
        num_rows: int,
        num_steps: int,
        *,
        top_p: float,
        seed: int,
        device: torch.device,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.uniform = torch.rand(num_steps, num_rows, generator=generator).to(device)
        self.top_p, self.top_k, self.temperature = top_p, top_k, temperature

    def __call__(self, logits: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Draw one token per row: logits (rows, vocabulary) float32, step (1,) int64; returns (rows,) int64."""
        logits = logits / self.temperature
        best = logits.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
        probs = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
        inside = probs.cumsum(-1) - probs < self.top_p  # the first token always is
        ends = torch.where(inside, probs, 0.0).cumsum(-1)
        drawn = self.uniform.index_select(0, step).mT * ends[:, -1:]
        choice = (ends <= drawn).sum(-1, keepdim=True).minimum(inside.sum(-1, keepdim=True) - 1)
        return best.indices.gather(-1, choice).squeeze(-1)


def sample_answers(
    loaded: LoadedModel,
    full: Prefilled,
    section_prompts: Sequence[Sequence[list[int]]],
    whole_prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    seed: int | None,
    top_p: float = 0.95,
    on_step: Callable[[int], None] = lambda _steps: None,
) -> list[list[int]]:
    """Answer all prompts over the full cache; answers come without their stop token.

    section_prompts: for every section of `Sections.of` the same number of prompts (token ids after the document);
    whole_prompts: prompts that see the whole document. Answers come in the order section by section, then whole.
    Without a seed every token is the most likely one; equal seeds give equal answers on one machine. Prompts are one
    batch, or several where the tails would take too much memory; ``on_step`` hears of their steps as if they were one.
    The caller checks that prompt and answer fit the window.
    """
    count, per_section = len(section_prompts), len(section_prompts[0]) if section_prompts else 0
    sections = Sections.of(len(full.document_ids), max(1, count))
    longest = max((len(one) for section in (*section_prompts, whole_prompts) for one in section), default=0)
    most = max(1, rows_at_once(loaded, longest + max_new_tokens) // max(1, per_section))
    answers: list[list[int]] = []
    on_step = _Together(on_step, -(-max(1, count) // most))
    for first in range(0, max(1, count), most):
        members = section_prompts[first : first + most]
        last = first + most >= count
        prompts = [prompt for section in members for prompt in section] + (list(whole_prompts) if last else [])
        pick: Pick = greedy
        if seed is not None:
            pick = Nucleus(
                len(prompts),
                max(1, max_new_tokens),
                top_p=top_p,
                top_k=TOP_K,
                seed=seed + first,
                device=loaded.device,
            )
        make_layers = partial(
            shared_layers, full=full, sections=sections.run(first, len(members)), rows_per_section=per_section
        )
        answers += answer(
            loaded,
            make_layers,
            full.logical_length,
            prompts,
            max_new_tokens,
            pick,
            stop_token_ids(loaded),
            on_step=on_step,
        )
    return answers


class _Together:
    """Counts the steps of several batches, one after another, as if they were one."""

    def __init__(self, on_step: Callable[[int], None], num_batches: int) -> None:
        self.on_step, self.num_batches = on_step, num_batches
        self.taken = self.told = 0

    def __call__(self, steps: int) -> None:
        self.taken += steps
        due = self.taken // self.num_batches - self.told
        if due:
            self.told += due
            self.on_step(due)


def shared_layers(
    padding: torch.Tensor, capacity: int, *, full: Prefilled, sections: Sections, rows_per_section: int
) -> list[SharedLayer]:
    """Return layers in which the first rows see their section, the others the whole document."""
    return [
        SharedLayer(
            layer,
            full.logical_length,
            padding.to(layer.keys.device),
            capacity,
            prefix_length=full.prefix_length,
            sections=sections,
            rows_per_section=rows_per_section,
        )
        for layer in full.layers
    ]


def rows_at_once(loaded: LoadedModel, length: int) -> int:
    """Return how many sequences of ``length`` new tokens a batch may have."""
    per_token = 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * loaded.dtype.itemsize
    total = CPU_TAIL_BYTES
    if loaded.device.type == "cuda":
        total = int(torch.cuda.get_device_properties(loaded.device).total_memory * GPU_TAIL_FRACTION)
    total = workspace.within(total, workspace.TAIL_SHARE)
    return max(1, total // (per_token * max(1, length)))
