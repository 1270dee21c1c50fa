"""Hooks of the documentation site (mkdocs.yml): pages that lie outside `docs`, the reference, and links.

The pages of the repository are written for readers of the repository, who follow a link to a file wherever it lies. On
the site, links to pages go to pages of the site. The name of another file, such as a module, stays as text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# Pages of the repository outside `docs`, by their name on the site.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
}
# The pages of the reference: their titles and the modules on them. Of a package, the names in `__all__` are shown.
REFERENCE = {
    "vr_jax": ("vr_jax",),
    "The model": ("vr_jax.model.vlm", "vr_jax.model.config", "vr_jax.model.batch", "vr_jax.model.spec"),
    "Methods": ("vr_jax.model.registry", "vr_jax.model.decoders.stages", "vr_jax.model.refusion.context"),
    "Vision Remember": ("vr_jax.model.refusion.vision_remember", "vr_jax.model.refusion.interactions"),
    "Settings": ("vr_jax.settings",),
    "Data": ("vr_jax.data", "vr_jax.data.pipeline", "vr_jax.data.finite"),
    "Model directories": ("vr_jax.model_directory",),
    "Training": ("vr_jax.training",),
    "Inference": ("vr_jax.inference",),
    "Evaluation": ("vr_jax.evaluation",),
    "Conversion": ("vr_jax.convert",),
    "Planning": ("vr_jax.plan",),
    "The probe": ("vr_jax.probe",),
    "Efficiency": ("vr_jax.efficiency",),
    "Experiments": ("vr_jax.experiments",),
    "Comparison on pages": ("vr_jax.demo",),
    "Kernels": (
        "vr_jax.kernels.attention.api",
        "vr_jax.kernels.window_attention.api",
        "vr_jax.kernels.cross_entropy.api",
    ),
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*([^)\s]+)\s*\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside `docs` and those of the reference."""
    from mkdocs.structure.files import File

    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for title, modules in REFERENCE.items():
        files.append(File.generated(config, _reference_page(title), content=_reference(title, modules)))
    files.append(File.generated(config, "reference/index.md", content=_overview()))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the reference into the navigation."""
    for section in config.nav or []:
        for pages in section.values():
            if "reference/index.md" in pages and isinstance(pages, list):
                pages += [{title: _reference_page(title)} for title in REFERENCE]
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of a page into links of the site."""
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def turned(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z][a-z+.-]*:", target) or not path:
            return found.group(0)
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        there = _page_of(file)
        if there is None or files.get_file_from_path(there) is None:
            return text if (ROOT / file).exists() else found.group(0)  # mkdocs warns of a link to nothing
        relative = posixpath.relpath(there, posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({relative}{hash_}{anchor})"

    return "".join(part if part.startswith("```") else LINK.sub(turned, part) for part in _parts(markdown))


def _parts(markdown: str) -> Iterator[str]:
    """The text between fenced code blocks, and the blocks."""
    end = 0
    for block in FENCE.finditer(markdown):
        yield markdown[end : block.start()]
        yield block.group(0)
        end = block.end()
    yield markdown[end:]


def _page_of(path: str) -> str | None:
    """The name on the site of a file of the repository, or None if it is not on the site."""
    for name, source in OUTSIDE.items():
        if path == source:
            return name
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def _reference_page(title: str) -> str:
    return f"reference/{title.lower().replace(' ', '_')}.md"


def _reference(title: str, modules: tuple[str, ...]) -> str:
    if modules == (title,):
        return f"# {title}\n\n::: {title}\n"
    return "\n".join(
        [f"# {title}", *(f"\n## `{name}`\n\n::: {name}\n    options:\n      heading_level: 3" for name in modules)]
    )


def _overview() -> str:
    lines = [
        "# Reference",
        "",
        "The public names of the packages, with what their docstrings say. The commands describe themselves: "
        "`vr-jax --help` lists them, and `vr-jax COMMAND --help` lists the flags of one. A config file shows every "
        "setting of a run; [Settings](settings.md) says what each means.",
        "",
        "| page | modules |",
        "|---|---|",
    ]
    for title, modules in REFERENCE.items():
        lines.append(
            f"| [{title}]({posixpath.basename(_reference_page(title))}) | {', '.join(f'`{m}`' for m in modules)} |"
        )
    return "\n".join(lines) + "\n"
