"""
Every claim that the files make, held against an oracle that was not written here, or an exact identity.

    pip install -r requirements.txt pytest && pytest -q                      # four minutes on two CPU cores
    pip install galore-torch transformers safetensors bitsandbytes tensorboard peft scikit-learn   # the oracles; without them their tests skip

NANO_GALORE_DATA=DIR, a folder with c4/ (shards in C4's form) and tiktoken_cache/, adds tests on real text.
"""

import copy
import email.utils
import fcntl
import gc
import gzip
import http.server
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

if "OMP_WAIT_POLICY" not in os.environ:  # before torch, and for all processes that the tests start: see train.py
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

import adam8bit
import data
import galore
import model as model_file
import train
from galore import GaLoreAdamW, orthonormal, param_groups, refresh, thin
from model import SIZES, Config, Llama, cross_entropy
from plumbing import files, memory, shards

torch.set_num_threads(1)  # tiny matrices gain nothing from threads, and lose tenfold when another program wants the cores
YES = torch.tensor(True)
EPS = 1e-6  # where two ways of computing G are compared: rounding moves an element whose G cancels to 1e-8 by 1e-8 / eps lr


def oracle(name: str, pip: str):
    return pytest.importorskip(name, reason=f"the oracle {pip} is not installed: pip install {pip}")


# ----- adam8bit.py --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes(signed):
    """The 256 values equal bitsandbytes' dynamic map to the last bit."""
    bnb = oracle("bitsandbytes.functional", "bitsandbytes")
    assert adam8bit.dynamic_map(signed).tolist() == bnb.create_dynamic_map(signed=signed).tolist()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(4096,), (1,), (255,), (257,), (17, 331), (3, 5, 700)])
def test_quantise_is_brute_force_nearest(signed, shape):
    """Each code is as near as any of the 256 values, for all shapes, partial last blocks, huge and tiny blocks, zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[: x.numel() // 3] *= 1e-30
    x.view(-1)[-5:-2] = 0
    x = x if signed else x.abs() * 1e8
    codes, scale = adam8bit.quantise(x, signed)
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and scale.shape == (-(-x.numel() // 256),)
    qmap = adam8bit.dynamic_map(signed)
    for i, block in enumerate(x.flatten().split(256)):
        assert scale[i] == block.abs().max()
        y = block / scale[i].clamp_min(torch.finfo(torch.float32).tiny)
        got = (y - qmap[codes.flatten()[i * 256 : (i + 1) * 256].int()]).abs()
        assert torch.equal(got, (y[:, None] - qmap).abs().amin(1))
    back = adam8bit.dequantise(codes, scale, signed)
    assert back.shape == x.shape and back[x == 0].abs().sum() == 0


@pytest.mark.parametrize("signed", [True, False])
def test_nearest_at_every_boundary(signed):
    """The two look-ups are right on both sides of every midpoint and on every value: no interval holds two midpoints."""
    qmap, middle = adam8bit.dynamic_map(signed), adam8bit.nearest_table(adam8bit.dynamic_map(signed))[1][:-1]
    x = torch.cat([qmap, middle, middle.nextafter(torch.tensor(9.0)), middle.nextafter(torch.tensor(-9.0)), torch.tensor([1.0])])
    for part in x.split(255):  # each block has its absmax, 1, in it
        part = torch.cat([part, torch.tensor([1.0])])
        got = qmap[adam8bit.quantise(part, signed)[0].int()]
        assert ((part - got).abs() - (part[:, None] - qmap).abs().amin(1)).max() < 1e-7  # at a midpoint either side is right


def test_error_figures_of_the_docstring():
    """Mean relative error on normal noise is what `quantise` says: 1.5% signed, and 0.8% for its size, unsigned."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for y, signed, stated in ((x, True, 0.015), (x.abs(), False, 0.008)):
        error = ((adam8bit.dequantise(*adam8bit.quantise(y, signed), signed) - y).abs() / y.abs()).mean().item()
        assert abs(error - stated) < 0.0005
        assert f"{stated:.1%}" in adam8bit.quantise.__doc__


def test_8bit_adam_follows_bitsandbytes():
    """30 steps of full-rank 8-bit AdamW end within 1% of where bitsandbytes' AdamW8bit takes the weights."""
    bnb = oracle("bitsandbytes", "bitsandbytes")
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(64, 128))
    b, start = nn.Parameter(a.detach().clone()), a.detach().clone()
    ours = GaLoreAdamW([a], lr=1e-2, weight_decay=0.1, state_bits=8)
    theirs = bnb.optim.AdamW8bit([b], lr=1e-2, weight_decay=0.1)
    for _ in range(30):
        a.grad = torch.randn_like(a) * 0.1 + a.detach() * 0.05
        b.grad = a.grad.clone()
        ours.step(), theirs.step()
    assert ours.state[a]["M"].dtype == torch.uint8
    assert (a - b).norm() < 0.01 * (a - start).norm()


@pytest.mark.parametrize("tied", [False, True])
def test_no_element_of_a_weight_jumps(tied, monkeypatch):
    """With 8-bit state no element of embedding, head or matrices moves by more than 5 lr in any of 200 steps of Zipf tokens."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)  # so that the moments of R are in 8 bits, too
    model = tiny(vocab_size=512, num_hidden_layers=1, tie_word_embeddings=tied)
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=8), lr=0.005, state_bits=8)
    zipf, g = 1 / torch.arange(1, 513), torch.Generator().manual_seed(1)
    for step in range(200):
        x = torch.multinomial(zipf, 33, replacement=True, generator=g)[None]
        before = copy.deepcopy(model.state_dict())
        model(x[:, :-1], x[:, 1:]).backward()
        opt.step(), opt.zero_grad()
        for name, p in model.state_dict().items():
            assert (p - before[name]).abs().max() < 5 * 0.005, (step, name)
    assert opt.state[model.model.layers[0].mlp.up_proj.weight]["V"].dtype == torch.uint8


@pytest.mark.parametrize("gap", [None, 5])
def test_small_gradients_beside_large_ones_step_as_in_fp32(gap):
    """Gradients of a block over six decades: N from 8-bit moments, refreshed or not, is near that of fp32 in each."""
    g = torch.Generator().manual_seed(0)
    size, P = torch.logspace(0, -6, 512)[torch.randperm(512, generator=g)], orthonormal(torch.randn(24, 8, generator=g))
    shape = (torch.Size((8, 512)), torch.float32)
    wide, narrow = ({"P": P.clone()} | adam8bit.zeros("M", *shape, bits == 8, P.device) | adam8bit.zeros("V", *shape, bits == 8, P.device)
                    for bits in (32, 8))  # fmt: skip
    for t in range(1, 31):
        G = torch.randn(8, 512, generator=g) * size
        bias = [torch.tensor(1 - beta**t) for beta in (0.9, 0.999)]
        N, ours = (adam8bit.adam_(G, state, (0.9, 0.999), 1e-12, *bias, torch.ones(()), YES) for state in (wide, narrow))
        error = (ours - N).abs()
        assert error.max() < 5
        for i in range(6):  # each decade has half as many codes as the one above
            assert error[:, (size <= 10.0**-i) & (size > 10.0 ** -(i + 1))].mean() < 0.015 * 2**i, (t, i)
        if gap and t % gap == 0:
            Y = torch.randn(24, 8, generator=g)
            refresh(wide, Y, YES), refresh(narrow, Y, YES)
    assert narrow["V"].dtype == torch.uint8 and (narrow["V"] < 64).any()


def test_what_stays_32_bit():
    """Tensors under 4096 values keep fp32 moments; from there on a value takes a byte and its 256th of a scale."""
    small, large = nn.Parameter(torch.ones(4095)), nn.Parameter(torch.ones(4096))
    opt = GaLoreAdamW([small, large], state_bits=8)
    small.grad, large.grad = torch.ones(4095), torch.ones(4096)
    opt.step()
    nbytes = [sum(x.nbytes for name, x in opt.state[p].items() if name != "t") for p in (small, large)]
    assert nbytes == [8 * 4095, 2 * (4096 + 4 * 16)]


# ----- galore.py: the subspace --------------------------------------------------------------------------------------


def off_orthonormal(P):
    return (P.float().T @ P.float() - torch.eye(P.shape[1])).abs().max().item()


def refreshed(P, Y, M, V, ok=YES):
    """`refresh` of a state that holds these."""
    state = {"P": P.clone(), "M": M.clone(), "V": V.clone()}
    refresh(state, Y, ok)
    return state["P"], state["M"], state["V"]


@pytest.mark.parametrize("kind", ["normal", "spread 1e6", "spread 1e9", "rank 3", "rank 0", "one column", "tiny", "huge", "equal columns"])
def test_basis_stays_orthonormal(kind):
    """Whatever the gradient, P'P = I to 1e-5 and M, V stay finite, V >= 0."""
    torch.manual_seed(0)
    m, r, n = 96, 24, 160
    P, M, V = orthonormal(torch.randn(m, r)), torch.randn(r, n), torch.rand(r, n)
    U, W = orthonormal(torch.randn(m, r)), orthonormal(torch.randn(r, r))
    Y = {"normal": torch.randn(m, r), "spread 1e6": U * torch.logspace(0, -6, r) @ W.T, "spread 1e9": U * torch.logspace(0, -9, r) @ W.T,
         "rank 3": torch.randn(m, 3) @ torch.randn(3, r), "rank 0": torch.zeros(m, r), "one column": F.pad(torch.randn(m, 1), (0, r - 1)),
         "tiny": torch.randn(m, r) * 1e-20, "huge": torch.randn(m, r) * 1e20, "equal columns": torch.randn(m, 1).expand(m, r)}[kind]  # fmt: skip
    new, M, V = refreshed(P, Y, M, V)
    assert off_orthonormal(new) < 1e-5
    assert M.isfinite().all() and V.isfinite().all() and (V >= 0).all()
    if kind == "rank 0":
        assert torch.allclose(new, P, atol=1e-5)
    elif kind != "one column":  # the new basis holds what Y spans
        kept = new @ (new.T @ Y)
        assert (kept - Y).norm() < 1e-3 * Y.norm()


def test_turning_the_moments():
    """S = I changes nothing, S a permutation permutes, V stays >= 0, and P_new M_new is P_old M_old in the new subspace."""
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
    """On a gradient with a rank-r part and noise, the warm iterations of steps 2 to 8 capture what its SVD does, to 1%."""
    torch.manual_seed(1)  # not the seed of the first P
    p = nn.Parameter(torch.zeros(64, 96))
    signal = torch.randn(64, 8) @ torch.randn(8, 96)
    opt = GaLoreAdamW([dict(params=[p], rank=8)])
    for _ in range(9):
        p.grad = signal + torch.randn(64, 96)
        opt.step()
    P, best = opt.state[p]["P"], torch.linalg.svdvals(signal)[:8].norm()
    assert (P.T @ signal).norm() > 0.99 * best
    G, R = signal, P.T @ signal
    assert torch.isclose(G.norm() ** 2, R.norm() ** 2 + (G - P @ R).norm() ** 2)


# ----- galore.py: one optimiser, many oracles -----------------------------------------------------------------------


def walk(optimisers, parameters, steps, scale=0.1):
    """The same random gradients, with a part that depends on the weights, for each optimiser's own copy of the parameters."""
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        noise = [torch.randn(p.shape, generator=g) for p in parameters[0]]
        for opt, ps in zip(optimisers, parameters):
            for p, z in zip(ps, noise):
                p.grad = (scale * (z + p.detach())).to(p.dtype)
            opt.step()


def parameters(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def apart(ps, qs):
    return max((p - q).abs().max().item() for p, q in zip(ps, qs))


def test_without_rank_is_adamw():
    """A parameter without a rank takes the steps of torch.optim.AdamW, decay and all."""
    ps, qs = parameters((20, 30), (7,), (5000,)), parameters((20, 30), (7,), (5000,))
    options = dict(lr=0.01, weight_decay=0.1, eps=EPS)
    walk([GaLoreAdamW(ps, **options), torch.optim.AdamW(qs, **options)], [ps, qs], 20)
    assert apart(ps, qs) < 5e-6  # 20 steps, each of which rounds weights of up to 4.5 by 2.4e-7


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)])
def test_identity_basis_is_adamw(shape):
    """GaLore with P = I, r = m and alpha = 1 is torch.optim.AdamW."""
    ps, qs = parameters(shape), parameters(shape)
    options = dict(lr=0.01, weight_decay=0.1, eps=EPS)
    opt = GaLoreAdamW([dict(params=ps, rank=1, scale=1.0, t=8)], **options)  # t=8: past the first refreshes
    opt.state[ps[0]] = {"P": torch.eye(16), "t": 8} | {name: torch.zeros(16, max(shape)) for name in "MV"}
    twin = torch.optim.AdamW(qs, **options)
    qs[0].grad = torch.zeros(shape)
    twin.step()
    twin.state[qs[0]]["step"].fill_(8), qs[0].data.copy_(ps[0])
    walk([opt, twin], [ps, qs], 20)
    assert apart(ps, qs) < 5e-6  # as above


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("steps", [(9,), (99,), (4, 14, 24, 34, 44, 54), (*range(20, 40),)], ids=str)
def test_late_and_rare_gradients_are_adamws(rank, steps):
    """A parameter with gradients in some steps only moves as torch.optim.AdamW moves it: without a rank, and
    with P = I, beside one that has a gradient in every step; saving and loading keep its count."""
    ps, qs = (parameters((16, 24), (16, 24)) for _ in "pq")
    groups = [dict(params=ps[:1]), dict(params=ps[1:], rank=rank, scale=1.0, t=9)]  # past the first refreshes
    opt, twin = GaLoreAdamW(groups, weight_decay=0.1), torch.optim.AdamW(qs, weight_decay=0.1)
    if rank:
        opt.state[ps[1]] = {"P": torch.eye(16), "t": 0} | {name: torch.zeros(16, 24) for name in "MV"}
    g = torch.Generator().manual_seed(1)
    for step in range(max(steps) + 1):
        for p, q in zip(ps, qs):
            p.grad = q.grad = torch.randn(16, 24, generator=g) if q is qs[0] or step in steps else None
        opt.step(), twin.step()
        if step == 30 and not rank:
            saved, opt = copy.deepcopy(opt.state_dict()), GaLoreAdamW([dict(params=[p]) for p in ps])
            opt.load_state_dict(saved)
    assert apart(ps, qs) < 1e-6


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)])
def test_identity_basis_is_muon(shape, monkeypatch):
    """muon=True with P = I, r = m and alpha = 1 is torch.optim.Muon; torch's products in bf16, too, are then near ours in fp32."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    bf16 = torch.Tensor.bfloat16
    for products, limit in ((lambda x: x, 1e-6), (bf16, 2e-3)):
        ps, qs = parameters(shape), parameters(shape)
        opt = GaLoreAdamW([dict(params=ps, rank=1, scale=1.0, t=8)], lr=0.01, betas=(0.95, 0), weight_decay=0.1, muon=True)  # t=8: past the first refreshes
        opt.state[ps[0]] = {"P": torch.eye(16), "M": torch.zeros(16, max(shape)), "t": 8}
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "bfloat16", products)
            walk([opt, torch.optim.Muon(qs, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")], [ps, qs], 20)
        assert apart(ps, qs) < limit and apart(ps, parameters(shape)) > 0.01


def test_muon_keeps_one_moment():
    """Projected matrices have M and P, half of Adam's moments; the others M and V. The singular values of the move are alike."""
    ps = parameters((16, 40), (9,))
    start = ps[0].detach().clone()
    opt = GaLoreAdamW([dict(params=ps[:1], rank=8), dict(params=ps[1:])], lr=0.01, muon=True)
    for p in ps:
        p.grad = torch.randn_like(p)
    opt.step()
    assert [set(opt.state[p]) for p in ps] == [{"P", "M", "t"}, {"M", "V", "t"}]
    S = torch.linalg.svdvals(ps[0] - start) / (0.01 * 0.25 * 0.2 * 40**0.5)
    assert S[0] < 1.3 and S[7] > 0.5 and S[8] < 1e-3
    half = parameters((16, 40))
    clipped = GaLoreAdamW([dict(params=half, rank=8)], lr=0.01, muon=True, max_norm=1.0)
    half[0].grad = ps[0].grad.clone()
    clipped.step()
    assert torch.allclose(clipped.state[half[0]]["M"] * clipped.norm, opt.state[ps[0]]["M"], rtol=1e-4)  # what is clipped is what M sees
    with pytest.raises(ValueError, match="exact=True"):
        GaLoreAdamW(ps, exact=True, muon=True)


def test_exact_is_galore_torch():
    """exact=True takes galore-torch's trajectory: 30 steps, two refreshes after the first, both orientations, a plain parameter."""
    theirs = oracle("galore_torch", "galore-torch")
    shapes = [(24, 40), (40, 24), (32, 32)]
    ps, qs = parameters(*shapes, (50,)), parameters(*shapes, (50,))
    keys = dict(rank=8, update_proj_gap=12, scale=0.25, proj_type="std")
    ours = GaLoreAdamW([dict(params=ps[:3], **keys), dict(params=ps[3:])], lr=0.01, exact=True)
    twin = theirs.GaLoreAdamW([dict(params=qs[:3], **keys), dict(params=qs[3:])], lr=0.01, eps=1e-8, no_deprecation_warning=True)
    walk([ours, twin], [ps, qs], 30)
    assert apart(ps, qs) < 1e-5
    assert apart(ps, parameters(*shapes, (50,))) > 0.01


def test_transposed_matrices_take_transposed_steps():
    """W and W' move alike, subspace, refresh and all."""
    ps = parameters((16, 40))
    qs = [nn.Parameter(ps[0].detach().T.clone())]
    a, b = (GaLoreAdamW([dict(params=x, rank=4, update_proj_gap=5)], lr=0.01, eps=EPS) for x in (ps, qs))
    for i in range(20):
        ps[0].grad = torch.randn(16, 40, generator=torch.Generator().manual_seed(i))
        qs[0].grad = ps[0].grad.T.clone()
        a.step(), b.step()
    assert apart(ps, [qs[0].T]) < 1e-5


def test_stochastic_rounding_is_unbiased():
    """bf16 weights keep, on average, updates that rounding to nearest would lose; nothing else than the two neighbours occurs."""
    ps = parameters((1 << 16,), dtype=torch.bfloat16)
    ps[0].data.fill_(1.0)
    opt = GaLoreAdamW(ps, lr=1e-3)  # the step is 1e-3; the next bf16 below 1 is 1 - 2^-8
    ps[0].grad = torch.ones(1 << 16, dtype=torch.bfloat16)
    opt.step()
    assert set(ps[0].tolist()) == {1.0, 1 - 2**-8}
    assert abs(1 - ps[0].float().mean().item() - 1e-3) < 5e-5
    draws = {tuple(torch.rand(4, generator=opt.random(ps[0], t)).tolist()) for t in (1, 2, 2, 3)}
    assert len(draws) == 3  # by step; the same for the same step


