"""
Short pre-training runs that compare: each is a dict, made once, several at a time; the other scripts here make tables of them.

A run is settled by its dict (`SETTING`, a method, a learning rate, a seed, whatever the method reads besides): the same weights at the start,
the same tokens in the same order, warm-up and cosine, and the same validation tokens at the end, whatever the method. The model, the data,
the schedule and the evaluation are those of train.py. Methods differ only in the function `build(model, run)` that the script brings: it
returns any torch optimiser, and may change the model.

Finished runs are kept in --cache, a line each, with what they ran on. A script that is interrupted goes on with the next run, and scripts that
need the same run share it. To repeat runs, delete the file.

Left out on purpose: resuming inside a run (they are short: train.py does that), several processes, gradient accumulation (the batch must fit).
"""

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from data import get_tokenizer, open_data  # noqa: E402
from model import SIZES, Config, Llama  # noqa: E402
import plot  # noqa: E402
import speed  # noqa: E402

FOLDER = Path(__file__).resolve().parent
SETTING = dict(size="toy", data="python", tokenizer="bytes", seq_len=128, total_batch_size=16, steps=300, warmup_steps=30, min_lr_ratio=0.1,
               eval_tokens=65_536, dtype="float32", rank=48, T=50, alpha=0.25)  # fmt: skip
QUICK = dict(total_batch_size=4, seq_len=32, steps=12, warmup_steps=2, eval_tokens=512, rank=8, T=5, hidden=32, layers=2)


def options(text: str) -> argparse.ArgumentParser:
    """What all scripts understand."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="%(prog)s [options]   (--help explains them)")  # fmt: skip
    add = parser.add_argument
    for name in ("size", "data", "tokenizer", "dtype"):
        add(f"--{name}", help=f"as train.py's (default: {SETTING[name]})")
    for name in ("seq_len", "total_batch_size", "steps", "warmup_steps", "eval_tokens", "rank", "T"):
        add(f"--{name}", type=int, help=f"default: {SETTING[name]}" + " (a tenth of the steps)" * (name == "warmup_steps"))
    for name, word in (("hidden", "width of a model that has no name"), ("layers", "its blocks")):
        add(f"--{name}", type=int, help=f"{word}, in place of --size")
    add("--alpha", type=float, help=f"GaLore's scale (default: {SETTING['alpha']})")
    add("--seeds", type=int, nargs="+", default=[0], help="of the weights, P and rounding; learning rates are chosen on the first (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--jobs", type=int, help="runs at once (default: one on a GPU, else one a core, each on one thread)")
    add("--minutes", type=float, default=float("inf"), help="begin no run that would not end by then; the same command goes on (default: no limit)")
    add("--quick", action="store_true", help="a tiny model and 12 steps: does everything work? Losses that mean nothing")
    add("--cache", type=Path, default=FOLDER.parent / "out" / "runs.jsonl", help="finished runs (default: out/runs.jsonl)")
    add("--out", type=Path, help="where the figures go (default: experiments/results/, named as the script)")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict]:
    """The arguments, and the setting that they make."""
    args, name = parser.parse_args(), Path(parser.prog).stem
    setting = SETTING | (QUICK if args.quick else {})
    setting |= {k: v for k, v in vars(args).items() if k in (*setting, "hidden", "layers") and v is not None}
    if ("hidden" in setting) != ("layers" in setting):
        parser.error("--hidden and --layers make a model together: give both")
    if args.steps and args.warmup_steps is None:
        setting["warmup_steps"] = args.steps // 10
    for k, v in setting.items():
        if isinstance(v, (int, float)) and not v > 0 and k not in ("warmup_steps", "min_lr_ratio"):
            parser.error(f"--{k} is {v}, but must be above zero")
    if setting["size"] not in SIZES:
        parser.error(f"there is no size {setting['size']!r}; there are {', '.join(SIZES)}")
    short = setting.get("hidden", SIZES[setting["size"]]["hidden_size"])
    if setting["rank"] >= short:
        parser.error(f"--rank {setting['rank']} must be below {short}, the model's short side")
    if args.quick:
        args.cache = None  # nothing to keep
    args.out = args.out or FOLDER / "results" / f"{name}{'-quick' * args.quick}.json"
    args.figure = (FOLDER / "figures" / args.out.name if args.out.parent == FOLDER / "results" else args.out).with_suffix(".png")
    args.command = shlex.join(["python", f"experiments/{name}.py", *(x for x in sys.argv[1:])])
    if not args.device.startswith("cuda"):
        torch.set_num_threads(1)  # here as in the runs
    args.jobs = args.jobs or (1 if args.device.startswith("cuda") else os.cpu_count())
    try:  # whatever is wrong with the data is said now
        tokenizer = get_tokenizer(setting["tokenizer"])
        for split in ("train", "val"):
            open_data(setting["data"], tokenizer, split, setting["seq_len"])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args, setting


def conditions(args: argparse.Namespace) -> dict:
    """What a run's figures depend on beside its dict."""
    gpu = args.device.startswith("cuda")
    return {"device": torch.cuda.get_device_name() if gpu else speed.cpu(), "torch": torch.__version__, "threads a run": None if gpu else 1,
            "python (whose library is the data)": platform.python_version()}  # fmt: skip


