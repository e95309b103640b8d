"""
How fast is it? The optimisers, and a whole training step, against their peers on a CPU.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/speed.py              a quarter of an hour; writes experiments/results/speed.json
    python experiments/speed.py --quick      small and short: does it run at all?

Three tables of times, on the matrices of the 60M model (q, k, v, o; gate, up, down of 8 blocks), fp32:
    1. GaLore's step, given the gradients: ours (plain and thin) and galore-torch, amortised over a refresh every T steps
    2. Adam with 8-bit moments, full rank: ours, torchao, bitsandbytes
    3. a training step of the blocks: forward, backward, update
and one that no noise reaches:
    4. floating-point operations of a whole 7B training step (train.py's, on fake tensors, by PyTorch's FlopCounterMode)

All contestants of a table run in one process and take turns, a step each per round, in alternating order, so that what else the
machine does hits all alike. A time is the median over rounds; a ratio is the median of the rounds' ratios. Everything stands in
its steady state: past the early refreshes, moments filled, compiled. Weight decay is 0 throughout.

Left out on purpose: GPUs (their figures need a script with synchronisation and memory), quality (see the training runs).
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise, repeat
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import collect_env
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import galore  # noqa: E402
import model as llama  # noqa: E402
import train  # noqa: E402
from thin import thin  # noqa: E402

PLAIN, DUE = 99, 199  # steps taken before a step in which P is not refreshed, and before one in which it is (T = 200)


# ----- measuring ----------------------------------------------------------------------------------------------------


def seconds(*stages) -> list[float]:
    """Runs the stages one after the other: the time of each."""
    marks = [time.perf_counter()]
    for stage in stages:
        stage()
        marks.append(time.perf_counter())
    return [b - a for a, b in pairwise(marks)]


def take_turns(contestants: dict, rounds: int) -> dict[str, list]:
    """Calls each contestant once a round (and once before, to warm up): what they return, by name."""
    results = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name in list(contestants)[:: 1 if i % 2 else -1]:
            result = contestants[name]()
            if i > 0:
                results[name].append(result)
    return results


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that the optimiser keeps for its parameters, each counted once."""
    seen = {}

    def walk(x):
        if isinstance(x, torch.Tensor) and hasattr(x, "__tensor_flatten__"):  # torchao's codes, scale and map in one
            walk([getattr(x, name) for name in x.__tensor_flatten__()[0]])
        elif isinstance(x, torch.Tensor):
            seen[x.data_ptr()] = x.numel() * x.element_size()
        elif isinstance(x, dict):
            walk(list(x.values()))
        elif isinstance(x, (list, tuple)):
            for y in x:
                walk(y)
        elif hasattr(x, "ortho_matrix"):  # galore-torch's projector
            walk(x.ortho_matrix)

    walk(list(opt.state.values()))
    return sum(seen.values())


def peer(module: str, name: str):
    """A peer's optimiser class, or None where it is not installed."""
    try:
        return getattr(import_module(module), name)
    except ImportError:
        return None


def show(title: str, rows: list[dict], note: str = "") -> None:
    columns = list(rows[0])
    cells = [columns] + [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in (row.get(c, "") for c in columns)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths))).rstrip())
    print(*([f"  {note}"] if note else []), sep="\n", flush=True)


# ----- the optimisers, each as a function that sets up a step (not timed) and takes it (timed) ------------------------


