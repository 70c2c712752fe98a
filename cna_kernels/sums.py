"""ActivationSums: streaming weighted sums of activations. Memory depends on L, C and N, never on the prompts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import InputError, check_tensor
from .renamed import renamed

PART = 1 << 22  # sums that are looked at, or widened, at a time


class NonFiniteActivation(ValueError):
    """A sum came out NaN or infinite; nothing of the forward pass was counted."""

    def __init__(self, layer: int, index: int) -> None:
        self.layer, self.index = layer, index
        super().__init__(f"non-finite activation in layer {layer}, neuron {index}")


class ActivationSums:
    """Weighted sums over tokens of every neuron's activation, in C columns.

    The ops add to buffers on the device during a forward pass; :meth:`fold` moves them into fp64 totals. Totals of
    separate runs merge by addition. No gradient flows through the totals.

    Attributes:
        act_sum: ``[L, C, N]`` on the device, what the current forward pass has added so far: fp32, with squares fp64.
            A variance is the small difference of two large numbers, and in fp32 nothing is left of it.
        act_sumsq: the same sums over squared activations, or None.
        total, total_sq: ``[L, C, N]`` fp64, on the device if it has fp64, else on the host.
        count: ``[C]`` fp64 on the host, the sum of the weights behind the totals.
    """

    def __init__(
        self,
        n_layers: int,
        n_neurons: int,
        n_columns: int,
        *,
        squares: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (n_layers, n_columns, n_neurons)
        if squares and torch.device(device).type == "mps":
            raise InputError("squares", "need fp64, which mps has not; sum on the CPU")
        kind = torch.float64 if squares else torch.float32
        with torch.inference_mode(False):  # buffers made in inference mode could not be changed outside it
            self.act_sum = torch.zeros(shape, dtype=kind, device=device)
            self.act_sumsq = torch.zeros_like(self.act_sum) if squares else None
            host = self.act_sum.device.type not in ("cpu", "cuda")
            self.total = torch.zeros(shape, dtype=torch.float64, device="cpu" if host else device)
            self.total_sq = torch.zeros_like(self.total) if squares else None
            self.count = torch.zeros(n_columns, dtype=torch.float64)

    def layer(self, layer: int) -> dict[str, Tensor | None]:
        """Return the layer's buffers, ``[C, N]`` each, as the keyword arguments of an op."""
        squares = None if self.act_sumsq is None else self.act_sumsq[layer]
        return {"act_sum": self.act_sum[layer], "act_sumsq": squares}

    @renamed(weight="token_weight")
    def fold(self, token_weight: Tensor, *, layer: int | slice | None = None) -> None:
        """Move what a forward pass added into the totals: all of it, or nothing if this raises.

        Args:
            token_weight: ``[any, C]``, the weights to count: those of the tokens, or of the prompts, that were summed.
            layer: move only the sums of this layer, or of these layers, for a pass that has not run the others.

        Raises:
            NonFiniteActivation: a sum is not finite. The totals stay as they were and the buffers are emptied.
        """
        check_tensor("token_weight", token_weight, shape=(None, self.count.shape[0]))
        layers = slice(None) if layer is None else layer
        if not isinstance(layers, slice):
            first = range(self.total.shape[0])[layers]  # from the end where it is negative
            layers = slice(first, first + 1)
        try:
            # everything that may run out of memory comes before the first total changes
            count = token_weight.cpu().double().sum(0)
            self._require_finite(layers)
            added = [buffer[layers].detach().to(self.total.device) for buffer in self._buffers()]
            parts = list(self._in_parts(range(self.total.shape[0])[layers]))
            first = layers.indices(self.total.shape[0])[0]
            wide = None
            if self.total.device.type == "cpu" and added[0].dtype != self.total.dtype and parts:
                # PyTorch would widen the whole buffer, which takes as much memory as the totals
                wide = torch.empty_like(self.total[parts[0]])
            for total, part in zip(_kept(self.total, self.total_sq), added, strict=True):
                for some in parts:
                    new = part[some.start - first : some.stop - first]
                    total[some] += new if wide is None else wide[: len(new)].copy_(new)
            self.count += count
        finally:
            self.discard(layers)

    def _buffers(self) -> list[Tensor]:
        return _kept(self.act_sum, self.act_sumsq)

    def _require_finite(self, layers: slice) -> None:
        """Raise NonFiniteActivation for the first sum of these layers that is not finite."""
        for buffer in self._buffers():
            for some in self._in_parts(range(self.total.shape[0])[layers]):
                finite = torch.isfinite(buffer[some])
                if not finite.all():
                    layer, _, index = (~finite).nonzero()[0].tolist()
                    raise NonFiniteActivation(some.start + layer, index)

    def _in_parts(self, layers: range) -> Iterator[slice]:
        """Layers as slices of at most PART sums, or one layer, so that what is computed of them needs little memory."""
        size = max(PART // max(self.total[:1].numel(), 1), 1)
        for start in range(layers.start, layers.stop, size):
            yield slice(start, min(start + size, layers.stop))

    def discard(self, layers: slice = slice(None)) -> None:
        """Empty the device buffers without counting them."""
        for buffer in self._buffers():
            buffer.detach_()[layers].zero_()  # an op with gradients has left its graph in the buffer

    def merge(self, other: ActivationSums) -> None:
        """Add the totals of ``other``, a run over different prompts with the same columns."""
        check_tensor("other.total", other.total, shape=tuple(self.total.shape))
        totals, others = _kept(self.total, self.total_sq), _kept(other.total, other.total_sq)
        if len(totals) != len(others):
            raise ValueError("other: one of the two runs kept squares and the other did not")
        for total, part in zip(totals, others, strict=True):
            total += part
        self.count += other.count

    def mean(self, column: int) -> Tensor:
        """Return the weighted mean activation, ``[L, N]`` fp64."""
        return self.total[:, column] / self._counted(column)

    def variance(self, column: int) -> Tensor:
        """Return the variance around the mean, with the n / (n - 1) correction, ``[L, N]`` fp64.

        The sums are fp64, the activations fp32 at most: a deviation below 2**-24 of the root of the mean square is
        rounding, and is raised to it.
        """
        count = self._counted(column)
        if self.total_sq is None:
            raise ValueError("variance: these sums were made without squares")
        if count <= 1:
            raise ValueError(f"variance: needs a count above 1, got {count:g}")
        return slot_variance(self.total[:, column], self.total_sq[:, column], count)

    def _counted(self, column: int) -> float:
        count = self.count[column].item()
        if count == 0:
            raise ValueError(f"column {column}: no token was counted")
        return count


def _kept(sums: Tensor, squares: Tensor | None) -> list[Tensor]:
    return [sums] if squares is None else [sums, squares]


def slot_variance(total: Tensor, total_sq: Tensor, count: float) -> Tensor:
    """The variance ``[L, N]`` from sums, sums of squares and a count above 1; see :meth:`ActivationSums.variance`."""
    mean_square = total_sq / count
    biased = mean_square - (total / count).square()
    return torch.maximum(biased, 2.0**-48 * mean_square) * (count / (count - 1))
