"""How much memory does a training step take? The step itself, run on tensors that have no memory.

Meta tensors have shapes and nothing else, so a step of the 7B model runs on a laptop. PyTorch's MemTracker
sees each tensor come and go. So the plan follows whatever model and optimiser do, in changed code, too. The
step is a late one, when every state is there, and has a first, a middle and a last micro-batch. As many
blocks are due for a refresh as in the fullest step.

The peak of each part of a step is linear in the number of equal blocks: two models of few blocks tell of all.
It is linear in the micro-batch, too, from a whole chunk of the loss on. Smaller ones are simulated.

Left out: the CUDA context (about half a GB), workspaces of kernels, gaps. torch.compile takes less than this.
"""
from functools import cache, partial
from unittest import mock

import torch

from model import CHUNK_LOGITS, Config
from plumbing.files import highest, world

CARD = 24.14  # GB for a run on an RTX 4090: of 23.64 GiB half a GB is CUDA's own, and 3% are for gaps
KINDS = {"weights": ("Parameter", "Buffer"), "state": ("Other",), "gradients": ("Gradient",),
         "activations": ("Activation",), "temporaries": ("Temp", "Optstate")}


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The fused kernel. For meta tensors torch would take its slow one, which keeps a T x T matrix."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, is_causal=is_causal, attn_mask=attn_mask, scale=scale)[0]


def few_slices(x, size, dim=0, split=torch.split):
    """Of many equal slices, which are updated one after the other, three tell what one of them takes."""
    parts = split(x, size, dim)
    return parts if len(parts) <= 8 else (*parts[:2], parts[-1])


def simulate(build, step, blocks: int, due: int, tokens: tuple[int, int]) -> dict[tuple, dict[str, float]]:
    """GB by kind at the fullest moment of each part of a step: a forward pass, a backward pass, opt.step().

    build(blocks): model with so many blocks, on "meta", its optimiser, and how many micro-batches a step has;
    step(model, opt, batches, micro_batches): takes it; due: how many blocks are refreshed, one of them the
    last, whose backward pass comes first, with all activations there; tokens: sequences, tokens of each.
    """
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

    class Tracker(MemTracker):
        parts, micro_batch = {}, 0

        def _update_peak_stats(self, state):
            part, now = (self.micro_batch, self._mod_tracker.is_bw, self._in_opt), self._curr_mem_snap[device]
            if now["Total"] > self.parts.get(part, now)["Total"] or part not in self.parts:
                self.parts[part] = dict(now)

        def nothing(self, *args):  # its statistics by module allow one forward pass only
            pass

        _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = nothing

    tracker, cpu, device = Tracker(), torch.Generator(), torch.device("meta")
    with (mock.patch("torch.Generator", lambda device: cpu),  # there is none for meta tensors
          mock.patch("torch.distributed.is_initialized", lambda: False),  # nor can they be sent
          mock.patch("adam8bit.cut", few_slices), mock.patch("galore.cut", few_slices),
          mock.patch("torch.nn.functional.scaled_dot_product_attention", attention)):
        model, opt, micro_batches = build(blocks)
        ranked = [group for group in opt.param_groups if group["rank"]]
        for i, group in enumerate(ranked):
            group["t"] = 1000 * group["update_proj_gap"] + group["offset"]
            group["t"] -= i == len(ranked) - 1 or i < due - 1
        states = [opt.init(p) for p in opt.group]
        opt.arm()
        leaves = [*opt.group, *map(opt.leaf, opt.group)]

        def gradients(*_):
            for grad in (leaf.grad for leaf in leaves if leaf.grad is not None):
                tracker._update_and_maybe_create_winfos(grad, _MemRefType.GRAD)

        def batches():
            while True:
                gradients()
                tracker.micro_batch += 1
                yield (torch.zeros(tokens, dtype=torch.long, device=device),) * 2

        opt.register_step_pre_hook(gradients)
        tracker.track_external(model, *(x for state in states for x in state.values() if torch.is_tensor(x)))
        with tracker:
            step(model, opt, batches(), micro_batches)
    return {part: {kind: sum(peak[_MemRefType(name)] for name in names) / 1e9
                   for kind, names in KINDS.items()} for part, peak in tracker.parts.items()}


