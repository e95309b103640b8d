"""Text to tokens to batches.

    shard (gzip json lines)  ->  documents  ->  tokens, one end-of-text after each  ->  batches

    python data.py --data c4 --shards 4               # fetch and tokenise C4's first four shards ahead
    python data.py --data my.jsonl --tokenizer bytes  # your own text; prints tokens/s, in all and per core

A data set is a list of shards: C4's files, your files of json lines, all text files of a folder as one. Of
each plumbing/shards.py keeps a token file: nothing but ids, uint16 or uint32, mapped into memory. Stream puts
them end to end and cuts batches from that, in order.

C4 is Hugging Face's allenai/c4, `en` (Raffel et al. 2020, arXiv 1910.10683): 1024 training and 8 validation
files in random order. A training file has 356,317 documents: 320 MB of gzip, about 173 M GPT-2 tokens. The
paper trains on it without repetition (GaLore, arXiv 2403.03507, section 5.1).

Left out on purpose: shuffling (C4 is shuffled), packing to document borders (the paper packs across them).
"""
import argparse
import gzip
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from plumbing.shards import BAD_GZIP, JSON_LINES, LOCAL_RANK, Shard, find_shards, tell
from plumbing.tokenizer import read_folder

C4_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main/en/{}"
THREADS = min(os.cpu_count(), 8)


class EndOfData(Exception):
    """The validation data is used up."""


class Tokenizer:
    """A document is [bos,] encode(prefix + text), eot. `encode`: an array of ids, "<|endoftext|>" being text
    like any other. `pieces[id]`: a token's bytes. `n_bytes[id]`: how many of them are source text; eot's
    takes the prefix off again. n_vocab: before padding. `ends`: all ids that end a generated text."""

    def __init__(self, name, pieces, eot, encode, bos=None, prefix="", ends=None, source=None):
        self.name, self.pieces, self.eot, self.encode, self.bos = name, pieces, eot, encode, bos
        self.prefix, self.ends, self.source, self.n_vocab = prefix, ends or [eot], source or name, len(pieces)
        self.dtype = np.dtype(np.uint16 if self.n_vocab <= 1 << 16 else np.uint32)
        self.n_bytes = np.array([*map(len, pieces)])
        self.n_bytes[eot] = -len(prefix)

    def __reduce__(self):  # to another process it goes by its name
        return get_tokenizer, (self.source,)

    def document(self, text: str, begins: bool = True, ends: bool = False) -> np.ndarray:
        """The ids of a piece of a document. A prompt is one that begins and does not end."""
        text = text.encode(errors="replace").decode()  # half a surrogate pair becomes "?"
        front = [self.bos] * (begins and self.bos is not None)
        parts = front, self.encode(self.prefix * begins + text), [self.eot] * ends
        return np.concatenate(parts, dtype=np.int64, casting="unsafe")  # an empty list is float64

    def decode(self, ids) -> str:
        """Text of any ids. Those that a padded vocabulary adds stand for nothing."""
        text = b"".join(self.pieces[i] for i in map(int, ids) if i < self.n_vocab).decode(errors="replace")
        return text.removeprefix(self.prefix)

    def tokenise(self, shard: Shard, file, background: bool):
        """Writes the ids of all documents of `shard` to `file`."""
        file.truncate(0)
        wall, cpu = time.perf_counter(), time.process_time()
        pieces = (piece for source in shard.files for piece in documents(source))
        bar = tqdm(desc=f"tokenise {shard.name}", unit="tok", unit_scale=True, leave=False,
                   disable=background)
        with bar, ThreadPoolExecutor(THREADS) as pool:
            while batch := list(islice(pieces, 512)):  # never more in memory
                ids = np.concatenate([*pool.map(self.document, *zip(*batch))])
                file.write(ids.astype(self.dtype))
                bar.update(len(ids))
        tokens = file.seek(0, os.SEEK_END) // self.dtype.itemsize
        if not tokens:
            raise ValueError(f"{shard.files[0]} is empty: no document in it")
        if shard.mix:  # else a small batch, read in order, would be all of one file
            windows = np.memmap(file.name, self.dtype, "r+", shape=(tokens // 1024, 1024))
            windows[:] = windows[np.random.default_rng(0).permutation(len(windows))]
            windows.flush()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        tell(f"{shard.name}: {tokens:,} {self.name} tokens, {tokens / 1e6 / wall:.2f} M/s in all, "
             f"{tokens / 1e6 / cpu:.2f} M/s per core")


def get_tokenizer(name: str) -> Tokenizer:
    """`bytes` (256 values, end-of-text = 256), any encoding of tiktoken, or the tokenizer of a Hugging Face
    folder. ValueError if it cannot be had."""
    if name == "bytes":
        pieces = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]
        return Tokenizer(name, pieces, 256, lambda text: np.frombuffer(text.encode(), np.uint8))
    there = tiktoken.list_encoding_names()
    if name not in there:
        if Path(name).is_dir():
            return Tokenizer(**read_folder(name))
        raise ValueError(f"there is no tokenizer {name!r}; there are: bytes, {', '.join(there)}, or a folder")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): load it once "
                         "where there is a network, with TIKTOKEN_CACHE_DIR=FOLDER, bring FOLDER and set it "
                         "here; or use 'bytes', which needs no file") from None
    pieces = [b""] * encoding.n_vocab
    for i in range(encoding.n_vocab):
        with suppress(KeyError):  # some encodings have gaps
            pieces[i] = encoding.decode_single_token_bytes(i)
    # to_numpy: no list of Python ints, so that threads do not wait for each other
    return Tokenizer(name, pieces, encoding.eot_token,
                     lambda text: encoding.encode_to_numpy(text, disallowed_special=()))


