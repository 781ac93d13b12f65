"""The scalar bound on models whose multiply-adds can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

import fixtures
from roo_rewrite.errors import InputError, SpecError
from roo_rewrite.features import FeatureSpec
from tools.bound import Bound, bound, main

ROWS, U, C, H = 8, 5, 3, 4
SPEC = FeatureSpec(request=["user*"], impression=["item*"])


def inputs(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(ROWS, *shape, generator=g) for name, shape in shapes.items()}


def found(model: nn.Module, kwargs: dict[str, Tensor], fanout: float = 10) -> Bound:
    return bound(model, (), kwargs, SPEC, fanout)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(U, H), nn.Linear(C, H)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(1)


class Cat(nn.Module):
    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(U + C, H), nn.Linear(H, 2)
        nn.init.constant_(self.first.bias, bias)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.second(F.relu(self.first(torch.cat([user, item], 1))))


class Pairs(nn.Module):
    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        fields = torch.cat([user, item], 1)
        return torch.bmm(fields, fields.transpose(1, 2))


class Factored(nn.Module):
    """A weight that is a product of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(U, 2)), nn.Parameter(torch.randn(2, H))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return user @ (self.left @ self.right) + item


class Attention(nn.Module):
    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(item.unsqueeze(1), user, user)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.conv(torch.cat([user, item], 2))


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(U, H, batch_first=True)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.gru(user)[1][0] * item


class Bilinear(nn.Module):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both, self.map = both, nn.Bilinear(U, U, H)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.map(user, user + item if self.both else user) + item.sum(1, keepdim=True)


def test_a_tower_is_moved_whole() -> None:
    result = found(Towers(), inputs(user=(U,), item=(C,)))
    user, item = 2 * ROWS * U * H, 2 * ROWS * C * H
    assert (result.total, result.net, result.scalar, result.rows) == (user + item, user, user, ROWS)
    assert result.net_left == pytest.approx((user / 10 + item) / (user + item))


def test_a_linear_over_a_concatenation_is_moved_in_part() -> None:
    result = found(Cat(), inputs(user=(U,), item=(C,)))
    first, second = 2 * ROWS * (U + C) * H, 2 * ROWS * H * 2
    assert (result.total, result.net, result.scalar) == (first + second, 0, 2 * ROWS * U * H)


def test_a_dead_unit_is_not_taken_for_a_constant() -> None:
    model = Cat(bias=-20.0)
    kwargs = inputs(user=(U,), item=(C,))
    assert F.relu(model.first(torch.cat(list(kwargs.values()), 1))).eq(0).all()
    assert found(model, kwargs).scalar == 2 * ROWS * U * H


def test_pairs_of_request_fields_are_moved() -> None:
    result = found(Pairs(), inputs(user=(U, 4), item=(C, 4)))
    assert result.total == 2 * ROWS * (U + C) ** 2 * 4
    assert (result.net, result.scalar) == (0, 2 * ROWS * U * U * 4)


def test_attention_counts_as_its_two_products() -> None:
    result = found(Attention(), inputs(user=(6, 4), item=(4,)))
    assert (result.total, result.scalar) == (2 * 2 * ROWS * 6 * 4, 0)


def test_a_convolution_counts_windows_without_their_padding() -> None:
    result = found(Conv(), inputs(user=(2, 5), item=(2, 2)))
    windows, taps = 5, 3
    assert result.total == 2 * ROWS * windows * taps * 2 * 3
    assert result.scalar == 2 * ROWS * (3 + 3 + 3 + 2 + 1) * 2 * 3, "windows hold 3, 3, 3, 2 and 1 user columns"


def test_a_recurrent_layer_counts_as_its_products() -> None:
    steps = 6
    result = found(Gru(), inputs(user=(steps, U), item=(H,)))
    assert result.total == 2 * ROWS * steps * 3 * H * (U + H)
    assert result.net == result.scalar == result.total


@pytest.mark.parametrize("both", [False, True])
def test_a_bilinear_form_counts_pairs_of_its_inputs(both: bool) -> None:
    result = found(Bilinear(both), inputs(user=(U,), item=(U,)))
    assert result.total == 2 * ROWS * U * U * H
    assert result.scalar == (0 if both else result.total)


def test_at_fan_out_one_nothing_is_saved() -> None:
    result = found(Towers(), inputs(user=(U,), item=(C,)), fanout=1)
    assert result.net_left == result.scalar_left == 1


