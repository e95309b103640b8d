"""
Every claim that the files make, held against an oracle that was not written here, or an exact identity.

    pip install -r requirements.txt pytest && pytest -q                      # two minutes on two CPU cores
    pip install galore-torch transformers safetensors bitsandbytes           # the oracles; without them their tests skip

NANO_GALORE_DATA=DIR, a folder with c4/ (shards in C4's form) and tiktoken_cache/, adds tests on real text.
"""

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adam8bit
import galore
from galore import GaLoreAdamW, orthonormal, param_groups, refresh, rows, thin

torch.set_num_threads(2)
YES = torch.tensor(True)


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
    """Mean relative error on normal noise is what `quantise` says: 1.5% signed, and 1.7% for its square, unsigned."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for y, signed, stated in ((x, True, 0.015), (x * x, False, 0.017)):
        error = ((adam8bit.dequantise(*adam8bit.quantise(y, signed), signed) - y).abs() / y.abs()).mean().item()
        assert abs(error - stated) < 0.001
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


def test_what_stays_32_bit():
    """Tensors under 4096 values keep fp32 moments; from there on a value takes a byte and its 256th of a scale."""
    small, large = nn.Parameter(torch.ones(4095)), nn.Parameter(torch.ones(4096))
    opt = GaLoreAdamW([small, large], state_bits=8)
    small.grad, large.grad = torch.ones(4095), torch.ones(4096)
    opt.step()
    assert sum(x.nbytes for x in opt.state[small].values()) == 8 * 4095
    assert sum(x.nbytes for x in opt.state[large].values()) == 2 * (4096 + 4 * 16)


# ----- galore.py: the subspace --------------------------------------------------------------------------------------


def off_orthonormal(P):
    return (P.float().T @ P.float() - torch.eye(P.shape[1])).abs().max().item()


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
    new, M, V = refresh(P, Y, M, V, YES)
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
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        new, M2, V2 = refresh(P, P[:, order], M, V, YES)
        sign = (new.T @ P)[range(4), order].sign()[:, None]
        assert torch.allclose(new * sign.T, P[:, order], atol=1e-5)
        assert torch.allclose(M2 * sign, M[order], atol=1e-4) and torch.allclose(V2, V[order], atol=1e-4)
    new, M2, V2 = refresh(P, torch.randn(12, 4), M, V, YES)
    assert torch.allclose(new @ M2, new @ (new.T @ (P @ M)), atol=1e-5) and (V2 >= 0).all()
    kept = refresh(P, torch.full((12, 4), math.nan), M, V, YES) + refresh(P, torch.randn(12, 4), M, V, ~YES)
    assert all(torch.equal(a, b) for a, b in zip(kept, (P, M, V) * 2))


def test_power_iteration_finds_the_subspace():
    """On a gradient with a rank-r part and noise, the warm iterations of steps 1 to 4 capture what its SVD does, to 1%."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(64, 96))
    signal = torch.randn(64, 8) @ torch.randn(8, 96)
    opt = GaLoreAdamW([dict(params=[p], rank=8)])
    for _ in range(5):
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
    walk([GaLoreAdamW(ps, lr=0.01, weight_decay=0.1), torch.optim.AdamW(qs, lr=0.01, weight_decay=0.1)], [ps, qs], 20)
    assert apart(ps, qs) < 1e-6


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)])
def test_identity_basis_is_adamw(shape):
    """GaLore with P = I, r = m and alpha = 1 is torch.optim.AdamW."""
    ps, qs = parameters(shape), parameters(shape)
    opt = GaLoreAdamW([dict(params=ps, rank=1, scale=1.0, t=4)], lr=0.01, weight_decay=0.1)  # t=4: past the first refreshes
    opt.state[ps[0]] = {"P": torch.eye(16), "M": torch.zeros(16, max(shape)), "V": torch.zeros(16, max(shape))}
    twin = torch.optim.AdamW(qs, lr=0.01, weight_decay=0.1)
    qs[0].grad = torch.zeros(shape)
    twin.step()
    twin.state[qs[0]]["step"].fill_(4), qs[0].data.copy_(ps[0])
    walk([opt, twin], [ps, qs], 20)
    assert apart(ps, qs) < 1e-6


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
    a, b = (GaLoreAdamW([dict(params=x, rank=4, update_proj_gap=5)], lr=0.01) for x in (ps, qs))
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
        opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, **options)
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


