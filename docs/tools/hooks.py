"""Hooks of mkdocs: add the generated pages, and let links to files of the repository lead there."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.pages import REPOSITORY, pages

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the reference."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn relative links that leave ``docs/`` into links to the repository, or into plain text without a URL."""
    url, docs = _.get("config", {}).get("repo_url"), REPOSITORY / "docs"

    def link(match: re.Match[str]) -> str:
        target = (docs / page.file.src_uri).parent.joinpath(match[2]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return match[0]
        name = target.relative_to(REPOSITORY).as_posix()
        return f"[{match[1]}]({url.rstrip('/')}/blob/main/{name})" if url else match[1]

    return LINK.sub(link, markdown)
