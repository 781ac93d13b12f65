"""Request-level data: batches, grouping, storage, readers."""

from roo_rewrite.data.batch import RequestBatch
from roo_rewrite.data.concat import concat
from roo_rewrite.data.grouping import DemotedFeature, group
from roo_rewrite.data.loading import RequestCollate
from roo_rewrite.data.read import ImpressionBatch, ImpressionDataset, RequestDataset
from roo_rewrite.data.sampler import RequestSampler
from roo_rewrite.data.to_impressions import to_impressions
from roo_rewrite.data.to_requests import to_requests

__all__ = [
    "DemotedFeature",
    "ImpressionBatch",
    "ImpressionDataset",
    "RequestBatch",
    "RequestCollate",
    "RequestDataset",
    "RequestSampler",
    "concat",
    "group",
    "to_impressions",
    "to_requests",
]
