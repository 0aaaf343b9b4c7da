#!/usr/bin/env python3
"""What several expert workers cost: one process with one expert worker, one with two, and two expert workers as processes.

The servers (all hold the model in memory at once) take turns at the same load (requests at once that each draw --tokens ids
from 16 random ones, over HTTP), so that what else the machine does hits all alike. Everything runs twice, the second time with the
servers loaded in the opposite order: which part of a virtual machine's memory a server got can be worth 8 % of its speed. The ratios
are medians over the rounds of both, of tokens per second to the server with one expert worker in the same round.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))


def tokens_per_second(server, model: str, at_once: int, tokens: int, rng: random.Random) -> float:
    def one(prompt: list[int]) -> int:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return server.request("POST", "/v1/completions", body).json()["usage"]["completion_tokens"]

    prompts = [[rng.randrange(1000) for _ in range(16)] for _ in range(at_once)]
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        total = sum(pool.map(one, prompts))
    return total / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "build" / "release" / "bin" / "switchyard"))
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"), help="checkpoint folder (default: the demo model)")
    parser.add_argument("--quantization", default="none", help="none, int8 or int4 (default: none)")
    parser.add_argument("--requests", default="1,4,16", help="requests at once (default: 1,4,16)")
    parser.add_argument("--tokens", type=int, default=96, help="drawn by each request (default: 96)")
    parser.add_argument("--rounds", type=int, default=5, help="for each of both orders (default: 5)")
    parser.add_argument("--layouts", default="two,processes", help="beside one expert worker: two (in one process), processes (default: both)")
    parser.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    args = parser.parse_args()
    os.environ["SWITCHYARD_BIN"] = args.binary
    import harness  # reads SWITCHYARD_BIN

    shapes = {
        "1 expert worker": ("--expert-workers", 1),
    }
    layouts = {"two": ("2 expert workers", ("--expert-workers", 2)), "processes": ("3 processes", ("--expert-workers", 2, "--processes"))}
    for layout in args.layouts.split(","):
        if layout not in layouts:
            parser.error(f"--layouts has \"{layout}\"; it takes two and processes")
        shapes[layouts[layout][0]] = layouts[layout][1]
    common = ("--max-model-len", 64 + args.tokens, "--kv-cache-memory", "256MiB", "--served-model-name", "m", "--quantization", args.quantization)
    rng = random.Random(1)
    requests = [int(n) for n in args.requests.split(",")]
    speeds: dict[int, dict[str, list[float]]] = {n: {name: [] for name in shapes} for n in requests}
    for half, order in enumerate((list(shapes), list(reversed(shapes)))):
        servers: dict[str, harness.Server] = {}
        try:
            for i, name in enumerate(order):
                servers[name] = harness.Server(args.model, *shapes[name], *common, name=f"bench.workers.{half}.{i}")
            for at_once in requests:
                for turn in range(args.rounds + 1):
                    print(f"\rbench: {order[0]} loaded first, {at_once} at once, round {turn} of {args.rounds} ", end="", file=sys.stderr, flush=True)
                    for name, server in servers.items():
                        speed = tokens_per_second(server, "m", at_once, args.tokens, rng)
                        if turn > 0:  # the first warms up
                            speeds[at_once][name].append(speed)
        finally:
            for server in servers.values():
                server.stop()
            print(file=sys.stderr)
    rows = []
    for at_once, by_name in speeds.items():
        for name, values in by_name.items():
            ratios = [value / of for value, of in zip(values, by_name["1 expert worker"])]
            rows.append({"workers": name, "requests": at_once, "tokens_per_second": statistics.median(values),
                         "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)})
    if args.json:
        print(json.dumps({"rows": rows}, indent=1))
        return
    print("%-17s %9s %10s %7s %13s" % ("workers", "requests", "tokens/s", "ratio", "of the rounds"))
    for r in rows:
        print("%-17s %9d %10.1f %7.2f %6.2f-%.2f" % (
            r["workers"], r["requests"], r["tokens_per_second"], r["ratio"], r["ratio_min"], r["ratio_max"]))


if __name__ == "__main__":
    main()
