"""What holds for the bundle as a whole: its layout, its sections, and that its documents point at what exists."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = sorted(ROOT.glob("stage*.py"))
SECTIONS = ["Config", "Data", "Model", "Training", "Experiments", "Pictures", "Command line"]


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git repository")
    return done.stdout.splitlines()


def test_nothing_else_lies_at_the_top_level():
    allowed = {"README.md", "requirements.txt", "metrics.py", "LEARNING_LOG.md", "figures", "tests", "data", ".ci"}
    allowed |= {".gitignore", ".ruff.toml", "stage1_mlp.py", "stage2_rnn.py", "stage3_attention.py"}
    assert {path.split("/")[0] for path in tracked()} <= allowed


def test_the_eight_archives_are_committed_and_nothing_unpacked_is():
    data = [path for path in tracked() if path.startswith("data/") and path != "data/README.md"]
    assert len(data) == 8
    assert all(path.endswith("-ubyte.gz") for path in data)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_has_the_sections_in_their_order(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)).startswith(f"Stage {path.stem[5]}: ")
    banners = re.findall(r"^# -{8} (\d)\. (.+?) -+$", text, re.MULTILINE)
    assert banners == [(str(number), name) for number, name in enumerate(SECTIONS, 2)]
    assert 400 <= len(text.splitlines()) <= 600


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_imports_metrics_and_no_other_stage(path):
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert "metrics" in names
    assert not any(name.startswith("stage") for name in names)


@pytest.mark.parametrize("document", ["README.md", *(f"figures/{path.stem[:6]}/summary.md" for path in STAGES)])
def test_every_link_of_a_document_leads_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        assert ((ROOT / document).parent / link).exists(), link
