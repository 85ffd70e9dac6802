"""Which bytes of a file are here: ranges, merged, and the lines they are remembered as.

Pure. Called by `staging` and `part`.
"""

from __future__ import annotations

Ranges = list[tuple[int, int]]


def merged(ranges: Ranges) -> Ranges:
    """The same bytes in as few ranges as possible, ascending."""
    found: Ranges = []
    for a, b in sorted(ranges):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], b))
        else:
            found.append((a, b))
    return found


def gaps(ranges: Ranges, start: int, stop: int) -> Ranges:
    """What of start..stop is in none of these (merged) ranges."""
    found: Ranges = []
    for a, b in ranges:
        if start < min(a, stop):
            found.append((start, min(a, stop)))
        start = max(start, b)
    return [*found, (start, stop)] if start < stop else found


def written(identity: str, ranges: Ranges) -> str:
    """The log of a file's ranges: which file, then a line per range."""
    return "".join(f"{line}\n" for line in (identity, *(f"{a} {b}" for a, b in ranges)))


def noted(text: str, identity: str, size: int) -> Ranges:
    """The ranges of a log, merged; none if it is another file's. A torn last line is dropped."""
    first, *lines = text.split("\n")
    if first != identity:
        return []
    found: Ranges = []
    for line in lines[:-1]:
        numbers = line.split()
        if len(numbers) != 2 or not all(n.isascii() and n.isdigit() for n in numbers):
            break
        a, b = int(numbers[0]), int(numbers[1])
        if a < b <= size:
            found.append((a, b))
    return merged(found)
