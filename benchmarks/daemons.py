"""Real daemons on loopback with the real small model, beside the limits measured in the same run.

``python -m benchmarks.daemons``: batch-1 decode through one and four daemons against one process that holds all layers
(one thread each), sessions at once, time from start to serving, what an idle daemon costs, and ``--help``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import psutil
import torch

from benchmarks._common import load_average, median, table
from blyan_node.chain.blobs import BlobStore
from blyan_node.inference.generation import Message, Sampling
from blyan_node.model.importing import open_checkpoint, write_unit
from blyan_node.model.shard import Shard, Token, Work, configure
from blyan_node.model.tokenizer import Tokenizer
from blyan_node.testnet.demo_model import demo_model_path
from blyan_node.testnet.local import Testnet, wait_until

FLOAT32 = {"BLYAN_DTYPE": "float32"}  # as the process that they are compared with, and what memory limits are sized for
QUESTION = "Tell me a long story about a lighthouse keeper."
TOKENS = 64
ROUNDS = 5
MODEL = "smollm2"


def one_process(shard: Shard, prompt: list[int]) -> float:
    """Tokens per second of greedy decoding after the first token."""
    cache = shard.open(os.urandom(16), len(prompt) + TOKENS + 1)
    tokens, position, began = tuple(prompt), 0, 0.0
    for step in range(TOKENS):
        (result,) = shard.step([Work(cache, position, tokens=tokens, sampling=Sampling(temperature=0))])
        assert isinstance(result, Token)
        position, tokens = position + len(tokens), (result.id,)
        if step == 0:
            began = time.perf_counter()
    cache.close()
    return (TOKENS - 1) / (time.perf_counter() - began)


def through(net: Testnet, node: int) -> float:
    """The same through the API of a node, read from the stream."""
    question = [{"role": "user", "content": QUESTION}]
    with net.node(node).client.stream(question, model=MODEL, max_tokens=TOKENS, temperature=0) as chunks:
        stamps = [
            time.perf_counter() for chunk in chunks if chunk["choices"] and chunk["choices"][0]["delta"].get("content")
        ]
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


def at_once(net: Testnet, sessions: int) -> float:
    """Tokens per second of all sessions together, prompts included in the time."""
    done: list[int] = []

    def one(index: int) -> None:
        client = net.node(index % len(net.nodes))
        fresh = type(client)(client.index, client.data_dir).client  # a client serves one thread
        done.append(fresh.chat(f"{QUESTION} {index}", model=MODEL, max_tokens=TOKENS, temperature=0)["tokens_used"])
        fresh.close()

    threads = [threading.Thread(target=one, args=(index,)) for index in range(sessions)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - began)


def publish(net: Testnet) -> None:
    with net.node(0).client.import_model(str(demo_model_path()), MODEL) as progress:
        for _ in progress:
            pass
    wait_until(
        lambda: (
            all(node.client.status()["state"] == "serving" for node in net.nodes)
            and all(not node.client.models()[0]["missing"] for node in net.nodes)
        ),
        timeout=240,
        what="every node serves",
    )
    stored = len(net.node(0).client.status()["models"][0]["units"])
    wait_until(
        lambda: all(len(node.client.status()["models"][0]["stored"]) == stored for node in net.nodes),
        timeout=600,
        what="every node stores all, so that nothing is copied while we measure",
    )


def decode(net: Testnet, shard: Shard, prompt: list[int], rows: list[list[str]], label: str) -> None:
    daemons, local = [], []
    for round_ in range(ROUNDS):
        local.append(one_process(shard, prompt))
        daemons.append(through(net, round_ % len(net.nodes)))
    ratio = median(daemons) / median(local)
    rows.append(
        [f"{label}, decode, batch 1", f"{median(daemons):.1f} tok/s", f"{median(local):.1f} tok/s", f"{ratio:.2f}×"]
    )


def starting(net: Testnet, rows: list[list[str]]) -> None:
    """Kill and start a node whose blobs are on disk; beside it the imports and the hashing of its blobs alone."""
    node = net.node(3)
    status = node.client.status()["models"][0]
    roots = status["served"]
    net.kill(3)
    began = time.perf_counter()
    net.restart(3)
    wait_until(lambda: node.client.status()["state"] == "serving", timeout=120, what="the node serves again")
    took = time.perf_counter() - began
    began = time.perf_counter()
    imports = "import torch, libp2p, plyvel, tokenizers, safetensors, hypercorn.trio, blyan_node.node"
    subprocess.run([sys.executable, "-c", imports], check=True)
    store = BlobStore(node.data_dir / "blobs")
    share = sorted(store.refs(), key=lambda ref: ref.size, reverse=True)
    for ref in share[1 : 1 + len(roots)]:
        store.verify(ref)
    alone = time.perf_counter() - began
    rows.append(
        [
            "start to serving, weights on disk",
            f"{took:.1f} s",
            f"{alone:.1f} s imports + hashing",
            f"{took / alone:.2f}×",
        ]
    )


def idle(net: Testnet, rows: list[list[str]]) -> None:
    processes = [psutil.Process(running.pid) for node in net.nodes if (running := node.running())]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    began = time.perf_counter()
    time.sleep(20)
    spent = [sum(process.cpu_times()[:2]) - old for process, old in zip(processes, before, strict=True)]
    share = median(spent) / (time.perf_counter() - began)
    probe = (
        "import os, torch, libp2p, plyvel, tokenizers, safetensors, hypercorn.trio, blyan_node.node, psutil;"
        "print(psutil.Process().memory_info().rss)"
    )
    bare = int(subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True).stdout)
    rows.append([f"idle daemon, {len(processes) - 1} neighbours", f"{100 * share:.1f} % of a core", "target < 2 %", ""])
    private = median([process.memory_info().rss for process in processes])
    rows.append(
        ["resident, weights included", f"{private / 2**20:.0f} MiB", f"{bare / 2**20:.0f} MiB imports alone", ""]
    )


def help_time(rows: list[list[str]]) -> None:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "blyan_node", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    rows.append(["blyan-node --help", f"{median(times):.2f} s", "target < 0.4 s", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--daemons", type=int, nargs="*", default=[1, 4])
    arguments = parser.parse_args()
    configure(1)
    rows: list[list[str]] = []
    help_time(rows)
    checkpoint = open_checkpoint(demo_model_path())
    tokenizer = Tokenizer(checkpoint.tokenizer)
    prompt = list(tokenizer.encode(tokenizer.render((Message("user", QUESTION),)), special=False))
    with tempfile.TemporaryDirectory() as scratch:
        blobs = {}
        for unit in checkpoint.spec.units:
            blobs[unit] = Path(scratch) / unit
            write_unit(checkpoint.unit(unit), blobs[unit])
        with torch.inference_mode():
            shard = Shard.load(checkpoint.spec, 0, len(checkpoint.spec.units) - 1, blobs)
        for count in arguments.daemons:
            limit = None if count == 1 else "300MiB"
            with Testnet(Path(scratch) / f"net-{count}", nodes=count, memory_limit=limit, settings=FLOAT32) as net:
                publish(net)
                decode(net, shard, prompt, rows, f"{count} daemon{'s' * (count > 1)}")
                rows += [[f"{count} daemons, {n} at once", f"{at_once(net, n):.1f} tok/s", "", ""] for n in (8, 32)]
                if count > 1:
                    idle(net, rows)
                    starting(net, rows)
    print(load_average())
    print(table(["what", "measured", "beside", "ratio"], rows))


if __name__ == "__main__":
    main()
