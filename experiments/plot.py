"""
Loss curves of several runs in one picture.

    pip install -r experiments/requirements.txt
    python experiments/plot.py out/*/log.jsonl                   writes loss.png, and prints a line for each run
    python experiments/plot.py out/a/log.jsonl out/b/log.jsonl --out ab.png --smooth 0.02

Line: training loss, the mean over the last 5% (--smooth) of the tokens that the run has seen so far. So the window grows along with the
run: it is short where the loss falls steeply and long where it is flat, a curve does not depend on which others are drawn with it, and runs
with different batches are averaged over the same tokens. (An exponential mean over a fixed number lags behind at the start, or is noisy at
the end.) Behind it, of up to four runs, the loss as it is. Dots: validation loss.

A loss that is not finite leaves a gap. The y axis leaves out the first fall (of what is drawn, the upper 4%, unless a run ends there) and what
lies above the first losses.
Losses are nats a token: runs with different tokenizers do not compare (their bits_per_byte do), and a note says so.

Left out on purpose: other quantities of the log, other x axes, log scales, interaction.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

try:
    import numpy as np
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's, told apart by the colour-blind
STYLES = [("-", "o"), ("--", "s"), (":", "^")]  # for the first seven runs, the next, ...


RAW = 4  # so many runs at most are drawn with their losses as they are


@dataclass
class Run:
    path: Path
    args: dict  # as they are at the end
    steps: int
    tokens: "np.ndarray"  # after each step
    loss: "np.ndarray"
    smooth: "np.ndarray"
    val_tokens: list[int]
    val_loss: list[float]
    name: str = ""


def read(path: Path, share: float) -> Run:
    """A log.jsonl of train.py. ValueError for what is none."""
    try:
        return parse(path, share)
    except KeyError as missing:
        raise ValueError(f"{path} is not a log of train.py: a line has no {missing}") from None


def parse(path: Path, share: float) -> Run:
    if not path.is_file():
        raise ValueError(f"{path} does not exist, or is no file: name the log.jsonl of a run, as in out/*/log.jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a log of train.py: it is no text") from None
    args, tokens, losses, scores = {}, {}, {}, {}
    for i, text in enumerate(lines, 1):
        try:
            line = {k: math.nan if v is None else v for k, v in dict(json.loads(text)).items()}  # null: not finite
        except (ValueError, TypeError):
            if i < len(lines) or i == 1:
                raise ValueError(f"{path} is not a log of train.py: line {i} is no JSON object") from None
            print(f"{path}: the last line is cut short and left out", file=sys.stderr)
            break
        if i == 1 and "args" not in line:
            raise ValueError(f"{path} is not a log of train.py: its first line holds no args")
        args = line.get("args", args)
        if "val_loss" in line:
            scores[line["step"]] = line["val_loss"]
        elif "loss" in line:
            tokens[line["step"]], losses[line["step"]] = line["tokens"], line["loss"]
    if not any(math.isfinite(x) for x in [*losses.values(), *scores.values()]):
        raise ValueError(f"{path} holds no loss that is finite: there is nothing to draw of its {len(losses)} steps")
    step_tokens = args["total_batch_size"] * args["seq_len"]
    t, loss = np.array(list(tokens.values())), np.array(list(losses.values()), dtype=float)
    at = [tokens.get(step, step * step_tokens) for step in scores]  # a crash may have taken the step's own line
    return Run(path, args, max([*losses, *scores]), t, loss, smoothed(t, step_tokens, loss, share), at, list(scores.values()))


def smoothed(tokens: "np.ndarray", first: int, loss: "np.ndarray", share: float) -> "np.ndarray":
    """Mean over the last `share` of the tokens so far, each step weighing as many as it has (`first`, the first that is there); NaN
    where the loss is not finite."""
    fine = np.isfinite(loss)
    weight = np.where(fine, np.diff(tokens, prepend=tokens[:1] - first), 0)
    total = np.concatenate([[0.0], np.cumsum(weight * np.where(fine, loss, 0))])
    count = np.concatenate([[0], np.cumsum(weight)])
    last = np.arange(1, len(loss) + 1)
    first = np.minimum(np.searchsorted(tokens, (1 - share) * tokens), last - 1)  # at least the step itself
    with np.errstate(invalid="ignore"):
        return np.where(fine, (total[last] - total[first]) / (count[last] - count[first]), np.nan)


def give_names(runs: list[Run]) -> None:
    """Folder (with as many of those above as it takes), and of size, method and learning rate what differs."""
    folders = [run.path.resolve().parent.parts for run in runs]
    depth = next((d for d in range(1, 9) if len({f[-d:] for f in folders}) == len(set(folders))), 9)
    facts = [{"size": run.args.get("size"), "method": f"GaLore r {run.args.get('rank')}" if run.args.get("galore") else "AdamW",
              "lr": f"lr {run.args.get('lr', math.nan):g}"} for run in runs]  # fmt: skip
    differing = [key for key in facts[0] if len({fact[key] for fact in facts}) > 1]
    for run, folder, fact in zip(runs, folders, facts):
        run.name = ", ".join(["/".join(folder[-depth:]), *(fact[key] for key in differing)])


def limits(runs: list[Run]) -> tuple[float, float]:
    """Of the y axis: most of what is drawn, each part of the x axis weighing the same, and where each run ends."""
    drawn, starts, ends = [], [], []
    grid = np.linspace(0, max(max([*run.tokens, *run.val_tokens]) for run in runs), 1001)[1:]
    for run in runs:
        fine = np.isfinite(run.smooth)
        t, x = run.tokens[fine], run.smooth[fine]
        if len(x):
            starts.append(x[0])
            ends.append(x[-1])
            drawn.append(np.interp(grid[(t[0] <= grid) & (grid <= t[-1])], t, x))
        drawn.append(np.array([x for x in run.val_loss if math.isfinite(x)]))
    drawn = np.concatenate(drawn)
    below = [np.percentile(x, 0.5) for run in runs if len(runs) <= RAW and len(x := run.loss[np.isfinite(run.loss)])]
    low, high = min([drawn.min(), *below]), max([np.percentile(drawn, 96), *ends])
    high = max(min([high, *([max(starts)] if starts else [])]), low + 0.01)
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def name_lines(axes, lines: list) -> None:
    """Each line's name at its end, moved up or down where two would meet."""
    low, high = axes.get_ylim()
    apart, last = 0.045, -1.0
    ends = [(min(max((line.get_ydata()[-1] - low) / (high - low), 0), 1), i, line) for i, line in enumerate(lines)]
    for height, _, line in sorted(ends):
        last = max(height, last + apart)
        at = (line.get_xdata()[-1], line.get_ydata()[-1])
        axes.annotate(line.get_label(), at, (1.02, last), textcoords="axes fraction", color=line.get_color(), fontsize=8.5,
                      va="center", annotation_clip=False, arrowprops=dict(arrowstyle="-", color=line.get_color(), linewidth=0.5, relpos=(0, 0.5)))  # fmt: skip


