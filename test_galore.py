"""
Every claim that the files make, held against an oracle that was not written here, or an exact identity.

    pip install -r requirements.txt pytest && pytest -q                      # seven minutes on two CPU cores
    pip install galore-torch transformers safetensors bitsandbytes peft scikit-learn   # the oracles;
    without them their tests skip

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
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import contextmanager, nullcontext
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
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
from plumbing import files, memory, shards
from thin import thin

torch.set_num_threads(1)  # tiny matrices gain nothing from threads, and lose tenfold on a busy machine
YES = torch.tensor(True)
EPS = 1e-6  # where two ways of computing G are compared: rounding moves a G of 1e-8 by 1e-8 / eps lr


def oracle(name: str, pip: str):
    return pytest.importorskip(name, reason=f"the oracle {pip} is not installed: pip install {pip}")


# ----- adam8bit.py ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes(signed):
    """The 256 values equal bitsandbytes' dynamic map to the last bit."""
    bnb = oracle("bitsandbytes.functional", "bitsandbytes")
    assert adam8bit.dynamic_map(signed).tolist() == bnb.create_dynamic_map(signed=signed).tolist()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(4096,), (1,), (257,), (17, 331), (3, 5, 700)])
def test_quantise_is_brute_force_nearest(signed, shape):
    """Each code is as near as any of the 256 values: partial last blocks, huge and tiny blocks, zeros."""
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
    """Right on both sides of every midpoint and on every value: no interval of the table holds two
    midpoints."""
    qmap = adam8bit.dynamic_map(signed)
    middle = adam8bit.nearest_table(qmap)[1][:-1]
    sides = [middle.nextafter(torch.tensor(end)) for end in (9.0, -9.0)]
    for part in torch.cat([qmap, middle, *sides]).split(255):
        part = torch.cat([part, torch.ones(1)])  # each block has its absmax, 1, in it
        got = qmap[adam8bit.quantise(part, signed)[0].int()]
        assert ((part - got).abs() - (part[:, None] - qmap).abs().amin(1)).max() < 1e-7


def test_error_figures_of_the_docstring():
    """Mean relative error on normal noise is what `quantise` says: 1.5% signed, 0.8% for its size,
    unsigned."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for y, signed, stated in ((x, True, 0.015), (x.abs(), False, 0.008)):
        back = adam8bit.dequantise(*adam8bit.quantise(y, signed), signed)
        error = ((back - y).abs() / y.abs()).mean().item()
        assert abs(error - stated) < 0.0005 and f"{stated:.1%}" in adam8bit.quantise.__doc__


def test_8bit_adam_follows_bitsandbytes():
    """30 steps of full-rank 8-bit AdamW end within 1% of where bitsandbytes' AdamW8bit takes the weights."""
    bnb = oracle("bitsandbytes", "bitsandbytes")
    ps, qs, start = (parameters((64, 128)) for _ in range(3))
    ours = GaLoreAdamW(ps, lr=1e-2, weight_decay=0.1, state_bits=8)
    walk([ours, bnb.optim.AdamW8bit(qs, lr=1e-2, weight_decay=0.1)], [ps, qs], 30)
    assert ours.state[ps[0]]["M"].dtype == torch.uint8
    assert (ps[0] - qs[0]).norm() < 0.01 * (ps[0] - start[0]).norm()


@pytest.mark.parametrize("tied", [False, True])
def test_no_element_of_a_weight_jumps(tied, monkeypatch):
    """With 8-bit state no element of any weight moves by more than 5 lr in any of 200 steps of Zipf
    tokens."""
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


def test_a_spike_long_ago_makes_no_neighbour_jump():
    """One gradient of 1e4 in a block, then 1e-5 everywhere: V of the others is below the code's range for
    long, while M is not. No step is above fp32's (without code 1 for it: 647 lr)."""
    p = nn.Parameter(torch.zeros(4096))
    opt, g = GaLoreAdamW([p], lr=1.0, state_bits=8), torch.Generator().manual_seed(0)
    for t in range(150):
        p.grad, before = 1e-5 * torch.randn(4096, generator=g), p.detach().clone()
        p.grad[::256] += 1e4 * (t == 0)
        opt.step()
        assert (p - before).abs().max() < 2, t


def test_no_codes_make_a_long_step():
    """Whatever codes M and sqrt(V) have, N is at most 5; it is exact where it is smaller."""
    state = adam8bit.zeros("MV", (256, 256), torch.float32, True, torch.device("cpu"))
    state["M"] += torch.arange(256, dtype=torch.uint8)[:, None]
    state["V"] += torch.arange(256, dtype=torch.uint8)
    state["M_scale"] += 1.0
    state["V_root_scale"] += 1.0
    M, V = adam8bit.load(state, "M"), adam8bit.load(state, "V")
    more = dict(betas=(0.9, 0.999), eps=1e-8, bias=torch.tensor([0.5, 0.1]), dtype=torch.float32)
    N = galore.advance_(state, "MV", galore.adam, torch.zeros(256, 256), galore.ONE, YES, **more)
    exact = 0.9 * M / 0.5 / ((0.999 * V / 0.1).sqrt() + 1e-8)
    assert exact.abs().max() > 1e6 and torch.allclose(N, exact.clamp(-5, 5), rtol=1e-5)


@pytest.mark.parametrize("gap", [99, 5])
def test_small_gradients_beside_large_ones_step_as_in_fp32(gap):
    """Gradients of a block over six decades: N from 8-bit moments, refreshed or not, is near fp32's in
    each."""
    g = torch.Generator().manual_seed(0)
    size = torch.logspace(0, -6, 512)[torch.randperm(512, generator=g)]
    P, M = {"P": orthonormal(torch.randn(24, 8, generator=g))}, ("MV", torch.Size((8, 512)), torch.float32)
    wide, narrow = (copy.deepcopy(P) | adam8bit.zeros(*M, bits == 8, torch.device("cpu")) for bits in (32, 8))
    for t in range(1, 31):
        G = torch.randn(8, 512, generator=g) * size
        bias = [torch.tensor(1 - beta**t) for beta in (0.9, 0.999)]
        more = dict(betas=(0.9, 0.999), eps=1e-12, bias=bias, dtype=torch.float32)
        N, ours = (galore.advance_(x, "MV", galore.adam, G, galore.ONE, YES, **more) for x in (wide, narrow))
        error = (ours - N).abs()
        assert error.max() < 5
        for i in range(6):  # each decade has half as many codes as the one above
            inside = (size <= 10.0**-i) & (size > 10.0 ** -(i + 1))
            assert error[:, inside].mean() < 0.015 * 2**i, (t, i)
        if t % gap == 0:
            Y = torch.randn(24, 8, generator=g)
            for state in (wide, narrow):
                rotate(state, "MV", refresh(state["P"], Y), YES)
    assert narrow["V"].dtype == torch.uint8 and (narrow["V"] < 64).any()


def test_what_stays_32_bit():
    """Tensors under 4096 values keep fp32 moments; from there on a value takes a byte and its 256th of a
    scale."""
    ps = parameters((4095,), (4096,))
    opt = GaLoreAdamW(ps, state_bits=8)
    walk([opt], [ps], 1)
    nbytes = [sum(x.nbytes for name, x in opt.state[p].items() if name != "t") for p in ps]
    assert nbytes == [8 * 4095, 2 * (4096 + 4 * 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (65536, 160), (10_000_019,)], ids=str)
def test_the_norm_of_many_values(shape, dtype):
    """`norm` is float64's to 1e-6, where torch's on a CPU loses 4e-4 of 10 M values. It makes no large
    tensor."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
    with Watch(lambda y: y.numel() <= adam8bit.SLICE or y.data_ptr() == x.data_ptr()):
        ours = galore.norm(x)
    squares = [y.double().square().sum() for y in x.flatten().split(1 << 20)]
    assert ours.dtype == torch.float32 and math.isclose(ours, math.sqrt(sum(squares)), rel_tol=1e-6)


# ----- galore.py: the subspace ------------------------------------------------------------------------------


def off_orthonormal(P):
    return (P.float().T @ P.float() - torch.eye(P.shape[1])).abs().max().item()


def refreshed(P, Y, M, V, ok=YES):
    """P, M and V after a refresh out of Y."""
    state = {"P": P.clone(), "M": M.clone(), "V": V.clone()}
    rotate(state, "MV", refresh(P, Y), ok)
    return state["P"], state["M"], state["V"]


KINDS = "normal, spread 1e6, spread 1e9, rank 3, rank 0, one column, tiny, huge, equal columns".split(", ")


@pytest.mark.parametrize("kind", KINDS)
def test_basis_stays_orthonormal(kind):
    """Whatever the gradient, P'P = I to 1e-5, and M, V stay finite, V >= 0. P holds what Y spans."""
    torch.manual_seed(0)
    m, r, n = 96, 24, 160
    P, M, V = orthonormal(torch.randn(m, r)), torch.randn(r, n), torch.rand(r, n)
    U, W = orthonormal(torch.randn(m, r)), orthonormal(torch.randn(r, r))
    Y = {
        "normal": torch.randn(m, r),
        "spread 1e6": U * torch.logspace(0, -6, r) @ W.T,
        "spread 1e9": U * torch.logspace(0, -9, r) @ W.T,
        "rank 3": torch.randn(m, 3) @ torch.randn(3, r),
        "rank 0": torch.zeros(m, r),
        "one column": F.pad(torch.randn(m, 1), (0, r - 1)),
        "tiny": torch.randn(m, r) * 1e-20,
        "huge": torch.randn(m, r) * 1e20,
        "equal columns": torch.randn(m, 1).expand(m, r),
    }[kind]
    new, M, V = refreshed(P, Y, M, V)
    assert off_orthonormal(new) < 1e-5 and M.isfinite().all() and V.isfinite().all() and (V >= 0).all()
    if kind == "rank 0":
        assert torch.allclose(new, P, atol=1e-5)
    elif kind != "one column":
        assert (new @ (new.T @ Y) - Y).norm() < 1e-3 * Y.norm()


def test_rotating_the_moments():
    """S = I changes nothing, S a permutation permutes, and P_new M_new is P_old M_old in the new subspace."""
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
    """On a rank-r gradient and noise, the warm iterations of steps 2 to 8 capture what its SVD does, to
    1%."""
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


def walk(optimisers, parameters, steps, scale=0.1):
    """The same random gradients, with a part that depends on the weights, for each optimiser's own
    parameters."""
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


def identity(ps, t=0, **options):
    """GaLore with P = I, r = m, alpha = 1, past the first refreshes."""
    groups = [dict(params=ps, rank=1, scale=1.0, t=9)]
    opt = GaLoreAdamW(groups, lr=0.01, weight_decay=0.1, eps=EPS, **options)
    for p in ps:
        names = galore.DIRECTIONS[opt.direction][1]
        opt.state[p] = {"P": torch.eye(16), "t": t} | {name: torch.zeros(16, max(p.shape)) for name in names}
    return opt


SHAPES = pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)])


def test_without_rank_is_adamw():
    """A parameter without a rank takes the steps of torch.optim.AdamW, decay and all."""
    ps, qs = parameters((20, 30), (7,), (5000,)), parameters((20, 30), (7,), (5000,))
    options = dict(lr=0.01, weight_decay=0.1, eps=EPS)
    walk([GaLoreAdamW(ps, **options), torch.optim.AdamW(qs, **options)], [ps, qs], 20)
    assert apart(ps, qs) < 5e-6  # 20 steps, each of which rounds weights of up to 4.5 by 2.4e-7


@SHAPES
def test_identity_basis_is_adamw(shape):
    """GaLore with P = I, r = m and alpha = 1 is torch.optim.AdamW."""
    ps, qs = parameters(shape), parameters(shape)
    walk([identity(ps), torch.optim.AdamW(qs, lr=0.01, weight_decay=0.1, eps=EPS)], [ps, qs], 20)
    assert apart(ps, qs) < 5e-6  # as above


