"""
Better than the paper: which changes to GaLore lower the loss at its memory, and how far is it from full-rank AdamW and Muon?

    python experiments/beyond.py methods --seeds 0 1 2      toy on bytes: 80 runs of two minutes on one core; writes results/beyond-methods.json and .png
    python experiments/beyond.py variants                   28 runs
    python experiments/beyond.py cut                        21 runs, seven of them twice as long
    python experiments/beyond.py methods --data TEXT.jsonl.gz --hidden 256 --layers 6 --rank 64 --rates 3 --seeds 0 1 2
    python experiments/beyond.py variants --quick           6 steps of a tiny model

| methods  | full-rank AdamW, torch.optim.Muon on the matrices (AdamW elsewhere), both also with a rate of its own for embedding, head and norms ("others"); GaLore, and GaLore |
|          | with Muon's direction in the subspace (galore.py's direction "muon"), also at a higher rank in the same memory, and there with twice the rate for embedding, head and norms (half of alpha at twice the rate): each at three or five learning rates; the best again with the other seeds |
| variants | one change at a time to GaLore and to GaLore with Muon, at the base's best learning rate, on the first seed |
| cut      | what the cut at rank r costs: at two lengths and two widths (half the width: heads of 32), on the first seed |

The momentum of Muon is 0.95 in torch, 0.9 in galore.py (its first beta): a few hundred steps want the lower one, so full-rank Muon is run with both. torch's Newton-Schulz steps are
always in bf16, galore.py's in the dtype of the weight. GaLore has one rate for all, as in the paper.

GaLore in `methods` is galore.py itself, thin. The variants are `Lab`, a subclass of it in the plain way and fp32, which changes one thing at a time.
Left out on purpose: a learning rate tuned for each variant; bf16, in which torch's optimisers round and keep moments in another way.
Two variants lost, and their code is gone: the long side and the input side. Their rows in results/beyond-variants.json were measured at commit 25c3912.
"""

from unittest import mock

import torch
from runs import above_zero, begin, curves, details, fits, many, middle, options, parse, rates_of, show, spread, sweep, title, write  # first: it finds the files below
from torch import nn

import galore
import table2
from galore import GaLoreAdamW, muon, param_groups, rows
from model import SIZES

METHODS = {  # name: options of the run; rank and alpha are factors of the setting's
    "AdamW": dict(optimiser="AdamW"),
    "AdamW, others 0.01": dict(optimiser="AdamW", others_lr=0.01),
    "AdamW, others 0.02": dict(optimiser="AdamW", others_lr=0.02),
    "AdamW, others 0.04": dict(optimiser="AdamW", others_lr=0.04),
    "Muon": dict(optimiser="Muon"),
    "Muon, others 0.032": dict(optimiser="Muon", others_lr=0.032),
    "Muon 0.9, others 0.032": dict(optimiser="Muon", others_lr=0.032, momentum=0.9),
    "Muon 0.9, others 0.064": dict(optimiser="Muon", others_lr=0.064, momentum=0.9),
    "Muon 0.9, others 0.128": dict(optimiser="Muon", others_lr=0.128, momentum=0.9),
    "GaLore": dict(optimiser="GaLore"),
    "GaLore, Muon": dict(optimiser="GaLore", muon=True),
    "GaLore, Muon, r x 1.6": dict(optimiser="GaLore", muon=True, rank=1.6),  # about the memory of GaLore: r (m + n) values in place of r (m + 2n)
    "GaLore, Muon, r x 1.6, others x 2": dict(optimiser="GaLore", muon=True, rank=1.6, alpha=0.5),
}
RATES = {
    "AdamW": [0.00025, 0.0005, 0.001, 0.002, 0.004],
    "AdamW, others 0.01": [0.000125, 0.00025, 0.0005, 0.001, 0.002],
    "AdamW, others 0.02": [0.00025, 0.0005, 0.001, 0.002],
    "AdamW, others 0.04": [0.0005, 0.001, 0.002],
    "Muon": [0.002, 0.004, 0.008, 0.016, 0.032],
    "Muon, others 0.032": [0.001, 0.002, 0.004, 0.008, 0.016],
    "Muon 0.9, others 0.032": [0.002, 0.004, 0.008, 0.016, 0.032],
    "Muon 0.9, others 0.064": [0.004, 0.008, 0.016],
    "Muon 0.9, others 0.128": [0.004, 0.008, 0.016],
    "GaLore": [0.0025, 0.005, 0.01, 0.02, 0.04],
    "GaLore, Muon": [0.01, 0.02, 0.04, 0.08, 0.16],
    "GaLore, Muon, r x 1.6": [0.02, 0.04, 0.08],
    "GaLore, Muon, r x 1.6, others x 2": [0.04, 0.08, 0.16],
}
DRAWN = ("AdamW", "AdamW, others 0.02", "Muon, others 0.032", "Muon 0.9, others 0.064", "GaLore", "GaLore, Muon, r x 1.6, others x 2")  # the picture
VARIANTS = {  # what changes: options
    "beta2 0.99": dict(beta2=0.99),
    "beta2 0.95": dict(beta2=0.95),
    "beta1 0.95": dict(beta1=0.95),
    "T / 5": dict(gap=0.2),
    "T x 6": dict(gap=6.0),
    "R, not M, as right factor": dict(right="R"),
    "one P for q, k, v, one for gate, up": dict(shared=True),
    "others' rate x 1/4": dict(others=0.25),
    "others' rate x 1/2": dict(others=0.5),
    "others' rate x 2": dict(others=2.0),
    "others' rate x 4": dict(others=4.0),
    "outside part, Fira": dict(residual=1.01),
    "outside part, no limit": dict(residual=1e9),
    "orthogonalised by SVD": dict(svd=True),
    "columns evened out": dict(even=0.95),
}


