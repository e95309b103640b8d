"""
How many bytes cross between processes in a step? GaLore averages rank-r gradients, DistributedDataParallel full ones.

    python experiments/wire.py               60m, 130m, 1b and 7b, two to three minutes; writes experiments/results/wire.json
    python experiments/wire.py --sizes 7b    some of them; only printed, unless --out says where to

Counted, not calculated: the real step of train.py (train.prepare, train.training_step) runs on fake tensors as one of two processes,
in PyTorch's fake process group, which sends nothing; every collective operation passes `Wire`, which adds up the bytes handed to it.
So does one backward pass of the same model in DistributedDataParallel, whose communication hook adds up its buckets (at 60m with
real tensors, at the other sizes with fake ones). The weights are bf16, the vocabulary 32,000, rank and T the recipe's for the size.

For a matrix W, m x n (m <= n), in a group of its rank:
    ours    R, r x n, in every step; once in T steps [R | Y'], r x (n + m)        r (n + m / T) values a step, on average
    DDP     G, m x n, in every step                                               m n
    ratio   m / (r (1 + m / (n T))), a little below m / r
Embedding, head and norms are exchanged in full by both. The mean over T steps is exact: one step in which nothing is due is run and one
in which everything is; that each matrix is due once in T steps is asked of the optimiser, step by step. The script ends with an error
where the count is not that of these formulas.

A byte here is one that a process hands to all_reduce; a ring sends 2 (N - 1) / N times as many from each of N processes, of either method.
Both exchange once a step, whatever the number of micro-batches (counted with two; DDP needs no_sync for that).

Left out: the four early refreshes of a run (r m values each); what train.train exchanges beside (the loss, whether to stop: a few numbers a micro-batch);
time.
"""

import argparse
import json
import os
import platform
import sys
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from galore import param_groups  # noqa: E402
from memory import settled  # noqa: E402
from model import Config, Llama  # noqa: E402
from speed import show  # noqa: E402

HERE = Path(__file__).parent
SIZES = ("60m", "130m", "1b", "7b")
REAL = "60m"  # the size at which DDP gets real tensors: 7b would take 27 GB
WORLD = 2
OPTIONS = f"--galore --state_bits 8 --vocab_size 32000 --dtype bfloat16 --batch_size 1 --total_batch_size {2 * WORLD} --recompute 0 --no-compile"


class Wire(TorchDispatchMode):
    """Bytes that collective operations were given, of the projected gradients (r rows; nothing else has r) and of the others."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank, self.matrices, self.rest = rank, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            for x in args[0]:
                if x.ndim == 2 and len(x) == self.rank:
                    self.matrices += x.nbytes
                else:
                    self.rest += x.nbytes
        return op(*args, **(kwargs or {}))


def ours(args: argparse.Namespace, config: Config, due: bool) -> tuple[int, int]:
    """Bytes of matrices and others in a step of train.py; with `due`, of one in which all subspaces are refreshed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Llama(config, "cpu", torch.bfloat16)
        opt = train.prepare(model, args)
        for group in opt.param_groups:  # in between no block is due: there are fewer blocks than steps, and the first is due at 0
            group["t"] = 1000 * args.update_proj_gap + (group["offset"] - 1 if due else 1)
        assert all(opt.due(group) == due for group in opt.param_groups if group["rank"])
        opt.arm()
        tokens = torch.zeros(1, args.seq_len, dtype=torch.long)
        opt.agree = lambda *ps: None  # 16 bytes a step, which on fake tensors nobody could read
        with Wire(args.rank) as wire:
            train.training_step(model, opt, repeat((tokens, tokens)), train.accumulation(args))
    return wire.matrices, wire.rest


def times_due(args: argparse.Namespace, config: Config) -> set[int]:
    """How often in T steps a matrix is due: the different answers among all matrices."""
    opt = train.prepare(Llama(config, "meta", torch.bfloat16), argparse.Namespace(**vars(args) | dict(layerwise=False)))
    times = {p: 0 for p, group in opt.group.items() if group["rank"]}
    for t in range(args.update_proj_gap):
        for group in opt.param_groups:
            group["t"] = 1000 * args.update_proj_gap + t
        for p in times:
            times[p] += opt.due(opt.group[p])
    return set(times.values())