@SHAPES
def test_identity_basis_is_muon(shape, monkeypatch):
    """direction="muon" with P = I is torch.optim.Muon. Its products in bf16 are near ours in fp32."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    for products, limit in ((lambda x: x, 1e-6), (torch.Tensor.bfloat16, 2e-3)):
        ps, qs = parameters(shape), parameters(shape)
        opt = identity(ps, betas=(0.95, 0), direction="muon")
        twin = torch.optim.Muon(qs, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "bfloat16", products)
            walk([opt, twin], [ps, qs], 20)
        assert apart(ps, qs) < limit and apart(ps, parameters(shape)) > 0.01


@pytest.mark.parametrize("way", ["plain", "thin"])
def test_a_direction_is_a_function_and_an_entry(way, monkeypatch):
    """Lion, added to the table: with P = I it takes the paper's steps (2302.06675); thin, saved and loaded,
    too."""

    def lion(R, M, betas, **_):
        return torch.lerp(R, M, betas[0]).sign(), torch.lerp(M, R, 1 - betas[1])

    monkeypatch.setitem(galore.DIRECTIONS, "lion", (lion, "M"))
    if way == "plain":
        (p,), (q,), M = parameters((16, 24)), parameters((16, 24)), torch.zeros(16, 24)
        opt, g = identity([p], direction="lion", betas=(0.9, 0.99)), torch.Generator().manual_seed(1)
        for _ in range(20):
            p.grad = torch.randn(16, 24, generator=g)
            q.data = 0.999 * q - 0.01 * (0.9 * M + 0.1 * p.grad).sign()
            M = 0.99 * M + 0.01 * p.grad
            opt.step()
        assert apart([p], [q]) < 1e-6
    unbroken, _ = trained(way, 12, direction="lion", state_bits=8)
    model, opt = trained(way, 6, direction="lion", state_bits=8)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    trained(way, 6, model=model, opt=opt, start=6)
    assert set(opt.state[model.layers[0].up.weight]) == {"P", "M", "t"}
    assert weights_apart(unbroken, model) == 0 < weights_apart(model, trained(way, 12)[0])


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("steps", [(9,), (99,), (4, 14, 24, 34, 44, 54), (*range(20, 40),)], ids=str)
def test_late_and_rare_gradients_are_adamws(rank, steps):
    """A parameter with gradients in some steps only moves as torch.optim.AdamW moves it, without a rank and
    with P = I, beside one that has a gradient in every step. Saving and loading keep its count."""
    ps, qs = (parameters((16, 24), (16, 24)) for _ in "pq")
    opt = GaLoreAdamW(ps, lr=0.01, weight_decay=0.1, eps=EPS) if rank is None else identity(ps)
    twin, g = torch.optim.AdamW(qs, lr=0.01, weight_decay=0.1, eps=EPS), torch.Generator().manual_seed(1)
    for step in range(max(steps) + 1):
        for p, q in zip(ps, qs):
            p.grad = q.grad = torch.randn(16, 24, generator=g) if q is qs[0] or step in steps else None
        opt.step(), twin.step()
        if step == 30 and not rank:
            saved, opt = copy.deepcopy(opt.state_dict()), GaLoreAdamW(ps, lr=0.01, weight_decay=0.1, eps=EPS)
            opt.load_state_dict(saved)
    assert apart(ps, qs) < 5e-6


def test_muon_keeps_one_moment():
    """Projected matrices have P and M, half of Adam's moments; the others M and V. The move's singular values
    are alike, and what is clipped is what M sees."""
    ps, start = parameters((16, 40), (9,)), parameters((16, 40))[0]
    groups = [dict(params=ps[:1], rank=8), dict(params=ps[1:])]
    opt = GaLoreAdamW(groups, lr=0.01, direction="muon")
    walk([opt], [ps], 1)
    assert [set(opt.state[p]) for p in ps] == [{"P", "M", "t"}, {"M", "V", "t"}]
    S = torch.linalg.svdvals(ps[0] - start) / (0.01 * 0.25 * 0.2 * 40**0.5)
    assert S[0] < 1.3 and S[7] > 0.5 and S[8] < 1e-3
    half = parameters((16, 40))
    clipped = GaLoreAdamW([dict(params=half, rank=8)], lr=0.01, direction="muon", max_norm=1.0)
    half[0].grad = ps[0].grad.clone()
    clipped.step()
    assert torch.allclose(clipped.state[half[0]]["M"] * clipped.norm, opt.state[ps[0]]["M"], rtol=1e-4)


def test_exact_is_galore_torch():
    """Exact takes galore-torch's trajectory: 30 steps, two refreshes after the first, three orientations, a
    plain parameter."""
    theirs = oracle("galore_torch", "galore-torch")
    shapes = [(24, 40), (40, 24), (32, 32), (50,)]
    ps, qs = parameters(*shapes), parameters(*shapes)
    keys = dict(rank=8, update_proj_gap=12, scale=0.25, proj_type="std")
    ours, groups = ([dict(params=x[:3], **keys), dict(params=x[3:])] for x in (ps, qs))
    twin = theirs.GaLoreAdamW(groups, lr=0.01, eps=1e-8, no_deprecation_warning=True)
    walk([Exact(ours, lr=0.01), twin], [ps, qs], 30)
    assert apart(ps, qs) < 1e-5 and apart(ps, parameters(*shapes)) > 0.01


def test_exact_goes_on_after_a_bad_gradient():
    """A gradient that is not finite, in a step in which an SVD is due, leaves everything as it is."""
    (p,), (q,) = parameters((16, 24)), parameters((16, 24))
    opt, p.grad = Exact([dict(params=[p], rank=4)], lr=0.01), torch.full((16, 24), math.nan)
    opt.step()
    assert apart([p], [q]) == 0 and int(opt.skipped) == 1
    walk([opt], [[p]], 1)
    assert p.isfinite().all() and apart([p], [q]) > 1e-3


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


@pytest.mark.parametrize("kind", [GaLoreAdamW, Exact])
def test_rounding_of_bf16_weights(kind):
    """Updates that rounding to nearest would lose survive on average; only the two neighbours occur. 100
    steps of decay 1e-3 shrink weights to 0.905. Exact rounds to nearest, and loses all of it."""
    p = nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    opt, p.grad = kind([p], lr=1e-3), torch.ones_like(p)  # the next bf16 below 1 is 1 - 2^-8
    opt.step()
    assert set(p.tolist()) == ({1.0} if kind is Exact else {1.0, 1 - 2**-8})
    assert kind is Exact or abs(1 - p.float().mean().item() - 1e-3) < 5e-5
    p = nn.Parameter(torch.linspace(1, 2, 4096).bfloat16())
    before, opt = p.detach().float(), kind([p], lr=0.01, weight_decay=0.1)
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        opt.step()
    shrunk = (p.detach().float() / before).mean().item()
    assert shrunk == 1 if kind is Exact else abs(shrunk - 0.999**100) < 1e-3


def test_wrong_arguments_are_refused():
    """What cannot be honoured gives a sentence. fp32 would round float64, and lose a part of complex
    numbers."""
    p = parameters((16, 24))
    for word, keys in {"rank 0": dict(rank=0), "rank -3": dict(rank=-3), "rank 16": dict(rank=16),
                       "gap 0": dict(update_proj_gap=0), "full": dict(proj_type="full")}.items():  # fmt: skip
        with pytest.raises(ValueError, match=word):
            GaLoreAdamW([dict(params=p, rank=4) | keys])
    for word, options in {"state_bits is 4": dict(state_bits=4), "max_norm is 0": dict(max_norm=0.0),
                          "choose one of adam, muon": dict(direction="sgd")}.items():  # fmt: skip
        with pytest.raises(ValueError, match=word):
            GaLoreAdamW(p, **options)
    with pytest.raises(ValueError, match="rank 4"):
        GaLoreAdamW([dict(params=parameters((16,)), rank=4)])
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(ValueError, match=f"is {dtype}"):
            GaLoreAdamW(parameters((16,), dtype=dtype))


@pytest.mark.parametrize("bits", [32, 8])
def test_updates_in_slices_are_updates(bits, monkeypatch):
    """Moments, weights and bases moved 512 values at a time end where whole ones do: rows of blocks, odd
    sizes."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)
    shapes, ends = [(64, 96), (96, 64), (33, 131), (40, 64), (1500,)], []
    for size in (1 << 22, 512):
        for module in (adam8bit, galore):
            monkeypatch.setattr(module, "SLICE", size)
        ends.append(parameters(*shapes))
        groups = [dict(params=ends[-1][:3], rank=24, update_proj_gap=3), dict(params=ends[-1][3:])]
        walk([GaLoreAdamW(groups, lr=0.01, weight_decay=0.1, eps=EPS, state_bits=bits)], [ends[-1]], 9)
    assert apart(*ends) < 1e-5 and apart(ends[0], parameters(*shapes)) > 0.01


def test_schedulers_clipping_and_closures_of_torch_work():
    """An ordinary torch loop runs as with any optimiser: LambdaLR, clip_grad_norm_, a closure."""
    model, opt = trained("plain", 0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)

    def closure():
        opt.zero_grad()
        loss = model(*batch(0))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    losses = [(opt.step(closure), schedule.step())[0].item() for _ in range(8)]
    assert losses[-1] < losses[0] and {g["lr"] for g in opt.param_groups} == {3e-3 * 0.5**8}


# ----- galore.py: groups, schedule, saving ------------------------------------------------------------------


