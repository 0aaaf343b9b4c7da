"""Start, overload, disconnect and shutdown of the real process."""

import json
import shutil
import signal
import socket
import subprocess
import threading

import harness
import pytest

LONG = {"prompt": "Once", "max_tokens": 60_000, "temperature": 0, "ignore_eos": True, "stream": True}


def few(n: int) -> dict:
    return {"prompt": "Once", "max_tokens": n, "temperature": 0, "ignore_eos": True}


def generated(server) -> float:
    return server.metrics().value("switchyard_generation_tokens_total")


def running(server) -> float:
    return server.metrics().value("switchyard_requests_running")


def test_closing_a_stream_frees_it(start_server, long_model):
    with start_server(long_model, name="cancel") as server:
        stream = server.open_stream("/v1/completions", LONG)
        next(iter(stream))
        assert running(server) == 1 and server.metrics().value("switchyard_kv_cache_usage_ratio") > 0
        stream.close()
        server.wait_idle()
        assert generated(server) < 60_000
        assert server.metrics().value("switchyard_kv_cache_usage_ratio") == 0, "its blocks are free"


def test_closing_a_waiting_connection_frees_it(start_server, long_model):
    """Not streaming: the client sees nothing before the end, and still goes away."""
    with start_server(long_model, name="cancel-whole") as server:
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps({**LONG, "stream": False}), {"Content-Type": "application/json"})
        harness.wait_for(lambda: running(server) == 1, "the request to run")
        connection.close()
        server.wait_idle()
        assert generated(server) < 60_000


def test_closing_one_of_n_choices_frees_all(start_server, long_model):
    with start_server(long_model, name="cancel-n") as server:
        stream = server.open_stream("/v1/completions", {**LONG, "n": 4, "temperature": 1, "seed": 1})
        next(iter(stream))
        stream.close()
        server.wait_idle()


def test_queued_requests_are_cancelled_too(start_server, long_model):
    with start_server(long_model, "--max-num-seqs", 1, name="cancel-queued") as server:
        first = server.open_stream("/v1/completions", LONG)
        next(iter(first))
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps(LONG), {"Content-Type": "application/json"})
        harness.wait_for(lambda: server.metrics().value("switchyard_requests_waiting") == 1, "one to wait")
        connection.close()
        harness.wait_for(lambda: server.metrics().value("switchyard_requests_waiting") == 0, "the queue to be empty")
        assert running(server) == 1
        first.close()
        server.wait_idle()


