"""Hugging Face folders in and out: what stands behind Llama.from_pretrained and Llama.save_pretrained.

    load     config.json -> Config; weight files -> {name: tensor}; names and shapes must match the config
    save     config.json, the weights, the tokenizer's files: made in a folder beside, renamed when complete

Parameters carry Hugging Face's names, so there is no table of names. A folder is read as transformers does:
the first of WEIGHTS that exists, one file or several with an index. Nothing of a pickle is executed.

References: transformers' LlamaConfig of version 4 (rope_theta, rope_scaling) and 5 (rope_parameters).

Left out on purpose: downloads. A config that needs what model.py leaves out is refused by the field's name.
"""
import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from model import Config
from plumbing.tokenizer import write_folder

WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")    # the first that exists is read
FILE_BYTES = 5e9    # of weights in a file
ROPE = dict(default=(), linear=("factor",), llama3=(    # rope_type: the fields that it needs
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))


# ----- In ---------------------------------------------------------------------------------------------------

def read_json(path: Path) -> dict:
    """Raises FileNotFoundError if there is no such file, ValueError if it holds no JSON object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        sentence = f"{path} does not exist: a Hugging Face checkpoint folder is needed."
        raise FileNotFoundError(sentence) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}).") from None


def read_config(folder: str | os.PathLike) -> Config:
    """Config of a folder's config.json.

    Raises FileNotFoundError if it is not there, ValueError if model.py does not implement it."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else dict(rope_type=rope)
    kind = rope.get("rope_type", rope.get("type", "default"))    # "type" is the older name
    if kind not in ROPE or not all(isinstance(rope.get(key), (int, float)) for key in ROPE[kind]):
        raise ValueError(f"{path}: rope_type is {kind!r} with {rope}, but this model implements only "
                         f"{', '.join(ROPE)}, with {', '.join(ROPE['llama3'])} where it needs them.")
    scaling = None if kind == "default" else dict(rope_type=kind) | {key: rope[key] for key in ROPE[kind]}
    raw = dict(model_type=None) | raw | rope | dict(rope_scaling=scaling)
    if raw["model_type"] == "mistral":    # LLaMA with a sliding window, which its config may switch off
        raw = dict(num_key_value_heads=8, sliding_window=4096) | raw | dict(model_type="llama")
    implemented = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False,
                       partial_rotary_factor=1.0, sliding_window=None, quantization_config=None)
    for key, value in implemented.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}, but this model implements only {value!r}.")
    given = {f.name: raw[f.name] for f in fields(Config) if raw.get(f.name) is not None}
    for key, value in given.items():
        if key != "rope_scaling" and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{path}: {key} is {value!r}, but must be a number.")
    try:
        return Config(**given)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not describe a LLaMA ({error}).") from None


