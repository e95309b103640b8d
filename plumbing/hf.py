"""Hugging Face folders in and out: what stands behind Llama.from_pretrained and Llama.save_pretrained.

    load    config.json -> Config; weight files -> {name: tensor}; names and shapes must match the config
    save    config.json and one weight file, written beside their names, then renamed

Parameters carry Hugging Face's names, so there is no table of names. A folder is read as transformers does:
the first of WEIGHTS that exists, one file or several with an index. Nothing of a pickle is executed.

References: transformers' LlamaConfig of version 4 (rope_theta, rope_scaling) and 5 (rope_parameters).

Left out on purpose: downloads, tokenizer files, writing several files. A config that needs what model.py
leaves out is refused by the field's name.
"""
import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from model import Config

WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")    # the first that exists is read


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
    raw = dict(model_type=None, rope_type=rope.get("rope_type", rope.get("type", "default"))) | raw | rope
    if raw["model_type"] == "mistral":    # LLaMA with a sliding window, which its config may switch off
        raw = dict(num_key_value_heads=8, sliding_window=4096) | raw | dict(model_type="llama")
    implemented = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False,
                       rope_type="default", sliding_window=None, quantization_config=None)
    for key, value in implemented.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}, but this model implements only {value!r}.")
    try:
        return Config(**{f.name: raw[f.name] for f in fields(Config) if raw.get(f.name) is not None})
    except (TypeError, ValueError) as error:
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

    Raises what read_config and read_weights raise, and ValueError if the weights do not match the config."""
    config, weights = read_config(folder), read_weights(Path(folder), dtype)
    embedding = weights.get("model.embed_tokens.weight", torch.empty(0))
    if config.tie_word_embeddings and torch.equal(weights.get("lm_head.weight", embedding), embedding):
        weights.pop("lm_head.weight", None)    # a copy; another head is refused below
    model = cls(config, device="meta")
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    wrong = [f"{name} is {found.get(name, 'missing')} and should be {wanted.get(name, 'absent')}"
             for name in wanted | found if found.get(name) != wanted.get(name)]
    if wrong:
        raise ValueError(f"The weights in {folder} do not fit its config.json: {wrong[0]}, "
                         f"{len(wrong) - 1} more like it.")
    model.load_state_dict(weights, strict=False, assign=True)    # a tied head is not among them
    model.tie_weights()
    return model.to(dtype or model.lm_head.weight.dtype)


# ----- Out --------------------------------------------------------------------------------------------------

def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write config.json and the weights as transformers.LlamaForCausalLM.from_pretrained opens them.

    The weights are model.safetensors, or pytorch_model.bin if safetensors is not installed.
    Raises ValueError if the folder holds safetensors, which would be read in place of a new .bin."""
    folder = Path(folder)
    config = asdict(model.config) | dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", attention_bias=False,
        mlp_bias=False, rope_scaling=None, torch_dtype=str(model.lm_head.weight.dtype).removeprefix("torch."),
        bos_token_id=None, eos_token_id=None)    # the tokenizer's business; transformers would assume 1 and 2
    # a tied head is written once, under the embedding's name
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    for name, scale in model.named_buffers():
        if name.endswith("weight_scale"):    # of a weight in int8
            name = name.removesuffix("_scale")
            weights[name] = (weights[name] * scale.cpu()).to(model.lm_head.weight.dtype)
    try:
        from safetensors.torch import save_file
        name = "model.safetensors"
    except ImportError:
        name = "pytorch_model.bin"
    if shadows := [other for other in WEIGHTS[:WEIGHTS.index(name)] if (folder / other).exists()]:
        raise ValueError(f"{folder} holds {shadows[0]}, which would be read in place of a new {name}: "
                         "take another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if name == "model.safetensors":
        save_file(weights, folder / (name + ".tmp"), metadata={"format": "pt"})
    else:
        torch.save(weights, folder / (name + ".tmp"))
    (folder / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    for final in (name, "config.json"):    # both are complete before they get their names
        os.replace(folder / (final + ".tmp"), folder / final)