class Conv1D(nn.Module):
    """A linear layer as in GPT-2 of transformers, where it has this name: its weight is transposed."""

    def __init__(self, into, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out) / 5), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    """Wide, square and tall matrices with biases in numbered blocks, an embedding, a head, in small."""

    class Block(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.up, self.square, self.down = linear(24, 40), linear(40, 40), linear(40, 24)

        def forward(self, x):
            return x + self.down(torch.tanh(self.square(F.silu(self.up(x)))))

    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
        self.layers = nn.ModuleList(Net.Block(linear) for _ in range(3))

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
    """A model after some steps on 8 sequences each, T = 7, taken "plain" or "thin" in `micro`
    micro-batches."""
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


def test_groups_hold_every_parameter_once():
    """Attention and MLP matrices get the rank, the rest none, each parameter exactly one group."""
    model = Llama(Config(vocab_size=320, **SIZES["toy"]))
    groups = param_groups(model, 16, update_proj_gap=200)
    held = [p for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    names = {p: name for name, p in model.named_parameters()}
    ranked = {names[p] for g in groups if g.get("rank") for p in g["params"]}
    assert ranked == {name for name in names.values() if name.endswith("_proj.weight")}
    assert [(g["offset"], g["early_gap"]) for g in groups[:-1]] == [(0, 2), (50, 2), (100, 2), (150, 2)]


def test_what_gets_no_rank_is_named():
    """A matrix too narrow for the rank gets none. One warning names it, and fused experts, with their share,
    but not embedding, head, norms and biases. Conv1D gets the rank. Where nothing does, a sentence says
    why."""
    model = Net()
    model.layers.extend([nn.ModuleDict(dict(gate=nn.Linear(24, 8), up=nn.Linear(24, 40))), Conv1D(24, 40)])
    model.layers[3].experts = nn.Parameter(torch.zeros(4, 24, 40))
    with pytest.warns(UserWarning) as said:
        *blocks, rest = param_groups(model, 8)
    GaLoreAdamW([*blocks, rest])
    share = (8 * 24 + 4 * 24 * 40) / sum(p.numel() for p in model.parameters())
    assert [str(warning.message) for warning in said] == [
        f"{share:.1%} of the parameters are matrices in blocks and get no rank: "
        "layers.*.experts (4, 24, 40), layers.*.gate.weight (8, 24)"]  # fmt: skip
    ranked = {p for group in blocks for p in group["params"]}
    assert {model.layers[3].up.weight, model.layers[4].weight} < ranked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(Net(), 8), param_groups(tiny(), 8)
    for frozen, rank in ((False, 64), (True, 8)):
        model = Net().requires_grad_(not frozen)
        with pytest.raises(ValueError, match=f"trainable and wider than rank {rank}: unfreeze"):
            param_groups(model, rank)


def test_blocks_are_refreshed_in_turn():
    """Blocks are due four times early on, about two in a step, and then in steps i T / L (mod T), one in a
    step; with T below the number of blocks each is due once in T steps, too."""
    changes = {}

    def between(step, model, opt):
        changes[step] = [opt.init(layer.up.weight)["P"].clone() for layer in model.layers]

    trained("thin", 24, between=between)
    # A hook has moved the weights of step s (from 0) before `between` sees them: the next change is step s +
    # 2's.
    moved = {step + 2: [not torch.equal(*pair) for pair in zip(changes[step], changes[step + 1])]
             for step in range(23)}  # fmt: skip
    assert [{t for t in moved if moved[t][i]} for i in range(3)] == [
        {2, 4, 6, 8, 14, 21}, {2, 4, 6, 8, 10, 17, 24}, {3, 5, 7, 9, 12, 19}]  # fmt: skip
    for T in range(1, 9):
        opt = GaLoreAdamW(param_groups(Net(), rank=8, update_proj_gap=T))
        for group in opt.param_groups[:-1]:
            assert sum(opt.due(group | dict(t=t)) for t in range(99, 99 + T)) == 1


def test_the_gap_may_change():
    """Groups made for T = 200 are refreshed once in 10 steps when T becomes 10, each at its offset (mod 10).
    A change between backward pass and step counts from the next step on, thin as plain."""
    opt = GaLoreAdamW(param_groups(Net(), rank=8))
    for group in opt.param_groups[:-1]:
        due = [t + 1 for t in range(20, 2020) if opt.due(group | dict(update_proj_gap=10, t=t))]
        assert {t % 10 for t in due} == {group["offset"] % 10} and len(due) == 200

    def change(step, model, opt):
        for group in opt.param_groups:
            group["update_proj_gap"] = (7, 3, 5, 4)[step % 4]

    models, bases = [], []
    for way in ("plain", "thin"):
        model, opt = trained(way, 24, between=change)
        models.append(model), bases.append([opt.state[p]["P"] for p in opt.group if "P" in opt.state[p]])
    assert apart(*bases) < 1e-4 and weights_apart(models[0], trained("plain", 24)[0]) > 1e-4


@pytest.mark.parametrize("way", ["plain", "thin"])
def test_any_orthonormal_basis_will_do(way, monkeypatch):
    """A refresh by torch.linalg.qr, whose Q is not contiguous, spans the same as ours after all refreshes.
    Adam does not see its other signs, so the weights are the same."""
    model, opt = trained(way)
    monkeypatch.setattr(galore, "refresh", lambda P, Y: torch.linalg.qr(F.normalize(Y, dim=0) + 1e-3 * P)[0])
    other, twin = trained(way)
    assert weights_apart(model, other) < 1e-5
    for p, q in zip(opt.group, twin.group):
        if "P" in opt.state[p]:
            P, Q = opt.state[p]["P"], twin.state[q]["P"]
            assert not torch.equal(P, Q) and apart([P @ P.T], [Q @ Q.T]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("way, direction", [("plain", "adam"), ("thin", "adam"), ("thin", "muon")])
def test_resume_is_bit_for_bit(tmp_path, way, direction, bits, dtype, monkeypatch):
    """Saved after 5 steps, loaded with weights_only=True into new objects, 5 more give the bits of 10
    unbroken."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)  # so that some of these small matrices are 8-bit
    options = dict(dtype=dtype, state_bits=bits, direction=direction)
    unbroken, _ = trained(way, 10, **options)
    model, opt = trained(way, 5, **options)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    model, opt = trained(way, 0, **options)
    model.load_state_dict(saved["model"]), opt.load_state_dict(saved["opt"])
    trained(way, 5, model=model, opt=opt, start=5)
    assert weights_apart(unbroken, model) == 0


def test_loading_holds_no_state_twice():
    """When the first tensor of a checkpoint is read, those that a thin model's layers had before are gone."""
    model, opt = trained("thin", 0)
    old = [weakref.ref(module.galore[name]) for module in opt.modules for name in "PMV"]

    class Entries(dict):
        def items(self):
            assert not any(x() is not None for x in old)
            return super().items()

    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {i: Entries(state) for i, state in saved["state"].items()}
    opt.load_state_dict(saved)
    assert len(old) > 10 and all(module.galore is opt.state[module.weight] for module in opt.modules)


OTHERS = {  # how the state that is loaded was made, and what the sentence names
    "another rank": (dict(rank=4), "'M', 'P', 'V'"),
    "8 bits": (dict(state_bits=8), "'M_scale'"),
    "codes without scale": (dict(state_bits=8, into=dict(state_bits=8), remove=(0, "M_scale")), "'M_scale'"),
    "Muon's": (dict(direction="muon"), "'V'"),
    "bf16": (dict(dtype=torch.bfloat16), "'P'"),
    "no P": (dict(remove=(0, "P")), "'P'"),
    "no count": (dict(remove=(3, "t")), "'t'"),
    "no parameter": (dict(remove=(4,)), "parameter 4"),
    "torch's": (dict(optimiser=torch.optim.AdamW), "'exp_avg'"),
    "torch's, not begun": (dict(optimiser=torch.optim.AdamW, steps=0), "'t'"),
    "galore-torch's": (dict(optimiser="galore_torch"), "'exp_avg'"),
}


@pytest.mark.filterwarnings("ignore:This implementation of AdamW")
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
    keys = dict(update_proj_gap=9, scale=1, proj_type="std")
    other = optimiser([keys | group for group in param_groups(model, rank)], **options)
    for _ in range(steps):
        model(*batch(0)).backward()
        other.step()
    saved = other.state_dict()
    if remove:
        (saved["state"][remove[0]] if remove[1:] else saved["state"]).pop(remove[-1])
    unbroken, _ = trained(way, 4, **into)
    model, opt = trained(way, 2, **into)
    with pytest.raises(ValueError, match=word):
        opt.load_state_dict(saved)
    trained(way, 2, model=model, opt=opt, start=2)
    assert weights_apart(unbroken, model) == 0


def test_an_optimiser_is_not_copied():
    """copy and pickle, which would lose what an optimiser knows beside its state, get one sentence."""
    _, opt = trained("thin", 1)
    for lose in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            lose(opt)


# ----- thin.py ----------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Every tensor that an operation makes must pass `fine`."""

    def __init__(self, fine):
        super().__init__()
        self.fine, self.seen = fine, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert not torch.is_tensor(x) or self.fine(x), f"{func} made a tensor of shape {tuple(x.shape)}"
            self.seen += 1
        return out


OPTIONS = [{}, dict(max_norm=0.5), dict(weight_decay=0.1), dict(direction="muon")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_thin_equals_plain(options):
    """20 steps with refreshes inside, without ever forming G, end at the weights of loss.backward();
    opt.step(). So do 4 micro-batches, which an optimiser that steps on each of them would not."""
    plain, opt = trained("plain", **options)
    for way, micro in (("thin", 1), ("thin", 4), ("plain", 4)):
        other, twin = trained(way, micro=micro, **options)
        assert weights_apart(plain, other) < 1e-5 and torch.allclose(opt.norm, twin.norm, rtol=1e-4)
    different = trained("plain", **options | dict(max_norm=0.01))[0]
    assert weights_apart(plain, Net()) > 0.01 and weights_apart(plain, different) > 1e-5


@pytest.mark.parametrize("case", ["shared layer", "Conv1D", "bf16, 8 bits", "autocast"])
def test_thin_equals_plain_elsewhere(case):
    """A layer used twice; layers that `thin` does not know; bf16 and autocast, up to the rounding of
    products."""

    def shared():
        model = Net()
        model.layers[2].square.weight = model.layers[0].square.weight
        return model

    near, options = {
        "shared layer": (1e-5, dict(build=shared)),
        "Conv1D": (1e-5, dict(build=lambda: Net(Conv1D))),
        "bf16, 8 bits": (0.02, dict(dtype=torch.bfloat16, state_bits=8)),
        "autocast": (0.02, {}),
    }[case]
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        (a, _), (b, opt) = (trained(way, **options) for way in ("plain", "thin"))
    losses = [model(*batch(99)).item() for model in (a, b, Net())]
    assert abs(losses[0] - losses[1]) < near * losses[0] and losses[0] < 0.9 * losses[2]
    assert near > 1e-5 or weights_apart(a, b) < 1e-5
    moved = b.layers[0].up.weight.detach().clone()
    b(*batch(0)).backward()
    assert not torch.equal(moved, b.layers[0].up.weight)  # layer-wise: it moved during the backward pass
    assert all(x.grad is None for x in [*opt.proxies.values(), *opt.group])
    assert all(proxy.untyped_storage().nbytes() == proxy.element_size() for proxy in opt.proxies.values())


def test_no_full_gradient_is_ever_made():
    """In thin steps, two of them refreshing, no operation makes a tensor of a projected matrix's shape."""
    shapes, own = {(40, 24), (24, 40), (40, 40)}, set()
    watch = Watch(lambda x: tuple(x.shape) not in shapes or x.untyped_storage().data_ptr() in own)
    for way in ("thin", "plain"):
        model, opt = trained(way, 5)
        own |= {p.untyped_storage().data_ptr() for p in model.parameters()}
        with watch, pytest.raises(AssertionError, match="made a tensor") if way == "plain" else nullcontext():
            trained(way, 3, model=model, opt=opt, start=5)  # steps 6 and 8 are due for two blocks, 7 for one
    assert watch.seen > 1000


def test_where_the_input_is_projected_it_is_not_kept():
    """Of x the backward pass finds x P alone, r values per token, but in a step in which P is due."""
    layer, x = nn.Linear(24, 40, bias=False), torch.randn(7, 24, requires_grad=True)
    opt = GaLoreAdamW([dict(params=[layer.weight], rank=4)])
    thin(layer, opt)
    kept = []

    def keep(t):
        kept.append(t.data_ptr())
        return t

    for due in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = layer(x)
        assert (x.data_ptr() in kept) == due == (layer.weight in opt.turning)
        y.sum().backward()
        opt.step()


@pytest.mark.parametrize("way", ["plain", "thin", "muon"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])  # the last is finite, but its square is not
def test_a_bad_gradient_changes_nothing_and_is_counted(way, max_norm, bad):
    """With NaN or infinity in one gradient, that weight, its moments and basis stay; all weights', if a norm
    is known first. The step is counted, and training goes on."""
    options = dict(weight_decay=0.1, max_norm=max_norm, direction="muon" if way == "muon" else "adam")
    model, opt = trained("plain" if way == "plain" else "thin", 6, **options)
    target = model.layers[1].down.weight
    kept, states = copy.deepcopy(model.state_dict()), {p: copy.deepcopy(opt.state[p]) for p in opt.group}
    spoil = opt.leaf(target).register_hook(lambda g: g.index_fill(1, torch.tensor([3]), bad))
    trained(way, 1, model=model, opt=opt, start=6)  # step 7: a block is due as well
    spoil.remove()
    stayed = {name for name, x in model.state_dict().items() if torch.equal(kept[name], x)}
    assert stayed == (set(kept) if max_norm else {"layers.1.down.weight"})
    for p in opt.group if max_norm else [target]:
        assert states[p].keys() == opt.state[p].keys() and states[p].pop("t") == 6  # t goes on
        assert all(torch.equal(x, opt.state[p][name]) for name, x in states[p].items())
    trained(way, 3, model=model, opt=opt, start=7)
    assert int(opt.skipped) == 1 and all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(kept["layers.1.down.weight"], target)


@pytest.mark.parametrize("way", ["thin", "plain"])
def test_norm_is_that_of_torch(way):
    """Clipped or not, `norm` is what torch's clip_grad_norm_ says of the projected gradients. Clipping to a
    share of it gives Adam that share of each R."""
    moments = {}
    for max_norm in (None, 1e9, 0.01):
        model, opt = trained(way, 0, max_norm=max_norm)
        seen, due, project = {}, set(), opt.project

        def spy(p):
            R, Y = project(p)
            seen[p] = R.clone()
            due.add(Y is not None)
            return R, Y

        opt.project = spy
        for step in range(4):
            (model(*batch(step)) * 100).backward()  # large, so that Y would count
            opt.step(), opt.zero_grad()
            holders = [nn.Parameter(torch.zeros_like(R)) for R in seen.values()]
            for holder, R in zip(holders, seen.values()):
                holder.grad = R
            assert len(seen) == len(opt.group) and min(len(R) for R in seen.values()) == 8
            assert math.isclose(opt.norm, nn.utils.clip_grad_norm_(holders, max_norm or 1e9), rel_tol=1e-5)
            M = torch.cat([opt.state[p]["M"].flatten() for p in opt.group])
            moments.setdefault(max_norm, (M, opt.norm))
        assert due == {False, True}
    (M, _), (same, _), (clipped, norm) = moments.values()
    assert torch.equal(M, same) and norm > 0.1 and torch.allclose(clipped, M * 0.01 / norm, rtol=1e-3)


def test_thin_refusals():
    """Exact, a second thin, another's model, and a weight used elsewhere or too often each give a
    sentence."""
    model, opt = trained("thin", 0)
    for word, refused in {
        "SVD": lambda: trained("thin", 0, kind=Exact),
        "made thin once": lambda: thin(model, opt),
        "thin once": lambda: thin(model, GaLoreAdamW(param_groups(model, 8))),
        "no weight of this model": lambda: thin(Net(), GaLoreAdamW(param_groups(Net(), 8))),
        "compile the blocks": lambda: trained("thin", 0, build=lambda: torch.compile(Net())),
    }.items():
        with pytest.raises(ValueError, match=word):
            refused()
    model.layers[0].up.weight.square().sum().backward()
    with pytest.raises(ValueError, match="outside its nn.Linear"):
        opt.step()


def test_a_gradient_penalty_is_refused():
    """Its second-order term would go through W's own gradient, which the thin way has not. torch says so."""
    for way in ("plain", "thin"):
        model, _ = trained(way, 0)
        x = torch.randn(5, 24, requires_grad=True)
        y = model.layers[0](x).square().sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice") if way == "thin" else nullcontext():
            (y + slope.square().sum()).backward()


@pytest.mark.parametrize("shared", [False, True])
def test_too_many_gradients_are_explained(shared):
    """A shared layer under reentrant checkpointing, and a step given up with the model's zero_grad, give a
    weight more gradients than were announced. The sentence names both."""
    model, opt = trained("thin", 0)

    def backward():
        x = model.embed(batch(0)[0])
        for _ in range(1 + shared):
            x = checkpoint(model.layers[0], x, use_reentrant=True) if shared else model.layers[0](x)
        x.sum().backward()

    with pytest.raises(RuntimeError, match="opt.zero_grad.*use_reentrant=False"):
        backward()
        model.zero_grad()
        backward()


def test_a_trainer_that_would_not_clip_is_told(monkeypatch):
    """Where transformers' Trainer is loaded, which clips what is in .grad, `thin` says what clips instead."""
    monkeypatch.setitem(sys.modules, "transformers.trainer", SimpleNamespace())
    with pytest.warns(UserWarning, match="max_norm"):
        trained("thin", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("thin", 0, max_norm=1.0)


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


def test_blocks_and_updates_compile_whole(monkeypatch):
    """torch.compile takes thin blocks and the 8-bit update with fullgraph=True, and changes nothing."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)
    build = partial(Net, partial(nn.Linear, bias=False))
    eager, _ = trained("thin", 3, build=build, state_bits=8)
    model, opt = trained("thin", 0, build=build, state_bits=8, compile=True)
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    trained("thin", 3, model=model, opt=opt)
    assert weights_apart(eager, model) < 2e-3 and not torch._dynamo.utils.counters["graph_break"]


def test_other_directions_compile(monkeypatch):
    """So does Muon's update, of weights with and without a rank, in both orientations."""
    torch._dynamo.reset()
    compiler = partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(galore, "compiled", cache(compiler))
    shapes, ends = [(16, 40), (40, 16), (9,)], []
    for compile in (False, True):
        ends.append(parameters(*shapes))
        groups = [dict(params=ends[-1][:2], rank=8), dict(params=ends[-1][2:])]
        walk([GaLoreAdamW(groups, lr=0.01, direction="muon", compile=compile)], [ends[-1]], 4)
    assert apart(*ends) < 1e-5


def test_a_training_step_has_two_graphs():
    """Compiled and checkpointed LLaMA blocks: two graphs in all, P due or not, and the losses of the eager
    model."""
    counters, losses = torch._dynamo.utils.counters, {}
    for compile in (False, True):
        torch._dynamo.reset(), counters.clear()
        model = tiny()
        opt = GaLoreAdamW(param_groups(model, 4, 7), lr=3e-3, eps=EPS, state_bits=8)
        thin(model, opt, 2, checkpointed=True)
        model.activation_checkpointing = True
        for layer in model.model.layers if compile else ():
            layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        x = some_tokens(2, 33)
        batches = iter([(x[:, :-1], x[:, 1:])] * 8)
        losses[compile] = [train.training_step(model, opt, batches, 2).item() for _ in range(4)]
    assert np.allclose(losses[False], losses[True], rtol=1e-5)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


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
    model, opt = trained("thin", 3)
    moments = [state["M"] for state in opt.state.values()]
    watched = [weakref.ref(x) for x in (model, opt, *model.parameters(), *moments)]
    del model, opt, moments
    gc.collect()
    assert not any(x() is not None for x in watched)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_counted_flops_of_a_thin_block(checkpointed):
    """2 r (m + n) operations a token for R of each matrix, X P once, nothing m x n x tokens. Checkpointing
    repeats all products but the last."""
    config, tokens, r = Config(vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=1,
                               num_attention_heads=2), 3 * 16, 8  # fmt: skip
    model = Llama(config)
    opt = GaLoreAdamW(param_groups(model, r))
    thin(model, opt, 1, checkpointed)
    block, x = model.model.layers[0], torch.randn(3, 16, 32, requires_grad=True)
    shapes = [p.shape for p in block.parameters() if p.ndim == 2]
    with FlopCounterMode(display=False) as counter:
        block(x, *model_file.rope(0, 16, config, x.device), None, checkpointed).sum().backward()
    values, products = sum(m * n for m, n in shapes), 2 * tokens * sum(m * n for m, n in shapes)
    expected = 2 * products + 2 * tokens * r * sum(m + n for m, n in shapes) + 2 * r * values
    expected += (products - 2 * tokens * 32 * 80) if checkpointed else 0
    counts = counter.flop_counts["Global"].items()
    assert sum(n for op, n in counts if "attention" not in str(op)) == expected


# ----- several processes ------------------------------------------------------------------------------------


def one_of_many(rank, n, file, way, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=n)
    torch.manual_seed(0)
    model, opt = trained("plain", 0, **WAYS[way])
    if way in ("thin", "clip"):
        thin(model, opt, accumulate=2)
    for step in range(12):
        x, y = (t.chunk(n)[rank] for t in batch(step))
        for a, b in zip(x.chunk(2), y.chunk(2)):
            (model(a, b) / 2).backward()
        opt.step()
        opt.zero_grad()
    results[rank] = [p.detach() for p in model.parameters()]
    torch.distributed.destroy_process_group()


WAYS = {"thin": {}, "clip": dict(max_norm=0.5), "plain": {}, "exact": dict(kind=Exact)}


def in_processes(function, n, *arguments):
    """What `function` leaves in a dict in n processes, by rank."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(function, (*arguments, results), n, start_method="fork")
        return dict(results)


@pytest.mark.parametrize("way, n", [("thin", 2), ("clip", 4), ("plain", 2), ("exact", 2)])
def test_many_processes_equal_one_with_the_whole_batch(tmp_path, way, n):
    """Processes, which exchange R and Y alone, end at the weights of one process with all their batches: 12
    steps of two micro-batches, every block refreshed on the way."""
    results = in_processes(one_of_many, n, n, tmp_path / "meet", way)
    one, _ = trained("plain", 12, **WAYS[way])
    assert all(apart(results[0], results[i]) == 0 for i in range(n))
    if way != "exact":  # the signs of an SVD hang on rounding, and Exact keeps the moments when they flip
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


DIFFERENT = ["experts plain", "experts thin", "tower plain", "vector thin", "order plain", "order thin",
             "fewer thin", "gap plain", "gap thin", "none thin"]  # fmt: skip


@pytest.mark.parametrize("case, way", [*map(str.split, DIFFERENT)], ids=DIFFERENT)
def test_processes_with_other_gradients_end_with_one_sentence(tmp_path, way, case):
    """Where two processes use different layers in a step, or in another order, both end with one sentence and
    no weight has moved. Order and passes matter in the thin way alone, where weights move in between."""
    results = in_processes(one_who_differs, 2, tmp_path / "meet", case, way)
    if case == "none" or (case, way) == ("order", "plain"):
        assert not results
        return
    assert len(results) == 2
    for step, sentence, moved in results.values():
        assert sentence.startswith("the processes would average different gradients")
        assert moved == 0 and step == 2


# ----- model.py ---------------------------------------------------------------------------------------------

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
VARIANTS = {
    "plain": {},
    "grouped": dict(num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True, num_key_value_heads=1),
    "theta, eps, head_dim": dict(rope_theta=500.0, rms_norm_eps=1e-3, head_dim=6),
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


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
    (value * 4).backward()    # a power of two rounds nothing
    return [value.detach(), x.grad, W.grad]


@pytest.mark.parametrize("rows, dtype", [(1, torch.float32), (7, torch.float32), (10, torch.float32),
                                         (999, torch.float32), (None, torch.float32), (64, torch.bfloat16)])
def test_chunked_loss_equals_cross_entropy(rows, dtype):
    """Loss and gradients are as near to fp64's as those of full logits, for any size of the chunks."""
    torch.manual_seed(0)
    x, W, targets = torch.randn(120, 64), torch.randn(500, 64) / 8, torch.randint(500, (120,))
    x, W = x.to(dtype), W.to(dtype)
    wide = lambda logits: logits.float() if logits.dtype == torch.bfloat16 else logits
    full = lambda x, W, targets: F.cross_entropy(wide(F.linear(x, W)), targets)
    truth = loss_and_gradients(full, x.double(), W.double(), targets)
    theirs = loss_and_gradients(full, x, W, targets)
    ours = loss_and_gradients(partial(cross_entropy, rows=rows), x, W, targets)
    assert [y.dtype for y in ours] == [torch.float32, dtype, dtype]
    for found, known, true in zip(ours, theirs, truth):
        assert (found - true).norm() < 1.5 * (known - true).norm() + 1e-6 * true.norm()
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(x, W, targets, rows), ours[0])
    loss = cross_entropy(x.requires_grad_(), W, targets, rows)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):    # the gradient was scaled in place
        loss.backward()


@pytest.mark.parametrize("trained", ["hidden and head", "hidden", "none"])
def test_memory_of_the_loss(trained):
    """At 7B in bf16 it peaks at inputs, the gradients asked for and one chunk's logits, in fp32 and bf16."""
    with FakeTensorMode():
        x, W = torch.empty(4096, 4096, dtype=torch.bfloat16), torch.empty(32000, 4096, dtype=torch.bfloat16)
        x.requires_grad_("hidden" in trained), W.requires_grad_("head" in trained)
        tracker = MemTracker()
        tracker.track_external(x, W)
        with tracker, torch.set_grad_enabled(x.requires_grad):
            loss = cross_entropy(x, W, torch.zeros(4096, dtype=torch.int64))
            if x.requires_grad:
                loss.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    asked = x.nbytes * (1 + x.requires_grad) + W.nbytes * (1 + W.requires_grad)
    assert asked < peak["Total"] < asked + 1024 * 32000 * (4 + 2) + 1e6


@variants
def test_checkpoints_go_both_ways(variant, tmp_path, monkeypatch):
    """transformers reads our folders and we read its own. Logits, gradients and greedy tokens are equal."""
    monkeypatch.setattr(model_file, "CHUNK_LOGITS", 64 * TINY["vocab_size"])    # 160 targets: three chunks
    hf, model, tokens = oracle("transformers", "transformers"), tiny(**variant), some_tokens(10)
    model.save_pretrained(tmp_path / "ours")
    theirs = hf.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-4)
    theirs(tokens, labels=tokens).loss.backward()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5)
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(tokens, 20, temperature=0), theirs.generate(tokens, **options))

    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY | variant, initializer_range=0.2))
    theirs.save_pretrained(tmp_path / "theirs")
    back = Llama.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(back(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    narrow = Llama.from_pretrained(tmp_path / "theirs", torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_and_bin_checkpoints(suffix, tmp_path, monkeypatch):
    """Several files of either kind read as one, but for rotary buffers. Without safetensors it is a .bin."""
    save, one, many = torch.save, tmp_path / "one", tmp_path / "many"
    if suffix == ".bin":
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)    # import fails from here on
    else:
        save = oracle("safetensors.torch", "safetensors").save_file
    model = tiny(num_key_value_heads=2, tie_word_embeddings=True)
    model.save_pretrained(one)
    whole = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    assert {file.name for file in one.iterdir()} == {"config.json", whole}
    many.mkdir()
    (many / "config.json").write_bytes((one / "config.json").read_bytes())
    weights, places = {name: p.detach() for name, p in model.named_parameters()}, {}
    for part, names in enumerate((sorted(weights)[:9], sorted(weights)[9:])):
        buffer = {f"model.layers.{part}.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        save({name: weights[name] for name in names} | buffer, many / f"part-{part}{suffix}")
        places |= dict.fromkeys(names, f"part-{part}{suffix}")
    (many / f"{whole}.index.json").write_text(json.dumps({"weight_map": places}))
    for read in map(Llama.from_pretrained, (one, many)):
        assert all(map(torch.equal, model.state_dict().values(), read.state_dict().values()))
        assert read.lm_head.weight is read.model.embed_tokens.weight
    monkeypatch.undo()
    theirs = oracle("transformers", "transformers").LlamaForCausalLM.from_pretrained(one)
    torch.testing.assert_close(theirs(some_tokens()).logits, model(some_tokens()), rtol=0, atol=1e-4)


def change_config(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_config_of_both_transformers_generations(tmp_path):
    """rope_theta is read from either's place. A mistral without its window equals transformers' Mistral."""
    hf, tokens = oracle("transformers", "transformers"), some_tokens()
    tiny(rope_theta=500.0).save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path).config.rope_theta == 500.0
    change_config(tmp_path, rope_parameters=dict(rope_theta=77.0, rope_type="default"))
    assert Llama.from_pretrained(tmp_path).config.rope_theta == 77.0
    options = dict(num_key_value_heads=2, sliding_window=None, initializer_range=0.2)
    theirs = hf.MistralForCausalLM(hf.MistralConfig(**TINY, **options))
    theirs.save_pretrained(tmp_path / "mistral")
    ours = Llama.from_pretrained(tmp_path / "mistral")
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("field, value, sentence", [
    *[(field, value, f"{field} is {value!r}") for field, value in [
        ("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("model_type", "qwen3"),
        ("model_type", None), ("quantization_config", {"bits": 4})]],
    ("rope_scaling", dict(rope_type="llama3", factor=8.0), "rope_type is 'llama3'"),
    ("rope_scaling", dict(type="linear", factor=2.0), "rope_type is 'linear'"),
    ("rope_parameters", dict(rope_type="yarn", rope_theta=1e4), "rope_type is 'yarn'"),
    ("model_type", "mistral", "sliding_window is 4096"),
    ("hidden_size", None, "config.json.*hidden_size"),
    ("hidden_size", 36, "head_dim 9, by default .* is not even"),
    ("hidden_size", 34, "head_dim 8.5, by default .* is not even"),
    ("num_key_value_heads", 3, "not a multiple"),
])
def test_configs_that_would_be_misread_are_refused(field, value, sentence, tmp_path):
    """A config.json whose model is not this one gives a sentence that names the field and its value."""
    tiny().save_pretrained(tmp_path)
    change_config(tmp_path, **{"head_dim": None, field: value})
    with pytest.raises(ValueError, match=sentence):
        Llama.from_pretrained(tmp_path)


class Evil:
    """A pickle that creates a file when it is opened as Python's own are."""
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_damaged_checkpoints_are_refused(tmp_path, monkeypatch):
    """Each gives one sentence with the folder in it. No pickle is executed, no file elsewhere is read."""
    def refused(sentence, error=ValueError):
        with pytest.raises(error, match=sentence) as caught:
            Llama.from_pretrained(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    model, folder, trace = tiny(tie_word_embeddings=True), tmp_path / "m", tmp_path / "trace"
    refused("config.json", FileNotFoundError)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model.save_pretrained(folder)
    good, path, name = model.state_dict(), folder / "pytorch_model.bin", "model.layers.1.mlp.up_proj.weight"
    for weights, sentence in [
        ({key: good[key] for key in good if key != name}, f"{name} is missing"),
        (good | {"extra": torch.ones(1)}, "extra"),
        (good | {name: torch.ones(3, 4)}, r"\(3, 4\)"),
        (good | {"lm_head.weight": torch.ones(97, 32)}, "lm_head.weight is .* should be absent"),
        (Evil(trace), "cannot be read"),
    ]:
        torch.save(weights, path)
        refused(sentence)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()    # it would have
    torch.save(good, path)    # the head a copy of the embedding
    Llama.from_pretrained(folder)
    path.write_bytes(path.read_bytes()[:3000])
    refused("cannot be read")
    path.rename(tmp_path / "outside.bin")
    refused("no weights", FileNotFoundError)
    torch.save(good, tmp_path / "outside.bin")
    places = ["../outside.bin", str(tmp_path / "outside.bin"), "..", 5, "gone.bin"]
    for text in [json.dumps(dict(weight_map=dict(a=place))) for place in places] + ["{", "[1]", "{}"]:
        (folder / "pytorch_model.bin.index.json").write_text(text)
        refused("cannot be read|index.json is not|embed_tokens.weight is missing")
    (folder / "model.safetensors").write_bytes(b"junk")
    refused("pip install safetensors")
    with pytest.raises(ValueError, match="model.safetensors"):    # it would shadow the .bin
        model.save_pretrained(folder)
    monkeypatch.undo()
    oracle("safetensors", "safetensors")
    refused("cannot be read")


@variants
def test_generate_equals_the_loop_without_a_cache(variant):
    """Greedy or sampled, its tokens are those of a loop that reads the whole text for every token."""
    model, prompt = tiny(**variant), some_tokens(3, 5)
    for temperature, top_k in [(0, None), (1.0, None), (2.5, 4), (3.0, 1), (1.0, 1000)]:
        tokens, generator = prompt, torch.Generator().manual_seed(3)
        for _ in range(16):
            with torch.no_grad():
                logits = model(tokens)[:, -1]
            logits = logits.scatter(1, logits.argsort(descending=True)[:, top_k or 1000:], float("-inf"))
            token = logits.argmax(1, keepdim=True)
            if temperature:
                token = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)
            tokens = torch.cat((tokens, token), 1)
        ours = model.generate(prompt, 16, temperature, top_k, torch.Generator().manual_seed(3))
        assert torch.equal(ours, tokens)
    assert torch.equal(model.generate(prompt, 0), prompt)
    for bad in (dict(tokens=prompt[:, :0]), dict(temperature=-1.0), dict(top_k=0)):
        with pytest.raises(ValueError, match="generate needs"):
            model.generate(**dict(tokens=prompt, max_new_tokens=1) | bad)


def test_sizes_have_the_published_parameter_counts():
    """7b's and the MobileLLMs' are as published. The others follow from the paper's Table 5."""
    millions = {"60m": 58.1, "130m": 134.1, "350m": 368.0, "1b": 1339.1, "3b": 2685.8, "7b": 6738.4,
                "mobilellm-125m": 124.6, "mobilellm-350m": 345.35}
    for name, published in millions.items():
        model = Llama(Config(vocab_size=32000, **SIZES[name]), device="meta")
        assert model.num_parameters() == pytest.approx(published * 1e6, abs=6e4), name


def test_construction():
    """Made on the meta device and then filled, a model is the one made directly. A tied weight is one."""
    torch.manual_seed(5)
    direct = Llama(Config(**TINY, tie_word_embeddings=True))
    model = Llama(direct.config, device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    model.init_weights()
    assert all(made.lm_head.weight is made.model.embed_tokens.weight for made in (direct, model))
    assert torch.equal(model(some_tokens()), direct(some_tokens()))
    with FakeTensorMode():    # a whole step, to plan its memory
        fake, tokens = Llama(direct.config, dtype=torch.bfloat16), torch.zeros(2, 64, dtype=torch.int64)
        fake(tokens, tokens).backward()
        assert {p.grad.dtype for p in fake.parameters()} == {torch.bfloat16}


def test_rope_is_exact_in_a_bf16_model():
    """At position 1,499 cos and sin are those of fp64. The two halves of a head have the same angles."""
    seen, narrow = [], tiny().to(torch.bfloat16)
    narrow.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1:3]))
    assert narrow(some_tokens(1, 1500)).dtype == torch.bfloat16
    angle = torch.outer(torch.arange(1500.0).double(), 10000.0 ** -(torch.arange(0, 8, 2).double() / 8))
    angle = angle.repeat(1, 2)
    torch.testing.assert_close(seen, [angle.cos().float(), angle.sin().float()], rtol=0, atol=2e-4)


def test_weights_start_as_they_should(monkeypatch):
    """Matrices and a fork's experts, stacked into one 3-D weight: N(0, 0.02). Biases: zero. Norms: one."""
    class Experts(model_file.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.experts = nn.Parameter(torch.empty(4, config.intermediate_size, config.hidden_size))
            self.up_proj.bias = nn.Parameter(torch.empty(config.intermediate_size))

    monkeypatch.setattr(model_file, "MLP", Experts)
    torch.manual_seed(0)
    for name, p in Llama(Config(**TINY)).named_parameters():
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert abs(p.std() - 0.02) < 2e-3 and abs(p.mean()) < 2e-3, name


def step_of(model, tokens):
    model.zero_grad()
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_activation_checkpointing_changes_memory_not_numbers():
    """Loss and gradients stay to the last bit, and less than half is saved. In eval mode nothing changes."""
    model, results, kept = tiny(num_hidden_layers=4), [], []
    for model.activation_checkpointing, training in ((False, True), (True, True), (True, False)):
        saved = {}
        keep = lambda tensor: saved.update({tensor.data_ptr(): tensor.nbytes}) or tensor
        model.train(training)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results.append(step_of(model, some_tokens(2, 33)))
        kept.append(sum(saved.values()))
    assert all(map(torch.equal, *results[:2])) and kept[1] < kept[0] / 2 and kept[2] == kept[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_compile_alone_and_without_graph_breaks(checkpointing):
    """One graph serves all blocks, and numbers stay. generate runs eagerly and compiles nothing."""
    torch._dynamo.reset()
    model, tokens, graphs = tiny(num_key_value_heads=2), some_tokens(), []
    model.activation_checkpointing = checkpointing
    expected, text = step_of(model, tokens), model.generate(tokens, 12, temperature=0)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False,
                      backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(step_of(model, tokens), expected)
    made = len(graphs)
    assert made and torch.equal(model.generate(tokens, 12, temperature=0), text)
    step_of(model, tokens)
    assert len(graphs) == made


def test_backward_passes_written_by_hand():
    """Normalise and SwiGLU have the gradients that autograd finds for torch's own functions."""
    torch.manual_seed(0)
    x, gate, up = (torch.randn(2, 5, 24, requires_grad=True) for _ in range(3))
    weight = torch.randn(24, requires_grad=True)
    for ours, theirs, inputs in (
        (model_file.Normalise.apply(x, weight, 1e-6), F.rms_norm(x, (24,), weight, 1e-6), (x, weight)),
        (model_file.SwiGLU.apply(gate, up), F.silu(gate) * up, (gate, up)),
    ):
        D = torch.randn_like(ours)
        torch.testing.assert_close(ours, theirs)
        found, expected = (torch.autograd.grad(y, inputs, D) for y in (ours, theirs))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_what_a_compiler_sees_is_the_same_formula(dtype, most, monkeypatch):
    """While compiling, norm and MLP take plain formulas: values and gradients are those of the Functions."""
    x = torch.randn(2, 5, TINY["hidden_size"]).to(dtype).requires_grad_()
    model = tiny().to(dtype).model.layers[0]

    def both(module):
        y = module(x)
        return y, *torch.autograd.grad(y, (x, *module.parameters()), torch.ones_like(y).cumsum(-1) / 8)

    eager = both(model.input_layernorm) + both(model.mlp)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, plain in zip(eager, both(model.input_layernorm) + both(model.mlp), strict=True):
        assert (ours - plain).norm() <= most * plain.norm()


def test_a_compiled_checkpoint_keeps_only_the_input():
    """Of a compiled and checkpointed block the backward pass finds x and little else (torch 2.11 kept what a
    Function returns: five times that)."""
    model, kept = tiny(), {}
    x = torch.randn(2, 16, TINY["hidden_size"], requires_grad=True)
    cos, sin = model_file.rope(0, 16, model.config, "cpu")
    torch._dynamo.reset()
    block = model.model.layers[0]
    block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() * t.is_floating_point()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, cos, sin, None, True)
    known = {t.untyped_storage().data_ptr() for t in (x, cos, sin, *block.parameters())}
    more = sum(size for address, size in kept.items() if address not in known)
    assert x.untyped_storage().data_ptr() in kept and more < 0.1 * x.untyped_storage().nbytes()


# ----- data.py ----------------------------------------------------------------------------------------------

BYTES = data.get_tokenizer("bytes")
C4 = "c4-train.{:05d}-of-01024.json.gz"
GOOD = b'{"text": "hello"}\n'


@pytest.fixture
def alone(monkeypatch):
    """No process beside the test: every shard is prepared when it is needed."""
    monkeypatch.setattr(shards.Shard, "prefetch", lambda self: None)


@pytest.fixture
def waits(monkeypatch):
    """The seconds of all waits, none of which is waited."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def texts(n, seed=0):
    """n documents: one empty, one with a special token as text, others of letters of one to four bytes."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefg \nåß中😀", k=rng.randrange(1, 90))) for _ in range(n - 2)]
    return ["", "a <|endoftext|> b", *words]


