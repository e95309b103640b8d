"""
GaLore: train every weight while Adam's moments live in a rank-r subspace of each gradient.

One step, for a weight matrix W with gradient G:
    R = P'G                                    project the gradient
    M, V, N = Adam(R)                          moments and direction, of R
    W <- W - lr * alpha * P N                  back to full size
    every T steps: P <- orth(G M'), and M, V turn with it
(With muon=True N is M with its singular values brought near one, and there is no V.)

| symbol | meaning | shape |
| W, G   | weight and gradient, seen so that the projected (short) side is its rows: `rows` | m x n |
| r      | rank, r < m | |
| P      | orthonormal basis of the subspace, P'P = I | m x r |
| R      | projected gradient P'G | r x n |
| M, V   | Adam's moments, of R | r x n |
| N      | Adam's direction, M_hat / (sqrt(V_hat) + eps) | r x n |
| Y      | G M', one power iteration towards the next P | m x r |
| T      | steps between refreshes of P (`update_proj_gap`) | |
| alpha  | `scale` | |

The gradient of a linear layer is a product over tokens, so R = P'G needs no G: `ThinLinear` multiplies in the other order.
That is the same number, takes no memory for a gradient, and less arithmetic than full-rank training.

Any model, any loop:
    opt = GaLoreAdamW(param_groups(model, rank=128), lr=0.01)
    loss.backward()
    opt.step(); opt.zero_grad()
The gradient never formed, each weight moved during the backward pass:
    opt = GaLoreAdamW(param_groups(model, rank=128), lr=0.01)
    thin(model, opt, accumulate=4)
    for x, y in four_micro_batches: (model(x, y) / 4).backward()
    opt.step()

References: GaLore, arXiv 2403.03507 (algorithms 1, 2; `exact=True` is the paper to the letter); subspace by warm power iteration
and moments that turn with it: LDAdam, arXiv 2410.16103; shifted Cholesky-QR: Fukaya et al., arXiv 1809.11085; Adam 1412.6980, AdamW 1711.05101; Muon: see `muon`.

Left out on purpose: other sides than the short one, the two-sided P'GQ (its Q would need a second power iteration and a second
accumulator, and half of this file again, to save what 8 bits save already).
"""

import re
import sys
import warnings
import weakref

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from adam8bit import (BLOCK, SLICE, adam_, adam_move_, blocks, compiled, dequantise, keep, load, move_, narrow, pieces,
                      split, zeros)  # fmt: skip


# ----- the subspace -------------------------------------------------------------------------------------------------


def rows(W: Tensor) -> Tensor:
    """W or W', so that the short side is the rows; a square matrix is transposed, as in the reference code."""
    return W.T if W.shape[0] >= W.shape[1] else W


def orthonormal(Y: Tensor) -> Tensor:
    """Orthonormal basis of the columns of Y (m x r, fp32) by shifted Cholesky-QR, three passes (1809.11085, algorithm 4).

    Matrix products and an r x r factorisation: no branch, no wait for the host. P'P = I to 1e-6 if the singular values of
    Y, its columns scaled, spread over no more than 1e6.
    """
    Y = F.normalize(Y, dim=0)
    for shift in (1e-7, 1e-7, 0.0):  # keeps the factorisation from breaking down; the last pass mends what it cost
        A = Y.T @ Y
        A.diagonal().add_(shift * A.trace())
        L, _ = torch.linalg.cholesky_ex(A)
        Y = torch.linalg.solve_triangular(L, Y.T, upper=False).T
    return Y


def refresh(state: dict[str, Tensor], Y: Tensor, ok: Tensor) -> None:
    """P of `state` becomes the basis after one warm power iteration, in place, and its moments M and V turn with it.

    A trace of the old basis in Y keeps the old directions where the gradient has none (rank deficient, or zero): else the
    last columns of P would be rounding noise, which Adam scales up to full size. It also bounds the spread of the singular
    values. (1e-3 in place of 1e-6: toy, 600 steps, one seed, validation loss 1.849 against 1.874; two runs that differ by rounding
    alone, 1 micro-batch or 2, were 160 times closer after 24 steps.) Nothing changes if `ok` is False or Y is not finite.

    With S = P_new' P_old: M <- S M, and V <- (S o S) V, which stays >= 0 (right for a variance if the entries of a column of
    R are uncorrelated; LDAdam 2410.16103).

    Args:
        state: P (m x r), M and V (r x n), in the old basis; Y (m x r): G M'; ok: 0-dim bool.
    """
    old, Y = load(state, "P").float(), Y.float()
    Y = F.normalize(Y / Y.abs().amax().clamp_min(1e-30), dim=0) + 1e-3 * old
    new = orthonormal(Y)
    S = new.T @ old
    ok = ok & S.sum().isfinite()
    keep(state, "P", new, ok)
    keep(state, "M", S @ load(state, "M"), ok)
    if "V" in state:
        keep(state, "V", (S * S) @ load(state, "V"), ok)


