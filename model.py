"""LLaMA in one file: the model that GaLore trains, the chunked loss, sampling, Hugging Face weights in and out.

    x = embed(tokens); for each block: x += attention(norm(x)); x += mlp(norm(x)); logits = head(norm(x))

Parts, from top to bottom
    Config, SIZES             shapes, under the field names of Hugging Face's LlamaConfig
    RMSNorm, rope, Block      the transformer block: grouped-query attention with RoPE, then SwiGLU, no biases
    ChunkedCrossEntropy       loss and gradients a chunk of tokens at a time: the full logits never exist
    Llama                     forward, generate with a key-value cache, from_pretrained, save_pretrained

Parameters carry Hugging Face's names, so weights go both ways without a mapping table. Every projection is a plain
nn.Linear that is called as a module (galore.thin swaps its forward); only the training loss reads lm_head.weight itself.
Each block can be compiled on its own (`layer.compile(fullgraph=True)`); nothing here reads a tensor's value in Python,
so the model also runs on fake tensors, which is how its memory is measured without a GPU.

References: LLaMA (arXiv 2302.13971), GaLore Table 5 (2403.03507) for the paper's shapes, MobileLLM (2402.14905),
RMSNorm (1910.07467), RoPE (2104.09864), SwiGLU (2002.05202), grouped-query attention (2305.13245).

Left out on purpose: dropout, biases, sliding windows, scaled RoPE, padding and attention masks (documents are packed),
ignored targets, beam search, quantised weights. A checkpoint that needs one of them is refused.
"""
import json
import os
from dataclasses import asdict, dataclass, fields
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Shapes

@dataclass(unsafe_hash=True)
class Config:
    """Shape of a model. Raises ValueError if the heads do not divide as they must."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None             # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048     # only carried along: RoPE is computed for whatever length comes

    def __post_init__(self):
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size / heads
        if heads % self.num_key_value_heads or self.head_dim % 2:    # RoPE turns pairs
            raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {self.num_key_value_heads}, "
                             f"and head_dim {self.head_dim:g} (if not given, hidden_size / num_attention_heads) an even number")
        self.head_dim = int(self.head_dim)


def _size(hidden: int, mlp: int, heads: int, layers: int, kv_heads: int | None = None, tied: bool = False) -> dict:
    return dict(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_hidden_layers=layers,
                num_key_value_heads=kv_heads or heads, tie_word_embeddings=tied)


SIZES: dict[str, dict] = {  # Config(vocab_size=..., **SIZES[name])
    "toy": _size(192, 512, 4, 4),
    "60m": _size(512, 1376, 8, 8),
    "130m": _size(768, 2048, 12, 12),
    "350m": _size(1024, 2736, 16, 24),
    "1b": _size(2048, 5461, 32, 24),
    "3b": _size(2560, 6848, 32, 32),
    "7b": _size(4096, 11008, 32, 32),
    "mobilellm-125m": _size(576, 1536, 9, 30, kv_heads=3, tied=True),
    "mobilellm-350m": _size(960, 2560, 15, 32, kv_heads=5, tied=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# The block

class Normalise(torch.autograd.Function):
    """weight * x / rms(x), which keeps x and nothing else of its size (autograd would keep two or three)."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)    # (B, T, 1)
        rstd = (norm.square() / x.size(-1) + eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return weight * (x * rstd).type_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, D: Tensor):
        x, weight, rstd = ctx.saved_tensors
        unit, G = x * rstd, (D * weight).float()                                         # (B, T, C) in fp32
        dx = (G - unit * (G * unit).mean(-1, keepdim=True)) * rstd
        return dx.type_as(x), (D * unit.type_as(x)).flatten(0, -2).sum(0), None


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return Normalise.apply(x, self.weight, self.eps)
        wide = x.float()    # the compiler fuses the formula, and torch 2.11 would keep what a Function returns in a checkpoint
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).type_as(x)


def rope(start: int, end: int, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D) in fp32 for positions start to end - 1. Computed anew in each forward pass, a few small
    kernels for all layers: no buffer that .to(bfloat16) could round or .to_empty() could leave blank."""
    D = config.head_dim
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    angle = torch.outer(torch.arange(start, end, dtype=torch.float32, device=device), frequency)    # (T, D/2)
    angle = torch.cat((angle, angle), dim=-1)                                                       # (T, D)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D): dimension i turns with dimension i + D/2 (Hugging Face's convention), in fp32."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim).transpose(1, 2)            # (B, H, T, D), k and v (B, KV, T, D)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:    # (2, B, KV, S, D): the last T of its S positions are these tokens', the others are filled
            cache[:, :, :, -T:] = torch.stack((k, v))
            k, v = cache
        # causal from the first position (training, prompt), or a single token that sees all; enable_gqa saves k and v
        # unrepeated (fused on CPU and for bf16 on CUDA; fp32 on CUDA has no such kernel and takes the slow path)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=q.size(1) > k.size(1))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                        # (B, T, C)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps these two (autograd would keep silu(gate), too)."""
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, D: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(D * up, gate), F.silu(gate).mul_(D)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up if torch.compiler.is_compiling() else SwiGLU.apply(gate, up))    # see RMSNorm


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None = None, recompute: bool = False) -> Tensor:
        if recompute:    # in here, not around the block: so a compiled block, too, repeats only what its backward pass needs
            return checkpoint(self.forward, x, cos, sin, use_reentrant=False, preserve_rng_state=False)    # nothing is random
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------------------
# The loss

