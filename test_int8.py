"""Weights in 8 bits (thin.py, adam8bit.py), held against fp32."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adam8bit
from galore import GaLoreAdamW, param_groups
from model import Llama
from plumbing import sample
from plumbing.files import read_checkpoint
from test_galore import EPS, FEW, Net, batch, run, some_tokens, tiny, tokens, trained  # noqa: F401
from thin import thin


def narrowed(steps, micro=1, dtype=torch.float32, into=None, **options):
    """`trained` the thin way, with the matrices of blocks in int8."""
    torch.manual_seed(0)
    model = Net(partial(nn.Linear, bias=False)).to(dtype)
    opt = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=7), lr=3e-3, eps=EPS, **options)
    thin(model, opt, accumulate=micro, weight_bits=8)
    if into:
        model.load_state_dict(into["model"]), opt.load_state_dict(into["opt"])
    return trained("thin", steps, micro, model=model, opt=opt, start=5 * (into is not None))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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


def test_a_run_in_int8(tmp_path, tokens):
    """--weight_bits 8 trains, saves int8, resumes, and is refused in one sentence without the thin way. What
    is exported computes the same."""
    for words in ("", "--galore --exact", "--galore --no-layerwise"):
        said = run(tmp_path, "--weight_bits", 8, *words.split(), expect=2)
        assert "--weight_bits 8 needs --galore" in said and len(said.splitlines()) == 2
    few = [*FEW, "--weight_bits", 8, "--data_dir", tokens, "--out_dir", "a"]
    run(tmp_path, *few, "--steps", 2, "--sample", "x")
    name, folder = "model.layers.0.mlp.up_proj.weight", tmp_path / "a"
    held = read_checkpoint(folder)["model"][name].clone()
    assert held.dtype == torch.int8 and held.abs().max() == 127
    run(tmp_path, "--resume", "--out_dir", "a", "--steps", 3)
    made = read_checkpoint(folder)["model"]
    assert not torch.equal(held, made[name])
    run(tmp_path, "a", "--export", "hf", program=sample)
    theirs = Llama.from_pretrained(tmp_path / "hf").state_dict()
    assert torch.equal(theirs[name], made[name] * made[name + "_scale"])
    model = tiny()
    thin(model, GaLoreAdamW(param_groups(model, 4)), weight_bits=8)
    model.save_pretrained(tmp_path / "tiny")
    with torch.no_grad():
        logits, again = (m(some_tokens()) for m in (model, Llama.from_pretrained(tmp_path / "tiny")))
    assert torch.allclose(logits, again, atol=1e-6)
