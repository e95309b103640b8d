"""What a run needs and a reader does not: a full disk, a bad server, the memory plan."""

import io
import math
import os
import signal
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).parents[2]))

import train  # noqa: E402
from galore import GaLoreAdamW, param_groups  # noqa: E402
from model import Config, Llama, rope  # noqa: E402
from plumbing import files, memory, shards  # noqa: E402
from test_galore import C4, FEW, c4_like, log_of, newest, opened, refused, run, targets  # noqa: E402
from test_galore import alone, few, tokens  # noqa: E402, F401

def room(patch, there):
    """Checkpoints of the steps for which there(step) is false do not fit. Returns the steps tried so far."""
    tried, save = [], torch.save

    def instead(what, file):
        tried.append(what["step"])
        if not there(what["step"]):
            file.write(b"x" * 1000)
            raise OSError(28, "No space left on device")
        save(what, file)

    patch.setattr(torch, "save", instead)
    return tried


@pytest.mark.parametrize("fits", [True, False])
def test_stopped_in_a_skipped_step(fits, monkeypatch, tmp_path, few):  # noqa: F811
    """What was learnt before is saved. If the disk does not take it, the exit code is 1."""

    def poisoned(model, opt, batches, accumulate):
        os.kill(os.getpid(), signal.SIGTERM)
        ((x, y),) = batches
        (model(x, y) * math.nan).backward()
        opt.step()
        return torch.tensor(math.nan)

    monkeypatch.setattr(train, "training_step", poisoned)
    if not fits:
        monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    output = run(tmp_path, *few, expect=0 if fits else 1)
    assert ("go on from the checkpoint of step 1:" if fits else "there is no checkpoint") in output


def test_many_bad_steps_stop_the_run(monkeypatch, tmp_path, few):  # noqa: F811
    """A few are skipped, counted and logged. More than 20 in a row end it; the checkpoint is of before."""
    step, bad = train.training_step, iter([i in {3, *range(9, 99)} for i in range(1, 99)])

    def poisoned(model, opt, batches, accumulate):
        if not next(bad):
            return step(model, opt, batches, accumulate)
        ((x, y),) = batches
        (model(x, y) * math.nan).backward()
        opt.step()
        return torch.tensor(math.nan)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", poisoned)
        output = run(tmp_path, *few, *"--steps 60 --save_every 3 --eval_every 99".split(), expect=2)
    assert output.endswith("of 21 steps in a row were not finite: try a lower --lr\n")
    assert [file.name for file in (tmp_path / "run").glob("*.pt")] == ["checkpoint-00000006.pt"]
    _, *steps = log_of(tmp_path / "run")  # JSON has no NaN
    assert [line["skipped"] for line in steps] == [0, 0, *[1] * 6, *range(2, 23)]
    assert [line["step"] for line in steps if line["loss"] is None] == [3, *range(9, 30)]
    (tmp_path / "run" / "checkpoint-best.pt").write_bytes(b"mine")  # neither resumed from nor deleted
    changes = "--steps 8 --lr 0.001 --total_batch_size 4 --batch_size 1 --update_proj_gap 3".split()
    output = run(tmp_path, "--resume", "--out_dir", "run", *changes)
    assert "lr 0.001, 6 steps" in output and "4 micro-batch(es) of 1 x 32" in output
    last, lines = torch.load(newest(tmp_path / "run"), weights_only=True), log_of(tmp_path / "run")
    assert last["optimizer"]["param_groups"][0]["update_proj_gap"] == 3
    assert lines[-2]["skipped"] == 1  # of before
    assert [line["tokens"] for line in lines if "loss" in line] == [64 * i for i in (1, 2, 3, 4, 5, 6, 8, 10)]