def parameters(grads: list[torch.Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(0.02 * torch.randn_like(g)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g
    return params


def at(opt: torch.optim.Optimizer, t: int) -> None:
    """As if t steps had been taken."""
    for group in opt.param_groups:
        if isinstance(opt, galore.GaLoreAdamW):
            group["t"] = t
        else:  # galore-torch counts by parameter, from 0
            for p in group["params"]:
                opt.state[p]["step"] = t + (t == DUE)
    if isinstance(opt, galore.GaLoreAdamW):
        opt.arm()  # which decides what is refreshed in the next step


def stepper(opt: torch.optim.Optimizer, t: int | None = None, before=None):
    def run():
        if t is not None:
            at(opt, t)
        if before:
            before()
        return seconds(opt.step)[0]

    return run


def thin_layers(shapes: list[tuple], group: dict, **flags):
    """Linear layers in thin mode, and a function that leaves at their proxies what a backward pass would."""
    layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)
    opt = galore.GaLoreAdamW([dict(group, params=list(layers.parameters()))], **flags)
    thin(layers, opt)
    at(opt, DUE)
    arrived = {(p, width): 0.01 * torch.randn(group["rank"], width)
               for p in layers.parameters() for width in (max(p.shape), sum(p.shape))}  # fmt: skip

    def gradients():
        for p, proxy in opt.proxies.items():
            proxy.grad = arrived[p, proxy.shape[1]]

    return opt, gradients


def optimiser_step(args, shapes, peers) -> tuple[list, list, list]:
    """Table 1, and the refresh in it."""
    grads = [0.01 * torch.randn(shape) for shape in shapes]
    group = dict(rank=args.rank, update_proj_gap=args.update_proj_gap)
    opts, before = {}, {}
    if peers["galore-torch"]:
        group_theirs = dict(params=parameters(grads), scale=0.25, proj_type="std", **group)
        opts["galore-torch GaLoreAdamW"] = peers["galore-torch"]([group_theirs], no_deprecation_warning=True)
    for end, flags in ("", {}), (", compiled", dict(compile=True)):
        opts["ours, plain" + end] = galore.GaLoreAdamW([dict(params=parameters(grads), **group)], **flags)
        opts["ours, thin" + end], before["ours, thin" + end] = thin_layers(shapes, group, **flags)
    full = {f"torch.optim.AdamW{name}": torch.optim.AdamW(parameters(grads), weight_decay=0.0, **flag)
            for name, flag in [("", {}), (" fused", dict(fused=True))]}  # fmt: skip

    due = take_turns({name: stepper(opt, DUE, before.get(name)) for name, opt in opts.items()}, args.svd_rounds)
    plain = take_turns({name: stepper(opt, PLAIN, before.get(name)) for name, opt in opts.items()}
                       | {name: stepper(opt) for name, opt in full.items()}, args.rounds)  # fmt: skip
    T, theirs = args.update_proj_gap, "galore-torch GaLoreAdamW"
    amortised = {name: [((T - 1) * x + statistics.median(due[name])) / T for x in plain[name]] if name in due else plain[name] for name in plain}
    rows, bars = [], []
    for name, opt in {**opts, **full}.items():
        rows.append({"optimiser step (ms)": name, "plain": 1e3 * statistics.median(plain[name]),
                     "refreshing": 1e3 * statistics.median(due[name]) if name in due else "-",
                     "amortised": 1e3 * statistics.median(amortised[name]),
                     "of galore-torch": ratio(amortised[name], amortised[theirs]) if theirs in opts else "-",
                     "state MB": state_bytes(opt) / 1e6})  # fmt: skip

    # the refresh on its own, and as what a refreshing step takes more than another
    ok, refreshes = torch.tensor(True), []

    def refresh(state, Y):
        galore.rotate(state, "MV", galore.refresh(state["P"], Y), ok)

    for g in grads:
        m, n = min(g.shape), max(g.shape)
        state = {"P": galore.orthonormal(torch.randn(m, args.rank)), "M": 0.01 * torch.randn(args.rank, n), "V": 1e-4 * torch.rand(args.rank, n)}
        refreshes.append((state, 0.01 * torch.randn(m, args.rank)))
    alone = take_turns({"refresh": lambda: seconds(lambda: [refresh(*x) for x in refreshes])[0]}, max(5, args.svd_rounds))["refresh"]
    extra = {name: [x - statistics.median(plain[name]) for x in due[name]] for name in opts} | {"galore.refresh alone": alone}
    more = [{"refresh of all matrices (ms)": name, "time": 1e3 * statistics.median(x),
             "SVD's is longer by": statistics.median(extra[theirs]) / statistics.median(x) if theirs in opts else "-"}
            for name, x in extra.items()]  # fmt: skip
    if theirs in opts:
        for row in rows[1:5]:
            bars.append((f"amortised step, {row['optimiser step (ms)']}, of galore-torch's", row["of galore-torch"], "<=", 0.5))
        for row in (more[1], more[2], more[-1]):
            bars.append((f"SVD over refresh, {row['refresh of all matrices (ms)']}", row["SVD's is longer by"], ">=", 10.0))
    return rows, more, bars


def adam_in_8_bits(args, shapes, peers) -> tuple[list, list]:
    """Table 2."""
    grads = [0.01 * torch.randn(shape) for shape in shapes]
    opts = {"ours, 8 bits": galore.GaLoreAdamW(parameters(grads), state_bits=8, compile=True)}
    if peers["torchao"]:
        opts["torchao AdamW8bit"] = peers["torchao"](parameters(grads), weight_decay=0.0)
    if peers["bitsandbytes"]:
        opts["bitsandbytes Adam8bit"] = peers["bitsandbytes"](parameters(grads))
    for name, flag in [("", {}), (" fused", dict(fused=True))]:
        opts[f"torch.optim.AdamW{name}, fp32"] = torch.optim.AdamW(parameters(grads), weight_decay=0.0, **flag)
    for opt in opts.values():  # compiles, and fills the moments
        opt.step()
        opt.step()
    times = take_turns({name: stepper(opt) for name, opt in opts.items()}, args.rounds)
    theirs = "torchao AdamW8bit"
    rows = [{"optimiser step, full rank (ms)": name, "step": 1e3 * statistics.median(times[name]),
             "of torchao's": ratio(times[name], times[theirs]) if theirs in opts else "-",
             "state MB": state_bytes(opt) / 1e6} for name, opt in opts.items()]  # fmt: skip
    return rows, [("8-bit Adam, of torchao's", rows[0]["of torchao's"], "<=", 1.0)] if theirs in opts else []


# ----- a training step ----------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """The transformer without embedding and head."""

    def __init__(self, config: llama.Config):
        super().__init__()
        self.config, self.layers = config, nn.ModuleList(llama.Block(config) for _ in range(config.num_hidden_layers))
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x):
        cos, sin = llama.rope(0, x.shape[1], self.config, x.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def trainer(blocks: nn.Module, opt: torch.optim.Optimizer, x: torch.Tensor, t: int | None = None):
    def run():
        if t is not None:
            at(opt, t)
        x.grad, loss = None, []
        return seconds(lambda: loss.append(blocks(x).float().square().mean()), lambda: loss.pop().backward(),
                       lambda: (opt.step(), opt.zero_grad()))  # fmt: skip

    return run


def training_step(args, config, peers) -> tuple[list, list]:
    """Table 3."""
    x = torch.randn(args.batch_size, args.seq_len, config.hidden_size, requires_grad=True)  # as if an embedding came before
    contestants = {}

    def ours(without_gradient: bool, **flags):
        blocks = Blocks(config)
        groups = galore.param_groups(blocks, args.rank, args.update_proj_gap)
        opt = galore.GaLoreAdamW([dict(group, offset=0) for group in groups], **flags)  # all at once, to measure it once
        if without_gradient:
            thin(blocks, opt)
        return blocks, opt

    contestants |= {"ours, thin": ours(True), "ours, thin, compiled": ours(True, compile=True), "ours, plain": ours(False)}
    if peers["galore-torch"]:
        blocks = Blocks(config)
        matrices, norms = ([p for p in blocks.parameters() if (p.ndim == 2) is yes] for yes in (True, False))
        groups = [dict(params=matrices, rank=args.rank, update_proj_gap=args.update_proj_gap, scale=0.25, proj_type="std"), dict(params=norms)]
        contestants["galore-torch GaLoreAdamW"] = blocks, peers["galore-torch"](groups, no_deprecation_warning=True)
    galores = list(contestants)
    for name, flag in [("", {}), (" fused", dict(fused=True))]:
        blocks = Blocks(config)
        contestants[f"torch.optim.AdamW{name}"] = blocks, torch.optim.AdamW(blocks.parameters(), weight_decay=0.0, **flag)

    due = take_turns({name: trainer(*contestants[name], x, DUE) for name in galores}, args.svd_rounds)
    times = take_turns({name: trainer(*c, x, PLAIN if name in galores else None) for name, c in contestants.items()}, args.train_rounds)
    total = {name: list(map(sum, rows)) for name, rows in times.items()}
    reference = min((name for name in contestants if name not in galores), key=lambda name: statistics.median(total[name]))
    rows = []
    for name, (_, opt) in contestants.items():
        row = {"training step (ms)": name + (" (reference)" if name == reference else "")}
        row |= {stage: 1e3 * statistics.median(x) for stage, x in zip(["forward", "backward", "update"], zip(*times[name]))}
        row |= {"total": 1e3 * statistics.median(total[name]), "of reference": ratio(total[name], total[reference]), "refresh adds": "-"}
        if name in galores:
            extra = (statistics.median(map(sum, due[name])) - statistics.median(total[name])) / args.update_proj_gap
            row["refresh adds"] = f"{100 * extra / statistics.median(total[name]):.2f}%"
        rows.append(row | {"state MB": state_bytes(opt) / 1e6})
    return rows, [(f"training step, {name}, of torch.optim.AdamW's", rows[galores.index(name)]["of reference"], "<=", 0.9)
                  for name in galores if "thin" in name]  # fmt: skip


# ----- operations of a 7B step --------------------------------------------------------------------------------------

aten = torch.ops.aten
UNCOUNTED = {  # by FlopCounterMode itself
    aten.addmm_: lambda _, A, B, **__: 2 * A[0] * A[1] * B[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda D, q, k, v, *_, **__: sdpa_backward_flop_count(D, q, k, v),
    aten.linalg_solve_triangular: lambda A, B, *_, **__: A[-1] ** 2 * B[-1],
    aten.linalg_cholesky_ex: lambda A, *_, **__: A[-1] ** 3 // 3,
}


def operations(options: str, due: bool = False) -> float:
    """Of one step of `train.py OPTIONS`; with `due`, of one in which all subspaces are refreshed.

    A step is linear in its micro-batches, so that one with one and one with two give it for any number.
    """
    (args, config, _), steps = train.settle([*options.split(), "--vocab_size", "32000", "--state_bits", "32", "--device", "cpu"]), []
    for micro_batches in (1, 2):
        few = argparse.Namespace(**vars(args) | dict(total_batch_size=micro_batches * args.batch_size))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = llama.Llama(config, "cpu", torch.bfloat16)
            opt = train.prepare(model, few)
            for group in opt.param_groups:
                group["t"] = 1000 * group["update_proj_gap"] + (group["offset"] - 1 if due else config.num_hidden_layers)
            for p in opt.group:
                opt.init(p)
            opt.arm()
            tokens = torch.zeros(args.batch_size, args.seq_len, dtype=torch.long)
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                train.training_step(model, opt, repeat((tokens, tokens)), micro_batches)
        steps.append(counter.get_total_flops())
    one, two = steps
    return two + (two - one) * (args.total_batch_size // args.batch_size - 2)


def counted(T: int) -> tuple[list, list]:
    """Table 4: 7B, rank 1024, sequences of 256 tokens."""
    ours, adamw, large, small = "--size 7b --galore --rank 1024", "--size 7b --no-layerwise", " --batch_size 16 --total_batch_size 512", " --batch_size 1 --total_batch_size 1"
    rows, bars = [], []

    def compare(name: str, tokens: int, mine: str, reference: str, other: str, limit: float):
        a, b = operations(mine), operations(other)
        rows.append({"operations of a 7B step": name, "tokens": tokens, "TFLOP": a / 1e12, "reference": reference, "its TFLOP": b / 1e12, "ratio": f"{a / b:.3f}"})
        bars.append((f"counted operations, {name}, of {reference}", a / b, "<=", limit))
        return a

    step = compare("thin GaLore", 131072, ours + large + " --recompute 0", "full-rank AdamW", adamw + large + " --recompute 0", 0.82)
    compare("thin GaLore, checkpointing", 131072, ours + large + " --recompute 32", "full-rank AdamW, checkpointing", adamw + large + " --recompute 32", 0.87)
    compare("thin GaLore, recomputing what 24 GB ask for", 131072, ours + " --batch_size 8 --total_batch_size 512 --recompute 31",
            "full-rank AdamW, checkpointing", adamw + large + " --recompute 32", 0.82)  # fmt: skip
    compare("thin GaLore", 256, ours + small + " --recompute 0", "plain GaLore", ours + small + " --no-layerwise --recompute 0", 0.60)
    extra = (operations(ours + large + " --recompute 0", due=True) - step) / T
    rows.append({"operations of a 7B step": f"refresh of all, spread over T = {T}", "tokens": 131072, "TFLOP": extra / 1e12, "reference": "the step", "its TFLOP": step / 1e12, "ratio": f"{extra / step:.4f}"})
    bars.append((f"counted operations, refresh over T = {T}, of the step", extra / step, "<=", 0.01))
    return rows, bars


# ----- the command line ---------------------------------------------------------------------------------------------


def cpu() -> str:
    name = re.search(r"Model name:\s*(.+)", collect_env.get_cpu_info(collect_env.run) or "")
    return f"{name[1] if name else platform.processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # what is measured
    parser.add_argument("--size", choices=llama.SIZES, default="60m", help="whose matrices")
    parser.add_argument("--layers", type=int, help="blocks (default: all of the size's)")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in a training step")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens in a sequence")
    # how
    parser.add_argument("--tables", type=int, nargs="+", choices=(1, 2, 3, 4), default=(1, 2, 3, 4), help="which of the tables")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25, help="optimiser steps measured of each contestant")
    parser.add_argument("--train_rounds", type=int, default=12, help="training steps measured of each")
    parser.add_argument("--svd_rounds", type=int, default=3, help="refreshing steps measured of each")
    parser.add_argument("--quick", action="store_true", help="one block of the toy, few rounds, under a minute: times that mean nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.json", help="where the figures go")
    args = parser.parse_args()
    if args.quick:
        args.out = args.out.with_name("speed-quick.json")
        args.size, args.layers, args.batch_size, args.rounds, args.train_rounds, args.svd_rounds = "toy", 1, 2, 3, 2, 1
    elif len(set(args.tables)) < 4:  # the file of all tables stays
        args.out = args.out.with_name(f"{args.out.stem}-{''.join(map(str, sorted(set(args.tables))))}.json")
    args.update_proj_gap = DUE + 1  # T
    config = llama.Config(vocab_size=32000, **{**llama.SIZES[args.size], **({"num_hidden_layers": args.layers} if args.layers else {})})
    if not 0 < args.rank < config.hidden_size:
        parser.error(f"--rank {args.rank} must be at least 1 and below the matrices' short side, {config.hidden_size}.")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for a peer that brings threads of its own

    shapes = [tuple(p.shape) for p in llama.Block(config).parameters() if p.ndim == 2] * config.num_hidden_layers
    classes = {"galore-torch": ("galore_torch", "GaLoreAdamW"), "torchao": ("torchao.optim", "AdamW8bit"),
               "bitsandbytes": ("bitsandbytes.optim", "Adam8bit")}  # fmt: skip
    peers = {name: peer(*where) for name, where in classes.items()}

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    conditions = {"command": " ".join(["python experiments/speed.py", *sys.argv[1:]]), "cpu": cpu(), "load before": os.getloadavg()[0],
                  "threads": args.threads, "dtype": "fp32", "matrices": {str(s): shapes.count(s) for s in dict.fromkeys(shapes)},
                  "rank": args.rank, "T": args.update_proj_gap, "tokens": [args.batch_size, args.seq_len], "rounds": args.rounds, "train_rounds": args.train_rounds,
                  "svd_rounds": args.svd_rounds, "python": platform.python_version(), "torch": torch.__version__,
                  **{name: installed(name) for name in peers}}  # fmt: skip
    print(*(f"{key}: {value}" for key, value in conditions.items()), sep="\n")
    for name in (name for name, found in peers.items() if not found):
        print(f"{name} is not installed (pip install {name}): left out of the tables")

    tables, bars = {}, []
    if 1 in args.tables:
        tables["1"], tables["1 refresh"], met = optimiser_step(args, shapes, peers)
        show("1. optimiser step, given the gradients", tables["1"],
             "(thin: R = P'G is made in the backward pass instead, and counted in table 3)")  # fmt: skip
        show("   the refresh in it", tables["1 refresh"], "(a refreshing step less the median of the others)")
        bars += met
    if 2 in args.tables:
        tables["2"], met = adam_in_8_bits(args, shapes, peers)
        show("2. Adam in 8 bits", tables["2"])
        bars += met
    if 3 in args.tables:
        tables["3"], met = training_step(args, config, peers)
        show("3. training step of the blocks", tables["3"],
             "(thin: backward holds R and the update; reference: the fastest torch.optim.AdamW; refresh adds: all matrices, once in T)")  # fmt: skip
        bars += met
    if 4 in args.tables:
        if args.quick:
            llama.SIZES["7b"]["num_hidden_layers"] = 2
        tables["4"], met = counted(args.update_proj_gap)
        met = [] if args.quick else met  # in two blocks the head weighs too much
        show("4. counted operations", tables["4"], "(FlopCounterMode on fake tensors; eager; r = 1024, sequences of 256, vocabulary 32,000)")
        bars += met
    bars = [{"bar": text, "value": value, "limit": f"{sign} {limit:g}", "met": value <= limit if sign == "<=" else value >= limit}
            for text, value, sign, limit in bars]  # fmt: skip
    if bars:
        show("bars", [bar | {"met": "yes" if bar["met"] else "NO"} for bar in bars])
    conditions["load after"] = os.getloadavg()[0]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"conditions": conditions, "tables": tables, "bars": bars}, indent=1) + "\n")
    print(f"\nload before {conditions['load before']:.1f}, after {conditions['load after']:.1f}; written to {args.out}")


if __name__ == "__main__":
    main()
