"""DVPO on Ray: pretrain a value model offline, freeze it, let it credit every token."""

__version__ = "0.1.0"
