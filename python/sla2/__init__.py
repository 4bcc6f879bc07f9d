"""SLA2: sparse-linear attention with a learned router (arXiv 2602.12675)."""

from .attention import (
    AttentionParts,
    Routing,
    attention,
    attention_parts,
    info,
    route,
    scaled_dot_product_attention,
    self_test,
)
from .config import Config
from .module import Attention
from .ops import VERSION as __version__

__all__ = [
    "Attention",
    "AttentionParts",
    "Config",
    "Routing",
    "__version__",
    "attention",
    "attention_parts",
    "info",
    "route",
    "scaled_dot_product_attention",
    "self_test",
]
