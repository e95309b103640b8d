"""The tokenizer of a Hugging Face folder: what data.Tokenizer needs to know of it.

    tokenizer.json          ids, the bytes of each, and how text becomes ids (package `tokenizers`)
    tokenizer_config.json   whether a document begins with a token of its own, and the names of both ends
    config.json, generation_config.json   the ids of both ends, where those two do not tell

Two families keep every byte of a text: byte-level BPE (GPT-2, Llama 3), and SentencePiece's BPE with a token
for each byte (Llama 1 and 2, Mistral). The second puts a space before a text. That is done here, not by the
package: a large file comes in pieces, and only a document's first piece gets it.

Left out on purpose: tokenizer.model without tokenizer.json, tokenizers that change text (NFC, lower case),
chat templates. "<s>" in a text is text, like any other.
"""
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from plumbing.shards import tell

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
         "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")

# Spaces, letters of one to four bytes, composed and decomposed, a ligature, a control character.
PROBE = "  Ab\té e\u0301 ﬁ 中文😀\r\n\x01 x  \n\n the end "


def byte_letters() -> dict[str, int]:
    """GPT-2's spelling of bytes as letters: printable ones stand for themselves, others from U+0100 on."""
    letters = {chr(i): i for i in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    rest = [i for i in range(256) if chr(i) not in letters]
    return letters | {chr(256 + n): i for n, i in enumerate(rest)}


def token_bytes(vocabulary: dict[str, int], added: dict[int, str], byte_level: bool) -> list[bytes]:
    """The bytes of each id; b"" where the ids have gaps."""
    letters, pieces = byte_letters(), [b""] * (1 + max([*vocabulary.values(), *added]))
    for token, i in vocabulary.items():
        if not byte_level and (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)):
            pieces[i] = bytes.fromhex(byte[1])
        elif i in added:
            pieces[i] = added[i].encode()
        elif byte_level:
            pieces[i] = bytes(letters[letter] for letter in token)
        else:
            pieces[i] = token.replace("▁", " ").encode()
    return pieces


def take_prefix(raw: dict) -> str:
    """Takes out of tokenizer.json what puts a space before text. Returns that space, or ""."""
    norms = raw.get("normalizer") or dict(type="Sequence", normalizers=[])
    norms = norms.get("normalizers", [norms])
    kept = [norm for norm in norms if norm["type"] != "Prepend"]
    raw["normalizer"] = dict(type="Sequence", normalizers=kept) if kept else None
    found, before = len(kept) < len(norms), raw.get("pre_tokenizer") or {}
    for part in before.get("pretokenizers", [before]):
        if part.get("type") in ("ByteLevel", "Metaspace"):
            found |= part.get("add_prefix_space", True) and part.get("prepend_scheme") != "never"
            part["add_prefix_space"] = False
            part |= dict(prepend_scheme="never") if part["type"] == "Metaspace" else {}
    return " " * found


def both_ends(root: Path, whole, n_vocab: int) -> tuple[int | None, int, list[int]]:
    """The id that begins a document or None, the one that ends it, and all that end a generated text."""
    files = [root / name for name in ("tokenizer_config.json", "config.json", "generation_config.json")]
    told, *configs = (json.loads(file.read_bytes()) if file.exists() else {} for file in files)

    def ids(kind: str) -> list[int]:
        token, found = told.get(f"{kind}_token"), [config.get(f"{kind}_token_id") for config in configs]
        found.insert(0, token and whole.token_to_id(token["content"] if isinstance(token, dict) else token))
        flat = [i for some in found for i in (some if isinstance(some, list) else [some])]
        return [i for i in dict.fromkeys(flat) if isinstance(i, int) and i < n_vocab]

    one = whole.encode("a")    # with what the post-processor puts around it
    edge = [i for i, special in zip(one.ids, one.special_tokens_mask) if special]
    front = edge[:1] if one.special_tokens_mask[0] else []
    back = edge[-1:] if one.special_tokens_mask[-1] else []
    begins, ends = told.get("add_bos_token"), told.get("add_eos_token")
    bos = [] if begins is False else front or (ids("bos") if begins else [])
    ends = list(dict.fromkeys(([] if ends is False else back) + ids("eos")))
    if not ends:
        raise ValueError("its files name no end-of-text, eos_token")
    return bos[0] if bos and bos[0] != ends[0] else None, ends[0], ends


