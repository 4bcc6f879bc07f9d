"""SLA2 attention as a module with its learned parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import attention
from .config import Config


class Attention(nn.Module):
    """Owns proj_q, proj_k and alpha_logit (method "sla": proj_out), in fp32.

    num_heads: query heads; head_dim: of q, k and v; seq_len: query tokens, for alpha's blocks
    (another length resamples). router: one projection pair per "layer" or per "head"; alpha: one
    logit per query "block" and head, or one per "head". The projections start as the identity,
    which is SLA's heuristic; alpha_logit and proj_out start at zero. `config` may be replaced
    between calls. Raises ValueError naming the argument, its rule and the value.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        seq_len: int,
        config: Config = Config(),
        router: str = "layer",
        alpha: str = "block",
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("seq_len", seq_len)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(config, Config):
            raise ValueError(f"config must be a sla2.Config, got {type(config).__name__}")
        if not isinstance(head_dim, int) or head_dim % 16 != 0 or not 16 <= head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of 16 up to 256, got {head_dim!r}")
        if router not in ("layer", "head"):
            raise ValueError(f"router must be 'layer' or 'head', got {router!r}")
        if alpha not in ("block", "head"):
            raise ValueError(f"alpha must be 'block' or 'head', got {alpha!r}")
        self.config = config
        for name in ("proj_q", "proj_k", "alpha_logit", "proj_out"):
            self.register_parameter(name, None)
        if config.method == "sla":
            self.proj_out = nn.Parameter(torch.zeros(head_dim, head_dim))
            return
        identity = torch.eye(head_dim)
        if router == "head":
            identity = identity.expand(num_heads, head_dim, head_dim)
        self.proj_q = nn.Parameter(identity.clone())
        self.proj_k = nn.Parameter(identity.clone())
        blocks = -(-seq_len // config.block_q) if alpha == "block" else 1
        self.alpha_logit = nn.Parameter(torch.zeros(num_heads, blocks))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        protected: tuple[int, int] | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """q [B, H, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, D] -> [B, H, Nq, D]."""
        return attention(
            q,
            k,
            v,
            self.proj_q,
            self.proj_k,
            self.alpha_logit,
            proj_out=self.proj_out,
            config=self.config,
            protected=protected,
            key_lengths=key_lengths,
        )
