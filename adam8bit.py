"""
Narrow storage for wide arithmetic: Adam on moments in 8-bit codes, and bf16 weights rounded stochastically.

What is stored of a moment (or of GaLore's basis P), for every block of 256 values, is one byte a value and one fp32 number a block:
    scale = max |x| over the block                                   (the "absmax")
    code  = index of the value of `qmap` nearest to x / scale        (256 values, denser towards zero)
so x is restored as qmap[code] * scale. M and P take the signed map, sqrt(V) the unsigned one.
Arithmetic is fp32 throughout; only what is kept between two steps is narrow: 2.03 bytes a parameter in place of 8.

The map is Dettmers' dynamic data type: 0, 1, and seven decades from 1 down to 1e-7. Each decade has half as
many values as the one above: 64, 32, ..., 1 of each sign, or 128, 64, ..., 2 in the unsigned map.

A variance stored as zero, beside a momentum that is not, would make a step of M / eps, thousands of lr.
It happens where gradients within a block differ much, as in an embedding: most rows have none in most steps.
Two things prevent it. N divides by sqrt(V), so that is what codes hold: V then spans 13 decades, not 6.5.
And code 0 of sqrt(V) is read as code 1, so V is zero only where all of its block is.
experiments/eight_bit.py measures steps and errors.

References: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861 (section 2.1 blocks, 2.2 dynamic map, 2.3 what
stays in 32 bits); bitsandbytes `create_dynamic_map`, which the map equals to the last bit; torchao.optim, whose names these are.

Left out on purpose: stable embedding layers, percentile clipping, paged memory, 4 bits. Smaller blocks than the paper's
2048 make up for the first two (as bitsandbytes and torchao do today).
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # values that share a scale
SLICE = 1 << 22  # values that are updated at once: what a step takes beside the state is a few times 17 MB
SMALLEST = 4096  # tensors with fewer values stay fp32: norms are sensitive, and they cost nothing


# ----- the map, and the fast way to the nearest value in it ---------------------------------------------------------


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the dynamic data type, ascending, fp32 (2110.02861, section 2.2; bit for bit bitsandbytes')."""
    values = [0.0, 1.0]
    for i in range(7):  # decade 10^(i-7) ... 10^(i-6), in 2^i equal steps (2^(i+1) where no bit goes to the sign)
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        means = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means if signed else means[:0]).tolist()
    return torch.tensor(sorted(values))


def nearest_table(qmap: Tensor) -> tuple[Tensor, Tensor]:
    """Tables with which `quantise` finds the nearest of 256 values in two look-ups instead of eight.

    The upper 16 bits of an fp32 number (its bf16 truncation) leave an interval so short that at most one midpoint between
    neighbouring map values lies in it. So the code of the interval's lower end is right, or one too low.

    Returns:
        lowest (65536) uint8: the code of the lower end of each interval;
        middle (256) fp32: the midpoint between value i and value i + 1 (the last is infinite).
    """
    middle = torch.cat([(qmap[1:] + qmap[:-1]) / 2, torch.tensor([torch.inf])])
    bits = torch.arange(65536, dtype=torch.int32) << 16
    ends = torch.where(bits < 0, bits | 0xFFFF, bits).view(torch.float32)  # of a negative interval the far end is lower
    return torch.bucketize(ends.nan_to_num(0, 1, -1), middle[:-1]).to(torch.uint8), middle


TABLES = {torch.device("cpu"): {signed: (qmap, *nearest_table(qmap)) for signed in (True, False) for qmap in (dynamic_map(signed),)}}


