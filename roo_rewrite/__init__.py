"""roo-rewrite: an impression-level recommender in, an equivalent request-level one out."""

from roo_rewrite.data import RequestBatch, group
from roo_rewrite.equivalence import verify
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
from roo_rewrite.module import RequestModel
from roo_rewrite.pipeline import rewrite
from roo_rewrite.report import Report

__all__ = [
    "CaptureError",
    "DataError",
    "EmitError",
    "EquivalenceError",
    "FeatureSpec",
    "InputError",
    "Report",
    "RequestBatch",
    "RequestModel",
    "RooError",
    "SpecError",
    "group",
    "rewrite",
    "verify",
]