def json_lines(documents):
    return "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents).encode()


def json_gz(documents):
    return gzip.compress(json_lines(documents), mtime=0)


def c4_like(folder, shards=3, documents=30):
    """Training files and a validation file in C4's form; returns the training documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        (folder / C4.format(i)).write_bytes(json_gz(texts(documents, seed=i)))
    (folder / "c4-validation.00000-of-00008.json.gz").write_bytes(json_gz(texts(documents, seed=shards)))
    return [text for i in range(shards) for text in texts(documents, seed=i)]


def opened(path, split="train", seq_len=16, tokenizer=BYTES, **options):
    return data.open_data(str(path), tokenizer, split, seq_len, **options)


def expected(documents):
    return [id for text in documents for id in [*text.encode(), BYTES.eot]]


def flat(x):
    return x.reshape(-1).tolist()


def targets(stream, n, sequences=2):
    return [id for _ in range(n) for id in flat(stream.batch(sequences)[1])]


def token_file(path, tokenizer=BYTES, folder=None):
    (shard,), _ = shards.find_shards(str(path), tokenizer, folder, "{}")
    return np.fromfile(shard.prepare(), tokenizer.dtype)


def make_tokenizer(name):
    if name == "wide":    # whose ids need 32 bits
        pieces = [b""] * 70000 + [chr(i).encode(errors="replace") for i in range(1 << 17)] + [b""]
        return data.Tokenizer(name, pieces, len(pieces) - 1, lambda text: np.array([*map(ord, text)]) + 70000)
    if name == "gpt2" and "NANO_GALORE_DATA" not in os.environ:
        pytest.skip("NANO_GALORE_DATA (a folder with c4/ and tiktoken_cache/) is not set")
    return data.get_tokenizer(name)


@pytest.mark.parametrize("name", ["bytes", "wide", "gpt2"])
def test_round_trip(name, tmp_path, monkeypatch):
    """Documents come back from their ids letter by letter, and their bytes are counted. Token files of two
    tokenizers lie side by side. GPT-2's ids are those of tiktoken's own encode."""
    folder, file = Path(os.environ.get("NANO_GALORE_DATA", "")), tmp_path / "mine.jsonl"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken_cache"))
    tokenizer, documents = make_tokenizer(name), texts(300)
    if name == "gpt2":
        with gzip.open(*(folder / "c4").glob("c4-validation*.json.gz")) as lines:
            documents += [json.loads(line)["text"] for line in islice(lines, 200)]
        encode = data.tiktoken.get_encoding("gpt2").encode
        assert tokenizer.eot == 50256 and tokenizer.n_vocab == 50257 and tokenizer.dtype == np.uint16
        for text in documents[-20:] + ["<|endoftext|>"]:
            assert tokenizer.encode(text).tolist() == encode(text, disallowed_special=())
    file.write_bytes(json_lines(documents))
    assert token_file(file).tolist() == expected(documents)
    ids = token_file(file, tokenizer)
    ends = np.flatnonzero(ids == tokenizer.eot)
    assert ends[-1] == len(ids) - 1 and tokenizer.decode([tokenizer.n_vocab, 10 ** 6]) == ""
    assert [tokenizer.decode(part[:-1]) for part in np.split(ids, ends[:-1] + 1)] == documents
    assert tokenizer.n_bytes[ids].sum() == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("threads", [1, 7])
def test_the_form_of_a_file_does_not_change_its_tokens(threads, tmp_path, monkeypatch):
    """Gzip, capitals, byte order mark, blank lines, threads: all the same. Half a surrogate becomes "?"."""
    def encode(text):    # longer texts are not always done later
        time.sleep(hash(text) % 3 / 1e4)
        return BYTES.encode(text)

    monkeypatch.setattr(data, "THREADS", threads)
    lines, mark = json_lines(texts(300)), b"\xef\xbb\xbf"
    text = "\r\nå\ufeffb\n" * 20000    # longer than what is read at a time
    for name, content in {
        "plain.jsonl": lines,
        "capitals.JSONL": lines,
        "gzip.Json.GZ": gzip.compress(lines),
        "windows.json": mark + lines.replace(b"\n", b"\r\n"),
        "blank.jsonl": b"\n" + lines.replace(b"\n", b"\n \t\n\r\n") + b"  ",
        "plain.txt": text.encode(),
        "gzip.Txt.gz": gzip.compress(text.encode()),
        "mark.TXT": mark + text.encode(),
        "surrogate.json": b'{"text": "x\\ud83dy\\ud83d\\ude00"}',
    }.items():
        (tmp_path / name).write_bytes(content)
        want = ["x?y😀"] if name == "surrogate.json" else [text] if "txt" in name.lower() else texts(300)
        ids = token_file(tmp_path / name, data.Tokenizer("bytes", BYTES.pieces, 256, encode))
        assert ids.tolist() == expected(want), name


@pytest.mark.parametrize("sequences", [1, 3, 50])
def test_every_token_once_over_shard_boundaries(tmp_path, alone, sequences, capsys):
    """A pass has every token once as a target, in order. Its end is told, with its length. It starts over.
    keep_shards leaves two token files, and deletes no text of yours."""
    ids, seen = expected(c4_like(tmp_path)), []
    stream = opened(tmp_path, keep_shards=2)
    while len(seen) < 2.5 * len(ids):
        x, y = stream.batch(sequences)
        assert x.shape == y.shape == (sequences, 16) and x.dtype == y.dtype == torch.int64
        assert flat(x) == [seen[-1] if seen else ids[0], *flat(y)[:-1]]
        seen += flat(y)
        assert len([*tmp_path.glob("c4-train*.tokens")]) <= 2 and len([*tmp_path.glob("*.gz")]) == 4
    assert seen == (ids * 4)[1:len(seen) + 1] and stream.epoch == 2
    assert f"{len(ids):,} tokens" in capsys.readouterr().err
    assert stream.bytes_per_token == sum(id != 256 for id in seen) / len(seen)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_validation_ends_and_is_always_the_same(tmp_path, alone, world):
    """Stripes, put together, are every full sequence once. It ends for all processes. Reset starts anew."""
    c4_like(tmp_path)
    ids, streams = expected(texts(30, seed=3)), [opened(tmp_path, "val") for _ in range(world)]
    for _ in range(2):
        seen = []
        with pytest.raises(data.EndOfData):
            while True:
                for rank, stream in enumerate(streams):
                    x, y = stream.batch(3, rank, world)
                    assert flat(x)[1:] == flat(y)[:-1]
                    seen += flat(y)
        assert seen == ids[1:(len(ids) - 1) // 16 * 16 + 1]
        assert len({stream.bytes_per_token for stream in streams}) == 1    # of all processes' targets
        for stream in streams:
            with pytest.raises(data.EndOfData):
                stream.batch(3, 0, world)
            stream.reset()


@pytest.mark.parametrize("when", range(0, 90, 9))
def test_resume_equals_unbroken(tmp_path, alone, when):
    """From a saved state the tokens go on, for any number of processes. Only the state's shard is made."""
    c4_like(tmp_path, shards=4, documents=12)
    stream = opened(tmp_path, seq_len=8)
    targets(stream, when, sequences=4)
    state = json.loads(json.dumps(stream.state_dict()))
    want = targets(stream, 60, sequences=4)
    for file in tmp_path.glob("*.tokens"):
        file.unlink()
    resumed = [opened(tmp_path, seq_len=8, state=state) for _ in range(2)]
    assert [file.name.partition(".bytes")[0] for file in tmp_path.glob("*.tokens")] == [state["shard"]]
    got = [id for _ in range(60) for rank in (0, 1) for id in flat(resumed[rank].batch(2, rank, 2)[1])]
    assert got == want and resumed[0].state_dict() == stream.state_dict()


