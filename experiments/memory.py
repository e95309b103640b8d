"""
How much memory does a training step take? The real step of train.py, against the paper and the bars.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/memory.py                                     all cases, minutes; json and figure
    python experiments/memory.py --size 7b --galore --rank 512 --batch_size 4 --recompute 32     one run of train.py

The step runs on tensors without memory, as train.py --plan does it (plumbing/memory.py says what is counted, and what is not).
--plan takes two steps of a few blocks and draws a line through them. In the table the whole model takes the step, and both are shown. The figure
is of plans.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from model import Config  # noqa: E402
from plumbing.memory import CARD, room, simulate  # noqa: E402

HERE = Path(__file__).parent
GALORE = "--size 7b --galore --rank 1024 --state_bits 8"  # with Adam's moments of embedding and head in host memory
ONE = " --no-offload --vocab_size 32000 --dtype bfloat16 --batch_size 1 --total_batch_size 1"  # sequences of 256 tokens
FULL = " --no-offload --vocab_size 32000 --dtype bfloat16 --batch_size 16 --total_batch_size 512 --recompute 32"
TYPED = " --total_batch_size 512 --dtype bfloat16"  # and GPT-2's vocabulary: `--size 7b --galore --rank 1024` on a GPU
NOW, LATER = " --recompute 0", " --no-layerwise --recompute 0"
INT8, SMALL = "--size 7b --galore --rank {} --state_bits 8 --weight_bits 8", FULL.replace("size 16", "size 4")
HALF = FULL.replace("size 16", "size 8")
BARS = {  # case: options, bar and what the paper or its code took, GB (paper: section 5.5, table 11; 22.72 in its code's README)
    "7B, r = 1024, 256 tokens a step": (GALORE + ONE + NOW, 20.5, "22.0"),
    "7B, r = 1024, 131,072 tokens a step": (GALORE + FULL, 24.0, "not possible"),
    "the same, micro-batches of 2,048": (GALORE + HALF, 24.0, "not possible"),
    "7B, r = 1024, 131,072 tokens, clipping": (GALORE + FULL + " --grad_clipping 1", 24.0, "not possible"),
    "7B, r = 1024, 256 tokens, Muon": (GALORE + " --direction muon" + ONE + NOW, 20.5, "-"),
    "7B, r = 1024, 131,072 tokens, Muon": (GALORE + " --direction muon" + FULL, 24.0, "-"),
    "7B, r = 256, 256 tokens": (GALORE.replace("1024", "256") + ONE + NOW, 17.6, "-"),
    "7B, int8 weights, r = 512, 256 tokens": (INT8.format(512) + ONE + NOW, 11.4, "15.1, Q-GaLore"),
    "7B, int8, r = 512, 131,072 tokens": (INT8.format(512) + SMALL, 14.0, "not possible"),
    "7B, int8, r = 1024, 131,072 tokens": (INT8.format(1024) + SMALL, 17.8, "not possible"),
    "7B, int8, r = 256, 131,072 tokens, Muon": (INT8.format(256) + " --direction muon" + SMALL, 11.8, "-"),
    "7B, r = 1024, 131,072 tokens, the command": (GALORE + TYPED + " --batch_size 8 --recompute 31", 23.83, "not possible"),
    "the same, with a desktop on the card": (GALORE + TYPED + " --batch_size 2 --recompute 31", 22.98, "not possible"),
    "1B, r = 512, 256 tokens": ("--size 1b --galore --rank 512 --state_bits 8" + ONE + NOW, 4.6, "5.63"),
}
FIGURE = {  # the paper's figure 1: 7B, 256 tokens a step (and, at the end, a batch of its training)
    "AdamW\n(M, V in fp32)": "--size 7b --state_bits 32" + ONE + LATER,
    "8-bit Adam": "--size 7b --state_bits 8" + ONE + LATER,
    "GaLore\n(M, V in fp32)": GALORE.replace("bits 8", "bits 32") + ONE + LATER,
    "8-bit GaLore": GALORE + ONE + LATER,
    "8-bit GaLore,\nlayer-wise": GALORE + ONE + NOW,
    "the same,\n131,072 tokens": GALORE + HALF,
    "int8 weights,\nr = 512": INT8.format(512) + ONE + NOW,
    "the same, int8,\n131,072 tokens": INT8.format(512) + SMALL,
}
KINDS = ("weights", "state", "gradients", "activations", "temporaries")  # of the figure, in plumbing/memory.py's words


def settled(options: str) -> tuple[argparse.Namespace, Config]:
    """What train.py makes of its options, on a CPU, in bf16 and with a compiled update unless they say otherwise; what it refuses is refused here."""
    words = ["--device", "cpu", *options.split()]
    words += [] if "--dtype" in options else ["--dtype", "bfloat16"]
    words += [] if "compile" in options else ["--compile"]  # as on a GPU
    try:
        args, config, _ = train.settle(words)
        train.fit(args, config, train.plan)
    except ValueError as error:
        train.arguments().error(str(error))
    return args, config


def whole(build, step, blocks: int, gap: int, tokens: tuple[int, int], compiled: bool):
    """In the place of plumbing.memory.peak: all blocks."""

    def fullest(recompute: int) -> dict[str, float]:
        parts = simulate(build, step, (recompute, blocks - recompute), max(2, -(-blocks // gap)), tokens, compiled)
        return max(parts.values(), key=lambda table: sum(table.values()))

    return fullest


def measure(options: str) -> dict:
    """The whole model and the plan, in GB (1e9 bytes)."""
    args, config = settled(options)
    how = args, config, args.batch_size
    plan, kinds = sum(train.plan(*how)(args.recompute).values()), train.plan(*how, run=whole)(args.recompute)
    peak = sum(kinds.values())
    return {"options": options, "peak": peak, "plan": plan, "plan / peak": plan / peak, "by kind": kinds}


def planned(options: str) -> dict:
    """The plan alone, in GB."""
    args, config = settled(options)
    kinds = train.plan(args, config, args.batch_size)(args.recompute)
    return {"options": options, "peak": sum(kinds.values()), "by kind": kinds}


def draw(rows: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10.5, 4.8), layout="constrained")
    bottom = [0.0] * len(rows)
    for kind, colour in zip(KINDS, ["#4c566a", "#5e81ac", "#d08770", "#a3be8c", "#d8dee9"], strict=True):
        heights = [row["by kind"][kind] for row in rows.values()]
        axes.bar(range(len(rows)), heights, bottom=bottom, width=0.62, label=kind, color=colour)
        bottom = [b + h for b, h in zip(bottom, heights)]
    for i, row in enumerate(rows.values()):
        axes.text(i, max(row["peak"], bottom[i]) + 1, f"{row['peak']:.1f}", ha="center", va="bottom", zorder=3, backgroundcolor="white",
                  bbox=dict(facecolor="white", edgecolor="none", pad=0.5))  # fmt: skip
    lines = (room(CARD), "-", "bottom", "RTX 4090"), (room(16.51), "-", "top", "16 GiB card"), (22.0, ":", "top", "paper, layer-wise")
    for y, style, side, text in lines:
        axes.axhline(y, color="#bf616a", linewidth=1.2, linestyle=style, zorder=0.5 if style == "-" else 2)
        axes.text(len(rows) - 0.6, y + (0.4 if side == "bottom" else -0.4), f"{text}: {y:.1f}", color="#bf616a", va=side, fontsize=8)
    axes.set_xticks(range(len(rows)), rows)
    axes.set_xlim(-0.6, len(rows) + 0.7)
    axes.set_ylim(0, 92)
    axes.set_ylabel("peak of a training step, GB (1e9 bytes)")
    axes.set_title("7B LLaMA, bf16 weights, rank 1024, vocabulary 32,000, 256 tokens a step where nothing else is said", fontsize=10)
    axes.legend(loc="upper right", fontsize=9, title="at the peak", title_fontsize=9)
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
    if options and not {"--batch_size", "--recompute"} <= set(options):
        parser.error("give --batch_size and --recompute: train.py --plan says which it takes where")
    if options:
        row = measure(" ".join(options))
        for name, size in row["by kind"].items():
            print(f"{name:<24}{size:9.3f} GB")
        print(f"{'plan':<24}{row['plan']:9.3f} GB")
        print(f"peak {row['peak']:.2f} GB")
        return
    if args.quick:
        args.out = args.out.with_name("memory-quick.json")
        for size in ("1b", "7b"):
            train.SIZES[size]["num_hidden_layers"] = 2
    table, picture = {}, {}
    print(f"{'GB (1e9 bytes)':<42}{'plan':>8}{'simulated':>11}{'bar':>7}{'paper':>14}")
    for case, (options, bar, paper) in BARS.items():
        row = table[case] = measure(options) | {"bar": bar, "paper": paper}
        row["met"] = row["peak"] <= bar
        print(f"{case:<42}{row['plan']:8.2f}{row['peak']:11.2f}{bar:7.1f}{paper:>14}  {'met' if row['met'] else 'NOT MET'}", flush=True)
    print("\nfigure 1")
    for name, options in FIGURE.items():
        picture[name] = planned(options)
        print(f"{name.replace(chr(10), ' '):<42}{picture[name]['peak']:8.2f}", flush=True)
    conditions = {"command": " ".join(["python experiments/memory.py", *sys.argv[1:]]), "simulated": "eager step on meta tensors, no GPU",
                  "quoted": "paper: arXiv 2403.03507, section 5.5 and table 11", "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"conditions": conditions, "bars": table, "figure 1": picture}, indent=1) + "\n")
    path = HERE / "figures" / args.out.with_suffix(".png").name
    draw(picture, path)
    print(f"written to {args.out} and {path}")


if __name__ == "__main__":
    main()