def test_a_full_disk_ends_nothing(monkeypatch, tmp_path, tokens):  # noqa: F811
    """No room for checkpoints and log in the middle of a run: each is told, the checkpoint of before stays,
    training goes on. When there is room again all is written. If there is none at the end the code is 1."""
    options = [*FEW, "--data_dir", tokens, "--steps", "8", "--save_every", "1", "--eval_every", "99"]
    run(tmp_path, *options, "--out_dir", "calm")
    write, full = files.Log.write, OSError(28, "No space left")

    def full_for_the_log(self, line=None):
        if self.lines < 5 or self.lines > 6:
            return write(self, line)
        with monkeypatch.context() as patch:
            patch.setattr(files, "open", lambda *_, **__: (_ for _ in ()).throw(full), raising=False)
            return write(self, line)

    with monkeypatch.context() as patch:
        tried = room(patch, lambda step: step not in (2, 3))
        patch.setattr(files.Log, "write", full_for_the_log)
        output = run(tmp_path, *options, "--out_dir", "run")
    assert tried == [0, 1, 2, 3, 4, 6, 7, 8]  # not 5, whose line the log did not take
    assert output.count("the checkpoint could not be written ([Errno 28] No space left on device)") == 2
    assert output.count("log.jsonl could not be written") == 1
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-00000008.pt", "log.jsonl"]
    calm, ours = (files.read_checkpoint(tmp_path / name)["model"] for name in ("calm", "run"))
    assert all(torch.equal(calm[name], ours[name]) for name in calm)
    calm, ours = ([line.get("loss") for line in log_of(tmp_path / name)] for name in ("calm", "run"))
    assert calm == ours and len(calm) > 8
    with monkeypatch.context() as patch:
        room(patch, lambda step: step < 8)
        output = run(tmp_path, *options, "--out_dir", "last", expect=1)
    assert output.endswith("train.py: the checkpoint of step 8 could not be written\n")
    assert files.checkpoints(tmp_path / "last")[-1].name == "checkpoint-00000007.pt"


