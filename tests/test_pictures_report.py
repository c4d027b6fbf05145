"""Reports about pictures: one file that needs no other, in which no text becomes markup."""

import base64
import importlib.util
import io
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from llama_adapter.errors import DataError

# By its path: recipes/evidence has a module of the same name.
_SPEC = importlib.util.spec_from_file_location(
    "pictures_report", Path(__file__).parents[1] / "recipes" / "pictures" / "report.py"
)
report = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = report
_SPEC.loader.exec_module(report)

EVIL = '<script>alert("1")</script> & <img src=x onerror=y>'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text of each table cell."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "not every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


def row(picture=None, **changes):
    values = {
        "picture": picture or Image.new("RGB", (6, 4), (200, 10, 10)),
        "question": "Which colour?",
        "options": ("red", "blue"),
        "answer": 0,
        "base": "Thank you for your message.",
        "adapter": "The answer is (A).",
        "blind": "The answer is (B).",
    }
    return report.Row(**{**values, **changes})


def written(tmp_path, rows, **options):
    path = tmp_path / "new" / "report.html"
    report.write_report(rows, path, **options)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_cells_say_what_was_asked_and_answered(tmp_path):
    _, page = written(tmp_path, [row(), row(answer=1, base="B")])
    assert page.cells[:6] == [
        "",
        "Which colour?(A) red(B) blue",
        "(A) red",
        "✗ Thank you for your message.",
        "✓ The answer is (A).",
        "✗ The answer is (B).",
    ]
    assert page.cells[8:] == ["(B) blue", "✓ B", "✗ The answer is (A).", "✓ The answer is (B)."]


def test_an_answer_in_words_counts(tmp_path):
    _, page = written(tmp_path, [row(adapter="Red.", blind="blue")])
    assert page.cells[4:6] == ["✓ Red.", "✗ blue"]


def test_no_text_becomes_markup(tmp_path):
    plain, before = written(tmp_path, [row()])
    fields = {"question": EVIL, "options": (f"{EVIL}!", "b"), "base": EVIL, "adapter": EVIL, "blind": EVIL}
    text, page = written(tmp_path, [row(**fields)], title=EVIL)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in before.tags]
    assert "<script" not in text
    assert page.cells[1] == f"{EVIL}(A) {EVIL}!(B) b"
    assert page.cells[3:] == [f"✗ {EVIL}"] * 3
    assert "Right answers to 1 question: Base 0, Adapter 1, Without the picture 0." in plain


def test_the_file_needs_no_other(tmp_path):
    file = tmp_path / "p.png"
    Image.new("RGB", (6, 4), (1, 2, 3)).save(file)
    pictures = [Image.new("RGB", (6, 4), (1, 2, 3)), file, str(file), file.read_bytes()]
    text, page = written(tmp_path, [row(picture) for picture in pictures])
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 4
    for source in sources:
        head, _, content = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as found:
            assert (found.format, found.size, found.getpixel((0, 0))) == ("PNG", (6, 4), (1, 2, 3))
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {"lang", "charset", "name", "content", "alt", "src", "class"}
    assert "http" not in text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})


def test_large_pictures_are_reduced(tmp_path):
    _, page = written(tmp_path, [row(Image.effect_noise((1200, 600), 90))])
    source = next(attributes["src"] for tag, attributes in page.tags if tag == "img")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as found:
        assert found.size == (256, 128)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The answer is (B).", True),
        ("The answer is B.", True),
        ("B", True),
        ("(B) blue", True),
        ("A", False),
        ("The answer is (A).", False),
        ("blue", True),
        ("red.", False),
        ("", False),
    ],
)
def test_answers_are_right_by_letter_or_words(text, right):
    assert row(answer=1, base=text).is_right("base") is right


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 4), (5, 4)])
def test_a_sheet_has_a_place_for_every_row(tmp_path, count, columns):
    path = tmp_path / "new" / "sheet.png"
    rows = [row(Image.new("RGB", (8, 8), (0, 200, 0)), question="Costs $5 or $6? " * 5)] * count
    report.write_sheet(rows, path)
    with Image.open(path) as sheet:
        assert (sheet.format, sheet.width) == ("PNG", 320 * columns)
        pixels = sheet.convert("RGB")
        line = [[pixels.getpixel((x, y)) == (0, 200, 0) for x in range(0, sheet.width, 4)] for y in range(sheet.height)]
    # Green runs across the widest line of each row of pictures: as many as pictures stand side by side.
    runs = [sum(now and not before for before, now in zip([False, *places], places, strict=False)) for places in line]
    assert max(runs) == min(count, columns)
    starts = sum(bool(now) and not before for before, now in zip([0, *runs], runs, strict=False))
    assert starts == -(-count // columns)


def test_nothing_to_report_is_said(tmp_path):
    for write in (report.write_report, report.write_sheet):
        with pytest.raises(DataError, match="nothing to report"):
            write([], tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
