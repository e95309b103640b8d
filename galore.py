"""
GaLore: train every weight while Adam's moments live in a rank-r subspace of each gradient.

One step, for a weight matrix W (m x n) with gradient G, seen so that the short side is its rows:
    R = P'G                       project the gradient                    P: m x r, P'P = I; R: r x n
    N, M, V = adam(R, M, V)       direction and moments, of R             r x n
    W <- W - lr * alpha * P N     back to full size                       alpha: `scale`
    every T steps                 P <- orth(Y), and M, V rotate with it   Y = G M': m x r
M averages P'G over past steps, so Y = G M' is about G G'P: one power iteration that starts from the old P.

Any model, any loop:
    opt = GaLoreAdamW(param_groups(model, rank=128), lr=0.01)
    loss.backward()
    opt.step(); opt.zero_grad()
thin.py adds one line, after which G is never formed and each weight moves during the backward pass.

References: GaLore, arXiv 2403.03507, algorithms 1 and 2. Power iteration, and moments that rotate: LDAdam,
2410.16103. Cholesky-QR: 1809.11085. Adam: 1412.6980. AdamW: 1711.05101. Muon: Jordan 2024, 2502.16982; in a
subspace: SUMO, 2505.24749.

Left out on purpose: other sides than the short one, and the two-sided P'GQ, which saves what 8 bits do.
"""

import re
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Storage of moments and weights: load and store translate between fp32 and 8-bit codes.
from adam8bit import BLOCK, Stored, advance_, check, compiled, load, move_, store, zeros


# ----- the subspace -----------------------------------------------------------------------------------------


def rows(W: Tensor) -> Tensor:
    """W or W', so that the short side is the rows; W' of a square matrix, as in the reference code."""
    return W.T if W.shape[0] >= W.shape[1] else W


def orthonormal(Y: Tensor) -> Tensor:
    """Orthonormal basis of the columns of Y (m x r, fp32) by shifted Cholesky-QR (1809.11085, algorithm 4).

    Matrix products and an r x r factorisation: no branch, no wait for the host. P'P = I to 1e-6 if the
    singular values of Y, its columns scaled, spread over no more than 1e6.
    """
    Y = F.normalize(Y, dim=0)
    for shift in (1e-7, 1e-7, 0.0):  # keeps the factorisation alive; the last pass mends what it cost
        A = Y.T @ Y
        A.diagonal().add_(shift * A.trace())
        L, _ = torch.linalg.cholesky_ex(A)
        Y = torch.linalg.solve_triangular(L, Y.T, upper=False).T
    return Y


def refresh(P: Tensor, Y: Tensor) -> Tensor:
    """The next basis, from the old one and Y = G M' (all m x r, fp32). Any orthonormal basis will do. NaN in
    Y must give NaN, not an error.

    We add 1e-3 of the old basis to Y. Where the gradient has no direction left, the old one stays. Otherwise
    the last columns would be rounding noise, which Adam blows up to full size.
    """
    Y = F.normalize(Y / Y.abs().amax().clamp_min(1e-30), dim=0)
    return orthonormal(Y + 1e-3 * P)


def rotate(state: dict[str, Tensor], names: str, new: Tensor, ok: Tensor) -> None:
    """P of `state` becomes `new`, and the moments follow, in place, if ok is True and new is finite.

    With S = P_new' P_old: M <- S M, and V <- (S o S) V, which stays >= 0. That is right for a variance if the
    entries of a column of R are uncorrelated (LDAdam, 2410.16103).
    """
    S = new.T @ load(state, "P").float()
    ok = ok & S.sum().isfinite()
    store(state, "P", new, ok)
    for name in names:
        store(state, name, (S * S if name == "V" else S) @ load(state, name), ok)


# ----- directions -------------------------------------------------------------------------------------------
# A direction is a function of R (r x n, fp32) and its moments, and returns N and the new moments. All have M,
# which averages R; V, if there is one, is a variance, and N is held at 5 where V is in 8 bits. It may ask for
# betas, eps, dtype (of N, and of products) and bias, which is 1 - beta^t for both betas: as tensors, because
# a number would be compiled in.


def adam(R, M, V, betas, eps, bias, **_):
    """M_hat / (sqrt(V_hat) + eps) (1412.6980, algorithm 1)."""
    M = torch.lerp(M, R, 1 - betas[0])
    V = V * betas[1] + R * R * (1 - betas[1])
    return M / bias[0] / ((V / bias[1]).sqrt() + eps), M, V


