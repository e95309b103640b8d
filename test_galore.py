"""
Every claim that the files make, held against an oracle that was not written here, or an exact identity.

    pip install -r requirements.txt pytest && pytest -q                      # three minutes on two cores
    pip install galore-torch transformers safetensors bitsandbytes    # the oracles; without them tests skip

NANO_GALORE_DATA=DIR, a folder with c4/ (shards in C4's form) and tiktoken_cache/, adds a test on real text.
"""

import copy
import gc
import gzip
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

if "OMP_WAIT_POLICY" not in os.environ:  # before torch, and for all that the tests start: see train.py
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import adam8bit
import data
import galore
import model as model_file
import train
from galore import Exact, GaLoreAdamW, orthonormal, param_groups, refresh, rotate
from model import SIZES, Config, Llama, cross_entropy
from plumbing import files, sample, shards
from plumbing.files import read_checkpoint
from thin import thin

torch.set_num_threads(1)  # tiny matrices gain nothing from threads, and lose tenfold on a busy machine
HERE, YES = Path(__file__).parent, torch.tensor(True)
EPS = 1e-6  # where two ways of computing G are compared: rounding moves a G of 1e-8 by 1e-8 / eps lr


def oracle(name: str, pip: str):
    return pytest.importorskip(name, reason=f"the oracle {pip} is not installed: pip install {pip}")


