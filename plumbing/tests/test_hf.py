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

sys.path.insert(0, str(Path(__file__).parents[2]))

import data  # noqa: E402
from model import Config, Llama  # noqa: E402
from plumbing import hf, sample, shards  # noqa: E402
from test_galore import TINY, Evil, hf_folder, oracle, refused, run, some_tokens, texts, tiny  # noqa: E402


def hf_tokenizer(family, folder):
    """A folder with a small tokenizer of this form. Returns it as the package `tokenizers` reads it."""
    package, byte_level = oracle("tokenizers", "tokenizers"), family == "llama3"
    pre, normal = package.pre_tokenizers, package.normalizers
    space, letters = ("Ġ", pre.ByteLevel.alphabet()) if byte_level else ("▁", "▁abcdefghij()\nné中")
    merges = [("d", "e"), ("de", "f"), (space, "a"), (space, space)]
    tokens = dict.fromkeys(["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters])
    ids = {token: i for i, token in enumerate([*tokens, *map("".join, merges)])}
    whole = package.Tokenizer(package.models.BPE(ids, merges, byte_fallback=not byte_level))
    if family == "llama2":
        whole.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    if family == "llama3":
        whole.pre_tokenizer = pre.Sequence([pre.ByteLevel(add_prefix_space=False)])
        whole.decoder = package.decoders.ByteLevel()
    if family == "mistral":
        whole.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    whole.add_special_tokens(["<s>", "</s>"])
    whole.post_processor = package.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
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
    transformers, tokens = oracle("transformers", "transformers"), some_tokens(1, 200)
    torch.manual_seed(0)
    config = TINY | dict(hidden_size=64, max_position_embeddings=256, rope_scaling=scaling)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, initializer_range=0.2))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len([*(tmp_path / "theirs").glob("model-*.safetensors")]) > 1
    ours = Llama.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
        assert torch.equal(back(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_a_model_comes_in_goes_on_and_leaves(family, tmp_path):
    """--init, --resume, --export, --prompt: transformers continues a text as we do. What is refused."""
    transformers, start, out = oracle("transformers", "transformers"), tmp_path / "start", tmp_path / "out"

    def call(words, more="", **options):
        return run(tmp_path, *words.split(), *more.split(), **options)

    Llama(Config(640, 32, 48, 2, 2)).save_pretrained(start)
    hf_tokenizer(family, start)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n\n\nété 中文 12345 " * 4000)
    begin = "--init start --data text.txt --total_batch_size 2 --seq_len 32 --eval_tokens 64 --device cpu"
    call(begin, "--steps 9 --eval_every 99 --out_dir run --lr 0.02")
    gone = start.rename(tmp_path / "gone")  # the run has a copy of its tokenizer
    call("--resume --out_dir run --steps 10 --device cpu")
    call("run --export out", program=sample)
    gone.rename(start)
    assert (out / "model.safetensors").stat().st_mode & 0o44 == 0o44
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    read = transformers.AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([read("def").input_ids])
    text = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0]
    text = text[text != 1]  # end-of-text
    expected = f"{data.get_tokenizer(str(start)).decode(text)}\n{len(text) - ids.size(1)} tokens, "
    for source in ("run", "out"):
        shown = call(source, "--temperature 0 --tokens 24 --prompt def", program=sample)
        assert shown.startswith(expected), shown
    for words, sentence in {
        "run --export start": "start is there already", ". --export new": ". holds no checkpoint-STEP.pt",
        "run --tokenizer bytes --prompt x": "run has a tokenizer of its own",
        "run --prompt=": "cannot be empty", "run --export new --tokens 5": "--tokens has no effect with",
    }.items():
        assert sentence in call(words, program=sample, expect=2)
    assert "has other ids than start" in call(begin, "--tokenizer bytes", expect=2)
    change(start / "config.json", vocab_size=50)
    assert "smaller than that of --tokenizer ./start" in call(begin, expect=2)
    (start / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be used" in call(begin, expect=2)
    (start / "tokenizer.json").unlink()
    assert "start has no tokenizer.json: say --tokenizer" in call(begin, expect=2)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"out", "run", "start"}


def test_tiktoken_leaves_with_the_same_ids(monkeypatch, tmp_path):
    """transformers' tokenizer, made of an encoding whose special ids have gaps, gives the encoding's ids."""
    transformers, tiktoken = oracle("transformers", "transformers"), data.tiktoken
    ranks = {bytes([i]): i for i in range(256)} | {b"de": 256, b"def": 257, b" d": 258}
    made = tiktoken.Encoding("made", pat_str=r" ?\w+|\s+|[^\s\w]+", mergeable_ranks=ranks,
                             special_tokens={"<|x|>": 300, "<|endoftext|>": 305})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: made)
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["made"])
    hf.save(tiny(vocab_size=320), tmp_path / "out", data.get_tokenizer("made"))
    theirs, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), "def f(d): été 中文😀"
    assert theirs(text).input_ids == made.encode(text) and theirs("<|x|>").input_ids == [300]
    assert theirs.decode(made.encode(text)) == text and theirs.eos_token_id == 305


def test_interrupted_text_ends_well(monkeypatch, tmp_path):
    """Ctrl-C while a text comes: what there is of it, a new line, tokens/s, exit code 0."""
    def three(model, tokens, *options):
        yield from torch.tensor([0xC3, 0xA9, 0xC3])  # an é, and half of one
        signal.raise_signal(signal.SIGINT)

    hf_folder(tiny(vocab_size=320), tmp_path / "hf")
    monkeypatch.setattr(Llama, "generate", three)
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
    hf_folder(tiny(), tmp_path)
    change(tmp_path / "config.json", **{"head_dim": None, field: value})
    refused(lambda: Llama.from_pretrained(tmp_path), sentence)


def test_damaged_checkpoints(tmp_path, monkeypatch):
    """Large weights are in several files. What is missing, odd or damaged in a pickle of them is refused, and
    no code runs."""
    oracle("safetensors", "safetensors")
    hub = oracle("huggingface_hub", "huggingface_hub")
    small = partial(hub.save_torch_state_dict, max_shard_size=30_000)
    monkeypatch.setattr(hub, "save_torch_state_dict", small)
    model, path = tiny(tie_word_embeddings=True), tmp_path / "pytorch_model.bin"
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(Llama.from_pretrained(tmp_path)(some_tokens()), model(some_tokens()))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)  # import fails
        refused(lambda: model.save_pretrained(tmp_path / "x"), "pip install safetensors")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    hf_folder(model, tmp_path)
    weights, name = torch.load(path), "model.norm.weight"
    assert torch.equal(Llama.from_pretrained(tmp_path)(some_tokens()), model(some_tokens()))
    for changed, sentence in [
        ({}, 'Missing key.* "model.embed_tokens.weight"'),
        (weights | {name: torch.ones(3, 4)}, f"size mismatch for {name}"),
        (weights | {"lm_head.weight": torch.ones(97, 32)}, "but tie_word_embeddings is true"),
        (Evil(tmp_path / "trace"), "cannot be read"),
    ]:
        torch.save(changed, path)
        refused(lambda: Llama.from_pretrained(tmp_path), sentence)
    assert not (tmp_path / "trace").exists()
    path.rename(tmp_path / "model.safetensors")
    refused(lambda: Llama.from_pretrained(tmp_path), "model.safetensors cannot be read")
