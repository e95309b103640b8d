"""
What does torch.compile make of the update and of a block on a GPU, and does it compile? Asked without a GPU.

    python experiments/inductor.py                  all of it
    python experiments/inductor.py move_ --code     one function, and what Inductor wrote for it

Needs PyTorch's CUDA build, which brings Triton and ptxas, but no driver. GaLoreAdamW.move runs on fake CUDA
tensors (shapes without memory). What it calls through `compiled` is recorded, with its arguments for 7B's
gate_proj and embedding. The block is a thin one of 7B with checkpointing, 16 x 256 tokens ("block_due": in a
step that refreshes P). Inductor writes code for an H100. Triton compiles it for sm_90 and sm_89 (RTX 4090) in
each configuration that autotuning would try. Exits with 1 if that fails.

A line per kernel: MB read and written (each buffer once, as Inductor counts), how often the source says
device_assert, int64, float64, and for each card registers + bytes of stack per thread, per configuration.

Left out: running anything; what cuBLAS and attention do inside; the choice that autotuning would make; GQA.
The stand-ins for a driver lean on the inside of PyTorch 2.11; another version may need others.
"""
import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

scratch = tempfile.TemporaryDirectory()
os.environ |= dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), scratch.name)
os.environ |= dict.fromkeys(("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE"), "0")
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import torch._inductor.compile_fx as inductor  # noqa: E402
import triton  # noqa: E402
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder as Folder  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch.autograd.graph import get_gradient_edge  # noqa: E402

import adam8bit  # noqa: E402
import galore  # noqa: E402
from model import SIZES, Config, F, Llama, rope  # noqa: E402

CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
CARDS = {"sm_90": "cc=90, major=9", "sm_89": "cc=89, major=8"}  # as the source of a kernel has it
ROW = "{:<42}{:>9}{:>9}{:>8}{:>7}{:>6}  {:<18}{:<18}"


def pretend() -> None:
    """Answers as an H100 would what PyTorch, Inductor and Triton ask of a GPU while they compile."""
    card = SimpleNamespace(name="H100", major=9, multi_processor_count=132, regs_per_multiprocessor=65536,
                           max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32)
    answers = dict(is_available=True, is_initialized=True, device_count=1, current_device=0,
                   get_device_properties=card, get_device_capability=(9, 0), get_compute_capability=90,
                   get_rng_state=torch.zeros(1), set_rng_state=None,
                   _exchange_device=0, _maybe_exchange_device=0)
    for name, answer in answers.items():
        for place in torch.cuda, torch._dynamo.device_interface.CudaInterface:
            setattr(place, name, staticmethod(lambda *_, answer=answer: answer))
    torch._C._ensureCUDADeviceGuardSet()
    fake_tensor.FakeTensorMode.avoid_device_init, fake_tensor.init_gpu_context = True, lambda device: None
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    torch._inductor.config.use_static_triton_launcher = False
    logging.getLogger("torch._inductor.runtime.triton_heuristics").disabled = True  # prints all that fails
    deduce = Folder._deduce_value

    def deduce_on_cpu(self, node):  # the value of a constant
        kwargs, node.kwargs = node.kwargs, {k: CPU if k == "device" else v for k, v in node.kwargs.items()}
        value, node.kwargs = deduce(self, node), kwargs
        return value

    def attention(q, k, v, is_causal, enable_gqa):  # C++ would ask the card which way is the fastest
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    Folder._deduce_value, torch.autograd.grad = deduce_on_cpu, gradient
    F.scaled_dot_product_attention = attention


@torch.no_grad()
def gradient(outputs, inputs, grad_outputs, **_) -> tuple:
    """torch.autograd.grad, as AOTAutograd calls it. The engine in C++ would ask the driver for streams."""
    found, waiting = {}, set()  # (node, number of its output): gradient

    def add(node, i: int, D) -> None:
        if node and D is not None:
            D = D.sum_to_size(node._input_metadata[i].shape).to(node._input_metadata[i].dtype)
            found[node, i] = found[node, i] + D if (node, i) in found else D
            waiting.add(node)

    for y, D in zip(outputs, grad_outputs):
        add(*get_gradient_edge(y)[:2], D)
    while waiting:
        waiting.remove(node := max(waiting, key=lambda node: node._sequence_nr()))  # last made, first here
        if node.next_functions:
            Ds = [found.get((node, i)) for i in range(len(node._input_metadata))]
            Ds = getattr(node, "apply", node)(*Ds)  # a node of Python, or one of C++
            Ds = Ds if isinstance(Ds, tuple) else (Ds,)
            for following, D in zip(node.next_functions, Ds, strict=True):
                add(*following, D)
    return tuple(found.get(get_gradient_edge(x)[:2]) for x in inputs)