def draw(runs: list[Run], share: float, path: Path, head: str = "") -> None:
    columns = 2 if len(runs) > 4 and max(len(run.name) for run in runs) < 60 else 1
    in_place = len(runs) <= 6  # more names do not fit beside their lines
    figure = Figure(figsize=(9, 5 + 0.19 * -(-len(runs) // columns) * (not in_place)), layout="constrained")
    axes = figure.add_subplot()
    most = max(max([*run.tokens, *run.val_tokens]) for run in runs)
    unit, word = next(((u, w) for u, w in [(1e9, "billion "), (1e6, "million "), (1e3, "thousand ")] if most >= 2 * u), (1, ""))
    handles = []
    for i, run in enumerate(runs):
        colour, (style, marker) = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        if len(runs) <= RAW:
            axes.plot(run.tokens / unit, run.loss, color=colour, alpha=0.18, linewidth=0.7, zorder=1)
        (line,) = axes.plot(run.tokens / unit, run.smooth, style, color=colour, linewidth=1.5, marker=marker, markevery=[], label=run.name, zorder=2)
        axes.plot([t / unit for t in run.val_tokens], run.val_loss, marker, color=colour, markersize=5.5 if len(runs) <= RAW else 4.5,
                  markeredgecolor="white", markeredgewidth=0.8, zorder=3)  # fmt: skip
        handles.append(line)
    axes.set_ylim(*limits(runs))
    axes.set_xlim(0, most / unit * 1.01)
    axes.set_xlabel(f"{word}tokens seen in training")
    axes.set_ylabel("loss, nats a token")
    smooth = f"mean over the last {100 * share:g}% of the tokens so far" if share else "of each step"
    axes.set_title(f"{head}lines: training loss, {smooth}; dots: validation loss", fontsize=9, loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if in_place:
        name_lines(axes, handles)
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="log.jsonl of a run of train.py")
    parser.add_argument("--out", type=Path, default=Path("loss.png"), help="the picture")
    parser.add_argument("--smooth", type=float, default=0.05, help="share of a run's tokens so far that the training loss is a mean over; 0: each step's own")
    args = parser.parse_args()
    if Figure is None:
        parser.error("matplotlib is not installed: pip install -r experiments/requirements.txt")
    if not 0 <= args.smooth < 1:
        parser.error(f"--smooth {args.smooth} must be 0 or more, and below 1")
    runs, wrong = [], []
    for path in args.logs:
        try:
            runs.append(read(path, args.smooth))
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    if not runs:
        parser.error(wrong[0])
    for sentence in wrong:  # a run that was killed as it began does not spoil the picture of the others
        print(f"left out: {sentence}", file=sys.stderr)
    give_names(runs)
    args.out = args.out if args.out.suffix else args.out.with_suffix(".png")
    try:
        draw(runs, args.smooth, args.out)
    except (ValueError, OSError) as error:  # a name that matplotlib knows no format for, a folder that is not there
        parser.error(f"--out {args.out} cannot be written: {getattr(error, 'strerror', None) or error}")

    if len({run.args.get("tokenizer") for run in runs}) > 1:
        print("these runs have different tokenizers, so that their losses a token do not compare; bits_per_byte in the logs do", file=sys.stderr)
    print(f"written to {args.out}")
    rows = [("run", "steps", "tokens", "training loss, smoothed", "validation loss")]
    for run in runs:
        last = ([f"{x:.4f}" for x in values[-1:]] or ["-"] for values in (run.smooth, run.val_loss))
        rows.append((run.name, f"{run.steps:,}", f"{max([*run.tokens[-1:], *run.val_tokens[-1:]]):,}", *sum(last, [])))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))))


if __name__ == "__main__":
    main()
