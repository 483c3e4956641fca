"""What a user asks of the integer path: verify a file, see a program, install a model, let the doctor try it."""
import json
import shutil
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from linic import weights
from linic.app.cli import main
from linic.app.cli.doctor import exact

GOLDEN = Path(__file__).parents[1] / "golden"
TINY, FILE = GOLDEN / "tiny.safetensors", GOLDEN / "70x50-q50.linic"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("LINIC_MODELS", raising=False)
    return tmp_path


def test_a_file_whose_model_is_not_installed_says_how_to_get_it_and_works_once_it_is(home, capsys):
    assert main(["info", str(FILE), "--verify"]) == 4
    assert "linic models add" in capsys.readouterr().err
    assert main(["models", "add", str(TINY)]) == 0
    path, name, digest = capsys.readouterr().out.split()
    assert name == "tiny" and digest in path and Path(path).parent == home / "data" / "linic" / "models"
    assert main(["info", str(FILE), "--verify", "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)["verified"]
    assert verified["latents"] == json.loads((GOLDEN / "latents.json").read_text())["70x50-q50"]
    assert main(["decode", str(FILE), str(home / "out.png")]) == 0
    assert main(["models"]) == 0 and "tiny" in capsys.readouterr().out


def test_a_model_comes_over_http_and_a_damaged_one_is_refused_and_leaves_nothing(home, capsys):
    served = home / "served"
    served.mkdir()
    shutil.copy(TINY, served / "good.safetensors")
    damaged = bytearray(TINY.read_bytes())
    damaged[-5] ^= 1
    (served / "bad.safetensors").write_bytes(damaged)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        assert main(["models", "add", f"{where}/bad.safetensors"]) == 3
        assert f"{where}/bad.safetensors" in capsys.readouterr().err
        assert main(["models", "add", f"{where}/none.safetensors"]) == 2
        assert list((home / "data/linic/models").iterdir()) == []
        assert main(["models", "add", f"{where}/good.safetensors"]) == 0
        server.shutdown()
    assert weights.find("tiny").parent == home / "data" / "linic" / "models"


def test_a_damaged_payload_does_not_verify(home, tmp_path, capsys):
    main(["models", "add", str(TINY)])
    data = bytearray((GOLDEN / "70x50-q50-compact.linic").read_bytes())
    data[60] ^= 4
    (tmp_path / "bad.linic").write_bytes(data)
    assert main(["info", str(tmp_path / "bad.linic"), "--verify", "--model", "tiny"]) in (3, 5)
    assert "byte " in capsys.readouterr().err


def test_show_prints_every_line_of_the_program(home, capsys):
    assert main(["models", "show", str(TINY)]) == 0
    text = capsys.readouterr().out
    program = weights.load_program(TINY)[0]
    assert len(text.splitlines()) == len(program.ops) + 1
    assert "biwkv(" in text and "code(" in text
    assert main(["models", "show", str(TINY), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["program"] == program.lines()
    assert main(["models", "show"]) == 2 and "which model" in capsys.readouterr().err


def test_the_doctor_finds_the_known_answer_on_every_carrier():
    found = exact(str(TINY))
    assert found["numpy"] == found["cpu f64"] == found["cpu i64"] == found["cpu int8"] == "equal"
    assert "passed its self-test" in found["cpu runs"]