def hf_folder(model, folder):
    """A folder of Hugging Face's form whose weights are a pickle: writing and reading it needs no package."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(model.config) | dict(model_type="llama")))
    torch.save(dict(model.named_parameters()), folder / "pytorch_model.bin")


# ----- adam8bit.py ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes_and_codes_are_the_nearest(signed):
    """The 256 values equal bitsandbytes' to the last bit, and each code is as near as any of them."""
    qmap, _ = adam8bit.dynamic_map(signed)
    middle = (qmap[1:] + qmap[:-1]) / 2
    edges = torch.cat([qmap, middle, *(middle.nextafter(torch.tensor(end)) for end in (9.0, -9.0))])
    edges = F.pad(edges, (0, -len(edges) % 255)).view(-1, 255)
    edges = F.pad(edges, (0, 1), value=1.0)  # each block of 256 has its absmax, 1, in it
    noise = torch.randn(17, 331, generator=torch.Generator().manual_seed(0))
    noise[:6] *= 1e-30
    noise[-1, -5:-2] = 0
    for x in (edges, noise if signed else noise.abs() * 1e8):
        codes, scale = adam8bit.quantise(x, signed)
        assert codes.shape == x.shape and codes.dtype == torch.uint8 and len(scale) == -(-x.numel() // 256)
        for i, block in enumerate(x.flatten().split(256)):
            assert scale[i] == block.abs().max()
            y = block / scale[i].clamp_min(torch.finfo(torch.float32).tiny)
            got = (y - qmap[codes.flatten()[i * 256 : (i + 1) * 256].int()]).abs()
            assert (got - (y[:, None] - qmap).abs().amin(1)).max() < 1e-7
        back = adam8bit.dequantise(codes, scale, signed)
        assert back.shape == x.shape and back[x == 0].abs().sum() == 0
    bnb = oracle("bitsandbytes.functional", "bitsandbytes")
    assert qmap.tolist() == bnb.create_dynamic_map(signed=signed).tolist()


def test_8bit_adam_follows_bitsandbytes():
    """30 steps end within 1% of bitsandbytes' AdamW8bit. Below 4096 values state stays fp32."""
    bnb = oracle("bitsandbytes", "bitsandbytes")
    (p, small), (q,), (start,) = parameters((64, 128), (4095,)), parameters((64, 128)), parameters((64, 128))
    ours, small.grad = GaLoreAdamW([p, small], lr=1e-2, weight_decay=0.1, state_bits=8), torch.ones(4095)
    walk([ours, bnb.optim.AdamW8bit([q], lr=1e-2, weight_decay=0.1)], [[p], [q]], 30)
    assert (p - q).norm() < 0.01 * (p - start).norm()
    nbytes = [sum(x.nbytes for name, x in ours.state[p].items() if name != "t") for p in (p, small)]
    assert nbytes == [2 * (8192 + 4 * 32), 8 * 4095]


def test_no_codes_make_a_long_step():
    """Whatever codes M and sqrt(V) have, no step is longer than 5 lr, and shorter ones are exact."""
    p, codes = nn.Parameter(torch.zeros(256, 256)), torch.arange(256)
    opt, p.grad = GaLoreAdamW([p], lr=1.0, state_bits=8), torch.zeros(256, 256)
    opt.step()
    state = opt.state[p]
    state["M"].copy_(codes[:, None]), state["V"].copy_(codes)
    state["M_scale"].fill_(1), state["V_root_scale"].fill_(1)
    opt.step()
    M, V = adam8bit.dynamic_map(True)[0][:, None], adam8bit.dynamic_map(False)[0][codes.clamp_min(1)].square()
    exact = 0.9 * M / (1 - 0.9**2) / ((0.999 * V / (1 - 0.999**2)).sqrt() + 1e-8)
    assert exact.abs().max() > 1e4 and torch.allclose(-p, exact.clamp(-5, 5), rtol=1e-4)


def test_small_gradients_beside_large_ones_step_as_in_fp32():
    """Gradients of a block over six decades: steps from 8-bit moments are near fp32's in each."""
    g, ps = torch.Generator().manual_seed(0), parameters((8, 512), (8, 512))
    size = torch.logspace(0, -6, 512)[torch.randperm(512, generator=g)]
    opts = [GaLoreAdamW([p], lr=1.0, eps=1e-12, state_bits=bits) for p, bits in zip(ps, (32, 8))]
    for t in range(30):
        G = torch.randn(8, 512, generator=g) * size
        for p, opt in zip(ps, opts):
            p.data.zero_()
            p.grad = G
            opt.step()
        for i in range(6):  # each decade has half as many codes as the one above
            inside = (size <= 10.0**-i) & (size > 10.0 ** -(i + 1))
            assert (ps[0] - ps[1])[:, inside].abs().mean() < 0.015 * 2**i, (t, i)


# ----- galore.py: the subspace ------------------------------------------------------------------------------

def refreshed(P, Y, M, V, ok=YES):
    """P, M and V after a refresh out of Y."""
    state = {"P": P.clone(), "M": M.clone(), "V": V.clone()}
    rotate(state, "MV", refresh(P, Y), ok)
    return state["P"], state["M"], state["V"]


def test_basis_stays_orthonormal():
    """Whatever the gradient, P'P = I to 1e-5, and M, V stay finite, V >= 0. P holds what Y spans."""
    torch.manual_seed(0)
    noise, one = (lambda *shape: torch.randn(shape)), torch.randn(96, 1)
    for kind, Y in {
        "spread 1e9": orthonormal(noise(96, 24)) * torch.logspace(0, -9, 24) @ orthonormal(noise(24, 24)),
        "rank 3": noise(96, 3) @ noise(3, 24), "rank 0": torch.zeros(96, 24), "one": F.pad(one, (0, 23)),
        "tiny": noise(96, 24) * 1e-20, "huge": noise(96, 24) * 1e20, "equal": one.expand(96, 24),
    }.items():  # fmt: skip
        P = orthonormal(noise(96, 24))
        new, M, V = refreshed(P, Y, noise(24, 160), torch.rand(24, 160))
        assert (new.T @ new - torch.eye(24)).abs().max() < 1e-5, kind
        assert M.isfinite().all() and V.isfinite().all() and (V >= 0).all(), kind
        assert kind != "rank 0" or torch.allclose((P.T @ new).abs(), torch.eye(len(P.T)), atol=1e-5)
        assert kind in ("rank 0", "one") or (new @ (new.T @ Y) - Y).norm() < 1e-3 * Y.norm(), kind


def test_rotating_the_moments():
    """S = I changes nothing, a permutation permutes, P_new M_new is P_old M_old in the new subspace."""
    torch.manual_seed(0)
    P, M, V = torch.eye(12)[:, :4], torch.randn(4, 9), torch.rand(4, 9)
    for order, near in (([0, 1, 2, 3], 1e-6), ([2, 0, 3, 1], 5e-3)):  # 1e-3 of the old basis stays in
        new, M2, V2 = refreshed(P, P[:, order], M, V)
        sign = (new.T @ P)[range(4), order].sign()[:, None]
        assert torch.allclose(new * sign.T, P[:, order], atol=near)
        assert torch.allclose(M2 * sign, M[order], atol=near) and torch.allclose(V2, V[order], atol=near)
    new, M2, V2 = refreshed(P, torch.randn(12, 4), M, V)
    assert torch.allclose(new @ M2, new @ (new.T @ (P @ M)), atol=1e-5) and (V2 >= 0).all()
    kept = refreshed(P, torch.full((12, 4), math.nan), M, V) + refreshed(P, torch.randn(12, 4), M, V, ~YES)
    assert all(torch.equal(a, b) for a, b in zip(kept, (P, M, V) * 2))


def test_power_iteration_finds_the_subspace():
    """After 9 steps P captures what the SVD of G does, to 1%, and |G|^2 = |P'G|^2 + |G - P P'G|^2."""
    torch.manual_seed(1)  # not the seed of the first P
    p, signal = nn.Parameter(torch.zeros(64, 96)), torch.randn(64, 8) @ torch.randn(8, 96)
    opt = GaLoreAdamW([dict(params=[p], rank=8)])
    for _ in range(9):
        p.grad = signal + torch.randn(64, 96)
        opt.step()
    P = opt.state[p]["P"]
    R = P.T @ signal
    assert R.norm() > 0.99 * torch.linalg.svdvals(signal)[:8].norm()
    assert torch.isclose(signal.norm() ** 2, R.norm() ** 2 + (signal - P @ R).norm() ** 2)


# ----- galore.py: one optimiser, many oracles ---------------------------------------------------------------

SHAPES = (16, 24), (24, 16), (16, 16)


def walk(optimisers, parameters, steps):
    """The same random gradients, with a part that depends on the weights, for each one's own parameters."""
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        noise = [torch.randn(p.shape, generator=g) for p in parameters[0]]
        for opt, ps in zip(optimisers, parameters):
            for p, z in zip(ps, noise):
                p.grad = (0.1 * (z + p.detach())).to(p.dtype)
            opt.step()


def parameters(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def apart(ps, qs):
    return max((p - q).abs().max().item() for p, q in zip(ps, qs))


def refused(call, word, error=ValueError):
    with pytest.raises(error, match=word) as caught:
        call()
    assert "\n" not in str(caught.value)


def identity(ps, **options):
    """GaLore with P = I, r = m, alpha = 1, past the first refreshes."""
    options = dict(lr=0.01, weight_decay=0.1, eps=EPS) | options
    opt = GaLoreAdamW([dict(params=ps, rank=1, scale=1.0, t=9)], **options)
    for p in ps:
        names = galore.DIRECTIONS[opt.direction][1]
        opt.state[p] = {"P": torch.eye(16), "t": 0} | {name: torch.zeros(16, max(p.shape)) for name in names}
    return opt


@pytest.mark.parametrize("steps", [(9,), (4, 14, 24, 34, 44, 54), (*range(40),)], ids=str)
@pytest.mark.parametrize("rank", [None, "full"])
def test_adamw(rank, steps):
    """Without a rank, and with P = I, it is torch.optim.AdamW, though a weight has rare gradients."""
    shapes, options = SHAPES if rank else (*SHAPES, (7,), (5000,)), dict(lr=0.01, weight_decay=0.1, eps=EPS)
    ps, qs, g = parameters(*shapes), parameters(*shapes), torch.Generator().manual_seed(1)
    opt, twin = identity(ps) if rank else GaLoreAdamW(ps, **options), torch.optim.AdamW(qs, **options)
    for step in range(max(steps) + 1):
        for p, q in zip(ps, qs):
            noise = torch.randn(p.shape, generator=g)
            p.grad, q.grad = noise + p.detach(), noise + q.detach()
        if step not in steps:
            ps[0].grad = qs[0].grad = None
        opt.step(), twin.step()
        if step == 30 and not rank:
            saved, opt = copy.deepcopy(opt.state_dict()), GaLoreAdamW(ps, **options)
            opt.load_state_dict(saved)
    assert apart(ps, qs) < 1e-5  # each step rounds weights of up to 4.5 by 2.4e-7


def test_identity_basis_is_muon(monkeypatch):
    """direction="muon" with P = I is torch.optim.Muon, whose products are in fp32 here. V is not kept."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ps, qs = parameters(*SHAPES), parameters(*SHAPES)
    opt = identity(ps, betas=(0.95, 0), direction="muon")
    twin = torch.optim.Muon(qs, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)
    walk([opt, twin], [ps, qs], 20)
    assert apart(ps, qs) < 1e-6 and apart(ps, parameters(*SHAPES)) > 0.01
    assert {*opt.empty(ps[0], "cpu")} == {"P", "M", "t"}


def test_a_direction_is_a_function_and_an_entry(monkeypatch):
    """Lion, added to the table: with P = I it takes the paper's steps (2302.06675)."""

    def lion(R, M, betas, **_):
        return torch.lerp(R, M, betas[0]).sign(), torch.lerp(M, R, 1 - betas[1])

    monkeypatch.setitem(galore.DIRECTIONS, "lion", (lion, "M"))
    (p,), (q,), M = parameters((16, 24)), parameters((16, 24)), torch.zeros(16, 24)
    opt, g = identity([p], direction="lion", betas=(0.9, 0.99)), torch.Generator().manual_seed(1)
    for _ in range(20):
        p.grad = torch.randn(16, 24, generator=g)
        q.data = 0.999 * q - 0.01 * (0.9 * M + 0.1 * p.grad).sign()
        M = 0.99 * M + 0.01 * p.grad
        opt.step()
    assert apart([p], [q]) < 1e-6


def test_exact_is_galore_torch():
    """Exact takes galore-torch's trajectory over 30 steps and three SVDs, in three orientations."""
    theirs = oracle("galore_torch", "galore-torch")
    shapes = [(24, 40), (40, 24), (32, 32), (50,)]
    ps, qs = parameters(*shapes), parameters(*shapes)
    keys = dict(rank=8, update_proj_gap=12, scale=0.25, proj_type="std")
    ours, groups = ([dict(params=x[:3], **keys), dict(params=x[3:])] for x in (ps, qs))
    twin = theirs.GaLoreAdamW(groups, lr=0.01, eps=1e-8, no_deprecation_warning=True)
    walk([Exact(ours, lr=0.01), twin], [ps, qs], 30)
    assert apart(ps, qs) < 1e-5 and apart(ps, parameters(*shapes)) > 0.01


def test_transposed_matrices_take_transposed_steps():
    """W and W' move alike, subspace, refresh and all."""
    (p,) = parameters((16, 40))
    q = nn.Parameter(p.detach().T.clone())
    opts = [GaLoreAdamW([dict(params=[x], rank=4, update_proj_gap=5)], lr=0.01, eps=EPS) for x in (p, q)]
    for i in range(20):
        p.grad = torch.randn(16, 40, generator=torch.Generator().manual_seed(i))
        q.grad = p.grad.T.clone()
        [opt.step() for opt in opts]
    assert apart([p], [q.T]) < 1e-5


@pytest.mark.parametrize("kind", [GaLoreAdamW, Exact])
def test_rounding_of_bf16_weights(kind):
    """Updates that rounding to nearest loses, as Exact does, survive on average: 100 decays by 1e-3, too."""
    p = nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    opt, p.grad = kind([p], lr=1e-3), torch.ones_like(p)  # the next bf16 below 1 is 1 - 2^-8
    opt.step()
    assert set(p.tolist()) == ({1.0} if kind is Exact else {1.0, 1 - 2**-8})
    assert kind is Exact or abs(1 - p.float().mean().item() - 1e-3) < 5e-5
    p = nn.Parameter(torch.linspace(1, 2, 4096).bfloat16())
    before, opt, p.grad = p.detach().float(), kind([p], lr=0.01, weight_decay=0.1), torch.zeros_like(p)
    for _ in range(100):
        opt.step()
    shrunk = (p.detach().float() / before).mean().item()
    assert shrunk == 1 if kind is Exact else abs(shrunk - 0.999**100) < 1e-3


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rank", [None, 8])
def test_how_a_weight_lies_in_memory_changes_nothing(rank, bits, monkeypatch):
    """One whose columns are contiguous, and so is not seen in blocks of 256, takes the same steps."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)
    (p,), (q,) = parameters((32, 64)), parameters((32, 64))
    q = nn.Parameter(q.detach().T.contiguous().T)
    walk([GaLoreAdamW([dict(params=[x], rank=rank, update_proj_gap=3)], lr=0.01, eps=EPS, state_bits=bits)
          for x in (p, q)], [[p], [q]], 9)  # fmt: skip
    assert not q.is_contiguous() and apart([p], [q]) < 1e-5 < 1e-2 < apart([p], parameters((32, 64)))


@pytest.mark.parametrize("group, options, word", [
    *[(dict(rank=rank), {}, f"rank {rank}") for rank in (0, 16)],
    (dict(params=parameters((16,))), {}, "rank 4"),
    (dict(rank=None, params=parameters((16,), dtype=torch.float64)), {}, "float64"),
    (dict(update_proj_gap=0), {}, "gap 0"), (dict(proj_type="full"), {}, "full"),
    ({}, dict(state_bits=4), "state_bits is 4"), ({}, dict(max_norm=0.0), "max_norm is 0"),
    ({}, dict(direction="sgd"), "adam, muon"),
])  # fmt: skip
def test_wrong_arguments_are_refused(group, options, word):
    """What cannot be honoured gives a sentence."""
    refused(lambda: GaLoreAdamW([dict(params=parameters((16, 24)), rank=4) | group], **options), word)


# ----- galore.py: groups, schedule, saving ------------------------------------------------------------------

def conv1d(into, out):  # GPT-2's linear layer, whose weight is transposed
    return oracle("transformers.pytorch_utils", "transformers").Conv1D(out, into)


class Block(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.up, self.square, self.down = linear(24, 40), linear(40, 40), linear(40, 24)

    def forward(self, x):
        return x + self.down(torch.tanh(self.square(F.silu(self.up(x)))))


class Net(nn.Module):
    """Wide, square and tall matrices with biases in numbered blocks, an embedding, a head, in small."""

    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
        self.layers = nn.ModuleList(Block(linear) for _ in range(3))

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


def batch(step, sequences=8):
    x = torch.randint(50, (sequences, 6), generator=torch.Generator().manual_seed(step))
    return x, (7 * x + 3) % 50


def trained(way, steps=20, micro=1, dtype=torch.float32, model=None, opt=None, start=0,
            between=lambda step, model, opt: None, kind=GaLoreAdamW, build=Net, **options):  # fmt: skip
    """A model after steps on 8 sequences each, T = 7, taken "plain" or "thin" in `micro` micro-batches."""
    if model is None:
        torch.manual_seed(0)
        model = build().to(dtype)
    if opt is None:
        opt = kind(param_groups(model, rank=8, update_proj_gap=7), **dict(lr=3e-3, eps=EPS) | options)
        if way == "thin":
            thin(model, opt, accumulate=micro)
    for step in range(start, start + steps):
        x, y = batch(step)
        for a, b in zip(x.chunk(micro), y.chunk(micro)):
            (model(a, b) / micro).backward()
        between(step, model, opt)
        opt.step()
        opt.zero_grad()
    return model, opt


def weights_apart(a, b):
    return apart(a.parameters(), b.parameters())


def test_groups():
    """Matrices in blocks get the rank, or one warning names them. Each parameter has exactly one group."""
    model = Llama(Config(vocab_size=320, **SIZES["toy"] | dict(num_hidden_layers=4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # embedding, head, norms and biases are not named
        groups = param_groups(model, 16, update_proj_gap=200)
    held = [p for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    ranked = {p for g in groups[:-1] for p in g["params"]}
    assert ranked == {p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    assert [(g["offset"], g["early_gap"]) for g in groups[:-1]] == [(0, 2), (50, 2), (100, 2), (150, 2)]
    model = Net()
    model.layers.extend([nn.ModuleDict(dict(gate=nn.Linear(24, 8), up=nn.Linear(24, 40)))])
    model.layers[3].experts = nn.Parameter(torch.zeros(4, 24, 40))
    with pytest.warns(UserWarning, match="no rank: layers.*experts.*, layers.*.gate.weight [^l]*$"):
        assert model.layers[3].up.weight in {*param_groups(model, 8)[-2]["params"]}
    refused(lambda: param_groups(Net(), 64), "wider than rank 64")
    refused(lambda: param_groups(Net().requires_grad_(False), 8), "unfreeze")
    assert len(param_groups(nn.Sequential(nn.Linear(24, 40)), 8)) == 2  # a block at the root
    weights = {p for group in param_groups(Net(conv1d), 8)[:-1] for p in group["params"]}
    assert len(weights) == 9


def test_blocks_are_refreshed_in_turn():
    """Block i of L is due four times early on, and then in steps i T / L (mod T), also if T changes."""
    changes = {}

    def between(step, model, opt):
        changes[step] = [opt.init(layer.up.weight)["P"].clone() for layer in model.layers]

    trained("thin", 24, between=between)
    # The weights of step s have moved before `between` sees them: the next change is step s + 2's.
    moved = {step + 2: [not torch.equal(*pair) for pair in zip(changes[step], changes[step + 1])]
             for step in range(23)}  # fmt: skip
    assert [{t for t in moved if moved[t][i]} for i in range(3)] == [
        {2, 4, 6, 8, 14, 21}, {2, 4, 6, 8, 10, 17, 24}, {3, 5, 7, 9, 12, 19}]  # fmt: skip
    for made, T in [*((T, T) for T in range(1, 9)), (200, 10)]:
        opt = GaLoreAdamW(param_groups(Net(), rank=8, update_proj_gap=made))
        for group in opt.param_groups[:-1]:
            due = [t + 1 for t in range(99, 99 + 10 * T) if opt.due(group | dict(update_proj_gap=T, t=t))]
            assert {t % T for t in due} == {group["offset"] % T} and len(due) == 10


@pytest.mark.parametrize("way", ["plain", "thin"])
def test_any_orthonormal_basis_will_do(way, monkeypatch):
    """A refresh by torch.linalg.qr spans the same as ours. Adam does not see its other signs."""
    model, opt = trained(way)
    monkeypatch.setattr(galore, "refresh", lambda P, Y: torch.linalg.qr(F.normalize(Y, dim=0) + 1e-3 * P)[0])
    other, twin = trained(way)
    assert weights_apart(model, other) < 1e-5
    P, Q = (opt.state[model.layers[0].up.weight]["P"] for model, opt in ((model, opt), (other, twin)))
    assert not torch.equal(P, Q) and apart([P @ P.T], [Q @ Q.T]) < 1e-4


@pytest.mark.parametrize("way, direction, bits, dtype", [
    ("plain", "adam", 32, torch.float32), ("plain", "adam", 8, torch.bfloat16),
    ("thin", "adam", 8, torch.bfloat16), ("thin", "muon", 8, torch.float32)])  # fmt: skip
def test_resume_is_bit_for_bit(tmp_path, way, direction, bits, dtype, monkeypatch):
    """Saved after 5 steps, loaded with weights_only=True into new objects whose state is in host memory, 5
    more give the bits of 10."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)  # so that some of these small matrices are 8-bit
    options = dict(dtype=dtype, state_bits=bits, direction=direction)
    unbroken, _ = trained(way, 10, **options)
    options["offload"] = True
    model, opt = trained(way, 5, **options)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    model, opt = trained(way, 0, **options)
    model.load_state_dict(saved["model"]), opt.load_state_dict(saved["opt"])
    trained(way, 5, model=model, opt=opt, start=5)
    assert weights_apart(unbroken, model) == 0 and any(map(opt.far, opt.group))


def test_loading_holds_no_state_twice(monkeypatch):
    """When the first tensor of a checkpoint is read, those that a thin model's layers had before are gone."""
    model, opt = trained("thin", 0)
    old = [weakref.ref(x) for state in opt.state.values() for x in state.values() if torch.is_tensor(x)]
    saved, place = copy.deepcopy(opt.state_dict()), type(opt).place

    def placed(self, *args):
        assert not any(x() is not None for x in old)
        return place(self, *args)

    monkeypatch.setattr(GaLoreAdamW, "place", placed)
    opt.load_state_dict(saved)
    assert len(old) > 10 and all(module.galore is opt.state[module.weight] for module in opt.modules)


def test_loading_its_own_state_changes_nothing():
    """state_dict() shares the tensors; a roll-back within a session gets all of them back."""
    _, opt = trained("thin", 3)
    before = copy.deepcopy(opt.state_dict()["state"])
    opt.load_state_dict(opt.state_dict())
    for i, state in opt.state_dict()["state"].items():
        assert before[i].pop("t") == state["t"]
        assert all(torch.equal(state[name], x) for name, x in before[i].items())


@pytest.mark.parametrize("optimiser, options, remove, word", [
    (GaLoreAdamW, dict(rank=4), None, "'M', 'P', 'V'"), (GaLoreAdamW, dict(state_bits=8), None, "'M_scale'"),
    (GaLoreAdamW, dict(direction="muon"), None, "'V'"), (GaLoreAdamW, {}, "P", "'P'"),
    (GaLoreAdamW, {}, "t", "'t'"), (torch.optim.AdamW, {}, None, "'exp_avg'"),
])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(optimiser, options, remove, word, monkeypatch):
    """load_state_dict says in one sentence what differs, and changes nothing: training goes on as before."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)
    model = Net()
    other = optimiser(param_groups(model, options.pop("rank", 8)), **options)
    model(*batch(0)).backward()
    other.step()
    saved = other.state_dict()
    saved["state"][0].pop(remove, None)
    unbroken, _ = trained("thin", 3)
    model, opt = trained("thin", 2)
    refused(lambda: opt.load_state_dict(saved), word)
    trained("thin", 1, model=model, opt=opt, start=2)
    assert weights_apart(unbroken, model) == 0


# ----- thin.py ----------------------------------------------------------------------------------------------

def change_gap(step, model, opt):  # between backward pass and step: counts from the next step on
    for group in opt.param_groups:
        group["update_proj_gap"] = (7, 3, 5, 4)[step % 4]


def shared():
    model = Net()
    model.layers[2].square.weight = model.layers[0].square.weight
    return model


OPTIONS = [{}, dict(max_norm=0.5), dict(weight_decay=0.1, between=change_gap), dict(direction="muon"),
           dict(build=shared), dict(build=lambda: Net(conv1d)), dict(dtype=torch.bfloat16, state_bits=8)]
IDS = ["adam", "clipped", "decay, T changes", "muon", "shared layer", "Conv1D", "bf16, 8 bits"]


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_thin_equals_plain(options):
    """15 steps with refreshes end at the weights of loss.backward(); opt.step(). So do 4 micro-batches."""
    (plain, opt), near = trained("plain", 15, **options), 0.02 if "dtype" in options else 1e-5
    for micro in (1, 4):
        other, twin = trained("thin", 15, micro, **options)
        assert near > 1e-5 or weights_apart(plain, other) < near
        losses = [model(*batch(99)).item() for model in (plain, other)]
        assert math.isclose(*losses, rel_tol=near)
        assert torch.allclose(opt.norm, twin.norm, rtol=max(near, 1e-4))
    assert weights_apart(plain, options.get("build", Net)()) > 0.01
    model, opt = trained("thin", 1, **options)
    before = model.layers[0].up.weight.detach().clone()
    model(*batch(1)).backward()  # moves it, and leaves no gradient
    assert not torch.equal(before, model.layers[0].up.weight) or opt.max_norm
    assert opt.max_norm or all(x.grad is None for p in opt.group for x in (p, opt.leaf(p)))


class Watch(TorchDispatchMode):
    """Every tensor that an operation makes must pass `fine`."""

    def __init__(self, fine):
        super().__init__()
        self.fine = fine

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert not torch.is_tensor(x) or self.fine(x), f"{func} made a tensor of shape {tuple(x.shape)}"
        return out


def test_no_full_gradient_is_ever_made(monkeypatch):
    """No operation of a thin backward pass, refreshing or not, makes a tensor of a matrix's shape."""
    monkeypatch.setattr(GaLoreAdamW, "move", lambda *_: None)  # which makes P N
    shapes, own = {(40, 24), (24, 40), (40, 40)}, set()
    watch = Watch(lambda x: tuple(x.shape) not in shapes or x.untyped_storage().data_ptr() in own)
    for way in ("thin", "plain"):
        model, opt = trained(way, 5)
        own |= {p.untyped_storage().data_ptr() for p in model.parameters()}
        with watch, pytest.raises(AssertionError, match="made a tensor") if way == "plain" else nullcontext():
            trained(way, 3, model=model, opt=opt, start=5)  # steps 6 and 8 are due for two blocks, 7 for one


@pytest.mark.parametrize("recompute", [False, True])
def test_counted_flops_of_a_thin_block(recompute):
    """2 r (m + n) operations a token for each R. Checkpointing repeats all products but the last."""
    shape = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2)
    model, tokens, r = Llama(Config(vocab_size=64, **shape)), 3 * 16, 8
    opt = GaLoreAdamW(param_groups(model, r))
    thin(model, opt)
    block, x = model.model.layers[0], torch.randn(3, 16, 32, requires_grad=True)
    shapes = [p.shape for p in block.parameters() if p.ndim == 2]
    with FlopCounterMode(display=False) as counter:
        block(x, *model_file.rope(0, 16, model.config, x.device), None, recompute).sum().backward()
    values, products = sum(m * n for m, n in shapes), 2 * tokens * sum(m * n for m, n in shapes)
    expected = 2 * products + 2 * tokens * r * sum(m + n for m, n in shapes) + 2 * r * values
    expected += (products - 2 * tokens * 32 * 80) if recompute else 0
    counts = counter.flop_counts["Global"].items()
    assert sum(n for op, n in counts if "attention" not in str(op)) == expected


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("way, options, bad", [
    ("plain", {}, math.nan), ("thin", {}, math.inf), ("thin", {}, 1e25),  # finite, but its square is not
    ("thin", dict(direction="muon"), math.nan), ("plain", dict(kind=Exact), math.nan)])  # fmt: skip
def test_a_bad_gradient_changes_nothing_and_is_counted(way, options, max_norm, bad):
    """That weight, its moments and basis stay; all weights', if a norm is known first."""
    model, opt = trained(way, 7, weight_decay=0.1, max_norm=max_norm, **options)
    target = model.layers[1].down.weight
    kept, states = copy.deepcopy(model.state_dict()), {p: copy.deepcopy(opt.state[p]) for p in opt.group}
    spoil = opt.leaf(target).register_hook(lambda g: g.index_fill(1, torch.tensor([3]), bad))
    trained(way, 1, model=model, opt=opt, start=7)  # step 8: Exact's SVD is due, or a block
    spoil.remove()
    stayed = {name for name, x in model.state_dict().items() if torch.equal(kept[name], x)}
    assert stayed == (set(kept) if max_norm else {"layers.1.down.weight"})
    for p in opt.group if max_norm and not opt.exact else [target]:  # Exact turns the others' P before
        assert states[p].keys() == opt.state[p].keys() and states[p].pop("t") == 7  # t goes on
        assert all(torch.equal(x, opt.state[p][name]) for name, x in states[p].items())
    trained(way, 3, model=model, opt=opt, start=8)
    assert int(opt.skipped) == 1 and all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(kept["layers.1.down.weight"], target)


@pytest.mark.parametrize("way", ["thin", "plain"])
def test_norm_is_that_of_torch(way):
    """`norm` is torch's of all R, without Y. Clipping to a share of it gives Adam that share of each R."""
    moments, norms = [], []
    for max_norm in (None, 1e9, 0.01):
        model, opt = trained(way, 0, max_norm=max_norm)
        seen, project = [], opt.project

        def spy(p, seen=seen, project=project):
            R, Y = project(p)
            seen.append(R.clone())
            return R, Y

        opt.project = spy
        for step in range(2):
            (model(*batch(step)) * 100).backward()  # large: a Y of the second would count
            opt.step(), opt.zero_grad()
            assert math.isclose(opt.norm, nn.utils.get_total_norm(seen), rel_tol=1e-5)
            if step == 0:
                moments.append(torch.cat([opt.state[p]["M"].flatten() for p in opt.group]))
                norms.append(opt.norm)
            seen.clear()
    assert torch.equal(moments[0], moments[1]) and norms[0] > 0.1
    assert torch.allclose(moments[2], moments[0] * 0.01 / norms[0], rtol=1e-3)


def test_thin_refusals(monkeypatch):
    """What `thin` cannot serve, or a user would get wrong, gives a sentence."""
    model, opt = trained("thin", 0)
    refused(lambda: trained("thin", 0, kind=Exact), "SVD")
    refused(lambda: thin(model, opt), "made thin once")
    refused(lambda: thin(model, GaLoreAdamW(param_groups(model, 8))), "thin once")
    refused(lambda: thin(Net(), GaLoreAdamW(param_groups(Net(), 8))), "no weight of this model")
    refused(lambda: trained("thin", 0, build=lambda: torch.compile(Net())), "compile the blocks")
    for lose in (copy.copy, copy.deepcopy, pickle.dumps):
        refused(partial(lose, opt), "state_dict", TypeError)
    x = torch.randn(5, 24, requires_grad=True)
    (slope,) = torch.autograd.grad(model.layers[0](x).square().sum(), x, create_graph=True)
    refused(slope.square().sum().backward, "differentiate twice", RuntimeError)
    model.layers[0](x).sum().backward()
    model.zero_grad()  # not the optimiser's
    again = checkpoint(model.layers[0], x, use_reentrant=True).sum()
    refused(again.backward, "opt.zero_grad.*use_reentrant=False", RuntimeError)
    model.layers[1].up.weight.square().sum().backward()
    refused(opt.step, "outside its nn.Linear")
    monkeypatch.setitem(sys.modules, "transformers.trainer", SimpleNamespace())
    with pytest.warns(UserWarning, match="max_norm"):
        trained("thin", 0)


def test_zero_grad_drops_what_has_accumulated():
    """Half a step's micro-batches, thrown away by opt.zero_grad(), leave no trace in the next step."""
    one, _ = trained("thin", 2, micro=2)
    two, opt = trained("thin", 1, micro=2)
    (1e3 * two(*batch(5))).backward()
    opt.zero_grad()
    trained("thin", 1, micro=2, model=two, opt=opt, start=1)
    assert weights_apart(one, two) == 0
    two(*batch(5)).backward(), two(*batch(5)).backward()  # the weights have moved
    opt.zero_grad(), opt.step()
    assert opt.norm == 0


def test_model_and_optimiser_are_freed():
    """No hook keeps a thin model or its optimiser alive after their last use."""
    model, opt = trained("thin", 3)
    moments = [state["M"] for state in opt.state.values()]
    watched = [weakref.ref(x) for x in (model, opt, *model.parameters(), *moments)]
    del model, opt, moments
    gc.collect()
    assert not any(x() is not None for x in watched)


def test_updates_compile(monkeypatch):
    """torch.compile takes 8-bit updates by Muon and Adam, and the rotation, whole, and changes nothing."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)
    torch._dynamo.reset()
    compiler = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(galore, "compiled", cache(compiler))
    ends = []
    for compile in (False, True):
        ends.append(parameters((40, 16), (16, 32)))
        groups = [dict(params=ends[-1][:1], rank=8), dict(params=ends[-1][1:])]
        walk([GaLoreAdamW(groups, direction="muon", state_bits=8, compile=compile)], [ends[-1]], 3)
    assert apart(*ends) < 1e-4 and apart(ends[0], parameters((40, 16), (16, 32))) > 1e-3


def test_a_training_step_has_two_graphs():
    """Compiled blocks: four graphs, P due or not, recomputed or not, and the losses of the plain model."""
    counters, losses, x = torch._dynamo.utils.counters, {}, some_tokens(2, 33)
    for compile in (False, True):
        torch._dynamo.reset(), counters.clear()
        model = tiny()
        opt = GaLoreAdamW(param_groups(model, 4, 7), lr=3e-3, eps=EPS, state_bits=8)
        model.recompute = compile
        thin(model, opt, 2)
        for layer in model.model.layers if compile else ():
            layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        batches = iter([(x[:, :-1], x[:, 1:])] * 8)
        losses[compile] = [train.training_step(model, opt, batches, 2).item() for _ in range(4)]
    assert np.allclose(losses[False], losses[True], rtol=1e-5)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 4


# ----- weights in 8 bits ------------------------------------------------------------------------------------

def narrowed(steps, micro=1, dtype=torch.float32, into=None, **options):
    """`trained` the thin way, with the matrices of blocks in int8."""
    torch.manual_seed(0)
    model = Net(partial(nn.Linear, bias=False)).to(dtype)
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, eps=EPS, **options)
    thin(model, opt, accumulate=micro, weight_bits=8)
    if into:
        model.load_state_dict(into["model"]), opt.load_state_dict(into["opt"])
    return trained("thin", steps, micro, model=model, opt=opt, start=5 * (into is not None))


def widened(model):
    """Weights by name, as they count."""
    scales = dict(model.named_buffers())
    return {name: p.detach() * scales.get(name + "_scale", 1) for name, p in model.named_parameters()}


def test_random_bits_are_even_and_independent():
    """Of each other's neighbours, of the next step's and of another weight's."""
    opt, x = GaLoreAdamW(parameters((4, 4), (4, 4))), torch.empty(512, 512)
    (p, q), bits = opt.group, lambda seed: adam8bit.random_bits(x, seed) / 65536 - 0.5
    now, other = bits(opt.noise(p)), bits(opt.noise(q))
    opt.param_groups[0]["t"] += 1
    pairs = (now[:, 1:], now[:, :-1]), (now[1:], now[:-1]), (now, other), (now, bits(opt.noise(p)))
    assert max(abs(12 * (a * b).mean().item()) for a, b in pairs) < 0.01  # a deviation of 0.002 is expected
    assert abs(now.mean()) < 0.002 and abs(12 * now.square().mean() - 1) < 0.01


def test_random_rounding_of_codes_is_right_on_average():
    """A step's mean over many seeds is the fp32 step. 100 updates of a tenth of the grid move the mean as in
    fp32; rounded to nearest, nothing moves. A code without an update stays, and a row that grows fits."""
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 1, 8)[:, None]
    W[3] = 0
    codes, scale = adam8bit.narrow(W)
    assert ((codes * scale - W).abs() <= 0.5001 * scale).all() and codes[0].abs().max() == 127
    many, row = codes[:1].repeat(20000, 1), scale[:1].repeat(20000, 1)
    row *= 2  # of the update, 0.3 of a code, half is left
    N, one, before = torch.full(many.shape, 0.3), torch.ones(()), many.clone()
    for lr, mean in ((0.0, 0.0), (scale[0, 0], -0.15)):
        adam8bit.move_(many, N, lr, one, torch.tensor(7), row)
        assert ((many - before.float()).mean(0) - mean).abs().max() < 0.015 * (lr > 0) + 1e-9
    walk, nearest = torch.zeros(64, 64, dtype=torch.int8), torch.zeros(64, 64)
    for seed in range(100):
        adam8bit.move_(walk, torch.full((64, 64), -0.1), one, one, torch.tensor(seed), torch.ones(64, 1))
        nearest = (nearest + 0.1).round()
    assert abs(walk.float().mean() - 10) < 0.25 and nearest.abs().max() == 0
    there = codes * scale + 3 * codes.sign()
    adam8bit.move_(codes, codes.sign() * -0.3, torch.tensor(10.0), one, torch.tensor(1), scale)
    assert ((codes * scale - there).abs() <= 1.001 * scale).all() and codes[0].abs().max() == 127


