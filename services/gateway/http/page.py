"""The OpenAPI document as a page for browsers. The framework's own pages load scripts, fonts and
icons from other hosts: they stay blank without internet, and reveal each reader to those hosts."""

import re
from html import escape
from typing import Any

import msgspec
from litestar import Request
from litestar.openapi.plugins import OpenAPIRenderPlugin

# The icon is empty, so that browsers do not request one.
HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
body { font-family: sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
td { padding: 0.3em 1em 0.3em 0; vertical-align: top }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto }
</style>
"""
REFERENCE = re.compile(r'"(#/[^"]+)"')
CODE = re.compile("`([^`]+)`")


class DocumentPage(OpenAPIRenderPlugin):
    """A table of all routes; below it each route and each schema, as in the document."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        document = msgspec.json.decode(self.render_json(request, openapi_schema))
        name = escape(f"{document['info']['title']} {document['info']['version']}")
        json_path = escape(self.get_openapi_json_route(request))
        operations = {
            f"{method.upper()} {path}": operation
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        }
        lines = [
            f"{HEAD}<title>{name}</title>",
            f"<h1>{name}</h1>",
            f'<p>All routes of this gateway, also as <a href="{json_path}">{json_path}</a>',
            "<table>",
            *(_row(title, operation) for title, operation in operations.items()),
            "</table>",
            "<h2>Routes</h2>",
            *(_section(one["operationId"], title, one) for title, one in operations.items()),
            "<h2>Schemas</h2>",
            # With these ids, the references in the document are links.
            *(
                _section(f"/components/schemas/{title}", title, schema)
                for title, schema in document["components"]["schemas"].items()
            ),
        ]
        return "\n".join(lines).encode()


def _row(title: str, operation: dict[str, Any]) -> str:
    link = f'<a href="#{escape(operation["operationId"])}"><code>{escape(title)}</code></a>'
    first_paragraph = operation["description"].partition("\n\n")[0]
    return f"<tr><td>{link}<td>" + CODE.sub(r"<code>\1</code>", escape(first_paragraph))


def _section(anchor: str, title: str, part: dict[str, Any]) -> str:
    text = msgspec.json.format(msgspec.json.encode(part), indent=2).decode()
    text = REFERENCE.sub(r'"<a href="\1">\1</a>"', escape(text, quote=False))
    return f'<h3 id="{escape(anchor)}">{escape(title)}</h3>\n<pre>{text}</pre>'
