"""
Table 2 of the paper: pre-training with GaLore, against full rank, low-rank factors, LoRA and ReLoRA.

    python experiments/table2.py                   toy on bytes, 30 runs of two minutes on one core; writes results/table2.json, figures/table2.png
    python experiments/table2.py --quick           6 steps of a tiny model
    python experiments/table2.py --size 60m --data TEXT.jsonl.gz --tokenizer gpt2 --seq_len 256 --total_batch_size 128 --steps 400 --rank 128 \\
        --dtype bfloat16 --minutes 9               on a GPU; the same command goes on with the runs that are left

All methods see the same tokens in the same order, with the same warm-up and cosine, and each gets as many learning rates. The rate with the lowest
validation loss counts; with several --seeds it is chosen on the first, and the others are run at it.

Columns: validation loss (nats a token), perplexity, bits a byte; bytes of weights and optimiser states, measured, which must be what the paper's
Table 1 says of the matrices (full rank, GaLore, LoRA; counted likewise for the others) and three values for each other parameter, or the script ends
with an error; tokens a second, all methods taking turns in one process, without refreshes of P (speed.py has their cost).

As in the paper a method has one rate for all of its parameters, and so GaLore, whose alpha makes the matrices' a quarter of it, trains embedding and head at
a higher one than the others. --others_lr takes that advantage away (at toy size most of GaLore's lead over AdamW is this):

    python experiments/table2.py --seeds 0 1 2 --others_lr 0.02 --rates 3

That is what results/table2.json was made with.

LoRA and ReLoRA start from random, frozen weights and have no full-rank warm-up, as in the paper (lora.py); ReLoRA restarts three times. GaLore
is thin, the others plain. All are galore.GaLoreAdamW, which is AdamW where no rank is given.
"""

import math
import statistics
import time

import torch
from runs import above_zero, begin, curves, details, make_model, middle, options, parse, rates_of, show, spread, stepper, sweep, title, write  # first: it finds the files below

import lora
from adam8bit import BLOCK, SMALLEST
from data import Stream, get_tokenizer
from galore import GaLoreAdamW, param_groups
from thin import thin

METHODS = {"full rank": dict(optimiser="AdamW"), "GaLore": dict(optimiser="GaLore"), "8-bit GaLore": dict(optimiser="GaLore", state_bits=8),
           "low rank": dict(optimiser="AdamW", kind="factors"), "LoRA": dict(optimiser="AdamW", kind="lora"), "ReLoRA": dict(optimiser="AdamW", kind="relora")}  # fmt: skip
RATES = {"full rank": [0.00025, 0.0005, 0.001, 0.002, 0.004], "GaLore": [0.0025, 0.005, 0.01, 0.02, 0.04], "8-bit GaLore": [0.0025, 0.005, 0.01, 0.02, 0.04],
         "low rank": [0.0005, 0.001, 0.002, 0.004, 0.008], "LoRA": [0.0005, 0.001, 0.002, 0.004, 0.008], "ReLoRA": [0.0005, 0.001, 0.002, 0.004, 0.008]}  # fmt: skip
PAPER = {"full rank": "34.06 (0.36G)", "GaLore": "34.88 (0.24G)", "low rank": "78.18 (0.26G)", "LoRA": "34.99 (0.36G)", "ReLoRA": "37.04 (0.36G)"}  # 60M


