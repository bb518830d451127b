"""The ``genpoe`` command line: one module per command, a thin layer over ``genpoe_plugin``."""
