"""Six hosts, each a network namespace: 1 server, 2 attention and 3 expert workers; one is cut off and healed.

Needs root: CMake registers this file only where namespaces can be made.
"""

import os
import subprocess
import threading
import time

import harness
import pytest
from cluster import Cluster
from test_cluster import PROMPTS, ask, ask_all

MODEL = harness.FIXTURES / "qwen3_moe"
NET = f"sy{os.getpid() % 100000}"  # names of links may have 15 characters


def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


class Hosts:
    """Namespaces on one bridge; host number n is 10.177.0.n, this machine 10.177.0.254."""

    def __init__(self, count: int):
        self.count = count
        ip("link", "add", f"{NET}b", "type", "bridge")
        ip("addr", "add", "10.177.0.254/24", "dev", f"{NET}b")
        ip("link", "set", f"{NET}b", "up")
        for n in range(1, count + 1):
            ip("netns", "add", self.netns(n))
            ip("link", "add", f"{NET}v{n}", "type", "veth", "peer", "name", "eth0", "netns", self.netns(n))
            ip("link", "set", f"{NET}v{n}", "master", f"{NET}b", "up")
            ip("-n", self.netns(n), "addr", "add", f"{self.address(n)}/24", "dev", "eth0")
            ip("-n", self.netns(n), "link", "set", "eth0", "up")
            ip("-n", self.netns(n), "link", "set", "lo", "up")

    def netns(self, n: int) -> str:
        return f"{NET}h{n}"

    def address(self, n: int) -> str:
        return f"10.177.0.{n}"

    def cut(self, n: int):
        ip("link", "set", f"{NET}v{n}", "down")

    def heal(self, n: int):
        ip("link", "set", f"{NET}v{n}", "up")

    def remove(self):
        for n in range(1, self.count + 1):
            subprocess.run(["ip", "netns", "del", self.netns(n)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{NET}b"], capture_output=True)


@pytest.fixture(scope="module")
def hosts():
    made = Hosts(6)
    yield made
    made.remove()


@pytest.fixture(scope="module")
def truth(start_server):
    with start_server(MODEL, "--attention-workers", 1, "--expert-workers", 1, name="truth") as server:
        yield [ask(server, body) for body in PROMPTS]


def test_a_host_is_cut_off_and_healed(hosts, truth):
    flags = ("--min-expert-workers", 3, "--survive-expert-failures", 1)
    with Cluster(
        MODEL, *flags, name="netns", attention=0, experts=0, server={"host": hosts.address(1), "netns": hosts.netns(1)}
    ) as cluster:
        for n, role in enumerate(["attention"] * 2 + ["expert"] * 3, start=2):
            cluster.start(role, "--data-host", hosts.address(n), netns=hosts.netns(n))
        cluster.wait_serving(2, 3)
        view = cluster.view()
        assert {worker["transport"] for worker in view["workers"]} == {"tcp"}
        assert len({worker["address"].split(":")[1] for worker in view["workers"]}) == 5, "five hosts"
        assert ask_all(cluster.server, PROMPTS) == truth

        stop, wrong = threading.Event(), []

        def traffic():
            while not stop.is_set() and not wrong:
                answers = ask_all(cluster.server, PROMPTS)
                if answers != truth:
                    wrong.append(answers)

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            for n, attention, experts in [(6, 2, 2), (3, 1, 3)]:
                begun = time.monotonic()
                hosts.cut(n)
                cluster.wait_serving(attention, experts)
                print(f"host {n} cut off: {time.monotonic() - begun:.2f} s until the others went on")
                hosts.heal(n)
                cluster.wait_serving(2, 3)
                print(f"healed and serving again {time.monotonic() - begun:.2f} s after the cut")
        finally:
            stop.set()
            thread.join(harness.PATIENCE_S)
        assert not wrong, wrong[0]
        assert cluster.server.metrics().value("switchyard_requests_total", finish_reason="error") == 0
