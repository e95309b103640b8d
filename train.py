"""
Pre-train a LLaMA, with GaLore or without.

    python train.py --size toy --data python --galore --rank 64           # two minutes on a CPU, nothing downloaded
    python train.py --size 60m --galore --rank 128 --data DIR             # C4 shards in DIR, or your own text
    python train.py --size 7b --galore --rank 1024                        # C4, downloaded as it goes; one 24 GB GPU
    python train.py --size 7b --galore --rank 1024 --plan                 # what that takes, without taking it
    torchrun --nproc_per_node=2 train.py --size 1b --galore --rank 512    # two GPUs: only rank-r gradients are exchanged

Without --galore the same loop is full-rank AdamW, and with --state_bits 8, 8-bit Adam. What is not given comes from the
paper's recipe for the size (GaLore, arXiv 2403.03507, table 5 and section 5), and is printed before anything starts.

A run lives in --out_dir: log.jsonl (first line: all arguments and versions) and checkpoint.pt. Ctrl-C saves and leaves;
--resume --out_dir DIR goes on, with the arguments of the run where none are given, to the same losses bit for bit (CPU).

Left out on purpose: mixed precision (weights, gradients and activations have one dtype, as in the paper), early stopping,
sweeps, trackers.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import galore
from adam8bit import BLOCK, SMALLEST
from data import C4_URL, EndOfData, get_tokenizer, open_data
from model import CHUNK_LOGITS, SIZES, Config, Llama

# Steps, rank and T of the paper (tables 2 and 5; 7B: section 5.2); 0.01 and 0.001 are its learning rates, 512 x 256 its batch.
PAPER = dict(data="c4", tokenizer="gpt2", seq_len=256, total_batch_size=512, update_proj_gap=200, galore_lr=0.01, full_lr=0.001,
             eval_tokens=10_000_000, state_bits=32, prompt="The")  # fmt: skip
RECIPES = {
    "toy": PAPER | dict(steps=300, rank=64, total_batch_size=16, update_proj_gap=50, data="python", tokenizer="bytes",
                        eval_tokens=100_000, prompt="def "),  # fmt: skip
    "60m": PAPER | dict(steps=10_000, rank=128),
    "130m": PAPER | dict(steps=20_000, rank=256),
    "350m": PAPER | dict(steps=60_000, rank=256),
    "1b": PAPER | dict(steps=100_000, rank=512, full_lr=0.0005),
    "3b": PAPER | dict(steps=120_000, rank=640, full_lr=0.0005),
    "7b": PAPER | dict(steps=150_000, rank=1024, galore_lr=0.005, full_lr=0.0005, update_proj_gap=500, state_bits=8),
    "mobilellm-125m": PAPER | dict(steps=20_000, rank=128),
    "mobilellm-350m": PAPER | dict(steps=60_000, rank=256),
}
FIXED = ("size", "vocab_size", "tokenizer", "seq_len", "galore", "rank", "exact", "state_bits", "dtype", "seed")  # not on resume
GALORE_ONLY = ("rank", "update_proj_gap", "galore_scale", "exact")
N_VOCAB = {"gpt2": 50257, "bytes": 257}  # so that --plan needs no download


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    switch, add = argparse.BooleanOptionalAction, parser.add_argument
    # model
    add("--size", help=f"one of {', '.join(SIZES)} (default: toy)")
    add("--init", metavar="DIR", help="start from a Hugging Face LLaMA folder instead of random weights; takes the place of --size")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights, gradients and activations (default: bfloat16 on a GPU, but for toy)")
    # data
    add("--data", help="c4, python (this machine's standard library), or a file or folder of json lines or text (default: c4; toy: python)")
    add("--data_dir", help="where downloads and token files go (default: beside the text, or ./data)")
    add("--data_url", help="where C4's files are, with {} for the name (default: Hugging Face)")
    add("--keep_shards", type=int, help="keep only so many shards on disk (default: all)")
    add("--tokenizer", help="an encoding of tiktoken, or bytes (default: gpt2; toy: bytes)")
    add("--vocab_size", type=int, help="default: the tokenizer's, rounded up to a multiple of 64")
    add("--seq_len", type=int, help="tokens a sequence (default: 256)")
    # optimiser
    add("--galore", action=switch, help="GaLore; without it, full-rank AdamW")
    add("--rank", type=int, help="r (default: the paper's for the size)")
    add("--update_proj_gap", type=int, help="T, steps between refreshes of the subspace (default: 200; 7b: 500; toy: 50)")
    add("--galore_scale", type=float, help="alpha (default: 0.25)")
    add("--exact", action=switch, help="the paper to the letter: SVD, moments not turned, all matrices at once; not layer-wise")
    add("--state_bits", type=int, choices=(32, 8), help="of Adam's moments (default: 32; 7b: 8)")
    add("--layerwise", action=switch, help="each weight moves during the backward pass, full gradients are never formed (default: on)")
    add("--lr", type=float, help="peak learning rate (default: 0.01 with GaLore, 7b 0.005; 0.001 without, from 1b on 0.0005)")
    add("--warmup_steps", type=int, help="default: a tenth of the steps")
    add("--min_lr_ratio", type=float, help="the cosine ends at this share of --lr (default: 0.1)")
    add("--weight_decay", type=float, help="decoupled (default: 0)")
    add("--grad_clipping", type=float, help="clip the global norm of the projected gradients to this (default: no)")
    # length and batch
    add("--steps", type=int, help="default: the paper's for the size; toy: 300")
    add("--total_batch_size", type=int, help="sequences a step, over micro-batches and processes (default: 512; toy: 16)")
    add("--batch_size", type=int, help="sequences a micro-batch (default: the largest power of two that fits into memory)")
    add("--activation_checkpointing", action=switch, help="compute activations again in the backward pass instead of keeping them")
    add("--compile", action=switch, help="torch.compile, block by block (default: on a GPU)")
    # run
    add("--eval_every", type=int, help="steps (default: a tenth of all)")
    add("--eval_tokens", type=int, help="validation tokens, always the same first ones (default: 10 million; toy: 100,000)")
    add("--save_every", type=int, help="steps between checkpoints (default: a tenth of all, at most 1000)")
    add("--out_dir", help="default: out/SIZE-METHOD, numbered if that is taken")
    add("--resume", action="store_true", help="go on with the run in --out_dir")
    add("--sample", metavar="PROMPT", help="what the sample at the end begins with")
    add("--seed", type=int, help="of weights and rounding (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--plan", action="store_true", help="print the memory table and leave")
    return parser


def settle(args: argparse.Namespace, checkpoint: dict | None) -> Config:
    """Fills in what was not given, from the checkpoint or the recipe. ValueError for what cannot be honoured."""
    a = vars(args)
    given = {k for k, v in a.items() if v is not None}
    if checkpoint:
        for k, old in checkpoint["args"].items():
            if k in FIXED and k in given and a[k] != old:
                raise ValueError(f"the run in {args.out_dir} has {k} {old}, not {a[k]}: that cannot change on resuming; take another --out_dir")
            if k in given and k in a and a[k] != old and k not in ("resume", "out_dir", "plan"):
                tell(f"{k} was {old} and is {a[k]} from here on")
            if k in a and k not in given:
                a[k] = old
    elif args.init:
        if args.size or args.vocab_size:
            raise ValueError("--init brings its own shape and vocabulary: leave --size and --vocab_size out")
        args.size = "init"
    args.size = args.size or "toy"
    if args.size not in RECIPES and args.size != "init":
        raise ValueError(f"there is no size {args.size!r}; there are {', '.join(SIZES)}")
    recipe = RECIPES.get(args.size, PAPER | dict(steps=1000, rank=128))
    if not args.galore:
        for k in GALORE_ONLY:
            if a[k] not in (None, False) and (k in given or not checkpoint):
                raise ValueError(f"--{k} has no effect without --galore")
    if args.exact and args.layerwise:
        raise ValueError("--exact takes an SVD of full gradients, which --layerwise never forms: leave one of the two out")

    def default(**values):
        for k, v in values.items():
            a[k] = v if a[k] is None else a[k]

    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    default(galore=False, exact=False, device="cuda" if torch.cuda.is_available() else "mps" if on_gpu else "cpu", seed=0)
    gpu = args.device.startswith("cuda")
    default(layerwise=not args.exact, steps=recipe["steps"], data=recipe["data"], seq_len=recipe["seq_len"], data_url=C4_URL,
            total_batch_size=recipe["total_batch_size"], lr=recipe["galore_lr" if args.galore else "full_lr"], min_lr_ratio=0.1,
            weight_decay=0.0, state_bits=recipe["state_bits"], eval_tokens=recipe["eval_tokens"], sample=recipe["prompt"],
            dtype="bfloat16" if gpu and args.size != "toy" else "float32", activation_checkpointing=False, keep_shards=0,
            compile=gpu and compiler(args.device), tokenizer="bytes" if args.data == "python" else recipe["tokenizer"])  # fmt: skip
    default(warmup_steps=args.steps // 10, eval_every=max(1, args.steps // 10), save_every=min(max(1, args.steps // 10), 1000))
    if args.galore:
        default(rank=recipe["rank"], update_proj_gap=recipe["update_proj_gap"], galore_scale=0.25)

    if args.data_url != C4_URL and args.data != "c4":
        raise ValueError(f"--data_url is for --data c4, not for {args.data}")
    for k in ("steps", "seq_len", "total_batch_size", "batch_size", "eval_every", "eval_tokens", "save_every", "update_proj_gap", "lr",
              "galore_scale", "grad_clipping"):  # fmt: skip
        if a[k] is not None and not a[k] > 0:
            raise ValueError(f"--{k} is {a[k]}, but must be above zero")
    if not 0 <= args.warmup_steps <= args.steps or not 0 <= args.min_lr_ratio <= 1 or args.weight_decay < 0:
        raise ValueError(f"--warmup_steps {args.warmup_steps} must lie between 0 and --steps {args.steps}, --min_lr_ratio "
                         f"{args.min_lr_ratio} between 0 and 1, and --weight_decay {args.weight_decay} not below 0")  # fmt: skip
    if args.compile and not compiler(args.device):
        raise ValueError("--compile needs a compiler (triton on a GPU, g++ on a CPU) and there is none: leave it out")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here, or torch was installed without CUDA")

    if checkpoint:
        config = Config(**checkpoint["config"])
    elif args.init:
        config = Llama.from_pretrained(args.init).config
    else:
        n_vocab = N_VOCAB.get(args.tokenizer) or get_tokenizer(args.tokenizer).n_vocab
        default(vocab_size=-(-n_vocab // 64) * 64)
        config = Config(vocab_size=args.vocab_size, max_position_embeddings=max(2048, args.seq_len), **SIZES[args.size])
    args.vocab_size = config.vocab_size
    short = min(config.hidden_size, config.num_key_value_heads * config.head_dim)
    if args.galore and not 0 < args.rank < short:
        raise ValueError(f"--rank {args.rank} must be at least 1 and below {short}, the shortest side of the {args.size} model's matrices")
    return config


def compiler(device: str) -> bool:
    """Is there what torch.compile needs?"""
    if device.startswith("cuda"):
        return torch.utils._triton.has_triton()
    return device == "cpu" and any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def tell(line: str) -> None:
    """To the user, once, and past the progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line)