class Lab(GaLoreAdamW):
    """GaLoreAdamW in the plain way and fp32. Each option changes one thing; without one it is GaLoreAdamW.

    beta1, beta2: Adam's (of Muon, beta1 is the momentum). gap: factor of T.
    others: factor of the learning rate of what is not projected. shared: `fuse`.
    right: "M" or "R", the right factor of the power iteration.
    residual: how much the norm of the part outside the subspace may grow per step (Fira, 2410.01623).
    muon: the direction. svd: exactly orthogonal (SUMO, 2505.24749).
    even: Muon's columns evened out by their mean squares, which decay by this (NorMuon, 2510.05491).
    """

    def __init__(self, model, run: dict):
        self.o = dict(beta1=0.9, beta2=0.999, gap=1.0, others=1.0, shared=False, right="M",
                      residual=None, muon=False, svd=False, even=None) | run  # fmt: skip
        if self.o["shared"]:
            fuse(model)
        groups = param_groups(model, run["rank"], max(1, round(run["T"] * self.o["gap"])), run["alpha"])
        groups[-1]["lr"] = run["lr"] * self.o["others"]
        betas = self.o["beta1"], self.o["beta2"]
        super().__init__(groups, lr=run["lr"], betas=betas, seed=run["seed"], direction="muon" if self.o["muon"] else "adam")

    def project(self, p):
        """R and Y as GaLoreAdamW's; where right is "R", Y is G R'."""
        R, Y = super().project(p)
        return R, Y if Y is None or self.o["right"] == "M" else rows(p.grad) @ R.T

    def lab(self, p):
        """Muon's direction for this parameter, with what changes."""

        def direction(R, M, betas, **more):
            N, M = muon(R, M, betas, **more)
            if self.o["svd"]:
                U, _, Vh = torch.linalg.svd(torch.lerp(R, M, betas[0]), full_matrices=False)
                N = 0.2 * R.shape[1] ** 0.5 * U @ Vh
            if self.o["even"]:  # each column by its own size over the last steps, the whole as large as before
                size = self.state[p].setdefault("columns", torch.zeros(R.shape[1]))
                size.lerp_(N.square().mean(0), 1 - self.o["even"])
                even = N / size.sqrt().clamp_min(1e-8)
                N = even * (N.norm() / even.norm())
            return N, M

        return direction

    def move(self, p, R, Y, *more):
        before, P = p.detach().clone(), self.init(p).get("P", R).clone()  # P may be refreshed in this step
        with mock.patch.dict(galore.DIRECTIONS, muon=(self.lab(p), "M")):
            super().move(p, R, Y, *more)
        if self.o["residual"] and self.group[p]["rank"]:
            self.add_outside(p, rows(before - p), P, R)

    def add_outside(self, p, step, P, R):
        """Moves p by the gradient outside the subspace as well, its columns scaled as those of R were in `step`."""
        state, rate = self.state[p], self.group[p]["lr"] * self.group[p]["scale"]
        S = (rows(p.grad) - P @ R) * (step.norm(dim=0) / rate / (R.norm(dim=0) + 1e-8))
        limit = self.o["residual"] * state.get("size", S.norm())
        S *= (limit / S.norm().clamp_min(1e-30)).clamp(max=1)
        state["size"] = S.norm()
        rows(p).add_(S, alpha=-rate)


