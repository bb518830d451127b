"""Register the plugin when ``lm_eval`` is imported.

This module runs at every start of an interpreter, so it is tiny and imports nothing. `genpoe_plugin.registration` is
imported only when ``lm_eval`` is, so the checkout that is first on the path registers itself.
"""

import sys


class _OnLmEval:
    """A finder that finds no modules; it only notices the import of lm-eval."""

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
