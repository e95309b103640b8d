"""LLaMA in one file: the model that GaLore trains, its loss and sampling.

    python model.py RUN --prompt "def "    # goes on with a text; RUN: of train.py, or a Hugging Face folder
    python model.py RUN --export DIR       # makes DIR, a Hugging Face folder

    x = embed(tokens); for each block: x += attention(norm(x)); x += mlp(norm(x)); logits = head(norm(x))

Letters in the shapes at line ends
    B, T     sequences, tokens per sequence          N, n   B * T tokens of the loss, those of one chunk
    C, I     hidden_size, intermediate_size          V      vocab_size
    H, KV    heads of queries, of keys and values    D      head_dim
    L        blocks                                  S      positions in the key-value cache

Parameters carry Hugging Face's names. Every projection is an nn.Linear called as a module: its forward can be
swapped. Only the loss reads lm_head.weight itself. Nothing reads a tensor's value in Python: a step
also runs on fake tensors, and its memory is measured so, without a GPU. Each block can be compiled on its
own, `block.compile(fullgraph=True)`: norm, RoPE and SwiGLU then take and keep no memory of their own.

References: LLaMA (arXiv 2302.13971), GaLore Table 5 (2403.03507) and MobileLLM (2402.14905) for the sizes,
RMSNorm (1910.07467), RoPE (2104.09864; scaled 2407.21783), SwiGLU (2002.05202), grouped queries (2305.13245).

Left out on purpose: dropout, biases, sliding windows, YaRN, padding, masks, ignored targets, beam search.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    """A model's shape, named as in Hugging Face's LlamaConfig. ValueError if the heads do not divide,
    or head_dim is odd."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None             # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # factor alone: linear; with low_freq_factor: llama3. See rope
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048     # only carried along: RoPE is computed for whatever length comes

    def __post_init__(self):
        heads, kv = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        width = self.head_dim or self.hidden_size / heads
        if heads % kv:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}")
        if width % 2:    # RoPE turns pairs
            raise ValueError(f"head_dim {width:g}, by default hidden_size / num_attention_heads, is not even")
        self.num_key_value_heads, self.head_dim = kv, int(width)


def size(hidden: int, mlp: int, heads: int, layers: int, **more) -> dict:
    return more | dict(hidden_size=hidden, intermediate_size=mlp,
                       num_attention_heads=heads, num_hidden_layers=layers)


SIZES: dict[str, dict] = {    # Config(vocab_size=..., **SIZES[name])
    "toy": size(256, 688, 4, 2),
    "60m": size(512, 1376, 8, 8),
    "130m": size(768, 2048, 12, 12),
    "350m": size(1024, 2736, 16, 24),
    "1b": size(2048, 5461, 32, 24),
    "3b": size(2560, 6848, 32, 32),
    "7b": size(4096, 11008, 32, 32),
    "mobilellm-125m": size(576, 1536, 9, 30, num_key_value_heads=3, tie_word_embeddings=True),
    "mobilellm-350m": size(960, 2560, 15, 32, num_key_value_heads=5, tie_word_embeddings=True),
}


# ----- The block --------------------------------------------------------------------------------------------

def rope(start: int, end: int, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D) in fp32 for positions start to end - 1. Computed in each forward pass, once for
    all blocks: .to(bfloat16) would round a buffer, .to_empty() would leave it blank."""
    D = config.head_dim
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    s, keep = config.rope_scaling or dict(factor=1), 0.0    # keep: the share of a frequency left as it is
    if low := s.get("low_freq_factor"):    # llama3: all of it, if it made enough turns in the original length
        turns = frequency * s["original_max_position_embeddings"] / (2 * torch.pi)      # (D/2,)
        keep = ((turns - low) / (s["high_freq_factor"] - low)).clamp(0, 1)
    frequency = frequency * (keep + (1 - keep) / s["factor"])
    angle = torch.outer(torch.arange(start, end, dtype=torch.float32, device=device), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D): dimension i turns with dimension i + D/2 (Hugging Face's convention), in fp32."""
    a, b = x.chunk(2, dim=-1)                                                           # (B, H, T, D/2)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).type_as(x)


