"""
What does a GPU have to do for one training step? Operations launched and bytes moved, without a GPU.

    pip install -r requirements.txt triton
    python experiments/kernels.py                               7B, 256 tokens: tables, and results/kernels.json
    python experiments/kernels.py --weight_bits 8 --rank 512    other options of train.py, printed only

A step of train.py runs on fake tensors, compiled. For each function that is compiled, Inductor writes the Triton
code that it would run on an RTX 4090; nothing is run. What is counted, from a model of one block and one of two:
operations, which are Triton kernels, calls of libraries (matrix products, attention) and what is left to the
eager mode (embedding, head, the loss's products); and bytes, what these read and write at least once.

The code has the CPU's attention, one call as well. A kernel that gathers from a tensor counts as one that reads all
of it. Left out: scalars, which the host makes.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._inductor.config
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from model import Llama  # noqa: E402

HERE, GPU = Path(__file__).parent, torch.device("cuda", 0)
STEP = "--size 7b --galore --rank 1024 --state_bits 8 --vocab_size 32000 --batch_size 1 --total_batch_size 1 --no-offload --recompute 0"
CARD = dict(type="cuda", index=0, cc=89, major=8, multi_processor_count=128, regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=1536, max_threads_per_block=1024, warp_size=32)  # fmt: skip
CASES = {"bf16": STEP, "int8": STEP + " --weight_bits 8", "Muon": STEP + " --direction muon"}
PRETEND = {  # that such a card is there
    "torch._inductor.runtime.hints.DeviceProperties.create": lambda _: DeviceProperties(**CARD),
    "torch._inductor.compile_fx._check_triton_bf16_support": lambda _: None,
    "torch._inductor.scheduler.has_triton": lambda *_: True,
    "torch.cuda.get_device_properties": lambda *_: SimpleNamespace(
        **CARD, minor=9, name="NVIDIA GeForce RTX 4090", gcnArchName="", shared_memory_per_block_optin=101376, total_memory=24 << 30),
    "torch.cuda.get_device_capability": lambda *_: (8, 9),
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda._exchange_device": lambda _: 0,
    "torch.cuda._maybe_exchange_device": lambda _: 0,
}  # fmt: skip
VIEWS = {"prim.device"} | {"aten." + name for name in "view _unsafe_view as_strided reshape t transpose permute expand detach select slice "
         "unsqueeze squeeze alias empty empty_like empty_strided new_empty new_empty_strided split unbind lift_fresh "
         "_reshape_alias set_ split_with_sizes diagonal unfold".split()}  # fmt: skip


class Done(BaseException):
    """The code is written."""


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def gigabytes(some: list[torch.Tensor]) -> float:
    """What is read or written at least: of an expanded tensor its storage alone."""
    size = {x.untyped_storage()._cdata: min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in some}
    return sum(size.values()) / 1e9


class Bench(TorchDispatchMode):
    """While it is active, what `compile` was given is written for a GPU and then run, on fake tensors, as it is.

    operations[part, kind] and bytes[part, kind] of one step; parts are the compiled functions, and "eager".
    """

    def __init__(self):
        super().__init__()
        self.operations, self.bytes, self.quiet = Counter(), Counter(), False

    @classmethod
    def is_infra_mode(cls):  # else nothing would be compiled while it is active
        return True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        made = tensors(out)
        if not self.quiet and str(op).rsplit(".", 1)[0] not in VIEWS and any(x.ndim for x in [*made, *tensors(args)]):
            self.add("eager", "call", 1, gigabytes([*made, *tensors((args, kwargs))]))
        return out

    def add(self, part: str, kind: str, count: int, size: float) -> None:
        self.operations[part, kind] += count
        self.bytes[part, kind] += size

    def compile(self, gm, inputs, **how):
        """In the place of Inductor's: counts what is in its code, and hands back gm."""
        graph, part = torch.fx.Graph(), part_of(gm)
        graph.output(graph.graph_copy(gm.graph, {}))
        eager, launched = torch.fx.GraphModule(gm, graph), written(gm, inputs, how)

        def run(args):
            for kind, size in launched:
                self.add(part, kind, 1, size)
            self.quiet = True
            out = eager(*args)
            self.quiet = False
            return out

        run._boxed_call = True
        return run


def part_of(gm) -> str:
    lines = " ".join(str(node.meta.get("stack_trace")) for node in gm.graph.nodes)
    named = {"in update_": "update", "in loss_of_chunk": "loss"}
    backward = any("tangents" in node.name for node in gm.graph.nodes)
    return next((named[x] for x in named if x in lines), "backward" if backward else "forward")


INNER, START, WRITE = compile_fx._compile_fx_inner, GraphLowering.__init__, GraphLowering.codegen


