"""
What does it take on a GPU, and how fast is it there? Every claim of this repository that needs one, in nine minutes.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/gpu.py --text TEXT             one NVIDIA card of 24 GB or more; writes experiments/results/gpu.json
    python experiments/gpu.py --text TEXT --parts curves --minutes 4     60M with five optimisers, the same tokens
    python experiments/gpu.py --quick --device cpu    sizes of a toy: do all paths run? Its figures mean nothing

TEXT is a folder of json lines with a train and a validation file, as data.py reads it (for readme; 600,000 tokens or more); --articles, likewise, is for curves.

Parts, most valuable first; each runs in a process of its own, with a time limit. A part that the file already has is not run again.
    preflight  versions, clocks, copies a second, the matrix peak: a burst, and what is left of it after three seconds
    readme     the README's own command at 7B, four steps on TEXT
    7b         131,072 tokens a step: tokens/s, share of that peak; memory, with clipping too; where the time of a micro-batch goes
    correct    what the tests hold on a CPU, on this card: basis, codes, the CPU's weights after refreshes, 8 bits, thin = plain,
               resuming, compiled = eager, no wait for the host
    7b_256     256 tokens a step, the paper's record of memory: ours, where its time goes, and galore-torch's GaLoreAdamW8bit
    1b         131,072 tokens a step: ours, torch.optim.AdamW(fused=True), bitsandbytes' Adam8bit, APOLLO
    refresh    all 224 bases of the 7B model, against torch.linalg.svd
    int8       7B with int8 weights, r = 512: memory and tokens/s
    60m        tokens/s of the 60M model, compiled and eager
    curves     60M on --articles, the same tokens: GaLore, Muon's direction, AdamW, torch's Muon, galore-torch (not among the default parts)

A second process takes all memory but --cap GiB, so that nothing here has more than a 24 GB card shows. A figure is in the file
as soon as it is known. Times are medians of steps after those that compile and that refresh, the device idle at both ends. The
share of the peak counts 6 operations a parameter and token. cuDNN's attention is switched off: a 4090 does not have it.
GB is 1e9 bytes. Left out on purpose: several GPUs.
"""

import argparse
import gc
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from itertools import cycle, product
from pathlib import Path
from shutil import disk_usage, rmtree
from statistics import median
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adam8bit  # noqa: E402
import data  # noqa: E402
import galore  # noqa: E402
import train  # noqa: E402
from model import Llama  # noqa: E402
from runs import pretty  # noqa: E402

STANCE = {"compiled": "default", "eager": "force_eager"}  # in the latter, what is compiled is called uncompiled
BALLAST = """import sys, torch
more = int(torch.cuda.mem_get_info()[0] - float(sys.argv[1]) * 2**30)
held = torch.empty(max(more, 0), dtype=torch.uint8, device="cuda")
print("held", len(held), flush=True)
sys.stdin.read()"""


class Report:
    """What was measured so far: on the screen, and in a file that is whole after every line."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.live, self.shrink = args, [], 32 if args.quick else 1  # live: what was built and not yet given back
        note = "--quick: sizes of a toy. These figures say that the code runs, and nothing else." if args.quick else ""
        self.all = json.loads(args.out.read_text()) if args.out.exists() else {"note": note, "conditions": {}, "parts": {}}

    def write(self, line: str, **figures) -> None:
        print(line, ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()), flush=True)
        part = self.args.out.with_suffix(".part")
        part.write_text(pretty(self.all) + "\n")
        part.replace(self.args.out)

    def part(self, name: str, **state) -> None:
        self.here = self.all["parts"].setdefault(name, {"rows": [], "bars": []})
        self.here.update(state)
        self.write(f"\n{name}:", **state)

    def row(self, what: str, **figures) -> None:
        self.here["rows"].append({"what": what} | figures)
        self.write(f"  {what}:", **figures)

    def bar(self, name: str, value: float | None, sign: str, limit: float) -> None:  # None: it could not be measured here
        met = None if value is None else {"<=": value <= limit, "<": value < limit, ">=": value >= limit}[sign]
        self.here["bars"].append(dict(name=name, value=value, limit=f"{sign} {limit:.4g}", met=met))
        self.write("  bar:", **self.here["bars"][-1])


def seconds(run) -> float:
    """Of one call, with nothing under way on the device before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def typical(run, times: int = 5, within: float = 8.0) -> float:
    """Median seconds of up to `times` calls, fewer where together they would take longer than `within` seconds."""
    taken = []
    while len(taken) < times and (not taken or sum(taken) + taken[-1] < within):
        taken.append(seconds(run))
    return median(taken)


