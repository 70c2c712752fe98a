"""Models larger than one device: every rank holds some heads, some neurons of every layer, and some of the vocabulary.

Tensor parallelism with PyTorch's collectives. q, k, v, gate and up are split by rows, o_proj and down by columns. So a
rank's attention and its MLP each give one summand of the result, and the ranks add their summands. The output
projection is split by rows of the vocabulary, and every rank gets all logits. The embedding and the norms are whole on
every rank. The sums of a neuron's activations stay on the rank that has the neuron, and are gathered once at the end.

All ranks make the same calls in step; ``lead.py`` sees to it. A failure of one rank ends all ranks and leaves none
waiting: in a discovery the ranks meet before the first pack and after every pack, and no wait for a collective is
longer than the process group's timeout.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cna_kernels import ops
from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.files import sha256
from cna_kernels.sums import ActivationSums, NonFiniteActivation

from ..checkpoint.config import ModelConfig
from ..checkpoint.identity import identity_of
from ..checkpoint.load import HEAD, check_entries, check_memory, dtype_of, expected_shapes
from ..checkpoint.safetensors_file import Checkpoint, TensorEntry
from ..kv_cache import KVCache
from ..transformer import Linear, Transformer
from .sharded_table import ShardedTable

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
TIMEOUT = timedelta(minutes=5)  # how long a rank waits for the others, which may read and compile longer
SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # what the ranks divide

_NOTHING = "0" * 64  # shown instead of a hash by a rank that has failed


class OtherRankFailed(InputError):
    """Nothing is wrong with this rank: another one has failed, or is gone."""


def open_mesh(device, *, timeout: timedelta = TIMEOUT) -> DeviceMesh:
    """All processes that torchrun has started, as one row of ranks. Starts the process group if there is none yet.

    Args:
        device: this rank's device: "cpu", or "cuda:N" where N is this rank's LOCAL_RANK.
        timeout: how long a rank waits for the others.
    """
    device = torch.device(device)
    if device.type not in BACKENDS:
        raise InputError("device", f"tensor parallelism runs on {' and '.join(BACKENDS)}, got {device}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise InputError("RANK", "is not set: tensor parallelism is started with torchrun")
        bound = device if device.type == "cuda" else None
        dist.init_process_group(BACKENDS[device.type], timeout=timeout, device_id=bound)
        if device.type == "cpu":
            # gloo's threads drop the tensors of a collective a moment after the collective has returned. Where the
            # interpreter is ending by then, the process dies with SIGABRT (7 of 112; torch 2.13, pytorch issue 190489)
            atexit.register(time.sleep, 0.2)
    world = dist.group.WORLD
    assert world is not None, "init_process_group has made it"
    return DeviceMesh.from_group(world, device.type, mesh_dim_names=("ranks",))


class ParallelTransformer(Transformer):
    """One rank's part of a Transformer: its heads, neurons and rows of the vocabulary; all of embedding and norms.

    All ranks make the same calls with the same arguments, and all get the same results: hidden states and logits of
    the whole model. Circuits, too, are given whole; each rank steers the neurons that it has.

    Attributes:
        config: of the whole model; part: the shape of this rank's heads and neurons.
        mesh: the ranks that share the model, one-dimensional.
        checkpoint: the tensors of the files, from which ``down_columns`` reads.
    """

    answers = False  # a LanguageModel on every rank would choose its own tokens; see lead.py

    def __init__(self, config: ModelConfig, mesh: DeviceMesh, checkpoint: Checkpoint):
        part = _part_of(config, mesh.size())
        super().__init__(part)
        self.config, self.part, self.mesh, self.checkpoint = config, part, mesh, checkpoint
        self.n_ranks = mesh.size()
        own = _own_rows(config, mesh.size(), self.rank)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, len(own), bias=False)
        for layer in self.layers:
            for module in (layer.self_attn.o_proj, layer.mlp):
                module.register_forward_hook(self._add_up)

    def _add_up(self, module, args, y: Tensor) -> Tensor:
        """Add the ranks' summands in place. All ranks get the same bits."""
        y = y.contiguous()
        dist.all_reduce(y, group=self.mesh.get_group())
        return y

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states ``[..., H]`` onto the vocabulary, ``[..., V]``: each rank its rows, all get all."""
        n_ranks, own = self.mesh.size(), _own_rows(self.config, self.mesh.size(), self.rank)
        tied = self.config.tie_word_embeddings
        weight = self.embed_tokens.weight[own.start : own.stop] if tied else self.lm_head.weight
        logits = ops.linear(hidden.flatten(0, -2), weight)
        sizes = [len(_own_rows(self.config, n_ranks, rank)) for rank in range(n_ranks)]
        mine = logits.new_zeros(len(logits), max(sizes))  # a collective takes parts of one size
        mine[:, : len(own)] = logits
        parts = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(parts, mine, self.mesh.get_group())
        whole = torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)
        return whole.view(*hidden.shape[:-1], whole.shape[-1])

    def new_cache(self, batch: int, length: int) -> KVCache:
        """Room for the keys and values of this rank's heads."""
        return KVCache(self.part, batch, length, self.dtype, self.device)

    def cache_bytes(self, batch: int, length: int) -> int:
        """The bytes that keys and values take on this rank; on a CPU, on all ranks that share this machine's memory."""
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.device.type == "cpu" else 1
        return super().cache_bytes(batch, length) // self.mesh.size() * sharing

    def new_table(self, circuits: Sequence[Circuit], multipliers: Sequence[float]) -> ShardedTable:
        shape = self.config.num_hidden_layers, self.config.intermediate_size
        return ShardedTable(circuits, multipliers, *shape, self.device, rank=self.rank, n_ranks=self.mesh.size())

    def down_columns(self, layer: int, index: Sequence[int]) -> Tensor:
        """As of a whole model, of any neurons. Reads the checkpoint, and needs no other rank."""
        weight = self.checkpoint.read(f"model.layers.{layer}.mlp.down_proj.weight").to(self.dtype)
        return weight[:, list(index)].float().to(self.device)

    @contextmanager
    def own_sums(self, sums: ActivationSums, prompts, column_weights, batch, max_tokens) -> Iterator[OwnSums]:
        """The sums of this rank's neurons, which are added to ``sums`` on all ranks when the ``with`` ends.

        All ranks enter with the same arguments of ``collect``, else InputError. Packs are not halved where memory runs
        out on one rank. That rank raises an error; the others raise one when they lose the connection to it.
        """
        n_layers, n_columns, n_neurons = sums.total.shape
        squares = sums.total_sq is not None
        with named_if_lost(self.mesh):
            try:
                own = OwnSums(self.mesh, n_layers, n_neurons, n_columns, squares=squares, device=self.device)
                how = [str(self.dtype), list(sums.total.shape), squares, batch, max_tokens]
                tokens = [[prompt.ids, prompt.n_counted] for prompt in prompts]
                digest = sha256(json.dumps([how, tokens]), column_weights.contiguous().numpy().tobytes())
            except Exception:
                _meet(self.mesh, None)
                raise
            _meet(self.mesh, digest, "list of prompts")
            yield own
            own.add_to(sums)