@pytest.mark.parametrize("change, sentence", [
    (dict(tokenizer="gpt2"), "gpt2"), (dict(shard="gone"), "gone"), (dict(shard_tokens=5), "had 5")])
def test_resume_from_other_data_is_refused(tmp_path, alone, change, sentence):
    c4_like(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        opened(tmp_path, state=opened(tmp_path).state_dict() | change)


def test_held_out_share(tmp_path, alone, capsys):
    """Without a validation file it is the last 1% of each shard. All text files of a folder are one shard."""
    shards = [texts(200, 0), ["\n".join(texts(100, 1)), "\n".join(texts(100, 2))]]
    (tmp_path / "0.jsonl").write_bytes(json_lines(shards[0]))
    for i in (0, 1):
        (tmp_path / f"{i}.txt").write_bytes(shards[1][i].encode())
    parts = {"train": [], "val": []}
    for ids in map(expected, shards):
        cut = len(ids) - len(ids) // 100
        parts["train"] += ids[:cut]
        parts["val"] += ids[cut:]
    for split, want in parts.items():
        stream = opened(tmp_path, split, seq_len=1)
        assert targets(stream, 1, len(want) - 1) == want[1:] and stream.epoch == 0
    assert "validation on the last 1% of each shard" in capsys.readouterr().err


def test_python_source(tmp_path):
    """The standard library's splits share no file. One in 20 is validation. Windows of it are shuffled."""
    train, val = shards.python_files("train"), shards.python_files("val")
    assert not set(train) & set(val) and 0.02 < len(val) / len(train) < 0.1 and train != sorted(train)
    stream = opened("python", "val", 64, data_dir=str(tmp_path))
    source = np.frombuffer(b"".join(file.read_bytes() + b"\xff" for file in val), np.uint8)
    windows = len(source) // 1024
    found = np.minimum(stream.tokens[:windows * 1024], 255).astype(np.uint8).reshape(windows, 1024)
    source = source[:windows * 1024].reshape(windows, 1024)
    assert sorted(map(bytes, found)) == sorted(map(bytes, source)) and (found[0] != source[0]).any()
    stream.batch(4)
    assert stream.bytes_per_token > 0.99


# what lies in a folder: training text, validation, and what is not read
FOLDERS = [(
    "TRAIN.JSONL|c4-train.00000-of-01024.json.gz|my-training-data.txt|train (1).jsonl|trainset.json",
    "Eval.TXT.GZ|dev.json|my_validation.txt|train_val.jsonl|valid-00000.jsonl|x.val.2.txt",
    "other.txt|test.txt",
), (
    "License to Kill.txt|The Acid Test.txt|The Girl on the Train.txt|Trainspotting.txt|Val d'Isere.txt|b.TXT|"
    "constraints.txt|contrast.txt|interval.jsonl|latest.jsonl|valley.txt|zürich.json|中.txt.gz",
    "valset (2).jsonl",
    "._train.txt|.hidden.jsonl|.val.txt|COPYING.txt|LICENSE.txt|README_en.TXT|a.jsonl.zst|c.json.gz.part|"
    "dangling.txt|data.licence.txt|folder.jsonl/|loop.txt|noformat|readme.txt|testset.jsonl|u.csv|v.csv|"
    "w.csv|wiki.train.tokens|x.csv|y.csv|z.csv",
)]


@pytest.mark.parametrize("folder", FOLDERS, ids=["split", "no split"])
def test_what_is_read_of_a_folder(tmp_path, folder, capsys):
    """A file's split is a word that stands alone in its name. One line names what is read and what is not."""
    for name in "|".join([*folder, "b.TXT.bytes.0123456789ab.tokens"]).split("|"):
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        elif name in ("dangling.txt", "loop.txt"):
            (tmp_path / name).symlink_to("loop.txt")
        else:
            (tmp_path / name).write_text("x")
    for found, want in zip(shards.find_shards(str(tmp_path), BYTES, None, "{}", say=True), folder):
        assert "|".join(sorted(file.name for shard in found for file in shard.files)) == want
    said = []
    for names, most in zip((names.split("|") for names in folder), (6, 6, 20)):
        more = [f"and {len(names) - most} more"] * (len(names) > most)
        said.append(", ".join(names[:most] + more))
    line = f"{tmp_path}: training on {said[0]}; validation on {said[1]}; not read: {said[2]}\n"
    assert capsys.readouterr().err == line
    for file in tmp_path.glob("[!dl]*.txt"):    # given by its own name each is read
        assert shards.find_shards(str(file), BYTES, None, "{}")[0][0].files == [file]


def test_stale_token_file_is_remade(tmp_path, alone):
    """A source that changed, even to the same size, gets new tokens, and the old file goes. Others stay."""
    source, files = tmp_path / "a.txt", []
    for i, text in enumerate(("old ", "new ", "new ")):
        if i < 2:
            source.write_text(text * 20)
            os.utime(source, ns=(1, 10 ** 9 * i))
        assert BYTES.decode(opened(source, seq_len=4).batch(1)[0][0]) == text
        files += tmp_path.glob("*.tokens")
    assert len(files) == 3 and files[0] != files[1] == files[2] and len([*tmp_path.iterdir()]) == 2


SLOW = """
import itertools, os, sys, time, data
good = data.get_tokenizer("bytes")
def encode(text):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(0.01)
    return good.encode(text)
data.islice = lambda pieces, n: itertools.islice(pieces, 10)  # writes early
data.open_data(sys.argv[1], data.Tokenizer("bytes", good.pieces, 256, encode), "train", 4)
"""


def test_a_killed_writer_and_those_that_wait(tmp_path):
    """Of three processes one makes the token file. It is killed; another makes all of it, once, for both."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts(200)))
    read, write = os.pipe()
    command = [sys.executable, "-c", SLOW, str(tmp_path / "a.jsonl")]
    processes = [subprocess.Popen(command, cwd=Path(data.__file__).parent, stdout=write) for _ in range(3)]
    os.close(write)
    with open(read) as lines:
        first = {next(lines) for _ in range(100)}
        assert next(tmp_path.glob("*.part")).stat().st_size > 1000
        os.kill(int(*first), signal.SIGKILL)
        rest = [line for line in lines if line not in first]
    assert len(rest) == 200 and len(set(rest)) == 1
    assert sorted(process.wait() for process in processes) == [-signal.SIGKILL, 0, 0]
    (file,) = {*tmp_path.iterdir()} - {tmp_path / "a.jsonl"}
    assert np.fromfile(file, np.uint16).tolist() == expected(texts(200))


class Server:
    """Serves a folder under /NAME with Range. trouble[name] lists what to do to the next requests for it."""
    def __init__(self, folder):
        self.folder, self.trouble, self.log, self.retry_after, outer = folder, {}, [], "0", self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                name, start = self.path.strip("/"), int(self.headers.get("Range", "bytes=0-")[6:-1])
                kind = outer.trouble[name].pop(0) if outer.trouble.get(name) else None
                outer.log.append((name, kind, start))
                whole = (folder / name).read_bytes() if (folder / name).exists() else b""
                if kind in (429, 503) or start >= len(whole):
                    self.send_response(kind if kind in (429, 503) else 416 if whole else 404)
                    self.send_header("Retry-After", outer.retry_after)
                    return self.end_headers()
                start = 0 if kind == "no range" else start
                body = whole[start:]
                body = {"html": b"<!DOCTYPE html><html>log in</html>", "short": body[:-5],
                        "corrupt": body[:200] + bytes(20) + body[220:]}.get(kind, body)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) + 3 * (kind == "long")))
                self.end_headers()
                self.wfile.write(body[:len(body) // 2] if kind == "drop" else body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/{{}}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def open(self, seq_len=16, **options):
        """C4's stream, by downloads from here."""
        here = str(self.folder.parent / "here")
        return opened("c4", seq_len=seq_len, data_dir=here, data_url=self.url, **options)

    def starts(self, i):
        """The first bytes of all that was asked for of shard i."""
        return [start for name, _, start in self.log if name == C4.format(i)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    server = Server(tmp_path / "served")
    yield server
    server.server.shutdown()
    server.server.server_close()


def the_first(ids, stream):
    """Whether the next targets of `stream` are those of `ids`, to the last whole batch."""
    return targets(stream, (len(ids) - 1) // 32) == ids[1:(len(ids) - 1) // 32 * 32 + 1]


def test_misbehaving_server(tmp_path, server, alone, waits, capsys):
    """Whatever a server does, the stream is the same. Each trouble is told in a line and costs one request.
    In training ten refusals in a row end nothing, and a line says what is waited for."""
    ids = expected(c4_like(tmp_path / "served", documents=300))
    kinds = [["drop", "drop", 503, None], ["html", 429, "short", None],
             ["corrupt", "long", None, "drop", *[503] * 10, "no range"]]    # after "long" None is a 416
    server.trouble = {C4.format(i): [*kinds[i]] for i in range(3)}
    stream = server.open()
    assert "%|" in capsys.readouterr().err and the_first(ids, stream)
    for i, name in enumerate(map(C4.format, range(3))):
        assert [kind for asked, kind, _ in server.log if asked == name] == kinds[i]
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "served" / name).read_bytes()
    starts, said = server.starts(0), capsys.readouterr().err
    assert starts[0] == 0 < starts[1] < starts[2] == starts[3] and "%|" not in said
    assert said.count("waiting for c4-train.0000") == 2 and said.count("trying again") == len(waits) - 3
    assert len(waits) == 20 and not list((tmp_path / "here").glob("*.part"))


@pytest.mark.parametrize("background, refusals", [(False, 3), (True, 39)])
def test_a_server_that_stays_away(tmp_path, server, waits, background, refusals):
    """It ends in a sentence. In training that takes half an hour, even if it says "Retry-After: 0".
    What has come is kept, and the next start asks for the rest."""
    c4_like(tmp_path / "served", shards=1, documents=300)
    server.trouble = {C4.format(0): ["drop"] + [503] * refusals}
    with open(tmp_path / "x.part", "ab") as file:
        with pytest.raises(ValueError, match="could not be downloaded .*503.*start again.*--data python"):
            shards.download(server.url.format(C4.format(0)), file, background)
        assert len(waits) == refusals and waits[:3] == [1, 0, 0]
        assert not background or sum(waits) > 1800
        shards.download(server.url.format(C4.format(0)), file, background)
    assert 0 == server.starts(0)[0] < server.starts(0)[-1] and not server.trouble[C4.format(0)]
    assert (tmp_path / "x.part").read_bytes() == (tmp_path / "served" / C4.format(0)).read_bytes()


@pytest.mark.parametrize("after, least, most", [
    ("7", 7, 7), ("in 100 s", 99, 101), ("9999999", 3600, 3600), ("soon", 1, 1), ("-3", 1, 1), ("²", 1, 1),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0)])
def test_retry_after(tmp_path, server, waits, after, least, most):
    """A server may say how long to wait, in seconds or as a date. An hour is the most, zero the least."""
    c4_like(tmp_path / "served", shards=1)
    server.trouble, server.retry_after = {C4.format(0): [503]}, after
    if after == "in 100 s":
        server.retry_after = email.utils.formatdate(time.time() + 100, usegmt=True)
    with open(tmp_path / "x.part", "ab") as file:
        shards.download(server.url.format(C4.format(0)), file, background=False)
    assert len(waits) == 1 and least <= waits[0] <= most


def test_keep_shards_leaves_nothing_behind(tmp_path, server, alone, monkeypatch):
    """keep_shards=3 leaves the next shard and two before it, round the end too. What earlier runs left goes.
    Files that another process is filling stay, as do other tokenizers' and yours. What went comes again."""
    find = data.find_shards
    monkeypatch.setattr(data, "find_shards", lambda *args, say: (find(*args)[0][:6], find(*args)[1]))
    c4_like(tmp_path / "served", shards=6)
    here, stream, states = tmp_path / "here", server.open(), {}
    while stream.epoch == 0:    # all are kept
        states[stream.index] = stream.state_dict()
        stream.batch(1)
    others = ["mine.txt", C4.format(0) + ".gpt2.0123456789ab.tokens", C4.format(0) + ".bytes.notes.txt"]
    parts = [C4.format(i) + ".part" for i in range(3)] + [C4.format(3) + ".bytes.0123456789ab.tokens.part"]
    for name in others + parts:
        (here / name).write_bytes(b"x")

    def there():
        names = {file.name for file in here.glob("c4-train*")}.difference(others)
        return sorted({int(name[9:14]) for name in names})

    with open(here / parts[1]) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        stream = server.open(state=states[4], keep_shards=3)
        assert there() == [1, 3, 4, 5] and (here / parts[1]).exists()
    windows, before = [], targets(server.open(state=states[4]), 1)
    while len(windows) < 4:
        if stream.batch(1) and (not windows or windows[-1] != (stream.index, there())):
            windows.append((stream.index, there()))
    assert windows == [(5, [4, 5]), (0, [0, 5]), (1, [0, 1]), (2, [1, 2])]    # the next one is not there yet
    assert all((here / name).exists() for name in others)
    assert targets(server.open(state=states[4]), 1) == before


def test_several_processes_of_a_machine_have_one_child(tmp_path, monkeypatch):
    """Of the processes that torchrun starts on a machine only local rank 0 has the next shard made ready."""
    started = []
    monkeypatch.setattr(shards.Shard, "prefetch", lambda self: started.append(os.environ.get("LOCAL_RANK")))
    c4_like(tmp_path)
    for rank in ("0", "1", None):
        monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK")
        opened(tmp_path)
    assert started == ["0", None]


def wait_for(condition, seconds=30):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.02)
    assert condition()


