"""Generated text in a page: what stands between ``<!-- NAME:start -->`` and ``<!-- NAME:end -->``."""


def between(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the markers of ``name``. Raises ValueError where they are missing."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, opened, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"the page needs the lines {start} and {end}, in this order")
    return f"{before}{start}\n{text}\n{end}{after}"
