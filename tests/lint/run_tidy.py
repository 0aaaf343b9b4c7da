#!/usr/bin/env python3
"""Runs clang-tidy-16 (checks of .clang-tidy, plus clang's thread-safety analysis) over files, a few at a time.

Files that did not change since they last passed (same content of the file and of every header of ours) are not run
again: the digests are kept in the build folder.
"""
import argparse
import concurrent.futures
import hashlib
import json
import pathlib
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", required=True, help="build folder with compile_commands.json made for clang")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()

    root = pathlib.Path.cwd()
    commands = json.loads((pathlib.Path(args.build) / "compile_commands.json").read_text())
    known = {str(pathlib.Path(c["file"]).resolve().relative_to(root)) for c in commands
             if pathlib.Path(c["file"]).resolve().is_relative_to(root)}
    files = [f for f in args.files if f in known]

    listed = subprocess.run(["git", "ls-files", "--", "*.h", "*.inc", ".clang-tidy"],
                            check=True, capture_output=True, text=True).stdout.split()
    headers = hashlib.sha256()
    for name in sorted(listed):
        if pathlib.Path(name).exists():
            headers.update(pathlib.Path(name).read_bytes())
    stamp_path = pathlib.Path(args.build) / "tidy_passed.json"
    passed = json.loads(stamp_path.read_text()) if stamp_path.exists() else {}

    def digest(name: str) -> str:
        return hashlib.sha256(pathlib.Path(name).read_bytes() + headers.digest()).hexdigest()

    todo = [f for f in files if passed.get(f) != digest(f)]

    def run(name: str):
        return name, subprocess.run(
            ["clang-tidy-16", "-p", args.build, "--quiet", "--extra-arg=-Wthread-safety", name],
            capture_output=True, text=True)

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for done, (name, result) in enumerate(pool.map(run, todo), 1):
            ok = result.returncode == 0
            print(f"[{done}/{len(todo)}] {'ok  ' if ok else 'FAIL'} {name}", file=sys.stderr, flush=True)
            if ok:
                passed[name] = digest(name)
            else:
                failed += 1
                print(result.stdout + result.stderr, flush=True)
    stamp_path.write_text(json.dumps(passed, indent=1, sort_keys=True))
    print(f"tidy: {len(files)} files, {len(todo)} run, {failed} with findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
