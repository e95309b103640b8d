"""
What does it take on a GPU, and how fast is it there? Every claim of this repository that needs one, in under ten minutes.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/gpu.py                         one NVIDIA card of 24 GB or more; writes experiments/results/gpu.json
    python experiments/gpu.py --quick --device cpu    sizes of a toy, two minutes: do all paths run? Its figures mean nothing

Parts, in the order in which they run:
    7b       131,072 tokens a step: tokens/s, compiled and eager; memory, with clipping too; where the time of a micro-batch goes
    correct  what the tests hold on a CPU, on this card: basis, codes, thin = plain, resuming, compiled = eager, no wait for the host
    7b_256   256 tokens a step, the paper's record of memory: ours, and galore-torch's GaLoreAdamW8bit
    1b       131,072 tokens a step, against full-rank torch.optim.AdamW(fused=True)
    refresh  all 224 bases of the 7B model, against torch.linalg.svd
    1b_256, 7b_r256, 60m    the same on the 1B model; memory at rank 256; the whole training step of the 60M model

A card with more memory than --cap is held to that, as if it had no more. A figure is in the file as soon as it is known; a part
that fails, or for which no time is left, says so there. Times are medians of steps after those that compile and that refresh,
the device idle at both ends. The share of the peak counts 6 operations a parameter and token, and the peak is that of the
fastest square bf16 product here. GB is 1e9 bytes. Left out on purpose: data (random tokens do), quality, several GPUs.
"""

import argparse
import gc
import io
import json
import os
import re
import sys
import time
from importlib.metadata import distributions
from itertools import cycle, product
from pathlib import Path
from statistics import median
from subprocess import getoutput
from types import SimpleNamespace

START = time.monotonic()
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adam8bit  # noqa: E402
import galore  # noqa: E402
import train  # noqa: E402
from model import Llama  # noqa: E402


STANCE = {"compiled": "default", "eager": "force_eager"}  # in the latter, what is compiled is called uncompiled


class Report:
    """What was measured so far: on the screen, and in a file that is whole after every line."""

    def __init__(self, args: argparse.Namespace, conditions: dict):
        self.args, self.live, self.shrink = args, [], 32 if args.quick else 1  # live: what was built and not yet given back
        self.compiler = train.why_not_compile(args.device) is None
        self.compile = self.compiler and not args.quick  # --quick compiles where it must: on a CPU that takes longest of all
        note = {"note": "--quick: sizes of a toy. These figures say that the code runs, and nothing else."} if args.quick else {}
        self.all = note | {"conditions": conditions, "parts": {}, "bars": []}

    def left(self) -> float:
        return 60 * self.args.minutes - (time.monotonic() - START)

    def write(self, line: str, **figures) -> None:
        print(line, ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()), flush=True)
        part = self.args.out.with_suffix(".part")
        part.write_text(json.dumps(self.all, indent=1) + "\n")
        part.replace(self.args.out)

    def part(self, name: str, **state) -> None:
        self.rows = self.all["parts"].setdefault(name, {"rows": []})["rows"]
        self.all["parts"][name].update(state)
        self.write(f"\n{name}:", **state)

    def row(self, what: str, **figures) -> None:
        self.rows.append({"what": what} | figures)
        self.write(f"  {what}:", **figures)

    def bar(self, name: str, value: float | None, sign: str, limit: float) -> None:  # None: it could not be measured here
        met = None if value is None else {"<=": value <= limit, "<": value < limit, ">=": value >= limit}[sign]
        self.all["bars"].append(dict(name=name, value=value, limit=f"{sign} {limit:.4g}", met=met))
        self.write("  bar:", **self.all["bars"][-1])


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
    """Peak since it was last told to forget; nothing is known on a CPU."""
    if not torch.cuda.is_initialized():
        return {"allocated GB": None, "reserved GB": None}
    peak = {"allocated GB": torch.cuda.max_memory_allocated() / 1e9, "reserved GB": torch.cuda.max_memory_reserved() / 1e9}
    if forget:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return peak


