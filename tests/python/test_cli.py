"""The subcommands that end by themselves: generate, inspect, synth, bench; what they print and where."""

import json
import subprocess

import harness
import pytest
from tokenizers import Tokenizer

SUBCOMMANDS = ("serve", "generate", "eval", "inspect", "synth", "bench", "trace")
TINY = harness.FIXTURES / "qwen3_moe"


def ok(*args, **kwargs) -> subprocess.CompletedProcess:
    done = harness.run_cli(*args, **kwargs)
    assert done.returncode == 0, done.stderr
    return done


def test_version_and_help():
    assert ok("--version").stdout.strip()
    text = ok("--help").stdout
    assert all(name in text for name in SUBCOMMANDS)
    for name in SUBCOMMANDS:
        assert len(ok(name, "--help").stdout.splitlines()) > 5, f"{name} --help does not teach"
    assert "offline" in ok("bench", "--help").stdout
    assert "--prompt-tokens" in ok("bench", "offline", "--help").stdout
    serve = ok("serve", "--help").stdout
    for flag in (
        "--model --host --port --grpc-port --served-model-name --attention-workers --expert-workers --threads --device "
        "--dtype --max-model-len --kv-cache-memory --max-num-seqs --max-num-batched-tokens --max-queued-requests "
        "--api-key --chat-template --seed --log-format --shutdown-timeout"
    ).split():
        assert flag in serve, f"{flag} is missing"


def test_wrong_usage():
    for args in ((), ("nothing",), ("generate",), ("serve",), ("synth", "--config", "/nowhere.json", "--out", "/tmp/x")):
        done = harness.run_cli(*args)
        assert done.returncode not in (0, -6, -11) and done.stderr, args


def test_generate_prints_text_and_speed():
    args = ("generate", "--model", TINY, "--prompt", "The switchyard", "--max-tokens", 16, "--temperature", 0)
    first, second = ok(*args), ok(*args)
    assert "tokens per second" in (first.stdout + first.stderr).lower().replace("tokens/s", "tokens per second")
    assert first.stdout.strip()

    def text(done):
        return done.stdout.splitlines()[0]

    assert text(first) == text(second)


def test_generate_equals_the_server(start_server):
    body = {"prompt": "The switchyard", "max_tokens": 16, "temperature": 0}
    with start_server(TINY, name="same") as server:
        expected = server.post("/v1/completions", body).json()["choices"][0]["text"]
    done = ok("generate", "--model", TINY, "--prompt", "The switchyard", "--max-tokens", 16, "--temperature", 0)
    assert expected in done.stdout


def test_inspect_tells_the_checkpoint():
    text = ok("inspect", TINY).stdout
    assert "qwen3_moe" in text.lower().replace("-", "_")
    for fact in ("parameters", "active", "attention", "expert", "kv"):
        assert fact in text.lower(), text


def test_inspect_json_is_pure():
    for name in ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe_tied_bf16", "rope_yarn"):
        facts = json.loads(ok("inspect", harness.FIXTURES / name, "--json").stdout)
        assert isinstance(facts, dict)


def test_inspect_names_what_is_unsupported(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    config["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = harness.run_cli("inspect", tmp_path)
    assert "gelu" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral", "qwen2_moe"])
def test_synth_makes_a_checkpoint_that_runs(tmp_path, name):
    """tokenizers loads its tokenizer, generate runs on it, the seed decides the bytes."""
    config = harness.FIXTURES / name / "config.json"
    out, again, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    source = json.loads(config.read_text())
    source["vocab_size"] = 512
    config = tmp_path / "config.json"
    config.write_text(json.dumps(source))
    ok("synth", "--config", config, "--out", out, "--seed", 3)
    ok("synth", "--config", config, "--out", again, "--seed", 3)
    ok("synth", "--config", config, "--out", other, "--seed", 4)

    def weights(folder):
        files = sorted(folder.glob("*.safetensors"))
        assert files
        return b"".join(file.read_bytes() for file in files)

    assert weights(out) == weights(again) != weights(other)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    text = "Grüße, 世界 🙂 {1: 2}\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text and max(ids) < 512
    done = ok("generate", "--model", out, "--prompt", "Hello", "--max-tokens", 8, "--temperature", 0)
    assert done.stdout


def test_synth_dtype_and_refusals(tmp_path):
    ok("synth", "--config", TINY / "config.json", "--out", tmp_path / "half", "--dtype", "bfloat16")
    ok("synth", "--config", TINY / "config.json", "--out", tmp_path / "full", "--dtype", "float32")

    def size(name):
        return sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))

    assert size("half") < 0.6 * size("full")
    config = json.loads((TINY / "config.json").read_text())
    config.update(model_type="llama", architectures=["LlamaForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = harness.run_cli("synth", "--config", tmp_path / "config.json", "--out", tmp_path / "no")
    assert done.returncode not in (0, -6, -11) and "LlamaForCausalLM" in done.stderr
    assert not (tmp_path / "no" / "config.json").exists(), "config.json is written last"


def test_bench_offline():
    args = ("bench", "offline", "--model", TINY, "--prompt-tokens", 32, "--output-tokens", 8, "--batch", "1,4")
    text = ok(*args).stdout.lower()
    assert "prefill" in text and "decode" in text and "bandwidth" in text.replace("gb/s", "bandwidth")
    result = json.loads(ok(*args, "--json").stdout)

    def numbers(value):
        if isinstance(value, dict):
            for inner in value.values():
                yield from numbers(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from numbers(inner)
        elif isinstance(value, float):
            yield value

    found = list(numbers(result))
    assert found and all(value > 0 for value in found)
    assert json.dumps(result).count('"batch"') >= 2


def test_bench_rerouting():
    assert "--foreign-slots" in ok("bench", "rerouting", "--help").stdout
    args = ("bench", "rerouting", "--hidden", 64, "--width", 32, "--layers", 1, "--tokens", "4,64", "--steps", 2)
    assert "speed-up" in ok(*args).stdout
    rows = json.loads(ok(*args, "--json").stdout)["rows"]
    assert len({row["workload"] for row in rows}) == len(rows) == 12
    assert all(row["plain_ms"] > 0 and row["auto_ms"] > 0 for row in rows)
