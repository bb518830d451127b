"""The ``genpoe`` command: one module per command, thin over ``genpoe_plugin``."""