def muon(R, M, betas, dtype, **_):
    """The momentum of R with all its singular values brought near one, and no V: half of Adam's moments.

    Five Newton-Schulz steps, with coefficients, Nesterov momentum and scale 0.2 sqrt(n) of torch.optim.Muon
    ("match_rms_adamw": steps of about Adam's size). The momentum is the first beta, 0.9; torch's is 0.95.
    """
    M = torch.lerp(M, R, 1 - betas[0])
    X = F.normalize(torch.lerp(R, M, betas[0]), dim=(0, 1), eps=1e-7).to(dtype)
    for _ in range(5):  # X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return 0.2 * X.shape[1] ** 0.5 * X, M


DIRECTIONS = {"adam": (adam, "MV"), "muon": (muon, "M")}  # name: function, its moments


# ----- the optimiser ----------------------------------------------------------------------------------------


def update_(W, scale, R, state, names, direction, lr, alpha, decay, seed, ok, **how) -> None:
    """Moves one weight, its moments and, of a weight in codes, its scales, in place. Where `ok` is False all
    stay. Compiled, it is four kernels: P, the direction, a product, and one that moves."""
    N = advance_(state, names, direction, R, ok=ok, dtype=R.dtype if "P" in state else torch.float32, **how)
    stay = 1 - ok * (lr * decay)
    if "P" in state:
        P, lr = load(state, "P", N.dtype), lr * alpha
        N = N.view(P.shape[1], -1)  # it may have come in blocks of 256
        N = P @ N if len(W) < W.shape[1] else N.T @ P.T  # the second is its transpose
    move_(W, N, lr, stay, seed, scale)


