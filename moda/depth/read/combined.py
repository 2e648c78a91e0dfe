"""Combinations of policies: what any of several reads, or what all of them read."""

from __future__ import annotations

from dataclasses import dataclass

from moda.errors import UserError

from .policy import SlotPolicy


@dataclass(frozen=True)
class _Combined(SlotPolicy):
    """Several policies.

    :param policies: two or more different ones, which may be combinations themselves.
    """

    policies: tuple[SlotPolicy, ...]

    def __post_init__(self) -> None:
        if len(set(self.policies)) < max(2, len(self.policies)):
            given = [policy.to_plain() for policy in self.policies]
            raise UserError(f"model.depth.read.{self.name}", "two or more different slot policies", given)
        if (alone := next((policy.name for policy in self.policies if policy.alone), None)) is not None:
            hint = f"write {{{alone}: {{top: S, of: {{{self.name}: [...]}}}}}}"
            raise UserError(f"model.depth.read.{self.name}", f"policies that are not {alone}", hint=hint)


class Union(_Combined):
    """A layer reads what any of the policies reads: ``{union: [{stride: 9}, {recent: 4}]}``."""

    name = "union"

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        return tuple(sorted({s for policy in self.policies for s in policy.slots(layer, kinds)}))

    def describe(self) -> str:
        return ", together with ".join(policy.describe() for policy in self.policies)


class Intersect(_Combined):
    """A layer reads what all of the policies read: ``{intersect: [{kinds: [ffn]}, {recent: 8}]}`` are the last 4 FFN slots."""

    name = "intersect"

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        read = [set(policy.slots(layer, kinds)) for policy in self.policies]
        return tuple(sorted(set.intersection(*read)))

    def describe(self) -> str:
        return ", limited to ".join(policy.describe() for policy in self.policies)
