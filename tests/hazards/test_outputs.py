"""What a forward may return, and what its inputs may hold."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hazard_parts import Plain
from torch import Tensor, nn


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class Scores(NamedTuple):
    click: Tensor
    buy: Tensor | None


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor
    name: str


class Kind(enum.Enum):
    PLAIN = 1


class ReturnsTuple(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        return self.mix(h, x), h, x


class ReturnsUserOnly(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.user(u)


class ReturnsItemOnly(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.b(x)


class ReturnsInput(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return u, x, self.b(x)


class ReturnsIds(nn.Module):
    hoists = False

    def forward(self, u_id: Tensor, u_flag: Tensor, x: Tensor) -> Any:
        return u_id, u_flag, x


class ReturnsAliases(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        y = self.mix(h, x)
        return y, y, h, h[:, :2], y.view(-1, 1)


class ReturnsNone(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.mix(self.user(u), x), None


class ReturnsNothing(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return None


class ReturnsDict(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        return {"y": self.mix(h, x), "parts": [h, (x, {"z": h.sum()})], "version": 3, "mode": "a"}


class ReturnsOrdered(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return collections.OrderedDict(b=self.mix(self.user(u), x), a=self.user(u))


class ReturnsNamedTuple(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return Scores(self.mix(self.user(u), x), None)


class ReturnsDataclass(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        return Output(self.mix(h, x), h, "it")


class ReturnsNamespace(Plain):
    """An object nobody can look into."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return [self.mix(self.user(u), x), SimpleNamespace(hidden=self.user(u)).hidden]


class ReturnsDistribution(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return torch.distributions.Bernoulli(logits=self.mix(self.user(u), x)).probs


class ReturnsBatchSize(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.mix(self.user(u), x), x.shape[0], u.shape[0] * 2, list(x.shape)


class ReturnsFeatureSize(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.mix(self.user(u), x), x.shape[1], 0.5, True


class ReturnsPythonFloat(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Any:
        y = self.mix(self.user(u), x)
        return y, float(y.detach().sum())


class ReturnsEnum(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.mix(self.user(u), x), Kind.PLAIN, x.dtype


class ReturnsScalars(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        return h.sum(), self.mix(h, x).mean(), h.detach().max()


class ReturnsParameter(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.mix(self.user(u), x), self.a.weight, self.b.bias * 1, torch.arange(3)


class ReturnsBool(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        return h > 0.3, self.mix(h, x) > 0, h.argmax(1), h.float(), h.to(torch.bfloat16).double()


class ReturnsTransposed(Plain):
    """The batch lies in dim 1 of an output."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        return h.t(), torch.stack([h, x], 0), (h * x).t()


class ReturnsMatrix(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.user(u) @ self.b(x).t()


class ReturnsEmpty(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        return self.mix(h, x), h[:, :0], torch.zeros(0)


class ReturnsComplex(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return torch.fft.rfft(self.user(u), dim=1).abs(), self.b(x)


class ReturnsGenerator(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return tuple(self.mix(self.user(u), x) * k for k in range(3))


class OneSideUser(nn.Module):
    """No impression input at all."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u: Tensor) -> Tensor:
        return torch.relu(self.a(u)).sum(-1)


class OneSideUserMean(OneSideUser):
    hoists = True

    def forward(self, u: Tensor) -> Tensor:
        h = torch.relu(self.a(u))
        return (h - h.mean(0)).sum(-1)


class OneSideItem(nn.Module):
    """No request input at all."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)).sum(-1)


class UnusedUser(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.b(x).sum(-1)


class UnusedItem(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.user(u).sum(-1)


class IgnoresBoth(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.a.weight.sum() * torch.ones(x.shape[0], dtype=x.dtype)


class LogOfZero(nn.Module):
    """-inf and NaN go where they went; in a request without impressions nowhere."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u_ids: Tensor, u: Tensor, x: Tensor) -> Tensor:
        h = torch.log(torch.relu(self.a(u)).sum(1) * (u_ids[:, 0] > 2))
        return h * x.sum(-1)


class SquareRootAtZero(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u_flag: Tensor, u: Tensor, x: Tensor) -> Tensor:
        h = torch.sqrt(torch.relu(self.a(u)) * u_flag[:, None] + 0.0)
        return torch.where(u_flag[:, None], h, 1.0).sum(1) * x.sum(-1)


class IntegerModel(nn.Module):
    """No float anywhere on the user's side."""

    hoists = True

    def forward(self, u_ids: Tensor, x_id: Tensor) -> Tensor:
        same = (u_ids == x_id[:, None]).sum(1)
        return same + (u_ids * 3 % 5).sum(1)


class BooleanModel(nn.Module):
    hoists = False

    def forward(self, u_mask: Tensor, x_flag: Tensor) -> Tensor:
        return u_mask.any(1) & x_flag | u_mask.all(1)


class MixedPrecision(Plain):
    hoists = True
    tolerance = 1e-5

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).float()
        return (h * self.b(x).float()).sum(-1).double()


class InsideAutocast(Plain):
    hoists = True
    tolerance = 0.2

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.nn.functional.linear(u.float(), self.a.weight.float())
        return self.mix(h.double(), x)


class KeywordOnlyDefault(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.mix(self.user(u), x)
