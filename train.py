"""Pre-train a LLaMA, with GaLore or without.

    python train.py --size toy --data python --galore --rank 64           # two minutes on a CPU, no download
    python train.py --size 60m --galore --rank 128 --data DIR             # C4's shards in DIR, or your own text
    python train.py --size 7b --galore --rank 1024                        # C4 as it goes; one 24 GB GPU
    python train.py --size 7b --galore --rank 1024 --plan                 # what that takes, without taking it
    torchrun --nproc_per_node=2 train.py --size 1b --galore --rank 512    # exchanges rank-r gradients

Without --galore the same loop is full-rank AdamW, and with --state_bits 8, 8-bit Adam. What is not typed comes
from the paper's recipe for the size (GaLore, arXiv 2403.03507, table 5 and section 5). `--size 7b --help` shows
7b's values.

A run lives in --out_dir: log.jsonl and checkpoint-STEP.pt (plumbing/files.py). Ctrl-C, SIGTERM and a closed
terminal save and leave. --resume --out_dir DIR goes on from the newest checkpoint, with the run's arguments and
any number of processes. The losses are the same: bit for bit on a CPU with as many processes.

Left out on purpose: mixed precision (weights, gradients and activations have one dtype, as in the paper), early
stopping, sweeps, trackers.
"""
import argparse
import math
import os
import platform
import resource
import sys
import time
from argparse import BooleanOptionalAction as switch
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

# Both must stand before torch is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # no gaps in a full GPU
if "OMP_WAIT_POLICY" not in os.environ:  # on a busy CPU a spinning thread holds up the one it waits for
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import C4_URL, EndOfData, get_tokenizer, open_data
from galore import GaLoreAdamW, param_groups, thin
from model import CHUNK_LOGITS, SIZES, Config, Llama
from plumbing import memory
from plumbing.files import (LOCAL_RANK, RANK, Brake, Log, Stop, checkpoints, highest, holds_a_run, hosts,
                            read_checkpoint, save, seal, world, writable)
from plumbing.hf import read_config

# The paper's tables 2 and 5, for 7B section 5.2; 512 sequences of 256 are its batch. muon: measured at toy size.
PAPER = dict(data="c4", tokenizer="gpt2", seq_len=256, total_batch_size=512, steps=10_000, update_proj_gap=200,
             state_bits=32, eval_tokens=10_000_000, lr=dict(adam=0.01, muon=0.02, full=0.001))
LARGE = dict(adam=0.01, muon=0.02, full=0.0005)
RECIPES = {  # a size that is not here has the paper's common values, and a quarter of its width as rank
    "toy": dict(data="python", tokenizer="bytes", seq_len=128, total_batch_size=8, steps=600, rank=64,
                update_proj_gap=50, eval_tokens=65_536, lr=dict(adam=0.005, muon=0.02, full=0.001)),
    "60m": dict(rank=128),
    "130m": dict(steps=20_000, rank=256),
    "350m": dict(steps=60_000, rank=256),
    "1b": dict(steps=100_000, rank=512, lr=LARGE),
    "3b": dict(steps=120_000, rank=640, lr=LARGE),
    "7b": dict(steps=150_000, rank=1024, update_proj_gap=500, state_bits=8,
               lr=dict(adam=0.005, muon=0.01, full=0.0005)),
    "mobilellm-125m": dict(steps=20_000, rank=128),
    "mobilellm-350m": dict(steps=60_000, rank=256),
    "init": dict(steps=1000, rank=128),  # --init, whatever its shape
}
FIXED = ("init", "size", "vocab_size", "tokenizer", "seq_len", "galore", "rank", "direction", "exact",
         "state_bits", "dtype", "seed")  # cannot change on --resume
PER_START = ("resume", "out_dir", "plan", "device")  # not taken over from a checkpoint
PATIENCE = 20  # steps in a row whose gradients are not finite, before a run stops
CARD = 0.97 * (23.64 * 2**30 - 5e8) / 1e9  # GB of an RTX 4090, as torch shows it; half a GB is CUDA's own
N_VOCAB = {"gpt2": 50257, "bytes": 257}  # so that --plan needs no download


