"""Pre-train a LLaMA, with GaLore or without.

    python train.py --size toy --data python --galore --rank 64           # two minutes on a CPU, no download
    python train.py --size 60m --galore --rank 128 --data DIR             # C4's shards in DIR, or your text
    python train.py --size 7b --galore --rank 1024                        # C4 as it goes; one 24 GB GPU
    python train.py --size 7b --galore --rank 1024 --plan                 # what that takes, without taking it
    torchrun --nproc_per_node=2 train.py --size 1b --galore --rank 512    # exchanges rank-r gradients

Without --galore the same loop is full-rank AdamW, and with --state_bits 8, 8-bit Adam. What is not typed
comes from the paper's recipe for the size (GaLore, arXiv 2403.03507, table 5 and section 5).
`--size 7b --help` shows 7b's values.

A run lives in --out_dir: log.jsonl and checkpoint-STEP.pt (plumbing/files.py). Ctrl-C, SIGTERM and a closed
terminal save and leave. --resume --out_dir DIR goes on from the newest checkpoint, with the run's arguments
and any number of processes. The losses are the same: bit for bit on a CPU with as many processes.

Left out on purpose: mixed precision (weights, gradients and activations have one dtype, as in the paper),
early stopping, sweeps, trackers.
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
from functools import partial
from pathlib import Path

# Both must stand before torch is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # no gaps in a full GPU
if "OMP_WAIT_POLICY" not in os.environ:  # on a busy CPU a spinning thread holds up the one it waits for
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import C4_URL, EndOfData, get_tokenizer, open_data
from galore import DIRECTIONS, Exact, GaLoreAdamW, param_groups
from model import CHUNK_LOGITS, SIZES, Config, Llama
from plumbing import memory
from plumbing.files import (LOCAL_RANK, RANK, Brake, Log, Stop, free_folder, highest, holds_a_run, hosts,
                            read_checkpoint, save, seal, world)
from plumbing.hf import read_config
from thin import thin

# The paper's tables 2 and 5, for 7B section 5.2; its batch is 512 x 256. muon: measured at toy size only.
PAPER = dict(data="c4", tokenizer="gpt2", seq_len=256, total_batch_size=512, steps=10_000,
             update_proj_gap=200, galore_scale=0.25, state_bits=32, eval_tokens=10_000_000,
             lr=dict(adam=0.01, muon=0.02, full=0.001))
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
PER_START = ("resume", "out_dir", "plan", "device", "card")  # not taken over from a checkpoint
PATIENCE = 20  # steps in a row whose gradients are not finite, before a run stops
CARD = 0.97 * (23.64 * 2**30 - 5e8) / 1e9  # GB of an RTX 4090, as torch shows it; half a GB is CUDA's own
N_VOCAB = {"gpt2": 50257, "bytes": 257}  # so that --plan needs no download


# ----- the command line -------------------------------------------------------------------------------------

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number(kind, least: float, most: float = 1e18):
    """A type for argparse: a number from `least` to `most`."""
    def read(word):
        value = kind(word)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{word} must lie between {least:g} and {most:g}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid float value"
    return read


def arguments() -> argparse.ArgumentParser:
    """All options, with no defaults yet, and without --help, which shows them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, allow_abbrev=False, add_help=False,
        usage="python train.py [options]   (--help explains them)")
    add, count, rate = parser.add_argument, number(int, 1), number(float, 1e-18)
    one = parser.add_mutually_exclusive_group()
    # model
    one.add_argument("--size", choices=SIZES, help="of the model, from random weights")
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
    add("--direction", choices=DIRECTIONS, help="whose step is taken in the subspace")
    add("--exact", action=switch, help="the paper to the letter: SVD, moments not rotated; not layer-wise")
    add("--state_bits", type=int, choices=(32, 8), help="of Adam's moments; with 8, of P, too")
    add("--layerwise", action=switch, help="move each weight in the backward pass, form no full gradient")
    add("--lr", type=rate, help="peak learning rate")
    add("--warmup_steps", type=number(int, 0), help="of linear warm-up")
    add("--min_lr_ratio", type=number(float, 0, 1), help="the cosine ends at this share of --lr")
    add("--weight_decay", type=number(float, 0), help="decoupled, of all but norms")
    add("--grad_clipping", type=number(float, 0), help="of the projected gradients' norm; 0: none")
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
    add("--sample", metavar="PROMPT", help="what the sample at the end begins with")
    add("--seed", type=number(int, 0, 2**63 - 1), help="of weights and rounding")
    add("--device", help="cuda, mps or cpu")
    add("--plan", action="store_true", default=None, help="print the memory that a step takes, and leave")
    return parser