class Part(nn.Module):
    """Some rows of a larger linear layer."""

    def __init__(self, whole: nn.Linear, rows: slice):
        super().__init__()
        self.whole, self.rows = [whole], rows  # in a list: it is no submodule here

    def forward(self, x):
        return nn.functional.linear(x, self.whole[0].weight[self.rows])


def fuse(model) -> None:
    """One weight for q, k and v, and one for gate and up: so each has one subspace, of the input."""
    for block in model.model.layers:
        for parent, names in ((block.self_attn, ("q_proj", "k_proj", "v_proj")), (block.mlp, ("gate_proj", "up_proj"))):
            weights = [getattr(parent, name).weight.detach() for name in names]
            parent.whole, at = nn.Linear(weights[0].shape[1], sum(map(len, weights)), bias=False, device="meta"), 0
            parent.whole.weight = nn.Parameter(torch.cat(weights))
            for name, W in zip(names, weights):
                setattr(parent, name, Part(parent.whole, slice(at, at + len(W))))
                at += len(W)


class Both:
    """Two optimisers as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts, self.param_groups = parts, [group for opt in parts for group in opt.param_groups]

    @property
    def state(self) -> dict:
        return {p: state for opt in self.parts for p, state in opt.state.items()}

    def step(self) -> None:
        for opt in self.parts:
            opt.step()

    def zero_grad(self) -> None:
        for opt in self.parts:
            opt.zero_grad()


def build(model, run: dict):
    if run["optimiser"] == "Lab":
        return Lab(model, run)
    if run["optimiser"] != "Muon":
        return table2.build(model, run)
    *blocks, rest = param_groups(model, rank=1)
    muon = torch.optim.Muon([p for group in blocks for p in group["params"]], lr=run["lr"], weight_decay=0, adjust_lr_fn="match_rms_adamw",
                            momentum=run.get("momentum", 0.95))  # fmt: skip
    return Both(muon, torch.optim.AdamW(rest["params"], lr=run.get("others_lr", run["lr"]), weight_decay=0))


def width(setting: dict) -> int:
    return setting.get("hidden", SIZES[setting["size"]]["hidden_size"])


def methods(setting: dict, args) -> tuple[list[dict], dict]:
    scaled = {key: type(setting[key]) for key in ("rank", "alpha")}
    tried = {name: o | {key: kind(setting[key] * o[key]) for key, kind in scaled.items() if key in o}
             for name, o in METHODS.items() if name in (args.methods or METHODS)}  # fmt: skip
    found = sweep(build, tried, {name: middle(rates, args.rates or (1 if args.quick else 5)) for name, rates in RATES.items()}, setting, args)
    curves({name: found[name] for name in DRAWN if name in found} or found, setting, args.figure)
    rows = [{"method": name, "validation loss": spread(result["losses"]), "states, MB": round(result["run"]["state_bytes"] / 1e6, 2), **rates_of(result)}
            for name, result in found.items()]  # fmt: skip
    return rows, details(found)


def variants(setting: dict, args) -> tuple[list[dict], dict]:
    rows, runs = [], []
    for base, given, lr in (("GaLore", {}, args.lr), ("GaLore, Muon", dict(muon=True), args.muon_lr)):
        fitting = {name: o for name, o in VARIANTS.items() if not o.keys() & ({"beta2"} if given else {"svd", "even"})}
        tried = {"as it is": {}} | dict(list(fitting.items())[5:8] if args.quick else fitting)
        wanted = [setting | dict(method=f"{base}, {name}", optimiser="Lab", lr=lr, seed=args.seeds[0]) | given | o for name, o in tried.items()]
        done = many(build, wanted, args)
        runs += done
        base_loss = next((run["val_loss"] for run in done if run["method"].endswith("as it is")), float("nan"))
        rows += [{"base": base, "change": run["method"].removeprefix(base + ", "), "validation loss": round(run["val_loss"], 4),
                  "difference": round(run["val_loss"] - base_loss, 4)} for run in done]  # fmt: skip
    return rows, dict(runs=runs)


def cut(setting: dict, args) -> tuple[list[dict], dict]:
    """AdamW, full rank, beside GaLore at shares of the width; at two lengths and two widths, each at its method's given rate."""
    wide, layers = width(setting), setting.get("layers", SIZES[setting["size"]]["num_hidden_layers"])
    shapes = [{}, dict(steps=2 * setting["steps"], warmup_steps=2 * setting["warmup_steps"]), dict(hidden=max(32, wide // 64 * 32), layers=layers)]
    shares = (1 / 2,) if args.quick else (1 / 8, 1 / 4, 1 / 2)
    wanted = []
    for shape in shapes:
        hidden = shape.get("hidden", wide)
        common = setting | shape | dict(seed=args.seeds[0])
        wanted += [common | METHODS["AdamW, others 0.01"] | dict(method="AdamW, others 0.01", lr=args.adam_lr)]
        wanted += [common | METHODS[name] | dict(method=name, lr=lr, rank=round(hidden * share)) for share in shares for name, lr in (("GaLore", args.lr), ("GaLore, Muon", args.muon_lr))]
    done = many(build, wanted, args)
    rows = [{"method": run["method"], "width": run.get("hidden", wide), "steps": run["steps"], "rank": run["rank"] if run["optimiser"] == "GaLore" else "full", "validation loss": round(run["val_loss"], 4),
             "states, MB": round(run["state_bytes"] / 1e6, 2)} for run in done]  # fmt: skip
    return rows, dict(runs=done)


def main() -> None:
    parser = options(__doc__)
    tables, rates = dict(methods=methods, variants=variants, cut=cut), {}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"in methods: only these of {'; '.join(METHODS)}")
    parser.add_argument("--rates", type=int, choices=range(1, 6), help="in methods: how many learning rates each gets, the middle ones (default: all)")
    for name, lr, what in (("lr", 0.01, "of GaLore in variants and cut"), ("muon_lr", 0.04, "of GaLore with Muon there"), ("adam_lr", 0.0005, "of AdamW's matrices in cut")):
        parser.add_argument(f"--{name}", type=above_zero(float), help=f"{what} (default: {lr})")
        rates[name] = lr
    args, setting = parse(parser)
    if args.table != "methods" and len(args.seeds) > 1:
        parser.error("variants and cut run on one seed: give one of --seeds")
    if setting["dtype"] != "float32":
        parser.error("in bf16 torch's optimisers round and keep moments in another way than GaLore, and the variants compute in fp32 alone: leave --dtype out")
    unused = {"methods": ["lr", "muon_lr", "adam_lr"], "variants": ["adam_lr", "methods", "rates"], "cut": ["methods", "rates"]}[args.table]
    for name in unused:
        if getattr(args, name):
            parser.error(f"--{name} has no effect on {args.table}: leave it out")
    used = {name: getattr(args, name) or lr for name, lr in rates.items() if name not in unused}
    vars(args).update(used)
    highest = {"methods": int(1.6 * setting["rank"]), "variants": setting["rank"], "cut": width(setting) // 2}[args.table]
    fits(setting | dict(rank=highest), parser)
    rows, more = tables[args.table](setting, args)
    show(f"{args.table}; {title(setting)}", rows)
    write(args, setting | used | {"momentum of Muon": "0.95, or as the name says; in the subspace 0.9"}, table=rows, **more)


if __name__ == "__main__":
    begin(main)