def test_wrong_groups_are_refused():
    """A rank, gap, projection type, bit width or norm that cannot be honoured gives a sentence."""
    p = parameters((16, 24))
    for keys, word in ((dict(rank=0), "rank 0"), (dict(rank=-3), "rank -3"), (dict(rank=16), "rank 16"), (dict(rank=4, update_proj_gap=0), "update_proj_gap 0"),
                       (dict(rank=4, proj_type="full"), "'full'")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            GaLoreAdamW([dict(params=p, **keys)])
    for keys, word in ((dict(state_bits=4), "state_bits is 4"), (dict(max_norm=0.0), "max_norm is 0")):
        with pytest.raises(ValueError, match=word):
            GaLoreAdamW(p, **keys)
    with pytest.raises(ValueError, match="rank 4"):
        GaLoreAdamW([dict(params=parameters((16,)), rank=4)])
    for dtype in (torch.float64, torch.complex64):  # fp32 would round the one, and lose a part of the other
        with pytest.raises(ValueError, match=f"is {dtype}"):
            GaLoreAdamW(parameters((16,), dtype=dtype))


# ----- galore.py: the thin way --------------------------------------------------------------------------------------


class Net(nn.Module):
    """Wide, square and tall projected matrices with biases in numbered blocks, an embedding, a head: what can go wrong, in small."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.square, self.down = nn.Linear(24, 40), nn.Linear(40, 40, bias=False), nn.Linear(40, 24)

        def forward(self, x):
            return x + self.down(torch.tanh(self.square(F.silu(self.up(x)))))

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
        self.layers = nn.ModuleList(Net.Block() for _ in range(3))

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


def batch(step, sequences=8):
    x = torch.randint(50, (sequences, 6), generator=torch.Generator().manual_seed(step))
    return x, (7 * x + 3) % 50


def trained(way, steps=20, micro=1, dtype=torch.float32, model=None, opt=None, start=0, between=lambda step, model, opt: None, **options):
    """A Net after some steps on 8 sequences each, T = 7, taken "plain" or "thin" in `micro` micro-batches."""
    if model is None:
        torch.manual_seed(0)
        model = Net().to(dtype)
        opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, eps=EPS, **options)
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


@pytest.mark.parametrize("options", [{}, dict(max_norm=0.5), dict(weight_decay=0.1), dict(muon=True)], ids=str)
def test_thin_equals_plain(options):
    """Without ever forming G, 20 steps with refreshes inside end at the weights of loss.backward(); opt.step(), to 1e-5;
    so do 4 micro-batches, which a layer-wise optimiser that steps on each of them would not."""
    plain, opt = trained("plain", **options)
    for other in (trained("thin", **options), trained("thin", micro=4, **options), trained("plain", micro=4, **options)):
        assert weights_apart(plain, other[0]) < 1e-5
        assert torch.allclose(opt.norm, other[1].norm, rtol=1e-4)
    assert weights_apart(plain, Net()) > 0.01
    assert weights_apart(plain, trained("plain", **dict(options) | dict(max_norm=0.01))[0]) > 1e-5
    assert weights_apart(plain, trained("plain", **dict(options) | dict(muon="muon" not in options))[0]) > 1e-3


def test_thin_equals_plain_bf16_8bit():
    """The same in bf16 with 8-bit moments: equal up to the rounding of products, which is the only difference."""
    (a, _), (b, _), (c, _) = (trained(way, dtype=torch.bfloat16, state_bits=8, seed=seed) for way, seed in (("plain", 0), ("thin", 0), ("plain", 1)))
    losses = [m(*batch(99)).item() for m in (a, b, c)]
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0] and losses[0] < 0.9 * Net()(*batch(99)).item()


def test_no_full_gradient_is_ever_made():
    """In thin steps, one of them refreshing, no operation makes a tensor of the shape of a projected matrix or its transpose."""
    class Watch(TorchDispatchMode):
        seen, shapes, own = 0, {(40, 24), (24, 40), (40, 40)}, set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and tuple(x.shape) in self.shapes and x.untyped_storage().data_ptr() not in self.own:
                    raise AssertionError(f"{func} made a tensor of shape {tuple(x.shape)}")
                self.seen += 1
            return out

    watch = Watch()

    def step(way):
        model, opt = trained(way, steps=5)
        watch.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for i in range(5, 8):  # steps 6 and 8 are due for all, 7 for block 0
            with watch:
                trained(way, 1, model=model, opt=opt, start=i)

    step("thin")
    assert watch.seen > 1000
    with pytest.raises(AssertionError, match="made a tensor"):
        step("plain")


def test_a_proxy_owns_one_number():
    """The place where R arrives takes no memory before the backward pass, and none after the weight has moved."""
    model, opt = trained("thin", steps=3)
    assert all(proxy.untyped_storage().nbytes() == 4 and proxy.grad is None for proxy in opt.proxies.values())
    moved = model.layers[0].up.weight.detach().clone()
    model(*batch(0)).backward()
    assert not torch.equal(moved, model.layers[0].up.weight)  # layer-wise: it moved during the backward pass
    assert all(x.grad is None for x in [*opt.proxies.values(), *model.parameters()])


def test_a_refresh_turns_the_blocks_one_after_the_other():
    """The blocks are due four times in the first steps, about two in a step, and then in steps i T / L (mod T), one in a step."""
    changes = {}

    def between(step, model, opt):
        now = [layer.up.weight for layer in model.layers]
        changes[step] = [opt.state[w]["P"].clone() for w in now] if opt.state else None

    trained("thin", steps=24, between=between)
    # the hook has moved the weights of step s (counted from 0) before `between` sees them: what differs after is step s + 2's
    due = {step + 2: [not torch.equal(a, b) for a, b in zip(changes[step], changes[step + 1])] for step in range(23)}
    assert [{t for t, d in due.items() if d[i]} for i in range(3)] == [{2, 4, 6, 8, 14, 21}, {2, 4, 6, 8, 10, 17, 24}, {3, 5, 7, 9, 12, 19}]
    for T in range(1, 9):  # below the number of blocks, too, each is due once in T steps
        opt = GaLoreAdamW(param_groups(Net(), rank=8, update_proj_gap=T))
        times = []
        for group in opt.param_groups:
            times.append(sum(opt.due(group["params"][0]) for group["t"] in range(99, 99 + T)))
        assert times == [1, 1, 1, 0]


def test_the_gap_may_change():
    """Groups made for T = 200 are refreshed once in 10 steps when T becomes 10, each at its offset (mod 10).
    A change between backward pass and step counts from the next step on, thin as plain."""
    opt = GaLoreAdamW(param_groups(Net(), rank=8))
    for group in opt.param_groups[:-1]:
        group["update_proj_gap"], due = 10, []
        for group["t"] in range(20, 2020):
            due += [(group["t"] + 1) % 10] if opt.due(group["params"][0]) else []
        assert due == [group["offset"] % 10] * 200
    assert [group["offset"] for group in opt.param_groups] == [0, 67, 134, 0]

    def change(step, model, opt):
        for group in opt.param_groups:
            group["update_proj_gap"] = (7, 3, 5, 4)[step % 4]

    bases = []
    for way in ("plain", "thin"):
        model, opt = trained(way, 24, between=change)
        bases.append([opt.state[p]["P"] for p in opt.group if "P" in opt.state[p]])
        fixed, _ = trained(way, 24)
        assert weights_apart(model, fixed) > 1e-4
    assert apart(*bases) < 1e-4


@pytest.mark.parametrize("way", ["plain", "thin"])
def test_any_orthonormal_basis_will_do(way, monkeypatch):
    """torch.linalg.qr's Q is not contiguous. It differs from Cholesky-QR's in signs of columns, which Adam
    does not see: P spans the same after all refreshes, and the weights are the same."""
    model, opt = trained(way)
    monkeypatch.setattr(galore, "orthonormal", lambda Y: torch.linalg.qr(Y)[0])
    other, twin = trained(way)
    assert weights_apart(model, other) < 1e-5
    for p, q in zip(opt.group, twin.group):
        if "P" in opt.state[p]:
            P, Q = opt.state[p]["P"], twin.state[q]["P"]
            assert not torch.equal(P, Q) and apart([P @ P.T], [Q @ Q.T]) < 1e-4


@pytest.mark.parametrize("way", ["plain", "thin", "muon"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])  # the last is finite, but its square is not
def test_a_bad_gradient_changes_nothing_and_is_counted(way, max_norm, bad):
    """With NaN or infinity in one weight's gradient, that weight, its moments and basis stay (all weights', if a norm is known
    first); the step is counted; training goes on."""
    torch.manual_seed(0)
    model = Net()
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, weight_decay=0.1, max_norm=max_norm, muon=way == "muon")
    if way != "plain":
        thin(model, opt)
    trained(way, 6, model=model, opt=opt)
    target = model.layers[1].down.weight
    kept, states = copy.deepcopy(model.state_dict()), {p: copy.deepcopy(opt.state[p]) for p in opt.group}
    spoil = opt.proxies.get(target, target).register_hook(lambda g: g.index_fill(1, torch.tensor([3]), bad))
    trained(way, 1, model=model, opt=opt, start=6)  # step 7: block 0 is due as well
    spoil.remove()
    after = model.state_dict()
    stayed = {name for name in after if torch.equal(kept[name], after[name])}
    assert stayed == (set(after) if max_norm else {"layers.1.down.weight"})
    for p in opt.group if max_norm else [target]:
        assert states[p].keys() == opt.state[p].keys() and states[p].pop("t") == 6  # t goes on
        assert all(torch.equal(x, opt.state[p][name]) for name, x in states[p].items())
    assert not max_norm or opt.state[model.layers[0].up.weight]  # which was due, and has kept its basis
    assert int(opt.skipped) == 1
    trained(way, 3, model=model, opt=opt, start=7)
    assert int(opt.skipped) == 1 and all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(kept["layers.1.down.weight"], target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("way, muon", [("plain", False), ("thin", False), ("thin", True)])
def test_resume_is_bit_for_bit(tmp_path, way, muon, bits, dtype, monkeypatch):
    """Saved after 9 steps, loaded with weights_only=True into new objects, 9 more steps give the same bits as 18 unbroken."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)  # so that some of these small matrices are 8-bit
    unbroken, opt = trained(way, 18, dtype=dtype, state_bits=bits, muon=muon)
    model, opt = trained(way, 9, dtype=dtype, state_bits=bits, muon=muon)
    for state in opt.state_dict()["state"].values():
        assert all(torch.is_tensor(x) or name == "t" for name, x in state.items())
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    model, opt = trained(way, 0, dtype=dtype, state_bits=bits, muon=muon)
    model.load_state_dict(saved["model"]), opt.load_state_dict(saved["opt"])
    trained(way, 9, model=model, opt=opt, start=9)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), model.parameters()))


def test_loading_holds_no_state_twice():
    """When the first tensor of a checkpoint is read, those that a thin model's layers had before are gone."""
    model = Net()
    opt = GaLoreAdamW(param_groups(model, 8))
    thin(model, opt)
    old = [weakref.ref(module.galore[name]) for module in opt.modules for name in "PMV"]

    class State(dict):
        def __getitem__(self, i):
            assert not any(x() is not None for x in old)
            return super().__getitem__(i)

    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved | dict(state=State(saved["state"])))
    assert len(old) > 10 and all(module.galore is opt.state[module.weight] for module in opt.modules)


OTHERS = {  # how the state that is loaded was made, and what the sentence names
    "another rank": (dict(rank=4), "'M', 'P', 'V'"),
    "another rank, not begun": (dict(rank=4, steps=0), "rank"),
    "8 bits": (dict(state_bits=8), "'M_scale'"),
    "codes without scale": (dict(state_bits=8, into=dict(state_bits=8), remove=(0, "M_scale")), "'M_scale'"),
    "Muon's": (dict(muon=True), "'V'"),
    "bf16": (dict(dtype=torch.bfloat16), "'P'"),
    "no P": (dict(remove=(0, "P")), "'P'"),
    "no M": (dict(remove=(1, "M")), "'M'"),
    "no V": (dict(remove=(2, "V")), "'V'"),
    "no count": (dict(remove=(3, "t")), "'t'"),
    "no parameter": (dict(remove=(4,)), "parameter 4"),
    "torch's": (dict(optimiser=torch.optim.AdamW), "'exp_avg'"),
    "torch's, not begun": (dict(optimiser=torch.optim.AdamW, steps=0), "'t'"),
    "galore-torch's": (dict(optimiser="galore_torch"), "'exp_avg'"),
}


@pytest.mark.parametrize("way", ["plain", "thin"])
@pytest.mark.parametrize("case", OTHERS)
def test_a_state_that_does_not_fit_is_refused(case, way, monkeypatch):
    """load_state_dict says in one sentence what differs, and changes nothing: training goes on as before."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)
    options, word = OTHERS[case]
    options = dict(optimiser=GaLoreAdamW, rank=8, steps=1, dtype=torch.float32, remove=(), into={}) | options
    optimiser, rank, steps, dtype, remove, into = (options.pop(name) for name in list(options)[:6])
    if optimiser == "galore_torch":
        optimiser = oracle("galore_torch", "galore-torch").GaLoreAdamW
    model = Net().to(dtype)
    groups = [dict(update_proj_gap=9, scale=1, proj_type="std") | g for g in param_groups(model, rank)]
    other = optimiser(groups, **options)
    for _ in range(steps):
        model(*batch(0)).backward()
        other.step()
    saved = other.state_dict()
    if remove:
        (saved["state"][remove[0]] if remove[1:] else saved["state"]).pop(remove[-1])

    unbroken, _ = trained(way, 6, **into)
    model, opt = trained(way, 3, **into)
    with pytest.raises(ValueError, match=word):
        opt.load_state_dict(saved)
    trained(way, 3, model=model, opt=opt, start=3)
    assert weights_apart(unbroken, model) == 0


def test_an_optimiser_is_not_copied():
    """copy and pickle, which would lose what an optimiser knows beside its state, get one sentence."""
    _, opt = trained("thin", 1)
    for lose in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            lose(opt)


def test_schedulers_clipping_and_closures_of_torch_work():
    """An ordinary torch loop runs as with any optimiser: LambdaLR, clip_grad_norm_, a closure."""
    torch.manual_seed(0)
    model = Net()
    opt = GaLoreAdamW(param_groups(model, 8), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)

    def closure():
        opt.zero_grad()
        loss = model(*batch(0))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    losses = [(opt.step(closure), schedule.step())[0].item() for _ in range(8)]
    assert losses[-1] < losses[0] and {g["lr"] for g in opt.param_groups} == {1e-2 * 0.5**8}


@pytest.mark.parametrize("way", ["thin", "plain"])
def test_norm_is_that_of_torch(way):
    """Clipped or not, thin or plain, `norm` is what torch's clip_grad_norm_ says of the projected gradients; clipping to half of it
    gives Adam half of each R."""
    steps = {}
    for max_norm in (None, 1e9, 0.01):
        torch.manual_seed(0)
        model = Net()
        opt = GaLoreAdamW(param_groups(model, rank=8), max_norm=max_norm)
        if way == "thin":
            thin(model, opt)
        seen, collect = {}, opt.collect

        def spy(p):
            R = collect(p)
            widths.add(p.ndim == 2 and R.shape[1] > max(p.shape))  # with Y
            seen[p] = R[:, : max(p.shape)].clone() if "P" in opt.state[p] else R.clone()
            return R

        opt.collect, widths = spy, set()
        for step in range(4):
            (model(*batch(step)) * 100).backward()  # large, so that Y would count
            opt.step()
            model.zero_grad()
            holders = [nn.Parameter(torch.zeros_like(R)) for R in seen.values()]
            for holder, R in zip(holders, seen.values()):
                holder.grad = R
            assert len(seen) == len(opt.group) and min(R.shape[0] for R in seen.values()) == 8
            assert math.isclose(opt.norm, torch.nn.utils.clip_grad_norm_(holders, max_norm or 1e9), rel_tol=1e-5)
            steps.setdefault(max_norm, (torch.cat([opt.state[p]["M"].flatten() for p in opt.group]), opt.norm))
        assert widths == {False, True}
    (M, _), (same_M, _), (clipped, norm) = steps.values()
    assert apart([M], [same_M]) == 0 and norm > 0.1 and torch.allclose(clipped, M * 0.01 / norm, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (65536, 160), (10_000_019,)], ids=str)
def test_the_norm_of_many_values(shape, dtype):
    """`norm` is float64's to 1e-6, where torch's on a CPU loses 4e-4 of 10 M values. It makes nothing that is
    larger than a slice."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs().to(dtype)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for y in out if isinstance(out, (tuple, list)) else [out]:
                assert not torch.is_tensor(y) or y.numel() <= adam8bit.SLICE or y.data_ptr() == x.data_ptr()
            return out

    with Watch():
        ours = galore.norm(x)
    squares = [y.double().square().sum() for y in x.flatten().split(1 << 20)]
    assert ours.dtype == torch.float32 and math.isclose(ours, math.sqrt(sum(squares)), rel_tol=1e-6)


def test_autocast_thin_equals_plain():
    """fp32 weights under bf16 autocast: thin and plain agree to bf16's precision."""
    with torch.autocast("cpu", torch.bfloat16):
        (a, _), (b, _) = trained("plain"), trained("thin")
    assert abs(a(*batch(99)).item() - b(*batch(99)).item()) < 0.02


def test_groups_hold_every_parameter_once():
    """Attention and MLP matrices get the rank, the rest none, each parameter exactly one group."""
    model = Llama(Config(vocab_size=320, **SIZES["toy"]))
    groups = param_groups(model, 16, update_proj_gap=200)
    held = [p for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    names = {p: name for name, p in model.named_parameters()}
    ranked = {names[p] for g in groups if g.get("rank") for p in g["params"]}
    assert ranked == {name for name in names.values() if name.endswith("_proj.weight")}
    assert [(g["offset"], g["turns"]) for g in groups[:-1]] == [(0, 2), (50, 2), (100, 2), (150, 2)]
    with pytest.raises(ValueError, match="numbered block"):
        param_groups(nn.Sequential(), 4)


class Conv1D(nn.Module):
    """A linear layer as in GPT-2 of transformers, where it has this name: its weight is transposed."""

    def __init__(self, out, into):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out) / 5), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Mixture(nn.Module):
    """What stands in blocks beside matrices: a gate of one row, narrow keys, fused experts, a table."""

    def __init__(self):
        super().__init__()
        self.gate, self.k_proj, self.up = nn.Linear(24, 1), nn.Linear(24, 6), nn.Linear(24, 40)
        self.experts, self.table = nn.Parameter(torch.zeros(4, 24, 40)), nn.Embedding(8, 24)


def test_what_gets_no_rank_is_named():
    """A matrix too narrow for the rank gets none: the optimiser takes the groups. One warning names it and
    fused experts, with their share, but not embedding, head, norms and biases. Conv1D gets the rank."""
    model = Net()
    model.layers.extend([Mixture(), Conv1D(40, 24)])
    with pytest.warns(UserWarning) as said:
        *blocks, rest = param_groups(model, 8)
    GaLoreAdamW([*blocks, rest])
    left = [model.layers[3].gate.weight, model.layers[3].k_proj.weight, model.layers[3].experts]
    share = sum(p.numel() for p in left) / sum(p.numel() for p in model.parameters())
    (said,) = (str(warning.message) for warning in said)
    assert f"{share:.1%} of the parameters" in said and "embedding, head, norms and biases: layers" in said
    named = said.split(": ")[1].split(", layers")
    assert named == ["layers.*.experts (4, 24, 40)", ".*.gate.weight (1, 24)", ".*.k_proj.weight (6, 24)"]
    ranked = {p for group in blocks for p in group["params"]}
    assert {model.layers[3].up.weight, model.layers[4].weight} < ranked and not ranked & {*left}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(Net(), 8), param_groups(tiny(), 8)
    with pytest.raises(ValueError, match="wider than rank 64"):
        param_groups(Net(), 64)
    model = Net()
    model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable.*unfreeze"):
        param_groups(model, 8)


def test_conv1d_thin_equals_plain():
    """Layers that `thin` does not know form their gradients, and move in the backward pass all the same."""

    def run(way):
        torch.manual_seed(0)
        model = Net()
        for layer in model.layers:
            layer.up, layer.square, layer.down = Conv1D(40, 24), Conv1D(40, 40), Conv1D(24, 40)
        opt = GaLoreAdamW(param_groups(model, 8, 7), lr=3e-3)
        if way == "thin":
            thin(model, opt)
        return trained(way, 10, model=model, opt=opt)

    (plain, opt), (other, twin) = run("plain"), run("thin")
    assert weights_apart(plain, other) < 1e-5 and len(opt.state[plain.layers[0].up.weight]["P"]) == 24
    moved = other.layers[0].up.weight.detach().clone()
    other(*batch(0)).backward()
    assert not torch.equal(moved, other.layers[0].up.weight) and other.layers[0].up.weight.grad is None


def test_thin_refusals():
    """exact, a second thin, and more backward passes than were announced each give a sentence."""
    model = Net()
    with pytest.raises(ValueError, match="SVD"):
        thin(model, GaLoreAdamW(param_groups(model, 8), exact=True))
    opt = GaLoreAdamW(param_groups(model, 8))
    thin(model, opt)
    with pytest.raises(ValueError, match="made thin once"):
        thin(model, opt)
    with pytest.raises(ValueError, match="made thin once"):
        thin(model, GaLoreAdamW(param_groups(model, 8)))
    with pytest.raises(ValueError, match="no weight of this model"):
        thin(Net(), GaLoreAdamW(param_groups(Net(), 8)))
    model.layers[0].up.weight.square().sum().backward()
    with pytest.raises(ValueError, match="outside its nn.Linear"):
        opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="more than 1 gradients"):
        for _ in range(2):
            model(*batch(0)).backward()
    for compiled in (torch.compile(Net()), Net()):
        compiled.compile() if isinstance(compiled, Net) else None
        with pytest.raises(ValueError, match="compile the blocks"):
            thin(compiled, GaLoreAdamW(param_groups(compiled, 8)))


