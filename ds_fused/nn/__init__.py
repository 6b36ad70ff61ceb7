"""The ops as modules, for whoever writes a model: arguments and names of parameters are those of PyTorch's modules.

A module that PyTorch has is a subclass of it, with its state dict, first values and representation. One that it hasn't
has the parameter names of HuggingFace's models. What they compute, and ask of their inputs, stands in ds_fused/ops.
"""

from ds_fused.nn.attention import MultiTokenAttention, NeighborhoodAttention
from ds_fused.nn.divergences import JSDLoss, KLDivLoss, LinearCosineLoss, LinearJSDLoss, LinearKLDivLoss, TVDLoss
from ds_fused.nn.embedding import Embedding
from ds_fused.nn.experts import Experts
from ds_fused.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from ds_fused.nn.mlp import GeGLU, ReGLU, ReLU2, SwiGLU
from ds_fused.nn.norms import (
    AddLayerNorm,
    AddRMSNorm,
    DyT,
    GatedRMSNorm,
    GroupNorm,
    LayerNorm,
    ModulatedRMSNorm,
    PolyNorm,
    RMSNorm,
)
from ds_fused.nn.policy import LinearGRPOLoss
from ds_fused.nn.preference import LinearCPOLoss, LinearDPOLoss, LinearKTOLoss, LinearORPOLoss, LinearSimPOLoss
from ds_fused.nn.residuals import HyperConnection
from ds_fused.nn.softmax import Softmax, Sparsemax

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "CrossEntropyLoss",
    "DyT",
    "Embedding",
    "Experts",
    "GatedRMSNorm",
    "GeGLU",
    "GroupNorm",
    "HyperConnection",
    "JSDLoss",
    "KLDivLoss",
    "LayerNorm",
    "LinearCPOLoss",
    "LinearCosineLoss",
    "LinearCrossEntropyLoss",
    "LinearDPOLoss",
    "LinearGRPOLoss",
    "LinearJSDLoss",
    "LinearKLDivLoss",
    "LinearKTOLoss",
    "LinearORPOLoss",
    "LinearSimPOLoss",
    "ModulatedRMSNorm",
    "MultiTokenAttention",
    "NeighborhoodAttention",
    "PolyNorm",
    "RMSNorm",
    "ReGLU",
    "ReLU2",
    "Softmax",
    "Sparsemax",
    "SwiGLU",
    "TVDLoss",
]
