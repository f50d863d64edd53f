"""One layer of x-transformers' decoder, with the options that all our transformers share."""

import warnings

import torch

with warnings.catch_warnings():  # x-transformers 2.31 calls torch.jit.script at import, deprecated in torch 2.15
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    from x_transformers import Decoder
    from x_transformers.x_transformers import LayerIntermediates

Cache = LayerIntermediates
"""Keys and values of a layer's former positions."""


def layer(width: int, heads: int, head_width: int, inner: int, dropout: float = 0.0) -> Decoder:
    """Causal attention, then a gated feed-forward network (SwiGLU), each in a residual branch behind an RMSNorm.

    A layer is a decoder of its own, without the norm that ends one, so that the caller can recompute it in the
    backward pass, keep its cache, and give it the rotation of its positions.
    """
    return Decoder(
        dim=width,
        depth=1,
        heads=heads,
        attn_dim_head=head_width,
        rotary_pos_emb=False,  # the caller passes rotations along the grid's two axes
        pre_norm_has_final_norm=False,
        use_rmsnorm=True,
        ff_mult=(inner + 0.5) / width,  # the library rounds width * mult down
        ff_swish=True,
        ff_glu=True,
        attn_qk_norm=True,
        attn_qk_norm_dim_scale=True,
        # On CPU the plain product is faster at these lengths: 172 ms a step of the quickstart, 249 fused.
        attn_flash=torch.cuda.is_available(),
        attn_dropout=dropout,
        ff_dropout=dropout,
        verbose=False,
    )
