"""What an import and a command load, and that names are registered as soon as anyone can use them."""

from __future__ import annotations

import ast
import configparser
import copy
import importlib
import importlib.metadata
import importlib.util
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import Trainer

import pion_hf
import pion_hf.optim
from pion_hf import needs
from pion_hf.integrations import hook
from pion_hf.integrations.hook import when_imported
from pion_hf.routing.adapters import lora_factors


def run(code: str, *arguments: str) -> str:
    """What `code` prints in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# -- what is loaded ---------------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "matplotlib", "rich", "yaml")

LIGHT_COMMANDS = f"""
import contextlib, io, sys
import pion_hf, pion_hf.optim, pion_hf.run
from pion_hf.cli import main
for argv in ([], ["--help"], ["--version"], ["spt"], ["run", "--help"], ["report", "--help"], ["answers", "--help"],
             ["compare", "--help"],
             ["report", "--titel", "x"], ["compare", "recipe.yaml", "--optims", "pion"]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(argv)
        except SystemExit as error:
            said.write(str(error))
    assert "pion" in said.getvalue(), (argv, said.getvalue())
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (argv, loaded)
"""

OPTIMIZERS_ALONE = """
import sys
from pion_hf import Inputs, Pion, PionLora, RoutedAdamW, Teon, TeonLora
print([name for name in ("transformers", "torch.distributed.tensor", "torch._dynamo", "sympy") if name in sys.modules])
"""


def test_help_loads_nothing():
    run(LIGHT_COMMANDS)


def test_the_optimizers_load_torch_alone():
    assert run(OPTIMIZERS_ALONE) == "[]\n"


@pytest.mark.parametrize("package", [pion_hf, pion_hf.optim], ids=lambda package: package.__name__)
def test_every_public_name_is_there(package):
    """Those that type checkers see are those that load."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in checked.body for alias in node.names}
    assert set(package.__all__) - set(seen) <= {"__version__", "register"}
    for name, home in seen.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)
        assert name in dir(package)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_rooms_are_attributes():
    assert run("import pion_hf; print(pion_hf.optim.checks.__name__)") == "pion_hf.optim.checks\n"


TRAINING_COMMANDS = """
import contextlib, io, sys
from pion_hf.cli import main
for command in ("sft", "cpt", "grpo", "plan"):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert said.getvalue().startswith(f"usage: pion-hf {command} "), said.getvalue()[:200]
    assert "--optim_rms" in said.getvalue()
assert not {"datasets", "pandas", "pyarrow", "evaluate", "transformers.trainer"} & set(sys.modules)

import pion_hf.cli.grpo, pion_hf.cli.sft
import pion_hf.integrations.trl as module
grpo = {"trl.trainer.grpo_trainer", "trl.generation.vllm_generation"}
assert not grpo & set(sys.modules)
assert "GRPOTrainer" in [c.__name__ for c in module.PionGRPOTrainer.__mro__]
assert grpo <= set(sys.modules)
try:
    module.PionPPOTrainer
except AttributeError as error:
    print(error)
"""


def test_training_commands_load_what_they_need():
    """Their help the flags alone; the trainer of rewards, whose module imports vLLM, comes when it is asked for."""
    assert "has no attribute 'PionPPOTrainer'" in run(TRAINING_COMMANDS)


# -- what is missing or too old ---------------------------------------------------------------------------------------


def lowest_releases() -> dict[str, str]:
    """Of setup.cfg, its extras too."""
    setup = configparser.ConfigParser()
    setup.read(Path(pion_hf.__file__).parents[1] / "setup.cfg", encoding="utf-8")
    lines = setup["options"]["install_requires"].split()
    for extra in setup["options.extras_require"].values():
        lines += extra.split()
    wanted = map(Requirement, lines)
    return {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in wanted}


def test_the_oldest_releases_are_those_of_the_metadata():
    lowest = lowest_releases()
    said = {**needs.OLDEST, **needs.OPTIONAL}
    assert {name: Version(lowest[name]) for name in said} == {name: Version(v) for name, v in said.items()}


