"""HTML is written by jinja2 templates alone, with every text that a person or a model wrote escaped."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent.parent), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def render_template(template: str, **values: Any) -> Markup:
    """A template, by its path inside `tinydpo/`, filled in; what it returns is HTML and is not escaped again."""
    return Markup(_TEMPLATES.get_template(template).render(values))
