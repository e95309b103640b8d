"""
What does it take on a GPU, and how fast is it there? Every claim of this repository that needs one, in under ten minutes.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/gpu.py                         one NVIDIA card of 24 GB or more; writes experiments/results/gpu.json
    python experiments/gpu.py --parts 7b refresh      only these
    python experiments/gpu.py --quick --device cpu    sizes of a toy, under two minutes: do all paths run? Its figures mean nothing

Parts, in the order in which they run:
    7b       131,072 tokens a step: tokens/s, compiled and eager; memory, with clipping too; where the time of a micro-batch goes
    correct  what the tests hold on a CPU, on this card: basis, codes, thin = plain, resuming, compiled = eager, no waiting for the host
    7b_256   256 tokens a step, the paper's record of memory: ours, and galore-torch's GaLoreAdamW8bit
    1b       131,072 tokens a step, against full-rank torch.optim.AdamW(fused=True)
    refresh  all 224 bases of the 7B model, against torch.linalg.svd
    1b_256   as 7b_256
    7b_r256  memory at rank 256
    60m      the whole training step, compiled and eager

A card with more memory than --cap (24 GiB) is held to that, as if it had no more. Every figure is written as soon as it is known,
and a part that fails, or for which no time is left, says so in the file; the next one goes on. Times are of steps after those that
compile, synchronised at both ends, medians; past the early refreshes of P, of which the part refresh gives the cost. "Share of
the peak" counts 6 operations a parameter and token against the fastest square bf16 product measured here. GB is 1e9 bytes.

Left out on purpose: data (tokens are random, which no kernel notices), quality (see the training runs), several GPUs.
"""

import argparse
import gc
import io
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adam8bit  # noqa: E402
import galore  # noqa: E402
import train  # noqa: E402
from model import Llama  # noqa: E402

TOY = dict(size="toy", rank=64, vocab_size=512, seq_len=32, batch=2, total=8)  # --quick's size of everything
PEERS = ("galore-torch", "bitsandbytes")


# ----- what was measured so far -------------------------------------------------------------------------------------


class Report:
    """On the screen, and in a file that is whole after every line."""

    def __init__(self, args: argparse.Namespace, conditions: dict):
        self.args, self.deadline, self.peak = args, time.monotonic() + 60 * args.minutes, None
        self.all = {"conditions": conditions, "parts": {}, "bars": []}
        if args.quick:
            self.all = {"note": "--quick: sizes of a toy. These figures say that the paths run, and nothing else."} | self.all

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        part = self.args.out.with_suffix(".part")
        part.write_text(json.dumps(self.all, indent=1) + "\n")
        part.replace(self.args.out)

    def state(self, part: str, **what) -> None:
        self.part = self.all["parts"].setdefault(part, {"rows": []})
        self.part.update(what)
        print(f"\n{part}: " + ", ".join(f"{k} {v}" for k, v in what.items()), flush=True)
        self.write()

    def row(self, what: str, **figures) -> None:
        self.part["rows"].append({"what": what} | figures)
        print(f"  {what}: " + ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()), flush=True)
        self.write()

    def bar(self, name: str, value: float | None, sign: str, limit: float) -> None:
        """`value` None: it could not be measured here."""
        met = None if value is None else bool(value <= limit if sign == "<=" else value >= limit)
        self.all["bars"].append({"name": name, "value": value, "limit": f"{sign} {limit:g}", "met": met})
        print(f"  bar: {name}: {value if value is None else f'{value:.4g}'} {sign} {limit:g}: {dict({True: 'met', False: 'NOT MET'}).get(met, 'not measured')}", flush=True)
        self.write()


# ----- measuring ----------------------------------------------------------------------------------------------------


def seconds(run) -> float:
    """Of one call, with nothing under way before and after."""
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def typical(run, times: int = 5, within: float = 8.0) -> float:
    """Median seconds of up to `times` calls, which end once they took `within` seconds."""
    taken = []
    while len(taken) < times and (not taken or sum(taken) + taken[-1] < within):
        taken.append(seconds(run))
    return statistics.median(taken)


