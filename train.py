"""
Pre-train a LLaMA, with GaLore or without.

    python train.py --size toy --data python --galore --rank 64           # two minutes on a CPU, nothing downloaded
    python train.py --size 60m --galore --rank 128 --data DIR             # C4 shards in DIR, or your own text
    python train.py --size 7b --galore --rank 1024                        # C4, downloaded as it goes; one 24 GB GPU
    python train.py --size 7b --galore --rank 1024 --plan                 # what that takes, without taking it
    torchrun --nproc_per_node=2 train.py --size 1b --galore --rank 512    # two processes, which exchange rank-r gradients

Without --galore the same loop is full-rank AdamW, and with --state_bits 8, 8-bit Adam. What is not given comes from the
paper's recipe for the size (GaLore, arXiv 2403.03507, table 5 and section 5), and is printed before anything starts.

A run lives in --out_dir: log.jsonl (first line: all arguments and versions; then a line a step) and checkpoint-STEP.pt. Ctrl-C, SIGTERM
and a closed terminal save and leave; --resume --out_dir DIR goes on from the newest checkpoint, with the arguments of the run where none
are given and with any number of processes, to the same losses (bit for bit on a CPU and as many processes).

Left out on purpose: mixed precision (weights, gradients and activations have one dtype, as in the paper), early stopping,
sweeps, trackers.
"""

import argparse
import fcntl
import json
import math
import os
import platform
import resource
import signal
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

# Both must stand before torch is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # no gaps in a full GPU
if "OMP_WAIT_POLICY" not in os.environ:  # on a busy CPU a spinning thread holds up the one it waits for
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
import torch.distributed as dist
from tqdm import tqdm

import galore
from thin import thin
from adam8bit import BLOCK, SLICE, SMALLEST
from data import C4_URL, EndOfData, get_tokenizer, open_data
from model import CHUNK_LOGITS, SIZES, Config, Llama
from plumbing.hf import read_config

# Steps, rank and T of the paper (tables 2 and 5; 7B: section 5.2); 0.01 and 0.001 are its learning rates, 512 x 256 its batch. muon_lr is
# measured at toy size only.
PAPER = dict(data="c4", tokenizer="gpt2", seq_len=256, total_batch_size=512, update_proj_gap=200, galore_lr=0.01, muon_lr=0.02, full_lr=0.001,
             eval_tokens=10_000_000, state_bits=32)  # fmt: skip
RECIPES = {
    "toy": PAPER | dict(steps=600, rank=64, seq_len=128, total_batch_size=8, update_proj_gap=50, galore_lr=0.005, data="python",
                        tokenizer="bytes", eval_tokens=65_536),  # fmt: skip
    "60m": PAPER | dict(steps=10_000, rank=128),
    "130m": PAPER | dict(steps=20_000, rank=256),
    "350m": PAPER | dict(steps=60_000, rank=256),
    "1b": PAPER | dict(steps=100_000, rank=512, full_lr=0.0005),
    "3b": PAPER | dict(steps=120_000, rank=640, full_lr=0.0005),
    "7b": PAPER | dict(steps=150_000, rank=1024, galore_lr=0.005, muon_lr=0.01, full_lr=0.0005, update_proj_gap=500, state_bits=8),
    "mobilellm-125m": PAPER | dict(steps=20_000, rank=128),
    "mobilellm-350m": PAPER | dict(steps=60_000, rank=256),
}
RECIPES["init"] = PAPER | dict(steps=1000, rank=128)  # --init: whatever its shape
FIXED = ("init", "size", "vocab_size", "tokenizer", "seq_len", "galore", "rank", "muon", "exact", "state_bits", "dtype", "seed")  # not on resume
PER_START = ("resume", "out_dir", "plan", "device", "card")  # not taken over from a checkpoint
PATIENCE = 20  # steps in a row whose gradients are not finite, before a run stops
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # torchrun sets them
N_VOCAB = {"gpt2": 50257, "bytes": 257}  # so that --plan needs no download


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="python train.py [options]   (--help explains them)")  # fmt: skip
    switch, add = argparse.BooleanOptionalAction, parser.add_argument
    # model
    add("--size", help=f"one of {', '.join(SIZES)} (default: toy)")
    add("--init", metavar="DIR", help="start from a Hugging Face LLaMA folder instead of random weights; takes the place of --size")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights, gradients and activations (default: bfloat16 on a GPU and for --plan, but for toy)")
    # data
    add("--data", help="c4, python (this machine's standard library), or a file or folder of json lines or text (default: c4; toy: python)")
    add("--data_dir", help="where downloads and token files go (default: beside the text, or ./data)")
    add("--data_url", help="where C4's files are, with {} for the name (default: Hugging Face)")
    add("--keep_shards", type=int, help="keep only so many shards on disk (default: all)")
    add("--tokenizer", help="an encoding of tiktoken, or bytes (default: gpt2; toy: bytes)")
    add("--vocab_size", type=int, help="default: the tokenizer's, rounded up to a multiple of 64")
    add("--seq_len", type=int, help="tokens a sequence (default: 256; toy: 128)")
    # optimiser
    add("--galore", action=switch, help="GaLore; without it, full-rank AdamW")
    add("--rank", type=int, help="r (default: the paper's for the size)")
    add("--update_proj_gap", type=int, help="T, steps between refreshes of the subspace (default: 200; 7b: 500; toy: 50)")
    add("--galore_scale", type=float, help="alpha (default: 0.25)")
    add("--muon", action=switch, help="in the subspace the direction is Muon's instead of Adam's: half of the moments, and at toy size a lower loss")
    add("--exact", action=switch, help="the paper to the letter: SVD, moments not turned, all matrices at once; not layer-wise")
    add("--state_bits", type=int, choices=(32, 8), help="of Adam's moments; with 8, of P, too (default: 32; 7b: 8)")
    add("--layerwise", action=switch, help="each weight moves during the backward pass, full gradients are never formed (default: on)")
    add("--lr", type=float, help="peak learning rate (default: 0.01 with GaLore, 7b and toy 0.005; 0.02 with --muon, 7b 0.01; 0.001 without GaLore, from 1b on 0.0005)")
    add("--warmup_steps", type=int, help="default: a tenth of the steps")
    add("--min_lr_ratio", type=float, help="the cosine ends at this share of --lr (default: 0.1)")
    add("--weight_decay", type=float, help="decoupled, of all but norms (default: 0)")
    add("--grad_clipping", type=float, help="clip the global norm of the projected gradients to this (default: 0, no clipping)")
    # length and batch
    add("--steps", type=int, help="default: the paper's for the size; toy: 600")
    add("--total_batch_size", type=int, help="sequences a step, over micro-batches and processes (default: 512; toy: 8)")
    add("--batch_size", type=int, help="sequences a micro-batch (default: the largest power of two that divides the batch and fits into memory by the plan, at most 131,072 tokens; CPU: 8,192)")
    add("--activation_checkpointing", action=switch, help="compute activations again in the backward pass instead of keeping them (default: where nothing fits without)")
    add("--compile", action=switch, help="torch.compile, block by block (default: on a GPU; where it does not work, a line says so and the run goes on without)")
    # run
    add("--eval_every", type=int, help="steps (default: a fifth of all)")
    add("--eval_tokens", type=int, help="validation tokens, always the same first ones (default: 10 million; toy: 65,536)")
    add("--save_every", type=int, help="steps between checkpoints (default: a tenth of all, at most 1000)")
    add("--keep", type=int, help="how many checkpoints stay, the newest (default: 1)")
    add("--out_dir", help="default: out/SIZE-METHOD, numbered if that is taken")
    add("--resume", action="store_true", default=None, help="go on with the run in --out_dir, from its newest checkpoint")
    add("--tensorboard", action=switch, help="what goes to log.jsonl goes to TensorBoard, too (needs the package tensorboard)")
    add("--sample", metavar="PROMPT", help="what the sample at the end begins with")
    add("--seed", type=int, help="of weights and rounding (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--plan", action="store_true", default=None, help="print the memory table and leave")
    return parser