class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(x W') against targets, with the logits of one chunk of tokens alive at a time.

    The gradient of the logits, (softmax - onehot) / N, is known as soon as the logits are, so both gradients are made
    in the forward pass, and backward only scales them. The fp32 logits buffer turns into its own gradient in place.
    """
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, targets: Tensor, rows: int, training: bool) -> Tensor:
        dx = torch.empty_like(x) if training else None
        dW = torch.zeros_like(W) if training and ctx.needs_input_grad[1] else None    # none for a frozen head
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for i in range(0, len(x), rows):
            xs, t = x[i:i + rows], targets[i:i + rows, None]    # (n, C), (n, 1)
            z = F.linear(xs, W).float()                         # (n, V)
            z -= z.amax(dim=1, keepdim=True)
            picked = z.gather(1, t)                             # (n, 1)
            total = z.exp_().sum(dim=1, keepdim=True)           # (n, 1)
            loss += (total.log() - picked).sum()
            if training:
                z /= total * len(x)
                z = z.scatter_add_(1, t, z.new_full(t.shape, -1 / len(x))).to(x.dtype)    # now the gradient of the logits
                torch.mm(z, W, out=dx[i:i + rows])
                if dW is not None:
                    dW.addmm_(z.T, xs)    # sums in fp32 inside a chunk; rounded to W's type once a chunk
            del z                         # or it would live on beside the next chunk's
        ctx.save_for_backward(dx, dW)
        return loss / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        # in place, so that the head's gradient exists once; autograd refuses a second backward through it
        return *(None if g is None else g.mul_(grad) for g in ctx.saved_tensors), None, None, None


CHUNK_LOGITS = 1024 * 32000    # logits alive at once: 131 MB in fp32, 1024 tokens at the paper's vocabulary


def cross_entropy(x: Tensor, W: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """Mean cross-entropy in nats, 0-dim fp32. x (N, C) hidden states, W (V, C) head weight, targets (N,) int64.
    rows: tokens a chunk. Under no_grad only the loss is computed."""
    rows = rows or max(1, CHUNK_LOGITS // len(W) // 64) * 64    # whole tiles of the matrix product
    return ChunkedCrossEntropy.apply(x, W, targets, rows, torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------------------------------------
# The model

class Llama(nn.Module):
    """LLaMA with random weights, N(0, 0.02), norms one; made directly on `device` in `dtype`, without a second copy.

    `activation_checkpointing = True` recomputes each block in the backward pass instead of keeping its activations.
    With device "meta", `to_empty(device=...)` and then `init_weights()` complete the model.
    """
    def __init__(self, config: Config, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        device = device or torch.get_default_device()    # asked for before "meta" becomes the default
        with torch.device("meta"):
            self.model = nn.ModuleDict(dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
                layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(p, device=device, dtype=dtype)))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        self.tie_weights()
        for p in self.parameters():
            p.normal_(0, 0.02) if p.ndim == 2 else p.fill_(1)

    def tie_weights(self) -> None:
        """One parameter for embedding and head, if the config says so. Needed again after to_empty(), which unties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())    # tied weights count once

    def hidden(self, tokens: Tensor, cache: Tensor | None = None) -> Tensor:
        """Normalised hidden states (B, T, C) of tokens (B, T). cache (L, 2, B, KV, S, D) holds keys and values of S
        positions, of which the tokens are the last T, and T is S or 1."""
        T = tokens.size(1)
        end = T if cache is None else cache.size(-2)
        cos, sin = rope(end - T, end, self.config, tokens.device)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        x = self.model.embed_tokens(tokens)
        for block, kv in zip(self.model.layers, repeat(None) if cache is None else cache):
            x = block(x, cos, sin, kv, recompute)
        return self.model.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V); with targets (B, T) int64 the mean cross-entropy in nats, 0-dim fp32."""
        x = self.hidden(tokens)
        if targets is None:
            return self.lm_head(x)
        return cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")    # blocks compiled for training would recompile at every length
    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
        """Continue tokens (B, T) to (B, T + max_new_tokens). Temperature 0 takes the likeliest token; top_k samples
        among the k likeliest. Raises ValueError for an empty prompt, a negative temperature or top_k below one."""
        if tokens.size(1) == 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"generate needs a prompt of at least one token (got {tokens.size(1)}), a temperature "
                             f"of zero or more (got {temperature}) and a top_k of one or more (got {top_k}).")
        c, (B, T) = self.config, tokens.shape
        cache = self.lm_head.weight.new_empty(c.num_hidden_layers, 2, B, c.num_key_value_heads, T + max_new_tokens, c.head_dim)
        for end in range(T, T + max_new_tokens):
            new = tokens if end == T else tokens[:, -1:]               # the whole prompt, then a token at a time
            logits = self.lm_head(self.hidden(new, cache[..., :end, :])[:, -1]).float()    # (B, V)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)            # (B, 1)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, c.vocab_size)).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, float("-inf"))
                token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
            tokens = torch.cat((tokens, token), dim=1)
        return tokens

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> "Llama":
        """Read a Hugging Face LLaMA-family folder: config.json and safetensors or .bin weights, in one file or several.
        dtype None keeps the type the head is stored in. The model is on the CPU.

        Raises FileNotFoundError for a file that is not there, ValueError for one that cannot be read, for a config that
        this model does not implement, and for weights that do not match the config."""
        config = read_config(Path(folder))
        weights = _read_weights(Path(folder), dtype)
        embedding = weights.get("model.embed_tokens.weight", torch.empty(0))
        if config.tie_word_embeddings and torch.equal(weights.get("lm_head.weight", embedding), embedding):
            weights.pop("lm_head.weight", None)    # a copy may be stored; a head of its own is refused below
        model = cls(config, device="meta")
        wanted, found = ({n: tuple(w.shape) for n, w in d.items()} for d in (dict(model.named_parameters()), weights))
        wrong = [f"{name} is {found.get(name, 'missing')} and should be {wanted.get(name, 'absent')}"
                 for name in wanted | found if found.get(name) != wanted.get(name)]
        if wrong:
            raise ValueError(f"The weights in {folder} do not fit its config.json: {wrong[0]}, {len(wrong) - 1} more like it.")
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        return model.to(dtype or model.lm_head.weight.dtype)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and the weights (model.safetensors, or pytorch_model.bin if safetensors is not installed) as
        transformers.LlamaForCausalLM.from_pretrained opens them. Files are complete before they get their names.

        Raises ValueError if the folder holds safetensors that would be read in place of a new pytorch_model.bin."""
        folder = Path(folder)
        config = asdict(self.config) | dict(
            architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False,
            rope_scaling=None, torch_dtype=str(self.lm_head.weight.dtype).removeprefix("torch."),
            bos_token_id=None, eos_token_id=None)    # the tokenizer's business; transformers would assume 1 and 2
        weights = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}    # a tied head once
        try:
            from safetensors.torch import save_file
            name, save = "model.safetensors", lambda w, path: save_file(w, path, metadata={"format": "pt"})
        except ImportError:
            name, save = "pytorch_model.bin", torch.save
        if shadows := [n for n in WEIGHTS[:WEIGHTS.index(name)] if (folder / n).exists()]:
            raise ValueError(f"{folder} holds {shadows[0]}, which would be read in place of a new {name}: take another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        save(weights, folder / (name + ".tmp"))
        (folder / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
        for final in (name, "config.json"):
            os.replace(folder / (final + ".tmp"), folder / final)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: a Hugging Face checkpoint folder is needed.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}).") from None


