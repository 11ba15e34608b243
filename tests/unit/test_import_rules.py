"""The floor plan, held by reading the source: imports run downward, and the planning wing is pure."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mpillm

PACKAGE = Path(mpillm.__file__).parent
# From the ground up; what stands on one line does not import each other, but where ALLOWED says so.
FLOORS = [
    ["errors"],
    ["elementwise", "files", "hdf5", "plain"],
    ["schedules"],
    ["model"],
    ["planner.counts"],
    ["planner.stages"],  # the two files of the planner that the configuration asks how a pipeline is cut
    ["auto"],
    ["config", "machine", "data"],
    ["plan"],
    ["planner", "comm"],
    ["autograd", "guard"],
    ["scan"],
    ["nn"],
    ["pipeline", "checkpoint"],
    ["hf"],
    ["report.trace"],  # what a run writes; only its pictures are above training
    ["train"],
    ["inference", "verify", "report"],
    ["bench"],  # which draws as report does
    ["generate"],  # a name that scripts use
    ["cli"],
    ["__main__"],
]
ALLOWED = set()
PLANNING_WING = {"auto", "config", "errors", "files", "machine", "model", "plain", "plan", "planner", "planner.counts",
                 "planner.stages", "schedules"}
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


def part_of(module):
    """``mpillm.train.engine`` belongs to ``train``."""
    names = module.split(".")[1:]
    return next((part for part in (".".join(names[:2]), names[0]) if part in FLOOR_OF), None) if names else ""


def imports(path):
    """Every module that a file imports anywhere, with whether that happens when it is itself imported."""
    module = "mpillm." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {child for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))
              for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((module, alias.name, node not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                is_module = (PACKAGE.parent / node.module.replace(".", "/") / f"{alias.name}.py").exists()
                yield module, f"{node.module}.{alias.name}" if is_module else node.module, node not in inside


EDGES = [edge for path in sorted(PACKAGE.rglob("*.py")) for edge in imports(path)]


def test_every_module_has_a_floor():
    modules = {module for module, _, _ in EDGES if module != "mpillm.__init__"}
    assert not {module for module in modules if part_of(module) is None}
    assert {"train", "comm", "nn", "schedules", "planner"} <= {part_of(module) for module in modules}


def test_imports_run_downward_only():
    wrong = []
    for module, imported, _ in EDGES:
        if module == "mpillm.__init__" or imported.split(".")[0] != "mpillm":
            continue
        above, below = part_of(module), part_of(imported)
        if below and above != below and (above, below) not in ALLOWED and FLOOR_OF[above] <= FLOOR_OF[below]:
            wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_the_oracle_finds_upward_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "mpillm")
    (tmp_path / "mpillm" / "comm").mkdir(parents=True)
    (tmp_path / "mpillm" / "comm" / "x.py").write_text("def f():\n    from mpillm.train import engine\nimport torch\n")
    assert list(imports(tmp_path / "mpillm" / "comm" / "x.py")) == [
        ("mpillm.comm.x", "torch", True), ("mpillm.comm.x", "mpillm.train", False)]
    assert FLOOR_OF[part_of("mpillm.comm.x")] < FLOOR_OF[part_of("mpillm.train")]


def test_the_planning_wing_imports_neither_mpi_nor_torch():
    wrong = [(module, imported) for module, imported, _ in EDGES
             if part_of(module) in PLANNING_WING and imported.split(".")[0] in ("mpi4py", "torch")]
    assert not wrong


def loaded_by(statement):
    """Which of the heavy libraries a fresh Python has loaded after a statement, and whether MPI was started."""
    code = (f"import sys\n{statement}\n"
            "print(*sorted({'torch', 'torch._dynamo', 'mpi4py', 'mpi4py.MPI', 'h5py'} & set(sys.modules)))")
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_importing_mpillm_starts_no_mpi_and_loads_no_torch():
    assert loaded_by("import mpillm; dir(mpillm); mpillm.__version__") == []


def test_importing_the_planning_wing_loads_no_torch():
    modules = {module.removesuffix(".__init__") for module, _, _ in EDGES if part_of(module) in PLANNING_WING}
    assert {"mpillm.config", "mpillm.schedules.check", "mpillm.planner.stages"} <= modules
    assert loaded_by(f"import {', '.join(sorted(modules))}") == []


def test_only_starting_a_world_starts_mpi():
    assert loaded_by("import mpillm; mpillm.Config; mpillm.Run; mpillm.Mesh; mpillm.launch") == ["h5py", "torch"]


def test_training_loads_no_compiler(tmp_path, monkeypatch):
    """Which every rank would pay with a second at the start and 70 MiB."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found = loaded_by(f"""
import pathlib, mpillm, tiny
path = pathlib.Path({str(tmp_path)!r})
tiny.write_token_file(path / "tokens.h5")
assert len(list(mpillm.Run(tiny.tiny(tiny.configure(path, "run"))))) == 6
""")
    assert "torch" in found and "torch._dynamo" not in found


def test_hdf5_files_are_opened_in_one_place():
    """Elsewhere it would be forgotten that a file system may have no locks."""
    assert {path.name for path in PACKAGE.rglob("*.py") if "h5py.File(" in path.read_text(encoding="utf-8")} == {"hdf5.py"}


def test_no_public_name_is_that_of_a_submodule():
    submodules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not submodules & (set(mpillm.__all__) - {"__version__"})
    assert all(getattr(mpillm, name) is not None for name in mpillm.__all__)
    assert set(dir(mpillm)) >= set(mpillm.__all__)
    assert callable(mpillm.scan.scan) and callable(mpillm.comm.allreduce)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        mpillm.nothing_of_this_name  # noqa: B018


def test_no_module_keeps_a_communicator():
    """Module-level code never calls what starts MPI or makes communicators."""
    starters = {"comm_world", "Mesh", "Group", "Clone", "Split", "as_group"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)):
                called = {getattr(call.func, "id", getattr(call.func, "attr", "")) for call in ast.walk(node)
                          if isinstance(call, ast.Call)}
                assert not called & starters, f"{path}: line {node.lineno}"


def test_the_map_of_the_house_has_every_room_and_file():
    """``docs/architecture.rst``, which is to be read in a clone: its list of files is the package's."""
    page = (PACKAGE.parent / "docs" / "architecture.rst").read_text(encoding="utf-8")
    listed, room = set(), ""
    for line in page[page.index("Files\n-----"):page.index("Outside the package")].splitlines():
        name = line.split()[0] if line.startswith("    ") else ""
        if name.endswith("/") or name == "mpillm":
            room = name.removesuffix("mpillm")
        elif name.endswith(".py"):
            listed.add(room + name)
    listed.remove("cli/*.py")
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")
             if path.parent.name != "cli" and (path.name != "__init__.py" or path.parent == PACKAGE)}
    assert listed == files
