"""The rewritten model under DistributedModelParallel on two gloo processes, against the unsharded original."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import roo_rewrite as roo

pytest.importorskip("torchrec")
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

KEYS = ("user_a", "user_b", "item_a", "item_b")
WIDTH, IDS, WORLD = 8, 20, 2
COUNTS = ([2, 0, 3], [1, 4, 0])  # equal sums: gloo cannot gather blocks of unequal sizes
SPEC = roo.FeatureSpec(request=["user_*"], impression=["item_*", "dense*"])
COLLECTION = "sparse_arch.embedding_bag_collection"


def model() -> nn.Module:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f"t_{k}", embedding_dim=WIDTH, num_embeddings=IDS, feature_names=[k]) for k in KEYS
    ]
    made = DLRM(EmbeddingBagCollection(tables=tables), 5, [8, WIDTH], [8, 1])
    for weight in made.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    return made


def features(keys: tuple[str, ...], rows: int, seed: int) -> KeyedJaggedTensor:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(keys) * rows,), generator=g)
    return KeyedJaggedTensor(
        keys=list(keys), values=torch.randint(0, IDS, (int(lengths.sum()),), generator=g), lengths=lengths
    )


def batch(rank: int) -> tuple[Tensor, tuple[KeyedJaggedTensor, KeyedJaggedTensor], Tensor]:
    """Dense `[I, 5]`, the pair of features, counts `[R]`; another batch for each rank."""
    counts = torch.tensor(COUNTS[rank])
    rows = int(counts.sum())
    dense = torch.rand(rows, 5, generator=torch.Generator().manual_seed(rank))
    return dense, (features(KEYS[:2], len(counts), rank + 10), features(KEYS[2:], rows, rank + 20)), counts


def run(rank: int, port: int, kind: str, folder: str) -> None:
    """One process: shards the rewritten model, takes a step, writes what it saw."""
    import torch.distributed as dist
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    original = model()
    example = (torch.rand(4, 5), features(KEYS, 4, 0))
    rewritten = roo.rewrite(original, example, spec=SPEC, check=True)
    kernel = EmbeddingComputeKernel.DENSE.value
    place = [
        row_wise(compute_kernel=kernel) if kind == "row_wise" else table_wise(rank=i % WORLD, compute_kernel=kernel)
        for i in range(len(KEYS))
    ]
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        rewritten.get_submodule(COLLECTION),
        per_param_sharding={f"t_{k}": p for k, p in zip(KEYS, place)},
        local_size=WORLD,
        world_size=WORLD,
        device_type="cpu",
        sharder=sharder,
    )
    parallel = DistributedModelParallel(
        rewritten,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan(plan={COLLECTION: plan}),
        sharders=[sharder],
    )
    _load(parallel, dict(model().named_parameters()))
    assert type(rewritten.get_submodule(COLLECTION)).__name__ == "ShardedEmbeddingBagCollection"
    torch.save(_step(parallel, rank), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _load(parallel: Any, weights: dict[str, Tensor]) -> None:
    """Puts the original's tables into the shards, which TorchRec draws anew on CPU."""
    with torch.no_grad():
        for name, value in parallel.state_dict().items():
            for shard in value.local_shards() if hasattr(value, "local_shards") else []:
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                shard.tensor.copy_(weights[name][row : row + rows, column : column + columns])


def _step(parallel: Any, rank: int) -> dict[str, Any]:
    dense, pair, counts = batch(rank)
    scores = parallel(dense, pair, num_impressions=counts)
    scores.sum().backward()
    grads: dict[str, Tensor] = {}
    for name, weight in parallel.named_parameters():
        if weight.grad is not None:
            grads[name] = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
    return {"scores": scores.detach(), "grads": {n: g.detach().clone() for n, g in grads.items()}}


def expected() -> tuple[list[Tensor], dict[str, Tensor]]:
    """Scores of each rank, and the mean over the ranks of the gradients, from the original on broadcast inputs."""
    truth = model()
    scores = []
    for rank in range(WORLD):
        dense, (user, item), counts = batch(rank)
        rows = torch.repeat_interleave(counts)
        parts = {k: user[k] for k in user.keys()}
        wide = [parts[k].to_dense() for k in parts]
        values = [torch.cat([w[r] for r in rows.tolist()] or [torch.zeros(0, dtype=torch.long)]) for w in wide]
        lengths = [parts[k].lengths().index_select(0, rows) for k in parts]
        kjt = KeyedJaggedTensor(
            keys=list(KEYS),
            values=torch.cat([*values, item.values()]).long(),
            lengths=torch.cat([*lengths, item.lengths()]),
        )
        scores.append(truth(dense, kjt))
    (sum(s.sum() for s in scores) / WORLD).backward()
    return [s.detach() for s in scores], {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["row_wise", "table_wise"])
def test_scores_and_gradients_are_the_unsharded_originals(kind: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run, args=(port, kind, str(tmp_path)), nprocs=WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    scores, grads = expected()
    for rank in range(WORLD):
        torch.testing.assert_close(found[rank]["scores"], scores[rank], rtol=1e-5, atol=1e-6)
    for name, want in grads.items():
        seen = [f["grads"][k] for f in found for k in f["grads"] if k.endswith(name)]
        assert seen, name
        got = seen[0] if "embedding_bags" not in name else _joined(seen, want)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def _joined(parts: list[Tensor], want: Tensor) -> Tensor:
    """The shards of a table's gradient, in rank order."""
    whole = [p for p in parts if p.numel()]
    return torch.cat(whole) if len(whole) > 1 else copy.copy(whole[0])
