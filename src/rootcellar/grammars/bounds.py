"""How deep a grammar is, before anything that calls itself reads it.

The depth is that of the longest chain: nesting, and references from one rule or definition to the next. Rules that
refer to one another in a circle count as if each led to the next: the longest chain that a compiler may follow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rootcellar.errors import RequestError
from rootcellar.grammars.schemas import References, Role, walk

# Literals, character classes, comments, and what gives a GBNF grammar its structure; what is not closed ends the text.
_GBNF = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|\[(?:[^\]\\]|\\.)*(?:\]|\Z)|#[^\r\n]*|::=|[()]|[\w-]+', re.DOTALL)
_REGEX = re.compile(r"\\.|\[\^?\]?(?:[^\]\\]|\\.)*(?:\]|\Z)|[()]", re.DOTALL)


def check_depth(kind: str, depth: int, limit: int) -> None:
    """``RequestError`` when a grammar of this ``kind`` (its parameter's name) is deeper than ``limit``."""
    if depth > limit:
        raise RequestError(
            f"{kind} is {depth} levels deep, nesting and chains of references counted: at most {limit} are allowed "
            "(max_grammar_depth)"
        )


def schema_depth(schema: Any) -> int:
    """Levels of a JSON schema (its parsed text)."""
    references = References(schema)
    order = [schema]
    numbers = {id(schema): 0}
    weights: list[int] = []
    edges: list[list[int]] = []
    for each in order:  # grows: whatever is referred to has its turn
        depth, leads = 0, set()
        for node in walk(each, definitions=False):
            depth = max(depth, node.depth + 1)
            reference = node.value.get("$ref") if node.role is Role.SCHEMA and isinstance(node.value, dict) else None
            if isinstance(reference, str):
                target = references.target(reference)
                if id(target) not in numbers:
                    numbers[id(target)] = len(order)
                    order.append(target)
                leads.add(numbers[id(target)])
        weights.append(depth)
        edges.append(sorted(leads))
    return longest_chain(weights, edges)


def gbnf_depth(text: str) -> int:
    """Levels of a GBNF grammar: one for each rule and each parenthesis."""
    tokens = [word for word in _GBNF.findall(text) if word[0] not in '"[#']
    starts = [i for i in range(len(tokens) - 1) if tokens[i + 1] == "::="]
    numbers = {tokens[at]: n for n, at in enumerate(starts)}
    weights, edges = [], []
    for n, at in enumerate(starts):
        body = tokens[at + 2 : starts[n + 1] if n + 1 < len(starts) else len(tokens)]
        weights.append(1 + nesting(body))
        edges.append(sorted({numbers[word] for word in body if word in numbers}))
    return longest_chain(weights, edges)


def regex_depth(text: str) -> int:
    """Levels of a regular expression: one, and one for each parenthesis around another."""
    return 1 + nesting(_REGEX.findall(text))


def nesting(tokens: Sequence[str]) -> int:
    """How deep the parentheses among ``tokens`` are nested."""
    depth = deepest = 0
    for token in tokens:
        depth += (token == "(") - (token == ")")
        deepest = max(deepest, depth)
    return deepest


def longest_chain(weights: Sequence[int], edges: Sequence[Sequence[int]]) -> int:
    """The heaviest path in a graph; the nodes of a circle all count (Tarjan's components, without recursion)."""
    n = len(weights)
    index, low = [-1] * n, [0] * n
    best: list[int | None] = [None] * n  # of whole components: the heaviest path from here on
    path: list[int] = []
    count = heaviest = 0
    for root in range(n):
        calls = [(root, 0)] if index[root] < 0 else []
        while calls:
            node, at = calls.pop()
            if at == 0:
                index[node] = low[node] = count
                count += 1
                path.append(node)
            if at < len(edges[node]):
                calls.append((node, at + 1))
                other = edges[node][at]
                if index[other] < 0:
                    calls.append((other, 0))
                elif best[other] is None:
                    low[node] = min(low[node], index[other])
                continue
            if low[node] == index[node]:
                members = path[path.index(node) :] if path[-1] != node else [node]
                del path[-len(members) :]
                beyond = [best[other] or 0 for member in members for other in edges[member]]
                weight = sum(weights[member] for member in members) + max(beyond, default=0)
                for member in members:
                    best[member] = weight
                heaviest = max(heaviest, weight)
            if calls:
                low[calls[-1][0]] = min(low[calls[-1][0]], low[node])
    return heaviest
