"""How much memory does a training step take? The step itself, run on tensors that have no memory.

Meta tensors have shapes and nothing else, so a step of the 7B model runs on a laptop. PyTorch's MemTracker
sees each tensor come and go. So the plan follows whatever model and optimiser do, in changed code, too. But
attention and norm have stand-ins, and, where the step is compiled, SwiGLU, loss and update. Change these
together with them.
The step is a late one, when every state is there, and has a first, a middle and a last micro-batch. As many
blocks are due for a refresh as in the fullest step.

The peak of each part of a step is linear in the number of equal blocks, of those that keep their activations
and of those that compute them again: models of few blocks tell of all.

Left out: CUDA's context, libraries and gaps, for which `room` is left.
"""
from contextlib import ExitStack
from functools import cache, partial
from unittest import mock

import torch
import torch.nn.functional as F

from adam8bit import check, scale_key
from galore import adam
from model import Config
from plumbing.files import over_all, world

CPU = torch.Generator()
CARD = 24.72  # GB free on an RTX 4090: of 23.64 GiB an H200 left so much, once CUDA had begun
KINDS = {"weights": ("Parameter", "Buffer"), "state": ("Other",), "gradients": ("Gradient",),
         "activations": ("Activation",), "temporaries": ("Temp", "Optstate")}


