"""Every metric family that the server exposes moves when the thing it counts happens: no dead series."""

import json
import threading

import harness
import pytest

# What dashboards, alerts and autoscalers are built on.
GAUGES = {
    "switchyard_requests_running",
    "switchyard_requests_waiting",
    "switchyard_kv_cache_usage_ratio",
    "switchyard_workers",
    "switchyard_expert_placement_epoch",
}
COUNTERS = {
    "switchyard_engine_iterations_total",
    "switchyard_prompt_tokens_total",
    "switchyard_generation_tokens_total",
    "switchyard_preemptions_total",
    "switchyard_requests_total",
    "switchyard_admission_rejections_total",
    "switchyard_steps_total",
    "switchyard_attention_step_seconds_total",
    "switchyard_attention_wait_seconds_total",
}
HISTOGRAMS = {
    "switchyard_time_to_first_token_seconds",
    "switchyard_inter_token_latency_seconds",
    "switchyard_e2e_request_latency_seconds",
}
TEXT = {"prompt": "Once upon a time " * 8, "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def history(start_server, long_model):
    """Scrapes before, during and after traffic of every kind on one small server."""
    flags = ("--kv-cache-memory", "4MiB", "--max-model-len", 512, "--max-queued-requests", 4)
    server = start_server(long_model, *flags, "--served-model-name", "long", name="metrics")
    scrapes = [server.metrics()]
    done = threading.Event()

    def scrape():
        while not done.wait(0.01):  # a sampling interval, not a condition
            scrapes.append(server.metrics())

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        for body in (TEXT, TEXT, {**TEXT, "n": 2, "temperature": 1.0}, {**TEXT, "logprobs": 1}):
            assert server.post("/v1/completions", body).status == 200
        list(server.open_stream("/v1/completions", {**TEXT, "stream": True}).chunks())
        text = server.post("/v1/completions", TEXT).json()["choices"][0]["text"]
        stopped = server.post("/v1/completions", {**TEXT, "stop": text[2:5]}).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert server.post("/v1/completions", b"{").status == 400
        assert server.get("/nothing").status == 404
        # More than fits into the KV memory and the queue: preemption, waiting and 429.
        statuses = []
        body = {**TEXT, "max_tokens": 300}

        def send(i):
            statuses.append(server.post("/v1/completions", {**body, "prompt": f"Wagon {i} " * 10}).status)

        senders = [threading.Thread(target=send, args=(i,)) for i in range(24)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        assert set(statuses) == {200, 429}, statuses
        # A client that goes away.
        stream = server.open_stream("/v1/completions", {**TEXT, "max_tokens": 350, "stream": True})
        next(iter(stream))
        stream.close()
        server.wait_idle()
    finally:
        done.set()
        scraper.join()
    scrapes.append(server.metrics())
    yield scrapes
    assert server.stop() == 0


def test_the_families_exist_with_their_types(history):
    types = history[-1].types
    for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        assert {name: types.get(name) for name in names} == dict.fromkeys(names, kind)


def test_no_dead_series(history):
    """Every family is there from the start or appears, and at some time it was not zero."""
    dead = {
        family
        for family in history[-1].types
        if not any(family in scrape.types and scrape.family_total(family) > 0 for scrape in history)
    }
    assert not dead


def test_names_and_helps_follow_the_rules(history):
    last = history[-1]
    for family, kind in last.types.items():
        assert family.startswith("switchyard_"), family
        assert last.helps.get(family), f"{family} has no help"
        assert (kind == "counter") == family.endswith("_total"), family
        assert not family.endswith(("_count", "_sum", "_bucket")), family
    assert not any(value != value for value in last.samples.values()), "NaN"


def test_counters_and_histograms_only_grow(history):
    before = {}
    for scrape in history:
        for (name, labels), value in scrape.samples.items():
            family = name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
            kind = scrape.types.get(name) or scrape.types.get(family)
            if kind in ("counter", "histogram"):
                assert value >= before.get((name, labels), 0.0), name
                before[name, labels] = value


def test_histograms_are_well_formed(history):
    last = history[-1]
    for family, kind in last.types.items():
        if kind != "histogram":
            continue
        series: dict[frozenset, list] = {}
        for (name, labels), value in last.samples.items():
            if name == family + "_bucket":
                bound = float(dict(labels)["le"])
                rest = frozenset(item for item in labels if item[0] != "le")
                series.setdefault(rest, []).append((bound, value))
        assert series, family
        for rest, buckets in series.items():
            buckets.sort()
            assert buckets[-1][0] == float("inf")
            counts = [count for _, count in buckets]
            assert counts == sorted(counts), family
            assert counts[-1] == last.samples[family + "_count", rest], family


def test_gauges_return_to_zero(history):
    last = history[-1]
    for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
        assert last.value(f"switchyard_{name}") == 0, name
        assert max(scrape.value(f"switchyard_{name}") for scrape in history) > 0
    assert max(scrape.value("switchyard_kv_cache_usage_ratio") for scrape in history) <= 1


def test_workers_by_role(history):
    roles = {labels["role"]: history[-1].value("switchyard_workers", role=labels["role"])
             for labels in history[-1].labels("switchyard_workers")}
    assert roles == {"attention": 1, "expert": 2}


def test_token_counts_are_exact(start_server):
    with start_server(harness.FIXTURES / "qwen3_moe", name="counts") as server:
        body = {"prompt": [[1, 2, 3], [4, 5]], "n": 2, "max_tokens": 7, "temperature": 0, "ignore_eos": True}
        usage = server.post("/v1/completions", body).json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 28)
        metrics = server.metrics()
        assert metrics.value("switchyard_generation_tokens_total") == 28
        assert metrics.value("switchyard_prompt_tokens_total") == 5
        assert metrics.value("switchyard_requests_total", finish_reason="length") in (1, 2, 4)
        assert metrics.value("switchyard_time_to_first_token_seconds_count") >= 1


def test_text_after_a_stop_string_is_not_counted(start_server):
    """The server's verdict is final: tokens that the engine computed beyond the stop are nobody's."""
    with start_server(harness.FIXTURES / "qwen3_moe", name="stop-count") as server:
        body = {"prompt": "Once", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        text = server.post("/v1/completions", body).json()["choices"][0]["text"]
        before = server.metrics().value("switchyard_generation_tokens_total")
        usage = server.post("/v1/completions", {**body, "stop": text[5:8]}).json()["usage"]
        after = server.metrics().value("switchyard_generation_tokens_total")
        assert after - before == usage["completion_tokens"] < 40


def test_prefix_cache_shows_in_usage_and_metrics(start_server):
    with start_server(harness.FIXTURES / "qwen3_moe", name="prefix") as server:
        body = {"prompt": list(range(300)), "max_tokens": 2, "temperature": 0, "ignore_eos": True, "logprobs": 3}
        first, second = (server.post("/v1/completions", body).json() for _ in range(2))
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert 0 < cached < 300
        assert json.dumps(first["choices"]) == json.dumps(second["choices"]), "a cache hit changes no bit"
        metrics = server.metrics()
        families = [name for name in metrics.types if "cached" in name or "prefix" in name]
        assert any(metrics.value(name) >= cached for name in families), families
