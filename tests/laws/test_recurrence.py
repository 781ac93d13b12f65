"""gru(cat[E h, t])  =  cat[gru(E h), gru(t) from the state after]: the state after the history is the request's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few
from torch import Tensor, nn

NETS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
OPS = {"gru": torch.ops.aten.gru.input, "lstm": torch.ops.aten.lstm.input, "rnn": torch.ops.aten.rnn_tanh.input}


def net(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name](3, 2, **{"batch_first": True, **options})


@few
@given(st.sampled_from(sorted(NETS)), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.booleans())
def test_the_history_is_read_once(law: Any, name: str, history: int, target: int, layers: int, first: bool) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.cat([u, x], 1)
        out, state = m.net(h if first else h.transpose(0, 1))
        states = state if isinstance(state, tuple) else (state,)
        return (out if first else out.transpose(0, 1), *(s.transpose(0, 1) for s in states))

    model = Model(run, net=net(name, num_layers=layers, batch_first=first))
    found = law(model, u=(history, 3), x=(target, 3))
    assert any(t.startswith("recurrence") for t in found.took())


@pytest.mark.parametrize("name", sorted(NETS))
def test_a_long_history_moves(law: Any, name: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return m.net(torch.cat([u, x], 1))[0][:, -1]

    assert OPS[name] in law(Model(run, net=net(name)), u=(6, 3), x=(1, 3)).moved()


def test_a_state_of_the_request_begins_it(law: Any) -> None:
    def run(m: Model, u: Tensor, us: Tensor, x: Tensor) -> Tensor:
        return m.net(torch.cat([u, x], 1), us.transpose(0, 1).contiguous())[0][:, -1]

    assert OPS["gru"] in law(Model(run, net=net("gru")), u=(4, 3), us=(1, 2), x=(1, 3)).moved()


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return m.net(torch.cat([u, x], 1))[0][:, -1]

    law(Model(run, net=net("gru")), u=(4, 3), x=(1, 3)).precise()


@pytest.mark.parametrize("case", ["both ways", "target first", "dropout"])
def test_declines(law: Any, case: str) -> None:
    options = {"both ways": {"bidirectional": True}, "dropout": {"num_layers": 2, "dropout": 0.5}}.get(case, {})

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return m.net(torch.cat([x, u] if case == "target first" else [u, x], 1))[0]

    found = law(
        Model(run, net=net("gru", **options)), training=case == "dropout", equal=case != "dropout", u=(2, 3), x=(1, 3)
    )
    assert OPS["gru"] not in found.moved()
