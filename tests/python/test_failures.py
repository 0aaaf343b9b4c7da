"""Workers that end themselves at exact points, or because of what they are asked to compute."""

import os
import random
import re
import threading
import time
from pathlib import Path

import harness
import pytest
from cluster import Cluster
from kills import ALL, Traffic, kill_at_fail_points
from test_cluster import PROMPTS, ask, ask_all

MODEL = harness.FIXTURES / "qwen3_moe"
BAD_TOKEN = 200  # no byte of the other prompts
BAD = {"prompt": [BAD_TOKEN, 5, 6, 7], "max_tokens": 4, "temperature": 0}
STRIKES = 3


@pytest.fixture(scope="module")
def truth(start_server):
    with start_server(MODEL, "--attention-workers", 1, "--expert-workers", 1, name="truth") as server:
        for body in PROMPTS:
            prompt = body["prompt"]
            tokens = server.post("/tokenize", {"prompt": prompt}).json()["tokens"] if isinstance(prompt, str) else prompt
            assert BAD_TOKEN not in tokens
        yield [ask(server, body) for body in PROMPTS]


def test_a_kill_at_every_point_loses_nothing(truth):
    seed = int(os.environ.get("SWITCHYARD_TEST_SEED", random.randrange(1 << 32)))
    assert len(ALL) >= 20
    kill_at_fail_points(truth, "llep", seed, at_least=len(ALL))


def test_the_shipped_binary_has_no_fail_points():
    assert b"SWITCHYARD_FAIL" not in Path(harness.binary()).read_bytes()
    assert b"SWITCHYARD_FAIL" in Path(harness.binary()).with_name("failing_worker").read_bytes()


class Keeper:
    """Starts a worker again for each one that dies, as an operator's supervisor would."""

    def __init__(self, cluster: Cluster):
        self.cluster, self.deaths = cluster, []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        replaced = set()
        while not self._stop.wait(0.01):
            for worker in [w for w in self.cluster.workers if not w.running and w not in replaced]:
                replaced.add(worker)
                self.deaths.append(worker)
                self.cluster.start(worker.role)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(harness.PATIENCE_S)


def row_of_the_bad_token() -> str:
    """The hash of the row with which it comes to its first MoE layer: the same wherever it is computed."""
    with Cluster(MODEL, name="row", attention=1, experts=1, failing={"SWITCHYARD_FAIL_ROW": "show"}) as cluster:
        cluster.wait_serving(1, 1)
        ask(cluster.server, {**BAD, "prompt": [BAD_TOKEN], "max_tokens": 1})
        rows = set(re.findall(r"^row (\d+)$", cluster.of("expert")[0].log(), re.M))
        assert len(rows) == 1, rows
        return rows.pop()


@pytest.mark.parametrize("role", ["attention", "expert"])
def test_an_input_that_crashes_its_worker_fails_alone(truth, role):
    failing = {"SWITCHYARD_FAIL_TOKEN": str(BAD_TOKEN)} if role == "attention" else {"SWITCHYARD_FAIL_ROW": row_of_the_bad_token()}
    flags = ("--min-expert-workers", 3, "--survive-expert-failures", 1)
    with Cluster(MODEL, *flags, name=f"strikes-{role}", attention=2, experts=3, failing=failing) as cluster:
        cluster.wait_serving(2, 3)
        with Keeper(cluster) as keeper, Traffic(cluster.server, truth) as traffic:
            harness.wait_for(lambda: traffic.answers > 10, "the innocent to be under way")
            response = cluster.server.post("/v1/completions", BAD)
            assert response.status == 500 and response.error()["type"] == "server_error", response.body
            assert "alone" in response.error()["message"]
            served = traffic.answers
            cluster.wait_serving(2, 3)
            harness.wait_for(lambda: traffic.answers > served + 20 or traffic.wrong, "the innocent to go on")
        assert not traffic.wrong, traffic.wrong[0]
        # An attention worker a strike; with an expert worker all die that compute the row.
        most = STRIKES * (1 if role == "attention" else 3)
        assert STRIKES <= len(keeper.deaths) <= most, [w.log_path.name for w in keeper.deaths]
        assert all(w.role == role and w.process.returncode == -6 for w in keeper.deaths), "nobody else dies"
        assert len(re.findall(r"request \d+ failed: \d+ aborted steps", cluster.server.log())) == 1
        assert cluster.server.metrics().value("switchyard_requests_total", finish_reason="error") == 1
        assert ask_all(cluster.server, PROMPTS) == truth


@pytest.mark.parametrize("role, phase", [("attention", "planned"), ("expert", "computed")])
def test_a_worker_that_hangs_is_replaced(truth, role, phase):
    flags = ("--min-expert-workers", 2, "--survive-expert-failures", 1, "--stall-timeout", 5)
    with Cluster(MODEL, *flags, name=f"stall-{role}", attention=2, experts=2, failing={}) as cluster:
        cluster.wait_serving(2, 2)
        with Traffic(cluster.server, truth) as traffic:
            before = cluster.view()["epoch"]
            cluster.arm(cluster.of(role)[0], f"{phase} 5 0 stall")
            harness.wait_for(lambda: cluster.view()["totals"]["failures"] == 1, "the stall to be taken for a death")
            harness.wait_for(lambda: (v := cluster.view())["epoch"] > before and v["phase"] == "running", "the others to go on")
            served = traffic.answers
            harness.wait_for(lambda: traffic.answers > served + 20 or traffic.wrong, "answers")
        assert not traffic.wrong, traffic.wrong[0]
        assert f"fail point: {phase}" in cluster.of(role)[0].log()
        assert "busy without progress" in cluster.server.log()


def test_the_placement_changes_and_the_bits_do_not(truth):
    """The slow loop moves and replicates experts, as the load shifts from prompt to prompt; each is loaded over steps."""
    flags = ("--min-expert-workers", 3, "--survive-expert-failures", 1, "--replica-slots", 1, "--placement-interval", 1)
    flags += ("--load-budget", 1000)  # bytes per step: an expert takes thirty
    changes = 4
    with Cluster(MODEL, *flags, name="placement", attention=2, experts=3) as cluster:
        cluster.wait_serving(2, 3)
        first = cluster.view()
        begun = time.monotonic()
        while (elapsed := time.monotonic() - begun) < harness.PATIENCE_S:
            i = int(elapsed / 3) % len(PROMPTS)  # each for three intervals
            assert ask_all(cluster.server, [PROMPTS[i]] * 8) == [truth[i]] * 8
            view = cluster.view()
            if view["totals"]["rebalances"] >= changes and view["epoch"] >= first["epoch"] + changes:
                break
        assert view["totals"]["rebalances"] >= changes and view["epoch"] >= first["epoch"] + changes, view
        assert view["totals"]["failures"] == view["totals"]["failovers"] == 0, view
        assert sum(w["experts"] for w in view["workers"] if w["role"] == "expert") > sum(
            w["experts"] for w in first["workers"] if w["role"] == "expert"
        ), "there are replicas"
        assert ask_all(cluster.server, PROMPTS) == truth
