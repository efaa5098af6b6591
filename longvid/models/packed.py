"""Linear layers whose weights lie in memory as oneDNN wants them: those of a DiT that a CPU runs, never trains.

torch's own linear layer copies its bias first and lays the weight out anew in each call. Packed once, with the GELU
that may follow in the same pass over memory, it takes 0.6 to 0.8 of the time at the widths of small models.
"""

import torch
from torch import Tensor, nn

from longvid.models.dit import Attention, DiT, FeedForward, TanhGELU


class PackedLinear(nn.Module):
    """Layers of one input, their outputs side by side, of the values that their weights have now; then, with `gelu`,
    GELU by its tanh approximation."""

    def __init__(self, *layers: nn.Linear, gelu: bool = False):
        super().__init__()
        weight, self.bias = (torch.cat([getattr(layer, name).detach() for layer in layers])
                             for name in ("weight", "bias"))  # fmt: skip
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.attributes = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.attributes)


class PackedSelfAttention(nn.Module):
    """`plain`, whose queries, keys and values come of one product."""

    output = Attention.output

    def __init__(self, plain: Attention):
        super().__init__()
        self.num_heads, self.norm_q, self.norm_k = plain.num_heads, plain.norm_q, plain.norm_k
        self.to_qkv, self.to_out = PackedLinear(plain.to_q, plain.to_k, plain.to_v), plain.to_out

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d) -> three times (..., n, head dimension). Values are copied: a view would keep all three alive."""
        queries, keys, values = self.to_qkv(x).chunk(3, -1)
        parts = (self.norm_q(queries), self.norm_k(keys), values.contiguous())
        return tuple(part.unflatten(-1, (self.num_heads, -1)) for part in parts)


def can_pack(weight: Tensor) -> bool:
    """Whether this torch and this machine multiply by such a weight packed."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(dit: DiT) -> DiT:
    """The DiT, the linear layers of its blocks packed where that can be; it cannot be trained or saved any more."""
    for block in dit.blocks.values():
        if not can_pack(block.attn1.to_q.weight):
            break
        block.attn1 = PackedSelfAttention(block.attn1)
        for module in list(block.modules()):
            if isinstance(module, FeedForward) and isinstance(module.net[1], TanhGELU):
                module.net[0].proj, module.net[1] = PackedLinear(module.net[0].proj, gelu=True), nn.Identity()
            for name, linear in list(module.named_children()):
                if type(linear) is nn.Linear:
                    setattr(module, name, PackedLinear(linear))
    return dit
