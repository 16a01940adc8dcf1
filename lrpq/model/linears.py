"""The linear layers of a model that can be quantized, found by the family's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lrpq.errors import ModelError
from lrpq.model.experts import DOWN, GATE_UP, LinearExperts
from lrpq.model.families import Family
from lrpq.model.layers import HEAD, LinearSpec
from lrpq.model.places import BlockPlace
from lrpq.model.safetensors_source import ModelSource

EXPERTS = "experts"
"""Site names of experts begin so: ``experts.7.gate_up``, ``experts.7.down``."""
_KINDS = {"gate_up": GATE_UP, "down": DOWN}


def find_linears(
    blocks: Sequence[BlockPlace], family: Family, stored: Mapping[str, tuple[str, ...]], source: ModelSource
) -> Iterator[LinearSpec]:
    """Yield the layers in the order of execution; experts of a block by projection, then by index.

    Args:
        blocks: blocks of the skeleton, experts already replaced by layers.
        family: the architecture's table entry.
        stored: name of a tensor in the model -> names on disk whose rows make it.
        source: what is on disk.

    Raises:
        ModelError: a layer of the table is missing, is no linear layer, or has another shape on disk.
    """
    for index, place in enumerate(blocks):
        block, prefix = place.module, place.path
        path = family.experts.path if family.experts is not None else None
        experts = dict(block.named_modules()).get(path) if path is not None else None
        for site, members in place.sites.items():
            if isinstance(experts, LinearExperts) and site in _KINDS:
                for e in range(experts.num_experts):
                    member = f"{path}.{e}.{_KINDS[site]}"
                    yield _spec(block, prefix, member, index, f"{EXPERTS}.{e}.{site}", stored, source, routed=True)
                continue
            for member in members:
                yield _spec(block, prefix, member, index, site, stored, source, routed=False)


def find_head(
    model: nn.Module, family: Family, stored: Mapping[str, tuple[str, ...]], source: ModelSource, *, block: int
) -> LinearSpec:
    """The head as one more layer, behind the last block.

    Args:
        model: the skeleton.
        family: the architecture's table entry.
        stored: name of a tensor in the model -> names on disk whose rows make it.
        source: what is on disk.
        block: number of decoder blocks.

    Raises:
        ModelError: it is no linear layer, or has another shape on disk.
    """
    spec = _spec(model, "", family.head, block, HEAD, stored, source, routed=False)
    return replace(spec, fused_group=spec.name)


def _spec(
    block: nn.Module,
    prefix: str,
    member: str,
    index: int,
    site: str,
    stored: Mapping[str, tuple[str, ...]],
    source: ModelSource,
    *,
    routed: bool,
) -> LinearSpec:
    name = f"{prefix}.{member}" if prefix else member
    try:
        linear = block.get_submodule(member)
    except AttributeError as error:
        raise ModelError(f"{name}: not in the model that config.json describes") from error
    if not isinstance(linear, nn.Linear):
        raise ModelError(f"{name}: expected nn.Linear, got {type(linear).__name__}")
    tensors = stored.get(f"{name}.weight", (f"{name}.weight",))
    return LinearSpec(
        name=name,
        block=index,
        d_out=linear.out_features,
        d_in=linear.in_features,
        input_site=site,
        # an expert layer is served as one: its experts and both of its projections run under one scheme
        fused_group=f"{prefix}.{EXPERTS}" if routed else f"{prefix}.{site}",
        tensors=() if tensors == (f"{name}.weight",) else tensors,
        routed=routed,
    )
