"""The `generate` of x-transformers and of Hugging Face's GPT-2.

A class is an additional token of the vocabulary, and comes first. Options that are not named here have the libraries'
defaults.
"""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.peers import Size

with warnings.catch_warnings():  # x-transformers calls torch.jit.script at import, deprecated since torch 2.11
    warnings.filterwarnings("ignore", message=".*torch.jit.script")
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
    from x_transformers.autoregressive_wrapper import top_k


def options_of_ours(size: Size) -> dict[str, Any]:
    """Return the library's options for the architecture of our priors; its rotary positions have one axis only."""
    return {
        "rotary_pos_emb": True,
        "use_rmsnorm": True,
        "ff_mult": (size.gated + 0.5) / size.width,  # the library rounds width * mult down
        "ff_swish": True,
        "ff_glu": True,
        "attn_qk_norm": True,
        "attn_qk_norm_dim_scale": True,
    }


class XTransformers(nn.Module):
    """The GPT of x-transformers, a Peer. options: those of its Decoder."""

    def __init__(self, size: Size, options: dict[str, Any]) -> None:
        super().__init__()
        self.size = size
        heads = {"heads": size.heads, "attn_dim_head": size.width // size.heads}
        net = TransformerWrapper(
            num_tokens=size.vocabulary + size.classes,
            logits_dim=size.vocabulary,
            max_seq_len=size.tokens + 1,
            attn_layers=Decoder(dim=size.width, depth=size.layers, verbose=False, **heads, **options),
        )
        self.wrapper = AutoregressiveWrapper(net)

    @torch.inference_mode()
    def generate(self, labels: Tensor, tokens: int, greedy: bool = False, cached: bool = True) -> Tensor:
        """Sample codes (B, tokens), as Peer says."""
        ids: Tensor = self.wrapper.generate(
            labels[:, None] + self.size.vocabulary,
            tokens,
            temperature=0.0 if greedy else 1.0,
            filter_logits_fn=top_k,
            filter_kwargs={"k": self.size.top_k},
            cache_kv=cached,
        )
        return ids


class Gpt2(nn.Module):
    """GPT-2 of transformers, a Peer. It may also sample class tokens, which does not change its time.

    Raises:
        ImportError: `transformers` is not installed.
    """

    def __init__(self, size: Size, cache: Literal["dynamic", "static"]) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - a peer may be missing

        self.size, self.cache = size, cache
        config = GPT2Config(
            vocab_size=size.vocabulary + size.classes,
            n_positions=size.tokens + 1,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            bos_token_id=None,
            eos_token_id=None,  # no token ends an image early
        )
        self.model: Any = GPT2LMHeadModel(config)

    @torch.inference_mode()
    def generate(self, labels: Tensor, tokens: int, greedy: bool = False, cached: bool = True) -> Tensor:
        """Sample codes (B, tokens), as Peer says."""
        start = labels[:, None] + self.size.vocabulary
        choosing = {"do_sample": False} if greedy else {"do_sample": True, "top_k": self.size.top_k}
        static = {"cache_implementation": "static", "disable_compile": True}
        ids: Tensor = self.model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=tokens,
            use_cache=cached,
            **choosing,
            **(static if cached and self.cache == "static" else {}),
        )
        return ids[:, 1:]
