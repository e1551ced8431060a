"""Reads a report's page of HTML for tests: its text, tables and links, and what is not well-formed."""

import html.parser


class Page(html.parser.HTMLParser):
    """Collects tables, texts, sources and links of a page; tags left open stay in `open`.

    Attributes:
        tables: rows of cells' texts, headings first, in the order of the page.
        sources: of pictures.
        links: targets of links.
        ids: of headings.
    """

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    @property
    def cells(self) -> list[str]:
        """All cells of all tables."""
        return [cell for table in self.tables for row in table for cell in row]

    def table(self, *columns: str) -> list[list[str]]:
        """Rows of the table that begins with these columns."""
        return next(table[1:] for table in self.tables if table[0][:len(columns)] == list(columns))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.sources += [values["src"]] if "src" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.ids += [values["id"]] if "id" in values else []
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
