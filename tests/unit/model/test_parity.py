"""Our layers against transformers: logits and greedy text, on tiny random models and on the real small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from blyan_node.inference.generation import Message
from blyan_node.model.importing import open_checkpoint
from blyan_node.model.shard import Work
from blyan_node.model.tokenizer import Tokenizer
from tests.support.models import import_units, smollm2_gguf, smollm2_transformers, tiny_checkpoint
from tests.unit.model.conftest import Imported
from tests.unit.model.walk import GREEDY, Pipeline

# The stated tolerance on fp32 logits. Measured on the real model: 4.3e-4 at worst over prompts of up to 257 tokens.
TOLERANCE = 1e-3

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PROMPTS = (
    "The quick brown fox jumps over the lazy dog. In 1969, men walked on the",
    "def fibonacci(n):\n    ",
    "Message in a bottle: «",
)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "num_key_value_heads": 8}),
        ("qwen2", {"attention_bias": None, "rope_theta": 1e6}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": False, "attention_bias": True, "rope_theta": 1e6}),
    ],
)
def test_a_tiny_model_equals_transformers(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_checkpoint(tmp_path, family, seed=3, **changes)
    checkpoint = open_checkpoint(path)
    model = Imported(checkpoint.spec, checkpoint.tokenizer, import_units(checkpoint, tmp_path / "units"))
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train(False)
    ids = torch.randint(0, 1000, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Pipeline([model.shard()]).logits(ids), expected, atol=TOLERANCE, rtol=0)
    bf16 = Pipeline([model.shard(dtype="bfloat16")]).logits(ids).float()
    with torch.inference_mode():
        expected_bf16 = reference.bfloat16()(torch.tensor([ids])).logits[0].float()
    # In bf16 both round; ours may not be farther from fp32 than transformers' own, by more than a little.
    assert (bf16 - expected).abs().mean() < 1.2 * (expected_bf16 - expected).abs().mean()


@pytest.fixture(scope="module")
def reference() -> Any:
    return smollm2_transformers()


@pytest.mark.xdist_group("smollm2")
def test_the_real_model_equals_transformers(smollm2: Imported, reference: Any) -> None:
    tokenizer, shard = Tokenizer(smollm2.tokenizer), smollm2.shard()
    for prompt in PROMPTS:
        ids = list(tokenizer.encode(prompt))
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0]
            text = reference.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0].tolist()
        session = Pipeline([shard])
        torch.testing.assert_close(session.logits(ids), expected, atol=TOLERANCE, rtol=0)
        generated = Pipeline([shard]).generate(ids, len(text) - len(ids))
        assert tokenizer.decode(generated) == tokenizer.decode(text[len(ids) :])


@pytest.mark.xdist_group("smollm2")
@pytest.mark.parametrize("starts", [(0, 8, 16, 24), (0, 1, 31)])
def test_the_real_model_in_shards_equals_the_whole(smollm2: Imported, starts: tuple[int, ...]) -> None:
    ids = Tokenizer(smollm2.tokenizer).encode(PROMPTS[0])
    shards = [smollm2.shard(first, following - 1) for first, following in zip(starts, [*starts[1:], 32], strict=True)]
    one, many = Pipeline([smollm2.shard()]), Pipeline(shards)
    assert torch.equal(one.logits(ids), many.logits(ids))
    assert one.generate([28], 5) == many.generate([28], 5)


@pytest.mark.xdist_group("smollm2")
def test_the_real_model_in_a_batch_and_in_chunks_stays_within_the_tolerance(smollm2: Imported) -> None:
    tokenizer, shard = Tokenizer(smollm2.tokenizer), smollm2.shard()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    alone = [Pipeline([shard]).logits(prompt) for prompt in prompts]
    caches = [shard.open(bytes([index]), 64) for index in range(3)]
    together = shard.logits([Work(cache, 0, prompt) for cache, prompt in zip(caches, prompts, strict=True)])
    chunked = Pipeline([shard])
    pieces = torch.cat([chunked.logits(prompts[0][:7]), chunked.logits(prompts[0][7:])])
    for got, expected in zip((*together, pieces), (*alone, alone[0]), strict=True):
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


CORPUS = (
    "Hello, world! It's 12:45 — don't we'll I'M THEY'RE",
    "1 23 456 7890 3.14159 1,000,000 0x1F600 v2.0.1 ½ Ⅷ ١٢٣ १२३",
    "    four spaces\tand\ttabs\n\n\nthree newlines \r\n crlf   trailing   ",
    "def f(x: int) -> str:\n    return f'{x!r:>10}' # comment\n\tif x<=3 and y!=4: pass",
    "Größe, naïve café, Łódź, señor, İstanbul, ﬁ ligature, ẞ",
    "Привет, мир! Καλημέρα κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया",
    "你好，世界。こんにちは世界。안녕하세요 세계. 𠜎𠜱",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 vs \u00e9 \u200b\u200d\u2060\ufeff\u00a0\u3000\u2028",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start <|unknown|> <file_sep><repo_name>",
    "http://example.com/a?b=c&d=%20#frag user@host.org C:\\path\\to /usr/bin/env $HOME ${X}",
    "\x00\x01\x07\x1b[31m\x7f\u0080\u009f",
    "a" * 300 + " " * 100 + "\n" * 50 + "!?" * 40,
    "",
    " ",
    "\ud7ff\ue000\uffff\U0010ffff",
)


@pytest.mark.xdist_group("smollm2")
def test_the_real_tokenizer_equals_transformers(smollm2: Imported) -> None:
    from transformers import AutoTokenizer

    path = smollm2_gguf()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The model's own tokenizer.json splits digits one by one; reading GGUF files, transformers leaves that out.
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = reference.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    ours = Tokenizer(smollm2.tokenizer)
    for text in CORPUS:
        ids = reference(text).input_ids
        assert list(ours.encode(text)) == ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    chat = [Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Bye")]
    dicts = [{"role": message.role, "content": message.content} for message in chat]
    assert ours.render(chat) == reference.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    assert ours.decode(tuple(ours.eos_ids)) == ""
    assert ours.eos_ids == set(ours.encode("<|im_end|>"))


@pytest.mark.xdist_group("smollm2")
def test_the_real_model_answers_a_chat_and_stops(smollm2: Imported) -> None:
    tokenizer, session = Tokenizer(smollm2.tokenizer), Pipeline([smollm2.shard()])
    prompt = tokenizer.encode(tokenizer.render([Message("user", "What is the capital of France?")]), special=False)
    answer = [session.next(prompt, GREEDY)]
    while answer[-1] not in tokenizer.eos_ids and len(answer) < 40:
        answer.append(session.next(answer[-1:], GREEDY))
    assert answer[-1] in tokenizer.eos_ids
    assert "Paris" in tokenizer.decode(answer)
