"""Whether a grammar leaves too much open for llama.cpp: it is read once, and walked in three ways.

Decides in which order; what each of them finds is in its own module. It must not know requests.
"""

from __future__ import annotations

from typing import Final

from potluck_coordinator.domain.grammar_firsts import Firsts
from potluck_coordinator.domain.grammar_readings import check_readings
from potluck_coordinator.domain.grammar_rules import ROOT, Rules, read_grammar
from potluck_coordinator.domain.grammar_stacks import check_stacks
from potluck_coordinator.domain.grammar_walk import Steps, Walker, check_left_ends

CHARACTERS_BY_STEP: Final = 2
"""Taken before anything is read; what they turn out to be, after that."""
READ_BY_STEP: Final = 2


def check_grammar(grammar: str, steps: Steps) -> None:
    """Raises GrammarUnreadableError and GrammarBranchesError."""
    rules, walker, firsts = _read(grammar, steps)
    check_left_ends(walker)
    loops, loops_walker, loops_firsts = (rules, walker, firsts) if rules.is_exact else _read(grammar, steps, has_loops=True)
    check_readings(loops_walker, loops_firsts, loops.numbers[ROOT])
    check_stacks(walker, firsts, rules.numbers[ROOT], rules.copies)


def _read(grammar: str, steps: Steps, *, has_loops: bool = False) -> tuple[Rules, Walker, Firsts]:
    steps.take(1 + len(grammar) // CHARACTERS_BY_STEP)
    rules = read_grammar(grammar, has_loops=has_loops)
    steps.take(rules.read_count // READ_BY_STEP)
    walker = Walker(rules, steps)
    return rules, walker, Firsts(walker)
