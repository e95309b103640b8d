"""
Short pre-training runs that compare: each is a dict, made once, several at a time; the other scripts here make tables of them.

A run is settled by its dict (`SETTING`, a method, a learning rate, a seed, whatever the method reads besides): the same weights at the start,
the same tokens in the same order, warm-up and cosine, and the same validation tokens at the end, whatever the method. The model, the data,
the schedule and the evaluation are those of train.py. Methods differ only in the function `build(model, run)` that the script brings: it
returns any torch optimiser, and may change the model.

Finished runs are kept in --cache, a line each, with what they ran on. A script that is interrupted goes on with the next run, and scripts that
need the same run share it (two at the same time both make it). To repeat runs, delete the file; kept runs of other code than today's are counted
aloud.

Left out on purpose: resuming inside a run (they are short: train.py does that), several processes, gradient accumulation (the batch must fit).
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from data import Stream, get_tokenizer  # noqa: E402
from model import SIZES, Config, Llama, size  # noqa: E402
import plot  # noqa: E402
import speed  # noqa: E402

FOLDER = Path(__file__).resolve().parent
SIZES["small"] = size(192, 512, 4, 4)  # the toy of train.py when these results were made
SETTING = dict(size="small", data="python", tokenizer="bytes", seq_len=128, total_batch_size=16, steps=200, warmup_steps=20, min_lr_ratio=0.1,
               eval_tokens=65_536, dtype="float32", rank=48, T=50, alpha=0.25)  # fmt: skip
QUICK = dict(total_batch_size=4, seq_len=32, steps=6, warmup_steps=1, eval_tokens=256, rank=8, T=2, hidden=32, layers=2)


def above_zero(kind: type):
    """A type for argparse."""

    def number(text: str):
        x = kind(text)
        if not 0 < x < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be above zero")
        return x

    return number


def options(text: str, *without: str) -> argparse.ArgumentParser:
    """What all scripts understand, without what this one has no use for."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="%(prog)s [options]   (--help explains them)")  # fmt: skip
    whole, real = above_zero(int), above_zero(float)

    def add(name: str, default=None, **how) -> None:
        if name[2:] in without:
            parser.set_defaults(**{name[2:]: default})
        else:
            parser.add_argument(name, **how | ({} if default is None else dict(default=default)))

    add("--size", choices=SIZES, help=f"as train.py's (default: {SETTING['size']})")
    for name, word in (("hidden", "width of a model that has no name"), ("layers", "its blocks")):
        add(f"--{name}", type=whole, help=f"{word}, in place of --size")
    for name in ("data", "tokenizer"):
        add(f"--{name}", help=f"as train.py's (default: {SETTING[name]})")
    add("--dtype", choices=("float32", "bfloat16"), help=f"as train.py's (default: {SETTING['dtype']})")
    for name in ("seq_len", "total_batch_size", "steps", "warmup_steps", "eval_tokens", "rank", "T"):
        add(f"--{name}", type=whole, help=f"default: {SETTING[name]}" + " (a tenth of the steps)" * (name == "warmup_steps"))
    add("--alpha", type=real, help=f"GaLore's scale (default: {SETTING['alpha']})")
    add("--seeds", type=int, nargs="+", default=[0], help="of the weights, P and rounding; learning rates are chosen on the first (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--jobs", type=whole, help="runs at once (default: one on a GPU, else one a core, each on one thread)")
    add("--minutes", type=real, default=float("inf"), help="begin no run that would not end by then, counted from the start; the same command goes on (default: no limit)")
    add("--quick", action="store_true", help="a tiny model and 6 steps: does everything work? Losses that mean nothing")
    add("--cache", type=Path, help="finished runs (default: out/runs.jsonl)")
    add("--out", type=Path, help="where the figures go, a .json (default: experiments/results/, named as the script)")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict]:
    """The arguments, and the setting that they make. Whatever is wrong with them is said now."""
    begun, args, name = time.monotonic(), parser.parse_args(), Path(parser.prog).stem
    quick = {k: v for k, v in QUICK.items() if not (args.size and k in ("hidden", "layers"))} if args.quick else {}
    setting = SETTING | quick
    setting |= {k: v for k, v in vars(args).items() if k in (*setting, "hidden", "layers") and v is not None}
    if ("hidden" in setting) != ("layers" in setting) or args.size and args.hidden:
        parser.error("--hidden and --layers make a model together, in place of --size: give both, or neither")
    if setting.get("hidden", 32) % 32:
        parser.error(f"--hidden {args.hidden} must be a multiple of 32, the width of a head")
    if args.warmup_steps is None:
        setting["warmup_steps"] = setting["steps"] // 10
    if setting["warmup_steps"] >= setting["steps"]:
        parser.error(f"--warmup_steps {setting['warmup_steps']} must be below --steps {setting['steps']}")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds has one of them twice")
    args.begun, args.longest, args.left, args.code = begun, 0.0, 0, set()
    if args.quick and args.cache:
        parser.error("--quick keeps no runs: leave --cache out")
    args.cache = None if args.quick else args.cache or FOLDER.parent / "out" / "runs.jsonl"
    table = f"-{args.table}" if "table" in args else ""
    args.out = args.out or FOLDER / "results" / f"{name}{table}{'-quick' * args.quick}.json"
    args.figure = (FOLDER / "figures" / args.out.name if args.out.resolve().parent == FOLDER / "results" else args.out).with_suffix(".png")
    words = [re.sub(r"(^|=).*/", r"\1", word.rstrip("/")) for word in sys.argv[1:]]  # folders by their names: where they lie is nobody's business
    args.command = shlex.join(["python", f"experiments/{name}.py", *words])
    try:
        if args.out.suffix != ".json":
            raise ValueError(f"--out {args.out} must be a .json")
        for path in filter(None, (args.out, args.figure, args.cache)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            if path.stat().st_size == 0:
                path.unlink()
        torch.zeros(1, device=args.device)
        tokenizer = get_tokenizer(setting["tokenizer"])
        for split in ("train", "val"):
            Stream(setting["data"], tokenizer, split, setting["seq_len"])
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(str(error).split("\n")[0])
    fits(setting, parser)
    if not args.device.startswith("cuda"):
        torch.set_num_threads(1)  # here as in the runs
    args.jobs = args.jobs or (1 if args.device.startswith("cuda") else os.cpu_count())
    return args, setting


def fits(run: dict, parser: argparse.ArgumentParser) -> None:
    """Ends the script if the rank does not fit the model."""
    short = min(min(m.weight.shape) for m in make_model(run | dict(seed=0), "meta").model.layers.modules() if isinstance(m, torch.nn.Linear))
    if not 0 < run["rank"] < short:
        parser.error(f"rank {run['rank']} must be below {short}, the short side of the model's matrices: take a lower --rank")


def crc(paths) -> str:
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in paths)):08x}"


