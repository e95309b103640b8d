"""
Every script of experiments/ runs in its quick form, and holds what it compares with against an oracle.

    pip install -r requirements.txt -r experiments/requirements.txt pytest && pytest -q experiments
"""

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

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

torch.set_num_threads(1)


def oracle(name: str, pip: str):
    return pytest.importorskip(name, reason=f"the oracle {pip} is not installed: pip install {pip}")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The standard library, tokenised once for all runs."""
    return str(tmp_path_factory.mktemp("tokens"))


def experiment(name):
    """A script of experiments/ as a module."""
    return __import__(name)

def two_layers():
    """Two linear layers, one tall and one wide, and a batch that they are to map."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 8, bias=False)).double()
    return model, torch.randn(64, 12).double(), torch.randn(64, 8).double()


def descend(model, opt, x, y, steps=25, before=lambda: None, after=lambda: None):
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        before(), opt.step(), after()
        losses.append(loss.item())
    return losses


ANY = {"AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1), "Adafactor": lambda p: torch.optim.Adafactor(p, 0.05, weight_decay=0.1),
       "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1), "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01)}  # fmt: skip


@pytest.mark.parametrize("name", ANY)
def test_algorithm_1_with_all_directions_is_the_optimiser_itself(name):
    """experiments/figure3.py: with P = I and alpha = 1, `Projected` around any optimiser takes the steps of the optimiser alone."""
    Projected = experiment("figure3").Projected
    model, x, y = two_layers()
    alone = copy.deepcopy(model)
    galore_ = Projected([model[0].weight, model[2].weight], rank=8, scale=1.0)
    galore_.P = [torch.eye(min(W.shape)).double() for W in galore_.W]
    galore_.Z = [nn.Parameter(galore.rows(W).detach().clone()) for W in galore_.W]
    galore_.t = 1  # P stays
    ours = descend(model, ANY[name](galore_.Z), x, y, before=galore_.project, after=galore_.project_back)
    theirs = descend(alone, ANY[name](alone.parameters()), x, y)
    assert ours == pytest.approx(theirs, rel=1e-9) and theirs[-1] < theirs[0]


def test_algorithm_1_turns_nothing_that_sgd_would_notice():
    """SGD with momentum is the same in any basis of the whole space: a random orthonormal P, refreshed once, changes nothing; and
    alpha is a factor of the learning rate."""
    Projected = experiment("figure3").Projected
    model, x, y = two_layers()
    model = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 8, bias=False)).double()
    alone = copy.deepcopy(model)
    galore_ = Projected([model[0].weight], rank=12, update_proj_gap=100, scale=0.25)
    galore_.P[0].copy_(torch.linalg.qr(torch.randn(12, 12).double())[0])
    others = [model[2].weight]
    opt = torch.optim.SGD([dict(params=galore_.Z, lr=0.4), dict(params=others, lr=0.1)], momentum=0.9)
    ours = descend(model, opt, x, y, before=galore_.project, after=galore_.project_back)
    theirs = descend(alone, torch.optim.SGD(alone.parameters(), 0.1, momentum=0.9), x, y)
    assert ours == pytest.approx(theirs, rel=1e-5) and theirs[-1] < theirs[0]


