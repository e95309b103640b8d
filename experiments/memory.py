"""
How much memory does a training step take? The real step of train.py on fake tensors, against the plan, the paper, and the bars.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/memory.py                                     all cases, minutes; json and figure
    python experiments/memory.py --size 7b --galore --rank 512       one run, with the flags of train.py

Fake tensors have shapes, but no memory, so this needs no GPU and no more than a gigabyte for a 7B model. What runs is
train.prepare and train.training_step: forward, backward, hooks, update, refresh. PyTorch's MemTracker sees each tensor
that comes and goes; the peak is that of the whole step, everything counted that is a tensor: weights, states, accumulators,
activations, logits, temporaries of the update. Two steps are taken apart: one in which nothing is refreshed, and one in
which the last block is (the first in the backward pass, when all activations are there), and as early on another one, too;
the larger one counts.

Left out: the CUDA context (about half a GB), workspaces inside kernels, fragmentation of the allocator; torch.compile, which
saves memory (fewer activations are kept, temporaries of the update never exist) but does not run on fake tensors.
"""

import argparse
import json
import math
import platform
import sys
from itertools import repeat
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from model import Config, Llama  # noqa: E402

HERE = Path(__file__).parent
GALORE = "--size 7b --galore --rank 1024 --state_bits 8"
ONE = " --vocab_size 32000 --dtype bfloat16 --batch_size 1 --total_batch_size 1"  # sequences of 256 tokens
FULL = " --vocab_size 32000 --dtype bfloat16 --batch_size 16 --total_batch_size 512 --activation_checkpointing"
NOW, LATER = " --no-activation_checkpointing", " --no-layerwise --no-activation_checkpointing"
BARS = {  # case: options, bar and what the paper or its code took, GB (paper: section 5.5, table 11; 22.72 in its code's README)
    "7B, r = 1024, 256 tokens a step": (GALORE + ONE + NOW, 20.5, "22.0"),
    "7B, r = 1024, 131,072 tokens a step": (GALORE + FULL, 24.0, "not possible"),
    "7B, r = 1024, 131,072 tokens, clipping": (GALORE + FULL + " --grad_clipping 1", 24.0, "not possible"),
    "7B, r = 1024, 256 tokens, --muon": (GALORE + " --muon" + ONE + NOW, 20.5, "-"),
    "7B, r = 1024, 131,072 tokens, --muon": (GALORE + " --muon" + FULL, 24.0, "-"),
    "7B, r = 256, 256 tokens": (GALORE.replace("1024", "256") + ONE + NOW, 17.6, "-"),
    "1B, r = 512, 256 tokens": ("--size 1b --galore --rank 512 --state_bits 8" + ONE + NOW, 4.6, "5.63"),
}
FIGURE = {  # the paper's figure 1: 7B, 256 tokens a step (and, at the end, a batch of its training)
    "AdamW\n(M, V in fp32)": "--size 7b --state_bits 32" + ONE + LATER,
    "8-bit Adam": "--size 7b --state_bits 8" + ONE + LATER,
    "GaLore\n(M, V in fp32)": GALORE.replace("bits 8", "bits 32") + ONE + LATER,
    "8-bit GaLore": GALORE + ONE + LATER,
    "8-bit GaLore,\nlayer-wise": GALORE + ONE + NOW,
    "the same, 131,072\ntokens a step": GALORE + FULL,
}
KINDS = {  # of the figure, in the words of train.plan
    "weights": ["weights"], "M, V": ["M, V of the matrices", "M, V of embedding, head, norms"], "P": ["P"],
    "gradients, accumulators": ["gradients"], "activations": ["activations"], "logits, update": ["temporaries"],
}  # fmt: skip


class Tracker(MemTracker):
    """MemTracker without its statistics by module, which allow a module one forward pass only."""

    def no_statistics(self, *args) -> None:
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = no_statistics


def settled(options: str) -> tuple[argparse.Namespace, Config]:
    """What train.py makes of its options; what it refuses is refused here."""
    parser = train.arguments()
    args = parser.parse_args([*options.split(), "--plan"])
    args.device, args.dtype = "cpu", args.dtype or "bfloat16"
    try:
        config = train.settle(args, None)
        train.fit(config, args, on_this_device=False)
    except ValueError as error:
        parser.error(str(error))
    return args, config


def simulate(args: argparse.Namespace, config: Config, due: bool) -> int:
    """Peak bytes of a step of train.py; with `due`, of one in which the last block's subspace is refreshed."""
    args = train.with_(args, total_batch_size=min(args.total_batch_size, 3 * args.batch_size * train.world()))  # first, middle, last
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Llama(config, "cpu", getattr(torch, args.dtype))
        opt = train.prepare(model, args)
        last = [group for group in opt.param_groups if group["rank"] or not args.galore][-1]
        early = 2 * last["turns"] + last["offset"] * last["turns"] // last["update_proj_gap"]
        for group in opt.param_groups:
            group["t"] = early - 1 if due else 1000 * last["update_proj_gap"]
        states = [opt.init(p) for p in opt.group]
        opt.arm()
        tokens = torch.zeros(args.batch_size, args.seq_len, dtype=torch.long)
        with Tracker() as tracker:
            tracker.track_external(model, *(x for state in states for x in state.values() if torch.is_tensor(x)))
            train.training_step(model, opt, repeat((tokens, tokens)), train.accumulation(args))
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"]