@pytest.mark.parametrize("options", [dict(direction="muon"), dict(max_norm=0.5, weight_decay=0.1)], ids=str)
def test_a_step_of_codes_is_a_step_of_weights(options):
    """From the same weights, a step in int8 ends within a step of the grid of the step in fp32, and all else
    where that ends. Four micro-batches end with the loss of one batch."""
    codes, opt = narrowed(0, **options)
    start = widened(codes)
    trained("thin", 1, model=codes, opt=opt)
    torch.manual_seed(0)
    model = Net(partial(nn.Linear, bias=False))
    model.load_state_dict(start)
    model, twin = trained("thin", 1, model=model, opt=None, **options)
    after, scales = widened(codes), dict(codes.named_buffers())
    for name, p in model.named_parameters():
        grid = scales.get(name + "_scale", torch.tensor(1e-5))
        assert ((after[name] - p).abs() <= 1.001 * grid).all() and not torch.equal(after[name], start[name])
    assert torch.allclose(opt.norm, twin.norm, rtol=1e-4)
    one, two = narrowed(8, **options)[0](*batch(99)), narrowed(8, 4, **options)[0](*batch(99))
    assert abs(one - two) < 2e-3 < Net()(*batch(99)) - one


def test_int8_weights_move_to_a_device(monkeypatch):
    """Proxies and scales follow. On meta, for a GPU, Parameters get new data, modules copies of buffers."""
    def to(model, device):
        for module in model.modules():
            for p in module.parameters(recurse=False):
                torch.utils.swap_tensors(p, nn.Parameter(p.data.to(device), requires_grad=p.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device))

    model, inputs = shared(), [x.to("meta") for x in batch(0)]
    opt, cpu = GaLoreAdamW(param_groups(model, 4)), torch.Generator()
    pytest.importorskip("torch.distributed.tensor")  # while there is a torch.Generator
    monkeypatch.setattr(nn.Module, "to", to), monkeypatch.setattr(torch, "Generator", lambda device: cpu)
    thin(model, opt, weight_bits=8, device="meta")
    assert all(module.weight_scale is opt.scales[module.weight] for module in opt.modules)
    model(*inputs).backward(), opt.step()
    assert all(x.is_meta for x in [*opt.group, *opt.proxies.values(), *opt.scales.values()])


