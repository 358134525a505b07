"""Models for tests: tiny random checkpoints with a real tokenizer, and the real small model."""

from __future__ import annotations

import functools
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from blyan_node.model import checkpoint_spec
from blyan_node.model.importing import Checkpoint, write_unit
from blyan_node.model.spec import ModelSpec
from blyan_node.testnet.demo_model import demo_model_path

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_config(
    family: str = "llama", layers: int = 4, hidden: int = 256, vocab: int = 1000, **changes: Any
) -> dict[str, Any]:
    """A ``config.json`` as transformers writes it; ``changes`` replace or add keys."""
    heads = max(hidden // 32, 1)
    return {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
        ],
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 4, 1),
        "head_dim": 32,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    } | changes


def tiny_checkpoint(
    directory: Path,
    family: str = "llama",
    layers: int = 4,
    hidden: int = 256,
    vocab: int = 1000,
    *,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a Hugging Face directory with random weights under ``directory`` and return its path."""
    path = directory / f"tiny-{family}-{layers}x{hidden}x{vocab}-{seed}"
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, layers, hidden, vocab, **changes)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (path / "tokenizer.json").write_text(tiny_tokenizer(vocab))
    settings = {"eos_token": STOP, "bos_token": None, "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    safetensors.torch.save_file(
        _random_weights(checkpoint_spec.from_hf_config(config), seed), path / "model.safetensors"
    )
    return path


def _random_weights(spec: ModelSpec, seed: int) -> dict[str, torch.Tensor]:
    """Weights under their Hugging Face names, scaled so that hidden states keep their size and logits differ."""
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for unit in spec.units:
        for name, shape in spec.unit_tensors(unit).items():
            values = torch.randn(shape, generator=source)
            if "norm" in name:
                values = 1 + 0.1 * values
            elif len(shape) == 2:
                values = values / shape[1] ** 0.5
            full = f"model.layers.{unit[6:]}.{name}" if unit.startswith("layer.") else f"model.{name}"
            weights["lm_head.weight" if name == "lm_head.weight" else full] = values
    return weights


@functools.cache
def tiny_tokenizer(vocab: int = 1000) -> str:
    """A byte-level BPE tokenizer.json of ``vocab`` entries (at least 300), which can write any text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab, 300),
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    return raw.to_str()


def import_units(checkpoint: Checkpoint, directory: Path) -> dict[str, Path]:
    """Write every unit of a checkpoint as a blob under ``directory``; return where each one lies."""
    directory.mkdir(parents=True, exist_ok=True)
    blobs = {unit: directory / f"{unit}.safetensors" for unit in checkpoint.spec.units}
    for unit, path in blobs.items():
        if not path.exists():
            write_unit(checkpoint.unit(unit), path)
    return blobs


def smollm2_gguf() -> Path:
    """The real small model, SmolLM2-135M-Instruct, fetched once and cached outside the repository."""
    return demo_model_path()


def smollm2_transformers() -> Any:
    """The same model in transformers, fp32, from what transformers itself reads out of the GGUF file.

    Its ``from_pretrained`` wants a package more for that, so its parts are put together here.
    """
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    path = smollm2_gguf()
    settings = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded["tensors"], strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(settings)
    return model.train(False)
