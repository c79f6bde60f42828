"""How a token looks at other tokens: DALL-E's attention patterns and attention under them."""

from kernels.attention.op import packed_attention, sparse_attention
from kernels.patterns import Pattern

__all__ = ["Pattern", "packed_attention", "sparse_attention"]