# ----- the command line -------------------------------------------------------------------------------------

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number(kind, least: float, most: float = math.inf, above: bool = False):
    """A type for argparse: finite, from `least`, or `above` it, to `most`."""
    def read(word):
        value = kind(word)
        if not least <= value <= most or value == math.inf or above and value == least:
            to = f" and at most {most}" if most < math.inf else " and finite"
            raise argparse.ArgumentTypeError(f"{word} must be {'above' if above else 'at least'} {least:g}{to}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid float value"
    return read


def text(word: str) -> str:
    if not word:
        raise argparse.ArgumentTypeError("is empty: give it at least one letter")
    word.encode()  # raises now what it would raise after the last step
    return word


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, allow_abbrev=False, add_help=False,
        usage="python train.py [options]   (--help explains them)")
    add, count, rate = parser.add_argument, number(int, 1), number(float, 0, above=True)
    # model
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--size", choices=SIZES, help="of the model, started from random weights")
    one.add_argument("--init", metavar="DIR", help="a Hugging Face LLaMA folder to start from")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights, gradients and activations")
    # data
    add("--data", help="c4, python (this machine's library), or a file or folder of json lines or text")
    add("--data_dir", help="for downloads and token files (default: beside the text, or ./data)")
    add("--data_url", help="where C4's files are, with {} for the name")
    add("--keep_shards", type=number(int, 0), help="keep only so many shards on disk; 0: all")
    add("--tokenizer", help="an encoding of tiktoken, or bytes")
    add("--vocab_size", type=count, help="default: the tokenizer's, rounded up to a multiple of 64")
    add("--seq_len", type=count, help="tokens per sequence")
    # optimiser
    add("--galore", action=switch, help="GaLore; without it, full-rank AdamW")
    add("--rank", type=count, help="r")
    add("--update_proj_gap", type=count, help="T, steps between refreshes of the subspace")
    add("--galore_scale", type=rate, help="alpha")
    add("--direction", choices=("adam", "muon"), help="whose step is taken in the subspace")
    add("--exact", action=switch, help="the paper to the letter: SVD, moments not rotated; not layer-wise")
    add("--state_bits", type=int, choices=(32, 8), help="of Adam's moments; with 8, of P, too")
    add("--layerwise", action=switch, help="move each weight during the backward pass, form no full gradient")
    add("--lr", type=rate, help="peak learning rate")
    add("--warmup_steps", type=number(int, 0), help="of linear warm-up")
    add("--min_lr_ratio", type=number(float, 0, 1), help="the cosine ends at this share of --lr")
    add("--weight_decay", type=number(float, 0), help="decoupled, of all but norms")
    add("--grad_clipping", type=number(float, 0), help="most of the projected gradients' norm; 0: no clipping")
    # length and batch
    add("--steps", type=count, help="of the whole run")
    add("--total_batch_size", type=count, help="sequences per step, over micro-batches and processes")
    add("--batch_size", type=count, help="sequences per micro-batch (default: the most that fits)")
    add("--activation_checkpointing", action=switch,
        help="compute activations again in the backward pass (default: where nothing fits without)")
    add("--compile", action=switch, help="torch.compile, block by block")
    # run
    add("--eval_every", type=count, help="steps")
    add("--eval_tokens", type=count, help="of validation, always the same first ones")
    add("--save_every", type=count, help="steps between checkpoints")
    add("--keep", type=count, help="how many checkpoints stay, the newest")
    add("--out_dir", help="default: out/SIZE-METHOD, numbered if that is taken")
    add("--resume", action="store_true", default=None, help="go on with the run in --out_dir")
    add("--sample", type=text, metavar="PROMPT", help="what the sample at the end begins with")
    add("--seed", type=number(int, 0, 2**63 - 1), help="of weights and rounding")
    add("--device", help="cuda, mps or cpu")
    add("--plan", action="store_true", default=None, help="print the memory that a step takes, and leave")
    return parser


