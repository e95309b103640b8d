"""
Does it help? Stochastic rounding, the basis P in 8 bits, and the warm refresh, each taken away at toy size.

    python experiments/ablations.py              30 runs of three minutes on one core; writes experiments/results/ablations.json
    python experiments/ablations.py --quick      one seed, 20 small steps: do all variants run, and are they what they say?

Every run is train.py's own code, `python train.py --size toy --data python --galore --rank 64`, in a process of its own, on one thread
(so that its bits are reproducible). Where train.py has no flag for a variant, one piece of galore.py is put aside: the functions under
"the pieces". What a run then was is looked up in the run itself (`Watch`): a run that is not what its variant says ends with an error.
All figures are final validation losses in nats a byte.

A seed stands for the first weights, the first P and the rounding; the data come in the same order in all runs. "plain" is the baseline but
for the order of its sums (full gradients, weights moved at the end of the step): how far it lies off is how far rounding alone carries.
The json fills up run by run; what is in it is not run again, so the script goes on where it was interrupted. To repeat it, delete the json
or take another --out.

Left out on purpose: other sizes, learning rates tuned for each variant (all have the toy's, which was tuned for the baseline).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import galore  # noqa: E402
import train  # noqa: E402
from speed import cpu, show  # noqa: E402

RUN = "--size toy --data python --galore --rank 64 --device cpu --eval_every 600 --save_every 600"
QUICK = "--steps 20 --seq_len 32 --total_batch_size 4 --eval_tokens 1024"
BASELINE, IN_8_BITS, P_WIDE = "baseline", "8-bit moments and P", "8-bit moments, P fp32"


# ----- the pieces ---------------------------------------------------------------------------------------------------


def round_to_nearest() -> None:
    galore.move_ = lambda w, N, lr, stay, *_: w.copy_(w.float() * stay - N.float() * lr)  # rounded once


def wide_basis() -> None:
    """P in the weights' dtype, whatever the moments are in."""
    zeros = galore.zeros
    galore.zeros = lambda names, shape, dtype, narrow, device: zeros(names, shape, dtype, narrow and names != "P", device)


def svd_refresh() -> None:
    """P_new = the first r left singular vectors of G, in place of the power iteration; schedule and turning stay. Plain way only."""
    project = galore.GaLoreAdamW.project

    def project_svd(opt, p):
        R, Y = project(opt, p)
        return R, Y if Y is None else torch.linalg.svd(galore.rows(p.grad), full_matrices=False)[0][:, : len(R)]

    galore.GaLoreAdamW.project, galore.refresh = project_svd, lambda P, U: U


def refresh_without_turning() -> None:
    rotate = galore.rotate
    galore.rotate = lambda state, names, new, ok: rotate(state, "", new, ok)


def never_refresh() -> None:
    galore.GaLoreAdamW.due = lambda opt, group: False


# ----- the variants: options of train.py, the piece that changes, and what must be seen where it differs from the baseline --------

SEEN = dict(weights="float32", P="float32", M="float32", rounding="none", refreshed=True, turned=True, P_moved=True)
BF16 = dict(weights="bfloat16", P="bfloat16", rounding="stochastic")
VARIANTS = {
    BASELINE: ("", None, {}),
    "bf16, stochastic rounding": ("--dtype bfloat16", None, BF16),
    "bf16, nearest rounding": ("--dtype bfloat16", round_to_nearest, BF16 | dict(rounding="nearest")),
    IN_8_BITS: ("--state_bits 8", None, dict(P="uint8", M="uint8")),
    P_WIDE: ("--state_bits 8", wide_basis, dict(M="uint8")),
    "refresh by SVD": ("--no-layerwise", svd_refresh, {}),
    "refresh, moments not turned": ("", refresh_without_turning, dict(turned=False)),
    "never refreshed": ("", never_refresh, dict(refreshed=False, turned=False, P_moved=False)),
    "--exact": ("--exact", None, dict(refreshed=False, turned=False)),  # has a refresh of its own
    "plain": ("--no-layerwise", None, {}),
}


