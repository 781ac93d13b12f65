"""What torch computes otherwise where no gradient is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

F64 = torch.float64


class Encoded(nn.Module):
    """Reads its history at the padding too. Without gradients torch puts zeros there, if all of it lies at the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True), 1)

    def forward(self, seq: Tensor, empty: Tensor, x: Tensor) -> Tensor:
        return (self.encoder(seq, src_key_padding_mask=empty).mean(1) * x).sum(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("longest", [3, 5])
def test_zeros_at_masked_keys_are_those_of_the_original(longest: int) -> None:
    torch.manual_seed(0)
    model = Encoded().double().eval()
    spec = roo.FeatureSpec(request=["seq", "empty"], impression=["x"])
    full = torch.zeros(6, 5, dtype=torch.bool)  # an example without padding tells nothing of it
    made = roo.rewrite(model, (torch.randn(6, 5, 4, dtype=F64), full, torch.randn(6, 4, dtype=F64)), spec=spec)
    seq, x, counts = torch.randn(3, 5, 4, dtype=F64), torch.randn(5, 4, dtype=F64), torch.tensor([2, 0, 3])
    empty = torch.arange(5) >= torch.tensor([2, 1, longest])[:, None]
    empty[1] = torch.tensor([True, False, True, False, True])  # a request without impressions is not there
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            want = model(seq.repeat_interleave(counts, 0), empty.repeat_interleave(counts, 0), x)
            torch.testing.assert_close(made(seq, empty, x, num_impressions=counts), want)
    assert not made.report.fallback
    assert any(node.op == "roo.leaf" and node.runs == "request" for node in made.report.nodes)