@torch.no_grad()
def update() -> dict[str, tuple]:
    """name: (compiled function, its arguments), as GaLoreAdamW.move calls it."""
    found, tables, on = {}, adam8bit.TABLES[CPU].items(), torch.empty((), device=GPU)
    fake = {signed: tuple(torch.empty_like(t, device=GPU) for t in three) for signed, three in tables}
    adam8bit.TABLES[GPU] = fake
    weights = (torch.empty(n, 4096, dtype=BF16, device=GPU) for n in (11008, 32000))
    matrix, embedding = map(torch.nn.Parameter, weights)
    groups = dict(params=[matrix], rank=1024), dict(params=[embedding])
    opt = galore.GaLoreAdamW(groups, state_bits=8, compile=True)
    opt.random = lambda p, t: None
    record = lambda f: lambda *args: (found.setdefault(f, args), f(*args))[1]  # noqa: E731
    with patch.object(galore, "compiled", record):
        for p, shape in (matrix, (1024, 11008)), (embedding, embedding.shape):
            opt.init(p)
            opt.move(p, torch.empty(shape, dtype=BF16, device=GPU), on.bool(), on)
    w, *_, seed = found[adam8bit.move_]
    found[adam8bit.random_bits] = w, seed
    return {f.__name__: (adam8bit.compiled(f), args) for f, args in found.items()}


def block(due: bool) -> tuple:
    """A thin block, compiled as in train.prepare, and its arguments; in a step in which P is due, or not."""
    shape = Config(32000, **SIZES["7b"] | dict(num_hidden_layers=1))
    model = Llama(shape, GPU, BF16)
    opt = galore.GaLoreAdamW(galore.param_groups(model, 1024), state_bits=8, compile=True)
    opt.random, opt.due = lambda p, t: None, lambda p: due
    with patch.object(torch.Tensor, "backward", lambda x: None):  # it makes a handle of cuSOLVER's
        galore.thin(model, opt, checkpointed=True)
    x = torch.empty(16, 256, shape.hidden_size, dtype=BF16, device=GPU, requires_grad=True)
    model.model.layers[0].compile(fullgraph=True, dynamic=False)
    return model.model.layers[0], (x, *rope(0, 256, shape, GPU), None, True)


def written(function, args: tuple) -> list[tuple[str, list[tuple]]]:
    """Of each graph (forward, backward) Inductor's code, and per kernel: a library's? bytes read, written."""
    graphs = []

    def call(_):
        raise InterruptedError  # all is compiled: nothing is to run

    def compile_to_module(graph):
        code, kernels = graph.codegen()[0].value, []
        for node in graph.scheduler.nodes:
            with inductor.V.set_graph_handler(graph):
                size = node.get_read_write_buffer_accesses(True, True)
            both = ({dep.name for dep in deps} for deps in (node.read_writes.reads, node.read_writes.writes))
            if size:
                kernels.append((node.is_extern(), *(sum(size.get(n, 0) for n in names) for names in both)))
        graphs.append((code, kernels))
        return SimpleNamespace(call=call, __file__="")

    torch._dynamo.reset()
    options = dict(force_non_lazy_backward_lowering=True, graphsafe_rng_functionalization=False)
    ours = patch.object(inductor.GraphLowering, "compile_to_module", compile_to_module)
    with torch._functorch.config.patch(options), ours:
        try:
            function(*args)
        except InterruptedError:
            return graphs


def compiled(name: str, source: str, card: str) -> str:
    """Registers + bytes of stack per thread, for each configuration. Raises what Triton raises."""
    module = torch._inductor.codecache.PyCodeCache.load(source.replace(CARDS["sm_90"], CARDS[card]))
    kernel, used = getattr(module, name), []
    kernel.precompile(warm_cache_only=True)
    for result in kernel.compile_results:
        (file := Path(scratch.name, "cubin")).write_bytes(result.kernel.asm["cubin"])
        said = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file], text=True)
        used.append("+".join(re.search(r"REG:(\d+) STACK:(\d+)", said).groups()))
    return " ".join(used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="of functions (default: all)")
    parser.add_argument("--code", action="store_true", help="print Inductor's code, too")
    args, failed, fake = parser.parse_args(), [], fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    pretend()
    with fake:
        tasks = update() | {"block": block(False), "block_due": block(True)}
    print(ROW.format("", "MB read", "written", "assert", "int64", "fp64", *CARDS))
    for name in args.names or tasks:
        with fake, torch.set_grad_enabled("block" in name):
            graphs = written(*tasks[name])
        for (code, kernels), part in zip(graphs, ("forward", "backward")):
            print(code if args.code else "", end="")
            calls, *mb = map(sum, zip(*kernels))
            title = f"{name}{', ' * (len(graphs) > 1)}{part * (len(graphs) > 1)}: "
            title += f"{len(kernels) - calls} kernels, {calls} calls"
            print(ROW.format(title, *(f"{b / 1e6:.1f}" for b in mb), *[""] * 5).rstrip())
            sources = dict(re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.S))
            launched = re.findall(r"^ +(triton_\w+)\.run\(", code, re.M)
            own = (size for is_call, *size in kernels if not is_call)
            for size, kernel in zip(own, launched, strict=True):
                source, used = sources[kernel], []
                for card in CARDS:
                    try:
                        used.append(compiled(kernel, source, card))
                    except Exception as error:
                        failed.append(f"{name} on {card}, {kernel}: {error}")
                        used.append("FAILS")
                counts = (source.count(word) for word in ("device_assert", "int64", "float64"))
                short = f"  {kernel[7:35]} {kernel.split('_')[-1]}"
                print(ROW.format(short, *(f"{b / 1e6:.1f}" for b in size), *counts, *used), flush=True)
    print(*failed, sep="\n\n")
    sys.exit(len(failed) > 0)


if __name__ == "__main__":
    main()