@pytest.mark.parametrize("options", [{}, dict(max_norm=0.5), dict(weight_decay=0.1)], ids=str)
def test_thin_equals_plain(options):
    """Without ever forming G, 20 steps with refreshes inside end at the weights of loss.backward(); opt.step(), to 1e-5;
    so do 4 micro-batches, which a layer-wise optimiser that steps on each of them would not."""
    plain, opt = trained("plain", **options)
    for other in (trained("thin", **options), trained("thin", micro=4, **options), trained("plain", micro=4, **options)):
        assert weights_apart(plain, other[0]) < 1e-5
        assert torch.allclose(opt.norm, other[1].norm, rtol=1e-4)
    assert weights_apart(plain, Net()) > 0.01
    assert weights_apart(plain, trained("plain", **dict(options) | dict(max_norm=0.01))[0]) > 1e-5


def test_thin_equals_plain_bf16_8bit():
    """The same in bf16 with 8-bit moments: equal up to the rounding of products, which is the only difference."""
    (a, _), (b, _), (c, _) = (trained(way, dtype=torch.bfloat16, state_bits=8, seed=seed) for way, seed in (("plain", 0), ("thin", 0), ("plain", 1)))
    losses = [m(*batch(99)).item() for m in (a, b, c)]
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0] and losses[0] < 0.9 * Net()(*batch(99)).item()


def test_no_full_gradient_is_ever_made():
    """In thin steps, one of them refreshing, no operation makes a tensor of the shape of a projected matrix or its transpose."""
    from torch.utils._python_dispatch import TorchDispatchMode

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
        model, opt = trained(way, steps=4)
        watch.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for i in range(4, 8):  # step 7 is due for block 0
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
    """After steps 1 to 4, block i is due in steps i T / L (mod T) alone."""
    changes = {}

    def between(step, model, opt):
        now = [layer.up.weight for layer in model.layers]
        changes[step] = [opt.state[w]["P"].clone() for w in now] if opt.state else None

    trained("thin", steps=17, between=between)
    due = {step: [not torch.equal(a, b) for a, b in zip(changes[step], changes[step + 1])] for step in range(4, 16)}
    # the hook has moved the weights of step s (counted from 0) before `between` sees them: what differs after is step s + 2's
    assert {step + 2 for step, d in due.items() if d[0]} == {7, 14}
    assert {step + 2 for step, d in due.items() if d[1]} == {9, 16}
    assert {step + 2 for step, d in due.items() if d[2]} == {11}


@pytest.mark.parametrize("way", ["plain", "thin"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing_and_is_counted(way, max_norm, bad):
    """With NaN or infinity in one weight's gradient, that weight, its moments and basis stay (all weights', if a norm is known
    first); the step is counted; training goes on."""
    torch.manual_seed(0)
    model = Net()
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, weight_decay=0.1, max_norm=max_norm)
    if way == "thin":
        thin(model, opt)
    trained(way, 6, model=model, opt=opt)
    target = model.layers[1].down.weight
    kept, states = copy.deepcopy(model.state_dict()), copy.deepcopy({p: dict(s) for p, s in opt.state.items()})
    handle = model.layers[1].down.register_full_backward_hook(lambda *a: None)
    handle.remove()
    spoil = opt.leaf(target).register_hook(lambda g: g.index_fill(1, torch.tensor([3]), bad))
    trained(way, 1, model=model, opt=opt, start=6)  # step 7: block 0 is due as well
    spoil.remove()
    after = model.state_dict()
    stayed = {name for name in after if torch.equal(kept[name], after[name])}
    assert stayed == (set(after) if max_norm else {"layers.1.down.weight"})
    for p, s in states.items():
        if max_norm or p is target:
            assert all(torch.equal(x, y) for x, y in zip(s.values(), opt.state[target if p is target else p].values())) or opt.due(p) or p is not target
    assert int(opt.skipped) == 1
    trained(way, 3, model=model, opt=opt, start=7)
    assert int(opt.skipped) == 1 and all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(kept["layers.1.down.weight"], target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("way", ["plain", "thin"])
def test_resume_is_bit_for_bit(tmp_path, way, bits, dtype, monkeypatch):
    """Saved after 9 steps, loaded with weights_only=True into new objects, 9 more steps give the same bits as 18 unbroken."""
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)  # so that some of these small matrices are 8-bit
    unbroken, opt = trained(way, 18, dtype=dtype, state_bits=bits)
    model, opt = trained(way, 9, dtype=dtype, state_bits=bits)
    assert all(torch.is_tensor(x) for s in opt.state_dict()["state"].values() for x in s.values())
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    model, opt = trained(way, 0, dtype=dtype, state_bits=bits)
    model.load_state_dict(saved["model"]), opt.load_state_dict(saved["opt"])
    trained(way, 9, model=model, opt=opt, start=9)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), model.parameters()))


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


