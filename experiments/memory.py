"""
How much memory does a training step take? The real step of train.py on fake tensors, against the plan, the paper, and the bars.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/memory.py                                     all cases, minutes; json and figure
    python experiments/memory.py --size 7b --galore --rank 512       one run, with the flags of train.py

Fake tensors have shapes, but no memory, so this needs no GPU and no more than a gigabyte for a 7B model. What runs is
train.prepare and train.training_step: forward, backward, hooks, update, refresh. PyTorch's MemTracker sees each tensor
that comes and goes; the peak is that of the whole step, everything counted that is a tensor: weights, states, accumulators,
activations, logits, temporaries of the update. Two steps are taken apart: one in which nothing is refreshed, and one in
which the last block is, which is the first in the backward pass, when all activations are there; the larger one counts.

Left out: the CUDA context (about half a GB), workspaces inside kernels, fragmentation of the allocator; torch.compile, which
saves memory (fewer activations are kept, temporaries of the update never exist) but does not run on fake tensors.
"""

import argparse
import json
import platform
import sys
import time
from itertools import repeat
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from model import Config, Llama  # noqa: E402


class Tracker(MemTracker):
    """MemTracker without its statistics by module, which allow a module one forward pass only."""

    def _no_statistics(self, *args) -> None:
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _no_statistics


def settled(options: list[str]) -> tuple[argparse.Namespace, Config]:
    """What train.py makes of its options. ValueError for what it refuses."""
    args = train.arguments().parse_args([*options, "--plan"])
    config = train.settle(args, None)
    train.fit(config, args, on_this_device=False)
    args.compile = False
    return args, config


def simulate(options: list[str], due: bool) -> int:
    """Peak bytes of a step of `train.py OPTIONS`; with `due`, of one in which the last block's subspace is refreshed."""
    args, config = settled(options)
    args.total_batch_size = min(args.total_batch_size, 3 * args.batch_size * train.world())  # first, middle, last
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Llama(config, "cpu", getattr(torch, args.dtype))
        opt = train.prepare(model, args)
        for group in opt.param_groups:  # far from the first steps
            group["t"] = 1000 * args.update_proj_gap - 1 + config.num_hidden_layers - due if args.galore else 1000
        states = [opt.init(p) for p in opt.group]
        opt.arm()
        tokens = torch.zeros(args.batch_size, args.seq_len, dtype=torch.long)
        with Tracker() as tracker:
            tracker.track_external(model, *(x for state in states for x in state.values()))
            train.training_step(model, opt, repeat((tokens, tokens)), train.accumulation(args))
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"]