# ----- memory, before any of it is taken ----------------------------------------------------------------------------


def plan(config: Config, args: argparse.Namespace, batch: int) -> dict[str, int]:
    """Bytes of a training step by kind, from shapes alone. State and weights are exact, activations and the rest within
    some percent for the eager model on a GPU.

    Args:
        batch: sequences a micro-batch.
    """
    wide = 4 if args.dtype == "float32" else 2
    with torch.device("meta"):
        model = Llama(config)
    groups = galore.param_groups(model, args.rank) if args.galore else galore.param_groups(model, 1)
    matrices, rest = [p.shape for g in groups[:-1] for p in g["params"]], [p.shape for p in groups[-1]["params"]]
    r = args.rank if args.galore else None

    def moments(n: int) -> int:
        return 2 * (n + 4 * -(-n // BLOCK)) if args.state_bits == 8 and n >= SMALLEST else 8 * n

    # What a step accumulates: all of it if the weights move together at its end, else one layer's at a time.
    G = [wide * (r * max(s) if r and args.layerwise else s.numel()) for s in matrices]
    kept = args.grad_clipping or not args.layerwise or args.total_batch_size > batch * world()
    if r and args.grad_clipping and not args.layerwise:
        G = [g + wide * r * max(s) for g, s in zip(G, matrices)]
    c, tokens = config, batch * args.seq_len
    H, F, q, kv = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    inputs = 3 * min(r, H) + r + 2 * r if r and args.layerwise else 2 * H + q  # what q, k, v; o; gate and up save: X P or X
    block = tokens * wide * (4 * H + 2 * q + 2 * kv + 4 * F + inputs)
    if args.activation_checkpointing:
        block += tokens * wide * H * c.num_hidden_layers
    else:
        block *= c.num_hidden_layers
    largest = max(s.numel() for s in rest)
    return {
        "weights": wide * model.num_parameters(),
        "P": wide * sum(min(s) * r for s in matrices) if r else 0,
        "M, V of the matrices": sum(moments(r * max(s) if r else s.numel()) for s in matrices),
        "M, V of embedding, head, norms": sum(moments(s.numel()) for s in rest),
        "gradients": (sum(G) if kept else max(G)) + wide * sum(s.numel() for s in rest),
        "activations": block + tokens * wide * 2 * H,
        "logits of a chunk": 4 * 2 * min(tokens * c.vocab_size, CHUNK_LOGITS),
        "temporaries of the update": 4 * 6 * largest,
    }  # fmt: skip


def show_plan(config: Config, args: argparse.Namespace) -> None:
    ours = plan(config, args, args.batch_size)
    full = argparse.Namespace(**vars(args) | dict(galore=False, state_bits=32))
    theirs = plan(config, full, args.batch_size)
    tell(f"{'bytes':32}{'this run':>12}{'full-rank AdamW':>18}")
    for kind in ours:
        tell(f"{kind:32}{ours[kind] / 1e9:9.3f} GB{theirs[kind] / 1e9:15.3f} GB")
    tell(f"{'optimiser state (P, M, V)':32}{state_bytes(ours) / 1e9:9.3f} GB{state_bytes(theirs) / 1e9:15.3f} GB")
    free = free_memory(args.device)
    tell(f"free on {args.device}: {free / 1e9:.2f} GB" if free else f"free on {args.device}: unknown")
    tell(f"peak {sum(ours.values()) / 1e9:.2f} GB")


def state_bytes(plan: dict[str, int]) -> int:
    return sum(n for kind, n in plan.items() if kind[0] in "PM")


def free_memory(device: str) -> int:
    """Bytes that can still be taken on the device; 0 if nobody knows."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except OSError:
        return 0


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def fit(config: Config, args: argparse.Namespace, asked_device: bool) -> None:
    """Chooses the micro-batch, and refuses what cannot work, in one sentence. ValueError."""
    if args.batch_size is None:
        free, each = free_memory(args.device) or math.inf, max(1, args.total_batch_size // world())
        most = max(1, (8192 if args.device == "cpu" else 131072) // args.seq_len)  # more brings no more tokens/s
        sizes = [b for b in (2**i for i in range(20)) if each % b == 0 and b <= most]
        args.batch_size = max([b for b in sizes if sum(plan(config, args, b).values()) < 0.95 * free] or [1])
    if args.total_batch_size % (args.batch_size * world()):
        raise ValueError(f"--total_batch_size {args.total_batch_size} is not a multiple of --batch_size {args.batch_size} times {world()} processes")
    if args.plan:
        return
    years = 6 * sum(p.numel() for p in Llama(config, device="meta").parameters()) * args.steps * args.total_batch_size * args.seq_len / 1e11 / 3.15e7
    if args.device == "cpu" and not asked_device and years > 1:
        raise ValueError(f"no GPU was found, and on a CPU this run would take about {years:,.0f} years at 100 GFLOP/s: run it where torch sees a GPU, "
                         f"choose a smaller --size, or say --device cpu to start all the same (--plan shows what it needs)")  # fmt: skip
    need, free = sum(plan(config, args, args.batch_size).values()), free_memory(args.device)
    if free and need > free:
        tries = [("--state_bits 8", dict(state_bits=8)), ("--activation_checkpointing", dict(activation_checkpointing=True))]
        tries += [("--batch_size 1", dict(batch_size=1))] if args.batch_size > 1 else []
        tries += [(f"--rank {args.rank // k}", dict(rank=args.rank // k)) for k in (2, 4, 8)] if args.galore else [("--galore", dict(galore=True, rank=RECIPES["7b"]["rank"]))]
        change, fits = {}, ""
        for flag, values in tries:
            change, fits = change | values, f"{fits} {flag}".strip()
            other = argparse.Namespace(**vars(args) | change)
            if sum(plan(config, other, other.batch_size).values()) < free:
                raise ValueError(f"this run needs about {need / 1e9:.1f} GB and {args.device} has {free / 1e9:.1f} GB free; with {fits} it would fit")
        raise ValueError(f"this run needs about {need / 1e9:.1f} GB and {args.device} has {free / 1e9:.1f} GB free; take a smaller --size")


# ----- a run's files ------------------------------------------------------------------------------------------------


def save(path: Path, **what) -> bool:
    """Writes a checkpoint beside `path` and renames it: there is always a whole one. A full disk is told, not fatal."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as f:
            torch.save(what, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
        return True
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the first into the second
        part.unlink(missing_ok=True)
        tell(f"step {what['step']}: the checkpoint could not be written ({error}); the one before stays, the next save tries again")
        return False


def read_checkpoint(folder: str | None) -> dict:
    """ValueError if there is none, or not a whole one. Tensors stay on disk until they are used."""
    if not folder:
        raise ValueError("--resume needs the --out_dir of the run to go on with; there are: " + (", ".join(sorted(str(p.parent) for p in Path("out").glob("*/checkpoint.pt"))) or "none in ./out"))
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{folder} holds no checkpoint.pt, so there is nothing to resume: leave --resume out to start there")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a cut file raises anything from EOFError to RuntimeError
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is cut short or something else") from None


def choose_out_dir(args: argparse.Namespace) -> Path:
    """A new run never writes over another. ValueError if the folder asked for holds one."""
    if args.out_dir is None:
        name = f"{args.size}-{'galore-r' + str(args.rank) if args.galore else 'adamw'}{'-8bit' if args.state_bits == 8 else ''}"
        taken = (Path("out") / (name + (f"-{i}" if i > 1 else "")) for i in range(1, 10**6))
        args.out_dir = str(next(p for p in taken if not (p / "log.jsonl").exists()))
    elif not args.resume and (Path(args.out_dir) / "log.jsonl").exists():
        raise ValueError(f"{args.out_dir} holds a run already: add --resume to go on with it, or take another --out_dir")
    return Path(args.out_dir)


# ----- training -----------------------------------------------------------------------------------------------------


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to lr, then cosine to lr * min_lr_ratio at the last step."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def evaluate(model: Llama, val, args: argparse.Namespace) -> dict:
    """Mean loss over the first --eval_tokens validation tokens (nats a token), perplexity, and bits a byte of their text."""
    val.reset()
    total, count = 0.0, 0
    while count < args.eval_tokens:
        try:
            x, y = val.batch(max(1, min(args.batch_size, (args.eval_tokens - count) // args.seq_len)))
        except EndOfData:
            break
        total += model(x.to(args.device), y.to(args.device)).double() * y.numel()
        count += y.numel()
    loss = float(total) / count
    return dict(val_loss=loss, perplexity=math.exp(loss), bits_per_byte=loss / math.log(2) / val.bytes_per_token, val_tokens=count)


def train(args: argparse.Namespace, config: Config, checkpoint: dict | None, tokenizer, stream, val) -> None:
    # model and optimiser
    rank, device, dtype = int(os.environ.get("RANK", 0)), torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    if args.init and not checkpoint:
        model = Llama.from_pretrained(args.init, dtype).to(device)
    else:
        model = Llama(config, device, dtype)
    model.activation_checkpointing = args.activation_checkpointing
    accumulate = args.total_batch_size // (args.batch_size * world())
    groups = galore.param_groups(model, args.rank, args.update_proj_gap, args.galore_scale) if args.galore else model.parameters()
    opt = galore.GaLoreAdamW(groups, lr=args.lr, weight_decay=args.weight_decay, state_bits=args.state_bits, max_norm=args.grad_clipping,
                             exact=args.exact, compile=args.compile, seed=args.seed)  # fmt: skip
    if args.layerwise:
        galore.thin(model, opt, accumulate)
    if args.compile:
        for block in model.model.layers:
            block.compile(fullgraph=True, dynamic=False)
    start = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        fresh = [{k: v for k, v in group.items() if k not in ("params", "t")} for group in opt.param_groups]
        opt.load_state_dict(checkpoint["optimizer"])
        for group, options in zip(opt.param_groups, fresh):  # what the arguments say now stands
            group.update(options)
        start = checkpoint["step"]
        torch.set_rng_state(checkpoint["random"])

    # what will happen
    n, projected = model.num_parameters(), sum(p.numel() for g in opt.param_groups for p in g["params"] if g["rank"])
    method = f"GaLore r={args.rank}, T={args.update_proj_gap}, alpha={args.galore_scale:g}{', exact' if args.exact else ''}, " if args.galore else "full-rank AdamW, "
    tell(f"{args.size} LLaMA: {n:,} parameters, {projected:,} of them projected; {args.dtype} on {args.device}, {world()} process(es)")
    tell(f"{method}{args.state_bits}-bit moments, {'layer-wise' if args.layerwise else 'all weights at once'}, lr {args.lr:g} after {args.warmup_steps} steps of "
         f"warm-up, cosine to {args.lr * args.min_lr_ratio:g}, weight decay {args.weight_decay:g}, clipping {args.grad_clipping or 'off'}")  # fmt: skip
    step_tokens = args.total_batch_size * args.seq_len
    tell(f"{args.steps:,} steps of {step_tokens:,} tokens ({args.batch_size} sequences of {args.seq_len} x {accumulate} micro-batches x {world()}), "
         f"{args.steps * step_tokens / 1e6:,.1f} M in all; data {args.data}, tokenizer {args.tokenizer}, vocabulary {config.vocab_size:,}")  # fmt: skip
    show_plan(config, args)

    # log: the lines up to the checkpoint, then ours
    out, lines = Path(args.out_dir), []
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if checkpoint:
            old = (out / "log.jsonl").read_text().splitlines(True)
            lines = [line for line in old if line.endswith("\n") and json.loads(line).get("step", 0) <= start]
        versions = dict(python=platform.python_version(), torch=torch.__version__, cpu_threads=torch.get_num_threads(),
                        gpu=torch.cuda.get_device_name() if device.type == "cuda" else None)  # fmt: skip
        lines.insert(0, json.dumps(dict(args=vars(args), versions=versions, parameters=n)) + "\n") if not lines else None
        (out / "log.part").write_text("".join(lines))
        (out / "log.part").replace(out / "log.jsonl")
        log = open(out / "log.jsonl", "a", buffering=1)

    def write(**line):
        if rank == 0:
            log.write(json.dumps(line) + "\n")

    stop = []
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

    def checkpoint_now(step):
        return rank != 0 or save(out / "checkpoint.pt", model=model.state_dict(), optimizer=opt.state_dict(), step=step, data=stream.state_dict(),
                                 args=vars(args), config=asdict(config), random=torch.get_rng_state())  # fmt: skip

    pending, shown = [], time.perf_counter()  # losses stay on the device until they are printed
    bar = tqdm(total=args.steps, initial=start, dynamic_ncols=True, disable=rank != 0 or not sys.stderr.isatty())
    for step in range(start, args.steps):
        lr = learning_rate(step, args)
        for group in opt.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=device)
        for _ in range(accumulate):
            x, y = stream.batch(args.batch_size, rank, world())
            loss = model(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) / accumulate
            loss.backward()
            total += loss.detach()
        opt.step()
        opt.zero_grad()
        if world() > 1:
            dist.all_reduce(total.div_(world()))
        pending.append((step + 1, total, lr))
        bar.update()

        last = step + 1 == args.steps or stop
        if last or (step + 1) % 10 == 0:
            losses = torch.stack([loss for _, loss, _ in pending]).tolist()
            speed = len(pending) * step_tokens / (time.perf_counter() - shown)
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            for (k, _, rate), value in zip(pending, losses):
                write(step=k, tokens=k * step_tokens, loss=value, lr=rate)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s, {memory / 1e9:.2f} GB" + (f", {int(opt.skipped)} skipped" if opt.skipped else ""))
            if bar.disable and (last or (step + 1) % max(10, args.steps // 200 * 10) == 0):
                tell(f"step {step + 1}/{args.steps}: loss {losses[-1]:.3f}, {speed:,.0f} tokens/s, {memory / 1e9:.2f} GB, {int(opt.skipped)} steps skipped")
            pending, shown = [], time.perf_counter()
        if (step + 1) % args.save_every == 0 or last:
            checkpoint_now(step + 1)
        if stop:
            bar.close()
            tell(f"stopped after step {step + 1} and saved; to go on: python {' '.join(sys.argv)}{'' if args.resume else f' --resume --out_dir {args.out_dir}'}")
            return
        if (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            scores = evaluate(model, val, args)
            write(step=step + 1, **scores)
            tell(f"step {step + 1}: validation loss {scores['val_loss']:.4f}")
            shown = time.perf_counter()
    bar.close()

    scores = evaluate(model, val, args)
    write(step=args.steps, **scores)
    tell(f"validation loss {scores['val_loss']:.4f} nats a token, perplexity {scores['perplexity']:.2f}, {scores['bits_per_byte']:.4f} bits a byte, "
         f"over {scores['val_tokens']:,} tokens; steps skipped: {int(opt.skipped)}")  # fmt: skip
    prompt = torch.tensor([tokenizer.encode_batch([args.sample])[0].tolist()], device=device)
    random = torch.Generator(device).manual_seed(args.seed)
    tell("sample:\n" + tokenizer.decode(model.generate(prompt, 400, temperature=0.8, top_k=50, generator=random)[0].tolist()))
    tell(f"log: {out / 'log.jsonl'}   checkpoint: {out / 'checkpoint.pt'}")


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    asked_device = args.device is not None
    try:  # everything that can be known to be wrong is said here, before any work
        checkpoint = read_checkpoint(args.out_dir) if args.resume else None
        config = settle(args, checkpoint)
        fit(config, args, asked_device)
        if args.plan:
            return show_plan(config, args)
        choose_out_dir(args)
        tokenizer = get_tokenizer(args.tokenizer)
        if tokenizer.n_vocab > config.vocab_size:
            raise ValueError(f"the vocabulary of {config.vocab_size} is smaller than that of tokenizer {args.tokenizer}, {tokenizer.n_vocab}: take a larger --vocab_size or another --tokenizer")
        where = dict(data_dir=args.data_dir, data_url=args.data_url, keep_shards=args.keep_shards)
        stream = open_data(args.data, tokenizer, "train", args.seq_len, **where, state=checkpoint and checkpoint["data"])
        val = open_data(args.data, tokenizer, "val", args.seq_len, **where)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if world() > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    train(args, config, checkpoint, tokenizer, stream, val)
    if world() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
