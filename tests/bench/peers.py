#!/usr/bin/env python3
"""Tokens per second beside llama.cpp and ik_llama.cpp on this machine, in turn, in one run.

Build the peers yourself (their llama-batched-bench; ik's must draw random tokens: as it comes it feeds every sequence one
token for ever, so that all choose the same experts). Each shape needs GGUF files named SHAPE-{bf16,q8_0,q4_0}.gguf of the same
sizes as ours; their values do not matter to speed. Nothing of theirs is part of this project.

Each round runs every program once; ratios are medians over the rounds of our tokens per second to the better peer's in the same
round. Example:
  tests/bench/peers.py --peer llama.cpp=llama/bin/llama-batched-bench --peer ik=ik/bin/llama-batched-bench,-rtr \\
    --gguf models/small --model build/bench/small
"""
import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
WEIGHTS = {"bf16": "none", "q8_0": "int8", "q4_0": "int4"}
# |    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s | …
ROW = re.compile(r"^\| *(\d+) *\| *(\d+) *\| *(\d+) *\| *\d+ *\| *[\d.]+ *\| *([\d.]+) *\| *[\d.]+ *\| *([\d.]+) *\|", re.MULTILINE)


def run(command: list) -> str:
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"bench: exit code {done.returncode}: {' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def ours(args, quantization: str) -> dict:
    command = [args.binary, "bench", "offline", "--json", "--model", args.model, "--quantization", quantization, "--repetitions", 1,
               "--threads", args.threads, "--expert-workers", args.expert_workers, "--prompt-tokens", args.prompt, "--output-tokens", args.output, "--batch", args.batch]
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return {row["batch"]: (row["prefill_tokens_per_second"], row["decode_tokens_per_second"]) for row in json.loads(done.stdout)["rows"]}


def peer(args, program: str, gguf: str) -> dict:
    binary, *flags = program.split(",")
    batches = [int(b) for b in args.batch.split(",")]
    context = max(batches) * ((args.prompt + args.output + 255) // 256 * 256)
    text = run([binary, "-m", gguf, "-t", args.threads, "-c", context, "-b", 2048, "-ub", 512, "-npp", args.prompt, "-ntg", args.output,
                "-npl", args.batch, *flags])
    return {int(b): (float(prefill), float(decode)) for _, _, b, prefill, decode in ROW.findall(text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "build" / "release" / "bin" / "switchyard"))
    parser.add_argument("--peer", action="append", required=True, help="NAME=llama-batched-bench[,FLAG…]; may be given twice")
    parser.add_argument("--gguf", required=True, help="path of the peers' files up to '-bf16.gguf'; NAME=PATH for one peer", action="append")
    parser.add_argument("--model", required=True, help="our checkpoint folder of the same shape")
    parser.add_argument("--weights", default="bf16,q8_0,q4_0")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=24)
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--expert-workers", type=int, default=1, help="of ours (default: 1)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    args = parser.parse_args()
    peers = dict(p.split("=", 1) for p in args.peer)
    files = {name: args.gguf[0] for name in peers}
    files.update(g.split("=", 1) for g in args.gguf if "=" in g)

    rows = []
    for weights in args.weights.split(","):
        rounds = []
        for turn in range(args.rounds):
            print(f"bench: {weights}, round {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
            speeds = {"switchyard": ours(args, WEIGHTS[weights])}
            speeds |= {name: peer(args, program, f"{files[name]}-{weights}.gguf") for name, program in peers.items()}
            rounds.append(speeds)
        for batch in map(int, args.batch.split(",")):
            for index, phase in enumerate(("prefill", "decode")):
                best = [max(r[name][batch][index] for name in peers) for r in rounds]
                rows.append({"weights": weights, "batch": batch, "phase": phase,
                             **{name: statistics.median(r[name][batch][index] for r in rounds) for name in rounds[0]},
                             "ratio": statistics.median(r["switchyard"][batch][index] / b for r, b in zip(rounds, best))})
    if args.json:
        print(json.dumps({"prompt_tokens": args.prompt, "output_tokens": args.output, "rounds": args.rounds, "rows": rows}, indent=1))
        return
    names = ["switchyard", *peers]
    print(f"{args.model}: {args.prompt} prompt tokens, {args.output} drawn, {args.threads} threads, {args.rounds} rounds; tokens per second")
    print("%-7s %5s %-8s" % ("weights", "batch", "phase") + "".join(" %12s" % name for name in names) + "   to the better")
    for row in rows:
        print("%-7s %5d %-8s" % (row["weights"], row["batch"], row["phase"])
              + "".join(" %12.1f" % row[name] for name in names) + " %15.2f" % row["ratio"])


if __name__ == "__main__":
    main()
