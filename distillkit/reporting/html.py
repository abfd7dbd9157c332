"""A report as one HTML file that loads nothing: its style and pictures are in it, and follow the reader's theme."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distillkit.reporting.colours import css_variables, paint
from distillkit.reporting.document import Picture, Report


def html(report: Report) -> str:
    """The page. Everything out of the files is escaped; the pictures are ours."""
    environment = Environment(
        loader=PackageLoader("distillkit.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    return template.render(
        report=report,
        light=Markup(css_variables("light")),
        dark=Markup(css_variables("dark")),
        svg=_svg,
    )


def _svg(picture: Picture) -> Markup:
    return Markup(paint(picture.svg, "page"))
