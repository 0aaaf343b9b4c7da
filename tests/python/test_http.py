"""Raw HTTP: statuses, headers and shapes that no client library shows, and a server that survives bad input."""

import json
import socket
import urllib.parse

import harness
import pytest

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
TEXT = {"prompt": "Hi", "max_tokens": 4, "temperature": 0}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def server_lives_on(tiny):
    """Whatever a test sent, the next good request is answered."""
    yield
    answer = tiny.post("/v1/completions", TEXT)
    assert answer.status == 200 and answer.json()["usage"]["completion_tokens"] >= 1
    tiny.wait_idle()


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_paths_with_and_without_prefix(tiny, prefix):
    assert tiny.get(f"{prefix}/models").json()["data"][0]["id"] == "tiny"
    assert tiny.get(f"{prefix}/models/tiny").json()["id"] == "tiny"
    assert tiny.post(f"{prefix}/completions", TEXT).json()["object"] == "text_completion"
    assert tiny.post(f"{prefix}/chat/completions", CHAT).json()["object"] == "chat.completion"
    assert tiny.post(f"{prefix}/tokenize", {"prompt": "Hi"}).status == 200
    assert tiny.get(f"{prefix}/health").status == 200
    assert tiny.get(f"{prefix}/metrics").status == 200


def test_version(tiny):
    shown = harness.run_cli("--version").stdout
    assert tiny.get("/version").json()["version"] in shown


def test_chat_json_shape(tiny):
    answer = tiny.post("/v1/chat/completions", CHAT)
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    assert isinstance(body["created"], int) and body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert set(choice) >= {"index", "message", "logprobs", "finish_reason"}
    assert choice["logprobs"] is None and choice["message"]["refusal"] is None
    assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert isinstance(usage["prompt_tokens_details"]["cached_tokens"], int)


def test_stream_headers_and_frames(tiny):
    stream = tiny.open_stream("/v1/chat/completions", {**CHAT, "stream": True})
    assert stream.status == 200
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["cache-control"] == "no-cache" and stream.headers["x-accel-buffering"] == "no"
    chunks = list(stream.chunks())
    assert all("usage" not in chunk for chunk in chunks), "usage crashes clients that did not ask"
    assert chunks[-1]["choices"][0]["delta"] == {} and chunks[-1]["choices"][0]["finish_reason"]


def test_stream_usage_is_null_until_the_end(tiny):
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(tiny.open_stream("/v1/chat/completions", body).chunks())
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] >= 1


