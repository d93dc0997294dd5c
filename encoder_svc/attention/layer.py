"""``MMEncoderAttention``: the attention layer that every vision encoder is built on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from encoder_svc.attention.registry import load_backend
from encoder_svc.errors import AttentionKernelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from encoder_svc.attention.base import AttentionBackend
    from encoder_svc.attention.triton_windows import WindowAttention
    from encoder_svc.platforms import Platform, Selection


class MMEncoderAttention:
    """Packed, prefill-only attention on the backend that the platform chooses at construction.

    The layers of a tower share one instance, and with it the backend and the causal switch. It holds no weights.

    Args:
        num_heads: query heads, H.
        head_size: values in one head, D.
        scale: multiplies scores before the softmax; ``head_size ** -0.5`` if None.
        num_kv_heads: key and value heads, K; H if None.
        attn_backend: the operator's override, in any case; None lets the platform choose.
        platform: decides; its answer is kept in ``selection``.
        dtype: name of the dtype that q, k and v will have.
        causal: each patch sees only itself and earlier ones of its sequence.
        flash_attn_implementation: the operator's pin inside FLASH_ATTN; None lets the platform choose.
        failed: kernels that the platform shall pass over; see :mod:`encoder_svc.attention.selfcheck`.

    Attributes:
        windows: what takes sequences of at most 64 patches where the platform chose the backend and this is faster;
            None where the backend takes them.

    Raises:
        AttentionBackendError: the override cannot run here.
        AttentionKernelError: the selected kernel does not load.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float | None = None,
        num_kv_heads: int | None = None,
        attn_backend: str | None = None,
        *,
        platform: Platform,
        dtype: str,
        causal: bool = False,
        flash_attn_implementation: str | None = None,
        failed: Mapping[tuple[str, str], str] | None = None,
    ) -> None:
        self.selection: Selection = platform.get_vit_attn_backend(
            head_size, dtype, attn_backend, flash_attn_implementation=flash_attn_implementation, failed=failed
        )
        self.dtype = dtype
        self.head_size = head_size
        self.windows: WindowAttention | None = None
        try:
            self.backend: AttentionBackend = load_backend(platform.backends[self.selection.backend])(
                num_heads=num_heads,
                head_size=head_size,
                scale=head_size**-0.5 if scale is None else scale,
                num_kv_heads=num_kv_heads or num_heads,
                causal=causal,
                implementation=self.selection.implementation,
            )
        except Exception as error:
            raise self._failure(f"does not load ({type(error).__name__}: {error})") from error
        if self.selection.source != "override":
            passed_over = [form for backend, form in failed or () if backend == self.selection.backend]
            implementation = self.backend.choose_form(platform.name, dtype, passed_over)
            self.selection = replace(self.selection, implementation=implementation)

    def __call__(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Attention within each packed sequence.

        Args:
            q_NHD, k_NKD, v_NKD: [N, H, D] and twice [N, K, D], all sequences one after the other.
            cu_seqlens: int32 [S + 1], the sequences' boundaries, on the device.
            max_seqlen: the longest sequence, a host int.
            lengths: the S lengths on the host. Encoders pass them; without them they are read back from the
                device, which waits for it.

        Returns:
            [N, H, D], of q's dtype.

        Raises:
            AttentionKernelError: the kernel failed. Nothing takes its place.
        """
        if lengths is None:
            lengths = cu_seqlens.diff().tolist()
        try:
            return self.backend.forward(q_NHD, k_NKD, v_NKD, cu_seqlens, max_seqlen, lengths)
        except Exception as error:
            raise self._failure(f"{type(error).__name__}: {error}") from error

    def _failure(self, why: str) -> AttentionKernelError:
        return AttentionKernelError(self.selection.backend, self.selection.implementation, why)
