"""
What GaLore is compared with: low-rank factors, LoRA and ReLoRA, in place of the linear layers of a model.

| kind    | weight               | trained | after Kamalakara et al. 2209.13569, LoRA 2106.09685, ReLoRA 2307.05695 |
| factors | s B A                | A, B    | starts as the best rank-r approximation of the layer's weight |
| lora    | W0 + s B A           | A, B    | W0 frozen, at pre-training random; B starts at zero |
| relora  | W0 + s B A           | A, B    | every k steps W0 takes B A in, and all of A, B and their moments starts again |

    layers = low_rank(model, rank=128, kind="relora")
    opt = GaLoreAdamW(groups(model, layers), lr=0.001)        # no group has a rank: plain AdamW
    restart_every(opt, layers, steps=1000, warmup=50)         # relora only

As in the GaLore paper's comparison (2403.03507, section 5.1) ReLoRA has no full-rank warm-up, and s = 32 / r. `factors` have s = 1.
Left out on purpose: dropout, layers other than nn.Linear, several adapters: peft has them.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = x (W0 + s B A)' + bias; without W0 for `factors`. A (r x in), B (out x r)."""

    def __init__(self, linear: nn.Linear, rank: int, kind: str, alpha: float = 32.0):
        super().__init__()
        W = linear.weight.detach()
        out, into = W.shape
        if kind not in ("factors", "lora", "relora"):
            raise ValueError(f"kind is {kind!r}: it must be factors, lora or relora.")
        if not 0 < rank < min(out, into):
            raise ValueError(f"rank {rank} must be at least 1 and below {min(out, into)}, the short side of a {out} x {into} weight.")
        self.bias, self.scale = linear.bias, 1.0 if kind == "factors" else alpha / rank
        self.W0 = None if kind == "factors" else nn.Parameter(W, requires_grad=False)
        self.A, self.B = nn.Parameter(W.new_empty(rank, into)), nn.Parameter(W.new_zeros(out, rank))
        self.start()
        if kind == "factors":
            U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
            root = S[:rank].sqrt()
            self.B.data.copy_(U[:, :rank] * root)
            self.A.data.copy_(root[:, None] * Vh[:rank])

    def start(self) -> None:
        """As LoRA's own code: A uniform with variance 1 / (3 in), B zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.linear(x, self.A), self.B) * self.scale
        y = y if self.W0 is None else y + F.linear(x, self.W0)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def merge(self) -> None:
        """W0 takes s B A in; A and B start again. The layer computes the same as before."""
        self.W0 += self.scale * (self.B.float() @ self.A.float())
        self.start()


def low_rank(model: nn.Module, rank: int, kind: str, which: str = r"\.\d+\.", alpha: float = 32.0) -> list[LowRankLinear]:
    """Puts a LowRankLinear in place of each nn.Linear whose name matches `which` (the matrices of the blocks). Returns them."""
    layers = []
    for name, linear in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(which, name)]:
        parent, _, child = name.rpartition(".")
        layers.append(LowRankLinear(linear, rank, kind, alpha))
        setattr(model.get_submodule(parent), child, layers[-1])
    if not layers:
        raise ValueError(f"no nn.Linear of the model has a name that matches {which!r}.")
    return layers


def groups(model: nn.Module, layers: list[LowRankLinear]) -> list[dict]:
    """A and B in a group of their own, so that their step count can start again; all else that is trained in another."""
    factors = [p for layer in layers for p in (layer.A, layer.B)]
    others = {p: None for p in model.parameters() if p.requires_grad}
    return [dict(params=factors), dict(params=[p for p in others if not any(p is q for q in factors)])]


def restart_every(opt: torch.optim.Optimizer, layers: list[LowRankLinear], steps: int, warmup: int, times: float = math.inf) -> None:
    """ReLoRA: after every so many steps merge, forget the moments of A and B (opt's first group), and warm the learning rate up again.

    The rate that a schedule has set for a step is scaled down in the `warmup` steps after a restart.
    """
    taken = 0

    def before(opt, *_):
        since = taken % steps
        if steps <= taken < (times + 1) * steps and since < warmup:
            for group in opt.param_groups:
                group["lr"] *= (since + 1) / (warmup + 1)

    def after(opt, *_):
        nonlocal taken
        taken += 1
        if taken % steps == 0 and taken <= times * steps:
            for layer in layers:
                layer.merge()
            for p in opt.param_groups[0]["params"]:
                opt.state.pop(p, None)

    opt.register_step_pre_hook(before)
    opt.register_step_post_hook(after)
