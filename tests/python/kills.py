"""Kills at fail points (step, layer, phase) under traffic whose every answer is compared."""

import random
import threading
import time
from collections import Counter

import harness
from cluster import Cluster
from test_cluster import PROMPTS, ask

# Every phase of tests/fail_points.h, and the pool that it belongs to.
IN_A_STEP = [
    *(("attention", phase) for phase in ("step", "counts", "counted", "planned", "dispatched", "combined", "result", "reported")),
    *(("expert", phase) for phase in ("step", "received", "computing", "moving", "moved", "computed", "answered")),
]
WHILE_LOADING = [("expert", "load"), ("expert", "loaded")]
WHILE_CHANGING = [(role, phase) for role in ("attention", "expert") for phase in ("quiesced", "install")]
ALL = IN_A_STEP + WHILE_LOADING + WHILE_CHANGING
WITHOUT_LAYER = ("step", "result", "reported", "moving", "moved")
NUM_MOE_LAYERS = 2  # of qwen3_moe
STREAMS = 10
PAIRS = 3  # after each round through the points


class Traffic:
    """Streams that ask for ever, from several threads, until the block ends; nothing may differ from `truth`."""

    def __init__(self, server: harness.Server, truth: list):
        self.server, self.truth = server, truth
        self.by_stream, self.wrong, self.seconds = [0] * STREAMS, [], []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(STREAMS)]

    def _run(self, stream: int):
        i = stream
        while not self._stop.is_set() and not self.wrong:
            begun = time.monotonic()
            try:
                answer = ask(self.server, PROMPTS[i % len(PROMPTS)])
            except BaseException as error:  # noqa: B902: reported by the test
                answer = repr(error)
            self.seconds.append(time.monotonic() - begun)
            self.by_stream[stream] += 1
            if answer != self.truth[i % len(PROMPTS)]:
                self.wrong.append((PROMPTS[i % len(PROMPTS)], answer))
            i += STREAMS - 1

    @property
    def answers(self) -> int:
        return sum(self.by_stream)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(harness.PATIENCE_S)
            assert not thread.is_alive(), "a request without an end"