def written(gm, inputs, how) -> list[tuple[str, float]]:
    """Kind and GB of all that Inductor's code for a GPU launches."""
    hosts = {id(x) for node in gm.graph.nodes if node.op == "placeholder" for x in tensors(node.meta.get("val"))
             if x.ndim == 0}  # fmt: skip
    found, moved, stack = [], [], ExitStack()

    def move(x):
        if isinstance(x, FakeTensor) and id(x) not in hosts:
            x.fake_device = GPU
            moved.append(x)

    def start(self, gm, example_inputs=None, *args, **kwargs):
        for name, value in PRETEND.items():
            stack.enter_context(mock.patch(name, value))
        for node in gm.graph.nodes:
            any(map(move, tensors(node.meta.get("val"))))
            if "device" in node.kwargs:
                node.kwargs = dict(node.kwargs) | dict(device=GPU)
        any(move(x) for x in tensors(example_inputs) if x.ndim)
        START(self, gm, example_inputs, *args, **kwargs)

    def codegen(self):
        WRITE(self)
        for node in self.scheduler.nodes:
            kind = {"ExternKernelSchedulerNode": "call", "NopKernelSchedulerNode": None}.get(type(node).__name__, "kernel")
            if kind:
                found.append((kind, node.get_read_write_buffers_sizes() / 1e9))
        raise Done

    with mock.patch.object(GraphLowering, "__init__", start), mock.patch.object(GraphLowering, "codegen", codegen), stack:
        try:
            INNER(gm, inputs, **how)
        except Done:
            pass
    for x in moved:
        x.fake_device = torch.device("cpu")
    return found


def step(options: str, blocks: int) -> tuple[Counter, Counter]:
    """Operations and GB, by part and kind, of a step of few blocks, a late one in which no basis is refreshed."""
    words = "--dtype bfloat16 --device cpu --compile"
    args, config, _ = train.settle([*options.split(), *words.split()])
    if args.total_batch_size != args.batch_size or args.recompute:
        raise SystemExit("kernels.py counts one micro-batch, with no block recomputed: give --batch_size and "
                         "--total_batch_size alike, and leave --recompute out")  # fmt: skip
    args.device = None  # fake tensors cannot be moved
    bench = Bench()
    torch._dynamo.reset()
    with (FakeTensorMode(allow_non_fake_inputs=True), torch._inductor.config.patch(fx_graph_cache=False),
          mock.patch.object(compile_fx, "_compile_fx_inner", bench.compile)):  # fmt: skip
        model = Llama(replace(config, num_hidden_layers=blocks), "cpu", torch.bfloat16)
        opt = train.prepare(model, args)
        for group in opt.param_groups:
            group["t"] = 2 * args.update_proj_gap + group["offset"] + 1
        opt.arm()
        x = torch.zeros(args.batch_size, args.seq_len, dtype=torch.long)
        with bench:
            for _ in range(2):  # the first compiles
                bench.operations.clear()
                bench.bytes.clear()
                train.training_step(model, opt, iter([(x, x)]), 1)
    return bench.operations, bench.bytes


def whole(options: str) -> dict[str, dict]:
    """Of the whole model, on the line through one block and two: operations and GB by part."""
    args, config, _ = train.settle(options.split())
    (ops, size), (more_ops, more_size) = step(options, 1), step(options, 2)
    layers, table = config.num_hidden_layers - 1, {}
    for part, kind in more_ops:
        row = table.setdefault(part, dict(kernels=0, calls=0, GB=0.0))
        key = part, kind
        row[kind + "s"] += ops[key] + layers * (more_ops[key] - ops[key])
        row["GB"] = round(row["GB"] + size[key] + layers * (more_size[key] - size[key]), 3)
    total = {name: round(sum(row[name] for row in table.values()), 3) for name in ("kernels", "calls", "GB")}
    return table | {"total": total}


def show(options: str, table: dict) -> None:
    print(f"\n{options}\n{'':<12}{'kernels':>9}{'calls':>9}{'GB':>10}")
    for part, row in table.items():
        print(f"{part:<12}{row['kernels']:>9}{row['calls']:>9}{row['GB']:>10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kernels.json", help="where the figures go")
    args, options = parser.parse_known_args()
    try:
        import triton
        from triton.backends.compiler import GPUTarget
    except ImportError:
        parser.error("this needs Triton, though no GPU: pip install triton")
    target = mock.MagicMock()
    target.get_current_target.return_value = GPUTarget("cuda", CARD["cc"], CARD["warp_size"])
    triton.runtime.driver.set_active(target)
    if options:
        words = " ".join([STEP, *options])
        return show(words, whole(words))
    found = {}
    for name, words in CASES.items():
        found[name] = whole(words) | {"options": words}
        show(words, {k: row for k, row in found[name].items() if k != "options"})
    bf16, int8 = found["bf16"], found["int8"]
    update, operations = bf16["update"]["GB"], bf16["total"]["kernels"] + bf16["total"]["calls"]
    widening = sum(int8[part]["GB"] - bf16[part]["GB"] for part in ("forward", "backward"))
    bars = [("operations of a step", operations, 4000), ("GB moved by the update", update, 80)]
    for name, value, bar in bars:
        print(f"{name:<42}{value:10.2f}   bar {bar}: {'met' if value <= bar else 'NOT MET'}")
    print(f"{'GB that weights in int8 add to a micro-batch':<46}{widening:6.2f}")
    result = dict(conditions=dict(command="python experiments/kernels.py", torch=torch.__version__, triton=triton.__version__,
                                  simulated="Inductor's code for compute capability 8.9; nothing ran on a GPU"),
                  cases=found, bars={name: dict(value=round(value, 3), bar=bar) for name, value, bar in bars},
                  int8_adds_GB=round(widening, 2))  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
