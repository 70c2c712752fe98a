"""Which prompts go through the model together: no padding, and a shared beginning only once.

Prompts that begin alike form a group. Their common prefix is computed once; all attend to the prefix's keys and values.
Within a group prompts are sorted by length and cut into packs: one row of tokens, one prompt after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Tokens that a group must save to be worth its cost: smaller packs, and a forward pass for the prefix alone.
GROUP_COST = 64
DEEPEST = 50  # levels of prefixes within prefixes that are tried


@dataclass(frozen=True)
class TokenPrompt:
    """One tokenised prompt.

    Attributes:
        place: names the prompt in messages, ``file:line``.
        n_counted: how many tokens at the prompt's end the sums count; by default only the last.
    """

    ids: list[int]
    place: str
    n_counted: int = 1


class Group(NamedTuple):
    """Prompts with a common beginning of ``prefix`` tokens."""

    prefix: int
    prompts: list[int]


class Span(NamedTuple):
    """Neighbouring prompts of a pack with the same number of tokens and of counted tokens.

    ``start`` is where the tokens of the first prompt begin in the pack. No field counts the prefix.
    """

    start: int
    n_prompts: int
    n_tokens: int
    n_counted: int


def group_by_prefix(ids: Sequence[list[int]]) -> list[Group]:
    """Split prompts into groups that share a beginning, where computing it once saves more than GROUP_COST tokens.

    A prefix ends at least one token before the shortest prompt of its group. Every prompt is in exactly one group.
    """
    order = sorted(range(len(ids)), key=lambda row: ids[row])
    _, groups, alone = _best(ids, order, 0)
    if alone:
        groups.append(Group(0, alone))
    return sorted((Group(prefix, sorted(rows)) for prefix, rows in groups), key=lambda group: group.prompts)


def _best(ids, members, depth) -> tuple[int, list[Group], list[int]]:
    """The best groups of a sorted list: tokens saved, the groups, and the prompts that are better off in no group."""
    if len(members) < 2:
        return 0, [], members
    prefix = _common(ids, members)
    together = (len(members) - 1) * prefix - GROUP_COST
    apart = 0
    groups: list[Group] = []
    alone: list[int] = []
    if depth < DEEPEST:
        for child in _children(ids, members, prefix):
            saved, of_child, rest = (0, [], child) if child == members else _best(ids, child, depth + 1)
            apart, groups, alone = apart + saved, groups + of_child, alone + rest
        shared = _common(ids, alone) if len(alone) > 1 else 0
        rest_saves = (len(alone) - 1) * shared - GROUP_COST
        if groups and rest_saves > 0:
            apart, groups, alone = apart + rest_saves, [*groups, Group(shared, alone)], []
    if together > max(apart, 0):
        return together, [Group(prefix, members)], []
    return apart, groups, alone if groups else members


def _children(ids, members, prefix) -> list[list[int]]:
    """Split members, in sorted order, by their token after the prefix. If all have the same token there, split off the
    shortest, which allow no longer prefix, from the others."""
    shortest = [row for row in members if len(ids[row]) == prefix + 1]
    if ids[members[0]][prefix] == ids[members[-1]][prefix] and 0 < len(shortest) < len(members):
        return [shortest, [row for row in members if len(ids[row]) > prefix + 1]]
    children: list[list[int]] = []
    for row in members:
        if children and ids[row][prefix] == ids[children[-1][0]][prefix]:
            children[-1].append(row)
        else:
            children.append([row])
    return children


def _common(ids, members) -> int:
    """How many tokens all prompts of a sorted list begin with: as many as its first and its last prompt share."""
    shortest = min(len(ids[row]) for row in members)
    pairs = enumerate(zip(ids[members[0]], ids[members[-1]], strict=False))
    return min(next((place for place, (a, b) in pairs if a != b), shortest), shortest - 1)


def plan_packs(
    lengths: Sequence[int], counted: Sequence[int], *, max_prompts: int | None, max_tokens: int, padded: bool = False
) -> list[list[int]]:
    """Cut prompts into packs: the rows of each, shortest first.

    A pack holds at most ``max_prompts`` prompts; if that is None, at most ``max_tokens`` tokens. It holds at least one.
    With ``padded`` every prompt counts as many tokens as the pack's longest.
    """
    packs: list[list[int]] = []
    size = 0
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], counted[row], row)):
        n_tokens = (len(packs[-1]) + 1 if packs else 1) * lengths[row] if padded else size + lengths[row]
        fits = packs and (len(packs[-1]) < max_prompts if max_prompts is not None else n_tokens <= max_tokens)
        if fits:
            packs[-1].append(row)
        else:
            packs.append([row])
            size = 0
        size += lengths[row]
    return packs


def packs_of(
    prompts: Sequence[TokenPrompt], group: Group, *, max_prompts: int | None, max_tokens: int, padded: bool = False
) -> list[list[int]]:
    """The packs of a group, as numbers of prompts. Only tokens after the prefix count for :func:`plan_packs`."""
    lengths = [len(prompts[row].ids) - group.prefix for row in group.prompts]
    counted = [prompts[row].n_counted for row in group.prompts]
    packs = plan_packs(lengths, counted, max_prompts=max_prompts, max_tokens=max_tokens, padded=padded)
    return [[group.prompts[place] for place in pack] for pack in packs]


def spans_of(lengths: Sequence[int], counted: Sequence[int]) -> list[Span]:
    """The spans of one pack, whose prompts come in the order of :func:`plan_packs`."""
    spans: list[Span] = []
    start = 0
    for n_tokens, n_counted in zip(lengths, counted, strict=True):
        if spans and spans[-1][2:] == (n_tokens, n_counted):
            spans[-1] = spans[-1]._replace(n_prompts=spans[-1].n_prompts + 1)
        else:
            spans.append(Span(start, 1, n_tokens, n_counted))
        start += n_tokens
    return spans
