"""What an attention backend is: one function over packed, variable-length sequences.

Shapes: N packed patches of all sequences, H query heads, K key and value heads (H a multiple of K), D head_size,
S sequences.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence


class PackedSequences(NamedTuple):
    """Where the sequences of a packed batch begin and end. Made once a batch, shared by every layer.

    Attributes:
        cu_seqlens: int32 [S + 1] on the device; sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``.
        max_seqlen: the longest sequence, a host int.
        lengths: the same boundaries on the host, as S lengths, for backends that shape their work by them; empty where
            only the device knows them, for backends that are ``capturable``.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> PackedSequences:
        """From lengths alone; ``cu_seqlens`` is on the CPU."""
        boundaries = [0]
        for length in lengths:
            boundaries.append(boundaries[-1] + length)
        return cls(torch.tensor(boundaries, dtype=torch.int32), max(lengths), tuple(lengths))

    def padded(self, num_patches: int, max_sequences: int, longest: int) -> PackedSequences | None:
        """As many sequences as asked, over ``num_patches``: its own, then some of padding, then empty ones.

        Boundaries alone differ between two of one shape: ``max_seqlen`` is ``longest`` and the host's lengths are
        unknown, so that a captured graph can be replayed with others. None where they do not fit.
        """
        ends = torch.arange(int(self.cu_seqlens[-1]), num_patches, longest, dtype=torch.int32)[1:]
        boundaries = torch.full((max_sequences + 1,), num_patches, dtype=torch.int32)
        known = len(self.cu_seqlens) + len(ends)
        if known > max_sequences or self.max_seqlen > longest:
            return None
        boundaries[: len(self.cu_seqlens)] = self.cu_seqlens
        boundaries[len(self.cu_seqlens) : known] = ends
        return PackedSequences(boundaries, longest, ())

    def to(self, device: torch.device | str) -> PackedSequences:
        return self._replace(cu_seqlens=self.cu_seqlens.to(device, non_blocking=True))


class AttentionBackend(abc.ABC):
    """One way to compute attention. Holds no state of a batch, so that layers can share it.

    Args:
        num_heads: H.
        head_size: D.
        scale: what scores are multiplied by before the softmax.
        num_kv_heads: K.
        causal: each patch sees only itself and those before it in its sequence.
        implementation: which of the backend's implementations was selected; of no matter to one that has only one.

    Attributes:
        capturable: it needs no lengths on the host and can be captured in a CUDA graph.
        pause: called between the parts of a long call, by backends that have such parts; another batch may run in it.

    Raises:
        ImportError: the package that it needs is there but does not load.
    """

    name: str
    capturable = False
    pause: Callable[[], None] | None = None

    def __init__(
        self,
        *,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        causal: bool,
        implementation: str = "",
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.causal = causal
        self.implementation = implementation

    def choose_form(self, platform: str, dtype: str, failed: Collection[str] = ()) -> str:
        """Lets the backend take the form that is fastest there, and returns the name of its implementation then. Asked
        only where the platform chose the backend: what an operator named stays as it is.

        Args:
            failed: forms to pass over.
        """
        return self.implementation

    def more_to_check(self, device: torch.device) -> Sequence[tuple[int, ...]]:
        """Lengths of batches that take a path which those of the start-up check do not."""
        return ()

    @abc.abstractmethod
    def forward(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        """Attention within each sequence: [N, H, D] of q's dtype. See :class:`PackedSequences`."""
