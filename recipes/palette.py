"""One color for one optimizer, in every picture, whatever else is drawn beside it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import optimizer

# Dark enough for lines on white, and told apart by hue or by lightness: neighbours in the list of names differ most.
COLORS = (
    "#000000 #1f77d0 #e6550d #2ca02c #a01fb4 #b8860b #00a5b5 #d62728 #7f6ce0 #7a4b20 #e34fa8 #5d8a00 #1b2a8f #ff9e1b"
    " #0b6e5f #8c1d40 #6c7a89 #64b5f6"
).split()
DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2), (3, 1), (8, 3, 1, 2, 1, 2))  # in multiples of the line's width
RAMP = "viridis"  # for a picture of one optimizer alone, from its best line to its worst


@dataclass(frozen=True)
class Style:
    """How a line is drawn."""

    color: str
    dash: tuple[float, ...] = ()

    def line(self) -> dict[str, object]:
        """As keyword arguments of matplotlib."""
        return {"color": self.color, "linestyle": (0, self.dash) if self.dash else "-"}


def color(name: str) -> str:
    """The color of an optimizer, which variants (`soap_reference`) share with their class (`soap`)."""
    known = sorted(optimizer.classes(), key=lambda key: (key.startswith("torch.") and key != "torch.muon", key))
    own = [key for key in known if name == key or name.startswith(f"{key}_")]
    place = known.index(max(own, key=len)) if own else zlib.crc32(name.encode())
    return COLORS[place % len(COLORS)]


def styles(labels: Mapping[str, str]) -> dict[str, Style]:
    """Styles for lines of several optimizers; those that share a color differ in their dashes and shades.

    Args:
        labels: From each line's label to its optimizer, best first.
    """
    if len(set(labels.values())) == 1 < len(labels):
        return _ramp(list(labels))
    alike: dict[str, list[str]] = {}
    for label, name in sorted(labels.items(), key=lambda item: len(item[1])):  # a class comes before its variants
        alike.setdefault(color(name), []).append(label)
    return {
        label: Style(_shade(base, number, len(group)), DASHES[number % len(DASHES)])
        for base, group in alike.items()
        for number, label in enumerate(group)
    }


def _shade(base: str, number: int, count: int) -> str:
    """One of `count` shades of a color, from a darker to a lighter one; itself where there are one or two."""
    if count <= 2:
        return base
    share = number / (count - 1) - 0.45  # below 0: towards black, above: towards white
    parts = [int(base[place : place + 2], 16) for place in (1, 3, 5)]
    mixed = [part + share * (255 - part) if share > 0 else part * (1 + share) for part in parts]
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def _ramp(labels: list[str]) -> dict[str, Style]:
    import matplotlib
    from matplotlib.colors import to_hex

    ramp = matplotlib.colormaps[RAMP]
    places = [0.9 * number / max(len(labels) - 1, 1) for number in range(len(labels))]  # its last tenth is too light
    return {label: Style(to_hex(ramp(place))) for label, place in zip(labels, places, strict=True)}