def matrix_peak(n: int, device: str) -> float:
    """Operations a second of an n x n x n product of random bf16 matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out, repeats = torch.empty_like(a), min(16, 2**40 // n**3)  # milliseconds on a GPU between two waits
    times = [seconds(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)]) for _ in range(20)]
    return repeats * 2 * n**3 / median(times[5:])


def build(report, size: str, rank: int | None, batch: int, total: int, *flags: str, prepare=None) -> SimpleNamespace:
    """A model, its optimiser and batches, as a command line of train.py sets them up: `batch` sequences of 256 tokens a
    micro-batch, `total` a step; bf16, 8-bit state, compiled, unless the flags say otherwise.
    prepare: another's (model, args) -> optimiser, in place of train.py's; the blocks are compiled all the same."""
    shape = dict(size=size, vocab_size=32000, seq_len=256, batch_size=batch, total_batch_size=total)
    if report.args.quick:
        shape, rank = dict(size="toy", vocab_size=512, seq_len=32, batch_size=min(batch, 2), total_batch_size=min(total, 8)), rank and 64
    words = [f"--{k}={v}" for k, v in shape.items()] + (["--galore", f"--rank={rank}"] if rank else []) + [
        "--dtype=bfloat16", "--state_bits=8", "--no-activation_checkpointing", f"--device={report.args.device}",
        "--compile" if report.compile else "--no-compile", *flags]  # fmt: skip
    args = train.arguments().parse_args(words)
    config = train.settle(args, None)
    torch.manual_seed(0)
    model, draw = Llama(config, args.device, getattr(torch, args.dtype)), torch.Generator().manual_seed(0)
    tokens = [torch.randint(config.vocab_size, (args.batch_size, args.seq_len + 1), generator=draw) for _ in range(4)]
    batches = cycle([(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in tokens])  # on the host, as in training
    case = SimpleNamespace(args=args, config=config, model=model, opt=None, batches=batches, command=" ".join(words))
    report.live.append(case)
    case.opt = (prepare or train.prepare)(model, args)
    for block in model.model.layers if prepare and args.compile else ():
        block.compile(fullgraph=True, dynamic=False)
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
    """As if so many steps had been taken that in the next one P of the last block is due, or of none; past the early refreshes."""
    opt, last = case.opt, case.model.model.layers[-1].mlp.down_proj.weight
    if isinstance(opt, galore.GaLoreAdamW):
        for t in range(150, 1500):
            for group in opt.param_groups:
                group["t"] = t
            if opt.due(last) if due else not any(map(opt.due, opt.group)):
                break
        opt.arm()


def speed(report, case, what: str, within: float = 20.0) -> dict:
    """Steps of the whole batch, none of them a refreshing one. Where a step would take longer than `within` seconds, fewer
    micro-batches are timed, and the row says how many: the others are taken to cost what each of those did."""
    tokens, whole = case.args.batch_size * case.args.seq_len, case.args.total_batch_size // case.args.batch_size
    stand(case, due=False)
    step(case)
    step(case, min(whole, 2))  # the second micro-batch adds to what the first has left
    took, timed, more = typical(lambda: step(case), 10, 5.0), 1, {}
    if whole > 1:
        few = min(whole, 3)
        each = max(1e-9, typical(lambda: step(case, few), 5, 8.0) - took) / (few - 1)
        more = {"s a micro-batch": each, "s of the update": took - each}
        timed = whole if took + (whole - 1) * each <= within else max(few, int(within / each))
        took = typical(lambda: step(case, timed), 3, within) + (whole - timed) * each
    share = 6 * case.model.num_parameters() * whole * tokens / took / report.peak
    figures = {"tokens/s": whole * tokens / took, "share of the peak": share, "tokens a step": whole * tokens, "s a step": took}
    report.row(what, **figures, **{"micro-batches": whole, "of these timed": timed}, **more, command=case.command)
    return figures


def worst_memory(report, case, what: str, limit: float | None, micro: int = 1) -> float | None:
    """Peak of a step in which the last block's P is refreshed, which takes most, in GB, beside what train.py --plan foretells."""
    for _ in range(2):  # the first compiles what it needs
        memory(forget=True)
        stand(case, due=True)
        step(case, micro)
    peak, plan = memory(), train.peak(case.config, case.args)
    off = None if peak["allocated GB"] is None else abs(peak["allocated GB"] / plan - 1)
    report.row(f"memory, {what}", **peak, **{"plan GB": plan, "off the plan": off})
    if limit is not None:
        report.bar(f"memory, {what}, GB", peak["allocated GB"], "<=", limit)
        report.bar(f"memory, {what}, off the plan", off, "<=", 0.03)
    return peak["allocated GB"]


