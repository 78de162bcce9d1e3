"""Draw docs/architecture.svg, the folders of the code and which way they import: `python scripts/draw_architecture.py`.

Read from the sources: every folder of kernels/ and paro_runtime/, and nodes/ as one. Imports for types alone are left
out, and so is an arrow that follows from others.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
SPLIT, WHOLE = ("kernels", "paro_runtime"), ("nodes",)
COLOURS = {"kernels": "#f0e442", "paro_runtime": "#9ad0f5", "nodes": "#d4d4d8"}
WIDTH, BOX, HEIGHT, ROW, EDGE = 860, 190, 34, 74, 20  # pixels


def folder_of(parts: tuple[str, ...]) -> str | None:
    """The box that a module lies in, of the parts of a dotted name from the root; None for one outside the picture."""
    if parts[:1] and parts[0] in WHOLE:
        return parts[0]
    return (
        "/".join(parts[:2]) if len(parts) > 1 and parts[0] in SPLIT and (ROOT / parts[0] / parts[1]).is_dir() else None
    )


def imported(path: Path) -> set[tuple[str, ...]]:
    """Dotted names, as parts from the root, that a file imports from the checkout, inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    here = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            found |= {(*filter(None, base), name.name) for name in node.names}
    return found


def imports() -> dict[str, set[str]]:
    """Folder -> folders that it imports."""
    found: dict[str, set[str]] = {}
    for top in (*SPLIT, *WHOLE):
        for path in sorted((ROOT / top).rglob("*.py")):
            folder = folder_of(path.relative_to(ROOT).parts)
            if folder is not None:
                targets = {folder_of(name) for name in imported(path)}
                found.setdefault(folder, set()).update(targets - {folder, None})
    return found


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that `start` imports, by way of others too."""
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        folder = todo.pop()
        if folder not in seen:
            seen.add(folder)
            todo += graph[folder]
    return seen


def without_shortcuts(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others."""
    return {
        folder: {one for one in targets if not any(one in reach(graph, other) for other in targets - {one})}
        for folder, targets in graph.items()
    }


def rows_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Folders by how many others stand above them at most, top first. Raises ValueError for a circle."""
    for folder in graph:
        if folder in reach(graph, folder):
            raise ValueError(f"{folder} imports itself by way of others")

    def depth(folder: str) -> int:
        return max((1 + depth(other) for other, targets in graph.items() if folder in targets), default=0)

    rows: list[list[str]] = [[] for _ in range(1 + max(map(depth, graph)))]
    for folder in sorted(graph):
        rows[depth(folder)].append(folder)
    return rows


def picture(graph: dict[str, set[str]]) -> str:
    """The SVG: boxes in rows, kernels/ on the left, arrows from a folder to those it imports."""
    rows = rows_of(graph)
    corners = {}
    half = WIDTH // 2
    for number, row in enumerate(rows):
        ours = [folder for folder in row if folder.startswith("kernels")]
        for left, side in ((0, ours), (half, [folder for folder in row if folder not in ours])):
            for place, folder in enumerate(side):
                middle = left + (2 * place + 1) * half // (2 * len(side))
                corners[folder] = (middle - BOX // 2, EDGE + number * ROW)
    height = 2 * EDGE + (len(rows) - 1) * ROW + HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>Folders of the code; an arrow leads from a folder to one that it imports</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#71717a"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for folder, targets in sorted(without_shortcuts(graph).items()):
        x, y = corners[folder]
        for target in sorted(targets):
            to_x, to_y = corners[target]
            start, end, middle = (x + BOX // 2, y + HEIGHT), (to_x + BOX // 2, to_y), (y + HEIGHT + to_y) // 2
            curve = f"M{start[0]} {start[1]} C{start[0]} {middle} {end[0]} {middle} {end[0]} {end[1]}"
            lines.append(f'<path d="{curve}" fill="none" stroke="#71717a" stroke-width="1.5" marker-end="url(#tip)"/>')
    for folder, (x, y) in sorted(corners.items()):
        colour = COLOURS[folder.split("/")[0]]
        lines.append(f'<rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{colour}" stroke="#18181b"/>')
        lines.append(
            f'<text x="{x + BOX // 2}" y="{y + 22}" font-size="14" text-anchor="middle" fill="#18181b">{folder}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    PICTURE.write_text(picture(imports()), encoding="utf-8")


if __name__ == "__main__":
    main()