def _part_of(config: ModelConfig, n_ranks: int) -> ModelConfig:
    """The shape of one rank's part. It says that embeddings are tied: the rows of lm_head are not among its tensors."""
    return replace(config, tie_word_embeddings=True, **{field: getattr(config, field) // n_ranks for field in SPLIT})


def _own_rows(config: ModelConfig, n_ranks: int, rank: int) -> range:
    """The ids of the vocabulary whose logits a rank computes; the ranks' numbers of ids differ by 1 at most."""
    return range(config.vocab_size * rank // n_ranks, config.vocab_size * (rank + 1) // n_ranks)


def load_parallel(
    directory, config: ModelConfig, checkpoint: Checkpoint, *, mesh: DeviceMesh, dtype=None, device="cpu"
) -> ParallelTransformer:
    """Read this rank's part of a checkpoint. All ranks of the mesh call this function; all return or all raise.

    No rank holds more than its part; every rank hashes the whole checkpoint, once. ``dtype`` None keeps the dtype of
    config.json.

    Raises:
        InputError: heads, key-value heads or neurons cannot be shared out evenly, which is not supported; a tensor is
            missing or misshapen; memory cannot hold the part; or another rank has failed, or has another checkpoint.
    """
    dtype = dtype_of(config, checkpoint) if dtype is None else dtype
    with named_if_lost(mesh):
        try:
            transformer = _load(directory, config, checkpoint, mesh, dtype, device)
            digest = sha256(repr(config), str(dtype), identity_of(directory, checkpoint, config)["tensors_sha256"])
        except Exception:
            _meet(mesh, None)
            raise
        _meet(mesh, digest, "checkpoint")
    return transformer


def _load(directory, config, checkpoint, mesh, dtype, device) -> ParallelTransformer:
    for field in SPLIT:
        if getattr(config, field) % mesh.size():
            what = f"expected a multiple of the {mesh.size()} ranks, got {getattr(config, field)}"
            raise InputError(f"{Path(directory) / 'config.json'}: {field}", what)
    part, rank = _part_of(config, mesh.size()), mesh.get_local_rank()
    check_entries(checkpoint, config, directory)
    check_memory(part, dtype, device, directory)
    with torch.device("meta"):
        transformer = ParallelTransformer(config, mesh, checkpoint).requires_grad_(False)
    for name, module in transformer.named_children():
        if name != "rotary":
            module.to(dtype).to_empty(device=device)
    transformer.rotary.to(device)
    for name, shape in expected_shapes(part).items():
        _place_of(transformer, name).copy_(_read_part(checkpoint.entries[name], shape, rank))
    if not config.tie_word_embeddings:
        rows = _own_rows(config, mesh.size(), rank)
        transformer.lm_head.weight.copy_(checkpoint.entries[HEAD].read_rows(rows, range(config.hidden_size)))
    if config.o_bias and rank > 0:  # the first rank's summand brings the bias
        for layer in transformer.layers:
            layer.self_attn.o_proj.bias.zero_()
    if config.mlp_bias and rank > 0:
        for layer in transformer.layers:
            layer.mlp.down_proj.bias.zero_()
    return transformer.eval()


def _place_of(transformer: Transformer, name: str) -> Tensor:
    """The parameter that a checkpoint's tensor goes to; gate_proj and up_proj go to the halves of gate_up_proj."""
    path = name.removeprefix("model.")
    for half, part in enumerate(("gate_proj", "up_proj")):
        if f".{part}." in path:
            return transformer.get_parameter(path.replace(part, "gate_up_proj")).chunk(2)[half]
    return transformer.get_parameter(path)


def _read_part(entry: TensorEntry, shape: tuple[int, ...], rank: int) -> Tensor:
    """Read a rank's share of a tensor: of its rows or columns where ``shape`` has fewer of them, else all of it."""
    rows, columns = (1, *shape)[-2:]
    all_rows, all_columns = (1, *entry.shape)[-2:]
    row = rank * rows if rows < all_rows else 0
    column = rank * columns if columns < all_columns else 0
    return entry.read_rows(range(row, row + rows), range(column, column + columns)).view(shape)


class OwnSums(ActivationSums):
    """The sums of this rank's neurons. All ranks call ``fold`` together; a non-finite sum fails on all of them."""

    def __init__(self, mesh: DeviceMesh, n_layers: int, n_neurons: int, n_columns: int, *, squares: bool, device):
        """``n_neurons`` is the number of neurons of a whole layer."""
        super().__init__(n_layers, n_neurons // mesh.size(), n_columns, squares=squares, device=device)
        self.mesh, self.n_neurons = mesh, n_neurons

    def _require_finite(self, layers):
        none = len(self.total) * self.n_neurons
        first = none
        try:
            super()._require_finite(layers)
        except NonFiniteActivation as error:
            index = self.mesh.get_local_rank() * self.total.shape[2] + error.index
            first = error.layer * self.n_neurons + index
        found = torch.tensor(first, dtype=torch.int64, device=self.act_sum.device)
        dist.all_reduce(found, dist.ReduceOp.MIN, self.mesh.get_group())
        if found < none:
            raise NonFiniteActivation(*divmod(found.item(), self.n_neurons))

    def add_to(self, whole: ActivationSums):
        """Add the totals of all ranks to ``whole``, ``[L, C, N]``, layer by layer. All ranks call this method."""
        for own, total in ((self.total, whole.total), (self.total_sq, whole.total_sq)):
            for part, layer in () if own is None or total is None else zip(own, total, strict=True):
                parts = part.new_empty(self.mesh.size(), *part.shape)  # [ranks, C, N / ranks]
                dist.all_gather(list(parts), part, self.mesh.get_group())
                layer += parts.transpose(0, 1).flatten(1).to(layer.device)
        whole.count += self.count


def _meet(mesh: DeviceMesh, digest: str | None, what: str = ""):
    """Wait for all ranks. Raise InputError unless all show the same ``digest``; None says that this rank has failed.

    Collectives do not fail cleanly on tensors that differ in shape or dtype (gloo sums them to garbage). So this
    collective, whose shape never changes, comes before all others.
    """
    device = torch.device(mesh.device_type)
    mine = torch.tensor(list(bytes.fromhex(digest or _NOTHING)), dtype=torch.uint8, device=device)
    shown = torch.empty(mesh.size(), len(mine), dtype=torch.uint8, device=device)
    dist.all_gather(list(shown), mine, mesh.get_group())
    if digest is None:
        return  # this rank's own error says more
    digests = [bytes(row).hex() for row in shown.tolist()]
    for rank, other in enumerate(digests):
        if other == _NOTHING:
            raise OtherRankFailed(f"rank {rank}", "has failed; its own message says why")
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise InputError(f"rank {rank}", f"has another {what} than rank 0")


@contextmanager
def named_if_lost(mesh: DeviceMesh) -> Iterator[None]:
    """Turn PyTorch's error into a one-line OtherRankFailed where another rank is gone, or has not come in time."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = re.sub(r"^\[\S+\] |\. This is typically .*", "", str(error).strip().splitlines()[0])
        raise OtherRankFailed(f"rank {mesh.get_local_rank()}", f"has lost another rank: {reason}") from None
