"""Keys of a recipe under the names that they had in older versions."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..io.yaml_lines import Key, Location, nearest


def rename(values: dict[str, Any], locations: dict[Key, Location]) -> list[str]:
    """Replace ``model.base`` in ``values`` by ``model.quantization``. Returns a notice for each place where it stands.

    Raises:
        UserError: the values have both keys.
    """
    model, former, key = values.get("model"), ("model", "base"), ("model", "quantization")
    if not isinstance(model, dict) or "base" not in model:
        return []
    place = nearest(locations, former)
    if "quantization" in model:
        raise UserError(
            "model.base is the former name of model.quantization, and both are given; leave model.base out\n"
            f"  at {place}\n  at {nearest(locations, key)}"
        )
    value = model.pop("base")
    model["quantization"] = "none" if value == "bf16" else value
    if place is None:  # a stored recipe
        return []
    locations.pop(former, None)
    locations[key] = place
    return [f"note: {place.where}: model.base is now model.quantization; bf16 is now none"]
