"""A page of Markdown as one HTML file that needs no other."""

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1, h2 { line-height: 1.2 }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left;
         font-variant-numeric: tabular-nums }
img { max-width: 100% }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto }
"""


def html_page(markdown: str, folder: Path) -> str:
    """Returns the page, with its images inside.

    Args:
      markdown: begins with a title; raw HTML in it is shown as text.
      folder: what the paths of its PNG images are relative to.

    Raises:
      OSError: an image is not there.
    """
    title = markdown.splitlines()[0].removeprefix("# ")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r'(?<=<img src=")[^"]+\.png(?=")', lambda m: _data(folder / m[0]), body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def _data(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