def pretend(monkeypatch, **releases: str | None) -> None:
    """That these are installed, and not imported yet; None: neither."""
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name in releases and releases[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return releases.get(name) or installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(needs, "sys", SimpleNamespace(modules={}))


@pytest.mark.parametrize("command", ["sft", "cpt", "grpo", "plan"])
def test_a_command_names_the_release_that_is_needed(command, monkeypatch):
    pretend(monkeypatch, trl="1.8.0")
    with pytest.raises(
        SystemExit, match=rf"^pion-hf {command}: pion_hf needs trl 1\.9 or newer, which is 1\.8\.0 here"
    ):
        pion_hf.cli.main([command, "--help"])


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("trl", "pion_hf.integrations.trl_config"),
        ("trl", "pion_hf.integrations.trl"),
        ("transformers", "pion_hf.integrations.arguments"),
        ("transformers", "pion_hf.routing.structure"),
    ],
)
def test_what_is_too_old_or_missing_is_one_line(name, module, monkeypatch):
    file = importlib.util.find_spec(module).origin
    for release, said in (("0.5", "is 0.5 here"), (None, "is not installed")):
        pretend(monkeypatch, **{name: release})
        monkeypatch.setattr(needs, "find_spec", lambda _: None)
        with pytest.raises(ImportError, match=rf"needs {name} \S+ or newer, which {said}: pip install"):
            runpy.run_path(file)


def test_peft_is_looked_at_where_there_are_adapters(monkeypatch, model):
    pretend(monkeypatch, peft="0.17.1")
    assert lora_factors(model) == []
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ImportError, match=r"needs peft 0\.18\.1 or newer, which is 0\.17\.1 here"):
        lora_factors(adapted)


def test_benchmarks_name_the_package_that_they_need(monkeypatch, recipe):
    pretend(monkeypatch, lm_eval=None)
    monkeypatch.setattr(needs, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"^pion-hf sft: pion_hf needs lm_eval \S+ or newer, which is not installed"):
        pion_hf.cli.main(["sft", "--config", recipe(lm_eval_tasks=["arc_easy"])])


def test_builds_before_a_release_count_as_it_and_unknown_ones_as_any(monkeypatch):
    pretend(monkeypatch, torch="2.9.0a0+git1", transformers="5.0.0.dev0", trl=None)
    needs.require("torch", "transformers", "trl")  # trl can be found, its metadata cannot