def muon(R: Tensor, state: dict[str, Tensor], beta: float, shrink: Tensor, ok: Tensor, dtype: torch.dtype) -> Tensor:
    """Muon's direction in the place of Adam's: the momentum of R with all singular values brought near one, and no V.

    Five Newton-Schulz steps, with the coefficients, Nesterov momentum and scale 0.2 sqrt(n) of torch.optim.Muon ("match_rms_adamw": steps of about
    Adam's size; at toy size two to four times GaLore's learning rate is best). Muon: Jordan 2024, Liu et al. 2502.16982; in a subspace: SUMO, 2505.24749.

    Args:
        R: r x n, times `shrink` (0-dim); state: its M is replaced in place, if `ok` (0-dim bool).
        beta: of the momentum (the group's first beta, 0.9; torch.optim.Muon's default is 0.95); dtype: of the products (the weight's; torch: bf16).

    Returns:
        N (r x n, dtype); zero where ok is False.
    """
    R = R.float() * shrink
    M = torch.lerp(load(state, "M"), R, 1 - beta)
    keep(state, "M", M, ok)
    X = torch.lerp(R, M, beta)
    X = (X / X.norm().clamp_min(1e-7)).to(dtype)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return torch.where(ok, 0.2 * X.shape[1] ** 0.5 * X, 0.0)


# ----- the gradient that is never formed ----------------------------------------------------------------------------


class ThinLinear(torch.autograd.Function):
    """Stands beside y = x W', and gives R as the gradient of a proxy; `Tap` brings it the gradient of y.

    With D (tokens x out) the gradient at the output and X (tokens x in) the input, G = D'X, or X'D as `rows` sees it:
    G = A'B. So R = P'G = (A P)'B: 2 r (m + n) operations a token in place of 2 m n + (2 r m n once).
    Where the input side is projected, A P = X P is known in the forward pass and saved in place of X.

    In a step in which P is due, M is given, and Y' = M G' = (B M')'A comes along: the proxy's gradient is [R | Y'],
    r x (n + m). M stands still during a step, so Y, like R, is linear in G and may be summed over micro-batches and processes.

    Why not one function with the product in it: this one saves what it needs before the product, so that checkpointing,
    which repeats a block only until the last saved tensor, does not repeat the block's last product.
    """

    @staticmethod
    def forward(ctx, x, proxy, out: int, input_side: bool, checkpointed: bool, P, P_scale, M, M_scale):
        ctx.input_side = input_side
        XP = x.reshape(-1, x.shape[-1]) @ dequantise(P, P_scale, True).to(x.dtype) if input_side and not checkpointed else None
        ctx.save_for_backward(x if XP is None or M is not None else None, XP, P, P_scale, M, M_scale)
        return x.new_zeros(1).expand(*x.shape[:-1], out)  # owns one number

    @staticmethod
    def backward(ctx, D):
        x, XP, P, P_scale, M, M_scale = ctx.saved_tensors
        D = D.reshape(-1, D.shape[-1])
        X = None if x is None else x.reshape(-1, x.shape[-1]).to(D.dtype)  # the casts matter under autocast only
        A, B = (X, D) if ctx.input_side else (D, X)
        AP = A @ dequantise(P, P_scale, True).to(D.dtype) if XP is None else XP.to(D.dtype)
        R = AP.T @ B
        if M is not None:
            R = torch.cat([R, (B @ dequantise(M, M_scale, True).to(D.dtype).T).T @ A], 1)
        return None, R, *[None] * 7


class Tap(torch.autograd.Function):
    """y as it is, whose gradient goes to `link` as well."""

    @staticmethod
    def forward(ctx, y, link):
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable  # else second-order terms would be lost in silence
    def backward(ctx, D):
        return D, D


