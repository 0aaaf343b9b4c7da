"""Two pools of processes: equal bits, deaths, joins, drains, restarts. Every answer is compared with `serve`."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time

import harness
import pytest
from cluster import WORKER_READY, Cluster

MODEL = harness.FIXTURES / "qwen3_moe"

PROMPTS = [
    {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 3},
    {"prompt": "abc " * 30, "max_tokens": 60, "temperature": 1, "seed": 5, "ignore_eos": True, "logprobs": 0},
    {"prompt": list(range(3, 90)), "max_tokens": 25, "temperature": 0.8, "seed": 9, "top_p": 0.9, "ignore_eos": True},
    {"prompt": "x", "max_tokens": 80, "temperature": 0, "ignore_eos": True, "logprobs": 1},
]


def ask(server: harness.Server, body: dict) -> list:
    """The answer as streamed: text and logprobs of every chunk, joined; raises on an error event."""
    stream = server.open_stream("/v1/completions", {**body, "stream": True})
    assert stream.status == 200, stream.response.read()
    text, tokens, logprobs, reason = "", [], [], None
    for chunk in stream.chunks():
        assert "error" not in chunk, chunk
        choice = chunk["choices"][0]
        text += choice["text"]
        reason = choice["finish_reason"] or reason
        if choice.get("logprobs"):
            tokens += choice["logprobs"]["tokens"]
            logprobs += choice["logprobs"]["token_logprobs"]
    stream.close()
    return [text, tokens, logprobs, reason]


def ask_all(server: harness.Server, bodies: list[dict]) -> list:
    """All at once, each on its own thread."""
    answers: list = [None] * len(bodies)

    def one(i):
        try:
            answers[i] = ask(server, bodies[i])
        except BaseException as error:  # noqa: B902: the comparison shows it
            answers[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(harness.PATIENCE_S)
    return answers


@pytest.fixture(scope="module")
def truth(start_server):
    """What one process answers."""
    with start_server(MODEL, "--attention-workers", 1, "--expert-workers", 1, name="truth") as server:
        yield [ask(server, body) for body in PROMPTS]


@pytest.mark.parametrize(
    "attention, experts, balance, micro_batches",
    [(1, 1, "auto", 2), (2, 3, "auto", 2), (1, 4, "llep", 2), (3, 2, "eplb", "auto"), (4, 1, "none", 1)],
)
def test_equal_bits(truth, attention, experts, balance, micro_batches):
    flags = ("--min-expert-workers", experts, "--balance", balance, "--expert-foreign-slots", 2, "--micro-batches", micro_batches)
    with Cluster(MODEL, *flags, name=f"bits-{attention}x{experts}", attention=attention, experts=experts) as cluster:
        cluster.wait_serving(attention, experts)
        assert ask_all(cluster.server, PROMPTS * 2) == truth * 2
        view = cluster.view()
        assert {worker["transport"] for worker in view["workers"]} == {"tcp"}
        assert {worker["pid"] for worker in view["workers"]} == {worker.process.pid for worker in cluster.workers}

        def told():  # experts and attention workers, each once a second
            metrics = cluster.server.metrics()
            return metrics.value("switchyard_expert_balancedness") > 0 and metrics.value("switchyard_dispatch_bytes_total") > 0

        harness.wait_for(told, "the statistics of both roles")
        metrics = cluster.server.metrics()
        assert 0 < metrics.value("switchyard_expert_balancedness") <= 1
        assert metrics.value("switchyard_dispatch_plan_gap_ratio") >= 0
        if balance == "llep" and experts > 1:
            assert metrics.value("switchyard_expert_weight_transfers_total") > 0, "weights travel between processes"
        steps = {n: metrics.value("switchyard_steps_total", micro_batches=str(n)) for n in (1, 2)}
        assert micro_batches == "auto" or steps[micro_batches] > 0, steps
        assert micro_batches != 1 or steps[2] == 0, steps
        step_s = metrics.value("switchyard_attention_step_seconds_total")
        assert 0 < metrics.value("switchyard_attention_wait_seconds_total") < step_s
        for name in ("data_wait_seconds", "dispatch_bytes", "combine_bytes", "dispatch_plans", "dispatch_plan_seconds"):
            assert metrics.value(f"switchyard_{name}_total") > 0, name


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_equal_bits_of_quantized_weights(truth, start_server, quantization):
    flags = ("--quantization", quantization)
    with start_server(MODEL, *flags, name=f"one-{quantization}") as server:
        expected = [ask(server, body) for body in PROMPTS]
    assert expected != truth, "these weights give other numbers"
    moves = ("--min-expert-workers", 2, "--balance", "llep", "--expert-foreign-slots", 2)
    with Cluster(MODEL, *flags, *moves, name=f"bits-{quantization}", attention=2, experts=2, worker_flags=flags) as cluster:
        cluster.wait_serving(2, 2)
        assert ask_all(cluster.server, PROMPTS * 2) == expected * 2

        def moved():  # told once a second
            return cluster.server.metrics().value("switchyard_expert_weight_transfers_total") > 0

        harness.wait_for(moved, "quantised weights to travel between processes")


LONG = {"prompt": "go on", "max_tokens": 300, "temperature": 1, "seed": 3, "ignore_eos": True, "logprobs": 0}


@pytest.mark.parametrize("role", ["expert", "attention"])
def test_a_killed_worker_is_not_noticed(start_server, role):
    body = LONG
    with start_server(MODEL, name=f"undisturbed-{role}") as server:
        undisturbed = ask(server, body)
    flags = ("--min-expert-workers", 2, "--survive-expert-failures", 1)
    with Cluster(MODEL, *flags, name=f"kill-{role}", attention=2, experts=2) as cluster:
        cluster.wait_serving(2, 2)
        answers = []
        thread = threading.Thread(target=lambda: answers.extend(ask_all(cluster.server, [body] * 4)))
        thread.start()
        harness.wait_for(
            lambda: cluster.server.metrics().value("switchyard_generation_tokens_total") > 40, "tokens to come"
        )
        cluster.kill(cluster.of(role)[0])
        thread.join(harness.PATIENCE_S)
        assert answers == [undisturbed] * 4
        totals = cluster.view()["totals"]
        assert totals["failures"] == 1 and totals["failovers"] == 1, totals


def test_join_takes_load_and_drain_leaves_in_order(truth):
    with Cluster(MODEL, name="join", attention=1, experts=1) as cluster:
        cluster.wait_serving(1, 1)
        stop = threading.Event()
        wrong = []

        def traffic():
            while not stop.is_set():
                answers = ask_all(cluster.server, PROMPTS)
                if answers != truth:
                    wrong.append(answers)

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            expert, attention = cluster.start("expert"), cluster.start("attention")
            cluster.wait_serving(2, 2)
            for worker in (expert, attention):
                number = int(worker.wait_line(WORKER_READY)[2])
                harness.wait_for(
                    lambda n=number: any(w["id"] == n and w["load"]["rows"] > 0 for w in cluster.view()["workers"]),
                    "the new worker to take load",
                )
            first = cluster.of("expert")[0]
            for worker in (first, attention):
                worker.signal(signal.SIGTERM)
                assert worker.wait_exit() == 0, worker.log_tail()
            cluster.wait_serving(1, 1)
        finally:
            stop.set()
            thread.join(harness.PATIENCE_S)
        assert not wrong
        totals = cluster.view()["totals"]
        assert totals["failovers"] == 0 and totals["drains"] == 2, totals


def test_random_kills_lose_nothing(truth):
    """At least 20 kills at random moments under concurrent streams; whoever was killed is started again."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    kills, recoveries = 0, []
    flags = ("--min-expert-workers", 2, "--survive-expert-failures", 1)
    with Cluster(MODEL, *flags, name="kills", attention=2, experts=3) as cluster:
        cluster.wait_serving(2, 3)
        stop = threading.Event()
        rounds, wrong = [0], []

        def traffic():
            while not stop.is_set():
                answers = ask_all(cluster.server, PROMPTS * 2)
                rounds[0] += 1
                if answers != truth * 2:
                    wrong.append(answers)
                    return

        threads = [threading.Thread(target=traffic) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            while kills < 20 and not wrong:
                role = chance.choice(["expert", "attention"])
                victim = chance.choice(cluster.of(role))
                time.sleep(chance.uniform(0, 0.3))  # a random moment, not a condition
                before = cluster.view()["epoch"]
                begun = time.monotonic()
                cluster.kill(victim)
                kills += 1
                harness.wait_for(
                    lambda: (v := cluster.view())["epoch"] > before and v["phase"] == "running", "a new epoch"
                )
                recoveries.append(time.monotonic() - begun)
                cluster.start(role)
                cluster.wait_serving(2, 3)
        finally:
            stop.set()
            for thread in threads:
                thread.join(harness.PATIENCE_S)
        assert not wrong, wrong[0]
        metrics = cluster.server.metrics()
        assert metrics.value("switchyard_requests_total", finish_reason="error") == 0
        assert metrics.value("switchyard_worker_failures_total") == kills
    recoveries.sort()
    print(
        f"{kills} kills, {rounds[0]} rounds of {2 * len(PROMPTS)} streams; from the kill to the next epoch: "
        f"p50 {recoveries[len(recoveries) // 2]:.3f} s, max {recoveries[-1]:.3f} s"
    )


def test_the_server_restarts_and_the_workers_come_back(truth):
    with Cluster(MODEL, name="restart", attention=1, experts=1) as cluster:
        cluster.wait_serving(1, 1)
        assert ask(cluster.server, PROMPTS[0]) == truth[0]
        cluster.restart_server()
        cluster.wait_serving(1, 1)
        assert ask(cluster.server, PROMPTS[0]) == truth[0]
        assert all(worker.running for worker in cluster.workers)


def test_without_a_home_requests_wait_then_end_with_503(truth):
    with Cluster(MODEL, "--no-home-timeout", 10, name="no-home", attention=1, experts=1) as cluster:
        cluster.wait_serving(1, 1)
        cluster.kill(cluster.of("expert")[0])
        # It waits, and a new worker serves it.
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask(cluster.server, PROMPTS[0])))
        thread.start()
        def accepted():
            metrics = cluster.server.metrics()
            return metrics.value("switchyard_requests_waiting") + metrics.value("switchyard_requests_running") > 0

        harness.wait_for(accepted, "it to be accepted")
        cluster.start("expert")
        thread.join(harness.PATIENCE_S)
        assert answers == [truth[0]]
        # Nobody comes.
        cluster.kill(cluster.of("expert")[0])
        response = cluster.server.post("/v1/completions", {**PROMPTS[0], "stream": False})
        assert response.status == 503 and "retry-after" in response.headers, response.body
        assert "expert worker" in response.error()["message"]
        assert cluster.server.get("/health").status == 503
        # And then somebody does.
        cluster.start("expert")
        cluster.wait_serving(1, 1)
        assert ask(cluster.server, PROMPTS[0]) == truth[0]


