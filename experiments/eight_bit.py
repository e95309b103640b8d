"""
A variance stored as zero, beside a momentum that is not, makes a step of M / eps. Which cure is better?

    python experiments/eight_bit.py --data TEXT --tokenizer gpt2 --hidden 32 --layers 2 --rank 8 \\
        --total_batch_size 4 --eval_tokens 32768 --seeds 0 1 2
    python experiments/eight_bit.py --quick     6 steps of a tiny model on bytes

TEXT is a folder of text: the fault needs a vocabulary of mostly rare tokens. Writes results/eight_bit.json.

| fp32  | moments that are not in codes |
| zero  | codes of V (adam8bit.py up to commit 25c3912) |
| least | codes of V; code 0 is read as code 1 |
| root  | codes of sqrt(V); code 0 is read as code 1 (adam8bit.py as it is) |

Runs: loss, and the largest step of one element of a weight, in units of lr.
Error: |N - N of fp32| by decades of |R|, mean and `most`, in every fourth step.
The first fp32 run keeps moments in each storage beside its own for 60 steps. They see the same R.
Seconds: `adam` on 4 M values, the storages in turn; the ratio to `zero`.
Matrices here are in codes from 256 values on, not from 4096, and steps are not held below 5 lr.
"""

from argparse import Namespace
from contextlib import contextmanager
from unittest import mock

import torch
from runs import begin, make_model, options, parse, show, speed, spread, stepper, title, train, write

import adam8bit
import galore
from adam8bit import advance_, dequantise, quantise, scale_key, zeros
from data import Stream, get_tokenizer
from galore import GaLoreAdamW, adam, param_groups, refresh, rotate

STORAGES, YES = ("zero", "least", "root"), torch.tensor(True)
PARTS = {"embed": "embedding", "lm_head": "head", "_proj": "matrices", "norm.": "norms"}
own_load, own_store = adam8bit.load, adam8bit.store


@contextmanager
def stored(how: str):
    """V is stored in this way in what is called inside."""

    def ours(state, name):
        return how in ("fp32", "root") or name != "V" or scale_key("V") not in state

    def load(state, name, dtype=None):
        if ours(state, name):
            return own_load(state, name, dtype)
        return dequantise(state["V"].clamp_min(how == "least"), state[scale_key("V")], signed=False)

    def store(state, name, x, ok):
        if ours(state, name):
            return own_store(state, name, x, ok)
        for key, new in zip(("V", scale_key("V")), quantise(x, signed=False)):
            state[key].copy_(torch.where(ok, new, state[key]))

    with (mock.patch.multiple(adam8bit, load=load, store=store),
          mock.patch.multiple(galore, load=load, store=store)):
        yield


def given(betas, eps, t: int) -> dict:
    """What `adam` asks for in a parameter's step t."""
    return dict(betas=betas, eps=eps, bias=[torch.tensor(1 - beta**t) for beta in betas], dtype=torch.float32)


class Watched(GaLoreAdamW):
    """Notes its largest steps, and the errors of the moments that are kept `beside` its own."""

    def move(self, p, R, Y, *more):
        group, kind, before = self.group[p], self.parts[p], p.detach().clone()
        old = {name: x.clone() for name, x in self.init(p).items() if name != "t"}
        super().move(p, R, Y, *more)
        most = (p - before).abs().max().item() / group["lr"]
        self.largest[kind] = max(self.largest.get(kind, 0.0), round(most, 2))
        if not self.beside or p.ndim < 2:
            return
        how_so = given(group["betas"], group["eps"], self.state[p]["t"])
        N = advance_({"M": old["M"], "V": old["V"]}, "MV", adam, R, 1.0, YES, **how_so)
        decade = R.abs().log10().floor().clamp(-12, 0).long().flatten() + 12  # zeros count to the lowest
        for how in STORAGES:
            held = self.held.setdefault((p, how), zeros("MV", R.shape, torch.float32, True, p.device))
            with stored(how):
                error = (advance_(held, "MV", adam, R, 1.0, YES, **how_so) - N).abs().flatten().double()
                if p in self.turning:
                    new = refresh(old["P"].float(), Y.float())
                    rotate(held | {"P": old["P"].clone()}, "MV", new, YES)
            if group["t"] % 4 == 3:
                found = self.found.setdefault(kind, {}).setdefault(how, torch.zeros(3, 13).double())
                found[0] += torch.bincount(decade, minlength=13)
                found[1] += torch.bincount(decade, error, minlength=13)
                found[2].scatter_reduce_(0, decade, error, "amax")


