"""Trains the demo model on CPU cores; resumable.

Processes of one thread each take micro-batches from a shared counter, add gradients in shared
memory and split the optimizer's work by tensor: Muon for attention and expert matrices, Adam for
the rest.
The schedule runs on the clock: a short warm-up, a constant rate, then a linear decay that reaches
zero after --minutes, however many steps the machine made.
"""

import argparse
import os
import pathlib
import sys
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Freed memory stays with the process: fresh pages for every activation cost a quarter of the time.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 32))

import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from tokenizers import Tokenizer

import data
import exercises
from model import CONFIG, Layout, Model

MICRO_BATCHES = 4  # per optimizer step
LOSS_SCALE = 1.0 / 650  # about the sum of loss weights in a step
BALANCE = 0.01
WARM_UP_STEPS, CONSTANT = 50, 0.3
MOMENTUM, BETA1, BETA2, WEIGHT_DECAY, CLIP = 0.95, 0.9, 0.98, 0.02, 1.0
EMA = 0.995
EMPHASIS = {"add": 3, "subtract": 3, "py_sum": 2, "json_get": 2}  # drawn more: slow to learn


class Shared:
    """What the processes share: weights, gradients, optimizer state, counters."""

    def __init__(self, layout, world, seed):
        def new(*shape):
            return torch.zeros(*shape).share_memory_()

        self.flat = layout.initial(seed).share_memory_()
        self.first, self.second = new(layout.size), new(layout.size)
        self.ema = self.flat.clone().share_memory_()
        self.grads = new(world, layout.size)
        self.norms, self.losses = new(world), new(world, 2)
        self.load = new(CONFIG["num_hidden_layers"], CONFIG["num_experts"])
        self.weights = new(len(exercises.EXERCISES)).fill_(1.0)
        self.state = torch.zeros(2, dtype=torch.float64).share_memory_()  # step, seconds trained
        self.rate = new(1)
        self.stop = new(1)
        context = multiprocessing.get_context("spawn")
        self.next = context.Value("i", 0)
        self.barrier = context.Barrier(world)

    SAVED = ("flat", "first", "second", "ema", "load", "weights", "state")

    def save(self, path):
        torch.save({k: getattr(self, k) for k in self.SAVED}, str(path) + ".part")
        os.replace(str(path) + ".part", path)

    def load_from(self, path):
        for key, value in torch.load(path).items():
            getattr(self, key).copy_(value)


def orthogonalize(x):
    """Newton-Schulz steps of Muon (Jordan et al. 2024) on a batch of matrices, rows <= columns."""
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


class Optimizer:
    """Updates the tensors that belong to `rank`."""

    def __init__(self, layout, shared, rank, world):
        self.s, self.rank = shared, rank
        self.muon, self.adam = [], []
        for name in layout.shapes:
            layer, _, kind = name.rpartition(".")
            if kind in ("q", "k", "v", "o", "gate_up", "down"):
                if int(layer) % world == rank:
                    self.muon.append(name)
            elif list(layout.shapes).index(name) % world == rank:
                self.adam.append(name)
        self.layout = layout
        self.p, self.m, self.v = (
            layout.views(t) for t in (shared.flat, shared.first, shared.second)
        )
        self.g = layout.views(shared.grads[rank])

    def gather(self):
        """Sums all processes' gradients of our tensors into ours; returns their square norm."""
        total = 0.0
        for name in self.muon + self.adam:
            a, b = self.layout.spans[name]
            grad = self.s.grads[:, a:b].sum(0)
            self.g[name].view(-1).copy_(grad)
            total += float(grad.pow(2).sum())
        return total

    def step(self, rate, clip, count):
        for name in self.adam:
            g, m, v, p = self.g[name].mul_(clip), self.m[name], self.v[name], self.p[name]
            m.lerp_(g, 1 - BETA1)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            scale = (v / (1 - BETA2**count)).sqrt_().add_(1e-8)
            p.addcdiv_(m, scale, value=-rate / (1 - BETA1**count))
            if p.dim() > 1:
                p.mul_(1 - rate * WEIGHT_DECAY)
        groups = {}
        for name in self.muon:
            g, m = self.g[name].mul_(clip), self.m[name]
            m.mul_(MOMENTUM).add_(g)
            update, target = g.add(m, alpha=MOMENTUM), self.p[name]
            if name.endswith("gate_up"):  # gate and up are matrices of their own
                half = update.shape[1] // 2
                update, target = (
                    update.view(-1, half, update.shape[2]),
                    target.view(-1, half, target.shape[2]),
                )
            elif update.dim() == 2:
                update, target = update[None], target[None]
            if update.shape[1] > update.shape[2]:
                update, target = update.mT, target.mT
            groups.setdefault(tuple(update.shape[1:]), []).append((update, target))
        for (rows, columns), members in groups.items():
            updates = orthogonalize(torch.cat([u for u, _ in members]))
            # Matches Adam's update size (Liu et al. 2025).
            scale = rate * 0.2 * max(rows, columns) ** 0.5
            for (_, target), update in zip(members, updates.split([len(u) for u, _ in members])):
                target.mul_(1 - rate * WEIGHT_DECAY).add_(update, alpha=-scale)


def plan(step):
    """Kinds of a step's micro-batches: exercises, and running text or long rows."""
    return ["long_rows" if step % 4 == 3 else "text_rows"] + ["exercise_rows"] * (MICRO_BATCHES - 1)


