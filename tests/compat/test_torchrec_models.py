"""Every model of torchrec.models, its features split by key; embedding collections stay modules, looked up per side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

pytest.importorskip("torchrec")
from torchrec.datasets.utils import Batch
from torchrec.models import deepfm, dlrm
from torchrec.models.experimental.transformerdlrm import DLRM_Transformer
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

KEYS = ("user_a", "item_a", "user_b", "item_b")
ROWS, WIDTH, IDS = 7, 8, 20
SPEC = roo.FeatureSpec(request=["user_*"], impression=["item_*", "dense*"])


def features(keys: tuple[str, ...] = KEYS, weighted: bool = False, rows: int = ROWS) -> KeyedJaggedTensor:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (len(keys) * rows,), generator=g)
    total = int(lengths.sum())
    weights = torch.rand(total, generator=g) if weighted else None
    values = torch.randint(0, IDS, (total,), generator=g)
    return KeyedJaggedTensor(keys=list(keys), values=values, lengths=lengths, weights=weights)


def bags(weighted: bool = False, pooling: PoolingType = PoolingType.SUM, shared: bool = False) -> Any:
    torch.manual_seed(0)
    tables = [("t", list(KEYS))] if shared else [(f"t_{k}", [k]) for k in KEYS]
    made = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=n, embedding_dim=WIDTH, num_embeddings=IDS, feature_names=f, pooling=pooling)
            for n, f in tables
        ],
        is_weighted=weighted,
    )
    for weight in made.parameters():
        nn.init.normal_(weight)
    return made


def dense() -> Tensor:
    return torch.rand(ROWS, 5, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "DLRM": lambda c: dlrm.DLRM(c, 5, [8, WIDTH], [8, 1]),
    "DLRM_DCN": lambda c: dlrm.DLRM_DCN(c, 5, [8, WIDTH], [8, 1], 2, 4),
    "DLRM_Projection": lambda c: dlrm.DLRM_Projection(c, 5, [8, WIDTH], [8, 1], [8, 2 * WIDTH], [8, 2 * WIDTH]),
    "SimpleDeepFMNN": lambda c: deepfm.SimpleDeepFMNN(5, c, 8, 4),
    "DLRM_Transformer": lambda c: DLRM_Transformer(c, 5, [8, WIDTH], [8, 1], nhead=2, ntransformer_layers=1),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # what torch says of TorchRec's transformer
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_is_rewritten_and_verified(name: str, training: bool, rewritten_and_verified: Any) -> None:
    model = MODELS[name](bags()).train(training)
    made = rewritten_and_verified(model, (dense(), features()), spec=SPEC, batches=8)
    assert not made._whole_program().captured.leaves
    assert list(made.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("shared", [False, True], ids=["tables", "one_table"])
@pytest.mark.parametrize(
    ("pooling", "weighted"),
    [(PoolingType.SUM, False), (PoolingType.SUM, True), (PoolingType.MEAN, False)],  # it has no weighted mean
    ids=["sum", "weighted", "mean"],
)
def test_poolings_weights_and_shared_tables(
    pooling: PoolingType, weighted: bool, shared: bool, rewritten_and_verified: Any
) -> None:
    model = Pooled(bags(weighted, pooling, shared)).eval()
    rewritten_and_verified(model, (features(weighted=weighted),), spec=roo.FeatureSpec(["user_*"], ["item_*"]))


class Pooled(nn.Module):
    def __init__(self, collection: Any) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        return self.collection(kjt).values()


def test_the_loss_of_dlrm_train(rewritten_and_verified: Any) -> None:
    model = dlrm.DLRMTrain(MODELS["DLRM"](bags()))
    batch = Batch(dense_features=dense(), sparse_features=features(), labels=torch.arange(ROWS) % 2)
    spec = roo.FeatureSpec(request=["user_*"], impression=["item_*", "dense*", "labels"])
    rewritten_and_verified(model, (batch,), spec=spec, batches=8)


class Attention(nn.Module):
    """A history and its target in one table, a KeyedJaggedTensor for both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = EmbeddingConfig(name="t", embedding_dim=WIDTH, num_embeddings=IDS, feature_names=["hist", "item"])
        self.embed = EmbeddingCollection(tables=[config])

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        found = self.embed(kjt)
        history, target = (found[f].to_padded_dense(n) for f, n in (("hist", 3), ("item", 1)))
        scores = torch.softmax((history * target).sum(-1), 1)
        return (scores.unsqueeze(-1) * history * target).sum((1, 2))


def test_sequences_are_looked_up_once_per_request(rewritten_and_verified: Any) -> None:
    model = Attention().eval()
    spec = roo.FeatureSpec(request=["hist"], impression=["item"])
    made = rewritten_and_verified(model, (features(("hist", "item")),), spec=spec)
    assert sizes_seen(model.embed.embeddings["t"], made, ("hist", "item"), 1) == [6, 5]