def test_codes_resume_bit_for_bit(tmp_path):
    """The model's state_dict holds codes and scales. Saved after 5 steps and loaded, 5 more give the bits of
    10. A model that is not in int8 does not take them."""
    for options in (dict(dtype=torch.bfloat16), dict(state_bits=8, direction="muon")):
        unbroken, _ = narrowed(10, **options)
        model, opt = narrowed(5, **options)
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "x")
        resumed, _ = narrowed(5, into=torch.load(tmp_path / "x", weights_only=True), **options)
        ten, five_and_five, five = (m.state_dict().values() for m in (unbroken, resumed, model))
        assert apart(ten, five_and_five) == 0 != apart(ten, five)
        with pytest.raises(RuntimeError, match="weight_scale"):
            Net(partial(nn.Linear, bias=False)).load_state_dict(model.state_dict())


@pytest.mark.parametrize("compile", [False, True])
def test_codes_are_kept_for_the_backward_pass(compile):
    """No wide matrix is kept, compiled or not. Weights take a byte each, and four for a row."""
    torch._dynamo.reset()
    model, opt = narrowed(2)
    if compile:
        model.layers[0].compile(fullgraph=True, dynamic=False, backend="aot_eager")
    kept, x = [], torch.randn(3, 5, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model.layers[0](x)
    shapes = [{*layer.weight.shape} for layer in opt.modules]
    assert not any(x.is_floating_point() and {*x.shape} in shapes for x in kept)
    assert sum(x.dtype == torch.int8 for x in kept) == 3
    taken = [layer.weight.nbytes + layer.weight_scale.nbytes for layer in opt.modules]
    assert taken == [layer.weight.numel() + 4 * len(layer.weight) for layer in opt.modules]


def test_nothing_of_a_matrix_lives_between_layers():
    """Each layer makes wide matrices in its forward and backward pass, and they are gone where it ends."""
    model, opt = narrowed(2)
    shapes, made, looks = [{*layer.weight.shape} for layer in opt.modules], [], []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.is_floating_point() and {*out.shape} in shapes and out.ndim == 2:
                made.append(weakref.ref(out))
            return out

    def look(*_):
        looks.append((len(made), sum(x() is not None for x in made)))

    for layer in opt.modules:
        layer.register_forward_hook(look)
        layer.register_full_backward_hook(look)
    with Note():
        model(*batch(0)).backward()
    assert len(looks) == 2 * len(opt.modules) and not any(alive for _, alive in looks)
    assert looks[-1][0] >= 2 * len(opt.modules)


def test_a_run_in_int8(tmp_path, tokens):
    """--weight_bits 8 trains, saves int8, resumes, and is refused in one sentence without the thin way. What
    is exported computes the same."""
    for words in ("", "--galore --exact", "--galore --no-layerwise"):
        said = run(tmp_path, "--weight_bits", 8, *words.split(), expect=2)
        assert "--weight_bits 8 needs --galore" in said and len(said.splitlines()) == 2
    few = [*FEW, "--weight_bits", 8, "--data_dir", tokens, "--out_dir", "a"]
    run(tmp_path, *few, "--steps", 2)
    name, folder = "model.layers.0.mlp.up_proj.weight", tmp_path / "a"
    held = read_checkpoint(folder)["model"][name].clone()
    assert held.dtype == torch.int8 and held.abs().max() == 127
    run(tmp_path, "--resume", "--out_dir", "a", "--steps", 3)
    made = read_checkpoint(folder)["model"]
    assert not torch.equal(held, made[name])
    oracle("safetensors", "safetensors"), oracle("huggingface_hub", "huggingface_hub")
    run(tmp_path, "a", "--export", "hf", program=sample)
    theirs = Llama.from_pretrained(tmp_path / "hf").state_dict()
    assert torch.equal(theirs[name], made[name] * made[name + "_scale"])
    model = tiny()
    thin(model, GaLoreAdamW(param_groups(model, 4)), weight_bits=8)
    model.save_pretrained(tmp_path / "tiny")
    with torch.no_grad():
        logits, again = (m(some_tokens()) for m in (model, Llama.from_pretrained(tmp_path / "tiny")))
    assert torch.allclose(logits, again, atol=1e-6)


# ----- several processes ------------------------------------------------------------------------------------

def one_of_two(rank, function, file, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2,
                                         timeout=timedelta(seconds=60))  # fmt: skip
    function(rank, results)
    torch.distributed.destroy_process_group()


def in_processes(function, folder):
    """What `function` leaves in a dict in two processes that gloo connects."""
    with torch.multiprocessing.Manager() as manager:
        arguments = function, folder / function.__name__, (results := manager.dict())
        torch.multiprocessing.start_processes(one_of_two, arguments, 2, start_method="fork")
        return dict(results)


WAYS = {"thin": {}, "clip": dict(max_norm=0.5), "plain": {}, "exact": dict(kind=Exact)}


def train_half(rank, results):
    for way, options in WAYS.items():
        model, opt = trained("plain", 0, **options)
        if way in ("thin", "clip"):
            thin(model, opt, accumulate=2)
        for step in range(12):
            x, y = (t.chunk(2)[rank] for t in batch(step))
            for a, b in zip(x.chunk(2), y.chunk(2)):
                (model(a, b) / 2).backward()
            opt.step()
            opt.zero_grad()
        results[way, rank] = [p.detach() for p in model.parameters()]


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    """Processes, which exchange R and Y alone, end at the weights of one with all their batches."""
    results = in_processes(train_half, tmp_path)
    for way, options in WAYS.items():
        assert apart(results[way, 0], results[way, 1]) == 0
        if way != "exact":  # the signs of an SVD hang on rounding, and Exact keeps the moments when they flip
            assert apart(results[way, 0], trained("plain", 12, **options)[0].parameters()) < 1e-5


DIFFERENT = ["experts plain", "experts thin", "tower plain", "vector thin", "order plain", "order thin",
             "fewer thin", "gap plain", "gap thin", "none thin"]  # fmt: skip


def train_differently(rank, results):
    for case, way in map(str.split, DIFFERENT):
        model, opt = trained(way, 2, micro=2)
        ps, layers = [*model.parameters()], [*model.layers]
        before = copy.deepcopy(ps)
        if case == "gap":
            opt.param_groups[0]["update_proj_gap"] = (1, 7)[rank]
            opt.arm()
        layers[0].up.bias.requires_grad_(case != "vector" or rank == 0)
        use = dict(experts=[layers[rank], layers[2]], tower=layers[rank * 2 :], order=layers[:: 1 - 2 * rank])
        try:
            for _ in range(2 - rank * (case == "fewer")):
                x = model.embed(batch(2)[0])
                for layer in use.get(case, layers):
                    x = layer(x)
                x.square().mean().backward()
            opt.step()
        except ValueError as error:
            results[f"{case} {way}", rank] = str(error), apart(before, ps)


def test_processes_with_other_gradients_end_with_one_sentence(tmp_path):
    """Other layers, another order or other passes: both end with one sentence and no weight has moved."""
    results = in_processes(train_differently, tmp_path)
    assert results.keys() == {(case, rank) for case in {*DIFFERENT} - {"none thin", "order plain"}
                              for rank in (0, 1)}  # fmt: skip
    for sentence, moved in results.values():
        assert sentence.startswith("the processes would average different gradients") and moved == 0


# ----- model.py ---------------------------------------------------------------------------------------------

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
VARIANTS = {
    "plain": {},
    "grouped": dict(num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True, num_key_value_heads=1),
    "theta, eps, head_dim": dict(rope_theta=500.0, rms_norm_eps=1e-3, head_dim=6),
}


def tiny(seed=0, **options):
    """A model with weights so large, and norms so uneven, that a wrong formula shows in the logits."""
    torch.manual_seed(seed)
    model = Llama(Config(**TINY | options))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    return model


def some_tokens(B=2, T=17):
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(loss, x, W, targets):
    x, W = x.clone().requires_grad_(), W.clone().requires_grad_()
    value = loss(x, W, targets)
    (value * 4).backward()  # a power of two rounds nothing
    return [value.detach(), x.grad, W.grad]


@pytest.mark.parametrize("rows, dtype", [(7, torch.float32), (None, torch.float32), (64, torch.bfloat16)])
def test_chunked_loss_equals_cross_entropy(rows, dtype):
    """Loss and gradients are as near to fp64's as those of full logits, in any chunks, compiled too."""
    torch.manual_seed(0)
    x, W, targets = torch.randn(120, 64), torch.randn(500, 64) / 8, torch.randint(500, (120,))
    x[::2] *= 40  # logits whose exp is infinite
    x, W = x.to(dtype), W.to(dtype)
    full = lambda x, W, t: F.cross_entropy(F.linear(x, W).to(torch.promote_types(x.dtype, torch.float32)), t)
    truth, theirs = (loss_and_gradients(full, x.to(d), W.to(d), targets) for d in (torch.float64, dtype))
    z, t = 1e4 + torch.randn(9, 500), targets[:9]  # an offset of all logits costs no digits
    (ours, _), known = model_file.loss_of_chunk(z, t[:, None], 9, False), F.cross_entropy(z.double(), t)
    assert abs(ours / 9 - known) < 1e-5
    fast = torch.compile(model_file.loss_of_chunk) if rows == 64 else model_file.loss_of_chunk
    ours = loss_and_gradients(partial(cross_entropy, rows=rows, loss_of_chunk=fast), x, W, targets)
    assert [y.dtype for y in ours] == [torch.float32, dtype, dtype]
    for found, known, true in zip(ours, theirs, truth):
        assert (found - true).norm() < 1.5 * (known - true).norm() + 1e-6 * true.norm()
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(x, W, targets, rows), ours[0])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_checkpoints_go_both_ways(variant, tmp_path, monkeypatch):
    """transformers reads our folders and we read its own. Logits, gradients and greedy tokens are equal."""
    monkeypatch.setattr(model_file, "CHUNK_LOGITS", 64 * TINY["vocab_size"])  # 160 targets: three chunks
    hf, model, tokens = oracle("transformers", "transformers"), tiny(**variant), some_tokens(10)
    model.save_pretrained(tmp_path / "ours")
    theirs = hf.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-4)
    theirs(tokens, labels=tokens).loss.backward()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5)
    greedy = theirs.generate(tokens, max_new_tokens=20, do_sample=False)[:, tokens.size(1) :]
    for how in (dict(temperature=0), dict(temperature=3.0, top_k=1)):
        assert torch.equal(torch.cat([*model.generate(tokens, 20, **how)], dim=1), greedy)
    refused(lambda: next(model.generate(tokens[:, :0], 1)), "generate needs")
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY | variant, initializer_range=0.2))
    theirs.save_pretrained(tmp_path / "theirs")
    back = Llama.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(back(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_sizes_and_first_weights():
    """7b's and the MobileLLMs' sizes are as published, the others the paper's. Matrices are N(0, 0.02)."""
    millions = {"60m": 58.1, "130m": 134.1, "350m": 368.0, "1b": 1339.1, "3b": 2685.8, "7b": 6738.4,
                "mobilellm-125m": 124.6, "mobilellm-350m": 345.35}  # fmt: skip
    for name, published in millions.items():
        model = Llama(Config(vocab_size=32000, **SIZES[name]), device="meta")
        assert model.num_parameters() == pytest.approx(published * 1e6, abs=6e4), name
    for p in Llama(Config(**TINY)).parameters():
        assert (p == 1).all() if p.ndim == 1 else abs(p.std() - 0.02) < 2e-3 and abs(p.mean()) < 2e-3


def test_rope_is_exact_in_a_bf16_model():
    """At position 1,499 cos and sin are those of fp64. The two halves of a head have the same angles."""
    seen, narrow = [], tiny().to(torch.bfloat16)
    narrow.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1:3]))
    assert narrow(some_tokens(1, 1500)).dtype == torch.bfloat16
    angle = torch.outer(torch.arange(1500.0).double(), 10000.0 ** -(torch.arange(0, 8, 2).double() / 8))
    angle = angle.repeat(1, 2)
    torch.testing.assert_close(seen, [angle.cos().float(), angle.sin().float()], rtol=0, atol=2e-4)


