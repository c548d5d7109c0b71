"""Documents that run: the README's Python blocks and every docstring example of the package.

A block of the README stands alone. Where a line of it prints and ends in a comment, that is what it prints.
"""

import doctest
import importlib
import pathlib
import re
import runpy
import textwrap

import kit
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PRINTED = re.compile(r"^\s*print\(.*\)\s+# (.*)$", re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")

BLOCKS = _BLOCK.findall(README)
MODULES = kit.modules()


def run_block(block, folder):
    """Run a block as a program of its own, from a file so that kernels find their source."""
    program = folder / "block.py"
    program.write_text(block)
    runpy.run_path(str(program), run_name="__main__")


def test_the_readme_has_code():
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=range(1, len(BLOCKS) + 1))
def test_a_readme_block_prints_what_its_comments_say(block, tmp_path, capsys):
    run_block(block, tmp_path)
    printed = capsys.readouterr().out.split("\n")[:-1]
    assert printed == _PRINTED.findall(block)


def test_a_wrong_comment_is_found(tmp_path, capsys):
    block = textwrap.dedent(
        """
        for _ in range(1):
            print(1 + 1)  # 3
        """
    )
    run_block(block, tmp_path)
    assert capsys.readouterr().out.split("\n")[:-1] == ["2"]
    assert _PRINTED.findall(block) == ["3"]


def test_links_of_the_readme_lead_somewhere():
    targets = _LINK.findall(_FENCED.sub("", README))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("name", ["numbabuf", *MODULES])
def test_docstring_examples(name):
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.REPORT_ONLY_FIRST_FAILURE
    failed, _ = doctest.testmod(module, optionflags=flags)
    assert failed == 0, "the report is in the captured output"


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name))]
    assert any(test.examples for test in found)
