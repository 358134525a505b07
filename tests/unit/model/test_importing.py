from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blyan_node.errors import CheckpointError, StoreError
from blyan_node.model.gguf_file import GgufFile
from blyan_node.model.importing import open_checkpoint, write_unit
from blyan_node.model.tokenizer import Tokenizer
from tests.support.models import tiny_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hf"), layers=2, hidden=64, vocab=400)


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_directory_in_one_file_or_several_gives_the_same_units(directory: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(directory)
    expected = {unit: whole.unit(unit) for unit in whole.spec.units}
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    weight_map = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(weights)}
    for file in set(weight_map.values()):
        part = {name: weights[name] for name in weights if weight_map[name] == file}
        safetensors.torch.save_file(part, directory / file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = open_checkpoint(directory)
    for unit, tensors in expected.items():
        again = sharded.unit(unit)
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_equal_units_are_equal_files(directory: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_unit(open_checkpoint(directory).unit("layer.0"), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(StoreError):
        write_unit({"a": torch.zeros(1)}, tmp_path / "missing" / "c")


def test_a_checkpoint_keeps_its_dtype_unless_asked(directory: Path) -> None:
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    safetensors.torch.save_file(half, directory / "model.safetensors")
    checkpoint = open_checkpoint(directory)
    assert {tensor.dtype for tensor in checkpoint.unit("layer.1").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in checkpoint.unit("layer.1", "float32").values()} == {torch.float32}


def test_ends_of_text_come_from_the_generation_config_and_the_tokenizer(directory: Path) -> None:
    edit(directory / "generation_config.json", eos_token_id=[0, 1])
    assert Tokenizer(open_checkpoint(directory).tokenizer).eos_ids == {0, 1, 2}


def test_a_template_file_goes_before_the_settings(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("from the file")
    assert json.loads(open_checkpoint(directory).tokenizer)["chat_template"] == "from the file"


def drop(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / "config.json", **changes)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return spoil


def reweigh(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        weights = safetensors.torch.load_file(directory / "model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, directory / "model.safetensors")

    return spoil


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (drop("config.json"), "config.json cannot be read"),
        (drop("model.safetensors"), "pickled weights"),
        (drop("tokenizer.json"), "no tokenizer.json"),
        (write("config.json", b"{"), "not JSON"),
        (write("config.json", b"[]"), "not a JSON object"),
        (write("config.json", b"[" * 200_000), "not JSON"),
        (write("tokenizer.json", b"\xff"), "tokenizer cannot be read"),
        (write("model.safetensors", b"\xff" * 64), "safetensors"),
        (write("model.safetensors.index.json", b'{"weight_map": {"a": "../../etc/passwd"}}'), "not a file beside it"),
        (write("model.safetensors.index.json", b'{"weight_map": 5}'), "no weight_map"),
        (write("model.safetensors.index.json", b'{"weight_map": {}}'), "no tensor model.embed_tokens.weight"),
        (config(model_type="mamba"), "'mamba' is not supported"),
        (config(model_type=["llama"]), "not supported"),
        (config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'yarn' is not supported"),
        (config(rope_scaling="linear"), "rotary parameters"),
        (config(hidden_act="gelu"), "hidden_act"),
        (config(mlp_bias=True), "mlp_bias"),
        (config(quantization_config={"bits": 4}), "quantization_config"),
        (config(use_sliding_window=True), "sliding"),
        (config(partial_rotary_factor=0.5), "partial"),
        (config(num_hidden_layers=10**9), "layers"),
        (config(num_hidden_layers="2"), "num_hidden_layers"),
        (config(num_attention_heads=0), "heads"),
        (config(num_attention_heads=4, num_key_value_heads=3), "cannot share"),
        (config(rms_norm_eps=float("inf")), "rms_norm_eps"),
        (config(num_hidden_layers=3), "no tensor model.layers.2"),
        (config(intermediate_size=100), "shape"),
        (config(tie_word_embeddings=False), "no tensor lm_head"),
        (reweigh(lambda weights: weights.pop(Q)), "no tensor " + Q),
        (reweigh(lambda weights: weights.update({Q: weights[Q].double()})), "dtype"),
        (reweigh(lambda weights: weights[Q].view(-1)[5].fill_(float("nan"))), "NaN"),
    ],
)
def test_a_broken_directory_is_named(directory: Path, spoil: Callable[[Path], None], complaint: str) -> None:
    spoil(directory)
    with pytest.raises(CheckpointError, match=complaint):
        read_all(directory)


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for unit in checkpoint.spec.units:
        checkpoint.unit(unit)


def test_a_path_to_nothing_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="GGUF file or a directory"):
        open_checkpoint(tmp_path / "nothing")


# GGUF


def write_gguf(path: Path, source: Path, family: str = "llama", **changes: Any) -> Path:
    """Write the Hugging Face checkpoint as llama.cpp's converter would; ``changes`` replace or (None) drop metadata."""
    checkpoint = open_checkpoint(source)
    spec, raw = checkpoint.spec, json.loads(checkpoint.tokenizer)["tokenizer"]
    vocabulary = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    special = {token["content"] for token in raw["added_tokens"]}
    metadata: dict[str, Any] = {
        f"{family}.block_count": spec.layers,
        f"{family}.context_length": spec.context_length,
        f"{family}.embedding_length": spec.hidden_size,
        f"{family}.feed_forward_length": spec.intermediate_size,
        f"{family}.attention.head_count": spec.heads,
        f"{family}.attention.head_count_kv": spec.kv_heads,
        f"{family}.attention.key_length": spec.head_dim,
        f"{family}.attention.layer_norm_rms_epsilon": spec.norm_eps,
        f"{family}.rope.freq_base": spec.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(str(path), family)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float64(key, value)
    for unit in spec.units:
        for name, tensor in checkpoint.unit(unit).items():
            writer.add_tensor(*_as_gguf(unit, name, tensor, family, spec.heads, spec.kv_heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_gguf(unit: str, name: str, tensor: torch.Tensor, family: str, heads: int, kv_heads: int) -> Any:
    plain = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    layer = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    module, _, kind = name.rpartition(".")
    values = tensor.numpy()
    if family == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
        count = heads if "q_proj" in module else kv_heads  # llama.cpp convert_hf_to_gguf.py, LlamaModel.permute
        rows = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
        values = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
    if unit.startswith("layer."):
        return f"blk.{unit[6:]}.{layer[module]}.{kind}", values
    return f"{plain[module]}.{kind}", values


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gguf_file_gives_the_units_of_the_directory_it_was_made_from(
    tmp_path: Path, family: str, tied: bool, bias: bool
) -> None:
    source = tiny_checkpoint(tmp_path, family, 2, 64, 400, tie_word_embeddings=tied, attention_bias=bias)
    original = open_checkpoint(source)
    read = open_checkpoint(write_gguf(tmp_path / "model.gguf", source, family))
    assert read.spec == original.spec
    for unit in original.spec.units:
        again = read.unit(unit)
        assert all(torch.equal(tensor, again[name]) for name, tensor in original.unit(unit).items())
    ours, theirs = Tokenizer(read.tokenizer), Tokenizer(original.tokenizer)
    text = "Hello <|im_end|>, wörld 123 — 你好\n\n  def f(x):"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_ids == {2}


@pytest.fixture(scope="module")
def file(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", pristine)


def test_a_beginning_of_text_is_added_where_the_file_wants_it(pristine: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", pristine, tokenizer__ggml__add_bos_token=True)
    tokenizer = Tokenizer(open_checkpoint(path).tokenizer)
    assert tokenizer.encode("x")[0] == 1
    assert tokenizer.encode("x", special=False) == tokenizer.encode("x")[1:]


@pytest.mark.parametrize("name", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2"])
def test_known_pre_tokenizers_keep_all_text(pristine: Path, tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer(open_checkpoint(write_gguf(tmp_path / "m", pristine, tokenizer__ggml__pre=name)).tokenizer)
    text = "It's 12345  o'clock,\n\n\tn’est-ce pas? 你好 🎉 "
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"general__architecture": "mamba"}, "'mamba' is not supported"),
        ({"general__architecture": ["llama"]}, "not supported"),
        ({"llama__block_count": None}, "block_count"),
        ({"llama__block_count": 3}, "no tensor blk.2"),
        ({"llama__embedding_length": 32}, "shape|rotary|heads"),
        ({"llama__attention__head_count": 0}, "heads"),
        ({"llama__rope__scaling__type": "yarn"}, "'yarn' is not supported"),
        ({"llama__rope__dimension_count": 8}, "partial"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer 'llama' is not supported"),
        ({"tokenizer__ggml__pre": "nonsense"}, "'nonsense' is not supported"),
        ({"tokenizer__ggml__tokens": None}, "no list"),
        ({"tokenizer__ggml__tokens": ["a", "a"], "tokenizer__ggml__token_type": [1, 1]}, "inconsistent"),
        ({"tokenizer__ggml__token_type": [1]}, "inconsistent"),
        ({"tokenizer__ggml__merges": ["nothing known"]}, "not in its vocabulary"),
        ({"tokenizer__ggml__merges": ["one two three"]}, "inconsistent"),
        ({"tokenizer__chat_template": "{% if %}"}, "template"),
    ],
)
def test_a_gguf_file_that_cannot_be_used_is_named(
    pristine: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read_all(write_gguf(tmp_path / "model.gguf", pristine, **changes))


@settings(max_examples=60, deadline=None)
@given(keep=st.floats(0, 0.999))
def test_a_gguf_file_cut_short_is_named(file: Path, tmp_path_factory: pytest.TempPathFactory, keep: float) -> None:
    whole = file.read_bytes()
    short = tmp_path_factory.getbasetemp() / "short.gguf"
    short.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CheckpointError):
        read_all(short)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 3000), value=st.binary(min_size=1, max_size=8))
@example(at=255, value=b"\x03")  # three heads, where the rows of q are not a multiple of three
def test_a_gguf_file_with_altered_bytes_loads_or_is_named(
    file: Path, tmp_path_factory: pytest.TempPathFactory, at: int, value: bytes
) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + len(value)] = value
    altered = tmp_path_factory.getbasetemp() / "altered.gguf"
    altered.write_bytes(data)
    try:
        read_all(altered)
    except CheckpointError:
        pass


HEADER = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (b"PK\3\4" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (HEADER, "too early"),
        (HEADER + struct.pack("<QQ", 1 << 63, 0), "claims"),
        (HEADER + struct.pack("<QQ", 0, 1 << 63), "claims"),
        (HEADER + struct.pack("<QQQ", 0, 1, 1 << 62), "string of"),
        (HEADER + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 0, 1 << 60), "claims"),
        (HEADER + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 0, 1 << 20), "too early"),
        (HEADER + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1), "array of the type 9"),
        (HEADER + struct.pack("<QQQ1sI", 0, 1, 1, b"k", 77), "value type 77"),
        (HEADER + struct.pack("<QQQ1sI", 0, 1, 1, b"\xff", 4), "UTF-8"),
        (HEADER + struct.pack("<QQQ1sI", 1, 0, 1, b"t", 1000), "1000 dimensions"),
        (HEADER + struct.pack("<QQQ1sIQQIQ", 1, 0, 1, b"t", 2, 1 << 62, 1 << 62, 0, 0), "beyond the end"),
        (HEADER + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 999, 0), "unknown type"),
    ],
)
def test_absurd_headers_are_named_at_once(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        GgufFile(path)
