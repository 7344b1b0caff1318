"""The generated pages of the reference, as Markdown: public names, modules, metrics and configurations.

Everything is read from docstrings, comments and files. Nothing is imported from ``lit_ppo``.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
# Title and introduction of the page of each package; modules of no package are on the page "core".
PACKAGES = {
    "ppo": ("LitPPO", "The module that trains with PPO, and the steps of one update."),
    "supervised": ("SFT, reward models and critics", "The modules that train on text, before PPO."),
    "data": ("Data", "Data modules, and how files and rows become batches."),
    "rewards": ("Rewards", "Score sources: functions, reward models and weighted sums."),
    "core": ("Equations, advantages, experience", "The data of an update and the functions that work on it."),
    "callbacks": ("Hooks and callbacks", "The hook contract, and what all tricks and monitors share."),
    "models": ("Models", "Actor, critic and reference: loading, LoRA, the head, packing."),
    "engines": ("Engines", "Other programs that sample responses, such as vLLM, and weights for them."),
    "generation": ("Generation", "How responses are sampled."),
    "optim": ("Optimizers and schedules", "Learning-rate schedules, and how settings change when a run is resumed."),
    "parallel": ("Processes and strategies", "Ranks, sharding and strategies."),
    "memory": ("Memory", "What a run will need before it starts: the modules behind `lit-ppo memory`."),
    "run": ("Runs", "Run folders, checkpoints, resuming, stopping and export."),
    "console": ("Console", "What a run prints: progress, signs of life, samples before and after, summary."),
    "cli": ("The command's modules", "The code of the `lit-ppo` command."),
    "quickstart": ("The quickstart's data", "The grammar that writes the reviews of the quickstart."),
}
KINDS = {
    "": "Jobs and recipes",
    "tricks": "Tricks",
    "monitors": "Monitors",
    "strategy": "Strategies",
    "quickstart": "Stages of the quickstart",
    "sentiment": "Stages of the film reviews",
}
SHORT = """    options:
      members: false
      show_root_full_path: false
