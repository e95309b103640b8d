"""Hugging Face folders in and out, held against transformers and tokenizers."""

import json
import pickle
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from model import Config, Llama  # noqa: E402
from plumbing import hf as hf_folders  # noqa: E402
from plumbing import sample, shards  # noqa: E402
from test_galore import TINY, Evil, oracle, refused, run, some_tokens, texts, tiny  # noqa: E402

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


def change_config(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))



@pytest.mark.parametrize("field, value, sentence", [
    ("attention_bias", True, "attention_bias is True"), ("model_type", "qwen3", "model_type is 'qwen3'"),
    ("rope_scaling", dict(type="yarn", factor=2.0), "rope_type is 'yarn'"),
    ("rope_parameters", dict(rope_type="yarn", rope_theta=1e4), "rope_type is 'yarn'"),
    ("model_type", "mistral", "sliding_window is 4096"), ("hidden_size", None, "config.json.*hidden_size"),
    ("hidden_size", 36, "head_dim 9, by default"), ("num_key_value_heads", 3, "not a multiple"),
])  # fmt: skip
def test_configs_that_would_be_misread_are_refused(field, value, sentence, tmp_path):
    """A config.json whose model is not this one gives a sentence that names the field and its value."""
    tiny().save_pretrained(tmp_path)
    change_config(tmp_path, **{"head_dim": None, field: value})
    refused(lambda: Llama.from_pretrained(tmp_path), sentence)



@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_and_damaged_checkpoints(suffix, tmp_path, monkeypatch):
    """Several files read as one. What is missing, odd, damaged or elsewhere is refused; no code runs."""
    write = torch.save
    if suffix == ".bin":
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # import fails from here on
    else:
        write = oracle("safetensors.torch", "safetensors").save_file
    model = tiny(num_key_value_heads=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    (path,), name = tmp_path.glob("*" + suffix), "model.layers.1.mlp.up_proj.weight"
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for changed, sentence in [
        ({key: weights[key] for key in weights if key != name}, f"{name} is missing"),
        (weights | {"extra": torch.ones(1)}, "extra"), (weights | {name: torch.ones(3, 4)}, r"\(3, 4\)"),
        (weights | {"lm_head.weight": torch.ones(97, 32)}, "lm_head.weight is .* should be absent"),
    ]:  # fmt: skip
        write(changed, path)
        refused(lambda: Llama.from_pretrained(tmp_path), sentence)
    path.write_bytes(path.read_bytes()[:3000])
    refused(lambda: Llama.from_pretrained(tmp_path), "cannot be read")
    torch.save(Evil(tmp_path / "trace"), path)
    refused(lambda: Llama.from_pretrained(tmp_path), "cannot be read")
    assert not (tmp_path / "trace").exists()
    path.unlink()
    places = {key: f"part-{i % 2}{suffix}" for i, key in enumerate(weights)}
    for place in set(places.values()):
        write({key: weights[key] for key in weights if places[key] == place}, tmp_path / place)
    index = tmp_path / f"{path.name}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    read = Llama.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), read.state_dict().values()))
    for place in ("../outside", str(tmp_path / "part-0")):
        index.write_text(json.dumps({"weight_map": places | {name: place}}))
        refused(lambda: Llama.from_pretrained(tmp_path), "may name only files beside it")