def memory(forget: bool = False) -> dict:
    """Peak since it was last told to forget, and how often memory ran out and was gathered; nothing is known on a CPU."""
    if not torch.cuda.is_initialized():
        return {"allocated GB": None, "reserved GB": None, "retries": None}
    stats = torch.cuda.memory_stats()
    peak = {"allocated GB": torch.cuda.max_memory_allocated() / 1e9, "reserved GB": torch.cuda.max_memory_reserved() / 1e9,
            "retries": stats["num_alloc_retries"], "left on the device GB": torch.cuda.mem_get_info()[0] / 1e9}  # fmt: skip
    if forget:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return peak


def preflight(report) -> None:
    device, n = report.args.device, 8192 // report.shrink
    report.all["conditions"] |= {
        "torch": torch.__version__, "cuda": torch.version.cuda, "allocator": os.environ["PYTORCH_ALLOC_CONF"],
        "commit": subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty"),
        "packages": {d.name: d.version for d in distributions()
                     if d.name in ("galore-torch", "bitsandbytes", "apollo-torch", "transformers", "triton")}}  # fmt: skip
    if device == "cuda":
        card, (free, total) = torch.cuda.get_device_properties(), torch.cuda.mem_get_info()
        report.all["conditions"] |= {"gpu": card.name, "capability": f"{card.major}.{card.minor}", "memory GiB": total / 2**30,
                                     "GiB free beside the ballast and a context": free / 2**30}  # fmt: skip
    report.write("conditions:", **report.all["conditions"])
    x = torch.empty(2**28 // report.shrink, dtype=torch.int32, device=device)
    y = torch.empty_like(x)
    report.row("copy", **{"TB/s, read and written": 2 * x.nbytes / typical(lambda: y.copy_(x), 20) / 1e12})
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out, repeats = torch.empty_like(a), min(4, 2**40 // n**3)
    times, start = [], time.monotonic()
    while time.monotonic() - start < (3 if device == "cuda" else 0.2):
        times.append(2 * repeats * n**3 / seconds(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)]) / 1e12)
    clocks = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    now = subprocess.getoutput(f"nvidia-smi --query-gpu={clocks} --format=csv") if device == "cuda" else ""
    report.all["conditions"] |= {"bf16 TFLOP/s, burst": max(times), "bf16 TFLOP/s, sustained": median(times[len(times) // 2 :])}
    report.row(f"product of {n} x {n} bf16 matrices", **{"burst TFLOP/s": max(times), "sustained TFLOP/s": median(times[len(times) // 2 :]), "clocks": now})


def build(report, size: str, rank: int | None, batch: int, total: int, *flags: str, prepare=None) -> SimpleNamespace:
    """A model, its optimiser and batches, as a command line of train.py sets them up: `batch` sequences of 256 tokens a
    micro-batch, `total` a step; bf16, 8-bit state, compiled, unless the flags say otherwise.
    prepare: another's (model, args) -> optimiser, in place of train.py's; blocks and loss are compiled all the same."""
    shape = dict(size=size, vocab_size=32000, seq_len=256, batch_size=batch, total_batch_size=total)
    if report.args.quick:
        shape, rank = dict(size="toy", vocab_size=512, seq_len=32, batch_size=min(batch, 2), total_batch_size=min(total, 8)), rank and 64
    words = [f"--{k}={v}" for k, v in shape.items()] + (["--galore", f"--rank={rank}"] if rank else []) + [
        "--dtype=bfloat16", "--state_bits=8", "--recompute=0", "--no-offload", f"--device={report.args.device}",
        "--compile" if report.compile else "--no-compile", *flags]  # fmt: skip
    args, config, _ = train.settle(words)
    torch.manual_seed(0)
    model, draw = Llama(config, args.device, getattr(torch, args.dtype)), torch.Generator().manual_seed(0)
    tokens = [torch.randint(config.vocab_size, (args.batch_size, args.seq_len + 1), generator=draw) for _ in range(4)]
    batches = cycle([(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in tokens])  # on the host, as in training
    case = SimpleNamespace(args=args, config=config, model=model, opt=None, batches=batches, command=" ".join(words))
    report.live.append(case)
    case.opt = (prepare or train.prepare)(model, args)
    if prepare and args.compile:
        model.compile_blocks()
    return case


def clean(live: list) -> None:
    """Gives back the memory of all that was built. (Left to itself it would stay: a parameter's hook holds the parameter, and
    Python's collector does not see through tensors.)"""
    for case in live:
        for p in [*getattr(case.opt, "proxies", {}).values(), *case.model.parameters()]:
            p.grad, p.data = None, p.data.new_empty(0)
            vars(p).clear()  # galore-torch leaves a second reference to the weights there
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


def stand(case, due: bool) -> None:
    """As if so many steps had been taken that P of the last block and of the first is due in the next step; or in none to come."""
    opt = case.opt
    if isinstance(opt, galore.GaLoreAdamW):
        ranked = [group for group in opt.param_groups if group["rank"]]
        for group in ranked:
            group.update(update_proj_gap=10**6, offset=10**5, early_gap=2, t=10**3)
        for group in (ranked[0], ranked[-1]) if due else ():
            group["t"] = group["offset"] - 1
        opt.arm()


def speed(report, case, what: str, within: float = 20.0) -> dict:
    """Steps of the whole batch, none of them a refreshing one. Where a step would take longer than `within` seconds, fewer
    micro-batches are timed, and the row says how many: the others are taken to cost what each of those did."""
    tokens, whole = case.args.batch_size * case.args.seq_len, case.args.total_batch_size // case.args.batch_size
    stand(case, due=False)
    step(case)
    step(case, min(whole, 2))  # the second micro-batch adds to what the first has left
    took, timed, more = typical(lambda: step(case), 10, 3.0), 1, {}
    if whole > 1:
        few = min(whole, 3)
        each = max(1e-9, typical(lambda: step(case, few), 3, 5.0) - took) / (few - 1)
        more = {"s a micro-batch": each, "s of the update": took - each}
        timed = whole if took + (whole - 1) * each <= within else max(few, int(within / each))
        timed = min(timed, whole)
        took = typical(lambda: step(case, timed), 3, within) + (whole - timed) * each
    work = 6 * case.model.num_parameters() * whole * tokens / took / 1e12
    peak = report.all["conditions"].get("bf16 TFLOP/s, sustained")  # None: preflight was not run
    figures = {"tokens/s": whole * tokens / took, "TFLOP/s": work, "share of the peak": work / peak if peak else None, "tokens a step": whole * tokens, "s a step": took}
    report.row(what, **figures, **{"micro-batches": whole, "of these timed": timed}, **more, command=case.command)
    return figures


def worst_memory(report, case, what: str, limit: float) -> float | None:
    """Peak of a step in which two blocks are refreshed, as in the fullest, in GB, beside what train.py --plan foretells.
    The fullest is a micro-batch between the first, before which there is no R, and the last, in which R are dropped."""
    micro = min(3, case.args.total_batch_size // case.args.batch_size)
    for _ in range(2):  # the first compiles what it needs
        memory(forget=True)
        stand(case, due=True)
        step(case, micro)
    peak, plan = memory(), sum(train.plan(case.args, case.config, case.args.batch_size)(case.args.recompute).values())
    off = None if peak["allocated GB"] is None else abs(peak["allocated GB"] / plan - 1)
    report.row(f"memory, {what}", **peak, **{"plan GB": plan, "off the plan": off})
    report.bar(f"memory, {what}, GB", peak["allocated GB"], "<=", limit)
    report.bar(f"memory, {what}, off the plan", off, "<=", 0.03)
    return peak["allocated GB"]


def seven(report) -> None:
    for batch, limit, flags in (8, 24.0, ()), (4, 24.0, ("--grad_clipping=1",)), (16, 24.0, ()):  # the last may not fit
        case = build(report, "7b", 1024, batch, 512, "--recompute=32", *flags)
        what = f"7B, r = 1024, {batch} sequences a micro-batch" + ", clipping" * len(flags)
        report.row(f"{what}, first step, which compiles", seconds=seconds(lambda: step(case)), **memory())  # noqa: B023
        report.bar(f"{what}, share of the sustained bf16 peak", speed(report, case, what, 8.0)["share of the peak"], ">=", 0.5)
        worst_memory(report, case, what, limit)
        if batch == 8:
            where_time_goes(report, case)
        clean(report.live)


def where_time_goes(report, case) -> None:
    """One micro-batch and the update, by kind of kernel and by kernel. What `move` launches is the update."""
    stand(case, due=False)
    step(case)
    wall, move = typical(lambda: step(case), 3), case.opt.move  # without the profiler, whose own work delays launches

    def marked(*args):
        with torch.profiler.record_function("update"):
            move(*args)

    case.opt.move = marked
    with torch.profiler.profile() as profiler:
        seconds(lambda: step(case))
    del case.opt.move
    trace = report.args.out.with_suffix(".trace")
    profiler.export_chrome_trace(str(trace))
    breakdown(report, json.loads(trace.read_bytes())["traceEvents"], wall)
    trace.unlink()


def breakdown(report, events: list[dict], wall: float) -> None:
    """Rows of what was busy for how long, and of the 5 longest kernels, from a trace (in microseconds) of a step of `wall` seconds."""
    events, kernel = sorted((e for e in events if "dur" in e), key=lambda e: e["ts"]), "kernel" if torch.cuda.is_initialized() else "cpu_op"
    updates = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation" and e["name"] == "update"]
    launched = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}
    kinds, kernels, busy, until = {}, {}, 0.0, 0.0
    for e in (e for e in events if e.get("cat") in (kernel, "gpu_memcpy", "gpu_memset")):
        launch, end = launched.get(e.get("args", {}).get("correlation"), e["ts"]), e["ts"] + e["dur"]
        busy, until = busy + max(0.0, end - max(until, e["ts"])), max(until, end)
        found = re.search(r"(flash|fmha|attention)|gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|triton_tem|::(add)?mm$", e["name"], re.I)
        kind = "other kernels" if not found else "attention" if found[1] else "matrix products"
        whose = "update" if any(a <= launch <= b for a, b in updates) else "model"
        for table, key in (kinds, f"{whose}: {kind}"), (kernels, e["name"][:120]):
            table[key] = table.get(key, 0.0) + e["dur"] / 1e3
    report.row("one micro-batch and the update", **{"ms": 1e3 * wall, "GPU busy ms": busy / 1e3, "idle share": 1 - busy / 1e6 / wall})
    for name, ms in [*sorted(kinds.items()), *sorted(kernels.items(), key=lambda item: -item[1])[:5]]:
        report.row(name, ms=ms, share=ms / 1e3 / wall)


def weights(case) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double().cpu() for p in case.model.parameters()])


def apart(a, b) -> float:
    return ((weights(a) - weights(b)).norm() / weights(a).norm()).item()


def correct(report) -> None:
    device = report.args.device
    P = galore.orthonormal(torch.randn(4096 // report.shrink, 1024 // report.shrink, device=device))
    report.bar("P'P = I, largest error", (P.T @ P - torch.eye(P.shape[1], device=device)).abs().max().item(), "<=", 1e-5)

    x, wrong = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)), 0
    x[:1000], x[-5000:] = 0, x[-5000:] * 1e-30
    for signed, y in (True, x), (False, x.square()):
        wrong += sum((a != b.cpu()).sum().item() for a, b in zip(adam8bit.quantise(y, signed), adam8bit.quantise(y.to(device), signed)))
    report.bar("codes and scales that differ from the CPU's", wrong, "<=", 0)
    w, seed = torch.empty(4096 // report.shrink, 4096 // report.shrink), torch.tensor(20261, dtype=torch.int32)
    for bits in (adam8bit.random_bits, *([adam8bit.compiled(adam8bit.random_bits)] if report.compile else [])):
        wrong = (bits(w.to(device), seed).cpu() != adam8bit.random_bits(w, seed)).sum().item()
        report.bar("random bits of the rounding that differ from the CPU's", wrong, "<=", 0)
    as_on_a_cpu(report)
    resumed(report)
    losses_compiled(report)
    waits(report)


def as_on_a_cpu(report) -> None:
    """Weights and state of a toy on a CPU are copied to the device; both take the same 12 steps, four of which refresh."""
    for bits, limit in (32, 1e-3), (8, 3e-2):
        flags = ("--dtype=float32", f"--state_bits={bits}", "--no-compile", "--update_proj_gap=5")
        there, here, start = (build(report, "toy", 64, 4, 8, *flags, f"--device={kind}") for kind in (report.args.device, "cpu", "cpu"))
        there.model.load_state_dict(here.model.state_dict())
        there.opt.load_state_dict(here.opt.state_dict())
        for _ in range(12):
            step(there, 2), step(here, 2)
        moved = apart(here, start)
        report.bar(f"12 steps, fp32, {bits}-bit state, off the CPU's as a share of the way", apart(here, there) / moved, "<=", limit)


def resumed(report) -> None:
    tiny = ("--dtype=float32", "--state_bits=32", "--no-compile", "--update_proj_gap=7")
    thin, plain, again = (build(report, "toy", 64, 4, 8, *tiny, flag) for flag in ("--layerwise", "--no-layerwise", "--layerwise"))
    for _ in range(12):
        step(thin, 2), step(plain, 2)
    report.row("12 steps, fp32: weights have moved by", relative=apart(thin, again))
    report.bar("thin = plain, 12 steps with refreshes, fp32, weights apart by", apart(thin, plain), "<=", 1e-4)
    torch.save((thin.model.state_dict(), thin.opt.state_dict()), file := io.BytesIO())
    saved = torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)
    again.model.load_state_dict(saved[0])
    again.opt.load_state_dict(saved[1])
    for _ in range(4):  # 24 micro-batches were taken: both are at the start of the cycle
        step(thin, 2), step(again, 2)
    report.bar("resumed = not interrupted, 4 more steps, fp32, weights apart by", apart(thin, again), "<=", 1e-4)


def losses_compiled(report) -> None:
    ends, graphs, early = {}, torch._dynamo.utils.counters["stats"], 0
    for name, flag, seed in ("eager", "--no-compile", 0), ("rounded otherwise", "--no-compile", 1), ("compiled", "--compile", 0):
        if flag == "--no-compile" or report.compile:
            case, losses = build(report, "60m", 128, 16, 16, flag, f"--seed={seed}", "--lr=0.002"), []
            for t in range(30):
                early = graphs["unique_graphs"] if t == 4 else early
                losses.append(step(case))
            ends[name] = torch.stack(losses[-5:]).mean().item()
            report.row(f"60M, bf16, 30 steps on 4 batches, {name}", **{"first loss": losses[0].item(), "last five": ends[name]})
    noise, off = abs(ends["eager"] - ends["rounded otherwise"]), abs(ends["eager"] - ends["compiled"]) if report.compile else None
    report.bar("60M, loss, compiled off eager", off, "<=", max(3 * noise, 0.03 * ends["eager"]))
    report.bar("60M, graphs compiled after step 4", graphs["unique_graphs"] - early if report.compile else None, "<=", 0)


def waits(report) -> None:
    count, case = 0 if torch.cuda.is_initialized() else None, report.live[-1]
    for name, clip, due in product(("compiled", "eager"), (None, 1.0), (False, True)) if count is not None else ():
        case.opt.max_norm = clip
        for mode in ("default", "error"):  # the first step compiles, for which the host may wait
            stand(case, due)
            try:
                torch.cuda.set_sync_debug_mode(mode)
                with torch.compiler.set_stance(STANCE[name]):
                    step(case, 2)
            except RuntimeError as error:
                count += 1
                report.row("a step waits for the host", way=name, clipping=clip, refreshing=due, error=str(error)[:500])
                case.opt.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    report.bar("60M, kinds of step (of 8) that wait for the host", count, "<=", 0)


def at_256_tokens(report) -> None:
    """A step on each sequence. Ours counts compiled; galore-torch's eager, as it is written."""
    what = "7B, r = 1024, 256 tokens"
    case = build(report, "7b", 1024, 1, 1)
    least = worst_memory(report, case, what, 20.5)
    rate = speed(report, case, what)["tokens/s"]
    where_time_goes(report, case)
    if report.args.alone:
        return
    clean(report.live)
    case = build(report, "7b", 1024, 1, 1, prepare=galore_torch)
    with torch.compiler.set_stance(STANCE["eager"]):
        step(case)
        memory(forget=True)
        theirs, peak = speed(report, case, f"{what}, galore-torch")["tokens/s"], memory()
    report.row(f"memory, {what}, galore-torch", **peak)
    report.bar(f"{what}, tokens/s over galore-torch's", rate / theirs, ">=", 1.0)
    report.bar(f"{what}, memory over galore-torch's", least / peak["allocated GB"] if least else None, "<", 1.0)


def galore_torch(model, args) -> SimpleNamespace:
    """The reference's layer-wise mode: an 8-bit optimiser a parameter, which steps in the parameter's hook. Its first step takes
    an SVD of every matrix, ten minutes at 7B; so each projector gets a random orthonormal basis beforehand, and what is
    measured are steps that refresh nothing."""
    from bitsandbytes.optim import Adam8bit
    from galore_torch import GaLoreAdamW8bit
    from galore_torch.galore_projector import GaLoreProjector

    group, (*blocks, rest) = dict(rank=args.rank, update_proj_gap=10**9, scale=0.25, proj_type="std"), galore.param_groups(model, args.rank)
    opts = {p: Adam8bit([p], lr=0.005) for p in rest["params"]}
    for p in (p for block in blocks for p in block["params"]):
        opts[p], projector = GaLoreAdamW8bit([dict(params=[p], **group)], lr=0.005, weight_decay=0.0), GaLoreProjector(**group)
        P = galore.orthonormal(torch.randn(min(p.shape), args.rank, device=p.device)).to(p.dtype)
        projector.ortho_matrix = P.T.contiguous() if p.shape[0] >= p.shape[1] else P
        opts[p].state[p].update(step=1, projector=projector)  # in step 0 it would take an SVD in any case
    for p in opts:
        p.register_post_accumulate_grad_hook(lambda p: (opts[p].step(), opts[p].zero_grad()) and None)
    return SimpleNamespace(step=lambda: None, zero_grad=lambda: None, state={p: opt.state[p] for p, opt in opts.items()})


def in_the_blocks(model, rank, **flags) -> list[dict]:
    """The groups that galore-torch and apollo-torch take: the matrices of the blocks with a rank, and the rest."""
    *blocks, rest = galore.param_groups(model, rank)
    return [dict(params=[p for block in blocks for p in block["params"]], rank=rank, **flags), dict(params=rest["params"])]


def fused(model, args):
    return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=args.device == "cuda")


def adam8bit_of_bitsandbytes(model, args):
    from bitsandbytes.optim import Adam8bit
    return Adam8bit(model.parameters(), lr=args.lr)


def apollo(model, args):
    from apollo_torch import APOLLOAdamW
    flags = dict(proj="random", scale_type="channel", scale=1.0, update_proj_gap=200, proj_type="std")
    return APOLLOAdamW(in_the_blocks(model, min(256, args.rank or 256), **flags), lr=args.lr)


def one(report) -> None:
    case = build(report, "1b", 512, 16, 512)
    ours = speed(report, case, "1B, GaLore r = 512, 8 bits", 8.0)["tokens/s"]
    report.row("memory of that", **memory())
    peers = {"torch.optim.AdamW(fused=True)": fused, "bitsandbytes' Adam8bit": adam8bit_of_bitsandbytes, "APOLLO, r = 256": apollo}
    for name, prepare in () if report.args.alone else peers.items():
        clean(report.live)
        try:
            theirs = speed(report, build(report, "1b", None, 16, 512, prepare=prepare), f"1B, {name}", 6.0)["tokens/s"]
            report.row("memory of that", **memory())
            if prepare is fused:
                report.bar("1B, tokens/s over fused AdamW's", ours / theirs, ">=", 1.1)
        except Exception as error:  # a peer that does not run here must not hide the others
            report.row(f"1B, {name}, failed", error=f"{type(error).__name__}: {error}"[:500])


def named(words: list[str]) -> str:
    """A command with files and folders by their names: where they lie is nobody's business."""
    return " ".join(re.sub(r"^.*/", "", word.rstrip("/")) for word in words)


def readme(report) -> None:
    """train.py as the README starts it, on real text: micro-batch and recomputation are what it chooses for what is free."""
    args, best = report.args, Path("/dev/shm")
    if not args.text:
        raise ValueError("not run: --text names no text")
    roomy = best.is_dir() and disk_usage(best).free > 45e9  # two checkpoints; a RAM disk is faster
    folder = Path(tempfile.mkdtemp(dir=best if roomy else None))
    flags = "--size 7b --galore --rank 1024 --steps 4 --warmup_steps 2 --eval_tokens 16384 --eval_every 4 --save_every 4"
    command = ["train.py", *flags.split(), "--data", str(Path(args.text).resolve()), "--data_dir", str(folder), "--out_dir", f"{folder}/run"]
    if args.quick:
        command += "--size toy --rank 64 --total_batch_size 8 --seq_len 64 --tokenizer bytes --device cpu --eval_tokens 512".split()
    start, said, code = time.monotonic(), args.out.with_name("readme.log"), None
    with open(said, "w") as file:
        try:
            within = min(PARTS["readme"][1], 60 * args.minutes) - 12
            code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, timeout=within,
                                  env=os.environ | dict(TORCH_CUDNN_SDPA_DEPRIORITIZED="1")).returncode
        except subprocess.TimeoutExpired:
            report.row("stopped", seconds=within)
    whole, log = time.monotonic() - start, folder / "run" / "log.jsonl"
    report.row("the end of what it printed", text=said.read_text()[-4000:].replace(f"{folder}/", "").replace(str(Path(args.text).resolve()), Path(args.text).name))
    said.unlink()
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    steps = [{k: line[k] for k in ("step", "loss", "grad_norm", "tokens_per_s", "memory_gb")} for line in lines if "tokens_per_s" in line]
    report.row("steps", steps=steps, validation=[line for line in lines if "val_loss" in line])
    report.row("whole command", seconds=whole, **{"exit code": code, "RAM disk": roomy, "command": named(command),
               "checkpoint GB": sum(f.stat().st_size for f in (folder / "run").glob("*.pt")) / 1e9})  # fmt: skip
    report.bar("README's command, exit code", code, "<=", 0)
    report.bar("README's command, last loss over first", steps[-1]["loss"] / steps[0]["loss"] if steps else None, "<", 1.0)
    rmtree(folder, ignore_errors=True)


def refresh(report) -> None:
    """One set of tensors a shape, as often as the 7B model has it; an SVD of the square shape, last, as it may take long."""
    device, (m, wide, rank), ours = report.args.device, (n // report.shrink for n in (4096, 11008, 1024)), 0.0
    for n, many in (m, 4 * 32), (wide, 3 * 32):
        opt = galore.GaLoreAdamW([dict(params=[torch.empty(m, n, device=device, dtype=torch.bfloat16, requires_grad=True)], rank=rank)], state_bits=8)
        state, Y = opt.init(*opt.group), torch.randn(m, rank, device=device).bfloat16()
        for name in "MV":
            state[name].random_(256)
            state[adam8bit.scale_key(name)].uniform_(1e-4, 1e-3)

        def run():
            P = galore.load(state, "P").float()  # noqa: B023
            galore.rotate(state, "MV", galore.refresh(P, Y.float()), torch.tensor(True, device=device))  # noqa: B023

        run()
        each = typical(run, 20, 5.0)
        report.row(f"{m} x {n}, r = {rank}", **{"refresh s": each, "such matrices": many})
        ours += many * each
    report.bar("refresh of all 224 bases, s", ours, "<=", 5.0)
    torch.linalg.svd(torch.randn(64, 64, device=device))  # loads the library
    G = torch.randn(m, m, device=device)
    svd = seconds(lambda: torch.linalg.svd(G, full_matrices=False))
    report.row(f"torch.linalg.svd of {m} x {m}", seconds=svd, **{"longer than all 224 refreshes, if 224 are taken": 224 * svd / ours})


def int8(report) -> None:
    for what, batch, total, limit, flag in ("256 tokens", 1, 1, 11.4, "--recompute=0"), ("131,072 tokens", 4, 512, 14.0, "--recompute=32"):
        clean(report.live)
        case = build(report, "7b", 512, batch, total, "--weight_bits=8", flag)
        worst_memory(report, case, f"7B, int8, r = 512, {what}", limit)
        speed(report, case, f"7B, int8, r = 512, {what}", 6.0)


def sixty(report) -> None:
    case = build(report, "60m", 128, 128, 512, "--state_bits=32")
    for name in ("compiled", "eager") if report.compile else ("eager",):
        with torch.compiler.set_stance(STANCE[name]):
            speed(report, case, f"60M, r = 128, {name}", 10.0)


def muon_of_torch(model, args):
    """torch.optim.Muon for the matrices of the blocks, AdamW for the rest; steps of AdamW's size."""
    inside, rest = (group["params"] for group in in_the_blocks(model, 1))
    two = torch.optim.Muon(inside, lr=args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, lr=args.lr, weight_decay=0.0, fused=True)
    return SimpleNamespace(param_groups=[g for opt in two for g in opt.param_groups], state={}, step=lambda: [opt.step() for opt in two],
                           zero_grad=lambda: [opt.zero_grad() for opt in two])  # fmt: skip


def galore_torch_plain(model, args):
    from galore_torch import GaLoreAdamW
    return GaLoreAdamW(in_the_blocks(model, args.rank, update_proj_gap=200, scale=0.25, proj_type="std"), lr=args.lr, no_deprecation_warning=True)


def curves(report) -> None:
    """300 steps of 128 x 256 tokens each, the paper's warm-up and cosine; validation on the same 65,536 tokens."""
    device, quick, tokenizer = report.args.device, report.args.quick, data.get_tokenizer("bytes" if report.args.quick else "gpt2")
    batch, length, steps = (4, 64, 10) if quick else (128, 256, 300)
    if not report.args.articles:
        raise ValueError("not run: --articles names no text")
    text, val = (data.Stream(report.args.articles, tokenizer, split, length, data_dir=tempfile.gettempdir()) for split in ("train", "val"))
    batches = [tuple(t.to(torch.int32) for t in text.batch(batch)) for _ in range(steps)]
    held = [tuple(t.to(device) for t in val.batch(min(batch, 64))) for _ in range(4)]
    vocab = -(-tokenizer.n_vocab // 64) * 64
    methods = {"GaLore": (0.01, 128, None, ()), "AdamW": (0.002, None, fused, ()), "GaLore, Muon's direction": (0.02, 128, None, ("--direction=muon",)),
               "torch.optim.Muon": (0.002, None, muon_of_torch, ()), "galore-torch": (0.01, 128, galore_torch_plain, ())}  # fmt: skip
    for name, (lr, rank, prepare, flags) in methods.items():
        clean(report.live)
        words = [f"--seq_len={length}", f"--vocab_size={vocab}", f"--batch_size={batch}", f"--total_batch_size={batch}", "--state_bits=32", *flags]
        case = build(report, "60m", rank, batch, batch, *words, f"--lr={lr}", f"--steps={steps}", prepare=prepare)
        case.batches, losses, scores, start = iter([(x.long(), y.long()) for x, y in batches]), [], [], None
        try:
            for t in range(1, steps + 1):
                for group in case.opt.param_groups:
                    group["lr"] = train.learning_rate(t, case.args, case.args.lr)
                losses.append(step(case))
                if t == 5:  # compiled by now
                    losses[-1].item()
                    start = time.perf_counter()
                if t % (steps // 5) == 0:
                    with torch.no_grad():
                        scores.append((t, torch.stack([case.model(x, y) for x, y in held]).mean().item()))
        finally:
            took = time.perf_counter() - (start or 0)
            report.row(name, **{"peak lr": lr, "val": scores, "s of all steps but five": took, "tokens/s": (len(losses) - 5) * batch * length / took,
                                "loss": [round(x.item(), 4) for x in losses[:: max(1, steps // 50)]]}, **memory(forget=True), command=case.command)  # fmt: skip


PARTS = {  # function, and its limit in seconds
    "preflight": (preflight, 40), "readme": (readme, 170), "7b": (seven, 170), "correct": (correct, 90), "7b_256": (at_256_tokens, 80), "1b": (one, 110),
    "refresh": (refresh, 45), "int8": (int8, 80), "60m": (sixty, 60), "curves": (curves, 300)}  # fmt: skip


def compiles(device: str) -> bool:
    """Does torch.compile work here?"""
    try:
        torch.compile(torch.sin)(torch.ones(64, device=device))
    except Exception:  # each reason has a type of its own
        return False
    return True


def work(args: argparse.Namespace) -> None:
    """One part, in this process."""
    if args.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    report = Report(args)
    # the part readme leaves the device to the command that it starts: not even a context here
    report.compile = not args.quick and args.part != "readme" and compiles(args.device)
    report.part(args.part, status="running")
    try:
        PARTS[args.part][0](report)
        report.part(args.part, status="done", seconds=round(time.monotonic() - args.start))
    except Exception as error:  # whatever it is: the next part may work
        where = error.__traceback__
        while where.tb_next:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
        report.part(args.part, status="failed", seconds=round(time.monotonic() - args.start), error=f"{type(error).__name__} in {place}: {error}"[:3000])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = [name for name in PARTS if name != "curves"]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=default, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8.8, help="all must have ended by then")
    parser.add_argument("--cap", type=float, default=23.64, help="GiB left free for this: what a 24 GB card shows")
    parser.add_argument("--text", help="folder of text for the part readme")
    parser.add_argument("--articles", help="file or folder of text for the part curves")
    parser.add_argument("--alone", action="store_true", help="leave the peers of 7b_256 and 1b out")
    parser.add_argument("--quick", action="store_true", help="sizes of a toy, on a CPU too: figures that mean nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="cpu with --quick only")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "gpu.json", help="where the figures go (--quick: gpu-quick.json)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a process of its own runs
    args = parser.parse_args()
    args.start = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available() or args.device == "cpu" and not args.quick:
        parser.error("this measures a GPU, and torch sees none here: run it where there is one, or see with --quick --device cpu whether it runs at all.")
    args.out = args.out.with_name(args.out.stem + "-quick.json") if args.quick and not args.out.stem.endswith("-quick") else args.out
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.part:
        return work(args)

    report, ballast = Report(args), None
    here = {"torch": torch.__version__} | ({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {})
    if any(report.all["conditions"].get(name, it) != it for name, it in here.items()):
        parser.error(f"{args.out} has figures of another GPU or torch: give another --out")
    report.all["conditions"].setdefault("commands", []).append("python experiments/gpu.py " + named(sys.argv[1:]))
    if args.device == "cuda":
        ballast = subprocess.Popen([sys.executable, "-c", BALLAST, str(args.cap)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        report.all["conditions"]["cap"] = f"{args.cap} GiB left free by a process that holds the rest ({ballast.stdout.readline().strip()} bytes)"
    report.write("")
    for name in (name for name in PARTS if name in args.parts):
        left = 60 * args.minutes - (time.monotonic() - args.start)
        if report.all["parts"].get(name, {}).get("status") == "done":
            continue
        report.all["parts"].pop(name, None)  # what an earlier try left
        report.write("")
        if left < 15:
            report.part(name, status="no time was left")
            continue
        try:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", name, "--minutes", str(left / 60)],
                           timeout=min(left, PARTS[name][1]))
        except subprocess.TimeoutExpired:
            report = Report(args)
            report.part(name, status=f"stopped after {min(left, PARTS[name][1]):.0f} s; what it had measured is here")
        report = Report(args)
        if report.all["parts"].get(name, {}).get("status") in (None, "running"):
            report.part(name, status="failed", error="its process ended without a word")
    if ballast:
        ballast.communicate("")
    parts = report.all["parts"]
    report.write(f"\nwritten to {args.out}; not done: {', '.join(n for n, p in parts.items() if p['status'] != 'done') or 'none'}; bars not met: "
                 f"{', '.join(b['name'] for p in parts.values() for b in p['bars'] if b['met'] is False) or 'none'}")  # fmt: skip


if __name__ == "__main__":
    main()
