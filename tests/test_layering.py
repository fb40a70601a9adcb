"""The architecture as rules on the source: layers, who may import what, size of files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "minillm_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")])
MAX_LINES = 320
MAX_FAMILY_LINES = 60

# Imports go down, or stay within a layer; those of PEERLESS do not even know their neighbours.
LAYERS = (
    {"types", "axes", "hosts", "rollcall", "stopping"},
    {"models", "objectives", "data"},
    {"rollout", "optim", "train_state", "sharding", "reporting"},
    {"methods", "evaluation"},
    {
        "pipeline", "comparison", "replay", "workdir", "bucket", "stages", "build", "assemble",
        "dataset", "recipe", "scratch", "check", "geometry", "trainer", "checkpoint", "record",
        "memory", "modelfiles", "named", "planning",
    },
    {"main", "compare", "plan", "generate", "export", "evaluate", "judge", "program"},
)  # fmt: skip
PEERLESS = LAYERS[1]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

VAGUE = {"utils", "util", "helpers", "misc", "base"}
NEVER = {"flax.nnx", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__"}
NEVER_TRUE = {"allow_pickle", "trust_remote_code"}
NEVER_FALSE = {"weights_only"}
SLOW = (
    "transformers",
    "torch",
    "huggingface_hub",
    "datasets",
    "openai",
)  # to import: only where used


def _modules(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, or may be: `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "flax":  # `import flax.struct` also brings flax.linen, by accident
                yield f"flax.{node.attr}"


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _layering(path: str, tree: ast.Module) -> Iterator[str]:
    parts = path.removesuffix(".py").split("/")
    if parts[0] != "minillm_jax" or parts[1] == "__init__":
        return
    if parts[1] not in LEVEL:
        yield f"{parts[1]} has no layer: add it to LAYERS"
        return
    for module in _modules(tree):
        if module.startswith("."):
            yield "relative import: write minillm_jax. ..."
        if not _within(module, "minillm_jax") or module == "minillm_jax":
            continue
        other = module.split(".")[1]
        if other in LEVEL and (
            LEVEL[other] > LEVEL[parts[1]] or (other != parts[1] and {other, parts[1]} <= PEERLESS)
        ):
            yield f"{parts[1]} imports {other}"


def _imports(path: str, tree: ast.Module) -> Iterator[str]:
    config_readers = (
        "configs/",
        "minillm_jax/build.py",
        "minillm_jax/compare.py",
        "minillm_jax/evaluate.py",
        "minillm_jax/main.py",
        "minillm_jax/plan.py",
    )
    allowed = {
        "flax.linen": ("minillm_jax/models/",),
        "ml_collections": config_readers,
        "transformers": ("minillm_jax/data/tokenizer.py",),
        "datasets": ("minillm_jax/data/hub.py",),
        "orbax": ("minillm_jax/checkpoint.py",),
        "torch": ("minillm_jax/models/torchfiles.py",),
        "huggingface_hub": ("minillm_jax/models/hub.py",),
        "openai": ("minillm_jax/evaluation/endpoint.py",),
    }
    modules = set(_modules(tree))
    for package in NEVER:
        if any(_within(module, package) for module in modules):
            yield f"imports {package}"
    for package, places in allowed.items():
        if any(_within(module, package) for module in modules) and not path.startswith(places):
            yield f"imports {package}, which only {' and '.join(places)} may"
    if path.startswith("minillm_jax/models/families/"):
        for module in modules:
            if module.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "chex"):
                yield f"a family is data: no {module}"


def _eager(path: str, tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):
            continue
        for package in SLOW:
            if any(_within(module, package) for module in _modules(node)):
                yield f"{package} takes seconds to import: do so where it is used"


def _calls(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in NEVER_CALLED:
            yield f"line {node.lineno} calls {node.func.id}"
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg in NEVER_TRUE and getattr(value, "value", True) is not False:
                yield f"line {node.lineno} passes {keyword.arg}"
            if keyword.arg in NEVER_FALSE and getattr(value, "value", False) is not True:
                yield f"line {node.lineno} passes {keyword.arg} other than True"
        if ast.unparse(node.func) == "torch.load":
            if "weights_only" not in {keyword.arg for keyword in node.keywords}:
                yield f"line {node.lineno} unpickles more than weights"


def _names(path: str, tree: ast.Module) -> Iterator[str]:
    for part in path.removesuffix(".py").split("/"):
        if part in VAGUE:
            yield f"the name {part} says nothing"


RULES = (_layering, _imports, _eager, _calls, _names)


def _complaints(path: str, source: str) -> list[str]:
    tree = ast.parse(source)
    found = {f"{path}: {complaint}" for rule in RULES for complaint in rule(path, tree)}
    lines = source.count("\n")
    if path.startswith("minillm_jax/models/families/") and not Path(path).name.startswith("_"):
        if lines > MAX_FAMILY_LINES:
            found.add(f"{path}: {lines} lines, more than {MAX_FAMILY_LINES} for a family")
    if path.startswith("minillm_jax/") and lines > MAX_LINES:
        found.add(f"{path}: {lines} lines, more than {MAX_LINES}: split it")
    return sorted(found)


def test_there_is_something_to_check():
    assert {"types.py", "decoder.py", "checkpoint.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source_keeps_the_rules(path):
    assert not _complaints(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("minillm_jax/types.py", "from minillm_jax.optim import adamw"),
        ("minillm_jax/models/hf.py", "from minillm_jax.data.sources import Row"),
        ("minillm_jax/objectives/policy.py", "import minillm_jax.models.decoder"),
        ("minillm_jax/trainer.py", "from minillm_jax import main"),
        ("minillm_jax/optim.py", "from .types import Params"),
        ("minillm_jax/stray.py", ""),
        ("minillm_jax/rollout/warp.py", "import flax.linen as nn"),
        ("minillm_jax/rollout/warp.py", "from flax import linen"),
        ("minillm_jax/rollout/warp.py", "import flax.struct\nm = flax.linen.Module"),
        ("minillm_jax/models/decoder.py", "from flax import nnx"),
        ("minillm_jax/models/hf.py", "def f():\n    import torch.nn"),
        ("minillm_jax/models/torchfiles.py", "import torch"),
        ("minillm_jax/models/torchfiles.py", "torch.load(path)"),
        ("minillm_jax/models/torchfiles.py", "torch.load(path, weights_only=safe)"),
        ("minillm_jax/models/fetch.py", "def f():\n    from huggingface_hub import errors"),
        ("minillm_jax/models/hub.py", "import huggingface_hub"),
        ("minillm_jax/judge.py", "def f():\n    import openai"),
        ("minillm_jax/evaluation/endpoint.py", "import openai"),
        ("minillm_jax/models/families/llama.py", "\n" * (MAX_FAMILY_LINES + 1)),
        ("minillm_jax/models/families/llama.py", "import jax.numpy as jnp"),
        ("minillm_jax/trainer.py", "import ml_collections"),
        ("minillm_jax/trainer.py", "from ml_collections.config_dict import ConfigDict"),
        ("minillm_jax/pipeline.py", "import orbax.checkpoint"),
        ("minillm_jax/build.py", "def f():\n    import transformers"),
        ("minillm_jax/data/tokenizer.py", "from transformers import AutoTokenizer"),
        ("minillm_jax/data/hub.py", "from datasets import load_dataset"),
        ("minillm_jax/data/sources.py", "def f():\n    import datasets"),
        ("minillm_jax/data/sources.py", "import pickle"),
        ("minillm_jax/data/sources.py", "rows = eval('1')"),
        ("configs/common.py", "exec('1')"),
        ("minillm_jax/models/hf.py", "np.load(path, allow_pickle=True)"),
        ("minillm_jax/data/tokenizer.py", "load(path, trust_remote_code=flag)"),
        ("minillm_jax/models/utils.py", ""),
        ("minillm_jax/models/decoder.py", "\n" * (MAX_LINES + 1)),
    ],
)
def test_rules_notice(path, source):
    assert len(_complaints(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("minillm_jax/train_state.py", "from minillm_jax.optim import adamw"),
        ("minillm_jax/models/decoder.py", "import flax.linen as nn\nimport flax.struct"),
        ("minillm_jax/main.py", "from minillm_jax import pipeline\nimport ml_collections"),
        ("minillm_jax/data/tokenizer.py", "def f():\n    import transformers"),
        ("minillm_jax/models/torchfiles.py", "def f():\n    import torch"),
        ("minillm_jax/models/torchfiles.py", "torch.load(path, weights_only=True)"),
        ("minillm_jax/models/families/_hf.py", "\n" * (MAX_FAMILY_LINES + 1)),
        ("minillm_jax/models/hf.py", "model.eval()\nnp.load(path, allow_pickle=False)"),
    ],
)
def test_rules_let_pass(path, source):
    assert not _complaints(path, source)
