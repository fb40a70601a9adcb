"""What no file of the project does, by its syntax; and which versions it may be installed with.

`test_layering` has the rules on pickles, `eval`, `exec` and remote code, with where torch's
weights-only loader may be; here they are seen to cover every file, and the rest is added.
"""

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for top in ("minillm_jax", "configs", "benchmarks") for path in (ROOT / top).rglob("*.py")
)
UNSAFE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "marshal.loads",
    "pickle.load", "pickle.loads", "np.load", "numpy.load", "torch.load", "shelve.open",
    "tarfile.open", "zipfile.ZipFile.extractall", "importlib.import_module", "subprocess.getoutput",
    "runpy.run_path", "runpy.run_module",
}  # fmt: skip
SAFE_WITH = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
ALLOWED = {("minillm_jax/program.py", "runpy.run_path")}  # the file that the user gave as --config


def complaints(path: str, source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names]
            wrong = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"} & set(names)
            found += [f"imports {name}" for name in wrong]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        name, value = SAFE_WITH.get(called, ("", None))
        safe = name and words.get(name) is value
        if called in UNSAFE and not safe and (path, called) not in ALLOWED:
            found.append(f"calls {called}")
        if words.get("shell") or "shell" in words and words["shell"] is None:
            found.append("runs a shell")
        if "trust_remote_code" in words and words["trust_remote_code"] is not False:
            found.append("runs remote code")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_runs_what_it_reads(path):
    name = path.relative_to(ROOT).as_posix()
    assert not complaints(name, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from marshal import loads", "eval('1')", "exec('1')", "os.system('ls')",
        "np.load(f)", "np.load(f, allow_pickle=True)", "torch.load(f)", "runpy.run_path(f)",
        "torch.load(f, weights_only=False)", "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)", "load(p, trust_remote_code=flag)",
    ],
)  # fmt: skip
def test_the_rules_notice(source):
    assert len(complaints("minillm_jax/x.py", source)) == 1


def requirements() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    found = [re.match(r"([\w-]+)(?:\[\w+\])?(.*)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def test_every_dependency_has_a_floor_and_a_ceiling_around_what_is_installed():
    for name, bounds in requirements().items():
        match = re.fullmatch(r">=([\d.]+),<([\d.]+)", bounds)
        assert match, f"{name}{bounds}: write >=FLOOR,<CEILING"
        assert number(match[1]) <= number(metadata.version(name)) < number(match[2]), name
