"""
Kill -9, again and again: is anything lost, or done twice?

    python experiments/torture.py                                  50 kills, about eight minutes; writes experiments/results/torture.json
    python experiments/torture.py --kills 2 --steps 12 --shards 1 --seed 21      what the test does

Two runs of the toy model with the same arguments, on text in ten shards. One is left alone. The other is killed and resumed until
it has been killed --kills times, then runs to its end. A third of the kills falls at a random moment (start-up, training,
evaluation, saving), a third while a checkpoint is being written, a third while a shard is being tokenised (token files are
deleted before, so that there is something to tokenise). Every other time the processes beside it, which prepare the next shard, are
killed, too; else they must leave by themselves. In the end weights, moments, position in the data and log must be equal to the last bit.

Left out: a power failure (what the disk's cache loses nobody here can test), GPUs (their sums are not reproducible to the last bit).
"""

import argparse
import gzip
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from plumbing.shards import python_files  # noqa: E402

SEQ_LEN, BATCH = 64, 8
KINDS = {"checkpoint": "checkpoint.part", "any moment": "log.jsonl", "tokenising": "*.tokens.part"}  # and the files that show them


def write_shards(folder: Path, tokens: int, shards: int) -> None:
    """Python's standard library in C4's form: so many training files of a few more tokens than one pass needs, and one for validation."""
    folder.mkdir(parents=True)
    text = "".join(path.read_text(errors="replace") for path in python_files("train")[:200])
    size = tokens // shards + 1024
    for i in range(shards + 1):
        name = f"c4-train.{i:05d}-of-{shards:05d}" if i < shards else "c4-validation.00000-of-00001"
        lines = [json.dumps({"text": text[at : at + 500]}) + "\n" for at in range(i * size, (i + 1) * size, 500)]
        (folder / f"{name}.json.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def start(folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    """A new run in `folder`, or the next part of it."""
    options = ["--resume"] if list(folder.glob("run/checkpoint-*.pt")) else []
    if not options:
        options = [*f"--size toy --galore --data {folder / 'text'} --tokenizer bytes --seq_len {SEQ_LEN} --total_batch_size {BATCH} --steps {args.steps}".split(),
                   *f"--update_proj_gap 20 --eval_every 10 --eval_tokens 2048 --save_every 3 --device cpu --seed {args.seed}".split()]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, HERE.parent / "train.py", "--out_dir", folder / "run", *options], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def half_written(folder: Path, pattern: str, since: float) -> set[tuple[str, str]]:
    """Names of the files there that are being written, or were when their writer was killed, and the newest whole checkpoint before them."""
    found, newest = set(), max((file.name for file in folder.glob("run/checkpoint-*.pt")), default="none")
    for file in folder.rglob(pattern):
        with suppress(FileNotFoundError):  # it has its final name now
            if file.stat().st_mtime > since:
                found.add((file.name, newest))
    return found


def kill(folder: Path, kind: str, chance: random.Random, args: argparse.Namespace) -> list[str]:
    """Starts the run, and kills it at a moment of that kind; names of the files that were half written then."""
    if kind == "tokenising":
        for file in folder.rglob("*.tokens"):
            file.unlink()
    process, begun, seen = start(folder, args), time.time(), set()
    wanted = dict(checkpoint=1 + chance.randrange(8), tokenising=1 + chance.randrange(2)).get(kind, chance.randrange(3) > 0)  # so many such files
    while process.poll() is None and len(seen) < wanted:
        seen |= half_written(folder, KINDS[kind], begun)
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.02 if kind != "any moment" else 0.5))
    if process.poll() is not None:
        sys.exit(f"the run ended by itself, with code {process.returncode}; give it more --steps if this is its end:\n{process.communicate()[0]}")
    process.kill() if chance.random() < 0.5 else os.killpg(process.pid, signal.SIGKILL)
    process.communicate()  # comes to its end when the processes beside it, which hold the pipe, have left
    return sorted("tokens" if ".tokens" in name else name.removesuffix(".part") for name, _ in half_written(folder, "*.part", begun))


def ending(folder: Path) -> tuple[dict, list[dict]]:
    """The last checkpoint, and the log without what depends on the clock."""
    checkpoint = torch.load(max(folder.glob("run/checkpoint-*.pt")), weights_only=True)
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return checkpoint, [{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_gb", "seconds")} for line in lines[1:]]


def tensors(tree, name: str = "") -> dict:
    """Leaves of nested dicts and lists by name."""
    if isinstance(tree, (dict, list, tuple)):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in pairs for k, v in tensors(value, f"{name}/{key}").items()}
    return {name: tree}


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, help="default: 9 for each kill; with too few the run ends before it was killed often enough")
    parser.add_argument("--shards", type=int, default=10, help="of text; each is tokenised by a process of its own")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the moments")
    parser.add_argument("--json", help="where the result goes (default: experiments/results/torture.json, for the full 50 kills only)")
    args = parser.parse_args()
    args.steps = args.steps or 9 * args.kills
    chance, resumes, half, begun = random.Random(args.seed), 0, [], time.time()
    kinds = [list(KINDS)[i % 3] for i in range(args.kills)]

    with tempfile.TemporaryDirectory() as scratch:
        calm, killed = Path(scratch, "calm"), Path(scratch, "killed")
        for folder in (calm, killed):
            write_shards(folder / "text", args.steps * SEQ_LEN * BATCH, args.shards)
        other = start(calm, args)
        for i, kind in enumerate(kinds, 1):
            resumes += bool(list(killed.glob("run/checkpoint-*.pt")))
            left = kill(killed, kind, chance, args)
            half += left
            steps = max((int(file.stem.split("-")[1]) for file in killed.glob("run/checkpoint-*.pt")), default="no")
            print(f"kill {i:2d} ({kind}): {steps} steps are safe; half written: {', '.join(left) or 'nothing'}", flush=True)
        last = start(killed, args)
        for process in (last, other):
            output = process.communicate()[0]
            if process.returncode:
                sys.exit(f"a run ended with code {process.returncode}:\n{output}")
        (a, log_a), (b, log_b) = ending(calm), ending(killed)
        (a, b) = (tensors({k: v for k, v in c.items() if k not in ("args", "seal")}) for c in (a, b))
        different = [k for k in a.keys() | b.keys() if not (k in a and k in b and same(a[k], b[k]))]

    result = dict(kills=args.kills, resumes=resumes + 1, steps=args.steps, killed_in_half_written={k: half.count(k) for k in sorted(set(half))},
                  values_compared=len(a), values_different=len(different), log_lines=len(log_a), logs_equal=log_a == log_b,
                  minutes=round((time.time() - begun) / 60, 1), command=f"python experiments/torture.py --kills {args.kills} --steps {args.steps} --seed {args.seed}",
                  python=platform.python_version(), torch=torch.__version__)  # fmt: skip
    print(f"{args.kills} kills, {resumes + 1} resumes, {args.steps} steps; while these were half written: {result['killed_in_half_written']}")
    print(f"weights, moments, data position: {len(a) - len(different)} of {len(a)} values equal; log: {len(log_a)} lines, {'equal' if log_a == log_b else 'DIFFERENT'}")
    if args.json or args.kills == 50:
        Path(args.json or HERE / "results" / "torture.json").write_text(json.dumps(result, indent=1) + "\n")
    if different or log_a != log_b:
        sys.exit(f"not the same: {different[:5]}")


if __name__ == "__main__":
    main()
