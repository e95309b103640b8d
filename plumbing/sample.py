"""The command line of model.py: goes on with a text, or exports; from a run or from a Hugging Face folder.

Left out on purpose: chats, several prompts at once.
"""
import argparse
import codecs
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from data import get_tokenizer
from model import Config, Llama
from plumbing import hf
from plumbing.files import checkpoints, read_checkpoint, when_told_to_end, within
from plumbing.shards import tell


def read(source, name):
    """Model and tokenizer of a run or a folder. `name`: of a tokenizer, for a folder that has none."""
    folder = Path(source)
    run = read_checkpoint(folder) if checkpoints(folder) else None
    if not run and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no checkpoint-STEP.pt, as runs do, and no config.json")
    if name and (run or (folder / "tokenizer.json").exists()):
        raise ValueError(f"{source} has a tokenizer of its own: leave --tokenizer out")
    if run:
        kept = folder / "tokenizer"
        tokenizer = get_tokenizer(str(kept) if kept.exists() else run["args"]["tokenizer"])
        model = hf.assemble(Llama, Config(**run["config"]), hf.wide(run["model"]), source)
    else:
        tokenizer = get_tokenizer(name or os.path.join(".", source))    # ./gpt2 is a folder, gpt2 an encoding
        model = Llama.from_pretrained(folder)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"the tokenizer {tokenizer.name} has {tokenizer.n_vocab:,} ids, and the model in "
                         f"{source} only {model.config.vocab_size:,}")
    return model, tokenizer


def go_on(model, tokenizer, text: str, tokens: int, temperature: float, top_k: int | None, seed: int) -> int:
    """Prints text and how it goes on, token by token, up to an end-of-text. Returns how many tokens came."""
    device = model.lm_head.weight.device
    start = torch.tensor(tokenizer.document(text)[None], device=device)
    draw = torch.Generator(device).manual_seed(seed)
    utf8, count = codecs.getincrementaldecoder("utf-8")("replace"), 0    # a letter may be several tokens
    print(text, end="", flush=True)
    with suppress(KeyboardInterrupt):
        for token in map(int, model.generate(start, tokens, temperature, top_k, draw)):
            if token in tokenizer.ends:
                break
            piece = tokenizer.pieces[token] if token < tokenizer.n_vocab else b""    # of a padded vocabulary
            print(utf8.decode(piece), end="", flush=True)
            count += 1
    print(utf8.decode(b"", final=True))
    return count


def main():
    parser = argparse.ArgumentParser(
        usage="python model.py RUN (--prompt TEXT | --export DIR) [options]   (--help explains them)",
        allow_abbrev=False)
    gpu = torch.accelerator.current_accelerator(check_available=True)
    there = [gpu.type, "cpu"] if gpu else ["cpu"]
    add = parser.add_argument
    add("source", metavar="RUN", help="a folder of train.py, or of Hugging Face's form")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="goes on with it")
    what.add_argument("--export", metavar="DIR", help="a folder to make, that transformers opens")
    add("--tokenizer", help="if RUN has none")
    drawn = [add("--tokens", type=within(1), default=200, help="at most so many (default: 200)"),
             add("--temperature", type=within(0.0), default=0.8, help="0: the likeliest (default: 0.8)"),
             add("--top_k", type=within(1), help="sample among the k likeliest tokens"),
             add("--seed", type=within(0, 2**63 - 1), default=torch.seed(), help="for the same text again"),
             add("--device", choices=there, default=there[0], help=f"default: {there[0]}")]
    args = parser.parse_args()
    when_told_to_end(signal.default_int_handler)    # nothing half written stays
    try:
        if args.export:
            for option in drawn:
                if getattr(args, option.dest) != option.default:
                    raise ValueError(f"--{option.dest} has no effect with --export: leave it out")
            hf.empty(args.export)    # now, not after minutes of reading
        elif not args.prompt:
            raise ValueError("--prompt and --export cannot be empty")
        model, tokenizer = read(args.source, args.tokenizer)
        if args.prompt:
            model.to(args.device)
            begun = time.perf_counter()
            count = go_on(model, tokenizer, args.prompt, args.tokens, args.temperature, args.top_k, args.seed)
            tell(f"{count} tokens, {count / (time.perf_counter() - begun):.1f} tokens/s")
        else:
            hf.save(model, args.export, tokenizer)
            tell(f"{args.export}: {model.num_parameters():,} parameters, {model.lm_head.weight.dtype}")
    except BrokenPipeError:    # `| head`
        sys.stdout = open(os.devnull, "w")
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).split("\n")[0])
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
