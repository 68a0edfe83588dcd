"""The configuration package offers all of its models in one place, whichever module they live in."""

from __future__ import annotations

import importlib
import pkgutil

import serving.config as package


def test_every_model_of_every_module_is_offered() -> None:
    defined = {
        name
        for found in pkgutil.iter_modules(package.__path__, "serving.config.")
        for name, value in vars(importlib.import_module(found.name)).items()
        if isinstance(value, type) and value.__module__.startswith("serving.config.") and not name.startswith("_")
    }
    assert len(defined) > 15
    assert defined <= set(package.__all__)


def test_the_list_is_sorted_and_true() -> None:
    def order(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert package.__all__ == sorted(package.__all__, key=order)
    assert all(hasattr(package, name) for name in package.__all__)
