"""The shards of a data set: which there are, and how their token files come to be.

    server  --download-->  SHARD  --tokenise-->  SHARD.TOKENIZER.STAMP.tokens  -->  data.py

Of a folder, files named val, valid, validation, dev or eval are validation. If any are named train, only
they are training text, else all others are. Subfolders, hidden files, test sets, licences and readmes are
not read.

The stamp is of the source's name, size and time: a changed source gets a new token file. Every file is
written as NAME.part, locked by its writer, and renamed when whole: none is half a file, and no work is done
twice. A process of lowest priority makes the next shard: a thread would hold Python's lock.

Left out on purpose: Hugging Face's `datasets`, Windows (fcntl).
"""
import fcntl
import glob
import gzip
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
import zlib
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

JSON_LINES, TEXT = (".json", ".jsonl", ".json.gz", ".jsonl.gz"), (".txt", ".txt.gz")
# A word counts if it stands alone: constraints.txt and "Girl on the Train.txt" are plain text.
WORDS = re.compile(
    r"(?i)(?<![a-z])(?<![a-z] )(?:(?P<train>train)|(?P<val>val|valid|validation|dev|eval|evaluation)|"
    r"(?P<rest>test|readme|licen[cs]e|copying|copyright|notice|changelog|^\..*))(?:ing|set|data)?(?! ?[a-z])")
BAD_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # torchrun sets them


def tell(line: str, always: bool = False):
    """One line to the user, of one process of many unless `always`. It tears no progress bar."""
    if always or not RANK:
        with suppress(OSError, AttributeError):  # a terminal that is gone, or never was, ends nothing
            tqdm.write("\r\033[K" * sys.stderr.isatty() + line, file=sys.stderr)


def find_shards(data: str, tokenizer, data_dir: str | None, data_url: str, say: bool = False):
    """Shards in reading order, two lists: for training, and for validation if it has files of its own. `say`
    tells what is read, in one line. ValueError says what is wrong."""
    folder = Path(data_dir or "data")
    if data == "c4":
        if "{}" not in data_url:
            raise ValueError(f"data_url {data_url!r} needs a {{}} where the file's name goes")
        return [[Shard(name := f"c4-{kind}.{i:05d}-of-{count:05d}.json.gz", [folder / name], folder,
                       tokenizer, data_url.replace("{}", name)) for i in range(count)]
                for kind, count in (("train", 1024), ("validation", 8))]
    if data == "python":
        return [[Shard(f"python-{split}", python_files(split), folder, tokenizer, mix=True)]
                for split in ("train", "val")]
    train, val, rest = sort_files(Path(data))
    if say:
        held = "the last 1% of each shard, as there is no file for it"
        tell(f"{data}: training on {named(train)}; validation on {named(val) if val else held}; "
             f"not read: {named(rest)}")
    if data_dir is None and os.access(train[0].parent, os.W_OK):
        folder = train[0].parent

    def shards(split, files):
        texts = [file for file in files if file.name.lower().endswith(TEXT)]
        alone = [Shard(file.name, [file], folder, tokenizer) for file in sorted({*files} - {*texts})]
        # texts are one shard, each a document
        return alone + [Shard(f"{Path(data).resolve().name}-{split}", texts, folder, tokenizer)] * bool(texts)

    return shards("train", train), shards("val", val)


def sort_files(path):
    """Files for training, for validation, and not read. A file named by itself is for training."""
    if not path.exists():
        raise ValueError(f"data path {path} does not exist (other values of data: c4, python)")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    texts = [file for file in files if file.is_file() and file.name.lower().endswith(JSON_LINES + TEXT)]
    words = {file: {word.lastgroup for word in WORDS.finditer(file.name) if file != path} for file in texts}
    val = [file for file in texts if "val" in words[file] and "rest" not in words[file]]
    train = ([file for file in texts if words[file] == {"train"}] or
             [file for file in texts if not words[file]])
    if not train:
        raise ValueError(f"{path} holds no training text {JSON_LINES + TEXT}; found: {named(files)}")
    return train, val, sorted({*files} - {*train, *val})


def named(files):
    """The names of `files`, of many the first. Token files are ours, and not named."""
    names = [file.name + "/" * file.is_dir() for file in files if file.suffix != ".tokens"]
    more = [f"and {len(names) - 8:,} more"] * (len(names) > 8)
    return ", ".join(names[:8] + more) or "nothing"


def python_files(split: str) -> list[Path]:
    """This machine's standard library, without tests and tables, in the order of a hash of each file's name.
    By the same hash one file in 20 is validation."""
    root, numbers = Path(os.__file__).parent, {}
    leave = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo",
             "encodings", "pydoc_data"}
    for folder, subfolders, _ in os.walk(root):
        subfolders[:] = set(subfolders) - leave
        for file in Path(folder).glob("*.py"):
            name = file.relative_to(root).as_posix()
            numbers[int(hashlib.sha1(name.encode()).hexdigest(), 16)] = file
    return [numbers[i] for i in sorted(numbers) if (i % 20 == 0) == (split == "val")]