def test_what_is_imported_counts_more_than_what_is_installed(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.0 or newer, which is 4\.57\.1 here"):
        Trainer.get_optimizer_cls_and_kwargs(SimpleNamespace(optim="pion"), None)


def test_a_name_that_has_moved_says_which_release_is_there():
    with (
        pytest.raises(ImportError, match=r"what is installed, trl \d.*: cannot import name 'gone'"),
        needs.needed("trl"),
    ):
        from trl import gone  # noqa: F401


# -- registering as soon as transformers is there ---------------------------------------------------------------------

REGISTERED_LATER = """
import importlib, pickle, sys, threading
import pion_hf
assert importlib.util.find_spec("transformers.training_args").loader.get_source("transformers.training_args")
assert "transformers.training_args" not in sys.modules

found = []
def use():
    from transformers.training_args import OptimizerNames, TrainingArguments
    from transformers import SchedulerType
    SchedulerType("teon_wsd")
    found.append(TrainingArguments(output_dir=sys.argv[1], optim="pion", use_cpu=True).optim)
threads = [threading.Thread(target=use) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 4, found
assert "transformers.trainer" not in sys.modules

import transformers
assert transformers.Trainer.get_optimizer_cls_and_kwargs.knows_pion_hf
importlib.reload(transformers.training_args)
transformers.training_args.OptimizerNames("muon")
for name in [name for name in sys.modules if name.startswith("pion_hf")]:
    del sys.modules[name]
import pion_hf  # again
assert [type(finder).__module__ for finder in sys.meta_path].count("pion_hf.integrations.hook") == 1
print(pickle.dumps(found[0]).hex())
"""

REGISTERED_AT_ONCE = """
import pickle, sys
import transformers
from transformers.training_args import OptimizerNames, TrainingArguments
member = pickle.loads(bytes.fromhex(sys.argv[1]))  # imports pion_hf
assert member is OptimizerNames.PION
from pion_hf import register
assert TrainingArguments(output_dir=sys.argv[2], optim="muon", use_cpu=True).optim == "muon"
from trl import SFTConfig  # the trainer's module, later
assert SFTConfig(output_dir=sys.argv[2], optim="teon", use_cpu=True, bf16=False).optim == "teon"
assert transformers.Trainer.get_optimizer_cls_and_kwargs.knows_pion_hf
"""


def test_names_are_there_in_either_order(tmp_path):
    """Two processes, because this one has imported both already."""
    pickled = run(REGISTERED_LATER, str(tmp_path)).strip()
    run(REGISTERED_AT_ONCE, pickled, str(tmp_path))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of a name that no test has used, of so many lines; it is gone afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hook, "_actions", dict(hook._actions))
    made = []

    def make(source: str = "value = 1") -> str:
        made.append(f"{tmp_path.name.replace('-', '_')}_{len(made)}")
        (tmp_path / f"{made[-1]}.py").write_text(source, encoding="utf-8")
        importlib.invalidate_caches()
        return made[-1]

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_an_action_follows_import_reload_and_another_import(module):
    name, seen = module(), []
    when_imported(name, lambda found: seen.append(found.value))
    assert importlib.util.find_spec(name).origin.endswith(f"{name}.py")
    assert seen == []
    found = importlib.import_module(name)
    assert not {type(found.__loader__), type(found.__spec__.loader)} & {hook._Loader}  # nothing of ours stays
    importlib.reload(found)
    del sys.modules[name]
    importlib.import_module(name)
    assert seen == [1, 1, 1]


def test_an_action_comes_at_once_where_the_module_is_there(module):
    name, seen = module(), []
    found = importlib.import_module(name)
    when_imported(name, seen.append)
    assert seen == [found]


def test_a_module_that_another_thread_is_importing_is_waited_for(module):
    name, seen = module("import time\ntime.sleep(0.3)\nvalue = 2"), []
    thread = threading.Thread(target=importlib.import_module, args=(name,))
    thread.start()
    while name not in sys.modules:
        time.sleep(0.01)
    when_imported(name, lambda found: seen.append(found.value))
    thread.join()
    assert set(seen) == {2}


def test_a_module_that_fails_is_not_acted_on(module):
    name, seen = module("raise RuntimeError('broken')"), []
    when_imported(name, seen.append)
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module(name)
    assert seen == []


def test_a_module_that_is_absent_stays_so():
    when_imported("no_such_module_at_all", pytest.fail)
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_module_at_all")
        assert importlib.util.find_spec("no_such_module_at_all") is None
    finally:
        hook._actions.pop("no_such_module_at_all")


def test_other_finders_are_asked_and_other_hooks_end(module, monkeypatch):
    """Another package's hook that asks all finders, ours too, for every module."""
    name, seen = module(), []

    class Greedy:
        busy = False

        def find_spec(self, name, path=None, target=None):
            if self.busy:
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.busy = False

    for position in (0, len(sys.meta_path)):
        finders = list(sys.meta_path)
        finders.insert(position, Greedy())
        monkeypatch.setattr(sys, "meta_path", finders)
        when_imported(name, seen.append)
        importlib.import_module(name)
        sys.modules.pop(name)
    assert seen


def test_a_loader_can_be_copied_and_asked(module):
    name = module()
    when_imported(name, lambda found: None)
    spec = importlib.util.find_spec(name)
    assert copy.copy(spec.loader).get_data(spec.origin) == spec.loader.get_data(spec.origin) == b"value = 1"
    loader = spec.loader
    assert not hasattr(loader, "nothing")