def read_config(folder: Path) -> Config:
    """Config of a Hugging Face config.json, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    path = folder / "config.json"
    raw = _read_json(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    raw = dict(model_type=None, rope_type=rope.get("rope_type", rope.get("type", "default"))) | raw | rope
    if raw["model_type"] == "mistral":    # LLaMA with a sliding window, which its config may switch off
        raw = dict(num_key_value_heads=8, sliding_window=4096) | raw | dict(model_type="llama")
    known = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_type="default",
                 sliding_window=None, quantization_config=None)
    for key, value in known.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}, but this model implements only {value!r}.")
    try:
        return Config(**{f.name: raw[f.name] for f in fields(Config) if raw.get(f.name) is not None})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a LLaMA ({error}).") from None


def _read_weights(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All weights of a folder, in memory of their own, one file after the other."""
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(WEIGHTS)} is there.")
    names = sorted(set(_read_json(folder / first).get("weight_map", {}).values())) if first.endswith(".json") else [first]
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
                        if not key.endswith("rotary_emb.inv_freq")}    # a buffer in checkpoints of older transformers
        except Exception as error:    # the readers raise half a dozen types for a damaged file
            why = "they need: pip install safetensors" if isinstance(error, ImportError) else str(error).split("\n")[0]
            raise ValueError(f"{folder}: the weights in {name!r} cannot be read ({why}).") from error
    return weights
