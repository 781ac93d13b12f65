"""Ops that can have no rule, and why."""

from __future__ import annotations

from roo_rewrite.rules.registry import no_rule

no_rule("drops the batch dim when there is one row", "aten.squeeze.default", "aten.squeeze_copy.default")
no_rule(
    "has no tensor for a result",
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten._assert_async.default",
    "aten._assert_async.msg",
    "aten._functional_assert_async.msg",
    "aten.sym_size.int",
    "aten.sym_size.default",
    "aten.sym_numel.default",
    "aten.sym_stride.int",
    "aten.sym_stride.default",
    "aten.sym_storage_offset.default",
    "aten.sym_is_contiguous.default",
    "aten.is_nonzero.default",
)
no_rule("the batch size as a value", "aten.scalar_tensor.default")
no_rule("one answer about all rows", "aten.equal.default", "aten.allclose.default")
no_rule(
    "reads memory by strides, whatever the rows are",
    "aten.as_strided.default",
    "aten.as_strided_copy.default",
    "aten.as_strided_scatter.default",
    "aten.empty_strided.default",
    "aten.new_empty_strided.default",
)
no_rule("statistics over the rows", "aten.cov.default", "aten.corrcoef.default", "aten.trace.default")
no_rule(
    "a gradient, which sums over the rows",
    "aten.convolution_backward.default",
    "aten.embedding_dense_backward.default",
    "aten.native_layer_norm_backward.default",
    "aten.native_group_norm_backward.default",
    "aten.avg_pool2d_backward.default",
    "aten.max_pool2d_with_indices_backward.default",
    "aten._adaptive_avg_pool2d_backward.default",
)
no_rule(
    "made by decompositions, which are not run",
    "aten._adaptive_avg_pool2d.default",
    "aten._adaptive_avg_pool3d.default",
    "aten._cdist_forward.default",
    "aten._pdist_forward.default",
    "aten._fft_c2c.default",
    "aten._fft_c2r.default",
    "aten._fft_r2c.default",
    "aten._native_batch_norm_legit.no_stats",
)