def test_not_ready_until_every_expert_has_a_home():
    with Cluster(MODEL, "--min-expert-workers", 2, name="not-ready", attention=1, experts=1) as cluster:
        harness.wait_for(lambda: len(cluster.view()["workers"]) == 2, "both to register")
        health = cluster.server.get("/health")
        assert health.status == 503 and "expert workers: 1 of 2" in health.error()["message"]
        response = cluster.server.post("/v1/completions", PROMPTS[0])
        assert response.status == 503 and "retry-after" in response.headers
        cluster.start("expert")
        cluster.wait_serving(1, 2)
        assert cluster.server.get("/health").status == 200


def test_strangers_are_refused_with_the_reason(truth):
    with Cluster(MODEL, name="refused", attention=1, experts=1) as cluster:
        cluster.wait_serving(1, 1)
        for worker, reason in [
            (cluster.start("expert", token="guessed"), "the cluster token is wrong"),
            (cluster.start("expert", model=harness.FIXTURES / "olmoe"), "another model"),
            (cluster.start("expert", "--isa", "portable"), "computes as"),
        ]:
            assert worker.wait_exit() == 1
            assert reason in worker.log(), worker.log_tail()
        harness.wait_for(lambda: cluster.view()["totals"]["refused_registrations"] == 3, "the refusals to be counted")
        assert cluster.view()["totals"]["joins"] == 2
        assert ask(cluster.server, PROMPTS[0]) == truth[0]


