"""Documents: what is read is all there, what cannot be read is said, nothing hostile gets far."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pdfs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import documents
from mimo_local.documents import Limits, page_list, parse_pages, pdf, read
from mimo_local.documents.html import to_text
from mimo_local.documents.lines import Layout, mend_hyphens
from mimo_local.documents.text import clean, markdown_headings, paginate
from mimo_local.errors import CancelledError, DocumentError, MimoError, UsageError

PROSE = "The keeper climbs the stairs at dusk and lights the lamp for the ships."
CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"
LEAF = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 99 99] >>"


def small_pdf() -> pdfs.Pdf:
    made = pdfs.Pdf("T")
    made.page("First (with brackets) \\ ünïcödé", "its second line")
    made.page("Second page")
    made.page("Third page")
    return made


# ---- page ranges ---------------------------------------------------------------------------------


@given(st.sets(st.integers(1, 60), min_size=1))
def test_a_page_list_reads_back_as_the_same_pages(pages: set[int]) -> None:
    assert parse_pages(page_list(sorted(pages)), 60) == tuple(sorted(pages))


def test_ranges_may_be_open_and_overlap() -> None:
    assert parse_pages("8-", 10) == (8, 9, 10)
    assert parse_pages("-2,2-3, 9", 10) == (1, 2, 3, 9)


@pytest.mark.parametrize("spec", ["", "0", "11", "3-11", "5-3", "a", "1,,2", "-", "1-2-3", "1;2"])
def test_an_impossible_range_names_the_range_and_the_count(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pages(spec, 10, name="x.pdf")
    assert repr(spec) in str(caught.value)
    assert "1 to 10" in caught.value.hint


# ---- PDF -----------------------------------------------------------------------------------------


def test_pages_text_outline_and_labels_of_a_pdf(tmp_path: Path) -> None:
    made = small_pdf()
    made.outline = [(0, "One", 0), (1, "Second page", 1), (1, "Dünn – ☃", 2), (0, "End", 2)]
    made.labels = {0: "/S /r", 1: "/S /D /St 7"}
    path = tmp_path / "small.pdf"
    path.write_bytes(made.build())
    for source in (path, made.build()):
        found = read(source, name="small.pdf")
        assert [p.number for p in found.pages] == [1, 2, 3]
        assert [p.label for p in found.pages] == ["i", "7", "8"]
        assert found.pages[0].text == "First (with brackets) \\ ünïcödé\nits second line"
        assert [(e.level, e.title, e.page) for e in found.outline] == [
            (0, "One", 1),
            (1, "Second page", 2),
            (1, "Dünn – ☃", 3),
            (0, "End", 3),
        ]
        assert [h.title for h in found.pages[2].headings] == ["Dünn – ☃", "End"]
        assert (found.kind, found.unit, found.page_count) == ("pdf", "page", 3)
        assert not found.warnings and not found.unread


def test_a_compressed_pdf_reads_the_same_as_a_plain_one() -> None:
    plain, packed = small_pdf(), small_pdf()
    packed.compress = True
    assert read(plain.build()).text == read(packed.build()).text


def test_only_the_pages_asked_for_are_read() -> None:
    found = read(small_pdf().build(), pages="3,1")
    assert [p.number for p in found.pages] == [1, 3]
    assert found.page_count == 3
    with pytest.raises(UsageError, match="3 pages"):
        read(small_pdf().build(), pages="2-4")


def test_a_scanned_page_is_named_and_the_rest_is_read() -> None:
    made = small_pdf()
    made.page("17", image=True)
    made.page()
    found = read(made.build(), name="mixed.pdf")
    assert found.unread == (4,), "an empty sheet is not a scan"
    assert len(found.warnings) == 1 and "p. 4" in found.warnings[0] and "scan" in found.warnings[0]
    assert found.pages[0].text.startswith("First (with")


def test_a_fully_scanned_pdf_is_refused_with_a_word_on_ocr() -> None:
    made = pdfs.Pdf()
    made.page(image=True)
    made.page(image=True)
    with pytest.raises(DocumentError, match=r"p\. 1-2") as caught:
        read(made.build())
    assert "ocr" in caught.value.hint.lower()


def test_an_encrypted_pdf_asks_for_a_copy_without_password() -> None:
    made = small_pdf()
    made.password = "secret"
    with pytest.raises(DocumentError, match="password") as caught:
        read(made.build())
    assert "qpdf" in caught.value.hint


def test_a_broken_cross_reference_table_is_survived() -> None:
    data = small_pdf().build()
    start = data.rindex(b"startxref")
    assert read(data[:start] + b"startxref\n99999\n%%EOF\n").pages[2].text == "Third page"


def pages_object(count: int, kids: str = "3 0 R") -> dict[int, bytes]:
    body = f"<< /Type /Pages /Count {count} /Kids [{kids}] >>".encode()
    return {1: CATALOG, 2: body, 3: LEAF}


@pytest.mark.parametrize(
    "data",
    [
        b"%PDF-1.4\n" + b"\0\1\2 not a pdf at all" * 200,
        small_pdf().build()[:300],
        pdfs.raw_pdf(pages_object(2_000_000_000)),
        pdfs.raw_pdf(pages_object(-5)),
        pdfs.raw_pdf(pages_object(0, "")),
        pdfs.raw_pdf(pages_object(3, "2 0 R 2 0 R")),
        pdfs.raw_pdf({**pages_object(1), 3: b"[" * 200_000}),
        pdfs.raw_pdf({**pages_object(1), 3: b"<< /Type /Page /Parent 3 0 R /Contents 3 0 R >>"}),
    ],
    ids=["noise", "cut", "count", "negative", "empty", "cycle", "nested", "self"],
)
def test_a_hostile_pdf_is_one_clear_error_and_no_hang(data: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(DocumentError) as caught:
        read(data, name="evil.pdf", limits=Limits(seconds=10, page_seconds=5))
    assert "evil.pdf" in str(caught.value) and caught.value.hint
    assert time.monotonic() - started < 10


def test_a_page_count_over_the_limit_asks_for_a_range() -> None:
    with pytest.raises(DocumentError, match=r"4000 pages.*limit of 1000") as caught:
        read(pdfs.raw_pdf(pages_object(4000)), limits=Limits(pages=1000))
    assert "--pages" in caught.value.hint


def test_a_bomb_meets_the_memory_limit_of_the_worker_only() -> None:
    limits = Limits(memory_bytes=192 << 20, seconds=20, page_seconds=10)
    with pytest.raises(DocumentError, match=r"memory|crash"):
        read(pdfs.bomb(400), limits=limits)


def test_an_outline_that_bites_its_tail_ends() -> None:
    made = small_pdf()
    made.outline = [(0, "a", 0), (0, "b", 1)]
    data = made.build()
    loop = data.replace(b"/Prev", b"/Next")  # b's next entry is now a
    found = read(loop)
    assert {e.title for e in found.outline} == {"a", "b"}
    assert len(found.pages) == 3


def test_characters_over_the_limit_name_the_page() -> None:
    with pytest.raises(DocumentError, match=r"p\. 2") as caught:
        read(small_pdf().build(), limits=Limits(characters=50))
    assert "--pages 1-1" in caught.value.hint


def stub_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a worker in place that answers a header of 3 pages and then does what `body` says."""
    script = tmp_path / "worker.py"
    head = """
        import json, os, sys, time
        order = json.loads(sys.stdin.readline())
        def say(**f): print(json.dumps(f), flush=True)
        say(pages=3, outline=[])
        wanted = json.loads(sys.stdin.readline())
    """
    script.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    monkeypatch.setattr(pdf, "_WORKER", script)