def measure(options: str) -> dict:
    """Both steps and the plan, in GB (1e9 bytes)."""
    args, config = settled(options)
    table = train.plan(config, args)
    steps = {"simulated": simulate(args, config, due=False)} | ({"simulated, refreshing": simulate(args, config, due=True)} if args.galore else {})
    peak = max(steps.values())
    return {"options": options} | {k: v / 1e9 for k, v in steps.items()} | {"peak": peak / 1e9, "plan": sum(table.values()) / 1e9,
            "plan / peak": sum(table.values()) / peak, "plan by kind": {k: v / 1e9 for k, v in table.items()}}  # fmt: skip


def draw(rows: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    bottom = [0.0] * len(rows)
    for (kind, names), colour in zip(KINDS.items(), ["#4c566a", "#5e81ac", "#88c0d0", "#d08770", "#a3be8c", "#d8dee9"], strict=True):
        heights = [sum(row["plan by kind"][name] for name in names) for row in rows.values()]
        axes.bar(range(len(rows)), heights, bottom=bottom, width=0.62, label=kind, color=colour)
        bottom = [b + h for b, h in zip(bottom, heights)]
    axes.plot(range(len(rows)), [row["peak"] for row in rows.values()], "k_", markersize=38, markeredgewidth=1.2, label="simulated peak")
    for i, row in enumerate(rows.values()):
        axes.text(i, max(row["peak"], bottom[i]) + 1, f"{row['peak']:.1f}", ha="center", va="bottom", zorder=3, backgroundcolor="white",
                  bbox=dict(facecolor="white", edgecolor="none", pad=0.5))  # fmt: skip
    for y, style, text in (24 * 2**30 / 1e9, "-", "24 GiB card: 25.8"), (22.0, ":", "paper, 8-bit\nGaLore, layer-wise,\n256 tokens: 22.0"):
        axes.axhline(y, color="#bf616a", linewidth=1.2, linestyle=style, zorder=0.5 if style == "-" else 2)
        axes.text(len(rows) - 0.5, y + 0.6 if style == "-" else y - 0.8, text, color="#bf616a", va="bottom" if style == "-" else "top", fontsize=8)
    axes.set_xticks(range(len(rows)), rows)
    axes.set_xlim(-0.6, len(rows) + 0.4)
    axes.set_ylim(0, 92)
    axes.set_ylabel("peak of a training step, GB (1e9 bytes)")
    axes.set_title("7B LLaMA, bf16 weights, rank 1024, vocabulary 32,000, 256 tokens a step (but for the last)", fontsize=10)
    axes.legend(loc="upper right", fontsize=9, markerscale=0.45, title="stacked: --plan", title_fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="any other option is one of train.py's: that run is measured then",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="the same cases with two blocks in place of 24 or 32: figures that mean nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json", help="where the figures go")
    args, options = parser.parse_known_args()
    if options and args.quick:
        parser.error("--quick goes with the cases of the table, not with options of train.py: leave one of the two out.")
    if options:
        row = measure(" ".join(options))
        for name in ("simulated", "simulated, refreshing", "plan"):
            print(f"{name:<24}{row.get(name, math.nan):9.3f} GB")
        print(f"peak {row['peak']:.2f} GB")
        return
    if args.quick:
        args.out = args.out.with_name("memory-quick.json")
        for size in ("1b", "7b"):
            train.SIZES[size]["num_hidden_layers"] = 2
    known, table, picture = {}, {}, {}

    def once(options: str) -> dict:
        if options not in known:
            known[options] = measure(options)
        return known[options]

    print(f"{'GB (1e9 bytes)':<42}{'plan':>8}{'simulated':>11}{'refreshing':>12}{'bar':>7}{'paper':>14}")
    for case, (options, bar, paper) in BARS.items():
        row = table[case] = once(options) | {"bar": bar, "paper": paper}
        row["met"] = row["peak"] <= bar
        print(f"{case:<42}{row['plan']:8.2f}{row['simulated']:11.2f}{row['simulated, refreshing']:12.2f}{bar:7.1f}{paper:>14}  {'met' if row['met'] else 'NOT MET'}", flush=True)
    print("\nfigure 1")
    for name, options in FIGURE.items():
        picture[name] = once(options)
        print(f"{name.replace(chr(10), ' '):<42}{picture[name]['plan']:8.2f}{picture[name]['peak']:11.2f}", flush=True)
    conditions = {"command": " ".join(["python experiments/memory.py", *sys.argv[1:]]), "simulated": "eager step on fake tensors, no GPU",
                  "quoted": "paper: arXiv 2403.03507, section 5.5 and table 11", "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"conditions": conditions, "bars": table, "figure 1": picture}, indent=1) + "\n")
    path = HERE / "figures" / args.out.with_suffix(".png").name
    draw(picture, path)
    print(f"written to {args.out} and {path}")


if __name__ == "__main__":
    main()
