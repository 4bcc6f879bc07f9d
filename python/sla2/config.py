"""Options of the operator, and how they travel through its schema."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

_BLOCKS = (32, 64, 128, 256)
# The order of the values is that of the C++ enumerations (include/sla2/config.h).
_CHOICES = {
    "feature_map": ("softmax", "elu", "relu"),
    "precision": ("int8", "fp8", "bf16", "fp32"),
    "routing": ("hard", "soft"),
    "score_norm": ("none", "softmax"),
    "linear_keys": ("smoothed", "raw"),
    "linear_scope": ("complement", "all"),
    "backward": ("paper", "matched"),
    "method": ("sla2", "sla"),
}
OPTION_NAMES = ("block_q", "block_k", *_CHOICES, "protected_begin", "protected_end")
NUMBER_NAMES = ("keep", "tau", "scale")


@dataclass(frozen=True)
class Config:
    """Options of one attention (paper: arXiv 2602.12675).

    keep: fraction of key blocks that a query block reads exactly, in (0, 1]; sparsity is 1 - keep.
    block_q, block_k: tokens in a query block and in a key block: 32, 64, 128 or 256.
    scale: softmax scale; None: 1/sqrt(head_dim).
    feature_map: phi of the linear branch.
    precision: number format of the sparse branch's forward products (Section 5).
    routing: "hard" (top-k) or "soft" (SoftTop-k, Eq. 17), which trains the router.
    tau, score_norm: temperature of soft routing; row softmax of its scores or none.
    linear_keys, linear_scope: keys with or without their mean; the blocks not routed, or all.
    backward: "paper" reads the low-bit forward's o_s and lse; "matched" recomputes both.
    method: "sla2", or its predecessor "sla", to compare with.

    Raises ValueError naming the field, its rule and the value received.
    """

    keep: float = 0.03
    block_q: int = 128
    block_k: int = 64
    scale: float | None = None
    feature_map: str = "softmax"
    precision: str = "int8"
    routing: str = "hard"
    tau: float = 0.1
    score_norm: str = "none"
    linear_keys: str = "smoothed"
    linear_scope: str = "complement"
    backward: str = "paper"
    method: str = "sla2"

    def __post_init__(self) -> None:
        _require(_is_number(self.keep) and 0 < self.keep <= 1, "keep", "in (0, 1]", self.keep)
        for name in ("block_q", "block_k"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and value in _BLOCKS, name, "32, 64, 128 or 256", value)
        if self.scale is not None:
            _require(_is_positive(self.scale), "scale", "None or positive and finite", self.scale)
        _require(_is_positive(self.tau), "tau", "positive and finite", self.tau)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _require(
                isinstance(value, str) and value in choices,
                name,
                "one of " + ", ".join(map(repr, choices)),
                value,
            )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive(value) -> bool:
    return _is_number(value) and value > 0 and math.isfinite(value)


def _require(holds: bool, name: str, rule: str, value) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def pack(config: Config, protected: tuple[int, int] | None) -> tuple[list[int], list[float]]:
    """`options` and `numbers` of the operators' schema (torch_ops/packing.h)."""
    enums = [choices.index(getattr(config, name)) for name, choices in _CHOICES.items()]
    begin, end = protected or (0, 0)
    scale = 0.0 if config.scale is None else float(config.scale)
    return (
        [config.block_q, config.block_k, *enums, begin, end],
        [float(config.keep), float(config.tau), scale],
    )


def unpack(options: list[int], numbers: list[float]) -> tuple[Config, tuple[int, int]]:
    """The inverse of pack()."""
    values = {"block_q": options[0], "block_k": options[1], "keep": numbers[0], "tau": numbers[1]}
    values["scale"] = numbers[2] if numbers[2] != 0 else None
    for (name, choices), index in zip(_CHOICES.items(), options[2:10], strict=False):
        values[name] = choices[index]
    return Config(**{f.name: values[f.name] for f in fields(Config)}), (options[10], options[11])
