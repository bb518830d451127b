"""Runs at every start of an interpreter, from the top of site-packages: so it is tiny, and imports nothing.

When ``lm_eval`` is about to be imported, `genpoe_plugin.registration` takes over. It is looked up only then, so the
checkout that is first on the path is the one that registers.
"""

import sys


class _OnLmEval:
    """A finder that finds nothing itself; it only learns that lm-eval is wanted."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "lm_eval" and cls in sys.meta_path:
            sys.meta_path.remove(cls)
            try:
                from genpoe_plugin.registration import install

                install()
            except Exception as error:
                import warnings

                warnings.warn(f"lm-eval-genpoe cannot register with this lm-eval: {error!r}", stacklevel=2)


def install():
    sys.meta_path.insert(0, _OnLmEval)
