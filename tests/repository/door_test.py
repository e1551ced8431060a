"""Nothing above the networks knows a family: what is asked of one goes through `models.network`."""

import ast
import pathlib

from checkout import ROOT

PACKAGE = ROOT / "elm_jax"
INSIDE = ("models/t5/", "formats/t5x/", "formats/hf/t5_models.py", "workflows/convert/", "models/families.py",
          "models/t5x_module.py", "models/t5_config.py")
"""Where T5 may be named: the family, what reads and writes its files, the table, two kept modules."""
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py"))
           if not str(path.relative_to(PACKAGE)).startswith(INSIDE)]
CLASSES = {node.name for path in (PACKAGE / "models" / "t5").glob("*.py")
           for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
IDS = {"pad_id", "eos_id", "start_id", "PAD_ID", "EOS_ID", "PADDING_ID"}


def words(path: pathlib.Path):
    """Every name that a module imports, or uses."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("elm_jax.models.t5"):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_no_class_of_t5_is_named_outside_its_family():
    own = {"Cache", "EncoderLayer"}  # the door's, and BERT's
    assert {"T5Config", "T5Network", "Transformer"} <= CLASSES and len(OUTSIDE) > 150
    found = {str(path): named for path in OUTSIDE if (named := (CLASSES - own) & set(words(path)))}
    assert found == {}


def constants_of_ids(tree: ast.AST):
    """Where a module fixes an id as a constant, or takes an id for padding."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        fixed = isinstance(getattr(node, "value", None), ast.Constant)
        if fixed and any(isinstance(target, ast.Name) and target.id in IDS for target in targets):
            yield ast.unparse(node)
        if isinstance(node, ast.arguments):
            names = [*node.posonlyargs, *node.args][-len(node.defaults):] if node.defaults else []
            defaults = [*zip(names, node.defaults, strict=True),
                        *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            yield from (f"{name.arg}={value.value}" for name, value in defaults if name.arg in IDS
                        and isinstance(value, ast.Constant) and isinstance(value.value, int))
        if isinstance(node, ast.Compare):  # `tokens > 0`, `targets != 0`
            left = ast.unparse(node.left).rsplit(".", 1)[-1]
            zero = [ast.unparse(each) for each in node.comparators] == ["0"]
            if zero and left in ("tokens", "targets", "inputs", "choices"):
                yield ast.unparse(node)


def test_special_ids_are_constants_of_families_and_vocabularies_alone():
    found = {str(path): fixed for path in OUTSIDE if "vocabularies" not in path.parts
             and (fixed := list(constants_of_ids(ast.parse(path.read_text()))))}
    assert found == {}
    broken = "PAD_ID = 0\ndef f(a, eos_id=1): return a.tokens > 0\ndef g(*, pad_id: int = 0): pass\n"
    assert len(list(constants_of_ids(ast.parse(broken)))) == 4