def ddp(config: Config, real: bool) -> tuple[int, int]:
    """Bytes of matrices and others in DistributedDataParallel's buckets, in one backward pass."""
    total, matrices = [], []

    def hook(state, bucket):
        total.append(bucket.buffer().nbytes)
        matrices.extend(g.nbytes for p, g in zip(bucket.parameters(), bucket.gradients()) if p in inside)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        model = Llama(config, "cpu", torch.bfloat16)
        inside = {m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)}
        parallel = DistributedDataParallel(model, init_sync=real)  # which compares shapes by their data: fake tensors have none
        parallel.register_comm_hook(None, hook)
        tokens = torch.zeros(1, 16, dtype=torch.long)
        parallel(tokens, tokens).backward()
    return sum(matrices), sum(total) - sum(matrices)


def count(size: str) -> dict:
    """A size's bytes a step, checked against the closed form."""
    args, config = settled(f"--size {size} {OPTIONS}")
    *blocks, others = param_groups(Llama(config, "meta"), rank=1)
    shapes, rest = [p.shape for block in blocks for p in block["params"]], [p.numel() for p in others["params"]]
    r, T = args.rank, args.update_proj_gap
    (plain, others), (refreshing, others_then) = ours(args, config, due=False), ours(args, config, due=True)
    theirs, their_others = ddp(config, real=size == REAL)

    in_T_steps = T * plain + (refreshing - plain)  # each matrix brings its Y along once
    found = {"matrices, T steps": in_T_steps, "matrices, DDP": theirs, "others": others, "others, refreshing": others_then,
             "others, DDP": their_others, "times due": times_due(args, config)}  # fmt: skip
    closed = {"matrices, T steps": 2 * sum(r * (T * max(s) + min(s)) for s in shapes), "matrices, DDP": 2 * sum(s.numel() for s in shapes),
              "others": 2 * sum(rest), "others, refreshing": 2 * sum(rest), "others, DDP": 2 * sum(rest), "times due": {1}}  # fmt: skip
    for name in closed:
        if found[name] != closed[name]:
            sys.exit(f"{size}: {name} is {found[name]} as counted and {closed[name]} by the formula: one of the two is wrong")
    mean = in_T_steps / T
    m, M = min(shapes[0]), 1e6
    return {"size": size, "r": r, "T": T, "m / r": m / r, "matrices, ordinary step": plain / M, "matrices, refresh of all": (refreshing - plain) / M,
            "matrices, mean": mean / M, "matrices, DDP": theirs / M, "matrices, ratio": theirs / mean,
            "all, mean": (mean + others) / M, "all, DDP": (theirs + their_others) / M, "all, ratio": (theirs + their_others) / (mean + others),
            "DDP's tensors": "real" if size == REAL else "fake"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", choices=[size for size in train.SIZES if not size.startswith("mobile")], default=SIZES,
                        help="which models (default: 60m 130m 1b 7b)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="where the figures go (default: experiments/results/wire.json, if --sizes is not given)")
    args = parser.parse_args()
    if set(args.sizes) == set(SIZES):
        args.out = args.out or HERE / "results" / "wire.json"
    os.environ["WORLD_SIZE"] = str(WORLD)  # train.world() reads it, as torchrun would have set it
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    rows = [count(size) for size in dict.fromkeys(args.sizes)]
    dist.destroy_process_group()

    shown = [{k: f"{x:.3f}" if k.endswith("ratio") else x for k, x in row.items()} for row in rows]
    print("MB (1e6 bytes) that a process hands to all_reduce in a step; ours: the mean of T steps, refreshes in it")
    show("matrices of the blocks", [{k.removeprefix("matrices, "): x for k, x in row.items() if not k.startswith(("all", "DDP"))} for row in shown])
    show("all parameters", [{k.removeprefix("all, "): x for k, x in row.items() if k in ("size", "r") or k.startswith(("all", "DDP"))} for row in shown],
         "(embedding, head and norms are exchanged in full by both)")  # fmt: skip
    print("\nas the closed form says, to the byte: r (n + m / T) values a matrix and step, m n in DDP")
    if not args.out:
        return
    conditions = {"command": " ".join(["python experiments/wire.py", *sys.argv[1:]]), "options of train.py": f"--size SIZE {OPTIONS}", "processes": WORLD,
                  "unit": "MB (1e6 bytes) handed to all_reduce by a process, a step", "ours": "eager step on fake tensors, fake process group",
                  "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"conditions": conditions, "sizes": rows}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
