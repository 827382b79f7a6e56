"""Reports, and their pages as a browser reads them, in the small: elements with attributes, texts and children."""

from html.parser import HTMLParser

from dpq_rec import CodeLayout, open_artifact
from dpq_rec.report import num_report_steps, write_report
from tests.dpq_rec.builders import write_unchecked

LAYOUT = CodeLayout(num_subspaces=4, num_codes=20)  # of most tables that are reported on

_VOID = {"meta"}


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.parts = tag, dict(attributes), parent, []

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def has_class(self, name):
        return name in self.attributes.get("class", "").split()

    def find(self, tag=None, class_=None, **attributes):
        """Elements inside, in order."""
        found = []
        for part in self.parts:
            if isinstance(part, Element):
                fits = all(part.attributes.get(name) == value for name, value in attributes.items())
                if fits and tag in (None, part.tag) and (class_ is None or part.has_class(class_)):
                    found.append(part)
                found += part.find(tag, class_, **attributes)
        return found

    def one(self, *arguments, **attributes):
        (found,) = self.find(*arguments, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.root = self.at = Element("", {}, None)

    def handle_starttag(self, tag, attrs):
        element = Element(tag, attrs, self.at)
        self.at.parts.append(element)
        if tag not in _VOID:
            self.at = element

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"</{tag}> in <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.parts.append(data)


def read_page(path):
    """The root; every element must have been closed where it was opened."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.at is reader.root
    return reader.root


def report(tmp_path, contents, **config):
    """An artifact of one table `t`, or of several; the page on it; what was found of them."""
    path = tmp_path / "artifact"
    artifact = open_artifact(write_unchecked(path, contents if isinstance(contents, dict) else {"t": contents}))
    told = []
    reported = write_report(artifact, tmp_path / "out.html", **config, progress=told.append)
    assert sum(told) == num_report_steps(artifact)
    return artifact, read_page(tmp_path / "out.html"), reported


def table_of(page, name="t"):
    return page.one("section", id=name)


def rows_of(section):
    """Each shown row's name, cosine and codes."""
    rows = [line for line in section.find("tr") if line.find("td", "name")]
    return [(line.one("td", "name").text, *(cell.text for cell in line.find("td", "number"))) for line in rows]