def test_autocast_thin_equals_plain():
    """fp32 weights under bf16 autocast: thin and plain agree to bf16's precision."""
    with torch.autocast("cpu", torch.bfloat16):
        (a, _), (b, _) = trained("plain"), trained("thin")
    assert abs(a(*batch(99)).item() - b(*batch(99)).item()) < 0.02


def test_groups_hold_every_parameter_once():
    """Attention and MLP matrices get the rank, the rest none, each parameter exactly one group."""
    from model import SIZES, Config, Llama

    model = Llama(Config(vocab_size=320, **SIZES["toy"]))
    groups = param_groups(model, 16, update_proj_gap=200)
    held = [p for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    names = {p: name for name, p in model.named_parameters()}
    ranked = {names[p] for g in groups if g.get("rank") for p in g["params"]}
    assert ranked == {name for name in names.values() if name.endswith("_proj.weight")}
    assert [g["offset"] for g in groups[:-1]] == [0, 50, 100, 150]
    with pytest.raises(ValueError, match="numbered block"):
        param_groups(nn.Sequential(), 4)


def test_thin_refusals():
    """exact, a second thin, and more backward passes than were announced each give a sentence."""
    model = Net()
    with pytest.raises(ValueError, match="SVD"):
        thin(model, GaLoreAdamW(param_groups(model, 8), exact=True))
    opt = GaLoreAdamW(param_groups(model, 8))
    thin(model, opt)
    with pytest.raises(ValueError, match="thin already"):
        thin(model, opt)
    with pytest.raises(RuntimeError, match="more than 1 times"):
        for _ in range(2):
            model(*batch(0)).backward()


def test_shared_layer_is_one_weight():
    """A linear layer used twice gets the sum of both gradients, thin as plain."""

    def run(way):
        torch.manual_seed(0)
        model = Net()
        model.layers[2].square.weight = model.layers[0].square.weight
        opt = GaLoreAdamW(param_groups(model, 8, 7), lr=3e-3)
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
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, state_bits=bits, compile=True)
    thin(model, opt)
    torch._dynamo.reset(), dynamo.counters.clear()
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False)
    compiled, _ = trained("thin", 9, model=model, opt=opt)
    assert weights_apart(eager, compiled) < (1e-5 if bits == 32 else 2e-3)
    assert not dynamo.counters["graph_break"]


def two_processes(rank, file, way, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net()
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, max_norm=0.5 if way == "clip" else None)
    if way != "plain":
        thin(model, opt, accumulate=2)
    for step in range(20):
        x, y = (t.chunk(2)[rank] for t in batch(step))
        for a, b in zip(x.chunk(2), y.chunk(2)):
            (model(a, b) / 2).backward()
        opt.step()
        opt.zero_grad()
    results[rank] = [p.detach() for p in model.parameters()]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["thin", "clip"])
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, way):
    """Two gloo processes, which exchange R and Y alone, end at the weights of one process with both their batches."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(two_processes, (tmp_path / "meet", way, results), nprocs=2)
        one, _ = trained("thin", 20, max_norm=0.5 if way == "clip" else None)
        assert apart(results[0], results[1]) == 0
        assert apart(results[0], list(one.parameters())) < 1e-5
