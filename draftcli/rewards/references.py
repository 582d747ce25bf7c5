"""From a reference, `package.module:object` or `file.py:object`, to the object, and from the object to a reward."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from draftcli.errors import InputError, first_line

OPTIONS = ("pretrained", "backbone")
FORMS = "a reward is called as reward(images, prompts); a factory or class is called without arguments and returns one"


def find_object(name: str, reference: str) -> Any:
    """The object at `reference`.

    Args:
        name: what the user called it, for messages.
        reference: `package.module:object`, or `file.py:object` with the path of a file.

    Raises:
        InputError: it cannot be imported, or has no such object.
    """
    module, _, attribute = reference.rpartition(":")
    try:
        if module.endswith(".py"):
            found = _module_of_file(Path(module).expanduser())
        else:
            if ":" in name and (here := str(Path.cwd())) not in sys.path:
                sys.path.append(here)  # a console script does not look in the folder it is started from
            found = import_module(module)
    except Exception as error:  # whatever a user's own module raises while it is imported
        raise InputError(f"reward {name}: cannot import {module!r} ({type(error).__name__}: {error})") from error
    if not hasattr(found, attribute):
        raise InputError(f"reward {name}: {module} has no {attribute!r}")
    return getattr(found, attribute)


def make_reward(name: str, found: Any, options: Mapping[str, str]) -> Any:
    """The reward that `found` is or makes; a network among them is frozen and in `eval()`.

    A class, and a function that can be called without arguments (or with `options`), is called; what needs arguments
    and takes two, (images, prompts), is the reward itself.

    Args:
        name: what the user called it, for messages.
        found: a class, a factory, a function (images, prompts), or an object that is called so.
        options: what the user gave of OPTIONS; for classes and factories.

    Raises:
        InputError: it is none of these, it cannot be made, or options were given to what takes none.
    """
    if not callable(found):
        raise InputError(f"reward {name} is {_a(found)}, which cannot be called; {FORMS}")
    reward = found
    if isinstance(found, type) or _is_factory(name, found, options):
        try:
            reward = found(**options)
        except InputError:
            raise
        except Exception as error:  # a plug-in's own troubles, in one line
            raise InputError(f"reward {name}: cannot be made ({type(error).__name__}: {error})") from error
        if isinstance(reward, type) or not callable(reward):
            what = (
                f"the class {reward.__name__}" if isinstance(reward, type) else f"{_a(reward)}, which cannot be called"
            )
            raise InputError(f"reward {name}: its factory returned {what}; {FORMS}")
    elif options:
        raise InputError(
            f"reward {name} takes no {' or '.join(options)}: it is a reward already, and only a class or a factory has "
            "options; leave them out"
        )
    if isinstance(reward, nn.Module):
        reward.requires_grad_(False).eval()
    return reward


def _is_factory(name: str, found: Any, options: Mapping[str, str]) -> bool:
    """Whether an object that can be called, but is no class, makes a reward; False: it is one."""
    if isinstance(found, nn.Module) or hasattr(found, "name"):  # as `Reward` has it, whatever its signature says
        return False
    if hasattr(found, "blank"):
        return True
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError) as error:
        raise InputError(f"reward {name}: {first_line(error)}, so its arguments are not known; {FORMS}") from error
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    needed = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed and set(needed) <= set(OPTIONS):  # what is missing is said when it is called
        return True
    if not needed and (inspect.Parameter.VAR_POSITIONAL not in kinds or options):
        return True
    if needed and _takes(signature, 2):
        return False
    raise InputError(f"reward {name} is called as {getattr(found, '__name__', 'it')}{signature}; {FORMS}")


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _module_of_file(path: Path) -> ModuleType:
    """The module of a file, once for all objects of it; it finds the modules beside it, as a script does."""
    path = path.resolve()
    name = f"{path.stem} of {path.parent}"  # no other module can have such a name
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _a(value: object) -> str:
    word = type(value).__name__
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"