def test_full_queue_is_429(start_server, long_model):
    flags = ("--max-num-seqs", 1, "--max-queued-requests", 1)
    with start_server(long_model, *flags, name="queue") as server:
        streams = [server.open_stream("/v1/completions", LONG)]
        next(iter(streams[0]))
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps(LONG), {"Content-Type": "application/json"})
        harness.wait_for(lambda: server.metrics().value("switchyard_requests_waiting") == 1, "one to wait")
        for body in (few(1), LONG):
            refused = server.post("/v1/completions", body)
            assert refused.status == 429 and refused.error()["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
        assert server.get("/health").status == 200, "busy is healthy"
        streams[0].close()
        connection.close()
        server.wait_idle()
        assert server.post("/v1/completions", few(1)).status == 200
        assert server.metrics().value("switchyard_admission_rejections_total") == 2


def test_a_reader_that_stops_reading_stalls_nobody(start_server, long_model):
    with start_server(long_model, name="slow-reader") as server:
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", server.port))
            body = json.dumps({**LONG, "logprobs": 20, "n": 8, "temperature": 1}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            lazy.sendall(head.encode() + body)
            harness.wait_for(lambda: generated(server) > 20, "it to run")
            for _ in range(5):
                assert server.post("/v1/completions", few(4)).status == 200
            server.wait_idle()  # dropped when its bounded buffer was full, long before 8 · 60,000 tokens
            assert generated(server) < 100_000


def test_preemption_keeps_the_answers(start_server, long_model):
    """Too little KV memory for all at once: they are preempted and still say the same."""
    ask = {**few(300), "n": 1, "return_token_ids": True}
    prompts = [f"Wagon number {i} rolls" for i in range(6)]
    with start_server(long_model, name="roomy") as server:
        expected = [server.post("/v1/completions", {**ask, "prompt": p}).json()["choices"][0]["token_ids"] for p in prompts]
    # One sequence's KV is about 12 layers · 2 · 48 floats · 310 tokens = 1.4 MB.
    with start_server(long_model, "--kv-cache-memory", "4MiB", "--max-model-len", 512, name="tight") as server:
        answers = [None] * len(prompts)

        def send(i):
            answers[i] = server.post("/v1/completions", {**ask, "prompt": prompts[i]}).json()

        threads = [threading.Thread(target=send, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
        assert server.metrics().value("switchyard_preemptions_total") > 0, "nothing was preempted: the test shows nothing"


def test_workers_and_threads_do_not_change_answers(start_server):
    """1×1, 1×4 and 2×3 workers, 1 to 3 threads: identical bytes, logprobs included."""
    body = {**few(24), "prompt": [f"Wagon {i}" for i in range(8)], "temperature": 0.7, "seed": 5, "logprobs": 5}
    seen = set()
    for attention, expert, threads in ((1, 1, 1), (1, 4, 2), (2, 3, 3)):
        flags = ("--attention-workers", attention, "--expert-workers", expert, "--threads", threads)
        with start_server(harness.FIXTURES / "qwen3_moe", *flags, name=f"{attention}x{expert}") as server:
            choices = server.post("/v1/completions", body).json()["choices"]
            seen.add(json.dumps(choices, sort_keys=True))
    assert len(seen) == 1


def test_sigterm_finishes_what_runs(start_server, long_model):
    server = start_server(long_model, "--shutdown-timeout", 120, name="drain")
    stream = server.open_stream("/v1/completions", {**LONG, "max_tokens": 400})
    events = stream.chunks()
    received = [next(events)]
    server.signal(signal.SIGTERM)

    def refuses():
        try:
            answer = server.post("/v1/completions", few(1))
        except OSError:
            return True  # no longer listening
        if answer.status != 503:
            return False
        assert answer.error()["type"] == "unavailable_error" and int(answer.headers["retry-after"]) >= 1
        return True

    harness.wait_for(refuses, "new work to be refused")
    received += list(events)
    assert received[-1]["choices"][0]["finish_reason"] == "length"
    assert server.wait_exit() == 0


def test_idle_sigterm_and_sigint_exit_0(start_server):
    for number in (signal.SIGTERM, signal.SIGINT):
        server = start_server(harness.FIXTURES / "qwen3_moe", name=f"idle-{number.name}")
        server.signal(number)
        assert server.wait_exit(10) == 0


def test_second_sigterm_exits_at_once(start_server, long_model):
    server = start_server(long_model, "--shutdown-timeout", 600, name="twice")
    stream = server.open_stream("/v1/completions", LONG)
    next(iter(stream))
    server.signal(signal.SIGTERM)
    assert server.running
    harness.wait_for(lambda: drains(server), "the drain to begin")
    server.signal(signal.SIGTERM)
    assert server.wait_exit(10) != 0, "work was cut off: not a success"
    stream.close()


def drains(server) -> bool:
    try:
        return server.get("/health").status == 503
    except OSError:
        return True


def test_shutdown_timeout_cuts_off_with_an_error(start_server, long_model):
    """A cleanly ended body would be taken as success: the stream must end with an error or break."""
    server = start_server(long_model, "--shutdown-timeout", 1, name="timeout")
    stream = server.open_stream("/v1/completions", LONG)
    lines = iter(stream)
    next(lines)
    server.signal(signal.SIGTERM)
    said = []
    try:
        said += list(lines)
        clean = True
    except (OSError, __import__("http").client.IncompleteRead):
        clean = False
    if clean:
        assert any("error" in json.loads(data) for data in said if data != "[DONE]"), said[-2:]
    server.wait_exit(20)


def one_line_error(args, *needles, code=None):
    """Runs a command that must fail fast with one clear line on stderr and nothing on stdout."""
    done = harness.run_cli(*args, timeout_s=60)
    assert done.returncode not in (0, -6, -11, 134, 139), (done.returncode, done.stderr)
    if code is not None:
        assert done.returncode == code
    assert done.stdout == "", done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("switchyard: ")]
    assert len(errors) == 1, done.stderr
    for needle in needles:
        assert str(needle).lower() in errors[0].lower(), done.stderr
    assert "terminate called" not in done.stderr and "Check failed" not in done.stderr


def serve_args(model, *more):
    return ("serve", "--model", model, "--host", "127.0.0.1", "--port", "0", "--grpc-port", "0", *more)


def test_port_in_use(start_server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        model = harness.FIXTURES / "qwen3_moe"
        one_line_error(("serve", "--model", model, "--host", "127.0.0.1", "--port", port, "--grpc-port", 0), port)
        one_line_error(("serve", "--model", model, "--host", "127.0.0.1", "--port", 0, "--grpc-port", port), port)


def test_bad_model_folders(tmp_path):
    one_line_error(serve_args(tmp_path / "nowhere"), "nowhere")
    one_line_error(serve_args(tmp_path), tmp_path)
    one_line_error(serve_args(harness.FIXTURES / "README.md"), "README.md")


@pytest.fixture
def broken(tmp_path):
    """A copy of the qwen3_moe fixture to break."""
    folder = tmp_path / "broken"
    shutil.copytree(harness.FIXTURES / "qwen3_moe", folder)
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_truncated_safetensors(broken):
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 7, 100, 20_000, len(whole) - 1):
        weights.write_bytes(whole[:size])
        one_line_error(serve_args(broken), "model.safetensors")


def test_damaged_safetensors_headers(broken):
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])

    def write(changed, data=whole[8 + size :]):
        text = json.dumps(changed).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + data)

    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    one = header[name]
    for change in (
        {"dtype": "I64"},
        {"dtype": "F16"},
        {"shape": [1, 2]},
        {"shape": [-1, 44]},
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [one["data_offsets"][1], one["data_offsets"][0]]},
    ):
        write({**header, name: {**one, **change}})
        one_line_error(serve_args(broken))
    write({key: value for key, value in header.items() if key != name})
    one_line_error(serve_args(broken), name)
    write({**header, "model.layers.0.mlp.extra.weight": one})
    one_line_error(serve_args(broken), "extra")
    weights.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    one_line_error(serve_args(broken))


