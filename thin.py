"""
The gradient that is never formed: R = P'G comes straight out of the backward pass, and moves W there.

The gradient of a linear layer is a product over tokens, G = D'X, with D (tokens x out) the gradient at its
output and X (tokens x in) its input. GaLore wants R = P'G only. So multiply in the other order: R = (D P)'X,
or (X P)'D where the input side is the short one. G never exists, and the product costs 2 r (m + n) operations
per token, not 2 m n.

    forward    x, proxy ----> ThinLinear ----> link         zeros in y's shape, but owns one number
               x -------> F.linear(x, W) + link ----> y     y is what it always was
    backward   dX, proxy.grad <-- dX, R <-- ThinLinear <-- D

1. x and W are detached for the product, so autograd makes no G. D arrives through `link` instead, which is
   always zero.
2. ThinLinear returns dX = D W, and R as the gradient of a *proxy*: one number, which nobody reads, expanded
   to R's shape. Autograd sums R in proxy.grad over micro-batches. Projection is linear, so that is exact.
3. On a step in which P is due, Y' = M G' comes beside R in the same way: the proxy is r x (n + m), [R | Y'].
   M stands still until the weight moves, so Y is linear in G, too.
4. On the last micro-batch the proxy's hook moves W and drops R: the layer-wise update. With max_norm, all R
   wait for opt.step(), until their norm is known.

Why two functions, and ThinLinear first? Checkpointing recomputes a block only up to its last saved tensor:
ThinLinear saves x before F.linear, so the block's last product is not repeated.

Weights in 8 bits: W is int8 codes and a scale for each row (adam8bit.py). Proxies carry the gradients, so
codes can be parameters. What is saved for the backward pass are the codes: W is widened for one product.

    opt = GaLoreAdamW(param_groups(model, rank=128), lr=0.01)
    thin(model, opt, accumulate=4)
    for x, y in four_micro_batches: (model(x, y) / 4).backward()
    opt.step()

References: CompAct, arXiv 2410.15352, has the same algebra for a random P on the input side, without
accumulation. Layer-wise updates: GaLore, 2403.03507, section 4.3; LOMO, 2306.09782.
"""

import sys
import warnings
import weakref
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adam8bit import check, dequantise, narrow, scale_key, widen
from galore import GaLoreAdamW, average, orthonormal


