"""Checkpoints of the trellis format in transformers:

    import lrpq.loading
    model = AutoModelForCausalLM.from_pretrained(FOLDER)

Importing this makes the format known to transformers, which without it refuses the configuration's type. Quantized
layers keep their codes and scales packed, as they are in the file, and decode their weight in every forward.
``quantization_config=TrellisConfig(dequantize=True)``, or ``model.dequantize()`` later, decodes all weights once, into
plain linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrpq.checkpoint.stored import described
from lrpq.checkpoint.trellis import METHOD
from lrpq.errors import CheckpointError
from lrpq.model import hidden_type
from lrpq.model.layers import Choice
from lrpq.quant.packed_streams import decode_streams
from lrpq.quant.packing import packed_shape, unpack

if TYPE_CHECKING:
    from jaxtyping import Float


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed.

    Args:
        choice: of its codes.
        d_out: outputs.
        d_in: inputs.
        bias: whether it has one.
        dtype: of the model.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_shape: nn.Parameter

    def __init__(self, choice: Choice, d_out: int, d_in: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.choice, self.out_features, self.in_features, self.dtype = choice, d_out, d_in, dtype
        for name, shape, kind in (
            ("weight_packed", packed_shape(d_out, d_in, choice), torch.int32),
            ("weight_scale", (d_out, choice.groups(d_in)), torch.bfloat16),
            ("weight_shape", (2,), torch.int64),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=kind), requires_grad=False))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtype), requires_grad=False) if bias else None

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """Decoded, in the dtype that the model was loaded in."""
        return self.decoded(self.dtype)

    def decoded(self, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        """The weight, bit for bit as `QuantizedWeight.dequantize` gives it."""
        found: Tensor
        if self.choice.trellis:
            found = decode_streams(self.weight_packed, self.weight_scale, self.choice.bits, dtype)
        else:
            shape = torch.tensor([self.out_features, self.in_features])
            scales = self.weight_scale.bfloat16()
            if self.choice.scale_bits == 8:
                scales = scales.to(torch.float8_e4m3fn)
            tensors = {"weight_packed": self.weight_packed.data, "weight_scale": scales, "weight_shape": shape}
            found = unpack(tensors, self.choice).dequantize(dtype)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move to another device; scales stay what they are where the model is cast, for float16 would lose some."""
        scales = self.weight_scale.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scales.dtype:
            self.weight_scale = nn.Parameter(scales.to(self.weight_scale.device), requires_grad=False)
        return self

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """As a linear layer with the decoded weight."""
        return linear(x, self.decoded(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """For ``print``."""
        return f"{self.in_features}, {self.out_features}, {self.choice}, bias={self.bias is not None}"


class TrellisConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a checkpoint in the trellis format, or how to load one.

    Args:
        dequantize: whether all weights are decoded once, as the model is loaded.
        config: what config.json has.
    """

    def __init__(self, *, dequantize: bool = False, **config: Any) -> None:
        self.quant_method, self.dequantize = METHOD, dequantize
        self.config = config

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        return {**self.config, "quant_method": METHOD}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a configuration given to ``from_pretrained`` has to say beside that of the checkpoint."""
        return {"dequantize": self.dequantize}


class TrellisQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads such a checkpoint."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Put packed layers where the configuration has a choice.

        Raises:
            CheckpointError: it is of another version, or names what is no linear layer, such as experts, or nothing
                in this model.
        """
        groups = groups_of(self.quantization_config.to_dict())
        unused = {pattern.pattern for pattern, _ in groups}
        for name, module in list(model.named_modules()):
            pattern, choice = next((group for group in groups if group[0].fullmatch(name)), (None, None))
            if pattern is None or choice is None:
                continue
            unused.discard(pattern.pattern)
            if not isinstance(module, nn.Linear):
                raise CheckpointError(
                    f"module {name}: is no linear layer in transformers; use `lrpq evaluate`, or write the checkpoint "
                    "with --format dense"
                )
            d_out, d_in, bias = module.out_features, module.in_features, module.bias is not None
            with torch.device("meta"):
                packed = PackedLinear(choice, d_out, d_in, bias=bias, dtype=module.weight.dtype)
            model.set_submodule(name, packed)
        if unused:
            raise CheckpointError(
                f"quantization_config: {type(model).__name__} has no module {min(unused)}; load the checkpoint with "
                "the class it was made of, such as AutoModelForCausalLM"
            )

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Compare the shapes in the file with the model's, and decode the weights where that was asked for.

        Raises:
            CheckpointError: a layer's shape differs.
        """
        for name, module in model.named_modules():
            if not isinstance(module, PackedLinear):
                continue
            stored, own = module.weight_shape.tolist(), [module.out_features, module.in_features]
            if stored != own:
                raise CheckpointError(
                    f"module {name}: is {stored} in the file, {own} in the model; fetch the checkpoint again"
                )
        return self._dequantize(model) if self.quantization_config.dequantize else model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Decode all weights, into plain linear layers: what ``model.dequantize()`` does."""
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                dense.weight = nn.Parameter(module.decoded(dtype or module.dtype), requires_grad=False)
                dense.register_parameter("bias", module.bias)
                model.set_submodule(name, dense)
        return model

    def is_serializable(self) -> bool:
        """Not from here: copy the folder."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def groups_of(config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Choice]]:
    """Names of modules, as patterns, and their choices.

    Raises:
        CheckpointError: the configuration is of another version, or damaged.
    """
    return [(pattern, choice) for pattern, choice, _ in described(config, "quantization_config")[1]]


def register() -> None:
    """Make the format known to transformers; importing this module has done so."""
    hidden_type.register()
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(TrellisConfig)
        auto.register_quantizer(METHOD)(TrellisQuantizer)
        # of other configurations that are given to from_pretrained beside the checkpoint's own, nothing is taken over
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (TrellisConfig,)


register()