def test_a_gradient_penalty_is_refused():
    """Its second-order term would go through W's own gradient, which the thin way has not. torch says so."""
    for way in ("plain", "thin"):
        model, opt = trained(way, 0)
        x = torch.randn(5, 24, requires_grad=True)
        y = model.layers[0](x).square().sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        if way == "plain":
            (y + slope.square().sum()).backward()
            assert model.layers[0].up.weight.grad.abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="differentiate twice"):
                (y + slope.square().sum()).backward()


@pytest.mark.parametrize("shared", [False, True])
def test_too_many_gradients_are_explained(shared):
    """A shared layer under reentrant checkpointing, and a step given up with the model's zero_grad, give a
    weight more gradients than were announced. The sentence names both."""
    from torch.utils.checkpoint import checkpoint

    one = nn.Linear(24, 24)
    model = nn.ModuleDict(dict(first=nn.Linear(24, 24), layers=nn.ModuleList([one] * (1 + shared))))
    opt = GaLoreAdamW([dict(params=[one.weight], rank=8), dict(params=[one.bias, *model.first.parameters()])])
    thin(model, opt)

    def backward():
        x = model.first(torch.ones(3, 24))
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=True) if shared else layer(x)
        x.sum().backward()

    with pytest.raises(RuntimeError, match="opt.zero_grad.*use_reentrant=False"):
        backward()
        model.zero_grad()
        backward()


def test_a_trainer_that_would_not_clip_is_told(monkeypatch):
    """Where transformers' Trainer is loaded, which clips what is in .grad, `thin` says what clips instead."""
    for loaded, max_norm, told in ((True, None, 1), (True, 1.0, 0), (False, None, 0)):
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            patch.delitem(sys.modules, "transformers.trainer", raising=False)
            if loaded:
                patch.setitem(sys.modules, "transformers.trainer", SimpleNamespace())
            model = Net()
            thin(model, GaLoreAdamW(param_groups(model, 8), max_norm=max_norm))
        assert len(said) == told and all("max_norm" in str(x.message) for x in said)


def test_zero_grad_drops_what_has_accumulated():
    """Half a step's micro-batches, thrown away by opt.zero_grad(), leave no trace in the next step."""
    one, _ = trained("thin", 2, micro=2)
    two, opt = trained("thin", 1, micro=2)
    (1e3 * two(*batch(5))).backward()
    opt.zero_grad()
    trained("thin", 1, micro=2, model=two, opt=opt, start=1)
    assert weights_apart(one, two) == 0


def test_shared_layer_is_one_weight():
    """A linear layer used twice gets the sum of both gradients, thin as plain."""

    def run(way):
        torch.manual_seed(0)
        model = Net()
        model.layers[2].square.weight = model.layers[0].square.weight
        opt = GaLoreAdamW(param_groups(model, 8, 7), lr=3e-3, eps=EPS)
        if way == "thin":
            thin(model, opt)
        return trained(way, 10, model=model, opt=opt)[0]

    assert weights_apart(run("plain"), run("thin")) < 1e-5


@pytest.mark.parametrize("bits", [32, 8])
def test_blocks_compile_whole(bits, monkeypatch):
    """torch.compile takes a thin block with fullgraph=True, makes two variants (due or not), and changes nothing; so for Adam."""
    import torch._dynamo.utils as dynamo

    monkeypatch.setattr(adam8bit, "SMALLEST", 256)
    eager, _ = trained("thin", 9, state_bits=bits)
    torch.manual_seed(0)
    model = Net()
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, eps=EPS, state_bits=bits, compile=True)
    thin(model, opt)
    torch._dynamo.reset(), dynamo.counters.clear()
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False)
    compiled, _ = trained("thin", 9, model=model, opt=opt)
    assert weights_apart(eager, compiled) < (1e-5 if bits == 32 else 2e-3)
    assert not dynamo.counters["graph_break"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_step_has_no_graph_breaks(checkpointed):
    """train.prepare's compiled LLaMA blocks: two graphs in all (P due or not), no break, the losses of the eager model."""
    import torch._dynamo.utils as dynamo

    def losses(compile):
        torch._dynamo.reset(), dynamo.counters.clear()
        torch.manual_seed(0)
        model = tiny()
        opt = GaLoreAdamW(param_groups(model, 4, 7), lr=3e-3, eps=EPS, state_bits=8)
        thin(model, opt, 2, checkpointed)
        model.activation_checkpointing = checkpointed
        for layer in model.model.layers if compile else ():
            layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        x = some_tokens(2, 33)
        return [train.training_step(model, opt, iter([(x[:, :-1], x[:, 1:])] * 2), 2).item() for _ in range(8)]

    eager, compiled = losses(False), losses(True)
    assert np.allclose(eager, compiled, rtol=1e-5)
    assert not dynamo.counters["graph_break"] and dynamo.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("bits", [32, 8])
def test_updates_in_slices_are_updates(bits, monkeypatch):
    """Moments, weights and bases moved 512 values at a time end where whole ones do: rows of blocks, odd sizes, with and without rank."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)
    ends = []
    for size in (1 << 22, 512):
        for module in (adam8bit, galore):
            monkeypatch.setattr(module, "SLICE", size)
        ps = parameters((64, 96), (96, 64), (33, 131), (40, 64), (1500,))
        opt = GaLoreAdamW([dict(params=ps[:3], rank=24, update_proj_gap=3), dict(params=ps[3:])], lr=0.01, weight_decay=0.1, eps=EPS, state_bits=bits)
        walk([opt], [ps], 9)
        ends.append(ps)
    assert apart(*ends) < 1e-5 and apart(ends[0], parameters((64, 96), (96, 64), (33, 131), (40, 64), (1500,))) > 0.01


@pytest.mark.parametrize("exact", [False, True])
def test_decay_and_rounding_of_bf16_weights(exact):
    """Without a gradient 100 steps of decay 1e-3 shrink bf16 weights to 0.905 on average; exact=True rounds to nearest, where each such step is lost."""
    p = nn.Parameter(torch.linspace(1, 2, 4096).bfloat16())
    before, opt = p.detach().float(), GaLoreAdamW([p], lr=0.01, weight_decay=0.1, exact=exact)
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        opt.step()
    shrunk = (p.detach().float() / before).mean().item()
    assert shrunk == 1 if exact else abs(shrunk - 0.999**100) < 1e-3
    assert math.isclose(galore.norm(before.bfloat16()), before.bfloat16().double().norm(), rel_tol=1e-6)


def test_backward_passes_written_by_hand():
    """Normalise and SwiGLU have the gradients that autograd finds for torch's own functions, with weights other than one."""
    torch.manual_seed(0)
    x, weight, gate, up = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 24), (24,), (2, 5, 24), (2, 5, 24)))
    for ours, theirs, inputs in (
        (model_file.Normalise.apply(x, weight, 1e-6), F.rms_norm(x, (24,), weight, 1e-6), (x, weight)),
        (model_file.SwiGLU.apply(gate, up), F.silu(gate) * up, (gate, up)),
    ):
        D = torch.randn_like(ours)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs, D), torch.autograd.grad(theirs, inputs, D))


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_what_a_compiler_sees_is_the_same_formula(dtype, most, monkeypatch):
    """While compiling, norm and MLP take plain formulas: values and gradients are those of the Functions, in fp32 and bf16."""
    model, x = tiny().to(dtype).model.layers[0], torch.randn(2, 5, TINY["hidden_size"]).to(dtype).requires_grad_()

    def both(module):
        y = module(x)
        return y, *torch.autograd.grad(y, (x, *module.parameters()), torch.ones_like(y).cumsum(-1) / 8)

    eager = both(model.input_layernorm) + both(model.mlp)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, plain in zip(eager, both(model.input_layernorm) + both(model.mlp), strict=True):
        assert (ours - plain).norm() <= most * plain.norm()


def test_a_compiled_checkpoint_keeps_only_the_input():
    """Of a compiled and checkpointed block the backward pass finds x and little else (torch 2.11 kept what a Function returns: five times that)."""
    model, kept = tiny(), {}
    x, (cos, sin) = torch.randn(2, 16, TINY["hidden_size"], requires_grad=True), model_file.rope(0, 16, model.config, "cpu")
    torch._dynamo.reset()
    block = model.model.layers[0]
    block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() * t.is_floating_point()  # not the generator's state
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, cos, sin, None, True)
    more = sum(size for address, size in kept.items() if address not in weights | {t.untyped_storage().data_ptr() for t in (x, cos, sin)})
    assert x.untyped_storage().data_ptr() in kept and more < 0.1 * x.untyped_storage().nbytes()


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_odd_parameters(max_norm):
    """A 0-dim parameter, float16, a vector through a thin layer, and a step without any gradient."""
    scale, wide = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(12, 20, dtype=torch.float16))
    opt = GaLoreAdamW([dict(params=[scale]), dict(params=[wide], rank=4)], lr=0.1, max_norm=max_norm)
    opt.step()
    (scale * wide.sum()).backward()
    opt.step()
    assert scale < 1 and (wide < 1).any()
    layer = nn.Linear(12, 20)
    opt = GaLoreAdamW([dict(params=[layer.weight], rank=4), dict(params=[layer.bias])], max_norm=max_norm)
    thin(layer, opt)
    before = layer.weight.detach().clone()
    layer(torch.ones(12)).sum().backward()
    opt.step()
    assert not torch.equal(before, layer.weight)


def test_model_and_optimiser_are_freed():
    """No hook keeps a thin model or its optimiser alive after their last use."""
    model = Net()
    opt = GaLoreAdamW(param_groups(model, 8))
    thin(model, opt)
    trained("thin", 3, model=model, opt=opt)
    watched = [weakref.ref(x) for x in (model, opt, *model.parameters(), *(s["M"] for s in opt.state.values()))]
    del model, opt
    gc.collect()
    assert not any(x() is not None for x in watched)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_counted_flops_of_a_thin_block(checkpointed):
    """2 r (m + n) operations a token for R of each matrix, X P once, nothing m x n x tokens; checkpointing repeats all products but the last."""
    from torch.utils.flop_counter import FlopCounterMode

    config, tokens, r = Config(vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2), 3 * 16, 8
    model = Llama(config)
    opt = GaLoreAdamW(param_groups(model, r))
    thin(model, opt, 1, checkpointed)
    block, x = model.model.layers[0], torch.randn(3, 16, 32, requires_grad=True)
    shapes = [p.shape for p in block.parameters() if p.ndim == 2]
    cos, sin = model_file.rope(0, 16, config, x.device)
    with FlopCounterMode(display=False) as counter:
        block(x, cos, sin, None, checkpointed).sum().backward()
    products = 2 * tokens * sum(m * n for m, n in shapes)
    update = 2 * r * sum(m * n for m, n in shapes)
    expected = 2 * products + 2 * tokens * r * sum(m + n for m, n in shapes) + update
    expected += (products - 2 * tokens * 32 * 80) if checkpointed else 0
    assert sum(n for op, n in counter.flop_counts["Global"].items() if "attention" not in str(op)) == expected


def one_of_many(rank, n, file, way, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=n)
    torch.manual_seed(0)
    model = Net()
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, eps=EPS, max_norm=0.5 if way == "clip" else None, exact=way == "exact")
    if way in ("thin", "clip"):
        thin(model, opt, accumulate=2)
    for step in range(20):
        x, y = (t.chunk(n)[rank] for t in batch(step))
        for a, b in zip(x.chunk(2), y.chunk(2)):
            (model(a, b) / 2).backward()
        opt.step()
        opt.zero_grad()
    results[rank] = [p.detach() for p in model.parameters()]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way, n", [("thin", 2), ("clip", 2), ("plain", 2), ("exact", 2), ("thin", 4), ("clip", 4)])
def test_many_processes_equal_one_with_the_whole_batch(tmp_path, way, n):
    """Two or four gloo processes, which exchange R and Y alone, end at the weights of one process with all their batches: 20 steps of two
    micro-batches, every block refreshed on the way."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(one_of_many, (n, tmp_path / "meet", way, results), n, start_method="fork")
        one, _ = trained("plain", 20, max_norm=0.5 if way == "clip" else None, exact=way == "exact")
        assert all(apart(results[0], results[i]) == 0 for i in range(n))
        if way != "exact":  # the signs of an SVD hang on rounding, and exact keeps the moments when they flip
            assert apart(results[0], list(one.parameters())) < 1e-5


def one_who_differs(rank, file, case, way, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(4))
    model = nn.ModuleDict(dict(layers=layers, rest=nn.ParameterDict({name: torch.ones(24) for name in "ab"})))
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3)
    if way == "thin":
        thin(model, opt, accumulate=2)
    for step in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        use, scale, passes = (0, 1, 2, 3), "a", 2
        if step == 2:
            use = dict(experts=(rank, 2), tower=use[rank * 2 :], order=use[:: 1 - 2 * rank]).get(case, use)
            scale, passes = "ab"[rank * (case == "vector")], 2 - rank * (case == "fewer")
        if case == "gap":
            opt.param_groups[0]["update_proj_gap"] = (1, 7)[rank]
        try:
            for _ in range(passes):
                x = torch.ones(3, 24) * model.rest[scale]
                for i in use:
                    x = x + layers[i](x).tanh()
                (x.square().mean() / 2).backward()
            opt.step()
            opt.zero_grad()
        except ValueError as error:
            results[rank] = step, str(error), apart(before, model.parameters())
            break
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["plain", "thin"])
@pytest.mark.parametrize("case", ["experts", "tower", "vector", "order", "fewer", "gap", "none"])
def test_processes_with_other_gradients_end_with_one_sentence(tmp_path, way, case):
    """Where two processes use different layers in a step, or in another order, both end with one sentence and
    no weight has moved. Order and passes matter in the thin way alone, where weights move in between."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        arguments = (tmp_path / "meet", case, way, results)
        torch.multiprocessing.start_processes(one_who_differs, arguments, 2, start_method="fork")
        results = dict(results)
    if case == "none" or way == "plain" and case in ("order", "fewer"):
        assert not results
    else:
        assert len(results) == 2
        for step, sentence, moved in results.values():
            assert sentence.startswith("the processes would average different gradients") and moved == 0
            assert step == 2


# ----- model.py ---------------------------------------------------------------------------------------------------------

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
VARIANTS = {"plain": {}, "grouped": dict(num_key_value_heads=2), "tied": dict(tie_word_embeddings=True, num_key_value_heads=1),
            "theta, eps, head_dim": dict(rope_theta=500.0, rms_norm_eps=1e-3, head_dim=6)}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def tiny(seed=0, **options):
    """A tiny model whose weights are large enough, and norms uneven enough, that a wrong formula shows in the logits."""
    torch.manual_seed(seed)
    model = Llama(Config(**TINY | options))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    return model


def some_tokens(B=2, T=17, seed=1):
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def transformers():
    return pytest.importorskip("transformers", reason="LOUD SKIP: the oracle of model.py, transformers, is not installed")


# -- loss

def full_loss(x, W, t):
    return F.cross_entropy(F.linear(x, W).float(), t)


def loss_and_gradients(loss, x, W, t, scale=1.0):
    x, W = x.clone().requires_grad_(), W.clone().requires_grad_()
    value = loss(x, W, t)
    (value * scale).backward()
    return value.detach(), x.grad, W.grad


@pytest.mark.parametrize("rows", [1, 7, 10, 30, 64, None])
def test_chunked_loss_equals_cross_entropy(rows):
    """Loss and both gradients, scaled by the incoming gradient, equal F.cross_entropy's on full logits for any chunk size, a partial last chunk included."""
    torch.manual_seed(0)
    x, W, t = torch.randn(30, 16), torch.randn(50, 16), torch.randint(50, (30,))
    expected = loss_and_gradients(full_loss, x, W, t, 3.0)
    found = loss_and_gradients(lambda *a: cross_entropy(*a, rows), x, W, t, 3.0)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(x, W, t, rows), expected[0], rtol=0, atol=1e-5)


def test_chunked_loss_in_bf16_is_as_exact_as_the_full_one():
    """In bf16 the chunked loss and gradients are no further from the fp32 truth than full logits in bf16, and each has its input's type."""
    torch.manual_seed(0)
    x, W, t = torch.randn(256, 64), torch.randn(500, 64) / 8, torch.randint(500, (256,))
    x, W = x.bfloat16(), W.bfloat16()
    truth = loss_and_gradients(full_loss, x.float(), W.float(), t)
    full = loss_and_gradients(full_loss, x, W, t)
    found = loss_and_gradients(lambda *a: cross_entropy(*a, 64), x, W, t)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], full[0], rtol=1e-5, atol=0)
    for a, b, c in zip(found[1:], full[1:], truth[1:]):
        assert (a - c).norm() < 1.5 * (b - c).norm() < 0.02 * c.norm()


def test_chunked_loss_makes_only_what_is_asked_for():
    """A frozen head gets no gradient and costs no tensor of its shape, no_grad makes neither gradient, and a second backward is refused."""
    torch.manual_seed(0)
    x, W, t = torch.randn(30, 16), torch.randn(50, 16), torch.randint(50, (30,))
    expected = loss_and_gradients(full_loss, x, W, t)
    a = x.clone().requires_grad_()
    with Shapes() as shapes:
        cross_entropy(a, W, t, 7).backward()
    torch.testing.assert_close(a.grad, expected[1], rtol=0, atol=1e-6)
    assert (30, 16) in shapes.seen and (50, 16) not in shapes.seen
    b = W.clone().requires_grad_()
    cross_entropy(x, b, t, 7).backward()
    torch.testing.assert_close(b.grad, expected[2], rtol=0, atol=1e-6)
    a, b = x.clone().requires_grad_(), W.clone().requires_grad_()
    with Shapes() as shapes, torch.no_grad():
        cross_entropy(a, b, t, 7)
    assert not shapes.seen & {(30, 16), (50, 16)}
    loss = cross_entropy(a, b, t, 7) * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


class Shapes(TorchDispatchMode):
    """Shapes of all tensors that are made inside, views of existing ones apart, and the largest number of elements."""
    def __enter__(self):
        self.seen, self.largest = set(), 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for y in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(y, torch.Tensor) and not func.is_view and func is not torch.ops.aten.detach.default:
                self.seen.add(tuple(y.shape))
                self.largest = max(self.largest, y.numel())
        return out


def test_training_never_makes_the_full_logits(monkeypatch):
    """A training step never makes more logits than a chunk holds, gives the gradients of the full-logits loss to every weight (both of a tied one), and a chunk at vocabulary 32000 is at most 131.1 MB."""
    assert model_file.CHUNK_LOGITS * 4 <= 131.1e6
    monkeypatch.setattr(model_file, "CHUNK_LOGITS", 64 * TINY["vocab_size"])
    for options in ({}, dict(tie_word_embeddings=True)):
        model, tokens = tiny(**options), some_tokens(4, 51)
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        with Shapes() as shapes:
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        assert max(s[0] for s in shapes.seen if len(s) == 2 and s[1] == TINY["vocab_size"]) == 64 and shapes.largest < 200 * 97
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_memory_of_the_loss():
    """At 7B and 4096 tokens, bf16, the loss and its backward peak at inputs, gradients and the logits of one chunk (fp32 once, bf16 once); the head's gradient exists once."""
    with FakeTensorMode():
        x, W = torch.empty(4096, 4096, dtype=torch.bfloat16, requires_grad=True), torch.empty(32000, 4096, dtype=torch.bfloat16, requires_grad=True)
        tracker = MemTracker()
        tracker.track_external(x, W)
        with tracker:
            cross_entropy(x, W, torch.zeros(4096, dtype=torch.int64)).backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    assert peak["Total"] < 2 * (x.nbytes + W.nbytes) + 1024 * 32000 * (4 + 2) + 1e6


# -- the model