def test_a_page_that_kills_the_worker_is_given_up_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_worker(
        tmp_path,
        monkeypatch,
        """
        for i in wanted:
            if i == 1:
                os.abort()
            say(index=i, text=f"text of page {i + 1}", label="")
        say(end=True)
        """,
    )
    found = read(small_pdf().build())
    assert [p.text for p in found.pages] == ["text of page 1", "", "text of page 3"]
    assert found.unread == (2,) and "crash" in found.warnings[0]


def test_a_page_that_hangs_is_given_up_after_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_worker(
        tmp_path,
        monkeypatch,
        """
        for i in wanted:
            if i == 0:
                time.sleep(60)
            say(index=i, text=f"text of page {i + 1}", label="")
        say(end=True)
        """,
    )
    found = read(small_pdf().build(), limits=Limits(page_seconds=0.5))
    assert found.unread == (1,) and "0.5 s" in found.warnings[0]


@pytest.mark.parametrize(
    "body",
    [
        "print('this is not JSON', flush=True)",
        "print('[1, 2]', flush=True)",
        "say(index=-4, text='x')",
        "say(index='a', text='x')",
        "sys.stdout.write('x' * 30_000_000); sys.stdout.flush(); time.sleep(60)",
        "os.abort()",
    ],
)
def test_a_worker_taken_over_by_a_file_cannot_hurt_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    stub_worker(tmp_path, monkeypatch, body)
    with pytest.raises(DocumentError):
        read(small_pdf().build(), limits=Limits(page_seconds=5))


