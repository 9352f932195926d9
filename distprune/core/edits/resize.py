"""Networks whose tensors have other shapes: numbers that modules keep about them (out_channels, num_heads, ...) follow.

Plain torch, as exports of slim networks ship this file.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under the first."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def with_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with `values` in place of its parameters and buffers of these names, of any shape that its layers can have.

    Tied weights stay tied; gradients are dropped.
    """
    tensors = tensors_of(model)
    # deepcopy takes what its memo holds instead of copying: tied weights stay tied, and the whole network never lies in memory twice.
    made = {name: _like(tensors[name], value) for name, value in values.items()}
    network = copy.deepcopy(model, {id(tensors[name]): value for name, value in made.items()})
    changed = set(map(id, made.values()))
    for module in network.modules():
        if any(id(tensor) in changed for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            _follow(module)
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(inner, FewerHeads) for inner in module.modules()):
            module.enable_nested_tensor = module.use_nested_tensor = False  # only torch's fused layer reads nested tensors
    return network


def resized(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of `model` whose tensors of these names have these shapes, with values that are yet to be loaded."""
    tensors = tensors_of(model)
    return with_tensors(model, {name: tensors[name].detach().new_zeros(tuple(shape)) for name, shape in shapes.items()})


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