def memory(forget: bool = False) -> dict:
    """Peak since the last time it was told to forget, GB; nothing is known on a CPU."""
    if not torch.cuda.is_initialized():
        return {"allocated GB": None, "reserved GB": None}
    peak = {"allocated GB": torch.cuda.max_memory_allocated() / 1e9, "reserved GB": torch.cuda.max_memory_reserved() / 1e9}
    if forget:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return peak


def matrix_peak(args) -> float:
    """Operations a second of the fastest square bf16 product of random matrices."""
    best = 0.0
    for n in (256,) if args.quick else (4096, 8192):
        a, b = (torch.randn(n, n, device=args.device, dtype=torch.bfloat16) for _ in range(2))
        out, repeats = torch.empty_like(a), max(1, 2 * 8192**3 // n**3) if not args.quick else 1
        seconds(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)])
        best = max(best, repeats * 2 * n**3 / typical(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)], 20, 3.0))
    return best


# ----- what is measured: a model, its optimiser and batches, as a command line of train.py sets them up ---------------


def build(report, size: str, rank: int | None, batch: int, total: int, *flags: str, prepare=None) -> SimpleNamespace:
    """`batch` sequences of 256 tokens a micro-batch, `total` a step; bf16, 8-bit state, compiled, unless the flags say otherwise.
    prepare: (model, args) -> optimiser, in place of train.py's."""
    args, shape = report.args, dict(size=size, rank=rank, vocab_size=32000, seq_len=256, batch=batch, total=total)
    if args.quick:
        shape = TOY | dict(rank=rank and TOY["rank"], batch=min(batch, 2), total=min(total, 8))
    words = [f"--size={shape['size']}", f"--vocab_size={shape['vocab_size']}", f"--seq_len={shape['seq_len']}", f"--batch_size={shape['batch']}",
             f"--total_batch_size={shape['total']}", *(["--galore", f"--rank={shape['rank']}"] if rank else []), "--dtype=bfloat16", "--state_bits=8",
             "--compile" if args.compile else "--no-compile", f"--device={args.device}", *flags]  # fmt: skip
    run = train.arguments().parse_args(words)
    config = train.settle(run, None)
    torch.manual_seed(0)
    model = Llama(config, run.device, getattr(torch, run.dtype))
    report.args.live.append(case := SimpleNamespace(args=run, config=config, model=model, opt=None, command="train.py " + " ".join(words)))
    case.opt = (prepare or train.prepare)(model, run)
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(config.vocab_size, (run.batch_size, run.seq_len + 1), generator=draw) for _ in range(4)]
    case.batches = cycle([(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in tokens])  # on the host, as in training
    return case


def clean(live: list) -> None:
    """Gives back the memory of all that was built. (Left to itself it would stay: a parameter's hook holds the parameter, and
    Python's collector does not see through tensors.)"""
    for case in live:
        for p in case.model.parameters():
            p.grad, p.data = None, p.data.new_empty(0)
        for proxy in getattr(case.opt, "proxies", {}).values():
            proxy.grad = None
        for state in case.opt.state.values() if case.opt else ():
            state.clear()
    live.clear()
    torch._dynamo.reset()
    gc.collect()
    memory(forget=True)


def step(case, micro: int = 1) -> torch.Tensor:
    """A training step of `micro` micro-batches; their mean loss."""
    if getattr(case.opt, "accumulate", None):
        case.opt.accumulate = micro
    return train.training_step(case.model, case.opt, case.batches, micro)


def stand(opt: galore.GaLoreAdamW, due: bool) -> None:
    """As if so many steps had been taken that in the next one P of some block is due, or of none; past the early refreshes."""
    for t in range(150, 1500):
        for group in opt.param_groups:
            group["t"] = t
        if any(map(opt.due, opt.group)) == due:
            break
    opt.arm()


def speed(report, case, what: str, within: float = 40.0) -> float:
    """Tokens a second of steps of the whole batch. Where one would take longer than `within` seconds, fewer micro-batches are
    timed, and the row says how many: the rest is taken to cost what each of those did."""
    tokens, whole = case.args.batch_size * case.args.seq_len, case.args.total_batch_size // case.args.batch_size
    step(case)
    step(case, min(whole, 2))  # a second micro-batch adds up what the first has left
    one = typical(lambda: step(case), 20, 5.0)
    figures = {}
    timed, took = 1, one
    if whole > 1:
        each = max(0.0, typical(lambda: step(case, min(3, whole)), 5, 8.0) - one) / (min(3, whole) - 1)
        figures = {"s a micro-batch": each, "s of the update": one - each}
        timed = whole if one + (whole - 1) * each <= within else max(3, int(within / each))
        took = typical(lambda: step(case, timed), 3, within) + (whole - timed) * each
    rate = whole * tokens / took
    figures |= {"micro-batches": whole, "timed": timed, "tokens a step": whole * tokens, "s a step": took}
    share = 6 * case.model.num_parameters() * rate / report.peak
    report.row(what, **{"tokens/s": rate, "share of the peak": share}, **figures, command=case.command)
    case.share = share
    return rate


def eager():
    return torch.compiler.set_stance("force_eager")  # what is compiled is called uncompiled


def planned(case) -> float:
    """GB that train.py --plan foretells, whether it says so in GB or in bytes."""
    n = train.peak(case.config, case.args)
    return n / 1e9 if n > 1e5 else n


def remember(report, case, what: str, limit: float | None) -> dict:
    """A row of the peak since the last time memory was told to forget, beside the plan; and its bars."""
    peak, plan = memory(), planned(case)
    off = None if peak["allocated GB"] is None else abs(peak["allocated GB"] / plan - 1)
    report.row(f"memory: {what}", **peak, **{"plan GB": plan, "off the plan": off})
    if limit is not None:
        report.bar(f"memory: {what}, GB", peak["allocated GB"], "<=", limit)
        report.bar(f"memory: {what}, off the plan", off, "<=", 0.03)
    return peak


# ----- the parts ----------------------------------------------------------------------------------------------------


def seven(report) -> None:
    case = build(report, "7b", 1024, 16, 512, "--activation_checkpointing")
    report.row("first step, which compiles", seconds=seconds(lambda: step(case)), **memory())
    stand(case.opt, due=False)
    speed(report, case, "7B, r = 1024", within=min(100.0, report.left() - 100))
    report.bar("7B, share of the bf16 peak", case.share, ">=", 0.5)

    for what, clip in ("7B, 131,072 tokens", None), ("7B, 131,072 tokens, clipping", 1.0):  # from 2 micro-batches on it is the same
        case.args.grad_clipping = case.opt.max_norm = clip
        stand(case.opt, due=True)
        step(case, 2)  # compiles what a refreshing block, and clipping, need
        memory(forget=True)
        stand(case.opt, due=True)
        step(case, 2)
        remember(report, case, what, 24.0)
    case.args.grad_clipping = case.opt.max_norm = None
    stand(case.opt, due=False)
    where_time_goes(report, case)
    with eager():
        memory(forget=True)
        speed(report, case, "7B, r = 1024, eager", within=8.0)
        remember(report, case, "7B, 131,072 tokens, eager", None)


def where_time_goes(report, case) -> None:
    """One micro-batch and the update, by kind of kernel and by kernel. What `move` launches is the update."""
    move = case.opt.move

    def marked(*a):
        with torch.profiler.record_function("update"):
            return move(*a)

    wall = typical(lambda: step(case), 3)  # without the profiler, whose own work delays launches
    case.opt.move = marked
    with torch.profiler.profile() as profiler:
        step(case)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    del case.opt.move
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(path := f"{folder}/trace.json")
        events = [e | {"cat": e.get("cat"), "end": e["ts"] + e["dur"]} for e in json.loads(Path(path).read_bytes())["traceEvents"] if "dur" in e]
    for line in breakdown(events, wall, "kernel" if torch.cuda.is_initialized() else "cpu_op"):
        report.row(*line[:1], **line[1])


def breakdown(events: list[dict], wall: float, kernel: str) -> list[tuple[str, dict]]:
    """Events of a trace (times in microseconds), and seconds a step takes -> shares of that, and the 15 longest kernels."""
    updates = sorted((e["ts"], e["end"]) for e in events if e["cat"] == "user_annotation" and e["name"] == "update")
    launched = {e["args"]["correlation"]: e["ts"] for e in events if e["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}
    kinds, kernels, busy, until = {}, {}, 0.0, 0.0
    for e in sorted((e for e in events if e["cat"] in (kernel, "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"]):
        busy, until = busy + max(0.0, e["end"] - max(until, e["ts"])), max(until, e["end"])
        start = launched.get(e.get("args", {}).get("correlation"), e["ts"])
        i = bisect(updates, (start, math.inf)) - 1
        update = i >= 0 and start <= updates[i][1]
        if re.search(r"flash|fmha|attention", e["name"], re.I):
            kind = "attention"
        elif re.search(r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|triton_tem|::mm$|::addmm$", e["name"], re.I):
            kind = "matrix products"
        else:
            kind = "other kernels"
        for table, key in (kinds, ("update: " if update else "model: ") + kind), (kernels, e["name"][:120]):
            time_, calls = table.get(key, (0.0, 0))
            table[key] = time_ + e["dur"], calls + 1
    table = [("time of one micro-batch and the update", {"ms": 1e3 * wall, "GPU busy ms": busy / 1e3, "idle share": 1 - busy / 1e6 / wall})]
    for kind, (time_, calls) in sorted(kinds.items()):
        table.append((kind, {"ms": time_ / 1e3, "share": time_ / 1e6 / wall, "kernels": calls}))
    for name, (time_, calls) in sorted(kernels.items(), key=lambda item: -item[1][0])[:15]:
        table.append((name, {"ms": time_ / 1e3, "share": time_ / 1e6 / wall, "calls": calls}))
    return table


def one(report) -> None:
    def adamw(model, args):
        compile_blocks(model, args)
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    case = build(report, "1b", 512, 16, 512)
    stand(case.opt, due=False)
    ours = speed(report, case, "1B, GaLore r = 512, 8 bits", 20.0)
    with eager():
        speed(report, case, "1B, GaLore r = 512, 8 bits, eager", 5.0)
    clean(report.args.live)
    theirs = speed(report, build(report, "1b", None, 16, 512, prepare=adamw), "1B, torch.optim.AdamW, fused", 20.0)
    report.row("memory of that", **memory())
    report.bar("1B, tokens/s over fused AdamW's", ours / theirs, ">=", 1.1)


def compile_blocks(model, args) -> None:
    for block in model.model.layers if args.compile else ():
        block.compile(fullgraph=True, dynamic=False)


def seven_256(report) -> None:
    at_256_tokens(report, "7b", 1024, 20.5)


def one_256(report) -> None:
    at_256_tokens(report, "1b", 512, 4.6)


def at_256_tokens(report, size: str, rank: int, limit: float) -> None:
    """A step on each sequence: ours and galore-torch's, blocks compiled and eager. Of theirs the better figure counts, of ours the compiled one."""
    what = f"{size.upper()}, r = {rank}, 256 tokens"
    case = build(report, size, rank, 1, 1)
    rate = measure_256(report, case, what, limit)
    peak = memory()["allocated GB"]
    with eager():
        measure_256(report, case, what + ", eager", None)
    clean(report.live)

    theirs = []
    case = build(report, size, None, 1, 1, prepare=lambda model, args: galore_torch(model, args, case_rank(report, rank)))
    for name in ("eager", "compiled") if report.compile else ("eager",):
        with eager() if name == "eager" else nullcontext():
            step(case)
            memory(forget=True)
            theirs.append((speed(report, case, f"{what}, galore-torch, {name}"), memory()["allocated GB"]))
            report.row(f"memory of that", **memory())
    report.bar(f"{what}, tokens/s over galore-torch's", rate / max(r for r, _ in theirs), ">=", 2.0)
    less = None if peak is None else peak / min(m for _, m in theirs)
    report.bar(f"{what}, memory over galore-torch's", less, "<=", 1.0)
