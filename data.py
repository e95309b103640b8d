"""Text to tokens to batches.

    shard (gzip json lines)  ->  documents  ->  tokens, one end-of-text after each  ->  memory-mapped file  ->  batches

    python data.py --data c4 --shards 4                   # fetch and tokenise C4's first four shards ahead of time
    python data.py --data my.jsonl --tokenizer bytes      # the same for your own text; prints tokens/s, in all and per core

A folder is read without its subfolders. Files named val, valid, validation, dev or eval are validation. If
any are named train, only they are training text, else all others are. Hidden files, test sets, licences and
readmes are not read. One line names what is read and what is not.

A shard is tokenised once, into SHARD.TOKENIZER.STAMP.tokens: nothing but ids, uint16 where the vocabulary fits, else
uint32. The stamp is taken from the source's name, size and time, so a changed source gets a new file and the old one
goes. Every file is written as NAME.part, locked by the one process that fills it, and renamed when whole: a name without
.part is never half a file, and two processes never do the same work. Batches are read in order and nothing is repeated
before the data ends. While a shard is trained on, a process of lowest priority makes the next one: a thread would fight the
training loop for Python's lock.

C4 is Hugging Face's allenai/c4, `en` (Raffel et al. 2020, arXiv 1910.10683): 1024 training and 8 validation files, in random
order; the first 1000 documents of a training file are 0.49 M GPT-2 tokens, all 356,317 of them about 173 M in 320 MB of gzip.
The paper trains on it without repetition (GaLore, arXiv 2403.03507, section 5.1).

Left out on purpose: shuffling (C4 is shuffled), packing to document borders (the paper packs across them too),
Hugging Face's `datasets`, Windows (fcntl).
"""
import argparse
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import time
import urllib.request
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from itertools import chain, islice
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

C4_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main/en/{}"
THREADS = min(os.cpu_count() or 1, 8)
JSON_LINES, TEXT = (".json", ".jsonl", ".json.gz", ".jsonl.gz"), (".txt", ".txt.gz")
# What a file in a folder is by its name. A word counts if it stands alone, not among letters or other words:
# constraints.txt and "Girl on the Train.txt" are plain text. `rest`, and what is hidden, is not read.
WORDS = re.compile(
    r"(?i)(?<![a-z])(?<![a-z] )(?:(?P<train>train)|(?P<val>val|valid|validation|dev|eval|evaluation)|"
    r"(?P<rest>test|readme|licen[cs]e|copying|copyright|notice|changelog|^\..*))(?:ing|set|data)?(?! ?[a-z])")
BAD_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)

# becomes one token file: one file of json lines, or many of text; mix: long documents whose parts are to be shuffled
Shard = namedtuple("Shard", "name files url mix", defaults=["", False])


class EndOfData(Exception):
    """The validation data is used up."""