@variants
def test_checkpoints_go_both_ways(variant, tmp_path):
    """transformers opens what save_pretrained writes, and from_pretrained what transformers writes, with equal logits (1e-4, fp32) and greedy continuations."""
    hf, model, tokens = transformers(), tiny(**variant), some_tokens()
    model.save_pretrained(tmp_path / "ours")
    theirs = hf.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-4)
    greedy = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(tokens, 20, temperature=0), greedy)

    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY | variant, initializer_range=0.2))
    theirs.save_pretrained(tmp_path / "theirs")
    back = Llama.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(back(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    assert {n for n, _ in back.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    assert Llama.from_pretrained(tmp_path / "theirs", torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def shard(model, folder, suffix, save):
    """Write a model's weights as two files and an index, as transformers does for a large one."""
    folder.mkdir()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    names, middle = sorted(weights), len(weights) // 2
    parts = {f"part-{i}{suffix}": {n: weights[n] for n in half} for i, half in enumerate((names[:middle], names[middle:]))}
    for name, part in parts.items():
        save(part, folder / name)
    index = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": {n: name for name, part in parts.items() for n in part}}))
    return folder / index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_and_bin_checkpoints(suffix, tmp_path, monkeypatch):
    """Sharded weights of either kind read as one, older transformers' rotary buffers are ignored, and .bin needs no safetensors, to write or to read, and opens in transformers."""
    model = tiny(num_key_value_heads=2, tie_word_embeddings=True)
    if suffix == ".bin":
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)    # import fails from here on
        save = torch.save
    else:
        save = pytest.importorskip("safetensors.torch", reason="LOUD SKIP: safetensors is not installed").save_file
    model.save_pretrained(tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"]
    with torch.no_grad():
        shard(model, tmp_path / "many", suffix, lambda part, path: save(part | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path))
    (tmp_path / "many/config.json").write_bytes((tmp_path / "one/config.json").read_bytes())
    for folder in ("one", "many"):
        read = Llama.from_pretrained(tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))
        assert read.lm_head.weight is read.model.embed_tokens.weight
    monkeypatch.undo()
    theirs = transformers().LlamaForCausalLM.from_pretrained(tmp_path / "one")
    torch.testing.assert_close(theirs(some_tokens()).logits, model(some_tokens()), rtol=0, atol=1e-4)


def test_config_of_both_transformers_generations(tmp_path):
    """rope_theta is read from transformers 4's place and 5's, and a mistral without its sliding window is read and equals transformers' Mistral."""
    hf, tokens = transformers(), some_tokens()
    tiny(rope_theta=500.0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in (dict(rope_theta=77.0), dict(rope_parameters=dict(rope_theta=77.0, rope_type="default"))):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_theta"} | change))
        assert Llama.from_pretrained(tmp_path).config.rope_theta == 77.0
    theirs = hf.MistralForCausalLM(hf.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=None, initializer_range=0.2))
    theirs.save_pretrained(tmp_path / "mistral")
    torch.testing.assert_close(Llama.from_pretrained(tmp_path / "mistral")(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change, sentence", [
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "rope_type is 'llama3'"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type is 'linear'"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "rope_type is 'yarn'"),
    (dict(attention_bias=True), "attention_bias is True"), (dict(mlp_bias=True), "mlp_bias is True"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"), (dict(model_type="qwen3"), "model_type is 'qwen3'"),
    (dict(model_type=None), "model_type is None"), (dict(model_type="mistral"), "sliding_window is 4096"),
    (dict(quantization_config=dict(bits=4)), "quantization_config is"), (dict(num_attention_heads=3, num_key_value_heads=3, head_dim=None), "head_dim 10.6667"),
    (dict(hidden_size=None), "config.json.*hidden_size"), (dict(num_key_value_heads=3), "not a multiple"), (dict(head_dim=7), "not even")])
def test_configs_that_would_be_misread_are_refused(change, sentence, tmp_path):
    """A config.json whose model is not this one gives a sentence that names the field and its value."""
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=sentence):
        Llama.from_pretrained(tmp_path)


def test_damaged_checkpoints_are_refused(tmp_path, monkeypatch):
    """A folder without config or weights, weights missing, unexpected, mis-shaped or cut short, an index that leaves the folder or names no file, and a missing safetensors each give one sentence, and no pickle is executed."""
    def refused(error, sentence):
        with pytest.raises(error, match=sentence) as caught:
            Llama.from_pretrained(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    model, folder = tiny(), tmp_path / "m"
    refused(FileNotFoundError, "config.json")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model.save_pretrained(folder)
    good, path = model.state_dict(), folder / "pytorch_model.bin"
    name = "model.layers.1.mlp.up_proj.weight"
    for change, sentence in ((lambda w: w.pop(name), name), (lambda w: w.update(extra=torch.ones(1)), "extra"),
                             (lambda w: w.update({name: torch.ones(3, 4)}), r"\(3, 4\)")):
        weights = dict(good)
        change(weights)
        torch.save(weights, path)
        refused(ValueError, sentence)
    config = (folder / "config.json").read_text()    # one that ties a head which is no copy
    (folder / "config.json").write_text(config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    torch.save(good, path)
    refused(ValueError, "lm_head.weight is .* should be absent")
    torch.save(good | {"lm_head.weight": good["model.embed_tokens.weight"]}, path)
    Llama.from_pretrained(folder)
    (folder / "config.json").write_text(config)
    path.write_bytes(path.read_bytes()[:3000])
    refused(ValueError, "cannot be read")
    torch.save(Evil(tmp_path / "trace"), path)
    refused(ValueError, "cannot be read")
    assert not (tmp_path / "trace").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "trace").exists()    # it would have
    path.unlink()
    refused(FileNotFoundError, "no weights")
    index = folder / "pytorch_model.bin.index.json"
    torch.save(good, tmp_path / "outside.bin")
    for outside in ("../outside.bin", str(tmp_path / "outside.bin"), "..", 5):
        index.write_text(json.dumps(dict(weight_map=dict(a=outside))))
        refused(ValueError, "cannot be read")
    index.write_text(json.dumps(dict(weight_map=dict(a="gone.bin"))))
    refused(ValueError, "gone.bin")
    for text in ("{", "[1]", "{}"):
        index.write_text(text)
        refused(ValueError, "index.json is not|embed_tokens.weight is missing")
    (folder / "model.safetensors").write_bytes(b"junk")
    refused(ValueError, "pip install safetensors")
    with pytest.raises(ValueError, match="model.safetensors"):    # it would shadow the .bin
        model.save_pretrained(folder)
    monkeypatch.undo()
    pytest.importorskip("safetensors", reason="LOUD SKIP: safetensors is not installed")
    refused(ValueError, "cannot be read")


class Evil:
    """A pickle that creates a file when it is opened as Python's own are."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@variants
def test_generate_equals_the_loop_without_a_cache(variant):
    """The key-value cache changes nothing: greedy and sampled tokens equal those of a loop that reads the whole text again for every token, and top_k takes only the k likeliest."""
    model, tokens = tiny(**variant), some_tokens(3, 5)

    def naive(tokens, n, temperature, top_k, generator):
        for _ in range(n):
            logits = model(tokens)[:, -1]
            if top_k:
                logits = logits.scatter(1, logits.argsort(descending=True)[:, top_k:], float("-inf"))
            token = logits.argmax(1, keepdim=True) if temperature == 0 else \
                torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)
            tokens = torch.cat((tokens, token), 1)
        return tokens

    with torch.no_grad():
        for options in (0, None), (1.0, None), (2.5, 4), (3.0, 1), (1.0, 1000):
            seeds = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
            assert torch.equal(model.generate(tokens, 16, *options, seeds[0]), naive(tokens, 16, *options, seeds[1]))
    assert torch.equal(model.generate(tokens, 0), tokens)
    for bad in (dict(tokens=tokens[:, :0]), dict(temperature=-1.0), dict(top_k=0)):
        with pytest.raises(ValueError, match="generate needs"):
            model.generate(**dict(tokens=tokens, max_new_tokens=1) | bad)


def test_sizes_have_the_published_parameter_counts():
    """7b has 6.738e9 parameters at the paper's vocabulary and the MobileLLMs 124.6M and 345.3M as published, on the meta device; the paper's other sizes have the counts of its Table 5 shapes."""
    def count(name):
        return Llama(Config(vocab_size=32000, **SIZES[name]), device="meta").num_parameters()
    assert count("7b") == 6_738_415_616
    assert count("mobilellm-125m") // 10**5 == 1246 and count("mobilellm-350m") // 10**5 == 3453
    for name, millions in {"60m": 58, "130m": 134, "350m": 368, "1b": 1339, "3b": 2686}.items():
        assert round(count(name) / 1e6) == millions, (name, count(name))


def test_meta_fake_and_narrow_construction():
    """A model finished from the meta device, or moved to bf16, is whole: tied weights one tensor, and RoPE in fp32 however far the position; the whole step runs on fake tensors."""
    torch.manual_seed(5)
    direct = Llama(Config(**TINY, tie_word_embeddings=True))
    assert direct.lm_head.weight is direct.model.embed_tokens.weight
    with torch.device("meta"):
        model = Llama(Config(**TINY, tie_word_embeddings=True))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    model.init_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(some_tokens()), direct(some_tokens())) and not list(model.buffers())
    big = Llama(Config(**TINY | dict(vocab_size=4000)))
    assert abs(big.lm_head.weight.std() - 0.02) < 1e-3 and abs(big.lm_head.weight.mean()) < 1e-3
    assert all((p == 1).all() for p in big.parameters() if p.ndim == 1)
    assert {p.dtype for p in Llama(Config(**TINY), dtype=torch.bfloat16).parameters()} == {torch.bfloat16}

    seen = []
    narrow = tiny().to(torch.bfloat16)
    narrow.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1:3]))
    assert narrow(some_tokens(1, 1500)).dtype == torch.bfloat16
    angle = torch.arange(1500.0).double()[:, None] * 10000.0 ** -(torch.arange(0, 8, 2).double() / 8)
    angle = torch.cat((angle, angle), 1)
    torch.testing.assert_close(torch.stack(seen[0]), torch.stack((angle.cos(), angle.sin())).float(), rtol=0, atol=2e-4)

    with FakeTensorMode():
        fake = Llama(Config(vocab_size=32000, **SIZES["60m"]), dtype=torch.bfloat16)
        fake.activation_checkpointing = True
        fake(torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.int64)).backward()
        assert fake.lm_head.weight.grad.shape == (32000, 512)


def test_a_forks_weights_start_as_they_should(monkeypatch):
    """Experts stacked into one 3-D weight start as N(0, 0.02), biases at zero, norms at one."""
    class Experts(model_file.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.experts = nn.Parameter(torch.empty(4, config.intermediate_size, config.hidden_size))
            self.up_proj.bias = nn.Parameter(torch.empty(config.intermediate_size))

    monkeypatch.setattr(model_file, "MLP", Experts)
    torch.manual_seed(0)
    for block in Llama(Config(**TINY)).model.layers:
        assert abs(block.mlp.experts.std() - 0.02) < 1e-3 and abs(block.mlp.experts.mean()) < 1e-3
        assert not block.mlp.up_proj.bias.any() and (block.input_layernorm.weight == 1).all()


def test_activation_checkpointing_changes_memory_not_numbers():
    """With activation checkpointing the loss and every gradient are the same to the last bit, and less is saved for the backward pass; without gradients it does nothing."""
    model, tokens = tiny(num_hidden_layers=4), some_tokens(2, 33)

    def step():
        model.zero_grad()
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        return loss, [p.grad for p in model.parameters()], sum(saved.values())
    loss, gradients, kept = step()
    model.activation_checkpointing = True
    loss_again, gradients_again, kept_again = step()
    assert torch.equal(loss, loss_again) and all(map(torch.equal, gradients, gradients_again)) and kept_again < kept / 2
    model.eval()
    assert step()[2] == kept


def test_blocks_compile_alone_and_without_graph_breaks(monkeypatch):
    """Every block compiles by itself as one graph, with activation checkpointing too, once for all of them; numbers stay, and generate runs eagerly instead of compiling again for each length."""
    tokens, expected = some_tokens(), {}
    for checkpointing in (False, True):
        torch._dynamo.reset()
        graphs = []
        model = tiny(num_key_value_heads=2)
        model.activation_checkpointing = checkpointing
        def step():
            model.zero_grad()
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            return loss.detach(), [p.grad for p in model.parameters()]
        expected, text = step(), model.generate(tokens, 12, temperature=0)
        for layer in model.model.layers:
            layer.compile(fullgraph=True, dynamic=False, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        torch.testing.assert_close(step(), expected)
        made = len(graphs)
        assert made >= 1 and torch.equal(model.generate(tokens, 12, temperature=0), text) and len(graphs) == made
        step()
        assert len(graphs) == made


# ----- data.py ----------------------------------------------------------------------------------------------------------

BYTES = data.get_tokenizer("bytes")


@pytest.fixture
def alone(monkeypatch):
    """No process beside the test: every shard is prepared when it is needed."""
    monkeypatch.setattr(shards.Shard, "prefetch", lambda self: None)


def texts(n, seed=0):
    """n documents with letters of two, three and four bytes, line ends, an empty one, and a special token as text."""
    rng = random.Random(seed)
    return ["", "a <|endoftext|> b"] + ["".join(rng.choice("abcdefg \nåß中😀") for _ in range(rng.randrange(1, 90))) for _ in range(n - 2)]


def json_gz(documents):
    return gzip.compress("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents).encode(), mtime=0)


def c4_like(folder, shards=3, documents=30):
    """A folder of `shards` training files and a validation file in C4's form; returns the training documents."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = []
    for i in range(shards + 1):
        documents_here = texts(documents, seed=i)
        name = f"c4-train.{i:05d}-of-01024.json.gz" if i < shards else "c4-validation.00000-of-00008.json.gz"
        (folder / name).write_bytes(json_gz(documents_here))
        everything += documents_here if i < shards else []
    return everything


def expected(documents):
    return [id for text in documents for id in [*text.encode(), BYTES.eot]]


def flat(x):
    return x.reshape(-1).tolist()


def targets(stream, n, sequences=2):
    return [id for _ in range(n) for id in flat(stream.batch(sequences)[1])]


# ---- tokens

def check_round_trip(tokenizer, documents, folder):
    (folder / "mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (shard,), _ = shards.find_shards(str(folder / "mine.jsonl"), tokenizer, None, "{}")
    ids = np.fromfile(shard.prepare(), tokenizer.dtype)
    ends = np.flatnonzero(ids == tokenizer.eot)
    assert len(ends) == len(documents) and ends[-1] == len(ids) - 1
    assert [tokenizer.decode(ids[a:b]) for a, b in zip([0, *ends[:-1] + 1], ends)] == documents
    assert tokenizer.n_bytes[ids].sum() == sum(len(text.encode()) for text in documents)


def test_round_trip_of_bytes(tmp_path):
    """Documents, tokenised to a file and split at end-of-text, come back letter by letter, and their bytes are counted exactly."""
    check_round_trip(BYTES, texts(700), tmp_path)
    assert BYTES.decode([104, 105, 256, 300, 10 ** 6]) == "hi<|endoftext|>"  # ids of a padded vocabulary too


def test_broken_surrogate_in_json(tmp_path, alone):
    """Half a surrogate pair, which json can hold and UTF-8 cannot, becomes a question mark; a whole pair is one letter."""
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud83dy\\ud83d\\ude00"}\n' * 9)
    x, _ = data.open_data(str(tmp_path / "a.jsonl"), BYTES, "train", 7).batch(1)
    assert BYTES.decode(x[0]) == "x?y😀"


def test_round_trip_of_gpt2_on_c4(tmp_path, monkeypatch):
    """Real C4 documents in GPT-2's BPE come back letter by letter, and the ids are those of tiktoken's own encode."""
    if "NANO_GALORE_DATA" not in os.environ:
        pytest.skip("NANO_GALORE_DATA (a folder with c4/ and tiktoken_cache/) is not set")
    folder = Path(os.environ["NANO_GALORE_DATA"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken_cache"))
    tokenizer = data.get_tokenizer("gpt2")
    (file,) = (folder / "c4").glob("c4-validation*.json.gz")
    documents = [json.loads(line)["text"] for line in gzip.open(file)][:200] + texts(50)
    check_round_trip(tokenizer, documents, tmp_path)
    import tiktoken
    for text in documents[:20] + ["<|endoftext|>"]:
        assert tokenizer.encode(text).tolist() == tiktoken.get_encoding("gpt2").encode(text, disallowed_special=())
    assert tokenizer.eot == 50256 and tokenizer.n_vocab == 50257 and tokenizer.dtype == np.uint16
    tokenizer.decode(range(50304))


@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl", ".txt"])
def test_threads_do_not_change_the_tokens(tmp_path, monkeypatch, suffix):
    """The token file is the same to the byte for 1 and 7 threads, whatever the form of the text."""
    documents = texts(1500)
    (tmp_path / f"a{suffix}").write_bytes({".json.gz": json_gz(documents), ".txt": "\n".join(documents).encode() * 3,
                                           ".jsonl": gzip.decompress(json_gz(documents))}[suffix])
    files = []
    for threads in (1, 7):
        slow = data.Tokenizer("bytes", BYTES.pieces, 256, lambda text: (time.sleep(hash(text) % 3 / 1e4), BYTES.encode(text))[1])
        monkeypatch.setattr(data, "THREADS", threads)
        (shard,), _ = shards.find_shards(str(tmp_path / f"a{suffix}"), slow, str(tmp_path / str(threads)), "{}")
        files.append(shard.prepare().read_bytes())
    assert files[0] == files[1]
    want = expected(["\n".join(documents) * 3] if suffix == ".txt" else documents)
    assert np.frombuffer(files[0], np.uint16).tolist() == want


def test_the_form_of_a_file_does_not_change_its_tokens(tmp_path):
    """Gzip, capitals in the name's ending, a byte order mark, and in json lines blank lines and Windows' line
    ends give the tokens of the plain file. Within a text such a mark is text, and so is a carriage return."""
    lines = gzip.decompress(json_gz(texts(30)))
    text = ("\r\nå\ufeffb\n" * 20000).encode()  # longer than what is read at a time
    forms = {
        "plain.jsonl": lines,
        "capitals.JSONL": lines,
        "gzip.Json.GZ": gzip.compress(lines),
        "windows.json": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"),
        "blank.jsonl": b"\n" + lines.replace(b"\n", b"\n \t\n\r\n") + b"  ",
        "plain.txt": text,
        "capitals.TXT": text,
        "gzip.Txt.gz": gzip.compress(text),
        "mark.txt": b"\xef\xbb\xbf" + text,
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        (shard,), _ = shards.find_shards(str(tmp_path / name), BYTES, None, "{}")
        want = expected([text.decode()] if "txt" in name.lower() else texts(30))
        assert np.fromfile(shard.prepare(), np.uint16).tolist() == want, name


def test_two_tokenizers_do_not_mix(tmp_path, alone):
    """Token files of two tokenizers lie side by side, each read with its own type and values."""
    (tmp_path / "a.jsonl").write_bytes(gzip.decompress(json_gz(texts(30))))
    wide = data.Tokenizer("wide", [b"?"] * 70000, 69999, lambda text: np.full(len(text), 65536 + len(text)))
    for tokenizer in (BYTES, wide, BYTES):
        x, _ = data.open_data(str(tmp_path / "a.jsonl"), tokenizer, "train", 20).batch(1)
        assert (x.max() > 65536) == (tokenizer is wide)
    assert len(list(tmp_path.glob("*.tokens"))) == 2


# ---- order

@pytest.mark.parametrize("sequences", [1, 3, 50])
def test_every_token_once_over_shard_boundaries(tmp_path, alone, sequences, capsys):
    """One pass hands out every token of all shards exactly once as a target, in order, and the end of the pass is told
    with its exact length, after which the tokens come again."""
    ids = expected(c4_like(tmp_path))
    stream = data.open_data(str(tmp_path), BYTES, "train", 16)
    seen = []
    while len(seen) < 2.5 * len(ids):
        x, y = stream.batch(sequences)
        assert x.shape == y.shape == (sequences, 16) and x.dtype == y.dtype == torch.int64
        assert flat(x)[1:] == flat(y)[:-1] and flat(x)[0] == (seen[-1] if seen else ids[0])
        seen += flat(y)
    assert seen == (ids * 4)[1:len(seen) + 1]
    assert f"{len(ids):,} tokens" in capsys.readouterr().err and stream.epoch >= 2
    assert stream.bytes_per_token == sum(id != 256 for id in seen) / len(seen)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("split", ["train", "val"])
def test_stripes_are_the_single_stream(tmp_path, alone, world, split):
    """The stripes of 2 or 4 processes, put together, are the stream of one, to the last batch of validation; bytes per
    token, too, are the same in every process."""
    c4_like(tmp_path, documents=60)
    one = data.open_data(str(tmp_path), BYTES, split, 16)
    many = [data.open_data(str(tmp_path), BYTES, split, 16) for _ in range(world)]
    for _ in range(200):
        try:
            x, y = one.batch(3 * world)
        except data.EndOfData:
            assert split == "val"
            for stream in many:
                with pytest.raises(data.EndOfData):
                    stream.batch(3, 0, world)
            break
        stripes = [stream.batch(3, rank, world) for rank, stream in enumerate(many)]
        assert torch.equal(torch.cat([x for x, _ in stripes]), x) and torch.equal(torch.cat([y for _, y in stripes]), y)
        assert {stream.bytes_per_token for stream in many} == {one.bytes_per_token}
    else:
        assert split == "train" and one.epoch > 0


def test_validation_is_always_the_same_and_ends(tmp_path, alone):
    """Validation hands out every full sequence once, ends, and starts with the same tokens after reset and when opened anew."""
    c4_like(tmp_path)
    ids = expected(texts(30, seed=3))
    stream, passes = data.open_data(str(tmp_path), BYTES, "val", 16), []
    for _ in range(2):
        passes.append([])
        with pytest.raises(data.EndOfData):
            while True:
                passes[-1] += flat(stream.batch(4)[1])
        with pytest.raises(data.EndOfData):
            stream.batch(4)
        stream.reset()
    assert passes[0] == passes[1] == ids[1:(len(ids) - 1) // 16 * 16 + 1]
    assert targets(data.open_data(str(tmp_path), BYTES, "val", 16), 1) == ids[1:33]


@pytest.mark.parametrize("when", range(0, 90, 7))
def test_resume_equals_unbroken(tmp_path, alone, when):
    """A stream opened at a saved state goes on with exactly the tokens of the unbroken one, with another batch split and
    number of processes, token files deleted meanwhile, over shard boundaries and the end of the data."""
    c4_like(tmp_path, shards=4, documents=12)
    stream = data.open_data(str(tmp_path), BYTES, "train", 8)
    targets(stream, when, sequences=4)
    state = json.loads(json.dumps(stream.state_dict()))
    want = targets(stream, 60, sequences=4)
    for file in tmp_path.glob("*.tokens"):
        file.unlink()
    resumed = [data.open_data(str(tmp_path), BYTES, "train", 8, state=state) for _ in range(2)]
    got = [flat(s.batch(2, rank, 2)[1]) for _ in range(60) for rank, s in enumerate(resumed)]
    assert sum(got, []) == want
    assert resumed[0].state_dict() == stream.state_dict()
    later = data.open_data(str(tmp_path), BYTES, "train", 8, state=state)
    assert targets(later, 120, sequences=2) == want


def test_resume_needs_only_its_own_shard(tmp_path, alone):
    """A stream opened at a state in the third shard tokenises that shard and no other."""
    c4_like(tmp_path)
    stream = data.open_data(str(tmp_path), BYTES, "train", 8)
    while stream.index < 2:
        stream.batch(1)
    for file in tmp_path.glob("*.tokens"):
        file.unlink()
    data.open_data(str(tmp_path), BYTES, "train", 8, state=stream.state_dict())
    assert [file.name[:14] for file in tmp_path.glob("*.tokens")] == ["c4-train.00002"]


def test_resume_from_other_data_is_refused(tmp_path, alone):
    """A state of another tokenizer, of a shard that is not there, or of a shard since changed gives a sentence."""
    c4_like(tmp_path)
    stream = data.open_data(str(tmp_path), BYTES, "train", 8)
    state = stream.state_dict()
    for change, word in [({"tokenizer": "gpt2"}, "gpt2"), ({"shard": "gone"}, "gone"), ({"shard_tokens": 5}, "had 5")]:
        with pytest.raises(ValueError, match=word):
            data.open_data(str(tmp_path), BYTES, "train", 8, state=state | change)


def test_held_out_share(tmp_path, alone, capsys):
    """Without a validation file the last 1% of each shard's tokens is validation, the rest training, nothing in both,
    nothing lost, and one line says so."""
    ids = []
    for i in range(2):
        documents = texts(200, seed=i)
        (tmp_path / f"part{i}.jsonl").write_bytes(gzip.decompress(json_gz(documents)))
        ids.append(expected(documents))
    cuts = [len(part) - len(part) // 100 for part in ids]
    train = data.open_data(str(tmp_path), BYTES, "train", 4)
    assert "last 1%" in capsys.readouterr().err
    want = [id for part, cut in zip(ids, cuts) for id in part[:cut]]
    assert targets(train, len(want) // 8 - 1) == want[1:len(want) // 8 * 8 - 7]
    val = data.open_data(str(tmp_path), BYTES, "val", 1)
    want = [id for part, cut in zip(ids, cuts) for id in part[cut:]]
    assert targets(val, len(want) - 1, sequences=1) == want[1:]
    with pytest.raises(data.EndOfData):
        val.batch(1)


def test_python_source(tmp_path):
    """The standard library is there without a download, its two splits share no file, about one in 20 is validation."""
    train, val = shards.python_files("train"), shards.python_files("val")
    assert not set(train) & set(val) and 0.02 < len(val) / len(train) < 0.1
    assert [f.stem for f in train] != sorted(f.stem for f in train)
    stream = data.open_data("python", BYTES, "val", 64, data_dir=str(tmp_path))
    source = b"".join(file.read_bytes() + b"\xff" for file in val)
    windows = {bytes(w) for w in np.minimum(stream.tokens[: len(stream.tokens) // 1024 * 1024], 255).astype(np.uint8).reshape(-1, 1024)}
    assert windows == {source[i : i + 1024] for i in range(0, len(source) - 1023, 1024)}  # all of it, shuffled by windows
    assert bytes(np.minimum(stream.tokens[:1024], 255).astype(np.uint8)) != source[:1024]
    stream.batch(4)
    assert stream.bytes_per_token > 0.99


# what lies in a folder: training text, validation, and what is not read
FOLDERS = {
    "split": (
        "TRAIN.JSONL|c4-train.00000-of-01024.json.gz|my-training-data.txt|train (1).jsonl|trainset.json",
        "Eval.TXT.GZ|dev.json|my_validation.txt|train_val.jsonl|valid-00000.jsonl|x.val.2.txt",
        "other.txt|test.txt",
    ),
    "words in words": (
        "Trainspotting.txt|constraints.txt|contrast.txt|interval.jsonl|latest.jsonl|valley.txt",
        "",
        "",
    ),
    "words in titles": (
        "License to Kill.txt|The Acid Test.txt|The Girl on the Train.txt|Val d'Isere.txt",
        "",
        "",
    ),
    "no text": (
        "b.TXT|zürich.json|中.txt.gz",
        "valset (2).jsonl",
        "._train.txt|.hidden.jsonl|.val.txt|COPYING.txt|LICENSE.txt|README_en.TXT|a.jsonl.zst|"
        "c.json.gz.part|dangling.txt|data.licence.txt|folder.jsonl/|loop.txt|noformat|readme.txt|"
        "testset.jsonl|wiki.train.tokens",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_is_read_of_a_folder(tmp_path, kind, capsys):
    """A file's split is a word that stands alone in its name. One line names what is read and what is not."""
    train, val, rest = FOLDERS[kind]
    for name in filter(None, "|".join([*FOLDERS[kind], "b.TXT.bytes.0123456789ab.tokens"]).split("|")):
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        elif name in ("dangling.txt", "loop.txt"):
            (tmp_path / name).symlink_to("loop.txt")
        else:
            (tmp_path / name).write_text("x")
    for found, want in zip(shards.find_shards(str(tmp_path), BYTES, None, "{}", say=True), (train, val)):
        assert "|".join(sorted(file.name for shard in found for file in shard.files)) == want
    held = "the last 1% of each shard, as there is no file for it"
    line = f"training on {train}; validation on {val or held}; not read: {rest or 'nothing'}"
    assert capsys.readouterr().err == f"{tmp_path}: {line.replace('|', ', ')}\n"


def test_very_many_files_are_counted(tmp_path, capsys):
    """Of very many files the line has the first ones and how many more there are."""
    for i in range(1000):
        (tmp_path / f"{i:04d}.txt").touch(), (tmp_path / f"{i:04d}.csv").touch()
    assert len(shards.find_shards(str(tmp_path), BYTES, None, "{}", say=True)[0][0].files) == 1000
    said = capsys.readouterr().err
    assert "training on 0000.txt, 0001.txt, 0002.txt, 0003.txt, 0004.txt, 0005.txt, and 994 more; " in said
    assert said.endswith("0019.csv, and 980 more\n")


def test_a_name_loses_no_text(tmp_path, alone):
    """Of three books, one of them called Trainspotting, every byte is read, in order."""
    books = {name: f"{name} is a book.\n" * 300 for name in ("Dracula", "Emma", "Trainspotting")}
    for name, text in books.items():
        (tmp_path / f"{name}.txt").write_text(text)
    train, val = (data.open_data(str(tmp_path), BYTES, split, 4) for split in ("train", "val"))
    assert [*train.tokens, *val.tokens] == expected(books.values())


NO_TEXT = ["LICENSE.txt, data.parquet", "test.jsonl, val.jsonl", "train/, val/", ".train.jsonl", "nothing"]


@pytest.mark.parametrize("files", NO_TEXT)
def test_a_folder_without_training_text(tmp_path, files):
    """It is refused, and the sentence names what is there. A file that is given by its own name is read."""
    for name in files.split(", ") * (files != "nothing"):
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=rf"holds no training text .*\.txt.*; found: {re.escape(files)}$"):
        shards.find_shards(str(tmp_path), BYTES, None, "{}")
    for file in [*tmp_path.glob("*.jsonl"), *tmp_path.glob("*.txt")]:
        assert shards.find_shards(str(file), BYTES, None, "{}")[0][0].files == [file]


def test_validation_without_text(tmp_path, alone):
    """Bits a byte divides by the bytes of the targets. So validation whose first sequence has none is refused
    when it is opened, in a file or held out. So are training text without any, and too short a file."""
    empty = b'{"text": ""}\n'
    for train, val, split, sentence in [
        (GOOD * 99, empty * 300, "val", "the val data of .* begins with empty documents"),
        (GOOD * 999 + empty * 99, b"", "val", "the val data of .* begins with empty documents"),
        (empty * 300, GOOD * 99, "train", "the train data of .* begins with empty documents"),
        (GOOD * 99, GOOD * 2, "val", "the val data of .* has 12 tokens, too few for one sequence of 16"),
        (GOOD * 99, b"\n" * 9, "val", "val.jsonl is empty"),
        (GOOD * 99, empty * 15 + GOOD, "val", None),  # the last two of the first targets are text
    ]:
        for name, content in (("train.jsonl", train), ("val.jsonl", val)):
            (tmp_path / name).write_bytes(content) if content else (tmp_path / name).unlink()
        if sentence:
            with pytest.raises(ValueError, match=sentence):
                data.open_data(str(tmp_path), BYTES, split, 16)
    _, y = data.open_data(str(tmp_path), BYTES, "val", 16).batch(1)
    assert flat(y) == [256] * 14 + [*b"he"]


# ---- files

def test_stale_token_file_is_remade(tmp_path, alone):
    """A source that changed, even to the same size, gets new tokens; the old file goes; an unchanged one is not tokenised twice."""
    source = tmp_path / "a.txt"
    source.write_text("old " * 20)
    assert BYTES.decode(data.open_data(str(source), BYTES, "train", 4).batch(1)[0][0]) == "old "
    (before,) = tmp_path.glob("*.tokens")
    data.open_data(str(source), BYTES, "train", 4)
    assert list(tmp_path.glob("*.tokens")) == [before]
    source.write_text("new " * 20)
    os.utime(source, ns=(1, before.stat().st_mtime_ns))
    assert BYTES.decode(data.open_data(str(source), BYTES, "train", 4).batch(1)[0][0]) == "new "
    (after,) = tmp_path.glob("*.tokens")
    assert after != before and not list(tmp_path.glob("*.part"))


SLOW = """
import itertools, os, pathlib, sys, time
import data
good, path = data.get_tokenizer("bytes"), sys.argv[1]
def encode(text):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(0.02)
    return good.encode(text)
data.islice = lambda pieces, n: itertools.islice(pieces, 10)  # writes early
data.open_data(path, data.Tokenizer("bytes", good.pieces, 256, encode), "train", 4)
"""


def slow_process(path):
    """Tokenises `path` so slowly that it can be killed or waited for meanwhile; prints a line for each document."""
    return subprocess.Popen([sys.executable, "-c", SLOW, str(path)], cwd=Path(data.__file__).parent, text=True, stdout=subprocess.PIPE)


def test_kill_while_tokenising(tmp_path, alone):
    """A process killed while it writes tokens leaves no file that is taken as whole; the next one makes it right."""
    documents = texts(300)
    (tmp_path / "a.jsonl").write_bytes(gzip.decompress(json_gz(documents)))
    with slow_process(tmp_path / "a.jsonl") as process:
        for _ in range(100):
            process.stdout.readline()
        process.kill()
    assert next(tmp_path.glob("*.part")).stat().st_size > 1000 and not list(tmp_path.glob("*.tokens"))
    stream = data.open_data(str(tmp_path / "a.jsonl"), BYTES, "train", 4)
    assert targets(stream, 200) == expected(documents)[1:1601] and not list(tmp_path.glob("*.part"))
    assert np.fromfile(next(tmp_path.glob("*.tokens")), np.uint16).tolist() == expected(documents)


def test_processes_share_the_work(tmp_path):
    """Three processes that open the same text at once make its token file once, and all read it."""
    (tmp_path / "a.jsonl").write_bytes(gzip.decompress(json_gz(texts(40))))
    processes = [slow_process(tmp_path / "a.jsonl") for _ in range(3)]
    printed = "".join(process.communicate()[0] for process in processes).split()
    assert not any(process.returncode for process in processes)
    assert len(printed) == 40 and len(set(printed)) == 1
    assert len(list(tmp_path.glob("*.tokens"))) == 1 and not list(tmp_path.glob("*.part"))


def test_next_shard_is_prepared_beside(tmp_path):
    """While the first shard is read another process makes the second one's token file, and none after it."""
    c4_like(tmp_path)
    data.open_data(str(tmp_path), BYTES, "train", 16)
    deadline = time.time() + 20
    while not list(tmp_path.glob("c4-train.00001*.tokens")) and time.time() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob("c4-train.00001*.tokens")) and not list(tmp_path.glob("c4-train.00002*.tokens"))


def test_keep_shards(tmp_path, alone):
    """keep_shards=2 leaves the shard in use, the one before at its end, and no text of the user's is deleted."""
    c4_like(tmp_path, shards=5)
    stream = data.open_data(str(tmp_path), BYTES, "train", 16, keep_shards=2)
    while stream.epoch == 0:
        stream.batch(1)
        assert len(list(tmp_path.glob("c4-train*.tokens"))) <= 2
    assert len(list(tmp_path.glob("*.json.gz"))) == 6


# ---- download

class Server:
    """Serves a folder under /NAME with Range; `trouble[name]` is a list of what to do to the next requests for it."""

    def __init__(self, folder):
        self.trouble, self.log, self.retry_after, outer = {}, [], "0", self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                name = self.path.strip("/")
                kind = outer.trouble.get(name, [None]).pop(0) if outer.trouble.get(name) else None
                start = int(self.headers.get("Range", "bytes=0-")[6:-1])
                outer.log.append((name, kind, start))
                if kind in (429, 503) or not (folder / name).exists():
                    self.send_response(kind or 404)
                    self.send_header("Retry-After", outer.retry_after)
                    return self.end_headers()
                whole = (folder / name).read_bytes()
                if start >= len(whole):
                    self.send_response(416)
                    return self.end_headers()
                start = 0 if kind == "no range" else start
                body = length = whole[start:]
                if kind == "html":
                    body = length = b"<!DOCTYPE html><html>log in</html>"
                elif kind == "drop":
                    body = body[:len(body) // 2]
                elif kind == "long":
                    length = body + b"123"
                elif kind == "short":
                    body = length = body[:-5]
                elif kind == "corrupt":
                    body = length = body[:200] + bytes(20) + body[220:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(length)))
                self.end_headers()
                self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/{{}}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    server = Server(tmp_path / "served")
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_misbehaving_server(tmp_path, server, alone, monkeypatch, capsys):
    """Dropped connections, 503, 429, wrong lengths, corrupt gzip, a web page with status 200 and a server without Range
    leave the stream what it is without them; each trouble is told in one line."""
    waits = []
    monkeypatch.setattr(data.time, "sleep", waits.append)
    ids = expected(c4_like(tmp_path / "served", documents=300))
    names = [f"c4-train.{i:05d}-of-01024.json.gz" for i in range(3)]
    server.trouble = {names[0]: ["drop", "drop", 503, None], names[1]: ["html", 429, "short", None],
                      names[2]: ["corrupt", "long", None, "drop", "no range"]}  # the None is answered 416
    troubles = {name: kinds[:] for name, kinds in server.trouble.items()}
    stream = data.open_data("c4", BYTES, "train", 16, data_dir=str(tmp_path / "here"), data_url=server.url)
    assert targets(stream, len(ids) // 32 - 1) == ids[1:len(ids) // 32 * 32 - 31]
    assert stream.index == 2
    for name, kinds in troubles.items():
        assert [kind for n, kind, _ in server.log if n == name] == kinds  # no request more than needed
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "served" / name).read_bytes()
    starts = [start for name, _, start in server.log if name == names[0]]
    assert starts[0] == 0 < starts[1] < starts[2] == starts[3]  # went on, did not start again
    assert capsys.readouterr().err.count("trying again") == len(waits) >= 9 and 0 in waits
    assert not list((tmp_path / "here").glob("*.part"))


def test_download_goes_on_after_a_start_that_was_stopped(tmp_path, server, alone, monkeypatch):
    """A server that stays away ends in a sentence; what has come is kept, and the next start asks only for the rest."""
    monkeypatch.setattr(data.time, "sleep", lambda _: None)
    c4_like(tmp_path / "served", shards=1, documents=300)
    name = "c4-train.00000-of-01024.json.gz"
    server.trouble = {name: ["drop"] + [503] * 10}
    def open_it():
        return data.open_data("c4", BYTES, "train", 16, data_dir=str(tmp_path / "here"), data_url=server.url)
    with pytest.raises(ValueError, match="could not be downloaded .*503.*start again.*--data python"):
        open_it()
    assert not list((tmp_path / "here").glob("*.tokens"))
    server.trouble, server.log = {}, []
    open_it()
    assert [start > 0 for n, _, start in server.log if n == name] == [True]


def test_c4_deletes_what_keep_shards_does_not_keep(tmp_path, server, alone):
    """With --data c4 and keep_shards the downloads go as well, and resuming in a shard that went fetches it again."""
    c4_like(tmp_path / "served", shards=4)
    here = tmp_path / "here"
    options = dict(data_dir=str(here), data_url=server.url, keep_shards=2)
    stream = data.open_data("c4", BYTES, "train", 16, **options)
    state, first = stream.state_dict(), targets(stream, 3)
    while stream.index < 3:
        stream.batch(1)
    assert sorted(file.name[:14] for file in here.glob("*.json.gz")) == ["c4-train.00003"]
    assert targets(data.open_data("c4", BYTES, "train", 16, state=state, **options), 3) == first


C4 = "c4-train.{:05d}-of-01024.json.gz"


def test_keep_shards_leaves_nothing_behind(tmp_path, server, alone, monkeypatch):
    """Wherever a run starts and goes, round the end too, keep_shards=3 leaves the next shard and the two before it: what earlier
    runs left goes, .part downloads too, but no file that another process is just filling, no other tokenizer's, no text of the user's."""
    find = data.find_shards
    monkeypatch.setattr(data, "find_shards", lambda *args, say: (find(*args)[0][:6], find(*args)[1]))
    c4_like(tmp_path / "served", shards=6)
    here = tmp_path / "here"
    options = dict(data_dir=str(here), data_url=server.url)
    stream, states = data.open_data("c4", BYTES, "train", 16, **options), {}
    while stream.epoch == 0:  # all are kept
        states[stream.index] = stream.state_dict()
        stream.batch(1)
    others = ["mine.txt", "c4-train.00000-of-01024.json.gz.gpt2.0123456789ab.tokens", "c4-train.00000-of-01024.json.gz.bytes.notes.txt"]
    for name in [*others, C4.format(0) + ".part", C4.format(1) + ".part", C4.format(3) + ".bytes.0123456789ab.tokens.part", C4.format(2) + ".part"]:
        (here / name).write_bytes(b"x")
    for name in others:
        (here / name).touch()

    def there():
        return sorted({int(file.name[9:14]) for file in here.iterdir() if file.name.startswith("c4-train") and file.name not in others})

    with open(here / (C4.format(1) + ".part")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        stream = data.open_data("c4", BYTES, "train", 16, state=states[4], keep_shards=3, **options)
        assert there() == [1, 3, 4, 5] and (here / (C4.format(1) + ".part")).exists()
    windows = []
    while len(windows) < 4:
        if stream.batch(1) and (not windows or windows[-1] != (stream.index, there())):
            windows.append((stream.index, there()))
    assert windows == [(5, [4, 5]), (0, [0, 5]), (1, [0, 1]), (2, [1, 2])]  # the next one is not there yet
    assert all((here / name).exists() for name in others)


def test_several_processes_of_a_machine_have_one_child(tmp_path, monkeypatch):
    """Of the processes that torchrun starts on a machine only local rank 0 has the next shard made ready."""
    started = []
    monkeypatch.setattr(shards.Shard, "prefetch", lambda self: started.append(os.environ.get("LOCAL_RANK")))
    c4_like(tmp_path)
    for rank in ("0", "1", None):
        monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK")
        data.open_data(str(tmp_path), BYTES, "train", 16)
    assert started == ["0", None]


def test_trouble_of_the_next_shard_is_told_at_once(tmp_path, capfd):
    """What is wrong with the second shard is told, in one line, while the first is trained on; which goes on."""
    c4_like(tmp_path)
    bad = tmp_path / C4.format(1)
    bad.write_bytes(bad.read_bytes()[:-40])
    stream, said, deadline = data.open_data(str(tmp_path), BYTES, "train", 16), "", time.time() + 20
    while "\n" not in said.partition("made ready ahead")[2] and time.time() < deadline:
        said += capfd.readouterr().err
        time.sleep(0.05)
    (line,) = [line for line in said.splitlines() if "made ready ahead" in line]
    assert "could not be made ready ahead" in line and "it is tried again later" in line
    assert "00001-of-01024.json.gz cannot be read after line" in line
    stream.batch(1)


def test_training_waits_longer_than_a_start(tmp_path, server, alone, monkeypatch, capsys):
    """While training is under way a server may stay away ten times in a row, where a start gives up after four; what is
    waited for is told in one line, and no second bar is drawn."""
    monkeypatch.setattr(data.time, "sleep", lambda _: None)
    ids = expected(c4_like(tmp_path / "served", shards=2))
    server.trouble = {C4.format(1): [503] * 10}
    stream = data.open_data("c4", BYTES, "train", 16, data_dir=str(tmp_path / "here"), data_url=server.url)
    assert "%|" in capsys.readouterr().err
    assert targets(stream, len(ids) // 32 - 1) == ids[1:len(ids) // 32 * 32 - 31]
    said = capsys.readouterr().err
    assert said.count("waiting for c4-train.00001") == 1 and said.count("trying again") == 10 and "%|" not in said


@pytest.mark.parametrize("after, least, most", [("7", 7, 7), ("date", 99, 101), ("9999999", 3600, 3600), ("soon", 1, 1), ("-3", 1, 1),
                                                ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("²", 1, 1)])
def test_retry_after(tmp_path, server, alone, monkeypatch, after, least, most):
    """A server may say how long to wait in seconds or as a date; at most an hour is waited, and never less than nothing."""
    waits = []
    monkeypatch.setattr(data.time, "sleep", waits.append)
    c4_like(tmp_path / "served", shards=1)
    server.trouble, server.retry_after = {C4.format(0): [503]}, after
    if after == "date":
        server.retry_after = email.utils.formatdate(time.time() + 100, usegmt=True)
    data.open_data("c4", BYTES, "train", 16, data_dir=str(tmp_path / "here"), data_url=server.url)
    assert len(waits) == 1 and least <= waits[0] <= most


def test_a_server_that_says_0_does_not_use_up_the_patience(tmp_path, server, alone, monkeypatch):
    """Forty refusals with "Retry-After: 0" last more than half an hour all the same."""
    waits = []
    monkeypatch.setattr(data.time, "sleep", waits.append)
    (tmp_path / "served").mkdir()
    with open(tmp_path / "x.part", "ab") as file, pytest.raises(ValueError, match="could not be downloaded"):
        shards.download(server.url.replace("{}", "x"), file, background=True)
    assert len(waits) == 39 and waits[:3] == [0, 0, 0] and sum(waits) > 1800


# ---- interrupted

@contextmanager
def interrupted_after(seconds):
    """Ctrl-C: a signal handler that raises."""
    def raise_it(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_on(stream, got, until):
    """Batches over many shards are read to `got` until it has `until` values. Returns the state before the last try, which failed or not."""
    while len(got) < until:
        state = copy.deepcopy(stream.state_dict())
        try:
            got += flat(stream.batch(8)[1])
        except BaseException:
            assert stream.state_dict() == state
            raise


def test_interrupted_while_waiting_for_another_process(tmp_path, alone):
    """Ctrl-C while another process holds the lock on the next shard leaves the stream where it stood: read on, it repeats and skips nothing."""
    ids = expected(c4_like(tmp_path, shards=3, documents=12))
    stream = data.open_data(str(tmp_path), BYTES, "train", 100)
    path = stream.shards[2].prepare()
    path.unlink()
    got = []
    with open(f"{path}.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with interrupted_after(0.5):
            read_on(stream, got, len(ids))
    state = stream.state_dict()
    read_on(stream, got, len(ids) - 801)
    assert got == ids[1:len(got) + 1] and stream.index == 2 and not list(tmp_path.glob("*.part"))
    again = data.open_data(str(tmp_path), BYTES, "train", 100, state=state)
    assert flat(again.batch(8)[1]) == ids[state["seen"] + 1:state["seen"] + 801]


def test_interrupted_while_waiting_for_the_network(tmp_path, server, alone, capsys):
    """Ctrl-C between two tries of a download keeps what has come, frees the lock, and leaves the stream where it stood."""
    ids = expected(c4_like(tmp_path / "served", shards=2, documents=200))
    server.trouble, server.retry_after = {C4.format(1): ["drop"] + [503] * 9}, "60"
    stream, got = data.open_data("c4", BYTES, "train", 100, data_dir=str(tmp_path / "here"), data_url=server.url), []
    with interrupted_after(2):
        read_on(stream, got, len(ids))
    assert "trying again in 60 s" in capsys.readouterr().err and (tmp_path / "here" / (C4.format(1) + ".part")).stat().st_size > 1000
    server.trouble, server.log = {}, []
    read_on(stream, got, len(ids) - 801)
    assert got == ids[1:len(got) + 1] and [start > 0 for name, _, start in server.log if name == C4.format(1)] == [True]


def test_a_damaged_shard_mended_is_read_on(tmp_path, alone):
    """After a damaged shard stopped a batch that had begun in the shard before, and has been mended, the stream goes on without a gap."""
    ids = expected(c4_like(tmp_path, shards=3, documents=12))
    bad, got = tmp_path / C4.format(2), []
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-40])
    stream = data.open_data(str(tmp_path), BYTES, "train", 100)
    for _ in range(2):
        with pytest.raises(ValueError, match="00002"):
            read_on(stream, got, len(ids))
    bad.write_bytes(whole)
    read_on(stream, got, len(ids) - 801)
    assert got == ids[1:len(got) + 1] and stream.index == 2


def test_interrupted_just_after_a_file_was_whole(tmp_path, monkeypatch):
    """Ctrl-C at the very moment of the rename stays Ctrl-C, and the file stays."""
    rename = Path.rename
    def rename_and_raise(*args):
        rename(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "rename", rename_and_raise)
    with pytest.raises(KeyboardInterrupt):
        shards.make(tmp_path / "x", lambda file: file.write(b"whole"))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x", b"whole")]


# ---- children

def test_the_child_ends_with_a_killed_parent(tmp_path, server):
    """Kill -9 of training ends the process beside it within seconds, in the middle of a wait for the network; the next start goes on from there."""
    ids = expected(c4_like(tmp_path / "served", shards=2, documents=200))
    server.trouble, server.retry_after = {C4.format(1): ["drop"] + [503] * 99}, "1000"
    script = ("import data, sys, time\nif __name__ == '__main__':\n"
              "    data.open_data('c4', data.get_tokenizer('bytes'), 'train', 16, data_dir=sys.argv[1], data_url=sys.argv[2])\n    time.sleep(100)\n")
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(tmp_path / "here"), server.url],
                               env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.time() + 30
    while [name for name, *_ in server.log].count(C4.format(1)) < 2 and time.time() < deadline:
        time.sleep(0.02)
    part = tmp_path / "here" / (C4.format(1) + ".part")
    with open(part, "ab") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child is at it
        process.kill()
        process.wait()
        with killed_within(5):
            fcntl.flock(file, fcntl.LOCK_EX)
    server.trouble, server.log = {}, []
    stream = data.open_data("c4", BYTES, "train", 16, data_dir=str(tmp_path / "here"), data_url=server.url)
    assert targets(stream, len(ids) // 32 - 1) == ids[1:len(ids) // 32 * 32 - 31]
    assert [start > 0 for name, _, start in server.log if name == C4.format(1)] == [True]


@contextmanager
def killed_within(seconds):
    """Fails instead of waiting for ever."""
    def fail(*_):
        raise AssertionError("the lock is still held")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stream_over_a_bad_server(tmp_path, server, monkeypatch, shards, seed=0):
    """Reads `shards` shards with real processes beside, from a server that misbehaves at random, and checks tokens and disk."""
    rng, find = random.Random(seed), data.find_shards
    monkeypatch.setattr(data, "find_shards", lambda *args, say: (find(*args)[0][:shards], find(*args)[1]))
    ids, here = expected(c4_like(tmp_path / "served", shards=shards, documents=40)), tmp_path / "here"
    kinds = ("drop", 503, 429, "html", "corrupt", "short", "long", "no range")
    server.trouble = {C4.format(i): rng.sample(kinds, rng.choice((0, 0, 1, 2))) for i in range(shards)}
    stream = data.open_data("c4", BYTES, "train", 16, data_dir=str(here), data_url=server.url, keep_shards=2)
    got, troubles = [], {}
    while len(got) < len(ids) - 33:
        got += flat(stream.batch(2)[1])
        window = {stream.index, (stream.index + 1) % shards}
        there = {int(file.name[9:14]) for file in here.iterdir() if file.name.startswith("c4-train")}
        assert there <= window, (stream.index, there)
        if stream.index not in troubles:
            troubles[stream.index] = True
            if rng.random() < 0.7:  # the child is done first; else the shard is wanted while it is at it
                deadline = time.time() + 30
                while not list(here.glob(C4.format((stream.index + 1) % shards) + "*.tokens")) and time.time() < deadline:
                    time.sleep(0.02)
            else:
                time.sleep(1)
    assert got == ids[1:len(got) + 1]
    return server


def test_shards_stream_past_a_bad_server(tmp_path, server, monkeypatch):
    """With real processes beside, a server that misbehaves and keep_shards=2, the tokens are those of the undisturbed stream, and no more than
    two shards are ever on disk."""
    stream_over_a_bad_server(tmp_path, server, monkeypatch, shards=4)


def test_low_priority(tmp_path, server):
    """The process beside training runs in the scheduler's idle class: only while nobody else wants the core."""
    if not hasattr(os, "SCHED_IDLE"):
        pytest.skip("no SCHED_IDLE here")
    c4_like(tmp_path / "served", shards=1)
    server.retry_after, before = "1000", set(multiprocessing.active_children())
    data.open_data("c4", BYTES, "train", 16, data_dir=str(tmp_path / "here"), data_url=server.url)
    (child,) = set(multiprocessing.active_children()) - before
    deadline = time.time() + 20
    while C4.format(1) not in [name for name, *_ in server.log] and time.time() < deadline:
        time.sleep(0.02)
    policy = os.sched_getscheduler(child.pid)
    child.kill()
    assert policy == os.SCHED_IDLE


# ---- bad input

GOOD = b'{"text": "hello"}\n'
BAD = {
    "missing": (None, "does not exist"),
    "empty_file.jsonl": (b"", "empty_file.jsonl is empty"),
    "empty_gz.json.gz": (gzip.compress(b""), "empty_gz.json.gz is empty"),
    "empty_folder": ({}, "holds no training text"),
    "other.csv": (b"a,b", "holds no training text"),
    "no_gzip.json.gz": (GOOD, "no_gzip.json.gz cannot be read after line 0: Not a gzipped file"),
    "cut.json.gz": (gzip.compress(b"".join(b'{"text": "%d"}\n' % random.Random(i).getrandbits(900) for i in range(999)))[:-9000],
                    r"cut.json.gz cannot be read after line \d\d\d: Compressed file ended"),
    "bad_crc.json.gz": (gzip.compress(GOOD)[:-6] + b"123456", "crc.json.gz cannot be read after line 1: CRC"),
    "no_json.jsonl": (GOOD * 2 + b"{oops\n" + GOOD, "no_json.jsonl, line 3: not json"),
    "cut_line.jsonl": (GOOD * 2 + b'{"text": "hel', "cut_line.jsonl, line 3: not json"),
    "zeros.jsonl": (GOOD + b"\0\0\0\n", "zeros.jsonl, line 2: not json"),
    "no_text.jsonl": (GOOD + b'{"txt": "hello"}\n', 'no_text.jsonl, line 2: not json with a string "text"'),
    "number.jsonl": (GOOD + b'{"text": 5}\n', 'number.jsonl, line 2: not json with a string "text"'),
    "null.jsonl": (GOOD + b'{"text": null}\n', 'null.jsonl, line 2: not json with a string "text"'),
    "list.jsonl": (GOOD + b'["text"]\n', 'list.jsonl, line 2: not json with a string "text"'),
    "array.json": (b'[{"text": "hello"}]', r'array.json, line 1: .* \(jq -c "\.\[\]" makes'),
    "array_2.json": (b'[\n{"text": "hello"}\n]', r'array_2.json, line 1: .* \(jq -c "\.\[\]" makes'),
    "latin.txt": (b"abc\n" * 99999 + "å".encode("latin1") + b"\n", "latin.txt, byte 399996: not UTF-8"),
    "short.txt": (b"0123456789", "11 tokens, too few for one sequence of 64"),
    "second_is_bad": ({"a.jsonl": GOOD * 2, "b.jsonl": b"{"}, "b.jsonl, line 1: not json"),
    "only_val": ({"val.jsonl": GOOD * 99}, "holds no training text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, alone, name):
    """Each wrong input is refused with one sentence that has the name and the line or byte, and no file is changed or left over."""
    content, sentence = BAD[name]
    if isinstance(content, dict):
        (tmp_path / name).mkdir()
        for file, inner in content.items():
            (tmp_path / name / file).write_bytes(inner)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match=sentence) as error:
        data.open_data(str(tmp_path / name), BYTES, "train", 64)
    assert "\n" not in str(error.value)
    after = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and not f.name.startswith(("a.jsonl.", "short"))}
    assert after == {f: b for f, b in before.items() if not f.name.startswith("short")}


def test_a_source_that_cannot_be_read(tmp_path, alone, monkeypatch):
    """What the system does not let be read is named, and no other --data_dir is asked for. A file or folder
    without permission is told at the start, one that is gone or fails when its turn comes."""

    def refused(sentence, stream):
        with pytest.raises((ValueError, OSError), match=re.escape(str(sentence))) as error:
            targets(stream(), 10000)
        assert "--data_dir" not in str(error.value) and not list(tmp_path.rglob("*.part"))

    def denied(file, *mode):
        raise PermissionError(13, "Permission denied", str(file))

    def broken(file, *mode):
        raise OSError(5, "Input/output error")

    def whole():
        return data.open_data(str(tmp_path / "d"), BYTES, "train", 16)

    c4_like(tmp_path / "d")
    last = tmp_path / "d" / "c4-train.00002-of-01024.json.gz"
    with monkeypatch.context() as patch:
        patch.setattr(data.Path, "iterdir", denied)
        refused(f"{tmp_path / 'd'} cannot be read: Permission denied", whole)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "open", lambda *file: (denied if file[0] == last else open)(*file), raising=False)
        refused(f"{last} cannot be read: Permission denied", whole)
    assert not list(tmp_path.rglob("*.tokens"))
    stream = whole()
    with monkeypatch.context() as patch:
        patch.setattr(data.gzip, "open", broken)
        refused("c4-train.00001-of-01024.json.gz cannot be read after line 0: [Errno 5]", lambda: stream)
    last.unlink()
    refused(last, lambda: stream)
    (tmp_path / "c4-train.00000-of-01024.json.gz").mkdir()
    c4 = dict(data_dir=str(tmp_path), data_url="http://127.0.0.1:9/{}")
    refused("c4-train.00000-of-01024.json.gz cannot be read after line 0: [Errno 21]",
            lambda: data.open_data("c4", BYTES, "train", 16, **c4))  # fmt: skip


def test_disk_full_and_folder_not_writable(tmp_path, alone, monkeypatch):
    """No room on disk and a data folder that cannot be made each give one sentence, and leave what was there."""
    (tmp_path / "a.txt").write_text("hello " * 50)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="could not be made.*--data_dir"):
        data.open_data(str(tmp_path / "a.txt"), BYTES, "train", 4, data_dir=str(tmp_path / "file" / "sub"))
    if os.path.exists("/dev/full"):
        monkeypatch.setattr(data.os, "fsync", lambda _: open("/dev/full", "wb", buffering=0).write(b"x"))
        with pytest.raises(ValueError, match="No space left on device"):
            data.open_data(str(tmp_path / "a.txt"), BYTES, "train", 4)
    assert {f.name for f in tmp_path.iterdir()} == {"a.txt", "file"}


def test_corrupt_local_shard_stops_when_it_is_needed(tmp_path, alone):
    """A corrupt second shard lets the first be trained on to its end, then stops with its name and line; it is not skipped."""
    c4_like(tmp_path, shards=3)
    bad = tmp_path / "c4-train.00001-of-01024.json.gz"
    bad.write_bytes(json_gz(texts(30, 1))[:-40])
    stream = data.open_data(str(tmp_path), BYTES, "train", 16)
    with pytest.raises(ValueError, match=r"c4-train.00001-of-01024.json.gz cannot be read after line \d+"):
        targets(stream, 10000)
    assert stream.index == 0


def test_wrong_names(monkeypatch, tmp_path, alone):
    """An unknown tokenizer lists what there is, one that cannot be downloaded says how to bring it, a data_url needs its {}."""
    with pytest.raises(ValueError, match="no tokenizer 'gpt9'; there are: bytes, gpt2"):
        data.get_tokenizer("gpt9")
    def refuse(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(data.tiktoken, "get_encoding", refuse)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR.*'bytes', which needs no file"):
        data.get_tokenizer("gpt2")
    with pytest.raises(ValueError, match="needs a {}"):
        data.open_data("c4", BYTES, "train", 8, data_url="http://127.0.0.1/x", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="at least 2"):
        data.open_data("c4", BYTES, "train", 8, keep_shards=1, data_dir=str(tmp_path))


def test_command_line(tmp_path):
    """`python data.py` prepares training and validation shards and prints tokens and tokens/s; a wrong path is one sentence."""
    c4_like(tmp_path)
    command = [sys.executable, data.__file__, "--tokenizer", "bytes"]
    done = subprocess.run([*command, "--data", str(tmp_path), "--shards", "2"], capture_output=True, text=True)
    assert done.returncode == 0 and len(list(tmp_path.glob("*.tokens"))) == 3, done.stderr
    assert done.stdout.count("tokens\n") == 3 and "M/s per core" in done.stderr
    done = subprocess.run([*command, "--data", str(tmp_path / "gone")], capture_output=True, text=True)
    assert done.returncode == 2 and "gone does not exist" in done.stderr and "Traceback" not in done.stderr


# ----- train.py -----------------------------------------------------------------------------------------------------

HERE = Path(__file__).parent
SHORT = ["--size", "toy", "--data", "python", "--eval_tokens", "1024", "--steps", "24", "--seq_len", "64", "--save_every", "4", "--eval_every", "1000"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The standard library, tokenised once for all runs."""
    return str(tmp_path_factory.mktemp("tokens"))


def start_training(folder, tokens, *options, command=None):
    """train.py in a process of its own, in `folder`, on one thread (so that its bits are reproducible)."""
    command = command or [sys.executable, str(HERE / "train.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen([*command, *SHORT, "--data_dir", tokens, *options], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def finished(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def wait_for_step(log, step, process):
    while process.poll() is None and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]


def log_of(folder):
    """All that a run logs, but for what a clock and a memory gauge say."""
    lines = log_of_any(folder)
    assert lines[0]["args"]["size"] == "toy" and lines[0]["versions"]["torch"] == torch.__version__
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_gb", "seconds")} for line in lines if "args" not in line]


def log_of_any(folder):
    """Its lines, read as strictly as the standard of JSON is: there is no NaN in it."""
    def no_number(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_number) for line in lines]


def newest(folder):
    return max(folder.glob("checkpoint-*.pt"))


def weights_of(folder):
    return torch.load(newest(folder), weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tokens):
    """A whole short run of the documented command."""
    folder = tmp_path_factory.mktemp("unbroken")
    output = finished(start_training(folder, tokens, "--galore", "--rank", "64", "--lr", "0.01"))
    return folder / "out" / "toy-galore-r64", output


def test_the_documented_command_learns(unbroken):
    """The first command of the README, cut to 24 steps, says what it does, learns, samples, and leaves log and checkpoint."""
    folder, output = unbroken
    for word in ("rank 64", "1,894,080 parameters", "step 24/24: loss", "perplexity", "bits per byte", "sample:\ndef "):
        assert word in output
    log = log_of(folder)
    for line in log_of_any(folder)[1:-1]:
        assert line.keys() == {"step", "tokens", "lr", "loss", "grad_norm", "skipped", "tokens_per_s", "memory_gb"}
        assert line["tokens"] == 512 * line["step"] and line["grad_norm"] > 0 == line["skipped"]
        assert 0.1 < line["memory_gb"] < 2 and 100 < line["tokens_per_s"] < 1e6
    assert [line["step"] for line in log] == [*range(1, 25), 24]
    assert log[0]["loss"] > 5 and log[-1]["val_loss"] < 3.7
    assert math.isclose(log[-1]["bits_per_byte"], log[-1]["val_loss"] / math.log(2), rel_tol=0.01)  # a token is a byte


def test_one_of_two_processes_dies_and_one_goes_on(tmp_path, tokens, monkeypatch, capsys):
    """Two processes under torchrun, one of them killed: both end within seconds. One process goes on from their checkpoint, and ends at the
    weights and losses of one that was never disturbed, to the last bit; its validation losses are those of two processes."""
    common = [*SHORT, *"--galore --lr 0.01 --update_proj_gap 7 --eval_every 8 --batch_size 4 --state_bits 8 --grad_clipping 1 --data_dir".split(), tokens]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", str(HERE / "train.py")]
    out = tmp_path / "out" / "toy-galore-r64-8bit"
    with subprocess.Popen([*command, *common], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:  # fmt: skip
        wait_for_step(out / "log.jsonl", 12, process)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[1]), 9)
        process.communicate(timeout=30)
        assert process.returncode == 1
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", out)
    assert code == 0, output
    (tmp_path / "one").mkdir()
    output, code = run_here(monkeypatch, tmp_path / "one", capsys, *common)
    assert code == 0, output
    one = tmp_path / "one" / "out" / "toy-galore-r64-8bit"
    assert same(weights_of(out), weights_of(one))
    for ours, theirs in zip(log_of(out), log_of(one), strict=True):
        assert ours == theirs or math.isclose(ours["val_loss"], theirs["val_loss"], rel_tol=1e-6)


def run_here(monkeypatch, tmp_path, capsys, *options):
    """train.main() in this process; returns what it printed, and its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        train.main()
        code = 0
    except SystemExit as leave:
        code = leave.code
    finally:
        [signal.signal(s, handler) for s, handler in zip((signal.SIGINT, signal.SIGTERM), before)]
    printed = capsys.readouterr()
    return printed.out + printed.err, code


WRONG = {
    "--size 9b": "argument --size: invalid choice: '9b'",
    "--rank 8": "--rank has no effect without --galore",
    "--update_proj_gap 8": "--update_proj_gap has no effect",
    "--galore_scale 1": "--galore_scale has no effect",
    "--exact": "--exact has no effect",
    "--direction muon": "--direction has no effect",
    "--galore --direction lion": "invalid choice: 'lion'",
    "--galore --exact --direction muon": "--exact is the paper to the letter",
    "--galore --rank 0": "--rank: 0 must lie between 1 and",
    "--galore --rank x": "--rank: invalid int value: 'x'",
    "--galore --rank 192": "--rank 192 must be below 192",
    "--galore --exact --layerwise": "leave one of the two out",
    "--total_batch_size 9 --batch_size 2": "9 is not a multiple of --batch_size 2",
    "--vocab_size 100": "smaller than that of tokenizer bytes, 257",
    "--tokenizer klingon": "no tokenizer 'klingon'",
    "--data nowhere": "does not exist",
    "--data_url x{} --data python": "no effect with --data python",
    "--data_url x{}": "no effect with --data python",  # which is the toy's default
    "--device gpu": "--device gpu is not there",
    "--lr inf": "--lr: inf must lie between",
    "--lr nan": "--lr: nan must lie between",
    "--seed -1": "--seed: -1 must lie between 0 and",
    "--sample=": "--sample is empty",
    "--steps 0": "--steps: 0 must lie between 1 and",
    "--grad_clipping -1": "--grad_clipping: -1 must lie between 0 and",
    "--warmup_steps 5000": "--warmup_steps 5000 is above --steps 600",
    "--min_lr_ratio 2": "--min_lr_ratio: 2 must lie between 0 and 1",
    "--weight_decay -1": "--weight_decay: -1 must lie between 0 and",
    "--state_bits 4": "invalid choice",
    "--frobnicate": "unrecognized arguments",
    "--resume": "--resume needs --out_dir",
    "--resume --out_dir empty": "empty holds no checkpoint-STEP.pt",
    "--init nowhere": "does not exist: a Hugging Face checkpoint folder is needed",
    "--init x --size toy": "argument --size: not allowed with argument --init",
    "--size 7b --galore --rank 1024": "no GPU was found, and on a CPU this run would take about",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_arguments_get_one_sentence(options, monkeypatch, tmp_path, capsys):
    """What cannot be honoured is refused in one line with exit code 2, before anything is written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output, code = run_here(monkeypatch, tmp_path, capsys, *options.split())
    assert code == 2 and WRONG[options] in output and "Traceback" not in output
    assert len(output.strip().splitlines()) == 2  # usage, sentence
    assert not list(tmp_path.iterdir())


def test_a_sample_that_is_no_text_is_refused(monkeypatch, tmp_path, capsys):
    """A prompt with a byte that is no UTF-8 is told at the start; else it would fail after the last step."""
    output, code = run_here(monkeypatch, tmp_path, capsys, *FEW, "--sample", os.fsdecode(b"\xff"))
    assert code == 2 and "can't encode character" in output and not (tmp_path / "out").exists()


def test_a_run_is_not_written_over_and_a_bad_checkpoint_is_told(unbroken, monkeypatch, tmp_path, capsys):
    """A new run in an old one's folder, another size on resuming, a cut checkpoint, a pickle that would run code: each is refused."""
    folder = tmp_path / "run"
    folder.mkdir()
    last = newest(unbroken[0]).name
    for name in ("log.jsonl", last):
        (folder / name).write_bytes((unbroken[0] / name).read_bytes())
    for options, words in (
        (["--out_dir", folder, *SHORT], "holds a run already"),
        (["--out_dir", folder, "--resume", "--size", "60m"], "has size toy, not 60m"),
        (["--out_dir", folder, "--resume", "--rank", "32"], "has rank 64, not 32"),
        (["--out_dir", folder, "--resume", "--direction", "muon"], "has direction adam, not muon"),
        (["--out_dir", folder, "--resume", "--steps", "20"], "has taken 24 steps already"),
        (["--out_dir", folder, "--resume", "--init", "x"], "has init None, not x"),
        (["--out_dir", folder / "log.jsonl" / "x", "--size", "toy"], "Not a directory"),
        (["--out_dir", folder, "--resume", "--vocab_size", "512"], "has vocab_size 320, not 512"),
    ):
        output, code = run_here(monkeypatch, tmp_path, capsys, *options)
        assert code == 2 and words in output
    whole = (folder / last).read_bytes()
    (folder / last).write_bytes(whole[: len(whole) // 2])
    output, code = run_here(monkeypatch, tmp_path, capsys, "--out_dir", folder, "--resume")
    assert code == 2 and "cut short" in output
    torch.save({}, folder / last)
    assert run_here(monkeypatch, tmp_path, capsys, "--out_dir", folder, "--resume")[1] == 2
    torch.save({"step": Evil(tmp_path / "trace")}, folder / last)
    output, code = run_here(monkeypatch, tmp_path, capsys, "--out_dir", folder, "--resume")
    assert code == 2 and "no checkpoint" in output and not (tmp_path / "trace").exists()
    torch.load(folder / last, weights_only=False)
    assert (tmp_path / "trace").exists()  # it would have
    assert (folder / "log.jsonl").read_bytes() == (unbroken[0] / "log.jsonl").read_bytes()


CHANGES = {
    "a step that is none": lambda c: c.update(step=-3),
    "no weights": lambda c: c.pop("model"),
    "a name of a weight": lambda c: c["model"].update(extra=c["model"].pop("lm_head.weight")),
    "a shape": lambda c: c["model"].update({"lm_head.weight": c["model"]["lm_head.weight"][:-1]}),
    "a type": lambda c: c["model"].update({"lm_head.weight": c["model"]["lm_head.weight"].half()}),
    "no moments": lambda c: c["optimizer"].update(state={}),
    "no groups": lambda c: c["optimizer"].update(param_groups=[]),
    "an argument's type": lambda c: c["args"].update(lr="0.01"),
    "an argument": lambda c: c["args"].update(plan=True),
    "no arguments": lambda c: c.update(args={}),
    "config": lambda c: c["config"].update(rope_theta="10000"),
    "config of another model": lambda c: c["config"].update(hidden_size=64),
    "no place in the data": lambda c: c.update(data={}),
    "a place in the data": lambda c: c["data"].update(offset=0.5),
    "the log's length": lambda c: c.update(log_lines=-2),
    "skipped steps": lambda c: c.update(skipped=math.nan),
    "scores": lambda c: c.update(scores=[]),
    "a bit": None,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_that_was_changed_is_refused(what, unbroken, monkeypatch, tmp_path, capsys):
    """Whatever was edited in a checkpoint, or damaged: one sentence and exit code 2. No file changes."""
    path = tmp_path / "run" / newest(unbroken[0]).name
    path.parent.mkdir()
    for name in ("log.jsonl", path.name):
        (path.parent / name).write_bytes((unbroken[0] / name).read_bytes())
    if what == "a bit":
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    else:
        checkpoint = torch.load(path, weights_only=True)
        CHANGES[what](checkpoint)
        torch.save(checkpoint, path)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", "--steps", "25")
    assert code == 2 and f"run/{path.name} cannot be used" in output and "take another --out_dir" in output
    assert len(output.strip().splitlines()) == 2  # usage, sentence
    assert before == {file: file.read_bytes() for file in path.parent.iterdir()}
    (path.parent / "checkpoint-00000004.pt").write_bytes(b"")
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", "--steps", "25")
    assert code == 2 and "delete it to go on from checkpoint-00000004.pt" in output


FEW = "--size toy --data python --galore --rank 16 --seq_len 32 --total_batch_size 2 --eval_tokens 256 --device cpu --seed 1".split()


@pytest.mark.parametrize("where, name", [("step", "SIGINT"), ("step", "SIGHUP"), ("data", "SIGTERM"), ("validation", "SIGTERM")])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(where, name, monkeypatch, tmp_path, capsys, tokens):
    """Ctrl-C, SIGTERM and a closed terminal, in a step, while it waits for data for an hour, and during validation: the run saves, leaves with 0
    and prints the line that goes on; what is resumed ends like a run that was not stopped."""
    options = [*FEW, *"--steps 6 --eval_every 3 --save_every 99 --data_dir".split(), tokens]
    assert run_here(monkeypatch, tmp_path, capsys, *options, "--out_dir", "calm")[1] == 0
    calls, function = [], {"step": "training_step", "data": "open_data", "validation": "evaluate"}[where]
    original = getattr(train, function)

    def strike(*args):
        calls.append(1)
        if len(calls) == 3:
            for _ in range(1 if where == "data" else 2):  # torchrun passes on the Ctrl-C that the terminal has sent to all
                os.kill(os.getpid(), getattr(signal, name))
            if where == "data":
                time.sleep(60)
            patch.setattr(data.Stream, "batch", None)  # from here on nothing is read

    def struck(*args, **options):
        if where == "step":
            strike()
        result = original(*args, **options)
        if where == "data" and args[2] == "train":
            read = result.batch
            result.batch = lambda *args: strike() or read(*args)
        return result

    with monkeypatch.context() as patch:
        if where == "validation":
            patch.setattr(train, "evaluate", lambda *args: strike() or strike() or original(*args))
        else:
            patch.setattr(train, function, struck)
        begun = time.time()
        output, code = run_here(monkeypatch, tmp_path, capsys, *options, "--out_dir", "run")
    stopped = {"step": 3, "data": 2, "validation": 6}[where]
    assert code == 0 and time.time() - begun < 30
    assert f"stopped after step {stopped}; to go on from the checkpoint of step {stopped}: python train.py --resume --out_dir run" in output
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run")
    assert code == 0, output
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "calm")) and log_of(tmp_path / "run") == log_of(tmp_path / "calm")


def test_many_bad_steps_stop_the_run(monkeypatch, tmp_path, capsys, tokens):
    """A few steps whose gradients are not finite are skipped, counted and logged, and no checkpoint is written among them. More than 20 in a
    row end the run with code 1, and the newest checkpoint is from before them; it can be resumed."""
    step = train.training_step
    count, bad = [0], {3, *range(9, 99)}

    def poisoned(model, opt, batches, accumulate):
        count[0] += 1
        if count[0] in bad:
            (x, y), = batches
            (model(x, y) * math.nan).backward()
            opt.step()
            return torch.tensor(math.nan)
        return step(model, opt, batches, accumulate)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", poisoned)
        output, code = run_here(monkeypatch, tmp_path, capsys, *FEW, "--steps", "60", "--save_every", "3", "--data_dir", tokens, "--out_dir", "run")
    assert code == 2 and output.endswith("train.py: the gradients of 21 steps in a row were not finite (in the data, or a learning rate too high)\n")
    assert "to go on from the checkpoint of step 6: python train.py --resume" in output
    assert [file.name for file in (tmp_path / "run").glob("*.pt")] == ["checkpoint-00000006.pt"]
    steps = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert [line["skipped"] for line in steps] == [0, 0, *[1] * 6, *range(2, 23)]
    assert [line["step"] for line in steps if line["loss"] is None] == [3, *range(9, 30)]  # JSON has no NaN
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", "--steps", "12", "--lr", "0.001")
    assert code == 0 and "lr was 0.005 and is 0.001 from here on" in output
    assert log_of(tmp_path / "run")[-2]["skipped"] == 1  # of before


def test_bad_data_in_the_middle_stops_with_a_checkpoint(monkeypatch, tmp_path, capsys):
    """When training comes to a shard that is corrupt, it saves and leaves with code 1 and the shard's name and line; mended, it goes on as if
    nothing had been."""
    c4_like(tmp_path / "good", shards=3, documents=10)
    c4_like(tmp_path / "bad", shards=3, documents=10)
    shard = tmp_path / "bad" / "c4-train.00001-of-01024.json.gz"
    whole = shard.read_bytes()
    shard.write_bytes(json_gz(texts(9, 1)) + gzip.compress(b'{"text": 5}\n'))
    options = [*[o for o in FEW if o not in ("--data", "python")], *"--tokenizer bytes --batch_size 1 --steps 16 --save_every 99".split()]
    assert run_here(monkeypatch, tmp_path, capsys, *options, "--data", "good", "--out_dir", "calm")[1] == 0
    output, code = run_here(monkeypatch, tmp_path, capsys, *options, "--data", "bad", "--out_dir", "run")
    assert code == 2 and "bad/c4-train.00001-of-01024.json.gz, line 10: not json" in output.splitlines()[-1]
    (done,) = re.findall(r"stopped after step (\d+); to go on from the checkpoint of step \1:", output)
    assert 3 < int(done) < 12
    shard.write_bytes(whole)
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run")
    assert code == 0, output
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "calm")) and log_of(tmp_path / "run") == log_of(tmp_path / "calm")


def test_what_may_change_on_resume_is_applied_and_said(monkeypatch, tmp_path, capsys, tokens):
    """Steps, learning rate, intervals and the split of the batch may change, and each is said; an argument of another version is said, too."""
    options = [*FEW, "--data_dir", tokens, "--out_dir", "run"]
    assert run_here(monkeypatch, tmp_path, capsys, *options, "--steps", "4", "--keep", "9", "--save_every", "2")[1] == 0
    (tmp_path / "run" / "checkpoint-00000000.pt").unlink()
    newer = torch.load(tmp_path / "run" / "checkpoint-00000004.pt", weights_only=True)
    del newer["args"]["eval_tokens"], newer["seal"]
    newer["args"]["momentum_of_2031"] = 7
    torch.save(newer | dict(seal=train.seal(newer)), tmp_path / "run" / "checkpoint-00000004.pt")
    changes = "--steps 8 --lr 0.001 --eval_every 4 --save_every 1 --batch_size 1 --grad_clipping 0.5 --update_proj_gap 3 --keep 2 --eval_tokens 128 --total_batch_size 4"
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", *changes.split())
    assert code == 0, output
    for line in ("steps was 4 and is 8 from here on", "lr was 0.005 and is 0.001", "batch_size was 2 and is 1", "grad_clipping was 0.0 and is 0.5",
                 "keep was 9 and is 2", "the run had momentum_of_2031, which this version of train.py does not know", "4 micro-batch(es) per step"):  # fmt: skip
        assert line in output
    lines = log_of_any(tmp_path / "run")
    assert sum("args" in line for line in lines) == 2 and lines[-1]["val_tokens"] == 128
    assert lines[-2]["lr"] == pytest.approx(0.0001) and [line["tokens"] for line in lines if "loss" in line] == [64, 128, 192, 256, 384, 512, 640, 768]
    assert sorted(file.name for file in (tmp_path / "run").glob("*.pt")) == ["checkpoint-00000007.pt", "checkpoint-00000008.pt"]
    assert torch.load(newest(tmp_path / "run"), weights_only=True)["optimizer"]["param_groups"][0]["update_proj_gap"] == 3


def test_what_the_user_keeps_beside_a_run_is_left_alone(monkeypatch, tmp_path, capsys, tokens):
    """A copy of a checkpoint under another name is not resumed from, not deleted, not taken for the newest. Bytes
    in the log that are no text stay as they are."""
    options = [*FEW, "--data_dir", tokens, "--save_every", "1", "--out_dir", "run"]
    assert run_here(monkeypatch, tmp_path, capsys, *options, "--steps", "1")[1] == 0
    for name in ("checkpoint-best.pt", "checkpoint-00000001-copy.pt"):
        (tmp_path / "run" / name).write_bytes(b"mine")
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"toy"', b'"\xff"', 1))
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", "--steps", "3")
    assert code == 0, output
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pt"))
    assert names == ["checkpoint-00000001-copy.pt", "checkpoint-00000003.pt", "checkpoint-best.pt"]
    assert torch.load(tmp_path / "run" / names[1], weights_only=True)["step"] == 3
    assert b'"\xff"' in log.read_bytes()


def test_two_runs_do_not_share_a_folder(monkeypatch, tmp_path, capsys, tokens):
    """While one process trains in a folder another is refused, in one line, and changes nothing; afterwards it may."""
    options = [*FEW, "--steps", "2", "--data_dir", tokens]
    assert run_here(monkeypatch, tmp_path, capsys, *options, "--out_dir", "run")[1] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    locked = files.lock(tmp_path / "run")
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", "--steps", "3")
    assert code == 2 and "another process is training in run" in output
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    os.close(locked)
    assert run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", "--steps", "3")[1] == 0


def test_without_a_terminal_and_without_a_folder(tokens, tmp_path):
    """Closed stdout and stderr, and a folder that is deleted while the run is on, end nothing: the last checkpoint is there."""
    command = [sys.executable, str(HERE / "train.py"), *FEW, "--steps", "40", "--save_every", "10", "--data_dir", tokens, "--out_dir", str(tmp_path / "run")]
    process = subprocess.Popen(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for_step(tmp_path / "run" / "log.jsonl", 10, process)
        for path in (tmp_path / "run").iterdir():
            path.unlink()
        (tmp_path / "run").rmdir()
        assert process.wait(timeout=60) == 0 and newest(tmp_path / "run").name == "checkpoint-00000040.pt"
    finally:
        process.kill()


@pytest.mark.parametrize("stdout", ["ascii", "/dev/full"])
def test_output_that_nobody_takes_does_not_change_the_exit_code(stdout, tokens, tmp_path):
    """A run that is done leaves with 0, though its output lacks letters of the sample, or is a full disk."""
    options = [*FEW, "--steps", "1", "--data_dir", tokens, "--out_dir", tmp_path]
    command = [sys.executable, HERE / "train.py", *options]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    with open(stdout if stdout == "/dev/full" else tmp_path / "output", "w") as file:
        done = subprocess.run(command, env=env, stdout=file, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert stdout == "/dev/full" or "sample:\ndef " in (tmp_path / "output").read_text("ascii")


@pytest.mark.parametrize("name, value, spins",
                         [("X", "", 20000), ("OMP_WAIT_POLICY", "passive", 0), ("GOMP_SPINCOUNT", "7", 7)])
def test_threads_do_not_spin_for_long(name, value, spins):
    """The OpenMP library says that waiting threads spin 20,000 times, not 300,000, or what the user said."""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= {"OMP_DISPLAY_ENV": "verbose", name: value}
    command = [sys.executable, "-c", "import train"]
    says = subprocess.run(command, cwd=HERE, env=env, stderr=subprocess.PIPE, text=True).stderr
    if "GOMP" not in says:
        pytest.skip("this torch does not come with GNU's OpenMP library")
    assert f"GOMP_SPINCOUNT = '{spins}'" in says


def room(monkeypatch, has_room):
    """torch.save fails as on a full disk, unless has_room(step). Returns the steps of which a save was tried."""
    save, tried = torch.save, []

    def full(what, file):
        tried.append(what["step"])
        if not has_room(what["step"]):
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(what, file)

    monkeypatch.setattr(torch, "save", full)
    return tried


def test_a_full_disk_ends_nothing(monkeypatch, tmp_path, capsys, tokens):
    """No room for checkpoints and log in the middle of a run: each is told, the checkpoint of before stays,
    training goes on. When there is room again all is written, and nothing is missing."""
    options = [*FEW, "--data_dir", tokens, "--steps", "8", "--save_every", "1", "--eval_every", "99"]
    assert run_here(monkeypatch, tmp_path, capsys, *options, "--out_dir", "calm")[1] == 0
    write = files.Log.write

    def full_for_the_log(self, line=None):
        if self.lines < 5 or self.lines > 6:
            return write(self, line)
        with monkeypatch.context() as patch:
            patch.setattr(files, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")), raising=False)
            return write(self, line)

    with monkeypatch.context() as patch:
        tried = room(patch, lambda step: step not in (2, 3))
        patch.setattr(files.Log, "write", full_for_the_log)
        output, code = run_here(monkeypatch, tmp_path, capsys, *options, "--out_dir", "run")
    assert code == 0 and tried == [0, 1, 2, 3, 4, 6, 7, 8]  # not 5, whose line the log did not take
    assert output.count("the checkpoint could not be written ([Errno 28] No space left on device)") == 2
    assert output.count("log.jsonl could not be written") == 1
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "calm"))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "calm")
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-00000008.pt", "log.jsonl"]


def test_a_full_disk_at_the_end_is_an_error(monkeypatch, tmp_path, capsys, tokens):
    """A run that cannot save its last step says so and leaves with code 1; resumed, it takes that step again."""
    options = [*FEW, *"--steps 3 --save_every 2 --out_dir run --data_dir".split(), tokens]
    with monkeypatch.context() as patch:
        room(patch, lambda step: step < 3)
        output, code = run_here(monkeypatch, tmp_path, capsys, *options)
    assert code == 1 and output.endswith("train.py: the checkpoint of step 3 could not be written\n")
    assert newest(tmp_path / "run").name == "checkpoint-00000002.pt"
    assert run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run")[1] == 0
    assert newest(tmp_path / "run").name == "checkpoint-00000003.pt"


def test_asked_to_stop_after_a_bad_step(monkeypatch, tmp_path, capsys, tokens):
    """Ctrl-C right after a skipped step leaves the checkpoint of before, and says from where to go on."""
    def bad(model, opt, batches, accumulate):
        os.kill(os.getpid(), signal.SIGINT)
        (model(*next(batches)) * math.nan).backward()
        opt.step()
        return torch.tensor(math.nan)

    monkeypatch.setattr(train, "training_step", bad)
    options = [*FEW, *"--steps 3 --save_every 99 --out_dir run --data_dir".split(), tokens]
    output, code = run_here(monkeypatch, tmp_path, capsys, *options)
    assert code == 0 and [path.name for path in (tmp_path / "run").glob("*.pt")] == ["checkpoint-00000000.pt"]
    assert "stopped after step 1; to go on from the checkpoint of step 0: python" in output


def test_the_batch_is_split_anew_for_other_processes(monkeypatch, unbroken):
    """A run of one process with 8 sequences at once goes on with 4 in each of two, and with 1 in each of 8; a GPU
    that is not there is told."""
    for processes in (2, 1, 8):
        monkeypatch.setattr(train, "world", lambda: processes)
        args, config, _ = train.settle(["--resume", "--device", "cpu", "--out_dir", str(unbroken[0])])
        train.fit(args, config)
        assert args.batch_size == 8 // processes and train.accumulation(args) == 1
    monkeypatch.setattr(train, "LOCAL_RANK", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="no GPU for process 4 of this machine: torchrun --nproc_per_node=2"):
        train.settle([])


@pytest.mark.parametrize("words, expected", [
    ("--size 7b --galore", dict(lr=0.005, rank=1024, update_proj_gap=500, state_bits=8, steps=150_000, tokenizer="gpt2")),
    ("--size 7b --galore --direction muon", dict(lr=0.01, rank=1024, direction="muon")),
    ("--size 1b", dict(lr=0.0005, rank=512, layerwise=True)),
    ("--size toy --galore --exact", dict(lr=0.005, layerwise=False, tokenizer="bytes", sample="def ", warmup_steps=60)),
    ("--size new --galore", dict(lr=0.01, rank=48, update_proj_gap=200, galore_scale=0.25, total_batch_size=512)),
])  # fmt: skip
def test_recipes(words, expected, monkeypatch, capsys):
    """The size's recipe fills in what is not typed, and --help shows it; a size without one has the paper's."""
    monkeypatch.setitem(SIZES, "new", SIZES["toy"])
    args, _, _ = train.settle([*words.split(), "--vocab_size", "320"])
    assert expected.items() <= vars(args).items()
    assert train.settle([*words.split(), "--vocab_size", "320", "--lr", "3"])[0].lr == 3
    with pytest.raises(SystemExit):
        train.settle([*words.split(), "--help"])
    assert f"peak learning rate (default: {expected['lr']})" in " ".join(capsys.readouterr().out.split())


def settled(words):
    args, config, _ = train.settle([*words.split(), "--device", "cpu"])
    train.fit(args, config)
    return args, config


@pytest.mark.parametrize("options", ["", "--galore --rank 8", "--galore --rank 8 --direction muon --state_bits 8"])
def test_weight_decay_is_of_matrices(options):
    """With gradients of zero a step is the decay alone: each matrix times 1 - lr decay, as torch.optim.AdamW,
    each norm as it was. The parameters keep their order, on which their random numbers depend."""
    args, _ = settled(options + " --weight_decay 0.5 --lr 0.25 --no-layerwise")
    model = Llama(Config(32, 16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
    opt = train.prepare(model, args)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] * (1 if "norm" in name else 0.875)), name
    groups = param_groups(model, 8) if args.galore else [dict(params=model.parameters())]
    assert list(opt.group) == [p for group in groups for p in group["params"]]


def test_learning_rate_schedule():
    """Linear to the peak over the warm-up, cosine to min_lr_ratio at the last step, in proportion to the peak."""
    args = SimpleNamespace(warmup_steps=10, steps=110, min_lr_ratio=0.1)
    rates = [train.learning_rate(step, args, 1.0) for step in range(1, 111)]
    assert np.allclose(rates[:10], np.arange(1, 11) / 10) and math.isclose(rates[59], 0.55) and math.isclose(rates[-1], 0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))
    assert np.allclose([train.learning_rate(step, args, 0.5) for step in range(1, 111)], np.array(rates) / 2)


def test_a_group_keeps_its_own_rate(monkeypatch, tmp_path, capsys, tokens):
    """A forker's group with an lr of its own follows the schedule from that, also after resuming."""
    own = train.param_groups
    monkeypatch.setattr(train, "param_groups", lambda *args: [group | dict(lr=0.02) for group in own(*args)])
    options = [*FEW, *"--steps 4 --lr 0.001 --warmup_steps 2 --min_lr_ratio 1 --out_dir run --data_dir".split(), tokens]
    for more in (options, ["--resume", "--out_dir", "run", "--steps", "5"]):
        assert run_here(monkeypatch, tmp_path, capsys, *more)[1] == 0
        groups = torch.load(newest(tmp_path / "run"), weights_only=True)["optimizer"]["param_groups"]
        assert {(group["lr"], group["rank"]) for group in groups} == {(0.02, 16), (0.001, None)}
    assert [line["lr"] for line in log_of(tmp_path / "run") if "loss" in line] == [0.0005, *[0.001] * 4]


PLAN = "--size {} --galore --rank {} --vocab_size 4096 --tokenizer bytes --dtype bfloat16 --state_bits 8"


@pytest.mark.parametrize("options", [
    "--batch_size 1 --total_batch_size 1 --no-activation_checkpointing",
    "--batch_size 8 --total_batch_size 64 --activation_checkpointing --grad_clipping 1 --direction muon",
    "--batch_size 4 --total_batch_size 8 --no-layerwise --no-activation_checkpointing"])  # fmt: skip
def test_few_blocks_tell_of_all(options):
    """The plan, from steps of two and three blocks, is within 1% of the step of the whole model. Its weights and
    its state are those of a real model and optimiser."""
    args, config = settled(PLAN.format("toy", 64) + " " + options)
    config.num_hidden_layers = 7
    how = args, config, args.batch_size, args.activation_checkpointing

    def whole(build, step, blocks, gap, tokens):
        parts = memory.simulate(build, step, blocks, 2, tokens)
        return max(parts.values(), key=lambda table: sum(table.values()))

    plan = train.plan(*how)
    assert sum(plan.values()) == pytest.approx(sum(train.plan(*how, run=whole).values()), rel=0.01)
    model = Llama(config, dtype=torch.bfloat16)
    opt = train.prepare(model, args)
    state = sum(x.nbytes for p in opt.group for x in opt.init(p).values() if torch.is_tensor(x))
    assert plan["weights"] == pytest.approx(sum(p.nbytes for p in model.parameters()) / 1e9)
    assert plan["state"] == pytest.approx(state / 1e9, rel=1e-3)


def test_the_plan_is_what_a_tracker_sees_of_a_real_step():
    """MemTracker on real tensors, in the same step, sees the same peak to 1% as on tensors without memory."""
    args, config = settled(PLAN.format("toy", 64) + " --batch_size 4 --total_batch_size 4 --no-activation_checkpointing")

    def real(build, step, blocks, gap, tokens):
        class Tracker(MemTracker):
            def nothing(self, *args):
                pass

            _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = nothing

        model = Llama(config, dtype=torch.bfloat16)
        opt, tracker = train.prepare(model, args), Tracker()
        opt.register_step_post_hook(lambda *_: None)
        x = torch.zeros(tokens, dtype=torch.long)
        for group in opt.param_groups:
            group["t"] = 1000 * group["update_proj_gap"] + group["offset"] - (group["offset"] in (0, 38))
        opt.arm()
        tracker.track_external(model, *(y for p in opt.group for y in opt.init(p).values() if torch.is_tensor(y)))
        with tracker:
            train.training_step(model, opt, iter([(x, x)]), 1)
        return {"peak": tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e9}

    how = args, config, 4, False
    assert sum(train.plan(*how).values()) == pytest.approx(train.plan(*how, run=real)["peak"], rel=0.01)


def test_a_plan_among_processes_exchanges_nothing():
    """With torch.distributed initialised the simulated step is that of one process: it sends no tensor."""
    args, config = settled(PLAN.format("toy", 64) + " --batch_size 1 --total_batch_size 1")
    config.num_hidden_layers = 2
    alone = train.plan(args, config, 1, False)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert train.plan(args, config, 1, False) == alone
    finally:
        torch.distributed.destroy_process_group()


def peaks(size, way):
    """GB: 1 at rest, 0.25 a sequence, a quarter of that with checkpointing."""
    return dict(weights=1.0, activations=size * (0.0625 if way else 0.25))


@pytest.mark.parametrize("free, sizes, ways, expected", [
    (5.1, [1, 2, 4, 8, 16, 32], [False, True], (16, False)),
    (2.1, [1, 2, 4, 8, 16, 32], [False, True], (4, False)),
    (1.2, [1, 2, 4, 8, 16, 32], [False, True], (2, True)),
    (0.5, [1, 2, 4, 8, 16, 32], [False, True], (1, True)),
    (9.9, [1, 2, 4, 8, 16, 32], [True], (32, True)),
    (0.5, [8], [False], (8, False)),
    (1.6, [1, 2], [False, True], (2, False)),
])  # fmt: skip
def test_the_largest_that_fits_is_chosen(free, sizes, ways, expected):
    """Without checkpointing if anything fits so, and then the largest size; with it otherwise; else the smallest."""
    size, way, table = memory.choose(peaks, sizes, ways, free, 4)
    assert (size, way) == expected and table == pytest.approx(peaks(*expected))


def test_the_plan_is_printed(monkeypatch, tmp_path, capsys):
    """--plan prints five kinds and, last, their sum, and writes nothing. What does not fit is said, and a run that
    does not fit is refused with the ways out. Where nothing can be simulated --batch_size is asked for."""
    words = (PLAN.format("toy", 64) + " --no-activation_checkpointing --total_batch_size 2 --batch_size 2").split()
    output, code = run_here(monkeypatch, tmp_path, capsys, *words, "--plan")
    *kinds, chosen, peak = output.strip().splitlines()
    assert not code and [line.split()[0] for line in kinds] == [*memory.KINDS] and not list(tmp_path.iterdir())
    assert "--batch_size 2, --no-activation_checkpointing; a 24 GB card has 24.14 GB" in chosen
    assert float(peak.split()[1]) == pytest.approx(sum(float(line.split()[1]) for line in kinds), abs=0.01)
    monkeypatch.setattr(train, "CARD", 0.01)
    assert "THIS RUN DOES NOT FIT" in run_here(monkeypatch, tmp_path, capsys, *words, "--plan")[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**7, 10**7))
    output, code = run_here(monkeypatch, tmp_path, capsys, *words, "--device", "cuda")
    assert code == 2 and "cuda has 0.0: take a lower --rank" in output
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.mem_tracker", None)
    output, code = run_here(monkeypatch, tmp_path, capsys, *words[:-2], "--device", "cuda")
    assert code == 2 and "no step can be simulated here" in output and "give --batch_size" in output


def test_without_a_compiler_training_goes_on(monkeypatch, tmp_path, capsys, tokens):
    """Where torch.compile does not work, --compile gives one line that says why, and the run is the eager one."""
    def broken(*args, **options):
        raise RuntimeError("Cannot find a working triton installation.\nMore about it.")

    monkeypatch.setattr(torch, "compile", broken)
    options = "--size toy --data python --galore --rank 16 --steps 2 --eval_tokens 256 --device cpu --compile".split()
    output, code = run_here(monkeypatch, tmp_path, capsys, *options, "--data_dir", tokens)
    said = [line for line in output.splitlines() if "torch.compile does not work here" in line]
    assert code == 0 and len(said) == 1 and "RuntimeError: Cannot find a working triton installation.)" in said[0], output


def test_init_continues_from_a_hugging_face_folder(monkeypatch, tmp_path, capsys, tokens):
    """--init DIR starts from the weights saved there: the first loss is theirs."""
    torch.manual_seed(3)
    start = Llama(Config(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    start.save_pretrained(tmp_path / "hf")
    options = "--init hf --data python --galore --rank 8 --steps 2 --total_batch_size 4 --seq_len 64 --eval_tokens 256 --lr 1e-9 --device cpu".split()
    output, code = run_here(monkeypatch, tmp_path, capsys, *options, "--data_dir", tokens)
    assert code == 0, output
    x, y = data.open_data("python", BYTES, "train", 64, data_dir=tokens).batch(4)
    assert math.isclose(log_of_any(tmp_path / "out" / "init-galore-r8")[1]["loss"], start(x, y).item(), rel_tol=1e-4)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", None])
def test_init_is_not_trained_on_tokens_of_another_tokenizer(name, monkeypatch, tmp_path, capsys):
    """A folder with a tokenizer of its own is refused, as its ids are not --tokenizer's. So is too small a
    vocabulary, with advice that can be followed."""
    config = Config(256, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    Llama(config).save_pretrained(tmp_path / "hf")
    if name:
        (tmp_path / "hf" / name).write_text("{}")
    options = "--init hf --data python --galore --rank 8 --steps 1 --device cpu --batch_size 1".split()
    output, code = run_here(monkeypatch, tmp_path, capsys, *options)
    assert code == 2 and len(output.strip().splitlines()) == 2
    advice = "copy config.json and the weights to another folder" if name else "257: take another --tokenizer"
    assert output.rstrip("\n.").endswith(advice)


def test_another_model_than_the_runs_is_told(monkeypatch, tmp_path, capsys, tokens):
    """Who changes the model in the middle of a run reads it in one sentence, with exit code 2."""
    options = [*FEW, "--steps", "1", "--data_dir", tokens, "--out_dir", "run"]
    assert run_here(monkeypatch, tmp_path, capsys, *options)[1] == 0

    class Wider(Llama):
        def __init__(self, *args):
            super().__init__(*args)
            self.bias = nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(train, "Llama", Wider)
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", "--steps", "2")
    assert code == 2 and "the run in run has other weights than this model.py makes" in output, output


def test_60m_trains_on_c4_shards(monkeypatch, tmp_path, capsys):
    """The 60M model trains on real C4 shards in their own form, with GPT-2's tokenizer, in bf16 with 8-bit moments."""
    if "NANO_GALORE_DATA" not in os.environ:
        pytest.skip("NANO_GALORE_DATA (a folder with c4/ and tiktoken_cache/) is not set")
    folder = Path(os.environ["NANO_GALORE_DATA"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken_cache"))
    options = "--size 60m --galore --rank 128 --steps 2 --total_batch_size 2 --batch_size 1 --eval_tokens 256 --dtype bfloat16 --state_bits 8 --device cpu --seq_len 64"
    output, code = run_here(monkeypatch, tmp_path, capsys, *options.split(), "--data", folder / "c4", "--data_dir", tmp_path / "tokens")
    assert code == 0 and "vocabulary 50,304" in output, output
    losses = [line["loss"] for line in log_of_any(tmp_path / "out" / "60m-galore-r128-8bit") if "loss" in line]
    assert len(losses) == 2 and all(10.5 < loss < 11.2 for loss in losses)
