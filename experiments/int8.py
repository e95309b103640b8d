"""
Weights in 8 bits: what does rounding them cost, and does its random walk grow with the steps?

    python experiments/int8.py --steps 600 --seeds 0 1 2        hours; the README has smaller ones
    python experiments/int8.py --steps 2000 --share 0.1 --seeds 0 1 2 --out experiments/results/int8-long.json
    python experiments/int8.py --quick                          6 steps of a tiny model

The second is the hard case: at a tenth of the rate an update is a small part of the grid's step.

| fp32    | weights as they are |
| bf16    | rounded to bf16 stochastically, as train.py does without --weight_bits |
| rows    | int8, a scale per row that grows when the row does: --weight_bits 8 |
| tracked | int8, the scale is the row's largest weight / 127 in each step, so all of a row is rounded anew |
| groups  | rows, but a scale for each 32 values of a row |
| golden  | rows; each element's random bits advance by the golden ratio: more even in time than at random |
| nearest | rows, rounded to nearest |

Only the matrices with a rank differ. All else, arithmetic as well, is fp32. The runs of a seed see the same
batches. `gap`: mean over seeds of the difference to bf16. Rates are train.py's for the toy, times --share.
"""

import sys
from math import gcd
from statistics import mean
from unittest import mock

import torch
from runs import above_zero, begin, many, options, parse, show, spread, title, train, write  # first

import adam8bit
import galore
from adam8bit import move_, random_bits
from galore import GaLoreAdamW, param_groups
from thin import thin

DIRECTIONS, TENTHS = ("adam", "muon"), 10
ADAM, MUON = 0.005, 0.02


def in_bf16(W, N, lr, stay, seed, scale):
    """W is fp32, its values are bf16's."""
    narrow = W.bfloat16()
    move_(narrow, N, lr, stay, seed)
    W.copy_(narrow)


def tracked(W, N, lr, stay, seed, scale):
    new = W.float() * stay - N * (lr / scale)
    grow = new.abs().amax(1, keepdim=True) / 127
    scale.mul_(grow)
    bits = random_bits(new, seed)
    W.copy_((new / grow + (bits + 0.5) / 65536).floor().clamp(-127, 127))


def groups(W, N, lr, stay, seed, scale):
    """W is fp32, its values are codes times scales."""
    new = (W * stay - N * lr).unflatten(1, (-1, gcd(32, W.shape[1])))
    least = new.abs().amax(2, keepdim=True) / 127
    grid = grids.setdefault(W.data_ptr(), least.clone())
    grid.copy_(torch.maximum(grid, least))
    bits = random_bits(new, seed)
    W.copy_(((new / grid + (bits + 0.5) / 65536).floor().clamp(-127, 127) * grid).flatten(1))


def golden(W, *rest):
    turn = turns[W.data_ptr()] = turns.get(W.data_ptr(), 0) + 1

    def bits(new, seed):
        return (random_bits(new, torch.zeros_like(seed)) + turn * 40503) & 0xFFFF  # 65536 * 0.618

    with mock.patch.object(adam8bit, "random_bits", bits):
        move_(W, *rest)


def nearest(*given):
    with mock.patch.object(adam8bit, "random_bits", lambda new, seed: torch.full_like(new, 32768)):
        move_(*given)


MOVES = {"fp32": move_, "bf16": in_bf16, "rows": move_, "tracked": tracked, "groups": groups,
         "golden": golden, "nearest": nearest}  # fmt: skip
grids, turns = {}, {}  # by weight


def build(model, run: dict) -> GaLoreAdamW:
    how = run["weights"]
    groups = param_groups(model, run["rank"], run["T"], run["alpha"])
    opt = GaLoreAdamW(groups, lr=run["lr"], seed=run["seed"], direction=run["direction"])
    thin(model, opt, weight_bits=None if how in ("fp32", "bf16", "groups") else 8)

    def move(W, *rest):
        """Embedding, head and norms are no matter here."""
        inside = W.untyped_storage().data_ptr() in own
        (MOVES[how] if inside else move_)(W, *rest)

    grids.clear()
    turns.clear()
    own = {layer.weight.untyped_storage().data_ptr() for layer in opt.modules}
    for layer in opt.modules if how == "bf16" else ():
        layer.weight.data.copy_(layer.weight.bfloat16())
    galore.move_ = move  # each run sets it anew
    return opt


def gaps(runs: list[dict], others: list[dict]) -> list[float]:
    """Of the training loss, in each tenth of the run."""
    curves = [torch.tensor([loss for _, loss in run["curve"]], dtype=torch.float64) for run in runs + others]
    ours, theirs = (torch.stack(half).mean(0) for half in (curves[: len(runs)], curves[len(runs) :]))
    return [round(part.mean().item(), 4) for part in (ours - theirs).tensor_split(TENTHS) if len(part)]


def main() -> None:
    parser = options(__doc__, "dtype")
    parser.add_argument("--share", type=above_zero(float), default=1.0, help="of the rates (default: 1)")
    parser.add_argument("--weights", nargs="+", choices=MOVES, default=[*MOVES], help="beside bf16")
    args, setting = parse(parser)
    setting["dtype"] = "float32"
    ways = [how for how in MOVES if how in ("bf16", *args.weights)]
    peak = {"adam": ADAM * args.share, "muon": MUON * args.share}
    wanted = [setting | dict(method=f"{how}, {way}", weights=how, direction=way, lr=peak[way], seed=seed)
              for seed in args.seeds for way in DIRECTIONS for how in ways]
    done = many(build, wanted, args)
    if args.left or not done:
        sys.exit("the same command makes the runs that are left")
    table, over_time = [], []
    for way in DIRECTIONS:
        by = {how: [run for run in done if run["method"] == f"{how}, {way}"] for how in ways}
        for how, runs in by.items():
            losses, base = ([run["val_loss"] for run in some] for some in (runs, by["bf16"]))
            apart = [a - b for a, b in zip(losses, base)]
            table.append({"weights": how, "direction": way, "validation loss": spread(losses),
                          "gap": round(mean(apart), 4), "largest gap": round(max(apart), 4)})
            if how != "bf16":
                parts = {str(i): gap for i, gap in enumerate(gaps(runs, by["bf16"]), 1)}
                over_time.append({"weights": how, "direction": way} | parts)
    show(f"validation; {title(setting)}, {args.share:g} of the rates", table)
    show("gap of the training loss to bf16, by tenths of the run", over_time)
    write(args, setting | dict(share=args.share), table=table, gaps=over_time, runs=done)


if __name__ == "__main__":
    begin(main)
