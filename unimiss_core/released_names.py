"""How the authors of UniMiSS and UniMiSS+ call and lay out the tensors that the networks here call otherwise."""

import re

from torch import Tensor

GAIN = "head.last_layer.weight_g"
PROTOTYPES = "head.last_layer.weight_v"

# Ours -> released; {0} is a number counted from 0 in both, {0+1} one that the released code counts from 1.
_OF_BOTH = {
    r"backbone\.encoder\.class_token": "backbone.transformer.cls_tokens1",
    r"backbone\.encoder\.stages\.(\d)\.class_token\.(.+)": "backbone.transformer.cls_tokens{0+1}.{1}",
    r"backbone\.encoder\.stages\.(\d)\.position\.(\d)d\.table": "backbone.transformer.pos_embed{1}D{0+1}",
    r"backbone\.encoder\.stages\.(\d)\.blocks\.(.+)": "backbone.transformer.block{0+1}.{1}",
    r"backbone\.decoder\.norm\.(.+)": "backbone.norm.{0}",
    r"head\.mlp\.(.+)": "head.mlp.{0}",
    r"head\.prototypes\.weight": PROTOTYPES,
}
_OF_MIT = _OF_BOTH | {
    r"backbone\.encoder\.stem\.(\d)d\.(.+)": "backbone.transformer.patch_embed{0}D0.{1}",
    r"backbone\.encoder\.stages\.(\d)\.embed\.(\d)d\.(.+)": "backbone.transformer.patch_embed{1}D{0+1}.proj.{2}",
    r"backbone\.decoder\.stages\.(\d)\.class_token\.(.+)": "backbone.cls_tokens{0}.{1}",
    r"backbone\.decoder\.stages\.(\d)\.embed\.(\d)d\.(.+)": "backbone.DecEmbed{1}D{0}.proj.{2}",
    r"backbone\.decoder\.stages\.(\d)\.position\.(\d)d\.table": "backbone.DecPosEmbed{1}D{0}",
    r"backbone\.decoder\.stages\.(\d)\.blocks\.(.+)": "backbone.Decblock{0}.{1}",
}
_OF_PLUS = _OF_BOTH | {
    r"backbone\.encoder\.at_full\.(\d)d\.(.+)": "backbone.transformer.ConvBlock{0}D0.0.{1}",
    r"backbone\.encoder\.at_half\.(\d)d\.(.+)": "backbone.transformer.ConvBlock{0}D1.{1}",
    r"backbone\.encoder\.stages\.(\d)\.embed\.(\d)d\.0\.(.+)": "backbone.transformer.patch_embed{1}D{0+1}.proj.{2}",
    r"backbone\.encoder\.stages\.(\d)\.embed\.(\d)d\.1\.(.+)": "backbone.transformer.patch_embed{1}D{0+1}.proj1.{2}",
    r"backbone\.decoder\.stages\.(\d)\.embed\.(\d)d\.0\.(.+)": "backbone.DecEmbed{1}D{0+1}.proj.{2}",
    r"backbone\.decoder\.stages\.(\d)\.embed\.(\d)d\.1\.(.+)": "backbone.DecEmbed{1}D{0+1}.proj1.{2}",
    r"backbone\.decoder\.stages\.(\d)\.position\.(\d)d\.table": "backbone.DecPosEmbed{1}D{0+1}",
    r"backbone\.decoder\.stages\.(\d)\.blocks\.(.+)": "backbone.Decblock{0+1}.{1}",
    r"backbone\.decoder\.to_half\.(\d)d\.(.+)": "backbone.TransposeConv{0}D1.{1}",
    r"backbone\.decoder\.at_half\.(\d)d\.(.+)": "backbone.DeConvBlock{0}D1.{1}",
    r"backbone\.decoder\.to_full\.(\d)d\.(.+)": "backbone.TransposeConv{0}D2.{1}",
    r"reconstruction\.patch\.(\d)d\.(.+)": "backbone.recon_conv{0}D.{1}",
}
_IN_BLOCKS = {
    ".attention.query.": ".attn.q.",
    ".attention.key_value.": ".attn.kv.",
    ".attention.project.": ".attn.proj.",
    ".attention.reduce.2d.": ".attn.sr2D.",
    ".attention.reduce.3d.": ".attn.sr3D.",
    ".attention.reduce_norm.": ".attn.norm.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2.",
}


def released_name(ours: str, *, plus: bool) -> str:
    """The released spelling, without `module.`, of a tensor of MiT, or of MiTplus, and of their heads."""
    for pattern, template in (_OF_PLUS if plus else _OF_MIT).items():
        if match := re.fullmatch(pattern, ours):
            name = template
            for i, text in enumerate(match.groups()):
                name = name.replace(f"{{{i}}}", text)
                name = name.replace(f"{{{i}+1}}", str(int(text) + 1)) if text.isdigit() else name
            for mine, theirs in _IN_BLOCKS.items():
                name = name.replace(mine, theirs) if ".block" in name or ".Decblock" in name else name
            return name
    raise AssertionError(f"no released name for {ours}")


def as_ours(name: str, tensor: Tensor) -> Tensor:
    """The released tensor as the one of ours with this name is laid out, where it has the axes for it.

    Tables and the class token lose a leading 1. What draws is a convolution there, with kernels (out, in, 1, ...), and
    a transposed one here, with (in, out, 1, ...); of one voxel both are the same product.
    """
    if name.endswith((".table", "encoder.class_token")) and tensor.shape[:1] == (1,):
        return tensor.squeeze(0)
    if name.startswith("reconstruction.") and tensor.ndim > 1:
        return tensor.transpose(0, 1)
    return tensor