def defaults(said: argparse.Namespace) -> dict:
    """All that does not stand in `said`: the recipe of its size, and what follows from its other options."""
    size = said.size or ("init" if said.init else "toy")
    other = size in SIZES and dict(rank=max(1, SIZES[size]["hidden_size"] // 4))
    recipe = PAPER | RECIPES.get(size, other or {})
    data, steps, rank = said.data or recipe["data"], said.steps or recipe["steps"], recipe.pop("rank")
    tokenizer = "bytes" if data == "python" else recipe["tokenizer"]
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    gpu = (said.device or device).startswith("cuda")
    narrow = size != "toy" and (gpu or said.plan and not said.device)
    rates, gap = recipe.pop("lr"), recipe.pop("update_proj_gap")
    method = dict(lr=rates["full"])
    if said.galore:
        direction = said.direction or "adam"
        method = dict(rank=rank, update_proj_gap=gap, galore_scale=0.25, direction=direction,
                      lr=rates.get(direction, rates["adam"]))
    return recipe | method | dict(
        size=size, dtype="bfloat16" if narrow else "float32", data=data, data_url=C4_URL, keep_shards=0,
        tokenizer=tokenizer, sample="def " if data == "python" else "The", galore=False, exact=False,
        layerwise=not said.exact, warmup_steps=steps // 10, min_lr_ratio=0.1, weight_decay=0.0,
        grad_clipping=0.0, compile=gpu, eval_every=max(1, steps // 5),
        save_every=min(max(1, steps // 10), 1000), keep=1, seed=0, device=device, resume=False, plan=False)


def settle(words: list[str] | None = None) -> tuple[argparse.Namespace, Config, dict | None]:
    """Arguments, shape and checkpoint: the recipe, over it the checkpoint, over it what was typed. ValueError
    for what cannot be honoured, SystemExit from argparse."""
    parser = arguments()
    typed, _ = parser.parse_known_args(words)
    checkpoint, old = None, {}
    if typed.resume:
        refuse((not typed.out_dir, "--resume needs --out_dir, the folder of the run to go on with"))
        checkpoint = read_checkpoint(Path(typed.out_dir))
        old = checkpoint["args"]
    known = {k: old[k] for k in old if k in typed and k not in PER_START}
    said = argparse.Namespace(**{k: known.get(k) if v is None else v for k, v in vars(typed).items()})
    parser.set_defaults(**defaults(said) | known)
    parser.add_argument("-h", "--help", action="help", help="show this and leave")
    args = parser.parse_args(words)
    args.processes = world()
    if typed.batch_size is None and args.batch_size and args.total_batch_size % (args.batch_size * world()):
        args.batch_size = None  # was for another total, or another number of processes
    for k in FIXED if checkpoint else ():
        refuse((k in known and getattr(args, k) != old[k], f"the run in {args.out_dir} has {k} {old[k]}, not "
                f"{getattr(args, k)}: that cannot change; take another --out_dir"))
    config = shape(args, checkpoint)
    refuse(*refusals(args, typed, config, checkpoint))
    args.device = f"cuda:{LOCAL_RANK}" if world() > 1 and args.device == "cuda" else args.device
    args.vocab_size = config.vocab_size
    for k, value in old.items():
        if k not in args:
            tell(f"the run had {k} {value}, which this version of train.py does not know: left out")
        elif k not in PER_START and getattr(args, k) != value:
            tell(f"{k} was {value} and is {getattr(args, k)} from here on")
    return args, config, checkpoint


def shape(args: argparse.Namespace, checkpoint: dict | None) -> Config:
    if checkpoint:
        return Config(**checkpoint["config"])
    if args.init:
        return read_config(Path(args.init))
    vocab = args.vocab_size or -(-(N_VOCAB.get(args.tokenizer) or get_tokenizer(args.tokenizer).n_vocab) // 64) * 64
    return Config(vocab, max_position_embeddings=max(2048, args.seq_len), **SIZES[args.size])


def refusals(args, typed, config: Config, checkpoint: dict | None) -> list[tuple]:
    """What cannot be honoured: whether it is asked for, and the sentence."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = ["cpu", *["cuda"] * cuda, *["mps"] * mps]
    kind, gpus = args.device.split(":")[0], torch.cuda.device_count()
    short = min(config.hidden_size, config.num_key_value_heads * config.head_dim)
    at_once = (args.batch_size or 1) * world()
    return [
        (args.init and not checkpoint and typed.vocab_size,
         "--init brings its vocabulary along: leave --vocab_size out"),
        (args.init and not checkpoint and any(Path(args.init).glob("tokenizer*")),
         f"{args.init} has a tokenizer, which is not read. If --tokenizer gives the same ids, copy config.json "
         "and the weights to another folder"),
        *((getattr(typed, k) and not args.galore, f"--{k} has no effect without --galore")
          for k in ("rank", "update_proj_gap", "galore_scale", "direction", "exact")),
        (args.exact and args.direction != "adam",
         f"--exact is the paper to the letter, which has no {args.direction}: leave one of the two out"),
        (args.exact and args.layerwise,
         "--exact takes an SVD of full gradients, which --layerwise never forms: leave one of the two out"),
        (args.galore and not args.rank < short,
         f"--rank {args.rank} must be below {short}, the shortest side of the model's matrices"),
        (typed.data_url and args.data != "c4",
         f"--data_url says where C4 is, and has no effect with --data {args.data}"),
        (kind not in there, f"--device {args.device} is not there: torch sees {', '.join(there)} here"),
        (world() > 1 and args.device == "cuda" and LOCAL_RANK >= gpus,
         f"there is no GPU for process {LOCAL_RANK + 1} of this machine: torchrun --nproc_per_node={gpus}"),
        (world() > 1 and kind == "mps", "several processes work on CUDA or CPUs, not on mps: start one"),
        (args.warmup_steps > args.steps, f"--warmup_steps {args.warmup_steps} is above --steps {args.steps}"),
        (args.total_batch_size % at_once, f"--total_batch_size {args.total_batch_size} is not a multiple of "
         f"--batch_size {args.batch_size or 1} times {world()} process(es)"),
        (checkpoint and args.steps < checkpoint["step"],
         f"the run has taken {checkpoint and checkpoint['step']} steps already, more than --steps {args.steps}"),
    ]


def refuse(*cases: tuple) -> None:
    for wrong, sentence in cases:
        if wrong:
            raise ValueError(sentence)


def tell(line: str) -> None:
    """To the user, of one process of many. A terminal that is gone, or a full disk, does not end a run."""
    if RANK == 0:
        with suppress(OSError):
            tqdm.write(line)


# ----- memory, before any of it is taken --------------------------------------------------------------------

def plan(args: argparse.Namespace, config: Config, batch_size: int, checkpointing: bool) -> dict[str, float]:
    """GB by kind at the fullest moment of a step: the step itself, simulated (plumbing/memory.py)."""
    def build(blocks):
        micro_batches = min(args.total_batch_size // (batch_size * world()), 3)  # first, middle, last
        total = micro_batches * batch_size * world()
        few = vars(args) | dict(batch_size=batch_size, total_batch_size=total, compile=False,
                                activation_checkpointing=checkpointing)
        model = Llama(replace(config, num_hidden_layers=blocks), "meta", getattr(torch, args.dtype))
        return model, prepare(model, argparse.Namespace(**few))

    blocks, gap = config.num_hidden_layers, args.update_proj_gap or config.num_hidden_layers
    return memory.peak(build, training_step, blocks, gap, (batch_size, args.seq_len))


def fit(args: argparse.Namespace, config: Config, on_this_device: bool) -> dict[str, float] | None:
    """Sets micro-batch and checkpointing where that was not done. Returns GB by kind, None if nothing was
    simulated. ValueError if the run does not fit. On a CPU it looks at nothing, and takes 8,192 tokens at once."""
    gpu = args.device.startswith("cuda")
    most = max(1, (131_072 if gpu or args.plan else 8192) // args.seq_len)  # larger ones are no faster
    powers = [2**i for i in range(18) if args.total_batch_size % (2**i * world()) == 0 and 2**i <= most]
    sizes = [args.batch_size] if args.batch_size else powers or [1]
    ways = [False, True] if args.activation_checkpointing is None else [args.activation_checkpointing]
    flops = 6 * Llama(config, "meta").num_parameters() * args.steps * args.total_batch_size * args.seq_len
    years = flops / 1e11 / 3.15e7
    refuse((not gpu and not args.plan and not on_this_device and flops > 3e18,
            f"no GPU was found, and on a CPU this run would take about {years:,.0f} years: run it where torch sees "
            "a GPU, take a smaller --size or fewer --steps, or say --device cpu (--plan shows the memory)"))
    args.batch_size, args.activation_checkpointing, table = sizes[-1], ways[0], None
    if not gpu and not args.plan:
        return None
    free = 0.97 * torch.cuda.mem_get_info(args.device)[0] / 1e9 if gpu else CARD
    free = -highest(-free)
    whole = max(1, CHUNK_LOGITS // config.vocab_size // args.seq_len)
    try:
        args.batch_size, args.activation_checkpointing, table = memory.choose(
            cache(lambda size, way: plan(args, config, size, way)), sizes, ways, free, whole)
    except Exception as error:  # another torch, or a model whose steps depend on values
        why = f"the memory of a step cannot be simulated here ({type(error).__name__}: {error})".split("\n")[0]
        refuse((args.plan or len(sizes) > 1, f"{why}: give --batch_size"))
        tell(why)
        return None
    need = sum(table.values())
    refuse((need >= free and not args.plan,
            f"this run needs {need:.1f} GB and {args.device} has {free:.1f} GB for it: take a lower --rank, "
            "--state_bits 8, --activation_checkpointing, a smaller --batch_size or a smaller --size"))
    where = args.device if gpu or on_this_device else "no GPU here; a 24 GB card"
    tell(f"micro-batch {args.batch_size}, activation checkpointing {'on' if args.activation_checkpointing else 'off'};"
         f" {where} has {free:.2f} GB for it{': THIS RUN DOES NOT FIT' * (need >= free)}")
    for kind, size in table.items():
        tell(f"{kind:<12}{size:9.3f} GB")
    tell(f"peak {need:.2f} GB")
    return table


# ----- training ---------------------------------------------------------------------------------------------

def learning_rate(step: int, args: argparse.Namespace, peak: float) -> float:
    """Of step 1, 2, ...: linear warm-up to `peak`, then a cosine to peak * min_lr_ratio at the last step."""
    if step <= args.warmup_steps:
        return peak * step / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return peak * (args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def prepare(model: Llama, args: argparse.Namespace, checkpoint: dict | None = None) -> GaLoreAdamW:
    """The optimiser, and the model made ready for it. Both go on from `checkpoint`. A group with an "lr" of its
    own keeps it as its peak. ValueError for the checkpoint of another model or another optimiser."""
    model.activation_checkpointing = args.activation_checkpointing
    groups = [dict(params=list(model.parameters()))]
    if args.galore:
        groups = param_groups(model, args.rank, args.update_proj_gap, args.galore_scale)
    # The last group: embedding, head and norms; without GaLore all. Norms do not decay.
    groups += [dict(params=p, weight_decay=args.weight_decay * (p.ndim > 1)) for p in groups.pop()["params"]]
    opt = GaLoreAdamW(groups, lr=args.lr, weight_decay=args.weight_decay, state_bits=args.state_bits,
                      max_norm=args.grad_clipping or None, exact=args.exact, compile=args.compile, seed=args.seed,
                      muon=args.direction == "muon")
    for group in opt.param_groups:
        group["peak_lr"] = group["lr"]
    if args.layerwise:
        thin(model, opt, accumulation(args), args.activation_checkpointing)
    if args.compile:
        for block in model.model.layers:
            block.compile(fullgraph=True, dynamic=False)
    if checkpoint:
        refuse((seal(model.state_dict()) != seal(checkpoint["model"]),
                f"the run in {args.out_dir} has other weights than this model.py makes: go back to that one"))
        model.load_state_dict(checkpoint.pop("model"))  # pop: a live tensor of the file keeps it on the disk
        groups = [group | dict(t=checkpoint["step"]) for group in opt.state_dict()["param_groups"]]
        opt.load_state_dict(checkpoint.pop("optimizer") | dict(param_groups=groups))  # options as said now
        opt.skipped = torch.tensor(float(checkpoint["skipped"]), device=args.device)
    return opt


def accumulation(args: argparse.Namespace) -> int:
    """Micro-batches per step, in each process."""
    return args.total_batch_size // (args.batch_size * world())


def training_step(model: Llama, opt: GaLoreAdamW, batches, accumulate: int | None = None) -> torch.Tensor:
    """A step on `accumulate` micro-batches (x, y). Their mean loss stays on the device: nothing waits for it."""
    device, total = model.lm_head.weight.device, 0.0
    for _ in range(accumulate):
        x, y = next(batches)
        loss = model(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) / accumulate
        loss.backward()
        total += loss.detach()
    opt.step()
    opt.zero_grad()
    return total


@torch.no_grad()
def evaluate(model: Llama, val, args: argparse.Namespace, fetch) -> dict:
    """Mean loss in nats per token on the first --eval_tokens validation tokens, perplexity, bits per byte.
    Each process takes every so-many-th sequence of the same batches. fetch: see Brake."""
    val.reset()
    total, count = 0.0, 0
    while count < args.eval_tokens:
        left = (args.eval_tokens - count) // args.seq_len
        try:
            x, y = fetch(lambda: val.batch(max(1, min(args.batch_size * world(), left))))  # noqa: B023
        except EndOfData:
            break
        x, y, count = x[RANK :: world()], y[RANK :: world()], count + y.numel()
        total += model(x.to(args.device), y.to(args.device)).item() * y.numel() if len(x) else 0.0
    if world() > 1:
        dist.all_reduce(total := torch.tensor(total, dtype=torch.float64), group=hosts())
    loss = float(total) / count
    return dict(val_loss=loss, perplexity=math.exp(min(loss, 700)), val_tokens=count,
                bits_per_byte=loss / math.log(2) / val.bytes_per_token)


def train(model, opt, args, checkpoint: dict | None, stream, val, log: Log, brake: Brake) -> dict:
    """To the last step, or to where it is asked to end, or has a problem. Returns the last step's number, that
    of the newest checkpoint, and the last validation."""
    past, folder = checkpoint or dict(step=0, skipped=0, scores={}), Path(args.out_dir)
    step, skipped, scores = (past[k] for k in ("step", "skipped", "scores"))
    saved, due, streak = step if checkpoint else -1, False, 0  # step 0 is saved, too: to resume from
    start, began, told = step, time.perf_counter(), 0.0
    accumulate, step_tokens = accumulation(args), args.total_batch_size * args.seq_len
    brake.idle = False

    def save_now() -> int:
        done = RANK == 0 and log.write() and save(
            folder, args.keep, model=model.state_dict(), optimizer=opt.state_dict(), step=step, data=position,
            skipped=skipped, scores=scores, log_lines=log.lines, config=asdict(model.config), args=kept(args))
        return step if done else saved

    with suppress(Stop):
        while True:
            position, last = stream.state_dict(), step == args.steps
            if step and (last or step % args.eval_every == 0) and scores.get("step") != step:
                scores = dict(step=step, **evaluate(model, val, args, brake.fetch))
                log.write(scores)
                tell(f"step {step}: validation loss {scores['val_loss']:.4f}")
            if last:
                break
            due = due or step % args.save_every == 0
            if due and step > saved and not streak:  # not among skipped steps: the newest is from before them
                saved, due = save_now(), False

            begun = time.perf_counter()
            batches = brake.fetch(
                lambda: [stream.batch(args.batch_size, RANK, world()) for _ in range(accumulate)])
            for group in opt.param_groups:
                group["lr"] = learning_rate(step + 1, args, group["peak_lr"])
            loss = training_step(model, opt, iter(batches), accumulate)
            if world() > 1:
                dist.all_reduce(loss.div_(world()))
            step += 1

            numbers = torch.stack([x.float() for x in (loss, opt.norm, opt.skipped)])
            loss, norm, bad = numbers.tolist()  # the one place where the host waits for the device
            skipped, streak, now = int(bad), streak + 1 if bad > skipped else 0, time.perf_counter()
            line = dict(step=step, tokens=stream.seen, loss=loss, lr=learning_rate(step, args, args.lr),
                        grad_norm=norm, tokens_per_s=round(step_tokens / (now - begun)),
                        memory_gb=round(most_memory(args.device), 3), skipped=skipped)
            log.write(line)
            if step == args.steps or now - told > min(600, 5 + (now - began) / 10):
                told, left = now, tqdm.format_interval((now - began) / (step - start) * (args.steps - step))
                tell("step {step}/{}: loss {loss:.3f}, {tokens_per_s:,} tokens/s, {memory_gb:.2f} GB, {} left, "
                     "{skipped} steps skipped".format(args.steps, left, **line))
            if streak > PATIENCE:
                brake.problem = (f"the gradients of {streak} steps in a row were not finite "
                                 "(in the data, or a learning rate too high)")
    scores = scores if scores.get("step") == args.steps == step else None
    wanted = step > saved and (scores or not streak)
    saved = save_now() if wanted else saved
    return step, saved, scores, bool(wanted and step > saved and RANK == 0)


def most_memory(device: str) -> float:
    """GB at the fullest moment so far: of tensors on a GPU, or of the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9


def kept(args: argparse.Namespace) -> dict:
    return {k: v for k, v in vars(args).items() if k not in PER_START}


def say_the_end(model: Llama, args, tokenizer, step: int, saved: int, scores: dict | None) -> None:
    """How to go on; or, at the end, the last validation and a sample."""
    if not scores:
        start = "torchrun (as before)" if world() > 1 else "python"
        again = (f"to go on from the checkpoint of step {saved}: {start} train.py --resume --out_dir {args.out_dir}"
                 if saved >= 0 else "there is no checkpoint")
        return tell(f"stopped after step {step}; {again}")
    tell("validation loss {val_loss:.4f} nats per token, perplexity {perplexity:.2f}, {bits_per_byte:.4f} bits "
         "per byte, on {val_tokens:,} tokens".format(**scores))
    if math.isfinite(scores["val_loss"]) and RANK == 0:
        prompt = torch.tensor([tokenizer.encode(args.sample).tolist()] * 3, device=args.device)
        length = max(16, min(200, args.seq_len - prompt.size(1)))  # beyond the trained positions text falls apart
        draw = torch.Generator(prompt.device).manual_seed(args.seed)
        texts = model.generate(prompt, length, temperature=0.5, top_k=50, generator=draw)
        tell("sample:\n" + "\n\n".join(tokenizer.decode(text.tolist()) for text in texts))
    tell(f"log and checkpoint: {args.out_dir}")


def why_not_compile(device: str) -> str | None:
    """What torch.compile says on the device when it is tried on something small; None if it works."""
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(64, device=device))
    except Exception as error:  # no triton, no C++ compiler, too old a GPU: each has a type of its own
        return f"{type(error).__name__}: {error}".split("\n")[0]


def choose_out_dir(args: argparse.Namespace) -> None:
    """A new run never writes over another. ValueError if the folder asked for holds one."""
    if args.out_dir is None:
        name = f"{args.size}-{f'galore-r{args.rank}' if args.galore else 'adamw'}{'-8bit' * (args.state_bits == 8)}"
        names = (Path("out", name + f"-{i}" * (i > 1)) for i in range(1, 10**6))
        args.out_dir = str(next(path for path in names if not holds_a_run(path)))
    refuse((not args.resume and RANK == 0 and holds_a_run(Path(args.out_dir)),
            f"{args.out_dir} holds a run already: add --resume to go on with it, or take another --out_dir"),
           (not writable(Path(args.out_dir)), f"--out_dir {args.out_dir} cannot be written: take another"))


def open_log(args: argparse.Namespace, checkpoint: dict | None, parameters: int) -> Log:
    """Its first line, and where a resumed run has other arguments another one, holds all of them."""
    log = Log(Path(args.out_dir), checkpoint["log_lines"] if checkpoint else 0)
    if log.lines == 0 or kept(args) != checkpoint["args"]:
        gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
        log.write(dict(step=checkpoint["step"] if checkpoint else 0, args=vars(args), parameters=parameters,
                       versions=dict(python=platform.python_version(), torch=torch.__version__, gpu=gpu,
                                     cpu_threads=torch.get_num_threads(), processes=world())))
    return log


def main() -> None:
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a terminal may lack letters of the sample
    parser, brake = arguments(), Brake()
    try:  # whatever can be known to be wrong is said here, before any work
        args, config, checkpoint = settle()
        on_this_device = parser.parse_known_args()[0].device is not None
        if world() > 1 and not args.plan:
            if args.device.startswith("cuda"):
                torch.cuda.set_device(args.device)
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        fit(args, config, on_this_device)
        if args.plan:
            return
        if args.compile and (why := why_not_compile(args.device)):
            args.compile = False
            tell(f"torch.compile does not work here, so nothing is compiled: slower, but the same ({why})")
        choose_out_dir(args)
        same = {k: v for k, v in kept(args).items() if k not in ("data", "data_dir", "compile")}
        same = seal(same | dict(step=checkpoint and checkpoint["step"]))
        refuse((highest(same) + highest(-same), "the processes do not agree: start all with the same arguments; "
                "with --resume all must find the same checkpoint in --out_dir, a folder that they share or a copy"))
        tokenizer = get_tokenizer(args.tokenizer)
        refuse((tokenizer.n_vocab > config.vocab_size, f"a vocabulary of {config.vocab_size:,} is smaller than "
                f"that of tokenizer {args.tokenizer}, {tokenizer.n_vocab:,}: take "
                f"{'' if args.init else 'a larger --vocab_size or '}another --tokenizer"))
        where = dict(data_dir=args.data_dir, data_url=args.data_url, keep_shards=args.keep_shards)
        stream = open_data(args.data, tokenizer, "train", args.seq_len,
                           state=checkpoint and checkpoint["data"], **where)
        val = open_data(args.data, tokenizer, "val", args.seq_len, **where)
        refuse(((val.tokens[1 : args.eval_tokens + 1] == tokenizer.eot).all(),
                f"the first {args.eval_tokens:,} validation tokens of {args.data} hold no text: take others"))
        torch.manual_seed(args.seed)
        dtype, anew = getattr(torch, args.dtype), not (args.init and not checkpoint)
        model = (Llama(config, args.device, dtype) if anew
                 else Llama.from_pretrained(args.init, dtype).to(args.device))
        opt = prepare(model, args, checkpoint)
        log = open_log(args, checkpoint, model.num_parameters())
    except (ValueError, OSError) as error:
        time.sleep(3 * bool(RANK))  # the first process speaks for all; torchrun ends the others
        parser.error(str(error))

    say_the_beginning(model, opt, args)
    step, saved, scores, failed = train(model, opt, args, checkpoint, stream, val, log, brake)
    say_the_end(model, args, tokenizer, step, saved, scores)
    log.close()
    if world() > 1:
        highest(0)  # none leaves before the checkpoint is written: torchrun would end the others
        dist.destroy_process_group()
    if brake.problem:
        time.sleep(3 * bool(RANK))
        parser.exit(2, f"train.py: {brake.problem}\n")
    if failed:
        parser.exit(1, f"train.py: the checkpoint of step {step} could not be written; the newest is of step {saved}\n")


def say_the_beginning(model: Llama, opt: GaLoreAdamW, args: argparse.Namespace) -> None:
    inside = sum(p.numel() for group in opt.param_groups for p in group["params"] if group["rank"])
    method = "full-rank AdamW"
    if args.galore:
        method = (f"GaLore, rank {args.rank}, T {args.update_proj_gap}, alpha {args.galore_scale:g}, "
                  f"{args.direction}{', exact' * args.exact}")
    tokens, batch = args.total_batch_size * args.seq_len, f"{accumulation(args)} x {world()} x {args.batch_size}"
    tell(f"{args.size} LLaMA: {model.num_parameters():,} parameters, {inside:,} of them in projected matrices; "
         f"{args.dtype} on {args.device}, {world()} process(es)")
    tell(f"{method}; {args.state_bits}-bit moments, {'layer-wise' if args.layerwise else 'one'} update, "
         f"clipping {args.grad_clipping or 'off'}")
    tell(f"lr {args.lr:g} after {args.warmup_steps:,} steps of warm-up, cosine to {args.lr * args.min_lr_ratio:g}, "
         f"weight decay {args.weight_decay:g}")
    tell(f"{args.steps:,} steps of {tokens:,} tokens ({batch} sequences of {args.seq_len}); data {args.data}, "
         f"tokenizer {args.tokenizer}, vocabulary {args.vocab_size:,}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        tell("interrupted before the first step: there is nothing to save")
    finally:
        sys.stdout = open(os.devnull, "w")  # a line that nothing takes would turn any exit code into 120
