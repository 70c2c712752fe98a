"""What an engine finds: sums of the activations of a forward pass, and the circuits that are selected from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import select
from ..circuit import Circuit, check_fits, check_found_in
from ..errors import InputError, check_tensor
from ..files import FilePath
from ..renamed import renamed
from ..select import UniversalNeurons
from ..sums import ActivationSums
from .collecting import Collecting, buffers_for
from .identity import identity_of

if TYPE_CHECKING:
    from .mlps import SteeredMLP
    from .running import Running


class Finding:
    """The part of an :class:`Engine` that collects sums and selects circuits. The attributes are the Engine's."""

    widths: list[int]
    n_experts: list[int]
    n_layers: int
    n_neurons: int
    _devices: list[torch.device]
    _mlps: list[SteeredMLP]
    _decoder: nn.Module | None
    _was: dict[str, Any]

    def _check_attached(self) -> Running:
        raise NotImplementedError

    @renamed(weight="token_weight")
    @contextmanager
    def collect(
        self,
        token_weight: Tensor,
        sums: ActivationSums | None = None,
        *,
        squares: bool = False,
        counted: Tensor | None = None,
    ) -> Iterator[ActivationSums]:
        """Sum the activations of the first forward pass inside the ``with``, before any steering.

        Args:
            token_weight: ``[B, C]``: how much each row's last token counts in each of C columns: the last that the mask
                shows (not 0 in ``[B, S]``, in any dtype), or the row's last where there is no mask. Within ``generate``
                it is the prompt's, however prompts are cut. ``[B, S, C]``: of each token.
            sums: sums of the same columns, to which the pass is added; default new sums.
            squares: new sums also have the squares, which the score "cohen-d" needs. Given sums have squares or not,
                whatever this says.
            counted: ``[any, C]``, what the pass adds to the count of each column: where several tokens share a prompt's
                weight, the weights of the prompts are more exact than their sum. Default: ``token_weight``.

        Yields:
            The :class:`ActivationSums`. The pass is added to them when the ``with`` ends, unless it ends in an error.

        Raises:
            NonFiniteActivation: a sum is not finite; nothing of this pass was counted.
        """
        passes = self._check_attached()
        if passes.collecting is not None:
            raise InputError("collect", "is at work already; its `with` has not ended")
        token_weight = torch.as_tensor(token_weight, dtype=torch.float32)
        if token_weight.dim() not in (2, 3):
            raise InputError("token_weight", f"expected [B, C] or [B, S, C], got {list(token_weight.shape)}")
        n_columns = token_weight.shape[-1]
        if sums is None:
            sums = self.new_sums(n_columns, squares=squares)
        check_tensor("sums.total", sums.total, shape=(self.n_layers, n_columns, self.n_neurons))
        with torch.inference_mode(False):
            token_weight = token_weight.to(self._devices[0], torch.float32, copy=True).contiguous()
            each = zip(range(self.n_layers), self.widths, self._devices, strict=True)
            buffers_of = [buffers_for(sums, *layer) for layer in each]
            passes.collecting = collecting = Collecting(token_weight, buffers_of, counted)
        for mlp, buffers in zip(self._mlps, buffers_of, strict=True):
            mlp.sums = buffers
        try:
            yield sums
            if not collecting.done:
                raise InputError("collect", "no forward pass ran to its end inside the `with`")
            passes.check_all_ran()
            collecting.fold_into(sums)
        finally:
            passes.collecting = None
            for mlp in self._mlps:
                mlp.sums = {}

    def new_sums(self, n_columns: int, *, squares: bool = False) -> ActivationSums:
        """Return empty sums of the model's shape."""
        return ActivationSums(self.n_layers, self.n_neurons, n_columns, squares=squares, device=self._devices[0])

    def select(
        self,
        sums: ActivationSums,
        *,
        fraction: float = 0.001,
        top_k: int | None = None,
        score: str = "abs-delta",
        universal: UniversalNeurons | None = None,
        exclude: Iterable[tuple[int, int]] = (),
        skip_layers: Sequence[int] = (),
        position: str | None = None,
    ) -> Circuit:
        """Select the neurons that differ most between column 0, the positive prompts, and column 1, the negative.

        Args:
            sums: of two columns.
            fraction: the share of the model's neurons to take; ``top_k``, where given, wins.
            score: one of ``select.SCORES``.
            universal: neurons to leave out, as :meth:`universal` returned them.
            exclude: (layer, index) of other neurons to leave out.
            skip_layers: layers to leave out.
            position: what the counted tokens are, such as "last prompt token".

        The circuit's file will hold these arguments, and the model's name and hash.
        """
        if isinstance(exclude, UniversalNeurons):  # the way before `universal`
            if universal is not None:
                raise InputError("exclude", "expected (layer, index) pairs beside `universal`")
            universal, exclude = exclude, ()
        selection = select.Selection(
            self.widths, fraction=fraction, top_k=top_k, score=score, skip_layers=skip_layers, universal=universal,
            exclude=exclude,
        )  # fmt: skip
        return selection.circuit(sums, position=position, **self._provenance())

    def universal(self, sums: ActivationSums, *, fraction: float = 0.001, threshold: float = 0.8) -> UniversalNeurons:
        """Find the neurons that are among the largest by magnitude in most columns: they fire anyway.

        Args:
            sums: one column for each of some unrelated prompts, as ``collect(torch.eye(n_prompts))`` gives.
            fraction: the share of the model's neurons that counts as the largest of a column.
            threshold: the share of the columns that counts as most. A column that counts no token has no vote.

        Source: the universal filter of arXiv 2605.12290.
        """
        k = select.k_from_fraction(fraction, 1, sum(self.widths))
        votes = (sums.count != 0).cpu()
        if not votes.any():
            raise InputError("sums", "no column counts a token, so there is nothing to find universal neurons in")
        counts = select.count_top(sums.total.abs().cpu()[:, votes], k)
        return UniversalNeurons.of(counts, int(votes.sum()), fraction=fraction, threshold=threshold)

    def down_columns(self, layer: int, index: Sequence[int]) -> Tensor:
        """Return what neurons of a layer write to the residual stream at activation 1: their columns of ``down_proj``,
        ``[H, k]`` fp32. Of a quantised layer they are what it computes, in the model's dtype."""
        self._check_attached()
        for number in index:
            if not 0 <= number < self.widths[layer]:
                raise InputError("index", f"expected 0 to {self.widths[layer] - 1}, got {number}")
        return self._mlps[layer].columns(index, getattr(self._decoder, "dtype", torch.float32))

    def identity(self) -> dict[str, str]:
        """The name and hash of the model, see ``identity.py``; once the engine is off, as they were then."""
        return dict(self._provenance()["model"])

    def check_circuit(self, circuit: Circuit, where: FilePath = "circuit", *, any_model: bool = False) -> None:
        """Raise InputError, naming the field, if the circuit's shape or hashes say that it is of another model.

        With ``any_model`` only the shape is compared, as :meth:`set` does.
        """
        check_fits(circuit, self.n_layers, self.n_neurons, where)
        if not any_model:
            check_found_in(circuit, {f"model.{name}": value for name, value in self.identity().items()}, where)

    def _provenance(self) -> dict[str, Any]:
        """What a circuit's file says of the model: of the model now, or when the engine was taken off."""
        if self._decoder is None:
            return self._was
        dtype = getattr(self._decoder, "dtype", None)
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        return dict(model=identity_of(self._decoder, self._mlps), dtype=name, experts=self.experts)

    @property
    def experts(self) -> tuple[tuple[int, int], ...] | None:
        """(number of experts, neurons of each) for each layer, as ``Circuit.experts``; None without a mixture."""
        pairs = ((n, width // n) for n, width in zip(self.n_experts, self.widths, strict=True))
        return tuple(pairs) if max(self.n_experts) > 1 else None

    @property
    def device(self) -> torch.device:
        """The device of the first layer's MLP."""
        return self._devices[0]
