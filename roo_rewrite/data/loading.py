"""collate_fn: any impression-level data set feeds a rewritten model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from roo_rewrite.data.batch import RequestBatch
from roo_rewrite.data.grouping import OnConflict, as_call, group
from roo_rewrite.errors import DataError
from roo_rewrite.features import FeatureSpec

Call = Callable[[dict[str, Any]], Any]


class RequestCollate:
    """`DataLoader(dataset, batch_sampler=RequestSampler(...), collate_fn=RequestCollate(spec, ...))`.

    Samples are mappings. `request_id` (and `impression_id`) name the ids, `labels` and `weights` the
    columns kept as such; the rest are the features. `call` turns the features into what the model is called
    with (see `group`; the default passes them as keyword arguments). Columns that `spec.jagged` names values are
    concatenated and their lengths made where samples do not bring them. `collate` replaces the stacking of
    the samples. Raises DataError where a column is missing, and as `group` does.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        request_id: str,
        *,
        labels: Sequence[str] = (),
        weights: Sequence[str] = (),
        impression_id: str | None = None,
        on_conflict: OnConflict = "error",
        call: Call | None = None,
        collate: Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
        model: Callable[..., Any] | None = None,
    ):
        self.spec, self.request_id, self.impression_id = spec, request_id, impression_id
        self.labels, self.weights = tuple(labels), tuple(weights)
        self.on_conflict: OnConflict = on_conflict
        self.call, self.collate, self.model = call, collate, model

    def __call__(self, samples: Sequence[Any]) -> RequestBatch:
        columns = dict(self.collate(samples) if self.collate else collate_jagged(samples, self.spec.jagged))
        wanted = [self.request_id, self.impression_id, *self.labels, *self.weights]
        missing = [name for name in wanted if name is not None and name not in columns]
        if missing:
            raise DataError(f"the samples have no {missing}; they have {sorted(columns)}")
        ids = columns.pop(self.request_id)
        impression_ids = columns.pop(self.impression_id) if self.impression_id else None
        labels = {name: columns.pop(name) for name in self.labels} or None
        weights = {name: columns.pop(name) for name in self.weights} or None
        args, kwargs = as_call(self.call(columns) if self.call else columns)
        return group(
            (args, kwargs),
            ids,
            self.spec,
            labels=labels,
            weights=weights,
            impression_id=impression_ids,
            on_conflict=self.on_conflict,
            model=self.model,
        )


def collate_jagged(samples: Sequence[Mapping[str, Any]], jagged: Mapping[str, str]) -> dict[str, Any]:
    """Stacks samples; of `jagged` columns (values -> lengths) it concatenates the values and makes the lengths."""
    if not samples or not isinstance(samples[0], Mapping):
        got = type(samples[0]).__name__ if samples else "none"
        raise DataError(f"samples must be mappings of columns, got {got}; pass collate= to make one")
    present = {values: lengths for values, lengths in jagged.items() if values in samples[0]}
    made = {*present, *present.values()}
    out: dict[str, Any] = {}
    plain = [{k: v for k, v in s.items() if k not in made} for s in samples]
    out.update(default_collate(plain) if plain[0] else {})
    for values, lengths in present.items():
        parts = [torch.as_tensor(s[values]) for s in samples]
        out[values] = torch.cat(parts)
        counts = torch.tensor([p.shape[0] for p in parts])
        given = out.get(lengths)
        if isinstance(given, Tensor) and not torch.equal(given, counts):
            raise DataError(f"jagged columns {values!r} and another of {lengths!r} differ in length")
        out[lengths] = counts
    return out