class ThinLinear(torch.autograd.Function):
    """The backward pass of y = x W', which stands beside it: dX, and R as the gradient of a proxy.

    Let A be the side of D and X that is projected, B the other: G = A'B, R = (A P)'B, Y' = (B M')'A.
    """

    @staticmethod
    def forward(ctx, x, proxy, W, W_scale, P, P_scale, M, M_scale):
        ctx.save_for_backward(x, W, W_scale, P, P_scale, M, M_scale)
        return x.new_zeros(1).expand(*x.shape[:-1], len(W))

    @staticmethod
    @torch.autograd.function.once_differentiable  # else second-order terms would be lost silently
    def backward(ctx, D):
        x, W, W_scale, P, P_scale, M, M_scale = ctx.saved_tensors
        D, X = D.reshape(-1, len(W)), x.reshape(-1, W.shape[1])  # link gives D the dtype of x
        if W_scale is not None:  # adds nothing to it; but else a compiler would keep W of the forward pass
            W_scale = W_scale + 1e-38 * D[:1, :1].sum()
        dX = (D @ widen(W, W_scale, D.dtype).to(D.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
        A, B = (X, D) if len(W) >= W.shape[1] else (D, X)
        R = (A @ dequantise(P, P_scale, True).to(D.dtype)).T @ B
        if M is not None:
            R = torch.cat([R, (B @ dequantise(M, M_scale, True).to(D.dtype).T).T @ A], 1)
        return dX, R, *[None] * 6


class ThinModule(nn.Linear):
    """What `thin` makes of an nn.Linear. `arm` gives it `galore`, the state of W, `proxy`, where R arrives,
    and `wants_Y`: does Y come as well? weight_scale: (out, 1) of a weight in int8, else None."""

    def forward(self, x: Tensor) -> Tensor:
        W, scale = self.weight.detach(), self.weight_scale
        if not (torch.is_grad_enabled() and (self.weight.requires_grad or scale is not None)):
            return F.linear(x, widen(W, scale, x.dtype), self.bias)
        M = "M" * self.wants_Y  # by their keys: in a loop over the state a compiler would guard all of it
        stored = map(self.galore.get, ("P", scale_key("P"), M, scale_key(M)))
        link = ThinLinear.apply(x, self.proxy, W, scale, *stored)
        return F.linear(x.detach(), widen(W, scale, x.dtype), self.bias).add_(link)


class ThinUpdate:
    """What `thin` adds to an optimiser: gradients arrive at proxies; each weight moves with its last."""

    def arm(self) -> None:
        """Gives the thin layers, for the next step, their state and their proxies."""
        super().arm()
        self.zero_grad()
        for module in self.modules:
            p = module.weight
            module.galore, module.wants_Y = self.init(p), p in self.turning
            shape = len(module.galore["M"]), max(p.shape) + min(p.shape) * module.wants_Y
            if self.proxies[p].shape != shape:
                self.proxies[p] = self.proxies[p].new_zeros(1, device=p.device).expand(shape).requires_grad_()
                self.proxies[p].register_post_accumulate_grad_hook(self.hook(p))
            module.proxy = self.proxies[p]

    def leaf(self, p: Tensor) -> Tensor:
        check(p not in self.proxies or p.grad is None, "a thin weight has a .grad: it was used outside its "
              "nn.Linear, or the model is wrapped in DDP, and thin sees neither.")
        return self.proxies.get(p, p)

    def project(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        if p not in self.proxies:
            return super().project(p)
        both, n = average(self.proxies[p].grad), max(p.shape)
        return both[:, :n].contiguous(), both[:, n:].T if p in self.turning else None

    def hook(self, p: Tensor | None = None):
        """Calls `arrived`. Holds the optimiser weakly: else neither would ever be freed."""
        arrived = weakref.WeakMethod(self.arrived)
        return lambda leaf: arrived() and arrived()(leaf if p is None else p, leaf)

    @torch.no_grad()
    def arrived(self, p: Tensor, leaf: Tensor) -> None:
        """leaf.grad has gained a micro-batch. After the last one p moves, unless it is to be clipped."""
        self.passes[p] += 1
        if self.passes[p] > self.accumulate:
            raise RuntimeError(f"a weight got more than {self.accumulate} gradients before opt.step() or "
                               "opt.zero_grad(): raise accumulate, or checkpoint with use_reentrant=False.")
        if self.passes[p] == self.accumulate and self.max_norm is None:
            if not self.norms:  # the first of its backward pass
                self.agree([p], filter(self.coming, self.group))
            self.move(p, *self.project(p))
            leaf.grad = None

    def coming(self, p: Tensor) -> bool:
        """Will the backward pass under way complete p's gradient? Asked as in register_multi_grad_hook."""
        leaf = self.leaf(p)
        return (leaf.requires_grad and self.passes[p] == self.accumulate - 1
                and torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for proxy in self.proxies.values():
            proxy.grad = None
        self.passes.clear()
        self.norms.clear()


def thin(model: nn.Module, opt: GaLoreAdamW, accumulate: int = 1, weight_bits: int | None = None,
         device: torch.device | str | None = None) -> None:  # fmt: skip
    """Switches the model's projected linear layers to `ThinLinear`, and the update to the backward pass.

    From here on a step is `accumulate` backward passes and one opt.step(). A projected parameter that is not
    the weight of an nn.Linear keeps its full .grad, and moves in the last of them. So do biases and norms.

    weight_bits: 8 makes int8 of the layers' weights, None leaves them as they are. device: where the model
    goes then. Built on the CPU, it need not fit the device in 16 bits.

    Projected weights have no .grad. Clip with max_norm: torch's clip_grad_norm_, and max_grad_norm of
    transformers' Trainer, would clip nothing. Clear with opt.zero_grad(). No GradScaler. No DDP around the
    model: start every process from the same weights, and R is averaged here. Checkpoint with
    use_reentrant=False. Move, cast and load the model before this call. Compile the blocks of the model, not
    the model. A weight moves during the backward pass: a learning rate that is set between backward() and
    step() counts from the next step on. A copy of a thin model computes, but does not train. Hooks on a
    projected weight are not called. A gradient penalty ends with torch's error "differentiate twice".

    Raises ValueError for accumulate, weight_bits, an Exact, thin or foreign `opt`, a thin or compiled model.
    """
    check(not opt.exact, "Exact takes an SVD of the full gradient, which the thin way never forms.")
    check(accumulate >= 1, f"accumulate is {accumulate}, but must be at least 1.")
    check(weight_bits in (None, 8), f"weight_bits is {weight_bits}, but must be 8, or None.")
    check(not isinstance(opt, ThinUpdate) and not any(isinstance(m, ThinModule) for m in model.modules()),
          "a model is made thin once, by one optimiser: build both anew for another.")
    check(any(p in opt.group for p in model.parameters()), "the optimiser holds no weight of this model.")
    check(not hasattr(model, "_orig_mod") and model._compiled_call_impl is None,
          "compile the blocks of a thin model one by one: as a whole it would be compiled at each refresh.")
    if opt.max_norm is None and "transformers.trainer" in sys.modules:
        warnings.warn("Trainer's max_grad_norm clips nothing: use max_norm of GaLoreAdamW.", stacklevel=2)
    opt.__class__ = type(f"Thin{type(opt).__name__}", (ThinUpdate, type(opt)), {})
    opt.modules = [m for m in model.modules() if type(m) is nn.Linear and m.weight.requires_grad
                   and opt.group.get(m.weight, {}).get("rank")]
    opt.accumulate, opt.passes, opt.scales = accumulate, Counter(), {}  # passes: gradients so far
    opt.proxies = {m.weight: m.weight.new_empty(0) for m in opt.modules}  # their dtype; `arm` shapes them
    for p in opt.proxies if weight_bits else ():
        codes, opt.scales[p] = narrow(p.detach())
        p.requires_grad_(False).data = codes
    if device is not None:  # fake tensors cannot even be moved to where they are
        model.to(device)
    opt.scales = {p: scale.to(device) for p, scale in opt.scales.items()}
    for module in opt.modules:
        module.__class__ = ThinModule
        module.register_buffer("weight_scale", opt.scales.get(module.weight))
    opt.arm()
    for p in (p for p in opt.group if p.requires_grad and p not in opt.proxies):
        p.register_post_accumulate_grad_hook(opt.hook())
    # The backward pass has a thread of its own, and cuSOLVER a handle for each thread, in memory that PyTorch
    # does not manage. In the first refreshing step there was none left (7B on 23.64 GiB): so it is made now.
    leaf = torch.eye(2, device=next(iter(opt.group)).device, requires_grad=True)
    leaf.register_hook(orthonormal)
    leaf.square().sum().backward()
