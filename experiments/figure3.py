"""
Figure 3 of the paper: GaLore with any optimiser, each next to its full-rank self.

    python experiments/figure3.py            toy on bytes: 24 runs of two minutes on one core; writes results/figure3.json, figures/figure3.png
    python experiments/figure3.py --quick    6 steps of a tiny model

`Projected` is the paper's Algorithm 1: two lines around the step of an optimiser that knows nothing of it. (For AdamW, galore.GaLoreAdamW is the
better choice: no gradient, no Z, moments that turn with the basis, 8-bit P.) The paper's figure has AdamW, 8-bit Adam and Adafactor, its Adafactor with a first moment; torch's has none. Left out on purpose: closures, but for those that call `project_back`
first and `project` last (torch.optim.LBFGS works so); sparse gradients.
"""

import torch
from runs import begin, can_draw, details, options, parse, plot, rates_of, show, spread, sweep, title, write  # first: it finds the files below
from torch import nn
from torch.nn.functional import normalize

from galore import GaLoreAdamW, orthonormal, param_groups, rows


class Projected:
    """Algorithm 1 (2403.03507): `matrices` are trained by an optimiser that holds Z (r x n each) in their place.

        galore = Projected(matrices, rank=128)
        opt = torch.optim.Adafactor([*galore.Z, *other_parameters], lr=0.05)
        for x, y in batches:
            model(x, y).backward()
            galore.project()           # G becomes R = P'G, the gradient of Z
            opt.step()
            galore.project_back()      # the move of Z becomes one of W

    W = W_outside + alpha P Z: so Z moves by -lr N as R would have it, and W by -lr alpha P N. What an optimiser reads of its parameter (Adafactor its
    size, weight decay its value) it reads of the part of W inside the subspace: with Adafactor alpha cancels. P is refreshed every T steps, starting with the first, by one
    power iteration G G'P from the P before; moments stay as they are, as in the paper. All in the dtype of the matrices.

    Raises:
        ValueError: a parameter that is no matrix, or a rank above its short side.
    """

    def __init__(self, matrices, rank: int, update_proj_gap: int = 200, scale: float = 0.25):
        self.W, self.T, self.alpha, self.t = list(matrices), update_proj_gap, scale, 0
        for W in self.W:
            if W.ndim != 2 or not 0 < rank <= min(W.shape):
                raise ValueError(f"rank {rank} does not fit a parameter of shape {tuple(W.shape)}: at least 1, at most a matrix's short side.")
        self.P = [orthonormal(torch.randn(min(W.shape), rank, device=W.device)).to(W.dtype) for W in self.W]
        self.Z = [nn.Parameter(W.new_zeros(rank, max(W.shape))) for W in self.W]

    @torch.no_grad()
    def project(self) -> None:
        for W, P, Z in zip(self.W, self.P, self.Z):
            G = rows(W.grad)
            if self.t % self.T == 0:
                Y = (G @ (G.T @ P)).float()
                P.copy_(orthonormal(normalize(Y, dim=0) + 1e-3 * P))  # the trace of the old basis: as in galore.refresh
                Z.copy_(P.T @ rows(W) / self.alpha)
            Z.grad, W.grad = P.T @ G, None
        self.t += 1

    @torch.no_grad()
    def project_back(self) -> None:
        for W, P, Z in zip(self.W, self.P, self.Z):
            rows(W).add_(P @ (self.alpha * Z - P.T @ rows(W)))


OPTIMISERS = {
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr, weight_decay=0),
    "8-bit Adam": lambda params, lr: GaLoreAdamW(params, lr, state_bits=8),  # no group has a rank
    "Adafactor": lambda params, lr: torch.optim.Adafactor(params, lr, weight_decay=0),  # lr is relative to the weight's size, and at most t**-0.5
    "SGD, momentum": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
}
RATES = {"AdamW": [0.0005, 0.001, 0.002], "8-bit Adam": [0.0005, 0.001, 0.002], "Adafactor": [0.0125, 0.025, 0.05], "SGD, momentum": [0.1, 0.3, 1.0],
         "GaLore, AdamW": [0.005, 0.01, 0.02], "GaLore, 8-bit Adam": [0.005, 0.01, 0.02], "GaLore, Adafactor": [0.0125, 0.025, 0.05],
         "GaLore, SGD, momentum": [0.3, 1.0, 3.0]}  # fmt: skip


def build(model, run: dict) -> torch.optim.Optimizer:
    make = OPTIMISERS[run["optimiser"]]
    if not run["galore"]:
        return make(list(model.parameters()), run["lr"])
    *blocks, others = param_groups(model, rank=1)
    galore = Projected([p for group in blocks for p in group["params"]], run["rank"], run["T"], run["alpha"])
    opt = make([*galore.Z, *others["params"]], run["lr"])
    opt.register_step_pre_hook(lambda *_: galore.project())
    opt.register_step_post_hook(lambda *_: galore.project_back())
    opt.beside = [*galore.P, *galore.Z]
    return opt


def picture(found: dict[str, dict], setting: dict, path) -> None:
    """A panel for each optimiser: training loss, and validation loss at the end, of both its runs."""
    figure = plot.Figure(figsize=(11, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(OPTIMISERS), sharey=True), OPTIMISERS):
        for method, colour, style in ((name, "black", "--"), (f"GaLore, {name}", plot.COLOURS[0], "-")):
            run = found.get(method, {}).get("run")
            if run:
                axes.plot(*zip(*run["curve"]), style, color=colour, linewidth=1.2, label=f"{'GaLore' if colour != 'black' else 'full rank'}, lr {run['lr']:g}")
                axes.plot(run["steps"], run["val_loss"], "o", color=colour)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8.5)
    figure.axes[0].set_ylim(top=1.05 * max(result["run"]["curve"][0][1] for result in found.values()))  # what is worse than the start is left out
    figure.axes[0].set_ylabel("loss, nats a token")
    figure.suptitle(f"{title(setting)}; lines: training, dots: validation", fontsize=9)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = options(__doc__)
    args, setting = parse(parser)
    if setting["dtype"] != "float32":
        parser.error("in bf16 torch's optimisers round and keep moments in another way than 8-bit Adam here: leave --dtype out")
    methods = {prefix + name: dict(optimiser=name, galore=bool(prefix)) for name in OPTIMISERS for prefix in ("", "GaLore, ")}
    found = sweep(build, methods, {name: rates[1:2] if args.quick else rates for name, rates in RATES.items()}, setting, args)
    rows = [{"optimiser": name, "validation loss": spread(result["losses"]), "states, MB (with GaLore: P and Z, too)": round(result["run"]["state_bytes"] / 1e6, 2),
             **rates_of(result)} for name, result in found.items()]  # fmt: skip
    show(title(setting), rows)
    write(args, setting, table=rows, **details(found))
    if can_draw():
        picture(found, setting, args.figure)


if __name__ == "__main__":
    begin(main)
