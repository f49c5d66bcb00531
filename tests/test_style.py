"""Rules of style that a tool can check."""

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted(p for d in ("mmsae", "datamodules", "tests", "benchmarks", "docs") for p in (ROOT / d).rglob("*.py"))
PROSE = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("configs/**/*.yaml"),
    *ROOT.glob("notebooks/*.ipynb"),
]
LONGEST = 500  # lines, without a reason in the docstring
PARAMETERS = 12


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("args", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(args):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *args, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_long_file_says_why():
    """Its docstring has a sentence with "one file because"."""
    for path in CODE:
        text = path.read_text()
        if text.count("\n") > LONGEST:
            assert "one file because" in (ast.get_docstring(ast.parse(text)) or ""), name(path)


def functions(tree):
    """Functions with the number of their parameters; ``self`` and ``cls`` are none.

    Triton kernels are left out: they take pointers, strides and sizes one by one, and no structures of them.
    """
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if any(ast.unparse(d) == "triton.jit" for d in node.decorator_list):
                continue
            a = node.args
            own = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            yield node, len([x for x in own if x not in ("self", "cls")]) + bool(a.vararg) + bool(a.kwarg)


def test_no_function_has_many_parameters():
    for path in CODE:
        for node, n in functions(ast.parse(path.read_text())):
            assert n <= PARAMETERS, f"{name(path)}:{node.lineno} {node.name} has {n}"


def is_nothing(statement):
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def swallowed(tree):
    """Line numbers of exceptions that are caught whatever they are, or thrown away."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or all(map(is_nothing, node.body))):
            yield node.lineno


def unsafe(tree):
    """Line numbers of loading that may run code from a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) in (("weights_only", False), ("allow_pickle", True)):
                yield node.value.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            if node.attr in ("load", "loads", "Unpickler"):
                yield node.lineno


@pytest.mark.parametrize("body", ["pass", "...", "'reason'"])
def test_the_checker_finds_swallowed_exceptions(body):
    assert list(swallowed(ast.parse(f"try:\n  f()\nexcept ValueError:\n  {body}"))) == [3]
    assert list(swallowed(ast.parse("try:\n  f()\nexcept:\n  raise"))) == [3]
    assert not list(swallowed(ast.parse("try:\n  f()\nexcept ValueError as e:\n  yield e")))


@pytest.mark.parametrize(
    "code", ["torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)", "pickle.load(f)"]
)
def test_the_checker_finds_unsafe_loading(code):
    assert list(unsafe(ast.parse(code))) == [1]


def test_no_exception_is_swallowed():
    assert {name(p): lines for p in CODE if (lines := list(swallowed(ast.parse(p.read_text()))))} == {}


def test_public_methods_have_a_docstring():
    """Those that override a method have the docstring of that one."""
    for path in (p for p in CODE if p.relative_to(ROOT).parts[0] in ("mmsae", "datamodules")):
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for cls in vars(module).values():
            if not (inspect.isclass(cls) and cls.__module__ == module.__name__) or cls.__name__.startswith("_"):
                continue
            for method, value in vars(cls).items():
                value = getattr(value, "fget", getattr(value, "__func__", value))
                if inspect.isfunction(value) and value.__name__[0] not in "_<" and not value.__doc__:
                    assert any(method in vars(base) for base in cls.__mro__[1:]), f"{cls} {method} says nothing"


def test_nothing_is_unpickled():
    files = [p for p in CODE if p.relative_to(ROOT).parts[0] != "tests"]  # which pickle what they made themselves
    assert {name(p): lines for p in files if (lines := list(unsafe(ast.parse(p.read_text()))))} == {}


def test_no_stub_is_left():
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert {name(p) for p in CODE if p != Path(__file__) and marks.search(p.read_text())} == set()


def test_no_machine_is_named():
    """Documents, recipes and code hold no absolute path of the machine on which they were written."""
    path = re.compile(r"(?<![\w.}])/(?:home|root|Users|tmp|work|mnt|data)/[\w.-]")
    files = [*PROSE, *(p for p in CODE if p != Path(__file__))]
    found = {name(p): hits for p in files if (hits := [m[0] for m in path.finditer(p.read_text())])}
    assert found == {}


def warned(code):
    """Lines of ``warnings.warn`` in a program whose category is none of ours."""
    calls = (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call))
    warns = [c for c in calls if ast.unparse(c.func) in ("warnings.warn", "warn")]
    return [c.lineno for c in warns if len(c.args) < 2 or ast.unparse(c.args[1]) not in ("Warned", "OldName")]


def test_the_checker_finds_warnings_of_no_category():
    assert warned("warnings.warn('a')\nwarnings.warn('a', UserWarning)\nwarnings.warn('a', Warned, stacklevel=3)") == [
        1,
        2,
    ]


def test_warnings_are_told_as_ours():
    found = {
        str(p.relative_to(ROOT)): w for p in sorted((ROOT / "mmsae").rglob("*.py")) if (w := warned(p.read_text()))
    }
    assert not found
