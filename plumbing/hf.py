"""Hugging Face folders in and out: what stands behind Llama.from_pretrained and Llama.save_pretrained.

    in     config.json -> Config; weight files -> {name: tensor}; names and shapes must match the config
    out    config.json, the weights, the tokenizer's files: made in a folder beside, renamed when complete

Nothing of a pickle is executed.

References: transformers' LlamaConfig of version 4 (rope_theta, rope_scaling) and 5 (rope_parameters).

Left out on purpose: downloads. A config that needs what model.py leaves out is refused by the field's name.
"""
import json
import shutil
import textwrap
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from adam8bit import widen
from model import Config
from plumbing.tokenizer import write_folder

ROPE = dict(default=(), linear=("factor",), llama3=(    # rope_type: the fields that it needs
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


# ----- In ---------------------------------------------------------------------------------------------------

def read_config(folder) -> Config:
    """Config of a folder's config.json.

    Raises FileNotFoundError if it is not there, ValueError if model.py does not implement it."""
    path = Path(folder, "config.json")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: a Hugging Face checkpoint folder is needed.")
    try:
        raw = json.loads(path.read_bytes())
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))    # "type" is the older name
        if kind not in ROPE:
            raise ValueError(f"rope_type is {kind!r}, but this model implements only {', '.join(ROPE)}.")
        scaling = dict(rope_type=kind) | {key: rope[key] for key in ROPE[kind]} if ROPE[kind] else None
        raw |= rope | dict(rope_scaling=scaling)
        if raw["model_type"] == "mistral":    # LLaMA with a sliding window, which its config may switch off
            raw = dict(num_key_value_heads=8, sliding_window=4096) | raw | dict(model_type="llama")
        implemented = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False,
                           partial_rotary_factor=1.0, sliding_window=None, quantization_config=None)
        for key, value in implemented.items():
            if raw.get(key, value) != value:
                raise ValueError(f"{key} is {raw[key]!r}, but this model implements only {value!r}.")
        return Config(**{f.name: raw[f.name] for f in fields(Config) if raw.get(f.name) is not None})
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not describe a LLaMA that can be used here: {error}") from None


def read_weights(folder, dtype):
    """All weights of a folder by name, copied out of one file after the other, so that none stays mapped.

    Raises FileNotFoundError if there are none, ValueError for a file that cannot be read."""
    files, weights = [], {}
    for pattern in ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"):
        files = files or sorted(Path(folder).glob(pattern))
    if not files:
        raise FileNotFoundError(f"{folder} has no weights, neither model.safetensors nor pytorch_model.bin")
    try:
        for file in files:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file
                part = load_file(file)
            else:
                part = torch.load(file, map_location="cpu", weights_only=True)
            weights |= {name: w.to(dtype or w.dtype, copy=True) for name, w in part.items()
                        if not name.endswith("rotary_emb.inv_freq")}    # a buffer of older transformers
    except Exception as error:    # the readers raise half a dozen types for a damaged file
        why = str(error).split("\n")[0]
        raise ValueError(f"the weights in {file} cannot be read ({why}): is the download complete, and the "
                         "package safetensors installed?") from error
    return weights


def assemble(cls, config, weights, folder):
    """A model of these weights, {name: tensor}, not of copies. ValueError if they do not match the config."""
    model = cls(config, device="meta")
    if config.tie_word_embeddings and EMBEDDING in weights:
        weights.setdefault(HEAD, weights[EMBEDDING])
    try:
        model.load_state_dict(weights, assign=True)
        if config.tie_word_embeddings and not torch.equal(weights[HEAD], weights[EMBEDDING]):
            raise RuntimeError(f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true")
    except RuntimeError as error:
        why = textwrap.shorten(str(error), 300)
        raise ValueError(f"The weights in {folder} do not fit its config: {why}") from None
    model.tie_weights()
    return model.to(model.lm_head.weight.dtype)


# ----- Out --------------------------------------------------------------------------------------------------

def wide(stored):
    """A state_dict's weights, with int8 codes multiplied by the scale of their row, in the head's dtype."""
    scales = {name + "_scale" for name in stored} & stored.keys()
    return {name: widen(w, stored.get(name + "_scale"), stored[HEAD].dtype)
            for name, w in stored.items() if name not in scales}


def empty(folder):
    """The folder's whole path. Raises ValueError if it holds anything, or is a file."""
    folder = Path(folder).resolve()
    if folder.is_file() or any(folder.glob("*")):
        raise ValueError(f"{folder} is there already: take another folder.")
    return folder


def save(model: nn.Module, folder, tokenizer=None) -> None:
    """Make a folder that transformers' AutoModelForCausalLM opens, and AutoTokenizer if a data.Tokenizer is
    given. Above 5 GB the weights go to several files, with an index.

    Raises ValueError if the folder holds anything or a package is missing, OSError if the disk is full."""
    folder = empty(folder)
    try:
        from huggingface_hub import save_torch_state_dict
        import safetensors.torch  # noqa: F401, which that needs
    except ImportError:
        raise ValueError("an export needs: pip install safetensors huggingface_hub") from None
    weights = wide({name: w.cpu() for name, w in model.state_dict().items()})
    if model.config.tie_word_embeddings:
        del weights[HEAD]
    ends = dict(bos_token_id=tokenizer and tokenizer.bos, eos_token_id=tokenizer and tokenizer.ends)
    config = asdict(model.config) | ends | dict(    # without ends transformers would assume 1 and 2
        architectures=["LlamaForCausalLM"], model_type="llama",
        torch_dtype=str(model.lm_head.weight.dtype).removeprefix("torch."))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as beside:
        part = Path(beside, folder.name)
        part.mkdir()
        try:
            (part / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
            if tokenizer:    # whose folder may bring its own of these two
                write_folder(tokenizer, part)
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_torch_state_dict(weights, part)
            for file in part.glob("*.safetensors"):
                shutil.copymode(part / "config.json", file)    # they were their owner's only
            part.rename(folder)
        except Exception as error:    # of a full disk, each writer has its own
            raise OSError(f"{folder} could not be written ({error})") from None