linear = partial(nn.Linear, bias=False)    # no projection has one


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.q_proj = linear(C, config.num_attention_heads * D)
        self.k_proj = linear(C, config.num_key_value_heads * D)
        self.v_proj = linear(C, config.num_key_value_heads * D)
        self.o_proj = linear(config.num_attention_heads * D, C)

    def forward(self, x, cos, sin, cache=None) -> Tensor:
        T, D = cos.shape
        q, k, v = (project(x).unflatten(-1, (-1, D)).transpose(1, 2)                    # (B, H or KV, T, D)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:    # (2, B, KV, S, D): the last T of its positions are these tokens'
            cache[:, :, :, -T:] = torch.stack((k, v))
            k, v = cache                                                                # (B, KV, S, D)
        # Causal from the first position (training, prompt), or a single token that sees all. enable_gqa saves
        # k and v unrepeated. It is fused on CPU, and on CUDA in bf16; in fp32 CUDA takes a slow path.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=q.size(1) > k.size(1))
        return self.o_proj(y.transpose(1, 2).flatten(2))                                 # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))              # inside: (B, T, I)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, recompute=False) -> Tensor:
        if recompute and torch.is_grad_enabled():
            # In here: a checkpoint around a compiled block would repeat more than its backward pass needs.
            return checkpoint(self.forward, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ----- The loss ---------------------------------------------------------------------------------------------

def loss_of_chunk(z: Tensor, targets: Tensor, count: int, training: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross-entropies of logits z (n, V) with targets (n, 1); its gradient / count in z's dtype.
    Compiled it makes three passes over z, and has no copy in fp32."""
    log_p = z.float().log_softmax(dim=1)                                                # (n, V)
    loss = -log_p.gather(1, targets).sum()
    if not training:
        return loss, None
    at_target = targets == torch.arange(z.size(1), device=z.device)                     # (n, V)
    return loss, log_p.exp_().add_(at_target, alpha=-1).div_(count).to(z.dtype)         # softmax - onehot


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(x W'). A Function because of memory: one chunk's logits exist at a time.
    Their gradient is (softmax - onehot) / N. Forward makes dx and dW of it, which backward only scales."""
    @staticmethod
    def forward(ctx, x, W, targets, rows, training, loss_of_chunk):
        dx = torch.empty_like(x) if training else None                                  # (N, C)
        dW = torch.zeros_like(W) if training and ctx.needs_input_grad[1] else None      # (V, C)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for i in range(0, len(x), rows):
            xs, t = x[i:i + rows], targets[i:i + rows, None]                            # (n, C), (n, 1)
            part, dz = loss_of_chunk(F.linear(xs, W), t, len(x), training)              # (), (n, V)
            loss += part
            if training:
                torch.mm(dz, W, out=dx[i:i + rows])
            if dW is not None:
                dW.addmm_(dz.T, xs)       # sums in fp32 inside a chunk; rounded to W's type once per chunk
            del dz                        # or it would live on beside the next chunk's
        ctx.save_for_backward(dx, dW)
        return loss / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        # In place, so that the head's gradient exists once. Autograd refuses a second backward through it.
        return *(None if made is None else made.mul_(dloss) for made in ctx.saved_tensors), *[None] * 4


CHUNK_LOGITS = 1024 * 32000    # of a chunk: 131 MB in fp32, 1024 tokens at the paper's vocabulary


def cross_entropy(x: Tensor, W: Tensor, targets: Tensor, rows: int | None = None,
                  loss_of_chunk=loss_of_chunk) -> Tensor:
    """Mean cross-entropy in nats, 0-dim fp32; under no_grad only the loss is computed.
    x (N, C) hidden states, W (V, C) head weight, targets (N,) int64; rows: tokens per chunk."""
    rows = rows or max(1, CHUNK_LOGITS // len(W) // 64) * 64    # whole tiles of the matrix product
    return ChunkedCrossEntropy.apply(x, W, targets, rows, torch.is_grad_enabled(), loss_of_chunk)


# ----- The model --------------------------------------------------------------------------------------------

class Llama(nn.Module):
    """LLaMA with random weights, made on `device` in `dtype`, without a second copy. On "meta", to_empty()
    and init_weights() complete it. recompute: so many blocks, the first ones, keep no activations but compute
    them again in the backward pass."""
    loss_of_chunk = staticmethod(loss_of_chunk)    # may be compiled

    def __init__(self, config: Config, device: torch.device | str = None, dtype: torch.dtype = None):
        super().__init__()
        self.config, self.recompute = config, 0
        with torch.device("meta"):
            self.model = nn.ModuleDict(dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
                layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                norm=nn.RMSNorm(config.hidden_size, config.rms_norm_eps)))
            self.lm_head = linear(config.hidden_size, config.vocab_size)
        for module in self.modules():    # not to_empty(), which cannot make fake tensors of these
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, device=device, dtype=dtype)))
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02) for matrices, and for a fork's stacked experts; 1 for norms; 0 for a fork's biases."""
        self.tie_weights()
        for name, p in self.named_parameters():
            nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.constant_(p, not name.endswith("bias"))

    def tie_weights(self) -> None:
        """One parameter for embedding and head, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def compile_blocks(self) -> None:
        """torch.compile, block by block, and of the loss. A whole model would be compiled at each refresh."""
        for block in self.model.layers:
            block.compile(fullgraph=True, dynamic=False)
        self.loss_of_chunk = torch.compile(self.loss_of_chunk, fullgraph=True, dynamic=False)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())    # a tied weight counts once

    def hidden(self, tokens: Tensor, cache: Tensor | None = None) -> Tensor:
        """Normalised hidden states (B, T, C) of tokens (B, T). cache (L, 2, B, KV, S, D) holds keys and
        values: the tokens are the last T of its S positions, and T is S or 1."""
        S = tokens.size(1) if cache is None else cache.size(-2)
        cos, sin = rope(S - tokens.size(1), S, self.config, tokens.device)              # (T, D)
        x = self.model.embed_tokens(tokens)                                             # (B, T, C)
        for i, block in enumerate(self.model.layers):
            run = block if cache is None else block.forward    # compiled, it would compile for every length
            x = run(x, cos, sin, None if cache is None else cache[i], i < self.recompute)
        return self.model.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) int64; with targets (B, T) the mean cross-entropy in nats."""
        x = self.hidden(tokens)
        if targets is None:
            return self.lm_head(x)
        return cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                             loss_of_chunk=self.loss_of_chunk)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, generator: torch.Generator | None = None):
        """Yields the next token (B, 1) of tokens (B, T), max_new_tokens times. Temperature 0 takes the
        likeliest; top_k samples among the k likeliest. ValueError if T, temperature or top_k is too small."""
        (B, T), c, new = tokens.shape, self.config, tokens
        if T == 0 or temperature < 0 or top_k is not None and top_k < 1:
            raise ValueError(f"generate needs T, top_k > 0 and temperature >= 0: {T}, {top_k}, {temperature}")
        shape = c.num_hidden_layers, 2, B, c.num_key_value_heads, T + max_new_tokens, c.head_dim
        cache = self.lm_head.weight.new_empty(shape)                                    # (L, 2, B, KV, S, D)
        for S in range(T, T + max_new_tokens):    # new: the prompt, then one token
            logits = self.lm_head(self.hidden(new, cache[..., :S, :])[:, -1]).float()   # (B, V)
            if top_k:
                logits[logits < logits.topk(min(top_k, c.vocab_size)).values[:, -1:]] = -torch.inf
            new = (logits.argmax(dim=-1, keepdim=True) if temperature == 0 else         # (B, 1)
                   torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))
            yield new

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype | None = None) -> "Llama":
        """Model of a Hugging Face folder, on the CPU. dtype None: the head's. Errors: plumbing/hf.py."""
        from plumbing import hf    # inside: the rest of this file works when it is copied alone
        return hf.assemble(cls, hf.read_config(folder), hf.read_weights(folder, dtype), folder)

    def save_pretrained(self, folder) -> None:
        """Write a folder that transformers.LlamaForCausalLM.from_pretrained opens. Errors: plumbing/hf.py."""
        from plumbing import hf
        hf.save(self, folder)


if __name__ == "__main__":
    from plumbing import sample
    sample.main()
