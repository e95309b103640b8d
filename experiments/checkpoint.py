"""
What do saving and reading a checkpoint take beside the model and the optimiser's state? And how long?

    python experiments/checkpoint.py            1B, rank 512, 8-bit state: two minutes, 5 GB; writes experiments/results/checkpoint.json
    python experiments/checkpoint.py --quick    60M, seconds

Called are the functions of a run: train.prepare and plumbing/files.py's save, then its read_checkpoint and the two load_state_dict, as train.train does
it, each of the two in a process of its own. All weights and states are filled with random numbers before they are saved: no page is shared, or zero.
While it goes on, a thread reads the process's resident anonymous memory every millisecond (what malloc gave; not the pages of files that are
mapped or cached, which the system takes back when it needs them). A copy of a tensor that matters takes longer than that. Compared are
    held    bytes of all tensors of the weights and the optimiser's state
    peak    the highest reading, less that before the model was built
    rise    peak - held: what saving or reading takes in addition
malloc is told to give every block of 64 KB and more back at once (MALLOC_MMAP_THRESHOLD_, glibc's): else what it keeps of blocks that were freed
while the model was built would count as taken, and a copy that fits into them would not be seen. A few MB of the rise are libraries
that load parts of themselves when first used.

Linux only: the reading is RssAnon of /proc/self/status.
Left out: GPUs (there each tensor passes through the host's memory), disks (the seconds of saving are this disk's, flushed; the file is read back
from the system's cache).
"""

import argparse
import json
import os
import platform
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from memory import settled  # noqa: E402
from model import Llama  # noqa: E402
from plumbing.files import checkpoints, read_checkpoint  # noqa: E402
from plumbing.files import save as files_save  # noqa: E402
from speed import cpu, show  # noqa: E402

HERE = Path(__file__).parent


def resident() -> int:
    """Bytes of this process's anonymous memory that are in RAM."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) * 1024


def available() -> float:
    """GB of memory that this machine can give."""
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("MemAvailable")) * 1024 / 1e9


class Watch:
    """While it is entered, a thread looks at the resident memory: `peak`, bytes; `seconds`."""

    def look(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, resident())

    def __enter__(self):
        self.peak, self.done, self.thread, self.start = resident(), threading.Event(), threading.Thread(target=self.look), time.perf_counter()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, resident())


def build(args: argparse.Namespace, config) -> tuple:
    model = Llama(config, "cpu", torch.bfloat16)
    return model, train.prepare(model, args)


def nbytes(model, opt) -> tuple[int, int]:
    """Of the weights, and of the optimiser's state."""
    tensors = (x for state in opt.state.values() for x in state.values() if torch.is_tensor(x))
    return sum(p.nbytes for p in model.parameters()), sum(x.nbytes for x in tensors)


def row(what: str, watch: Watch, before: int, model, opt, folder: Path) -> dict:
    weights, state = nbytes(model, opt)
    peak = watch.peak - before
    return {"what": what, "weights": weights, "state": state, "held": weights + state, "peak": peak, "afterwards": resident() - before,
            "rise": peak - weights - state, "rise / weights": (peak - weights - state) / weights, "seconds": watch.seconds,
            "file": checkpoints(folder)[-1].stat().st_size}  # fmt: skip


def save(options: str, folder: Path) -> dict:
    args, config = settled(options)
    before = resident()
    model, opt = build(args, config)
    for p in opt.group:
        for x in filter(torch.is_tensor, opt.init(p).values()):
            x.random_() if x.dtype == torch.uint8 else x.normal_()
    with Watch() as watch:
        done = files_save(folder, 1, model=model.state_dict(), optimizer=opt.state_dict(), step=1, data={}, skipped=0, scores={}, log_lines=1,
                          config=asdict(config), args=train.kept(args))  # fmt: skip
    if not done:
        sys.exit("nothing was measured")  # it has said why
    return row("save", watch, before, model, opt, folder)


def read(options: str, folder: Path) -> dict:
    """The order of train.py: the file is opened, the model built, then filled."""
    args, config = settled(options)
    before = resident()
    with Watch() as watch:
        checkpoint = read_checkpoint(folder)
        built = time.perf_counter()
        model, opt = build(args, config)
        built = time.perf_counter() - built
        model.load_state_dict(checkpoint["model"])
        opt.load_state_dict(checkpoint["optimizer"])
    watch.seconds -= built
    return row("read", watch, before, model, opt, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--size", choices=[size for size in train.SIZES if size != "toy"], default="1b", help="of the model, with its recipe's rank")
    parser.add_argument("--quick", action="store_true", help="the 60m model: too small for its percent to mean much")
    parser.add_argument("--dir", type=Path, help="where the checkpoint is written, to be deleted again (default: the system's folder for such files)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "checkpoint.json", help="where the figures go")
    args = parser.parse_args()
    if args.quick:
        args.size, args.out = "60m", args.out.with_name("checkpoint-quick.json")
    options = f"--size {args.size} --galore --state_bits 8 --vocab_size 32000 --dtype bfloat16 --batch_size 1 --total_batch_size 1"
    its, config = settled(options)
    if not Path("/proc/self/status").exists():
        parser.error("memory is read as Linux shows it, in /proc, which this system lacks")
    if args.dir and not args.dir.is_dir():
        parser.error(f"--dir {args.dir} is no folder")
    table = train.plan(its, config, 1)(0)
    need, free = table["weights"] + table["state"], 0.5 * available()
    if need > free:
        parser.error(f"--size {args.size} holds {need:.1f} GB, and half of the free memory is {free:.1f} GB: take a smaller one")

    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for the two processes, as they start
    conditions = {"command": " ".join(["python experiments/checkpoint.py", *sys.argv[1:]]), "options of train.py": options, "rank": its.rank, "unit": "bytes",
                  "MALLOC_MMAP_THRESHOLD_": 65536, "threads": torch.get_num_threads(), "cpu": cpu(), "load before": os.getloadavg()[0],
                  "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
    rows = []
    with TemporaryDirectory(dir=args.dir) as folder:
        room = shutil.disk_usage(folder).free / 1e9
        if need > room:
            parser.error(f"{Path(folder).parent} has {room:.1f} GB left and the checkpoint takes {need:.1f}: name a folder on another disk by --dir")
        for half in save, read:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                rows.append(process.submit(half, options, Path(folder)).result())
    unit, size = ("GB", 1e9) if need > 1 else ("MB", 1e6)
    shown = [{k: x if k in ("what", "seconds") else f"{100 * x:.1f}%" if "/" in k else f"{x / size:.3f}" for k, x in row.items()} for row in rows]
    show(f"{args.size}, rank {its.rank}, 8-bit state, bf16; {unit}", shown)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"conditions": conditions, "halves": rows}, indent=1) + "\n")
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
