"""The house rules on what is not code: layout, first lines, the README's commands, the map, work left undone."""

from __future__ import annotations

import re
from pathlib import Path

from house_tree import FILES, FOLDERS, PACKAGES, is_made, text_files

# What may stand at the top beside the product: what tools make and git ignores.
MADE = {".git", ".venv", "data", "runs", "build", "shared"}
PILLARS = {"data", "model", "parallel", "train", "recipes"}
SINGLES = {"__init__.py", "errors.py", "plain_tree.py", "config.py", "config_file.py", "config_model.py"}
# "to do" marks, written apart so that this file has none
UNDONE = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")
PLAIN_COMMANDS = {"git", "cd"}


def check_layout(root: Path) -> list[str]:
    """Each folder and file of the design is there, and nothing else."""
    found = [f"{name} is missing" for name in (*FOLDERS, *FILES) if not (root / name).exists()]
    for path in root.iterdir():
        if path.name not in {*FOLDERS, *FILES, *MADE} and not is_made(Path(path.name)):
            found.append(f"{path.name}: not a place of the design")
    for folder, package in PACKAGES.items():
        if folder != "." and (root / folder / "__init__.py").exists():
            found.append(f"{folder}/__init__.py: the outer folder must not be a package")
        if not (root / folder / package / "__init__.py").is_file():
            found.append(f"{folder}/{package}/__init__.py is missing")
    for path in (root / "sci_gpt").iterdir() if (root / "sci_gpt").is_dir() else ():
        if not is_made(Path(path.name)) and path.name not in PILLARS | SINGLES:
            found.append(f"sci_gpt/{path.name}: not a place of the design")
    return found


def check_first_lines(root: Path) -> list[str]:
    """A configuration, script or page says in its first line what it is for."""
    found = []
    for path in text_files(root):
        suffix = path.suffix or path.name
        if suffix in (".yaml", ".yml", ".toml", ".sh", ".sbatch", ".txt", ".md", "Makefile", "run"):
            lines = path.read_text(encoding="utf-8").splitlines()
            first = lines[1 if lines and lines[0].startswith("#!") else 0] if lines else ""
            if not re.match(r"(# |<!-- )\S", first):
                found.append(
                    f"{path.relative_to(root)}:1: the first line is a comment or heading that says what it is for"
                )
    return found


def check_undone(root: Path) -> list[str]:
    """No work is left in a comment: it is done, or it is an issue."""
    found = []
    for path in text_files(root):
        if path.suffix in (".png", ".jpg") or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if UNDONE.search(line):
                found.append(f"{path.relative_to(root)}:{number}: {line.strip()}")
    return found


def check_readme(root: Path) -> list[str]:
    """Each command in the README's shell blocks is a make target, or a sci-gpt command that a test or CI runs."""
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    runners = [*(root / "tests").rglob("*.py"), root / "launch" / "sci_launch" / "quickstart.py"]
    run = "\n".join(path.read_text(encoding="utf-8") for path in runners if path.is_file())
    found = []
    for command in shell_commands((root / "README.md").read_text(encoding="utf-8")):
        words = command.split()
        program = Path(words[0]).name
        if program == "make":
            found += [
                f"README: `make {word}` is no target" for word in words[1:] if "=" not in word and word not in targets
            ]
        elif program == "sci-gpt":
            if len(words) < 2 or f'"{words[1]}"' not in run:
                found.append(f"README: no test and no stage of the quickstart runs `{command}`")
        elif program not in PLAIN_COMMANDS:
            found.append(f"README: `{command}` is no make target and no sci-gpt command")
        found += [
            f"README: {word} is missing" for word in words if word.startswith("configs/") and not (root / word).exists()
        ]
    return found


def check_links(root: Path) -> list[str]:
    """Every relative link and picture of the README and the docs leads somewhere."""
    found = []
    for page in [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "benchmarks").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                found.append(f"{page.relative_to(root)}: {link} is missing")
    return found


def shell_commands(markdown: str) -> list[str]:
    """The commands of all fenced sh, bash, shell and console blocks, without prompts, comments and continued lines."""
    commands = []
    for block in re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("#")[0].split("&&"):
                if part.strip():
                    commands.append(part.strip().removeprefix("$ "))
    return commands