class GaLoreAdamW(Stored):
    """AdamW, in a subspace where a parameter group has a rank: GaLore. One path for both.

    Group keys (galore-torch's, and two more):
        rank: r, below the short side of every matrix of the group; None for plain AdamW.
        update_proj_gap: T, steps between refreshes of P. A change takes effect one step late.
        scale: alpha.
        offset: P is due in the steps t = offset (mod T), so that groups can take turns.
        early_gap: P starts random. It is refreshed four times at the beginning, so many steps apart: at least
            2, because M needs one step in the new basis first.

    Args:
        params: parameters or groups, e.g. from `param_groups`.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's (decay is decoupled, and not projected).
        state_bits: 32, or 8 for moments and P in blockwise 8-bit codes (adam8bit.py).
        max_norm: clip the global norm of all R, and of the gradients that are not projected, to this.
            Clipped or not, it is `norm` after a step, and below the norm of the full gradients.
        direction: a key of DIRECTIONS, for matrices with a rank. The others take Adam's.
        offload: keep the state of matrices without a rank (embedding, head) in host memory. It comes to the
            device for their update.
        compile: fuse the update with torch.compile.
        seed: of the first P and of the rounding; the same on all processes.

    bf16 weights need no fp32 copy: they are rounded stochastically. Adam's bias correction counts the steps
    in which a parameter had a gradient, as torch.optim.AdamW's does; the schedule of P counts the group's. If
    a gradient is not finite, its weight, moments and basis do not change. With max_norm, one bad gradient
    skips the whole step. `skipped` counts such steps. If torch.distributed is initialised, R is averaged. All
    processes must have gradients for the same parameters; if not, an error ends them before anything moves.

    Raises ValueError for an argument, or a group's key or dtype, that cannot be honoured.
    """

    exact = False
    scales = {}  # of weights in int8, by parameter; empty unless thin.py puts its own here

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, state_bits: int = 32, max_norm: float | None = None,
                 direction: str = "adam", offload: bool = False, compile: bool = False, seed: int = 0):
        check(state_bits in (8, 32), f"state_bits is {state_bits}, but moments are kept in 32 or in 8 bits.")
        check(max_norm is None or max_norm > 0, f"max_norm is {max_norm}, but must be above 0, or None.")
        check(direction in DIRECTIONS, f"direction is {direction!r}: choose one of {', '.join(DIRECTIONS)}.")
        self.state_bits, self.max_norm, self.direction = state_bits, max_norm, direction
        self.offload, self.compile, self.seed = offload, compile, seed
        self.norm = self.skipped = torch.zeros(())  # norm of the last step's R; how many steps were bad
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=None, t=0,
                         update_proj_gap=200, scale=0.25, offset=0, early_gap=2, proj_type="std"))

    def arm(self) -> None:
        """After each step, and when groups or state are new: checks the groups, and decides whose P is due in
        the next step. `project` and the thin layers read it in `turning`."""
        self.group = {p: group for group in self.param_groups for p in group["params"]}
        self.index = {p: i for i, p in enumerate(self.group)}  # as in state_dict()
        self.norms = {}  # of each R of the step to come, as soon as it is averaged; empty: nothing has moved
        for p, group in self.group.items():
            rank, T, kind = map(group.get, ("rank", "update_proj_gap", "proj_type"))
            check(kind == "std" and T >= 1, f"proj_type {kind!r} must be 'std', update_proj_gap {T} above 0.")
            check(self.leaf(p).dtype in (torch.float32, torch.bfloat16, torch.float16),
                  f"a parameter is {p.dtype}: convert the model to float32, bfloat16 or float16.")
            check(rank is None or p.ndim == 2 and 0 < rank < min(p.shape),
                  f"rank {rank} must be above 0 and below the short side of {tuple(p.shape)}.")
        self.turning = {p for p, group in self.group.items() if group["rank"] and self.due(group)}

    def due(self, group: dict) -> bool:
        """Are the bases of this group refreshed in the next step? Early on offsets shrink as the gap does:
        for a gap of 4 and T = 200, offset 100 is 2."""
        t, T, early_gap = group["t"] + 1, group["update_proj_gap"], group["early_gap"]
        gap = T if t > 4 * early_gap + 1 else min(T, early_gap)
        return t > 1 and (t - group["offset"] * gap // T) % gap == 0

    def empty(self, p: Tensor, device: torch.device) -> dict:
        """The form of p's state: P (m x r), moments (r x n, or p's shape), and the number of its steps, t."""
        state, names, shape, narrow = dict(t=0), "MV", p.shape, self.state_bits == 8
        if rank := self.group[p]["rank"]:
            state |= zeros("P", (min(shape), rank), self.leaf(p).dtype, narrow and not self.exact, device)
            names, shape = DIRECTIONS[self.direction][1], (rank, max(shape))
        return state | zeros(names, shape, torch.float32, narrow, device)

    def far(self, p: Tensor) -> bool:
        """Does the state of p live in host memory?"""
        return self.offload and not self.group[p]["rank"] and p.ndim > 1

    def init(self, p: Tensor) -> dict:
        """The state of p, made when first asked for. The first P depends on seed and parameter alone."""
        if not self.state[p]:
            state = self.empty(p, p.device)  # placed only if far: a copy would not fit in the first step
            self.state[p] = self.place(p, state) if self.far(p) else state
            if "P" in state:
                seed = (self.seed * 0x9E3779B1 + self.index[p] * 0x85EBCA6B) % 2**32
                random = torch.Generator(p.device).manual_seed(seed)
                start = torch.randn(state["P"].shape, generator=random, device=p.device)
                store(state, "P", orthonormal(start), ok=torch.tensor(True))
        return self.state[p]

    def leaf(self, p: Tensor) -> Tensor:
        """The tensor whose .grad holds the gradient of p."""
        return p

    def project(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """R = P'G, and Y = G M' where P is due, averaged over processes. Without a rank, R is G."""
        state = self.init(p)
        if "P" not in state:
            return average(p.grad), None
        G = rows(p.grad)
        R = average(load(state, "P", G.dtype).T @ G)
        return R, average(G @ load(state, "M", G.dtype).T) if p in self.turning else None

    def noise(self, p: Tensor) -> Tensor | None:
        """Seed of the rounding: depends on the optimiser's seed, parameter and step alone."""
        mixed = hash((self.seed, self.index[p], self.group[p]["t"] + 1)) % 2**31
        return None if self.exact else torch.tensor(mixed, dtype=torch.int32)

    def move(self, p: Tensor, R: Tensor, Y: Tensor | None, ok: Tensor | None = None, shrink=1.0) -> None:
        """Moves the weight and its moments, and turns the basis if Y is given. If `ok` is not known yet: |R|
        is finite. The norm and not R alone, as V holds squares."""
        if ok is None:
            self.norms[p] = R.norm(dtype=torch.float32)
            ok = self.norms[p] < torch.inf  # False for NaN, too
        group, own = self.group[p], self.state[p]
        own["t"] += 1  # on the host, which does not know `ok`
        state = {k: x.to(p.device, copy=self.far(p), non_blocking=True) for k, x in own.items() if k != "t"}
        direction, names = DIRECTIONS[self.direction if "P" in state else "adam"]
        bias = [torch.tensor(1 - beta ** own["t"]) for beta in group["betas"]]
        # Adam works on elements. In blocks, the same memory, it compiles to one kernel.
        shape = (-1, BLOCK) if direction is adam and R.numel() % BLOCK == 0 and p.is_contiguous() else R.shape
        viewed = state | {name: state[name].view(shape) for name in names}
        W = p if "P" in state else p.view(shape)
        run = compiled if self.compile else lambda function: function
        run(update_)(W, self.scales.get(p), R.reshape(shape), viewed, names, direction,
                     torch.tensor(group["lr"]), group["scale"], group["weight_decay"], self.noise(p), ok,
                     shrink=shrink, betas=group["betas"], eps=group["eps"], bias=bias)
        if self.far(p):
            for name, x in state.items():
                own[name].copy_(x)  # and waits: whoever saves it finds it there
        if Y is not None:
            run(rotate)(state, names, refresh(load(state, "P").float(), Y.float()), ok)

    @torch.no_grad()
    def step(self, closure=None):
        """Moves every weight that has a gradient and has not moved yet."""
        loss = closure and torch.enable_grad()(closure)()
        waiting = [p for p in self.group if self.leaf(p).grad is not None]
        self.agree(self.norms, waiting)
        projected = {}
        for p in waiting:
            if self.max_norm is None:
                self.move(p, *self.project(p))
            else:  # all norms must be known first
                projected[p] = R, _ = self.project(p)
                self.norms[p] = R.norm(dtype=torch.float32)
        self.norm = nn.utils.get_total_norm(self.norms.values())
        ok, shrink = self.norm.isfinite(), ((self.max_norm or torch.inf) / (self.norm + 1e-6)).clamp(max=1)
        for p, (R, Y) in projected.items():
            self.move(p, R, Y, ok, shrink)
        self.skipped = self.skipped + ~ok
        for group in self.param_groups:
            group["t"] += 1
        self.arm()
        return loss

    def agree(self, moved, coming) -> None:
        """Checks that all processes have averaged, and will, the same parameters in the same order: else
        weights would be mixed. An exchange of 16 bytes, for which the host waits on a GPU, too."""
        if dist.is_initialized():
            ps = *moved, *coming
            code = hash(tuple((self.index[p], *self.init(p)["M"].shape, p in self.turning) for p in ps))
            span = torch.tensor([code, -code], device=next(iter(self.group)).device)
            dist.all_reduce(span, dist.ReduceOp.MAX)  # the highest code, and minus the lowest
            check(span.sum().item() == 0, "the processes would average different gradients: use the same "
                  "layers in each, in one order, if only as 0 * layer(x).sum(), with the same rank and T.")


class Exact(GaLoreAdamW):
    """The paper and its code to the letter. An SVD of G makes P before G is projected, in steps 1, T + 1, ...
    skipped or not. P is never in 8 bits. Moments do not rotate. Weights are rounded to nearest."""

    exact = True

    def due(self, group: dict) -> bool:
        return group["t"] % group["update_proj_gap"] == 0

    def project(self, p: Tensor) -> tuple[Tensor, None]:
        G, state = average(p.grad), self.init(p)
        if p in self.turning and G.isfinite().all():
            U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)  # not of rows(G): its signs
            state["P"].copy_((U if rows(G) is G else Vh.T)[:, : self.group[p]["rank"]])
        return state["P"].to(G.dtype).T @ rows(G) if "P" in state else G, None


def average(x: Tensor) -> Tensor:
    """x, in place, averaged over the processes if there are several."""
    if dist.is_initialized():
        dist.all_reduce(x.div_(dist.get_world_size()))
    return x


def param_groups(model: nn.Module, rank: int, update_proj_gap: int = 200, scale: float = 0.25) -> list[dict]:
    """Groups for GaLoreAdamW. The linear layers inside the model's blocks (attention and MLP matrices) get
    the rank, a group per block. Blocks are refreshed in turn: block i of L at offset i T / L, at first two in
    a step. Embedding, head, norms and biases get no rank.

    Linear layers are nn.Linear and transformers' Conv1D. A matrix whose short side is not above the rank gets
    none. A warning names what else gets none, as fused experts, whose parameters have three dimensions.
    Decay reaches norms and biases, too: split the last group, as `prepare` in train.py does.
    Raises ValueError if nothing would get the rank.
    """
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    blocks, rest, left_out = {}, [], set()
    for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        block = re.search(r"(?:^|\.)(\d+)\.", name)
        if block and p in linear and p.ndim == 2 and min(p.shape) > rank:
            blocks.setdefault(block[1], []).append(p)
        else:
            rest.append(p)
            if block and p.ndim > 1:
                left_out.add(re.sub(r"\b[0-9]+\b", "*", name) + f" {tuple(p.shape)}")
    check(blocks, f"no linear layer in a numbered block (layers.0) is trainable and wider than rank {rank}: "
          "unfreeze some, lower the rank, or make groups by hand, with the key 'rank'.")
    if left_out:
        warnings.warn(f"matrices in blocks that get no rank: {', '.join(sorted(left_out))}", stacklevel=2)
    T, L = update_proj_gap, len(blocks)
    groups = [dict(params=ps, rank=rank, update_proj_gap=T, scale=scale, offset=-(-i * T // L) % T,
                   early_gap=max(2, -(-L // 2))) for i, ps in enumerate(blocks.values())]
    return [*groups, dict(params=rest)]
