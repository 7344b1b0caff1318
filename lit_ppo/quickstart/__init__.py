"""The embedded default of the quickstart: reviews written by a grammar, and a parser that says what they are."""

from lit_ppo.quickstart.data import ReviewText
from lit_ppo.quickstart.grammar import Parsed, generate, generate_opening, parse
from lit_ppo.quickstart.report import Report, report

__all__ = ["Parsed", "Report", "ReviewText", "generate", "generate_opening", "parse", "report"]
