"""What a run needs and a reader does not, held against transformers and tokenizers: plumbing/."""

import json
import pickle
import signal
from functools import partial

import numpy as np
import pytest
import torch

import data
import train
from model import Config, Llama
from plumbing import files, memory, sample, shards
from plumbing import hf as hf_folders
from test_galore import FEW, TINY, change_config, log_of, oracle, run, some_tokens, texts, tiny
from test_galore import alone, tokens  # noqa: F401

# ----- the disk, and the plan -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("free, sizes, ways, expected", [
    (5.1, [1, 2, 4, 8, 16, 32], [False, True], (16, False)),
    (1.2, [1, 2, 4, 8, 16, 32], [False, True], (2, True)),
    (0.5, [1, 2, 4, 8, 16, 32], [False, True], (1, True)),
    (9.9, [1, 2, 4, 8, 16, 32], [True], (32, True)),
    (0.5, [8], [False], (8, False)), (1.6, [1, 2], [False, True], (2, False)),
])  # fmt: skip
def test_the_largest_that_fits_is_chosen(free, sizes, ways, expected):
    """Without checkpointing if anything fits so, and then the largest size; with it otherwise; else the
    smallest."""
    peaks = lambda size, way: dict(weights=1.0, activations=size * (0.0625 if way else 0.25))  # noqa: E731
    size, way, table = memory.choose(peaks, sizes, ways, free, 4)
    assert (size, way) == expected and table == pytest.approx(peaks(*expected))


# ----- Hugging Face folders in and out ----------------------------------------------------------------------

CORPUS = ["hello world, it's a test ", "def f(x):\n    return x\n\n\n", "été naïve 中文 12345 "] * 9
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FAMILIES = {"gpt2": ["<|endoftext|>"], "llama3": ["<|begin|>", "<|end|>"], "llama2": ["<s>", "</s>"],
            "metaspace": ["<s>", "</s>"]}


def hf_tokenizer(family, folder):
    """A folder with a small tokenizer of this form. Returns it as the package `tokenizers` reads it."""
    hf, special = oracle("tokenizers", "tokenizers"), FAMILIES[family]
    pre, decoders, whole = hf.pre_tokenizers, hf.decoders, hf.Tokenizer(hf.models.BPE())
    train = partial(hf.trainers.BpeTrainer, show_progress=False)
    if family in ("gpt2", "llama3"):
        split = [pre.Split(hf.Regex(LLAMA3), "isolated")] if family == "llama3" else []
        whole.pre_tokenizer = pre.Sequence([*split, pre.ByteLevel(False, use_regex=not split)])
        whole.decoder, alphabet = decoders.ByteLevel(), pre.ByteLevel.alphabet()
        whole.train_from_iterator(CORPUS, train(vocab_size=400, initial_alphabet=alphabet))
    else:
        whole.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], train(vocab_size=120))
        made = json.loads(whole.to_str())["model"]
        tokens = ["<unk>", *special, *(f"<0x{i:02X}>" for i in range(256)), *made["vocab"]]
        whole = hf.Tokenizer(hf.models.BPE(dict(zip(tokens, range(999))), [*map(tuple, made["merges"])],
                                           unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if family == "metaspace":
            whole.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
        else:
            norm = hf.normalizers
            whole.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
        whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    whole.add_special_tokens(special)
    if special[1:]:
        bos = special[0], whole.token_to_id(special[0])
        whole.post_processor = hf.processors.TemplateProcessing(f"{bos[0]} $A", None, [bos])
    folder.mkdir(exist_ok=True)
    whole.enable_truncation(8)    # many folders have one; it is not for training
    whole.save(str(folder / "tokenizer.json"))
    whole.no_truncation()
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(eos_token=special[-1])))
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_of_a_folder(family, tmp_path):
    """Ids and text are the package's, also of a file read in pieces. Bytes are the text's. bos, eot stand."""
    folder = tmp_path / "a.b c"
    theirs, ours = hf_tokenizer(family, folder), data.get_tokenizer(str(folder))
    special = [theirs.token_to_id(token) for token in FAMILIES[family]]
    assert (ours.bos, ours.eot) == (special[0] if special[1:] else None, special[-1])
    theirs.encode_special_tokens = True    # "<s>" in a text is text
    for text in [*texts(40), "hello world", "x\n\n\n" * 9, "été 中文😀 \r\n <s> <|end|> ", "  def"]:
        ids = ours.document(text, ends=True)
        if text and not (family == "metaspace" and text[0] == " "):    # a space that this form loses
            assert ids.tolist() == [*theirs.encode(text).ids, ours.eot]
            assert theirs.decode(ids[:-1].tolist()) == text
        assert ours.n_bytes[ids].sum() == len(text.encode()) and ours.decode(ids[:-1]) == text
    lines = "".join(f"def f(x): return {i}\n" for i in range(9000))    # three pieces
    (tmp_path / "long.txt").write_text(lines)
    (shard,), _ = shards.find_shards(str(tmp_path / "long.txt"), ours, None, "{}")
    assert np.fromfile(shard.prepare(), ours.dtype).tolist() == [*theirs.encode(lines).ids, ours.eot]
    assert pickle.loads(pickle.dumps(ours)).name == ours.name
    settings = dict(eos_token=FAMILIES[family][0], add_bos_token=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    other = data.get_tokenizer(str(folder))
    assert (other.bos, other.eot) == (None, special[0]) and (other.name == ours.name) == (ours.bos is None)


@pytest.mark.parametrize("scaling", [dict(type="linear", factor=2.5), dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32)], ids=["linear", "llama3"])
def test_scaled_rope_is_transformers(scaling, tmp_path):
    """Logits equal transformers' below and beyond the original length, and after the way there and back."""
    hf, tokens = oracle("transformers", "transformers"), some_tokens(1, 200)
    torch.manual_seed(0)
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY | dict(hidden_size=64), initializer_range=0.2,
                                                max_position_embeddings=256, rope_scaling=scaling))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Llama.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = hf.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
        assert torch.equal(back(tokens).logits, theirs(tokens).logits) and hash(ours.config)