def seven(report) -> None:
    case = build(report, "7b", 1024, 16, 512, "--activation_checkpointing")
    report.row("7B, first step, which compiles", seconds=seconds(lambda: step(case)), **memory())
    report.bar("7B, share of the bf16 peak", speed(report, case, "7B, r = 1024", min(100.0, report.left() - 100))["share of the peak"], ">=", 0.5)
    for what, clip in ("7B, 131,072 tokens", None), ("7B, 131,072 tokens, clipping", 1.0):
        case.args.grad_clipping = case.opt.max_norm = clip
        worst_memory(report, case, what, 24.0, micro=2)  # from the second micro-batch on it is the same
    case.args.grad_clipping = case.opt.max_norm = None
    with torch.compiler.set_stance(STANCE["eager"]):
        speed(report, case, "7B, r = 1024, eager", 8.0)
        worst_memory(report, case, "7B, 131,072 tokens, eager", None, micro=2)
    where_time_goes(report, case)


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
    """Rows of what was busy for how long, and of the 15 longest kernels, from a trace (in microseconds) of a step of `wall` seconds."""
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
    for name, ms in [*sorted(kinds.items()), *sorted(kernels.items(), key=lambda item: -item[1])[:15]]:
        report.row(name, ms=ms, share=ms / 1e3 / wall)


def correct(report) -> None:
    device, tiny = report.args.device, ("--dtype=float32", "--state_bits=32", "--no-compile", "--update_proj_gap=7")
    P = galore.orthonormal(torch.randn(4096 // report.shrink, 1024 // report.shrink, device=device))
    report.bar("P'P = I, largest error", (P.T @ P - torch.eye(P.shape[1], device=device)).abs().max().item(), "<=", 1e-5)

    x, wrong = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)), 0
    x[:1000], x[-5000:] = 0, x[-5000:] * 1e-30
    for signed, y in (True, x), (False, x.square()):
        wrong += sum((a != b.cpu()).sum().item() for a, b in zip(adam8bit.quantise(y, signed), adam8bit.quantise(y.to(device), signed)))
    report.bar("codes and scales that differ from the CPU's", wrong, "<=", 0)

    def apart(a, b) -> float:
        a, b = (torch.cat([p.detach().flatten().double() for p in case.model.parameters()]) for case in (a, b))
        return ((a - b).norm() / a.norm()).item()

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

    ends, graphs, early = {}, torch._dynamo.utils.counters["stats"], 0
    for name, flag, seed in ("eager", "--no-compile", 0), ("rounded otherwise", "--no-compile", 1), ("compiled", "--compile", 0):
        if flag == "--no-compile" or report.compiler:
            case, losses = build(report, "60m", 128, 16, 16, flag, f"--seed={seed}", "--lr=0.002"), []
            for t in range(30):
                early = graphs["unique_graphs"] if t == 4 else early
                losses.append(step(case))
            ends[name] = torch.stack(losses[-5:]).mean().item()
            report.row(f"60M, bf16, 30 steps on 4 batches, {name}", **{"first loss": losses[0].item(), "last five": ends[name]})
    noise, off = abs(ends["eager"] - ends["rounded otherwise"]), abs(ends["eager"] - ends["compiled"]) if report.compiler else None
    report.bar("60M, loss, compiled off eager", off, "<=", max(3 * noise, 0.03 * ends["eager"]))
    report.bar("60M, graphs compiled after step 4", graphs["unique_graphs"] - early if report.compiler else None, "<=", 0)

    waits = 0 if torch.cuda.is_initialized() else None
    for name, clip, due in product(("compiled", "eager"), (None, 1.0), (False, True)) if waits is not None else ():
        case.opt.max_norm = clip
        for mode in ("default", "error"):  # the first step compiles, for which the host may wait
            stand(case, due)
            try:
                torch.cuda.set_sync_debug_mode(mode)
                with torch.compiler.set_stance(STANCE[name]):
                    step(case, 2)
            except RuntimeError as error:
                waits += 1
                report.row("a step waits for the host", way=name, clipping=clip, refreshing=due, error=str(error)[:500])
                case.opt.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    report.bar("60M, kinds of step (of 8) that wait for the host", waits, "<=", 0)


