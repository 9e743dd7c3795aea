"""Packed checkpoints in plain transformers: `import qatcli; AutoModelForCausalLM.from_pretrained(directory)`.

Registered through transformers' own extension points (`register_quantizer`, `register_quantization_config`); nothing
of transformers is patched. Imported by the hook in `qatcli/__init__.py` when transformers is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qatcli.linear import PackedLinear, replace_modules
from qatcli.models.refusal import load_complete
from qatcli.packed import FORMAT_VERSION, QUANT_METHOD, ModuleQuant, PackedCheckpoint


@register_quantization_config(QUANT_METHOD)
class QatConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint; see `qatcli.packed`."""

    def __init__(
        self,
        bits: int,
        group_size: int,
        modules: dict[str, dict[str, int]],
        format_version: int = FORMAT_VERSION,
        symmetric: bool = False,
        scale_dtype: str = "float16",
        **_ignored: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"packed format version {format_version} needs another qatcli; this one reads {FORMAT_VERSION}"
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self.modules = modules


@register_quantizer(QUANT_METHOD)
class QatQuantizer(HfQuantizer):
    """Puts a `PackedLinear` in the place of every linear that the checkpoint holds packed."""

    requires_calibration = True  # only checkpoints that are packed already; `qat` makes them
    quantization_config: QatConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        dtype = getattr(torch, config.scale_dtype)
        modules = {name: ModuleQuant(**entry) for name, entry in config.modules.items()}

        def packed(name: str, linear: nn.Linear) -> nn.Module:
            has_bias = linear.bias is not None
            with torch.device("meta"):
                return PackedLinear(modules[name], bias=has_bias, scale_dtype=dtype, dtype=linear.weight.dtype)

        replace_modules(model, list(modules), packed)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def load_packed(path: Path, *, dtype: torch.dtype | str, device: torch.device, trust_remote_code: bool = False) -> Any:
    """The whole model of a packed checkpoint, linears packed, scales as stored.

    InputError when the checkpoint is not complete or its architecture is unknown to transformers.
    """
    PackedCheckpoint.open(path)
    return load_complete(path, dtype=dtype, trust_remote_code=trust_remote_code).to(device).eval()