def raise_(error):
    raise error


@contextmanager
def alarm(seconds, error):
    """Raises `error` after so many seconds, as Ctrl-C does: from a signal handler."""
    before = signal.signal(signal.SIGALRM, lambda *_: raise_(error))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("trouble", ["lock", "network", "damage"])
def test_a_batch_that_fails_skips_nothing(trouble, tmp_path, server, alone):
    """A batch over several shards ends by Ctrl-C, in a wait for a lock or the network, or by a damaged shard.
    Later the stream goes on where it stood, and a download where it was."""
    ids, got = expected(c4_like(tmp_path / "served", documents=200 if trouble == "network" else 12)), []
    stream = server.open(100) if trouble == "network" else opened(tmp_path / "served", seq_len=100)
    bad = tmp_path / "served" / C4.format(2)

    def read_on(until):
        while len(got) < until:
            state = stream.state_dict()
            try:
                got.extend(flat(stream.batch(8)[1]))
            except BaseException:
                assert stream.state_dict() == state
                raise

    if trouble == "damage":
        bad.write_bytes(json_gz(texts(12, 2))[:-40])
        for _ in range(2):
            with pytest.raises(ValueError, match=r"00002-of-01024.json.gz cannot be read after line \d"):
                read_on(len(ids))
        bad.write_bytes(json_gz(texts(12, 2)))
    else:
        path = stream.shards[2].prepare() if trouble == "lock" else tmp_path / "here" / C4.format(2)
        path.unlink(missing_ok=True)
        server.trouble = {C4.format(2): ["drop"]}
        with open(f"{path}.part", "ab") as other, pytest.raises(KeyboardInterrupt):
            if trouble == "lock":
                fcntl.flock(other, fcntl.LOCK_EX)
            with alarm(0.5, KeyboardInterrupt):
                read_on(len(ids))
        server.log = []
    read_on(len(ids) - 801)
    assert got == ids[1:len(got) + 1] and stream.index == 2 and not list(tmp_path.rglob("*.part"))
    assert trouble != "network" or len(server.starts(2)) == 1 and server.starts(2)[0] > 1000


def test_interrupted_just_after_a_file_was_whole(tmp_path, monkeypatch):
    """Ctrl-C at the very moment of the rename stays Ctrl-C, and the file stays."""
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda *args: (rename(*args), raise_(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        shards.make(tmp_path / "x", lambda file: file.write(b"whole"))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x", b"whole")]


CHILD = """
import data, multiprocessing, sys, time
if __name__ == "__main__":
    data.open_data("c4", data.get_tokenizer("bytes"), "train", 16, data_dir=sys.argv[1], data_url=sys.argv[2])
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(100)
"""


def test_the_child_ends_with_a_killed_parent(tmp_path, server, alone):
    """The process beside training runs only on idle cores. Killed training takes it along, in whatever wait.
    The next start goes on from there."""
    ids = expected(c4_like(tmp_path / "served", shards=2, documents=200))
    server.trouble, server.retry_after = {C4.format(1): ["drop"] + [503] * 99}, "1000"
    (tmp_path / "script.py").write_text(CHILD)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "here"), server.url]
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    child = int(process.stdout.readline())
    wait_for(lambda: len(server.starts(1)) == 2)
    assert os.sched_getscheduler(child) == getattr(os, "SCHED_IDLE", 0)
    with open(tmp_path / "here" / (C4.format(1) + ".part"), "ab") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # the child is at it
        process.kill()
        process.wait()
        process.stdout.close()
        with alarm(10, AssertionError("the lock is still held")):
            fcntl.flock(file, fcntl.LOCK_EX)
    server.trouble, server.log = {}, []
    assert the_first(ids, server.open())
    assert len(server.starts(1)) == 1 and server.starts(1)[0] > 1000


def test_processes_beside_training(tmp_path, server, monkeypatch, capfd):
    """With real ones, a bad server and keep_shards=2 the tokens are those of the undisturbed stream. The next
    shard comes ahead, or is waited for. What is wrong with it is told at once and stops nothing."""
    find, here = data.find_shards, tmp_path / "here"
    monkeypatch.setattr(data, "find_shards", lambda *args, say: (find(*args)[0][:3], find(*args)[1]))
    ids, names, said = expected(c4_like(tmp_path / "served")), [C4.format(i) for i in range(3)], []
    server.trouble = {names[1]: [503, 429], names[2]: ["drop", "corrupt"]}
    here.mkdir()
    (here / names[1]).write_bytes(json_gz(texts(30))[:-40])
    stream = server.open(keep_shards=2)
    wait_for(lambda: said.append(capfd.readouterr().err) or "later\n" in "".join(said))
    assert re.search(f"made ready ahead .*{names[1]} cannot be read after line .* later", "".join(said))
    (here / names[1]).unlink()
    got = targets(stream, 1)
    while len(got) < len(ids) - 33:
        before = stream.index
        got += targets(stream, 1)
        if before < stream.index == 1:
            wait_for(lambda: list(here.glob(names[2] + "*.tokens")))
        there = {file.name[:len(names[0])] for file in here.glob("c4-train*")}
        assert there <= {names[stream.index], names[(stream.index + 1) % 3]}
    assert got == ids[1:len(got) + 1]


