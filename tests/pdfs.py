"""A PDF writer in plain Python: fixtures for the document tests, and the example's file.

`Pdf()` collects pages of text lines in Helvetica, an outline, page labels; `build()` writes them.
Switches make the files users really meet: encrypted, scanned, with a broken cross-reference table.
`raw_pdf(objects)` writes any objects, for files made to hurt. Import with `import pdfs`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 595, 842  # A4 in points
_PAD = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")


@dataclass(frozen=True)
class Run:
    """One line of text: where its baseline begins, in points from the lower left corner."""

    x: float
    y: float
    text: str
    size: float = 11
    font: str = "F1"
    """F1 Helvetica, F2 Helvetica-Bold, F3 Courier."""


@dataclass
class Pdf:
    """Pages in, bytes out. Text is WinAnsi (Western European) only."""

    title: str = ""
    pages: list[list[Run]] = field(default_factory=list)
    images: set[int] = field(default_factory=set)
    """Indices of pages that carry a full-page picture."""
    outline: list[tuple[int, str, int]] = field(default_factory=list)
    """(level from 0, title, page index) in reading order."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """Page index -> PDF numbering dictionary body, for example {0: "/S /r", 2: "/S /D"}."""
    password: str = ""
    """Encrypts with 40-bit RC4 and this user password."""
    compress: bool = False

    def page(self, *lines: str, size: float = 11, leading: float = 14, image: bool = False) -> None:
        """Add a page of lines from the top."""
        top = HEIGHT - 72
        self.add(*(Run(72, top - i * leading, text, size) for i, text in enumerate(lines)))
        if image:
            self.images.add(len(self.pages) - 1)

    def add(self, *runs: Run) -> None:
        """Add a page of placed lines."""
        self.pages.append(list(runs))

    def build(self) -> bytes:
        """The file."""
        n = len(self.pages)
        first_page, first_content = 7, 7 + n
        image, first_mark = 7 + 2 * n, 8 + 2 * n
        kids = " ".join(f"{first_page + i} 0 R" for i in range(n))
        fonts = {3: "Helvetica", 4: "Helvetica-Bold", 5: "Courier"}
        objects: dict[int, bytes] = {
            1: self._catalog(first_mark),
            2: f"<< /Type /Pages /Count {n} /Kids [{kids}] >>".encode(),
            6: b"<< /Title " + _string(self.title) + b" >>",
            image: _stream(bytes(range(0, 256, 4)), "/Type /XObject /Subtype /Image /Width 8 "
                           "/Height 8 /ColorSpace /DeviceGray /BitsPerComponent 8"),
        }  # fmt: skip
        for number, name in fonts.items():
            objects[number] = (
                f"<< /Type /Font /Subtype /Type1 /BaseFont /{name} /Encoding /WinAnsiEncoding >>"
            ).encode()
        for i, runs in enumerate(self.pages):
            used = f"/XObject << /Im {image} 0 R >>" if i in self.images else ""
            objects[first_page + i] = (
                f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {WIDTH} {HEIGHT}] "
                f"/Contents {first_content + i} 0 R "
                f"/Resources << /Font << /F1 3 0 R /F2 4 0 R /F3 5 0 R >> {used} >> >>"
            ).encode()
            body = _content(runs, picture=i in self.images)
            if self.compress:
                objects[first_content + i] = _stream(zlib.compress(body), "/Filter /FlateDecode")
            else:
                objects[first_content + i] = _stream(body, "")
        objects.update(self._marks(first_mark, first_page))
        if not self.password:
            return raw_pdf(objects, trailer="/Info 6 0 R")
        return self._encrypted(objects)

    def _catalog(self, first_mark: int) -> bytes:
        extra = f" /Outlines {first_mark} 0 R" if self.outline else ""
        if self.labels:
            rows = " ".join(f"{i} << {body} >>" for i, body in sorted(self.labels.items()))
            extra += f" /PageLabels << /Nums [{rows}] >>"
        return f"<< /Type /Catalog /Pages 2 0 R{extra} >>".encode()

    def _marks(self, root: int, first_page: int) -> dict[int, bytes]:
        """The outline as objects root (the list) and root+1... (its entries)."""
        if not self.outline:
            return {}
        links: dict[int, dict[str, int]] = {root: {}}
        last_on_level: dict[int, int] = {-1: root}
        for i, (level, _, _) in enumerate(self.outline):
            me, parent = root + 1 + i, last_on_level[level - 1]
            links[me] = {"Parent": parent}
            if "Last" in links[parent]:
                before = links[parent]["Last"]
                links[before]["Next"], links[me]["Prev"] = me, before
            else:
                links[parent]["First"] = me
            links[parent]["Last"] = me
            last_on_level[level] = me
        out = {}
        for number, refs in links.items():
            body = " ".join(f"/{key} {ref} 0 R" for key, ref in refs.items()).encode()
            if number > root:
                _, title, page = self.outline[number - root - 1]
                body += b" /Title " + _string(title)
                body += f" /Dest [{first_page + page} 0 R /XYZ 0 {HEIGHT} 0]".encode()
            out[number] = b"<< " + body + b" >>"
        return out

    def _encrypted(self, objects: dict[int, bytes]) -> bytes:
        """Standard handler, revision 2: enough to ask for the password; streams only."""
        file_id = hashlib.md5(self.title.encode()).digest()
        padded = (self.password.encode("latin-1") + _PAD)[:32]
        owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
        rights = (0xFFFFFFFC).to_bytes(4, "little")
        key = hashlib.md5(padded + owner + rights + file_id).digest()[:5]
        number = max(objects) + 1
        objects[number] = (
            b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <" + owner.hex().encode()
            + b"> /U <" + _rc4(key, _PAD).hex().encode() + b"> >>"
        )  # fmt: skip
        trailer = f"/Encrypt {number} 0 R /ID [<{file_id.hex()}> <{file_id.hex()}>]"
        return raw_pdf(objects, trailer=trailer)


def raw_pdf(
    objects: Mapping[int, bytes], *, trailer: str = "", broken_xref: bool = False, tail: bytes = b""
) -> bytes:
    """Objects by number (1 is the catalog) as a file; `broken_xref`: every offset is wrong."""
    out = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    offsets = {}
    for number in sorted(objects):
        offsets[number] = len(out) + (7919 if broken_xref else 0)
        out += f"{number} 0 obj\n".encode() + objects[number] + b"\nendobj\n"
    start, size = len(out), max(objects) + 1
    out += f"xref\n0 {size}\n0000000000 65535 f \n".encode()
    for number in range(1, size):
        at = offsets.get(number)
        out += b"0000000000 65535 f \n" if at is None else f"{at:010d} 00000 n \n".encode()
    out += f"trailer\n<< /Size {size} /Root 1 0 R {trailer} >>\n".encode()
    out += f"startxref\n{start + (4321 if broken_xref else 0)}\n%%EOF\n".encode()
    return bytes(out + tail)


def bomb(megabytes: int) -> bytes:
    """A page whose 1/1000 sized stream unpacks to so many megabytes of text operators."""
    line = b"BT /F1 9 Tf 9 9 Td (boom boom boom) Tj ET\n"
    packer = zlib.compressobj(9)
    block = line * ((1 << 20) // len(line))
    body = b"".join([*(packer.compress(block) for _ in range(megabytes)), packer.flush()])
    return raw_pdf(
        {
            1: b"<< /Type /Catalog /Pages 2 0 R >>",
            2: b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
            3: b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 99 99] /Contents 4 0 R "
            b"/Resources << /Font << /F1 5 0 R >> >> >>",
            4: _stream(body, "/Filter /FlateDecode"),
            5: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        }
    )


def _content(runs: Sequence[Run], *, picture: bool) -> bytes:
    parts = [f"q {WIDTH} 0 0 {HEIGHT} 0 0 cm /Im Do Q".encode()] if picture else []
    for run in runs:
        head = f"BT /{run.font} {run.size:g} Tf {run.x:g} {run.y:g} Td ".encode()
        parts.append(head + _string(run.text) + b" Tj ET")
    return b"\n".join(parts)


def _string(text: str) -> bytes:
    """A literal string in WinAnsi; a title outside of it goes out as UTF-16."""
    try:
        data = text.encode("cp1252")
    except UnicodeEncodeError:
        return b"<" + ("\ufeff" + text).encode("utf-16-be").hex().encode() + b">"
    for char in (b"\\", b"(", b")"):
        data = data.replace(char, b"\\" + char)
    return b"(" + data + b")"


def _stream(data: bytes, entries: str) -> bytes:
    head = f"<< /Length {len(data)} {entries} >>\nstream\n".encode()
    return head + data + b"\nendstream"


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)
