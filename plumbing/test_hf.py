"""Hugging Face folders in and out, held against transformers and tokenizers."""

import json
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
from model import Config, Llama  # noqa: E402
from plumbing import hf as hf_folders  # noqa: E402
from plumbing import sample, shards  # noqa: E402
from test_galore import TINY, Evil, oracle, refused, run, some_tokens, texts, tiny  # noqa: E402

LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def hf_tokenizer(family, folder):
    """A folder with a small tokenizer of this form. Returns it as the package `tokenizers` reads it."""
    hf, byte_level = oracle("tokenizers", "tokenizers"), family == "llama3"
    pre, normal = hf.pre_tokenizers, hf.normalizers
    space, letters = ("Ġ", pre.ByteLevel.alphabet()) if byte_level else ("▁", "▁abcdefghij()\nné中")
    merges = [("d", "e"), ("de", "f"), (space, "a"), (space, space)]
    tokens = dict.fromkeys(["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters])
    ids = {token: i for i, token in enumerate([*tokens, *map("".join, merges)])}
    whole = hf.Tokenizer(hf.models.BPE(ids, merges, byte_fallback=not byte_level))
    if byte_level:
        split = pre.Split(hf.Regex(LLAMA3), "isolated")
        whole.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(False, use_regex=False)])
        whole.decoder = hf.decoders.ByteLevel()
    if family == "llama2":
        whole.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    if family == "mistral":
        whole.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    whole.add_special_tokens(["<s>", "</s>"])
    whole.post_processor = hf.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    folder.mkdir(exist_ok=True)
    whole.enable_truncation(8)  # many folders have one; it is not for training
    whole.save(str(folder / "tokenizer.json"))
    whole.no_truncation()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return whole


@pytest.mark.parametrize("family", ["llama2", "llama3", "mistral"])
def test_tokenizer_of_a_folder(family, tmp_path):
    """Ids and text are the package's, also of a file read in pieces. Bytes are the text's. bos, eot stand."""
    folder = tmp_path / "a.b c"
    theirs, ours = hf_tokenizer(family, folder), data.get_tokenizer(str(folder))
    assert (ours.bos, ours.eot) == (0, 1)
    theirs.encode_special_tokens = True  # "<s>" in a text is text
    for text in [*texts(40), "hello world", "x\n\n\n" * 9, "été 中文😀 \r\n <s> </s> ", "  def"]:
        ids = ours.document(text, ends=True)
        if text and not (family == "mistral" and text[0] == " "):  # a space that this form loses
            assert ids.tolist() == [*theirs.encode(text).ids, 1]
        assert ours.n_bytes[ids].sum() == len(text.encode()) and ours.decode(ids[:-1]) == text
    lines = "".join(f"def f(x): return {i}\n" for i in range(9000))  # three pieces
    (tmp_path / "long.txt").write_text(lines)
    (shard,), _ = shards.find_shards(str(tmp_path / "long.txt"), ours, None, "{}")
    assert np.fromfile(shard.prepare(), ours.dtype).tolist() == [*theirs.encode(lines).ids, 1]
    assert pickle.loads(pickle.dumps(ours)).name == ours.name
    change(folder / "tokenizer_config.json", eos_token="def", add_bos_token=False)
    other = data.get_tokenizer(str(folder))
    assert (other.bos, other.eot) == (None, theirs.token_to_id("def")) and other.name != ours.name