@pytest.mark.parametrize("family", ["gpt2", "llama2"])
def test_a_model_comes_in_goes_on_and_leaves(family, monkeypatch, tmp_path):
    """--init, --resume, --export, --prompt: transformers continues a text as we do. What is refused."""
    hf, start = oracle("transformers", "transformers"), tmp_path / "start"
    Llama(Config(448, 32, 48, 2, 2)).save_pretrained(start)
    eot = hf_tokenizer(family, start).token_to_id(FAMILIES[family][-1])
    (tmp_path / "text.txt").write_text("".join(CORPUS) * 400)
    words = ("--init start --data text.txt --total_batch_size 2 --seq_len 32 --eval_tokens 64 --steps 9 "
             "--device cpu").split()
    run(tmp_path, *words, "--eval_every", 99, "--out_dir", "run", "--lr", 0.02)
    start.rename(tmp_path / "gone")    # the run has a copy of its tokenizer
    run(tmp_path, *"--resume --out_dir run --steps 10 --device cpu".split())
    monkeypatch.setattr(hf_folders, "FILE_BYTES", 50_000)
    run(tmp_path, *"run --export out".split(), program=sample)
    (tmp_path / "gone").rename(start)
    assert (tmp_path / "out" / "model-00001-of-00004.safetensors").stat().st_mode & 0o44 == 0o44
    autos = hf.AutoModelForCausalLM, hf.AutoTokenizer
    theirs, read = (auto.from_pretrained(tmp_path / "out") for auto in autos)
    ids = read("def f(x", return_tensors="pt", return_token_type_ids=False)
    text = theirs.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.size(1) :].tolist()
    text, ours = text[: text.index(eot) if eot in text else None], data.get_tokenizer(str(start))
    expected = b"".join(ours.pieces[token] for token in text).decode(errors="replace")
    for source in ("run", "out"):
        options = ["--prompt", "def f(x", *"--temperature 0 --tokens 24".split()]
        shown = run(tmp_path, source, *options, program=sample)
        assert shown.startswith(f"def f(x{expected}\n{len(text)} tokens, "), shown

    def refused(sentence, *options, program=sample):
        said = run(tmp_path, *options, expect=2, program=program)
        assert sentence in said and len(said.splitlines()) == 2, said

    refused("start is there already (config.json, ", *"run --export start".split())
    refused(". holds no checkpoint-STEP.pt", *". --export new".split())
    refused("was trained with tokenizer hf-", *"run --tokenizer bytes --prompt x".split())
    refused("--prompt is empty", "run", "--prompt=")
    refused("--tokens has no effect with --export", *"run --export new --tokens 5".split())
    refused("--tokenizer bytes has other ids than start", *words, "--tokenizer", "bytes", program=train)
    change_config(start, vocab_size=50)
    refused("smaller than that of --tokenizer ./start", *words, program=train)
    change_config(start, vocab_size=448, rope_scaling=dict(type="yarn"))
    refused("rope_type is 'yarn'", *words, program=train)
    change_config(start, rope_scaling=None)
    (start / "tokenizer.json").write_text("{}")
    refused("tokenizer.json cannot be used", *words, program=train)
    (start / "tokenizer.json").unlink()
    refused("start has no tokenizer.json: say --tokenizer", *words, program=train)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"out", "run", "start"}


def test_tiktoken_leaves_with_the_same_ids(monkeypatch, tmp_path):
    """transformers' tokenizer, made of an encoding whose special ids have gaps, gives the encoding's ids."""
    hf, tiktoken = oracle("transformers", "transformers"), data.tiktoken
    ranks = {bytes([i]): i for i in range(256)} | {b"de": 256, b"def": 257, b" d": 258}
    made = tiktoken.Encoding("made", pat_str=r" ?\w+|\s+|[^\s\w]+", mergeable_ranks=ranks,
                             special_tokens={"<|x|>": 300, "<|endoftext|>": 305})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: made)
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["made"])
    hf_folders.save(tiny(vocab_size=320), tmp_path / "out", data.get_tokenizer("made"))
    theirs, text = hf.AutoTokenizer.from_pretrained(tmp_path / "out"), "def f(d): été 中文😀"
    assert theirs(text).input_ids == made.encode(text) and theirs("<|x|>").input_ids == [300]
    assert theirs.decode(made.encode(text)) == text and theirs.eos_token_id == 305


def test_interrupted_text_ends_well(monkeypatch, tmp_path):
    """Ctrl-C while a text comes: what there is of it, a new line, tokens/s, exit code 0."""
    def three(model, tokens, *options):
        yield from torch.tensor([0xC3, 0xA9, 0xC3])    # an é, and half of one
        signal.raise_signal(signal.SIGINT)

    tiny(vocab_size=320).save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(Llama, "stream", three)
    shown = run(tmp_path, *"hf --tokenizer bytes --prompt x".split(), program=sample)
    assert shown.startswith("xé\N{REPLACEMENT CHARACTER}\n3 tokens, ")