def documents(file: Path):
    """Yields (text, whether a document begins with it, whether it ends), but no blank line among json lines.
    ValueError with the line or byte of what is not as it should be."""
    at, is_json = 0, file.name.lower().endswith(JSON_LINES)
    try:
        with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as lines:
            if is_json:
                for at, line in enumerate(lines, 1):
                    if not line.isspace():
                        yield "" + json.loads(line)["text"], True, True  # "" +: it must be a string
            else:
                while piece := lines.read(1 << 16) + lines.readline():  # cut at line ends only
                    yield piece.decode().removeprefix("\ufeff" * (at == 0)), at == 0, False  # no order mark
                    at += len(piece)
                yield "", at == 0, True
    except (OSError, *BAD_GZIP) as why:
        raise ValueError(f"{file} cannot be read after {'line' if is_json else 'byte'} {at}: {why}") from None
    except (ValueError, LookupError, TypeError) as error:
        place = (f'line {at}: not json with a string "text" (jq -c ".[]" makes such lines of an array)'
                 if is_json else f"byte {at + error.start}: not UTF-8 text")
        raise ValueError(f"{file}, {place}" + f": {error}" * isinstance(error, ValueError)) from None


class Stream:
    """The tokens of `data` ("c4", "python" or a path), `split` "train" or "val", as one sequence.

    Token files go beside the text, or into `data_dir`, C4's downloads too. For c4, python and folders that
    cannot be written it is ./data by default. keep_shards=N keeps only the N latest on disk, never deleting
    text of yours. `state` (of `state_dict`) opens the data where that was taken, for any number of processes
    with any batch, and needs no earlier shard. ValueError says what is wrong.

    Training starts over at the end, and says so. Validation ends: its last batch may have fewer sequences,
    none for the last processes. Then `batch` raises EndOfData, and `reset()` goes back to the first token.
    bytes_per_token: of exactly the targets so far, of all processes. Bits per byte: loss / ln 2 / that.
    """

    def __init__(self, data: str, tokenizer: Tokenizer, split: str, seq_len: int, data_dir: str | None = None,
                 data_url: str = C4_URL, keep_shards: int = 0, state: dict | None = None):
        if keep_shards == 1 or keep_shards < 0:
            raise ValueError(f"keep_shards is {keep_shards}: at least 2, the shard in use and the next one, "
                             "or 0 to keep all")
        train, val = find_shards(data, tokenizer, data_dir, data_url, say=split == "train")
        self.shards, self.held = val if split == "val" and val else train, not val
        self.tokenizer, self.split, self.seq_len, self.keep_shards = tokenizer, split, seq_len, keep_shards
        self.index = None
        if state:
            names = [shard.name for shard in self.shards]
            if state["tokenizer"] != tokenizer.name or state["shard"] not in names:
                raise ValueError(f"the checkpoint stands in shard {state['shard']}, of tokenizer "
                                 f"{state['tokenizer']}, which {data} with {tokenizer.name} does not have")
            self._open(names.index(state["shard"]))
            if len(self.tokens) != state["shard_tokens"]:
                raise ValueError(f"shard {state['shard']} has {len(self.tokens)} tokens, it had "
                                 f"{state['shard_tokens']} at the checkpoint")
            vars(self).update({name: state[name] for name in ("offset", "epoch", "seen", "bytes")})
            return
        self.reset()
        first = self._read(seq_len + 1, around=False)
        if len(first) <= seq_len:
            part = " (1%, held out as there is no validation file)" if self.held and split == "val" else ""
            raise ValueError(f"the {split} data of {data} has {len(first)} tokens{part}, too few for one "
                             f"sequence of {seq_len} and its last target")
        if tokenizer.n_bytes[first[1:]].sum() <= 0:  # bits per byte divide by them
            raise ValueError(f"the {split} data of {data} begins with empty documents: take them out")
        self.reset()

    def reset(self):
        self._open(0)
        self.offset = self.epoch = self.seen = self.bytes = 0  # epoch: times round; bytes: of targets

    def _open(self, i):
        """Makes shard i the current one, made first if need be, and has the next one prepared."""
        if i == self.index:
            return
        count, training = len(self.shards), self.index is not None
        shard, following = self.shards[i], self.shards[(i + 1) % count]
        if training and not shard.token_files():
            tell(f"waiting for {shard.name}: it is not downloaded and tokenised yet")
        tokens = np.memmap(shard.prepare(background=training), self.tokenizer.dtype, "r")
        cut = len(tokens) - len(tokens) // 100
        if self.held:
            tokens = tokens[:cut] if self.split == "train" else tokens[cut:]
        self.tokens, self.index = tokens, i
        if self.split == "val" or LOCAL_RANK:
            return  # one process of a machine does it for all
        if not following.token_files():
            following.prefetch()
        for j, shard in enumerate(self.shards):  # the next one and the keep_shards - 1 before it stay
            if 0 < self.keep_shards <= (i + 1 - j) % count:
                shard.drop(self.keep_shards)

    def _read(self, n, around):
        """The next n tokens, over shard boundaries. Fewer at the end, unless it goes `around`."""
        ids = np.empty(0, np.int64)
        while len(ids) < n:
            if self.offset == len(self.tokens):
                if self.index + 1 == len(self.shards):
                    if not around:
                        break
                    self.epoch += 1
                    tell(f"the data ends after {(self.seen + len(ids)) // self.epoch:,} tokens: "
                         f"pass {self.epoch + 1} begins, tokens repeat")
                self._open((self.index + 1) % len(self.shards))
                self.offset = 0
            more = self.tokens[self.offset : self.offset + n - len(ids)]
            self.offset += len(more)
            ids = np.append(ids, more)
        return ids

    def batch(self, sequences: int, rank: int = 0, world: int = 1):
        """Process `rank`'s stripe of the next world * sequences sequences: x, and y one token on, both int64
        (sequences, seq_len). All processes move on as far. EndOfData at the end of validation."""
        import torch  # here, so that fetching and tokenising start without it

        wanted, before = world * sequences * self.seq_len + 1, dict(vars(self))
        try:
            ids = self._read(wanted, around=self.split == "train")
        except BaseException:  # a damaged shard, Ctrl-C while waiting: asked again, nothing is skipped
            vars(self).update(before)
            raise
        if len(ids) == wanted:
            self.offset -= 1  # the last target is the next batch's first input
        if len(ids) <= self.seq_len:
            raise EndOfData("the validation data has ended")
        pairs = torch.from_numpy(ids).unfold(0, self.seq_len + 1, self.seq_len)  # they overlap by a token
        x, y = pairs[:, :-1], pairs[:, 1:]
        self.seen += y.numel()
        self.bytes += int(self.tokenizer.n_bytes[y].sum())
        self.bytes_per_token = self.bytes / self.seen
        mine = slice(rank * sequences, (rank + 1) * sequences)
        return x[mine], y[mine]

    def state_dict(self) -> dict:
        return {"tokenizer": self.tokenizer.name, "shard": self.shards[self.index].name,
                "shard_tokens": len(self.tokens), "offset": self.offset, "epoch": self.epoch,
                "seen": self.seen, "bytes": self.bytes}


def main():
    parser = argparse.ArgumentParser(description="Fetch and tokenise data ahead of training.")
    parser.add_argument("--data", default="c4", help="c4, python, or a file or folder of json lines or text")
    parser.add_argument("--tokenizer", default="gpt2", help="bytes, an encoding of tiktoken, or a folder")
    parser.add_argument("--data_dir", help="for downloads, token files (default: beside the text, or ./data)")
    parser.add_argument("--data_url", default=C4_URL, help="where C4's files are, with {} for the name")
    parser.add_argument("--shards", type=int, default=1, help="for training; one for validation comes too")
    args = parser.parse_args()
    try:
        if args.shards < 1:
            raise ValueError(f"--shards is {args.shards}: at least 1")
        tokenizer = get_tokenizer(args.tokenizer)
        train, val = find_shards(args.data, tokenizer, args.data_dir, args.data_url, say=True)
        for shard in train[: args.shards] + val[:1]:
            path = shard.prepare()
            print(f"{path}: {path.stat().st_size // tokenizer.dtype.itemsize:,} tokens")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