@pytest.mark.parametrize("scaling", [dict(type="linear", factor=2.5), dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32)], ids=["linear", "llama3"])
def test_scaled_rope_is_transformers(scaling, tmp_path):
    """Logits equal transformers' below and beyond the original length, and after the way there and back.
    Its weights lie in several files."""
    hf, tokens = oracle("transformers", "transformers"), some_tokens(1, 200)
    torch.manual_seed(0)
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY | dict(hidden_size=64), initializer_range=0.2,
                                                max_position_embeddings=256, rope_scaling=scaling))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len([*(tmp_path / "theirs").glob("model-*.safetensors")]) > 1
    ours = Llama.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = hf.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
        assert torch.equal(back(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_a_model_comes_in_goes_on_and_leaves(family, tmp_path):
    """--init, --resume, --export, --prompt: transformers continues a text as we do. What is refused."""
    hf, start, gone = oracle("transformers", "transformers"), tmp_path / "start", tmp_path / "gone"
    Llama(Config(640, 32, 48, 2, 2)).save_pretrained(start)
    hf_tokenizer(family, start)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n\n\nété 中文 12345 " * 4000)
    words = ("--init start --data text.txt --total_batch_size 2 --seq_len 32 --eval_tokens 64 --steps 9 "
             "--device cpu").split()
    run(tmp_path, *words, *"--eval_every 99 --out_dir run --lr 0.02".split())
    start.rename(gone)  # the run has a copy of its tokenizer
    run(tmp_path, *"--resume --out_dir run --steps 10 --device cpu".split())
    run(tmp_path, *"run --export out".split(), program=sample)
    gone.rename(start)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o44 == 0o44
    theirs, read = (auto.from_pretrained(tmp_path / "out")
                    for auto in (hf.AutoModelForCausalLM, hf.AutoTokenizer))
    ids = read("def f(x", return_tensors="pt", return_token_type_ids=False)
    text = theirs.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.size(1) :].tolist()
    text, pieces = text[: text.index(1) if 1 in text else None], data.get_tokenizer(str(start)).pieces
    expected = b"".join(pieces[token] for token in text).decode(errors="replace")
    for source in ("run", "out"):
        shown = run(tmp_path, source, *"--temperature 0 --tokens 24 --prompt".split(), "def f(x",
                    program=sample)
        assert shown.startswith(f"def f(x{expected}\n{len(text)} tokens, "), shown

    for options, sentence in {
        "run --export start": "start is there already", ". --export new": ". holds no checkpoint-STEP.pt",
        "run --tokenizer bytes --prompt x": "run has a tokenizer of its own",
        "run --prompt=": "--prompt is empty", "run --export new --tokens 5": "--tokens has no effect with",
    }.items():
        assert sentence in run(tmp_path, *options.split(), expect=2, program=sample)
    file = start / "tokenizer.json"
    assert "has other ids than start" in run(tmp_path, *words, "--tokenizer", "bytes", expect=2)
    change(start / "config.json", vocab_size=50)
    assert "smaller than that of --tokenizer ./start" in run(tmp_path, *words, expect=2)
    file.write_text("{}")
    assert "tokenizer.json cannot be used" in run(tmp_path, *words, expect=2)
    file.unlink()
    assert "start has no tokenizer.json: say --tokenizer" in run(tmp_path, *words, expect=2)
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
        yield from torch.tensor([0xC3, 0xA9, 0xC3])  # an é, and half of one
        signal.raise_signal(signal.SIGINT)

    tiny(vocab_size=320).save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(Llama, "stream", three)
    shown = run(tmp_path, *"hf --tokenizer bytes --prompt x".split(), program=sample)
    assert shown.startswith("xé\N{REPLACEMENT CHARACTER}\n3 tokens, ")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("field, value, sentence", [
    ("attention_bias", True, "attention_bias is True"), ("model_type", "qwen3", "model_type is 'qwen3'"),
    ("rope_scaling", dict(type="yarn", factor=2.0), "rope_type is 'yarn'"),
    ("model_type", "mistral", "sliding_window is 4096"), ("hidden_size", None, "config.json.*hidden_size"),
    ("hidden_size", 36, "head_dim 9, by default"), ("num_key_value_heads", 3, "not a multiple"),
])  # fmt: skip
def test_configs_that_would_be_misread_are_refused(field, value, sentence, tmp_path):
    """A config.json whose model is not this one gives a sentence that names the field and its value."""
    tiny().save_pretrained(tmp_path)
    change(tmp_path / "config.json", **{"head_dim": None, field: value})
    refused(lambda: Llama.from_pretrained(tmp_path), sentence)


def test_damaged_checkpoints(tmp_path, monkeypatch):
    """Without the package safetensors weights are a pickle: what is missing, odd or damaged in it is refused,
    and no code runs."""
    model, path = tiny(tie_word_embeddings=True), tmp_path / "pytorch_model.bin"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)  # import fails
        model.save_pretrained(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path)(some_tokens()), model(some_tokens()))
    weights, name = torch.load(path), "model.layers.1.mlp.up_proj.weight"
    for changed, sentence in [
        ({key: weights[key] for key in weights if key != name}, f'Missing key.* "{name}"'),
        (weights | {"extra": torch.ones(1)}, 'Unexpected key.* "extra"'),
        (weights | {name: torch.ones(3, 4)}, f"size mismatch for {name}"),
        (weights | {"lm_head.weight": torch.ones(97, 32)}, "but tie_word_embeddings is true"),
        (Evil(tmp_path / "trace"), "cannot be read"),
    ]:
        torch.save(changed, path)
        refused(lambda: Llama.from_pretrained(tmp_path), sentence)
    assert not (tmp_path / "trace").exists()
    path.rename(tmp_path / "model.safetensors")
    refused(lambda: Llama.from_pretrained(tmp_path), "model.safetensors cannot be read")