def make_model(run: dict, device: str) -> Llama:
    vocabulary = -(-get_tokenizer(run["tokenizer"]).n_vocab // 64) * 64
    shape = dict(SIZES[run["size"]])
    if "hidden" in run:  # a width that has no name: heads of 32 or so, MLP as the paper's, 8/3 of it
        heads = max(2, run["hidden"] // 32)
        shape |= dict(hidden_size=run["hidden"], intermediate_size=run["hidden"] * 8 // 3 // 16 * 16, num_hidden_layers=run["layers"],
                      num_attention_heads=heads, num_key_value_heads=heads)  # fmt: skip
    torch.manual_seed(run["seed"])
    return Llama(Config(vocab_size=vocabulary, max_position_embeddings=max(2048, run["seq_len"]), **shape), device, getattr(torch, run["dtype"]))


def stepper(model: Llama, opt: torch.optim.Optimizer, run: dict, stream):
    """A function that takes the next step, and returns its loss."""
    args, peaks = argparse.Namespace(**run), [group["lr"] for group in opt.param_groups]

    def step(t: int) -> torch.Tensor:
        for group, peak in zip(opt.param_groups, peaks):
            group["lr"] = peak * train.learning_rate(t, args) / args.lr
        return train.training_step(model, opt, iter([stream.batch(args.total_batch_size)]), 1)

    return step


def train_once(build, run: dict, device: str) -> dict:
    """The run, and what came out: losses, bytes of weights and states, seconds."""
    gpu, tokenizer = device.startswith("cuda"), get_tokenizer(run["tokenizer"])
    if not gpu:
        torch.set_num_threads(1)
    stream, val = (open_data(run["data"], tokenizer, split, run["seq_len"]) for split in ("train", "val"))
    model = make_model(run, device)
    opt = build(model, run)
    if gpu:
        for block in model.model.layers:
            block.compile(fullgraph=True, dynamic=False)
    step, losses, start = stepper(model, opt, run, stream), [], time.perf_counter()
    for t in range(1, run["steps"] + 1):
        losses.append(step(t))
    losses = torch.stack(losses).tolist()  # the host waits for the device here
    seconds = time.perf_counter() - start
    args = argparse.Namespace(**run, batch_size=run["total_batch_size"], device=device)
    score = train.evaluate(model, val, args, lambda read: read(), lambda text: None)
    part = max(1, run["steps"] // 60)
    curve = [[min(i + part, run["steps"]), round(mean(losses[i : i + part]), 4)] for i in range(0, run["steps"], part)]
    state = speed.state_bytes(opt) + sum(x.numel() * x.element_size() for x in getattr(opt, "beside", []))
    stored = {id(x): x.numel() * x.element_size() for x in model.state_dict(keep_vars=True).values()}
    return run | score | dict(curve=curve, weight_bytes=sum(stored.values()), state_bytes=state, seconds=round(seconds, 1), tokens=stream.seen)


class Here:
    """A pool of one process: this one."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


def many(build, runs: list[dict], args: argparse.Namespace) -> list[dict]:
    """Makes those of the runs that the cache lacks. Returns all that there are, in the order of `runs`."""
    here = conditions(args)
    lines = args.cache.read_text().splitlines() if args.cache and args.cache.exists() else []
    done, key = {}, lambda run: json.dumps(run, sort_keys=True)  # noqa: E731
    for line in map(json.loads, lines):
        done[key(line["run"] | line["conditions"])] = line["result"]
    todo, running, begun, longest = [], {}, time.monotonic(), 0.0
    for run in runs:
        if key(run | here) not in done and run not in todo:
            todo.append(run)
    total, minutes = len(todo), lambda: (time.monotonic() - begun) / 60  # noqa: E731
    with Here() if args.jobs == 1 else ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        while todo or running:
            while todo and len(running) < args.jobs and minutes() + longest < args.minutes:
                run = todo.pop(0)
                start = minutes()
                running[pool.submit(train_once, build, run, args.device)] = run, start
            if not running:
                print(f"--minutes {args.minutes:g} are over: {len(todo)} of {total} runs are left to the same command")
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, start = running.pop(future)
                result = future.result()
                longest, done[key(run | here)] = max(longest, minutes() - start), result
                if args.cache:
                    args.cache.parent.mkdir(parents=True, exist_ok=True)
                    with args.cache.open("a") as file:
                        file.write(json.dumps(dict(run=run, conditions=here, result=result)) + "\n")
                print(f"{total - len(todo) - len(running)}/{total}  {run['method']}, lr {run['lr']:g}, seed {run['seed']}: {result['val_loss']:.4f}  ({result['seconds']:.0f} s)", flush=True)
    return [done[key(run | here)] for run in runs if key(run | here) in done]


def best(runs: list[dict]) -> dict:
    """The run with the lowest validation loss; one that is not finite is never it."""
    return min(runs, key=lambda run: run["val_loss"] if run["val_loss"] < float("inf") else float("inf"))


def sweep(build, methods: dict[str, dict], rates: dict[str, list[float]], setting: dict, args: argparse.Namespace) -> dict[str, dict]:
    """Each method at its learning rates with the first seed, then at the best of them with the others.

    Returns, by method: {"rates": {lr: loss}, "lr", "losses" (one a seed), "run": the first seed's at lr}.
    """
    wanted = [setting | dict(method=name, lr=lr, seed=args.seeds[0], **options) for name, options in methods.items() for lr in rates[name]]
    tried = many(build, wanted, args)
    found = {name: best(runs) for name in methods if (runs := [run for run in tried if run["method"] == name])}
    wanted = [setting | dict(method=name, lr=found[name]["lr"], seed=seed, **methods[name]) for name in found for seed in args.seeds[1:]]
    again = many(build, wanted, args) if wanted else []
    return {name: dict(rates={run["lr"]: run["val_loss"] for run in tried if run["method"] == name}, lr=first["lr"], run=first,
                       losses=[run["val_loss"] for run in [first, *again] if run["method"] == name]) for name, first in found.items()}  # fmt: skip


def spread(losses: list[float]) -> str:
    """Mean of the seeds, and half of the distance between the lowest and the highest."""
    return f"{mean(losses):.4f}" + (f" ±{(max(losses) - min(losses)) / 2:.4f}" if len(losses) > 1 else "")


def show(title: str, rows: list[dict]) -> None:
    """A table, numbers to five digits."""
    speed.show(title, [{key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows])


def curves(found: dict[str, dict], path: Path) -> None:
    """The picture of a sweep: training loss and, at the end, validation loss of each method at its rate."""
    if plot.Figure is None:
        return print("no picture: matplotlib is not installed (pip install -r experiments/requirements.txt)")
    drawn = []
    for name, result in found.items():
        run = result["run"]
        step, loss = plot.np.array(run["curve"]).T
        tokens = step * run["total_batch_size"] * run["seq_len"]
        drawn.append(plot.Run(path, run, run["steps"], tokens, loss, loss, [run["tokens"]], [run["val_loss"]], f"{name}, lr {result['lr']:g}"))
    path.parent.mkdir(exist_ok=True)
    plot.draw(drawn, 1 / 60, path)


def write(args: argparse.Namespace, setting: dict, **result) -> None:
    """The json: whole at any time."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    setting = setting | dict(data=Path(setting["data"]).name)
    result = dict(conditions={"command": args.command.replace(str(args.data), Path(str(args.data)).name)} | conditions(args) | setting | {"seeds": args.seeds}, **result)
    args.out.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".part").replace(args.out)
    print(f"\nin {args.out}")
