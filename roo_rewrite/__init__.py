"""roo-rewrite: an impression-level recommender in, an equivalent request-level one out."""

from roo_rewrite.errors import (
    CaptureError,
    DataError,
    EmitError,
    EquivalenceError,
    InputError,
    RooError,
    SpecError,
)
from roo_rewrite.features import FeatureSpec

__all__ = [
    "CaptureError",
    "DataError",
    "EmitError",
    "EquivalenceError",
    "FeatureSpec",
    "InputError",
    "RooError",
    "SpecError",
]