def read_folder(folder: str) -> dict:
    """The arguments of data.Tokenizer for a folder's tokenizer. ValueError if it cannot be used."""
    root = Path(folder)
    file = root / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: say --tokenizer, or let transformers write one by "
                         f"AutoTokenizer.from_pretrained({folder!r}).save_pretrained({folder!r})")
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"the tokenizer of {folder} needs the package: pip install tokenizers") from None
    try:
        raw = json.loads(file.read_bytes()) | dict(truncation=None, padding=None)
        raw["model"].pop("dropout", None)
        whole = tokenizers.Tokenizer.from_str(json.dumps(raw))
        prefix, byte_level = take_prefix(raw), "ByteLevel" in json.dumps(raw.get("decoder"))
        bare = tokenizers.Tokenizer.from_str(json.dumps(raw))
        bare.encode_special_tokens = True    # "<s>" in a text is not the special token
        added = {i: token.content for i, token in whole.get_added_tokens_decoder().items()}
        pieces = token_bytes(whole.get_vocab(), added, byte_level)
        bos, eot, ends = both_ends(root, whole, len(pieces))

        def encode(text: str) -> np.ndarray:    # a batch of one: only that lets other threads run
            return np.array(bare.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int64)

        if b"".join(pieces[i] for i in encode(PROBE)) != PROBE.encode():
            raise ValueError("it changes text, so that bytes could not be counted")
    except Exception as error:    # the package raises plain Exceptions
        raise ValueError(f"{file} cannot be used ({type(error).__name__}: {error})") from None
    if bos is not None:
        pieces[bos] = b""    # it stands for no text
    stamp = hashlib.sha1(file.read_bytes() + repr((bos, eot)).encode()).hexdigest()[:8]
    return dict(name=f"hf-{stamp}", pieces=pieces, eot=eot, encode=encode, bos=bos, prefix=prefix,
                ends=ends, source=folder)


def keep_files(tokenizer, folder: Path) -> None:
    """Copies what a folder's tokenizer is read from: a run goes on when the folder is gone."""
    source, part = Path(tokenizer.source), folder.with_suffix(".part")
    if os.environ.get("RANK", "0") != "0" or source == folder or not source.is_dir():
        return
    for there in (part, folder):    # of a start that went no further
        shutil.rmtree(there, ignore_errors=True)
    part.mkdir(parents=True)
    for name in (*FILES, "config.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, part / name)
    part.rename(folder)    # whole, or not there


def write_folder(tokenizer, part: Path, config: dict) -> dict[str, dict]:
    """Copies a folder's tokenizer to `part`, or has transformers convert tiktoken's: returns its .json files
    by name. One line tells if there are none."""
    if tokenizer.name == "bytes":
        tell("no tokenizer files: with --tokenizer bytes the ids are a text's bytes in UTF-8, 256 its end")
        return {}
    if Path(tokenizer.source).is_dir():
        for file in filter(Path.exists, map(Path(tokenizer.source).joinpath, FILES)):
            shutil.copyfile(file, part / file.name)
        return {}
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        tell(f"no tokenizer files for {tokenizer.name}: to have them, pip install transformers and repeat")
        return {}
    from tiktoken import get_encoding
    encoding = get_encoding(tokenizer.name)
    converter = TikTokenConverter("", encoding._pat_str, extra_special_tokens=encoding._special_tokens)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks    # from memory, not from a file
    vocabulary, merges = converter.extract_vocab_merges_from_model("")    # special tokens keep their ids:
    converter.extract_vocab_merges_from_model = lambda _: (vocabulary | encoding._special_tokens, merges)
    return {"tokenizer.json": json.loads(converter.converted().to_str()), "tokenizer_config.json": dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token=tokenizer.pieces[tokenizer.eot].decode(),
        clean_up_tokenization_spaces=False, model_max_length=config["max_position_embeddings"])}
