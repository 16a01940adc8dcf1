"""A model type that only lrpq knows, in place of the model's own.

What transformers has no quantizer for it loads with random weights, after a warning. A configuration of a type that it
does not know is an error, which names the type. So ``config.json`` of the trellis format has this type, and the model's
own beside it; once it is registered, ``AutoConfig`` reads it as the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE, OWN = "lrpq", "lrpq_model_type"


def hidden(document: Mapping[str, Any], own: str) -> dict[str, Any]:
    """The configuration with its type in another place.

    Args:
        document: what ``config.json`` would have.
        own: type of the model that transformers makes of it, which need not be the one that the document names.
    """
    return {**document, "model_type": MODEL_TYPE, OWN: own}


class HiddenConfig(PreTrainedConfig):  # type: ignore[misc]
    """What ``AutoConfig`` finds for the type: it makes configurations of the model's own class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **options: Any) -> Any:
        """The configuration of the model's own type.

        Raises:
            ValueError: transformers does not know it, or none is named.
        """
        own = config_dict.get(OWN)
        if not isinstance(own, str) or own == MODEL_TYPE or own not in CONFIG_MAPPING:
            raise ValueError(f"{OWN} is {own!r}, no model type that this version of transformers knows")
        document = {**config_dict, "model_type": own}
        del document[OWN]
        return CONFIG_MAPPING[own].from_dict(document, **options)


def register() -> None:
    """Make the type known to ``AutoConfig``."""
    AutoConfig.register(MODEL_TYPE, HiddenConfig, exist_ok=True)
