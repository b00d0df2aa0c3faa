"""Explanation methods, a family a folder; each file registers what it defines (see ``xcli.registry``)."""