"""
TAG = re.compile(r"``([a-z]+(?:/[\w<>.]+)+)``")


def pages() -> dict[str, str]:
    """Markdown of every generated page, by its path in the manual."""
    found = {f"reference/{name}.md": package_page(name) for name in PACKAGES}
    found["reference/index.md"] = index_page()
    found["reference/tricks.md"] = callbacks_page("tricks")
    found["reference/monitors.md"] = callbacks_page("monitors")
    found["reference/command.md"] = command_page()
    found["reference/metrics.md"] = metrics_page()
    found["reference/configurations.md"] = configurations_page()
    return found


@cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module of the package, by its dotted name."""
    files = {f"lit_ppo.callbacks.{path.stem}": path for path in sorted((REPOSITORY / "callbacks").glob("*.py"))}
    for path in sorted((REPOSITORY / "lit_ppo").rglob("*.py")):
        if "callbacks" not in path.parts:
            files[".".join(path.relative_to(REPOSITORY).with_suffix("").parts)] = path
    return {
        name.removesuffix(".__init__"): ast.parse(path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if path.stem != "__main__"
    }


@cache
def public_names() -> dict[str, str]:
    """Every public name of ``lit_ppo`` and ``lit_ppo.callbacks``, and where it is defined."""
    trees = modules()
    homes = next(
        node.value
        for node in trees["lit_ppo"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES"
    )
    found = {f"lit_ppo.{name}": f"lit_ppo.{home}" for name, home in ast.literal_eval(homes).items()}
    for name, module in found.items():
        if not defines(trees[module], _last(name)):  # a package that exports the names of its modules
            module = next(m for m in trees if m.startswith(f"{module}.") and defines(trees[m], _last(name)))
        found[name] = f"{module}.{_last(name)}"
    for module, tree in trees.items():
        if module.startswith("lit_ppo.callbacks."):
            found |= {f"lit_ppo.callbacks.{name}": f"{module}.{name}" for name in _callbacks(tree)}
    return found | {
        "lit_ppo.callbacks.Experience": "lit_ppo.callbacks.experience.Experience",
        "lit_ppo.callbacks.PPOCallback": "lit_ppo.callbacks.base.PPOCallback",
        "lit_ppo.callbacks.fire": "lit_ppo.callbacks.hooks.fire",
    }


def defines(tree: ast.Module, name: str) -> bool:
    """Whether a class or function of this name is written in the module."""
    return any(isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name for node in tree.body)


def summary(identifier: str) -> str:
    """The first sentence of a docstring."""
    module, _, name = identifier.rpartition(".")
    node = next(n for n in modules()[module].body if getattr(n, "name", None) == name)
    docstring = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    return " ".join(docstring.split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")


def index_page() -> str:
    """The public names, with the first line of their docstrings."""
    names = public_names()
    text = "# Public names\n\nEverything in these tables is public: names, arguments and behaviour change only as\n"
    text += "[CONTRIBUTING.md](../../CONTRIBUTING.md) says. The pages in this part come from the docstrings.\n"
    for package in ("lit_ppo", "lit_ppo.callbacks"):
        text += f"\n## `{package}`\n\n| name | |\n|---|---|\n"
        for name in sorted((n for n in names if n.rpartition(".")[0] == package), key=str.lower):
            text += f"| [`{_last(name)}`][{names[name]}] | {summary(names[name])} |\n"
    return text


def package_page(package: str) -> str:
    """All modules of a package; those with public names come first."""
    homes = {identifier.rpartition(".")[0] for identifier in public_names().values()}
    tricks = {
        module for module, tree in modules().items() if module.startswith("lit_ppo.callbacks.") and [*_callbacks(tree)]
    }
    mine = [m for m in modules() if m.count(".") and _package(m) == package and m not in tricks]
    title, introduction = PACKAGES[package]
    text = f"# {title}\n\n{introduction}\n"
    for module in sorted(mine, key=lambda m: (m not in homes, m)):
        text += f"\n::: {module}\n"
    return text


def callbacks_page(kind: str) -> str:
    """The callbacks of ``configs/tricks`` or ``configs/monitors``."""
    title, advice = {
        "tricks": ("Tricks", "Which one for which problem: [The tricks](../explanation/tricks.md)."),
        "monitors": ("Monitors", "How to read what they show: [Reading the curves](../monitoring.md)."),
    }[kind]
    text = f"# {title}\n\nSwitch one on with `--config {kind}/NAME`. {advice}\n"
    for path in sorted((CONFIGS / kind).glob("*.yaml")):
        module = f"lit_ppo.callbacks.{path.stem}"
        (name,) = _callbacks(modules()[module])
        text += f'\n::: {module}.{name}\n{SHORT}\n```yaml title="--config {kind}/{path.stem}"\n{path.read_text()}```\n'
    return text


def configurations_page() -> str:
    """Every shipped configuration with its comment."""
    text = "# Configurations\n\nName one with `--config`. Later ones are applied on top of earlier ones.\n"
    for folder, kind in KINDS.items():
        text += f"\n## {kind}\n"
        for path in sorted((CONFIGS / folder).glob("*.yaml")):
            name = path.relative_to(CONFIGS).with_suffix("").as_posix()
            text += f"\n### {name}\n\n```yaml\n{path.read_text()}```\n"
    return text


def command_page() -> str:
    """The options that the command has beside those of Lightning, and those of ``lit-ppo export``."""
    trees, names = modules(), public_names()
    text = "# The command\n\n"
    text += "`lit-ppo SUBCOMMAND --help` lists all options; `--print_config` shows the configuration that they make.\n"
    text += "`--model.help LitPPO` and `--data.help PromptDataModule` list the arguments of a class.\n"
    subcommands = next(
        node.value
        for node in trees["lit_ppo.cli.quick"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUBCOMMANDS"
    )
    text += "\n| subcommand | what it does |\n|---|---|\n"
    text += "".join(f"| `lit-ppo {name}` | {does} |\n" for name, does in ast.literal_eval(subcommands).items())
    for module, title in (
        ("lit_ppo.cli.command", "lit-ppo fit, validate, test, predict"),
        ("lit_ppo.cli.export_command", "lit-ppo export"),
    ):
        text += f"\n## {title}\n\n| option | meaning |\n|---|---|\n"
        for call in (node for node in ast.walk(trees[module]) if isinstance(node, ast.Call)):
            function = getattr(call.func, "attr", "")
            if function == "add_argument":
                option, words = ast.literal_eval(call.args[0]), {k.arg: k.value for k in call.keywords}
                text += f"| `{option}` | {ast.literal_eval(words['help'])} |\n"
            elif function == "add_lightning_class_args":
                name, group = ast.unparse(call.args[0]), ast.literal_eval(call.args[1])
                link = f"[`{name}`][{names[f'lit_ppo.{name}']}]" if f"lit_ppo.{name}" in names else f"`{name}`"
                text += f"| `--{group}.*` | arguments of {link} |\n"
        text += "| `--debug` | The traceback of an error. |\n"
    return text


def metrics_page() -> str:
    """Every logged tag and its meaning."""
    text = "# Metrics\n\nEach metric has one point per update, unless it says otherwise. `<name>` stands for the name\n"
    text += "of a reward. How to read the curves: [Reading the curves](../monitoring.md).\n"
    for title, rows in metrics().items():
        text += f"\n## {title}\n\n| tag | meaning |\n|---|---|\n"
        text += "".join(f"| {tag} | {meaning} |\n" for tag, meaning in rows)
    return text


def metrics() -> dict[str, list[tuple[str, str]]]:
    """Tags and meanings: the lists in module docstrings, and what docstrings of classes say that they log."""
    found: dict[str, list[tuple[str, str]]] = {}
    for module, tree in modules().items():
        docstring = ast.get_docstring(tree) or ""
        items = re.findall(r"^- (``.*?``): (.*?)(?=\n- |\n\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
        if tagged := [(_code(tags), _code(text)) for tags, text in items if TAG.search(tags)]:
            found[docstring.partition("\n")[0].rstrip(".")] = tagged
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and (logged := _logged(ast.get_docstring(node) or "")):
                found.setdefault("Of callbacks and of supervised training", []).append(
                    (f"[`{node.name}`][{module}.{node.name}]", logged)
                )
    return found


def _logged(docstring: str) -> str:
    """What a docstring says after "Logs", up to the next sentence that starts a line of its own."""
    match = re.search(r"\bLogs\s+(``[a-z]+.*?)(?=\n\s*\n|\n\s*Source:|\Z)", docstring, re.DOTALL)
    return _code(match[1]) if match else ""


def _code(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _package(module: str) -> str:
    """The page of a module."""
    parts = module.split(".")
    return parts[1] if parts[1] in PACKAGES else "core"


def _callbacks(tree: ast.Module) -> Iterator[str]:
    """Names of the callbacks that a module defines."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "PPOCallback" for base in node.bases):
            yield node.name