def devices() -> list[str]:
    """Best first."""
    return ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


def defaults(said: argparse.Namespace) -> dict:
    """The recipe of the size, and what follows from the options that were said."""
    size = said.size or ("init" if said.init else "toy")
    recipe = PAPER | (RECIPES.get(size) or dict(rank=SIZES[size]["hidden_size"] // 4))
    rates, data, steps = recipe.pop("lr"), said.data or recipe["data"], said.steps or recipe["steps"]
    gpu = (said.device or devices()[0]).startswith("cuda")
    if data == "python":
        recipe["tokenizer"] = "bytes"
    rate = rates.get(said.direction, rates["adam"]) if said.galore else rates["full"]
    narrow = size != "toy" and (gpu or said.plan and not said.device)
    return recipe | dict(
        size=size, dtype="bfloat16" if narrow else "float32", data=data, data_url=C4_URL, keep_shards=0,
        galore=False, direction="adam", exact=False, layerwise=not said.exact, lr=rate, weight_decay=0.0,
        warmup_steps=steps // 10, min_lr_ratio=0.1, grad_clipping=0.0, compile=gpu, seed=0, keep=1,
        eval_every=max(1, steps // 5), save_every=min(max(1, steps // 10), 1000), device=devices()[0],
        sample="def " if data == "python" else "The")


def settle(words: list[str] | None = None) -> tuple[argparse.Namespace, Config, dict | None]:
    """Arguments, shape and checkpoint: the recipe, over it the checkpoint, over it what was typed. SystemExit
    or ValueError for what cannot be honoured."""
    parser, checkpoint, old = arguments(), None, {}
    typed, _ = parser.parse_known_args(words)
    if typed.resume:
        refuse([(not typed.out_dir, "--resume needs --out_dir, the folder of the run to go on with")])
        checkpoint = read_checkpoint(Path(typed.out_dir))
        old = {k: v for k, v in checkpoint["args"].items() if k in typed and k not in PER_START}
    parser.set_defaults(**old)
    said, _ = parser.parse_known_args(words)
    parser.set_defaults(**defaults(said) | old)
    parser.add_argument("-h", "--help", action="help", help="show this and leave")
    args = parser.parse_args(words)
    if not typed.batch_size and args.batch_size and args.total_batch_size % (args.batch_size * world()):
        args.batch_size = None  # was for another total, or another number of processes
    refuse([(k in FIXED and getattr(args, k) != v, f"the run in {args.out_dir} has {k} {v}, not "
             f"{getattr(args, k)}: that cannot change; take another --out_dir") for k, v in old.items()])
    if checkpoint:
        config = Config(**checkpoint["config"])
    elif args.init:
        config = read_config(Path(args.init))
    else:
        tokens = N_VOCAB.get(args.tokenizer) or get_tokenizer(args.tokenizer).n_vocab
        vocab, positions = args.vocab_size or -(-tokens // 64) * 64, max(2048, args.seq_len)
        config = Config(vocab, max_position_embeddings=positions, **SIZES[args.size])
    refuse(refusals(args, typed, config, checkpoint))
    args.vocab_size, args.card = config.vocab_size, args.device == "cpu" and not typed.device
    for k in checkpoint["args"] if checkpoint else ():
        if k not in args:
            tell(f"the run had {k}, which this version of train.py does not know: left out")
        elif k in old and getattr(args, k) != old[k]:
            tell(f"{k} was {old[k]} and is {getattr(args, k)} from here on")
    return args, config, checkpoint


def refusals(args, typed, config: Config, checkpoint: dict | None) -> list[tuple]:
    """What cannot be honoured: whether it is asked for, and the sentence."""
    kind, gpus, new_init = args.device.split(":")[0], torch.cuda.device_count(), args.init and not checkpoint
    short = min(config.hidden_size, config.num_key_value_heads * config.head_dim)
    at_once, taken = (args.batch_size or 1) * world(), checkpoint["step"] if checkpoint else 0
    return [
        (new_init and typed.vocab_size, "--init brings its vocabulary along: leave --vocab_size out"),
        (new_init and any(Path(args.init).glob("tokenizer*")), f"{args.init} has a tokenizer, which is not "
         "read. If --tokenizer gives the same ids, copy config.json and the weights to another folder"),
        *((getattr(typed, k) and not args.galore, f"--{k} has no effect without --galore")
          for k in ("rank", "update_proj_gap", "galore_scale", "direction", "exact")),
        (args.exact and args.direction != "adam", "--exact is the paper to the letter: drop --direction"),
        (args.exact and args.layerwise,
         "--exact takes an SVD of full gradients, which --layerwise never forms: leave one of the two out"),
        (args.galore and args.rank >= short,
         f"--rank {args.rank} must be below {short}, the shortest side of the model's matrices"),
        (typed.data_url and args.data != "c4", f"--data_url has no effect with --data {args.data}"),
        (not args.sample, "--sample is empty: give it at least one letter to begin with"),
        (kind not in devices(), f"--device {kind} is not there: torch sees {', '.join(devices())} here"),
        (world() > 1 and args.device == "cuda" and LOCAL_RANK >= gpus,
         f"there is no GPU for process {LOCAL_RANK + 1} of this machine: torchrun --nproc_per_node={gpus}"),
        (world() > 1 and kind == "mps", "several processes work on CUDA or CPUs, not on mps: start one"),
        (args.warmup_steps > args.steps, f"--warmup_steps {args.warmup_steps} is above --steps {args.steps}"),
        (args.total_batch_size % at_once, f"--total_batch_size {args.total_batch_size} is not a multiple of "
         f"--batch_size {args.batch_size or 1} times {world()} process(es)"),
        (args.steps < taken, f"the run has taken {taken} steps already, more than --steps {args.steps}"),
    ]


def refuse(cases: list[tuple]) -> None:
    for wrong, sentence in cases:
        if wrong:
            raise ValueError(sentence)


def tell(line: str) -> None:
    """To the user, of one process of many. A terminal that is gone, or a full disk, does not end a run."""
    if RANK == 0:
        with suppress(OSError):
            tqdm.write(line)


# ----- memory, before any of it is taken --------------------------------------------------------------------

def plan(args, config: Config, batch_size: int, checkpointing: bool, run=memory.peak) -> dict[str, float]:
    """GB by kind at the fullest moment of a step, simulated (plumbing/memory.py)."""
    def build(blocks):
        few = vars(args) | dict(batch_size=batch_size, activation_checkpointing=checkpointing, compile=False)
        few["total_batch_size"] = min(args.total_batch_size, 3 * batch_size * world())  # first, middle, last
        few = argparse.Namespace(**few)
        model = Llama(replace(config, num_hidden_layers=blocks), "meta", getattr(torch, args.dtype))
        return model, prepare(model, few), accumulation(few)

    tokens = batch_size, args.seq_len
    return run(build, training_step, config.num_hidden_layers, args.update_proj_gap, tokens)


def fit(args: argparse.Namespace, config: Config) -> None:
    """Sets micro-batch and checkpointing where that was not done: on a GPU, and for --plan, by simulating
    steps. ValueError if the run does not fit. A CPU gets at most 8,192 tokens at once, and no simulation."""
    gpu = args.device.startswith("cuda")
    most = max(1, (131_072 if gpu or args.plan else 8192) // args.seq_len)  # larger ones are no faster
    sizes = [2**i for i in range(18) if args.total_batch_size % (2**i * world()) == 0 and 2**i <= most] or [1]
    sizes = [args.batch_size] if args.batch_size else sizes
    ways = [False, True] if args.activation_checkpointing is None else [args.activation_checkpointing]
    tokens = args.steps * args.total_batch_size * args.seq_len
    years = 6 * Llama(config, "meta").num_parameters() * tokens / 1e11 / 3.15e7
    refuse([(args.card and not args.plan and years > 1, "no GPU was found, and on a CPU this run would take "
             f"about {years:,.0f} years: take a GPU, a smaller --size, fewer --steps, or say --device cpu")])
    args.batch_size, args.activation_checkpointing = sizes[-1], ways[0]
    if not (gpu or args.plan):
        return

    free = 0.97 * torch.cuda.mem_get_info(args.device)[0] / 1e9 if gpu else CARD
    free = -highest(-free)  # of the fullest device
    try:
        args.batch_size, args.activation_checkpointing, table = memory.choose(
            partial(plan, args, config), sizes, ways, free, CHUNK_LOGITS // config.vocab_size // args.seq_len)
    except Exception as error:  # another torch, or a model whose steps depend on values
        why = f"no step can be simulated here ({type(error).__name__}: {error})".split("\n")[0]
        refuse([(args.plan or len(sizes) > 1, f"{why}: give --batch_size, and do without --plan")])
        return tell(why)
    need = sum(table.values())
    refuse([(need >= free and not args.plan, f"this run needs {need:.1f} GB, {args.device} has {free:.1f}: "
             "take a lower --rank, --state_bits 8, --activation_checkpointing, or a smaller --size")])
    tell("\n".join(f"{kind:<12}{size:9.3f} GB" for kind, size in table.items()))
    no, where = "" if args.activation_checkpointing else "no-", "a 24 GB card" if args.card else args.device
    tell(f"--batch_size {args.batch_size}, --{no}activation_checkpointing; {where} has {free:.2f} GB"
         f"{': THIS RUN DOES NOT FIT' * (need >= free)}\npeak {need:.2f} GB")


# ----- training ---------------------------------------------------------------------------------------------

def learning_rate(step: int, args: argparse.Namespace, peak: float) -> float:
    """Of step 1, 2, ...: linear warm-up to `peak`, then a cosine to peak * min_lr_ratio at the last step."""
    if step <= args.warmup_steps:
        return peak * step / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return peak * (args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def prepare(model: Llama, args: argparse.Namespace, checkpoint: dict | None = None) -> GaLoreAdamW:
    """The optimiser, and the model made ready for it. Both go on from `checkpoint`. The lr of a group is its
    peak: args.lr, unless it brings its own. ValueError for the checkpoint of another model or optimiser."""
    model.activation_checkpointing = args.activation_checkpointing
    groups = [dict(params=list(model.parameters()))]
    if args.galore:
        groups = param_groups(model, args.rank, args.update_proj_gap, args.galore_scale)
    # The last group: embedding, head and norms; without GaLore all. Norms do not decay.
    groups += [dict(params=p, weight_decay=args.weight_decay * (p.ndim > 1)) for p in groups.pop()["params"]]
    opt = (Exact if args.exact else GaLoreAdamW)(
        groups, lr=args.lr, weight_decay=args.weight_decay, state_bits=args.state_bits, seed=args.seed,
        max_norm=args.grad_clipping or None, direction=args.direction or "adam", compile=args.compile)
    for group in opt.param_groups:
        group["peak_lr"] = group["lr"]
    if args.layerwise:
        thin(model, opt, accumulation(args), args.activation_checkpointing)
    if args.compile:
        for block in model.model.layers:
            block.compile(fullgraph=True, dynamic=False)
    if checkpoint:
        refuse([(seal(model.state_dict()) != seal(checkpoint["model"]),
                 f"the run in {args.out_dir} has other weights than this model.py makes: go back")])
        model.load_state_dict(checkpoint.pop("model"))  # pop: a live tensor of the file keeps it on the disk
        groups = [group | dict(t=checkpoint["step"]) for group in opt.state_dict()["param_groups"]]
        opt.load_state_dict(checkpoint.pop("optimizer") | dict(param_groups=groups))  # options as said now
        opt.skipped = torch.tensor(float(checkpoint["skipped"]), device=args.device)
    return opt


def accumulation(args: argparse.Namespace) -> int:
    """Micro-batches per step, in each process."""
    return args.total_batch_size // (args.batch_size * world())


def training_step(model: Llama, opt: GaLoreAdamW, batches, accumulate: int) -> torch.Tensor:
    """A step on `accumulate` micro-batches (x, y). Their mean loss stays on the device: nothing waits."""
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
        sequences = max(1, min(args.batch_size * world(), (args.eval_tokens - count) // args.seq_len))
        try:
            x, y = fetch(lambda: val.batch(sequences))  # noqa: B023
        except EndOfData:
            break
        x, y, count = x[RANK :: world()], y[RANK :: world()], count + y.numel()
        total += model(x.to(args.device), y.to(args.device)).item() * y.numel() if len(x) else 0.0
    if world() > 1:
        dist.all_reduce(total := torch.tensor(total, dtype=torch.float64), group=hosts())
    loss = float(total) / count
    return dict(val_loss=loss, perplexity=math.exp(min(loss, 700)), val_tokens=count,
                bits_per_byte=loss / math.log(2) / val.bytes_per_token)


def most_memory(device: str) -> float:
    """GB at the fullest moment so far: of tensors on a GPU, or of the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def train(model, opt, args, checkpoint: dict | None, stream, val, log: Log, brake: Brake) -> tuple:
    """To the last step, or to where it is asked to end, or has a problem. Returns the last step, that of the
    newest checkpoint, and the validation of the end, None if it was not reached."""
    past = checkpoint or dict(step=0, skipped=0, scores={})
    step, skipped, scores = (past[k] for k in ("step", "skipped", "scores"))
    saved, due, streak, told = step if checkpoint else -1, False, 0, 0.0  # step 0 is saved, too
    accumulate, step_tokens = accumulation(args), args.total_batch_size * args.seq_len
    start, began, brake.idle = step, time.perf_counter(), False

    def save_now() -> int:
        done = RANK == 0 and log.write() and save(
            Path(args.out_dir), args.keep, model=model.state_dict(), optimizer=opt.state_dict(), step=step,
            data=position, skipped=skipped, scores=scores, log_lines=log.lines, config=asdict(model.config),
            args=kept(args))
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
                tell("step {step}/{}: loss {loss:.3f}, {tokens_per_s:,} tokens/s, {memory_gb:.2f} GB, "
                     "{skipped} steps skipped, {} left".format(args.steps, left, **line))
            if streak > PATIENCE:
                brake.problem = (f"the gradients of {streak} steps in a row were not finite "
                                 "(in the data, or a learning rate too high)")
    finished = step == args.steps and scores.get("step") == step
    if step > saved and (finished or not streak):
        saved = save_now()
        if saved < step and RANK == 0:
            brake.problem, brake.code = f"the checkpoint of step {step} could not be written", 1
    return step, saved, scores if finished else None


def kept(args: argparse.Namespace) -> dict:
    return {k: v for k, v in vars(args).items() if k not in PER_START}


def say_the_end(model: Llama, args, tokenizer, step: int, saved: int, scores: dict | None) -> None:
    """The validation and a sample; or how to go on."""
    if not scores:
        start = "torchrun (as before)" if world() > 1 else "python"
        return tell(f"stopped after step {step}; to go on from the checkpoint of step {saved}: {start} "
                    f"train.py --resume --out_dir {args.out_dir}")
    tell("validation loss {val_loss:.4f} nats per token, perplexity {perplexity:.2f}, {bits_per_byte:.4f} "
         "bits per byte, on {val_tokens:,} tokens".format(**scores))
    if math.isfinite(scores["val_loss"]) and RANK == 0:
        prompt = torch.tensor([tokenizer.encode(args.sample).tolist()] * 3, device=args.device)
        length = max(16, min(200, args.seq_len - prompt.size(1)))  # the positions seen in training
        draw = torch.Generator(prompt.device).manual_seed(args.seed)
        texts = model.generate(prompt, length, temperature=0.5, top_k=50, generator=draw)
        tell("sample:\n" + "\n\n".join(tokenizer.decode(text.tolist()) for text in texts))
    tell(f"log and checkpoint: {args.out_dir}")


def begin() -> tuple:
    """What `train` and `say_the_end` work on. Whatever can be known to be wrong is said before any work."""
    args, config, checkpoint = settle()
    if world() > 1 and args.device == "cuda":
        args.device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(args.device)
    if world() > 1 and not args.plan:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    fit(args, config)
    if args.plan:
        sys.exit()
    try:
        args.compile and torch.compile(torch.sin)(torch.ones(64, device=args.device))
    except Exception as error:  # no triton, no C++ compiler, too old a GPU: each has a type of its own
        args.compile, why = False, f"{type(error).__name__}: {error}".split("\n")[0]
        tell(f"torch.compile does not work here, so nothing is compiled: slower, but the same ({why})")
    method = f"galore-r{args.rank}" if args.galore else "adamw"
    args.out_dir = args.out_dir or free_folder(f"out/{args.size}-{method}{'-8bit' * (args.state_bits == 8)}")
    same = {k: v for k, v in kept(args).items() if k not in ("data", "data_dir", "compile")}
    same = seal(same | dict(step=checkpoint and checkpoint["step"]))
    tokenizer = get_tokenizer(args.tokenizer)
    tokenizer.encode(args.sample)  # raises now what it would raise after the last step
    refuse([
        (not args.resume and RANK == 0 and holds_a_run(Path(args.out_dir)),
         f"{args.out_dir} holds a run already: add --resume to go on with it, or take another --out_dir"),
        (highest(same) + highest(-same), "the processes do not agree: start all with the same arguments, and "
         "--resume from the same checkpoint, in a folder that they share or a copy of it"),
        (tokenizer.n_vocab > config.vocab_size, f"a vocabulary of {config.vocab_size:,} is smaller than that "
         f"of tokenizer {args.tokenizer}, {tokenizer.n_vocab:,}: take "
         f"{'' if args.init else 'a larger --vocab_size or '}another --tokenizer")])
    where = dict(data_dir=args.data_dir, data_url=args.data_url, keep_shards=args.keep_shards)
    place = checkpoint and checkpoint["data"]
    stream = open_data(args.data, tokenizer, "train", args.seq_len, state=place, **where)
    val = open_data(args.data, tokenizer, "val", args.seq_len, **where)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    model = Llama(config, args.device, dtype)
    if args.init and not checkpoint:
        model = Llama.from_pretrained(args.init, dtype).to(args.device)
    opt = prepare(model, args, checkpoint)
    log = Log(Path(args.out_dir), checkpoint["log_lines"] if checkpoint else 0)
    if log.lines == 0 or kept(args) != checkpoint["args"]:
        gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
        versions = dict(python=platform.python_version(), torch=torch.__version__, gpu=gpu, processes=world(),
                        cpu_threads=torch.get_num_threads())
        start = checkpoint["step"] if checkpoint else 0
        log.write(dict(step=start, args=vars(args), versions=versions, parameters=model.num_parameters()))
    tell(", ".join(f"{k} {v}" for k, v in vars(args).items() if v is not None))
    tell(f"{model.num_parameters():,} parameters, {accumulation(args)} micro-batch(es) per step, "
         f"{world()} process(es)")
    return model, opt, args, checkpoint, tokenizer, stream, val, log


def main() -> None:
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a terminal may lack letters of the sample
    brake = Brake()
    try:
        model, opt, args, checkpoint, tokenizer, stream, val, log = begin()
    except (ValueError, OSError) as error:
        time.sleep(3 * bool(RANK))  # the first process speaks for all; torchrun ends the others
        arguments().error(str(error))
    step, saved, scores = train(model, opt, args, checkpoint, stream, val, log, brake)
    say_the_end(model, args, tokenizer, step, saved, scores)
    log.close()
    if world() > 1:
        highest(0)  # none leaves before the checkpoint is written: torchrun would end the others
        dist.destroy_process_group()
    if brake.problem:
        time.sleep(3 * bool(RANK))
        arguments().exit(brake.code, f"train.py: {brake.problem}\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        tell("interrupted before the first step: there is nothing to save")
    finally:
        sys.stdout = open(os.devnull, "w")  # a line that nothing takes would turn any exit code into 120
