"""The house rules that a program can check: layers, imports, sizes, names, and that the README's tree is the real
one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"errors", "output", "environment", "geometry", "prompts", "config"},
    {"devices", "volume", "resample", "crops", "drawing", "pages", "clicks", "losses", "masks", "metrics", "nn"},
    {"models", "data"},
    {"training", "inference", "evaluation"},
    {"apps", "cli", "__main__"},
)
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}
NOT_ON_A_BARE_GPU_MACHINE = "SimpleITK scipy edt cc3d typer rich yaml PIL accelerate torchio wandb tensorboard pydicom timm torchvision nibabel hypothesis pytest"


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted([*(ROOT / "samed3d").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")])
MODULES = {module_name(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports_of(module: str, trees: dict[str, ast.Module] | None = None) -> Iterator[str]:
    """Every module that ``module`` imports, at any depth of the file; ours are resolved to the submodule."""
    for node in ast.walk((trees or TREES)[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import on line {node.lineno}"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in MODULES else str(node.module)


def layer_of(module: str) -> int:
    return LAYER_OF[module.split(".")[1]]


def packaged() -> list[str]:
    """All modules of the package except the façade, which loads its names when they are first used."""
    return [m for m in MODULES if m.startswith("samed3d.")]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_checks_see_the_package():
    assert len(packaged()) > 20
    assert sum(i.startswith("samed3d.") for m in packaged() for i in imports_of(m)) > 40


def test_every_module_has_a_layer():
    assert {m.split(".")[1] for m in packaged()} - set(LAYER_OF) == set()


def test_imports_go_downward_only():
    wrong = [
        f"{module} imports {target}"
        for module in packaged()
        for target in imports_of(module)
        if target.startswith("samed3d.") and layer_of(target) > layer_of(module)
    ]
    assert wrong == []


def test_the_facade_imports_nothing_at_run_time():
    at_top = {
        alias
        for node in TREES["samed3d"].body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in [ast.unparse(node)]
    }
    assert not [line for line in at_top if "samed3d" in line]


def test_a_model_imports_no_model_but_its_base():
    """What is no architecture is free for all; a variant imports at most one architecture (no circles: see below)."""
    shared = {f"samed3d.models.{name}" for name in ("base", "weights", "sam_backbone", "inventory")}
    others = {
        module: {target for target in imports_of(module) if target.startswith("samed3d.models")} - shared
        for module in packaged()
        if module.startswith("samed3d.models.")
    }
    assert len(others) > 8
    assert {module: bases for module, bases in others.items() if len(bases) > 1} == {}
    assert "samed3d.models" not in set().union(*others.values())


def test_data_preparation_knows_no_model():
    seen = [(m, t) for m in MODULES if m.startswith("data_prep") for t in imports_of(m)]
    assert seen
    allowed = {"errors", "output", "geometry", "prompts", "volume", "resample", "drawing", "pages", "metrics", "data"}
    wrong = [
        f"{m} imports {t}"
        for m, t in seen
        if t.split(".")[0] == "torch" or (t.startswith("samed3d.") and t.split(".")[1] not in allowed)
    ]
    assert wrong == []


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """One import cycle, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :] + [node]
        if node in done:
            return []
        for below in sorted(edges.get(node, ())):
            if found := visit(below, [*path, node]):
                return found
        done.add(node)
        return []

    for start in sorted(edges):
        if found := visit(start, []):
            return found
    return []


def test_there_is_no_import_cycle():
    edges = {
        m: {t for t in imports_of(m) if t in MODULES and t not in ("samed3d", m)} for m in MODULES if m != "samed3d"
    }
    assert sum(map(len, edges.values())) > 40
    assert find_cycle(edges) == []


def test_the_cycle_finder_finds_one():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize(
    ("package", "homes", "least"),
    [
        ("SimpleITK", r"samed3d\.volume(\..*)?", 1),
        ("pydicom", r"samed3d\.volume(\..*)?", 0),
        ("timm", r"samed3d\.(nn|models)\..*", 0),
        ("typer", r"samed3d\.cli(\..*)?", 1),
        ("fastapi", r"samed3d\.apps\..*", 0),
        ("napari", r"samed3d\.apps\..*", 0),
    ],
)
def test_heavy_packages_stay_in_their_place(package, homes, least):
    users = {m for m in MODULES if any(t.split(".")[0] == package for t in imports_of(m))}
    assert len(users) >= least
    assert [m for m in users if not re.fullmatch(homes, m)] == []


def test_timm_is_imported_in_one_place_at_most():
    assert len([m for m in MODULES if any(t.split(".")[0] == "timm" for t in imports_of(m))]) <= 1


