"""The tokenizer of a Hugging Face folder: what data.Tokenizer needs to know of it.

    tokenizer.json          ids, the bytes of each, and how text becomes ids (package `tokenizers`)
    tokenizer_config.json, config.json, generation_config.json    which ids end a text

Two families keep every byte of a text: byte-level BPE (GPT-2, Llama 3), and SentencePiece's BPE with a token
for each byte (Llama 1 and 2, Mistral). The second puts a space before a text. That is done here, not by the
package: a large file comes in pieces, and only a document's first piece gets it.

Left out on purpose: tokenizer.model without tokenizer.json, tokenizers that change text (NFC, lower case),
chat templates.
"""
import hashlib
import json
import re
import shutil
from itertools import count
from pathlib import Path

import numpy as np

from plumbing.shards import tell

CONFIGS = ("tokenizer_config.json", "config.json", "generation_config.json")
FILES = (*CONFIGS, "tokenizer.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json",
         "vocab.json", "merges.txt", "chat_template.jinja")
# What puts a space before text: the setting of a tokenizer's step, and its value without that.
NO_PREFIX = dict(prepend="", prepend_scheme="never", add_prefix_space=False)
# Spaces, letters of one to four bytes, composed and decomposed, a ligature, a control character.
PROBE = "  Ab\té e\u0301 ﬁ 中文😀\r\n\x01 x  \n\n the end "


def token_bytes(tokenizer):
    """The bytes of each id; b"" where the ids have gaps."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder()
    byte_level, pieces = "ByteLevel" in str(tokenizer.decoder), [b""] * (1 + max(vocabulary.values()))
    beyond = count(256)    # GPT-2's letters for bytes: printable ones but space stay, else U+0100 and so on
    letters = {chr(i if i > 32 and chr(i).isprintable() else next(beyond)): i for i in range(256)}
    for token, i in vocabulary.items():
        if byte_level and i not in added:
            pieces[i] = bytes(letters[letter] for letter in token)
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            pieces[i] = bytes.fromhex(byte[1])
        else:
            pieces[i] = token.replace("▁", " ").encode()
    return pieces


def both_ends(root, tokenizer):
    """The id that begins a document, or None, and those that end a text: a document ends with the first."""
    told, *configs = (json.loads(file.read_bytes()) if file.exists() else {}
                      for file in map(root.joinpath, CONFIGS))

    def told_id(kind):
        token = told.get(kind) or ""
        return tokenizer.token_to_id(token if isinstance(token, str) else token["content"])

    one = tokenizer.encode("a")    # with what the tokenizer puts around it
    begins = told.get("add_bos_token", one.special_tokens_mask[0])
    bos = one.ids[0] if one.special_tokens_mask[0] else told_id("bos_token")
    ends = [told_id("eos_token")]
    for config in configs:
        ids = config.get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    ends = [i for i in dict.fromkeys(ends) if i is not None]
    if not ends:
        raise ValueError("its files name no end-of-text, eos_token")
    return bos if begins else None, ends


def read_folder(folder: str) -> dict:
    """The arguments of data.Tokenizer for a folder's tokenizer. ValueError if it cannot be used."""
    file = Path(folder, "tokenizer.json")
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: say --tokenizer, or let transformers write one by "
                         f"AutoTokenizer.from_pretrained({folder!r}).save_pretrained({folder!r})")
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"the tokenizer of {folder} needs the package: pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        tokenizer.no_truncation()    # many folders have one; it is not for training
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True    # "<s>" in a text is not the special token
        bos, ends = both_ends(file.parent, tokenizer)
        pieces = token_bytes(tokenizer)

        def encode(text):    # a batch of one: only that lets other threads run
            return np.array(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int64)

        def there_and_back(text):
            return b"".join(pieces[i] for i in encode(text)).decode()

        prefix = there_and_back("a").removesuffix("a")
        for steps in (tokenizer.normalizer, tokenizer.pre_tokenizer):
            for step in steps if "Sequence" in str(type(steps)) else [steps]:
                for setting, without in NO_PREFIX.items():
                    if hasattr(step, setting):
                        setattr(step, setting, without)
        if there_and_back(PROBE) != PROBE:
            raise ValueError("it changes text, so that bytes could not be counted")
    except Exception as error:    # the package raises plain Exceptions
        raise ValueError(f"{file} cannot be used ({type(error).__name__}: {error})") from None
    if bos is not None:
        pieces[bos] = b""    # it stands for no text
    stamp = hashlib.sha1(file.read_bytes() + repr((bos, ends[0])).encode()).hexdigest()[:8]
    return dict(name=f"hf-{stamp}", pieces=pieces, eot=ends[0], encode=encode, bos=bos, prefix=prefix,
                ends=ends, source=folder)


def copy_files(source, folder):
    """What a folder's tokenizer is read from, here and elsewhere."""
    folder.mkdir(exist_ok=True)
    for file in map(Path(source).joinpath, FILES):
        if file.exists():
            shutil.copyfile(file, folder / file.name)


def keep_files(tokenizer, folder: Path) -> None:
    """Keeps a copy of a folder's tokenizer in a run's `folder`: the run goes on when that folder is gone."""
    if Path(tokenizer.source).resolve() != folder.resolve():
        shutil.rmtree(folder, ignore_errors=True)    # of a start that went no further
        if "hf-" in tokenizer.name:
            copy_files(tokenizer.source, folder)


def write_folder(tokenizer, folder: Path) -> None:
    """Copies a folder's tokenizer, or has transformers convert tiktoken's. A line tells if neither can be."""
    if "hf-" in tokenizer.name:
        return copy_files(tokenizer.source, folder)
    if tokenizer.name == "bytes":
        return tell("no tokenizer files: prompt it with --tokenizer bytes. Ids are bytes, 256 is the end")
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        return tell(f"no tokenizer files for {tokenizer.name}: pip install transformers and repeat")
    from tiktoken import get_encoding
    encoding = get_encoding(tokenizer.name)
    converter = TikTokenConverter("", encoding._pat_str, extra_special_tokens=encoding._special_tokens)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks    # from memory, not from a file
    vocabulary, merges = converter.extract_vocab_merges_from_model("")    # special tokens keep their ids:
    converter.extract_vocab_merges_from_model = lambda _: (vocabulary | encoding._special_tokens, merges)
    converter.converted().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
        eos_token=tokenizer.pieces[tokenizer.eot].decode())))
