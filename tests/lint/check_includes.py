#!/usr/bin/env python3
"""Checks the direction of includes between rooms (README.md, "The tree"). Exits 1 and names each offender."""
import pathlib
import re
import subprocess
import sys

ALLOWED = {
    "proto": set(),
    "kernels": set(),
    "comm": {"proto", "kernels:header", "kernels/thread_pool.h"},
    "scheduler": {"comm", "proto", "kernels:header"},
    "worker": {"comm", "kernels", "proto"},
    "server": {"scheduler", "comm", "proto", "kernels:header"},
    "tests": {"proto", "kernels", "comm", "scheduler", "worker", "server"},
}
# Headers of kernels/ without maths: a tensor view, CHECK, the annotated mutex; for benchmarks medians and clocks, for tests seeds and a count of allocations.
HEADERS = {"kernels/tensor.h", "kernels/check.h", "kernels/mutex.h", "kernels/measure.h", "kernels/test_seed.h",
           "kernels/count_allocations.h"}
COMPOSITION_ROOT = ("server/main.cc", "server/cli/", "tests/failing_worker.cc")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')


def main() -> int:
    root = pathlib.Path(__file__).resolve().parents[2]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "*.cc", "*.h", "*.inc", "*.cu"],
        cwd=root, check=True, capture_output=True, text=True).stdout.split()
    errors = []
    for name in listed:
        room = name.split("/")[0]
        if room not in ALLOWED or name.startswith(COMPOSITION_ROOT) or not (root / name).exists():
            continue
        for number, line in enumerate((root / name).read_text().splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            target = match.group(1)
            if target.startswith("server/cli/"):
                errors.append(f'{name}:{number}: only the composition root may include "{target}"')
            other = target.split("/")[0]
            if other == room or other not in ALLOWED:
                continue
            if other in ALLOWED[room] or target in ALLOWED[room] or (f"{other}:header" in ALLOWED[room] and target in HEADERS):
                continue
            errors.append(f'{name}:{number}: {room}/ must not include "{target}"')
    print("\n".join(errors) if errors else f"includes: {len(listed)} files follow the rooms' directions")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
