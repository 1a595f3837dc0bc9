#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the documents name exists: files, functions in files, links, make targets; blocks marked to compile do compile."""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".git", "build", "out", "__pycache__", ".venv"}  # folders that are written, not kept
SUFFIX = r"\.(?:cpp|h|hpp|c|cu|cuh|py|pyi|sh|md|txt|json|toml|yaml|yml|cmake|in|svg|png)"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
MARKED = re.compile(r"^<!-- compile -->\n```(cpp|c)\n(.*?)^```", re.M | re.S)
COMPILERS = {"cpp": ["-std=c++20", "-x", "c++"], "c": ["-std=c11", "-x", "c"]}


def tree():
    """Every file and folder, relative to the root, with a slash in front so that endings can be compared."""
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in SKIPPED]
        base = "/" + str(Path(folder).relative_to(ROOT)) if Path(folder) != ROOT else ""
        found.update(f"{base}/{name}" for name in folders + files)
    return found


TREE = tree()
TOP = {path.strip("/").split("/")[0] for path in TREE}


def find(name, doc):
    """The files that a document may mean by `name`: from the root, from the document, or the end of one path."""
    name = re.sub(r"^\./", "", name).rstrip("/")
    beside = os.path.normpath(os.path.join("/", doc.parent.relative_to(ROOT), name))
    hits = [path for path in ("/" + name, beside) if path in TREE]
    hits = hits or [path for path in TREE if path.endswith("/" + name)]
    pattern = name.replace(".", r"\.").replace("*", "[^/]*")
    return hits or [path for path in TREE if "*" in name and re.search(f"/{pattern}$", path)]


def is_path(span):
    """Whether a backticked span claims to be a path of this repository."""
    if re.match(r"[/~$<]|(?:build|out)(?:/|$)", span) or not re.fullmatch(r"[\w./*+-]+", span):
        return False
    return bool(re.search(SUFFIX + "$", span)) or ("/" in span and re.sub(r"^\./", "", span).split("/")[0] in TOP)


def wrong_names(text, doc):
    prose = FENCE.sub("", text)
    for span in re.findall(r"`([^`\n]+)`", prose):
        place = re.fullmatch(r"(\S+) : (.+)", span)
        path = place.group(1) if place else span
        if not (is_path(path) or place):
            continue
        hits = find(path, doc)
        if not hits:
            yield f"`{path}` does not exist"
        elif place:
            contents = "\n".join((ROOT / hit[1:]).read_text() for hit in hits if (ROOT / hit[1:]).is_file())
            for name in re.findall(r"[A-Za-z_][\w:]*", place.group(2)):
                if not re.search(rf"\b{name.split('::')[-1]}\b", contents):
                    yield f"`{span}`: {path} has no {name}"
    # Paths without backticks, also in blocks of commands: those that begin with a folder of the root.
    folders = "|".join(sorted(name for name in TOP if (ROOT / name).is_dir()))
    for path in re.findall(rf"(?<![\w/.:<-])((?:{folders})/[\w./-]*\w{SUFFIX})(?![\w/*])", text):
        if not find(path, doc):
            yield f"{path} does not exist"


def anchors(text):
    """What a link may name behind #: each heading as GitHub writes it, with a number from its second time on."""
    seen = {}
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        yield slug if slug not in seen else f"{slug}-{seen[slug]}"
        seen[slug] = seen.get(slug, 0) + 1


def wrong_links(text, doc):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = doc.parent / path if path else doc
        if not target.exists():
            yield f"link to {link}, which does not exist"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            yield f"link to {link}: {target.name} has no such heading"


def wrong_targets(text):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = re.findall(r"`(?:make|\./do) ([a-z-]+)", text)
    for language, block in FENCE.findall(text):
        commands += re.findall(r"^(?:\$ )?(?:make|\./do) ([a-z-]+)", block, re.M) if language != "cpp" else []
    for target in commands:
        if target not in targets:
            yield f"make {target}: the Makefile has no such target"


def wrong_code(text):
    for language, code in MARKED.findall(text):
        compiler = os.environ.get("CXX", "g++") if language == "cpp" else os.environ.get("CC", "gcc")
        command = [compiler, *COMPILERS[language], "-fsyntax-only", "-Wall", "-Wextra", f"-I{ROOT}/include", "-"]
        done = subprocess.run(command, input=code, capture_output=True, text=True)
        if done.returncode:
            yield f"a block marked to compile does not:\n{done.stderr}"


def main():
    docs = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
    docs = [doc for doc in docs if doc.is_file()]
    problems = []
    for doc in docs:
        text = doc.read_text()
        found = [*wrong_names(text, doc), *wrong_links(text, doc), *wrong_targets(text), *wrong_code(text)]
        problems += [f"{doc.relative_to(ROOT)}: {problem}" for problem in dict.fromkeys(found)]
    for problem in problems:
        print(f"check_docs: {problem}")
    if not problems:
        print(f"check_docs: {len(docs)} documents name only what exists")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
