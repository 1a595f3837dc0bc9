# SPDX-License-Identifier: MIT
"""Frameworks are installed without most of the packages that they depend on. For some that they import all the same,
though their dispatchers never call them, these are stand-ins: modules whose every name is an empty class."""

import importlib.abc
import importlib.machinery
import sys
import types


class StandIn(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {"__module__": self.__name__}))
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        ours = any(name == known or name.startswith(known + ".") for known in self.names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


def stand_in_for(*names):
    """From now on these modules, and those below them, are stand-ins, though real ones be installed."""
    sys.meta_path.insert(0, _Finder(names))