def tell(line: str, always: bool = False):
    """One line to the user, from one process of many unless `always`, without tearing a progress bar, be it the parent's."""
    if always or os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # a terminal that is gone ends nothing
            tqdm.write("\r\033[K" * sys.stderr.isatty() + line, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """`pieces[id]`: the bytes a token stands for; `n_bytes[id]`: how many of them are source text; n_vocab: before padding."""

    def __init__(self, name: str, pieces: list[bytes], eot: int, encode):
        self.name, self.pieces, self.eot, self.encode, self.n_vocab = name, pieces, eot, encode, len(pieces)
        self.dtype = np.dtype(np.uint16 if self.n_vocab <= 1 << 16 else np.uint32)
        self.n_bytes = np.array([len(piece) for piece in pieces])
        self.n_bytes[eot] = 0

    def encode_batch(self, texts: list[str], threads: int = THREADS) -> list[np.ndarray]:
        """Ids of each text, in order. "<|endoftext|>" within a text is text like any other."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids) -> str:
        """Text of any ids; those that a padded vocabulary adds stand for nothing."""
        return b"".join(self.pieces[i] for i in map(int, ids) if i < self.n_vocab).decode(errors="replace")


def get_tokenizer(name: str) -> Tokenizer:
    """`bytes` (256 values, end-of-text = 256) or any encoding of tiktoken. ValueError if there is none or no file of it."""
    if name == "bytes":
        pieces = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]
        return Tokenizer(name, pieces, 256, lambda text: np.frombuffer(text.encode(), np.uint8))
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"there is no tokenizer {name!r}; there are: bytes, {', '.join(tiktoken.list_encoding_names())}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): load it once where there is a network, with "
                         "TIKTOKEN_CACHE_DIR=FOLDER, bring FOLDER and set it here; or use 'bytes', which needs no file") from None
    pieces = [b""] * encoding.n_vocab
    for i in range(encoding.n_vocab):
        with suppress(KeyError):  # some encodings have gaps
            pieces[i] = encoding.decode_single_token_bytes(i)
    # to_numpy: no list of Python ints, so that threads do not wait for each other
    return Tokenizer(name, pieces, encoding.eot_token, lambda text: encoding.encode_to_numpy(text, disallowed_special=()))


# ---------------------------------------------------------------------------------------------------------------------
# Shards: which there are, and the documents in them

def find_shards(data: str, split: str, data_dir: str | None, data_url: str) -> tuple[list[Shard], Path, bool]:
    """Shards of "train" or "val" in reading order, the folder for token files, and whether validation is to be cut off
    the end of the training shards because it has no file of its own. For "train" it tells which files are
    read and which are not. ValueError says what is wrong."""
    folder = Path(data_dir or "data")
    if data == "c4":
        if "{}" not in data_url:
            raise ValueError(f"data_url {data_url!r} needs a {{}} where the file's name goes")
        kind, count = ("train", 1024) if split == "train" else ("validation", 8)
        names = [f"c4-{kind}.{i:05d}-of-{count:05d}.json.gz" for i in range(count)]
        return [Shard(name, [folder / name], data_url.replace("{}", name)) for name in names], folder, False
    if data == "python":
        return [Shard(f"python-{split}", python_files(split), mix=True)], folder, False

    path = Path(data)
    try:
        if not path.exists():
            raise ValueError(f"data path {data} does not exist (other values of data: c4, python)")
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        text = [file for file in files if file.is_file() and file.name.lower().endswith(JSON_LINES + TEXT)]
        # a file that is named by itself is read, whatever its name
        tag = {file: {word.lastgroup for word in WORDS.finditer(file.name * path.is_dir())} for file in text}
        val = [file for file in text if "val" in tag[file] and "rest" not in tag[file]]
        train = [file for file in text if tag[file] == {"train"}] or [file for file in text if not tag[file]]
        for file in train + val:
            open(file, "rb").close()  # what cannot be read is told now, not when training comes to it
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not train:
        raise ValueError(f"{data} holds no training text {JSON_LINES + TEXT}; found: {named(files)}")
    if split == "train":
        tell(f"{data}: training on {named(train)}; validation on "
             f"{named(val) if val else 'the last 1% of each shard, as there is no file for it'}; "
             f"not read: {named({*files} - {*train, *val}, 20)}")
    chosen = val if split == "val" and val else train
    shards = [Shard(file.name, [file]) for file in chosen if not file.name.lower().endswith(TEXT)]
    if texts := [file for file in chosen if file.name.lower().endswith(TEXT)]:  # of one document each
        shards.append(Shard(f"{path.resolve().name}-{'val' if chosen is val else 'train'}", texts))
    beside = data_dir is None and os.access(train[0].parent, os.W_OK)
    return shards, train[0].parent if beside else folder, not val


def named(files, most: int = 6) -> str:
    """The names of `files` in order, of very many the first. Token files are not named: they are ours."""
    names = [file.name + "/" * file.is_dir() for file in sorted(files)]
    names = [name for name in names if not re.search(r"\.[0-9a-f]{12}\.tokens", name)]
    return ", ".join(names[:most] + [f"and {len(names) - most:,} more"] * (len(names) > most)) or "nothing"


def python_files(split: str) -> list[Path]:
    """This machine's standard library, without tests and tables, in the order of a hash of each file's name; by the same
    hash one file in 20 is validation."""
    root = Path(sysconfig.get_path("stdlib"))
    leave = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
    files = [f for top in root.iterdir() if top.name not in leave for f in ([top] if top.suffix == ".py" else top.rglob("*.py"))]
    files = [f for f in files if not leave.intersection(f.relative_to(root).parts)]
    digest = {f: int(hashlib.sha1(f.relative_to(root).as_posix().encode()).hexdigest(), 16) for f in files}
    if not files:
        raise ValueError(f"{root}, where Python's own source should be, holds none; give --data PATH")
    return sorted((f for f in files if (digest[f] % 20 == 0) == (split == "val")), key=digest.get)


def documents(file: Path):
    """Yields (text, whether the document ends here). Skips blank lines among json lines. ValueError with the
    line or byte of anything else that is not as it should be."""
    at, is_json = 0, file.name.lower().endswith(JSON_LINES)
    try:
        with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as f:
            if is_json:
                for at, line in enumerate(f, 1):
                    if not line.isspace():  # half a surrogate pair becomes "?"
                        yield json.loads(line)["text"].encode(errors="replace").decode(), True
            else:
                while piece := f.read(1 << 16) + f.readline():  # cut at line ends only
                    yield piece.decode().removeprefix("\ufeff" * (at == 0)), False  # no byte order mark
                    at += len(piece)
                yield "", True
    except (OSError, *BAD_GZIP) as why:
        raise ValueError(f"{file} cannot be read after {'line' if is_json else 'byte'} {at}: {why}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        place = (f'line {at}: not json with a string "text" (jq -c ".[]" makes such lines of an array)'
                 if is_json else f"byte {at + error.start}: not UTF-8 text")
        raise ValueError(f"{file}, {place}" + f": {error}" * isinstance(error, ValueError)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Files: downloaded, tokenised

def make(path: Path, write, resumable: bool = False):
    """Has `write(file)` fill `path` unless it is there. Whoever holds the lock on PATH.part writes, others wait for it;
    the lock ends with its process, however that ends. ValueError if the disk does not take it."""
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


def download(url: str, path: Path, background: bool):
    """Fetches `url`, going on where an earlier attempt ended, until length and gzip checksum are right. After trouble it
    waits (as long as the server says, up to an hour, else 1, 2, 4 ... 600 s); ValueError after 4 times without progress, in the
    background after 40 (some six hours: a night without network is survived)."""
    def write(file):
        failures = 0
        while True:
            have = before = file.seek(0, os.SEEK_END)
            try:
                request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
                with urllib.request.urlopen(request, timeout=60) as answer:
                    if answer.status != 206:  # all of it, from the start
                        have = file.truncate(0)
                    total = have + int(answer.headers["Content-Length"] or 0)
                    with tqdm(desc=path.name, initial=have, total=total, unit="B", unit_scale=True, disable=background) as bar:
                        while block := answer.read(1 << 20):
                            bar.update(file.write(block))
                have = file.seek(0, os.SEEK_END)
                if have < total:
                    raise OSError(f"connection ended at byte {have} of {total}")
                with gzip.open(file.name) as check:
                    while check.read(1 << 20):
                        pass
                return
            except (OSError, HTTPException, *BAD_GZIP) as error:
                if isinstance(error, BAD_GZIP) or getattr(error, "code", 0) == 416:  # 416: longer than the server's
                    file.truncate(0)
                failures = 1 if file.seek(0, os.SEEK_END) > before else failures + 1
                if failures >= (40 if background else 4):
                    raise ValueError(f"{url} could not be downloaded ({error}): start again to go on from {path}.part, or bring "
                                     f"{path.name} into {path.parent} by other means; --data python needs no download") from None
                wait, after = min(2 ** (failures - 1), 600), getattr(error, "headers", {}).get("Retry-After") or ""
                with suppress(ValueError):  # neither seconds nor a date
                    after = int(after) if after.isdigit() else parsedate_to_datetime(after).timestamp() - time.time() + 1
                    wait = min(max(int(after), wait // 8), 3600)  # // 8: a server's "0" must not use up the patience in a moment
                tell(f"{path.name}: {error}; trying again in {wait} s", always=True)
                time.sleep(wait)
    make(path, write, resumable=True)


def token_files(shard: Shard, tokenizer: Tokenizer, folder: Path) -> list[Path]:
    """Token files made of `shard`: none, one, or an outdated one as well."""
    return [file for file in folder.glob("*.tokens") if file.name.startswith(f"{shard.name}.{tokenizer.name}.")]


def prepare(shard: Shard, tokenizer: Tokenizer, folder: Path, background: bool = False) -> Path:
    """The token file of `shard`, downloaded and tokenised if need be. ValueError says what is wrong,
    OSError what source is gone."""
    there = token_files(shard, tokenizer, folder)
    if shard.url and not shard.files[0].exists():
        if there:
            return there[0]  # C4 does not change: tokens stay good when the download is deleted
        download(shard.url, shard.files[0], background)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in shard.files]
    path = folder / f"{shard.name}.{tokenizer.name}.{hashlib.sha1(repr(stats).encode()).hexdigest()[:12]}.tokens"
    make(path, lambda file: tokenise(shard, tokenizer, file, background))
    for old in set(there) - {path}:
        old.unlink(missing_ok=True)
    return path


def prepare_beside(shard: Shard, tokenizer_name: str, folder: Path):
    """Body of the process that runs beside training. Its errors are told and stop nothing: training comes to them when it
    needs the shard, if they are still there then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent, also with one that was killed:
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own kind outlives a process that is ended, and the user would read of it
    os.nice(19)
    with suppress(AttributeError, OSError):  # Linux has a class below that: only what nobody else wants, and nobody waits for it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        prepare(shard, get_tokenizer(tokenizer_name), folder, background=True)
    except (ValueError, OSError) as error:
        tell(f"{shard.name} could not be made ready ahead ({error}); it is tried again when training comes to it", always=True)


def tokenise(shard: Shard, tokenizer: Tokenizer, file, background: bool):
    """Writes the ids of all documents of `shard`, each with one end-of-text after it, to the binary `file`."""
    file.truncate(0)
    wall, cpu = time.perf_counter(), time.process_time()
    end = np.array([tokenizer.eot])
    pieces = chain.from_iterable(map(documents, shard.files))
    with tqdm(desc=f"tokenise {shard.name}", unit="tok", unit_scale=True, leave=False, disable=background) as bar:
        while batch := list(islice(pieces, 512)):  # never more in memory, whatever the size of the shard
            ids = tokenizer.encode_batch([text for text, _ in batch])
            ids = np.concatenate([part for array, (_, last) in zip(ids, batch) for part in (array, end[:last])])
            file.write(ids.astype(tokenizer.dtype).tobytes())
            bar.update(len(ids))
    tokens = file.seek(0, os.SEEK_END) // tokenizer.dtype.itemsize
    if not tokens:
        raise ValueError(f"{shard.files[0]} is empty: no document in it")
    if shard.mix:  # else a small batch, read in order, would be all of one file
        file.flush()
        windows = np.memmap(file.name, tokenizer.dtype, "r+", shape=(tokens // 1024, 1024))
        windows[:] = windows[np.random.default_rng(0).permutation(len(windows))]
        windows.flush()
    rates = [tokens / 1e6 / seconds for seconds in (time.perf_counter() - wall, time.process_time() - cpu)]
    tell(f"{shard.name}: {tokens:,} {tokenizer.name} tokens, {rates[0]:.2f} M/s in all, {rates[1]:.2f} M/s per core")


# ---------------------------------------------------------------------------------------------------------------------
# Batches

class Stream:
    """The tokens of `data` ("c4", "python" or a path), `split` "train" or "val", as one sequence, read in order.

    Token files go beside the text (into ./data for c4, python and folders that cannot be written) or into `data_dir`, C4's
    downloads too. keep_shards=N keeps only the N latest token files and downloads on disk (never deletes text of yours).
    `state` (of `state_dict`) opens the data where that was taken, by any number of processes with any batch, and needs no
    earlier shard. ValueError says what is wrong.

    Training starts over at the end, and says so. Validation ends: its last batch may have fewer sequences (none for the
    last processes), after it `batch` raises EndOfData; `reset()` goes back to the first token.
    `bytes_per_token`: of exactly the targets handed out so far, all processes together; loss / ln 2 / this = bits per byte.
    """

    def __init__(self, data: str, tokenizer: Tokenizer, split: str, seq_len: int, data_dir: str | None = None,
                 data_url: str = C4_URL, keep_shards: int = 0, state: dict | None = None):
        if keep_shards == 1 or keep_shards < 0:
            raise ValueError(f"keep_shards is {keep_shards}: at least 2, the shard in use and the next one, or 0 to keep all")
        self.shards, self.folder, self.held = find_shards(data, split, data_dir, data_url)
        self.tokenizer, self.split, self.seq_len, self.keep_shards, self.index = tokenizer, split, seq_len, keep_shards, None
        if state:
            return self.load_state_dict(state)
        length = text = 0  # text: bytes of the first sequence's targets. bits a byte divides by them
        for i in range(len(self.shards)):
            self._open(i)
            text += tokenizer.n_bytes[self.tokens[int(not length):seq_len + 1 - length]].sum()
            length += len(self.tokens)
            if length > seq_len:
                if not text:
                    raise ValueError(f"the {split} data of {data} begins with empty documents: take them out")
                return self.reset()
        part = " (1%, held out as there is no validation file)" if self.held and split == "val" else ""
        raise ValueError(f"the {split} data of {data} has {length} tokens{part}, too few for one sequence of {seq_len} and its last target")

    def reset(self):
        self._open(0)
        self.offset = self.epoch = self.seen = self.bytes = 0  # epoch: times gone round; seen, bytes: of the targets handed out

    def _open(self, i: int):
        """Makes shard i the current one, waiting for it if need be, and has the next one prepared meanwhile."""
        if i == self.index:
            return
        shard, following, training = self.shards[i], self.shards[(i + 1) % len(self.shards)], self.index is not None
        if training and not token_files(shard, self.tokenizer, self.folder):
            tell(f"waiting for {shard.name}: it is not downloaded and tokenised yet")
        path = prepare(shard, self.tokenizer, self.folder, background=training)
        self.tokens, self.index = np.memmap(path, self.tokenizer.dtype, "r"), i
        if self.held:
            cut = len(self.tokens) - len(self.tokens) // 100
            self.tokens = self.tokens[:cut] if self.split == "train" else self.tokens[cut:]
        if self.split == "val" or os.environ.get("LOCAL_RANK", "0") != "0":  # one process of a machine does it for all
            return
        if not token_files(following, self.tokenizer, self.folder):  # daemon: it ends with this process
            multiprocessing.get_context("spawn").Process(target=prepare_beside, args=(following, self.tokenizer.name, self.folder), daemon=True).start()
        if self.keep_shards:
            self._sweep(i)

    def _sweep(self, i: int):
        """Deletes tokens and downloads of all shards but the next one and the keep_shards - 1 before it."""
        gone = [shard for j, shard in enumerate(self.shards) if (i + 1 - j) % len(self.shards) >= self.keep_shards]
        names = tuple(f"{shard.name}.{self.tokenizer.name}." for shard in gone)
        old = [file for file in self.folder.iterdir() if file.name.startswith(names) and file.name.endswith((".tokens", ".tokens.part"))]
        for file in old + [Path(f"{shard.files[0]}{end}") for shard in gone if shard.url for end in ("", ".part")]:
            with suppress(FileNotFoundError, BlockingIOError), open(file, "r+b") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not if another run is just filling it
                file.unlink()
                tell(f"{file.name} deleted, as keep_shards is {self.keep_shards}")

    def _read(self, n: int) -> np.ndarray:
        """The next n tokens, over shard boundaries; fewer only where validation ends."""
        pieces, count = [np.empty(0, self.tokenizer.dtype)], 0
        while count < n:
            if self.offset == len(self.tokens):
                if self.index + 1 == len(self.shards):
                    if self.split == "val":
                        break
                    self.epoch += 1
                    tell(f"the data ends after {(self.seen + count) // self.epoch:,} tokens: pass {self.epoch + 1} begins, tokens repeat")
                self._open((self.index + 1) % len(self.shards))
                self.offset = 0
            piece = self.tokens[self.offset:self.offset + n - count]
            pieces.append(piece)
            self.offset += len(piece)
            count += len(piece)
        return np.concatenate(pieces).astype(np.int64)

    def batch(self, sequences: int, rank: int = 0, world: int = 1):
        """Process `rank`'s stripe of the next world * sequences sequences: x and y, int64 (sequences, seq_len), y one
        token further on. All processes move on by the same amount. EndOfData at the end of validation."""
        import torch  # here, so that fetching and tokenising start without it
        wanted, before = world * sequences * self.seq_len + 1, dict(vars(self))
        try:
            ids = self._read(wanted)
        except BaseException:  # a damaged shard, Ctrl-C while waiting for one: if it is asked again, nothing was skipped
            vars(self).update(before)
            raise
        if len(ids) == wanted:
            self.offset -= 1  # the last target is the next batch's first input
        n = (len(ids) - 1) // self.seq_len
        if n < 1:
            raise EndOfData("the validation data has ended")
        x, y = ids[:n * self.seq_len].reshape(n, -1), ids[1:n * self.seq_len + 1].reshape(n, -1)
        self.seen += y.size
        self.bytes += int(self.tokenizer.n_bytes[y].sum())
        self.bytes_per_token = self.bytes / self.seen
        mine = slice(rank * sequences, (rank + 1) * sequences)
        return torch.from_numpy(x[mine]), torch.from_numpy(y[mine])

    def state_dict(self) -> dict:
        return {"shard": self.shards[self.index].name, "shard_tokens": len(self.tokens), "tokenizer": self.tokenizer.name,
                "offset": self.offset, "epoch": self.epoch, "seen": self.seen, "bytes": self.bytes}

    def load_state_dict(self, state: dict):
        """Goes to where `state` was taken. ValueError if data or tokenizer is not what it was."""
        names = [shard.name for shard in self.shards]
        if state["tokenizer"] != self.tokenizer.name or state["shard"] not in names:
            raise ValueError(f"the checkpoint stands in shard {state['shard']} with tokenizer {state['tokenizer']}; this data with "
                             f"tokenizer {self.tokenizer.name} does not have that")
        self._open(names.index(state["shard"]))
        if len(self.tokens) != state["shard_tokens"]:
            raise ValueError(f"shard {state['shard']} has {len(self.tokens)} tokens, it had {state['shard_tokens']} at the checkpoint")
        self.offset, self.epoch, self.seen, self.bytes = (state[key] for key in ("offset", "epoch", "seen", "bytes"))


open_data = Stream  # reads better where it is called


def main():
    parser = argparse.ArgumentParser(description="Fetch and tokenise data ahead of training.")
    parser.add_argument("--data", default="c4", help="c4, python, or a file or folder of json lines or text")
    parser.add_argument("--tokenizer", default="gpt2", help="any encoding of tiktoken, or bytes")
    parser.add_argument("--data_dir", help="where downloads and token files go (default: beside the text, or ./data)")
    parser.add_argument("--data_url", default=C4_URL, help="where C4's files are, with {} for the name")
    parser.add_argument("--shards", type=int, default=1, help="how many training shards; the first validation shard comes with them")
    args = parser.parse_args()
    try:
        if args.shards < 1:
            raise ValueError(f"--shards is {args.shards}: at least 1")
        # a wrong path is told before anything is fetched
        found = [find_shards(args.data, split, args.data_dir, args.data_url) for split in ("train", "val")]
        tokenizer = get_tokenizer(args.tokenizer)
        for (shards, folder, _), count in zip(found, (args.shards, 1)):
            for shard in shards[:count]:
                path = prepare(shard, tokenizer, folder)
                print(f"{path}: {path.stat().st_size // tokenizer.dtype.itemsize:,} tokens")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
