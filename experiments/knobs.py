"""
Figure 5 of the paper and its neighbours: what rank, T and alpha do to the loss, and whether more steps make up for a lower rank.

    python experiments/knobs.py            toy on bytes: 20 runs of two minutes on one core; writes results/knobs.json, figures/knobs.png
    python experiments/knobs.py --quick    6 steps of a tiny model

One knob at a time; the others, and the learning rate, stay as in the baseline. So alpha is at the same time the learning rate of the projected
matrices against that of the rest, and a rank's best learning rate may be another.
"""

import sys

from runs import above_zero, begin, can_draw, fits, many, options, parse, plot, show, title, write  # first: it finds the files below
from table2 import build

RANKS = (1 / 12, 1 / 6, 1 / 2, 1, 2, 3)  # of the baseline's
GAPS = (1 / 5, 1 / 2, 1, 2, 6)
ALPHAS = (1 / 4, 1 / 2, 1, 2, 4)
LENGTHS = (1 / 4, 1 / 2, 1, 2)  # of the baseline's steps, at half and at twice its rank


def picture(tables: dict[str, list[dict]], base: dict, path) -> None:
    figure = plot.Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (knob, rows) in zip(figure.subplots(1, 4, sharey=True), tables.items()):
        by_rank = {rank: [row for row in rows if row["rank"] == rank] for rank in sorted({row["rank"] for row in rows})} if knob == "steps" else {None: rows}
        for colour, (rank, some) in zip(plot.COLOURS, by_rank.items()):
            axes.plot([row[knob] for row in some], [row["validation loss"] for row in some], "o-", color=colour, label=rank and f"rank {rank}")
        for row in rows:
            if all(row[key] == base[key] for key in ("rank", "T", "alpha", "steps")):
                axes.plot(row[knob], row["validation loss"], "o", color="black", markersize=9, fillstyle="none")
        axes.set_xscale("log")
        ticks = sorted({row[knob] for row in rows})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(knob)
        axes.grid(alpha=0.25, linewidth=0.6)
        if knob == "steps":
            axes.legend(frameon=False, fontsize=8.5)
    figure.axes[0].set_ylabel("validation loss, nats a token")
    figure.suptitle(f"{title(base)}, T {base['T']}, alpha {base['alpha']:g}, lr {base['lr']:g}, but for what is said (circle: all as it is)", fontsize=9)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = options(__doc__, "seeds")
    parser.add_argument("--lr", type=above_zero(float), default=0.01, help="of all runs (default: 0.01)")
    args, base = parse(parser)
    base |= dict(method="GaLore", optimiser="GaLore", lr=args.lr, seed=args.seeds[0])
    rank, T, steps, warmup = (base[key] for key in ("rank", "T", "steps", "warmup_steps"))
    few = slice(2, 4) if args.quick else slice(None)
    knobs = {"rank": [dict(rank=max(1, round(rank * x))) for x in RANKS[few]], "T": [dict(T=max(1, round(T * x))) for x in GAPS[few]],
             "alpha": [dict(alpha=base["alpha"] * x) for x in ALPHAS[few]],
             "steps": [dict(rank=max(1, round(rank * r)), steps=max(1, round(steps * x)), warmup_steps=round(warmup * x)) for r in (1 / 2, 2) for x in LENGTHS[few]]}  # fmt: skip
    wanted = {knob: [base | change for change in changes] for knob, changes in knobs.items()}
    for run in (run for some in wanted.values() for run in some):
        fits(run, parser)
    tables, runs = {}, []
    for knob, some in wanted.items():
        done = many(build, some, args)
        tables[knob] = [{"rank": run["rank"], "T": run["T"], "alpha": run["alpha"], "steps": run["steps"], "M tokens": run["tokens"] / 1e6,
                         "validation loss": round(run["val_loss"], 4), "states, MB": run["state_bytes"] / 1e6} for run in done]  # fmt: skip
        runs += done
        show(f"{knob}; {title(base)}", tables[knob])
    if not runs:
        sys.exit("no run is there yet")
    write(args, base, tables=tables, runs=runs)
    if can_draw() and all(tables.values()):
        picture(tables, base, args.figure)


if __name__ == "__main__":
    begin(main)
