"""A page as a browser reads it, in the small: elements with their attributes, texts and children."""

from html.parser import HTMLParser

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