def damage_experts(folder):
    """Changes the first byte of every expert's matrices: registration compares samples from the middle."""
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        for name, tensor in json.loads(data[8:start]).items():
            if ".experts." in name:
                data[start + tensor["data_offsets"][0]] ^= 1
        path.write_bytes(data)


def test_a_worker_with_a_damaged_copy_is_sent_away(truth, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(MODEL, damaged)
    damage_experts(damaged)
    with Cluster(MODEL, name="damaged", attention=1, experts=1) as cluster:
        cluster.wait_serving(1, 1)
        worker = cluster.start("expert", model=damaged)
        assert worker.wait_exit() == 1
        assert "sent this worker away" in worker.log(), worker.log_tail()
        assert re.search(r"checksum of expert \d+ of MoE layer \d+ is [0-9a-f]{16}, that of worker \d+ [0-9a-f]{16}", worker.log())
        cluster.start("expert")
        cluster.wait_serving(1, 2)
        view = cluster.view()
        assert view["totals"]["refused_registrations"] == 1, view
        assert ask_all(cluster.server, PROMPTS) == truth


def test_admin_shows_the_workers_of_serve_too(tiny):
    view = tiny.get("/admin/cluster").json()
    assert [worker["role"] for worker in view["workers"]] == ["attention", "expert", "expert"]
    assert view["phase"] == "running" and view["epoch"] == 1
    assert {worker["transport"] for worker in view["workers"]} == {"in-process"}
    assert json.dumps(view).count('"state": "serving"') == 3


def test_serve_with_processes_starts_the_dead_again(truth, start_server):
    flags = ("--processes", "--attention-workers", 1, "--expert-workers", 2)
    with start_server(MODEL, *flags, name="processes", subcommand="serve") as server:
        assert ask_all(server, PROMPTS) == truth

        def experts():
            workers = server.get("/admin/cluster").json()["workers"]
            return {w["pid"] for w in workers if w["role"] == "expert" and w["state"] == "serving"}

        harness.wait_for(lambda: len(experts()) == 2, "two expert workers")
        victim = min(experts())
        os.kill(victim, signal.SIGKILL)
        assert ask_all(server, PROMPTS) == truth
        harness.wait_for(lambda: len(experts() - {victim}) == 2, "a new worker in its place")
        children = experts()
    for pid in children:
        assert not os.path.exists(f"/proc/{pid}"), "the children end with it"


def certificates(folder):
    """A CA, and a certificate for 127.0.0.1 that it signed, as PEM files."""
    name = "/CN=switchyard test"

    def openssl(*args):
        subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True, cwd=folder)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", 2, "-subj", name, "-keyout", "ca.key", "-out", "ca.pem")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", name, "-keyout", "key.pem", "-out", "request.pem")
    (folder / "san.txt").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        *("x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", 2),
        *("-extfile", "san.txt", "-out", "cert.pem"),
    )
    return ["--cluster-cert", folder / "cert.pem", "--cluster-key", folder / "key.pem", "--cluster-ca", folder / "ca.pem"]


def test_mutual_tls(truth, tmp_path):
    flags = certificates(tmp_path)
    with Cluster(MODEL, *flags, name="mtls", attention=0, experts=0) as cluster:
        cluster.start("attention", *flags)
        cluster.start("expert", *flags)
        stranger = cluster.start("expert")  # knows the token, has no certificate
        cluster.wait_serving(1, 1)
        assert ask(cluster.server, PROMPTS[0]) == truth[0]
        assert stranger.running and cluster.view()["totals"]["joins"] == 2