class Kills:
    """Kills workers of a cell at the points in turn, in random order, then two at once; replaces each one."""

    def __init__(self, cluster: Cluster, attention: int, experts: int, chance: random.Random, points: list):
        self.cluster, self.attention, self.experts, self.chance = cluster, attention, experts, chance
        self.all_points = points
        self.points: Counter = Counter()
        self.recoveries: list[float] = []  # s from the death of one that computes to the next epoch

    def _recovered(self) -> bool:
        view = self.cluster.view()
        return view["totals"]["failures"] == self.points.total() and view["phase"] == "running"

    def _wait_dead(self, victim: harness.Process, what: str) -> float:
        """Until it has died there; when that was."""
        deaths = []
        thread = threading.Thread(target=lambda: (victim.process.wait(), deaths.append(time.monotonic())), daemon=True)
        thread.start()  # wait() with a time limit would poll
        thread.join(harness.PATIENCE_S)
        assert deaths, f"{victim.log_path.name} did not die at {what}; log:\n{victim.log_tail()}"
        assert victim.process.returncode == -9, victim.log_tail()
        assert f"fail point: {what.split()[0]}" in victim.log(), victim.log_tail()
        return deaths[0]

    def _wait_recovered(self) -> float:
        harness.wait_for(self._recovered, "the cell to go on")
        return time.monotonic()

    def _in_a_step(self, phase: str, steps: int) -> str:
        layer = -1 if phase in WITHOUT_LAYER else self.chance.randrange(NUM_MOE_LAYERS)
        return f"{phase} {steps} {layer} kill"

    def one(self, role: str, phase: str):
        cluster, what = self.cluster, f"{phase} 0 -1 kill"
        self.points[role, phase] += 1
        if (role, phase) in WHILE_LOADING:
            self._wait_dead(cluster.start(role, fail=what), what)
            self._wait_recovered()
            return
        victim = self.chance.choice(cluster.of(role))
        if (role, phase) in WHILE_CHANGING:  # the new worker changes the epoch
            cluster.arm(victim, what)
            cluster.start(role)
            self._wait_dead(victim, what)
            self._wait_recovered()
            return
        what = self._in_a_step(phase, self.chance.randint(5, 30))
        cluster.arm(victim, what)
        died = self._wait_dead(victim, what)
        self.recoveries.append(self._wait_recovered() - died)
        cluster.start(role)

    def two(self):
        """Two at about the same time: two expert workers are more than the cell survives without a new one."""
        steps = self.chance.randint(5, 30)
        victims = self.chance.sample(self.cluster.of("attention")[:1] + self.cluster.of("expert"), 2)
        points = []
        for victim in victims:
            phase = self.chance.choice([p for role, p in self.all_points if role == victim.role and (role, p) in IN_A_STEP])
            self.points[victim.role, phase] += 1
            points.append(self._in_a_step(phase, steps))
            self.cluster.arm(victim, points[-1])
        for victim, what in zip(victims, points):
            self._wait_dead(victim, what)
            self.cluster.start(victim.role)
        self._wait_recovered()
        self.cluster.wait_serving(self.attention, self.experts)

    def _get_on(self, traffic: Traffic):
        """Whoever was struck ends first: a request struck three times in a row, the last time alone, fails by design."""
        begun = list(traffic.by_stream)

        def answered() -> bool:
            return all(now > then for now, then in zip(traffic.by_stream, begun))

        harness.wait_for(lambda: traffic.wrong or answered(), "every stream to get an answer")

    def run(self, at_least: int, traffic: Traffic):
        while self.points.total() < at_least and not traffic.wrong:
            for role, phase in self.chance.sample(self.all_points, len(self.all_points)):
                self._get_on(traffic)
                if traffic.wrong:
                    return
                self.one(role, phase)
                if self.chance.random() < 0.7 or len(self.cluster.of("expert")) < self.experts:
                    self.cluster.wait_serving(self.attention, self.experts)
            self.cluster.wait_serving(self.attention, self.experts)
            for _ in range(PAIRS):
                self._get_on(traffic)
                if traffic.wrong:
                    return
                self.two()

    def figures(self, traffic: Traffic) -> str:
        recoveries, seconds = sorted(self.recoveries), sorted(traffic.seconds)
        return (
            f"{self.points.total()} kills at {len(self.points)} points, {traffic.answers} answers, all equal to the "
            f"undisturbed ones, no error; from a death to the next epoch p50 {recoveries[len(recoveries) // 2]:.3f} s, "
            f"max {recoveries[-1]:.3f} s; an answer took p50 {seconds[len(seconds) // 2]:.2f} s, max {seconds[-1]:.2f} s"
        )


def kill_at_fail_points(truth: list, balance: str, seed: int, at_least: int):
    """A cell of 2 x 3 whose weights move, are replicated and placed anew while workers die; prints the figures."""
    print(f"seed {seed}")
    moves = balance == "llep"  # auto moves weights where that pays, which it may never do here
    points = [point for point in ALL if moves or point[1] not in ("moving", "moved")]
    attention, experts = 2, 3
    flags = (
        *("--min-expert-workers", experts, "--survive-expert-failures", 1, "--expert-foreign-slots", 2),
        *("--replica-slots", 1, "--placement-interval", 1, "--balance", balance),
        *("--micro-batches", 2 if moves else "auto"),
    )
    with Cluster(
        harness.FIXTURES / "qwen3_moe", *flags, name=f"points-{balance}", attention=attention, experts=experts, failing={}
    ) as cluster:
        cluster.wait_serving(attention, experts)
        kills = Kills(cluster, attention, experts, random.Random(seed), points)
        with Traffic(cluster.server, truth) as traffic:
            kills.run(at_least, traffic)
        assert not traffic.wrong, traffic.wrong[0]
        metrics = cluster.server.metrics()
        assert metrics.value("switchyard_requests_total", finish_reason="error") == 0
        assert cluster.view()["totals"]["failures"] == kills.points.total()
        assert not moves or metrics.value("switchyard_steps_total", micro_batches="2") > 0
        moved = metrics.value("switchyard_expert_weight_transfers_total")
        rebalances = cluster.view()["totals"]["rebalances"]
        assert moved > 0 or not moves, "weights move between expert workers"
    print(f"{' '.join(map(str, flags))}: {kills.figures(traffic)}; {moved:.0f} experts moved, {rebalances} rebalances")