def test_importing_samed3d_loads_neither_torch_nor_simpleitk():
    done = run_python(
        "import sys, samed3d; print(samed3d.__version__, sorted({'torch', 'SimpleITK', 'numpy'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[1].strip() == "[]"


def test_the_lazy_names_are_all_there():
    code = "import samed3d; assert set(samed3d.__all__) <= set(dir(samed3d)); print([getattr(samed3d, n) for n in samed3d.__all__])"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    done = run_python("import samed3d; samed3d.Sesion")
    assert "has no attribute 'Sesion'" in done.stderr


def test_models_and_the_training_step_need_only_torch_einops_and_numpy():
    wanted = [m for m in packaged() if m.split(".")[1] in ("nn", "models", "losses")] + ["samed3d.training.step"]
    assert len(wanted) > 8
    code = f"""
import importlib, sys
BLOCKED = set({NOT_ON_A_BARE_GPU_MACHINE!r}.split())
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{{name}} is not on this machine", name=name)
sys.meta_path.insert(0, Blocker())
for name in {wanted!r}:
    importlib.import_module(name)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-2000:]


def all_python() -> list[Path]:
    more = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "train.py", ROOT / "infer.py"]
    return [*FILES, *more]


def test_files_have_at_most_400_lines():
    long = {str(p.relative_to(ROOT)): n for p in all_python() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120
    assert all(len((ROOT / name).read_text().splitlines()) <= 60 for name in ("train.py", "infer.py"))


def test_functions_have_at_most_60_lines():
    functions = [
        (m, f)
        for m, tree in TREES.items()
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 100
    long = [f"{m}.{f.name}: {n}" for m, f in functions if (n := (f.end_lineno or 0) - f.lineno + 1) > 60]
    assert long == []


def test_no_file_has_a_name_that_says_nothing():
    assert [str(p) for p in all_python() if p.stem in ("utils", "util", "common", "helpers", "helper", "misc")] == []


def test_no_class_is_a_base_manager_and_no_string_is_a_target():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert not re.fullmatch(r"Base.*Manager", node.name), module
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value != "_target_", module


def test_no_star_import_no_print_and_no_global_seed():
    # torch's initialisers know only the global generator, so a run seeds it once, before it builds its model.
    seeds = dict.fromkeys(
        ["torch.cuda.manual_seed_all", "np.random.seed", "numpy.random.seed", "random.seed", "set_seed"], ()
    )
    # torchio draws from torch's own generator; the state is put back after each sample.
    seeds["torch.manual_seed"] = ("samed3d.training.loop", "samed3d.data.augment")
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert "*" not in [alias.name for alias in node.names], f"{module}: star import"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "print", f"{module}:{node.lineno}: print; use logging or typer.echo"
                assert called not in seeds or module in seeds[called], (
                    f"{module}:{node.lineno}: {called}; pass a generator"
                )


def test_no_code_runs_at_import():
    allowed = (
        ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    )
    for module, tree in TREES.items():
        for node in tree.body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
            assert text or guard or isinstance(node, allowed), f"{module}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_no_machine_path_is_written_down():
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w")
    texts = [
        *all_python(),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "configs").glob("*"),
        ROOT / "Makefile",
    ]
    found = [f"{p.relative_to(ROOT)}: {m.group()}" for p in texts for m in [pattern.search(p.read_text())] if m]
    assert found == []


def test_no_file_is_over_16_mib():
    kept = [
        p
        for folder in ("samed3d", "data_prep", "checkpoints", "docs", "benchmarks", "tests")
        for p in (ROOT / folder).rglob("*")
        if p.is_file()
    ]
    assert len(kept) > 20
    assert [str(p) for p in kept if p.stat().st_size > 16 * 2**20] == []


# The README's code layout

GENERATED = {"runs", "out", "build", "dist", "site", "wandb", "corpus", "vendor", "node_modules", "__pycache__"}


def layout_lines() -> list[str]:
    """The lines of the README's fenced block that holds a line ``samed3d/``."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    return next(b for b in blocks if re.search(r"^samed3d/(\s|$)", b, flags=re.MULTILINE)).splitlines()


def layout() -> dict[str, str]:
    """Folder to phrase: two spaces of indentation a level, the folder's name, two or more spaces, the phrase."""
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, layout_lines()):
        level = (len(line) - len(line.lstrip(" "))) // 2
        name, _, phrase = line.strip().partition("  ")
        folders[level:] = [name]
        entries["".join(folders)] = phrase.strip()
    return entries


def real_folders() -> set[str]:
    """The folders that the README lists: all at the top, and the packages inside the package."""
    top = {p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    inside = {p.parent for p in (ROOT / "samed3d").rglob("*.py")} - {ROOT / "samed3d"}
    listed = {p for p in top | inside if not GENERATED & set(p.relative_to(ROOT).parts)}
    return {f"{p.relative_to(ROOT)}/" for p in listed if not p.name.endswith(".egg-info")}


def test_the_readme_layout_is_the_real_one():
    assert real_folders() - set(layout()) == set(), "there but not listed"
    assert {path for path in layout() if not (ROOT / path).exists()} == set(), "listed but not there"
    assert all(layout().values()), "every folder has a phrase"
    assert len(layout_lines()) <= 25
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
