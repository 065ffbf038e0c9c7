"""What the studies share: the project's root on the path, commands run here, results with recipes."""
import json
import pathlib
import sys
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from distributed import write_json  # noqa: E402


def call(module, *argv):
    """Run a command's main in this process, as its user would."""
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, argv)]):
        module.main()


def named(flags, *keys):
    """Flags or a recipe, its paths without the folders that are this machine's."""
    def name(value):
        return [name(part) for part in value] if isinstance(value, list) else pathlib.PurePath(value).name

    return {**flags, **{key: name(flags[key]) for key in keys if flags.get(key)}}


def report(result, recipe, path):
    """Print a result with its recipe, and write it to path if there is one."""
    result = {**result, "recipe": recipe}
    print(json.dumps(result, indent=1))
    if path:
        write_json(path, result)


def command_line(**places):
    """The command as it was typed, for a recipe; places {WORD: a path that WORD stands for}."""
    words = {str(path): word for word, path in places.items()}
    return " ".join([f"studies/{pathlib.Path(sys.argv[0]).name}", *(words.get(a, a) for a in sys.argv[1:])])
