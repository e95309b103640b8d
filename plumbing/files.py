"""What a run leaves on disk, what its processes agree on, and how it is stopped.

    OUT_DIR/checkpoint-STEP.pt   weights, optimiser, arguments, place in the data; sealed
    OUT_DIR/log.jsonl            all arguments and versions, then a line per step

A checkpoint is written beside its name and renamed: a kill at any moment leaves a whole one. Its seal is a
checksum of all but the values of tensors, for which the file has its own.

Left out on purpose: Windows (fcntl), checkpoints in several files.
"""
import argparse
import fcntl
import json
import os
import resource
import signal
import sys
import time
import zlib
from contextlib import suppress
from datetime import timedelta
from functools import cache
from itertools import count, islice
from pathlib import Path
from zipfile import ZipFile

import torch
import torch.distributed as dist

from plumbing.shards import RANK, tell


# ----- checkpoints ------------------------------------------------------------------------------------------

def save(folder: Path, keep: int, **what) -> bool:
    """The first process writes checkpoint-STEP.pt and deletes all but the `keep` newest. False, and a line to
    the user, if the disk does not take it."""
    if RANK:
        return True
    part = folder / "checkpoint.part"  # always this name: what a kill leaves is overwritten by the next
    try:
        with open(part, "wb") as file:
            torch.save(what | dict(seal=seal(what)), file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / f"checkpoint-{what['step']:08d}.pt")
        for old in checkpoints(folder)[:-keep]:
            old.unlink()
        return True
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the first into the second
        with suppress(OSError):
            part.unlink()
        tell(f"step {what['step']}: the checkpoint could not be written ({error.__context__ or error}); "
             "older ones stay, the next save tries again")
        return False


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first. A checkpoint-best.pt is the user's own."""
    return sorted(folder.glob("checkpoint-" + 8 * "[0-9]" + ".pt"))


def seal(what: dict) -> int:
    text = json.dumps(what, default=lambda tensor: f"{tensor.dtype} {tensor.shape}")
    return zlib.crc32(text.encode())


def read_checkpoint(folder: Path) -> dict:
    """The newest one; its tensors stay on disk until they are used. ValueError if there is no whole one."""
    *older, path = checkpoints(folder) or [None]
    if path is None:
        raise ValueError(f"{folder} holds no checkpoint-STEP.pt to resume from: start anew in another "
                         "--out_dir")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if ZipFile(path).testzip() or checkpoint.pop("seal") != seal(checkpoint):
            raise ValueError
        return checkpoint
    except Exception as error:  # a cut file raises anything from EOFError to RuntimeError
        instead = f"delete it to go on from {older[-1].name}" if older else "take another --out_dir"
        raise ValueError(f"{path} cannot be used ({type(error).__name__}): it was cut short or changed, or "
                         f"is no checkpoint of this version; {instead}") from None


# ----- the folder and its log -------------------------------------------------------------------------------

def holds_a_run(folder: Path) -> bool:
    """More than the first line of a log, which is all that a run leaves before its first checkpoint."""
    log = folder / "log.jsonl"
    return bool(checkpoints(folder)) or log.exists() and log.read_bytes().count(b"\n") > 1


def free_folder(name: str) -> str:
    """name, or name-2, name-3, ...: the first that holds no run."""
    return next(path for i in count(1) if not holds_a_run(Path(path := name + f"-{i}" * (i > 1))))


class Log:
    """log.jsonl, of the first process. It keeps other runs out of the folder: ValueError if one is in. kept:
    so many lines of an earlier log stay, those of before its checkpoint. lines, size in bytes: of it now."""

    def __init__(self, folder: Path, kept: int):
        self.path, self.waiting, self.lines = folder / "log.jsonl", "", 0
        if RANK:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {folder}: wait for its end, "
                             "or take another --out_dir") from None
        except OSError:  # a file system without locks
            pass
        with open(self.path, "a+b") as file:
            file.seek(0)
            lines = [line for line in islice(file, kept) if line.endswith(b"\n")]
            self.lines, self.size = len(lines), file.truncate(sum(map(len, lines)))

    def write(self, line: dict | None = None) -> bool:
        """Is everything on disk, with this line? Without one it writes what waits."""
        if RANK:
            return True
        told = self.waiting or not line
        if line:
            # JSON has no NaN
            self.waiting += json.dumps(json.loads(json.dumps(line), parse_constant=lambda _: None)) + "\n"
            self.lines += 1  # here wandb.log(line, step=line["step"]); in __init__, once locked, wandb.init()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                end = file.truncate(min(self.size, file.tell()))  # without what a full disk cut short
                file.write(self.waiting.encode())
            self.size, self.waiting = end + len(self.waiting), ""
        except OSError as error:
            if not told:
                tell(f"{self.path} could not be written ({error}): its lines wait in memory, and checkpoints "
                     "are not written, until they can be")
        return not self.waiting

    def close(self):
        if not RANK:
            os.close(self.lock)


# ----- several processes, and the end -----------------------------------------------------------------------

def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@cache
def hosts() -> dist.ProcessGroup:
    """All processes, patient with one that waits for data. That one has died is noticed at once."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def over_all(value: float, how=dist.ReduceOp.MAX) -> float:
    """The highest value of all processes, or their sum. It goes from host to host: no GPU waits for it."""
    if dist.is_initialized():
        dist.all_reduce(value := torch.tensor(value, dtype=torch.float64), how, group=hosts())
    return float(value)


class Stop(Exception):
    """In all processes at once, between two steps: one was asked to end, or cannot go on."""


def when_told_to_end(handler):
    """Ctrl-C, SIGTERM and a closed terminal call it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants SIGHUP
            signal.signal(number, handler)


class Brake:
    """Ends a run between two steps, or at once while it is `idle`: starting, or waiting for data.
    asked: when it was told to. problem: a sentence, or ""."""

    def __init__(self):
        self.asked, self.problem, self.code, self.idle = 0.0, "", 2, True
        when_told_to_end(self.ask)

    def ask(self, number, frame):
        if not self.asked:
            self.asked = time.monotonic()
            if self.idle:
                raise KeyboardInterrupt
        elif time.monotonic() > self.asked + 2:  # a second one ends it at once, but not torchrun's echo
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def fetch(self, read):
        """What read() returns, in all processes; or Stop, in all of them."""
        try:
            self.idle = True
            if not self.asked:
                result = read()
        except KeyboardInterrupt:  # from `ask`
            pass
        except (ValueError, OSError) as error:
            self.problem = str(error)
        finally:
            self.idle = False
        if over_all(bool(self.asked or self.problem)):
            raise Stop
        return result


class Forgiving:
    """Standard error. A terminal that is gone, or a full disk behind it, ends nothing."""

    def __init__(self, file):
        self.file = file or open(os.devnull, "w")

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)


def within(least, most=1e38):
    """A type for argparse: a number from `least` to `most`, whole if `least` is."""
    def number(word):
        value = type(least)(word)
        if not least <= value <= most:
            most_said = f", at most {most:g}" * (most < 1e38)
            raise argparse.ArgumentTypeError(f"{word} must be at least {least:g}{most_said}")
        return value

    number.__name__ = type(least).__name__  # argparse says "invalid int value"
    return number


def most_memory() -> int:
    """Bytes at the fullest moment so far: of tensors on a GPU, or of the whole process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