class Watch:
    """Looks on while train.py trains, and says what it saw."""

    def __init__(self):
        self.written = self.elsewhere = self.lost = self.refreshes = self.turns = 0
        self.write, self.rotate, self.prepare = galore.move_, galore.rotate, train.prepare
        galore.move_, galore.rotate, train.prepare = self.on_write, self.on_rotate, self.on_prepare

    def on_prepare(self, *given):
        self.opt = self.prepare(*given)
        return self.opt

    def on_write(self, w, N, lr, stay, seed):
        before, nearest = w.clone(), (w.float() * stay - N.float() * lr).to(w.dtype)
        self.write(w, N, lr, stay, seed)
        if w.dtype != torch.float32:  # else nothing is rounded
            self.written += w.numel()
            self.elsewhere += (w != nearest).sum().item()
            self.lost += (w == before).sum().item()

    def on_rotate(self, state, names, new, ok):
        before = state["M"].clone()
        self.rotate(state, names, new, ok)
        self.refreshes += 1
        self.turns += not torch.equal(before, state["M"])

    @torch.no_grad()
    def seen(self) -> tuple[dict, dict]:
        """What the run was, to be compared with what it should be; and numbers that tell more."""
        opt = self.opt
        p = next(p for p, group in opt.group.items() if group["rank"])
        end, start = opt.state.pop(p), opt.init(p)
        P, first = (galore.load(state, "P").float() for state in (end, start))
        overlap = ((first.T @ P).square().sum() / P.shape[1]).item()  # 1: the same subspace; r / m: no more than chance
        name = lambda x: str(x.dtype).removeprefix("torch.")  # noqa: E731
        rounding = "none" if not self.written else "stochastic" if self.elsewhere > 0.1 * self.written else "nearest"
        seen = dict(weights=name(p), P=name(end["P"]), M=name(end["M"]), rounding=rounding, refreshed=self.refreshes > 0,
                    turned=self.turns > 0, P_moved=overlap < 0.95)  # fmt: skip
        numbers = {"refreshes": self.refreshes, "refreshes that turned the moments": self.turns, "P's overlap with the first": overlap,
                   "P'P - I": (P.T @ P - torch.eye(P.shape[1])).abs().max().item()}  # fmt: skip
        if self.written:
            numbers |= {"values not rounded to nearest": self.elsewhere / self.written, "values a step left unchanged": self.lost / self.written}
        return seen, numbers


def worker(variant: str, out_dir: str, *options: str) -> None:
    """One run, in this process; its last line of output is the result."""
    _, change, differs = VARIANTS[variant]
    if change:
        change()
    watch = Watch()
    sys.argv = ["train.py", "--out_dir", out_dir, *options]
    train.main()
    last = json.loads(Path(out_dir, "log.jsonl").read_text().splitlines()[-1])
    if "val_loss" not in last:
        raise SystemExit("stopped before its end")
    seen, numbers = watch.seen()
    assert seen == SEEN | differs, f"{variant}: {seen} is not {SEEN | differs}"
    print(json.dumps({"loss": last["val_loss"], "steps": last["step"], "validation tokens": last["val_tokens"], "seen": seen} | numbers))


# ----- all runs -----------------------------------------------------------------------------------------------------


def difference(ours: dict, theirs: dict) -> tuple[float, float | None]:
    """Mean of the differences in %, seed by seed, and its standard error."""
    differences = [100 * (ours[seed]["loss"] / theirs[seed]["loss"] - 1) for seed in ours if seed in theirs]
    if not differences:
        return None, None
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return round(statistics.mean(differences), 2), error and round(error, 2)