def test_cancel_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_worker(tmp_path, monkeypatch, "time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(CancelledError):
        read(small_pdf().build(), cancel=lambda: time.monotonic() - started > 0.3)
    assert time.monotonic() - started < 5


# ---- lines to text -------------------------------------------------------------------------------


def page_with(header: str, footer: str, n: int) -> str:
    body = [f"{PROSE} Page body {n * 31} continues, line {k} of it." for k in range(6)]
    return "\n".join([header, *body, footer])


def test_running_headers_and_page_numbers_go_and_everything_else_stays() -> None:
    pages = [page_with("A Manual of Lights", f"Page {n} of 9", n) for n in range(1, 10)]
    layout = Layout(pages)
    text = "\n".join(layout.texts())
    assert "A Manual of Lights" not in text and "of 9" not in text
    for n in range(1, 10):
        assert text.count(f"Page body {n * 31} ") == 6
    assert set(layout.dropped) == {"A Manual of Lights", "Page 1 of 9"}


def test_headers_that_alternate_like_in_a_book_go() -> None:
    pages = [page_with(("Lights", "Chapter One")[n % 2], str(n), n) for n in range(1, 11)]
    text = "\n".join(Layout(pages).texts())
    assert "Chapter One" not in text and "Lights" not in text


def test_figures_at_the_foot_that_count_no_pages_stay() -> None:
    totals = [421, 17, 993, 56, 260, 778, 31, 5]
    pages = [page_with(f"Month {PROSE[n : n + 9]}", f"Total {t}", n) for n, t in enumerate(totals)]
    text = "\n".join(Layout(pages).texts())
    assert all(f"Total {t}" in text for t in totals)


def test_two_pages_are_too_few_to_call_a_line_repeated() -> None:
    pages = [page_with("A Manual of Lights", "1", n) for n in (1, 2)]
    assert "\n".join(Layout(pages).texts()).count("A Manual of Lights") == 2


def test_page_numbers_of_a_part_count_from_its_own_first_page() -> None:
    pages = [page_with("H " + PROSE[n : n + 5], f"- {n} -", n) for n in range(41, 47)]
    assert "- 43 -" not in "\n".join(Layout(pages, first_numbers=range(1, 7)).texts())


def test_a_cut_word_joins_where_the_joined_word_is_known() -> None:
    words = {"encoding", "well-known"}
    assert mend_hyphens("the DER en\ufffecoding of a well\x02known type", words) == (
        "the DER encoding of a well-known type"
    )
    assert mend_hyphens("\ufffe", set()) == ""


@given(st.text(alphabet="ab -\ufffe\x02\n", max_size=60))
def test_mending_loses_no_letter(text: str) -> None:
    letters = [c for c in text if c in "ab"]
    assert [c for c in mend_hyphens(text, {"ab"}) if c in "ab"] == letters


def test_paragraph_lines_join_and_lists_and_tables_do_not() -> None:
    wide = "x" * 30 + " " + "y" * 30
    text = Layout([f"{wide}\n{wide}\nshort end.\n- item one\n- item two\n1 22 333 4444"]).texts()[0]
    assert text.split("\n") == [
        f"{wide} {wide} short end.",
        "- item one",
        "- item two",
        "1 22 333 4444",
    ]


@given(st.lists(st.text(alphabet="abc 1.-\n", max_size=80), min_size=1, max_size=4))
def test_layout_of_few_pages_keeps_every_character_but_blanks(pages: list[str]) -> None:
    for before, after in zip(pages[:2], Layout(pages[:2]).texts(), strict=True):
        if "....." not in before.replace(" ", ""):
            assert "".join(after.split()) == "".join(before.split())


def test_long_hostile_lines_take_linear_time() -> None:
    started = time.monotonic()
    for line in (" " * 400_000 + "x", "a" * 400_000, ". " * 200_000, "1" * 400_000, "# " * 200_000):
        Layout([line, line, line]).texts()
        markdown_headings(line)
        clean(line)
        to_text(line)
    assert time.monotonic() - started < 5


# ---- text, Markdown, HTML ------------------------------------------------------------------------


def test_what_no_reader_sees_is_taken_out() -> None:
    hidden = "a\u200bb\u202ec\u00add\U000e0041e\x00f\ufefff"
    assert clean(hidden) == "abcdeff"
    assert clean("ﬁne\r\nand\rdandy  \n\n\n\nend\u00a0x") == "fine\nand\ndandy\n\nend x"


@given(st.text(max_size=200))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_in_every_announced_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße, 世界, naïve\n".encode(encoding))
    found = read(path)
    assert found.text == "Grüße, 世界, naïve" and not found.warnings


def test_western_text_is_read_with_a_warning() -> None:
    found = read("caf\xe9 \x93quoted\x94".encode("latin-1"), name="old.txt")
    assert found.text == "café “quoted”"
    assert "old.txt" in found.warnings[0] and "UTF-8" in found.warnings[0]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"PK\x03\x04rest", "DOCX"),
        (b"\x89PNG\r\n", "OCR"),
        (b"{\\rtf1 x}", "PDF"),
        (bytes(range(256)), "Markdown"),
        (b"", "stdin"),
        (b" \n\t\n", "stdin"),
        ("\ufeff".encode("utf-16-le") + b"\x00\xd8", "UTF-8"),
    ],
)
def test_bytes_of_other_kinds_are_refused_with_a_way_out(data: bytes, word: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read(data)
    assert word in caught.value.hint


def test_files_that_are_not_there_or_not_files(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no file"):
        read(tmp_path / "absent.pdf")
    with pytest.raises(DocumentError, match="folder"):
        read(tmp_path)
    (tmp_path / "x.pdf").write_text("I am text")
    with pytest.raises(DocumentError, match="does not begin like one"):
        read(tmp_path / "x.pdf")
    (tmp_path / "big.txt").write_bytes(b"x" * 5000)
    with pytest.raises(DocumentError, match=r"5000 bytes.*1000"):
        read(tmp_path / "big.txt", limits=Limits(file_bytes=1000))
    with pytest.raises(DocumentError):
        read("nul\0byte")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    feeder = subprocess.Popen(
        [sys.executable, "-c", f"open({str(pipe)!r}, 'w').write('# Piped\\n\\ntext')"]
    )
    assert read(pipe).kind == "markdown"
    assert feeder.wait() == 0


def test_markdown_sections_are_anchors() -> None:
    source = textwrap.dedent("""\
        # Title
        ## Sub

        Intro text.

        ## Two ##

        ```
        # not a heading
        ```

        Setext
        ------

        body
        """)
    found = read(source.encode(), name="a.md")
    assert found.kind == "markdown" and found.unit == "section"
    assert [p.text.split("\n")[0] for p in found.pages] == ["# Title", "## Two ##", "Setext"]
    assert [(e.level, e.title, e.page) for e in found.outline] == [
        (1, "Title", 1),
        (2, "Sub", 1),
        (2, "Two", 2),
        (2, "Setext", 3),
    ]
    for page in found.pages:
        for heading in page.headings:
            assert heading.title in page.text[heading.offset :].split("\n")[0]


@settings(max_examples=50)
@given(st.text(alphabet="ab#`-= \n.", max_size=300), st.booleans(), st.integers(1, 40))
def test_sections_hold_all_the_text_once(text: str, markdown: bool, repeat: int) -> None:
    text = clean("\n\n".join([text] * repeat * 9))
    pages, _ = paginate(text, markdown=markdown)
    assert "".join("".join(p.text.split()) for p in pages) == "".join(text.split())
    assert [p.number for p in pages] == list(range(1, len(pages) + 1))
    assert all(len(p.text) <= 6000 for p in pages if not markdown)


def test_form_feeds_are_pages() -> None:
    found = read(b"one\n\ftwo\n\fthree\n\f", name="out.txt")
    assert [p.text for p in found.pages] == ["one", "two", "three"] and found.unit == "page"


def test_html_keeps_what_shows_and_drops_what_does_not() -> None:
    page = b"""<!DOCTYPE html><html><head><title>T</title><style>p{}</style></head><body>
      <nav>Menu</nav><h1>Big  <em>title</em></h1><h2></h2><p>One<br>two &amp; three</p>
      <script>alert('hidden')</script><ul><li><p>item</p></li><li>next</li></ul>
      <table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
      <pre>x = 1
  y = 2</pre><img alt="a map"></body></html>"""
    found = read(page)
    assert found.kind == "html"
    assert found.text == (
        "Menu\n\n# Big title\n\nOne\ntwo & three\n\n- item\n\n- next\n\na | b\n1 | 2\n\n"
        "```\nx = 1\n  y = 2\n```\n\n[image: a map]"
    )
    assert found.outline[0].title == "Big title"


@given(
    st.lists(
        st.sampled_from(
            [
                "<p>",
                "</p>",
                "<li>",
                "<b>",
                "</b>",
                "<td>",
                "<h2>",
                "<pre>",
                "</pre>",
                "<div>",
                "</div>",
                "word",
                "two words ",
            ]
        ),
        max_size=30,
    )
)
def test_no_word_of_a_broken_page_is_lost(tokens: list[str]) -> None:
    shown = sum(t.count("word") for t in tokens)
    assert to_text("".join(tokens)).count("word") == shown


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ('<meta charset="iso-8859-1">', "cp1252"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=shift_jis">', "shift_jis"),
        ("", "utf-8"),
        ('<meta charset="utf-16">', "utf-8"),
        ('<meta charset="no-such-thing">', "utf-8"),
    ],
)
def test_html_charsets(head: str, encoding: str) -> None:
    word = "日本" if encoding == "shift_jis" else "“é”"
    found = read(f"<html><head>{head}</head><body>{word}</body></html>".encode(encoding))
    assert found.text == word and not found.warnings


def test_html_nested_deeply_is_read_in_time() -> None:
    started = time.monotonic()
    found = read(b"<html>" + b"<div>" * 20_000 + b"core" + b"</div>" * 20_000)
    assert "core" in found.text
    assert time.monotonic() - started < 10


@settings(max_examples=60)
@given(st.binary(max_size=400), st.sampled_from(["a.txt", "a.md", "a.html", "a.pdf", "stdin"]))
def test_any_bytes_give_a_document_or_our_error(data: bytes, name: str) -> None:
    if b"%PDF-" in data:
        return
    try:
        found = read(data, name=name)
    except MimoError as error:
        assert error.hint
    else:
        assert found.text.strip()


def test_reading_documents_loads_no_tensor_library() -> None:
    code = (
        "import sys, mimo_local.documents as d; d.read(b'<html>x'); d.read(b'# x'); "
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    root = Path(documents.__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert out.stdout.strip() == "[]", out.stderr


# ---- the example ---------------------------------------------------------------------------------

ROOT = Path(documents.__file__).parents[2]


def test_the_shipped_example_is_made_from_its_markdown() -> None:
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, 'bench'); import make_example_pdf as m; "
            "sys.stdout.buffer.write(m.build(open('examples/tour.md', encoding='utf-8').read()))",
        ],
        capture_output=True,
        cwd=ROOT,
        check=True,
    )
    made = ROOT / "examples" / "tour.pdf"
    assert out.stdout == made.read_bytes(), "run python bench/make_example_pdf.py"
    assert made.stat().st_size < 30_000


def test_every_word_of_the_example_survives_the_way_through_pdf() -> None:
    found = read(ROOT / "examples" / "tour.pdf")
    source = read(ROOT / "examples" / "tour.md")
    assert " ".join(found.text.split()) == " ".join(source.text.replace("#", "").split())
    assert [e.title for e in found.outline] == [e.title for e in source.outline]
    assert len(found.pages) >= 2 and not found.unread and not found.warnings


def test_the_whole_of_a_text_keeps_lines_and_indents_which_its_pages_do_not() -> None:
    program = "def f():\n" + "".join(f"    if {i}:\n\n\n        g()  \n" for i in range(500))
    for name in ("a.py", "a.md"):
        found = read(program.replace("\n", "\r\n").encode() + b"\xe2\x80\xae", name=name)
        assert found.whole == program.rstrip("\n")
        assert len(found.pages) > 1 and found.text != found.whole
    part = read(program.encode(), name="a.py", pages="2")
    assert part.whole == part.text and len(part.whole) < len(program) / 2
    page = read(b"<html><p>a</p><p>b</p></html>", name="a.html")
    assert page.whole == page.text
