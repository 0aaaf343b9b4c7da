"""Two minutes (SWITCHYARD_SOAK_SECONDS) of 200 concurrent streams while workers are killed and started again; then
hundreds of kills at fail points, however long they take.

Not part of `./dev test`: `./dev soak` runs it and prints the figures.
"""

import os
import random
import threading
import time

import harness
import pytest
from cluster import Cluster
from kills import kill_at_fail_points
from test_cluster import PROMPTS, ask

MODEL = harness.FIXTURES / "qwen3_moe"
STREAMS = 200
KILLS_PER_MODE = 210
SECONDS = float(os.environ.get("SWITCHYARD_SOAK_SECONDS", "120"))


@pytest.fixture(scope="module")
def truth(start_server):
    with start_server(MODEL, "--attention-workers", 1, "--expert-workers", 1, name="truth") as server:
        yield [ask(server, body) for body in PROMPTS]


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def test_streams_survive_kills(truth):
    seed = int(os.environ.get("SWITCHYARD_SOAK_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    chance = random.Random(seed)
    flags = ("--min-expert-workers", 2, "--survive-expert-failures", 1, "--max-queued-requests", 1000)
    with Cluster(MODEL, *flags, name="soak", attention=2, experts=3) as cluster:
        cluster.wait_serving(2, 3)
        stop = threading.Event()
        answered, wrong, seconds = [0], [], []

        def client(number: int):
            while not stop.is_set():
                i = (number + answered[0]) % len(PROMPTS)
                begun = time.monotonic()
                try:
                    answer = ask(cluster.server, PROMPTS[i])
                except BaseException as error:  # noqa: B902: reported below
                    answer = repr(error)
                seconds.append(time.monotonic() - begun)
                answered[0] += 1
                if answer != truth[i]:
                    wrong.append((i, answer))
                    return

        clients = [threading.Thread(target=client, args=(i,)) for i in range(STREAMS)]
        for thread in clients:
            thread.start()
        end = time.monotonic() + SECONDS
        kills, recoveries = 0, []
        try:
            while time.monotonic() < end and not wrong:
                for role in ("expert", "attention"):
                    before = cluster.view()["epoch"]
                    begun = time.monotonic()
                    cluster.kill(chance.choice(cluster.of(role)))
                    kills += 1
                    harness.wait_for(
                        lambda: (v := cluster.view())["epoch"] > before and v["phase"] == "running", "a new epoch"
                    )
                    recoveries.append(time.monotonic() - begun)
                    cluster.start(role)
                    time.sleep(chance.uniform(0.2, 2.5))  # the rhythm of the deaths, not a condition
        finally:
            stop.set()
            for thread in clients:
                thread.join(harness.PATIENCE_S)
        assert not wrong, wrong[:3]
        metrics = cluster.server.metrics()
        assert metrics.value("switchyard_requests_total", finish_reason="error") == 0
        assert metrics.value("switchyard_worker_failures_total") == kills
    print(
        f"{kills} kills in {SECONDS:g} s under {STREAMS} streams: {answered[0]} answers, all equal to the undisturbed "
        f"ones; from a kill to the next epoch p50 {percentile(recoveries, 0.5):.3f} s, max {max(recoveries):.3f} s; "
        f"an answer took p50 {percentile(seconds, 0.5):.2f} s, max {max(seconds):.2f} s"
    )


@pytest.mark.parametrize("balance", ["llep", "auto"])
def test_hundreds_of_kills_at_fail_points(truth, balance):
    seed = int(os.environ.get("SWITCHYARD_SOAK_SEED", random.randrange(1 << 32)))
    kill_at_fail_points(truth, balance, seed, at_least=KILLS_PER_MODE)
