"""For mkdocs: a link out of docs/ leads into the repository, of which the site has no copy; its text stays."""

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository become their text, with the path where the text does not have it."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(found: re.Match[str]) -> str:
        text, target = found.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))
        if "://" in target or target.startswith("#") or path.startswith("docs/"):
            return found[0]
        code = text if text.startswith("`") else f"`{text}`" if text == path else text
        return code if path in text else f"{code} (`{path}`)"

    return LINK.sub(replaced, markdown)