def at_256_tokens(report, size: str, rank: int, limit: float, peer: bool = True) -> None:
    """A step on each sequence. Ours counts compiled, galore-torch's both with compiled blocks and eager, as it is written."""
    what = f"{size.upper()}, r = {rank}, 256 tokens"
    case = build(report, size, rank, 1, 1)
    least = worst_memory(report, case, what, limit)
    if not peer:
        return
    rate = speed(report, case, what)["tokens/s"]
    with torch.compiler.set_stance(STANCE["eager"]):
        worst_memory(report, case, f"{what}, eager", None)
        speed(report, case, f"{what}, eager")
    clean(report.live)
    case = build(report, size, rank, 1, 1, prepare=galore_torch)
    for name in ("eager", "compiled") if report.compile else ("eager",):  # compiled takes more memory: a block's gradients come together
        with torch.compiler.set_stance(STANCE[name]):
            step(case)
            memory(forget=True)
            theirs, peak = speed(report, case, f"{what}, galore-torch, {name}")["tokens/s"], memory()
        report.row(f"memory, {what}, galore-torch, {name}", **peak)
        report.bar(f"{what}, tokens/s over galore-torch's, {name}", rate / theirs, ">=", 2.0)
        report.bar(f"{what}, memory over galore-torch's, {name}", least / peak["allocated GB"] if least else None, "<", 1.0)


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


def one(report) -> None:
    case = build(report, "1b", 512, 16, 512)
    ours = speed(report, case, "1B, GaLore r = 512, 8 bits")["tokens/s"]
    with torch.compiler.set_stance(STANCE["eager"]):
        speed(report, case, "1B, GaLore r = 512, 8 bits, eager", 5.0)
    clean(report.live)
    case = build(report, "1b", None, 16, 512, prepare=lambda model, args: torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True))
    theirs = speed(report, case, "1B, torch.optim.AdamW(fused=True)")["tokens/s"]
    report.row("memory of that", **memory())
    report.bar("1B, tokens/s over fused AdamW's", ours / theirs, ">=", 1.1)


