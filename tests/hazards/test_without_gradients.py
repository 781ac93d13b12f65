"""What torch computes otherwise where no gradient is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

F64 = torch.float64


class Encoded(nn.Module):
    """Reads its history at the padding too. Without gradients torch puts zeros there, if all of it lies at the ends."""

    def __init__(self, norm: nn.Module | None = None, **kind: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm, **kind)

    def forward(self, seq: Tensor, empty: Tensor, x: Tensor) -> Tensor:
        return (self.encoder(seq, src_key_padding_mask=empty).mean(1) * x).sum(1)


class WithTarget(Encoded):
    """The target comes first, so that padding may lie at the end."""

    def forward(self, seq: Tensor, empty: Tensor, x: Tensor) -> Tensor:
        empty = torch.cat([torch.zeros_like(empty[:, :1]), empty], 1)
        return self.encoder(torch.cat([x[:, None], seq], 1), src_key_padding_mask=empty).mean(1).sum(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", [Encoded, WithTarget])
@pytest.mark.parametrize(("longest", "padded"), [(3, False), (5, False), (3, True)])
def test_zeros_at_masked_keys_are_those_of_the_original(kind: type[Encoded], longest: int, padded: bool) -> None:
    torch.manual_seed(0)
    model = kind(nn.LayerNorm(4) if padded else None).double().eval()
    spec = roo.FeatureSpec(request=["seq", "empty"], impression=["x"])
    none = torch.zeros(6, 5, dtype=torch.bool)  # an example without padding tells nothing of it
    shown = torch.arange(5) >= torch.tensor([1, 2, 3, 4, 5, 2])[:, None] if padded else none
    made = roo.rewrite(model, (torch.randn(6, 5, 4, dtype=F64), shown, torch.randn(6, 4, dtype=F64)), spec=spec)
    seq, x, counts = torch.randn(3, 5, 4, dtype=F64), torch.randn(5, 4, dtype=F64), torch.tensor([2, 0, 3])
    empty = torch.arange(5) >= torch.tensor([2, 1, longest])[:, None]
    empty[1] = torch.tensor([True, False, True, False, True])  # a request without impressions is not there
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            want = model(seq.repeat_interleave(counts, 0), empty.repeat_interleave(counts, 0), x)
            torch.testing.assert_close(made(seq, empty, x, num_impressions=counts), want)
    assert not made.report.fallback
    assert made._built == 1
    early = {node.op for node in made.report.nodes if node.runs == "request"}
    assert early >= ({"roo.leaf"} if kind is Encoded else {"linear"})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_takes_any_mask_for_padding_at_the_end_is_a_leaf() -> None:
    torch.manual_seed(0)
    model = WithTarget(mask_check=False).double().eval()
    spec = roo.FeatureSpec(request=["seq", "empty"], impression=["x"])
    none = torch.zeros(6, 5, dtype=torch.bool)
    made = roo.rewrite(model, (torch.randn(6, 5, 4, dtype=F64), none, torch.randn(6, 4, dtype=F64)), spec=spec)
    seq, x, counts = torch.randn(2, 5, 4, dtype=F64), torch.randn(3, 4, dtype=F64), torch.tensor([1, 2])
    empty = torch.tensor([[True, False, False, False, True], [False, True, True, False, False]])
    with torch.no_grad():
        want = model(seq.repeat_interleave(counts, 0), empty.repeat_interleave(counts, 0), x)
        torch.testing.assert_close(made(seq, empty, x, num_impressions=counts), want)