def test_request_id_is_given_or_kept(tiny):
    given = {tiny.get("/v1/models").headers["x-request-id"] for _ in range(3)}
    assert len(given) == 3
    assert tiny.get("/v1/models", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    refused = tiny.post("/v1/completions", b"{", headers={"X-Request-Id": "abc-2"})
    assert refused.status == 400 and refused.headers["x-request-id"] == "abc-2"
    stream = tiny.open_stream("/v1/completions", {**TEXT, "stream": True}, headers={"X-Request-Id": "abc-3"})
    assert stream.headers["x-request-id"] == "abc-3"
    list(stream.chunks())


def test_request_id_cannot_inject_headers(tiny):
    request = b"GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: x\x01y\r\nConnection: close\r\n\r\n"
    head = tiny.raw(request).split(b"\r\n\r\n")[0]
    assert b"\x01" not in head


def deep(levels: int) -> bytes:
    return b'{"prompt":"a","x":' + b"[" * levels + b"]" * levels + b"}"


BAD_BODIES = {
    "truncated": b'{"prompt": "a"',
    "empty": b"",
    "not JSON": b"hello",
    "trailing garbage": b'{"prompt": "a"} x',
    "two documents": b'{"prompt": "a"}{"prompt": "b"}',
    "list": b"[1]",
    "number": b"3",
    "null": b"null",
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "deep nesting": deep(200),
    "very deep nesting": deep(100_000),
    "no prompt": {},
    "prompt null": {"prompt": None},
    "prompt number": {"prompt": 5},
    "prompt object": {"prompt": {}},
    "prompt empty": {"prompt": ""},
    "prompt empty list": {"prompt": []},
    "prompt empty token list": {"prompt": [[]]},
    "prompt mixed": {"prompt": ["a", 1]},
    "prompt nested too far": {"prompt": [[[1]]]},
    "token id = vocabulary": {"prompt": [310]},
    "token id negative": {"prompt": [-1]},
    "token id fraction": {"prompt": [1.5]},
    "token id huge": {"prompt": [2**40]},
    "too long": {"prompt": [1] * 513},
    "max_tokens beyond the context": {**TEXT, "max_tokens": 512},
    "max_tokens string": {**TEXT, "max_tokens": "4"},
    "max_tokens fraction": {**TEXT, "max_tokens": 1.5},
    "max_tokens zero without echo": {**TEXT, "max_tokens": 0},
    "temperature string": {**TEXT, "temperature": "hot"},
    "temperature negative": {**TEXT, "temperature": -0.1},
    "temperature huge": b'{"prompt": "a", "temperature": 1e999}',
    "temperature NaN": b'{"prompt": "a", "temperature": NaN}',
    "top_p": {**TEXT, "top_p": 1.01},
    "top_k": {**TEXT, "top_k": -2},
    "min_p": {**TEXT, "min_p": 2},
    "repetition_penalty": {**TEXT, "repetition_penalty": 0},
    "n zero": {**TEXT, "n": 0},
    "n boolean": {**TEXT, "n": True},
    "n huge": {**TEXT, "n": 10**9},
    "seed beyond int64": b'{"prompt": "a", "seed": 9223372036854775808}',
    "seed fraction": {**TEXT, "seed": 0.5},
    "stop number": {**TEXT, "stop": 3},
    "stop list of numbers": {**TEXT, "stop": [3]},
    "stop_token_ids": {**TEXT, "stop_token_ids": ["a"]},
    "logit_bias key": {**TEXT, "logit_bias": {"x": 1}},
    "logit_bias key = vocabulary": {**TEXT, "logit_bias": {"310": 1}},
    "logit_bias value": {**TEXT, "logit_bias": {"1": "a"}},
    "logit_bias list": {**TEXT, "logit_bias": [1]},
    "logprobs above the limit": {**TEXT, "logprobs": 21},
    "stream string": {**TEXT, "stream": "yes"},
    "stream_options without stream": {**TEXT, "stream_options": {"include_usage": True}},
    "stream_options list": {**TEXT, "stream": True, "stream_options": []},
    "echo string": {**TEXT, "echo": "yes"},
    "unknown response_format": {**TEXT, "response_format": {"type": "poem"}},
    "bad while streaming": {**TEXT, "stream": True, "n": 0},
    "too long while streaming": {"prompt": [1] * 513, "stream": True},
}

BAD_CHATS = {
    "no messages": {},
    "null": {"messages": None},
    "empty": {"messages": []},
    "string": {"messages": "Hi"},
    "not objects": {"messages": ["Hi"]},
    "no role": {"messages": [{"content": "Hi"}]},
    "role number": {"messages": [{"role": 1, "content": "Hi"}]},
    "content number": {"messages": [{"role": "user", "content": 3}]},
    "unknown part": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "both generation and continuation": {**CHAT, "add_generation_prompt": True, "continue_final_message": True},
    "top_logprobs above the limit": {**CHAT, "logprobs": True, "top_logprobs": 21},
    "top_logprobs without logprobs": {**CHAT, "top_logprobs": 1},
    "logprobs number": {**CHAT, "logprobs": 3},
    "too long": {"messages": [{"role": "user", "content": "track " * 600}]},
    "unknown response_format": {**CHAT, "response_format": {"type": "poem"}},
    "bad while streaming": {**CHAT, "stream": True, "temperature": "hot"},
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_completions_are_400(tiny, name):
    answer = tiny.post("/v1/completions", BAD_BODIES[name])
    assert answer.status == 400, answer.body
    assert answer.error()["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats_are_400(tiny, name):
    answer = tiny.post("/v1/chat/completions", BAD_CHATS[name])
    assert answer.status == 400, answer.body
    assert answer.error()["type"] == "invalid_request_error"


def test_messages_of_errors_say_what_is_wrong(tiny):
    error = tiny.post("/v1/completions", {"prompt": [310]}).error()
    assert "310" in error["message"] and error["param"] == "prompt"
    error = tiny.post("/v1/completions", {**TEXT, "temperature": "hot"}).error()
    assert error["param"] == "temperature" and "temperature" in error["message"]
    error = tiny.post("/v1/completions", {"prompt": [1] * 600}).error()
    assert "600" in error["message"] and "512" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_legal_odd_requests(tiny):
    """Near the edges, but right."""
    for body in (
        {**TEXT, "n": None, "stop": None, "seed": None, "logit_bias": None, "max_tokens": 2},
        {**TEXT, "stop": []},
        {**TEXT, "temperature": 2, "top_p": 1, "top_k": -1},
        {**TEXT, "top_k": 10_000},
        {"prompt": [309], "max_tokens": 1},  # in the vocabulary, beyond the tokenizer's
        {"prompt": [1] * 511, "max_tokens": 1},
        {"prompt": "Grüße, 世界 🙂\u0000\n", "max_tokens": 2},
        {**TEXT, "logprobs": 20},
        {**TEXT, "max_tokens": 0, "echo": True},
        {**TEXT, "priority": 3, "user": "me"},
    ):
        answer = tiny.post("/v1/completions", body)
        assert answer.status == 200, (body, answer.body)


def test_model_without_name_in_logprobs_is_valid_json(tiny):
    """Logprobs of −infinity would not be JSON: Python's parser would accept it, so the text is checked."""
    body = {**TEXT, "logprobs": 20, "logit_bias": {str(i): -100 for i in range(300)}, "max_tokens": 8}
    answer = tiny.post("/v1/completions", body)
    assert answer.status == 200

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(answer.body, parse_constant=refuse)


def test_ids_beyond_the_tokenizer_decode_to_nothing(tiny):
    body = {"prompt": [305, 306], "max_tokens": 4, "temperature": 0, "logit_bias": {"308": 100}, "ignore_eos": True}
    choice = tiny.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "" and choice["finish_reason"] == "length"


def test_streams_are_valid_utf8(tiny):
    """A model that speaks single bytes: chunks never split a character, and joined they are the whole."""
    body = {**TEXT, "max_tokens": 200, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    whole = tiny.post("/v1/completions", body).json()["choices"][0]["text"]
    pieces = [c["choices"][0]["text"] for c in tiny.open_stream("/v1/completions", {**body, "stream": True}).chunks()]
    assert "".join(pieces) == whole


@pytest.mark.parametrize("text", ["Hello world", "Grüße, 世界 🙂", " a  b\n\n\tc ", "<|im_end|>", "e\u0301"])
def test_tokenize_detokenize(tiny, text):
    shown = tiny.post("/tokenize", {"prompt": text}).json()
    assert shown["count"] == len(shown["tokens"]) > 0
    back = tiny.post("/detokenize", {"tokens": shown["tokens"]}).json()["prompt"]
    assert back == {"e\u0301": "\u00e9", "<|im_end|>": back}.get(text, text)  # NFC; special tokens decode to ""


def test_tokenize_chat(tiny):
    shown = tiny.post("/tokenize", {"messages": CHAT["messages"]}).json()
    assert shown["count"] == tiny.post("/v1/chat/completions", CHAT).json()["usage"]["prompt_tokens"]
    assert tiny.post("/tokenize", {}).status == 400
    assert tiny.post("/detokenize", {"tokens": ["a"]}).status == 400


def test_unknown_path_and_model_are_404(tiny):
    assert tiny.get("/v2/models").error()["type"] == "not_found_error"
    assert tiny.get("/v2/models").status == 404
    refused = tiny.post("/v1/completions", {**TEXT, "model": "other"})
    assert refused.status == 404 and refused.error()["code"] == "model_not_found"
    assert tiny.get("/v1/models/other").status == 404


def test_wrong_method_is_405(tiny):
    for method, path in (("GET", "/v1/completions"), ("POST", "/v1/models"), ("DELETE", "/health")):
        answer = tiny.request(method, path)
        assert answer.status == 405, (method, path)
        assert answer.headers.get("allow"), "405 names what is allowed"
        answer.error()


def test_wrong_content_type_is_415(tiny):
    answer = tiny.post("/v1/completions", b"prompt=a", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status == 415
    answer.error()
    fine = tiny.post("/v1/completions", json.dumps(TEXT).encode(), headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert fine.status == 200


def test_body_over_the_limit_is_413(tiny):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 999999999999\r\n\r\n"
    assert tiny.raw(head).startswith(b"HTTP/1.1 413 ")


def test_chunked_request_body(tiny):
    body = json.dumps(TEXT).encode()
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:7], body[7:]))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert tiny.raw(head + pieces + b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,  # a TLS hello
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=["tls", "no request line", "version", "length", "headers", "path", "chunk"],
)
def test_garbage_gets_4xx_or_nothing(tiny, garbage):
    answer = tiny.raw(garbage)
    assert answer == b"" or answer.split(b" ")[1][:1] in (b"4", b"5"), answer[:80]
    assert not answer or answer.split(b" ")[1] != b"500"


def test_half_a_request_then_gone(tiny):
    for data in (b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as peer:
            peer.sendall(data)


def test_keep_alive_and_pipelining(tiny):
    connection = tiny.connect()
    sockets = set()
    for _ in range(3):
        connection.request("POST", "/v1/completions", json.dumps(TEXT), JSON)
        sockets.add(id(connection.sock))
        assert connection.getresponse().read()
    assert len(sockets) == 1, "the connection was closed between requests"
    connection.close()
    one = b"GET /v1/models/tiny HTTP/1.1\r\nHost: a\r\n\r\n"
    last = one.replace(b"Host: a", b"Host: a\r\nConnection: close")
    assert tiny.raw(one * 4 + last).count(b"HTTP/1.1 200 ") == 5


def test_expect_continue(tiny):
    """curl sends it with larger bodies and waits a second if it is ignored."""
    body = json.dumps(TEXT).encode()
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as peer:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        peer.sendall(head.encode() + b"Expect: 100-continue\r\nConnection: close\r\n\r\n")
        assert peer.recv(64).startswith(b"HTTP/1.1 100 ")
        peer.sendall(body)
        received = b""
        while piece := peer.recv(65536):
            received += piece
    assert b"HTTP/1.1 200 " in received


def test_cors_preflight_and_keys(start_server):
    """With keys configured: 401 without one, but /health and OPTIONS stay open. Ids with a slash arrive encoded."""
    flags = ("--api-key", "secret-1", "--served-model-name", "org/tiny")
    server = start_server(harness.FIXTURES / "mixtral", *flags, name="keys")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret-1"}):
        for answer in (server.get("/v1/models", headers=headers), server.post("/v1/completions", TEXT, headers=headers)):
            assert answer.status == 401 and answer.error()["type"] == "authentication_error"
    assert server.get("/health").status == 200
    assert server.request("OPTIONS", "/v1/completions").status in (200, 204)
    key = {"Authorization": "Bearer secret-1"}
    assert server.post("/v1/completions", TEXT, headers=key).status == 200
    quoted = urllib.parse.quote("org/tiny", safe="")
    assert server.get(f"/v1/models/{quoted}", headers=key).json()["id"] == "org/tiny"
    assert "secret-1" not in server.log().split("\n", 1)[1], "keys never appear in logs"
    # Mixtral's template raises on a conversation that does not alternate: the request's fault.
    bad = {"messages": [{"role": "user", "content": "a"}] * 2}
    raised = server.post("/v1/chat/completions", bad, headers=key)
    assert raised.status == 400 and "alternate" in raised.error()["message"]
    assert server.post("/v1/chat/completions", CHAT, headers=key).status == 200
    assert server.stop() == 0


def test_no_chat_template(start_server):
    """Completions work, chat is a 400 that says why; the other families' greedy tokens are transformers'."""
    server = start_server(harness.FIXTURES / "olmoe", name="olmoe")
    assert server.post("/v1/completions", TEXT).status == 200
    refused = server.post("/v1/chat/completions", CHAT)
    assert refused.status == 400 and "template" in refused.error()["message"]
    assert server.stop() == 0


@pytest.mark.parametrize(
    "name",
    ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe_tied_bf16", "rope_linear", "rope_yarn", "rope_llama3", "rope_dynamic"],
)
def test_golden_tokens_over_http(start_server, name):
    server = start_server(harness.FIXTURES / name, "--dtype", "float32", name=f"golden.{name}")
    for case in harness.golden(name)["cases"]:
        body = {"prompt": case["prompt"], "max_tokens": 17, "temperature": 0, "ignore_eos": True}
        # Penalties of a generation_config.json are not part of the golden.
        body |= {"return_token_ids": True, "repetition_penalty": 1.0}
        answer = server.post("/v1/completions", body).json()
        assert answer["choices"][0]["token_ids"] == case["greedy"], case["name"]
    assert server.stop() == 0