def test_algorithm_1_works_with_every_optimiser_of_torch():
    """All of torch.optim but SparseAdam lower the loss, at rank 3 of 8 and with refreshes; LBFGS by its closure."""
    Projected = experiment("figure3").Projected
    names = [name for name, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    names = set(names) - {"Optimizer", "SparseAdam"}
    assert len(names) >= 13
    for name in sorted(names):
        model, x, y = two_layers()
        galore_ = Projected([model[0].weight, model[2].weight], rank=3, update_proj_gap=10)
        opt = getattr(torch.optim, name)(galore_.Z, lr=1.0 if name in ("Adadelta", "LBFGS") else 0.03)
        first = F.mse_loss(model(x), y).item()
        if name == "LBFGS":

            def closure():
                galore_.project_back()
                opt.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                galore_.project()
                return loss

            opt.step(closure)
            galore_.project_back()
        else:
            descend(model, opt, x, y, before=galore_.project, after=galore_.project_back)
        assert F.mse_loss(model(x), y).item() < 0.999 * first, name
    with pytest.raises(ValueError, match="rank 9 does not fit"):
        Projected([model[2].weight], rank=9)


def test_low_rank_layers():
    """experiments/lora.py: LoRA computes at first what the layer did, and after a merge what it did before; factors are the best
    rank-r approximation; only A and B (and what is not replaced) get gradients."""
    lora = experiment("lora")
    model = Llama(Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2))
    tokens, names = torch.randint(64, (2, 16)), [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{name}"]
    before, weights = model(tokens), {name: model.get_submodule(name).weight.detach().clone() for name in names}
    adapted, factored = copy.deepcopy(model), copy.deepcopy(model)
    layers = lora.low_rank(adapted, rank=4, kind="relora")
    assert len(layers) == len(names) == 14 and torch.equal(adapted(tokens), before)
    for layer in layers:
        nn.init.normal_(layer.B, 0, 0.02)
    old, changed = layers[0].A.clone(), adapted(tokens)
    assert not torch.allclose(changed, before, atol=1e-3)
    for layer in layers:
        layer.merge()
    assert torch.allclose(adapted(tokens), changed, atol=1e-5) and not layers[0].B.any() and not torch.equal(layers[0].A, old)
    adapted(tokens, tokens).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert {name.rpartition(".")[2] for name in trained if ".layers." in f".{name}" and "layernorm" not in name} == {"A", "B"}
    assert "lm_head.weight" in trained

    lora.low_rank(factored, rank=4, kind="factors")
    for name in names:
        layer, S = factored.get_submodule(name), torch.linalg.svdvals(weights[name])
        assert layer.W0 is None
        error = (layer.B @ layer.A - weights[name]).square().sum()
        assert torch.allclose(error, S[4:].square().sum(), rtol=1e-4)  # Eckart and Young
    for bad, sentence in [(dict(rank=32, kind="lora"), "rank 32 must be"), (dict(rank=4, kind="dora"), "kind is 'dora'"), (dict(rank=4, kind="lora", which="conv"), "no nn.Linear")]:
        with pytest.raises(ValueError, match=sentence):
            lora.low_rank(copy.deepcopy(model), **bad)


def test_lora_is_peft():
    """The same weights in peft's adapter give the same outputs."""
    lora, peft = experiment("lora"), oracle("peft", "peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=32, target_modules=["0"]))
    (layer,) = lora.low_rank(model, rank=4, kind="lora", which="0")
    nn.init.normal_(layer.B)
    theirs.base_model.model[0].lora_A["default"].weight.data.copy_(layer.A.data)
    theirs.base_model.model[0].lora_B["default"].weight.data.copy_(layer.B.data)
    x = torch.randn(5, 24)
    assert torch.allclose(model(x), theirs(x), atol=1e-5)


def test_relora_starts_again():
    """At each of its restarts W0 changes, B is zero and its moments and step count are gone; the rate warms up again; others' moments stay."""
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


@pytest.mark.parametrize("name", ["table2", "figure3", "knobs", "gradient_rank", "beyond methods", "beyond variants", "beyond cut"])
def test_comparisons_run(name, tmp_path, monkeypatch, tokens):
    """The --quick form of every script that makes a table of the paper: it ends, and its json has all methods, finite losses, and the
    conditions; table2 holds measured bytes against the paper's Table 1 itself."""
    (name, *table), result = name.split(), tmp_path / "folder" / "result.json"
    script, few = experiment(name), ["--jobs", "1"] if name != "gradient_rank" else []
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(tokens)
    monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", *table, "--quick", *few, "--out", str(result)])
    script.main()
    text = result.read_text()
    got = json.loads(text)
    assert str(tmp_path) not in text and got["conditions"]["torch"] == torch.__version__
    assert got["conditions"]["command"] == " ".join([f"python experiments/{name}.py", *table, "--quick", *few, "--out result.json"])
    for run in got.get("runs", []):
        assert math.isfinite(run["val_loss"]) and run["tokens"] == run["steps"] * 4 * 32
    if name == "table2":
        assert {row["method"] for row in got["table"]} == {"full rank", "GaLore", "8-bit GaLore", "low rank", "LoRA", "ReLoRA"}
    if name == "figure3":
        assert len(got["table"]) == len(got["runs"]) == 8
    if name == "knobs":
        assert set(got["tables"]) == {"rank", "T", "alpha", "steps"}
    if name == "beyond":
        assert len(got["table"]) == {"methods": 13, "variants": 8, "cut": 9}[table[0]]
        assert table != ["variants"] or {row["base"] for row in got["table"]} == {"GaLore", "GaLore, Muon"}
    if name == "gradient_rank":
        full, galore_ = got["found"]["full rank"], got["found"]["GaLore"]
        assert set(full) == {"stable rank", "best"} and set(galore_) == {"stable rank", "best", "inside P", "kept"}
        for kind in galore_["best"]:
            assert all(0 <= inside <= best * 1.0001 <= 1.001 for (_, best), (_, inside) in zip(galore_["best"][kind], galore_["inside P"][kind]))


def test_comparisons_go_on(tmp_path, monkeypatch, capsys, tokens):
    """experiments/runs.py: what was run is not run again, whatever it is called; a comparison that --minutes cut short says so, chooses no rate
    from a part of them and goes on; a failure or a line that was cut off costs no other run."""
    runs, made = experiment("runs"), []

    def train_once(build, run, device):
        if run["lr"] == bad:
            raise MemoryError("not this one")
        made.append((run["method"], run["lr"], run["seed"]))
        return run | dict(val_loss=abs(run["lr"] - 0.3) + run["seed"], seconds=60.0)

    def sweep(*words, methods={"A": {}, "B": dict(b=1)}):
        monkeypatch.setattr(sys, "argv", ["experiments/some.py", "--jobs", "1", "--cache", str(cache), "--out", str(tmp_path / "some.json"), *words])
        args, setting = runs.parse(runs.options("some"))
        made.clear()
        return runs.sweep(None, methods, {"A": [0.1, 0.3, 0.9], "B": [0.1, 0.2], "C": [0.1, 0.3, 0.9]}, setting, args), args

    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(tokens)
    monkeypatch.setattr(runs, "train_once", train_once)
    cache, bad = tmp_path / "deep" / "runs.jsonl", 0.9
    with pytest.raises(MemoryError):
        sweep()
    assert made == [("A", 0.1, 0), ("A", 0.3, 0)] == [(line["run"]["method"], line["run"]["lr"], 0) for line in runs.kept(cache).values()]
    with pytest.raises(SystemExit, match="no method has all"):
        sweep("--minutes", "0.9", "--seeds", "0", "1")  # one took a minute: the next would end too late
    assert "3 of 5 runs are left" in capsys.readouterr().out and not made
    bad = None
    cache.write_text(cache.read_text() + '{"run": {"meth')
    sweep(methods={"C": {}})
    assert made == [("C", 0.9, 0)]  # as A, but for the name
    found, args = sweep("--seeds", "0", "1", "--minutes", "0.9")
    assert not made and list(found) == ["A"] and found["A"]["losses"] == [0] and args.left == 2
    found, args = sweep("--seeds", "0", "1")
    assert made == [("B", 0.1, 0), ("B", 0.2, 0), ("A", 0.3, 1), ("B", 0.2, 1)] and not args.left
    assert found["A"]["losses"] == [0, 1] and found["A"]["rates"] == {0.1: pytest.approx(0.2), 0.3: 0, 0.9: pytest.approx(0.6)}
    assert "at the edge" not in runs.rates_of(found["A"])["lr"] and "at the edge" in runs.rates_of(found["B"])["lr"]
    assert len(runs.kept(cache)) == 7
    again, _ = sweep("--seeds", "0", "1")
    assert not made and again == found and "other code" not in capsys.readouterr().out
    cache.write_text(cache.read_text().replace('"code": "', '"code": "x'))
    assert sweep("--seeds", "0", "1")[0] == found and "5 of 5 runs were kept in runs.jsonl by other code" in capsys.readouterr().out
    assert runs.middle([1, 2, 3, 4], 3) == [2, 3, 4] and runs.middle([1, 2, 3, 4, 5], 3) == [2, 3, 4] and runs.middle([1, 2], 5) == [1, 2]
    assert runs.finite({"a": [1.5, math.nan, (math.inf,)]}) == {"a": [1.5, "diverged", ["diverged"]]}
    before = runs.conditions(args, str(tmp_path / "deep"))
    (tmp_path / "deep" / "x.tokens").write_bytes(b"1234")  # data.py writes beside the text: still the same data
    assert runs.conditions(args, str(tmp_path / "deep")) == before
    sweep(methods={"A": dict(a=1)})
    assert [name for name, *_ in made] == ["A", "A", "A"]
    sweep("--steps", "299")
    assert len(made) == 5 and {"A", "B"} == {name for name, *_ in made}


@pytest.mark.parametrize("words, says", {
    "table2 --device nowhere": "device type", "table2 --jobs 0": "0 must be above zero", "table2 --minutes -1": "-1 must be above zero",
    "table2 --hidden 100 --layers 2": "--hidden 100 must be a multiple of 32", "table2 --hidden 64": "give both", "table2 --seeds 1 1": "twice",
    "table2 --out folder.json": "folder.json", "table2 --out figure.png": "must be a .json", "table2 --cache folder.json": "folder.json",
    "table2 --rank 192": "rank 192 must be below 192", "table2 --steps 5 --warmup_steps 5": "--warmup_steps 5 must be below --steps 5",
    "table2 --data nowhere": "data path nowhere does not exist", "table2 --rates 6": "invalid choice", "knobs --rank 100": "rank 200 must be below 192",
    "knobs --seeds 1 2": "unrecognized", "gradient_rank --minutes 3": "unrecognized", "beyond cut --seeds 0 1": "one seed",
    "beyond variants --dtype bfloat16": "fp32 alone", "figure3 --dtype bfloat16": "leave --dtype out",
    "beyond methods --lr 1": "--lr has no effect on methods", "beyond variants --rates 3": "--rates has no effect on variants",
    "beyond methods --rank 120": "rank 192 must be below 192", "beyond cut --size mobilellm-125m": "below 192", "table2 --quick --cache x": "leave --cache out", "beyond": "the following arguments are required: table"}.items())  # fmt: skip
def test_comparisons_refuse(words, says, tmp_path, monkeypatch, capsys, tokens):
    name, *words = words.split()
    script = experiment(name)
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(tokens)
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", *words, *(["--out", "x.json"] if "--out" not in words else [])])
    with pytest.raises(SystemExit) as error:
        script.main()
    text = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and text[-2].startswith("usage") and says in text[-1]


@pytest.mark.parametrize("muon", [False, True])
def test_variants_are_galore_with_one_change(muon, tmp_path):
    """experiments/beyond.py: without a change `Lab` is GaLoreAdamW to the last bit; each option makes a difference."""
    beyond, runs = experiment("beyond"), experiment("runs")
    stream = data.open_data("python", data.get_tokenizer("bytes"), "train", 32, data_dir=str(tmp_path))
    batches = [stream.batch(4) for _ in range(6)]
    run = runs.SETTING | runs.QUICK | dict(lr=0.01, seed=0, optimiser="Lab", muon=muon)

    def weights(build):
        model = runs.make_model(run, "cpu")
        opt = build(model)
        for batch in batches:
            train.training_step(model, opt, iter([batch]), 1)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def base(model):
        return GaLoreAdamW(param_groups(model, run["rank"], run["T"], run["alpha"]), lr=run["lr"], muon=muon)

    lab = weights(lambda model: beyond.build(model, run))
    assert torch.equal(lab, weights(base))
    changes = [dict(beta1=0.8), dict(gap=0.2), dict(others=0.5), dict(right="R"), dict(residual=1.01),
               dict(shared=True), dict(svd=True), dict(even=0.9)]  # fmt: skip
    for change in changes if muon else changes[:-2]:
        assert (weights(lambda model: beyond.build(model, run | change)) - lab).abs().max() > 1e-4, change


def test_formulas_of_the_variants():
    """experiments/beyond.py: singular values all alike; columns all of one size; the part outside P scaled as Adam scales R."""
    beyond, runs = experiment("beyond"), experiment("runs")
    run = runs.SETTING | runs.QUICK | dict(lr=0.01, seed=0)
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
            torch.testing.assert_close(torch.linalg.svdvals(N), torch.full((run["rank"],), 0.2 * N.shape[1] ** 0.5), rtol=1e-3, atol=0)
        elif "even" in change:
            sizes = N.norm(dim=0)
            torch.testing.assert_close(sizes, sizes.mean().expand_as(sizes), rtol=1e-3, atol=0)
        else:
            outside = (G - P @ R) * N.norm(dim=0) / R.norm(dim=0)
            torch.testing.assert_close(step - P @ N, outside, rtol=0, atol=1e-3)


def test_the_gpu_script_runs_on_a_cpu(tmp_path):
    """experiments/gpu.py --quick: parts run each in its own process, give figures and bars, and are not run a second time."""
    out, parts = tmp_path / "gpu-quick.json", ["preflight", "7b_256"]
    command = [sys.executable, str(HERE / "experiments" / "gpu.py"), "--quick", "--device", "cpu", "--alone", "--out", str(out), "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not re.search("^Traceback", done.stderr, re.M), done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(parts, "done"), done.stdout[-2000:]
    assert found["parts"]["7b_256"]["rows"][1]["tokens/s"] > 0
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "status running" not in again.stdout


def test_glue(tmp_path):
    """experiments/glue.py --quick: all five methods learn GLUE's files through transformers and peft; GaLore's state is 4 r (m + 2n)
    bytes a matrix, full fine-tuning's Adam's two values."""
    for name, pip in (("transformers", "transformers"), ("peft", "peft"), ("sklearn", "scikit-learn"), ("scipy", "scipy")):
        oracle(name, pip)
    done = subprocess.run([sys.executable, str(HERE / "experiments" / "glue.py"), "--quick", "--threads", "1", "--out", str(tmp_path / "glue-quick.json")],
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "glue-quick.json").read_text()
    tried = {"1e-05": {"0": {"accuracy": 0.5}, "1": {"accuracy": 0.9}}, "2e-05": {"0": {"accuracy": 0.6}}, "3e-05": {"7": {"accuracy": 1.0}}}
    assert experiment("glue").chosen("RTE", tried) == "2e-05"  # compared on the seed that most rates have
    rows = {row["method"]: row for row in json.loads(text)["table"]}
    assert len(rows) == 5 and str(tmp_path) not in text
    for method, row in rows.items():
        scores = {name: task["mean"] for name, task in row["tasks"].items()}
        assert set(scores) == {"CoLA", "STS-B", "MRPC", "MNLI"} and scores.pop("STS-B") > 10 and min(scores.values()) > 80, (method, scores)
    values = {r: 2 * r * (4 * (32 + 2 * 32) + 2 * (32 + 2 * 64)) for r in (4, 8)}  # two blocks of 4 matrices 32 x 32, 2 of 32 x 64: P, M, V
    assert all(rows[f"GaLore, r = {r}"]["matrices"] == 4 * values[r] for r in values)
    assert rows["full fine-tuning"]["matrices"] // 8 == 2 * (4 * 32 * 32 + 2 * 32 * 64) + 6  # and Adam's step, a number for each of 12


def test_killed_twice():
    """experiments/torture.py: killed while a checkpoint is written and at a random moment, and resumed: weights,
    moments, data position and log are those of a run that was left alone, to the last bit."""
    command = [sys.executable, str(HERE / "experiments" / "torture.py"), "--kills", "2", "--steps", "12", "--seed", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "2 kills" in done.stdout and "log: 14 lines, equal" in done.stdout, done.stdout + done.stderr


def test_a_skipped_step_is_a_gap_in_the_curve(tmp_path):
    """experiments/plot.py: a loss that was not finite is null in the log, and NaN in the curve."""
    args = dict(size="toy", galore=True, rank=8, steps=5)
    lines = [dict(step=0, args=args), *(dict(step=i, tokens=8 * i, loss=None if i == 3 else 1.0) for i in range(1, 6))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [math.isnan(loss) for loss in experiment("plot").read(tmp_path / "log.jsonl", share=0.1).loss] == [False, False, True, False, False]
