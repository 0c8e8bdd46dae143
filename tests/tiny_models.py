"""Builds tiny random models of every supported family, with a tokenizer, in a folder. Knows no compaction.

    folder = make_tiny("qwen3", tmp_path / "tiny", num_heads=4, num_kv_heads=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

Query and key weights are large enough for peaked attention: a wrong mask, position or bias shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_call|>")

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TRAINING_TEXT = """\
The tenant shall pay rent on the first day of each month. The landlord may not enter without notice.
If the deposit is not returned within 30 days, interest of 4.5% is due. Either party may end this agreement
with 60 days' notice in writing. Clause 7 says that repairs under 150 euros are paid by the tenant.
def add(a, b):
    return a + b
What does clause 7 say? Summarise the document. Repeat the previous context verbatim.
"""


def make_tiny(
    family: str,
    folder: Path | str,
    *,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    hidden_size: int = 64,
    window: int = 2048,
    sliding_window: int | None = None,
    layer_types: list[str] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    chat_template: str | None = CHATML,
    tie_word_embeddings: bool = False,
    **config_fields: Any,
) -> Path:
    """Write a random model of ``family`` and its tokenizer to ``folder``; return the folder.

    ``sliding_window`` makes every layer of a mistral slide, and the sliding layers of a gemma3_text (by
    default all but the last layer slide over 16 tokens). ``config_fields`` are passed to the config as they
    are.
    """
    import torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(chat_template=chat_template)
    model = make_model(
        family, vocab_size=len(tokenizer), num_layers=num_layers, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, hidden_size=hidden_size, window=window,
        sliding_window=sliding_window, layer_types=layer_types, seed=seed,
        tie_word_embeddings=tie_word_embeddings, **config_fields,
    )  # fmt: skip
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_model(
    family: str,
    *,
    vocab_size: int,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    hidden_size: int = 64,
    window: int = 2048,
    sliding_window: int | None = None,
    layer_types: list[str] | None = None,
    seed: int = 0,
    tie_word_embeddings: bool = False,
    **config_fields: Any,
) -> Any:
    """Return a random float32 model in eval mode; the global random state is left as it was."""
    import torch
    from transformers import AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": window,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "qwen2":  # its head_dim is always hidden_size / num_heads
        fields["hidden_size"] = num_heads * head_dim
    if family == "mistral":
        fields["sliding_window"] = sliding_window
    if family == "gemma3_text":
        fields["sliding_window"] = sliding_window or 16
        fields["layer_types"] = layer_types or ["sliding_attention"] * (num_layers - 1) + ["full_attention"]
        fields["query_pre_attn_scalar"] = head_dim
    elif layer_types is not None:
        fields |= {"layer_types": layer_types, "sliding_window": sliding_window, "use_sliding_window": True}
    config = _config_class(family)(**(fields | config_fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(_random_weight(name, weight))
    return model.eval()


def _random_weight(name: str, weight: Any) -> Any:
    """Return a weight that keeps activations near unit size and scores at a deviation of about 2.5."""
    import torch

    noise = torch.randn(weight.shape)
    if "q_norm" in name or "k_norm" in name:
        return weight + 0.6 + 0.1 * noise
    if weight.ndim == 1:  # norms and biases
        return weight + 0.1 * noise
    if "embed_tokens" in name:
        return noise
    gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.0
    return gain * noise / weight.shape[-1] ** 0.5


def _config_class(family: str) -> Any:
    import transformers

    names = {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "gemma3_text": "Gemma3Text",
    }
    return getattr(transformers, names[family] + "Config")


def make_tokenizer(*, chat_template: str | None = CHATML, vocab_size: int = 512) -> Any:
    """Return a byte-level BPE tokenizer trained on ``TRAINING_TEXT``, with a template and control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TRAINING_TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|tool_call|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_tiny_gguf(folder: Path | str, path: Path | str) -> Path:
    """Write the llama model of ``folder`` as a GGUF file in float32, laid out as llama.cpp does."""
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "model.layers": "blk",
    }  # fmt: skip
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates pairs of neighbours, transformers halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    import json

    import gguf

    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(saved["model"]["vocab"].items(), key=lambda item: item[1])
    control = {one["content"] for one in saved["added_tokens"] if one["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocabulary])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in control else kinds.NORMAL for token, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in saved["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
