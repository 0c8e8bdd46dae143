"""Knows how tokens are drawn, and how a batch of self-study prompts is answered. Knows no prompts and no solver.

Rope positions are those of a question after the whole document, whether a row sees all of it or a section.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from compactor.reference_queries import stop_token_ids
from compactor.shared_layers import Sections, SharedLayer
from compactor.stepping import answer

if TYPE_CHECKING:
    from compactor.model import LoadedModel
    from compactor.prefill import Prefilled

TOP_K = 64  # tokens that self-study chooses from at most; a partial sort of the vocabulary is enough


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
    seed: int,
    top_p: float = 0.95,
    on_step: Callable[[int], None] = lambda _steps: None,
) -> list[list[int]]:
    """Answer all prompts as one sampled batch over the full cache; answers come without their stop token.

    section_prompts: for every section of `Sections.of` the same number of prompts (token ids after the document);
    whole_prompts: prompts that see the whole document. Answers come in the order section by section, then whole.
    Equal seeds give equal answers on one machine. The caller checks that prompt and answer fit the window.
    """
    prompts = [prompt for section in section_prompts for prompt in section] + list(whole_prompts)
    sections = Sections.of(len(full.document_ids), max(1, len(section_prompts)))
    rows_per_section = len(section_prompts[0]) if section_prompts else 0

    def make_layers(padding: torch.Tensor, capacity: int) -> list[SharedLayer]:
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

    pick = Nucleus(len(prompts), max(1, max_new_tokens), top_p=top_p, top_k=TOP_K, seed=seed, device=loaded.device)
    return answer(
        loaded,
        make_layers,
        full.logical_length,
        prompts,
        max_new_tokens,
        pick,
        stop_token_ids(loaded),
        on_step=on_step,
    )