def settle(args: argparse.Namespace, checkpoint: dict | None) -> Config:
    """Fills in what was not given, from the checkpoint or the recipe. ValueError for what cannot be honoured."""
    a = vars(args)
    given, news = {k for k in a if a[k] is not None}, []
    for k, old in (dict(muon=False) | checkpoint["args"] if checkpoint else {}).items():  # a run from before --muon had none
        if k not in a:
            news.append(f"the run had {k} {old}, which this version of train.py does not know: left out")
        elif k not in given:
            a[k] = old
        elif a[k] != old and k in FIXED:
            raise ValueError(f"the run in {args.out_dir} has {k} {old}, not {a[k]}: that cannot change; take another --out_dir")
        elif a[k] != old:
            news.append(f"{k} was {old} and is {a[k]} from here on")
    if checkpoint and "batch_size" not in given and args.total_batch_size % (args.batch_size * world()):
        args.batch_size = None  # was for another total, or another number of processes
    refuse(args.init and not checkpoint and (args.size or args.vocab_size), "--init brings its shape and vocabulary along: leave --size and --vocab_size out")
    args.size = args.size or ("init" if args.init else "toy")
    refuse(args.size not in RECIPES, f"there is no size {args.size!r}; there are {', '.join(SIZES)}")
    recipe = RECIPES[args.size]
    for k in ("rank", "update_proj_gap", "galore_scale", "muon", "exact"):
        refuse(a[k] and not args.galore, f"--{k} has no effect without --galore")
    refuse(args.exact and args.muon, "--exact is the paper to the letter, which has no Muon: leave one of the two out")
    refuse(args.exact and args.layerwise, "--exact takes an SVD of full gradients, which --layerwise never forms: leave one of the two out")

    def default(**values):
        for k, v in values.items():
            a[k] = v if a[k] is None else a[k]

    default(galore=False, muon=False, exact=False, seed=0, steps=recipe["steps"], data=recipe["data"], seq_len=recipe["seq_len"], data_url=C4_URL, keep_shards=0,
            keep=1, tensorboard=False, grad_clipping=0.0, device="cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")  # fmt: skip
    refuse(args.data_url != C4_URL and args.data != "c4", f"--data_url says where C4 is, and has no effect with --data {args.data}")
    kind, gpu = args.device.split(":")[0], args.device.startswith("cuda")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    refuse(not there.get(kind), f"--device {args.device} is not there: torch sees {', '.join(k for k in there if there[k])} here")
    if world() > 1 and args.device == "cuda":
        refuse(LOCAL_RANK >= (count := torch.cuda.device_count()), f"there is no GPU for process {LOCAL_RANK + 1} of this machine: torchrun --nproc_per_node={count}")
        args.device = f"cuda:{LOCAL_RANK}"
    refuse(world() > 1 and kind == "mps", "several processes work on CUDA or CPUs, not on mps: start one")
    default(layerwise=not args.exact, total_batch_size=recipe["total_batch_size"], lr=recipe["muon_lr" if args.muon else "galore_lr" if args.galore else "full_lr"], min_lr_ratio=0.1,
            weight_decay=0.0, state_bits=recipe["state_bits"], eval_tokens=recipe["eval_tokens"],
            dtype="bfloat16" if args.size != "toy" and (gpu or args.plan and "device" not in given) else "float32", compile=gpu,
            tokenizer="bytes" if args.data == "python" else recipe["tokenizer"], sample="def " if args.data == "python" else "The",
            warmup_steps=args.steps // 10, eval_every=max(1, args.steps // 5), save_every=min(max(1, args.steps // 10), 1000))  # fmt: skip
    refuse(args.tensorboard and not find_spec("tensorboard"), "--tensorboard needs a package: pip install tensorboard (log.jsonl has the same without it)")
    if args.galore:
        default(rank=recipe["rank"], update_proj_gap=recipe["update_proj_gap"], galore_scale=0.25)

    for k in ("steps", "seq_len", "total_batch_size", "batch_size", "eval_every", "eval_tokens", "save_every", "keep", "update_proj_gap",
              "lr", "galore_scale", "vocab_size"):  # fmt: skip
        refuse(a[k] is not None and not 0 < a[k] < math.inf, f"--{k} is {a[k]}, but must be above zero, and finite")
    refuse(not 0 <= args.warmup_steps <= args.steps, f"--warmup_steps {args.warmup_steps} must lie between 0 and --steps {args.steps}")
    refuse(not 0 <= args.min_lr_ratio <= 1, f"--min_lr_ratio {args.min_lr_ratio} must lie between 0 and 1")
    for k in ("weight_decay", "grad_clipping"):
        refuse(not 0 <= a[k] < math.inf, f"--{k} is {a[k]}, but must be 0 or more, and finite")
    refuse(not 0 <= args.seed < 2**63, f"--seed {args.seed} must lie between 0 and 2^63 - 1")
    refuse(not args.sample, "--sample is empty: give it at least one letter to begin with")
    refuse(checkpoint and args.steps < checkpoint["step"], f"the run has taken {checkpoint and checkpoint['step']} steps already, more than --steps {args.steps}")

    if checkpoint:
        config = Config(**checkpoint["config"])
    elif args.init:
        config = read_config(Path(args.init))
        refuse(any(Path(args.init).glob("tokenizer*")), f"{args.init} has a tokenizer, which is not read. "
               "If --tokenizer gives the same ids, copy config.json and the weights to another folder.")
    else:
        default(vocab_size=-(-(N_VOCAB.get(args.tokenizer) or get_tokenizer(args.tokenizer).n_vocab) // 64) * 64)
        config = Config(vocab_size=args.vocab_size, max_position_embeddings=max(2048, args.seq_len), **SIZES[args.size])
    args.vocab_size = config.vocab_size
    short = min(config.hidden_size, config.num_key_value_heads * config.head_dim)
    refuse(args.galore and not 0 < args.rank < short, f"--rank {args.rank} must be at least 1 and below {short}, the shortest side of the model's matrices")
    for line in news:
        tell(line)
    return config


def refuse(wrong, sentence: str) -> None:
    if wrong:
        raise ValueError(sentence)


def why_not_compile(device: str) -> str | None:
    """What torch.compile says on the device when it is tried on something small; None if it works."""
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(64, device=device))
    except Exception as error:  # no triton, no C++ compiler, no Python headers, too old a GPU: each has a type of its own
        return f"{type(error).__name__}: {error}".split("\n")[0]


def tell(line: str) -> None:
    """To the user, once, and past the progress bar. A terminal that is gone, or output to a full disk, does not end a run."""
    if RANK == 0:
        with suppress(OSError):
            tqdm.write(line)


# ----- memory, before any of it is taken ----------------------------------------------------------------------------


@cache
def shapes(config: Config) -> tuple[list[torch.Size], list[int], int]:
    """Of the matrices in the blocks; sizes of the other parameters; number of blocks."""
    *blocks, others = galore.param_groups(Llama(config, device="meta"), rank=1)
    return [p.shape for block in blocks for p in block["params"]], [p.numel() for p in others["params"]], len(blocks)


def plan(config: Config, args: argparse.Namespace) -> dict[str, int]:
    """Bytes by kind at the fullest moment of a training step, from shapes alone.

    Weights and state are exact. The rest follows the eager step (a compiled one takes less), moment by moment. It was within 1.1% of
    the real step on fake tensors in 30 cases from 60m up (experiments/memory.py; a test holds 3%); models of two blocks
    or micro-batches of a few tokens have been up to 14% off.
    """
    c, w, r = config, 4 if args.dtype == "float32" else 2, args.rank if args.galore else None
    matrices, rest, n_blocks = shapes(c)
    inside = [r * max(s) if r else s.numel() for s in matrices]  # values of R
    bases = [r * min(s) if r else 0 for s in matrices]  # values of P

    def kept(n: int, wide: int) -> int:
        return n + 4 * -(-n // BLOCK) if args.state_bits == 8 and n >= SMALLEST else wide * n

    # gradients: which there are, and whether they wait for each other
    thin, micro = r and args.layerwise, args.total_batch_size > args.batch_size * world()
    at_once = args.layerwise and not args.grad_clipping  # a weight moves when its last gradient is there
    arriving = inside if thin else [s.numel() for s in matrices]
    at_a_time = max(2, -(-n_blocks // args.update_proj_gap)) if thin else 0  # blocks that are refreshed in a step; early on two
    due = sum(bases[: at_a_time * len(matrices) // n_blocks])  # their Y
    head = c.vocab_size * c.hidden_size
    everything = sum(arriving) + due + sum(rest)
    waiting = everything if micro else 0  # in the forward pass
    late = waiting or (0 if at_once else head)  # when the first block's backward pass begins

    # activations: values a token
    H, F, q, kv = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    inputs = 2 * H if not thin or args.activation_checkpointing else 4 * r + (2 * r if kv >= H else H)  # X or X P of q, k, v; o; gate, up
    block = 2 * H + 2 * q + 2 * kv + 3 * F + inputs
    blocks_kept = H * c.num_hidden_layers if args.activation_checkpointing else block * c.num_hidden_layers + 2 * H * (due > 0)  # X beside X P
    block_again = block - H if args.activation_checkpointing else 0
    tokens = args.batch_size * args.seq_len

    # temporaries: Adam on a slice, N and P; the refresh
    n = max(inside)
    move = 34 * min(n, SLICE) + max(w * (n + max(bases)), 8 * n) * (r is not None)
    move_rest = 34 * min(max(rest), SLICE)
    rows = min(tokens, max(64, CHUNK_LOGITS // c.vocab_size // 64 * 64))
    moments = [  # values of gradients, values of activations a token, bytes of temporaries
        (waiting + head, blocks_kept + 3 * H, (6 if w == 2 else 4) * rows * c.vocab_size),  # the loss
        (head, blocks_kept + 3 * H, move_rest) if at_once and not micro else (0, 0, 0),  # the head moves
        (late, blocks_kept + block_again + H + 2 * F, 0),  # backward through the first block's MLP,
        (late, blocks_kept + block_again + H + F, 9 * n * (due > 0)),  # ... its down projection, due
        (late - head * (late > 0), blocks_kept + block_again + H, move) if at_once else (0, 0, 0),  # ... which moves
        (head + (everything if micro or not at_once else 0), 2 * H, move_rest if at_once else 0),  # the embedding's gradient
        (everything + (sum(inside) if r and not thin and args.grad_clipping else 0), 0, max(move, move_rest)) if not at_once else (0, 0, 0),  # opt.step()
    ]
    gradients, activations, temporaries = max(((w * g, w * a * tokens, t) for g, a, t in moments), key=sum)
    return {
        "weights": w * (sum(s.numel() for s in matrices) + sum(rest)),
        "P": sum(w * n if args.exact else kept(n, w) for n in bases),
        "M, V of the matrices": (1 if args.muon else 2) * sum(kept(n, 4) for n in inside),
        "M, V of embedding, head, norms": 2 * sum(kept(n, 4) for n in rest),
        "gradients": gradients,
        "activations": activations,
        "temporaries": temporaries,
    }


def show_plan(config: Config, args: argparse.Namespace, said: str) -> None:
    """The table of --plan, and what `fit` said; its last line is the peak."""
    ours, theirs = plan(config, args), plan(config, with_(args, galore=False, muon=False, state_bits=32, layerwise=False))
    free = free_memory(args)
    for table in (ours, theirs):
        table["optimiser state: P, M, V"] = sum(n for kind, n in table.items() if kind[0] in "PM")
    tell(f"{'bytes, when they are most':<31}{'this run':>12}{'full-rank AdamW':>18}")
    unit, size = ("GB", 1e9) if peak(config, args) > 1 else ("MB", 1e6)
    for kind in ours:
        tell(f"{kind:<31}{ours[kind] / size:9.3f} {unit}{theirs[kind] / size:15.3f} {unit}")
    where = "no GPU here; a 24 GB card" if args.card else args.device
    tell(f"{accumulation(args)} micro-batch(es) of {args.batch_size} x {args.seq_len} tokens a step; {where} has {free:.2f} GB for it"
         f"{'' if peak(config, args) < free else ': THIS RUN DOES NOT FIT'}")  # fmt: skip
    if said:
        tell(said)
    tell(f"peak {peak(config, args):.2f} GB")


def peak(config: Config, args: argparse.Namespace) -> float:
    """GB."""
    return sum(plan(config, args).values()) / 1e9


def with_(args: argparse.Namespace, **changes) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | changes)


def free_memory(args: argparse.Namespace) -> float:
    """GB that a run may take on the device, of all its devices the fullest; infinite if that cannot be known; for a plan without a GPU, a
    24 GB card's."""
    free = math.inf
    if args.device.startswith("cuda"):
        free = 0.97 * torch.cuda.mem_get_info(args.device)[0] / 1e9  # the rest goes to workspaces of kernels, and to gaps
    elif args.card:
        free = 0.97 * (23.64 * 2**30 - 5e8) / 1e9  # what a 24 GB RTX 4090 shows; half a GB is CUDA's own
    else:
        with suppress(OSError), open("/proc/meminfo") as f:
            # half: malloc keeps much of what is freed (60M, 32 x 256 tokens: 4.2 GB resident, 2.4 planned)
            free = 0.5 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable")) * 1024 / 1e9
            free /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return -highest(-free)


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def highest(value: float) -> float:
    """Of all processes. It goes from host to host: no GPU waits for it."""
    if dist.is_initialized():
        dist.all_reduce(value := torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MAX, group=hosts())
    return float(value)


@cache
def hosts() -> dist.ProcessGroup:
    """Of all processes, with patience for one that waits for its data or for room on the disk; that one died it notices at once."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def fit(config: Config, args: argparse.Namespace, on_this_device: bool) -> str:
    """Chooses micro-batch and checkpointing where that was not done, and says so; refuses what cannot work. ValueError."""
    args.card = args.plan and args.device == "cpu" and not on_this_device
    free = free_memory(args)
    most = max(1, (8192 if args.device == "cpu" and not args.card else 131072) // args.seq_len)  # larger ones bring no more tokens/s
    sizes = [2**i for i in range(17, -1, -1) if args.total_batch_size % (2**i * world()) == 0 and 2**i <= most] or [1]
    sizes = [args.batch_size] if args.batch_size else sizes
    ways = [False, True] if args.activation_checkpointing is None else [args.activation_checkpointing]  # True: a third more arithmetic
    choices = [dict(batch_size=b, activation_checkpointing=way) for way in ways for b in sizes]
    fitting = next((c for c in choices if peak(config, with_(args, **c)) < free), None)
    choice = fitting or choices[len(sizes) - 1]
    chosen = [f"--{k}" + f" {v}" * (v is not True) for k, v in choice.items() if getattr(args, k) is None and v] if fitting else []
    said = f"{' '.join(chosen)}: the largest that divides the batch and fits into {free:.1f} GB, by the plan" if chosen else ""
    vars(args).update(choice)
    refuse(args.total_batch_size % (args.batch_size * world()),
           f"--total_batch_size {args.total_batch_size} is not a multiple of --batch_size {args.batch_size} times {world()} process(es)")  # fmt: skip
    if args.plan:
        return said
    matrices, rest, _ = shapes(config)
    flops = 6 * (sum(s.numel() for s in matrices) + sum(rest)) * args.steps * args.total_batch_size * args.seq_len
    refuse(args.device == "cpu" and not on_this_device and flops > 3e18,
           f"no GPU was found, and on a CPU this run would take about {flops / 1e11 / 3.15e7:,.0f} years: run it where torch sees a GPU, take a "
           f"smaller --size or fewer --steps, or say --device cpu to start all the same (--plan shows the memory it needs)")  # fmt: skip
    if (need := peak(config, args)) > free:
        there, change, r = f"this run needs about {need:.1f} GB and {args.device} has {free:.1f} GB for it", {}, args.rank or 0
        for k, v in ("state_bits", 8), ("batch_size", 1), ("activation_checkpointing", True), ("rank", r // 2), ("rank", r // 4):
            change |= {k: v} if v and getattr(args, k) != v else {}
            words = " ".join(f"--{k}" + f" {v}" * (v is not True) for k, v in change.items())
            refuse(peak(config, with_(args, **change)) < free, f"{there}; with {words} it would fit")
        raise ValueError(f"{there}: take a smaller --size{'' if args.galore else ', or --galore'}")
    return said


# ----- a run's files ------------------------------------------------------------------------------------------------


def save(folder: Path, keep: int, **what) -> bool:
    """Writes checkpoint-STEP.pt beside its name and renames it, then deletes all but the `keep` newest: there is always a whole one.
    Tensors go to disk one at a time, without a copy of them all. A full disk is told, not fatal."""
    path = folder / f"checkpoint-{what['step']:08d}.pt"
    part = folder / "checkpoint.part"  # always this name: what a kill leaves is overwritten by the next
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            torch.save(what | dict(seal=seal(what)), f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
        for old in checkpoints(folder)[:-keep]:
            old.unlink()
        return True
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the first into the second
        with suppress(OSError):
            part.unlink(missing_ok=True)
        tell(f"step {what['step']}: the checkpoint could not be written ({error.__context__ or error}); the one before stays, the next save tries again")
        return False


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("checkpoint-" + 8 * "[0-9]" + ".pt"))  # a checkpoint-best.pt is the user's own


def seal(what: dict) -> int:
    """A checksum of names, values, and of tensors shapes and types. (Of their values the file has one.)"""
    return zlib.crc32(json.dumps(what, default=lambda tensor: f"{tensor.dtype} {tensor.shape}").encode())


def read_checkpoint(folder: str | None) -> dict:
    """The newest one. ValueError if there is none, or not a whole one. The tensors stay on disk until they are used."""
    runs = ", ".join(sorted({str(path.parent) for path in Path("out").glob("*/checkpoint-*.pt")})) or "none in ./out"
    refuse(not folder, f"--resume needs --out_dir, the folder of the run to go on with; there are: {runs}")
    refuse(not checkpoints(Path(folder)), f"{folder} holds no checkpoint-STEP.pt to resume from: leave --resume out to start there")
    *older, path = checkpoints(Path(folder))
    instead = f"delete it to go on from {older[-1].name}" if older else "take another --out_dir to start anew"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        refuse(ZipFile(path).testzip() or checkpoint.pop("seal") != seal(checkpoint), "changed")
        return checkpoint
    except Exception as error:  # a cut file raises anything from EOFError to RuntimeError
        raise ValueError(f"{path} cannot be used ({type(error).__name__}): it was cut short or changed, "
                         f"or is no checkpoint of this version; {instead}") from None


def choose_out_dir(args: argparse.Namespace) -> None:
    """A new run never writes over another. ValueError if the folder asked for holds one."""
    if args.out_dir is None:
        name = f"{args.size}-{f'galore-r{args.rank}' if args.galore else 'adamw'}{'-8bit' if args.state_bits == 8 else ''}"
        names = (name + (f"-{i}" if i > 1 else "") for i in range(1, 10**6))
        args.out_dir = next(f"out/{n}" for n in names if not holds_a_run(Path("out", n)))
    refuse(not args.resume and RANK == 0 and holds_a_run(Path(args.out_dir)),
           f"{args.out_dir} holds a run already: add --resume to go on with it, or take another --out_dir")  # fmt: skip
    refuse(not writable(Path(args.out_dir)), f"--out_dir {args.out_dir} cannot be written: take another")


def lock(folder: str) -> int:
    """Makes the folder, and keeps other processes from training in it for as long as the number returned is not closed. ValueError if one does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise ValueError(f"another process is training in {folder}: wait for its end, or take another --out_dir") from None
    except OSError:  # a file system without locks
        pass
    return number


def holds_a_run(folder: Path) -> bool:
    """More than the first line of a log, which is all that a run leaves if it ends before its first checkpoint."""
    log = folder / "log.jsonl"
    return bool(checkpoints(folder)) or log.exists() and log.read_bytes().count(b"\n") > 1


def writable(folder: Path) -> bool:
    """Could files be written to the folder, or could it be made? (Nothing is made yet.)"""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK)


class Log:
    """log.jsonl, and TensorBoard with it, of the first process. Lines that a full disk does not take wait in memory for the next time.

    At first, and where a resumed run has other arguments, comes a line with all of them; what was written after the checkpoint goes.
    """

    def __init__(self, args: argparse.Namespace, checkpoint: dict | None, parameters: int):
        self.path, self.waiting, self.full, lines = Path(args.out_dir, "log.jsonl"), [], False, []
        self.tensorboard, self.board = args.tensorboard, None
        self.lock = lock(args.out_dir) if RANK == 0 else os.open(os.devnull, os.O_RDONLY)
        if RANK:
            return
        if checkpoint and self.path.exists():
            lines = [line for line in self.path.read_bytes().splitlines(True)[: checkpoint["log_lines"]] if line.endswith(b"\n")]
        if not lines or kept(args) != checkpoint["args"]:
            gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
            versions = dict(python=platform.python_version(), torch=torch.__version__, cpu_threads=torch.get_num_threads(), gpu=gpu, processes=world())
            start = dict(step=checkpoint["step"] if checkpoint else 0, args=vars(args))
            lines.append(json.dumps(start | dict(versions=versions, parameters=parameters)).encode() + b"\n")
        self.path.with_suffix(".part").write_bytes(b"".join(lines))
        self.path.with_suffix(".part").replace(self.path)
        self.lines = len(lines)

    def add(self, **line) -> None:
        if RANK == 0:
            null = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
            self.waiting.append(line | null)  # JSON has no NaN
            self.lines += 1

    def write(self) -> bool:
        """Is everything on disk now?"""
        text = "".join(json.dumps(line) + "\n" for line in self.waiting).encode()
        try:
            if text:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab", buffering=0) as f:
                    end = f.seek(0, os.SEEK_END)
                    try:
                        if f.write(text) < len(text):
                            raise OSError("No space left on device")
                        os.fsync(f.fileno())
                    except OSError:
                        f.truncate(end)
                        raise
            done, self.waiting = self.waiting, []
            if self.tensorboard:
                self.show(done)
            self.full = False
        except OSError as error:
            if not self.full:
                tell(f"{self.path} could not be written ({error}): its lines wait in memory, and checkpoints are not written, until they can be")
            self.full = True
        return not self.waiting

    def show(self, lines: list[dict]) -> None:
        """To TensorBoard. Its writer does not survive a full disk: then there comes another."""
        from torch.utils.tensorboard import SummaryWriter
        try:
            for line in lines:
                self.board = self.board or SummaryWriter(self.path.parent, purge_step=line["step"])
                numbers = line | {f"seconds/{k}": v for k, v in line.get("seconds", {}).items()}
                for k in numbers.keys() - {"step", "seconds"}:
                    self.board.add_scalar(k, math.nan if numbers[k] is None else numbers[k], line["step"])
        except OSError:
            self.board = None


def most_memory(device: torch.device) -> float:
    """GB at the fullest moment so far: of tensors on a GPU, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def kept(args: argparse.Namespace) -> dict:
    return {k: v for k, v in vars(args).items() if k not in PER_START}


# ----- training -----------------------------------------------------------------------------------------------------


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Of step 1, 2, ...: linear warm-up to lr, then cosine to lr * min_lr_ratio at the last step."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def evaluate(model: Llama, val, args: argparse.Namespace, fetch, show) -> dict:
    """Mean loss over the first --eval_tokens validation tokens (nats a token), perplexity, and bits a byte of their text.

    All processes read the same batches, and each takes every so-many-th sequence. `fetch`: see Brake; `show` gets a word on how far it is.
    """
    val.reset()
    total, count = 0.0, 0
    while count < args.eval_tokens:
        try:
            x, y = fetch(lambda: val.batch(max(1, min(args.batch_size * world(), (args.eval_tokens - count) // args.seq_len))))
        except EndOfData:
            break
        x, y, count = x[RANK :: world()], y[RANK :: world()], count + y.numel()
        total += model(x.to(args.device), y.to(args.device)).item() * y.numel() if len(x) else 0.0
        show(f"validation {count / args.eval_tokens:.0%}")
    if world() > 1:
        dist.all_reduce(total := torch.tensor(total, dtype=torch.float64), group=hosts())
    loss = float(total) / count
    return dict(val_loss=loss, perplexity=math.exp(min(loss, 700)), bits_per_byte=loss / math.log(2) / val.bytes_per_token, val_tokens=count)


def prepare(model: Llama, args: argparse.Namespace, checkpoint: dict | None = None) -> galore.GaLoreAdamW:
    """The optimiser, and the model made ready for it, as the arguments say. Both go on from `checkpoint`.

    Raises:
        ValueError: the checkpoint is of another model or another optimiser.
    """
    model.activation_checkpointing = args.activation_checkpointing
    groups = galore.param_groups(model, args.rank, args.update_proj_gap, args.galore_scale) if args.galore else [dict(params=list(model.parameters()))]
    # The rest (embedding, head and norms; without GaLore all): norms do not decay.
    groups += [dict(params=p, weight_decay=args.weight_decay * (p.ndim > 1)) for p in groups.pop()["params"]]
    opt = (galore.Exact if args.exact else galore.GaLoreAdamW)(groups, lr=args.lr, weight_decay=args.weight_decay, state_bits=args.state_bits, max_norm=args.grad_clipping or None,
                             compile=args.compile, seed=args.seed, direction="muon" if args.muon else "adam")  # fmt: skip
    if args.layerwise:
        thin(model, opt, accumulation(args), args.activation_checkpointing)
    if args.compile:
        for block in model.model.layers:
            block.compile(fullgraph=True, dynamic=False)
    if checkpoint:
        refuse(seal(model.state_dict()) != seal(checkpoint["model"]),
               f"the run in {args.out_dir} has other weights than this model.py makes: go back to that one")
        model.load_state_dict(checkpoint.pop("model"))  # pop: a live tensor of the file keeps it on the disk
        groups = [group | dict(t=checkpoint["step"]) for group in opt.state_dict()["param_groups"]]
        opt.load_state_dict(checkpoint.pop("optimizer") | dict(param_groups=groups))  # options as said now
        opt.skipped = torch.tensor(float(checkpoint["skipped"]), device=args.device)
    return opt


def accumulation(args: argparse.Namespace) -> int:
    """Micro-batches a step, in each process."""
    return args.total_batch_size // (args.batch_size * world())


def training_step(model: Llama, opt: galore.GaLoreAdamW, batches, accumulate: int) -> torch.Tensor:
    """A step on `accumulate` micro-batches (x, y); their mean loss, which stays on the device: nothing here waits for it."""
    device, total = model.lm_head.weight.device, 0.0
    for _ in range(accumulate):
        x, y = next(batches)
        loss = model(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) / accumulate
        loss.backward()
        total += loss.detach()
    opt.step()
    opt.zero_grad()
    return total


class Stop(Exception):
    """In all processes at once, where nothing is half done: one of them was asked to end, or cannot go on."""


class Brake:
    """Ends a run between two steps. `asked`: when, by Ctrl-C, SIGTERM or a closed terminal; `problem`: a sentence, or "". While it is
    `idle` (starting, waiting for data or for room on the disk, for hours perhaps) nothing is half done: it is interrupted at once."""

    def __init__(self):
        self.asked, self.problem, self.idle = 0.0, "", True
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants SIGHUP
                signal.signal(number, self.ask)

    def ask(self, number, frame) -> None:
        if not self.asked:
            self.asked = time.monotonic()
            if self.idle:
                raise KeyboardInterrupt
        elif time.monotonic() > self.asked + 2:  # a second one ends the run at once, but not torchrun's echo of the first
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def fetch(self, read):
        """What read() returns, in all processes; or Stop, in all of them."""
        result = None if self.asked else self.interruptible(read)
        if highest(self.asked > 0 or self.problem != ""):
            raise Stop
        return result

    def interruptible(self, function):
        try:
            self.idle = True
            return function()
        except KeyboardInterrupt:  # from `ask`
            pass
        except (ValueError, OSError) as error:
            self.problem = str(error)
        finally:
            self.idle = False


class Stopwatch:
    """Seconds of a step by kind, on the device's own time line: nothing waits for them before they are asked for."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.spans = device.type == "cuda", []

    def now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, kind: str, function):
        def run(*args):
            start = self.now()
            result = function(*args)
            self.spans.append((kind, start, self.now()))
            return result

        return run

    def seconds(self, spans: list) -> dict[str, float]:
        """Of spans of kind "step", "data", "optimiser" and, inside it, "refresh": each without the other, and the rest, "model"."""
        total = dict.fromkeys(("step", "data", "optimiser", "refresh"), 0.0)
        for kind, start, end in spans:
            total[kind] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        total["optimiser"] -= total["refresh"]
        return total | dict(model=total["step"] - total["data"] - total["optimiser"] - total["refresh"])


def train(model: Llama, opt: galore.GaLoreAdamW, args: argparse.Namespace, said: str, checkpoint: dict | None, tokenizer, stream, val, log: Log, brake: Brake) -> None:
    """To the last step, or to where it is asked to end, or has a problem."""
    device, past = torch.device(args.device), checkpoint or dict(step=0, skipped=0, scores={})
    accumulate, step_tokens = accumulation(args), args.total_batch_size * args.seq_len
    step, skipped, scores = (past[k] for k in ("step", "skipped", "scores"))

    # what is going to happen
    n, inside = model.num_parameters(), sum(p.numel() for group in opt.param_groups for p in group["params"] if group["rank"])
    method = f"GaLore, rank {args.rank}, T {args.update_proj_gap}, alpha {args.galore_scale:g}{', Muon' * args.muon}{', exact' * args.exact}" if args.galore else "full-rank AdamW"
    tell(f"{args.size} LLaMA: {n:,} parameters, {inside:,} of them in projected matrices; {args.dtype} on {args.device}, {world()} process(es)")
    tell(f"{method}; {args.state_bits}-bit moments, {'layer-wise update' if args.layerwise else 'one update for all weights'}, clipping {args.grad_clipping or 'off'}")
    tell(f"lr {args.lr:g} after {args.warmup_steps:,} steps of warm-up, cosine to {args.lr * args.min_lr_ratio:g}, weight decay {args.weight_decay:g}")
    tell(f"{args.steps:,} steps of {step_tokens:,} tokens ({accumulate} x {world()} x {args.batch_size} sequences of {args.seq_len}), {args.steps * step_tokens / 1e6:,.2f} M "
         f"in all; data {args.data}, tokenizer {args.tokenizer}, vocabulary {args.vocab_size:,}")  # fmt: skip
    show_plan(model.config, args, said)

    brake.idle = False
    folder, watch = Path(args.out_dir), Stopwatch(device)
    opt.project, opt.move = watch.timed("optimiser", opt.project), watch.timed("optimiser", opt.move)
    fetch = watch.timed("data", brake.fetch)
    bar = tqdm(total=args.steps, initial=step, dynamic_ncols=True, smoothing=0, disable=RANK != 0 or not sys.stderr.isatty(),
               bar_format="{n_fmt}/{total_fmt}, {remaining} left{postfix} {bar}")  # fmt: skip
    start, saved = step, step if checkpoint else -1  # a checkpoint of step 0, too: a run can always be resumed
    began = shown = told = time.perf_counter()
    pending, streak = [], 0  # steps whose numbers are still on the device; how many of the last steps were skipped

    def report() -> None:
        """Writes the pending steps to the log and shows the last one. Only here does the host wait for the device."""
        nonlocal pending, skipped, streak, shown, told
        shown = time.perf_counter()
        if pending:
            numbers = torch.stack([torch.stack([x.float() for x in line.pop("tensors")]) for line in pending]).tolist()
            gigabytes, duration = round(most_memory(device), 3), 0.0
            for line, (loss, norm, count) in zip(pending, numbers):
                streak, skipped = streak + 1 if count > skipped else 0, int(count)
                seconds = watch.seconds(line.pop("spans"))
                duration += (all_of_it := seconds.pop("step"))
                log.add(**line, loss=loss, grad_norm=norm, skipped=skipped, tokens_per_s=round(step_tokens / all_of_it), memory_gb=gigabytes,
                        seconds={k: round(v, 5) for k, v in seconds.items()})  # fmt: skip
            status = f"loss {loss:.3f}, {len(pending) * step_tokens / duration:,.0f} tokens/s, {gigabytes:.2f} GB"
            status += f", {skipped} steps skipped: gradient not finite" * bool(skipped)
            bar.set_postfix_str(status)
            if bar.disable and (step == args.steps or shown - told > min(600, 5 + (shown - began) / 10)):  # to a file: a line now and then
                told, left = shown, (shown - began) / (step - start) * (args.steps - step)
                tell(f"step {step}/{args.steps}: {status}, {tqdm.format_interval(left)} left")
            if streak > PATIENCE:
                brake.problem = f"the gradients of {streak} steps in a row were not finite (in the data, or a learning rate too high)"
        pending = []
        log.write()

    def write_checkpoint(position: dict) -> bool:
        nonlocal saved
        if RANK == 0 and log.write() and save(folder, args.keep, model=model.state_dict(), optimizer=opt.state_dict(), step=step, data=position, skipped=skipped,
                                              scores=scores, log_lines=log.lines, config=asdict(model.config), args=kept(args)):  # fmt: skip
            saved = step
        return saved == step

    postponed = False  # a checkpoint: none is written among skipped steps, so that the newest is from before they began
    try:
        while True:
            last, position = step == args.steps, stream.state_dict()
            evaluating = step > 0 and (last or step % args.eval_every == 0) and scores.get("step") != step
            saving = step > saved and (postponed or step % args.save_every == 0)
            if evaluating or saving or time.perf_counter() - shown > 1:
                report()
            if evaluating:  # before saving: a log that ends with the checkpoint lacks nothing
                scores = dict(step=step, **evaluate(model, val, args, brake.fetch, bar.set_postfix_str))
                log.add(**scores)
                log.write()
                bar.set_postfix_str(f"validation loss {scores['val_loss']:.3f}")
                tell(f"step {step}: validation loss {scores['val_loss']:.4f}")
            if last:
                break
            if saving:
                postponed = streak > 0
                postponed or write_checkpoint(position)
            begun, watch.spans = watch.now(), []
            batches = fetch(lambda: [stream.batch(args.batch_size, RANK, world()) for _ in range(accumulate)])
            for group in opt.param_groups:
                group["lr"] = learning_rate(step + 1, args)
            total = training_step(model, opt, iter(batches), accumulate)
            if world() > 1:
                dist.all_reduce(total.div_(world()))
            step += 1
            spans = [*watch.spans, ("step", begun, watch.now())]
            pending.append(dict(step=step, tokens=stream.seen, lr=group["lr"], tensors=(total, opt.norm, opt.skipped), spans=spans))
            bar.update()
    except Stop:
        report()
    bar.close()
    finished = step == args.steps and scores.get("step") == step
    while RANK == 0 and step > saved and (finished or not streak) and not write_checkpoint(position):
        tell("waiting a minute until the disk takes it (Ctrl-C gives up)")
        if not brake.interruptible(lambda: time.sleep(60) is None):  # asked to stop
            break

    if not finished:
        again = f"to go on from the checkpoint of step {saved}: {'torchrun (as before)' if world() > 1 else 'python'} train.py --resume --out_dir {args.out_dir}"
        tell(f"stopped after step {step}; {again if saved >= 0 else 'there is no checkpoint'}")
    else:
        tell("validation loss {val_loss:.4f} nats a token, perplexity {perplexity:.2f}, {bits_per_byte:.4f} bits a byte, on {val_tokens:,} tokens".format(**scores))
        if math.isfinite(scores["val_loss"]) and RANK == 0:
            prompt = torch.tensor([tokenizer.encode(args.sample).tolist()] * 3, device=device)
            length = max(16, min(200, args.seq_len - prompt.size(1)))  # beyond the positions seen in training text falls apart
            texts = model.generate(prompt, length, temperature=0.5, top_k=50, generator=torch.Generator(device).manual_seed(args.seed))
            tell("sample:\n" + "\n\n".join(tokenizer.decode(text.tolist()) for text in texts))
        tell(f"log: {log.path}   checkpoint: {', '.join(map(str, checkpoints(folder)))}")


def main() -> None:
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed ones are None
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a terminal may lack letters of the sample
    parser, brake = arguments(), Brake()
    args = parser.parse_args()
    args.processes = world()
    on_this_device = args.device is not None
    try:  # whatever can be known to be wrong is said here, before any work
        checkpoint = read_checkpoint(args.out_dir) if args.resume else None
        config = settle(args, checkpoint)
        if world() > 1 and not args.plan:
            if args.device.startswith("cuda"):
                torch.cuda.set_device(args.device)
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        said = fit(config, args, on_this_device)
        if args.plan:
            return show_plan(config, args, said)
        if args.compile and (why := why_not_compile(args.device)):
            args.compile = False
            tell(f"torch.compile does not work here, so nothing is compiled, which is slower but gives the same ({why})")
        choose_out_dir(args)
        same = {k: v for k, v in kept(args).items() if k not in ("data", "data_dir", "compile")}
        same = seal(same | dict(step=checkpoint and checkpoint["step"]))
        refuse(highest(same) + highest(-same), "the processes do not agree: start all with the same arguments; with --resume all must find "
               "the same checkpoint in --out_dir, a folder that they share or a copy of it")  # fmt: skip
        tokenizer = get_tokenizer(args.tokenizer)
        refuse(tokenizer.n_vocab > config.vocab_size, f"a vocabulary of {config.vocab_size:,} is smaller than that of tokenizer {args.tokenizer}, "
               f"{tokenizer.n_vocab:,}: take {'' if args.init else 'a larger --vocab_size or '}another --tokenizer")  # fmt: skip
        tokenizer.encode(args.sample)  # raises now what it would raise after the last step
        where = dict(data_dir=args.data_dir, data_url=args.data_url, keep_shards=args.keep_shards)
        stream = open_data(args.data, tokenizer, "train", args.seq_len, state=checkpoint and checkpoint["data"], **where)
        val = open_data(args.data, tokenizer, "val", args.seq_len, **where)
        refuse((val.tokens[1 : args.eval_tokens + 1] == tokenizer.eot).all(),
               f"the first {args.eval_tokens:,} validation tokens of {args.data} hold no text: take others")
        torch.manual_seed(args.seed)
        dtype = getattr(torch, args.dtype)
        model = Llama.from_pretrained(args.init, dtype).to(args.device) if args.init and not checkpoint else Llama(config, args.device, dtype)
        opt = prepare(model, args, checkpoint)
        log = Log(args, checkpoint, model.num_parameters())
    except (ValueError, OSError) as error:
        time.sleep(3 * bool(RANK))  # the first process speaks for all; when it leaves, torchrun ends the others
        parser.error(str(error))
    train(model, opt, args, said, checkpoint, tokenizer, stream, val, log, brake)
    os.close(log.lock)
    if world() > 1:
        highest(0)  # none leaves before the checkpoint is written: torchrun would end the others
        dist.destroy_process_group()
    if brake.problem:
        time.sleep(3 * bool(RANK))
        parser.exit(2, f"train.py: {brake.problem}\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        tell("interrupted before the first step: there is nothing to save")
    finally:
        sys.stdout = open(os.devnull, "w")  # a line that nothing takes would turn any exit code into 120