def summary(runs: dict) -> tuple[list[dict], list[dict]]:
    """The table of what has been run, and the bar."""
    rows, bars, base = [], [], [run["loss"] for run in runs.get(BASELINE, {}).values()]
    for name in (name for name in VARIANTS if name in runs):
        x = [run["loss"] for _, run in sorted(runs[name].items(), key=lambda item: int(item[0]))]
        row = {"validation loss, nats a byte": name, "seeds": " ".join(f"{loss:.4f}" for loss in x), "mean": round(statistics.mean(x), 4),
               "max - min": round(max(x) - min(x), 4), "std": round(statistics.stdev(x), 4) if len(x) > 1 else None}  # fmt: skip
        if base and name != BASELINE:
            row["to baseline, %"], row["standard error"] = difference(runs[name], runs[BASELINE])
            row["ranges"] = "-" if len(x) < 2 else "apart" if max(x) < min(base) or min(x) > max(base) else "overlap"
        rows.append(row)
    if {IN_8_BITS, P_WIDE} <= runs.keys():
        value, error = difference(runs[IN_8_BITS], runs[P_WIDE])
        bars = [{"bar": "P in 8 bits in place of fp32, moments in 8 bits: change of the loss, %", "value": value, "standard error": error,
                 "limit": "+-0.3", "met": value is not None and abs(value) <= 0.3}]  # fmt: skip
    return rows, bars


def write(path: Path, result: dict) -> None:
    """All that is there so far; the file is whole at any time."""
    result["table"], result["bars"] = summary(result["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 small steps, about a minute: losses that mean nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ablations.json", help="where the figures go")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.out = args.seeds[:1], args.out.with_name("ablations-quick.json")
    options = f"{RUN} {QUICK}" if args.quick else RUN
    conditions = {"command": "python experiments/ablations.py" + " --quick" * args.quick, "runs": f"python train.py {options} [the variant's options] --seed SEED",
                  "variants": {name: option for name, (option, _, _) in VARIANTS.items()}, "threads": 1, "cpu": cpu(),
                  "python (whose library is the data)": platform.python_version(), "torch": torch.__version__}  # fmt: skip
    result = json.loads(args.out.read_text()) if args.out.exists() and not args.quick else {"conditions": conditions, "runs": {}}
    for key in (key for key in conditions if result["conditions"].get(key) != conditions[key]):
        parser.error(f"{args.out} holds runs with {key} {result['conditions'].get(key)}, not {conditions[key]}: delete it, or take another --out")
    runs = result["runs"]
    todo = [(name, seed) for name in VARIANTS for seed in args.seeds if str(seed) not in runs.get(name, {})]

    with TemporaryDirectory() as folder, ThreadPool(args.jobs) as pool:

        def run(which):
            name, seed = which
            with TemporaryDirectory(dir=folder) as place:
                call = [sys.executable, str(Path(__file__).resolve()), "--worker", name, f"{place}/run", *options.split(), *VARIANTS[name][0].split()]
                done = subprocess.run([*call, "--seed", str(seed), "--data_dir", f"{folder}/data"], cwd=place, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                      text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{name}, seed {seed}:\n{done.stdout[-3000:]}")
            return name, seed, json.loads(done.stdout.splitlines()[-1])

        for name, seed, got in pool.imap_unordered(run, todo):
            runs.setdefault(name, {})[str(seed)] = got
            write(args.out, result)
            print(f"{name}, seed {seed}: {got['loss']:.4f}", flush=True)
    write(args.out, result)

    rows, bars = result["table"], result["bars"]
    digits = {"mean": ".4f", "max - min": ".4f", "std": ".4f"}
    columns = max(rows, key=len)  # the baseline has none of the last
    show("ablations", [{key: "-" if row.get(key) is None else format(row[key], digits.get(key, "")) for key in columns} for row in rows],
         "(standard error: of the difference, seed by seed; ranges: do those of the seeds' losses lie apart from the baseline's?)")  # fmt: skip
    if bars:
        show("bars", [bar | {"met": "yes" if bar["met"] else "NO"} for bar in bars])
    print(f"\nin {args.out}")


if __name__ == "__main__":
    try:
        worker(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