def test_request_keys_are_looked_up_at_request_rows() -> None:
    model = MODELS["DLRM"](bags()).eval()
    made = roo.rewrite(model, (dense(), features()), spec=SPEC, check=True)
    tables = model.sparse_arch.embedding_bag_collection.embedding_bags
    pair = (features(("user_a", "user_b"), rows=2), features(("item_a", "item_b"), rows=5))
    seen: dict[str, int] = {}
    for name, table in tables.items():
        table.register_forward_hook(lambda m, a, k, out, n=name: seen.__setitem__(n, len(out)), with_kwargs=True)
    made(dense()[:5], pair, num_impressions=torch.tensor([2, 3]))
    assert seen == {"t_user_a": 2, "t_item_a": 5, "t_user_b": 2, "t_item_b": 5}


def sizes_seen(table: nn.Module, made: nn.Module, keys: tuple[str, str], requests: int) -> list[int]:
    """How many ids `table` is asked for, call by call, with 6 request values and 5 impression values."""
    seen: list[int] = []
    handle = table.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    user = KeyedJaggedTensor(keys=[keys[0]], values=torch.arange(6), lengths=torch.tensor([6]))
    item = KeyedJaggedTensor(keys=[keys[1]], values=torch.arange(5), lengths=torch.ones(5, dtype=torch.long))
    made((user, item), num_impressions=torch.tensor([5]))
    handle.remove()
    return seen


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Pooled(bags())

    def forward(self, ids: Tensor) -> Tensor:
        lengths = torch.ones(ids.shape[0] * len(KEYS), dtype=torch.long)
        return self.inner(KeyedJaggedTensor(keys=list(KEYS), values=ids.t().reshape(-1), lengths=lengths))


def test_features_made_within_the_model_leave_a_leaf(rewritten_and_verified: Any) -> None:
    ids = torch.arange(ROWS * len(KEYS)).reshape(ROWS, -1) % IDS
    spec = roo.FeatureSpec(columns={"ids": {"request": [(0, 1), (2, 3)]}})
    made = rewritten_and_verified(Within().eval(), (ids,), spec=spec)
    assert made._whole_program().captured.leaves == ("inner.collection",)


class Reads(nn.Module):
    """A JaggedTensor and a KeyedTensor as inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(IDS, 4)
        self.out = nn.Linear(8, 1)

    def forward(self, hist: JaggedTensor, user: KeyedTensor, item: Tensor) -> Tensor:
        pooled = JaggedTensor(self.embed(hist.values()), lengths=hist.lengths()).to_padded_dense(3).sum(1)
        return self.out(torch.cat([pooled * user["a"], self.embed(item) * user["b"]], 1))


LENGTHS = torch.tensor([2, 0, 3, 1, 0, 2, 1])
BOTH = roo.FeatureSpec(["hist*", "user*"], ["item"])


def reads(hist: JaggedTensor) -> tuple[JaggedTensor, KeyedTensor, Tensor]:
    user = torch.rand(len(hist.lengths()), 8, generator=torch.Generator().manual_seed(0))
    return hist, KeyedTensor(["a", "b"], [4, 4], user), torch.arange(ROWS)


@pytest.mark.parametrize("pair", [{}, {"hist._values": "hist._lengths"}])
def test_jagged_and_keyed_tensors_are_inputs(rewritten_and_verified: Any, pair: dict[str, str]) -> None:
    hist = JaggedTensor(torch.arange(int(LENGTHS.sum())), lengths=LENGTHS)
    spec = roo.FeatureSpec(["hist*", "user*"], ["item"], jagged=pair)
    made = rewritten_and_verified(Reads().eval(), reads(hist), spec=spec)
    assert any("embedding" in str(n.target) for n in made._whole_program().plan.request)


def test_a_jagged_tensor_may_have_worked_out_its_offsets_or_not() -> None:
    model, values = Reads().eval(), torch.arange(int(LENGTHS.sum()))
    known = JaggedTensor(values, lengths=LENGTHS)
    known.offsets()
    made = roo.rewrite(model, reads(known), spec=BOTH, check=True)
    request = JaggedTensor(values[:5], offsets=torch.tensor([0, 2, 5]))
    impression = JaggedTensor(torch.cat([values[:2], *[values[2:5]] * 6]), lengths=torch.tensor([2, *[3] * 6]))
    counts = torch.tensor([1, 6])
    hist, user, item = reads(request)
    expected = model(impression, KeyedTensor(["a", "b"], [4, 4], user.values().repeat_interleave(counts, 0)), item)
    torch.testing.assert_close(made(hist, user, item, num_impressions=counts), expected)


def test_a_jagged_tensor_lies_on_one_side_and_keeps_its_kind() -> None:
    values = torch.arange(int(LENGTHS.sum()))
    hist = JaggedTensor(values, lengths=LENGTHS)
    with pytest.raises(roo.SpecError, match="same side"):
        roo.rewrite(Reads(), reads(hist), spec=roo.FeatureSpec(["hist._values", "user*"], ["hist._lengths", "item"]))
    made = roo.rewrite(Reads().eval(), reads(hist), spec=BOTH)
    weighted = JaggedTensor(values, weights=values.float(), lengths=LENGTHS)
    with pytest.raises(roo.InputError, match="without weights"):
        made(*reads(weighted), num_impressions=torch.ones(ROWS, dtype=torch.long))