def trained(how: str, run: dict, device: str, found: dict) -> dict:
    """A run: its validation loss and largest steps. The errors of the storages beside it go to `found`."""
    tokenizer, model = get_tokenizer(run["tokenizer"]), make_model(run, device)
    stream, val = (Stream(run["data"], tokenizer, split, run["seq_len"]) for split in ("train", "val"))
    groups, bits = param_groups(model, run["rank"], run["T"], run["alpha"]), 32 if how == "fp32" else 8
    opt = Watched(groups, lr=run["lr"], seed=run["seed"], state_bits=bits)
    opt.beside, opt.found, opt.held, opt.largest = how == "fp32" and not found, found, {}, {}
    opt.parts = {p: PARTS[word] for name, p in model.named_parameters() for word in PARTS if word in name}
    step, given = stepper(model, opt, run, stream), Namespace(**run, batch_size=1, device=device)
    with stored(how):
        for t in range(1, run["steps"] + 1):
            opt.beside = opt.beside and t <= 60
            step(t)
    score = train.evaluate(model, val, given, lambda read: read())
    print(how, run["seed"], score["val_loss"], opt.largest, flush=True)
    return score | opt.largest


def seconds(device: str, compile: bool, rounds: int) -> dict:
    """Time of `adam` in each storage: the median of the rounds' ratios to `zero`."""
    G, rest = torch.randn(1 << 14, 256, device=device), given((0.9, 0.999), 1e-8, 9)
    state = zeros("MV", G.shape, G.dtype, True, G.device)
    run = torch.compile(advance_) if compile else advance_

    def step(how: str) -> float:
        with stored(how):
            return speed.seconds(lambda: run(state, "MV", adam, G, 1.0, YES, **rest))[0]

    took = speed.take_turns({how: lambda how=how: step(how) for how in STORAGES}, rounds)
    return {"compiled": compile} | {how: round(speed.ratio(took[how], took["zero"]), 3) for how in STORAGES}


def main() -> None:
    parser = options(__doc__, "jobs", "minutes", "cache")
    parser.add_argument("--lr", type=float, default=0.005, help="default: 0.005")
    args, setting = parse(parser)
    setting, adam8bit.SMALLEST, adam8bit.LARGEST = setting | dict(lr=args.lr), 256, float("inf")
    runs, found = [], {}
    for how in ("fp32", *STORAGES):
        made = [trained(how, setting | dict(seed=seed), args.device, found) for seed in args.seeds]
        most = {f"largest step, {kind}": max(run[kind] for run in made) for kind in PARTS.values()}
        runs.append({"storage": how, "validation loss": spread([run["val_loss"] for run in made])} | most)
    table = []
    for kind, by in found.items():
        for d in by["root"][0].nonzero().flatten().tolist():
            row = {"of": kind, "|R| from": f"1e{d - 12}" if d else "0", "elements": int(by["root"][0, d])}
            row |= {how: round((by[how][1, d] / by[how][0, d]).item(), 5) for how in STORAGES}
            table.append(row | {f"{how}, most": round(by[how][2, d].item(), 3) for how in STORAGES})
    took = [seconds(args.device, on, 2 if args.quick else 15) for on in (False, True)]
    for name, rows in (("runs", runs), ("error", table), ("seconds", took)):
        show(f"{name}; {title(setting)}", rows)
    write(args, setting, table=runs, error=table, seconds=took)


if __name__ == "__main__":
    begin(main)
