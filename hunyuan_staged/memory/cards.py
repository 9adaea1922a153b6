"""Graphics cards that a plan can be made for: of benchmarks.json's table, or of so many GB. Knows no torch."""

import re
from dataclasses import dataclass

from hunyuan_staged.errors import InputError
from hunyuan_staged.memory.timings import benchmarks

MAX_GB = 1000
# Words of a card's name that need not be said.
_OPTIONAL = re.compile(r"nvidia|geforce|rtx|sxm\d|hbm\d|\d+gb")


@dataclass(frozen=True)
class Card:
    """What computes: a graphics card. name: as its driver has it, None for any card of that memory (GB, as it is sold).

    tflops: dense, bf16; None where it is not known. capability: CUDA's. reached: which part of that rate a run reaches, at
    least and at most; None as the table says.
    """

    name: str | None
    memory_gb: float
    tflops: float | None = None
    capability: tuple[int, int] | None = None
    reached: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.name:
            return self.name
        alike = ", ".join(short_name(card) for card in self.alike())
        return f"a card of {self.memory_gb:g} GB" + f", as {alike}" * bool(alike)

    def rates(self) -> tuple[float, float] | None:
        """Operations a second that a run reaches, at least and at most; of all cards of that memory where none is named."""
        if self.tflops is None:
            reached = [rates for card in self.alike() if (rates := card.rates())]
            return (min(low for low, _ in reached), max(high for _, high in reached)) if reached else None
        shares = benchmarks()["estimate"]
        least, most = self.reached or (shares["least_share"], shares["most_share"])
        return self.tflops * 1e12 * least, self.tflops * 1e12 * most

    def alike(self) -> list["Card"]:
        """The cards of the table that a card of so many GB may be; none for one that has a name."""
        return [] if self.name else [card for card in known_cards() if card.memory_gb == self.memory_gb]


def short_name(card: Card) -> str:
    """Its name without its maker's."""
    return re.sub(r"^NVIDIA (GeForce )?", "", card.name or "")


def known_cards() -> list[Card]:
    """Those of the table."""
    return [
        Card(row["name"], row["memory_gb"], row["bf16_tflops"], tuple(row["capability"]))
        for row in benchmarks()["cards"]
    ]


def find_card(name: str | None) -> Card | None:
    """The card of the table that a driver calls so."""
    return next((card for card in known_cards() if card.name == name), None)


def assumed_card(text: str) -> Card:
    """What --assume_gpu names: GB of memory, or a card of the table, its maker's words left out or not, e.g. 4090.

    Of cards of one name it is the largest. InputError lists the names.
    """
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GB)?\s*", text, re.IGNORECASE)
    if size and 0 < float(size[1]) <= MAX_GB:
        return Card(None, float(size[1]))
    found = [card for card in known_cards() if _means(_words(text), _words(card.name or ""))]
    if not found:
        short = ", ".join(map(short_name, known_cards()))
        raise InputError(f"{text!r} is neither GB of memory nor a known card; known: {short}", option="assume_gpu")
    return max(found, key=lambda card: card.memory_gb)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _means(said: list[str], name: list[str]) -> bool:
    """Whether what was said is a card's name but for words that need not be said; "4060ti" is "4060 Ti"."""
    core, own = ("".join(word for word in words if not _OPTIONAL.fullmatch(word)) for words in (said, name))
    return core == own and all(word in name for word in said if word.endswith("gb"))
