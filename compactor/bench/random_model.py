"""Knows how to make a model of a real configuration with random weights, on its device. Knows no benchmark.

Nothing is fetched. Queries and keys are large enough for attention to be peaked, as that of trained models is: their
products have a standard deviation of about 2.5. The tokenizer is trained on the program's own prompts, so that these
have about as many tokens as with real ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compactor.bench.shapes import SHAPES
from compactor.certificate import FIXED_QUESTIONS, SECTION_PROMPT
from compactor.fused import fuse
from compactor.model import LoadedModel, wrap_model
from compactor.reference_queries import REPEAT_FIRST, REPEAT_LATER
from compactor.self_study import PASSAGE_PROMPT, WHOLE_PROMPTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PEAK = 1.6  # size of a component of queries and of keys
ROOM = 4096  # tokens of the window that are left beside the document, at least
VOCABULARY = 1024  # of the tokenizer; a model's own may be larger
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRAINING_TEXTS = (
    "user assistant",
    REPEAT_FIRST,
    REPEAT_LATER,
    *WHOLE_PROMPTS,
    PASSAGE_PROMPT,
    SECTION_PROMPT,
    *FIXED_QUESTIONS,
)


def model_dtype(device: torch.device) -> torch.dtype:
    """Return the type of weights and activations: bfloat16, float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def make_random_model(name: str, device: torch.device, *, seed: int, tokens: int, fused: bool = True) -> LoadedModel:
    """Return a model of the shape ``name`` with a window of at least ``tokens`` and `ROOM` more; ``fused``: with the
    kernels that a loaded model is given.

    A window that is larger than the published one changes no cost: these follow the tokens that there are.
    """
    import transformers

    shape = SHAPES[name]
    tokenizer = make_tokenizer()
    window = max(shape.fields["max_position_embeddings"], tokens + ROOM)
    fields = {**shape.fields, "max_position_embeddings": window}
    for token in ("bos", "eos", "pad"):
        fields[f"{token}_token_id"] = getattr(tokenizer, f"{token}_token_id")
    config = getattr(transformers, shape.config_class)(**fields)
    gpus = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.device(device):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=model_dtype(device))
    for block in model.get_decoder().layers:
        sharpen(block.self_attn, config.initializer_range * config.hidden_size**0.5)
    if fused:
        fuse(model)
    return wrap_model(model, tokenizer, name=f"random {name}")


@torch.no_grad()
def sharpen(module: torch.nn.Module, size: float) -> None:
    """Bring the components of an attention module's queries and keys to the size `PEAK`: by the norms that follow the
    projections, where there are any; otherwise by the projections, which give components of ``size``."""
    weights = dict(module.named_parameters())
    if "q_norm.weight" in weights:
        for name in ("q_norm.weight", "k_norm.weight"):
            weights[name].mul_(PEAK)
    else:
        for name in ("q_proj.weight", "k_proj.weight"):
            weights[name].mul_(PEAK / size)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer (of at most `VOCABULARY` tokens) with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXTS * 2, trainer)  # what occurs once is left in pieces
    end, opening, closing = CONTROL_TOKENS
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=opening, eos_token=closing, pad_token=end)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_tokens(loaded: LoadedModel, count: int, seed: int) -> list[int]:
    """Return ordinary tokens of the tokenizer, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(len(CONTROL_TOKENS), len(loaded.tokenizer), (count,), generator=generator).tolist()
    return drawn
