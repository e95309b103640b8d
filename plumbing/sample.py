"""The command line of model.py: goes on with a text, or exports; from a run or from a Hugging Face folder.

The weights of a run stay on the disk until they are used: an export has one file's in memory at a time.

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

from data import Tokenizer, get_tokenizer
from model import Config, Llama
from plumbing import hf
from plumbing.files import checkpoints, read_checkpoint, within
from plumbing.shards import tell


def read(source: str, name: str | None) -> tuple[Llama, Tokenizer]:
    """Model and tokenizer of a run or a folder. `name`: a tokenizer for a folder that has none, or for a run
    whose tokenizer has moved. ValueError if they do not go together."""
    folder, own = Path(source), os.path.join(".", source)    # ./gpt2 is a folder, gpt2 an encoding
    run = read_checkpoint(folder) if checkpoints(folder) else None
    if run:
        kept = folder / "tokenizer"
        tokenizer = get_tokenizer(name or (str(kept) if kept.exists() else run["args"]["tokenizer"]))
        trained = run["data"]["tokenizer"]
        stored, dtype = run["model"], run["model"]["lm_head.weight"].dtype
        weights = {name: hf.wide(stored, name, dtype) for name in stored if not name.endswith("weight_scale")}
        model = hf.assemble(Llama, Config(**run["config"]), weights, source)
    elif (folder / "config.json").exists():
        tokenizer, twice = get_tokenizer(name or own), name and (folder / "tokenizer.json").exists()
        trained = get_tokenizer(own).name if twice else tokenizer.name
        model = hf.load(Llama, folder, None)
    else:
        raise ValueError(f"{source} holds no checkpoint-STEP.pt, as a run does, and no config.json")
    if tokenizer.name != trained:
        raise ValueError(f"{source} was trained with tokenizer {trained}, not with {tokenizer.name}")
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"the tokenizer {tokenizer.name} has {tokenizer.n_vocab:,} ids, and the model in "
                         f"{source} only {model.config.vocab_size:,}")
    return model, tokenizer


def prompt(model: Llama, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Prints --prompt and how it goes on, up to an end-of-text; then tokens/s."""
    if not len(tokenizer.encode(args.prompt)):
        raise ValueError("--prompt is empty: at least one token is needed")
    device = torch.device(args.device)
    tokens = torch.tensor([tokenizer.document(args.prompt).tolist()], device=device)
    draw = torch.Generator(device)
    draw.seed() if args.seed is None else draw.manual_seed(args.seed)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")    # a letter may be several tokens
    begun, count, text = time.perf_counter(), 0, args.prompt
    with suppress(KeyboardInterrupt):
        for new in model.to(device).stream(tokens, args.tokens, args.temperature, args.top_k, draw):
            if (token := int(new)) in tokenizer.ends:
                break
            text += utf8.decode(tokenizer.pieces[token] if token < tokenizer.n_vocab else b"")
            print(text, end="", flush=True)
            count, text = count + 1, ""
    print(text + utf8.decode(b"", final=True))
    tell(f"{count} tokens, {count / (time.perf_counter() - begun):.1f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python model.py RUN (--prompt TEXT | --export DIR) [options]   (--help explains them)",
        description="Go on with a text, or export.", allow_abbrev=False)
    add, there = parser.add_argument, ["cpu"]
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + there
    add("source", metavar="RUN", help="a folder of train.py, or of Hugging Face's form")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="goes on with it")
    what.add_argument("--export", metavar="DIR", help="a folder to make, that transformers opens")
    add("--tokenizer", help="if RUN has none")
    options = dict(tokens=200, temperature=0.8, top_k=None, seed=None, device=there[0])
    add("--tokens", type=within(1), help="at most so many (default: 200)")
    add("--temperature", type=within(0.0), help="0: always the likeliest token (default: 0.8)")
    add("--top_k", type=within(1), help="sample among the k likeliest tokens")
    add("--seed", type=within(0, 2**63 - 1), help="gives the same text each time")
    add("--device", choices=there, help=f"of those there are (default: {there[0]})")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):    # as Ctrl-C: nothing half written stays
        signal.signal(number, signal.default_int_handler)
    try:
        typed = {key: value for key, value in vars(args).items() if key in options and value is not None}
        if args.export is not None:
            if typed:
                raise ValueError(f"--{next(iter(typed))} has no effect with --export: leave it out")
            hf.refuse_what_is_there(args.export)
        model, tokenizer = read(args.source, args.tokenizer)
        if args.export is None:
            return prompt(model, tokenizer, argparse.Namespace(prompt=args.prompt, **options | typed))
        hf.save(model, args.export, tokenizer)
        tell(f"{args.export}: {model.num_parameters():,} parameters, {model.lm_head.weight.dtype}")
    except BrokenPipeError:    # `| head`
        sys.stdout = open(os.devnull, "w")
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).split("\n")[0])
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
