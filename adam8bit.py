"""
Narrow storage for wide arithmetic: 8-bit codes for optimiser state, int8 or bf16 for weights.

What is stored of a moment (or of GaLore's basis P), for every block of 256 values:
    scale = max |x| over the block                       one fp32 number, the "absmax"
    code  = index of the value of `qmap` nearest to x / scale      one byte per value
So x is restored as qmap[code] * scale. M and P take the signed map, sqrt(V) the unsigned one.
Arithmetic is fp32 throughout. Only what is kept between two steps is narrow: 2.03 bytes per parameter, not 8.

A weight in 8 bits is int8 codes from -127 to 127 and a scale for each row. Rounded up or down at random, an
update of a tenth of the grid moves one code in ten.

The map is Dettmers' dynamic data type: 0, 1, and seven decades from 1 down to 1e-7. Each decade has half as
many values as the one above: 64, 32, ..., 1 of each sign, or 128, 64, ..., 2 in the unsigned map.

A variance stored as zero, beside a momentum that is not, would make a step of M / eps, thousands of lr.
It happens where gradients within a block differ much, as in an embedding: most rows have none in most steps.
Two things prevent it. N divides by sqrt(V), so that is what codes hold: V then spans 13 decades, not 6.5.
And code 0 of sqrt(V) is read as code 1, so V is zero only where all of its block is. Where both are rounded
the wrong way a step may still be 2.5 times too long, so N is held at 5. In fp32 it was below 3 in all runs of
experiments/eight_bit.py.

References: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861 (section 2.1 blocks, 2.2 dynamic
map, 2.3 what stays in 32 bits); bitsandbytes `create_dynamic_map`, which the map equals to the last bit;
torchao.optim, whose names these are. Stochastic rounding: Q-GaLore, arXiv 2407.08296, and torchao.

Left out on purpose: stable embedding layers, percentile clipping, paged memory, 4 bits. Smaller blocks than
the paper's 2048 make up for the first two, as in bitsandbytes and torchao today.
"""

import math
from functools import cache

import torch
from torch import Tensor

BLOCK = 256  # values that share a scale
SMALLEST = 4096  # tensors with fewer values stay fp32: norms are sensitive, and they cost nothing
LARGEST = 5.0  # of Adam's steps, in units of lr, from state in codes


# ----- a tensor to codes and back ---------------------------------------------------------------------------


def dynamic_map(signed: bool) -> tuple[Tensor, Tensor]:
    """The 256 values of the dynamic data type, ascending, fp32 (2110.02861, section 2.2), and the 255
    midpoints between them."""
    values = [0.0, 1.0]
    for i in range(7):  # decade 10^(i-7) ... 10^(i-6), in 2^i equal steps, or 2^(i+1) without a sign
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        means = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means).tolist() * signed
    qmap = torch.tensor(sorted(values))
    return qmap, (qmap[1:] + qmap[:-1]) / 2


MAPS = {(torch.device("cpu"), signed): dynamic_map(signed) for signed in (True, False)}


