"""Which columns a sampler keeps, as options: checked with the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

from .options import check_count, check_number


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """top_k, then top_p over what is left, then min_p; the defaults keep everything."""

    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off

    def check(self) -> None:
        check_count("top_k", self.top_k, at_least=0)
        check_number("top_p", self.top_p, above=0)
        if self.top_p > 1:
            raise ValueError(f"top_p={self.top_p}: give a probability, at most 1")
        check_number("min_p", self.min_p, at_least=0)
        if self.min_p > 1:
            raise ValueError(f"min_p={self.min_p}: give a share of the largest probability, at most 1")

    @property
    def keeps_all(self) -> bool:
        return self.top_k == 0 and self.top_p == 1 and self.min_p == 0
