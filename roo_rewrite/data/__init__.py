"""Request-level data: batches, grouping, storage, readers."""

from roo_rewrite.data.batch import RequestBatch, concat
from roo_rewrite.data.grouping import DemotedFeature, group
from roo_rewrite.data.loading import RequestCollate
from roo_rewrite.data.sampler import RequestSampler

__all__ = ["DemotedFeature", "RequestBatch", "RequestCollate", "RequestSampler", "concat", "group"]
