#!/usr/bin/env python3
"""Writes spill_instances.txt: small instances of regime C with the best solutions that CBC finds.

The model is that of comm/plan_costs.h: a rank pays max(read, tokens) for every expert that it computes (a token costs 1)
and `move` for every expert that it sends or gets; homes send, a rank has `slots` foreign slots; minimise the most that a
rank pays. Tokens are continuous, so `best` may be a fraction of a token below what whole tokens allow.

  spill_instances.py [--count 200] [--seconds 60] [--seed 1] > spill_instances.txt     (needs cbc in PATH)
"""
import argparse
import math
import os
import random
import subprocess
import tempfile


def instance(rng):
    ranks = rng.choice([3, 3, 4, 4, 5])
    experts = rng.randint(2 * ranks, 3 * ranks)
    skew = rng.choice([0.3, 0.6, 1.0, 1.2])
    total = rng.choice([4000, 20000, 100000])
    weights = [(e + 1) ** -skew * rng.uniform(0.7, 1.3) for e in range(experts)]
    rng.shuffle(weights)
    tokens = [int(total * w / sum(weights)) for w in weights]
    homes = [[e * ranks // experts] for e in range(experts)]
    for e in range(experts):
        if rng.random() < 0.15:
            homes[e] = sorted(rng.sample(range(ranks), 2))
    mean = total // ranks
    move = max(1, int(mean * rng.choice([0.01, 0.03, 0.1])))
    return {"ranks": ranks, "slots": rng.randint(1, 3), "read": int(move * rng.choice([0.1, 0.3])), "move": move,
            "tokens": tokens, "homes": homes}


def write_lp(inst, path):
    ranks, tokens, homes = range(inst["ranks"]), inst["tokens"], inst["homes"]
    experts = [e for e in range(len(tokens)) if tokens[e] > 0]
    rows, binaries = [], []
    load = {p: [] for p in ranks}
    for e in experts:
        rows.append(" + ".join(f"q_{e}_{p}" for p in ranks) + f" = {tokens[e]}")
        for p in ranks:
            binaries.append(f"y_{e}_{p}")
            rows.append(f"q_{e}_{p} - {tokens[e]} y_{e}_{p} <= 0")
            rows.append(f"c_{e}_{p} - q_{e}_{p} >= 0")
            rows.append(f"c_{e}_{p} - {inst['read']} y_{e}_{p} >= 0")
            load[p].append(f"c_{e}_{p}")
            if p not in homes[e]:
                sent = [f"z_{e}_{s}_{p}" for s in homes[e]]
                binaries += sent
                rows.append(" + ".join(sent) + f" - y_{e}_{p} = 0")
                load[p].append(f"{inst['move']} y_{e}_{p}")
                for s in homes[e]:
                    load[s].append(f"{inst['move']} z_{e}_{s}_{p}")
    for p in ranks:
        rows.append(" + ".join(load[p]) + " - tau <= 0")
        foreign = [f"y_{e}_{p}" for e in experts if p not in homes[e]]
        if foreign:
            rows.append(" + ".join(foreign) + f" <= {inst['slots']}")
    bound = math.ceil(sum(tokens) / inst["ranks"])
    with open(path, "w") as f:
        f.write("Minimize\n obj: tau\nSubject To\n")
        for i, row in enumerate(rows):
            f.write(f" r{i}: {row}\n")
        f.write(f"Bounds\n tau >= {bound}\nBinary\n " + "\n ".join(binaries) + "\nEnd\n")


def solve(inst, seconds):
    with tempfile.TemporaryDirectory() as folder:
        lp, out = os.path.join(folder, "a.lp"), os.path.join(folder, "a.sol")
        write_lp(inst, lp)
        subprocess.run(["cbc", lp, "-sec", str(seconds), "-ratio", "0.001", "-solve", "-solution", out], check=True,
                       stdout=subprocess.DEVNULL)
        first = open(out).readline()
    return float(first.split()[-1]), first.startswith("Optimal")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    version = subprocess.run(["cbc", "-quit"], capture_output=True, text=True).stdout
    version = next(line for line in version.splitlines() if "Version" in line).strip()
    print(f"# spill_instances.py --count {args.count} --seconds {args.seconds} --seed {args.seed}; CBC {version}")
    print("# experts ranks slots read move best proven | tokens of each expert | homes of each expert, comma-separated")
    for _ in range(args.count):
        inst = instance(rng)
        best, proven = solve(inst, args.seconds)
        print(len(inst["tokens"]), inst["ranks"], inst["slots"], inst["read"], inst["move"], math.floor(best + 1e-6),
              int(proven), *inst["tokens"], *(",".join(map(str, homes)) for homes in inst["homes"]), flush=True)


if __name__ == "__main__":
    main()