def read_weights(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All weights of a folder by name, copied out of one file after the other, so that none stays mapped.

    Raises FileNotFoundError if there are none, ValueError for a file that cannot be read."""
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(WEIGHTS)} is there.")
    names = [first]
    if first.endswith(".json"):    # an index: the names of the files that hold the weights
        names = sorted(set(read_json(folder / first).get("weight_map", {}).values()))
    weights = {}
    for name in names:
        try:
            if Path(name).name != name:
                raise ValueError("an index may name only files beside it")
            if name.endswith(".safetensors"):
                from safetensors.torch import load_file
                part = load_file(folder / name)
            else:
                part = torch.load(folder / name, map_location="cpu", weights_only=True)
            weights |= {key: w.to(dtype or w.dtype, copy=True) for key, w in part.items()
                        if not key.endswith("rotary_emb.inv_freq")}    # a buffer of older transformers
        except Exception as error:    # the readers raise half a dozen types for a damaged file
            missing = isinstance(error, ImportError)
            why = "they need: pip install safetensors" if missing else str(error).split("\n")[0]
            raise ValueError(f"{folder}: the weights in {name!r} cannot be read ({why}).") from error
    return weights


def load(cls: type[nn.Module], folder: str | os.PathLike, dtype: torch.dtype | None) -> nn.Module:
    """A model cls(config) with a folder's weights, on the CPU. dtype None: that of the stored head.

    Raises what read_config, read_weights and assemble raise."""
    return assemble(cls, read_config(folder), read_weights(Path(folder), dtype), folder, dtype)


def assemble(cls: type[nn.Module], config: Config, weights: dict[str, Tensor], folder: str | os.PathLike,
             dtype: torch.dtype | None = None) -> nn.Module:
    """A model of these weights themselves. Raises ValueError if they do not match the config."""
    embedding = weights.get("model.embed_tokens.weight", torch.empty(0))
    if config.tie_word_embeddings and torch.equal(weights.get("lm_head.weight", embedding), embedding):
        weights.pop("lm_head.weight", None)    # a copy; another head is refused below
    model = cls(config, device="meta")
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    wrong = [f"{name} is {found.get(name, 'missing')} and should be {wanted.get(name, 'absent')}"
             for name in wanted | found if found.get(name) != wanted.get(name)]
    if wrong:
        raise ValueError(f"The weights in {folder} do not fit its config: {wrong[0]}, "
                         f"{len(wrong) - 1} more like it.")
    model.load_state_dict(weights, strict=False, assign=True)    # a tied head is not among them
    model.tie_weights()
    return model.to(dtype or model.lm_head.weight.dtype)


# ----- Out --------------------------------------------------------------------------------------------------

def wide(stored: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """A weight as it is, or, if a scale for each row stands beside it, of int8 codes in dtype."""
    scale = stored.get(name + "_scale")
    return stored[name] if scale is None else (stored[name] * scale).to(dtype)


def refuse_what_is_there(folder: str | os.PathLike) -> Path:
    """The folder's whole path. Raises ValueError if it holds anything, or is a file."""
    folder = Path(folder).resolve()
    there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if there or folder.is_file():
        what = ", ".join(there[:8]) or "a file"
        raise ValueError(f"{folder} is there already ({what}): take another folder.")
    return folder


def save(model: nn.Module, folder: str | os.PathLike, tokenizer=None) -> None:
    """Make a folder that transformers' AutoModelForCausalLM opens, and AutoTokenizer if a data.Tokenizer is
    given. Weights go to .safetensors, or to .bin if that package is not installed. Above 5 GB there are
    several files with an index. Raises ValueError if the folder holds anything."""
    folder, weights = refuse_what_is_there(folder), dict(model.named_parameters())    # without a tied head
    ends = dict(bos_token_id=tokenizer and tokenizer.bos, eos_token_id=tokenizer and tokenizer.ends)
    config = asdict(model.config) | ends | dict(    # without ends transformers would assume 1 and 2
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", attention_bias=False,
        mlp_bias=False, torch_dtype=str(model.lm_head.weight.dtype).removeprefix("torch."))
    try:
        from safetensors.torch import save_file
        stem, ending, write = "model", ".safetensors", lambda *to: save_file(*to, metadata={"format": "pt"})
    except ImportError:
        stem, ending, write = "pytorch_model", ".bin", torch.save
    stored, head = weights | dict(model.named_buffers()), model.lm_head.weight
    sizes = {name: weight.numel() * head.element_size() for name, weight in weights.items()}
    files, room = [], 0
    for name, size in sizes.items():
        if not files or room < size:
            files, room = [*files, []], FILE_BYTES
        files[-1].append(name)
        room -= size
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".") as beside:
        part, places = Path(beside, "part"), {}
        part.mkdir()
        for i, names in enumerate(files, 1):
            file = stem + f"-{i:05d}-of-{len(files):05d}" * (len(files) > 1) + ending
            try:
                write({name: wide(stored, name, head.dtype).detach().cpu().contiguous() for name in names},
                      part / file)
            except Exception as error:    # of a full disk, each writer has its own
                raise OSError(f"{folder} could not be written ({error})") from None
            places |= dict.fromkeys(names, file)
        made = {"config.json": config} | (write_folder(tokenizer, part, config) if tokenizer else {})
        if len(files) > 1:
            total = dict(total_size=sum(sizes.values()))
            made[stem + ending + ".index.json"] = dict(metadata=total, weight_map=places)
        if tokenizer:
            made["generation_config.json"] = ends
        for name, content in made.items():
            (part / name).write_text(json.dumps(content, indent=2) + "\n")
        for file in part.iterdir():    # safetensors writes for the owner's eyes only
            shutil.copymode(part / "config.json", file)
        part.rename(folder)