def refresh(report) -> None:
    """One set of tensors a shape, as often as the 7B model has it; an SVD once a shape."""
    device, (m, wide, rank), ours, svds = report.args.device, (n // report.shrink for n in (4096, 11008, 1024)), 0.0, 0.0
    torch.linalg.svd(torch.randn(64, 64, device=device))  # loads the library
    for n, many in (m, 4 * 32), (wide, 3 * 32):
        opt = galore.GaLoreAdamW([dict(params=[torch.empty(m, n, device=device, dtype=torch.bfloat16, requires_grad=True)], rank=rank)], state_bits=8)
        state, G = opt.init(*opt.group), torch.randn(m, n, device=device)
        for name in "MV":
            state[name].random_(256)
            state[name + "_scale"].uniform_(1e-4, 1e-3)
        run = lambda: galore.refresh(state, G[:, :rank].bfloat16(), torch.tensor(True, device=device))  # noqa: E731, B023
        run()
        each, svd = typical(run, 20, 5.0), seconds(lambda: torch.linalg.svd(G, full_matrices=False))  # noqa: B023
        report.row(f"{m} x {n}, r = {rank}", **{"refresh s": each, "torch.linalg.svd s": svd, "such matrices": many})
        ours, svds = ours + many * each, svds + many * svd
    report.row("all 224 matrices", **{"refresh s": ours, "torch.linalg.svd s": svds, "SVD is longer by": svds / ours})
    report.bar("refresh of all 224 bases, s", ours, "<=", 5.0)


def sixty(report) -> None:
    case = build(report, "60m", 128, 128, 512, "--state_bits=32", "--compile" if report.compiler else "--no-compile")
    for name in ("compiled", "eager") if report.compiler else ("eager",):
        with torch.compiler.set_stance(STANCE[name]):
            speed(report, case, f"60M, r = 128, {name}")


PARTS = {  # function, its arguments, and seconds without which it is not worth starting
    "7b": (seven, {}, 150), "correct": (correct, {}, 60), "7b_256": (at_256_tokens, dict(size="7b", rank=1024, limit=20.5), 60),
    "1b": (one, {}, 60), "refresh": (refresh, {}, 30), "1b_256": (at_256_tokens, dict(size="1b", rank=512, limit=4.6), 45),
    "7b_r256": (at_256_tokens, dict(size="7b", rank=256, limit=17.6, peer=False), 40), "60m": (sixty, {}, 30)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part starts for which too little of this is left")
    parser.add_argument("--cap", type=float, default=24.0, help="GiB that may be taken, as if the card had no more")
    parser.add_argument("--quick", action="store_true", help="sizes of a toy, on a CPU too: figures that mean nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="cpu with --quick only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json", help="where the figures go (--quick: gpu-quick.json)")
    args = parser.parse_args()
    on_gpu = args.device == "cuda" and torch.cuda.is_available()
    if not on_gpu and not (args.quick and args.device == "cpu"):
        parser.error("this measures a GPU, and torch sees none here: run it where there is one, or see with --quick --device cpu whether it runs at all.")
    args.out = args.out.with_name(args.out.stem + "-quick.json") if args.quick else args.out
    args.out.parent.mkdir(parents=True, exist_ok=True)

    conditions = {"command": " ".join(["python experiments/gpu.py", *sys.argv[1:]]), "torch": torch.__version__, "cuda": torch.version.cuda,
                  "commit": getoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty"), "allocator": os.environ["PYTORCH_ALLOC_CONF"],
                  "peers": {d.name: d.version for d in distributions() if d.name in ("galore-torch", "bitsandbytes", "triton")}}  # fmt: skip
    if on_gpu:
        card = torch.cuda.get_device_properties()
        cap = min(1.0, args.cap * 2**30 / card.total_memory)
        torch.cuda.set_per_process_memory_fraction(cap)
        conditions |= {"gpu": card.name, "capability": f"{card.major}.{card.minor}", "memory GiB": card.total_memory / 2**30,
                       "cap GiB": cap * card.total_memory / 2**30, "driver": getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader"),
                       "GiB taken before anything is built": (card.total_memory - torch.cuda.mem_get_info()[0]) / 2**30}  # fmt: skip
    report = Report(args, conditions)
    report.peak = max(matrix_peak(n // report.shrink, args.device) for n in (4096, 8192))
    conditions |= {"bf16 peak, TFLOP/s": report.peak / 1e12, "compiled": report.compile}
    report.write("", **conditions)
    for name, (run, given, need) in ((name, PARTS[name]) for name in PARTS if name in args.parts):
        start = time.monotonic()
        if report.left() < need:
            report.part(name, status="skipped", why=f"{report.left():.0f} s of {args.minutes:g} minutes are left, and it takes {need} s or more")
            continue
        report.part(name, status="running")
        try:
            clean(report.live)
            run(report, **given)
            report.part(name, status="done", seconds=round(time.monotonic() - start))
        except Exception as error:  # whatever it is: the next part may work
            report.part(name, status="failed", seconds=round(time.monotonic() - start), error=f"{type(error).__name__}: {error}"[:2000])
    failed = [name for name, part in report.all["parts"].items() if part["status"] != "done"]
    report.write(f"\nwritten to {args.out}; parts skipped or failed: {', '.join(failed) or 'none'}; bars not met: "
                 f"{', '.join(bar['name'] for bar in report.all['bars'] if bar['met'] is False) or 'none'}")  # fmt: skip


if __name__ == "__main__":
    main()
