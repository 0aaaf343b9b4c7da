#!/usr/bin/env python3
"""Runs one Python test file for ctest, with the packages of build/venv.

Anything that would keep the file's tests from running is a failure that says which tests did not
run: no venv, a missing or other package version, no server binary, a test that skips itself.
Standard library only.

  run_tests.py --binary build/release/bin/switchyard --venv build/venv test_http.py [PYTEST ARGUMENTS]
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


def pinned() -> dict[str, str]:
    lines = (HERE.parent / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def what_is_missing(venv: Path, binary: Path) -> list[str]:
    python = venv / "bin" / "python"
    problems = []
    if not os.access(binary, os.X_OK):
        problems.append(f"no server binary at {binary}: build the target `switchyard`")
    if not os.access(python, os.X_OK):
        return problems + [f"no Python environment at {venv}: run ./dev setup"]
    wanted = pinned()
    shown = subprocess.run([python, "-c", VERSIONS, *wanted], capture_output=True, text=True)
    if shown.returncode != 0:
        return problems + [f"{python} does not work: {shown.stderr.strip()}"]
    found = __import__("json").loads(shown.stdout)
    for name, version in wanted.items():
        if found[name] != version:
            problems.append(f"package {name} {version} is needed, found {found[name] or 'none'}: run ./dev setup")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("file", help="test file beside this script")
    args, rest = parser.parse_known_args()
    path = HERE / args.file
    problems = what_is_missing(args.venv, args.binary)
    if problems:
        tests = re.findall(r"^def (test_\w+)", path.read_text(), re.M)
        print(f"FAILED: the {len(tests)} tests of {args.file} did not run: {', '.join(tests)}")
        for problem in problems:
            print(f"  because {problem}")
        return 1
    environment = dict(os.environ, SWITCHYARD_BIN=str(args.binary.resolve()), PYTHONDONTWRITEBYTECODE="1")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        environment.pop(name, None)  # the servers under test are on this machine
    command = [args.venv.absolute() / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), *rest]
    return subprocess.run(command, env=environment, cwd=HERE).returncode


if __name__ == "__main__":
    sys.exit(main())
