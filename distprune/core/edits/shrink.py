"""Real removal: a network without the removed channels and heads."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.granularity.coupling import Group


def shrink(model: nn.Module, groups: "Sequence[Group]", kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` without the units where `kept[group.name]` (bool, [units]) is False; a group without an entry stays whole.

    Values, dtype, device, tied weights and training mode stay; gradients are dropped. In eval mode it computes what the model computes
    when the weights that make and read the removed units are zero. Raises UserError if a group would lose all its units.
    """
    tensors = _tensors(model)
    lines: dict[tuple[str, int], Tensor] = {}  # (name, dim) -> bool [size of dim], what is kept of it
    for group in groups:
        if group.name not in kept:
            continue
        unit_kept = kept[group.name]
        if not bool(unit_kept.any()):
            raise UserError(f"At least one unit of group '{group.name}' must be kept, got none of {group.units}. Keep its best unit.")
        for part in group.parts:
            tensor = tensors[part.name]
            line = lines.setdefault((part.name, part.dim), torch.ones(tensor.shape[part.dim], dtype=torch.bool, device=tensor.device))
            line[part.index[~unit_kept.to(part.index.device)].to(tensor.device)] = False

    cut: dict[str, Tensor] = {}
    for (name, dim), line in lines.items():
        cut[name] = cut.get(name, tensors[name].detach()).index_select(dim, line.nonzero().squeeze(1))
    # deepcopy takes what its memo holds instead of copying: tied weights stay tied, and the whole network never lies in memory twice.
    smaller = {name: _like(tensors[name], value) for name, value in cut.items()}
    small = copy.deepcopy(model, {id(tensors[name]): value for name, value in smaller.items()})
    changed = set(map(id, smaller.values()))
    for module in small.modules():
        if any(id(tensor) in changed for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            _follow(module)
    for module in small.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(inner, FewerHeads) for inner in module.modules()):
            module.enable_nested_tensor = module.use_nested_tensor = False  # only torch's fused layer reads nested tensors
    return small


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _like(old: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def _follow(module: nn.Module) -> None:
    """Set a module's own numbers (out_channels, num_features, ...) to what its tensors now are."""
    match module:
        case nn.modules.conv._ConvNd():
            _follow_conv(module)
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.modules.batchnorm._NormBase():  # batch and instance normalization
            per_channel = module.weight if module.weight is not None else module.running_mean
            if per_channel is not None:
                module.num_features = per_channel.shape[0]
        case nn.GroupNorm() if module.weight is not None:
            module.num_groups = module.weight.shape[0] // (module.num_channels // module.num_groups)
            module.num_channels = module.weight.shape[0]
        case nn.PReLU():
            module.num_parameters = module.weight.shape[0]
        case nn.MultiheadAttention():
            packed = module.in_proj_weight
            heads = (packed.shape[0] // 3 if packed is not None else module.q_proj_weight.shape[0]) // module.head_dim
            if heads < module.num_heads:
                module.__class__ = FewerHeads  # in place, so that it stays the same module wherever it is used
                module.num_heads, module._qkv_same_embed_dim = heads, False


def _follow_conv(conv: nn.modules.conv._ConvNd) -> None:
    rows, columns = conv.weight.shape[:2]
    if conv.transposed:  # [in, out / groups, ...]
        conv.groups = rows // (conv.in_channels // conv.groups) if conv.groups > 1 else 1
        conv.in_channels, conv.out_channels = rows, columns * conv.groups
    else:  # [out, in / groups, ...]
        conv.groups = rows // (conv.out_channels // conv.groups) if conv.groups > 1 else 1
        conv.in_channels, conv.out_channels = columns * conv.groups, rows


class FewerHeads(nn.MultiheadAttention):
    """Attention whose heads together are narrower than its input and output: `num_heads * head_dim < embed_dim`.

    Parameters have the names of nn.MultiheadAttention, which computes the same with all heads. Made by `shrink` from a whole one; its
    `_qkv_same_embed_dim` is False, which keeps torch's fused encoder layers, made for whole ones, away.
    """

    def _reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.xavier_uniform_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[n, l, embed] (batch_first), [l, n, embed] or [l, embed], as nn.MultiheadAttention.

        Returns the output in the same layout and the weights [n, l, s], or [n, heads, l, s] where they are not averaged.
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )  # [n, heads, l or s, head_dim]
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        attention = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            attention = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = attention @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if attention is not None and average_attn_weights:
            attention = attention.mean(1)
        if not batched:
            return out[0], None if attention is None else attention[0]
        return out if self.batch_first else out.transpose(0, 1), attention

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as numbers that are added to the scores; True means "not allowed"."""
        mask = None if attn_mask is None else _additive(attn_mask, q)
        if mask is not None and mask.dim() == 3:  # one for each head of each sample
            mask = mask.view(*q.shape[:2], *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))