# ----- data.py ----------------------------------------------------------------------------------------------

BYTES = data.get_tokenizer("bytes")
C4 = "c4-train.{:05d}-of-01024.json.gz"
GOOD, EMPTY = b'{"text": "hello"}\n', b'{"text": ""}\n'


@pytest.fixture
def alone(monkeypatch):
    """No process beside the test: every shard is prepared when it is needed."""
    monkeypatch.setattr(shards.Shard, "prefetch", lambda self: None)


def texts(n, seed=0):
    """n documents: one empty, one with a special token as text, others of letters of one to four bytes."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefg \nåß中😀", k=rng.randrange(1, 90))) for _ in range(n - 2)]
    return ["", "a <|endoftext|> b", *words]


def json_lines(documents):
    return "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents).encode()


def c4_like(folder, shards=3, documents=30):
    """Training files and a validation file in C4's form; returns the ids of the training documents."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*map(C4.format, range(shards)), "c4-validation.00000-of-00008.json.gz"]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(gzip.compress(json_lines(texts(documents, seed)), mtime=0))
    return ids_of([text for seed in range(shards) for text in texts(documents, seed)])


def opened(path, split="train", seq_len=16, **options):
    return data.Stream(str(path), BYTES, split, seq_len, **options)


def ids_of(documents):
    return [id for text in documents for id in [*text.encode(), BYTES.eot]]


