"""The cache of keys and values of a GPT's former positions, and the attention of new positions to them."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class KvCache:
    """Keys and values of all layers in memory that is allocated once.

    Set `new_positions` to the range of the new positions before `attend`; all positions before it are filled.
    """

    def __init__(self, layers: int, batch: int, heads: int, positions: int, like: Tensor) -> None:
        """Allocate keys and values (layers, 2, B*H, positions, d); `like` (d,) gives d, dtype and device."""
        shape = (layers, 2, batch * heads, positions, len(like))
        self._cache = [(keys, values) for keys, values in like.new_zeros(shape)]  # each (B*H, T, d)
        self.new_positions = slice(0, 0)
        """Indices of the new positions; all positions before them are filled."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values of n new positions; attend from each to itself and all positions before it.

        query (already scaled), key and value (B, n, H, d) -> (B, n, H, d).
        """
        B, n, H, d = query.shape
        keys, values = self._cache[layer]
        filled = self.new_positions.stop
        if n == 1:  # for one query, two products take less time on a CPU than scaled_dot_product_attention
            keys[:, filled - 1] = key.reshape(B * H, d)
            values[:, filled - 1] = value.reshape(B * H, d)
            scores = torch.bmm(query.reshape(B * H, 1, d), keys[:, :filled].transpose(1, 2))  # (B*H, 1, t)
            return torch.bmm(scores.softmax(dim=-1), values[:, :filled]).view(B, 1, H, d)
        keys[:, self.new_positions] = rearrange(key, "B n H d -> (B H) n d")
        values[:, self.new_positions] = rearrange(value, "B n H d -> (B H) n d")
        query = rearrange(query, "B n H d -> (B H) n d")
        is_visible = torch.ones(n, filled, dtype=torch.bool, device=query.device).tril(self.new_positions.start)
        y = F.scaled_dot_product_attention(query, keys[:, :filled], values[:, :filled], is_visible, scale=1.0)
        return rearrange(y, "(B H) n d -> B n H d", B=B)


class FixedKvCache(KvCache):
    """A cache whose attention for one new position runs the same kernels at every position, as a CUDA graph needs.

    The index of the new position is a tensor on the device. Attention reads the whole cache and gives weight 0 to
    positions that are not filled yet.
    """

    def __init__(self, layers: int, batch: int, heads: int, positions: int, like: Tensor) -> None:
        super().__init__(layers, batch, heads, positions, like)
        self.device_position = torch.zeros(1, dtype=torch.int64, device=like.device)
        """Index of the new position, (1,) int64 on the device."""
        # Added to the scores: row t is 0 at positions up to t, else -inf.
        self._masks = like.new_full((positions, positions), -torch.inf).triu_(1)
        self._mask = self._masks[:1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store and attend; see KvCache.attend."""
        B, n, _, _ = query.shape
        if n > 1:
            return super().attend(layer, query, key, value)
        keys, values = (rearrange(cached, "(B H) T d -> B H T d", B=B) for cached in self._cache[layer])
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, H, 1, d)
        if layer == 0:  # all layers share the mask
            self._mask = self._masks.index_select(0, self.device_position)  # (1, T)
        keys.index_copy_(2, self.device_position, key)
        values.index_copy_(2, self.device_position, value)
        y = F.scaled_dot_product_attention(query, keys, values, self._mask, scale=1.0)
        return y.transpose(1, 2)  # (B, 1, H, d)
