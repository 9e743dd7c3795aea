"""What makes two recipes the same."""

from __future__ import annotations

import hashlib
import json

from qatcli.recipe.schema import Recipe


def digest(recipe: Recipe) -> str:
    """SHA-256 (hex) of the resolved recipe as canonical JSON: sorted keys, no spaces, ASCII."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