def tables(device: torch.device, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    if device not in TABLES:
        TABLES[device] = {sign: tuple(t.to(device) for t in three) for sign, three in TABLES[torch.device("cpu")].items()}
    return TABLES[device][signed]


# ----- a tensor to codes and back -----------------------------------------------------------------------------------


def blocks(x: Tensor) -> Tensor:
    """Any shape as (blocks, 256); the last block is filled up with zeros."""
    if x.shape[1:] == (BLOCK,):
        return x
    x, fill = x.flatten(), -x.numel() % BLOCK
    return (F.pad(x, (0, fill)) if fill else x).view(-1, BLOCK)


def unblock(b: Tensor, shape: torch.Size) -> Tensor:
    return b if b.shape == shape else b.view(-1)[: shape.numel()].view(shape)


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Nearest codes of `x` (any shape, fp32), a block of 256 at a time.

    Normal noise comes back with a mean relative error of 1.5% (M), its size with 0.8% (sqrt(V), unsigned).

    Returns:
        codes, uint8, the shape of x; scale, fp32, (ceil(numel / 256)).
    """
    _, lowest, middle = tables(x.device, signed)
    b = blocks(x)
    scale = b.abs().amax(1)
    b = b / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]  # a block of zeros stays zeros
    codes = lowest[(b.view(torch.int32) >> 16) & 0xFFFF].int()
    return unblock((codes + (b > middle[codes])).to(torch.uint8), x.shape), scale


def dequantise(codes: Tensor, scale: Tensor | None, signed: bool) -> Tensor:
    """qmap[codes] * scale: fp32, the shape of `codes`. A moment that has no scale is fp32 as it is."""
    if scale is None:
        return codes
    qmap, _, _ = tables(codes.device, signed)
    return unblock(qmap[blocks(codes).int()] * scale[:, None], codes.shape)


# ----- state as the optimiser keeps it: {"M": ..., "V": ...} fp32, or codes and scales -------------

# "root": codes of V hold sqrt(V). Older state, with "V_scale", has codes of V itself: they must not be mixed.
SCALE = {"M": "M_scale", "V": "V_root_scale", "P": "P_scale"}


def zeros(name: str, shape: tuple[int, ...], dtype: torch.dtype, in_8_bits: bool, device: torch.device) -> dict[str, Tensor]:
    """State `name` ("M", "V" or "P") before it is first kept: in `dtype`, or in codes, from 4096 values on."""
    tables(device, True)  # so that they are not made in the middle of a compiled function
    if not in_8_bits or (n := math.prod(shape)) < SMALLEST:
        return {name: torch.zeros(shape, dtype=dtype, device=device)}
    scale = torch.zeros(-(-n // BLOCK), device=device)
    return {name: torch.zeros(shape, dtype=torch.uint8, device=device), SCALE[name]: scale}


def load(state: dict[str, Tensor], name: str, dtype: torch.dtype | None = None) -> Tensor:
    """State `name` in `dtype`; if that is None in fp32, or as it is if it is not in codes. V is zero only where its whole block is."""
    codes, scale = state[name], state.get(SCALE[name])
    if name != "V" or scale is None:
        return dequantise(codes, scale, signed=True).to(dtype)
    return dequantise(codes.clamp_min(1), scale, signed=False).square()


def narrow(state: dict[str, Tensor], name: str, x: Tensor) -> dict[str, Tensor]:
    """x in the form in which `state` has `name`."""
    if SCALE[name] not in state:
        return {name: x.to(state[name].dtype)}
    codes, scale = quantise(x.sqrt(), signed=False) if name == "V" else quantise(x, signed=True)
    return {name: codes, SCALE[name]: scale}


def split(x: Tensor, whole: bool = False) -> tuple[Tensor, ...]:
    """x in pieces of SLICE values or `whole`, as (blocks, 256) where that goes up: then Adam compiles to one kernel. Views, if x is contiguous."""
    size, x = x.numel() if whole else SLICE, x.reshape(-1) if x.numel() % BLOCK else x.reshape(-1, BLOCK)
    return x.split(max(1, size // x[:1].numel()))


def pieces(state: dict[str, Tensor], names: str, whole: bool = False) -> list[dict[str, Tensor]]:
    """What is named (as "MV") in pieces, views that can be updated one at a time."""
    views = {key: x.split(len(x) if whole else SLICE // BLOCK) if key.endswith("scale") else split(x, whole)
             for key, x in state.items() if key[0] in names}  # fmt: skip
    return [dict(zip(views, parts)) for parts in zip(*views.values())]


def keep(state: dict[str, Tensor], name: str, x: Tensor, ok: Tensor) -> None:
    """Replaces state `name` by x, in place, where the 0-dim bool `ok` is True: else it stays to the last bit."""
    for part, x in zip(pieces(state, name), split(x)):
        for key, new in narrow(part, name, x).items():
            part[key].copy_(torch.where(ok, new, part[key]))


# ----- the update: functions on tensors, in place, each of which compiles to a single pass over memory -----------------
# What changes from step to step comes as a 0-dim tensor: a Python number would be compiled in.


def adam_(G, state, betas, eps, bias1, bias2, shrink, ok, dtype=torch.float32) -> Tensor:
    """One step of Adam (arXiv 1412.6980, algorithm 1): replaces the moments in `state`, returns the direction.

    Args:
        G: gradient, any shape and dtype, to be multiplied by `shrink`; state: holds its moments.
        bias1, bias2: 1 - beta^t; ok: bool, where it is False the moments stay and the direction is zero.

    Returns:
        N = M_hat / (sqrt(V_hat) + eps), computed in fp32, in `dtype`.
    """
    G = G.float() * shrink
    M = torch.lerp(load(state, "M"), G, 1 - betas[0])
    V = load(state, "V") * betas[1] + G * G * (1 - betas[1])
    N = M / bias1 / ((V / bias2).sqrt() + eps)
    for name, x in (narrow(state, "M", M) | narrow(state, "V", V)).items():
        state[name].copy_(torch.where(ok, x, state[name]))
    return torch.where(ok, N, 0.0).to(dtype)


def random_bits(w: Tensor, seed: Tensor) -> Tensor:
    """16 random bits for each element of w, int32: a hash (murmur3's last steps) of its index and `seed`, the same on any device."""
    x = torch.arange(w.numel(), dtype=torch.int32, device=w.device).view(w.shape) ^ seed  # first: the compiler would multiply
    for shift, factor in (16, -1640531535), (16, -2048144789), (13, -1028477387):  # an index with numbers beyond int32
        x = (x ^ (x >> shift & (1 << 32 - shift) - 1)) * factor
    return x >> 16 & 0xFFFF


def move_(w: Tensor, N: Tensor, lr: Tensor, stay: Tensor, seed: Tensor | None) -> None:
    """w <- stay * w - lr * N. With `seed`, bf16 is rounded up or down by chance: updates below its precision survive on average
    (stochastic rounding, as in Q-GaLore 2407.08296 and torchao's bf16_stochastic_round)."""
    new = w.float() * stay - N.float() * lr
    if seed is not None and w.dtype == torch.bfloat16:
        new = ((new.view(torch.int32) + random_bits(w, seed)) & (-1 << 16)).view(torch.float32)  # bf16 is fp32's upper half
    w.copy_(new)


def adam_move_(w, G, state, betas, eps, bias1, bias2, shrink, ok, lr, stay, seed) -> None:
    """Both at once, for a weight without a basis: its direction is never written to memory."""
    move_(w, adam_(G, state, betas, eps, bias1, bias2, shrink, ok), lr, stay, seed)


@cache
def compiled(function):
    """`function`, compiled for any shape (nothing is compiled before its first call)."""
    return torch.compile(function, fullgraph=True, dynamic=True)
