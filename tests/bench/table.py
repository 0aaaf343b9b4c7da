#!/usr/bin/env python3
"""`./dev bench`: one table of the speed on this machine.

The demo model, a small shape (hidden 512, 8 layers, 16 experts top-4, width 256) and OLMoE-1B-7B's shape, both with random
weights, in bfloat16, int8 and int4: tokens per second of prefill and decode, and the share of the bandwidth bound, all from
`switchyard bench offline --json`. Then the instructions per decoded token of the AVX2 path on the demo model, counted by
callgrind: these do not depend on what else the machine does. The shapes' weights are kept in build/bench (14 GB for OLMoE).
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPES = ROOT / "tests" / "bench" / "shapes"
WEIGHTS = ROOT / "build" / "bench"
GIB = 1 << 30
OLMOE_GIB = {"disk": 14, "memory": 16}


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"bench: exit code {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def available_memory() -> int:
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def lacking_for_olmoe() -> str:
    """Why the large shape cannot run here; empty: it can."""
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    memory = available_memory()
    if memory < OLMOE_GIB["memory"] * GIB:
        return f"needs {OLMOE_GIB['memory']} GiB of available memory, there are {memory / GIB:.1f}"
    free = shutil.disk_usage(WEIGHTS).free
    if not (WEIGHTS / "olmoe_1b_7b" / "config.json").exists() and free < OLMOE_GIB["disk"] * GIB:
        return f"needs {OLMOE_GIB['disk']} GiB of disk under {WEIGHTS}, there are {free / GIB:.1f}"
    return ""


def weights(binary: str, shape: str) -> pathlib.Path:
    """The folder of a shape's random weights, made when it is not there yet (config.json is written last)."""
    folder = WEIGHTS / shape
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        say(f"making random weights in {folder}")
        run(binary, "synth", "--config", SHAPES / f"{shape}.json", "--out", folder, "--dtype", "bfloat16")
    return folder


def measure(binary: str, name: str, folder: pathlib.Path, weight_type: str, options: dict) -> list[dict]:
    say(f"{name}, {weight_type}")
    quantization = "none" if weight_type == "bf16" else weight_type
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    report = json.loads(run(binary, "bench", "offline", "--json", "--model", folder, "--quantization", quantization, *flags))
    return [{"model": name, "weights": weight_type, "numerics_id": report["numerics_id"], **row} for row in report["rows"]]


def instructions_per_token(binary: str, folder: pathlib.Path) -> float:
    """Of one thread on the AVX2 path: callgrind's counts for two lengths, so that loading and prefill cancel out."""
    counts = []
    lengths = (9, 41)
    with tempfile.TemporaryDirectory() as out:
        for tokens in lengths:
            say(f"callgrind, {tokens} tokens")
            command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}/{tokens}", binary, "bench", "offline", "--json",
                       "--model", folder, "--isa", "avx2", "--threads", "1", "--prompt-tokens", "16", "--output-tokens", tokens,
                       "--batch", "1", "--repetitions", "1"]
            subprocess.run([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
            totals = re.search(r"^(?:totals|summary): (\d+)", pathlib.Path(out, str(tokens)).read_text(), re.MULTILINE)
            counts.append(int(totals.group(1)))
    return (counts[1] - counts[0]) / (lengths[1] - lengths[0])


def print_table(rows: list[dict]) -> None:
    head = ("model", "weights", "batch", "prefill tok/s", "GFLOP/s", "decode tok/s", "MB a step", "of bandwidth", "probe GB/s")
    print(("%-8s %-7s %5s" + " %13s" * 6) % head)
    for r in rows:
        print("%-8s %-7s %5d %13.1f %13.1f %13.1f %13.1f %12.0f%% %13.1f" % (
            r["model"], r["weights"], r["batch"], r["prefill_tokens_per_second"], r["prefill_gflops"], r["decode_tokens_per_second"],
            r["decode_bytes_per_step"] / 1e6, 100 * r["decode_share_of_bound"], r["probe_gb_per_second"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "build" / "release" / "bin" / "switchyard"))
    parser.add_argument("--models", default="demo,small,olmoe", help="of demo, small and olmoe (default: all)")
    parser.add_argument("--weights", default="bf16,int8,int4", help="of bf16, int8 and int4 (default: all)")
    parser.add_argument("--instructions", action=argparse.BooleanOptionalAction, default=True, help="count them with callgrind")
    parser.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    args = parser.parse_args()
    start = time.monotonic()
    quick = {"prompt-tokens": 128, "output-tokens": 64, "batch": "1,4,16", "repetitions": 3}
    cases = {"demo": (lambda: ROOT / "models" / "demo", quick),
             "small": (lambda: weights(args.binary, "small"), quick),
             "olmoe": (lambda: weights(args.binary, "olmoe_1b_7b"), {**quick, "output-tokens": 24, "repetitions": 2})}
    rows = []
    missing = ""
    for name in args.models.split(","):
        if name not in cases:
            parser.error(f"--models: {name!r} is not one of {', '.join(cases)}")
        if name == "olmoe" and (missing := lacking_for_olmoe()):
            say(f"OLMoE-1B-7B's shape is left out: {missing}")
            continue
        folder, options = cases[name]
        for weight_type in args.weights.split(","):
            rows += measure(args.binary, name, folder(), weight_type, options)
    counted = instructions_per_token(args.binary, ROOT / "models" / "demo") if args.instructions else None
    if args.json:
        print(json.dumps({"rows": rows, "demo_instructions_per_token_avx2": counted, "left_out": missing or None}, indent=1))
    else:
        print_table(rows)
        if missing:
            print(f"OLMoE-1B-7B's shape was left out: {missing}")
        if counted is not None:
            print(f"demo, AVX2 path, one thread: {counted / 1e6:.2f} million instructions per decoded token (callgrind)")
        print(f"{time.monotonic() - start:.0f} s, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