EMPTY = b'{"text": ""}\n'
LONG = json_gz([random.Random(0).randbytes(50000).hex()] * 3)
BAD = {
    "missing": (None, "does not exist"),
    "empty_file.jsonl": (b"", "empty_file.jsonl is empty"),
    "empty_folder": ({}, "holds no training text .*; found: nothing$"),
    "other": ({".train.jsonl": GOOD, "a.csv": b"a"}, "no training text .*; found: .train.jsonl, a.csv$"),
    "only_val": ({"test.jsonl": GOOD, "val.jsonl": GOOD}, "no training text .*; found: test.jsonl, val"),
    "no_gzip.json.gz": (GOOD, "no_gzip.json.gz cannot be read after line 0: Not a gzipped file"),
    "cut.json.gz": (LONG[:-200], r"cut.json.gz cannot be read after line \d: Compressed file ended"),
    "bad_crc.json.gz": (gzip.compress(GOOD)[:-6] + b"123456", "crc.json.gz cannot be read after line 1: CRC"),
    "no_json.jsonl": (GOOD * 2 + b"{oops\n" + GOOD, "no_json.jsonl, line 3: not json"),
    "no_text.jsonl": (GOOD + b'{"txt": "hello"}\n', 'no_text.jsonl, line 2: not json with a string "text"'),
    "number.jsonl": (GOOD + b'{"text": 5}\n', 'number.jsonl, line 2: not json with a string "text"'),
    "array.json": (b'[{"text": "hello"}]', r'array.json, line 1: .* \(jq -c "\.\[\]" makes'),
    "array_2.json": (b'[\n{"text": "hello"}\n]', r'array_2.json, line 1: .* \(jq -c "\.\[\]" makes'),
    "latin.txt": (b"abc\n" * 99999 + "å".encode("latin1") + b"\n", "latin.txt, byte 399996: not UTF-8"),
    "short.txt": (b"0123456789", "11 tokens, too few for one sequence of 64"),
    "second_is_bad": ({"a.jsonl": GOOD * 2, "b.jsonl": b"{"}, "b.jsonl, line 1: not json"),
    "no_target.jsonl": (EMPTY * 300 + GOOD * 99, "the train data of .* begins with empty documents"),
    "val: empty": ({"a.jsonl": GOOD * 99, "val.jsonl": b"\n" * 9}, "val.jsonl is empty"),
    "val: short": ({"a.jsonl": GOOD * 99, "val.jsonl": GOOD * 2}, "the val data .* has 12 tokens, too few"),
    "val: no target": ({"a.jsonl": GOOD * 99, "val.jsonl": EMPTY * 65 + GOOD * 9}, "val data .* empty doc"),
    "val: none held out": ({"a.jsonl": GOOD * 2000 + EMPTY * 200}, "the val data .* empty documents"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, alone, name):
    """A sentence says what is wrong, with the name and the line or byte. No file is changed or left over."""
    content, sentence = BAD[name]
    if isinstance(content, dict):
        (tmp_path / name).mkdir()
        for file, inner in content.items():
            (tmp_path / name / file).write_bytes(inner)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=sentence) as error:
        opened(tmp_path / name, "val" if "val:" in name else "train", 64)
    assert "\n" not in str(error.value)
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    whole = [file for file in after if file.suffix == ".tokens"]    # of text that could be read
    assert {file: after[file] for file in after.keys() - whole} == before