def test_a_model_without_products_has_nothing_to_move() -> None:
    class Sum(nn.Module):
        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return user.sum(1) + item.sum(1)

    result = found(Sum(), inputs(user=(U,), item=(C,)))
    assert (result.total, result.scalar_left) == (0, 1.0)


@pytest.mark.parametrize("name", fixtures.NAMES)
def test_scalar_reaches_at_least_what_net_does(name: str) -> None:
    fixture = fixtures.load_small(name)
    before = {k: v.clone() for k, v in fixture.model.state_dict().items()}
    args, kwargs = fixture.example()
    result = bound(fixture.model, args, kwargs, fixture.spec, 10)
    assert 0 <= result.net <= result.total
    assert 0 <= result.scalar <= result.total
    assert result.scalar_left < 1 or name == "layernorm_mlp", "the norm mixes both sides in every element"
    torch.testing.assert_close(fixture.model.state_dict(), before, rtol=0, atol=0)


class Ragged(nn.Module):
    """Multiplies a matrix whose rows depend on the impressions; more than once with `twice`."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        if self.twice and item[0, 0] > 0:
            user = user @ torch.eye(U)
        chosen = user if self.twice else user[: int(item[0, 0] > 0) + 1]
        return chosen @ torch.ones(U, 1)


@pytest.mark.parametrize(
    ("twice", "message"), [(False, "other products on other impressions"), (True, "runs . product")]
)
def test_programs_that_depend_on_the_impressions_are_refused(twice: bool, message: str) -> None:
    kwargs = inputs(user=(U,), item=(C,))
    kwargs["item"][::2].abs_().neg_()
    kwargs["item"][1::2].abs_()
    with pytest.raises(InputError, match=message):
        found(Ragged(twice), kwargs)


def test_too_few_rows_and_bad_arguments_are_refused() -> None:
    kwargs = {k: v[:3] for k, v in inputs(user=(U,), item=(C,)).items()}
    with pytest.raises(InputError, match="an example of 6 rows, not 3"):
        found(Towers(), kwargs)
    with pytest.raises(InputError, match="at least 1, got"):
        found(Towers(), inputs(user=(U,), item=(C,)), fanout=0.5)
    with pytest.raises(SpecError, match="'item' is not assigned"):
        bound(Towers(), (), inputs(user=(U,), item=(C,)), FeatureSpec(request=["user"]), 10)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def spec_file(tmp_path: Path) -> str:
    path = tmp_path / "spec.toml"
    path.write_text('request = ["user*"]\nimpression = ["item*"]\n')
    return str(path)


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "towers.py"
    path.write_text(
        "import torch\n"
        "class Towers(torch.nn.Module):\n"
        "    def forward(self, user, item):\n"
        "        return user @ torch.ones(5, 4) + item @ torch.ones(3, 4)\n"
        "def make():\n"
        "    return Towers(), (torch.randn(8, 5), torch.randn(8, 3)), {}\n"
    )
    return str(path)


def test_command_line_prints_json(model_file: str, spec_file: str) -> None:
    result = run(f"{model_file}:make", "--spec", spec_file, "--fanout", "4", "--json")
    assert result.exit_code == 0, result.output
    table = json.loads(result.output)
    assert (table["total"], table["net"]) == (2 * 8 * 8 * 4, 2 * 8 * 5 * 4)
    assert table["scalar_left"] == pytest.approx((5 / 4 + 3) / 8)


def test_command_line_prints_a_table(spec_file: str) -> None:
    result = run("fixtures.two_tower:example_model", "--spec", "fixtures/two_tower.toml")
    assert result.exit_code == 0, result.output
    assert "scalar bound" in result.output


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "write package.module:callable"),
        ("no.such.module:make", "No module named 'no'"),
        ("missing.py:make", "missing.py"),
        ("{model}:absent", "absent"),
    ],
)
def test_command_line_names_a_bad_model(model: str, message: str, model_file: str, spec_file: str) -> None:
    result = run(model.format(model=model_file), "--spec", spec_file)
    assert result.exit_code == 2
    assert message in result.output


def test_command_line_names_a_bad_spec(model_file: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('request = ["user*"]\n')
    result = run(f"{model_file}:make", "--spec", str(path))
    assert result.exit_code == 2
    assert "not assigned" in result.output


def test_products_of_weights_alone_are_not_the_requests() -> None:
    b = found(Factored(), inputs(user=(U,), item=(H,)))
    assert b.total == 2 * (U * 2 * H + ROWS * U * H)
    assert b.net == b.scalar == 2 * ROWS * U * H
