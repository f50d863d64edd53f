"""Keys and values of a GPT's former positions, and the attention of new ones over them."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class KvCache:
    """Keys and values of all layers, in memory that is allocated once; the program knows how much of it is filled."""

    def __init__(self, layers: int, batch: int, heads: int, positions: int, like: Tensor) -> None:
        """Room for keys and values of `layers` layers, of d, dtype and device as the tensor `like` (d,) has."""
        shape = (layers, 2, batch * heads, positions, len(like))
        self._kept = [(keys, values) for keys, values in like.new_zeros(shape)]  # each (B*H, T, d)
        self.places = slice(0, 0)
        """Indices of the new positions; all before them are filled."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep keys and values of n new positions, and let their queries, scaled already, see all up to themselves:
        three times (B, n, H, d) -> (B, n, H, d)."""
        B, n, H, d = query.shape
        keys, values = self._kept[layer]
        filled = self.places.stop
        if n == 1:  # for one query, two products take less time on a CPU than scaled_dot_product_attention
            keys[:, filled - 1] = key.reshape(B * H, d)
            values[:, filled - 1] = value.reshape(B * H, d)
            scores = torch.bmm(query.reshape(B * H, 1, d), keys[:, :filled].transpose(1, 2))  # (B*H, 1, t)
            return torch.bmm(scores.softmax(dim=-1), values[:, :filled]).view(B, 1, H, d)
        keys[:, self.places] = rearrange(key, "B n H d -> (B H) n d")
        values[:, self.places] = rearrange(value, "B n H d -> (B H) n d")
        query = rearrange(query, "B n H d -> (B H) n d")
        visible = torch.ones(n, filled, dtype=torch.bool, device=query.device).tril(self.places.start)
        seen = F.scaled_dot_product_attention(query, keys[:, :filled], values[:, :filled], visible, scale=1.0)
        return rearrange(seen, "(B H) n d -> B n H d", B=B)


class FixedKvCache(KvCache):
    """The same, but for one new position the device knows how much is filled. So the same kernels serve for every
    position: what is not filled yet is attended to, with weight 0."""

    def __init__(self, layers: int, batch: int, heads: int, positions: int, like: Tensor) -> None:
        super().__init__(layers, batch, heads, positions, like)
        self.place = torch.zeros(1, dtype=torch.int64, device=like.device)
        """Index of the new position."""
        # Added to scores: row t is 0 for what position t sees, else -inf.
        self._biases = like.new_full((positions, positions), -torch.inf).triu_(1)
        self._bias = self._biases[:1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See KvCache."""
        B, n, _, _ = query.shape
        if n > 1:
            return super().attend(layer, query, key, value)
        keys, values = (rearrange(kept, "(B H) T d -> B H T d", B=B) for kept in self._kept[layer])
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, H, 1, d)
        if layer == 0:  # the same for all layers
            self._bias = self._biases.index_select(0, self.place)  # (1, T)
        keys.index_copy_(2, self.place, key)
        values.index_copy_(2, self.place, value)
        seen = F.scaled_dot_product_attention(query, keys, values, self._bias, scale=1.0)
        return seen.transpose(1, 2)  # (B, 1, H, d)
