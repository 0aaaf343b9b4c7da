"""`switchyard trace` and what reads its files: `trace info` and `bench planner --trace`."""

import json

import harness
import pytest

TINY = harness.FIXTURES / "qwen3_moe"  # two MoE layers of three
PROMPTS = ["The switchyard", "Numbers: 1, 2, 3", "a", "Rails and points and signals and sidings"]


def ok(*args):
    done = harness.run_cli(*args)
    assert done.returncode == 0, done.stderr
    return done


def info(path) -> dict:
    return json.loads(ok("trace", "info", path, "--json").stdout)


def record(tmp_path, *args, lines=None):
    """A trace of some prompts of a file; the last line of the command's stdout."""
    prompts = tmp_path / "prompts.jsonl"
    lines = lines or [json.dumps({"prompt": text, "answer": "unused"}) for text in PROMPTS]
    prompts.write_text("\n".join(lines) + "\n\n")
    out = tmp_path / "tiny.trace"
    done = ok("trace", "--model", TINY, "--out", out, "--prompts", prompts, "--kv-cache-memory", "64MiB", *args)
    return out, done


def test_prompts_of_a_file(tmp_path):
    lines = [json.dumps({"prompt": text}) for text in PROMPTS]
    lines.append(json.dumps({"domain": "x", "messages": [{"role": "user", "content": "Hello"}], "answer": "x"}))
    out, done = record(tmp_path, "--max-tokens", 8, lines=lines)
    assert "recording" in done.stderr, "no progress"
    facts = info(out)
    assert done.stdout.splitlines()[-1].startswith(f"{out}: {facts['rows']} rows of ")
    assert done.stdout.endswith(" 0 rows dropped\n")
    assert facts["sequences"] == len(lines) and facts["unread_bytes"] == 0 and facts["has_weights"] is True
    config = json.loads((TINY / "config.json").read_text())
    assert facts["top_k"] == config["num_experts_per_tok"] and facts["num_experts"] == config["num_experts"]
    assert len(facts["layers"]) == 2
    for layer in facts["layers"]:
        assert layer["copies"] == facts["rows"] * facts["top_k"]
        assert 1 <= layer["max_mean"] <= facts["num_experts"]
        assert facts["top_k"] <= layer["distinct_experts"] <= facts["num_experts"]
    text = ok("trace", "info", out).stdout
    assert f"{facts['rows']} rows of {len(lines)} sequences" in text and "max/mean" in text

    ids_only, _ = record(tmp_path, "--max-tokens", 8, "--ids-only", lines=lines)
    assert info(ids_only) == {**facts, "has_weights": False}


def test_served_traffic(tmp_path, start_server):
    out = tmp_path / "served.trace"
    body = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    usage, texts = 0, []
    with start_server(TINY, "--out", out, "--expert-workers", 3, subcommand="trace", name="trace") as server:
        for prompt in PROMPTS:
            answer = server.post("/v1/completions", {"prompt": prompt, **body}).json()
            texts.append(answer["choices"][0]["text"])
            cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            usage += answer["usage"]["total_tokens"] - 1 - cached  # the last token is not run
    facts = info(out)
    assert facts["sequences"] == len(PROMPTS) and facts["rows"] == usage
    with start_server(TINY, name="untraced") as server:
        for prompt, text in zip(PROMPTS, texts):
            assert server.post("/v1/completions", {"prompt": prompt, **body}).json()["choices"][0]["text"] == text


def test_bench_planner_replays_traces(tmp_path):
    out, _ = record(tmp_path, "--max-tokens", 8)
    again = tmp_path / "again"
    again.mkdir()
    copy = again / 'tiny.trace'
    copy.write_bytes(out.read_bytes())
    args = ("bench", "planner", "--steps", 9, "--json", "--ranks", 2, "--decode-tokens", 3, "--prefill-tokens", 16)
    rows = json.loads(ok(*args, "--trace", out, "--trace", copy).stdout)["rows"]
    names = {row["workload"] for row in rows}
    for trace in ("demo", "tiny", "tiny_2"):
        recorded = [name for name in names if name.startswith(f"{trace}-layer")]
        assert len(recorded) == 4, sorted(names)
    assert any(name.startswith("tiny-layer") and name.endswith("-decode N=8 P=2 tokens=3") for name in names), names
    planners = ("none", "eplb", "llep", "auto")
    assert len(rows) == len(names) * len(planners)
    tau = {(row["workload"], row["planner"]): row["tau"] for row in rows}
    for name in names:
        assert tau[name, "auto"] <= tau[name, "none"] and all((name, planner) in tau for planner in planners)


def test_cut_off_and_broken_files(tmp_path):
    out, _ = record(tmp_path, "--max-tokens", 8)
    whole = out.read_bytes()
    rows = info(out)["rows"]
    out.write_bytes(whole[:-5])
    done = ok("trace", "info", out, "--json")
    cut = json.loads(done.stdout)
    assert "cut off" in done.stderr and cut["unread_bytes"] > 0 and cut["rows"] < rows
    out.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    for args in (("trace", "info", out), ("bench", "planner", "--steps", 9, "--trace", out)):
        done = harness.run_cli(*args)
        assert done.returncode == 1 and "checksum of the block at byte 40" in done.stderr, done.stderr
    out.write_bytes(b"")
    assert harness.run_cli("trace", "info", out).returncode == 1


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "--out"),
        (("--model", TINY), "--out"),
        (("--out", "/tmp/x"), "--model"),
        (("--model", TINY, "--out", "/nowhere/x", "--prompts", harness.DEMO / "eval.jsonl"), "/nowhere/x"),
        (("--model", TINY, "--out", "/tmp/x", "--prompts", TINY / "config.json"), "config.json:1: not an object"),
        (("info",), "FILE"),
        (("info", "/nowhere/x"), "/nowhere/x"),
    ],
)
def test_wrong_usage(args, message):
    done = harness.run_cli("trace", *args)
    assert done.returncode in (1, 2) and message in done.stderr, done.stderr


def test_the_demo_models_trace():
    trace = harness.DEMO / "routing.trace"
    facts = info(trace)
    items = (harness.DEMO / "eval.jsonl").read_text().splitlines()
    assert facts["sequences"] == len(items) and facts["unread_bytes"] == 0
    assert trace.stat().st_size < 300_000