def loss_of(model, batch, load):
    """Loss of a micro-batch; `load` is the running share of each expert per layer."""
    hidden, routing = model.hidden(batch["ids"], batch["positions"], batch["mask"])
    chosen = batch["weights"].flatten().nonzero()[:, 0]
    weights = batch["weights"].flatten()[chosen]
    logits = model.logits(hidden.flatten(0, 1)[chosen])
    nll = F.cross_entropy(logits, batch["targets"].flatten()[chosen], reduction="none")
    task = (nll * weights).sum()
    # Balance against the load of all domains together, so that one domain may stay skewed.
    balance = 0.0
    for layer, (probs, counts) in enumerate(routing):
        load[layer].lerp_(counts / counts.sum(), 0.02)
        balance = balance + load.shape[1] * (load[layer].clone() * probs).sum()
    return task * LOSS_SCALE + BALANCE * balance / (
        len(routing) * MICRO_BATCHES
    ), nll.detach().mean()


@torch.no_grad()
def accuracy(model, items):
    """Share of items per exercise whose every answer token is the arg max: greedy exactness."""
    right = {}
    for start in range(0, len(items), 32):
        part = items[start : start + 32]
        length = max(len(p) + len(a) for _, p, a in part)
        ids = torch.tensor([(p + a + [data.EOT] * length)[:length] for _, p, a in part])
        hidden, _ = model.hidden(ids, torch.arange(length).repeat(len(part), 1), None)
        for row, (name, prompt, answer) in enumerate(part):
            at = len(prompt) - 1
            best = model.logits(hidden[row, at : at + len(answer)]).argmax(-1)
            right.setdefault(name, []).append(best.tolist() == answer)
    return {name: sum(hits) / len(hits) for name, hits in right.items()}


def rate_at(step, progress, peak):
    decay = min(1.0, max(0.0, (1 - progress) / (1 - CONSTANT)))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * decay


def worker(rank, args, shared):
    torch.set_num_threads(1)
    layout = Layout(CONFIG)
    params = {k: v.requires_grad_() for k, v in layout.views(shared.flat).items()}
    grads = layout.views(shared.grads[rank])
    for name, p in params.items():
        p.grad = grads[name]
    model = Model(CONFIG, params)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    batches = data.Batches(args.work, tokenizer, int(shared.state[0]) * 16 + rank + args.seed)
    optimizer = Optimizer(layout, shared, rank, args.processes)
    items = data.validation(args.work, tokenizer, 24, "valid", 5) if rank == 0 else None
    last = saved = time.time()
    while not shared.stop[0]:
        if rank == 0:
            shared.next.value = 0
            shared.rate[0] = rate_at(
                int(shared.state[0]), float(shared.state[1]) / (60 * args.minutes), args.rate
            )
        shared.grads[rank].zero_()
        batches.weights = shared.weights.tolist()
        kinds = plan(int(shared.state[0]))
        shared.barrier.wait()
        while True:
            with shared.next.get_lock():
                index = shared.next.value
                shared.next.value += 1
            if index >= MICRO_BATCHES:
                break
            kind = kinds[index]
            loss, nll = loss_of(model, getattr(batches, kind)(), shared.load)
            loss.backward()
            if kind != "long_rows":
                shared.losses[rank, int(kind == "text_rows")].lerp_(nll, 0.05)
        shared.barrier.wait()
        with torch.no_grad():
            shared.norms[rank] = optimizer.gather()
            shared.barrier.wait()
            norm = float(shared.norms.sum().sqrt())
            optimizer.step(
                float(shared.rate[0]), min(1.0, CLIP / (norm + 1e-6)), int(shared.state[0]) + 1
            )
        if rank == 0 and shared.state[1] >= 60 * args.minutes:
            shared.stop[0] = 1
        shared.barrier.wait()
        if rank == 0:
            now = time.time()
            shared.ema.lerp_(shared.flat, 1 - EMA)
            shared.state[0] += 1
            shared.state[1] += now - last
            last = now
            report(args, shared, model, items, norm)
            if now - saved > 60 * args.save_minutes:
                shared.save(args.work / "checkpoint.pt")
                saved = now
    if rank == 0:
        shared.save(args.work / "checkpoint.pt")


def report(args, shared, model, items, norm):
    step, seconds = int(shared.state[0]), float(shared.state[1])
    if step % 20 == 0:
        exercise, text = shared.losses.mean(0).tolist()
        speed = step * MICRO_BATCHES * data.MICRO_BATCH / seconds
        print(
            f"step {step} {seconds / 60:.1f}/{args.minutes} min, {speed:,.0f} tokens/s, "
            f"exercises {exercise:.3f}, text {text:.3f}, "
            f"norm {norm:.2f}, rate {float(shared.rate[0]):.2e}",
            file=sys.stderr,
            flush=True,
        )
    if step % args.validate_steps == 0:
        got = accuracy(model, items)
        for i, name in enumerate(exercises.EXERCISES):
            shared.weights[i] = EMPHASIS.get(name, 1) * min(1.0, 1.15 - got[name])
        print(
            f"validation {sum(got.values()) / len(got):.3f}: "
            + " ".join(f"{n}={v:.2f}" for n, v in got.items()),
            file=sys.stderr,
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=pathlib.Path, required=True, help="corpus and checkpoint folder"
    )
    parser.add_argument(
        "--model", type=pathlib.Path, required=True, help="folder with tokenizer.json"
    )
    parser.add_argument("--minutes", type=float, default=90, help="length of the schedule")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--validate-steps", type=int, default=200)
    parser.add_argument("--save-minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(1)
    shared = Shared(Layout(CONFIG), args.processes, args.seed)
    if (args.work / "checkpoint.pt").exists():
        shared.load_from(args.work / "checkpoint.pt")
        print(f"resuming at step {int(shared.state[0])}", file=sys.stderr)
    multiprocessing.spawn(worker, (args, shared), nprocs=args.processes)


if __name__ == "__main__":
    main()