class ThinModule(nn.Linear):
    """What `thin` makes of an nn.Linear: `galore` is the optimiser's state of the weight, `proxy` where its gradient goes."""

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        (out, into), state = self.weight.shape, self.galore
        names = ("P", "P_scale", "M", "M_scale") if self.proxy.shape[1] > max(out, into) else ("P", "P_scale", "", "")
        link = ThinLinear.apply(x, self.proxy, out, out >= into, self.checkpointed, *map(state.get, names))
        return Tap.apply(F.linear(x, self.weight.detach(), self.bias), link)


# ----- the optimiser ------------------------------------------------------------------------------------------------


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW, in a subspace where a parameter group has a rank: GaLore. One path for both, fp32 or 8-bit moments.

    Group keys (those of galore-torch):
        rank: None for plain AdamW; else r, below the short side of every matrix of the group.
        update_proj_gap: T, steps between refreshes of P. It starts random, and is refreshed four times early on, every `turns`
            steps (at least 2, as M needs a step in the new basis before it can point the way to the next).
            T may change at any time.
        scale: alpha. offset: P is due in the steps t = offset (mod T), and early on likewise in the round of `turns` steps, so that
            groups can take turns.

    Args:
        params: parameters or groups, e.g. from `param_groups`.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's (decay is decoupled, and not projected).
        state_bits: 32, or 8 for moments and P in blockwise 8-bit codes (adam8bit.py).
        max_norm: clip the global norm of all R (and of the gradients that are not projected) to this. Clipped or not, it is
            `norm` after a step, and below the norm of the full gradients.
        exact: the paper and its code to the letter: P from an SVD of G before G is projected, in steps 1, T + 1, ...,
            moments not turned, P never in 8 bits, nearest rounding. Plain way only.
        compile: fuse the Adam step with torch.compile.
        seed: of the first P and of the rounding; the same on all processes.
        muon: in the subspace the direction is Muon's instead of Adam's (`muon`): half of the moments; the second beta and eps then
            serve the parameters without a rank alone.

    The weights may be bf16 without an fp32 copy: they are rounded stochastically. If torch.distributed is initialised, R is
    averaged over the processes. A step whose gradient (with max_norm: global norm) is not finite leaves the weight (all
    weights), its moments and, unless exact, its basis as they are, and counts in `skipped`, the number of such steps.

    Several processes must have gradients for the same parameters in each step. If not, all of them end with
    an error before anything is averaged. Adam's bias correction counts the steps in which a parameter had a
    gradient, as torch.optim.AdamW's does. The schedule of P counts the optimiser's steps, by group.

    Raises:
        ValueError: a rank, gap, projection type, dtype, state_bits or max_norm that cannot be honoured.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, state_bits: int = 32, max_norm: float | None = None, exact: bool = False,
                 compile: bool = False, seed: int = 0, muon: bool = False):  # fmt: skip
        check(state_bits in (8, 32), f"state_bits is {state_bits}, but moments are kept in 32 or in 8 bits.")
        check(max_norm is None or max_norm > 0, f"max_norm is {max_norm}, but must be above 0 (None: no clipping).")
        check(not (exact and muon), "exact=True is the paper to the letter, which has no Muon: leave one of them out.")
        self.state_bits, self.max_norm, self.exact, self.compile, self.seed, self.muon = state_bits, max_norm, exact, compile, seed, muon
        self.modules, self.proxies, self.passes, self.accumulate = [], {}, {}, None  # the thin way's: see `thin`
        self.norm = self.skipped = torch.zeros(())  # norm of the last step's R; how many steps were bad
        self.norms = {}  # of each R of the step under way, in the order in which they were averaged
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=None, scale=0.25,
                                      update_proj_gap=200, offset=0, turns=2, proj_type="std", t=0))  # fmt: skip
        self.register_state_dict_pre_hook(lambda opt: [opt.state[p] for p in opt.group])  # {} if none

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self.arm()

    def random(self, p: Tensor, t: int) -> torch.Generator:
        """Depends on seed, parameter and step alone: the same in any order, after resuming, and on every process."""
        mixed = self.seed * 0x9E3779B1 + self.index[p] * 0x85EBCA6B + t * 0xC2B2AE35
        return torch.Generator(p.device).manual_seed(mixed % 2**32)

    def empty(self, p: Tensor, device: torch.device) -> dict:
        """The form of p's state: P (m x r, in p's dtype or codes), M and V (r x n, or p's shape), steps t."""
        state, shape, rank, small = dict(t=0), p.shape, self.group[p]["rank"], self.state_bits == 8
        if rank is not None:
            shape = (rank, max(p.shape))
            state.update(zeros("P", (min(p.shape), rank), p.dtype, small and not self.exact, device))
        for name in "M" if self.muon and rank is not None else "MV":
            state.update(zeros(name, shape, torch.float32, small, device))
        return state

    def init(self, p: Tensor) -> dict:
        """The state of p, made when first asked for."""
        state = self.state[p]
        if not state:
            state.update(self.empty(p, p.device))
            if "P" in state:
                start = torch.randn(*state["P"].shape, generator=self.random(p, 0), device=p.device)
                state.update(narrow(state, "P", orthonormal(start).contiguous()))  # `keep` needs views
        return state

    def due(self, p: Tensor) -> bool:
        """Shall P be refreshed in the next step? Asked once a step, by `arm`. T may change at any time."""
        group = self.group[p]
        t, T, turns = group["t"] + 1, group["update_proj_gap"], group["turns"]
        if group["rank"] is None or self.exact:
            return group["rank"] is not None and (t - 1) % T == 0
        gap = T if t > 4 * turns + 1 else min(T, turns)
        return t > 1 and (t - group["offset"] * gap // T) % gap == 0

    def agree(self, ps: list[Tensor]) -> None:
        """Are the averages to come of these parameters, in this order, in all processes?

        An exchange of 16 bytes, for which the host waits on a GPU, too: once a step, and in the thin way once
        more, when the first weight is about to move.

        Raises:
            ValueError: they are not, and weights would be mixed. All processes raise it.
        """
        if dist.is_initialized():
            code = hash(tuple((self.index[p], *self.init(p)["M"].shape, p in self.turning) for p in ps))
            span = torch.tensor([code, -code], device=next(iter(self.group)).device)
            dist.all_reduce(span, dist.ReduceOp.MAX)  # the highest code, and minus the lowest
            check(span.sum().item() == 0, "the processes would average different gradients: use the same "
                  "layers in each, in one order, if only as 0 * layer(x).sum(), with the same rank and T.")

    def collect(self, p: Tensor) -> Tensor:
        """[R | Y'] of a projected parameter (R where P is not due), the gradient of another; averaged over processes."""
        state, R = self.init(p), self.proxies.get(p, p).grad
        if "P" in state and p not in self.proxies:  # the plain way: what is there is G
            G = rows(average(R) if self.exact else R)
            if self.exact and p in self.turning and R.isfinite().all():
                U, _, Vh = torch.linalg.svd(R.float(), full_matrices=False)  # of G as it came, for the reference code's signs
                state["P"].copy_((U if G is R else Vh.T)[:, : self.group[p]["rank"]])
            R = load(state, "P").to(G.dtype).T @ G
            if p in self.turning and not self.exact:
                R = torch.cat([R, load(state, "M").to(G.dtype) @ G.T], 1)
        R = average(R)
        self.norms[p] = norm(R[:, : max(p.shape)] if "P" in state else R)
        return R

    def move(self, p: Tensor, R: Tensor, ok: Tensor | None = None, shrink: Tensor = torch.ones(())) -> None:
        """Adam on R, then the weight, then the basis; nothing changes if R is not finite (or `ok`, if given, is False).

        Compiled, each is one kernel, and takes what it makes for half of a weight (P N in its dtype). Otherwise all goes in slices,
        so that nothing of a weight's size is ever made.
        """
        state, group, whole = self.state[p], self.group[p], self.compile
        run = compiled if whole else lambda function: function
        lr, t = torch.tensor(group["lr"]), group["t"] + 1
        state["t"] += 1  # on the host, which does not know `ok`
        if "P" in state:
            R, Y = R[:, : max(p.shape)], R[:, max(p.shape) :].T
        ok = self.norms[p].isfinite() if ok is None else ok  # V, its squares, too
        stay = 1 - ok * (lr * group["weight_decay"]) if group["weight_decay"] else torch.ones(())
        how = group["betas"], group["eps"], *(torch.tensor(1 - beta ** state["t"]) for beta in group["betas"]), shrink, ok

        def seed(piece: int) -> Tensor | None:
            """Of the rounding: depends on seed, parameter and step alone."""
            return None if self.exact else torch.tensor(hash((self.seed, self.index[p], t, piece)) % 2**31, dtype=torch.int32)

        if "P" not in state:
            for i, (w, part, moments) in enumerate(zip(split(p.view(-1), whole), split(R, whole), pieces(state, "MV", whole))):
                run(adam_move_)(w, part, moments, *how, lr, stay, seed(i))
            return
        if "V" in state:
            parts = zip(split(R, whole), pieces(state, "MV", whole))
            parts = [run(adam_)(part, moments, *how, p.dtype) for part, moments in parts]
            N = (torch.cat(parts) if len(parts) > 1 else parts[0]).view(R.shape)
        else:
            N = muon(R, state, group["betas"][0], shrink, ok, p.dtype)
        P = run(load)(state, "P", p.dtype)
        A, B = (P, N) if rows(p) is p else (N.T, P.T)  # P N, or its transpose
        size = -(-len(p) // 2) if whole else min(-(-len(p) // 2), -(-SLICE // p.shape[1]))
        for i, (w, a) in enumerate(zip(p.split(size), A.split(size))):
            run(move_)(w, a @ B, lr * group["scale"], stay, seed(i))

        if p in self.turning and not self.exact:
            self.refresh(state, Y, ok)

    refresh = staticmethod(refresh)

    @torch.no_grad()
    def step(self, closure=None):
        """Ends the step: moves every weight that has a gradient and was not moved during the backward pass."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        check(all(p.grad is None for p in self.proxies), "a thin weight has a .grad: "
              "it was used outside its nn.Linear, or the model is wrapped in DDP, and thin sees neither.")  # fmt: skip
        waiting = [p for p in self.group if self.proxies.get(p, p).grad is not None]
        self.agree([*self.norms, *waiting])  # those that have moved, in their order, and those that will
        collected, ok, shrink = map(self.collect, waiting), None, torch.ones(())  # one at a time, as `move` asks for them ...
        if self.max_norm is not None and waiting:  # ... or all, to know their norm first
            collected = list(collected)
            total = norm(torch.stack([*self.norms.values()]))
            ok, shrink = total.isfinite(), (self.max_norm / (total + 1e-6)).clamp(max=1)
        for p, R in zip(waiting, collected):
            self.move(p, R, ok, shrink)
        self.norm = norm(torch.stack([*self.norms.values()])) if self.norms else torch.zeros(())
        self.norms.clear()
        for group in self.param_groups:
            group["t"] += 1
        self.skipped = self.skipped + ~self.norm.isfinite()
        if self.accumulate:
            self.zero_grad()
        self.arm()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but each tensor keeps its dtype. torch would cast moments to bf16, as the weights are.

        Raises:
            ValueError: groups or state that this optimiser would not have made; it stays as it is then.
        """
        saved, groups = state_dict["state"], state_dict["param_groups"]
        form = lambda x: (getattr(x, "dtype", type(x)), getattr(x, "shape", ()))  # noqa: E731
        theirs = [(i, group) for group in groups for i in group["params"]]
        for (i, group), (p, own) in zip(theirs, self.group.items()):
            old, new = saved.get(i, {}), self.empty(p, torch.device("meta"))
            odd = {k for k in old | new if i not in saved or old and form(old.get(k)) != form(new.get(k))}
            odd |= (own.keys() & self.defaults.keys()) - group.keys()
            check(not odd and group["rank"] == own["rank"], f"the saved state of parameter {i}, "
                  f"{tuple(p.shape)}, differs in {sorted(odd) or 'rank'}: set up everything as it was then.")
        super().load_state_dict({"state": {}, "param_groups": groups})
        for module in self.modules:  # else the old state would live on beside the new one until `arm`
            module.galore = None
        for (i, _), p in zip(theirs, self.group):
            self.state[p] = {k: x if k == "t" else x.to(p.device, copy=True) for k, x in saved[i].items()}
        self.arm()

    def __getstate__(self):  # copy and pickle ask for it
        raise TypeError("GaLoreAdamW cannot be copied or pickled: load its state_dict() into a new one.")

    # The thin way: gradients arrive at proxies, and each weight moves when its last one has.

    def arm(self) -> None:
        """Before each step: checks the groups, decides where P is due, gives thin layers state, proxies."""
        for group in self.param_groups:
            rank, T, kind = map(group.get, ("rank", "update_proj_gap", "proj_type"))
            check(kind == "std" and T >= 1, f"proj_type {kind!r} must be 'std', update_proj_gap {T} above 0.")
            for p in group["params"]:
                check(p.dtype in (torch.float32, torch.bfloat16, torch.float16),
                      f"a parameter is {p.dtype}: convert the model to float32, bfloat16 or float16.")
                check(rank is None or p.ndim == 2 and 0 < rank < min(p.shape), f"rank {rank} does not fit a "
                      f"parameter of shape {tuple(p.shape)}: it lies between 0 and a matrix's short side.")
        self.group = {p: group for group in self.param_groups for p in group["params"]}
        self.index = {p: i for i, p in enumerate(self.group)}
        self.turning = {p for p in self.group if self.due(p)}
        for module in self.modules:
            p = module.weight
            module.galore, width = self.init(p), max(p.shape) + min(p.shape) * (p in self.turning)
            if p not in self.proxies or self.proxies[p].shape[1] != width:
                proxy = p.new_zeros(1).expand(len(module.galore["M"]), width)  # owns one number
                self.proxies[p] = proxy.requires_grad_()
                proxy.register_post_accumulate_grad_hook(self.hook(p))
            module.proxy = self.proxies[p]

    def hook(self, p: Tensor | None = None):
        """Calls `arrived`. Holds the optimiser weakly: a parameter whose hook holds it would never be freed."""
        arrived = weakref.WeakMethod(self.arrived)
        return lambda leaf: arrived() and arrived()(leaf if p is None else p, leaf)

    @torch.no_grad()
    def arrived(self, p: Tensor, leaf: Tensor) -> None:
        """leaf.grad has a micro-batch more. After the last one the weight moves, unless the norm is to be known first."""
        self.passes[p] = self.passes.get(p, 0) + 1
        if self.passes[p] > self.accumulate:
            raise RuntimeError(f"a weight got more than {self.accumulate} gradients before opt.step() or "
                               "opt.zero_grad(): raise accumulate, or checkpoint with use_reentrant=False.")
        if self.passes[p] == self.accumulate and self.max_norm is None:
            if not self.norms and dist.is_initialized():  # the first of its backward pass
                self.agree([p, *filter(self.coming, self.group)])
            self.move(p, self.collect(p))
            leaf.grad = None

    def coming(self, p: Tensor) -> bool:
        """Will the backward pass under way complete p's gradient? Asked as in register_multi_grad_hook."""
        leaf = self.proxies.get(p, p)
        return (leaf.requires_grad and self.passes.get(p, 0) == self.accumulate - 1
                and torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for proxy in self.proxies.values():
            proxy.grad = None
        self.passes.clear()
        self.norms.clear()


def norm(x: Tensor) -> Tensor:
    """|x| in fp32, to 1e-7, without an fp32 copy of x."""
    while x.numel() > BLOCK and not x.is_cuda:  # a CPU adds one by one, and so loses 1.4% of 131 M values
        x = torch.cat([torch.linalg.vector_norm(blocks(y), dim=1, dtype=torch.float32) for y in split(x)])
    return torch.linalg.vector_norm(x, dtype=torch.float32)


def average(x: Tensor) -> Tensor:
    """x, in place, averaged over the processes if there are several."""
    if dist.is_initialized():
        dist.all_reduce(x.div_(dist.get_world_size()))
    return x


def check(fine: bool, otherwise: str) -> None:
    if not fine:
        raise ValueError(otherwise)


def param_groups(model: nn.Module, rank: int, update_proj_gap: int = 200, scale: float = 0.25) -> list[dict]:
    """Groups for GaLoreAdamW: the linear layers inside the model's blocks (attention and MLP matrices) get the rank, a group
    per block, which refresh in turn (block i of L at offset i T / L; early on two in a step); embedding, head, norms and biases get none.

    Linear layers are nn.Linear and transformers' Conv1D. A matrix whose short side is not above the rank gets
    none. A warning names all else that is left out, as fused experts, whose parameters have three dimensions.

    Raises:
        ValueError: nothing would get the rank.
    """
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    embedding = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    blocks, left_out = {}, []
    for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        block = re.search(r"\.(\d+)\.", name)
        ranked = block and p in linear and p.ndim == 2 and min(p.shape) > rank
        blocks.setdefault(int(block[1]) if ranked else None, []).append(p)
        if p.ndim > 1 and not ranked and p not in embedding and (block or p not in linear):
            left_out.append((f"{re.sub(r'[.][0-9]+[.]', '.*.', name)} {tuple(p.shape)}", p.numel()))
    rest = blocks.pop(None, [])
    check(blocks, f"no linear layer in a numbered block (layers.0) is trainable and wider than rank {rank}: "
          "unfreeze some, lower the rank, or make groups by hand, with the key 'rank'.")
    if left_out:
        share = sum(n for _, n in left_out) / sum(p.numel() for p in model.parameters())
        warnings.warn(f"{share:.1%} of the parameters get no rank, beside embedding, head, norms and biases: "
                      f"{', '.join(dict(left_out))}", stacklevel=2)
    common = dict(rank=rank, update_proj_gap=update_proj_gap, scale=scale, turns=max(2, len(blocks) // 2))
    T, L = update_proj_gap, len(blocks)
    groups = [dict(params=ps, offset=-(-i * T // L) % T, **common) for i, ps in enumerate(blocks.values())]
    return [*groups, dict(params=rest)]


def thin(model: nn.Module, opt: GaLoreAdamW, accumulate: int = 1, checkpointed: bool = False) -> None:
    """Switches the model's projected linear layers to `ThinLinear`, and the update to the backward pass (layer-wise).

    From here on a step is `accumulate` backward passes and one opt.step(); projected weights have no .grad. The last backward
    pass moves each weight as soon as its gradient is complete; with max_norm, opt.step() moves them all. A projected parameter
    that is not the weight of an nn.Linear keeps its full .grad, and is moved in the same way. Biases and norms do, too.

    checkpointed: the layers stand in blocks whose activations are computed again in the backward pass. X is saved then, and X P
    multiplied in the backward pass alone: in a forward pass that saves nothing it would be made in vain.

    As the projected weights have no .grad: clip with max_norm (torch's clip_grad_norm_ would find nothing), clear with
    opt.zero_grad() (not the model's), move and cast the model before this call, no GradScaler, no DDP around the model (start
    every process from the same weights; R is averaged here), and checkpointing only with use_reentrant=False. A copy of a thin
    model computes, but does not train.

    Nothing passes through a projected weight's own gradient. Hooks on it are not called. A gradient penalty,
    which would have a second-order term there, ends with torch's error "trying to differentiate twice".
    Compile the blocks of the model, not the model. max_grad_norm of transformers' Trainer clips as little as
    clip_grad_norm_.

    Raises:
        ValueError: the optimiser has exact=True (its SVD needs the full gradient), model or optimiser is thin
            already, they do not belong together, or the model is compiled as a whole.
    """
    check(not opt.exact, "exact=True takes an SVD of the full gradient, which the thin way never forms: leave one of them out.")
    check(accumulate >= 1, f"accumulate is {accumulate}, but must be at least 1.")
    check(opt.accumulate is None and not any(isinstance(m, ThinModule) for m in model.modules()),
          "a model is made thin once, by one optimiser: build both anew for another.")  # fmt: skip
    check(any(p in opt.group for p in model.parameters()), "the optimiser holds no weight of this model.")
    check(not hasattr(model, "_orig_mod") and model._compiled_call_impl is None,
          "compile the blocks of a thin model one by one: as a whole it would be compiled at each refresh.")
    if opt.max_norm is None and "transformers.trainer" in sys.modules:
        warnings.warn("Trainer's max_grad_norm clips nothing: use max_norm of GaLoreAdamW.", stacklevel=2)
    linear = (m for m in model.modules() if type(m) is nn.Linear and m.weight.requires_grad)
    opt.accumulate, opt.modules = accumulate, [m for m in linear if opt.group.get(m.weight, {}).get("rank")]
    opt.arm()
    for module in opt.modules:
        module.__class__, module.checkpointed = ThinModule, checkpointed
    for p in (p for p in opt.group if p.requires_grad and p not in opt.proxies):
        p.register_post_accumulate_grad_hook(opt.hook())
    # The backward pass has a thread of its own, and cuSOLVER a handle for each thread, in memory that PyTorch does not manage: made in
    # the first refreshing step it found none left (7B on 23.64 GiB). So it is made now.
    leaf = torch.eye(2, device=next(iter(opt.group)).device, requires_grad=True)
    leaf.register_hook(orthonormal)
    leaf.square().sum().backward()