def attention(q, k, v, *options, **more):
    """The fused kernel. For meta tensors torch would take its slow one, which keeps a T x T matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def rms_norm(x, shape, weight, eps):
    """The fused kernel keeps x and a number per row, this one two. Meta tensors would get the formula."""
    return F.layer_norm(x, shape, weight, eps=eps)


# Compiled code reads and writes moments, weights and logits within its kernels. What it makes are the factors
# of its products. These stand for what compiles to no more than a pass over memory.

def dequantise(codes, scale, signed):
    return codes if scale is None else codes.new_empty(codes.shape, dtype=torch.float32)


def load(state, name, dtype=None):
    return dequantise(state[name], state.get(scale_key(name)), True).to(dtype)


def advance_(state, names, direction, R, dtype, **more):
    if direction is adam:
        return R.new_empty(R.shape, dtype=dtype) if "P" in state else R
    return direction(R.float(), *(load(state, name) for name in names), dtype=dtype, **more)[0]


class Silu(torch.autograd.Function):
    """Its product keeps gate and up, and no more. The backward pass of both is one kernel: it reads gate, up
    and a gradient, and writes their product once more, and two gradients. Two of these six are there."""

    @staticmethod
    def forward(ctx, gate):
        ctx.save_for_backward(gate)
        return gate.view_as(gate)

    @staticmethod
    def backward(ctx, D):
        D.new_empty(4, *D.shape)  # the others
        return D


def loss_of_chunk(z, targets, count, training):
    return z.new_empty((), dtype=torch.float32), torch.empty_like(z) if training else None


def nothing(*args, **more):
    pass


# What is put aside while a step is simulated, and what more where it is compiled.
STAND_INS = {"torch.Generator": lambda device: CPU,  # there is none for meta tensors
             "torch.distributed.is_initialized": lambda: False,  # nor can they be sent
             "torch.nn.functional.scaled_dot_product_attention": attention,
             "torch.nn.functional.rms_norm": rms_norm}
COMPILED = {"thin.dequantise": dequantise, "model.Llama.loss_of_chunk": staticmethod(loss_of_chunk),
            "torch.nn.functional.silu": Silu.apply,
            "galore.load": load, "galore.advance_": advance_, "galore.store": nothing,
            "galore.move_": nothing}


def simulate(build, step, blocks: tuple[int, int], due: int, tokens: tuple[int, int],
             compiled: bool) -> dict[tuple, dict]:  # fmt: skip
    """GB by kind at the fullest moment of each part of a step: a forward pass, a backward pass, opt.step().

    build(*blocks): a model on "meta" of blocks that recompute and that keep, its optimiser, and how many
    micro-batches a step has; step(model, opt, batches, micro_batches): takes it; due: how many blocks are
    refreshed, one of them the last, whose backward pass comes first; tokens: sequences, tokens of each;
    compiled: is the step?
    """
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

    class Tracker(MemTracker):
        parts, micro_batch = {}, 0

        def _update_peak_stats(self, state):
            part, now = (self.micro_batch, self._mod_tracker.is_bw, self._in_opt), self._curr_mem_snap[device]
            if now["Total"] > self.parts.get(part, now)["Total"] or part not in self.parts:
                self.parts[part] = dict(now)

        # its statistics by module allow one forward pass only
        _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = nothing

    tracker, device = Tracker(), torch.device("meta")
    with ExitStack() as stack:
        for name, stand_in in (STAND_INS | COMPILED if compiled else STAND_INS).items():
            stack.enter_context(mock.patch(name, stand_in))
        model, opt, micro_batches = build(*blocks)
        ranked = [group for group in opt.param_groups if group["rank"]]
        for i, group in enumerate(ranked, 1):
            next_due = i == len(ranked) or i < due  # the last, and the first
            group["t"] = 1000 * group["update_proj_gap"] + group["offset"] - next_due
        state = [(x, opt.far(p)) for p in opt.group for x in opt.init(p).values() if torch.is_tensor(x)]
        opt.arm()

        def gradient(leaf):
            if leaf.grad is not None:  # None: its weight has moved already
                tracker._update_and_maybe_create_winfos(leaf.grad, _MemRefType.GRAD)

        for leaf in map(opt.leaf, opt.group):
            leaf.register_post_accumulate_grad_hook(gradient)

        def batches():
            while True:
                tracker.micro_batch += 1
                yield (torch.zeros(tokens, dtype=torch.long, device=device),) * 2

        tracker.track_external(model, *(x for x, _ in state))
        with tracker:
            step(model, opt, batches(), micro_batches)
    for peak in tracker.parts.values():
        peak[_MemRefType.OTH] -= sum(x.nbytes for x, far in state if far)
    return {part: {kind: sum(peak[_MemRefType(name)] for name in names) / 1e9
                   for kind, names in KINDS.items()} for part, peak in tracker.parts.items()}


def total(table: dict) -> float:
    return sum(table.values())


def line(a: dict, *steps: tuple[dict, dict, float]) -> dict[str, float]:
    """a, and for each step (b, c, n) n times what c has more than b, kind by kind."""
    return {kind: a[kind] + sum(n * (c[kind] - b[kind]) for b, c, n in steps) for kind in a}


def peak(build, step, blocks: int, gap: int, tokens: tuple[int, int], compiled: bool):
    """A function of how many blocks recompute, to GB by kind at the fullest moment of a step. Each block is
    due once in `gap` steps; early on, two."""
    due = max(2, -(-blocks // gap))
    few = min(due, blocks)
    parts = cache(lambda *pair: simulate(build, step, pair, due, tokens, compiled))

    def fullest(recompute: int) -> dict[str, float]:
        keep, tables = blocks - recompute, []
        kept = [parts(0, few), parts(0, few + 1)] if keep else []
        again = [parts(few, 0), parts(few + 1, 0)] if recompute else kept
        for part in again[0]:
            less, more = (simulated[part] for simulated in again)
            if recompute:  # fullest while one of these does so, and nothing that is kept is left
                tables.append(line(less, (less, more, blocks - few)))
            if keep:  # fullest while all that is kept is there
                first, second = (simulated[part] for simulated in kept)
                tables.append(line(first, (first, second, keep - few), (less, more, recompute)))
        return max(tables, key=total)

    return fullest


def room(free: float) -> float:
    """What tensors may take of the GB that are free. On an H200 libraries took 0.35 and gaps 0.24 of 24.7."""
    return max(0.98 * free - 0.4, 0.0)


def choose(peak, sizes: list[int], counts: list[int], free: float, blocks: int,
           seq_len: int) -> tuple[int, int, dict]:  # fmt: skip
    """Micro-batch, how many blocks recompute, and GB by kind: the fastest that fits, else the smallest.

    A step counts three forward passes, and one more of the blocks that recompute. A micro-batch counts 200
    tokens more than it has, for what does not depend on its size. (7B: 100 on a 4090, by the bytes of
    kernels.py, and 1,350 on an H200, measured, whose host could not launch faster.)

    peak(size): a function of the count to GB by kind; sizes, counts: rising; free: GB; blocks: of the model.
    """
    def cost(size, count):
        return (3 + count / blocks) * (1 + 200 / (size * seq_len))

    def need(size, count):
        return total(peak(size)(count))

    best = None
    for size in reversed(sizes):
        if (not best or cost(size, counts[0]) < cost(*best)) and need(size, counts[-1]) < free:
            count = next(count for count in counts if need(size, count) < free)
            best = min(best or (size, count), (size, count), key=lambda pair: cost(*pair))
    size, count = best or min(((size, counts[-1]) for size in sizes), key=lambda pair: need(*pair))
    return size, count, peak(size)(count)


def fit(args, config: Config, plan) -> None:
    """Sets args.batch_size and args.recompute where they are None: on a GPU by simulating steps, on a CPU to
    at most 8,192 tokens at once and none. Prints the plan if args.plan is set.

    plan(args, config, batch_size): a function of the blocks that recompute, to GB by kind of a step. Raises
    ValueError if the run does not fit, or no step can be simulated."""
    gpu, blocks = args.device == "cuda", config.num_hidden_layers
    simulated = args.plan or gpu and None in (args.batch_size, args.recompute)
    check(not args.exact or not simulated, "--exact takes an SVD, which cannot be simulated: do without "
          "--plan, and on a GPU give --batch_size and --recompute")
    most = max(1, (131_072 if gpu or args.plan else 8192) // args.seq_len)  # larger ones are no faster
    sizes = [args.batch_size] if args.batch_size else [
        2**i for i in range(18) if args.total_batch_size % (2**i * world()) == 0 and 2**i <= most]
    counts = [*range(blocks + 1)] if args.recompute is None else [min(args.recompute, blocks)]
    if not simulated:
        args.batch_size, args.recompute = sizes[-1], counts[0]
        return
    free = -over_all(-torch.cuda.mem_get_info()[0] / 1e9) if gpu else CARD  # GB, on the fullest GPU
    try:
        args.batch_size, args.recompute, table = choose(
            cache(partial(plan, args, config)), sizes, counts, room(free), blocks, args.seq_len)
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        # Another torch, or a model whose steps depend on values.
        raise ValueError(f"no step can be simulated here ({type(error).__name__}: {error}): give "
                         "--batch_size and --recompute, and do without --plan") from error
    need = total(table)
    if args.plan:
        print("\n".join(f"{kind:<12}{share:9.3f} GB" for kind, share in table.items()))
        card = " on an RTX 4090" * (not gpu)
        print(f"--batch_size {args.batch_size}, --recompute {args.recompute}; of {free:.2f} GB free{card} "
              f"tensors may take {room(free):.2f}{': THIS RUN DOES NOT FIT' * (need >= room(free))}\n"
              f"peak {need:.2f} GB")
    check(args.plan or need < room(free), f"this run needs {need:.1f} GB, and of {free:.1f} GB free tensors "
          f"may take {room(free):.1f}: take a smaller --size, or what you do not use yet: --galore, a lower "
          "--rank, --state_bits 8, --offload, --weight_bits 8")
