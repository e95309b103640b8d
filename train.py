"""Pre-train a LLaMA, with GaLore or without.

    python train.py --size toy --galore --direction muon                  # minutes on a CPU, no download
    python train.py --size 60m --galore --rank 128 --data DIR             # C4's shards in DIR, or your text
    python train.py --size 7b --galore --rank 1024                        # C4 as it goes; one 24 GB GPU
    python train.py --size 7b --galore --rank 1024 --plan                 # what that takes, without taking it
    torchrun --nproc_per_node=2 train.py --size 1b --galore --rank 512    # exchanges rank-r gradients

Without --galore it is full-rank AdamW, and with --state_bits 8, 8-bit Adam. What is not typed comes from the
paper's recipe (GaLore, arXiv 2403.03507, table 5 and section 5). `--size 7b --help` shows 7b's values.

A run lives in --out_dir: log.jsonl and checkpoint-STEP.pt (plumbing/files.py). Ctrl-C, SIGTERM and a closed
terminal save and leave. --resume --out_dir DIR goes on from the newest checkpoint, with the run's arguments
and any number of processes. The losses are the same: bit for bit on a CPU with as many processes.

Left out on purpose: mixed precision (weights, gradients and activations have one dtype, as in the paper),
early stopping, sweeps, trackers.
"""
import argparse
import math
import os
import sys
import time
from argparse import BooleanOptionalAction as switch
from contextlib import closing, redirect_stdout, suppress
from dataclasses import asdict, replace
from pathlib import Path

# Both must stand before torch is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # no gaps in a full GPU
if "OMP_WAIT_POLICY" not in os.environ:  # on a busy CPU a spinning thread holds up the one it waits for
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
import torch.distributed as dist
from tqdm import tqdm

from adam8bit import check
from data import C4_URL, EndOfData, Stream, get_tokenizer
from galore import DIRECTIONS, Exact, GaLoreAdamW, average, param_groups
from model import SIZES, Config, Llama
from plumbing.files import (Brake, Forgiving, Log, Stop, free_folder, holds_a_run, most_memory, over_all,
                            read_checkpoint, save, seal, within, world)
from plumbing.hf import read_config
from plumbing.memory import fit, peak
from plumbing.sample import go_on
from plumbing.shards import LOCAL_RANK, RANK, tell
from plumbing.tokenizer import keep_files
from thin import thin

# The paper's tables 2 and 5, for 7B section 5.2; its batch is 512 x 256. A size that is not in RECIPES has a
# quarter of its width as rank. lr: of Adam and Muon in the subspace (Muon: at toy size only), at full rank.
PAPER = dict(data="c4", tokenizer="gpt2", seq_len=256, total_batch_size=512, steps=10_000,
             update_proj_gap=200, galore_scale=0.25, state_bits=32, offload=False, eval_tokens=10_000_000,
             lr=(0.01, 0.02, 0.001))
RECIPES = {
    "toy": dict(data="python", tokenizer="bytes", total_batch_size=8, steps=740, rank=128, update_proj_gap=50,
                eval_tokens=65_536, lr=(0.005, 0.03, 0.001)),
    "60m": dict(rank=128),
    "130m": dict(steps=20_000, rank=256),
    "350m": dict(steps=60_000, rank=256),
    "1b": dict(steps=100_000, rank=512, lr=(0.01, 0.02, 0.0005)),
    "3b": dict(steps=120_000, rank=640, lr=(0.01, 0.02, 0.0005)),
    "7b": dict(steps=150_000, rank=1024, update_proj_gap=500, state_bits=8, offload=True,
               lr=(0.005, 0.01, 0.0005)),
    "mobilellm-125m": dict(steps=20_000, rank=128),
    "mobilellm-350m": dict(steps=60_000, rank=256),
    "init": dict(seq_len=1024, total_batch_size=64, steps=1000, rank=128, eval_tokens=1_000_000,
                 galore_scale=4.0, lr=(0.00003, 0.00003, 0.0001)),  # --init (Muon's is not measured)
}
FIXED = ("init", "size", "vocab_size", "tokenizer", "seq_len", "galore", "rank", "direction", "exact",
         "state_bits", "weight_bits", "dtype", "seed")  # cannot change on --resume
PER_START = ("resume", "out_dir", "plan", "device", "automatic")  # not taken over from a checkpoint
AUTOMATIC = ("batch_size", "recompute", "compile")  # chosen anew at each start, unless typed


