"""Under pytest: one thread, and every call of a public function of longvid held to the axes it is annotated with.

The axes are the strings on the aliases of `longvid/types.py`. Within one call a letter has one size.
"""

import functools
import importlib.abc
import inspect
import os
import sys
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

os.environ.setdefault("OMP_NUM_THREADS", "1")


def axes_of(annotation) -> str:
    """The axes that a tensor given for `annotation` must have; empty if it may be any tensor, or none."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    annotated = [option for option in options if get_origin(option) is Annotated]
    may_be_any = any(option.__origin__ in options for option in annotated)
    return "" if may_be_any or not annotated else annotated[0].__metadata__[0]


def hold(what, value, axes, sizes):
    """Assert that `value`, if it is a tensor, has these axes; `sizes` are those of the letters met so far."""
    shape = getattr(value, "shape", None)
    if shape is None:
        return
    letters = axes.split()
    fits = len(shape) == len(letters)
    fits = fits and all(sizes.setdefault(axis, size) == size for axis, size in zip(letters, shape, strict=True))
    assert fits, f"{what} has shape {tuple(shape)}, its axes are '{axes}' and sizes before it {sizes}"


def checked(function):
    """`function`, which after each call asserts the axes of what it took and gave (what it refuses itself, it may)."""
    signature = inspect.signature(function)
    axes = {name: found for name, p in signature.parameters.items() if (found := axes_of(p.annotation))}
    returned = axes_of(signature.return_annotation)
    if not axes and not returned:
        return function
    import torch

    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            sizes, given = {}, signature.bind(*args, **kwargs).arguments
            for name, letters in axes.items():
                hold(f"{function.__qualname__}: {name}", given.get(name), letters, sizes)
            if returned:
                hold(f"{function.__qualname__}: its result", result, returned, sizes)
        return result

    return call


def check_calls(owner, module_name):
    """Replace the public functions and methods that `owner`, a module or a class, defines by checked ones."""
    for name, member in list(vars(owner).items()):
        if name.startswith("_") and name != "__call__" or getattr(member, "__module__", "") != module_name:
            continue
        if inspect.isfunction(member) and (function := checked(member)) is not member:
            setattr(owner, name, function)
        elif inspect.isclass(member) and inspect.ismodule(owner):
            check_calls(member, module_name)


class CheckingFinder(importlib.abc.MetaPathFinder):
    """Finds modules of longvid as usual; their calls are checked before anyone takes a function from them."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] != "longvid":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                check_calls(module, fullname)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, CheckingFinder())
