"""How long a part of a run is expected to take: as measured, else estimated from its operations and the card's rate."""

from collections.abc import Iterable
from dataclasses import dataclass

from hunyuan_staged.memory.cards import Card

HOURS_FROM = 180 * 60  # seconds; below 60 they stay seconds, between they are minutes
MEASURED, ESTIMATED = "measured", "an estimate"


@dataclass(frozen=True)
class Expected:
    """Seconds, at least and at most, which are the same where they were measured."""

    least: float
    most: float

    @property
    def how(self) -> str:
        return MEASURED if self.least == self.most else ESTIMATED

    def __str__(self) -> str:
        number, unit = duration(self.least, self.most)
        return f"{number} {unit}"


def measured(seconds: float) -> Expected:
    return Expected(seconds, seconds)


def estimated(least: float, most: float, card: Card) -> Expected | None:
    """Of so many operations, at least and at most, by the rate that a card reaches; None where that is not known."""
    rates = card.rates()
    return None if rates is None else Expected(least / rates[1], most / rates[0])


def total(parts: Iterable[Expected | None]) -> Expected | None:
    """All parts together; None where one is not known. It counts as measured where estimates are under a percent of it."""
    known = list(parts)
    if any(part is None for part in known):
        return None
    least, most = sum(part.least for part in known if part), sum(part.most for part in known if part)
    return measured(most) if most - least < 0.01 * most else Expected(least, most)


def duration(least: float, most: float, to: str = " to ") -> tuple[str, str]:
    """Seconds for a reader, ("78 to 124", "min"): the unit follows from the larger."""
    unit, factor = ("s", 1) if most < 60 else ("min", 60) if most < HOURS_FROM else ("hours", 3600)
    ends = [end / factor for end in (least, most)]
    if most < 0.1:
        return "under 0.1", unit
    if least == most:
        return f"{ends[0]:.1f}", unit
    return to.join(f"{end:.0f}" if end >= 10 else f"{end:.1f}" for end in ends), unit