def test_a_source_that_cannot_be_read(tmp_path, alone, monkeypatch):
    """It is named: without permission at the start, gone or failing in its turn. --data_dir does not help."""
    @contextmanager
    def refused(sentence):
        with pytest.raises((ValueError, OSError), match=re.escape(str(sentence))) as error:
            with monkeypatch.context() as patch:
                yield patch
        assert "--data_dir" not in str(error.value) and not list(tmp_path.rglob("*.part"))

    def denied(file, *mode):
        raise PermissionError(13, "Permission denied", str(file))

    c4_like(tmp_path)
    last, mine = tmp_path / C4.format(2), [*tmp_path.iterdir()]
    with refused(f"{tmp_path} cannot be read: Permission denied") as patch:
        patch.setattr(Path, "iterdir", denied)
        opened(tmp_path)
    with refused(f"{last} cannot be read: Permission denied") as patch:
        patch.setitem(vars(shards), "open", lambda *file: (denied if file[0] == last else open)(*file))
        opened(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(mine)
    stream = opened(tmp_path)
    with refused(f"{C4.format(1)} cannot be read after line 0: [Errno 5]") as patch:
        patch.setattr(gzip, "open", lambda *_: raise_(OSError(5, "Input/output error")))
        targets(stream, 10000)
    last.unlink()
    with refused(last):
        targets(stream, 10000)


def test_disk_full_and_folder_not_writable(tmp_path, alone, monkeypatch):
    """No room on disk, or a data folder that cannot be made, gives one sentence and leaves what was there."""
    (tmp_path / "a.txt").write_text("hello " * 50)
    with pytest.raises(ValueError, match="could not be made.*--data_dir"):
        opened(tmp_path / "a.txt", data_dir=str(tmp_path / "a.txt" / "sub"))
    monkeypatch.setattr(os, "fsync", lambda _: raise_(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="could not be made.*No space left on device.*--data_dir"):
        opened(tmp_path / "a.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_wrong_names(monkeypatch, tmp_path):
    """An unknown tokenizer lists what there is. One that cannot be downloaded says how to bring it."""
    with pytest.raises(ValueError, match="no tokenizer 'gpt9'; there are: bytes, gpt2"):
        data.get_tokenizer("gpt9")
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda _: raise_(ConnectionError("no network")))
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR.*'bytes', which needs no file"):
        data.get_tokenizer("gpt2")
    with pytest.raises(ValueError, match="needs a {}"):
        opened("c4", data_url="http://127.0.0.1/x")
    with pytest.raises(ValueError, match="at least 2"):
        opened("c4", keep_shards=1)


def test_command_line(tmp_path, monkeypatch, capsys):
    """`python data.py` prepares training and validation shards, and prints tokens and tokens/s."""
    c4_like(tmp_path)
    command = [data.__file__, "--tokenizer", "bytes", "--data", str(tmp_path), "--shards", "2"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0 and len(list(tmp_path.glob("*.tokens"))) == 3, done.stderr
    assert done.stdout.count("tokens\n") == 3 and "M/s per core" in done.stderr
    monkeypatch.setattr(sys, "argv", [*command, "--data", "gone"])
    with pytest.raises(SystemExit, match="2"):
        data.main()
    assert "gone does not exist" in capsys.readouterr().err


# ----- train.py ---------------------------------------------------------------------------------------------

HERE = Path(__file__).parent
SHORT = [
    "--size",
    "toy",
    "--data",
    "python",
    "--eval_tokens",
    "1024",
    "--steps",
    "24",
    "--seq_len",
    "64",
    "--save_every",
    "4",
    "--eval_every",
    "1000",
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The standard library, tokenised once for all runs."""
    return str(tmp_path_factory.mktemp("tokens"))


def start_training(folder, tokens, *options, command=None):
    """train.py in a process of its own, in `folder`, on one thread (so that its bits are reproducible)."""
    command = command or [sys.executable, str(HERE / "train.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen([*command, *SHORT, "--data_dir", tokens, *options], cwd=folder, env=env,
                            text=True,
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
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_gb")}
            for line in lines if "args" not in line]


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
    """The first command of the README, cut to 24 steps, says what it does, learns, samples, and leaves log
    and checkpoint."""
    folder, output = unbroken
    for word in ("galore-r64", "1,894,080 parameters", "step 24/24: loss", "perplexity", "bits per byte",
                 "sample:\ndef "):
        assert word in output
    log = log_of(folder)
    for line in log_of_any(folder)[1:-1]:
        assert line.keys() == {"step", "tokens", "lr", "loss", "grad_norm", "skipped", "tokens_per_s",
                               "memory_gb"}
        assert line["tokens"] == 512 * line["step"] and line["grad_norm"] > 0 == line["skipped"]
        assert 0.1 < line["memory_gb"] < 2 and 100 < line["tokens_per_s"] < 1e6
    assert [line["step"] for line in log] == [*range(1, 25), 24]
    assert log[0]["loss"] > 5 and log[-1]["val_loss"] < 3.7
    assert math.isclose(log[-1]["bits_per_byte"], log[-1]["val_loss"] / math.log(2),
                        rel_tol=0.01)  # a token is a byte


def test_one_of_two_processes_dies_and_one_goes_on(tmp_path, tokens, monkeypatch, capsys):
    """Two processes under torchrun, one of them killed: both end within seconds. One process goes on from
    their checkpoint, and ends at the weights and losses of one that was never disturbed, to the last bit; its
    validation losses are those of two processes."""
    common = [*SHORT,
              *"--galore --lr 0.01 --update_proj_gap 7 --eval_every 8 --batch_size 4 --state_bits 8".split(),
              "--grad_clipping", "1", "--data_dir", tokens]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517",
               str(HERE / "train.py")]
    out = tmp_path / "out" / "toy-galore-r64-8bit"
    with subprocess.Popen([*command, *common], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:  # fmt: skip
        wait_for_step(out / "log.jsonl", 12, process)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                                  text=True).stdout.split()
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
    "--galore --direction up": "invalid choice: 'up'",
    "--galore --exact --direction muon": "drop --direction",
    "--size 7b --galore": "on a CPU this would take about 271 years",
    "--galore --rank 0": "--rank: 0 must lie between 1 and",
    "--galore --rank x": "--rank: invalid int value: 'x'",
    "--galore --rank 192": "--rank 192 is not below 192",
    "--galore --exact --layerwise": "leave --layerwise out",
    "--total_batch_size 9 --batch_size 2": "9 is no multiple of --batch_size 2",
    "--vocab_size 100": "smaller than that of --tokenizer bytes, 257",
    "--tokenizer klingon": "no tokenizer 'klingon'",
    "--data nowhere": "does not exist",
    "--data_url x{} --data python": "no effect with --data python",
    "--data_url x{}": "no effect with --data python",  # which is the toy's default
    "--device gpu": "--device: invalid choice: 'gpu'",
    "--lr inf": "--lr: inf must lie between",
    "--lr nan": "--lr: nan must lie between",
    "--seed -1": "--seed: -1 must lie between 0 and",
    "--sample=": "--sample is empty",
    "--steps 0": "--steps: 0 must lie between 1 and",
    "--grad_clipping -1": "--grad_clipping: -1 must lie between 0 and",
    "--min_lr_ratio 2": "--min_lr_ratio: 2 must lie between 0 and 1",
    "--weight_decay -1": "--weight_decay: -1 must lie between 0 and",
    "--state_bits 4": "invalid choice",
    "--frobnicate": "unrecognized arguments",
    "--resume": "--resume needs --out_dir",
    "--resume --out_dir empty": "empty holds no checkpoint-STEP.pt",
    "--init nowhere": "does not exist: a Hugging Face checkpoint folder is needed",
    "--init x --size toy": "argument --size: not allowed with argument --init",
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
    """A new run in an old one's folder, another size on resuming, a cut checkpoint, a pickle that would run
    code: each is refused."""
    folder = tmp_path / "run"
    folder.mkdir()
    last = newest(unbroken[0]).name
    for name in ("log.jsonl", last):
        (folder / name).write_bytes((unbroken[0] / name).read_bytes())
    for options, words in (
        (["--out_dir", folder, *SHORT], "holds a run already"),
        (["--out_dir", folder, "--resume", "--size", "60m"], "size was toy and is 60m: that cannot change"),
        (["--out_dir", folder, "--resume", "--rank", "32"], "rank was 64 and is 32"),
        (["--out_dir", folder, "--resume", "--direction", "muon"], "direction was adam and is muon"),
        (["--out_dir", folder, "--resume", "--init", "x"], "init was None and is x"),
        (["--out_dir", folder / "log.jsonl" / "x", "--size", "toy"], "Not a directory"),
        (["--out_dir", folder, "--resume", "--vocab_size", "512"], "vocab_size was 320 and is 512"),
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


FEW = ("--size toy --data python --galore --rank 16 --seq_len 32 --total_batch_size 2 --eval_tokens 256 "
       "--device cpu --seed 1").split()


@pytest.mark.parametrize(
    "where, name", [("step", "SIGINT"), ("step", "SIGHUP"), ("data", "SIGTERM"), ("validation", "SIGTERM")]
)
def test_asked_to_stop_it_saves_and_says_how_to_go_on(where, name, monkeypatch, tmp_path, capsys, tokens):
    """Ctrl-C, SIGTERM and a closed terminal, in a step, while it waits for data for an hour, and during
    validation: the run saves, leaves with 0 and prints the line that goes on; what is resumed ends like a run
    that was not stopped."""
    options = [*FEW, *"--steps 6 --eval_every 3 --save_every 99 --data_dir".split(), tokens]
    assert run_here(monkeypatch, tmp_path, capsys, *options, "--out_dir", "calm")[1] == 0
    calls, function = [], {"step": "training_step", "data": "open_data", "validation": "evaluate"}[where]
    original = getattr(train, function)

    def strike(*args):
        calls.append(1)
        if len(calls) == 3:
            for _ in range(1 if where == "data" else 2):  # torchrun passes on a Ctrl-C that all have had
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
    assert f"stopped after step {stopped}; to go on from the checkpoint of step {stopped}: " in output
    assert "python train.py --resume --out_dir run" in output
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run")
    assert code == 0, output
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "calm"))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "calm")


def test_many_bad_steps_stop_the_run(monkeypatch, tmp_path, capsys, tokens):
    """A few steps whose gradients are not finite are skipped, counted and logged, and no checkpoint is
    written among them. More than 20 in a row end the run with code 1, and the newest checkpoint is from
    before them; it can be resumed."""
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
        output, code = run_here(monkeypatch, tmp_path, capsys, *FEW, "--steps", "60", "--save_every", "3",
                                "--data_dir", tokens, "--out_dir", "run")
    assert code == 2 and output.endswith("of 21 steps in a row were not finite: try a lower --lr\n")
    assert "to go on from the checkpoint of step 6: python train.py --resume" in output
    assert [file.name for file in (tmp_path / "run").glob("*.pt")] == ["checkpoint-00000006.pt"]
    steps = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert [line["skipped"] for line in steps] == [0, 0, *[1] * 6, *range(2, 23)]
    assert [line["step"] for line in steps if line["loss"] is None] == [3, *range(9, 30)]  # JSON has no NaN
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", "--steps", "12",
                            "--lr", "0.001")
    assert code == 0 and "lr was 0.005 and is 0.001" in output
    assert log_of(tmp_path / "run")[-2]["skipped"] == 1  # of before


def test_bad_data_in_the_middle_stops_with_a_checkpoint(monkeypatch, tmp_path, capsys):
    """When training comes to a shard that is corrupt, it saves and leaves with code 1 and the shard's name
    and line; mended, it goes on as if nothing had been."""
    c4_like(tmp_path / "good", shards=3, documents=10)
    c4_like(tmp_path / "bad", shards=3, documents=10)
    shard = tmp_path / "bad" / "c4-train.00001-of-01024.json.gz"
    whole = shard.read_bytes()
    shard.write_bytes(json_gz(texts(9, 1)) + gzip.compress(b'{"text": 5}\n'))
    options = [*[o for o in FEW if o not in ("--data", "python")],
               *"--tokenizer bytes --batch_size 1 --steps 16 --save_every 99".split()]
    assert run_here(monkeypatch, tmp_path, capsys, *options, "--data", "good", "--out_dir", "calm")[1] == 0
    output, code = run_here(monkeypatch, tmp_path, capsys, *options, "--data", "bad", "--out_dir", "run")
    assert code == 2 and "bad/c4-train.00001-of-01024.json.gz, line 10: not json" in output.splitlines()[-1]
    (done,) = re.findall(r"stopped after step (\d+); to go on from the checkpoint of step \1:", output)
    assert 3 < int(done) < 12
    shard.write_bytes(whole)
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run")
    assert code == 0, output
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "calm"))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "calm")


def test_what_may_change_on_resume_is_applied_and_said(monkeypatch, tmp_path, capsys, tokens):
    """Steps, learning rate, intervals and the split of the batch may change, and each is said; an argument of
    another version is said, too."""
    options = [*FEW, "--data_dir", tokens, "--out_dir", "run"]
    assert run_here(monkeypatch, tmp_path, capsys, *options, "--steps", "4", "--keep", "9", "--save_every",
                    "2")[1] == 0
    (tmp_path / "run" / "checkpoint-00000000.pt").unlink()
    newer = torch.load(tmp_path / "run" / "checkpoint-00000004.pt", weights_only=True)
    del newer["args"]["eval_tokens"], newer["seal"]
    newer["args"]["momentum_of_2031"] = 7
    torch.save(newer | dict(seal=train.seal(newer)), tmp_path / "run" / "checkpoint-00000004.pt")
    changes = ("--steps 8 --lr 0.001 --eval_every 4 --save_every 1 --batch_size 1 --grad_clipping 0.5 "
               "--update_proj_gap 3 --keep 2 --eval_tokens 128 --total_batch_size 4")
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "run", *changes.split())
    assert code == 0, output
    for line in ("steps was 4 and is 8", "lr was 0.005 and is 0.001", "batch_size was 2 and is 1",
                 "grad_clipping was 0.0 and is 0.5",
                 "keep was 9 and is 2", "momentum_of_2031 was 7 and is None", "4 micro-batch(es) of 1"):
        assert line in output
    lines = log_of_any(tmp_path / "run")
    assert sum("args" in line for line in lines) == 2 and lines[-1]["val_tokens"] == 128
    assert lines[-2]["lr"] == pytest.approx(0.0001)
    assert [line["tokens"] for line in lines if "loss" in line] == [64, 128, 192, 256, 384, 512, 640, 768]
    names = sorted(file.name for file in (tmp_path / "run").glob("*.pt"))
    assert names == ["checkpoint-00000007.pt", "checkpoint-00000008.pt"]
    assert torch.load(newest(tmp_path / "run"),
                      weights_only=True)["optimizer"]["param_groups"][0]["update_proj_gap"] == 3


def test_what_the_user_keeps_beside_a_run_is_left_alone(monkeypatch, tmp_path, capsys, tokens):
    """A copy of a checkpoint under another name is not resumed from, not deleted, not taken for the newest.
    Bytes in the log that are no text stay as they are."""
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
    """While one process trains in a folder another is refused, in one line, and changes nothing; afterwards
    it may."""
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
    """Closed stdout and stderr, and a folder that is deleted while the run is on, end nothing: the last
    checkpoint is there."""
    command = [sys.executable, str(HERE / "train.py"), *FEW, "--steps", "40", "--save_every", "10",
               "--data_dir", tokens, "--out_dir", str(tmp_path / "run")]
    process = subprocess.Popen(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command],
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for_step(tmp_path / "run" / "log.jsonl", 10, process)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # the run may write a line meanwhile
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
        assert subprocess.run(command, env=env, stdout=file, stderr=file).returncode == 0
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
    """torch.save fails as on a full disk, unless has_room(step). Returns the steps of which a save was
    tried."""
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
            full = OSError(28, "No space left")
            patch.setattr(files, "open", lambda *_, **__: (_ for _ in ()).throw(full), raising=False)
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
    """A run that cannot save its last step says so and leaves with code 1; resumed, it takes that step
    again."""
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
    """A run of one process with 8 sequences at once goes on with 4 in each of two, with 1 in each of 8."""
    for processes in (2, 1, 8):
        monkeypatch.setattr(train, "world", lambda: processes)
        args, config, _ = train.settle(["--resume", "--device", "cpu", "--out_dir", str(unbroken[0])])
        train.fit(args, config)
        assert args.batch_size == 8 // processes and train.accumulation(args) == 1


@pytest.mark.parametrize("words, expected", [
    ("--size 7b --galore", dict(lr=0.005, rank=1024, update_proj_gap=500, state_bits=8, steps=150_000,
                                tokenizer="gpt2")),
    ("--size 7b --galore --direction muon", dict(lr=0.01, rank=1024, direction="muon")),
    ("--size 1b", dict(lr=0.0005, rank=512, layerwise=True)),
    ("--size toy --galore --exact", dict(lr=0.005, layerwise=False, tokenizer="bytes", sample="def ",
                                         warmup_steps=60)),
    ("--size new --galore", dict(lr=0.01, rank=48, update_proj_gap=200, galore_scale=0.25,
                                 total_batch_size=512)),
])  # fmt: skip
def test_recipes(words, expected, monkeypatch, capsys):
    """The size's recipe fills in what is not typed, and --help shows it; a size without one has the
    paper's."""
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


@pytest.mark.parametrize(
    "options", ["", "--galore --rank 8", "--galore --rank 8 --direction muon --state_bits 8"]
)
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
    """Linear to the peak over the warm-up, cosine to min_lr_ratio at the last step, in proportion to the
    peak."""
    args = SimpleNamespace(warmup_steps=10, steps=110, min_lr_ratio=0.1)
    rates = [train.learning_rate(step, args, 1.0) for step in range(1, 111)]
    assert np.allclose(rates[:10], np.arange(1, 11) / 10)
    assert math.isclose(rates[59], 0.55) and math.isclose(rates[-1], 0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))
    assert np.allclose([train.learning_rate(step, args, 0.5) for step in range(1, 111)], np.array(rates) / 2)


def test_a_group_keeps_its_own_rate(monkeypatch, tmp_path, capsys, tokens):
    """A forker's group with an lr of its own follows the schedule from that, also after resuming."""
    own = train.param_groups
    monkeypatch.setattr(train, "param_groups", lambda *args: [group | dict(lr=0.02) for group in own(*args)])
    options = [*FEW,
               *"--steps 4 --lr 0.001 --warmup_steps 2 --min_lr_ratio 1 --out_dir run --data_dir".split(),
               tokens]
    for more in (options, ["--resume", "--out_dir", "run", "--steps", "5"]):
        assert run_here(monkeypatch, tmp_path, capsys, *more)[1] == 0
        groups = torch.load(newest(tmp_path / "run"), weights_only=True)["optimizer"]["param_groups"]
        assert {(group["lr"], group["rank"]) for group in groups} == {(0.02, 16), (0.001, None)}
    assert [line["lr"] for line in log_of(tmp_path / "run") if "loss" in line] == [0.0005, *[0.001] * 4]


PLAN = "--size {} --galore --rank {} --vocab_size 4096 --tokenizer bytes --dtype bfloat16 --state_bits 8"


@pytest.mark.parametrize("options", [
    "--batch_size 1 --total_batch_size 1 --no-activation_checkpointing",
    "--batch_size 8 --total_batch_size 64 --activation_checkpointing --grad_clipping 1 --direction muon"])
def test_few_blocks_tell_of_all(options):
    """The plan, from steps of two and three blocks, is within 1% of the step of the whole model. Its weights
    and its state are those of a real model and optimiser."""
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
    options = " --batch_size 4 --total_batch_size 4 --no-activation_checkpointing"
    args, config = settled(PLAN.format("toy", 64) + options)

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
        tracker.track_external(model,
                               *(y for p in opt.group for y in opt.init(p).values() if torch.is_tensor(y)))
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
    """Without checkpointing if anything fits so, and then the largest size; with it otherwise; else the
    smallest."""
    size, way, table = memory.choose(peaks, sizes, ways, free, 4)
    assert (size, way) == expected and table == pytest.approx(peaks(*expected))


def test_the_plan_is_printed(monkeypatch, tmp_path, capsys):
    """--plan prints five kinds and, last, their sum, and writes nothing. What does not fit is said, and a run
    that does not fit is refused with the ways out. Where nothing can be simulated --batch_size is asked
    for."""
    options = " --no-activation_checkpointing --total_batch_size 2 --batch_size 2"
    words = (PLAN.format("toy", 64) + options).split()
    output, code = run_here(monkeypatch, tmp_path, capsys, *words, "--plan")
    *kinds, chosen, peak = output.strip().splitlines()
    assert not code and [line.split()[0] for line in kinds] == [*memory.KINDS]
    assert not list(tmp_path.iterdir())
    assert "--batch_size 2, --no-activation_checkpointing; 24.14 GB are free" in chosen
    assert float(peak.split()[1]) == pytest.approx(sum(float(line.split()[1]) for line in kinds), abs=0.01)
    monkeypatch.setattr(train, "CARD", 0.01)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**7, 10**7))
    with monkeypatch.context() as patch:
        patch.setattr(train, "plan", lambda *_: {line.split()[0]: float(line.split()[1]) for line in kinds})
        assert "THIS RUN DOES NOT FIT" in run_here(monkeypatch, tmp_path, capsys, *words, "--plan")[0]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        output, code = run_here(monkeypatch, tmp_path, capsys, *words[:-2], "--device", "cuda")
        assert code == 2 and "cuda has 0.0: take a lower --rank" in output
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.mem_tracker", None)
    output, code = run_here(monkeypatch, tmp_path, capsys, *words[:-2], "--device", "cuda")
    assert code == 2 and "no step can be simulated here" in output and "give --batch_size" in output


def test_without_a_compiler_training_goes_on(monkeypatch, tmp_path, capsys, tokens):
    """Where torch.compile does not work, --compile gives one line that says why, and the run is eager."""

    def broken(*args, **options):
        raise RuntimeError("Cannot find a working triton installation.\nMore about it.")

    monkeypatch.setattr(torch, "compile", broken)
    options = [*FEW, "--steps", "2", "--compile", "--data_dir", tokens]
    output, code = run_here(monkeypatch, tmp_path, capsys, *options)
    said = [line for line in output.splitlines() if "torch.compile does not work here" in line]
    assert code == 0 and len(said) == 1 and "Cannot find a working triton installation.)" in said[0]


def test_init_continues_from_a_hugging_face_folder(monkeypatch, tmp_path, capsys, tokens):
    """--init DIR starts from the weights saved there: the first loss is theirs."""
    torch.manual_seed(3)
    start = Llama(Config(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2))
    start.save_pretrained(tmp_path / "hf")
    options = ("--init hf --data python --galore --rank 8 --steps 2 --total_batch_size 4 --seq_len 64 "
               "--eval_tokens 256 --lr 1e-9 --device cpu").split()
    output, code = run_here(monkeypatch, tmp_path, capsys, *options, "--data_dir", tokens)
    assert code == 0, output
    x, y = data.open_data("python", BYTES, "train", 64, data_dir=tokens).batch(4)
    assert math.isclose(log_of_any(tmp_path / "out" / "init-galore-r8")[1]["loss"], start(x, y).item(),
                        rel_tol=1e-4)


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
    advice = "copy config.json and the weights to another folder" if name else "257: change one of them"
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
    """The 60M model trains on real C4 shards in their own form, with GPT-2's tokenizer, in bf16 with 8-bit
    moments."""
    if "NANO_GALORE_DATA" not in os.environ:
        pytest.skip("NANO_GALORE_DATA (a folder with c4/ and tiktoken_cache/) is not set")
    folder = Path(os.environ["NANO_GALORE_DATA"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken_cache"))
    options = ("--size 60m --galore --rank 128 --steps 2 --total_batch_size 1 --batch_size 1 "
               "--eval_tokens 64 --dtype bfloat16 --state_bits 8 --device cpu --seq_len 64")
    output, code = run_here(monkeypatch, tmp_path, capsys, *options.split(), "--data", folder / "c4",
                            "--data_dir", tmp_path / "tokens")
    assert code == 0, output
    lines = log_of_any(tmp_path / "out" / "60m-galore-r128-8bit")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(10.5 < loss < 11.2 for loss in losses)


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


def test_codes_resume_bit_for_bit(tmp_path):
    """The model's state_dict holds codes and scales. Saved after 5 steps and loaded, 5 more give the bits of
    10. A model that is not in int8 does not take them."""
    for options in (dict(dtype=torch.bfloat16), dict(state_bits=8, direction="muon")):
        unbroken, _ = narrowed(10, **options)
        model, opt = narrowed(5, **options)
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "x")
        resumed, _ = narrowed(5, into=torch.load(tmp_path / "x", weights_only=True), **options)
        assert same(unbroken.state_dict(), resumed.state_dict())
        assert not same(unbroken.state_dict(), model.state_dict())
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


def test_a_run_in_int8(monkeypatch, tmp_path, capsys, tokens):
    """--weight_bits 8 trains, saves int8, resumes, and is refused in one sentence without the thin way. What
    save_pretrained writes computes the same."""
    for words in ("", "--galore --exact", "--galore --no-layerwise"):
        output, code = run_here(monkeypatch, tmp_path, capsys, "--weight_bits", 8, *words.split())
        assert code == 2 and "--weight_bits 8 needs --galore" in output and len(output.splitlines()) == 2
    few = [*FEW, "--weight_bits", 8, "--data_dir", tokens, "--out_dir", "a"]
    assert run_here(monkeypatch, tmp_path, capsys, *few, "--steps", 2, "--sample", "x")[1] == 0
    name = "model.layers.0.mlp.up_proj.weight"
    held = weights_of(tmp_path / "a")[name]
    assert held.dtype == torch.int8 and held.abs().max() == 127
    output, code = run_here(monkeypatch, tmp_path, capsys, "--resume", "--out_dir", "a", "--steps", 3)
    assert code == 0 and not torch.equal(held, weights_of(tmp_path / "a")[name])
    model = tiny()
    thin(model, GaLoreAdamW(param_groups(model, 4)), weight_bits=8)
    model.save_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits, again = (m(some_tokens()) for m in (model, Llama.from_pretrained(tmp_path / "hf")))
    assert torch.allclose(logits, again, atol=1e-6)