@pytest.mark.parametrize(
    "changes, needle",
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "llama"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": 45}, ""),
        ({"num_experts_per_tok": 9}, "9"),
        ({"num_attention_heads": 3}, ""),
        ({"rope_parameters": {"rope_type": "strange", "rope_theta": 10000.0}}, "strange"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant"),
        ({"num_hidden_layers": 4}, "layers.3"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_configs_are_refused_by_name(broken, changes, needle):
    edit_config(broken, **changes)
    one_line_error(serve_args(broken), needle)


def test_broken_files_of_other_kinds(broken):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        whole = (broken / name).read_text()
        (broken / name).write_text(whole[: len(whole) // 2])
        one_line_error(serve_args(broken), name)
        (broken / name).write_text(whole)
    template = broken / "chat_template.jinja"
    whole = template.read_text()
    template.write_text("{% for x in %}")
    one_line_error(serve_args(broken), "template")
    template.write_text(whole)
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        whole = (broken / name).read_bytes()
        (broken / name).unlink()
        one_line_error(serve_args(broken), name)
        (broken / name).write_bytes(whole)


def test_ids_outside_the_vocabulary_are_ignored(broken, start_server):
    edit_config(broken, eos_token_id=99_999, bos_token_id=-5)
    (broken / "generation_config.json").write_text('{"eos_token_id": [99999, 300]}')
    with start_server(broken, name="odd-ids") as server:
        assert server.post("/v1/completions", few(4)).status == 200
        assert "99999" in server.log(), "ignored ids are logged"


def test_bad_flags():
    model = harness.FIXTURES / "qwen3_moe"
    for flags, needle in (
        (("--dtype", "float8"), "dtype"),
        (("--no-such-flag",), "no-such-flag"),
        (("--expert-workers", 0), "expert-workers"),
        (("--attention-workers", -1), "attention-workers"),
        (("--threads", "many"), "threads"),
        (("--port", 70_000), "port"),
        (("--max-model-len", 100_000_000), "max-model-len"),
        (("--kv-cache-memory", 1), "kv-cache-memory"),
        (("--device", "tpu"), "device"),
        (("--chat-template", "/nowhere.jinja"), "nowhere.jinja"),
    ):
        done = harness.run_cli(*serve_args(model, *flags), timeout_s=60)
        assert done.returncode not in (0, -6, -11), (flags, done.stderr)
        assert needle in done.stderr.replace("_", "-"), (flags, done.stderr)


def test_json_logs(start_server):
    """--log-format json: every line of stderr is one JSON object."""
    server = start_server(harness.FIXTURES / "qwen3_moe", "--log-format", "json", name="json-log")
    server.post("/v1/completions", few(2))
    assert server.stop() == 0
    lines = server.log().splitlines()[1:]  # the first is the command
    assert lines and all(isinstance(json.loads(line), dict) for line in lines)


def test_stdout_is_the_ready_line_alone(start_server):
    command = [harness.binary(), *map(str, serve_args(harness.FIXTURES / "qwen3_moe"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert harness.READY.match(process.stdout.readline().rstrip("\n"))
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == ""
        assert process.wait(harness.PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