@dataclass
class Shard:
    """What becomes one token file: a file of json lines, or many of text."""
    name: str
    files: list[Path]
    folder: Path  # of the token file
    tokenizer: object  # data.Tokenizer
    url: str = ""  # where files[0] comes from, if it is not there
    mix: bool = False  # long documents, whose parts are to be shuffled

    def token_files(self):
        """Those there are: none, one, or an outdated one as well."""
        return [*self.folder.glob(f"{glob.escape(self.name)}.{self.tokenizer.name}.*.tokens")]

    def prepare(self, background: bool = False) -> Path:
        """The token file, made if need be. ValueError says what is wrong, OSError what source is gone."""
        there = self.token_files()
        if self.url and not self.files[0].exists():
            if there:
                return there[0]  # C4 does not change: tokens stay good when the download is deleted
            make(self.files[0], lambda file: download(self.url, file, background), resumable=True)
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        stamp = hashlib.sha1(repr(stats).encode()).hexdigest()[:12]
        path = self.folder / f"{self.name}.{self.tokenizer.name}.{stamp}.tokens"
        make(path, lambda file: self.tokenizer.tokenise(self, file, background))
        for old in set(there) - {path}:
            old.unlink(missing_ok=True)
        return path

    def drop(self, keep: int):
        """Deletes token files and download. Who still reads one keeps it until then."""
        for file in self.token_files() + self.files * bool(self.url):
            with suppress(FileNotFoundError):
                file.unlink()
                tell(f"{file.name} deleted, as keep_shards is {keep}")

    def prefetch(self):
        """Starts the process that prepares this shard beside training."""
        multiprocessing.get_context("spawn").Process(target=self.prepare_beside, daemon=True).start()

    def prepare_beside(self):
        """Body of that process. Its errors are told and stop nothing: training comes to them in its time."""
        parent = multiprocessing.parent_process()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent, even a killed one
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        tqdm.set_lock(threading.RLock())  # tqdm's own would outlive it, and Python complain
        os.nice(19)
        with suppress(AttributeError, OSError):  # Linux has a class below that: only what nobody else wants
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        try:
            self.prepare(background=True)
        except (ValueError, OSError) as error:
            tell(f"the next shard could not be made ready ahead ({error}); it is tried again later",
                 always=True)


def make(path: Path, write, resumable: bool = False):
    """Has `write(file)` fill `path` unless it is there. Who locks PATH.part writes, others wait. A lock ends
    with its process. ValueError if the disk does not take the file."""
    part = Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not path.exists():
            with open(part, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if path.exists():  # another process made it while this one waited
                    part.unlink(missing_ok=True)
                elif os.fstat(file.fileno()).st_nlink:  # 0: another gave up and removed it
                    try:
                        write(file)
                        file.flush()
                        os.fsync(file.fileno())
                        part.rename(path)
                    except BaseException:
                        if not resumable:
                            part.unlink(missing_ok=True)
                        raise
    except OSError as error:
        raise ValueError(f"{path} could not be made: {error} (--data_dir names another folder)") from None


def download(url: str, file, background: bool):
    """Appends to `file` what it lacks of `url`. After trouble it waits 1, 2, 4 ... 600 s, or up to an hour if
    the server says so. ValueError after 4 attempts without progress, in the background 40: six hours."""
    part, failures = Path(file.name), 0
    while True:
        have = file.seek(0, os.SEEK_END)
        try:
            return fetch(url, file, have, background)
        except (OSError, HTTPException, *BAD_GZIP) as error:
            if isinstance(error, BAD_GZIP) or getattr(error, "code", 0) == 416:
                file.truncate(0)  # 416: it is longer than the server's
            failures = 1 if file.seek(0, os.SEEK_END) > have else failures + 1
            if failures >= (40 if background else 4):
                raise ValueError(f"{url} could not be downloaded ({error}): start again to go on from "
                                 f"{part}, or bring {part.stem} into {part.parent} by other means; "
                                 "--data python needs no download") from None
            wait = min(2 ** (failures - 1), 600)
            with suppress(AttributeError, TypeError, ValueError):  # no such header, or a date
                wait = max(wait, min(int(error.headers["Retry-After"]), 3600))
            tell(f"{part.stem}: {error}; trying again in {wait} s", always=True)
            time.sleep(wait)


def fetch(url, file, have, background):
    """One attempt of `download` from byte `have` on. An error if length or gzip checksum are wrong then."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.status != 206:  # all of it, from the start
            have = file.truncate(0)
        total = have + int(answer.headers["Content-Length"] or 0)
        with tqdm.wrapattr(file, "write", desc=Path(file.name).stem, initial=have, total=total,
                           disable=background) as counted:
            shutil.copyfileobj(answer, counted, 1 << 20)
    if (have := file.seek(0, os.SEEK_END)) < total:
        raise OSError(f"connection ended at byte {have} of {total}")
    with gzip.open(file.name) as check:
        while check.read(1 << 20):
            pass