def targets(stream, n, *stripe):  # of n batches of two sequences
    return [id for _ in range(n) for id in stream.batch(2, *stripe)[1].flatten().tolist()]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_round_trip(name, tmp_path, monkeypatch):
    """Documents come back letter by letter, whatever the file's form. GPT-2's ids are tiktoken's own."""
    documents, folder = texts(300), Path(os.environ.get("NANO_GALORE_DATA", "."))
    if name == "gpt2":
        if not (folder / "tiktoken_cache").exists():
            pytest.skip("NANO_GALORE_DATA (a folder with c4/ and tiktoken_cache/) is not set")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken_cache"))
        with gzip.open(*(folder / "c4").glob("c4-validation*.json.gz")) as lines:
            documents += [json.loads(line)["text"] for line in islice(lines, 200)]
        encode = data.tiktoken.get_encoding("gpt2").encode
        for text in documents[-20:] + ["<|endoftext|>"]:
            assert data.get_tokenizer(name).encode(text).tolist() == encode(text, disallowed_special=())
    monkeypatch.setattr(data, "THREADS", 7)
    tokenizer, lines, mark = data.get_tokenizer(name), json_lines(documents), b"\xef\xbb\xbf"
    (tmp_path / "mine.jsonl").write_bytes(lines)
    ids = data.Stream(str(tmp_path / "mine.jsonl"), tokenizer, "train", 1).shards[0].prepare()
    ids = np.fromfile(ids, tokenizer.dtype)
    ends = np.flatnonzero(ids == tokenizer.eot)
    assert ends[-1] == len(ids) - 1 and tokenizer.decode([tokenizer.n_vocab, 10**6]) == ""
    assert [tokenizer.decode(part[:-1]) for part in np.split(ids, ends[:-1] + 1)] == documents
    assert tokenizer.n_bytes[ids].sum() == sum(len(text.encode()) for text in documents)
    for name, content in [
        ("gzip.Json.GZ", gzip.compress(lines)), ("plain.txt", "\r\nå\ufeffb\n".encode() * 20000),
        ("blank.jsonl", mark + lines.replace(b"\n", b"\r\n \t\n\r\n") + b"  "),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
        want = [content.decode()] if "txt" in name else documents
        made = opened(tmp_path / name).shards[0].prepare()
        assert np.fromfile(made, np.uint16).tolist() == ids_of(want), name


def test_every_token_once_over_shard_boundaries(tmp_path, alone, capsys):
    """A pass has every token once as a target, in order, and starts over. No text of yours is deleted."""
    ids, seen = c4_like(tmp_path), []
    stream = opened(tmp_path, keep_shards=2)
    while len(seen) < 2.5 * len(ids):
        x, y = stream.batch(3)
        assert x.shape == y.shape == (3, 16) and x.dtype == y.dtype == torch.int64
        assert x.flatten().tolist() == [seen[-1] if seen else ids[0], *y.flatten()[:-1].tolist()]
        seen += y.flatten().tolist()
        assert len([*tmp_path.glob("c4-train*.tokens")]) <= 2 and len([*tmp_path.glob("*.gz")]) == 4
    assert seen == (ids * 4)[1 : len(seen) + 1] and stream.epoch == 2
    assert f"{len(ids):,} tokens" in capsys.readouterr().err
    assert stream.bytes_per_token == sum(id != 256 for id in seen) / len(seen)
    (tmp_path / C4.format(0)).write_bytes(gzip.compress(json_lines(texts(30, 9))))
    assert targets(opened(tmp_path), 2) == ids_of(texts(30, 9))[1:65]


@pytest.mark.parametrize("world", [1, 4])
def test_validation_ends_and_is_always_the_same(tmp_path, alone, world):
    """Stripes, put together, are every full sequence once. It ends for all processes. Reset starts anew."""
    c4_like(tmp_path)
    ids, streams = ids_of(texts(30, seed=3)), [opened(tmp_path, "val") for _ in range(world)]
    for _ in range(2):
        seen = []
        with pytest.raises(data.EndOfData):
            while True:
                for rank, stream in enumerate(streams):
                    seen += targets(stream, 1, rank, world)
        assert seen == ids[1 : (len(ids) - 1) // 16 * 16 + 1]
        assert len({stream.bytes_per_token for stream in streams}) == 1  # of all processes' targets
        [stream.reset() for stream in streams]


@pytest.mark.parametrize("when", [0, 9, 40, 81])
def test_resume_equals_unbroken(tmp_path, alone, when):
    """From a saved state the tokens go on, for any number of processes. Other data's state is refused."""
    c4_like(tmp_path, shards=4, documents=12)
    stream = opened(tmp_path, seq_len=8)
    targets(stream, 2 * when)
    state = json.loads(json.dumps(stream.state_dict()))
    want = targets(stream, 120)
    for file in tmp_path.glob("*.tokens"):
        file.unlink()
    resumed = [opened(tmp_path, seq_len=8, state=state) for _ in range(2)]
    assert [file.name.partition(".bytes")[0] for file in tmp_path.glob("*.tokens")] == [state["shard"]]
    assert [id for _ in range(60) for rank in (0, 1) for id in targets(resumed[rank], 1, rank, 2)] == want
    for change in (dict(tokenizer="gpt2"), dict(shard="gone"), dict(shard_tokens=5)):
        refused(partial(opened, tmp_path, state=state | change), str(*change.values()))


@pytest.mark.parametrize("folder", [(
    "TRAIN.JSONL|c4-train.00000-of-01024.json.gz|my-training-data.txt|train (1).jsonl",
    "Eval.TXT.GZ|dev.json|my_validation.txt|train_val.jsonl|x.val.2.txt", "other.txt|test.txt"), (
    "The Acid Test.txt|b.TXT|constraints.txt|interval.jsonl", "valset (2).jsonl",
    "._train.txt|.hidden.jsonl|LICENSE.txt|README_en.TXT|a.jsonl.zst|folder.jsonl/|testset.jsonl|u.csv"),
], ids=["split", "no split"])  # fmt: skip
def test_what_is_read_of_a_folder(tmp_path, folder, capsys):
    """For training, validation, or not: the word that stands alone in a file's name says it. A line tells."""
    for name in "|".join([*folder, "b.TXT.bytes.0123456789ab.tokens"]).split("|"):
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("x")
    for found, want in zip(shards.find_shards(str(tmp_path), BYTES, None, "{}", say=True), folder):
        assert "|".join(sorted(file.name for shard in found for file in shard.files)) == want
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"not read: {folder[2].replace('|', ', ')}\n" in said


BAD = {  # name: content of the file; what the sentence says
    "gone.txt": (None, "does not exist"), "empty.jsonl": (b"", "empty.jsonl is empty"),
    "README.md": (b"x", "no training text .*; found: README.md"),
    "no_gzip.json.gz": (GOOD, "no_gzip.json.gz cannot be read after line 0: Not a gzipped file"),
    "no_json.jsonl": (GOOD * 2 + b"{oops\n" + GOOD, "no_json.jsonl, line 3: not json"),
    "array.json": (b'[{"text": "hello"}]', r'array.json, line 1: .* \(jq -c "\.\[\]" makes'),
    "latin.txt": (b"abc\n" * 99999 + "å".encode("latin1") + b"\n", "latin.txt, byte 399996: not UTF-8"),
    "empty.json": (EMPTY * 300 + GOOD * 99, "the train data of .* begins with empty documents"),
    "short.txt": (b"0123456789", "the train data of .* has 11 tokens, too few"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, alone, name):
    """A sentence says what is wrong, with the name and the line or byte. No half a file is left over."""
    content, sentence = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(lambda: opened(tmp_path / name, seq_len=64), sentence)
    assert {file.suffix for file in tmp_path.iterdir()} <= {Path(name).suffix, ".tokens"}


# ----- train.py ---------------------------------------------------------------------------------------------

FEW = ("--size toy --data python --galore --rank 16 --seq_len 32 --total_batch_size 2 --eval_tokens 256 "
       "--device cpu --seed 1 --steps 8 --eval_every 4 --save_every 99 --out_dir run").split()  # fmt: skip


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """The standard library, tokenised once for all runs."""
    return str(tmp_path_factory.mktemp("tokens"))


class Evil:
    """A pickle that creates a file when it is opened as Python's own are."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.fixture
def few(tokens):
    return [*FEW, "--data_dir", tokens]


def run(folder, *options, expect=0, program=train):
    """program.main() in this process, in `folder`; returns what it printed. expect: its exit code."""
    said, code, handlers = io.StringIO(), 0, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *map(str, options)])
        try:
            program.main()
        except SystemExit as leave:
            code = leave.code
        finally:
            [signal.signal(*handler) for handler in handlers.items()]
    assert code == expect, said.getvalue()
    return said.getvalue()


def log_of(folder):
    """The lines of a log. JSON has no NaN."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: 1 / 0) for line in lines]


def newest(folder):
    return max(folder.glob("checkpoint-0*.pt"))


def same_run(*folders):
    """Do two runs end with the same weights and log, to the last bit, but for a clock and a memory gauge?"""
    a, b = (torch.load(newest(folder), weights_only=True)["model"] for folder in folders)
    logs = [[line | dict(tokens_per_s=0, memory_gb=0) for line in log_of(folder) if "args" not in line]
            for folder in folders]  # fmt: skip
    return logs[0] == logs[1] and all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.fixture(scope="module")
def documented(tmp_path_factory, tokens):
    """A whole short run of the README's first command, in a process of its own, on a terminal of ASCII."""
    folder = tmp_path_factory.mktemp("documented")
    options = "--galore --rank 64 --lr 0.01 --steps 24 --seq_len 64 --eval_tokens 99 --total_batch_size 8"
    command = [sys.executable, HERE / "train.py", *options.split(), "--data_dir", tokens]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "out" / "toy-galore-r64", done.stdout + done.stderr


def test_the_documented_command_learns(documented):
    """It says what it does, learns, samples, and leaves log and checkpoint."""
    folder, output = documented
    said = "galore-r64", "1,746,176 parameters", "24/24 [", "bits per byte", "sample:\n\n\n\ndef "
    assert all(word in output for word in said)
    first, *lines = log_of(folder)
    steps, scores = [line for line in lines if "loss" in line], lines[-1]
    assert first["args"]["size"] == "toy" and first["versions"]["torch"] == torch.__version__
    for i, line in enumerate(steps, 1):
        assert line["step"] == i and line["tokens"] == 512 * i and line["grad_norm"] > 0 == line["skipped"]
        assert 0.1 < line["memory_gb"] < 2 and 100 < line["tokens_per_s"] < 1e6
    assert len(steps) == 24 and steps[0]["loss"] > 5 and scores["val_loss"] < 3.7
    bits = scores["val_loss"] / math.log(2)  # a token is a byte
    assert math.isclose(scores["bits_per_byte"], bits, rel_tol=0.01)


def test_one_of_two_processes_dies_and_one_goes_on(tmp_path, few):
    """Of two under torchrun one is killed. One process goes on, and ends like one alone, to the last bit."""
    options = [*few, *"--steps 12 --save_every 2 --eval_every 99 --update_proj_gap 5 --state_bits 8".split(),
               *"--grad_clipping 1 --total_batch_size 8 --batch_size 4 --eval_tokens 32".split()]  # fmt: skip
    torchrun = [sys.executable, *"-m torch.distributed.run --nproc_per_node=2 --master_port=29517".split()]
    env, log = os.environ | {"OMP_NUM_THREADS": "1"}, tmp_path / "run" / "log.jsonl"
    with subprocess.Popen([*torchrun, HERE / "train.py", *options], cwd=tmp_path, env=env) as process:
        while process.poll() is None and not (log.exists() and '"step": 5,' in log.read_text()):
            time.sleep(0.02)
        ps = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
        os.kill(int(subprocess.run(ps, capture_output=True, text=True).stdout.split()[1]), signal.SIGKILL)
        assert process.wait(timeout=60) == 1
    run(tmp_path, "--resume", "--out_dir", "run")
    run(tmp_path, *options, "--out_dir", "one")
    assert same_run(tmp_path / "run", tmp_path / "one")


WRONG = {
    "--rank 8": "--rank has no effect without --galore",
    "--galore --exact --direction muon": "drop --direction",
    "--size 7b --galore": "on a CPU this would take about 271 years",
    "--galore --rank 256": "--rank 256 is not below 256",
    "--lr nan": "--lr: nan must be at least 1e-18",
    "--total_batch_size 9 --batch_size 2": "9 is no multiple of 2, --batch_size times processes",
    "--vocab_size 100": "smaller than that of --tokenizer bytes, 257: change one of them",
    "--data_url x{}": "no effect with --data python",
    "--data c4 --tokenizer bytes --data_url x": "needs a {}",
    "--data c4 --tokenizer bytes --keep_shards 1": "at least 2",
    "--tokenizer klingon": "no tokenizer 'klingon'",
    "--resume --out_dir empty": "empty holds no checkpoint-STEP.pt",
    "--init nowhere": "does not exist: a Hugging Face checkpoint folder is needed",
}


@pytest.mark.parametrize("options", WRONG, ids=ascii)
def test_wrong_arguments_get_one_sentence(options, monkeypatch, tmp_path):
    """What cannot be honoured is refused in one line with exit code 2, before anything is written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = run(tmp_path, *options.split(), expect=2)
    assert WRONG[options] in output and len(output.strip().splitlines()) == 2  # usage, sentence
    assert not list(tmp_path.iterdir())


CHANGES = [  # what is done to a checkpoint
    lambda c: c.update(step=-3), lambda c: c.pop("model"), lambda c: c["args"].update(lr="0.01"),
    lambda c: c["model"].update({"lm_head.weight": c["model"]["lm_head.weight"][:-1]}),
    dict.clear, lambda c: c.update(step=Evil(Path("trace"))),
]  # fmt: skip


def test_what_cannot_go_on_is_refused(documented, tmp_path):
    """A run is not written over, nor joined, nor resumed as another model or from a damaged checkpoint."""
    folder, name = tmp_path / "run", newest(documented[0]).name
    shutil.copytree(documented[0], folder)
    checkpoint, log = folder / name, (folder / "log.jsonl").read_bytes()
    whole = checkpoint.read_bytes()

    def is_refused(words, *options):
        before = checkpoint.read_bytes()
        assert words in run(tmp_path, "--out_dir", "run", "--device", "cpu", *options, expect=2)
        assert checkpoint.read_bytes() == before and (folder / "log.jsonl").read_bytes() == log

    is_refused("holds a run already", "--size", "toy")
    for option, old, new in ("size", "toy", "60m"), ("rank", 64, 32), ("init", None, "x"):
        is_refused(f"{option} was {old} and is {new}: that cannot change", "--resume", f"--{option}", new)
    locked = files.Log(folder, 99)
    is_refused("another process is training in run", "--resume", "--steps", "25")
    locked.close()
    for change in CHANGES:
        content = torch.load(documented[0] / name, weights_only=True)
        change(content)
        torch.save(content, checkpoint)
        is_refused(f"run/{name} cannot be used", "--resume")
    half = len(whole) // 2
    for damaged in (whole[:half], whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]):
        checkpoint.write_bytes(damaged)
        is_refused(f"run/{name} cannot be used", "--resume")
    assert not list(tmp_path.glob("**/trace"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory, tokens):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    run(folder, *FEW, "--data_dir", tokens)
    return folder / "run"


@pytest.mark.parametrize("where, name, stopped", [
    ("training_step", "SIGINT", 3), ("batch", "SIGHUP", 2), ("evaluate", "SIGTERM", 8), ("batch", "", 2)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(where, name, stopped, monkeypatch, tmp_path, few, calm):
    """In a step, in a wait for data, in validation, by bad data: resumed, it ends like a calm run."""
    owner, calls = train if where != "batch" else data.Stream, []
    original = getattr(owner, where)

    def struck(*args):
        calls.extend([1] * (where != "batch" or args[0].split == "train"))
        if len(calls) == (2 if where == "evaluate" else 3):
            if not name:
                raise ValueError("shard 7, line 10: not json")
            for _ in range(1 if where == "batch" else 2):  # torchrun passes on a Ctrl-C that all have had
                os.kill(os.getpid(), getattr(signal, name))
            if where == "batch":
                time.sleep(60)
            patch.setattr(data.Stream, "batch", None)  # from here on nothing is read
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, struck)
        output = run(tmp_path, *few, expect=0 if name else 2)
    assert name or output.endswith("line 10: not json\n")
    assert (f"stopped after step {stopped}; to go on from the checkpoint of step {stopped}: "
            "python train.py --resume --out_dir run") in output  # fmt: skip
    run(tmp_path, "--resume", "--out_dir", "run")
    assert same_run(tmp_path / "run", calm)


def test_recipes(monkeypatch, capsys):
    """The size's recipe fills in what is not typed, and --help shows it; one without has the paper's."""
    monkeypatch.setitem(SIZES, "new", SIZES["toy"])
    for words, expected in {
        "--size 7b --galore": dict(lr=0.005, rank=1024, update_proj_gap=500, state_bits=8, steps=150_000),
        "--size 1b --galore --direction muon": dict(lr=0.02, rank=512, layerwise=True),
        "--size toy --exact --galore": dict(lr=0.005, layerwise=False, tokenizer="bytes", warmup_steps=74),
        "--size new --galore": dict(lr=0.01, rank=64, update_proj_gap=200, total_batch_size=512),
    }.items():
        words = [*words.split(), "--vocab_size", "320"]
        assert expected.items() <= (vars(train.settle(words)[0]) | dict(automatic=None)).items()
        assert train.settle([*words, "--lr", "3"])[0].lr == 3
        with pytest.raises(SystemExit):
            train.settle([*words, "--help"])
        assert f"peak learning rate (default: {expected['lr']})" in " ".join(capsys.readouterr().out.split())


def test_learning_rates_and_decay(monkeypatch, tmp_path, few):
    """Linear warm-up, then a cosine to min_lr_ratio; a group's own lr is its peak. Norms do not decay."""
    args = SimpleNamespace(warmup_steps=10, steps=110, min_lr_ratio=0.1)
    rates = np.array([train.learning_rate(step, args, 1.0) for step in range(1, 111)])
    assert np.allclose(rates[:10], np.arange(1, 11) / 10) and np.all(np.diff(rates[9:]) < 0)
    assert math.isclose(rates[59], 0.55) and math.isclose(rates[-1], 0.1)
    own = train.param_groups
    monkeypatch.setattr(train, "param_groups", lambda *args: [group | dict(lr=0.02) for group in own(*args)])
    few += "--steps 3 --lr 0.001 --warmup_steps 2 --min_lr_ratio 1 --weight_decay 0.1".split()
    for more in (few, ["--resume", "--out_dir", "run", "--steps", "4"]):
        run(tmp_path, *more)
        groups = torch.load(newest(tmp_path / "run"), weights_only=True)["optimizer"]["param_groups"]
        found = {(group["lr"], group["rank"], group["weight_decay"]) for group in groups}
        assert found == {(0.02, 16, 0.1), (0.001, None, 0.1), (0.001, None, 0.0)}
        assert sum(group["weight_decay"] == 0 for group in groups) == 2 * 2 + 1  # norms
    assert [line["lr"] for line in log_of(tmp_path / "run") if "loss" in line] == [0.0005, *[0.001] * 3]


def test_init_continues_from_a_hugging_face_folder(tmp_path, tokens):
    """The first loss is the saved weights', and they are validated before."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    start = Llama(Config(vocab_size=320, num_key_value_heads=2, **shape))
    hf_folder(start, tmp_path / "hf")
    options = ("--data python --galore --rank 8 --steps 1 --total_batch_size 4 --seq_len 64 --eval_tokens 64 "
               "--device cpu --out_dir run --tokenizer bytes --init hf --data_dir").split()
    run(tmp_path, *options, tokens)
    x, y = opened("python", seq_len=64, data_dir=tokens).batch(4)
    _, before, first, *_ = log_of(tmp_path / "run")
    assert math.isclose(first["loss"], start(x, y).item(), rel_tol=1e-4) and before["val_tokens"] == 64