# ----- the command line -------------------------------------------------------------------------------------

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def arguments() -> argparse.ArgumentParser:
    """All options, with no defaults yet. So --help, which shows them, comes later."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, allow_abbrev=False, add_help=False,
        usage="python train.py [options]   (--help explains them)")
    add = lambda name, help, **how: parser.add_argument(name, help=help, **how)  # noqa: E731
    count, rate = within(1), within(1e-18)
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    # model
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--size", choices=SIZES, help="of the model, from random weights")
    one.add_argument("--init", metavar="DIR", help="a Hugging Face LLaMA folder to start from")
    add("--dtype", "of weights, gradients and activations", choices=("float32", "bfloat16"))
    # data
    add("--data", "c4, python (this machine's library), or a file or folder of json lines or text")
    add("--data_dir", "for downloads and token files (default: beside the text, or ./data)")
    add("--data_url", "where C4's files are, with {} for the name")
    add("--keep_shards", "keep only so many shards on disk; 0: all", type=within(0))
    add("--tokenizer", "bytes, an encoding of tiktoken, or a Hugging Face folder (with --init: its own)")
    add("--vocab_size", "default: the tokenizer's, rounded up to a multiple of 64", type=count)
    add("--seq_len", "tokens per sequence", type=count)
    # optimiser
    add("--galore", "GaLore; without it, full-rank AdamW", action=switch)
    add("--rank", "r", type=count)
    add("--update_proj_gap", "T, steps between refreshes of the subspace", type=count)
    add("--galore_scale", "alpha", type=rate)
    add("--direction", "whose step is taken in the subspace", choices=DIRECTIONS)
    add("--exact", "the paper to the letter: SVD, moments not rotated; not layer-wise", action=switch)
    add("--state_bits", "of Adam's moments; with 8, of P, too", type=int, choices=(32, 8))
    add("--offload", "keep the state of matrices without a rank in host memory", action=switch)
    add("--weight_bits", "of the blocks' matrices (default: as --dtype)", type=int, choices=(8,))
    add("--layerwise", "move each weight in the backward pass, form no full gradient", action=switch)
    add("--lr", "peak learning rate", type=rate)
    add("--warmup_steps", "of linear warm-up", type=within(0))
    add("--min_lr_ratio", "the cosine ends at this share of --lr", type=within(0.0, 1))
    add("--weight_decay", "decoupled, of all but norms", type=within(0.0))
    add("--grad_clipping", "of the projected gradients' norm; 0: none", type=within(0.0))
    # length and batch
    add("--steps", "of the whole run", type=count)
    add("--total_batch_size", "sequences per step, over micro-batches and processes", type=count)
    add("--batch_size", "sequences per micro-batch (default: the fastest that fits)", type=count)
    add("--recompute", "blocks whose activations are computed again in the backward pass, not kept (default: "
        "the fastest that fits)", type=within(0))
    add("--compile", "torch.compile, block by block", action=switch)
    # run
    add("--eval_every", "steps", type=count)
    add("--eval_tokens", "of validation, always the same first ones", type=count)
    add("--save_every", "steps between checkpoints", type=count)
    add("--keep", "how many checkpoints stay, the newest", type=count)
    add("--out_dir", "default: out/SIZE-METHOD, numbered if that is taken")
    add("--resume", "go on with the run in --out_dir", action="store_true")
    add("--seed", "of weights and rounding", type=within(0, 2**63 - 1))
    add("--device", "of those there are", choices=there, default=there[0])
    add("--plan", "print the memory that a step takes, and leave", action="store_true")
    return parser


def defaults(said) -> dict:
    """The recipe of the size, and what follows from the options that were said."""
    size, gpu = said.size or ("init" if said.init else "toy"), said.device == "cuda"
    recipe = PAPER | (RECIPES.get(size) or dict(rank=SIZES[size]["hidden_size"] // 4))
    data, steps = said.data or recipe["data"], said.steps or recipe["steps"]
    adam, muon, full = recipe["lr"]
    if data == "python":
        recipe["tokenizer"] = "bytes"
    if said.init:
        recipe["tokenizer"] = os.path.join(".", said.init)  # ./gpt2 is a folder, gpt2 an encoding
    return recipe | dict(
        size=size, dtype="bfloat16" if size != "toy" and (gpu or said.plan) else "float32", data=data,
        data_url=C4_URL, keep_shards=0, galore=False, direction="adam", exact=False, layerwise=not said.exact,
        lr=(muon if said.direction == "muon" else adam) if said.galore else full, weight_decay=0.0,
        offload=bool(recipe["offload"] and said.galore), warmup_steps=steps // 10, min_lr_ratio=0.1,
        grad_clipping=0.0, compile=gpu or said.plan, seed=0, keep=1,
        eval_every=max(1, steps // 5), save_every=min(max(1, steps // 10), 1000))


def settle(words: list[str] | None = None) -> tuple[argparse.Namespace, Config, dict]:
    """Arguments, shape and checkpoint, a blank one for a new run. The recipe, over it the checkpoint, over it
    what was typed: parsed to find the run, then to choose the recipe, then with that as defaults. SystemExit
    or ValueError for what cannot be honoured."""
    parser = arguments()
    checkpoint = dict(step=0, skipped=0, scores={}, log_lines=0, data=None, args={})
    typed, _ = parser.parse_known_args(words)
    empty = [name for name, value in vars(typed).items() if value == ""]
    check(not empty, f"no value for --{', --'.join(empty)}")
    if typed.resume:
        check(typed.out_dir, "--resume needs --out_dir, the folder of the run")
        checkpoint = read_checkpoint(Path(typed.out_dir))
    run, step = checkpoint["args"], checkpoint["step"]
    old = {k: v for k, v in run.items() if k in typed and v is not None}
    said, _ = parser.parse_known_args(words, argparse.Namespace(**old))
    parser.set_defaults(**defaults(said) | old)
    parser.add_argument("-h", "--help", action="help", help="show this and leave")
    args = parser.parse_args(words)
    args.automatic = {k: getattr(said, k) for k in AUTOMATIC}
    if not typed.batch_size and args.batch_size and args.total_batch_size % (args.batch_size * world()):
        args.batch_size = None  # was for another total, or another number of processes

    for k in (k for k in FIXED if k in run):
        check(run[k] == getattr(args, k), f"{k} was {run[k]} and is {getattr(args, k)}: that cannot change "
              f"in the run in {args.out_dir}; take another --out_dir")
    for k in ("rank", "update_proj_gap", "galore_scale", "direction", "exact"):
        check(args.galore or not getattr(typed, k), f"--{k} has no effect without --galore")
    check(args.data == "c4" or not typed.data_url, f"--data_url has no effect with --data {args.data}")
    check(not args.exact or not args.layerwise, "--exact needs full gradients: leave --layerwise out")
    check(not args.weight_bits or args.galore and args.layerwise, "--weight_bits 8 needs --galore, and full "
          "gradients cannot move such weights: leave --exact and --no-layerwise out")
    check(not args.exact or args.direction == "adam", "--exact is the paper to the letter: drop --direction")
    check(args.warmup_steps <= args.steps, f"--warmup_steps {args.warmup_steps} exceeds --steps {args.steps}")
    check(args.total_batch_size % (at_once := (args.batch_size or 1) * world()) == 0, f"--total_batch_size "
          f"{args.total_batch_size} is no multiple of {at_once}, --batch_size times processes")
    check(step <= args.steps, f"the run has taken {step} steps, more than --steps {args.steps}")
    if args.resume:
        config = Config(**checkpoint["config"])
    elif args.init:
        config = read_config(Path(args.init))
        check(not args.vocab_size, "--init brings its vocabulary along: leave --vocab_size out")
        if typed.tokenizer and Path(args.init, "tokenizer.json").exists():
            ours, theirs = map(get_tokenizer, (args.tokenizer, os.path.join(".", args.init)))
            check((ours.pieces, ours.bos, ours.eot) == (theirs.pieces, theirs.bos, theirs.eot),
                  f"--tokenizer {args.tokenizer} has other ids than {args.init} was trained on; leave it out")
    else:  # gpt2's size is said here, so that --plan needs no download
        tokens = 50257 if args.tokenizer == "gpt2" else get_tokenizer(args.tokenizer).n_vocab
        vocab, positions = args.vocab_size or -(-tokens // 64) * 64, max(2048, args.seq_len)
        config = Config(vocab, max_position_embeddings=positions, **SIZES[args.size])
    short = min(config.hidden_size, config.num_key_value_heads * config.head_dim)
    check(not args.galore or args.rank < short, f"--rank {args.rank} is not below {short}, the shortest side")
    args.vocab_size = config.vocab_size
    return args, config, checkpoint


# ----- training ---------------------------------------------------------------------------------------------

def learning_rate(step: int, args, peak: float) -> float:
    """Of step 1, 2, ...: linear warm-up to `peak`, then a cosine to peak * min_lr_ratio at the last step.
    done: a share of the steps after warm-up."""
    if step <= args.warmup_steps:
        return peak * step / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return peak * (args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def prepare(model: Llama, args, checkpoint: dict | None = None) -> GaLoreAdamW:
    """The optimiser, and the model made ready for it. Both go on from `checkpoint`. The lr of a group is its
    peak: args.lr, unless it brings its own. ValueError for the checkpoint of another model or optimiser."""
    model.recompute = args.recompute
    groups = [dict(params=list(model.parameters()))]
    if args.galore:
        groups = param_groups(model, args.rank, args.update_proj_gap, args.galore_scale)
    # The last group: embedding, head and norms; without GaLore all. Norms do not decay.
    groups += [dict(params=p, weight_decay=args.weight_decay * (p.ndim > 1)) for p in groups.pop()["params"]]
    opt = (Exact if args.exact else GaLoreAdamW)(
        groups, lr=args.lr, weight_decay=args.weight_decay, state_bits=args.state_bits, seed=args.seed,
        max_norm=args.grad_clipping or None, direction=args.direction, offload=args.offload,
        compile=args.compile)
    for group in opt.param_groups:
        group["peak_lr"] = group["lr"]
    if args.layerwise:
        thin(model, opt, accumulation(args), args.weight_bits, args.device if args.weight_bits else None)
    if args.compile:
        model.compile_blocks()
    if checkpoint:
        check(seal(model.state_dict()) == seal(checkpoint["model"]),
              f"the run in {args.out_dir} has other weights than this model.py makes: go back")
        model.load_state_dict(checkpoint.pop("model"))  # pop: a live tensor of the file keeps it on the disk
        groups = [group | dict(t=checkpoint["step"]) for group in opt.state_dict()["param_groups"]]
        opt.load_state_dict(checkpoint.pop("optimizer") | dict(param_groups=groups))  # options as said now
        opt.skipped = torch.tensor(float(checkpoint["skipped"]), device=args.device)
    return opt


def accumulation(args) -> int:
    """Micro-batches per step, in each process."""
    return args.total_batch_size // (args.batch_size * world())


def plan(args, config: Config, batch_size: int, run=peak):
    """A function of how many blocks recompute, to GB by kind at the fullest moment of a step, simulated."""
    total = min(args.total_batch_size, 3 * batch_size * world())  # a first, a middle, a last micro-batch

    def build(recompute, keep):
        these = argparse.Namespace(**vars(args) | dict(
            batch_size=batch_size, total_batch_size=total, recompute=recompute, compile=False, device="meta"))
        model = Llama(replace(config, num_hidden_layers=recompute + keep), "meta", getattr(torch, args.dtype))
        return model, prepare(model, these), accumulation(these)

    return run(build, training_step, config.num_hidden_layers, args.update_proj_gap,
               (batch_size, args.seq_len), args.compile)


def training_step(model: Llama, opt: GaLoreAdamW, batches, accumulate: int) -> torch.Tensor:
    """A step on `accumulate` micro-batches (x, y). Their mean loss stays on the device: nothing waits."""
    device, total = model.lm_head.weight.device, 0.0
    for _ in range(accumulate):
        x, y = (ids.to(device, non_blocking=True) for ids in next(batches))
        loss = model(x, y) / accumulate
        loss.backward()
        total += loss.detach()
    opt.step()
    opt.zero_grad()
    return total


@torch.no_grad()
def evaluate(model: Llama, val, args, fetch) -> dict:
    """Mean loss in nats per token on the first --eval_tokens validation tokens, perplexity, bits per byte.
    Each process takes every so-many-th sequence of the same batches. fetch: see Brake."""
    val.reset()
    total, count = 0.0, 0
    with suppress(EndOfData):
        while count < args.eval_tokens:
            sequences = max(1, min(args.batch_size * world(), (args.eval_tokens - count) // args.seq_len))
            x, y = fetch(lambda: val.batch(sequences))  # noqa: B023
            x, y, count = x[RANK :: world()], y[RANK :: world()], count + y.numel()
            total += model(x.to(args.device), y.to(args.device)).item() * y.numel() if len(x) else 0.0
    loss = over_all(total, dist.ReduceOp.SUM) / count
    return dict(val_loss=loss, perplexity=math.exp(min(loss, 700)), val_tokens=count,
                bits_per_byte=loss / math.log(2) / val.bytes_per_token)


def train(model, opt, args, checkpoint: dict, stream, val, log: Log, brake: Brake) -> dict | None:
    """Returns the validation of the end, or None where the run was stopped before, or had a problem."""
    step, skipped, scores = map(checkpoint.get, ("step", "skipped", "scores"))
    saved = tried = step if args.resume else -1  # the newest checkpoint, the last try; step 0 is saved, too
    streak, accumulate = 0, accumulation(args)
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=RANK > 0, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 60)  # into a file it goes seldom
    brake.idle = False

    def save_now() -> int:
        done = step > saved and log.write() and save(
            Path(args.out_dir), args.keep, model=model.state_dict(), optimizer=opt.state_dict(), step=step,
            data=position, skipped=skipped, scores=scores, log_lines=log.lines, config=asdict(model.config),
            args=kept(args))
        return step if done else saved

    with bar, suppress(Stop):
        while True:
            position = stream.state_dict()
            due = step == args.steps or step % args.eval_every == 0 and (step or args.init)
            if due and scores.get("step") != step:
                scores = dict(step=step, **evaluate(model, val, args, brake.fetch))
                log.write(scores)
                tell("step {step}: validation loss {val_loss:.4f}, perplexity {perplexity:.2f}, "
                     "{bits_per_byte:.4f} bits per byte".format(**scores))
            if step == args.steps:
                break
            # Not among skipped steps: the newest one is from before them.
            if step // args.save_every > tried // args.save_every and not streak:
                tried, saved = step, save_now()
            batches = brake.fetch(lambda: [stream.batch(args.batch_size, RANK, world())
                                           for _ in range(accumulate)])
            begun = time.perf_counter()
            for group in opt.param_groups:
                group["lr"] = learning_rate(step + 1, args, group["peak_lr"])
            loss = average(training_step(model, opt, iter(batches), accumulate))
            step += 1
            # Here, and only here, the host waits for the device.
            loss, norm, bad = torch.stack([x.float() for x in (loss, opt.norm, opt.skipped)]).tolist()
            streak, skipped = streak + 1 if bad > skipped else 0, int(bad)
            rate = args.total_batch_size * args.seq_len / (time.perf_counter() - begun)
            line = dict(step=step, tokens=stream.seen, loss=loss, lr=learning_rate(step, args, args.lr),
                        grad_norm=norm, tokens_per_s=round(rate), skipped=skipped,
                        memory_gb=round(most_memory() / 1e9, 3))
            log.write(line)
            bar.set_postfix_str("loss {loss:.3f}, {tokens_per_s:,} tokens/s, {memory_gb:.2f} GB, "
                                "{skipped} skipped".format(**line), refresh=False)
            bar.update()
            if streak > 20:
                brake.problem = f"the gradients of {streak} steps in a row were not finite: try a lower --lr"
                raise Stop
    saved = saved if streak > 20 else save_now()
    if saved < step and not brake.problem:
        brake.problem, brake.code = f"the checkpoint of step {step} could not be written", 1
    if scores.get("step") == args.steps:
        return scores
    tell(f"stopped after step {step}; " + ("there is no checkpoint" if saved < 0 else
         f"to go on from the checkpoint of step {saved}: python train.py --resume --out_dir {args.out_dir}"))


def kept(args) -> dict:
    """What goes into a checkpoint. What was chosen for this machine does not."""
    return {k: v for k, v in vars(args).items() if k not in PER_START} | args.automatic


def begin(args, config: Config, checkpoint: dict) -> tuple:
    """Model, optimiser, data, validation data, log. What can be known to be wrong is said first."""
    tokens = args.steps * args.total_batch_size * args.seq_len
    years = 2e-18 * Llama(config, "meta").num_parameters() * tokens  # 6 operations each, 1e11 a second
    check(args.device != "cpu" or years < 1, "no GPU was found, and on a CPU this would take about "
          f"{years:,.0f} years: take a smaller --size or fewer --steps")
    method = (f"galore-r{args.rank}" if args.galore else "adamw") + "-8bit" * (args.state_bits == 8)
    args.out_dir = args.out_dir or free_folder(f"out/{args.size}-{method}")
    folder = Path(args.out_dir)
    check(args.resume or RANK or not holds_a_run(folder),
          f"{args.out_dir} holds a run already: add --resume to go on with it, or take another --out_dir")
    same = seal(kept(args) | dict(step=checkpoint["step"], data=None, data_dir=None))
    check(over_all(same) == -over_all(-same), "the processes do not agree: start all with the same "
          "arguments, and --resume from the same checkpoint, in a folder that they share or a copy of it")
    own = folder / "tokenizer"
    tokenizer = get_tokenizer(str(own) if args.resume and own.exists() else args.tokenizer)
    check(tokenizer.n_vocab <= config.vocab_size, f"a vocabulary of {config.vocab_size:,} is smaller than "
          f"that of --tokenizer {args.tokenizer}, {tokenizer.n_vocab:,}: change one of them")

    start = "cpu" if args.weight_bits else args.device  # `thin` moves it, when it is half as large
    model, dtype = None, getattr(torch, args.dtype)
    if args.init and not args.resume:  # before the data, which may take hours
        model = Llama.from_pretrained(args.init, dtype).to(start)
    where = args.seq_len, args.data_dir, args.data_url, args.keep_shards
    stream = Stream(args.data, tokenizer, "train", *where, state=checkpoint["data"])
    val = Stream(args.data, tokenizer, "val", *where)

    torch.manual_seed(args.seed)
    model = model or Llama(config, start, dtype)
    opt = prepare(model, args, checkpoint if args.resume else None)
    log = Log(folder, checkpoint["log_lines"])
    if not RANK:
        keep_files(tokenizer, own)
    if log.lines == 0 or kept(args) != checkpoint["args"]:
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
        log.write(dict(step=checkpoint["step"], args=vars(args), versions=dict(
            python=sys.version, torch=torch.__version__, gpu=gpu, processes=world())))
    tell(f"{args.init or args.size}: {model.num_parameters():,} parameters, {args.dtype}"
         f"{' and int8' * bool(args.weight_bits)}, {world()} x {args.device}\n"
         f"{method}: {args.direction}, lr {args.lr}, {args.warmup_steps} steps of warm-up, then a cosine\n"
         f"{args.steps} steps of {accumulation(args)} micro-batch(es) of {args.batch_size} x {args.seq_len} "
         f"tokens of {args.data}; all goes to {args.out_dir}")
    return model, opt, stream, val, log


def sample(model: Llama, tokenizer, args, brake: Brake) -> None:
    """Shows what was learnt: three short texts. An interrupt ends them at once: the checkpoint is written."""
    tell("sample:")
    beginning = "\n\n\ndef " if args.data == "python" else "The"  # else it takes some def for a deep one
    brake.idle = True
    with redirect_stdout(sys.stderr), suppress(KeyboardInterrupt):
        for seed in range(3):
            if not brake.asked:
                go_on(model, tokenizer, beginning, min(200, args.seq_len), 0.6, top_k=50, seed=seed)
    brake.idle = False
    tell(f"\nmore of it:      python model.py {args.out_dir} --prompt TEXT\n"
         f"take it with you: python model.py {args.out_dir} --export DIR")


def main() -> None:
    sys.stderr, brake = Forgiving(sys.stderr), Brake()
    try:
        args, config, checkpoint = settle()
        if world() > 1 and not args.plan:
            if args.device == "cuda":
                torch.cuda.set_device(LOCAL_RANK)
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        try:
            args.compile and not args.plan and torch.compile(torch.sin)(torch.ones(64, device=args.device))
        except Exception as error:  # no triton, no C++ compiler, too old a GPU: each has a type of its own
            args.compile, why = False, f"{type(error).__name__}: {error}".split("\n")[0]
            tell(f"torch.compile does not work here: slower, and with more memory ({why})")
        fit(args, config, plan)
        if args.plan:
            return
        model, opt, stream, val, log = begin(args, config, checkpoint)
    except (ValueError, OSError) as error:
        time.sleep(3 * bool(RANK))  # the first process speaks for all; torchrun ends the others
        arguments().error(str(error))
    except KeyboardInterrupt:
        return tell("interrupted before the first step: there is nothing to save")
    try:
        with closing(log):
            scores = train(model, opt, args, checkpoint, stream, val, log, brake)
    except torch.OutOfMemoryError:  # some weights may have moved: no more of this step is kept
        arguments().error(f"the GPU's memory ran out: say --resume --out_dir {args.out_dir}, and less than "
                          f"--batch_size {args.batch_size}, or more than --recompute {args.recompute}")
    if scores and math.isfinite(scores["val_loss"]) and not RANK and not brake.problem:
        sample(model, stream.tokenizer, args, brake)
    if world() > 1:
        over_all(0)  # none leaves before the checkpoint is written: torchrun would end the others
        dist.destroy_process_group()
    if brake.problem:
        time.sleep(3 * bool(RANK))
        arguments().exit(brake.code, f"train.py: {brake.problem}\n")


if __name__ == "__main__":
    main()
