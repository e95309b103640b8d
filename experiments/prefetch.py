"""
What does the process that makes the next shard ready cost the training that it runs beside?

    python experiments/prefetch.py --data TEXT.jsonl.gz      half an hour; writes experiments/results/prefetch.json
    python experiments/prefetch.py                           the same on Python's own source, where there is no other text
    python experiments/prefetch.py --quick                   the toy, for seconds: does it run at all?

train.py's own training step (GaLore on the 60M model; random tokens, as their values change nothing) takes turns: a step alone, with the
child process of data.py stopped by SIGSTOP, and one while the child goes on tokenising; which comes first changes. The child is the real
one, plumbing/shards.py's, on an endless shard (the text over and over). The loss is the median, over the pairs, of their ratio of times,
with a 95% interval by bootstrap; so what else the machine does hits both alike, and pairs in which other programs took more than 5% of a core
are left out (Linux; both figures are given). "Nothing" compares steps alone with steps alone, from the same turns: the noise.

The child works only for a while: 173 M tokens, a shard of C4. So the loss of the whole run is the loss beside the child times the share of the time that
training takes for those tokens in which the child still tokenises the next ones. What is left out: downloading, which waits for the network more than it computes.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from model import Llama  # noqa: E402
from plumbing import shards  # noqa: E402

SHARD = 173e6  # GPT-2 tokens of a file of C4


def busy(pid: int | None = None) -> float:
    """Seconds of CPU time that a process has taken so far, or everything on the machine. 0 where there is no /proc."""
    try:
        if pid:
            ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        else:
            user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
            ticks = user, nice, system, *interrupts
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


def like_c4(file: Path, text: Path | None) -> Path:
    """The text, or Python's own source, as json lines of documents of about C4's length."""
    with gzip.open(file, "wt", compresslevel=1) as f:
        for whole, *_ in data.documents(text) if text else ((source.read_text(errors="replace"),) for source in shards.python_files("train")):
            f.writelines(json.dumps({"text": whole[i : i + 2200]}) + "\n" for i in range(0, len(whole), 2200))
    return file


def median(ratios: list[float]) -> dict:
    """With its 95% interval and the quartiles."""
    draws = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(1000))
    quarters = statistics.quantiles(ratios, n=4)
    return {"pairs": len(ratios), "loss": 1 - statistics.median(ratios), "loss, 95%": [1 - draws[975], 1 - draws[25]], "loss, quartiles": [1 - quarters[2], 1 - quarters[0]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, help="json lines of text, gzip or not (default: Python's own source)")
    parser.add_argument("--tokenizer", default="gpt2", help="what the child tokenises with")
    parser.add_argument("--size", default="60m")
    parser.add_argument("--batch_size", type=int, default=2, help="sequences of 256 tokens in a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prefetch.json")
    args = parser.parse_args()
    if args.quick:
        args.out = args.out.with_name("prefetch-quick.json")
        args.size, args.batch_size, args.minutes, args.tokenizer = "toy", 1, 0.1, "bytes"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    options, config, _ = train.settle(f"--size {args.size} --galore --seq_len 256 --tokenizer gpt2 --device {args.device} --batch_size {args.batch_size} "
                                      f"--total_batch_size {args.batch_size}".split())  # fmt: skip
    train.fit(options, config, train.plan)
    model = Llama(config, options.device, getattr(torch, options.dtype))
    opt, tokens = train.prepare(model, options), args.batch_size * 256
    tokenizer = data.get_tokenizer(args.tokenizer)

    def step() -> float:
        ids = torch.randint(50257, (args.batch_size, 257))
        start = time.perf_counter()
        float(train.training_step(model, opt, iter([(ids[:, :-1], ids[:, 1:])]), 1))  # float: waits for a GPU
        return time.perf_counter() - start

    conditions = {"command": " ".join(["python experiments/prefetch.py", *(a if a.startswith("-") else Path(a).name for a in sys.argv[1:])]),
                  "text": args.data.name if args.data else "Python's own source", "tokenizer": args.tokenizer, "size": args.size, "dtype": options.dtype,
                  "tokens a step": tokens, "threads": args.threads, "cores": os.cpu_count(), "machine": f"{platform.system()} {platform.release()}, {platform.machine()}",
                  "gpu": torch.cuda.get_device_name() if "cuda" in args.device else None, "python": platform.python_version(), "torch": torch.__version__,
                  "tiktoken": data.tiktoken.__version__, "load before": os.getloadavg()[0]}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        text = like_c4(Path(folder, "text.jsonl.gz"), args.data)
        shards.Shard("endless", [text] * 1000, Path(folder), tokenizer).prefetch()
        (child,) = multiprocessing.active_children()

        def made() -> int:
            return sum(file.stat().st_size for file in Path(folder).glob("*.part")) // tokenizer.dtype.itemsize

        while not made():  # it imports, and reads the tokenizer's file
            time.sleep(0.1)
            assert child.is_alive()
        start, before = time.perf_counter(), made()
        time.sleep(1 if args.quick else 10)
        alone = (made() - before) / (time.perf_counter() - start)
        os.kill(child.pid, signal.SIGSTOP)
        for _ in range(2 if args.quick else 6):
            step()

        begun, rows, done, worked = time.perf_counter(), [], made(), busy(child.pid)
        while len(rows) < 4 or time.perf_counter() - begun < 60 * args.minutes:
            marks, times = (busy(), busy(child.pid), busy(os.getpid()), time.perf_counter()), {}
            for kind in random.sample(("alone", "nothing", "child"), 3):
                if kind == "child":
                    os.kill(child.pid, signal.SIGCONT)
                times[kind] = step()
                os.kill(child.pid, signal.SIGSTOP)
            everything, of_child, own, wall = (b - a for a, b in zip(marks, (busy(), busy(child.pid), busy(os.getpid()), time.perf_counter())))
            rows.append(times | {"others": (everything - of_child - own) / wall})
        done, worked, beside = max(1, made() - done), busy(child.pid) - worked, sum(row["child"] for row in rows)
        os.kill(child.pid, signal.SIGCONT)
        child.kill()
        child.join()

    quiet = [row for row in rows if row["others"] < 0.05]
    results = {name: {kind: median([row["alone"] / row[kind] for row in chosen]) for kind in ("child", "nothing")}
               for name, chosen in (("all", rows), ("quiet", quiet)) if len(chosen) > 3}  # fmt: skip
    chosen, best = (quiet, results["quiet"]) if "quiet" in results else (rows, results["all"])
    speed = {kind: tokens / statistics.median(row[kind] for row in chosen) for kind in ("alone", "child")}
    share = min(1, speed["child"] / (done / beside))  # of the time, as both have the same tokens to do
    results |= {"tokens/s without": speed["alone"], "tokens/s with": speed["child"], "child, tokens/s alone": alone, "child, tokens/s beside training": done / beside,
                "child, cores": worked / beside, "share of the time": share, "loss over a shard": best["child"]["loss"] * share}  # fmt: skip
    conditions["load after"] = os.getloadavg()[0]

    print(*(f"{key}: {value}" for key, value in conditions.items()), sep="\n")
    for name in ("all", "quiet"):
        for kind, m in results.get(name, {}).items():
            print(f"{name:<6}{kind:<8} {m['pairs']:4} pairs: loss {m['loss']:7.2%}   95% {m['loss, 95%'][0]:7.2%} to {m['loss, 95%'][1]:7.2%}   quartiles {m['loss, quartiles'][0]:7.2%} to {m['loss, quartiles'][1]:7.2%}")
    print(f"training: {speed['alone']:,.0f} tokens/s without the child, {speed['child']:,.0f} with it; a shard of {SHARD / 1e6:.0f} M tokens takes {SHARD / speed['child'] / 3600:,.1f} h")
    print(f"the child: {done / beside:,.0f} tokens/s beside it on {worked / beside:.3f} cores ({alone:,.0f} alone); a shard takes {SHARD / (done / beside) / 3600:,.2f} h, {share:.2%} of the time")
    print(f"loss over a shard: {results['loss over a shard']:.4%}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
