"""A mkdocs hook that makes the reference: one page a room of the package, one section a module, from the docstrings.

The pages are made from the files that exist, so a new module cannot be forgotten. Modules whose name begins with an
underscore, and those that say nothing about themselves, are left out.
"""

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parent.parent / "lightning_llm"


def rooms() -> dict[str, list[str]]:
    """Page name -> dotted names of its modules; what lies directly in the package has the page `lightning_llm`."""
    pages: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE)
        if file.stem.startswith("_") or not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))):
            continue
        page = inside.parts[0] if len(inside.parts) > 1 else PACKAGE.name
        pages.setdefault(page, []).append(".".join((PACKAGE.name, *inside.with_suffix("").parts)))
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the reference to the navigation."""
    assert config.nav is not None
    config.nav.append({"Reference": [{page: f"reference/{page}.md"} for page in rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages themselves."""
    for page, modules in rooms().items():
        sections = "\n\n".join(f"::: {module}\n    options:\n      heading_level: 2" for module in modules)
        files.append(File.generated(config, f"reference/{page}.md", content=f"# {page}\n\n{sections}\n"))
    return files