def conditions(args: argparse.Namespace, data: str) -> dict:
    """What a run's figures depend on beside its dict."""
    gpu, path = args.device.startswith("cuda"), Path(data)
    texts = [path] if path.is_file() else [x for x in path.glob("*") if ".tokens" not in x.name]  # what data.py makes of them, and when, does not count
    size = sum(x.stat().st_size for x in texts) if path.exists() else None
    return {"device": torch.cuda.get_device_name() if gpu else speed.cpu(), "torch": torch.__version__, "threads a run": None if gpu else 1,
            **({"python (whose library is the data)": platform.python_version()} if data == "python" else {"bytes of data": size})}  # fmt: skip


def make_model(run: dict, device: str) -> Llama:
    if "init" in run:  # a Hugging Face folder
        return Llama.from_pretrained(run["init"], getattr(torch, run["dtype"])).to(device)
    vocabulary = -(-get_tokenizer(run["tokenizer"]).n_vocab // 64) * 64
    shape = dict(SIZES[run["size"]])
    if "hidden" in run:  # a width that has no name: heads of 32, MLP as the paper's, 8/3 of it
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
            group["lr"] = train.learning_rate(t, args, peak)
        return train.training_step(model, opt, iter([stream.batch(args.total_batch_size)]), 1)

    return step


def train_once(build, run: dict, device: str) -> dict:
    """The run, and what came out: losses, bytes of weights and states, seconds."""
    gpu, tokenizer = device.startswith("cuda"), get_tokenizer(run["tokenizer"])
    if not gpu:
        torch.set_num_threads(1)
    stream, val = (Stream(run["data"], tokenizer, split, run["seq_len"]) for split in ("train", "val"))
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
    score = train.evaluate(model, val, args, lambda read: read())
    part = max(1, run["steps"] // 60)
    curve = [[min(i + part, run["steps"]), round(mean(losses[i : i + part]), 4)] for i in range(0, run["steps"], part)]
    state = speed.state_bytes(opt) + sum(x.numel() * x.element_size() for x in getattr(opt, "beside", []))
    stored = {id(x): x.numel() * x.element_size() for x in model.state_dict(keep_vars=True).values()}
    return run | score | dict(curve=curve, weight_bytes=sum(stored.values()), state_bytes=state, seconds=round(seconds, 1), tokens=stream.seen)


class Here:
    """A pool of one process: this one. What fails fails at once."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


def identity(run: dict, here: dict) -> str:
    """What makes a run the same as another: all but what it is called, and where its data lie."""
    return json.dumps(run | here | dict(method="", data=Path(run["data"]).name), sort_keys=True)


def kept(path: Path | None) -> dict[str, dict]:
    """The runs in a cache; a line that was cut off is none."""
    found = {}
    for line in path.read_text().splitlines() if path and path.exists() else ():
        try:
            line = json.loads(line)
            found[identity(line["run"], line["conditions"])] = line
        except ValueError:
            pass
    return found


def many(build, runs: list[dict], args: argparse.Namespace) -> list[dict]:
    """Makes those of the runs that the cache lacks. Returns all that there are, in the order of `runs`; args.left counts the others.

    If one fails, those under way end first.
    """
    here, code = conditions(args, runs[0]["data"]) if runs else {}, crc(sorted([*FOLDER.parent.glob("*.py"), *FOLDER.glob("*.py")]))
    done, key = kept(args.cache), lambda run: identity(run, here)  # noqa: E731
    todo, running, failed = list({key(run): run for run in runs if key(run) not in done}.values()), {}, None
    had = [done[key(run)] for run in runs if key(run) in done]
    if other := sum(line.get("code") != code for line in had):
        print(f"{other} of {len(runs)} runs were kept in {args.cache.name} by other code than today's: delete it if they should be made again")
    args.longest = max([args.longest, *(line["result"]["seconds"] for line in had)])
    args.code |= {line["code"] for line in had} | {code}
    total, seconds = len(todo), lambda: time.monotonic() - args.begun  # noqa: E731
    new = dict(mp_context=multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL))
    with Here() if args.jobs == 1 else ProcessPoolExecutor(args.jobs, **new) as pool:
        while todo or running:
            while todo and not failed and len(running) < args.jobs and seconds() + args.longest < 60 * args.minutes:
                run, start = todo.pop(0), seconds()
                running[pool.submit(train_once, build, run, args.device)] = run, start
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, start = running.pop(future)
                if failed := failed or future.exception():
                    continue
                result = future.result()
                args.longest = max(args.longest, seconds() - start)
                done[key(run)] = line = dict(run=run, conditions=here, code=code, result=result)
                if args.cache:
                    with args.cache.open("a+b") as file:
                        file.seek(max(0, file.tell() - 1))  # a line that was cut off does not take this one with it
                        file.write(b"\n" * (file.read() not in (b"", b"\n")) + json.dumps(line).encode() + b"\n")
                print(f"{total - len(todo) - len(running)}/{total}  {run['method']}, lr {run['lr']:g}, seed {run['seed']}: {result['val_loss']:.4f}  ({result['seconds']:.0f} s)", flush=True)
    if failed:
        raise failed
    if todo:
        print(f"--minutes {args.minutes:g} are over: {len(todo)} of {len(runs)} runs are left to the same command")
    args.left += len(todo)
    return [done[key(run)]["result"] | dict(method=run["method"]) for run in runs if key(run) in done]


def best(runs: list[dict]) -> dict:
    """The run with the lowest validation loss; one that is not finite is never it."""
    return min(runs, key=lambda run: run["val_loss"] if run["val_loss"] < float("inf") else float("inf"))


def sweep(build, methods: dict[str, dict], rates: dict[str, list[float]], setting: dict, args: argparse.Namespace) -> dict[str, dict]:
    """Each method at its learning rates with the first seed, then, when all of these are there, at the best of them with the others.

    Returns, by method, if all of its rates are there: {"rates": {lr: loss}, "lr", "losses" (one a seed), "run": the first seed's at lr}. Ends the script if
    there is none.
    """
    wanted = [setting | dict(method=name, lr=lr, seed=args.seeds[0], **options) for name, options in methods.items() for lr in rates[name]]
    tried = many(build, wanted, args)
    found = {name: best(runs) for name in methods if len(runs := [run for run in tried if run["method"] == name]) == len(rates[name])}
    if not found:
        sys.exit("no method has all of its runs yet")
    wanted = [setting | dict(method=name, lr=found[name]["lr"], seed=seed, **methods[name]) for name in found for seed in args.seeds[1:]]
    again = many(build, wanted, args) if not args.left else []
    return {name: dict(rates={run["lr"]: run["val_loss"] for run in tried if run["method"] == name}, lr=first["lr"], run=first,
                       losses=[run["val_loss"] for run in [first, *again] if run["method"] == name]) for name, first in found.items()}  # fmt: skip


def middle(rates: list[float], count: int) -> list[float]:
    """So many of a method's learning rates, ascending: the outer ones are left out first."""
    first = max(0, (len(rates) - count + 1) // 2)
    return rates[first : first + count]


def rates_of(result: dict) -> dict:
    """Two columns for a table; at the edge: a rate outside those tried may be better."""
    edge = len(result["rates"]) > 1 and result["lr"] in (min(result["rates"]), max(result["rates"]))
    return {"lr": f"{result['lr']:g}" + ", at the edge" * edge, "loss at each lr": ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in result["rates"].items())}


def details(found: dict[str, dict]) -> dict:
    """For the json: the run of each method at its best rate on the first seed, and the losses of all its seeds."""
    return dict(losses={name: result["losses"] for name, result in found.items()}, runs=[result["run"] for result in found.values()])


def spread(losses: list[float]) -> str:
    """Mean of the seeds, and half of the distance between the lowest and the highest."""
    return f"{mean(losses):.4f}" + (f" ±{(max(losses) - min(losses)) / 2:.4f}" if len(losses) > 1 else "")


def title(setting: dict) -> str:
    """What was trained, on how much."""
    model = f"{setting['layers']} blocks of width {setting['hidden']}" if "hidden" in setting else setting["size"]
    tokens = setting["steps"] * setting["total_batch_size"] * setting["seq_len"]
    return f"{model} on {Path(setting['data']).name}, {setting['steps']} steps, {tokens / 1e6:.3g} M tokens, rank {setting['rank']}"


def finite(x):
    """x with what json has no number for as words."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return "diverged" if isinstance(x, float) and not abs(x) < float("inf") else x


def pretty(x, indent: int = 0, before: int = 0, row: bool = False) -> str:
    """json for readers, 110 columns wide. What fits stands on one line; else each part has a line of its own.

    row: x stands in a list. A dict there is a row of a table, and fills its lines.
    before: columns that the key of x takes.
    """
    line = json.dumps(x)
    if indent + before + len(line) < 110 or not x or not isinstance(x, (dict, list)):
        return line
    begin, end, pad = line[0], line[-1], "\n" + " " * (indent + 1)
    keys = [f"{json.dumps(key)}: " for key in x] if isinstance(x, dict) else [""] * len(x)
    values = list(x.values()) if isinstance(x, dict) else x
    in_list = isinstance(x, list)
    parts = [key + pretty(value, indent + 1, len(key), in_list) for key, value in zip(keys, values)]
    if not row or any(isinstance(value, (dict, list)) for value in values):
        return begin + ",".join(pad + part for part in parts) + pad[:-1] + end
    text, used = begin, indent
    for part in parts:
        if used + len(part) > 105:
            text, used = text.rstrip() + pad, indent
        text, used = text + part + ", ", used + len(part) + 2
    return text.removesuffix(", ") + end


def show(title: str, rows: list[dict]) -> None:
    """A table, numbers to five digits."""
    if rows:
        speed.show(title, [{key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows])


def can_draw() -> bool:
    if plot.Figure is None:
        print("no picture: matplotlib is not installed (pip install -r experiments/requirements.txt)")
    return plot.Figure is not None


def curves(found: dict[str, dict], setting: dict, path: Path) -> None:
    """The picture of a sweep: training loss and, at the end, validation loss of each method at its rate, first seed."""
    if not can_draw():
        return
    drawn = []
    for name, result in found.items():
        run = result["run"]
        step, loss = plot.np.array(run["curve"]).T
        tokens = step * run["total_batch_size"] * run["seq_len"]
        smooth = plot.smoothed(tokens, tokens[0], loss, 0.1)
        drawn.append(plot.Run(path, run, run["steps"], tokens, loss, smooth, [run["tokens"]], [run["val_loss"]], f"{name}, lr {result['lr']:g}"))
    plot.draw(drawn, 0.1, path, f"{title(setting)}\n")


def brief(run: dict, head: dict) -> dict:
    """A run without what the conditions say and without its curve: the cache keeps it, the picture shows it."""
    new = {key for key, value in run.items() if key == "steps" or head.get(key) != value}
    return {key: value for key, value in run.items() if key in new - {"curve"}}


def write(args: argparse.Namespace, setting: dict, **result) -> None:
    """The json: whole at any time."""
    name = Path(setting["data"]).name
    head = {"command": args.command, **conditions(args, setting["data"]), **setting, "data": name, "seeds": args.seeds}
    head["all methods"] = "betas 0.9 and 0.999 where Adam, no weight decay, no clipping; warm-up, then cosine to a tenth"
    if "runs" in result:
        result["runs"] = [brief(run | dict(data=name), head) for run in result["runs"]]
    if getattr(args, "code", None):
        head["code (checksums of the files that made the runs)"] = sorted(args.code)
    result = dict(conditions=head) | ({"unfinished: runs left": args.left} if args.left else {}) | result
    args.out.with_suffix(".part").write_text(pretty(finite(result)) + "\n")
    args.out.with_suffix(".part").replace(args.out)
    print(f"\nin {args.out}")


def begin(main) -> None:
    """Runs a script; Ctrl-C is no error."""
    try:
        main()
    except (KeyboardInterrupt, BrokenProcessPool) as error:
        sys.exit("interrupted: the same command goes on" if isinstance(error, KeyboardInterrupt) else f"a run ended without a word (out of memory?): {error}")