def build(model, run: dict) -> GaLoreAdamW:
    galore, kind = run["optimiser"] == "GaLore", run.get("kind")
    groups = param_groups(model, run["rank"], run["T"], run["alpha"])
    if kind:
        layers = lora.low_rank(model, run["rank"], kind)
        groups = lora.groups(model, layers)
    elif not galore:
        groups = [dict(params=group["params"]) for group in groups]
    groups[-1]["lr"] = run.get("others_lr", run["lr"])  # embedding, head and norms
    opt = GaLoreAdamW(groups, lr=run["lr"], seed=run["seed"], state_bits=run.get("state_bits", 32), direction="muon" if run.get("muon") else "adam")
    if galore:
        thin(model, opt)
    if kind == "relora":
        lora.restart_every(opt, layers, steps=max(1, run["steps"] // 4), warmup=run["steps"] // 40, times=min(3, run["steps"] - 1))
    return opt


def table1(run: dict) -> int:
    """Bytes of weights and states by the paper's Table 1 (m <= n), and of all other parameters 3 values each."""
    model = make_model(run, "meta")
    wide, r = torch.empty(0, dtype=getattr(torch, run["dtype"])).element_size(), run["rank"]

    def state(values: int, width: int = 4) -> int:  # moments are fp32; of 8-bit GaLore, codes with an fp32 scale for each block
        return values + 4 * -(-values // BLOCK) if run.get("state_bits") == 8 and values >= SMALLEST else width * values

    *blocks, others = param_groups(model, rank=1)
    total = sum(wide * p.numel() + 2 * state(p.numel()) for p in others["params"])
    for m, n in (sorted(p.shape) for group in blocks for p in group["params"]):
        if run["optimiser"] == "GaLore":
            total += wide * m * n + state(m * r, wide) + 2 * state(n * r)  # mn; mr + 2nr
        elif "kind" in run:
            total += wide * (m * n * (run["kind"] != "factors") + m * r + n * r) + 2 * state(m * r + n * r)  # mn + mr + nr; 2mr + 2nr
        else:
            total += wide * m * n + 2 * state(m * n)  # mn; 2mn
    return total


def speed(chosen: dict[str, dict], device: str, rounds: int) -> dict[str, float]:
    """Tokens a second of each method: the median of `rounds` steps, the methods taking turns in this process."""
    steps, times = {}, {name: [] for name in chosen}
    for name, run in chosen.items():
        model = make_model(run, device)
        opt = build(model, run)
        opt.due = lambda group: False  # no refreshes
        if device.startswith("cuda"):
            for block in model.model.layers:
                block.compile(fullgraph=True, dynamic=False)
        steps[name] = stepper(model, opt, run, Stream(run["data"], get_tokenizer(run["tokenizer"]), "train", run["seq_len"]))
    for t in range(1, rounds + 4):
        for name, step in steps.items():
            start = time.perf_counter()
            step(t).item()  # waits for the device
            times[name].append(time.perf_counter() - start)
    tokens = {name: run["total_batch_size"] * run["seq_len"] for name, run in chosen.items()}
    return {name: tokens[name] / statistics.median(times[name][3:]) for name in chosen}  # the first three: compilation


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rates", type=int, choices=range(1, 6), help="how many learning rates each method gets, the middle ones of five (default: 5; --quick: 1)")
    parser.add_argument("--rounds", type=above_zero(int), help="steps that tokens/s is the median of (default: 15; --quick: 2)")
    parser.add_argument("--others_lr", type=above_zero(float), help="one rate for embedding, head and norms in all methods; --rates are then of the matrices alone (default: the same)")
    args, setting = parse(parser)
    if args.others_lr:
        setting["others_lr"] = args.others_lr
    found = sweep(build, METHODS, {name: middle(rates, args.rates or (1 if args.quick else 5)) for name, rates in RATES.items()}, setting, args)
    chosen = {name: result["run"] for name, result in found.items()}
    tokens_per_s = {} if args.left else speed(chosen, args.device, args.rounds or (2 if args.quick else 15))
    rows = []
    for name, result in found.items():
        run, measured = result["run"], result["run"]["weight_bytes"] + result["run"]["state_bytes"]
        if measured != table1(run):
            raise SystemExit(f"{name}: weights and states take {measured:,} bytes, and not the {table1(run):,} of the paper's Table 1")
        rows.append({"method": name, "validation loss": spread(result["losses"]), "perplexity": round(math.exp(statistics.mean(result["losses"])), 3),
                     "bits a byte": round(run["bits_per_byte"] * statistics.mean(result["losses"]) / run["val_loss"], 4), "weights + states, MB": round(measured / 1e6, 2), "states, MB": round(run["state_bytes"] / 1e6, 2),
                     **({"tokens/s": round(tokens_per_s[name]), "of the first row's": round(tokens_per_s[name] / next(iter(tokens_per_s.values())), 2)} if tokens_per_s else {}), **rates_of(result),
                     "paper, 60M: perplexity (weights + states)": PAPER.get(name, "")})  # fmt: skip
    show(title(setting), rows)
    write(args, setting, table=rows, **details(found))
    curves(found, setting, args.figure)


if __name__ == "__main__":
    begin(main)
