"""The real small model through daemons of which none could answer alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from blyan_node.testnet.local import Testnet, wait_until
from tests.support.daemons import EXACT, greedy, publish
from tests.support.models import smollm2_gguf

pytestmark = pytest.mark.e2e

QUESTION = "What is the capital of France?"
PATIENCE = 240.0


def test_a_question_through_each_of_three_nodes(tmp_path: Path) -> None:
    model = smollm2_gguf()
    with Testnet(tmp_path / "net", nodes=3, memory_limit="300MiB", settings=EXACT) as net:
        publish(net.node(0).client, model, "smollm2")
        wait_until(net.serving, timeout=PATIENCE, what="all nodes serving")
        expected = greedy(model, tmp_path / "units", QUESTION, 24)
        assert "Paris" in expected.text
        for node in net.nodes:
            answer = node.client.chat(QUESTION, max_tokens=24, temperature=0)
            assert answer["text"] == expected.text
            assert len(answer["nodes_used"]) > 1
            assert answer["tokens_used"] == expected.prompt_tokens + expected.completion_tokens
