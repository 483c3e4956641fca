"""The ladder of DESIGN: a room imports earlier rooms only, and never a stranger of the lower four."""
import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "linic"
ROOMS = ["errors", "kernels", "rangecoder", "container", "picture", "entropy",
         "models", "weights", "codec", "bench", "train", "app"]
STRANGERS = {"kernels", "rangecoder", "container", "picture"}


def rooms_imported_by(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                 else [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else [])
        found |= {n.split(".")[1] for n in names if n.startswith("linic.")}
    return found & set(ROOMS)


def room_of(path: Path) -> str:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "app" if room == "__main__" else room


def violations(room: str, used: set[str]) -> list[str]:
    later = [u for u in used if ROOMS.index(u) > ROOMS.index(room)]
    strange = [u for u in used if room in STRANGERS and u in STRANGERS and u != room]
    return later + strange


def test_every_module_is_in_a_room_and_imports_earlier_rooms_only():
    paths = [p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py"]
    assert len(paths) > 20
    for path in paths:
        assert room_of(path) in ROOMS, f"{path} is in no room"
        assert not violations(room_of(path), rooms_imported_by(path)), path


def test_the_check_sees_a_planted_violation(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from linic.codec import encode\nimport linic.container.parse\n")
    assert violations("kernels", rooms_imported_by(bad)) != []
    assert set(violations("picture", rooms_imported_by(bad))) == {"codec", "container"}