def get_map(device: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    if (device, signed) not in MAPS:
        MAPS[device, signed] = tuple(table.to(device) for table in MAPS[torch.device("cpu"), signed])
    return MAPS[device, signed]


def blocks(x: Tensor) -> Tensor:
    """Any shape as (blocks, 256); the last block is filled up with zeros."""
    fill = -x.numel() % BLOCK
    return (torch.constant_pad_nd(x.flatten(), (0, fill)) if fill else x).reshape(-1, BLOCK)


def unblock(b: Tensor, shape: torch.Size) -> Tensor:
    return b.view(-1)[: shape.numel()].view(shape)


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Nearest codes of `x` (any shape, fp32).

    Normal noise comes back with a mean relative error of 1.5% (M), its size with 0.8% (sqrt(V), unsigned).

    Returns:
        codes, uint8, the shape of x; scale, fp32, (ceil(numel / 256)).
    """
    b = blocks(x)
    scale = b.abs().amax(1)
    b = b / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]  # a block of zeros stays zeros
    codes = torch.bucketize(b, get_map(x.device, signed)[1], out_int32=True)  # so many midpoints lie below
    return unblock(codes.to(torch.uint8), x.shape), scale


def dequantise(codes: Tensor, scale: Tensor | None, signed: bool) -> Tensor:
    """qmap[codes] * scale: fp32, the shape of `codes`. A moment that has no scale is fp32 as it is."""
    if scale is None:
        return codes
    values = get_map(codes.device, signed)[0][blocks(codes).int()]
    return unblock(values * scale[:, None], codes.shape)


# ----- state as the optimiser keeps it: {"M": ..., "V": ...} in fp32, or codes and scales -------------------


def scale_key(name: str) -> str:
    """Where a state keeps the scale of `name`. The key of V says that codes hold sqrt(V)."""
    return "V_root_scale" if name == "V" else f"{name}_scale"


def zeros(names: str, shape: tuple, dtype: torch.dtype, in_8_bits: bool, device: torch.device) -> dict:
    """State before it is first stored, for each of `names`: in `dtype`, or in codes from 4096 values on."""
    narrow = in_8_bits and math.prod(shape) >= SMALLEST
    dtype = torch.uint8 if narrow else dtype
    state = {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}
    for name in names if narrow else ():
        state[scale_key(name)] = torch.zeros(-(-math.prod(shape) // BLOCK), device=device)
        get_map(device, signed=name != "V")  # not in the middle of a compiled function
    return state


def load(state: dict[str, Tensor], name: str, dtype: torch.dtype | None = None) -> Tensor:
    """State `name` in `dtype`. If that is None: codes as fp32, anything else as it is."""
    codes, scale = state[name], state.get(scale_key(name))
    if name != "V" or scale is None:
        return dequantise(codes, scale, signed=True).to(dtype)
    return dequantise(codes.clamp_min(1), scale, signed=False).square()  # zero only where all of its block is


def store(state: dict[str, Tensor], name: str, x: Tensor, ok: Tensor) -> None:
    """Replaces state `name` by x, in place, where the 0-dim bool `ok` is True. Else no bit of it changes."""
    new = {name: x}
    if scale_key(name) in state:
        codes, scale = quantise(x.sqrt() if name == "V" else x, signed=name != "V")
        new = {name: codes, scale_key(name): scale}
    for key in new:
        state[key].copy_(torch.where(ok, new[key], state[key]))


def check(fine: bool, otherwise: str) -> None:
    if not fine:
        raise ValueError(otherwise)


class Stored(torch.optim.Optimizer):
    """An optimiser that saves and loads state as it is: torch's would cast moments to the weights' dtype.

    A subclass says in empty(p, device) what names, dtypes and shapes the state of a parameter has, and in
    far(p) whether it lives in host memory. Its arm() is called whenever groups or state are new, and keeps
    the parameters, in order, in `group`.
    """

    def place(self, p: Tensor, state: dict) -> dict:
        """A copy of it, where p's state lives."""
        far = self.far(p) and p.is_cuda
        home = lambda x: x.cpu().pin_memory() if far else x.to(p.device, copy=True)  # noqa: E731
        return {name: home(x) if torch.is_tensor(x) else x for name, x in state.items()}

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self.state.update((p, {}) for p in param_group["params"])  # saved as that, if they never move
        self.arm()

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises ValueError for state that this optimiser would not have made; it stays as it is then."""
        groups = state_dict["param_groups"]
        saved = {i: dict(state) for i, state in state_dict["state"].items()}  # its own, if it is ours
        theirs = [(i, group) for group in groups for i in group["params"]]
        form = lambda x: (x.dtype, x.shape) if torch.is_tensor(x) else type(x)  # noqa: E731
        for (i, group), p in zip(theirs, self.group):
            expected = self.empty(p, torch.device("meta"))
            found = saved.get(i, {"state": None}) or expected
            odd = {name for name in expected | found if form(found.get(name)) != form(expected.get(name))}
            odd |= self.defaults.keys() - group.keys()
            check(not odd, f"the saved state of parameter {i} differs in {sorted(odd)}: set up as then.")
        before = self.state.values()
        super().load_state_dict({"state": {}, "param_groups": groups})
        for state in before:
            state.clear()  # thin layers hold the old one, which would live on beside the new one
        for (i, _), p in zip(theirs, self.group):
            self.state[p] = self.place(p, saved[i])
        self.arm()

    def __getstate__(self):  # copy and pickle ask for it
        raise TypeError("this optimiser cannot be copied or pickled: load its state_dict() into a new one.")


# ----- weights in 8 bits: codes, and a scale for each row ---------------------------------------------------


def narrow(W: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes of W (m x n), int8, and the scale of each row, fp32, (m, 1)."""
    scale = W.abs().amax(1, keepdim=True).float().clamp_min(1e-30) / 127
    return (W / scale).round().to(torch.int8), scale


def widen(W: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """codes * scale in `dtype`. A weight that has no scale is as it is."""
    return W if scale is None else W.to(dtype).mul_(scale)


# ----- arithmetic in fp32 on what is stored narrow: functions that compile to a pass over memory ------------


def advance_(state, names, direction, R, shrink, ok, **more) -> Tensor:
    """N of `direction` (galore.py) for R times `shrink`, whose moments in `state` are replaced.
    Where `ok` is False they stay, and N is zero."""
    N, *moments = direction(R.float() * shrink, *(load(state, name) for name in names), **more)
    for name, x in zip(names, moments, strict=True):
        store(state, name, x, ok)
    if scale_key("V") in state:
        N = N.clamp(-LARGEST, LARGEST)
    return torch.where(ok, N, 0.0).to(more["dtype"])


def random_bits(x: Tensor, seed: Tensor) -> Tensor:
    """16 random bits for each element of x, int32, the same on any device: a hash of its index and `seed`."""
    # The seed comes in first: the compiler would multiply an index with numbers beyond int32.
    bits = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) ^ seed
    for shift, factor in (16, -1640531535), (16, -2048144789), (13, -1028477387):  # murmur3's last steps
        bits = (bits ^ (bits >> shift & (1 << 32 - shift) - 1)) * factor
    return bits >> 16 & 0xFFFF


def move_(W, N, lr, stay, seed, scale=None) -> None:
    """W <- stay * W - lr * N. With a seed, bf16 weights are rounded up or down at random: updates below their
    precision survive on average. So are codes, in units of their scale. It grows when the row does, and never
    shrinks: a code that does not move is not rounded anew."""
    new = W.float() * stay - N.float() * (lr if scale is None else lr / scale)
    if scale is not None:
        grow = (new.abs().amax(1, keepdim=True) / 127).clamp_min(1)
        scale.mul_(grow)
        new = (new / grow + (random_bits(new, seed) + 0.5) / 65536).floor().clamp(-127, 127)
    elif seed is not None and W.dtype == torch.bfloat16:  # which is fp32's upper half
        new = ((new.view(torch.int32) + random_bits(new, seed)) & (-1 << 16)).view(torch.float32)
    W.copy_(new)


@cache
def compiled(function):
    """It, compiled at its first call with each shape. For any shape at once, views would become copies."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True, dynamic=False)
