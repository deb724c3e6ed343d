"""CAFe: one vision-language checkpoint that retrieves and talks (arXiv 2503.19900)."""

__version__ = "0.1.0"
