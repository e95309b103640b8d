"""
Why GaLore works: are gradients of low rank, does the subspace hold them, and how fast does it turn?

    python experiments/gradient_rank.py            toy on bytes, two runs of three minutes; writes results/gradient_rank.json, figures/gradient_rank.png
    python experiments/gradient_rank.py --quick    6 steps of a tiny model

Of the gradient G of a step, for each kind of matrix (mean over the blocks), in a run with GaLore and in one with full-rank AdamW:

| stable rank | |G|_F^2 / |G|_2^2 (the paper's section 3.2 says that it falls while training; in the toy's first steps it is near 1, and rises) |
| inside P    | |P'G|^2 / |G|^2, GaLore only; a random subspace holds r / m of it |
| best        | the same for the r first left singular vectors of G itself: no subspace holds more |
| kept        | |P_old'P_new|^2 / r at a refresh: 1 if the subspace stays, r / m if it has nothing to do with the old one |

G is of one step's tokens (--total_batch_size x --seq_len). Its noise has full rank, so where noise counts more tokens a step mean lower ranks.
"""

import re
from collections import defaultdict
from statistics import mean

import torch
from runs import above_zero, begin, can_draw, make_model, options, parse, plot, show, stepper, title, write  # first: it finds the files below

from data import Stream, get_tokenizer
from galore import GaLoreAdamW, param_groups, rows
from model import SIZES


def observe(run: dict, device: str, every: int) -> dict:
    """Trains, and returns {quantity: {kind of matrix: [[step, value], ...]}}."""
    model = make_model(run, device)
    galore = run["method"] == "GaLore"
    groups = param_groups(model, run["rank"], run["T"], run["alpha"])
    opt = GaLoreAdamW(groups if galore else model.parameters(), lr=run["lr"], seed=run["seed"])
    inside = {p for group in groups for p in group["params"] if group.get("rank")}
    matrices = [(re.search(r"(\w+)\.weight", name)[1], p) for name, p in model.named_parameters() if p in inside]
    found, old = defaultdict(lambda: defaultdict(list)), {}

    def before(opt, *_):
        now = defaultdict(lambda: defaultdict(list))
        for kind, p in matrices:
            P = opt.init(p)["P"].float() if galore else None
            if P is not None:
                if p in old and not torch.equal(P, old[p]):
                    now["kept"][kind].append((old[p].T @ P).square().sum().item() / P.shape[1])
                old[p] = P.clone()
            if t == 1 or t % every == 0:
                G = rows(p.grad).float()
                squares = torch.linalg.svdvals(G).square()
                now["stable rank"][kind].append((squares.sum() / squares[0]).item())
                now["best"][kind].append((squares[: run["rank"]].sum() / squares.sum()).item())
                if P is not None:
                    now["inside P"][kind].append(((P.T @ G).square().sum() / squares.sum()).item())
        for quantity, kinds in now.items():
            for kind, values in kinds.items():
                found[quantity][kind].append([t, float(f"{mean(values):.5g}")])

    opt.register_step_pre_hook(before)
    step = stepper(model, opt, run, Stream(run["data"], get_tokenizer(run["tokenizer"]), "train", run["seq_len"]))
    for t in range(1, run["steps"] + 1):
        step(t)
    return found


def picture(found: dict[str, dict], run: dict, path) -> None:
    width = run.get("hidden", SIZES[run["size"]]["hidden_size"])
    figure = plot.Figure(figsize=(11, 6), layout="constrained")
    panels = [("full rank", "stable rank"), ("full rank", "best"), ("GaLore", "kept"), ("GaLore", "stable rank"), ("GaLore", "best"), ("GaLore", "inside P")]
    words = {"stable rank": "stable rank of G", "best": f"share of |G|² in its best {run['rank']} directions", "inside P": "share of |G|² inside P",
             "kept": "share of the subspace kept at a refresh"}  # fmt: skip
    for axes, (method, quantity) in zip(figure.subplots(2, 3).flat, panels):
        for i, (kind, points) in enumerate(found[method].get(quantity, {}).items()):
            axes.plot(*zip(*points), "o-" if quantity == "kept" else "-", markersize=3, linewidth=1.2, color=plot.COLOURS[i], label=kind)
        if quantity in ("kept", "inside P", "best"):
            axes.axhline(run["rank"] / width, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(f"{method}: {words[quantity]}", fontsize=9)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_ylim(0, None if quantity == "stable rank" else 1.02)
        axes.set_xlabel("step")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9, frameon=False)
    figure.suptitle(f"{title(run)}, T {run['T']}; dotted: r / m, what a random subspace holds", fontsize=9)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = options(__doc__, "seeds", "jobs", "minutes", "cache")
    parser.add_argument("--lr", type=above_zero(float), default=0.01, help="with GaLore (default: 0.01)")
    parser.add_argument("--full_lr", type=above_zero(float), default=0.001, help="full rank (default: 0.001)")
    args, setting = parse(parser)
    every, found = max(1, setting["steps"] // 60), {}
    for method, lr in (("full rank", args.full_lr), ("GaLore", args.lr)):
        found[method] = observe(setting | dict(method=method, lr=lr, seed=args.seeds[0]), args.device, every)
    table = []
    for method, quantities in found.items():
        for quantity, kinds in quantities.items():
            thirds = [[mean(values) for points in kinds.values() if (values := [x for step, x in points if a < step / setting["steps"] <= b])]
                      for a, b in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1))]  # fmt: skip
            table.append({"run": method, "mean over all matrices": quantity} | dict(zip(("first third", "second", "last"), (mean(x) if x else "" for x in thirds))))
    show(title(setting), table)
    few = {
        method: {
            quantity: {kind: points[:: max(1, len(points) // 5)] for kind, points in kinds.items()}
            for quantity, kinds in quantities.items()
        }
        for method, quantities in found.items()
    }  # the picture shows all points
    write(args, setting | dict(lr=args.lr, full_lr=args.full_lr), table=table, found=few)
    if can_draw():
        picture(found, setting, args.figure)


if __name__ == "__main__":
    begin(main)