def between(a: dict, b: dict, share: float) -> dict[str, float]:
    """On the line through a and b, kind by kind: a at 0, b at 1."""
    return {kind: a[kind] + (b[kind] - a[kind]) * share for kind in a}


def peak(build, step, blocks: int, gap: int, tokens: tuple[int, int]) -> dict[str, float]:
    """The fullest part of a step of any number of blocks. Each is due once in `gap` steps; early on, two."""
    due = max(2, -(-blocks // gap))
    few = min(due, blocks)
    parts = simulate(build, step, few, due, tokens)
    if few < blocks:
        more = simulate(build, step, few + 1, due, tokens)
        parts = {part: between(parts[part], more[part], blocks - few) for part in parts}
    return max(parts.values(), key=lambda table: sum(table.values()))


def choose(peak, sizes: list[int], ways: list[bool], free: float, whole: int) -> tuple[int, bool, dict]:
    """Micro-batch, way and GB by kind: the first way in which anything fits, and the largest size that fits
    in it; the smallest if none does.

    peak(size, way): GB by kind; sizes: rising; free: GB; whole: the size from which on the peak is linear.
    """
    fits = lambda table: sum(table.values()) < free  # noqa: E731
    way = next((way for way in ways[:-1] if fits(peak(sizes[0], way))), ways[-1])
    line = [size for size in sizes if size >= whole]
    if line:
        first, second = line[0], line[:2][-1]
        low, high = peak(first, way), peak(second, way)
        for size in reversed(line):
            table = between(low, high, (size - first) / max(1, second - first))
            if fits(table):
                return size, way, table
    for size in [size for size in reversed(sizes) if size < whole] or sizes[:1]:
        table = peak(size, way)
        if fits(table):
            break
    return size, way, table


def fit(args, config: Config, plan) -> None:
    """Sets args.batch_size and args.activation_checkpointing where they are None: on a GPU by simulating
    steps, on a CPU to at most 8,192 tokens at once. Prints the plan if args.plan is set.

    plan(args, config, batch_size, checkpointing): GB by kind of a step. Raises ValueError if the run does not
    fit, or no step can be simulated."""
    gpu, ways = args.device == "cuda", [args.activation_checkpointing]
    most = max(1, (131_072 if gpu or args.plan else 8192) // args.seq_len)  # larger ones are no faster
    sizes = [2**i for i in range(18) if args.total_batch_size % (2**i * world()) == 0 and 2**i <= most]
    sizes = [args.batch_size] if args.batch_size else sizes
    if not args.plan and (not gpu or args.batch_size and ways[0] is not None):
        args.batch_size, args.activation_checkpointing = sizes[-1], bool(ways[0])
        return
    free = -highest(-0.97 * torch.cuda.mem_get_info()[0] / 1e9) if gpu else CARD  # GB, on the fullest GPU
    try:
        size, way, table = choose(
            cache(partial(plan, args, config)), sizes, ways if ways[0] is not None else [False, True], free,
            CHUNK_LOGITS // config.vocab_size // args.seq_len)
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        # Another torch, or a model whose steps depend on values.
        raise ValueError(f"no step can be simulated here ({type(error).__name__}): give --batch_size and "
                         "--activation_checkpointing or its --no- form, and do without --plan") from error
    need, args.batch_size, args.activation_checkpointing = sum(table.values()), size, way
    if args.plan:
        print("\n".join(f"{kind:<12}{share:9.3f} GB" for kind, share in table.items()))
        print(f"--batch_size {size}, --{'no-' * (not way)}activation_checkpointing; {free:.2f} GB are free"
              f"{': THIS RUN DOES NOT FIT' * (need >= free)}\npeak {need:.2f} GB")
    elif need >= free:
        raise ValueError(f"this run needs {need:.1f} GB, {args.device} has {free:.1f}: take a lower --rank, "
                         "--state_bits 8, --weight_bits 8, or a smaller --size")
