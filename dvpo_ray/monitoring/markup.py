"""Text into HTML, safely."""

from __future__ import annotations

import html

_CONTROL = {code: "\ufffd" for code in [*range(0x20), 0x7F] if chr(code) not in "\n\t"}


def escape(text: object) -> str:
    """Text that shows as itself inside an element or a quoted attribute.

    Characters that HTML cannot hold, control characters and lone surrogates, become U+FFFD.
    """
    return html.escape(str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_CONTROL))


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element. `class_` gives `class`; attributes are escaped, children are HTML already."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{written}>{''.join(children)}</{name}>"
