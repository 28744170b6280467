"""Why prompts were computed again: the cause, its price in tokens, and what would help. Pure logic over token ids."""

from rootcellar.misses.causes import REMEDIES, Cause, Facts, Miss
from rootcellar.misses.judge import judge
from rootcellar.misses.past import Earlier, Past
from rootcellar.misses.price import PrefillCost, Spent, StepsTaken, filled, learned, pairs
from rootcellar.misses.report import Habit, costliest
from rootcellar.misses.words import TextOf, told, told_habit

__all__ = [
    "REMEDIES",
    "Cause",
    "Earlier",
    "Facts",
    "Habit",
    "Miss",
    "Past",
    "PrefillCost",
    "Spent",
    "StepsTaken",
    "TextOf",
    "costliest",
    "filled",
    "judge",
    "learned",
    "pairs",
    "told",
    "told_habit",
]
