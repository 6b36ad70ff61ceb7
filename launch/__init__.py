"""Starting a run: ``python -m launch`` composes it, every rank runs ``train.py``, ``quickstart.py`` installs first."""