def test_validation_ends_with_its_text(tmp_path):
    """Fewer tokens than --eval_tokens: all whole sequences count, once in each evaluation."""
    (tmp_path / "text").mkdir()
    for name, size in ("train", 9000), ("val", 700):
        (tmp_path / "text" / f"{name}.txt").write_text("what is read, " * (size // 14))
    run(tmp_path, *FEW, "--data", "text", "--eval_tokens", 9999)
    seen = [line["val_tokens"] for line in log_of(tmp_path / "run") if "val_loss" in line]
    assert seen == [700 // 32 * 32] * 2


def test_nohup_is_respected(monkeypatch):
    """A closed terminal ends a run, but not under nohup, which has SIGHUP ignored."""
    for before, after in (signal.SIG_DFL, files.Brake.ask), (signal.SIG_IGN, None):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        old = signal.signal(signal.SIGHUP, before)
        try:
            files.Brake()
            now = signal.getsignal(signal.SIGHUP)
            assert now == before if after is None else now.__func__ is after
        finally:
            [signal.signal(*pair) for pair in [*handlers.items(), (signal.SIGHUP, old)]]


def test_memory_that_runs_out_ends_with_a_sentence(monkeypatch, tmp_path, few):  # noqa: F811
    """It says what to type, and that goes on from the checkpoint of before."""
    step, room = train.training_step, iter([True] * 5)

    def full(*those):
        if next(room, False):
            return step(*those)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 86.00 MiB.")

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", full)
        output = run(tmp_path, *few, "--save_every", 2, expect=2)
    assert output.endswith("the GPU's memory ran out: say --resume --out_dir run, and less than --batch_size "
                           "2, or more than --recompute 0\n")
    assert [file.name for file in (tmp_path / "run").glob("*.pt")] == ["checkpoint-00000004.pt"]
    assert "of 1 x 32 tokens" in run(tmp_path, *"--resume --out_dir run --batch_size 1 --recompute 2".split())
    assert len(log_of(tmp_path / "run")) > 8


@pytest.mark.parametrize("free, sizes, counts, expected", [
    (99, [1, 2, 4, 8, 16], [0, 1, 2, 3, 4], (16, 0)), (5.1, [1, 2, 4, 8, 16], [0, 1, 2, 3, 4], (4, 0)),
    (2.1, [1, 2, 4, 8, 16], [0, 1, 2, 3, 4], (4, 4)), (0.5, [1, 2, 4, 8, 16], [0, 1, 2, 3, 4], (1, 4)),
    (1.6, [1, 2], [0, 1, 2, 3, 4], (2, 4)), (9.9, [1, 2, 4, 8, 16], [4], (16, 4)), (0.5, [8], [0], (8, 0)),
])  # fmt: skip
def test_the_fastest_that_fits_is_chosen(free, sizes, counts, expected):
    """Of all micro-batches and numbers of blocks that recompute; the smallest, if none fits."""
    peaks = lambda size: lambda count: dict(weights=1.0, activations=size * (5 - count) / 5)  # noqa: E731
    size, count, table = memory.choose(peaks, sizes, counts, free, 4, 200)
    assert (size, count) == expected and table == pytest.approx(peaks(size)(count))


@pytest.mark.parametrize("free", [0.5, 3.5])
def test_one_micro_batch_may_be_the_smallest(free):
    """As it needs no R of others. It is chosen where it alone fits, and told where nothing does."""
    peaks = lambda size: lambda count: dict(gradients=3.0 * (size < 4), activations=size / 2)  # noqa: E731
    assert memory.choose(peaks, [1, 2, 4], [0, 1], free, 1, 256)[0] == 4


@pytest.fixture
def server(tmp_path, monkeypatch):
    """C4's files, at "served". trouble: of the next requests for a name. log: names and first bytes asked."""
    self = SimpleNamespace(trouble={}, log=[], waits=[])
    self.options = dict(data_dir=str(tmp_path / "here"), data_url="http://server/{}")

    def urlopen(request, timeout):
        name, start = request.selector[1:], int(request.get_header("Range", "bytes=0-")[6:-1])
        kind, body = (self.trouble.get(name) or [None]).pop(0), (tmp_path / "served" / name).read_bytes()
        self.log.append((name, start))
        if kind == 503 or start >= len(body):
            raise urllib.error.HTTPError(name, kind or 416, "no", {"Retry-After": "0"}, io.BytesIO())
        start = 0 if kind == "no range" else start
        length, body = len(body) - start + 3 * (kind == "long"), body[start:]
        body = dict(drop=body[: len(body) // 2], corrupt=body[:200] + bytes(20) + body[220:]).get(kind, body)
        answer = io.BytesIO(body)
        answer.status, answer.headers = 206 if start else 200, {"Content-Length": length}
        return answer

    monkeypatch.setattr(shards.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(shards.time, "sleep", self.waits.append)
    return self



def test_misbehaving_server(tmp_path, server, alone):  # noqa: F811
    """Whatever a server does, the stream is the same. One that stays away ends in a sentence."""
    ids, names = c4_like(tmp_path / "served", documents=300), [C4.format(i) for i in range(3)]
    kinds = [["drop", "drop", 503, None], [503, None],
             ["corrupt", "long", None, "drop", *[503] * 10, "no range"]]  # after "long" None is a 416
    server.trouble = {name: [*those] for name, those in zip(names, kinds)}
    stream = opened("c4", **server.options)
    assert targets(stream, (len(ids) - 1) // 32) == ids[1 : (len(ids) - 1) // 32 * 32 + 1]
    starts = {name: [start for asked, start in server.log if asked == name] for name in names}
    for name, those in zip(names, kinds):
        assert len(starts[name]) == len(those) and not server.trouble[name]
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "served" / name).read_bytes()
    first = starts[names[0]]
    assert first[0] == 0 < first[1] < first[2] == first[3] and max(server.waits) >= 60
    server.trouble = {names[0]: [503] * 4}
    refused(lambda: opened("c4", **server.options | dict(data_dir=str(tmp_path))), "could not be downloaded")



PLAN = "--size toy --galore --rank 64 --vocab_size 4096 --tokenizer bytes --dtype bfloat16 --state_bits 8"



@pytest.mark.parametrize("options", [
    "--batch_size 4 --total_batch_size 4 --recompute 0",
    "--batch_size 4 --total_batch_size 8 --recompute 2 --grad_clipping 1 --direction muon --state_bits 32"])
def test_the_plan_is_what_a_tracker_sees_of_a_real_step(options, monkeypatch):
    """MemTracker on real tensors of the whole model sees the peak that the plan has from few blocks, or one a
    little lower where only some recompute."""
    monkeypatch.setitem(train.SIZES["toy"], "num_hidden_layers", 4)
    args, config, _ = train.settle(f"{PLAN} {options} --device cpu".split())
    train.fit(args, config, train.plan)

    class Tracker(MemTracker):
        _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = lambda self, *args: None

    model, x = Llama(config, dtype=torch.bfloat16), torch.zeros(4, args.seq_len, dtype=torch.long)
    model_bytes = sum(p.nbytes for p in model.parameters())
    opt, tracker = train.prepare(model, args), Tracker()
    opt.register_step_post_hook(lambda *_: None)
    for group in opt.param_groups:
        group["t"] = 1000 * group["update_proj_gap"] + group["offset"] - (group["offset"] in (0, 38))
    opt.arm()
    states = [x for p in opt.group for x in opt.init(p).values() if torch.is_tensor(x)]
    tracker.track_external(model, *states)
    with tracker, mock.patch("torch.nn.functional.rms_norm", memory.rms_norm):  # a CPU has no such kernel
        train.training_step(model, opt, iter([(x, x)] * 2), train.accumulation(args))
    real = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e9
    plan = train.plan(args, config, 4)(args.recompute)
    assert 0.99 * real < sum(plan.values()) < (1.02 if args.recompute == 2 else 1.01) * real
    assert plan["weights"] == pytest.approx(model_bytes / 1e9)
    assert plan["state"] == pytest.approx(sum(x.nbytes for x in states) / 1e9, rel=1e-3)


@pytest.mark.parametrize("options, measured", [
    ("--batch_size 1 --total_batch_size 1 --recompute 0", 19.65),
    ("--batch_size 16 --total_batch_size 32 --recompute 32", 23.76),
    ("--batch_size 4 --total_batch_size 8 --recompute 32 --grad_clipping 1", 22.83),
    ("--batch_size 1 --total_batch_size 1 --recompute 0 --weight_bits 8 --rank 512", 11.04),
    ("--batch_size 4 --total_batch_size 8 --recompute 32 --weight_bits 8 --rank 512", 12.59),
    ("--batch_size 16 --recompute 32 --vocab_size 50304 --offload", 24.14)])
def test_the_plan_is_what_a_gpu_measured(options, measured):
    """An H200, at 7B (experiments/results/gpu.json). The last is what was live and asked for when memory ran
    out: see its note."""
    words = f"--size 7b --galore --rank 1024 --vocab_size 32000 --no-offload --plan --device cpu {options}"
    args, config, _ = train.settle(words.split())
    plan = train.plan(args, config, args.batch_size)(args.recompute)
    assert sum(plan.values()) == pytest.approx(measured, rel=4e-3)


def test_a_compiled_update_makes_the_factors_of_its_products():
    """Of opt.step() the plan has, to some scalars, R, Y, N, P and P N of the largest matrix. What stands for
    the loss returns what that does."""
    words = f"{PLAN} --recompute 0 --batch_size 1 --total_batch_size 1 --no-layerwise --compile --device cpu"
    args, config, _ = train.settle(words.split())
    table = train.plan(args, config, 1, run=lambda *those: memory.simulate(*those[:2], (0, 2), 2, *those[4:]))
    (m, n), r = (config.hidden_size, config.intermediate_size), args.rank
    made = 2 * (2 * r * n + 2 * m * r + m * n)  # bytes of bf16
    assert made <= 1e9 * table[1, False, True]["temporaries"] < made + 100
    z, t = torch.randn(3, 7, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.long)
    for stands, real in zip(memory.loss_of_chunk(z, t, 3, True), Llama.loss_of_chunk(z, t, 3, True)):
        assert (stands.shape, stands.dtype) == (real.shape, real.dtype)


def test_offloaded_moments_come_to_the_device_one_by_one():
    """At the peak of a backward pass the plan has those of the head, or of the embedding, and not of both."""

    def peak(option):
        args, config, _ = train.settle(f"{PLAN} --vocab_size 50000 --batch_size 1 --total_batch_size 1 "
                                       f"--recompute 0 --compile --device cpu {option}".split())
        one = lambda *those: memory.simulate(*those[:2], (0, 2), 2, *those[4:])  # noqa: E731
        return memory.total(train.plan(args, config, 1, run=one)[1, True, False])

    moments = 2 * 50000 * 256 / 1e9 * (1 + 4 / 256)
    assert peak("--no-offload") - peak("--offload") == pytest.approx(moments, rel=1e-3)


def test_a_compiled_block_keeps_what_stands_for_it():
    """Compiled, norm and SwiGLU keep no more for the backward pass than in the plan, and eager they would."""
    config = Config(64, 64, 172, 1, 4)
    block = Llama(config, dtype=torch.bfloat16).model.layers[0]
    x, turns = torch.randn(8, 32, 64, dtype=torch.bfloat16), rope(0, 32, config, torch.device("cpu"))

    def kept(run):
        storages = {}
        pack = lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(x.requires_grad_(), *turns)
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    with (mock.patch("torch.nn.functional.rms_norm", memory.rms_norm),
          mock.patch("torch.nn.functional.silu", memory.COMPILED["torch.nn.functional.silu"])):  # fmt: skip
        planned = kept(block)
    torch._dynamo.reset()
    backend = "aot_eager_decomp_partition"  # Inductor's choice of what is kept, without its code
    compiled = kept(torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False))
    assert 0.99 * compiled < planned < 1.01 * compiled < 0.8 * kept(block)


@pytest.mark.parametrize("blocks", [5, 12, 31, 32])
def test_no_more_than_two_blocks_are_due_at_once(blocks):
    """As the plan takes it to be."""
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
    opt, most = GaLoreAdamW(param_groups(model, 4)), []
    for _ in range(5 * blocks):
        opt.step()
        most.append(len(opt.turning))
    assert max(most) == 2


def test_what_is_chosen_for_one_machine_is_not_kept():
    """A checkpoint has what was typed, also 0 and no, of the options that are else chosen at each start."""
    args, config, _ = train.settle("--recompute 0 --no-compile".split())
    train.fit(args, config, train.plan)
    kept = train.kept(args)
    assert args.batch_size and [kept[name] for name in train.AUTOMATIC] == [None, 0, False]


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch, tmp_path, tokens):  # noqa: F811
    """Nor does a full disk behind standard error: neither lines nor the bar."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "Forgiving", lambda _: files.Forgiving(Gone()))
    run(tmp_path, *FEW, "--data_dir", tokens)
    assert (tmp_path / "run" / "checkpoint-00000008.pt").exists()


def test_the_plan_is_printed(monkeypatch, tmp_path):
    """Kinds and, last, their sum. What does not fit, or cannot be simulated, is refused with the ways out."""
    words = f"{PLAN} --recompute 0 --total_batch_size 1".split()
    *kinds, chosen, peak = run(tmp_path, *words, "--plan").strip().splitlines()
    assert [line.split()[0] for line in kinds] == [*memory.KINDS] and not list(tmp_path.iterdir())
    assert "--batch_size 1, --recompute 0; of 24.72 GB free on an RTX 4090 tensors may take 23.83" in chosen
    assert float(peak.split()[1]) == pytest.approx(sum(float(line.split()[1]) for line in kinds), abs=0.01)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**7, 10**7))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for plan, sentence in ((lambda *_: lambda _: dict(weights=1.0), "may take 0.0: take a smaller --size"),
                           (None, "no step can be simulated here")):  # fmt: skip
        monkeypatch.setattr(train, "plan", plan)
        assert sentence in run(tmp_path, *words, "--device", "cuda", expect=2)
