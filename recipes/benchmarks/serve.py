"""
Load test of the server: many clients at a time against one client that asks one by one.

    OMP_NUM_THREADS=1 python recipes/benchmarks/serve.py                # random weights, 4 layers × 128, 10,000 items
    OMP_NUM_THREADS=1 python recipes/benchmarks/serve.py --model outputs/scientific/grpo

The server is a process of its own on a free port. Every answer is compared with that of the `Recommender` for the
same history in this process, so a lost answer, or one of another user, fails the test. Sums are rounded differently in
other batches, so two items with nearly equal scores may change places.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from lasar_hf import LasarForGenerativeRec, LasarProcessor, Recommender, SidCatalog
from lasar_hf.data import build_tokenizer
from lasar_hf.onednn import onednn_linear


SERVE = "import sys, json; from lasar_hf.serving import serve; serve(**json.loads(sys.argv[1]))"
ROUNDING = 1e-3  # largest difference of scores between batches; latent steps feed it back


def make_checkpoint(folder: Path, num_items: int, hidden_size: int, levels: int = 4, codes: int = 256) -> None:
    """A checkpoint with random weights and a random catalogue with titles."""
    torch.manual_seed(0)
    titles = [f"Item number {number}" for number in range(num_items)]
    tokenizer = build_tokenizer(titles[:1000], vocab_size=300)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=max(hidden_size // 4, 8), tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    model = LasarForGenerativeRec.from_backbone(AutoModelForCausalLM.from_config(config), tokenizer, levels, codes)
    numbers = torch.tensor(random.Random(0).sample(range(codes**levels), num_items))
    sids = torch.stack([numbers // codes**level % codes for level in range(levels)], dim=1)  # (I, M)
    catalog = SidCatalog(sids, [f"item-{number}" for number in range(num_items)], titles=titles)
    Recommender(model, LasarProcessor(tokenizer, catalog, instruction="")).save_pretrained(folder)


def make_requests(catalog: SidCatalog, count: int, seed: int = 0) -> list[dict]:
    """Requests of different users, with histories of 1 to 20 items."""
    rng = random.Random(seed)
    return [{"history": rng.choices(catalog.item_ids, k=rng.randint(1, 20))} for _ in range(count)]


@contextmanager
def server(**arguments) -> Iterator[str]:
    """A server process; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", SERVE, json.dumps(arguments | {"port": port})]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx2.get(f"{url}/health", timeout=60).raise_for_status()
                break
            except httpx2.TransportError:
                if process.poll() is not None:
                    raise RuntimeError(f"The server ended with exit code {process.returncode}.") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


async def send(url: str, requests: list[dict], clients: int) -> tuple[list[dict], np.ndarray, float]:
    """Answers and seconds of each request, and the seconds of all, with `clients` requests on the way at any time."""
    answers, seconds, numbers = [None] * len(requests), np.zeros(len(requests)), iter(range(len(requests)))

    async def client() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=120) as session:
            for number in numbers:
                start = time.perf_counter()
                answer = await session.post("/recommend", json=requests[number])
                seconds[number] = time.perf_counter() - start
                answers[number] = answer.raise_for_status().json()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers, seconds, time.perf_counter() - start


def is_different(answer: dict, expected: dict) -> bool:
    """Whether two lists differ by more than rounding, in a score or in more than two places."""
    pairs = list(zip(answer["items"], expected["items"], strict=True))
    largest = max(abs(one["score"] - other["score"]) for one, other in pairs)
    num_changed = sum(one["item_id"] != other["item_id"] for one, other in pairs)
    return answer["latent_steps"] != expected["latent_steps"] or largest > ROUNDING or num_changed > 2


def benchmark(args: argparse.Namespace) -> dict:
    """Start the server, send the requests one by one and together, and compare the answers."""
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            make_checkpoint(Path(folder), args.items, args.hidden_size)
        model = args.model or folder
        recommender = Recommender.from_pretrained(model, device=args.device)
        requests = make_requests(recommender.catalog, args.requests)
        start = time.perf_counter()
        with onednn_linear(recommender.model):
            histories = [request["history"] for request in requests]
            expected = recommender.recommend(histories, batch_size=args.max_batch)
        report = {"direct_per_second": len(requests) / (time.perf_counter() - start)}
        options = {"model": model, "device": args.device, "max_batch": args.max_batch, "max_wait_ms": args.max_wait_ms}
        with server(**options) as url:
            asyncio.run(send(url, requests[: 2 * args.clients], args.clients))  # warm up
            for clients, count in ((1, args.requests // 4), (args.clients, args.requests)):
                before = batches(url)
                answers, seconds, total = asyncio.run(send(url, requests[:count], clients))
                users, num_batches = (now - then for now, then in zip(batches(url), before, strict=True))
                p50, p95 = np.percentile(seconds, [50, 95]) * 1000
                report[f"{clients}_clients"] = {
                    "requests": count, "wrong": sum(map(is_different, answers, expected)),
                    "p50_ms": p50, "p95_ms": p95, "per_second": count / total, "users_per_batch": users / num_batches,
                }  # fmt: skip
    return report


def batches(url: str) -> tuple[float, float]:
    """Users and batches that the server has computed."""
    text = httpx2.get(f"{url}/metrics").text
    return tuple(float(text.split(f"\nlasar_batch_size_{name} ")[1].split()[0]) for name in ("sum", "count"))


def show(report: dict) -> None:
    """Print the report as a table."""
    print("| clients | requests | wrong answers | p50 (ms) | p95 (ms) | requests/s | users per batch |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in report.items():
        if isinstance(row, dict):
            print(
                f"| {name.split('_')[0]} | {row['requests']} | {row['wrong']} | {row['p50_ms']:.0f} | "
                f"{row['p95_ms']:.0f} | {row['per_second']:.0f} | {row['users_per_batch']:.1f} |"
            )
    print(f"\nWithout a server, in full batches: {report['direct_per_second']:.0f} requests/s")


def main(argv: list[str]) -> None:
    """Run the load test; wrong answers are an error."""
    parser = argparse.ArgumentParser(description="Load test of the server.")
    parser.add_argument("--model", help="checkpoint; by default one with random weights is made")
    parser.add_argument("--device", default=None)
    parser.add_argument("--items", type=int, default=10_000, help="items of the random catalogue")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the random model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--max_batch", type=int, default=64)
    parser.add_argument("--max_wait_ms", type=float, default=5.0)
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    report = benchmark(args)
    if args.json:
        print(json.dumps(report))
    else:
        show(report)
    if wrong := sum(row["wrong"] for row in report.values() if isinstance(row, dict)):
        raise SystemExit(f"{wrong} answers are not those of the recommender.")


if __name__ == "__main__":
    main(sys.argv[1:])
