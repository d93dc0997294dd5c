"""FLASH_ATTN: flash-attn 4, 3 or 2, or torch's own varlen kernel, which is flash-attn 2 as torch ships it.

Sources: FlashAttention (Dao et al., 2022), -2 (Dao, 2023), -3 (Shah et al., 2024); packages flash-attn-4
(``flash_attn.cute``), flash-attn-3 (``flash_attn_interface``) and flash-attn (``flash_attn``).
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from encoder_svc.attention import fa4_tiles
from encoder_svc.attention.base import AttentionBackend
from encoder_svc.platforms.torch_compiler import compiler_left_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

_LONGEST_DENSE = 4_096

_MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface", "fa2": "flash_attn"}


class FlashAttn(AttentionBackend):
    """fp16 and bf16, head sizes that are multiples of 8 up to 256."""

    name = "FLASH_ATTN"
    capturable = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._run: Callable[..., torch.Tensor]
        self._dense: Callable[..., torch.Tensor] | None = None
        self._smaller_tiled: Callable[..., torch.Tensor] | None = None
        if self.implementation == "torch":
            from torch.nn.attention.varlen import varlen_attn

            self._run = self._torch(varlen_attn)
        else:
            with compiler_left_out():
                module = importlib.import_module(_MODULES[self.implementation])
            self._run = self._upstream(module.flash_attn_varlen_func)
            if self.implementation == "fa4":
                self._dense = self._upstream_dense(module.flash_attn_func)
                self._smaller_tiled = self._with_smaller_tiles()

    def forward(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        # flash-attn 4 takes windows of one length 1.8 times as fast as a plain batch, and the longest more slowly;
        # torch's kernel takes them alike.
        dense = lengths and lengths.count(lengths[0]) == len(lengths) and lengths[0] <= _LONGEST_DENSE
        if self._dense is not None and dense:
            return self._dense(*(x.unflatten(0, (len(lengths), lengths[0])) for x in (q_NHD, k_NKD, v_NKD)))
        # In a graph only the number of patches is known.
        if self._smaller_tiled is not None and self._smaller_are_faster(q_NHD.device, lengths or (len(q_NHD),)):
            return self._smaller_tiled(q_NHD, k_NKD, v_NKD, cu_seqlens, max_seqlen)
        return self._run(q_NHD, k_NKD, v_NKD, cu_seqlens, max_seqlen)

    def more_to_check(self, device: torch.device) -> Sequence[tuple[int, ...]]:
        if self._smaller_tiled is None or not (multiprocessors := fa4_tiles.hopper_multiprocessors(device)):
            return ()
        return (fa4_tiles.lengths_of_its_own(self.num_heads, multiprocessors),)

    def _smaller_are_faster(self, device: torch.device, lengths: Sequence[int]) -> bool:
        multiprocessors = fa4_tiles.hopper_multiprocessors(device)
        return multiprocessors > 0 and fa4_tiles.smaller_are_faster(lengths, self.num_heads, multiprocessors)

    def _with_smaller_tiles(self) -> Callable[..., torch.Tensor] | None:
        if self.head_size != fa4_tiles.HEAD_SIZE or self.causal or self.num_kv_heads != self.num_heads:
            return None
        try:
            own = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd
        except (ImportError, AttributeError):  # another release keeps it elsewhere
            return None
        return fa4_tiles.smaller_tiled(own, self.scale) if fa4_tiles.takes_tiles(own) else None

    def _upstream(self, varlen: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        """flash-attn 2, 3 and 4 name their arguments alike; 4, and some releases of 3, also return the log-sum-exp."""

        def run(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
        ) -> torch.Tensor:
            returned = varlen(
                q,
                k,
                v,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=max_seqlen,
                max_seqlen_k=max_seqlen,
                softmax_scale=self.scale,
                causal=self.causal,
            )
            out: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
            return out

        return run

    def _upstream_dense(self, dense: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        def run(q_BLHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor) -> torch.Tensor:
            returned = dense(q_BLHD, k_BLKD, v_BLKD, softmax_scale=self.scale, causal=self.causal)
            out_BLHD: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
            return out_BLHD.flatten(0, 1)

        return run

    def _torch(self, varlen: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        options: dict[str, Any] = {"scale": self.scale, "window_size": (-1, 0) if self.causal else (-1, -1)}
        # Before torch 2.12 fewer key than query heads are simply taken.
        if "enable_gqa" in inspect.signature(varlen).parameters:
            options["enable_gqa"] = self.num_kv_heads != self.num_heads

        def run(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
        ) -> torch.Tensor:
            out: torch.Tensor = varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
            return out

        return run
