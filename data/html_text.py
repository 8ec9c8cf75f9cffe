"""The text of a page of HTML, by the standard library's parser, which takes nearly any text for some page."""

import re
from html.parser import HTMLParser
from pathlib import Path

# What stands in these is no text of the page.
NO_TEXT = {"script", "style", "template", "noscript", "svg", "math", "select", "textarea", "iframe", "object"}
# A line ends before and behind these; a blank line stands before and behind those of the second row.
LINES = {"br", "hr", "li", "tr", "dt", "dd", "div", "section", "article", "header", "footer", "nav", "main", "aside"}
BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "pre", "blockquote", "figure", "title"}


class Page(HTMLParser):
    """Collects the text of a page in `parts`; a line break in them is one that a reader sees."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts = []
        self.hidden = []  # the open tags that are no text, one in the other
        self.preformatted = 0

    def handle_starttag(self, tag, attrs):
        if tag in NO_TEXT:
            self.hidden.append(tag)
        self.preformatted += tag == "pre"
        self.end_line(tag)
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_startendtag(self, tag, attrs):
        self.end_line(tag)  # of <br/>; there is nothing in it that could be hidden

    def handle_endtag(self, tag):
        if tag in self.hidden:
            while self.hidden.pop() != tag:
                pass
        self.preformatted -= tag == "pre" and self.preformatted > 0
        self.end_line(tag)

    def end_line(self, tag):
        if tag in BLOCKS:
            self.parts.append("\n\n")
        elif tag in LINES:
            self.parts.append("\n")

    def handle_data(self, data):
        if self.hidden:
            return
        if not self.preformatted:
            data = re.sub(r"[ \t\r\n\f]+", " ", data)
            if not self.parts or self.parts[-1].endswith((" ", "\n")):
                data = data.removeprefix(" ")
        if data:
            self.parts.append(data)


def text_of_html(page: str, where: str | Path) -> str:
    """Returns what a reader of the page sees, block by block; a page without any text is empty.

    <p>One <b>and</b> two.</p><pre>a  b</pre>  becomes "One and two.", a blank line, "a  b".
    """
    parser = Page()
    try:
        parser.feed(page)
        parser.close()
    except AssertionError as error:  # of <![x, which begins a part of a kind that the parser does not know
        raise ValueError(f"{where}: no HTML: {error}") from None
    text = "".join(parser.parts)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
